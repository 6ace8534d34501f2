// SPDX-License-Identifier: Apache-2.0
// The kernels on plain arrays, on every ISA level this machine runs, over sizes around their tiles. Inputs
// are small multiples of 1/8, so that sums are exact and the levels must agree bit for bit.
#include <catch2/catch.hpp>
#include <cstdlib>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

#include "ops/kernels/kernels.h"

using namespace flashlm::kernels;

namespace {

std::vector<const Level*> runnable_levels() {
  std::vector<const Level*> out;
  for (int64_t i = 0; i < levels().count; ++i) {
    if (levels().first[i].supported()) out.push_back(levels().first + i);
  }
  return out;
}

std::vector<float> dyadic(int64_t n, uint32_t seed) {
  std::mt19937 generator(seed);
  std::vector<float> out(n);
  for (float& x : out) x = static_cast<float>(static_cast<int>(generator() % 33) - 16) / 8;
  return out;
}

int64_t packed_size(const Table<float>& t, int64_t k, int64_t n) {
  return k * ((n + t.gemm_panel - 1) / t.gemm_panel) * t.gemm_panel;
}

}  // namespace

TEST_CASE("every level up to the CPU's best is listed, lowest first", "[isa]") {
  REQUIRE(std::string(levels().first[0].name) == "baseline");
  REQUIRE(levels().first[0].supported());
  REQUIRE(std::string(isa()) == runnable_levels().back()->name);
}

TEST_CASE("gemm equals the triple loop at every size around its tile", "[gemm]") {
  for (const Level* level : runnable_levels()) {
    INFO(level->name);
    const Table<float>& t = level->float_table();
    for (int64_t m : {0, 1, 5, 6, 7, 13, 25}) {
      for (int64_t n : {0, 1, 7, 16, 33, 65}) {
        for (int64_t k : {0, 1, 3, 255, 256, 257, 520}) {
          for (bool transposed : {false, true}) {
            for (bool accumulate : {false, true}) {
              const auto a = dyadic(m * k, 1), b = dyadic(k * n, 2);
              std::vector<float> packed(packed_size(t, k, n)), c = dyadic(m * n, 3), want = c;
              const int64_t a_row = transposed ? 1 : k, a_col = transposed ? m : 1;
              const int64_t b_row = transposed ? 1 : n, b_col = transposed ? k : 1;
              for (int64_t i = 0; i < m; ++i) {
                for (int64_t j = 0; j < n; ++j) {
                  float sum = accumulate ? c[i * n + j] : 0;
                  for (int64_t p = 0; p < k; ++p) sum += a[i * a_row + p * a_col] * b[p * b_row + j * b_col];
                  want[i * n + j] = sum;
                }
              }
              t.gemm_pack(k, n, b.data(), b_row, b_col, packed.data());
              t.gemm(m, n, k, a.data(), a_row, a_col, packed.data(), c.data(), n, accumulate);
              INFO("m " << m << " n " << n << " k " << k << " transposed " << transposed);
              REQUIRE(c == want);
            }
          }
        }
      }
    }
  }
}

TEST_CASE("relu2_glu and rms_norm agree between levels at every length", "[relu2_glu][rms_norm]") {
  const Table<float>& baseline = levels().first[0].float_table();
  for (const Level* level : runnable_levels()) {
    INFO(level->name);
    const Table<float>& t = level->float_table();
    for (int64_t n = 0; n <= 67; ++n) {
      const auto x = dyadic(n + 1, 1), y = dyadic(n + 1, 2);
      std::vector<float> got(n), want(n);
      // One element in: misaligned for every vector width.
      t.relu2_glu(n, x.data() + 1, y.data() + 1, got.data());
      baseline.relu2_glu(n, x.data() + 1, y.data() + 1, want.data());
      REQUIRE(got == want);
      if (n == 0) continue;
      t.rms_norm(1, n, x.data() + 1, y.data() + 1, 0.125f, got.data());
      baseline.rms_norm(1, n, x.data() + 1, y.data() + 1, 0.125f, want.data());
      for (int64_t i = 0; i < n; ++i) REQUIRE(got[i] == Approx(want[i]).epsilon(1e-6).margin(1e-12));
    }
  }
}

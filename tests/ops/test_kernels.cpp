// SPDX-License-Identifier: Apache-2.0
// The kernels on plain arrays, on every ISA level this machine runs, over sizes around their tiles. Inputs
// are small multiples of 1/8, so that sums are exact and the levels must agree bit for bit.
#include <catch2/catch.hpp>
#include <cmath>
#include <cstdlib>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

#include "tests/ops/kernel_check.h"

using namespace flashlm::kernels;

namespace {

std::vector<const Level*> runnable_levels() {
  std::vector<const Level*> out;
  for (int64_t i = 0; i < levels().count; ++i) {
    if (levels().first[i].supported()) out.push_back(levels().first + i);
  }
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
              const auto a = dyadic<float>(m * k, 1), b = dyadic<float>(k * n, 2);
              std::vector<float> packed(packed_size(t, k, n)), c = dyadic<float>(m * n, 3), want = c;
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

TEST_CASE("stream_rows puts every row in its place and touches no other", "[rows]") {
  constexpr int64_t kRows = 5, kAll = 8, kIndex[kRows] = {6, 0, 7, 2, 3};
  for (const Level* level : runnable_levels()) {
    INFO(level->name);
    for (int64_t width : {0, 1, 3, 15, 16, 17, 32, 64, 67}) {
      for (int64_t shift : {0, 1}) {  // from a cache line's boundary
        INFO("width " << width << " shift " << shift);
        const auto from = dyadic<float>(kRows * width, 1);
        std::vector<float> memory(kAll * width + 32, 9);
        const auto address = reinterpret_cast<uintptr_t>(memory.data());
        const auto first = static_cast<int64_t>((64 - address % 64) % 64 / sizeof(float)) + shift;
        std::vector<float> want = memory;
        for (int64_t r = 0; r < kRows; ++r) {
          for (int64_t i = 0; i < width; ++i) want[first + kIndex[r] * width + i] = from[r * width + i];
        }
        level->float_table().stream_rows(kRows, width, from.data(), kIndex, memory.data() + first);
        REQUIRE(memory == want);
      }
    }
  }
}

TEST_CASE("rms_norm agrees between levels at every length", "[rms_norm]") {
  const Table<float>& baseline = levels().first[0].float_table();
  for (const Level* level : runnable_levels()) {
    INFO(level->name);
    const Table<float>& t = level->float_table();
    for (int64_t n = 1; n <= 67; ++n) {
      const auto x = dyadic<float>(n + 1, 1), y = dyadic<float>(n + 1, 2);
      std::vector<float> got(n), want(n);
      // One element in: misaligned for every vector width.
      t.rms_norm(1, n, x.data() + 1, y.data() + 1, 0.125f, got.data());
      baseline.rms_norm(1, n, x.data() + 1, y.data() + 1, 0.125f, want.data());
      for (int64_t i = 0; i < n; ++i) REQUIRE(got[i] == Approx(want[i]).epsilon(1e-6).margin(1e-12));
    }
  }
}

TEST_CASE("rms_norm and its backward equal the formula at every width and row count", "[rms_norm]") {
  constexpr double kEps = 0.125;
  for (const Level* level : runnable_levels()) {
    INFO(level->name);
    const Table<float>& t = level->float_table();
    for (int64_t rows : {1, 2, 3, 4, 5, 9}) {
      for (int64_t n : {1, 2, 3, 7, 8, 15, 16, 17, 31, 33, 64, 67, 131}) {
        INFO("rows " << rows << " n " << n);
        const auto x = dyadic<float>(rows * n, 1), scale = dyadic<float>(n, 2),
                   dy = dyadic<float>(rows * n, 3), residual = dyadic<float>(rows * n, 4);
        std::vector<float> y(rows * n), rstd(rows), part(rows), dx(rows * n),
            with_residual = dy, dscale(n, 0.5f), dscale2 = dscale;
        t.rms_norm(rows, n, x.data(), scale.data(), kEps, y.data());
        t.inverse_rms(rows, n, x.data(), kEps, rstd.data());
        // The last column by itself, as one who takes columns at a time would have it.
        t.scale_rows(rows, 1, x.data() + n - 1, n, rstd.data(), scale.data() + n - 1, part.data());
        t.rms_norm_backward(rows, n, dy.data(), x.data(), scale.data(), kEps, dx.data(), dscale.data());
        t.rms_norm_residual_backward(rows, n, with_residual.data(), x.data(), scale.data(), kEps,
                                     residual.data(), with_residual.data(), dscale2.data());
        REQUIRE(dscale == dscale2);
        std::vector<double> want_dscale(n, 0.5);
        for (int64_t r = 0; r < rows; ++r) {
          double squares = 0, product = 0;
          for (int64_t i = r * n; i < (r + 1) * n; ++i) {
            squares += double(x[i]) * x[i];
            product += double(dy[i]) * scale[i - r * n] * x[i];
          }
          const double inverse = 1 / std::sqrt(squares / n + kEps);
          REQUIRE(rstd[r] == Approx(inverse).epsilon(1e-6));
          REQUIRE(part[r] == y[(r + 1) * n - 1]);
          for (int64_t i = r * n; i < (r + 1) * n; ++i) {
            const double g = double(dy[i]) * scale[i - r * n];
            const double want = inverse * (g - x[i] * inverse * inverse * product / n);
            REQUIRE(y[i] == Approx(x[i] * inverse * scale[i - r * n]).epsilon(1e-6).margin(1e-12));
            REQUIRE(dx[i] == Approx(want).epsilon(1e-5).margin(1e-5));
            REQUIRE(with_residual[i] == Approx(dx[i] + residual[i]).epsilon(1e-6).margin(1e-6));
            want_dscale[i - r * n] += dy[i] * x[i] * inverse;
          }
        }
        for (int64_t i = 0; i < n; ++i)
          REQUIRE(dscale[i] == Approx(want_dscale[i]).epsilon(1e-5).margin(1e-4));
      }
    }
  }
}

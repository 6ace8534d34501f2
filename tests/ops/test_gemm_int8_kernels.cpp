// SPDX-License-Identifier: Apache-2.0
// The int8 product of two matrices on plain arrays, on the levels that have it: exact integers times a scale,
// compared bit for bit with the plain loops.
#include <array>
#include <catch2/catch.hpp>
#include <cmath>
#include <limits>
#include <random>
#include <vector>

#include "tests/ops/kernel_check.h"

using namespace flashlm::kernels;

namespace {

/// C = Aᵀ diag(factor) B through the kernels; a (depth, m), b (depth, n) begin at index 1.
std::vector<float> product(const Table<float>& t, int64_t depth, int64_t m, int64_t n,
                           const std::vector<float>& a, const std::vector<float>& factor,
                           const std::vector<int8_t>& b, std::vector<float> c, bool accumulate) {
  const int64_t panel = t.int8_panel, groups = (depth + 3) / 4;
  std::vector<int32_t> strips(groups * round_up(m, panel)), packed((groups + 1) * round_up(n, panel));
  std::vector<float> scale(m);
  t.int8_quantize_columns(depth, m, a.data() + 1, m, factor.data(), strips.data(), scale.data());
  t.int8_pack(depth, n, b.data() + 1, n, packed.data());
  t.gemm_int8(m, n, depth, strips.data(), scale.data(), packed.data(), c.data() + 1, n + 3, accumulate);
  return c;
}

}  // namespace

TEST_CASE("gemm_int8 equals the triple loop at every size around its tile", "[gemm_int8]") {
  for_each_table_with(&Table<float>::int8_panel, [](const Table<float>& t) {
    std::mt19937 generator(7);
    const auto integer = [&] { return static_cast<int>(generator() % 255) - 127; };
    const int64_t panel = t.int8_panel;
    std::vector<std::array<int64_t, 3>> sizes = {{49, 18 * panel + 3, 1029}};  // some blocks of everything
    for (int64_t m : {int64_t{0}, int64_t{1}, int64_t{3}, int64_t{8}, panel + 1, 9 * panel + 5}) {
      for (int64_t n : {int64_t{0}, int64_t{1}, panel, 2 * panel + 3, 3 * panel, 4 * panel + 1}) {
        for (int64_t depth : {0, 1, 3, 4, 5, 33, 256}) sizes.push_back({m, n, depth});
      }
    }
    for (const auto& [m, n, depth] : sizes) {
      std::vector<float> a(depth * m + 1), factor(depth);
      std::vector<int8_t> b(depth * n + 1);
      for (int8_t& x : b) x = static_cast<int8_t>(static_cast<int>(generator() % 256) - 128);
      // Integers times powers of two, with a largest of 127 in each column: the scale is 1, nothing
      // rounds.
      for (int64_t p = 0; p < depth; ++p) {
        factor[p] = p % 2 ? 0.5f : 2.0f;
        for (int64_t i = 0; i < m; ++i) {
          a[1 + p * m + i] = static_cast<float>(p == i % depth ? 127 : integer()) / factor[p];
        }
      }
      std::vector<float> c(m * (n + 3) + 1, 0.5f), want = c, want_added = c;
      for (int64_t i = 0; i < m; ++i) {
        for (int64_t j = 0; j < n; ++j) {
          float sum = 0;
          for (int64_t p = 0; p < depth; ++p) sum += a[1 + p * m + i] * factor[p] * b[1 + p * n + j];
          want[1 + i * (n + 3) + j] = sum;
          want_added[1 + i * (n + 3) + j] += sum;
        }
      }
      INFO("m " << m << " n " << n << " depth " << depth);
      REQUIRE(product(t, depth, m, n, a, factor, b, c, false) == want);
      REQUIRE(product(t, depth, m, n, a, factor, b, c, true) == want_added);
    }
  });
}

TEST_CASE("gemm_int8 does not wrap on extreme inputs at its largest depth", "[gemm_int8]") {
  for_each_table_with(&Table<float>::int8_panel, [](const Table<float>& t) {
    const int64_t depth = 65536, m = 9, n = t.int8_panel + 1;
    for (float sign : {1.0f, -1.0f}) {
      for (int8_t q : {int8_t{-128}, int8_t{127}}) {
        const std::vector<float> a(depth * m + 1, sign * 127), factor(depth, 1.0f);
        const std::vector<int8_t> b(depth * n + 1, q);
        const auto c = product(t, depth, m, n, a, factor, b, std::vector<float>(m * (n + 3) + 1), false);
        for (int64_t i = 0; i < m; ++i) {
          for (int64_t j = 0; j < n; ++j) {
            REQUIRE(c[1 + i * (n + 3) + j] ==
                    sign * 127.0f * static_cast<float>(q) * static_cast<float>(depth));
          }
        }
      }
    }
  });
}

TEST_CASE("int8_quantize_columns: each column its scale, zeros zero, broken columns broken", "[gemm_int8]") {
  for_each_table_with(&Table<float>::int8_panel, [](const Table<float>& t) {
    const int64_t depth = 6, m = 5;
    std::vector<float> a(depth * m + 1);
    const std::vector<float> factor(depth, 1.0f);
    for (int64_t p = 0; p < depth; ++p) {
      a[1 + p * m] = static_cast<float>(p) * 1e-20f;
      a[1 + p * m + 1] = static_cast<float>(p) - 10;
    }
    a[1 + 2 * m + 3] = std::numeric_limits<float>::infinity();
    a[1 + 4 * m + 4] = std::numeric_limits<float>::quiet_NaN();
    const std::vector<int8_t> ones(depth + 1, 1);
    const auto c = product(t, depth, m, 1, a, factor, ones, std::vector<float>(m * 4 + 1), false);
    REQUIRE(c[1] == Approx(15e-20f).epsilon(1e-2));
    REQUIRE(c[5] == Approx(-45).epsilon(1e-2));
    REQUIRE(c[9] == 0);
    REQUIRE(std::isnan(c[13]));
    REQUIRE(std::isnan(c[17]));
  });
}

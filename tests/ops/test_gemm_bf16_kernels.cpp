// SPDX-License-Identifier: Apache-2.0
// The bfloat16 product on plain arrays, on the levels that have it. Small multiples of 1/8 are bfloat16
// numbers with exact sums, so the results equal the plain loops bit for bit.
#include <array>
#include <catch2/catch.hpp>
#include <cmath>
#include <cstring>
#include <limits>
#include <random>
#include <vector>

#include "tests/ops/kernel_check.h"

using namespace flashlm::kernels;

TEST_CASE("functions of bfloat16 are there where bf16_panel says so", "[gemm_bf16]") {
  for_each_table([](const auto& t) {
    const bool has_it = t.bf16_panel > 0;
    REQUIRE((t.gemm_bf16 != nullptr) == has_it);
    REQUIRE((t.bf16_zip != nullptr) == has_it);
    REQUIRE((t.bf16_zip_rounded != nullptr) == has_it);
    REQUIRE((t.causal_conv1d_bf16 != nullptr) == has_it);
    REQUIRE((t.gated_conv_slopes != nullptr) == has_it);
    REQUIRE((t.gated_conv_backward_slopes != nullptr) == has_it);
    REQUIRE((t.cross_entropy_bf16 != nullptr) == has_it);
    REQUIRE((t.cross_entropy_bf16_backward != nullptr) == has_it);
  });
}

TEST_CASE("gemm_bf16 equals the triple loop at every size around its tile", "[gemm_bf16]") {
  for_each_table_with(&Table<float>::bf16_panel, [](const Table<float>& t) {
    const int64_t panel = t.bf16_panel;
    std::vector<std::array<int64_t, 3>> sizes = {{49, 18 * panel + 3, 1101}};  // some blocks of everything
    for (int64_t m : {0, 1, 2, 7, 8, 9, 16, 17, 33}) {
      for (int64_t n : {int64_t{0}, int64_t{1}, panel, panel + 1, 2 * panel + 3, 3 * panel, 3 * panel + 1}) {
        for (int64_t k : {0, 1, 2, 3, 33, 255, 256, 257, 515}) sizes.push_back({m, n, k});
      }
    }
    for (const auto& [m, n, k] : sizes) {
      const int64_t a_row = k + 2, b_row = n + 1, c_row = n + 3, pairs = (k + 1) / 2;
      const auto a = dyadic<float>(m * a_row + 1, 1), b = dyadic<float>(k * b_row + 1, 2),
                 factor = dyadic<float>(k + 1, 4);
      std::vector<float> c = dyadic<float>(m * c_row + 1, 3), added = c, want = c, want_added = c;
      std::vector<float> a_transposed(k * m + 1);
      for (int64_t i = 0; i < m; ++i) {
        for (int64_t p = 0; p < k; ++p) a_transposed[1 + p * m + i] = a[1 + i * a_row + p];
        for (int64_t j = 0; j < n; ++j) {
          float sum = 0;
          for (int64_t p = 0; p < k; ++p) sum += a[1 + i * a_row + p] * b[1 + p * b_row + j] * factor[1 + p];
          want[1 + i * c_row + j] = 0.5f * sum;
          want_added[1 + i * c_row + j] += 0.5f * sum;
        }
      }
      INFO("m " << m << " n " << n << " k " << k);
      std::vector<int32_t> rows(m * pairs, -1), packed(pairs * round_up(n, panel), -1);
      std::vector<int32_t> strips(pairs * round_up(m, panel), -1);
      // Rows of A as they are, the factor with B; then A by columns in strips with the factor, B without.
      t.bf16_pack_rows(m, k, a.data() + 1, a_row, rows.data());
      t.bf16_pack(k, n, b.data() + 1, b_row, factor.data() + 1, packed.data());
      leave_nan_on_stack();
      t.gemm_bf16(m, n, k, {rows.data(), pairs, 1, panel * pairs}, packed.data(), 0.5f, c.data() + 1, c_row,
                  /*accumulate=*/false);
      REQUIRE(c == want);
      t.bf16_pack(k, n, b.data() + 1, b_row, nullptr, packed.data());
      t.bf16_pack(k, m, a_transposed.data() + 1, m, factor.data() + 1, strips.data());
      leave_nan_on_stack();
      t.gemm_bf16(m, n, k, {strips.data(), 1, panel, panel * pairs}, packed.data(), 0.5f, added.data() + 1,
                  c_row, /*accumulate=*/true);
      REQUIRE(added == want_added);
    }
  });
}

TEST_CASE("bf16_pack_columns packs the transpose as bf16_pack packs the matrix", "[gemm_bf16]") {
  for_each_table_with(&Table<float>::bf16_panel, [](const Table<float>& t) {
    std::mt19937 generator(5);
    std::normal_distribution<float> normal;
    for (int64_t n : {0, 1, 15, 16, 17, 40}) {
      for (int64_t k : {0, 1, 2, 3, 16, 31, 32, 33, 63, 64, 65, 256}) {
        const int64_t column = k + 3;
        std::vector<float> b(k * n + 1), transposed(n * column + 1, NAN);
        for (int64_t p = 0; p < k; ++p) {
          for (int64_t j = 0; j < n; ++j) {
            transposed[1 + j * column + p] = b[p * n + j] = normal(generator);
          }
        }
        const int64_t size = (k + 1) / 2 * round_up(n, t.bf16_panel);
        std::vector<int32_t> want(size + 1, 77), got = want;
        t.bf16_pack(k, n, b.data(), n, /*factor=*/nullptr, want.data());
        t.bf16_pack_columns(k, n, transposed.data() + 1, column, got.data());
        INFO("n " << n << " k " << k);
        REQUIRE(got == want);
      }
    }
  });
}

TEST_CASE("bfloat16 packing holds int8 exactly and rounds floats to nearest, ties to even", "[gemm_bf16]") {
  for_each_table_with(&Table<float>::bf16_panel, [](const Table<float>& t) {
    std::vector<int8_t> bytes(256);
    std::vector<float> floats(256);
    for (int i = 0; i < 256; ++i) floats[i] = bytes[i] = static_cast<int8_t>(i - 128);
    std::vector<int32_t> from_bytes(128), from_floats(128);
    t.bf16_pack_int8(16, 16, bytes.data(), 16, from_bytes.data());
    t.bf16_pack(16, 16, floats.data(), 16, nullptr, from_floats.data());
    REQUIRE(from_bytes == from_floats);
    REQUIRE(from_bfloat16(static_cast<uint16_t>(from_bytes[0])) == -128);
    REQUIRE(from_bfloat16(static_cast<uint16_t>(from_bytes[0] >> 16)) == -112);
    const float infinity = std::numeric_limits<float>::infinity();
    const std::vector<float> x = {1 + 0x1p-8f, 1 + 0x3p-8f, -1 - 0x1.02p-8f, 3e38f, infinity, NAN};
    const std::vector<float> want = {1, 1 + 0x4p-8f, -1 - 0x2p-8f, 3e38f, infinity, NAN};
    std::vector<int32_t> pairs(3);
    t.bf16_pack_rows(1, 6, x.data(), 6, pairs.data());
    for (int i = 0; i < 6; ++i) {
      const float got = from_bfloat16(static_cast<uint16_t>(pairs[i / 2] >> (i % 2 * 16)));
      if (std::isnan(want[i])) {
        REQUIRE(std::isnan(got));
      } else if (std::isinf(want[i])) {
        REQUIRE(got == want[i]);
      } else {
        REQUIRE(got == Approx(want[i]).epsilon(i == 3 ? 4e-3 : 0));
      }
    }
  });
}

namespace {

/// Calls f(table) for every level that has gemm_bf16x3.
template <class F>
void for_each_table_with_thirds(const F& f) {
  for_each_table_with(&Table<float>::bf16_panel, [&](const Table<float>& t) {
    if (t.gemm_bf16x3 != nullptr) f(t);
  });
}

struct Thirds {
  int64_t m, n, k;
  std::vector<float> a, factor;  // (k, m), (k)
  std::vector<int8_t> b;         // (k, n)

  /// c (m, n), whose rows are n + 3 long, = or += diag(factor) aᵀ · b.
  void product(const Table<float>& t, std::vector<float>& c, bool accumulate) const {
    constexpr int64_t kGuard = 16;
    const int64_t panel = t.bf16_panel, pairs = (k + 1) / 2, size = 3 * pairs * round_up(m, panel);
    std::vector<int32_t> strips(size + kGuard, 77), packed(pairs * round_up(n, panel), -1);
    t.bf16x3_pack(k, m, a.data(), m, factor.data(), strips.data());
    for (int64_t i = 0; i < kGuard; ++i) REQUIRE(strips[size + i] == 77);
    t.bf16_pack_int8(k, n, b.data(), n, packed.data());
    leave_nan_on_stack();
    t.gemm_bf16x3(m, n, k, strips.data(), packed.data(), c.data() + 1, n + 3, accumulate);
  }
};

}  // namespace

TEST_CASE("gemm_bf16x3 equals the triple loop at every size around its tile", "[gemm_bf16x3]") {
  for_each_table_with_thirds([](const Table<float>& t) {
    std::vector<std::array<int64_t, 3>> sizes = {{49, 800, 300}};
    for (int64_t m : {0, 1, 15, 16, 17, 33, 64, 65}) {
      for (int64_t n : {0, 1, 16, 17, 35, 48}) {
        for (int64_t k : {0, 1, 2, 3, 31, 32, 33, 127, 128, 129, 256}) sizes.push_back({m, n, k});
      }
    }
    for (const auto& [m, n, k] : sizes) {
      const Thirds operands = {
          m, n, k, dyadic<float>(m * k, 1), dyadic<float>(k, 2), integers(k * n, -127, 127, 3)};
      std::vector<float> c = dyadic<float>(m * (n + 3) + 1, 3), added = c, want = c, want_added = c;
      for (int64_t i = 0; i < m; ++i) {
        for (int64_t j = 0; j < n; ++j) {
          float sum = 0;
          for (int64_t p = 0; p < k; ++p) {
            sum += operands.a[p * m + i] * operands.factor[p] * static_cast<float>(operands.b[p * n + j]);
          }
          want[1 + i * (n + 3) + j] = sum;
          want_added[1 + i * (n + 3) + j] += sum;
        }
      }
      INFO("m " << m << " n " << n << " k " << k);
      operands.product(t, c, /*accumulate=*/false);
      REQUIRE(c == want);
      operands.product(t, added, /*accumulate=*/true);
      REQUIRE(added == want_added);
    }
  });
}

TEST_CASE("gemm_bf16x3 rounds as float32 does", "[gemm_bf16x3]") {
  for_each_table_with_thirds([](const Table<float>& t) {
    std::mt19937 generator(5);
    std::normal_distribution<float> normal;
    const int64_t m = 35, n = 40;
    for (int64_t k : {1, 7, 256}) {
      Thirds operands = {
          m, n, k, std::vector<float>(m * k), std::vector<float>(k), integers(k * n, -127, 127, 3)};
      for (float& value : operands.a)
        value = std::ldexp(normal(generator), static_cast<int>(generator() % 80) - 40);
      for (float& value : operands.factor) value = normal(generator);
      std::vector<float> c(m * (n + 3) + 1);
      operands.product(t, c, /*accumulate=*/false);
      for (int64_t i = 0; i < m; ++i) {
        for (int64_t j = 0; j < n; ++j) {
          double exact = 0, magnitude = 0;
          for (int64_t p = 0; p < k; ++p) {
            const double term = double{operands.a[p * m + i]} * operands.factor[p] *
                                static_cast<double>(operands.b[p * n + j]);
            exact += term;
            magnitude += std::fabs(term);
          }
          // One rounding where the factor comes in, one of each addition.
          const double bound = 1.001 * static_cast<double>(3 * k + 1) * std::ldexp(1.0, -24) * magnitude;
          INFO("k " << k << " row " << i << " column " << j);
          REQUIRE(std::fabs(double{c[1 + i * (n + 3) + j]} - exact) <= bound);
        }
      }
    }
  });
}

TEST_CASE("gemm_bf16x3 shows columns that are not finite, and no others", "[gemm_bf16x3]") {
  for_each_table_with_thirds([](const Table<float>& t) {
    const int64_t m = 20, n = 5, k = 40;
    for (float value : {std::numeric_limits<float>::infinity(), -std::numeric_limits<float>::infinity(),
                        std::numeric_limits<float>::quiet_NaN()}) {
      Thirds operands = {
          m, n, k, dyadic<float>(m * k, 1), std::vector<float>(k, 1.0f), integers(k * n, -127, 127, 3)};
      operands.a[23 * m + 17] = value;
      std::vector<float> c(m * (n + 3) + 1);
      operands.product(t, c, /*accumulate=*/false);
      for (int64_t i = 0; i < m; ++i) {
        for (int64_t j = 0; j < n; ++j) REQUIRE(std::isnan(c[1 + i * (n + 3) + j]) == (i == 17));
      }
    }
  });
}

TEST_CASE("to_bf16 rounds to nearest, ties to even, and from_bf16 is exact", "[gemm_bf16]") {
  for_each_table([](const auto& t) {
    if constexpr (sizeof(element_of(t)) == sizeof(float)) {
      for (int64_t n = 0; n <= 67; ++n) {
        INFO("n " << n);
        std::vector<float> x = uneven<float>(n, 1);
        if (n > 3) x[1] = 1 + 1.0f / 256, x[2] = 1 + 3.0f / 256, x[3] = 3.4e38f;  // two ties; infinite
        std::vector<uint16_t> y(n + 1, 77);
        t.to_bf16(n, x.data(), y.data());
        for (int64_t i = 0; i < n; ++i) REQUIRE(y[i] == bfloat16(x[i]));
        REQUIRE(y[n] == 77);
        std::vector<float> back(n + 1, 77);
        t.from_bf16(n, y.data(), back.data());
        for (int64_t i = 0; i < n; ++i) REQUIRE(back[i] == from_bfloat16(y[i]));
        REQUIRE(back[n] == 77);
      }
      for (const uint32_t bits : {0x7f800001u, 0xffffffffu, 0x7fc00000u}) {
        float nan;
        std::memcpy(&nan, &bits, sizeof nan);
        uint16_t y = 0;
        t.to_bf16(1, &nan, &y);
        REQUIRE(std::isnan(from_bfloat16(y)));
      }
    }
  });
}

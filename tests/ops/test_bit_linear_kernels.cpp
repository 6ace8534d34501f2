// SPDX-License-Identifier: Apache-2.0
// bit_linear's kernels on plain arrays, on every ISA level this machine runs: integers, so the results are
// compared bit for bit with the plain loops.
#include <catch2/catch.hpp>
#include <cmath>
#include <cstdint>
#include <limits>
#include <random>
#include <string>
#include <vector>

#include "tests/ops/kernel_check.h"

using namespace flashlm::kernels;

namespace {

/// n integers from index 1 on, so that pointers to them are misaligned.
std::vector<int8_t> from_one(int64_t n, int low, int high, uint32_t seed) {
  return integers(n + 1, low, high, seed);
}

/// ternary_gemm against the triple loop. q (m, k) and codes (n, k) begin at index 1.
template <class T>
void require_product(const Table<T>& t, int64_t m, int64_t n, int64_t k, const std::vector<int8_t>& q,
                     const std::vector<int8_t>& codes) {
  const int64_t padded = quantized_width(k), y_row = n + 3;
  std::vector<uint8_t> packed(round_up(n, t.ternary_panel) * round_up(k, 4) + 1, 77);
  t.ternary_pack(n, k, codes.data() + 1, packed.data() + 1);
  std::vector<int8_t> rows(m * padded + 1);
  std::vector<int32_t> row_sum(m);
  std::vector<T> inverse_scale(m), y(m * y_row, T(-5)), want = y;
  const T gamma = T(0.375);
  for (int64_t i = 0; i < m; ++i) {
    inverse_scale[i] = T(0.25) + static_cast<T>(i);
    for (int64_t p = 0; p < k; ++p) {
      rows[1 + i * padded + p] = q[1 + i * k + p];
      row_sum[i] += q[1 + i * k + p];
    }
    for (int64_t j = 0; j < n; ++j) {
      int64_t sum = 0;
      for (int64_t p = 0; p < k; ++p) sum += q[1 + i * k + p] * codes[1 + j * k + p];
      want[i * y_row + j] = static_cast<T>(sum) * (gamma * inverse_scale[i]);
    }
  }
  t.ternary_gemm(m, n, k, rows.data() + 1, row_sum.data(), inverse_scale.data(), packed.data() + 1, gamma,
                 y.data(), y_row);
  INFO("m " << m << " n " << n << " k " << k);
  REQUIRE(y == want);
}

}  // namespace

TEST_CASE("ternary_gemm equals the triple loop at every size around its tile", "[bit_linear]") {
  for_each_table([](const auto& t) {
    const int64_t panel = t.ternary_panel;
    for (int64_t m : {0, 1, 2, 3, 4, 5, 7, 8, 9, 15, 17}) {
      for (int64_t n :
           {int64_t{0}, int64_t{1}, panel - 1, panel, panel + 1, 2 * panel, 2 * panel + 1, 4 * panel + 1}) {
        for (int64_t k : {1, 2, 3, 4, 5, 17, 255, 256, 257, 683}) {
          require_product(t, m, n, k, from_one(m * k, -128, 127, 1), from_one(n * k, -1, 1, 2));
        }
      }
    }
    const int64_t m = 49, n = 18 * panel + 3, k = 1029;  // some blocks of everything
    require_product(t, m, n, k, from_one(m * k, -128, 127, 1), from_one(n * k, -1, 1, 2));
  });
}

TEST_CASE("ternary_gemm does not wrap on extreme inputs", "[bit_linear]") {
  for_each_table([](const auto& t) {
    for (int64_t k : {256, 257, 260, 512, 683, 4096}) {
      for (int q : {-128, 127}) {
        for (int code : {-1, 0, 1}) {
          require_product(t, 9, 2 * t.ternary_panel + 1, k, from_one(9 * k, q, q, 1),
                          from_one((2 * t.ternary_panel + 1) * k, code, code, 2));
        }
      }
    }
  });
}

TEST_CASE("panels of codes can be packed one by one", "[bit_linear]") {
  for_each_table([](const auto& t) {
    const int64_t n = 3 * t.ternary_panel - 1, k = 11, padded = 12;
    const auto codes = from_one(n * k, -1, 1, 3);
    std::vector<uint8_t> whole(3 * t.ternary_panel * padded), pieces = whole;
    t.ternary_pack(n, k, codes.data(), whole.data());
    for (int64_t j = 0; j < n; j += t.ternary_panel) {
      t.ternary_pack(std::min(t.ternary_panel, n - j), k, codes.data() + j * k, pieces.data() + j * padded);
    }
    REQUIRE(whole == pieces);
    // Stored as code + 1, the padding as code 0.
    for (uint8_t u : whole) REQUIRE(u <= 2);
    REQUIRE(whole.back() == 1);
  });
}

TEST_CASE("codes and their transpose pack to the same panels", "[bit_linear]") {
  for_each_table([](const auto& t) {
    const int64_t panel = t.ternary_panel;
    for (int64_t n : {int64_t{1}, panel - 1, panel, panel + 1, 2 * panel + 3}) {
      for (int64_t k : {1, 3, 4, 5, 8, 11}) {
        const int64_t row = n + 5;
        const auto transposed = from_one(k * row, -1, 1, 7);
        std::vector<int8_t> codes(n * k);
        for (int64_t j = 0; j < n; ++j) {
          for (int64_t p = 0; p < k; ++p) codes[j * k + p] = transposed[p * row + j];
        }
        std::vector<uint8_t> want(round_up(n, panel) * round_up(k, 4)), got = want;
        t.ternary_pack(n, k, codes.data(), want.data());
        t.ternary_pack_transposed(n, k, transposed.data(), row, got.data());
        INFO("n " << n << " k " << k);
        REQUIRE(got == want);
      }
    }
  });
}

TEST_CASE("abs_sum is the same double on every level", "[bit_linear]") {
  for (int64_t n = 0; n <= 200; ++n) {
    const auto w = uneven<float>(n + 1, 5);
    const auto v = uneven<double>(n + 1, 6);
    const double want = levels().first[0].float_table().abs_sum(n, w.data() + 1);
    const double want_double = levels().first[0].double_table().abs_sum(n, v.data() + 1);
    double plain = 0;
    for (int64_t i = 1; i <= n; ++i) plain += std::fabs(static_cast<double>(w[i]));
    REQUIRE(want == Approx(plain).epsilon(1e-14));
    for (int64_t i = 0; i < levels().count; ++i) {
      const Level& level = levels().first[i];
      if (!level.supported()) continue;
      INFO(level.name << " n " << n);
      REQUIRE(level.float_table().abs_sum(n, w.data() + 1) == want);
      REQUIRE(level.double_table().abs_sum(n, v.data() + 1) == want_double);
    }
  }
}

TEST_CASE("a fingerprint sees every change of one value, and the length", "[bit_linear]") {
  for_each_table([](const auto& t) {
    std::vector<int32_t> data(301);
    for (int64_t n : {0, 1, 15, 16, 63, 64, 65, 128, 299}) {
      const auto of = [&](int64_t bytes) { return t.fingerprint(bytes, data.data() + 1); };
      const uint64_t before = of(4 * n);
      REQUIRE(of(4 * n) == before);
      for (int64_t i = 0; i < n; ++i) {
        for (int32_t change : {1, -1, 1 << 31, 1 << 16}) {
          data[1 + i] ^= change;
          REQUIRE(of(4 * n) != before);
          data[1 + i] ^= change;
        }
      }
      if (n > 1) {
        data[1] = 7;
        const uint64_t first = of(4 * n);
        std::swap(data[1], data[n]);
        REQUIRE(of(4 * n) != first);
        data[n] = 0;
      }
      REQUIRE(of(4 * n + 1) != before);  // zeros, too
    }
  });
}

TEST_CASE("ternary codes follow the bound at every length", "[bit_linear]") {
  for_each_table([](const auto& t) {
    using T = decltype(element_of(t));
    for (int64_t n = 0; n <= 70; ++n) {
      auto w = uneven<T>(n + 1, 7);
      for (int64_t i = 0; i < n; i += 5) w[1 + i] = i % 2 ? T(0.5) : T(-0.5);  // on the bound: 0
      std::vector<int8_t> codes(n), want(n);
      for (int64_t i = 0; i < n; ++i) want[i] = w[1 + i] > T(0.5) ? 1 : w[1 + i] < T(-0.5) ? -1 : 0;
      t.ternary_codes(n, w.data() + 1, T(0.5), codes.data());
      REQUIRE(codes == want);
    }
  });
}

TEST_CASE("quantize_rows rounds ties to even, pads and sums at every length", "[bit_linear]") {
  for_each_table([](const auto& t) {
    using T = decltype(element_of(t));
    for (int64_t k = 1; k <= 140; ++k) {
      const int64_t rows = 3, padded = quantized_width(k);
      auto x = uneven<T>(rows * k + 1, 8);
      std::vector<int8_t> q(rows * padded, 99), want(rows * padded);
      std::vector<T> inverse(rows), a(rows * k);
      std::vector<int32_t> sum(rows), want_sum(rows);
      // The last row has scale 1 and values with ties in it.
      for (int64_t i = 0; i < k; ++i) x[1 + 2 * k + i] = i == 0 ? T(-127) : static_cast<T>(i % 9) - T(3.5);
      for (int64_t r = 0; r < rows; ++r) {
        T top = 0;
        for (int64_t i = 0; i < k; ++i) top = std::max(top, std::fabs(x[1 + r * k + i]));
        const T scale = T(127) / top;
        for (int64_t i = 0; i < k; ++i) {
          const T rounded = std::nearbyint(x[1 + r * k + i] * scale);
          want[r * padded + i] = static_cast<int8_t>(rounded);
          want_sum[r] += static_cast<int32_t>(rounded);
        }
      }
      t.quantize_rows(rows, k, x.data() + 1, 1e-5f, q.data(), inverse.data(), sum.data());
      INFO("k " << k);
      REQUIRE(q == want);
      REQUIRE(sum == want_sum);
      REQUIRE(inverse[2] == T(1));
      t.dequantize_rows(rows, k, q.data(), inverse.data(), a.data());
      for (int64_t i = 0; i < rows * k; ++i) REQUIRE(a[i] == q[i / k * padded + i % k] * inverse[i / k]);
    }
  });
}

TEST_CASE("quantize_rows: tiny rows have a bounded scale, broken rows stay broken", "[bit_linear]") {
  for_each_table([](const auto& t) {
    using T = decltype(element_of(t));
    const T infinity = std::numeric_limits<T>::infinity(), nan = std::numeric_limits<T>::quiet_NaN();
    for (int64_t k : {1, 4, 16, 33}) {
      for (int64_t at = 0; at < k; ++at) {
        std::vector<T> x(5 * k);
        x[at] = T(1e-6);    // below the floor of 1e-5: 12.7 steps of 1e-5 / 127
        x[k + at] = T(-3);  // row 1 is alone with its maximum
        x[2 * k + at] = -infinity;
        x[3 * k + at] = nan;
        std::vector<int8_t> q(5 * quantized_width(k), 99);
        std::vector<T> inverse(5);
        std::vector<int32_t> sum(5);
        t.quantize_rows(5, k, x.data(), 1e-5f, q.data(), inverse.data(), sum.data());
        REQUIRE(sum == std::vector<int32_t>{13, -127, 0, 0, 0});
        REQUIRE(q[at] == 13);
        REQUIRE(q[quantized_width(k) + at] == -127);
        REQUIRE(inverse[0] == Approx(1e-5 / 127));
        REQUIRE(std::isnan(inverse[2]));
        REQUIRE(std::isnan(inverse[3]));
        REQUIRE(inverse[4] == inverse[0]);  // all zeros
      }
    }
  });
}

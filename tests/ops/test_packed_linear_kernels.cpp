// SPDX-License-Identifier: Apache-2.0
// packed_linear's kernels on plain arrays, on every ISA level this machine runs: integers, so the results are
// compared bit for bit with the plain loops.
#include <algorithm>
#include <catch2/catch.hpp>
#include <cstdint>
#include <random>
#include <string>
#include <vector>

#include "tests/ops/kernel_check.h"

using namespace flashlm::kernels;

namespace {

int64_t packed_size(int64_t n, int64_t k) { return round_up(n, kPackedOutputs) * round_up(k, 4) / 4; }

/// packed_gemm on q (m, k) and codes (n, k) against sums (m, n), with every pointer misaligned.
template <class T>
void require_product(const Table<T>& t, int64_t m, int64_t n, int64_t k, const std::vector<int8_t>& q,
                     const std::vector<int8_t>& codes, const std::vector<int64_t>& sums) {
  const int64_t padded = quantized_width(k), y_row = n + 3;
  std::vector<uint8_t> packed(packed_size(n, k) + 1);
  t.packed_pack(n, k, codes.data(), packed.data() + 1);
  std::vector<int8_t> rows(m * padded + 1);
  std::vector<int32_t> row_sum(m);
  std::vector<T> inverse_scale(m), y(m * y_row + 1, T(-5)), want = y;
  const T gamma = T(0.375);
  for (int64_t i = 0; i < m; ++i) {
    inverse_scale[i] = T(0.25) + static_cast<T>(i);
    for (int64_t p = 0; p < k; ++p) {
      rows[1 + i * padded + p] = q[i * k + p];
      row_sum[i] += q[i * k + p];
    }
    for (int64_t j = 0; j < n; ++j) {
      want[1 + i * y_row + j] = static_cast<T>(sums[i * n + j]) * (gamma * inverse_scale[i]);
    }
  }
  t.packed_gemm(m, n, k, rows.data() + 1, row_sum.data(), inverse_scale.data(), packed.data() + 1, gamma,
                y.data() + 1, y_row);
  INFO("m " << m << " n " << n << " k " << k);
  REQUIRE(y == want);
}

std::vector<int64_t> triple_loop(int64_t m, int64_t n, int64_t k, const std::vector<int8_t>& q,
                                 const std::vector<int8_t>& codes) {
  std::vector<int64_t> sums(m * n);
  for (int64_t i = 0; i < m; ++i) {
    for (int64_t j = 0; j < n; ++j) {
      for (int64_t p = 0; p < k; ++p) sums[i * n + j] += q[i * k + p] * codes[j * k + p];
    }
  }
  return sums;
}

}  // namespace

TEST_CASE("packed codes lie where docs/formats.md says, on every level", "[packed_linear]") {
  for (auto [n, k] : {std::pair(1, 1), std::pair(16, 4), std::pair(65, 3), std::pair(130, 9)}) {
    const auto codes = integers(n * k, -1, 1, 1);
    std::vector<uint8_t> want(packed_size(n, k));
    for (size_t byte = 0; byte < want.size(); ++byte) {
      const int64_t line = byte / 64, lane = byte % 64 / 4, lines = round_up(k, 4) / 4;
      for (int field = 0; field < 4; ++field) {
        const int64_t j = line / lines * 64 + field * 16 + lane, p = line % lines * 4 + byte % 4;
        const int code = j < n && p < k ? codes[j * k + p] : 0;
        want[byte] = static_cast<uint8_t>(want[byte] | (code + 1) << 2 * field);
      }
    }
    for_each_table([&, n = n, k = k](const auto& t) {
      using T = decltype(element_of(t));
      std::vector<uint8_t> packed(want.size(), 0xff);
      t.packed_pack(n, k, codes.data(), packed.data());
      REQUIRE(packed == want);
      std::vector<T> w(n * k, T(-5)), values(codes.begin(), codes.end());
      for (T& value : values) value *= T(1.75);
      t.packed_unpack(n, k, packed.data(), T(1.75), w.data());
      REQUIRE(w == values);
    });
  }
}

TEST_CASE("panels of 2-bit codes can be packed one by one", "[packed_linear]") {
  for_each_table([](const auto& t) {
    const int64_t n = 3 * kPackedOutputs - 1, k = 11;
    const auto codes = integers(n * k, -1, 1, 3);
    std::vector<uint8_t> whole(packed_size(n, k)), pieces = whole;
    t.packed_pack(n, k, codes.data(), whole.data());
    for (int64_t j = 0; j < n; j += kPackedOutputs) {
      t.packed_pack(std::min(kPackedOutputs, n - j), k, codes.data() + j * k,
                    pieces.data() + packed_size(j, k));
    }
    REQUIRE(whole == pieces);
  });
}

TEST_CASE("packed_gemm equals the triple loop at every size around its tiles", "[packed_linear]") {
  for (int64_t m : {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 13}) {
    for (int64_t n : {0, 1, 3, 4, 5, 15, 16, 17, 33, 63, 64, 65, 127, 129, 193, 257, 321}) {
      // Around a group, and the lines after which 16-bit sums are widened.
      for (int64_t k : {1, 3, 4, 5, 63, 64, 65, 129}) {
        const auto q = integers(m * k, -128, 127, 1), codes = integers(n * k, -1, 1, 2);
        const auto sums = triple_loop(m, n, k, q, codes);
        for_each_table(
            [&, m = m, n = n, k = k](const auto& t) { require_product(t, m, n, k, q, codes, sums); });
      }
    }
  }
}

TEST_CASE("packed_gemm does not wrap on extreme inputs", "[packed_linear]") {
  // All codes and activations alike make every partial sum as large as it can be. 32-bit sums are widened
  // after 65,536 k; at 131,076 the top field of a byte, not shifted down, would pass 2^31.
  const int64_t n = 65;  // every field of a byte
  for (int64_t k : {64, 683, 65540, 131076}) {
    for (int64_t m : {1, 2}) {
      for (int q : {-128, 127}) {
        for (int code : {-1, 0, 1}) {
          const std::vector<int8_t> rows(m * k, static_cast<int8_t>(q)),
              codes(n * k, static_cast<int8_t>(code));
          const std::vector<int64_t> sums(m * n, k * q * code);
          for_each_table(
              [&, k = k, m = m](const auto& t) { require_product(t, m, n, k, rows, codes, sums); });
        }
      }
    }
  }
}

TEST_CASE("packed_gemm gives ternary_gemm's bits", "[packed_linear]") {
  for_each_table([](const auto& t) {
    using T = decltype(element_of(t));
    const int64_t m = 5, n = 70, k = 683, padded = quantized_width(k);
    std::mt19937 generator(4);
    std::vector<T> x(m * k), inverse_scale(m), got(m * n), want(m * n);
    for (T& value : x) value = (static_cast<T>(generator() % 20001) - T(10000)) / T(3000);
    std::vector<int8_t> q(m * padded);
    std::vector<int32_t> row_sum(m);
    t.quantize_rows(m, k, x.data(), 1e-5f, q.data(), inverse_scale.data(), row_sum.data());
    const auto codes = integers(n * k, -1, 1, 5);
    std::vector<uint8_t> packed(packed_size(n, k)), panels(round_up(n, t.ternary_panel) * round_up(k, 4));
    t.packed_pack(n, k, codes.data(), packed.data());
    t.ternary_pack(n, k, codes.data(), panels.data());
    t.packed_gemm(m, n, k, q.data(), row_sum.data(), inverse_scale.data(), packed.data(), T(0.037),
                  got.data(), n);
    t.ternary_gemm(m, n, k, q.data(), row_sum.data(), inverse_scale.data(), panels.data(), T(0.037),
                   want.data(), n);
    REQUIRE(got == want);
  });
}

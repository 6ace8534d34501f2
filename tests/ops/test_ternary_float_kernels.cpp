// SPDX-License-Identifier: Apache-2.0
// Products of ternary weights with rows of floats on plain arrays, on every ISA level this machine runs, by
// sum tables and in tiles: on small multiples of 1/8, whose sums are exact, bit for bit against the triple
// loop; on other values within the bound that their additions allow. And sum tables of int8 rows.
#include <catch2/catch.hpp>
#include <cmath>
#include <cstdint>
#include <limits>
#include <random>
#include <string>
#include <type_traits>
#include <vector>

#include "tests/ops/kernel_check.h"

using namespace flashlm::kernels;

namespace {

std::vector<int8_t> ternary(int64_t n, uint32_t seed) { return integers(n, -1, 1, seed); }

/// Signed, with all significant bits, between 2^-40 and 2^40.
template <class T>
std::vector<T> of_all_sizes(int64_t n, uint32_t seed) {
  std::mt19937 generator(seed);
  std::vector<T> out = uneven<T>(n, seed);
  for (T& x : out) x = std::ldexp(x / 3, static_cast<int>(generator() % 80) - 40);
  return out;
}

/// Whether the product is computed in tiles, in their order.
bool in_tiles(const Table<double>&) { return false; }
bool in_tiles(const Table<float>& t) {
  for (int64_t i = 0; i < levels().count; ++i) {
    if (levels().first[i].name == std::string("amx")) return &t == &levels().first[i].float_table();
  }
  return false;
}

constexpr int64_t kGuard = 64;  // bytes after a buffer that must not be written

/// Q (n, k) row by row in `codes`, packed from there or from a transposed copy; one byte off any alignment.
template <class T>
struct Packed {
  std::vector<uint8_t> bytes;

  Packed(const Table<T>& t, int64_t n, int64_t k, const std::vector<int8_t>& codes, bool transposed = false) {
    const int64_t size = t.ternary_float_packed_size(n, k), padding = 3;
    bytes.assign(1 + size + kGuard, 77);
    if (transposed) {
      std::vector<int8_t> turned(k * (n + padding), 1);
      for (int64_t j = 0; j < n; ++j) {
        for (int64_t p = 0; p < k; ++p) turned[p * (n + padding) + j] = codes[j * k + p];
      }
      t.ternary_float_pack(n, k, turned.data(), 1, n + padding, data());
    } else {
      t.ternary_float_pack(n, k, codes.data(), k, 1, data());
    }
    for (int64_t i = 0; i < kGuard; ++i) REQUIRE(bytes[1 + size + i] == 77);
  }
  uint8_t* data() { return bytes.data() + 1; }
};

/// y (m, n) with rows of n + 2, of which the last two must stay -5; x has rows of x_row.
template <class T>
std::vector<T> product(const Table<T>& t, int64_t m, int64_t n, int64_t k, const T* x, int64_t x_row,
                       uint8_t* packed, T gamma) {
  const int64_t size = t.ternary_float_workspace_size(n, k);
  std::vector<uint8_t> workspace(1 + size + kGuard, 77);
  std::vector<T> y(1 + m * (n + 2), T(-5));
  leave_nan_on_stack();
  t.ternary_float_gemm(m, n, k, x, x_row, packed, gamma, y.data() + 1, n + 2, workspace.data() + 1);
  for (int64_t i = 0; i < kGuard; ++i) REQUIRE(workspace[1 + size + i] == 77);
  for (int64_t i = 0; i < m; ++i) REQUIRE((y[1 + i * (n + 2) + n] == -5 && y[1 + i * (n + 2) + n + 1] == -5));
  return y;
}

template <class T>
std::vector<T> triple_loop(int64_t m, int64_t n, int64_t k, const T* x, int64_t x_row,
                           const std::vector<int8_t>& codes, T gamma) {
  std::vector<T> y(1 + m * (n + 2), T(-5));
  for (int64_t i = 0; i < m; ++i) {
    for (int64_t j = 0; j < n; ++j) {
      T sum = 0;
      for (int64_t p = 0; p < k; ++p) sum += x[i * x_row + p] * static_cast<T>(codes[j * k + p]);
      y[1 + i * (n + 2) + j] = gamma * sum;
    }
  }
  return y;
}

template <class T>
void require_exact(const Table<T>& t, int64_t m, int64_t n, int64_t k, const std::vector<int8_t>& codes,
                   bool transposed = false) {
  const int64_t x_row = k + 5;
  const std::vector<T> x = dyadic<T>(1 + m * x_row, 2);
  const T gamma = T(0.375);
  Packed<T> packed(t, n, k, codes, transposed);
  INFO("m " << m << " n " << n << " k " << k << " transposed " << transposed);
  REQUIRE(product(t, m, n, k, x.data() + 1, x_row, packed.data(), gamma) ==
          triple_loop(m, n, k, x.data() + 1, x_row, codes, gamma));
}

/// sum_table_gemm_int8 against the triple loop, where the level has it. q (m, quantized_width(k)), of which
/// what is beyond k is taken as zero.
void require_int8(const Table<float>& t, int64_t m, int64_t n, int64_t k, const std::vector<int8_t>& q,
                  const std::vector<int8_t>& codes) {
  if (t.sum_table_gemm_int8 == nullptr) return;
  const int64_t padded = quantized_width(k), size = t.sum_table_int8_workspace_size(n, k);
  const float gamma = 0.37f;
  const std::vector<float> inverse_scale = uneven<float>(m, 3);
  Packed<float> packed(t, n, k, codes);
  std::vector<uint8_t> workspace(1 + size + kGuard, 77);
  std::vector<float> y(1 + m * (n + 2), -5), want = y;
  // Just the rows, so that reading past them is found by the sanitizers.
  std::vector<int8_t> rows(q.begin(), q.begin() + m * padded);
  for (int64_t i = 0; i < m * padded; ++i) rows[i] = i % padded < k ? rows[i] : int8_t{0};
  t.sum_table_gemm_int8(m, n, k, rows.data(), inverse_scale.data(), packed.data(), gamma, y.data() + 1, n + 2,
                        workspace.data() + 1);
  for (int64_t i = 0; i < m; ++i) {
    for (int64_t j = 0; j < n; ++j) {
      int32_t sum = 0;
      for (int64_t p = 0; p < k; ++p) sum += q[i * padded + p] * codes[j * k + p];
      want[1 + i * (n + 2) + j] = static_cast<float>(sum) * (gamma * inverse_scale[i]);
    }
  }
  INFO("m " << m << " n " << n << " k " << k);
  REQUIRE(y == want);
  for (int64_t i = 0; i < kGuard; ++i) REQUIRE(workspace[1 + size + i] == 77);
}

}  // namespace

TEST_CASE("sum_table of int8 rows equals the triple loop at every size around its tiles", "[sum_table]") {
  for_each_table([](const auto& t) {
    if constexpr (std::is_same_v<decltype(t), const Table<float>&>) {
      const std::vector<int8_t> q = integers(40 * 1024, -127, 127, 5);
      for (int64_t n : {0, 1, 7, 8, 9, 16, 17}) {
        for (int64_t k : {0, 1, 3, 4, 5, 31, 32, 33, 64, 255, 256, 257, 288, 683}) {
          for (int64_t m : {0, 1, 7, 8, 9, 15, 16, 17, 33}) require_int8(t, m, n, k, q, ternary(n * k, 7));
        }
      }
      for (int64_t n : {2047, 2048, 2049, 4100}) require_int8(t, 19, n, 300, q, ternary(n * 300, 8));
    }
  });
}

TEST_CASE("sum_table of int8 rows does not wrap on extreme inputs", "[sum_table]") {
  for_each_table([](const auto& t) {
    if constexpr (std::is_same_v<decltype(t), const Table<float>&>) {
      for (int64_t k : {256, 512, 5000}) {
        for (int sign : {-1, 1}) {
          for (int value : {-127, 127}) {
            require_int8(t, 17, 9, k,
                         std::vector<int8_t>(17 * quantized_width(k), static_cast<int8_t>(value)),
                         std::vector<int8_t>(9 * k, static_cast<int8_t>(sign)));
          }
        }
      }
    }
  });
}

TEST_CASE("ternary_float equals the triple loop at every size around its tiles", "[ternary_float]") {
  for_each_table([](const auto& t) {
    for (int64_t n : {0, 1, 2, 3, 4, 5, 7, 18, 33}) {
      for (int64_t k : {0, 1, 2, 3, 4, 5, 7, 8, 31, 32, 33, 64, 69}) {
        const auto codes = ternary(n * k, 1);
        for (int64_t m : {0, 1, 2, 3, 4, 5, 8, 9, 15, 16, 17, 33}) require_exact(t, m, n, k, codes);
        require_exact(t, 17, n, k, codes, /*transposed=*/true);
      }
    }
  });
}

TEST_CASE("ternary_float equals the triple loop on wide and deep matrices", "[ternary_float]") {
  for_each_table([](const auto& t) {
    for (int64_t n : {2047, 2048, 2049, 4096, 4099}) require_exact(t, 17, n, 7, ternary(n * 7, 1));
    require_exact(t, 18, 41, 683, ternary(41 * 683, 1), /*transposed=*/true);
    require_exact(t, 18, 683, 41, ternary(683 * 41, 1));
    for (int64_t m : {95, 96, 97, 200}) require_exact(t, m, 270, 40, ternary(270 * 40, 1));
    require_exact(t, 131, 300, 1100, ternary(300 * 1100, 1));
  });
}

TEST_CASE("ternary_float finds every sum of four, whichever are added or subtracted", "[ternary_float]") {
  for_each_table([](const auto& t) {
    // Row j holds the group number j of 81, in a place among 24 codes that j and the case decide.
    for (int64_t step = 1; step < 81; step += 13) {
      const int64_t n = 81, k = 24;
      std::vector<int8_t> codes(n * k);
      for (int64_t j = 0; j < n; ++j) {
        for (int64_t g = 0; g < k / 4; ++g) {
          int64_t number = (j + g * step) % 81;
          for (int64_t i = 0; i < 4; ++i, number /= 3) {
            codes[j * k + g * 4 + i] = static_cast<int8_t>(number % 3 - 1);
          }
        }
      }
      require_exact(t, 16, n, k, codes);
    }
    for (int code : {-1, 0, 1})
      require_exact(t, 16, 50, 70, std::vector<int8_t>(50 * 70, static_cast<int8_t>(code)));
  });
}

TEST_CASE("ternary_float rounds as its additions do, and alike wherever tables are used", "[ternary_float]") {
  const int64_t m = 35, n = 50;
  for (int64_t k : {1, 6, 24, 100, 683}) {
    for (bool all_sizes : {false, true}) {
      INFO("k " << k << " all sizes " << all_sizes);
      const auto codes = ternary(n * k, 1);
      std::vector<float> first;
      for_each_table([&](const auto& t) {
        using T = decltype(element_of(t));
        const std::vector<T> x = all_sizes ? of_all_sizes<T>(m * k, 2) : uneven<T>(m * k, 2);
        const T gamma = T(0.7);
        Packed<T> packed(t, n, k, codes);
        const auto y = product(t, m, n, k, x.data(), k, packed.data(), gamma);
        // A value passes through two additions in its table, one for each of at most eight tables a pass of
        // 32 codes, and the final product; in tiles through one for each third of a value after it.
        const double roundings = in_tiles(t) ? 3 * k + 1 : 2 + 8 * ((k + 31) / 32) + 1;
        for (int64_t i = 0; i < m; ++i) {
          for (int64_t j = 0; j < n; ++j) {
            long double exact = 0, magnitude = 0;
            for (int64_t p = 0; p < k; ++p) {
              exact += static_cast<long double>(x[i * k + p]) * codes[j * k + p];
              magnitude += std::fabs(x[i * k + p] * static_cast<T>(codes[j * k + p]));
            }
            const double unit = std::numeric_limits<T>::epsilon() / 2;
            const double bound = 1.001 * roundings * unit * static_cast<double>(gamma * magnitude);
            INFO("row " << i << " output " << j);
            REQUIRE(std::fabs(static_cast<double>(y[1 + i * (n + 2) + j] - gamma * exact)) <= bound);
          }
        }
        if constexpr (sizeof(T) == sizeof(float)) {
          if (first.empty()) first = y;
          if (!in_tiles(t)) REQUIRE(y == first);
        }
      });
    }
  }
}

TEST_CASE("ternary_float keeps every bit of the largest and of small values", "[ternary_float]") {
  for_each_table([](const auto& t) {
    using T = decltype(element_of(t));
    const int64_t n = 5, k = 40;
    const auto codes = ternary(n * k, 1);
    Packed<T> packed(t, n, k, codes);
    for (T value : {std::numeric_limits<T>::max(), std::ldexp(T(1) + std::numeric_limits<T>::epsilon(), -103),
                    std::ldexp(T(2) - std::numeric_limits<T>::epsilon(), -103), T(-1) / 3}) {
      for (int64_t p = 0; p < k; ++p) {
        std::vector<T> x(k);
        x[p] = value;
        const auto y = product(t, 1, n, k, x.data(), k, packed.data(), T(1));
        for (int64_t j = 0; j < n; ++j) REQUIRE(y[1 + j] == value * static_cast<T>(codes[j * k + p]));
      }
    }
  });
}

TEST_CASE("ternary_float gives a row the same bits in whatever company", "[ternary_float]") {
  for_each_table([](const auto& t) {
    using T = decltype(element_of(t));
    const int64_t m = 107, n = 45, k = 51, y_row = n + 2;
    const auto codes = ternary(n * k, 1);
    std::vector<T> x = uneven<T>(m * k, 2);
    Packed<T> packed(t, n, k, codes);
    const auto whole = product(t, m, n, k, x.data(), k, packed.data(), T(0.7));
    for (int64_t begin = 0; begin < m; ++begin) {
      for (int64_t end : {begin + 1, begin + 5, begin + 16, m}) {
        if (end > m) continue;
        const auto some = product(t, end - begin, n, k, x.data() + begin * k, k, packed.data(), T(0.7));
        INFO("rows " << begin << " to " << end);
        REQUIRE(std::vector<T>(some.begin() + 1, some.end()) ==
                std::vector<T>(whole.begin() + 1 + begin * y_row, whole.begin() + 1 + end * y_row));
      }
    }
    // Row 20 breaks; the others do not notice.
    x[20 * k] = std::numeric_limits<T>::infinity();
    x[20 * k + 1] = -std::numeric_limits<T>::infinity();
    x[20 * k + 50] = std::numeric_limits<T>::quiet_NaN();
    const auto broken = product(t, m, n, k, x.data(), k, packed.data(), T(0.7));
    for (int64_t i = 0; i < m; ++i) {
      for (int64_t j = 0; j < n; ++j) {
        if (i != 20) REQUIRE(broken[1 + i * y_row + j] == whole[1 + i * y_row + j]);
      }
    }
  });
}

TEST_CASE("ternary_float leaves out what a zero code stands before, and keeps infinities",
          "[ternary_float]") {
  for_each_table([](const auto& t) {
    using T = decltype(element_of(t));
    const T infinity = std::numeric_limits<T>::infinity(), nan = std::numeric_limits<T>::quiet_NaN();
    const int64_t m = 107, n = 30, k = 160;
    auto codes = ternary(n * k, 1);
    const std::vector<T> x = dyadic<T>(m * k, 2);
    Packed<T> packed(t, n, k, codes);
    const auto finite = product(t, m, n, k, x.data(), k, packed.data(), T(1));
    for (int64_t row : {0, 3, 20, 47, 49, 70, 96, 103}) {
      for (int64_t p : {0, 1, 2, 3, 31, 32, 95, 127, 128, 158, 159}) {
        for (T value : {infinity, nan}) {
          std::vector<T> odd = x;
          odd[row * k + p] = value;
          const auto y = product(t, m, n, k, odd.data(), k, packed.data(), T(1));
          for (int64_t j = 0; j < n; ++j) {
            const int code = codes[j * k + p];
            const T got = y[1 + row * (n + 2) + j], before = finite[1 + row * (n + 2) + j];
            INFO("row " << row << " column " << p << " code " << code);
            if (code == 0) {
              REQUIRE(got == before);
            } else if (std::isnan(value)) {
              REQUIRE(std::isnan(got));
            } else {
              REQUIRE(got == static_cast<T>(code) * infinity);
            }
          }
        }
      }
    }
    const auto y = product(t, m, n, k, x.data(), k, packed.data(), nan);
    for (int64_t i = 0; i < m; ++i) {
      for (int64_t j = 0; j < n; ++j) REQUIRE(std::isnan(y[1 + i * (n + 2) + j]));
    }
  });
}

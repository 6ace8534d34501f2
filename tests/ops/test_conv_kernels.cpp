// SPDX-License-Identifier: Apache-2.0
// The convolution kernels on plain arrays, on every ISA level this machine runs, over sizes around their
// tiles. Inputs are small multiples of 1/8, so that the sums are exact and equal the naive loops' bit for
// bit. Arrays have no element to spare: a sanitizer sees a read or write past an end.
#include <algorithm>
#include <catch2/catch.hpp>
#include <cmath>
#include <cstring>
#include <limits>
#include <random>
#include <utility>
#include <vector>

#include "tests/ops/kernel_check.h"

using namespace flashlm::kernels;

namespace {

/// in, out: below, at and above the widths of vectors, panels and tiles.
constexpr int64_t kChannels[][2] = {{1, 1},  {1, 2},   {3, 3},   {16, 32}, {16, 16}, {32, 16},
                                    {5, 33}, {24, 48}, {13, 65}, {40, 20}, {8, 8},   {96, 17}};
constexpr int64_t kTaps[][2] = {{1, 1}, {4, 1}, {3, 4}, {2, 64}};  // and their dilation

/// Calls body(conv, rows) over the sizes around the tiles of channels and time.
template <class Body>
void for_each_size(const Body& body) {
  for (const auto& [in, out] : kChannels) {
    for (const auto& [taps, dilation] : kTaps) {
      for (int64_t rows : {0, 1, 2, 5, 6, 7, 11, 12, 13, 63, 64, 65, 130, 260}) {
        INFO("in " << in << " out " << out << " taps " << taps << " dilation " << dilation << " rows "
                   << rows);
        body(Conv1d{in, out, taps, dilation}, rows);
      }
    }
  }
}

/// A matrix of rows that lie further apart than they are wide, `gap` between them and none after the last.
template <class T>
struct Strided {
  Strided(int64_t rows, int64_t width, int64_t gap, uint32_t seed)
      : row(width + gap), values(dyadic<T>(rows == 0 ? 0 : rows * row - gap, seed)) {}
  T& operator()(int64_t r, int64_t i) { return values[r * row + i]; }
  T* data() { return values.data(); }
  int64_t row;
  std::vector<T> values;
};

template <class T>
void test_forward(const Table<T>& table) {
  for_each_size([&](const Conv1d& conv, int64_t rows) {
    const int64_t depth = conv.taps * conv.in;
    auto w = dyadic<T>(depth * conv.out, 2);
    std::vector<T> packed(depth * ((conv.out + table.gemm_panel - 1) / table.gemm_panel) * table.gemm_panel);
    table.gemm_pack(depth, conv.out, w.data(), conv.out, 1, packed.data());
    for (const auto& [first, last] :
         {std::pair{int64_t{0}, conv.taps}, {conv.taps - 1, conv.taps}, {0, conv.taps - 1}}) {
      for (int64_t gap : {0, 3}) {
        INFO("first " << first << " last " << last << " gap " << gap);
        Conv1d cut = conv;
        cut.first = first;
        cut.last = last;
        const int64_t x_rows = rows + std::max<int64_t>(0, last - first - 1) * conv.dilation;
        Strided<T> x(x_rows, conv.in, gap, 1), y(rows, conv.out, 2 * gap, 3);
        Strided<T> want = y;
        for (int64_t t = 0; t < rows; ++t) {
          for (int64_t o = 0; o < conv.out; ++o) {
            T sum = 0;
            for (int64_t k = first; k < last; ++k) {
              for (int64_t c = 0; c < conv.in; ++c) {
                sum += x(t + (k - first) * conv.dilation, c) * w[(k * conv.in + c) * conv.out + o];
              }
            }
            want(t, o) = sum;
          }
        }
        table.causal_conv1d(cut, rows, x.data(), x.row, packed.data(), y.data(), y.row);
        REQUIRE(y.values == want.values);
      }
    }
  });
}

template <class T>
void test_backward_weight(const Table<T>& table) {
  for_each_size([&](const Conv1d& conv, int64_t rows) {
    if (conv.taps > 1) return;
    for (int64_t gap : {0, 3}) {
      INFO("gap " << gap);
      Strided<T> x(rows, conv.in, gap, 1), grad_y(rows, conv.out, 2 * gap, 2);
      auto grad = dyadic<T>(conv.in * conv.out, 3), want = grad;
      for (int64_t t = 0; t < rows; ++t) {
        for (int64_t c = 0; c < conv.in; ++c) {
          for (int64_t o = 0; o < conv.out; ++o) want[c * conv.out + o] += x(t, c) * grad_y(t, o);
        }
      }
      table.causal_conv1d_backward_weight(conv.in, conv.out, rows, x.data(), x.row, grad_y.data(), grad_y.row,
                                          grad.data());
      REQUIRE(grad == want);
    }
  });
}

template <class T>
void test_gate(const Table<T>& table) {
  for (int64_t rows : {0, 1, 3}) {
    for (int64_t width = 1; width <= 35; ++width) {
      INFO("rows " << rows << " width " << width);
      Strided<T> x(rows, width, 2, 1), y = x;
      const auto convs = dyadic<T>(2 * rows * width, 2);
      std::vector<T> grads = convs;
      table.gated_conv(rows, width, x.data(), x.row, convs.data(), y.data());
      table.gated_conv_backward(rows, width, x.data(), x.row, grads.data());
      for (int64_t r = 0; r < rows; ++r) {
        for (int64_t i = 0; i < width; ++i) {
          const int64_t gate = r * 2 * width + i, value = gate + width;
          const double open = 1 / (1 + std::exp(-static_cast<double>(convs[gate])));
          // |value| <= 6; each factor is within a few steps of T.
          const auto close_to = [](double want) {
            return Approx(want).epsilon(0).margin(32 * std::numeric_limits<T>::epsilon());
          };
          REQUIRE(y(r, i) == close_to(x(r, i) + open * convs[value]));
          REQUIRE(grads[gate] == close_to(x(r, i) * convs[value] * open * (1 - open)));
          REQUIRE(grads[value] == close_to(x(r, i) * open));
        }
        if (r + 1 < rows) REQUIRE(y(r, width) == x(r, width));  // what lies between rows is left alone
      }
    }
  }
}

int32_t pair_of(uint16_t first, uint16_t second) {
  return static_cast<int32_t>(first | uint32_t{second} << 16);
}

void test_bf16(const Table<float>& table) {
  for_each_size([&](Conv1d conv, int64_t rows) {
    const int64_t channels = 2 * conv.in, depth = conv.taps * channels;
    const auto w = dyadic<float>(depth * conv.out, 2);
    std::vector<int32_t> packed(depth / 2 * round_up(conv.out, table.bf16_panel), -1);
    table.bf16_pack(depth, conv.out, w.data(), conv.out, nullptr, packed.data());
    for (const auto& [first, last] :
         {std::pair{int64_t{0}, conv.taps}, {conv.taps - 1, conv.taps}, {0, conv.taps - 1}}) {
      for (int64_t gap : {0, 3}) {
        INFO("first " << first << " last " << last << " gap " << gap);
        conv.first = first;
        conv.last = last;
        const int64_t x_rows = rows + std::max<int64_t>(0, last - first - 1) * conv.dilation;
        Strided<float> x(x_rows, channels, 2 * gap, 1), y(rows, conv.out, 2 * gap, 3);
        std::vector<int32_t> pairs;
        for (size_t i = 0; i < x.values.size(); i += 2) {
          pairs.push_back(pair_of(bfloat16(x.values[i]), bfloat16(x.values[i + 1])));
        }
        Strided<float> want = y;
        for (int64_t t = 0; t < rows; ++t) {
          for (int64_t o = 0; o < conv.out; ++o) {
            float sum = 0;
            for (int64_t k = first; k < last; ++k) {
              for (int64_t c = 0; c < channels; ++c) {
                sum += x(t + (k - first) * conv.dilation, c) * w[(k * channels + c) * conv.out + o];
              }
            }
            want(t, o) = sum;
          }
        }
        leave_nan_on_stack();
        table.causal_conv1d_bf16(conv, rows, pairs.data(), x.row / 2, packed.data(), y.data(), y.row);
        REQUIRE(y.values == want.values);
      }
    }
  });
}

void test_zip(const Table<float>& table) {
  for (int64_t pairs : {0, 1, 3, 8}) {
    for (int64_t n = 1; n <= 35; ++n) {
      INFO("pairs " << pairs << " n " << n);
      Strided<float> first(pairs, n, 2, 1), second(pairs, n, 2, 2);
      for (float& x : second.values) x *= 1.01f;  // no bfloat16
      std::vector<uint16_t> first_rounded, second_rounded;
      for (const float x : first.values) first_rounded.push_back(bfloat16(x));
      for (const float x : second.values) second_rounded.push_back(bfloat16(x));
      const int64_t panel = table.bf16_panel;
      std::vector<int32_t> want(pairs * round_up(n, panel)), got(want.size(), -1), rounded = got;
      for (int64_t p = 0; p < pairs; ++p) {
        for (int64_t j = 0; j < n; ++j) {
          want[(j / panel * pairs + p) * panel + j % panel] =
              pair_of(bfloat16(first(p, j)), bfloat16(second(p, j)));
        }
      }
      table.bf16_zip(pairs, n, first.data(), second.data(), first.row, got.data());
      REQUIRE(got == want);
      table.bf16_zip_rounded(pairs, n, first_rounded.data(), second_rounded.data(), first.row,
                             rounded.data());
      REQUIRE(rounded == want);
    }
  }
}

void test_scale_rows(const Table<float>& table) {
  for (int64_t rows : {0, 1, 5}) {
    for (int64_t width = 1; width <= 35; ++width) {
      INFO("rows " << rows << " width " << width);
      Strided<float> x(rows, width, 2, 1);
      auto rstd = dyadic<float>(rows, 2), scale = dyadic<float>(width, 3);
      for (float& s : scale) s *= 1.01f;  // products that are no bfloat16
      for (float& s : rstd) s = std::abs(s);
      std::vector<float> plain(rows * width);
      table.scale_rows(rows, width, x.data(), x.row, rstd.data(), scale.data(), plain.data());
      std::vector<int32_t> want;
      for (int64_t r = 0; r < rows; ++r) {
        const float* row = plain.data() + r * width;
        for (int64_t i = 0; i < width; i += 2) {
          want.push_back(pair_of(bfloat16(row[i]), i + 1 < width ? bfloat16(row[i + 1]) : 0));
        }
      }
      std::vector<int32_t> got(want.size(), -1);
      table.scale_rows_bf16(rows, width, x.data(), x.row, rstd.data(), scale.data(), got.data());
      REQUIRE(got == want);
    }
  }
}

void test_slopes(const Table<float>& table) {
  for (int64_t rows : {0, 1, 3}) {
    for (int64_t width = 1; width <= 35; ++width) {
      INFO("rows " << rows << " width " << width);
      Strided<float> x(rows, width, 2, 1), y = x, want_y = x;
      const auto convs = dyadic<float>(2 * rows * width, 2);
      std::vector<uint16_t> slopes(convs.size()), grad(convs.size());
      table.gated_conv(rows, width, x.data(), x.row, convs.data(), want_y.data());
      table.gated_conv_slopes(rows, width, x.data(), x.row, convs.data(), y.data(), slopes.data());
      REQUIRE(y.values == want_y.values);
      table.gated_conv_backward_slopes(rows, width, x.data(), x.row, slopes.data(), grad.data());
      for (int64_t r = 0; r < rows; ++r) {
        for (int64_t i = 0; i < width; ++i) {
          const int64_t gate = r * 2 * width + i, value = gate + width;
          const float open = 1 / (1 + std::exp(-convs[gate]));
          REQUIRE(from_bfloat16(slopes[gate]) ==
                  Approx(convs[value] * open * (1 - open)).epsilon(0.004).margin(0));
          REQUIRE(from_bfloat16(slopes[value]) == Approx(open).epsilon(0.004).margin(0));
          REQUIRE(grad[gate] == bfloat16(x(r, i) * from_bfloat16(slopes[gate])));
          REQUIRE(grad[value] == bfloat16(x(r, i) * from_bfloat16(slopes[value])));
        }
      }
    }
  }
}

template <class T>
void test_saturation(const Table<T>& table) {
  const T x = 0.5, open[2] = {1000, 3}, shut[2] = {-1000, 3};
  T y;
  table.gated_conv(1, 1, &x, 1, open, &y);
  REQUIRE(y == T(3.5));
  table.gated_conv(1, 1, &x, 1, shut, &y);
  REQUIRE(y == x);
  T grads[2] = {1000, 3};
  table.gated_conv_backward(1, 1, &x, 1, grads);
  REQUIRE(grads[0] == 0);
  REQUIRE(grads[1] == x);
}

}  // namespace

TEST_CASE("causal_conv1d equals the naive loop at every size around its tiles", "[causal_conv1d]") {
  for_each_table([](const auto& table) { test_forward(table); });
}

TEST_CASE("causal_conv1d_backward_weight adds what the naive loop adds", "[causal_conv1d]") {
  for_each_table([](const auto& table) { test_backward_weight(table); });
}

TEST_CASE("the gate of gated_conv equals the formula at every width", "[gated_conv]") {
  for_each_table([](const auto& table) { test_gate(table); });
}

TEST_CASE("causal_conv1d_bf16 equals the naive loop at every size around its tiles", "[causal_conv1d]") {
  for_each_table_with(&Table<float>::bf16_panel, test_bf16);
}

TEST_CASE("bf16_zip makes pairs of two matrices", "[gemm_bf16]") {
  for_each_table_with(&Table<float>::bf16_panel, test_zip);
}

TEST_CASE("scale_rows_bf16 equals scale_rows, rounded", "[gated_conv]") {
  for_each_table_with(&Table<float>::bf16_panel, test_scale_rows);
}

TEST_CASE("gated_conv_slopes equals gated_conv, its slopes and their gradient the formula", "[gated_conv]") {
  for_each_table_with(&Table<float>::bf16_panel, test_slopes);
}

TEST_CASE("the gate of gated_conv saturates without overflow", "[gated_conv]") {
  for_each_table([](const auto& table) { test_saturation(table); });
}

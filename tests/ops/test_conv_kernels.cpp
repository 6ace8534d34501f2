// SPDX-License-Identifier: Apache-2.0
// The convolution kernels on plain arrays, on every ISA level this machine runs, over sizes around their
// tiles. Inputs are small multiples of 1/8, so that the sums are exact and equal the naive loops' bit for
// bit. Arrays have no element to spare: a sanitizer sees a read or write past an end.
#include <catch2/catch.hpp>
#include <cmath>
#include <limits>
#include <random>
#include <vector>

#include "ops/kernels/kernels.h"

using namespace flashlm::kernels;

namespace {

template <class Body>
void for_each_level(const Body& body) {
  for (int64_t i = 0; i < levels().count; ++i) {
    const Level& level = levels().first[i];
    if (!level.supported()) continue;
    INFO(level.name);
    body(level.float_table());
    body(level.double_table());
  }
}

template <class T>
std::vector<T> dyadic(int64_t n, uint32_t seed) {
  std::mt19937 generator(seed);
  std::vector<T> out(n);
  for (T& x : out) x = static_cast<T>(static_cast<int>(generator() % 33) - 16) / 8;
  return out;
}

/// groups, in, out: below, at and above the widths of vectors, panels and tiles.
constexpr int64_t kChannels[][3] = {{1, 1, 1},  {5, 1, 2},   {2, 3, 3},   {2, 16, 32}, {3, 16, 16},
                                    {1, 5, 33}, {2, 24, 48}, {1, 13, 65}, {1, 40, 20}};
constexpr int64_t kTaps[][2] = {{1, 1}, {4, 1}, {3, 4}, {2, 64}};  // and their dilation

/// Calls body(conv, rows) over the sizes around the tiles of channels and time.
template <class Body>
void for_each_size(const Body& body) {
  for (const auto& [groups, in, out] : kChannels) {
    for (const auto& [taps, dilation] : kTaps) {
      for (int64_t rows : {0, 1, 2, 5, 6, 7, 8, 9, 15, 63, 64, 65, 130}) {
        INFO("groups " << groups << " in " << in << " out " << out << " taps " << taps << " dilation "
                       << dilation << " rows " << rows);
        body(Conv1d{groups, in, out, taps, dilation}, rows);
      }
    }
  }
  body(Conv1d{1, 130, 140, 4, 1}, 21);  // more weights than pass once a tile
}

int64_t x_size(const Conv1d& c, int64_t rows) { return (rows + (c.taps - 1) * c.dilation) * c.groups * c.in; }

/// Calls body(index in x, index in w, index in y) for every product of the correlation.
template <class Body>
void for_each_product(const Conv1d& conv, int64_t rows, const Body& body) {
  for (int64_t t = 0; t < rows; ++t) {
    for (int64_t g = 0; g < conv.groups; ++g) {
      for (int64_t k = 0; k < conv.taps; ++k) {
        for (int64_t c = 0; c < conv.in; ++c) {
          for (int64_t o = 0; o < conv.out; ++o) {
            body(((t + k * conv.dilation) * conv.groups + g) * conv.in + c,
                 ((g * conv.taps + k) * conv.in + c) * conv.out + o, (t * conv.groups + g) * conv.out + o);
          }
        }
      }
    }
  }
}

template <class T>
void test_forward(const Table<T>& table) {
  for_each_size([&](const Conv1d& conv, int64_t rows) {
    const int64_t depth = conv.taps * conv.in;
    const auto x = dyadic<T>(x_size(conv, rows), 1), w = dyadic<T>(conv.groups * depth * conv.out, 2);
    const int64_t packed_group =
        depth * ((conv.out + table.gemm_panel - 1) / table.gemm_panel) * table.gemm_panel;
    std::vector<T> packed(conv.groups * packed_group), y(rows * conv.groups * conv.out, T(7)), want(y.size());
    for (int64_t g = 0; g < conv.groups; ++g) {
      table.gemm_pack(depth, conv.out, w.data() + g * depth * conv.out, conv.out, 1,
                      packed.data() + g * packed_group);
    }
    for_each_product(conv, rows, [&](int64_t i, int64_t j, int64_t o) { want[o] += x[i] * w[j]; });
    table.causal_conv1d(conv, rows, x.data(), packed.data(), y.data());
    REQUIRE(y == want);
  });
}

template <class T>
void test_backward_weight(const Table<T>& table) {
  for_each_size([&](const Conv1d& conv, int64_t rows) {
    const auto x = dyadic<T>(x_size(conv, rows), 1), grad_y = dyadic<T>(rows * conv.groups * conv.out, 2);
    auto grad = dyadic<T>(conv.groups * conv.taps * conv.in * conv.out, 3), want = grad;
    for_each_product(conv, rows, [&](int64_t i, int64_t j, int64_t o) { want[j] += x[i] * grad_y[o]; });
    for (int64_t g = 0; g < conv.groups; ++g) {
      for (int64_t column = 0; column < conv.out; column += table.gemm_panel) {
        table.causal_conv1d_backward_weight(conv, g, column, rows, x.data(), grad_y.data(), grad.data());
      }
    }
    REQUIRE(grad == want);
  });
}

template <class T>
void test_gate(const Table<T>& table) {
  for (int64_t n : {0, 1, 3}) {
    for (int64_t width = 1; width <= 35; ++width) {
      INFO("n " << n << " width " << width);
      const auto x = dyadic<T>(n * width, 1), convs = dyadic<T>(2 * n * width, 2);
      std::vector<T> y(n * width), grads = convs;
      table.gated_conv(n, width, x.data(), convs.data(), y.data());
      table.gated_conv_backward(n, width, x.data(), grads.data());
      for (int64_t i = 0; i < n * width; ++i) {
        const int64_t gate = i / width * 2 * width + i % width, value = gate + width;
        const double open = 1 / (1 + std::exp(-static_cast<double>(convs[gate])));
        // |value| <= 6; each factor is within a few steps of T.
        const auto close_to = [](double want) {
          return Approx(want).epsilon(0).margin(32 * std::numeric_limits<T>::epsilon());
        };
        REQUIRE(y[i] == close_to(x[i] + open * convs[value]));
        REQUIRE(grads[gate] == close_to(x[i] * convs[value] * open * (1 - open)));
        REQUIRE(grads[value] == close_to(x[i] * open));
      }
    }
  }
}

template <class T>
void test_saturation(const Table<T>& table) {
  const T x = 0.5, open[2] = {1000, 3}, shut[2] = {-1000, 3};
  T y;
  table.gated_conv(1, 1, &x, open, &y);
  REQUIRE(y == T(3.5));
  table.gated_conv(1, 1, &x, shut, &y);
  REQUIRE(y == x);
  T grads[2] = {1000, 3};
  table.gated_conv_backward(1, 1, &x, grads);
  REQUIRE(grads[0] == 0);
  REQUIRE(grads[1] == x);
}

}  // namespace

TEST_CASE("causal_conv1d equals the naive loop at every size around its tiles", "[causal_conv1d]") {
  for_each_level([](const auto& table) { test_forward(table); });
}

TEST_CASE("causal_conv1d_backward_weight adds what the naive loop adds", "[causal_conv1d]") {
  for_each_level([](const auto& table) { test_backward_weight(table); });
}

TEST_CASE("the gate of gated_conv equals the formula at every width", "[gated_conv]") {
  for_each_level([](const auto& table) { test_gate(table); });
}

TEST_CASE("the gate of gated_conv saturates without overflow", "[gated_conv]") {
  for_each_level([](const auto& table) { test_saturation(table); });
}

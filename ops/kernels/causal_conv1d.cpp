// SPDX-License-Identifier: Apache-2.0
// One group's correlation over time on channels-last rows: a tile of time steps x output channels stays in
// registers while a panel of the packed weights runs past it. The same code convolves forward (one weight, or
// two side by side) and backward (weights transposed, taps reversed).
// A result's sum runs over taps, then input channels, whatever tile it is in: cutting time changes no bit.
#include "ops/kernels/families.h"
#include "ops/kernels/vec.h"

namespace flashlm::kernels::FLASHLM_ISA {
namespace {

// Registers: kTime * 2 sums + 2 of weights + 1 broadcast = 15 of 16, or 27 of 32; a full tile of sums covers
// the latency of two multiply-adds a cycle.
constexpr int64_t kTime = kRegisters == 32 ? 12 : 6;
// Input channels of a tile of the weight's gradient. Not 12 there: groups of 16 and 32 channels are common.
constexpr int64_t kChannels = kRegisters == 32 ? 8 : 6;
// Columns of a panel, as gemm_pack lays them out.
template <class T>
constexpr int64_t kPanel = 2 * kLanes<T>;
// Time steps of the weight's gradient whose rows stay in a level-1 cache for all input channels.
constexpr int64_t kChunk = 128;

/// y (kRows, width) of one panel; kVecs vectors of the panel hold its columns.
template <class T, int64_t kRows, int64_t kVecs>
void tile(const Conv1d& conv, const T* x, int64_t x_row, const T* panel, int64_t width, T* y, int64_t y_row) {
  Vec<T> sum[kRows][kVecs] = {};
  for (int64_t k = conv.first; k < conv.last; ++k, x += conv.dilation * x_row) {
    for (int64_t c = 0; c < conv.in; ++c, panel += kPanel<T>) {
      Vec<T> w[kVecs];
      for (int64_t v = 0; v < kVecs; ++v) w[v] = load(panel + v * kLanes<T>);
#pragma GCC unroll 12
      for (int64_t i = 0; i < kRows; ++i) {
        const Vec<T> in = broadcast(x[i * x_row + c]);
        for (int64_t v = 0; v < kVecs; ++v) sum[i][v] += in * w[v];
      }
    }
  }
#pragma GCC unroll 12
  for (int64_t i = 0; i < kRows; ++i) {
    for (int64_t v = 0; v < kVecs; ++v) {
      store_up_to<T>(y + i * y_row + v * kLanes<T>, sum[i][v], width - v * kLanes<T>);
    }
  }
}

/// The tile of exactly `rows` <= kRows time steps.
template <class T, int64_t kRows, int64_t kVecs>
void tile_of(int64_t rows, const Conv1d& conv, const T* x, int64_t x_row, const T* panel, int64_t width, T* y,
             int64_t y_row) {
  if constexpr (kRows > 1) {
    if (rows < kRows) return tile_of<T, kRows - 1, kVecs>(rows, conv, x, x_row, panel, width, y, y_row);
  }
  tile<T, kRows, kVecs>(conv, x, x_row, panel, width, y, y_row);
}

template <class T>
void causal_conv1d(const Conv1d& conv, int64_t rows, const T* x, int64_t x_row, const T* packed, T* y,
                   int64_t y_row) {
  for (int64_t o = 0; o < conv.out; o += kPanel<T>) {
    const int64_t width = min_of(kPanel<T>, conv.out - o);
    const T* panel = packed + (o * conv.taps + conv.first * kPanel<T>)*conv.in;
    for (int64_t t = 0; t < rows; t += kTime) {
      const int64_t count = min_of(kTime, rows - t);
      if (width > kLanes<T>) {
        tile_of<T, kTime, 2>(count, conv, x + t * x_row, x_row, panel, width, y + t * y_row + o, y_row);
      } else {
        tile_of<T, kTime, 1>(count, conv, x + t * x_row, x_row, panel, width, y + t * y_row + o, y_row);
      }
    }
  }
}

/// grad (kIn, width) += the sum over rows of x (rows, kIn) times grad_y (rows, kVecs vectors).
template <class T, int64_t kIn, int64_t kVecs>
void weight_tile(int64_t rows, const T* x, int64_t x_row, const T* grad_y, int64_t y_row, T* grad,
                 int64_t grad_row, int64_t width) {
  Vec<T> sum[kIn][kVecs] = {};
  for (int64_t t = 0; t < rows; ++t, x += x_row, grad_y += y_row) {
    Vec<T> g[kVecs];
    for (int64_t v = 0; v < kVecs; ++v) g[v] = load(grad_y + v * kLanes<T>);
#pragma GCC unroll 8
    for (int64_t c = 0; c < kIn; ++c) {
      const Vec<T> in = broadcast(x[c]);
      for (int64_t v = 0; v < kVecs; ++v) sum[c][v] += in * g[v];
    }
  }
#pragma GCC unroll 8
  for (int64_t c = 0; c < kIn; ++c) {
    for (int64_t v = 0; v < kVecs; ++v) {
      T* to = grad + c * grad_row + v * kLanes<T>;
      const int64_t n = width - v * kLanes<T>;
      store_up_to<T>(to, load_up_to(to, n) + sum[c][v], n);
    }
  }
}

/// The tile of exactly `in` <= kIn input channels.
template <class T, int64_t kIn, int64_t kVecs>
void weight_tile_of(int64_t in, int64_t rows, const T* x, int64_t x_row, const T* grad_y, int64_t y_row,
                    T* grad, int64_t grad_row, int64_t width) {
  if constexpr (kIn > 1) {
    if (in < kIn) {
      return weight_tile_of<T, kIn - 1, kVecs>(in, rows, x, x_row, grad_y, y_row, grad, grad_row, width);
    }
  }
  weight_tile<T, kIn, kVecs>(rows, x, x_row, grad_y, y_row, grad, grad_row, width);
}

template <class T>
void causal_conv1d_backward_weight(int64_t in, int64_t out, int64_t rows, const T* x, int64_t x_row,
                                   const T* grad_y, int64_t y_row, T* grad) {
  T chunk[kChunk * kPanel<T>];
  for (int64_t begin = 0; begin < rows; begin += kChunk) {
    const int64_t count = min_of(kChunk, rows - begin);
    for (int64_t o = 0; o < out; o += kPanel<T>) {
      const int64_t width = min_of(kPanel<T>, out - o);
      const T* from = grad_y + begin * y_row + o;
      int64_t from_row = y_row;
      // Columns that do not fill their vectors are copied, with zeros beside them.
      if (width % kLanes<T> != 0) {
        for (int64_t t = 0; t < count; ++t) {
          for (int64_t i = 0; i < kPanel<T>; ++i)
            chunk[t * kPanel<T> + i] = i < width ? from[t * y_row + i] : 0;
        }
        from = chunk;
        from_row = kPanel<T>;
      }
      for (int64_t c = 0; c < in; c += kChannels) {
        const int64_t n = min_of(kChannels, in - c);
        const T* rows_of_x = x + begin * x_row + c;
        if (width > kLanes<T>) {
          weight_tile_of<T, kChannels, 2>(n, count, rows_of_x, x_row, from, from_row, grad + c * out + o, out,
                                          width);
        } else {
          weight_tile_of<T, kChannels, 1>(n, count, rows_of_x, x_row, from, from_row, grad + c * out + o, out,
                                          width);
        }
      }
    }
  }
}

}  // namespace

template <class T>
void add_causal_conv1d(Table<T>& table) {
  table.causal_conv1d = causal_conv1d<T>;
  table.causal_conv1d_backward_weight = causal_conv1d_backward_weight<T>;
}
template void add_causal_conv1d(Table<float>&);
template void add_causal_conv1d(Table<double>&);

}  // namespace flashlm::kernels::FLASHLM_ISA

// SPDX-License-Identifier: Apache-2.0
// Grouped correlation over time on channels-last rows: a tile of time steps x output channels stays in
// registers while a panel of the packed weights runs past it. The same code convolves forward (one weight, or
// two side by side) and backward (weights transposed, taps reversed).
// A result's sum runs over taps, then input channels, whatever tile it is in: cutting time changes no bit.
#include "ops/kernels/families.h"
#include "ops/kernels/vec.h"

namespace flashlm::kernels::FLASHLM_ISA {
namespace {

// Registers: kTile * 2 sums + 2 of weights + 1 broadcast = 15 of 16, or 19 of 32; a full tile of sums covers
// the latency of two multiply-adds a cycle.
constexpr int64_t kTile = kRegisters == 32 ? 8 : 6;
// Columns of a panel, as gemm_pack lays them out.
template <class T>
constexpr int64_t kPanel = 2 * kLanes<T>;
// Bytes of weights that stay in a level-2 cache of 512 KiB or more.
constexpr int64_t kSmallWeights = 256 * 1024;
// Time steps whose output gradients are copied to the stack, to be read once for every tap and input channel.
constexpr int64_t kChunk = 64;

/// y (kRows, width) of one group and panel; kVecs vectors of the panel hold its columns.
template <class T, int64_t kRows, int64_t kVecs>
void tile(const Conv1d& conv, const T* x, const T* panel, int64_t width, T* y) {
  const int64_t x_row = conv.groups * conv.in, y_row = conv.groups * conv.out;
  Vec<T> sum[kRows][kVecs] = {};
  for (int64_t k = 0; k < conv.taps; ++k) {
    const T* row = x + k * conv.dilation * x_row;
    for (int64_t c = 0; c < conv.in; ++c, panel += kPanel<T>) {
      Vec<T> w[kVecs];
      for (int64_t v = 0; v < kVecs; ++v) w[v] = load(panel + v * kLanes<T>);
#pragma GCC unroll 8
      for (int64_t i = 0; i < kRows; ++i) {
        const Vec<T> in = broadcast(row[i * x_row + c]);
        for (int64_t v = 0; v < kVecs; ++v) sum[i][v] += in * w[v];
      }
    }
  }
#pragma GCC unroll 8
  for (int64_t i = 0; i < kRows; ++i) {
    for (int64_t v = 0; v < kVecs; ++v) {
      store_up_to<T>(y + i * y_row + v * kLanes<T>, sum[i][v], width - v * kLanes<T>);
    }
  }
}

/// The tile of exactly `rows` <= kRows time steps.
template <class T, int64_t kRows, int64_t kVecs>
void tile_of(int64_t rows, const Conv1d& conv, const T* x, const T* panel, int64_t width, T* y) {
  if constexpr (kRows > 1) {
    if (rows < kRows) return tile_of<T, kRows - 1, kVecs>(rows, conv, x, panel, width, y);
  }
  tile<T, kRows, kVecs>(conv, x, panel, width, y);
}

template <class T>
void causal_conv1d(const Conv1d& conv, int64_t rows, const T* x, const T* packed, T* y) {
  const int64_t x_row = conv.groups * conv.in, y_row = conv.groups * conv.out;
  const int64_t panel_size = conv.taps * conv.in * kPanel<T>;
  const int64_t panels = (conv.out + kPanel<T> - 1) / kPanel<T>;
  // Weights that stay in a level-2 cache pass once a tile, and the rows of x stream by; larger ones pass
  // once.
  const bool small = conv.groups * panels * panel_size * static_cast<int64_t>(sizeof(T)) <= kSmallWeights;
  const int64_t strip = small ? kTile : rows;
  for (int64_t begin = 0; begin < rows; begin += strip) {
    const int64_t end = min_of(rows, begin + strip);
    for (int64_t i = 0; i < conv.groups * panels; ++i) {
      const int64_t g = i / panels, o = i % panels * kPanel<T>, width = min_of(kPanel<T>, conv.out - o);
      for (int64_t t = begin; t < end; t += kTile) {
        const int64_t count = min_of(kTile, end - t);
        const T* from = x + t * x_row + g * conv.in;
        const T* panel = packed + i * panel_size;
        T* to = y + t * y_row + g * conv.out + o;
        if (width > kLanes<T>) {
          tile_of<T, kTile, 2>(count, conv, from, panel, width, to);
        } else {
          tile_of<T, kTile, 1>(count, conv, from, panel, width, to);
        }
      }
    }
  }
}

/// grad (kIn, width) += the sum over rows of x (rows, kIn) times grad_y (rows, kPanel).
template <class T, int64_t kIn, int64_t kVecs>
void weight_tile(int64_t rows, const T* x, int64_t x_row, const T* grad_y, T* grad, int64_t grad_row,
                 int64_t width) {
  Vec<T> sum[kIn][kVecs] = {};
  for (int64_t t = 0; t < rows; ++t) {
    Vec<T> g[kVecs];
    for (int64_t v = 0; v < kVecs; ++v) g[v] = load(grad_y + t * kPanel<T> + v * kLanes<T>);
#pragma GCC unroll 8
    for (int64_t c = 0; c < kIn; ++c) {
      const Vec<T> in = broadcast(x[t * x_row + c]);
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

template <class T, int64_t kIn, int64_t kVecs>
void weight_tile_of(int64_t in, int64_t rows, const T* x, int64_t x_row, const T* grad_y, T* grad,
                    int64_t grad_row, int64_t width) {
  if constexpr (kIn > 1) {
    if (in < kIn) {
      return weight_tile_of<T, kIn - 1, kVecs>(in, rows, x, x_row, grad_y, grad, grad_row, width);
    }
  }
  weight_tile<T, kIn, kVecs>(rows, x, x_row, grad_y, grad, grad_row, width);
}

template <class T>
void causal_conv1d_backward_weight(const Conv1d& conv, int64_t group, int64_t column, int64_t rows,
                                   const T* x, const T* grad_y, T* grad) {
  const int64_t x_row = conv.groups * conv.in, y_row = conv.groups * conv.out;
  const int64_t width = min_of(kPanel<T>, conv.out - column);
  T chunk[kChunk * kPanel<T>];
  for (int64_t begin = 0; begin < rows; begin += kChunk) {
    const int64_t count = min_of(kChunk, rows - begin);
    for (int64_t t = 0; t < count; ++t) {
      const T* from = grad_y + (begin + t) * y_row + group * conv.out + column;
      for (int64_t o = 0; o < width; ++o) chunk[t * kPanel<T> + o] = from[o];
      for (int64_t o = width; o < kPanel<T>; ++o) chunk[t * kPanel<T> + o] = 0;
    }
    for (int64_t k = 0; k < conv.taps; ++k) {
      for (int64_t c = 0; c < conv.in; c += kTile) {
        const int64_t in = min_of(kTile, conv.in - c);
        const T* from = x + (begin + k * conv.dilation) * x_row + group * conv.in + c;
        T* to = grad + ((group * conv.taps + k) * conv.in + c) * conv.out + column;
        if (width > kLanes<T>) {
          weight_tile_of<T, kTile, 2>(in, count, from, x_row, chunk, to, conv.out, width);
        } else {
          weight_tile_of<T, kTile, 1>(in, count, from, x_row, chunk, to, conv.out, width);
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

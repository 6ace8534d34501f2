// SPDX-License-Identifier: Apache-2.0
// One group's correlation over time on channels-last rows: a tile of time steps x output channels stays in
// registers while a panel of the packed weights runs past it. The same code convolves forward (one weight, or
// two side by side) and backward (weights transposed, taps reversed).
// A result's sum runs over taps, then input channels, whatever tile it is in: cutting time changes no bit.
#include "ops/kernels/amx.h"
#include "ops/kernels/families.h"
#include "ops/kernels/vec.h"

#if defined(__AVX512BF16__)
#include <immintrin.h>
#endif

namespace flashlm::kernels::FLASHLM_ISA {
namespace {

// Input channels of a tile of the weight's gradient. Not 12 there: groups of 16 and 32 channels are common.
constexpr int64_t kChannels = kRegisters == 32 ? 8 : 6;
// Columns of a panel, as gemm_pack lays them out.
template <class T>
constexpr int64_t kPanel = 2 * kLanes<T>;
// Time steps of the weight's gradient whose rows stay in a level-1 cache for all input channels.
constexpr int64_t kChunk = 128;

/// What the forward tile multiplies: `Factor` says what x and w are made of, `Sum` what y is. A full tile is
/// kTime time steps x kVecs vectors, one panel; its sums cover the latency of the multiply-adds.
template <class T>
struct Floats {
  using Factor = T;
  using Sum = T;
  // Registers: kTime * 2 sums + 2 of weights + 1 broadcast = 15 of 16, or 27 of 32.
  static constexpr int64_t kTime = kRegisters == 32 ? 12 : 6, kVecs = 2;
  static Vec<T> multiply_add(Vec<T> x, Vec<T> w, Vec<T> sum) { return sum + x * w; }
};
#if defined(__AVX512BF16__)
struct Bf16Pairs {
  using Factor = int32_t;
  using Sum = float;
  // One vector: often the width of a group. More time steps would leave a remainder of the usual 64.
  static constexpr int64_t kTime = 8, kVecs = 1;
  static Vec<float> multiply_add(Vec<int32_t> x, Vec<int32_t> w, Vec<float> sum) {
    return (Vec<float>)_mm512_dpbf16_ps((__m512)sum, (__m512bh)w, (__m512bh)x);
  }
};
#endif

/// y (kRows, width) of one panel; kVecs vectors of the panel hold its columns.
template <class Product, int64_t kRows, int64_t kVecs, class Factor, class T>
void tile(const Conv1d& conv, const Factor* x, int64_t x_row, const Factor* panel, int64_t width, T* y,
          int64_t y_row) {
  Vec<T> sum[kRows][kVecs] = {};
  for (int64_t k = conv.first; k < conv.last; ++k, x += conv.dilation * x_row) {
    for (int64_t c = 0; c < conv.in; ++c, panel += Product::kVecs * kLanes<T>) {
      Vec<Factor> w[kVecs];
      for (int64_t v = 0; v < kVecs; ++v) w[v] = load(panel + v * kLanes<T>);
#pragma GCC unroll 12
      for (int64_t i = 0; i < kRows; ++i) {
        const Vec<Factor> in = broadcast(x[i * x_row + c]);
        for (int64_t v = 0; v < kVecs; ++v) sum[i][v] = Product::multiply_add(in, w[v], sum[i][v]);
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
template <class Product, int64_t kRows, int64_t kVecs, class Factor, class T>
void tile_of(int64_t rows, const Conv1d& conv, const Factor* x, int64_t x_row, const Factor* panel,
             int64_t width, T* y, int64_t y_row) {
  if constexpr (kRows > 1) {
    if (rows < kRows) {
      return tile_of<Product, kRows - 1, kVecs>(rows, conv, x, x_row, panel, width, y, y_row);
    }
  }
  tile<Product, kRows, kVecs>(conv, x, x_row, panel, width, y, y_row);
}

template <class Product>
void causal_conv1d(const Conv1d& conv, int64_t rows, const typename Product::Factor* x, int64_t x_row,
                   const typename Product::Factor* packed, typename Product::Sum* y, int64_t y_row) {
  constexpr int64_t kVector = kLanes<typename Product::Sum>, kWidth = Product::kVecs * kVector;
  constexpr int64_t kTime = Product::kTime;
  for (int64_t o = 0; o < conv.out; o += kWidth) {
    const int64_t width = min_of(kWidth, conv.out - o);
    const auto* panel = packed + (o * conv.taps + conv.first * kWidth) * conv.in;
    for (int64_t t = 0; t < rows; t += kTime) {
      const int64_t count = min_of(kTime, rows - t);
      const auto* from = x + t * x_row;
      auto* to = y + t * y_row + o;
      if (width > kVector) {
        tile_of<Product, kTime, Product::kVecs>(count, conv, from, x_row, panel, width, to, y_row);
      } else {
        tile_of<Product, kTime, 1>(count, conv, from, x_row, panel, width, to, y_row);
      }
    }
  }
}

#if defined(__AMX_TILE__)
/// Half a vector from each of two places.
inline Vec<int32_t> join_halves(const int32_t* low, const int32_t* high) {
  typedef int32_t Half __attribute__((vector_size(kVectorBytes / 2)));
  Half a, b;
  memcpy(&a, low, sizeof a);
  memcpy(&b, high, sizeof b);
  return __builtin_shufflevector(a, b, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
}

/// In tiles, whose depth is that of all taps together.
void causal_conv1d_tiles(const Conv1d& conv, int64_t rows, const int32_t* x, int64_t x_row,
                         const int32_t* packed, float* y, int64_t y_row) {
  const int64_t depth = (conv.last - conv.first) * conv.in;
  tile_gemm<Bfloat16Pairs>(
      {y, rows, conv.out, y_row, /*accumulate=*/false}, depth,
      [&](int64_t i, int64_t count, int64_t p, int64_t groups, int32_t* buffer) -> TileRows {
        const int64_t to_row = round_up(groups, kTile), tap_row = conv.dilation * x_row;
        const int64_t tap = p / conv.in, first = p % conv.in;
        const int32_t* from = x + (i + tap * conv.dilation) * x_row;
        if (to_row == groups && count % kTile == 0) {
          // A tap fills a tile, or neighbouring taps lie side by side: tiles read them where they are.
          if (conv.in == kTile) return {from, x_row, tap_row};
          if (tap_row == conv.in) return {from + first, x_row};
        }
        int32_t* to = buffer;
        for (int64_t r = 0; r < count; ++r, from += x_row, to += to_row) {
          if (conv.in == kTile / 2 && to_row == groups) {
            for (int64_t done = 0; done < groups; done += kTile) {
              const int32_t* const half = from + done / conv.in * tap_row;
              store(to + done, join_halves(half, half + tap_row));
            }
            continue;
          }
          // What a vector holds beyond its tap is zero, and gives way to the next tap, or row. A short last
          // tap need not reach the end of its tile.
          if (groups < to_row) store(to + to_row - kTile, Vec<int32_t>{});
          const int32_t* at = from;
          for (int64_t done = 0, c = first; done < groups; at += tap_row, c = 0) {
            const int64_t end = min_of(conv.in, c + groups - done);
            for (; c < end; c += kTile) {
              const int64_t width = min_of(kTile, end - c);
              store(to + done, load_up_to(at + c, width));
              done += width;
            }
          }
        }
        for (int64_t r = count; r < round_up(count, kTile); ++r, to += to_row) {
          for (int64_t at = 0; at < to_row; at += kTile) store(to + at, Vec<int32_t>{});
        }
        return {buffer, to_row};
      },
      packed + conv.first * conv.in * kTile, conv.taps * conv.in,
      [=](int64_t) { return [](Vec<int32_t> sums) { return (Vec<float>)sums; }; });
}
#endif

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
  table.causal_conv1d = causal_conv1d<Floats<T>>;
#if defined(__AMX_TILE__)
  if constexpr (sizeof(T) == sizeof(float)) table.causal_conv1d_bf16 = causal_conv1d_tiles;
#elif defined(__AVX512BF16__)
  if constexpr (sizeof(T) == sizeof(float)) table.causal_conv1d_bf16 = causal_conv1d<Bf16Pairs>;
#endif
  table.causal_conv1d_backward_weight = causal_conv1d_backward_weight<T>;
}
template void add_causal_conv1d(Table<float>&);
template void add_causal_conv1d(Table<double>&);

}  // namespace flashlm::kernels::FLASHLM_ISA

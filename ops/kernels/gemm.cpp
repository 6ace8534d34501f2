// SPDX-License-Identifier: Apache-2.0
// Dense matrix product on packed B, the work-horse of the backward passes and of the output layer. A tile of
// kRows x kCols results stays in registers while a sliver of A (packed on the stack) and a panel of B run
// past it.
#include "ops/kernels/families.h"
#include "ops/kernels/vec.h"

namespace flashlm::kernels::FLASHLM_ISA {
namespace {

// Registers: kRows * 2 accumulators + 2 of B + 1 broadcast of A = 15 of 16, or 27 of 32.
constexpr int64_t kRows = kRegisters == 32 ? 12 : 6;
template <class T>
constexpr int64_t kCols = 2 * kLanes<T>;
// Depth of a block: a panel of B, kDepth * kCols, stays in a 32 KiB L1 beside the sliver of A.
constexpr int64_t kDepth = 256;

/// The first columns of a panel from b(p, c) = b[p + c * col_stride], as many as make whole vectors. Returns
/// their number.
template <class T>
int64_t pack_columns(int64_t k, int64_t width, const T* b, int64_t col_stride, T* packed) {
  constexpr int64_t lanes = kLanes<T>;
  const int64_t columns = width / lanes * lanes;
  for (int64_t c = 0; c < columns; c += lanes) {
    int64_t p = 0;
    for (; p + lanes <= k; p += lanes) {
      Vec<T> v[lanes];
#pragma GCC unroll 16
      for (int64_t i = 0; i < lanes; ++i) v[i] = load(b + p + (c + i) * col_stride);
      transpose<T>(v);
#pragma GCC unroll 16
      for (int64_t i = 0; i < lanes; ++i) store(packed + (p + i) * kCols<T> + c, v[i]);
    }
    for (; p < k; ++p) {
      for (int64_t i = 0; i < lanes; ++i) packed[p * kCols<T> + c + i] = b[p + (c + i) * col_stride];
    }
  }
  return columns;
}

template <class T>
void pack(int64_t k, int64_t n, const T* b, int64_t row_stride, int64_t col_stride, T* packed) {
  constexpr int64_t cols = kCols<T>;
  for (int64_t j = 0; j < n; j += cols) {
    const int64_t width = min_of(cols, n - j);
    const int64_t first =
        row_stride == 1 ? pack_columns(k, width, b + j * col_stride, col_stride, packed) : 0;
    for (int64_t p = 0; p < k; ++p, packed += cols) {
      const T* from = b + p * row_stride + j * col_stride;
      for (int64_t c = first; c < width; ++c) packed[c] = from[c * col_stride];
      for (int64_t c = width; c < cols; ++c) packed[c] = 0;
    }
  }
}

/// A(i0 .. i0 + rows, p0 .. p0 + depth) as sliver[p][kRows], missing rows zero.
template <class T>
void pack_sliver(int64_t rows, int64_t depth, const T* a, int64_t a_row, int64_t a_col, T* sliver) {
  if (a_row == 1 && rows == kRows) {  // a transposed A: its columns are contiguous
    for (int64_t p = 0; p < depth; ++p) memcpy(sliver + p * kRows, a + p * a_col, kRows * sizeof(T));
    return;
  }
  for (int64_t i = 0; i < kRows; ++i) {
    for (int64_t p = 0; p < depth; ++p) sliver[p * kRows + i] = i < rows ? a[i * a_row + p * a_col] : T(0);
  }
}

/// One tile: C(rows, width) = sliver · panel (+ C).
template <class T>
void tile(int64_t rows, int64_t width, int64_t depth, const T* sliver, const T* panel, T* c, int64_t c_row,
          bool accumulate) {
  constexpr int64_t lanes = kLanes<T>;
  Vec<T> sum[kRows][2] = {};
  for (int64_t p = 0; p < depth; ++p) {
    const Vec<T> b0 = load(panel + p * kCols<T>);
    const Vec<T> b1 = load(panel + p * kCols<T> + lanes);
#pragma GCC unroll 12
    for (int64_t i = 0; i < kRows; ++i) {
      const Vec<T> a = broadcast(sliver[p * kRows + i]);
      sum[i][0] += a * b0;
      sum[i][1] += a * b1;
    }
  }
#pragma GCC unroll 12
  for (int64_t i = 0; i < kRows; ++i) {
    if (i >= rows) break;
#pragma GCC unroll 2
    for (int64_t half = 0; half < 2; ++half) {
      T* to = c + i * c_row + half * lanes;
      const int64_t n = width - half * lanes;
      if (n >= lanes) {
        store(to, accumulate ? load(to) + sum[i][half] : sum[i][half]);
      } else if (n > 0) {
        store_first(to, accumulate ? load_first(to, n) + sum[i][half] : sum[i][half], n);
      }
    }
  }
}

template <class T>
void gemm(int64_t m, int64_t n, int64_t k, const T* a, int64_t a_row, int64_t a_col, const T* packed, T* c,
          int64_t c_row, bool accumulate) {
  T sliver[kDepth * kRows];
  // A product over no depth is still a result: zeros, unless there is something to add to.
  for (int64_t p = 0; p < k || (p == 0 && !accumulate); p += kDepth) {
    const int64_t depth = min_of(kDepth, k - p);
    for (int64_t i = 0; i < m; i += kRows) {
      const int64_t rows = min_of(kRows, m - i);
      pack_sliver(rows, depth, a + i * a_row + p * a_col, a_row, a_col, sliver);
      for (int64_t j = 0; j < n; j += kCols<T>) {
        tile(rows, min_of(kCols<T>, n - j), depth, sliver, packed + j * k + p * kCols<T>, c + i * c_row + j,
             c_row, accumulate || p > 0);
      }
    }
  }
}

}  // namespace

template <class T>
void add_gemm(Table<T>& table) {
  table.gemm_panel = kCols<T>;
  table.gemm_pack = pack<T>;
  table.gemm = gemm<T>;
}
template void add_gemm(Table<float>&);
template void add_gemm(Table<double>&);

}  // namespace flashlm::kernels::FLASHLM_ISA

// SPDX-License-Identifier: Apache-2.0
// RMSNorm over rows, forward and backward, and its parts for callers that normalise some columns at a time.
#include "ops/kernels/families.h"
#include "ops/kernels/vec.h"

namespace flashlm::kernels::FLASHLM_ISA {
namespace {

// Rows that go through the registers together: their chains of additions overlap, and they share the loads of
// `scale` and `grad_scale`. A row's own sum runs over its vectors in order, whatever rows are beside it.
constexpr int64_t kRows = 4;

/// Calls body(i, n) for each vector of a row: the n values from i.
template <class T, class Body>
inline __attribute__((always_inline)) void for_each_vector(int64_t width, const Body& body) {
  int64_t i = 0;
  for (; i + kLanes<T> <= width; i += kLanes<T>) body(i, kLanes<T>);
  if (i < width) body(i, width - i);
}

/// Calls body<kRows>(r) for rows r, r + 1, ... together, and body<1>(r) for the rows left over.
template <class Body>
inline void for_each_rows(int64_t rows, const Body& body) {
  int64_t r = 0;
  for (; r + kRows <= rows; r += kRows) body.template operator()<kRows>(r);
  for (; r < rows; ++r) body.template operator()<1>(r);
}

template <class T>
T inverse_rms_of(Vec<T> squares, int64_t width, T eps) {
  return T(1) / square_root(reduce_add<T>(squares) / static_cast<T>(width) + eps);
}

template <class T, int64_t kCount>
void inverse_rms_rows(int64_t width, const T* x, T eps, T* rstd) {
  Vec<T> squares[kCount] = {};
  for_each_vector<T>(
      width, [&](int64_t i, int64_t n) __attribute__((always_inline)) {
#pragma GCC unroll 4
        for (int64_t r = 0; r < kCount; ++r) {
          // As a rule these rows come from memory: ask for the next ones while these are summed.
          __builtin_prefetch(x + (kCount + r) * width + i);
          const Vec<T> v = load_up_to(x + r * width + i, n);
          squares[r] += v * v;
        }
      });
#pragma GCC unroll 4
  for (int64_t r = 0; r < kCount; ++r) rstd[r] = inverse_rms_of<T>(squares[r], width, eps);
}

template <class T>
void inverse_rms(int64_t rows, int64_t width, const T* x, T eps, T* rstd) {
  for_each_rows(rows, [&]<int64_t kCount>(int64_t r) {
    inverse_rms_rows<T, kCount>(width, x + r * width, eps, rstd + r);
  });
}

/// put(r, i, v, n) takes v, the n scaled values from column i of row r, and zeros after them.
template <class T, class Put>
inline void for_each_scaled(int64_t rows, int64_t width, const T* x, int64_t x_row, const T* rstd,
                            const T* scale, const Put& put) {
  for (int64_t r = 0; r < rows; ++r) {
    const Vec<T> by = broadcast(rstd[r]);
    for_each_vector<T>(
        width, [&](int64_t i, int64_t n) __attribute__((always_inline)) {
          put(r, i, load_up_to(x + r * x_row + i, n) * by * load_up_to(scale + i, n), n);
        });
  }
}

template <class T>
void scale_rows(int64_t rows, int64_t width, const T* x, int64_t x_row, const T* rstd, const T* scale, T* y) {
  for_each_scaled(
      rows, width, x, x_row, rstd,
      scale, [&](int64_t r, int64_t i, const Vec<T>& v, int64_t n) __attribute__((always_inline)) {
        store_up_to<T>(y + r * width + i, v, n);
      });
}

#if defined(__AVX512BF16__)
void scale_rows_bf16(int64_t rows, int64_t width, const float* x, int64_t x_row, const float* rstd,
                     const float* scale, int32_t* y) {
  auto* const halves = reinterpret_cast<uint16_t*>(y);
  for_each_scaled(
      rows, width, x, x_row, rstd,
      scale, [&](int64_t r, int64_t i, const Vec<float>& v, int64_t n) __attribute__((always_inline)) {
        store_bf16(halves + r * (width + width % 2) + i, v, n + n % 2);
      });
}
#endif

template <class T>
void rms_norm(int64_t rows, int64_t width, const T* x, const T* scale, T eps, T* y) {
  for_each_rows(rows, [&]<int64_t kCount>(int64_t r) {
    T rstd[kCount];
    inverse_rms_rows<T, kCount>(width, x + r * width, eps, rstd);
    scale_rows(kCount, width, x + r * width, width, rstd, scale, y + r * width);
  });
}

// With n = x * rstd and g = grad_y * scale:  grad_x = rstd * (g - n * mean(g * n)),  grad_scale = sum of
// grad_y * n. The mean needs rstd only at its end, so that one pass takes both sums; a second writes. A
// vector of grad_y is read for the last time before the same vector of grad_x is written: they may be the
// same rows.
template <class T, int64_t kCount>
void backward(int64_t width, const T* grad_y, const T* x, const T* scale, T eps, const T* residual, T* grad_x,
              T* grad_scale) {
  Vec<T> squares[kCount] = {}, products[kCount] = {}, rstd[kCount], mean[kCount];
  for_each_vector<T>(
      width, [&](int64_t i, int64_t n) __attribute__((always_inline)) {
        const Vec<T> by = load_up_to(scale + i, n);
#pragma GCC unroll 4
        for (int64_t r = 0; r < kCount; ++r) {
          const Vec<T> v = load_up_to(x + r * width + i, n);
          squares[r] += v * v;
          products[r] += load_up_to(grad_y + r * width + i, n) * by * v;
        }
      });
#pragma GCC unroll 4
  for (int64_t r = 0; r < kCount; ++r) {
    const T inverse = inverse_rms_of<T>(squares[r], width, eps);
    rstd[r] = broadcast(inverse);
    mean[r] = broadcast(reduce_add<T>(products[r]) * inverse / static_cast<T>(width));
  }
  for_each_vector<T>(
      width, [&](int64_t i, int64_t n) __attribute__((always_inline)) {
        const Vec<T> by = load_up_to(scale + i, n);
        Vec<T> sum = load_up_to(grad_scale + i, n);
#pragma GCC unroll 4
        for (int64_t r = 0; r < kCount; ++r) {
          const Vec<T> grad = load_up_to(grad_y + r * width + i, n);
          const Vec<T> normed = load_up_to(x + r * width + i, n) * rstd[r];
          sum += grad * normed;
          Vec<T> out = rstd[r] * (grad * by - normed * mean[r]);
          if (residual != nullptr) out += load_up_to(residual + r * width + i, n);
          store_up_to<T>(grad_x + r * width + i, out, n);
        }
        store_up_to<T>(grad_scale + i, sum, n);
      });
}

template <class T>
void rms_norm_residual_backward(int64_t rows, int64_t width, const T* grad_y, const T* x, const T* scale,
                                T eps, const T* residual, T* grad_x, T* grad_scale) {
  for_each_rows(rows, [&]<int64_t kCount>(int64_t r) {
    const int64_t at = r * width;
    backward<T, kCount>(width, grad_y + at, x + at, scale, eps, residual == nullptr ? nullptr : residual + at,
                        grad_x + at, grad_scale);
  });
}

template <class T>
void rms_norm_backward(int64_t rows, int64_t width, const T* grad_y, const T* x, const T* scale, T eps,
                       T* grad_x, T* grad_scale) {
  rms_norm_residual_backward<T>(rows, width, grad_y, x, scale, eps, nullptr, grad_x, grad_scale);
}

}  // namespace

template <class T>
void add_rms_norm(Table<T>& table) {
  table.inverse_rms = inverse_rms<T>;
  table.scale_rows = scale_rows<T>;
#if defined(__AVX512BF16__)
  if constexpr (sizeof(T) == sizeof(float)) table.scale_rows_bf16 = scale_rows_bf16;
#endif
  table.rms_norm = rms_norm<T>;
  table.rms_norm_backward = rms_norm_backward<T>;
  table.rms_norm_residual_backward = rms_norm_residual_backward<T>;
}
template void add_rms_norm(Table<float>&);
template void add_rms_norm(Table<double>&);

}  // namespace flashlm::kernels::FLASHLM_ISA

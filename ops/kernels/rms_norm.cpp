// SPDX-License-Identifier: Apache-2.0
// RMSNorm over rows, forward and backward.
#include "ops/kernels/families.h"
#include "ops/kernels/vec.h"

namespace flashlm::kernels::FLASHLM_ISA {
namespace {

template <class T>
T dot(int64_t n, const T* a, const T* b) {
  Vec<T> sum = {};
  int64_t i = 0;
  for (; i + kLanes<T> <= n; i += kLanes<T>) sum += load(a + i) * load(b + i);
  return reduce_add<T>(sum + load_first(a + i, n - i) * load_first(b + i, n - i));
}

template <class T>
T inverse_rms(int64_t width, const T* x, T eps) {
  return T(1) / square_root(dot(width, x, x) / static_cast<T>(width) + eps);
}

template <class T>
void rms_norm(int64_t rows, int64_t width, const T* x, const T* scale, T eps, T* y) {
  for (int64_t r = 0; r < rows; ++r, x += width, y += width) {
    const T rstd = inverse_rms(width, x, eps);
    for (int64_t i = 0; i < width; ++i) y[i] = x[i] * rstd * scale[i];
  }
}

// With n = x * rstd and g = grad_y * scale:  grad_x = rstd * (g - n * mean(g * n)),  grad_scale = sum of
// grad_y * n.
template <class T>
void rms_norm_backward(int64_t rows, int64_t width, const T* grad_y, const T* x, const T* scale, T eps,
                       T* grad_x, T* grad_scale) {
  for (int64_t r = 0; r < rows; ++r, grad_y += width, x += width, grad_x += width) {
    const T rstd = inverse_rms(width, x, eps);
    for (int64_t i = 0; i < width; ++i) grad_x[i] = grad_y[i] * scale[i];
    const T mean = dot(width, grad_x, x) * rstd / static_cast<T>(width);
    for (int64_t i = 0; i < width; ++i) {
      const T normed = x[i] * rstd;
      grad_scale[i] += grad_y[i] * normed;
      grad_x[i] = rstd * (grad_x[i] - normed * mean);
    }
  }
}

}  // namespace

template <class T>
void add_rms_norm(Table<T>& table) {
  table.rms_norm = rms_norm<T>;
  table.rms_norm_backward = rms_norm_backward<T>;
}
template void add_rms_norm(Table<float>&);
template void add_rms_norm(Table<double>&);

}  // namespace flashlm::kernels::FLASHLM_ISA

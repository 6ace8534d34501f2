// SPDX-License-Identifier: Apache-2.0
// The gate of gated_conv: what happens to one group's two convolutions once they are computed, elementwise.
#include "ops/kernels/families.h"
#include "ops/kernels/vec.h"

namespace flashlm::kernels::FLASHLM_ISA {
namespace {

/// visit(r, i, open, value), where y = x + open * value, sees the vector at column i of row r.
template <class T, class Visit>
inline void for_each_gate(int64_t rows, int64_t width, const T* x, int64_t x_row, const T* convs, T* y,
                          const Visit& visit) {
  for (int64_t r = 0; r < rows; ++r, x += x_row, y += x_row, convs += 2 * width) {
    for (int64_t i = 0; i < width; i += kLanes<T>) {
      const int64_t rest = width - i;
      const Vec<T> open = vec_sigmoid<T>(load_up_to(convs + i, rest));
      const Vec<T> value = load_up_to(convs + width + i, rest);
      store_up_to<T>(y + i, load_up_to(x + i, rest) + open * value, rest);
      visit(r, i, open, value);
    }
  }
}

template <class T>
void gated_conv(int64_t rows, int64_t width, const T* x, int64_t x_row, const T* convs, T* y) {
  for_each_gate(rows, width, x, x_row, convs, y, [](int64_t, int64_t, const Vec<T>&, const Vec<T>&) {});
}

// With s = sigmoid(gate):  d/dgate = value * s * (1 - s),  d/dvalue = s.
template <class T>
void gated_conv_backward(int64_t rows, int64_t width, const T* grad_y, int64_t grad_y_row, T* convs) {
  for (int64_t r = 0; r < rows; ++r, grad_y += grad_y_row, convs += 2 * width) {
    for (int64_t i = 0; i < width; i += kLanes<T>) {
      const int64_t rest = width - i;
      const Vec<T> open = vec_sigmoid<T>(load_up_to(convs + i, rest));
      const Vec<T> grad_value = load_up_to(grad_y + i, rest) * open;
      const Vec<T> value = load_up_to(convs + width + i, rest);
      store_up_to<T>(convs + i, grad_value * value * (T(1) - open), rest);
      store_up_to<T>(convs + width + i, grad_value, rest);
    }
  }
}

#if defined(__AVX512BF16__)
void gated_conv_slopes(int64_t rows, int64_t width, const float* x, int64_t x_row, const float* convs,
                       float* y, uint16_t* slopes) {
  for_each_gate(rows, width, x, x_row, convs, y,
                [&](int64_t r, int64_t i, const Vec<float>& open, const Vec<float>& value) {
                  uint16_t* to = slopes + r * 2 * width + i;
                  // As (open * value) * ... it would take y's fused multiply-add apart.
                  store_bf16(to, value * (open * (1.0f - open)), width - i);
                  store_bf16(to + width, open, width - i);
                });
}

void gated_conv_backward_slopes(int64_t rows, int64_t width, const float* grad_y, int64_t grad_y_row,
                                const uint16_t* slopes, uint16_t* grad) {
  for (int64_t r = 0; r < rows; ++r, grad_y += grad_y_row, slopes += 2 * width, grad += 2 * width) {
    for (int64_t i = 0; i < width; i += kLanes<float>) {
      const int64_t rest = width - i;
      const Vec<float> dy = load_up_to(grad_y + i, rest);
      store_bf16(grad + i, dy * load_bf16(slopes + i, rest), rest);
      store_bf16(grad + width + i, dy * load_bf16(slopes + width + i, rest), rest);
    }
  }
}
#endif

}  // namespace

template <class T>
void add_gated_conv(Table<T>& table) {
  table.gated_conv = gated_conv<T>;
  table.gated_conv_backward = gated_conv_backward<T>;
#if defined(__AVX512BF16__)
  if constexpr (sizeof(T) == sizeof(float)) {
    table.gated_conv_slopes = gated_conv_slopes;
    table.gated_conv_backward_slopes = gated_conv_backward_slopes;
  }
#endif
}
template void add_gated_conv(Table<float>&);
template void add_gated_conv(Table<double>&);

}  // namespace flashlm::kernels::FLASHLM_ISA

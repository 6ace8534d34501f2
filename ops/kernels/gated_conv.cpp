// SPDX-License-Identifier: Apache-2.0
// The gate of gated_conv: what happens to one group's two convolutions once they are computed, elementwise.
#include "ops/kernels/families.h"
#include "ops/kernels/vec.h"

namespace flashlm::kernels::FLASHLM_ISA {
namespace {

template <class T>
void gated_conv(int64_t rows, int64_t width, const T* x, int64_t x_row, const T* convs, T* y) {
  for (int64_t r = 0; r < rows; ++r, x += x_row, y += x_row, convs += 2 * width) {
    for (int64_t i = 0; i < width; i += kLanes<T>) {
      const int64_t rest = width - i;
      const Vec<T> gate = load_up_to(convs + i, rest), value = load_up_to(convs + width + i, rest);
      store_up_to<T>(y + i, load_up_to(x + i, rest) + vec_sigmoid<T>(gate) * value, rest);
    }
  }
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

}  // namespace

template <class T>
void add_gated_conv(Table<T>& table) {
  table.gated_conv = gated_conv<T>;
  table.gated_conv_backward = gated_conv_backward<T>;
}
template void add_gated_conv(Table<float>&);
template void add_gated_conv(Table<double>&);

}  // namespace flashlm::kernels::FLASHLM_ISA

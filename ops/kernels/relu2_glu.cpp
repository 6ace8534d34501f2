// SPDX-License-Identifier: Apache-2.0
// Gated linear unit with a squared-ReLU gate, elementwise.
#include "ops/kernels/families.h"
#include "ops/kernels/vec.h"

namespace flashlm::kernels::FLASHLM_ISA {
namespace {

template <class T>
void relu2_glu(int64_t n, const T* gate, const T* up, T* y) {
  for (int64_t i = 0; i < n; ++i) {
    const T open = gate[i] > 0 ? gate[i] : T(0);
    y[i] = open * open * up[i];
  }
}

template <class T>
void relu2_glu_backward(int64_t n, const T* grad_y, const T* gate, const T* up, T* grad_gate, T* grad_up) {
  for (int64_t i = 0; i < n; ++i) {
    const T open = gate[i] > 0 ? gate[i] : T(0);
    grad_gate[i] = 2 * open * up[i] * grad_y[i];
    grad_up[i] = open * open * grad_y[i];
  }
}

}  // namespace

template <class T>
void add_relu2_glu(Table<T>& table) {
  table.relu2_glu = relu2_glu<T>;
  table.relu2_glu_backward = relu2_glu_backward<T>;
}
template void add_relu2_glu(Table<float>&);
template void add_relu2_glu(Table<double>&);

}  // namespace flashlm::kernels::FLASHLM_ISA

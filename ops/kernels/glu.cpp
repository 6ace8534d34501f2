// SPDX-License-Identifier: Apache-2.0
// Gated linear units, elementwise: one loop for all activations of the gate. Compiled without contraction to
// fused multiply-adds, so that every level has the same bits.
#include "ops/kernels/families.h"
#include "ops/kernels/vec.h"

namespace flashlm::kernels::FLASHLM_ISA {
namespace {

// ---- activations: the value and its derivative, the slope. A NaN stays one, because vec_max and vec_min
// keep their second operand when the comparison fails ----

template <class T>
struct Relu2 {
  Vec<T> value, slope;

  explicit Relu2(Vec<T> gate) {
    const Vec<T> open = vec_max<T>(Vec<T>{}, gate);
    value = open * open;
    slope = T(2) * open;
  }
};

/// Beyond these arguments vec_exp is clamped (float) or soon infinite (double).
template <class T>
constexpr T kFar = sizeof(T) == sizeof(float) ? 87 : 700;

template <class T>
struct Sigmoid {
  Vec<T> value, shut, slope;  // shut is 1 - value, right to a few roundings of itself

  explicit Sigmoid(Vec<T> gate) {
    const Vec<T> e = vec_exp(-vec_max<T>(broadcast(-kFar<T>), gate));
    value = T(1) / (T(1) + e);
    shut = e * value;
    slope = value * shut;
  }
};

/// The bounds keep what is infinite, or nearly, from being multiplied by a sigmoid that ought to be 0.
template <class T>
struct Silu {
  Vec<T> value, slope;

  explicit Silu(Vec<T> gate) {
    const Sigmoid<T> sigmoid(gate);
    value = vec_max<T>(broadcast(-kFar<T>), gate) * sigmoid.value;
    slope = sigmoid.value + vec_min<T>(broadcast(kFar<T>), value) * sigmoid.shut;
  }
};

// ---- y = value * up ----

template <template <class> class Activation, class T>
void forward(int64_t n, const T* gate, const T* up, T* y) {
  for (int64_t i = 0; i < n; i += kLanes<T>) {
    const Activation<T> a(load_up_to(gate + i, n - i));
    store_up_to<T>(y + i, a.value * load_up_to(up + i, n - i), n - i);
  }
}

template <template <class> class Activation, class T>
void backward(int64_t n, const T* grad_y, const T* gate, const T* up, T* grad_gate, T* grad_up) {
  for (int64_t i = 0; i < n; i += kLanes<T>) {
    const Activation<T> a(load_up_to(gate + i, n - i));
    const Vec<T> dy = load_up_to(grad_y + i, n - i);
    store_up_to<T>(grad_gate + i, a.slope * load_up_to(up + i, n - i) * dy, n - i);
    store_up_to<T>(grad_up + i, a.value * dy, n - i);
  }
}

}  // namespace

template <class T>
void add_glu(Table<T>& table) {
  table.relu2_glu = {forward<Relu2, T>, backward<Relu2, T>};
  table.silu_glu = {forward<Silu, T>, backward<Silu, T>};
  table.sigmoid_glu = {forward<Sigmoid, T>, backward<Sigmoid, T>};
}
template void add_glu(Table<float>&);
template void add_glu(Table<double>&);

}  // namespace flashlm::kernels::FLASHLM_ISA

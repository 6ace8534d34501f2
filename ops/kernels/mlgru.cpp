// SPDX-License-Identifier: Apache-2.0
// mlgru's recurrence and its backward, over whole rows one time step after another: each tensor is then one
// stream through memory, and what a step takes from the one before is in the first-level cache. Compiled
// without contraction to fused multiply-adds, so that every level has the same bits.
#include "ops/kernels/families.h"
#include "ops/kernels/vec.h"

namespace flashlm::kernels::FLASHLM_ISA {
namespace {

/// 1 / (1 + e^-x) and 1 minus that, each right to a few roundings of itself however far x is from 0.
template <class T>
struct Sigmoid {
  Vec<T> open, shut;

  explicit Sigmoid(Vec<T> x) {
    // In double vec_exp can overflow; the last argument whose exponential is far from that.
    const Vec<T> e = vec_exp(sizeof(T) == sizeof(float) ? -x : vec_min<T>(broadcast(T(700)), -x));
    open = T(1) / (T(1) + e);
    shut = e * open;
  }
};

/// f, 1 - f and c of one vector, and what their derivatives need.
template <class T, bool kSilu>
struct Gates;

template <class T>
struct Gates<T, false> {
  Vec<T> f, shut, c;

  Gates(const MlgruRows<T>& x, int64_t row, int64_t i, int64_t n)
      : f(load_up_to(x.f + row + i, n)), shut(T(1) - f), c(load_up_to(x.c + row + i, n)) {}
};

template <class T>
struct Gates<T, true> {
  Sigmoid<T> gate, swish;
  Vec<T> range, f, shut, c;

  Gates(const MlgruRows<T>& x, int64_t row, int64_t i, int64_t n)
      : gate(load_up_to(x.f + row + i, n)), swish(load_up_to(x.c + row + i, n)) {
    const Vec<T> bound = load_up_to(x.lower_bound + i, n);
    range = T(1) - bound;
    f = bound + range * gate.open;
    shut = range * gate.shut;
    c = load_up_to(x.c + row + i, n) * swish.open;
  }
};

template <class T, bool kSilu>
void forward(const MlgruRows<T>& x, const T* before, T* h) {
  for (int64_t t = 0; t < x.rows; ++t, before = h, h += x.row) {
    for (int64_t i = 0; i < x.width; i += kLanes<T>) {
      const int64_t n = x.width - i;
      const Gates<T, kSilu> g(x, t * x.row, i, n);
      store_up_to<T>(h + i, g.f * load_up_to(before + i, n) + g.shut * g.c, n);
    }
  }
}

template <class T, bool kSilu>
void forward_end(const MlgruRows<T>& x, T* product, T* end) {
  for (int64_t t = 0; t < x.rows; ++t) {
    for (int64_t i = 0; i < x.width; i += kLanes<T>) {
      const int64_t n = x.width - i;
      const Gates<T, kSilu> g(x, t * x.row, i, n);
      store_up_to<T>(product + i, g.f * load_up_to(product + i, n), n);
      store_up_to<T>(end + i, g.f * load_up_to(end + i, n) + g.shut * g.c, n);
    }
  }
}

// With delta = grad_h + carry, the gradient of h_t from all that comes after:
//   df = delta (h_{t-1} - c),  dc = delta (1 - f),  carry = delta f.
template <class T, bool kSilu>
void backward(const MlgruRows<T>& x, const T* before, const T* h, const T* grad_h, T* carry, T* grad_f,
              T* grad_c, T* grad_lower_bound) {
  for (int64_t t = x.rows - 1; t >= 0; --t) {
    const int64_t row = t * x.row;
    const T* previous = t == 0 ? before : h + row - x.row;
    for (int64_t i = (x.width - 1) / kLanes<T> * kLanes<T>; i >= 0; i -= kLanes<T>) {
      const int64_t n = x.width - i;
      const Gates<T, kSilu> g(x, row, i, n);
      const Vec<T> delta = load_up_to(grad_h + row + i, n) + load_up_to(carry + i, n);
      const Vec<T> df = delta * (load_up_to(previous + i, n) - g.c), dc = delta * g.shut;
      store_up_to<T>(carry + i, delta * g.f, n);
      if constexpr (kSilu) {
        store_up_to<T>(grad_f + row + i, df * g.shut * g.gate.open, n);
        store_up_to<T>(grad_c + row + i, dc * (g.swish.open + g.c * g.swish.shut), n);
        store_up_to<T>(grad_lower_bound + i, load_up_to(grad_lower_bound + i, n) + df * g.gate.shut, n);
      } else {
        store_up_to<T>(grad_f + row + i, df, n);
        store_up_to<T>(grad_c + row + i, dc, n);
      }
    }
  }
}

template <class T, bool kSilu>
void backward_end(const MlgruRows<T>& x, const T* grad_h, T* product, T* carry) {
  for (int64_t t = x.rows - 1; t >= 0; --t) {
    for (int64_t i = 0; i < x.width; i += kLanes<T>) {
      const int64_t n = x.width - i;
      const Gates<T, kSilu> g(x, t * x.row, i, n);
      store_up_to<T>(product + i, g.f * load_up_to(product + i, n), n);
      const Vec<T> delta = load_up_to(grad_h + t * x.row + i, n) + load_up_to(carry + i, n);
      store_up_to<T>(carry + i, delta * g.f, n);
    }
  }
}

// ---- with and without activations ----

template <class T>
void mlgru(const MlgruRows<T>& x, const T* before, T* h) {
  x.lower_bound == nullptr ? forward<T, false>(x, before, h) : forward<T, true>(x, before, h);
}

template <class T>
void mlgru_end(const MlgruRows<T>& x, T* product, T* end) {
  x.lower_bound == nullptr ? forward_end<T, false>(x, product, end) : forward_end<T, true>(x, product, end);
}

template <class T>
void mlgru_backward(const MlgruRows<T>& x, const T* before, const T* h, const T* grad_h, T* carry, T* grad_f,
                    T* grad_c, T* grad_lower_bound) {
  const auto run = x.lower_bound == nullptr ? backward<T, false> : backward<T, true>;
  run(x, before, h, grad_h, carry, grad_f, grad_c, grad_lower_bound);
}

template <class T>
void mlgru_backward_end(const MlgruRows<T>& x, const T* grad_h, T* product, T* carry) {
  const auto run = x.lower_bound == nullptr ? backward_end<T, false> : backward_end<T, true>;
  run(x, grad_h, product, carry);
}

}  // namespace

template <class T>
void add_mlgru(Table<T>& table) {
  table.mlgru = mlgru<T>;
  table.mlgru_end = mlgru_end<T>;
  table.mlgru_backward = mlgru_backward<T>;
  table.mlgru_backward_end = mlgru_backward_end<T>;
}
template void add_mlgru(Table<float>&);
template void add_mlgru(Table<double>&);

}  // namespace flashlm::kernels::FLASHLM_ISA

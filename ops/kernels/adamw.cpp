// SPDX-License-Identifier: Apache-2.0
// AdamW on one row, and what a row is owed for the steps in which it was left alone. Compiled without
// contraction to fused multiply-adds: every operation is then rounded as IEEE 754 says, and all levels give
// the bits of the plain loop. The pass is bound by memory, which the additional instructions do not touch.
#include "ops/kernels/families.h"
#include "ops/kernels/vec.h"

namespace flashlm::kernels::FLASHLM_ISA {
namespace {

template <class T>
void adamw(int64_t n, const AdamWStep<T>& step, const T* g, T* w, T* m, T* v) {
  // By value: a store to w, m or v could otherwise change the constants.
  const auto [keep, beta1, beta2, rate, root, eps] = step;
  const T fresh1 = 1 - beta1, fresh2 = 1 - beta2;
  for (int64_t i = 0; i < n; ++i) {
    const T next_m = beta1 * m[i] + fresh1 * g[i], next_v = beta2 * v[i] + fresh2 * g[i] * g[i];
    w[i] = keep * w[i] - rate * next_m / (square_root(next_v) * root + eps);
    m[i] = next_m;
    v[i] = next_v;
  }
}

template <class T>
void adamw_owed(int64_t n, const AdamWOwed<T>& owed, T* w, T* m, T* v) {
  const auto [keep, tail, beta1, beta2, eps] = owed;
  for (int64_t i = 0; i < n; ++i) {
    w[i] = keep * w[i] - tail * m[i] / (square_root(v[i]) + eps);
    m[i] = beta1 * m[i];
    v[i] = beta2 * v[i];
  }
}

template <class T>
bool all_zero(int64_t n, const T* x) {
  // A lane is -1 once it has met a value other than 0; NaN is one.
  auto met = Vec<T>{} != Vec<T>{};
  int64_t i = 0;
  for (; i + kLanes<T> <= n; i += kLanes<T>) met |= load(x + i) != Vec<T>{};
  met |= load_first(x + i, n - i) != Vec<T>{};
  bool zero = true;
  for (int64_t lane = 0; lane < kLanes<T>; ++lane) zero = zero && met[lane] == 0;
  return zero;
}

}  // namespace

template <class T>
void add_adamw(Table<T>& table) {
  table.adamw = adamw<T>;
  table.adamw_owed = adamw_owed<T>;
  table.all_zero = all_zero<T>;
}
template void add_adamw(Table<float>&);
template void add_adamw(Table<double>&);

}  // namespace flashlm::kernels::FLASHLM_ISA

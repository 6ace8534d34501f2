// SPDX-License-Identifier: Apache-2.0
// Softmax over a vocabulary that is seen block by block: the running log-sum-exp of each row, and the
// gradient of a block of logits once that sum is known.
#include "ops/kernels/families.h"
#include "ops/kernels/vec.h"

namespace flashlm::kernels::FLASHLM_ISA {
namespace {

/// The sum of e^(z - max) over one row.
template <class T>
T sum_of_exp(int64_t cols, const T* z, T max) {
  Vec<T> sum = {};
  int64_t i = 0;
  for (; i + kLanes<T> <= cols; i += kLanes<T>) sum += vec_exp(load(z + i) - max);
  T total = reduce_add<T>(sum);
  if (i == cols) return total;
  const Vec<T> last = vec_exp(load_first(z + i, cols - i) - max);
  for (int64_t lane = 0; lane < cols - i; ++lane) total += last[lane];
  return total;
}

// When a block raises the maximum, what was summed before shrinks by e^(old maximum - new maximum).
template <class T>
void cross_entropy(int64_t rows, int64_t cols, const T* z, int64_t z_row, T* max, T* sum_exp, T* sum_z) {
  for (int64_t r = 0; r < rows; ++r, z += z_row) {
    Vec<T> highest = broadcast(max[r]), sum = {};
    int64_t i = 0;
    for (; i + kLanes<T> <= cols; i += kLanes<T>) {
      const Vec<T> v = load(z + i);
      highest = vec_max<T>(v, highest);
      sum += v;
    }
    T new_max = reduce_max<T>(highest), total = reduce_add<T>(sum);
    for (; i < cols; ++i) {
      new_max = z[i] > new_max ? z[i] : new_max;
      total += z[i];
    }
    const T shrink = vec_exp(broadcast(max[r] - new_max))[0];
    sum_exp[r] = sum_exp[r] * shrink + sum_of_exp(cols, z, new_max);
    sum_z[r] += total;
    max[r] = new_max;
  }
}

template <class T>
void cross_entropy_backward(int64_t rows, int64_t cols, T* z, int64_t z_row, const T* lse, const T* factor,
                            const T* shift) {
  for (int64_t r = 0; r < rows; ++r, z += z_row) {
    int64_t i = 0;
    for (; i + kLanes<T> <= cols; i += kLanes<T>) {
      store(z + i, factor[r] * vec_exp(load(z + i) - lse[r]) - shift[r]);
    }
    const int64_t rest = cols - i;
    store_first(z + i, factor[r] * vec_exp(load_first(z + i, rest) - lse[r]) - shift[r], rest);
  }
}

}  // namespace

template <class T>
void add_cross_entropy(Table<T>& table) {
  table.cross_entropy = cross_entropy<T>;
  table.cross_entropy_backward = cross_entropy_backward<T>;
}
template void add_cross_entropy(Table<float>&);
template void add_cross_entropy(Table<double>&);

}  // namespace flashlm::kernels::FLASHLM_ISA

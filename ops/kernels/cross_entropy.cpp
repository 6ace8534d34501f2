// SPDX-License-Identifier: Apache-2.0
// Softmax over a vocabulary that is seen block by block: the running log-sum-exp of each row, and the
// gradient of a block of logits once that sum is known.
#include "ops/kernels/families.h"
#include "ops/kernels/vec.h"

namespace flashlm::kernels::FLASHLM_ISA {
namespace {

/// The sum of e^(z - max) over one row; keep(i, e, n) gets n <= kLanes of them at a time, of columns i on.
template <class T, class Keep>
T sum_of_exp(int64_t cols, const T* z, T max, const Keep& keep) {
  Vec<T> sum = {};
  int64_t i = 0;
  for (; i + kLanes<T> <= cols; i += kLanes<T>) {
    const Vec<T> e = vec_exp(load(z + i) - max);
    sum += e;
    keep(i, e, kLanes<T>);
  }
  T total = reduce_add<T>(sum);
  if (i == cols) return total;
  const Vec<T> last = vec_exp(load_first(z + i, cols - i) - max);
  keep(i, last, cols - i);
  for (int64_t lane = 0; lane < cols - i; ++lane) total += last[lane];
  return total;
}

// When a block raises the maximum, what was summed before shrinks by e^(old maximum - new maximum).
// keep(r, i, e, n) gets what sum_of_exp hands over of row r.
template <class T, class Keep>
void add_block(int64_t rows, int64_t cols, const T* z, int64_t z_row, T* max, T* sum_exp, T* sum_z,
               const Keep& keep) {
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
    const T sum_of_block =
        sum_of_exp(cols, z, new_max, [&](int64_t at, Vec<T> e, int64_t n) { keep(r, at, e, n); });
    sum_exp[r] = sum_exp[r] * shrink + sum_of_block;
    sum_z[r] += total;
    max[r] = new_max;
  }
}

template <class T>
void cross_entropy(int64_t rows, int64_t cols, const T* z, int64_t z_row, T* max, T* sum_exp, T* sum_z) {
  add_block(rows, cols, z, z_row, max, sum_exp, sum_z, [](int64_t, int64_t, Vec<T>, int64_t) {});
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

#if defined(__AVX512BF16__)
void cross_entropy_bf16(int64_t rows, int64_t cols, const float* z, int64_t z_row, float* max, float* sum_exp,
                        float* sum_z, uint16_t* kept, int64_t kept_row) {
  add_block(rows, cols, z, z_row, max, sum_exp, sum_z, [&](int64_t r, int64_t i, Vec<float> e, int64_t n) {
    store_bf16(kept + r * kept_row + i, e, n);
  });
}

void cross_entropy_bf16_backward(int64_t rows, int64_t cols, const uint16_t* kept, int64_t kept_row,
                                 const float* max, const float* lse, const float* factor, const float* shift,
                                 float* grad_z, int64_t z_row) {
  for (int64_t r = 0; r < rows; ++r, kept += kept_row, grad_z += z_row) {
    const float scale = factor[r] * vec_exp(broadcast(max[r] - lse[r]))[0];
    for (int64_t i = 0; i < cols; i += kLanes<float>) {
      store_up_to<float>(grad_z + i, scale * load_bf16(kept + i, cols - i) - shift[r], cols - i);
    }
  }
}
#endif

}  // namespace

template <class T>
void add_cross_entropy(Table<T>& table) {
  table.cross_entropy = cross_entropy<T>;
  table.cross_entropy_backward = cross_entropy_backward<T>;
#if defined(__AVX512BF16__)
  if constexpr (sizeof(T) == sizeof(float)) {
    table.cross_entropy_bf16 = cross_entropy_bf16;
    table.cross_entropy_bf16_backward = cross_entropy_bf16_backward;
  }
#endif
}
template void add_cross_entropy(Table<float>&);
template void add_cross_entropy(Table<double>&);

}  // namespace flashlm::kernels::FLASHLM_ISA

// SPDX-License-Identifier: Apache-2.0
// The products C = A·B of the losses, single-threaded and in either precision: PlainProducts on T throughout,
// Bfloat16Products on operands rounded to bfloat16 with float32 sums. Both operands are made once, B packed,
// and then multiplied as often as there is a C. Private to the operators.
#pragma once

#include "ops/common.h"

namespace flashlm {

/// Of T throughout. A is read where it lies.
template <class T>
struct PlainProducts {
  using Value = T;
  using Packed = T;
  struct Left {
    const T* first;
    int64_t row, column;
  };

  static const kernels::Table<T>& table() { return kernels::table<T>(); }
  static int64_t left_size(int64_t /*m*/, int64_t /*depth*/) { return 0; }
  static int64_t right_size(int64_t depth, int64_t n) { return depth * round_up(n, table().gemm_panel); }

  /// A (m, depth) from row-major a, or from row-major Aᵀ.
  static Left left(int64_t /*m*/, int64_t /*depth*/, const T* a, int64_t a_row, T*) { return {a, a_row, 1}; }
  static Left left_transposed(int64_t /*m*/, int64_t /*depth*/, const T* a, int64_t a_row, T*) {
    return {a, 1, a_row};
  }
  /// B (depth, n) from row-major b, or from row-major Bᵀ.
  static void right(int64_t depth, int64_t n, const T* b, T* packed) {
    table().gemm_pack(depth, n, b, n, 1, packed);
  }
  static void right_transposed(int64_t depth, int64_t n, const T* b, T* packed) {
    table().gemm_pack(depth, n, b, 1, depth, packed);
  }
  static void multiply(int64_t m, int64_t n, int64_t depth, Left a, const T* packed, T* c, int64_t c_row,
                       bool accumulate) {
    table().gemm(m, n, depth, a.first, a.row, a.column, packed, c, c_row, accumulate);
  }
};

/// Of operands rounded to bfloat16, with float32 sums.
struct Bfloat16Products {
  using Value = float;
  using Packed = int32_t;
  using Left = kernels::PairRows;

  static const kernels::Table<float>& table() { return kernels::table<float>(); }
  static int64_t left_size(int64_t m, int64_t depth) { return right_size(depth, m); }
  static int64_t right_size(int64_t depth, int64_t n) {
    return (depth + 1) / 2 * round_up(n, table().bf16_panel);
  }

  static Left left(int64_t m, int64_t depth, const float* a, int64_t a_row, int32_t* memory) {
    const int64_t pairs = (depth + 1) / 2;
    table().bf16_pack_rows(m, depth, a, a_row, memory);
    return {memory, pairs, 1, table().bf16_panel * pairs};
  }
  static Left left_transposed(int64_t m, int64_t depth, const float* a, int64_t a_row, int32_t* memory) {
    const int64_t panel = table().bf16_panel;
    table().bf16_pack(depth, m, a, a_row, /*factor=*/nullptr, memory);
    return {memory, 1, panel, panel * ((depth + 1) / 2)};
  }
  static void right(int64_t depth, int64_t n, const float* b, int32_t* packed) {
    table().bf16_pack(depth, n, b, n, /*factor=*/nullptr, packed);
  }
  static void right_transposed(int64_t depth, int64_t n, const float* b, int32_t* packed) {
    table().bf16_pack_columns(depth, n, b, depth, packed);
  }
  static void multiply(int64_t m, int64_t n, int64_t depth, Left a, const int32_t* packed, float* c,
                       int64_t c_row, bool accumulate) {
    table().gemm_bf16(m, n, depth, a, packed, /*alpha=*/1, c, c_row, accumulate);
  }
};

/// body(products) for h's dtype and the precision asked for, as far as this CPU has it.
template <class Body>
void dispatch_products(const at::Tensor& h, c10::string_view precision, const Body& body) {
  if (compute_dtype(h) == at::kDouble) {
    body(PlainProducts<double>());
  } else if (precision == "bfloat16" && kernels::table<float>().bf16_panel > 0) {
    body(Bfloat16Products());
  } else {
    body(PlainProducts<float>());
  }
}

}  // namespace flashlm

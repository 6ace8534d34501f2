// SPDX-License-Identifier: Apache-2.0
// One level's tables, filled by the kernel sources compiled for the same level.
#include "ops/kernels/families.h"

namespace flashlm::kernels::FLASHLM_ISA {

template <class T>
static Table<T> make_table() {
  Table<T> table{};
  add_adamw(table);
  add_bf16x3(table);
  add_bit_linear(table);
  add_causal_conv1d(table);
  add_cross_entropy(table);
  add_gated_conv(table);
  add_gemm(table);
  add_gemm_bf16(table);
  add_gemm_int8(table);
  add_glu(table);
  add_mlgru(table);
  add_packed_linear(table);
  add_rms_norm(table);
  add_rows(table);
  add_sum_table(table);
  return table;
}

const Table<float>& float_table() {
  static const Table<float> table = make_table<float>();
  return table;
}

const Table<double>& double_table() {
  static const Table<double> table = make_table<double>();
  return table;
}

}  // namespace flashlm::kernels::FLASHLM_ISA

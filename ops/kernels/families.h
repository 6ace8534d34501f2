// SPDX-License-Identifier: Apache-2.0
// What each kernel source gives to its level's table. FLASHLM_ISA is the level being compiled.
#pragma once

#include "ops/kernels/kernels.h"

namespace flashlm::kernels::FLASHLM_ISA {

template <class T>
void add_adamw(Table<T>& table);
template <class T>
void add_bf16x3(Table<T>& table);
template <class T>
void add_bit_linear(Table<T>& table);
template <class T>
void add_causal_conv1d(Table<T>& table);
template <class T>
void add_cross_entropy(Table<T>& table);
template <class T>
void add_gated_conv(Table<T>& table);
template <class T>
void add_gemm(Table<T>& table);
template <class T>
void add_gemm_bf16(Table<T>& table);
template <class T>
void add_gemm_int8(Table<T>& table);
template <class T>
void add_glu(Table<T>& table);
template <class T>
void add_mlgru(Table<T>& table);
template <class T>
void add_packed_linear(Table<T>& table);
template <class T>
void add_rms_norm(Table<T>& table);
template <class T>
void add_rows(Table<T>& table);
template <class T>
void add_sum_table(Table<T>& table);

}  // namespace flashlm::kernels::FLASHLM_ISA

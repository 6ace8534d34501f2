// SPDX-License-Identifier: Apache-2.0
// A weight matrix as the ternary products read it: its scale, and its codes packed for one kernel or another.
// Made once for as long as the weights keep their values, however many passes and micro-batches multiply by
// them. Not installed.
#pragma once

#include <array>
#include <memory>
#include <mutex>

#include "ops/common.h"

namespace flashlm {

/// The rule behind both quantizers: Q = 1 above bound, -1 below -bound, else 0. For absmean, round(w / gamma)
/// is not 0 just where |w| > gamma / 2 (a tie rounds to 0), in floating point too.
template <class T>
struct TernaryScale {
  T gamma;
  T bound;
};

template <class T>
TernaryScale<T> ternary_scale(const at::Tensor& weight, kernels::Quantizer quantizer);

/// Ways to lay out Q (N, K) for a product over K, or its transpose for a product over N.
enum class TernaryLayout {
  kInt8,             // for ternary_gemm
  kFloat,            // gamma Q for gemm, over K
  kFloatTransposed,  // gamma Q for gemm, over N
  kBf16Transposed,   // Q for gemm_bf16, over N
  kCount
};

/// T is what the kernels compute in, float or double.
template <class T>
class TernaryWeights {
 public:
  TernaryWeights(const at::Tensor& weight, kernels::Quantizer quantizer);

  /// Q's scale, NaN if a weight is not finite.
  T gamma() const { return scale_.gamma; }

  /// Packed at the first call; `weight` is the one that the object was made of, unchanged.
  const at::Tensor& packed(TernaryLayout layout, const at::Tensor& weight);

 private:
  TernaryScale<T> scale_;
  std::mutex mutex_;
  std::array<at::Tensor, static_cast<size_t>(TernaryLayout::kCount)> layouts_;
};

/// Those of weight (N, K), kept from the last call if nothing has changed since: the same storage, place and
/// shape, the same version counter, and the same fingerprint of the values. The version alone would not do:
/// writing through `weight.data`, a detached alias or at::_fused_adamw_ leaves it as it was. Entries end with
/// their storage.
template <class T>
std::shared_ptr<TernaryWeights<T>> ternary_weights(const at::Tensor& weight, kernels::Quantizer quantizer);

}  // namespace flashlm

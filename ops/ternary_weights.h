// SPDX-License-Identifier: Apache-2.0
// What the operators on ternary weights share: their modes by name; a weight matrix as the products read it,
// made once for as long as the weights keep their values, however many passes and micro-batches multiply by
// them; and the checks of weights that are packed for inference. Not installed.
#pragma once

#include <array>
#include <memory>
#include <mutex>
#include <string_view>

#include "ops/common.h"

namespace flashlm {

inline kernels::Quantizer parse_quantizer(const char* op, std::string_view name) {
  TORCH_CHECK(name == "absmean" || name == "threshold", op,
              ": quantizer must be 'absmean' or 'threshold', got '", name, "'");
  return name == "absmean" ? kernels::Quantizer::kAbsmean : kernels::Quantizer::kThreshold;
}

/// Whether activations are quantized.
inline bool parse_activation(const char* op, std::string_view name) {
  TORCH_CHECK(name == "int8" || name == "none", op, ": activation must be 'int8' or 'none', got '", name,
              "'");
  return name == "int8";
}

/// The least max|row| that the scale of int8 rows is made for; see bit_linear.h.
constexpr double kSmallestActivation = 1e-5;

// ---- weights in training ----

/// The rule behind both quantizers: Q = 1 above bound, -1 below -bound, else 0. For absmean, round(w / gamma)
/// is not 0 just where |w| > gamma / 2 (a tie rounds to 0), in floating point too.
template <class T>
struct TernaryScale {
  T gamma;
  T bound;
};

/// Of a weight that is contiguous and of type T.
template <class T>
TernaryScale<T> ternary_scale(const at::Tensor& weight, kernels::Quantizer quantizer);

/// Ways to lay out Q (N, K) for a product over K, or its transpose for a product over N.
enum class TernaryLayout {
  kInt8,             // for ternary_gemm, over K
  kInt8Transposed,   // for ternary_gemm, over N
  kFloat,            // for ternary_float_gemm, and sum_table_gemm_int8, over K
  kFloatTransposed,  // for ternary_float_gemm, over N
  kBf16Transposed,   // for gemm_bf16, over N
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
  const void* packed(TernaryLayout layout, const at::Tensor& weight);

 private:
  TernaryScale<T> scale_;
  std::mutex mutex_;
  std::array<Scratch<uint8_t>, static_cast<size_t>(TernaryLayout::kCount)> layouts_;
};

/// Those of weight (N, K), kept from the last call if nothing has changed since: the same storage, place and
/// shape, the same version counter, and the same fingerprint of the values. The version alone would not do:
/// writing through `weight.data`, a detached alias or at::_fused_adamw_ leaves it as it was. Entries end with
/// their storage.
template <class T>
std::shared_ptr<TernaryWeights<T>> ternary_weights(const at::Tensor& weight, kernels::Quantizer quantizer);

// ---- packed weights: docs/formats.md ----

inline c10::SymInt packed_panels(const c10::SymInt& out) {
  return (out + (kernels::kPackedOutputs - 1)) / kernels::kPackedOutputs;
}
inline c10::SymInt packed_lines(const c10::SymInt& in) { return (in + 3) / 4; }

/// packed and scale must be pack_ternary's of a weight (out, in).
inline void check_packed(const char* op, const at::Tensor& packed, const at::Tensor& scale,
                         const c10::SymInt& out, const c10::SymInt& in) {
  TORCH_CHECK(packed.scalar_type() == at::kByte, op, ": packed must be uint8, got ", packed.scalar_type());
  check_dim(op, "packed", packed, 3);
  check_floating(op, "scale", scale);
  check_dim(op, "scale", scale, 0);
  TORCH_SYM_CHECK(out.sym_ge(0), op, ": out_features must be >= 0, got ", out);
  TORCH_SYM_CHECK(in.sym_ge(1), op, ": in_features must be at least 1, got ", in);
  check_size(op, "packed's first size, ceil(out_features / 64),", packed.sym_size(0), packed_panels(out));
  check_size(op, "packed's second size, ceil(in_features / 4),", packed.sym_size(1), packed_lines(in));
  check_size(op, "packed's last size", packed.sym_size(2), kernels::kPackedOutputs);
}

}  // namespace flashlm

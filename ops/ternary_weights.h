// SPDX-License-Identifier: Apache-2.0
// What the operators on ternary weights share: their modes by name, the scale of a weight, and the checks of
// packed ones. Not installed.
#pragma once

#include <cmath>
#include <limits>
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

/// The rule behind both quantizers: Q = 1 above bound, -1 below -bound, else 0. For absmean, round(w / gamma)
/// is not 0 just where |w| > gamma / 2 (a tie rounds to 0), in floating point too.
template <class T>
struct TernaryScale {
  T gamma;
  T bound;
};

/// Of a weight that is contiguous and of type T.
template <class T>
TernaryScale<T> ternary_scale(const at::Tensor& weight, kernels::Quantizer quantizer) {
  const T* w = weight.const_data_ptr<T>();
  double sum = 0;
  sum_over_rows(weight.numel(), 1, &sum, [&](int64_t begin, int64_t end, double* partial) {
    *partial += kernels::table<T>().abs_sum(end - begin, w + begin);
  });
  const T mean = static_cast<T>(sum / static_cast<double>(weight.numel()));
  // No weight is above a bound of NaN: without this, one broken weight would silence the layer.
  if (!std::isfinite(mean)) return {std::numeric_limits<T>::quiet_NaN(), mean};
  if (quantizer == kernels::Quantizer::kThreshold) return {T(1), mean};
  const T gamma = std::max(mean, T(1e-5));
  return {gamma, gamma / 2};
}

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

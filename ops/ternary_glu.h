// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>
#include <string_view>

namespace flashlm {

/// A residual layer of three ternary matrices, the feed-forward half of a block:
///   h = glu(bit_linear(x, gate_weight, norm_scale), bit_linear(x, up_weight, up_norm_scale)),
///   y = x + bit_linear(h, down_weight, down_norm_scale),
/// a gated linear unit (Shazeer 2020, arXiv 2002.05202) in one pass. y has the bits of the operators above,
/// one after the other; but what is normed, gate, up and h, which are several times as large as x, exist for
/// a few rows at a time only.
///
///   x                (..., D)  float32, bfloat16 or float64, any strides; D >= 1
///   gate_weight      (H, D)    same dtype; up_weight alike
///   down_weight      (D, H)    same dtype; H >= 1
///   norm_scale       (D)       same dtype; of the RMSNorm of gate_weight's rows, and of up_weight's where
///                              those have no up_norm_scale
///   up_norm_scale    (D)       same dtype
///   down_norm_scale  (H)       same dtype
///   returns          (..., D)  same dtype, contiguous; differentiable in all tensors
///
/// nonlinearity names glu: "relu2" is relu2_glu, "silu" silu_glu, "sigmoid" sigmoid_glu; see ops/glu.h.
/// FlashLM v3's blocks have "relu2" and one norm, those of the MatMul-free LM (arXiv 2406.02528) "silu" and
/// a norm for each matrix. quantizer, activation and gradient are bit_linear's, for all three matrices, and
/// eps that of every norm; see ops/bit_linear.h. For backward the arguments are kept, and gate and up: as
/// they are with gradient "float32" and in float64, else rounded to bfloat16, 4 H bytes a row; a gradient's
/// error by that is 2e-3 of its norm. bfloat16 tensors are computed in float32 from x to y.
///
/// Errors: those of bit_linear, and an unknown nonlinearity.
///
/// Schema: flashlm::ternary_glu(Tensor x, Tensor gate_weight, Tensor up_weight, Tensor down_weight,
///         Tensor? norm_scale=None, Tensor? up_norm_scale=None, Tensor? down_norm_scale=None, *,
///         str nonlinearity="relu2", str quantizer="absmean", str activation="int8", float eps=1e-6,
///         str gradient="float32") -> Tensor
at::Tensor ternary_glu(const at::Tensor& x, const at::Tensor& gate_weight, const at::Tensor& up_weight,
                       const at::Tensor& down_weight,
                       const std::optional<at::Tensor>& norm_scale = std::nullopt,
                       const std::optional<at::Tensor>& up_norm_scale = std::nullopt,
                       const std::optional<at::Tensor>& down_norm_scale = std::nullopt,
                       std::string_view nonlinearity = "relu2", std::string_view quantizer = "absmean",
                       std::string_view activation = "int8", double eps = 1e-6,
                       std::string_view gradient = "float32");

}  // namespace flashlm

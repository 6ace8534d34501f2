// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>
#include <string_view>

namespace flashlm {

/// A residual layer of three ternary matrices, FlashLM's feed-forward half of a block:
///   n = rms_norm(x, norm_scale, eps) if there is a norm_scale, else x,
///   h = relu2_glu(bit_linear(n, gate_weight), bit_linear(n, up_weight)),
///   y = x + bit_linear(h, down_weight),
/// a gated linear unit (Shazeer 2020, arXiv 2002.05202) with the squared ReLU (So et al. 2021, arXiv
/// 2109.08668). y has the bits of the operators above, one after the other; but n, gate, up and h, which are
/// several times as large as x, exist for a few rows at a time only.
///
///   x            (..., D)  float32, bfloat16 or float64, any strides; D >= 1
///   gate_weight  (H, D)    same dtype; up_weight alike
///   down_weight  (D, H)    same dtype; H >= 1
///   norm_scale   (D)       same dtype
///   returns      (..., D)  same dtype, contiguous; differentiable in all tensors
///
/// quantizer, activation and gradient are bit_linear's, for all three matrices; see ops/bit_linear.h. For
/// backward the arguments are kept, and gate and up: as they are with gradient "float32" and in float64, else
/// rounded to bfloat16, 4 H bytes a row; a gradient's error by that is 2e-3 of its norm. bfloat16 tensors are
/// computed in float32 from x to y.
///
/// Errors: those of bit_linear and relu2_glu.
///
/// Schema: flashlm::ternary_glu(Tensor x, Tensor gate_weight, Tensor up_weight, Tensor down_weight,
///         Tensor? norm_scale=None, *, str quantizer="absmean", str activation="int8", float eps=1e-6,
///         str gradient="float32") -> Tensor
at::Tensor ternary_glu(const at::Tensor& x, const at::Tensor& gate_weight, const at::Tensor& up_weight,
                       const at::Tensor& down_weight,
                       const std::optional<at::Tensor>& norm_scale = std::nullopt,
                       std::string_view quantizer = "absmean", std::string_view activation = "int8",
                       double eps = 1e-6, std::string_view gradient = "float32");

}  // namespace flashlm

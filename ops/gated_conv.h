// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>
#include <string_view>

namespace flashlm {

/// A residual layer of two causal convolutions of the normalised input, one gating the other:
///   h = rms_norm(x, norm_scale, eps),
///   y = x + sigmoid(causal_conv1d(h, gate_weight)) · causal_conv1d(h, value_weight).
/// A gated linear unit of convolutions (Dauphin et al. 2017, arXiv 1612.08083), dilated as WaveNet's (van den
/// Oord et al. 2016, arXiv 1609.03499).
///
///   x            (B, T, D)               float32, bfloat16 or float64, any strides
///   norm_scale   (D)                     same dtype
///   gate_weight  (D, D/groups, K)        same dtype; value_weight alike
///   history      (B, (K−1)·dilation, D)  same dtype; the rows of x (not of h) that precede it. With eps > 0,
///                                        zero rows are as good as none.
///   returns      (B, T, D)               same dtype, contiguous; differentiable in all tensors
///
/// A sequence fed in pieces, each with the rows before it as history, gives exactly the result of the whole.
/// Of dtype bfloat16, tensors are computed in float32. What is multiplied, with sums in float32, `precision`
/// says for y and `gradient` for the backward pass. A CPU without AVX512-BF16, and float64, take "float32":
///
///   precision   "float32"   h and the weights as they are.
///               "bfloat16"  Both rounded to bfloat16: the error of a convolution is about 2e-3 of its norm.
///   gradient    "float32"   Only the arguments are kept for backward, which computes the convolutions again,
///                           in float32.
///               "bfloat16"  dy/dgate and dy/dvalue, the slopes by the two convolutions, are kept in
///                           bfloat16, 4 D bytes a row, if a gradient will be needed. They, their products
///                           with the gradient of y, h and the weights are rounded to bfloat16: the error of
///                           a gradient is about 3e-3 of its norm.
///
/// Errors: those of causal_conv1d, norm_scale not of size D, eps < 0, an unknown precision or gradient.
/// Schema: flashlm::gated_conv(Tensor x, Tensor norm_scale, Tensor gate_weight, Tensor value_weight,
///         Tensor? history=None, *, int dilation=1, int groups=1, float eps=1e-6, str gradient="float32",
///         str precision="float32") -> Tensor
at::Tensor gated_conv(const at::Tensor& x, const at::Tensor& norm_scale, const at::Tensor& gate_weight,
                      const at::Tensor& value_weight, const std::optional<at::Tensor>& history = std::nullopt,
                      int64_t dilation = 1, int64_t groups = 1, double eps = 1e-6,
                      std::string_view gradient = "float32", std::string_view precision = "float32");

}  // namespace flashlm

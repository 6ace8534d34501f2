// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>

namespace flashlm {

/// Causal, dilated, grouped convolution over time, channels last. With o in group g, summed over the taps k
/// and the input channels c of g:
///   y[b, t, o] = Σ weight[o, c, k] · x[b, t − (K−1−k)·dilation, g·D/G + c],
/// where rows before the start are those of `history`, or zeros without it.
///
///   x        (B, T, D)               float32, bfloat16 or float64, any strides
///   weight   (D, D/groups, K)        same dtype; the layout of torch's Conv1d
///   history  (B, (K−1)·dilation, D)  same dtype; the rows that precede x
///   returns  (B, T, D)               same dtype, contiguous; differentiable in x, weight and history
///
/// A sequence fed in pieces, each with the rows before it as history, gives exactly the result of the whole.
/// bfloat16 is computed in float32. Errors: another dtype or shape, K < 1, dilation < 1, groups < 1 or not a
/// divisor of D.
/// Schema: flashlm::causal_conv1d(Tensor x, Tensor weight, Tensor? history=None, *, int dilation=1,
///         int groups=1) -> Tensor
at::Tensor causal_conv1d(const at::Tensor& x, const at::Tensor& weight,
                         const std::optional<at::Tensor>& history = std::nullopt, int64_t dilation = 1,
                         int64_t groups = 1);

}  // namespace flashlm

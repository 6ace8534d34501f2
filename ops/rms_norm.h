// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <ATen/core/Tensor.h>

namespace flashlm {

/// Root mean square normalisation (Zhang & Sennrich 2019, arXiv 1910.07467):
///   y = x / sqrt(mean(x²) + eps) · scale,  the mean over the last dimension.
///
///   x        (..., D)  float32, bfloat16 or float64, any strides
///   scale    (D)       same dtype
///   returns  (..., D)  same dtype, contiguous; differentiable in x and scale
///
/// bfloat16 is computed in float32. Errors: another dtype, x without a last dimension, scale not of size D.
/// Schema: flashlm::rms_norm(Tensor x, Tensor scale, float eps=1e-6) -> Tensor
at::Tensor rms_norm(const at::Tensor& x, const at::Tensor& scale, double eps = 1e-6);

}  // namespace flashlm

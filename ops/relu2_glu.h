// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <ATen/core/Tensor.h>

namespace flashlm {

/// Gated linear unit with a squared-ReLU gate (So et al. 2021, arXiv 2109.08668), elementwise:
///   y = max(gate, 0)² · up.
///
///   gate, up  (...)  float32, bfloat16 or float64, equal shapes (nothing is broadcast), any strides
///   returns   (...)  same dtype, contiguous; differentiable in both
///
/// bfloat16 is computed in float32. Errors: another dtype, shapes or dtypes that differ.
/// Schema: flashlm::relu2_glu(Tensor gate, Tensor up) -> Tensor
at::Tensor relu2_glu(const at::Tensor& gate, const at::Tensor& up);

}  // namespace flashlm

// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <ATen/core/Tensor.h>

namespace flashlm {

/// Gated linear units, elementwise: y = a(gate) · up, where the operator's name tells the activation a.
///
///   gate, up  (...)  float32, bfloat16 or float64, equal shapes (nothing is broadcast), any strides
///   returns   (...)  same dtype, contiguous; differentiable in both
///
/// For backward only the arguments are kept: a(gate) and its derivative are computed again. bfloat16 is
/// computed in float32. A NaN in gate or up is one in y and in the gradients that it enters. Errors: another
/// dtype, shapes or dtypes that differ.

/// a(x) = max(x, 0)², the squared ReLU (So et al. 2021, arXiv 2109.08668).
/// Schema: flashlm::relu2_glu(Tensor gate, Tensor up) -> Tensor
at::Tensor relu2_glu(const at::Tensor& gate, const at::Tensor& up);

/// a(x) = x · sigmoid(x), the unit called SwiGLU (Shazeer 2020, arXiv 2002.05202). a and its derivative have
/// their limits at ±infinity, where ATen's have NaN; see sigmoid_glu for how near.
/// Schema: flashlm::silu_glu(Tensor gate, Tensor up) -> Tensor
at::Tensor silu_glu(const at::Tensor& gate, const at::Tensor& up);

/// a(x) = sigmoid(x), the first of these units (Dauphin et al. 2016, arXiv 1612.08083). sigmoid(x) and
/// 1 − sigmoid(x) are right to a few roundings of themselves, but in float32 neither falls below 1e-38, nor
/// in float64 sigmoid(x) below 1e-304, however large |x| is.
/// Schema: flashlm::sigmoid_glu(Tensor gate, Tensor up) -> Tensor
at::Tensor sigmoid_glu(const at::Tensor& gate, const at::Tensor& up);

}  // namespace flashlm

// SPDX-License-Identifier: Apache-2.0
// Activation recomputation (Chen et al. 2016, arXiv 1604.06174).
#pragma once

#include <ATen/core/Tensor.h>

#include <functional>
#include <vector>

namespace flashlm {

/// body(x, extra), of which nothing is kept for the backward pass but its arguments: the pass calls body
/// again. The gradients are those of the body itself; where x is kept in bfloat16, those at the rounded x.
///
///   body         reads no other tensor that needs a gradient, and always gives the same
///   extra        a second argument; may be undefined
///   parameters   leaves that body reads; those that it does not use get no gradient
///   in_bfloat16  how x waits; else as it is
///
/// Not differentiable twice.
at::Tensor recompute(const std::function<at::Tensor(const at::Tensor&, const at::Tensor&)>& body,
                     const at::Tensor& x, const at::Tensor& extra, const std::vector<at::Tensor>& parameters,
                     bool in_bfloat16);

}  // namespace flashlm

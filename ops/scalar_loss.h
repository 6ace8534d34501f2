// SPDX-License-Identifier: Apache-2.0
// The backward pass of losses whose forward pass has computed the gradients already, for a loss that is a
// scalar and whose own gradient is 1. Private to the operators.
#pragma once

#include <ATen/TensorSubclassLikeUtils.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/csrc/autograd/custom_function.h>

#include <optional>

#include "ops/common.h"

namespace flashlm {

/// gradient times grad_loss, in h's dtype. Knows h, weight and bias because the gradient depends on them: a
/// derivative of it must find this operator in its way, which refuses.
inline at::Tensor scale_gradient(const at::Tensor& gradient, const at::Tensor& grad_loss, const at::Tensor& h,
                                 const at::Tensor& weight, const std::optional<at::Tensor>& bias) {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("flashlm::_scale_gradient", "")
                             .typed<decltype(scale_gradient)>();
  return op.call(gradient, grad_loss, h, weight, bias);
}

/// What backward returns for a forward of so many arguments, of which the first three are h, weight and bias.
/// saved: {grad_h, grad_weight, grad_bias, h, weight, bias}, undefined where there is none.
inline torch::autograd::variable_list scaled_gradients(torch::autograd::variable_list saved,
                                                       const at::Tensor& grad_loss, size_t arguments) {
  const at::Tensor h = saved[3], weight = saved[4];
  const std::optional<at::Tensor> bias = if_defined(saved[5]);
  // The usual case needs no copy. Neither tracing nor a derivative of this derivative may see the choice.
  const bool as_they_are =
      !at::GradMode::is_enabled() && !at::isTensorSubclassLike(grad_loss) && grad_loss.item<double>() == 1;
  saved.resize(3);
  for (at::Tensor& grad : saved) {
    if (!grad.defined()) continue;
    grad = as_they_are ? grad.to(h.scalar_type()) : scale_gradient(grad, grad_loss, h, weight, bias);
  }
  saved.resize(arguments);
  return saved;
}

}  // namespace flashlm

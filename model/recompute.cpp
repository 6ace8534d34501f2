// SPDX-License-Identifier: Apache-2.0
#include "model/recompute.h"

#include <torch/csrc/autograd/autograd.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/custom_class.h>

namespace flashlm {
namespace {

using Body = std::function<at::Tensor(const at::Tensor&, const at::Tensor&)>;

/// A body as an autograd context can keep it.
struct HeldBody : torch::CustomClassHolder {
  explicit HeldBody(Body b) : body(std::move(b)) {}
  Body body;
};

struct Recompute : torch::autograd::Function<Recompute> {
  /// `inputs`: x, extra if there is one, then the parameters.
  static at::Tensor forward(torch::autograd::AutogradContext* ctx, const c10::intrusive_ptr<HeldBody>& held,
                            bool in_bfloat16, bool has_extra, at::TensorList inputs) {
    ctx->saved_data["body"] = c10::IValue::make_capsule(held);
    ctx->saved_data["dtype"] = inputs[0].scalar_type();
    ctx->saved_data["has_extra"] = has_extra;
    auto saved = inputs.vec();
    if (in_bfloat16) saved[0] = saved[0].to(at::kBFloat16);
    ctx->save_for_backward(saved);
    return held->body(inputs[0], has_extra ? inputs[1] : at::Tensor());
  }

  static torch::autograd::variable_list backward(torch::autograd::AutogradContext* ctx,
                                                 const torch::autograd::variable_list& grads) {
    constexpr size_t kOtherArguments = 3;  // of forward, before the inputs
    auto inputs = ctx->get_saved_variables();
    const bool has_extra = ctx->saved_data["has_extra"].toBool();
    const size_t arguments = has_extra ? 2 : 1;
    const auto held = c10::static_intrusive_pointer_cast<HeldBody>(ctx->saved_data["body"].toCapsule());
    at::AutoGradMode with_grad(true);
    for (size_t i = 0; i < arguments; ++i) {
      inputs[i] = inputs[i].detach();
      if (i == 0) inputs[i] = inputs[i].to(ctx->saved_data["dtype"].toScalarType());
      inputs[i].requires_grad_(ctx->needs_input_grad(i));
    }
    const at::Tensor y = held->body(inputs[0], has_extra ? inputs[1] : at::Tensor());
    torch::autograd::variable_list wanted;
    std::vector<size_t> places;
    for (size_t i = 0; i < inputs.size(); ++i) {
      if (!inputs[i].requires_grad()) continue;
      wanted.push_back(inputs[i]);
      places.push_back(kOtherArguments + i);
    }
    const auto found = torch::autograd::grad({y}, wanted, {grads[0]}, /*retain_graph=*/std::nullopt,
                                             /*create_graph=*/false, /*allow_unused=*/true);
    torch::autograd::variable_list out(kOtherArguments + inputs.size());
    for (size_t i = 0; i < places.size(); ++i) out[places[i]] = found[i];
    return out;
  }
};

}  // namespace

at::Tensor recompute(const Body& body, const at::Tensor& x, const at::Tensor& extra,
                     const std::vector<at::Tensor>& parameters, bool in_bfloat16) {
  std::vector<at::Tensor> inputs = {x};
  if (extra.defined()) inputs.push_back(extra);
  inputs.insert(inputs.end(), parameters.begin(), parameters.end());
  return Recompute::apply(c10::make_intrusive<HeldBody>(body), in_bfloat16, extra.defined(),
                          at::TensorList(inputs));
}

}  // namespace flashlm

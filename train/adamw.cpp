// SPDX-License-Identifier: Apache-2.0
#include "train/adamw.h"

#include <ATen/ops/_fused_adamw.h>

namespace flashlm {
namespace {

void check_options(const FusedAdamWOptions& options) {
  const auto& o = options;
  TORCH_CHECK_VALUE(o.lr() >= 0, "FusedAdamW: lr must be >= 0, got ", o.lr());
  TORCH_CHECK_VALUE(o.beta1() >= 0 && o.beta1() < 1, "FusedAdamW: beta1 must be in [0, 1), got ", o.beta1());
  TORCH_CHECK_VALUE(o.beta2() >= 0 && o.beta2() < 1, "FusedAdamW: beta2 must be in [0, 1), got ", o.beta2());
  TORCH_CHECK_VALUE(o.eps() >= 0, "FusedAdamW: eps must be >= 0, got ", o.eps());
  TORCH_CHECK_VALUE(o.weight_decay() >= 0, "FusedAdamW: weight_decay must be >= 0, got ", o.weight_decay());
}

at::Tensor step_count() { return at::zeros({}, at::kFloat); }

}  // namespace

FusedAdamWOptions::FusedAdamWOptions(double lr) : lr_(lr) {}

double FusedAdamWOptions::get_lr() const { return lr(); }

void FusedAdamWOptions::set_lr(double new_lr) { lr(new_lr); }

void FusedAdamWOptions::serialize(torch::serialize::OutputArchive& archive) const {
  _TORCH_OPTIM_SERIALIZE_TORCH_ARG(lr);
  _TORCH_OPTIM_SERIALIZE_TORCH_ARG(beta1);
  _TORCH_OPTIM_SERIALIZE_TORCH_ARG(beta2);
  _TORCH_OPTIM_SERIALIZE_TORCH_ARG(eps);
  _TORCH_OPTIM_SERIALIZE_TORCH_ARG(weight_decay);
}

void FusedAdamWOptions::serialize(torch::serialize::InputArchive& archive) {
  _TORCH_OPTIM_DESERIALIZE_TORCH_ARG(double, lr);
  _TORCH_OPTIM_DESERIALIZE_TORCH_ARG(double, beta1);
  _TORCH_OPTIM_DESERIALIZE_TORCH_ARG(double, beta2);
  _TORCH_OPTIM_DESERIALIZE_TORCH_ARG(double, eps);
  _TORCH_OPTIM_DESERIALIZE_TORCH_ARG(double, weight_decay);
}

void FusedAdamWParamState::serialize(torch::serialize::OutputArchive& archive) const {
  _TORCH_OPTIM_SERIALIZE_TORCH_ARG(exp_avg);
  _TORCH_OPTIM_SERIALIZE_TORCH_ARG(exp_avg_sq);
  _TORCH_OPTIM_SERIALIZE_TORCH_ARG(step);
}

void FusedAdamWParamState::serialize(torch::serialize::InputArchive& archive) {
  _TORCH_OPTIM_DESERIALIZE_TORCH_ARG(at::Tensor, exp_avg);
  _TORCH_OPTIM_DESERIALIZE_TORCH_ARG(at::Tensor, exp_avg_sq);
  _TORCH_OPTIM_DESERIALIZE_TORCH_ARG(at::Tensor, step);
}

FusedAdamW::FusedAdamW(const std::vector<torch::optim::OptimizerParamGroup>& param_groups,
                       FusedAdamWOptions defaults)
    : NamedStateOptimizer(param_groups, std::make_unique<FusedAdamWOptions>(defaults)) {
  check_options(defaults);
  for (const auto& group : param_groups_) {
    check_options(static_cast<const FusedAdamWOptions&>(group.options()));
    for (const at::Tensor& param : group.params()) {
      TORCH_CHECK_VALUE(param.is_contiguous(),
                        "FusedAdamW: parameters must be contiguous, got one with sizes ", param.sizes(),
                        " and strides ", param.strides());
    }
  }
}

FusedAdamW::FusedAdamW(std::vector<at::Tensor> params, FusedAdamWOptions defaults)
    : FusedAdamW({torch::optim::OptimizerParamGroup(std::move(params))}, std::move(defaults)) {}

FusedAdamWParamState& FusedAdamW::state_for(const at::Tensor& param) {
  auto& slot = state_[param.unsafeGetTensorImpl()];
  if (!slot) {
    auto fresh = std::make_unique<FusedAdamWParamState>();
    fresh->exp_avg(at::zeros_like(param)).exp_avg_sq(at::zeros_like(param)).step(step_count());
    slot = std::move(fresh);
  }
  return static_cast<FusedAdamWParamState&>(*slot);
}

torch::Tensor FusedAdamW::step(LossClosure closure) {
  const torch::NoGradGuard no_grad;
  torch::Tensor loss;
  if (closure) {
    const at::AutoGradMode with_grad(true);
    loss = closure();
  }
  for (auto& group : param_groups_) {
    const auto& options = static_cast<const FusedAdamWOptions&>(group.options());
    std::vector<at::Tensor> params, grads, exp_avgs, exp_avg_sqs, steps;
    for (const at::Tensor& param : group.params()) {
      if (!param.grad().defined()) continue;
      TORCH_CHECK_VALUE(param.grad().layout() == at::kStrided, "FusedAdamW: gradients must be dense, got ",
                        param.grad().layout());
      FusedAdamWParamState& state = state_for(param);
      params.push_back(param);
      grads.push_back(param.grad().contiguous());  // the kernel walks all tensors by one index
      exp_avgs.push_back(state.exp_avg());
      exp_avg_sqs.push_back(state.exp_avg_sq());
      steps.push_back(state.step().add_(1));
    }
    if (params.empty()) continue;
    at::_fused_adamw_(params, grads, exp_avgs, exp_avg_sqs, /*max_exp_avg_sqs=*/{}, steps, options.lr(),
                      options.beta1(), options.beta2(), options.weight_decay(), options.eps(),
                      /*amsgrad=*/false, /*maximize=*/false);
    // The kernel forgets to: whoever keeps something computed from a weight must see that it changed.
    for (const at::Tensor& param : params) param.unsafeGetTensorImpl()->bump_version();
  }
  return loss;
}

TensorMap FusedAdamW::state_of(const at::Tensor& param) const {
  const auto found = state_.find(param.unsafeGetTensorImpl());
  if (found == state_.end()) return {};
  const auto& state = static_cast<const FusedAdamWParamState&>(*found->second);
  return {{"exp_avg", state.exp_avg()}, {"exp_avg_sq", state.exp_avg_sq()}, {"step", state.step()}};
}

void FusedAdamW::set_state(const at::Tensor& param, const TensorMap& saved) {
  if (saved.empty()) {
    state_.erase(param.unsafeGetTensorImpl());
    return;
  }
  auto state = std::make_unique<FusedAdamWParamState>();
  state->exp_avg(restored(saved, "exp_avg", param))
      .exp_avg_sq(restored(saved, "exp_avg_sq", param))
      .step(restored(saved, "step", step_count()));
  state_[param.unsafeGetTensorImpl()] = std::move(state);
}

void FusedAdamW::save(torch::serialize::OutputArchive& archive) const {
  torch::optim::serialize<FusedAdamWParamState, FusedAdamWOptions>(archive, *this);
}

void FusedAdamW::load(torch::serialize::InputArchive& archive) {
  torch::optim::serialize<FusedAdamWParamState, FusedAdamWOptions>(archive, *this);
}

}  // namespace flashlm

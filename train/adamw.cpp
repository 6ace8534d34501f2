// SPDX-License-Identifier: Apache-2.0
#include "train/adamw.h"

#include "data/error.h"
#include "ops/adamw.h"

namespace flashlm {
namespace {

void check_options(const FusedAdamWOptions& options) {
  const auto& o = options;
  TORCH_CHECK_VALUE(o.lr() >= 0, "FusedAdamW: lr must be >= 0, got ", o.lr());
  TORCH_CHECK_VALUE(o.beta1() >= 0 && o.beta1() < 1, "FusedAdamW: beta1 must be in [0, 1), got ", o.beta1());
  TORCH_CHECK_VALUE(o.beta2() >= 0 && o.beta2() < 1, "FusedAdamW: beta2 must be in [0, 1), got ", o.beta2());
  TORCH_CHECK_VALUE(o.eps() >= 0, "FusedAdamW: eps must be >= 0, got ", o.eps());
  TORCH_CHECK_VALUE(o.weight_decay() >= 0, "FusedAdamW: weight_decay must be >= 0, got ", o.weight_decay());
  TORCH_CHECK_VALUE(!o.lazy() || o.beta2() > 0, "FusedAdamW: beta2 must be > 0 if lazy, got ", o.beta2());
}

at::Tensor step_count() { return at::zeros({}, at::kFloat); }

at::Tensor no_missed_steps(const at::Tensor& param) { return at::zeros({param.size(0)}, at::kInt); }

at::Tensor nothing_owed() {
  const at::Tensor keep = at::ones({kLazyPeriod}, at::kDouble);
  return at::stack({keep, at::zeros_like(keep)});
}

AdamWSettings settings_of(const FusedAdamWOptions& options, const FusedAdamWParamState& state) {
  return {options.lr(),  options.beta1(),        options.beta2(),
          options.eps(), options.weight_decay(), static_cast<int64_t>(state.step().item<float>())};
}

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
  _TORCH_OPTIM_SERIALIZE_TORCH_ARG(lazy);
}

void FusedAdamWOptions::serialize(torch::serialize::InputArchive& archive) {
  _TORCH_OPTIM_DESERIALIZE_TORCH_ARG(double, lr);
  _TORCH_OPTIM_DESERIALIZE_TORCH_ARG(double, beta1);
  _TORCH_OPTIM_DESERIALIZE_TORCH_ARG(double, beta2);
  _TORCH_OPTIM_DESERIALIZE_TORCH_ARG(double, eps);
  _TORCH_OPTIM_DESERIALIZE_TORCH_ARG(double, weight_decay);
  _TORCH_OPTIM_DESERIALIZE_TORCH_ARG(bool, lazy);
}

void FusedAdamWParamState::serialize(torch::serialize::OutputArchive& archive) const {
  _TORCH_OPTIM_SERIALIZE_TORCH_ARG(exp_avg);
  _TORCH_OPTIM_SERIALIZE_TORCH_ARG(exp_avg_sq);
  _TORCH_OPTIM_SERIALIZE_TORCH_ARG(step);
  _TORCH_OPTIM_SERIALIZE_TORCH_ARG(last_step);
  _TORCH_OPTIM_SERIALIZE_TORCH_ARG(owed);
}

void FusedAdamWParamState::serialize(torch::serialize::InputArchive& archive) {
  _TORCH_OPTIM_DESERIALIZE_TORCH_ARG(at::Tensor, exp_avg);
  _TORCH_OPTIM_DESERIALIZE_TORCH_ARG(at::Tensor, exp_avg_sq);
  _TORCH_OPTIM_DESERIALIZE_TORCH_ARG(at::Tensor, step);
  _TORCH_OPTIM_DESERIALIZE_TORCH_ARG(at::Tensor, last_step);
  _TORCH_OPTIM_DESERIALIZE_TORCH_ARG(at::Tensor, owed);
}

FusedAdamW::FusedAdamW(const std::vector<torch::optim::OptimizerParamGroup>& param_groups,
                       FusedAdamWOptions defaults)
    : NamedStateOptimizer(param_groups, std::make_unique<FusedAdamWOptions>(defaults)) {
  check_options(defaults);
  for (const auto& group : param_groups_) {
    const auto& options = static_cast<const FusedAdamWOptions&>(group.options());
    check_options(options);
    for (const at::Tensor& param : group.params()) {
      TORCH_CHECK_VALUE(!options.lazy() || param.dim() >= 1, "FusedAdamW: a lazy parameter must have rows");
      TORCH_CHECK_VALUE(param.is_contiguous(),
                        "FusedAdamW: parameters must be contiguous, got one with sizes ", param.sizes(),
                        " and strides ", param.strides());
    }
  }
}

FusedAdamW::FusedAdamW(std::vector<at::Tensor> params, FusedAdamWOptions defaults)
    : FusedAdamW({torch::optim::OptimizerParamGroup(std::move(params))}, std::move(defaults)) {}

FusedAdamWParamState& FusedAdamW::state_for(const at::Tensor& param, const FusedAdamWOptions& options) {
  auto& slot = state_[param.unsafeGetTensorImpl()];
  if (!slot) {
    auto fresh = std::make_unique<FusedAdamWParamState>();
    fresh->exp_avg(at::zeros_like(param)).exp_avg_sq(at::zeros_like(param)).step(step_count());
    if (options.lazy()) fresh->last_step(no_missed_steps(param)).owed(nothing_owed());
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
    for (const at::Tensor& param : group.params()) {
      if (!param.grad().defined()) continue;
      TORCH_CHECK_VALUE(param.grad().layout() == at::kStrided, "FusedAdamW: gradients must be dense, got ",
                        param.grad().layout());
      FusedAdamWParamState& state = state_for(param, options);
      state.step().add_(1);
      const at::Tensor grad = param.grad().contiguous();
      const AdamWSettings settings = settings_of(options, state);
      if (options.lazy()) {
        lazy_adamw_(param, grad, state.exp_avg(), state.exp_avg_sq(), state.last_step(), state.owed(),
                    settings);
      } else {
        adamw_(param, grad, state.exp_avg(), state.exp_avg_sq(), settings);
      }
    }
  }
  return loss;
}

void FusedAdamW::catch_up() {
  const torch::NoGradGuard no_grad;
  for (auto& group : param_groups_) {
    const auto& options = static_cast<const FusedAdamWOptions&>(group.options());
    if (!options.lazy()) continue;
    for (const at::Tensor& param : group.params()) {
      if (state_.find(param.unsafeGetTensorImpl()) == state_.end()) continue;
      FusedAdamWParamState& state = state_for(param, options);
      lazy_adamw_catch_up_(param, state.exp_avg(), state.exp_avg_sq(), state.last_step(), state.owed(),
                           settings_of(options, state));
    }
  }
}

TensorMap FusedAdamW::state_of(const at::Tensor& param) const {
  const auto found = state_.find(param.unsafeGetTensorImpl());
  if (found == state_.end()) return {};
  const auto& state = static_cast<const FusedAdamWParamState&>(*found->second);
  TensorMap all = {{"exp_avg", state.exp_avg()}, {"exp_avg_sq", state.exp_avg_sq()}, {"step", state.step()}};
  if (state.owed().defined()) {
    all["last_step"] = state.last_step();
    all["owed"] = state.owed();
  }
  return all;
}

const FusedAdamWOptions& FusedAdamW::options_of(const at::Tensor& param) const {
  for (const auto& group : param_groups_) {
    for (const at::Tensor& one : group.params()) {
      if (one.is_same(param)) return static_cast<const FusedAdamWOptions&>(group.options());
    }
  }
  TORCH_INTERNAL_ASSERT(false, "FusedAdamW: a parameter that is in none of its groups");
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
  const bool lazy = options_of(param).lazy();
  if (!lazy && saved.contains("owed")) throw Error("it was saved by a lazy one, which put rows off");
  if (lazy) {
    state->last_step(restored(saved, "last_step", no_missed_steps(param)))
        .owed(restored(saved, "owed", nothing_owed()));
  }
  state_[param.unsafeGetTensorImpl()] = std::move(state);
}

void FusedAdamW::save(torch::serialize::OutputArchive& archive) const {
  torch::optim::serialize<FusedAdamWParamState, FusedAdamWOptions>(archive, *this);
}

void FusedAdamW::load(torch::serialize::InputArchive& archive) {
  torch::optim::serialize<FusedAdamWParamState, FusedAdamWOptions>(archive, *this);
}

}  // namespace flashlm

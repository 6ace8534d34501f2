// SPDX-License-Identifier: Apache-2.0
#include "train/normuon.h"

#include <ATen/cpu/Utils.h>

#include <cmath>

namespace flashlm {
namespace {

/// Of an update's elements, per unit of lr: the RMS that AdamW's updates have in practice.
constexpr double kUpdateRms = 0.2;

void check_options(const NorMuonOptions& options) {
  const auto& o = options;
  TORCH_CHECK_VALUE(o.lr() >= 0, "NorMuon: lr must be >= 0, got ", o.lr());
  TORCH_CHECK_VALUE(o.beta1() >= 0 && o.beta1() < 1, "NorMuon: beta1 must be in [0, 1), got ", o.beta1());
  TORCH_CHECK_VALUE(o.beta2() >= 0 && o.beta2() < 1, "NorMuon: beta2 must be in [0, 1), got ", o.beta2());
  TORCH_CHECK_VALUE(o.weight_decay() >= 0, "NorMuon: weight_decay must be >= 0, got ", o.weight_decay());
  TORCH_CHECK_VALUE(o.eps() > 0, "NorMuon: eps must be > 0, got ", o.eps());
  TORCH_CHECK_VALUE(o.steps() >= 1, "NorMuon: steps must be >= 1, got ", o.steps());
}

at::Tensor row_state(const at::Tensor& param) { return at::zeros({param.size(0), 1}, param.options()); }

}  // namespace

at::Tensor newton_schulz(const at::Tensor& g, int64_t steps, bool bfloat16) {
  TORCH_CHECK_VALUE(g.dim() == 2, "newton_schulz: g must have 2 dimensions, got ", g.dim());
  constexpr double a = 3.4445, b = -4.7750, c = 2.0315;
  const bool tall = g.size(0) > g.size(1);
  at::Tensor x = g / (g.norm() + 1e-7);
  if (bfloat16) x = x.to(at::kBFloat16);
  if (tall) x = x.t();
  for (int64_t i = 0; i < steps; ++i) {
    const at::Tensor gram = x.mm(x.t());
    const at::Tensor polynomial = at::addmm(gram, gram, gram, /*beta=*/b, /*alpha=*/c);
    x = at::addmm(x, polynomial, x, /*beta=*/a, /*alpha=*/1);
  }
  return (tall ? x.t() : x).to(g.scalar_type());
}

bool has_bfloat16() {
  const auto capabilities = at::cpu::get_cpu_capabilities();
  const auto found = capabilities.find("avx512_bf16");
  return found != capabilities.end() && found->second.toBool();
}

NorMuonUpdate normuon_update(const at::Tensor& grad, const at::Tensor& momentum,
                             const at::Tensor& second_moment, const NorMuonOptions& options) {
  NorMuonUpdate next;
  next.momentum = at::lerp(momentum, grad, 1 - options.beta1());
  const at::Tensor o = newton_schulz(next.momentum, options.steps(), options.bfloat16());
  next.second_moment =
      at::lerp(second_moment, o.square().mean(/*dim=*/1, /*keepdim=*/true), 1 - options.beta2());
  const at::Tensor normalized = o / (next.second_moment.sqrt() + options.eps());
  const double rms_to_norm = std::sqrt(static_cast<double>(grad.numel()));
  next.update = normalized * (kUpdateRms * options.lr() * rms_to_norm / (normalized.norm() + options.eps()));
  return next;
}

NorMuonOptions::NorMuonOptions(double lr) : lr_(lr) {}

double NorMuonOptions::get_lr() const { return lr(); }

void NorMuonOptions::set_lr(double new_lr) { lr(new_lr); }

void NorMuonOptions::serialize(torch::serialize::OutputArchive& archive) const {
  _TORCH_OPTIM_SERIALIZE_TORCH_ARG(lr);
  _TORCH_OPTIM_SERIALIZE_TORCH_ARG(beta1);
  _TORCH_OPTIM_SERIALIZE_TORCH_ARG(beta2);
  _TORCH_OPTIM_SERIALIZE_TORCH_ARG(weight_decay);
  _TORCH_OPTIM_SERIALIZE_TORCH_ARG(eps);
  _TORCH_OPTIM_SERIALIZE_TORCH_ARG(steps);
  _TORCH_OPTIM_SERIALIZE_TORCH_ARG(bfloat16);
}

void NorMuonOptions::serialize(torch::serialize::InputArchive& archive) {
  _TORCH_OPTIM_DESERIALIZE_TORCH_ARG(double, lr);
  _TORCH_OPTIM_DESERIALIZE_TORCH_ARG(double, beta1);
  _TORCH_OPTIM_DESERIALIZE_TORCH_ARG(double, beta2);
  _TORCH_OPTIM_DESERIALIZE_TORCH_ARG(double, weight_decay);
  _TORCH_OPTIM_DESERIALIZE_TORCH_ARG(double, eps);
  _TORCH_OPTIM_DESERIALIZE_TORCH_ARG(int64_t, steps);
  _TORCH_OPTIM_DESERIALIZE_TORCH_ARG(bool, bfloat16);
}

void NorMuonParamState::serialize(torch::serialize::OutputArchive& archive) const {
  _TORCH_OPTIM_SERIALIZE_TORCH_ARG(momentum);
  _TORCH_OPTIM_SERIALIZE_TORCH_ARG(second_moment);
}

void NorMuonParamState::serialize(torch::serialize::InputArchive& archive) {
  _TORCH_OPTIM_DESERIALIZE_TORCH_ARG(at::Tensor, momentum);
  _TORCH_OPTIM_DESERIALIZE_TORCH_ARG(at::Tensor, second_moment);
}

NorMuon::NorMuon(const std::vector<torch::optim::OptimizerParamGroup>& param_groups, NorMuonOptions defaults)
    : NamedStateOptimizer(param_groups, std::make_unique<NorMuonOptions>(defaults)) {
  check_options(defaults);
  for (const auto& group : param_groups_) {
    check_options(static_cast<const NorMuonOptions&>(group.options()));
    for (const at::Tensor& param : group.params()) {
      TORCH_CHECK_VALUE(param.dim() == 2, "NorMuon: parameters must have 2 dimensions, got one of shape ",
                        param.sizes(), "; give it to FusedAdamW");
    }
  }
}

NorMuon::NorMuon(std::vector<at::Tensor> params, NorMuonOptions defaults)
    : NorMuon({torch::optim::OptimizerParamGroup(std::move(params))}, std::move(defaults)) {}

torch::Tensor NorMuon::step(LossClosure closure) {
  const torch::NoGradGuard no_grad;
  torch::Tensor loss;
  if (closure) {
    const at::AutoGradMode with_grad(true);
    loss = closure();
  }
  for (auto& group : param_groups_) {
    const auto& options = static_cast<const NorMuonOptions&>(group.options());
    for (at::Tensor& param : group.params()) {
      if (!param.grad().defined()) continue;
      auto& slot = state_[param.unsafeGetTensorImpl()];
      if (!slot) {
        auto fresh = std::make_unique<NorMuonParamState>();
        fresh->momentum(at::zeros_like(param)).second_moment(row_state(param));
        slot = std::move(fresh);
      }
      auto& state = static_cast<NorMuonParamState&>(*slot);
      NorMuonUpdate next = normuon_update(param.grad(), state.momentum(), state.second_moment(), options);
      if (options.weight_decay() != 0) param.mul_(1 - options.lr() * options.weight_decay());
      param.sub_(next.update);
      state.momentum(std::move(next.momentum)).second_moment(std::move(next.second_moment));
    }
  }
  return loss;
}

TensorMap NorMuon::state_of(const at::Tensor& param) const {
  const auto found = state_.find(param.unsafeGetTensorImpl());
  if (found == state_.end()) return {};
  const auto& state = static_cast<const NorMuonParamState&>(*found->second);
  return {{"momentum", state.momentum()}, {"second_moment", state.second_moment()}};
}

void NorMuon::set_state(const at::Tensor& param, const TensorMap& saved) {
  if (saved.empty()) {
    state_.erase(param.unsafeGetTensorImpl());
    return;
  }
  auto state = std::make_unique<NorMuonParamState>();
  state->momentum(restored(saved, "momentum", param))
      .second_moment(restored(saved, "second_moment", row_state(param)));
  state_[param.unsafeGetTensorImpl()] = std::move(state);
}

void NorMuon::save(torch::serialize::OutputArchive& archive) const {
  torch::optim::serialize<NorMuonParamState, NorMuonOptions>(archive, *this);
}

void NorMuon::load(torch::serialize::InputArchive& archive) {
  torch::optim::serialize<NorMuonParamState, NorMuonOptions>(archive, *this);
}

}  // namespace flashlm

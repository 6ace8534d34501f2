// SPDX-License-Identifier: Apache-2.0
#include "train/optimizers.h"

#include <cstdio>

#include "data/error.h"
#include "train/adamw.h"
#include "train/normuon.h"

namespace flashlm {
namespace {

const std::string kPrefix = "optimizer.";

std::string group_of(const std::string& name, const at::Tensor& parameter) {
  if (parameter.dim() < 2 || name == "lower_bounds") return "vectors";
  if (parameter.dim() > 2) return "kernels";
  const bool table = name.find("embedding") != std::string::npos || name.find("head") != std::string::npos;
  return table ? "tables" : "matrices";
}

std::unique_ptr<NamedStateOptimizer> make_optimizer(const Optimizers::Group& group,
                                                    const OptimizerConfig& config) {
  std::vector<at::Tensor> tensors;
  for (const auto& [name, tensor] : group.parameters) tensors.push_back(tensor);
  if (group.optimizer == "NorMuon") {
    const auto options = NorMuonOptions(group.lr)
                             .beta1(config.normuon_beta1)
                             .beta2(config.normuon_beta2)
                             .weight_decay(group.weight_decay)
                             .bfloat16(config.newton_schulz == "bfloat16" ||
                                       (config.newton_schulz == "auto" && has_bfloat16()));
    return std::make_unique<NorMuon>(tensors, options);
  }
  const auto options = FusedAdamWOptions(group.lr)
                           .beta1(config.adamw_beta1)
                           .beta2(config.adamw_beta2)
                           .eps(config.adamw_eps)
                           .weight_decay(group.weight_decay)
                           .lazy(group.name == "tables" && config.lazy_embedding);
  return std::make_unique<FusedAdamW>(tensors, options);
}

std::string with_commas(int64_t value) {
  std::string digits = std::to_string(value);
  for (int end = static_cast<int>(digits.size()) - 3; end > 0; end -= 3) digits.insert(end, 1, ',');
  return digits;
}

}  // namespace

double clip_gradients(const std::vector<at::Tensor>& parameters, double max_norm) {
  const torch::NoGradGuard no_grad;
  std::vector<at::Tensor> gradients, norms;
  for (const at::Tensor& parameter : parameters) {
    if (!parameter.grad().defined()) continue;
    gradients.push_back(parameter.grad());
    norms.push_back(gradients.back().norm(/*p=*/2, /*dim=*/-1).norm());
  }
  if (gradients.empty()) return 0;
  const at::Tensor norm = torch::stack(norms).norm(), scale = max_norm / (norm + 1e-6);
  if (!(scale.item<double>() >= 1)) {
    for (at::Tensor& gradient : gradients) gradient.mul_(scale);
  }
  return norm.item<double>();
}

int64_t Optimizers::Group::elements() const {
  int64_t sum = 0;
  for (const auto& parameter : parameters) sum += parameter.second.numel();
  return sum;
}

Optimizers::Optimizers(const NamedParameters& parameters, const OptimizerConfig& config) {
  if (config.matrix_optimizer != "normuon" && config.matrix_optimizer != "adamw") {
    throw Error("matrix_optimizer must be \"normuon\" or \"adamw\", got \"" + config.matrix_optimizer + "\"");
  }
  if (config.newton_schulz != "auto" && config.newton_schulz != "float32" &&
      config.newton_schulz != "bfloat16") {
    throw Error("newton_schulz must be \"auto\", \"float32\" or \"bfloat16\", got \"" + config.newton_schulz +
                "\"");
  }
  const bool normuon = config.matrix_optimizer == "normuon";
  const double table_lr = config.embedding_lr > 0 ? config.embedding_lr : config.adamw_lr;
  groups_ = {{"matrices", "NorMuon", config.normuon_lr, config.normuon_weight_decay, {}},
             {"tables", "AdamW", table_lr, config.weight_decay, {}},
             {"kernels", "AdamW", config.adamw_lr, config.weight_decay, {}},
             {"vectors", "AdamW", config.adamw_lr, /*weight_decay=*/0, {}}};
  if (!normuon) groups_[0] = {"matrices", "AdamW", config.adamw_lr, config.weight_decay, {}};
  for (const auto& [name, tensor] : unique_parameters(parameters)) {
    for (Group& group : groups_) {
      if (group.name == group_of(name, tensor)) group.parameters.emplace_back(name, tensor);
    }
  }
  std::erase_if(groups_, [](const Group& group) { return group.parameters.empty(); });
  for (const Group& group : groups_) optimizers_.push_back(make_optimizer(group, config));
}

void Optimizers::set_lr_scale(double scale) {
  for (size_t i = 0; i < groups_.size(); ++i) {
    for (auto& param_group : optimizers_[i]->param_groups())
      param_group.options().set_lr(groups_[i].lr * scale);
  }
}

void Optimizers::step() {
  for (const auto& optimizer : optimizers_) optimizer->step();
}

void Optimizers::catch_up() {
  for (const auto& optimizer : optimizers_) optimizer->catch_up();
}

void Optimizers::zero_grad() {
  for (const auto& optimizer : optimizers_) optimizer->zero_grad(/*set_to_none=*/true);
}

TensorMap Optimizers::state() const {
  TensorMap all;
  for (size_t i = 0; i < groups_.size(); ++i) {
    for (const auto& [name, tensor] : groups_[i].parameters) {
      for (const auto& [what, value] : optimizers_[i]->state_of(tensor))
        all[kPrefix + name + "." + what] = value;
    }
  }
  return all;
}

void Optimizers::load_state(const TensorMap& saved) {
  std::map<std::string, TensorMap> by_parameter;
  for (const auto& [name, value] : saved) {
    if (!name.starts_with(kPrefix)) continue;
    const size_t dot = name.rfind('.');
    by_parameter[name.substr(0, dot)][name.substr(dot + 1)] = value;
  }
  for (size_t i = 0; i < groups_.size(); ++i) {
    for (const auto& [name, tensor] : groups_[i].parameters) {
      try {
        optimizers_[i]->set_state(tensor, by_parameter[kPrefix + name]);
      } catch (const Error& error) {
        throw Error("optimizer state of " + name + ", for " + groups_[i].optimizer + ": " + error.what());
      }
      by_parameter.erase(kPrefix + name);
    }
  }
  if (!by_parameter.empty()) {
    throw Error("optimizer state \"" + by_parameter.begin()->first +
                "\" belongs to no parameter of this model");
  }
}

std::string Optimizers::summary() const {
  std::string text;
  for (const Group& group : groups_) {
    char line[160];
    std::snprintf(line, sizeof line, "%-9s %-8s lr %-8g decay %-5g %12s parameters in %zu tensors\n",
                  group.name.c_str(), group.optimizer.c_str(), group.lr, group.weight_decay,
                  with_commas(group.elements()).c_str(), group.parameters.size());
    text += line;
  }
  return text;
}

}  // namespace flashlm

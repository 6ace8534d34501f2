// SPDX-License-Identifier: Apache-2.0
// AdamW in one pass over memory: LibTorch's own C++ AdamW makes a pass for each arithmetic operation.
#pragma once

#include <torch/torch.h>

#include "train/named_state.h"

namespace flashlm {

struct FusedAdamWOptions : public torch::optim::OptimizerCloneableOptions<FusedAdamWOptions> {
  FusedAdamWOptions(double lr = 3e-4);
  TORCH_ARG(double, lr) = 3e-4;
  TORCH_ARG(double, beta1) = 0.9;
  TORCH_ARG(double, beta2) = 0.95;
  TORCH_ARG(double, eps) = 1e-8;
  TORCH_ARG(double, weight_decay) = 0.1;

 public:
  void serialize(torch::serialize::InputArchive& archive) override;
  void serialize(torch::serialize::OutputArchive& archive) const override;
  double get_lr() const override;
  void set_lr(double lr) override;
};

struct FusedAdamWParamState : public torch::optim::OptimizerCloneableParamState<FusedAdamWParamState> {
  TORCH_ARG(at::Tensor, exp_avg);
  TORCH_ARG(at::Tensor, exp_avg_sq);
  TORCH_ARG(at::Tensor, step);  // (), float32: what ATen's kernel takes; exact up to 2^24 steps

 public:
  void serialize(torch::serialize::InputArchive& archive) override;
  void serialize(torch::serialize::OutputArchive& archive) const override;
};

/// Loshchilov and Hutter 2019, over at::_fused_adamw_. For each parameter that has a gradient g, at its t-th
/// step:
///
///   W <- (1 - lr weight_decay) W
///   m <- beta1 m + (1 - beta1) g,   v <- beta2 v + (1 - beta2) g²
///   W <- W - lr (m / (1 - beta1^t)) / (sqrt(v / (1 - beta2^t)) + eps)
///
/// t counts the parameter's own gradients. Parameters without one stay as they are, state and decay included.
/// Parameters must be dense and contiguous. Each group may have its own options.
class FusedAdamW : public NamedStateOptimizer {
 public:
  explicit FusedAdamW(const std::vector<torch::optim::OptimizerParamGroup>& param_groups,
                      FusedAdamWOptions defaults = {});
  explicit FusedAdamW(std::vector<at::Tensor> params, FusedAdamWOptions defaults = {});

  /// The closure, if given, recomputes loss and gradients; its loss is returned.
  torch::Tensor step(LossClosure closure = nullptr) override;

  TensorMap state_of(const at::Tensor& param) const override;  // "exp_avg", "exp_avg_sq", "step"
  void set_state(const at::Tensor& param, const TensorMap& saved) override;

  void save(torch::serialize::OutputArchive& archive) const override;
  void load(torch::serialize::InputArchive& archive) override;

 private:
  FusedAdamWParamState& state_for(const at::Tensor& param);
};

}  // namespace flashlm

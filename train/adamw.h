// SPDX-License-Identifier: Apache-2.0
// AdamW in one pass over memory, or in less: LibTorch's own C++ AdamW makes a pass for each arithmetic
// operation.
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
  TORCH_ARG(bool, lazy) = false;  // rows without a gradient may wait: lazy_adamw_ in ops/adamw.h

 public:
  void serialize(torch::serialize::InputArchive& archive) override;
  void serialize(torch::serialize::OutputArchive& archive) const override;
  double get_lr() const override;
  void set_lr(double lr) override;
};

struct FusedAdamWParamState : public torch::optim::OptimizerCloneableParamState<FusedAdamWParamState> {
  TORCH_ARG(at::Tensor, exp_avg);
  TORCH_ARG(at::Tensor, exp_avg_sq);
  TORCH_ARG(at::Tensor, step);       // (), float32, as in torch's; exact up to 2^24 steps
  TORCH_ARG(at::Tensor, last_step);  // these two only if lazy; see lazy_adamw_
  TORCH_ARG(at::Tensor, owed);

 public:
  void serialize(torch::serialize::InputArchive& archive) override;
  void serialize(torch::serialize::OutputArchive& archive) const override;
};

/// A step of adamw_ (ops/adamw.h) for each parameter that has a gradient, counted by the parameter's own
/// gradients. Parameters without one stay as they are, state and decay included. Parameters must be dense and
/// contiguous. Each group may have its own options.
class FusedAdamW : public NamedStateOptimizer {
 public:
  explicit FusedAdamW(const std::vector<torch::optim::OptimizerParamGroup>& param_groups,
                      FusedAdamWOptions defaults = {});
  explicit FusedAdamW(std::vector<at::Tensor> params, FusedAdamWOptions defaults = {});

  /// The closure, if given, recomputes loss and gradients; its loss is returned.
  torch::Tensor step(LossClosure closure = nullptr) override;

  void catch_up() override;

  /// "exp_avg", "exp_avg_sq", "step"; if lazy, "last_step" and "owed" too.
  TensorMap state_of(const at::Tensor& param) const override;
  void set_state(const at::Tensor& param, const TensorMap& saved) override;

  void save(torch::serialize::OutputArchive& archive) const override;
  void load(torch::serialize::InputArchive& archive) override;

 private:
  FusedAdamWParamState& state_for(const at::Tensor& param, const FusedAdamWOptions& options);
  const FusedAdamWOptions& options_of(const at::Tensor& param) const;
};

}  // namespace flashlm

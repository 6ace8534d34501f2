// SPDX-License-Identifier: Apache-2.0
// Tensors by name: how parameters reach the optimizers, and how what the optimizers remember reaches a
// checkpoint.
#pragma once

#include <torch/torch.h>

#include <map>
#include <memory>
#include <string>
#include <utility>
#include <vector>

namespace flashlm {

using NamedParameters = std::vector<std::pair<std::string, at::Tensor>>;
using TensorMap = std::map<std::string, at::Tensor>;

/// Each tensor once, under the first of its names: tied weights have several.
NamedParameters unique_parameters(const NamedParameters& parameters);

/// A copy of saved[name] for use as state. flashlm::Error if it is missing or differs from `like` in shape or
/// dtype.
at::Tensor restored(const TensorMap& saved, const std::string& name, const at::Tensor& like);

/// A torch optimizer whose state can be taken and given per parameter. With the same state, parameters and
/// gradients it goes on bit for bit.
class NamedStateOptimizer : public torch::optim::Optimizer {
 public:
  NamedStateOptimizer(const std::vector<torch::optim::OptimizerParamGroup>& param_groups,
                      std::unique_ptr<torch::optim::OptimizerOptions> defaults);

  /// Keeps the group's options. LibTorch 2.13's own puts the defaults in their place, unless it knows their
  /// type.
  void add_param_group(const torch::optim::OptimizerParamGroup& param_group);

  /// Gives the parameters what step() has put off, if this optimizer puts anything off.
  virtual void catch_up() {}

  /// What it remembers of param, empty before the first gradient. The tensors are the live ones, not copies.
  virtual TensorMap state_of(const at::Tensor& param) const = 0;

  /// The inverse; an empty map forgets. Copies; throws flashlm::Error when the tensors do not fit param.
  virtual void set_state(const at::Tensor& param, const TensorMap& saved) = 0;
};

}  // namespace flashlm

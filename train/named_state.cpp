// SPDX-License-Identifier: Apache-2.0
#include "train/named_state.h"

#include <set>

#include "data/error.h"

namespace flashlm {

NamedParameters unique_parameters(const NamedParameters& parameters) {
  NamedParameters unique;
  std::set<const void*> seen;
  for (const auto& [name, tensor] : parameters) {
    if (seen.insert(tensor.unsafeGetTensorImpl()).second) unique.emplace_back(name, tensor);
  }
  return unique;
}

at::Tensor restored(const TensorMap& saved, const std::string& name, const at::Tensor& like) {
  const auto found = saved.find(name);
  if (found == saved.end()) throw Error("\"" + name + "\" is missing");
  const at::Tensor& tensor = found->second;
  if (tensor.sizes() != like.sizes() || tensor.scalar_type() != like.scalar_type()) {
    throw Error(c10::str("\"", name, "\" must be ", like.scalar_type(), " ", like.sizes(), ", got ",
                         tensor.scalar_type(), " ", tensor.sizes()));
  }
  return tensor.detach().clone(at::MemoryFormat::Contiguous);
}

NamedStateOptimizer::NamedStateOptimizer(const std::vector<torch::optim::OptimizerParamGroup>& param_groups,
                                         std::unique_ptr<torch::optim::OptimizerOptions> defaults)
    : Optimizer(std::vector<torch::optim::OptimizerParamGroup>{}, std::move(defaults)) {
  for (const auto& group : param_groups) add_param_group(group);
}

void NamedStateOptimizer::add_param_group(const torch::optim::OptimizerParamGroup& param_group) {
  Optimizer::add_param_group(param_group);
  if (param_group.has_options()) param_groups_.back().set_options(param_group.options().clone());
}

}  // namespace flashlm

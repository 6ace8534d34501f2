// SPDX-License-Identifier: Apache-2.0
#include "train/ema.h"

#include "data/error.h"

namespace flashlm {
namespace {

const std::string kPrefix = "ema.";
constexpr int64_t kExchangeElements = 1
                                      << 20;  // at a time: an embedding must not be copied whole to be moved

}  // namespace

Ema::Ema(const NamedParameters& parameters, double decay) : decay_(decay) {
  TORCH_CHECK_VALUE(decay >= 0 && decay <= 1, "Ema: decay must be in [0, 1], got ", decay);
  for (const auto& [name, tensor] : unique_parameters(parameters)) {
    TORCH_CHECK_VALUE(tensor.is_contiguous(), "Ema: parameter ", name, " must be contiguous");
    names_.push_back(name);
    parameters_.push_back(tensor);
    averages_.push_back(tensor.detach().clone());
  }
}

void Ema::update() {
  const torch::NoGradGuard no_grad;
  if (!parameters_.empty()) at::_foreach_lerp_(averages_, parameters_, 1 - decay_);
}

void Ema::exchange() {
  const torch::NoGradGuard no_grad;
  for (size_t i = 0; i < parameters_.size(); ++i) {
    const auto pieces = parameters_[i].view(-1).split(kExchangeElements);
    const auto average_pieces = averages_[i].view(-1).split(kExchangeElements);
    for (size_t k = 0; k < pieces.size(); ++k) {
      const at::Tensor piece = pieces[k].clone();
      pieces[k].copy_(average_pieces[k]);
      average_pieces[k].copy_(piece);
    }
  }
}

TensorMap Ema::state() const {
  TensorMap all;
  for (size_t i = 0; i < names_.size(); ++i) all[kPrefix + names_[i]] = averages_[i];
  return all;
}

void Ema::load_state(const TensorMap& saved) {
  for (size_t i = 0; i < names_.size(); ++i)
    averages_[i] = restored(saved, kPrefix + names_[i], averages_[i]);
}

}  // namespace flashlm

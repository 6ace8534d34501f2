// SPDX-License-Identifier: Apache-2.0
#include "model/pack.h"

#include <torch/utils.h>

#include "data/error.h"
#include "ops/ops.h"

namespace flashlm {
namespace {

const std::string kPacked = "packed", kScale = "scale", kWeight = "weight";

/// "a.b.packed" -> "a.b.": of the buffers that pack_ternary makes, or empty.
std::string packed_layer(const std::string& name) {
  return name.ends_with("." + kPacked) ? name.substr(0, name.size() - kPacked.size()) : "";
}

/// What the ternary layer whose names begin so is quantized by.
const std::string& quantizer_of(const std::string& layer, const ModelConfig& config) {
  return layer == "head." ? config.head_quantizer : config.quantizer;
}

}  // namespace

FlashLM pack(const FlashLM& model) {
  torch::NoGradGuard no_grad;
  ModelConfig config = model->config();
  if (config.packed) throw Error("the model is packed already");
  config.packed = true;
  FlashLM result(config);
  std::map<std::string, at::Tensor> weights = model->named_weights();
  for (const auto& [name, tensor] : result->named_weights()) {
    const std::string layer = packed_layer(name);
    if (layer.empty()) continue;
    std::tie(weights[name], weights[layer + kScale]) =
        pack_ternary(weights.at(layer + kWeight), quantizer_of(layer, config));
    weights.erase(layer + kWeight);
  }
  load_weights(result, weights, "the float model");
  return result;
}

FlashLM random_packed(ModelConfig config) {
  torch::NoGradGuard no_grad;
  config.packed = true;
  FlashLM result(config);
  std::map<std::string, at::Tensor> weights = result->named_weights();
  for (auto& [name, tensor] : weights) {
    const std::string layer = packed_layer(name);
    if (!layer.empty()) {
      // A panel is 64 outputs, a line 4 inputs; what a weight has less of them is of no account here.
      const int64_t out = tensor.size(0) * tensor.size(2), in = tensor.size(1) * 4;
      std::tie(tensor, weights.at(layer + kScale)) =
          pack_ternary(torch::randn({out, in}) * config.embedding_std, quantizer_of(layer, config));
    } else if (tensor.dim() > 1 && tensor.is_floating_point()) {
      tensor.normal_(0, config.embedding_std);
    }
  }
  load_weights(result, weights, "random weights");
  return result;
}

}  // namespace flashlm

// SPDX-License-Identifier: Apache-2.0
#include "model/hgrn_bit.h"

#include <regex>

#include "data/error.h"

namespace flashlm {
namespace {

/// What each of ours is called there.
const std::pair<const char*, const char*> kNames[] = {
    {"embedding.weight", "model.embeddings.weight"}, {"final_norm.scale", "model.norm.weight"},
    {"lower_bounds", "model.lower_bounds"},          {"head.weight", "lm_head.weight"},
    {"head.norm_scale", "lm_head.norm.weight"},
};
const std::pair<const char*, const char*> kBlockNames[] = {
    {"norm1.scale", "attn_norm.weight"},
    {"norm2.scale", "mlp_norm.weight"},
    {"token_mixer.f_proj", "attn.f_proj"},
    {"token_mixer.c_proj", "attn.i_proj"},
    {"token_mixer.g_proj", "attn.g_proj"},
    {"token_mixer.o_proj", "attn.o_proj"},
    {"token_mixer.g_norm.scale", "attn.g_norm.weight"},
    {"glu.gate_up_proj", "mlp.gate_proj"},
    {"glu.down_proj", "mlp.down_proj"},
};

/// The released name of our parameter `name`.
std::string hgrn_bit_name(const std::string& name) {
  for (const auto& [ours, theirs] : kNames) {
    if (name == ours) return theirs;
  }
  static const std::regex block(R"((?:block|blocks\.(\d+))\.(.+))");
  std::smatch parts;
  if (std::regex_match(name, parts, block)) {
    const std::string layer = "model.layers." + (parts[1].matched ? parts[1].str() : "0") + ".";
    for (const auto& [ours, theirs] : kBlockNames) {
      if (parts[2] == ours) return layer + theirs;
      if (parts[2] == std::string(ours) + ".weight") return layer + theirs + ".weight";
      if (parts[2] == std::string(ours) + ".norm_scale") return layer + theirs + ".norm.weight";
    }
  }
  throw Error("a released checkpoint has no tensor for '" + name + "'");
}

const at::Tensor& find(const std::map<std::string, at::Tensor>& tensors, const std::string& name,
                       int64_t dimensions, const std::string& origin) {
  const auto found = tensors.find(name);
  if (found == tensors.end() || found->second.dim() != dimensions) {
    throw Error(origin + " is not a released MatMul-free LM: it has no tensor '" + name + "' of " +
                std::to_string(dimensions) + " dimensions");
  }
  return found->second;
}

}  // namespace

FlashLM from_hgrn_bit(const std::map<std::string, at::Tensor>& tensors, const std::string& origin) {
  const at::Tensor& table = find(tensors, "model.embeddings.weight", 2, origin);
  const at::Tensor& gate = find(tensors, "model.layers.0.mlp.gate_proj.weight", 2, origin);
  ModelConfig config;
  config.block = "hgrn-bit";
  config.mixers = {"mlgru"};
  config.vocab_size = table.size(0);
  config.d_model = table.size(1);
  config.d_inner = gate.size(0) / 2;
  config.layers = find(tensors, "model.lower_bounds", 2, origin).size(0);
  config.recursions = 1;
  config.quantizer = "absmean";
  config.activation = "int8";
  config.norm_eps = 1e-6;
  config.router = false;
  config.tied = false;
  config.head_quantizer = "absmean";
  FlashLM model(config);
  std::map<std::string, at::Tensor> rest = tensors, weights;
  for (const auto& [name, tensor] : model->named_weights()) {
    const auto node = rest.extract(hgrn_bit_name(name));
    if (node.empty()) throw Error(origin + ": has no tensor '" + hgrn_bit_name(name) + "'");
    weights[name] = node.mapped();
  }
  if (!rest.empty()) {
    throw Error(origin + ": tensor '" + rest.begin()->first + "' is not one of a released MatMul-free LM");
  }
  load_weights(model, weights, origin);
  return model;
}

}  // namespace flashlm

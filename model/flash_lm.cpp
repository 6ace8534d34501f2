// SPDX-License-Identifier: Apache-2.0
#include "model/flash_lm.h"

#include <ATen/record_function.h>
#include <torch/nn/functional/embedding.h>

#include <sstream>

#include "data/error.h"
#include "ops/ops.h"

namespace flashlm {
namespace {

/// The table's gradient has as many rows as there are tokens if `sparse`: to be added to one that is dense.
at::Tensor embed(const at::Tensor& table, const at::Tensor& tokens, double scale, bool sparse) {
  RECORD_USER_SCOPE("embedding");
  const at::Tensor rows =
      torch::embedding(table, tokens, /*padding_idx=*/-1, /*scale_grad_by_freq=*/false, sparse);
  return scale == 1 ? rows : rows * scale;
}

}  // namespace

FlashLMImpl::FlashLMImpl(const ModelConfig& config) : config_(config) {
  config.validate();
  if (config.head == "hierarchical") config_.classes = config.class_count();
  // The key is v3's "embedding.weight"; its "lm_head.weight" is the same tensor and is not stored again.
  struct EmbeddingImpl : torch::nn::Module {};
  const at::Tensor table = torch::randn({config.vocab_size, config.d_model}) * config.embedding_std;
  embedding =
      register_module("embedding", std::make_shared<EmbeddingImpl>())->register_parameter("weight", table);
  if (config.layers == 1) {
    blocks_.push_back(register_module("block", Block(config)));
  } else {
    torch::nn::ModuleList blocks;
    register_module("blocks", blocks);
    for (int64_t i = 0; i < config.layers; ++i) {
      blocks_.emplace_back(config);
      blocks->push_back(blocks_.back());
    }
  }
  final_norm_ = register_module("final_norm", RMSNorm(config.d_model, config.norm_eps));
  head_ = register_module("head", make_head(config_, embedding));
}

at::Tensor FlashLMImpl::hidden(const at::Tensor& tokens, State* state) {
  at::Tensor x = embed(embedding, tokens, config_.embedding_scale,
                       /*sparse=*/config_.tied && config_.head != "adaptive");
  at::Tensor* history = state == nullptr ? nullptr : state->data();
  for (int64_t pass = 0; pass < config_.recursions; ++pass) {
    for (auto& block : blocks_) {
      x = block(x, history);
      if (history != nullptr) history += config_.dilations.size();
    }
  }
  return final_norm_(x);
}

at::Tensor FlashLMImpl::forward(const at::Tensor& tokens) { return head_->logits(hidden(tokens)); }

std::tuple<at::Tensor, at::Tensor> FlashLMImpl::loss(const at::Tensor& tokens, const at::Tensor& targets,
                                                     const LossOptions& options,
                                                     const at::Tensor& positions) {
  at::Tensor h = hidden(tokens).flatten(0, 1), target = targets.flatten();
  RECORD_USER_SCOPE("head");
  if (positions.defined()) {
    h = h.index_select(0, positions);
    target = target.index_select(0, positions);
  }
  return head_->loss(h, target, options);
}

State FlashLMImpl::initial_state(int64_t batch) const {
  State state;
  for (int64_t i = 0; i < config_.recursions * config_.layers; ++i) {
    for (int64_t dilation : config_.dilations) {
      state.push_back(torch::zeros({batch, (config_.kernel_size - 1) * dilation, config_.d_model}));
    }
  }
  return state;
}

int64_t FlashLMImpl::parameter_count() const {
  int64_t count = 0;
  for (const auto& p : parameters()) count += p.numel();
  return count;
}

std::map<std::string, at::Tensor> FlashLMImpl::named_weights() const {
  std::map<std::string, at::Tensor> weights;
  for (const auto& p : named_parameters()) weights[p.key()] = p.value().detach();
  for (const auto& b : named_buffers()) weights[b.key()] = b.value();
  return weights;
}

void save_model(const FlashLM& model, const std::filesystem::path& path) {
  save_safetensors(path, model->named_weights(),
                   {{"format", "flashlm-model"}, {"config", to_json(model->config())}});
}

FlashLM load_model(const std::filesystem::path& path) {
  return model_from(load_safetensors(path), path.string());
}

FlashLM model_from(const SafeTensors& file, const std::string& origin) {
  const auto format = file.metadata.find("format"), config = file.metadata.find("config");
  if (format == file.metadata.end() || format->second != "flashlm-model" || config == file.metadata.end()) {
    throw Error(origin + " is not a FlashLM model (no 'flashlm-model' mark); train_flashlm writes them");
  }
  FlashLM model(model_config_from_json(config->second));
  load_weights(model, file.tensors, origin);
  return model;
}

void load_weights(const FlashLM& model, const std::map<std::string, at::Tensor>& weights,
                  const std::string& origin) {
  torch::NoGradGuard no_grad;
  const auto own = model->named_weights();
  for (const auto& [name, tensor] : own) {
    const auto found = weights.find(name);
    if (found == weights.end()) throw Error(origin + ": has no weight '" + name + "'");
    if (found->second.sizes() != tensor.sizes()) {
      std::ostringstream text;
      text << origin << ": weight '" << name << "' must be " << tensor.sizes() << ", got "
           << found->second.sizes();
      throw Error(text.str());
    }
    tensor.copy_(found->second);
  }
  for (const auto& [name, tensor] : weights) {
    if (!own.contains(name)) throw Error(origin + ": weight '" + name + "' is not one of this model's");
  }
}

}  // namespace flashlm

// SPDX-License-Identifier: Apache-2.0
#include "model/flash_lm.h"

#include <ATen/record_function.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/nn/functional/embedding.h>

#include <sstream>

#include "data/error.h"
#include "model/recompute.h"
#include "ops/ops.h"

namespace flashlm {
namespace {

/// A tied table for its two readers, embedding and head, whose gradients it adds up: the embedding's, of as
/// many rows as there are tokens, into the head's, where nobody else holds that. Autograd would make a third
/// table for the sum, as PyTorch 2.13 adds nothing in place that is sparse.
struct SharedTable : torch::autograd::Function<SharedTable> {
  static torch::autograd::variable_list forward(torch::autograd::AutogradContext* ctx,
                                                const at::Tensor& table) {
    ctx->set_materialize_grads(false);
    return {table.detach(), table.detach()};
  }

  static torch::autograd::variable_list backward(torch::autograd::AutogradContext*,
                                                 const torch::autograd::variable_list& grads) {
    const at::Tensor &rows = grads[0], &table = grads[1];
    if (!rows.defined() || !table.defined()) return {rows.defined() ? rows : table};
    const bool is_ours =
        !at::GradMode::is_enabled() && table.use_count() == 1 && table.storage().use_count() == 1;
    return {is_ours ? table.add_(rows) : table + rows};
  }
};

/// The table's gradient has as many rows as there are tokens if `sparse`: to be added to one that is dense.
at::Tensor embed(const at::Tensor& table, const at::Tensor& tokens, double scale, bool sparse) {
  RECORD_USER_SCOPE("embedding");
  const at::Tensor rows =
      torch::embedding(table, tokens, /*padding_idx=*/-1, /*scale_grad_by_freq=*/false, sparse);
  return scale == 1 ? rows : rows * scale;
}

ModelConfig checked_config(const SafeTensors& file, const std::string& origin) {
  const auto format = file.metadata.find("format"), config = file.metadata.find("config");
  if (format == file.metadata.end() || format->second != "flashlm-model" || config == file.metadata.end()) {
    throw Error(origin + " is not a FlashLM model (no 'flashlm-model' mark); train_flashlm writes them");
  }
  return model_config_from_json(config->second);
}

}  // namespace

FlashLMImpl::FlashLMImpl(const ModelConfig& config) : config_(config) {
  config.validate();
  if (config.head == "hierarchical") config_.classes = config.class_count();
  // The key is v3's "embedding.weight"; its "lm_head.weight" is the same tensor and is not stored again.
  struct EmbeddingImpl : torch::nn::Module {};
  const at::Tensor table = random_table(config, config.vocab_size, config.d_model);
  embedding =
      register_module("embedding", std::make_shared<EmbeddingImpl>())->register_parameter("weight", table);
  if (config.layers == 1) {
    blocks_.push_back(register_module("block", Block(config, 0)));
  } else {
    torch::nn::ModuleList blocks;
    register_module("blocks", blocks);
    for (int64_t i = 0; i < config.layers; ++i) {
      blocks_.emplace_back(config, i);
      blocks->push_back(blocks_.back());
    }
  }
  if (config.block == "hgrn-bit" && config.has_mixer("mlgru")) {
    lower_bounds_ = register_parameter("lower_bounds", torch::zeros({config.layers, config.d_model}));
  }
  final_norm_ = register_module("final_norm", RMSNorm(config.d_model, config.norm_eps));
  head_ = register_module("head", make_head(config_, embedding));
}

at::Tensor FlashLMImpl::hidden(const at::Tensor& tokens, State* state) {
  return hidden_of(embedding, tokens, state);
}

at::Tensor FlashLMImpl::hidden_of(const at::Tensor& table, const at::Tensor& tokens, State* state) {
  at::Tensor x = embed(table, tokens, config_.embedding_scale,
                       /*sparse=*/config_.tied && config_.head != "adaptive");
  std::vector<at::Tensor> lower_bounds(blocks_.size());
  if (lower_bounds_.defined()) {
    const at::Tensor p = lower_bounds_.softmax(0);
    lower_bounds = (p.cumsum(0) - p[0]).unbind(0);
  }
  at::Tensor* own_state = state == nullptr ? nullptr : state->data();
  for (int64_t pass = 0; pass < config_.recursions; ++pass) {
    for (size_t i = 0; i < blocks_.size(); ++i) {
      x = run_block(blocks_[i], x, own_state, lower_bounds[i]);
      if (own_state != nullptr) own_state += blocks_[i]->state_lengths().size();
    }
  }
  return final_norm_(x);
}

at::Tensor FlashLMImpl::run_block(Block& block, const at::Tensor& x, at::Tensor* state,
                                  const at::Tensor& lower_bound) {
  if (config_.recompute == "none" || state != nullptr || !at::GradMode::is_enabled()) {
    return block(x, state, lower_bound);
  }
  const auto body = [block](const at::Tensor& input, const at::Tensor& bound) mutable {
    return block(input, nullptr, bound);
  };
  return recompute(body, x, lower_bound, block->parameters(), config_.recompute == "bfloat16");
}

at::Tensor FlashLMImpl::forward(const at::Tensor& tokens) { return head_->logits(hidden(tokens)); }

std::tuple<at::Tensor, at::Tensor> FlashLMImpl::loss(const at::Tensor& tokens, const at::Tensor& targets,
                                                     const LossOptions& options,
                                                     const at::Tensor& positions) {
  at::Tensor rows = embedding, words = embedding;
  if (config_.tied && at::GradMode::is_enabled() && embedding.requires_grad()) {
    const auto tables = SharedTable::apply(embedding);
    rows = tables[0], words = tables[1];
  }
  at::Tensor h = hidden_of(rows, tokens, nullptr).flatten(0, 1), target = targets.flatten();
  RECORD_USER_SCOPE("head");
  if (positions.defined()) {
    h = h.index_select(0, positions);
    target = target.index_select(0, positions);
  }
  return head_->loss(h, target, options, words);
}

State FlashLMImpl::initial_state(int64_t batch) const {
  State state;
  for (int64_t pass = 0; pass < config_.recursions; ++pass) {
    for (const Block& block : blocks_) {
      for (const int64_t length : block->state_lengths()) {
        state.push_back(torch::zeros({batch, length, config_.d_model}));
      }
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
  // Of a file that is read whole the header is read twice.
  const SafeTensors header = map_safetensors(path, [](const std::string&) { return false; });
  const bool packed = checked_config(header, path.string()).packed;
  return model_from(packed ? map_safetensors(path) : load_safetensors(path), path.string());
}

FlashLM model_from(const SafeTensors& file, const std::string& origin) {
  FlashLM model(checked_config(file, origin));
  load_weights(model, file.tensors, origin);
  return model;
}

void load_weights(const FlashLM& model, const std::map<std::string, at::Tensor>& weights,
                  const std::string& origin) {
  torch::NoGradGuard no_grad;
  const auto own = model->named_weights();
  const auto parameters = model->named_parameters(), buffers = model->named_buffers();
  const auto share = [&](const std::string& name, const at::Tensor& values) {
    (parameters.contains(name) ? parameters[name] : buffers[name]).set_data(values);
  };
  for (const auto& [name, tensor] : own) {
    const auto found = weights.find(name);
    if (found == weights.end()) throw Error(origin + ": has no weight '" + name + "'");
    if (found->second.sizes() != tensor.sizes()) {
      std::ostringstream text;
      text << origin << ": weight '" << name << "' must be " << tensor.sizes() << ", got "
           << found->second.sizes();
      throw Error(text.str());
    }
    if (model->config().packed) {
      if (found->second.scalar_type() != tensor.scalar_type()) {
        throw Error(origin + ": weight '" + name + "' must be " + c10::toString(tensor.scalar_type()) +
                    ", got " + c10::toString(found->second.scalar_type()) +
                    "; make the file anew with flashlm pack");
      }
      share(name, found->second);
    } else {
      tensor.copy_(found->second);
    }
  }
  for (const auto& [name, tensor] : weights) {
    if (!own.contains(name)) throw Error(origin + ": weight '" + name + "' is not one of this model's");
  }
}

}  // namespace flashlm

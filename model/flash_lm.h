// SPDX-License-Identifier: Apache-2.0
// The language model: embedding, a stack of blocks run over one or more times, RMSNorm, head.
#pragma once

#include <torch/nn/module.h>
#include <torch/nn/pimpl.h>

#include <filesystem>
#include <map>
#include <string>
#include <tuple>
#include <vector>

#include "model/config.h"
#include "model/heads.h"
#include "model/layers.h"
#include "model/safetensors.h"

namespace flashlm {

/// What a model remembers of the tokens it has seen: for every recursion and block, in that order, the
/// tensors of the block's token mixer (model/layers.h). Zeros mean that nothing came before.
using State = std::vector<at::Tensor>;

/// A stack of blocks, by default FlashLM v3's:
///   x = E[tokens] · embedding_scale;  `recursions` times: every block in turn;  h = final_norm(x);  then a
///   head: v3's logits are h Eᵀ.
/// With one block the parameters have exactly v3's state-dict names ("block."); with several, "blocks.<i>.".
/// Weights are drawn from torch's global generator. With config.packed, ternary weights and tables are
/// without values until load_weights gives them some, and there is no training.
///
/// 'hgrn-bit' blocks share `lower_bounds` (layers, D): p = softmax over the layers, and the lower bound of
/// layer l is p_1 + .. + p_l (from 0 on), so that higher layers forget more slowly (Qin et al. 2023, arXiv
/// 2311.04823).
class FlashLMImpl : public torch::nn::Module {
 public:
  explicit FlashLMImpl(const ModelConfig& config);

  const ModelConfig& config() const { return config_; }

  /// tokens (B, T) int64 -> logits (B, T, V), whose softmax is p(next token); see Head::logits.
  at::Tensor forward(const at::Tensor& tokens);

  /// tokens (B, T) -> final hidden states (B, T, D). With `state`, for tokens that follow those that made it;
  /// it moves on. A text fed in pieces of any size gives the hidden states of the whole.
  at::Tensor hidden(const at::Tensor& tokens, State* state = nullptr);

  /// (loss to train on, plain nll in nats per token) of `targets` (B, T), both means; see Head::loss.
  /// `positions`, if given, indexes the flattened B·T positions that count.
  std::tuple<at::Tensor, at::Tensor> loss(const at::Tensor& tokens, const at::Tensor& targets,
                                          const LossOptions& options = {}, const at::Tensor& positions = {});

  State initial_state(int64_t batch) const;

  int64_t parameter_count() const;

  Head& head() const { return *head_; }

  /// Parameters and buffers (class maps, packed weights) by name: what a file of weights holds.
  std::map<std::string, at::Tensor> named_weights() const;

  at::Tensor embedding;

 private:
  /// hidden(), of rows of `table`.
  at::Tensor hidden_of(const at::Tensor& table, const at::Tensor& tokens, State* state);
  at::Tensor run_block(Block& block, const at::Tensor& x, at::Tensor* state, const at::Tensor& lower_bound);

  ModelConfig config_;
  std::vector<Block> blocks_;
  at::Tensor lower_bounds_;
  RMSNorm final_norm_{nullptr};
  std::shared_ptr<Head> head_;
};
TORCH_MODULE(FlashLM);

/// Weights and settings in one safetensors file (docs/formats.md). load_model throws Error for a file that is
/// missing, damaged, or whose tensors are not those that its settings ask for.
void save_model(const FlashLM& model, const std::filesystem::path& path);
FlashLM load_model(const std::filesystem::path& path);

/// The same from what has been read already; `origin` names it in messages.
FlashLM model_from(const SafeTensors& file, const std::string& origin);

/// Copies `weights` into the model's parameters and buffers of the same names; a packed model shares their
/// memory instead. Error if one is missing, unknown or of another shape. `origin` says in the message where
/// they come from.
void load_weights(const FlashLM& model, const std::map<std::string, at::Tensor>& weights,
                  const std::string& origin);

}  // namespace flashlm

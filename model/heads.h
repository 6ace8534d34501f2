// SPDX-License-Identifier: Apache-2.0
// The output layers: from final hidden states to the probabilities of the next token. All are exact and
// normalised over the whole vocabulary, so that their losses compare.
#pragma once

#include <torch/nn/module.h>

#include <memory>
#include <tuple>
#include <vector>

#include "data/word_classes.h"
#include "model/config.h"
#include "model/sampling.h"

namespace flashlm {

/// How the training loss is made of the positions it is given.
struct LossOptions {
  double label_smoothing = 0;
  double z_loss = 0;
};

/// An output layer. `table` is the embedding (V, D), which is also the table of output words where weights
/// are tied; it stays a parameter of the model alone.
class Head : public torch::nn::Module {
 public:
  explicit Head(const ModelConfig& config, at::Tensor table) : config_(config), table_(std::move(table)) {}

  /// h (..., D) -> (..., V), whose softmax is p(word | h). For heads other than the full one: log p.
  virtual at::Tensor logits(const at::Tensor& h) const = 0;

  /// (loss to train on, plain nll in nats per token) of targets (N) given h (N, D), both means over the
  /// targets that are not kIgnoredTarget (data/sampler.h); see linear_cross_entropy. `table` stands for the
  /// one that weights are tied to.
  virtual std::tuple<at::Tensor, at::Tensor> loss(const at::Tensor& h, const at::Tensor& target,
                                                  const LossOptions& options,
                                                  const at::Tensor& table) const = 0;

  /// The token drawn for h (D).
  virtual int64_t sample(const at::Tensor& h, const SamplingOptions& options, at::Generator& generator) const;

  /// Divides the words as `classes` says and sets the biases, if the head has them, to the logarithms of the
  /// frequencies that `counts` (V) gives, one more for each word: so that without any h the unigram
  /// distribution is predicted. Throws Error if the classes do not fit the head.
  virtual void initialize(const WordClasses& classes, const std::vector<int64_t>& counts) = 0;

 protected:
  ModelConfig config_;
  at::Tensor table_;
};

/// Full softmax: h · Wᵀ + b. W is the embedding unless config.tied is false, b is there with
/// config.head_bias. With config.head_quantizer 'absmean' the product is bit_linear's, with its norm and int8
/// rows; where config.packed, W is then in 2 bits.
class FullHead : public Head {
 public:
  FullHead(const ModelConfig& config, at::Tensor table);
  at::Tensor logits(const at::Tensor& h) const override;
  std::tuple<at::Tensor, at::Tensor> loss(const at::Tensor& h, const at::Tensor& target,
                                          const LossOptions& options, const at::Tensor& table) const override;
  void initialize(const WordClasses& classes, const std::vector<int64_t>& counts) override;

  at::Tensor weight;         // (V, D); the embedding if tied; undefined if ternary and packed
  at::Tensor bias;           // (V), or undefined
  at::Tensor norm_scale;     // (D), of a ternary head
  at::Tensor packed, scale;  // buffers of a ternary head that is packed

 private:
  /// The ternary head's weight as bit_linear reads it, in floats, (V, D), made at each call of `floats`, or
  /// unpacked; its gradient goes straight through.
  at::Tensor ternary_weight(const at::Tensor& floats) const;
};

/// Two levels, class and word: see ops/hierarchical_cross_entropy.h. Until initialize() the classes are equal
/// runs of ids.
class HierarchicalHead : public Head {
 public:
  HierarchicalHead(const ModelConfig& config, at::Tensor table);
  at::Tensor logits(const at::Tensor& h) const override;
  std::tuple<at::Tensor, at::Tensor> loss(const at::Tensor& h, const at::Tensor& target,
                                          const LossOptions& options, const at::Tensor& table) const override;
  int64_t sample(const at::Tensor& h, const SamplingOptions& options,
                 at::Generator& generator) const override;
  void initialize(const WordClasses& classes, const std::vector<int64_t>& counts) override;

  at::Tensor class_weight, class_bias;    // (C, D), (C) or undefined
  at::Tensor word_weight, word_bias;      // (V, D), the embedding if tied; (V) or undefined
  at::Tensor class_words, class_offsets;  // (V), (C + 1): buffers
};

/// Shortlist and tails: see ops/adaptive_cross_entropy.h. Always with weights of its own. Until initialize()
/// words rank by their ids.
class AdaptiveHead : public Head {
 public:
  AdaptiveHead(const ModelConfig& config, at::Tensor table);
  at::Tensor logits(const at::Tensor& h) const override;
  std::tuple<at::Tensor, at::Tensor> loss(const at::Tensor& h, const at::Tensor& target,
                                          const LossOptions& options, const at::Tensor& table) const override;
  void initialize(const WordClasses& classes, const std::vector<int64_t>& counts) override;

  at::Tensor weight, bias;  // (S + tails, D), (S + tails) or undefined
  std::vector<at::Tensor> projections, tail_weights;
  at::Tensor word_rank;  // (V): a word's place by falling frequency; buffer
};

/// A table (rows, columns) as it starts: from N(0, config.embedding_std²), or if config.packed without
/// values.
at::Tensor random_table(const ModelConfig& config, int64_t rows, int64_t columns);

/// The head that config.head names.
std::shared_ptr<Head> make_head(const ModelConfig& config, const at::Tensor& table);

/// The classes that config's head starts from when no file gives any: hierarchical by frequency, adaptive cut
/// at its cutoffs; a full head has one class.
WordClasses default_classes(const ModelConfig& config, const std::vector<int64_t>& counts);

}  // namespace flashlm

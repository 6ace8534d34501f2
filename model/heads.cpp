// SPDX-License-Identifier: Apache-2.0
#include "model/heads.h"

#include <torch/csrc/autograd/custom_function.h>
#include <torch/nn/modules/container/modulelist.h>
#include <torch/utils.h>

#include <cmath>
#include <numeric>

#include "data/error.h"
#include "data/sampler.h"
#include "model/layers.h"
#include "ops/ops.h"

namespace flashlm {
namespace {

using TwoTensors = std::tuple<at::Tensor, at::Tensor>;

/// log of (count + 1), in double: every word is possible.
std::vector<double> log_counts(const std::vector<int64_t>& counts) {
  std::vector<double> logs;
  for (const int64_t count : counts) logs.push_back(std::log(static_cast<double>(count + 1)));
  return logs;
}

/// Sum of (count + 1) over the words of a class.
double mass(const WordClasses& classes, const std::vector<int64_t>& counts, int64_t c) {
  double sum = 0;
  for (int64_t i = classes.offsets[c]; i < classes.offsets[c + 1]; ++i) {
    sum += static_cast<double>(counts[classes.words[i]] + 1);
  }
  return sum;
}

/// values, less the logarithm of what their exponentials add up to.
void set_log_probabilities(at::Tensor& to, const std::vector<double>& values) {
  torch::NoGradGuard no_grad;
  to.copy_(torch::tensor(values, at::kDouble).log_softmax(0));
}

void check_fits(const WordClasses& classes, int64_t vocab_size, int64_t count) {
  if (classes.vocab_size() != vocab_size || classes.count() != count) {
    throw Error("the head needs " + std::to_string(count) + " classes of " + std::to_string(vocab_size) +
                " words, got " + std::to_string(classes.count()) + " of " +
                std::to_string(classes.vocab_size()) + "; make them anew with flashlm classes");
  }
}

/// forward: `value`; backward: the gradient goes to `latent` unchanged.
struct StraightThrough : torch::autograd::Function<StraightThrough> {
  static at::Tensor forward(torch::autograd::AutogradContext*, const at::Tensor& /*latent*/,
                            const at::Tensor& value) {
    return value;
  }
  static torch::autograd::variable_list backward(torch::autograd::AutogradContext*,
                                                 const torch::autograd::variable_list& grads) {
    return {grads[0], at::Tensor()};
  }
};

/// Rows as bit_linear's activation 'int8' makes them, q / s.
at::Tensor int8_rows(const at::Tensor& x) {
  at::Tensor rounded;
  {
    torch::NoGradGuard no_grad;
    const at::Tensor s = 127 / x.abs().amax(-1, /*keepdim=*/true).clamp_min(1e-5);
    rounded = (x * s).round_().clamp_(-128, 127).div_(s);
  }
  return StraightThrough::apply(x, rounded);
}

std::vector<int64_t> adaptive_offsets(const ModelConfig& config) {
  std::vector<int64_t> offsets = {0};
  offsets.insert(offsets.end(), config.cutoffs.begin(), config.cutoffs.end());
  offsets.push_back(config.vocab_size);
  return offsets;
}

}  // namespace

int64_t Head::sample(const at::Tensor& h, const SamplingOptions& options, at::Generator& generator) const {
  return flashlm::sample(logits(h), options, generator);
}

// ---- full ----

FullHead::FullHead(const ModelConfig& config, at::Tensor table) : Head(config, std::move(table)) {
  const bool ternary = config.head_quantizer != "none";
  if (config.tied) {
    weight = table_;
  } else if (ternary && config.packed) {
    std::tie(packed, scale) = empty_packed(config.vocab_size, config.d_model);
    register_buffer("packed", packed);
    register_buffer("scale", scale);
  } else {
    weight = register_parameter("weight", random_table(config, config.vocab_size, config.d_model));
  }
  if (ternary) norm_scale = register_parameter("norm_scale", torch::ones({config.d_model}));
  if (config.head_bias) bias = register_parameter("bias", torch::zeros({config.vocab_size}));
}

at::Tensor FullHead::logits(const at::Tensor& h) const {
  if (!norm_scale.defined()) return torch::linear(h, weight, bias);
  const at::Tensor z =
      packed.defined()
          ? packed_linear(h, packed, scale, config_.vocab_size, norm_scale, "int8", kLinearNormEps)
          : bit_linear(h, weight, norm_scale, config_.head_quantizer, "int8", kLinearNormEps);
  return bias.defined() ? z + bias : z;
}

at::Tensor FullHead::ternary_weight(const at::Tensor& floats) const {
  if (packed.defined()) return unpack_ternary(packed, scale, config_.vocab_size, config_.d_model);
  const at::Tensor latent = floats.detach();
  const auto [codes, gamma] = pack_ternary(latent, config_.head_quantizer);
  return StraightThrough::apply(floats, unpack_ternary(codes, gamma, latent.size(0), latent.size(1)));
}

TwoTensors FullHead::loss(const at::Tensor& h, const at::Tensor& target, const LossOptions& options,
                          const at::Tensor& table) const {
  const at::Tensor& floats = config_.tied ? table : weight;
  const bool ternary = norm_scale.defined();
  const at::Tensor rows = ternary ? int8_rows(rms_norm(h, norm_scale, kLinearNormEps)) : h;
  return linear_cross_entropy(rows, ternary ? ternary_weight(floats) : floats, optional(bias), target,
                              options.label_smoothing, options.z_loss, kIgnoredTarget, "mean",
                              config_.head_precision);
}

void FullHead::initialize(const WordClasses&, const std::vector<int64_t>& counts) {
  if (bias.defined()) set_log_probabilities(bias, log_counts(counts));
}

// ---- hierarchical ----

HierarchicalHead::HierarchicalHead(const ModelConfig& config, at::Tensor table)
    : Head(config, std::move(table)) {
  const int64_t words = config.vocab_size, count = config.class_count();
  class_weight = register_parameter("class_weight", random_table(config, count, config.d_model));
  word_weight =
      config.tied ? table_ : register_parameter("word_weight", random_table(config, words, config.d_model));
  if (config.head_bias) {
    class_bias = register_parameter("class_bias", torch::zeros({count}));
    word_bias = register_parameter("word_bias", torch::zeros({words}));
  }
  class_words = register_buffer("class_words", torch::arange(words));
  class_offsets = register_buffer("class_offsets", (torch::arange(count + 1) * words).floor_divide(count));
}

at::Tensor HierarchicalHead::logits(const at::Tensor& h) const {
  return hierarchical_log_prob(h, class_weight, optional(class_bias), word_weight, optional(word_bias),
                               class_words, class_offsets);
}

TwoTensors HierarchicalHead::loss(const at::Tensor& h, const at::Tensor& target, const LossOptions& options,
                                  const at::Tensor& table) const {
  return hierarchical_cross_entropy(h, class_weight, optional(class_bias), config_.tied ? table : word_weight,
                                    optional(word_bias), class_words, class_offsets, target,
                                    options.label_smoothing, options.z_loss, kIgnoredTarget, "mean",
                                    config_.head_precision);
}

int64_t HierarchicalHead::sample(const at::Tensor& h, const SamplingOptions& options,
                                 at::Generator& generator) const {
  return hierarchical_sample(h, class_weight, optional(class_bias), word_weight, optional(word_bias),
                             class_words, class_offsets, options.temperature, options.top_k, options.top_p,
                             generator)
      .item<int64_t>();
}

void HierarchicalHead::initialize(const WordClasses& classes, const std::vector<int64_t>& counts) {
  check_fits(classes, config_.vocab_size, config_.class_count());
  class_words.copy_(torch::tensor(classes.words));
  class_offsets.copy_(torch::tensor(classes.offsets));
  if (!class_bias.defined()) return;
  std::vector<double> of_classes;
  for (int64_t c = 0; c < classes.count(); ++c) of_classes.push_back(std::log(mass(classes, counts, c)));
  set_log_probabilities(class_bias, of_classes);
  // Only differences within a class matter.
  set_log_probabilities(word_bias, log_counts(counts));
}

// ---- adaptive ----

AdaptiveHead::AdaptiveHead(const ModelConfig& config, at::Tensor table) : Head(config, std::move(table)) {
  const int64_t d = config.d_model, tails = static_cast<int64_t>(config.cutoffs.size());
  const std::vector<int64_t> offsets = adaptive_offsets(config);
  const int64_t entries = config.cutoffs[0] + tails;
  weight = register_parameter("weight", random_table(config, entries, d));
  if (config.head_bias) bias = register_parameter("bias", torch::zeros({entries}));
  torch::nn::ModuleList list;
  register_module("tails", list);
  int64_t width = d;
  for (int64_t i = 0; i < tails; ++i) {
    struct Tail : torch::nn::Module {};
    auto tail = std::make_shared<Tail>();
    width = std::max<int64_t>(1, width / config.tail_divisor);
    const double keep = 1 / std::sqrt(static_cast<double>(d));
    projections.push_back(tail->register_parameter("projection", torch::randn({width, d}) * keep));
    tail_weights.push_back(
        tail->register_parameter("weight", random_table(config, offsets[i + 2] - offsets[i + 1], width)));
    list->push_back(tail);
  }
  word_rank = register_buffer("word_rank", torch::arange(config.vocab_size));
}

at::Tensor AdaptiveHead::logits(const at::Tensor& h) const {
  return adaptive_log_prob(h, weight, optional(bias), projections, tail_weights).index_select(-1, word_rank);
}

TwoTensors AdaptiveHead::loss(const at::Tensor& h, const at::Tensor& target, const LossOptions& options,
                              const at::Tensor& /*table*/) const {
  const at::Tensor rank =
      at::where(target == kIgnoredTarget, target, word_rank.index_select(0, target.clamp_min(0)));
  return adaptive_cross_entropy(h, weight, optional(bias), projections, tail_weights, rank,
                                options.label_smoothing, options.z_loss, kIgnoredTarget, "mean",
                                config_.head_precision);
}

void AdaptiveHead::initialize(const WordClasses& classes, const std::vector<int64_t>& counts) {
  check_fits(classes, config_.vocab_size, static_cast<int64_t>(config_.cutoffs.size()) + 1);
  if (classes.offsets != adaptive_offsets(config_)) {
    throw Error(
        "the classes of an adaptive head must be cut where it is; make them anew with flashlm classes "
        "--method cutoffs");
  }
  word_rank.index_copy_(0, torch::tensor(classes.words), torch::arange(config_.vocab_size));
  if (!bias.defined()) return;
  std::vector<double> entries;
  for (int64_t i = 0; i < config_.cutoffs[0]; ++i) {
    entries.push_back(std::log(static_cast<double>(counts[classes.words[i]] + 1)));
  }
  for (int64_t tail = 1; tail < classes.count(); ++tail) {
    entries.push_back(std::log(mass(classes, counts, tail)));
  }
  set_log_probabilities(bias, entries);
}

// ---- choice ----

at::Tensor random_table(const ModelConfig& config, int64_t rows, int64_t columns) {
  if (config.packed) return torch::empty({rows, columns});
  return torch::randn({rows, columns}) * config.embedding_std;
}

std::shared_ptr<Head> make_head(const ModelConfig& config, const at::Tensor& table) {
  if (config.head == "hierarchical") return std::make_shared<HierarchicalHead>(config, table);
  if (config.head == "adaptive") return std::make_shared<AdaptiveHead>(config, table);
  return std::make_shared<FullHead>(config, table);
}

WordClasses default_classes(const ModelConfig& config, const std::vector<int64_t>& counts) {
  if (config.head == "adaptive") return cutoff_classes(counts, config.cutoffs);
  return frequency_classes(counts, config.head == "hierarchical" ? config.class_count() : 1);
}

}  // namespace flashlm

// SPDX-License-Identifier: Apache-2.0
#include "model/convert_head.h"

#include <torch/utils.h>

#include "data/error.h"

namespace flashlm {
namespace {

/// For each class in turn: the words, mean_c and log Σ e^b.
template <class Body>
void for_each_class(const WordClasses& classes, const at::Tensor& word_weight, const at::Tensor& word_bias,
                    const Body& body) {
  const at::Tensor all = torch::tensor(classes.words);
  for (int64_t c = 0; c < classes.count(); ++c) {
    const at::Tensor words = all.slice(0, classes.offsets[c], classes.offsets[c + 1]);
    const at::Tensor bias = word_bias.index_select(0, words);
    const at::Tensor mean = bias.softmax(0).unsqueeze(0).mm(word_weight.index_select(0, words)).squeeze(0);
    body(c, words, mean, bias.logsumexp(0));
  }
}

WordClasses classes_of(const HierarchicalHead& head) {
  const auto values = [](const at::Tensor& t) {
    return std::vector<int64_t>(t.const_data_ptr<int64_t>(), t.const_data_ptr<int64_t>() + t.numel());
  };
  return {values(head.class_words), values(head.class_offsets)};
}

at::Tensor bias_of(const at::Tensor& bias, int64_t size) {
  return bias.defined() ? bias.detach().to(at::kDouble) : torch::zeros({size}, at::kDouble);
}

void copy_body(const FlashLM& from, const FlashLM& to) {
  auto weights = to->named_weights();
  for (const auto& [name, tensor] : from->named_weights()) {
    if (!name.starts_with("head.")) weights.at(name).copy_(tensor);
  }
}

FlashLM to_full(const FlashLM& model, const HierarchicalHead& from) {
  ModelConfig config = model->config();
  config.head = "full";
  config.tied = false;
  config.head_bias = true;
  FlashLM result(config);
  copy_body(model, result);
  auto& to = dynamic_cast<FullHead&>(result->head());
  const WordClasses classes = classes_of(from);
  at::Tensor weight = from.word_weight.detach().to(at::kDouble, /*non_blocking=*/false, /*copy=*/true);
  at::Tensor bias = bias_of(from.word_bias, config.vocab_size).clone();
  const at::Tensor class_weight = from.class_weight.detach().to(at::kDouble);
  const at::Tensor class_bias = bias_of(from.class_bias, classes.count());
  for_each_class(classes, weight.clone(), bias.clone(),
                 [&](int64_t c, const at::Tensor& words, const at::Tensor& mean, const at::Tensor& lse) {
                   const at::Tensor shift = class_weight[c] - mean;
                   weight.index_add_(0, words, shift.expand({words.size(0), -1}));
                   bias.index_add_(0, words, (class_bias[c] - lse).expand({words.size(0)}));
                 });
  to.weight.copy_(weight);
  to.bias.copy_(bias);
  return result;
}

FlashLM to_hierarchical(const FlashLM& model, const FullHead& from, const WordClasses& classes) {
  ModelConfig config = model->config();
  config.head = "hierarchical";
  config.classes = classes.count();
  config.head_bias = true;
  FlashLM result(config);
  copy_body(model, result);
  auto& to = dynamic_cast<HierarchicalHead&>(result->head());
  to.initialize(classes, std::vector<int64_t>(config.vocab_size, 0));
  const at::Tensor weight = from.weight.detach().to(at::kDouble);
  const at::Tensor bias = bias_of(from.bias, config.vocab_size);
  for_each_class(classes, weight, bias,
                 [&](int64_t c, const at::Tensor&, const at::Tensor& mean, const at::Tensor& lse) {
                   to.class_weight[c].copy_(mean);
                   to.class_bias[c].copy_(lse);
                 });
  to.word_weight.copy_(weight);
  to.word_bias.copy_(bias);
  return result;
}

}  // namespace

FlashLM convert_head(const FlashLM& model, const std::string& head,
                     const std::optional<WordClasses>& classes) {
  torch::NoGradGuard no_grad;
  const std::string& from = model->config().head;
  if (model->config().packed) throw Error("the model is packed; convert the one that it was made from");
  if (model->config().head_quantizer != "none") throw Error("a ternary head cannot be converted");
  if (head == "full" && from == "hierarchical") {
    return to_full(model, dynamic_cast<const HierarchicalHead&>(model->head()));
  }
  if (head == "hierarchical" && from == "full") {
    if (!classes) throw Error("a hierarchical head needs --class-file; make one with flashlm classes");
    return to_hierarchical(model, dynamic_cast<const FullHead&>(model->head()), *classes);
  }
  throw Error("heads are converted from full to hierarchical and back, got from " + from + " to " + head);
}

}  // namespace flashlm

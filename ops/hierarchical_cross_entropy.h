// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <ATen/core/Generator.h>
#include <ATen/core/Tensor.h>

#include <optional>
#include <tuple>

namespace flashlm {

// The two-level ("class-based", hierarchical) softmax of Goodman 2001 (arXiv cs/0108006) and Mikolov et al.
// 2011: the V words are divided among C classes, and
//   p(w | h) = p(c | h) p(w | c, h),  c the class of w,
//   p(c | h)    = softmax over the C classes of   h · class_weightᵀ + class_bias
//   p(w | c, h) = softmax over the words of c of  h · word_weightᵀ + word_bias
// With C ≈ √V a position meets some 2 √V rows of weights instead of V.
//
//   h              (..., D)  float32, bfloat16 or float64, any strides
//   class_weight   (C, D)    same dtype;  class_bias (C) or none
//   word_weight    (V, D)    same dtype, may be the embedding table;  word_bias (V) or none
//   class_words    (V)       int64: all words, class after class, in any order within one
//   class_offsets  (C + 1)   int64: class c is class_words[class_offsets[c] .. class_offsets[c + 1]); the
//                            first is 0, the last V, and no class is empty
//
// Errors of all functions: wrong dtypes, shapes that do not fit, class_offsets that do not rise from 0 to V,
// a word in class_words outside [0, V). Of the loss and of log_prob: a word that is named twice, so that
// another is missing. Of the loss, top_k and sample: a log-sum-exp that is not finite, among those they need;
// log_prob has NaN there. A single word's logit may be -inf.

/// Cross-entropy with that softmax, without a (N, V) matrix. For each of the N positions y its target and c
/// the class of y, with lse the log-sum-exp of a level's logits z:
///   nll  = -log p(y | h), in nats: the sum of both levels' lse - z
///   loss = the sum over both levels of linear_cross_entropy's loss: its smoothing spreads over the classes,
///          and over the words of the target's class
///
///   target  (...)  int64, h's leading dimensions; ignore_index leaves a position out
///   returns loss and nll as linear_cross_entropy does
///
/// A composite of linear_cross_entropy over the classes and of a second level in which positions are grouped
/// by class, so that it is a dense product of a class's positions by its words. As there, a loss that is a
/// scalar gets its gradients in the forward pass: each class's logits are computed once, as long as they are
/// not more than a million, and every row of word_weight that is needed is read from memory once, every row
/// of its gradient written once. A class is the work of one thread: results do not depend on their number,
/// and a class with most of the positions bounds the speed. Extra memory of a thread, in values, for a class
/// of M positions: 3 M D + 256 (4 D + 272), and up to 2^20 of logits; none depends on N V. bfloat16 is
/// computed in float32, on copies of h and word_weight. `precision` is that of both levels' products.
/// Double backward is refused.
/// Schema: flashlm::hierarchical_cross_entropy(Tensor h, Tensor class_weight, Tensor? class_bias,
///   Tensor word_weight, Tensor? word_bias, Tensor class_words, Tensor class_offsets, Tensor target, *,
///   float label_smoothing=0., float z_loss=0., int ignore_index=-100, str reduction="mean",
///   str precision="float32") -> (Tensor loss, Tensor nll)
std::tuple<at::Tensor, at::Tensor> hierarchical_cross_entropy(
    const at::Tensor& h, const at::Tensor& class_weight, const std::optional<at::Tensor>& class_bias,
    const at::Tensor& word_weight, const std::optional<at::Tensor>& word_bias, const at::Tensor& class_words,
    const at::Tensor& class_offsets, const at::Tensor& target, double label_smoothing = 0, double z_loss = 0,
    int64_t ignore_index = -100, c10::string_view reduction = "mean", c10::string_view precision = "float32");

/// log p(w | h) of all words: (..., V), differentiable; float32 for bfloat16.
/// Schema: flashlm::hierarchical_log_prob(Tensor h, Tensor class_weight, Tensor? class_bias,
///   Tensor word_weight, Tensor? word_bias, Tensor class_words, Tensor class_offsets) -> Tensor
at::Tensor hierarchical_log_prob(const at::Tensor& h, const at::Tensor& class_weight,
                                 const std::optional<at::Tensor>& class_bias, const at::Tensor& word_weight,
                                 const std::optional<at::Tensor>& word_bias, const at::Tensor& class_words,
                                 const at::Tensor& class_offsets);

/// The k likeliest words and their log p(w | h), likeliest first: (..., k) each; log_prob in float32 for
/// bfloat16. Exact: classes are visited in the order of p(c), until p(c) is below the k-th best p(w) found,
/// so that a peaked distribution costs a class or two. No derivative: it is refused in words.
/// Schema: flashlm::hierarchical_top_k(Tensor h, Tensor class_weight, Tensor? class_bias,
///   Tensor word_weight, Tensor? word_bias, Tensor class_words, Tensor class_offsets, int k)
///   -> (Tensor log_prob, Tensor word)
std::tuple<at::Tensor, at::Tensor> hierarchical_top_k(const at::Tensor& h, const at::Tensor& class_weight,
                                                      const std::optional<at::Tensor>& class_bias,
                                                      const at::Tensor& word_weight,
                                                      const std::optional<at::Tensor>& word_bias,
                                                      const at::Tensor& class_words,
                                                      const at::Tensor& class_offsets, int64_t k);

/// A word drawn for each h, (...) int64, from exactly the distribution that sampling from all V logits
/// log p(w | h) would have: probabilities p^(1/temperature), normalised over V; temperature 0 is the
/// likeliest word. Of the top_k likeliest words only (0: all), then of the fewest of these whose tempered
/// probability reaches top_p. Costs O(D √V) as a rule: a class is proposed, and kept with the probability
/// that makes the result exact (rejection sampling; the sum of a class's tempered probabilities has a bound
/// known without its words). With top_p, classes are read in the order of p(c) until bounds of the rest
/// settle which word is drawn; a flat distribution at a temperature other than 1 may take many. Draws from
/// `generator`, or from torch's global one.
/// Schema: flashlm::hierarchical_sample(Tensor h, Tensor class_weight, Tensor? class_bias,
///   Tensor word_weight, Tensor? word_bias, Tensor class_words, Tensor class_offsets, *,
///   float temperature=1., int top_k=0, float top_p=1., Generator? generator=None) -> Tensor
at::Tensor hierarchical_sample(const at::Tensor& h, const at::Tensor& class_weight,
                               const std::optional<at::Tensor>& class_bias, const at::Tensor& word_weight,
                               const std::optional<at::Tensor>& word_bias, const at::Tensor& class_words,
                               const at::Tensor& class_offsets, double temperature = 1, int64_t top_k = 0,
                               double top_p = 1, std::optional<at::Generator> generator = std::nullopt);

}  // namespace flashlm

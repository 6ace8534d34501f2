// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>
#include <tuple>

namespace flashlm {

// The adaptive softmax of Grave et al. 2017 (arXiv 1609.04309), with the numbers of
// torch.nn.AdaptiveLogSoftmaxWithLoss. Words are numbered by falling frequency. The first S, the shortlist,
// stand in the head beside one entry for each of the n tails; tail i holds the next V_i words, of which
//   p(w | h) = p(tail i | h) · softmax over the tail of (h · projection_iᵀ) · weight_iᵀ
//
//   h                 (..., D)     float32, bfloat16 or float64, any strides
//   head_weight       (S + n, D)   same dtype;  head_bias (S + n) or none
//   tail_projections  n of (D_i, D), tail_weights n of (V_i, D_i): same dtype;  V = S + V_1 + ... + V_n

/// Cross-entropy with that softmax. For each position the loss is linear_cross_entropy's in the head, plus
/// that in the tail of its target, if it is in one; likewise nll = -log p(target | h), in nats.
///
///   target   (...)  int64 in [0, V), h's leading dimensions; ignore_index leaves a position out
///   returns  loss and nll as linear_cross_entropy does
///
/// A composite of linear_cross_entropy and linear: every tail's projection is made of all N positions, the
/// rest of its work only of those whose targets it has. Errors: as linear_cross_entropy's; no tail, or not as
/// many projections as weights.
/// Schema: flashlm::adaptive_cross_entropy(Tensor h, Tensor head_weight, Tensor? head_bias,
///   Tensor[] tail_projections, Tensor[] tail_weights, Tensor target, *, float label_smoothing=0.,
///   float z_loss=0., int ignore_index=-100, str reduction="mean", str precision="float32")
///   -> (Tensor loss, Tensor nll)
std::tuple<at::Tensor, at::Tensor> adaptive_cross_entropy(
    const at::Tensor& h, const at::Tensor& head_weight, const std::optional<at::Tensor>& head_bias,
    at::TensorList tail_projections, at::TensorList tail_weights, const at::Tensor& target,
    double label_smoothing = 0, double z_loss = 0, int64_t ignore_index = -100,
    c10::string_view reduction = "mean", c10::string_view precision = "float32");

/// log p(w | h) of all words: (..., V), differentiable; float32 for bfloat16.
/// Schema: flashlm::adaptive_log_prob(Tensor h, Tensor head_weight, Tensor? head_bias,
///   Tensor[] tail_projections, Tensor[] tail_weights) -> Tensor
at::Tensor adaptive_log_prob(const at::Tensor& h, const at::Tensor& head_weight,
                             const std::optional<at::Tensor>& head_bias, at::TensorList tail_projections,
                             at::TensorList tail_weights);

}  // namespace flashlm

// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>
#include <tuple>

namespace flashlm {

/// Output layer and cross-entropy in one, without the (N, V) matrix of logits. With z = h · weightᵀ + bias,
/// and for each of the N positions y its target and lse = log Σⱼ exp zⱼ:
///   nll  = lse - z_y                                                        = -log p(y), in nats
///   loss = (1 - label_smoothing) nll + label_smoothing (lse - meanⱼ zⱼ) + z_loss lse²
/// Gradient of the loss in the logits: (1 + 2 z_loss lse) pⱼ - (1 - label_smoothing) [j = y] -
/// label_smoothing/V.
///
///   h        (..., D)  float32, bfloat16 or float64, any strides
///   weight   (V, D)    same dtype
///   bias     (V)       same dtype, or none
///   target   (...)     int64, h's leading dimensions; ignore_index leaves a position out
///   returns  loss, differentiable in h, weight and bias; and nll, which is not, for reporting: it means the
///            same whatever the smoothing. "mean" (over the positions not ignored; nan if there are none) and
///            "sum" give scalars, "none" gives (...) with 0 at ignored positions. float64 for float64 inputs,
///            else float32: a bfloat16 loss near 10 would be rounded to steps of 0.06.
///
/// `precision` says what the products multiply, here the logits and, going back, the two products of their
/// gradient with weight and with h. All else is float32 (float64 for float64 inputs):
///   "float32"   the values as they are
///   "bfloat16"  operands rounded to bfloat16, sums in float32, at twice the rate; the probabilities that a
///               scalar loss keeps for its gradients (below) too. With AVX512-BF16; a CPU without such an
///               instruction, and float64, take "float32".
///
/// The vocabulary is cut into blocks of 256 words, and those into S slabs, 32 at most. Where S is small the
/// rows are cut too, into G groups of 512 or more, so that there are up to 16 tasks for the threads; G = 1
/// from S = 9 on. The results do not depend on the number of threads.
///
/// Without gradients, one pass keeps a running log-sum-exp per position. For a scalar loss ("mean", "sum")
/// under autograd the forward pass computes the gradients too, by chunks of rows (as Liger Kernel, arXiv
/// 2410.10989): a chunk's logits, in "bfloat16" their exponentials, are kept between their log-sum-exp and
/// their gradient, and the backward pass multiplies by the gradient of the loss. For "none" that gradient
/// comes first, and the backward pass computes each block's logits again (as Wijmans et al. 2024, arXiv
/// 2411.09009), four products instead of three. Extra memory, in values of 4 bytes (8 for float64), with P
/// threads:
///   forward                 3 S N + 256 P (D + 272)
///   gradients, "none"       (S + 1) G · 512 D + 256 P (2 D + 272), beside the gradients; G V D more if G > 1
///   gradients of a scalar   the sum of both, and a chunk's logits: 2^26 bytes, which stay for the next call,
///                           or, if more, 273 V values; in "bfloat16" of 2 bytes, and a hundredth more
/// and N D more for a copy of h if positions are ignored. bfloat16 tensors are computed in float32, on copies
/// of h and weight. Precision "bfloat16" packs h once, N D / 2, and takes no more than the above otherwise.
/// Double backward is refused.
///
/// Errors: wrong dtypes, shapes that do not fit, V = 0, a target outside [0, V) that is not ignore_index,
/// label_smoothing outside [0, 1), z_loss < 0, another reduction or precision; and, as a ValueError, a
/// position whose logits have a NaN or +inf (-inf in bias masks words).
///
/// Schema: flashlm::linear_cross_entropy(Tensor h, Tensor weight, Tensor? bias, Tensor target, *,
///   float label_smoothing=0., float z_loss=0., int ignore_index=-100, str reduction="mean",
///   str precision="float32") -> (Tensor loss, Tensor nll)
std::tuple<at::Tensor, at::Tensor> linear_cross_entropy(const at::Tensor& h, const at::Tensor& weight,
                                                        const std::optional<at::Tensor>& bias,
                                                        const at::Tensor& target, double label_smoothing = 0,
                                                        double z_loss = 0, int64_t ignore_index = -100,
                                                        c10::string_view reduction = "mean",
                                                        c10::string_view precision = "float32");

}  // namespace flashlm

// SPDX-License-Identifier: Apache-2.0
// From a full softmax to a hierarchical one and back.
#pragma once

#include <optional>

#include "model/flash_lm.h"

namespace flashlm {

/// The same model with another head, `head` = "full" or "hierarchical"; `classes` are those of the latter.
/// With word vectors w_i and biases b_i, class vectors u_c and biases b_c, p_i = softmax over i's class of
/// its biases, and mean_c = the sum over the class of p_i w_i:
///
///   full -> hierarchical   u_c = mean_c, b_c = log Σ e^b_i over the class; w_i and b_i stay
///   hierarchical -> full   w_i + u_c - mean_c and b_i + b_c - log Σ e^b_i, i in class c; in a table of its
///   own
///
/// The two undo each other. Probabilities stay the same where a class's log Σ e^(h·w_i + b_i) is linear in h:
/// for classes of one word, and if there is only one class. In general no softmax of one kind equals one of
/// the other; then they are the same at h = 0, and to first order near it. A converted model is a start to
/// train on from, not a copy. Throws Error for another head than these two, or if the model has that one
/// already.
FlashLM convert_head(const FlashLM& model, const std::string& head,
                     const std::optional<WordClasses>& classes = std::nullopt);

}  // namespace flashlm

// SPDX-License-Identifier: Apache-2.0
// A model for inference: its ternary weights in 2 bits each.
#pragma once

#include "model/flash_lm.h"

namespace flashlm {

/// The model with every ternary weight, those of a ternary head included, as ops/pack_ternary.h makes them.
/// It gives the same results to the last bit in activation mode 'int8', and cannot be trained. What is not
/// ternary is shared with `model`, not copied. Error: it is packed already.
FlashLM pack(const FlashLM& model);

/// A packed model of these settings with random weights, made layer by layer: the float weights of a model
/// that is too large for memory never are there at once. For measurements of time and memory.
FlashLM random_packed(ModelConfig config);

}  // namespace flashlm

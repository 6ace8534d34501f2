// SPDX-License-Identifier: Apache-2.0
// The checkpoints released with "Scalable MatMul-free Language Modeling" (arXiv 2406.02528),
// HGRNBitForCausalLM in Hugging Face's layout, as FlashLM models.
#pragma once

#include <map>
#include <string>

#include "model/flash_lm.h"

namespace flashlm {

/// The model of a checkpoint's tensors, which may be float32, float16 or bfloat16. Its sizes are read off
/// their shapes; settings that no shape tells have the values of the released models: eps 1e-6, a head of its
/// own weights, ternary.
///
///   model.embeddings.weight (V, D)        lm_head.weight (V, D), lm_head.norm.weight (D)
///   model.lower_bounds (L, D)             model.norm.weight (D)
///   model.layers.<i>.attn_norm.weight, .mlp_norm.weight, .attn.g_norm.weight (D)
///   model.layers.<i>.attn.{i,f,g,o}_proj.weight (D, D), .norm.weight (D)
///   model.layers.<i>.mlp.gate_proj.weight (2 H, D), .norm.weight (D);  .down_proj.weight (D, H),
///   .norm.weight (H)
///
/// Error: a tensor is missing, of another shape, or not one of these (short convolutions, for example), in
/// one line; `origin` names the file in it.
FlashLM from_hgrn_bit(const std::map<std::string, at::Tensor>& tensors, const std::string& origin);

}  // namespace flashlm

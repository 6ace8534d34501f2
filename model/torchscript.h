// SPDX-License-Identifier: Apache-2.0
// A trained model as one TorchScript file.
#pragma once

#include <torch/csrc/jit/api/module.h>

#include <filesystem>
#include <string>

#include "model/flash_lm.h"

namespace flashlm {

/// The model as a TorchScript module whose code calls the flashlm:: operators, with v3's parameter names and
///   forward(tokens) -> logits                    (B, T) int64 -> (B, T, V)
///   initial_state(batch) -> state                a list of (B, _, D) tensors, zeros: see State
///   step(tokens, state) -> (logits, state)       any number of tokens that follow those that made `state`
///   generate(tokens, max_new_tokens, temperature=0.8, top_k=0, top_p=1.0) -> (B, T + max_new_tokens)
/// Sampling uses torch's global generator (torch.manual_seed).
torch::jit::Module to_torchscript(const FlashLM& model);

/// Saves it with the extra files "config.json" (the model's settings) and "tokenizer.model" (if not empty).
/// Load with torch::jit::load, or torch.jit.load in Python after
/// torch.ops.load_library(".../libflashlm_ops.so").
void export_torchscript(const FlashLM& model, const std::string& tokenizer,
                        const std::filesystem::path& path);

}  // namespace flashlm

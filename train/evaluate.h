// SPDX-License-Identifier: Apache-2.0
// How well a model predicts held-out tokens.
#pragma once

#include <optional>
#include <vector>

#include "data/sampler.h"
#include "data/tokenizer.h"
#include "model/flash_lm.h"

namespace flashlm {

/// Bytes of text that each token id stands for; control tokens stand for none.
std::vector<int32_t> token_bytes(const Tokenizer& tokenizer);

struct Evaluation {
  double nats_per_token = 0;            // plain cross-entropy over the whole vocabulary
  std::optional<double> bits_per_byte;  // the same per byte of text, if the tokens' bytes are known
  int64_t tokens = 0;                   // predicted
};

/// Cuts the first max_tokens (0: all) of the held-out tokens into windows of seq_len + 1 tokens that share
/// one token, and predicts every token of a window but its first from those before it in the window. Of
/// several sources each gives the first max_tokens · weight / (sum of weights), or all that it has if that is
/// less; one that would give fewer than two gives none. Every predicted token counts the same. `bytes` is
/// token_bytes(), or empty. bits_per_byte = total nats / ln 2 / bytes of the predicted tokens. Throws Error
/// if there are fewer than two tokens.
Evaluation evaluate(FlashLM& model, const std::vector<TokenSource>& held_out, int64_t seq_len,
                    int64_t max_tokens, const std::vector<int32_t>& bytes);

}  // namespace flashlm

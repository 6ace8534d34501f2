// SPDX-License-Identifier: Apache-2.0
#include "train/evaluate.h"

#include <torch/utils.h>

#include <algorithm>
#include <cmath>

#include "data/error.h"

namespace flashlm {

std::vector<int32_t> token_bytes(const Tokenizer& tokenizer) {
  std::vector<int32_t> bytes(tokenizer.vocab_size());
  for (size_t id = 0; id < bytes.size(); ++id) {
    bytes[id] = static_cast<int32_t>(tokenizer.token_text(static_cast<int32_t>(id)).size());
  }
  return bytes;
}

Evaluation evaluate(FlashLM& model, const std::vector<TokenSource>& held_out, int64_t seq_len,
                    int64_t max_tokens, const std::vector<int32_t>& bytes) {
  torch::NoGradGuard no_grad;
  constexpr int64_t kTokensAtOnce = 4096;
  double weights = 0;
  for (const TokenSource& source : held_out) weights += source.weight;
  double nats = 0;
  int64_t given = 0, predicted = 0, text_bytes = 0;
  for (const auto& [shard, weight, name] : held_out) {
    const auto share = static_cast<int64_t>(static_cast<double>(max_tokens) * (weight / weights));
    const int64_t size = max_tokens > 0 ? std::min(share, shard.size()) : shard.size();
    given += size;
    for (int64_t begin = 0; begin + 1 < size;) {
      // As many whole windows as make a good batch; the last one may be shorter.
      const int64_t left = size - 1 - begin, length = std::min(seq_len, left);
      const int64_t rows = std::clamp<int64_t>(kTokensAtOnce / length, 1, left / length);
      std::vector<int64_t> ids(rows * length + 1);
      shard.copy(begin, ids);
      const at::Tensor all = torch::tensor(ids);
      const at::Tensor inputs = all.slice(0, 0, rows * length).view({rows, length});
      const at::Tensor targets = all.slice(0, 1).view({rows, length});
      nats += std::get<1>(model->loss(inputs, targets)).item<double>() * static_cast<double>(rows * length);
      predicted += rows * length;
      if (!bytes.empty()) {
        for (size_t i = 1; i < ids.size(); ++i) text_bytes += bytes[ids[i]];
      }
      begin += rows * length;
    }
  }
  if (predicted == 0) {
    throw Error("evaluation needs at least 2 tokens, got " + std::to_string(given) +
                "; hold out more with flashlm prepare --val-fraction");
  }
  Evaluation result{nats / static_cast<double>(predicted), std::nullopt, predicted};
  if (text_bytes > 0) result.bits_per_byte = nats / std::log(2.0) / static_cast<double>(text_bytes);
  return result;
}

}  // namespace flashlm

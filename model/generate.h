// SPDX-License-Identifier: Apache-2.0
// Sampling text from a model, one token at a time on its incremental state.
#pragma once

#include <cstdint>
#include <functional>
#include <vector>

#include "model/flash_lm.h"

namespace flashlm {

struct SamplingOptions {
  double temperature = 0.8;  // 0: always the most likely token
  int64_t top_k = 0;         // keep the k most likely tokens; 0: all
  double top_p = 1.0;  // then the fewest whose probability reaches p (nucleus sampling, arXiv 1904.09751)
  uint64_t seed = 0;

  /// Throws Error naming the first option that cannot be.
  void validate() const;
};

/// Draws tokens from logits (V). The same seed and logits give the same tokens.
class Sampler {
 public:
  explicit Sampler(const SamplingOptions& options);
  int32_t operator()(const at::Tensor& logits);

 private:
  SamplingOptions options_;
  at::Generator generator_;
};

/// The tokens that follow `prompt` (at least one token): at most max_tokens, fewer if `stop_at` is drawn,
/// which is not returned. on_token, if given, gets each as it is drawn.
std::vector<int32_t> generate(FlashLM& model, const std::vector<int32_t>& prompt, int64_t max_tokens,
                              int32_t stop_at, const SamplingOptions& options,
                              const std::function<void(int32_t)>& on_token = {});

}  // namespace flashlm

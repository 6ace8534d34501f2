// SPDX-License-Identifier: Apache-2.0
// Sampling text from a model, one token at a time on its incremental state.
#pragma once

#include <cstdint>
#include <functional>
#include <vector>

#include "model/flash_lm.h"
#include "model/sampling.h"

namespace flashlm {

/// The tokens that follow `prompt` (at least one token): at most max_tokens, fewer if `stop_at` is drawn,
/// which is not returned. on_token, if given, gets each as it is drawn.
std::vector<int32_t> generate(FlashLM& model, const std::vector<int32_t>& prompt, int64_t max_tokens,
                              int32_t stop_at, const SamplingOptions& options,
                              const std::function<void(int32_t)>& on_token = {});

}  // namespace flashlm

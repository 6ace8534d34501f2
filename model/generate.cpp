// SPDX-License-Identifier: Apache-2.0
#include "model/generate.h"

#include <ATen/CPUGeneratorImpl.h>
#include <torch/utils.h>

namespace flashlm {

std::vector<int32_t> generate(FlashLM& model, const std::vector<int32_t>& prompt, int64_t max_tokens,
                              int32_t stop_at, const SamplingOptions& options,
                              const std::function<void(int32_t)>& on_token) {
  TORCH_CHECK(!prompt.empty(), "generate: prompt must have at least one token");
  torch::NoGradGuard no_grad;
  options.validate();
  at::Generator generator = at::make_generator<at::CPUGeneratorImpl>(options.seed);
  State state = model->initial_state(/*batch=*/1);
  at::Tensor input = torch::tensor(std::vector<int64_t>(prompt.begin(), prompt.end())).unsqueeze(0);
  std::vector<int32_t> tokens;
  while (static_cast<int64_t>(tokens.size()) < max_tokens) {
    // Only the last position's token is wanted: the output layer is most of the work.
    const at::Tensor last = model->hidden(input, &state).select(1, -1).squeeze(0);
    const auto token = static_cast<int32_t>(model->head().sample(last, options, generator));
    if (token == stop_at) break;
    tokens.push_back(token);
    if (on_token) on_token(token);
    input = torch::full({1, 1}, token, at::kLong);
  }
  return tokens;
}

}  // namespace flashlm

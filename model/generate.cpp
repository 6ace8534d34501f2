// SPDX-License-Identifier: Apache-2.0
#include "model/generate.h"

#include <ATen/CPUGeneratorImpl.h>
#include <torch/utils.h>

#include "data/error.h"

namespace flashlm {

void SamplingOptions::validate() const {
  if (!(temperature >= 0)) throw Error("--temperature must be >= 0, got " + std::to_string(temperature));
  if (top_k < 0) throw Error("--top-k must be >= 0, got " + std::to_string(top_k));
  if (!(top_p > 0 && top_p <= 1)) throw Error("--top-p must be in (0, 1], got " + std::to_string(top_p));
}

Sampler::Sampler(const SamplingOptions& options)
    : options_(options), generator_(at::make_generator<at::CPUGeneratorImpl>(options.seed)) {
  options.validate();
}

int32_t Sampler::operator()(const at::Tensor& logits) {
  if (options_.temperature == 0) return static_cast<int32_t>(logits.argmax().item<int64_t>());
  // Sorted, both filters keep a prefix.
  auto [sorted, order] =
      (logits.to(at::kDouble) / options_.temperature).sort(/*dim=*/-1, /*descending=*/true);
  if (options_.top_k > 0) sorted = sorted.slice(0, 0, options_.top_k);
  at::Tensor p = sorted.softmax(-1);
  if (options_.top_p < 1) {
    // A token stays if those before it have not yet reached p; the first always does.
    p = p * ((p.cumsum(-1) - p) < options_.top_p);
  }
  const int64_t drawn = p.multinomial(1, /*replacement=*/false, generator_).item<int64_t>();
  return static_cast<int32_t>(order[drawn].item<int64_t>());
}

std::vector<int32_t> generate(FlashLM& model, const std::vector<int32_t>& prompt, int64_t max_tokens,
                              int32_t stop_at, const SamplingOptions& options,
                              const std::function<void(int32_t)>& on_token) {
  TORCH_CHECK(!prompt.empty(), "generate: prompt must have at least one token");
  torch::NoGradGuard no_grad;
  Sampler sample(options);
  State state = model->initial_state(/*batch=*/1);
  at::Tensor input = torch::tensor(std::vector<int64_t>(prompt.begin(), prompt.end())).unsqueeze(0);
  std::vector<int32_t> tokens;
  while (static_cast<int64_t>(tokens.size()) < max_tokens) {
    // Only the last position's logits are wanted: the output layer is most of the work.
    const at::Tensor last = model->hidden(input, &state).select(1, -1);
    const int32_t token = sample(torch::linear(last, model->embedding).squeeze(0));
    if (token == stop_at) break;
    tokens.push_back(token);
    if (on_token) on_token(token);
    input = torch::full({1, 1}, token, at::kLong);
  }
  return tokens;
}

}  // namespace flashlm

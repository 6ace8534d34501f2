// SPDX-License-Identifier: Apache-2.0
#include "model/sampling.h"

#include <torch/utils.h>

#include "data/error.h"

namespace flashlm {

void SamplingOptions::validate() const {
  if (!(temperature >= 0)) throw Error("--temperature must be >= 0, got " + std::to_string(temperature));
  if (top_k < 0) throw Error("--top-k must be >= 0, got " + std::to_string(top_k));
  if (!(top_p > 0 && top_p <= 1)) throw Error("--top-p must be in (0, 1], got " + std::to_string(top_p));
}

int64_t sample(const at::Tensor& logits, const SamplingOptions& options, at::Generator& generator) {
  if (options.temperature == 0) return logits.argmax().item<int64_t>();
  // Sorted, both filters keep a prefix.
  auto [sorted, order] = (logits.to(at::kDouble) / options.temperature).sort(/*dim=*/-1, /*descending=*/true);
  if (options.top_k > 0) sorted = sorted.slice(0, 0, options.top_k);
  at::Tensor p = sorted.softmax(-1);
  if (options.top_p < 1) {
    // A token stays if those before it have not yet reached p; the first always does.
    p = p * ((p.cumsum(-1) - p) < options.top_p);
  }
  const int64_t drawn = p.multinomial(1, /*replacement=*/false, generator).item<int64_t>();
  return order[drawn].item<int64_t>();
}

}  // namespace flashlm

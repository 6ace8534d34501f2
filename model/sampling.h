// SPDX-License-Identifier: Apache-2.0
// How tokens are drawn from probabilities.
#pragma once

#include <ATen/core/Generator.h>
#include <ATen/core/Tensor.h>

#include <cstdint>

namespace flashlm {

struct SamplingOptions {
  double temperature = 0.8;  // 0: always the most likely token
  int64_t top_k = 0;         // keep the k most likely tokens; 0: all
  double top_p = 1.0;  // then the fewest whose probability reaches p (nucleus sampling, arXiv 1904.09751)
  uint64_t seed = 0;

  /// Throws Error naming the first option that cannot be.
  void validate() const;
};

/// A token drawn from logits (V). The same generator state and logits give the same token.
int64_t sample(const at::Tensor& logits, const SamplingOptions& options, at::Generator& generator);

}  // namespace flashlm

// SPDX-License-Identifier: Apache-2.0
// ggml as a peer, loaded from a folder at run time: FlashLM neither needs it nor is built with it.
#pragma once

#include <torch/torch.h>

#include <filesystem>
#include <memory>
#include <string>
#include <vector>

#include "bench/contest.h"

namespace flashlm::bench {

class Ggml {
 public:
  /// The weight formats that ternary weights are stored in with ggml, and two for comparison.
  static const std::vector<std::string>& formats();

  /// Loads libggml-base.so and libggml-cpu.so, which may lie at any depth in `folder`. Throws in words.
  explicit Ggml(const std::filesystem::path& folder);
  ~Ggml();

  /// Version, commit and the instruction sets that it was built with: those cannot be changed at run time.
  std::string description() const;

  /// y = x weightᵀ as ggml computes a graph with one matrix product, on `threads` threads; x is quantized in
  /// it. x (M, K) and weight (N, K) are float32; K is padded with zeros to whole blocks of the format.
  Contestant product(const std::string& format, const at::Tensor& x, const at::Tensor& weight,
                     int threads) const;

  /// The same on this thread, without a graph: quantize x, then one vec_dot for each output.
  Contestant kernel(const std::string& format, const at::Tensor& x, const at::Tensor& weight) const;

  /// K as the format needs it.
  int64_t padded(const std::string& format, int64_t k) const;

 private:
  struct Api;
  std::shared_ptr<const Api> api_;
};

}  // namespace flashlm::bench

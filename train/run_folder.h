// SPDX-License-Identifier: Apache-2.0
// Where a training run keeps its things.
#pragma once

#include <filesystem>
#include <vector>

namespace flashlm {

class RunFolder {
 public:
  explicit RunFolder(std::filesystem::path path) : path_(std::move(path)) {}

  const std::filesystem::path& path() const { return path_; }
  std::filesystem::path config() const { return path_ / "config.toml"; }
  std::filesystem::path metrics() const { return path_ / "metrics.jsonl"; }
  std::filesystem::path plot() const { return path_ / "loss.svg"; }
  std::filesystem::path samples() const { return path_ / "samples.txt"; }
  std::filesystem::path tokenizer() const { return path_ / "tokenizer.model"; }
  std::filesystem::path checkpoints() const { return path_ / "checkpoints"; }
  std::filesystem::path checkpoint(int64_t step) const;

  /// The finished model's weights.
  std::filesystem::path model() const { return path_ / "model.safetensors"; }
  std::filesystem::path torchscript() const { return path_ / "model.pt"; }

  /// The checkpoints there are, oldest first.
  std::vector<std::filesystem::path> checkpoint_files() const;

  /// The run folder that `path` names, itself or by a file of weights in it.
  static RunFolder of(const std::filesystem::path& path);

  /// The weights to use: the finished model's, or else the newest checkpoint's. `path` may be a run folder or
  /// a .safetensors file itself. Throws Error if there is none.
  static std::filesystem::path weights(const std::filesystem::path& path);

 private:
  std::filesystem::path path_;
};

}  // namespace flashlm

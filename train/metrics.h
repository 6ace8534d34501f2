// SPDX-License-Identifier: Apache-2.0
// metrics.jsonl: one JSON object a line, the record of a run that programs read.
#pragma once

#include <cstdio>
#include <filesystem>
#include <optional>
#include <string>
#include <vector>

namespace flashlm {

/// Losses are plain cross-entropy in nats per token, whatever the smoothing; evaluation time is not train
/// time.
struct Metrics {
  int64_t step = 0;
  int64_t tokens = 0;
  double train_seconds = 0;
  std::optional<double> loss;  // mean over the steps since the last line
  std::optional<double> val_loss;
  std::optional<double> val_bits_per_byte;
  double lr = 0;  // the schedule's multiplier, in [0, 1]
  std::optional<double> grad_norm;
  std::optional<double> tokens_per_s;
};

/// The file being written. Lines reach the disk as they come, so a run that dies leaves all but its last
/// step.
class MetricsLog {
 public:
  /// Opens `path`, keeping the lines of steps up to `last_step` that are there: those after it will be run
  /// again.
  MetricsLog(std::filesystem::path path, int64_t last_step);
  ~MetricsLog();
  MetricsLog(const MetricsLog&) = delete;
  MetricsLog& operator=(const MetricsLog&) = delete;

  /// Throws Error if the disk does not take it.
  void write(const Metrics& metrics);

  /// Everything in the file.
  const std::vector<Metrics>& all() const { return all_; }

 private:
  std::filesystem::path path_;
  std::vector<Metrics> all_;
  std::FILE* file_ = nullptr;
};

}  // namespace flashlm

// SPDX-License-Identifier: Apache-2.0
// The training run: what it is made of, its loop, and what it leaves behind.
#pragma once

#include <csignal>
#include <memory>
#include <optional>
#include <vector>

#include "data/dataset.h"
#include "data/prefetcher.h"
#include "model/generate.h"
#include "train/checkpoint.h"
#include "train/config.h"
#include "train/evaluate.h"
#include "train/metrics.h"
#include "train/profile.h"
#include "train/progress.h"
#include "train/run_folder.h"
#include "train/schedule.h"

namespace flashlm {

class Trainer {
 public:
  /// Opens the data, builds the model and, with line.resume, restores the run's last checkpoint. Throws Error
  /// in one line for anything that cannot be; a run that is already in the folder is never overwritten.
  explicit Trainer(const CommandLine& line);

  /// Trains to the end and returns true, or until `stop` is set: then it has saved a checkpoint and returns
  /// false.
  bool run(const volatile std::sig_atomic_t& stop);

 private:
  double progress() const;
  void build_model(const std::filesystem::path& start, bool resume);
  struct Batch {
    at::Tensor inputs, targets, chosen;
    int64_t count;
  };
  Batch next_batch(int64_t rows, int64_t seq_len);
  bool embedding_frozen(double fraction) const;
  void train_step();
  void report(const Progressed& before);
  Evaluation held_out();
  void evaluate_now();
  void write_metrics(const std::optional<Evaluation>& evaluation);
  void sample_now();
  void checkpoint_now();
  void save_and_sample();
  void finish();
  void plot() const;
  void print_header() const;
  Checkpointed checkpointed() { return {model_, *optimizers_, ema_.get(), *sampler_, generator_, done_}; }
  Progress reading() const;

  TrainConfig config_;
  RunFolder run_;
  DataMix data_;
  std::vector<int32_t> token_bytes_;  // empty without a tokenizer
  std::vector<Phase> curriculum_;
  Interval log_every_, eval_every_, sample_every_, checkpoint_every_;
  FlashLM model_{nullptr};
  std::unique_ptr<Optimizers> optimizers_;
  std::unique_ptr<Ema> ema_;
  std::unique_ptr<Prefetcher> sampler_;
  at::Generator generator_;
  std::unique_ptr<MetricsLog> metrics_;
  ProgressLine progress_line_;
  std::unique_ptr<Profile> profile_;  // null without --profile

  Progressed done_;
  int64_t checkpointed_step_ = -1;
  double lr_scale_ = 0, grad_norm_ = 0, loss_ = 0, tokens_per_s_ = 0;  // of late
  std::optional<Evaluation> evaluation_;                               // the last one
};

}  // namespace flashlm

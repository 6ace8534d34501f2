// SPDX-License-Identifier: Apache-2.0
// A training run at one step, in one file: weights, optimizer state, moving average, and where every source
// of randomness stands, so that the run goes on as if it had never stopped.
#pragma once

#include <filesystem>
#include <string>

#include "data/prefetcher.h"
#include "model/flash_lm.h"
#include "train/ema.h"
#include "train/optimizers.h"

namespace flashlm {

struct Progressed {
  int64_t step = 0;
  int64_t tokens = 0;
  double train_seconds = 0;
  double nll_sum = 0;  // of the steps since the last line of metrics
  int64_t nll_steps = 0;
};

/// What a checkpoint holds, by reference: saving reads it, restoring overwrites it.
struct Checkpointed {
  FlashLM& model;
  Optimizers& optimizers;
  Ema* ema;  // may be null
  Prefetcher& sampler;
  at::Generator& generator;  // draws the trained positions
  Progressed& progressed;
};

/// Writes <path> as safetensors: "model.<name>", "optimizer.<name>.<what>", "ema.<name>", "generator".
void save_checkpoint(const std::filesystem::path& path, const Checkpointed& state);

/// Throws Error if the file is damaged or belongs to a model of other settings.
void load_checkpoint(const std::filesystem::path& path, const Checkpointed& state);

/// The model of a checkpoint or of a model.safetensors.
FlashLM load_any_model(const std::filesystem::path& path);

}  // namespace flashlm

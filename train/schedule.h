// SPDX-License-Identifier: Apache-2.0
// What changes while a run goes on: the learning-rate multiplier and the curriculum of sequence lengths.
// Both are functions of the run's progress, which is a fraction of its steps or of its time budget.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace flashlm {

/// Warm-up, stable, decay: what every learning rate is multiplied by, in [0, 1].
///
///   warm-up   step / warmup_steps                      while step < warmup_steps
///   decay     (1 - progress) / (1 - decay_start)       once progress > decay_start
///   result    the smaller of the two, 1 where neither holds
///
/// step counts from 1. progress in [0, 1] is step / total_steps or seconds / budget: a run that a clock ends
/// has then decayed by its end. decay_start = 1 means no decay. Source: FlashLM v3 (200 steps, decay from
/// 0.9).
double wsd(double progress, int64_t step, int64_t warmup_steps, double decay_start);

/// From `start` (a fraction of the run) on: sequences of seq_len tokens, grad_accum micro-batches a step.
struct Phase {
  double start = 0;
  int64_t seq_len = 0;
  int64_t grad_accum = 1;

  bool operator==(const Phase&) const = default;
};

/// Reads "start:seq_len:grad_accum,...", for instance v3's "0:64:4,0.1:128:4,0.4:256:8,0.7:512:8". The first
/// phase starts at 0, starts increase and stay below 1, the other two are at least 1; otherwise
/// flashlm::Error.
std::vector<Phase> parse_curriculum(const std::string& text);

/// The last phase with start <= progress.
const Phase& phase_at(const std::vector<Phase>& curriculum, double progress);

}  // namespace flashlm

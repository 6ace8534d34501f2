// SPDX-License-Identifier: Apache-2.0
// Training batches: random windows of a token sequence, the same on every machine for the same seed.
#pragma once

#include <cstdint>
#include <random>
#include <span>
#include <string>

#include "data/token_shard.h"

namespace flashlm {

class BatchSampler {
 public:
  BatchSampler(const TokenShard& tokens, std::uint64_t seed);

  /// For each row b an offset i is drawn uniformly, with replacement, from 0 ... size - seq - 1:
  ///   inputs   (batch, seq)  t[i] ... t[i + seq - 1]
  ///   targets  (batch, seq)  t[i + 1] ... t[i + seq]
  /// Windows may cross documents. Error: the sequence is shorter than seq + 1.
  void next(std::int64_t batch, std::int64_t seq, std::span<std::int64_t> inputs,
            std::span<std::int64_t> targets);

  /// "SEED DRAWS": set_state(state()) continues with the same batches, in another process too.
  std::string state() const;
  void set_state(const std::string& state);

 private:
  std::int64_t draw_below(std::int64_t bound);

  TokenShard tokens_;
  std::uint64_t seed_;
  std::uint64_t draws_ = 0;
  std::mt19937_64 generator_;
};

}  // namespace flashlm

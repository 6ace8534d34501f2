// SPDX-License-Identifier: Apache-2.0
// What training reads: a training and a validation sequence of tokens, and the tokenizer that made them.
#pragma once

#include <cstdint>
#include <filesystem>
#include <memory>
#include <optional>

#include "data/token_shard.h"
#include "data/tokenizer.h"

namespace flashlm {

inline constexpr const char* kTokenizerFile = "tokenizer.model";
inline constexpr const char* kTrainFile = "train.tokens";
inline constexpr const char* kValFile = "val.tokens";

struct Dataset {
  TokenShard train;
  TokenShard val;
  std::unique_ptr<Tokenizer> tokenizer;  // null for raw tokens

  /// A folder made by `flashlm prepare`. Errors: a file is missing or damaged, or belongs to another
  /// tokenizer.
  static Dataset open(const std::filesystem::path& dir);
  /// Raw ids (TokenShard::open_raw). Without val_file the last val_fraction of the ids is the validation
  /// sequence.
  static Dataset open_raw(const std::filesystem::path& tokens, std::int64_t vocab_size,
                          const std::optional<std::filesystem::path>& val_file, double val_fraction);
};

}  // namespace flashlm

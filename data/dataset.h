// SPDX-License-Identifier: Apache-2.0
// What training reads: training and validation sequences of tokens, and the tokenizer that made them.
#pragma once

#include <cstdint>
#include <filesystem>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "data/sampler.h"
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

/// Several data sets to train on together, all of one tokenizer. They are given as text, PATH or PATH=WEIGHT
/// (1 without one) separated by commas, as in "books,web=0.5". A path may hold commas and "=" itself if it is
/// there: then it is taken whole.
struct DataMix {
  std::vector<TokenSource> train;
  std::vector<TokenSource> val;          // the same weights
  std::unique_ptr<Tokenizer> tokenizer;  // null for raw tokens

  /// Folders, each a Dataset. Errors: its, a weight that is not above 0, another tokenizer than the first's.
  static DataMix open(const std::string& folders);
  /// Files of raw ids, as Dataset::open_raw. With val_file that one alone is the validation sequence.
  static DataMix open_raw(const std::string& files, std::int64_t vocab_size,
                          const std::optional<std::filesystem::path>& val_file, double val_fraction);
};

/// How often each id of the vocabulary is to be expected in as many tokens as all sources have, when sources
/// are drawn by weight. For one source: word_counts of its tokens.
std::vector<std::int64_t> word_counts(const std::vector<TokenSource>& sources);

}  // namespace flashlm

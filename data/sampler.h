// SPDX-License-Identifier: Apache-2.0
// Training batches: windows of token sequences, the same on every machine for the same seed, and from any
// position on at once.
#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <random>
#include <span>
#include <string>
#include <vector>

#include "data/permutation.h"
#include "data/token_shard.h"

namespace flashlm {

/// A target that is not to be trained: what losses in torch ignore unless told otherwise.
inline constexpr std::int64_t kIgnoredTarget = -100;

/// Tokens to take windows from. A row of a batch comes from the source with probability
/// weight / (sum of all weights).
struct TokenSource {
  TokenShard tokens;
  double weight = 1;
  std::string name = "the data";  // where it comes from, for messages
};

/// Which windows of a source its rows are.
enum class Windows {
  /// FlashLM v3's. Offsets drawn uniformly with replacement; windows may cross documents.
  kRandom,
  /// Epochs. In each the sequence is cut into windows of seq tokens from an offset on, which is drawn below
  /// seq, and every window comes exactly once, in an order drawn for the epoch. Left out are the targets
  /// before the offset and those after the last whole window, fewer than seq each. Windows may cross
  /// documents.
  kShuffled,
  /// Epochs likewise, but every document is cut by itself. Its window begins with the end-of-text token of
  /// the document before it, so that the model learns how documents begin: m targets, all of a document's
  /// tokens (of the first document all but its first), make ceil(m / seq) windows. In an epoch each of these
  /// targets comes exactly once, wherever in a window: the last window is moved back to end with the
  /// document, where targets that the window before has too are kIgnoredTarget; a shorter document is filled
  /// up with its last token, and kIgnoredTarget. Takes 8 bytes of memory for each document.
  kDocuments,
};

/// Of 'random', 'shuffled' and 'documents' the one that `name` says; Error for another.
Windows windows_named(const std::string& name);

class BatchSampler {
 public:
  /// Errors: a weight that is not above 0; Windows::kDocuments of a source that does not know its documents.
  BatchSampler(std::vector<TokenSource> sources, Windows windows, std::uint64_t seed);

  /// Fills the rows one after the other, each with the next window of a source drawn by weight: the tokens
  /// t[i] ... t[i + seq - 1] and, one ahead, the targets t[i + 1] ... t[i + seq].
  ///   inputs   (batch, seq)
  ///   targets  (batch, seq)  kIgnoredTarget where there is nothing to learn; at least one in a row is not
  ///   returns  how many targets are not kIgnoredTarget
  /// Every source goes through its epochs at its own pace, and where one ends the next row begins another. So
  /// `batch` may change at any time: rows are handed out in the same order. With another `seq` all sources
  /// begin a new epoch; what was left of theirs is skipped.
  /// Errors: a source of fewer than seq + 1 tokens (2 for Windows::kDocuments). Then nothing was drawn.
  std::int64_t next(std::int64_t batch, std::int64_t seq, std::span<std::int64_t> inputs,
                    std::span<std::int64_t> targets);

  /// set_state(state()) continues with the same batches, in another process too, given the same sources:
  ///   random             SEED DRAWS
  ///   another NAME       NAME SEED DRAWS, and for each source EPOCH SEQ POSITION
  /// DRAWS counts those of a std::mt19937_64; EPOCH those begun, of windows of SEQ tokens, of which POSITION
  /// were handed out. Errors: another form, other windows or number of sources, a POSITION beyond the epoch.
  std::string state() const;
  void set_state(const std::string& state);

 private:
  struct Epoch {
    std::int64_t number = 0, seq = 0, position = 0;
    // What follows from these, the seed and the source:
    std::optional<Permutation> order;  // none in epoch 0, which is over before it begins
    std::int64_t offset = 0;           // kShuffled
    /// kDocuments: the number of windows of all documents before each; last, that of all.
    std::shared_ptr<const std::vector<std::int64_t>> windows_before;
  };

  void check_length(std::int64_t seq) const;
  void begin_epoch(std::size_t source, std::int64_t number, std::int64_t seq);
  std::size_t draw_source();
  std::int64_t draw_below(std::int64_t bound);
  std::int64_t fill(std::size_t source, std::span<std::int64_t> inputs, std::span<std::int64_t> targets);

  // Shared, so that a copy of the sampler costs little.
  std::shared_ptr<const std::vector<TokenSource>> sources_;
  Windows windows_;
  std::uint64_t seed_;
  std::uint64_t draws_ = 0;
  std::mt19937_64 generator_;
  std::vector<Epoch> epochs_;  // of each source
};

}  // namespace flashlm

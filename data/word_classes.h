// SPDX-License-Identifier: Apache-2.0
// The V words of a vocabulary divided among C classes, for the output layers that first choose a class
// (ops/hierarchical_cross_entropy.h, ops/adaptive_cross_entropy.h): the file they are kept in, four ways to
// make them, and two numbers by which to compare what was made. Everything here is deterministic.
#pragma once

#include <cstdint>
#include <filesystem>
#include <functional>
#include <span>
#include <string>
#include <vector>

#include "data/token_shard.h"

namespace flashlm {

struct WordClasses {
  std::vector<std::int64_t> words;    // all words, class after class
  std::vector<std::int64_t> offsets;  // class c is words[offsets[c]] ... words[offsets[c + 1] - 1]

  std::int64_t vocab_size() const { return static_cast<std::int64_t>(words.size()); }
  std::int64_t count() const { return static_cast<std::int64_t>(offsets.size()) - 1; }
  std::int64_t size(std::int64_t c) const { return offsets[c + 1] - offsets[c]; }
  /// class_of()[w] is the class of word w.
  std::vector<std::int32_t> class_of() const;

  /// Errors: offsets that do not rise from 0 to V, a word outside [0, V), one named twice. `origin` begins
  /// the message.
  void validate(const std::string& origin) const;

  /// The file of docs/formats.md. Errors: not such a file, another version, or classes that are not a
  /// division of the vocabulary that its first line announces.
  static WordClasses load(const std::filesystem::path& path);
  void save(const std::filesystem::path& path) const;
};

/// How often each id of the vocabulary occurs.
std::vector<std::int64_t> word_counts(const TokenShard& tokens);

/// The most words that a class gets from the builders below but cutoff_classes: four times the average. A
/// class of rare words costs little on average whatever its size, but bounds the time of a single position.
std::int64_t largest_class(std::int64_t vocab_size, std::int64_t count);

/// C plus the size of the target's class, averaged over the text: how many rows of weights a position of the
/// two-level softmax meets. The counts must not all be 0.
double rows_per_position(const WordClasses& classes, std::span<const std::int64_t> counts);

/// The mutual information of the classes of neighbouring words, in nats per token: what a class bigram
/// (Brown et al. 1992) predicts better than a unigram does. V classes of one word give the most there is.
double class_information(const WordClasses& classes, const TokenShard& tokens);

// Builders. `count` is C, 1 ... V. Within a class, words stand by falling frequency, equal ones by id.

/// Words by falling frequency, cut so that rows_per_position is about the least there is: no other division
/// does better than one into runs of this order, and where runs are many (C ≥ √V) the best one around a word
/// of frequency p has a length in proportion to 1/√p, up to largest_class. So each run gets an equal mass of
/// √p, where Mikolov et al. 2011 give it an equal mass of p.
WordClasses frequency_classes(std::span<const std::int64_t> counts, std::int64_t count);

/// Words by falling frequency, cut at the given places: the shortlist and the tails of the adaptive softmax.
/// The cutoffs must rise, above 0 and below V.
WordClasses cutoff_classes(std::span<const std::int64_t> counts, std::span<const std::int64_t> cutoffs);

struct ExchangeOptions {
  /// Passes over the vocabulary after the first, which brings the words in. They end early when nothing
  /// moves.
  int sweeps = 10;
  /// Nats per token that one row of weights less for each position is worth. At 0, frequent words end up in
  /// large classes, whose products cost the more the more frequent they are.
  double row_price = 1e-3;
  /// Called several times in each pass (0 is the first) with how much of it is done; after it with 1 and
  /// with what is maximised: class_information - row_price · rows_per_position. An exception ends the work.
  std::function<void(int sweep, double fraction, double objective)> progress;
};

/// Exchange clustering (Kneser and Ney 1993; Martin, Liermann and Ney 1998): every word in turn, most
/// frequent first, moves to the class where the text's bigram of classes is likeliest, less the price of
/// rows. The first C words begin with a class each, and the others join them one by one. A sweep costs C
/// times the number of different (word, class of a neighbour) pairs; memory is 8 bytes a token and 8 C². C is
/// at most 4096.
WordClasses exchange_classes(const TokenShard& tokens, std::int64_t count,
                             const ExchangeOptions& options = {});

/// Spherical k-means over the V rows of `embedding` (V × dim, row-major): words whose vectors point the same
/// way, up to largest_class. The centres begin at the C most frequent words, and each word in the order of
/// frequency has its choice of the classes that are not full. `progress` is called several times in an
/// iteration; an exception from it ends the work.
WordClasses kmeans_classes(std::span<const float> embedding, std::span<const std::int64_t> counts,
                           std::int64_t count, int iterations = 10,
                           const std::function<void(int iteration, double fraction)>& progress = {});

}  // namespace flashlm

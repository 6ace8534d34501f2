// SPDX-License-Identifier: Apache-2.0
// Text files in, a folder that Dataset::open reads out: tokenizer.model, train.tokens, val.tokens,
// prepare.json. The same text and options give the same bytes.
#pragma once

#include <cstdint>
#include <filesystem>
#include <functional>
#include <string>
#include <string_view>
#include <vector>

namespace flashlm {

struct PrepareOptions {
  /// .txt files, and folders that are searched for *.txt at any depth. One file is one document; empty files
  /// do not count. Documents follow each other sorted by path, each with end_of_text behind it.
  std::vector<std::filesystem::path> inputs;
  std::filesystem::path out;
  /// "sentencepiece:SIZE" trains one with SIZE tokens on the training text; anything else is a model file to
  /// use.
  std::string tokenizer = "sentencepiece:4096";
  /// Share of the text that is held out. A document is held out when the hash of its text falls below it, so
  /// that adding files moves none. When that share of bytes would come out below a quarter or above four
  /// times what is asked for (few or very unequal documents), the end of every document is held out instead,
  /// from a paragraph, line, sentence or word near that place.
  double val_fraction = 0.05;
  /// Called with what is being done and how much of it is. An exception from it ends prepare() and leaves
  /// nothing.
  std::function<void(std::string_view stage, double fraction)> progress;
};

struct PrepareResult {
  std::int64_t documents = 0;
  std::int64_t vocab_size = 0;
  std::int64_t train_bytes = 0;  // of text
  std::int64_t val_bytes = 0;
  std::int64_t train_tokens = 0;  // with one end_of_text for each document
  std::int64_t val_tokens = 0;
  bool up_to_date = false;  // the folder held this already, and was left as it is

  double bytes_per_token() const {
    return static_cast<double>(train_bytes + val_bytes) / static_cast<double>(train_tokens + val_tokens);
  }
};

/// Errors: an input that is missing or not .txt, no text, a bad option, a full disk.
PrepareResult prepare(const PrepareOptions& options);

}  // namespace flashlm

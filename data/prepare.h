// SPDX-License-Identifier: Apache-2.0
// Documents in, a folder that Dataset::open reads out: tokenizer.model, train.tokens, val.tokens,
// prepare.json. The same text and options give the same bytes, whatever the number of threads and however
// often the work was broken off.
#pragma once

#include <cstdint>
#include <filesystem>
#include <functional>
#include <string>
#include <string_view>
#include <vector>

namespace flashlm {

struct PrepareProgress {
  std::string_view stage;
  double fraction;              // of the stage
  std::int64_t text_bytes = 0;  // dealt with in this stage, like the next two
  std::int64_t documents = 0;
  std::int64_t tokens = 0;
};

struct PrepareOptions {
  /// Files and folders, as list_documents (data/documents.h) takes them, and "-": standard input, whose
  /// documents come last. Documents follow each other sorted by path, then as they are in the file, each with
  /// end_of_text behind it. Empty ones do not count.
  std::vector<std::filesystem::path> inputs;
  std::filesystem::path out;
  std::string text_field = "text";   // of .jsonl and .parquet
  std::string stdin_format = "txt";  // how a file of what comes from standard input would end
  /// Documents with fewer characters (code points) are left out; the first so many of the others are used.
  std::int64_t min_chars = 0;
  std::int64_t max_documents = INT64_MAX;
  /// "sentencepiece:SIZE" trains one with SIZE tokens on the training text, a model of `model_type` (bpe or
  /// unigram); anything else is what Tokenizer::open takes.
  std::string tokenizer = "sentencepiece:4096";
  std::string model_type = "bpe";
  /// Share of the text that is held out. A document is held out when the hash of its text falls below it, so
  /// that adding files moves none. When that share of bytes would come out below a quarter or above four
  /// times what is asked for (few or very unequal documents), the end of every document is held out instead,
  /// from a paragraph, line, sentence or word near that place.
  double val_fraction = 0.05;
  int threads = 0;  // 0: one for each processor
  /// Text between two points from which a killed prepare() goes on.
  std::int64_t journal_bytes = 32 << 20;
  /// An exception from it ends prepare(). While it encodes, what is done is kept in the folder: the same call
  /// again goes on from there. Before, nothing is left.
  std::function<void(const PrepareProgress&)> progress;
};

struct PrepareResult {
  std::int64_t documents = 0;
  std::int64_t vocab_size = 0;
  std::int64_t train_bytes = 0;  // of text
  std::int64_t val_bytes = 0;
  std::int64_t train_tokens = 0;  // with one end_of_text for each document
  std::int64_t val_tokens = 0;
  std::int64_t train_documents = 0;  // where ends of documents are held out, a document counts on both sides
  std::int64_t val_documents = 0;
  std::string alteration;          // Tokenizer::alteration()
  bool up_to_date = false;         // the folder held this already, and was left as it is
  std::int64_t resumed_bytes = 0;  // of text that a broken-off call had encoded

  double bytes_per_token() const {
    return static_cast<double>(train_bytes + val_bytes) / static_cast<double>(train_tokens + val_tokens);
  }
};

/// Memory does not grow with the text, but for one bit for each document. Errors: an input that is missing,
/// of no known kind or damaged, no text, a bad option: nothing is written. A full disk: what is done is kept.
PrepareResult prepare(const PrepareOptions& options);

/// Whether prepare() of this folder was broken off, and the same call would go on from there.
bool can_resume_prepare(const std::filesystem::path& out);

}  // namespace flashlm

// SPDX-License-Identifier: Apache-2.0
// Any input as documents: text, JSON lines and Parquet files, compressed or not, read in little memory
// whatever their size.
#pragma once

#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

namespace flashlm {

inline constexpr std::size_t kPieceBytes = 1 << 20;

struct DocumentOptions {
  std::string text_field = "text";  // of .jsonl and .parquet
};

/// The documents of one file, one after the other, each in pieces of at most kPieceBytes: cut anywhere, even
/// inside a character. Only an empty document has an empty piece.
class DocumentReader {
 public:
  struct Piece {
    std::string_view text;  // valid until the next call
    bool last;              // it ends its document
  };

  virtual ~DocumentReader() = default;
  /// nullopt: the file is over. Errors name the file and the line or row.
  virtual std::optional<Piece> next() = 0;
  /// Of the file as it lies on disk, for progress.
  virtual std::uint64_t bytes_read() const = 0;
};

/// All files of the inputs, each once, sorted by path. An input is a file, or a folder that is searched at
/// any depth for names that open_documents knows. Errors: an input that is missing or of no known kind, a
/// folder without any.
std::vector<std::filesystem::path> list_documents(const std::vector<std::filesystem::path>& inputs);

/// By the file's name:
///   .txt                                         one document, its bytes as they are
///   .jsonl .ndjson, and compressed also .json    each line an object, its field `text_field` a document
///   .parquet                                     each row a document, its column `text_field`
/// The first two may be compressed: another .gz or .zst follows. Errors: see docs/formats.md, Inputs.
std::unique_ptr<DocumentReader> open_documents(const std::filesystem::path& file,
                                               const DocumentOptions& options = {});

}  // namespace flashlm

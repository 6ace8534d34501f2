// SPDX-License-Identifier: Apache-2.0
// Which files are read, and by whom. A plain text file is read here.
#include "data/documents.h"

#include <algorithm>
#include <map>
#include <system_error>

#include "data/byte_stream.h"
#include "data/error.h"
#include "data/json_lines.h"
#include "data/parquet_rows.h"

namespace flashlm {
namespace {

namespace fs = std::filesystem;

enum class Kind { kText, kJsonLines, kParquet };

constexpr const char* kMend =
    "; name .txt, .jsonl or .parquet files (the first two also as .gz or .zst), or folders of them";

std::optional<Kind> kind_of(const fs::path& file) {
  fs::path name = file.filename();
  if (name.extension() == ".parquet") return Kind::kParquet;
  const bool compressed = name.extension() == ".gz" || name.extension() == ".zst";
  if (compressed) name = name.stem();
  if (name.extension() == ".txt") return Kind::kText;
  if (name.extension() == ".jsonl" || name.extension() == ".ndjson") return Kind::kJsonLines;
  // C4 and Dolma are published as .json.gz; a file that is just .json is rarely one of lines.
  if (name.extension() == ".json" && compressed) return Kind::kJsonLines;
  return std::nullopt;
}

/// The file as one document.
class TextFile final : public DocumentReader {
 public:
  explicit TextFile(const fs::path& file)
      : stream_(open_bytes(file)), buffer_(std::make_unique_for_overwrite<char[]>(kPieceBytes + 1)) {}

  /// One byte more than a piece is read, and kept for the next: whether there is one tells which piece is the
  /// last.
  std::optional<Piece> next() override {
    if (over_) return std::nullopt;
    if (kept_ > 0) buffer_[0] = buffer_[kPieceBytes];
    const std::size_t size = kept_ + stream_->read({buffer_.get() + kept_, kPieceBytes + 1 - kept_});
    kept_ = 1;
    over_ = size <= kPieceBytes;
    return Piece{{buffer_.get(), std::min(size, kPieceBytes)}, over_};
  }

  std::uint64_t bytes_read() const override { return stream_->bytes_read(); }

 private:
  std::unique_ptr<ByteStream> stream_;
  std::unique_ptr<char[]> buffer_;
  std::size_t kept_ = 0;
  bool over_ = false;
};

/// Two names of one file (a link, a path named twice) are one file. It keeps its own name, because what a
/// link leads to may have a name that tells no kind, as in the caches of the Hugging Face hub.
class Listing {
 public:
  void add(const fs::path& input) {
    if (!fs::exists(input)) throw Error(input.string() + " does not exist" + kMend);
    if (!fs::is_directory(input)) {
      if (!kind_of(input)) throw Error(input.string() + " is not a .txt, .jsonl or .parquet file" + kMend);
      add_file(input);
      return;
    }
    bool found = false;
    for (const fs::directory_entry& entry : fs::recursive_directory_iterator(input)) {
      if (!kind_of(entry.path()) || !entry.is_regular_file()) continue;
      add_file(entry.path());
      found = true;
    }
    if (!found) throw Error(input.string() + " holds no .txt, .jsonl or .parquet files" + kMend);
  }

  std::vector<fs::path> sorted() const {
    std::vector<fs::path> files;
    for (const auto& [identity, name] : names_) files.push_back(name);
    std::sort(files.begin(), files.end());
    return files;
  }

 private:
  void add_file(const fs::path& file) {
    const fs::path name = fs::canonical(fs::absolute(file).parent_path()) / file.filename();
    const auto [place, is_new] = names_.emplace(fs::canonical(file), name);
    if (!is_new) place->second = std::min(place->second, name);
  }

  std::map<fs::path, fs::path> names_;  // by canonical path
};

}  // namespace

std::vector<fs::path> list_documents(const std::vector<fs::path>& inputs) {
  Listing listing;
  try {
    for (const fs::path& input : inputs) listing.add(input);
  } catch (const fs::filesystem_error& error) {
    throw Error("cannot read " + error.path1().string() + ": " + error.code().message());
  }
  return listing.sorted();
}

std::unique_ptr<DocumentReader> open_documents(const fs::path& file, const DocumentOptions& options) {
  const std::optional<Kind> kind = kind_of(file);
  if (!kind) throw Error(file.string() + " is not a .txt, .jsonl or .parquet file" + kMend);
  if (*kind == Kind::kText) return std::make_unique<TextFile>(file);
  if (*kind == Kind::kJsonLines) return open_json_lines(file, options.text_field);
#ifdef FLASHLM_WITH_PARQUET
  return open_parquet(file, options.text_field);
#else
  throw Error(
      file.string() +
      " is Parquet, which this build cannot read: tools/parquet_to_jsonl makes .jsonl of it, or configure "
      "with -DPython3_EXECUTABLE=PYTHON, one that has pyarrow");
#endif
}

}  // namespace flashlm

// SPDX-License-Identifier: Apache-2.0
// Three passes over the files: hash them (for the split, and to see whether there is anything to do), train
// the tokenizer on a sample of the training text, encode. No more than one file is mapped at a time.
#include "data/prepare.h"

#include <algorithm>
#include <charconv>
#include <memory>
#include <nlohmann/json.hpp>
#include <optional>
#include <set>
#include <span>

#include "data/dataset.h"
#include "data/error.h"
#include "data/file.h"
#include "data/text.h"
#include "data/token_shard.h"
#include "data/tokenizer.h"

namespace flashlm {
namespace {

namespace fs = std::filesystem;

constexpr const char* kRecordFile = "prepare.json";
constexpr int kRecordVersion = 2;  // to be raised whenever the same text would give other bytes
constexpr std::size_t kSampleBytes = 16'000'000;  // four times less costs 0.03 % in bits per byte
constexpr std::size_t kSampleChunkBytes = 1 << 16;
constexpr std::size_t kEncodeChunkBytes = 1 << 20;

struct Document {
  fs::path path;
  std::uint64_t hash;  // of its text
  std::size_t size;    // bytes, not 0
  std::size_t train;   // bytes in front that are for training; the rest is held out

  bool hash_below(double fraction) const { return static_cast<double>(hash) * 0x1p-64 < fraction; }
};

/// The document's text. A file that changes between two passes would make the split and the record untrue.
MappedFile map_document(const Document& document) {
  MappedFile file(document.path);
  if (checksum(file.bytes()) != document.hash)
    throw Error(document.path.string() + " was changed while it was read; run the command again");
  return file;
}

void add_input(const fs::path& input, std::set<fs::path>& files) {
  const std::string mend = "; name .txt files or folders of them";
  if (!fs::exists(input)) throw Error(input.string() + " does not exist" + mend);
  if (!fs::is_directory(input)) {
    if (input.extension() != ".txt") throw Error(input.string() + " is not a .txt file" + mend);
    files.insert(fs::canonical(input));
    return;
  }
  bool found = false;
  for (const fs::directory_entry& entry : fs::recursive_directory_iterator(input)) {
    if (entry.path().extension() != ".txt" || !entry.is_regular_file()) continue;
    files.insert(fs::canonical(entry.path()));
    found = true;
  }
  if (!found) throw Error(input.string() + " holds no .txt files" + mend);
}

/// All input files, each once, sorted by path.
std::set<fs::path> list_files(const std::vector<fs::path>& inputs) {
  std::set<fs::path> files;
  try {
    for (const fs::path& input : inputs) add_input(input, files);
  } catch (const fs::filesystem_error& error) {
    throw Error("cannot read " + error.path1().string() + ": " + error.code().message());
  }
  return files;
}

/// Where the held-out end of a text begins: behind the first good place in the half after the wanted one.
std::size_t tail_start(std::string_view text, double fraction) {
  const auto wanted = static_cast<std::size_t>(static_cast<double>(text.size()) * (1 - fraction));
  const std::size_t last = wanted + (text.size() - wanted) / 2;
  for (const std::string_view mark : {"\n\n", "\n", ". ", " "})
    if (const std::size_t end = text.find(mark, wanted) + mark.size();
        end >= wanted + mark.size() && end <= last)
      return end;
  std::size_t start = wanted;
  while (start < text.size() && (static_cast<unsigned char>(text[start]) & 0xC0) == 0x80) ++start;
  return start;
}

void split(std::vector<Document>& documents, double val_fraction) {
  double total = 0;
  double held_out = 0;
  for (Document& document : documents) {
    const bool val = document.hash_below(val_fraction);
    document.train = val ? 0 : document.size;
    total += static_cast<double>(document.size);
    if (val) held_out += static_cast<double>(document.size);
  }
  if (held_out < total && held_out >= total * val_fraction / 4 && held_out <= total * val_fraction * 4)
    return;
  for (Document& document : documents)
    document.train = tail_start(map_document(document).text(), val_fraction);
}

/// An even sample of the training text for the tokenizer.
std::string sample(const std::vector<Document>& documents) {
  std::size_t total = 0;
  for (const Document& document : documents) total += document.train;
  const std::size_t stride = (total + kSampleBytes - 1) / kSampleBytes;
  std::string text;
  std::size_t chunks = 0;
  for (const Document& document : documents) {
    const MappedFile file = map_document(document);
    std::string_view rest = file.text().substr(0, document.train);
    while (!rest.empty()) {
      const std::string_view chunk = take_chunk(rest, kSampleChunkBytes);
      if (chunks++ % stride == 0) text += chunk;
    }
  }
  return text;
}

std::optional<std::int64_t> sentencepiece_size(std::string_view spec) {
  constexpr std::string_view kind = "sentencepiece:";
  if (!spec.starts_with(kind)) return std::nullopt;
  const std::string_view digits = spec.substr(kind.size());
  std::int64_t size = 0;
  const auto [end, error] = std::from_chars(digits.data(), digits.data() + digits.size(), size);
  if (error != std::errc() || end != digits.data() + digits.size() || size < 1 || size > 1'000'000)
    throw Error("--tokenizer sentencepiece:SIZE needs a number of tokens up to 1000000, got '" +
                std::string(spec) + "'");
  return size;
}

class Preparation {
 public:
  explicit Preparation(const PrepareOptions& options) : options_(options) {
    if (!(options.val_fraction > 0 && options.val_fraction <= 0.5))
      throw Error("--val-fraction must be above 0 and at most 0.5, got " +
                  std::to_string(options.val_fraction));
    trained_size_ = sentencepiece_size(options.tokenizer);
    if (!trained_size_ && !fs::exists(options.tokenizer))
      throw Error("--tokenizer must be sentencepiece:SIZE or a model file, and there is no file '" +
                  options.tokenizer + "'");
  }

  PrepareResult run() {
    read_documents();
    std::unique_ptr<Tokenizer> tokenizer = trained_size_ ? nullptr : Tokenizer::load(options_.tokenizer);
    const nlohmann::json record = describe(tokenizer.get());
    if (const auto result = existing(record)) return *result;
    split(documents_, options_.val_fraction);
    if (!tokenizer) {
      report("training the tokenizer", 0);
      tokenizer = Tokenizer::from_serialized(train_sentencepiece(sample(documents_), *trained_size_));
    }
    return write(*tokenizer, record);
  }

 private:
  void report(std::string_view stage, double fraction) const {
    if (options_.progress) options_.progress(stage, fraction);
  }

  void read_documents() {
    const std::set<fs::path> files = list_files(options_.inputs);
    std::size_t done = 0;
    for (const fs::path& path : files) {
      const MappedFile file(path);
      const std::size_t size = file.bytes().size();
      if (size > 0) documents_.push_back({path, checksum(file.bytes()), size, size});
      report("reading", static_cast<double>(++done) / static_cast<double>(files.size()));
    }
    if (documents_.empty())
      throw Error("there is no text: all " + std::to_string(files.size()) +
                  " input files are empty; name others");
  }

  /// Everything that decides what is written. Paths do not: the same texts elsewhere give the same folder.
  nlohmann::json describe(const Tokenizer* given) const {
    Checksum texts;
    for (const Document& document : documents_) texts.update(std::as_bytes(std::span(&document.hash, 1)));
    return {{"version", kRecordVersion},
            {"documents", documents_.size()},
            {"texts", texts.digest()},
            {"tokenizer", given ? "fingerprint:" + std::to_string(given->fingerprint()) : options_.tokenizer},
            {"val_fraction", options_.val_fraction}};
  }

  PrepareResult result(const TokenShard& train, const TokenShard& val) const {
    return {.documents = static_cast<std::int64_t>(documents_.size()),
            .vocab_size = train.vocab_size(),
            .train_bytes = train.text_bytes(),
            .val_bytes = val.text_bytes(),
            .train_tokens = train.size(),
            .val_tokens = val.size()};
  }

  /// The result, if the folder already holds it whole.
  std::optional<PrepareResult> existing(const nlohmann::json& record) const {
    try {
      if (nlohmann::json::parse(read_file(options_.out / kRecordFile)) != record) return std::nullopt;
      const Dataset dataset = Dataset::open(options_.out);
      PrepareResult found = result(dataset.train, dataset.val);
      found.up_to_date = true;
      return found;
    } catch (const Error&) {
    } catch (const nlohmann::json::exception&) {
    }
    return std::nullopt;  // missing or damaged: to be made again
  }

  PrepareResult write(const Tokenizer& tokenizer, const nlohmann::json& record) const {
    const fs::path& out = options_.out;
    std::error_code failed;
    fs::create_directories(out, failed);
    if (failed) throw Error("cannot make the folder " + out.string() + ": " + failed.message());
    TokenShardWriter train(out / kTrainFile, tokenizer.vocab_size(), tokenizer.fingerprint());
    TokenShardWriter val(out / kValFile, tokenizer.vocab_size(), tokenizer.fingerprint());
    encode(tokenizer, train, val);
    // From here on the folder changes. The record goes first and comes last: with it, everything is in place.
    fs::remove(out / kRecordFile, failed);
    train.commit();
    val.commit();
    write_file(out / kTokenizerFile, tokenizer.serialized());
    write_file(out / kRecordFile, record.dump(2) + "\n");
    return result(TokenShard::open(out / kTrainFile), TokenShard::open(out / kValFile));
  }

  void encode(const Tokenizer& tokenizer, TokenShardWriter& train, TokenShardWriter& val) const {
    std::size_t total = 0;
    for (const Document& document : documents_) total += document.size;
    std::size_t done = 0;
    const auto append = [&](std::string_view text, TokenShardWriter& shard) {
      if (text.empty()) return;
      while (!text.empty()) {
        const std::string_view chunk = take_chunk(text, kEncodeChunkBytes);
        shard.append(tokenizer.encode(chunk), static_cast<std::int64_t>(chunk.size()));
        done += chunk.size();
        report("encoding", static_cast<double>(done) / static_cast<double>(total));
      }
      const std::int32_t end = tokenizer.end_of_text();
      shard.append({&end, 1}, 0);
      shard.end_document();
    };
    for (const Document& document : documents_) {
      const MappedFile file = map_document(document);
      append(file.text().substr(0, document.train), train);
      append(file.text().substr(document.train), val);
    }
  }

  const PrepareOptions& options_;
  std::optional<std::int64_t> trained_size_;
  std::vector<Document> documents_;
};

}  // namespace

PrepareResult prepare(const PrepareOptions& options) { return Preparation(options).run(); }

}  // namespace flashlm

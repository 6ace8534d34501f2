// SPDX-License-Identifier: Apache-2.0
// Passes over the documents: hash them (for the split, and to see whether there is anything to do), find the
// ends that are held out where documents are few, sample the training text for the tokenizer to be trained,
// encode on all cores. A journal in the folder says up to where the encoding is safely on disk.
#include "data/prepare.h"

#include <fcntl.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <charconv>
#include <memory>
#include <nlohmann/json.hpp>
#include <optional>
#include <span>
#include <thread>

#include "data/corpus.h"
#include "data/dataset.h"
#include "data/error.h"
#include "data/file.h"
#include "data/ordered_parallel.h"
#include "data/sentencepiece_tokenizer.h"
#include "data/token_shard.h"
#include "data/tokenizer.h"

namespace flashlm {
namespace {

namespace fs = std::filesystem;
using nlohmann::json;

constexpr const char* kRecordFile = "prepare.json";
constexpr const char* kJournalFile = "prepare.json.part";
constexpr int kRecordVersion = 3;  // to be raised whenever the same text would give other bytes
constexpr std::size_t kSampleBytes = 16'000'000;  // four times less costs 0.03 % in bits per byte
constexpr std::size_t kSampleChunkBytes = 1 << 16;
constexpr std::size_t kEncodeChunkBytes = 1 << 18;
constexpr std::int64_t kReportBytes = 1 << 20;  // of text, between two calls of options.progress
constexpr std::size_t kMostUnequal = 1 << 20;   // documents whose sizes are kept, in case ends are held out
constexpr std::int64_t kLargestMinChars = 100'000;  // so much is read before a document is chosen
constexpr int kLargestThreads = 1024;

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

void check(const PrepareOptions& options) {
  const auto require = [](bool holds, const std::string& rule, const auto& value) {
    if (!holds) throw Error(rule + ", got " + std::to_string(value));
  };
  require(options.val_fraction > 0 && options.val_fraction <= 0.5,
          "--val-fraction must be above 0 and at most 0.5", options.val_fraction);
  require(options.min_chars >= 0 && options.min_chars <= kLargestMinChars,
          "--min-chars must be between 0 and " + std::to_string(kLargestMinChars), options.min_chars);
  require(options.max_documents >= 1, "--max-documents must be at least 1", options.max_documents);
  require(options.threads >= 0 && options.threads <= kLargestThreads,
          "--threads must be between 1 and " + std::to_string(kLargestThreads) + ", or 0 for all processors",
          options.threads);
}

/// Makes a folder and, unless it is kept, removes it again if it was not there and is still empty.
class OutFolder {
 public:
  explicit OutFolder(const fs::path& path) : path_(path) {
    std::error_code failed;
    // The outermost of the folders that are missing.
    for (fs::path missing = fs::absolute(path, failed); !failed && !fs::exists(missing, failed);
         missing = missing.parent_path())
      made_.push_back(missing);
    fs::create_directories(path_, failed);
    if (failed) throw Error("cannot make the folder " + path_.string() + ": " + failed.message());
  }
  ~OutFolder() {
    std::error_code in_use;
    for (const fs::path& folder : made_)
      if (!fs::remove(folder, in_use)) break;  // fails on a folder that holds something
  }
  OutFolder(const OutFolder&) = delete;
  OutFolder& operator=(const OutFolder&) = delete;

 private:
  fs::path path_;
  std::vector<fs::path> made_;  // innermost first
};

/// Standard input as a file, for as long as the object lives: it is read more than once.
class Spool {
 public:
  explicit Spool(const fs::path& path) : path_(path) {
    AtomicFile file(path_);
    std::vector<std::byte> buffer(1 << 20);
    while (true) {
      const ssize_t count = ::read(STDIN_FILENO, buffer.data(), buffer.size());
      if (count < 0 && errno == EINTR) continue;
      if (count < 0) fail_reading("standard input", std::generic_category().message(errno));
      if (count == 0) break;
      file.write(std::span(buffer).first(static_cast<std::size_t>(count)));
    }
    file.commit();
  }
  ~Spool() {
    std::error_code ignored;
    fs::remove(path_, ignored);
  }
  Spool(const Spool&) = delete;
  Spool& operator=(const Spool&) = delete;

  const fs::path& path() const { return path_; }

 private:
  fs::path path_;
};

/// Texts to encode, and their ids.
struct Batch {
  struct Part {
    std::size_t text_bytes;
    bool held_out;
    bool continued;  // these as in ChunkReader::Chunk
    bool ends;
    std::size_t ids = 0;
  };
  std::string text;
  std::vector<Part> parts;
  std::vector<std::int32_t> ids;
  ChunkReader::Position position;  // behind it
};

/// How far the encoding has come, as the journal keeps it.
struct Journal {
  ChunkReader::Position position;
  ShardExtent train;
  ShardExtent val;
};

json to_json(const ShardExtent& extent) {
  return {{"tokens", extent.size}, {"text_bytes", extent.text_bytes}, {"documents", extent.documents}};
}

ShardExtent shard_extent(const json& value) {
  return {value.at("tokens"), value.at("text_bytes"), value.at("documents")};
}

class Preparation {
 public:
  explicit Preparation(const PrepareOptions& options) : options_(options) {
    check(options);
    trained_size_ = sentencepiece_size(options.tokenizer);
    if (options.model_type != "bpe" && options.model_type != "unigram")
      throw Error("--model-type must be bpe or unigram, got '" + options.model_type + "'");
  }

  PrepareResult run() {
    std::unique_ptr<Tokenizer> tokenizer = trained_size_ ? nullptr : Tokenizer::open(options_.tokenizer);
    list_files();
    read_documents();
    const json record = describe(tokenizer.get());
    if (const auto result = existing(record)) {
      remove_working_files();
      return *result;
    }
    split();
    if (!tokenizer) tokenizer = train_tokenizer();
    return write(*tokenizer, record);
  }

 private:
  void report(const PrepareProgress& progress) const {
    if (options_.progress) options_.progress(progress);
  }

  void list_files() {
    std::vector<fs::path> inputs = options_.inputs;
    const auto standard_input = std::remove(inputs.begin(), inputs.end(), "-");
    const bool reads_stdin = standard_input != inputs.end();
    inputs.erase(standard_input, inputs.end());
    if (!inputs.empty()) corpus_.files = list_documents(inputs);
    if (reads_stdin) {
      out_.emplace(options_.out);
      spool_.emplace(options_.out / ("stdin.part." + options_.stdin_format));
      corpus_.files.push_back(spool_->path());
    }
    corpus_.reading.text_field = options_.text_field;
    corpus_.min_chars = options_.min_chars;
    corpus_.max_documents = options_.max_documents;
  }

  /// Goes through the whole corpus once: `begin` is called at each document, `use` with its pieces, `end`
  /// when it is over.
  template <typename Use, typename End>
  void for_each_document(CorpusReader& reader, std::string_view stage, Use&& use, End&& end) const {
    PrepareProgress progress{.stage = stage, .fraction = 0};
    std::int64_t reported = 0;
    report(progress);
    while (reader.next()) {
      while (const auto piece = reader.piece()) {
        use(*piece);
        progress.text_bytes += static_cast<std::int64_t>(piece->size());
        if (progress.text_bytes - reported < kReportBytes) continue;
        reported = progress.text_bytes;
        progress.fraction = reader.fraction();
        report(progress);
      }
      end();
      ++progress.documents;
    }
    progress.fraction = 1;
    report(progress);
  }

  void read_documents() {
    CorpusReader reader(corpus_);
    std::uint64_t size = 0;
    for_each_document(
        reader, "reading", [&](std::string_view piece) { size += piece.size(); },
        [&] {
          const bool held_out = static_cast<double>(reader.hash()) * 0x1p-64 < options_.val_fraction;
          split_.held_out.push_back(held_out);
          if (sizes_.size() < kMostUnequal) sizes_.push_back(size);
          text_bytes_ += size;
          if (held_out) held_out_bytes_ += size;
          size = 0;
        });
    texts_hash_ = reader.texts_hash();
    file_hashes_ = reader.file_hashes();
    if (split_.held_out.empty())
      throw Error(
          "there is no text: " +
          (options_.min_chars > 0
               ? "no document has the " + std::to_string(options_.min_chars) + " characters of --min-chars"
               : "all " + std::to_string(corpus_.files.size()) + " input files are empty") +
          "; name others");
  }

  /// Everything that decides what is written. Paths do not: the same texts elsewhere give the same folder.
  json describe(const Tokenizer* given) const {
    json record = {
        {"version", kRecordVersion},
        {"documents", split_.held_out.size()},
        {"texts", texts_hash_},
        {"tokenizer", given ? "fingerprint:" + std::to_string(given->fingerprint()) : options_.tokenizer},
        {"val_fraction", options_.val_fraction}};
    if (!given) record["model_type"] = options_.model_type;
    return record;
  }

  PrepareResult result(const Tokenizer& tokenizer, const ShardExtent& train, const ShardExtent& val) const {
    return {.documents = split_.documents(),
            .vocab_size = tokenizer.vocab_size(),
            .train_bytes = train.text_bytes,
            .val_bytes = val.text_bytes,
            .train_tokens = train.size,
            .val_tokens = val.size,
            .train_documents = train.documents,
            .val_documents = val.documents,
            .alteration = tokenizer.alteration()};
  }

  /// The result, if the folder already holds it whole.
  std::optional<PrepareResult> existing(const json& record) const {
    try {
      if (json::parse(read_file(options_.out / kRecordFile)) != record) return std::nullopt;
      const Dataset dataset = Dataset::open(options_.out);
      const auto extent = [](const TokenShard& shard) {
        return ShardExtent{shard.size(), shard.text_bytes(), shard.document_count()};
      };
      PrepareResult found = result(*dataset.tokenizer, extent(dataset.train), extent(dataset.val));
      found.up_to_date = true;
      return found;
    } catch (const Error&) {
    } catch (const json::exception&) {
    }
    return std::nullopt;  // missing or damaged: to be made again
  }

  void split() {
    const auto total = static_cast<double>(text_bytes_);
    const auto held_out = static_cast<double>(held_out_bytes_);
    const double fraction = options_.val_fraction;
    if (held_out < total && held_out >= total * fraction / 4 && held_out <= total * fraction * 4) return;
    if (split_.held_out.size() > sizes_.size()) {
      if (held_out_bytes_ == 0 || held_out_bytes_ == text_bytes_)
        throw Error("--val-fraction " + std::to_string(fraction) + " holds out none or all of the " +
                    std::to_string(split_.held_out.size()) + " documents; choose another");
      return;
    }
    CorpusReader reader(corpus_, &file_hashes_);
    std::optional<TailFinder> tail;
    const auto size = [&] {
      return sizes_[std::min(split_.train_bytes.size(), sizes_.size() - 1)];  // one more: the input changed
    };
    for_each_document(
        reader, "splitting",
        [&](std::string_view piece) {
          if (!tail) tail.emplace(size(), fraction);
          tail->read(piece);
        },
        [&] {
          split_.train_bytes.push_back(tail->start());
          tail.reset();
        });
  }

  std::uint64_t train_bytes() const {
    std::uint64_t total = text_bytes_ - held_out_bytes_;
    if (!split_.train_bytes.empty()) {
      total = 0;
      for (const std::uint64_t bytes : split_.train_bytes) total += bytes;
    }
    return total;
  }

  /// Trains on the training text, or an even sample of it.
  std::unique_ptr<Tokenizer> train_tokenizer() const {
    const std::uint64_t stride = (train_bytes() + kSampleBytes - 1) / kSampleBytes;
    CorpusReader reader(corpus_, &file_hashes_);
    ChunkReader chunks(reader, split_, kSampleChunkBytes);
    std::string sample;
    std::uint64_t count = 0;
    PrepareProgress progress{.stage = "sampling", .fraction = 0};
    report(progress);
    while (const auto chunk = chunks.next()) {
      progress.text_bytes += static_cast<std::int64_t>(chunk->text.size());
      if (!chunk->held_out && count++ % stride == 0) {
        sample += chunk->text;
        progress.fraction = static_cast<double>(progress.text_bytes) / static_cast<double>(text_bytes_);
        progress.documents = chunks.position().documents;
        report(progress);
      }
    }
    report({.stage = "training the tokenizer", .fraction = 0});
    return Tokenizer::from_serialized(train_sentencepiece(sample, *trained_size_, options_.model_type));
  }

  PrepareResult write(const Tokenizer& tokenizer, json record) {
    if (!out_) out_.emplace(options_.out);
    const fs::path& out = options_.out;
    const FolderLock lock(out);
    json identity = record;
    identity["fingerprint"] = tokenizer.fingerprint();
    const PrepareResult written = encode(tokenizer, identity);
    // With the record, everything is in place: it went first, and comes last.
    write_file(out / kTokenizerFile, tokenizer.serialized());
    write_file(out / kRecordFile, record.dump(2) + "\n");
    remove_working_files();
    return written;
  }

  /// What a broken-off call with the same identity has left.
  std::optional<Journal> read_journal(const json& identity) const {
    try {
      const json read = json::parse(read_file(options_.out / kJournalFile));
      if (read.at("identity") != identity) return std::nullopt;
      return Journal{{read.at("documents"), read.at("bytes"), read.at("texts")},
                     shard_extent(read.at("train")),
                     shard_extent(read.at("val"))};
    } catch (const Error&) {
    } catch (const json::exception&) {
    }
    return std::nullopt;
  }

  void write_journal(const json& identity, const Journal& journal) const {
    const json content = {{"identity", identity},
                          {"documents", journal.position.documents},
                          {"bytes", journal.position.bytes},
                          {"texts", journal.position.texts_hash},
                          {"train", to_json(journal.train)},
                          {"val", to_json(journal.val)}};
    write_file(options_.out / kJournalFile, content.dump(2) + "\n");
  }

  struct Shards {
    Shards(const fs::path& out, const Tokenizer& tokenizer, const Journal& from)
        : train(out / kTrainFile, tokenizer.vocab_size(), tokenizer.fingerprint(), from.train),
          val(out / kValFile, tokenizer.vocab_size(), tokenizer.fingerprint(), from.val) {}
    std::int64_t text_bytes() const { return train.extent().text_bytes + val.extent().text_bytes; }

    TokenShardWriter train;
    TokenShardWriter val;
  };

  PrepareResult encode(const Tokenizer& tokenizer, const json& identity) {
    std::optional<Shards> shards;
    Journal journal;
    if (const auto found = read_journal(identity)) {
      try {
        shards.emplace(options_.out, tokenizer, *found);
        journal = *found;
      } catch (const Error&) {  // its files are gone
      }
    }
    if (!shards) {
      remove(kJournalFile);
      shards.emplace(options_.out, tokenizer, journal);
    }
    try {
      encode(tokenizer, identity, journal, *shards);
    } catch (const ChangedInput&) {
      remove(kJournalFile);
      shards->train.discard();
      shards->val.discard();
      throw;
    }
    remove(kRecordFile);  // from here on the folder changes
    shards->train.commit();
    shards->val.commit();
    PrepareResult written = result(tokenizer, shards->train.extent(), shards->val.extent());
    written.resumed_bytes = journal.train.text_bytes + journal.val.text_bytes;
    return written;
  }

  void skip(ChunkReader& chunks, const ChunkReader::Position& position, CorpusReader& reader) const {
    while (chunks.position().documents < position.documents && chunks.skip_document())
      report({.stage = "reading back", .fraction = reader.fraction()});
    const bool there = chunks.position().documents == position.documents && chunks.skip_bytes(position.bytes);
    if (!there || chunks.position() != position) throw ChangedInput(reader.file());
  }

  void encode(const Tokenizer& tokenizer, const json& identity, const Journal& from, Shards& shards) const {
    CorpusReader reader(corpus_, &file_hashes_);
    ChunkReader chunks(reader, split_, kEncodeChunkBytes);
    skip(chunks, from.position, reader);

    const int threads = options_.threads > 0
                            ? options_.threads
                            : static_cast<int>(std::clamp(std::thread::hardware_concurrency(), 1u, 1024u));
    std::vector<std::unique_ptr<Tokenizer>> tokenizers;
    for (int i = 0; i < threads; ++i) tokenizers.push_back(tokenizer.clone());
    const std::int32_t end_of_text = tokenizer.end_of_text();

    const auto produce = [&](Batch& batch) {
      while (batch.text.size() < kEncodeChunkBytes) {
        const auto chunk = chunks.next();
        if (!chunk) break;
        batch.text += chunk->text;
        batch.parts.push_back({chunk->text.size(), chunk->held_out, chunk->continued, chunk->ends});
      }
      batch.position = chunks.position();
      return !batch.parts.empty();
    };
    const auto transform = [&](Batch& batch, int worker) {
      std::string_view text = batch.text;
      for (Batch::Part& part : batch.parts) {
        const std::vector<std::int32_t> ids = tokenizers[static_cast<std::size_t>(worker)]->encode(
            text.substr(0, part.text_bytes), part.continued);
        batch.ids.insert(batch.ids.end(), ids.begin(), ids.end());
        if (part.ends) batch.ids.push_back(end_of_text);
        part.ids = ids.size() + (part.ends ? 1 : 0);
        text.remove_prefix(part.text_bytes);
      }
    };
    std::int64_t saved = shards.text_bytes();
    const auto save = [&](const ChunkReader::Position& position) {
      write_journal(identity, {position, shards.train.save(), shards.val.save()});
      saved = shards.text_bytes();
    };
    const auto consume = [&](const Batch& batch) {
      std::span<const std::int32_t> ids = batch.ids;
      for (const Batch::Part& part : batch.parts) {
        TokenShardWriter& shard = part.held_out ? shards.val : shards.train;
        shard.append(ids.first(part.ids), static_cast<std::int64_t>(part.text_bytes));
        if (part.ends) shard.end_document();
        ids = ids.subspan(part.ids);
      }
      const std::int64_t done = shards.text_bytes();
      if (done - saved >= options_.journal_bytes) save(batch.position);
      try {
        report({.stage = "encoding",
                .fraction = static_cast<double>(done) / static_cast<double>(text_bytes_),
                .text_bytes = done,
                .documents = batch.position.documents,
                .tokens = shards.train.extent().size + shards.val.extent().size});
      } catch (...) {
        save(batch.position);
        throw;
      }
    };
    ordered_parallel<Batch>(threads, produce, transform, consume);
  }

  void remove(const std::string& name) const {
    std::error_code failed;
    fs::remove(options_.out / name, failed);
    if (failed) throw Error("cannot remove " + (options_.out / name).string() + ": " + failed.message());
  }

  void remove_working_files() const {
    for (const std::string shard : {kTrainFile, kValFile})
      for (const char* suffix : {".part", ".part-ends"}) remove(shard + suffix);
    remove(kJournalFile);
  }

  const PrepareOptions& options_;
  std::optional<std::int64_t> trained_size_;
  std::optional<OutFolder> out_;
  std::optional<Spool> spool_;
  Corpus corpus_;
  Split split_;
  std::vector<std::uint64_t> sizes_;  // of the first documents
  std::uint64_t text_bytes_ = 0;
  std::uint64_t held_out_bytes_ = 0;  // of whole documents
  std::uint64_t texts_hash_ = 0;
  std::vector<std::uint64_t> file_hashes_;
};

}  // namespace

PrepareResult prepare(const PrepareOptions& options) { return Preparation(options).run(); }

bool can_resume_prepare(const std::filesystem::path& out) {
  std::error_code ignored;
  return fs::exists(out / kJournalFile, ignored);
}

}  // namespace flashlm

// SPDX-License-Identifier: Apache-2.0
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <catch2/catch.hpp>
#include <cmath>
#include <map>
#include <nlohmann/json.hpp>
#include <random>
#include <set>
#include <stdexcept>
#include <vector>

#include "data/corpus.h"
#include "data/dataset.h"
#include "data/file.h"
#include "data/prepare.h"
#include "data/sentencepiece_tokenizer.h"
#include "tests/data/support.h"

using Catch::Contains;
using namespace flashlm;

namespace {

namespace fs = std::filesystem;

void write_documents(const fs::path& folder, int first, int count) {
  fs::create_directories(folder / "deeper");
  for (int i = first; i < first + count; ++i)
    put_file(folder / (i % 3 ? "" : "deeper") / (std::to_string(i) + ".txt"),
             "document " + std::to_string(i) + ": " + english(20, static_cast<unsigned>(i)));
}

PrepareOptions options(const Scratch& scratch, const std::string& in = "in", const std::string& out = "out") {
  PrepareOptions options;
  options.inputs = {scratch / in};
  options.out = scratch / out;
  options.tokenizer = "sentencepiece:400";
  return options;
}

/// Some megabytes: JSON lines of all lengths, and a file of one document that is larger than what is read at
/// once. With a tokenizer that is there, so that only the encoding takes time.
PrepareOptions large_options(const Scratch& scratch, const std::string& out = "out") {
  if (!fs::exists(scratch / "in")) {
    fs::create_directory(scratch / "in");
    std::string lines;
    for (unsigned i = 0; i < 120; ++i)
      lines +=
          nlohmann::json{{"text", std::to_string(i) + english(static_cast<int>(i * i % 307), i)}}.dump() +
          "\n";
    put_file(scratch / "in/lines.jsonl", lines);
    put_file(scratch / "in/long.txt", english(24'000, 7));
    put_file(scratch / "mine.model", train_sentencepiece(english(500, 4), 320));
  }
  PrepareOptions large = options(scratch, "in", out);
  large.tokenizer = (scratch / "mine.model").string();
  large.val_fraction = 0.3;
  large.journal_bytes = 600'000;
  return large;
}

/// The texts between the end_of_text tokens.
std::vector<std::string> documents_of(const TokenShard& shard, const Tokenizer& tokenizer) {
  std::vector<std::string> texts(1);
  for (std::int64_t i = 0; i < shard.size(); ++i)
    if (shard[i] == tokenizer.end_of_text())
      texts.emplace_back();
    else
      texts.back() += tokenizer.token_text(shard[i]);
  REQUIRE(texts.back().empty());  // one is behind the last document, too
  texts.pop_back();
  return texts;
}

std::set<std::string> held_out(const fs::path& folder) {
  const Dataset dataset = Dataset::open(folder);
  const auto texts = documents_of(dataset.val, *dataset.tokenizer);
  return {texts.begin(), texts.end()};
}

std::map<std::string, std::string> contents(const fs::path& folder) {
  std::map<std::string, std::string> files;
  for (const fs::directory_entry& entry : fs::directory_iterator(folder))
    files[entry.path().filename().string()] = read_file(entry.path());
  return files;
}

}  // namespace

TEST_CASE("every document is in one of the two shards, whole", "[prepare]") {
  const Scratch scratch;
  write_documents(scratch / "in", 0, 200);
  put_file(scratch / "in/empty.txt", "");
  put_file(scratch / "in/notes.md", "not for training");
  const PrepareResult result = prepare(options(scratch));
  const Dataset dataset = Dataset::open(scratch / "out");
  const auto train = documents_of(dataset.train, *dataset.tokenizer);
  const auto val = documents_of(dataset.val, *dataset.tokenizer);

  std::multiset<std::string> written(train.begin(), train.end());
  written.insert(val.begin(), val.end());
  std::multiset<std::string> read;
  std::size_t bytes = 0;
  for (const fs::directory_entry& entry : fs::recursive_directory_iterator(scratch / "in"))
    if (entry.path().extension() == ".txt" && entry.file_size() > 0) {
      read.insert(read_file(entry.path()));
      bytes += entry.file_size();
    }
  CHECK(written == read);
  CHECK(val.size() >= 3);
  CHECK(val.size() <= 25);

  CHECK(result.documents == 200);
  CHECK(result.vocab_size == 400);
  CHECK(result.train_tokens == dataset.train.size());
  CHECK(result.val_tokens == dataset.val.size());
  CHECK(static_cast<std::size_t>(result.train_bytes + result.val_bytes) == bytes);
  CHECK(result.val_bytes == dataset.val.text_bytes());
  CHECK(result.bytes_per_token() > 2);
  CHECK_FALSE(result.up_to_date);
}

TEST_CASE("adding files moves no document from one side to the other", "[prepare]") {
  const Scratch scratch;
  write_documents(scratch / "in", 0, 150);
  prepare(options(scratch));
  const auto before = held_out(scratch / "out");
  write_documents(scratch / "in", 150, 100);
  prepare(options(scratch));
  const auto after = held_out(scratch / "out");
  CHECK(after.size() > before.size());
  CHECK(std::includes(after.begin(), after.end(), before.begin(), before.end()));
}

TEST_CASE("few documents give the end of each to validation", "[prepare]") {
  const Scratch scratch;
  fs::create_directory(scratch / "in");
  const std::string text = english(3000, 9);
  put_file(scratch / "in/only.txt", text);
  prepare(options(scratch));
  const Dataset dataset = Dataset::open(scratch / "out");
  const std::string train = documents_of(dataset.train, *dataset.tokenizer).at(0);
  const std::string val = documents_of(dataset.val, *dataset.tokenizer).at(0);
  CHECK(train + val == text);
  CHECK(train.ends_with("\n\n"));
  CHECK(dataset.tokenizer->serialized() ==
        train_sentencepiece(train, 400));  // it has not seen the held-out text
  CHECK(static_cast<double>(val.size()) < 0.05 * static_cast<double>(text.size()));
  CHECK(static_cast<double>(val.size()) > 0.04 * static_cast<double>(text.size()));

  // Without a paragraph, a line, a sentence or a space, the cut is still between characters.
  std::string unbroken;
  for (int i = 0; i < 5001; ++i) unbroken += i % 2 ? "\xC3\xA9" : "\xE2\x82\xAC";
  put_file(scratch / "in/only.txt", unbroken);
  PrepareOptions small = options(scratch);
  put_file(scratch / "model", dataset.tokenizer->serialized());
  small.tokenizer = (scratch / "model").string();
  prepare(small);
  const Dataset cut = Dataset::open(scratch / "out");
  const std::string tail = documents_of(cut.val, *cut.tokenizer).at(0);
  CHECK(documents_of(cut.train, *cut.tokenizer).at(0) + tail == unbroken);
  CHECK((static_cast<unsigned char>(tail[0]) & 0xC0) != 0x80);
}

TEST_CASE("the same text gives the same bytes, wherever it is", "[prepare]") {
  const Scratch scratch;
  write_documents(scratch / "in", 0, 80);
  fs::copy(scratch / "in", scratch / "elsewhere", fs::copy_options::recursive);
  prepare(options(scratch));
  prepare(options(scratch, "elsewhere", "out2"));
  const auto files = contents(scratch / "out");
  CHECK(files.size() == 4);
  CHECK(files == contents(scratch / "out2"));

  PrepareOptions twice = options(scratch, "in", "out3");
  twice.inputs.push_back(scratch / "elsewhere/../in/1.txt");  // named twice, read once
  prepare(twice);
  CHECK(files == contents(scratch / "out3"));
}

TEST_CASE("a folder that is up to date is left alone, any other is made again", "[prepare]") {
  const Scratch scratch;
  write_documents(scratch / "in", 0, 80);
  const PrepareResult first = prepare(options(scratch));
  const auto files = contents(scratch / "out");
  PrepareOptions again = options(scratch);

  SECTION("up to date") {
    again.progress = [](const PrepareProgress& now) {
      if (now.stage != "reading") throw std::logic_error("there is nothing to do");
    };
    const PrepareResult second = prepare(again);
    CHECK(second.up_to_date);
    CHECK(second.documents == first.documents);
    CHECK(second.train_tokens == first.train_tokens);
    CHECK(second.val_bytes == first.val_bytes);
  }
  SECTION("damaged") {
    for (const char* name : {kTokenizerFile, kTrainFile, kValFile, "prepare.json"}) {
      put_file(scratch / "out" / name, files.at(name).substr(0, files.at(name).size() / 2));
      CHECK_FALSE(prepare(again).up_to_date);
      CHECK(contents(scratch / "out") == files);
    }
  }
  SECTION("another option") {
    again.val_fraction = 0.2;
    CHECK_FALSE(prepare(again).up_to_date);
    CHECK(prepare(again).up_to_date);
    again.tokenizer = "sentencepiece:350";
    CHECK_FALSE(prepare(again).up_to_date);
    again.tokenizer = "sentencepiece:400";
    again.val_fraction = 0.05;
    prepare(again);
    CHECK(contents(scratch / "out") == files);
  }
  SECTION("another text") {
    write_documents(scratch / "in", 80, 1);
    CHECK_FALSE(prepare(again).up_to_date);
  }
}

TEST_CASE("a folder that was replaced by half is not taken for the old one", "[prepare]") {
  const Scratch scratch;
  write_documents(scratch / "in", 0, 80);
  put_file(scratch / "mine.model", train_sentencepiece(english(500, 4), 320));
  PrepareOptions first = options(scratch);
  first.tokenizer = (scratch / "mine.model").string();
  prepare(first);
  const auto files = contents(scratch / "out");

  PrepareOptions second = first;
  second.val_fraction = 0.2;
  second.progress = [&](const PrepareProgress& now) {
    if (now.stage != "encoding" || now.fraction < 1) return;
    fs::remove(scratch / "out" / kTokenizerFile);
    fs::create_directory(scratch / "out" / kTokenizerFile);  // the third file to be replaced cannot be
  };
  CHECK_THAT(error_of([&] { prepare(second); }), Contains("Is a directory"));
  fs::remove(scratch / "out" / kTokenizerFile);
  put_file(scratch / "out" / kTokenizerFile, files.at(kTokenizerFile));

  CHECK_FALSE(prepare(first).up_to_date);
  CHECK(contents(scratch / "out") == files);
}

TEST_CASE("a given tokenizer is used as it is", "[prepare]") {
  const Scratch scratch;
  write_documents(scratch / "in", 0, 80);
  put_file(scratch / "mine.model", train_sentencepiece(english(500, 4), 320));
  PrepareOptions given = options(scratch);
  given.tokenizer = (scratch / "mine.model").string();
  CHECK(prepare(given).vocab_size == 320);
  CHECK(read_file(scratch / "out/tokenizer.model") == read_file(scratch / "mine.model"));
  CHECK(prepare(given).up_to_date);
}

TEST_CASE("bad input is one clear line and nothing is written", "[prepare]") {
  const Scratch scratch;
  write_documents(scratch / "in", 0, 30);
  fs::create_directory(scratch / "void");
  fs::create_directory(scratch / "blank");
  put_file(scratch / "blank/a.txt", "");
  put_file(scratch / "notes.md", "text");
  PrepareOptions bad = options(scratch);
  const auto error = [&] { return error_of([&] { prepare(bad); }); };

  SECTION("inputs") {
    bad.inputs = {scratch / "absent"};
    CHECK_THAT(error(), Contains("absent does not exist"));
    bad.inputs = {scratch / "in", scratch / "void"};
    CHECK_THAT(error(), Contains("void holds no .txt"));
    bad.inputs = {scratch / "notes.md"};
    CHECK_THAT(error(), Contains("notes.md is not a .txt"));
    bad.inputs = {scratch / "blank"};
    CHECK_THAT(error(), Contains("there is no text"));
  }
  SECTION("options") {
    for (const double fraction : {0.0, -1.0, 0.6, std::nan("")}) {
      bad.val_fraction = fraction;
      CHECK_THAT(error(), Contains("--val-fraction must be"));
    }
    bad.val_fraction = 0.05;
    for (const char* spec :
         {"sentencepiece:", "sentencepiece:4k", "sentencepiece:0", "sentencepiece:99999999999"}) {
      bad.tokenizer = spec;
      CHECK_THAT(error(), Contains("--tokenizer sentencepiece:SIZE needs") && Contains(spec));
    }
    bad.tokenizer = "absent.model";
    CHECK_THAT(error(), Contains("absent.model"));
    bad.tokenizer = (scratch / "notes.md").string();
    CHECK_THAT(error(), Contains("not a sentencepiece model"));
    bad.tokenizer = "sentencepiece:60000";
    CHECK_THAT(error(), Contains("use --tokenizer sentencepiece:"));
  }
  SECTION("a place where no folder can be") {
    bad.out = scratch / "notes.md/out";
    CHECK_THAT(error(), Contains("cannot make the folder"));
  }
  CHECK_FALSE(fs::exists(scratch / "out"));
}

TEST_CASE("a full disk or an interruption leaves what was there", "[prepare]") {
  const Scratch scratch;
  write_documents(scratch / "in", 0, 80);
  SECTION("a new folder stays empty") {
    const FileSizeLimit limit(4000);
    CHECK_THAT(error_of([&] { prepare(options(scratch)); }),
               Contains("cannot write") && Contains("choose another --out"));
    CHECK_FALSE(fs::exists(scratch / "out"));
  }
}

TEST_CASE("the number of threads changes nothing", "[prepare]") {
  const Scratch scratch;
  PrepareOptions one = large_options(scratch);
  one.threads = 1;
  const PrepareResult result = prepare(one);
  CHECK(result.documents == 121);
  CHECK(result.train_documents + result.val_documents == result.documents);
  for (const int threads : {2, 5, 0}) {
    PrepareOptions more = large_options(scratch, "out" + std::to_string(threads));
    more.threads = threads;
    prepare(more);
    CHECK(contents(more.out) == contents(one.out));
  }
}

TEST_CASE("a document in many pieces has the ids of the whole", "[prepare]") {
  const Scratch scratch;
  const PrepareOptions large = large_options(scratch);
  const std::string text = read_file(scratch / "in/long.txt");
  REQUIRE(text.size() > kPieceBytes);
  SECTION("on one side") {
    prepare(large);
    const Dataset dataset = Dataset::open(large.out);
    const bool held_out = static_cast<double>(checksum(text)) * 0x1p-64 < large.val_fraction;
    const TokenShard& shard = held_out ? dataset.val : dataset.train;
    std::vector<std::int32_t> whole = dataset.tokenizer->encode(text);
    whole.push_back(dataset.tokenizer->end_of_text());
    const auto count = static_cast<std::int64_t>(whole.size());
    const std::int64_t last = shard.document_count() - 1;
    REQUIRE(shard.document_end(last) - shard.document_end(last - 1) == count);
    std::vector<std::int64_t> written(whole.size());
    shard.copy(shard.size() - count, written);
    CHECK(std::equal(written.begin(), written.end(), whole.begin()));
  }
  SECTION("cut in two") {
    PrepareOptions alone = large;
    alone.inputs = {scratch / "in/long.txt"};
    prepare(alone);
    const Dataset dataset = Dataset::open(alone.out);
    const std::size_t wanted = static_cast<std::size_t>(static_cast<double>(text.size()) * (1 - 0.3));
    const std::size_t cut = text.find("\n\n", wanted) + 2;
    CHECK(documents_of(dataset.train, *dataset.tokenizer) == std::vector{text.substr(0, cut)});
    CHECK(documents_of(dataset.val, *dataset.tokenizer) == std::vector{text.substr(cut)});
    CHECK(dataset.train.size() ==
          static_cast<std::int64_t>(dataset.tokenizer->encode(text.substr(0, cut)).size()) + 1);
  }
}

TEST_CASE("JSON lines in order, the first so many that are long enough", "[prepare]") {
  const Scratch scratch;
  fs::create_directory(scratch / "in");
  put_file(scratch / "mine.model", train_sentencepiece(english(500, 4), 320));
  // 0 ... 9 with as many characters, of two bytes each.
  const auto text = [](int characters) {
    std::string result;
    for (int i = 0; i < characters; ++i) result += "\xC3\xA9";
    return result;
  };
  for (const int file : {1, 2}) {
    std::string lines;
    for (int i = 0; i < 10; ++i) lines += "{\"n\": 1, \"body\": \"" + text(i) + "\"}\n";
    put_file(scratch / ("in/" + std::to_string(file) + ".jsonl"), lines);
  }
  PrepareOptions chosen = options(scratch);
  chosen.tokenizer = (scratch / "mine.model").string();
  chosen.text_field = "body";
  chosen.val_fraction = 0.001;  // of which no character of these is held out
  const auto documents = [&] {
    prepare(chosen);
    const Dataset dataset = Dataset::open(chosen.out);
    CHECK(dataset.val.size() == 0);
    const std::vector<std::string> texts = documents_of(dataset.train, *dataset.tokenizer);
    CHECK(dataset.train.document_count() == static_cast<std::int64_t>(texts.size()));
    return texts;
  };
  const auto expected = [&](std::initializer_list<int> lengths) {
    std::vector<std::string> texts;
    for (const int length : lengths) texts.push_back(text(length));
    return texts;
  };
  CHECK(documents().size() == 18);
  chosen.min_chars = 4;
  CHECK(documents() == expected({4, 5, 6, 7, 8, 9, 4, 5, 6, 7, 8, 9}));
  chosen.max_documents = 8;
  CHECK(documents() == expected({4, 5, 6, 7, 8, 9, 4, 5}));
  chosen.min_chars = 9;
  CHECK(documents() == expected({9, 9}));
  chosen.max_documents = 1;
  CHECK(documents() == expected({9}));
  chosen.min_chars = 10;
  CHECK_THAT(error_of([&] { prepare(chosen); }),
             Contains("no document has the 10 characters of --min-chars"));
}

TEST_CASE("characters of documents that come in pieces", "[corpus]") {
  const Scratch scratch;
  const std::int64_t longest = static_cast<std::int64_t>(kPieceBytes) / 2 + 10;
  std::string text;
  for (std::int64_t i = 0; i < longest; ++i) text += "\xC3\xA9";
  put_file(scratch / "a.txt", text);
  put_file(scratch / "b.txt", std::string(300, '\x80'));  // no characters, but not nothing
  const auto chosen = [&](std::int64_t min_chars) {
    Corpus corpus{.files = {scratch / "a.txt", scratch / "b.txt"}, .reading = {}, .min_chars = min_chars};
    CorpusReader reader(corpus);
    std::vector<std::uint64_t> hashes;
    while (reader.next()) {
      std::string read;
      while (const auto piece = reader.piece()) read += *piece;
      CHECK(reader.hash() == checksum(read));
      hashes.push_back(reader.hash());
    }
    return hashes.size();
  };
  CHECK(chosen(0) == 2);
  CHECK(chosen(75) == 2);
  CHECK(chosen(76) == 1);
  CHECK(chosen(longest) == 1);
  CHECK(chosen(longest + 1) == 0);
}

TEST_CASE("where the held-out end begins does not depend on the pieces", "[corpus]") {
  // As the contract says it, on the whole text.
  const auto reference = [](std::string_view text, double fraction) {
    const auto wanted = static_cast<std::size_t>(static_cast<double>(text.size()) * (1 - fraction));
    const std::size_t last = wanted + (text.size() - wanted) / 2;
    for (const std::string_view mark : {"\n\n", "\n", ". ", " "})
      if (const std::size_t found = text.find(mark, wanted);
          found != std::string_view::npos && found + mark.size() <= last)
        return found + mark.size();
    std::size_t start = wanted;
    while (start < text.size() && (static_cast<unsigned char>(text[start]) & 0xC0) == 0x80) ++start;
    return start;
  };
  std::mt19937 random(3);
  std::set<std::size_t> places;
  for (int round = 0; round < 3000; ++round) {
    const std::string_view alphabet = round % 3 == 0   ? "ab\xC3\xA9"
                                      : round % 3 == 1 ? "abcdefghijk. \n"
                                                       : "\n. x";
    std::string text;
    for (std::uint32_t n = random() % 60; n > 0; --n) text += alphabet[random() % alphabet.size()];
    const double fraction = 0.05 + 0.45 * (random() % 100) / 100;
    TailFinder tail(text.size(), fraction);
    for (std::string_view rest = text; !rest.empty();) {
      const std::size_t size = std::min<std::size_t>(rest.size(), 1 + random() % 7);
      tail.read(rest.substr(0, size));
      rest.remove_prefix(size);
    }
    REQUIRE(tail.start() == reference(text, fraction));
  }
}

TEST_CASE("broken off at any moment, it goes on to the same bytes", "[prepare]") {
  const Scratch scratch;
  prepare(large_options(scratch, "unbroken"));
  const auto files = contents(scratch / "unbroken");
  PrepareOptions broken = large_options(scratch);
  std::int64_t calls = 0;
  std::int64_t last_call = 0;
  std::string stage;
  broken.progress = [&](const PrepareProgress& now) {
    stage = now.stage;
    if (++calls == last_call) throw std::runtime_error("interrupted");
  };

  SECTION("by an exception, and again, and again") {
    std::int64_t resumed = 0;
    for (last_call = 1;; ++last_call) {
      calls = 0;
      try {
        resumed = prepare(broken).resumed_bytes;
        break;
      } catch (const std::runtime_error&) {
        CHECK(fs::exists(broken.out) == can_resume_prepare(broken.out));
        CHECK((can_resume_prepare(broken.out) || stage != "encoding"));
        CHECK_FALSE(fs::exists(broken.out / kTrainFile));
      }
    }
    CHECK(last_call > 8);
    CHECK(resumed > 1'000'000);
    CHECK(contents(broken.out) == files);
  }
  SECTION("by an exception, from a fresh start each time") {
    for (last_call = 1;; ++last_call) {
      calls = 0;
      try {
        prepare(broken);
        break;
      } catch (const std::runtime_error&) {
      }
      CHECK_FALSE(prepare(large_options(scratch)).up_to_date);
      CHECK(contents(broken.out) == files);
      fs::remove_all(broken.out);
    }
    CHECK(last_call > 8);
  }
  SECTION("by the death of the process, with work done after the last journal") {
    broken.progress = [&](const PrepareProgress&) {
      if (++calls == last_call) _exit(9);
    };
    bool resumed = false;
    for (last_call = 1;; ++last_call) {
      const pid_t child = fork();
      if (child == 0) {
        prepare(broken);
        _exit(0);
      }
      int status = 0;
      waitpid(child, &status, 0);
      REQUIRE(WIFEXITED(status));
      if (WEXITSTATUS(status) == 0) break;
      resumed |= prepare(large_options(scratch)).resumed_bytes > 0;
      CHECK(contents(broken.out) == files);
      fs::remove_all(broken.out);
    }
    CHECK(last_call > 8);
    CHECK(resumed);
  }
  SECTION("by a full disk") {
    {
      const FileSizeLimit limit(1'000'000);
      CHECK_THAT(error_of([&] { prepare(broken); }), Contains("choose another --out"));
    }
    CHECK(can_resume_prepare(broken.out));
    CHECK(prepare(broken).resumed_bytes > 0);
    CHECK(contents(broken.out) == files);
  }
}

TEST_CASE("what a broken-off call has left is used by the same call alone", "[prepare]") {
  const Scratch scratch;
  PrepareOptions other = large_options(scratch, "unbroken");
  other.val_fraction = 0.2;
  prepare(other);
  const auto files = contents(scratch / "unbroken");
  PrepareOptions broken = large_options(scratch);
  broken.progress = [](const PrepareProgress& now) {
    if (now.stage == "encoding" && now.fraction > 0.5) throw std::runtime_error("interrupted");
  };
  CHECK_THROWS_WITH(prepare(broken), "interrupted");
  REQUIRE(can_resume_prepare(broken.out));
  other.out = broken.out;

  SECTION("another option") {
    CHECK(prepare(other).resumed_bytes == 0);
    CHECK(contents(other.out) == files);
  }
  SECTION("beside a finished folder, which stays until another is finished") {
    prepare(other);
    CHECK_THROWS_WITH(prepare(broken), "interrupted");
    CHECK(can_resume_prepare(other.out));
    for (const auto& [name, content] : files) CHECK(read_file(other.out / name) == content);
    CHECK(prepare(other).up_to_date);
    CHECK(contents(other.out) == files);  // and nothing else
  }
  SECTION("its files are gone or cut short") {
    for (const char* name :
         {"train.tokens.part", "train.tokens.part-ends", "val.tokens.part", "prepare.json.part"}) {
      fs::remove_all(broken.out);
      CHECK_THROWS_WITH(prepare(broken), "interrupted");
      const auto path = broken.out / name;
      if (name[0] == 't')
        fs::remove(path);
      else
        fs::resize_file(path, fs::file_size(path) / 2);
      PrepareOptions again = large_options(scratch);
      CHECK(prepare(again).resumed_bytes == 0);
      CHECK(contents(again.out) == [&] {
        prepare(large_options(scratch, "fresh"));
        return contents(scratch / "fresh");
      }());
    }
  }
  SECTION("another process is at work") {
    std::string error;
    PrepareOptions outer = large_options(scratch);
    outer.progress = [&](const PrepareProgress& now) {
      if (now.stage == "encoding" && error.empty())
        error = error_of([&] { prepare(large_options(scratch)); });
    };
    prepare(outer);
    CHECK_THAT(error, Contains("is being written by another process"));
  }
}

TEST_CASE("an input that changes while it is read", "[prepare]") {
  const Scratch scratch;
  const auto try_it = [&](PrepareOptions changing, std::string_view stage, auto&& change) {
    changing.journal_bytes = 1;
    bool done = false;
    changing.progress = [&](const PrepareProgress& now) {
      if (now.stage == stage && !std::exchange(done, true)) change();
    };
    CHECK_THAT(error_of([&] { prepare(changing); }), Contains("was changed while it was read"));
    CHECK(done);
    CHECK_FALSE(fs::exists(changing.out));
  };
  SECTION("while it is encoded") {
    // The first call comes when the first batch is done: the end of the last file is not read yet.
    PrepareOptions large = large_options(scratch);
    put_file(scratch / "in/longer.txt", english(50'000, 8));
    const std::string text = read_file(scratch / "in/longer.txt");
    large.threads = 1;
    SECTION("longer") {
      try_it(large, "encoding", [&] { std::ofstream(scratch / "in/longer.txt", std::ios::app) << "more"; });
    }
    SECTION("shorter") {
      try_it(large, "encoding", [&] { fs::resize_file(scratch / "in/longer.txt", text.size() - 1); });
    }
  }
  SECTION("while ends are looked for, or the tokenizer's sample is taken") {
    fs::create_directory(scratch / "in");
    for (const char* stage : {"splitting", "sampling"}) {
      put_file(scratch / "in/only.txt", english(3000, 9));
      try_it(options(scratch), stage, [&] { put_file(scratch / "in/only.txt", english(3000, 10)); });
      put_file(scratch / "in/only.jsonl", R"({"text": "a document"})");
      try_it(options(scratch), stage, [&] {
        std::ofstream(scratch / "in/only.jsonl", std::ios::app) << "\n"
                                                                << R"({"text": "another"})";
      });
      fs::remove(scratch / "in/only.jsonl");
    }
  }
}

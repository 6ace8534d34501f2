// SPDX-License-Identifier: Apache-2.0
#include <algorithm>
#include <catch2/catch.hpp>
#include <cmath>
#include <map>
#include <set>
#include <stdexcept>
#include <vector>

#include "data/dataset.h"
#include "data/file.h"
#include "data/prepare.h"
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
  return {.inputs = {scratch / in}, .out = scratch / out, .tokenizer = "sentencepiece:400", .progress = {}};
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
    again.progress = [](std::string_view stage, double) {
      if (stage != "reading") throw std::logic_error("there is nothing to do");
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
  second.progress = [&](std::string_view stage, double fraction) {
    if (stage != "encoding" || fraction < 1) return;
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
    CHECK_THAT(error(), Contains("void holds no .txt files"));
    bad.inputs = {scratch / "notes.md"};
    CHECK_THAT(error(), Contains("notes.md is not a .txt file"));
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
    CHECK_THAT(error(), Contains("there is no file 'absent.model'"));
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
    CHECK(is_empty(scratch / "out"));
  }
  SECTION("interrupted while it encodes other text") {
    prepare(options(scratch));
    const auto files = contents(scratch / "out");
    write_documents(scratch / "in", 80, 10);
    PrepareOptions interrupted = options(scratch);
    interrupted.progress = [](std::string_view stage, double fraction) {
      if (stage == "encoding" && fraction > 0.5) throw std::runtime_error("interrupted");
    };
    CHECK_THROWS_WITH(prepare(interrupted), "interrupted");
    CHECK(contents(scratch / "out") == files);
  }
}

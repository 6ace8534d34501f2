// SPDX-License-Identifier: Apache-2.0
#include <catch2/catch.hpp>
#include <cmath>
#include <vector>

#include "data/dataset.h"
#include "data/sentencepiece_tokenizer.h"
#include "data/word_classes.h"
#include "tests/data/support.h"

using Catch::Contains;
using namespace flashlm;

namespace {

void write_shard(const std::filesystem::path& path, const Tokenizer& tokenizer, std::string_view text) {
  TokenShardWriter writer(path, tokenizer.vocab_size(), tokenizer.fingerprint());
  writer.append(tokenizer.encode(text), static_cast<std::int64_t>(text.size()));
  writer.commit();
}

}  // namespace

TEST_CASE("a prepared folder is opened whole or refused", "[dataset]") {
  const Scratch scratch;
  const auto tokenizer = Tokenizer::from_serialized(train_sentencepiece(english(500, 1), 300));
  put_file(scratch / kTokenizerFile, tokenizer->serialized());
  write_shard(scratch / kTrainFile, *tokenizer, "the people");
  write_shard(scratch / kValFile, *tokenizer, "of the river");
  const auto open = [&] { return error_of([&] { Dataset::open(scratch.path()); }); };

  const Dataset dataset = Dataset::open(scratch.path());
  CHECK(dataset.train.text_bytes() == 10);
  CHECK(dataset.val.text_bytes() == 12);
  CHECK(dataset.tokenizer->fingerprint() == tokenizer->fingerprint());

  for (const char* name : {kTokenizerFile, kTrainFile, kValFile}) {
    std::filesystem::rename(scratch / name, scratch / "away");
    CHECK_THAT(open(), Contains(std::string("has no ") + name) &&
                           Contains("`flashlm prepare INPUT... --out " + scratch.path().string() + "`"));
    std::filesystem::rename(scratch / "away", scratch / name);
  }
  CHECK(open().empty());
  CHECK_THAT(error_of([&] { Dataset::open(scratch / "absent"); }), Contains("absent has no tokenizer.model"));

  SECTION("one shard of another tokenizer") {
    const auto other = Tokenizer::from_serialized(train_sentencepiece(english(500, 2) + "x", 300));
    write_shard(scratch / kValFile, *other, "of the river");
    CHECK_THAT(open(), Contains("val.tokens was not made with the tokenizer.model"));
  }
  SECTION("another tokenizer") {
    put_file(scratch / kTokenizerFile, train_sentencepiece(english(500, 2) + "x", 300));
    CHECK_THAT(open(), Contains("train.tokens was not made with the tokenizer.model"));
  }
  SECTION("a truncated tokenizer") {
    put_file(scratch / kTokenizerFile, tokenizer->serialized().substr(0, 3000));
    CHECK_THAT(open(), Contains("tokenizer.model is"));
  }
}

TEST_CASE("raw tokens are divided or come in two files", "[dataset]") {
  const Scratch scratch;
  std::string ids;
  for (int i = 0; i < 1000; ++i) ids += {static_cast<char>(i % 256), static_cast<char>(i / 256)};
  put_file(scratch / "train.bin", ids);
  put_file(scratch / "val.bin", ids.substr(0, 20));

  const Dataset divided = Dataset::open_raw(scratch / "train.bin", 1000, std::nullopt, 0.05);
  CHECK(divided.tokenizer == nullptr);
  CHECK(divided.train.size() == 950);
  CHECK(divided.val.size() == 50);
  CHECK(divided.train[949] == 949);
  CHECK(divided.val[0] == 950);

  const Dataset two = Dataset::open_raw(scratch / "train.bin", 1000, scratch / "val.bin", 0.05);
  CHECK(two.train.size() == 1000);
  CHECK(two.val.size() == 10);

  for (const double fraction : {0.0, 1.0, -0.1, std::nan("")})
    CHECK_THAT(error_of([&] { Dataset::open_raw(scratch / "train.bin", 1000, std::nullopt, fraction); }),
               Contains("--val-fraction"));
}

TEST_CASE("several folders are one mix, if one tokenizer made them", "[dataset]") {
  const Scratch scratch;
  const auto tokenizer = Tokenizer::from_serialized(train_sentencepiece(english(500, 1), 300));
  const auto make = [&](const std::string& name, const Tokenizer& with, std::string_view text) {
    std::filesystem::create_directory(scratch / name);
    put_file(scratch / name / kTokenizerFile, with.serialized());
    write_shard(scratch / name / kTrainFile, with, text);
    write_shard(scratch / name / kValFile, with, "of the river");
    return (scratch / name).string();
  };
  const std::string a = make("a", *tokenizer, "the people"), b = make("b", *tokenizer, "peace and commerce"),
                    odd = make("odd,=2", *tokenizer, "winter");
  const auto described = [](const DataMix& mix) {
    std::string text;
    for (const TokenSource& source : mix.train) {
      text += std::filesystem::path(source.name).filename().string() + " " +
              std::to_string(source.tokens.text_bytes()) + " " + std::to_string(source.weight) + "; ";
    }
    return text;
  };
  CHECK(described(DataMix::open(a)) == "a 10 1.000000; ");
  CHECK(described(DataMix::open(a + "=3")) == "a 10 3.000000; ");
  CHECK(described(DataMix::open(a + "," + b + "=0.25")) == "a 10 1.000000; b 18 0.250000; ");
  CHECK(described(DataMix::open(odd)) == "odd,=2 6 1.000000; ");
  CHECK(described(DataMix::open(b + "=1e3," + b)) == "b 18 1000.000000; b 18 1.000000; ");
  const DataMix mix = DataMix::open(a + "," + b + "=0.25");
  CHECK(mix.val.size() == 2);
  CHECK(mix.val[1].weight == 0.25);
  CHECK(mix.val[1].tokens.text_bytes() == 12);
  CHECK(mix.tokenizer->fingerprint() == tokenizer->fingerprint());

  for (const std::string weight : {"0", "-1", "x", "", "1x", "inf", "nan"})
    CHECK_THAT(error_of([&] { DataMix::open(a + "=" + weight); }),
               Contains("must be a weight above 0, got '" + weight + "'"));
  for (const std::string& text : {a + ",", "," + a, a + ",," + b, std::string(",")})
    CHECK_THAT(error_of([&] { DataMix::open(text); }), Contains("a path on each side of a comma"));
  CHECK_THAT(error_of([&] { DataMix::open(a + ",nowhere"); }), Contains("nowhere has no tokenizer.model"));

  const auto other = Tokenizer::from_serialized(train_sentencepiece(english(500, 2) + "x", 300));
  const std::string c = make("c", *other, "the people");
  CHECK_THAT(error_of([&] { DataMix::open(a + "," + c); }),
             Contains("/c was not made with the tokenizer of ") && Contains("/a; prepare it with that one"));
}

TEST_CASE("several raw files are one mix, validated on their own ends or on one file", "[dataset]") {
  const Scratch scratch;
  std::string ids;
  for (int i = 0; i < 100; ++i) ids += {static_cast<char>(i), '\0'};
  put_file(scratch / "a.bin", ids);
  put_file(scratch / "b.bin", ids.substr(0, 80));
  put_file(scratch / "val.bin", ids.substr(0, 20));
  const std::string text = (scratch / "a.bin").string() + "=2," + (scratch / "b.bin").string();
  const DataMix mix = DataMix::open_raw(text, 100, std::nullopt, 0.1);
  CHECK(mix.tokenizer == nullptr);
  CHECK(mix.train[0].tokens.size() == 90);
  CHECK(mix.train[1].tokens.size() == 36);
  CHECK(mix.val[0].tokens.size() == 10);
  CHECK(mix.val[1].tokens[0] == 36);
  CHECK(mix.val[0].weight == 2);
  const DataMix one = DataMix::open_raw(text, 100, scratch / "val.bin", 0.1);
  CHECK(one.train.size() == 2);
  REQUIRE(one.val.size() == 1);
  CHECK(one.val[0].tokens.size() == 10);
  CHECK(one.val[0].weight == 1);

  // Shards that say who made them must agree; those that do not may go with any.
  const auto shard = [&](const std::string& name, std::uint64_t fingerprint) {
    TokenShardWriter writer(scratch / name, 100, fingerprint);
    writer.append(std::vector<std::int32_t>(50, 7), 0);
    writer.commit();
    return (scratch / name).string();
  };
  const std::string first = shard("1.tokens", 1), second = shard("2.tokens", 2);
  const auto open = [&](const std::string& files) {
    return error_of([&] { DataMix::open_raw(files, 100, std::nullopt, 0.1); });
  };
  CHECK(open(first + "," + first + "," + (scratch / "a.bin").string()).empty());
  CHECK_THAT(open(first + "," + second), Contains("2.tokens was not made with the tokenizer of "));
  CHECK_THAT(open((scratch / "a.bin").string() + "," + first + "," + second),
             Contains("2.tokens was not made"));
}

TEST_CASE("the words of a mix are counted by the weights of its sources", "[dataset]") {
  const Scratch scratch;
  const auto shard = [&](const std::string& name, const std::vector<std::int32_t>& ids) {
    TokenShardWriter writer(scratch / name, 4, 0);
    writer.append(ids, 0);
    writer.commit();
    return TokenShard::open(scratch / name);
  };
  const TokenShard few = shard("few", {0, 1, 1, 3}), many = shard("many", std::vector<std::int32_t>(36, 2));
  using Counts = std::vector<std::int64_t>;
  CHECK(word_counts({{few, 7}}) == Counts{1, 2, 0, 1});
  // 40 tokens in all, three quarters of which are to be expected from the first.
  CHECK(word_counts({{few, 3}, {many, 1}}) == Counts{8, 15, 10, 8});
}

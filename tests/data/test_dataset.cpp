// SPDX-License-Identifier: Apache-2.0
#include <catch2/catch.hpp>
#include <cmath>
#include <vector>

#include "data/dataset.h"
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

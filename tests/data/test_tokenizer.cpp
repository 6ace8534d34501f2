// SPDX-License-Identifier: Apache-2.0
// Which kind a file or folder is. The kinds themselves have tests of their own.
#include <catch2/catch.hpp>

#include "data/file.h"
#include "data/sentencepiece_tokenizer.h"
#include "data/tokenizer.h"
#include "tests/data/support.h"

using Catch::Contains;
using namespace flashlm;

namespace {

/// GPT-2's files with bytes and one merge.
std::string encoder_json() {
  std::string json = R"({"<|endoftext|>":257,"th":256)";
  int next = 0x100;
  for (int byte = 0; byte < 256; ++byte) {
    const bool itself = (byte > 0x20 && byte < 0x7F) || (byte > 0xA0 && byte != 0xAD);
    char name[16];
    std::snprintf(name, sizeof name, "\\u%04x", itself ? byte : next++);
    json += ",\"" + std::string(name) + "\":" + std::to_string(byte);
  }
  return json + "}";
}

}  // namespace

TEST_CASE("a tokenizer is found in a folder or by its content", "[tokenizer]") {
  const Scratch scratch;
  const auto folder = [&](std::string_view name) {
    std::filesystem::create_directory(scratch / name);
    return scratch / name;
  };
  const auto gpt2 = folder("gpt2");
  put_file(gpt2 / "encoder.json", encoder_json());
  put_file(gpt2 / "vocab.bpe", "#version: 0.2\nt h\n");
  const auto tokenizer = Tokenizer::load(gpt2);
  CHECK(tokenizer->vocab_size() == 258);
  CHECK(tokenizer->encode("thh") == std::vector<std::int32_t>{256, 'h'});
  CHECK(Tokenizer::open("gpt2:" + gpt2.string())->fingerprint() == tokenizer->fingerprint());

  const auto hugging_face = folder("hugging_face");
  put_file(hugging_face / "tokenizer.json", tokenizer->serialized());
  const auto run = folder("run");
  put_file(run / "tokenizer.model", tokenizer->serialized());
  for (const auto& path : {hugging_face, run, run / "tokenizer.model"})
    CHECK(Tokenizer::open(path.string())->fingerprint() == tokenizer->fingerprint());
  CHECK(Tokenizer::load(run)->fingerprint() == checksum(tokenizer->serialized()));

  const std::string model = train_sentencepiece(english(500, 1), 330);
  put_file(run / "tokenizer.model", model);
  CHECK(Tokenizer::load(run)->serialized() == model);
}

TEST_CASE("what holds no tokenizer is refused", "[tokenizer]") {
  const Scratch scratch;
  CHECK_THAT(error_of([&] { Tokenizer::load(scratch.path()); }), Contains("holds no tokenizer"));
  CHECK_THAT(error_of([&] { Tokenizer::load(scratch / "absent"); }), Contains("absent"));
  CHECK_THAT(error_of([&] { Tokenizer::open("gpt2:" + scratch.path().string()); }),
             Contains("no encoder.json with vocab.bpe") && Contains("tools/setup"));
  put_file(scratch / "tokenizer.model", train_sentencepiece(english(500, 1), 330));
  CHECK_THAT(error_of([&] { Tokenizer::open("gpt2:" + scratch.path().string()); }),
             Contains("no encoder.json"));
  put_file(scratch / "encoder.json", encoder_json());
  CHECK_THAT(error_of([&] { Tokenizer::load(scratch.path()); }), Contains("vocab.bpe"));
  for (const std::string_view content : {"", "text", "dGhl", "dGhl x", " "})
    CHECK_THAT(error_of([&] { Tokenizer::from_serialized(content, "file"); }),
               Contains("file is no tokenizer, or is damaged"));
}

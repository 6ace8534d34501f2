// SPDX-License-Identifier: Apache-2.0
// Which kind of tokenizer a file or a folder holds, and what all kinds have in common.
#include "data/tokenizer.h"

#include "data/byte_pair_tokenizer.h"
#include "data/error.h"
#include "data/file.h"
#include "data/sentencepiece_tokenizer.h"

namespace flashlm {
namespace {

namespace fs = std::filesystem;

bool is_folder(const fs::path& path) {
  std::error_code ignored;
  return fs::is_directory(path, ignored);
}

bool is_there(const fs::path& path) {
  std::error_code ignored;
  return fs::exists(path, ignored);
}

}  // namespace

std::unique_ptr<Tokenizer> Tokenizer::open(const std::string& spec) {
  constexpr std::string_view kind = "gpt2:";
  if (!spec.starts_with(kind)) return load(spec);
  const fs::path folder = spec.substr(kind.size());
  if (!is_there(folder / "encoder.json") && !is_there(folder / "tokenizer.json"))
    throw Error(folder.string() + " has no encoder.json with vocab.bpe, and no tokenizer.json;" +
                " tools/setup puts GPT-2's into .corpus/gpt2");
  return load(folder);
}

std::unique_ptr<Tokenizer> Tokenizer::load(const fs::path& path) {
  if (!is_folder(path)) return from_serialized(read_file(path), path.string());
  if (is_there(path / "encoder.json"))
    return byte_pair_from_gpt2(read_file(path / "encoder.json"), read_file(path / "vocab.bpe"),
                               path.string());
  for (const char* name : {"tokenizer.json", "tokenizer.model"})
    if (is_there(path / name)) return load(path / name);
  throw Error(
      path.string() +
      " holds no tokenizer: neither encoder.json with vocab.bpe, nor tokenizer.json or tokenizer.model");
}

std::unique_ptr<Tokenizer> Tokenizer::from_serialized(std::string_view serialized, const std::string& name) {
  const std::size_t first = serialized.find_first_not_of(" \t\r\n");
  if (first != std::string_view::npos && serialized[first] == '{')
    return byte_pair_from_json(serialized, name);
  if (looks_like_ranks(serialized)) return byte_pair_from_ranks(serialized, name);
  return sentencepiece_tokenizer(serialized, name);
}

std::string Tokenizer::decode(std::span<const std::int32_t> ids) const {
  std::string text;
  for (const std::int32_t id : ids) text += token_text(id);
  return text;
}

std::uint64_t Tokenizer::fingerprint() const { return checksum(*serialized_); }

std::size_t Tokenizer::checked(std::int32_t id) const {
  if (id < 0 || id >= vocab_size())
    throw Error("token id " + std::to_string(id) + " is outside the vocabulary of " +
                std::to_string(vocab_size()));
  return static_cast<std::size_t>(id);
}

}  // namespace flashlm

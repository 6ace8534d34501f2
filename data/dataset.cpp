// SPDX-License-Identifier: Apache-2.0
// The checks that no single file can make: are all there, and do they belong together?
#include "data/dataset.h"

#include <string>
#include <system_error>

#include "data/error.h"

namespace flashlm {
namespace {

void check_made_with(const Tokenizer& tokenizer, const TokenShard& shard, const std::filesystem::path& path) {
  if (shard.fingerprint() != tokenizer.fingerprint() || shard.vocab_size() != tokenizer.vocab_size())
    throw Error(path.string() + " was not made with the " + kTokenizerFile +
                " beside it; make both again with `flashlm prepare INPUT... --out DIR`");
}

}  // namespace

Dataset Dataset::open(const std::filesystem::path& dir) {
  for (const char* name : {kTokenizerFile, kTrainFile, kValFile})
    if (std::error_code ignored; !std::filesystem::exists(dir / name, ignored))
      throw Error(dir.string() + " has no " + name + "; make it with `flashlm prepare INPUT... --out " +
                  dir.string() + "`");
  Dataset dataset{TokenShard::open(dir / kTrainFile), TokenShard::open(dir / kValFile),
                  Tokenizer::load(dir / kTokenizerFile)};
  check_made_with(*dataset.tokenizer, dataset.train, dir / kTrainFile);
  check_made_with(*dataset.tokenizer, dataset.val, dir / kValFile);
  return dataset;
}

Dataset Dataset::open_raw(const std::filesystem::path& tokens, std::int64_t vocab_size,
                          const std::optional<std::filesystem::path>& val_file, double val_fraction) {
  const TokenShard all = TokenShard::open_raw(tokens, vocab_size);
  if (val_file) return {all, TokenShard::open_raw(*val_file, vocab_size), nullptr};
  if (!(val_fraction > 0 && val_fraction < 1))
    throw Error("--val-fraction must be above 0 and below 1, got " + std::to_string(val_fraction));
  const auto train = static_cast<std::int64_t>(static_cast<double>(all.size()) * (1 - val_fraction));
  return {all.slice(0, train), all.slice(train, all.size() - train), nullptr};
}

}  // namespace flashlm

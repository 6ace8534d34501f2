// SPDX-License-Identifier: Apache-2.0
// The checks that no single file can make: are all there, and do they belong together?
#include "data/dataset.h"

#include <algorithm>
#include <charconv>
#include <cmath>
#include <string>
#include <system_error>
#include <utility>

#include "data/error.h"
#include "data/word_classes.h"

namespace flashlm {
namespace {

void check_made_with(const Tokenizer& tokenizer, const TokenShard& shard, const std::filesystem::path& path) {
  if (shard.fingerprint() != tokenizer.fingerprint() || shard.vocab_size() != tokenizer.vocab_size())
    throw Error(path.string() + " was not made with the " + kTokenizerFile +
                " beside it; make both again with `flashlm prepare INPUT... --out DIR`");
}

bool exists(const std::string& path) {
  std::error_code ignored;
  return std::filesystem::exists(path, ignored);
}

std::pair<std::string, double> path_and_weight(const std::string& text) {
  const std::size_t equals = text.rfind('=');
  if (equals == std::string::npos || exists(text)) return {text, 1};
  double weight = 0;
  const char* const end = text.data() + text.size();
  const auto [rest, failed] = std::from_chars(text.data() + equals + 1, end, weight);
  if (failed != std::errc() || rest != end || !(weight > 0) || !std::isfinite(weight))
    throw Error("what follows '=' in " + text + " must be a weight above 0, got '" + text.substr(equals + 1) +
                "'; write PATH=WEIGHT,PATH=WEIGHT");
  return {text.substr(0, equals), weight};
}

std::vector<std::pair<std::string, double>> paths_and_weights(const std::string& text) {
  if (exists(text)) return {{text, 1}};
  std::vector<std::pair<std::string, double>> found;
  for (std::size_t begin = 0; begin <= text.size();) {
    const std::size_t end = std::min(text.find(',', begin), text.size());
    if (end == begin)
      throw Error("there must be a path on each side of a comma, got '" + text + "'; write PATH=WEIGHT,PATH");
    found.push_back(path_and_weight(text.substr(begin, end - begin)));
    begin = end + 1;
  }
  return found;
}

/// `open_one` opens the data set at a path.
template <class OpenOne>
DataMix open_all(const std::string& text, OpenOne&& open_one) {
  DataMix mix;
  std::uint64_t fingerprint = 0;
  for (const auto& [path, weight] : paths_and_weights(text)) {
    Dataset dataset = open_one(path);
    const std::uint64_t other = dataset.train.fingerprint();
    if (other != 0 && fingerprint != 0 && other != fingerprint)
      throw Error(path + " was not made with the tokenizer of " + mix.train.front().name +
                  "; prepare it with that one: flashlm prepare INPUT... --out DIR --tokenizer FILE");
    fingerprint = other != 0 ? other : fingerprint;
    if (mix.train.empty()) mix.tokenizer = std::move(dataset.tokenizer);
    mix.train.push_back({dataset.train, weight, path});
    mix.val.push_back({dataset.val, weight, path});
  }
  return mix;
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

DataMix DataMix::open(const std::string& folders) {
  return open_all(folders, [](const std::string& path) { return Dataset::open(path); });
}

DataMix DataMix::open_raw(const std::string& files, std::int64_t vocab_size,
                          const std::optional<std::filesystem::path>& val_file, double val_fraction) {
  DataMix mix = open_all(files, [&](const std::string& path) {
    return Dataset::open_raw(path, vocab_size, val_file, val_fraction);
  });
  if (val_file) mix.val = {{mix.val.front().tokens, 1, val_file->string()}};
  return mix;
}

std::vector<std::int64_t> word_counts(const std::vector<TokenSource>& sources) {
  if (sources.size() == 1) return word_counts(sources.front().tokens);
  double weights = 0;
  double size = 0;
  for (const TokenSource& source : sources) {
    weights += source.weight;
    size += static_cast<double>(source.tokens.size());
  }
  std::vector<double> expected(static_cast<std::size_t>(sources.front().tokens.vocab_size()));
  for (const TokenSource& source : sources) {
    const double factor =
        source.weight / weights * size / static_cast<double>(std::max<std::int64_t>(1, source.tokens.size()));
    const std::vector<std::int64_t> counts = word_counts(source.tokens);
    for (std::size_t id = 0; id < counts.size(); ++id)
      expected[id] += factor * static_cast<double>(counts[id]);
  }
  std::vector<std::int64_t> rounded;
  for (const double count : expected) rounded.push_back(std::llround(count));
  return rounded;
}

}  // namespace flashlm

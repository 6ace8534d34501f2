// SPDX-License-Identifier: Apache-2.0
// The file of word classes, and the builders that look at words one by one. The exchange of words between
// classes is in exchange_classes.cpp.
#include "data/word_classes.h"

#include <algorithm>
#include <charconv>
#include <cmath>
#include <numeric>
#include <optional>
#include <string_view>
#include <utility>

#include "data/error.h"
#include "data/word_order.h"

namespace flashlm {
namespace {

constexpr std::string_view kMagic = "flashlm-classes";
constexpr std::int64_t kVersion = 1;

/// The words up to the next space, which is taken off too.
std::string_view take_field(std::string_view& line) {
  const std::string_view field = line.substr(0, line.find(' '));
  line.remove_prefix(std::min(field.size() + 1, line.size()));
  return field;
}

std::string_view take_line(std::string_view& text) {
  const std::string_view line = text.substr(0, text.find('\n'));
  text.remove_prefix(std::min(line.size() + 1, text.size()));
  return line;
}

std::optional<std::int64_t> number(std::string_view field) {
  std::int64_t value = 0;
  const auto [end, error] = std::from_chars(field.data(), field.data() + field.size(), value);
  if (error != std::errc() || end != field.data() + field.size()) return std::nullopt;
  return value;
}

/// Whether the classes divide 0 ... vocab_size - 1 among them. The offsets rise from 0 to words.size().
void check_words(const WordClasses& classes, std::int64_t vocab_size, const std::string& origin) {
  std::vector<std::pair<std::int64_t, std::int64_t>> sorted;  // word, class
  sorted.reserve(classes.words.size());
  for (std::int64_t c = 0; c < classes.count(); ++c) {
    for (std::int64_t i = classes.offsets[c]; i < classes.offsets[c + 1]; ++i) {
      const std::int64_t word = classes.words[i];
      if (word < 0 || word >= vocab_size)
        throw Error(origin + ": class " + std::to_string(c) + " names word " + std::to_string(word) +
                    ", outside the vocabulary of " + std::to_string(vocab_size));
      sorted.emplace_back(word, c);
    }
  }
  std::sort(sorted.begin(), sorted.end());
  for (std::size_t i = 1; i < sorted.size(); ++i) {
    if (sorted[i].first == sorted[i - 1].first)
      throw Error(origin + ": word " + std::to_string(sorted[i].first) + " is named twice, in class " +
                  std::to_string(sorted[i - 1].second) + " and in class " + std::to_string(sorted[i].second));
  }
  const std::int64_t missing = vocab_size - classes.vocab_size();
  if (missing == 0) return;
  std::int64_t first = 0;
  while (first < classes.vocab_size() && sorted[first].first == first) ++first;
  throw Error(origin + ": " + std::to_string(missing) + " of the " + std::to_string(vocab_size) +
              " words are in no class, the first of them " + std::to_string(first));
}

void scale_to_unit(std::span<float> row) {
  float square = 0;
  for (const float x : row) square += x * x;
  if (square == 0) return;
  const float scale = 1 / std::sqrt(square);
  for (float& x : row) x *= scale;
}

}  // namespace

std::vector<std::int32_t> WordClasses::class_of() const {
  std::vector<std::int32_t> result(words.size());
  for (std::int64_t c = 0; c < count(); ++c)
    for (std::int64_t i = offsets[c]; i < offsets[c + 1]; ++i)
      result[words[i]] = static_cast<std::int32_t>(c);
  return result;
}

void WordClasses::validate(const std::string& origin) const {
  if (offsets.size() < 2 || offsets.front() != 0 || offsets.back() != vocab_size())
    throw Error(origin + ": the classes' offsets must go from 0 to the number of words, " +
                std::to_string(vocab_size()));
  for (std::int64_t c = 0; c < count(); ++c) {
    if (size(c) < 1)
      throw Error(origin + ": class " + std::to_string(c) + " must not be empty, got " +
                  std::to_string(size(c)) + " words");
  }
  check_words(*this, vocab_size(), origin);
}

WordClasses WordClasses::load(const std::filesystem::path& path) {
  const MappedFile file(path);
  std::string_view text = file.text();
  const auto fail = [&](const std::string& why) {
    throw Error(path.string() + ": " + why + "; make it again with `flashlm classes --out FILE`");
  };
  std::string_view header = take_line(text);
  if (take_field(header) != kMagic) fail("not a file of word classes");
  const auto version = number(take_field(header));
  if (version && *version != kVersion)
    fail("version " + std::to_string(*version) + " of word classes, and this program reads version " +
         std::to_string(kVersion));
  const auto vocab_size = number(take_field(header));
  const auto count = number(take_field(header));
  if (!version || !vocab_size || *vocab_size < 1 || !count || *count < 1 || !header.empty())
    fail("the first line must be '" + std::string(kMagic) + " 1 WORDS CLASSES'");

  WordClasses classes{.words = {}, .offsets = {0}};
  while (!text.empty()) {
    std::string_view line = take_line(text);
    if (line.empty()) fail("class " + std::to_string(classes.count()) + " is empty");
    while (!line.empty()) {
      const std::string_view field = take_field(line);
      const auto word = number(field);
      if (!word)
        fail("class " + std::to_string(classes.count()) + " must hold word ids, got '" +
             std::string(field.substr(0, 20)) + "'");
      classes.words.push_back(*word);
    }
    classes.offsets.push_back(classes.vocab_size());
  }
  if (classes.count() != *count)
    fail(std::to_string(*count) + " classes are announced, and " + std::to_string(classes.count()) +
         " are there");
  check_words(classes, *vocab_size, path.string());
  return classes;
}

void WordClasses::save(const std::filesystem::path& path) const {
  std::string text = std::string(kMagic) + " " + std::to_string(kVersion) + " " +
                     std::to_string(vocab_size()) + " " + std::to_string(count()) + "\n";
  for (std::int64_t c = 0; c < count(); ++c)
    for (std::int64_t i = offsets[c]; i < offsets[c + 1]; ++i)
      text += std::to_string(words[i]) + (i + 1 < offsets[c + 1] ? ' ' : '\n');
  write_file(path, text);
}

std::vector<std::int64_t> word_counts(const TokenShard& tokens) {
  std::vector<std::int64_t> counts(static_cast<std::size_t>(tokens.vocab_size()));
  for (std::int64_t i = 0; i < tokens.size(); ++i) ++counts[tokens[i]];
  return counts;
}

std::int64_t largest_class(std::int64_t vocab_size, std::int64_t count) {
  return std::min(vocab_size, 4 * ((vocab_size + count - 1) / count));
}

double rows_per_position(const WordClasses& classes, std::span<const std::int64_t> counts) {
  double rows = 0;
  double total = 0;
  for (std::int64_t c = 0; c < classes.count(); ++c) {
    double mass = 0;
    for (std::int64_t i = classes.offsets[c]; i < classes.offsets[c + 1]; ++i)
      mass += static_cast<double>(counts[classes.words[i]]);
    rows += mass * static_cast<double>(classes.size(c));
    total += mass;
  }
  return static_cast<double>(classes.count()) + rows / total;
}

std::vector<std::int64_t> words_by_frequency(std::span<const std::int64_t> counts) {
  std::vector<std::int64_t> order(counts.size());
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(),
                   [&](std::int64_t a, std::int64_t b) { return counts[a] > counts[b]; });
  return order;
}

void check_class_count(std::int64_t count, std::int64_t most) {
  if (count < 1 || count > most)
    throw Error("--count must be between 1 and " + std::to_string(most) + ", got " + std::to_string(count));
}

WordClasses group_by_class(std::span<const std::int64_t> order, std::span<const std::int32_t> class_of,
                           std::int64_t count) {
  WordClasses classes{.words = std::vector<std::int64_t>(order.size()),
                      .offsets = std::vector<std::int64_t>(static_cast<std::size_t>(count + 1))};
  for (const std::int32_t c : class_of) ++classes.offsets[c + 1];
  std::partial_sum(classes.offsets.begin(), classes.offsets.end(), classes.offsets.begin());
  std::vector<std::int64_t> next(classes.offsets.begin(), classes.offsets.end() - 1);
  for (const std::int64_t word : order) classes.words[next[class_of[word]]++] = word;
  return classes;
}

WordClasses frequency_classes(std::span<const std::int64_t> counts, std::int64_t count) {
  const auto vocab_size = static_cast<std::int64_t>(counts.size());
  check_class_count(count, vocab_size);
  const std::int64_t largest = largest_class(vocab_size, count);
  WordClasses classes{.words = words_by_frequency(counts), .offsets = {0}};

  // A word's share of a class: scale · √p between 1/largest and 1, with the scale that makes C classes.
  const auto share = [&](std::int64_t word, double scale) {
    const double p = static_cast<double>(counts[word]) + 0.1;  // what was not seen is rare, not impossible
    return std::clamp(scale * std::sqrt(p), 1 / static_cast<double>(largest), 1.0);
  };
  double low = 0;
  double high = 4;  // where every word would have a whole class
  for (int i = 0; i < 60; ++i) {
    const double scale = (low + high) / 2;
    double sum = 0;
    for (std::int64_t word = 0; word < vocab_size; ++word) sum += share(word, scale);
    (sum < static_cast<double>(count) ? low : high) = scale;
  }

  double sum = 0;  // of the shares of the words before `end`
  std::int64_t end = 0;
  for (std::int64_t c = 0; c < count; ++c) {
    const std::int64_t begin = end;
    const std::int64_t classes_left = count - c - 1;
    // What must be left to the other classes: a word for each at least, no more than they may hold.
    const std::int64_t least = std::max(begin + 1, vocab_size - classes_left * largest);
    const std::int64_t most = std::min(begin + largest, vocab_size - classes_left);
    while (end < least || (end < most && sum < static_cast<double>(c + 1)))
      sum += share(classes.words[end++], high);
    classes.offsets.push_back(end);
  }
  return classes;
}

WordClasses cutoff_classes(std::span<const std::int64_t> counts, std::span<const std::int64_t> cutoffs) {
  const auto vocab_size = static_cast<std::int64_t>(counts.size());
  WordClasses classes{.words = words_by_frequency(counts), .offsets = {0}};
  for (const std::int64_t cutoff : cutoffs) {
    if (cutoff <= classes.offsets.back() || cutoff >= vocab_size)
      throw Error("--cutoffs must rise between 0 and the vocabulary's " + std::to_string(vocab_size) +
                  ", got " + std::to_string(cutoff) + " after " + std::to_string(classes.offsets.back()));
    classes.offsets.push_back(cutoff);
  }
  classes.offsets.push_back(vocab_size);
  return classes;
}

WordClasses kmeans_classes(std::span<const float> embedding, std::span<const std::int64_t> counts,
                           std::int64_t count, int iterations,
                           const std::function<void(int iteration, double fraction)>& progress) {
  const auto vocab_size = static_cast<std::int64_t>(counts.size());
  check_class_count(count, vocab_size);
  const std::int64_t dim = static_cast<std::int64_t>(embedding.size()) / vocab_size;
  const std::int64_t largest = largest_class(vocab_size, count);
  const std::vector<std::int64_t> order = words_by_frequency(counts);
  std::vector<float> rows(embedding.begin(), embedding.end());
  const auto row = [&](std::int64_t word) { return std::span(rows).subspan(word * dim, dim); };
  for (std::int64_t word = 0; word < vocab_size; ++word) scale_to_unit(row(word));

  // Centres stand in columns (dim × C): a word's products with all of them are sums of scaled lines.
  std::vector<float> centres(static_cast<std::size_t>(dim * count));
  const auto set_centre = [&](std::int64_t c, std::span<const float> centre) {
    for (std::int64_t d = 0; d < dim; ++d) centres[d * count + c] = centre[d];
  };
  for (std::int64_t c = 0; c < count; ++c) set_centre(c, row(order[c]));

  std::vector<std::int32_t> class_of(counts.size());
  std::vector<float> likeness(static_cast<std::size_t>(count));
  std::vector<float> means(static_cast<std::size_t>(dim * count));
  for (int iteration = 0; iteration < iterations; ++iteration) {
    std::vector<std::int64_t> sizes(static_cast<std::size_t>(count));
    std::int64_t empty = count;
    std::fill(means.begin(), means.end(), 0.0F);
    for (std::int64_t i = 0; i < vocab_size; ++i) {
      if (progress && i % 1024 == 0)
        progress(iteration, static_cast<double>(i) / static_cast<double>(vocab_size));
      const std::span<const float> x = row(order[i]);
      std::fill(likeness.begin(), likeness.end(), 0.0F);
      for (std::int64_t d = 0; d < dim; ++d) {
        const float* line = &centres[d * count];
        for (std::int64_t c = 0; c < count; ++c) likeness[c] += x[d] * line[c];
      }
      const bool only_empty = vocab_size - i == empty;  // lest a class stay without words
      std::int64_t best = -1;
      for (std::int64_t c = 0; c < count; ++c) {
        if (only_empty ? sizes[c] > 0 : sizes[c] == largest) continue;
        if (best < 0 || likeness[c] > likeness[best]) best = c;
      }
      if (sizes[best]++ == 0) --empty;
      class_of[order[i]] = static_cast<std::int32_t>(best);
      for (std::int64_t d = 0; d < dim; ++d) means[best * dim + d] += x[d];
    }
    for (std::int64_t c = 0; c < count; ++c) {
      const std::span<float> mean = std::span(means).subspan(c * dim, dim);
      scale_to_unit(mean);
      set_centre(c, mean);
    }
  }
  return group_by_class(order, class_of, count);
}

}  // namespace flashlm

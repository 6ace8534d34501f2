// SPDX-License-Identifier: Apache-2.0
#include <algorithm>
#include <catch2/catch.hpp>
#include <cmath>
#include <limits>
#include <map>
#include <random>
#include <vector>

#include "data/word_classes.h"
#include "tests/data/support.h"

using Catch::Contains;
using namespace flashlm;

namespace {

constexpr WordClasses kNone{};

TokenShard shard_of(const Scratch& scratch, const std::vector<std::int32_t>& ids, std::int64_t vocab_size) {
  TokenShardWriter writer(scratch / "ids.tokens", vocab_size, 0);
  writer.append(ids, 0);
  writer.commit();
  return TokenShard::open(scratch / "ids.tokens");
}

/// Counts as of words in a text: 1/rank, in an order that is not that of the ids, many of them 0.
std::vector<std::int64_t> zipf_counts(std::int64_t vocab_size) {
  std::vector<std::int64_t> counts(static_cast<std::size_t>(vocab_size));
  for (std::int64_t w = 0; w < vocab_size; ++w) counts[w] = vocab_size / 2 / (1 + w * 7 % vocab_size);
  return counts;
}

/// A text whose next token depends on nothing but the class w % classes of its last: planted classes, all
/// equally frequent. Words of a class are of unequal frequency.
std::vector<std::int32_t> planted_text(std::int32_t words, std::int32_t classes, int size) {
  std::mt19937 random(5);
  std::vector<std::int32_t> ids;
  std::int32_t c = 0;
  for (int i = 0; i < size; ++i) {
    c = (c + (random() % 4 == 0 ? 3 : 1)) % classes;
    const std::uint32_t members = static_cast<std::uint32_t>(words / classes);
    const std::uint32_t member = std::min(random() % members, random() % members);
    ids.push_back(c + classes * static_cast<std::int32_t>(member));
  }
  return ids;
}

/// Whether two words are in one class here exactly if they are w % classes there.
bool is_planted(const WordClasses& found, std::int32_t classes) {
  const std::vector<std::int32_t> class_of = found.class_of();
  std::map<std::int32_t, std::int32_t> planted;
  for (std::int32_t w = 0; w < found.vocab_size(); ++w) {
    if (planted.emplace(class_of[w], w % classes).first->second != w % classes) return false;
  }
  return planted.size() == static_cast<std::size_t>(classes);
}

std::int64_t largest_of(const WordClasses& classes) {
  std::int64_t largest = 0;
  for (std::int64_t c = 0; c < classes.count(); ++c) largest = std::max(largest, classes.size(c));
  return largest;
}

/// What every builder promises.
void check_classes(const WordClasses& classes, std::span<const std::int64_t> counts, std::int64_t count) {
  classes.validate("made");
  REQUIRE(classes.vocab_size() == static_cast<std::int64_t>(counts.size()));
  REQUIRE(classes.count() == count);
  for (std::int64_t c = 0; c < count; ++c) {
    for (std::int64_t i = classes.offsets[c] + 1; i < classes.offsets[c + 1]; ++i) {
      const std::int64_t before = classes.words[i - 1];
      const std::int64_t word = classes.words[i];
      REQUIRE((counts[before] > counts[word] || (counts[before] == counts[word] && before < word)));
    }
  }
}

std::string load_error(const Scratch& scratch, std::string_view text) {
  put_file(scratch / "tried", text);
  return error_of([&] { WordClasses::load(scratch / "tried"); });
}

/// The least rows_per_position of all divisions into runs of at most `largest` words in order of frequency.
double least_rows(std::vector<std::int64_t> counts, std::int64_t count, std::int64_t largest) {
  std::sort(counts.rbegin(), counts.rend());
  const std::size_t n = counts.size();
  std::vector<double> sums(n + 1);
  for (std::size_t i = 0; i < n; ++i) sums[i + 1] = sums[i] + static_cast<double>(counts[i]);
  std::vector<double> least(n + 1, std::numeric_limits<double>::infinity());
  least[0] = 0;
  for (std::int64_t c = 0; c < count; ++c) {
    std::vector<double> next(n + 1, std::numeric_limits<double>::infinity());
    for (std::size_t end = 1; end <= n; ++end) {
      for (std::size_t size = 1; size <= std::min<std::size_t>(end, largest); ++size) {
        next[end] = std::min(next[end],
                             least[end - size] + (sums[end] - sums[end - size]) * static_cast<double>(size));
      }
    }
    least = next;
  }
  return static_cast<double>(count) + least[n] / sums[n];
}

}  // namespace

// ---- the file ----

TEST_CASE("classes are written as documented and read back", "[word_classes]") {
  const Scratch scratch;
  const WordClasses classes{.words = {3, 0, 4, 2, 1}, .offsets = {0, 1, 4, 5}};
  classes.save(scratch / "classes.txt");
  CHECK(read_file(scratch / "classes.txt") == "flashlm-classes 1 5 3\n3\n0 4 2\n1\n");
  const WordClasses loaded = WordClasses::load(scratch / "classes.txt");
  CHECK(loaded.words == classes.words);
  CHECK(loaded.offsets == classes.offsets);
  CHECK(loaded.vocab_size() == 5);
  CHECK(loaded.count() == 3);
  CHECK(loaded.size(1) == 3);
  CHECK(loaded.class_of() == std::vector<std::int32_t>{1, 2, 1, 0, 1});
  CHECK(
      load_error(scratch, "flashlm-classes 1 5 3\n3\n0 4 2\n1").empty());  // the last newline may be missing
}

TEST_CASE("files that are no classes are refused", "[word_classes]") {
  const Scratch scratch;
  const auto error = [&](std::string_view text) { return load_error(scratch, text); };
  for (const std::string_view text : {"", "\n", "flashlm\n", "flashlm-classes-x 1 5 3\n"})
    CHECK_THAT(error(text), Contains("tried: not a file of word classes; make it again"));
  CHECK_THAT(error("flashlm-classes 2 5\n"),
             Contains("version 2 of word classes, and this program reads version 1"));
  for (const std::string_view text :
       {"flashlm-classes\n", "flashlm-classes 1\n", "flashlm-classes 1 5\n", "flashlm-classes 1 5 3 7\n",
        "flashlm-classes 1 5 3x\n", "flashlm-classes 1 -5 3\n", "flashlm-classes 1 5 0\n",
        "flashlm-classes  1 5 3\n"})
    CHECK_THAT(error(text), Contains("the first line must be 'flashlm-classes 1 WORDS CLASSES'"));

  const auto body = [&](const std::string& lines) { return error("flashlm-classes 1 5 3\n" + lines); };
  CHECK(body("3\n0 4 2\n1\n").empty());
  CHECK_THAT(body("3\n0 4 2 1\n"), Contains("3 classes are announced, and 2 are there"));
  CHECK_THAT(body("3\n0 4\n2\n1\n"), Contains("3 classes are announced, and 4 are there"));
  CHECK_THAT(body("3\n\n0 4 2 1\n"), Contains("class 1 is empty"));
  CHECK_THAT(body("3\n0 4 two\n1\n"), Contains("class 1 must hold word ids, got 'two'"));
  CHECK_THAT(body("3\n0  4 2\n1\n"), Contains("class 1 must hold word ids, got ''"));
  CHECK(body("3\n0 5 2\n1\n") ==
        (scratch / "tried").string() + ": class 1 names word 5, outside the vocabulary of 5");
  CHECK_THAT(body("3\n0 4 2\n-1\n"), Contains("class 2 names word -1"));
  CHECK_THAT(body("3\n0 4 2\n3\n"), Contains("word 3 is named twice, in class 0 and in class 2"));
  CHECK_THAT(body("3\n0 4 2\n1 2\n"), Contains("word 2 is named twice, in class 1 and in class 2"));
  CHECK_THAT(body("3\n0 4 0\n1 2\n"), Contains("word 0 is named twice, in class 1 and in class 1"));
  CHECK_THAT(body("3\n4\n1\n"), Contains("2 of the 5 words are in no class, the first of them 0"));
  CHECK_THAT(body("1\n0\n2\n"), Contains("2 of the 5 words are in no class, the first of them 3"));
  CHECK_THAT(error("flashlm-classes 1 9000000000000000000 1\n0 1\n"),
             Contains("8999999999999999998 of the") && Contains("the first of them 2"));
  CHECK_THAT(error_of([&] { WordClasses::load(scratch / "nowhere"); }), Contains("nowhere"));
}

TEST_CASE("classes in memory are checked", "[word_classes]") {
  const auto error = [](std::vector<std::int64_t> words, std::vector<std::int64_t> offsets) {
    return error_of([&] { WordClasses{std::move(words), std::move(offsets)}.validate("made"); });
  };
  CHECK(error({1, 0, 2}, {0, 2, 3}).empty());
  for (const std::vector<std::int64_t>& offsets : {std::vector<std::int64_t>{}, {0}, {1, 3}, {0, 2}, {0, 4}})
    CHECK_THAT(error({1, 0, 2}, offsets), Contains("made: the classes' offsets must go from 0 to"));
  CHECK_THAT(error({1, 0, 2}, {0, 2, 2, 3}), Contains("made: class 1 must not be empty, got 0 words"));
  CHECK_THAT(error({1, 0, 2}, {0, 4, 2, 3}), Contains("class 1 must not be empty, got -2 words"));
  CHECK_THAT(error({1, 0, 3}, {0, 2, 3}), Contains("class 1 names word 3, outside the vocabulary of 3"));
  CHECK_THAT(error({1, 0, 1}, {0, 2, 3}), Contains("word 1 is named twice, in class 0 and in class 1"));
  CHECK_THAT(error_of([] { kNone.validate("made"); }), Contains("from 0 to the number of words, 0"));
}

// ---- what classes are worth ----

TEST_CASE("counts, rows per position and information are what their formulas say", "[word_classes]") {
  const Scratch scratch;
  const std::vector<std::int32_t> ids = planted_text(24, 4, 700);
  const TokenShard tokens = shard_of(scratch, ids, 25);  // word 24 does not occur
  std::vector<std::int64_t> counts(25);
  for (const std::int32_t id : ids) ++counts[id];
  CHECK(word_counts(tokens) == counts);

  const WordClasses classes = frequency_classes(counts, 5);
  const std::vector<std::int32_t> class_of = classes.class_of();
  double rows = 0;
  std::map<std::pair<int, int>, double> pairs;
  std::map<int, double> firsts, seconds;
  for (std::size_t i = 0; i < ids.size(); ++i) {
    rows += static_cast<double>(5 + classes.size(class_of[ids[i]])) / static_cast<double>(ids.size());
    if (i == 0) continue;
    ++pairs[{class_of[ids[i - 1]], class_of[ids[i]]}];
    ++firsts[class_of[ids[i - 1]]];
    ++seconds[class_of[ids[i]]];
  }
  const double n = static_cast<double>(ids.size() - 1);
  double information = 0;
  for (const auto& [pair, count] : pairs)
    information += count / n * std::log(count * n / (firsts[pair.first] * seconds[pair.second]));
  CHECK(rows_per_position(classes, counts) == Approx(rows).epsilon(1e-12));
  CHECK(class_information(classes, tokens) == Approx(information).epsilon(1e-12));
  CHECK(class_information(frequency_classes(counts, 1), tokens) == Approx(0).margin(1e-12));
  CHECK(class_information(frequency_classes(counts, 25), tokens) > information);
  CHECK(class_information(classes, tokens.slice(0, 1)) == 0);
  CHECK(class_information(classes, tokens.slice(0, 0)) == 0);
}

// ---- by frequency ----

TEST_CASE("frequency classes need about as few rows as any", "[word_classes]") {
  for (const std::int64_t vocab_size : {64, 500, 2001}) {
    const std::vector<std::int64_t> counts = zipf_counts(vocab_size);
    const auto root = static_cast<std::int64_t>(std::sqrt(vocab_size));
    for (const std::int64_t count : {root, 2 * root}) {
      const WordClasses classes = frequency_classes(counts, count);
      check_classes(classes, counts, count);
      CHECK(std::is_sorted(classes.words.begin(), classes.words.end(), [&](std::int64_t a, std::int64_t b) {
        return counts[a] > counts[b] || (counts[a] == counts[b] && a < b);
      }));
      const std::int64_t largest = largest_class(vocab_size, count);
      CHECK(largest_of(classes) <= largest);
      const double rows = rows_per_position(classes, counts);
      INFO(vocab_size << " words, " << count << " classes");
      CHECK(rows >= least_rows(counts, count, largest) - 1e-9);
      CHECK(rows <= 1.05 * least_rows(counts, count, largest));
    }
  }
}

TEST_CASE("frequency classes of odd sizes", "[word_classes]") {
  for (const std::vector<std::int64_t>& counts :
       {zipf_counts(37), std::vector<std::int64_t>(37), std::vector<std::int64_t>{5},
        std::vector<std::int64_t>{0, 0, 1'000'000'000'000, 0, 0, 0, 0, 0, 0, 1}}) {
    const auto vocab_size = static_cast<std::int64_t>(counts.size());
    for (std::int64_t count = 1; count <= vocab_size; ++count) {
      const WordClasses classes = frequency_classes(counts, count);
      check_classes(classes, counts, count);
      CHECK(largest_of(classes) <= largest_class(vocab_size, count));
    }
    CHECK_THAT(error_of([&] { frequency_classes(counts, 0); }), Contains("--count must be between 1 and"));
    CHECK_THAT(error_of([&] { frequency_classes(counts, vocab_size + 1); }),
               Contains("got " + std::to_string(vocab_size + 1)));
  }
  CHECK(largest_class(100, 10) == 40);
  CHECK(largest_class(101, 10) == 44);
  CHECK(largest_class(100, 2) == 100);
}

TEST_CASE("cutoffs divide the order of frequency", "[word_classes]") {
  const std::vector<std::int64_t> counts = {1, 9, 4, 4, 0, 7};
  const auto cut = [&](std::vector<std::int64_t> cutoffs) { return cutoff_classes(counts, cutoffs); };
  CHECK(cut({1, 4}).words == std::vector<std::int64_t>{1, 5, 2, 3, 0, 4});
  CHECK(cut({1, 4}).offsets == std::vector<std::int64_t>{0, 1, 4, 6});
  CHECK(cut({}).offsets == std::vector<std::int64_t>{0, 6});
  CHECK(error_of([&] {
          cut({2, 2});
        }) == "--cutoffs must rise between 0 and the vocabulary's 6, got 2 after 2");
  CHECK_THAT(error_of([&] { cut({0}); }), Contains("got 0"));
  CHECK_THAT(error_of([&] { cut({3, 6}); }), Contains("got 6 after 3"));
}

// ---- by exchange ----

TEST_CASE("exchange finds planted classes", "[word_classes]") {
  const Scratch scratch;
  const TokenShard tokens = shard_of(scratch, planted_text(60, 6, 40'000), 60);
  const WordClasses classes = exchange_classes(tokens, 6);
  check_classes(classes, word_counts(tokens), 6);
  CHECK(is_planted(classes, 6));
}

TEST_CASE("each sweep of exchange raises what it reports", "[word_classes]") {
  const Scratch scratch;
  // Words follow themselves and others of their class, so that pairs within a class count.
  std::vector<std::int32_t> ids = planted_text(200, 8, 3000);
  for (std::size_t i = 3; i < ids.size(); i += 7) ids[i] = ids[i - 1];
  for (std::size_t i = 5; i < ids.size(); i += 7) ids[i] = (ids[i - 1] + 8) % 200;
  const TokenShard tokens = shard_of(scratch, ids, 205);
  const std::vector<std::int64_t> counts = word_counts(tokens);
  for (const double price : {0.0, 0.01}) {
    double last = 0;
    int sweeps = 0;
    const auto progress = [&](int sweep, double fraction, double objective) {
      CHECK((fraction >= 0 && fraction <= 1));
      if (fraction < 1) return;
      CHECK(sweep == sweeps++);
      if (sweep > 0) CHECK(objective >= last - 1e-12);
      last = objective;
    };
    const WordClasses classes = exchange_classes(tokens, 12, {50, price, progress});
    check_classes(classes, counts, 12);
    CHECK(largest_of(classes) <= largest_class(205, 12));
    CHECK(sweeps > 2);
    CHECK(sweeps < 50);  // it ended because nothing moved
    const double information = class_information(classes, tokens);
    CHECK(last == Approx(information - price * rows_per_position(classes, counts)).epsilon(1e-12));

    // Indeed no single word would do better elsewhere.
    const std::vector<std::int32_t> class_of = classes.class_of();
    for (std::int64_t word = 0; word < 205; word += 2) {
      if (classes.size(class_of[word]) == 1) continue;
      for (std::int64_t to = 0; to < 12; ++to) {
        if (classes.size(to) == largest_class(205, 12)) continue;
        WordClasses moved{.words = {}, .offsets = {0}};
        for (std::int64_t c = 0; c < 12; ++c) {
          for (std::int64_t w = 0; w < 205; ++w)
            if ((w == word ? to : class_of[w]) == c) moved.words.push_back(w);
          moved.offsets.push_back(moved.vocab_size());
        }
        CHECK(class_information(moved, tokens) - price * rows_per_position(moved, counts) <= last + 1e-12);
      }
    }
    CHECK(exchange_classes(tokens, 12, {50, price, {}}).words == classes.words);
    CHECK(exchange_classes(tokens, 12, {0, price, {}}).words != classes.words);
  }
}

TEST_CASE("the price of rows keeps frequent words out of large classes", "[word_classes]") {
  const Scratch scratch;
  const TokenShard tokens = shard_of(scratch, planted_text(200, 8, 5000), 200);
  const std::vector<std::int64_t> counts = word_counts(tokens);
  const auto rows = [&](double price) {
    return rows_per_position(exchange_classes(tokens, 14, {5, price, {}}), counts);
  };
  CHECK(rows(0.1) < rows(0));
  CHECK(rows(100) < 1.1 * rows_per_position(frequency_classes(counts, 14), counts));
}

TEST_CASE("exchange at odd sizes", "[word_classes]") {
  const Scratch scratch;
  for (const auto& ids : {planted_text(20, 4, 300), std::vector<std::int32_t>(50, 7), {3}}) {
    const TokenShard tokens = shard_of(scratch, ids, 23);
    for (std::int64_t count = 1; count <= 23; ++count) {
      for (const double price : {0.0, 1e-3}) {
        const WordClasses classes = exchange_classes(tokens, count, {3, price, {}});
        check_classes(classes, word_counts(tokens), count);
        CHECK(largest_of(classes) <= largest_class(23, count));
      }
    }
    CHECK_THAT(error_of([&] { exchange_classes(tokens, 24); }), Contains("--count must be between 1 and 23"));
  }
  const TokenShard none = shard_of(scratch, {}, 23);
  CHECK_THAT(error_of([&] { exchange_classes(none, 4); }), Contains("tokens, got 0"));
  const TokenShard many = shard_of(scratch, {1, 2}, 5000);
  CHECK_THAT(error_of([&] { exchange_classes(many, 5000); }), Contains("--count must be between 1 and 4096"));
}

TEST_CASE("an exception from progress ends the work", "[word_classes]") {
  const Scratch scratch;
  const TokenShard tokens = shard_of(scratch, planted_text(60, 6, 1000), 60);
  const auto stop = [](int, double, double) { throw Error("stopped"); };
  CHECK(error_of([&] { exchange_classes(tokens, 6, {5, 0, stop}); }) == "stopped");
}

// ---- by embedding ----

TEST_CASE("k-means finds words that point the same way", "[word_classes]") {
  constexpr std::int64_t kWords = 120, kDim = 16, kClasses = 6;
  std::mt19937 random(3);
  std::normal_distribution<float> normal;
  std::vector<float> directions(kClasses * kDim), embedding;
  for (float& x : directions) x = normal(random);
  for (std::int64_t w = 0; w < kWords; ++w) {
    const float length = 0.1F + std::abs(normal(random));  // which must not matter
    for (std::int64_t d = 0; d < kDim; ++d)
      embedding.push_back(length * (directions[w % kClasses * kDim + d] + 0.2F * normal(random)));
  }
  std::vector<std::int64_t> counts(kWords);
  for (std::int64_t w = 0; w < kWords; ++w) counts[w] = 1000 / (1 + w);  // the first six are of six classes
  const WordClasses classes = kmeans_classes(embedding, counts, kClasses);
  check_classes(classes, counts, kClasses);
  CHECK(is_planted(classes, kClasses));
  CHECK(kmeans_classes(embedding, counts, kClasses).words == classes.words);

  // Started from words of two classes only, centres must move apart.
  for (std::int64_t w = 0; w < kWords; ++w) counts[w] = w % kClasses < 2 ? 10 : 1;
  const WordClasses first = kmeans_classes(embedding, counts, kClasses, 1);
  CHECK_FALSE(is_planted(first, kClasses));
  const WordClasses later = kmeans_classes(embedding, counts, kClasses, 10);
  check_classes(later, counts, kClasses);
  CHECK(later.words != first.words);
}

TEST_CASE("k-means looks at directions, not at lengths", "[word_classes]") {
  constexpr std::int64_t kWords = 90, kDim = 5;
  std::mt19937 random(4);
  std::normal_distribution<float> normal;
  std::vector<float> embedding, scaled;
  for (std::int64_t w = 0; w < kWords; ++w) {
    const float power = std::ldexp(1.0F, static_cast<int>(random() % 9));  // of two: it rounds nothing
    for (std::int64_t d = 0; d < kDim; ++d) {
      embedding.push_back(normal(random));
      scaled.push_back(power * embedding.back());
    }
  }
  const std::vector<std::int64_t> counts = zipf_counts(kWords);
  CHECK(kmeans_classes(scaled, counts, 9).words == kmeans_classes(embedding, counts, 9).words);
}

TEST_CASE("k-means at odd sizes", "[word_classes]") {
  constexpr std::int64_t kWords = 37, kDim = 3;
  const std::vector<std::int64_t> counts = zipf_counts(kWords);
  std::mt19937 random(3);
  std::normal_distribution<float> normal;
  std::vector<float> embedding(kWords * kDim);
  for (float& x : embedding) x = normal(random);
  const std::vector<float> zeros(kWords * kDim);
  const std::vector<float> nans(kWords * kDim, std::numeric_limits<float>::quiet_NaN());
  for (const std::vector<float>& matrix : {embedding, zeros, nans}) {
    for (std::int64_t count = 1; count <= kWords; ++count) {
      const WordClasses classes = kmeans_classes(matrix, counts, count, 3);
      check_classes(classes, counts, count);
      CHECK(largest_of(classes) <= largest_class(kWords, count));
    }
  }
  CHECK_THAT(error_of([&] { kmeans_classes(embedding, counts, 38); }),
             Contains("--count must be between 1 and 37"));
}

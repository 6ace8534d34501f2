// SPDX-License-Identifier: Apache-2.0
// Exchange clustering, and the mutual information that it raises. With N(g, h) the number of pairs of
// neighbours whose first is of class g and second of class h, and f(n) = n log n, the text's log-likelihood
// under the class bigram is, but for a constant,
//   Σ f(N(g, h)) - Σ f(N(g, ·)) - Σ f(N(·, h)),
// and moving a word changes one row and one column of N. A word is taken out of its class, and the gain of
// putting it into each of the C classes is computed at once, line by line of N and of its transpose.
#include <algorithm>
#include <cmath>
#include <limits>
#include <string>

#include "data/error.h"
#include "data/word_classes.h"
#include "data/word_order.h"

namespace flashlm {
namespace {

constexpr std::int64_t kMostClasses = 4096;  // two tables of 64 MB
constexpr std::int64_t kMostTokens = std::numeric_limits<std::int32_t>::max();

/// For each word, the words that stand next to its occurrences, on one side.
struct Neighbours {
  std::vector<std::int64_t> offsets;
  std::vector<std::int32_t> words;

  std::span<const std::int32_t> of(std::int64_t word) const {
    return std::span(words).subspan(offsets[word], offsets[word + 1] - offsets[word]);
  }
};

/// Sorts the pairs of tokens i and i + 1 by one of them: by the first for the words that follow, by the
/// second for those that precede.
Neighbours neighbours(const TokenShard& tokens, bool following) {
  const std::int64_t pairs = std::max<std::int64_t>(0, tokens.size() - 1);
  const std::int64_t key = following ? 0 : 1;
  Neighbours result;
  result.offsets.resize(static_cast<std::size_t>(tokens.vocab_size() + 1));
  result.words.resize(static_cast<std::size_t>(pairs));
  for (std::int64_t i = 0; i < pairs; ++i) ++result.offsets[tokens[i + key] + 1];
  for (std::int64_t w = 0; w < tokens.vocab_size(); ++w) result.offsets[w + 1] += result.offsets[w];
  std::vector<std::int64_t> next(result.offsets.begin(), result.offsets.end() - 1);
  for (std::int64_t i = 0; i < pairs; ++i) result.words[next[tokens[i + key]]++] = tokens[i + 1 - key];
  return result;
}

double n_log_n(std::int64_t n) {
  return n == 0 ? 0 : static_cast<double>(n) * std::log(static_cast<double>(n));
}

/// The state of the search. Class C, after the real ones, holds the words that have not been brought in yet.
class Exchange {
 public:
  Exchange(const TokenShard& tokens, std::int64_t count, const ExchangeOptions& options)
      : options_(options),
        counts_(word_counts(tokens)),
        order_(words_by_frequency(counts_)),
        following_(neighbours(tokens, true)),
        preceding_(neighbours(tokens, false)),
        vocab_size_(tokens.vocab_size()),
        classes_(count),
        stride_(count + 1),
        largest_(largest_class(vocab_size_, count)),
        pair_count_(static_cast<std::int64_t>(following_.words.size())),
        tokens_(static_cast<double>(tokens.size())),
        price_(options.row_price * static_cast<double>(pair_count_) / tokens_),
        class_of_(counts_.size(), static_cast<std::int32_t>(count)),
        pairs_(static_cast<std::size_t>(stride_ * stride_)),
        transposed_(pairs_.size()),
        totals_(static_cast<std::size_t>(stride_)),
        after_(stride_),
        before_(stride_),
        gain_(totals_.size()),
        table_(1 << 16) {
    for (std::size_t n = 0; n < table_.size(); ++n) table_[n] = n_log_n(static_cast<std::int64_t>(n));
    pairs_.back() = transposed_.back() = static_cast<std::int32_t>(pair_count_);
    totals_.back() = {pair_count_, pair_count_, tokens.size(), vocab_size_};
  }

  WordClasses run() {
    for (int sweep = 0; sweep <= options_.sweeps; ++sweep) {
      bool moved = false;
      for (std::int64_t i = 0; i < vocab_size_; ++i) {
        if (i % 64 == 0) report(sweep, static_cast<double>(i) / static_cast<double>(vocab_size_), 0);
        const bool begins_class = sweep == 0 && i < classes_;
        moved |= move(order_[i], begins_class ? i : kBestClass);
      }
      report(sweep, 1, objective());
      if (!moved) break;
    }
    return group_by_class(order_, class_of_, classes_);
  }

 private:
  static constexpr std::int64_t kBestClass = -1;

  /// What a class has of everything but pairs.
  struct Totals {
    std::int64_t firsts, seconds;  // pairs whose first, whose second token is of it
    std::int64_t tokens;
    std::int64_t words;
  };

  /// How often each class stands next to the word in hand on one side. Pairs of the word with itself are
  /// counted apart.
  struct Side {
    explicit Side(std::int64_t count) : counts(static_cast<std::size_t>(count)) {}

    std::vector<std::int32_t> counts;
    std::vector<std::int32_t> classes;  // those whose count is not 0
  };

  void report(int sweep, double fraction, double value) const {
    if (options_.progress) options_.progress(sweep, fraction, value);
  }

  double f(std::int64_t n) const {
    return n < static_cast<std::int64_t>(table_.size()) ? table_[n] : n_log_n(n);
  }

  /// Whether the word is in another class than before.
  bool move(std::int64_t word, std::int64_t to) {
    const std::int64_t from = class_of_[word];
    if (from < classes_ && totals_[from].words == 1) return false;  // lest the class be empty
    own_pairs_ = count_classes(word, following_.of(word), after_);
    count_classes(word, preceding_.of(word), before_);
    change(word, from, -1);
    if (to == kBestClass) to = best_class(word, from);
    change(word, to, 1);
    class_of_[word] = static_cast<std::int32_t>(to);
    return to != from;
  }

  /// Fills `side`, and returns how often the word stands next to itself.
  std::int32_t count_classes(std::int64_t word, std::span<const std::int32_t> neighbour_words,
                             Side& side) const {
    for (const std::int32_t c : side.classes) side.counts[c] = 0;
    side.classes.clear();
    std::int32_t own = 0;
    for (const std::int32_t neighbour : neighbour_words) {
      if (neighbour == word) {
        ++own;
        continue;
      }
      const std::int32_t c = class_of_[neighbour];
      if (side.counts[c]++ == 0) side.classes.push_back(c);
    }
    return own;
  }

  void add_pairs(std::int64_t first, std::int64_t second, std::int32_t n) {
    pairs_[first * stride_ + second] += n;
    transposed_[second * stride_ + first] += n;
  }

  /// Adds the word in hand to class c, or takes it out.
  void change(std::int64_t word, std::int64_t c, std::int32_t sign) {
    for (const std::int32_t h : after_.classes) add_pairs(c, h, sign * after_.counts[h]);
    for (const std::int32_t g : before_.classes) add_pairs(g, c, sign * before_.counts[g]);
    add_pairs(c, c, sign * own_pairs_);
    totals_[c].firsts += sign * static_cast<std::int64_t>(following_.of(word).size());
    totals_[c].seconds += sign * static_cast<std::int64_t>(preceding_.of(word).size());
    totals_[c].tokens += sign * counts_[word];
    totals_[c].words += sign;
  }

  /// The class, of those with room, that the word in hand raises the objective most in; where it came `from`
  /// if others do no better.
  std::int64_t best_class(std::int64_t word, std::int64_t from) {
    std::fill(gain_.begin(), gain_.end(), 0.0);
    for (const std::int32_t h : after_.classes) add_gains(&transposed_[h * stride_], after_.counts[h]);
    for (const std::int32_t g : before_.classes) add_gains(&pairs_[g * stride_], before_.counts[g]);
    const auto firsts = static_cast<std::int64_t>(following_.of(word).size());
    const auto seconds = static_cast<std::int64_t>(preceding_.of(word).size());
    for (std::int64_t c = 0; c < classes_; ++c) {
      // Pairs within c grow by the word's neighbours on both sides at once, and by its pairs with itself.
      const std::int64_t within = pairs_[c * stride_ + c];
      const std::int64_t after = within + after_.counts[c];
      const std::int64_t before = within + before_.counts[c];
      const Totals& total = totals_[c];
      gain_[c] += f(after + before_.counts[c] + own_pairs_) - f(after) - f(before) + f(within);
      gain_[c] -= f(total.firsts + firsts) - f(total.firsts) + f(total.seconds + seconds) - f(total.seconds);
      gain_[c] -= price_ * static_cast<double>(total.tokens + counts_[word] * total.words);
    }
    std::int64_t best = from;  // a class that is not a real one has room for nobody
    for (std::int64_t c = 0; c < classes_; ++c)
      if (totals_[c].words < largest_ && (best == classes_ || gain_[c] > gain_[best])) best = c;
    return best;
  }

  /// gain_[c] += f(N(c) + n) - f(N(c)) for a line N of the table of pairs.
  void add_gains(const std::int32_t* line, std::int64_t n) {
    for (std::int64_t c = 0; c < classes_; ++c) gain_[c] += f(line[c] + n) - f(line[c]);
  }

  double objective() const {
    double sum = f(pair_count_);
    for (const std::int32_t n : pairs_) sum += f(n);
    double rows = static_cast<double>(classes_);
    for (const Totals& total : totals_) {
      sum -= f(total.firsts) + f(total.seconds);
      rows += static_cast<double>(total.tokens) / tokens_ * static_cast<double>(total.words);
    }
    return sum / static_cast<double>(std::max<std::int64_t>(1, pair_count_)) - options_.row_price * rows;
  }

  const ExchangeOptions& options_;
  const std::vector<std::int64_t> counts_;
  const std::vector<std::int64_t> order_;
  const Neighbours following_, preceding_;
  const std::int64_t vocab_size_, classes_, stride_, largest_, pair_count_;
  const double tokens_;
  const double price_;  // of a row for each token, in nats summed over the text

  std::vector<std::int32_t> class_of_;
  std::vector<std::int32_t> pairs_, transposed_;  // (C + 1)²: pairs by first and second class; the reverse
  std::vector<Totals> totals_;
  Side after_, before_;
  std::int32_t own_pairs_ = 0;
  std::vector<double> gain_;
  std::vector<double> table_;  // f of small numbers
};

}  // namespace

WordClasses exchange_classes(const TokenShard& tokens, std::int64_t count, const ExchangeOptions& options) {
  check_class_count(count, std::min(tokens.vocab_size(), kMostClasses));
  if (tokens.size() < 1 || tokens.size() > kMostTokens)
    throw Error("exchange needs between 1 and " + std::to_string(kMostTokens) + " tokens, got " +
                std::to_string(tokens.size()));
  return Exchange(tokens, count, options).run();
}

double class_information(const WordClasses& classes, const TokenShard& tokens) {
  const Neighbours following = neighbours(tokens, true);
  if (following.words.empty()) return 0;
  const std::vector<std::int32_t> class_of = classes.class_of();
  std::vector<std::int64_t> row(static_cast<std::size_t>(classes.count()));
  std::vector<std::int64_t> seconds(row.size());
  std::vector<std::int32_t> found;
  const auto pairs = static_cast<std::int64_t>(following.words.size());
  double sum = n_log_n(pairs);
  for (std::int64_t c = 0; c < classes.count(); ++c) {
    std::int64_t firsts = 0;
    for (std::int64_t i = classes.offsets[c]; i < classes.offsets[c + 1]; ++i) {
      for (const std::int32_t neighbour : following.of(classes.words[i])) {
        const std::int32_t h = class_of[neighbour];
        if (row[h]++ == 0) found.push_back(h);
        ++firsts;
      }
    }
    sum -= n_log_n(firsts);
    for (const std::int32_t h : found) {
      sum += n_log_n(row[h]);
      seconds[h] += row[h];
      row[h] = 0;
    }
    found.clear();
  }
  for (const std::int64_t n : seconds) sum -= n_log_n(n);
  return sum / static_cast<double>(pairs);
}

}  // namespace flashlm

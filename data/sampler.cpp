// SPDX-License-Identifier: Apache-2.0
// std::mt19937_64 is the same everywhere; std::uniform_int_distribution and std::discrete_distribution are
// not, so the mapping to a range and to sources is ours.
#include "data/sampler.h"

#include <algorithm>
#include <array>
#include <charconv>
#include <cmath>
#include <limits>
#include <stdexcept>

#include "data/error.h"

namespace flashlm {
namespace {

constexpr std::array<const char*, 3> kNames = {"random", "shuffled", "documents"};

const char* name_of(Windows windows) { return kNames[static_cast<std::size_t>(windows)]; }

/// Targets in [first, last] of the shard, of which a document has m = last - first + 1.
struct Targets {
  std::int64_t first, last;
};

Targets targets_of_document(const TokenShard& tokens, std::int64_t i) {
  return {i == 0 ? 1 : tokens.document_end(i - 1), tokens.document_end(i) - 1};
}

std::shared_ptr<const std::vector<std::int64_t>> count_windows(const TokenShard& tokens, std::int64_t seq) {
  std::vector<std::int64_t> before = {0};
  before.reserve(static_cast<std::size_t>(tokens.document_count()) + 1);
  for (std::int64_t i = 0; i < tokens.document_count(); ++i) {
    const auto [first, last] = targets_of_document(tokens, i);
    before.push_back(before.back() + (last - first + seq) / seq);
  }
  return std::make_shared<const std::vector<std::int64_t>>(std::move(before));
}

/// The numbers in a text of nothing but numbers with a space between them; else an empty list.
std::vector<std::uint64_t> read_numbers(const char* text, const char* end) {
  std::vector<std::uint64_t> numbers;
  while (true) {
    std::uint64_t number = 0;
    const auto [rest, failed] = std::from_chars(text, end, number);
    if (failed != std::errc() || (rest != end && *rest != ' ')) return {};
    numbers.push_back(number);
    if (rest == end) return numbers;
    text = rest + 1;
  }
}

}  // namespace

Windows windows_named(const std::string& name) {
  const auto found = std::find(kNames.begin(), kNames.end(), name);
  if (found == kNames.end())
    throw Error("--windows must be 'random', 'shuffled' or 'documents', got '" + name + "'");
  return static_cast<Windows>(found - kNames.begin());
}

BatchSampler::BatchSampler(std::vector<TokenSource> sources, Windows windows, std::uint64_t seed)
    : windows_(windows), seed_(seed), generator_(seed), epochs_(sources.size()) {
  if (sources.empty()) throw std::invalid_argument("BatchSampler: there must be a source");
  for (const TokenSource& source : sources) {
    if (!(source.weight > 0) || !std::isfinite(source.weight))
      throw Error(source.name + ": its weight must be above 0, got " + std::to_string(source.weight));
    if (windows == Windows::kDocuments && source.tokens.document_count() == 0)
      throw Error(source.name +
                  " does not know where its documents end, as --windows documents needs; use --windows "
                  "shuffled, or make it with flashlm prepare");
  }
  sources_ = std::make_shared<const std::vector<TokenSource>>(std::move(sources));
}

std::int64_t BatchSampler::next(std::int64_t batch, std::int64_t seq, std::span<std::int64_t> inputs,
                                std::span<std::int64_t> targets) {
  const auto width = static_cast<std::size_t>(seq);
  const std::size_t total = static_cast<std::size_t>(batch) * width;
  if (batch < 1 || seq < 1 || inputs.size() != total || targets.size() != total)
    throw std::invalid_argument("BatchSampler::next: inputs and targets must hold batch * seq ids");
  check_length(seq);
  if (windows_ != Windows::kRandom) {
    for (std::size_t i = 0; i < epochs_.size(); ++i)
      if (epochs_[i].seq != seq) begin_epoch(i, epochs_[i].number + 1, seq);
  }
  std::int64_t count = 0;
  for (std::size_t row = 0; row < total; row += width)
    count += fill(draw_source(), inputs.subspan(row, width), targets.subspan(row, width));
  return count;
}

void BatchSampler::check_length(std::int64_t seq) const {
  for (const TokenSource& source : *sources_) {
    const std::int64_t size = source.tokens.size();
    if (windows_ == Windows::kDocuments ? size >= 2 : size > seq) continue;
    const std::string least = std::to_string(windows_ == Windows::kDocuments ? 2 : seq + 1);
    throw Error(source.name + ": a sequence length of " + std::to_string(seq) + " needs at least " + least +
                " tokens, and there are " + std::to_string(size) +
                "; use a shorter sequence length or more text");
  }
}

void BatchSampler::begin_epoch(std::size_t source, std::int64_t number, std::int64_t seq) {
  const TokenShard& tokens = (*sources_)[source].tokens;
  Epoch& epoch = epochs_[source];
  const std::uint64_t key = mixed(mixed(mixed(seed_) ^ source) ^ static_cast<std::uint64_t>(number));
  std::int64_t windows = 0;
  if (windows_ == Windows::kDocuments) {
    if (epoch.seq != seq) epoch.windows_before = count_windows(tokens, seq);
    windows = epoch.windows_before->back();
  } else {
    // No offset that would leave no window.
    const std::int64_t offsets = std::min(seq, tokens.size() - seq);
    epoch.offset = static_cast<std::int64_t>(mixed(~key) % static_cast<std::uint64_t>(offsets));
    windows = (tokens.size() - 1 - epoch.offset) / seq;
  }
  epoch.order.emplace(windows, key);
  epoch.number = number;
  epoch.seq = seq;
  epoch.position = 0;
}

std::int64_t BatchSampler::fill(std::size_t source, std::span<std::int64_t> inputs,
                                std::span<std::int64_t> targets) {
  const TokenShard& tokens = (*sources_)[source].tokens;
  const auto seq = static_cast<std::int64_t>(inputs.size());
  const auto whole = [&](std::int64_t offset) {
    tokens.copy(offset, inputs);
    tokens.copy(offset + 1, targets);
  };
  if (windows_ == Windows::kRandom) {
    whole(draw_below(tokens.size() - seq));
    return seq;
  }
  Epoch& epoch = epochs_[source];
  if (epoch.position == epoch.order->count()) begin_epoch(source, epoch.number + 1, seq);
  const std::int64_t window = (*epoch.order)(epoch.position++);
  if (windows_ == Windows::kShuffled) {
    whole(epoch.offset + window * seq);
    return seq;
  }
  const std::vector<std::int64_t>& before = *epoch.windows_before;
  const auto document = std::upper_bound(before.begin(), before.end(), window) - before.begin() - 1;
  const auto [first, last] = targets_of_document(tokens, document);
  if (last - first + 1 <= seq) {
    const auto count = static_cast<std::size_t>(last - first + 1);
    tokens.copy(first - 1, inputs.first(count));
    tokens.copy(first, targets.first(count));
    std::fill(inputs.begin() + count, inputs.end(), tokens[last]);
    std::fill(targets.begin() + count, targets.end(), kIgnoredTarget);
    return last - first + 1;
  }
  const std::int64_t begin = first - 1 + (window - before[document]) * seq;
  const std::int64_t moved = std::max<std::int64_t>(0, begin + seq - last);
  whole(begin - moved);
  std::fill(targets.begin(), targets.begin() + moved, kIgnoredTarget);
  return seq - moved;
}

std::size_t BatchSampler::draw_source() {
  if (sources_->size() == 1) return 0;
  double total = 0;
  for (const TokenSource& source : *sources_) total += source.weight;
  // 53 random bits, all that a double holds. Sums are compared, not subtracted from: a machine that fuses
  // multiplication and subtraction would round otherwise.
  const double point = static_cast<double>(generator_() >> 11) * 0x1p-53 * total;
  ++draws_;
  double below = 0;
  std::size_t i = 0;
  while (i + 1 < sources_->size() && point >= (below += (*sources_)[i].weight)) ++i;
  return i;
}

std::int64_t BatchSampler::draw_below(std::int64_t bound) {
  // Values from the last, incomplete multiple of the bound are drawn again: the rest map evenly.
  const auto range = static_cast<std::uint64_t>(bound);
  const std::uint64_t limit = std::numeric_limits<std::uint64_t>::max() / range * range;
  std::uint64_t value;
  do {
    value = generator_();
    ++draws_;
  } while (value >= limit);
  return static_cast<std::int64_t>(value % range);
}

std::string BatchSampler::state() const {
  std::string state = std::to_string(seed_) + ' ' + std::to_string(draws_);
  if (windows_ == Windows::kRandom) return state;
  for (const Epoch& epoch : epochs_)
    for (const std::int64_t number : {epoch.number, epoch.seq, epoch.position})
      state.append(1, ' ').append(std::to_string(number));
  return name_of(windows_) + (' ' + state);
}

void BatchSampler::set_state(const std::string& state) {
  const auto require = [&](bool holds, const std::string& rule) {
    if (!holds) throw Error("the state of the batch sampler must " + rule + ", got '" + state + "'");
  };
  const bool epochs = windows_ != Windows::kRandom;
  const std::string name = name_of(windows_);
  const std::string first = state.substr(0, state.find(' '));
  const bool of_random = !first.empty() && first.find_first_not_of("0123456789") == std::string::npos;
  const std::string of = of_random ? kNames[0] : first;
  require(of == name || std::find(kNames.begin(), kNames.end(), of) == kNames.end(),
          "be of --windows " + name + " (resume with the run's own config.toml)");
  const std::size_t skipped = epochs && of == name ? name.size() + 1 : 0;
  const auto numbers =
      read_numbers(state.data() + std::min(skipped, state.size()), state.data() + state.size());
  require(numbers.size() == (epochs ? 2 + 3 * epochs_.size() : 2),
          epochs ? "be '" + name + " SEED DRAWS' and 'EPOCH SEQ POSITION' for each of " +
                       std::to_string(epochs_.size()) + " sources"
                 : "be 'SEED DRAWS'");

  BatchSampler restored(*this);
  restored.seed_ = numbers[0];
  restored.draws_ = numbers[1];
  restored.generator_.seed(restored.seed_);
  restored.generator_.discard(restored.draws_);
  for (std::size_t i = 0; epochs && i < epochs_.size(); ++i) {
    const std::uint64_t* place = &numbers[2 + 3 * i];
    constexpr std::uint64_t kMost = std::numeric_limits<std::int32_t>::max();
    require(place[0] <= kMost && place[1] <= kMost, "name possible epochs and lengths");
    const auto number = static_cast<std::int64_t>(place[0]), seq = static_cast<std::int64_t>(place[1]);
    restored.epochs_[i] = Epoch();
    if (seq == 0) continue;
    restored.check_length(seq);
    restored.begin_epoch(i, number, seq);
    Epoch& epoch = restored.epochs_[i];
    require(place[2] <= static_cast<std::uint64_t>(epoch.order->count()),
            "lie in the epochs of " + (*sources_)[i].name + ", which have " +
                std::to_string(epoch.order->count()) + " windows (resume with the same data)");
    epoch.position = static_cast<std::int64_t>(place[2]);
  }
  *this = std::move(restored);
}

}  // namespace flashlm

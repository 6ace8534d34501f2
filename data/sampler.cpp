// SPDX-License-Identifier: Apache-2.0
// std::mt19937_64 is the same everywhere; std::uniform_int_distribution is not, so the mapping to a range is
// ours.
#include "data/sampler.h"

#include <charconv>
#include <limits>
#include <stdexcept>

#include "data/error.h"

namespace flashlm {

BatchSampler::BatchSampler(const TokenShard& tokens, std::uint64_t seed)
    : tokens_(tokens), seed_(seed), generator_(seed) {}

void BatchSampler::next(std::int64_t batch, std::int64_t seq, std::span<std::int64_t> inputs,
                        std::span<std::int64_t> targets) {
  const auto width = static_cast<std::size_t>(seq);
  const std::size_t total = static_cast<std::size_t>(batch) * width;
  if (batch < 1 || seq < 1 || inputs.size() != total || targets.size() != total)
    throw std::invalid_argument("BatchSampler::next: inputs and targets must hold batch * seq ids");
  if (tokens_.size() < seq + 1)
    throw Error("a sequence length of " + std::to_string(seq) + " needs at least " + std::to_string(seq + 1) +
                " tokens, and there are " + std::to_string(tokens_.size()) +
                "; use a shorter sequence length or more text");
  for (std::size_t row = 0; row < total; row += width) {
    const std::int64_t offset = draw_below(tokens_.size() - seq);
    tokens_.copy(offset, inputs.subspan(row, width));
    tokens_.copy(offset + 1, targets.subspan(row, width));
  }
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

std::string BatchSampler::state() const { return std::to_string(seed_) + " " + std::to_string(draws_); }

void BatchSampler::set_state(const std::string& state) {
  const char* const end = state.data() + state.size();
  std::uint64_t seed = 0;
  std::uint64_t draws = 0;
  const auto first = std::from_chars(state.data(), end, seed);
  const bool separated = first.ec == std::errc() && first.ptr != end && *first.ptr == ' ';
  const auto second = separated ? std::from_chars(first.ptr + 1, end, draws) : first;
  if (!separated || second.ec != std::errc() || second.ptr != end)
    throw Error("the state of the batch sampler must be 'SEED DRAWS', got '" + state + "'");
  seed_ = seed;
  draws_ = draws;
  generator_.seed(seed);
  generator_.discard(draws);
}

}  // namespace flashlm

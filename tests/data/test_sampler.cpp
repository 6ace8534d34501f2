// SPDX-License-Identifier: Apache-2.0
#include <catch2/catch.hpp>
#include <numeric>
#include <vector>

#include "data/sampler.h"
#include "tests/data/support.h"

using Catch::Contains;
using namespace flashlm;

namespace {

/// The ids 0, 1, ... count - 1: an id is its own position.
TokenShard counting(const Scratch& scratch, int count) {
  std::vector<std::int32_t> ids(static_cast<std::size_t>(count));
  std::iota(ids.begin(), ids.end(), 0);
  TokenShardWriter writer(scratch / "ids", 1000, 0);
  writer.append(ids, 0);
  writer.commit();
  return TokenShard::open(scratch / "ids");
}

std::vector<std::int64_t> draw(BatchSampler& sampler, std::int64_t batch, std::int64_t seq) {
  std::vector<std::int64_t> inputs(static_cast<std::size_t>(batch * seq));
  std::vector<std::int64_t> targets(inputs.size());
  sampler.next(batch, seq, inputs, targets);
  for (std::size_t i = 0; i < inputs.size(); ++i) REQUIRE(targets[i] == inputs[i] + 1);
  for (std::size_t i = 1; i < inputs.size(); ++i)
    if (i % static_cast<std::size_t>(seq) != 0) REQUIRE(inputs[i] == inputs[i - 1] + 1);
  return inputs;
}

}  // namespace

TEST_CASE("every offset is drawn about equally often, and no other", "[sampler]") {
  const Scratch scratch;
  BatchSampler sampler(counting(scratch, 10), 3);
  std::vector<int> counts(10);
  for (int repeat = 0; repeat < 1500; ++repeat)
    for (std::size_t row = 0; const std::int64_t id : draw(sampler, 4, 4))
      if (row++ % 4 == 0) ++counts[static_cast<std::size_t>(id)];
  // 6000 draws of 6 offsets: 1000 each, standard deviation 29.
  for (int offset = 0; offset < 6; ++offset) CHECK(std::abs(counts[offset] - 1000) < 150);
  for (int offset = 6; offset < 10; ++offset) CHECK(counts[offset] == 0);
}

TEST_CASE("offsets are mt19937_64 modulo the range on every machine", "[sampler]") {
  const Scratch scratch;
  std::mt19937_64 generator(42);
  BatchSampler sampler(counting(scratch, 1000), 42);
  for (const std::int64_t id : draw(sampler, 50, 1))
    CHECK(id == static_cast<std::int64_t>(generator() % 999));
}

TEST_CASE("a restored sampler continues with the same batches", "[sampler]") {
  const Scratch scratch;
  const TokenShard tokens = counting(scratch, 500);
  BatchSampler sampler(tokens, 11);
  draw(sampler, 7, 3);
  const std::string state = sampler.state();
  const auto expected = draw(sampler, 5, 8);
  BatchSampler other(tokens, 0);
  CHECK(draw(other, 5, 8) != expected);
  other.set_state(state);
  CHECK(other.state() == state);
  CHECK(draw(other, 5, 8) == expected);
  for (const char* bad : {"", "1", "1 ", " 1 2", "1 2 3", "x 2", "1 -2", "99999999999999999999 1"}) {
    CHECK_THAT(error_of([&] { other.set_state(bad); }), Contains("SEED DRAWS"));
  }
}

TEST_CASE("too few tokens for the sequence length", "[sampler]") {
  const Scratch scratch;
  BatchSampler sampler(counting(scratch, 8), 1);
  CHECK(draw(sampler, 1, 7).front() == 0);
  CHECK_THAT(error_of([&] { draw(sampler, 1, 8); }),
             Contains("sequence length of 8 needs at least 9 tokens, and there are 8"));
  std::vector<std::int64_t> three(3);
  CHECK_THROWS_AS(sampler.next(2, 2, three, three), std::invalid_argument);
}

// SPDX-License-Identifier: Apache-2.0
// Run under -fsanitize=thread as well, when this changes: the preset asan does not see races.
#include <catch2/catch.hpp>
#include <vector>

#include "data/prefetcher.h"
#include "tests/data/support.h"

using Catch::Contains;
using namespace flashlm;

namespace {

struct Batch {
  std::vector<std::int64_t> inputs, targets;
  std::int64_t count = 0;
  bool operator==(const Batch&) const = default;
};

template <class Sampler>
Batch draw(Sampler& sampler, std::int64_t batch, std::int64_t seq) {
  Batch drawn;
  drawn.inputs.resize(static_cast<std::size_t>(batch * seq));
  drawn.targets.resize(drawn.inputs.size());
  drawn.count = sampler.next(batch, seq, drawn.inputs, drawn.targets);
  return drawn;
}

BatchSampler make_sampler(const Scratch& scratch, Windows windows) {
  return BatchSampler({{counting(scratch, 100, 0, {30, 1, 50, 19})}, {counting(scratch, 61, 500, {61}), 2}},
                      windows, 4);
}

}  // namespace

TEST_CASE("batches made ahead are those of the sampler, whatever was guessed", "[prefetcher]") {
  const Scratch scratch;
  const auto windows = GENERATE(Windows::kRandom, Windows::kShuffled, Windows::kDocuments);
  BatchSampler sampler = make_sampler(scratch, windows);
  Prefetcher prefetcher(make_sampler(scratch, windows));
  std::mt19937 random(1);
  for (int i = 0; i < 1000; ++i) {
    const std::int64_t batch = 1 + random() % 3, seq = 5 + random() % 3;
    REQUIRE(draw(prefetcher, batch, seq) == draw(sampler, batch, seq));
    REQUIRE(prefetcher.state() == sampler.state());
    // Nothing, the right shape as a rule would be, or another; then perhaps once more.
    while (random() % 3 != 0) prefetcher.prefetch(1 + random() % 3, 5 + random() % 3);
    REQUIRE(prefetcher.state() == sampler.state());
  }
}

TEST_CASE("a batch made ahead is handed out, not made again", "[prefetcher]") {
  // The ids in the file are zeroed while the batch waits. What was made before that must come out; but when
  // the thread got to it, nobody can know, so it is given more and more time.
  const Scratch scratch;
  const auto make = [&] { return BatchSampler({{counting(scratch, 100, 1)}}, Windows::kShuffled, 4); };
  BatchSampler sampler = make();
  Prefetcher prefetcher(make());
  std::fstream file(scratch / "counting-1-100", std::ios::binary | std::ios::in | std::ios::out);
  std::string content(72 + 100 * 4, '\0');
  file.read(content.data(), static_cast<std::streamsize>(content.size()));
  const auto write_ids = [&](const std::string& ids) {
    file.seekp(72);
    file.write(ids.data(), static_cast<std::streamsize>(ids.size()));
    file.flush();
  };
  bool handed_out = false;
  for (int time = 1; time < 1 << 20 && !handed_out; time *= 2) {
    const Batch expected = draw(sampler, 2, 6);
    prefetcher.prefetch(2, 6);
    for (int i = 0; i < time; ++i) std::this_thread::yield();
    write_ids(std::string(100 * 4, '\0'));
    const Batch drawn = draw(prefetcher, 2, 6);
    write_ids(content.substr(72));
    handed_out = drawn == expected;
  }
  CHECK(handed_out);
}

TEST_CASE("a restored state forgets what was made ahead", "[prefetcher]") {
  const Scratch scratch;
  BatchSampler sampler = make_sampler(scratch, Windows::kDocuments);
  Prefetcher prefetcher(make_sampler(scratch, Windows::kDocuments));
  const std::string start = sampler.state();
  const Batch first = draw(sampler, 2, 6);
  draw(prefetcher, 2, 6);
  prefetcher.prefetch(2, 6);
  prefetcher.set_state(start);
  CHECK(prefetcher.state() == start);
  CHECK(draw(prefetcher, 2, 6) == first);
  prefetcher.prefetch(2, 6);
  CHECK_THAT(error_of([&] { prefetcher.set_state("documents"); }), Contains("SEED DRAWS"));
  CHECK(draw(prefetcher, 2, 6) == draw(sampler, 2, 6));
}

TEST_CASE("what goes wrong on the thread comes out of next, once for each time", "[prefetcher]") {
  const Scratch scratch;
  BatchSampler sampler = make_sampler(scratch, Windows::kShuffled);
  Prefetcher prefetcher(make_sampler(scratch, Windows::kShuffled));
  for (int repeat = 0; repeat < 3; ++repeat) {
    prefetcher.prefetch(1, 80);  // longer than one of the sources
    CHECK_THAT(error_of([&] { draw(prefetcher, 1, 80); }), Contains("needs at least 81 tokens"));
    CHECK_THAT(error_of([&] { draw(prefetcher, 1, 80); }), Contains("needs at least 81 tokens"));
    CHECK(draw(prefetcher, 3, 6) == draw(sampler, 3, 6));
    prefetcher.prefetch(1, 80);  // of no consequence
    CHECK(draw(prefetcher, 2, 6) == draw(sampler, 2, 6));
  }
  std::vector<std::int64_t> three(3);
  prefetcher.prefetch(2, 2);
  CHECK_THROWS_AS(prefetcher.next(2, 2, three, three), std::invalid_argument);
  CHECK(draw(prefetcher, 2, 2) == draw(sampler, 2, 2));
}

TEST_CASE("a prefetcher ends at any time", "[prefetcher]") {
  const Scratch scratch;
  for (int i = 0; i < 50; ++i) {
    Prefetcher prefetcher(make_sampler(scratch, Windows::kDocuments));
    if (i % 2 == 0) prefetcher.prefetch(50, 6);
    if (i % 3 == 0) draw(prefetcher, 50, 6);
    if (i % 5 == 0) prefetcher.prefetch(50, 6);
  }
}

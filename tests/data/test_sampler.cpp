// SPDX-License-Identifier: Apache-2.0
#include <algorithm>
#include <catch2/catch.hpp>
#include <map>
#include <set>
#include <vector>

#include "data/sampler.h"
#include "tests/data/support.h"

using Catch::Contains;
using namespace flashlm;

namespace {

struct Batch {
  std::int64_t seq = 0, count = 0;
  std::vector<std::int64_t> inputs, targets;

  bool operator==(const Batch&) const = default;
  std::int64_t first_of_row(std::int64_t row) const { return inputs[static_cast<std::size_t>(row * seq)]; }
};

Batch draw(BatchSampler& sampler, std::int64_t batch, std::int64_t seq) {
  Batch drawn{seq, 0, {}, {}};
  drawn.inputs.resize(static_cast<std::size_t>(batch * seq), -1);
  drawn.targets.resize(drawn.inputs.size(), -1);
  drawn.count = sampler.next(batch, seq, drawn.inputs, drawn.targets);
  return drawn;
}

/// As draw(), of ids that are positions: rows must be windows without a gap, and targets one ahead.
Batch draw_windows(BatchSampler& sampler, std::int64_t batch, std::int64_t seq) {
  const Batch drawn = draw(sampler, batch, seq);
  REQUIRE(drawn.count == batch * seq);
  for (std::size_t i = 0; i < drawn.inputs.size(); ++i) {
    REQUIRE(drawn.targets[i] == drawn.inputs[i] + 1);
    if (i % static_cast<std::size_t>(seq) != 0) REQUIRE(drawn.inputs[i] == drawn.inputs[i - 1] + 1);
  }
  return drawn;
}

/// Rows of a whole epoch of `windows` windows, drawn three at a time; the last batch reaches into the next.
std::vector<std::int64_t> firsts_of_epoch(BatchSampler& sampler, std::size_t windows, std::int64_t seq) {
  std::vector<std::int64_t> firsts;
  while (firsts.size() < windows) firsts.push_back(draw_windows(sampler, 1, seq).first_of_row(0));
  return firsts;
}

}  // namespace

// ---- random ----

TEST_CASE("every offset is drawn about equally often, and no other", "[sampler]") {
  const Scratch scratch;
  BatchSampler sampler({{counting(scratch, 10)}}, Windows::kRandom, 3);
  std::vector<int> counts(10);
  for (int repeat = 0; repeat < 1500; ++repeat) {
    const Batch batch = draw_windows(sampler, 4, 4);
    for (int row = 0; row < 4; ++row) ++counts[static_cast<std::size_t>(batch.first_of_row(row))];
  }
  // 6000 draws of 6 offsets: 1000 each, standard deviation 29.
  for (int offset = 0; offset < 6; ++offset) CHECK(std::abs(counts[offset] - 1000) < 150);
  for (int offset = 6; offset < 10; ++offset) CHECK(counts[offset] == 0);
}

TEST_CASE("offsets are mt19937_64 modulo the range on every machine", "[sampler]") {
  const Scratch scratch;
  std::mt19937_64 generator(42);
  BatchSampler sampler({{counting(scratch, 1000)}}, Windows::kRandom, 42);
  for (const std::int64_t id : draw_windows(sampler, 50, 1).inputs)
    CHECK(id == static_cast<std::int64_t>(generator() % 999));
}

// ---- shuffled ----

TEST_CASE("an epoch has every window once, from an offset of its own", "[sampler]") {
  const Scratch scratch;
  // 7 tokens more than the windows need, and 1 for the last target: between 14 and 15 windows of 8.
  BatchSampler sampler({{counting(scratch, 128)}}, Windows::kShuffled, 5);
  std::set<std::int64_t> offsets;
  std::set<std::vector<std::int64_t>> orders;
  for (int epoch = 0; epoch < 200; ++epoch) {
    std::vector<std::int64_t> firsts = {draw_windows(sampler, 1, 8).first_of_row(0)};
    const std::int64_t offset = firsts[0] % 8;
    const std::size_t windows = static_cast<std::size_t>(127 - offset) / 8;
    const auto rest = firsts_of_epoch(sampler, windows - 1, 8);
    firsts.insert(firsts.end(), rest.begin(), rest.end());
    offsets.insert(offset);
    orders.insert(firsts);
    std::sort(firsts.begin(), firsts.end());
    for (std::size_t i = 0; i < windows; ++i) REQUIRE(firsts[i] == offset + 8 * static_cast<std::int64_t>(i));
  }
  CHECK(offsets.size() == 8);
  CHECK(orders.size() == 200);
}

TEST_CASE("the only window of a short sequence comes in every epoch", "[sampler]") {
  const Scratch scratch;
  BatchSampler sampler({{counting(scratch, 9)}}, Windows::kShuffled, 5);
  const Batch batch = draw_windows(sampler, 20, 8);
  for (int row = 0; row < 20; ++row) CHECK(batch.first_of_row(row) == 0);
  BatchSampler two({{counting(scratch, 10)}}, Windows::kShuffled, 5);
  std::set<std::int64_t> firsts;
  const Batch more = draw_windows(two, 20, 8);
  for (int row = 0; row < 20; ++row) firsts.insert(more.first_of_row(row));
  CHECK(firsts == std::set<std::int64_t>{0, 1});
}

// ---- documents ----

TEST_CASE("no window holds two documents, and an epoch has every target once", "[sampler]") {
  const Scratch scratch;
  const std::vector<int> lengths = {1, 1, 2, 9, 8, 7, 16, 17, 15, 33, 1, 40};
  const int size = std::accumulate(lengths.begin(), lengths.end(), 0);
  const auto first_too_short = GENERATE(false, true);
  std::vector<int> documents = lengths;
  if (!first_too_short) documents[0] = 5;
  const int total = size + (first_too_short ? 0 : 4);
  const TokenShard tokens = counting(scratch, total, 0, documents);
  std::vector<int> document_of, first_of;  // by position; a document's first position
  std::int64_t windows = 0;
  for (std::size_t d = 0; d < documents.size(); ++d) {
    first_of.push_back(static_cast<int>(document_of.size()));
    document_of.insert(document_of.end(), static_cast<std::size_t>(documents[d]), static_cast<int>(d));
    windows += (documents[d] - (d == 0 ? 1 : 0) + 7) / 8;
  }
  BatchSampler sampler({{tokens}}, Windows::kDocuments, 9);
  std::set<std::vector<std::int64_t>> orders;
  for (int epoch = 0; epoch < 50; ++epoch) {
    const Batch batch = draw(sampler, windows, 8);
    CHECK(batch.count == total - 1);
    CHECK(orders.insert(batch.inputs).second);
    std::vector<int> times(static_cast<std::size_t>(total));
    for (std::int64_t row = 0; row < windows; ++row) {
      const std::int64_t* input = &batch.inputs[static_cast<std::size_t>(row * 8)];
      const std::int64_t* target = &batch.targets[static_cast<std::size_t>(row * 8)];
      const std::int64_t* learnt = std::find_if(target, target + 8, [](auto id) { return id >= 0; });
      REQUIRE(learnt != target + 8);
      const int d = document_of[static_cast<std::size_t>(*learnt)];
      const int last = first_of[d] + documents[d] - 1;
      CAPTURE(epoch, row, d, input[0], target[0]);
      for (int i = 0; i < 8; ++i) {
        // The document's tokens, and before them nothing but the end-of-text token of the one before.
        REQUIRE(document_of[static_cast<std::size_t>(input[i])] ==
                (i == 0 && input[0] == first_of[d] - 1 ? d - 1 : d));
        if (target[i] == kIgnoredTarget) continue;
        REQUIRE(target[i] == input[i] + 1);
        REQUIRE(target[i] <= last);
        ++times[static_cast<std::size_t>(target[i])];
      }
      // Padded only where the document is shorter than a window, and only with its last token.
      const bool is_short = last - std::max(first_of[d] - 1, 0) < 8;
      if (is_short) REQUIRE(input[0] == std::max(first_of[d] - 1, 0));
      for (int i = 1; i < 8; ++i)
        REQUIRE((input[i] == input[i - 1] + 1 || (is_short && input[i] == last && input[i - 1] == last)));
    }
    REQUIRE(times[0] == 0);
    for (std::size_t i = 1; i < times.size(); ++i) REQUIRE(times[i] == 1);
  }
}

TEST_CASE("documents that nobody knows cannot be respected", "[sampler]") {
  const Scratch scratch;
  CHECK_THAT(error_of([&] {
               BatchSampler({{counting(scratch, 9), 1, "here"}}, Windows::kDocuments, 1);
             }),
             Contains("here does not know where its documents end, as --windows documents needs"));
}

// ---- several sources ----

TEST_CASE("sources share the rows by their weights, each at its own pace", "[sampler]") {
  const Scratch scratch;
  const auto windows = GENERATE(Windows::kRandom, Windows::kShuffled, Windows::kDocuments);
  const TokenShard few = counting(scratch, 41, 0, {41}), many = counting(scratch, 4001, 1000, {4001}),
                   third = counting(scratch, 401, 10000, {401});
  BatchSampler sampler({{few, 0.5}, {many, 3.5}, {third, 1}}, windows, 17);
  std::vector<int> rows(3);
  std::map<std::int64_t, int> times;
  const Batch batch = draw_windows(sampler, 5000, 4);
  for (int row = 0; row < 5000; ++row) {
    const std::int64_t first = batch.first_of_row(row);
    ++rows[first < 1000 ? 0 : first < 10000 ? 1 : 2];
    ++times[first];
  }
  CHECK(rows[0] == Approx(500).margin(85));  // four standard deviations
  CHECK(rows[1] == Approx(3500).margin(130));
  CHECK(rows[2] == Approx(1000).margin(115));
  if (windows != Windows::kDocuments) return;
  // Ten windows of the first, 1,000 of the second, 100 of the third.
  for (const auto& [first, count] : times) {
    const int source = first < 1000 ? 0 : first < 10000 ? 1 : 2;
    const int epochs = rows[source] / (source == 0 ? 10 : source == 1 ? 1000 : 100);
    CHECK((count == epochs || count == epochs + 1));
  }
}

TEST_CASE("one source draws as it would without weights", "[sampler]") {
  const Scratch scratch;
  BatchSampler one({{counting(scratch, 500)}}, Windows::kRandom, 8);
  BatchSampler weighted({{counting(scratch, 500), 0.25}}, Windows::kRandom, 8);
  CHECK(draw(one, 10, 7) == draw(weighted, 10, 7));
  CHECK(one.state() == "8 10");
}

TEST_CASE("sources differ in their order though they are of one size", "[sampler]") {
  const Scratch scratch;
  const TokenShard tokens = counting(scratch, 10001);
  BatchSampler first({{tokens}, {tokens}}, Windows::kShuffled, 3);
  std::map<std::int64_t, int> times;
  const Batch batch = draw_windows(first, 300, 10);
  for (int row = 0; row < 300; ++row) ++times[batch.first_of_row(row)];
  CHECK(times.size() > 250);  // with one order for both about half are met twice
}

TEST_CASE("weights that are none are refused", "[sampler]") {
  const Scratch scratch;
  const TokenShard tokens = counting(scratch, 10);
  for (const double weight : {0.0, -1.0, std::nan(""), HUGE_VAL})
    CHECK_THAT(error_of([&] {
                 BatchSampler({{tokens}, {tokens, weight, "there"}}, Windows::kRandom, 1);
               }),
               Contains("there: its weight must be above 0"));
  CHECK_THROWS_AS(BatchSampler({}, Windows::kRandom, 1), std::invalid_argument);
}

// ---- states and changes ----

TEST_CASE("a restored sampler continues with the same batches from any position", "[sampler]") {
  const Scratch scratch;
  const auto windows = GENERATE(Windows::kRandom, Windows::kShuffled, Windows::kDocuments);
  const auto sources = GENERATE(1, 2);
  std::vector<TokenSource> from = {{counting(scratch, 100, 0, {30, 1, 50, 19})}};
  if (sources == 2) from.push_back({counting(scratch, 61, 500, {61}), 2});
  BatchSampler sampler(from, windows, 11);
  std::vector<std::string> states;
  std::vector<Batch> batches;
  for (int i = 0; i < 60; ++i) {
    states.push_back(sampler.state());
    batches.push_back(draw(sampler, 1 + i % 4, i < 40 ? 6 : 9));
  }
  CHECK(std::set<std::string>(states.begin(), states.end()).size() == 60);
  for (std::size_t i = 0; i < 60; ++i) {
    BatchSampler other(from, windows, 0);
    draw(other, 1, 6);
    other.set_state(states[i]);
    CHECK(other.state() == states[i]);
    for (std::size_t j = i; j < std::min<std::size_t>(i + 5, 60); ++j)
      REQUIRE(draw(other, 1 + static_cast<int>(j) % 4, j < 40 ? 6 : 9) == batches[j]);
  }
}

TEST_CASE("rows are the same however they are batched", "[sampler]") {
  const Scratch scratch;
  const auto windows = GENERATE(Windows::kRandom, Windows::kShuffled, Windows::kDocuments);
  const std::vector<TokenSource> from = {{counting(scratch, 100, 0, {30, 1, 50, 19})},
                                         {counting(scratch, 61, 500, {61}), 2}};
  BatchSampler sampler(from, windows, 4), other(from, windows, 4);
  const Batch whole = draw(sampler, 60, 6);
  std::vector<std::int64_t> inputs;
  for (const int rows : {1, 7, 30, 2, 20}) {
    const Batch part = draw(other, rows, 6);
    inputs.insert(inputs.end(), part.inputs.begin(), part.inputs.end());
  }
  CHECK(inputs == whole.inputs);
  CHECK(other.state() == sampler.state());
}

TEST_CASE("another length begins new epochs", "[sampler]") {
  const Scratch scratch;
  BatchSampler sampler({{counting(scratch, 101, 0, {101})}}, Windows::kDocuments, 4);
  draw(sampler, 3, 10);
  CHECK(sampler.state() == "documents 4 0 1 10 3");
  std::set<std::int64_t> firsts;
  const Batch shorter = draw_windows(sampler, 20, 5);
  for (int row = 0; row < 20; ++row) firsts.insert(shorter.first_of_row(row));
  CHECK(firsts.size() == 20);  // a whole epoch, whatever came before
  CHECK(sampler.state() == "documents 4 0 2 5 20");
  draw(sampler, 1, 10);
  CHECK(sampler.state() == "documents 4 0 3 10 1");
}

TEST_CASE("seeds decide", "[sampler]") {
  const Scratch scratch;
  const auto windows = GENERATE(Windows::kRandom, Windows::kShuffled, Windows::kDocuments);
  const TokenShard tokens = counting(scratch, 1000, 0, {1000});
  BatchSampler first({{tokens}}, windows, 1), second({{tokens}}, windows, 2), again({{tokens}}, windows, 1);
  const Batch drawn = draw(first, 50, 10);
  CHECK(draw(second, 50, 10) != drawn);
  CHECK(draw(again, 50, 10) == drawn);
}

TEST_CASE("states that cannot be are refused, and change nothing", "[sampler]") {
  const Scratch scratch;
  const TokenShard tokens = counting(scratch, 100, 0, {60, 40});
  BatchSampler random({{tokens}}, Windows::kRandom, 11), shuffled({{tokens}}, Windows::kShuffled, 11),
      two({{tokens}, {tokens}}, Windows::kDocuments, 11);
  for (const char* bad : {"", "1", "1 ", " 1 2", "1 2 3", "x 2", "1 -2", "99999999999999999999 1", "1  2"})
    CHECK_THAT(error_of([&] { random.set_state(bad); }), Contains("must be 'SEED DRAWS'"));
  draw(shuffled, 3, 10);
  const std::string before = shuffled.state();
  for (const char* bad : {"", "shuffled", "shuffled ", "shuffled 1 2", "shuffled 1 2 3 4",
                          "shuffled 1 2 3 4 5 6", "shuffled 1 2 3 4 x"})
    CHECK_THAT(error_of([&] { shuffled.set_state(bad); }),
               Contains("must be 'shuffled SEED DRAWS' and 'EPOCH SEQ POSITION' for each of 1 sources"));
  CHECK_THAT(error_of([&] { shuffled.set_state("1 2"); }), Contains("must be of --windows shuffled"));
  CHECK_THAT(error_of([&] { random.set_state(before); }), Contains("must be of --windows random"));
  CHECK_THAT(error_of([&] { two.set_state("shuffled 1 0 1 10 1 1 10 1"); }),
             Contains("must be of --windows documents"));
  CHECK_THAT(error_of([&] { two.set_state("documents 1 0 1 10 1"); }), Contains("for each of 2 sources"));
  CHECK_THAT(error_of([&] { shuffled.set_state("shuffled 1 0 1 10 11"); }),
             Contains("lie in the epochs of the data, which have 9 windows"));
  CHECK_THAT(error_of([&] { shuffled.set_state("shuffled 1 0 1 100 0"); }),
             Contains("needs at least 101 tokens"));
  CHECK_THAT(error_of([&] { shuffled.set_state("shuffled 1 0 1 9999999999 0"); }),
             Contains("possible epochs"));
  CHECK(shuffled.state() == before);
  shuffled.set_state("shuffled 1 0 1 10 9");
  CHECK(draw_windows(shuffled, 1, 10).count == 10);
  CHECK(shuffled.state() == "shuffled 1 0 2 10 1");
}

TEST_CASE("too few tokens for the sequence length", "[sampler]") {
  const Scratch scratch;
  const auto windows = GENERATE(Windows::kRandom, Windows::kShuffled);
  const TokenShard long_enough = counting(scratch, 100);
  BatchSampler sampler({{long_enough}, {counting(scratch, 8, 1000), 1, "short"}}, windows, 1);
  draw_windows(sampler, 10, 7);
  const std::string before = sampler.state();
  CHECK_THAT(error_of([&] { draw(sampler, 1, 8); }),
             Contains("short: a sequence length of 8 needs at least 9 tokens, and there are 8"));
  CHECK(sampler.state() == before);
  std::vector<std::int64_t> three(3);
  CHECK_THROWS_AS(sampler.next(2, 2, three, three), std::invalid_argument);
  BatchSampler nothing({{counting(scratch, 1, 0, {1})}}, Windows::kDocuments, 1);
  CHECK_THAT(error_of([&] { draw(nothing, 1, 8); }), Contains("needs at least 2 tokens, and there are 1"));
}

TEST_CASE("windows have names", "[sampler]") {
  CHECK(windows_named("random") == Windows::kRandom);
  CHECK(windows_named("shuffled") == Windows::kShuffled);
  CHECK(windows_named("documents") == Windows::kDocuments);
  CHECK_THAT(error_of([] { windows_named("epochs"); }),
             Contains("--windows must be 'random', 'shuffled' or 'documents', got 'epochs'"));
}

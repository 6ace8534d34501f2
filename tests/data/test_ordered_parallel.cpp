// SPDX-License-Identifier: Apache-2.0
#include <algorithm>
#include <atomic>
#include <catch2/catch.hpp>
#include <stdexcept>
#include <vector>

#include "data/ordered_parallel.h"

using namespace flashlm;

namespace {

struct Item {
  int number = -1;
  unsigned long result = 0;
};

/// Takes longer for some items than for others, so that threads overtake each other.
unsigned long work_on(int number) {
  auto result = static_cast<unsigned long>(number);
  for (int i = 0; i < number * 7919 % 13 * 2000; ++i) result = result * 31 + static_cast<unsigned long>(i);
  return result;
}

}  // namespace

TEST_CASE("results come in order, each once, whatever the number of threads", "[ordered_parallel]") {
  for (const int count : {0, 1, 2, 3, 1000})
    for (const int threads : {1, 2, 5}) {
      std::atomic<int> produced = 0;
      std::atomic<int> most = 0;
      std::atomic<int> producers = 0;
      int consumed = 0;
      std::vector<int> workers;
      ordered_parallel<Item>(
          threads,
          [&](Item& item) {
            if (++producers != 1) throw std::logic_error("two at once");
            item.number = produced;
            const bool more = produced < count;
            if (more) ++produced;
            --producers;
            return more;
          },
          [&](Item& item, int worker) {
            if (worker < 0 || worker >= threads) throw std::logic_error("no such worker");
            item.result = work_on(item.number);
          },
          [&](Item& item) {
            most = std::max<int>(most, produced - consumed);
            CHECK(item.number == consumed++);
            CHECK(item.result == work_on(item.number));
          });
      CHECK(consumed == count);
      CHECK(most <= 2 * threads + 12);
    }
}

TEST_CASE("an exception anywhere ends the work", "[ordered_parallel]") {
  for (const int threads : {1, 3})
    for (const int place : {0, 1, 2}) {
      int number = 0;
      const auto fail_at = [&](int here, int item) {
        if (here == place && item == 40) throw std::runtime_error("at 40");
      };
      const auto all = [&] {
        ordered_parallel<Item>(
            threads,
            [&](Item& item) {
              fail_at(0, number);
              item.number = number++;
              return true;  // there is no end
            },
            [&](Item& item, int) { fail_at(1, item.number); }, [&](Item& item) { fail_at(2, item.number); });
      };
      CHECK_THROWS_WITH(all(), "at 40");
    }
}

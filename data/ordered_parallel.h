// SPDX-License-Identifier: Apache-2.0
// Work on a stream of items by several threads, with the results in the stream's order.
#pragma once

#include <condition_variable>
#include <cstdint>
#include <exception>
#include <map>
#include <mutex>
#include <thread>
#include <utility>
#include <vector>

namespace flashlm {

/// For each item, in order: `bool produce(Item&)` makes it or says that there are no more, one call at a
/// time; `transform(Item&, worker)` works on it, at once for as many items as there are threads, `worker`
/// being the thread's number; `consume(Item&)` is called on the calling thread. At most 2 * threads + 12
/// items are in memory. The first exception of the three ends the work and is thrown again here.
template <typename Item, typename Produce, typename Transform, typename Consume>
void ordered_parallel(int threads, Produce&& produce, Transform&& transform, Consume&& consume) {
  std::mutex turn;   // to produce
  std::mutex mutex;  // of everything below
  std::condition_variable changed;
  std::uint64_t produced = 0;
  std::uint64_t consumed = 0;
  std::map<std::uint64_t, Item> done;  // transformed, and not yet consumed
  bool exhausted = false;
  bool stopped = false;
  std::exception_ptr failure;
  const auto limit = static_cast<std::uint64_t>(2 * threads + 12);

  const auto stop = [&](std::exception_ptr why) {
    const std::lock_guard lock(mutex);
    if (!failure) failure = std::move(why);
    stopped = true;
    changed.notify_all();
  };
  // Items are made by whichever worker is free, so that no thread of its own waits for its turn to read.
  const auto next = [&](Item& item, std::uint64_t& number) {
    const std::lock_guard in_turn(turn);
    {
      std::unique_lock lock(mutex);
      changed.wait(lock, [&] { return stopped || exhausted || produced - consumed < limit; });
      if (stopped || exhausted) return false;
    }
    const bool more = produce(item);
    const std::lock_guard lock(mutex);
    number = produced;
    if (more)
      ++produced;
    else
      exhausted = true;
    changed.notify_all();
    return more;
  };
  const auto work = [&](int worker) {
    try {
      std::uint64_t number;
      for (Item item; next(item, number); item = Item()) {
        transform(item, worker);
        const std::lock_guard lock(mutex);
        done.emplace(number, std::move(item));
        changed.notify_all();
      }
    } catch (...) {
      stop(std::current_exception());
    }
  };

  {
    std::vector<std::jthread> workers;  // joined at the end of this block
    try {
      for (int worker = 0; worker < threads; ++worker) workers.emplace_back(work, worker);
      while (true) {
        Item item;
        {
          std::unique_lock lock(mutex);
          changed.wait(lock, [&] {
            return stopped || done.contains(consumed) || (exhausted && produced == consumed);
          });
          if (stopped || !done.contains(consumed)) break;
          item = std::move(done.extract(consumed).mapped());
        }
        consume(item);
        const std::lock_guard lock(mutex);
        ++consumed;
        changed.notify_all();
      }
    } catch (...) {
      stop(std::current_exception());
    }
  }
  if (failure) std::rethrow_exception(failure);
}

}  // namespace flashlm

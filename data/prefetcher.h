// SPDX-License-Identifier: Apache-2.0
// The next batch is made while the current one is trained on.
#pragma once

#include <condition_variable>
#include <cstdint>
#include <exception>
#include <mutex>
#include <span>
#include <string>
#include <thread>
#include <vector>

#include "data/sampler.h"

namespace flashlm {

/// Hands out exactly the batches of a BatchSampler. A thread of its own makes one ahead where asked to. For
/// one caller at a time.
class Prefetcher {
 public:
  explicit Prefetcher(BatchSampler sampler);
  ~Prefetcher();
  Prefetcher(const Prefetcher&) = delete;
  Prefetcher& operator=(const Prefetcher&) = delete;

  /// As BatchSampler::next. What was made ahead is used if it has this shape, and else made again: it is as
  /// if it had never been. An exception from the making of it comes out here.
  std::int64_t next(std::int64_t batch, std::int64_t seq, std::span<std::int64_t> inputs,
                    std::span<std::int64_t> targets);
  /// Begins to make the batch that next() will be asked for, if the guess of its shape is right. Does not
  /// wait.
  void prefetch(std::int64_t batch, std::int64_t seq);

  /// Of what was handed out: batches made ahead leave no trace.
  std::string state() const { return sampler_.state(); }
  void set_state(const std::string& state);

 private:
  /// The thread's while kWanted, else the caller's.
  struct Ahead {
    BatchSampler sampler;  // stands before the batch, then after it
    std::int64_t batch = 0, seq = 0;
    std::vector<std::int64_t> inputs = {}, targets = {};
    std::int64_t count = 0;
    std::exception_ptr failed = nullptr;
  };
  enum class Work { kNone, kWanted, kDone, kEnd };

  void run();
  /// Waits for the thread to be done with what it was asked for, and tells whether that was anything.
  bool finished();
  void tell(Work work);

  BatchSampler sampler_;  // stands after what was handed out
  Ahead ahead_;
  std::mutex mutex_;  // of work_
  std::condition_variable changed_;
  Work work_ = Work::kNone;
  std::thread thread_;  // starts when all else is there
};

}  // namespace flashlm

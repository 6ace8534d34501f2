// SPDX-License-Identifier: Apache-2.0
// The thread never touches the sampler of what was handed out: it works on a copy, which takes that one's
// place when its batch is taken.
#include "data/prefetcher.h"

#include <algorithm>
#include <utility>

namespace flashlm {

Prefetcher::Prefetcher(BatchSampler sampler)
    : sampler_(std::move(sampler)), ahead_{sampler_}, thread_([this] { run(); }) {}

Prefetcher::~Prefetcher() {
  finished();
  tell(Work::kEnd);
  thread_.join();
}

void Prefetcher::run() {
  std::unique_lock lock(mutex_);
  while (true) {
    changed_.wait(lock, [&] { return work_ == Work::kWanted || work_ == Work::kEnd; });
    if (work_ == Work::kEnd) return;
    lock.unlock();
    try {
      const auto size = static_cast<std::size_t>(ahead_.batch * ahead_.seq);
      ahead_.inputs.resize(size);
      ahead_.targets.resize(size);
      ahead_.count = ahead_.sampler.next(ahead_.batch, ahead_.seq, ahead_.inputs, ahead_.targets);
    } catch (...) {
      ahead_.failed = std::current_exception();
    }
    lock.lock();
    work_ = Work::kDone;
    changed_.notify_all();
  }
}

bool Prefetcher::finished() {
  std::unique_lock lock(mutex_);
  changed_.wait(lock, [&] { return work_ != Work::kWanted; });
  return work_ == Work::kDone;
}

void Prefetcher::tell(Work work) {
  const std::lock_guard lock(mutex_);
  work_ = work;
  changed_.notify_all();
}

std::int64_t Prefetcher::next(std::int64_t batch, std::int64_t seq, std::span<std::int64_t> inputs,
                              std::span<std::int64_t> targets) {
  const bool made = finished() && ahead_.batch == batch && ahead_.seq == seq;
  tell(Work::kNone);
  if (!made || inputs.size() != ahead_.inputs.size() || targets.size() != ahead_.targets.size())
    return sampler_.next(batch, seq, inputs, targets);
  if (ahead_.failed) std::rethrow_exception(std::exchange(ahead_.failed, nullptr));
  std::copy(ahead_.inputs.begin(), ahead_.inputs.end(), inputs.begin());
  std::copy(ahead_.targets.begin(), ahead_.targets.end(), targets.begin());
  std::swap(sampler_, ahead_.sampler);
  return ahead_.count;
}

void Prefetcher::prefetch(std::int64_t batch, std::int64_t seq) {
  finished();
  ahead_.sampler = sampler_;
  ahead_.batch = batch;
  ahead_.seq = seq;
  ahead_.failed = nullptr;
  tell(Work::kWanted);
}

void Prefetcher::set_state(const std::string& state) {
  finished();
  sampler_.set_state(state);
  tell(Work::kNone);
}

}  // namespace flashlm

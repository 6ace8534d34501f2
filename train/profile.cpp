// SPDX-License-Identifier: Apache-2.0
#include "train/profile.h"

#include <ATen/SequenceNumber.h>
#include <ATen/record_function.h>

#include <algorithm>
#include <cstdio>
#include <limits>
#include <memory>

namespace flashlm {
namespace {

using Clock = std::chrono::steady_clock;

double seconds_since(Clock::time_point start) {
  return std::chrono::duration<double>(Clock::now() - start).count();
}

struct Started : at::ObserverContext {
  Clock::time_point time = Clock::now();
  uint64_t sequence = at::sequence_number::peek();
};

/// The profile whose step is being taken: callbacks are plain functions, and find it here.
thread_local Profile* current = nullptr;

/// What a gradient is added to when it is a parameter's own.
constexpr const char* kAccumulation = "gradient sums";

}  // namespace

struct Profile::Callbacks {
  static std::unique_ptr<at::ObserverContext> start(const at::RecordFunction&) {
    return std::make_unique<Started>();
  }

  static void end(const at::RecordFunction& function, at::ObserverContext* context) {
    if (current == nullptr) return;
    const auto& started = static_cast<const Started&>(*context);
    const double seconds = seconds_since(started.time);
    if (function.scope() == at::RecordScope::USER_SCOPE) {
      current->part(function.name()).forward += seconds;
      current->scopes_.push_back({function.name(), started.sequence, at::sequence_number::peek()});
      return;
    }
    const auto made = static_cast<uint64_t>(function.seqNr());
    const auto scope = std::find_if(current->scopes_.begin(), current->scopes_.end(),
                                    [&](const Scope& s) { return s.first <= made && made < s.last; });
    if (scope != current->scopes_.end()) {
      current->part(scope->part).backward += seconds;
    } else if (made == std::numeric_limits<uint64_t>::max()) {  // of all AccumulateGrad nodes
      current->part(kAccumulation).backward += seconds;
    }
  }
};

Profile::Profile() {
  handle_ = at::addThreadLocalCallback(
      at::RecordFunctionCallback(Callbacks::start, Callbacks::end)
          .scopes({at::RecordScope::USER_SCOPE, at::RecordScope::BACKWARD_FUNCTION}));
}

Profile::~Profile() { at::removeCallback(handle_); }

Profile::Timer::Timer(Profile* profile, const char* part)
    : profile_(profile), part_(part), start_(Clock::now()) {}

Profile::Timer::~Timer() {
  if (profile_ != nullptr) profile_->part(part_).forward += seconds_since(start_);
}

Profile::Step::Step(Profile* profile) : profile_(profile), start_(Clock::now()) { current = profile; }

Profile::Step::~Step() {
  current = nullptr;
  if (profile_ == nullptr) return;
  profile_->seconds_ += seconds_since(start_);
  ++profile_->steps_;
  profile_->scopes_.clear();
}

Profile::Part& Profile::part(const std::string& name) {
  const auto found =
      std::find_if(parts_.begin(), parts_.end(), [&](const Part& p) { return p.name == name; });
  if (found != parts_.end()) return *found;
  parts_.push_back({name});
  return parts_.back();
}

std::string Profile::report() const {
  if (steps_ == 0) return "profile   no steps";
  char line[120];
  std::snprintf(line, sizeof line, "%-14s %12s %12s %8s", "ms per step", "forward", "backward", "share");
  std::string text = line;
  double accounted = 0;
  const auto row = [&](const std::string& name, double forward, double backward) {
    const double to_ms = 1000 / static_cast<double>(steps_);
    std::snprintf(line, sizeof line, "\n%-14s %12.3f %12.3f %7.1f%%", name.c_str(), forward * to_ms,
                  backward * to_ms, 100 * (forward + backward) / seconds_);
    text += line;
    accounted += forward + backward;
  };
  for (const Part& p : parts_) row(p.name, p.forward, p.backward);
  row("other", seconds_ - accounted, 0);
  row("step", seconds_, 0);
  return text;
}

}  // namespace flashlm

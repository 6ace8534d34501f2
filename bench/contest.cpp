// SPDX-License-Identifier: Apache-2.0
#include "bench/contest.h"

#include <algorithm>
#include <chrono>
#include <cmath>
#include <limits>
#include <memory>

namespace flashlm::bench {
namespace {

using Clock = std::chrono::steady_clock;

double seconds_since(Clock::time_point start) {
  return std::chrono::duration<double>(Clock::now() - start).count();
}

/// Seconds of one call, averaged over `calls`; the call before them finds the caches as a peer left them.
double sample(const Contestant& contestant, int64_t calls) {
  contestant.before();
  contestant.run();
  const auto start = Clock::now();
  for (int64_t i = 0; i < calls; ++i) contestant.run();
  const double seconds = seconds_since(start) / static_cast<double>(calls);
  contestant.after();
  return seconds;
}

double relative_difference(const at::Tensor& got, const at::Tensor& want) {
  if (!got.defined() || !want.defined()) return std::numeric_limits<double>::quiet_NaN();
  const at::Tensor exact = want.to(at::kDouble);
  return ((got.to(at::kDouble) - exact).norm() / exact.norm()).item<double>();
}

double median(std::vector<double> values) {
  const auto middle = values.begin() + static_cast<int64_t>(values.size() / 2);
  std::nth_element(values.begin(), middle, values.end());
  return *middle;
}

}  // namespace

std::vector<Timing> measure(const Contest& contest, double seconds) {
  constexpr double kSampleSeconds = 1e-3;
  constexpr size_t kRounds = 3;
  const c10::InferenceMode inference(!contest.backward);
  std::vector<Timing> timings;
  at::Tensor expected;
  for (const Contestant& contestant : contest.contestants) {
    contestant.before();
    const at::Tensor result = contestant.run();  // the first call also warms caches and makes plans
    contestant.after();
    if (timings.empty()) expected = result;
    const double difference = relative_difference(result, expected);
    TORCH_CHECK(std::isnan(difference) || difference <= contest.tolerance, "the results of ", contestant.name,
                " and ", contest.contestants[0].name, " differ by ", difference,
                " of their norm: they do not do the same work");
    int64_t calls = 1;
    if (seconds > 0) {
      const double once = std::min({sample(contestant, 1), sample(contestant, 1), sample(contestant, 1)});
      calls = static_cast<int64_t>(std::clamp(std::ceil(kSampleSeconds / once), 1.0, 1e5));
    }
    timings.push_back({contestant.name, 0, 0, 0, calls, difference});
  }
  std::vector<std::vector<double>> samples(timings.size());
  const auto start = Clock::now();
  do {
    for (size_t i = 0; i < timings.size(); ++i) {
      samples[i].push_back(sample(contest.contestants[i], timings[i].calls));
    }
  } while (seconds > 0 && (seconds_since(start) < seconds || samples[0].size() < kRounds));
  for (size_t i = 0; i < timings.size(); ++i) {
    timings[i].min_s = *std::min_element(samples[i].begin(), samples[i].end());
    timings[i].median_s = median(samples[i]);
    timings[i].samples = static_cast<int64_t>(samples[i].size());
  }
  return timings;
}

}  // namespace flashlm::bench

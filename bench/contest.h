// SPDX-License-Identifier: Apache-2.0
// Contestants that do the same work, timed in turn.
#pragma once

#include <torch/torch.h>

#include <functional>
#include <stdexcept>
#include <string>
#include <vector>

namespace flashlm::bench {

struct Contestant {
  std::string name;
  /// One call. What it returns is compared with what the first contestant returns; an undefined tensor is
  /// not.
  std::function<at::Tensor()> run;
  /// Around each sample, untimed: for contestants with threads of their own.
  std::function<void()> before = [] {};
  std::function<void()> after = [] {};
};

/// What is measured against what. FlashLM comes first.
struct Contest {
  double work = 0;        // in one call: multiply-adds, or bytes that must be moved at least
  std::string unit;       // "GMAC/s" or "GB/s"
  std::string peak;       // the kind of ceiling, see Peak::kind
  double bytes = 0;       // the working set, for peak "read"
  bool backward = false;  // autograd is needed; without it everything runs in inference mode
  double tolerance =
      0.05;  // of the contestants' results, relative, in the 2-norm: above bfloat16's and int8's
  std::vector<Contestant> contestants;
  std::vector<std::string> notes;  // what is missing and why; what is not quite the same work
};

/// Thrown while a contest is made that this build or machine cannot hold; what() says why.
struct Skip : std::runtime_error {
  using std::runtime_error::runtime_error;
};

/// A contest that costs nothing until it is made.
struct Case {
  std::string group;  // one table; its cases have the same contestants
  std::string name;
  std::function<Contest()> make;
  bool single_thread = false;  // a kernel without threads: measured on one only
};

struct Timing {
  std::string contestant;
  double min_s, median_s;  // wall time of a call, over samples
  int64_t samples, calls;  // how many samples, of how many calls each
  double difference;       // from the first contestant's result, relative; NaN if not compared
};

/// Wall times. Samples are interleaved (A, B, C, A, B, C, ...), so that a change of clock or load meets all
/// contestants alike, and last a millisecond or one call, whichever is longer, after one call that is not
/// counted, so that none pays for the caches that another has filled. They go on for about `seconds`, but for
/// three rounds at least; with 0 there is one round of single calls. Throws if results disagree.
std::vector<Timing> measure(const Contest& contest, double seconds);

}  // namespace flashlm::bench

// SPDX-License-Identifier: Apache-2.0
// What a run of bench_ops found, as JSON and as tables.
#pragma once

#include <map>
#include <string>
#include <vector>

#include "bench/contest.h"
#include "bench/peaks.h"

namespace flashlm::bench {

struct Machine {
  std::string cpu;
  int64_t processors;
  double load;  // average of the last minute, when the run began: at 0 the machine was ours
  std::string isa, torch, ggml, commit, date, command;
  std::map<std::string, std::string> environment;  // what is set of the variables that choose instructions
};

/// One case on one number of threads: with timings, or skipped for a reason, which may be that it failed.
struct Result {
  std::string group, name;
  int threads;
  std::string skipped;
  bool failed = false;
  std::string unit;
  double work;
  std::vector<Timing> timings;
  std::string peak_name;  // empty if there is no measured ceiling
  double peak_value;
  std::vector<std::string> notes;

  double rate(const Timing& timing) const { return work / timing.min_s * 1e-9; }
  double percent_of_peak() const { return 100 * rate(timings[0]) / peak_value; }
};

struct Report {
  Machine machine;
  double seconds;  // per case
  std::string filter;
  std::map<int, std::vector<Peak>> peaks;  // by threads
  std::vector<Result> results;
};

/// One line for a person who waits.
std::string summary(const Result& result);

std::string to_json(const Report& report);
std::string to_markdown(const Report& report);

}  // namespace flashlm::bench

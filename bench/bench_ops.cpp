// SPDX-License-Identifier: Apache-2.0
// bench_ops: the speed of every operator beside that of its peers and of the machine. tools/bench builds and
// runs it. Exit codes: 0 done, 1 a mistake or a failure, in one line on stderr.
#include <ATen/Parallel.h>
#include <unistd.h>

#include <CLI/CLI.hpp>
#include <algorithm>
#include <chrono>
#include <cstdlib>
#include <ctime>
#include <filesystem>
#include <fstream>
#include <iostream>
#include <optional>
#include <regex>
#include <thread>

#include "bench/cases.h"
#include "bench/report.h"
#include "ops/kernels/kernels.h"

namespace flashlm::bench {
namespace {

struct Options {
  std::string out, filter, ggml, commit;
  std::vector<int> threads = {1};
  double seconds = 1;
  bool list = false;
};

/// LibTorch appends a backtrace to its messages.
std::string first_line(const std::string& text) { return text.substr(0, text.find('\n')); }

std::string cpu_name() {
  std::ifstream info("/proc/cpuinfo");
  for (std::string line; std::getline(info, line);) {
    if (line.rfind("model name", 0) == 0) return line.substr(line.find(':') + 2);
  }
  return "unknown CPU";
}

/// As one would type it.
std::string quoted(const std::string& argument) {
  const bool plain =
      argument.find_first_not_of("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_.:/=,-") ==
      argument.npos;
  return plain && !argument.empty() ? argument : "'" + argument + "'";
}

Machine describe_machine(const Options& options, const Ggml* ggml, const std::string& command) {
  Machine machine;
  machine.cpu = cpu_name();
  machine.processors = std::thread::hardware_concurrency();
  machine.load = 0;
  getloadavg(&machine.load, 1);
  machine.isa = kernels::isa();
  machine.torch = TORCH_VERSION;
  machine.ggml = ggml != nullptr ? ggml->description() : "";
  machine.commit = options.commit;
  const std::time_t now = std::time(nullptr);
  char date[32];
  std::strftime(date, sizeof date, "%Y-%m-%d %H:%M UTC", std::gmtime(&now));
  machine.date = date;
  machine.command = command;
  for (const char* name : {"FLASHLM_ISA", "ATEN_CPU_CAPABILITY", "MKL_ENABLE_INSTRUCTIONS",
                           "DNNL_MAX_CPU_ISA", "ONEDNN_MAX_CPU_ISA", "OMP_WAIT_POLICY"}) {
    if (const char* value = std::getenv(name)) machine.environment[name] = value;
  }
  return machine;
}

Result run_case(const Case& the_case, int threads, double seconds, const std::vector<Peak>& peaks) {
  Result result;
  result.group = the_case.group;
  result.name = the_case.name;
  result.threads = threads;
  torch::manual_seed(0);
  try {
    const Contest contest = the_case.make();
    result.unit = contest.unit;
    result.work = contest.work;
    result.notes = contest.notes;
    result.timings = measure(contest, seconds);
    const Peak* peak = contest.peak == "read" ? read_peak(peaks, contest.bytes)
                                              : compute_peak(peaks, contest.peak, kernels::isa());
    if (peak != nullptr) {
      result.peak_name = peak->name;
      result.peak_value = peak->value;
    }
  } catch (const Skip& skip) {
    result.skipped = skip.what();
  } catch (const std::exception& error) {  // the minutes that others took must not be lost
    result.skipped = "failed: " + first_line(error.what());
    result.failed = true;
  }
  return result;
}

void write_file(const std::filesystem::path& path, const std::string& text) {
  std::ofstream file(path, std::ios::binary);
  file << text;
  if (!file.flush()) throw std::runtime_error("cannot write " + path.string());
}

void run(const Options& options, const std::string& command) {
  const std::regex filter(options.filter);
  std::optional<Ggml> ggml;
  if (!options.ggml.empty()) ggml.emplace(options.ggml);
  const Ggml* peer = ggml ? &*ggml : nullptr;
  const auto selected = [&](int threads) {
    std::vector<Case> kept;
    for (const Case& c : cases(peer, threads)) {
      if (std::regex_search(c.group + "  " + c.name, filter) && (threads == 1 || !c.single_thread))
        kept.push_back(c);
    }
    return kept;
  };
  if (options.list) {
    for (const Case& c : selected(1)) std::cout << c.group << "  " << c.name << "\n";
    return;
  }
  if (selected(1).empty()) {
    throw std::runtime_error("--filter '" + options.filter + "' matches no case; --list shows them all");
  }
  // Before the minutes of measuring, so that a folder that cannot be is noticed first.
  if (!options.out.empty()) std::filesystem::create_directories(options.out);
  Report report;
  report.machine = describe_machine(options, peer, command);
  report.seconds = options.seconds;
  report.filter = options.filter;
  for (const int threads : options.threads) {
    at::set_num_threads(threads);
    report.peaks[threads] = measure_peaks(threads, 2 * options.seconds);
    for (const Case& c : selected(threads)) {
      report.results.push_back(run_case(c, threads, options.seconds, report.peaks[threads]));
      std::cerr << summary(report.results.back()) << std::endl;
    }
  }
  std::cout << to_markdown(report);
  if (!options.out.empty()) {
    const std::filesystem::path folder = options.out;
    write_file(folder / "bench.json", to_json(report));
    write_file(folder / "bench.md", to_markdown(report));
  }
  const auto failures =
      std::count_if(report.results.begin(), report.results.end(), [](const Result& r) { return r.failed; });
  if (failures != 0) throw std::runtime_error(std::to_string(failures) + " of the cases failed; see above");
}

}  // namespace
}  // namespace flashlm::bench

int main(int argc, char** argv) {
  flashlm::bench::Options options;
  CLI::App app("The speed of FlashLM's operators beside that of torch, ggml and the machine itself.",
               "bench_ops");
  app.add_option("--out", options.out, "Folder for bench.json and bench.md")->type_name("DIR");
  app.add_option("--filter", options.filter, "Only cases that --list shows with a match for this")
      ->type_name("REGEX");
  app.add_option("--threads", options.threads, "Numbers of threads, each a run of all cases")
      ->delimiter(',')
      ->check(CLI::Range(1, 1024))
      ->capture_default_str();
  app.add_option("--seconds", options.seconds, "Time for each case; 0: one call each, to see that all works")
      ->check(CLI::Range(0.0, 3600.0))
      ->capture_default_str();
  app.add_option("--ggml", options.ggml,
                 "Folder of a build of ggml or llama.cpp with shared libraries, as a peer")
      ->type_name("DIR");
  app.add_option("--commit", options.commit, "Recorded with the results")->type_name("TEXT");
  app.add_flag("--list", options.list, "Show the cases, measure nothing");
  try {
    app.parse(argc, argv);
    std::string command = "bench_ops";
    for (int i = 1; i < argc; ++i) command += " " + flashlm::bench::quoted(argv[i]);
    flashlm::bench::run(options, command);
    return 0;
  } catch (const CLI::CallForHelp& help) {
    return app.exit(help);
  } catch (const CLI::ParseError& error) {
    std::cerr << "bench_ops: " << error.what() << "; see bench_ops --help\n";
  } catch (const std::regex_error& error) {
    std::cerr << "bench_ops: --filter '" << options.filter << "' is not a regular expression\n";
  } catch (const std::exception& error) {
    std::cerr << "bench_ops: " << flashlm::bench::first_line(error.what()) << "\n";
  }
  return 1;
}

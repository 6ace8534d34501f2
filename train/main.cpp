// SPDX-License-Identifier: Apache-2.0
// train_flashlm: trains a model as its flags and TOML file say. Exit codes: 0 finished, 1 a mistake or a
// failure, in one line on stderr; 130 stopped by Ctrl-C (or SIGTERM) after saving.
#include <csignal>
#include <exception>
#include <iostream>

#include "train/trainer.h"

#ifdef __GLIBC__
#include <malloc.h>
#endif

namespace {

volatile std::sig_atomic_t stop_requested = 0;

/// The step in progress is finished and saved; a second signal ends the program at once.
void request_stop(int signal) {
  stop_requested = 1;
  std::signal(signal, SIG_DFL);
}

/// Memory that is freed stays in the process. Otherwise each tensor of more than 32 MB, such as a gradient of
/// the embedding, goes back to the system, and to get it again, page by page, takes ten times as long as to
/// fill it: with v3's table 400 ms of a step.
void keep_freed_memory() {
#ifdef __GLIBC__
  mallopt(M_MMAP_MAX, 0);
  mallopt(M_TRIM_THRESHOLD, -1);
#endif
}

/// The first line of a message: LibTorch appends a backtrace.
std::string first_line(const std::string& text) { return text.substr(0, text.find('\n')); }

}  // namespace

int main(int argc, char** argv) {
  keep_freed_memory();
  int exit_code = 0;
  const auto line = flashlm::parse_command_line(argc, argv, exit_code);
  if (!line) return exit_code;
  std::signal(SIGINT, request_stop);
  std::signal(SIGTERM, request_stop);
  try {
    flashlm::Trainer trainer(*line);
    return trainer.run(stop_requested) ? 0 : 130;
  } catch (const std::exception& error) {
    std::cerr << "\ntrain_flashlm: " << first_line(error.what()) << "\n";
    return 1;
  }
}

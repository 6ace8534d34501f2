// SPDX-License-Identifier: Apache-2.0
// train_flashlm: trains a model as its flags and TOML file say. Exit codes: 0 finished, 1 a mistake or a
// failure, in one line on stderr; 130 stopped by Ctrl-C (or SIGTERM) after saving.
#include <csignal>
#include <exception>
#include <iostream>

#include "train/trainer.h"

namespace {

volatile std::sig_atomic_t stop_requested = 0;

/// The step in progress is finished and saved; a second signal ends the program at once.
void request_stop(int signal) {
  stop_requested = 1;
  std::signal(signal, SIG_DFL);
}

/// The first line of a message: LibTorch appends a backtrace.
std::string first_line(const std::string& text) { return text.substr(0, text.find('\n')); }

}  // namespace

int main(int argc, char** argv) {
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

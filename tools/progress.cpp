// SPDX-License-Identifier: Apache-2.0
#include "tools/progress.h"

#include <unistd.h>

#include <CLI/CLI.hpp>
#include <csignal>
#include <cstdio>

namespace flashlm {
namespace {

volatile std::sig_atomic_t interrupted = 0;

void on_interrupt(int signal) {
  interrupted = 1;
  std::signal(signal, SIG_DFL);
}

}  // namespace

void begin_progress() { std::signal(SIGINT, on_interrupt); }

void end_progress() {
  std::signal(SIGINT, SIG_DFL);
  if (progress_is_live()) std::printf("\r\x1b[K");
}

void stop_if_interrupted() {
  if (interrupted) throw CLI::RuntimeError(130);
}

bool progress_is_live() { return isatty(STDOUT_FILENO) != 0; }

void show_progress(std::string_view stage, double fraction) {
  stop_if_interrupted();
  if (!progress_is_live()) return;
  std::printf("\r\x1b[K%.*s %.0f %%", static_cast<int>(stage.size()), stage.data(), 100 * fraction);
  std::fflush(stdout);
}

}  // namespace flashlm

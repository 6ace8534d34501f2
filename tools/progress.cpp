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
  if (isatty(STDOUT_FILENO)) std::printf("\r\x1b[K");
}

void show_progress(std::string_view stage, double fraction) {
  if (interrupted) throw CLI::RuntimeError(130);
  if (!isatty(STDOUT_FILENO)) return;
  std::printf("\r\x1b[K%.*s %.0f %%", static_cast<int>(stage.size()), stage.data(), 100 * fraction);
  std::fflush(stdout);
}

}  // namespace flashlm

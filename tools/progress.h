// SPDX-License-Identifier: Apache-2.0
// What long-running subcommands show on a terminal, and how Ctrl-C ends them with nothing written.
#pragma once

#include <string_view>

namespace flashlm {

/// From here on, the first Ctrl-C makes the next show_progress() throw, and a second ends the program at
/// once; end_progress() takes the line of progress away and gives Ctrl-C its usual meaning back.
void begin_progress();
void end_progress();

/// Throws CLI::RuntimeError(130) after Ctrl-C.
void stop_if_interrupted();
/// Whether stdout is a terminal, where a line can take the place of the one before.
bool progress_is_live();

/// "stage 42 %" in the place of what was shown before, if stdout is a terminal. Throws CLI::RuntimeError(130)
/// after Ctrl-C.
void show_progress(std::string_view stage, double fraction);

}  // namespace flashlm

// SPDX-License-Identifier: Apache-2.0
// The subcommands of `flashlm`, one source each. add_x declares x's flags and what runs once they are parsed;
// mistakes are thrown as Error, and Ctrl-C in the middle as CLI::RuntimeError(130).
#pragma once

#include <CLI/App.hpp>

namespace flashlm {

void add_classes(CLI::App& flashlm);
void add_convert_head(CLI::App& flashlm);
void add_decode(CLI::App& flashlm);
void add_embeddings(CLI::App& flashlm);
void add_encode(CLI::App& flashlm);
void add_evaluate(CLI::App& flashlm);
void add_export(CLI::App& flashlm);
void add_generate(CLI::App& flashlm);
void add_import_hgrn_bit(CLI::App& flashlm);
void add_pack(CLI::App& flashlm);
void add_prepare(CLI::App& flashlm);

}  // namespace flashlm

// SPDX-License-Identifier: Apache-2.0
// The tokenizer that a command line names.
#pragma once

#include <memory>
#include <string>

#include "data/tokenizer.h"

namespace flashlm {

/// Tokenizer::open(), and a note on standard error where the tokenizer alters text.
std::unique_ptr<Tokenizer> open_tokenizer(const std::string& spec);

}  // namespace flashlm

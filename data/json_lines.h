// SPDX-License-Identifier: Apache-2.0
// One field of each line of a JSON lines file, as documents.
#pragma once

#include <filesystem>
#include <memory>
#include <string>

#include "data/documents.h"

namespace flashlm {

/// Lines are objects (RFC 8259, in UTF-8); the value of their key `field` is a string, or null for an empty
/// document. Blank lines are skipped. Memory does not grow with the length of a line. Errors, with the line's
/// number: not JSON, not UTF-8, no such key, or twice, another type of value, brackets nested 1,000 deep.
std::unique_ptr<DocumentReader> open_json_lines(const std::filesystem::path& file, const std::string& field);

}  // namespace flashlm

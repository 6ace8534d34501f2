// SPDX-License-Identifier: Apache-2.0
// One column of a Parquet file, each row a document. Only built where CMake finds pyarrow
// (FLASHLM_WITH_PARQUET).
#pragma once

#include <filesystem>
#include <memory>
#include <string>

#include "data/documents.h"

namespace flashlm {

/// The column holds byte arrays: text or binary, in any encoding. A null is an empty document. In memory is
/// one page of that column, whatever the size of the row groups. Errors: not Parquet, damaged, no such
/// column, another type.
std::unique_ptr<DocumentReader> open_parquet(const std::filesystem::path& file, const std::string& column);

}  // namespace flashlm

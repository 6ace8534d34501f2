// SPDX-License-Identifier: Apache-2.0
// All documents of a file, held against what data/documents.h promises of its pieces.
#pragma once

#include <catch2/catch.hpp>
#include <string>
#include <vector>

#include "data/documents.h"

namespace flashlm {

inline std::vector<std::string> read_documents(const std::filesystem::path& file,
                                               const DocumentOptions& options = {}) {
  std::vector<std::string> documents;
  const auto reader = open_documents(file, options);
  bool inside = false;
  std::uint64_t bytes_read = 0;
  while (const auto piece = reader->next()) {
    if (!inside) documents.emplace_back();
    const bool fits = piece->text.size() <= kPieceBytes;
    const bool empty_only_alone = !piece->text.empty() || (!inside && piece->last);
    if (!fits || !empty_only_alone || reader->bytes_read() < bytes_read)
      FAIL("a piece of " << piece->text.size() << " bytes in document " << documents.size());
    bytes_read = reader->bytes_read();
    documents.back() += piece->text;
    inside = !piece->last;
  }
  CHECK_FALSE(inside);
  CHECK_FALSE(reader->next());
  CHECK(reader->bytes_read() == std::filesystem::file_size(file));
  return documents;
}

}  // namespace flashlm

// SPDX-License-Identifier: Apache-2.0
// The bytes of a file that may be compressed, from its start to its end, in little memory.
#pragma once

#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <memory>
#include <span>

namespace flashlm {

class ByteStream {
 public:
  virtual ~ByteStream() = default;
  /// Fills `buffer` and returns its size; returns less only at the end. Errors: see open_bytes.
  virtual std::size_t read(std::span<char> buffer) = 0;
  /// Bytes of the file as it lies on disk that have been read so far.
  virtual std::uint64_t bytes_read() const = 0;
};

/// Decompresses what is named .gz (any number of gzip members, one after the other) or .zst (any number of
/// Zstandard frames), and leaves other files as they are. Errors, on opening or while reading: missing,
/// unreadable, not of the kind its name says, damaged, truncated, something else behind the compressed data,
/// a Zstandard window above 128 MiB.
std::unique_ptr<ByteStream> open_bytes(const std::filesystem::path& path);

}  // namespace flashlm

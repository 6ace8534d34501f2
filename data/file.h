// SPDX-License-Identifier: Apache-2.0
// Files as the project reads and writes them: mapped into memory, or in parts, for reading; written under a
// temporary name and renamed when complete, so that a file either has its whole content or is not there.
#pragma once

#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <functional>
#include <memory>
#include <span>
#include <string>
#include <string_view>
#include <vector>

namespace flashlm {

/// Throws the Error "cannot read PATH: WHY".
[[noreturn]] void fail_reading(const std::filesystem::path& path, const std::string& why);

/// A file read from its start to its end. Mapped pages would count as the process's memory; these do not.
/// Errors: missing, unreadable, not a regular file.
class InputFile {
 public:
  explicit InputFile(std::filesystem::path path);
  ~InputFile();
  InputFile(const InputFile&) = delete;
  InputFile& operator=(const InputFile&) = delete;

  /// Fills `buffer` and returns its size; returns less only at the end of the file.
  std::size_t read(std::span<std::byte> buffer);
  std::uint64_t size() const { return size_; }
  const std::filesystem::path& path() const { return path_; }
  int descriptor() const { return descriptor_; }

 private:
  std::filesystem::path path_;
  int descriptor_;
  std::uint64_t size_ = 0;
};

/// A file's bytes, read-only, for as long as the object lives. Errors: missing, unreadable, not a regular
/// file.
class MappedFile {
 public:
  explicit MappedFile(const std::filesystem::path& path);
  ~MappedFile();
  MappedFile(MappedFile&& other) noexcept;
  MappedFile& operator=(MappedFile&& other) noexcept;

  std::span<const std::byte> bytes() const { return bytes_; }
  std::string_view text() const { return {reinterpret_cast<const char*>(bytes_.data()), bytes_.size()}; }

  /// Calls `use` with the bytes from `offset` on, in pieces, and release() after each.
  void for_each_piece(std::size_t offset, const std::function<void(std::span<const std::byte>)>& use) const;
  /// What was read no longer counts as memory of the process; bytes() stay as they are. So a file of any size
  /// can be looked through.
  void release() const;

 private:
  std::span<const std::byte> bytes_;
};

/// Writes `<path>.tmp-<process id>`; commit() makes it durable and renames it to `path`, replacing what was
/// there. Without commit() the destructor removes the temporary and `path` is untouched. Every failure is an
/// Error.
class AtomicFile {
 public:
  explicit AtomicFile(std::filesystem::path path);
  /// The same with a temporary of this name, which may be there: its first `size` bytes are kept, and writing
  /// goes on behind them. After save() or with a `size` above 0 the destructor leaves it, until discard().
  /// Error: it has fewer bytes.
  AtomicFile(std::filesystem::path path, std::filesystem::path temporary, std::uint64_t size);
  ~AtomicFile();
  AtomicFile(const AtomicFile&) = delete;
  AtomicFile& operator=(const AtomicFile&) = delete;

  void write(std::span<const std::byte> bytes);
  void write(std::string_view text);
  /// The next write goes to this offset (bytes from the start), for example to complete a header.
  void seek(std::uint64_t offset);
  /// Hands what was written to the system: readers of the temporary find it.
  void flush();
  /// Makes it durable.
  void save();
  void discard() { keep_ = false; }
  void commit();

 private:
  [[noreturn]] void fail(int error_number) const;

  std::filesystem::path path_;
  std::filesystem::path temporary_;
  std::vector<std::byte> buffer_;
  int descriptor_ = -1;
  bool keep_ = false;
};

/// While the object lives, no other process can have one for the same folder. Error: another has.
class FolderLock {
 public:
  explicit FolderLock(const std::filesystem::path& folder);
  ~FolderLock();
  FolderLock(const FolderLock&) = delete;
  FolderLock& operator=(const FolderLock&) = delete;

 private:
  int descriptor_;
};

void write_file(const std::filesystem::path& path, std::string_view content);
std::string read_file(const std::filesystem::path& path);

/// XXH3, 64 bits, seed 0.
std::uint64_t checksum(std::span<const std::byte> bytes);
std::uint64_t checksum(std::string_view text);

/// The same sum over bytes that arrive in parts.
class Checksum {
 public:
  Checksum();
  ~Checksum();
  Checksum(Checksum&&) noexcept;
  Checksum& operator=(Checksum&&) noexcept;

  void update(std::span<const std::byte> bytes);
  std::uint64_t digest() const;

 private:
  struct State;
  std::unique_ptr<State> state_;
};

}  // namespace flashlm

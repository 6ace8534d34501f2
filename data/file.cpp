// SPDX-License-Identifier: Apache-2.0
// POSIX read, mmap, fsync and rename behind data/file.h. Each system call that can fail ends in an Error that
// names the file.
#include "data/file.h"

#include <fcntl.h>
#include <sys/file.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <system_error>
#include <utility>

#include "data/error.h"

#define XXH_INLINE_ALL
#include <xxhash.h>

namespace flashlm {
namespace {

constexpr std::size_t kBufferBytes = 1 << 18;

std::string reason(int error_number) { return std::generic_category().message(error_number); }

/// Closes the descriptor at the end of a scope.
struct Descriptor {
  int value;
  ~Descriptor() {
    if (value >= 0) ::close(value);
  }
};

std::span<const std::byte> as_bytes(std::string_view text) {
  return std::as_bytes(std::span(text.data(), text.size()));
}

}  // namespace

void fail_reading(const std::filesystem::path& path, const std::string& why) {
  throw Error("cannot read " + path.string() + ": " + why);
}

// O_NONBLOCK: opening a named pipe must not wait for a writer. It has no effect on regular files.
InputFile::InputFile(std::filesystem::path path)
    : path_(std::move(path)), descriptor_(::open(path_.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK)) {
  if (descriptor_ < 0) fail_reading(path_, reason(errno));
  Descriptor closed_on_error{descriptor_};
  struct stat status;
  if (::fstat(descriptor_, &status) != 0) fail_reading(path_, reason(errno));
  if (S_ISDIR(status.st_mode)) fail_reading(path_, "it is a folder, and a file is needed");
  if (!S_ISREG(status.st_mode)) fail_reading(path_, "it is not a regular file");
  size_ = static_cast<std::uint64_t>(status.st_size);
  closed_on_error.value = -1;
}

InputFile::~InputFile() { ::close(descriptor_); }

std::size_t InputFile::read(std::span<std::byte> buffer) {
  std::size_t filled = 0;
  while (filled < buffer.size()) {
    const ssize_t count = ::read(descriptor_, buffer.data() + filled, buffer.size() - filled);
    if (count < 0 && errno == EINTR) continue;
    if (count < 0) fail_reading(path_, reason(errno));
    if (count == 0) break;
    filled += static_cast<std::size_t>(count);
  }
  return filled;
}

MappedFile::MappedFile(const std::filesystem::path& path) {
  const InputFile file(path);
  if (file.size() == 0) return;  // mmap refuses a length of zero
  void* address = ::mmap(nullptr, file.size(), PROT_READ, MAP_PRIVATE, file.descriptor(), 0);
  if (address == MAP_FAILED) fail_reading(path, reason(errno));
  bytes_ = {static_cast<const std::byte*>(address), file.size()};
}

MappedFile::~MappedFile() {
  if (!bytes_.empty()) ::munmap(const_cast<std::byte*>(bytes_.data()), bytes_.size());
}

MappedFile::MappedFile(MappedFile&& other) noexcept : bytes_(std::exchange(other.bytes_, {})) {}

MappedFile& MappedFile::operator=(MappedFile&& other) noexcept {
  std::swap(bytes_, other.bytes_);
  return *this;
}

void MappedFile::for_each_piece(std::size_t offset,
                                const std::function<void(std::span<const std::byte>)>& use) const {
  constexpr std::size_t kPieceBytes = 1 << 24;
  for (std::span<const std::byte> rest = bytes_.subspan(offset); !rest.empty();) {
    const std::size_t size = std::min(rest.size(), kPieceBytes);
    use(rest.first(size));
    release();
    rest = rest.subspan(size);
  }
}

void MappedFile::release() const {
  if (!bytes_.empty()) ::madvise(const_cast<std::byte*>(bytes_.data()), bytes_.size(), MADV_DONTNEED);
}

AtomicFile::AtomicFile(std::filesystem::path path)
    : AtomicFile(path, path.string() + ".tmp-" + std::to_string(::getpid()), 0) {}

AtomicFile::AtomicFile(std::filesystem::path path, std::filesystem::path temporary, std::uint64_t size)
    : path_(std::move(path)), temporary_(std::move(temporary)), keep_(size > 0) {
  if (std::error_code ignored; std::filesystem::is_directory(path_, ignored)) fail(EISDIR);
  buffer_.reserve(kBufferBytes);
  Descriptor file{
      ::open(temporary_.c_str(), O_WRONLY | O_CREAT | O_CLOEXEC | (size == 0 ? O_TRUNC : 0), 0666)};
  struct stat status;
  if (file.value < 0 || ::fstat(file.value, &status) != 0) fail(errno);
  if (static_cast<std::uint64_t>(status.st_size) < size)
    throw Error(temporary_.string() + " has " + std::to_string(status.st_size) + " bytes, and " +
                std::to_string(size) + " are needed to go on; remove it");
  if (size > 0 && (::ftruncate(file.value, static_cast<off_t>(size)) != 0 ||
                   ::lseek(file.value, static_cast<off_t>(size), SEEK_SET) < 0))
    fail(errno);
  descriptor_ = std::exchange(file.value, -1);
}

AtomicFile::~AtomicFile() {
  if (descriptor_ < 0) return;
  ::close(descriptor_);
  if (!keep_) ::unlink(temporary_.c_str());
}

void AtomicFile::fail(int error_number) const {
  std::string message = "cannot write " + path_.string() + ": " + reason(error_number);
  if (error_number == ENOSPC || error_number == EDQUOT || error_number == EFBIG)
    message += "; free space there or choose another --out";
  throw Error(message);
}

void AtomicFile::flush() {
  for (std::span<const std::byte> rest(buffer_); !rest.empty();) {
    const ssize_t written = ::write(descriptor_, rest.data(), rest.size());
    if (written < 0 && errno == EINTR) continue;
    if (written < 0) fail(errno);
    rest = rest.subspan(static_cast<std::size_t>(written));
  }
  buffer_.clear();
}

void AtomicFile::write(std::span<const std::byte> bytes) {
  while (!bytes.empty()) {
    const std::size_t part = std::min(bytes.size(), kBufferBytes - buffer_.size());
    buffer_.insert(buffer_.end(), bytes.begin(), bytes.begin() + static_cast<std::ptrdiff_t>(part));
    bytes = bytes.subspan(part);
    if (buffer_.size() == kBufferBytes) flush();
  }
}

void AtomicFile::write(std::string_view text) { write(as_bytes(text)); }

void AtomicFile::seek(std::uint64_t offset) {
  flush();
  if (::lseek(descriptor_, static_cast<off_t>(offset), SEEK_SET) < 0) fail(errno);
}

void AtomicFile::save() {
  flush();
  if (::fsync(descriptor_) != 0) fail(errno);
  keep_ = true;
}

void AtomicFile::commit() {
  flush();
  if (::fsync(descriptor_) != 0) fail(errno);
  // Some file systems report a failed write only here. The descriptor is gone in either case.
  const int close_error = ::close(std::exchange(descriptor_, -1)) == 0 ? 0 : errno;
  if (close_error != 0 || ::rename(temporary_.c_str(), path_.c_str()) != 0) {
    const int error_number = close_error != 0 ? close_error : errno;
    ::unlink(temporary_.c_str());
    fail(error_number);
  }
  // The new name is durable once the folder is. File systems that cannot sync a folder say EINVAL.
  const std::filesystem::path folder = path_.has_parent_path() ? path_.parent_path() : ".";
  const Descriptor parent{::open(folder.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC)};
  if (parent.value < 0 || (::fsync(parent.value) != 0 && errno != EINVAL)) fail(errno);
}

FolderLock::FolderLock(const std::filesystem::path& folder)
    : descriptor_(::open(folder.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC)) {
  if (descriptor_ < 0) fail_reading(folder, reason(errno));
  Descriptor closed_on_error{descriptor_};
  // File systems that know no locks are used without.
  if (::flock(descriptor_, LOCK_EX | LOCK_NB) != 0 && errno == EWOULDBLOCK)
    throw Error(folder.string() +
                " is being written by another process; wait for it, or choose another --out");
  closed_on_error.value = -1;
}

FolderLock::~FolderLock() { ::close(descriptor_); }

void write_file(const std::filesystem::path& path, std::string_view content) {
  AtomicFile file(path);
  file.write(content);
  file.commit();
}

std::string read_file(const std::filesystem::path& path) { return std::string(MappedFile(path).text()); }

std::uint64_t checksum(std::span<const std::byte> bytes) { return XXH3_64bits(bytes.data(), bytes.size()); }

std::uint64_t checksum(std::string_view text) { return checksum(as_bytes(text)); }

struct Checksum::State {
  XXH3_state_t xxh3;
};

Checksum::Checksum() : state_(std::make_unique<State>()) { XXH3_64bits_reset(&state_->xxh3); }
Checksum::~Checksum() = default;
Checksum::Checksum(Checksum&&) noexcept = default;
Checksum& Checksum::operator=(Checksum&&) noexcept = default;

void Checksum::update(std::span<const std::byte> bytes) {
  XXH3_64bits_update(&state_->xxh3, bytes.data(), bytes.size());
}

std::uint64_t Checksum::digest() const { return XXH3_64bits_digest(&state_->xxh3); }

}  // namespace flashlm

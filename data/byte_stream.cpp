// SPDX-License-Identifier: Apache-2.0
// zlib and libzstd behind data/byte_stream.h. Both say themselves when a member or frame is over, so that a
// file that ends within one is seen to be truncated.
#include "data/byte_stream.h"

#include <zlib.h>
#include <zstd.h>

#include <algorithm>
#include <new>
#include <string>
#include <vector>

#include "data/file.h"

namespace flashlm {
namespace {

constexpr std::size_t kInputBytes = 1 << 17;

class PlainBytes final : public ByteStream {
 public:
  explicit PlainBytes(const std::filesystem::path& path) : file_(path) {}

  std::size_t read(std::span<char> buffer) override {
    const std::size_t count = file_.read(std::as_writable_bytes(buffer));
    bytes_read_ += count;
    return count;
  }
  std::uint64_t bytes_read() const override { return bytes_read_; }

  [[noreturn]] void fail(const std::string& why) const { fail_reading(file_.path(), why); }
  [[noreturn]] void fail_truncated() const { fail("it is truncated: the compressed data has no end"); }

 private:
  InputFile file_;
  std::uint64_t bytes_read_ = 0;
};

class GzipBytes final : public ByteStream {
 public:
  explicit GzipBytes(const std::filesystem::path& path) : file_(path), input_(kInputBytes) {
    constexpr int gzip_with_any_window = 16 + MAX_WBITS;
    if (inflateInit2(&stream_, gzip_with_any_window) != Z_OK) throw std::bad_alloc();
  }
  ~GzipBytes() override { inflateEnd(&stream_); }

  std::size_t read(std::span<char> buffer) override {
    std::size_t filled = 0;
    while (filled < buffer.size()) {
      if (stream_.avail_in == 0) {
        stream_.avail_in = static_cast<uInt>(file_.read(input_));
        stream_.next_in = reinterpret_cast<Bytef*>(input_.data());
        if (stream_.avail_in == 0) {
          if (inside_member_) file_.fail_truncated();
          break;
        }
      }
      if (!inside_member_) inflateReset(&stream_);
      const std::size_t part = std::min<std::size_t>(buffer.size() - filled, 1 << 30);
      stream_.next_out = reinterpret_cast<Bytef*>(buffer.data() + filled);
      stream_.avail_out = static_cast<uInt>(part);
      const int result = inflate(&stream_, Z_NO_FLUSH);
      if (result != Z_OK && result != Z_STREAM_END)
        file_.fail(std::string("it is not gzip data, or damaged: ") +
                   (stream_.msg != nullptr ? stream_.msg : zError(result)));
      inside_member_ = result != Z_STREAM_END;
      filled += part - stream_.avail_out;
    }
    return filled;
  }
  std::uint64_t bytes_read() const override { return file_.bytes_read(); }

 private:
  PlainBytes file_;
  std::vector<char> input_;
  z_stream stream_{};
  bool inside_member_ = true;  // a file of no bytes lacks its first member
};

class ZstdBytes final : public ByteStream {
 public:
  explicit ZstdBytes(const std::filesystem::path& path) : file_(path), buffer_(kInputBytes) {
    if (!context_) throw std::bad_alloc();
  }

  std::size_t read(std::span<char> buffer) override {
    ZSTD_outBuffer output{buffer.data(), buffer.size(), 0};
    while (output.pos < output.size) {
      if (input_.pos == input_.size && !holds_more_) {
        input_ = {buffer_.data(), file_.read(buffer_), 0};
        if (input_.size == 0) {
          if (inside_frame_) file_.fail_truncated();
          break;
        }
      }
      const std::size_t result = ZSTD_decompressStream(context_.get(), &output, &input_);
      if (ZSTD_isError(result))
        file_.fail(std::string("it is not Zstandard data, or damaged: ") + ZSTD_getErrorName(result));
      inside_frame_ = result != 0;
      // A full output may have left something in the context; at the end of a frame nothing is left there.
      holds_more_ = inside_frame_ && output.pos == output.size;
    }
    return output.pos;
  }
  std::uint64_t bytes_read() const override { return file_.bytes_read(); }

 private:
  struct Free {
    void operator()(ZSTD_DCtx* context) const { ZSTD_freeDCtx(context); }
  };

  PlainBytes file_;
  std::vector<char> buffer_;
  std::unique_ptr<ZSTD_DCtx, Free> context_{ZSTD_createDCtx()};
  ZSTD_inBuffer input_{nullptr, 0, 0};
  bool inside_frame_ = true;  // a file of no bytes lacks its first frame
  bool holds_more_ = false;
};

}  // namespace

std::unique_ptr<ByteStream> open_bytes(const std::filesystem::path& path) {
  if (path.extension() == ".gz") return std::make_unique<GzipBytes>(path);
  if (path.extension() == ".zst") return std::make_unique<ZstdBytes>(path);
  return std::make_unique<PlainBytes>(path);
}

}  // namespace flashlm

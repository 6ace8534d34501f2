// SPDX-License-Identifier: Apache-2.0
#include <sys/stat.h>
#include <unistd.h>

#include <catch2/catch.hpp>

#include "data/file.h"
#include "tests/data/support.h"

using Catch::Contains;
using namespace flashlm;

namespace {

std::span<const std::byte> bytes_of(std::string_view text) {
  return std::as_bytes(std::span(text.data(), text.size()));
}

}  // namespace

TEST_CASE("a mapped file shows what was written", "[file]") {
  const Scratch scratch;
  const std::string content("line\n\0\xFF end", 11);
  write_file(scratch / "a", content);
  CHECK(read_file(scratch / "a") == content);

  MappedFile first(scratch / "a");
  const std::byte* address = first.bytes().data();
  MappedFile second = std::move(first);
  CHECK(second.bytes().data() == address);
  CHECK(second.text() == content);

  write_file(scratch / "empty", "");
  CHECK(MappedFile(scratch / "empty").bytes().empty());
  CHECK(read_file(scratch / "empty").empty());
}

TEST_CASE("files that cannot be read are named", "[file]") {
  const Scratch scratch;
  const auto read = [&](const char* name) { return error_of([&] { read_file(scratch / name); }); };
  CHECK_THAT(read("absent"), Contains("absent: No such file"));
  CHECK_THAT(read("."), Contains("it is a folder"));
  REQUIRE(mkfifo((scratch / "pipe").c_str(), 0600) == 0);
  CHECK_THAT(read("pipe"), Contains("not a regular file"));
}

TEST_CASE("a file appears whole or not at all", "[file]") {
  const Scratch scratch;
  const auto path = scratch / "out";
  SECTION("nothing before commit, nothing but the file after it") {
    AtomicFile file(path);
    file.write("abc");
    CHECK_FALSE(std::filesystem::exists(path));
    file.commit();
    CHECK(read_file(path) == "abc");
    CHECK(std::distance(std::filesystem::directory_iterator(scratch.path()), {}) == 1);
  }
  SECTION("abandoned: the old content stays and the temporary goes") {
    write_file(path, "old");
    {
      AtomicFile file(path);
      file.write("new");
    }
    CHECK(read_file(path) == "old");
    CHECK(std::distance(std::filesystem::directory_iterator(scratch.path()), {}) == 1);
  }
  SECTION("larger than the buffer, with a header completed later") {
    std::string content(1'000'003, 'x');
    for (std::size_t i = 0; i < content.size(); ++i) content[i] = static_cast<char>(i * 7919 >> 5);
    AtomicFile file(path);
    file.write("head");
    file.write(bytes_of(std::string_view(content).substr(4, 500'000)));
    file.write(std::string_view(content).substr(500'004));
    file.seek(0);
    file.write(std::string_view(content).substr(0, 4));
    file.commit();
    CHECK(read_file(path) == content);
  }
}

TEST_CASE("a file that cannot be written is an error and leaves nothing", "[file]") {
  const Scratch scratch;
  CHECK_THAT(error_of([&] { write_file(scratch / "absent/out", "x"); }),
             Contains("absent/out: No such file"));
  CHECK_THAT(error_of([&] { write_file(scratch.path(), "x"); }), Contains("Is a directory"));
  CHECK(is_empty(scratch.path()));
}

TEST_CASE("a full disk is one clear line and leaves nothing", "[file]") {
  const Scratch scratch;
  SECTION("no space") {
    // The temporary's name leads to the device on which every write fails with ENOSPC.
    std::filesystem::create_symlink("/dev/full",
                                    (scratch / "out").string() + ".tmp-" + std::to_string(getpid()));
    CHECK(error_of([&] { write_file(scratch / "out", "x"); }) ==
          "cannot write " + (scratch / "out").string() +
              ": No space left on device; free space there or choose another --out");
  }
  SECTION("in the middle of a large write") {
    const FileSizeLimit limit(100'000);
    AtomicFile file(scratch / "out");
    CHECK_THAT(error_of([&] { file.write(std::string(1'000'000, 'x')); }), Contains("choose another --out"));
  }
  SECTION("in the last bytes, written by commit") {
    const FileSizeLimit limit(100'000);
    AtomicFile file(scratch / "out");
    file.write(std::string(100'001, 'x'));
    CHECK_THAT(error_of([&] { file.commit(); }), Contains("choose another --out"));
  }
  CHECK(is_empty(scratch.path()));
}

TEST_CASE("the checksum is XXH3, in one go or in parts", "[file]") {
  CHECK(checksum("") == 0x2d06800538d394c2);
  std::string text;
  for (int i = 0; i < 5000; ++i) text += static_cast<char>(i * i);
  for (const std::size_t cut : {0, 1, 240, 256, 4999}) {
    Checksum parts;
    parts.update(bytes_of(std::string_view(text).substr(0, cut)));
    parts.update(bytes_of(std::string_view(text).substr(cut)));
    CHECK(parts.digest() == checksum(text));
  }
  const std::uint64_t before = checksum(text);
  text[1234] ^= 1;
  CHECK(checksum(text) != before);
}

// SPDX-License-Identifier: Apache-2.0
#include <catch2/catch.hpp>
#include <cstring>
#include <vector>

#include "data/token_shard.h"
#include "tests/data/support.h"

using Catch::Contains;
using namespace flashlm;
namespace fs = std::filesystem;

namespace {

constexpr std::size_t kHeaderBytes = 72;

std::vector<std::int64_t> ids_of(const TokenShard& shard) {
  std::vector<std::int64_t> ids(static_cast<std::size_t>(shard.size()));
  shard.copy(0, ids);
  for (std::size_t i = 0; i < ids.size(); ++i) REQUIRE(shard[static_cast<std::int64_t>(i)] == ids[i]);
  return ids;
}

template <typename T>
std::string raw(std::initializer_list<T> values) {
  return {reinterpret_cast<const char*>(values.begin()), values.size() * sizeof(T)};
}

template <typename T>
void patch(std::string& bytes, std::size_t offset, T value) {
  std::memcpy(bytes.data() + offset, &value, sizeof(value));
}

template <typename T>
T at(const std::string& bytes, std::size_t offset) {
  T value;
  std::memcpy(&value, bytes.data() + offset, sizeof(value));
  return value;
}

/// The bytes of a shard with the ids 0, 300, 7, which are two documents, and a vocabulary of `vocab_size`.
std::string shard_bytes(const Scratch& scratch, std::int64_t vocab_size) {
  TokenShardWriter writer(scratch / "made", vocab_size, 0x1122334455667788);
  writer.append(std::vector<std::int32_t>{0, 300}, 9);
  writer.end_document();
  writer.append(std::vector<std::int32_t>{7}, 2);
  writer.end_document();
  writer.commit();
  return read_file(scratch / "made");
}

std::string open_error(const Scratch& scratch, std::string_view bytes) {
  put_file(scratch / "tried", bytes);
  return error_of([&] { TokenShard::open(scratch / "tried"); });
}

std::string npy(const std::string& dictionary, const std::string& ids, char version = 1) {
  std::string header = version == 1 ? raw<std::uint16_t>({static_cast<std::uint16_t>(dictionary.size())})
                                    : raw<std::uint32_t>({static_cast<std::uint32_t>(dictionary.size())});
  return std::string("\x93NUMPY") + version + '\0' + header + dictionary + ids;
}

}  // namespace

TEST_CASE("a shard gives back ids, counts and its tokenizer", "[token_shard]") {
  const Scratch scratch;
  for (const std::int64_t vocab_size : {301, 65536, 65537, 1'000'000}) {
    const std::string bytes = shard_bytes(scratch, vocab_size);
    CHECK(bytes.size() == kHeaderBytes + 3 * (vocab_size <= 65536 ? 2 : 4) + 2 * 8);
    const TokenShard shard = TokenShard::open(scratch / "made");
    CHECK(ids_of(shard) == std::vector<std::int64_t>{0, 300, 7});
    CHECK(shard.vocab_size() == vocab_size);
    CHECK(shard.fingerprint() == 0x1122334455667788);
    CHECK(shard.text_bytes() == 11);
    REQUIRE(shard.document_count() == 2);
    CHECK(shard.document_end(0) == 2);
    CHECK(shard.document_end(1) == 3);
  }
  TokenShardWriter(scratch / "empty", 5, 0).commit();
  CHECK(TokenShard::open(scratch / "empty").size() == 0);
}

TEST_CASE("the header is laid out as documented", "[token_shard]") {
  const Scratch scratch;
  const std::string bytes = shard_bytes(scratch, 70'000);
  CHECK(bytes.substr(0, 8) == "FLMTOKEN");
  CHECK(at<std::uint32_t>(bytes, 8) == 2);
  CHECK(at<std::uint32_t>(bytes, 12) == 4);
  CHECK(at<std::uint64_t>(bytes, 16) == 70'000);
  CHECK(at<std::uint64_t>(bytes, 24) == 0x1122334455667788);
  CHECK(at<std::uint64_t>(bytes, 32) == 3);
  CHECK(at<std::uint64_t>(bytes, 40) == 11);
  CHECK(at<std::uint64_t>(bytes, 48) == 2);
  CHECK(at<std::uint64_t>(bytes, 56) == checksum(bytes.substr(kHeaderBytes)));
  CHECK(at<std::uint64_t>(bytes, 64) == checksum(bytes.substr(0, 64)));
  CHECK(bytes.substr(kHeaderBytes) == raw<std::uint32_t>({0, 300, 7}) + raw<std::uint64_t>({2, 3}));
}

TEST_CASE("slices and copies keep within the shard", "[token_shard]") {
  const Scratch scratch;
  shard_bytes(scratch, 1000);
  const TokenShard part = TokenShard::open(scratch / "made").slice(1, 2);  // outlives the shard it comes from
  CHECK(ids_of(part) == std::vector<std::int64_t>{300, 7});
  CHECK(ids_of(part.slice(1, 1)) == std::vector<std::int64_t>{7});
  CHECK(part.slice(2, 0).size() == 0);
  CHECK(part.text_bytes() == 0);
  CHECK(part.document_count() == 0);
  std::vector<std::int64_t> two(2);
  CHECK_THROWS_AS(part.copy(1, two), std::out_of_range);
  CHECK_THROWS_AS(part.copy(-1, two), std::out_of_range);
  CHECK_THROWS_AS(part.slice(1, 2), std::out_of_range);
  CHECK_THROWS_AS(part.slice(-1, 1), std::out_of_range);
  CHECK_THROWS_AS(part.slice(3, 0), std::out_of_range);
}

TEST_CASE("one changed bit anywhere is found", "[token_shard]") {
  const Scratch scratch;
  const std::string good = shard_bytes(scratch, 1000);
  CHECK(open_error(scratch, good).empty());
  for (std::size_t i = 0; i < good.size(); ++i) {
    std::string bad = good;
    bad[i] = static_cast<char>(bad[i] ^ (1 << i % 8));
    CHECK_THAT(open_error(scratch, bad),
               Contains("tried: ") && Contains("flashlm prepare INPUT... --out DIR"));
  }
}

TEST_CASE("a shard that is too short or too long is found", "[token_shard]") {
  const Scratch scratch;
  const std::string good = shard_bytes(scratch, 1000);
  for (std::size_t size = 0; size < good.size(); ++size)
    CHECK_FALSE(open_error(scratch, good.substr(0, size)).empty());
  CHECK_THAT(open_error(scratch, good.substr(0, good.size() - 2)),
             Contains("3 ids of 2 bytes and 2 ends") && Contains("20 bytes are there"));
  CHECK_THAT(open_error(scratch, good + "xx"), Contains("truncated or overlong"));
}

TEST_CASE("headers that are whole but wrong are told apart", "[token_shard]") {
  const Scratch scratch;
  std::string bytes = shard_bytes(scratch, 1000);
  const auto error_with = [&](std::size_t offset, auto value) {
    std::string changed = bytes;
    patch(changed, offset, value);
    patch(changed, 64, checksum(changed.substr(0, 64)));
    return open_error(scratch, changed);
  };
  CHECK_THAT(error_with(0, 'X'), Contains("not a token shard"));
  CHECK_THAT(error_with(8, std::uint32_t{1}), Contains("version 1") && Contains("reads version 2"));
  CHECK_THAT(error_with(12, std::uint32_t{3}), Contains("2 or 4"));
  CHECK_THAT(error_with(12, std::uint32_t{0}), Contains("2 or 4"));
  CHECK_THAT(error_with(16, std::uint64_t{300}), Contains("position 1 is 300"));
  CHECK_THAT(error_with(32, std::uint64_t{1} << 63 | 3), Contains("truncated"));
  CHECK_THAT(error_with(48, std::uint64_t{1} << 61 | 2), Contains("truncated"));
  CHECK_THAT(error_with(56, std::uint64_t{1}), Contains("corrupt"));
  const auto error_with_ends = [&](std::uint64_t first, std::uint64_t second) {
    patch(bytes, bytes.size() - 16, first);
    patch(bytes, bytes.size() - 8, second);
    return error_with(56, checksum(bytes.substr(kHeaderBytes)));
  };
  CHECK(error_with_ends(1, 3).empty());
  CHECK_THAT(error_with_ends(3, 3), Contains("do not rise"));
  CHECK_THAT(error_with_ends(0, 3), Contains("do not rise"));
  CHECK_THAT(error_with_ends(1, 2), Contains("does not end"));
  CHECK_THAT(open_error(scratch, "a text file, longer than the header of a shard would be, not a shard"),
             Contains("not a token shard"));
}

TEST_CASE("an unfinished shard leaves nothing, and ids outside the vocabulary are refused", "[token_shard]") {
  const Scratch scratch;
  {
    TokenShardWriter writer(scratch / "s", 10, 0);
    writer.append(std::vector<std::int32_t>{1, 9}, 2);
    CHECK_THAT(error_of([&] { writer.append(std::vector<std::int32_t>{10}, 1); }), Contains("10"));
    CHECK_THAT(error_of([&] { writer.append(std::vector<std::int32_t>{-1}, 1); }), Contains("-1"));
  }
  CHECK(is_empty(scratch.path()));
}

TEST_CASE("documents are all ended, or none is", "[token_shard]") {
  const Scratch scratch;
  TokenShardWriter writer(scratch / "s", 10, 0);
  CHECK_THROWS_AS(writer.end_document(), std::logic_error);
  writer.append(std::vector<std::int32_t>{1}, 1);
  writer.end_document();
  CHECK_THROWS_AS(writer.end_document(), std::logic_error);
  writer.append(std::vector<std::int32_t>{2}, 1);
  CHECK_THROWS_AS(writer.commit(), std::logic_error);
}

TEST_CASE("a shard goes on where another writer had saved it", "[token_shard]") {
  const Scratch scratch;
  const std::vector<std::int32_t> ids = {5, 299, 0, 7, 7, 1, 2, 3};
  // Documents end behind the third and the last id. `at` ids are saved; more may be written, and is lost.
  const auto write = [&](TokenShardWriter& writer, std::size_t from, std::size_t to) {
    for (std::size_t i = from; i < to; ++i) {
      writer.append({&ids[i], 1}, 2);
      if (i == 2 || i == 7) writer.end_document();
    }
  };
  for (const std::int64_t vocab_size : {300, 70'000}) {
    TokenShardWriter unbroken(scratch / "unbroken", vocab_size, 9);
    write(unbroken, 0, ids.size());
    unbroken.commit();
    for (std::size_t at = 0; at <= ids.size(); ++at)
      for (std::size_t lost = 0; at + lost <= ids.size(); ++lost) {
        ShardExtent saved;
        {
          TokenShardWriter writer(scratch / "s", vocab_size, 9);
          write(writer, 0, at);
          saved = writer.save();
          write(writer, at, at + lost);
        }
        CHECK(saved.size == static_cast<std::int64_t>(at));
        CHECK_FALSE(fs::exists(scratch / "s"));
        { TokenShardWriter looked_at(scratch / "s", vocab_size, 9, saved); }  // and left
        if (at == 0) saved = {};
        TokenShardWriter writer(scratch / "s", vocab_size, 9, saved);
        write(writer, at, ids.size());
        writer.commit();
        CHECK(read_file(scratch / "s") == read_file(scratch / "unbroken"));
        fs::remove(scratch / "s");
      }
  }
  CHECK(std::distance(fs::directory_iterator(scratch.path()), {}) == 1);
}

TEST_CASE("a saved shard that is not there, or to be discarded", "[token_shard]") {
  const Scratch scratch;
  const ShardExtent saved{.size = 2, .text_bytes = 5, .documents = 1};
  CHECK_THAT(error_of([&] { TokenShardWriter(scratch / "s", 10, 0, saved); }),
             Contains("s.part has 0 bytes"));
  {
    TokenShardWriter writer(scratch / "s", 10, 0);
    writer.append(std::vector<std::int32_t>{1, 2}, 5);
    writer.end_document();
    writer.save();
    writer.discard();
  }
  CHECK(is_empty(scratch.path()));
}

TEST_CASE("raw token files of other programs", "[token_shard]") {
  const Scratch scratch;
  const std::vector<std::int64_t> expected = {5, 50256, 0};
  const std::string u2 = raw<std::uint16_t>({5, 50256, 0});
  const std::string u4 = raw<std::uint32_t>({5, 50256, 0});
  std::string llmc(1024, '\0');
  patch(llmc, 0, std::int32_t{20240520});
  patch(llmc, 4, std::int32_t{1});
  patch(llmc, 8, std::int32_t{3});
  const auto open = [&](std::string_view bytes, std::int64_t vocab_size = 50257) {
    put_file(scratch / "raw.npy", bytes);
    return TokenShard::open_raw(scratch / "raw.npy", vocab_size);
  };
  const auto error = [&](std::string_view bytes, std::int64_t vocab_size = 50257) {
    return error_of([&] { open(bytes, vocab_size); });
  };
  const auto header = [](const std::string& type, const std::string& shape) {
    return "{'descr': '" + type + "', 'fortran_order': False, 'shape': (" + shape + "), }\n";
  };

  SECTION("read") {
    CHECK(ids_of(open(u2)) == expected);
    CHECK(ids_of(open(npy(header("<u2", "3,"), u2))) == expected);
    CHECK(ids_of(open(npy(header("<u4", "3,"), u4))) == expected);
    CHECK(ids_of(open(npy(header("<i4", "3,") + " ", u4, 2))) == expected);  // an odd offset: unaligned ids
    CHECK(ids_of(open(llmc + u2)) == expected);
    CHECK(open("").size() == 0);
    const TokenShard shard = open(u2);
    CHECK(shard.vocab_size() == 50257);
    CHECK(shard.fingerprint() == 0);
    CHECK(shard.text_bytes() == 0);
    CHECK(open(shard_bytes(scratch, 1000), 1000).text_bytes() == 11);
  }
  SECTION("ids outside the vocabulary: position, value, flag") {
    CHECK(error(u2, 50256) ==
          (scratch / "raw.npy").string() +
              ": the id at position 1 is 50256, outside the vocabulary of 50256 tokens; use "
              "--vocab-size 50257 or more");
    CHECK_THAT(error(npy(header("<i4", "2,"), raw<std::int32_t>({3, -1}))),
               Contains("position 1 is -1") && Contains("negative"));
    CHECK_THAT(error(shard_bytes(scratch, 1000)), Contains("--vocab-size 1000"));
    CHECK_THAT(error(u2, 0), Contains("--vocab-size must be"));
    CHECK_THAT(error(u2, 70'000), Contains("uint16"));
  }
  SECTION("refused") {
    CHECK_THAT(error(u2 + "x"), Contains("odd number"));
    CHECK_THAT(error(npy(header("<u2", "4,"), u2)),
               Contains("4 ids of 2 bytes") && Contains("6 bytes are there"));
    CHECK_THAT(error(npy(header("<i8", "3,"), u4 + u4)), Contains("'<i8'") && Contains("numpy.save"));
    CHECK_THAT(error(npy(header(">u2", "3,"), u2)), Contains("little-endian"));
    CHECK_THAT(error(npy(header("<u2", "3, 1"), u2)), Contains("one dimension"));
    CHECK_THAT(error(npy(header("<u2", ""), u2)), Contains("one dimension"));
    CHECK_THAT(error(npy("{}", u2)), Contains("got ''"));
    CHECK_THAT(error(npy(header("<u2", "3,"), u2).substr(0, 30)), Contains("header is incomplete"));
    CHECK_THAT(error("\x93NUMPY"), Contains("header is incomplete"));
    CHECK_THAT(error(llmc + u2 + u2), Contains("truncated or overlong"));
    CHECK_THAT(error(llmc.substr(0, 1000)), Contains("header is incomplete"));
    patch(llmc, 4, std::int32_t{7});
    CHECK_THAT(error(llmc + u2), Contains("got version 7"));
  }
}

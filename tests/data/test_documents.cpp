// SPDX-License-Identifier: Apache-2.0
#include <zlib.h>
#include <zstd.h>

#include <catch2/catch.hpp>
#include <nlohmann/json.hpp>
#include <optional>
#include <random>
#include <span>
#include <vector>

#include "data/byte_stream.h"
#include "data/documents.h"
#include "tests/data/read_documents.h"
#include "tests/data/support.h"

using Catch::Contains;
using namespace flashlm;

namespace {

namespace fs = std::filesystem;

constexpr std::size_t kJsonWindowBytes = 1 << 18;  // data/json_lines.cpp reads so much at a time

std::string gzip(std::string_view text) {
  z_stream stream{};
  deflateInit2(&stream, Z_DEFAULT_COMPRESSION, Z_DEFLATED, 16 + MAX_WBITS, 8, Z_DEFAULT_STRATEGY);
  std::string packed(deflateBound(&stream, text.size()), '\0');
  stream.next_in = reinterpret_cast<Bytef*>(const_cast<char*>(text.data()));
  stream.avail_in = static_cast<uInt>(text.size());
  stream.next_out = reinterpret_cast<Bytef*>(packed.data());
  stream.avail_out = static_cast<uInt>(packed.size());
  REQUIRE(deflate(&stream, Z_FINISH) == Z_STREAM_END);
  packed.resize(stream.total_out);
  deflateEnd(&stream);
  return packed;
}

std::string zstd(std::string_view text, bool with_checksum = true) {
  ZSTD_CCtx* context = ZSTD_createCCtx();
  ZSTD_CCtx_setParameter(context, ZSTD_c_checksumFlag, with_checksum);
  std::string packed(ZSTD_compressBound(text.size()), '\0');
  packed.resize(ZSTD_compress2(context, packed.data(), packed.size(), text.data(), text.size()));
  ZSTD_freeCCtx(context);
  return packed;
}

std::string read_bytes(const fs::path& file, std::size_t step) {
  const auto stream = open_bytes(file);
  std::string bytes, buffer(step, '\0');
  std::size_t count;
  do {
    count = stream->read(buffer);
    bytes.append(buffer, 0, count);
  } while (count == step);
  CHECK(stream->read(buffer) == 0);
  CHECK(stream->bytes_read() == fs::file_size(file));
  return bytes;
}

/// The documents of a .jsonl file with this content, or its error without the file's name.
std::string json_error(const Scratch& scratch, const std::string& content,
                       const DocumentOptions& options = {}) {
  const fs::path file = scratch / "a.jsonl";
  put_file(file, content);
  const std::string message = error_of([&] { read_documents(file, options); });
  const std::string head = "cannot read " + file.string() + ": ";
  return message.starts_with(head) ? message.substr(head.size()) : message;
}

}  // namespace

// ---- Files ----

TEST_CASE("inputs are listed once, sorted, under their own names", "[documents]") {
  const Scratch scratch;
  fs::create_directories(scratch / "in/b/deep");
  fs::create_directory(scratch / "blobs");
  for (const char* name : {"in/z.txt", "in/b/a.jsonl", "in/b/deep/c.parquet", "in/b/c.txt.gz",
                           "in/b/d.txt.zst", "in/b/e.jsonl.gz", "in/b/f.ndjson.zst", "in/b/g.json.gz",
                           "in/notes.md", "in/h.json", "in/i.gz", "in/txt", "blobs/0f3a"})
    put_file(scratch / name, "");
  fs::create_directory(scratch / "in/folder.txt");
  fs::create_symlink("../z.txt", scratch / "in/b/again.txt");
  fs::create_symlink("../../blobs/0f3a", scratch / "in/b/blob.txt");  // as in a cache of the Hugging Face hub
  fs::create_symlink("nowhere", scratch / "in/b/broken.txt");
  const fs::path in = fs::canonical(scratch / "in");
  const std::vector<fs::path> expected = {in / "b/a.jsonl",    in / "b/again.txt",    in / "b/blob.txt",
                                          in / "b/c.txt.gz",   in / "b/d.txt.zst",    in / "b/deep/c.parquet",
                                          in / "b/e.jsonl.gz", in / "b/f.ndjson.zst", in / "b/g.json.gz"};
  CHECK(list_documents({scratch / "in"}) == expected);
  CHECK(list_documents({scratch / "in/b/../z.txt", scratch / "in", scratch / "in/b"}) == expected);
  CHECK(list_documents({scratch / "in/z.txt"}) == std::vector{in / "z.txt"});
  CHECK(read_documents(in / "b/blob.txt") == std::vector<std::string>{""});
}

TEST_CASE("an input that cannot be read is one clear line", "[documents]") {
  const Scratch scratch;
  fs::create_directory(scratch / "void");
  put_file(scratch / "notes.md", "text");
  const auto error = [](const fs::path& input) { return error_of([&] { list_documents({input}); }); };
  CHECK_THAT(error(scratch / "absent.txt"),
             Contains("absent.txt does not exist; name .txt, .jsonl or .parquet"));
  CHECK_THAT(error(scratch / "void"), Contains("void holds no .txt, .jsonl or .parquet files; name"));
  CHECK_THAT(error(scratch / "notes.md"), Contains("notes.md is not a .txt, .jsonl or .parquet file; name"));
  CHECK_THAT(error(scratch / "notes.md/a.txt"), Contains("a.txt"));
  for (const char* name : {"a.txt", "a.txt.gz", "a.jsonl", "a.jsonl.zst"})
    CHECK_THAT(error_of([&] { open_documents(scratch / name); }), Contains("a.") && Contains("No such file"));
  CHECK_THAT(error_of([&] { open_documents(scratch / "notes.md"); }), Contains("notes.md is not a .txt"));
  fs::create_directory(scratch / "b.txt");
  CHECK_THAT(error_of([&] { open_documents(scratch / "b.txt"); }), Contains("it is a folder"));
#ifndef FLASHLM_WITH_PARQUET
  CHECK_THAT(error_of([&] { open_documents(scratch / "a.parquet"); }), Contains("tools/parquet_to_jsonl"));
#endif
}

TEST_CASE("a text file is one document, its bytes as they are", "[documents]") {
  const Scratch scratch;
  for (const std::size_t size :
       {std::size_t{0}, std::size_t{1}, kPieceBytes - 1, kPieceBytes, kPieceBytes + 1, 3 * kPieceBytes + 5}) {
    std::string text(size, 'x');
    for (std::size_t i = 0; i < size; ++i) text[i] = static_cast<char>(i * 7919 >> 5);
    put_file(scratch / "a.txt", text);
    CHECK(read_documents(scratch / "a.txt") == std::vector{text});
    put_file(scratch / "a.txt.gz", gzip(text));
    CHECK(read_documents(scratch / "a.txt.gz") == std::vector{text});
    put_file(scratch / "a.txt.zst", zstd(text));
    CHECK(read_documents(scratch / "a.txt.zst") == std::vector{text});
  }
}

TEST_CASE("progress is told in bytes of the file", "[documents]") {
  const Scratch scratch;
  put_file(scratch / "a.txt", std::string(4 * kPieceBytes, 'x'));
  const auto reader = open_documents(scratch / "a.txt");
  CHECK(reader->bytes_read() == 0);
  reader->next();
  CHECK(reader->bytes_read() == kPieceBytes + 1);  // one ahead, to know the last piece
}

// ---- Compression ----

TEST_CASE("members and frames follow each other", "[documents]") {
  const Scratch scratch;
  const std::string a = english(3000, 1), b = english(50, 2), empty;
  const std::string skippable("\x50\x2A\x4D\x18\x03\0\0\0abc", 11);
  put_file(scratch / "a.txt.gz", gzip(a) + gzip(empty) + gzip(b));
  put_file(scratch / "a.txt.zst", zstd(a) + zstd(empty) + skippable + zstd(b, false));
  put_file(scratch / "a.txt", a + b);
  for (const char* name : {"a.txt.gz", "a.txt.zst", "a.txt"})
    for (const std::size_t step : {1, 7, 65536, 1 << 22}) CHECK(read_bytes(scratch / name, step) == a + b);
}

TEST_CASE("no truncated or damaged compressed file passes for a whole one", "[documents]") {
  const Scratch scratch;
  const std::string text = english(30, 3);
  for (const auto& [name, packed] : {std::pair{"a.txt.gz", gzip(text)}, std::pair{"a.txt.zst", zstd(text)}}) {
    const fs::path file = scratch / name;
    const auto error = [&](const std::string& content) {
      put_file(file, content);
      std::vector<std::string> texts;
      const std::string message = error_of([&] { texts = read_documents(file); });
      if (message.empty()) CHECK(texts == std::vector{text});
      return message;
    };
    CHECK(error(packed) == "");
    for (std::size_t size = 0; size < packed.size(); ++size) {
      CHECK(error(packed.substr(0, size)) ==
            "cannot read " + file.string() + ": it is truncated: the compressed data has no end");
      if (size > 0) CHECK_THAT(error(packed + packed.substr(0, size)), Contains("it is truncated"));
      std::string damaged = packed;
      damaged[size] ^= 0x10;
      error(
          damaged);  // or the right text: some bits, the time in a gzip header for one, say nothing about it
    }
    CHECK_THAT(error(packed + "rest"), Contains("data, or damaged"));
    CHECK_THAT(error(packed + std::string(4, '\0')), Contains("data, or damaged"));
    CHECK_THAT(error(text), Contains("data, or damaged"));
  }
  put_file(scratch / "b.jsonl.gz", gzip("{\"text\": \"a\"}\n").substr(0, 30));
  CHECK_THAT(error_of([&] { read_documents(scratch / "b.jsonl.gz"); }), Contains("it is truncated"));
}

TEST_CASE("a Zstandard window that would fill the memory is refused", "[documents]") {
  const Scratch scratch;
  // A frame header alone: no single segment, and a window of 2^(10 + 20) bytes.
  put_file(scratch / "a.txt.zst", std::string("\x28\xB5\x2F\xFD\x00\xA0", 6) + std::string(20, '\0'));
  CHECK_THAT(error_of([&] { read_documents(scratch / "a.txt.zst"); }), Contains("memory"));
}

// ---- JSON lines ----

TEST_CASE("a line of JSON is a document", "[documents]") {
  const Scratch scratch;
  const auto read = [&](const std::string& content, const DocumentOptions& options = {}) {
    put_file(scratch / "a.jsonl", content);
    return read_documents(scratch / "a.jsonl", options);
  };
  using Texts = std::vector<std::string>;
  CHECK(read("").empty());
  CHECK(read("\n \t\r\n\n").empty());
  CHECK(read("{\"text\":\"one\"}\n{\"text\":\"two\"}\n") == Texts{"one", "two"});
  CHECK(read("\n{ \"text\" :\t\"one\" }\r\n\r\n\n  {\"text\":\"two\"}") == Texts{"one", "two"});
  CHECK(read("\xEF\xBB\xBF{\"text\":\"one\"}\n") == Texts{"one"});
  CHECK(read("{\"text\":null}\n{\"text\":\"\"}\n{\"id\":1,\"text\":null,\"b\":2}") == Texts{"", "", ""});
  CHECK(read("{\"id\":{\"text\":5},\"list\":[1,-2.5e+3,[],{},[{}],\"text\",true,false,null],\"text\":\"t\","
             "\"z\":0}") == Texts{"t"});
  CHECK(read(R"({"text":"\"\\\/\b\f\n\r\t\u0041\u00e9\u20AC\uD83D\ude00\u0000"})") ==
        Texts{std::string("\"\\/\b\f\n\r\tA\xC3\xA9\xE2\x82\xAC\xF0\x9F\x98\x80\0", 19)});
  CHECK(read("{\"t\\u0065xt\":\"a \xC3\xA9\xE2\x82\xAC\xF0\x9F\x98\x80\x7F\"}") ==
        Texts{"a \xC3\xA9\xE2\x82\xAC\xF0\x9F\x98\x80\x7F"});
  CHECK(read("{\"text\":1,\"content\":\"c\"}", {.text_field = "content"}) == Texts{"c"});
  CHECK(read("{\"" + std::string(3 * kPieceBytes, 'k') + "\":0,\"text\":\"t\"}") == Texts{"t"});
  CHECK(read("{\"a\":" + std::string(1000, '[') + std::string(1000, ']') + ",\"text\":\"t\"}") == Texts{"t"});
}

TEST_CASE("a bad line is refused with its number", "[documents]") {
  const Scratch scratch;
  const auto error = [&](const std::string& line) {
    return json_error(scratch, "{\"text\":\"good\"}\n\n" + line + "\n{\"text\":\"good\"}\n");
  };
  CHECK(error("{\"id\":1}") == "line 3 has no field 'text'; --text-field names the one with the text");
  CHECK(error("{}") == "line 3 has no field 'text'; --text-field names the one with the text");
  for (const char* value : {"1", "true", "[\"a\"]", "{\"text\":\"a\"}"})
    CHECK(error("{\"text\":" + std::string(value) + "}") ==
          "line 3 has a field 'text' that is not a string; --text-field names another");
  CHECK(error("{\"text\":\"a\",\"text\":\"b\"}") == "line 3 has the field 'text' twice");
  CHECK(error("{\"text\":\"a\xFF\"}") == "line 3 is not UTF-8, which JSON must be (byte 11 of it)");
  CHECK(error("{\"text\":\"a\\uD800b\"}") == "line 3 has half a pair of surrogates (byte 17 of it)");
  CHECK(error("{\"text\":\"a") ==
        "line 3 is not JSON: '\"' is expected, and there is the end of the line (byte 11 of it)");
  CHECK(json_error(scratch, "{\"text\":\"good\"}\n{\"text\":") ==
        "line 2 is not JSON: a string is expected, and there is the end of the file (byte 8 of it)");
  CHECK(error("[\"text\"]") == "line 3 is not JSON: '{' is expected, and there is '[' (byte 1 of it)");
  CHECK(error("{\"text\":\"a\"}{") ==
        "line 3 is not JSON: the end of the line is expected, and there is '{' (byte 13 of it)");
  CHECK(error("{\"a\":" + std::string(1001, '[')) == "line 3 nests more than 1000 brackets");
  CHECK_THAT(error("\xEF\xBB\xBF{\"text\":\"a\"}"), Contains("line 3 is not JSON"));
  CHECK(json_error(scratch, "{\"text\":\"a\"}", {.text_field = "body"}) ==
        "line 1 has no field 'body'; --text-field names the one with the text");
}

TEST_CASE("nlohmann-json, an independent parser, accepts the same lines and reads the same text",
          "[documents]") {
  const Scratch scratch;
  const std::vector<std::string> seeds = {
      R"({"text":"plain words","id":12})",
      R"({"id":[0,-1,1.25,3e-2,{"a":[true,false,null]},[]],"text":"a\"\\\/\n\u00e9\ud83d\ude00"})",
      "{\"url\" : {\"text\":\"inner\"}, \"text\": "
      "\"\xC3\xA9\xE2\x82\xAC\xF0\x9F\x98\x80\xED\x9F\xBF\xF4\x8F\xBF\xBF\" }",
      R"({"text":null,"score":0.5,"dump":{}})"};
  const std::string alphabet =
      "{}[]\",:\\/untrflse0123456789.+-eE \t\rdD8cC\x1F\x7F\x80\xBF\xC0\xE0\xED\xF0\xF4\xF5";
  std::mt19937 random(5);
  int accepted = 0, refused = 0;
  for (int round = 0; round < 6000; ++round) {
    std::string line = seeds[random() % seeds.size()];
    for (std::uint32_t edits = random() % 3; edits > 0; --edits) {
      const std::size_t at = random() % line.size();
      const char letter = alphabet[random() % alphabet.size()];
      switch (random() % 4) {
        case 0:
          line[at] = letter;
          break;
        case 1:
          line.insert(at, 1, letter);
          break;
        case 2:
          line.erase(at, 1 + random() % 3);
          break;
        default:
          line.insert(at, line.substr(random() % line.size(), 1 + random() % 12));
          break;
      }
    }
    std::optional<std::string> expected;
    int keys = 0;
    try {
      const auto count = [&](int depth, nlohmann::json::parse_event_t event, nlohmann::json& parsed) {
        keys += depth == 1 && event == nlohmann::json::parse_event_t::key && parsed == "text";
        return true;
      };
      const auto object = nlohmann::json::parse(line, count);
      if (object.is_object() && keys == 1) {
        if (object["text"].is_null()) expected = "";
        if (object["text"].is_string()) expected = object["text"].get<std::string>();
      }
    } catch (const nlohmann::json::parse_error&) {
    } catch (const nlohmann::json::out_of_range&) {
      continue;  // a number too large for double: JSON all the same
    }
    put_file(scratch / "a.jsonl", line);
    std::vector<std::string> texts;
    const std::string message = error_of([&] { texts = read_documents(scratch / "a.jsonl"); });
    INFO(line << "\n" << message);
    if (expected) {
      CHECK(texts == std::vector{*expected});
      ++accepted;
    } else {
      CHECK_FALSE(message.empty());
      ++refused;
    }
  }
  CHECK(accepted > 1500);
  CHECK(refused > 1500);
}

TEST_CASE("a line may be cut anywhere between two reads and two pieces", "[documents]") {
  const Scratch scratch;
  const std::string line =
      "{\"id\":[-10.5e+3,true,null,{}],\"te\\u0078t\":\"\xC3\xA9\xF0\x9F\x98\x80\\ud83d\\ude00\\n\",\"b\":[]}"
      "\r\n";
  const std::string text = "\xC3\xA9\xF0\x9F\x98\x80\xF0\x9F\x98\x80\n";
  for (std::size_t front = 0; front <= line.size(); ++front) {
    // The first line ends `front` bytes before the end of what is read at once.
    const std::string first(kJsonWindowBytes - front - 12, 'x');
    put_file(scratch / "a.jsonl", "{\"text\":\"" + first + "\"}\n" + line + line);
    CHECK(read_documents(scratch / "a.jsonl") == std::vector{first, text, text});
  }
  for (std::size_t before = 0; before < 12; ++before)
    for (const char* raw : {"", "\xF0\x9F\x98\x80\xC3\xA9 \xE2\x82\xAC", "\\ud83d\\ude00\\n\\u00e9"}) {
      const std::string front(kPieceBytes - before, 'x');
      put_file(scratch / "a.jsonl", "{\"a\":\"" + front + raw + "\",\"text\":\"" + front + raw + "\"}\n");
      const std::string decoded = nlohmann::json::parse(std::string(1, '"').append(raw).append(1, '"'));
      CHECK(read_documents(scratch / "a.jsonl") == std::vector{front + decoded});
    }
}

TEST_CASE("lines of a compressed file", "[documents]") {
  const Scratch scratch;
  std::string content;
  std::vector<std::string> texts;
  for (unsigned i = 0; i < 300; ++i) {
    texts.push_back(english(static_cast<int>(i % 40), i));
    content += nlohmann::json{{"id", i}, {"text", texts.back()}}.dump() + "\n";
  }
  for (const char* name : {"a.jsonl.gz", "a.json.gz", "a.ndjson.gz"}) {
    put_file(scratch / name, gzip(content));
    CHECK(read_documents(scratch / name) == texts);
  }
  for (const char* name : {"a.jsonl.zst", "a.json.zst"}) {
    put_file(scratch / name, zstd(content));
    CHECK(read_documents(scratch / name) == texts);
  }
}

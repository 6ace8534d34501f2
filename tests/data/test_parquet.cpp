// SPDX-License-Identifier: Apache-2.0
// Parquet files come from libparquet's own writer.
#include <arrow/api.h>
#include <arrow/io/file.h>
#include <parquet/arrow/writer.h>

#include <catch2/catch.hpp>
#include <optional>
#include <vector>

#include "data/documents.h"
#include "data/file.h"
#include "tests/data/read_documents.h"
#include "tests/data/support.h"

using Catch::Contains;
using namespace flashlm;

namespace {

namespace fs = std::filesystem;

using Texts = std::vector<std::string>;
using Array = std::shared_ptr<arrow::Array>;
using Columns = std::vector<std::pair<std::string, Array>>;

void ok(const arrow::Status& status) {
  INFO(status.ToString());
  REQUIRE(status.ok());
}

template <typename Builder, typename Value>
Array array(const std::vector<Value>& values) {
  Builder builder;
  for (const Value& value : values) ok(builder.Append(value));
  return builder.Finish().ValueOrDie();
}

template <typename Builder = arrow::StringBuilder>
Array texts_with_nulls(const std::vector<std::optional<std::string>>& values) {
  Builder builder;
  for (const auto& value : values) ok(value ? builder.Append(*value) : builder.AppendNull());
  return builder.Finish().ValueOrDie();
}

struct Layout {
  std::int64_t rows_per_group = 1000;
  arrow::Compression::type codec = arrow::Compression::SNAPPY;
  bool dictionary = true;
  bool checksums = false;
  bool nullable = true;
};

void write_parquet(const fs::path& file, const Columns& columns, const Layout& layout = {}) {
  arrow::FieldVector fields;
  arrow::ArrayVector arrays;
  for (const auto& [name, values] : columns) {
    fields.push_back(arrow::field(name, values->type(), layout.nullable));
    arrays.push_back(values);
  }
  parquet::WriterProperties::Builder properties;
  properties.compression(layout.codec);
  if (!layout.dictionary) properties.disable_dictionary();
  if (layout.checksums) properties.enable_page_checksum();
  properties.data_pagesize(1 << 14);
  const auto out = arrow::io::FileOutputStream::Open(file.string()).ValueOrDie();
  ok(parquet::arrow::WriteTable(*arrow::Table::Make(arrow::schema(fields), arrays),
                                arrow::default_memory_pool(), out, layout.rows_per_group,
                                properties.build()));
  ok(out->Close());
}

Texts many_texts(int count) {
  Texts texts;
  for (int i = 0; i < count; ++i)
    texts.push_back(i % 17 == 5 ? "" : english(i % 23, static_cast<unsigned>(i % 200)));
  return texts;
}

}  // namespace

TEST_CASE("FineWeb-Edu's columns: each row's text is a document", "[parquet]") {
  const Scratch scratch;
  const Texts texts = many_texts(2000);
  const Texts words(texts.size(), "word");
  const Array word = array<arrow::StringBuilder>(words);
  const std::vector<double> scores(texts.size(), 0.5);
  const std::vector<std::int64_t> counts(texts.size(), 7);
  const Columns columns = {{"text", array<arrow::StringBuilder>(texts)},
                           {"id", word},
                           {"dump", word},
                           {"url", word},
                           {"file_path", word},
                           {"language", word},
                           {"language_score", array<arrow::DoubleBuilder>(scores)},
                           {"token_count", array<arrow::Int64Builder>(counts)},
                           {"score", array<arrow::DoubleBuilder>(scores)},
                           {"int_score", array<arrow::Int64Builder>(counts)}};
  for (const auto codec : {arrow::Compression::UNCOMPRESSED, arrow::Compression::SNAPPY,
                           arrow::Compression::GZIP, arrow::Compression::ZSTD})
    for (const bool dictionary : {true, false})
      for (const bool nullable : {true, false}) {
        write_parquet(scratch / "a.parquet", columns, {700, codec, dictionary, true, nullable});
        CHECK(read_documents(scratch / "a.parquet") == texts);
      }
  CHECK(read_documents(scratch / "a.parquet", {.text_field = "dump"}) == words);
}

TEST_CASE("every way of storing text in a column", "[parquet]") {
  const Scratch scratch;
  const std::vector<std::optional<std::string>> values = {
      "a", std::nullopt, "", "b\xFF\xC3\xA9", std::nullopt, std::string("\0c", 2)};
  const Texts expected = {"a", "", "", "b\xFF\xC3\xA9", "", std::string("\0c", 2)};
  for (const Array& column : {texts_with_nulls(values), texts_with_nulls<arrow::LargeStringBuilder>(values),
                              texts_with_nulls<arrow::BinaryBuilder>(values),
                              texts_with_nulls<arrow::StringDictionaryBuilder>(values)}) {
    write_parquet(scratch / "a.parquet", {{"text", column}}, {4});
    CHECK(read_documents(scratch / "a.parquet") == expected);
  }
}

TEST_CASE("a file without rows has no documents, one of nulls has empty ones", "[parquet]") {
  const Scratch scratch;
  write_parquet(scratch / "a.parquet", {{"text", array<arrow::StringBuilder>(Texts{})}});
  CHECK(read_documents(scratch / "a.parquet").empty());
  write_parquet(scratch / "a.parquet",
                {{"text", texts_with_nulls(std::vector<std::optional<std::string>>(2500, std::nullopt))}});
  CHECK(read_documents(scratch / "a.parquet") == Texts(2500));
}

TEST_CASE("a long text comes in pieces, and progress with the rows", "[parquet]") {
  const Scratch scratch;
  Texts texts;
  for (const std::size_t size : {std::size_t{1}, kPieceBytes, kPieceBytes + 1, 2 * kPieceBytes + 3}) {
    texts.emplace_back(size, 'x');
    for (std::size_t i = 0; i < size; ++i) texts.back()[i] = static_cast<char>(i * 7919 >> 5);
  }
  write_parquet(scratch / "a.parquet", {{"text", array<arrow::BinaryBuilder>(texts)}});
  CHECK(read_documents(scratch / "a.parquet") == texts);
  const auto reader = open_documents(scratch / "a.parquet");
  CHECK(reader->bytes_read() == 0);
  reader->next();
  CHECK(reader->bytes_read() == fs::file_size(scratch / "a.parquet") / 4);
}

TEST_CASE("a column that is not there, or holds no text, is refused in words", "[parquet]") {
  const Scratch scratch;
  const auto list_builder = std::make_shared<arrow::StringBuilder>();
  arrow::ListBuilder lists(arrow::default_memory_pool(), list_builder);
  ok(lists.Append());
  ok(list_builder->Append("a"));
  const Array list = lists.Finish().ValueOrDie();
  const Array text = array<arrow::StringBuilder>(Texts{"a"});
  const Array number = array<arrow::Int64Builder>(std::vector<std::int64_t>{1});
  const Array record = arrow::StructArray::Make({text}, std::vector<std::string>{"text"}).ValueOrDie();
  const fs::path file = scratch / "a.parquet";
  write_parquet(file,
                {{"text", text}, {"number", number}, {"list", list}, {"record", record}, {"body", text}});
  const auto error = [&](const std::string& field) {
    return error_of([&] { open_documents(file, {.text_field = field}); });
  };
  const std::string there = " (there is text, body)";
  CHECK(error("content") == "cannot read " + file.string() +
                                ": it has no column 'content'; --text-field names the one with the text" +
                                there);
  CHECK(error("number") ==
        "cannot read " + file.string() +
            ": its column 'number' holds INT64, and text is needed; --text-field names another" + there);
  for (const char* nested : {"list", "record"})
    CHECK_THAT(error(nested), Contains("holds nested values, and text is needed"));
  CHECK_THAT(error("record.text"), Contains("no column 'record.text'"));
  write_parquet(file, {{"number", number}});
  CHECK_THAT(error("text"), Contains("no column 'text'") && !Contains("there is"));
}

TEST_CASE("what is not Parquet, truncated or damaged is refused in one line", "[parquet]") {
  const Scratch scratch;
  const Texts texts = many_texts(60);
  const fs::path file = scratch / "a.parquet";
  write_parquet(file, {{"text", array<arrow::StringBuilder>(texts)}},
                {30, arrow::Compression::UNCOMPRESSED, false, true});
  const std::string whole = read_file(file);
  const auto error = [&](const std::string& content) {
    put_file(file, content);
    Texts read;
    const std::string message = error_of([&] { read = read_documents(file); });
    if (message.empty()) CHECK(read == texts);
    return message;
  };
  CHECK(error(whole) == "");
  for (std::size_t size = 0; size < whole.size(); size += size < 50 ? 1 : 61)
    CHECK_THAT(error(whole.substr(0, size)), Contains("a.parquet: it is not Parquet, or damaged: "));
  CHECK_THAT(error(english(20, 1)), Contains("it is not Parquet, or damaged: "));
  std::string damaged = whole;
  damaged[whole.find(texts[40]) + 3] ^= 1;
  CHECK_THAT(error(damaged), Contains("it is not Parquet, or damaged: ") && Contains("CRC"));
  CHECK_THAT(error_of([&] { open_documents(scratch / "absent.parquet"); }), Contains("No such file"));
  CHECK_THAT(error_of([&] {
               fs::create_directory(scratch / "b.parquet");
               open_documents(scratch / "b.parquet");
             }),
             Contains("it is a folder"));
}

// SPDX-License-Identifier: Apache-2.0
// libparquet's column reader, below Arrow's tables: it decodes a page at a time and its values point into
// that page, where a table would hold a row group, and copy it.
#include "data/parquet_rows.h"

#include <arrow/memory_pool.h>
#include <parquet/api/reader.h>
#include <parquet/api/schema.h>

#include <algorithm>
#include <exception>
#include <vector>

#include "data/error.h"
#include "data/file.h"

namespace flashlm {
namespace {

constexpr std::int64_t kBatchRows = 1024;  // a batch also ends where its page does

parquet::ReaderProperties properties() {
  // Arrow's own allocators keep what is freed.
  parquet::ReaderProperties properties(arrow::system_memory_pool());
  properties.enable_buffered_stream();  // else a whole column of a row group is read at once
  properties.set_page_checksum_verification(true);
  return properties;
}

class ParquetRows final : public DocumentReader {
 public:
  ParquetRows(const std::filesystem::path& file, const std::string& column)
      : file_(file), file_bytes_(InputFile(file).size()), values_(kBatchRows), levels_(kBatchRows) {
    guarded([&] {
      reader_ = parquet::ParquetFileReader::OpenFile(file.string(), /*memory_map=*/false, properties());
      find_column(column);
    });
  }

  std::optional<Piece> next() override {
    if (rest_.empty()) {
      bool found = false;
      guarded([&] { found = next_row(); });
      if (!found) return std::nullopt;
    }
    const std::string_view text = rest_.substr(0, kPieceBytes);
    rest_.remove_prefix(text.size());
    return Piece{text, rest_.empty()};
  }

  /// The share of the rows that has been read, in bytes.
  std::uint64_t bytes_read() const override {
    const std::int64_t rows = reader_->metadata()->num_rows();
    if (rows_read_ >= rows) return file_bytes_;
    return static_cast<std::uint64_t>(static_cast<double>(file_bytes_) * static_cast<double>(rows_read_) /
                                      static_cast<double>(rows));
  }

 private:
  void find_column(const std::string& name) {
    const parquet::SchemaDescriptor& schema = *reader_->metadata()->schema();
    const int field = schema.group_node()->FieldIndex(name);
    if (field < 0)
      fail_reading(file_, "it has no column '" + name + "'; --text-field names the one with the text" +
                              text_columns(schema));
    const parquet::schema::Node& node = *schema.group_node()->field(field);
    const auto refuse = [&](const std::string& what) {
      fail_reading(file_, "its column '" + name + "' holds " + what +
                              ", and text is needed; --text-field names another" + text_columns(schema));
    };
    if (node.is_group() || node.is_repeated()) refuse("nested values");
    column_ = schema.ColumnIndex(node);
    if (const parquet::Type::type type = schema.Column(column_)->physical_type();
        type != parquet::Type::BYTE_ARRAY)
      refuse(parquet::TypeToString(type));
  }

  static std::string text_columns(const parquet::SchemaDescriptor& schema) {
    std::string names;
    for (int i = 0; i < schema.num_columns(); ++i)
      if (const parquet::ColumnDescriptor& column = *schema.Column(i);
          column.physical_type() == parquet::Type::BYTE_ARRAY && column.path()->ToDotVector().size() == 1 &&
          column.max_repetition_level() == 0)
        names += (names.empty() ? " (there is " : ", ") + column.name();
    return names.empty() ? names : names + ")";
  }

  /// Sets rest_ to the next row's text.
  bool next_row() {
    while (row_ == rows_)
      if (!next_batch()) return false;
    const bool has_nulls = pages_->descr()->max_definition_level() > 0;
    if (!has_nulls || levels_[static_cast<std::size_t>(row_)] > 0) {
      const parquet::ByteArray& value = values_[static_cast<std::size_t>(value_++)];
      rest_ = {reinterpret_cast<const char*>(value.ptr), value.len};
    }
    ++row_;
    ++rows_read_;
    return true;
  }

  bool next_batch() {
    while (!pages_ || !pages_->HasNext()) {
      if (next_group_ == reader_->metadata()->num_row_groups()) return false;
      group_ = reader_->RowGroup(next_group_++);
      pages_ = std::static_pointer_cast<parquet::ByteArrayReader>(group_->Column(column_));
    }
    std::int64_t values_read = 0;
    rows_ = pages_->ReadBatch(kBatchRows, levels_.data(), nullptr, values_.data(), &values_read);
    row_ = value_ = 0;
    return true;
  }

  /// Runs an action with Parquet's exceptions as Errors.
  template <typename Action>
  void guarded(Action&& action) const {
    try {
      action();
    } catch (const Error&) {
      throw;
    } catch (const std::exception& error) {
      std::string why = error.what();
      std::replace(why.begin(), why.end(), '\n', ' ');
      fail_reading(file_, "it is not Parquet, or damaged: " + why);
    }
  }

  std::filesystem::path file_;
  std::uint64_t file_bytes_;
  std::unique_ptr<parquet::ParquetFileReader> reader_;
  int column_ = 0;
  int next_group_ = 0;
  std::shared_ptr<parquet::RowGroupReader> group_;
  std::shared_ptr<parquet::ByteArrayReader> pages_;  // of the column in that group
  // A batch: its rows' values without the nulls, and for each row whether it is there (1) or null (0).
  std::vector<parquet::ByteArray> values_;
  std::vector<std::int16_t> levels_;
  std::int64_t rows_ = 0;
  std::int64_t row_ = 0;
  std::int64_t value_ = 0;
  std::int64_t rows_read_ = 0;
  std::string_view rest_;  // of the row's text, in the page
};

}  // namespace

std::unique_ptr<DocumentReader> open_parquet(const std::filesystem::path& file, const std::string& column) {
  return std::make_unique<ParquetRows>(file, column);
}

}  // namespace flashlm

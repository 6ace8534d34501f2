// SPDX-License-Identifier: Apache-2.0
// Token tables: compressed as a singular value decomposition that is known beforehand says, found in files of
// other makers, put into a model.
#include <torch/torch.h>

#include <filesystem>
#include <fstream>

#include "data/error.h"
#include "model/embeddings.h"
#include "model/safetensors.h"
#include "tests/ops/check.h"

using namespace flashlm;
using namespace flashlm::testing;

namespace {

at::Tensor normal(at::IntArrayRef shape, uint64_t seed) {
  return torch::randn(shape, at::make_generator<at::CPUGeneratorImpl>(seed), at::kDouble);
}

/// U S Vᵀ with singular values 10, 9.5, 9, ... and V's signs as compress_table has them.
struct Decomposed {
  at::Tensor u, s, v;

  Decomposed(int64_t rows, int64_t columns) {
    u = std::get<0>(at::linalg_qr(normal({rows, columns}, 1)));
    s = 10 - 0.5 * torch::arange(columns, at::kDouble);
    v = std::get<0>(at::linalg_qr(normal({columns, columns}, 2)));
    for (int64_t k = 0; k < columns; ++k) {
      const at::Tensor column = v.select(1, k);
      if (column.max().item<double>() < -column.min().item<double>()) column.neg_();
    }
  }

  at::Tensor table() const { return (u * s).mm(v.t()); }
  at::Tensor first(int64_t dim) const { return (u * s).slice(1, 0, dim); }
};

struct TemporaryFolder {
  std::filesystem::path path =
      std::filesystem::temp_directory_path() / ("flashlm_embeddings_" + std::to_string(getpid()));
  TemporaryFolder() { std::filesystem::create_directories(path); }
  ~TemporaryFolder() { std::filesystem::remove_all(path); }
};

double largest_difference(const at::Tensor& a, const at::Tensor& b) {
  return (a.to(at::kDouble) - b.to(at::kDouble)).abs().max().item<double>();
}

}  // namespace

TEST_CASE("a table is compressed to its largest singular values", "[embeddings]") {
  // More rows than are looked at together, and not a multiple.
  const Decomposed known(9001, 12);
  const auto [type, epsilon] = GENERATE(table<at::ScalarType, double>(
      {{at::kDouble, 1e-7}, {at::kFloat, 1e-6}, {at::kHalf, 1e-3}, {at::kBFloat16, 1e-2}}));
  const at::Tensor table = known.table();
  const CompressedTable got = compress_table(table.to(type), 5, false);
  REQUIRE(got.rows.scalar_type() == at::kFloat);
  REQUIRE(got.rows.sizes() == at::IntArrayRef({9001, 5}));
  REQUIRE(largest_difference(got.rows, known.first(5)) < epsilon * table.abs().max().item<double>());
  REQUIRE(largest_difference(got.singular_values, known.s) < epsilon);
  const double kept = (known.s.slice(0, 0, 5).square().sum() / known.s.square().sum()).item<double>();
  REQUIRE(got.variance_kept == Approx(kept).epsilon(epsilon));
}

TEST_CASE("small singular values come out too", "[embeddings]") {
  Decomposed known(300, 6);
  known.s = torch::tensor({1000., 100., 10., 1., 0.5, 0.1}, at::kDouble);
  const CompressedTable got = compress_table(known.table(), 6, false);
  REQUIRE((got.singular_values / known.s - 1).abs().max().item<double>() < 1e-6);
  REQUIRE(largest_difference(got.rows, known.first(6)) < 1e-4);
  REQUIRE(got.variance_kept == Approx(1));
}

TEST_CASE("centring takes the mean row off, and nothing else", "[embeddings]") {
  const at::Tensor table = normal({5000, 8}, 3) * torch::arange(1, 9).to(at::kDouble);
  const at::Tensor centred = table - table.mean(0);
  const CompressedTable want = compress_table(centred, 3, false);
  // However far off the mean is.
  const CompressedTable got = compress_table(table + normal({8}, 4) * 100, 3, true);
  REQUIRE(largest_difference(got.rows, want.rows) < 1e-5);
  REQUIRE(largest_difference(got.singular_values, want.singular_values) < 1e-7);
  REQUIRE(got.variance_kept == Approx(want.variance_kept));
}

TEST_CASE("tables that cannot be compressed are refused", "[embeddings]") {
  const at::Tensor wide = normal({4, 9}, 5);
  REQUIRE(compress_table(wide, 4, false).singular_values.size(0) == 4);
  REQUIRE(compress_table(wide, 4, false).variance_kept == Approx(1));
  require_error([&] { compress_table(wide, 5, false); },
                "--dim must be in [1, 4] for a table of 4 x 9, got 5");
  require_error([&] { compress_table(wide, 0, false); }, "got 0");
  require_error(
      [&] {
        compress_table(torch::zeros({9, 4}), 2, false);
      },
      "not all zeros, got a sum of squares of 0");
  require_error([&] { compress_table(torch::zeros({9, 4}) + 2.5, 2, true); }, "not all rows the same");
  at::Tensor infinite = normal({9, 4}, 6);
  infinite[3][1] = std::numeric_limits<double>::infinity();
  require_error([&] { compress_table(infinite, 2, false); }, "must be finite");
}

TEST_CASE("the token table is found in files of other makers", "[embeddings]") {
  const TemporaryFolder folder;
  const auto path = folder.path / "t.safetensors";
  const at::Tensor rows = normal({5, 3}, 7).to(at::kHalf);
  for (const std::string name : {"wte.weight", "transformer.wte.weight"}) {
    save_safetensors(path, {{name, rows}, {"wpe.weight", torch::ones({2, 3})}, {"scale", torch::ones({3})}});
    const Table table = load_table(path, "");
    REQUIRE(table.name == name);
    REQUIRE(torch::equal(table.rows, rows));
  }
  REQUIRE(load_table(path, "wpe.weight").rows.sizes() == at::IntArrayRef({2, 3}));
  require_error([&] { load_table(path, "wte"); },
                "has no wte; choose with --name one of: scale, transformer.wte.weight");
  require_error([&] { load_table(path, "scale"); }, "scale must be a matrix of floats, got 3 Float");
  save_safetensors(path, {{"ids", torch::ones({2, 3}, at::kLong)}});
  require_error([&] { load_table(path, "ids"); }, "must be a matrix of floats, got 2 x 3 Long");
  require_error([&] { load_table(path, ""); }, "has no wte.weight or transformer.wte.weight");
  // Tensors beside it may be what this reader does not know.
  std::string header = R"({"mask":{"dtype":"BOOL","shape":[3],"data_offsets":[0,3]},)"
                       R"("wte.weight":{"dtype":"F32","shape":[1,1],"data_offsets":[3,7]}})";
  const uint64_t size = header.size();
  std::ofstream(path, std::ios::binary).write(reinterpret_cast<const char*>(&size), sizeof size)
      << header << "1234567";
  REQUIRE(load_table(path, "").rows.numel() == 1);
  require_error([&] { load_safetensors(path); }, "BOOL");
}

namespace {

/// Of a few texts, the longest first; a control token, the end of text, comes last.
class TinyTokenizer : public Tokenizer {
 public:
  explicit TinyTokenizer(std::vector<std::string> texts) : Tokenizer(""), texts_(std::move(texts)) {}

  std::unique_ptr<Tokenizer> clone() const override { return std::make_unique<TinyTokenizer>(texts_); }
  int64_t vocab_size() const override { return static_cast<int64_t>(texts_.size()); }
  int32_t end_of_text() const override { return static_cast<int32_t>(texts_.size()) - 1; }
  const std::string& token_text(int32_t id) const override { return texts_[id]; }
  std::vector<int32_t> encode(std::string_view text, bool = false) const override {
    std::vector<int32_t> ids;
    while (!text.empty()) {
      int32_t id = 0;
      while (texts_.at(id).empty() || !text.starts_with(texts_[id])) ++id;
      ids.push_back(id);
      text.remove_prefix(texts_[id].size());
    }
    return ids;
  }

 private:
  std::vector<std::string> texts_;
};

}  // namespace

TEST_CASE("a table is mapped to another vocabulary by the pieces of its tokens", "[embeddings]") {
  const TinyTokenizer from({" the", "re", "a", "r", "e", "\xff", ""});
  const TinyTokenizer to({"", " there", "are", "\xff", "e", ""});
  const at::Tensor table = normal({7, 3}, 9).to(at::kFloat);
  const at::Tensor got = map_table(table, from, to);
  const at::Tensor want = torch::stack(
      {table.mean(0), (table[0] + table[1]) / 2, (table[2] + table[1]) / 2, table[5], table[4], table[6]});
  REQUIRE(got.scalar_type() == at::kFloat);
  REQUIRE(largest_difference(got, want) < 1e-6);
  require_error([&] { map_table(table.slice(0, 1), from, to); },
                "a row for each of the 7 tokens of --map-from, got 6 rows");
}

TEST_CASE("a model starts from an embedding of its shape", "[embeddings]") {
  const TemporaryFolder folder;
  const auto path = folder.path / "t.safetensors";
  ModelConfig config;
  config.vocab_size = 40;
  config.d_model = 16;
  config.d_inner = 20;
  config.groups = 4;
  FlashLM model(config);
  const at::Tensor rows = normal({40, 16}, 8).to(at::kFloat), ids = torch::arange(12).view({1, 12});
  save_safetensors(path, {{"embedding.weight", rows}, {"singular_values", torch::ones({16})}});
  init_embedding(model, path);
  REQUIRE(torch::equal(model->embedding, rows));
  REQUIRE(model->embedding.requires_grad());
  const at::NoGradGuard no_grad;  // the tied output layer too
  REQUIRE(largest_difference(model(ids), model->hidden(ids).matmul(rows.t())) < 1e-4);
  save_safetensors(path, {{"embedding.weight", rows.slice(1, 0, 8)}});
  require_error(
      [&] { init_embedding(model, path); },
      "embedding.weight must be V x D = 40 x 16, got 40 x 8; make it with flashlm embeddings --dim 16");
  save_safetensors(path, {{"wte.weight", rows}});
  require_error([&] { init_embedding(model, path); },
                "has no embedding.weight; make it with flashlm embeddings");
}

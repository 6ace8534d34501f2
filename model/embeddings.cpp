// SPDX-License-Identifier: Apache-2.0
#include "model/embeddings.h"

#include <ATen/ATen.h>

#include <cmath>
#include <vector>

#include "data/error.h"
#include "model/safetensors.h"

namespace flashlm {
namespace {

constexpr int64_t kChunkRows = 4096;  // converted to float64 at a time

/// "50257 x 768"
std::string shape_of(const at::Tensor& t) {
  std::string text;
  for (const int64_t size : t.sizes()) text += (text.empty() ? "" : " x ") + std::to_string(size);
  return text;
}

/// body(index of its first row, rows in float64, less `mean` if it is defined), for all rows in turn.
template <class Body>
void for_each_chunk(const at::Tensor& table, const at::Tensor& mean, const Body& body) {
  for (int64_t start = 0; start < table.size(0); start += kChunkRows) {
    at::Tensor rows =
        table.slice(0, start, std::min(start + kChunkRows, table.size(0))).to(at::kDouble).contiguous();
    if (mean.defined()) rows = rows - mean;
    body(start, rows);
  }
}

at::Tensor mean_row(const at::Tensor& table) {
  at::Tensor sum = at::zeros({table.size(1)}, at::kDouble);
  for_each_chunk(table, {}, [&](int64_t, const at::Tensor& rows) { sum += rows.sum(0); });
  return sum / static_cast<double>(table.size(0));
}

/// The columns, each times 1 or -1 so that its largest component is positive.
at::Tensor with_fixed_signs(const at::Tensor& columns) {
  const at::Tensor largest = columns.abs().argmax(0, /*keepdim=*/true);
  return columns * columns.gather(0, largest).sign();
}

}  // namespace

Table load_table(const std::filesystem::path& path, const std::string& name) {
  std::string names;
  const SafeTensors file = load_safetensors(path, [&](const std::string& one) {
    names += (names.empty() ? "" : ", ") + one;
    return name.empty() ? one == "wte.weight" || one == "transformer.wte.weight" : one == name;
  });
  if (file.tensors.empty()) {
    throw Error(path.string() + ": has no " + (name.empty() ? "wte.weight or transformer.wte.weight" : name) +
                "; choose with --name one of: " + names);
  }
  const auto& [found, rows] = *file.tensors.begin();
  if (rows.dim() != 2 || !rows.is_floating_point()) {
    throw Error(path.string() + ": " + found + " must be a matrix of floats, got " + shape_of(rows) + " " +
                c10::toString(rows.scalar_type()));
  }
  return {found, rows};
}

at::Tensor map_table(const at::Tensor& table, const Tokenizer& from, const Tokenizer& to) {
  const at::NoGradGuard no_grad;
  if (table.size(0) != from.vocab_size()) {
    throw Error("the table must have a row for each of the " + std::to_string(from.vocab_size()) +
                " tokens of --map-from, got " + std::to_string(table.size(0)) + " rows");
  }
  const at::Tensor without_text = mean_row(table);
  at::Tensor mapped = at::empty({to.vocab_size(), table.size(1)}, table.options());
  for (int32_t id = 0; id < to.vocab_size(); ++id) {
    std::vector<int32_t> pieces = from.encode(to.token_text(id));
    if (id == to.end_of_text()) pieces = {from.end_of_text()};
    if (pieces.empty()) {
      mapped[id].copy_(without_text);
    } else {
      const at::Tensor rows = at::tensor(std::vector<int64_t>(pieces.begin(), pieces.end()));
      mapped[id].copy_(table.index_select(0, rows).to(at::kDouble).mean(0));
    }
  }
  return mapped;
}

CompressedTable compress_table(const at::Tensor& table, int64_t dim, bool center) {
  const at::NoGradGuard no_grad;
  const int64_t columns = table.size(1), rank = std::min(table.size(0), columns);
  if (dim < 1 || dim > rank) {
    throw Error("--dim must be in [1, " + std::to_string(rank) + "] for a table of " + shape_of(table) +
                ", got " + std::to_string(dim));
  }
  const at::Tensor mean = center ? mean_row(table) : at::Tensor();
  at::Tensor gram = at::zeros({columns, columns}, at::kDouble);
  for_each_chunk(table, mean, [&](int64_t, const at::Tensor& rows) { gram.addmm_(rows.t(), rows); });
  const double squares = gram.trace().item<double>();
  if (!std::isfinite(squares) || squares <= 0) {
    throw Error("the table's values must be finite and not all " +
                std::string(center ? "rows the same" : "zeros") + ", got a sum of squares of " +
                std::to_string(squares));
  }
  const auto [eigenvalues, eigenvectors] = at::linalg_eigh(gram);  // they rise
  const at::Tensor variances = eigenvalues.flip(0).clamp_min(0);
  const at::Tensor right = with_fixed_signs(eigenvectors.flip(1).slice(1, 0, dim));

  CompressedTable result;
  result.singular_values = variances.slice(0, 0, rank).sqrt();
  result.variance_kept = variances.slice(0, 0, dim).sum().item<double>() / variances.sum().item<double>();
  result.rows = at::empty({table.size(0), dim}, at::kFloat);
  for_each_chunk(table, mean, [&](int64_t start, const at::Tensor& rows) {
    result.rows.slice(0, start, start + rows.size(0)).copy_(rows.mm(right));
  });
  return result;
}

void init_embedding(const FlashLM& model, const std::filesystem::path& path) {
  const at::NoGradGuard no_grad;
  const std::string name = "embedding.weight";
  const SafeTensors file = load_safetensors(path, [&](const std::string& one) { return one == name; });
  const std::string remedy = "; make it with flashlm embeddings --dim " +
                             std::to_string(model->embedding.size(1)) + ", from a table of this vocabulary";
  if (file.tensors.empty()) throw Error(path.string() + ": has no " + name + remedy);
  const at::Tensor& rows = file.tensors.at(name);
  if (rows.sizes() != model->embedding.sizes()) {
    throw Error(path.string() + ": " + name + " must be V x D = " + shape_of(model->embedding) + ", got " +
                shape_of(rows) + remedy);
  }
  model->embedding.copy_(rows);
}

}  // namespace flashlm

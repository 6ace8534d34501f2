// SPDX-License-Identifier: Apache-2.0
// Token tables of other models, such as GPT-2's, as the embedding that a model starts from.
#pragma once

#include <ATen/core/Tensor.h>

#include <filesystem>
#include <string>

#include "data/tokenizer.h"
#include "model/flash_lm.h"

namespace flashlm {

struct Table {
  std::string name;
  at::Tensor rows;  // (V, n)
};

/// The matrix `name` of a safetensors file; if `name` is empty GPT-2's table, "wte.weight" or
/// "transformer.wte.weight". Nothing else of the file is read. Throws Error if it is not there or not a
/// matrix of floats.
Table load_table(const std::filesystem::path& path, const std::string& name);

/// A table for the vocabulary of `to`, from one for that of `from`: the row of a token is the mean of the
/// rows of the tokens that `from` cuts its text into; single bytes are text as any other. Control tokens have
/// no text: the end of text takes the row of `from`'s, others the mean of all rows. (to.vocab_size(), n), of
/// `table`'s precision. Throws Error unless `table` has a row for each token of `from`.
at::Tensor map_table(const at::Tensor& table, const Tokenizer& from, const Tokenizer& to);

struct CompressedTable {
  at::Tensor rows;             // (V, D) float32
  at::Tensor singular_values;  // (min(V, n)) float64, falling
  double variance_kept = 0;    // Σ S_i² over the first D, divided by Σ S_i² over all
};

/// With the singular value decomposition W = U S Vᵀ of a table W (V, n) of floats, of any precision: its
/// first D columns of U S, which is W times the first D right singular vectors, as in FlashLM v3. No other D
/// columns times a matrix come nearer to W (Eckart and Young 1936). With `center`, of W less its mean row,
/// which no softmax over the rows can see.
///
/// Signs, which the decomposition leaves open: the largest component of each right singular vector is
/// positive.
///
/// Everything is computed in float64 from the eigenvectors of WᵀW, in memory of 2 n² numbers. The squares
/// make singular values below 1e-7 times the largest inaccurate: float32 tables do not tell them from 0
/// either. Throws Error unless 1 <= D <= min(V, n), or if W has a value that is not finite, or none but
/// zeros.
CompressedTable compress_table(const at::Tensor& table, int64_t dim, bool center);

/// Copies the tensor "embedding.weight" of a safetensors file into the model's embedding. Throws Error if it
/// has another shape.
void init_embedding(const FlashLM& model, const std::filesystem::path& path);

}  // namespace flashlm

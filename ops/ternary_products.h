// SPDX-License-Identifier: Apache-2.0
// What bit_linear and ternary_glu share: the products of a layer whose weights are ternary, a block of rows
// at a time so that what lies between memory and product stays in cache. Forward, backward, and the weights'
// gradient. Private to the operators.
#pragma once

#include <optional>
#include <string_view>

#include "ops/common.h"
#include "ops/ternary_weights.h"

namespace flashlm {

/// What the products of the backward multiply.
enum class Gradient { kFloat32, kBfloat16, kInt8 };

inline Gradient parse_gradient(const char* op, std::string_view name) {
  TORCH_CHECK(name == "float32" || name == "bfloat16" || name == "int8", op,
              ": gradient must be 'float32', 'bfloat16' or 'int8', got '", name, "'");
  return name == "int8" ? Gradient::kInt8 : name == "bfloat16" ? Gradient::kBfloat16 : Gradient::kFloat32;
}

/// Sums of int8 products are int32.
constexpr int64_t kLargestInt8In = (int64_t{1} << 24) - 1;

/// The modes' names, and how they go together, for a weight of `in` columns.
inline void check_modes(const char* op, const c10::SymInt& in, std::string_view quantizer,
                        std::string_view activation, double eps, std::string_view gradient) {
  parse_quantizer(op, quantizer);
  const bool int8 = parse_activation(op, activation);
  if (int8) {
    TORCH_SYM_CHECK(in.sym_le(kLargestInt8In), op, ": weight's in must be at most ", kLargestInt8In,
                    " in activation mode 'int8', where sums are int32, got ", in, "; use activation 'none'");
  }
  TORCH_CHECK(eps >= 0, op, ": eps must be >= 0, got ", eps);
  const bool int8_gradient = parse_gradient(op, gradient) == Gradient::kInt8;
  TORCH_CHECK(int8 || !int8_gradient, op, ": gradient 'int8' needs activation 'int8', got '", activation,
              "'");
}

/// Rows that are normed and quantized together, in buffers that stay in cache until the product reads them; a
/// multiple of every tile's rows.
constexpr int64_t kRowBlock = 96;
/// The least max|row| that a gradient's scale is made for: its inverse is a float.
constexpr double kSmallestGradient = 1e-35;
/// Rows over which a weight's gradient is summed before the sum goes to memory.
constexpr int64_t kDepth = 256;

/// body(begin, end) for consecutive blocks of at most `block` rows.
template <class Body>
void for_row_blocks(int64_t begin, int64_t end, int64_t block, const Body& body) {
  for (int64_t r = begin; r < end; r += block) body(r, std::min(end, r + block));
}

/// A layer's product, y (M, N) = a (M, K) · (gamma Q)ᵀ, as the kernels read it. x (M, K), from which a is
/// made, norm_scale, q (M, quantized_width(K)) and inverse_scale (M) may be undefined; where a backward has
/// no x, it has q and inverse_scale.
struct TernaryLayer {
  at::Tensor x, norm_scale, q, inverse_scale;
  int64_t m, n, k;
  double eps;
  bool int8;
  kernels::Quantizer quantizer;
  Gradient gradient = Gradient::kFloat32;  // as asked for
};

// ---- rows ----

/// Rows as products take them: in int8, with each row's inverse_scale and sum of q, or as they are.
template <class T>
struct ProductRows {
  const T* values;  // null if they are in int8
  const int8_t* q;
  const T* inverse_scale;
  const int32_t* row_sum;
};

/// Memory for up to `block` rows in int8.
template <class T>
class Int8Rows {
 public:
  Int8Rows(int64_t block, int64_t k) : Int8Rows(block, block, k) {}
  /// Or only row sums for them, and the rest for `own`.
  Int8Rows(int64_t own, int64_t block, int64_t k)
      : k_(k), q_(own * kernels::quantized_width(k)), inverse_scale_(own), row_sum_(block) {}

  /// In q and inverse_scale, or if those are null in this memory.
  ProductRows<T> operator()(int64_t rows, const T* values, double smallest, int8_t* q = nullptr,
                            T* inverse_scale = nullptr) {
    if (q == nullptr) q = q_.data, inverse_scale = inverse_scale_.data;
    kernels::table<T>().quantize_rows(rows, k_, values, static_cast<T>(smallest), q, inverse_scale,
                                      row_sum_.data);
    return {nullptr, q, inverse_scale, row_sum_.data};
  }

 private:
  int64_t k_;
  Scratch<int8_t> q_;
  Scratch<T> inverse_scale_;
  Scratch<int32_t> row_sum_;
};

/// One thread's rows of a layer: normed if it has a norm, quantized if it multiplies int8.
template <class T>
class LayerRows {
 public:
  LayerRows(const TernaryLayer& layer, int64_t block)
      : layer_(layer), normed_(layer.norm_scale.defined() ? block * layer.k : 0) {
    const bool quantizes = layer.x.defined() || !layer.q.defined();
    if (layer.int8 && quantizes) int8_.emplace(layer.q.defined() ? 0 : block, block, layer.k);
  }

  /// Rows begin .. end, at most a block, until the next call. They are made of x, and kept in q if there is
  /// one; without x they are q's.
  ProductRows<T> operator()(int64_t begin, int64_t end) {
    const int64_t width = kernels::quantized_width(layer_.k);
    if (!layer_.x.defined()) {
      return {nullptr, layer_.q.const_data_ptr<int8_t>() + begin * width,
              layer_.inverse_scale.const_data_ptr<T>() + begin, nullptr};
    }
    const T* x = layer_.x.const_data_ptr<T>() + begin * layer_.k;
    if (!layer_.q.defined()) return of(end - begin, x);
    return of(end - begin, x, layer_.q.mutable_data_ptr<int8_t>() + begin * width,
              layer_.inverse_scale.mutable_data_ptr<T>() + begin);
  }

  /// The same of x (rows, K), at most a block, kept in q if that is not null.
  ProductRows<T> of(int64_t rows, const T* x, int8_t* q = nullptr, T* inverse_scale = nullptr) {
    if (layer_.norm_scale.defined()) {
      kernels::table<T>().rms_norm(rows, layer_.k, x, layer_.norm_scale.const_data_ptr<T>(),
                                   static_cast<T>(layer_.eps), normed_.data);
      x = normed_.data;
    }
    if (!layer_.int8) return {x, nullptr, nullptr, nullptr};
    return (*int8_)(rows, x, kSmallestActivation, q, inverse_scale);
  }

 private:
  const TernaryLayer& layer_;
  Scratch<T> normed_;
  std::optional<Int8Rows<T>> int8_;
};

// ---- forward ----

/// Rows from which on sum tables are worth building, where int8 rows have them.
constexpr int64_t kFewestTableRows = 24;

/// y (rows, N) = a (rows, K) · (gamma Q)ᵀ, for any thread.
template <class T>
class ForwardProduct {
 public:
  ForwardProduct(const TernaryLayer& layer, const at::Tensor& weight)
      : n_(layer.n),
        k_(layer.k),
        by_sum_table_(layer.int8 && table().sum_table_gemm_int8 != nullptr && layer.m >= kFewestTableRows),
        weights_(ternary_weights<T>(weight, layer.quantizer)),
        packed_(static_cast<const uint8_t*>(weights_->packed(
            layer.int8 && !by_sum_table_ ? TernaryLayout::kInt8 : TernaryLayout::kFloat, weight))),
        workspace_size_(by_sum_table_ ? table().sum_table_int8_workspace_size(n_, k_)
                        : layer.int8  ? 0
                                      : table().ternary_float_workspace_size(n_, k_)) {}

  /// Of one thread.
  Scratch<uint8_t> workspace() const { return Scratch<uint8_t>(workspace_size_); }

  void operator()(int64_t rows, const ProductRows<T>& a, T* y, const Scratch<uint8_t>& workspace) const {
    const T gamma = weights_->gamma();
    if (a.values != nullptr) {
      table().ternary_float_gemm(rows, n_, k_, a.values, k_, packed_, gamma, y, n_, workspace.data);
    } else if (by_sum_table_) {
      table().sum_table_gemm_int8(rows, n_, k_, a.q, a.inverse_scale, packed_, gamma, y, n_, workspace.data);
    } else {
      table().ternary_gemm(rows, n_, k_, a.q, a.row_sum, a.inverse_scale, packed_, gamma, y, n_);
    }
  }

 private:
  static const kernels::Table<T>& table() { return kernels::table<T>(); }

  int64_t n_, k_;
  bool by_sum_table_;
  std::shared_ptr<TernaryWeights<T>> weights_;
  const uint8_t* packed_;
  int64_t workspace_size_;
};

// ---- backward ----

/// What this CPU has of what was asked for; where it lacks it, and in float64, the exact one.
template <class T>
Gradient gradient_of(const TernaryLayer& layer) {
  const auto& table = kernels::table<T>();
  const bool has_it = layer.gradient == Gradient::kInt8 ? table.int8_panel > 0 : table.bf16_panel > 0;
  return has_it ? layer.gradient : Gradient::kFloat32;
}

inline TernaryLayout backward_layout(Gradient gradient) {
  return gradient == Gradient::kInt8       ? TernaryLayout::kInt8Transposed
         : gradient == Gradient::kBfloat16 ? TernaryLayout::kBf16Transposed
                                           : TernaryLayout::kFloatTransposed;
}

/// grad_a (rows, K) = grad_y (rows, N) · (gamma Q), for any thread.
template <class T>
class BackwardProduct {
 public:
  BackwardProduct(const TernaryLayer& layer, const at::Tensor& weight)
      : n_(layer.n),
        k_(layer.k),
        gradient_(gradient_of<T>(layer)),
        weights_(ternary_weights<T>(weight, layer.quantizer)),
        packed_(weights_->packed(backward_layout(gradient_), weight)) {}

  /// Of one thread, for blocks of kRowBlock rows.
  struct Memory {
    Scratch<uint8_t> workspace;
    Scratch<int32_t> pairs;
    std::optional<Int8Rows<T>> int8;
  };
  Memory memory() const {
    Memory memory;
    switch (gradient_) {
      case Gradient::kFloat32:
        memory.workspace.resize(table().ternary_float_workspace_size(k_, n_));
        break;
      case Gradient::kBfloat16:
        memory.pairs.resize(kRowBlock * pairs());
        break;
      case Gradient::kInt8:
        memory.int8.emplace(kRowBlock, n_);
    }
    return memory;
  }

  /// At most kRowBlock rows.
  void operator()(int64_t rows, const T* grad_y, T* grad_a, Memory& memory) const {
    const T gamma = weights_->gamma();
    const auto* bytes = static_cast<const uint8_t*>(packed_);
    switch (gradient_) {
      case Gradient::kFloat32:
        table().ternary_float_gemm(rows, k_, n_, grad_y, n_, bytes, gamma, grad_a, k_, memory.workspace.data);
        break;
      case Gradient::kBfloat16:
        table().bf16_pack_rows(rows, n_, grad_y, n_, memory.pairs.data);
        table().gemm_bf16(rows, k_, n_, {memory.pairs.data, pairs(), 1, table().bf16_panel * pairs()},
                          static_cast<const int32_t*>(packed_), gamma, grad_a, k_, /*accumulate=*/false);
        break;
      case Gradient::kInt8: {
        const ProductRows<T> g = (*memory.int8)(rows, grad_y, kSmallestGradient);
        table().ternary_gemm(rows, k_, n_, g.q, g.row_sum, g.inverse_scale, bytes, gamma, grad_a, k_);
      }
    }
  }

 private:
  static const kernels::Table<T>& table() { return kernels::table<T>(); }
  int64_t pairs() const { return (n_ + 1) / 2; }

  int64_t n_, k_;
  Gradient gradient_;
  std::shared_ptr<TernaryWeights<T>> weights_;
  const void* packed_;
};

/// The rows that entered the product, packed for a weight's gradient: blocks of kDepth rows, of which a chunk
/// is held at once. Int8 rows are packed as q where the product takes it, and 1 / s goes to grad_y.
template <class T>
class PackedRows {
 public:
  /// For chunks of up to `rows` rows.
  PackedRows(const TernaryLayer& layer, int64_t rows) : layer_(layer), gradient_(gradient_of<T>(layer)) {
    const auto& table = kernels::table<T>();
    const int64_t blocks = (rows + kDepth - 1) / kDepth;
    by_thirds_ = gradient_ == Gradient::kFloat32 && layer.int8 && table.gemm_bf16x3 != nullptr;
    if (packs_values()) {
      block_ = kDepth * round_up(layer.k, table.gemm_panel);
      values_.resize(blocks * block_);
    } else {
      block_ = gradient_ == Gradient::kInt8 ? (kDepth / 4 + 1) * round_up(layer.k, table.int8_panel)
                                            : kDepth / 2 * round_up(layer.k, table.bf16_panel);
      words_.resize(blocks * block_);
      // Without int8 rows there is nothing to make good at grad_y.
      inverse_scale_.resize(blocks * kDepth);
      std::fill_n(inverse_scale_.data, blocks * kDepth, T(1));
    }
  }

  /// Takes rows first .. last, a chunk.
  void pack(int64_t first, int64_t last) {
    rows_ = last - first;
    at::parallel_for(0, (last - first + kDepth - 1) / kDepth, 1, [&](int64_t from, int64_t to) {
      LayerRows<T> rows(layer_, kDepth);
      Scratch<T> buffer(layer_.int8 && packs_values() ? kDepth * layer_.k : 0);
      for (int64_t block = from; block < to; ++block) {
        const int64_t begin = first + block * kDepth, end = std::min(last, begin + kDepth);
        const ProductRows<T> a = rows(begin, end);
        if (layer_.int8) {
          pack_int8(end - begin, block, a, buffer.data);
        } else {
          pack_float(end - begin, block, a.values);
        }
      }
    });
  }

  /// grad_weight (N, K) = or += grad_yᵀ · a, for grad_y (rows of the chunk, N). Threads share the rows of
  /// grad_weight: no sum is split between them.
  void weight_gradient(const T* grad_y, T* grad_weight, bool accumulate) const {
    constexpr int64_t kStrip = 16;  // rows of whole tiles, and few enough to be shared evenly
    at::parallel_for(0, (layer_.n + kStrip - 1) / kStrip, 1, [&](int64_t from, int64_t to) {
      PackedGradient packed;
      const int64_t row = from * kStrip, count = std::min(layer_.n, to * kStrip) - row;
      for_row_blocks(0, rows_, kDepth, [&](int64_t begin, int64_t end) {
        multiply(begin / kDepth, end - begin, count, grad_y + begin * layer_.n + row, packed,
                 grad_weight + row * layer_.k, accumulate || begin > 0);
      });
    });
  }

 private:
  /// Memory for grad_y, one thread's.
  struct PackedGradient {
    Scratch<int32_t> strips;
    Scratch<T> scale;
  };

  /// grad (count, K) += grad_y (rows, count)ᵀ · the rows of a block; grad_y's rows lie N apart.
  void multiply(int64_t block, int64_t rows, int64_t count, const T* grad_y, PackedGradient& packed, T* grad,
                bool accumulate) const {
    const auto& table = kernels::table<T>();
    auto& [strips, scale] = packed;
    switch (gradient_) {
      case Gradient::kFloat32:
        if (by_thirds_) {
          strips.resize(3 * kDepth / 2 * round_up(count, table.bf16_panel));
          table.bf16x3_pack(rows, count, grad_y, layer_.n, inverse_scale_.data + block * kDepth, strips.data);
          table.gemm_bf16x3(count, layer_.k, rows, strips.data, words_.data + block * block_, grad, layer_.k,
                            accumulate);
        } else {
          table.gemm(count, layer_.k, rows, grad_y, /*a_row=*/1, /*a_col=*/layer_.n,
                     values_.data + block * block_, grad, layer_.k, accumulate);
        }
        break;
      case Gradient::kBfloat16: {
        const int64_t pairs = (rows + 1) / 2, panel = table.bf16_panel;
        strips.resize(kDepth / 2 * round_up(count, panel));
        table.bf16_pack(rows, count, grad_y, layer_.n, inverse_scale_.data + block * kDepth, strips.data);
        table.gemm_bf16(count, layer_.k, rows, {strips.data, 1, panel, panel * pairs},
                        words_.data + block * block_,
                        /*alpha=*/T(1), grad, layer_.k, accumulate);
        break;
      }
      case Gradient::kInt8:
        strips.resize(kDepth / 4 * round_up(count, table.int8_panel));
        scale.resize(count);
        table.int8_quantize_columns(rows, count, grad_y, layer_.n, inverse_scale_.data + block * kDepth,
                                    strips.data, scale.data);
        table.gemm_int8(count, layer_.k, rows, strips.data, scale.data, words_.data + block * block_, grad,
                        layer_.k, accumulate);
    }
  }

  /// In values_, for gemm; else in words_.
  bool packs_values() const { return gradient_ == Gradient::kFloat32 && !by_thirds_; }

  /// `buffer` is for a block of rows as floats.
  void pack_int8(int64_t rows, int64_t block, const ProductRows<T>& a, T* buffer) {
    const auto& table = kernels::table<T>();
    if (packs_values()) {
      table.dequantize_rows(rows, layer_.k, a.q, a.inverse_scale, buffer);
      return pack_float(rows, block, buffer);
    }
    std::copy_n(a.inverse_scale, rows, inverse_scale_.data + block * kDepth);
    const auto pack = gradient_ == Gradient::kInt8 ? table.int8_pack : table.bf16_pack_int8;
    pack(rows, layer_.k, a.q, kernels::quantized_width(layer_.k), words_.data + block * block_);
  }

  void pack_float(int64_t rows, int64_t block, const T* a) {
    const auto& table = kernels::table<T>();
    if (packs_values()) {
      table.gemm_pack(rows, layer_.k, a, /*row_stride=*/layer_.k, /*col_stride=*/1,
                      values_.data + block * block_);
    } else {
      table.bf16_pack(rows, layer_.k, a, layer_.k, /*factor=*/nullptr, words_.data + block * block_);
    }
  }

  const TernaryLayer& layer_;
  Gradient gradient_;
  bool by_thirds_;  // float32 times int8, with no more rounding than elsewhere
  int64_t block_;   // elements of a packed block
  int64_t rows_ = 0;
  Scratch<int32_t> words_;
  Scratch<T> values_, inverse_scale_;
};

}  // namespace flashlm

// SPDX-License-Identifier: Apache-2.0
// The public operator is a composite over _bit_linear_forward, which also returns the int8 rows that a
// backward pass needs, if there will be one. Rows are normed, quantized and multiplied a block at a time, in
// cache.
#include "ops/bit_linear.h"

#include "ops/common.h"
#include "ops/ternary_weights.h"

namespace flashlm {

TORCH_LIBRARY_FRAGMENT(flashlm, m) {
  m.def(
      "bit_linear(Tensor x, Tensor weight, Tensor? norm_scale=None, *, str quantizer=\"absmean\", "
      "str activation=\"int8\", float eps=1e-6, str gradient=\"float32\") -> Tensor",
      {at::Tag::pt2_compliant_tag});
  m.def(
      "_bit_linear_forward(Tensor x, Tensor weight, Tensor? norm_scale, str quantizer, str activation, "
      "float eps, str gradient, bool with_rows) -> (Tensor y, Tensor q, Tensor inverse_scale)",
      {at::Tag::pt2_compliant_tag});
  m.def(
      "_bit_linear_backward(Tensor grad_y, Tensor? x, Tensor? q, Tensor? inverse_scale, Tensor weight, "
      "Tensor? norm_scale, str quantizer, str activation, float eps, str gradient, bool[3] output_mask) "
      "-> (Tensor, Tensor, Tensor)",
      {at::Tag::pt2_compliant_tag});
}

at::Tensor bit_linear(const at::Tensor& x, const at::Tensor& weight,
                      const std::optional<at::Tensor>& norm_scale, std::string_view quantizer,
                      std::string_view activation, double eps, std::string_view gradient) {
  static const auto op =
      c10::Dispatcher::singleton().findSchemaOrThrow("flashlm::bit_linear", "").typed<decltype(bit_linear)>();
  return op.call(x, weight, norm_scale, quantizer, activation, eps, gradient);
}

namespace {

using kernels::Quantizer;
using OptionalTensor = std::optional<at::Tensor>;
using ThreeTensors = std::tuple<at::Tensor, at::Tensor, at::Tensor>;

ThreeTensors forward(const at::Tensor& x, const at::Tensor& weight, const OptionalTensor& norm_scale,
                     std::string_view quantizer, std::string_view activation, double eps,
                     std::string_view gradient, bool with_rows) {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("flashlm::_bit_linear_forward", "")
                             .typed<decltype(forward)>();
  return op.call(x, weight, norm_scale, quantizer, activation, eps, gradient, with_rows);
}

ThreeTensors backward(const at::Tensor& grad_y, const OptionalTensor& x, const OptionalTensor& q,
                      const OptionalTensor& inverse_scale, const at::Tensor& weight,
                      const OptionalTensor& norm_scale, std::string_view quantizer,
                      std::string_view activation, double eps, std::string_view gradient,
                      std::array<bool, 3> output_mask) {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("flashlm::_bit_linear_backward", "")
                             .typed<decltype(backward)>();
  return op.call(grad_y, x, q, inverse_scale, weight, norm_scale, quantizer, activation, eps, gradient,
                 output_mask);
}

at::Tensor composite(const at::Tensor& x, const at::Tensor& weight, const OptionalTensor& norm_scale,
                     std::string_view quantizer, std::string_view activation, double eps,
                     std::string_view gradient) {
  // Without a norm the backward reads the int8 rows, a quarter of x, which may then be freed. With one it
  // needs x itself, and quantizes again.
  const bool needs_gradient = at::GradMode::is_enabled() && (x.requires_grad() || weight.requires_grad());
  const bool with_rows =
      needs_gradient && parse_activation("bit_linear", activation) && !norm_scale.has_value();
  return std::get<0>(forward(x, weight, norm_scale, quantizer, activation, eps, gradient, with_rows));
}

/// What the products of the backward multiply.
enum class Gradient { kFloat32, kBfloat16, kInt8 };

Gradient parse_gradient(std::string_view name) {
  TORCH_CHECK(name == "float32" || name == "bfloat16" || name == "int8",
              "bit_linear: gradient must be 'float32', 'bfloat16' or 'int8', got '", name, "'");
  return name == "int8" ? Gradient::kInt8 : name == "bfloat16" ? Gradient::kBfloat16 : Gradient::kFloat32;
}

void check_arguments(const at::Tensor& x, const at::Tensor& weight, const OptionalTensor& norm_scale,
                     std::string_view quantizer, std::string_view activation, double eps,
                     std::string_view gradient) {
  check_floating("bit_linear", "x", x);
  check_same_dtype("bit_linear", "weight", weight, x);
  TORCH_CHECK(x.dim() >= 1, "bit_linear: x must have at least 1 dimension, got 0");
  check_dim("bit_linear", "weight", weight, 2);
  const c10::SymInt in = weight.sym_size(1);
  TORCH_SYM_CHECK(in.sym_ge(1), "bit_linear: weight's in must be at least 1, got ", in);
  TORCH_SYM_CHECK(x.sym_size(-1).sym_eq(in), "bit_linear: x's last dimension must be weight's in = ", in,
                  ", got ", x.sym_size(-1));
  if (norm_scale) {
    check_same_dtype("bit_linear", "norm_scale", *norm_scale, x);
    check_dim("bit_linear", "norm_scale", *norm_scale, 1);
    check_size("bit_linear", "norm_scale's size", norm_scale->sym_size(0), in);
  }
  parse_quantizer("bit_linear", quantizer);
  const bool int8 = parse_activation("bit_linear", activation);
  if (int8) {
    constexpr int64_t kLargestIn = (int64_t{1} << 24) - 1;
    TORCH_SYM_CHECK(in.sym_le(kLargestIn), "bit_linear: weight's in must be at most ", kLargestIn,
                    " in activation mode 'int8', where sums are int32, got ", in, "; use activation 'none'");
  }
  TORCH_CHECK(eps >= 0, "bit_linear: eps must be >= 0, got ", eps);
  const bool int8_gradient = parse_gradient(gradient) == Gradient::kInt8;
  TORCH_CHECK(int8 || !int8_gradient, "bit_linear: gradient 'int8' needs activation 'int8', got '",
              activation, "'");
}

/// Checks the arguments and makes the outputs: the Meta kernel, and the CPU kernel's first line.
ThreeTensors new_outputs(const at::Tensor& x, const at::Tensor& weight, const OptionalTensor& norm_scale,
                         std::string_view quantizer, std::string_view activation, double eps,
                         std::string_view gradient, bool with_rows) {
  check_arguments(x, weight, norm_scale, quantizer, activation, eps, gradient);
  TORCH_CHECK(!with_rows || (parse_activation("bit_linear", activation) && !norm_scale),
              "_bit_linear_forward: with_rows needs activation 'int8' and no norm_scale");
  auto shape = x.sym_sizes().vec();
  shape.back() = weight.sym_size(0);
  const at::Tensor y = x.new_empty_symint(shape);
  const c10::SymInt in = weight.sym_size(1), rows = with_rows ? x.sym_numel() / in : c10::SymInt(0);
  return {y, x.new_empty_symint({rows, (in + 63) / 64 * 64}, x.options().dtype(at::kChar)),
          x.new_empty_symint({rows}, x.options().dtype(compute_dtype(x)))};
}

/// Rows that are normed and quantized together, in buffers that stay in cache until the product reads them; a
/// multiple of every tile's rows.
constexpr int64_t kRowBlock = 96;
/// The least max|row| that a gradient's scale is made for: its inverse is a float.
constexpr double kSmallestGradient = 1e-35;
/// Rows over which grad_weight is summed before the sum goes to memory.
constexpr int64_t kDepth = 256;
/// Rows whose packed form is held at once for grad_weight.
constexpr int64_t kChunkRows = 16 * kDepth;

/// body(begin, end) for consecutive blocks of at most `block` rows.
template <class Body>
void for_row_blocks(int64_t begin, int64_t end, int64_t block, const Body& body) {
  for (int64_t r = begin; r < end; r += block) body(r, std::min(end, r + block));
}

/// The tensors of a call as the kernels read them. x (M, K), norm_scale, q (M, quantized_width(K)) and
/// inverse_scale (M) may be undefined; where the backward has no x, it has q and inverse_scale.
struct Inputs {
  at::Tensor x, weight, norm_scale, q, inverse_scale;
  int64_t m, n, k;
  double eps;
  bool int8;
  Quantizer quantizer;
  Gradient gradient = Gradient::kFloat32;  // as asked for
};

template <class T>
const T* data_or_null(const at::Tensor& t) {
  return t.defined() ? t.const_data_ptr<T>() : nullptr;
}

/// The rows that enter the quantizer: x's own, or a block of them normed into a buffer.
template <class T>
class NormedRows {
 public:
  NormedRows(const Inputs& in, int64_t block)
      : in_(in), buffer_(in.norm_scale.defined() ? block * in.k : 0) {}

  /// Rows begin .. end, at most a block, until the next call.
  const T* operator()(int64_t begin, int64_t end) {
    const T* x = in_.x.const_data_ptr<T>() + begin * in_.k;
    if (!in_.norm_scale.defined()) return x;
    kernels::table<T>().rms_norm(end - begin, in_.k, x, in_.norm_scale.const_data_ptr<T>(),
                                 static_cast<T>(in_.eps), buffer_.data);
    return buffer_.data;
  }

 private:
  const Inputs& in_;
  Scratch<T> buffer_;
};

/// Rows in int8: q, each row's inverse_scale, each row's sum of q.
template <class T>
struct Int8Rows {
  const int8_t* q;
  const T* inverse_scale;
  const int32_t* row_sum;
};

/// Makes Int8Rows of up to a block of rows; where they are to be kept, in place.
template <class T>
class Quantizing {
 public:
  Quantizing(const Inputs& in, int64_t block)
      : in_(in),
        rows_(in, block),
        q_(in.q.defined() ? 0 : block * kernels::quantized_width(in.k)),
        inverse_scale_(in.q.defined() ? 0 : block),
        row_sum_(block) {}

  Int8Rows<T> operator()(int64_t begin, int64_t end) {
    const bool kept = in_.q.defined();
    int8_t* q = kept ? in_.q.mutable_data_ptr<int8_t>() + begin * in_.q.size(1) : q_.data;
    T* inverse_scale = kept ? in_.inverse_scale.mutable_data_ptr<T>() + begin : inverse_scale_.data;
    kernels::table<T>().quantize_rows(end - begin, in_.k, rows_(begin, end), kSmallestActivation, q,
                                      inverse_scale, row_sum_.data);
    return {q, inverse_scale, row_sum_.data};
  }

 private:
  const Inputs& in_;
  NormedRows<T> rows_;
  Scratch<int8_t> q_;
  Scratch<T> inverse_scale_;
  Scratch<int32_t> row_sum_;
};

// ---- forward ----

/// Rows from which on sum tables are worth building, where int8 rows have them.
constexpr int64_t kFewestTableRows = 24;

template <class T>
void forward_int8(const Inputs& in, const at::Tensor& weight, T* y) {
  const auto& table = kernels::table<T>();
  const bool by_sum_table = table.sum_table_gemm_int8 != nullptr && in.m >= kFewestTableRows;
  const auto weights = ternary_weights<T>(weight, in.quantizer);
  const auto* packed = static_cast<const uint8_t*>(
      weights->packed(by_sum_table ? TernaryLayout::kFloat : TernaryLayout::kInt8, weight));
  at::parallel_for(0, in.m, kRowBlock, [&](int64_t first, int64_t last) {
    Quantizing<T> quantized(in, kRowBlock);
    Scratch<uint8_t> workspace(by_sum_table ? table.sum_table_int8_workspace_size(in.n, in.k) : 0);
    for_row_blocks(first, last, kRowBlock, [&](int64_t begin, int64_t end) {
      const Int8Rows<T> a = quantized(begin, end);
      T* to = y + begin * in.n;
      if (by_sum_table) {
        table.sum_table_gemm_int8(end - begin, in.n, in.k, a.q, a.inverse_scale, packed, weights->gamma(), to,
                                  in.n, workspace.data);
      } else {
        table.ternary_gemm(end - begin, in.n, in.k, a.q, a.row_sum, a.inverse_scale, packed, weights->gamma(),
                           to, in.n);
      }
    });
  });
}

/// y (rows, outputs) = gamma · x (rows, depth) · Qᵀ, or Q transposed, with x as it is.
template <class T>
class FloatProduct {
 public:
  FloatProduct(int64_t outputs, int64_t depth, const void* packed, T gamma)
      : outputs_(outputs),
        depth_(depth),
        packed_(static_cast<const uint8_t*>(packed)),
        gamma_(gamma),
        workspace_(kernels::table<T>().ternary_float_workspace_size(outputs, depth)) {}

  void operator()(int64_t rows, const T* x, T* y) {
    kernels::table<T>().ternary_float_gemm(rows, outputs_, depth_, x, depth_, packed_, gamma_, y, outputs_,
                                           workspace_.data);
  }

 private:
  int64_t outputs_, depth_;
  const uint8_t* packed_;
  T gamma_;
  Scratch<uint8_t> workspace_;
};

template <class T>
void forward_float(const Inputs& in, const at::Tensor& weight, T* y) {
  const auto weights = ternary_weights<T>(weight, in.quantizer);
  const void* packed = weights->packed(TernaryLayout::kFloat, weight);
  at::parallel_for(0, in.m, kRowBlock, [&](int64_t first, int64_t last) {
    NormedRows<T> rows(in, kRowBlock);
    FloatProduct<T> product(in.n, in.k, packed, weights->gamma());
    for_row_blocks(first, last, kRowBlock, [&](int64_t begin, int64_t end) {
      product(end - begin, rows(begin, end), y + begin * in.n);
    });
  });
}

ThreeTensors forward_cpu(const at::Tensor& x, const at::Tensor& weight, const OptionalTensor& norm_scale,
                         std::string_view quantizer, std::string_view activation, double eps,
                         std::string_view gradient, bool with_rows) {
  auto out = new_outputs(x, weight, norm_scale, quantizer, activation, eps, gradient, with_rows);
  auto& [y, q, inverse_scale] = out;
  if (x.numel() == 0 || y.numel() == 0) {
    q.zero_();
    inverse_scale.zero_();
    return out;
  }
  Inputs in;
  in.k = weight.size(1), in.n = weight.size(0), in.m = x.numel() / in.k;
  in.x = kernel_input(x, x).view({in.m, in.k});
  if (norm_scale) in.norm_scale = kernel_input(*norm_scale, x);
  if (q.size(0) > 0) in.q = q, in.inverse_scale = inverse_scale;
  in.eps = eps;
  in.int8 = parse_activation("bit_linear", activation);
  in.quantizer = parse_quantizer("bit_linear", quantizer);
  const at::Tensor computed = kernel_output(y);
  dispatch(x, [&](auto t) {
    using T = decltype(t);
    (in.int8 ? forward_int8<T> : forward_float<T>)(in, weight, computed.mutable_data_ptr<T>());
  });
  y = computed.to(y.scalar_type());
  return out;
}

// ---- backward ----

ThreeTensors new_gradients(const at::Tensor& grad_y, const OptionalTensor& x, const OptionalTensor& q,
                           const OptionalTensor& inverse_scale, const at::Tensor& weight,
                           const OptionalTensor& norm_scale, std::string_view quantizer,
                           std::string_view activation, double eps, std::string_view gradient,
                           std::array<bool, 3> output_mask) {
  check_same_dtype("_bit_linear_backward", "grad_y", grad_y, weight);
  TORCH_CHECK(x.has_value() != (q.has_value() && inverse_scale.has_value()),
              "_bit_linear_backward: needs either x, or q and inverse_scale");
  auto shape = grad_y.sym_sizes().vec();
  shape.back() = weight.sym_size(1);
  const at::Tensor grad_x = weight.new_empty_symint(shape);
  check_arguments(x ? *x : grad_x, weight, norm_scale, quantizer, activation, eps, gradient);
  const auto if_wanted = [&](size_t i, const at::Tensor& like) {
    return output_mask[i] ? like.new_empty_symint(like.sym_sizes()) : no_grad();
  };
  return {output_mask[0] ? grad_x : no_grad(), if_wanted(1, weight),
          norm_scale ? if_wanted(2, *norm_scale) : no_grad()};
}

/// What this CPU has of what was asked for; where it lacks it, and in float64, the exact one.
template <class T>
Gradient gradient_of(const Inputs& in) {
  const auto& table = kernels::table<T>();
  const bool has_it = in.gradient == Gradient::kInt8 ? table.int8_panel > 0 : table.bf16_panel > 0;
  return has_it ? in.gradient : Gradient::kFloat32;
}

TernaryLayout backward_layout(Gradient gradient) {
  return gradient == Gradient::kInt8       ? TernaryLayout::kInt8Transposed
         : gradient == Gradient::kBfloat16 ? TernaryLayout::kBf16Transposed
                                           : TernaryLayout::kFloatTransposed;
}

/// grad_n (rows, K) = grad_y (rows, N) · (gamma Q), for one thread.
template <class T>
class ProductWithWeights {
 public:
  ProductWithWeights(const Inputs& in, const void* packed, T gamma)
      : in_(in), gradient_(gradient_of<T>(in)), packed_(packed), gamma_(gamma) {
    switch (gradient_) {
      case Gradient::kFloat32:
        sums_.emplace(in.k, in.n, packed, gamma);
        break;
      case Gradient::kBfloat16:
        pairs_.resize(kRowBlock * pairs());
        break;
      case Gradient::kInt8:
        q_.resize(kRowBlock * kernels::quantized_width(in.n));
        inverse_scale_.resize(kRowBlock);
        row_sum_.resize(kRowBlock);
    }
  }

  /// At most kRowBlock rows.
  void operator()(int64_t rows, const T* grad_y, T* grad_n) {
    const auto& table = kernels::table<T>();
    switch (gradient_) {
      case Gradient::kFloat32:
        (*sums_)(rows, grad_y, grad_n);
        break;
      case Gradient::kBfloat16:
        table.bf16_pack_rows(rows, in_.n, grad_y, in_.n, pairs_.data);
        table.gemm_bf16(rows, in_.k, in_.n, {pairs_.data, pairs(), 1, table.bf16_panel * pairs()},
                        static_cast<const int32_t*>(packed_), gamma_, grad_n, in_.k, /*accumulate=*/false);
        break;
      case Gradient::kInt8:
        table.quantize_rows(rows, in_.n, grad_y, kSmallestGradient, q_.data, inverse_scale_.data,
                            row_sum_.data);
        table.ternary_gemm(rows, in_.k, in_.n, q_.data, row_sum_.data, inverse_scale_.data,
                           static_cast<const uint8_t*>(packed_), gamma_, grad_n, in_.k);
    }
  }

 private:
  int64_t pairs() const { return (in_.n + 1) / 2; }

  const Inputs& in_;
  Gradient gradient_;
  const void* packed_;
  T gamma_;
  std::optional<FloatProduct<T>> sums_;
  Scratch<int32_t> pairs_, row_sum_;
  Scratch<int8_t> q_;
  Scratch<T> inverse_scale_;
};

/// grad_x, and through the norm if there is one.
template <class T>
void backward_x(const Inputs& in, const at::Tensor& weight, const T* grad_y, T* grad_x, T* grad_norm_scale) {
  const auto weights = ternary_weights<T>(weight, in.quantizer);
  const void* packed = weights->packed(backward_layout(gradient_of<T>(in)), weight);
  if (!in.norm_scale.defined()) {
    at::parallel_for(0, in.m, kRowBlock, [&](int64_t first, int64_t last) {
      ProductWithWeights<T> product(in, packed, weights->gamma());
      for_row_blocks(first, last, kRowBlock, [&](int64_t begin, int64_t end) {
        product(end - begin, grad_y + begin * in.n, grad_x + begin * in.k);
      });
    });
    return;
  }
  sum_over_rows(in.m, in.k, grad_norm_scale, [&](int64_t first, int64_t last, T* partial) {
    ProductWithWeights<T> product(in, packed, weights->gamma());
    Scratch<T> grad_n(kRowBlock * in.k);
    for_row_blocks(first, last, kRowBlock, [&](int64_t begin, int64_t end) {
      product(end - begin, grad_y + begin * in.n, grad_n.data);
      kernels::table<T>().rms_norm_backward(
          end - begin, in.k, grad_n.data, in.x.const_data_ptr<T>() + begin * in.k,
          in.norm_scale.const_data_ptr<T>(), static_cast<T>(in.eps), grad_x + begin * in.k, partial);
    });
  });
}

/// The rows that entered the product, packed for grad_weight = grad_yᵀ · a: blocks of kDepth rows, of which
/// a chunk is held at once. Int8 rows are packed as q where the product takes it, and 1 / s goes to grad_y.
template <class T>
class PackedRows {
 public:
  explicit PackedRows(const Inputs& in) : in_(in), gradient_(gradient_of<T>(in)) {
    const auto& table = kernels::table<T>();
    const int64_t blocks = (std::min(in.m, kChunkRows) + kDepth - 1) / kDepth;
    by_thirds_ = gradient_ == Gradient::kFloat32 && in.int8 && table.gemm_bf16x3 != nullptr;
    if (packs_values()) {
      block_ = kDepth * round_up(in.k, table.gemm_panel);
      values_.resize(blocks * block_);
    } else {
      block_ = gradient_ == Gradient::kInt8 ? (kDepth / 4 + 1) * round_up(in.k, table.int8_panel)
                                            : kDepth / 2 * round_up(in.k, table.bf16_panel);
      words_.resize(blocks * block_);
      // Without int8 rows there is nothing to make good at grad_y.
      inverse_scale_.resize(blocks * kDepth);
      std::fill_n(inverse_scale_.data, blocks * kDepth, T(1));
    }
  }

  /// Takes rows first .. last, a chunk.
  void pack(int64_t first, int64_t last) {
    at::parallel_for(0, (last - first + kDepth - 1) / kDepth, 1, [&](int64_t from, int64_t to) {
      NormedRows<T> normed(in_, kDepth);
      Quantizing<T> quantized(in_, kDepth);
      Scratch<T> buffer(in_.int8 && packs_values() ? kDepth * in_.k : 0);
      for (int64_t block = from; block < to; ++block) {
        const int64_t begin = first + block * kDepth, end = std::min(last, begin + kDepth);
        if (in_.int8) {
          pack_int8(end - begin, block, int8_rows(begin, end, quantized), buffer.data);
        } else {
          pack_float(end - begin, block, normed(begin, end));
        }
      }
    });
  }

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
          table.bf16x3_pack(rows, count, grad_y, in_.n, inverse_scale_.data + block * kDepth, strips.data);
          table.gemm_bf16x3(count, in_.k, rows, strips.data, words_.data + block * block_, grad, in_.k,
                            accumulate);
        } else {
          table.gemm(count, in_.k, rows, grad_y, /*a_row=*/1, /*a_col=*/in_.n, values_.data + block * block_,
                     grad, in_.k, accumulate);
        }
        break;
      case Gradient::kBfloat16: {
        const int64_t pairs = (rows + 1) / 2, panel = table.bf16_panel;
        strips.resize(kDepth / 2 * round_up(count, panel));
        table.bf16_pack(rows, count, grad_y, in_.n, inverse_scale_.data + block * kDepth, strips.data);
        table.gemm_bf16(count, in_.k, rows, {strips.data, 1, panel, panel * pairs},
                        words_.data + block * block_,
                        /*alpha=*/T(1), grad, in_.k, accumulate);
        break;
      }
      case Gradient::kInt8:
        strips.resize(kDepth / 4 * round_up(count, table.int8_panel));
        scale.resize(count);
        table.int8_quantize_columns(rows, count, grad_y, in_.n, inverse_scale_.data + block * kDepth,
                                    strips.data, scale.data);
        table.gemm_int8(count, in_.k, rows, strips.data, scale.data, words_.data + block * block_, grad,
                        in_.k, accumulate);
    }
  }

 private:
  /// In values_, for gemm; else in words_.
  bool packs_values() const { return gradient_ == Gradient::kFloat32 && !by_thirds_; }

  /// Kept by the forward, or quantized again.
  Int8Rows<T> int8_rows(int64_t begin, int64_t end, Quantizing<T>& quantized) const {
    if (in_.x.defined()) return quantized(begin, end);
    return {in_.q.const_data_ptr<int8_t>() + begin * in_.q.size(1),
            in_.inverse_scale.const_data_ptr<T>() + begin, nullptr};
  }

  /// `buffer` is for a block of rows as floats.
  void pack_int8(int64_t rows, int64_t block, const Int8Rows<T>& a, T* buffer) {
    const auto& table = kernels::table<T>();
    if (packs_values()) {
      table.dequantize_rows(rows, in_.k, a.q, a.inverse_scale, buffer);
      return pack_float(rows, block, buffer);
    }
    std::copy_n(a.inverse_scale, rows, inverse_scale_.data + block * kDepth);
    const auto pack = gradient_ == Gradient::kInt8 ? table.int8_pack : table.bf16_pack_int8;
    pack(rows, in_.k, a.q, kernels::quantized_width(in_.k), words_.data + block * block_);
  }

  void pack_float(int64_t rows, int64_t block, const T* a) {
    const auto& table = kernels::table<T>();
    if (packs_values()) {
      table.gemm_pack(rows, in_.k, a, /*row_stride=*/in_.k, /*col_stride=*/1, values_.data + block * block_);
    } else {
      table.bf16_pack(rows, in_.k, a, in_.k, /*factor=*/nullptr, words_.data + block * block_);
    }
  }

  const Inputs& in_;
  Gradient gradient_;
  bool by_thirds_;  // float32 times int8, with no more rounding than elsewhere
  int64_t block_;   // elements of a packed block
  Scratch<int32_t> words_;
  Scratch<T> values_, inverse_scale_;
};

/// grad_weight = grad_yᵀ · a. Threads share the rows of grad_weight: no sum is split between them.
template <class T>
void backward_weight(const Inputs& in, const T* grad_y, T* grad_weight) {
  constexpr int64_t kStrip = 16;  // rows of whole tiles, and few enough to be shared evenly
  PackedRows<T> a(in);
  for_row_blocks(0, in.m, kChunkRows, [&](int64_t first, int64_t last) {
    a.pack(first, last);
    at::parallel_for(0, (in.n + kStrip - 1) / kStrip, 1, [&](int64_t from, int64_t to) {
      typename PackedRows<T>::PackedGradient packed;
      const int64_t row = from * kStrip, count = std::min(in.n, to * kStrip) - row;
      for_row_blocks(first, last, kDepth, [&](int64_t begin, int64_t end) {
        a.multiply((begin - first) / kDepth, end - begin, count, grad_y + begin * in.n + row, packed,
                   grad_weight + row * in.k, /*accumulate=*/begin > 0);
      });
    });
  });
}

ThreeTensors backward_cpu(const at::Tensor& grad_y, const OptionalTensor& x, const OptionalTensor& q,
                          const OptionalTensor& inverse_scale, const at::Tensor& weight,
                          const OptionalTensor& norm_scale, std::string_view quantizer,
                          std::string_view activation, double eps, std::string_view gradient,
                          std::array<bool, 3> output_mask) {
  auto out = new_gradients(grad_y, x, q, inverse_scale, weight, norm_scale, quantizer, activation, eps,
                           gradient, output_mask);
  auto& [grad_x, grad_weight, grad_norm_scale] = out;
  if (grad_y.numel() == 0) {
    for (at::Tensor* grad : {&grad_x, &grad_weight, &grad_norm_scale}) {
      if (grad->defined()) grad->zero_();
    }
    return out;
  }
  Inputs in;
  in.k = weight.size(1), in.n = weight.size(0), in.m = grad_y.numel() / in.n;
  if (x) in.x = kernel_input(*x, *x).view({in.m, in.k});
  if (norm_scale) in.norm_scale = kernel_input(*norm_scale, weight);
  if (q) in.q = q->contiguous(), in.inverse_scale = inverse_scale->contiguous();
  in.eps = eps;
  in.int8 = parse_activation("bit_linear", activation);
  in.quantizer = parse_quantizer("bit_linear", quantizer);
  in.gradient = parse_gradient(gradient);
  const at::Tensor g = kernel_input(grad_y, weight);
  const bool needs_x = grad_x.defined() || grad_norm_scale.defined();
  const at::Tensor dx = grad_x.defined() ? kernel_output(grad_x)
                        : needs_x        ? at::empty({in.m, in.k}, g.options())
                                         : no_grad();
  const at::Tensor dw = grad_weight.defined() ? kernel_output(grad_weight) : no_grad();
  const at::Tensor dscale = norm_scale ? at::empty(norm_scale->sizes(), g.options()) : no_grad();
  dispatch(weight, [&](auto t) {
    using T = decltype(t);
    if (needs_x) {
      backward_x<T>(in, weight, g.const_data_ptr<T>(), dx.mutable_data_ptr<T>(),
                    dscale.defined() ? dscale.mutable_data_ptr<T>() : nullptr);
    }
    if (dw.defined()) backward_weight<T>(in, g.const_data_ptr<T>(), dw.mutable_data_ptr<T>());
  });
  const auto dtype = weight.scalar_type();
  if (grad_x.defined()) grad_x = dx.to(dtype);
  if (grad_weight.defined()) grad_weight = dw.to(dtype);
  if (grad_norm_scale.defined()) grad_norm_scale = dscale.to(dtype);
  return out;
}

// ---- autograd ----

struct BitLinear : torch::autograd::Function<BitLinear> {
  static torch::autograd::variable_list forward(torch::autograd::AutogradContext* ctx, const at::Tensor& x,
                                                const at::Tensor& weight, const OptionalTensor& norm_scale,
                                                const std::string& quantizer, const std::string& activation,
                                                double eps, const std::string& gradient, bool with_rows) {
    at::AutoDispatchBelowADInplaceOrView guard;
    auto [y, q, inverse_scale] =
        flashlm::forward(x, weight, norm_scale, quantizer, activation, eps, gradient, with_rows);
    ctx->mark_non_differentiable({q, inverse_scale});
    ctx->set_materialize_grads(false);  // else backward gets zeros of q's size
    ctx->save_for_backward({with_rows ? at::Tensor() : x, with_rows ? q : at::Tensor(),
                            with_rows ? inverse_scale : at::Tensor(), weight,
                            norm_scale.value_or(at::Tensor())});
    ctx->saved_data["quantizer"] = quantizer;
    ctx->saved_data["activation"] = activation;
    ctx->saved_data["eps"] = eps;
    ctx->saved_data["gradient"] = gradient;
    return {y, q, inverse_scale};
  }

  static torch::autograd::variable_list backward(torch::autograd::AutogradContext* ctx,
                                                 const torch::autograd::variable_list& grads) {
    if (!grads[0].defined()) return torch::autograd::variable_list(8);
    const auto saved = ctx->get_saved_variables();
    const auto optional = [&](size_t i) {
      return saved[i].defined() ? OptionalTensor(saved[i]) : std::nullopt;
    };
    auto& data = ctx->saved_data;
    // A missing norm_scale is not counted by needs_input_grad.
    auto [grad_x, grad_weight, grad_norm_scale] = flashlm::backward(
        grads[0], optional(0), optional(1), optional(2), saved[3], optional(4),
        data["quantizer"].toStringView(), data["activation"].toStringView(), data["eps"].toDouble(),
        data["gradient"].toStringView(),
        {ctx->needs_input_grad(0), ctx->needs_input_grad(1), saved[4].defined() && ctx->needs_input_grad(2)});
    return {grad_x, grad_weight, grad_norm_scale, no_grad(), no_grad(), no_grad(), no_grad(), no_grad()};
  }
};

ThreeTensors forward_autograd(const at::Tensor& x, const at::Tensor& weight, const OptionalTensor& norm_scale,
                              std::string_view quantizer, std::string_view activation, double eps,
                              std::string_view gradient, bool with_rows) {
  auto out = BitLinear::apply(x, weight, norm_scale, std::string(quantizer), std::string(activation), eps,
                              std::string(gradient), with_rows);
  return {out[0], out[1], out[2]};
}

}  // namespace

TORCH_LIBRARY_IMPL(flashlm, CompositeImplicitAutograd, m) { m.impl("bit_linear", composite); }
TORCH_LIBRARY_IMPL(flashlm, CPU, m) {
  m.impl("_bit_linear_forward", forward_cpu);
  m.impl("_bit_linear_backward", backward_cpu);
}
TORCH_LIBRARY_IMPL(flashlm, Meta, m) {
  m.impl("_bit_linear_forward", new_outputs);
  m.impl("_bit_linear_backward", new_gradients);
}
TORCH_LIBRARY_IMPL(flashlm, Autograd, m) {
  m.impl("_bit_linear_forward", forward_autograd);
  m.impl("_bit_linear_backward", torch::autograd::autogradNotImplementedFallback());
}

}  // namespace flashlm

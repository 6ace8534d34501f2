// SPDX-License-Identifier: Apache-2.0
#include "ops/bit_linear.h"

#include <cmath>
#include <limits>

#include "ops/common.h"

namespace flashlm {

TORCH_LIBRARY_FRAGMENT(flashlm, m) {
  m.def(
      "bit_linear(Tensor x, Tensor weight, Tensor? norm_scale=None, *, str quantizer=\"absmean\", "
      "str activation=\"int8\", float eps=1e-6) -> Tensor",
      {at::Tag::pt2_compliant_tag});
  m.def(
      "_bit_linear_backward(Tensor grad_y, Tensor x, Tensor weight, Tensor? norm_scale, str quantizer, "
      "str activation, float eps) -> (Tensor, Tensor, Tensor)",
      {at::Tag::pt2_compliant_tag});
}

at::Tensor bit_linear(const at::Tensor& x, const at::Tensor& weight,
                      const std::optional<at::Tensor>& norm_scale, std::string_view quantizer,
                      std::string_view activation, double eps) {
  static const auto op =
      c10::Dispatcher::singleton().findSchemaOrThrow("flashlm::bit_linear", "").typed<decltype(bit_linear)>();
  return op.call(x, weight, norm_scale, quantizer, activation, eps);
}

namespace {

using kernels::Quantizer;
using Gradients = std::tuple<at::Tensor, at::Tensor, at::Tensor>;

Gradients bit_linear_backward(const at::Tensor& grad_y, const at::Tensor& x, const at::Tensor& weight,
                              const std::optional<at::Tensor>& norm_scale, std::string_view quantizer,
                              std::string_view activation, double eps) {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("flashlm::_bit_linear_backward", "")
                             .typed<decltype(bit_linear_backward)>();
  return op.call(grad_y, x, weight, norm_scale, quantizer, activation, eps);
}

Quantizer parse_quantizer(std::string_view name) {
  TORCH_CHECK(name == "absmean" || name == "threshold",
              "bit_linear: quantizer must be 'absmean' or 'threshold', got '", name, "'");
  return name == "absmean" ? Quantizer::kAbsmean : Quantizer::kThreshold;
}

/// Whether activations are quantized.
bool parse_activation(std::string_view name) {
  TORCH_CHECK(name == "int8" || name == "none", "bit_linear: activation must be 'int8' or 'none', got '",
              name, "'");
  return name == "int8";
}

/// Checks the arguments and makes the output: the Meta kernel, and the CPU kernel's first line.
at::Tensor new_output(const at::Tensor& x, const at::Tensor& weight,
                      const std::optional<at::Tensor>& norm_scale, std::string_view quantizer,
                      std::string_view activation, double eps) {
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
  parse_quantizer(quantizer);
  if (parse_activation(activation)) {
    constexpr int64_t kLargestIn = (int64_t{1} << 24) - 1;
    TORCH_SYM_CHECK(in.sym_le(kLargestIn), "bit_linear: weight's in must be at most ", kLargestIn,
                    " in activation mode 'int8', where sums are int32, got ", in, "; use activation 'none'");
  }
  TORCH_CHECK(eps >= 0, "bit_linear: eps must be >= 0, got ", eps);
  auto shape = x.sym_sizes().vec();
  shape.back() = weight.sym_size(0);
  return x.new_empty_symint(shape);
}

/// Rows that are normed and quantized together, in buffers that stay in cache until the product reads them.
constexpr int64_t kRowBlock = 64;

/// body(begin, end) for consecutive blocks of at most kRowBlock rows.
template <class Body>
void for_row_blocks(int64_t begin, int64_t end, const Body& body) {
  for (int64_t r = begin; r < end; r += kRowBlock) body(r, std::min(end, r + kRowBlock));
}

int64_t round_up(int64_t n, int64_t multiple) { return (n + multiple - 1) / multiple * multiple; }

/// body(first, last) for whole panels of a packed matrix of `width` columns, in parallel.
template <class Body>
void for_panels(int64_t width, int64_t panel, int64_t depth, const Body& body) {
  at::parallel_for(0, round_up(width, panel) / panel, row_grain(panel * depth),
                   [&](int64_t begin, int64_t end) {
                     for (int64_t p = begin; p < end; ++p) body(p * panel, std::min(width, (p + 1) * panel));
                   });
}

/// The rule behind both quantizers: Q = 1 above bound, -1 below -bound, else 0. For absmean, round(w / gamma)
/// is not 0 just where |w| > gamma / 2 (a tie rounds to 0), in floating point too.
template <class T>
struct Scale {
  T gamma;
  T bound;
};

template <class T>
Scale<T> weight_scale(const at::Tensor& weight, Quantizer quantizer) {
  const T* w = weight.const_data_ptr<T>();
  double sum = 0;
  sum_over_rows(weight.numel(), 1, &sum, [&](int64_t begin, int64_t end, double* partial) {
    *partial += kernels::table<T>().abs_sum(end - begin, w + begin);
  });
  const T mean = static_cast<T>(sum / static_cast<double>(weight.numel()));
  // No weight is above a bound of NaN: without this, one broken weight would silence the layer.
  if (!std::isfinite(mean)) return {std::numeric_limits<T>::quiet_NaN(), mean};
  if (quantizer == Quantizer::kThreshold) return {T(1), mean};
  const T gamma = std::max(mean, T(1e-5));
  return {gamma, gamma / 2};
}

/// The (k, n) matrix B(i, j) = gamma Q(i * row_stride + j * col_stride) as kernels::gemm takes it: packed
/// first, quantized in place.
template <class T>
at::Tensor pack_values(int64_t k, int64_t n, const at::Tensor& weight, int64_t row_stride, int64_t col_stride,
                       Scale<T> scale) {
  const auto& table = kernels::table<T>();
  const int64_t panel = table.gemm_panel;
  at::Tensor packed = at::empty({k * round_up(n, panel)}, weight.options());
  for_panels(n, panel, k, [&](int64_t begin, int64_t end) {
    T* to = packed.mutable_data_ptr<T>() + begin * k;
    table.gemm_pack(k, end - begin, weight.const_data_ptr<T>() + begin * col_stride, row_stride, col_stride,
                    to);
    table.ternary_values(k * panel, to, scale.bound, scale.gamma, to);
  });
  return packed;
}

/// weight's codes as kernels::ternary_gemm takes them.
template <class T>
at::Tensor pack_codes(const at::Tensor& weight, Scale<T> scale) {
  const auto& table = kernels::table<T>();
  const int64_t n = weight.size(0), k = weight.size(1), panel = table.ternary_panel;
  at::Tensor packed = at::empty({round_up(n, panel) * round_up(k, 4)}, weight.options().dtype(at::kByte));
  for_panels(n, panel, k, [&](int64_t begin, int64_t end) {
    std::vector<int8_t> codes((end - begin) * k);
    table.ternary_codes((end - begin) * k, weight.const_data_ptr<T>() + begin * k, scale.bound, codes.data());
    table.ternary_pack(end - begin, k, codes.data(),
                       packed.mutable_data_ptr<uint8_t>() + begin * round_up(k, 4));
  });
  return packed;
}

/// The rows that enter the quantizer: x's own, or a block of them normed into a buffer.
template <class T>
class NormedRows {
 public:
  NormedRows(const at::Tensor& x, const at::Tensor& norm_scale, double eps)
      : x_(x.const_data_ptr<T>()),
        norm_scale_(norm_scale.defined() ? norm_scale.const_data_ptr<T>() : nullptr),
        eps_(static_cast<T>(eps)),
        k_(x.size(-1)),
        buffer_(norm_scale_ ? kRowBlock * k_ : 0) {}

  /// Rows begin .. end, at most kRowBlock, until the next call.
  const T* operator()(int64_t begin, int64_t end) {
    if (!norm_scale_) return x_ + begin * k_;
    kernels::table<T>().rms_norm(end - begin, k_, x_ + begin * k_, norm_scale_, eps_, buffer_.data());
    return buffer_.data();
  }

 private:
  const T* x_;
  const T* norm_scale_;
  T eps_;
  int64_t k_;
  std::vector<T> buffer_;
};

/// At most kRowBlock rows in int8.
template <class T>
struct Int8Rows {
  explicit Int8Rows(int64_t k)
      : q(kRowBlock * round_up(k, 4)), inverse_scale(kRowBlock), row_sum(kRowBlock) {}

  std::vector<int8_t> q;
  std::vector<T> inverse_scale;
  std::vector<int32_t> row_sum;
};

/// The tensors of a call as the kernels read them. x is (M, K); norm_scale may be undefined.
struct Inputs {
  at::Tensor x, weight, norm_scale;
  double eps;
  bool int8;
  Quantizer quantizer;

  Inputs(const at::Tensor& x_, const at::Tensor& weight_, const std::optional<at::Tensor>& norm_scale_,
         std::string_view quantizer_, std::string_view activation, double eps_)
      : x(kernel_input(x_, x_).view({-1, x_.size(-1)})),
        weight(kernel_input(weight_, x_)),
        norm_scale(norm_scale_ ? kernel_input(*norm_scale_, x_) : at::Tensor()),
        eps(eps_),
        int8(parse_activation(activation)),
        quantizer(parse_quantizer(quantizer_)) {}
};

// ---- forward ----

template <class T>
void forward_int8(const Inputs& in, T* y) {
  const auto& table = kernels::table<T>();
  const int64_t k = in.x.size(1), n = in.weight.size(0);
  const Scale<T> scale = weight_scale<T>(in.weight, in.quantizer);
  const at::Tensor packed = pack_codes(in.weight, scale);
  at::parallel_for(0, in.x.size(0), kRowBlock, [&](int64_t first, int64_t last) {
    NormedRows<T> rows(in.x, in.norm_scale, in.eps);
    Int8Rows<T> a(k);
    for_row_blocks(first, last, [&](int64_t begin, int64_t end) {
      table.quantize_rows(end - begin, k, rows(begin, end), a.q.data(), a.inverse_scale.data(),
                          a.row_sum.data());
      table.ternary_gemm(end - begin, n, k, a.q.data(), a.row_sum.data(), a.inverse_scale.data(),
                         packed.const_data_ptr<uint8_t>(), scale.gamma, y + begin * n, n);
    });
  });
}

template <class T>
void forward_float(const Inputs& in, T* y) {
  const int64_t k = in.x.size(1), n = in.weight.size(0);
  const Scale<T> scale = weight_scale<T>(in.weight, in.quantizer);
  const at::Tensor packed = pack_values<T>(k, n, in.weight, /*row_stride=*/1, /*col_stride=*/k, scale);
  at::parallel_for(0, in.x.size(0), kRowBlock, [&](int64_t first, int64_t last) {
    NormedRows<T> rows(in.x, in.norm_scale, in.eps);
    for_row_blocks(first, last, [&](int64_t begin, int64_t end) {
      kernels::table<T>().gemm(end - begin, n, k, rows(begin, end), /*a_row=*/k, /*a_col=*/1,
                               packed.const_data_ptr<T>(), y + begin * n, n, /*accumulate=*/false);
    });
  });
}

at::Tensor bit_linear_cpu(const at::Tensor& x, const at::Tensor& weight,
                          const std::optional<at::Tensor>& norm_scale, std::string_view quantizer,
                          std::string_view activation, double eps) {
  at::Tensor y = new_output(x, weight, norm_scale, quantizer, activation, eps);
  if (y.numel() == 0) return y;
  const Inputs in(x, weight, norm_scale, quantizer, activation, eps);
  at::Tensor out = at::empty(y.sizes(), in.x.options());
  dispatch(x, [&](auto t) {
    using T = decltype(t);
    (in.int8 ? forward_int8<T> : forward_float<T>)(in, out.mutable_data_ptr<T>());
  });
  return out.to(y.scalar_type());
}

// ---- backward ----

Gradients new_gradients(const at::Tensor& grad_y, const at::Tensor& x, const at::Tensor& weight,
                        const std::optional<at::Tensor>& norm_scale, std::string_view quantizer,
                        std::string_view activation, double eps) {
  new_output(x, weight, norm_scale, quantizer, activation, eps);
  check_same_dtype("_bit_linear_backward", "grad_y", grad_y, x);
  return {x.new_empty_symint(x.sym_sizes()), weight.new_empty_symint(weight.sym_sizes()),
          norm_scale ? norm_scale->new_empty_symint(norm_scale->sym_sizes()) : x.new_empty({0})};
}

/// grad_n = grad_y · (gamma Q), and through the norm if there is one.
template <class T>
void backward_x(const Inputs& in, const T* grad_y, T* grad_x, at::Tensor& grad_norm_scale) {
  const auto& table = kernels::table<T>();
  const int64_t m = in.x.size(0), k = in.x.size(1), n = in.weight.size(0);
  const at::Tensor packed = pack_values<T>(n, k, in.weight, /*row_stride=*/k, /*col_stride=*/1,
                                           weight_scale<T>(in.weight, in.quantizer));
  const auto product = [&](int64_t begin, int64_t end, T* grad_n) {
    table.gemm(end - begin, k, n, grad_y + begin * n, /*a_row=*/n, /*a_col=*/1, packed.const_data_ptr<T>(),
               grad_n, k, /*accumulate=*/false);
  };
  if (!in.norm_scale.defined()) {
    at::parallel_for(0, m, kRowBlock,
                     [&](int64_t begin, int64_t end) { product(begin, end, grad_x + begin * k); });
    return;
  }
  sum_over_rows(m, k, grad_norm_scale.mutable_data_ptr<T>(), [&](int64_t first, int64_t last, T* partial) {
    std::vector<T> grad_n(kRowBlock * k);
    for_row_blocks(first, last, [&](int64_t begin, int64_t end) {
      product(begin, end, grad_n.data());
      table.rms_norm_backward(end - begin, k, grad_n.data(), in.x.const_data_ptr<T>() + begin * k,
                              in.norm_scale.const_data_ptr<T>(), static_cast<T>(in.eps), grad_x + begin * k,
                              partial);
    });
  });
}

/// Rows first .. last of what entered the product, a = n or q / s.
template <class T>
void product_rows(const Inputs& in, int64_t first, int64_t last, T* a) {
  const auto& table = kernels::table<T>();
  const int64_t k = in.x.size(1);
  at::parallel_for(first, last, kRowBlock, [&](int64_t from, int64_t to) {
    Int8Rows<T> int8(k);
    for_row_blocks(from, to, [&](int64_t begin, int64_t end) {
      const T* n = in.x.const_data_ptr<T>() + begin * k;
      T* out = a + (begin - first) * k;
      if (in.norm_scale.defined()) {
        table.rms_norm(end - begin, k, n, in.norm_scale.const_data_ptr<T>(), static_cast<T>(in.eps), out);
        n = out;
      }
      if (in.int8) {
        table.quantize_rows(end - begin, k, n, int8.q.data(), int8.inverse_scale.data(), int8.row_sum.data());
        table.dequantize_rows(end - begin, k, int8.q.data(), int8.inverse_scale.data(), out);
      }
    });
  });
}

/// grad_weight += grad_yᵀ · a, over blocks of rows one after the other, so that a is never held whole.
/// Threads share the rows of grad_weight: no sum is split between them.
template <class T>
void backward_weight(const Inputs& in, const T* grad_y, T* grad_weight) {
  constexpr int64_t kDepth = 256;
  const auto& table = kernels::table<T>();
  const int64_t m = in.x.size(0), k = in.x.size(1), n = in.weight.size(0), panel = table.gemm_panel;
  const bool x_is_a = !in.int8 && !in.norm_scale.defined();
  std::vector<T> buffer(x_is_a ? 0 : kDepth * k), packed(kDepth * round_up(k, panel));
  for (int64_t begin = 0; begin < m; begin += kDepth) {
    const int64_t depth = std::min(kDepth, m - begin);
    if (!x_is_a) product_rows(in, begin, begin + depth, buffer.data());
    const T* a = x_is_a ? in.x.const_data_ptr<T>() + begin * k : buffer.data();
    for_panels(k, panel, depth, [&](int64_t from, int64_t to) {
      table.gemm_pack(depth, to - from, a + from, /*row_stride=*/k, /*col_stride=*/1,
                      packed.data() + from * depth);
    });
    at::parallel_for(0, n, row_grain(k), [&](int64_t from, int64_t to) {
      table.gemm(to - from, k, depth, grad_y + begin * n + from, /*a_row=*/1, /*a_col=*/n, packed.data(),
                 grad_weight + from * k, k, /*accumulate=*/true);
    });
  }
}

Gradients bit_linear_backward_cpu(const at::Tensor& grad_y, const at::Tensor& x, const at::Tensor& weight,
                                  const std::optional<at::Tensor>& norm_scale, std::string_view quantizer,
                                  std::string_view activation, double eps) {
  new_gradients(grad_y, x, weight, norm_scale, quantizer, activation, eps);
  const Inputs in(x, weight, norm_scale, quantizer, activation, eps);
  const at::Tensor g = kernel_input(grad_y, x);
  at::Tensor grad_x = at::empty(x.sizes(), in.x.options()), grad_weight = at::zeros_like(in.weight);
  at::Tensor grad_norm_scale = norm_scale ? at::zeros_like(in.norm_scale) : at::empty({0}, in.x.options());
  dispatch(x, [&](auto t) {
    using T = decltype(t);
    backward_x<T>(in, g.const_data_ptr<T>(), grad_x.mutable_data_ptr<T>(), grad_norm_scale);
    backward_weight<T>(in, g.const_data_ptr<T>(), grad_weight.mutable_data_ptr<T>());
  });
  const auto dtype = x.scalar_type();
  return {grad_x.to(dtype), grad_weight.to(dtype), grad_norm_scale.to(dtype)};
}

struct BitLinear : torch::autograd::Function<BitLinear> {
  static at::Tensor forward(torch::autograd::AutogradContext* ctx, const at::Tensor& x,
                            const at::Tensor& weight, const std::optional<at::Tensor>& norm_scale,
                            std::string_view quantizer, std::string_view activation, double eps) {
    at::AutoDispatchBelowADInplaceOrView guard;
    ctx->save_for_backward({x, weight, norm_scale.value_or(at::Tensor())});
    ctx->saved_data["quantizer"] = std::string(quantizer);
    ctx->saved_data["activation"] = std::string(activation);
    ctx->saved_data["eps"] = eps;
    return bit_linear(x, weight, norm_scale, quantizer, activation, eps);
  }

  static torch::autograd::variable_list backward(torch::autograd::AutogradContext* ctx,
                                                 const torch::autograd::variable_list& grads) {
    const auto saved = ctx->get_saved_variables();
    const auto norm_scale = saved[2].defined() ? std::optional(saved[2]) : std::nullopt;
    auto [grad_x, grad_weight, grad_norm_scale] = bit_linear_backward(
        grads[0], saved[0], saved[1], norm_scale, ctx->saved_data["quantizer"].toStringView(),
        ctx->saved_data["activation"].toStringView(), ctx->saved_data["eps"].toDouble());
    return {grad_x, grad_weight, norm_scale ? grad_norm_scale : no_grad(), no_grad(), no_grad(), no_grad()};
  }
};

at::Tensor bit_linear_autograd(const at::Tensor& x, const at::Tensor& weight,
                               const std::optional<at::Tensor>& norm_scale, std::string_view quantizer,
                               std::string_view activation, double eps) {
  return BitLinear::apply(x, weight, norm_scale, quantizer, activation, eps);
}

}  // namespace

TORCH_LIBRARY_IMPL(flashlm, CPU, m) {
  m.impl("bit_linear", bit_linear_cpu);
  m.impl("_bit_linear_backward", bit_linear_backward_cpu);
}
TORCH_LIBRARY_IMPL(flashlm, Meta, m) {
  m.impl("bit_linear", new_output);
  m.impl("_bit_linear_backward", new_gradients);
}
TORCH_LIBRARY_IMPL(flashlm, Autograd, m) {
  m.impl("bit_linear", bit_linear_autograd);
  m.impl("_bit_linear_backward", torch::autograd::autogradNotImplementedFallback());
}

}  // namespace flashlm

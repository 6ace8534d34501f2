// SPDX-License-Identifier: Apache-2.0
// The public operator is a composite over _bit_linear_forward, which also returns the int8 rows that a
// backward pass needs, if there will be one. Rows are normed, quantized and multiplied a block at a time, in
// cache.
#include "ops/bit_linear.h"

#include "ops/ternary_products.h"

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
  if (norm_scale) check_norm_scale("bit_linear", "norm_scale", *norm_scale, x, in);
  check_modes("bit_linear", in, quantizer, activation, eps, gradient);
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

// ---- forward ----

template <class T>
void run_forward(const TernaryLayer& layer, const at::Tensor& weight, T* y) {
  const ForwardProduct<T> product(layer, weight);
  at::parallel_for(0, layer.m, kRowBlock, [&](int64_t first, int64_t last) {
    LayerRows<T> rows(layer, kRowBlock);
    const auto workspace = product.workspace();
    for_row_blocks(first, last, kRowBlock, [&](int64_t begin, int64_t end) {
      product(end - begin, rows(begin, end), y + begin * layer.n, workspace);
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
  TernaryLayer layer;
  layer.k = weight.size(1), layer.n = weight.size(0), layer.m = x.numel() / layer.k;
  layer.x = kernel_input(x, x).view({layer.m, layer.k});
  if (norm_scale) layer.norm_scale = kernel_input(*norm_scale, x);
  if (q.size(0) > 0) layer.q = q, layer.inverse_scale = inverse_scale;
  layer.eps = eps;
  layer.int8 = parse_activation("bit_linear", activation);
  layer.quantizer = parse_quantizer("bit_linear", quantizer);
  const at::Tensor computed = kernel_output(y);
  dispatch(x, [&](auto t) {
    using T = decltype(t);
    run_forward<T>(layer, weight, computed.mutable_data_ptr<T>());
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

/// grad_x, and through the norm if there is one.
template <class T>
void backward_x(const TernaryLayer& layer, const at::Tensor& weight, const T* grad_y, T* grad_x,
                T* grad_norm_scale) {
  const BackwardProduct<T> product(layer, weight);
  if (!layer.norm_scale.defined()) {
    at::parallel_for(0, layer.m, kRowBlock, [&](int64_t first, int64_t last) {
      auto memory = product.memory();
      for_row_blocks(first, last, kRowBlock, [&](int64_t begin, int64_t end) {
        product(end - begin, grad_y + begin * layer.n, grad_x + begin * layer.k, memory);
      });
    });
    return;
  }
  sum_over_rows(layer.m, layer.k, grad_norm_scale, [&](int64_t first, int64_t last, T* partial) {
    auto memory = product.memory();
    Scratch<T> grad_n(kRowBlock * layer.k);
    for_row_blocks(first, last, kRowBlock, [&](int64_t begin, int64_t end) {
      product(end - begin, grad_y + begin * layer.n, grad_n.data, memory);
      kernels::table<T>().rms_norm_backward(
          end - begin, layer.k, grad_n.data, layer.x.const_data_ptr<T>() + begin * layer.k,
          layer.norm_scale.const_data_ptr<T>(), static_cast<T>(layer.eps), grad_x + begin * layer.k, partial);
    });
  });
}

template <class T>
void backward_weight(const TernaryLayer& layer, const T* grad_y, T* grad_weight) {
  constexpr int64_t kChunkRows = 16 * kDepth;  // whose packed form is held at once
  PackedRows<T> a(layer, std::min(layer.m, kChunkRows));
  for_row_blocks(0, layer.m, kChunkRows, [&](int64_t first, int64_t last) {
    a.pack(first, last);
    a.weight_gradient(grad_y + first * layer.n, grad_weight, /*accumulate=*/first > 0);
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
  TernaryLayer layer;
  layer.k = weight.size(1), layer.n = weight.size(0), layer.m = grad_y.numel() / layer.n;
  if (x) layer.x = kernel_input(*x, *x).view({layer.m, layer.k});
  if (norm_scale) layer.norm_scale = kernel_input(*norm_scale, weight);
  if (q) layer.q = q->contiguous(), layer.inverse_scale = inverse_scale->contiguous();
  layer.eps = eps;
  layer.int8 = parse_activation("bit_linear", activation);
  layer.quantizer = parse_quantizer("bit_linear", quantizer);
  layer.gradient = parse_gradient("bit_linear", gradient);
  const at::Tensor g = kernel_input(grad_y, weight);
  const bool needs_x = grad_x.defined() || grad_norm_scale.defined();
  const at::Tensor dx = grad_x.defined() ? kernel_output(grad_x)
                        : needs_x        ? at::empty({layer.m, layer.k}, g.options())
                                         : no_grad();
  const at::Tensor dw = grad_weight.defined() ? kernel_output(grad_weight) : no_grad();
  const at::Tensor dscale = norm_scale ? at::empty(norm_scale->sizes(), g.options()) : no_grad();
  dispatch(weight, [&](auto t) {
    using T = decltype(t);
    if (needs_x) {
      backward_x<T>(layer, weight, g.const_data_ptr<T>(), dx.mutable_data_ptr<T>(),
                    dscale.defined() ? dscale.mutable_data_ptr<T>() : nullptr);
    }
    if (dw.defined()) backward_weight<T>(layer, g.const_data_ptr<T>(), dw.mutable_data_ptr<T>());
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
    auto& data = ctx->saved_data;
    // A missing norm_scale is not counted by needs_input_grad.
    auto [grad_x, grad_weight, grad_norm_scale] = flashlm::backward(
        grads[0], if_defined(saved[0]), if_defined(saved[1]), if_defined(saved[2]), saved[3],
        if_defined(saved[4]), data["quantizer"].toStringView(), data["activation"].toStringView(),
        data["eps"].toDouble(), data["gradient"].toStringView(),
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

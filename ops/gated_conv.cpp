// SPDX-License-Identifier: Apache-2.0
#include "ops/gated_conv.h"

#include "ops/conv.h"

namespace flashlm {

TORCH_LIBRARY_FRAGMENT(flashlm, m) {
  m.def(
      "gated_conv(Tensor x, Tensor norm_scale, Tensor gate_weight, Tensor value_weight, "
      "Tensor? history=None, *, int dilation=1, int groups=1, float eps=1e-6) -> Tensor",
      {at::Tag::pt2_compliant_tag});
  m.def(
      "_gated_conv_backward(Tensor grad_y, Tensor x, Tensor norm_scale, Tensor gate_weight, "
      "Tensor value_weight, Tensor? history, int dilation, int groups, float eps) "
      "-> (Tensor, Tensor, Tensor, Tensor, Tensor)",
      {at::Tag::pt2_compliant_tag});
}

at::Tensor gated_conv(const at::Tensor& x, const at::Tensor& norm_scale, const at::Tensor& gate_weight,
                      const at::Tensor& value_weight, const std::optional<at::Tensor>& history,
                      int64_t dilation, int64_t groups, double eps) {
  static const auto op =
      c10::Dispatcher::singleton().findSchemaOrThrow("flashlm::gated_conv", "").typed<decltype(gated_conv)>();
  return op.call(x, norm_scale, gate_weight, value_weight, history, dilation, groups, eps);
}

namespace {

using Gradients = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor>;

Gradients gated_conv_backward(const at::Tensor& grad_y, const at::Tensor& x, const at::Tensor& norm_scale,
                              const at::Tensor& gate_weight, const at::Tensor& value_weight,
                              const std::optional<at::Tensor>& history, int64_t dilation, int64_t groups,
                              double eps) {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("flashlm::_gated_conv_backward", "")
                             .typed<decltype(gated_conv_backward)>();
  return op.call(grad_y, x, norm_scale, gate_weight, value_weight, history, dilation, groups, eps);
}

/// Checks the arguments and makes the output: the Meta kernel, and the CPU kernel's first line.
at::Tensor new_output(const at::Tensor& x, const at::Tensor& norm_scale, const at::Tensor& gate_weight,
                      const at::Tensor& value_weight, const std::optional<at::Tensor>& history,
                      int64_t dilation, int64_t groups, double eps) {
  check_conv_input("gated_conv", x, dilation, groups);
  check_same_dtype("gated_conv", "norm_scale", norm_scale, x);
  check_dim("gated_conv", "norm_scale", norm_scale, 1);
  check_size("gated_conv", "norm_scale's size", norm_scale.sym_size(0), x.sym_size(2));
  check_conv_weight("gated_conv", "gate_weight", gate_weight, x, groups);
  const c10::SymInt taps = gate_weight.sym_size(2);
  check_conv_weight("gated_conv", "value_weight", value_weight, x, groups, &taps);
  check_history("gated_conv", history, x, taps, dilation);
  TORCH_CHECK(eps >= 0, "gated_conv: eps must be >= 0, got ", eps);
  return x.new_empty_symint(x.sym_sizes());
}

// A block of time at a time, in it a group at a time: its rows and those they reach are normalised into a
// window, both convolutions go over it, and the gate takes them while they are in cache.
at::Tensor gated_conv_cpu(const at::Tensor& x, const at::Tensor& norm_scale, const at::Tensor& gate_weight,
                          const at::Tensor& value_weight, const std::optional<at::Tensor>& history,
                          int64_t dilation, int64_t groups, double eps) {
  at::Tensor y = new_output(x, norm_scale, gate_weight, value_weight, history, dilation, groups, eps);
  if (y.numel() == 0) return y;
  const at::Tensor in = kernel_input(x, x), scale = kernel_input(norm_scale, x);
  const at::Tensor before = history.has_value() ? kernel_input(*history, x) : at::Tensor();
  const ConvCall call(x, gate_weight, history.has_value(), dilation, groups, 2);
  const at::Tensor packed =
      pack_conv(call, side_by_side(call, {kernel_input(gate_weight, x), kernel_input(value_weight, x)}));
  const at::Tensor out = at::empty(in.sizes(), in.options());
  // Rows are normalised once for their own block and again for each block that reaches back to them: longer
  // blocks for a longer reach.
  const int64_t longest = std::clamp(call.reach, kBlock, 4 * kBlock);
  dispatch(x, [&](auto t) {
    using T = decltype(t);
    const kernels::Table<T>& table = kernels::table<T>();
    for_each_window(Input<T>(call, in, before, scale, eps), longest,
                    [&](int64_t row, int64_t rows, int64_t g, const auto& conv, const T* window, T* convs) {
                      const int64_t at = row * call.width + g * conv.in;
                      table.causal_conv1d(conv, rows, window, conv.in,
                                          packed.const_data_ptr<T>() + g * packed.size(1), convs, conv.out);
                      table.gated_conv(rows, conv.in, in.const_data_ptr<T>() + at, call.width, convs,
                                       out.mutable_data_ptr<T>() + at);
                    });
  });
  return out.to(y.scalar_type());
}

Gradients new_gradients(const at::Tensor& grad_y, const at::Tensor& x, const at::Tensor& norm_scale,
                        const at::Tensor& gate_weight, const at::Tensor& value_weight,
                        const std::optional<at::Tensor>& history, int64_t dilation, int64_t groups,
                        double eps) {
  new_output(x, norm_scale, gate_weight, value_weight, history, dilation, groups, eps);
  check_grad_y("_gated_conv_backward", grad_y, x);
  return {x.new_empty_symint(x.sym_sizes()), norm_scale.new_empty_symint(norm_scale.sym_sizes()),
          gate_weight.new_empty_symint(gate_weight.sym_sizes()),
          value_weight.new_empty_symint(value_weight.sym_sizes()), new_history_gradient(history, x)};
}

/// rms_norm's backward in place on rows first .. first + count of sequence b, in grad (B, lead + T, D): from
/// the gradient of the normalised rows to that of the rows themselves, with the residual grad_y. Adds to
/// grad_scale (D).
template <class T>
void norm_backward(const Input<T>& input, int64_t b, int64_t first, int64_t count, const T* grad_y, T* grad,
                   T* grad_scale) {
  const ConvCall& call = input.call;
  input.for_rows(b, first, count, [&](const T* from, int64_t i, int64_t n) {
    const int64_t row = first + i;
    T* to = grad + ((b + 1) * call.lead + b * call.time + row) * call.width;
    // History has no residual.
    const T* residual = row < 0 ? nullptr : grad_y + (b * call.time + row) * call.width;
    kernels::table<T>().rms_norm_residual_backward(n, call.width, to, from, input.scale, input.eps, residual,
                                                   to, grad_scale);
  });
}

Gradients gated_conv_backward_cpu(const at::Tensor& grad_y, const at::Tensor& x, const at::Tensor& norm_scale,
                                  const at::Tensor& gate_weight, const at::Tensor& value_weight,
                                  const std::optional<at::Tensor>& history, int64_t dilation, int64_t groups,
                                  double eps) {
  auto out = new_gradients(grad_y, x, norm_scale, gate_weight, value_weight, history, dilation, groups, eps);
  if (x.numel() == 0) {
    std::apply([](auto&... grads) { (grads.zero_(), ...); }, out);
    return out;
  }
  const at::Tensor in = kernel_input(x, x), scale = kernel_input(norm_scale, x), dy = kernel_input(grad_y, x);
  const at::Tensor before = history.has_value() ? kernel_input(*history, x) : at::Tensor();
  const ConvCall call(x, gate_weight, history.has_value(), dilation, groups, 2);
  const at::Tensor weights =
      side_by_side(call, {kernel_input(gate_weight, x), kernel_input(value_weight, x)});
  const at::Tensor packed = pack_conv(call, weights), back = pack_conv(call, weights, true);
  const at::Tensor grad = at::empty({call.batch, call.lead + call.time, call.width}, in.options());
  dispatch(x, [&](auto t) {
    using T = decltype(t);
    const kernels::Table<T>& table = kernels::table<T>();
    const Input<T> input(call, in, before, scale, eps);
    const Blocks blocks(1, call.lead + call.time, kBlock);
    const at::Tensor grad_scales = at::zeros({call.batch * blocks.count(), call.width}, grad.options());
    const at::Tensor grad_weights = conv_backward(
        input, back, grad,
        [&](int64_t row, int64_t rows, int64_t g, const auto& conv, const T* h, T* convs) {
          table.causal_conv1d(conv, rows, h, conv.in, packed.const_data_ptr<T>() + g * packed.size(1), convs,
                              conv.out);
          table.gated_conv_backward(rows, conv.in, dy.const_data_ptr<T>() + row * call.width + g * conv.in,
                                    call.width, convs);
        },
        [&](int64_t b) {
          at::parallel_for(0, blocks.count(), 1, [&](int64_t i, int64_t last) {
            for (; i < last; ++i) {
              norm_backward(input, b, blocks[i].begin - call.lead, blocks[i].rows, dy.const_data_ptr<T>(),
                            grad.mutable_data_ptr<T>(),
                            grad_scales.mutable_data_ptr<T>() + (b * blocks.count() + i) * call.width);
            }
          });
        });
    const at::Tensor grad_scale = sum_in_order<T>(grad_scales);
    const auto [grad_x, grad_history] = split_gradient(grad, x, history);
    out = {grad_x, grad_scale.to(x.scalar_type()), weight_gradient(call, grad_weights, 0).to(x.scalar_type()),
           weight_gradient(call, grad_weights, 1).to(x.scalar_type()), grad_history};
  });
  return out;
}

struct GatedConv : torch::autograd::Function<GatedConv> {
  static at::Tensor forward(torch::autograd::AutogradContext* ctx, const at::Tensor& x,
                            const at::Tensor& norm_scale, const at::Tensor& gate_weight,
                            const at::Tensor& value_weight, const std::optional<at::Tensor>& history,
                            int64_t dilation, int64_t groups, double eps) {
    at::AutoDispatchBelowADInplaceOrView guard;
    ctx->save_for_backward({x, norm_scale, gate_weight, value_weight, history.value_or(at::Tensor())});
    ctx->saved_data["dilation"] = dilation;
    ctx->saved_data["groups"] = groups;
    ctx->saved_data["eps"] = eps;
    return gated_conv(x, norm_scale, gate_weight, value_weight, history, dilation, groups, eps);
  }

  static torch::autograd::variable_list backward(torch::autograd::AutogradContext* ctx,
                                                 const torch::autograd::variable_list& grads) {
    const auto saved = ctx->get_saved_variables();
    auto [grad_x, grad_scale, grad_gate, grad_value, grad_history] =
        gated_conv_backward(grads[0], saved[0], saved[1], saved[2], saved[3], saved_history(saved[4]),
                            ctx->saved_data["dilation"].toInt(), ctx->saved_data["groups"].toInt(),
                            ctx->saved_data["eps"].toDouble());
    return {grad_x,    grad_scale, grad_gate, grad_value, saved[4].defined() ? grad_history : no_grad(),
            no_grad(), no_grad(),  no_grad()};
  }
};

at::Tensor gated_conv_autograd(const at::Tensor& x, const at::Tensor& norm_scale,
                               const at::Tensor& gate_weight, const at::Tensor& value_weight,
                               const std::optional<at::Tensor>& history, int64_t dilation, int64_t groups,
                               double eps) {
  return GatedConv::apply(x, norm_scale, gate_weight, value_weight, history, dilation, groups, eps);
}

}  // namespace

TORCH_LIBRARY_IMPL(flashlm, CPU, m) {
  m.impl("gated_conv", gated_conv_cpu);
  m.impl("_gated_conv_backward", gated_conv_backward_cpu);
}
TORCH_LIBRARY_IMPL(flashlm, Meta, m) {
  m.impl("gated_conv", new_output);
  m.impl("_gated_conv_backward", new_gradients);
}
TORCH_LIBRARY_IMPL(flashlm, Autograd, m) {
  m.impl("gated_conv", gated_conv_autograd);
  m.impl("_gated_conv_backward", torch::autograd::autogradNotImplementedFallback());
}

}  // namespace flashlm

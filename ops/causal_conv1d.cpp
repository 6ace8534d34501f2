// SPDX-License-Identifier: Apache-2.0
#include "ops/causal_conv1d.h"

#include "ops/conv.h"

namespace flashlm {

TORCH_LIBRARY_FRAGMENT(flashlm, m) {
  m.def(
      "causal_conv1d(Tensor x, Tensor weight, Tensor? history=None, *, int dilation=1, int groups=1) "
      "-> Tensor",
      {at::Tag::pt2_compliant_tag});
  m.def(
      "_causal_conv1d_backward(Tensor grad_y, Tensor x, Tensor weight, Tensor? history, int dilation, "
      "int groups) -> (Tensor, Tensor, Tensor)",
      {at::Tag::pt2_compliant_tag});
}

at::Tensor causal_conv1d(const at::Tensor& x, const at::Tensor& weight,
                         const std::optional<at::Tensor>& history, int64_t dilation, int64_t groups) {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("flashlm::causal_conv1d", "")
                             .typed<decltype(causal_conv1d)>();
  return op.call(x, weight, history, dilation, groups);
}

namespace {

using Gradients = std::tuple<at::Tensor, at::Tensor, at::Tensor>;

Gradients causal_conv1d_backward(const at::Tensor& grad_y, const at::Tensor& x, const at::Tensor& weight,
                                 const std::optional<at::Tensor>& history, int64_t dilation, int64_t groups) {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("flashlm::_causal_conv1d_backward", "")
                             .typed<decltype(causal_conv1d_backward)>();
  return op.call(grad_y, x, weight, history, dilation, groups);
}

void check_arguments(const at::Tensor& x, const at::Tensor& weight, const std::optional<at::Tensor>& history,
                     int64_t dilation, int64_t groups) {
  check_conv_input("causal_conv1d", x, dilation, groups);
  check_conv_weight("causal_conv1d", "weight", weight, x, groups);
  check_history("causal_conv1d", history, x, weight.sym_size(2), dilation);
}

/// Checks the arguments and makes the output: the Meta kernel, and the CPU kernel's first line.
at::Tensor new_output(const at::Tensor& x, const at::Tensor& weight, const std::optional<at::Tensor>& history,
                      int64_t dilation, int64_t groups) {
  check_arguments(x, weight, history, dilation, groups);
  return x.new_empty_symint(x.sym_sizes());
}

at::Tensor causal_conv1d_cpu(const at::Tensor& x, const at::Tensor& weight,
                             const std::optional<at::Tensor>& history, int64_t dilation, int64_t groups) {
  at::Tensor y = new_output(x, weight, history, dilation, groups);
  if (y.numel() == 0) return y;
  const at::Tensor in = kernel_input(x, x);
  const at::Tensor before = history.has_value() ? kernel_input(*history, x) : at::Tensor();
  const ConvCall call(x, weight, history.has_value(), dilation, groups, 1);
  const at::Tensor packed = pack_conv(call, side_by_side(call, {kernel_input(weight, x)}));
  const at::Tensor out = kernel_output(y);
  dispatch(x, [&](auto t) {
    using T = decltype(t);
    for_each_window<T>(Input<T>(call, in, before), kBlock,
                       [&](int64_t row, int64_t rows, int64_t g, const auto& conv, const T* window, T*) {
                         kernels::table<T>().causal_conv1d(
                             conv, rows, window, conv.in, packed.const_data_ptr<T>() + g * packed.size(1),
                             out.mutable_data_ptr<T>() + row * call.width + g * conv.in, call.width);
                       });
  });
  return out.to(y.scalar_type());
}

Gradients new_gradients(const at::Tensor& grad_y, const at::Tensor& x, const at::Tensor& weight,
                        const std::optional<at::Tensor>& history, int64_t dilation, int64_t groups) {
  check_arguments(x, weight, history, dilation, groups);
  check_grad_y("_causal_conv1d_backward", grad_y, x);
  return {x.new_empty_symint(x.sym_sizes()), weight.new_empty_symint(weight.sym_sizes()),
          new_history_gradient(history, x)};
}

Gradients causal_conv1d_backward_cpu(const at::Tensor& grad_y, const at::Tensor& x, const at::Tensor& weight,
                                     const std::optional<at::Tensor>& history, int64_t dilation,
                                     int64_t groups) {
  const auto out = new_gradients(grad_y, x, weight, history, dilation, groups);
  const auto& [new_x, new_weight, new_history] = out;
  if (x.numel() == 0) return {new_x, new_weight.zero_(), new_history.zero_()};
  const at::Tensor in = kernel_input(x, x), dy = kernel_input(grad_y, x);
  const at::Tensor before = history.has_value() ? kernel_input(*history, x) : at::Tensor();
  const ConvCall call(x, weight, history.has_value(), dilation, groups, 1);
  const at::Tensor back = pack_conv(call, side_by_side(call, {kernel_input(weight, x)}), true);
  const at::Tensor grad = new_padded_gradient(call, new_x);
  at::Tensor grad_weight;
  dispatch(x, [&](auto t) {
    using T = decltype(t);
    grad_weight = conv_backward(
        Input<T>(call, in, before), back, grad,
        [&](int64_t row, int64_t rows, int64_t g, const auto& conv, const T*, T* to) {
          const T* from = dy.const_data_ptr<T>() + row * call.width + g * conv.in;
          for (int64_t r = 0; r < rows; ++r) std::copy_n(from + r * call.width, conv.in, to + r * conv.in);
        },
        [](int64_t) {});
  });
  const auto [grad_x, grad_history] = split_gradient(call, grad, new_x, new_history);
  return {grad_x, weight_gradient(call, grad_weight, 0).to(x.scalar_type()), grad_history};
}

struct CausalConv1d : torch::autograd::Function<CausalConv1d> {
  static at::Tensor forward(torch::autograd::AutogradContext* ctx, const at::Tensor& x,
                            const at::Tensor& weight, const std::optional<at::Tensor>& history,
                            int64_t dilation, int64_t groups) {
    at::AutoDispatchBelowADInplaceOrView guard;
    ctx->save_for_backward({x, weight, history.value_or(at::Tensor())});
    ctx->saved_data["dilation"] = dilation;
    ctx->saved_data["groups"] = groups;
    return causal_conv1d(x, weight, history, dilation, groups);
  }

  static torch::autograd::variable_list backward(torch::autograd::AutogradContext* ctx,
                                                 const torch::autograd::variable_list& grads) {
    const auto saved = ctx->get_saved_variables();
    auto [grad_x, grad_weight, grad_history] =
        causal_conv1d_backward(grads[0], saved[0], saved[1], if_defined(saved[2]),
                               ctx->saved_data["dilation"].toInt(), ctx->saved_data["groups"].toInt());
    return {grad_x, grad_weight, saved[2].defined() ? grad_history : no_grad(), no_grad(), no_grad()};
  }
};

at::Tensor causal_conv1d_autograd(const at::Tensor& x, const at::Tensor& weight,
                                  const std::optional<at::Tensor>& history, int64_t dilation,
                                  int64_t groups) {
  return CausalConv1d::apply(x, weight, history, dilation, groups);
}

}  // namespace

TORCH_LIBRARY_IMPL(flashlm, CPU, m) {
  m.impl("causal_conv1d", causal_conv1d_cpu);
  m.impl("_causal_conv1d_backward", causal_conv1d_backward_cpu);
}
TORCH_LIBRARY_IMPL(flashlm, Meta, m) {
  m.impl("causal_conv1d", new_output);
  m.impl("_causal_conv1d_backward", new_gradients);
}
TORCH_LIBRARY_IMPL(flashlm, Autograd, m) {
  m.impl("causal_conv1d", causal_conv1d_autograd);
  m.impl("_causal_conv1d_backward", torch::autograd::autogradNotImplementedFallback());
}

}  // namespace flashlm

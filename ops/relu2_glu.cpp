// SPDX-License-Identifier: Apache-2.0
#include "ops/relu2_glu.h"

#include "ops/common.h"

namespace flashlm {

TORCH_LIBRARY_FRAGMENT(flashlm, m) {
  m.def("relu2_glu(Tensor gate, Tensor up) -> Tensor", {at::Tag::pt2_compliant_tag});
  m.def("_relu2_glu_backward(Tensor grad_y, Tensor gate, Tensor up) -> (Tensor, Tensor)",
        {at::Tag::pt2_compliant_tag});
}

at::Tensor relu2_glu(const at::Tensor& gate, const at::Tensor& up) {
  static const auto op =
      c10::Dispatcher::singleton().findSchemaOrThrow("flashlm::relu2_glu", "").typed<decltype(relu2_glu)>();
  return op.call(gate, up);
}

namespace {

constexpr int64_t kGrain = 16384;

std::tuple<at::Tensor, at::Tensor> relu2_glu_backward(const at::Tensor& grad_y, const at::Tensor& gate,
                                                      const at::Tensor& up) {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("flashlm::_relu2_glu_backward", "")
                             .typed<decltype(relu2_glu_backward)>();
  return op.call(grad_y, gate, up);
}

/// Checks the arguments and makes the output: the Meta kernel, and the CPU kernel's first line.
at::Tensor new_output(const at::Tensor& gate, const at::Tensor& up) {
  check_floating("relu2_glu", "gate", gate);
  TORCH_CHECK(up.scalar_type() == gate.scalar_type(), "relu2_glu: up must have gate's dtype ",
              gate.scalar_type(), ", got ", up.scalar_type());
  TORCH_CHECK(gate.dim() == up.dim(), "relu2_glu: up must have gate's ", gate.dim(), " dimensions, got ",
              up.dim());
  for (int64_t d = 0; d < gate.dim(); ++d) {
    TORCH_SYM_CHECK(gate.sym_size(d).sym_eq(up.sym_size(d)), "relu2_glu: up's shape must be gate's ",
                    gate.sym_sizes(), ", got ", up.sym_sizes());
  }
  return gate.new_empty_symint(gate.sym_sizes());
}

at::Tensor relu2_glu_cpu(const at::Tensor& gate, const at::Tensor& up) {
  at::Tensor y = new_output(gate, up);
  const at::Tensor g = kernel_input(gate, gate), u = kernel_input(up, gate);
  at::Tensor out = at::empty_like(g);
  dispatch(gate, [&](auto t) {
    using T = decltype(t);
    at::parallel_for(0, out.numel(), kGrain, [&](int64_t begin, int64_t end) {
      kernels::table<T>().relu2_glu(end - begin, g.const_data_ptr<T>() + begin, u.const_data_ptr<T>() + begin,
                                    out.mutable_data_ptr<T>() + begin);
    });
  });
  return out.to(y.scalar_type());
}

std::tuple<at::Tensor, at::Tensor> new_gradients(const at::Tensor& grad_y, const at::Tensor& gate,
                                                 const at::Tensor& up) {
  new_output(gate, up);
  new_output(gate, grad_y);
  return {gate.new_empty_symint(gate.sym_sizes()), up.new_empty_symint(up.sym_sizes())};
}

std::tuple<at::Tensor, at::Tensor> relu2_glu_backward_cpu(const at::Tensor& grad_y, const at::Tensor& gate,
                                                          const at::Tensor& up) {
  new_gradients(grad_y, gate, up);
  const at::Tensor dy = kernel_input(grad_y, gate), g = kernel_input(gate, gate), u = kernel_input(up, gate);
  at::Tensor grad_gate = at::empty_like(g), grad_up = at::empty_like(u);
  dispatch(gate, [&](auto t) {
    using T = decltype(t);
    at::parallel_for(0, g.numel(), kGrain, [&](int64_t begin, int64_t end) {
      kernels::table<T>().relu2_glu_backward(end - begin, dy.const_data_ptr<T>() + begin,
                                             g.const_data_ptr<T>() + begin, u.const_data_ptr<T>() + begin,
                                             grad_gate.mutable_data_ptr<T>() + begin,
                                             grad_up.mutable_data_ptr<T>() + begin);
    });
  });
  return {grad_gate.to(gate.scalar_type()), grad_up.to(gate.scalar_type())};
}

struct Relu2Glu : torch::autograd::Function<Relu2Glu> {
  static at::Tensor forward(torch::autograd::AutogradContext* ctx, const at::Tensor& gate,
                            const at::Tensor& up) {
    at::AutoDispatchBelowADInplaceOrView guard;
    ctx->save_for_backward({gate, up});
    return relu2_glu(gate, up);
  }

  static torch::autograd::variable_list backward(torch::autograd::AutogradContext* ctx,
                                                 const torch::autograd::variable_list& grads) {
    const auto saved = ctx->get_saved_variables();
    auto [grad_gate, grad_up] = relu2_glu_backward(grads[0], saved[0], saved[1]);
    return {grad_gate, grad_up};
  }
};

at::Tensor relu2_glu_autograd(const at::Tensor& gate, const at::Tensor& up) {
  return Relu2Glu::apply(gate, up);
}

}  // namespace

TORCH_LIBRARY_IMPL(flashlm, CPU, m) {
  m.impl("relu2_glu", relu2_glu_cpu);
  m.impl("_relu2_glu_backward", relu2_glu_backward_cpu);
}
TORCH_LIBRARY_IMPL(flashlm, Meta, m) {
  m.impl("relu2_glu", new_output);
  m.impl("_relu2_glu_backward", new_gradients);
}
TORCH_LIBRARY_IMPL(flashlm, Autograd, m) {
  m.impl("relu2_glu", relu2_glu_autograd);
  m.impl("_relu2_glu_backward", torch::autograd::autogradNotImplementedFallback());
}

}  // namespace flashlm

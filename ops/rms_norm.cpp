// SPDX-License-Identifier: Apache-2.0
#include "ops/rms_norm.h"

#include "ops/common.h"

namespace flashlm {

TORCH_LIBRARY_FRAGMENT(flashlm, m) {
  m.def("rms_norm(Tensor x, Tensor scale, float eps=1e-6) -> Tensor", {at::Tag::pt2_compliant_tag});
  m.def("_rms_norm_backward(Tensor grad_y, Tensor x, Tensor scale, float eps) -> (Tensor, Tensor)",
        {at::Tag::pt2_compliant_tag});
}

at::Tensor rms_norm(const at::Tensor& x, const at::Tensor& scale, double eps) {
  static const auto op =
      c10::Dispatcher::singleton().findSchemaOrThrow("flashlm::rms_norm", "").typed<decltype(rms_norm)>();
  return op.call(x, scale, eps);
}

namespace {

std::tuple<at::Tensor, at::Tensor> rms_norm_backward(const at::Tensor& grad_y, const at::Tensor& x,
                                                     const at::Tensor& scale, double eps) {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("flashlm::_rms_norm_backward", "")
                             .typed<decltype(rms_norm_backward)>();
  return op.call(grad_y, x, scale, eps);
}

void check_arguments(const at::Tensor& x, const at::Tensor& scale, double eps) {
  check_floating("rms_norm", "x", x);
  check_same_dtype("rms_norm", "scale", scale, x);
  TORCH_CHECK(x.dim() >= 1, "rms_norm: x must have at least 1 dimension, got 0");
  check_dim("rms_norm", "scale", scale, 1);
  check_size("rms_norm", "scale's size", scale.sym_size(0), x.sym_size(-1));
  TORCH_CHECK(eps >= 0, "rms_norm: eps must be >= 0, got ", eps);
}

/// Checks the arguments and makes the output: the Meta kernel, and the CPU kernel's first line.
at::Tensor new_output(const at::Tensor& x, const at::Tensor& scale, double eps) {
  check_arguments(x, scale, eps);
  return x.new_empty_symint(x.sym_sizes());
}

at::Tensor rms_norm_cpu(const at::Tensor& x, const at::Tensor& scale, double eps) {
  at::Tensor y = new_output(x, scale, eps);
  if (y.numel() == 0) return y;
  const at::Tensor in = kernel_input(x, x), s = kernel_input(scale, x);
  const at::Tensor out = kernel_output(y);
  const int64_t width = in.size(-1), rows = in.numel() / width;
  dispatch(x, [&](auto t) {
    using T = decltype(t);
    at::parallel_for(0, rows, row_grain(width), [&](int64_t begin, int64_t end) {
      kernels::table<T>().rms_norm(end - begin, width, in.const_data_ptr<T>() + begin * width,
                                   s.const_data_ptr<T>(), static_cast<T>(eps),
                                   out.mutable_data_ptr<T>() + begin * width);
    });
  });
  return out.to(y.scalar_type());
}

std::tuple<at::Tensor, at::Tensor> new_gradients(const at::Tensor& grad_y, const at::Tensor& x,
                                                 const at::Tensor& scale, double eps) {
  check_arguments(x, scale, eps);
  check_same_dtype("_rms_norm_backward", "grad_y", grad_y, x);
  return {x.new_empty_symint(x.sym_sizes()), scale.new_empty_symint(scale.sym_sizes())};
}

std::tuple<at::Tensor, at::Tensor> rms_norm_backward_cpu(const at::Tensor& grad_y, const at::Tensor& x,
                                                         const at::Tensor& scale, double eps) {
  const auto [new_x, new_scale] = new_gradients(grad_y, x, scale, eps);
  const at::Tensor g = kernel_input(grad_y, x), in = kernel_input(x, x), s = kernel_input(scale, x);
  const at::Tensor grad_x = kernel_output(new_x), grad_scale = kernel_output(new_scale).zero_();
  const int64_t width = in.size(-1), rows = width == 0 ? 0 : in.numel() / width;
  dispatch(x, [&](auto t) {
    using T = decltype(t);
    sum_over_rows(rows, width, grad_scale.mutable_data_ptr<T>(), [&](int64_t begin, int64_t end, T* partial) {
      kernels::table<T>().rms_norm_backward(
          end - begin, width, g.const_data_ptr<T>() + begin * width, in.const_data_ptr<T>() + begin * width,
          s.const_data_ptr<T>(), static_cast<T>(eps), grad_x.mutable_data_ptr<T>() + begin * width, partial);
    });
  });
  return {grad_x.to(x.scalar_type()), grad_scale.to(x.scalar_type())};
}

struct RmsNorm : torch::autograd::Function<RmsNorm> {
  static at::Tensor forward(torch::autograd::AutogradContext* ctx, const at::Tensor& x,
                            const at::Tensor& scale, double eps) {
    at::AutoDispatchBelowADInplaceOrView guard;
    ctx->save_for_backward({x, scale});
    ctx->saved_data["eps"] = eps;
    return rms_norm(x, scale, eps);
  }

  static torch::autograd::variable_list backward(torch::autograd::AutogradContext* ctx,
                                                 const torch::autograd::variable_list& grads) {
    const auto saved = ctx->get_saved_variables();
    auto [grad_x, grad_scale] =
        rms_norm_backward(grads[0], saved[0], saved[1], ctx->saved_data["eps"].toDouble());
    return {grad_x, grad_scale, no_grad()};
  }
};

at::Tensor rms_norm_autograd(const at::Tensor& x, const at::Tensor& scale, double eps) {
  return RmsNorm::apply(x, scale, eps);
}

}  // namespace

TORCH_LIBRARY_IMPL(flashlm, CPU, m) {
  m.impl("rms_norm", rms_norm_cpu);
  m.impl("_rms_norm_backward", rms_norm_backward_cpu);
}
TORCH_LIBRARY_IMPL(flashlm, Meta, m) {
  m.impl("rms_norm", new_output);
  m.impl("_rms_norm_backward", new_gradients);
}
TORCH_LIBRARY_IMPL(flashlm, Autograd, m) {
  m.impl("rms_norm", rms_norm_autograd);
  m.impl("_rms_norm_backward", torch::autograd::autogradNotImplementedFallback());
}

}  // namespace flashlm

// SPDX-License-Identifier: Apache-2.0
#include "ops/glu.h"

#include "ops/common.h"

namespace flashlm {
namespace {

// ---- what tells the operators apart ----

struct Relu2 {
  static constexpr const char* kName = "relu2_glu";
  static constexpr const char* kBackward = "_relu2_glu_backward";
  template <class T>
  static constexpr auto kKernel = &kernels::Table<T>::relu2_glu;
};

struct Silu {
  static constexpr const char* kName = "silu_glu";
  static constexpr const char* kBackward = "_silu_glu_backward";
  template <class T>
  static constexpr auto kKernel = &kernels::Table<T>::silu_glu;
};

struct Sigmoid {
  static constexpr const char* kName = "sigmoid_glu";
  static constexpr const char* kBackward = "_sigmoid_glu_backward";
  template <class T>
  static constexpr auto kKernel = &kernels::Table<T>::sigmoid_glu;
};

/// Calls body(Gate{}) for each of them.
template <class Body>
void for_each_gate(const Body& body) {
  body(Relu2{});
  body(Silu{});
  body(Sigmoid{});
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(flashlm, m) {
  for_each_gate([&](auto gate) {
    const auto def = [&](const char* name, const char* signature) {
      m.def(c10::str(name, signature).c_str(), {at::Tag::pt2_compliant_tag});
    };
    def(gate.kName, "(Tensor gate, Tensor up) -> Tensor");
    def(gate.kBackward, "(Tensor grad_y, Tensor gate, Tensor up) -> (Tensor, Tensor)");
  });
}

namespace {

using Tensor = at::Tensor;
using Gradients = std::tuple<Tensor, Tensor>;

template <class Gate>
Tensor glu(const Tensor& gate, const Tensor& up) {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow(c10::str("flashlm::", Gate::kName).c_str(), "")
                             .template typed<decltype(glu<Gate>)>();
  return op.call(gate, up);
}

template <class Gate>
Gradients glu_backward(const Tensor& grad_y, const Tensor& gate, const Tensor& up) {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow(c10::str("flashlm::", Gate::kBackward).c_str(), "")
                             .template typed<decltype(glu_backward<Gate>)>();
  return op.call(grad_y, gate, up);
}

}  // namespace

Tensor relu2_glu(const Tensor& gate, const Tensor& up) { return glu<Relu2>(gate, up); }
Tensor silu_glu(const Tensor& gate, const Tensor& up) { return glu<Silu>(gate, up); }
Tensor sigmoid_glu(const Tensor& gate, const Tensor& up) { return glu<Sigmoid>(gate, up); }

namespace {

constexpr int64_t kGrain = 16384;

// ---- checks ----

/// t must have gate's dtype and shape.
void check_like_gate(const char* op, const char* name, const Tensor& t, const Tensor& gate) {
  TORCH_CHECK(t.scalar_type() == gate.scalar_type(), op, ": ", name, " must have gate's dtype ",
              gate.scalar_type(), ", got ", t.scalar_type());
  TORCH_CHECK(t.dim() == gate.dim(), op, ": ", name, " must have gate's ", gate.dim(), " dimensions, got ",
              t.dim());
  for (int64_t d = 0; d < gate.dim(); ++d) {
    TORCH_SYM_CHECK(gate.sym_size(d).sym_eq(t.sym_size(d)), op, ": ", name, "'s shape must be gate's ",
                    gate.sym_sizes(), ", got ", t.sym_sizes());
  }
}

template <class Gate>
void check_arguments(const Tensor& gate, const Tensor& up) {
  check_floating(Gate::kName, "gate", gate);
  check_like_gate(Gate::kName, "up", up, gate);
}

/// Checks the arguments and makes the output: the Meta kernel, and the CPU kernel's first line.
template <class Gate>
Tensor new_output(const Tensor& gate, const Tensor& up) {
  check_arguments<Gate>(gate, up);
  return gate.new_empty_symint(gate.sym_sizes());
}

template <class Gate>
Gradients new_gradients(const Tensor& grad_y, const Tensor& gate, const Tensor& up) {
  check_arguments<Gate>(gate, up);
  check_like_gate(Gate::kBackward, "grad_y", grad_y, gate);
  return {gate.new_empty_symint(gate.sym_sizes()), up.new_empty_symint(up.sym_sizes())};
}

// ---- CPU ----

template <class Gate>
Tensor glu_cpu(const Tensor& gate, const Tensor& up) {
  const Tensor y = new_output<Gate>(gate, up);
  const Tensor g = kernel_input(gate, gate), u = kernel_input(up, gate);
  const Tensor out = kernel_output(y);
  dispatch(gate, [&](auto t) {
    using T = decltype(t);
    const auto run = (kernels::table<T>().*Gate::template kKernel<T>).forward;
    at::parallel_for(0, out.numel(), kGrain, [&](int64_t begin, int64_t end) {
      run(end - begin, g.const_data_ptr<T>() + begin, u.const_data_ptr<T>() + begin,
          out.mutable_data_ptr<T>() + begin);
    });
  });
  return out.to(y.scalar_type());
}

template <class Gate>
Gradients glu_backward_cpu(const Tensor& grad_y, const Tensor& gate, const Tensor& up) {
  const auto [grad_gate, grad_up] = new_gradients<Gate>(grad_y, gate, up);
  const Tensor dy = kernel_input(grad_y, gate), g = kernel_input(gate, gate), u = kernel_input(up, gate);
  const Tensor dgate = kernel_output(grad_gate), dup = kernel_output(grad_up);
  dispatch(gate, [&](auto t) {
    using T = decltype(t);
    const auto run = (kernels::table<T>().*Gate::template kKernel<T>).backward;
    at::parallel_for(0, g.numel(), kGrain, [&](int64_t begin, int64_t end) {
      run(end - begin, dy.const_data_ptr<T>() + begin, g.const_data_ptr<T>() + begin,
          u.const_data_ptr<T>() + begin, dgate.mutable_data_ptr<T>() + begin,
          dup.mutable_data_ptr<T>() + begin);
    });
  });
  return {dgate.to(gate.scalar_type()), dup.to(gate.scalar_type())};
}

// ---- autograd ----

template <class Gate>
struct Glu : torch::autograd::Function<Glu<Gate>> {
  static Tensor forward(torch::autograd::AutogradContext* ctx, const Tensor& gate, const Tensor& up) {
    at::AutoDispatchBelowADInplaceOrView guard;
    ctx->save_for_backward({gate, up});
    return glu<Gate>(gate, up);
  }

  static torch::autograd::variable_list backward(torch::autograd::AutogradContext* ctx,
                                                 const torch::autograd::variable_list& grads) {
    const auto saved = ctx->get_saved_variables();
    auto [grad_gate, grad_up] = glu_backward<Gate>(grads[0], saved[0], saved[1]);
    return {grad_gate, grad_up};
  }
};

template <class Gate>
Tensor glu_autograd(const Tensor& gate, const Tensor& up) {
  return Glu<Gate>::apply(gate, up);
}

}  // namespace

TORCH_LIBRARY_IMPL(flashlm, CPU, m) {
  for_each_gate([&](auto gate) {
    m.impl(gate.kName, glu_cpu<decltype(gate)>);
    m.impl(gate.kBackward, glu_backward_cpu<decltype(gate)>);
  });
}
TORCH_LIBRARY_IMPL(flashlm, Meta, m) {
  for_each_gate([&](auto gate) {
    m.impl(gate.kName, new_output<decltype(gate)>);
    m.impl(gate.kBackward, new_gradients<decltype(gate)>);
  });
}
TORCH_LIBRARY_IMPL(flashlm, Autograd, m) {
  for_each_gate([&](auto gate) {
    m.impl(gate.kName, glu_autograd<decltype(gate)>);
    m.impl(gate.kBackward, torch::autograd::autogradNotImplementedFallback());
  });
}

}  // namespace flashlm

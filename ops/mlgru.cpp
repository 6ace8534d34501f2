// SPDX-License-Identifier: Apache-2.0
#include "ops/mlgru.h"

#include <string>

#include "ops/common.h"

namespace flashlm {

TORCH_LIBRARY_FRAGMENT(flashlm, m) {
  m.def(
      "mlgru(Tensor f, Tensor c, Tensor? h0=None, Tensor? lower_bound=None, *, str activation=\"none\") "
      "-> (Tensor h, Tensor h_last)",
      {at::Tag::pt2_compliant_tag});
  m.def(
      "mlgru_step(Tensor f, Tensor c, Tensor h, Tensor? lower_bound=None, *, str activation=\"none\") "
      "-> Tensor",
      {at::Tag::pt2_compliant_tag});
  m.def(
      "_mlgru_backward(Tensor grad_h, Tensor grad_h_last, Tensor f, Tensor c, Tensor h, Tensor? h0, "
      "Tensor? lower_bound, str activation) -> (Tensor, Tensor, Tensor, Tensor)",
      {at::Tag::pt2_compliant_tag});
}

namespace {

using Tensor = at::Tensor;
using OptionalTensor = std::optional<at::Tensor>;
using Outputs = std::tuple<Tensor, Tensor>;
using Gradients = std::tuple<Tensor, Tensor, Tensor, Tensor>;

}  // namespace

Outputs mlgru(const Tensor& f, const Tensor& c, const OptionalTensor& h0, const OptionalTensor& lower_bound,
              std::string_view activation) {
  static const auto op =
      c10::Dispatcher::singleton().findSchemaOrThrow("flashlm::mlgru", "").typed<decltype(mlgru)>();
  return op.call(f, c, h0, lower_bound, activation);
}

Tensor mlgru_step(const Tensor& f, const Tensor& c, const Tensor& h, const OptionalTensor& lower_bound,
                  std::string_view activation) {
  static const auto op =
      c10::Dispatcher::singleton().findSchemaOrThrow("flashlm::mlgru_step", "").typed<decltype(mlgru_step)>();
  return op.call(f, c, h, lower_bound, activation);
}

namespace {

Gradients mlgru_backward(const Tensor& grad_h, const Tensor& grad_h_last, const Tensor& f, const Tensor& c,
                         const Tensor& h, const OptionalTensor& h0, const OptionalTensor& lower_bound,
                         std::string_view activation) {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("flashlm::_mlgru_backward", "")
                             .typed<decltype(mlgru_backward)>();
  return op.call(grad_h, grad_h_last, f, c, h, h0, lower_bound, activation);
}

// ---- checks ----

/// t must have f's dtype and the shape `want`, which `letters` spell.
void check_like_f(const char* op, const char* name, const Tensor& t, const Tensor& f, const char* letters,
                  c10::SymIntArrayRef want) {
  TORCH_CHECK(t.scalar_type() == f.scalar_type(), op, ": ", name, " must have f's dtype ", f.scalar_type(),
              ", got ", t.scalar_type());
  const auto rule = [&] {
    return c10::str(op, ": ", name, " must be ", letters, " = ", want, ", got ", t.sym_sizes());
  };
  TORCH_CHECK(t.dim() == static_cast<int64_t>(want.size()), rule());
  for (int64_t d = 0; d < t.dim(); ++d) TORCH_SYM_CHECK(t.sym_size(d).sym_eq(want[d]), rule());
}

void check_arguments(const Tensor& f, const Tensor& c, const OptionalTensor& h0,
                     const OptionalTensor& lower_bound, std::string_view activation) {
  check_floating("mlgru", "f", f);
  check_dim("mlgru", "f", f, 3);
  const c10::SymInt width = f.sym_size(2), state[] = {f.sym_size(0), width};
  check_like_f("mlgru", "c", c, f, "(B, T, D)", f.sym_sizes());
  if (h0) check_like_f("mlgru", "h0", *h0, f, "(B, D)", state);
  TORCH_CHECK(activation == "none" || activation == "silu", "mlgru: activation must be none or silu, got ",
              activation);
  if (lower_bound) {
    TORCH_CHECK(
        activation == "silu",
        "mlgru: lower_bound is for activation silu, got activation none; without it f is used as it is");
    check_like_f("mlgru", "lower_bound", *lower_bound, f, "(D)", width);
  }
}

/// Checks the arguments and makes the outputs: the Meta kernel, and the CPU kernel's first line.
Outputs new_outputs(const Tensor& f, const Tensor& c, const OptionalTensor& h0,
                    const OptionalTensor& lower_bound, std::string_view activation) {
  check_arguments(f, c, h0, lower_bound, activation);
  return {f.new_empty_symint(f.sym_sizes()), f.new_empty_symint({f.sym_size(0), f.sym_size(2)})};
}

Gradients new_gradients(const Tensor& grad_h, const Tensor& grad_h_last, const Tensor& f, const Tensor& c,
                        const Tensor& h, const OptionalTensor& h0, const OptionalTensor& lower_bound,
                        std::string_view activation) {
  check_arguments(f, c, h0, lower_bound, activation);
  const c10::SymInt state[] = {f.sym_size(0), f.sym_size(2)};
  check_like_f("_mlgru_backward", "grad_h", grad_h, f, "(B, T, D)", f.sym_sizes());
  check_like_f("_mlgru_backward", "grad_h_last", grad_h_last, f, "(B, D)", state);
  check_like_f("_mlgru_backward", "h", h, f, "(B, T, D)", f.sym_sizes());
  const auto new_gradient = [&](const OptionalTensor& t) {
    return t ? t->new_empty_symint(t->sym_sizes()) : f.new_empty({0});
  };
  return {f.new_empty_symint(f.sym_sizes()), c.new_empty_symint(c.sym_sizes()), new_gradient(h0),
          new_gradient(lower_bound)};
}

// ---- how the work is cut ----

/// Channels that one thread takes at least: a cache line of float32.
constexpr int64_t kChannels = 16;

/// Channels are independent, so threads may share them in any way, with the same bits. Time is cut by shape
/// alone, and only where channels are so few that no number of threads has enough of them: every chunk is
/// read twice.
struct Cut {
  int64_t batch, time, width, rows, chunks;

  explicit Cut(const Tensor& f) : batch(f.size(0)), time(f.size(1)), width(f.size(2)) {
    constexpr int64_t kFewChannels = 64, kShortest = 2048, kMostChunks = 32;
    const bool few = batch * width <= kFewChannels && time >= 2 * kShortest;
    rows = few ? std::max(kShortest, (time + kMostChunks - 1) / kMostChunks) : time;
    chunks = (time + rows - 1) / rows;
  }

  int64_t rows_of(int64_t chunk) const { return std::min(rows, time - chunk * rows); }

  /// Calls body(part, first, count) in parallel: `count` channels from `first` of part sequence * chunks +
  /// chunk; as wide as threads allow, so that rows are read in long runs.
  template <class Body>
  void for_each(const Body& body) const {
    const int64_t units = (width + kChannels - 1) / kChannels;
    const int64_t grain = std::max<int64_t>(1, 16384 / (rows * kChannels));
    at::parallel_for(0, batch * chunks * units, grain, [&](int64_t begin, int64_t end) {
      while (begin < end) {
        const int64_t part = begin / units, first = (begin - part * units) * kChannels;
        begin = std::min(end, (part + 1) * units);
        body(part, first, std::min(width, (begin - part * units) * kChannels) - first);
      }
    });
  }
};

/// The arguments as the kernels read them.
template <class T>
struct Inputs {
  Cut cut;
  Tensor f, c, lower_bound;

  Inputs(const Tensor& f_, const Tensor& c_, const OptionalTensor& bound, std::string_view activation)
      : cut(f_), f(kernel_input(f_, f_)), c(kernel_input(c_, f_)) {
    if (activation == "silu")
      lower_bound = bound ? kernel_input(*bound, f_) : at::zeros({cut.width}, f.options());
  }

  /// Where a channel of a part begins in f, and in whatever is like it.
  int64_t offset(int64_t part, int64_t channel) const {
    const int64_t sequence = part / cut.chunks, chunk = part % cut.chunks;
    return (sequence * cut.time + chunk * cut.rows) * cut.width + channel;
  }

  kernels::MlgruRows<T> rows(int64_t part, int64_t first, int64_t count) const {
    const int64_t at = offset(part, first);
    return {cut.rows_of(part % cut.chunks),
            count,
            cut.width,
            f.const_data_ptr<T>() + at,
            c.const_data_ptr<T>() + at,
            lower_bound.defined() ? lower_bound.const_data_ptr<T>() + first : nullptr};
  }
};

/// What enters each part, (B, chunks, D): `first`, or zeros, enters the chunk that is first in the direction
/// of `step` (1 or -1), and what enters the next is product * that + end, where summarize(part, first, count,
/// product, end) puts both.
template <class T, class Summarize>
Tensor entering(const Inputs<T>& in, const OptionalTensor& first, int64_t step, const Summarize& summarize) {
  const Cut& cut = in.cut;
  const Tensor states = at::zeros({cut.batch, cut.chunks, cut.width}, in.f.options());
  const int64_t start = step > 0 ? 0 : cut.chunks - 1, stop = cut.chunks - 1 - start;
  if (first) states.select(1, start).copy_(*first);
  if (cut.chunks == 1) return states;
  const Tensor product = at::ones_like(states), end = at::zeros_like(states);
  cut.for_each([&](int64_t part, int64_t channel, int64_t count) {
    if (part % cut.chunks == stop) return;  // nothing follows it
    const int64_t at = part * cut.width + channel;
    summarize(part, channel, count, product.mutable_data_ptr<T>() + at, end.mutable_data_ptr<T>() + at);
  });
  const T *p = product.const_data_ptr<T>(), *e = end.const_data_ptr<T>();
  T* s = states.mutable_data_ptr<T>();
  for (int64_t b = 0; b < cut.batch; ++b) {
    for (int64_t chunk = start; chunk != stop; chunk += step) {
      const int64_t from = (b * cut.chunks + chunk) * cut.width, to = from + step * cut.width;
      for (int64_t i = 0; i < cut.width; ++i) s[to + i] = p[from + i] * s[from + i] + e[from + i];
    }
  }
  return states;
}

/// h_{t-1} of each part's first row.
template <class T>
Tensor states_before(const Inputs<T>& in, const OptionalTensor& h0) {
  return entering(in, h0, 1, [&](int64_t part, int64_t first, int64_t count, T* product, T* end) {
    kernels::table<T>().mlgru_end(in.rows(part, first, count), product, end);
  });
}

// ---- CPU ----

Outputs mlgru_cpu(const Tensor& f, const Tensor& c, const OptionalTensor& h0,
                  const OptionalTensor& lower_bound, std::string_view activation) {
  auto [h, h_last] = new_outputs(f, c, h0, lower_bound, activation);
  if (f.numel() == 0) return {h, h0 ? h_last.copy_(*h0) : h_last.zero_()};
  const Tensor out = kernel_output(h);
  dispatch(f, [&](auto t) {
    using T = decltype(t);
    const Inputs<T> in(f, c, lower_bound, activation);
    const Tensor before = states_before(in, h0);
    in.cut.for_each([&](int64_t part, int64_t first, int64_t count) {
      kernels::table<T>().mlgru(in.rows(part, first, count),
                                before.const_data_ptr<T>() + part * in.cut.width + first,
                                out.mutable_data_ptr<T>() + in.offset(part, first));
    });
  });
  h_last.copy_(out.select(1, out.size(1) - 1));
  return {out.to(h.scalar_type()), h_last};
}

// The states that enter the chunks are in h; the gradients that do, against time, must be found as the states
// were.
Gradients mlgru_backward_cpu(const Tensor& grad_h, const Tensor& grad_h_last, const Tensor& f,
                             const Tensor& c, const Tensor& h, const OptionalTensor& h0,
                             const OptionalTensor& lower_bound, std::string_view activation) {
  auto [grad_f, grad_c, grad_h0, grad_bound] =
      new_gradients(grad_h, grad_h_last, f, c, h, h0, lower_bound, activation);
  if (f.numel() == 0) {
    if (h0) grad_h0.copy_(grad_h_last);
    return {grad_f, grad_c, grad_h0, grad_bound.zero_()};
  }
  dispatch(f, [&](auto t) {
    using T = decltype(t);
    const Inputs<T> in(f, c, lower_bound, activation);
    const Cut& cut = in.cut;
    const Tensor states = kernel_input(h, f), dh = kernel_input(grad_h, f);
    const Tensor start = h0 ? kernel_input(*h0, f) : at::zeros({cut.batch, cut.width}, in.f.options());
    const Tensor carry =
        entering(in, grad_h_last, -1, [&](int64_t part, int64_t first, int64_t count, T* product, T* end) {
          kernels::table<T>().mlgru_backward_end(
              in.rows(part, first, count), dh.const_data_ptr<T>() + in.offset(part, first), product, end);
        });
    const Tensor df = kernel_output(grad_f), dc = kernel_output(grad_c);
    const Tensor bound = in.lower_bound.defined() ? at::zeros_like(carry) : Tensor();  // a part's sums
    cut.for_each([&](int64_t part, int64_t first, int64_t count) {
      const int64_t at = in.offset(part, first), own = part * cut.width + first;
      const T* state = states.const_data_ptr<T>() + at;
      const T* before = part % cut.chunks > 0
                            ? state - cut.width
                            : start.const_data_ptr<T>() + part / cut.chunks * cut.width + first;
      kernels::table<T>().mlgru_backward(in.rows(part, first, count), before, state,
                                         dh.const_data_ptr<T>() + at, carry.mutable_data_ptr<T>() + own,
                                         df.mutable_data_ptr<T>() + at, dc.mutable_data_ptr<T>() + at,
                                         bound.defined() ? bound.mutable_data_ptr<T>() + own : nullptr);
    });
    grad_f = df.to(f.scalar_type());
    grad_c = dc.to(f.scalar_type());
    if (h0) grad_h0.copy_(carry.select(1, 0));
    if (lower_bound) {
      const Tensor parts = bound.view({-1, cut.width});
      Tensor sum = at::zeros({cut.width}, parts.options());
      for (int64_t part = 0; part < parts.size(0); ++part) sum += parts[part];  // one order for any threads
      grad_bound.copy_(sum);
    }
  });
  return {grad_f, grad_c, grad_h0, grad_bound};
}

// ---- autograd ----

struct Mlgru : torch::autograd::Function<Mlgru> {
  static torch::autograd::variable_list forward(torch::autograd::AutogradContext* ctx, const Tensor& f,
                                                const Tensor& c, const OptionalTensor& h0,
                                                const OptionalTensor& lower_bound,
                                                const std::string& activation) {
    at::AutoDispatchBelowADInplaceOrView guard;
    auto [h, h_last] = mlgru(f, c, h0, lower_bound, activation);
    ctx->save_for_backward({f, c, h, h0.value_or(Tensor()), lower_bound.value_or(Tensor())});
    ctx->saved_data["activation"] = activation;
    return {h, h_last};
  }

  static torch::autograd::variable_list backward(torch::autograd::AutogradContext* ctx,
                                                 const torch::autograd::variable_list& grads) {
    const auto saved = ctx->get_saved_variables();
    auto [grad_f, grad_c, grad_h0, grad_bound] =
        mlgru_backward(grads[0], grads[1], saved[0], saved[1], saved[2], if_defined(saved[3]),
                       if_defined(saved[4]), ctx->saved_data["activation"].toStringRef());
    return {grad_f, grad_c, saved[3].defined() ? grad_h0 : no_grad(),
            saved[4].defined() ? grad_bound : no_grad(), no_grad()};
  }
};

Outputs mlgru_autograd(const Tensor& f, const Tensor& c, const OptionalTensor& h0,
                       const OptionalTensor& lower_bound, std::string_view activation) {
  const auto out = Mlgru::apply(f, c, h0, lower_bound, std::string(activation));
  return {out[0], out[1]};
}

Tensor step_composite(const Tensor& f, const Tensor& c, const Tensor& h, const OptionalTensor& lower_bound,
                      std::string_view activation) {
  check_dim("mlgru_step", "f", f, 2);
  check_dim("mlgru_step", "c", c, 2);
  return std::get<1>(mlgru(f.unsqueeze(1), c.unsqueeze(1), h, lower_bound, activation));
}

}  // namespace

TORCH_LIBRARY_IMPL(flashlm, CompositeImplicitAutograd, m) { m.impl("mlgru_step", step_composite); }
TORCH_LIBRARY_IMPL(flashlm, CPU, m) {
  m.impl("mlgru", mlgru_cpu);
  m.impl("_mlgru_backward", mlgru_backward_cpu);
}
TORCH_LIBRARY_IMPL(flashlm, Meta, m) {
  m.impl("mlgru", new_outputs);
  m.impl("_mlgru_backward", new_gradients);
}
TORCH_LIBRARY_IMPL(flashlm, Autograd, m) {
  m.impl("mlgru", mlgru_autograd);
  m.impl("_mlgru_backward", torch::autograd::autogradNotImplementedFallback());
}

}  // namespace flashlm

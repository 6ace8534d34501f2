// SPDX-License-Identifier: Apache-2.0
#include "ops/packed_linear.h"

#include "ops/ternary_weights.h"

namespace flashlm {

TORCH_LIBRARY_FRAGMENT(flashlm, m) {
  m.def(
      "packed_linear(Tensor x, Tensor packed, Tensor scale, SymInt out_features, Tensor? norm_scale=None, *, "
      "str activation=\"int8\", float eps=1e-6) -> Tensor",
      {at::Tag::pt2_compliant_tag});
}

at::Tensor packed_linear(const at::Tensor& x, const at::Tensor& packed, const at::Tensor& scale,
                         int64_t out_features, const std::optional<at::Tensor>& norm_scale,
                         std::string_view activation, double eps) {
  static const auto op =
      c10::Dispatcher::singleton()
          .findSchemaOrThrow("flashlm::packed_linear", "")
          .typed<at::Tensor(const at::Tensor&, const at::Tensor&, const at::Tensor&, c10::SymInt,
                            const std::optional<at::Tensor>&, std::string_view, double)>();
  return op.call(x, packed, scale, out_features, norm_scale, activation, eps);
}

namespace {

using kernels::kPackedOutputs;

/// Checks the arguments and makes the output: the Meta kernel, and the CPU kernel's first line.
at::Tensor new_output(const at::Tensor& x, const at::Tensor& packed, const at::Tensor& scale,
                      c10::SymInt out_features, const std::optional<at::Tensor>& norm_scale,
                      std::string_view activation, double eps) {
  check_floating("packed_linear", "x", x);
  TORCH_CHECK(x.dim() >= 1, "packed_linear: x must have at least 1 dimension, got 0");
  const c10::SymInt in = x.sym_size(-1);
  check_packed("packed_linear", packed, scale, out_features, in);
  if (norm_scale) check_norm_scale("packed_linear", "norm_scale", *norm_scale, x, in);
  if (parse_activation("packed_linear", activation)) {
    constexpr int64_t kLargestIn = (int64_t{1} << 24) - 1;
    TORCH_SYM_CHECK(in.sym_le(kLargestIn), "packed_linear: in_features must be at most ", kLargestIn,
                    " in activation mode 'int8', where sums are int32, got ", in, "; use activation 'none'");
  }
  TORCH_CHECK(eps >= 0, "packed_linear: eps must be >= 0, got ", eps);
  auto shape = x.sym_sizes().vec();
  shape.back() = out_features;
  return x.new_empty_symint(shape);
}

/// The tensors of a call as the kernels read them. x is (m, k); norm_scale may be undefined.
struct Inputs {
  at::Tensor x, packed, scale, norm_scale;
  int64_t m, n, k;
  double eps;

  Inputs(const at::Tensor& x_, const at::Tensor& packed_, const at::Tensor& scale_, int64_t n_,
         const std::optional<at::Tensor>& norm_scale_, double eps_)
      : x(kernel_input(x_, x_)),
        packed(packed_.contiguous()),
        scale(kernel_input(scale_, x_)),
        norm_scale(norm_scale_ ? kernel_input(*norm_scale_, x_) : at::Tensor()),
        m(x.numel() / x.size(-1)),
        n(n_),
        k(x.size(-1)),
        eps(eps_) {}

  template <class T>
  void norm(int64_t begin, int64_t end, T* normed) const {
    kernels::table<T>().rms_norm(end - begin, k, x.const_data_ptr<T>() + begin * k,
                                 norm_scale.const_data_ptr<T>(), static_cast<T>(eps), normed);
  }

  /// The panels from that of output `first` on.
  const uint8_t* panels(int64_t first) const {
    return packed.const_data_ptr<uint8_t>() + first / kPackedOutputs * packed.size(1) * packed.size(2);
  }
};

/// body(row, last_row, output, last_output) for the blocks of an (m, n) product over k, in parallel: by
/// panels of outputs, which share nothing, and where these are few by rows too. A task worth a thread is
/// about 20 µs.
template <class Body>
void for_blocks(const Inputs& in, const Body& body) {
  constexpr int64_t kTaskProducts = 1 << 21, kFewPanels = 32, kFewRows = 96;
  const int64_t panels = in.packed.size(0);
  const int64_t row_blocks = std::max<int64_t>(1, std::min(kFewPanels / panels, in.m / kFewRows));
  const int64_t rows = (in.m + row_blocks - 1) / row_blocks;
  const int64_t grain = std::max<int64_t>(1, kTaskProducts / (rows * kPackedOutputs * in.k));
  at::parallel_for(0, row_blocks * panels, grain, [&](int64_t begin, int64_t end) {
    for (int64_t next; begin < end; begin = next) {
      next = std::min(end, (begin / panels + 1) * panels);  // panels of the same rows
      const int64_t row = begin / panels * rows, output = begin % panels * kPackedOutputs;
      body(row, std::min(in.m, row + rows), output, std::min(in.n, output + (next - begin) * kPackedOutputs));
    }
  });
}

template <class T>
void product_int8(const Inputs& in, T* y) {
  const auto& table = kernels::table<T>();
  const int64_t padded = kernels::quantized_width(in.k);
  const Scratch<int8_t> q(in.m * padded);
  const Scratch<T> inverse_scale(in.m);
  const Scratch<int32_t> row_sum(in.m);
  const auto quantize = [&](int64_t begin, int64_t end, const T* x) {
    table.quantize_rows(end - begin, in.k, x, kSmallestActivation, q.data + begin * padded,
                        inverse_scale.data + begin, row_sum.data + begin);
  };
  at::parallel_for(0, in.m, row_grain(in.k), [&](int64_t begin, int64_t end) {
    if (!in.norm_scale.defined()) return quantize(begin, end, in.x.const_data_ptr<T>() + begin * in.k);
    const Scratch<T> normed(in.k);
    for (int64_t row = begin; row < end; ++row) {
      in.norm(row, row + 1, normed.data);
      quantize(row, row + 1, normed.data);
    }
  });
  for_blocks(in, [&](int64_t row, int64_t last_row, int64_t output, int64_t last_output) {
    table.packed_gemm(last_row - row, last_output - output, in.k, q.data + row * padded, row_sum.data + row,
                      inverse_scale.data + row, in.panels(output), *in.scale.const_data_ptr<T>(),
                      y + row * in.n + output, in.n);
  });
}

template <class T>
void product_float(const Inputs& in, T* y) {
  const auto& table = kernels::table<T>();
  const T* a = in.x.const_data_ptr<T>();
  Scratch<T> normed;
  if (in.norm_scale.defined()) {
    normed.resize(in.m * in.k);
    a = normed.data;
    at::parallel_for(0, in.m, row_grain(in.k),
                     [&](int64_t begin, int64_t end) { in.norm(begin, end, normed.data + begin * in.k); });
  }
  for_blocks(in, [&](int64_t row, int64_t last_row, int64_t output, int64_t last_output) {
    const int64_t width = (kPackedOutputs + table.gemm_panel - 1) / table.gemm_panel * table.gemm_panel;
    const Scratch<T> weight(kPackedOutputs * in.k), b(width * in.k);
    for (; output < last_output; output += kPackedOutputs) {
      const int64_t outputs = std::min(kPackedOutputs, last_output - output);
      table.packed_unpack(outputs, in.k, in.panels(output), *in.scale.const_data_ptr<T>(), weight.data);
      table.gemm_pack(in.k, outputs, weight.data, /*row_stride=*/1, /*col_stride=*/in.k, b.data);
      table.gemm(last_row - row, outputs, in.k, a + row * in.k, /*a_row=*/in.k, /*a_col=*/1, b.data,
                 y + row * in.n + output, in.n, /*accumulate=*/false);
    }
  });
}

at::Tensor packed_linear_cpu(const at::Tensor& x, const at::Tensor& packed, const at::Tensor& scale,
                             int64_t out_features, const std::optional<at::Tensor>& norm_scale,
                             std::string_view activation, double eps) {
  at::Tensor y = new_output(x, packed, scale, out_features, norm_scale, activation, eps);
  if (y.numel() == 0) return y;
  const Inputs in(x, packed, scale, out_features, norm_scale, eps);
  const at::Tensor out = kernel_output(y);
  dispatch(x, [&](auto t) {
    using T = decltype(t);
    (parse_activation("packed_linear", activation) ? product_int8<T>
                                                   : product_float<T>)(in, out.mutable_data_ptr<T>());
  });
  return out.to(y.scalar_type());
}

}  // namespace

TORCH_LIBRARY_IMPL(flashlm, CPU, m) { m.impl("packed_linear", packed_linear_cpu); }
TORCH_LIBRARY_IMPL(flashlm, Meta, m) { m.impl("packed_linear", new_output); }
TORCH_LIBRARY_IMPL(flashlm, Autograd, m) {
  m.impl("packed_linear", torch::autograd::autogradNotImplementedFallback());
}

}  // namespace flashlm

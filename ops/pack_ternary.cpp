// SPDX-License-Identifier: Apache-2.0
#include "ops/pack_ternary.h"

#include "ops/ternary_weights.h"

namespace flashlm {

TORCH_LIBRARY_FRAGMENT(flashlm, m) {
  m.def("pack_ternary(Tensor weight, *, str quantizer=\"absmean\") -> (Tensor packed, Tensor scale)",
        {at::Tag::pt2_compliant_tag});
  m.def("unpack_ternary(Tensor packed, Tensor scale, SymInt out_features, SymInt in_features) -> Tensor",
        {at::Tag::pt2_compliant_tag});
}

std::tuple<at::Tensor, at::Tensor> pack_ternary(const at::Tensor& weight, std::string_view quantizer) {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("flashlm::pack_ternary", "")
                             .typed<decltype(pack_ternary)>();
  return op.call(weight, quantizer);
}

at::Tensor unpack_ternary(const at::Tensor& packed, const at::Tensor& scale, int64_t out_features,
                          int64_t in_features) {
  static const auto op =
      c10::Dispatcher::singleton()
          .findSchemaOrThrow("flashlm::unpack_ternary", "")
          .typed<at::Tensor(const at::Tensor&, const at::Tensor&, c10::SymInt, c10::SymInt)>();
  return op.call(packed, scale, out_features, in_features);
}

namespace {

using kernels::kPackedOutputs;

/// Checks the arguments and makes the outputs: the Meta kernel, and the CPU kernel's first line.
std::tuple<at::Tensor, at::Tensor> new_packed(const at::Tensor& weight, std::string_view quantizer) {
  check_floating("pack_ternary", "weight", weight);
  check_dim("pack_ternary", "weight", weight, 2);
  TORCH_SYM_CHECK(weight.sym_size(1).sym_ge(1), "pack_ternary: weight's in must be at least 1, got ",
                  weight.sym_size(1));
  parse_quantizer("pack_ternary", quantizer);
  return {weight.new_empty_symint(
              {packed_panels(weight.sym_size(0)), packed_lines(weight.sym_size(1)), kPackedOutputs},
              weight.options().dtype(at::kByte)),
          weight.new_empty({}, weight.options().dtype(compute_dtype(weight)))};
}

template <class T>
void pack(const at::Tensor& weight, kernels::Quantizer quantizer, at::Tensor& packed, at::Tensor& scale) {
  const auto& table = kernels::table<T>();
  const int64_t n = weight.size(0), k = weight.size(1);
  const TernaryScale<T> s = ternary_scale<T>(weight, quantizer);
  *scale.mutable_data_ptr<T>() = s.gamma;
  uint8_t* to = packed.mutable_data_ptr<uint8_t>();
  at::parallel_for(0, packed.size(0), row_grain(kPackedOutputs * k), [&](int64_t first, int64_t last) {
    std::vector<int8_t> codes(kPackedOutputs * k);
    for (int64_t panel = first; panel < last; ++panel) {
      const int64_t begin = panel * kPackedOutputs, outputs = std::min(kPackedOutputs, n - begin);
      table.ternary_codes(outputs * k, weight.const_data_ptr<T>() + begin * k, s.bound, codes.data());
      table.packed_pack(outputs, k, codes.data(), to + panel * packed.stride(0));
    }
  });
}

std::tuple<at::Tensor, at::Tensor> pack_ternary_cpu(const at::Tensor& weight, std::string_view quantizer) {
  auto [packed, scale] = new_packed(weight, quantizer);
  const at::Tensor in = kernel_input(weight, weight);
  dispatch(weight, [&, &packed = packed, &scale = scale](auto t) {
    pack<decltype(t)>(in, parse_quantizer("pack_ternary", quantizer), packed, scale);
  });
  return {packed, scale};
}

at::Tensor new_weight(const at::Tensor& packed, const at::Tensor& scale, c10::SymInt out_features,
                      c10::SymInt in_features) {
  check_packed("unpack_ternary", packed, scale, out_features, in_features);
  return scale.new_empty_symint({out_features, in_features}, scale.options().dtype(compute_dtype(scale)));
}

at::Tensor unpack_ternary_cpu(const at::Tensor& packed, const at::Tensor& scale, int64_t out_features,
                              int64_t in_features) {
  at::Tensor weight = new_weight(packed, scale, out_features, in_features);
  const at::Tensor lines = packed.contiguous(), gamma = kernel_input(scale, scale);
  dispatch(scale, [&](auto t) {
    using T = decltype(t);
    at::parallel_for(
        0, lines.size(0), row_grain(kPackedOutputs * in_features), [&](int64_t first, int64_t last) {
          const int64_t begin = first * kPackedOutputs, end = std::min(out_features, last * kPackedOutputs);
          kernels::table<T>().packed_unpack(
              end - begin, in_features, lines.const_data_ptr<uint8_t>() + first * lines.stride(0),
              *gamma.const_data_ptr<T>(), weight.mutable_data_ptr<T>() + begin * in_features);
        });
  });
  return weight;
}

}  // namespace

TORCH_LIBRARY_IMPL(flashlm, CPU, m) {
  m.impl("pack_ternary", pack_ternary_cpu);
  m.impl("unpack_ternary", unpack_ternary_cpu);
}
TORCH_LIBRARY_IMPL(flashlm, Meta, m) {
  m.impl("pack_ternary", new_packed);
  m.impl("unpack_ternary", new_weight);
}
TORCH_LIBRARY_IMPL(flashlm, Autograd, m) {
  m.impl("pack_ternary", torch::autograd::autogradNotImplementedFallback());
  m.impl("unpack_ternary", torch::autograd::autogradNotImplementedFallback());
}

}  // namespace flashlm

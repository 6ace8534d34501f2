// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>
#include <string_view>

namespace flashlm {

/// bit_linear for inference, on a weight that pack_ternary has put into 2 bits: y = scale · a · Qᵀ, with a
/// made from x as ops/bit_linear.h says. In activation mode "int8" the result is bit_linear's, bit for bit,
/// for the weight and the quantizer that were packed; mode "none" unpacks the weight 64 outputs at a time.
///
///   x              (..., K)  float32, bfloat16 or float64, any strides; K >= 1
///   packed, scale  as pack_ternary returns them; scale may be float32, bfloat16 or float64
///   out_features   N
///   norm_scale     (K)       x's dtype
///   returns        (..., N)  x's dtype, contiguous
///
/// bfloat16 is computed in float32. No derivative: backward through any argument is an error; train with
/// bit_linear and pack its weight. Infinities and NaNs are treated as there.
///
/// Errors: another dtype, sizes that do not match, K = 0, an unknown activation, eps < 0, and in mode "int8"
/// K > 16777215: beyond it 128 · K, the largest possible sum, overflows int32. That the codes are some that
/// pack_ternary writes (0, 1 or 2) is not checked.
/// Schema: flashlm::packed_linear(Tensor x, Tensor packed, Tensor scale, SymInt out_features,
///                                Tensor? norm_scale=None, *, str activation="int8", float eps=1e-6) ->
///                                Tensor
at::Tensor packed_linear(const at::Tensor& x, const at::Tensor& packed, const at::Tensor& scale,
                         int64_t out_features, const std::optional<at::Tensor>& norm_scale = std::nullopt,
                         std::string_view activation = "int8", double eps = 1e-6);

}  // namespace flashlm

// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <ATen/core/Tensor.h>

#include <string_view>
#include <tuple>

namespace flashlm {

/// Ternary weights in 2 bits each, for ops/packed_linear.h: weight ≈ scale · Q, with Q in {-1, 0, 1} and
/// scale = gamma as bit_linear's quantizer of the same name makes them (ops/bit_linear.h).
///
///   weight   (N, K)  float32, bfloat16 or float64, any strides; K >= 1
///   returns  packed  (ceil(N/64), ceil(K/4), 64)  uint8; layout in docs/formats.md, the same on every CPU
///            scale   ()                           float32, or float64 for a float64 weight
///
/// An infinity or a NaN in weight makes scale NaN. No derivative: backward through scale is an error.
/// Errors: another dtype, weight not 2-D, K = 0, an unknown quantizer.
/// Schema: flashlm::pack_ternary(Tensor weight, *, str quantizer="absmean") -> (Tensor packed, Tensor scale)
std::tuple<at::Tensor, at::Tensor> pack_ternary(const at::Tensor& weight,
                                                std::string_view quantizer = "absmean");

/// The weight that packed and scale stand for: scale · Q.
///
///   packed, scale  as pack_ternary returns them; scale may be float32, bfloat16 or float64
///   out_features   N
///   in_features    K
///   returns        (N, K)  float32, or float64 for a float64 scale; contiguous
///
/// No derivative: backward through scale is an error. Errors: another dtype, sizes that are not those of an
/// (N, K) weight. That the codes are some that pack_ternary writes (0, 1 or 2) is not checked.
/// Schema: flashlm::unpack_ternary(Tensor packed, Tensor scale, SymInt out_features, SymInt in_features)
///         -> Tensor
at::Tensor unpack_ternary(const at::Tensor& packed, const at::Tensor& scale, int64_t out_features,
                          int64_t in_features);

}  // namespace flashlm

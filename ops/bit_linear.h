// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>
#include <string_view>

namespace flashlm {

/// Linear layer with ternary weights, with the RMSNorm and the activation quantization before it:
///   y = gamma · a · Qᵀ.
///
///   n        rms_norm(x, norm_scale, eps) if there is a norm_scale, else x; see ops/rms_norm.h
///   a        activation "none": n
///            activation "int8": q / s, for each row s = 127 / max(max|n|, 1e-5) and
///              q = clip(round(s · n), -128, 127), ties to even; the product is exact in int32
///   Q, gamma quantizer "absmean" (BitNet b1.58, arXiv 2402.17764): gamma = max(mean|weight|, 1e-5),
///              Q = clip(round(weight / gamma), -1, 1)
///            quantizer "threshold": gamma = 1, Q = sign(weight) where |weight| > mean|weight|, else 0
///
///   x           (..., K)  float32, bfloat16 or float64, any strides; K >= 1
///   weight      (N, K)    same dtype
///   norm_scale  (K)       same dtype
///   returns     (..., N)  same dtype, contiguous
///
/// Differentiable in x, weight and norm_scale, straight through both quantizations: da/dn and
/// d(gamma · Q)/dweight are taken to be 1.
///   dn = gamma · dy · Q,   dweight = dyᵀ · a
/// bfloat16 tensors are computed in float32. `gradient` says what these two products multiply, with sums in
/// float32 or int32; a CPU without such an instruction, and float64, take "float32":
///
///   "float32"   dy as it is
///   "bfloat16"  dy rounded to bfloat16 (for dweight dy / s, and a in mode "none"); Q and q are exact. The
///               error of a gradient is 2e-3 of its norm. With AVX512-BF16.
///   "int8"      dy by rows, and for dweight dy / s by columns within 256 rows, each at a scale of its own,
///               127 / max|.|. The error is 4e-3 of the norm, 2e-2 where rows' sizes spread e-fold. With VNNI
///               or NEON dot products, and in mode "int8" only.
///
/// Speeds, and what training loses by each (nothing so far), are in docs/results/kernels.md.
/// Products of Q with floats, in mode "none" and for dn in "float32", are exact but for the rounding of sums:
/// made of additions alone, by tables of partial sums, in the same order on every CPU. With AMX they, and the
/// product of dy / s in "float32" with q, are sums of three bfloat16 parts of each float32, whose products
/// with Q and q are exact, in another order.
///
/// Between forward and backward are kept: q and 1 / s in mode "int8" without a norm (a quarter of x, which
/// may then be freed); else x, of which n and a are made again.
///
/// Q is packed for the kernels once for as long as weight keeps its values: an optimizer step, however many
/// calls that is. The packed forms take up to 4 bytes a weight, and go with its memory. A weight that is
/// changed behind autograd's back (through .data or a pointer) is noticed.
///
/// An infinity or a NaN is never quantized away: in weight it makes y NaN, in a row of x in mode "int8" it
/// makes that row NaN, and in mode "none" those of the row's results whose Q is not 0 there. A column of dy
/// that is not finite makes its row of dweight NaN.
///
/// Errors: another dtype, weight not 2-D, sizes that do not match, K = 0, an unknown quantizer, activation or
/// gradient, gradient "int8" without activation "int8", eps < 0, and in mode "int8" K > 16777215: beyond it
/// 128 · K, the largest possible sum, overflows int32.
///
/// Schema: flashlm::bit_linear(Tensor x, Tensor weight, Tensor? norm_scale=None, *, str quantizer="absmean",
///                             str activation="int8", float eps=1e-6, str gradient="float32") -> Tensor
at::Tensor bit_linear(const at::Tensor& x, const at::Tensor& weight,
                      const std::optional<at::Tensor>& norm_scale = std::nullopt,
                      std::string_view quantizer = "absmean", std::string_view activation = "int8",
                      double eps = 1e-6, std::string_view gradient = "float32");

}  // namespace flashlm

// SPDX-License-Identifier: Apache-2.0
// Sums of four products of bytes, the instruction that int8 matrix products are built on. For kernel sources
// only, like vec.h.
#pragma once

#include "ops/kernels/vec.h"

#if defined(__AVX512VNNI__) || defined(__AVXVNNI__)
#include <immintrin.h>
#elif defined(__ARM_FEATURE_DOTPROD)
#include <arm_neon.h>
#endif

namespace flashlm::kernels {
namespace {

/// Whether dot4 is one instruction on this level. Elsewhere it is a dozen, for tests and rare tails.
#if defined(__AVX512VNNI__) || defined(__AVXVNNI__) || defined(__ARM_FEATURE_DOTPROD)
constexpr bool kHasDot4 = true;
#else
constexpr bool kHasDot4 = false;
#endif

/// Whether dot4 reads the bytes of w as unsigned.
#if defined(__AVX512VNNI__) || defined(__AVXVNNI__)
constexpr bool kDot4Unsigned = true;
#else
constexpr bool kDot4Unsigned = false;
#endif

/// Per 32-bit lane: sum + w0 a0 + w1 a1 + w2 a2 + w3 a3 over the lane's four bytes, exactly. The bytes of a
/// are signed. Those of w are unsigned if kDot4Unsigned, else signed: in [0, 127], where there is no
/// difference, unless the caller minds which.
inline Vec<int32_t> dot4(Vec<int32_t> sum, Vec<int32_t> w, Vec<int32_t> a) {
#if defined(__AVX512VNNI__)
  return (Vec<int32_t>)_mm512_dpbusd_epi32((__m512i)sum, (__m512i)w, (__m512i)a);
#elif defined(__AVXVNNI__)
  return (Vec<int32_t>)_mm256_dpbusd_avx_epi32((__m256i)sum, (__m256i)w, (__m256i)a);
#elif defined(__ARM_FEATURE_DOTPROD)
  return (Vec<int32_t>)vdotq_s32((int32x4_t)sum, (int8x16_t)w, (int8x16_t)a);
#else
  for (int byte = 0; byte < 4; ++byte) {
    const int up = 24 - 8 * byte;  // brings the byte to the top, from where >> 24 extends its sign
    sum += ((w << up) >> 24) * ((a << up) >> 24);
  }
  return sum;
#endif
}

}  // namespace
}  // namespace flashlm::kernels

// SPDX-License-Identifier: Apache-2.0
// The vocabulary that kernels are written in: a vector of the widest registers of the level being compiled,
// through the vector extension that GCC and Clang share. Only kernel sources include this, and everything in
// it has internal linkage: a standard library template instantiated here could be linked into code for a
// lesser CPU.
#pragma once

#include <math.h>
#include <stdint.h>
#include <string.h>

#include <utility>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace flashlm::kernels {
namespace {

#if defined(__AVX512F__)
constexpr int64_t kVectorBytes = 64;
constexpr int64_t kRegisters = 32;
#elif defined(__AVX2__)
constexpr int64_t kVectorBytes = 32;
constexpr int64_t kRegisters = 16;
#elif defined(__aarch64__)
constexpr int64_t kVectorBytes = 16;
constexpr int64_t kRegisters = 32;
#else
constexpr int64_t kVectorBytes = 16;
constexpr int64_t kRegisters = 16;
#endif

template <class T>
struct VecOf {
  typedef T type __attribute__((vector_size(kVectorBytes)));
};
template <class T>
using Vec = typename VecOf<T>::type;

template <class T>
constexpr int64_t kLanes = kVectorBytes / static_cast<int64_t>(sizeof(T));

template <class T>
inline Vec<T> load(const T* p) {
  Vec<T> v;
  memcpy(&v, p, sizeof v);
  return v;
}

template <class T>
inline void store(T* p, Vec<T> v) {
  memcpy(p, &v, sizeof v);
}

// ---- part of a vector: masked moves where the level has them, a call of memcpy where not ----

#if defined(__AVX512F__)
template <class T>
constexpr bool kMaskedMoves = sizeof(T) != 2;
template <class T>
inline Vec<T> masked_load(const T* p, int64_t n) {
  const uint64_t mask = (uint64_t{1} << n) - 1;
  if constexpr (sizeof(T) == 1) {
    return reinterpret_cast<Vec<T>>(_mm512_maskz_loadu_epi8(mask, p));
  } else if constexpr (sizeof(T) == 4) {
    return reinterpret_cast<Vec<T>>(_mm512_maskz_loadu_ps(static_cast<__mmask16>(mask), p));
  } else {
    return reinterpret_cast<Vec<T>>(_mm512_maskz_loadu_pd(static_cast<__mmask8>(mask), p));
  }
}
template <class T>
inline void masked_store(T* p, Vec<T> v, int64_t n) {
  const uint64_t mask = (uint64_t{1} << n) - 1;
  if constexpr (sizeof(T) == 1) {
    _mm512_mask_storeu_epi8(p, mask, reinterpret_cast<__m512i>(v));
  } else if constexpr (sizeof(T) == 4) {
    _mm512_mask_storeu_ps(p, static_cast<__mmask16>(mask), reinterpret_cast<__m512>(v));
  } else {
    _mm512_mask_storeu_pd(p, static_cast<__mmask8>(mask), reinterpret_cast<__m512d>(v));
  }
}
#elif defined(__AVX2__)
template <class T>
constexpr bool kMaskedMoves = sizeof(T) == 4 || sizeof(T) == 8;
inline __m256i mask32(int64_t n) {
  return _mm256_cmpgt_epi32(_mm256_set1_epi32(static_cast<int>(n)),
                            _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}
inline __m256i mask64(int64_t n) {
  return _mm256_cmpgt_epi64(_mm256_set1_epi64x(n), _mm256_setr_epi64x(0, 1, 2, 3));
}
template <class T>
inline Vec<T> masked_load(const T* p, int64_t n) {
  if constexpr (sizeof(T) == 4) {
    return reinterpret_cast<Vec<T>>(_mm256_maskload_ps(reinterpret_cast<const float*>(p), mask32(n)));
  } else {
    return reinterpret_cast<Vec<T>>(_mm256_maskload_pd(reinterpret_cast<const double*>(p), mask64(n)));
  }
}
template <class T>
inline void masked_store(T* p, Vec<T> v, int64_t n) {
  if constexpr (sizeof(T) == 4) {
    _mm256_maskstore_ps(reinterpret_cast<float*>(p), mask32(n), reinterpret_cast<__m256>(v));
  } else {
    _mm256_maskstore_pd(reinterpret_cast<double*>(p), mask64(n), reinterpret_cast<__m256d>(v));
  }
}
#else
template <class T>
constexpr bool kMaskedMoves = false;
template <class T>
Vec<T> masked_load(const T* p, int64_t n);
template <class T>
void masked_store(T* p, Vec<T> v, int64_t n);
#endif

/// The first n < kLanes values, the rest zero.
template <class T>
inline Vec<T> load_first(const T* p, int64_t n) {
  if constexpr (kMaskedMoves<T>) {
    return masked_load(p, n);
  } else {
    Vec<T> v = {};
    memcpy(&v, p, static_cast<size_t>(n) * sizeof(T));
    return v;
  }
}

template <class T>
inline void store_first(T* p, Vec<T> v, int64_t n) {
  if constexpr (kMaskedMoves<T>) {
    masked_store(p, v, n);
  } else {
    memcpy(p, &v, static_cast<size_t>(n) * sizeof(T));
  }
}

/// As many of the first kLanes values as n allows, the rest zero; none if n <= 0.
template <class T>
inline Vec<T> load_up_to(const T* p, int64_t n) {
  if (n >= kLanes<T>) return load(p);
  return n > 0 ? load_first(p, n) : Vec<T>{};
}

template <class T>
inline void store_up_to(T* p, Vec<T> v, int64_t n) {
  if (n >= kLanes<T>) {
    store(p, v);
  } else if (n > 0) {
    store_first(p, v, n);
  }
}

#if defined(__AVX512F__)
/// A mask of as many of 16 lanes as n allows, none if n <= 0.
inline __mmask16 lanes_up_to(int64_t n) {
  return static_cast<__mmask16>(n >= 16 ? 0xffff : n > 0 ? (1u << n) - 1 : 0);
}
#endif

#if defined(__AVX512BF16__)
// ---- bfloat16 as its bits ----

/// As many of kLanes<float> values as n allows, one in the lower half of each lane, the rest zero.
inline Vec<int32_t> load_bf16_bits(const uint16_t* p, int64_t n) {
  // Unmasked, GCC 12 warns (its bug 105593).
  return (Vec<int32_t>)_mm512_maskz_cvtepu16_epi32(0xffff, _mm256_maskz_loadu_epi16(lanes_up_to(n), p));
}

inline Vec<float> load_bf16(const uint16_t* p, int64_t n) {
  const Vec<int32_t> bits = load_bf16_bits(p, n) << 16;
  return (Vec<float>)bits;
}

/// Rounded to nearest, ties to even.
inline void store_bf16(uint16_t* p, Vec<float> v, int64_t n) {
  const __m256i rounded = (__m256i)_mm512_cvtneps_pbh((__m512)v);
  if (n >= kLanes<float>) {
    memcpy(p, &rounded, sizeof rounded);
  } else {
    _mm256_mask_storeu_epi16(p, lanes_up_to(n), rounded);
  }
}
#endif

/// The first n bytes at p, one in each 32-bit lane as 0 .. 255, the rest zero; none if n <= 0.
inline Vec<int32_t> load_bytes(const int8_t* p, int64_t n) {
#if defined(__AVX512F__)
  // The unmasked forms make GCC 12 warn (its bug 105593).
  return (Vec<int32_t>)_mm512_maskz_cvtepu8_epi32(0xffff, _mm_maskz_loadu_epi8(lanes_up_to(n), p));
#else
  constexpr int64_t lanes = kLanes<int32_t>;
  int8_t bytes[lanes] = {};
  if (n >= lanes) {
    memcpy(bytes, p, lanes);
  } else if (n > 0) {
    memcpy(bytes, p, static_cast<size_t>(n));
  }
#if defined(__AVX2__)
  // A conversion by the compiler goes byte by byte.
  return (Vec<int32_t>)_mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<__m128i*>(bytes)));
#else
  Vec<int32_t> out;
  for (int64_t i = 0; i < lanes; ++i) out[i] = static_cast<uint8_t>(bytes[i]);
  return out;
#endif
#endif
}

/// Written as x - 0, which is x even for -0 and so costs no instruction beside the broadcast; 0 + x would.
template <class T>
inline Vec<T> broadcast(T x) {
  return x - Vec<T>{};
}

/// Elements begin, begin + 1 ... of v. Not by its address, for which a loop's sums would be kept in memory.
template <int begin, class V, int... i>
inline auto part_of(V v, std::integer_sequence<int, i...>) {
  return __builtin_shufflevector(v, v, (begin + i)...);
}

/// Folds a vector of kN elements in halves, so that the depth is log2(kN): 16 bytes are left to two scalar
/// levels, as vectors narrower than a register are no gain.
template <class T, int64_t kN, class V, class Op>
inline T fold(V v, const Op& op) {
  if constexpr (kN * sizeof(T) > 16) {
    constexpr auto half = std::make_integer_sequence<int, kN / 2>{};
    return fold<T, kN / 2>(op(part_of<0>(v, half), part_of<kN / 2>(v, half)), op);
  } else if constexpr (kN == 4) {
    return op(op(T(v[0]), T(v[2])), op(T(v[1]), T(v[3])));
  } else {
    static_assert(kN == 2);
    return op(T(v[0]), T(v[1]));
  }
}

template <class T>
inline T reduce_add(Vec<T> v) {
  return fold<T, kLanes<T>>(
      v, [](const auto& a, const auto& b) __attribute__((always_inline)) { return a + b; });
}

template <class T>
inline T reduce_max(Vec<T> v) {
  return fold<T, kLanes<T>>(
      v, [](const auto& a, const auto& b) __attribute__((always_inline)) { return a > b ? a : b; });
}

template <class T>
inline Vec<T> vec_max(Vec<T> a, Vec<T> b) {
  return a > b ? a : b;
}

template <class T>
inline Vec<T> vec_min(Vec<T> a, Vec<T> b) {
  return a < b ? a : b;
}

// The same, NaN included, in one instruction: GCC 12 makes a comparison and a blend of it, and warns of what
// the unmasked forms leave undefined.
#if defined(__AVX512F__)
template <>
inline Vec<float> vec_max<float>(Vec<float> a, Vec<float> b) {
  return reinterpret_cast<Vec<float>>(
      _mm512_maskz_max_ps(0xffff, reinterpret_cast<__m512>(a), reinterpret_cast<__m512>(b)));
}
template <>
inline Vec<int32_t> vec_max<int32_t>(Vec<int32_t> a, Vec<int32_t> b) {
  return reinterpret_cast<Vec<int32_t>>(
      _mm512_maskz_max_epi32(0xffff, reinterpret_cast<__m512i>(a), reinterpret_cast<__m512i>(b)));
}
template <>
inline Vec<float> vec_min<float>(Vec<float> a, Vec<float> b) {
  return reinterpret_cast<Vec<float>>(
      _mm512_maskz_min_ps(0xffff, reinterpret_cast<__m512>(a), reinterpret_cast<__m512>(b)));
}
#elif defined(__AVX2__)
template <>
inline Vec<float> vec_max<float>(Vec<float> a, Vec<float> b) {
  return reinterpret_cast<Vec<float>>(
      _mm256_max_ps(reinterpret_cast<__m256>(a), reinterpret_cast<__m256>(b)));
}
template <>
inline Vec<float> vec_min<float>(Vec<float> a, Vec<float> b) {
  return reinterpret_cast<Vec<float>>(
      _mm256_min_ps(reinterpret_cast<__m256>(a), reinterpret_cast<__m256>(b)));
}
#endif

/// One step of a transposition: of two rows whose numbers differ by kStep, the lanes that are to be together.
template <class T, int kStep, int... kLane>
inline void exchange(Vec<T>& a, Vec<T>& b, std::integer_sequence<int, kLane...>) {
  constexpr int lanes = kLanes<T>;
  const Vec<T> low = __builtin_shufflevector(a, b, (kLane & kStep ? lanes + kLane - kStep : kLane)...);
  b = __builtin_shufflevector(a, b, (kLane & kStep ? lanes + kLane : kLane + kStep)...);
  a = low;
}

/// Transposes kLanes rows of kLanes values, in registers.
template <class T, int kStep = kLanes<T> / 2>
inline void transpose(Vec<T>* v) {
#pragma GCC unroll 16
  for (int i = 0; i < kLanes<T>; ++i) {
    if (i & kStep) continue;
    exchange<T, kStep>(v[i], v[i + kStep], std::make_integer_sequence<int, kLanes<T>>());
  }
  if constexpr (kStep > 1) transpose<T, kStep / 2>(v);
}

inline int64_t min_of(int64_t a, int64_t b) { return a < b ? a : b; }

inline int64_t round_up(int64_t n, int64_t multiple) { return (n + multiple - 1) / multiple * multiple; }

/// y = T(sum) * factor, of as many lanes as n allows.
template <class T>
inline void store_scaled(T* y, Vec<int32_t> sum, T factor, int64_t n) {
  constexpr int64_t lanes = kLanes<int32_t>;
  typedef T Values __attribute__((vector_size(lanes * sizeof(T))));
  const Values value = __builtin_convertvector(sum, Values) * factor;
  if constexpr (sizeof value == kVectorBytes) {
    store_up_to(y, value, n);
  } else if (n > 0) {
    memcpy(y, &value, static_cast<size_t>(min_of(n, lanes)) * sizeof(T));
  }
}

/// e^x. float: range reduction x = n ln 2 + r with |r| <= ln 2 / 2, then 1 + r + r^2 q(r) with the q of
/// degree 4 that is nearest to e^r in relative error (4e-9, far below rounding), and n added to the exponent
/// field. The result is right to 1.2e-7 of itself. The argument is clamped to [-87.3, 88.3], where the result
/// is a normal float; so e^-inf is 1.2e-38 here, not 0. A NaN stays one: the clamp keeps its second operand
/// when the comparison fails.
inline Vec<float> vec_exp(Vec<float> x) {
  x = vec_min<float>(broadcast(88.3f), vec_max<float>(broadcast(-87.3f), x));
  const float kRound = 12582912.0f;  // 1.5 * 2^23: adding it leaves round(x) in the low mantissa bits
  const Vec<float> shifted = x * 1.44269504f + kRound;
  const Vec<float> n = shifted - kRound;
  const Vec<float> r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
  Vec<float> p = broadcast(1.381432e-3f);
  p = p * r + 8.368851e-3f;
  p = p * r + 4.16684e-2f;
  p = p * r + 0.1666652f;
  p = p * r + 0.49999994f;
  p = p * r + 1.0f;
  p = p * r + 1.0f;
  Vec<int32_t> exponent, bits;
  memcpy(&exponent, &shifted, sizeof exponent);
  memcpy(&bits, &p, sizeof bits);
  bits += exponent << 23;
  memcpy(&p, &bits, sizeof p);
  return p;
}

inline Vec<double> vec_exp(Vec<double> x) {
  for (int64_t i = 0; i < kLanes<double>; ++i) x[i] = exp(x[i]);
  return x;
}

/// 1 / x for x >= 1, or NaN, right to a unit in the last place; beyond 2^126, where it is no normal float, to
/// 2^-126.
template <class T>
inline Vec<T> vec_reciprocal(Vec<T> x) {
  return T(1) / x;
}
#if defined(__AVX512F__)
// An estimate, right to 2^-14, and a step of Newton's method: a third of the time of a division.
template <>
inline Vec<float> vec_reciprocal<float>(Vec<float> x) {
  const Vec<float> estimate = (Vec<float>)_mm512_maskz_rcp14_ps(0xffff, (__m512)x);
  return estimate + estimate * (1.0f - x * estimate);
}
#endif

/// 1 / (1 + e^-x)
template <class T>
inline Vec<T> vec_sigmoid(Vec<T> x) {
  return vec_reciprocal<T>(T(1) + vec_exp(-x));
}

inline float square_root(float x) { return sqrtf(x); }
inline double square_root(double x) { return sqrt(x); }

}  // namespace
}  // namespace flashlm::kernels

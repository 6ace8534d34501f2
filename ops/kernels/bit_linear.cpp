// SPDX-License-Identifier: Apache-2.0
// Ternary weights times int8 rows. Weights are stored as code + 1 in {0, 1, 2}, unsigned, so that one
// instruction multiplies them by signed activations and adds neighbours in fours (dot4) or in pairs
// (vpmaddubsw); the row sum of the activations, which is what the + 1 adds, is taken off again. Everything
// between quantization and the final scaling is integer, so all levels agree bit for bit.
#include "ops/kernels/amx.h"
#include "ops/kernels/dot4.h"
#include "ops/kernels/dot_tile.h"
#include "ops/kernels/families.h"
#include "ops/kernels/vec.h"

#if defined(__SSSE3__)
#include <immintrin.h>
#endif

namespace flashlm::kernels::FLASHLM_ISA {
namespace {

// A 32-bit lane holds one output's next kGroup weights, so a vector of a panel is kOutputs outputs.
constexpr int64_t kGroup = 4;
constexpr int64_t kOutputs = kVectorBytes / kGroup;

// A tile of kTileRows x kTilePanels vectors: its sums live beside kTilePanels vectors of weights and one of
// activations, 24 + 4 + 1 of 32 registers or 8 + 2 + 1 (+ a product, where there is no dot4) of 16.
constexpr int64_t kTileRows = kRegisters == 32 ? 6 : 4;
constexpr int64_t kTilePanels = kRegisters == 32 ? 4 : 2;

// Rows from which on tiles of 16 are faster than vectors, be they not full.
[[maybe_unused]] constexpr int64_t kFewestTileRows = 8;

// Additions into a 16-bit lane before it is widened. One addition is a pair of products u*q with u in
// {0, 1, 2} and q in [-128, 127]: between -512 and 508. 64 of them stay in [-32768, 32512], which is int16;
// 65 would not. (A pair alone never saturates vpmaddubsw either.)
constexpr int64_t kWidenEvery = 64;
static_assert(kWidenEvery * 2 * 2 * 128 <= 32768 && kWidenEvery * 2 * 2 * 127 <= 32767);
constexpr int64_t kDepth = kWidenEvery * kGroup;

// ---- 16-bit arithmetic ----

/// Per 16-bit lane: the sum of its two bytes' products, w unsigned times q signed. The one place where levels
/// differ.
inline Vec<int16_t> pair_products(Vec<int16_t> w, Vec<int16_t> q) {
#if defined(__AVX512BW__)
  return (Vec<int16_t>)_mm512_maddubs_epi16((__m512i)w, (__m512i)q);
#elif defined(__AVX2__)
  return (Vec<int16_t>)_mm256_maddubs_epi16((__m256i)w, (__m256i)q);
#elif defined(__SSSE3__)
  return (Vec<int16_t>)_mm_maddubs_epi16((__m128i)w, (__m128i)q);
#else
  return (w & 0xff) * ((q << 8) >> 8) + (w >> 8) * (q >> 8);  // w's top bit is never set
#endif
}

/// Per 32-bit lane: the sum of its two 16-bit halves.
inline Vec<int32_t> pair_sums(Vec<int16_t> v) {
  const Vec<int32_t> both = (Vec<int32_t>)v;
  return ((both << 16) >> 16) + (both >> 16);
}

// ---- weights ----

template <class T>
double abs_sum(int64_t n, const T* w) {
  // As many partial sums on every level, always added in the same order: the same double everywhere.
  constexpr int64_t kSums = 32;
  constexpr int64_t lanes = kLanes<double>;
  typedef T Part __attribute__((vector_size(lanes * sizeof(T))));
  Vec<double> sum[kSums / lanes] = {};
  int64_t i = 0;
  for (; i + kSums <= n; i += kSums) {
#pragma GCC unroll 16
    for (int64_t s = 0; s < kSums / lanes; ++s) {
      Part part;
      memcpy(&part, w + i + s * lanes, sizeof part);
      const Vec<int64_t> bits = (Vec<int64_t>)__builtin_convertvector(part, Vec<double>);
      sum[s] += (Vec<double>)(bits & INT64_MAX);
    }
  }
  double total = 0;
  for (int64_t s = 0; s < kSums; ++s) total += sum[s / lanes][s % lanes];
  for (; i < n; ++i) total += __builtin_fabs(static_cast<double>(w[i]));
  return total;
}

uint64_t fingerprint(int64_t bytes, const void* data) {
  // Every lane of every chain is a polynomial in an odd number, mod 2^32, of the words that pass through it:
  // a step is a bijection of what came before, so a change of one word always shows.
  constexpr int64_t kChains = 4;
  constexpr int64_t kStep = kChains * kVectorBytes;
  const Vec<uint32_t> factor = broadcast<uint32_t>(0x9e3779b1u);
  const char* from = static_cast<const char*>(data);
  Vec<uint32_t> chain[kChains] = {};
  const auto step = [&](const char* words) {
#pragma GCC unroll 4
    for (int64_t c = 0; c < kChains; ++c) {
      Vec<uint32_t> v;
      memcpy(&v, words + c * kVectorBytes, sizeof v);
      chain[c] = chain[c] * factor + v;
    }
  };
  int64_t i = 0;
  for (; i + kStep <= bytes; i += kStep) step(from + i);
  char rest[kStep] = {};
  memcpy(rest, from + i, static_cast<size_t>(bytes - i));
  step(rest);
  uint64_t hash = static_cast<uint64_t>(bytes);
  for (int64_t c = 0; c < kChains; ++c) {
    for (int64_t lane = 0; lane < kLanes<uint32_t>; ++lane) {
      hash = (hash ^ chain[c][lane]) * 0x9e3779b97f4a7c15u;
      hash ^= hash >> 29;
    }
  }
  return hash;
}

template <class T>
inline int code(T w, T bound) {
  return (w > bound) - (w < -bound);
}

template <class T>
void ternary_codes(int64_t n, const T* w, T bound, int8_t* codes) {
  for (int64_t i = 0; i < n; ++i) codes[i] = static_cast<int8_t>(code(w[i], bound));
}

#if defined(__AVX512BW__)
template <>
void ternary_codes<float>(int64_t n, const float* w, float bound, int8_t* codes) {
  constexpr int64_t lanes = kLanes<float>, bytes = 4 * lanes;
  for (int64_t i = 0; i < n; i += bytes) {
    uint64_t above = 0, below = 0;
#pragma GCC unroll 4
    for (int64_t j = 0; j < 4; ++j) {
      const __m512 v = (__m512)load_up_to(w + i + j * lanes, n - i - j * lanes);
      above |= uint64_t{_mm512_cmp_ps_mask(v, _mm512_set1_ps(bound), _CMP_GT_OQ)} << (j * lanes);
      below |= uint64_t{_mm512_cmp_ps_mask(v, _mm512_set1_ps(-bound), _CMP_LT_OQ)} << (j * lanes);
    }
    const __m512i code = _mm512_or_si512(_mm512_maskz_set1_epi8(above, 1), _mm512_maskz_set1_epi8(below, -1));
    store_up_to(codes + i, (Vec<int8_t>)code, n - i);
  }
}
#endif

/// packed[panel][k / kGroup][output][kGroup]; what lies outside (n, k) is the code 0.
void pack(int64_t n, int64_t k, const int8_t* codes, uint8_t* packed) {
  const int64_t groups = round_up(k, kGroup) / kGroup;
  for (int64_t j = 0; j < n; j += kOutputs, packed += groups * kVectorBytes) {
    for (int64_t p = 0; p < groups; p += kOutputs) {
      Vec<int32_t> square[kOutputs];  // output by group
#pragma GCC unroll 16
      for (int64_t i = 0; i < kOutputs; ++i) {
        const int8_t* from = codes + (j + i) * k + p * kGroup;
        square[i] = (Vec<int32_t>)load_up_to(from, j + i < n ? k - p * kGroup : 0);
      }
      transpose<int32_t>(square);
      const int64_t count = min_of(kOutputs, groups - p);
      for (int64_t i = 0; i < count; ++i) store(packed + (p + i) * kVectorBytes, (Vec<uint8_t>)square[i] + 1);
    }
  }
}

void pack_transposed(int64_t n, int64_t k, const int8_t* codes, int64_t codes_row, uint8_t* packed) {
  for (int64_t j = 0; j < n; j += kOutputs) {
    for (int64_t p = 0; p < k; p += kGroup, packed += kVectorBytes) {
      Vec<int32_t> groups = {};
      for (int64_t i = 0; i < min_of(kGroup, k - p); ++i) {
        groups |= load_bytes(codes + (p + i) * codes_row + j, n - j) << static_cast<int32_t>(8 * i);
      }
      store(packed, (Vec<uint8_t>)groups + 1);
    }
  }
}

// ---- activations ----

inline int32_t round_to_even(float x) { return __builtin_irintf(x); }
inline int32_t round_to_even(double x) { return __builtin_irint(x); }

template <class T>
struct BitsOf;
template <>
struct BitsOf<float> {
  typedef int32_t type;
};
template <>
struct BitsOf<double> {
  typedef int64_t type;
};

/// max|x|, NaN if there is one: without the sign, floats order as the integers with their bits do, NaN last.
template <class T>
T abs_max(int64_t n, const T* x) {
  using Bits = typename BitsOf<T>::type;
  const Bits magnitude = static_cast<Bits>(~(uint64_t{1} << (8 * sizeof(T) - 1)));
  constexpr int64_t kChains = 4;
  Vec<Bits> most[kChains] = {};
  int64_t i = 0;
  for (; i + kChains * kLanes<T> <= n; i += kChains * kLanes<T>) {
#pragma GCC unroll 4
    for (int64_t c = 0; c < kChains; ++c) {
      most[c] = vec_max<Bits>(most[c], (Vec<Bits>)load(x + i + c * kLanes<T>) & magnitude);
    }
  }
  for (; i < n; i += kLanes<T>)
    most[0] = vec_max<Bits>(most[0], (Vec<Bits>)load_up_to(x + i, n - i) & magnitude);
  const Bits bits =
      reduce_max<Bits>(vec_max<Bits>(vec_max<Bits>(most[0], most[1]), vec_max<Bits>(most[2], most[3])));
  T value;
  memcpy(&value, &bits, sizeof value);
  return value;
}

/// q = round(x * scale), ties to even, with zeros up to the row's width; returns their sum.
template <class T>
int32_t quantize_row(int64_t k, const T* x, T scale, int8_t* q) {
  int32_t sum = 0;
  for (int64_t i = 0; i < k; ++i) {
    const int32_t value = round_to_even(x[i] * scale);
    q[i] = static_cast<int8_t>(value);
    sum += value;
  }
  for (int64_t i = k; i < quantized_width(k); ++i) q[i] = 0;
  return sum;
}

#if defined(__AVX512VNNI__)
template <>
int32_t quantize_row<float>(int64_t k, const float* x, float scale, int8_t* q) {
  constexpr int64_t lanes = kLanes<float>, bytes = 4 * lanes;
  const __m512i in_order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
  Vec<int32_t> sum = {};
  for (int64_t i = 0; i < k; i += bytes) {
    __m512i v[4];
#pragma GCC unroll 4
    for (int64_t j = 0; j < 4; ++j) {
      const Vec<float> scaled = load_up_to(x + i + j * lanes, k - i - j * lanes) * scale;
      v[j] = _mm512_maskz_cvtps_epi32(0xffff, (__m512)scaled);
    }
    const __m512i packed = _mm512_packs_epi16(_mm512_packs_epi32(v[0], v[1]), _mm512_packs_epi32(v[2], v[3]));
    const __m512i four = _mm512_maskz_permutexvar_epi32(0xffff, in_order, packed);
    sum = dot4(sum, broadcast<int32_t>(0x01010101), (Vec<int32_t>)four);
    memcpy(q + i, &four, sizeof four);
  }
  return reduce_add<int32_t>(sum);
}
#endif

constexpr int64_t kRowsAhead = 3, kCacheLine = 64;

template <class T>
void quantize_rows(int64_t rows, int64_t k, const T* x, T smallest, int8_t* q, T* inverse_scale,
                   int32_t* row_sum) {
  const int64_t q_row = quantized_width(k);
  for (int64_t r = 0; r < rows; ++r, x += k, q += q_row) {
    // A row is too short for the hardware to run far enough ahead in it.
    for (int64_t i = 0; i < k; i += kCacheLine / static_cast<int64_t>(sizeof(T)))
      __builtin_prefetch(x + kRowsAhead * k + i);
    const T largest = abs_max(k, x);
    int32_t sum = 0;
    if (__builtin_isfinite(largest)) {
      const T top = largest > smallest ? largest : smallest;
      // |x| <= top, so the product rounds into [-127, 127] and needs no clipping.
      sum = quantize_row(k, x, T(127) / top, q);
      inverse_scale[r] = top / T(127);
    } else {
      // An infinity or a NaN makes the row NaN, as it does in floating point; it must not be hidden.
      memset(q, 0, static_cast<size_t>(q_row));
      inverse_scale[r] = static_cast<T>(__builtin_nan(""));
    }
    row_sum[r] = sum;
  }
}

template <class T>
void dequantize_rows(int64_t rows, int64_t k, const int8_t* q, const T* inverse_scale, T* a) {
  for (int64_t r = 0; r < rows; ++r, q += quantized_width(k), a += k) {
    for (int64_t i = 0; i < k; ++i) a[i] = static_cast<T>(q[i]) * inverse_scale[r];
  }
}

// ---- product ----

/// The operands of ternary_gemm, from a tile's first row and first panel on.
template <class T>
struct Operands {
  int64_t depth;  // of a panel, in bytes
  const int8_t* q;
  int64_t q_row;
  const int32_t* row_sum;
  const T* inverse_scale;
  const uint8_t* packed;
  T gamma;
  T* y;
  int64_t y_row;
};

/// The results of a tile that only `width` columns of are stored.
template <class T>
__attribute__((noinline)) void store_narrow(const Operands<T>& o, int64_t width, int64_t rows, int64_t panels,
                                            const Vec<int32_t>* sum) {
  for (int64_t i = 0; i < rows; ++i) {
    for (int64_t c = 0; c < panels && c * kOutputs < width; ++c) {
      store_scaled(o.y + i * o.y_row + c * kOutputs, sum[i * panels + c], o.gamma * o.inverse_scale[i],
                   width - c * kOutputs);
    }
  }
}

/// rows x (panels * kOutputs) results, of which the first `width` columns are stored.
template <class T, int64_t rows, int64_t panels>
void tile(const Operands<T>& o, int64_t width) {
  Vec<int32_t> sum[rows][panels];
#pragma GCC unroll 16
  for (int64_t i = 0; i < rows; ++i) {
#pragma GCC unroll 8
    for (int64_t c = 0; c < panels; ++c) {
      sum[i][c] = broadcast<int32_t>(-o.row_sum[i]);
      // The lines of y come while the sums are made, instead of holding up the stores at the end.
      __builtin_prefetch(o.y + i * o.y_row + c * kOutputs, /*for writing*/ 1);
    }
  }
  const int64_t groups = o.depth / kGroup, row_groups = o.q_row / kGroup;
  if constexpr (kHasDot4) {
    dot_tile(groups, {o.q, row_groups, 1}, o.packed, groups, sum,
             [](auto s, auto w, auto a) { return dot4(s, w, a); });
  } else {
    for (int64_t begin = 0; begin < o.depth; begin += kDepth) {
      const int64_t depth = min_of(kDepth, o.depth - begin) / kGroup;
      Vec<int16_t> part[rows][panels] = {};
      dot_tile(depth, {o.q + begin, row_groups, 1}, o.packed + begin * kOutputs, groups, part,
               [](auto s, auto w, auto a) { return s + pair_products((Vec<int16_t>)w, (Vec<int16_t>)a); });
#pragma GCC unroll 16
      for (int64_t i = 0; i < rows; ++i) {
#pragma GCC unroll 8
        for (int64_t c = 0; c < panels; ++c) sum[i][c] += pair_sums(part[i][c]);
      }
    }
  }
  if (width < panels * kOutputs) {
    // A call that sums outlive would have the compiler keep them in memory, whichever way is taken.
    Vec<int32_t> end[rows * panels];
#pragma GCC unroll 32
    for (int64_t i = 0; i < rows * panels; ++i) end[i] = sum[i / panels][i % panels];
    return store_narrow(o, width, rows, panels, end);
  }
#pragma GCC unroll 16
  for (int64_t i = 0; i < rows; ++i) {
    const T factor = o.gamma * o.inverse_scale[i];
#pragma GCC unroll 8
    for (int64_t c = 0; c < panels; ++c) {
      store_scaled(o.y + i * o.y_row + c * kOutputs, sum[i][c], factor, kOutputs);
    }
  }
}

/// All m rows of one column of tiles: in tiles of `rows`, and what is left in smaller ones.
template <class T, int64_t panels, int64_t rows = kTileRows>
void column(int64_t m, Operands<T> o, int64_t width) {
  for (; m >= rows; m -= rows) {
    tile<T, rows, panels>(o, width);
    o.q += rows * o.q_row;
    o.row_sum += rows;
    o.inverse_scale += rows;
    o.y += rows * o.y_row;
  }
  if constexpr (rows > 1) column<T, panels, rows / 2>(m, o, width);
}

/// The last, narrower column of tiles.
template <class T, int64_t panels>
void narrow_column(int64_t m, const Operands<T>& o, int64_t width) {
  if constexpr (panels > 1) {
    if (width <= (panels - 1) * kOutputs) return narrow_column<T, panels - 1>(m, o, width);
  }
  column<T, panels>(m, o, width);
}

#if defined(__AMX_TILE__)
void gemm_tiles(int64_t m, int64_t n, int64_t k, const int8_t* q, const int32_t* row_sum,
                const float* inverse_scale, const uint8_t* packed, float gamma, float* y, int64_t y_row) {
  const int64_t groups = round_up(k, kGroup) / kGroup;
  tile_gemm<SignedTimesUnsigned>(
      {y, m, n, y_row, /*accumulate=*/false}, groups,
      [=](int64_t i, int64_t rows, int64_t p, int64_t count, int32_t* buffer) -> TileRows {
        const int64_t row = quantized_width(k) / kGroup;
        const int32_t* const first = reinterpret_cast<const int32_t*>(q);
        if (rows % kTile == 0) return {first + i * row + p, row};
        return pack_tiles({first, row, 1, kTile * row}, i, rows, p, count, buffer);
      },
      reinterpret_cast<const int32_t*>(packed), groups,
      [=](int64_t i) {
        const float factor = gamma * inverse_scale[i];
        const int32_t bias = row_sum[i];
        return [=](Vec<int32_t> sums) { return __builtin_convertvector(sums - bias, Vec<float>) * factor; };
      });
}
#endif

template <class T>
void gemm(int64_t m, int64_t n, int64_t k, const int8_t* q, const int32_t* row_sum, const T* inverse_scale,
          const uint8_t* packed, T gamma, T* y, int64_t y_row) {
#if defined(__AMX_TILE__)
  if constexpr (sizeof(T) == sizeof(float)) {
    if (m >= kFewestTileRows) {
      return gemm_tiles(m, n, k, q, row_sum, inverse_scale, packed, gamma, y, y_row);
    }
  }
#endif
  Operands<T> o = {
      round_up(k, kGroup), q, quantized_width(k), row_sum, inverse_scale, packed, gamma, y, y_row};
  for (int64_t width = n; width > 0; width -= kTilePanels * kOutputs) {
    narrow_column<T, kTilePanels>(m, o, width);
    o.packed += kTilePanels * kOutputs * o.depth;
    o.y += kTilePanels * kOutputs;
  }
}

}  // namespace

template <class T>
void add_bit_linear(Table<T>& table) {
  table.abs_sum = abs_sum<T>;
  table.fingerprint = fingerprint;
  table.ternary_codes = ternary_codes<T>;
  table.quantize_rows = quantize_rows<T>;
  table.dequantize_rows = dequantize_rows<T>;
  table.ternary_panel = kOutputs;
  table.ternary_pack = pack;
  table.ternary_pack_transposed = pack_transposed;
  table.ternary_gemm = gemm<T>;
}
template void add_bit_linear(Table<float>&);
template void add_bit_linear(Table<double>&);

}  // namespace flashlm::kernels::FLASHLM_ISA

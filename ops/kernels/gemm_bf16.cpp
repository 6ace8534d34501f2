// SPDX-License-Identifier: Apache-2.0
// Matrix product of bfloat16 operands with float32 sums, for levels that multiply them in pairs (vdpbf16ps),
// at twice the rate of float32. Elsewhere the table has no such product. The two neighbours along the depth
// that make a pair lie in one 32-bit lane; an odd last one is paired with zero.
#include "ops/kernels/amx.h"
#include "ops/kernels/dot_tile.h"
#include "ops/kernels/families.h"
#include "ops/kernels/vec.h"

#if defined(__AVX512BF16__)
#include <immintrin.h>
#endif

namespace flashlm::kernels::FLASHLM_ISA {

#if defined(__AVX512BF16__)
namespace {

constexpr int64_t kPanel = kLanes<float>;
// Registers: 8 * 3 sums + 3 of B + 1 broadcast of A = 28 of 32.
constexpr int64_t kTileRows = 8;
constexpr int64_t kTilePanels = 3;
static_assert(kPanel % kTileRows == 0, "a tile stays within one strip of A");
// Pairs of a block: kTilePanels panels of B, 24 KiB, stay in a 32 KiB L1 beside a tile's rows of A.
constexpr int64_t kDepth = 128;

/// Lane i: the pair (even[i], odd[i]), rounded to nearest, ties to even.
inline Vec<int32_t> pairs_of(Vec<float> even, Vec<float> odd) {
  Vec<int32_t> interleave;
  for (int32_t i = 0; i < kPanel; ++i) interleave[i] = i | (static_cast<int32_t>(kPanel) + i) << 16;
  const __m512bh both = _mm512_cvtne2ps_pbh((__m512)odd, (__m512)even);
  return (Vec<int32_t>)_mm512_permutexvar_epi16((__m512i)interleave, (__m512i)both);
}

// Up to kPanel values as float.
inline Vec<float> as_float(const float* x, int64_t n) { return load_up_to(x, n); }
inline Vec<float> as_float(const int8_t* x, int64_t n) {
  typedef int8_t Bytes __attribute__((vector_size(kPanel)));
  Bytes bytes = {};
  if (n >= kPanel) {
    memcpy(&bytes, x, sizeof bytes);
  } else {
    memcpy(&bytes, x, static_cast<size_t>(n));
  }
  // A conversion by the compiler goes byte by byte; the unmasked intrinsic makes GCC 12 warn (its bug
  // 105593).
  const __m512i values = _mm512_maskz_cvtepi8_epi32(0xffff, (__m128i)bytes);
  return __builtin_convertvector((Vec<int32_t>)values, Vec<float>);
}

/// Values 0 .. n - 1 of x in pairs of neighbours.
inline Vec<int32_t> neighbours(const float* x, int64_t n) {
  const Vec<float> low = load_up_to(x, n), high = load_up_to(x + kPanel, n - kPanel);
  return (Vec<int32_t>)_mm512_cvtne2ps_pbh((__m512)high, (__m512)low);
}

void pack_rows(int64_t rows, int64_t k, const float* x, int64_t x_row, int32_t* pairs) {
  for (int64_t r = 0; r < rows; ++r, x += x_row, pairs += (k + 1) / 2) {
    for (int64_t i = 0; i < k; i += 2 * kPanel) {
      store_up_to(pairs + i / 2, neighbours(x + i, k - i), (k - i + 1) / 2);
    }
  }
}

void pack_columns(int64_t depth, int64_t n, const float* b, int64_t b_column, int32_t* packed) {
  constexpr int64_t kValues = 2 * kPanel;
  const int64_t pairs = (depth + 1) / 2;
  for (int64_t j = 0; j < n; j += kPanel, packed += pairs * kPanel) {
    for (int64_t p = 0; p < depth; p += kValues) {
      Vec<int32_t> square[kPanel];  // column by pair
#pragma GCC unroll 16
      for (int64_t i = 0; i < kPanel; ++i) {
        square[i] = j + i < n ? neighbours(b + (j + i) * b_column + p, depth - p) : Vec<int32_t>{};
      }
      transpose<int32_t>(square);
      const int64_t count = min_of(kPanel, pairs - p / 2);
      for (int64_t i = 0; i < count; ++i) store(packed + (p / 2 + i) * kPanel, square[i]);
    }
  }
}

template <class Source>
void pack(int64_t depth, int64_t n, const Source* b, int64_t b_row, const float* factor, int32_t* packed) {
  // Some pairs of a panel together: panels often lie a multiple of 4 KiB apart, where a vector for each in
  // turn would contend for the same few lines of the cache.
  constexpr int64_t kStep = 4;
  const int64_t pairs = (depth + 1) / 2;
  const auto factor_of = [&](int64_t row) { return factor == nullptr ? 1.0f : factor[row]; };
  for (int64_t p = 0; p < pairs; p += kStep) {
    for (int64_t j = 0; j < n; j += kPanel) {
      for (int64_t i = p; i < min_of(p + kStep, pairs); ++i) {
        const Source* from = b + 2 * i * b_row + j;
        const Vec<float> even = as_float(from, n - j) * factor_of(2 * i);
        Vec<float> odd = {};
        if (2 * i + 1 < depth) odd = as_float(from + b_row, n - j) * factor_of(2 * i + 1);
        store(packed + j * pairs + i * kPanel, pairs_of(even, odd));
      }
    }
  }
}

/// Lane i: the pair (first[i], second[i]), of up to kPanel.
inline Vec<int32_t> zipped(const float* first, const float* second, int64_t n) {
  return pairs_of(load_up_to(first, n), load_up_to(second, n));
}
inline Vec<int32_t> zipped(const uint16_t* first, const uint16_t* second, int64_t n) {
  return load_bf16_bits(first, n) | load_bf16_bits(second, n) << 16;
}

template <class Source>
void zip(int64_t pairs, int64_t n, const Source* first, const Source* second, int64_t row, int32_t* packed) {
  for (int64_t j = 0; j < n; j += kPanel) {
    for (int64_t p = 0; p < pairs; ++p, packed += kPanel) {
      store(packed, zipped(first + p * row + j, second + p * row + j, n - j));
    }
  }
}

/// Row r's up to kPanel columns from column on: c = (c +) alpha * sum.
inline void store_product(float* c, Vec<float> sum, float alpha, int64_t n, bool add) {
  const Vec<float> before = add ? load_up_to(c, n) : Vec<float>{};
  store_up_to<float>(c, before + alpha * sum, n);
}

#if defined(__AMX_TILE__)
void gemm(int64_t m, int64_t n, int64_t depth, PairRows a, const int32_t* packed, float alpha, float* c,
          int64_t c_row, bool accumulate) {
  const int64_t pairs = (depth + 1) / 2;
  tile_gemm<Bfloat16Pairs>(
      {c, m, n, c_row, accumulate}, pairs,
      [=](int64_t i, int64_t rows, int64_t p, int64_t count, int32_t* buffer) {
        return pack_tiles(a, i, rows, p, count, buffer);
      },
      packed, pairs, [=](int64_t) { return [=](Vec<int32_t> sums) { return alpha * (Vec<float>)sums; }; });
}
#else
void gemm(int64_t m, int64_t n, int64_t depth, PairRows a, const int32_t* packed, float alpha, float* c,
          int64_t c_row, bool accumulate) {
  const int64_t pairs = (depth + 1) / 2;
  // A product over no depth is still a result: zeros, unless there is something to add to.
  for (int64_t p = 0; p < pairs || (p == 0 && !accumulate); p += kDepth) {
    const int64_t block = min_of(kDepth, pairs - p);
    const bool add = accumulate || p > 0;
    for_dot_tiles<kTileRows, kTilePanels>(
        m, (n + kPanel - 1) / kPanel, [&]<int64_t rows, int64_t panels>(int64_t i, int64_t panel) {
          Vec<float> sum[rows][panels] = {};
          const int32_t* first = a.first + i / kPanel * a.strip + i % kPanel * a.row + p * a.column;
          dot_tile(block, {first, a.row, a.column}, packed + (panel * pairs + p) * kPanel, pairs, sum,
                   [](Vec<float> s, Vec<int32_t> w, Vec<int32_t> v) {
                     return (Vec<float>)_mm512_dpbf16_ps((__m512)s, (__m512bh)w, (__m512bh)v);
                   });
#pragma GCC unroll 8
          for (int64_t r = 0; r < rows; ++r) {
#pragma GCC unroll 4
            for (int64_t v = 0; v < panels; ++v) {
              const int64_t column = (panel + v) * kPanel;
              store_product(c + (i + r) * c_row + column, sum[r][v], alpha, n - column, add);
            }
          }
        });
  }
}
#endif

}  // namespace
#endif

template <class T>
void add_gemm_bf16(Table<T>& table) {
  table.bf16_panel = 0;
#if defined(__AVX512BF16__)
  if constexpr (sizeof(T) == sizeof(float)) {
    table.bf16_panel = kPanel;
    table.bf16_pack_rows = pack_rows;
    table.bf16_pack = pack<float>;
    table.bf16_pack_columns = pack_columns;
    table.bf16_pack_int8 = [](int64_t depth, int64_t n, const int8_t* b, int64_t b_row, int32_t* packed) {
      pack(depth, n, b, b_row, nullptr, packed);
    };
    table.bf16_zip = zip<float>;
    table.bf16_zip_rounded = zip<uint16_t>;
    table.gemm_bf16 = gemm;
  }
#endif
}
template void add_gemm_bf16(Table<float>&);
template void add_gemm_bf16(Table<double>&);

}  // namespace flashlm::kernels::FLASHLM_ISA

// SPDX-License-Identifier: Apache-2.0
// Ternary weights times float32 rows in tiles of bfloat16. The 24 significant bits of a float32 are those of
// three bfloat16, whose sum it is; their products with -1, 0 and 1 are exact, and a tile's sums are float32.
// So all that is rounded are additions, 3 k of them to an output. Tiles take a part below 2^-126 for zero,
// which no |x| >= 2^-103 has. The same for columns of float32 times int8, which bfloat16 holds exactly.
#include "ops/kernels/amx.h"
#include "ops/kernels/families.h"
#include "ops/kernels/vec.h"

namespace flashlm::kernels::FLASHLM_ISA {

#if defined(__AMX_TILE__)
namespace {

constexpr int64_t kParts = Bfloat16Thirds::kParts;
constexpr int64_t kValues = 2 * kTile;             // of a row in one tile
constexpr int64_t kPartSize = kBlock * kTile;      // of a block's rows, one tile wide, in pairs
constexpr int64_t kRows = 3 * kBlock;              // in one call of tile_gemm
constexpr uint32_t kUpperHalf = 0xffff0000;        // of a float32: the bfloat16 that it is cut off to
constexpr uint16_t kOne = 0x3f80, kSign = 0x8000;  // in bfloat16

inline int64_t tiles_of(int64_t k) { return round_up(k, kValues) / kValues; }

// ---- packed codes: panels of kTile outputs, a panel in tiles of bfloat16 pairs along k, filled up with
// zeros ----

int64_t packed_size(int64_t n, int64_t k) {
  return round_up(n, kTile) * tiles_of(k) * kTile * static_cast<int64_t>(sizeof(int32_t));
}

inline Vec<int16_t> bf16_of_codes(__m256i codes) {
  const Vec<int16_t> wide = (Vec<int16_t>)_mm512_maskz_cvtepi8_epi16(~uint32_t{0}, codes);
  return (-(wide & 1) & static_cast<int16_t>(kOne)) | (wide & static_cast<int16_t>(kSign));
}

/// tile[p] = pair p of each of `outputs` <= kTile outputs, for `depth` <= kValues codes of each.
inline void tile_of_rows(int64_t outputs, int64_t depth, const int8_t* codes, int64_t row_stride,
                         Vec<int32_t> tile[kTile]) {
  const auto mask = static_cast<__mmask32>((uint64_t{1} << depth) - 1);
#pragma GCC unroll 16
  for (int64_t j = 0; j < kTile; ++j) {
    tile[j] = j < outputs ? (Vec<int32_t>)bf16_of_codes(_mm256_maskz_loadu_epi8(mask, codes + j * row_stride))
                          : Vec<int32_t>{};
  }
  transpose<int32_t>(tile);
}
inline void tile_of_columns(int64_t outputs, int64_t depth, const int8_t* codes, int64_t col_stride,
                            Vec<int32_t> tile[kTile]) {
  const auto codes_at = [=](int64_t p) {
    const auto mask = static_cast<__mmask16>((1u << outputs) - 1);
    return _mm_maskz_loadu_epi8(p < depth ? mask : __mmask16{0}, codes + p * col_stride);
  };
#pragma GCC unroll 16
  for (int64_t p = 0; p < kTile; ++p) {
    const __m128i even = codes_at(2 * p), odd = codes_at(2 * p + 1);
    const __m256i pairs = _mm256_set_m128i(_mm_unpackhi_epi8(even, odd), _mm_unpacklo_epi8(even, odd));
    tile[p] = (Vec<int32_t>)bf16_of_codes(pairs);
  }
}

void pack(int64_t n, int64_t k, const int8_t* codes, int64_t row_stride, int64_t col_stride,
          uint8_t* packed) {
  for (int64_t j = 0; j < n; j += kTile) {
    for (int64_t p = 0; p < k; p += kValues) {
      const int8_t* const from = codes + j * row_stride + p * col_stride;
      const int64_t outputs = min_of(kTile, n - j), depth = min_of(kValues, k - p);
      Vec<int32_t> tile[kTile];
      if (col_stride == 1) {
        tile_of_rows(outputs, depth, from, row_stride, tile);
      } else {
        tile_of_columns(outputs, depth, from, col_stride, tile);
      }
      memcpy(packed, tile, sizeof tile);
      packed += sizeof tile;
    }
  }
}

// ---- product ----

/// Cuts x's upper bfloat16 off.
inline Vec<int32_t> cut(Vec<float>& x) {
  const Vec<int32_t> upper = (Vec<int32_t>)x & static_cast<int32_t>(kUpperHalf);
  x -= (Vec<float>)upper;
  return upper;
}

/// The rows of a block as tiles read them: for each kValues of k in turn the kParts parts, kPartSize apart.
/// Beside them are zeros, and below them as far as tiles go. Bit i of the result: row i is not finite.
inline uint32_t split(int64_t rows, int64_t k, const float* x, int64_t x_row, int32_t* parts) {
  Vec<int16_t> upper;
  for (int64_t i = 0; i < kValues; ++i) upper[i] = static_cast<int16_t>(2 * i + 1);
  const auto upper_halves = [=](Vec<int32_t> a, Vec<int32_t> b) {
    return (Vec<int32_t>)_mm512_permutex2var_epi16((__m512i)a, (__m512i)upper, (__m512i)b);
  };
  uint32_t not_finite = 0;
  for (int64_t p = 0; p < k; p += kValues, parts += kParts * kPartSize) {
    for (int64_t i = 0; i < round_up(rows, kTile); ++i) {
      const float* const from = x + i * x_row + p;
      const int64_t count = i < rows ? k - p : 0;
      Vec<float> first = load_up_to(from, count), second = load_up_to(from + kTile, count - kTile);
      int32_t* to = parts + i * kTile;
#pragma GCC unroll 2
      for (int64_t part = 0; part < kParts - 1; ++part, to += kPartSize) {
        const Vec<int32_t> a = cut(first), b = cut(second);
        store(to, upper_halves(a, b));
      }
      store(to, upper_halves((Vec<int32_t>)first, (Vec<int32_t>)second));
      // An infinity or a NaN less itself is a NaN.
      const bool has_nan = _mm512_cmp_ps_mask((__m512)first, (__m512)second, _CMP_UNORD_Q) != 0;
      not_finite |= static_cast<uint32_t>(has_nan) << i;
    }
  }
  return not_finite;
}

/// One row's outputs by additions of what codes do not leave out, be it not finite.
void add_up(int64_t n, int64_t k, const float* x, const uint8_t* packed, float gamma, float* y) {
  for (int64_t j = 0; j < n; j += kTile) {
    Vec<float> sum = {};
    for (int64_t p = 0; p < k; ++p) {
      Vec<int32_t> pairs;
      memcpy(&pairs, packed + p / 2 * sizeof pairs, sizeof pairs);
      const Vec<int32_t> code = p % 2 == 0 ? pairs << 16 : pairs & static_cast<int32_t>(kUpperHalf);
      const Vec<float> signed_x = (Vec<float>)((Vec<int32_t>)broadcast(x[p]) ^ (code & INT32_MIN));
      sum = code != 0 ? sum + signed_x : sum;
    }
    store_up_to<float>(y + j, gamma * sum, n - j);
    packed += packed_size(kTile, k);
  }
}

void gemm(int64_t m, int64_t n, int64_t k, const float* x, int64_t x_row, const uint8_t* packed, float gamma,
          float* y, int64_t y_row, void*) {
  const int64_t pairs = tiles_of(k) * kTile;
  for (; m > 0; m -= kRows, x += kRows * x_row, y += kRows * y_row) {
    const int64_t rows = min_of(kRows, m);
    uint32_t not_finite[kRows / kBlock] = {};
    tile_gemm<Bfloat16Thirds>(
        {y, rows, n, y_row, /*accumulate=*/false}, pairs,
        [&](int64_t i, int64_t count, int64_t p, int64_t groups, int32_t* buffer) -> TileRows {
          not_finite[i / kBlock] |=
              split(count, min_of(2 * groups, k - 2 * p), x + i * x_row + 2 * p, x_row, buffer);
          return {buffer, kTile, kParts * kPartSize, kPartSize};
        },
        reinterpret_cast<const int32_t*>(packed), pairs,
        [=](int64_t) { return [=](Vec<int32_t> sums) { return gamma * (Vec<float>)sums; }; });
    for (int64_t i = 0; i < rows; ++i) {
      if ((not_finite[i / kBlock] >> i % kBlock & 1) != 0) {
        add_up(n, k, x + i * x_row, packed, gamma, y + i * y_row);
      }
    }
  }
}

// ---- product of float32 columns ----

void bf16x3_pack(int64_t depth, int64_t n, const float* b, int64_t b_row, const float* factor,
                 int32_t* packed) {
  constexpr int64_t kStep = 4;  // pairs of a panel together; see gemm_bf16.cpp
  const int64_t pairs = (depth + 1) / 2, part_size = pairs * round_up(n, kTile);
  for (int64_t p = 0; p < pairs; p += kStep) {
    for (int64_t j = 0; j < n; j += kTile) {
      for (int64_t i = p; i < min_of(p + kStep, pairs); ++i) {
        const float* const from = b + 2 * i * b_row + j;
        Vec<float> even = load_up_to(from, n - j) * factor[2 * i], odd = {};
        if (2 * i + 1 < depth) odd = load_up_to(from + b_row, n - j) * factor[2 * i + 1];
        int32_t* const to = packed + j * pairs + i * kTile;
#pragma GCC unroll 3
        for (int64_t part = 0; part < kParts; ++part) {
          const Vec<int32_t> low = (Vec<int32_t>)((Vec<uint32_t>)cut(even) >> 16);
          store(to + part * part_size, low | cut(odd));
        }
      }
    }
  }
}

void gemm_bf16x3(int64_t m, int64_t n, int64_t depth, const int32_t* strips, const int32_t* packed, float* c,
                 int64_t c_row, bool accumulate) {
  const int64_t pairs = (depth + 1) / 2, part_size = pairs * round_up(m, kTile);
  tile_gemm<Bfloat16Thirds>(
      {c, m, n, c_row, accumulate}, pairs,
      [=](int64_t i, int64_t rows, int64_t p, int64_t groups, int32_t* buffer) -> TileRows {
        const int64_t to_row = round_up(groups, kTile), to_part = kBlock * to_row;
        for (int64_t part = 0; part < kParts; ++part) {
          const PairRows a = {strips + part * part_size, 1, kTile, pairs * kTile};
          pack_tiles(a, i, rows, p, groups, buffer + part * to_part);
        }
        return {buffer, to_row, kTile, to_part};
      },
      packed, pairs, [=](int64_t) { return [=](Vec<int32_t> sums) { return (Vec<float>)sums; }; });
}

}  // namespace
#endif

template <class T>
void add_bf16x3([[maybe_unused]] Table<T>& table) {
#if defined(__AMX_TILE__)
  if constexpr (sizeof(T) == sizeof(float)) {
    table.ternary_float_packed_size = packed_size;
    table.ternary_float_pack = pack;
    table.ternary_float_workspace_size = [](int64_t, int64_t) { return int64_t{0}; };
    table.ternary_float_gemm = gemm;
    table.bf16x3_pack = bf16x3_pack;
    table.gemm_bf16x3 = gemm_bf16x3;
  }
#endif
}
template void add_bf16x3(Table<float>&);
template void add_bf16x3(Table<double>&);

}  // namespace flashlm::kernels::FLASHLM_ISA

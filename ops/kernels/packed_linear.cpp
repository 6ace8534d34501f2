// SPDX-License-Identifier: Apache-2.0
// Ternary weights in 2 bits times int8 rows, for inference. The layout (docs/formats.md) is the same on every
// level: lines of 64 bytes, each with the codes Q + 1 of 64 outputs for 4 consecutive k. The four codes of a
// byte belong to outputs 16 apart, so that one AND with a mask turns a vector of line into the unsigned bytes
// that the dot-product instructions multiply, with no shuffle and no horizontal sum. A field that is not
// shifted down gives sums 4^j times too large; they are shifted once, at the end. The row sum of the
// activations, which is what the + 1 adds, is taken off. All of it is integer, and equal on every level.
#include "ops/kernels/families.h"
#include "ops/kernels/vec.h"

#if defined(__SSSE3__)
#include <immintrin.h>
#elif defined(__ARM_FEATURE_DOTPROD)
#include <arm_neon.h>
#endif

namespace flashlm::kernels::FLASHLM_ISA {
namespace {

constexpr int64_t kLine = kPackedOutputs;  // bytes of a line, and its outputs
constexpr int64_t kGroup = 4;              // consecutive k of one output, in a 32-bit lane
constexpr int64_t kFields = 4;             // codes in a byte
constexpr int64_t kFieldOutputs = kLine / kFields;

// A vector is a slice of a line: the same kSliceOutputs lanes of every field.
constexpr int64_t kSlices = kLine / kVectorBytes;
constexpr int64_t kSliceOutputs = kVectorBytes / kGroup;

// A tile is kTileRows rows of one slice, or one row of kRowSlices. Each row of a slice has four accumulators:
// 24 or 16 of 32 registers, or 8 of 16, beside a slice's fields, an activation and the masks.
constexpr int64_t kTileRows = kRegisters == 32 ? 6 : 2;
constexpr int64_t kRowSlices = kRegisters == 32 ? 4 : 2;
// Bytes ahead of a single row's loads that weights are asked for: there is too little work with a line to
// wait for memory, and the hardware's own foresight ends with a page.
constexpr int64_t kAhead = 2048;

inline int64_t lines_of(int64_t k) { return (k + kGroup - 1) / kGroup; }

// ---- what differs between levels ----

// Part is what products are added into before they are widened to int32. kShift[j] is where field j then
// stands in its byte: lower costs a shift for each line, higher makes larger products. kWidenEvery lines are
// added into a part: a lane takes a product (code << kShift) * q for each of its bytes, with q in [-128,
// 127]. With kWholeByte the top field is not masked out: its part takes whole bytes, and gives up the other
// fields' parts at the end.
#if defined(__AVX512VNNI__) || defined(__AVXVNNI__) || defined(__ARM_FEATURE_DOTPROD)
using Part = Vec<int32_t>;
#if defined(__ARM_FEATURE_DOTPROD)
constexpr int kShift[kFields] = {0, 2, 4, 0};  // sdot is signed: in place, the top field would be negative
constexpr bool kWholeByte = false;
#else
constexpr int kShift[kFields] = {0, 2, 4, 6};
constexpr bool kWholeByte = true;
#endif
// 65,536 k cannot overflow, even if codes were 3 and a byte were multiplied whole.
constexpr int64_t kWidenEvery = 16384;
static_assert(kWidenEvery * 4 * 255 * 128 <= INT32_MAX);
#else
using Part = Vec<int16_t>;
constexpr int kShift[kFields] = {0, 2, 0, 2};  // one shift for two fields
constexpr bool kWholeByte = false;
constexpr int64_t kWidenEvery = 16;
static_assert(kWidenEvery * 2 * (2 << 2) * 128 <= -INT16_MIN);
static_assert(kWidenEvery * 2 * (2 << 2) * 127 <= INT16_MAX);
#endif

/// part + the products of w's bytes, unsigned, and q's, signed, added within each lane.
inline Part add_products(Part part, Vec<int32_t> w, Vec<int32_t> q) {
#if defined(__AVX512VNNI__)
  return (Part)_mm512_dpbusd_epi32((__m512i)part, (__m512i)w, (__m512i)q);
#elif defined(__AVXVNNI__)
  return (Part)_mm256_dpbusd_avx_epi32((__m256i)part, (__m256i)w, (__m256i)q);
#elif defined(__AVX2__)
  return part + (Part)_mm256_maddubs_epi16((__m256i)w, (__m256i)q);
#elif defined(__SSSE3__)
  return part + (Part)_mm_maddubs_epi16((__m128i)w, (__m128i)q);
#elif defined(__ARM_FEATURE_DOTPROD)
  return (Part)vdotq_s32((int32x4_t)part, (int8x16_t)w, (int8x16_t)q);
#else
  const Part u = (Part)w, s = (Part)q;  // u's bytes are at most 12
  return part + (u & 0xff) * ((s << 8) >> 8) + (u >> 8) * (s >> 8);
#endif
}

/// The part's sum for each 32-bit lane.
inline Vec<int32_t> widen(Vec<int32_t> part) { return part; }
inline Vec<int32_t> widen(Vec<int16_t> part) {
#if defined(__AVX2__) && !defined(__AVX512F__)
  return (Vec<int32_t>)_mm256_madd_epi16((__m256i)part, _mm256_set1_epi16(1));
#else
  const Vec<int32_t> both = (Vec<int32_t>)part;
  return ((both << 16) >> 16) + (both >> 16);
#endif
}

/// Field j of every byte, at bit kShift[j]. Bits that a shift of the lane moves between bytes are masked off.
/// With kWholeByte, the top one is the byte.
inline Vec<int32_t> field(Vec<int32_t> line, int64_t j) {
  if (kWholeByte && j == kFields - 1) return line;
  return (line >> (2 * static_cast<int>(j) - kShift[j])) & static_cast<int32_t>(0x03030303u << kShift[j]);
}

// ---- layout ----

/// Where output j's codes begin, in its bytes of the lines of k.
inline int64_t first_byte(int64_t j, int64_t k) {
  return j / kLine * lines_of(k) * kLine + j % kFieldOutputs * kGroup;
}
inline int field_shift(int64_t j) { return static_cast<int>(j % kLine / kFieldOutputs * 2); }

void pack(int64_t n, int64_t k, const int8_t* codes, uint8_t* packed) {
  const int64_t panels = (n + kLine - 1) / kLine;
  memset(packed, 0x55, static_cast<size_t>(panels * lines_of(k) * kLine));  // Q = 0 in every field
  for (int64_t j = 0; j < n; ++j, codes += k) {
    uint8_t* to = packed + first_byte(j, k);
    for (int64_t p = 0; p < k; ++p) {
      uint8_t& byte = to[p / kGroup * kLine + p % kGroup];
      byte = static_cast<uint8_t>(byte + codes[p] * (1 << field_shift(j)));
    }
  }
}

template <class T>
void unpack(int64_t n, int64_t k, const uint8_t* packed, T gamma, T* w) {
  for (int64_t j = 0; j < n; ++j, w += k) {
    const uint8_t* from = packed + first_byte(j, k);
    for (int64_t p = 0; p < k; ++p) {
      const int code = (from[p / kGroup * kLine + p % kGroup] >> field_shift(j) & 3) - 1;
      w[p] = static_cast<T>(code) * gamma;
    }
  }
}

// ---- product ----

/// The operands of a column of tiles, from its first row on.
template <class T>
struct Operands {
  int64_t n, lines;
  const int8_t* q;
  int64_t q_row;
  const int32_t* row_sum;
  const T* inverse_scale;
  const uint8_t* packed;
  T gamma;
  T* y;
  int64_t y_row;
};

/// The first output of field j of a slice, which is counted through all panels.
inline int64_t first_output(int64_t slice, int64_t j) {
  return slice / kSlices * kLine + j * kFieldOutputs + slice % kSlices * kSliceOutputs;
}

/// The results of a tile that reaches beyond the last output.
template <class T>
__attribute__((noinline)) void store_end(const Operands<T>& o, int64_t first, int64_t rows, int64_t slices,
                                         const Vec<int32_t>* sum) {
  for (int64_t r = 0; r < rows; ++r) {
    const T factor = o.gamma * o.inverse_scale[r];
    for (int64_t s = 0; s < slices; ++s) {
      for (int64_t j = 0; j < kFields; ++j, ++sum) {
        const int64_t output = first_output(first + s, j);
        store_scaled(o.y + r * o.y_row + output, *sum, factor, o.n - output);
      }
    }
  }
}

/// `rows` rows of the outputs in `slices` slices from `first` on, counted through all panels. Not inlined:
/// the registers of a tile are its own.
template <class T, int64_t rows, int64_t slices>
__attribute__((noinline)) void tile(const Operands<T>& o, int64_t first) {
  const uint8_t* from[slices];
  for (int64_t s = 0; s < slices; ++s) {
    from[s] = o.packed + (first + s) / kSlices * o.lines * kLine + (first + s) % kSlices * kVectorBytes;
  }
  Vec<int32_t> sum[rows][slices][kFields];
  const auto add_lines = [&](int64_t begin, int64_t end) __attribute__((always_inline)) {
    Part part[rows][slices][kFields] = {};
    for (int64_t l = begin; l < end; ++l) {
#pragma GCC unroll 8
      for (int64_t s = 0; s < slices; ++s) {
        Vec<int32_t> line, w[kFields];
        if (rows == 1 && s % kSlices == 0) __builtin_prefetch(from[s] + l * kLine + kAhead);
        memcpy(&line, from[s] + l * kLine, sizeof line);
#pragma GCC unroll 8
        for (int64_t j = 0; j < kFields; ++j) w[j] = field(line, j);
#pragma GCC unroll 8
        for (int64_t r = 0; r < rows; ++r) {
          int32_t four;
          memcpy(&four, o.q + r * o.q_row + l * kGroup, sizeof four);
          const Vec<int32_t> q = broadcast(four);
#pragma GCC unroll 8
          for (int64_t j = 0; j < kFields; ++j) part[r][s][j] = add_products(part[r][s][j], w[j], q);
        }
      }
    }
#pragma GCC unroll 8
    for (int64_t r = 0; r < rows; ++r) {
#pragma GCC unroll 8
      for (int64_t s = 0; s < slices; ++s) {
        if constexpr (kWholeByte) part[r][s][3] -= part[r][s][0] + part[r][s][1] + part[r][s][2];
#pragma GCC unroll 8
        for (int64_t j = 0; j < kFields; ++j) {
          // Begun at minus the row sum, a sum is after any line the products Q q so far less the q still to
          // come: within 128 k, which is below 2^31 for k < 2^24.
          const Vec<int32_t> before = begin == 0 ? broadcast(-o.row_sum[r]) : sum[r][s][j];
          sum[r][s][j] = before + (widen(part[r][s][j]) >> kShift[j]);
        }
      }
    }
  };
  // Apart from the rest, as it is most often all: sums then need no registers beside the parts.
  add_lines(0, min_of(o.lines, kWidenEvery));
  for (int64_t begin = kWidenEvery; begin < o.lines; begin += kWidenEvery) {
    add_lines(begin, min_of(o.lines, begin + kWidenEvery));
  }
  if (first_output(first + slices - 1, kFields - 1) + kSliceOutputs > o.n) {
    // A call that sums outlive would have the compiler keep them in memory, whichever way is taken.
    Vec<int32_t> end[rows * slices * kFields];
#pragma GCC unroll 32
    for (int64_t i = 0; i < rows * slices * kFields; ++i) {
      end[i] = sum[i / (slices * kFields)][i / kFields % slices][i % kFields];
    }
    return store_end(o, first, rows, slices, end);
  }
#pragma GCC unroll 8
  for (int64_t r = 0; r < rows; ++r) {
    const T factor = o.gamma * o.inverse_scale[r];
#pragma GCC unroll 8
    for (int64_t s = 0; s < slices; ++s) {
#pragma GCC unroll 8
      for (int64_t j = 0; j < kFields; ++j) {
        store_scaled(o.y + r * o.y_row + first_output(first + s, j), sum[r][s][j], factor, kSliceOutputs);
      }
    }
  }
}

/// tile for a number of rows and slices known at run time, at most `rows` and `slices`.
template <class T, int64_t rows, int64_t slices>
void tile_of(int64_t m, int64_t count, const Operands<T>& o, int64_t first) {
  if (m == rows && count == slices) return tile<T, rows, slices>(o, first);
  if constexpr (rows > 1) return tile_of<T, rows - 1, slices>(m, count, o, first);
  if constexpr (slices > 1) return tile_of<T, rows, slices - 1>(m, count, o, first);
}

template <class T>
void gemm(int64_t m, int64_t n, int64_t k, const int8_t* q, const int32_t* row_sum, const T* inverse_scale,
          const uint8_t* packed, T gamma, T* y, int64_t y_row) {
  const int64_t slices = (n + kLine - 1) / kLine * kSlices;
  const Operands<T> all = {n,     lines_of(k), q,    quantized_width(k), row_sum, inverse_scale, packed,
                           gamma, y,           y_row};
  if (m == 1) {
    // Several slices at a time, to have enough additions under way to hide their latency; so never a last one
    // alone if there are more.
    for (int64_t first = 0, count; first < slices; first += count) {
      const int64_t left = slices - first;
      count = left == kRowSlices + 1 ? kRowSlices - 1 : min_of(left, kRowSlices);
      tile_of<T, 1, kRowSlices>(1, count, all, first);
    }
    return;
  }
  // Slice by slice, so that the panel it lies in stays in cache over all rows.
  for (int64_t slice = 0; slice < slices; ++slice) {
    Operands<T> o = all;
    for (int64_t left = m, rows; left > 0; left -= rows) {
      const int64_t tiles = (left + kTileRows - 1) / kTileRows;
      rows = (left + tiles - 1) / tiles;  // as even as can be: a tile of few rows is slow
      tile_of<T, kTileRows, 1>(rows, 1, o, slice);
      o.q += rows * o.q_row;
      o.row_sum += rows;
      o.inverse_scale += rows;
      o.y += rows * y_row;
    }
  }
}

}  // namespace

template <class T>
void add_packed_linear(Table<T>& table) {
  table.packed_pack = pack;
  table.packed_unpack = unpack<T>;
  table.packed_gemm = gemm<T>;
}
template void add_packed_linear(Table<float>&);
template void add_packed_linear(Table<double>&);

}  // namespace flashlm::kernels::FLASHLM_ISA

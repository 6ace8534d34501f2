// SPDX-License-Identifier: Apache-2.0
// Ternary weights times floating-point rows by additions alone, in the rows' own precision. Four columns of
// as many rows as a vector has lanes give a table of all their signed sums ("Four Russians"): an output then
// takes one addition for every four weights, whose codes are the number of the sum.
//
// What is scarce is the first-level cache: its size, and on Zen 4 its stores. So a table holds only one of
// each pair of opposite sums, 41 of 81, and the opposite is subtracted. Which of the kTables sums of an
// output are added and which are subtracted cannot be decided while running; instead, packing lists the
// outputs by their number of added sums, and each length has its own branch-free code.
#include "ops/kernels/families.h"
#include "ops/kernels/vec.h"

// AVX2 adds twice as many int16 as it has lanes for float32, and the tables' loads are the same: faster than
// vpmaddubsw. An instruction that sums four products of bytes is not beaten by enough.
#if defined(__AVX2__) && !defined(__AVX512F__) && !defined(__AVXVNNI__)
#define FLASHLM_INT16_TABLES
#endif

namespace flashlm::kernels::FLASHLM_ISA {
namespace {

constexpr int64_t kGroup = 4;   // weights that one sum stands for; with 3, tables are cheap but sums many
constexpr int64_t kSums = 41;   // in a table: the empty sum, and one of each of 40 opposite pairs
constexpr int64_t kTables = 8;  // in use at once: 328 lines of 64 bytes fill two thirds of 32 KiB
constexpr int64_t kDepth = kTables * kGroup;  // weights of an output in one pass
constexpr int64_t kBlock = 2048;              // outputs whose partial results stay in the second-level cache

inline int64_t divide_up(int64_t n, int64_t by) { return (n + by - 1) / by; }

// ---- layout of packed codes ----
//
// The same wherever tables are used. Outputs are cut into blocks of equal width, the last one less; a block
// has its passes over k in order. A pass is a list of one record per output, sorted by `added`, the number of
// sums that are added: they come first in the record, those that are subtracted after them. The list is
// preceded by the length of each of its kTables + 1 parts.

constexpr int64_t kWords = 2;  // of a record
constexpr int64_t kLinesOfWord = kTables / kWords;
constexpr int64_t kLineBits = 12;  // of a line's number: of one sum in one of the tables
constexpr int64_t kOutputBit = kLinesOfWord * kLineBits;
static_assert(kTables * kSums <= 1 << kLineBits && kBlock < 1 << (64 - kOutputBit));

struct Record {
  uint64_t
      word[kWords];  // kLinesOfWord numbers from bit 0 on; word 0 then has the output, from the block's first
};
constexpr int64_t kParts = kTables + 1;

struct Counts {
  uint16_t part[kParts];
};
constexpr int64_t kCountBytes = 32;
static_assert(sizeof(Counts) <= kCountBytes);

struct Layout {
  int64_t width, blocks, passes, stride;  // stride: of a pass, in bytes

  Layout(int64_t n, int64_t k) {
    blocks = divide_up(n, kBlock);
    width = blocks > 0 ? divide_up(n, blocks) : 0;
    passes = k > 0 ? divide_up(k, kDepth) : 1;  // a sum of nothing is still a result
    stride = kCountBytes + width * static_cast<int64_t>(sizeof(Record));
  }
};

int64_t packed_size(int64_t n, int64_t k) {
  const Layout layout(n, k);
  return layout.blocks * layout.passes * layout.stride;
}

/// The first kDepth of k codes as a record, but for the output, and how many of its sums are added.
inline Record make_record(int64_t k, const int8_t* codes, int64_t col_stride, int64_t* added) {
  int8_t some[kDepth] = {};
  if (k < kDepth) {
    for (int64_t i = 0; i < k; ++i) some[i] = codes[i * col_stride];
    codes = some;
    col_stride = 1;
  }
  Record record = {};
  int64_t first = 0;
#pragma GCC unroll 8
  for (int64_t t = 0; t < kTables; ++t, codes += kGroup * col_stride) {
    const int64_t sum =
        codes[0] + 3 * codes[col_stride] + 9 * codes[2 * col_stride] + 27 * codes[3 * col_stride];
    const int64_t negative = sum >> 63;  // all ones, or zero: a branch on a weight's sign is never predicted
    const int64_t line = t * kSums + ((sum ^ negative) - negative);
    const int64_t place = first + ((kTables - 1 - t) & negative);
    record.word[place / kLinesOfWord] |= static_cast<uint64_t>(line) << place % kLinesOfWord * kLineBits;
    first += 1 + negative;
  }
  *added = first;
  return record;
}

void pack(int64_t n, int64_t k, const int8_t* codes, int64_t row_stride, int64_t col_stride,
          uint8_t* packed) {
  const Layout layout(n, k);
  Record records[kBlock];
  uint8_t added[kBlock];
  for (int64_t j = 0; j < n; j += layout.width) {
    const int64_t width = min_of(layout.width, n - j);
    for (int64_t pass = 0; pass < layout.passes; ++pass, packed += layout.stride) {
      int64_t length[kParts] = {}, next[kParts];
      for (int64_t i = 0; i < width; ++i) {
        int64_t part;
        records[i] = make_record(k - pass * kDepth, codes + (j + i) * row_stride + pass * kDepth * col_stride,
                                 col_stride, &part);
        records[i].word[0] |= static_cast<uint64_t>(i) << kOutputBit;
        added[i] = static_cast<uint8_t>(part);
        ++length[part];
      }
      Counts counts = {};
      int64_t total = 0;
      for (int64_t part = 0; part < kParts; ++part) {
        counts.part[part] = static_cast<uint16_t>(length[part]);
        next[part] = total;
        total += length[part];
      }
      memcpy(packed, &counts, sizeof counts);
      for (int64_t i = 0; i < width; ++i) {
        memcpy(packed + kCountBytes + next[added[i]]++ * sizeof(Record), records + i, sizeof(Record));
      }
    }
  }
}

// ---- four columns of kLanes rows, transposed ----

template <int64_t... indices>
struct Indices {};
template <int64_t n, int64_t... indices>
struct FirstIndices : FirstIndices<n - 1, n - 1, indices...> {};
template <int64_t... indices>
struct FirstIndices<0, indices...> {
  typedef Indices<indices...> type;
};
constexpr typename FirstIndices<kLanes<float>>::type kAllLanes = {};

/// In each 128 bits: a's and b's two lower (or upper) elements of `size` floats, alternating.
template <int size, bool upper, int64_t... i>
inline Vec<float> interleave(Vec<float> a, Vec<float> b, Indices<i...>) {
  constexpr int64_t lanes = kLanes<float>;
  return __builtin_shufflevector(a, b,
                                 (i / 4 * 4 + (size == 1 ? upper * 2 + i % 4 / 2 : upper * 2 + i % 2) +
                                  (size == 1 ? i % 2 : i % 4 / 2) * lanes)...);
}

/// Transposes the 4 x 4 matrices that four vectors' 128-bit parts are the rows of.
inline void transpose4(Vec<float> v[4]) {
  const Vec<float> low01 = interleave<1, false>(v[0], v[1], kAllLanes);
  const Vec<float> high01 = interleave<1, true>(v[0], v[1], kAllLanes);
  const Vec<float> low23 = interleave<1, false>(v[2], v[3], kAllLanes);
  const Vec<float> high23 = interleave<1, true>(v[2], v[3], kAllLanes);
  v[0] = interleave<2, false>(low01, low23, kAllLanes);
  v[1] = interleave<2, true>(low01, low23, kAllLanes);
  v[2] = interleave<2, false>(high01, high23, kAllLanes);
  v[3] = interleave<2, true>(high01, high23, kAllLanes);
}

typedef float Four __attribute__((vector_size(16)));

/// v's 128 bits at 4 * part.
template <int64_t part>
inline Four four_of(Vec<float> v) {
  return __builtin_shufflevector(v, v, part * 4, part * 4 + 1, part * 4 + 2, part * 4 + 3);
}

inline Four load_four(const float* p) {
  Four four;
  memcpy(&four, p, sizeof four);
  return four;
}

/// Rows 0, step, 2 step ... of four floats each, side by side.
inline Vec<float> load_fours(const float* x, [[maybe_unused]] int64_t step) {
#if defined(__AVX512F__)
  typedef float Eight __attribute__((vector_size(32)));
  const Eight low = __builtin_shufflevector(load_four(x), load_four(x + step), 0, 1, 2, 3, 4, 5, 6, 7);
  const Eight high =
      __builtin_shufflevector(load_four(x + 2 * step), load_four(x + 3 * step), 0, 1, 2, 3, 4, 5, 6, 7);
  return __builtin_shufflevector(low, high, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
#elif defined(__AVX2__)
  return __builtin_shufflevector(load_four(x), load_four(x + step), 0, 1, 2, 3, 4, 5, 6, 7);
#else
  return load_four(x);
#endif
}

template <int64_t part = 0>
inline void store_fours(float* y, int64_t step, Vec<float> v) {
  const Four four = four_of<part>(v);
  memcpy(y, &four, sizeof four);
  if constexpr (part + 1 < kLanes<float> / 4) store_fours<part + 1>(y + step, step, v);
}

/// columns[c][i] = x[i * x_row + c]
template <class T>
inline void load_columns(int64_t rows, int64_t width, const T* x, int64_t x_row, Vec<T> columns[kGroup]) {
  if constexpr (sizeof(T) == sizeof(float)) {
    if (rows == kLanes<T> && width >= kGroup) {
#pragma GCC unroll 4
      for (int64_t i = 0; i < 4; ++i) columns[i] = load_fours(x + i * x_row, 4 * x_row);
      transpose4(columns);
      return;
    }
  }
  T values[kGroup][kLanes<T>] = {};
  for (int64_t i = 0; i < rows; ++i) {
    for (int64_t c = 0; c < min_of(width, kGroup); ++c) values[c][i] = x[i * x_row + c];
  }
  for (int64_t c = 0; c < kGroup; ++c) columns[c] = load(values[c]);
}

/// y[i * y_row + c] = gamma * columns[c * kLanes + i]
template <class T>
inline void store_columns(int64_t rows, int64_t width, T gamma, const T* columns, T* y, int64_t y_row) {
  if constexpr (sizeof(T) == sizeof(float)) {
    if (rows == kLanes<T> && width >= kGroup) {
      Vec<T> v[kGroup];
#pragma GCC unroll 4
      for (int64_t c = 0; c < kGroup; ++c) v[c] = load(columns + c * kLanes<T>) * gamma;
      transpose4(v);
#pragma GCC unroll 4
      for (int64_t i = 0; i < 4; ++i) store_fours(y + i * y_row, 4 * y_row, v[i]);
      return;
    }
  }
  for (int64_t i = 0; i < rows; ++i) {
    for (int64_t c = 0; c < min_of(width, kGroup); ++c) y[i * y_row + c] = gamma * columns[c * kLanes<T> + i];
  }
}

// ---- tables ----

/// Line i of a table, 0 < i < kSums, is the sum of d_c x_c whose digits d_c in {-1, 0, 1} make up
/// i = d_0 + 3 d_1 + 9 d_2 + 27 d_3. A column with d_c = 0 takes no part: not even its NaN does. Line 0 is
/// left.
template <class T>
inline void build(const Vec<T> x[kGroup], T* table) {
  constexpr int64_t lanes = kLanes<T>;
  const Vec<T> low[5] = {Vec<T>{}, x[0], x[1] - x[0], x[1], x[1] + x[0]};
#pragma GCC unroll 4
  for (int64_t i = 1; i < 5; ++i) store(table + i * lanes, low[i]);
  store(table + 9 * lanes, x[2]);
  store(table + 18 * lanes, x[3] - x[2]);
  store(table + 27 * lanes, x[3]);
  store(table + 36 * lanes, x[3] + x[2]);
  // Not unrolled, or else the compiler first makes all sums and then has nowhere to keep them.
#pragma GCC unroll 1
  for (int64_t line = 9; line < kSums; line += 9) {
    T* centre = table + line * lanes;
    const Vec<T> high = load(centre);
#pragma GCC unroll 4
    for (int64_t i = 1; i < 5; ++i) {
      store(centre - i * lanes, high - low[i]);
      store(centre + i * lanes, high + low[i]);
    }
  }
}

// ---- product ----

/// The number of a record's line i, as its distance in bytes: lines are as long as a vector. A rotation and a
/// mask, as `by` is never 0.
inline int64_t line_offset(const Record& record, int64_t i) {
  constexpr int64_t shift = kVectorBytes == 64 ? 6 : kVectorBytes == 32 ? 5 : 4;
  const uint64_t word = record.word[i / kLinesOfWord];
  const int64_t by = (i % kLinesOfWord * kLineBits - shift) & 63;
  const uint64_t rotated = word >> by | word << (64 - by);
  return static_cast<int64_t>(rotated & ((1 << kLineBits) - 1) << shift);
}

/// The outputs of one part of a pass: the first `added` lines of each are added, the others subtracted. The
/// first pass begins at nothing.
template <class T, bool first, int64_t added>
inline const uint8_t* part(int64_t count, const uint8_t* list, const T* tables, T* partial) {
  for (const uint8_t* end = list + count * sizeof(Record); list != end; list += sizeof(Record)) {
    Record record;
    memcpy(&record, list, sizeof record);
    T* output = partial + static_cast<int64_t>(record.word[0] >> kOutputBit) * kLanes<T>;
    Vec<T> sum = first ? Vec<T>{} : load(output);
#pragma GCC unroll 8
    for (int64_t i = 0; i < kTables; ++i) {
      const Vec<T> line =
          load(reinterpret_cast<const T*>(reinterpret_cast<const uint8_t*>(tables) + line_offset(record, i)));
      sum = i < added ? sum + line : sum - line;
    }
    store(output, sum);
  }
  return list;
}

template <class T, bool first, int64_t added = 0>
inline void all_parts(const Counts& counts, const uint8_t* list, const T* tables, T* partial) {
  list = part<T, first, added>(counts.part[added], list, tables, partial);
  if constexpr (added < kTables) all_parts<T, first, added + 1>(counts, list, tables, partial);
}

/// The next pass: adds its sums to the partial results, which begin anew if it is the first.
template <class T>
inline void add_pass(bool first, const uint8_t* pass, const T* tables, T* partial) {
  Counts counts;
  memcpy(&counts, pass, sizeof counts);
  if (first) {
    all_parts<T, true>(counts, pass + kCountBytes, tables, partial);
  } else {
    all_parts<T, false>(counts, pass + kCountBytes, tables, partial);
  }
}

/// The first line in a workspace, which has room for one vector more.
inline void* first_line(void* workspace) {
  const uintptr_t address = reinterpret_cast<uintptr_t>(workspace);
  return reinterpret_cast<void*>((address + kVectorBytes - 1) / kVectorBytes * kVectorBytes);
}

template <class T>
int64_t workspace_size(int64_t n, int64_t k) {
  const int64_t lines = kTables * kSums + Layout(n, k).width;
  return (lines + 1) * kVectorBytes;  // one more to align the lines
}

template <class T>
void gemm(int64_t m, int64_t n, int64_t k, const T* x, int64_t x_row, const uint8_t* packed, T gamma, T* y,
          int64_t y_row, void* workspace) {
  constexpr int64_t lanes = kLanes<T>;
  const Layout layout(n, k);
  T* tables = static_cast<T*>(first_line(workspace));
  T* partial = tables + kTables * kSums * lanes;
  for (int64_t t = 0; t < kTables; ++t) store(tables + t * kSums * lanes, Vec<T>{});
  for (; m > 0; m -= lanes, x += lanes * x_row, y += lanes * y_row) {
    const int64_t rows = min_of(lanes, m);
    const uint8_t* pass = packed;
    for (int64_t j = 0; j < n; j += layout.width) {
      for (int64_t p = 0; p < layout.passes * kDepth; p += kDepth, pass += layout.stride) {
        for (int64_t t = 0; t < kTables && p + t * kGroup < k; ++t) {
          Vec<T> columns[kGroup];
          load_columns(rows, k - p - t * kGroup, x + p + t * kGroup, x_row, columns);
          build(columns, tables + t * kSums * lanes);
        }
        // What the next pass reads: too many rows side by side for the hardware to foresee.
        for (int64_t i = 0; i < rows; ++i) __builtin_prefetch(x + i * x_row + p + kDepth + kDepth / 2);
        add_pass(/*first=*/p == 0, pass, tables, partial);
      }
      const int64_t width = min_of(layout.width, n - j);
      for (int64_t c = 0; c < width; c += kGroup) {
        store_columns(rows, width - c, gamma, partial + c * lanes, y + j + c, y_row);
      }
    }
  }
}

#if defined(FLASHLM_INT16_TABLES)
// ---- product of int8 rows ----
//
// A vector of int16 is two vectors' worth of rows: its 128-bit parts have four rows of the first, then four
// of the second, which is the order that packing to int16 and unpacking leave.

constexpr int64_t kInt16Lanes = kLanes<int16_t>;
constexpr int64_t kInt32Lanes = kLanes<int32_t>;
constexpr int64_t kInt16Passes = 8;  // whose sums an int16 holds
static_assert(kInt16Passes * kDepth * 127 <= INT16_MAX);
static_assert(kTables % kInt32Lanes == 0);

inline Vec<int32_t> first_rows(Vec<int16_t> v) {
  return (Vec<int32_t>)_mm256_unpacklo_epi16((__m256i)v, (__m256i)v) >> 16;
}
inline Vec<int32_t> last_rows(Vec<int16_t> v) {
  return (Vec<int32_t>)_mm256_unpackhi_epi16((__m256i)v, (__m256i)v) >> 16;
}

/// What lies where in the workspace, from a vector's boundary on.
struct Int8Workspace {
  int64_t tables, partial, sums, groups, bytes;

  explicit Int8Workspace(const Layout& layout) {
    // store_int8 reads whole squares of outputs.
    const int64_t outputs = round_up(layout.width, kInt32Lanes);
    tables = 0;
    partial = tables + kTables * kSums * kVectorBytes;
    sums = partial + outputs * kVectorBytes;
    groups = sums + outputs * 2 * kVectorBytes;
    bytes = groups + layout.passes * kTables * 2 * kVectorBytes;
  }
};

int64_t int8_workspace_size(int64_t n, int64_t k) {
  return Int8Workspace(Layout(n, k)).bytes + kVectorBytes;  // more to align it
}

/// groups[g][i] = the four bytes of row i's group g, for as many rows as a vector of int16 has lanes. Of rows
/// that are not there, the last one's.
inline void turn(int64_t rows, int64_t row_groups, int64_t groups, const int8_t* q, int32_t* turned) {
  for (int64_t first = 0; first < kInt16Lanes; first += kInt32Lanes) {
    for (int64_t g = 0; g < groups; g += kInt32Lanes) {
      Vec<int32_t> v[kInt32Lanes];
#pragma GCC unroll 8
      for (int64_t i = 0; i < kInt32Lanes; ++i) {
        const int64_t row = min_of(first + i, rows - 1);
        v[i] = load_up_to(reinterpret_cast<const int32_t*>(q) + row * row_groups + g, row_groups - g);
      }
      transpose<int32_t>(v);
#pragma GCC unroll 8
      for (int64_t i = 0; i < kInt32Lanes; ++i) {
        store(turned + (g + i) * kInt16Lanes + first, v[i]);
      }
    }
  }
}

inline void build_int8(const int32_t* group, int16_t* table) {
  const Vec<int32_t> first = load(group), last = load(group + kInt32Lanes);
  Vec<int16_t> columns[kGroup];
#pragma GCC unroll 4
  for (int32_t c = 0; c < kGroup; ++c) {
    const Vec<int32_t> a = (first << (24 - 8 * c)) >> 24, b = (last << (24 - 8 * c)) >> 24;
    columns[c] = (Vec<int16_t>)_mm256_packs_epi32((__m256i)a, (__m256i)b);
  }
  build(columns, table);
}

/// sums (+)= partial
inline void widen(int64_t width, const int16_t* partial, bool add, int32_t* sums) {
  for (int64_t j = 0; j < width; ++j, partial += kInt16Lanes, sums += kInt16Lanes) {
    Vec<int32_t> first = first_rows(load(partial)), last = last_rows(load(partial));
    if (add) first += load(sums), last += load(sums + kInt32Lanes);
    store(sums, first);
    store(sums + kInt32Lanes, last);
  }
}

/// Of a vector of rows (the second if `second`): y = factor * (sums + partial), or partial alone.
template <bool second>
inline void store_int8(int64_t rows, int64_t width, const int16_t* partial, const int32_t* sums,
                       Vec<float> factor, float* y, int64_t y_row) {
  for (int64_t j = 0; j < width; j += kInt32Lanes) {
    Vec<float> v[kInt32Lanes];
#pragma GCC unroll 8
    for (int64_t i = 0; i < kInt32Lanes; ++i) {
      const Vec<int16_t> part = load(partial + (j + i) * kInt16Lanes);
      Vec<int32_t> sum = second ? last_rows(part) : first_rows(part);
      if (sums != nullptr) sum += load(sums + (j + i) * kInt16Lanes + second * kInt32Lanes);
      v[i] = __builtin_convertvector(sum, Vec<float>) * factor;
    }
    transpose<float>(v);
    if (rows >= kInt32Lanes && width - j >= kInt32Lanes) {
#pragma GCC unroll 8
      for (int64_t i = 0; i < kInt32Lanes; ++i) store(y + i * y_row + j, v[i]);
    } else {
      for (int64_t i = 0; i < min_of(rows, kInt32Lanes); ++i) store_up_to(y + i * y_row + j, v[i], width - j);
    }
  }
}

void gemm_int8(int64_t m, int64_t n, int64_t k, const int8_t* q, const float* inverse_scale,
               const uint8_t* packed, float gamma, float* y, int64_t y_row, void* workspace) {
  const Layout layout(n, k);
  const Int8Workspace at(layout);
  uint8_t* aligned = static_cast<uint8_t*>(first_line(workspace));
  int16_t* tables = reinterpret_cast<int16_t*>(aligned + at.tables);
  int16_t* partial = reinterpret_cast<int16_t*>(aligned + at.partial);
  int32_t* sums = reinterpret_cast<int32_t*>(aligned + at.sums);
  int32_t* turned = reinterpret_cast<int32_t*>(aligned + at.groups);
  const int64_t row_groups = quantized_width(k) / kGroup;
  for (int64_t t = 0; t < kTables; ++t) store(tables + t * kSums * kInt16Lanes, Vec<int16_t>{});
  for (int64_t r = 0; r < m; r += kInt16Lanes) {
    const int64_t rows = min_of(kInt16Lanes, m - r);
    turn(rows, row_groups, layout.passes * kTables, q + r * row_groups * kGroup, turned);
    const Vec<float> first = load_up_to(inverse_scale + r, rows) * gamma,
                     last = load_up_to(inverse_scale + r + kInt32Lanes, rows - kInt32Lanes) * gamma;
    const uint8_t* pass = packed;
    for (int64_t j = 0; j < n; j += layout.width) {
      const int64_t width = min_of(layout.width, n - j);
      for (int64_t p = 0; p < layout.passes; ++p, pass += layout.stride) {
        for (int64_t t = 0; t < kTables; ++t) {
          build_int8(turned + (p * kTables + t) * kInt16Lanes, tables + t * kSums * kInt16Lanes);
        }
        const bool full = p % kInt16Passes == 0;
        if (full && p > 0) widen(width, partial, /*add=*/p > kInt16Passes, sums);
        add_pass(/*first=*/full, pass, tables, partial);
      }
      const int32_t* before = layout.passes > kInt16Passes ? sums : nullptr;
      float* to = y + r * y_row + j;
      store_int8<false>(rows, width, partial, before, first, to, y_row);
      store_int8<true>(rows - kInt32Lanes, width, partial, before, last, to + kInt32Lanes * y_row, y_row);
    }
  }
}
#endif

}  // namespace

template <class T>
void add_sum_table(Table<T>& table) {
#if defined(__AMX_TILE__)
  constexpr bool kHasIt = sizeof(T) != sizeof(float);  // bf16x3.cpp has float32
#else
  constexpr bool kHasIt = true;
#endif
  if constexpr (kHasIt) {
    table.ternary_float_packed_size = packed_size;
    table.ternary_float_pack = pack;
    table.ternary_float_workspace_size = workspace_size<T>;
    table.ternary_float_gemm = gemm<T>;
  }
#if defined(FLASHLM_INT16_TABLES)
  if constexpr (sizeof(T) == sizeof(float)) {
    table.sum_table_int8_workspace_size = int8_workspace_size;
    table.sum_table_gemm_int8 = gemm_int8;
  }
#endif
}
template void add_sum_table(Table<float>&);
template void add_sum_table(Table<double>&);

}  // namespace flashlm::kernels::FLASHLM_ISA

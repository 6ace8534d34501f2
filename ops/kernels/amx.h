// SPDX-License-Identifier: Apache-2.0
// The loops of a product in tile registers (Intel AMX), for the kernel sources whose operands are groups of 4
// bytes, as in dot_tile.h: bytes in fours or bfloat16 in twos. A tile is 16 rows of 64 bytes, and one
// instruction multiplies two of them, at eight times the rate of the vectors' dot products. The operands lie
// as they do for dot_tile, so that a level with tiles packs nothing differently.
#pragma once

#include "ops/kernels/dot_tile.h"
#include "ops/kernels/kernels.h"

#if defined(__AMX_TILE__)
#include <immintrin.h>

namespace flashlm::kernels {
namespace {

/// Rows of a tile, groups in one of its rows, and outputs in a panel.
constexpr int64_t kTile = 16;
constexpr int64_t kTileGroups = kTile * kTile;
// A block of 2 x 2 tiles of sums, in the registers 0 to 3, needs two of A (4, 5) and two of B (6, 7) for four
// products. Rows that do not lie as tiles read them are packed for all panels of a strip.
constexpr int64_t kBlock = 2 * kTile;

/// The dot product of tiles: of int8 with uint8, of int8, and of pairs of bfloat16. The registers'
/// numbers are part of the instruction. A is the sum of kParts matrices; kDepth groups of a block of it are
/// packed at a time, and for kStripPanels panels.
#define FLASHLM_TILE_DOT(name, instruction)        \
  struct name {                                    \
    static constexpr int64_t kParts = 1;           \
    static constexpr int64_t kDepth = 16 * kTile;  \
    static constexpr int64_t kStripPanels = 16;    \
    static void dot_00() { instruction(0, 4, 6); } \
    static void dot_01() { instruction(1, 4, 7); } \
    static void dot_10() { instruction(2, 5, 6); } \
    static void dot_11() { instruction(3, 5, 7); } \
  }
FLASHLM_TILE_DOT(SignedTimesUnsigned, _tile_dpbsud);
FLASHLM_TILE_DOT(SignedTimesSigned, _tile_dpbssd);
FLASHLM_TILE_DOT(Bfloat16Pairs, _tile_dpbf16ps);
#undef FLASHLM_TILE_DOT
// The three parts of a block stay in the first-level cache, and are worth making for more panels.
struct Bfloat16Thirds : Bfloat16Pairs {
  static constexpr int64_t kParts = 3;
  static constexpr int64_t kDepth = 4 * kTile;
  static constexpr int64_t kStripPanels = 48;
};

/// All eight tile registers at full size, for as long as this lives.
class TileRegisters {
 public:
  TileRegisters() {
    struct alignas(64) {
      uint8_t palette = 1, start_row = 0, reserved[14] = {};
      uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
      uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
    } config;
    asm volatile("ldtilecfg %0" : : "m"(config));
  }
  ~TileRegisters() { _tile_release(); }
  TileRegisters(const TileRegisters&) = delete;
  TileRegisters& operator=(const TileRegisters&) = delete;
};

/// A block's rows of A as tiles read them: group p of row i at `first` + i * row + p / kTile * step + p %
/// kTile. A multiple of kTile of both can be read. B has zeros for groups that A does not have, so those may
/// be any finite numbers. A's parts lie `part` apart.
struct TileRows {
  const int32_t* first;
  int64_t row, step = kTile, part = 0;
};

/// Copies up to kTile rows of A to `to`, where tiles read them at `to_row`: group p of row i from `from` +
/// i * row + p. Beside and below them are zeros.
inline void pack_tile_rows(const int32_t* from, int64_t row, int64_t rows, int64_t groups, int32_t* to,
                           int64_t to_row) {
  for (int64_t i = 0; i < kTile; ++i, from += row, to += to_row) {
    const int64_t count = i < rows ? groups : 0;
    for (int64_t p = 0; p < groups; p += kTile) store(to + p, load_up_to(from + p, count - p));
  }
}

/// The same from columns, kTile wide: group p of row i from `from` + i + p * column.
inline void pack_tile_columns(const int32_t* from, int64_t column, int64_t groups, int32_t* to,
                              int64_t to_row) {
  for (int64_t p = 0; p < groups; p += kTile) {
    Vec<int32_t> square[kTile];
#pragma GCC unroll 16
    for (int64_t i = 0; i < kTile; ++i) {
      square[i] = p + i < groups ? load(from + (p + i) * column) : Vec<int32_t>{};
    }
    transpose<int32_t>(square);
#pragma GCC unroll 16
    for (int64_t i = 0; i < kTile; ++i) store(to + i * to_row + p, square[i]);
  }
}

/// Rows of A from row i and group p on, copied for tiles to read. A pair is any group of 4 bytes here.
inline TileRows pack_tiles(const PairRows& a, int64_t i, int64_t rows, int64_t p, int64_t groups,
                           int32_t* buffer) {
  const int64_t to_row = round_up(groups, kTile);
  for (int64_t r = 0; r < rows; r += kTile) {
    const int32_t* const from = a.first + (i + r) / kTile * a.strip + p * a.column;
    int32_t* const to = buffer + r * to_row;
    if (a.column == 1) {
      pack_tile_rows(from, a.row, rows - r, groups, to, to_row);
    } else {
      pack_tile_columns(from, a.column, groups, to, to_row);
    }
  }
  return {buffer, to_row};
}

/// One block of sums, kRows x kPanels tiles: over `whole` tiles of depth and perhaps one more of B, `rest`.
/// Panels of B lie `b_panel` apart, those of `rest` kTileGroups, rows of sums kBlock.
template <class Dot, int64_t kRows, int64_t kPanels>
void tile_block(int64_t whole, TileRows a, const int32_t* b, int64_t b_panel, const int32_t* rest, bool add,
                int32_t* sums) {
  constexpr int64_t kBytes = kTile * kGroupBytes, kSumBytes = kBlock * kGroupBytes;
  const int64_t a_bytes = a.row * kGroupBytes;
  const auto step = [&](const int32_t* at_a, const int32_t* at_b, int64_t panel) {
    _tile_loadd(6, at_b, kBytes);
#pragma GCC unroll 3
    for (int64_t part = 0; part < Dot::kParts; ++part, at_a += a.part) {
      _tile_loadd(4, at_a, a_bytes);
      Dot::dot_00();
      if constexpr (kPanels == 2) {
        if (part == 0) _tile_loadd(7, at_b + panel, kBytes);
        Dot::dot_01();
      }
      if constexpr (kRows == 2) {
        _tile_loadd(5, at_a + kTile * a.row, a_bytes);
        Dot::dot_10();
        if constexpr (kPanels == 2) Dot::dot_11();
      }
    }
  };
  int32_t* const right = sums + kTile;
  int32_t* const below = sums + kTile * kBlock;
  if (add) {
    _tile_loadd(0, sums, kSumBytes);
    if constexpr (kPanels == 2) _tile_loadd(1, right, kSumBytes);
    if constexpr (kRows == 2) _tile_loadd(2, below, kSumBytes);
    if constexpr (kRows == 2 && kPanels == 2) _tile_loadd(3, below + kTile, kSumBytes);
  } else {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
  }
  for (int64_t t = 0; t < whole; ++t) step(a.first + t * a.step, b + t * kTileGroups, b_panel);
  if (rest != nullptr) step(a.first + whole * a.step, rest, kTileGroups);
  _tile_stored(0, sums, kSumBytes);
  if constexpr (kPanels == 2) _tile_stored(1, right, kSumBytes);
  if constexpr (kRows == 2) _tile_stored(2, below, kSumBytes);
  if constexpr (kRows == 2 && kPanels == 2) _tile_stored(3, below + kTile, kSumBytes);
}

/// A product's result, C (m, n) with its rows `row` apart, and whether the product is added to what is there.
struct TileOutput {
  float* c;
  int64_t m, n, row;
  bool accumulate;
};

/// A block's sums and where they go: `rows` rows of C from row i on, columns `column` to `end`. `left` has
/// the sums of the block to the left, if that has left something to this one; `last` says that no block to
/// the right takes what this one leaves.
struct TileSums {
  int64_t i, rows, column, end;
  const int32_t *left, *sums;
  bool last;
};

/// Writes a block of C in whole lines of the cache, as a store into two of them costs more than both: what of
/// a row's last line belongs to the next block is left to that one. Only an edge has parts of lines. All is
/// taken by value: a vector may be stored to anything, so what a reference leads to would be read again after
/// each.
template <bool accumulate, bool is_edge, class ValuesOf>
void write_block(const TileOutput out, const TileSums block, const ValuesOf values_of) {
  alignas(64) static constexpr int32_t kLanesOfTwo[2 * kTile] = {0,  1,  2,  3,  4,  5,  6,  7,  8,  9,  10,
                                                                 11, 12, 13, 14, 15, 16, 17, 18, 19, 20, 21,
                                                                 22, 23, 24, 25, 26, 27, 28, 29, 30, 31};
  const bool is_first = block.left == nullptr;
  const int32_t *left = is_first ? block.sums : block.left, *sums = block.sums;
  float* to = out.c + block.i * out.row + block.column;
  for (int64_t r = 0; r < block.rows; ++r, to += out.row, left += kBlock, sums += kBlock) {
    const int64_t shift = static_cast<int64_t>(reinterpret_cast<uintptr_t>(to) / sizeof(float) % kTile);
    const __m512i order = (__m512i)load(kLanesOfTwo + kTile - shift);
    const auto values = values_of(block.i + r);
    // Bit j is lane j from the first line's beginning on.
    uint64_t mask = ~uint64_t{0};
    if constexpr (is_edge) {
      if (block.last) mask = ~(mask << (block.end - block.column + shift));
      if (is_first) mask &= ~uint64_t{0} << shift;
    }
    const auto line = [=](int64_t v, Vec<int32_t> before, Vec<int32_t> now) {
      const Vec<int32_t> both = (Vec<int32_t>)_mm512_permutex2var_epi32((__m512i)before, order, (__m512i)now);
      float* const at = to - shift + v * kTile;
      const __mmask16 lanes = static_cast<__mmask16>(is_edge ? mask >> (v * kTile) : 0xffff);
      Vec<float> result = values(both);
      if constexpr (accumulate) result += (Vec<float>)_mm512_maskz_loadu_ps(lanes, at);
      _mm512_mask_storeu_ps(at, lanes, (__m512)result);
    };
    const Vec<int32_t> first = load(sums), second = load(sums + kTile);
    line(0, load(left + kTile), first);
    line(1, first, second);
    if (is_edge && block.last) line(2, second, second);
  }
}

/// C = A · B, or C + A · B, for A (m, depth) and panels of B (depth, n), which follow each other at
/// `panel_size` vectors; depths are counted in groups. Every sum has its terms in the order of the depth,
/// whatever block it is in.
///   rows_of(i, rows, p, groups, buffer)  gives `rows` rows of A from row i and group p on as TileRows, for
///                                        which there is a buffer of kParts * kBlock * kDepth and kTile more
///   values_of(i)(sums)                   gives values of C's row i from their sums
template <class Dot, class RowsOf, class ValuesOf>
void tile_gemm(const TileOutput& out, int64_t depth, const RowsOf& rows_of, const int32_t* b,
               int64_t panel_size, const ValuesOf& values_of) {
  constexpr int64_t kDepth = Dot::kDepth, kStripPanels = Dot::kStripPanels;
  alignas(64) int32_t buffer[Dot::kParts * kBlock * kDepth + kTile];
  alignas(64) int32_t sums[kStripPanels / 2][kBlock * kBlock];
  alignas(64) int32_t rests[kStripPanels * kTileGroups];
  const int64_t rest = depth % kTile, panels = round_up(out.n, kTile) / kTile;
  // Sums that one pass makes are kept until the next block is written.
  const int64_t kept = depth > kDepth ? kStripPanels / 2 : 2;
  // A block is written after the next rows are packed: a tile's load waits until a store before it is done.
  TileSums made = {};
  const auto write_made = [&] {
    const bool is_edge = made.left == nullptr || made.last;
    const auto write = [&]<bool kAccumulate>() {
      is_edge ? write_block<kAccumulate, true>(out, made, values_of)
              : write_block<kAccumulate, false>(out, made, values_of);
    };
    out.accumulate ? write.template operator()<true>() : write.template operator()<false>();
    made.rows = 0;
  };
  const TileRegisters registers;
  for (int64_t strip = 0; strip < panels; strip += kStripPanels) {
    const int64_t strip_end = min_of(panels, strip + kStripPanels);
    // What lies behind a panel is no zero, nor even there.
    for (int64_t panel = strip; panel < strip_end && rest > 0; ++panel) {
      int32_t* const to = rests + (panel - strip) * kTileGroups;
      const int32_t* const from = b + (panel * panel_size + depth - rest) * kTile;
      for (int64_t p = 0; p < kTile; ++p) {
        store(to + p * kTile, p < rest ? load(from + p * kTile) : Vec<int32_t>{});
      }
    }
    for (int64_t i = 0; i < out.m; i += kBlock) {
      const int64_t rows = min_of(kBlock, out.m - i);
      for (int64_t p = 0; p == 0 || p < depth; p += kDepth) {  // sums over no depth are sums, too
        const int64_t count = min_of(kDepth, depth - p);
        const TileRows a = rows_of(i, rows, p, count, buffer);
        asm volatile("" : : : "memory");  // GCC does not know that a tile's load reads memory
        const int32_t* left = nullptr;
        for (int64_t panel = strip; panel < strip_end; panel += 2) {
          write_made();
          int32_t* const to = sums[(panel - strip) / 2 % kept];
          const int64_t vectors = min_of(2, strip_end - panel);
          const auto run = [&]<int64_t kRows, int64_t kPanels>() {
            tile_block<Dot, kRows, kPanels>(
                count / kTile, a, b + (panel * panel_size + p) * kTile, panel_size * kTile,
                count % kTile > 0 ? rests + (panel - strip) * kTileGroups : nullptr,
                /*add=*/p > 0, to);
          };
          if (rows > kTile) {
            vectors == 2 ? run.template operator()<2, 2>() : run.template operator()<2, 1>();
          } else {
            vectors == 2 ? run.template operator()<1, 2>() : run.template operator()<1, 1>();
          }
          if (p + count == depth) {
            made = {i,    rows, panel * kTile,         min_of(out.n, (panel + vectors) * kTile),
                    left, to,   panel + 2 >= strip_end};
            left = to;
          }
        }
      }
    }
  }
  write_made();
}

}  // namespace
}  // namespace flashlm::kernels
#endif

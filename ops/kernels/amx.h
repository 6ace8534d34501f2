// SPDX-License-Identifier: Apache-2.0
// The loops of a product in tile registers (Intel AMX), for the kernel sources whose operands are groups of 4
// bytes, as in dot_tile.h: bytes in fours or bfloat16 in twos. A tile is 16 rows of 64 bytes, and one
// instruction multiplies two of them, at eight times the rate of the vectors' dot products. The operands lie
// as they do for dot_tile, so that a level with tiles packs nothing differently.
#pragma once

#include "ops/kernels/dot_tile.h"

#if defined(__AMX_TILE__)
#include <immintrin.h>

namespace flashlm::kernels {
namespace {

/// Rows of a tile, groups in one of its rows, and outputs in a panel.
constexpr int64_t kTile = 16;
constexpr int64_t kTileGroups = kTile * kTile;
// A block of 2 x 2 tiles of sums, in the registers 0 to 3, needs two of A (4, 5) and two of B (6, 7) for four
// products. Its rows are packed here, and read from a level-1 cache for all panels of a strip.
constexpr int64_t kBlock = 2 * kTile;
constexpr int64_t kTileDepth = 16 * kTile;
constexpr int64_t kStripPanels = 16;

/// The dot product of tiles: of int8 with uint8, uint8 with int8, and pairs of bfloat16. The registers'
/// numbers are part of the instruction.
#define FLASHLM_TILE_DOT(name, instruction)        \
  struct name {                                    \
    static void dot_00() { instruction(0, 4, 6); } \
    static void dot_01() { instruction(1, 4, 7); } \
    static void dot_10() { instruction(2, 5, 6); } \
    static void dot_11() { instruction(3, 5, 7); } \
  }
FLASHLM_TILE_DOT(SignedTimesUnsigned, _tile_dpbsud);
FLASHLM_TILE_DOT(UnsignedTimesSigned, _tile_dpbusd);
FLASHLM_TILE_DOT(Bfloat16Pairs, _tile_dpbf16ps);
#undef FLASHLM_TILE_DOT

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

/// Brings rows of A to where tiles read them: group p of row i from `from` + i * row + p, or if `column` is
/// not 1, row is, from + i + p * column, where a multiple of kTile rows must be there. rows <= kBlock,
/// groups; at `to` they lie `to_row` apart, with zeros beside and below them, as far as tiles reach.
inline void pack_tiles(const int32_t* from, int64_t row, int64_t column, int64_t rows, int64_t groups,
                       int32_t* to, int64_t to_row) {
  for (int64_t i = 0; i < rows; i += kTile) {
    for (int64_t p = 0; p < groups; p += kTile) {
      const int64_t count = min_of(kTile, groups - p);
      Vec<int32_t> square[kTile];
      if (column == 1) {
#pragma GCC unroll 16
        for (int64_t r = 0; r < kTile; ++r) {
          square[r] = i + r < rows ? load_up_to(from + (i + r) * row + p, count) : Vec<int32_t>{};
        }
      } else {
#pragma GCC unroll 16
        for (int64_t r = 0; r < kTile; ++r) {
          square[r] = r < count ? load(from + i + (p + r) * column) : Vec<int32_t>{};
        }
        transpose<int32_t>(square);
      }
#pragma GCC unroll 16
      for (int64_t r = 0; r < kTile; ++r) store(to + (i + r) * to_row + p, square[r]);
    }
  }
}

/// One block of sums, kRows x kPanels tiles: over `whole` tiles of depth and perhaps one more of B, `rest`.
/// Rows of A lie `a_row` apart, panels of B `b_panel`, those of `rest` kTileGroups, rows of sums kBlock.
template <class Dot, int64_t kRows, int64_t kPanels>
void tile_block(int64_t whole, const int32_t* a, int64_t a_row, const int32_t* b, int64_t b_panel,
                const int32_t* rest, bool add, int32_t* sums) {
  constexpr int64_t kBytes = kTile * kGroupBytes, kSumBytes = kBlock * kGroupBytes;
  const int64_t a_bytes = a_row * kGroupBytes;
  const auto step = [&](const int32_t* at_a, const int32_t* at_b, int64_t panel) {
    _tile_loadd(6, at_b, kBytes);
    _tile_loadd(4, at_a, a_bytes);
    Dot::dot_00();
    if constexpr (kPanels == 2) {
      _tile_loadd(7, at_b + panel, kBytes);
      Dot::dot_01();
    }
    if constexpr (kRows == 2) {
      _tile_loadd(5, at_a + kTile * a_row, a_bytes);
      Dot::dot_10();
      if constexpr (kPanels == 2) Dot::dot_11();
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
  for (int64_t t = 0; t < whole; ++t) step(a + t * kTile, b + t * kTileGroups, b_panel);
  if (rest != nullptr) step(a + whole * kTile, rest, kTileGroups);
  _tile_stored(0, sums, kSumBytes);
  if constexpr (kPanels == 2) _tile_stored(1, right, kSumBytes);
  if constexpr (kRows == 2) _tile_stored(2, below, kSumBytes);
  if constexpr (kRows == 2 && kPanels == 2) _tile_stored(3, below + kTile, kSumBytes);
}

/// The sums of products of A (m, depth) and `panels` panels of B, which follow each other at `panel_size`
/// vectors; depths are counted in groups. Every sum has its terms in the order of the depth, whatever block
/// it is in.
///   pack(i, rows, p, groups, to, to_row)  is pack_tiles for A from row i and group p on; it may write
///   another
///                                         kTile groups behind the last row
///   finish(i, panel, rows, panels, sums)  takes rows i .. i + rows of panels panel .. panel + panels: row
///   r's
///                                         vector of panel panel + v lies at sums + r * kBlock + v * kTile
template <class Dot, class Pack, class Finish>
void for_tile_blocks(int64_t m, int64_t panels, int64_t depth, const Pack& pack, const int32_t* b,
                     int64_t panel_size, const Finish& finish) {
  alignas(64) int32_t rows_of_a[kBlock * kTileDepth + kTile];
  alignas(64) int32_t sums[kStripPanels / 2][kBlock * kBlock];
  alignas(64) int32_t rests[kStripPanels * kTileGroups];
  const int64_t rest = depth % kTile;
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
    for (int64_t i = 0; i < m; i += kBlock) {
      const int64_t rows = min_of(kBlock, m - i);
      for (int64_t p = 0; p == 0 || p < depth; p += kTileDepth) {  // sums over no depth are sums, too
        const int64_t count = min_of(kTileDepth, depth - p), a_row = round_up(count, kTile);
        pack(i, rows, p, count, rows_of_a, a_row);
        asm volatile("" : : : "memory");  // GCC does not know that a tile's load reads memory
        for (int64_t panel = strip; panel < strip_end; panel += 2) {
          // Sums that one pass makes need not be kept apart.
          int32_t* const to = sums[depth > kTileDepth ? (panel - strip) / 2 : 0];
          const int64_t vectors = min_of(2, strip_end - panel);
          const auto run = [&]<int64_t kRows, int64_t kPanels>() {
            tile_block<Dot, kRows, kPanels>(
                count / kTile, rows_of_a, a_row, b + (panel * panel_size + p) * kTile, panel_size * kTile,
                count % kTile > 0 ? rests + (panel - strip) * kTileGroups : nullptr,
                /*add=*/p > 0, to);
          };
          if (rows > kTile) {
            vectors == 2 ? run.template operator()<2, 2>() : run.template operator()<2, 1>();
          } else {
            vectors == 2 ? run.template operator()<1, 2>() : run.template operator()<1, 1>();
          }
          if (p + count == depth) finish(i, panel, rows, vectors, to);
        }
      }
    }
  }
}

}  // namespace
}  // namespace flashlm::kernels
#endif

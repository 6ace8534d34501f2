// SPDX-License-Identifier: Apache-2.0
// The inner loop of the products whose operands are narrower than their sums: bytes in fours (bit_linear) and
// bfloat16 in twos (gemm_bf16). Either way a 32-bit lane is one group along the depth, and one instruction
// multiplies the groups of two vectors and adds them up, lane by lane.
#pragma once

#include "ops/kernels/vec.h"

namespace flashlm::kernels {
namespace {

/// Bytes of a group.
constexpr int64_t kGroupBytes = 4;

/// Where a tile's rows lie: group p of row i is the 4 bytes at `first` + 4 * (i * row + p * column).
struct DotRows {
  const void* first;
  int64_t row, column;
};

/// sum(i, c) = dot(sum(i, c), panel c's vector p, row i's group p), for p = 0 .. depth - 1 in turn. A panel
/// holds one vector for each p; panels follow each other at `panel_size` vectors. Nothing need be aligned.
template <int64_t kTileRows, int64_t kTilePanels, class Sum, class Dot>
inline void dot_tile(int64_t depth, DotRows rows, const void* panels, int64_t panel_size,
                     Sum (&sum)[kTileRows][kTilePanels], const Dot& dot) {
  const char* row_bytes = static_cast<const char*>(rows.first);
  const char* panel_bytes = static_cast<const char*>(panels);
  for (int64_t p = 0; p < depth; ++p) {
    Vec<int32_t> w[kTilePanels];
#pragma GCC unroll 8
    for (int64_t c = 0; c < kTilePanels; ++c) {
      memcpy(&w[c], panel_bytes + (c * panel_size + p) * kVectorBytes, kVectorBytes);
    }
#pragma GCC unroll 16
    for (int64_t i = 0; i < kTileRows; ++i) {
      int32_t group;
      memcpy(&group, row_bytes + (i * rows.row + p * rows.column) * kGroupBytes, sizeof group);
      const Vec<int32_t> a = broadcast(group);
#pragma GCC unroll 8
      for (int64_t c = 0; c < kTilePanels; ++c) sum[i][c] = dot(sum[i][c], w[c], a);
    }
  }
}

template <int64_t kTileRows, int64_t kTilePanels, class Tile>
void for_rows_of_tiles(int64_t i, int64_t m, int64_t panel, const Tile& tile) {
  for (; m - i >= kTileRows; i += kTileRows) tile.template operator()<kTileRows, kTilePanels>(i, panel);
  if constexpr (kTileRows > 1) for_rows_of_tiles<kTileRows / 2, kTilePanels>(i, m, panel, tile);
}

template <int64_t kTileRows, int64_t kTilePanels, class Tile>
void for_last_panels(int64_t m, int64_t panel, int64_t panels, const Tile& tile) {
  if constexpr (kTilePanels > 1) {
    if (panels - panel < kTilePanels) {
      return for_last_panels<kTileRows, kTilePanels - 1>(m, panel, panels, tile);
    }
  }
  for_rows_of_tiles<kTileRows, kTilePanels>(0, m, panel, tile);
}

/// tile.operator()<rows, panels>(first row, first panel) for tiles that cover m rows and some panels: of the
/// size given and, for what is left, of fewer panels and of half the rows again and again. All rows of a
/// column of tiles come before the next column.
template <int64_t kTileRows, int64_t kTilePanels, class Tile>
void for_dot_tiles(int64_t m, int64_t panels, const Tile& tile) {
  for (int64_t panel = 0; panel < panels; panel += kTilePanels) {
    for_last_panels<kTileRows, kTilePanels>(m, panel, panels, tile);
  }
}

}  // namespace
}  // namespace flashlm::kernels

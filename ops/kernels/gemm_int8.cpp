// SPDX-License-Identifier: Apache-2.0
// C = diag(scale) Aᵀ·B of int8 operands with int32 sums, for levels with dot4: the weight's gradient, where A
// is the output's gradient, quantized here column by column, and B the int8 rows of the forward pass. Four
// neighbours along the depth make a group, a 32-bit lane.
#include "ops/kernels/amx.h"
#include "ops/kernels/dot4.h"
#include "ops/kernels/dot_tile.h"
#include "ops/kernels/families.h"
#include "ops/kernels/vec.h"

namespace flashlm::kernels::FLASHLM_ISA {
namespace {

constexpr int64_t kPanel = kLanes<float>;
constexpr int64_t kGroup = 4;
// Registers: 8 * 3 sums + 3 of B + 1 of A = 28 of 32; 4 * 4 + 4 + 1 where a strip has only four rows; 4 * 2 +
// 2 + 1 of 16.
constexpr int64_t kTileRows = kRegisters == 32 && kPanel >= 8 ? 8 : 4;
constexpr int64_t kTilePanels = kRegisters == 16 ? 2 : kTileRows == 8 ? 3 : 4;
static_assert(kPanel % kTileRows == 0, "a tile stays within one strip of A");
// Where dot4 reads its first operand as unsigned, which tiles do not, A is stored as a + 128, and a panel of
// B begins with what that adds to its sums, negated. The int32 sums hold a depth of 2^31 / (255 * 128) =
// 65,793 at least.
#if defined(__AMX_TILE__)
constexpr int32_t kBias = 0;
#else
constexpr int32_t kBias = kDot4Unsigned ? 128 : 0;
#endif

inline int64_t groups_of(int64_t depth) { return (depth + kGroup - 1) / kGroup; }

void pack(int64_t depth, int64_t n, const int8_t* b, int64_t b_row, int32_t* packed) {
  const int64_t groups = groups_of(depth);
  for (int64_t j = 0; j < n; j += kPanel, packed += (groups + 1) * kPanel) {
    Vec<int32_t> sum = {};
    for (int64_t g = 0; g < groups; ++g) {
      Vec<int32_t> group = {};
      for (int64_t i = 0; i < min_of(kGroup, depth - g * kGroup); ++i) {
        group |= load_bytes(b + (g * kGroup + i) * b_row + j, n - j) << static_cast<int32_t>(8 * i);
      }
      store(packed + (g + 1) * kPanel, group);
      sum = dot4(sum, broadcast<int32_t>(0x01010101), group);
    }
    store(packed, -kBias * sum);
  }
}

// ---- A, quantized by columns: s = 127 / max|a|, q = round(s a), ties to even ----

// Vectors of columns at a time: a row's part is then some whole cache lines.
constexpr int64_t kColumnVectors = 8;

void quantize_columns(int64_t depth, int64_t m, const float* a, int64_t a_row, const float* factor,
                      int32_t* strips, float* scale) {
  const int64_t groups = groups_of(depth);
  const float kRound = 12582912.0f;  // 1.5 * 2^23: adding it leaves round(x) in the low bits
  for (int64_t j = 0; j < m; j += kColumnVectors * kPanel) {
    const int64_t vectors = min_of(kColumnVectors, (m - j + kPanel - 1) / kPanel);
    const auto value = [&](int64_t row, int64_t v) {
      const int64_t column = j + v * kPanel;
      return load_up_to(a + row * a_row + column, m - column) * factor[row];
    };
    // Without the sign, floats order as the integers with their bits do, NaN last.
    Vec<int32_t> most[kColumnVectors] = {};
    for (int64_t row = 0; row < depth; ++row) {
      for (int64_t v = 0; v < vectors; ++v) {
        most[v] = vec_max<int32_t>(most[v], (Vec<int32_t>)value(row, v) & 0x7fffffff);
      }
    }
    Vec<float> to_int8[kColumnVectors];
    for (int64_t v = 0; v < vectors; ++v) {
      const Vec<float> top = (Vec<float>)most[v];
      for (int64_t lane = 0; lane < kPanel; ++lane) {
        // A column without a gradient worth a float's inverse is zero; a broken one stays broken.
        const bool finite = __builtin_isfinite(top[lane]);
        to_int8[v][lane] = finite && top[lane] > 1e-35f ? 127 / top[lane] : 0;
        const int64_t column = j + v * kPanel + lane;
        if (column < m) scale[column] = finite ? top[lane] / 127 : __builtin_nanf("");
      }
    }
    for (int64_t g = 0; g < groups; ++g) {
      const int64_t rows = min_of(kGroup, depth - g * kGroup);
      for (int64_t v = 0; v < vectors; ++v) {
        Vec<int32_t> group = {};
        for (int64_t i = 0; i < rows; ++i) {
          const Vec<float> rounded = value(g * kGroup + i, v) * to_int8[v] + kRound;
          group |= ((Vec<int32_t>)rounded & 0xff) << static_cast<int32_t>(8 * i);
        }
        if (kBias != 0) group ^= static_cast<int32_t>(0x80808080u);
        store(strips + ((j / kPanel + v) * groups + g) * kPanel, group);
      }
    }
  }
}

/// c = (c +) scale * sum, of up to kPanel columns.
inline void store_product(float* c, Vec<int32_t> sum, float scale, int64_t n, bool add) {
  const Vec<float> before = add ? load_up_to(c, n) : Vec<float>{};
  store_up_to<float>(c, before + __builtin_convertvector(sum, Vec<float>) * scale, n);
}

#if defined(__AMX_TILE__)
void gemm(int64_t m, int64_t n, int64_t depth, const int32_t* strips, const float* scale,
          const int32_t* packed, float* c, int64_t c_row, bool accumulate) {
  const int64_t groups = groups_of(depth), panel_size = groups + 1;
  tile_gemm<SignedTimesSigned>(
      {c, m, n, c_row, accumulate}, groups,
      [=](int64_t i, int64_t rows, int64_t p, int64_t count, int32_t* buffer) {
        return pack_tiles({strips, 1, kPanel, groups * kPanel}, i, rows, p, count, buffer);
      },
      packed + kPanel, panel_size,
      [=](int64_t i) {
        const float factor = scale[i];
        return [=](Vec<int32_t> sums) { return __builtin_convertvector(sums, Vec<float>) * factor; };
      });
}
#else
void gemm(int64_t m, int64_t n, int64_t depth, const int32_t* strips, const float* scale,
          const int32_t* packed, float* c, int64_t c_row, bool accumulate) {
  const int64_t groups = groups_of(depth), panel_size = groups + 1;
  for_dot_tiles<kTileRows, kTilePanels>(
      m, (n + kPanel - 1) / kPanel, [&]<int64_t rows, int64_t panels>(int64_t i, int64_t panel) {
        const int32_t* first = packed + panel * panel_size * kPanel;
        Vec<int32_t> sum[rows][panels];
#pragma GCC unroll 8
        for (int64_t r = 0; r < rows; ++r) {
#pragma GCC unroll 4
          for (int64_t v = 0; v < panels; ++v) sum[r][v] = load(first + v * panel_size * kPanel);
        }
        dot_tile(groups, {strips + i / kPanel * groups * kPanel + i % kPanel, 1, kPanel}, first + kPanel,
                 panel_size, sum, [](auto s, auto w, auto a) { return dot4(s, a, w); });
#pragma GCC unroll 8
        for (int64_t r = 0; r < rows; ++r) {
#pragma GCC unroll 4
          for (int64_t v = 0; v < panels; ++v) {
            const int64_t column = (panel + v) * kPanel;
            store_product(c + (i + r) * c_row + column, sum[r][v], scale[i + r], n - column, accumulate);
          }
        }
      });
}
#endif

}  // namespace

template <class T>
void add_gemm_int8(Table<T>& table) {
  if constexpr (kHasDot4 && sizeof(T) == sizeof(float)) {
    table.int8_panel = kPanel;
    table.int8_pack = pack;
    table.int8_quantize_columns = quantize_columns;
    table.gemm_int8 = gemm;
  }
}
template void add_gemm_int8(Table<float>&);
template void add_gemm_int8(Table<double>&);

}  // namespace flashlm::kernels::FLASHLM_ISA

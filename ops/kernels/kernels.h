// SPDX-License-Identifier: Apache-2.0
// The CPU kernels: standard C++ on raw pointers, with no Torch, no threads and no allocation. Each source
// here is compiled once per ISA level into its own table of function pointers, and table<T>() returns the one
// to use.
//
// All matrices are row-major and contiguous unless a stride is given. Counts are int64_t. T is float or
// double; double runs the same code and exists for gradient checks.
#pragma once

#include <cstdint>

namespace flashlm::kernels {

/// The two weight quantizers; see ops/bit_linear.h for their formulas.
enum class Quantizer { kAbsmean, kThreshold };

/// One group's correlation over time on channels-last rows, over the taps k of first .. last - 1:
///   y[t, o] = sum over k and c of x[t + (k - first) * dilation, c] * w[k, c, o],
/// with x (rows + (last - 1 - first) * dilation, in) and y (rows, out). All taps take part unless some would
/// meet nothing but zeros.
struct Conv1d {
  int64_t in, out, taps, dilation;
  int64_t first = 0, last = taps;
};

/// Bytes of a row of k int8 values: whole lines of the cache, so that AMX's tiles can read rows where they
/// are. Rows, and packed weights, are read fastest from an address that is a multiple of 64.
constexpr int64_t quantized_width(int64_t k) { return (k + 63) / 64 * 64; }

/// Pairs of bfloat16, neighbours along the depth, lower half first: pair p of row i is
/// first[i / bf16_panel * strip + i % bf16_panel * row + p * column].
struct PairRows {
  const int32_t* first;
  int64_t row, column, strip;
};

/// Outputs in one panel of 2-bit weights; see "Packed ternary weights" in docs/formats.md.
constexpr int64_t kPackedOutputs = 64;

/// The constants of one step of AdamW, and what a row is owed for the steps that it missed; see ops/adamw.h.
template <class T>
struct AdamWStep {
  T keep, beta1, beta2, rate, root, eps;
};
template <class T>
struct AdamWOwed {
  T keep, tail, beta1, beta2, eps;
};

/// Time steps of mlgru, of some channels of a sequence: f(t, i) = f[t * row + i], for t in 0 .. rows - 1 and
/// i in 0 .. width - 1; c, h and all gradients alike. With lower_bound (width), f and c are still without
/// their activations (activation = "silu" in ops/mlgru.h); null: they are used as they are.
template <class T>
struct MlgruRows {
  int64_t rows, width, row;
  const T *f, *c, *lower_bound;
};

/// A gated linear unit, y = a(gate) * up, elementwise over n values. In backward grad_gate = a'(gate) * up *
/// grad_y and grad_up = a(gate) * grad_y are written.
template <class T>
struct Glu {
  void (*forward)(int64_t n, const T* gate, const T* up, T* y);
  void (*backward)(int64_t n, const T* grad_y, const T* gate, const T* up, T* grad_gate, T* grad_up);
};

template <class T>
struct Table {
  // ---- adamw: in place on w, m, v; g, w, m and v do not overlap. The same bits on every level ----

  /// m = beta1 m + (1 - beta1) g; v = beta2 v + (1 - beta2) g^2; w = keep w - rate m / (sqrt(v) root + eps).
  void (*adamw)(int64_t n, const AdamWStep<T>& step, const T* g, T* w, T* m, T* v);

  /// w = keep w - tail m / (sqrt(v) + eps); then m = beta1 m; v = beta2 v.
  void (*adamw_owed)(int64_t n, const AdamWOwed<T>& owed, T* w, T* m, T* v);

  /// Whether x is 0 or -0 throughout.
  bool (*all_zero)(int64_t n, const T* x);

  // ---- bit_linear: ternary weights Q in {-1, 0, 1}, int8 rows; formulas in ops/bit_linear.h ----

  /// sum |w|. In double and in a fixed order: the same value on every level.
  double (*abs_sum)(int64_t n, const T* w);

  /// A hash of the bytes, at the speed of reading them: any change within one 32-bit word changes it, changes
  /// in several go unseen with a chance of 2^-32 or less. Differs between levels.
  uint64_t (*fingerprint)(int64_t bytes, const void* data);

  /// codes = 1 where w > bound, -1 where w < -bound, else 0.
  void (*ternary_codes)(int64_t n, const T* w, T bound, int8_t* codes);

  /// Rows of x (rows, k) to int8: s = 127 / max(max|x|, smallest), q = round(s x), ties to even, in
  /// [-127, 127]. q (rows, quantized_width(k)) is padded with zeros; inverse_scale (rows) = 1 / s; row_sum
  /// (rows) = sum of q. A row with an infinity or a NaN gets q = 0 and inverse_scale = NaN.
  void (*quantize_rows)(int64_t rows, int64_t k, const T* x, T smallest, int8_t* q, T* inverse_scale,
                        int32_t* row_sum);

  /// a (rows, k) = q * inverse_scale.
  void (*dequantize_rows)(int64_t rows, int64_t k, const int8_t* q, const T* inverse_scale, T* a);

  /// Outputs in one packed panel of codes.
  int64_t ternary_panel;

  /// Packs codes (n, k) into panels of ternary_panel outputs. `packed` holds round_up(n, ternary_panel) *
  /// round_up(k, 4) bytes, and panels follow each other: they can be packed one by one.
  void (*ternary_pack)(int64_t n, int64_t k, const int8_t* codes, uint8_t* packed);

  /// The same from codes (k, n), row p at codes + p * codes_row.
  void (*ternary_pack_transposed)(int64_t n, int64_t k, const int8_t* codes, int64_t codes_row,
                                  uint8_t* packed);

  /// y(i, j) = y[i * y_row + j] = gamma * inverse_scale[i] * sum over p of q(i, p) codes(j, p), for m rows as
  /// quantize_rows leaves them (any q in [-128, 127]) and n outputs. The sum is exact for k < 2^24.
  void (*ternary_gemm)(int64_t m, int64_t n, int64_t k, const int8_t* q, const int32_t* row_sum,
                       const T* inverse_scale, const uint8_t* packed, T gamma, T* y, int64_t y_row);
  // ---- cross_entropy: on a block z (rows, cols) of logits, row r at z + r * z_row ----

  /// Takes the block into each row's running max of z, sum_exp = sum of e^(z - max), and sum_z. They start as
  /// the lowest finite value, 0 and 0.
  void (*cross_entropy)(int64_t rows, int64_t cols, const T* z, int64_t z_row, T* max, T* sum_exp, T* sum_z);

  /// z becomes factor * e^(z - lse) - shift, with lse, factor and shift (rows).
  void (*cross_entropy_backward)(int64_t rows, int64_t cols, T* z, int64_t z_row, const T* lse,
                                 const T* factor, const T* shift);

  /// cross_entropy, and what it sums, rounded to bfloat16: kept[r * kept_row + i] = e^(z - max) with max as
  /// it is after the block. Like gemm_bf16 only of Table<float>, where bf16_panel is not 0, or else null.
  void (*cross_entropy_bf16)(int64_t rows, int64_t cols, const T* z, int64_t z_row, T* max, T* sum_exp,
                             T* sum_z, uint16_t* kept, int64_t kept_row);

  /// cross_entropy_backward from what was kept: grad_z = factor * e^(max - lse) * kept - shift.
  void (*cross_entropy_bf16_backward)(int64_t rows, int64_t cols, const uint16_t* kept, int64_t kept_row,
                                      const T* max, const T* lse, const T* factor, const T* shift, T* grad_z,
                                      int64_t z_row);

  // ---- causal_conv1d: see Conv1d; x(t, c) = x[t * x_row + c], and so on ----

  /// y is written. `packed`: w (taps * in, out) packed by gemm_pack.
  void (*causal_conv1d)(const Conv1d& conv, int64_t rows, const T* x, int64_t x_row, const T* packed, T* y,
                        int64_t y_row);

  /// The same with x and w in pairs of bfloat16 along the channels, of which conv.in counts the pairs, and
  /// sums in float32. `packed`: w (taps * 2 conv.in, out) packed by bf16_pack. Null where bf16_panel is 0.
  void (*causal_conv1d_bf16)(const Conv1d& conv, int64_t rows, const int32_t* x, int64_t x_row,
                             const int32_t* packed, T* y, int64_t y_row);

  /// One tap's gradient: grad (in, out) += the sum over rows of x(t, c) * grad_y(t, o).
  void (*causal_conv1d_backward_weight)(int64_t in, int64_t out, int64_t rows, const T* x, int64_t x_row,
                                        const T* grad_y, int64_t y_row, T* grad);

  // ---- gated_conv: y = x + sigmoid(gate) * value, over one group; convs (rows, [gate, value], width) ----

  /// y's rows lie like x's.
  void (*gated_conv)(int64_t rows, int64_t width, const T* x, int64_t x_row, const T* convs, T* y);

  /// Overwrites convs with its gradient.
  void (*gated_conv_backward)(int64_t rows, int64_t width, const T* grad_y, int64_t grad_y_row, T* convs);

  /// gated_conv that also writes the slopes (rows, [dy/dgate, dy/dvalue], width) in bfloat16; and the
  /// gradient of convs made of them, grad_y * slopes, in bfloat16 too. Null where bf16_panel is 0.
  void (*gated_conv_slopes)(int64_t rows, int64_t width, const T* x, int64_t x_row, const T* convs, T* y,
                            uint16_t* slopes);
  void (*gated_conv_backward_slopes)(int64_t rows, int64_t width, const T* grad_y, int64_t grad_y_row,
                                     const uint16_t* slopes, uint16_t* grad);

  // ---- gemm: C = A·B, or C += A·B, single-threaded on packed B ----

  /// Columns in one packed panel of B.
  int64_t gemm_panel;

  /// Packs B (k, n), B(i, j) = b[i * row_stride + j * col_stride], into panels of gemm_panel columns, the
  /// last one filled up with zeros. `packed` holds k * round_up(n, gemm_panel) elements.
  void (*gemm_pack)(int64_t k, int64_t n, const T* b, int64_t row_stride, int64_t col_stride, T* packed);

  /// C (m, n) = A·B (+ C if accumulate); A(i, p) = a[i * a_row + p * a_col], C(i, j) = c[i * c_row + j].
  void (*gemm)(int64_t m, int64_t n, int64_t k, const T* a, int64_t a_row, int64_t a_col, const T* packed,
               T* c, int64_t c_row, bool accumulate);

  // ---- gemm_bf16: C = alpha A·B, or C += alpha A·B, operands rounded to bfloat16, sums in float32. Only of
  // Table<float>, and only where the CPU has such a product: elsewhere bf16_panel is 0, the functions null
  // ----

  /// Columns in one packed panel of B, rows in one strip of A.
  int64_t bf16_panel;

  /// A row-major, row = (k + 1) / 2: x (rows, k), row r at x + r * x_row, paired along each row.
  void (*bf16_pack_rows)(int64_t rows, int64_t k, const T* x, int64_t x_row, int32_t* pairs);

  /// B (depth, n), row p at b + p * b_row, times factor[p] (all 1 if null), into panels of bf16_panel
  /// columns, the last one filled up with zeros; or Aᵀ into strips: row = 1, column = bf16_panel, strip =
  /// bf16_panel * (depth + 1) / 2. `packed` holds (depth + 1) / 2 * round_up(n, bf16_panel) pairs.
  void (*bf16_pack)(int64_t depth, int64_t n, const T* b, int64_t b_row, const T* factor, int32_t* packed);

  /// The same from Bᵀ: column j of B at b + j * b_column, without factors.
  void (*bf16_pack_columns)(int64_t depth, int64_t n, const T* b, int64_t b_column, int32_t* packed);

  /// bf16_pack from int8, which bfloat16 holds exactly.
  void (*bf16_pack_int8)(int64_t depth, int64_t n, const int8_t* b, int64_t b_row, int32_t* packed);

  /// bf16_pack's layout of two matrices (pairs, n), row p at p * row, that hold the pairs' first and second
  /// halves: of float32, or in bfloat16 already.
  void (*bf16_zip)(int64_t pairs, int64_t n, const T* first, const T* second, int64_t row, int32_t* packed);
  void (*bf16_zip_rounded)(int64_t pairs, int64_t n, const uint16_t* first, const uint16_t* second,
                           int64_t row, int32_t* packed);

  /// C (m, n), C(i, j) = c[i * c_row + j]. `packed` as bf16_pack leaves it.
  void (*gemm_bf16)(int64_t m, int64_t n, int64_t depth, PairRows a, const int32_t* packed, T alpha, T* c,
                    int64_t c_row, bool accumulate);

  /// C = Aᵀ·B, or C += Aᵀ·B, for float32 A in three parts that are multiplied without rounding. bf16x3_pack:
  /// A (depth, m), row p at a + p * a_row, times factor[p], to strips of 3 (depth + 1) / 2 * round_up(m,
  /// bf16_panel) pairs. A column that is not finite makes its row of C NaN. Null but with AMX.
  void (*bf16x3_pack)(int64_t depth, int64_t m, const T* a, int64_t a_row, const T* factor, int32_t* strips);
  void (*gemm_bf16x3)(int64_t m, int64_t n, int64_t depth, const int32_t* strips, const int32_t* packed, T* c,
                      int64_t c_row, bool accumulate);

  // ---- gemm_int8: C = diag(scale) Aᵀ·B, or C += that, int8 operands, int32 sums. Only of Table<float>, and
  // only where the CPU has dot products of bytes: elsewhere int8_panel is 0, the functions null ----

  /// Columns in one packed panel of B, and of A in one strip.
  int64_t int8_panel;

  /// B (depth, n), row p at b + p * b_row; depth <= 65,536. `packed` holds (ceil(depth / 4) + 1) *
  /// round_up(n, int8_panel) elements.
  void (*int8_pack)(int64_t depth, int64_t n, const int8_t* b, int64_t b_row, int32_t* packed);

  /// A (depth, m), row p at a + p * a_row, times factor[p], each column to int8 at a scale of its own: q =
  /// round(127 a / max|a|), scale[i] = max|a| / 127, NaN for a column that is not finite. `strips` holds
  /// ceil(depth / 4) * round_up(m, int8_panel) elements.
  void (*int8_quantize_columns)(int64_t depth, int64_t m, const T* a, int64_t a_row, const T* factor,
                                int32_t* strips, T* scale);

  /// C (m, n), C(i, j) = c[i * c_row + j].
  void (*gemm_int8)(int64_t m, int64_t n, int64_t depth, const int32_t* strips, const T* scale,
                    const int32_t* packed, T* c, int64_t c_row, bool accumulate);

  // ---- mlgru: h_t = f_t h_{t-1} + (1 - f_t) c_t; see ops/mlgru.h. The same bits on every level ----

  /// h is written; before (width) is the h that precedes row 0.
  void (*mlgru)(const MlgruRows<T>& x, const T* before, T* h);

  /// Backward, from the last row to the first. carry (width): in, the gradient of the last h from what comes
  /// after these rows; out, that of `before`. grad_f and grad_c are written; grad_lower_bound (width) is
  /// added to, and may be null where there is no lower_bound.
  void (*mlgru_backward)(const MlgruRows<T>& x, const T* before, const T* h, const T* grad_h, T* carry,
                         T* grad_f, T* grad_c, T* grad_lower_bound);

  /// What either does to the rows' two ends: h of the last row = product * before + end, and carry out =
  /// product * carry in + carry. All (width); product comes as ones, end and carry as zeros.
  void (*mlgru_end)(const MlgruRows<T>& x, T* product, T* end);
  void (*mlgru_backward_end)(const MlgruRows<T>& x, const T* grad_h, T* product, T* carry);

  // ---- rms_norm: y = x * rstd * scale, rstd = 1 / sqrt(mean(x^2) + eps) ----

  /// x, y (rows, width); scale (width).
  void (*rms_norm)(int64_t rows, int64_t width, const T* x, const T* scale, T eps, T* y);

  /// grad_x (rows, width) is written; grad_scale (width) is added to.
  void (*rms_norm_backward)(int64_t rows, int64_t width, const T* grad_y, const T* x, const T* scale, T eps,
                            T* grad_x, T* grad_scale);

  /// The same, plus residual (rows, width), unless null. grad_x may be grad_y.
  void (*rms_norm_residual_backward)(int64_t rows, int64_t width, const T* grad_y, const T* x, const T* scale,
                                     T eps, const T* residual, T* grad_x, T* grad_scale);

  /// rms_norm in two parts, for callers that take some columns at a time: rstd (rows), then
  /// y (rows, width) = x[r * x_row + i] * rstd[r] * scale[i].
  void (*inverse_rms)(int64_t rows, int64_t width, const T* x, T eps, T* rstd);
  void (*scale_rows)(int64_t rows, int64_t width, const T* x, int64_t x_row, const T* rstd, const T* scale,
                     T* y);

  /// The same in pairs of bfloat16: y (rows, (width + 1) / 2), the last half of an odd row zero. Null where
  /// bf16_panel is 0.
  void (*scale_rows_bf16)(int64_t rows, int64_t width, const T* x, int64_t x_row, const T* rstd,
                          const T* scale, int32_t* y);

  // ---- rows ----

  /// Row index[r] of `to` = row r of from (rows, width), past the caches where the CPU has such stores: for
  /// what is too large to be found there again.
  void (*stream_rows)(int64_t rows, int64_t width, const T* from, const int64_t* index, T* to);

  /// To bfloat16, rounded to nearest, ties to even, and back. Only of Table<float>.
  void (*to_bf16)(int64_t n, const T* x, uint16_t* y);
  void (*from_bf16)(int64_t n, const uint16_t* x, T* y);

  // ---- packed_linear: ternary weights in 2 bits; layout in docs/formats.md ----

  /// Packs codes (n, k). `packed` holds ceil(n / kPackedOutputs) panels of ceil(k / 4) * kPackedOutputs
  /// bytes, which follow each other and can be packed one by one. What lies outside (n, k) is the code of Q =
  /// 0.
  void (*packed_pack)(int64_t n, int64_t k, const int8_t* codes, uint8_t* packed);

  /// w (n, k) = gamma * Q.
  void (*packed_unpack)(int64_t n, int64_t k, const uint8_t* packed, T gamma, T* w);

  /// As ternary_gemm, with the same bits for the same codes.
  void (*packed_gemm)(int64_t m, int64_t n, int64_t k, const int8_t* q, const int32_t* row_sum,
                      const T* inverse_scale, const uint8_t* packed, T gamma, T* y, int64_t y_row);

  // ---- ternary_float: ternary weights times rows of T, no activation rounded: by sums of tables
  // (sum_table.cpp), float32 with AMX in tiles (bf16x3.cpp) ----

  /// Bytes that n x k codes take when packed, and bytes of scratch that a call of ternary_float_gemm needs.
  int64_t (*ternary_float_packed_size)(int64_t n, int64_t k);
  int64_t (*ternary_float_workspace_size)(int64_t n, int64_t k);

  /// Packs Q (n, k), Q(j, p) = codes[j * row_stride + p * col_stride] in {-1, 0, 1}; one of the strides is 1.
  void (*ternary_float_pack)(int64_t n, int64_t k, const int8_t* codes, int64_t row_stride,
                             int64_t col_stride, uint8_t* packed);

  /// y(i, j) = y[i * y_row + j] = gamma * sum over p of x[i * x_row + p] Q(j, p), for m rows; y may not
  /// overlap x. Additions come in an order that (k, Q) alone decide: a row has the same bits whatever rows it
  /// is computed with, and on every level, but for float32 in tiles, where an output has 3 k additions, of
  /// which parts below 2^-126 are left out. A code 0 leaves x out, be it a NaN. Rows are computed some at a
  /// time, for the price of all of them: hand over many.
  void (*ternary_float_gemm)(int64_t m, int64_t n, int64_t k, const T* x, int64_t x_row,
                             const uint8_t* packed, T gamma, T* y, int64_t y_row, void* workspace);

  /// As ternary_gemm, with the same bits, by additions of int16: for rows q in [-127, 127] and codes packed
  /// by ternary_float_pack. Null where ternary_gemm is as fast, and in float64. Rows are computed
  /// kVectorBytes / 2 at a time, for the price of all of them.
  int64_t (*sum_table_int8_workspace_size)(int64_t n, int64_t k);
  void (*sum_table_gemm_int8)(int64_t m, int64_t n, int64_t k, const int8_t* q, const T* inverse_scale,
                              const uint8_t* packed, T gamma, T* y, int64_t y_row, void* workspace);

  // ---- gated linear units; see ops/glu.h. The same bits on every level ----

  Glu<T> relu2_glu, silu_glu, sigmoid_glu;
};

/// The table of the best level this CPU runs, or of the level named by the environment variable FLASHLM_ISA.
/// Throws std::runtime_error in words if FLASHLM_ISA names a level that is unknown or that this CPU lacks.
template <class T>
const Table<T>& table();

/// Every level compiled in, lowest first, for tests and for messages: "baseline", then on x86-64 "avx2",
/// "avxvnni", "avx512" (with VNNI), "avx512bf16", "amx", and on 64-bit ARM "neon" (with dot products).
struct Level {
  const char* name;
  bool (*supported)();
  const Table<float>& (*float_table)();
  const Table<double>& (*double_table)();
};
struct Levels {
  const Level* first;
  int64_t count;
};
Levels levels();

/// Name of the level in use.
const char* isa();

}  // namespace flashlm::kernels

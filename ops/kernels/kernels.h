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

/// A grouped correlation over time on channels-last rows:
///   y[t, g, o] = sum over k and c of x[t + k * dilation, g, c] * w[g, k, c, o],
/// with x (rows + (taps - 1) * dilation, groups, in) and y (rows, groups, out).
struct Conv1d {
  int64_t groups, in, out, taps, dilation;
};

/// The constants of one step of AdamW, and what a row is owed for the steps that it missed; see ops/adamw.h.
template <class T>
struct AdamWStep {
  T keep, beta1, beta2, rate, root, eps;
};
template <class T>
struct AdamWOwed {
  T keep, tail, beta1, beta2, eps;
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

  /// codes = 1 where w > bound, -1 where w < -bound, else 0.
  void (*ternary_codes)(int64_t n, const T* w, T bound, int8_t* codes);

  /// q = gamma * code; q may be w.
  void (*ternary_values)(int64_t n, const T* w, T bound, T gamma, T* q);

  /// Rows of x (rows, k) to int8: s = 127 / max(max|x|, 1e-5), q = round(s x), ties to even, in
  /// [-127, 127]. q (rows, round_up(k, 4)) is padded with zeros; inverse_scale (rows) = 1 / s; row_sum (rows)
  /// = sum of q. A row with an infinity or a NaN gets q = 0 and inverse_scale = NaN.
  void (*quantize_rows)(int64_t rows, int64_t k, const T* x, int8_t* q, T* inverse_scale, int32_t* row_sum);

  /// a (rows, k) = q * inverse_scale.
  void (*dequantize_rows)(int64_t rows, int64_t k, const int8_t* q, const T* inverse_scale, T* a);

  /// Outputs in one packed panel of codes.
  int64_t ternary_panel;

  /// Packs codes (n, k) into panels of ternary_panel outputs. `packed` holds round_up(n, ternary_panel) *
  /// round_up(k, 4) bytes, and panels follow each other: they can be packed one by one.
  void (*ternary_pack)(int64_t n, int64_t k, const int8_t* codes, uint8_t* packed);

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
  // ---- causal_conv1d: see Conv1d ----

  /// y is written. `packed`: for each group, w (taps * in, out) packed by gemm_pack.
  void (*causal_conv1d)(const Conv1d& conv, int64_t rows, const T* x, const T* packed, T* y);

  /// Adds to grad (groups, taps, in, out), w's gradient, in one group and gemm_panel columns from `column`.
  void (*causal_conv1d_backward_weight)(const Conv1d& conv, int64_t group, int64_t column, int64_t rows,
                                        const T* x, const T* grad_y, T* grad);

  // ---- gated_conv: y = x + sigmoid(gate) * value; x, y (n, width), convs (n, [gate, value], width) ----

  void (*gated_conv)(int64_t n, int64_t width, const T* x, const T* convs, T* y);

  /// Overwrites convs with its gradient.
  void (*gated_conv_backward)(int64_t n, int64_t width, const T* grad_y, T* convs);

  // ---- gemm: C = A·B, or C += A·B, single-threaded on packed B ----

  /// Columns in one packed panel of B.
  int64_t gemm_panel;

  /// Packs B (k, n), B(i, j) = b[i * row_stride + j * col_stride], into panels of gemm_panel columns, the
  /// last one filled up with zeros. `packed` holds k * round_up(n, gemm_panel) elements.
  void (*gemm_pack)(int64_t k, int64_t n, const T* b, int64_t row_stride, int64_t col_stride, T* packed);

  /// C (m, n) = A·B (+ C if accumulate); A(i, p) = a[i * a_row + p * a_col], C(i, j) = c[i * c_row + j].
  void (*gemm)(int64_t m, int64_t n, int64_t k, const T* a, int64_t a_row, int64_t a_col, const T* packed,
               T* c, int64_t c_row, bool accumulate);

  // ---- rms_norm: y = x * rstd * scale, rstd = 1 / sqrt(mean(x^2) + eps) ----

  /// x, y (rows, width); scale (width).
  void (*rms_norm)(int64_t rows, int64_t width, const T* x, const T* scale, T eps, T* y);

  /// grad_x (rows, width) is written; grad_scale (width) is added to.
  void (*rms_norm_backward)(int64_t rows, int64_t width, const T* grad_y, const T* x, const T* scale, T eps,
                            T* grad_x, T* grad_scale);

  // ---- relu2_glu: y = max(gate, 0)^2 * up, elementwise over n values ----

  void (*relu2_glu)(int64_t n, const T* gate, const T* up, T* y);
  void (*relu2_glu_backward)(int64_t n, const T* grad_y, const T* gate, const T* up, T* grad_gate,
                             T* grad_up);
};

/// The table of the best level this CPU runs, or of the level named by the environment variable FLASHLM_ISA.
/// Throws std::runtime_error in words if FLASHLM_ISA names a level that is unknown or that this CPU lacks.
template <class T>
const Table<T>& table();

/// Every level compiled in, lowest first, for tests and for messages: "baseline", "avx2", "avxvnni", "avx512"
/// (with VNNI), "avx512bf16".
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

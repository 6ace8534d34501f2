// SPDX-License-Identifier: Apache-2.0
// What a person sees while a model trains: one line that is rewritten in place on a terminal, and plain
// lines, now and then, anywhere else (a file, a pipe, a CI log).
#pragma once

#include <cstdint>
#include <cstdio>
#include <optional>
#include <string>

namespace flashlm {

/// 3 significant digits and a suffix: 950, 1.23k, 12.3k, 4.50M. "-" if the value is not finite.
std::string format_count(double value);

/// 7 -> "0:07", 83 -> "1:23", 3723 -> "1:02:03". "-:--" if the value is negative or not finite.
std::string format_duration(double seconds);

/// One reading of a run. Losses are in nats per token; what is not known yet stays empty.
struct Progress {
  double fraction = 0;  // done, in [0, 1]
  int64_t step = 0;
  double loss = 0;
  std::optional<double> val_loss = {};
  std::optional<double> bits_per_byte = {};
  double tokens_per_s = 0;
  double elapsed_s = 0;  // since this process began to train
  double eta_s = 0;
};

/// How a line may look. style_of() finds out for a stream.
struct ProgressStyle {
  bool terminal = false;  // rewrite one line in place
  bool colour = false;    // ANSI colours: only on a terminal, never if NO_COLOR is set to anything but ""
  bool unicode = false;   // block characters in the bar
  int width = 80;         // columns
};
ProgressStyle style_of(std::FILE* out);

/// The line for a terminal: a bar, percent, step, loss, val loss, bits/byte, tokens/s and time left, in width
/// - 1 columns at most (a full last column would wrap). Where they are too few, the bar shrinks, then fields
/// go.
std::string progress_line(const Progress& progress, const ProgressStyle& style);

/// The same without a bar, for a file: "step 1200  12%  loss 5.123  val 5.145  1.672 bits/byte  ...".
std::string plain_line(const Progress& progress);

/// Writes progress to a stream. On a terminal at most ten times a second, elsewhere a line every
/// plain_every_s. Not for use from several threads at once.
class ProgressLine {
 public:
  explicit ProgressLine(std::FILE* out = stdout, double plain_every_s = 10);
  ProgressLine(std::FILE* out, const ProgressStyle& style, double plain_every_s);
  /// Leaves the cursor on a line of its own.
  ~ProgressLine();
  ProgressLine(const ProgressLine&) = delete;
  ProgressLine& operator=(const ProgressLine&) = delete;

  void update(const Progress& progress);

  /// Text of one or several lines (a sample, an evaluation) above the bar. Control characters other than line
  /// ends and tabs are left out: text that a model wrote must not steer the terminal.
  void message(const std::string& text);

  /// Shows the last reading, however recent the one before it, and ends the line. Later calls start anew.
  void finish();

 private:
  void draw();

  std::FILE* out_;
  bool follow_width_;  // of a real terminal, which may be resized
  ProgressStyle style_;
  double plain_every_s_;
  std::optional<Progress> last_;  // reading
  std::optional<double> drawn_at_s_;
  bool on_line_ = false;  // the cursor is at the end of a drawn bar
  bool last_drawn_ = true;
};

}  // namespace flashlm

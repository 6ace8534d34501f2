// SPDX-License-Identifier: Apache-2.0
#include "train/progress.h"

#include <sys/ioctl.h>
#include <unistd.h>

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <string_view>
#include <vector>

namespace flashlm {
namespace {

constexpr double kRedrawSeconds = 0.1;
constexpr int kLongestBar = 30;
constexpr int kShortestBar = 6;
constexpr const char* kClearLine = "\r\x1b[K";

template <typename... Args>
std::string format(const char* pattern, Args... args) {
  char buffer[64];
  std::snprintf(buffer, sizeof buffer, pattern, args...);
  return buffer;
}

std::string environment(const char* name) {
  const char* value = std::getenv(name);
  return value ? value : "";
}

int terminal_width(std::FILE* out) {
  winsize size{};
  const bool known = ioctl(fileno(out), TIOCGWINSZ, &size) == 0 && size.ws_col > 0;
  return known ? size.ws_col : 80;
}

/// The locale decides, as POSIX orders its variables; LANG=C or none of them means ASCII.
bool locale_is_utf8() {
  for (const char* name : {"LC_ALL", "LC_CTYPE", "LANG"}) {
    std::string value = environment(name);
    if (value.empty()) continue;
    std::transform(value.begin(), value.end(), value.begin(),
                   [](unsigned char c) { return std::tolower(c); });
    return value.find("utf-8") != std::string::npos || value.find("utf8") != std::string::npos;
  }
  return false;
}

/// A piece of a line; where space is short the ones with the highest rank are left out first.
struct Field {
  std::string text;
  int rank;
};

double within_one(double fraction) { return fraction > 0 ? std::min(fraction, 1.0) : 0; }

std::vector<Field> fields_of(const Progress& progress) {
  std::vector<Field> fields{{format("%.0f%%", std::floor(100 * within_one(progress.fraction))), 0},
                            {format("step %lld", static_cast<long long>(progress.step)), 5},
                            {format("loss %.3f", progress.loss), 1}};
  if (progress.val_loss) fields.push_back({format("val %.3f", *progress.val_loss), 3});
  if (progress.bits_per_byte) fields.push_back({format("%.3f bits/byte", *progress.bits_per_byte), 4});
  fields.push_back({format_count(progress.tokens_per_s) + " tok/s", 6});
  fields.push_back({format_duration(progress.eta_s) + " left", 2});
  return fields;
}

std::string join(const std::vector<Field>& fields, const char* separator) {
  std::string text;
  for (const Field& field : fields) text += (text.empty() ? "" : separator) + field.text;
  return text;
}

std::string repeat(std::string_view text, int times) {
  std::string result;
  for (int i = 0; i < times; ++i) result += text;
  return result;
}

std::string bar(double fraction, int cells, const ProgressStyle& style) {
  const int full = static_cast<int>(std::floor(within_one(fraction) * cells));
  const std::string done = repeat(style.unicode ? "█" : "#", full);
  const std::string left = repeat(style.unicode ? "░" : "-", cells - full);
  return style.colour ? "\x1b[32m" + done + "\x1b[2m" + left + "\x1b[0m" : done + left;
}

std::string printable(std::string text) {
  std::erase_if(text, [](unsigned char c) { return (c < ' ' && c != '\n' && c != '\t') || c == 0x7f; });
  return text;
}

}  // namespace

std::string format_count(double value) {
  if (!std::isfinite(value)) return "-";
  const char* suffixes[] = {"", "k", "M", "G", "T"};
  size_t scale = 0;
  // 999.5 and up round to four digits: they belong to the next suffix.
  while (std::abs(value) >= 999.5 && scale + 1 < std::size(suffixes)) {
    value /= 1000;
    ++scale;
  }
  const int decimals = scale == 0 ? 0 : std::abs(value) < 9.995 ? 2 : std::abs(value) < 99.95 ? 1 : 0;
  return format("%.*f%s", decimals, value, suffixes[scale]);
}

std::string format_duration(double seconds) {
  if (!std::isfinite(seconds) || seconds < 0) return "-:--";
  const auto total = static_cast<long long>(std::min(std::round(seconds), 1e15));
  const long long hours = total / 3600, minutes = total / 60 % 60;
  return hours > 0 ? format("%lld:%02lld:%02lld", hours, minutes, total % 60)
                   : format("%lld:%02lld", minutes, total % 60);
}

ProgressStyle style_of(std::FILE* out) {
  ProgressStyle style;
  style.terminal = isatty(fileno(out)) && environment("TERM") != "dumb";
  style.colour = style.terminal && environment("NO_COLOR").empty();
  style.unicode = style.terminal && locale_is_utf8();
  if (style.terminal) style.width = terminal_width(out);
  return style;
}

std::string progress_line(const Progress& progress, const ProgressStyle& style) {
  const int columns = std::max(0, style.width - 1);
  const auto by_rank = [](const Field& a, const Field& b) { return a.rank < b.rank; };
  std::vector<Field> fields = fields_of(progress);
  for (; !fields.empty(); fields.erase(std::max_element(fields.begin(), fields.end(), by_rank))) {
    for (const char* separator : {"  ", " "}) {
      const std::string text = join(fields, separator);
      const int cells = std::min(kLongestBar, columns - static_cast<int>(text.size()) - 1);
      if (cells >= kShortestBar) return bar(progress.fraction, cells, style) + " " + text;
    }
  }
  return "";
}

std::string plain_line(const Progress& progress) {
  std::vector<Field> fields = fields_of(progress);
  std::swap(fields[0], fields[1]);  // the step leads: logs are searched by it
  return join(fields, "  ");
}

ProgressLine::ProgressLine(std::FILE* out, double plain_every_s)
    : ProgressLine(out, style_of(out), plain_every_s) {
  follow_width_ = style_.terminal;
}

ProgressLine::ProgressLine(std::FILE* out, const ProgressStyle& style, double plain_every_s)
    : out_(out), follow_width_(false), style_(style), plain_every_s_(plain_every_s) {}

ProgressLine::~ProgressLine() { finish(); }

void ProgressLine::update(const Progress& progress) {
  last_ = progress;
  last_drawn_ = false;
  const double pause_s = style_.terminal ? kRedrawSeconds : plain_every_s_;
  if (!drawn_at_s_ || progress.elapsed_s - *drawn_at_s_ >= pause_s) draw();
}

void ProgressLine::draw() {
  if (style_.terminal) {
    if (follow_width_) style_.width = terminal_width(out_);
    std::fprintf(out_, "%s%s", kClearLine, progress_line(*last_, style_).c_str());
    on_line_ = true;
  } else {
    std::fprintf(out_, "%s\n", plain_line(*last_).c_str());
  }
  std::fflush(out_);
  drawn_at_s_ = last_->elapsed_s;
  last_drawn_ = true;
}

void ProgressLine::message(const std::string& text) {
  const std::string shown = printable(text);
  std::fprintf(out_, "%s%s%s", on_line_ ? kClearLine : "", shown.c_str(), shown.ends_with('\n') ? "" : "\n");
  if (on_line_) {
    draw();
  } else {
    std::fflush(out_);
  }
}

void ProgressLine::finish() {
  if (!last_drawn_) draw();
  if (on_line_) std::fputc('\n', out_);
  std::fflush(out_);
  on_line_ = false;
  drawn_at_s_.reset();
}

}  // namespace flashlm

// SPDX-License-Identifier: Apache-2.0
#include "train/loss_plot.h"

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <limits>

namespace flashlm {
namespace {

constexpr double kWidth = 960, kHeight = 540;
constexpr double kLeft = 80, kRight = 884, kTop = 64, kBottom = 472;  // of the plotting area
constexpr const char* kTrainColour = "#2563a8";
constexpr const char* kValidationColour = "#c8501e";
constexpr double kInf = std::numeric_limits<double>::infinity();

using Points = std::vector<PlotPoint>;

template <typename... Args>
std::string format(const char* pattern, Args... args) {
  const int size = std::snprintf(nullptr, 0, pattern, args...);
  std::string text(size + 1, '\0');
  std::snprintf(text.data(), text.size(), pattern, args...);
  text.pop_back();
  return text;
}

std::string escape(const std::string& text) {
  std::string escaped;
  for (const unsigned char c : text) {
    if (c == '&') {
      escaped += "&amp;";
    } else if (c == '<') {
      escaped += "&lt;";
    } else if (c == '>') {
      escaped += "&gt;";
    } else if (c >= ' ') {  // XML has no place for control characters
      escaped += static_cast<char>(c);
    }
  }
  return escaped;
}

/// The points that can be drawn: not NaN, and small enough that no sum or difference overflows.
Points drawable(Points points) {
  const auto sound = [](double value) { return std::abs(value) < 1e30; };
  std::erase_if(points, [&](const PlotPoint& p) { return !sound(p.x) || !sound(p.y); });
  return points;
}

/// A running mean over a fortieth of the points, or eleven. Its window is symmetric at the steep start, and
/// one-sided at the flat end, where one point would be noise.
Points smoothed(const Points& points) {
  const size_t n = points.size(), half = std::max(n / 80, std::min<size_t>(n / 8, 5));
  std::vector<double> sums(n + 1, 0);
  for (size_t i = 0; i < n; ++i) sums[i + 1] = sums[i] + points[i].y;
  Points means(n);
  for (size_t i = 0; i < n; ++i) {
    const size_t before = std::min(half, i);
    const size_t first = i - before, last = std::min(i + before, n - 1);
    means[i] = {points[i].x, (sums[last + 1] - sums[first]) / static_cast<double>(last + 1 - first)};
  }
  return means;
}

struct Range {
  double low = kInf;
  double high = -kInf;

  void include(double value) {
    low = std::min(low, value);
    high = std::max(high, value);
  }
  bool empty() const { return low > high; }
  double size() const { return high - low; }
};

/// The step 1, 2 or 5 times a power of ten that gives at most max_ticks intervals over size.
double tick_step(double size, int max_ticks) {
  const double power = std::pow(10, std::floor(std::log10(size / max_ticks)));
  for (const double factor : {1.0, 2.0, 5.0}) {
    if (size <= factor * power * max_ticks) return factor * power;
  }
  return 10 * power;
}

std::vector<double> ticks(const Range& range, int max_ticks) {
  const double step = tick_step(range.size(), max_ticks);
  std::vector<double> values;
  const double first = std::ceil(range.low / step - 1e-9);
  for (int i = 0; i <= max_ticks; ++i) {
    const double value = (first + i) * step;
    if (value <= range.high + 1e-9 * range.size()) values.push_back(value);
  }
  return values;
}

std::string loss_label(double value, double step) {
  const int decimals = std::max(0, static_cast<int>(-std::floor(std::log10(step) + 1e-9)));
  return format("%.*f", std::min(decimals, 9), value);
}

/// 0, 500, 1k, 1.5k, 20M: as short as ticks allow.
std::string count_label(double value) {
  if (std::abs(value) < 1000) return format("%g", value);
  const bool millions = std::abs(value) >= 1e6;
  return format("%.4g%s", value / (millions ? 1e6 : 1e3), millions ? "M" : "k");
}

class Picture {
 public:
  explicit Picture(const LossPlot& plot)
      : plot_(plot),
        train_(drawable(plot.train)),
        mean_(smoothed(train_)),
        validation_(drawable(plot.validation)) {
    fit_x();
    fit_y();
  }

  std::string svg() {
    open();
    y_axis();
    x_axis();
    if (plot_.bits_per_byte_per_nat > 0) right_axis();
    curves();
    legend();
    if (train_.empty() && validation_.empty()) {
      text((kLeft + kRight) / 2, (kTop + kBottom) / 2, "middle", "no losses yet");
    }
    out_ += "</svg>\n";
    return out_;
  }

 private:
  void fit_x() {
    for (const Points* points : {&train_, &validation_}) {
      for (const PlotPoint& p : *points) x_.include(p.x);
    }
    if (x_.empty()) x_ = {0, 1};
    if (x_.low > 0 && x_.low < 0.1 * x_.high) x_.low = 0;
    if (!(x_.size() > 0)) x_ = {x_.low - 0.5, x_.high + 0.5};
  }

  void fit_y() {
    const double settled = x_.low + x_.size() / 50;
    const auto include = [&](const Points& points, double from) {
      for (const PlotPoint& p : points) {
        if (p.x >= from) y_.include(p.y);
      }
    };
    include(mean_, settled);
    include(validation_, settled);
    // The noise of single steps may be cut at the top, not at the bottom, where it would look like a floor.
    for (const PlotPoint& p : train_) {
      if (p.x >= settled) y_.low = std::min(y_.low, p.y);
    }
    if (y_.empty()) {
      include(mean_, -kInf);
      include(validation_, -kInf);
    }
    if (y_.empty()) y_ = {0, 1};
    const double flat = y_.high != 0 ? 0.02 * std::abs(y_.high) : 0.5;
    const double margin = std::max(0.05 * y_.size(), flat);
    y_ = {y_.low - margin, y_.high + margin};
  }

  double px(double x) const { return kLeft + (x - x_.low) / x_.size() * (kRight - kLeft); }
  double py(double y) const { return kBottom - (y - y_.low) / y_.size() * (kBottom - kTop); }

  void open() {
    out_ += format(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 %g %g\" width=\"%g\" height=\"%g\" "
        "font-family=\"system-ui, 'Segoe UI', 'Helvetica Neue', 'DejaVu Sans', sans-serif\" font-size=\"13\" "
        "fill=\"#444\">\n",
        kWidth, kHeight, kWidth, kHeight);
    out_ += "<title>" + escape(plot_.title) + "</title>\n";
    out_ += format("<clipPath id=\"area\"><rect x=\"%g\" y=\"%g\" width=\"%g\" height=\"%g\"/></clipPath>\n",
                   kLeft, kTop, kRight - kLeft, kBottom - kTop);
    out_ += "<rect width=\"100%\" height=\"100%\" fill=\"#fcfcfb\"/>\n";
    out_ += format("<text x=\"%g\" y=\"34\" font-size=\"18\" font-weight=\"600\" fill=\"#222\">", kLeft) +
            escape(plot_.title) + "</text>\n";
  }

  void line(double x1, double y1, double x2, double y2, const char* colour) {
    out_ += format("<line x1=\"%.1f\" y1=\"%.1f\" x2=\"%.1f\" y2=\"%.1f\" stroke=\"%s\"/>\n", x1, y1, x2, y2,
                   colour);
  }

  void text(double x, double y, const char* anchor, const std::string& label, const char* extra = "") {
    out_ += format("<text x=\"%.1f\" y=\"%.1f\" text-anchor=\"%s\"%s>", x, y, anchor, extra) + escape(label) +
            "</text>\n";
  }

  /// A label along a vertical axis, read from below.
  void upright_text(double x, const std::string& label) {
    const double y = (kTop + kBottom) / 2;
    text(x, y, "middle", label, format(" transform=\"rotate(-90 %g %g)\"", x, y).c_str());
  }

  void y_axis() {
    const double step = tick_step(y_.size(), 7);
    for (const double value : ticks(y_, 7)) {
      line(kLeft, py(value), kRight, py(value), "#e6e6e3");
      text(kLeft - 10, py(value) + 4.5, "end", loss_label(value, step));
    }
    upright_text(20, "loss (nats/token)");
  }

  void x_axis() {
    for (const double value : ticks(x_, 9)) {
      line(px(value), kBottom, px(value), kBottom + 5, "#888");
      text(px(value), kBottom + 21, "middle", count_label(value));
    }
    line(kLeft, kBottom, kRight, kBottom, "#888");
    text((kLeft + kRight) / 2, kHeight - 20, "middle", plot_.x_label);
  }

  void right_axis() {
    const double scale = plot_.bits_per_byte_per_nat;
    const Range bits{y_.low * scale, y_.high * scale};
    const double step = tick_step(bits.size(), 7);
    for (const double value : ticks(bits, 7)) {
      const double y = py(value / scale);
      line(kRight, y, kRight + 5, y, "#888");
      text(kRight + 10, y + 4.5, "start", loss_label(value, step));
    }
    upright_text(kWidth - 16, "bits/byte");
  }

  /// For each pixel column its first, lowest, highest and last point: what a line through all points would
  /// ink.
  Points thinned(const Points& points) const {
    Points kept;
    for (size_t begin = 0, end; begin < points.size(); begin = end) {
      const double column = std::floor(px(points[begin].x));
      for (end = begin + 1; end < points.size() && std::floor(px(points[end].x)) == column;) ++end;
      const auto by_y = [](const PlotPoint& a, const PlotPoint& b) { return a.y < b.y; };
      const auto [low, high] = std::minmax_element(points.begin() + begin, points.begin() + end, by_y);
      size_t keep[] = {begin, static_cast<size_t>(low - points.begin()),
                       static_cast<size_t>(high - points.begin()), end - 1};
      std::sort(std::begin(keep), std::end(keep));
      for (auto i = std::begin(keep); i != std::unique(std::begin(keep), std::end(keep)); ++i) {
        kept.push_back(points[*i]);
      }
    }
    return kept;
  }

  void curve(const Points& points, const char* colour, double width, double opacity) {
    const Points kept = thinned(points);
    if (kept.size() < 2) return;
    out_ += format(
        "<polyline clip-path=\"url(#area)\" fill=\"none\" stroke=\"%s\" stroke-width=\"%g\" "
        "stroke-opacity=\"%g\" "
        "stroke-linejoin=\"round\" points=\"",
        colour, width, opacity);
    // Far outside the area a coordinate says nothing, but a huge one could break a viewer.
    for (const PlotPoint& p : kept) out_ += format("%.1f,%.1f ", px(p.x), std::clamp(py(p.y), -1e4, 1e4));
    out_ += "\"/>\n";
  }

  void dots(const Points& points, const char* colour, double radius) {
    for (const PlotPoint& p : points) {
      if (p.y > y_.high) continue;
      out_ += format("<circle cx=\"%.1f\" cy=\"%.1f\" r=\"%g\" fill=\"%s\" stroke=\"#fcfcfb\"/>\n", px(p.x),
                     py(p.y), radius, colour);
    }
  }

  void curves() {
    curve(train_, kTrainColour, 1, 0.25);
    curve(mean_, kTrainColour, 2, 1);
    if (train_.size() == 1) dots(train_, kTrainColour, 4);
    curve(validation_, kValidationColour, 1.5, 0.6);
    dots(validation_, kValidationColour, validation_.size() > 60 ? 2 : 4);
  }

  void legend() {
    double y = kTop + 14;
    const auto entry = [&](const char* colour, const std::string& label) {
      out_ += format("<rect x=\"%g\" y=\"%g\" width=\"16\" height=\"3\" rx=\"1.5\" fill=\"%s\"/>\n",
                     kRight - 236, y - 6, colour);
      text(kRight - 212, y, "start", label);
      y += 20;
    };
    if (!mean_.empty()) entry(kTrainColour, format("training, %.3f at the end", mean_.back().y));
    if (!validation_.empty()) {
      const auto by_y = [](const PlotPoint& a, const PlotPoint& b) { return a.y < b.y; };
      const PlotPoint best = *std::min_element(validation_.begin(), validation_.end(), by_y);
      entry(kValidationColour, format("validation, best %.3f at ", best.y) + count_label(best.x));
    }
  }

  const LossPlot& plot_;
  Points train_, mean_, validation_;
  Range x_, y_;
  std::string out_;
};

}  // namespace

std::string loss_plot_svg(const LossPlot& plot) { return Picture(plot).svg(); }

}  // namespace flashlm

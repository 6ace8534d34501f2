// SPDX-License-Identifier: Apache-2.0
// Schedule, curriculum, progress and the loss picture: everything of train/ that needs no Torch.
#include <algorithm>
#include <catch2/catch.hpp>
#include <cmath>
#include <cstdlib>
#include <limits>
#include <string>

#include "data/error.h"
#include "train/loss_plot.h"
#include "train/progress.h"
#include "train/schedule.h"

using namespace flashlm;

namespace {

const double kNaN = std::numeric_limits<double>::quiet_NaN();
const double kInf = std::numeric_limits<double>::infinity();

size_t count(const std::string& text, const std::string& part) {
  size_t found = 0;
  for (size_t at = text.find(part); at != std::string::npos; at = text.find(part, at + 1)) ++found;
  return found;
}

std::string curriculum_error(const std::string& text) {
  try {
    parse_curriculum(text);
  } catch (const Error& error) {
    return error.what();
  }
  return "";
}

/// Everything that was written through the FILE.
class Capture {
 public:
  Capture() : file_(open_memstream(&data_, &size_)) {}
  ~Capture() {
    std::fclose(file_);
    std::free(data_);
  }
  std::FILE* file() { return file_; }
  std::string text() {
    std::fflush(file_);
    return {data_, size_};
  }

 private:
  char* data_ = nullptr;
  size_t size_ = 0;
  std::FILE* file_;
};

Progress reading(double elapsed_s, int64_t step) {
  return {.fraction = 0.127,
          .step = step,
          .loss = 5.1234,
          .val_loss = 5.2,
          .bits_per_byte = 1.672,
          .tokens_per_s = 12345,
          .elapsed_s = elapsed_s,
          .eta_s = 83};
}

/// Columns that a UTF-8 text without escapes takes.
size_t columns(const std::string& text) {
  return std::count_if(text.begin(), text.end(), [](unsigned char c) { return (c & 0xc0) != 0x80; });
}

/// Well-formed enough for any parser: tags nest, attributes are quoted, text holds no bare < or &.
bool is_well_formed(const std::string& xml) {
  std::vector<std::string> open;
  size_t elements = 0;
  for (size_t i = 0; i < xml.size(); ++i) {
    const unsigned char c = xml[i];
    if (c < ' ' && c != '\n') return false;
    if (c == '&') {
      const std::string entity = xml.substr(i, xml.find(';', i) - i);
      if (entity != "&amp" && entity != "&lt" && entity != "&gt") return false;
    }
    if (c != '<') continue;
    const size_t end = xml.find('>', i);
    if (end == std::string::npos) return false;
    const std::string tag = xml.substr(i + 1, end - i - 1);
    if (tag.find('<') != std::string::npos || std::count(tag.begin(), tag.end(), '"') % 2) return false;
    const std::string name = tag.substr(0, tag.find_first_of(" /", 1));
    if (tag[0] == '/') {
      if (open.empty() || "/" + open.back() != tag) return false;
      open.pop_back();
    } else if (tag.back() != '/') {
      if (open.empty() && elements > 0) return false;
      open.push_back(name);
    }
    ++elements;
    i = end;
  }
  return open.empty() && elements > 0;
}

}  // namespace

TEST_CASE("wsd warms up, holds, and falls to zero", "[schedule]") {
  const auto v3 = [](int64_t step) { return wsd(double(step) / 10000, step, 200, 0.9); };
  CHECK(v3(1) == 1.0 / 200);
  CHECK(v3(100) == 0.5);
  CHECK(v3(199) == 199.0 / 200);
  CHECK(v3(200) == 1);
  CHECK(v3(8999) == 1);
  CHECK(v3(9000) == 1);
  CHECK(v3(9500) == Approx(0.5));
  CHECK(v3(9999) == Approx(0.001));
  CHECK(v3(10000) == 0);
  CHECK(v3(10001) == 0);

  CHECK(wsd(0.5, 1, 0, 0.9) == 1);   // no warm-up
  CHECK(wsd(1.0, 10, 0, 1.0) == 1);  // no decay
  CHECK(wsd(0.75, 10, 0, 0.5) == 0.5);
  CHECK(wsd(0.75, 10, 100, 0.5) == 0.1);  // a run shorter than its warm-up still ends at zero
  CHECK(wsd(1.0, 10, 100, 0.5) == 0);
}

TEST_CASE("a curriculum is read and looked up", "[schedule]") {
  const auto phases = parse_curriculum("0:64:4,0.1:128:4,0.4:256:8,0.7:512:8");
  CHECK(phases == std::vector<Phase>{{0, 64, 4}, {0.1, 128, 4}, {0.4, 256, 8}, {0.7, 512, 8}});
  CHECK(phase_at(phases, 0).seq_len == 64);
  CHECK(phase_at(phases, 0.0999).seq_len == 64);
  CHECK(phase_at(phases, 0.1).seq_len == 128);
  CHECK(phase_at(phases, 0.5).grad_accum == 8);
  CHECK(phase_at(phases, 1).seq_len == 512);
  CHECK(parse_curriculum("0:128:1") == std::vector<Phase>{{0, 128, 1}});
}

TEST_CASE("a wrong curriculum is refused in one line", "[schedule]") {
  const std::string form = "each phase must be start:seq_len:grad_accum, got ";
  const std::string order = "a phase must start after the one before it and before 1, got ";
  const auto [text, rule] = GENERATE_COPY(table<std::string, std::string>({
      {"", form + "\"\""},
      {"0:64", form + "\"0:64\""},
      {"0:64:4:8", form + "\"0:64:4:8\""},
      {"0:64:4,", form + "\"\""},
      {"0:sixty:4", form + "\"0:sixty:4\""},
      {"0:64.5:4", form + "\"0:64.5:4\""},
      {"0: 64:4", form + "\"0: 64:4\""},
      {"0.1:64:4", "the first phase must start at 0, got \"0.1:64:4\""},
      {"nan:64:4", "the first phase must start at 0, got \"nan:64:4\""},
      {"0:64:4,0:128:4", order + "\"0:128:4\""},
      {"0:64:4,1:128:4", order + "\"1:128:4\""},
      {"0:64:4,nan:128:4", order + "\"nan:128:4\""},
      {"0:0:4", "seq_len and grad_accum must be at least 1, got \"0:0:4\""},
      {"0:64:-1", "seq_len and grad_accum must be at least 1, got \"0:64:-1\""},
  }));
  CHECK(curriculum_error(text) == "curriculum \"" + text + "\": " + rule + "; for example 0:64:4,0.1:128:4");
}

TEST_CASE("numbers are short", "[progress]") {
  CHECK(format_count(0) == "0");
  CHECK(format_count(950) == "950");
  CHECK(format_count(999.4) == "999");
  CHECK(format_count(999.6) == "1.00k");
  CHECK(format_count(1234) == "1.23k");
  CHECK(format_count(9996) == "10.0k");
  CHECK(format_count(12345) == "12.3k");
  CHECK(format_count(99960) == "100k");
  CHECK(format_count(999949) == "1.00M");
  CHECK(format_count(4.5e6) == "4.50M");
  CHECK(format_count(3e15) == "3000T");
  CHECK(format_count(kNaN) == "-");
  CHECK(format_duration(0) == "0:00");
  CHECK(format_duration(7.4) == "0:07");
  CHECK(format_duration(59.6) == "1:00");
  CHECK(format_duration(83) == "1:23");
  CHECK(format_duration(3723) == "1:02:03");
  CHECK(format_duration(360000) == "100:00:00");
  CHECK(format_duration(-1) == "-:--");
  CHECK(format_duration(kInf) == "-:--");
  CHECK(format_duration(kNaN) == "-:--");
}

TEST_CASE("a plain line names what it shows", "[progress]") {
  CHECK(plain_line(reading(0, 1200)) ==
        "step 1200  12%  loss 5.123  val 5.200  1.672 bits/byte  12.3k tok/s  1:23 left");
  CHECK(plain_line({.fraction = 1, .step = 7, .loss = kNaN}) == "step 7  100%  loss nan  0 tok/s  0:00 left");
}

TEST_CASE("a terminal's line fits, and loses its least fields first", "[progress]") {
  CHECK(
      progress_line(reading(0, 1200), {.width = 100}) ==
      "##------------------ 12%  step 1200  loss 5.123  val 5.200  1.672 bits/byte  12.3k tok/s  1:23 left");
  CHECK(progress_line(reading(0, 1200), {.unicode = true, .width = 80}) ==
        "░░░░░░ 12% step 1200 loss 5.123 val 5.200 1.672 bits/byte 12.3k tok/s 1:23 left");
  CHECK(progress_line(reading(0, 1200), {.width = 60}) ==
        "#------- 12% loss 5.123 val 5.200 1.672 bits/byte 1:23 left");
  CHECK(progress_line(reading(0, 1200), {.width = 40}) == "#----------- 12%  loss 5.123  1:23 left");
  for (int width = 0; width < 200; ++width) {
    CHECK(columns(progress_line(reading(0, 123456), {.unicode = true, .width = width})) <
          static_cast<size_t>(std::max(1, width)));
  }
  const std::string plain = progress_line(reading(0, 1), {.terminal = true, .width = 80});
  CHECK(plain.find('\x1b') == std::string::npos);
  CHECK(count(progress_line(reading(0, 1), {.terminal = true, .colour = true, .width = 80}), "\x1b[0m") == 1);
  CHECK(progress_line({.fraction = kNaN}, {.width = 80}).starts_with("-----"));
}

TEST_CASE("off a terminal there is a line every few seconds, and nothing else", "[progress]") {
  Capture out;
  {
    ProgressLine line(out.file(), ProgressStyle{}, /*plain_every_s=*/10);
    for (int second = 0; second <= 25; ++second) line.update(reading(second, second));
    line.message("sample:\x1b[31m Once\tupon\r\na time\x07");
  }
  CHECK(count(out.text(), "\n") == 6);
  CHECK(out.text().starts_with("step 0 "));
  CHECK(out.text().find("\nstep 10 ") != std::string::npos);
  CHECK(out.text().find("\nstep 20 ") != std::string::npos);
  CHECK(out.text().find("\nsample:[31m Once\tupon\na time\nstep 25 ") != std::string::npos);
  CHECK(out.text().find('\x1b') == std::string::npos);
  CHECK(out.text().find('\r') == std::string::npos);
}

TEST_CASE("on a terminal one line is rewritten, and messages go above it", "[progress]") {
  const ProgressStyle style{.terminal = true, .width = 60};
  const auto shown = [&](int64_t step) { return "\r\x1b[K" + progress_line(reading(0, step), style); };
  Capture out;
  ProgressLine line(out.file(), style, 10);
  line.message("before");
  line.update(reading(0.00, 1));
  line.update(reading(0.05, 2));  // too soon
  line.update(reading(0.10, 3));
  line.message("val 5.1\n");
  line.update(reading(0.15, 4));
  line.finish();
  line.finish();
  CHECK(out.text() == "before\n" + shown(1) + shown(3) + "\r\x1b[Kval 5.1\n" + shown(3) + shown(4) + "\n");
}

TEST_CASE("a stream that is no terminal gets no colour", "[progress]") {
  std::FILE* file = std::tmpfile();
  const ProgressStyle style = style_of(file);
  std::fclose(file);
  CHECK_FALSE(style.terminal);
  CHECK_FALSE(style.colour);
  CHECK_FALSE(style.unicode);
}

TEST_CASE("the loss picture is well-formed for any points", "[loss_plot]") {
  LossPlot plot;
  plot.title = "a <b> & \"c\"\x01";
  SECTION("none") { CHECK(loss_plot_svg(plot).find("no losses yet") != std::string::npos); }
  SECTION("one") {
    plot.train = {{1, 10.8}};
    plot.validation = {{1, 10.9}};
    CHECK(count(loss_plot_svg(plot), "<circle") == 2);
  }
  SECTION("only such as cannot be drawn") {
    plot.train = {{1, kNaN}, {kInf, 3}, {2, -kInf}, {3, 1e300}};
    CHECK(loss_plot_svg(plot).find("no losses yet") != std::string::npos);
  }
  SECTION("constant, at a huge x") {
    plot.train = {{1e20, 3}, {1e20 + 16384, 3}};
    plot.bits_per_byte_per_nat = 1e-9;
  }
  SECTION("zero") { plot.validation = {{0, 0}, {1, 0}}; }
  const std::string svg = loss_plot_svg(plot);
  CHECK(is_well_formed(svg));
  CHECK(svg.find("nan") == std::string::npos);
  CHECK(svg.find("inf") == std::string::npos);
  CHECK(svg.find("a &lt;b&gt; &amp; \"c\"</title>") != std::string::npos);
}

TEST_CASE("the loss picture shows long runs in few points", "[loss_plot]") {
  LossPlot plot;
  plot.x_label = "tokens";
  for (int i = 0; i < 100000; ++i) {
    plot.train.push_back({i * 1e3, i == 500 ? kNaN : 3 + 7 * std::exp(-i / 5e3) + 0.2 * std::sin(i * 7.0)});
  }
  plot.validation = {{0, 10}, {4e7, 3.21}, {9e7, 3.123}};
  plot.bits_per_byte_per_nat = 0.33;
  const std::string svg = loss_plot_svg(plot);
  CHECK(is_well_formed(svg));
  CHECK(svg.find("nan") == std::string::npos);
  CHECK(svg.size() < 120000);
  CHECK(count(svg, "<polyline") == 3);
  CHECK(svg.find(">20M</text>") != std::string::npos);
  CHECK(svg.find(">tokens</text>") != std::string::npos);
  CHECK(svg.find(">loss (nats/token)</text>") != std::string::npos);
  CHECK(svg.find(">bits/byte</text>") != std::string::npos);
  CHECK(svg.find(">validation, best 3.123 at 90M</text>") != std::string::npos);
  CHECK(svg.find(">training, 3.0") != std::string::npos);
  plot.bits_per_byte_per_nat = 0;
  CHECK(loss_plot_svg(plot).find("bits/byte") == std::string::npos);
}

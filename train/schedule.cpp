// SPDX-License-Identifier: Apache-2.0
#include "train/schedule.h"

#include <algorithm>
#include <charconv>
#include <string_view>

#include "data/error.h"

namespace flashlm {
namespace {

std::vector<std::string_view> split(std::string_view text, char separator) {
  std::vector<std::string_view> parts;
  while (true) {
    const size_t end = text.find(separator);
    parts.push_back(text.substr(0, end));
    if (end == std::string_view::npos) return parts;
    text.remove_prefix(end + 1);
  }
}

template <typename Number>
bool parse_number(std::string_view text, Number& value) {
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), value);
  return error == std::errc() && end == text.data() + text.size();
}

[[noreturn]] void fail(const std::string& text, const std::string& rule, std::string_view entry) {
  throw Error("curriculum \"" + text + "\": " + rule + ", got \"" + std::string(entry) +
              "\"; for example 0:64:4,0.1:128:4");
}

}  // namespace

double wsd(double progress, int64_t step, int64_t warmup_steps, double decay_start) {
  const double warmup = step < warmup_steps ? double(step) / double(warmup_steps) : 1.0;
  const double decay = progress > decay_start ? std::max(0.0, (1 - progress) / (1 - decay_start)) : 1.0;
  return std::min(warmup, decay);
}

std::vector<Phase> parse_curriculum(const std::string& text) {
  std::vector<Phase> phases;
  for (const std::string_view entry : split(text, ',')) {
    const std::vector<std::string_view> fields = split(entry, ':');
    Phase phase;
    if (fields.size() != 3 || !parse_number(fields[0], phase.start) ||
        !parse_number(fields[1], phase.seq_len) || !parse_number(fields[2], phase.grad_accum)) {
      fail(text, "each phase must be start:seq_len:grad_accum", entry);
    }
    if (phases.empty() && phase.start != 0) fail(text, "the first phase must start at 0", entry);
    if (!phases.empty() && !(phase.start > phases.back().start && phase.start < 1)) {
      fail(text, "a phase must start after the one before it and before 1", entry);
    }
    if (phase.seq_len < 1 || phase.grad_accum < 1) {
      fail(text, "seq_len and grad_accum must be at least 1", entry);
    }
    phases.push_back(phase);
  }
  return phases;
}

const Phase& phase_at(const std::vector<Phase>& curriculum, double progress) {
  const auto starts_later = [&](const Phase& phase) { return phase.start > progress; };
  const auto next = std::find_if(curriculum.begin() + 1, curriculum.end(), starts_later);
  return *(next - 1);
}

}  // namespace flashlm

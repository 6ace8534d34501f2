// SPDX-License-Identifier: Apache-2.0
#include "bench/report.h"

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <nlohmann/json.hpp>
#include <sstream>

namespace flashlm::bench {
namespace {

using Json = nlohmann::ordered_json;

/// Three significant digits, never an exponent.
std::string digits(double value) {
  const int decimals = value > 0 ? std::clamp(2 - static_cast<int>(std::floor(std::log10(value))), 0, 4) : 0;
  char text[64];
  std::snprintf(text, sizeof text, "%.*f", decimals, value);
  return text;
}

std::string threads_text(int threads) {
  return std::to_string(threads) + (threads == 1 ? " thread" : " threads");
}

template <class Container>
void add_unique(Container& values, const typename Container::value_type& value) {
  if (std::find(values.begin(), values.end(), value) == values.end()) values.push_back(value);
}

const Timing* find(const Result& result, const std::string& contestant) {
  for (const Timing& timing : result.timings) {
    if (timing.contestant == contestant) return &timing;
  }
  return nullptr;
}

/// "| a | b |\n"
std::string row(const std::vector<std::string>& cells) {
  std::string text = "|";
  for (const std::string& cell : cells) text += " " + cell + " |";
  return text + "\n";
}

std::string header(const std::vector<std::string>& cells) {
  return row(cells) + row(std::vector<std::string>(cells.size(), "---"));
}

std::string peaks_table(const Report& report) {
  std::vector<std::string> cells = {"ceiling", "kind"};
  std::vector<std::string> names;
  for (const auto& [threads, peaks] : report.peaks) {
    cells.push_back(threads_text(threads));
    for (const Peak& peak : peaks) add_unique(names, peak.name);
  }
  std::string text = header(cells);
  for (const std::string& name : names) {
    cells = {name, ""};
    for (const auto& [threads, peaks] : report.peaks) {
      const auto found =
          std::find_if(peaks.begin(), peaks.end(), [&](const Peak& p) { return p.name == name; });
      cells.push_back(found == peaks.end() ? "not measured" : digits(found->value) + " " + found->unit);
      if (found != peaks.end()) cells[1] = found->kind;
    }
    text += row(cells);
  }
  return text;
}

/// The cases of one group on one number of threads.
std::string group_table(const std::vector<const Result*>& results) {
  std::vector<std::string> peers, notes;
  for (const Result* result : results) {
    for (size_t i = 1; i < result->timings.size(); ++i) add_unique(peers, result->timings[i].contestant);
    for (const std::string& note : result->notes) add_unique(notes, note);
  }
  std::vector<std::string> cells = {"case", "time", "FlashLM " + results[0]->unit, "of peak"};
  for (const std::string& peer : peers) cells.push_back("over " + peer);
  std::string text = header(cells);
  for (const Result* result : results) {
    const Timing& ours = result->timings[0];
    cells = {result->name, digits(ours.min_s * 1e6) + " µs", "**" + digits(result->rate(ours)) + "**",
             result->peak_name.empty() ? "not measured"
                                       : digits(result->percent_of_peak()) + " % of " + result->peak_name};
    for (const std::string& peer : peers) {
      const Timing* theirs = find(*result, peer);
      cells.push_back(theirs == nullptr
                          ? "-"
                          : digits(theirs->min_s / ours.min_s) + "x (" + digits(result->rate(*theirs)) + ")");
    }
    text += row(cells);
  }
  if (!notes.empty()) text += "\n";
  for (const std::string& note : notes) text += note + "\n";
  return text;
}

}  // namespace

std::string summary(const Result& result) {
  std::string text = threads_text(result.threads) + "  " + result.group + "  " + result.name + "  ";
  if (!result.skipped.empty()) return text + "skipped: " + result.skipped;
  text += digits(result.rate(result.timings[0])) + " " + result.unit;
  for (size_t i = 1; i < result.timings.size(); ++i) {
    text += ", " + digits(result.timings[i].min_s / result.timings[0].min_s) + "x " +
            result.timings[i].contestant;
  }
  return text;
}

std::string to_json(const Report& report) {
  const Machine& machine = report.machine;
  Json json;
  json["machine"] = {{"cpu", machine.cpu},         {"processors", machine.processors},
                     {"load", machine.load},       {"isa", machine.isa},
                     {"torch", machine.torch},     {"ggml", machine.ggml},
                     {"commit", machine.commit},   {"date", machine.date},
                     {"command", machine.command}, {"environment", machine.environment}};
  json["seconds_per_case"] = report.seconds;
  json["filter"] = report.filter;
  json["peaks"] = Json::array();
  for (const auto& [threads, peaks] : report.peaks) {
    for (const Peak& peak : peaks) {
      json["peaks"].push_back({{"threads", threads},
                               {"kind", peak.kind},
                               {"name", peak.name},
                               {"level", peak.level},
                               {"unit", peak.unit},
                               {"value", peak.value}});
    }
  }
  json["cases"] = Json::array();
  json["skipped"] = Json::array();
  for (const Result& result : report.results) {
    Json entry = {{"group", result.group}, {"name", result.name}, {"threads", result.threads}};
    if (!result.skipped.empty()) {
      entry["reason"] = result.skipped;
      json["skipped"].push_back(entry);
      continue;
    }
    entry["unit"] = result.unit;
    entry["work"] = result.work;
    entry["peak"] = nullptr;
    if (!result.peak_name.empty()) {
      entry["peak"] = {
          {"name", result.peak_name}, {"value", result.peak_value}, {"percent", result.percent_of_peak()}};
    }
    for (const Timing& timing : result.timings) {
      Json difference = nullptr;  // JSON has no NaN
      if (!std::isnan(timing.difference)) difference = timing.difference;
      entry["contestants"].push_back({{"name", timing.contestant},
                                      {"min_us", timing.min_s * 1e6},
                                      {"median_us", timing.median_s * 1e6},
                                      {"rate", result.rate(timing)},
                                      {"samples", timing.samples},
                                      {"calls_per_sample", timing.calls},
                                      {"difference", difference}});
    }
    entry["notes"] = result.notes;
    json["cases"].push_back(entry);
  }
  return json.dump(1, ' ', /*ensure_ascii=*/false, Json::error_handler_t::replace) + "\n";
}

std::string to_markdown(const Report& report) {
  const Machine& machine = report.machine;
  std::ostringstream text;
  text << "# Operators against their peers\n\n"
       << machine.date << ", " << machine.cpu << ", " << machine.processors << " processors, load average "
       << digits(machine.load) << " when the run began. Kernels: " << machine.isa << ". torch "
       << machine.torch << ".";
  if (!machine.ggml.empty()) text << " " << machine.ggml << ".";
  if (!machine.commit.empty()) text << " FlashLM " << machine.commit << ".";
  text << "\n\n```\n";
  for (const auto& [name, value] : machine.environment) text << name << "=" << value << " ";
  text
      << machine.command << "\n```\n\n"
      << "Times are minima of wall time over samples of at least a millisecond, each after a call that is "
         "not "
         "counted, FlashLM and\nits peers in turn. \"over PEER\": how many times as fast as the peer FlashLM "
         "is; in brackets the peer's own rate. \"of peak\":\nFlashLM's rate over that of the instruction or "
         "the memory named, measured in the same run; the memory is the nearest that\nholds what the "
         "operator "
         "touches.\n";
  if (report.seconds == 0)
    text << "\n**One call of everything (--seconds 0): this shows that it works, and measures nothing.**\n";
  text << "\n## What the machine can do\n\n" << peaks_table(report);
  for (const auto& [threads, peaks] : report.peaks) {
    text << "\n## On " << threads_text(threads) << "\n";
    std::vector<std::string> groups, skips;
    for (const Result& result : report.results) {
      if (result.threads != threads) continue;
      if (result.skipped.empty()) {
        add_unique(groups, result.group);
      } else {
        add_unique(skips, result.group + ": " + result.skipped);
      }
    }
    for (const std::string& group : groups) {
      std::vector<const Result*> results;
      for (const Result& result : report.results) {
        if (result.threads == threads && result.group == group && result.skipped.empty())
          results.push_back(&result);
      }
      text << "\n### " << group << "\n\n" << group_table(results);
    }
    if (!skips.empty()) text << "\nSkipped:\n\n";
    for (const std::string& skip : skips) text << "- " << skip << "\n";
  }
  return text.str();
}

}  // namespace flashlm::bench

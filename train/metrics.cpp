// SPDX-License-Identifier: Apache-2.0
#include "train/metrics.h"

#include <cerrno>
#include <cstring>
#include <fstream>
#include <nlohmann/json.hpp>

#include "data/error.h"
#include "data/file.h"

namespace flashlm {

namespace {

template <class T>
nlohmann::ordered_json value(const std::optional<T>& field) {
  return field ? nlohmann::ordered_json(*field) : nlohmann::ordered_json();
}

std::optional<double> optional_at(const nlohmann::json& json, const char* key) {
  const auto found = json.find(key);
  return found == json.end() || found->is_null() ? std::nullopt : std::optional<double>(found->get<double>());
}

std::string to_line(const Metrics& m) {
  const nlohmann::ordered_json json = {{"step", m.step},
                                       {"tokens", m.tokens},
                                       {"train_seconds", m.train_seconds},
                                       {"loss", value(m.loss)},
                                       {"val_loss", value(m.val_loss)},
                                       {"val_bits_per_byte", value(m.val_bits_per_byte)},
                                       {"lr", m.lr},
                                       {"grad_norm", value(m.grad_norm)},
                                       {"tokens_per_s", value(m.tokens_per_s)}};
  return json.dump() + "\n";
}

/// A line cut short by a crash is no metrics.
std::optional<Metrics> from_line(const std::string& line) {
  const auto json = nlohmann::json::parse(line, nullptr, /*allow_exceptions=*/false);
  if (!json.is_object() || !json.contains("step")) return std::nullopt;
  Metrics m;
  m.step = json.at("step");
  m.tokens = json.value("tokens", int64_t{0});
  m.train_seconds = json.value("train_seconds", 0.0);
  m.loss = optional_at(json, "loss");
  m.val_loss = optional_at(json, "val_loss");
  m.val_bits_per_byte = optional_at(json, "val_bits_per_byte");
  m.lr = json.value("lr", 0.0);
  m.grad_norm = optional_at(json, "grad_norm");
  m.tokens_per_s = optional_at(json, "tokens_per_s");
  return m;
}

}  // namespace

MetricsLog::MetricsLog(std::filesystem::path path, int64_t last_step) : path_(std::move(path)) {
  std::string kept;
  std::ifstream file(path_);
  for (std::string line; std::getline(file, line);) {
    const auto metrics = from_line(line);
    if (!metrics || metrics->step > last_step) continue;
    all_.push_back(*metrics);
    kept += line + "\n";
  }
  write_file(path_, kept);
  file_ = std::fopen(path_.c_str(), "a");
  if (file_ == nullptr) throw Error("cannot write " + path_.string() + ": " + std::strerror(errno));
}

MetricsLog::~MetricsLog() { std::fclose(file_); }

void MetricsLog::write(const Metrics& metrics) {
  const std::string line = to_line(metrics);
  if (std::fputs(line.c_str(), file_) < 0 || std::fflush(file_) != 0) {
    throw Error("cannot write " + path_.string() + ": " + std::strerror(errno));
  }
  all_.push_back(metrics);
}

}  // namespace flashlm

// SPDX-License-Identifier: Apache-2.0
#include "train/config.h"

#include <CLI/App.hpp>
#include <CLI/Config.hpp>
#include <CLI/Formatter.hpp>
#include <algorithm>
#include <cmath>
#include <iostream>
#include <sstream>

#include "data/error.h"
#include "data/sampler.h"
#include "train/run_folder.h"
#include "train/schedule.h"

namespace flashlm {

namespace {

/// Declares each visited setting as a flag and TOML key of an App.
class Declare {
 public:
  explicit Declare(CLI::App& app) : app_(app) {}
  void group(const std::string& title) { group_ = title; }

  template <class Field>
  void operator()(const std::string& name, Field& field, const std::string& help) {
    CLI::Option* option = app_.add_option("--" + name, field, help)->capture_default_str()->group(group_);
    if constexpr (std::is_same_v<Field, std::vector<int64_t>> ||
                  std::is_same_v<Field, std::vector<std::string>>) {
      // CLI11 captures a list without the brackets by which it knows one when it reads its own file again.
      std::ostringstream list;
      for (const auto& value : field) list << (list.view().empty() ? "[" : ",") << value;
      option->default_str(list.str() + "]")->delimiter(',');
    }
  }

 private:
  CLI::App& app_;
  std::string group_;
};

/// The option's words, needed before the flags are parsed because they decide which file is read.
std::string early_value(int argc, const char* const* argv, const std::string& flag) {
  for (int i = 1; i < argc; ++i) {
    const std::string word = argv[i];
    if (word == flag && i + 1 < argc) return argv[i + 1];
    if (word.rfind(flag + "=", 0) == 0) return word.substr(flag.size() + 1);
  }
  return "";
}

}  // namespace

void TrainConfig::validate() const {
  const auto require = [](bool holds, const std::string& rule, const auto& got) {
    if (!holds) {
      std::ostringstream text;
      text << "--" << rule << ", got " << got;
      throw Error(text.str());
    }
  };
  if (data.empty() == tokens.empty()) {
    throw Error(
        "give either --data DIR (made by: flashlm prepare INPUT... --out DIR) or --tokens FILE --vocab-size "
        "N");
  }
  require(val_fraction > 0 && val_fraction < 1, "val-fraction must be in (0, 1)", val_fraction);
  windows_named(windows);
  require(freeze_embedding >= 0 && freeze_embedding < 1, "freeze-embedding must be in [0, 1)",
          freeze_embedding);
  require(steps >= 0, "steps must be >= 0", steps);
  require(std::isfinite(max_minutes) && max_minutes >= 0, "max-minutes must be >= 0", max_minutes);
  require(batch_size >= 1, "batch-size must be at least 1", batch_size);
  parse_curriculum(curriculum);
  require(threads >= 0, "threads must be >= 0", threads);
  require(label_smoothing >= 0 && label_smoothing < 1, "label-smoothing must be in [0, 1)", label_smoothing);
  require(z_loss >= 0, "z-loss must be >= 0", z_loss);
  require(position_fraction > 0 && position_fraction <= 1, "position-fraction must be in (0, 1]",
          position_fraction);
  require(warmup_steps >= 0, "warmup-steps must be >= 0", warmup_steps);
  require(decay_start >= 0 && decay_start <= 1, "decay-start must be in [0, 1]", decay_start);
  require(clip_norm >= 0, "clip-norm must be >= 0", clip_norm);
  require(ema_decay >= 0 && ema_decay < 1, "ema-decay must be in [0, 1)", ema_decay);
  Interval("log-every", log_every);
  Interval("eval-every", eval_every);
  require(eval_tokens >= 1, "eval-tokens must be at least 1", eval_tokens);
  require(eval_seq_len >= 1, "eval-seq-len must be at least 1", eval_seq_len);
  Interval("sample-every", sample_every);
  require(sample_tokens >= 0, "sample-tokens must be >= 0", sample_tokens);
  Interval("checkpoint-every", checkpoint_every);
  require(keep_checkpoints >= 1, "keep-checkpoints must be at least 1", keep_checkpoints);
  model.validate();
  if (model.packed)
    throw Error("--packed is for inference: train without it, then make a packed file with flashlm pack");
}

Interval::Interval(const std::string& name, const std::string& text) {
  size_t used = 0;
  double value = -1;
  try {
    value = std::stod(text, &used);
  } catch (const std::exception&) {
  }
  const bool seconds = used > 0 && text.substr(used) == "s";
  if (!(value >= 0) || !std::isfinite(value) ||
      (!seconds && (used != text.size() || value != std::floor(value)))) {
    throw Error("--" + name + " must be a number of steps such as 50, or of seconds such as 30s, got '" +
                text + "'");
  }
  if (seconds) {
    seconds_ = value;
  } else {
    steps_ = static_cast<int64_t>(value);
  }
}

bool Interval::due(int64_t last_step, int64_t step, double last_seconds, double seconds) const {
  if (steps_ > 0) return step / steps_ > last_step / steps_;
  return seconds_ > 0 && std::floor(seconds / seconds_) > std::floor(last_seconds / seconds_);
}

std::optional<CommandLine> parse_command_line(int argc, const char* const* argv, int& exit_code) {
  CommandLine line;
  CLI::App app("Trains a FlashLM, a language model with ternary weights, on this computer's CPU.",
               "train_flashlm");
  app.get_formatter()->column_width(34);
  app.set_config("--config", "",
                 "TOML file of settings, such as train/configs/quick.toml; flags override it");
  app.allow_config_extras(CLI::config_extras_mode::error);
  CLI::Option* resume =
      app.add_flag("--resume", line.resume, "continue the run in --out from its last checkpoint");
  resume->configurable(false);
  app.add_flag("--profile", line.profile, "print at the end which part of a step took how long")
      ->configurable(false);
  line.config.visit(Declare(app));

  std::string config_file = early_value(argc, argv, "--config");
  const std::string out = early_value(argc, argv, "--out");
  std::vector<std::string> words(argv + 1, argv + argc);
  if (config_file.empty() && !out.empty() &&
      std::find(words.begin(), words.end(), "--resume") != words.end()) {
    config_file = RunFolder(out).config();
    words.insert(words.end(), {"--config", config_file});
  }
  std::reverse(words.begin(), words.end());  // the order that CLI11 takes a vector in
  try {
    app.parse(words);
    if (line.config.out.empty()) {
      const std::string stem = std::filesystem::path(config_file).stem().string();
      line.config.out = "runs/" + (stem.empty() ? "train" : stem);
    }
    if (line.config.steps == 0 && line.config.max_minutes == 0) line.config.steps = 10000;  // as in v3
    line.config.validate();
    line.toml = app.config_to_str(/*default_also=*/true, /*write_description=*/true);
    return line;
  } catch (const CLI::CallForHelp& help) {
    exit_code = app.exit(help);
  } catch (const CLI::FileError&) {
    std::cerr << "train_flashlm: there is no config file " << config_file
              << "; the presets are in train/configs\n";
    exit_code = 1;
  } catch (const CLI::ConfigError& error) {
    std::cerr << "train_flashlm: " << config_file << ": " << error.what()
              << "; see train_flashlm --help for the keys\n";
    exit_code = 1;
  } catch (const CLI::ParseError& error) {
    std::cerr << "train_flashlm: " << error.what() << "; see train_flashlm --help\n";
    exit_code = 1;
  } catch (const Error& error) {
    std::cerr << "train_flashlm: " << error.what() << "\n";
    exit_code = 1;
  }
  return std::nullopt;
}

ModelConfig model_config_from_toml(const std::filesystem::path& path) {
  TrainConfig config;
  CLI::App app;
  app.set_config("--config");
  app.allow_config_extras(CLI::config_extras_mode::error);
  config.visit(Declare(app));
  try {
    app.parse(std::vector<std::string>{path.string(), "--config"});  // in reverse
  } catch (const CLI::FileError&) {
    throw Error("there is no config file " + path.string() + "; the presets are in train/configs");
  } catch (const CLI::ParseError& error) {
    throw Error(path.string() + ": " + error.what() + "; see train_flashlm --help for the keys");
  }
  config.model.validate();
  return config.model;
}

}  // namespace flashlm

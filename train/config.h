// SPDX-License-Identifier: Apache-2.0
// Every setting of a training run, declared once: flags, TOML keys, --help, the saved config.toml and the
// checks all come from visit().
#pragma once

#include <cstdint>
#include <filesystem>
#include <optional>
#include <string>

#include "model/config.h"
#include "train/optimizers.h"

namespace flashlm {

struct TrainConfig {
  std::string data, tokens, val_tokens;
  double val_fraction = 0.05;
  std::string windows = "random";
  std::string class_file, init, init_embedding;
  double freeze_embedding = 0.1;
  std::string out;

  int64_t steps = 0;
  double max_minutes = 0;
  int64_t batch_size = 4;
  std::string curriculum = "0:256:1";
  int64_t seed = 42;
  int64_t threads = 0;

  double label_smoothing = 0;
  double z_loss = 0;
  double position_fraction = 1;
  OptimizerConfig optimizer;
  int64_t warmup_steps = 200;
  double decay_start = 0.9;
  double clip_norm = 1;
  double ema_decay = 0;

  std::string log_every = "10";
  std::string eval_every = "30s";
  int64_t eval_tokens = 32768;
  int64_t eval_seq_len = 256;
  std::string sample_every = "60s";
  std::string sample_prompt = "The";
  int64_t sample_tokens = 48;
  std::string checkpoint_every = "60s";
  int64_t keep_checkpoints = 2;

  ModelConfig model;

  /// Calls visitor.group(title), then visitor(name, field, help) for each setting in it.
  template <class Visitor>
  void visit(Visitor&& visitor) {
    visitor.group("Data");
    visitor("data", data,
            "folder that `flashlm prepare` made; several: DIR,DIR=WEIGHT (share of the batches' rows; 1)");
    visitor(
        "tokens", tokens,
        "instead of --data: a raw token file (uint16 .bin or .npy), or several likewise; needs --vocab-size");
    visitor("val-tokens", val_tokens,
            "validation token file for --tokens; default: the last --val-fraction of it");
    visitor("val-fraction", val_fraction, "share of --tokens held out when there is no --val-tokens");
    visitor("windows", windows,
            "what a row of a batch is: 'random', any place; 'shuffled', epochs of all places; 'documents', "
            "epochs of places that cross no document's end");
    visitor(
        "class-file", class_file,
        "word classes of the head, made by `flashlm classes`; default: by frequency in the training tokens");
    visitor("init", init, "run folder or .safetensors file whose weights to start from");
    visitor("init-embedding", init_embedding, "embedding to start from, made by `flashlm embeddings`");
    visitor("freeze-embedding", freeze_embedding,
            "with --init-embedding: share of the run in which the embedding is not trained, as in v3");
    visitor("out", out, "run folder; default: runs/<name of the config file>");
    visitor.group("Length and batches");
    visitor("steps", steps, "optimizer steps; 0: until --max-minutes, or 10000 without one");
    visitor("max-minutes", max_minutes,
            "training time budget (evaluation not counted); schedules finish inside it");
    visitor("batch-size", batch_size, "sequences in a micro-batch");
    visitor("curriculum", curriculum, "from:length:accumulation of each phase; `from` is a share of the run");
    visitor("seed", seed, "of weights, batches and samples");
    visitor("threads", threads, "CPU threads; 0: all cores");
    visitor.group("Loss");
    visitor("label-smoothing", label_smoothing, "share of the target spread over the vocabulary");
    visitor("z-loss", z_loss, "factor of mean(logsumexp^2)");
    visitor("position-fraction", position_fraction,
            "share of the positions, drawn anew each time, that is trained");
    visitor.group("Optimizers");
    visitor("matrix-optimizer", optimizer.matrix_optimizer, "of the ternary matrices: 'normuon' or 'adamw'");
    visitor("normuon-lr", optimizer.normuon_lr, "one update moves a weight by 0.2 of this (RMS)");
    visitor("normuon-beta1", optimizer.normuon_beta1, "decay of the momentum");
    visitor("normuon-beta2", optimizer.normuon_beta2, "decay of the row-wise second moment");
    visitor("normuon-weight-decay", optimizer.normuon_weight_decay, "decoupled, times the rate");
    visitor("newton-schulz", optimizer.newton_schulz,
            "NorMuon's products: 'float32', 'bfloat16', or 'auto': bfloat16 on CPUs that have AVX512-BF16");
    visitor("adamw-lr", optimizer.adamw_lr, "of everything else");
    visitor("adamw-beta1", optimizer.adamw_beta1, "decay of the first moment");
    visitor("adamw-beta2", optimizer.adamw_beta2, "decay of the second moment");
    visitor("adamw-eps", optimizer.adamw_eps, "added to the root of the second moment");
    visitor("weight-decay", optimizer.weight_decay, "of AdamW, decoupled; vectors have none");
    visitor("embedding-lr", optimizer.embedding_lr, "AdamW's rate for the embedding; 0: adamw-lr");
    visitor("lazy-embedding", optimizer.lazy_embedding,
            "rows of the embedding without a gradient wait for one, up to 15 steps");
    visitor("warmup-steps", warmup_steps, "learning rates rise linearly over these");
    visitor("decay-start", decay_start, "share of the run after which they fall linearly to 0");
    visitor("clip-norm", clip_norm, "bound on the norm of all gradients together; 0: none");
    visitor("ema-decay", ema_decay, "of a moving average of the weights, kept if better at the end; 0: none");
    visitor.group("Reports (every: '50' is steps, '30s' seconds of training, '0' never)");
    visitor("log-every", log_every, "a line in metrics.jsonl");
    visitor("eval-every", eval_every, "validation loss");
    visitor("eval-tokens", eval_tokens,
            "validation tokens used, from the first on; of several sources in proportion to their weights");
    visitor("eval-seq-len", eval_seq_len, "length of the windows they are cut into");
    visitor("sample-every", sample_every, "a sample of text (needs a tokenizer)");
    visitor("sample-prompt", sample_prompt, "its beginning");
    visitor("sample-tokens", sample_tokens, "its length");
    visitor("checkpoint-every", checkpoint_every, "a checkpoint");
    visitor("keep-checkpoints", keep_checkpoints, "number of newest checkpoints kept");
    visitor.group("Model");
    model.visit(visitor);
  }

  /// Throws Error naming the first setting that cannot be.
  void validate() const;
};

/// "50": every 50 steps. "30s": every 30 seconds of training. "0": never.
class Interval {
 public:
  /// `name` is the setting that `text` was given for, for the message if it is unreadable.
  Interval(const std::string& name, const std::string& text);

  /// Whether a multiple of the interval lies in (last, now].
  bool due(int64_t last_step, int64_t step, double last_seconds, double seconds) const;

 private:
  int64_t steps_ = 0;
  double seconds_ = 0;
};

struct CommandLine {
  TrainConfig config;
  bool resume = false;
  bool profile = false;
  /// The effective settings as TOML, with the help of each as a comment.
  std::string toml;
};

/// Reads flags and the TOML file of --config (flags win; with --resume alone, the run's own config.toml).
/// Returns no value when there is nothing to run: --help was printed, or a mistake, in one line on stderr;
/// then `exit_code` is set.
std::optional<CommandLine> parse_command_line(int argc, const char* const* argv, int& exit_code);

/// The model that a TOML file of settings describes, such as a preset. Error: unreadable, or a setting is
/// unknown or cannot be.
ModelConfig model_config_from_toml(const std::filesystem::path& path);

}  // namespace flashlm

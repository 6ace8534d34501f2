// SPDX-License-Identifier: Apache-2.0
#include "train/trainer.h"

#include <sys/resource.h>
#include <torch/utils.h>

#include <chrono>
#include <fstream>
#include <sstream>

#include "data/error.h"
#include "data/text.h"
#include "model/embeddings.h"
#include "ops/kernels/kernels.h"
#include "train/loss_plot.h"

namespace flashlm {

namespace {

DataMix open_data(const TrainConfig& config) {
  if (!config.data.empty()) return DataMix::open(config.data);
  std::optional<std::filesystem::path> val;
  if (!config.val_tokens.empty()) val = config.val_tokens;
  return DataMix::open_raw(config.tokens, config.model.vocab_size, val, config.val_fraction);
}

NamedParameters named_parameters(const FlashLM& model) {
  NamedParameters parameters;
  for (const auto& p : model->named_parameters()) parameters.emplace_back(p.key(), p.value());
  return parameters;
}

/// 13555969 -> "13,555,969"
std::string with_commas(int64_t value) {
  const std::string digits = std::to_string(value);
  std::string text;
  for (size_t i = 0; i < digits.size(); ++i) {
    if (i > 0 && (digits.size() - i) % 3 == 0) text += ',';
    text += digits[i];
  }
  return text;
}

double peak_memory_mb() {
  rusage usage{};
  getrusage(RUSAGE_SELF, &usage);
  return static_cast<double>(usage.ru_maxrss) / 1024;
}

int64_t token_count(const std::vector<TokenSource>& sources) {
  int64_t count = 0;
  for (const TokenSource& source : sources) count += source.tokens.size();
  return count;
}

/// A line, and one for each source if there are several.
std::string describe(const DataMix& data) {
  std::ostringstream text;
  text << "data      " << with_commas(token_count(data.train)) << " training tokens, "
       << with_commas(token_count(data.val)) << " held out\n";
  if (data.train.size() == 1) return text.str();
  double weights = 0;
  for (const TokenSource& source : data.train) weights += source.weight;
  text.precision(3);
  for (const TokenSource& source : data.train) {
    text << "          " << 100 * source.weight / weights << "% of the rows from " << source.name << ", "
         << with_commas(source.tokens.size()) << " tokens\n";
  }
  return text.str();
}

std::string describe(const Evaluation& evaluation) {
  std::ostringstream text;
  text.precision(4);
  text << std::fixed << evaluation.nats_per_token << " nats/token";
  if (evaluation.bits_per_byte) text << ", " << *evaluation.bits_per_byte << " bits/byte";
  return text.str();
}

}  // namespace

Trainer::Trainer(const CommandLine& line)
    : config_(line.config),
      run_(line.config.out),
      data_(open_data(line.config)),
      curriculum_(parse_curriculum(line.config.curriculum)),
      log_every_("log-every", line.config.log_every),
      eval_every_("eval-every", line.config.eval_every),
      sample_every_("sample-every", line.config.sample_every),
      checkpoint_every_("checkpoint-every", line.config.checkpoint_every) {
  const auto checkpoints = run_.checkpoint_files();
  if (!line.resume && (!checkpoints.empty() || std::filesystem::exists(run_.model()))) {
    throw Error(config_.out + " already holds a run; continue it with --resume, or choose another --out");
  }
  if (line.resume && checkpoints.empty()) {
    throw Error("there is no checkpoint in " + run_.checkpoints().string() +
                " to resume from; leave out --resume");
  }
  if (data_.tokenizer) {
    config_.model.vocab_size = data_.tokenizer->vocab_size();
    token_bytes_ = token_bytes(*data_.tokenizer);
  }
  if (config_.threads > 0) at::set_num_threads(static_cast<int>(config_.threads));
  std::filesystem::path start;
  if (line.resume) {
    start = checkpoints.back();
  } else if (!config_.init.empty()) {
    start = RunFolder::weights(config_.init);
  }
  build_model(start, line.resume);
  if (!line.resume && !config_.init_embedding.empty()) init_embedding(model_, config_.init_embedding);
  const NamedParameters parameters = named_parameters(model_);
  optimizers_ = std::make_unique<Optimizers>(parameters, config_.optimizer);
  if (line.profile) profile_ = std::make_unique<Profile>();
  if (config_.ema_decay > 0) ema_ = std::make_unique<Ema>(parameters, config_.ema_decay);
  sampler_ = std::make_unique<Prefetcher>(
      BatchSampler(data_.train, windows_named(config_.windows), static_cast<uint64_t>(config_.seed)));
  generator_ = at::make_generator<at::CPUGeneratorImpl>(static_cast<uint64_t>(config_.seed));
  if (line.resume) {
    load_checkpoint(checkpoints.back(), checkpointed());
    checkpointed_step_ = done_.step;
  }

  std::filesystem::create_directories(run_.checkpoints());
  write_file(run_.config(), line.toml);
  if (data_.tokenizer) write_file(run_.tokenizer(), data_.tokenizer->serialized());
  metrics_ = std::make_unique<MetricsLog>(run_.metrics(), line.resume ? done_.step : -1);
  print_header();
}

/// Of the shape of the model in the file `start`, if there is one, and with its weights unless a checkpoint
/// is to bring them; else with weights that torch's generator draws, and the training tokens' frequencies.
void Trainer::build_model(const std::filesystem::path& start, bool resume) {
  ModelConfig& config = config_.model;
  torch::manual_seed(config_.seed);
  if (!start.empty()) {
    const bool classes_unknown = config.head == "hierarchical" && config.classes == 0;
    FlashLM from{nullptr};
    if (!resume || classes_unknown) from = load_any_model(start);  // a checkpoint is read again, whole, later
    if (from && from->config().packed) {
      throw Error(start.string() + " is packed, for inference; start from the model that it was made from");
    }
    if (classes_unknown) config.classes = from->config().classes;
    model_ = FlashLM(config);
    if (!resume) load_weights(model_, from->named_weights(), start.string());
    return;
  }
  const std::vector<int64_t> counts = word_counts(data_.train);
  const WordClasses classes =
      config_.class_file.empty() ? default_classes(config, counts) : WordClasses::load(config_.class_file);
  if (config.classes == 0 && config.head == "hierarchical") config.classes = classes.count();
  model_ = FlashLM(config);
  model_->head().initialize(classes, counts);
}

void Trainer::print_header() const {
  std::ostringstream text;
  text.precision(2);
  const int64_t count = model_->parameter_count();
  text << "model     " << with_commas(count) << " parameters (" << std::fixed
       << static_cast<double>(count) * 1e-6 << "M), vocabulary " << with_commas(config_.model.vocab_size)
       << "\n"
       << describe(data_) << "machine   " << at::get_num_threads() << " threads, " << kernels::isa()
       << " kernels\n"
       << optimizers_->summary();
  if (!config_.init_embedding.empty()) {
    text << "embedding from " << config_.init_embedding << ", not trained in the first " << std::defaultfloat
         << 100 * config_.freeze_embedding << " % of the run\n";
  }
  if (done_.step > 0) text << "resuming  from step " << done_.step << "\n";
  text << "run       " << config_.out << "; Ctrl-C saves and stops, --resume continues";
  std::printf("%s\n", text.str().c_str());
}

/// A frozen embedding, and with it a tied head, gets no gradient: AdamW then leaves it out, decay included,
/// and its moments begin when it thaws.
bool Trainer::embedding_frozen(double fraction) const {
  return !config_.init_embedding.empty() && fraction < config_.freeze_embedding;
}

double Trainer::progress() const {
  double done = 0;
  if (config_.steps > 0) done = static_cast<double>(done_.step) / static_cast<double>(config_.steps);
  if (config_.max_minutes > 0) done = std::max(done, done_.train_seconds / (60 * config_.max_minutes));
  return done;
}

bool Trainer::run(const volatile std::sig_atomic_t& stop) {
  if (progress() >= 1 && std::filesystem::exists(run_.model())) {
    progress_line_.message("this run is finished: " + run_.model().string());
    return true;
  }
  if (done_.step == 0) evaluate_now();
  while (progress() < 1) {
    if (stop) {
      if (checkpointed_step_ != done_.step) checkpoint_now();
      plot();
      if (profile_) progress_line_.message(profile_->report());
      progress_line_.message("stopped at step " + std::to_string(done_.step) +
                             " and saved; continue with: train_flashlm --out " + config_.out + " --resume");
      return false;
    }
    const Progressed before = done_;
    train_step();
    report(before);
  }
  finish();
  return true;
}

/// `chosen` are the positions to train, undefined for all; `count` is the number of targets, trained or not.
Trainer::Batch Trainer::next_batch(int64_t rows, int64_t seq_len) {
  const auto positions = static_cast<size_t>(rows * seq_len);
  Batch batch;
  batch.inputs = torch::empty({rows, seq_len}, at::kLong);
  batch.targets = torch::empty_like(batch.inputs);
  batch.count = sampler_->next(rows, seq_len, {batch.inputs.mutable_data_ptr<int64_t>(), positions},
                               {batch.targets.mutable_data_ptr<int64_t>(), positions});
  sampler_->prefetch(rows, seq_len);
  const auto trained = static_cast<int64_t>(config_.position_fraction * static_cast<double>(batch.count));
  if (trained < batch.count) {
    batch.chosen =
        torch::randperm(batch.count, generator_, at::kLong).slice(0, 0, std::max<int64_t>(1, trained));
    if (batch.count < rows * seq_len) {
      batch.chosen =
          batch.targets.flatten().ne(kIgnoredTarget).nonzero().flatten().index_select(0, batch.chosen);
    }
  }
  return batch;
}

void Trainer::train_step() {
  const Profile::Step profiled(profile_.get());
  const auto start = std::chrono::steady_clock::now();
  // Steps count from 1 in the schedules, as in v3; a time budget is read at the start of the step.
  Progressed next = done_;
  ++next.step;
  const double by_steps =
      config_.steps > 0 ? static_cast<double>(next.step) / static_cast<double>(config_.steps) : 0;
  const double fraction = std::min(1.0, std::max(progress(), by_steps));
  const Phase& phase = phase_at(curriculum_, fraction);
  lr_scale_ = wsd(fraction, next.step, config_.warmup_steps, config_.decay_start);
  optimizers_->set_lr_scale(lr_scale_);
  model_->embedding.set_requires_grad(!embedding_frozen(fraction));
  {
    const Profile::Timer timer(profile_.get(), "zero_grad");
    optimizers_->zero_grad();
  }

  const int64_t batch = config_.batch_size, seq_len = phase.seq_len;
  double nll_mean = 0;
  for (int64_t i = 0; i < phase.grad_accum; ++i) {
    std::optional<Profile::Timer> timer(std::in_place, profile_.get(), "data");
    const auto [inputs, targets, chosen, count] = next_batch(batch, seq_len);
    next.tokens += count;
    timer.reset();
    at::Tensor loss, nll;
    try {
      std::tie(loss, nll) = model_->loss(inputs, targets, {config_.label_smoothing, config_.z_loss}, chosen);
    } catch (const c10::ValueError&) {  // a head that meets what is not finite
      nll_mean = std::numeric_limits<double>::quiet_NaN();
      break;
    }
    (loss / static_cast<double>(phase.grad_accum)).backward();
    nll_mean += nll.item<double>() / static_cast<double>(phase.grad_accum);
  }
  if (!std::isfinite(nll_mean)) {
    throw Error("the loss is " + std::to_string(nll_mean) + " at step " + std::to_string(next.step) +
                "; lower --normuon-lr and --adamw-lr, then --resume from the last checkpoint");
  }
  const double max_norm = config_.clip_norm > 0 ? config_.clip_norm : std::numeric_limits<double>::infinity();
  {
    const Profile::Timer timer(profile_.get(), "clip");
    grad_norm_ = clip_gradients(model_->parameters(), max_norm);
  }
  {
    const Profile::Timer timer(profile_.get(), "optimizers");
    optimizers_->step();
  }
  if (ema_) {
    const Profile::Timer timer(profile_.get(), "ema");
    ema_->update();
  }

  const std::chrono::duration<double> seconds = std::chrono::steady_clock::now() - start;
  const double tokens = static_cast<double>(next.tokens - done_.tokens);
  // Smoothed for the eye only: about the last ten steps.
  const auto smooth = [&](double& value, double now) {
    value = done_.step == 0 ? now : 0.9 * value + 0.1 * now;
  };
  smooth(loss_, nll_mean);
  smooth(tokens_per_s_, tokens / seconds.count());
  next.train_seconds += seconds.count();
  next.nll_sum += nll_mean;
  ++next.nll_steps;
  done_ = next;
}

Progress Trainer::reading() const {
  Progress p;
  p.fraction = std::min(1.0, progress());
  p.step = done_.step;
  p.loss = loss_;
  if (evaluation_) {
    p.val_loss = evaluation_->nats_per_token;
    p.bits_per_byte = evaluation_->bits_per_byte;
  }
  p.tokens_per_s = tokens_per_s_;
  p.elapsed_s = done_.train_seconds;
  p.eta_s = p.fraction > 0 ? done_.train_seconds * (1 - p.fraction) / p.fraction : -1;
  return p;
}

void Trainer::report(const Progressed& before) {
  const auto due = [&](const Interval& every) {
    return every.due(before.step, done_.step, before.train_seconds, done_.train_seconds);
  };
  const bool ended = progress() >= 1;  // finish() evaluates, samples and saves then
  if (due(eval_every_) && !ended) {
    evaluate_now();
  } else if (due(log_every_) && !ended) {
    write_metrics({});
  }
  progress_line_.update(reading());
  if (due(sample_every_) && !ended) sample_now();
  if (due(checkpoint_every_) && !ended) checkpoint_now();
}

Evaluation Trainer::held_out() {
  return evaluate(model_, data_.val, config_.eval_seq_len, config_.eval_tokens, token_bytes_);
}

void Trainer::evaluate_now() {
  evaluation_ = held_out();
  write_metrics(evaluation_);
  plot();
}

void Trainer::write_metrics(const std::optional<Evaluation>& evaluation) {
  Metrics m;
  m.step = done_.step;
  m.tokens = done_.tokens;
  m.train_seconds = done_.train_seconds;
  m.lr = lr_scale_;
  if (evaluation) {
    m.val_loss = evaluation->nats_per_token;
    m.val_bits_per_byte = evaluation->bits_per_byte;
  }
  if (done_.nll_steps > 0) {
    m.loss = done_.nll_sum / static_cast<double>(done_.nll_steps);
    m.grad_norm = grad_norm_;
    m.tokens_per_s = tokens_per_s_;
  }
  metrics_->write(m);
  done_.nll_sum = 0;
  done_.nll_steps = 0;
}

void Trainer::sample_now() {
  if (!data_.tokenizer || config_.sample_tokens == 0) return;
  const Tokenizer& tokenizer = *data_.tokenizer;
  std::vector<int32_t> prompt = tokenizer.encode(config_.sample_prompt);
  if (prompt.empty()) prompt = {tokenizer.end_of_text()};
  SamplingOptions options;
  options.seed = static_cast<uint64_t>(config_.seed);
  auto tokens = generate(model_, prompt, config_.sample_tokens, tokenizer.end_of_text(), options);
  tokens.insert(tokens.begin(), prompt.begin(), prompt.end());
  const std::string text = valid_utf8(tokenizer.decode(tokens));
  std::ofstream(run_.samples(), std::ios::app) << "step " << done_.step << ": " << text << "\n\n";
  progress_line_.message("step " + std::to_string(done_.step) + " writes: " + text);
}

void Trainer::checkpoint_now() {
  save_checkpoint(run_.checkpoint(done_.step), checkpointed());
  checkpointed_step_ = done_.step;
  const auto files = run_.checkpoint_files();
  for (size_t i = 0; i + config_.keep_checkpoints < files.size(); ++i) std::filesystem::remove(files[i]);
}

void Trainer::save_and_sample() {
  save_model(model_, run_.model());
  sample_now();
}

void Trainer::finish() {
  optimizers_->catch_up();
  evaluate_now();
  if (checkpointed_step_ != done_.step) checkpoint_now();
  progress_line_.update(reading());
  progress_line_.finish();
  bool average_is_better = false;
  if (ema_) {
    const Ema::Swap averaged(*ema_);
    const Evaluation of_average = held_out();
    average_is_better = of_average.nats_per_token < evaluation_->nats_per_token;
    progress_line_.message("moving average: " + describe(of_average) +
                           (average_is_better ? ", kept" : ", not kept"));
    if (average_is_better) {
      evaluation_ = of_average;
      save_and_sample();
    }
  }
  if (!average_is_better) save_and_sample();
  std::ostringstream text;
  text.precision(0);
  text << "trained   " << done_.step << " steps, " << with_commas(done_.tokens) << " tokens in " << std::fixed
       << done_.train_seconds << " s; peak memory " << peak_memory_mb() << " MB\n"
       << "held out  " << describe(*evaluation_) << "\n"
       << "saved     " << run_.model().string() << ", " << run_.plot().string() << ", "
       << run_.metrics().string();
  progress_line_.message(text.str());
  if (profile_) progress_line_.message(profile_->report());
}

void Trainer::plot() const {
  LossPlot plot;
  plot.title = "FlashLM, " + with_commas(model_->parameter_count()) + " parameters: " + config_.out;
  plot.x_label = "training time (s)";
  for (const Metrics& m : metrics_->all()) {
    if (m.loss) plot.train.push_back({m.train_seconds, *m.loss});
    if (m.val_loss) plot.validation.push_back({m.train_seconds, *m.val_loss});
  }
  if (evaluation_ && evaluation_->bits_per_byte) {
    plot.bits_per_byte_per_nat = *evaluation_->bits_per_byte / evaluation_->nats_per_token;
  }
  write_file(run_.plot(), loss_plot_svg(plot));
}

}  // namespace flashlm

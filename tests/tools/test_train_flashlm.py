# SPDX-License-Identifier: Apache-2.0
"""train_flashlm as a user runs it."""

import json
import os
import resource
import shutil
import signal
import subprocess
import time

import pytest
from programs import ROOT, program_path, run, succeed


def metrics(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def without_time(lines):
    """What does not depend on the clock: every loss to its last bit."""
    return [{key: line[key] for key in ("step", "tokens", "loss", "val_loss", "val_bits_per_byte", "lr", "grad_norm")}
            for line in lines]


def test_leaves_a_whole_run(finished_run):
    for name in ("model.safetensors", "tokenizer.model", "metrics.jsonl", "loss.svg", "config.toml", "samples.txt"):
        assert (finished_run / name).stat().st_size > 0, name
    checkpoints = sorted(p.name for p in (finished_run / "checkpoints").iterdir())
    assert checkpoints == ["step-000000020.safetensors", "step-000000030.safetensors"]
    lines = metrics(finished_run)
    assert [line["step"] for line in lines] == list(range(31))
    assert lines[-1]["val_loss"] < lines[0]["val_loss"] - 0.5
    assert lines[-1]["val_bits_per_byte"] < lines[0]["val_bits_per_byte"]
    # 4 sequences: 14 steps of 16 tokens, then 16 steps of two micro-batches of 32.
    assert lines[-1]["tokens"] == 4 * (14 * 16 + 16 * 2 * 32)
    assert lines[2]["lr"] == 0.5 and lines[30]["lr"] == 0


def start(*args):
    return subprocess.Popen([program_path("train_flashlm"), *map(str, args)], stdout=subprocess.PIPE,
                            stderr=subprocess.PIPE, text=True, errors="replace")


def wait_for_step(process, folder, step):
    """Until the run has logged `step`, or has ended."""
    while process.poll() is None:
        log = folder / "metrics.jsonl"
        if log.exists() and any(line["step"] >= step for line in metrics_so_far(log)):
            return
        time.sleep(0.01)


def metrics_so_far(log):
    lines = log.read_text().split("\n")[:-1]  # what follows the last line end is being written
    return [json.loads(line) for line in lines]


# Long enough not to end before the signal arrives.
LONG = ("--steps", "400", "--checkpoint-every", "10", "--sample-every", "0")


@pytest.fixture(scope="module")
def unbroken(dataset, tiny_config, tmp_path_factory):
    out = tmp_path_factory.mktemp("unbroken") / "run"
    succeed("train_flashlm", "--config", tiny_config, "--data", dataset, "--out", out, *LONG)
    return out


@pytest.mark.parametrize("how, code", [(signal.SIGINT, 130), (signal.SIGTERM, 130), (signal.SIGKILL, -9)])
def test_resume_continues_bit_for_bit(how, code, unbroken, dataset, tiny_config, tmp_path):
    out = tmp_path / "run"
    process = start("--config", tiny_config, "--data", dataset, "--out", out, *LONG)
    wait_for_step(process, out, 25)
    process.send_signal(how)
    stdout, stderr = process.communicate(timeout=60)
    assert process.returncode == code, stderr
    assert metrics(out)[-1]["step"] < 400, "the run ended before the signal came: make it longer"
    if code == 130:
        assert "continue with: train_flashlm" in stdout
    assert not list(out.rglob("*.tmp-*")) or code == -9
    succeed("train_flashlm", "--out", out, "--resume")  # its own config.toml
    assert without_time(metrics(out)) == without_time(metrics(unbroken))
    assert (out / "model.safetensors").read_bytes() == (unbroken / "model.safetensors").read_bytes()


@pytest.fixture(scope="module")
def short_documents(dataset, tmp_path_factory):
    """Prepared with the tokenizer of `dataset`: thirty texts of very unequal length, some shorter than a window."""
    folder = tmp_path_factory.mktemp("short")
    for number in range(30):
        (folder / f"{number:02}.txt").write_text("the river must protect peace and trade. " * (1 + number % 7))
    out = folder / "data"
    succeed("flashlm", "prepare", folder, "--out", out, "--tokenizer", dataset / "tokenizer.model",
            "--val-fraction", "0.2")
    return out


@pytest.mark.parametrize("windows", ["random", "shuffled", "documents"])
def test_several_sources_train_and_resume_with_every_kind_of_window(windows, dataset, short_documents, tiny_config,
                                                                    tmp_path):
    args = ("--config", tiny_config, "--data", f"{dataset}=3,{short_documents}", "--windows", windows)
    text = succeed("train_flashlm", *args, "--out", tmp_path / "whole")
    assert f"75% of the rows from {dataset}" in text and f"25% of the rows from {short_documents}" in text
    lines = metrics(tmp_path / "whole")
    assert lines[-1]["val_loss"] < lines[0]["val_loss"] - 0.5
    assert lines[-1]["val_bits_per_byte"] < lines[0]["val_bits_per_byte"]
    # Places that are only filled up are no tokens.
    places = 4 * (14 * 16 + 16 * 2 * 32)
    assert places / 2 < lines[-1]["tokens"] < places if windows == "documents" else lines[-1]["tokens"] == places
    # From a checkpoint inside an epoch, with nothing but the run folder.
    part = tmp_path / "part"
    shutil.copytree(tmp_path / "whole", part)
    (part / "model.safetensors").unlink()
    (part / "checkpoints" / "step-000000030.safetensors").unlink()
    config = part / "config.toml"
    config.write_text(config.read_text().replace(str(tmp_path / "whole"), str(part)))
    if windows != "random":
        refuse("must be of --windows random", "--out", part, "--resume", "--windows", "random")
    succeed("train_flashlm", "--out", part, "--resume")
    assert without_time(metrics(part)) == without_time(lines)
    assert (part / "model.safetensors").read_bytes() == (tmp_path / "whole" / "model.safetensors").read_bytes()


@pytest.mark.parametrize("head", [(), ("--head", "hierarchical"), ("--head", "adaptive", "--cutoffs", "40", "120")])
def test_every_head_ignores_what_fills_up_a_short_document(head, dataset, short_documents, tiny_config, tmp_path):
    # Every window of 256 is filled up, most of it: a head that learnt to repeat the last token would do nothing else.
    succeed("train_flashlm", "--config", tiny_config, "--data", short_documents, "--windows", "documents",
            "--curriculum", "0:256:1", "--out", tmp_path / "run", *head)
    lines = metrics(tmp_path / "run")
    assert lines[-1]["tokens"] < 30 * 4 * 256 / 2
    assert lines[-1]["val_loss"] < lines[0]["val_loss"] - 0.5
    assert lines[0]["loss"] is None and lines[1]["loss"] == pytest.approx(lines[0]["val_loss"], abs=0.3)


def test_validation_takes_every_source_by_its_weight(dataset, short_documents, tiny_config, tmp_path):
    args = ("--config", tiny_config, "--steps", 1, "--eval-tokens", 600)
    losses = {}
    for name, data in {"long": dataset, "short": short_documents, "both": f"{dataset}=2,{short_documents}"}.items():
        run_folder = tmp_path / name
        tokens = {"long": 400, "short": 200, "both": 600}[name]
        succeed("train_flashlm", *args[:-1], tokens, "--data", data, "--out", run_folder, "--head-bias", "false")
        losses[name] = metrics(run_folder)[0]["val_loss"]
    # Before any step the three models are the same: the loss is that of 399 and of 199 tokens.
    assert losses["long"] != losses["short"]
    assert losses["both"] == pytest.approx((399 * losses["long"] + 199 * losses["short"]) / 598, rel=1e-5)


def test_second_start_does_not_touch_a_run(finished_run, dataset, tiny_config):
    before = (finished_run / "model.safetensors").read_bytes()
    done = run("train_flashlm", "--config", tiny_config, "--data", dataset, "--out", finished_run)
    assert done.returncode == 1
    assert "already holds a run; continue it with --resume, or choose another --out" in done.stderr
    assert (finished_run / "model.safetensors").read_bytes() == before


def test_profile_accounts_for_a_step(dataset, tiny_config, tmp_path):
    text = succeed("train_flashlm", "--config", tiny_config, "--data", dataset, "--out", tmp_path / "run", "--profile")
    table = text[text.index("ms per step"):].splitlines()
    rows = {line[:14].strip(): [float(word.rstrip("%")) for word in line[14:].split()] for line in table[1:]}
    assert set(rows) == {"zero_grad", "data", "embedding", "mixer", "glu", "head", "gradient sums", "clip", "optimizers",
                         "ema", "other", "step"}
    whole = rows.pop("step")
    for name, (forward, backward, share) in rows.items():
        assert forward >= 0 and share == pytest.approx(100 * (forward + backward) / whole[0], abs=1), name
    for name in ("embedding", "mixer", "glu", "head"):
        assert rows[name][0] > 0 and rows[name][1] > 0, name
    # Evaluations and samples run the same modules: counted too, they would leave less than nothing for "other".
    assert sum(share for _, _, share in rows.values()) == pytest.approx(100, abs=1)


@pytest.mark.parametrize("suffix", [".npy", ".bin"])
def test_raw_token_files(suffix, tiny_config, tmp_path):
    numpy = pytest.importorskip("numpy")
    # A sequence that is easy to learn: each token is followed by the next one.
    tokens = (numpy.arange(6000) % 50).astype(numpy.uint16)
    path = tmp_path / ("tokens" + suffix)
    numpy.save(path, tokens) if suffix == ".npy" else tokens.tofile(path)
    out = tmp_path / "run"
    succeed("train_flashlm", "--config", tiny_config, "--tokens", path, "--vocab-size", 50, "--out", out, "--steps", 60)
    lines = metrics(out)
    assert lines[-1]["val_loss"] < lines[0]["val_loss"] - 1
    assert lines[-1]["val_bits_per_byte"] is None  # nobody knows what text these ids stand for


HEADS = {
    "hierarchical": ("--head", "hierarchical", "--head-bias", "true"),
    "hierarchical_untied": ("--head", "hierarchical", "--tied", "false", "--classes", "9"),
    "adaptive": ("--head", "adaptive", "--cutoffs", "40", "120", "--head-bias", "true"),
    "full_bfloat16": ("--head-precision", "bfloat16", "--head-bias", "true"),
}


@pytest.mark.parametrize("name", HEADS)
def test_every_head_trains_resumes_and_is_used(name, dataset, tiny_config, tmp_path):
    args = ("--config", tiny_config, "--data", dataset, *HEADS[name])
    succeed("train_flashlm", *args, "--out", tmp_path / "whole", "--label-smoothing", "0.1", "--z-loss", "1e-4")
    lines = metrics(tmp_path / "whole")
    assert lines[-1]["val_loss"] < lines[0]["val_loss"] - 0.3
    # From a checkpoint on, with nothing but the run folder.
    shutil.copytree(tmp_path / "whole", tmp_path / "part")
    (tmp_path / "part" / "model.safetensors").unlink()
    (tmp_path / "part" / "checkpoints" / "step-000000030.safetensors").unlink()
    config = tmp_path / "part" / "config.toml"
    config.write_text(config.read_text().replace(str(tmp_path / "whole"), str(tmp_path / "part")))
    succeed("train_flashlm", "--out", tmp_path / "part", "--resume")
    assert without_time(metrics(tmp_path / "part")) == without_time(lines)
    whole, part = (tmp_path / run / "model.safetensors" for run in ("whole", "part"))
    assert whole.read_bytes() == part.read_bytes()
    result = json.loads(succeed("flashlm", "evaluate", tmp_path / "whole", "--data", dataset, "--json",
                                "--max-tokens", 512, "--seq-len", 32))
    assert result["nats_per_token"] == pytest.approx(lines[-1]["val_loss"], abs=1e-4)
    assert succeed("flashlm", "generate", tmp_path / "whole", "--prompt", "the people", "--tokens", 8, "--top-p", 0.9)
    succeed("flashlm", "export", tmp_path / "whole")


def test_classes_from_a_file_and_weights_from_another_run(dataset, tiny_config, tmp_path):
    classes = tmp_path / "classes.txt"
    succeed("flashlm", "classes", "--data", dataset, "--method", "exchange", "--count", 11, "--out", classes)
    args = ("--config", tiny_config, "--data", dataset, "--head", "hierarchical")
    first, second = tmp_path / "first", tmp_path / "second"
    succeed("train_flashlm", *args, "--class-file", classes, "--out", first)
    classes.unlink()  # the run has them
    succeed("train_flashlm", *args, "--init", first, "--out", second, "--steps", 1)
    assert metrics(second)[0]["val_loss"] == metrics(first)[-1]["val_loss"]
    refuse("has no weight 'head.word_weight'", *args, "--tied", "false", "--init", first, "--out", tmp_path / "third")
    full, back = tmp_path / "full.safetensors", tmp_path / "back"
    assert "full head, from the hierarchical head" in succeed("flashlm", "convert-head", first, "--head", "full", "--out", full)
    succeed("train_flashlm", *args[:-1], "full", "--head-bias", "true", "--tied", "false", "--init", full, "--out", back,
            "--steps", 30)
    lines = metrics(back)
    assert lines[0]["val_loss"] < metrics(first)[0]["val_loss"] and lines[-1]["val_loss"] < lines[0]["val_loss"]


def test_v3_preset_has_v3s_size(tmp_path):
    numpy = pytest.importorskip("numpy")
    numpy.random.default_rng(0).integers(0, 50257, 2000).astype(numpy.uint16).tofile(tmp_path / "tokens.npy")
    out = succeed("train_flashlm", "--config", ROOT / "train/configs/v3.toml", "--tokens", tmp_path / "tokens.npy",
                  "--vocab-size", 50257, "--out", tmp_path / "run", "--steps", 1, "--eval-tokens", 64)
    assert "13,555,969 parameters (13.56M)" in out
    assert "590,336 parameters" in out  # NorMuon's share, as in v3


# ---- mistakes: one line, what and how to mend it, exit code 1 ----


def refuse(words, *args, **options):
    done = run("train_flashlm", *args, **options)
    lines = [line for line in done.stderr.splitlines() if line]
    assert done.returncode == 1, done.stdout + done.stderr
    assert len(lines) == 1 and words in lines[0], done.stderr


def test_missing_data(tiny_config, tmp_path):
    refuse("flashlm prepare", "--config", tiny_config, "--data", tmp_path / "nowhere", "--out", tmp_path / "run")
    refuse("nowhere.npy", "--config", tiny_config, "--tokens", tmp_path / "nowhere.npy", "--vocab-size", 50,
           "--out", tmp_path / "run")
    refuse("give either --data DIR", "--config", tiny_config, "--out", tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_sources_that_cannot_be_mixed(dataset, corpus, tiny_config, tmp_path):
    args = ("--config", tiny_config, "--out", tmp_path / "run", "--data")
    refuse("must be a weight above 0, got '-1'", *args, f"{dataset}=-1")
    refuse("nowhere has no tokenizer.model", *args, f"{dataset},nowhere")
    succeed("flashlm", "prepare", corpus, "--out", tmp_path / "other", "--tokenizer", "sentencepiece:290")
    refuse("was not made with the tokenizer of", *args, f"{dataset},{tmp_path / 'other'}")
    numpy = pytest.importorskip("numpy")
    (numpy.arange(6000) % 50).astype(numpy.uint16).tofile(tmp_path / "tokens.bin")
    refuse("does not know where its documents end", *args[:-1], "--tokens", tmp_path / "tokens.bin", "--vocab-size", 50,
           "--windows", "documents")
    assert not (tmp_path / "run").exists()


def test_several_raw_token_files(tiny_config, tmp_path):
    numpy = pytest.importorskip("numpy")
    for name, shift in (("a.bin", 0), ("b.bin", 25)):
        (numpy.arange(6000) % 25 + shift).astype(numpy.uint16).tofile(tmp_path / name)
    succeed("train_flashlm", "--config", tiny_config, "--tokens", f"{tmp_path / 'a.bin'},{tmp_path / 'b.bin'}=2",
            "--vocab-size", 50, "--windows", "shuffled", "--out", tmp_path / "run", "--steps", 60)
    lines = metrics(tmp_path / "run")
    assert lines[-1]["val_loss"] < lines[0]["val_loss"] - 1


@pytest.mark.parametrize("line, words", [
    ("no-such-key = 1", "no-such-key"),
    ("steps = many", "steps"),
    ('curriculum = "0:64"', "curriculum"),
    ('eval-every = "soon"', "--eval-every must be a number of steps such as 50, or of seconds such as 30s, got 'soon'"),
    ("groups = 5", "groups must divide d-model = 32, got 5"),
    ('quantizer = "binary"', "quantizer must be 'absmean' or 'threshold', got 'binary'"),
    ('windows = "epochs"', "--windows must be 'random', 'shuffled' or 'documents', got 'epochs'"),
    ("position-fraction = 0", "--position-fraction must be in (0, 1], got 0"),
    ("steps = -1", "--steps must be >= 0, got -1"),
    ('matrix-optimizer = "sgd"', "sgd"),
    ('head = "tree"', "head must be 'full', 'hierarchical' or 'adaptive', got 'tree'"),
    ("classes = 1000000", "classes must be in [0, V]"),
    ('class-file = "nowhere.txt"', "nowhere.txt"),
    ('init = "nowhere"', "there is no run or model nowhere"),
])
def test_bad_settings(line, words, dataset, tiny_config, tmp_path):
    key = line.split(" =")[0]
    kept = [text for text in tiny_config.read_text().splitlines() if not text.startswith(key + " =")]
    (tmp_path / "bad.toml").write_text("\n".join([*kept, line]) + "\n")
    refuse(words, "--config", tmp_path / "bad.toml", "--data", dataset, "--out", tmp_path / "run")


def test_missing_config_and_unknown_flag(dataset, tmp_path):
    refuse("there is no config file", "--config", tmp_path / "nowhere.toml", "--data", dataset)
    refuse("--no-such-flag", "--no-such-flag", "1")


def test_token_beyond_the_vocabulary(tiny_config, tmp_path):
    numpy = pytest.importorskip("numpy")
    numpy.arange(6000).astype(numpy.uint16).tofile(tmp_path / "tokens.bin")
    refuse("--vocab-size", "--config", tiny_config, "--tokens", tmp_path / "tokens.bin", "--vocab-size", 50,
           "--out", tmp_path / "run")


def test_corrupt_shard(dataset, tiny_config, tmp_path):
    shutil.copytree(dataset, tmp_path / "data")
    shard = tmp_path / "data" / "train.tokens"
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    refuse("train.tokens", "--config", tiny_config, "--data", tmp_path / "data", "--out", tmp_path / "run")


@pytest.fixture
def copied_run(finished_run, tmp_path):
    shutil.copytree(finished_run, tmp_path / "run")
    (tmp_path / "run" / "model.safetensors").unlink()
    return tmp_path / "run"


def test_truncated_checkpoint(copied_run):
    newest = copied_run / "checkpoints" / "step-000000030.safetensors"
    whole = newest.read_bytes()
    for size in (0, 4, 100, len(whole) // 2, len(whole) - 1):
        newest.write_bytes(whole[:size])
        refuse("damaged or not a safetensors file", "--out", copied_run, "--resume")
    flipped = bytearray(whole)
    flipped[-1] ^= 1
    newest.write_bytes(flipped)
    refuse("checksum does not match", "--out", copied_run, "--resume")
    newest.unlink()
    succeed("train_flashlm", "--out", copied_run, "--resume")  # from the one before


def test_resume_needs_a_checkpoint_of_the_same_model(copied_run, dataset, tiny_config, tmp_path):
    refuse("other settings", "--out", copied_run, "--resume", "--d-inner", 86)
    refuse("to resume from; leave out --resume", "--config", tiny_config, "--data", dataset, "--out",
           tmp_path / "new", "--resume")


def limit_file_size():
    """Writing past 100 kB fails, as on a full disk, but with EFBIG: works without root."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))


def test_disk_that_takes_no_more(dataset, tiny_config, tmp_path):
    out = tmp_path / "run"
    refuse("cannot write", "--config", tiny_config, "--data", dataset, "--out", out, preexec_fn=limit_file_size)
    assert not list(out.rglob("*.safetensors")) and not list(out.rglob("*.tmp-*"))


def test_full_disk_keeps_the_last_checkpoint(dataset, tiny_config, tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=900k", "tmpfs", disk], capture_output=True).returncode != 0:
        pytest.skip("only root can mount a small disk")
    try:
        out = disk / "run"
        args = ("--config", tiny_config, "--data", dataset, "--out", out, "--keep-checkpoints", 100)
        refuse("No space left on device", *args)
        left = sorted((out / "checkpoints").glob("*.safetensors"))
        assert left and not list(out.rglob("*.tmp-*"))
        assert os.statvfs(disk).f_bavail > 0
        succeed("flashlm", "generate", out, "--tokens", 4)
    finally:
        subprocess.run(["umount", disk], check=True)

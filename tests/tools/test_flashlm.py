# SPDX-License-Identifier: Apache-2.0
"""flashlm prepare, classes, generate, evaluate and export as a user runs them."""

import json
import os
import pathlib
import shutil
import signal
import struct
import subprocess
import sys

import pytest
from programs import BUILD, program_path, run, succeed

OPS = pathlib.Path(os.environ.get("FLASHLM_OPS_LIB", BUILD / "ops" / "libflashlm_ops.so"))


def refuse(words, *args):
    done = run("flashlm", *args)
    lines = [line for line in done.stderr.splitlines() if line]
    assert done.returncode == 1, done.stdout + done.stderr
    assert len(lines) == 1 and words in lines[0], done.stderr


# ---- prepare ----


def test_prepare_is_reproducible_and_idempotent(corpus, dataset, tmp_path):
    again = tmp_path / "data"
    args = ("prepare", corpus, "--out", again, "--tokenizer", "sentencepiece:300", "--val-fraction", "0.1")
    succeed("flashlm", *args)
    for name in ("tokenizer.model", "train.tokens", "val.tokens"):
        assert (again / name).read_bytes() == (dataset / name).read_bytes()
    stamp = (again / "train.tokens").stat().st_mtime_ns
    assert "up to date" in succeed("flashlm", *args)
    assert (again / "train.tokens").stat().st_mtime_ns == stamp


def test_prepare_refuses(tmp_path):
    refuse("nowhere", "prepare", tmp_path / "nowhere", "--out", tmp_path / "data")
    (tmp_path / "empty").mkdir()
    refuse(str(tmp_path / "empty"), "prepare", tmp_path / "empty", "--out", tmp_path / "data")
    (tmp_path / "empty" / "a.txt").write_text("")
    refuse("empty", "prepare", tmp_path / "empty", "--out", tmp_path / "data")
    (tmp_path / "short.txt").write_text("a few words are no corpus\n")
    refuse("the text yields at most", "prepare", tmp_path / "short.txt", "--out", tmp_path / "data")
    assert not (tmp_path / "data" / "train.tokens").exists()


# ---- classes ----


def read_classes(path):
    header, *lines = path.read_text().splitlines()
    classes = [[int(word) for word in line.split()] for line in lines]
    assert header == f"flashlm-classes 1 {sum(map(len, classes))} {len(classes)}"
    assert sorted(word for words in classes for word in words) == list(range(sum(map(len, classes))))
    return classes


@pytest.mark.parametrize("method", ["frequency", "exchange", "kmeans"])
def test_classes(dataset, finished_run, method, tmp_path):
    args = ("classes", "--data", dataset, "--method", method, "--run", finished_run, "--count", 12)
    said = succeed("flashlm", *args, "--out", tmp_path / "classes.txt")
    classes = read_classes(tmp_path / "classes.txt")
    sizes = list(map(len, classes))
    assert sum(sizes) == 300 and len(sizes) == 12
    assert said.startswith(f"{tmp_path / 'classes.txt'}: 300 words in 12 classes of {min(sizes)} to {max(sizes)}, ")
    assert "rows per position" in said and "nats per token of bigram information" in said
    succeed("flashlm", *args, "--out", tmp_path / "again.txt")
    assert (tmp_path / "again.txt").read_bytes() == (tmp_path / "classes.txt").read_bytes()


def test_classes_by_cutoffs_of_a_raw_file(tmp_path):
    ids = [3, 3, 3, 1, 1, 4, 4, 4, 4, 0]
    (tmp_path / "ids.bin").write_bytes(struct.pack("<10H", *ids))
    args = ("classes", "--tokens", tmp_path / "ids.bin", "--out", tmp_path / "classes.txt")
    said = succeed("flashlm", *args, "--vocab-size", 6, "--method", "cutoffs", "--cutoffs", "1,4")
    assert read_classes(tmp_path / "classes.txt") == [[4], [3, 1, 0], [2, 5]]
    assert "of 1 to 3, 5.2 rows per position" in said  # 3 + 0.4 · 1 + 0.6 · 3
    succeed("flashlm", *args, "--vocab-size", 50)
    assert len(read_classes(tmp_path / "classes.txt")) == 7  # the root of the vocabulary


def test_classes_refuses(dataset, finished_run, tmp_path):
    out = tmp_path / "classes.txt"
    (tmp_path / "ids.bin").write_bytes(struct.pack("<4H", 3, 1, 4, 1))
    (tmp_path / "empty.bin").write_bytes(b"")
    raw = ("classes", "--out", out, "--tokens", tmp_path / "ids.bin", "--vocab-size", 300)
    refuse("give either --data DIR", "classes", "--out", out)
    refuse("give either --data DIR", *raw, "--data", dataset)
    refuse("--out is required", "classes", "--data", dataset)
    refuse("--vocab-size must be between 1 and", *raw[:-2])
    refuse("must hold tokens, got none", "classes", "--out", out, "--tokens", tmp_path / "empty.bin", "--vocab-size", 9)
    refuse("--method", *raw, "--method", "magic")
    refuse("--count", *raw, "--count", 0)
    refuse("--count must be between 1 and 300, got 301", *raw, "--count", 301)
    refuse("--row-price", *raw, "--row-price", -1)
    refuse("--sweeps", *raw, "--sweeps", -1)
    refuse("--method cutoffs needs --cutoffs", *raw, "--method", "cutoffs")
    refuse("--cutoffs must rise", *raw, "--method", "cutoffs", "--cutoffs", "20,10")
    refuse("--method kmeans needs --run", *raw, "--method", "kmeans")
    refuse("train one with train_flashlm", *raw, "--method", "kmeans", "--run", tmp_path / "nowhere")
    refuse("must have the tokens' vocabulary of 299, got 300", *raw[:-1], 299, "--method", "kmeans", "--run",
           finished_run)
    assert not out.exists()


def test_classes_interrupted_writes_nothing(tmp_path):
    ids = [i * i * 7919 % 50000 for i in range(400_000)]
    (tmp_path / "ids.bin").write_bytes(struct.pack(f"<{len(ids)}H", *ids))
    ours, terminal = os.openpty()
    process = subprocess.Popen([program_path("flashlm"), "classes", "--tokens", str(tmp_path / "ids.bin"), "--vocab-size",
                                "50000", "--method", "exchange", "--count", "4000", "--out", str(tmp_path / "classes.txt")],
                               stdout=terminal)
    shown = b""
    while b"bringing words in" not in shown:
        shown += os.read(ours, 4096)
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=60) == 130
    assert [path.name for path in tmp_path.iterdir()] == ["ids.bin"]
    os.close(terminal)
    os.close(ours)


# ---- generate ----


def test_generate(finished_run):
    def text(*args):
        return succeed("flashlm", "generate", finished_run, "--prompt", "the people", "--tokens", 20, *args)

    assert text("--seed", 1).startswith("the people")
    assert text("--seed", 1) == text("--seed", 1)
    assert len({text("--seed", seed) for seed in range(5)}) > 1
    likeliest = text("--temperature", 0)
    assert text("--top-k", 1, "--seed", 3) == likeliest
    assert text("--top-p", 1e-9, "--seed", 4) == likeliest
    assert succeed("flashlm", "generate", finished_run, "--prompt", "-", "--tokens", 20, "--temperature", 0,
                   input="the people") == likeliest


def test_generate_refuses(finished_run, tmp_path):
    refuse("train one with train_flashlm", "generate", tmp_path / "nowhere")
    refuse("--temperature must be >= 0, got -1", "generate", finished_run, "--temperature", -1)
    refuse("--top-p must be in (0, 1], got 0", "generate", finished_run, "--top-p", 0)
    shutil.copy(finished_run / "tokenizer.model", tmp_path / "model.safetensors")
    refuse("damaged or not a safetensors file", "generate", tmp_path / "model.safetensors", "--tokenizer",
           finished_run / "tokenizer.model")


# ---- evaluate ----


def test_evaluate_agrees_with_the_trainer(finished_run, dataset):
    last = [json.loads(line) for line in (finished_run / "metrics.jsonl").read_text().splitlines()][-1]
    got = json.loads(succeed("flashlm", "evaluate", finished_run / "checkpoints" / "step-000000030.safetensors",
                             "--data", dataset, "--seq-len", 32, "--max-tokens", 512, "--json"))
    assert got["tokens"] == 511
    assert got["nats_per_token"] == pytest.approx(last["val_loss"], rel=1e-6)
    assert got["bits_per_byte"] == pytest.approx(last["val_bits_per_byte"], rel=1e-6)


def test_evaluate_refuses(finished_run, tmp_path):
    refuse("give either --data DIR", "evaluate", finished_run)
    refuse("flashlm prepare", "evaluate", finished_run, "--data", tmp_path / "nowhere")


# ---- export ----

CHECK = """
import json, sys, torch
torch.ops.load_library(sys.argv[1])
extra = {"config.json": "", "tokenizer.model": ""}
model = torch.jit.load(sys.argv[2], _extra_files=extra)
tokens = torch.tensor([[5, 9, 7, 20, 31, 8, 44, 3, 60, 61, 2]])
with torch.inference_mode():
    logits = model(tokens)
    state = model.initial_state(1)
    pieces = []
    for piece in (tokens[:, :4], tokens[:, 4:5], tokens[:, 5:]):
        out, state = model.step(piece, state)
        pieces.append(out)
    torch.testing.assert_close(torch.cat(pieces, 1), logits)
    greedy = model.generate(tokens, 10, 0.0)
    torch.manual_seed(0)
    drawn = model.generate(tokens, 10, 1.0, 5, 0.9)
print(json.dumps({"greedy": greedy[0].tolist(), "drawn": list(drawn.shape), "d_model": json.loads(extra["config.json"])["d-model"],
                  "tokenizer": len(extra["tokenizer.model"])}))
"""


def test_export_loads_in_fresh_python_and_cpp_processes(finished_run, tmp_path):
    out = tmp_path / "model.pt"
    succeed("flashlm", "export", finished_run, "--out", out)
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", CHECK, str(OPS), str(out)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    got = json.loads(done.stdout)
    assert got["drawn"] == [1, 21] and got["d_model"] == 32
    assert got["tokenizer"] == (finished_run / "tokenizer.model").stat().st_size
    assert len(got["greedy"]) == 21
    # The same text from a C++ process that links nothing but the operators.
    program = BUILD / "tests" / "tools" / "load_torchscript"
    done = subprocess.run([str(program), str(out), *map(str, got["greedy"][:11])], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert [int(word) for word in done.stdout.split()] == got["greedy"]


def test_export_refuses(tmp_path):
    refuse("train one with train_flashlm", "export", tmp_path / "nowhere")


# ---- convert-head ----


def test_convert_head_and_back(finished_run, dataset, tmp_path):
    classes, hierarchical, full = (tmp_path / name for name in ("classes.txt", "h.safetensors", "f.safetensors"))
    # One class for each word: the two kinds of head are equal then, and the loss must stay.
    succeed("flashlm", "classes", "--data", dataset, "--count", 300, "--out", classes)
    succeed("flashlm", "convert-head", finished_run, "--head", "hierarchical", "--class-file", classes, "--out", hierarchical)
    succeed("flashlm", "convert-head", hierarchical, "--head", "full", "--out", full)
    losses = [json.loads(succeed("flashlm", "evaluate", model, "--data", dataset, "--max-tokens", 512, "--json"))
              for model in (finished_run, hierarchical, full)]
    for loss in losses[1:]:
        assert loss["nats_per_token"] == pytest.approx(losses[0]["nats_per_token"], abs=1e-5)
    before = full.read_bytes()
    refuse("exists; choose another --out", "convert-head", hierarchical, "--head", "full", "--out", full)
    assert full.read_bytes() == before


def test_convert_head_refuses(finished_run, tmp_path):
    out = tmp_path / "out.safetensors"
    refuse("got from full to full", "convert-head", finished_run, "--head", "full", "--out", out)
    refuse("a hierarchical head needs --class-file", "convert-head", finished_run, "--head", "hierarchical", "--out", out)
    (tmp_path / "classes.txt").write_text("flashlm-classes 1 3 1\n0 1 2\n")
    refuse("got 1 of 3", "convert-head", finished_run, "--head", "hierarchical", "--class-file", tmp_path / "classes.txt",
           "--out", out)
    assert not out.exists()

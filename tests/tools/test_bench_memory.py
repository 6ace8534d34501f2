# SPDX-License-Identifier: Apache-2.0
"""bench/memory.py on models so small that libraries are most of their memory: rows appear, and mistakes are told."""

import os
import re
import subprocess
import sys

import pytest
from programs import BUILD, ROOT

pytest.importorskip("torch")

# Head and recursions as in the presets that the script changes or repeats.
SETTINGS = {
    "matmulfree": 'block = "matmulfree"\nlayers = 1\nrecursions = 2\nhead = "hierarchical"\nhead-bias = true\n',
    "hgrn-bit": 'block = "hgrn-bit"\nlayers = 2\nrecursions = 1\ntied = false\nhead-quantizer = "absmean"\n',
}
COMMON = """
mixers = ["mlgru"]
vocab-size = 60
d-model = 32
d-inner = 50
quantizer = "absmean"
activation = "int8"
router = false
"""


def memory(*args):
    command = [sys.executable, ROOT / "bench" / "memory.py", *map(str, args)]
    environment = os.environ | {"FLASHLM_BUILD": str(BUILD)}
    return subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)


def rows(*args):
    """{contestant: (peak MB, saved)}, and the line above the table."""
    done = memory(*args)
    assert done.returncode == 0, done.stderr + done.stdout
    found = re.findall(r"^\| ([^|]+) \| ([\d,]+) \| (-?[\d.]+ %)? \|$", done.stdout, re.MULTILINE)
    return {name: (int(peak.replace(",", "")), saved) for name, peak, saved in found}, done.stdout.splitlines()[0]


@pytest.fixture(params=SETTINGS)
def config(request, tmp_path):
    path = tmp_path / f"{request.param}.toml"
    path.write_text(SETTINGS[request.param] + COMMON)
    return path


def test_train(config):
    found, title = rows("train", "--config", config, "--batch", 2, "--seq-len", 16, "--set", "d-inner=40")
    assert list(found) == ["plain PyTorch", "FlashLM", "FlashLM --recompute bfloat16"]
    assert "2 x 16 = 32 tokens a step; full head, not tied" in title
    assert not found["plain PyTorch"][1] and all(saved for _, saved in list(found.values())[1:])
    assert all(peak > 10 for peak, _ in found.values())


def test_infer(config):
    assert list(rows("infer", "--config", config)[0]) == ["plain PyTorch, float32", "FlashLM, packed"]
    assert list(rows("infer", "--config", config, "--no-plain")[0]) == ["FlashLM, packed"]


@pytest.mark.parametrize("words, args", [
    ("block must be 'matmulfree' or 'hgrn-bit', got 'v3'", []),
    ("mixers must be 'mlgru' alone, got ['conv']", ["--set", "block=matmulfree"]),
    ("d-model must be of type int, got 'wide'", ["--set", "d-model=wide"]),
    ("--set must be NAME=VALUE, got 'd-model'", ["--set", "d-model"]),
    ("No such file", ["--config", "/nowhere.toml"]),
])
def test_refuses(words, args):
    done = memory("infer", "--config", ROOT / "train/configs/quick.toml", *args)
    lines = done.stderr.splitlines()
    assert done.returncode == 1 and len(lines) == 1 and words in lines[0], done.stderr

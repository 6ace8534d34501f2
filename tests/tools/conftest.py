# SPDX-License-Identifier: Apache-2.0
"""Fixtures for the tests of the programs: a small corpus, prepared data, and one finished run."""

import random

import pytest
from programs import succeed

# A model that trains in a second.
TINY = """
steps = 30
batch-size = 4
curriculum = "0:16:1,0.5:32:2"
warmup-steps = 4
decay-start = 0.5
adamw-lr = 3e-3
ema-decay = 0.9
position-fraction = 0.5
label-smoothing = 0.05
threads = 2
log-every = "1"
eval-every = "10"
eval-tokens = 512
eval-seq-len = 32
sample-every = "15"
sample-tokens = 8
checkpoint-every = "10"
d-model = 32
d-inner = 85
groups = 4
dilations = [1, 4]
quantizer = "absmean"
activation = "int8"
router = false
"""


@pytest.fixture(scope="session")
def corpus(tmp_path_factory):
    """Twenty documents of made-up English sentences: enough to learn something from in thirty steps."""
    folder = tmp_path_factory.mktemp("corpus")
    words = random.Random(7)
    subjects = "the people|the state|our government|a citizen|the law|this nation|the river|a new bank".split("|")
    verbs = "must protect|shall build|has seen|will need|can trust|should honour|may govern".split("|")
    objects = "the union|its harbours|every farmer|peace and trade|the treasury|good roads|free schools".split("|")
    for number in range(20):
        lines = [" ".join((words.choice(subjects), words.choice(verbs), words.choice(objects))) + "."
                 for _ in range(400)]
        (folder / f"{number:02}.txt").write_text("\n".join(lines) + "\n")
    return folder


@pytest.fixture(scope="session")
def dataset(corpus, tmp_path_factory):
    out = tmp_path_factory.mktemp("prepared") / "data"
    succeed("flashlm", "prepare", corpus, "--out", out, "--tokenizer", "sentencepiece:300", "--val-fraction", "0.1")
    return out


@pytest.fixture(scope="session")
def tiny_config(tmp_path_factory):
    path = tmp_path_factory.mktemp("config") / "tiny.toml"
    path.write_text(TINY)
    return path


@pytest.fixture(scope="session")
def finished_run(dataset, tiny_config, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "finished"
    succeed("train_flashlm", "--config", tiny_config, "--data", dataset, "--out", out)
    return out

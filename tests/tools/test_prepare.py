# SPDX-License-Identifier: Apache-2.0
"""flashlm prepare as a user runs it: every kind of input, standard input, kills, memory."""

import gzip
import json
import os
import random
import re
import signal
import subprocess
import sys

import pytest
from programs import ROOT, program_path, run, succeed
from test_flashlm import refuse

GPT2 = f"gpt2:{ROOT / '.corpus' / 'gpt2'}"


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture(scope="module")
def tokenizer(dataset):
    return dataset / "tokenizer.model"


@pytest.fixture(scope="module")
def large(corpus, tmp_path_factory):
    """48 MB of JSON lines, every one different."""
    texts = [path.read_text() for path in sorted(corpus.iterdir())]
    path = tmp_path_factory.mktemp("large") / "large.jsonl"
    with path.open("w") as file:
        for number in range(48_000_000 // len(texts[0])):
            file.write(json.dumps({"text": f"{number} {texts[number % len(texts)]}"}) + "\n")
    return path


def test_the_kind_of_file_does_not_matter(corpus, dataset, tmp_path):
    texts = [path.read_text() for path in sorted(corpus.iterdir())]
    lines = "".join(json.dumps({"body": text, "number": 1}) + "\n" for text in texts)
    (tmp_path / "a.jsonl").write_text("".join(lines.splitlines(True)[:5]))
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress("".join(lines.splitlines(True)[5:]).encode()))
    options = ("--out", tmp_path / "out", "--tokenizer", "sentencepiece:300", "--val-fraction", "0.1")
    said = succeed("flashlm", "prepare", tmp_path, "--text-field", "body", *options)
    assert contents(tmp_path / "out") == contents(dataset)
    assert re.search(r"^training +\d+\.\d\d MB +\d+ tokens +\d+ documents$", said, re.M)
    assert re.search(r"^20 documents, vocabulary 300, ", said, re.M)

    # The same from standard input, which is then on no disk any more.
    succeed("flashlm", "prepare", "-", "--stdin-format", "jsonl", "--text-field", "body", *options, "--threads", "1",
            input=lines)
    assert contents(tmp_path / "out") == contents(dataset)
    refuse("a.jsonl", "prepare", tmp_path / "a.jsonl", "--out", tmp_path / "other")
    assert not (tmp_path / "other").exists()


def test_standard_input_that_is_bad_leaves_nothing(tmp_path):
    done = run("flashlm", "prepare", "-", "--stdin-format", "jsonl", "--out", tmp_path / "deep" / "out", input="{\n")
    assert done.returncode == 1 and len(done.stderr.splitlines()) == 1
    assert not list(tmp_path.iterdir())


def test_selection(tokenizer, tmp_path):
    lines = [json.dumps({"text": "é" * (length + 45)}) for length in range(10)]
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    args = ("prepare", tmp_path / "a.jsonl", "--out", tmp_path / "out", "--tokenizer", tokenizer, "--min-chars", "50")
    assert re.search("^5 documents,", succeed("flashlm", *args), re.M)
    said = succeed("flashlm", *args, "--max-documents", "2")
    assert re.search("^2 documents,", said, re.M) and sum(map(float, re.findall(r" (\d+\.\d\d) MB", said))) == 0
    refuse("--max-documents must be at least 1, got 0", *args, "--max-documents", "0")
    refuse("--threads must be between 1 and 1024, or 0", *args, "--threads", "-1")
    refuse("--min-chars must be between 0 and 100000", *args[:-1], "-1")


class Watched:
    """flashlm on a terminal of its own, whose lines are read as they come."""

    def __init__(self, *args):
        self.ours, terminal = os.openpty()
        self.process = subprocess.Popen([program_path("flashlm"), *map(str, args)], stdout=terminal,
                                        stderr=subprocess.PIPE, text=True)
        os.close(terminal)
        self.shown = ""

    def read_until(self, percent):
        """Reads until so much is encoded, or to the end."""
        while not any(int(found) >= percent for found in re.findall(r"encoding (\d+) %", self.shown)):
            try:
                self.shown += os.read(self.ours, 4096).decode()
            except OSError:  # how Linux says that the other end is closed
                return

    def end(self, send=None):
        """What was said on stderr, and the exit code."""
        if send:
            self.process.send_signal(send)
        said = self.process.communicate()[1]
        os.close(self.ours)
        return said, self.process.returncode


def test_killed_at_any_moment_it_goes_on_to_the_same_bytes(large, tmp_path):
    args = ("prepare", large, "--tokenizer", GPT2, "--out")
    succeed("flashlm", *args, tmp_path / "unbroken")
    expected = contents(tmp_path / "unbroken")
    random_moments = random.Random(5)
    out = tmp_path / "out"
    # Whether a journal had been written by then is the machine's speed; that it is used, tests/data/test_prepare.cpp says.
    for _ in range(4):
        for percent in sorted(random_moments.randrange(100) for _ in range(2)):  # two kills, one after the other
            watched = Watched(*args, out)
            watched.read_until(percent)
            watched.end(signal.SIGKILL)
        succeed("flashlm", *args, out)
        assert contents(out) == expected
        for path in out.iterdir():
            path.unlink()


def test_interrupted_it_says_that_it_goes_on(large, tmp_path):
    args = ("prepare", large, "--tokenizer", GPT2, "--out", tmp_path)
    watched = Watched(*args)
    watched.read_until(0)
    assert watched.end(signal.SIGINT) == ("flashlm: interrupted; the same command goes on from here\n", 130)
    assert not (tmp_path / "train.tokens").exists()
    assert re.search(r"^resumed +\d+\.\d\d MB", succeed("flashlm", *args), re.M)
    assert sorted(contents(tmp_path)) == ["prepare.json", "tokenizer.model", "train.tokens", "val.tokens"]


def test_progress_on_a_terminal(large, tmp_path):
    watched = Watched("prepare", large, "--tokenizer", GPT2, "--out", tmp_path)
    watched.read_until(101)
    assert watched.end() == ("", 0)
    assert re.search(r"\r\x1b\[Kencoding \d+ %  [\d.]+ MB/s  \d+ documents  [\d.]+[kM] tokens  \d+:\d\d left",
                     watched.shown)


def peak_kilobytes(*args):
    """Of flashlm, started by a small process: until a program is loaded, its memory counts as that of whoever starts it."""
    start = ("import resource, subprocess, sys; subprocess.run(sys.argv[1:], check=True, stdout=subprocess.DEVNULL); "
             "print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)")
    command = [sys.executable, "-S", "-c", start, program_path("flashlm"), *map(str, args)]
    return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def test_memory_does_not_grow_with_the_input(large, tmp_path):
    options = ("--tokenizer", GPT2, "--out", tmp_path / "out", "--threads", "2")
    small = peak_kilobytes("prepare", large, "--max-documents", "300", *options)
    assert peak_kilobytes("prepare", large, *options) - small < 24_000  # of 48 MB of text
    assert peak_kilobytes("prepare", large, *options) - small < 24_000  # looking at what is up to date
    (tmp_path / "one.txt").write_bytes(large.read_bytes())
    assert peak_kilobytes("prepare", tmp_path / "one.txt", *options) - small < 24_000

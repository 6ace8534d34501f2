# SPDX-License-Identifier: Apache-2.0
"""Runs flashlm, train_flashlm and bench_ops from the build."""

import os
import pathlib
import subprocess

ROOT = pathlib.Path(__file__).resolve().parents[2]
BUILD = pathlib.Path(os.environ.get("FLASHLM_BUILD", ROOT / "build" / "release"))
FOLDERS = {"flashlm": "tools", "train_flashlm": "train", "bench_ops": "bench"}


def program_path(program):
    path = BUILD / FOLDERS[program] / program
    assert path.exists(), f"{path} is not built; run tools/test"
    return str(path)


def run(program, *args, **options):
    """Never raises, so that tests can look at failures."""
    return subprocess.run([program_path(program), *map(str, args)], capture_output=True, text=True, errors="replace",
                          timeout=300, **options)


def succeed(program, *args, **options):
    done = run(program, *args, **options)
    assert done.returncode == 0, done.stderr + done.stdout
    return done.stdout

# SPDX-License-Identifier: Apache-2.0
"""Loads the operators into PyTorch for every test here: $FLASHLM_OPS_LIB, or the release build's library."""

import os
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]


def pytest_configure(config):
    # TorchScript is one of the things tested; that PyTorch advises against it is no news.
    config.addinivalue_line("filterwarnings", r"ignore:`torch\.jit\.\w+` is:DeprecationWarning")
    # torch.export's own.
    config.addinivalue_line("filterwarnings", r"ignore:`isinstance\(treespec, LeafSpec\)`:FutureWarning")
    library = Path(os.environ.get("FLASHLM_OPS_LIB") or ROOT / "build/release/ops/libflashlm_ops.so")
    try:
        torch.ops.load_library(library)
    except OSError as error:
        why = "does not load" if library.is_file() else "does not exist"
        pytest.exit(
            f"{library} {why}; build it with: cmake --preset release && "
            "cmake --build --preset release --target flashlm_ops, or name another with FLASHLM_OPS_LIB\n"
            f"{error.__cause__ or error}",
            returncode=2,
        )

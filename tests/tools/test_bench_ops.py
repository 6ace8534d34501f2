# SPDX-License-Identifier: Apache-2.0
"""bench_ops as a user runs it, without looking at a clock: --seconds 0 makes one call of everything."""

import json
import math
import pathlib
import subprocess
import sys

import pytest
from programs import ROOT, run, succeed

# One case each of products forward and with gradients, of memory traffic, and of kernels alone.
FAST = r"int8.*256x256x683$|^rms_norm, forward  |ternary_gemm.*  1x256x683$"


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    out = tmp_path_factory.mktemp("bench")
    tables = succeed("bench_ops", "--filter", FAST, "--seconds", 0, "--threads", "1,2", "--commit", "abc", "--out", out)
    return out, tables


def test_json(measured):
    report = json.loads((measured[0] / "bench.json").read_text())
    assert report["machine"]["commit"] == "abc" and report["machine"]["isa"] and report["machine"]["date"]
    assert {peak["threads"] for peak in report["peaks"]} == {1, 2}
    assert all(peak["value"] > 0 for peak in report["peaks"])
    found = [(case["group"], case["threads"]) for case in report["cases"]]
    assert sorted(found) == sorted(
        [(group, threads) for threads in (1, 2)
         for group in ["bit_linear int8, forward", "rms_norm, forward"]
         + [f"bit_linear int8, forward + backward in {g}" for g in ("int8", "bfloat16", "float32")]]
        + [("ternary_gemm kernel with quantize_rows", 1)])
    for case in report["cases"]:
        ours, *peers = case["contestants"]
        assert ours["name"] == "FlashLM" and case["work"] > 0
        for contestant in case["contestants"]:
            assert 0 < contestant["min_us"] <= contestant["median_us"] and contestant["samples"] == 1
            assert math.isclose(contestant["rate"], case["work"] / contestant["min_us"] * 1e-3, rel_tol=1e-9)
            assert contestant["difference"] is None or 0 <= contestant["difference"] < 0.05
        if "kernel" not in case["group"]:
            assert {"torch float32", "torch bfloat16"} <= {peer["name"] for peer in peers}
        if case["peak"]:
            assert math.isclose(case["peak"]["percent"], 100 * ours["rate"] / case["peak"]["value"], rel_tol=1e-9)


def test_tables(measured):
    out, tables = measured
    assert (out / "bench.md").read_text() == tables
    assert "## On 1 thread\n" in tables and "## On 2 threads\n" in tables and "absmean 256x256x683" in tables
    assert "--ggml DIR" in tables  # how to get what is missing


def test_picture(measured):
    pytest.importorskip("matplotlib")
    picture = measured[0] / "bench.svg"
    subprocess.run([sys.executable, ROOT / "tools" / "plot_bench", measured[0] / "bench.json", picture], check=True)
    assert "<!-- torch bfloat16 -->" in picture.read_text()


def test_list_names_every_operator():
    names = succeed("bench_ops", "--list")
    operators = {path.stem for path in (pathlib.Path(ROOT) / "ops").glob("*.h")}
    # No operators; and one that is called once in a model's life.
    operators -= {"common", "conv", "ops", "ternary_products", "ternary_weights", "pack_ternary", "products", "scalar_loss"}
    # A family in one header.
    operators = operators - {"glu"} | {"relu2_glu", "silu_glu", "sigmoid_glu"}
    missing = {name for name in operators if not any(line.lower().startswith(name) for line in names.splitlines())}
    assert not missing, f"no case in bench/cases.cpp for {missing}"


@pytest.mark.parametrize("words, args", [
    ("matches no case", ["--filter", "nothing like this"]),
    ("not a regular expression", ["--filter", "("]),
    ("is not a folder", ["--ggml", "/nowhere", "--list"]),
    ("holds no libggml-base.so", ["--ggml", str(pathlib.Path(__file__).parent), "--list"]),
    ("--threads", ["--threads", "0"]),
    ("--seconds", ["--seconds", "soon"]),
    ("--help", ["--no-such-option"]),
])
def test_refuses(words, args):
    done = run("bench_ops", *args)
    lines = done.stderr.splitlines()
    assert done.returncode == 1 and len(lines) == 1 and words in lines[0], done.stderr

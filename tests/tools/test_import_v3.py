# SPDX-License-Identifier: Apache-2.0
"""tools/import_v3.py on checkpoints made in the original's layout, against the PyTorch model of tests/goldens/v3.py."""

import importlib.util
import json
import os
import pathlib
import subprocess
import sys

import numpy
import pytest
import torch
from programs import BUILD, ROOT, run, succeed

V, D, H = 97, 32, 85
SIZES = dict(vocab=V, d=D, inner=H, dilations=[1, 4, 64], kernel=4, groups=16, layers=1, recursions=2,
             quantizer="threshold", activation="none", embedding_scale=1.0, norm_eps=1e-8)  # fmt: skip
# Some of what the original writes there.
CONFIG = {"d_model": D, "vocab_size": V, "n_recursions": 2, "glu_expansion": 2.67, "glu_inner_dim": H,
          "phase_schedule": {"1a": {"start": 0, "freeze_embed": True}}, "adamw_betas": (0.9, 0.95), "device": "cpu"}


def load(name, path):
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def golden():
    return load("golden_v3", ROOT / "tests" / "goldens" / "v3.py")


def parameters(golden, seed):
    torch.manual_seed(seed)
    return {name: p.detach() for name, p in golden.initial_parameters(SIZES).items()}


def state_dict(parameters):
    """As the original's state_dict(): the tied table twice."""
    state = {name: p.float() for name, p in parameters.items()}
    return state | {"lm_head.weight": state["embedding.weight"]}


@pytest.fixture(scope="module")
def weights(golden):
    return parameters(golden, 1)


@pytest.fixture(scope="module")
def averages(golden):
    return parameters(golden, 2)


@pytest.fixture(scope="module")
def checkpoint(weights, averages, tmp_path_factory):
    path = tmp_path_factory.mktemp("v3") / "flashlm_final.pt"
    torch.save({"model_state_dict": state_dict(weights), "ema_state": state_dict(averages), "config": CONFIG,
                "val_loss": 6.8, "total_steps": 10000, "total_time_h": 1.25}, path)
    return path


@pytest.fixture(scope="module")
def raw_tokens(tmp_path_factory):
    path = tmp_path_factory.mktemp("tokens") / "tokens.npy"
    numpy.save(path, numpy.random.default_rng(3).integers(V, size=4000).astype(numpy.uint16))
    return path


SCRIPT = ROOT / "tools" / "import_v3.py"


def import_v3(*args):
    """In this process: a new one would take seconds to load torch. A refusal is a SystemExit with its text."""
    load("import_v3", SCRIPT).main([str(arg) for arg in args])


@pytest.fixture(scope="module")
def imported(checkpoint, tmp_path_factory):
    out = tmp_path_factory.mktemp("imported") / "run"
    done = subprocess.run([sys.executable, SCRIPT, checkpoint, "--out", out], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert f"train_flashlm --config {out}/config.toml --init {out}" in done.stdout
    return out


# In a process of its own, which has no other operators loaded.
LOGITS = """
import sys, torch
torch.ops.load_library(sys.argv[1])
torch.save(torch.jit.load(sys.argv[2])(torch.load(sys.argv[3])), sys.argv[4])
"""


def exported_logits(folder, tokens, tmp_path):
    succeed("flashlm", "export", folder, "--out", tmp_path / "model.pt")
    torch.save(tokens, tmp_path / "tokens.pt")
    library = os.environ.get("FLASHLM_OPS_LIB", BUILD / "ops" / "libflashlm_ops.so")
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", LOGITS, library, tmp_path / "model.pt",
                           tmp_path / "tokens.pt", tmp_path / "logits.pt"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return torch.load(tmp_path / "logits.pt")


def assert_same_logits(golden, folder, weights, tmp_path):
    # Longer than the reach of the widest dilation, 3 * 64.
    tokens = torch.randint(V, (2, 210), generator=torch.Generator().manual_seed(4))
    want = golden.logits_of(SIZES, weights, tokens)
    got = exported_logits(folder, tokens, tmp_path)
    assert (got - want).abs().max() <= 5e-6 * want.abs().max()


def test_logits_are_those_of_an_independent_implementation(golden, imported, weights, tmp_path):
    assert_same_logits(golden, imported, weights, tmp_path)


def test_moving_average_and_the_names_of_data_parallel(golden, weights, averages, checkpoint, tmp_path):
    import_v3(checkpoint, "--out", tmp_path / "ema", "--weights", "ema")
    assert_same_logits(golden, tmp_path / "ema", averages, tmp_path)
    torch.save({"model_state_dict": {"module." + name: t for name, t in state_dict(weights).items()}, "config": CONFIG},
               tmp_path / "parallel.pt")
    import_v3(tmp_path / "parallel.pt", "--out", tmp_path / "parallel")
    assert_same_logits(golden, tmp_path / "parallel", weights, tmp_path)
    refuse("has no moving average", tmp_path / "parallel.pt", tmp_path / "none", "--weights", "ema")


def test_is_evaluated(golden, imported, weights, raw_tokens):
    got = json.loads(succeed("flashlm", "evaluate", imported, "--tokens", raw_tokens, "--seq-len", 100, "--json"))
    ids = torch.from_numpy(numpy.load(raw_tokens).astype(numpy.int64))
    windows = [ids[start : start + 101] for start in range(0, len(ids) - 1, 100)]
    loss = torch.tensor([0.0], dtype=torch.float64)
    for window in windows:
        logits = golden.logits_of(SIZES, weights, window[None, :-1])[0]
        loss += torch.nn.functional.cross_entropy(logits, window[1:], reduction="sum")
    assert got["tokens"] == len(ids) - 1
    assert got["nats_per_token"] == pytest.approx(loss.item() / (len(ids) - 1), rel=1e-5)


@pytest.mark.parametrize("config", ["v3.toml", "its own"])
def test_is_trained_on(config, imported, raw_tokens, tmp_path):
    # v3.toml has v3's sizes; this model is a small one.
    path = imported / "config.toml" if config == "its own" else ROOT / "train" / "configs" / "v3.toml"
    sizes = () if config == "its own" else ("--d-model", D, "--d-inner", H, "--vocab-size", V)
    out = tmp_path / "run"
    succeed("train_flashlm", "--config", path, *sizes, "--init", imported, "--tokens", raw_tokens, "--out", out,
            "--steps", 2, "--eval-tokens", 128, "--eval-seq-len", 64)  # fmt: skip
    start = json.loads((out / "metrics.jsonl").read_text().splitlines()[0])
    evaluated = succeed("flashlm", "evaluate", imported, "--tokens", write_validation(raw_tokens, tmp_path), "--seq-len", 64,
                        "--max-tokens", 128, "--json")
    assert start["val_loss"] == pytest.approx(json.loads(evaluated)["nats_per_token"], rel=1e-6)
    assert (out / "model.safetensors").exists()


def write_validation(raw_tokens, folder):
    """The last twentieth, which train_flashlm holds out."""
    ids = numpy.load(raw_tokens)
    numpy.save(folder / "val.npy", ids[int(len(ids) * 0.95) :])
    return folder / "val.npy"


def test_writes_text_with_a_tokenizer(golden, dataset, tmp_path):
    torch.manual_seed(5)
    vocabulary = 300  # of the fixture's tokenizer
    state = state_dict({name: p.detach() for name, p in golden.initial_parameters(SIZES | {"vocab": vocabulary}).items()})
    torch.save({"model_state_dict": state, "config": CONFIG | {"vocab_size": vocabulary}}, tmp_path / "v3.pt")
    import_v3(tmp_path / "v3.pt", "--out", tmp_path / "run", "--tokenizer", dataset / "tokenizer.model")
    assert succeed("flashlm", "generate", tmp_path / "run", "--prompt", "The people", "--tokens", 5).startswith("The people")


def test_takes_gpt2s_tokenizer(golden, tmp_path):
    gpt2 = f"gpt2:{ROOT / '.corpus' / 'gpt2'}"  # tools/setup brings it
    state = state_dict({name: p.detach() for name, p in golden.initial_parameters(SIZES | {"vocab": 50257}).items()})
    torch.save({"model_state_dict": state, "config": CONFIG | {"vocab_size": 50257}}, tmp_path / "v3.pt")
    import_v3(tmp_path / "v3.pt", "--out", tmp_path / "run", "--tokenizer", gpt2)
    text = "The people's  house, in 1789:\n\tétat <|endoftext|> \U0001f3db"
    ids = [succeed("flashlm", "encode", which, input=text) for which in (gpt2, tmp_path / "run" / "tokenizer.model")]
    assert ids[0] == ids[1] and len(ids[0].split()) > 10
    assert succeed("flashlm", "generate", tmp_path / "run", "--prompt", text, "--tokens", 5).startswith(text)
    refuse("there is no", tmp_path / "v3.pt", tmp_path / "other", "--tokenizer", f"gpt2:{tmp_path}")


# ---- what is refused ----


class Attack:
    """Pickled as a call of `touch`, which a reader that runs code would make."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return pathlib.Path.touch, (self.path,)


def refuse(words, path, out, *args):
    with pytest.raises(SystemExit) as exit:
        import_v3(path, "--out", out, *args)
    lines = str(exit.value.code).splitlines()
    assert len(lines) == 1 and lines[0].startswith("import_v3: ") and words in lines[0], lines
    assert not out.exists()


def test_refuses_bad_files(checkpoint, imported, tmp_path):
    out, bad = tmp_path / "run", tmp_path / "bad.pt"
    refuse("there is no checkpoint", tmp_path / "nowhere.pt", out)
    for size in (0, 100, checkpoint.stat().st_size // 2, checkpoint.stat().st_size - 1):
        bad.write_bytes(checkpoint.read_bytes()[:size])
        refuse("is damaged", bad, out)
    torch.save({"model_state_dict": Attack(tmp_path / "attacked"), "config": CONFIG}, bad)
    refuse("more than tensors and numbers", bad, out)
    assert not (tmp_path / "attacked").exists()
    torch.save([1, 2], bad)
    refuse("it has no model_state_dict", bad, out)
    before = (imported / "model.safetensors").read_bytes()
    done = subprocess.run([sys.executable, SCRIPT, checkpoint, "--out", imported], capture_output=True, text=True)
    assert done.returncode == 1 and not done.stdout
    assert done.stderr == f"import_v3: {imported} exists; choose another --out\n"
    assert (imported / "model.safetensors").read_bytes() == before
    refuse("nowhere", checkpoint, out, "--tokenizer", tmp_path / "nowhere")


def without(state, name):
    return {key: t for key, t in state.items() if key != name}


@pytest.mark.parametrize("words, change, config", [
    ("has no tensor block.glu.up_proj.weight", lambda s: without(s, "block.glu.up_proj.weight"), {}),
    ("has no tensor embedding.weight", lambda s: without(s, "embedding.weight"), {}),
    ("has no tensor final_norm.scale", lambda s: s | {"final_norm.scale": "text"}, {}),
    ("shape (85, 32), as its config says, got torch.float32 of (32, 85)",
     lambda s: s | {"block.glu.gate_proj.weight": s["block.glu.gate_proj.weight"].T}, {}),
    ("got torch.int64", lambda s: s | {"final_norm.scale": torch.ones(D, dtype=torch.int64)}, {}),
    ("block.deep.weight is no tensor of v3's", lambda s: s | {"block.deep.weight": torch.ones(2)}, {}),
    ("must be its embedding.weight", lambda s: s | {"lm_head.weight": s["embedding.weight"] + 1}, {}),
    ("block.norm1.scale has values that are not finite",
     lambda s: s | {"block.norm1.scale": s["block.norm1.scale"] / 0}, {}),
    ("embedding.weight must be floats of shape (98, 32)", lambda s: s, {"vocab_size": 98}),
    ("n_recursions must be a positive integer, got None", lambda s: s, {"n_recursions": None}),
    ("d_model must be a multiple of 16, got 33", lambda s: s, {"d_model": 33}),
])  # fmt: skip
def test_refuses_other_models(words, change, config, weights, tmp_path):
    path = tmp_path / "other.pt"
    torch.save({"model_state_dict": change(state_dict(weights)), "config": CONFIG | config}, path)
    refuse(words, path, tmp_path / "run")


def test_refuses_a_checkpoint_without_sizes(weights, tmp_path):
    torch.save({"model_state_dict": state_dict(weights)}, tmp_path / "bare.pt")
    refuse("it has no config", tmp_path / "bare.pt", tmp_path / "run")

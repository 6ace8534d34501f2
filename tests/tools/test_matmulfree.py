# SPDX-License-Identifier: Apache-2.0
"""The MatMul-free LM as a user has it: train, resume, evaluate, generate, export, pack, import."""

import json
import shutil

import pytest
import torch
from programs import ROOT, run, succeed
from safetensors.torch import load_file, save_file

MATMULFREE = """
layers = 2
recursions = 1
block = "{block}"
mixers = [{mixers}]
"""
KINDS = {
    "matmulfree": MATMULFREE.format(block="matmulfree", mixers='"mlgru"'),
    "hgrn-bit": MATMULFREE.format(block="hgrn-bit", mixers='"mlgru"')
    + 'tied = false\nhead-quantizer = "absmean"\nrecompute = "bfloat16"\n',
    "hybrid": MATMULFREE.format(block="v3", mixers='"conv", "mlgru"') + 'head = "hierarchical"\nhead-bias = true\n',
}


@pytest.fixture(scope="module", params=KINDS)
def trained(request, dataset, tiny_config, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    (folder / "config.toml").write_text(tiny_config.read_text() + KINDS[request.param])
    succeed("train_flashlm", "--config", folder / "config.toml", "--data", dataset, "--out", folder / "run")
    return folder / "run"


def loss_of(model, dataset):
    return json.loads(succeed("flashlm", "evaluate", model, "--data", dataset, "--json"))["nats_per_token"]


def test_it_learns_and_the_config_is_read_again(trained, dataset, tmp_path):
    lines = [json.loads(line) for line in (trained / "metrics.jsonl").read_text().splitlines()]
    losses = [line["val_loss"] for line in lines if "val_loss" in line]
    assert losses[-1] < losses[0] - 0.5
    again = tmp_path / "again"
    succeed("train_flashlm", "--config", trained / "config.toml", "--data", dataset, "--out", again)
    one, two = load_file(trained / "model.safetensors"), load_file(again / "model.safetensors")
    assert one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


def test_a_resumed_run_is_the_unbroken_one(trained, dataset, tmp_path):
    out = tmp_path / "run"
    args = ("--config", trained / "config.toml", "--data", dataset, "--out", out)
    succeed("train_flashlm", *args)
    for name in ("model.safetensors", "checkpoints/step-000000030.safetensors"):
        (out / name).unlink()
    succeed("train_flashlm", "--out", out, "--resume")
    one, two = load_file(trained / "model.safetensors"), load_file(out / "model.safetensors")
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_packed_it_says_the_same_in_less(trained, dataset, tmp_path):
    packed = tmp_path / "packed.safetensors"
    succeed("flashlm", "pack", trained, "--out", packed)
    assert packed.stat().st_size < (trained / "model.safetensors").stat().st_size
    assert loss_of(packed, dataset) == pytest.approx(loss_of(trained, dataset), rel=1e-6)
    words = ("--ids", "5,6,7", "--tokens", 5, "--temperature", 0)
    ids = succeed("flashlm", "generate", packed, *words)
    assert ids == succeed("flashlm", "generate", trained, *words) and len(ids.split()) == 5
    shutil.copy(trained / "tokenizer.model", tmp_path)  # found beside it, as in the run folder
    text = ("--prompt", "the", "--tokens", 5, "--temperature", 0)
    assert succeed("flashlm", "generate", packed, *text) == succeed("flashlm", "generate", trained, *text)
    assert "with its tokenizer" in succeed("flashlm", "export", packed)
    succeed("flashlm", "export", trained, "--out", tmp_path / "floats.pt")
    assert packed.with_suffix(".pt").stat().st_size < (tmp_path / "floats.pt").stat().st_size
    for tool, more in (("pack", ("--out", tmp_path / "twice.safetensors")), ("generate", ("--ids", "300")),
                       ("generate", ("--ids", "3", "--prompt", "the")),
                       ("convert-head", ("--head", "full", "--out", tmp_path / "full.safetensors"))):
        refused = run("flashlm", tool, packed, *more)
        assert refused.returncode == 1 and len(refused.stderr.splitlines()) == 1, refused.stderr


def test_packed_it_is_not_trained(trained, dataset, tmp_path):
    refused = run("train_flashlm", "--config", trained / "config.toml", "--data", dataset, "--out", tmp_path / "run",
                  "--packed", "true")
    assert refused.returncode == 1 and "--packed is for inference" in refused.stderr
    assert not (tmp_path / "run").exists()
    succeed("flashlm", "pack", trained, "--out", tmp_path / "packed.safetensors")
    refused = run("train_flashlm", "--config", trained / "config.toml", "--data", dataset, "--out", tmp_path / "run",
                  "--init", tmp_path / "packed.safetensors")
    assert refused.returncode == 1 and "is packed, for inference" in refused.stderr


def test_a_packed_model_of_random_weights(tmp_path):
    config = tmp_path / "config.toml"
    config.write_text('vocab-size = 61\nd-model = 32\nd-inner = 50\ngroups = 1\nactivation = "int8"\nquantizer = "absmean"\n'
                      + KINDS["hgrn-bit"])
    succeed("flashlm", "pack", "--random", config, "--out", tmp_path / "packed.safetensors")
    assert len(succeed("flashlm", "generate", tmp_path / "packed.safetensors", "--ids", "1", "--tokens", 3).split()) == 3
    refused = run("flashlm", "pack", "--random", tmp_path / "none.toml", "--out", tmp_path / "x")
    assert refused.returncode == 1 and "there is no config file" in refused.stderr


def released(layers, v, d, h):
    """Tensors with the names and shapes of a released checkpoint."""
    torch.manual_seed(1)
    shapes = {"model.embeddings.weight": (v, d), "model.lower_bounds": (layers, d), "model.norm.weight": (d,),
              "lm_head.weight": (v, d), "lm_head.norm.weight": (d,)}
    for i in range(layers):
        layer = f"model.layers.{i}."
        shapes |= {layer + name: (d,) for name in ("attn_norm.weight", "mlp_norm.weight", "attn.g_norm.weight")}
        for name in ("attn.i_proj", "attn.f_proj", "attn.g_proj", "attn.o_proj"):
            shapes |= {f"{layer}{name}.weight": (d, d), f"{layer}{name}.norm.weight": (d,)}
        shapes |= {layer + "mlp.gate_proj.weight": (2 * h, d), layer + "mlp.gate_proj.norm.weight": (d,),
                   layer + "mlp.down_proj.weight": (d, h), layer + "mlp.down_proj.norm.weight": (h,)}
    return {name: torch.randn(shape).bfloat16() for name, shape in shapes.items()}


def test_import_of_a_released_checkpoint_in_parts(dataset, tmp_path):
    tensors = released(2, 300, 32, 64)
    parts = [tmp_path / "model-00001-of-00002.safetensors", tmp_path / "model-00002-of-00002.safetensors"]
    names = sorted(tensors)
    for part, half in zip(parts, (names[:10], names[10:])):
        save_file({name: tensors[name] for name in half}, part)
    out = tmp_path / "run"
    said = succeed("flashlm", "import-hgrn-bit", *parts, "--out", out, "--tokenizer", dataset)
    assert "2 layers, 300 x 32" in said
    assert loss_of(out, dataset) > 0
    assert succeed("flashlm", "generate", out, "--prompt", "the", "--tokens", 4)
    succeed("flashlm", "export", out)
    refused = run("flashlm", "import-hgrn-bit", *parts, "--out", tmp_path / "half", "--tokenizer", "gpt2:.corpus/gpt2", cwd=ROOT)
    assert refused.returncode == 1 and "must have the model's 300 entries, got 50257" in refused.stderr
    refused = run("flashlm", "import-hgrn-bit", parts[0], "--out", tmp_path / "half")
    assert refused.returncode == 1 and "has no tensor" in refused.stderr and len(refused.stderr.splitlines()) == 1
    assert not (tmp_path / "half").exists()

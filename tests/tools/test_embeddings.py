# SPDX-License-Identifier: Apache-2.0
"""flashlm embeddings against NumPy's singular value decomposition, and training that starts from what it writes."""

import json
import re
import shutil
import subprocess

import numpy
import pytest
import tokenizers
import torch
from programs import ROOT, program_path, run, succeed
from safetensors import safe_open
from safetensors.torch import load_file, save_file


def made_up_table(rows, columns, seed=1):
    """Of a spectrum like GPT-2's: one large direction, which is mostly the mean row, and a flat rest."""
    random = numpy.random.default_rng(seed)
    scale = numpy.concatenate([[3.0], numpy.linspace(1, 0.4, columns - 1)])
    mixed = random.standard_normal((rows, columns)) * scale @ numpy.linalg.qr(random.standard_normal((columns, columns)))[0]
    return 0.14 * (mixed + 0.3 * random.standard_normal(columns))


def numpy_compressed(table, dim):
    """U S of the first dim, with the largest component of each right singular vector positive; all S."""
    u, s, vt = numpy.linalg.svd(table, full_matrices=False)
    signs = numpy.sign(vt[numpy.arange(len(s)), numpy.abs(vt).argmax(axis=1)])
    return (u * s * signs)[:, :dim], s


def write_table(path, table, dtype, name="wte.weight"):
    """Returns what is then in the file, in float64."""
    rows = torch.from_numpy(table).to(dtype)
    save_file({name: rows, "h.0.attn.bias": torch.ones(4, 4, dtype=torch.bool)}, path)
    return rows.double().numpy()


@pytest.mark.parametrize("center", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_equals_numpys(dtype, center, tmp_path):
    source, out = tmp_path / "gpt2.safetensors", tmp_path / "out.safetensors"
    table = write_table(source, made_up_table(5000, 96), dtype)
    printed = succeed("flashlm", "embeddings", source, "--out", out, "--dim", 32, *(["--center"] if center else []))
    want, s = numpy_compressed(table - table.mean(axis=0) if center else table, 32)
    got = load_file(out)
    assert set(got) == {"embedding.weight", "singular_values"}
    assert got["embedding.weight"].dtype == torch.float32
    rms = numpy.sqrt((want**2).mean())
    assert numpy.abs(got["embedding.weight"].numpy() - want).max() < 1e-4 * rms
    numpy.testing.assert_allclose(got["singular_values"].numpy(), s, rtol=1e-6)
    kept = (s[:32] ** 2).sum() / (s**2).sum()
    with safe_open(out, "pt") as file:
        metadata = file.metadata()
    assert metadata["format"] == "flashlm-embedding" and metadata["source"] == "wte.weight"
    assert metadata["centered"] == ("true" if center else "false")
    assert float(metadata["variance_kept"]) == pytest.approx(kept, abs=1e-6)
    assert "wte.weight of" in printed and "5000 x 96" in printed
    assert f"variance kept {100 * kept:.2f} %" in printed
    assert f"1: {s[0]:.4f}, 32: {s[31]:.4f}, 33: {s[32]:.4f}, 96: {s[95]:.4f}" in printed
    spread = (want - want.mean(axis=0)).std()
    assert f"RMS {rms:.4f}, about the mean row {spread:.4f}" in printed
    assert f"deviation of about {numpy.sqrt(32) * spread:.2f}" in printed


def test_name_and_size(tmp_path):
    source, out = tmp_path / "model.safetensors", tmp_path / "out.safetensors"
    table = write_table(source, made_up_table(200, 16), torch.float32, "model.embed_tokens.weight")
    refuse("has no wte.weight or transformer.wte.weight; choose with --name one of: h.0.attn.bias, model.embed_tokens.weight",
           source, "--out", out, "--dim", 8)
    succeed("flashlm", "embeddings", source, "--out", out, "--dim", 16, "--name", "model.embed_tokens.weight", "--rms", 0.02)
    got = load_file(out)["embedding.weight"].double().numpy()
    assert numpy.sqrt((got**2).mean()) == pytest.approx(0.02, rel=1e-6)
    # Nothing was cut: all products between rows are the table's, up to the factor.
    numpy.testing.assert_allclose(got @ got.T, table @ table.T * (got**2).sum() / (table**2).sum(), atol=1e-7)


GPT2 = ROOT / ".corpus" / "gpt2"  # tools/setup brings it


def gpt2_pieces(tokens):
    """The ids of GPT-2's tokens of each text, by another implementation; of a lone byte, from how its vocabulary begins:
    with the bytes that are printable characters of Latin-1, then the others."""
    gpt2 = tokenizers.Tokenizer(tokenizers.models.BPE.from_file(str(GPT2 / "encoder.json"), str(GPT2 / "vocab.bpe")))
    gpt2.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    order = [*range(33, 127), *range(161, 173), *range(174, 256)]
    order += [byte for byte in range(256) if byte not in order]
    return [[order.index(text[0])] if len(text) == 1 else gpt2.encode(text.decode()).ids for text in tokens]


def test_maps_gpt2s_table_to_another_vocabulary(corpus, dataset, tmp_path):
    source, out, model = tmp_path / "gpt2.safetensors", tmp_path / "out.safetensors", dataset / "tokenizer.model"
    table = write_table(source, made_up_table(50257, 8), torch.float32)
    arguments = (source, "--out", out, "--dim", 8)
    refuse("go together", *arguments, "--map-from", f"gpt2:{GPT2}")
    printed = succeed("flashlm", "embeddings", *arguments, "--map-from", f"gpt2:{GPT2}", "--tokenizer", model)
    assert "300 tokens" in printed
    flashlm = program_path("flashlm")
    # Tokens that a text has, its bytes that are no token of their own included, and what each of them stands for.
    text = (corpus / "00.txt").read_bytes()[:5000] + "é\U0001f3db".encode() + b"\xff\xfe"
    ids = subprocess.run([flashlm, "encode", model], input=text, capture_output=True, check=True).stdout.split()
    ids = sorted({int(token) for token in ids})
    lines = "".join(f"{token}\n" for token in ids).encode()
    done = subprocess.run([flashlm, "decode", model, "--null"], input=lines, capture_output=True, check=True)
    tokens = done.stdout.split(b"\0")[:-1]
    assert len(ids) == len(tokens) > 40 and b"\xff" in tokens and any(len(token) > 1 for token in tokens)
    want = numpy.stack([table[pieces].mean(axis=0) for pieces in gpt2_pieces(tokens)])
    got = load_file(out)["embedding.weight"].double().numpy()[ids]
    # Nothing was cut, so that all products between rows are as they were before the decomposition.
    numpy.testing.assert_allclose(got @ got.T, want @ want.T, atol=1e-5)


def refuse(words, *args):
    done = run("flashlm", "embeddings", *args)
    assert done.returncode == 1 and words in done.stderr and len(done.stderr.splitlines()) == 1, done.stderr


def test_refuses(tmp_path):
    source, out = tmp_path / "t.safetensors", tmp_path / "out.safetensors"
    refuse("nowhere", tmp_path / "nowhere", "--out", out)
    write_table(source, made_up_table(50, 8), torch.float32)
    refuse("--dim must be in [1, 8] for a table of 50 x 8, got 256", source, "--out", out)
    source.write_bytes(source.read_bytes()[:-1])
    refuse("damaged or not a safetensors file", source, "--out", out)
    assert not out.exists()


# ---- training that starts from it ----


@pytest.fixture(scope="module")
def embedding(tmp_path_factory):
    """300 x 32, as the tests' tokenizer and model have it."""
    folder = tmp_path_factory.mktemp("embedding")
    write_table(folder / "table.safetensors", made_up_table(300, 48), torch.float32)
    succeed("flashlm", "embeddings", folder / "table.safetensors", "--out", folder / "e.safetensors", "--dim", 32)
    return folder / "e.safetensors"


def checkpoints(folder):
    """By step."""
    return {int(path.stem.removeprefix("step-")): load_file(path) for path in (folder / "checkpoints").iterdir()}


HEADS = {
    "full": (),
    "hierarchical": ("--head", "hierarchical", "--head-bias", "true"),
    "hierarchical_untied": ("--head", "hierarchical", "--tied", "false"),
    "lazy": ("--lazy-embedding", "true", "--embedding-scale", "5"),
    "lazy_adaptive": ("--lazy-embedding", "true", "--head", "adaptive", "--cutoffs", "40", "120"),
}
# Steps 1 to 3 are before half of the run.
FREEZE = ("--steps", 8, "--freeze-embedding", 0.5, "--checkpoint-every", 1, "--keep-checkpoints", 100, "--sample-every", "0",
          "--eval-every", "0", "--warmup-steps", 0, "--decay-start", 1, "--threads", 1)  # fmt: skip


@pytest.mark.parametrize("name", HEADS)
def test_embedding_is_frozen_and_then_trained(name, embedding, dataset, tiny_config, tmp_path):
    args = ("--config", tiny_config, "--data", dataset, "--init-embedding", embedding, *HEADS[name], *FREEZE)
    printed = succeed("train_flashlm", *args, "--out", tmp_path / "run")
    assert "not trained in the first 50 % of the run" in printed
    start = load_file(embedding)["embedding.weight"]
    steps = checkpoints(tmp_path / "run")
    optimizer = "optimizer.embedding.weight."
    for step in (1, 2, 3):
        state = steps[step]
        assert torch.equal(state["model.embedding.weight"], start), step
        assert torch.equal(state["ema.embedding.weight"], start), step
        assert not [key for key in state if key.startswith(optimizer)], step
    # Another table of the head's own is trained all the while, and so is the body.
    assert not torch.equal(steps[1]["model.final_norm.scale"], steps[3]["model.final_norm.scale"])
    for table in ("head.word_weight", "head.class_weight", "head.weight"):
        if "model." + table in steps[1]:
            assert not torch.equal(steps[1]["model." + table], steps[3]["model." + table]), table
            assert steps[3][f"optimizer.{table}.step"] == 3
    assert not torch.equal(steps[4]["model.embedding.weight"], start)
    assert steps[8][optimizer + "step"] == 5
    # Moments that begin at step 4, as if AdamW had not been there before: m = (1 - beta1) g and v = (1 - beta2) g^2, so that
    # the first update is the learning rate's size, after decay.
    m, v = steps[4][optimizer + "exp_avg"], steps[4][optimizer + "exp_avg_sq"]
    moved = v > 1e-12  # where epsilon does not count
    assert moved.any()
    torch.testing.assert_close((m**2 / v)[moved], torch.full_like(v, 0.1**2 / 0.05)[moved])
    lr, decay = 3e-3, 0.1
    change = steps[4]["model.embedding.weight"] - start * (1 - lr * decay)
    torch.testing.assert_close(change[moved], -lr * m.sign()[moved], rtol=1e-2, atol=1e-6)


@pytest.mark.parametrize("name", ["full", "lazy_adaptive"])
def test_resumes_bit_for_bit_from_both_phases(name, embedding, dataset, tiny_config, tmp_path):
    copied, whole = tmp_path / "embedding.safetensors", tmp_path / "whole"
    shutil.copy(embedding, copied)
    succeed("train_flashlm", "--config", tiny_config, "--data", dataset, "--init-embedding", copied, *HEADS[name], *FREEZE,
            "--out", whole)  # fmt: skip
    copied.unlink()  # not needed any more
    for stop in (2, 5):
        part = tmp_path / f"from_{stop}"
        shutil.copytree(whole, part)
        (part / "model.safetensors").unlink()
        for path in (part / "checkpoints").iterdir():
            if int(path.stem.removeprefix("step-")) > stop:
                path.unlink()
        succeed("train_flashlm", "--out", part, "--resume")
        assert (part / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes(), stop


def test_freezes_a_tenth_by_default_and_never_without_an_embedding(embedding, dataset, tiny_config, tmp_path):
    args = ("--config", tiny_config, "--data", dataset, "--checkpoint-every", 30, "--threads", 1, "--sample-every", "0")
    succeed("train_flashlm", *args, "--out", tmp_path / "with", "--init-embedding", embedding)
    succeed("train_flashlm", *args, "--out", tmp_path / "without")
    assert checkpoints(tmp_path / "with")[30]["optimizer.embedding.weight.step"] == 28  # 30 steps: 1 and 2 are frozen
    assert checkpoints(tmp_path / "without")[30]["optimizer.embedding.weight.step"] == 30
    # The trained model is used as any other.
    out = succeed("flashlm", "export", tmp_path / "with")
    assert re.search("TorchScript", out)
    losses = [json.loads(line)["val_loss"] for line in (tmp_path / "with" / "metrics.jsonl").read_text().splitlines()]
    losses = [loss for loss in losses if loss is not None]
    assert losses[-1] < losses[0] - 0.3


def test_embedding_replaces_that_of_another_run(embedding, finished_run, dataset, tiny_config, tmp_path):
    succeed("train_flashlm", "--config", tiny_config, "--data", dataset, "--out", tmp_path / "run", "--init", finished_run,
            "--init-embedding", embedding, *FREEZE)  # fmt: skip
    first = checkpoints(tmp_path / "run")[1]
    assert torch.equal(first["model.embedding.weight"], load_file(embedding)["embedding.weight"])


def test_training_refuses(embedding, dataset, tiny_config, tmp_path):
    args = ("--config", tiny_config, "--data", dataset, "--out", tmp_path / "run")
    for words, more in [
        ("embedding.weight must be V x D = 300 x 16, got 300 x 32; make it with flashlm embeddings --dim 16",
         ("--d-model", 16, "--init-embedding", embedding)),
        ("nowhere", ("--init-embedding", tmp_path / "nowhere")),
        ("--freeze-embedding must be in [0, 1), got 1", ("--init-embedding", embedding, "--freeze-embedding", 1)),
    ]:  # fmt: skip
        done = run("train_flashlm", *args, *more)
        assert done.returncode == 1 and words in done.stderr, done.stderr
    assert not (tmp_path / "run").exists()

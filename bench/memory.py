#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Peak memory of training a model and of generating with it: FlashLM beside the same model in plain PyTorch.

    bench/memory.py train --config train/configs/matmulfree-13m.toml --batch 8 --seq-len 1024 [--steps 2] [--set NAME=VALUE ...]
    bench/memory.py infer --config train/configs/matmulfree-1.3b.toml [--no-plain]

Prints a Markdown table. Every contestant runs in a process of its own, with its libraries, from start to end; the peak is what the
system counted as resident (ru_maxrss), in MB of 10^6 bytes. FlashLM's programs are those of build/release, or of $FLASHLM_BUILD.

Plain PyTorch is what one writes without fused operators: float32; RMSNorm, both quantizations and the product of a BitLinear as
autograd's operations, straight-through by x + (q - x).detach(); a loop over time; F.cross_entropy on all logits; torch.optim.AdamW. It
takes care of memory where that costs no code: gradients are freed between steps, the recurrence is unbind, addcmul and stack. To
generate it keeps the quantized weights alone, in float32.

Presets may be of block "matmulfree" and "hgrn-bit" with MLGRU mixers, "absmean" and "int8". A head that is not full becomes one, not
tied, for every contestant. `train` gives FlashLM its tokens by --tokens, at random, and turns off all reports but the last evaluation.
"""

import argparse
import array
import importlib.metadata
import json
import math
import os
import pathlib
import random
import shlex
import subprocess
import sys
import tempfile
import tomllib

# torch is imported by the plain contestant alone: until a program is loaded, its memory counts as that of whoever starts it.

ROOT = pathlib.Path(__file__).resolve().parents[1]
BUILD = pathlib.Path(os.environ.get("FLASHLM_BUILD", ROOT / "build" / "release"))
# Of model/config.h and train/config.h, those that the plain model has and that a preset may leave out.
DEFAULTS = {
    "vocab-size": 50257, "d-model": 256, "d-inner": 683, "layers": 1, "recursions": 2, "quantizer": "threshold", "activation": "none",
    "norm-eps": 1e-8, "embedding-std": 0.02, "embedding-scale": 1.0, "head": "full", "tied": True, "head-bias": False, "block": "v3",
    "mixers": ["conv"], "head-quantizer": "none", "clip-norm": 1.0, "adamw-lr": 3e-4, "weight-decay": 0.1,
}  # fmt: skip


class Refusal(Exception):
    """A mistake of the caller's, told in one line."""


# ---- settings ----


def read_settings(path, overrides):
    """Of the preset and --set, with the head that the contestants have in common."""
    try:
        settings = tomllib.loads(path.read_text())
    except (OSError, tomllib.TOMLDecodeError) as error:
        raise Refusal(f"{path}: {getattr(error, 'strerror', error)}") from error
    for override in overrides:
        name, separator, value = override.partition("=")
        if not separator:
            raise Refusal(f"--set must be NAME=VALUE, got '{override}'")
        try:
            settings[name] = tomllib.loads(f"value = {value}")["value"]
        except tomllib.TOMLDecodeError:
            settings[name] = value  # a word without quotes
    if settings.get("head", "full") != "full":
        settings |= {"head": "full", "tied": False}
    c = DEFAULTS | settings
    for name, default in DEFAULTS.items():
        if not isinstance(c[name], (int, float) if isinstance(default, float) else type(default)):
            raise Refusal(f"{path}: {name} must be of type {type(default).__name__}, got {c[name]!r}")
    for name, allowed in {"block": ["matmulfree", "hgrn-bit"], "quantizer": ["absmean"], "activation": ["int8"]}.items():
        if c[name] not in allowed:
            raise Refusal(f"{path}: {name} must be {' or '.join(map(repr, allowed))}, got '{c[name]}'")
    if set(c["mixers"]) != {"mlgru"}:
        raise Refusal(f"{path}: mixers must be 'mlgru' alone, got {c['mixers']}")
    if c["vocab-size"] > 65536:
        raise Refusal(f"{path}: vocab-size must be at most 65536, got {c['vocab-size']}")
    return settings


def shapes(c):
    """Of every parameter, by FlashLM's name."""
    d, inner, vocab, released = c["d-model"], c["d-inner"], c["vocab-size"], c["block"] == "hgrn-bit"
    out = {"embedding.weight": (vocab, d), "final_norm.scale": (d,)}

    def linear(name, rows, columns, bias=False):
        out[f"{name}.weight"], out[f"{name}.norm_scale"] = (rows, columns), (columns,)
        if bias:
            out[f"{name}.bias"] = (rows,)

    for block in blocks(c):
        for gate in "fcgo":
            linear(f"{block}.token_mixer.{gate}_proj", d, d, bias=not released)
        if released:
            out |= {f"{block}.{norm}.scale": (d,) for norm in ("norm1", "norm2", "token_mixer.g_norm")}
            linear(f"{block}.glu.gate_up_proj", 2 * inner, d)
        else:
            linear(f"{block}.glu.gate_proj", inner, d)
            linear(f"{block}.glu.up_proj", inner, d)
        linear(f"{block}.glu.down_proj", d, inner)
    if released:
        out["lower_bounds"] = (c["layers"], d)
    if not c["tied"]:
        out["head.weight"] = (vocab, d)
    if c["head-bias"]:
        out["head.bias"] = (vocab,)
    if c["head-quantizer"] == "absmean":
        out["head.norm_scale"] = (d,)
    return out


def blocks(c):
    return ["block"] if c["layers"] == 1 else [f"blocks.{i}" for i in range(c["layers"])]


def is_ternary(c, name):
    return name.endswith("_proj.weight") or (name == "head.weight" and c["head-quantizer"] == "absmean")


def parameter_count(c):
    return sum(math.prod(shape) for shape in shapes(c).values())


# ---- plain PyTorch ----


def plain(task, c, batch, seq_len, steps):
    """The contestant's process. Prints the last loss, or the token."""
    import torch
    import torch.nn.functional as F

    def rms_norm(x, scale, eps):
        return x * torch.rsqrt(x.pow(2).mean(dim=-1, keepdim=True) + eps) * scale

    def quantize_rows(x):
        s = 127 / x.abs().amax(dim=-1, keepdim=True).clamp(min=1e-5)
        return (x * s).round().clamp(-128, 127) / s

    def quantize_weight(weight):
        gamma = weight.abs().mean().clamp(min=1e-5)
        return (weight / gamma).round().clamp(-1, 1) * gamma

    def quantize_once(weight):
        """In place, so that no second matrix is needed."""
        gamma = (torch.linalg.vector_norm(weight, 1) / weight.numel()).clamp(min=1e-5)
        weight.div_(gamma).round_().clamp_(-1, 1).mul_(gamma)

    def bit_linear(x, layer):
        n = rms_norm(x, p[f"{layer}.norm_scale"], 1e-6)
        weight = p[f"{layer}.weight"]
        if task == "infer":
            n = quantize_rows(n)
        else:
            n = n + (quantize_rows(n) - n).detach()
            weight = weight + (quantize_weight(weight) - weight).detach()
        return F.linear(n, weight, p.get(f"{layer}.bias"))

    def recurrence(f, c):
        h, out = torch.zeros_like(f[:, 0]), []
        for f_t, input_t in zip(f.unbind(1), ((1 - f) * c).unbind(1)):
            h = torch.addcmul(input_t, f_t, h)
            out.append(h)
        return torch.stack(out, dim=1)

    def paper_block(x, block):
        mixer, glu = f"{block}.token_mixer", f"{block}.glu"
        f = torch.sigmoid(bit_linear(x, f"{mixer}.f_proj"))
        h = recurrence(f, F.silu(bit_linear(x, f"{mixer}.c_proj")))
        x = x + bit_linear(torch.sigmoid(bit_linear(x, f"{mixer}.g_proj")) * h, f"{mixer}.o_proj")
        gate = F.silu(bit_linear(x, f"{glu}.gate_proj"))
        return x + bit_linear(gate * bit_linear(x, f"{glu}.up_proj"), f"{glu}.down_proj")

    def released_block(x, block, lower_bound):
        mixer, glu, eps = f"{block}.token_mixer", f"{block}.glu", c["norm-eps"]
        n = rms_norm(x, p[f"{block}.norm1.scale"], eps)
        f = lower_bound + (1 - lower_bound) * torch.sigmoid(bit_linear(n, f"{mixer}.f_proj"))
        h = recurrence(f, F.silu(bit_linear(n, f"{mixer}.c_proj")))
        g = rms_norm(bit_linear(n, f"{mixer}.g_proj"), p[f"{mixer}.g_norm.scale"], eps)
        x = x + bit_linear(g * F.silu(h), f"{mixer}.o_proj")
        n = rms_norm(x, p[f"{block}.norm2.scale"], eps)
        gate, up = bit_linear(n, f"{glu}.gate_up_proj").chunk(2, dim=-1)
        return x + bit_linear(F.silu(gate) * up, f"{glu}.down_proj")

    def logits(ids):
        x = F.embedding(ids, p["embedding.weight"]) * c["embedding-scale"]
        if c["block"] == "hgrn-bit":
            shares = torch.softmax(p["lower_bounds"], dim=0)
            lower_bounds = torch.cumsum(shares, dim=0) - shares[0]
        for _ in range(c["recursions"]):
            for i, block in enumerate(blocks(c)):
                x = released_block(x, block, lower_bounds[i]) if c["block"] == "hgrn-bit" else paper_block(x, block)
        h = rms_norm(x, p["final_norm.scale"], c["norm-eps"])
        if c["head-quantizer"] == "absmean":
            return bit_linear(h, "head")
        return F.linear(h, p["embedding.weight" if c["tied"] else "head.weight"], p.get("head.bias"))

    torch.manual_seed(0)
    p = {}
    for name, shape in shapes(c).items():
        p[name] = torch.ones(shape) if "scale" in name else torch.empty(shape).normal_(std=c["embedding-std"])
        if task == "infer" and is_ternary(c, name):
            quantize_once(p[name])
    if task == "infer":
        with torch.no_grad():
            print("token", logits(torch.tensor([[1]]))[0, -1].argmax().item())
        return

    for weight in p.values():
        weight.requires_grad_()
    matrices, vectors = ([w for w in p.values() if (w.ndim > 1) == wanted] for wanted in (True, False))
    groups = [{"params": matrices, "weight_decay": c["weight-decay"]}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=c["adamw-lr"], betas=(0.9, 0.95))
    for _ in range(steps):
        tokens = torch.randint(c["vocab-size"], (batch, seq_len + 1))
        optimizer.zero_grad()
        loss = F.cross_entropy(logits(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())
        loss.backward()
        if c["clip-norm"] > 0:
            torch.nn.utils.clip_grad_norm_(list(p.values()), c["clip-norm"])
        optimizer.step()
    print("loss", loss.item())


def plain_command(task, settings, batch=1, seq_len=1, steps=1):
    return [sys.executable, __file__, "plain", json.dumps([task, DEFAULTS | settings, batch, seq_len, steps])]


# ---- FlashLM ----


def program(folder, name):
    path = BUILD / folder / name
    if not path.exists():
        raise Refusal(f"{path} is not built; run tools/test")
    return str(path)


def write_toml(settings, path):
    """Numbers, words, truths and lists of them look the same in JSON."""
    path.write_text("".join(f"{name} = {json.dumps(value)}\n" for name, value in settings.items()))
    return str(path)


def write_tokens(settings, seq_len, path):
    draw = random.Random(0)
    vocab = (DEFAULTS | settings)["vocab-size"]
    # 5 % are held out, and must be a window of the evaluation.
    ids = array.array("H", (draw.randrange(vocab) for _ in range(100 * (seq_len + 1))))
    if sys.byteorder == "big":
        ids.byteswap()
    path.write_bytes(ids.tobytes())
    return str(path)


def train_command(settings, batch, seq_len, steps, recompute, folder):
    """In a new folder of its own within `folder`."""
    out = pathlib.Path(tempfile.mkdtemp(dir=folder))
    given = settings | {
        "tokens": write_tokens(settings, seq_len, out / "tokens.bin"), "vocab-size": (DEFAULTS | settings)["vocab-size"],
        "batch-size": batch, "curriculum": f"0:{seq_len}:1", "steps": steps, "max-minutes": 0, "matrix-optimizer": "adamw",
        "position-fraction": 1, "ema-decay": 0, "recompute": recompute, "eval-every": "0", "sample-every": "0", "checkpoint-every": "0", "log-every": "1",
        "eval-tokens": min(seq_len, 256), "eval-seq-len": min(seq_len, 256), "out": str(out / "run"),
    }  # fmt: skip
    return [program("train", "train_flashlm"), "--config", write_toml(given, out / "settings.toml")]


def generate_command(settings, folder):
    """Of a file of random weights, packed, which is made in `folder` now."""
    flashlm, toml = program("tools", "flashlm"), write_toml(settings, pathlib.Path(folder) / "settings.toml")
    model = str(pathlib.Path(folder) / "model.safetensors")
    peak_mb("flashlm pack", [flashlm, "pack", "--random", toml, "--out", model])
    return [flashlm, "generate", model, "--ids", "1", "--tokens", "1"]


# ---- the table ----


def peak_mb(name, command, must_print=""):
    """Of a process of its own."""
    with tempfile.TemporaryFile("w+", errors="replace") as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT)
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        output.seek(0)
        text = output.read()
    if process.returncode < 0:
        raise Refusal(f"{name} was ended by signal {-process.returncode}")
    last_line = (text.strip().splitlines() or ["no message"])[-1]
    if process.returncode > 0:
        raise Refusal(f"{name} failed: {last_line}")
    if must_print not in text:
        raise Refusal(f"{name} must print '{must_print}', got: {last_line}")
    return usage.ru_maxrss * 1024 / 1e6


def processor():
    lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return f"{names[0] if names else 'unknown processor'}, {os.cpu_count()} threads"


def describe(options, settings, tokens):
    c = DEFAULTS | settings
    print(f"`{shlex.join(['bench/memory.py', *sys.argv[1:]])}`: {options.config.stem}, {parameter_count(c):,} parameters, {tokens}; "
          f"full head, {'tied' if c['tied'] else 'not tied'}; torch {importlib.metadata.version('torch')}; {processor()}.\n")


def print_table(contestants):
    """Rows of the contestants: name, command and words that it must print. The first one is what the others save from."""
    print("| | peak MB | saved |\n| --- | ---: | ---: |", flush=True)
    first = None
    for name, command, must_print in contestants:
        peak = peak_mb(name, command, must_print)
        saved = "" if first is None else f"{100 * (1 - peak / first):.1f} %"
        first = first or peak
        print(f"| {name} | {peak:,.0f} | {saved} |", flush=True)


def train(options):
    settings = read_settings(options.config, options.set)
    size = (options.batch, options.seq_len, options.steps)
    counted = f"{parameter_count(DEFAULTS | settings):,} parameters"
    with tempfile.TemporaryDirectory() as folder:
        contestants = [("plain PyTorch", plain_command("train", settings, *size), "loss")]
        for name, recompute in {"FlashLM": "none", "FlashLM --recompute bfloat16": "bfloat16"}.items():
            contestants.append((name, train_command(settings, *size, recompute, folder), counted))
        describe(options, settings, f"{options.batch} x {options.seq_len} = {options.batch * options.seq_len:,} tokens a step")
        print_table(contestants)


def infer(options):
    settings = read_settings(options.config, options.set)
    with tempfile.TemporaryDirectory() as folder:
        contestants = [] if options.no_plain else [("plain PyTorch, float32", plain_command("infer", settings), "token")]
        contestants.append(("FlashLM, packed", generate_command(settings, folder), ""))
        describe(options, settings, "one token from one")
        print_table(contestants)


def at_least_1(text):
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {value}")
    return value


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True, metavar="train|infer")
    for function in (train, infer):
        command = commands.add_parser(function.__name__)
        command.set_defaults(run=function)
        command.add_argument("--config", type=pathlib.Path, required=True, help="preset to read the model from")
        command.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", help="a setting instead of the preset's")
        if function is train:
            command.add_argument("--batch", type=at_least_1, required=True, help="sequences in a step")
            command.add_argument("--seq-len", type=at_least_1, required=True, help="their length")
            command.add_argument("--steps", type=at_least_1, default=2, help="the second is the first with all moments (default: 2)")
        else:
            command.add_argument("--no-plain", action="store_true", help="leave out plain PyTorch, for models that it has no room for")
    command = commands.add_parser("plain")  # the contestant: started by the others
    command.add_argument("arguments", type=json.loads)
    command.set_defaults(run=lambda options: plain(*options.arguments))
    options = parser.parse_args()
    try:
        options.run(options)
    except Refusal as refusal:
        sys.exit(f"memory.py: {refusal}")


if __name__ == "__main__":
    main()

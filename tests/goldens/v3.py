# SPDX-License-Identifier: Apache-2.0
"""Writes what the v3 model must compute: OUT_DIR/v3.safetensors and OUT_DIR/v3_absmean.safetensors.

    python tests/goldens/v3.py OUT_DIR

An implementation of the model, its loss and its training step in plain PyTorch, from the formulas alone; it
shares nothing with the C++ code that is compared with it. Everything is computed in float64 and stored as F32
(ids and positions as I64). The starting parameters are exact in F32. The result is the same at every run.

The seeds are chosen so that in all ten steps no weight comes within 1e-6 of a change of its ternary value, and
no activation within 1e-6 of its size of a change of its int8 value: float32 therefore follows the whole run, to
about 1e-6 of each tensor's largest element.

v3 is the model of FlashLM v3 made small; v3_absmean the same architecture with the other quantizers, two blocks,
one recursion, a scaled embedding, and every size different. Section CONFIGS has the numbers; they are also in
each file's metadata, as a JSON object under "config".

N = B*T positions; P parameters, by name, as in a v3 checkpoint; S = 10 steps; A = 2 micro-batches a step.
With layers = 1 the block's names begin with "block.", else with "blocks.{n}.":

    embedding.weight                                          (V, D)       also the output layer: stored once
    block.norm1.scale, block.norm2.scale, final_norm.scale    (D)
    block.token_mixer.norms.{i}.scale                         (D)          i: 0, 1, ... one per dilation
    block.token_mixer.layers.{i}.conv_gate.conv.weight        (D, D/G, K)
    block.token_mixer.layers.{i}.conv_value.conv.weight       (D, D/G, K)
    block.token_mixer.out_proj.weight                         (D, D)       ternary
    block.glu.gate_proj.weight, block.glu.up_proj.weight      (H, D)       ternary
    block.glu.down_proj.weight                                (D, H)       ternary
    block.router.linear.weight, block.router.linear.bias      (1, D), (1)  never used: no gradient, never moves

Tensors of a file:

    param.<name>                     the starting parameters, all of P
    tokens             (S*A, B, T+1) micro-batch a of step s (from 1) is row (s-1)*A + a; inputs are [:, :T],
                                     targets [:, 1:]
    logits             (B, T, V)     of tokens[0]
    loss               ()            of tokens[0], every position: smoothed + 1e-4 mean(logsumexp^2)
    loss_smoothed      ()            its cross-entropy with label smoothing 0.1,
    loss_nll           ()            and without
    grad.<name>                      d loss / d parameter; none for the router
    positions          (N/4)         indices into the flattened (B*T) positions, in no order
    positions.loss     ()            the loss over these positions of tokens[0] only
    positions.grad.<name>            its gradients
    train.loss, train.loss_smoothed  (S), mean over the step's micro-batches, before its update
    train.grad_norm    (S)           global norm before clipping
    train.lr_multiplier (S)          WSD schedule: both learning rates are multiplied by it
    step{s}.param.<name>             parameters after step s = 1..10, router left out
    step{s}.ema.<name>               moving average after step s, router left out

A training step, in this order: both learning rates; backward of loss/A for each micro-batch, every position;
the global gradient norm over all parameters clipped to 1; NorMuon; AdamW; the moving average.
"""

import argparse
import json
import math
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file

CONFIGS = {
    "v3": dict(
        seed=6, vocab=61, d=32, inner=85, dilations=[1, 4, 9], kernel=4, groups=4, layers=1, recursions=2,
        quantizer="threshold", activation="none", embedding_scale=1.0, norm_eps=1e-8, batch=2, time=40,
        ema_decay=0.999,
    ),
    "v3_absmean": dict(
        seed=61, vocab=47, d=24, inner=50, dilations=[1, 3], kernel=3, groups=3, layers=2, recursions=1,
        quantizer="absmean", activation="int8", embedding_scale=math.sqrt(24), norm_eps=1e-6, batch=2,
        time=15, ema_decay=0.9,
    ),
}  # fmt: skip
TRAINING = dict(
    steps=10, accumulation=2, clip=1.0, label_smoothing=0.1, z_loss=1e-4,
    warmup_steps=4, decay_from=8, total_steps=12,
    normuon=dict(lr=0.02, beta1=0.95, beta2=0.999, newton_schulz_steps=5, eps=1e-8),
    adamw=dict(lr=3e-4, betas=[0.9, 0.95], eps=1e-8, weight_decay=0.1),
)  # fmt: skip


# ---- model: functions of p, the parameters by name ----


def rms_norm(x, scale, eps):
    return x / torch.sqrt((x * x).mean(dim=-1, keepdim=True) + eps) * scale


class StraightThrough(torch.autograd.Function):
    """forward: the second argument; backward: the gradient goes to the first, unchanged."""

    @staticmethod
    def forward(ctx, value, quantized):
        return quantized.clone()

    @staticmethod
    def backward(ctx, grad):
        return grad, None


def bit_linear(c, x, weight):
    with torch.no_grad():
        mean = weight.abs().mean()
        if c["quantizer"] == "threshold":
            ternary = (weight > mean).to(weight.dtype) - (weight < -mean).to(weight.dtype)
        else:
            gamma = max(mean, torch.tensor(1e-5))
            ternary = gamma * torch.clamp(torch.round(weight / gamma), -1, 1)
        if c["activation"] == "int8":
            largest = x.abs().max(dim=-1, keepdim=True).values
            s = 127 / torch.clamp(largest, min=1e-5)
            rounded = torch.clamp(torch.round(x * s), -128, 127) / s
    if c["activation"] == "int8":
        x = StraightThrough.apply(x, rounded)
    return x @ StraightThrough.apply(weight, ternary).T


def causal_conv(x, weight, dilation, groups):
    """out[t] = sum over k of weight[..., k] applied to x[t - (K-1-k)*dilation], zeros before the start."""
    batch, time, d = x.shape
    taps = weight.shape[2]
    grouped = weight.view(groups, d // groups, d // groups, taps)
    out = torch.zeros_like(x)
    for k in range(taps):
        lag = (taps - 1 - k) * dilation
        if lag >= time:
            continue
        shifted = torch.cat([x.new_zeros(batch, lag, d), x[:, : time - lag]], dim=1)
        per_group = shifted.view(batch, time, groups, d // groups)
        out = out + torch.einsum("btgi,goi->btgo", per_group, grouped[..., k]).reshape(batch, time, d)
    return out


def block(c, p, prefix, x):
    n = rms_norm(x, p[prefix + "norm1.scale"], c["norm_eps"])
    for i, dilation in enumerate(c["dilations"]):
        mixer = f"{prefix}token_mixer."
        h = rms_norm(n, p[f"{mixer}norms.{i}.scale"], c["norm_eps"])
        gate = causal_conv(h, p[f"{mixer}layers.{i}.conv_gate.conv.weight"], dilation, c["groups"])
        value = causal_conv(h, p[f"{mixer}layers.{i}.conv_value.conv.weight"], dilation, c["groups"])
        n = n + torch.sigmoid(gate) * value
    x = x + bit_linear(c, n, p[prefix + "token_mixer.out_proj.weight"])
    n = rms_norm(x, p[prefix + "norm2.scale"], c["norm_eps"])
    gate = bit_linear(c, n, p[prefix + "glu.gate_proj.weight"])
    up = bit_linear(c, n, p[prefix + "glu.up_proj.weight"])
    return x + bit_linear(c, torch.relu(gate) ** 2 * up, p[prefix + "glu.down_proj.weight"])


def prefixes(c):
    return ["block."] if c["layers"] == 1 else [f"blocks.{n}." for n in range(c["layers"])]


def logits_of(c, p, ids):
    x = p["embedding.weight"][ids] * c["embedding_scale"]
    for prefix in prefixes(c):
        for _ in range(c["recursions"]):
            x = block(c, p, prefix, x)
    return rms_norm(x, p["final_norm.scale"], c["norm_eps"]) @ p["embedding.weight"].T


def losses(c, p, tokens, positions=None):
    """(loss, smoothed cross-entropy, plain cross-entropy), of all positions or the given ones."""
    logits = logits_of(c, p, tokens[:, :-1]).flatten(0, 1)
    targets = tokens[:, 1:].flatten()
    if positions is not None:
        logits, targets = logits[positions], targets[positions]
    smoothed = F.cross_entropy(logits, targets, label_smoothing=TRAINING["label_smoothing"])
    z = TRAINING["z_loss"] * (torch.logsumexp(logits, dim=-1) ** 2).mean()
    return smoothed + z, smoothed, F.cross_entropy(logits, targets)


def initial_parameters(c):
    """Sizes as at a start of training, but no scale and no bias at a value that would hide its use."""
    d, inner = c["d"], c["inner"]
    p = {"embedding.weight": 0.1 * torch.randn(c["vocab"], d)}

    def scale(name):
        p[name] = 1 + 0.2 * torch.randn(d)

    for prefix in prefixes(c):
        scale(prefix + "norm1.scale")
        for i in range(len(c["dilations"])):
            scale(f"{prefix}token_mixer.norms.{i}.scale")
            fan_in = d // c["groups"] * c["kernel"]
            for conv in ("conv_gate", "conv_value"):
                weight = torch.randn(d, d // c["groups"], c["kernel"]) / math.sqrt(fan_in)
                p[f"{prefix}token_mixer.layers.{i}.{conv}.conv.weight"] = weight
        p[prefix + "token_mixer.out_proj.weight"] = 0.05 * torch.randn(d, d)
        scale(prefix + "norm2.scale")
        p[prefix + "glu.gate_proj.weight"] = torch.randn(inner, d) / math.sqrt(d)
        p[prefix + "glu.up_proj.weight"] = torch.randn(inner, d) / math.sqrt(d)
        p[prefix + "glu.down_proj.weight"] = 0.05 * torch.randn(d, inner)
        p[prefix + "router.linear.weight"] = 0.05 * torch.randn(1, d)
        p[prefix + "router.linear.bias"] = torch.ones(1)
    scale("final_norm.scale")
    return {name: t.float().double().requires_grad_() for name, t in p.items()}


# ---- training ----


def newton_schulz(m, steps):
    x = m / (m.norm() + 1e-7)
    tall = x.shape[0] > x.shape[1]
    if tall:
        x = x.T
    for _ in range(steps):
        a = x @ x.T
        x = 3.4445 * x + (-4.7750 * a + 2.0315 * (a @ a)) @ x
    return x.T if tall else x


class NorMuon:
    """One momentum per weight, one second moment per row; the update's RMS is 0.2 lr."""

    def __init__(self, weights):
        self.state = [(w, torch.zeros_like(w), w.new_zeros(w.shape[0], 1)) for w in weights]

    def step(self, lr):
        o = TRAINING["normuon"]
        for w, momentum, second in self.state:
            momentum.mul_(o["beta1"]).add_((1 - o["beta1"]) * w.grad)
            update = newton_schulz(momentum, o["newton_schulz_steps"])
            second.mul_(o["beta2"]).add_((1 - o["beta2"]) * (update**2).mean(dim=1, keepdim=True))
            update = update / (second.sqrt() + o["eps"])
            w.sub_(lr * 0.2 * math.sqrt(w.numel()) / (update.norm() + o["eps"]) * update)


class AdamW:
    """Decoupled decay, for all but the one-dimensional parameters; bias-corrected moments."""

    def __init__(self, weights):
        self.state = [(w, torch.zeros_like(w), torch.zeros_like(w)) for w in weights]
        self.steps = 0

    def step(self, lr):
        o = TRAINING["adamw"]
        (beta1, beta2), self.steps = o["betas"], self.steps + 1
        for w, first, second in self.state:
            w.mul_(1 - lr * (o["weight_decay"] if w.ndim > 1 else 0))
            first.mul_(beta1).add_((1 - beta1) * w.grad)
            second.mul_(beta2).add_((1 - beta2) * w.grad**2)
            unbiased = second / (1 - beta2**self.steps)
            w.sub_(lr * first / (1 - beta1**self.steps) / (unbiased.sqrt() + o["eps"]))


def lr_multiplier(step):
    """Warm-up, stable, linear decay; steps count from 1."""
    t = TRAINING
    if step < t["warmup_steps"]:
        return step / t["warmup_steps"]
    if step < t["decay_from"]:
        return 1.0
    return (t["total_steps"] - step) / (t["total_steps"] - t["decay_from"])


def clip_gradients(parameters):
    """Returns the norm before clipping."""
    norm = math.sqrt(sum((w.grad**2).sum().item() for w in parameters))
    factor = min(1.0, TRAINING["clip"] / (norm + 1e-6))
    for w in parameters:
        w.grad.mul_(factor)
    return norm


def train(c, p, tokens):
    """Yields, after each step: (its number, loss, smoothed cross-entropy, gradient norm, moving average)."""
    used = {name: w for name, w in p.items() if "router" not in name}
    is_normuon = lambda name, w: w.ndim == 2 and name != "embedding.weight"
    normuon = NorMuon([w for name, w in used.items() if is_normuon(name, w)])
    adamw = AdamW([w for name, w in used.items() if not is_normuon(name, w)])
    ema = {name: w.detach().clone() for name, w in used.items()}
    accumulation = TRAINING["accumulation"]
    for step in range(1, TRAINING["steps"] + 1):
        multiplier = lr_multiplier(step)
        for w in used.values():
            w.grad = None
        totals = [0.0, 0.0]
        for micro_batch in tokens[(step - 1) * accumulation : step * accumulation]:
            loss, smoothed, _ = losses(c, p, micro_batch)
            (loss / accumulation).backward()
            totals = [totals[0] + loss.item() / accumulation, totals[1] + smoothed.item() / accumulation]
        with torch.no_grad():
            norm = clip_gradients(list(used.values()))
            normuon.step(TRAINING["normuon"]["lr"] * multiplier)
            adamw.step(TRAINING["adamw"]["lr"] * multiplier)
            for name, w in used.items():
                ema[name].mul_(c["ema_decay"]).add_((1 - c["ema_decay"]) * w)
        yield step, *totals, norm, ema


# ---- the files ----


def golden(c):
    torch.manual_seed(c["seed"])
    p = initial_parameters(c)
    micro_batches = TRAINING["steps"] * TRAINING["accumulation"]
    tokens = torch.randint(c["vocab"], (micro_batches, c["batch"], c["time"] + 1))
    count = c["batch"] * c["time"]
    positions = torch.randperm(count)[: count // 4]
    out = {f"param.{name}": w for name, w in p.items()} | {"tokens": tokens, "positions": positions}

    used = [name for name in p if "router" not in name]
    out["logits"] = logits_of(c, p, tokens[0, :, :-1])
    out["loss"], out["loss_smoothed"], out["loss_nll"] = losses(c, p, tokens[0])
    gradients = torch.autograd.grad(out["loss"], [p[name] for name in used])
    out |= {f"grad.{name}": g for name, g in zip(used, gradients)}
    out["positions.loss"] = losses(c, p, tokens[0], positions)[0]
    gradients = torch.autograd.grad(out["positions.loss"], [p[name] for name in used])
    out |= {f"positions.grad.{name}": g for name, g in zip(used, gradients)}
    # Stored now, for training moves p.
    out = {name: t.detach().clone() for name, t in out.items()}

    curves = []
    for step, loss, smoothed, norm, ema in train(c, p, tokens):
        curves.append([loss, smoothed, norm, lr_multiplier(step)])
        out |= {f"step{step}.param.{name}": p[name].detach().clone() for name in used}
        out |= {f"step{step}.ema.{name}": ema[name].clone() for name in used}
    names = ["train.loss", "train.loss_smoothed", "train.grad_norm", "train.lr_multiplier"]
    out |= dict(zip(names, torch.tensor(curves).T))
    return {name: (t.float() if t.is_floating_point() else t).contiguous() for name, t in out.items()}


def main():
    parser = argparse.ArgumentParser(description="Writes what the v3 model must compute, as safetensors.")
    parser.add_argument("out_dir", type=Path)
    out_dir = parser.parse_args().out_dir
    out_dir.mkdir(parents=True, exist_ok=True)
    torch.set_default_dtype(torch.float64)
    torch.set_num_threads(1)  # no thread count may change a bit
    for name, config in CONFIGS.items():
        metadata = {"config": json.dumps(config | TRAINING)}
        save_file(golden(config), out_dir / f"{name}.safetensors", metadata=metadata)


if __name__ == "__main__":
    main()

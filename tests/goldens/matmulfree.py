# SPDX-License-Identifier: Apache-2.0
"""Writes what blocks with an MLGRU must compute: OUT_DIR/{matmulfree,hgrn_bit,hybrid}.safetensors.

    python tests/goldens/matmulfree.py OUT_DIR

An implementation of the model and its loss in plain PyTorch, from the formulas alone, with a loop over time;
it shares nothing with the C++ code that is compared with it. Everything is computed in float64 and stored as
F32 (ids as I64). The starting parameters are exact in F32. The result is the same at every run.

matmulfree is the MatMul-free language model as its paper has it (Zhu et al. 2024, arXiv 2406.02528); hgrn_bit
the model of the paper's released code, with block norms, lower bounds of the forget gates and a ternary
output layer; hybrid v3's block, with an MLGRU in every second layer.

Each seed is the best of 4,000. Throughout the forward pass every s*n, which is rounded to int8, stays at
least 1.8e-4 (matmulfree), 2.9e-4 (hgrn_bit) and 6.3e-4 (hybrid) away from a half-integer, and every
weight/gamma 2.4e-5 away from +-0.5; the script fails if that does not hold. The same code in float32 errs by at
most 8.2e-5 in s*n and 5.8e-7 in weight/gamma: its roundings are the same, and it follows to about 3e-7 of the
largest logit and 2e-6 of each gradient's largest element.

B, T, D, H, V as everywhere; L layers. Parameters, by name:

    embedding.weight (V, D)      final_norm.scale (D)
    head.weight (V, D)           matmulfree and hgrn_bit: the output layer of their own
    head.norm_scale (D)          hgrn_bit: the output layer is ternary
    lower_bounds (L, D)          hgrn_bit
    blocks.{i}.norm1.scale, .norm2.scale (D)                             hgrn_bit, hybrid
    blocks.{i}.token_mixer.{f,c,g,o}_proj.weight (D, D)                  MLGRU
    blocks.{i}.token_mixer.{f,c,g,o}_proj.norm_scale (D)                 matmulfree, hgrn_bit
    blocks.{i}.token_mixer.{f,c,g,o}_proj.bias (D)                       matmulfree
    blocks.{i}.token_mixer.g_norm.scale (D)                              hgrn_bit
    blocks.{i}.token_mixer.{norms,layers,out_proj}...                    hybrid's other layers: as in v3.py
    blocks.{i}.glu.{gate,up}_proj: .weight (H, D), .norm_scale (D)       matmulfree; hybrid: no norm_scale
    blocks.{i}.glu.gate_up_proj: .weight (2H, D), .norm_scale (D)        hgrn_bit: H rows of gate, then up
    blocks.{i}.glu.down_proj: .weight (D, H), .norm_scale (H)            hybrid: no norm_scale

Tensors of a file; its metadata has the model's settings as a JSON object under "config", named as the flags:

    param.<name>            the parameters
    tokens  (B, T+1)        inputs are [:, :T], targets [:, 1:]
    logits  (B, T, V)
    loss    ()              mean cross-entropy
    grad.<name>             d loss / d parameter, straight-through both roundings
"""

import argparse
import json
import math
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from v3 import StraightThrough, causal_conv, rms_norm

BATCH = 2
COMMON = {"quantizer": "absmean", "activation": "int8", "router": False, "head": "full"}
# No norm-eps is the 1e-6 of the norms inside linear layers. In hgrn_bit it can hardly be seen: after each
# norm comes one inside a linear layer, which takes the row's size away again.
CONFIGS = {
    "matmulfree": COMMON | {
        "vocab-size": 53, "d-model": 27, "d-inner": 50, "layers": 2, "recursions": 2,
        "kernel-size": 4, "groups": 3, "dilations": [1], "norm-eps": 1e-2,
        "embedding-std": 0.02, "embedding-scale": 1.5, "tied": False,
        "block": "matmulfree", "mixers": ["mlgru"], "head-quantizer": "none",
    },
    "hgrn_bit": COMMON | {
        "vocab-size": 47, "d-model": 25, "d-inner": 51, "layers": 3, "recursions": 1,
        "kernel-size": 4, "groups": 5, "dilations": [1], "norm-eps": 1e-3,
        "embedding-std": 0.02, "embedding-scale": 1.0, "tied": False,
        "block": "hgrn-bit", "mixers": ["mlgru"], "head-quantizer": "absmean",
    },
    "hybrid": COMMON | {
        "vocab-size": 51, "d-model": 24, "d-inner": 49, "layers": 3, "recursions": 1,
        "kernel-size": 3, "groups": 4, "dilations": [1, 4], "norm-eps": 1e-5,
        "embedding-std": 0.1, "embedding-scale": 3.0, "tied": True,
        "block": "v3", "mixers": ["conv", "mlgru"], "head-quantizer": "none",
    },
}  # fmt: skip
TIME = {"matmulfree": 12, "hgrn_bit": 13, "hybrid": 15}
SEEDS = {"matmulfree": 1445, "hgrn_bit": 913, "hybrid": 2046}
ROW_MARGINS = {"matmulfree": 1.8e-4, "hgrn_bit": 2.9e-4, "hybrid": 6.3e-4}
WEIGHT_MARGIN = 2.4e-5


def recurrence(f, c):
    """h_t = f_t h_{t-1} + (1 - f_t) c_t from h = 0, over the second dimension."""
    h, out = torch.zeros_like(f[:, 0]), []
    for t in range(f.shape[1]):
        h = f[:, t] * h + (1 - f[:, t]) * c[:, t]
        out.append(h)
    return torch.stack(out, dim=1)


class Model:
    """Settings c, parameters p by name, and the margins of all roundings so far."""

    def __init__(self, c, p):
        self.c, self.p, self.eps = c, p, c["norm-eps"]
        self.row_margin = self.weight_margin = math.inf

    def bit_linear(self, x, layer):
        """int8 rows times ternary weights; norm before and bias after only where the layer has one."""
        if f"{layer}.norm_scale" in self.p:
            x = rms_norm(x, self.p[f"{layer}.norm_scale"], 1e-6)
        weight = self.p[f"{layer}.weight"]
        with torch.no_grad():
            gamma = torch.clamp(weight.abs().mean(), min=1e-5)
            ternary = gamma * torch.clamp(torch.round(weight / gamma), -1, 1)
            s = 127 / torch.clamp(x.abs().amax(dim=-1, keepdim=True), min=1e-5)
            rounded = torch.clamp(torch.round(x * s), -128, 127) / s
            self.row_margin = min(self.row_margin, (torch.remainder(x * s, 1) - 0.5).abs().min().item())
            self.weight_margin = min(self.weight_margin, ((weight / gamma).abs() - 0.5).abs().min().item())
        y = StraightThrough.apply(x, rounded) @ StraightThrough.apply(weight, ternary).T
        return y + self.p[f"{layer}.bias"] if f"{layer}.bias" in self.p else y

    def norm(self, x, name):
        return rms_norm(x, self.p[f"{name}.scale"], self.eps)

    def lower_bound(self, i):
        shares = torch.softmax(self.p["lower_bounds"], dim=0)
        return (torch.cumsum(shares, dim=0) - shares[0])[i]

    # ---- token mixers ----

    def mlgru(self, x, mixer):
        f = torch.sigmoid(self.bit_linear(x, f"{mixer}.f_proj"))
        c = F.silu(self.bit_linear(x, f"{mixer}.c_proj"))
        g = torch.sigmoid(self.bit_linear(x, f"{mixer}.g_proj"))
        return self.bit_linear(g * recurrence(f, c), f"{mixer}.o_proj")

    def released_mlgru(self, x, mixer, lower_bound):
        f = lower_bound + (1 - lower_bound) * torch.sigmoid(self.bit_linear(x, f"{mixer}.f_proj"))
        c = F.silu(self.bit_linear(x, f"{mixer}.c_proj"))
        g = self.norm(self.bit_linear(x, f"{mixer}.g_proj"), f"{mixer}.g_norm")
        return self.bit_linear(g * F.silu(recurrence(f, c)), f"{mixer}.o_proj")

    def conv(self, x, mixer):
        for i, dilation in enumerate(self.c["dilations"]):
            h = self.norm(x, f"{mixer}.norms.{i}")
            gate, value = (
                causal_conv(h, self.p[f"{mixer}.layers.{i}.{name}.conv.weight"], dilation, self.c["groups"])
                for name in ("conv_gate", "conv_value")
            )
            x = x + torch.sigmoid(gate) * value
        return self.bit_linear(x, f"{mixer}.out_proj")

    # ---- channel mixers ----

    def glu(self, x, glu, activation):
        gate, up = self.bit_linear(x, f"{glu}.gate_proj"), self.bit_linear(x, f"{glu}.up_proj")
        return self.bit_linear(activation(gate) * up, f"{glu}.down_proj")

    def released_glu(self, x, glu):
        gate, up = self.bit_linear(x, f"{glu}.gate_up_proj").split(self.c["d-inner"], dim=-1)
        return self.bit_linear(F.silu(gate) * up, f"{glu}.down_proj")

    # ---- the whole ----

    def block(self, x, i):
        name = f"blocks.{i}"
        mixer, glu = f"{name}.token_mixer", f"{name}.glu"
        if self.c["block"] == "matmulfree":
            x = x + self.mlgru(x, mixer)
            return x + self.glu(x, glu, F.silu)
        if self.c["block"] == "hgrn-bit":
            x = x + self.released_mlgru(self.norm(x, f"{name}.norm1"), mixer, self.lower_bound(i))
            return x + self.released_glu(self.norm(x, f"{name}.norm2"), glu)
        mix = {"conv": self.conv, "mlgru": self.mlgru}[mixer_of(self.c, i)]
        x = x + mix(self.norm(x, f"{name}.norm1"), mixer)
        return x + self.glu(self.norm(x, f"{name}.norm2"), glu, lambda gate: torch.relu(gate) ** 2)

    def logits(self, ids):
        x = self.p["embedding.weight"][ids] * self.c["embedding-scale"]
        for _ in range(self.c["recursions"]):
            for i in range(self.c["layers"]):
                x = self.block(x, i)
        h = self.norm(x, "final_norm")
        if self.c["head-quantizer"] == "absmean":
            return self.bit_linear(h, "head")
        return h @ self.p["embedding.weight" if self.c["tied"] else "head.weight"].T


def mixer_of(c, i):
    return c["mixers"][i % len(c["mixers"])]


def initial_parameters(c):
    """Sizes as at a start of training, but no scale and no bias at a value that would hide its use."""
    d, inner, block = c["d-model"], c["d-inner"], c["block"]
    p = {"embedding.weight": c["embedding-std"] * torch.randn(c["vocab-size"], d)}

    def scale(name, size=d):
        p[name] = 1 + 0.2 * torch.randn(size)

    def linear(name, out, size, bias=False):
        p[f"{name}.weight"] = torch.randn(out, size) / math.sqrt(size)
        if block != "v3":
            scale(f"{name}.norm_scale", size)
        if bias:
            p[f"{name}.bias"] = 0.3 * torch.randn(out)

    for i in range(c["layers"]):
        mixer, glu = f"blocks.{i}.token_mixer", f"blocks.{i}.glu"
        if mixer_of(c, i) == "mlgru":
            for name in ("f_proj", "c_proj", "g_proj", "o_proj"):
                linear(f"{mixer}.{name}", d, d, bias=block == "matmulfree")
        else:
            for n in range(len(c["dilations"])):
                scale(f"{mixer}.norms.{n}.scale")
                per_group, taps = d // c["groups"], c["kernel-size"]
                for conv in ("conv_gate", "conv_value"):
                    weight = torch.randn(d, per_group, taps) / math.sqrt(per_group * taps)
                    p[f"{mixer}.layers.{n}.{conv}.conv.weight"] = weight
            linear(f"{mixer}.out_proj", d, d)
        if block == "hgrn-bit":
            scale(f"{mixer}.g_norm.scale")
            linear(f"{glu}.gate_up_proj", 2 * inner, d)
        else:
            linear(f"{glu}.gate_proj", inner, d)
            linear(f"{glu}.up_proj", inner, d)
        linear(f"{glu}.down_proj", d, inner)
        if block != "matmulfree":
            scale(f"blocks.{i}.norm1.scale")
            scale(f"blocks.{i}.norm2.scale")
    if block == "hgrn-bit":
        p["lower_bounds"] = torch.randn(c["layers"], d)
    scale("final_norm.scale")
    if not c["tied"]:
        p["head.weight"] = torch.randn(c["vocab-size"], d) / math.sqrt(d)
    if c["head-quantizer"] == "absmean":
        scale("head.norm_scale")
    return {name: t.float().double().requires_grad_() for name, t in p.items()}


def golden(name):
    c = CONFIGS[name]
    torch.manual_seed(SEEDS[name])
    p = initial_parameters(c)
    tokens = torch.randint(c["vocab-size"], (BATCH, TIME[name] + 1))
    model = Model(c, p)
    logits = model.logits(tokens[:, :-1])
    for margin, least in ((model.row_margin, ROW_MARGINS[name]), (model.weight_margin, WEIGHT_MARGIN)):
        assert margin >= least, f"{name}: the margin must be at least {least}, got {margin}"
    loss = F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
    out = {f"param.{name}": w for name, w in p.items()} | {"tokens": tokens, "logits": logits, "loss": loss}
    out |= {f"grad.{name}": g for name, g in zip(p, torch.autograd.grad(loss, list(p.values())))}
    out = {name: t.detach().float() if t.is_floating_point() else t for name, t in out.items()}
    return {name: t.contiguous() for name, t in out.items()}


def main():
    parser = argparse.ArgumentParser(description="Writes what MLGRU blocks must compute, as safetensors.")
    parser.add_argument("out_dir", type=Path)
    out_dir = parser.parse_args().out_dir
    out_dir.mkdir(parents=True, exist_ok=True)
    torch.set_default_dtype(torch.float64)
    torch.set_num_threads(1)  # no thread count may change a bit
    for name, config in CONFIGS.items():
        save_file(golden(name), out_dir / f"{name}.safetensors", metadata={"config": json.dumps(config)})


if __name__ == "__main__":
    main()

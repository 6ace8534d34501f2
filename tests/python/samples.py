# SPDX-License-Identifier: Apache-2.0
"""The one list of inputs that all operator tests share, and the list of calls that must be refused.

A new operator needs its reference in reference.py, samples and refusals here. test_ops.py does the rest."""

import itertools
import zlib
from dataclasses import dataclass
from typing import Callable

import torch

import reference


@dataclass(frozen=True)
class Sample:
    op: str
    name: str
    make: Callable[[], dict]  # -> the arguments by name, tensors in float64
    smooth: tuple = ()  # differentiable inputs whose gradient finite differences can check
    straight_through: tuple = ()  # differentiable inputs with a gradient by definition, through a quantizer

    def __str__(self):
        return f"{self.op}-{self.name}"

    @property
    def function(self):
        """The operator; AttributeError when the library has none of this name."""
        return getattr(torch.ops.flashlm, self.op).default

    @property
    def reference(self):
        return getattr(reference, self.op)

    @property
    def differentiable(self):
        return self.smooth + self.straight_through

    @property
    def derived_by_torch(self):
        """A composite of torch's own operators, which know their derivatives of every order."""
        return self.op in ("hierarchical_log_prob", "adaptive_log_prob")

    def output_dtype(self, dtype):
        """The inputs' own, but a loss or a weight in bfloat16 would be too coarse."""
        if self.op == "pack_ternary":
            return torch.uint8
        if self.op == "hierarchical_sample":
            return torch.int64
        coarse = self.op == "unpack_ternary" or self.op.endswith(("cross_entropy", "log_prob", "top_k"))
        return torch.promote_types(dtype, torch.float32) if coarse else dtype

    def inputs(self, dtype, requires_grad=True):
        """The arguments, always the same values, floating tensors in `dtype`."""
        torch.manual_seed(zlib.crc32(str(self).encode()))
        out = self.make()
        for name, value in out.items():

            def convert(t, name=name):
                if not isinstance(t, torch.Tensor) or not t.is_floating_point():
                    return t
                return t.to(dtype).requires_grad_(requires_grad and name in self.differentiable)

            out[name] = [convert(t) for t in value] if isinstance(value, list) else convert(value)
        return out


def randn(*shape):
    return torch.randn(shape, dtype=torch.float64)


def scale(width):
    """A norm's scale: about one, no two alike."""
    return 1 + 0.3 * randn(width)


SAMPLES = []


def add(op, name, make, smooth=(), straight_through=()):
    SAMPLES.append(Sample(op, name, make, tuple(smooth), tuple(straight_through)))


# ---- rms_norm ----

for name, shape in {"3d": (2, 3, 17), "one_row": (5,), "no_rows": (0, 8)}.items():
    add("rms_norm", name, lambda shape=shape: dict(x=randn(*shape), scale=scale(shape[-1])), ("x", "scale"))
add("rms_norm", "eps", lambda: dict(x=randn(3, 5), scale=scale(5), eps=0.5), ("x", "scale"))
add("rms_norm", "one_column", lambda: dict(x=randn(4, 1), scale=scale(1), eps=0.5), ("x", "scale"))

# ---- relu2_glu, silu_glu, sigmoid_glu ----

GLUS = ("relu2_glu", "silu_glu", "sigmoid_glu")

for op, (name, shape) in itertools.product(GLUS, {"3d": (2, 3, 17), "scalar": (), "no_rows": (0, 8)}.items()):
    add(op, name, lambda shape=shape: dict(gate=randn(*shape), up=randn(*shape)), ("gate", "up"))

# ---- bit_linear ----


def bit_linear(name, rows, in_features, out_features, norm=False, **options):
    """Finite differences see the steps of a quantizer: the weight's always, x's with int8 activations."""
    inputs = ("x", "norm_scale") if norm else ("x",)
    smooth = inputs if options.get("activation") == "none" else ()

    def make():
        out = dict(x=randn(*rows, in_features), weight=0.1 * randn(out_features, in_features))
        if norm:
            out["norm_scale"] = scale(in_features)
        return out | options

    add("bit_linear", name, make, smooth, ("weight", *(i for i in inputs if i not in smooth)))


bit_linear("defaults", (2, 3), 37, 19)
bit_linear("norm", (2, 3), 37, 19, norm=True, eps=0.1)
bit_linear("absmean_float", (5,), 16, 8, activation="none")
bit_linear("threshold_float", (2, 3), 37, 19, quantizer="threshold", activation="none")
bit_linear("threshold_float_norm", (2, 3), 21, 7, norm=True, quantizer="threshold", activation="none")
bit_linear("threshold_int8", (6,), 65, 33, quantizer="threshold", activation="int8")
bit_linear("one_row", (), 24, 10)
bit_linear("gradient_bfloat16", (5,), 24, 10, gradient="bfloat16")
bit_linear("gradient_int8", (5,), 24, 10, norm=True, gradient="int8")
bit_linear("no_rows", (0, 3), 16, 8, norm=True)


def zeros_for_the_quantizers():
    out = dict(x=randn(3, 12), weight=torch.zeros(5, 12, dtype=torch.float64))
    out["x"][1] = 0
    return out


add("bit_linear", "zeros", zeros_for_the_quantizers, (), ("x", "weight"))

# ---- ternary_glu ----


def ternary_glu(name, rows, width, inner, norms=("norm_scale",), **options):
    inputs = ("x", *norms)
    smooth = inputs if options.get("activation") == "none" else ()
    weights = ("gate_weight", "up_weight", "down_weight")

    def make():
        out = dict(x=randn(*rows, width)) | {w: 0.1 * randn(inner, width) for w in weights[:2]}
        out["down_weight"] = 0.1 * randn(width, inner)
        out |= {norm: scale(inner if norm == "down_norm_scale" else width) for norm in norms}
        return out | options

    add("ternary_glu", name, make, smooth, (*weights, *(i for i in inputs if i not in smooth)))


NORMS = ("norm_scale", "up_norm_scale", "down_norm_scale")
ternary_glu("defaults", (2, 3), 19, 37)
ternary_glu("float", (5,), 16, 24, activation="none", eps=0.1)
ternary_glu("threshold_float", (2, 3), 19, 37, quantizer="threshold", activation="none")
ternary_glu("no_norm", (2, 3), 7, 21, norms=(), nonlinearity="sigmoid")
ternary_glu("no_norm_float", (6,), 7, 21, norms=(), activation="none", quantizer="threshold")
ternary_glu("norms", (2, 3), 7, 21, norms=NORMS, nonlinearity="silu")
ternary_glu("norms_float", (5,), 16, 24, norms=NORMS, nonlinearity="silu", activation="none")
ternary_glu("up_norm_float", (5,), 16, 24, norms=NORMS[1:2], nonlinearity="sigmoid", activation="none")
ternary_glu("one_row", (), 10, 24)
ternary_glu("gradient_bfloat16", (70,), 10, 24, activation="none", gradient="bfloat16")
ternary_glu("gradient_int8", (70,), 10, 24, gradient="int8")
ternary_glu("no_rows", (0, 3), 8, 16)

# ---- pack_ternary, unpack_ternary, packed_linear ----


def packed(name, rows, in_features, out_features, norm=False, quantizer="absmean", **options):
    def weight():
        return 0.1 * randn(out_features, in_features)

    def packed_weight():
        codes, scale = reference.pack_ternary(weight(), quantizer=quantizer)
        return dict(packed=codes, scale=scale)

    def linear():
        norm_scale = dict(norm_scale=scale(in_features)) if norm else {}
        x = randn(*rows, in_features)
        return dict(x=x) | packed_weight() | dict(out_features=out_features) | norm_scale | options

    def unpack():
        return packed_weight() | dict(out_features=out_features, in_features=in_features)

    add("pack_ternary", name, lambda: dict(weight=weight(), quantizer=quantizer))
    add("unpack_ternary", name, unpack)
    add("packed_linear", name, linear)


packed("defaults", (2, 3), 37, 19)
packed("norm", (2, 3), 37, 70, norm=True, eps=0.1)
packed("float", (5,), 16, 8, activation="none")
packed("threshold_float_norm", (2, 3), 21, 129, norm=True, quantizer="threshold", activation="none")
packed("one_row", (), 24, 10, quantizer="threshold")
packed("no_rows", (0, 3), 16, 64, norm=True)

# ---- causal_conv1d, gated_conv ----


def conv(name, batch, time, width, taps, history=False, **options):
    groups, dilation = options.get("groups", 1), options.get("dilation", 1)
    differentiable_past = ("history",) if history else ()

    def weight():
        return 0.5 * randn(width, width // groups, taps)

    def past():
        return dict(history=randn(batch, (taps - 1) * dilation, width)) if history else {}

    if not options.keys() & {"gradient", "precision"}:
        add(
            "causal_conv1d",
            name,
            lambda: dict(x=randn(batch, time, width), weight=weight()) | past() | options,
            ("x", "weight", *differentiable_past),
        )
    add(
        "gated_conv",
        name,
        lambda: dict(
            x=randn(batch, time, width), norm_scale=scale(width), gate_weight=weight(), value_weight=weight()
        )
        | past()
        | options,
        ("x", "norm_scale", "gate_weight", "value_weight", *differentiable_past),
    )


conv("defaults", 2, 5, 4, 3)
conv("dilated", 2, 11, 6, 4, dilation=2, groups=2)
conv("shorter_than_reach", 1, 3, 4, 4, dilation=4, groups=4)
conv("history", 2, 5, 6, 3, history=True, dilation=2, groups=3)
conv("one_step_of_history", 2, 1, 4, 4, history=True, groups=2)
conv("one_tap", 2, 3, 4, 1, groups=2)
conv("no_batch", 0, 5, 4, 3, groups=2)
conv("gradient_bfloat16", 2, 11, 6, 4, dilation=2, groups=2, gradient="bfloat16")
conv("gradient_bfloat16_history", 2, 5, 6, 3, history=True, dilation=2, groups=3, gradient="bfloat16")
conv("bfloat16", 2, 11, 6, 4, dilation=2, groups=2, gradient="bfloat16", precision="bfloat16")
conv("precision_bfloat16", 2, 11, 4, 4, dilation=2, groups=2, precision="bfloat16")

# ---- mlgru, mlgru_step ----


def mlgru(name, batch, time, width, h0=False, lower_bound=False, **options):
    def gates(*shape):
        f = randn(*shape)
        return dict(f=f if options else f.sigmoid(), c=randn(*shape))

    def bound():
        return dict(lower_bound=0.9 * torch.rand(width, dtype=torch.float64)) if lower_bound else {}

    def state():
        return randn(batch, width)

    with_bound = ("lower_bound",) if lower_bound else ()
    add(
        "mlgru",
        name,
        lambda: gates(batch, time, width) | (dict(h0=state()) if h0 else {}) | bound() | options,
        ("f", "c", *(("h0",) if h0 else ()), *with_bound),
    )
    if h0:
        add(
            "mlgru_step",
            name,
            lambda: gates(batch, width) | dict(h=state()) | bound() | options,
            ("f", "c", "h", *with_bound),
        )


mlgru("defaults", 2, 5, 17)
mlgru("h0", 2, 5, 3, h0=True)
mlgru("silu", 2, 5, 17, activation="silu")
mlgru("silu_h0", 3, 4, 5, h0=True, activation="silu")
mlgru("silu_lower_bound", 3, 4, 5, h0=True, lower_bound=True, activation="silu")
mlgru("one_step", 2, 1, 4, lower_bound=True, activation="silu")
mlgru("no_steps", 2, 0, 4, h0=True, lower_bound=True, activation="silu")
mlgru("no_batch", 0, 3, 4, h0=True)

# ---- linear_cross_entropy ----


def linear_cross_entropy(name, rows, width, vocabulary, bias=True, ignored=(), **options):
    def make():
        target = torch.randint(vocabulary, rows)
        target.view(-1)[list(ignored)] = options.get("ignore_index", -100)
        return dict(
            h=randn(*rows, width),
            weight=0.5 * randn(vocabulary, width),
            bias=randn(vocabulary) if bias else None,
            target=target,
        ) | options

    add("linear_cross_entropy", name, make, ("h", "weight", "bias") if bias else ("h", "weight"))


linear_cross_entropy("defaults", (6,), 5, 11, bias=False)
linear_cross_entropy("bias_smoothing_z", (7,), 5, 13, label_smoothing=0.1, z_loss=1e-2)
linear_cross_entropy("ignored", (6,), 5, 11, ignored=(0, 4), label_smoothing=0.2)
linear_cross_entropy("ignore_index", (6,), 5, 11, ignored=(2, 3), ignore_index=7, reduction="sum", z_loss=0.1)
linear_cross_entropy("none", (6,), 5, 11, ignored=(1,), reduction="none", label_smoothing=0.1, z_loss=1e-2)
linear_cross_entropy("3d", (2, 3), 5, 11, reduction="none")
linear_cross_entropy("several_blocks", (70,), 4, 600, label_smoothing=0.1)
linear_cross_entropy("no_rows", (0,), 5, 11, reduction="sum")
linear_cross_entropy("few_words", (1030,), 4, 9, ignored=(3, 600), label_smoothing=0.1)
linear_cross_entropy("bfloat16", (70,), 12, 300, precision="bfloat16", label_smoothing=0.1, z_loss=1e-3)
linear_cross_entropy("bfloat16_few_words", (1030,), 7, 9, bias=False, ignored=(3,), precision="bfloat16")

# ---- hierarchical_*: classes of the sizes given, their words in any order ----


def hierarchical(name, rows, width, sizes, bias=True, ignored=(), k=3, sample=None, **options):
    def layers():
        vocabulary = sum(sizes)
        return dict(
            h=randn(*rows, width),
            class_weight=0.5 * randn(len(sizes), width),
            class_bias=randn(len(sizes)) if bias else None,
            word_weight=0.5 * randn(vocabulary, width),
            word_bias=randn(vocabulary) if bias else None,
            class_words=torch.randperm(vocabulary),
            class_offsets=torch.tensor([0, *itertools.accumulate(sizes)]),
        )

    def with_target():
        target = torch.randint(sum(sizes), rows)
        target.view(-1)[list(ignored)] = options.get("ignore_index", -100)
        return layers() | dict(target=target) | options

    smooth = [n for n in ("h", "class_weight", "class_bias", "word_weight", "word_bias") if bias or "bias" not in n]
    add("hierarchical_cross_entropy", name, with_target, smooth)
    add("hierarchical_log_prob", name, layers, smooth)
    add("hierarchical_top_k", name, lambda: layers() | dict(k=k))
    add("hierarchical_sample", name, lambda: layers() | (sample or dict(temperature=0.0)))


hierarchical("defaults", (6,), 5, (3, 1, 4, 2), bias=False)
hierarchical("bias_smoothing_z", (7,), 5, (1, 5, 5), label_smoothing=0.1, z_loss=1e-2, sample=dict(top_k=1))
hierarchical("ignored", (2, 3), 5, (3, 4), ignored=(0, 4), label_smoothing=0.2, k=7, sample=dict(top_p=1e-6))
hierarchical("ignore_index", (6,), 4, (3, 4, 2), ignored=(2, 3), ignore_index=1, reduction="sum", z_loss=0.1)
hierarchical("none", (6,), 5, (2, 7), ignored=(1,), reduction="none", label_smoothing=0.1, z_loss=1e-2)
hierarchical("one_class", (3,), 5, (6,), bias=False, reduction="none", k=1)
hierarchical("several_blocks", (70,), 4, (500, 100), label_smoothing=0.1)
hierarchical("no_rows", (0,), 5, (3, 2), reduction="sum")
hierarchical("bfloat16", (300,), 12, (300, 1, 40), precision="bfloat16", label_smoothing=0.1, z_loss=1e-3)
hierarchical("bfloat16_none", (300,), 7, (290, 9), bias=False, ignored=(3,), precision="bfloat16", reduction="none")

# ---- adaptive_* ----


def adaptive(name, rows, width, shortlist, tails, bias=True, ignored=(), **options):
    """tails: (words, width) of each."""

    def layers():
        entries = shortlist + len(tails)
        return dict(
            h=randn(*rows, width),
            head_weight=0.5 * randn(entries, width),
            head_bias=randn(entries) if bias else None,
            tail_projections=[0.5 * randn(narrow, width) for _, narrow in tails],
            tail_weights=[0.5 * randn(words, narrow) for words, narrow in tails],
        )

    def with_target():
        target = torch.randint(shortlist + sum(words for words, _ in tails), rows)
        target.view(-1)[list(ignored)] = options.get("ignore_index", -100)
        return layers() | dict(target=target) | options

    smooth = ("h", "head_weight", *(("head_bias",) if bias else ()), "tail_projections", "tail_weights")
    add("adaptive_cross_entropy", name, with_target, smooth)
    add("adaptive_log_prob", name, layers, smooth)


adaptive("defaults", (8,), 6, 3, [(4, 3), (5, 2)], bias=False)
adaptive("bias_smoothing_z", (2, 3), 5, 4, [(6, 3)], label_smoothing=0.1, z_loss=1e-2)
adaptive("ignore_index", (7,), 4, 2, [(3, 2), (4, 1)], ignored=(0, 5), ignore_index=1, reduction="sum")
adaptive("none", (6,), 5, 2, [(3, 2), (1, 2)], ignored=(1,), reduction="none", label_smoothing=0.1)
adaptive("no_rows", (0,), 5, 2, [(3, 2)], reduction="sum")

# ---- calls that must be refused ----


@dataclass(frozen=True)
class Refusal:
    op: str
    changes: dict  # to the arguments of the operator's first sample
    words: str  # of the RuntimeError, after "op: "

    def __str__(self):
        return f"{self.op}-{'-'.join(self.changes)}"

    def inputs(self):
        sample = next(s for s in SAMPLES if s.op == self.op)
        return sample.inputs(torch.float32, requires_grad=False) | self.changes


REFUSALS = [
    Refusal("rms_norm", dict(scale=torch.ones(5)), "scale's size must be 17, got 5"),
    Refusal("rms_norm", dict(eps=-1.0), "eps must be >= 0, got -1"),
    *(Refusal(op, dict(up=torch.ones(1, 17)), "up must have gate's 3 dimensions, got 2") for op in GLUS),
    Refusal("bit_linear", dict(weight=torch.ones(19, 5)), "x's last dimension must be"),
    Refusal("bit_linear", dict(quantizer="ternary"), "quantizer must be"),
    Refusal("bit_linear", dict(activation="int4"), "activation must be"),
    Refusal("bit_linear", dict(gradient="fp8"), "gradient must be"),
    Refusal("ternary_glu", dict(gate_weight=torch.ones(37, 5)), "x's last dimension must be gate_weight's in = 5"),
    Refusal("ternary_glu", dict(down_weight=torch.ones(37, 19)), "down_weight must be (19, 37)"),
    Refusal("ternary_glu", dict(norm_scale=torch.ones(3)), "norm_scale's size must be 19, got 3"),
    Refusal("ternary_glu", dict(up_norm_scale=torch.ones(37)), "up_norm_scale's size must be 19, got 37"),
    Refusal("ternary_glu", dict(down_norm_scale=torch.ones(19)), "down_norm_scale's size must be 37, got 19"),
    Refusal("ternary_glu", dict(nonlinearity="gelu"), "nonlinearity must be 'relu2', 'silu' or 'sigmoid', got 'gelu'"),
    Refusal("ternary_glu", dict(activation="none", gradient="int8"), "gradient 'int8' needs activation 'int8'"),
    Refusal("pack_ternary", dict(quantizer="ternary"), "quantizer must be"),
    Refusal("unpack_ternary", dict(in_features=41), "packed's second size, ceil(in_features / 4), must be 11"),
    Refusal("packed_linear", dict(out_features=65), "packed's first size, ceil(out_features / 64), must be 2"),
    Refusal("packed_linear", dict(activation="int4"), "activation must be"),
    Refusal("causal_conv1d", dict(weight=torch.ones(4, 3, 3)), "weight must be (D, D/groups, K)"),
    Refusal("causal_conv1d", dict(dilation=0), "dilation must be"),
    Refusal("causal_conv1d", dict(groups=3), "groups must divide D"),
    Refusal("gated_conv", dict(norm_scale=torch.ones(3)), "norm_scale's size must be 4, got 3"),
    Refusal("gated_conv", dict(history=torch.ones(2, 3, 4)), "history must be (B, (K-1)*dilation, D)"),
    Refusal("gated_conv", dict(gradient="int8"), "gradient must be 'float32' or 'bfloat16', got 'int8'"),
    Refusal("gated_conv", dict(precision="int8"), "precision must be 'float32' or 'bfloat16', got 'int8'"),
    Refusal("mlgru", dict(c=torch.ones(2, 5, 16)), "c must be (B, T, D) = [2, 5, 17], got [2, 5, 16]"),
    Refusal("mlgru", dict(h0=torch.ones(2, 5, 17)), "h0 must be (B, D) = [2, 17], got [2, 5, 17]"),
    Refusal("mlgru", dict(activation="tanh"), "activation must be none or silu, got tanh"),
    Refusal("mlgru", dict(lower_bound=torch.ones(17)), "lower_bound is for activation silu"),
    Refusal("mlgru_step", dict(f=torch.ones(2, 1, 3)), "f must have 2 dimensions, got 3"),
    Refusal("linear_cross_entropy", dict(reduction="average"), "reduction must be"),
    Refusal("linear_cross_entropy", dict(precision="fp8"), "precision must be"),
    Refusal("linear_cross_entropy", dict(target=torch.full((6,), 11)), "target must be in [0, V)"),
    Refusal("linear_cross_entropy", dict(target=torch.zeros(6)), "target must be int64"),
    Refusal("hierarchical_cross_entropy", dict(target=torch.full((6,), 10)), "target must be in [0, V) = [0, 10)"),
    Refusal(
        "hierarchical_cross_entropy",
        dict(class_words=torch.tensor([0, 1, 2, 7, 3, 4, 5, 6, 7, 8])),
        "class_words must name each word once, got word 7 at 3 and at 8",
    ),
    Refusal("hierarchical_cross_entropy", dict(precision="int8"), "precision must be float32 or bfloat16"),
    Refusal(
        "hierarchical_log_prob",
        dict(class_offsets=torch.tensor([0, 3, 3, 8, 10])),
        "class_offsets must rise, got 3 after 3 at 2",
    ),
    Refusal("hierarchical_log_prob", dict(word_weight=torch.ones(9, 5)), "class_words' size must be 9, got 10"),
    Refusal("hierarchical_top_k", dict(k=11), "k must be at most V = 10, got 11"),
    Refusal("hierarchical_sample", dict(top_p=0.0), "top_p must be in (0, 1], got 0"),
    Refusal("hierarchical_sample", dict(temperature=-1.0), "temperature must be >= 0, got -1"),
    Refusal("adaptive_cross_entropy", dict(target=torch.full((8,), 12)), "target must be in [0, V) = [0, 12)"),
    Refusal("adaptive_log_prob", dict(tail_weights=[]), "tail_weights must have at least 1 tensor, got 0"),
]

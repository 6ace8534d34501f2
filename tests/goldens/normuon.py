# SPDX-License-Identifier: Apache-2.0
"""Trajectories of NorMuon in float64, written from its formulas for the C++ optimizer to be held against.

usage: normuon.py OUT.safetensors

For each case: options (lr, beta1, beta2, weight_decay, eps), weight_0 (m, n), grads (100, m, n), and weight_K after
steps K = 1, 2, 10, 100.
"""
import sys

import numpy as np
from safetensors.numpy import save_file

STEPS = 100
CHECKPOINTS = (1, 2, 10, 100)
SHAPES = {"row": (1, 16), "column": (16, 1), "wide": (7, 33), "tall": (64, 24), "decayed": (7, 33)}


def polar(g, steps=5):
    """The quintic iteration on g, whose odd polynomial acts on the singular values alone: done on them directly.

    With g = U diag(s) V', each step maps s to 3.4445 s - 4.7750 s^3 + 2.0315 s^5. No Gram matrices, no transposes.
    """
    u, s, vt = np.linalg.svd(g, full_matrices=False)
    s = s / (np.sqrt(np.sum(g * g)) + 1e-7)
    for _ in range(steps):
        s = 3.4445 * s - 4.7750 * s**3 + 2.0315 * s**5
    return (u * s) @ vt


def trajectory(weight, grads, lr, beta1, beta2, weight_decay, eps):
    m, n = weight.shape
    momentum, second = np.zeros((m, n)), np.zeros((m, 1))
    for grad in grads:
        momentum = beta1 * momentum + (1 - beta1) * grad
        o = polar(momentum)
        second = beta2 * second + (1 - beta2) * np.mean(o * o, axis=1, keepdims=True)
        scaled = o / (np.sqrt(second) + eps)
        step = lr * 0.2 * np.sqrt(m * n) / (np.sqrt(np.sum(scaled * scaled)) + eps)
        weight = weight - lr * weight_decay * weight - step * scaled
        yield weight


def main(out):
    rng = np.random.default_rng(2510)
    tensors = {}
    for case, (m, n) in SHAPES.items():
        options = (0.02, 0.95, 0.999, 0.1 if case == "decayed" else 0.0, 1e-8)
        weight = rng.normal(0, 0.1, (m, n)).astype(np.float32)
        # A constant direction, noise, and a size that wanders over four decades from step to step.
        sizes = 10.0 ** rng.uniform(-4, 0, (STEPS, 1, 1))
        grads = (sizes * (0.3 * rng.normal(size=(m, n)) + rng.normal(size=(STEPS, m, n)))).astype(np.float32)
        tensors[f"{case}.options"] = np.array(options)
        tensors[f"{case}.weight_0"] = weight
        tensors[f"{case}.grads"] = grads
        weights = trajectory(weight.astype(np.float64), grads.astype(np.float64), *options)
        for step, result in enumerate(weights, start=1):
            if step in CHECKPOINTS:
                tensors[f"{case}.weight_{step}"] = result
    save_file(tensors, out)


if __name__ == "__main__":
    main(sys.argv[1])

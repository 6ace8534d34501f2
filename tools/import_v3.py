#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Turns a checkpoint of the original FlashLM v3, which was trained in PyTorch, into a run folder.

    tools/import_v3.py CHECKPOINT.pt --out RUN [--tokenizer gpt2:FOLDER|FILE] [--weights model|ema]

RUN then works like a run of train_flashlm: flashlm evaluate, generate (with a tokenizer) and export read it, and
train_flashlm trains on from it:

    train_flashlm --config RUN/config.toml --init RUN --tokens FILE --out ANOTHER

Takes the weights (`model_state_dict`, or with --weights ema their moving average, `ema_state`) and the sizes (`config`).
The optimizers' state stays behind: the final checkpoint has none. No code from CHECKPOINT is run. Run this with the
Python of .venv.
"""

import argparse
import json
import os
import sys
import tomllib
from pathlib import Path

import tokenizers
import torch
import xxhash
from safetensors.torch import save

PRESET = Path(__file__).resolve().parent.parent / "train" / "configs" / "v3.toml"
# Constants of v3's code, which its `config` does not name.
KERNEL, GROUPS, DILATIONS = 4, 16, [1, 4, 64]


class Refusal(Exception):
    """One line: what is wrong, and where."""


def read_checkpoint(path):
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise Refusal(f"there is no checkpoint {path}") from error
    except Exception as error:  # whatever zip files, pickle and torch throw at damaged or foreign bytes
        reason = " ".join(str(error).split())[:160]
        raise Refusal(f"{path} is damaged, or more than tensors and numbers: {reason}") from error
    if not isinstance(checkpoint, dict) or not isinstance(checkpoint.get("model_state_dict"), dict):
        raise Refusal(f"{path} is no v3 checkpoint: it has no model_state_dict")
    if not isinstance(checkpoint.get("config"), dict):
        raise Refusal(f"{path} is no v3 checkpoint: it has no config, which names the model's sizes")
    return checkpoint


def size(config, key):
    value = config.get(key)
    if type(value) is not int or value < 1:
        raise Refusal(f"the checkpoint's config: {key} must be a positive integer, got {value!r}")
    return value


def settings_of(config, state):
    """The model's settings, by the names that every version of flashlm knows. It takes settings that are not named, the
    younger ones, to be as v3 has them, and refuses a file that lacks one of these (model/config.cpp)."""
    d_model = size(config, "d_model")
    if "glu_inner_dim" not in config and isinstance(config.get("glu_expansion"), float):
        config = config | {"glu_inner_dim": int(d_model * config["glu_expansion"])}
    if d_model % GROUPS:
        raise Refusal(f"the checkpoint's config: d_model must be a multiple of {GROUPS}, got {d_model}")
    return {
        "vocab-size": size(config, "vocab_size"), "d-model": d_model, "d-inner": size(config, "glu_inner_dim"),
        "layers": 1, "recursions": size(config, "n_recursions"), "kernel-size": KERNEL, "groups": GROUPS,
        "dilations": DILATIONS, "quantizer": "threshold", "activation": "none", "norm-eps": 1e-8,
        "embedding-std": 0.02, "embedding-scale": 1.0, "router": any("router" in name for name in state),
    }  # fmt: skip


def shapes_of(settings):
    """Every tensor of a v3 model, the tied output layer apart."""
    v, d, h = settings["vocab-size"], settings["d-model"], settings["d-inner"]
    shapes = {
        "embedding.weight": (v, d), "block.norm1.scale": (d,), "block.norm2.scale": (d,), "final_norm.scale": (d,),
        "block.token_mixer.out_proj.weight": (d, d), "block.glu.gate_proj.weight": (h, d),
        "block.glu.up_proj.weight": (h, d), "block.glu.down_proj.weight": (d, h),
    }  # fmt: skip
    for i in range(len(DILATIONS)):
        shapes[f"block.token_mixer.norms.{i}.scale"] = (d,)
        for conv in ("conv_gate", "conv_value"):
            shapes[f"block.token_mixer.layers.{i}.{conv}.conv.weight"] = (d, d // GROUPS, KERNEL)
    if settings["router"]:
        shapes |= {"block.router.linear.weight": (1, d), "block.router.linear.bias": (1,)}
    return shapes


def checked(state, shapes):
    """The tensors in float32, each once."""
    state = {name.removeprefix("module."): tensor for name, tensor in state.items()}  # as DataParallel names them
    head = state.pop("lm_head.weight", None)
    for name, shape in shapes.items():
        tensor = state.get(name)
        if not isinstance(tensor, torch.Tensor):
            raise Refusal(f"the checkpoint has no tensor {name}")
        if tuple(tensor.shape) != shape or not tensor.is_floating_point():
            raise Refusal(f"the checkpoint's {name} must be floats of shape {shape}, as its config says, "
                               f"got {tensor.dtype} of {tuple(tensor.shape)}")
        if not tensor.isfinite().all():
            raise Refusal(f"the checkpoint's {name} has values that are not finite")
    unknown = sorted(state.keys() - shapes.keys())
    if unknown:
        raise Refusal(f"the checkpoint's {unknown[0]} is no tensor of v3's")
    if head is not None and not torch.equal(head, state["embedding.weight"]):
        raise Refusal("the checkpoint's lm_head.weight must be its embedding.weight, as v3 ties them, got another")
    return {name: state[name].float().contiguous() for name in shapes}


def model_file(tensors, settings):
    """What a model.safetensors holds: docs/formats.md."""
    metadata = {"format": "flashlm-model", "config": json.dumps(settings)}
    without_sum = save(tensors, metadata)
    header_size = int.from_bytes(without_sum[:8], "little")
    return save(tensors, metadata | {"xxh3": f"{xxhash.xxh3_64_intdigest(without_sum[8 + header_size:]):x}"})


def config_file(settings):
    """The preset v3 with this model's sizes."""
    everything = tomllib.loads(PRESET.read_text()) | settings
    return "".join(f"{key} = {json.dumps(value)}\n" for key, value in everything.items())


def tokenizer_file(spec):
    """Of a folder with OpenAI's encoder.json and vocab.bpe, both in one tokenizer.json; a file stays as it is."""
    if not spec.startswith("gpt2:"):
        return Path(spec).read_bytes()
    folder = Path(spec.removeprefix("gpt2:"))
    files = [folder / "encoder.json", folder / "vocab.bpe"]
    for file in files:
        if not file.exists():
            raise Refusal(f"there is no {file}; tools/setup puts GPT-2's vocabulary into .corpus/gpt2")
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE.from_file(*map(str, files)))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|endoftext|>"])
    return tokenizer.to_str().encode()


def write(path, content):
    temporary = path.with_name(f"{path.name}.tmp-{os.getpid()}")
    with open(temporary, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--out", type=Path, required=True, help="run folder to make")
    parser.add_argument("--tokenizer", metavar="gpt2:FOLDER|FILE", help="what the model's token ids stand for")
    parser.add_argument("--weights", choices=("model", "ema"), default="model")
    options = parser.parse_args(arguments)
    try:
        if options.out.exists():
            raise Refusal(f"{options.out} exists; choose another --out")
        checkpoint = read_checkpoint(options.checkpoint)
        state = checkpoint.get("ema_state" if options.weights == "ema" else "model_state_dict")
        if not isinstance(state, dict):
            raise Refusal(f"{options.checkpoint} has no moving average, ema_state; leave out --weights ema")
        settings = settings_of(checkpoint["config"], state)
        model = model_file(checked(state, shapes_of(settings)), settings)
        tokenizer = tokenizer_file(options.tokenizer) if options.tokenizer else None
        options.out.mkdir(parents=True)
        write(options.out / "config.toml", config_file(settings).encode())
        if tokenizer is not None:
            write(options.out / "tokenizer.model", tokenizer)
        write(options.out / "model.safetensors", model)  # last: with it the run is there
    except (Refusal, OSError) as error:
        sys.exit(f"import_v3: {error}")
    print(f"{options.out}: v3 model of {settings['vocab-size']:,} x {settings['d-model']}, "
          f"{'with its' if options.tokenizer else 'without a'} tokenizer; train on from it with "
          f"train_flashlm --config {options.out}/config.toml --init {options.out}")


if __name__ == "__main__":
    main()

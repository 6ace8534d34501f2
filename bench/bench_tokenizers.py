#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""GPT-2's ids at what speed: `flashlm encode` beside tiktoken and Hugging Face's tokenizers, one thread each, on the same text.

Usage: bench/bench_tokenizers.py FLASHLM GPT2_FOLDER FILE   (FILE: .txt, or .parquet with a column `text`; its first 20 MB count)

The documents' ids are compared first. Each contestant has its turn five times, and its least processor time counts. FlashLM's is that
of the whole process, from text on standard input to decimal ids on standard output, less that of one that is given no text; the peers'
is that of the call in a process that has loaded the vocabulary, and ends with a Python list of ids.
"""

import base64
import json
import os
import pathlib
import resource
import subprocess
import sys
import time

os.environ["TOKENIZERS_PARALLELISM"] = "false"

import tiktoken
import tokenizers

BYTES = 20_000_000
ROUNDS = 5
PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"  # tiktoken's own for r50k_base


def documents(path):
    if path.suffix == ".parquet":
        import pyarrow.parquet
        texts = pyarrow.parquet.read_table(path, columns=["text"])["text"].to_pylist()
    else:
        texts = [path.read_text(encoding="utf-8")]
    size = 0
    for text in texts:
        if size >= BYTES:
            return
        yield text.replace("\0", "")
        size += len(text.encode())


def peers(folder):
    vocabulary = json.loads((folder / "encoder.json").read_text(encoding="utf-8"))
    merges = [tuple(line.split(" ")) for line in (folder / "vocab.bpe").read_text(encoding="utf-8").split("\n")[1:] if line]
    hugging_face = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocabulary, merges=merges))
    hugging_face.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    # A token's bytes: each of the 256 base tokens is one, in the order of OpenAI's list.
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    byte_of = {chr(byte): byte for byte in printable}
    byte_of |= {chr(0x100 + i): byte for i, byte in enumerate(sorted(set(range(256)) - set(printable)))}
    ranks = {bytes(byte_of[one] for one in name): rank for name, rank in vocabulary.items() if name != "<|endoftext|>"}
    return tiktoken.Encoding("gpt2", pat_str=PATTERN, mergeable_ranks=ranks, special_tokens={}), hugging_face


def seconds_of_children():
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def main():
    program, folder, path = sys.argv[1:4]
    texts = list(documents(pathlib.Path(path)))
    data = "".join(text + "\0" for text in texts).encode()
    encoding, hugging_face = peers(pathlib.Path(folder))

    def flashlm(given):
        start = seconds_of_children()
        lines = subprocess.run([program, "encode", f"gpt2:{folder}", "-0"], input=given, stdout=subprocess.PIPE, check=True).stdout
        return seconds_of_children() - start, lines

    ids = [encoding.encode_ordinary(text) for text in texts]
    assert ids == [hugging_face.encode(text).ids for text in texts], "tiktoken and tokenizers differ"
    assert flashlm(data)[1].decode() == "".join(" ".join(map(str, one)) + "\n" for one in ids), "FlashLM's ids differ"
    print(f"{len(data) / 1e6:.1f} MB, {len(texts)} documents, {sum(map(len, ids))} ids, the same from all three")

    def timed(call):
        start = time.process_time()
        call()
        return time.process_time() - start

    contestants = {
        "FlashLM": lambda: flashlm(data)[0] - flashlm(b"")[0],
        f"tiktoken {tiktoken.__version__}": lambda: timed(lambda: [encoding.encode_ordinary(text) for text in texts]),
        f"tokenizers {tokenizers.__version__}": lambda: timed(lambda: [hugging_face.encode(text).ids for text in texts]),
    }
    least = {}
    for _ in range(ROUNDS):
        for name, seconds in contestants.items():
            least[name] = min(least.get(name, 1e9), seconds())
    for name, seconds in least.items():
        print(f"{name:20} {len(data) / seconds / 1e6:7.1f} MB/s   FlashLM is {seconds / least['FlashLM']:.1f} times as fast")


if __name__ == "__main__":
    main()

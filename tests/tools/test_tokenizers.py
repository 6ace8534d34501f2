# SPDX-License-Identifier: Apache-2.0
"""flashlm encode and decode as a user runs them, beside tiktoken and Hugging Face's tokenizers on GPT-2's vocabulary."""

import base64
import json
import random
import subprocess

import pytest
import tiktoken
import tokenizers
from programs import ROOT, program_path

GPT2 = ROOT / ".corpus" / "gpt2"
SOTU = ROOT / ".corpus" / "sotu"
PATTERN = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"


def pipe(command, tokenizer, *flags, text=b""):
    done = subprocess.run([program_path("flashlm"), command, str(tokenizer), *flags], input=text, capture_output=True,
                          timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


def refuse(words, command, tokenizer, *flags, text=b""):
    done = subprocess.run([program_path("flashlm"), command, str(tokenizer), *flags], input=text, capture_output=True,
                          timeout=300)
    lines = done.stderr.decode().splitlines()
    assert done.returncode == 1 and len(lines) == 1 and words in lines[0], done.stderr


def encode(documents, tokenizer=f"gpt2:{GPT2}"):
    """The ids of each document; none may have a zero byte."""
    lines = pipe("encode", tokenizer, "-0", text=b"".join(document + b"\0" for document in documents))
    assert pipe("decode", tokenizer, "-0", text=lines) == b"".join(document + b"\0" for document in documents)
    return [[int(word) for word in line.split()] for line in lines.decode().split("\n")[:-1]]


@pytest.fixture(scope="session")
def merges():
    lines = (GPT2 / "vocab.bpe").read_text(encoding="utf-8").split("\n")[1:]
    return [tuple(line.split(" ")) for line in lines if line]


@pytest.fixture(scope="session")
def ranks(merges):
    """tiktoken's ranks: the bytes of each token, by id."""
    names = [chr(byte) for byte in [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]]
    byte_of = {name: ord(name) for name in names}
    byte_of |= {chr(0x100 + i): byte
                for i, byte in enumerate(byte for byte in range(256) if chr(byte) not in byte_of)}
    vocabulary = json.loads((GPT2 / "encoder.json").read_text(encoding="utf-8"))
    del vocabulary["<|endoftext|>"]
    return {bytes(byte_of[character] for character in name): rank for name, rank in vocabulary.items()}


@pytest.fixture(scope="session")
def peer(ranks):
    return tiktoken.Encoding("gpt2", pat_str=PATTERN, mergeable_ranks=ranks, special_tokens={"<|endoftext|>": 50256})


@pytest.fixture(scope="session")
def hugging_face(merges):
    vocabulary = json.loads((GPT2 / "encoder.json").read_text(encoding="utf-8"))
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocabulary, merges=merges))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.add_special_tokens(["<|endoftext|>"])
    tokenizer.encode_special_tokens = True
    return tokenizer


def character(draw):
    kind = draw.random()
    if kind < 0.3:
        return chr(draw.randrange(1, 0x80))
    if kind < 0.4:
        return draw.choice(" \t\n\r\x0b\x0c\x85\xa0\u1680\u180e\u2003\u200b\u2028\u202f\u205f\u3000\x1c")
    if kind < 0.5:
        return draw.choice(["'s", "'t", "'re", "'ve", "'m", "'ll", "'d", "'", "'S", "\u2019s", " '", " the", "<|endoftext|>"])
    if kind < 0.65:
        return chr(draw.randrange(0x80, 0x3000))
    first = draw.randrange(17) << 16
    code = draw.randrange(first, first + 0x10000)
    return chr(code) if not 0xD800 <= code < 0xE000 else "\ud7ff"


def random_strings(count, seed):
    draw = random.Random(seed)
    for _ in range(count):
        characters = [character(draw) for _ in range(draw.randrange(1, 30))]
        if draw.random() < 0.3:
            characters = [one * draw.choice([1, 1, 2, 3, 9]) for one in characters]
        yield "".join(characters)


def test_random_strings(peer, hugging_face):
    strings = list(random_strings(8000, seed=1))
    ours = encode([string.encode() for string in strings])
    assert len(ours) == len(strings)
    for string, ids in zip(strings, ours):
        assert ids == peer.encode_ordinary(string) == hugging_face.encode(string).ids, repr(string)


def test_real_text(peer, hugging_face):
    texts = [path.read_text(encoding="utf-8") for path in sorted(SOTU.glob("*.txt"))[::12]]
    assert sum(map(len, texts)) > 500_000
    for text, ids in zip(texts, encode([text.encode() for text in texts])):
        assert ids == peer.encode_ordinary(text) == hugging_face.encode(text).ids


def test_bytes_that_are_not_utf8(hugging_face, peer):
    """They count as U+FFFD in the split; the ids are those of the bytes."""
    draw = random.Random(2)
    texts = []
    for string in random_strings(3000, seed=3):
        text = bytearray(string.encode())
        for _ in range(draw.randrange(1, 5)):
            text.insert(draw.randrange(len(text) + 1), draw.randrange(0x80, 0x100))
        texts.append(bytes(text))
    for text, ids in zip(texts, encode(texts)):
        characters = text.decode("utf-8", "surrogateescape")
        shown = "".join("\ufffd" if "\udc80" <= one <= "\udcff" else one for one in characters)
        expected = []
        for _, (start, end) in hugging_face.pre_tokenizer.pre_tokenize_str(shown):
            piece = characters[start:end].encode("utf-8", "surrogateescape")
            expected += peer._core_bpe.encode_single_piece(piece)
        assert ids == expected, text


def test_every_form_of_the_vocabulary(merges, ranks, hugging_face, tmp_path):
    text = "\0".join(random_strings(300, seed=4)).encode()
    ids = pipe("encode", f"gpt2:{GPT2}", text=text)
    assert pipe("encode", GPT2, text=text) == ids
    (tmp_path / "r50k.tiktoken").write_text(
        "".join(f"{base64.b64encode(token).decode()} {rank}\n" for token, rank in sorted(ranks.items(), key=lambda t: t[1])))
    assert pipe("encode", tmp_path / "r50k.tiktoken", text=text) == ids
    hugging_face.save(str(tmp_path / "tokenizer.json"))
    assert pipe("encode", tmp_path / "tokenizer.json", text=text) == ids
    assert pipe("encode", tmp_path, text=text) == ids


def test_missing_merge(tmp_path):
    lines = (GPT2 / "vocab.bpe").read_text(encoding="utf-8").split("\n")
    (tmp_path / "encoder.json").write_bytes((GPT2 / "encoder.json").read_bytes())
    (tmp_path / "vocab.bpe").write_text("\n".join(lines[:30000] + lines[30001:]), encoding="utf-8")
    refuse("has no merge that makes its token", "encode", tmp_path)
    refuse("tools/setup", "encode", "gpt2:nowhere")
    refuse("nowhere", "encode", "nowhere")


# Documents of all sizes about that of a chunk, ends of lines in all places.
def test_streams(peer):
    some = " ".join(random_strings(300, seed=5)).replace("\n", " ")
    speeches = " ".join(path.read_text(encoding="utf-8") for path in sorted(SOTU.glob("*.txt"))[:80]).replace("\n", " ")
    assert len(speeches) > 2_500_000
    assert pipe("encode", GPT2) == b"\n" and pipe("encode", GPT2, "-0") == pipe("decode", GPT2, "-0") == b""
    for text in ("\na\n\n b", f"{some}\n\n{speeches}\n{some}\n", "x" * 3_000_000):
        known = "xxx" not in text  # tiktoken takes long
        expected = [" ".join(map(str, peer.encode_ordinary(line))) for line in text.split("\n")] if known else []
        for flag in ("--lines", "--null"):
            data = text.replace("\n", "\n" if flag == "--lines" else "\0").encode()
            lines = pipe("encode", GPT2, flag, text=data)
            assert not known or lines.decode().split("\n") == expected
            assert pipe("decode", GPT2, flag, text=lines) == data
        line = pipe("encode", GPT2, text=text.encode())
        assert line.count(b"\n") == 1 and line.endswith(b"\n")
        assert not known or [int(word) for word in line.split()] == peer.encode_ordinary(text)
        assert pipe("decode", GPT2, text=line) == text.encode()


def test_end_of_text_by_name(peer):
    text = "hello <|endoftext|><|endoftext|> world\n<|endof"
    flags = ("--end-of-text", "<|endoftext|>")
    for flag in ((), ("--lines",)):
        line = pipe("encode", f"gpt2:{GPT2}", *flags, *flag, text=text.encode())
        assert pipe("decode", f"gpt2:{GPT2}", *flags, *flag, text=line) == text.encode()
    ids = [int(word) for word in pipe("encode", f"gpt2:{GPT2}", *flags, text=text.encode()).split()]
    assert ids == peer.encode(text, allowed_special="all")
    # Many of them, over several of the pieces that text is read in.
    many = (text * 60_000).encode()
    assert [int(w) for w in pipe("encode", f"gpt2:{GPT2}", *flags, text=many).split()] == peer.encode(many.decode(), allowed_special="all")


def test_decode_refuses():
    refuse("line 2: 'x7' is not a token id", "decode", GPT2, text=b"1 2\n3 x7 4\n")
    refuse("line 1: '1.5' is not a token id", "decode", GPT2, text=b"1.5")
    refuse("line 3: token id 50257 is outside the vocabulary of 50257", "decode", GPT2, text=b"1\n\n50257\n")
    refuse("line 1: token id -1", "decode", GPT2, text=b"-1")
    refuse("99999999999", "decode", GPT2, text=b"99999999999")
    assert pipe("decode", GPT2, text=b" 31373\t995\r\n\n50256 0") == b"hello world!"
    refuse("excludes", "decode", GPT2, "--lines", "-0")


def test_sentencepiece(dataset, corpus):
    text = b"".join(path.read_bytes() for path in sorted(corpus.glob("*.txt"))[:3]) + b"\xff \xe2\x96\x81 caf\xc3\xa9"
    ids = pipe("encode", dataset, text=text)
    assert len(ids.split()) < len(text) * 0.8
    assert pipe("decode", dataset / "tokenizer.model", text=ids) == text

# SPDX-License-Identifier: Apache-2.0
"""tools/parquet_to_jsonl as a user runs it."""

import json
import subprocess
import sys

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from programs import ROOT


def convert(*args):
    return subprocess.run([sys.executable, ROOT / "tools" / "parquet_to_jsonl", *map(str, args)], capture_output=True, timeout=300)


def refuse(words, *args):
    done = convert(*args)
    lines = done.stderr.decode().splitlines()
    assert done.returncode == 1 and len(lines) == 1 and words in lines[0], done.stderr


@pytest.fixture
def fineweb(tmp_path):
    texts = [f"line {i}\n\"é€😀\" \u2028" * (i % 5) for i in range(1000)]
    table = pa.table({"text": texts, "id": [f"<{i}>" for i in range(1000)], "token_count": list(range(1000))})
    pq.write_table(table, tmp_path / "a.parquet", row_group_size=300, compression="zstd")
    return tmp_path / "a.parquet", texts


def test_rows_become_lines(fineweb, tmp_path):
    path, texts = fineweb
    pq.write_table(pa.table({"text": pa.array([None, "", b"\xc3\xa9"], pa.binary())}), tmp_path / "b.parquet")
    done = convert(path, tmp_path / "b.parquet")
    assert done.returncode == 0 and not done.stderr
    lines = done.stdout.decode().split("\n")
    assert lines.pop() == ""
    assert [json.loads(line) for line in lines] == [{"text": text} for text in [*texts, None, "", "é"]]


def test_another_column(fineweb):
    done = convert("--text-field", "id", fineweb[0])
    assert done.stdout.splitlines()[999] == b'{"text": "<999>"}'


def test_bad_input_is_one_line(fineweb, tmp_path):
    path, _ = fineweb
    refuse("absent.parquet", tmp_path / "absent.parquet")
    refuse("no column 'body'; --text-field names one of text, id, token_count", "--text-field", "body", path)
    refuse("column 'token_count' holds int, and text is needed", "--text-field", "token_count", path)
    (tmp_path / "cut.parquet").write_bytes(path.read_bytes()[:-10])
    refuse("cut.parquet", tmp_path / "cut.parquet")
    pq.write_table(pa.table({"text": [b"good", b"\xff"]}), tmp_path / "bytes.parquet")
    refuse("row 1 is not UTF-8", tmp_path / "bytes.parquet")

"""token_files: a set of documents as one file, the same bytes again, and files that are not one."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from answer_masks import EncodedSet
from text_records import DataError
from token_files import read_tokens, write_tokens


def random_set(lengths: list[int], seed: int = 0) -> EncodedSet:
    rng = np.random.default_rng(seed)
    starts = np.cumsum([0, *lengths], dtype=np.int64)
    ids = rng.integers(0, 151_669, starts[-1]).astype(np.int32)
    answer = rng.random(starts[-1]) < 0.5
    return EncodedSet(
        ids, answer, starts, np.arange(len(lengths), dtype=np.int64) * 3, 99, cut=1, dropped=2, split_texts=3
    )


@pytest.mark.parametrize("lengths", [[5, 1, 70], [1], []])
def test_a_set_comes_back_and_its_bytes_are_the_same_again(tmp_path: Path, lengths: list[int]) -> None:
    encoded = random_set(lengths)
    digest = write_tokens(tmp_path / "a", encoded, {"who": "me", "n": [1, None]})
    assert digest == write_tokens(tmp_path / "b", encoded, {"n": [1, None], "who": "me"})
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    found, about = read_tokens(tmp_path / "a", digest)
    assert about == {"who": "me", "n": [1, None]}
    assert found.fingerprint == encoded.fingerprint and found.record.tolist() == encoded.record.tolist()
    for name in ("seq_len", "cut", "dropped", "split_texts"):
        assert getattr(found, name) == getattr(encoded, name)
    assert (found.input_ids.dtype, found.answer.dtype, found.starts.dtype) == (np.int32, np.bool_, np.int64)
    assert sorted(f.name for f in tmp_path.iterdir()) == ["a", "b"], "no temporary file is left"


def test_every_flipped_byte_is_found_by_the_hash(tmp_path: Path) -> None:
    path = tmp_path / "a"
    digest = write_tokens(path, random_set([5, 9]))
    data = path.read_bytes()
    for place in range(0, len(data), 7):
        path.write_bytes(data[:place] + bytes([data[place] ^ 16]) + data[place + 1 :])
        with pytest.raises(DataError, match="has changed or is damaged"):
            read_tokens(path, digest)


def test_what_is_not_a_set_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a"
    write_tokens(path, random_set([5, 9]))
    columns = load_file(path)
    about = json.dumps({"format": "qwen-prime-tokens", "version": 1})

    def refused(message: str, metadata: dict[str, str] | None, **changes: np.ndarray) -> None:
        save_file({**columns, **changes}, path, metadata=metadata)
        with pytest.raises(DataError, match=message):
            read_tokens(path)

    refused("not a file of tokens", None)
    refused("not a file of tokens", {"about": "[1"})
    refused("not a file of tokens", {"about": json.dumps({"format": "qwen-prime-tokens", "version": 2})})
    refused("fit together: input_ids", {"about": about}, input_ids=columns["input_ids"].astype(np.int64))
    refused("fit together", {"about": about}, starts=np.array([0, 5, 15]))
    refused("fit together", {"about": about}, starts=np.array([0, 14, 14]))
    refused("fit together", {"about": about}, starts=np.zeros(0, dtype=np.int64))
    refused("fit together", {"about": about}, answer=columns["answer"][:-1])
    refused("fit together", {"about": about}, record=columns["record"][:-1])
    refused("fit together", {"about": about}, input_ids=-columns["input_ids"] - 1)
    path.write_bytes(b"\xff" * 100)
    with pytest.raises(DataError, match="not a file of tokens"):
        read_tokens(path)
    with pytest.raises(DataError):
        read_tokens(tmp_path / "absent")
    with pytest.raises(DataError, match="cannot read"):
        read_tokens(tmp_path / "absent", "0" * 64)


def test_parts_and_joined() -> None:
    encoded = random_set([4, 7, 2, 9])
    parts = [encoded.part(0, 1), encoded.part(1, 1), encoded.part(1, 4)]
    again = EncodedSet.joined(parts)
    assert again.fingerprint == encoded.fingerprint
    assert [len(p) for p in parts] == [1, 0, 3]
    assert parts[2].document(0) == encoded.document(1)
    assert parts[2].starts.tolist() == [0, 7, 9, 18]
    assert replace(encoded).fingerprint == encoded.fingerprint

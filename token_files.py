"""Encoded documents on disk: one safetensors file for a set.

Layout of a file: ``input_ids`` int32 (N,), ``answer`` uint8 (N,), ``starts`` int64 (D + 1,), ``record`` int64 (D,), as
in ``EncodedSet``, and a JSON object under the metadata key ``about``. The bytes are a function of the content: no
times, no names of machines, so that making a file again gives the same file.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from answer_masks import EncodedSet
from text_records import DataError
from whole_output import write_whole

FORMAT = "qwen-prime-tokens"
VERSION = 1
_COLUMNS = {"input_ids": "int32", "answer": "uint8", "starts": "int64", "record": "int64"}


def write_tokens(path: Path, encoded: EncodedSet, about: Mapping[str, Any] | None = None) -> str:
    """Write a set, whole or not at all; the SHA-256 of the file's bytes.

    Args:
        about: plain JSON values to keep beside it.
    """
    columns = {name: np.ascontiguousarray(getattr(encoded, name), dtype=kind) for name, kind in _COLUMNS.items()}
    counts = {name: getattr(encoded, name) for name in ("seq_len", "cut", "dropped", "split_texts")}
    text = json.dumps({"format": FORMAT, "version": VERSION, **counts, "about": dict(about or {})}, sort_keys=True)
    data = save(columns, metadata={"about": text})
    write_whole(path, data)
    return hashlib.sha256(data).hexdigest()


def read_tokens(path: Path, sha256: str | None = None) -> tuple[EncodedSet, dict[str, Any]]:
    """A set and what was kept beside it.

    Args:
        sha256: what the file's bytes must have.

    Raises:
        DataError: no such file, another hash, or content that is not a set of documents.
    """
    if sha256 is not None and (found := _sha256(path)) != sha256:
        raise DataError(
            f"{path} has SHA-256 {found[:16]}..., its manifest says {sha256[:16]}...: the file has changed or "
            "is damaged; make the folder again with qwen_prime_data.py materialize"
        )
    try:
        with safe_open(path, framework="numpy") as file:
            header = json.loads((file.metadata() or {}).get("about", "null"))
            columns = {name: file.get_tensor(name) for name in _COLUMNS}
    except (SafetensorError, OSError, ValueError, TypeError, AttributeError, KeyError, RecursionError) as error:
        raise DataError(f"{path}: not a file of tokens: {error}") from error
    if not isinstance(header, dict) or header.get("format") != FORMAT or header.get("version") != VERSION:
        raise DataError(f"{path}: not a file of tokens of version {VERSION}")
    wrong = [n for n, kind in _COLUMNS.items() if columns[n].dtype != kind or columns[n].ndim != 1]
    starts = columns["starts"]
    whole = not wrong and len(starts) > 0 and starts[0] == 0 and starts[-1] == len(columns["input_ids"])
    if not whole or (starts[1:] <= starts[:-1]).any() or len(columns["answer"]) != len(columns["input_ids"]):
        raise DataError(f"{path}: its columns do not fit together{f': {wrong[0]}' if wrong else ''}")
    if len(columns["record"]) != len(starts) - 1 or (len(columns["input_ids"]) and columns["input_ids"].min() < 0):
        raise DataError(f"{path}: its columns do not fit together")
    columns["answer"] = columns["answer"].astype(bool)
    try:
        counts: dict[str, Any] = {name: int(header[name]) for name in ("seq_len", "cut", "dropped", "split_texts")}
        return EncodedSet(**columns, **counts), dict(header["about"])
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise DataError(f"{path}: its header lacks or spoils a field: {type(error).__name__}: {error}") from error


def _sha256(path: Path) -> str:
    try:
        with open(path, "rb") as file:
            digest = hashlib.sha256()
            while chunk := file.read(1 << 22):
                digest.update(chunk)
            return digest.hexdigest()
    except OSError as error:
        raise DataError(f"cannot read {path}: {error}") from error

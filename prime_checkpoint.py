"""The ``.pt`` contract between the scripts: one dict of tensors and plain types, atomic, checked, safe to load.

Layout of the dict (every key is required; dtypes and shapes are checked on loading):

    format          "qwen-prime"
    version         2
    stage           "init" (imported, never trained) or "train"
    hf_config       dict: the source's config.json
    tokenizer       {"source": str, "files": {file name: uint8 tensor of its bytes}}: the checkpoint describes itself
    manifold        {"name": str, "sha256": str, "vote_bits": int, "values": float32 (65536,)}
    model           {parameter name: tensor}
                      <module>.grid.indices   int16 (out, in): with vote bits, words of 2^bits · index + votes
                      <module>.grid.scale     float32 (out,)
                      everything else (norms, biases): float32
                      a tied head is not listed: it is the embedding's grid
    probes          {parameter name of the source: float32 (out,)}: each row of the source's weight times a
                    fixed vector (``probe_vector``), taken before conversion; stage init only, else {}
    votes           {grid name: {"votes": int8 or int16 (out, in), absent where words hold them,
                    "r2": float32 (out,), "row_squares": int64 (out,), "observations": int64 (), and by rule
                    "g2" and "row_sketch" or "r1" and "row_sizes", of the same two types}}; {} in stage init
    train_state     plain dict of step, tokens, cursor, rule and float optimizer; {} in stage init
    source          {"id": str, "revision": str or None, "files": {name: sha256}}
    sha256          {path in this dict: sha256 of the tensor's little-endian bytes} for every tensor above
    created_by      {"program": str, "torch": str, ...}

The file is torch's zip archive with the comment that ZIP allows at its end: ``qwen-prime sha256=<hex>`` over every byte
before the comment. One changed or missing byte anywhere, in tensors, in the pickle or in the archive's own structure,
is found before anything is unpickled; and torch, which ignores the comment, reads the file as ever. Loading maps the
file and unpickles with ``weights_only=True``, so a checkpoint from a stranger cannot run code.

Rejected: a sidecar file for the hash, which gets lost when a checkpoint is copied.
"""

from __future__ import annotations

import hashlib
import os
import pickle
import platform
import re
import shutil
import struct
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from manifolds import COMPACT_VOTE_BITS, ENTRIES
from whole_output import OutputError, new_file

FORMAT = "qwen-prime"
VERSION = 2
STAGES = ("init", "train")
_KEYS: dict[str, type | tuple[type, ...]] = {
    "format": str,
    "version": int,
    "stage": str,
    "hf_config": dict,
    "tokenizer": dict,
    "manifold": dict,
    "model": dict,
    "probes": dict,
    "votes": dict,
    "train_state": dict,
    "source": dict,
    "sha256": dict,
    "created_by": dict,
}
_COMMENT = re.compile(rb"qwen-prime sha256=([0-9a-f]{64})\Z")
_COMMENT_LENGTH = len("qwen-prime sha256=") + 64
_END_RECORD = 22
"""Length of ZIP's end-of-central-directory record without a comment; its last two bytes are the comment's length."""
_HASH_CHUNK = 1 << 22


class CheckpointError(RuntimeError):
    """A checkpoint that cannot be read, is damaged, or breaks the contract."""


def tensor_sha256(tensor: torch.Tensor) -> str:
    """SHA-256 (hex) of a tensor's elements in row-major order, little-endian."""
    digest = hashlib.sha256()
    flat = tensor.detach().cpu().contiguous().view(-1)
    raw = flat.view(torch.uint8) if flat.numel() else flat.to(torch.uint8)
    for start in range(0, raw.numel(), _HASH_CHUNK):
        digest.update(raw[start : start + _HASH_CHUNK].numpy().data)
    return digest.hexdigest()


def walk_tensors(
    tree: Mapping[Any, Any] | list[Any] | tuple[Any, ...], prefix: str = ""
) -> Iterator[tuple[str, torch.Tensor]]:
    """Every tensor of a nested dict (lists included) with its path, keys joined by ``/``."""
    items = tree.items() if isinstance(tree, Mapping) else ((str(i), v) for i, v in enumerate(tree))
    for key, value in items:
        path = f"{prefix}{key}"
        if isinstance(value, torch.Tensor):
            yield path, value
        elif isinstance(value, Mapping | list | tuple):
            yield from walk_tensors(value, path + "/")


def probe_vector(columns: int) -> torch.Tensor:
    """The fixed vector, float32 ``(columns,)``, against which rows are probed.

    Signs are random and sizes spread over 0.5 to 1.5: with signs alone, two columns of one sign could trade places.
    """
    words = np.frombuffer(hashlib.shake_256(b"qwen-prime probe").digest(4 * columns), dtype="<u4")
    sizes = 0.5 + (words >> 1) / 2.0**31
    return torch.from_numpy(np.where(words & 1, sizes, -sizes).astype(np.float32))


def probe(weights: torch.Tensor) -> torch.Tensor:
    """Each row of a matrix (a vector counts as one row) times :func:`probe_vector`: float32 ``(rows,)``."""
    # In float64, a slice that stays in the cache at a time: the result does not depend on the order of summation.
    matrix = weights if weights.ndim == 2 else weights[None]
    vector = probe_vector(matrix.shape[1]).double()
    step = max(1, (1 << 20) // max(1, matrix.shape[1]))
    return torch.cat([matrix[i : i + step].double() @ vector for i in range(0, len(matrix), step)]).float()


def created_by(program: str) -> dict[str, str]:
    """Who wrote a checkpoint, with what and when."""
    return {
        "program": program,
        "torch": str(torch.__version__),
        "python": platform.python_version(),
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


# -- writing ----------------------------------------------------------------------------------------------------------


def save_checkpoint(checkpoint: dict[str, Any], path: Path | str) -> str:
    """Write a checkpoint so that ``path`` is either the whole new file or what it was before.

    Fills in ``sha256``. Written to a temporary file beside ``path``, fsynced, renamed over it, the folder fsynced; on
    any error the temporary file is removed.

    Returns:
        The file's SHA-256 (of everything before the closing comment).

    Raises:
        CheckpointError: the dict breaks the contract, or the file cannot be written (disk full, no permission).
    """
    path = Path(path)
    checkpoint["sha256"] = {}
    check_contract(checkpoint, str(path))
    checkpoint["sha256"] = {name: tensor_sha256(tensor) for name, tensor in walk_tensors(checkpoint)}
    try:
        with new_file(path, force=True) as temporary:
            with open(temporary, "wb") as file:
                torch.save(_canonical(checkpoint), file)
            return _seal(temporary)
    except OutputError as error:
        raise CheckpointError(str(error)) from error
    except RuntimeError as error:
        # torch reports a failed write so, and does not say that the disk is full.
        free = shutil.disk_usage(path.parent).free
        raise CheckpointError(
            f"cannot write {path}: {one_line(error)} ({free:,} bytes are free there); nothing was left behind"
        ) from error


def _canonical(tree: Any) -> Any:
    """The same tree with one object for equal strings: pickle refers back to objects, not to equal ones, and a
    checkpoint's bytes should depend on its content alone, so that what is packed and unpacked is the same file."""
    if type(tree) is dict:
        return {_canonical(key): _canonical(value) for key, value in tree.items()}
    if type(tree) in (list, tuple):
        return type(tree)(_canonical(value) for value in tree)
    return sys.intern(tree) if type(tree) is str else tree


def _seal(path: Path) -> str:
    """Append the closing comment."""
    with open(path, "r+b") as file:
        file.seek(-_END_RECORD, os.SEEK_END)
        record = file.read(_END_RECORD)
        if record[:4] != b"PK\x05\x06" or record[-2:] != b"\0\0":
            raise CheckpointError(f"{path}: the archive does not end as torch writes it")
        file.seek(-2, os.SEEK_END)
        file.write(struct.pack("<H", _COMMENT_LENGTH))
        file.seek(0)
        digest = _digest(file, file.seek(0, os.SEEK_END))
        file.seek(0, os.SEEK_END)
        file.write(f"qwen-prime sha256={digest}".encode())
    return digest


def _digest(file, length: int) -> str:
    digest = hashlib.sha256()
    file.seek(0)
    left = length
    while left > 0:
        chunk = file.read(min(_HASH_CHUNK, left))
        if not chunk:
            raise CheckpointError("the file became shorter while it was read")
        digest.update(chunk)
        left -= len(chunk)
    return digest.hexdigest()


# -- reading ----------------------------------------------------------------------------------------------------------


def check_file(path: Path | str) -> str:
    """Check a checkpoint's closing hash and return it.

    Raises:
        CheckpointError: no such file, not a checkpoint of this suite, truncated, or changed.
    """
    recorded = recorded_hash(path)
    try:
        with open(path, "rb") as file:
            digest = _digest(file, file.seek(0, os.SEEK_END) - _COMMENT_LENGTH)
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror or error}") from error
    if digest != recorded:
        raise CheckpointError(
            f"{path} is damaged: its bytes hash to {digest[:16]}..., recorded is {recorded[:16]}...; "
            "copy or import it again"
        )
    return digest


def recorded_hash(path: Path | str) -> str:
    """The hash that a checkpoint closes with, not compared with its content.

    Raises:
        CheckpointError: no such file, or one that does not end as a checkpoint of this suite does.
    """
    try:
        with open(path, "rb") as file:
            size = file.seek(0, os.SEEK_END)
            if size < _COMMENT_LENGTH + _END_RECORD:
                raise CheckpointError(f"{path} has {size} bytes: empty or truncated; import or copy it again")
            file.seek(size - _COMMENT_LENGTH)
            found = _COMMENT.match(file.read())
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror or error}") from error
    if found is None:
        raise CheckpointError(
            f"{path} does not end with the hash of a PRIME checkpoint: truncated, changed, or written by another "
            "program; expected a file from qwen_prime_importer.py or qwen_prime_train.py (of a packed one: unpack it)"
        )
    return found.group(1).decode()


def load_checkpoint(path: Path | str, *, check_hash: bool = True) -> dict[str, Any]:
    """Read a checkpoint, its tensors mapped from the file (copy before changing them).

    Args:
        check_hash: read the file once and compare its closing hash; only a caller that just did so leaves it out.

    Raises:
        CheckpointError: damaged, not ours, would run code, or against the contract.
    """
    path = Path(path)
    if check_hash:
        check_file(path)
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"{path} refused: its pickle asks for more than tensors and plain types ({one_line(error)})"
        ) from error
    except Exception as error:
        # A malformed pickle makes the unpickler fail in any way at all: IndexError, TypeError, AssertionError, ...
        raise CheckpointError(f"cannot read {path}: {type(error).__name__}: {one_line(error)}") from error
    check_contract(checkpoint, str(path))
    return checkpoint


def check_contract(checkpoint: Any, where: str) -> None:
    """Keys, types, dtypes and shapes as the module docstring gives them.

    Raises:
        CheckpointError: naming the first thing that differs.
    """
    if not isinstance(checkpoint, dict):
        raise CheckpointError(f"{where} holds a {type(checkpoint).__name__}, expected a dict")
    if checkpoint.get("format") != FORMAT:
        raise CheckpointError(f"{where} has format {checkpoint.get('format')!r}, expected {FORMAT!r}")
    if type(checkpoint.get("version")) is not int or checkpoint["version"] != VERSION:
        raise CheckpointError(
            f"{where} has version {checkpoint.get('version')!r}, expected {VERSION}: use the suite that wrote it"
        )
    for key, kind in _KEYS.items():
        if not isinstance(checkpoint.get(key), kind):
            found = type(checkpoint.get(key)).__name__ if key in checkpoint else "nothing"
            raise CheckpointError(f"{where} has {found} under {key!r}, expected {kind}")
    if extra := sorted(map(str, set(checkpoint) - set(_KEYS))):
        raise CheckpointError(f"{where} has unknown keys {extra}")
    if checkpoint["stage"] not in STAGES:
        raise CheckpointError(f"{where} has stage {checkpoint['stage']!r}, expected one of {', '.join(STAGES)}")
    _check_plain(checkpoint, where, "")
    _check_manifold(checkpoint["manifold"], where)
    model, votes = checkpoint["model"], checkpoint["votes"]
    for group in ("model", "probes", "votes"):
        if odd := [key for key in checkpoint[group] if not isinstance(key, str)]:
            raise CheckpointError(f"{where}: {group} has a key {odd[0]!r}, expected a name")
    for name, tensor in model.items():
        _check_weight(model, name, tensor, where)
    for name, tensor in checkpoint["probes"].items():
        _expect(where, f"probes/{name}", tensor, torch.float32, 1)
    files = checkpoint["tokenizer"].get("files")
    if not isinstance(files, dict):
        raise CheckpointError(f"{where}: tokenizer has no files")
    for name, tensor in files.items():
        _expect(where, f"tokenizer/files/{name}", tensor, torch.uint8, 1)
    for name, state in votes.items():
        _check_vote_state(model, name, state, checkpoint["manifold"]["vote_bits"], where)


def _check_plain(value: Any, where: str, path: str) -> None:
    """Only what ``weights_only`` loading gives back: a file that could not be read again must not be written."""
    if isinstance(value, torch.Tensor):
        if value.layout != torch.strided or value.device.type == "meta" or not value.is_contiguous():
            raise CheckpointError(f"{where}: {path} is not a plain contiguous tensor")
    elif type(value) is dict:
        for key, item in value.items():
            if type(key) not in (str, int):
                raise CheckpointError(f"{where}: {path} has a key {key!r}, expected a name or a number")
            _check_plain(item, where, f"{path}/{key}" if path else str(key))
    elif type(value) in (list, tuple):
        for number, item in enumerate(value):
            _check_plain(item, where, f"{path}/{number}")
    elif type(value) not in (int, float, str, bool, type(None)):
        raise CheckpointError(f"{where}: {path} is a {type(value).__name__}, expected a tensor or a plain value")


def _check_weight(model: dict[str, Any], name: str, tensor: Any, where: str) -> None:
    if name.endswith(".grid.indices"):
        _expect(where, f"model/{name}", tensor, torch.int16, 2)
        scale = model.get(name.removesuffix("indices") + "scale")
        if not isinstance(scale, torch.Tensor) or tuple(scale.shape) != tensor.shape[:1]:
            raise CheckpointError(f"{where}: {name} has no scale of {tensor.shape[0]} rows")
        return
    _expect(where, f"model/{name}", tensor, torch.float32, None)
    if name.endswith(".grid.scale") and name.removesuffix("scale") + "indices" not in model:
        raise CheckpointError(f"{where}: {name} has no indices")


_VOTE_STATES = (
    {"r2", "g2", "row_squares", "row_sketch", "observations"},
    {"r1", "r2", "row_sizes", "row_squares", "observations"},
)
_VOTE_TYPES = {
    "r1": torch.float32,
    "r2": torch.float32,
    "g2": torch.float32,
    "row_sizes": torch.int64,
    "row_squares": torch.int64,
    "row_sketch": torch.int64,
    "observations": torch.int64,
}


def _check_vote_state(model: dict[str, Any], name: str, state: Any, vote_bits: int, where: str) -> None:
    if not isinstance(state, dict) or set(state) - {"votes"} not in _VOTE_STATES:
        raise CheckpointError(f"{where}: votes/{name} is not a vote state")
    if ("votes" in state) == (vote_bits > 0):
        found = "a buffer" if "votes" in state else "none"
        raise CheckpointError(f"{where}: votes/{name} has {found}, the manifold {vote_bits} vote bits")
    indices = model.get(f"{name}.indices")
    if indices is None:
        raise CheckpointError(f"{where}: votes/{name} belongs to no grid of the model")
    if "votes" in state:
        votes = state["votes"]
        wide = isinstance(votes, torch.Tensor) and votes.dtype == torch.int16
        _expect(where, f"votes/{name}", votes, torch.int16 if wide else torch.int8, 2)
        if votes.shape != indices.shape:
            raise CheckpointError(f"{where}: votes/{name} has shape {tuple(votes.shape)}, its grid another")
    for part in sorted(set(state) - {"votes"}):
        shape = () if part == "observations" else tuple(indices.shape[:1])
        _expect(where, f"votes/{name}/{part}", state[part], _VOTE_TYPES[part], len(shape))
        if tuple(state[part].shape) != shape:
            raise CheckpointError(
                f"{where}: votes/{name}/{part} has shape {tuple(state[part].shape)}, expected {shape}"
            )


def _check_manifold(manifold: dict[str, Any], where: str) -> None:
    if not all(isinstance(manifold.get(k), str) for k in ("name", "sha256")):
        raise CheckpointError(f"{where} does not name its manifold and the manifold's sha256")
    if type(manifold.get("vote_bits")) is not int or manifold["vote_bits"] not in (0, COMPACT_VOTE_BITS):
        raise CheckpointError(
            f"{where} has {manifold.get('vote_bits')!r} under manifold/vote_bits, expected 0 or {COMPACT_VOTE_BITS}"
        )
    _expect(where, "manifold/values", manifold.get("values"), torch.float32, 1)
    if len(manifold["values"]) != ENTRIES:
        raise CheckpointError(f"{where}: manifold/values has {len(manifold['values'])} entries, expected {ENTRIES}")


def _expect(where: str, path: str, tensor: Any, dtype: torch.dtype, dimensions: int | None) -> None:
    if not isinstance(tensor, torch.Tensor):
        raise CheckpointError(f"{where}: {path} is a {type(tensor).__name__}, expected a tensor")
    if tensor.dtype != dtype or (dimensions is not None and tensor.ndim != dimensions):
        raise CheckpointError(f"{where}: {path} is {tensor.dtype} {tuple(tensor.shape)}, expected {dtype}")


def changed_tensors(checkpoint: dict[str, Any]) -> list[str]:
    """Paths of tensors whose bytes do not hash to what is recorded, and of those recorded or present but not both."""
    recorded = checkpoint["sha256"]
    found = dict(walk_tensors(checkpoint))
    wrong = sorted(set(recorded) ^ set(found))
    wrong += [path for path, tensor in found.items() if path in recorded and tensor_sha256(tensor) != recorded[path]]
    return wrong


def one_line(error: BaseException) -> str:
    """An error's message on one line, or its type where it has none."""
    return " ".join(str(error).split())[:200] or type(error).__name__

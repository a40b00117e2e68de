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
                    "g2", "row_sketch" and "c2" (float32 (in,); older ones lack it) or "r1" and "row_sizes", of the
                    same two types}};
                    {} in stage init
    train_state     plain dict of step, tokens, cursor, rule, recipe and float optimizer; {} in stage init; with
                    "half_step" where the next step was left between two micro-batches (``vote_trainer.HalfStep``)
    source          {"id": str, "revision": str or None, "files": {name: sha256}}
    sha256          {path in this dict: sha256 of the tensor's little-endian bytes} for every tensor above
    created_by      {"program": str, "torch": str, ...}

The file is torch's zip archive with the comment that ZIP allows at its end: ``qwen-prime sha256=<hex>`` over every byte
before the comment. One changed or missing byte anywhere, in tensors, in the pickle or in the archive's own structure,
is found before anything is unpickled; and torch, which ignores the comment, reads the file as ever. Loading maps the
file and unpickles with ``weights_only=True``, so a checkpoint from a stranger cannot run code. Nor can it take more
memory or time than its size: what ``weights_only`` allows includes ``bytearray(1 << 40)``, so archive and pickle are
looked through first, and only what a checkpoint of ours consists of reaches torch.

Rejected: a sidecar file for the hash, which gets lost when a checkpoint is copied.
"""

from __future__ import annotations

import hashlib
import os
import pickle
import pickletools
import platform
import re
import shutil
import struct
import sys
import time
import zipfile
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
_WRITE_BUFFER = 1 << 20
"""Bytes: torch writes an archive in many small pieces, a few for each tensor; what is larger goes past the buffer."""
_ENTRY = re.compile(
    r"data\.pkl|\.format_version|\.storage_alignment|byteorder|version|data/\d+|\.data/serialization_id"
)
"""What torch calls the entries of its archive, within one folder."""
_GLOBAL = re.compile(
    r"collections OrderedDict|torch\._utils _rebuild_tensor_v2"
    r"|torch (Bool|Byte|Char|Short|Int|Long|Half|BFloat16|Float|Double)Storage"
)
"""All that the pickle of a dict of plain tensors names."""
_OTHER_CALLS = ("INST", "OBJ", "NEWOBJ", "NEWOBJ_EX", "STACK_GLOBAL", "EXT1", "EXT2", "EXT4", "BUILD", "PERSID")
_PICKLE_MAX = 1 << 24
"""Bytes: ours have about 500 for each tensor."""
_DEPTH_MAX, _VALUES_MAX, _KEY_MAX = 50, 1 << 17, 1 << 10
"""Limits of the dict: levels, values in all, characters of a key."""
_DTYPES = (
    *(torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64),
    *(torch.float16, torch.bfloat16, torch.float32, torch.float64),
)


class CheckpointError(RuntimeError):
    """A checkpoint that cannot be read, is damaged, or breaks the contract."""


class UnknownVersion(CheckpointError):
    """A checkpoint of another version of the contract; it may be sound."""


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
            with open(temporary, "wb", buffering=_WRITE_BUFFER) as file:
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
    if os.path.isdir(path):
        raise CheckpointError(
            f"{path} is a folder, expected a PRIME checkpoint: qwen_prime_importer.py --model {path} --output "
            "NAME_prime_init.pt makes one of a model's folder"
        )
    try:
        with open(path, "rb") as file:
            start = file.read(8)
            size = file.seek(0, os.SEEK_END)
            if size < _COMMENT_LENGTH + _END_RECORD:
                raise CheckpointError(f"{path} has {size} bytes: empty or truncated; import or copy it again")
            file.seek(size - _COMMENT_LENGTH)
            found = _COMMENT.match(file.read())
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror or error}") from error
    if found is None:
        if start.startswith(b"\x89PRIME"):
            what = "is a packed file: qwen_prime_pack.py unpack makes a checkpoint of it"
        elif start.startswith(b"GGUF"):
            what = "is a GGUF file, which llama.cpp reads: give the checkpoint that it was exported from"
        else:
            what = (
                "does not end with the hash of a PRIME checkpoint: truncated, changed, or written by another program; "
                "expected a file from qwen_prime_importer.py or qwen_prime_train.py"
            )
        raise CheckpointError(f"{path} {what}")
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
        _check_archive(path)
        checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except CheckpointError:
        raise
    except pickle.UnpicklingError as error:
        # What torch says before is advice to load it without the check.
        reason = str(error).rpartition("WeightsUnpickler error: ")[2].strip().split("\n")[0][:200]
        raise CheckpointError(
            f"{path} refused: its pickle asks for more than tensors and plain types ({reason})"
        ) from error
    except Exception as error:
        # A malformed pickle makes the unpickler fail in any way at all: IndexError, TypeError, AssertionError, ...
        raise CheckpointError(f"cannot read {path}: {type(error).__name__}: {one_line(error)}") from error
    check_contract(checkpoint, str(path))
    claimed = sum(tensor.nbytes for _, tensor in walk_tensors(checkpoint))
    if claimed > (size := path.stat().st_size):
        raise CheckpointError(f"{path} has {size:,} bytes and tensors of {claimed:,}: some of them share their bytes")
    return checkpoint


def _check_archive(path: Path) -> None:
    """Look an archive and its pickle through before torch, which allocates what they claim, does anything with them.

    Raises:
        CheckpointError: entries that are compressed, twice there, larger than the file, or not named as torch names
            them; a pickle that is too long or names anything but what makes plain tensors.
        Exception: of any kind, where there is no archive or no pickle.
    """
    size = path.stat().st_size
    with zipfile.ZipFile(path) as archive:
        entries = archive.infolist()
        names = [entry.filename for entry in entries]
        folder = names[0].split("/")[0] + "/" if names else ""
        if archive.start_dir != _directory_place(path, size):
            raise CheckpointError(f"{path} refused: the archive's directory is not where it says")
        for name, entry in zip(names, entries, strict=True):
            if not name.startswith(folder) or not _ENTRY.fullmatch(name.removeprefix(folder)):
                raise CheckpointError(f"{path} refused: its archive has an entry {name[:100]!r}")
            if entry.compress_type != zipfile.ZIP_STORED or entry.file_size != entry.compress_size:
                raise CheckpointError(f"{path} refused: the entry {name} is compressed; torch stores as it is")
            if entry.header_offset + entry.file_size > size:
                raise CheckpointError(f"{path} refused: the entry {name} claims {entry.file_size:,} bytes")
        if len(set(names)) != len(names):
            raise CheckpointError(f"{path} refused: its archive has two entries of one name")
        if (length := archive.getinfo(folder + "data.pkl").file_size) > _PICKLE_MAX:
            raise CheckpointError(f"{path} refused: its pickle has {length:,} bytes, expected at most {_PICKLE_MAX:,}")
        data = archive.read(folder + "data.pkl")
    for operation, argument, _ in pickletools.genops(data):
        if operation.name in _OTHER_CALLS or (operation.name == "GLOBAL" and not _GLOBAL.fullmatch(str(argument))):
            raise CheckpointError(
                f"{path} refused: its pickle asks for more than tensors and plain types ({argument or operation.name})"
            )


def _directory_place(path: Path, size: int) -> int:
    """Where an archive's records say that its directory begins; -1 where two of them disagree.

    Readers differ in how they find it: what one of them has seen must be what the other will read.
    """
    with open(path, "rb") as file:
        end = size - _COMMENT_LENGTH - _END_RECORD
        file.seek(max(0, end - 76))
        tail = file.read(76 + _END_RECORD)
    if tail[-_END_RECORD:-18] != b"PK\x05\x06":
        return -1
    (place,) = struct.unpack_from("<I", tail, len(tail) - 6)
    if len(tail) == 76 + _END_RECORD and tail[56:60] == b"PK\x06\x07":
        (record,) = struct.unpack_from("<Q", tail, 64)
        (large,) = struct.unpack_from("<Q", tail, 48)
        if record != end - 76 or tail[:4] != b"PK\x06\x06" or place not in (large, 0xFFFFFFFF):
            return -1
        return int(large)
    return int(place)


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
        raise UnknownVersion(
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
    _check_plain(checkpoint, where, "", [0])
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
        if not isinstance(name, str) or Path(name).name != name or name in ("", ".."):
            raise CheckpointError(f"{where}: tokenizer has a file {name!r}, expected a name without a folder")
        _expect(where, f"tokenizer/files/{name}", tensor, torch.uint8, 1)
    for name, state in votes.items():
        _check_vote_state(model, name, state, checkpoint["manifold"]["vote_bits"], where)


def _check_plain(value: Any, where: str, path: str, met: list[int], depth: int = 0) -> None:
    """Only what ``weights_only`` loading gives back: a file that could not be read again must not be written.

    A pickle may hold a list twice, or in itself: counted as often as it is met, a few bytes are without end.
    """
    met[0] += 1
    if met[0] > _VALUES_MAX or depth > _DEPTH_MAX:
        raise CheckpointError(f"{where}: {path[:200]} is nested too deeply, or the whole has too many values")
    if isinstance(value, torch.Tensor):
        if value.layout != torch.strided or value.device.type == "meta" or not value.is_contiguous():
            raise CheckpointError(f"{where}: {path} is not a plain contiguous tensor")
        odd = type(value) is not torch.Tensor or value.requires_grad or value.is_neg() or value.is_nested
        if odd or value.dtype not in _DTYPES:
            raise CheckpointError(f"{where}: {path} is a {type(value).__name__} of {value.dtype}, not a plain tensor")
    elif type(value) is dict:
        for key, item in value.items():
            if type(key) not in (str, int) or (type(key) is str and len(key) > _KEY_MAX):
                raise CheckpointError(f"{where}: {path} has a key {str(key)[:100]!r}, expected a name or a number")
            _check_plain(item, where, f"{path}/{key}" if path else str(key), met, depth + 1)
    elif type(value) in (list, tuple):
        for number, item in enumerate(value):
            _check_plain(item, where, f"{path}/{number}", met, depth + 1)
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
    {"r2", "g2", "c2", "row_squares", "row_sketch", "observations"},
    # Of before columns were measured.
    {"r2", "g2", "row_squares", "row_sketch", "observations"},
    {"r1", "r2", "row_sizes", "row_squares", "observations"},
)
_VOTE_TYPES = {
    "r1": torch.float32,
    "r2": torch.float32,
    "g2": torch.float32,
    "c2": torch.float32,
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
        shape = () if part == "observations" else tuple(indices.shape[1:] if part == "c2" else indices.shape[:1])
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
    """An error's message on one line, or its type where it has none; of a long one the beginning, up to a word."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 300 else f"{text[:296].rpartition(' ')[0] or text[:296]} ..."

"""The packed file: a container of entropy-coded tensors and a tree of plain values that says what they are.

Layout, little-endian, nothing padded:

    0       8   magic, ``\\x89PRIME\\r\\n``: a transfer that rewrites line ends shows at once
    8       4   uint32, version
    12      ..  sections, back to back: the stored bytes of each tensor
    ..      ..  header: one zstd frame of JSON (below)
    -48     8   uint64, length of the header's frame
    -40     8   uint64, length of the header's JSON
    -32     32  SHA-256 of every byte before it

The header comes last so that a file of any size is written in one pass, holding one tensor at a time. Its JSON:

    kind        "checkpoint" or "patch"
    content     a tree of plain values, in which {"$tensor": name} stands for a section, {"$tuple": [...]} for a tuple,
                {"$pairs": [[key, value], ...]} for a dict whose keys are not all names; other {"$...": ...} are those
                of the module that wrote the tree
    sections    [{"name", "dtype", "shape", "codec", "offset", "length", "check"}, ...]: codec is ``planes``
                (``entropy_coding``) or ``text`` (zstd as it comes, for tensors of bytes such as tokenizer files); check
                is the 64-bit BLAKE2b of the stored bytes, so that a tensor read alone is checked alone

Nothing is allocated because a header says so: sizes are compared with the file before they are used, and decoded data
grow as they are decoded. Rejected: safetensors inside a zip, whose header needs all sizes before the first byte.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import mmap
import os
import struct
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import zstandard

from entropy_coding import EntropyError, decode, encode, zero_order_entropy
from prime_checkpoint import CheckpointError, one_line
from whole_output import new_file

MAGIC = b"\x89PRIME\r\n"
VERSION = 1
_START = len(MAGIC) + 4
_TAIL = struct.Struct("<QQ32s")
_HEADER_MAX, _TEXT_MAX = 1 << 24, 1 << 28
"""No header of ours is longer than this, in bytes of JSON (some 250 for a tensor), nor a tensor of bytes: zstd makes
gigabytes of a hundred kilobytes, and JSON of brackets takes twenty times its length."""
_CLAIMS_MIN, _CLAIMS_RATIO = 1 << 28, 64
"""What the tensors of any file may come to, in bytes, and as a multiple of a larger file: 1.5 bits a weight, which is
as small as codes are made, is a ratio of 11."""
_TENSOR_MAX = 1 << 32
"""Bytes of one tensor; the largest of a Qwen, an embedding, has 2.5 GB."""
MOVES = "moved/"
"""How the moves of a patch are named. Of a patch that moves little they are nearly all zeros, at any ratio: whoever
applies it knows how large they are, and compares."""
_PIECE = 1 << 22

_CARRIERS: dict[torch.dtype, str] = {
    torch.int8: "i1",
    torch.uint8: "u1",
    torch.int16: "i2",
    torch.uint16: "u2",
    torch.int32: "i4",
    torch.int64: "i8",
    torch.float16: "f2",
    torch.bfloat16: "i2",
    torch.float32: "f4",
    torch.float64: "f8",
    torch.bool: "?",
}
"""The numpy type that carries a tensor's bits."""
_DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in _CARRIERS}


class PackError(CheckpointError):
    """A packed file that cannot be read, is damaged, or is of another kind."""


@dataclass(frozen=True)
class Section:
    """Where a tensor's bytes lie and how they are coded."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    codec: str
    offset: int
    length: int
    check: str

    @property
    def count(self) -> int:
        """Elements."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of the decoded tensor."""
        return self.count * _DTYPES[self.dtype].itemsize


# -- writing ----------------------------------------------------------------------------------------------------------


class PackWriter:
    """Writes a packed file section by section; ``with`` leaves the whole new file or what was there before.

    Raises:
        OutputError: the file cannot be written (disk full, no permission).
    """

    def __init__(self, path: Path | str, kind: str) -> None:
        self.path = Path(path)
        self.kind = kind
        self.sections: list[Section] = []
        self.content: Any = None
        self._open = contextlib.ExitStack()
        self._digest = hashlib.sha256()
        self._at = 0

    def __enter__(self) -> PackWriter:
        with contextlib.ExitStack() as opening:
            temporary = opening.enter_context(new_file(self.path, force=True))
            self._file = opening.enter_context(open(temporary, "wb"))
            self._write(MAGIC + struct.pack("<I", VERSION))
            self._open = opening.pop_all()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: Any) -> None:
        if error is not None:
            self._open.__exit__(kind, error, trace)
            return
        with self._open:
            self._finish()

    def _write(self, data: bytes) -> None:
        self._file.write(data)
        self._digest.update(data)
        self._at += len(data)

    def add(self, name: str, tensor: torch.Tensor) -> Section:
        """Write a tensor as a section: by ``text`` where it is bytes, else by ``planes``."""
        values = carrier(tensor)
        if tensor.dtype == torch.uint8:
            codec, data = "text", zstandard.ZstdCompressor(level=12, write_checksum=True).compress(values.tobytes())
        else:
            codec, data = "planes", encode(values)
        check = hashlib.blake2b(data, digest_size=8).hexdigest()
        kind = str(tensor.dtype).removeprefix("torch.")
        section = Section(name, kind, tuple(tensor.shape), codec, self._at, len(data), check)
        self._write(data)
        self.sections.append(section)
        return section

    def _finish(self) -> None:
        header = {"kind": self.kind, "content": self.content, "sections": [asdict(s) for s in self.sections]}
        text = json.dumps(header, allow_nan=True, separators=(",", ":")).encode()
        frame = zstandard.ZstdCompressor(level=19, write_checksum=True).compress(text)
        self._write(frame)
        self._write(struct.pack("<QQ", len(frame), len(text)))
        self._file.write(self._digest.digest())
        self._file.flush()


def carrier(tensor: torch.Tensor) -> np.ndarray:
    """A tensor's elements in row-major order as a flat numpy array of a type with the same bits."""
    if tensor.dtype not in _CARRIERS:
        raise PackError(f"a tensor of type {tensor.dtype} cannot be packed, expected one of {', '.join(_DTYPES)}")
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return (flat.view(torch.int16) if tensor.dtype == torch.bfloat16 else flat).numpy()


def plain(tree: Any, prefix: str, place: Callable[[str, torch.Tensor], Any]) -> Any:
    """A tree of plain values and tensors as JSON can hold it; ``place`` says what stands for the tensor of a path."""
    if isinstance(tree, torch.Tensor):
        return place(prefix, tree)
    if isinstance(tree, dict):
        items = [(key, plain(value, f"{prefix}/{key}" if prefix else str(key), place)) for key, value in tree.items()]
        if all(isinstance(key, str) and not key.startswith("$") for key in tree):
            return dict(items)
        return {"$pairs": [[key, value] for key, value in items]}
    if isinstance(tree, list | tuple):
        values = [plain(value, f"{prefix}/{number}", place) for number, value in enumerate(tree)]
        return {"$tuple": values} if isinstance(tree, tuple) else values
    return tree


def unplain(tree: Any, markers: Mapping[str, Callable[[Any], Any]]) -> Any:
    """The inverse of :func:`plain`; ``markers`` gives what a ``{"$...": value}`` stands for."""
    if isinstance(tree, list):
        return [unplain(value, markers) for value in tree]
    if not isinstance(tree, dict):
        return tree
    if len(tree) == 1:
        ((key, value),) = tree.items()
        if key == "$tuple":
            return tuple(unplain(item, markers) for item in value)
        if key == "$pairs":
            return {name: unplain(item, markers) for name, item in value}
        if key in markers:
            return markers[key](value)
    return {key: unplain(value, markers) for key, value in tree.items()}


def single(markers: Mapping[str, Callable[[Any], Any]], path: Path) -> dict[str, Callable[[Any], Any]]:
    """Markers for :func:`unplain` that take each value once: a tree that names a tensor often would be many of it."""
    seen: set[str] = set()

    def guarded(key: str, meaning: Callable[[Any], Any]) -> Callable[[Any], Any]:
        def mark(value: Any) -> Any:
            # Of several values the name is what is decoded.
            name = value.get("name") if isinstance(value, dict) else value
            if (place := json.dumps([key, name])) in seen:
                raise PackError(f"{path} is damaged: {str(name)[:200]!r} stands in it twice")
            seen.add(place)
            return meaning(value)

        return mark

    return {key: guarded(key, meaning) for key, meaning in markers.items()}


# -- reading ----------------------------------------------------------------------------------------------------------


def is_pack(path: Path | str) -> bool:
    """Whether a file begins as a packed file does, whatever its name; False where it cannot be read."""
    try:
        with open(path, "rb") as file:
            return file.read(len(MAGIC)) == MAGIC
    except OSError:
        return False


class Pack:
    """A packed file, mapped; tensors are decoded when they are asked for.

    Attributes:
        kind, content, sections: as the module docstring describes the header.
        sha256: the file's.

    Raises:
        PackError: not a packed file, damaged, or of a kind that is not ``kind``.
    """

    def __init__(self, path: Path | str, kind: str | None = None, *, check_hash: bool = True) -> None:
        self.path = Path(path)
        try:
            with open(self.path, "rb") as file:
                size = file.seek(0, os.SEEK_END)
                if size < _START + _TAIL.size:
                    raise PackError(f"{path} has {size} bytes: empty or truncated; pack or copy it again")
                self._view = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
        except OSError as error:
            raise PackError(f"cannot read {path}: {error.strerror or error}") from error
        if self._view[: len(MAGIC)] != MAGIC:
            raise PackError(f"{path} is not a packed file: expected one from qwen_prime_pack.py pack or diff")
        (version,) = struct.unpack_from("<I", self._view, len(MAGIC))
        if version != VERSION:
            raise PackError(f"{path} has version {version}, expected {VERSION}: use the suite that wrote it")
        length, text, recorded = _TAIL.unpack_from(self._view, size - _TAIL.size)
        self.sha256 = recorded.hex()
        if check_hash and (found := self._hash(size - 32)) != self.sha256:
            raise PackError(
                f"{path} is damaged: its bytes hash to {found[:16]}..., recorded is {self.sha256[:16]}...; "
                "copy or pack it again"
            )
        end = size - _TAIL.size - length
        if end < _START or text > _HEADER_MAX:
            raise PackError(f"{path} is damaged: its header of {length} bytes does not fit into it")
        header = self._header(self._view[end : end + length], text)
        try:
            self.kind, self.content = header["kind"], header["content"]
            self.sections = {s.name: s for s in (_section(raw, end) for raw in header["sections"])}
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise PackError(f"{path} is damaged: its header is not understood ({one_line(error)})") from error
        if kind is not None and self.kind != kind:
            raise PackError(f"{path} is a packed {self.kind}, expected a packed {kind}")
        moves = MOVES if self.kind == "patch" else "/"
        claimed = sum(s.nbytes for s in self.sections.values() if not s.name.startswith(moves))
        if claimed > (limit := max(_CLAIMS_MIN, _CLAIMS_RATIO * size)):
            raise PackError(
                f"{path} claims {claimed:,} bytes of tensors, expected at most {limit:,} of a file of {size:,} bytes: "
                "it is damaged, or made to fill memory"
            )

    def _hash(self, length: int) -> str:
        digest = hashlib.sha256()
        for start in range(0, length, _PIECE):
            digest.update(self._view[start : min(start + _PIECE, length)])
        return digest.hexdigest()

    def _header(self, frame: memoryview, length: int) -> Any:
        try:
            return json.loads(_inflate(frame, length))
        except (ValueError, RecursionError, MemoryError) as error:
            raise PackError(f"{self.path} is damaged: its header cannot be read ({one_line(error)})") from error

    def section(self, name: str) -> Section:
        """What the header says of one tensor.

        Raises:
            PackError: no such tensor.
        """
        if name not in self.sections:
            raise PackError(f"{self.path} has no tensor {name!r}")
        return self.sections[name]

    def tensor(self, name: str) -> torch.Tensor:
        """One tensor, decoded; only its own bytes are read and checked.

        Raises:
            PackError: no such tensor, or its bytes are not what its section says.
        """
        section = self.section(name)
        data = self._view[section.offset : section.offset + section.length]
        if hashlib.blake2b(data, digest_size=8).hexdigest() != section.check:
            raise PackError(f"{self.path} is damaged: the bytes of {name} changed; copy or pack it again")
        try:
            return _DECODERS[section.codec](section, data)
        except EntropyError as error:
            raise PackError(f"{self.path} is damaged: {name}: {one_line(error)}") from error
        except MemoryError as error:
            raise PackError(f"{self.path}: {name} does not fit into memory") from error


def _section(raw: Any, end: int) -> Section:
    """A header's section, every claim compared with the file.

    Raises:
        ValueError, KeyError, TypeError: it is not one.
    """
    section = Section(
        name=str(raw["name"]),
        dtype=str(raw["dtype"]),
        shape=tuple(raw["shape"]),
        codec=str(raw["codec"]),
        offset=raw["offset"],
        length=raw["length"],
        check=str(raw["check"]),
    )
    numbers = [*section.shape, section.offset, section.length]
    if any(type(n) is not int or n < 0 for n in numbers) or section.count > 1 << 48:
        raise ValueError(f"{section.name} has impossible sizes")
    if section.dtype not in _DTYPES or section.codec not in _DECODERS:
        raise ValueError(f"{section.name} has type {section.dtype} and codec {section.codec}")
    if section.nbytes > _TENSOR_MAX:
        raise ValueError(f"{section.name} claims {section.nbytes:,} bytes, expected at most {_TENSOR_MAX:,}")
    if section.codec == "text" and section.count > _TEXT_MAX:
        raise ValueError(f"{section.name} claims {section.count:,} bytes, expected at most {_TEXT_MAX:,}")
    if section.offset < _START or section.offset + section.length > end:
        raise ValueError(f"{section.name} lies outside of the file")
    return section


def _inflate(frame: memoryview, length: int) -> bytes:
    """A zstd frame of text that must come to ``length`` bytes, never more than that in memory.

    Raises:
        EntropyError: it does not.
    """
    out = bytearray()
    try:
        with zstandard.ZstdDecompressor().stream_reader(frame) as reader:
            while len(out) <= length and (piece := reader.read(min(_PIECE, length + 1 - len(out)))):
                out += piece
    except zstandard.ZstdError as error:
        raise EntropyError(one_line(error)) from error
    if len(out) != length:
        raise EntropyError(f"a text is not of the {length} bytes that it is said to have")
    return bytes(out)


def _shaped(values: np.ndarray, section: Section) -> torch.Tensor:
    tensor = torch.from_numpy(values)
    dtype = _DTYPES[section.dtype]
    return (tensor.view(dtype) if tensor.dtype != dtype else tensor).reshape(section.shape)


def _decode_planes(section: Section, data: memoryview) -> torch.Tensor:
    return _shaped(decode(data, _CARRIERS[_DTYPES[section.dtype]], section.count), section)


def _decode_text(section: Section, data: memoryview) -> torch.Tensor:
    return _shaped(np.frombuffer(bytearray(_inflate(data, section.count)), dtype=np.uint8), section)


_DECODERS: dict[str, Callable[[Section, memoryview], torch.Tensor]] = {
    "planes": _decode_planes,
    "text": _decode_text,
}


# -- how well it is coded ---------------------------------------------------------------------------------------------


def measure_section(pack: Pack, name: str) -> dict[str, Any]:
    """What a tensor takes and what its own zero-order entropy would: decoded, and encoded again.

    Returns:
        ``name``, ``elements``, ``raw`` and stored ``bytes``, ``bits`` and ``entropy`` per element, and the processor's
        seconds to ``decode`` and ``encode``.

    Raises:
        PackError: damaged.
    """
    section = pack.sections[name]
    begun = time.process_time()
    tensor = pack.tensor(name)
    decoded = time.process_time()
    values = carrier(tensor)
    if section.codec == "planes":
        encode(values)
    encoded = time.process_time()
    count = max(1, section.count)
    return {
        "name": name,
        "codec": section.codec,
        "elements": section.count,
        "raw": values.nbytes,
        "bytes": section.length,
        "bits": 8 * section.length / count,
        "entropy": zero_order_entropy(values),
        "decode": decoded - begun,
        "encode": encoded - decoded,
    }


def summarize(measured: list[dict[str, Any]]) -> dict[str, Any]:
    """Totals of :func:`measure_section` over the entropy-coded tensors of at least 2^16 elements of 8 or 16 bits (of
    wider ones a histogram says nothing: most values occur once); speeds in MB of the tensor, not of the file, per
    second of one core."""
    coded = [line for line in measured if line["codec"] == "planes" and line["elements"] >= 1 << 16]
    large = [line for line in coded if line["raw"] <= 2 * line["elements"]]
    if not large:
        return {"large tensors": 0}
    raw, stored = (sum(line[key] for line in large) for key in ("raw", "bytes"))
    entropy = sum(line["entropy"] * line["elements"] / 8 for line in large)
    worst = max(large, key=lambda line: line["bits"] / max(line["entropy"], 1e-9))
    return {
        "large tensors": len(large),
        "their bytes, raw": raw,
        "their bytes, stored": stored,
        "stored / entropy": round(stored / max(1.0, entropy), 4),
        "worst of one tensor": round(worst["bits"] / max(worst["entropy"], 1e-9), 4),
        "worst, name": worst["name"],
        "decode, MB/s": round(raw / 1e6 / max(1e-9, sum(line["decode"] for line in large)), 1),
        "encode, MB/s": round(raw / 1e6 / max(1e-9, sum(line["encode"] for line in large)), 1),
    }

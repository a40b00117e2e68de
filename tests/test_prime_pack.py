"""The container: what goes in comes out, alone or together; what is damaged is one clear error without allocation."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import struct
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
import torch
import zstandard

import prime_pack
from prime_pack import Pack, PackError, PackWriter, is_pack, plain, unplain
from whole_output import OutputError

pytestmark = pytest.mark.usefixtures("one_thread")

TENSORS = {
    "words": torch.arange(-500, 500, dtype=torch.int16).view(10, 100),
    "floats": torch.tensor([0.0, -0.0, float("nan"), float("inf"), 1e-45]),
    "scalar": torch.tensor(3, dtype=torch.int64),
    "empty": torch.zeros(0, 7, dtype=torch.int8),
    "bytes": torch.arange(200, dtype=torch.uint8),
    "half": torch.linspace(-1, 1, 9).to(torch.bfloat16),
    "flags": torch.tensor([True, False, True]),
}


def write(path: Path, content: Any = None, kind: str = "patch") -> Path:
    with PackWriter(path, kind) as writer:
        for name, tensor in TENSORS.items():
            writer.add(name, tensor)
        writer.content = content
    return path


def rewrite_header(path: Path, change: Any) -> Path:
    """The file with another header, its lengths and its hash right."""
    data = path.read_bytes()
    length, size, _ = struct.unpack("<QQ32s", data[-48:])
    header = json.loads(zstandard.ZstdDecompressor().decompress(data[-48 - length : -48], size))
    text = json.dumps(change(header)).encode()
    frame = zstandard.ZstdCompressor().compress(text)
    body = data[: -48 - length] + frame + struct.pack("<QQ", len(frame), len(text))
    path.write_bytes(body + hashlib.sha256(body).digest())
    return path


def bits(tensor: torch.Tensor) -> bytes:
    return prime_pack.carrier(tensor).tobytes()


def test_tensors_come_back_bit_for_bit_in_any_order(tmp_path: Path) -> None:
    pack = Pack(write(tmp_path / "x"))
    for name in reversed(TENSORS):
        back = pack.tensor(name)
        assert back.dtype == TENSORS[name].dtype and back.shape == TENSORS[name].shape
        assert bits(back) == bits(TENSORS[name])


def test_trees_come_back(tmp_path: Path) -> None:
    tree = {"a": [1, 2.5, None, True, "x"], "b": {0: (1, {"$odd": 2})}, "t": TENSORS["words"], "big": 2**70, "e": {}}
    content = plain(tree, "", lambda path, tensor: {"$tensor": path})
    back = unplain(json.loads(json.dumps(content)), {"$tensor": lambda name: (name, "tensor")})
    assert back == {**tree, "t": ("t", "tensor")}


def test_is_pack_looks_at_content_only(tmp_path: Path) -> None:
    assert is_pack(write(tmp_path / "x.pt"))
    (tmp_path / "y.prime").write_bytes(b"PK\x03\x04")
    assert not is_pack(tmp_path / "y.prime") and not is_pack(tmp_path / "none") and not is_pack(tmp_path)


def test_other_kind_version_and_files_are_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "x")
    with pytest.raises(PackError, match="is a packed patch, expected a packed checkpoint"):
        Pack(path, "checkpoint")
    data = bytearray(path.read_bytes())
    data[8] = 9
    path.write_bytes(data)
    with pytest.raises(PackError, match="version 9, expected 1"):
        Pack(path)
    for content in (b"", b"x" * 20, b"x" * 200):
        path.write_bytes(content)
        with pytest.raises(PackError):
            Pack(path)
    with pytest.raises(PackError, match="cannot read"):
        Pack(tmp_path / "none")


def test_every_damaged_byte_is_found(tmp_path: Path) -> None:
    data = write(tmp_path / "x").read_bytes()
    for at in [*range(0, len(data), 37), len(data) - 1]:
        changed = bytearray(data)
        changed[at] ^= 1
        (tmp_path / "y").write_bytes(changed)
        with pytest.raises(PackError):
            Pack(tmp_path / "y")


@pytest.mark.parametrize("share", [0.0, 0.2, 0.5, 0.9, 0.999])
def test_truncated_files_are_refused(tmp_path: Path, share: float) -> None:
    data = write(tmp_path / "x").read_bytes()
    (tmp_path / "y").write_bytes(data[: int(len(data) * share)])
    for check in (True, False):
        with pytest.raises(PackError):
            Pack(tmp_path / "y", check_hash=check)


def test_a_tensor_read_alone_is_checked_alone(tmp_path: Path) -> None:
    path = write(tmp_path / "x")
    section = Pack(path).sections["words"]
    data = bytearray(path.read_bytes())
    data[section.offset + 8] ^= 1
    path.write_bytes(data)
    pack = Pack(path, check_hash=False)
    assert bits(pack.tensor("floats")) == bits(TENSORS["floats"])
    with pytest.raises(PackError, match="the bytes of words changed"):
        pack.tensor("words")


@pytest.mark.parametrize(
    "lie",
    [
        {"shape": [1 << 30, 1 << 12]},
        {"shape": [1 << 45]},
        {"shape": [-1, 5]},
        {"shape": [2.5]},
        {"shape": None},
        {"dtype": "float32"},
        {"dtype": "object"},
        {"codec": "pickle"},
        {"codec": "text", "dtype": "uint8", "shape": [1 << 45]},
        {"offset": 0},
        {"offset": -4},
        {"length": 1 << 60},
        {"offset": None},
    ],
)
def test_lies_of_a_header_are_one_error_and_no_allocation(tmp_path: Path, lie: dict[str, Any]) -> None:
    path = write(tmp_path / "x")

    def change(header: dict[str, Any]) -> dict[str, Any]:
        header["sections"][0] |= lie
        return header

    rewrite_header(path, change)
    tracemalloc.start()
    with pytest.raises(PackError) as caught:
        Pack(path).tensor("words")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert "\n" not in str(caught.value) and peak < 32 << 20


@pytest.mark.parametrize("header", [[], "x", {}, {"kind": "patch"}, {"kind": "patch", "content": 1, "sections": [3]}])
def test_headers_of_another_form_are_refused(tmp_path: Path, header: Any) -> None:
    path = rewrite_header(write(tmp_path / "x"), lambda _: header)
    with pytest.raises(PackError, match="header is not understood"):
        Pack(path)


def test_a_header_that_claims_to_be_huge_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "x")
    data = path.read_bytes()
    for length, text in ((1 << 62, 10), (20, 1 << 62), (20, 1 << 27)):
        body = data[:-48] + struct.pack("<QQ", length, text)
        path.write_bytes(body + hashlib.sha256(body).digest())
        with pytest.raises(PackError, match="damaged"):
            Pack(path)


def test_a_small_file_claims_no_more_than_it_can_hold(tmp_path: Path) -> None:
    """Zeros pack to nothing: eight megabytes of sections would be sixteen gigabytes. The moves of a patch are measured
    by what they move."""

    def claim(*sections: tuple[str, int]) -> Any:
        def change(header: dict[str, Any]) -> dict[str, Any]:
            words = next(s for s in header["sections"] if s["name"] == "words")
            named = [{**words, "name": name, "shape": [1 << 10, size >> 11]} for name, size in sections]
            return {**header, "sections": named}

        return change

    most = 1 << 28
    for kind, sections, words in (
        (
            "checkpoint",
            (("a", most), ("b", 1 << 11)),
            "claims 268,437,504 bytes of tensors, expected at most 268,435,456",
        ),
        ("checkpoint", (("moved/a", most), ("b", 1 << 11)), "made to fill memory"),
        ("patch", (("moved/a", most), ("b", most), ("c", 1 << 11)), "made to fill memory"),
        ("patch", (("moved/a", 1 << 33),), "claims 8,589,934,592 bytes"),
    ):
        with pytest.raises(PackError, match=words):
            Pack(rewrite_header(write(tmp_path / "x", kind=kind), claim(*sections)))
    Pack(rewrite_header(write(tmp_path / "x", kind="patch"), claim(("moved/a", 1 << 31), ("moved/b", 1 << 31))))
    Pack(rewrite_header(write(tmp_path / "x", kind="checkpoint"), claim(("a", most))))


def test_nothing_is_left_where_writing_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*arguments: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    old = write(tmp_path / "x").read_bytes()
    for name in ("replace", "fsync"):
        with monkeypatch.context() as patch:
            patch.setattr(os, name, full)
            with pytest.raises(OutputError, match=r"cannot write .*No space left.*nothing was left behind"):
                write(tmp_path / "x", {"new": 1})
    with pytest.raises(ZeroDivisionError), PackWriter(tmp_path / "y", "patch") as writer:
        writer.add("words", TENSORS["words"])
        raise ZeroDivisionError
    assert [f.name for f in tmp_path.iterdir()] == ["x"] and (tmp_path / "x").read_bytes() == old
    with pytest.raises(OutputError, match="cannot write"):
        write(tmp_path / "no" / "x")


def test_a_full_disk_is_one_error(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="No space left"), PackWriter(tmp_path / "x", "patch") as writer:
        writer._file = open("/dev/full", "wb", buffering=0)  # noqa: SIM115
        writer.add("words", TENSORS["words"])
    assert not list(tmp_path.iterdir())


def test_types_that_numpy_lacks_are_refused(tmp_path: Path) -> None:
    with pytest.raises(PackError, match="complex64"), PackWriter(tmp_path / "x", "patch") as writer:
        writer.add("z", torch.zeros(2, dtype=torch.complex64))

"""Files made by hand to do harm, each with its hash made right: refused by the suite's own error, in one line, before
memory is asked for and in no time.

``tests/fuzz`` changes good files at random; here are the ideas of somebody who has read the formats.
"""

from __future__ import annotations

import builtins
import gzip
import hashlib
import io
import json
import os
import pickle
import re
import resource
import signal
import struct
import time
import zipfile
from collections import Counter, OrderedDict
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import zstandard
from fuzz.run import seal_manifest, seal_pack
from safetensors.numpy import save_file
from test_prime_checkpoint import assert_same, new_checkpoint, sealed
from test_prime_pack import rewrite_header
from test_token_files import random_set
from tiny_models import import_source, rewrite_json, tiny_config, write_source

import prime_checkpoint
import qwen_prime_pack
from code_eval import read_problems
from packed_checkpoint import read_checkpoint, write_checkpoint
from prime_checkpoint import CheckpointError, check_contract, load_checkpoint
from prime_pack import Pack, PackError, PackWriter
from prime_patch import apply_patch, write_patch
from qwen_prime_importer import ImportProblem, open_source
from qwen_prime_wrapper import ModelError, load_model, load_tokenizer, model_from_checkpoint, tokenizer_from_checkpoint
from run_reader import Run
from text_records import DataError, drawn, read_records
from token_files import read_tokens, write_tokens
from token_shards import MANIFEST, Manifest

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:.*prototype stage", "ignore:Sparse", "ignore:.*quantize", "ignore:Duplicate"),
]

ROOT = Path(__file__).resolve().parent.parent
SPACE = 1 << 30
SECONDS = 2.0
SECONDS_OF_A_CLAIM = 0.1
NORM = ("model", "norm.weight")
TERA = 1 << 40


class Trials:
    """Readers to be tried in a child that has a gigabyte to spend; a fork costs more than most of them."""

    def __init__(self) -> None:
        self.cases: list[tuple[str, type[BaseException] | None, str, Callable[[], Any]]] = []

    def add(
        self, name: object, error: type[BaseException] | None, words: str, read: Callable[..., Any], *arguments: Any
    ) -> None:
        """``read`` is to raise ``error`` with a message in which ``words`` are found; nothing where it is None."""
        self.cases.append((f"{name} ({len(self.cases)})", error, words, partial(read, *arguments)))

    def failures(self) -> list[str]:
        """A line on every reader that did something else, that took two seconds of the processor (a tenth of one where
        a file only claims to be large), that asked for memory in vain, that said more than a line, or with which the
        child died."""
        reading, writing = os.pipe()
        if (child := os.fork()) == 0:
            try:
                os.close(reading)
                for case in self.cases:
                    os.write(writing, f"{case[0]}\n".encode())
                    limit = SECONDS_OF_A_CLAIM if "terabyte" in case[0] else SECONDS
                    os.write(writing, f"{try_reader(*case[1:], limit=limit)}\n".encode(errors="replace"))
            finally:
                os._exit(0)
        os.close(writing)
        with os.fdopen(reading, "rb") as pipe:
            lines = pipe.read().decode().split("\n")[:-1]
        os.waitpid(child, 0)
        if len(lines) != 2 * len(self.cases):
            return [f"{lines[-1] if lines else 'the first'}: the reader hung or died"]
        return [f"{name}: {said}" for name, said in zip(lines[::2], lines[1::2], strict=True) if said]

    def run(self) -> None:
        assert self.cases and self.failures() == []


def try_reader(
    error: type[BaseException] | None, words: str, read: Callable[[], Any], *, limit: float = SECONDS
) -> str:
    """What is wrong with how a reader ends, on one line; nothing where it ends as it should."""
    signal.alarm(20)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + SPACE, resource.getrlimit(resource.RLIMIT_AS)[1]))
    begun, found, message = time.process_time(), None, ""
    try:
        read()
    except BaseException as raised:
        found, message = type(raised), str(raised)
    seconds = time.process_time() - begun
    short = " ".join(f"{'nothing' if found is None else found.__name__}: {message[:400]}".split())
    if found is not error and not (found and error and issubclass(found, error)):
        return short
    if seconds > limit:
        return f"{seconds:.1f} s; {short}"
    if re.search(r"can't allocate|cannot allocate|not enough memory|MemoryError|fit into memory", message):
        return short
    if len(message) > 3000 or "\n" in message:
        return f"a message of {len(message)} characters; {short}"
    return "" if re.search(words, message) else f"without {words!r}; {short}"


@pytest.fixture
def trials() -> Trials:
    return Trials()


def test_the_harness_notices() -> None:
    """What takes a gigabyte, spins, dies, or ends otherwise than expected."""

    def spins() -> None:
        begun = time.process_time()
        while time.process_time() < begun + SECONDS + 0.1:
            pass

    def fills() -> None:
        try:
            torch.empty(TERA)
        except RuntimeError as error:
            raise CheckpointError(str(error)) from error

    def fails(error: BaseException) -> None:
        raise error

    trials = Trials()
    trials.add("spins", None, "", spins)
    trials.add("fills", CheckpointError, "", fills)
    trials.add("takes", None, "", bytearray, 1 << 31)
    trials.add("another error", CheckpointError, "", fails, KeyError("x"))
    trials.add("none", CheckpointError, "", int)
    trials.add("one", None, "", fails, CheckpointError("x"))
    trials.add("other words", CheckpointError, "such", fails, CheckpointError("x"))
    trials.add("two lines", CheckpointError, "", fails, CheckpointError("x\ny"))
    trials.add("a long line", CheckpointError, "", fails, CheckpointError("x" * 9999))
    assert [line.split(" (")[0] for line in trials.failures()] == [case[0].split(" (")[0] for case in trials.cases]
    for death in (lambda: os._exit(3), lambda: os.kill(os.getpid(), signal.SIGKILL)):
        trials = Trials()
        trials.add("dies", None, "", death)
        assert trials.failures() == ["dies (0): the reader hung or died"]
    trials = Trials()
    trials.add("as it should", PackError, "x.*y", fails, PackError("x and y"))
    trials.add("as it should", CheckpointError, "", fails, PackError("x"))
    trials.add("as it should", None, "", int)
    trials.run()


# -- the .pt file: an archive and a pickle of our own making ----------------------------------------------------------


class Storage:
    """What a pickle says of a storage, true or not."""

    def __init__(self, elements: int, kind: Any = torch.FloatStorage, key: str = "0") -> None:
        self.elements, self.kind, self.key = elements, kind, key


class Call:
    """Pickled as a call of a function."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.function, self.arguments = function, arguments

    def __reduce__(self) -> tuple[Any, ...]:
        return self.function, self.arguments


def tensor(
    size: tuple[int, ...], stride: tuple[int, ...], offset: int = 0, storage: Storage | None = None, *more: Any
) -> Call:
    """A tensor as torch pickles it, of the archive's first storage: four bytes."""
    rebuild = torch._utils._rebuild_tensor_v2
    return Call(rebuild, storage or Storage(1), offset, size, stride, *(more or (False, OrderedDict())))


class Archive:
    """A checkpoint's archive, written without torch: whatever its entries and its pickle are meant to say."""

    def __init__(self, tree: Any) -> None:
        self.storages: list[bytes] = [b"\0\0\0\0"]
        text = io.BytesIO()
        pickler = pickle.Pickler(text, protocol=2)
        pickler.persistent_id = self._persistent  # type: ignore[method-assign]
        pickler.dispatch_table = {torch.Tensor: self._reduce}  # type: ignore[assignment]
        pickler.dump(tree)
        self.pickle = text.getvalue()

    def _persistent(self, thing: Any) -> Any:
        return ("storage", thing.kind, thing.key, "cpu", thing.elements) if isinstance(thing, Storage) else None

    def _reduce(self, value: torch.Tensor) -> tuple[Any, ...]:
        self.storages.append(value.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
        names = {"float32": "Float", "int16": "Short", "int8": "Char", "uint8": "Byte", "int64": "Long"}
        kind = getattr(torch, f"{names[str(value.dtype)[6:]]}Storage")
        storage = Storage(value.numel(), kind, str(len(self.storages) - 1))
        return tensor(tuple(value.shape), value.contiguous().stride(), 0, storage).__reduce__()

    def entries(self) -> list[tuple[str, bytes]]:
        first = [("x/data.pkl", self.pickle), ("x/byteorder", b"little"), ("x/version", b"3\n")]
        return first + [(f"x/data/{i}", data) for i, data in enumerate(self.storages)]

    def write(self, path: Path, *more: tuple[str, bytes], without: str = "", packed: str = "") -> Path:
        """Write and seal it; ``packed`` is the entry that is compressed."""
        with zipfile.ZipFile(path, "w") as archive:
            for name, data in [*(e for e in self.entries() if e[0] != without), *more]:
                kind = zipfile.ZIP_DEFLATED if name == packed else zipfile.ZIP_STORED
                archive.writestr(name, data, compress_type=kind)
        prime_checkpoint._seal(path)
        return path


def changed(place: tuple[Any, ...], value: Any) -> dict[str, Any]:
    """A small checkpoint with something else in one place."""
    tree = new_checkpoint()
    here: Any = tree
    for key in place[:-1]:
        here = here[key]
    here[place[-1]] = value
    return tree


def test_an_honest_archive_of_our_own_making_is_read(tmp_path: Path) -> None:
    """Else all that follows would be refused for nothing."""
    saved = new_checkpoint()
    saved["train_state"]["adam"] = {"m": torch.zeros(3)}
    assert_same(load_checkpoint(Archive(saved).write(tmp_path / "a.pt")), saved)
    one = changed(NORM, tensor((1,), (1,)))
    assert load_checkpoint(Archive(one).write(tmp_path / "b.pt"))["model"]["norm.weight"].tolist() == [0.0]


HUGE = Storage(TERA)
TENSORS: dict[str, tuple[Any, str]] = {
    "a terabyte": (tensor((TERA,), (1,), 0, HUGE), "storage|out of bounds"),
    "a terabyte of four bytes": (tensor((TERA,), (1,)), "storage|out of bounds"),
    "a product beyond int64": (tensor((1 << 32, 1 << 32), (1 << 32, 1)), "overflow|storage"),
    "a product that wraps to one": (tensor((1 << 62, 4), (4, 1)), "overflow|storage"),
    "one element expanded": (tensor((1 << 20, 1 << 20), (0, 0)), "not a plain contiguous"),
    "rows that overlap": (tensor((2, 2), (1, 1), 0, Storage(3)), "storage|out of bounds|not a plain"),
    "a column expanded": (tensor((1 << 30, 1), (0, 1)), "not a plain contiguous"),
    "a negative stride": (tensor((2,), (-1,), 1), "stride"),
    "an offset beyond the end": (tensor((1,), (1,), 1 << 20), "storage|out of bounds"),
    "an offset near 2^63": (tensor((1,), (1,), (1 << 63) - 1), "."),
    "a negative offset": (tensor((1,), (1,), -4), "offset"),
    "a negative size": (tensor((-1,), (1,)), "negative|overflow"),
    "sizes that are no numbers": (tensor(("x",), (1,)), "."),  # type: ignore[arg-type]
    "no storage": (Call(torch._utils._rebuild_tensor_v2, None, 0, (1,), (1,), False, OrderedDict()), "."),
    "a storage that is not there": (tensor((1,), (1,), 0, Storage(1, key="99")), "."),
    "a storage outside": (tensor((1,), (1,), 0, Storage(1, key="../../x")), "."),
    "a storage of less than nothing": (tensor((1,), (1,), 0, Storage(-(1 << 40))), "."),
    "a storage of an unknown kind": (tensor((1,), (1,), 0, Storage(1, torch.storage.UntypedStorage)), "asks for more"),
    "a storage of the card": (tensor((1,), (1,), 0, Storage(1, torch.cuda.FloatStorage)), "asks for more"),
    "a gradient": (tensor((1,), (1,), 0, None, True, OrderedDict()), "not a plain tensor"),
    "a negative view": (tensor((1,), (1,), 0, None, False, OrderedDict(), {"neg": True}), "not a plain tensor"),
    "bytes that are not ours": (Call(bytearray, 1 << 38), "asks for more"),
    "a tensor by its class": (Call(torch.Tensor, TERA), "asks for more"),
    "a parameter with state": (
        Call(torch._utils._rebuild_parameter_with_state, torch.ones(1), True, OrderedDict(), {"grad": 1}),
        "asks for more",
    ),
    "a subclass": (
        Call(torch._tensor._rebuild_from_type_v2, torch._utils._rebuild_tensor_v2, torch.Tensor, (1,), {}),
        "asks for more",
    ),
}


def test_tensors_that_are_not_what_they_claim(trials: Trials, tmp_path: Path) -> None:
    for number, (name, (what, words)) in enumerate(TENSORS.items()):
        for place in (NORM, ("train_state", "x"), ("tokenizer", "files", "vocab.json")):
            path = Archive(changed(place, what)).write(tmp_path / f"{number}-{place[0]}.pt")
            trials.add(name, CheckpointError, words, load_checkpoint, path)
    trials.run()


def kinds_of_tensors() -> dict[str, Callable[[], Any]]:
    """As torch itself writes them."""

    class Own(torch.Tensor):
        pass

    return {
        "coo": lambda: torch.ones(6).to_sparse(),
        "coo of a terabyte": lambda: torch.sparse_coo_tensor(torch.zeros(1, 1).long(), [1.0], (TERA,)),
        "csr": lambda: torch.ones(2, 3).to_sparse_csr(),
        "quantized": lambda: torch.quantize_per_tensor(torch.ones(6), 0.5, 0, torch.qint8),
        "complex": lambda: torch.ones(6, dtype=torch.complex64),
        "conjugate": lambda: torch.ones(6, dtype=torch.complex64).conj(),
        "meta": lambda: torch.empty(TERA, device="meta"),
        "nested": lambda: torch.nested.nested_tensor([torch.ones(2), torch.ones(3)]),
        "float8": lambda: torch.ones(6).to(torch.float8_e4m3fn),
        "uint16": lambda: torch.ones(6, dtype=torch.uint16),
        "parameter": lambda: torch.nn.Parameter(torch.ones(6)),
        "gradient": lambda: torch.ones(6, requires_grad=True),
        "subclass": lambda: torch.ones(6).as_subclass(Own),
        "counter": lambda: Counter({"a": 1}),
        "set": lambda: {1, 2},
        "ordered": lambda: OrderedDict(a=1),
        "bytes": lambda: b"some",
        "complex number": lambda: 1j,
        "size": lambda: torch.Size([1]),
        "dtype": lambda: torch.float32,
    }


def test_tensors_and_values_of_other_kinds(trials: Trials, tmp_path: Path) -> None:
    """Also where the contract leaves the type open, and by the writer as by the reader."""
    for name, make in kinds_of_tensors().items():
        for place in (NORM, ("model", "embed.grid.indices"), ("train_state", "deep")):
            tree = changed(place, [make()] if place[0] == "train_state" else make())
            with pytest.raises(CheckpointError):
                check_contract(tree, "here")
            if name != "subclass":  # a class of a test cannot be pickled by name; TENSORS has one
                path = sealed(tree, tmp_path / f"{name} {place[-1]}.pt")
                trials.add(name, CheckpointError, "", load_checkpoint, path)
    trials.run()


def test_plain_tensors_of_the_wrong_type(trials: Trials, tmp_path: Path) -> None:
    for dtype in (torch.bool, torch.float64, torch.float16, torch.uint8, torch.int64):
        tree = changed(("model", "embed.grid.indices"), torch.ones(11, 6, dtype=dtype))
        path = sealed(tree, tmp_path / f"{dtype}.pt")
        trials.add(dtype, CheckpointError, "embed.grid.indices is torch", load_checkpoint, path)
    trials.run()


def test_many_tensors_of_the_same_bytes(trials: Trials, tmp_path: Path) -> None:
    """Ten thousand names of one megabyte would be hashed, and copied, ten thousand times."""
    archive = Archive(changed(("train_state", "x"), [tensor((1 << 18,), (1,), 0, Storage(1 << 18))] * 2))
    archive.storages[0] = bytes(1 << 20)
    path = archive.write(tmp_path / "a.pt")
    trials.add("", CheckpointError, "share their bytes", load_checkpoint, path)
    trials.run()


# -- pickles ----------------------------------------------------------------------------------------------------------


def pair(key: str, value: bytes) -> bytes:
    """A key and an already pickled value, for the dict that ``pickled`` closes."""
    return b"X" + struct.pack("<I", len(key)) + key.encode() + value


def pickled(value: bytes) -> bytes:
    """A whole checkpoint's pickle with a stream of operations as the value of ``train_state/x``."""
    marker = "a mark to be replaced"
    data = Archive(changed(("train_state", "x"), marker)).pickle
    # BINUNICODE, length, text, and the memo's BINPUT or LONG_BINPUT.
    found = re.search(b"X" + re.escape(struct.pack("<I", len(marker))) + marker.encode() + b"(q.|r....)", data, re.S)
    assert found
    return data[: found.start()] + value + data[found.end() :]


MEMO = b"r\x00\x00\x00\x10"
AGAIN = b"j\x00\x00\x00\x10"
STREAMS: dict[str, tuple[bytes, str]] = {
    "a call of exec": (b"cbuiltins\nexec\nX\x01\x00\x00\x001\x85R", "asks for more"),
    "a call of eval": (b"c__builtin__\neval\nX\x01\x00\x00\x001\x85R", "asks for more"),
    "getattr": (b"cbuiltins\ngetattr\nK\x01K\x02\x86R", "asks for more"),
    "system": (b"cposix\nsystem\nX\x04\x00\x00\x00true\x85R", "asks for more"),
    "a global alone": (b"ctorch\nload\n", "asks for more"),
    "an encoding": (b"c_codecs\nencode\nX\x01\x00\x00\x00aX\x06\x00\x00\x00latin1\x86R", "asks for more"),
    "a set of a range": (b"cbuiltins\nset\n)R", "asks for more"),
    "an unused global": (b"cos\nsystem\n0N", "asks for more"),
    "an old instance": (b"(ios\nsystem\n", "asks for more"),
    "a global from the stack": (b"X\x02\x00\x00\x00osX\x06\x00\x00\x00system\x93", "asks for more"),
    "an object by class": (b"ccollections\nOrderedDict\n)\x81", "asks for more"),
    "a state for a dict": (b"ccollections\nOrderedDict\n)R}b", "asks for more"),
    "a persistent number": (b"K\x01Q", "."),
    "a persistent text": (b"X\x03\x00\x00\x00abcQ", "."),
    "a persistent tuple of nothing": (b")Q", "."),
    "a persistent module": (b"X\x06\x00\x00\x00modulectorch\nFloatStorage\n\x86Q", "."),
    "a storage of a dict": (b"(X\x07\x00\x00\x00storage}X\x01\x00\x00\x000X\x03\x00\x00\x00cpuK\x01tQ", "."),
    "depth": (b"]" * 100_000 + b"a" * 99_999, "nested too deeply"),
    "depth of dicts": (b"}K\x01" * 100_000 + b"N" + b"s" * 100_000, "nested too deeply"),
    "depth of tuples": (b"N" + b"\x85" * 100_000, "nested too deeply"),
    "a list in itself": (b"]" + MEMO + AGAIN + b"a", "nested too deeply"),
    "a dict in itself": (b"}" + MEMO + b"K\x01" + AGAIN + b"s", "nested too deeply"),
    "forty doublings": (b"]" + (MEMO + AGAIN + b"\x86") * 40, "too many values"),
    "forty doublings of a list": (b"](" * 40 + b"]" + (MEMO + AGAIN + b"e") * 40, "too many values"),
    "a million values": (b"](" + b"N" * (1 << 20) + b"e", "too many values"),
    "a text without end": (b"X\xff\xff\xff\x7fabc", "."),
    "a long text without end": (b"\x8d" + b"\xff" * 7 + b"\x7fabc", "."),
    "bytes without end": (b"C\xffabc", "."),
    "a number without end": (b"\x8b\xff\xff\xff\x7fabc", "."),
    "a number of a megabyte": (b"\x8b\x00\x00\x10\x00" + b"\x7f" * (1 << 20), "."),
    "a memo of 2^32": (b"r\xff\xff\xff\xffj\xff\xff\xff\xff0N", "."),
    "a memo that is not there": (b"j\xff\xff\xff\xff", "."),
    "a key of a megabyte": (b"}X\x00\x00\x10\x00" + b"k" * (1 << 20) + b"Ns", "has a key"),
    "a key of a float": (b"}G" + b"\0" * 8 + b"Ns", "has a key"),
    "a key that is a list": (b"}]Ns", "."),
    "fifty thousand marks": (b"(" * 50_000 + b"N", "."),
}


def test_pickles_that_are_not_what_they_seem(trials: Trials, tmp_path: Path) -> None:
    for number, (name, (stream, words)) in enumerate(STREAMS.items()):
        archive = Archive(new_checkpoint())
        archive.pickle = pickled(stream)
        trials.add(name, CheckpointError, words, load_checkpoint, archive.write(tmp_path / f"{number}.pt"))
    trials.run()


def test_values_that_are_only_large_are_read(tmp_path: Path) -> None:
    """The pickles above are refused for what they do, not because a stream was put in."""
    archive = Archive(new_checkpoint())
    archive.pickle = pickled(
        b"](" + b"N" * 100_000 + b"X\x00\x00\x01\x00" + b"t" * 65_536 + b"\x8a\xff" + b"\x7f" * 255 + b"e"
    )
    found = load_checkpoint(archive.write(tmp_path / "a.pt"))["train_state"]["x"]
    assert len(found) == 100_002 and len(found[-2]) == 65_536 and found[-1].bit_length() == 2039


def test_a_pickle_of_many_megabytes(trials: Trials, tmp_path: Path) -> None:
    archive = Archive(new_checkpoint())
    archive.pickle = b"\x80\x02" + b"N0" * (9 << 20) + archive.pickle[2:]
    path = archive.write(tmp_path / "a.pt")
    trials.add("", CheckpointError, "its pickle has 18,8", load_checkpoint, path)
    trials.run()


# -- archives ---------------------------------------------------------------------------------------------------------

ENTRIES = [
    "../../x",
    "/etc/x",
    "x/../../y",
    "x/data/../../y",
    "x\\..\\y",
    "x/data/0/1",
    "y/data.pkl",
    "x/code/a.py",
    "x",
]


def test_entries_with_other_names(trials: Trials, tmp_path: Path) -> None:
    """torch finds entries whatever their case."""
    for number, name in enumerate([*ENTRIES, "x/DATA.PKL"]):
        path = Archive(new_checkpoint()).write(tmp_path / f"{number}.pt", (name, b"\x80\x02N."))
        trials.add(name, CheckpointError, "has an entry", load_checkpoint, path)
    trials.run()


def test_two_entries_of_one_name(trials: Trials, tmp_path: Path) -> None:
    """One reader takes the first, another the last."""
    for number, name in enumerate(["x/data.pkl", "x/data/0", "x/version"]):
        path = Archive(new_checkpoint()).write(tmp_path / f"{number}.pt", (name, b"\x80\x02N."))
        trials.add(name, CheckpointError, "two entries of one name", load_checkpoint, path)
    trials.run()


def test_compressed_entries_that_unpack_to_gigabytes(trials: Trials, tmp_path: Path) -> None:
    bomb = bytes(16 << 20)
    for number, name in enumerate(["x/data.pkl", "x/data/0"]):
        archive = Archive(new_checkpoint())
        path = archive.write(tmp_path / f"{number}.pt", (name, bomb), without=name, packed=name)
        assert path.stat().st_size < 1 << 20
        trials.add(name, CheckpointError, "is compressed", load_checkpoint, path)
    trials.run()


def with_directory(path: Path, change: Callable[[bytearray, int], None]) -> Path:
    """A sealed archive whose directory was changed: given are all bytes, and where the directory begins."""
    data = bytearray(path.read_bytes()[: -prime_checkpoint._COMMENT_LENGTH])
    data[-2:] = b"\0\0"
    with zipfile.ZipFile(path) as archive:
        change(data, archive.start_dir)
    path.write_bytes(data)
    prime_checkpoint._seal(path)
    return path


def claim(size: int) -> Callable[[bytearray, int], None]:
    """The first entry has so many bytes, in zip64's field where the old one is too small."""

    def change(data: bytearray, at: int) -> None:
        length, extra = struct.unpack_from("<HH", data, at + 28)
        struct.pack_into("<II", data, at + 20, 0xFFFFFFFF, 0xFFFFFFFF)
        struct.pack_into("<H", data, at + 30, 20 + extra)
        data[at + 46 + length : at + 46 + length] = struct.pack("<HHQQ", 1, 16, size, size)
        (listed,) = struct.unpack_from("<I", data, len(data) - 10)
        struct.pack_into("<I", data, len(data) - 10, listed + 20)

    return change


def test_archives_whose_directory_lies(trials: Trials, tmp_path: Path) -> None:
    """Entries of a terabyte; another number of entries; and two directories: a reader that believes the address finds
    another one than a reader that looks before the end."""

    def counts(count: int) -> Callable[[bytearray, int], None]:
        def change(data: bytearray, at: int) -> None:
            struct.pack_into("<HH", data, len(data) - 14, count, count)
            if not count:
                struct.pack_into("<II", data, len(data) - 10, 0, at)

        return change

    def second(data: bytearray, at: int) -> None:
        data[at:at] = data[at:-22]

    changes: dict[str, tuple[Callable[[bytearray, int], None], str]] = {
        **{f"claims {n}": (claim(n), "claims [0-9,]+ bytes") for n in (TERA, (1 << 63) - 1, (1 << 64) - 1, 1 << 31)},
        **{f"{n} entries": (counts(n), ".") for n in (0, 1, 65_535)},
        "two directories": (second, "not where it says"),
    }
    for name, (change, words) in changes.items():
        path = with_directory(Archive(new_checkpoint()).write(tmp_path / f"{name}.pt"), change)
        trials.add(name, CheckpointError, words, load_checkpoint, path)
    with zipfile.ZipFile(tmp_path / f"claims {TERA}.pt") as archive:
        assert archive.infolist()[0].file_size == TERA, "the lie is where a reader sees it"
    trials.run()


# -- configs and tokenizers -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    small = tiny_config(hidden_size=16, intermediate_size=32, num_hidden_layers=1)
    return write_source(tmp_path_factory.mktemp("hostile") / "source", small)


@pytest.fixture(scope="module")
def base(source: Path) -> Path:
    import_source(source, source.parent / "x_prime_init.pt")
    return source.parent / "x_prime_init.pt"


CONFIGS: dict[str, dict[str, Any]] = {
    "vocabulary": {"vocab_size": 1 << 60},
    "negative vocabulary": {"vocab_size": -1},
    "layers": {"num_hidden_layers": 10**9},
    "layers as text": {"num_hidden_layers": "2"},
    "layers as a fraction": {"num_hidden_layers": 1e18},
    "true layers": {"num_hidden_layers": True},
    "no layers": {"num_hidden_layers": 0},
    "width as text": {"hidden_size": "16"},
    "width": {"hidden_size": 1 << 40},
    "inner width": {"intermediate_size": 1 << 60},
    "heads": {"num_attention_heads": 10**12},
    "heads of nothing": {"num_attention_heads": 0},
    "key heads": {"num_key_value_heads": 10**12},
    "head size": {"head_dim": 1 << 40},
    "a number of a thousand digits": {"hidden_size": 10**1000},
    "an endless list": {"layer_types": ["full_attention"] * 20_000},
    "another architecture": {"model_type": "gpt2"},
    "code of its own": {"model_type": "mine", "auto_map": {"AutoConfig": "evil.Config"}},
    "no architecture": {"model_type": ["qwen2"]},
}


def copy_of(source: Path, folder: Path, **files: bytes) -> Path:
    """A model folder in which some files, by the beginning of their names, have another content."""
    folder.mkdir()
    for file in source.iterdir():
        (folder / file.name).write_bytes(files.get(file.stem, file.read_bytes()))
    return folder


def test_configs_of_impossible_models(trials: Trials, base: Path, source: Path, tmp_path: Path) -> None:
    """In a checkpoint, and in a folder of somebody's model."""
    for number, (name, config) in enumerate(CONFIGS.items()):
        content = load_checkpoint(base)
        content["hf_config"] = {**content["hf_config"], **config}
        trials.add(name, ModelError, "", model_from_checkpoint, content)
        folder = copy_of(source, tmp_path / str(number))
        rewrite_json(folder / "config.json", **config)
        trials.add(name, ModelError, "", load_model, folder)
    trials.run()


DEEP = b"[" * 100_000
DEEP_OBJECT = b'{"a":' * 100_000
NOT_JSON = [DEEP, DEEP_OBJECT, b"nul", b"\xff\xfe", b"9" * 5000, b'{"a": 1e40']


def test_configs_that_are_not_json(trials: Trials, source: Path, base: Path, tmp_path: Path) -> None:
    for number, text in enumerate(NOT_JSON):
        folder = copy_of(source, tmp_path / str(number), config=text)
        trials.add(text[:20], ModelError, "cannot read", load_model, folder)
        trials.add(text[:20], ImportProblem, "cannot read", open_source, str(folder))
        content = load_checkpoint(base)
        files = content["tokenizer"]["files"]
        files["generation_config.json"] = torch.frombuffer(bytearray(text), dtype=torch.uint8)
        trials.add(text[:20], ModelError, "generation_config", model_from_checkpoint, content)
    trials.run()


def test_tokenizers_that_are_none(trials: Trials, source: Path, base: Path, tmp_path: Path) -> None:
    for number, text in enumerate([*NOT_JSON, b"null", b"[]", bytes(1000), b'{"version": "1.0", "model": 1e400}']):
        for name in ("tokenizer", "tokenizer_config"):
            if name == "tokenizer_config" and text[-1:] == b"}":
                continue  # fields that nobody reads
            folder = copy_of(source, tmp_path / f"{number} {name}", **{name: text})
            trials.add((name, text[:20]), ModelError, "cannot read a tokenizer", load_tokenizer, folder)
            content = load_checkpoint(base)
            data = torch.frombuffer(bytearray(text), dtype=torch.uint8)
            content["tokenizer"]["files"][f"{name}.json"] = data
            trials.add((name, text[:20]), ModelError, "cannot read", tokenizer_from_checkpoint, content)
    trials.run()


def test_a_tokenizer_file_that_claims_a_gigabyte(trials: Trials, base: Path, tmp_path: Path) -> None:
    content = load_checkpoint(base)
    content["tokenizer"]["files"]["tokenizer.json"] = tensor((1 << 30,), (1,), 0, Storage(1 << 30, torch.ByteStorage))
    path = Archive(content).write(tmp_path / "a.pt")
    trials.add("", CheckpointError, "storage|out of bounds", load_checkpoint, path)
    trials.run()


OUTSIDE = ["../../x", "../x", "/no/such/x", "a/b", "..", ".", "", "a/../../x"]
OTHERS = ["config.json", "model.safetensors", "modeling_prime.py", "sitecustomize.py", ".hidden", "a\\..\\b", "nul\0"]


def test_a_tokenizer_file_is_written_nowhere_else(trials: Trials, base: Path, tmp_path: Path) -> None:
    """By any command that writes it: not outside of the folder asked for, and not as config or code inside of it."""
    content = load_checkpoint(base)
    files = dict(content["tokenizer"]["files"])
    inner = tmp_path / "deep" / "er"
    inner.mkdir(parents=True)
    for number, name in enumerate(OUTSIDE + OTHERS):
        bad = {**content, "tokenizer": {"source": "x", "files": {**files, name: torch.zeros(4, dtype=torch.uint8)}}}
        path = sealed(bad, tmp_path / f"{number}.pt")
        error: type[Exception] = CheckpointError if name in OUTSIDE else ModelError
        if name in OUTSIDE:
            trials.add(name, CheckpointError, "without a folder", load_checkpoint, path)
        trials.add(name, ModelError, "tokenizer file", tokenizer_from_checkpoint, bad)
        for kind in ("hf", "prime-hf", "gguf"):
            config = qwen_prime_pack.ExportConfig(path, kind, inner / "out")  # type: ignore[arg-type]
            trials.add(name, error, "tokenizer", qwen_prime_pack.main, config)
    before = sorted(tmp_path.rglob("*"))
    trials.run()
    assert sorted(tmp_path.rglob("*")) == before


def test_an_index_names_only_files_beside_it(trials: Trials, source: Path, tmp_path: Path) -> None:
    (tmp_path / "x.safetensors").write_bytes((source / "model.safetensors").read_bytes())
    names = ["../x.safetensors", "/etc/passwd", "a/b.safetensors"]
    texts = [(json.dumps({"weight_map": {"model.norm.weight": name}}).encode(), "names the file") for name in names]
    texts += [(text, "cannot read") for text in (DEEP, b'{"weight_map": [1]}', b'{"weight_map": {"a": 1}}', b"nul")]
    texts += [(b'{"weight_map": {"a": []}}', "cannot read"), (b'{"weight_map": {"a": ".."}}', "names ..")]
    for number, (text, words) in enumerate(texts):
        folder = copy_of(source, tmp_path / str(number))
        (folder / "model.safetensors").unlink()  # beside which nobody reads an index
        (folder / "model.safetensors.index.json").write_bytes(text)
        trials.add(text[:60], ImportProblem, words, open_source, str(folder))
    trials.run()


# -- packed files and patches -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def packed(base: Path) -> Path:
    write_checkpoint(load_checkpoint(base), base.with_suffix(".prime"))
    return base.with_suffix(".prime")


def claimed(**lie: Any) -> Callable[[dict[str, Any]], Any]:
    """A header in which the first section of a tensor with two sizes claims something else."""

    def change(header: dict[str, Any]) -> Any:
        next(s for s in header["sections"] if len(s["shape"]) == 2).update(lie)
        return header

    return change


def tokenizer_claims(size: int) -> Callable[[dict[str, Any]], Any]:
    def change(header: dict[str, Any]) -> Any:
        next(s for s in header["sections"] if s["codec"] == "text").update(shape=[size])
        return header

    return change


def content_of(value: Any) -> Callable[[dict[str, Any]], Any]:
    def change(header: dict[str, Any]) -> Any:
        header["content"]["train_state"] = value
        return header

    return change


def doubled(header: dict[str, Any]) -> dict[str, Any]:
    header["content"]["tokenizer"]["files"]["../../x"] = {"$tensor": header["sections"][0]["name"]}
    return header


def moved(header: dict[str, Any]) -> dict[str, Any]:
    """Every section lies where the first one does."""
    first = header["sections"][0]
    for section in header["sections"]:
        section |= {"offset": first["offset"], "length": first["length"], "check": first["check"]}
    return header


HEADERS: dict[str, Callable[[dict[str, Any]], Any]] = {
    "a terabyte": claimed(shape=[1 << 20, 1 << 20]),
    "beyond int64": claimed(shape=[1 << 40, 1 << 40]),
    "a negative size": claimed(shape=[-1, -16]),
    "a size of text": claimed(shape=["16", "16"]),
    "a shape that is text": claimed(shape="16"),
    "a negative offset": claimed(offset=-8),
    "an offset beyond the end": claimed(offset=TERA),
    "a negative length": claimed(length=-1),
    "a length beyond the end": claimed(length=TERA),
    "an offset of infinity": claimed(offset=float("inf")),
    "sections that overlap": moved,
    "a tokenizer of a gigabyte": tokenizer_claims(1 << 30),
    "a tokenizer of a terabyte": tokenizer_claims(TERA),
    "a tokenizer outside": doubled,
    "depth in a value": content_of([[[[]]]] * 3 + [json.loads("[" * 200 + "]" * 200)]),
    "a tensor of a number": content_of({"$tensor": 3}),
    "a tensor of a list": content_of({"$tensor": []}),
    "a tensor that is not there": content_of({"$tensor": "model/none"}),
    "pairs of one": content_of({"$pairs": [[1]]}),
    "pairs with a list as key": content_of({"$pairs": [[[1], 2]]}),
    "a tuple of a number": content_of({"$tuple": 7}),
    "a manifold by another name": content_of({"$manifold": "../x"}),
    "origins of nothing": content_of({"$origins": "none"}),
    "a grid of nothing": content_of({"$grid": {"name": "x"}}),
    "two million values": content_of([0] * (2 << 20)),
    "a name that is no text": content_of({"$pairs": [[1.5, 2]]}),
    "a list of sections": lambda header: {**header, "sections": {}},
    "a content of text": lambda header: {**header, "content": "x"},
    "a kind of list": lambda header: {**header, "kind": ["checkpoint"]},
}


def test_packed_headers(trials: Trials, packed: Path, tmp_path: Path) -> None:
    for number, (name, change) in enumerate(HEADERS.items()):
        path = tmp_path / str(number)
        path.write_bytes(packed.read_bytes())
        trials.add(name, CheckpointError, "", read_checkpoint, rewrite_header(path, change))
    trials.run()


def with_header(path: Path, text: bytes, claims: int | None = None) -> Path:
    """A packed file whose header is any bytes at all, and said to be of another length."""
    data = path.read_bytes()
    (length,) = struct.unpack_from("<Q", data, len(data) - 48)
    frame = zstandard.ZstdCompressor(level=3).compress(text)
    path.write_bytes(data[: -48 - length] + frame + struct.pack("<QQ", len(frame), claims or len(text)) + bytes(32))
    path.write_bytes(seal_pack(path.read_bytes()))
    return path


def test_packed_headers_that_are_not_ours(trials: Trials, packed: Path, tmp_path: Path) -> None:
    texts = {
        "lists": DEEP,
        "objects": DEEP_OBJECT,
        "240 MB of braces": b"[" + b"{}," * (80 << 20),
        "15 MB of braces": b"[" + b"{}," * (5 << 20),
        "a terabyte": bytes(1 << 20),
        "NaN": b'{"kind": "checkpoint", "content": NaN, "sections": []}',
        "1e400": b'{"kind": "checkpoint", "content": 1e400, "sections": [1e400]}',
        "surrogate": b'{"kind": "\\ud800", "content": {}, "sections": []}',
        "digits": b"9" * 100_000,
    }
    for name, text in texts.items():
        path = tmp_path / name
        path.write_bytes(packed.read_bytes())
        with_header(path, text, TERA if name == "a terabyte" else None)
        assert path.stat().st_size < 1 << 20
        trials.add(name, PackError, "", read_checkpoint, path)
    trials.run()


def test_a_text_that_unpacks_to_gigabytes(trials: Trials, tmp_path: Path) -> None:
    """A hundred kilobytes of zstd for two gigabytes of tokenizer."""
    path = tmp_path / "x.prime"
    with PackWriter(path, "checkpoint") as writer:
        section = writer.add("t", torch.zeros(1 << 20, dtype=torch.uint8))
        writer.content = {}
    bomb = zstandard.ZstdCompressor(level=1).compress(bytes(1 << 29))

    data = path.read_bytes()
    assert len(bomb) < 1 << 16
    path.write_bytes(data[: section.offset] + bomb + data[section.offset + section.length :])

    def change(header: dict[str, Any]) -> Any:
        check = hashlib.blake2b(bomb, digest_size=8).hexdigest()
        header["sections"][0] |= {"shape": [1 << 29], "length": len(bomb), "check": check}
        return header

    path.write_bytes(seal_pack(path.read_bytes()))
    rewrite_header(path, change)
    trials.add("", PackError, "expected at most", lambda: Pack(path).tensor("t"))
    trials.run()


PATCHES: dict[str, Callable[[dict[str, Any]], Any]] = {
    "a move of a terabyte": claimed(shape=[1 << 20, 1 << 20]),
    "a tensor of the other side that is none": lambda h: {**h, "content": put_tree(h, {"$same": "model/none"})},
    "a tensor of the other side by number": lambda h: {**h, "content": put_tree(h, {"$same": 3})},
    "a tensor of the other side by list": lambda h: {**h, "content": put_tree(h, {"$same": []})},
    "a move of text": lambda h: {**h, "content": put_tree(h, {"$moved": "tokenizer/files/tokenizer.json"})},
    "a tree without end": lambda h: {**h, "content": put_tree(h, json.loads("[" * 300 + "]" * 300))},
    "a side of text": lambda h: {**h, "content": {"base": "x", "new": "y"}},
    "no sides": lambda h: {**h, "content": None},
    "a tree of text": lambda h: {**h, "content": {**h["content"], "new": {**h["content"]["new"], "tree": "x"}}},
    "a tensor in the config": lambda h: {
        **h,
        "content": put_tree(h, {"$same": "model/model.norm.weight"}, "hf_config"),
    },
}


def put_tree(header: dict[str, Any], value: Any, place: str = "train_state") -> dict[str, Any]:
    content = header["content"]
    tree = {**content["new"]["tree"], place: {"x": value}}
    return {**content, "new": {**content["new"], "tree": tree}}


def test_patches(trials: Trials, base: Path, tmp_path: Path) -> None:
    content = load_checkpoint(base)
    new = {**content, "model": {n: t.clone() for n, t in content["model"].items()}}
    for value in new["model"].values():
        value[0] += 1
    for number, (name, change) in enumerate({"good": lambda h: h, **PATCHES}.items()):
        path = tmp_path / str(number)
        write_patch(content, new, path, ("0" * 64, "1" * 64))
        rewrite_header(path, change)
        trials.add(name, None if name == "good" else CheckpointError, "", apply_patch, content, path)
    trials.run()


# -- tokens and manifests ---------------------------------------------------------------------------------------------

MOST = (1 << 63) - 1


def test_token_files(trials: Trials, tmp_path: Path) -> None:
    """Columns whose places wrap around, headers that are none, and types that numpy does not have."""
    path = tmp_path / "a"
    write_tokens(path, random_set([5, 9]))
    good = read_tokens(path)[0]
    about = json.dumps({"format": "qwen-prime-tokens", "version": 1, "seq_len": 9, "cut": 0, "dropped": 0})

    def add(words: str, metadata: str, **columns: np.ndarray) -> None:
        kept = {
            "input_ids": good.input_ids,
            "answer": good.answer.astype(np.uint8),
            "starts": good.starts,
            "record": good.record,
        }
        place = tmp_path / str(len(trials.cases))
        save_file({**kept, **columns}, place, metadata={"about": metadata})
        trials.add((metadata[-60:], list(columns)), DataError, words, read_tokens, place)

    ids = len(good.input_ids)
    wraps = np.array([0, MOST, -MOST - 1, -1, ids])
    assert (np.diff(wraps) > 0).all(), "the differences of these places look well"
    add("fit together", about, starts=wraps, record=np.arange(4))
    add("fit together", about, starts=np.array([0, 1 << 40, ids]))
    add("fit together", about, starts=np.array([0, -5, ids]))
    for text in ("[" * 100_000, '{"a":' * 100_000, "9" * 5000, "NaN", "null"):
        add("not a file of tokens", text)
    for field in ('"split_texts": 1e400', '"split_texts": NaN', '"split_texts": []', f'"split_texts": "{"9" * 5000}"'):
        add("lacks or spoils", about[:-1] + f', {field}, "about": {{}}}}')
    trials.run()


HEADERS_OF_TOKENS: list[dict[str, Any]] = [
    {"data_offsets": [0, TERA]},
    {"data_offsets": [TERA, 2 * TERA]},
    {"data_offsets": [8, 0]},
    {"data_offsets": [-8, 0]},
    {"data_offsets": [0, 8]},
    {"shape": [TERA]},
    {"shape": [1 << 62, 4]},
    {"shape": [-1]},
    {"dtype": "BF16", "shape": [28]},
    {"dtype": "F8_E4M3", "shape": [56]},
    {"dtype": "X"},
]


def test_headers_of_token_files(trials: Trials, tmp_path: Path) -> None:
    write_tokens(tmp_path / "a", random_set([5, 9]))
    data = (tmp_path / "a").read_bytes()
    (length,) = struct.unpack_from("<Q", data)
    for number, change in enumerate(HEADERS_OF_TOKENS):
        header = json.loads(data[8 : 8 + length])
        header["input_ids"] |= change
        text = json.dumps(header).encode()
        (tmp_path / str(number)).write_bytes(struct.pack("<Q", len(text)) + text + data[8 + length :])
        trials.add(change, DataError, "", read_tokens, tmp_path / str(number))
    for claims in (TERA, (1 << 63) - 1, (1 << 64) - 1, 0, 1):
        (tmp_path / f"{claims}.").write_bytes(struct.pack("<Q", claims) + data[8:])
        trials.add(claims, DataError, "not a file of tokens", read_tokens, tmp_path / f"{claims}.")
    trials.run()


SHARD = {"file": "train_00000.safetensors", "sha256": "0", "documents": 2, "tokens": 14}


LIES: list[dict[str, Any]] = [
    *({"file": name} for name in ("../x", "/etc/passwd", "a/b", "..", ".", "", "x/", "a/../x")),
    *({"documents": n} for n in (-1, -TERA, 10**30, "x", None, [], float("nan"), float("inf"))),
    *({"tokens": n} for n in (-1, -TERA, "x", float("-inf"))),
]


def test_manifests(trials: Trials, tmp_path: Path) -> None:
    for number, lie in enumerate([{}, *LIES]):
        folder = tmp_path / str(number)
        folder.mkdir()
        Manifest({"id": "x"}, {"name": "t", "sha256": "0"}, {"seed": 1}, {"read": 9}).write(folder)
        content = json.loads((folder / MANIFEST).read_text())
        content["splits"] = {"train": [{**SHARD, **lie}], "valid": []}
        (folder / MANIFEST).write_bytes(seal_manifest(json.dumps(content).encode()))
        trials.add(lie, DataError if lie else None, "", Manifest.read, folder)
    trials.run()


# -- rows, reports, problems, telemetry -------------------------------------------------------------------------------

GOOD_ROW = b'{"instruction": "a", "output": "b"}\n'
ROWS = {
    "lists": DEEP,
    "objects": DEEP_OBJECT,
    "closed lists": DEEP + b"]" * 100_000,
    "a text of lists": b'{"text": ' + DEEP + b"]" * 100_000 + b"}",
    "infinity as a text": b'{"text": 1e400}',
    "NaN": b'{"text": NaN}',
    "infinity": b'{"messages": Infinity}',
    "an answer of NaN": b'{"instruction": "a", "output": NaN}',
    "digits": b'{"text": ' + b"9" * 10_000 + b"}",
    "an id of digits": b'{"id": ' + b"9" * 10_000 + b', "text": "a"}',
    "a surrogate": b'{"text": "\\ud800"}',
    "a surrogate as id": b'{"id": "\\udfff", "text": "a"}',
    "a surrogate as key": b'{"\\ud800": "a"}',
    "a surrogate as role": b'{"messages": [{"role": "\\ud800", "content": "a"}]}',
    "zero bytes": b"\0" * 1000,
    "a zero in a text": b'{"text": "a\0b"}',
    "invalid UTF-8": b'{"text": "\xff"}',
    "64 MB": b'{"instruction": "' + b"x" * (64 << 20),
    "8 MB of a wrong type": b'{"text": ["' + b"x" * (8 << 20) + b'"]}',
    "8 MB of a key": b'{"' + b"x" * (8 << 20) + b'": 1}',
    "8 MB as role": b'{"messages": [{"role": "' + b"x" * (8 << 20) + b'", "content": "a"}]}',
}


def test_rows(trials: Trials, tmp_path: Path) -> None:
    """A row that cannot be used is named with its line, and named in a few words; the others are kept."""

    def keeps(path: Path) -> None:
        found = read_records(path, max_bad_share=1.0)
        assert len(found.records) == 2 and len(found.bad_rows) == 1
        for key in found.keys:
            drawn(key, 0.5)

    for number, (name, row) in enumerate(ROWS.items()):
        path = tmp_path / f"{number}.jsonl"
        path.write_bytes(GOOD_ROW + row + b"\n" + GOOD_ROW)
        trials.add(name, DataError, r"\.jsonl:2: ", read_records, path)
        trials.add(name, DataError, r"bad row: .*\.jsonl:2: ", partial(read_records, strict=True), path)
        trials.add(name, None, "", keeps, path)
        path = path.with_suffix(".json")
        path.write_bytes(b"[" + row + b"]")
        trials.add(name, DataError, r"\.json:1: ", read_records, path)
    trials.run()


def test_rows_that_are_only_odd_are_kept(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    rows = [b'{"text": "a\\u0000b"}', b'{"id": 1e400, "text": "a"}', b'{"id": NaN, "text": "b"}']
    rows += [b'{"id": -' + b"9" * 4000 + b', "text": "c"}', b'{"text": "\\ud83d\\ude00", "more": [[[[1e999]]]]}']
    path.write_bytes(b"\n".join(rows))
    found = read_records(path)
    assert [r[:3] for r in found.records] == ["a\0b", "a", "b", "c", "\U0001f600"]
    assert all(drawn(key, 1.0) for key in found.keys)


def test_problems(trials: Trials, tmp_path: Path) -> None:
    """Also a gzip of one megabyte for one gigabyte of line."""
    bomb = gzip.compress(b'{"task_id": "' + bytes(4 << 20), 9) * 256
    assert len(bomb) < 2 << 20
    (tmp_path / "p.jsonl.gz").write_bytes(bomb)
    trials.add("bomb", DataError, "unpacks to more than", read_problems, tmp_path / "p.jsonl.gz")
    for text in (DEEP, b"NaN", b"1e400", b'{"task_id": NaN}', b"9" * 5000, b"\0", b'["\\ud800"]'):
        path = tmp_path / f"{len(trials.cases)}.jsonl"
        path.write_bytes(text)
        trials.add(text[:20], DataError, "", read_problems, path)
    trials.run()


def test_a_monitor_passes_over_what_is_no_telemetry(trials: Trials, tmp_path: Path) -> None:
    """Depth, numbers that are none, and a line of 64 MB without an end."""
    lines = [
        DEEP,
        DEEP_OBJECT,
        b'{"step": 1e400}',
        b'{"step": NaN, "loss": Infinity}',
        b'{"step": ' + b"9" * 5000 + b"}",
    ]
    lines += [b'{"step": -1}', b'{"step": "1"}', b'{"step": [[]]}', b"\0" * 99, b'{"step": 4611686018427387904}']
    lines += [b'{"prompt": "\\ud800"}', b"x" * (64 << 20)]

    def looks(folder: Path) -> None:
        run = Run(folder)
        run.read_all()
        assert len(run.history) == 0

    for name in ("stats.jsonl", "events.jsonl", "samples.jsonl", "config.json"):
        folder = tmp_path / name.split(".")[0]
        folder.mkdir()
        (folder / name).write_bytes(b"\n".join(lines if name == "stats.jsonl" else lines[:-1]))
        trials.add(name, None, "", looks, folder)
    trials.run()


# -- what the refusals rest on ----------------------------------------------------------------------------------------


def test_torch_is_new_enough_to_unpickle_what_strangers_wrote() -> None:
    """``weights_only`` could be broken out of before 2.6 (CVE-2025-32434), and be made to corrupt memory before 2.10
    (CVE-2026-24747)."""
    text = (ROOT / "requirements.txt").read_text(encoding="utf-8")
    lines = [line.split("#")[0].split(";")[0].strip() for line in text.splitlines()]
    pins = [re.fullmatch(r"torch\s*==\s*(\d+)\.(\d+)(?:\.\d+)?", line) for line in lines if re.match(r"torch\b", line)]
    assert pins and all(pin and (int(pin[1]), int(pin[2])) >= (2, 10) for pin in pins), pins
    running = torch.__version__.split("+")[0].split(".")
    assert (int(running[0]), int(running[1])) >= (2, 10)


def test_nothing_is_unpickled_by_python_itself(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*arguments: Any, **options: Any) -> Any:
        raise AssertionError("pickle was asked")

    monkeypatch.setattr(pickle, "loads", never)
    monkeypatch.setattr(pickle, "load", never)
    monkeypatch.setattr(pickle, "Unpickler", never)
    monkeypatch.setattr(builtins, "eval", never)
    load_checkpoint(base)

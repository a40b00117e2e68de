"""The checkpoint: what is saved comes back, what is damaged or foreign is refused, a failed write leaves nothing."""

from __future__ import annotations

import copy
import errno
import hashlib
import io
import os
import resource
import tracemalloc
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import manifolds
import prime_checkpoint
from ballots import VoteRule
from ghost_core import Ballot
from ghost_grid import GhostGrid
from momentum_rules import MomentumRule
from prime_checkpoint import (
    CheckpointError,
    changed_tensors,
    check_contract,
    check_file,
    load_checkpoint,
    one_line,
    probe,
    probe_vector,
    save_checkpoint,
    tensor_sha256,
)
from vote_rules import RULES, rule_named

MANIFOLD = manifolds.build("prime-harmonic")


def new_checkpoint(seed: int = 1, rule: VoteRule | None = None) -> dict[str, Any]:
    """A small checkpoint of stage train with everything that the contract knows."""
    rule = rule or MomentumRule()
    table = manifolds.build("compact") if rule.vote_bits else MANIFOLD
    generator = torch.Generator().manual_seed(seed)
    model: dict[str, torch.Tensor] = {"norm.weight": torch.randn(6, generator=generator)}
    votes = {}
    for name, shape in (("embed.grid", (11, 6)), ("layer.up.grid", (8, 6))):
        grid = GhostGrid(*shape, table, Ballot(rule=rule))
        grid.import_weights(torch.randn(*shape, generator=generator))
        grid.unlock()
        most = min(rule.carry, 31)
        planted = torch.randint(-most, most + 1, shape, generator=generator)
        (grid.indices if rule.vote_bits else grid.votes).add_(planted.to(torch.int16 if rule.vote_bits else torch.int8))
        model[f"{name}.indices"], model[f"{name}.scale"] = grid.indices, grid.scale
        votes[name] = grid.vote_state()
    model["layer.up.bias"] = torch.randn(8, generator=generator)
    return {
        "format": "qwen-prime",
        "version": 2,
        "stage": "train",
        "hf_config": {"hidden_size": 6, "rope_scaling": None, "architectures": ["Qwen2ForCausalLM"], "eps": 1e-6},
        "tokenizer": {"source": "tiny", "files": {"vocab.json": torch.arange(9, dtype=torch.uint8)}},
        "manifold": {
            "name": table.name,
            "sha256": table.sha256,
            "vote_bits": table.vote_bits,
            "values": table.values.clone(),
        },
        "model": model,
        "probes": {"embed.weight": torch.randn(11, generator=generator)},
        "votes": votes,
        "train_state": {"step": 7, "loss": 2.5, "name": "é", "list": [1, (2, None)], "adam": {"m": torch.zeros(0)}},
        "source": {"id": "tiny", "revision": None, "files": {"model.safetensors": "0" * 64}},
        "sha256": {},
        "created_by": prime_checkpoint.created_by("test"),
    }


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A good file, not to be changed."""
    path = tmp_path_factory.mktemp("good") / "good.pt"
    save_checkpoint(new_checkpoint(), path)
    return path


def sealed(thing: Any, path: Path) -> Path:
    """A file with the right closing hash around anything at all, as a stranger could make it."""
    torch.save(thing, path)
    prime_checkpoint._seal(path)
    return path


def assert_same(a: Any, b: Any, where: str = "") -> None:
    assert type(a) is type(b), where
    if isinstance(a, dict):
        assert list(a) == list(b), where
        for key in a:
            assert_same(a[key], b[key], f"{where}/{key}")
    elif isinstance(a, list | tuple):
        assert len(a) == len(b), where
        for i, (x, y) in enumerate(zip(a, b, strict=True)):
            assert_same(x, y, f"{where}/{i}")
    elif isinstance(a, torch.Tensor):
        assert a.dtype == b.dtype and a.shape == b.shape and torch.equal(a, b), where
    else:
        assert a == b, where


# -- round trip -------------------------------------------------------------------------------------------------------


def test_round_trip(tmp_path: Path) -> None:
    saved = new_checkpoint()
    expected = copy.deepcopy(saved)
    digest = save_checkpoint(saved, tmp_path / "a.pt")
    loaded = load_checkpoint(tmp_path / "a.pt")
    assert len(loaded["sha256"]) == 4 + 1 + 1 + 1 + 2 * 7 + 1 + 2 and "adam/m" not in loaded["sha256"]
    assert loaded["sha256"]["train_state/adam/m"] == hashlib.sha256(b"").hexdigest()
    expected["sha256"] = loaded["sha256"]
    assert_same(loaded, expected)
    assert changed_tensors(loaded) == []
    assert check_file(tmp_path / "a.pt") == digest
    assert os.listdir(tmp_path) == ["a.pt"] and (tmp_path / "a.pt").stat().st_mode & 0o777 == 0o644


def test_the_digest_is_that_of_the_bytes_before_the_comment(good: Path) -> None:
    raw = good.read_bytes()
    comment = f"qwen-prime sha256={check_file(good)}".encode()
    assert raw.endswith(comment)
    assert hashlib.sha256(raw[: -len(comment)]).hexdigest().encode() == comment[-64:]


def test_torch_and_zip_read_the_file_as_ever(good: Path) -> None:
    plain = torch.load(good, weights_only=True)
    assert_same(plain, load_checkpoint(good))
    with zipfile.ZipFile(good) as archive:
        assert archive.testzip() is None and archive.comment.startswith(b"qwen-prime sha256=")


def test_writing_to_loaded_tensors_does_not_reach_the_file(good: Path) -> None:
    digest = check_file(good)
    loaded = load_checkpoint(good)
    loaded["model"]["norm.weight"].fill_(7)
    del loaded
    assert check_file(good) == digest
    assert not bool((load_checkpoint(good)["model"]["norm.weight"] == 7).any())


def test_saving_replaces_an_old_file_whole(tmp_path: Path) -> None:
    path = tmp_path / "a.pt"
    path.write_bytes(b"x" * 10_000_000)
    save_checkpoint(new_checkpoint(2), path)
    assert_same(load_checkpoint(path)["model"], new_checkpoint(2)["model"])
    assert path.stat().st_size < 10_000_000


def test_a_relative_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    save_checkpoint(new_checkpoint(), "a.pt")
    assert load_checkpoint("a.pt")["stage"] == "train"


def test_file_and_folder_reach_the_disk_in_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.pt"
    calls: list[str] = []
    fsync, replace = os.fsync, os.replace

    def noted_fsync(handle: int) -> None:
        target = Path(os.readlink(f"/proc/self/fd/{handle}"))
        calls.append("folder" if target == tmp_path else f"file {target.stat().st_size}")
        fsync(handle)

    def noted_replace(source: Any, target: Any) -> None:
        calls.append("replace")
        replace(source, target)

    monkeypatch.setattr(os, "fsync", noted_fsync)
    monkeypatch.setattr(os, "replace", noted_replace)
    save_checkpoint(new_checkpoint(), path)
    assert calls == [f"file {path.stat().st_size}", "replace", "folder"]


# -- damage -----------------------------------------------------------------------------------------------------------


def test_every_flipped_byte_is_found(good: Path, tmp_path: Path) -> None:
    """All of the first 300 bytes and the last 500, and a sample of the rest; any change of the byte will do."""
    raw = bytearray(good.read_bytes())
    generator = np.random.default_rng(3)
    size = len(raw)
    places = {*range(300), *range(size - 500, size), *generator.integers(300, size - 500, 400).tolist()}
    path = tmp_path / "flipped.pt"
    path.write_bytes(raw)
    load_checkpoint(path)
    with open(path, "r+b", buffering=0) as file:
        for place in sorted(places):
            file.seek(place)
            file.write(bytes([raw[place] ^ int(generator.integers(1, 256))]))
            with pytest.raises(CheckpointError, match=r"is damaged|does not end with the hash"):
                load_checkpoint(path)
            file.seek(place)
            file.write(raw[place : place + 1])
    load_checkpoint(path)


def test_every_truncation_is_found(good: Path, tmp_path: Path) -> None:
    raw = good.read_bytes()
    generator = np.random.default_rng(4)
    lengths = [*range(0, 130), *range(len(raw) - 130, len(raw)), *generator.integers(130, len(raw), 60).tolist()]
    path = tmp_path / "short.pt"
    for length in lengths:
        path.write_bytes(raw[:length])
        with pytest.raises(CheckpointError, match="truncated"):
            load_checkpoint(path)


def test_bytes_added_or_moved_are_found(good: Path, tmp_path: Path) -> None:
    raw = good.read_bytes()
    path = tmp_path / "changed.pt"
    for changed in (raw + b"\0", b"\0" + raw, raw[:1000] + b"\0" + raw[1000:], raw[64:128] + raw[:64] + raw[128:]):
        path.write_bytes(changed)
        with pytest.raises(CheckpointError):
            load_checkpoint(path)


def test_files_of_others_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "other.pt"
    torch.save(new_checkpoint(), path)
    for start, words in ((b"\x89PRIME\r\n", "is a packed file: .* unpack"), (b"GGUF", "is a GGUF file")):
        (tmp_path / "other").write_bytes(start + bytes(1000))
        with pytest.raises(CheckpointError, match=words):
            load_checkpoint(tmp_path / "other")
    with pytest.raises(CheckpointError, match="does not end with the hash of a PRIME checkpoint"):
        load_checkpoint(path)
    path.write_text("hello " * 100)
    with pytest.raises(CheckpointError, match="does not end with the hash"):
        load_checkpoint(path)
    with pytest.raises(CheckpointError, match="cannot read"):
        load_checkpoint(tmp_path / "absent.pt")
    with pytest.raises(CheckpointError, match="is a folder, expected a PRIME checkpoint"):
        load_checkpoint(tmp_path)


def test_a_changed_tensor_under_a_right_seal_is_named(tmp_path: Path) -> None:
    """Whoever recomputes the closing hash still meets the hash of each tensor."""
    checkpoint = new_checkpoint()
    save_checkpoint(checkpoint, tmp_path / "a.pt")
    one_bit = checkpoint["model"]["layer.up.grid.indices"].clone()
    one_bit[3, 4] ^= 1
    checkpoint["model"]["layer.up.grid.indices"] = one_bit
    loaded = load_checkpoint(sealed(checkpoint, tmp_path / "b.pt"))
    assert changed_tensors(loaded) == ["model/layer.up.grid.indices"]
    checkpoint["votes"]["embed.grid"]["votes"] = -checkpoint["votes"]["embed.grid"]["votes"]
    checkpoint["model"]["norm.bias"] = torch.zeros(3)
    del checkpoint["model"]["layer.up.bias"]
    loaded = load_checkpoint(sealed(checkpoint, tmp_path / "b.pt"))
    assert sorted(changed_tensors(loaded)) == [
        "model/layer.up.bias",
        "model/layer.up.grid.indices",
        "model/norm.bias",
        "votes/embed.grid/votes",
    ]


class RunsCode:
    """An object whose pickle makes a folder when it is loaded."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.marker),)


@pytest.mark.parametrize("place", ["whole", "train_state", "model"])
def test_a_pickle_that_would_run_code_does_not(place: str, tmp_path: Path) -> None:
    marker = tmp_path / "ran"
    checkpoint: Any = new_checkpoint()
    if place == "whole":
        checkpoint = RunsCode(marker)
    else:
        checkpoint[place]["x"] = RunsCode(marker)
    path = sealed(checkpoint, tmp_path / "evil.pt")
    check_file(path)
    for check_hash in (True, False):
        with pytest.raises(CheckpointError, match="refused: its pickle asks for more"):
            load_checkpoint(path, check_hash=check_hash)
    assert not marker.exists()
    torch.load(path, weights_only=False)
    assert marker.is_dir(), "the pickle is harmless: this test shows nothing"


@pytest.mark.parametrize(
    "stream",
    [
        b"",
        b"garbage",
        b"\x80\x02.",
        b"\x80\x02t.",
        b"\x80\x02]q",
        b"\x80\x02h\x05.",
        b"\x80\x02}]K\x01s.",
        b"\x80\x02K\x01Q.",
        b"\x80\x02K\x01)R.",
        b"\x80\x02X\x01\x00\x00\x00\xff.",
        b"\x80\x02X\xff\xff\xff\x7f",
        b"\x80\x09.",
    ],
)
def test_a_broken_pickle_under_a_right_seal_is_one_error(stream: bytes, tmp_path: Path) -> None:
    """Whatever a stranger's file holds, the caller has one exception to expect."""
    path = tmp_path / "broken.pt"
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in (("data.pkl", stream), ("version", b"3\n"), ("byteorder", b"little")):
            archive.writestr(f"broken/{name}", content)
    prime_checkpoint._seal(path)
    check_file(path)
    with pytest.raises(CheckpointError):
        load_checkpoint(path)


def test_an_archive_of_something_else_under_a_right_seal(tmp_path: Path) -> None:
    path = tmp_path / "other.pt"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("readme.txt", "hello")
    prime_checkpoint._seal(path)
    with pytest.raises(CheckpointError):
        load_checkpoint(path)


def test_only_an_archive_of_torch_is_sealed(tmp_path: Path) -> None:
    path = tmp_path / "plain.txt"
    path.write_bytes(b"x" * 500)
    with pytest.raises(CheckpointError, match="does not end as torch writes it"):
        prime_checkpoint._seal(path)


# -- contract ---------------------------------------------------------------------------------------------------------


def put(*keys: str) -> Callable[[dict[str, Any], Any], None]:
    def set_in(checkpoint: dict[str, Any], value: Any) -> None:
        for key in keys[:-1]:
            checkpoint = checkpoint[key]
        checkpoint[keys[-1]] = value

    return set_in


INDICES, SCALE = ("model", "embed.grid.indices"), ("model", "embed.grid.scale")
VOTES = ("votes", "embed.grid")
VIOLATIONS: list[tuple[tuple[str, ...], Any, str]] = [
    (("format",), "qwen", "format"),
    (("format",), None, "format"),
    (("version",), 1, "version 1, expected 2"),
    (("version",), 3, "version 3"),
    (("version",), "1", "version"),
    (("version",), None, "version"),
    (("stage",), "done", "stage 'done'"),
    (("stage",), 3, "stage"),
    (("hf_config",), [], "hf_config"),
    (("model",), [], "model"),
    (("votes",), None, "votes"),
    (("extra",), 1, "unknown keys.*extra"),
    (INDICES, torch.zeros(11, 6, dtype=torch.int32), "embed.grid.indices is torch.int32"),
    (INDICES, torch.zeros(66, dtype=torch.int16), "embed.grid.indices"),
    (INDICES, [1, 2], "embed.grid.indices is a list"),
    (SCALE, torch.ones(10), "no scale of 11 rows"),
    (SCALE, torch.ones(11, 1), "no scale of 11 rows"),
    (SCALE, torch.ones(11, dtype=torch.float64), "embed.grid.scale is torch.float64"),
    (SCALE, [1.0] * 11, "no scale"),
    (("model", "norm.weight"), torch.ones(6, dtype=torch.bfloat16), "norm.weight is torch.bfloat16"),
    (("model", "norm.weight"), 1.0, "norm.weight is a float"),
    (("model", "norm.weight"), torch.ones(6, 6).T[::2], "norm.weight is not a plain contiguous"),
    (("model", "norm.weight"), torch.ones(6).to_sparse(), "norm.weight is not a plain|_rebuild_sparse_tensor"),
    (("manifold", "name"), 3, "manifold"),
    (("manifold", "sha256"), None, "manifold"),
    (("manifold", "values"), torch.zeros(65_536, dtype=torch.float64), "manifold/values is torch.float64"),
    (("manifold", "values"), torch.zeros(2, 32_768), "manifold/values"),
    (("manifold", "values"), None, "manifold/values"),
    (("manifold", "vote_bits"), None, "manifold/vote_bits"),
    (("manifold", "vote_bits"), "0", "manifold/vote_bits"),
    (("manifold", "vote_bits"), True, "manifold/vote_bits"),
    (("manifold", "vote_bits"), 6, "votes/embed.grid has a buffer, the manifold 6 vote bits"),
    ((*VOTES, "votes"), torch.zeros(11, 6, dtype=torch.int32), "votes/embed.grid is torch.int32"),
    ((*VOTES, "votes"), torch.zeros(11, 6, dtype=torch.uint8), "votes/embed.grid is torch.uint8"),
    ((*VOTES, "votes"), torch.zeros(66, dtype=torch.int8), "votes/embed.grid is torch.int8"),
    ((*VOTES, "votes"), [0], "votes/embed.grid is a list"),
    ((*VOTES, "votes"), torch.zeros(11, 5, dtype=torch.int16), r"votes/embed.grid has shape \(11, 5\)"),
    ((*VOTES, "r1"), torch.zeros(11), "votes/embed.grid is not a vote state"),
    ((*VOTES, "g2"), torch.zeros(11, dtype=torch.int64), "g2"),
    ((*VOTES, "row_sketch"), torch.zeros(11), "row_sketch"),
    ((*VOTES, "row_sketch"), torch.zeros(12, dtype=torch.int64), "row_sketch"),
    ((*VOTES, "more"), torch.zeros(1), "votes/embed.grid is not a vote state"),
    (VOTES, torch.zeros(11, 6, dtype=torch.int16), "votes/embed.grid is not a vote state"),
    (("votes", "nowhere.grid"), "the same as embed.grid", "votes/nowhere.grid"),
    (("version",), True, "version"),
    (("manifold", "values"), torch.linspace(-1, 1, 5), "manifold/values"),
    ((*VOTES, "r2"), torch.zeros(11, dtype=torch.float64), "r2"),
    ((*VOTES, "r2"), torch.zeros(10), "r2"),
    ((*VOTES, "row_squares"), torch.zeros(11, dtype=torch.int32), "row_squares"),
    ((*VOTES, "row_squares"), torch.zeros(1, dtype=torch.int64), "row_squares"),
    ((*VOTES, "observations"), 3, "observations"),
    ((*VOTES, "observations"), torch.zeros(2, dtype=torch.int64), "observations"),
    (("probes", "embed.weight"), [1.0], "probes/embed.weight"),
    (("probes", "embed.weight"), torch.zeros(11, dtype=torch.float64), "probes/embed.weight"),
    (("model", "lone.grid.scale"), torch.ones(3), "lone.grid.scale"),
    (("tokenizer", "files"), {"vocab.json": "text"}, "tokenizer"),
]
"""What the contract does not allow: where, what, and words of the message."""


def violated(keys: tuple[str, ...], value: Any) -> dict[str, Any]:
    checkpoint = new_checkpoint()
    if value == "the same as embed.grid":
        value = copy.deepcopy(checkpoint["votes"]["embed.grid"])
    put(*keys)(checkpoint, value)
    return checkpoint


@pytest.mark.parametrize(
    ("keys", "value", "words"), VIOLATIONS, ids=lambda v: "/".join(v) if isinstance(v, tuple) else ""
)
def test_a_violation_is_named_on_loading_and_on_saving(
    keys: tuple[str, ...], value: Any, words: str, tmp_path: Path
) -> None:
    path = sealed(violated(keys, value), tmp_path / "bad.pt")
    with pytest.raises(CheckpointError, match=words):
        load_checkpoint(path)
    with pytest.raises(CheckpointError, match=words):
        save_checkpoint(violated(keys, value), tmp_path / "new.pt")
    assert os.listdir(tmp_path) == ["bad.pt"]


@pytest.mark.parametrize("key", list(new_checkpoint()))
def test_every_key_is_required(key: str) -> None:
    checkpoint = new_checkpoint()
    check_contract(checkpoint, "here")
    del checkpoint[key]
    with pytest.raises(CheckpointError, match=f"here has .*{key}"):
        check_contract(checkpoint, "here")


PARTS = [(name, part) for name in RULES for part in new_checkpoint(rule=rule_named(name))["votes"]["embed.grid"]]


@pytest.mark.parametrize(("name", "part"), PARTS, ids=lambda v: v)
def test_every_part_of_a_vote_state_is_required(name: str, part: str) -> None:
    checkpoint = new_checkpoint(rule=rule_named(name))
    check_contract(checkpoint, "here")
    del checkpoint["votes"]["embed.grid"][part]
    if part == "c2":
        # States of before columns were measured have none, and lack nothing else.
        check_contract(checkpoint, "here")
        del checkpoint["votes"]["embed.grid"]["g2"]
    with pytest.raises(CheckpointError, match=r"votes/embed\.grid (is not a vote state|has none)"):
        check_contract(checkpoint, "here")


@pytest.mark.parametrize("buffer", ["int8", "int16", None])
@pytest.mark.parametrize("name", RULES)
def test_the_votes_of_every_rule_survive(name: str, buffer: str | None, tmp_path: Path) -> None:
    """Whatever their type and wherever they are kept, and into a fresh grid of the same rule."""
    rule = rule_named(name, buffer=buffer)
    saved = new_checkpoint(rule=rule)
    save_checkpoint(saved, tmp_path / "a.pt")
    loaded = load_checkpoint(tmp_path / "a.pt")
    assert_same(loaded["votes"], saved["votes"])
    table = manifolds.build(loaded["manifold"]["name"])
    grid = GhostGrid(11, 6, table, Ballot(rule=rule))
    grid.indices.copy_(loaded["model"]["embed.grid.indices"])
    grid.load_vote_state(loaded["votes"]["embed.grid"])
    assert grid.votes.any()
    if rule.vote_bits:
        assert "votes" not in loaded["votes"]["embed.grid"]
        assert torch.equal(grid.votes, table.votes(saved["model"]["embed.grid.indices"]))
    else:
        wanted = {"int8": torch.int8, "int16": torch.int16}[rule.buffer]
        assert grid.votes.dtype == wanted and torch.equal(grid.votes, saved["votes"]["embed.grid"]["votes"])


@pytest.mark.parametrize("votes", [torch.zeros(11, 6, dtype=torch.int8), torch.zeros(11, 6, dtype=torch.int16)])
def test_a_buffer_beside_words_with_votes_is_refused(votes: torch.Tensor) -> None:
    """Two places for the same votes: one of them would be ignored."""
    checkpoint = new_checkpoint(rule=rule_named("compact"))
    checkpoint["votes"]["embed.grid"]["votes"] = votes
    with pytest.raises(CheckpointError, match=r"votes/embed\.grid has a buffer"):
        check_contract(checkpoint, "here")
    checkpoint = new_checkpoint(rule=rule_named("compact"))
    checkpoint["manifold"]["vote_bits"] = 0
    with pytest.raises(CheckpointError, match=r"votes/embed\.grid has none"):
        check_contract(checkpoint, "here")


@pytest.mark.parametrize("thing", [[1, 2], torch.zeros(3), None, "text"])
def test_something_that_is_no_dict(thing: Any, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="expected a dict"):
        load_checkpoint(sealed(thing, tmp_path / "a.pt"))


@pytest.mark.parametrize(
    "change",
    [{"model": {3: torch.ones(2)}}, {7: 1, "extra": 2}, {"votes": {3: {"votes": 1}}}],
    ids=["parameter", "keys", "votes"],
)
def test_names_that_are_no_strings_are_refused(change: dict[Any, Any], tmp_path: Path) -> None:
    with pytest.raises(CheckpointError):
        load_checkpoint(sealed(new_checkpoint() | change, tmp_path / "a.pt"))


def test_a_tensor_without_data_is_refused(tmp_path: Path) -> None:
    checkpoint = new_checkpoint()
    checkpoint["model"]["norm.weight"] = torch.ones(6, device="meta")
    with pytest.raises(CheckpointError, match="asks for more than tensors"):
        load_checkpoint(sealed(checkpoint, tmp_path / "a.pt"))
    with pytest.raises(CheckpointError, match=r"norm\.weight is not a plain"):
        check_contract(checkpoint, "here")


@pytest.mark.parametrize("value", [np.float64(2.5), np.zeros(2), Path("x"), len], ids=lambda v: type(v).__name__)
def test_what_could_not_be_loaded_again_is_not_saved(value: Any, tmp_path: Path) -> None:
    """The old checkpoint must not be replaced by one that nobody can read."""
    path = tmp_path / "a.pt"
    save_checkpoint(new_checkpoint(), path)
    changed = new_checkpoint(2)
    changed["train_state"]["best"] = value
    with pytest.raises(CheckpointError, match="train_state"):
        save_checkpoint(changed, path)
    assert_same(load_checkpoint(path)["model"], new_checkpoint()["model"])


# -- failed writes ----------------------------------------------------------------------------------------------------


@pytest.fixture
def old(tmp_path: Path) -> Path:
    """A checkpoint from an earlier save, in a folder of its own."""
    path = tmp_path / "run" / "a.pt"
    path.parent.mkdir()
    save_checkpoint(new_checkpoint(5), path)
    return path


def assert_untouched(old: Path, before: bytes) -> None:
    assert old.read_bytes() == before
    assert os.listdir(old.parent) == ["a.pt"]


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), RuntimeError("write failed")])
def test_a_disk_that_fills_up_midway(error: Exception, old: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = old.read_bytes()
    written = []

    def fails(thing: Any, file: Any) -> None:
        file.write(b"PK" + b"x" * 5000)
        file.flush()
        written.extend(os.listdir(old.parent))
        raise error

    monkeypatch.setattr(torch, "save", fails)
    with pytest.raises(CheckpointError, match=r"cannot write .*a\.pt: .*(No space left|write failed)"):
        save_checkpoint(new_checkpoint(6), old)
    assert len(written) == 2, "the temporary file was beside the old one"
    assert_untouched(old, before)


@pytest.mark.parametrize("buffer", [1 << 12, 1 << 20])
@pytest.mark.parametrize("limit", [0, 1000, 100_000])
def test_a_real_limit_on_the_files_size(limit: int, buffer: int, old: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel refuses to write on: torch's own writer is in the middle of the archive, or has ended it and the
    buffer is emptied."""
    monkeypatch.setattr(prime_checkpoint, "_WRITE_BUFFER", buffer)
    before = old.read_bytes()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
        with pytest.raises(CheckpointError, match="cannot write"):
            save_checkpoint(new_checkpoint(6), old)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert_untouched(old, before)
    save_checkpoint(new_checkpoint(6), old)
    assert_same(load_checkpoint(old)["model"], new_checkpoint(6)["model"])


def test_a_save_is_written_in_few_pieces_and_never_copied_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    writes: list[int] = []

    class Counting(io.FileIO):
        def write(self, data: Any) -> int:
            writes.append(len(data))
            return super().write(data)

    def counted_open(file: Any, mode: str, buffering: int = -1) -> Any:
        return io.BufferedWriter(Counting(file, "w"), buffering) if mode == "wb" else open(file, mode, buffering)

    monkeypatch.setattr(prime_checkpoint, "open", counted_open, raising=False)
    checkpoint = new_checkpoint()
    save_checkpoint(checkpoint, tmp_path / "a.pt")
    assert len(writes) == 1
    writes.clear()
    checkpoint["model"]["large"] = torch.zeros(1 << 23)
    tracemalloc.start()
    save_checkpoint(checkpoint, tmp_path / "a.pt")
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(writes) == 3 and max(writes) == 1 << 25
    assert peak < 1 << 24, "half of the largest tensor"
    assert_same(load_checkpoint(tmp_path / "a.pt")["model"], checkpoint["model"])


@pytest.mark.parametrize("function", ["fsync", "replace", "chmod"])
def test_a_failure_after_the_archive_is_written(function: str, old: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = old.read_bytes()

    def fails(*arguments: Any) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, function, fails)
    with pytest.raises(CheckpointError, match="Input/output error"):
        save_checkpoint(new_checkpoint(6), old)
    assert_untouched(old, before)


def test_an_interrupt_while_writing(old: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = old.read_bytes()

    def interrupted(thing: Any, file: Any) -> None:
        file.write(b"PK")
        raise KeyboardInterrupt

    monkeypatch.setattr(torch, "save", interrupted)
    with pytest.raises(KeyboardInterrupt):
        save_checkpoint(new_checkpoint(6), old)
    assert_untouched(old, before)


def test_places_that_cannot_be_written(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="cannot write"):
        save_checkpoint(new_checkpoint(), tmp_path / "absent" / "a.pt")
    (tmp_path / "folder.pt").mkdir()
    with pytest.raises(CheckpointError, match="cannot write"):
        save_checkpoint(new_checkpoint(), tmp_path / "folder.pt")
    assert os.listdir(tmp_path) == ["folder.pt"] and not os.listdir(tmp_path / "folder.pt")


# -- hashes and probes ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "tensor",
    [
        torch.arange(-500, 500, dtype=torch.int16).view(10, 100),
        torch.linspace(-3, 3, 77),
        torch.zeros(0),
        torch.zeros(0, 5, dtype=torch.int16),
        torch.tensor(3, dtype=torch.int64),
        torch.tensor(-2.5),
        torch.tensor([True, False, True]),
        torch.arange(24, dtype=torch.int16).view(4, 6).T,
        torch.arange(30, dtype=torch.float32)[::3],
    ],
    ids=lambda t: f"{t.dtype}{tuple(t.shape)}",
)
@pytest.mark.parametrize("chunk", [1 << 22, 7])
def test_tensor_sha256(tensor: torch.Tensor, chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prime_checkpoint, "_HASH_CHUNK", chunk)
    assert tensor_sha256(tensor) == hashlib.sha256(np.ascontiguousarray(tensor.numpy()).tobytes()).hexdigest()


def test_tensor_sha256_tells_bits_apart() -> None:
    assert tensor_sha256(torch.tensor([0.0])) != tensor_sha256(torch.tensor([-0.0]))
    brain = torch.randn(9, generator=torch.Generator().manual_seed(1)).bfloat16()
    assert tensor_sha256(brain) == tensor_sha256(brain.view(torch.int16)) != tensor_sha256(brain.float())
    parameter = torch.nn.Parameter(torch.ones(3))
    assert tensor_sha256(parameter) == tensor_sha256(torch.ones(3))


def test_walking_names_every_tensor_once() -> None:
    a, b, c = torch.zeros(1), torch.zeros(2), torch.zeros(3)
    tree = {"x": a, "y": {"z": b, "n": 3, "l": [c, {"m": a}], "t": (b,)}, "s": "text"}
    found = list(prime_checkpoint.walk_tensors(tree))
    assert [name for name, _ in found] == ["x", "y/z", "y/l/0", "y/l/1/m", "y/t/0"]
    assert [tensor for _, tensor in found] == [a, b, c, a, b]


def test_the_probe_vector_is_fixed() -> None:
    """Random signs, sizes of 0.5 to 1.5, from a hash: the same on every machine, and a prefix of any longer one."""
    vector = probe_vector(10_000)
    words = [
        int.from_bytes(hashlib.shake_256(b"qwen-prime probe").digest(40)[4 * i : 4 * i + 4], "little")
        for i in range(10)
    ]
    for word, value in zip(words, vector[:10].tolist(), strict=True):
        size = 0.5 + (word >> 1) / 2**31
        assert value == pytest.approx(size if word & 1 else -size, rel=1e-7)
    assert torch.equal(probe_vector(60), vector[:60]) and vector.dtype == torch.float32
    assert abs(float(vector.mean())) < 0.05 and float(vector.abs().min()) >= 0.5 and float(vector.abs().max()) <= 1.5
    assert len(set(vector.abs().tolist())) > 9_900


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_probe_of_a_matrix(dtype: torch.dtype) -> None:
    """Large enough for several parts."""
    matrix = torch.randn(37, 60, generator=torch.Generator().manual_seed(2)).to(dtype)
    exact = (matrix.double() * probe_vector(60).double()).sum(1)
    assert probe(matrix).dtype == torch.float32
    torch.testing.assert_close(probe(matrix).double(), exact, rtol=1e-6, atol=1e-7)
    tall = matrix.repeat(3000, 1)
    assert tall.numel() > 1 << 22
    torch.testing.assert_close(probe(tall), probe(matrix).repeat(3000), rtol=2e-7, atol=0)
    assert torch.equal(probe(matrix[3]), probe(matrix[3:4]))


def test_probe_sees_permuted_rows_and_columns_and_signs() -> None:
    generator = torch.Generator().manual_seed(3)
    matrix = torch.randn(20, 64, generator=generator)
    found = probe(matrix)
    rows, columns = torch.randperm(20, generator=generator), torch.randperm(64, generator=generator)
    torch.testing.assert_close(probe(matrix[rows]), found[rows], rtol=2e-7, atol=0)
    assert not torch.allclose(probe(matrix[rows]), found, rtol=1e-3)
    assert int(((probe(matrix[:, columns]) - found).abs() > 1e-3).sum()) == 20
    swapped = matrix.clone()
    swapped[[4, 5]] = swapped[[5, 4]]
    assert ((probe(swapped) - found).abs() > 1e-3).nonzero().flatten().tolist() == [4, 5]
    torch.testing.assert_close(probe(-matrix), -found, rtol=2e-7, atol=0)


def test_created_by_says_who() -> None:
    made = prime_checkpoint.created_by("importer")
    assert made["program"] == "importer" and made["torch"] == str(torch.__version__)
    assert all(type(value) is str for value in made.values())


def test_a_long_message_is_cut_at_a_word() -> None:
    assert one_line(ValueError("what\n is  wrong")) == "what is wrong" and one_line(KeyError()) == "KeyError"
    text = one_line(ValueError("word " * 200))
    assert len(text) <= 300 and text.endswith("word ...")
    assert one_line(ValueError("x" * 400)) == "x" * 296 + " ..."

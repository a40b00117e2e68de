"""A patch goes both ways exactly, fits its own base and no other, and is small where little moved."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from test_packed_checkpoint import trained
from test_prime_pack import rewrite_header
from tiny_models import import_source, plant, tiny_config, write_source

import prime_patch
from prime_checkpoint import CheckpointError, changed_tensors, check_file, load_checkpoint, save_checkpoint
from prime_pack import PackError
from prime_patch import PatchError, adapter_bytes, apply_patch, weights_digest, write_patch

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("patch")
    import_source(write_source(folder / "source", tiny_config()), folder / "base.pt")
    return folder / "base.pt", trained(folder / "base.pt", folder / "new.pt")


def make(pair: tuple[Path, Path], output: Path, **options: Any) -> Path:
    base, new = (load_checkpoint(path) for path in pair)
    write_patch(base, new, output, (check_file(pair[0]), check_file(pair[1])), **options)
    return output


@pytest.mark.parametrize("votes", [True, False])
def test_there_and_back_is_the_same_file(pair: tuple[Path, Path], tmp_path: Path, votes: bool) -> None:
    patch = make(pair, tmp_path / "p", votes=votes)
    new, recorded = apply_patch(load_checkpoint(pair[0]), patch)
    digest = save_checkpoint(new, tmp_path / "new.pt")
    assert (digest == recorded) is votes
    assert votes == ((tmp_path / "new.pt").read_bytes() == pair[1].read_bytes())
    real = load_checkpoint(pair[1])
    assert all(torch.equal(new["model"][n], t) for n, t in real["model"].items())
    assert not changed_tensors(load_checkpoint(tmp_path / "new.pt")) and bool(new["votes"]) is votes
    for patched in (tmp_path / "new.pt", pair[1]):
        base, recorded = apply_patch(load_checkpoint(patched), patch, revert=True)
        assert save_checkpoint(base, tmp_path / "base.pt") == recorded
        assert (tmp_path / "base.pt").read_bytes() == pair[0].read_bytes()


def test_other_bases_are_refused(pair: tuple[Path, Path], tmp_path: Path) -> None:
    patch = make(pair, tmp_path / "p")

    def one_bit(content: dict[str, Any]) -> None:
        content["model"]["model.layers.0.mlp.up_proj.grid.indices"][3, 5] ^= 1

    other = load_checkpoint(plant(pair[0], tmp_path / "other.pt", one_bit))
    for revert in (False, True):
        with pytest.raises(PatchError, match=r"does not belong to this checkpoint: its weights hash to \w+"):
            apply_patch(other, patch, revert=revert)
    with pytest.raises(PatchError, match="use --revert"):
        apply_patch(load_checkpoint(pair[1]), patch)
    with pytest.raises(PatchError, match="leave --revert out"):
        apply_patch(load_checkpoint(pair[0]), patch, revert=True)


@pytest.mark.parametrize("file", ["chat_template.jinja", "tokenizer.json"])
def test_a_base_with_another_tokenizer_is_refused(pair: tuple[Path, Path], tmp_path: Path, file: str) -> None:
    """The same weights from another import: what it says of texts would be taken over without a word."""

    def template(content: dict[str, Any]) -> None:
        content["tokenizer"]["files"][file] = torch.frombuffer(bytearray(b"{{ 1 }}"), dtype=torch.uint8)

    def bare(content: dict[str, Any]) -> None:
        del content["tokenizer"]["files"][file]

    with_file = [plant(path, tmp_path / path.name, template) for path in pair]
    patch = make((with_file[0], with_file[1]), tmp_path / "p")

    def other(content: dict[str, Any]) -> None:
        content["tokenizer"]["files"][file][3] = ord("2")

    changed = load_checkpoint(plant(with_file[0], tmp_path / "other.pt", other))
    assert weights_digest(changed) == weights_digest(load_checkpoint(pair[0]))
    with pytest.raises(PatchError, match=f"weights are those that it was made from, its {file} is another"):
        apply_patch(changed, patch)
    with pytest.raises(PatchError, match=f"has no {file}"):
        apply_patch(load_checkpoint(plant(with_file[0], tmp_path / "bare.pt", bare)), patch)
    for start, revert, wanted in ((with_file[0], False, with_file[1]), (with_file[1], True, with_file[0])):
        result, _ = apply_patch(load_checkpoint(start), patch, revert=revert)
        assert torch.equal(result["tokenizer"]["files"][file], load_checkpoint(wanted)["tokenizer"]["files"][file])


def test_a_second_import_of_the_same_source_is_the_same_base(
    pair: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    patch = make(pair, tmp_path / "p")
    # Two imports within a second are the same file; on a later day only the weights are the same.
    monkeypatch.setattr("prime_checkpoint.time.gmtime", lambda: time.struct_time((2030, 1, 2, 3, 4, 5, 2, 2, 0)))
    import_source(pair[0].parent / "source", tmp_path / "again.pt")
    assert check_file(tmp_path / "again.pt") != check_file(pair[0])
    new, _ = apply_patch(load_checkpoint(tmp_path / "again.pt"), patch)
    assert weights_digest(new) == weights_digest(load_checkpoint(pair[1]))


def test_models_that_differ_are_refused(pair: tuple[Path, Path], tmp_path: Path) -> None:
    import_source(write_source(tmp_path / "s", tiny_config(hidden_size=32)), tmp_path / "narrow.pt")
    import_source(pair[0].parent / "source", tmp_path / "linear.pt", manifold="linear")
    for path, message in ((tmp_path / "narrow.pt", "not of the same model"), (tmp_path / "linear.pt", "manifold")):
        with pytest.raises(PatchError, match=message):
            make((pair[0], path), tmp_path / "p")
    assert not (tmp_path / "p").exists()


def test_little_movement_is_a_small_patch(pair: tuple[Path, Path], tmp_path: Path) -> None:
    def nudge(content: dict[str, Any]) -> None:
        content["model"]["model.layers.0.mlp.up_proj.grid.indices"][0, :20] += 3

    small = make((pair[0], plant(pair[0], tmp_path / "n.pt", nudge)), tmp_path / "small")
    whole = make(pair, tmp_path / "whole")
    assert small.stat().st_size < 8192 < whole.stat().st_size < 0.7 * pair[0].stat().st_size


def test_damage_is_found(pair: tuple[Path, Path], tmp_path: Path) -> None:
    base = load_checkpoint(pair[0])
    patch = make(pair, tmp_path / "p")
    data = bytearray(patch.read_bytes())
    data[len(data) // 2] ^= 1
    (tmp_path / "q").write_bytes(data)
    with pytest.raises(PackError, match="is damaged"):
        apply_patch(base, tmp_path / "q")

    def lie(header: dict[str, Any]) -> dict[str, Any]:
        header["content"]["new"]["weights"] = "0" * 64
        return header

    rewrite_header(patch, lie)
    with pytest.raises(PatchError, match="not those that it was made for"):
        apply_patch(base, patch)
    sides = {"base": {"weights": weights_digest(base)}, "new": {"weights": "", "tree": 1}}
    for content in ({}, [], {"base": 1}, sides):
        rewrite_header(patch, lambda header, content=content: {**header, "content": content})
        with pytest.raises(CheckpointError):
            apply_patch(base, patch)
    with pytest.raises(PackError, match="not a packed file"):
        apply_patch(base, pair[0])


def test_moves_of_another_size_are_refused_before_they_are_decoded(pair: tuple[Path, Path], tmp_path: Path) -> None:
    name = "model.layers.0.mlp.up_proj.grid.indices"

    def larger(header: dict[str, Any]) -> dict[str, Any]:
        move = next(s for s in header["sections"] if s["name"] == f"moved/model/{name}")
        move["shape"] = [1 << 14, 1 << 15]
        return header

    def by_itself(header: dict[str, Any]) -> dict[str, Any]:
        header["content"]["new"]["tree"]["model"][name] = {"$tensor": f"moved/model/{name}"}
        return header

    base = load_checkpoint(pair[0])
    for number, (change, words) in enumerate(((larger, "does not fit its tensor"), (by_itself, "no tensor by itself"))):
        patch = rewrite_header(make(pair, tmp_path / str(number)), change)
        with pytest.raises(PatchError, match=words):
            apply_patch(base, patch)


@settings(max_examples=40, deadline=None)
@given(
    st.sampled_from(["int16", "float32"]).flatmap(
        lambda t: st.tuples(arrays.arrays(t, 20), arrays.arrays(t, 20)),
    )
)
def test_moves_undo_themselves(arrays_: tuple[Any, Any]) -> None:
    base, new = (torch.from_numpy(a) for a in arrays_)
    change = prime_patch._difference(base, new)
    assert prime_patch._same(prime_patch._moved(base, change, False), new)
    assert prime_patch._same(prime_patch._moved(new, change, True), base)


def test_size_of_an_adapter(pair: tuple[Path, Path]) -> None:
    hidden, inner, heads, kv = 48, 96, 48, 24
    layer = 2 * (hidden + heads) + 2 * (hidden + kv) + 3 * (hidden + inner)
    assert adapter_bytes(load_checkpoint(pair[0])) == 2 * 16 * 2 * layer

"""A packed checkpoint is the checkpoint: every stage, every manifold, tensor by tensor, with or without votes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from test_prime_pack import rewrite_header
from tiny_models import import_source, plant, tiny_config, write_source

import ghost_kernels as kernels
import manifolds
from entropy_coding import encode, zero_order_entropy
from packed_checkpoint import (
    _join_by_origin,
    _split_by_origin,
    bfloat16_origins,
    read_checkpoint,
    read_tensor,
    without_votes,
    write_checkpoint,
)
from prime_checkpoint import CheckpointError, changed_tensors, load_checkpoint, save_checkpoint, walk_tensors
from prime_pack import Pack, PackError, PackWriter
from qwen_prime_wrapper import load_model

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def imported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("packed")
    source = write_source(folder / "source", tiny_config())
    import_source(source, folder / "x.pt")
    return folder / "x.pt"


def trained(path: Path, output: Path) -> Path:
    """The checkpoint as if it had been trained: moved, with votes and an optimizer of all sorts of values."""

    def change(content: dict) -> None:
        generator = torch.Generator().manual_seed(1)
        content["stage"], content["probes"] = "train", {}
        for name, tensor in list(content["model"].items()):
            if tensor.dtype == torch.int16:
                rows = tensor.shape[0]
                tensor += torch.randint(-40, 41, tensor.shape, generator=generator).to(torch.int16)
                content["votes"][name.removesuffix(".indices")] = {
                    "votes": torch.randint(-60, 60, tensor.shape, generator=generator).to(torch.int8),
                    "r2": torch.rand(rows, generator=generator),
                    "g2": torch.rand(rows, generator=generator),
                    "c2": torch.rand(tensor.shape[1], generator=generator),
                    "row_squares": torch.zeros(rows, dtype=torch.int64),
                    "row_sketch": torch.zeros(rows, dtype=torch.int64),
                    "observations": torch.tensor(7),
                }
            else:
                tensor *= 1.01
        content["train_state"] = {
            "step": 7,
            "tokens": 99,
            "float_optimizer": {"state": {0: {"step": torch.tensor(7.0), "m": torch.rand(3)}}, "betas": (0.9, 0.99)},
            "best": float("inf"),
        }

    return plant(path, output, change)


def test_round_trip_is_the_same_file(imported: Path, tmp_path: Path) -> None:
    for number, path in enumerate((imported, trained(imported, tmp_path / "t.pt"))):
        packed, back = tmp_path / f"{number}.prime", tmp_path / f"{number}.pt"
        write_checkpoint(load_checkpoint(path), packed)
        save_checkpoint(read_checkpoint(packed), back)
        assert back.read_bytes() == path.read_bytes()
        assert packed.stat().st_size < path.stat().st_size


@pytest.mark.parametrize("manifold", manifolds.NAMES)
def test_every_manifold(imported: Path, tmp_path: Path, manifold: str) -> None:
    import_source(imported.parent / "source", tmp_path / "m.pt", manifold=manifold)
    checkpoint = load_checkpoint(tmp_path / "m.pt")
    write_checkpoint(checkpoint, tmp_path / "m.prime")
    back = read_checkpoint(tmp_path / "m.prime")
    assert back["sha256"] == checkpoint["sha256"] and not changed_tensors(back)


def test_a_manifold_that_cannot_be_built_travels(imported: Path, tmp_path: Path) -> None:
    def rename(content: dict) -> None:
        content["manifold"]["name"] = "their-own"

    path = plant(imported, tmp_path / "own.pt", rename)
    write_checkpoint(load_checkpoint(path), tmp_path / "own.prime")
    assert not changed_tensors(read_checkpoint(tmp_path / "own.prime"))


def test_tensors_one_by_one(imported: Path, tmp_path: Path) -> None:
    checkpoint = load_checkpoint(imported)
    write_checkpoint(checkpoint, tmp_path / "x.prime")
    pack = Pack(tmp_path / "x.prime")
    for path, tensor in walk_tensors(checkpoint):
        back = read_tensor(pack, path)
        assert back.dtype == tensor.dtype and torch.equal(back, tensor), path
    for wrong in ("model/none", "hf_config/x/y", "", "model/0"):
        with pytest.raises(PackError, match="has no tensor"):
            read_tensor(pack, wrong)


@pytest.mark.parametrize("spread", [1e-3, 0.02, 1.0])
def test_bfloat16_weights_are_found_again(spread: float) -> None:
    table = manifolds.build()
    weights = (torch.randn(64, 512, generator=torch.Generator().manual_seed(0)) * spread).to(torch.bfloat16)
    weights[5, 3], weights[6] = 0.0, 0.0
    scale = kernels.row_scales(weights, 1.25)
    indices = kernels.snap(weights.float(), scale, table)[0]
    known, origins = bfloat16_origins(indices, scale, table)
    assert bool(known.all())
    assert torch.equal(kernels.snap(origins.float(), scale, table)[0], indices)


def test_bfloat16_sources_pack_far_below_the_entropy_of_their_indices(tmp_path: Path) -> None:
    config = tiny_config(hidden_size=128, intermediate_size=256)
    source = write_source(tmp_path / "s", config)
    from safetensors.torch import load_file, save_file

    tensors = {n: t.to(torch.bfloat16) for n, t in load_file(source / "model.safetensors").items()}
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    import_source(source, tmp_path / "b.pt")
    checkpoint = load_checkpoint(tmp_path / "b.pt")
    sections = write_checkpoint(checkpoint, tmp_path / "b.prime")
    name = "model/model.layers.0.mlp.gate_proj.grid.indices"
    stored = sum(s.length for s in sections if s.name.startswith(name))
    indices = checkpoint["model"][name.removeprefix("model/")]
    # Of so small a tensor most of the entropy is that of its size; the usual coding is held against the same.
    assert stored < 0.82 * len(encode(indices.numpy())) and stored * 8 < 11.5 * indices.numel()
    assert zero_order_entropy(indices.numpy()) > 12.5
    assert not changed_tensors(read_checkpoint(tmp_path / "b.prime"))


def test_rows_that_moved_are_stored_as_they_are(imported: Path) -> None:
    table = manifolds.build()
    weights = torch.randn(32, 64, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    scale = kernels.row_scales(weights, 1.25)
    indices = kernels.snap(weights.float(), scale, table)[0]
    indices[3] += 11
    known, _ = bfloat16_origins(indices, scale, table)
    assert not known[3] and int(known.sum()) == 31


def test_without_votes(imported: Path, tmp_path: Path) -> None:
    full = load_checkpoint(trained(imported, tmp_path / "t.pt"))
    lean = without_votes(full)
    assert lean["votes"] == {} and lean["train_state"] == {"step": 7, "tokens": 99}
    assert all(torch.equal(lean["model"][n], t) for n, t in full["model"].items())
    save_checkpoint(lean, tmp_path / "lean.pt")
    assert not changed_tensors(load_checkpoint(tmp_path / "lean.pt"))


def test_models_load_from_packed_files_whatever_their_name(imported: Path, tmp_path: Path) -> None:
    write_checkpoint(load_checkpoint(imported), tmp_path / "x.pt")
    model, tokenizer, kind = load_model(tmp_path / "x.pt")
    reference, _, _ = load_model(imported)
    ids = torch.arange(60)[None]
    assert kind == "packed" and len(tokenizer) == 259
    assert torch.equal(model(input_ids=ids).logits, reference(input_ids=ids).logits)


@pytest.mark.parametrize("key", ["model", "manifold", "format", "tokenizer"])
def test_content_against_the_contract_is_refused(imported: Path, tmp_path: Path, key: str) -> None:
    from test_prime_pack import rewrite_header

    write_checkpoint(load_checkpoint(imported), tmp_path / "x.prime")
    for value in (None, 3, [], "x"):

        def change(header: dict, value: object = value) -> dict:
            header["content"][key] = value
            return header

        rewrite_header(tmp_path / "x.prime", change)
        with pytest.raises(CheckpointError):
            read_checkpoint(tmp_path / "x.prime")


@pytest.mark.parametrize("lie", [None, "rows", "columns", "type"])
def test_parts_of_another_size_are_refused_before_they_are_decoded(tmp_path: Path, lie: str | None) -> None:
    table = manifolds.build("prime-harmonic")
    weights = torch.randn(20, 24, generator=torch.Generator().manual_seed(3)).to(torch.bfloat16).float()
    scale = kernels.row_scales(weights, 1.25)
    indices = kernels.snap(weights, scale, table)[0]
    indices[3] += 1
    parts = _split_by_origin(indices, scale, table)
    assert parts is not None and len(parts[2]) > 0
    with PackWriter(tmp_path / "x", "checkpoint") as writer:
        for label, part in zip(("rows", "words", "rest"), parts, strict=True):
            writer.add(f"g:{label}", part)

    def change(header: dict) -> dict:
        words = next(s for s in header["sections"] if s["name"] == "g:words")
        out, width = words["shape"]
        words.update({"rows": {"shape": [out + 1, width]}, "columns": {"shape": [out, 1]}}.get(lie, {"dtype": "int64"}))
        return header

    if lie is None:
        assert torch.equal(_join_by_origin(Pack(tmp_path / "x"), "g", scale, table), indices)
        return
    pack = Pack(rewrite_header(tmp_path / "x", change))
    with pytest.raises(PackError, match="do not fit together"):
        _join_by_origin(pack, "g", scale, table)


def test_a_tensor_stands_once_in_a_tree(imported: Path, tmp_path: Path) -> None:
    """A file that names one tensor a thousand times would take the memory of a thousand."""
    write_checkpoint(load_checkpoint(imported), tmp_path / "x")

    def twice(header: dict) -> dict:
        header["content"]["train_state"]["again"] = header["content"]["model"]["model.norm.weight"]
        return header

    with pytest.raises(PackError, match=r"norm\.weight' stands in it twice"):
        read_checkpoint(rewrite_header(tmp_path / "x", twice))

"""A checkpoint in a packed file: without loss, or with its grids as low-bit codes.

Without loss, every tensor is a section and comes back bit for bit; three markers stand in the tree beside ``$tensor``:

    {"$manifold": name}     the table of the manifold of that name, built and not stored
    {"$origins": path}      a grid's indices by their bfloat16 origins (below), in sections path:rows, :words and :rest
    {"$grid": {...}}        both tensors of a grid from ``low_bit`` codes, in sections model/name:codes, :rows and
                            :columns; the tree then lies under ``checkpoint``, beside ``low_bit``, which says how the
                            codes were made

Origins are worth three bits a weight. Most source models are bfloat16, so the indices of a grid that was imported and
not trained follow from 16-bit floats with 11 bits of entropy, where the indices themselves have 14. For each index
the bfloat16 number that snaps to it is looked for, next to the dequantized weight; rows in which every index has one
store those numbers, exponent byte first, all other rows their indices. No flag says that the source was bfloat16 and
none is needed: what does not come back exactly is not stored so, and rows that training never touched keep their
origins.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import torch

import ghost_kernels as kernels
import manifolds
from ghost_grid import HEADROOM
from low_bit import LowBitGrid, Scales
from manifolds import Manifold
from prime_checkpoint import (
    CheckpointError,
    check_contract,
    check_file,
    load_checkpoint,
    one_line,
    probe,
    tensor_sha256,
    walk_tensors,
)
from prime_pack import Pack, PackError, PackWriter, Section, carrier, is_pack, plain, single, unplain

KIND = "checkpoint"
_SLICE = 1 << 22
"""Weights whose origins are looked for at a time."""
_TRIAL_ROWS = 64
"""Rows on which it is found out whether looking is worth it."""


def bfloat16_origins(
    indices: torch.Tensor, scale: torch.Tensor, manifold: Manifold
) -> tuple[torch.Tensor, torch.Tensor]:
    """The bfloat16 numbers that snap to given indices, where there are such.

    Args:
        indices: int16 ``(out, in)``.
        scale: float32 ``(out,)``.

    Returns:
        bool ``(out,)``: rows in which every index has an origin; and bfloat16 ``(out, in)``, of use in these rows.
    """
    origins = kernels.dequantize(indices, scale, manifold).to(torch.bfloat16)
    wrong = kernels.snap(origins.float(), scale, manifold)[0] != indices
    rows = torch.nonzero(wrong.any(1))[:, 0]
    for step in (1, -1):
        # Where bfloat16 is about as fine as the table the origin may be a neighbour of the rounded weight.
        words = origins[rows].view(torch.int16)
        other = (words + torch.where(wrong[rows], step, 0)).to(torch.int16).view(torch.bfloat16)
        finite = torch.where(torch.isfinite(other), other, origins[rows])
        snapped = kernels.snap(finite.float().contiguous(), scale[rows].contiguous(), manifold)[0]
        found = wrong[rows] & (snapped == indices[rows])
        origins[rows] = torch.where(found, finite, origins[rows])
        wrong[rows] &= ~found
    return ~wrong.any(1), origins


def _rotate(origins: torch.Tensor) -> torch.Tensor:
    """bfloat16 as uint16 with the sign moved to the end, so that the high byte is the exponent; same shape."""
    words = carrier(origins).view(np.uint16)
    return torch.from_numpy((words << 1) | (words >> 15)).view(origins.shape)


def _unrotate(turned: torch.Tensor) -> torch.Tensor:
    words = turned.numpy()
    return torch.from_numpy(((words >> 1) | (words << 15)).view(np.int16)).view(torch.bfloat16)


def _split_by_origin(
    indices: torch.Tensor, scale: torch.Tensor, manifold: Manifold
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None:
    """The three sections of a grid by origins: uint8 ``(out,)``, which rows have them; uint16 ``(n, in)``, the origins
    of these; int16 ``(out - n, in)``, the other rows' indices. None where too few rows have origins."""
    rows, columns = indices.shape
    if not indices.numel():
        return None
    trial = torch.linspace(0, rows - 1, min(rows, _TRIAL_ROWS)).long()
    known, _ = bfloat16_origins(indices[trial].contiguous(), scale[trial].contiguous(), manifold)
    if int(known.sum()) < len(trial) // 8 + 1:
        return None
    step = max(1, _SLICE // columns)
    masks, words, rest = [], [], []
    for start in range(0, rows, step):
        part = indices[start : start + step].contiguous()
        known, origins = bfloat16_origins(part, scale[start : start + step].contiguous(), manifold)
        masks.append(known)
        words.append(_rotate(origins[known]))
        rest.append(part[~known])
    return torch.cat(masks).to(torch.uint8), torch.cat(words), torch.cat(rest)


def _join_by_origin(pack: Pack, path: str, scale: torch.Tensor, manifold: Manifold) -> torch.Tensor:
    """The indices that :func:`_split_by_origin` took apart, int16 ``(out, in)``."""
    parts = [pack.section(f"{path}:{label}") for label in ("rows", "words", "rest")]
    shapes, types = [part.shape for part in parts], [part.dtype for part in parts]
    rows, count, columns = len(scale), *(shapes[1] if len(shapes[1]) == 2 else (0, 0))
    # Before anything is decoded: what is claimed must be of this grid.
    fits = shapes == [(rows,), (count, columns), (rows - count, columns)] and types == ["uint8", "uint16", "int16"]
    known = pack.tensor(f"{path}:rows").bool() if fits else None
    if known is None or int(known.sum()) != count:
        raise PackError(f"{pack.path} is damaged: the parts of {path} do not fit together")
    words, rest = pack.tensor(f"{path}:words"), pack.tensor(f"{path}:rest")
    indices = torch.empty(rows, columns, dtype=torch.int16)
    indices[~known] = rest
    places = torch.nonzero(known)[:, 0]
    step = max(1, _SLICE // max(1, columns))
    for start in range(0, count, step):
        here = places[start : start + step]
        origins = _unrotate(words[start : start + step])
        indices[here] = kernels.snap(origins.float(), scale[here], manifold)[0]
    return indices


def without_votes(checkpoint: dict[str, Any]) -> dict[str, Any]:
    """A checkpoint without votes and optimizer: the weights and where they come from, to hand on and not to resume.

    ``train_state`` keeps the step and the number of tokens.
    """
    kept = {key: value for key, value in checkpoint["train_state"].items() if key in ("step", "tokens", "vote_rule")}
    model = checkpoint["model"]
    bits = checkpoint["manifold"]["vote_bits"]
    if bits:
        half = 1 << bits >> 1
        model = {
            name: ((t.int() + half) >> bits << bits).to(torch.int16) if t.dtype == torch.int16 else t
            for name, t in model.items()
        }
    lean = {**checkpoint, "model": model, "votes": {}, "train_state": kept}
    lean["sha256"] = {}
    lean["sha256"] = {name: tensor_sha256(tensor) for name, tensor in walk_tensors(lean)}
    return lean


def write_low_bit(
    checkpoint: dict[str, Any], grids: dict[str, LowBitGrid], path: Path | str, notes: dict[str, Any]
) -> list[Section]:
    """Pack a checkpoint with its grids in low-bit codes, without votes; norms, biases and tokenizer without loss.

    Args:
        grids: by name, one for each grid of the checkpoint.
        notes: plain values on how the codes were made, kept under ``low_bit`` in the file's content.

    Returns:
        The sections, for a report of sizes.

    Raises:
        OutputError: the file cannot be written.
    """
    lean = without_votes(checkpoint)
    # The result is a new model: nothing of the source's rows or hashes holds for it.
    lean |= {"stage": "init", "probes": {}, "train_state": {}, "sha256": {}}
    floats = {name: tensor for name, tensor in lean["model"].items() if ".grid." not in name}
    with PackWriter(path, KIND) as writer:

        def place(name: str, tensor: torch.Tensor) -> dict[str, str]:
            if name == "manifold/values":
                return {"$manifold": lean["manifold"]["name"]}
            writer.add(name, tensor)
            return {"$tensor": name}

        content = plain({**lean, "model": floats}, "", place)
        for name, grid in grids.items():
            writer.add(f"model/{name}:codes", grid.stored())
            writer.add(f"model/{name}:rows", grid.scales.rows)
            writer.add(f"model/{name}:columns", grid.scales.columns)
            settings = {"name": name, "unit": grid.scales.unit, "table": grid.name, "top": grid.top}
            content["model"][name] = {"$grid": settings}
        writer.content = {"checkpoint": content, "low_bit": notes}
    return writer.sections


def built_manifold(record: dict[str, Any]) -> Manifold | None:
    """The manifold of a checkpoint's record, where it is one that this suite builds, else None."""
    if record["name"] in manifolds.NAMES:
        built = manifolds.build(record["name"])
        if built.sha256 == record["sha256"] and built.vote_bits == record["vote_bits"]:
            return built
    return None


def write_checkpoint(checkpoint: dict[str, Any], path: Path | str) -> list[Section]:
    """Pack a checkpoint without loss.

    Returns:
        The sections, for a report of sizes.

    Raises:
        OutputError: the file cannot be written.
    """
    manifold = built_manifold(checkpoint["manifold"])
    model = checkpoint["model"]
    with PackWriter(path, KIND) as writer:

        def place(name: str, tensor: torch.Tensor) -> dict[str, str]:
            if name == "manifold/values" and manifold is not None:
                return {"$manifold": manifold.name}
            if name.startswith("model/") and name.endswith(".grid.indices") and manifold is not None:
                scale = model[name.removeprefix("model/").removesuffix("indices") + "scale"]
                parts = _split_by_origin(tensor, scale, manifold)
                if parts is not None:
                    for label, part in zip(("rows", "words", "rest"), parts, strict=True):
                        writer.add(f"{name}:{label}", part)
                    return {"$origins": name}
            writer.add(name, tensor)
            return {"$tensor": name}

        writer.content = plain(checkpoint, "", place)
    return writer.sections


def low_bit_grid(pack: Pack, name: str) -> LowBitGrid:
    """One low-bit grid of a packed file, read alone.

    Raises:
        PackError: no such grid, or damaged.
    """
    try:
        settings = _content(pack)["model"][name]["$grid"]
        rows, columns = pack.tensor(f"model/{name}:rows"), pack.tensor(f"model/{name}:columns")
        scales = Scales(rows, columns, float(settings["unit"]))
        if pack.section(f"model/{name}:codes").count != math.prod(scales.shape):
            raise ValueError(f"its codes are not of {scales.shape[0]} rows of {scales.shape[1]} weights")
        codes = pack.tensor(f"model/{name}:codes")
        return LowBitGrid.restored(codes, scales, str(settings["table"]), int(settings["top"]))
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise PackError(f"{pack.path} is damaged: {name} is not a low-bit grid ({one_line(error)})") from error


def _content(pack: Pack) -> Any:
    """The tree of a packed checkpoint."""
    return pack.content["checkpoint"] if "low_bit" in pack.content else pack.content


def _grid_tensors(pack: Pack, name: str, manifold: Manifold) -> dict[str, torch.Tensor]:
    """Indices and scales of a low-bit grid: its weights, snapped as an import snaps them."""
    weights = low_bit_grid(pack, name).weights()
    scale = kernels.row_scales(weights, HEADROOM)
    return {"indices": kernels.snap(weights, scale, manifold)[0], "scale": scale}


def _completed(checkpoint: dict[str, Any]) -> dict[str, Any]:
    """A checkpoint whose grids came from low-bit codes, with the names, probes and hashes that go with them."""
    model, grids = checkpoint["model"], {n: t for n, t in checkpoint["model"].items() if isinstance(t, dict)}
    table = built_manifold(checkpoint["manifold"])
    assert table is not None, "the grids were snapped on it"
    for name, tensors in grids.items():
        del model[name]
        model[f"{name}.indices"], model[f"{name}.scale"] = tensors["indices"], tensors["scale"]
        weights = kernels.dequantize(tensors["indices"], tensors["scale"], table)
        checkpoint["probes"][f"{name.removesuffix('.grid')}.weight"] = probe(weights)
    for name, tensor in model.items():
        if ".grid." not in name:
            checkpoint["probes"][name] = probe(tensor)
    checkpoint["sha256"] = {path: tensor_sha256(tensor) for path, tensor in walk_tensors(checkpoint)}
    return checkpoint


def read_tensor(pack: Pack, path: str) -> torch.Tensor:
    """One tensor of a packed checkpoint by its path in the checkpoint (``model/x.grid.indices``), without the others.

    Raises:
        PackError: no such tensor, or damaged.
    """
    try:
        here: Any = _content(pack)
        for key in path.split("/"):
            here = here[int(key) if isinstance(here, list) else key]
    except (KeyError, ValueError, IndexError, TypeError) as error:
        raise PackError(f"{pack.path} has no tensor {path!r}") from error
    return unplain(here, _markers(pack))


def _markers(pack: Pack) -> dict[str, Any]:
    """What stands behind the markers of a packed checkpoint."""
    record = _content(pack)["manifold"]

    def manifold(name: str) -> Manifold:
        built = built_manifold({**record, "name": name})
        if built is None:
            raise PackError(f"{pack.path}: its manifold {name!r} is not the one that this suite builds")
        return built

    def origins(path: str) -> torch.Tensor:
        scale = pack.tensor(path.removesuffix("indices") + "scale")
        return _join_by_origin(pack, path, scale, manifold(record["name"]))

    return {
        "$tensor": pack.tensor,
        "$manifold": lambda name: manifold(name).values.clone(),
        "$origins": origins,
        "$grid": lambda settings: _grid_tensors(pack, settings["name"], manifold(record["name"])),
    }


def read_checkpoint(path: Path | str) -> dict[str, Any]:
    """The checkpoint of a packed file; of low-bit codes a checkpoint of stage init, whose weights they are.

    Raises:
        PackError: damaged, or a packed file of another kind.
        CheckpointError: what it holds breaks the contract of a checkpoint.
    """
    pack = Pack(path, KIND)
    try:
        checkpoint = unplain(_content(pack), single(_markers(pack), pack.path))
        if "low_bit" in pack.content:
            checkpoint = _completed(checkpoint)
    except CheckpointError:
        raise
    except (KeyError, TypeError, AttributeError, ValueError, RecursionError, RuntimeError) as error:
        raise PackError(f"{pack.path} is damaged: its content is not understood ({one_line(error)})") from error
    check_contract(checkpoint, str(pack.path))
    return checkpoint


def open_checkpoint(path: Path | str) -> dict[str, Any]:
    """The checkpoint of a ``.pt`` or packed file, told apart by content.

    Raises:
        CheckpointError: neither, or damaged.
    """
    return read_checkpoint(path) if is_pack(path) else load_checkpoint(path)


def sha256_of_file(path: Path | str) -> str:
    """The recorded hash of a checkpoint in a ``.pt`` or packed file, whose bytes have it.

    Raises:
        CheckpointError: neither, or damaged.
    """
    return Pack(path, KIND).sha256 if is_pack(path) else check_file(path)

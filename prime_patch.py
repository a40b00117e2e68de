"""A fine-tune as a patch: what moved against the base, entropy-coded, forwards and backwards.

Votes move indices by small steps, so a fine-tune is the difference of two index tensors, modulo 2^16 and exact. Floats
(norms, biases) are kept as the exclusive or of their bits, exact as well. Both are their own undoing: the same bytes
that make NEW of BASE make BASE of NEW. Everything else of the two checkpoints (config, tokenizer, probes, training
state) is small and is stored once per side, or not at all where both sides agree.

A packed file of kind ``patch``; its content:

    {"base": SIDE, "new": SIDE}     SIDE = {"weights": sha256, "file": sha256, "tree": ...}

``weights`` is :func:`weights_digest`, which a base must have; ``file`` the closing hash of the file that was
compared. In the trees stand, beside ``$tensor``, {"$same": path} (as the other side has it) and {"$moved": path} (the
other side's tensor and section ``moved/path``).

What both sides have alike is taken from the given checkpoint, so it is compared with the hash of what was diffed: a
base of the same weights and another tokenizer or chat template would pass them on unasked, and is refused.

Rejected: identity by file. A second import of the same source has other bytes (a time stamp) and the same weights,
and a patch should fit it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from packed_checkpoint import without_votes
from prime_checkpoint import check_contract, one_line, tensor_sha256, walk_tensors
from prime_pack import MOVES, Pack, PackError, PackWriter, Section, carrier, plain, single, unplain

KIND = "patch"


class PatchError(PackError):
    """A patch that does not fit what it is applied to."""


def weights_digest(checkpoint: dict[str, Any]) -> str:
    """SHA-256 (hex) of what a checkpoint computes: its config, its manifold and every tensor of its model."""
    parts = {
        "hf_config": checkpoint["hf_config"],
        "manifold": checkpoint["manifold"]["sha256"],
        "model": {name: tensor_sha256(tensor) for name, tensor in checkpoint["model"].items()},
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def adapter_bytes(checkpoint: dict[str, Any], rank: int = 16) -> int:
    """Size of a LoRA adapter of that rank on every linear of the decoder, in 16-bit floats: the usual way to hand a
    fine-tune over, for comparison."""
    total = 0
    for name, tensor in checkpoint["model"].items():
        if name.endswith("_proj.grid.indices"):
            total += 2 * rank * sum(tensor.shape)
    return total


def write_patch(
    base: dict[str, Any], new: dict[str, Any], path: Path | str, files: tuple[str, str], *, votes: bool = False
) -> list[Section]:
    """Write what makes ``new`` of ``base`` and the other way round.

    Args:
        files: closing hashes of the two files.
        votes: keep the vote buffers and the optimizer of ``new``, so that training can go on from the patched file.

    Returns:
        The sections, for a report of sizes.

    Raises:
        PatchError: the two are not of the same model.
        OutputError: the file cannot be written.
    """
    new = new if votes else without_votes(new)
    if base["manifold"]["sha256"] != new["manifold"]["sha256"]:
        raise PatchError(
            f"the base is on the manifold {base['manifold']['name']}, the new checkpoint on "
            f"{new['manifold']['name']}: a patch needs both on the same"
        )
    shapes = [{name: tuple(t.shape) for name, t in side["model"].items()} for side in (base, new)]
    if shapes[0] != shapes[1]:
        odd = sorted(set(shapes[0].items()) ^ set(shapes[1].items()))[0]
        raise PatchError(f"the two checkpoints are not of the same model: they differ in {odd[0]} {odd[1]}")
    sides = {"base": dict(walk_tensors(base)), "new": dict(walk_tensors(new))}
    equal = {name: _same(tensor, sides["new"][name]) for name, tensor in sides["base"].items() if name in sides["new"]}
    with PackWriter(path, KIND) as writer:

        def place(side: str, name: str, tensor: torch.Tensor) -> dict[str, str]:
            if equal.get(name):
                return {"$same": name}
            if name in equal and name.startswith("model/"):
                if side == "new":
                    writer.add(MOVES + name, _difference(sides["base"][name], tensor))
                return {"$moved": name}
            writer.add(f"{side}/{name}", tensor)
            return {"$tensor": f"{side}/{name}"}

        content = {}
        for side, checkpoint, file in (("base", base, files[0]), ("new", new, files[1])):
            tree = plain(checkpoint, "", partial(place, side))
            content[side] = {"weights": weights_digest(checkpoint), "file": file, "tree": tree}
        writer.content = content
    return writer.sections


def apply_patch(given: dict[str, Any], path: Path | str, *, revert: bool = False) -> tuple[dict[str, Any], str]:
    """The checkpoint at the other end of a patch.

    Args:
        given: the base, or with ``revert`` the patched checkpoint; not changed.

    Returns:
        The checkpoint, every tensor and value of it as it was when the patch was made, and the closing hash of its file
        then.

    Raises:
        PatchError: ``given`` is not what the patch was made from, in its weights or in anything else that the result
            takes from it; or the result is not what it was made for.
        PackError: the patch is damaged.
    """
    pack = Pack(path, KIND)
    start, end = ("new", "base") if revert else ("base", "new")
    try:
        expected = str(pack.content[start]["weights"])
        found = weights_digest(given)
        if found != expected:
            hint = ""
            if found == pack.content[end]["weights"]:
                hint = "; it is the other end of the patch: " + ("leave --revert out" if revert else "use --revert")
            raise PatchError(
                f"{path} does not belong to this checkpoint: its weights hash to {found[:16]}..., the patch was made "
                f"{'for' if revert else 'from'} {expected[:16]}...{hint}"
            )
        tensors = dict(walk_tensors(given))
        result = unplain(pack.content[end]["tree"], _markers(pack, tensors, revert))
        check_contract(result, str(path))
        _check_taken(result, tensors, path)
        if weights_digest(result) != pack.content[end]["weights"]:
            raise PatchError(f"{path} is damaged: the weights that it gives are not those that it was made for")
        return result, str(pack.content[end]["file"])
    except PackError:
        raise
    except (KeyError, TypeError, AttributeError, ValueError, RecursionError) as error:
        raise PackError(f"{path} is damaged: its content is not understood ({one_line(error)})") from error


def _check_taken(result: dict[str, Any], given: dict[str, torch.Tensor], path: Path | str) -> None:
    """Raise unless every tensor of the result has the hash that it had when the patch was made.

    Raises:
        PatchError: naming the first that has another.
    """
    for name, tensor in walk_tensors(result):
        if name.startswith("model/") or tensor_sha256(tensor) == result["sha256"].get(name):
            # The weights have a hash of their own.
            continue
        if given.get(name) is not tensor:
            raise PatchError(f"{path} is damaged: {name} is not what it was when the patch was made")
        file = name.removeprefix("tokenizer/files/")
        what = name if file == name else f"its {file}"
        raise PatchError(
            f"{path} does not belong to this checkpoint: the weights are those that it was made from, {what} is "
            "another; give the checkpoint that was compared, or make the patch anew with qwen_prime_pack.py diff"
        )


def _markers(pack: Pack, tensors: dict[str, torch.Tensor], revert: bool) -> dict[str, Callable[[Any], Any]]:
    def same(name: str) -> torch.Tensor:
        if name not in tensors:
            file = name.removeprefix("tokenizer/files/")
            raise PatchError(
                f"{pack.path} does not belong to this checkpoint: it has no {file}, which the one that the patch was "
                "made from has"
            )
        return tensors[name]

    def own(name: str) -> torch.Tensor:
        if name.startswith(MOVES):
            raise PatchError(f"{pack.path} is damaged: {name} is no tensor by itself")
        return pack.tensor(name)

    def moved(name: str) -> torch.Tensor:
        tensor, move = same(name), pack.section(MOVES + name)
        if move.shape != tuple(tensor.shape) or move.nbytes != tensor.nbytes:
            # Before it is decoded: of moves alone a file may claim any size.
            raise PatchError(f"a move of {move.dtype} {move.shape} does not fit its tensor")
        return _moved(tensor, pack.tensor(MOVES + name), revert)

    return {**single({"$tensor": own, "$moved": moved}, pack.path), "$same": same}


def _same(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether two tensors agree in type, shape and every bit: NaN is NaN here and -0 is not 0."""
    return one.dtype == other.dtype and one.shape == other.shape and np.array_equal(_bits(one), _bits(other))


def _bits(tensor: torch.Tensor) -> np.ndarray:
    """A tensor's elements as integers, flat."""
    values = carrier(tensor)
    return values.view(f"i{values.itemsize}") if values.dtype.kind == "f" else values


def _difference(base: torch.Tensor, new: torch.Tensor) -> torch.Tensor:
    """Moves of int16 indices, modulo 2^16; the exclusive or of the bits of floats, int32. Of the same shape."""
    one, other = _bits(base), _bits(new)
    return torch.from_numpy(other - one if base.dtype == torch.int16 else other ^ one).view(base.shape)


def _moved(given: torch.Tensor, difference: torch.Tensor, revert: bool) -> torch.Tensor:
    """``given`` and a :func:`_difference` put together, or with ``revert`` taken apart."""
    values, change = _bits(given), carrier(difference)
    if given.shape != difference.shape or values.dtype != change.dtype:
        raise PatchError(f"a move of {difference.dtype} {tuple(difference.shape)} does not fit its tensor")
    if given.dtype == torch.int16:
        return torch.from_numpy(values - change if revert else values + change).view(given.shape)
    return torch.from_numpy(values ^ change).view(given.dtype).view(given.shape)

"""Make a checkpoint small, and hand a fine-tune over as a patch.

    python qwen_prime_pack.py pack coder_prime_init.pt --output coder.prime
    python qwen_prime_pack.py pack coder_prime_init.pt --output coder4.prime --bits 4 --text book.txt
    python qwen_prime_pack.py unpack coder.prime --output coder.pt
    python qwen_prime_pack.py diff coder_prime_init.pt coder_prime_step_300.pt --output tune.patch
    python qwen_prime_pack.py patch coder_prime_init.pt tune.patch --output tuned.pt
    python qwen_prime_pack.py patch tuned.pt tune.patch --output coder.pt --revert

``pack`` without ``--bits`` is lossless: ``unpack`` gives the checkpoint back bit for bit. A packed file also runs as
it is: qwen_prime_eval.py and every other script that loads a model take it, by its content and not by its name. A
patch holds what a fine-tune moved, is applied and taken back exactly, and is refused on any other base.
"""

from __future__ import annotations

import json
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro

import prime_cli
from packed_checkpoint import read_checkpoint, without_votes, write_checkpoint
from prime_checkpoint import CheckpointError, check_file, load_checkpoint, save_checkpoint
from prime_pack import PackError, Section
from prime_patch import adapter_bytes, apply_patch, write_patch
from qwen_prime_wrapper import ModelError

log = logging.getLogger("pack")

ERRORS = (CheckpointError, ModelError, OSError)
"""Those whose message is meant for the user."""


@dataclass(frozen=True)
class PackConfig:
    """Pack a checkpoint: without loss, or with --bits into low-bit codes."""

    checkpoint: prime_cli.PositionalPath
    """PRIME .pt file."""
    output: Path
    """Packed file to write."""
    votes: bool = True
    """Keep vote buffers and optimizer, so that training can go on; --no-votes leaves them out."""
    json: Path | None = None
    """Also write the sizes as JSON."""
    force: bool = False
    """Replace the output file if it exists."""


@dataclass(frozen=True)
class UnpackConfig:
    """Give the checkpoint of a packed file back as a .pt file."""

    packed: prime_cli.PositionalPath
    """Packed file."""
    output: Path
    """PRIME .pt file to write."""
    force: bool = False
    """Replace the output file if it exists."""


@dataclass(frozen=True)
class DiffConfig:
    """Write a fine-tune as a patch against its base."""

    base: prime_cli.PositionalPath
    """PRIME .pt file that the fine-tune began from."""
    new: prime_cli.PositionalPath
    """PRIME .pt file of the fine-tune."""
    output: Path
    """Patch to write."""
    votes: bool = False
    """Keep the fine-tune's vote buffers and optimizer, so that training can go on from the patched file."""
    json: Path | None = None
    """Also write the sizes as JSON."""
    force: bool = False
    """Replace the output file if it exists."""


@dataclass(frozen=True)
class PatchConfig:
    """Apply a patch to its base, or with --revert take it back."""

    checkpoint: prime_cli.PositionalPath
    """PRIME .pt file: the base, or with --revert the patched checkpoint."""
    patch: prime_cli.PositionalPath
    """Patch from diff."""
    output: Path
    """PRIME .pt file to write."""
    revert: bool = False
    """Go back to the base."""
    force: bool = False
    """Replace the output file if it exists."""


PackScriptConfig = (
    Annotated[PackConfig, tyro.conf.subcommand("pack")]
    | Annotated[UnpackConfig, tyro.conf.subcommand("unpack")]
    | Annotated[DiffConfig, tyro.conf.subcommand("diff")]
    | Annotated[PatchConfig, tyro.conf.subcommand("patch")]
)


def _claim(output: Path, force: bool) -> None:
    """Refuse an output that exists or has no folder, before any work is done."""
    if output.exists() and not force:
        raise PackError(f"{output} exists: choose another name, or --force to replace it")
    if not output.parent.is_dir():
        raise PackError(f"no folder {output.parent} to write {output.name} into")


def _weights(checkpoint: dict[str, Any]) -> int:
    return sum(t.numel() for n, t in checkpoint["model"].items() if not n.endswith(".grid.scale"))


def _report(lines: dict[str, Any], path: Path | None) -> None:
    for name, value in lines.items():
        print(f"{name:28} {value:,}" if isinstance(value, int) else f"{name:28} {value}")
    if path is not None:
        path.write_text(json.dumps(lines, indent=2) + "\n", encoding="utf-8")


def _grid_bytes(sections: list[Section]) -> int:
    return sum(s.length for s in sections if ".grid." in s.name and not s.name.startswith("votes/"))


def pack(config: PackConfig) -> int:
    _claim(config.output, config.force)
    checkpoint = load_checkpoint(config.checkpoint)
    if not config.votes:
        checkpoint = without_votes(checkpoint)
        log.info("left out: vote buffers and optimizer; training cannot be resumed from this file")
    sections = write_checkpoint(checkpoint, config.output)
    weights = _weights(checkpoint)
    size = config.output.stat().st_size
    lines = {
        "checkpoint, bytes": config.checkpoint.stat().st_size,
        "packed, bytes": size,
        "weights": weights,
        "bits per weight, grids": round(8 * _grid_bytes(sections) / weights, 4),
        "bits per weight, file": round(8 * size / weights, 4),
    }
    _report(lines, config.json)
    return 0


def unpack(config: UnpackConfig) -> int:
    _claim(config.output, config.force)
    checkpoint = read_checkpoint(config.packed)
    save_checkpoint(checkpoint, config.output)
    print(f"{config.output}: {config.output.stat().st_size:,} bytes, stage {checkpoint['stage']}")
    return 0


def diff(config: DiffConfig) -> int:
    _claim(config.output, config.force)
    files = check_file(config.base), check_file(config.new)
    base, new = (load_checkpoint(path, check_hash=False) for path in (config.base, config.new))
    write_patch(base, new, config.output, files, votes=config.votes)
    lean = sum(t.nbytes for t in new["model"].values())
    size = config.output.stat().st_size
    lines = {
        "patch, bytes": size,
        "bits per weight": round(8 * size / _weights(new), 4),
        "new checkpoint, bytes": config.new.stat().st_size,
        "its model alone, bytes": lean,
        "patch / model": round(size / lean, 4),
        "LoRA adapter, r=16, bytes": adapter_bytes(new),
        "patch / adapter": round(size / adapter_bytes(new), 2),
    }
    _report(lines, config.json)
    if not config.votes and new["votes"]:
        log.info("left out: vote buffers and optimizer of the fine-tune; --votes keeps them")
    return 0


def patch(config: PatchConfig) -> int:
    _claim(config.output, config.force)
    given = load_checkpoint(config.checkpoint)
    result, recorded = apply_patch(given, config.patch, revert=config.revert)
    digest = save_checkpoint(result, config.output)
    same = "the same file, bit for bit" if digest == recorded else "the same content, in an archive of other bytes"
    print(f"{config.output}: {'base' if config.revert else 'fine-tune'} restored: {same}")
    return 0


def main(config: PackScriptConfig) -> int:
    if isinstance(config, PackConfig):
        return pack(config)
    if isinstance(config, UnpackConfig):
        return unpack(config)
    if isinstance(config, DiffConfig):
        return diff(config)
    return patch(config)


if __name__ == "__main__":
    raise SystemExit(prime_cli.run(PackScriptConfig, main, ERRORS))

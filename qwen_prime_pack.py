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
from itertools import islice
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro
from tqdm import tqdm

import prime_cli
from ghost_core import GhostError
from low_bit import GROUPS, LowBitError, LowBitGrid
from low_bit_calibration import measure, quantize, without_text
from low_bit_healing import heal, rounded_grids
from packed_checkpoint import read_checkpoint, without_votes, write_checkpoint, write_low_bit
from prime_checkpoint import CheckpointError, check_file, load_checkpoint, save_checkpoint
from prime_pack import PackError, Section
from prime_patch import adapter_bytes, apply_patch, write_patch
from qwen_prime_data import DataError, PackedBatches, encode_records, read_records
from qwen_prime_wrapper import ModelError, model_from_checkpoint, tokenizer_from_checkpoint
from vote_trainer import Recipe, TrainError

log = logging.getLogger("pack")

ERRORS = (CheckpointError, ModelError, LowBitError, DataError, GhostError, TrainError, OSError)
"""Those whose message is meant for the user."""


@dataclass(frozen=True)
class PackConfig:
    """Pack a checkpoint: without loss, or with --bits into low-bit codes."""

    checkpoint: prime_cli.PositionalPath
    """PRIME .pt file."""
    output: Path
    """Packed file to write."""
    votes: bool = True
    """Keep vote buffers and optimizer, so that training can go on; --no-votes leaves them out, --bits always does."""
    bits: float | None = None
    """Mean bits a weight in the file, scales, norms and embeddings included: 8, 6, 5, 4, 3 or anything between."""
    group: int = 0
    """Weights of a row that share a scale: 32, 64, 128, or 0 for the whole row."""
    table: Literal["linear", "compact", "prime-harmonic"] = "linear"
    """Table of values behind the codes; see low_bit.py."""
    data: Path | None = None
    """Records or text on which to find out how fine each weight must be, and on which to heal."""
    calibration_tokens: int = 65536
    """How much of it to read for that."""
    heal: int = 0
    """Steps of training by votes on the packed grid."""
    heal_lr: float | None = None
    """Learning rate of these steps; by default the trainer's."""
    seq_len: int = 512
    """Tokens in a row of --data."""
    grad_accum: int = 8
    """Rows in a step of --heal."""
    json: Path | None = None
    """Also write the sizes as JSON."""
    force: bool = False
    """Replace the output file if it exists."""

    def __post_init__(self) -> None:
        if self.bits is None and (self.data is not None or self.heal or self.group):
            raise ValueError("data, group and heal are for --bits; without it packing is lossless")
        if self.bits is not None and not 1.5 <= self.bits <= 9:
            raise ValueError(f"bits is {self.bits}, expected 1.5 to 9; without --bits packing is lossless")
        if self.group not in GROUPS:
            raise ValueError(f"group is {self.group}, expected one of {', '.join(map(str, GROUPS))}")
        if self.heal < 0 or self.calibration_tokens < 1 or self.seq_len < 2 or self.grad_accum < 1:
            raise ValueError("heal, calibration-tokens, seq-len and grad-accum are expected to be positive")
        if self.heal and self.data is None:
            raise ValueError("heal needs --data to learn from")


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


def low_bit_grids(
    checkpoint: dict[str, Any], config: PackConfig
) -> tuple[dict[str, LowBitGrid], dict[str, Any], dict[str, Any]]:
    """The grids of a checkpoint in codes of ``config.bits``, the checkpoint with the norms and biases that go with
    them, and notes on how they were made."""
    assert config.bits is not None
    model = model_from_checkpoint(checkpoint)
    floats = sum(t.nbytes for n, t in checkpoint["model"].items() if ".grid." not in n)
    budget = int(config.bits * _weights(checkpoint) / 8) - floats
    notes: dict[str, Any] = {"bits": config.bits, "group": config.group, "table": config.table, "heal": config.heal}
    if config.data is None:
        return quantize(model, without_text(model), budget, group=config.group, name=config.table), checkpoint, notes
    tokenizer = tokenizer_from_checkpoint(checkpoint)
    seq_len = min(config.seq_len, model.config.max_position_embeddings)
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    encoded = encode_records(read_records(config.data, split="train"), tokenizer, seq_len)
    batches = PackedBatches(encoded, seq_len=seq_len, batch_size=1, pad_id=pad, seed=0)
    rows = islice((b for b in batches if b.answer_tokens), -(-config.calibration_tokens // seq_len))
    grids = quantize(model, measure(model, rows), budget, group=config.group, name=config.table)
    if config.heal:
        recipe = Recipe(
            steps=config.heal,
            grad_accum=config.grad_accum,
            lr=config.heal_lr,
            warmup=max(1, config.heal // 10),
            gradient_checkpointing=False,
        )
        batches = PackedBatches(encoded, seq_len=seq_len, batch_size=1, pad_id=pad, seed=1)
        losses = list(tqdm(heal(model, grids, batches, recipe), total=config.heal, desc="heal", disable=None))
        log.info(f"healed by votes: loss {losses[0]:.4f} at the first step, {losses[-1]:.4f} at the last")
        grids = rounded_grids(model)
        learned = {name: p.detach() for name, p in model.named_parameters()}
        checkpoint = {**checkpoint, "model": {**checkpoint["model"], **learned}}
    return grids, checkpoint, notes


def pack(config: PackConfig) -> int:
    _claim(config.output, config.force)
    checkpoint = load_checkpoint(config.checkpoint)
    if config.bits is not None:
        grids, checkpoint, notes = low_bit_grids(checkpoint, config)
        return _report_pack(config, checkpoint, write_low_bit(checkpoint, grids, config.output, notes))
    if not config.votes:
        checkpoint = without_votes(checkpoint)
        log.info("left out: vote buffers and optimizer; training cannot be resumed from this file")
    return _report_pack(config, checkpoint, write_checkpoint(checkpoint, config.output))


def _report_pack(config: PackConfig, checkpoint: dict[str, Any], sections: list[Section]) -> int:
    weights = _weights(checkpoint)
    size = config.output.stat().st_size
    lines = {
        "checkpoint, bytes": config.checkpoint.stat().st_size,
        "packed, bytes": size,
        "weights": weights,
        "model, bytes": (stored := sum(s.length for s in sections if s.name.startswith("model/"))),
        "bits per weight, model": round(8 * stored / weights, 4),
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

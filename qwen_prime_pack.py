"""Hand a PRIME checkpoint over: small, as a patch, or in the formats of other tools.

    python qwen_prime_pack.py pack coder_prime_init.pt --output coder.prime
    python qwen_prime_pack.py pack coder_prime_init.pt --output coder4.prime --bits 4 --data records.jsonl --heal 200
    python qwen_prime_pack.py inspect coder4.prime
    python qwen_prime_pack.py unpack coder.prime --output coder.pt
    python qwen_prime_pack.py diff coder_prime_init.pt coder_prime_step_300.pt --output tune.patch
    python qwen_prime_pack.py patch coder_prime_init.pt tune.patch --output tuned.pt
    python qwen_prime_pack.py patch tuned.pt tune.patch --output coder.pt --revert
    python qwen_prime_pack.py export coder_prime_step_300.pt --to hf --output coder-hf
    python qwen_prime_pack.py sizes coder_prime_step_300.pt

``pack`` without ``--bits`` is lossless: ``unpack`` gives the checkpoint back bit for bit. A packed file also runs as
it is: every script that loads a model takes it, by its content and not by its name. A patch holds what a fine-tune
moved, is applied and taken back exactly, and is refused on any other base. Of the exports, ``hf`` is a dense folder
that needs none of our code, ``prime-hf`` keeps the 16-bit indices and opens in transformers with the plug-in of
``prime_hf.py``, to be trained further, and ``gguf`` is one file for llama.cpp and what builds on it.
"""

from __future__ import annotations

import json
import logging
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

import gguf_export
import hf_export
import prime_cli
import prime_hf
from ballots import RuleError
from dense_weights import ExportError, open_dense
from ghost_grid import GhostError
from low_bit import LowBitError
from low_bit_packing import LowBitSettings, low_bit_grids, weights_of
from packed_checkpoint import read_checkpoint, without_votes, write_checkpoint, write_low_bit
from prime_checkpoint import CheckpointError, check_file, load_checkpoint, save_checkpoint
from prime_pack import Pack, measure_section, summarize
from prime_patch import adapter_bytes, apply_patch, write_patch
from qwen_prime_wrapper import ModelError
from text_records import DataError
from training_recipe import TrainError
from whole_output import OutputError, refuse_existing, refuse_folder, write_whole

log = logging.getLogger("pack")

ERRORS = (CheckpointError, ModelError, ExportError, LowBitError, DataError, GhostError, RuleError, TrainError, OSError)
"""Those whose message is meant for the user."""


@dataclass(frozen=True)
class PackConfig(LowBitSettings):
    """Pack a checkpoint: without loss, or with --bits into low-bit codes."""

    checkpoint: prime_cli.PositionalPath
    """PRIME .pt file."""
    output: Path
    """Packed file to write."""
    votes: bool = True
    """Keep vote buffers and optimizer, so that training can go on; --no-votes leaves them out, --bits always does."""
    json: Path | None = None
    """Also write the sizes as JSON."""
    force: bool = False
    """Replace the output file, and that of --json, if they exist."""


@dataclass(frozen=True)
class InspectConfig:
    """Read a packed file or a patch whole and say what is in it, how well it is coded, and how fast it decodes."""

    packed: prime_cli.PositionalPath
    """Packed file or patch."""
    json: Path | None = None
    """Also write a line for each tensor as JSON."""
    force: bool = False
    """Replace the file of --json if it exists."""


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
    """Replace the output file, and that of --json, if they exist."""


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


@dataclass(frozen=True)
class ExportConfig:
    """Write a checkpoint in a format that other tools read."""

    checkpoint: prime_cli.PositionalPath
    """PRIME .pt file."""
    to: Literal["hf", "prime-hf", "gguf"]
    """Dense Hugging Face folder, folder of 16-bit indices, or GGUF file."""
    output: Path
    """Folder or, for gguf, file to write."""
    dtype: Literal["bfloat16", "float16", "float32"] | None = None
    """Type of a dense folder's tensors; by default bfloat16."""
    type: Literal["F16", "BF16", "Q8_0"] | None = None
    """Type of a GGUF file's matrices; by default F16. Norms and biases are F32 there."""
    shard_size: str = "5GB"
    """Largest weight file of a folder, in KB, MB or GB."""
    force: bool = False
    """Replace an existing output."""

    def __post_init__(self) -> None:
        if self.dtype is not None and self.to != "hf":
            raise ValueError(f"--dtype is for --to hf; a {self.to} export has its own types")
        if self.type is not None and self.to != "gguf":
            raise ValueError(f"--type is for --to gguf; for --to {self.to} leave it out")
        hf_export.parse_size(self.shard_size)


@dataclass(frozen=True)
class SizesConfig:
    """Say what each export of a checkpoint would weigh, without writing anything."""

    checkpoint: prime_cli.PositionalPath
    """PRIME .pt file."""


PackScriptConfig = (
    Annotated[PackConfig, tyro.conf.subcommand("pack")]
    | Annotated[InspectConfig, tyro.conf.subcommand("inspect")]
    | Annotated[UnpackConfig, tyro.conf.subcommand("unpack")]
    | Annotated[DiffConfig, tyro.conf.subcommand("diff")]
    | Annotated[PatchConfig, tyro.conf.subcommand("patch")]
    | Annotated[ExportConfig, tyro.conf.subcommand("export")]
    | Annotated[SizesConfig, tyro.conf.subcommand("sizes")]
)
"""One dataclass for each sub-command."""


def _refuse_report(path: Path | None, force: bool, *others: Path) -> None:
    """Raise unless the file of --json may be written; ``others`` are what the command reads and writes, which no
    --force gives up for it."""
    if path is None:
        return
    if path.resolve() in [other.resolve() for other in others]:
        raise OutputError(f"{path} is what the command reads or writes: choose another --json")
    refuse_existing(path, force, "--json")


def _report(lines: dict[str, Any], path: Path | None) -> None:
    for name, value in lines.items():
        print(f"{name:28} {value:,}" if isinstance(value, int) else f"{name:28} {value}")
    if path is not None:
        write_whole(path, (json.dumps(lines, indent=2) + "\n").encode())


def pack(config: PackConfig) -> int:
    """Write the packed file and say what it weighs."""
    refuse_existing(config.output, config.force)
    _refuse_report(config.json, config.force, config.checkpoint, config.output)
    checkpoint = load_checkpoint(config.checkpoint)
    if config.bits is not None:
        grids, checkpoint, notes = low_bit_grids(checkpoint, config)
        sections = write_low_bit(checkpoint, grids, config.output, notes)
    else:
        if not config.votes:
            checkpoint = without_votes(checkpoint)
            log.info("left out: vote buffers and optimizer; training cannot be resumed from this file")
        sections = write_checkpoint(checkpoint, config.output)
    weights = weights_of(checkpoint)
    size = config.output.stat().st_size
    stored = sum(s.length for s in sections if s.name.startswith("model/"))
    lines = {
        "checkpoint, bytes": config.checkpoint.stat().st_size,
        "packed, bytes": size,
        "weights": weights,
        "model, bytes": stored,
        "bits per weight, model": round(8 * stored / weights, 4),
        "bits per weight, file": round(8 * size / weights, 4),
    }
    _report(lines, config.json)
    return 0


def inspect(config: InspectConfig) -> int:
    """Decode and encode every tensor again, and print the largest and the totals."""
    _refuse_report(config.json, config.force, config.packed)
    packed = Pack(config.packed)
    measured = [measure_section(packed, name) for name in packed.sections]
    largest = sorted(measured, key=lambda line: -line["bytes"])[:12]
    print(f"{'tensor':52} {'elements':>12} {'bytes':>12} {'bits':>8} {'entropy':>8}")
    for line in largest:
        print(
            f"{line['name'][-52:]:52} {line['elements']:12,} {line['bytes']:12,} {line['bits']:8.4f} "
            f"{line['entropy']:8.4f}"
        )
    totals = summarize(measured)
    for name, value in totals.items():
        print(f"{name:52} {value}")
    if config.json is not None:
        report = {"kind": packed.kind, "sha256": packed.sha256, "totals": totals, "tensors": measured}
        write_whole(config.json, (json.dumps(report, indent=2) + "\n").encode())
    return 0


def unpack(config: UnpackConfig) -> int:
    """Write the checkpoint of a packed file."""
    refuse_existing(config.output, config.force)
    checkpoint = read_checkpoint(config.packed)
    save_checkpoint(checkpoint, config.output)
    print(f"{config.output}: {config.output.stat().st_size:,} bytes, stage {checkpoint['stage']}")
    return 0


def diff(config: DiffConfig) -> int:
    """Write the patch and say what it weighs beside the checkpoint and an adapter."""
    refuse_existing(config.output, config.force)
    _refuse_report(config.json, config.force, config.base, config.new, config.output)
    files = check_file(config.base), check_file(config.new)
    base, new = (load_checkpoint(path, check_hash=False) for path in (config.base, config.new))
    write_patch(base, new, config.output, files, votes=config.votes)
    lean = sum(t.nbytes for t in new["model"].values())
    size = config.output.stat().st_size
    lines = {
        "patch, bytes": size,
        "bits per weight": round(8 * size / weights_of(new), 4),
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
    """Write the checkpoint at the other end of a patch."""
    refuse_existing(config.output, config.force)
    given = load_checkpoint(config.checkpoint)
    result, recorded = apply_patch(given, config.patch, revert=config.revert)
    digest = save_checkpoint(result, config.output)
    same = "the same file, bit for bit"
    if digest != recorded:
        # Most patches leave votes and optimizer out, and another version of torch writes another archive.
        same = "every tensor as it was when the patch was made, by its hash; the file as a whole has another"
    print(f"{config.output}: {'base' if config.revert else 'fine-tune'} restored: {same}")
    return 0


def export(config: ExportConfig) -> int:
    """Write the export and say what was written."""
    if config.to == "gguf":
        refuse_existing(config.output, config.force)
    else:
        refuse_folder(config.output, config.force, hf_export.FOLDER_FILES)
    started = time.perf_counter()
    source = open_dense(config.checkpoint)
    size = hf_export.parse_size(config.shard_size)
    if config.to == "gguf":
        gguf_export.export_gguf(source, config.output, config.type or "F16", config.force)
        written = [config.output]
    else:
        if config.to == "hf":
            names = hf_export.export_hf(source, config.output, config.dtype or "bfloat16", size, config.force)
        else:
            names = prime_hf.export_prime_hf(source, config.output, size, config.force)
        written = [config.output / name for name in names]
    total = sum(file.stat().st_size for file in written)
    print(f"{config.output}: {total / 1e6:,.1f} MB in {len(written)} file(s), {time.perf_counter() - started:.1f} s")
    return 0


def sizes(config: SizesConfig) -> int:
    """Print a line for each format."""
    weights = open_dense(config.checkpoint).weights
    matrices = sum(w.words.numel() for w in weights if w.scale is not None)
    rows = sum(w.shape[0] for w in weights if w.scale is not None)
    others = sum(w.words.numel() for w in weights if w.scale is None)
    for name, size in (
        ("hf float32", 4 * (matrices + others)),
        ("hf bfloat16, float16", 2 * (matrices + others)),
        ("prime-hf", 2 * matrices + 4 * (rows + others)),
        ("gguf F16, BF16", 2 * matrices + 4 * others),
        ("gguf Q8_0", matrices * 34 // 32 + 4 * others),
        ("pack --bits 4", (matrices + others) // 2),
    ):
        print(f"{name:22}{size / 1e6:12,.1f} MB")
    return 0


def main(config: PackScriptConfig) -> int:
    match config:
        case PackConfig():
            return pack(config)
        case InspectConfig():
            return inspect(config)
        case UnpackConfig():
            return unpack(config)
        case DiffConfig():
            return diff(config)
        case PatchConfig():
            return patch(config)
        case ExportConfig():
            return export(config)
        case SizesConfig():
            return sizes(config)


if __name__ == "__main__":
    raise SystemExit(prime_cli.run(PackScriptConfig, main, ERRORS))

"""Convert a Qwen2 / Qwen3 folder or hub id into a PRIME checkpoint.

    python qwen_prime_importer.py --model Qwen/Qwen2.5-Coder-1.5B-Instruct --output coder_prime_init.pt

Each weight matrix is read alone, divided row by row by its scale (the row's largest magnitude times the headroom) and
snapped to the nearest manifold entry; norms and biases are kept in float32. All checks of the source that need no
weights (architecture, tensor names and shapes, tokenizer, free disk) come before the first weight is read, and the
output appears only when it is whole. Works on the CPU with the indices and one tensor in memory.
"""

from __future__ import annotations

import hashlib
import json
import logging
import resource
import shutil
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError, safe_open
from tqdm import tqdm

import manifolds
import prime_cli
from ghost_grid import HEADROOM, GhostGrid
from ghost_kernels import SnapReport
from prime_checkpoint import FORMAT, VERSION, CheckpointError, created_by, one_line, probe, save_checkpoint
from prime_device import device_of
from qwen_prime_wrapper import (
    ModelError,
    build_model,
    count_parameters,
    expected_tensors,
    load_tokenizer,
    locate_source,
    manifold_record,
    pack_tokenizer,
    parse_generation,
    source_name,
)
from vote_units import KernelError

log = logging.getLogger("importer")

_FLOATS = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


class ImportProblem(ModelError):
    """A source that cannot be converted, or an output that cannot be written."""


@dataclass(frozen=True)
class ImportConfig:
    """Convert a Qwen2 / Qwen3 folder or hub id into a PRIME checkpoint."""

    model: str
    """Folder with config.json, safetensors and tokenizer, or a hub id such as Qwen/Qwen2.5-Coder-1.5B-Instruct."""
    output: Path
    """The checkpoint to write, by convention NAME_prime_init.pt."""
    manifold: Literal["prime-harmonic", "linear", "compact"] = "prime-harmonic"
    """The table of weight values; "compact" leaves room for the votes in the same two bytes (--vote-rule compact)."""
    device: str = "cpu"
    """Where to snap; the CPU takes well under two minutes for 1.5 B weights."""
    report: Path | None = None
    """Also write what the conversion lost, tensor by tensor, as JSON."""
    headroom: float = HEADROOM
    """How far a row's largest weight may still grow before it saturates."""
    revision: str | None = None
    """Revision of a hub id."""
    force: bool = False
    """Replace an existing output."""

    def __post_init__(self) -> None:
        if not 1.0 <= self.headroom <= 16.0:
            raise ValueError(f"headroom is {self.headroom}, expected 1 to 16")


@dataclass(frozen=True)
class Source:
    """A local model folder: its config and, for each tensor, the file, shape and dtype."""

    folder: Path
    id: str
    revision: str | None
    hf_config: dict[str, Any]
    tensors: dict[str, tuple[Path, tuple[int, ...]]]

    def read(self, name: str) -> torch.Tensor:
        """One tensor. The file is opened for this tensor alone, so that its mapped pages are released with it."""
        file = self.tensors[name][0]
        try:
            with safe_open(file, framework="pt") as handle:
                tensor = handle.get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise ImportProblem(f"cannot read {name} from {file}: {error}") from error
        if tensor.dtype not in _FLOATS:
            raise ImportProblem(f"{name} in {file} is {tensor.dtype}, expected bfloat16, float16, float32 or float64")
        return tensor


def find_weights(folder: Path) -> tuple[list[Path], dict[str, str]]:
    """The safetensors of a model folder, chosen as transformers does, and the index's file name for each tensor.

    That is model.safetensors where it is there (an index beside it is of an older save), else what the index names;
    without either all of them, and nothing is said of tensors.

    Raises:
        ImportProblem: no safetensors, or an index that cannot be read or names what is not there.
    """
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if single.is_file():
        return [single], {}
    mapped: dict[str, str] = {}
    if index.is_file():
        try:
            mapped = dict(json.loads(index.read_text(encoding="utf-8"))["weight_map"].items())
            names = sorted(set(mapped.values()))
            files = [folder / name for name in names]
        except (ValueError, KeyError, AttributeError, TypeError, RecursionError) as error:
            raise ImportProblem(f"cannot read {index}: {one_line(error)}") from error
        for name, file in zip(names, files, strict=True):
            if Path(name).name != name:
                raise ImportProblem(f"{index} names the file {name!r}, expected one beside it")
            if not file.is_file():
                raise ImportProblem(f"{index.name} names {file.name}, which is not in {folder}: download it again")
    else:
        files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise ImportProblem(
            f"{folder} has no safetensors: convert other formats with transformers' save_pretrained first"
        )
    return files, mapped


def open_source(model: str, revision: str | None = None) -> Source:
    """Read a source's config and the index of its tensors; no weights yet.

    Raises:
        ImportProblem: missing or unreadable files.
    """
    folder, found_revision = locate_source(model, revision)
    try:
        hf_config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ImportProblem(f"{folder} has no config.json: expected a Hugging Face model folder") from error
    except (OSError, ValueError, RecursionError) as error:
        raise ImportProblem(f"cannot read {folder / 'config.json'}: {error}") from error
    files, mapped = find_weights(folder)
    tensors: dict[str, tuple[Path, tuple[int, ...]]] = {}
    for file in files:
        try:
            with safe_open(file, framework="pt") as handle:
                shapes = {name: tuple(handle.get_slice(name).get_shape()) for name in handle.keys()}  # noqa: SIM118
        except (SafetensorError, OSError) as error:
            raise ImportProblem(f"cannot read {file}: {error}") from error
        for name, shape in shapes.items():
            if mapped.get(name, file.name) != file.name:
                raise ImportProblem(
                    f"{name} is in {file.name} of {folder}, the index names {mapped[name]}: download both again"
                )
            if name in tensors:
                raise ImportProblem(
                    f"{name} is in {tensors[name][0].name} and in {file.name} of {folder}, expected once: move away "
                    "what is not this model's"
                )
            tensors[name] = (file, shape)
    return Source(folder, model, found_revision, hf_config, tensors)


def check_tensors(source: Source, wanted: dict[str, tuple[int, ...]], tied: bool) -> None:
    """The source's tensors are those of its config, no fewer, no more, in their shapes.

    A tied model may carry its head a second time if it equals the embedding; stored rotary frequencies are ignored.

    Raises:
        ImportProblem: naming the tensor.
    """
    for name, shape in wanted.items():
        if name not in source.tensors:
            raise ImportProblem(f"{source.folder} lacks tensor {name} {shape} that its config.json asks for")
        if source.tensors[name][1] != shape:
            raise ImportProblem(f"{name} has shape {source.tensors[name][1]}, config.json asks for {shape}")
    extra = {n for n in source.tensors if n not in wanted and not n.endswith("rotary_emb.inv_freq")}
    if tied and "lm_head.weight" in extra:
        extra.remove("lm_head.weight")
        if not torch.equal(source.read("lm_head.weight"), source.read("model.embed_tokens.weight")):
            raise ImportProblem(
                "config.json ties head and embedding, but lm_head.weight differs from model.embed_tokens.weight: "
                "set tie_word_embeddings to false if the head is meant"
            )
    if extra:
        more = f" and {len(extra) - 3} more" if len(extra) > 3 else ""
        raise ImportProblem(f"{source.folder} has tensors its config.json does not know: {sorted(extra)[:3]}{more}")


def check_output(output: Path, force: bool, bytes_needed: int) -> None:
    """The output may be written and fits on its disk.

    Raises:
        ImportProblem: it exists, its folder does not, or the disk is too full.
    """
    if output.is_dir():
        raise ImportProblem(f"{output} is a folder, expected a file name such as NAME_prime_init.pt")
    if output.exists() and not force:
        raise ImportProblem(f"{output} exists; add --force to replace it")
    if not output.parent.is_dir():
        raise ImportProblem(f"no such folder: {output.parent}, where --output is to be written; make it first")
    free = shutil.disk_usage(output.parent).free
    if free < bytes_needed:
        raise ImportProblem(
            f"the disk of {output} has {free / 1e9:.2f} GB free, the checkpoint needs {bytes_needed / 1e9:.2f} GB"
        )


def worst_row(grid: GhostGrid, weights: torch.Tensor) -> dict[str, float | int]:
    """The row that costs a tensor most of its SNR: its number, its own SNR, and its largest weight over its RMS."""
    worst: dict[str, float | int] = {"row": -1, "snr_db": float("inf"), "peak_to_rms": 0.0}
    for rows in grid.slices():
        dense = weights[rows].double()
        noise = (dense - grid.dequantize(rows).double()).square().sum(1)
        signal = dense.square().sum(1)
        snr = 10 * torch.log10(signal / noise.clamp(min=1e-300))
        snr[noise == 0] = float("inf")
        at = int(snr.argmin())
        if snr[at] < worst["snr_db"]:
            rms = (signal[at] / dense.shape[1]).sqrt()
            worst = {
                "row": rows.start + at,
                "snr_db": round(float(snr[at]), 2),
                "peak_to_rms": round(float(dense[at].abs().max() / rms), 1),
            }
    return worst


def tensor_report(shape: tuple[int, ...], snap: SnapReport) -> dict[str, Any]:
    """A tensor's line in the report."""
    return {
        "shape": list(shape),
        # JSON has no infinity: null stands for a tensor that lost nothing.
        "snr_db": None if snap.noise == 0 else round(snap.snr_db, 3),
        "saturated": snap.saturated / snap.elements,
        "zeros": snap.zeros / snap.elements,
    }


def convert(source: Source, config: ImportConfig) -> tuple[dict[str, Any], dict[str, Any]]:
    """The checkpoint of a source and the report of its conversion.

    Raises:
        ImportProblem: a tensor is missing, extra, or not finite.
    """
    manifold = manifolds.build(config.manifold)
    model = build_model(source.hf_config, manifold, f"{source.folder / 'config.json'}")
    expected = expected_tensors(model)
    wanted = {source_name(n): shape for n, (shape, _) in expected.items() if not n.endswith(".grid.scale")}
    tied = bool(getattr(model.config, "tie_word_embeddings", False))
    check_tensors(source, wanted, tied)
    tokenizer = load_tokenizer(source.folder)
    companions = pack_tokenizer(source.folder)
    if (generation := companions.get("generation_config.json")) is not None:
        parse_generation(generation.numpy().tobytes(), f"{source.folder}:")
    if tokenizer.chat_template is None:
        log.warning("the tokenizer has no chat template: this model can learn texts, but no conversations")
    if len(tokenizer) > model.config.vocab_size:
        raise ImportProblem(
            f"the tokenizer has {len(tokenizer)} entries, the model's vocabulary {model.config.vocab_size}"
        )
    weights_total = sum(g[0][0] * g[0][1] for n, g in expected.items() if n.endswith(".indices"))
    check_output(config.output, config.force, 2 * weights_total + (1 << 24))

    tensors: dict[str, torch.Tensor] = {}
    probes: dict[str, torch.Tensor] = {}
    lines: dict[str, dict[str, Any]] = {}
    with tqdm(total=weights_total, unit="weight", unit_scale=True, desc="import", disable=None) as bar:
        for name, (shape, _) in expected.items():
            if name.endswith(".grid.scale"):
                continue
            origin = source_name(name)
            dense = source.read(origin)
            probes[origin] = probe(dense)
            if not bool(torch.isfinite(probes[origin]).all()) and not bool(torch.isfinite(dense.float()).all()):
                raise ImportProblem(f"{origin} has NaN or Inf weights; a conversion needs finite ones")
            if not name.endswith(".grid.indices"):
                tensors[name] = dense.float().clone()
                continue
            rows, columns = shape
            grid = GhostGrid(rows, columns, manifold)
            try:
                snap = grid.to(config.device).import_weights(dense.to(config.device), config.headroom)
            except KernelError as error:
                raise ImportProblem(f"{origin}: {error}") from error
            line = tensor_report(shape, snap)
            if line["snr_db"] is not None and line["snr_db"] < manifold.snr_limit_db:
                line["worst_row"] = worst_row(grid, dense)
                log.info("%s: SNR %.1f dB, because of %s", origin, line["snr_db"], line["worst_row"])
            lines[origin] = line
            tensors[name] = grid.indices.cpu()
            tensors[name.removesuffix("indices") + "scale"] = grid.scale.cpu()
            bar.update(rows * columns)
            del dense
    checkpoint = {
        "format": FORMAT,
        "version": VERSION,
        "stage": "init",
        "hf_config": source.hf_config,
        "tokenizer": {"source": source.id, "files": companions},
        "manifold": manifold_record(manifold),
        "model": tensors,
        "probes": probes,
        "votes": {},
        "train_state": {},
        "source": {"id": source.id, "revision": source.revision, "files": file_hashes(source)},
        "created_by": created_by("qwen_prime_importer.py"),
    }
    report = {"parameters": count_parameters(model), "tensors": len(wanted), "per_tensor": lines}
    return checkpoint, report


def file_hashes(source: Source) -> dict[str, str]:
    """SHA-256 of the config and of every weight file of the source."""
    files = sorted({file for file, _ in source.tensors.values()} | {source.folder / "config.json"})
    hashes = {}
    for file in files:
        digest = hashlib.sha256()
        with open(file, "rb") as handle:
            while chunk := handle.read(1 << 22):
                digest.update(chunk)
        hashes[file.name] = digest.hexdigest()
    return hashes


def check_request(config: ImportConfig) -> None:
    """What can be refused before the source is looked at: nobody should wait for a conversion that cannot end well.

    Raises:
        ImportProblem: output, report or device.
    """
    check_output(config.output, config.force, 0)
    if config.report and (config.report.is_dir() or not config.report.parent.is_dir()):
        raise ImportProblem(f"cannot write the report {config.report}: it is a folder, or in none")
    try:
        torch.empty(0, device=device_of(config.device))
    except (RuntimeError, AssertionError) as error:
        # A torch without CUDA says so by AssertionError.
        raise ImportProblem(f"device {config.device} is not usable here: {one_line(error)}") from error


def main(config: ImportConfig) -> int:
    started = time.perf_counter()
    check_request(config)
    source = open_source(config.model, config.revision)
    checkpoint, report = convert(source, config)
    log.info("writing %s", config.output)
    digest = save_checkpoint(checkpoint, config.output)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    snr = [line["snr_db"] for line in report["per_tensor"].values() if line["snr_db"] is not None]
    summary = {
        "output": str(config.output),
        "sha256": digest,
        "source": checkpoint["source"],
        "manifold": {"name": config.manifold, "sha256": checkpoint["manifold"]["sha256"]},
        "headroom": config.headroom,
        "seconds": round(time.perf_counter() - started, 2),
        "peak_rss_bytes": peak,
        "lowest_snr_db": min(snr, default=None),
        **report,
    }
    if config.report:
        config.report.write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
    lowest = f"{min(snr):.1f} dB" if snr else "lossless"
    log.info(
        "%s: %s parameters in %s tensors, lowest SNR %s, %.1f s, peak memory %.2f GB",
        config.output,
        f"{report['parameters']:,}",
        report["tensors"],
        lowest,
        summary["seconds"],
        peak / 1e9,
    )
    return 0


if __name__ == "__main__":
    raise SystemExit(prime_cli.run(ImportConfig, main, (ImportProblem, ModelError, CheckpointError)))

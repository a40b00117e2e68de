"""Hand a PRIME checkpoint over to other tools.

    python qwen_prime_pack.py export coder_prime_step_300.pt --to hf --output coder-hf
    python qwen_prime_pack.py export coder_prime_step_300.pt --to prime-hf --output coder-prime-hf
    python qwen_prime_pack.py export coder_prime_step_300.pt --to gguf --type Q8_0 --output coder.gguf

``hf`` is a dense folder that needs none of our code; ``prime-hf`` keeps the 16-bit indices and opens in transformers
with the plug-in of ``prime_hf.py``, to be trained further; ``gguf`` is one file for llama.cpp and what builds on it.
"""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

import gguf_export
import hf_export
import prime_cli
import prime_hf
from dense_weights import ExportError, open_dense
from prime_checkpoint import CheckpointError
from qwen_prime_wrapper import ModelError
from whole_output import OutputError, refuse_existing

log = logging.getLogger("pack")


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


def export(config: ExportConfig) -> int:
    """Write the export and say what was written."""
    refuse_existing(config.output, config.force)
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


@dataclass(frozen=True)
class SizesConfig:
    """Say what each export of a checkpoint would weigh, without writing anything."""

    checkpoint: prime_cli.PositionalPath
    """PRIME .pt file."""


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
    ):
        print(f"{name:22}{size / 1e6:12,.1f} MB")
    return 0


PackConfig = (
    Annotated[ExportConfig, tyro.conf.subcommand("export")] | Annotated[SizesConfig, tyro.conf.subcommand("sizes")]
)
"""One dataclass for each sub-command."""


def main(config: PackConfig) -> int:
    if isinstance(config, SizesConfig):
        return sizes(config)
    return export(config)


if __name__ == "__main__":
    raise SystemExit(prime_cli.run(PackConfig, main, (ExportError, OutputError, CheckpointError, ModelError, OSError)))

"""Time and peak memory of converting a folder of a real geometry, the checkpoint written and flushed."""

from __future__ import annotations

import json
import math
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import save_file
from tqdm import tqdm

import manifolds
from bench_models import GEOMETRIES, TINY_CODER
from bench_tools import ROOT, BenchError, machine, print_table, write_json
from qwen_prime_wrapper import build_model, expected_tensors, source_name


@dataclass(frozen=True)
class ImportBench:
    """Convert a folder of a real geometry with random weights."""

    geometry: Literal["Qwen2.5-Coder-1.5B", "Qwen3-1.7B", "toy"] = "Qwen2.5-Coder-1.5B"
    """Shapes of this model."""
    folder: Path = Path("runs/bench_import")
    """Where the model folder (3 to 4 GB) and the checkpoint (as large) go."""
    keep: bool = False
    """Keep both afterwards."""
    json: Path | None = None
    """Also write the result as JSON."""


def make_folder(geometry: str, folder: Path) -> int:
    """Write a bf16 model folder of that geometry with random weights in shards; returns its parameters."""
    folder.mkdir(parents=True, exist_ok=True)
    config = GEOMETRIES[geometry]
    model = build_model(config, manifolds.build())
    shapes = {source_name(n): s for n, (s, _) in expected_tensors(model).items() if not n.endswith(".grid.scale")}
    generator = torch.Generator().manual_seed(0)
    shard: dict[str, torch.Tensor] = {}
    weight_map: dict[str, str] = {}
    pending = list(shapes.items())
    with tqdm(total=sum(math.prod(s) for s in shapes.values()), unit="weight", unit_scale=True, desc="make") as bar:
        for number in range(len(pending)):
            name, shape = pending[number]
            norm = len(shape) == 1 and "norm" in name
            value = torch.empty(shape, dtype=torch.bfloat16)
            value.fill_(1.0) if norm else value.normal_(0, 0.02, generator=generator)
            shard[name] = value
            bar.update(value.numel())
            if sum(v.numel() for v in shard.values()) > 4e8 or number == len(pending) - 1:
                file = f"model-{len(set(weight_map.values())) + 1:05d}.safetensors"
                save_file(shard, folder / file, metadata={"format": "pt"})
                weight_map.update(dict.fromkeys(shard, file))
                shard.clear()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    (folder / "config.json").write_text(json.dumps(config))
    for file in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        if not (TINY_CODER / file).is_file():
            raise BenchError(f"{TINY_CODER / file} is missing: restore the assets folder")
        shutil.copy(TINY_CODER / file, folder)
    return sum(math.prod(s) for s in shapes.values())


def measure_import(config: ImportBench) -> dict[str, Any]:
    """Time and peak memory of a conversion, the writing of the checkpoint included."""
    folder = config.folder / config.geometry
    parameters = make_folder(config.geometry, folder)
    output, report = config.folder / f"{config.geometry}_prime_init.pt", config.folder / "report.json"
    command = [sys.executable, str(ROOT / "qwen_prime_importer.py"), "--model", str(folder), "--output", str(output)]
    started = time.perf_counter()
    result = subprocess.run([*command, "--report", str(report), "--force"])
    seconds = time.perf_counter() - started
    if result.returncode:
        raise BenchError(f"the importer failed with exit code {result.returncode}")
    written = json.loads(report.read_text())
    figures = {
        "geometry": config.geometry,
        "parameters": parameters,
        "seconds, process": round(seconds, 1),
        "peak resident memory, GB": round(written["peak_rss_bytes"] / 1e9, 2),
        "source, GB": round(sum(f.stat().st_size for f in folder.glob("*.safetensors")) / 1e9, 2),
        "checkpoint, GB": round(output.stat().st_size / 1e9, 2),
        "lowest SNR, dB": written["lowest_snr_db"],
    }
    if not config.keep:
        shutil.rmtree(config.folder)
    return figures


def bench_import(config: ImportBench) -> int:
    """Measure and print one conversion."""
    figures, where = measure_import(config), machine()
    print_table(where, ("figure", "value"), list(figures.items()))
    write_json(config.json, {"machine": where, **figures})
    return 0

"""How time and memory of a step grow with parameters, sequence length and micro-batches; measured, drawn, and compared
with a straight line. And what the plan says of models that no machine here could hold.

Each point is a process of its own that trains a small geometry with layers open and gradient checkpointing. Time should
be linear in parameters and micro-batches, and in sequence length but for attention's square; memory linear in
parameters and sequence length, and flat in micro-batches, which is what votes are for. A line is fitted by least
squares, and R² says how straight the points are; where they lie level it says nothing, so the rise over the whole range
is there too.

What is computed and not measured says so: memory of the 7 B and 14 B geometries on a 24 GB card by ``memory_plan``.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

import manifolds
import memory_plan
from bench_models import GEOMETRIES, Endless, config_of, gaussian_model
from bench_tools import (
    BenchError,
    in_own_process,
    machine,
    peak_bytes,
    print_table,
    resident_bytes,
    version_of,
    write_json,
)
from night_shift import LayerPeel, layer_groups
from prime_device import return_freed_memory
from qwen_prime_wrapper import build_model, count_parameters
from training_recipe import Recipe
from vote_rules import rule_named
from vote_trainer import VoteTrainer

CARD = 24_000_000_000
FIGURES = ("processor_seconds", "peak_mb")
"""What lines are fitted to: a shared machine's clock says when others worked, too."""
LARGE = ("Qwen2.5-7B", "Qwen2.5-14B")


@dataclass(frozen=True)
class Point:
    """One training step to measure."""

    layers: int = 2
    seq_len: int = 256
    micro_batches: int = 1


AXES: dict[str, tuple[str, tuple[Point, ...]]] = {
    "parameters": ("parameters, millions", tuple(Point(layers=n) for n in (1, 4, 8, 16))),
    "seq_len": ("tokens in a row", tuple(Point(seq_len=n) for n in (128, 256, 512, 1024))),
    "micro_batches": ("micro-batches in a step", tuple(Point(micro_batches=n) for n in (1, 2, 4, 8))),
}


@dataclass(frozen=True)
class GrowBench:
    """Time and memory of a training step against parameters, sequence length and micro-batches."""

    axes: tuple[str, ...] = tuple(AXES)
    """Along which axes."""
    geometry: str = "growing"
    """Of which small geometry; its number of layers is an axis."""
    steps: int = 3
    """Measured steps at each point; medians are reported."""
    plot: Path | None = None
    """Draw the points and lines into this file (needs matplotlib)."""
    json: Path | None = None
    """Also write the result as JSON."""
    worker: bool = False
    """For internal use: measure one point in this process and print its line."""
    layers: int = 2
    """Of the worker's point."""
    seq_len: int = 256
    """Of the worker's point."""
    micro_batches: int = 1
    """Of the worker's point."""

    def __post_init__(self) -> None:
        if unknown := [x for x in self.axes if x not in AXES]:
            raise ValueError(f"axes has {unknown[0]}, expected of {', '.join(AXES)}")
        if self.geometry not in GEOMETRIES:
            raise ValueError(f"geometry is {self.geometry}, expected of {', '.join(GEOMETRIES)}")
        for name in ("steps", "layers", "seq_len", "micro_batches"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}, expected at least 1")


def measure_point(point: Point, geometry: str, steps: int) -> dict[str, Any]:
    """Train in this process, which must be a fresh one: seconds of a step on the clock and of the processor, all
    threads together, and peak memory over the imports."""
    return_freed_memory()
    (torch.ones(64, 64) @ torch.ones(64, 64)).sum().item()
    before = resident_bytes()
    config = {**config_of(geometry), "num_hidden_layers": point.layers}
    model = gaussian_model(config, manifolds.build())
    batches: Any = Endless(model.config.vocab_size, point.seq_len)
    recipe = Recipe(steps=steps + 1, grad_accum=point.micro_batches, lr=1e-4, compute="float32", device="cpu")
    trainer = VoteTrainer(model, batches, recipe)
    seconds, processor = [], []
    for _ in range(steps + 1):
        started, worked = time.perf_counter(), time.process_time()
        trainer.step()
        seconds.append(time.perf_counter() - started)
        processor.append(time.process_time() - worked)
    plan = memory_plan.Settings(seq_len=point.seq_len, compute="float32")
    return {
        **asdict(point),
        "parameters": count_parameters(model),
        "step_seconds": round(statistics.median(seconds[1:]), 4),
        "processor_seconds": round(statistics.median(processor[1:]), 4),
        "peak_mb": round((peak_bytes() - before) / 1e6, 1),
        "planned_mb": round(memory_plan.total(memory_plan.budget(model, plan)) / 1e6, 1),
    }


def straight(xs: Sequence[float], ys: Sequence[float]) -> dict[str, float | None]:
    """The least-squares line through points, how straight they are (R²), and their rise from first to last, None where
    the first is nothing (memory that had been there already)."""
    slope, start = np.polyfit(xs, ys, 1)
    rest = np.asarray(ys) - (slope * np.asarray(xs) + start)
    spread = float(np.var(ys))
    return {
        "slope": float(slope),
        "start": float(start),
        "r2": round(1.0 - float(np.var(rest)) / spread, 4) if spread > 0 else 1.0,
        "rise": round(ys[-1] / ys[0], 3) if ys[0] > 0 else None,
    }


def x_of(axis: str, line: dict[str, Any]) -> float:
    """Where a point lies along an axis, in the axis's unit."""
    return line[axis] / 1e6 if axis == "parameters" else line[axis]


def large_models() -> list[dict[str, Any]]:
    """Planned, not measured: the large geometries on a 24 GB card, bfloat16 products, one row of 512 or 1,024 tokens,
    every layer open or a window of eight."""
    found = []
    for name in LARGE:
        for rule in ("momentum", "compact"):
            table = manifolds.build("compact" if rule_named(rule).vote_bits else manifolds.DEFAULT)
            model = build_model(config_of(name), table)
            for seq_len in (512, 1024):
                for peel in (LayerPeel(), LayerPeel.parse("v7", 8)):
                    settings = memory_plan.Settings(
                        vote_rule=rule, seq_len=seq_len, peel=peel, compute="bfloat16", cuda=True
                    )
                    need = memory_plan.total(memory_plan.budget(model, settings))
                    found.append(
                        {
                            "geometry": name,
                            "parameters": count_parameters(model),
                            "vote_rule": rule,
                            "seq_len": seq_len,
                            "open_layers": memory_plan.most_open(peel, len(layer_groups(model)) - 1),
                            "planned_gb": round(need / 1e9, 2),
                            "fits_24_gb": need <= CARD,
                        }
                    )
    return found


def draw(path: Path, found: dict[str, Any]) -> None:
    """Time above, memory below, one column an axis.

    Raises:
        BenchError: matplotlib is not installed.
    """
    if version_of("matplotlib") is None:
        raise BenchError("--plot needs matplotlib: python -m pip install -r requirements-dev.txt")
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, cells = plt.subplots(2, len(found), figsize=(3.6 * len(found), 5.6), layout="constrained", squeeze=False)
    for column, (axis, part) in enumerate(found.items()):
        xs = [x_of(axis, line) for line in part["points"]]
        for cell, key, label in zip(cells[:, column], FIGURES, ("processor s a step", "MB"), strict=True):
            line = part["lines"][key]
            cell.plot(xs, [line["start"] + line["slope"] * x for x in xs], color="#bbbbbb", linewidth=1.2)
            cell.plot(xs, [p[key] for p in part["points"]], "o", color="#1f6f8b", label="measured")
            if key == "peak_mb":
                cell.plot(xs, [p["planned_mb"] for p in part["points"]], "x", color="#d1793b", label="planned")
                cell.set_xlabel(AXES[axis][0])
                cell.legend(frameon=False)
            rise = "" if line["rise"] is None else f", x {line['rise']:.2f} over the range"
            cell.set_title(f"R² {line['r2']:.3f}{rise}", fontsize=9)
            cell.set_ylim(bottom=0)
            cell.set_ylabel(label)
            cell.grid(alpha=0.25)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def bench_grow(config: GrowBench) -> int:
    """Measure every point, print points and lines, draw; as a worker, one point."""
    if config.worker:
        point = Point(config.layers, config.seq_len, config.micro_batches)
        print(json.dumps(measure_point(point, config.geometry, config.steps)))
        return 0
    where = machine()
    found: dict[str, Any] = {}
    for axis in config.axes:
        points = [_in_own_process(p, config) for p in tqdm(AXES[axis][1], desc=axis, leave=False, disable=None)]
        xs = [x_of(axis, line) for line in points]
        lines = {key: straight(xs, [line[key] for line in points]) for key in FIGURES}
        found[axis] = {"points": points, "lines": lines}
    columns = ("axis", "parameters", "layers", "seq_len", "micro_batches", "step_seconds", *FIGURES, "planned_mb")
    rows = [[axis, *(line[c] for c in columns[1:])] for axis, part in found.items() for line in part["points"]]
    print_table(where, columns, rows)
    fits = [
        [axis, key, f"{line['slope']:.4g}", line["r2"], "" if line["rise"] is None else line["rise"]]
        for axis, part in found.items()
        for key, line in part["lines"].items()
    ]
    print_table("straight lines", ("axis", "figure", "per unit", "R²", "last / first"), fits)
    planned = large_models()
    print_table("24 GB card: planned, not measured", list(planned[0]), [list(line.values()) for line in planned])
    if config.plot is not None:
        draw(config.plot, found)
    write_json(config.json, {"machine": where, "geometry": config.geometry, "axes": found, "planned_24_gb": planned})
    return 0


def _in_own_process(point: Point, config: GrowBench) -> dict[str, Any]:
    flags = [f"--{name.replace('_', '-')}={value}" for name, value in asdict(point).items()]
    return in_own_process(
        ["grow", "--worker", *flags, "--geometry", config.geometry, "--steps", str(config.steps)],
    )

"""Every hot operation against what it replaces, in nanoseconds per weight."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch

import ghost_kernels as kernels
import manifolds
import vote_units
from bench_tools import alternate, machine, print_table, write_json


@dataclass(frozen=True)
class KernelBench:
    """Time snap, dequantize, cast and apply against what they replace."""

    rows: int = 4096
    """Rows of the matrix."""
    columns: int = 2048
    """Columns of the matrix."""
    rounds: int = 7
    """Rounds; medians are reported."""
    json: Path | None = None
    """Also write the result as JSON."""

    def __post_init__(self) -> None:
        if min(self.rows, self.columns, self.rounds) < 1:
            raise ValueError("rows, columns and rounds are expected to be at least 1")


def functions(rows: int, columns: int) -> dict[str, Callable[[], Any]]:
    """What is timed, by name, in an order in which each finds its state as it should be: whatever changes indices and
    votes comes right after the copy that restores them."""
    table = manifolds.build()
    generator = torch.Generator().manual_seed(0)
    weights = torch.randn(rows, columns, generator=generator) * 0.02
    gradient = torch.randn(rows, columns, generator=generator) * 1e-3
    scale = kernels.row_scales(weights, 1.25)
    indices, _ = kernels.snap(weights, scale, table)
    normal = weights / scale[:, None]
    out, snapped = torch.empty_like(weights), torch.empty_like(indices)
    units = vote_units.VoteUnits.for_buffer(8, 32)
    yardstick = torch.full((rows,), 0.3 * units.unit / 32 / 1e-3)
    votes = torch.zeros(rows, columns, dtype=torch.int8)
    squares, sketch = torch.zeros(2, rows, dtype=torch.int64)
    every = torch.arange(rows)
    for k in range(32):
        kernels.cast_votes(
            gradient, every, yardstick, votes, squares, sketch, keys=vote_units.hash_keys(0), slot=k, units=units
        )
    stride = kernels.integer_strides(kernels.inverse_scales(scale), 1e-4, units.unit)
    scratch = indices.clone(), votes.clone()
    tokens, inputs = torch.randn(512, rows), torch.randn(512, columns)

    def restore() -> None:
        scratch[0].copy_(indices)
        scratch[1].copy_(votes)

    def apply(backend: str) -> None:
        kernels.apply_votes(*scratch, stride, table, keys=(1, 2, 3, 4), decay=45875, carry=units.carry, backend=backend)

    def vote(backend: str) -> None:
        kernels.cast_votes(
            gradient, every, yardstick, scratch[1], squares, sketch, keys=(1, 2), slot=3, units=units, backend=backend
        )

    return {
        "snap": lambda: kernels.snap(weights, scale, table, out=snapped),
        "torch.searchsorted": lambda: torch.searchsorted(table.values, normal),
        "dequantize": lambda: kernels.dequantize(indices, scale, table, out=out),
        "copy of its output": lambda: out.copy_(weights),
        "copy of its state": restore,
        "apply votes": lambda: apply("numba"),
        "restored": restore,
        "apply votes, torch": lambda: apply("torch"),
        "restored again": restore,
        "cast votes": lambda: vote("numba"),
        "cast votes, torch": lambda: vote("torch"),
        "weight gradient of 512 tokens": lambda: tokens.T @ inputs,
    }


RATIOS = (
    ("torch.searchsorted / snap", "torch.searchsorted", "snap", "at least 10"),
    ("copy of its output / dequantize", "copy of its output", "dequantize", "at least 0.4"),
    ("apply votes / copy of its state", "apply votes", "copy of its state", "at most 2"),
    ("cast votes / weight gradient of 512 tokens", "cast votes", "weight gradient of 512 tokens", None),
)


def bench_kernels(config: KernelBench) -> int:
    """Time every kernel and what it is measured against, alternating, and print both tables."""
    where = machine()
    times = alternate(functions(config.rows, config.columns), config.rounds)
    weights = config.rows * config.columns
    lines = [
        {
            "function": name,
            "ns_per_weight": round(t.median / weights * 1e9, 3),
            "middle_half": [round(s / weights * 1e9, 3) for s in t.spread],
        }
        for name, t in times.items()
        if not name.startswith("restored")
    ]
    ratios = [
        {"ratio": name, "measured": round(times[a].over(times[b]), 3), "asked": asked} for name, a, b, asked in RATIOS
    ]
    speed = round(weights / times["snap"].median / 1e6, 1)
    ratios.insert(0, {"ratio": "snap, million weights per second", "measured": speed, "asked": "at least 100"})
    rows = [(x["function"], x["ns_per_weight"], "{} to {}".format(*cast(list[float], x["middle_half"]))) for x in lines]
    print_table(where, ("function", "ns per weight", "middle half"), rows)
    print_table("within a round, medians", ("ratio", "measured", "asked"), [list(r.values()) for r in ratios])
    write_json(config.json, {"machine": where, "weights": weights, "functions": lines, "ratios": ratios})
    return 0

"""Every hot operation against what it replaces, in nanoseconds per weight."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import ghost_kernels as kernels
import manifolds
from bench_tools import alternate


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


def bench_kernels(config: KernelBench) -> dict[str, Any]:
    """Nanoseconds per weight of each kernel and of the operation it is measured against."""
    rows, columns = config.rows, config.columns
    table = manifolds.build()
    generator = torch.Generator().manual_seed(0)
    weights = torch.randn(rows, columns, generator=generator) * 0.02
    gradient = torch.randn(rows, columns, generator=generator) * 1e-3
    scale = kernels.row_scales(weights, 1.25)
    indices, _ = kernels.snap(weights, scale, table)
    normal = weights / scale[:, None]
    out = torch.empty_like(weights)
    units = kernels.VoteUnits.for_buffer(8, 32)
    yardstick = torch.full((rows,), 0.3 * units.unit / 32 / 1e-3)
    votes = torch.zeros(rows, columns, dtype=torch.int8)
    squares, sketch = torch.zeros(2, rows, dtype=torch.int64)
    every = torch.arange(rows)
    for k in range(32):
        kernels.cast_votes(
            gradient, every, yardstick, votes, squares, sketch, keys=kernels.hash_keys(0), slot=k, units=units
        )
    stride = kernels.integer_strides(kernels.inverse_scales(scale), 1e-4, units.unit)
    saved = indices.clone(), votes.clone()
    scratch = indices.clone(), votes.clone()
    tokens, inputs = torch.randn(512, rows), torch.randn(512, columns)

    def restore() -> None:
        scratch[0].copy_(saved[0])
        scratch[1].copy_(saved[1])

    def apply(backend: str) -> None:
        restore()
        kernels.apply_votes(*scratch, stride, table, keys=(1, 2, 3, 4), decay=45875, carry=units.carry, backend=backend)

    def cast(backend: str) -> None:
        kernels.cast_votes(
            gradient, every, yardstick, scratch[1], squares, sketch, keys=(1, 2), slot=3, units=units, backend=backend
        )

    short = alternate(
        {
            "snap": lambda: kernels.snap(weights, scale, table, out=scratch[0]),
            "torch.searchsorted": lambda: torch.searchsorted(table.values, normal),
            "dequantize": lambda: kernels.dequantize(saved[0], scale, table, out=out),
            "copy of its output": lambda: out.copy_(weights),
            "cast votes": lambda: cast("numba"),
            "cast votes, torch": lambda: cast("torch"),
            "weight gradient of 512 tokens": lambda: tokens.T @ inputs,
            "apply votes (with restoring)": lambda: apply("numba"),
            "apply votes, torch (with restoring)": lambda: apply("torch"),
            "restoring its state": restore,
        },
        config.rounds,
    )
    figures: dict[str, Any] = {f"{n}, ns per weight": round(t / weights.numel() * 1e9, 3) for n, t in short.items()}
    figures["snap, million weights per second"] = round(weights.numel() / short["snap"] / 1e6, 1)
    figures["snap against searchsorted"] = round(short["torch.searchsorted"] / short["snap"], 1)
    figures["dequantize against copy"] = round(short["copy of its output"] / short["dequantize"], 2)
    figures["cast, share of its matrix product"] = round(
        short["cast votes"] / short["weight gradient of 512 tokens"], 3
    )
    return figures

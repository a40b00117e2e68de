"""A task small enough for tests of the comparison of methods, and lines of results that nobody had to compute."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tiny_models import tiny_config, write_source

from quality_tasks import Task


def tiny_task(folder: Path) -> Task:
    """A random model of bytes, sums to learn and a sentence to forget."""
    write_source(folder / "model", tiny_config())
    rows = [{"question": f"{a} plus {b}", "answer": f"gives {a + b}."} for a in range(10) for b in range(10)]
    (folder / "sums.json").write_text(json.dumps(rows))
    (folder / "old.json").write_text(json.dumps([f"the cat number {i} sat on the mat" for i in range(40)]))
    return Task(
        "tiny",
        str(folder / "model"),
        str(folder / "sums.json"),
        str(folder / "old.json"),
        held_out_one_in=4,
        seq_len=64,
        grad_accum=2,
        steps=6,
        warmup=1,
        target_tokens=300,
        source_tokens=300,
    )


def line(method: str, lr: float, seed: int, target: float | None, source: float | None, **more: Any) -> dict[str, Any]:
    return {
        "task": "toy",
        "method": method,
        "lr": lr,
        "seed": seed,
        "steps": 5,
        "bytes_per_parameter": 16.0 if method == "adamw" else 4.0,
        "target_before": 3.0,
        "source_before": 2.0,
        "target_after": target,
        "source_after": source,
        **more,
    }


LINES = [
    *(line("adamw", 1e-3, s, 2.5 + 0.02 * s, 2.1) for s in (0, 1)),
    *(line("adamw", 3e-3, s, 2.3 + 0.02 * s, 2.4) for s in (0, 1)),
    *(line("adamw", 1e-2, s, 2.9, 3.0) for s in (0, 1)),
    *(line("momentum", 1e-3, s, 2.4, 2.1) for s in (0, 1)),
    *(line("momentum", 4e-3, s, 2.2, 2.3) for s in (0, 1)),
    *(line("momentum", 1.6e-2, s, None, None) for s in (0, 1)),
]

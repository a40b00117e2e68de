"""A run to watch: the recorded one of tests/data, copied so that a test may write on."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

RECORDED = Path(__file__).resolve().parent / "data" / "watched_run"
STEPS = 240
"""Steps of the recorded run; its layers opened at 41, 61 and 81, two at a time."""


def copy_run(folder: Path) -> Path:
    """The recorded run in a folder of its own."""
    shutil.copytree(RECORDED, folder)
    return folder


def recorded_line(step: int) -> dict[str, Any]:
    """The line of a step, from 1."""
    return json.loads((RECORDED / "stats.jsonl").read_text(encoding="utf-8").splitlines()[step - 1])


def append(path: Path, **fields: Any) -> None:
    """Append a line as the trainer does."""
    with open(path, "a", encoding="utf-8") as file:
        file.write(json.dumps(fields) + "\n")


def cut(folder: Path, steps: int) -> Path:
    """Make the copied run one that has come to a step and still goes on, as far as its files tell."""
    stats, events = folder / "stats.jsonl", folder / "events.jsonl"
    stats.write_text("".join(line + "\n" for line in stats.read_text().splitlines()[:steps]))
    kept = [line for line in events.read_text().splitlines() if json.loads(line)["step"] <= steps]
    events.write_text("".join(line + "\n" for line in kept))
    for evaluation in folder.glob("EVAL_*.json"):
        if json.loads(evaluation.read_text())["step"] > steps:
            evaluation.unlink()
    return folder

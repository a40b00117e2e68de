"""What every measurement shares: the machine it belongs to, turns in one process, memory, tables and JSON.

Machines are shared and get slower or faster while something runs. So what is compared takes turns in one process, round
by round; a ratio is taken within each round and the median over rounds is reported, with the range of the middle half.
Memory is the other way round: an allocator remembers what it has seen, so each method is measured in a process of its
own, whose high-water mark is reset when the model stands. Rejected: the best of many rounds, which on a shared machine
says how quiet it once was; ``ru_maxrss``, which cannot be reset and would count how a model was made.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from tqdm import tqdm

ROOT = Path(__file__).resolve().parent
SCRIPT = ROOT / "qwen_prime_bench.py"


class BenchError(RuntimeError):
    """A measurement that cannot be made here."""


def machine(*packages: str) -> dict[str, Any]:
    """What a figure belongs to; ``packages`` are distributions whose versions matter, None where not installed."""
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    model = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").exists():
        names = [x for x in Path("/proc/cpuinfo").read_text().splitlines() if x.startswith("model name")]
        model = names[0].split(":", 1)[1].strip() if names else model
    return {
        "cpu": model,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "torch": str(torch.__version__),
        "python": platform.python_version(),
        "commit": commit.stdout.strip() or None,
        **{name: version_of(name) for name in packages},
    }


def version_of(package: str) -> str | None:
    """Version of an installed distribution, None where there is none."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


# -- time -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Times:
    """Seconds of one thing, round by round."""

    seconds: tuple[float, ...]

    @property
    def median(self) -> float:
        """Median seconds."""
        return statistics.median(self.seconds)

    @property
    def spread(self) -> tuple[float, float]:
        """Seconds between which the middle half of the rounds lies."""
        return quartiles(self.seconds)

    def over(self, other: Times) -> float:
        """Median over rounds of this one's seconds divided by the other's of the same round."""
        return statistics.median(a / b for a, b in zip(self.seconds, other.seconds, strict=True))


def quartiles(values: Sequence[float]) -> tuple[float, float]:
    """The range of the middle half; of fewer than three values their whole range."""
    if len(values) < 3:
        return min(values), max(values)
    low, _, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, high


def alternate(functions: Mapping[str, Callable[[], Any]], rounds: int, warm_up: int = 1) -> dict[str, Times]:
    """Seconds of each function; one call of each per round, after ``warm_up`` rounds that do not count."""
    times: dict[str, list[float]] = {name: [] for name in functions}
    for turn in tqdm(range(rounds + warm_up), desc="rounds", leave=False, disable=None):
        for name, function in functions.items():
            started = time.perf_counter()
            function()
            if turn >= warm_up:
                times[name].append(time.perf_counter() - started)
    return {name: Times(tuple(values)) for name, values in times.items()}


# -- memory -----------------------------------------------------------------------------------------------------------


def resident_bytes() -> int:
    """Resident memory of this process now; Linux only."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def reset_peak() -> None:
    """Let the high-water mark of resident memory begin again from what is resident now (proc(5), clear_refs).

    Raises:
        BenchError: the system has no such switch.
    """
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError as error:
        raise BenchError(f"cannot reset the peak of resident memory ({error}): expected Linux with /proc") from error


def peak_bytes() -> int:
    """High-water mark of resident memory since the start or :func:`reset_peak`; Linux only."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    raise BenchError("/proc/self/status has no VmHWM: expected Linux")


def in_own_process(arguments: Sequence[str]) -> dict[str, Any]:
    """Run this suite's bench with ``arguments`` in a process of its own; the JSON object it prints last.

    Raises:
        BenchError: it failed.
    """
    command = [sys.executable, str(SCRIPT), *arguments]
    process = subprocess.run(command, stdout=subprocess.PIPE, text=True, cwd=ROOT)
    if process.returncode:
        raise BenchError(f"{' '.join(arguments)} ended with {process.returncode}")
    return json.loads(process.stdout.splitlines()[-1])


# -- output -----------------------------------------------------------------------------------------------------------


def print_table(title: Mapping[str, Any] | str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    """A table under a title, or under the machine it belongs to; None is an empty cell."""
    if not isinstance(title, str):
        title = ", ".join(f"{k} {v}" for k, v in title.items() if v is not None)
    table = Table(title=title, title_justify="left")
    for number, column in enumerate(columns):
        table.add_column(column, justify="right" if number else "left", overflow="fold")
    for row in rows:
        table.add_row(*("" if cell is None else str(cell) for cell in row))
    # Wide enough for the columns where the width of the output is unknown.
    Console(width=None if sys.stdout.isatty() else 200).print(table)


def write_json(path: Path | None, content: Any) -> None:
    """Write a result where one is asked for."""
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(content, indent=2, allow_nan=False) + "\n", encoding="utf-8")

"""What a run tells the outside: append-only JSON lines in the run's folder. No torch, so monitors start at once.

    RUN/config.json     the trainer's configuration, written before step 1
    RUN/stats.jsonl     one object a step
    RUN/events.jsonl    what happened beside the steps: start, first evaluation, unlock, save, skip, spike, memory,
                        return, signal, end
    RUN/samples.jsonl   what the model writes: prompt, text, reference

After a return to an earlier checkpoint steps are counted again from there: of two lines of one step the later one
holds.

A line is written and flushed whole; a reader that comes in the middle of a write, or after a crash, sees a torn last
line and leaves it for the next look. Numbers that JSON does not have (NaN, infinities) are written as null.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

CONFIG, STATS, EVENTS, SAMPLES = "config.json", "stats.jsonl", "events.jsonl", "samples.jsonl"


def _plain(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    return str(value) if isinstance(value, Path) else value


def this_process() -> dict[str, Any]:
    """What tells this process from every other: ``pid``, ``host`` and, where the system says so, ``ticks``, its start
    in clock ticks since the machine's own."""
    return {"pid": os.getpid(), "host": _host(), "ticks": _start_ticks(os.getpid())}


def is_alive(process: dict[str, Any]) -> bool | None:
    """Whether a process that :func:`this_process` described still runs; None where that cannot be known from here."""
    pid = process.get("pid")
    if not isinstance(pid, int) or pid <= 0 or process.get("host") != _host():
        return None
    if process.get("ticks") is not None and os.path.isdir("/proc/self"):
        return _start_ticks(pid) == process["ticks"]
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    except OSError:
        return None
    return True


def _host() -> str:
    if hasattr(os, "uname"):
        return os.uname().nodename
    # Slow to import, and monitors are to start at once.
    import platform

    return platform.node()


def _start_ticks(pid: int) -> int | None:
    """Field 22 of proc(5)'s stat; None where there is no such process or no such file. A zombie is not running."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    # The name, field 2, may hold anything, also brackets; what follows its last one is regular.
    fields = text.rpartition(")")[2].split()
    return None if fields[0] in "ZX" else int(fields[19])


class RunLog:
    """Writer of one run's folder; creates the folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)

    def config(self, config: dict[str, Any]) -> None:
        """Write ``config.json``, whole or not at all."""
        beside = self.folder / f".{CONFIG}.tmp"
        beside.write_text(json.dumps(_plain(config), indent=2) + "\n", encoding="utf-8")
        os.replace(beside, self.folder / CONFIG)

    def stats(self, **fields: Any) -> None:
        """Append one step to ``stats.jsonl``; adds ``timestamp`` (seconds since 1970)."""
        self._append(STATS, fields)

    def event(self, kind: str, **fields: Any) -> None:
        """Append to ``events.jsonl``: ``event`` is the kind; adds ``timestamp``."""
        self._append(EVENTS, {"event": kind, **fields})

    def sample(self, **fields: Any) -> None:
        """Append to ``samples.jsonl``; adds ``timestamp``."""
        self._append(SAMPLES, fields)

    def _append(self, name: str, fields: dict[str, Any]) -> None:
        line = json.dumps(_plain({**fields, "timestamp": round(time.time(), 3)}), allow_nan=False)
        path = self.folder / name
        # A crash may have left half a line: it must not swallow the one that follows.
        torn = path.exists() and path.stat().st_size > 0 and _last_byte(path) != b"\n"
        with open(path, "a", encoding="utf-8") as file:
            file.write(("\n" if torn else "") + line + "\n")


def _last_byte(path: Path) -> bytes:
    with open(path, "rb") as file:
        file.seek(-1, 2)
        return file.read(1)


def read_lines(path: Path) -> Iterator[dict[str, Any]]:
    """The objects of a JSON-lines file in order; lines that are not whole JSON objects are passed over."""
    if not path.exists():
        return
    with open(path, encoding="utf-8", errors="replace") as file:
        for line in file:
            try:
                value = json.loads(line)
            except (ValueError, RecursionError):
                continue
            if isinstance(value, dict):
                yield value

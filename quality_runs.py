"""Many runs of a comparison, each in a process of its own: which there are, which are still to be done, their results.

Results are lines of one file that is appended to, so whoever stops it loses the runs that were on their way and no
more.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from prime_quality import Run
from prime_telemetry import read_lines
from quality_tasks import ROOT, QualityError, Task


def plan(
    tasks: Sequence[Task],
    methods: Sequence[str],
    seeds: Sequence[int],
    *,
    rates: Sequence[float] = (),
    steps: int | None = None,
) -> list[Run]:
    """All runs, seed by seed, so that a comparison with few seeds is complete before one with more begins.

    Args:
        rates: instead of the learning rates of tasks and methods.
        steps: instead of the tasks' own.
    """
    return [
        Run(task.name, method, rate, seed, steps or task.steps)
        for seed in seeds
        for task in tasks
        for method in methods
        for rate in (rates or task.rates_of(method))
    ]


def append_result(path: Path, result: Mapping[str, Any]) -> None:
    """Add one line, written whole; a torn last line of an earlier crash is closed first."""
    path.parent.mkdir(parents=True, exist_ok=True)
    content = path.read_bytes() if path.exists() else b""
    torn = bool(content) and not content.endswith(b"\n")
    with open(path, "a", encoding="utf-8") as file:
        file.write(("\n" if torn else "") + json.dumps(result, allow_nan=False) + "\n")


def worker_environment(threads: int) -> dict[str, str]:
    """This process's environment with the thread counts of a worker; waiting threads sleep instead of spinning."""
    counts = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "NUMBA_NUM_THREADS"), str(threads))
    return {**os.environ, **counts, "OMP_WAIT_POLICY": "passive", "TOKENIZERS_PARALLELISM": "false"}


def run_all(runs: Sequence[Run], command: Callable[[Run], list[str]], results: Path, *, jobs: int, threads: int) -> int:
    """Execute the runs that ``results`` does not hold yet in worker processes and append their lines as they end.

    Args:
        command: of a run, whose process prints the results line as its last on stdout.
        jobs: processes at a time.
        threads: of each.

    Returns:
        How many were run.

    Raises:
        QualityError: runs that failed, after all others are done.
    """
    done = list(read_lines(results))
    waiting = [run for run in runs if not any(run.same_as(result) for result in done)]
    count, failed = len(waiting), []
    running: list[tuple[Run, subprocess.Popen[str], Any, Any]] = []
    bar = tqdm(total=len(runs), initial=len(runs) - count, desc="quality", unit="run", disable=None)
    try:
        while waiting or running:
            while waiting and len(running) < jobs:
                run = waiting.pop(0)
                # Files, not pipes: a worker that writes more than a pipe holds would wait for a reader.
                out, err = (tempfile.TemporaryFile("w+", encoding="utf-8") for _ in range(2))  # noqa: SIM115
                process = subprocess.Popen(
                    command(run), stdout=out, stderr=err, text=True, env=worker_environment(threads), cwd=ROOT
                )
                running.append((run, process, out, err))
            time.sleep(0.1)
            for entry in [e for e in running if e[1].poll() is not None]:
                running.remove(entry)
                run, process, out, err = entry
                said, complaint = ([line for line in _content(f).splitlines() if line.strip()] for f in (out, err))
                try:
                    if process.returncode:
                        raise ValueError(complaint[-1].removeprefix("error: ") if complaint else "no word on why")
                    result = json.loads(said[-1] if said else "")
                    append_result(results, result)
                    bar.set_postfix_str(f"{run}: {result['target_after']}")
                except ValueError as error:
                    failed.append(f"{run}: {error}")
                bar.update()
    finally:
        for _, process, _, _ in running:
            process.send_signal(signal.SIGTERM)
        for _, process, out, err in running:
            process.wait()
            out.close()
            err.close()
        bar.close()
    if failed:
        more = f" (and {len(failed) - 1} more)" if len(failed) > 1 else ""
        raise QualityError(f"{len(failed)} of {count} runs failed; {failed[0]}{more}")
    return count


def _content(file: Any) -> str:
    with file:
        file.seek(0)
        return file.read()


def worker_command(run: Run, script: Path, data_root: Path, device: str) -> list[str]:
    """Command line that lets a bench script with the subcommand ``quality`` execute one run and print its line."""
    options = {"tasks": run.task, "methods": run.method, "lrs": repr(run.lr), "seeds": run.seed, "steps": run.steps}
    flags = [str(x) for name, value in options.items() for x in (f"--{name}", value)]
    place = ["--data-root", str(data_root.resolve()), "--device", device]
    return [sys.executable, str(script), "quality", *flags, *place, "--worker"]

"""What methods learn and forget, as a table: runs what the results file lacks, then reads it (``quality_runs``,
``quality_summary``)."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import prime_quality
import quality_runs
import quality_summary
import quality_tasks
from bench_tools import SCRIPT, BenchError, machine, print_table
from prime_device import check_device
from prime_telemetry import read_lines


@dataclass(frozen=True)
class QualityBench:
    """Compare training methods: held-out loss of a new domain, and what it costs in the old one."""

    tasks: tuple[str, ...] = quality_tasks.DEFAULT_TASKS
    """Which tasks, by name."""
    methods: tuple[str, ...] = quality_tasks.DEFAULT_METHODS
    """Which methods, by name."""
    seeds: tuple[int, ...] = (0, 1)
    """Order of the data and random draws."""
    lrs: tuple[float, ...] = ()
    """Learning rates instead of the task's and method's own."""
    steps: int | None = None
    """Steps instead of the task's own; results of other numbers of steps are not compared."""
    data_root: Path = Path("../shared/data")
    """Folder of the corpora and models that are not in assets/."""
    results: Path = Path("runs/quality/results.jsonl")
    """Where results are kept; runs that are in it are not run again."""
    markdown: Path | None = None
    """Also write the summary as a markdown table."""
    jobs: int = 2
    """Worker processes at a time."""
    threads: int = 1
    """Threads of each."""
    device: str = "cpu"
    """Where to train."""
    baseline: str = quality_tasks.BASELINE
    """The method that the others are compared with."""
    summary: bool = False
    """Run nothing; print the summary of the results that are there."""
    worker: bool = False
    """For internal use: execute the one selected run in this process and print its results line."""

    def __post_init__(self) -> None:
        for name, known in (("tasks", quality_tasks.TASKS), ("methods", quality_tasks.METHODS)):
            chosen = getattr(self, name)
            if not chosen or (unknown := [x for x in chosen if x not in known]):
                raise ValueError(f"{name} has {unknown[0] if chosen else 'none'}, expected of {', '.join(known)}")
        if self.baseline not in quality_tasks.METHODS:
            raise ValueError(f"baseline is {self.baseline}, expected one of {', '.join(quality_tasks.METHODS)}")
        if not self.seeds:
            raise ValueError("seeds has none, expected at least one")
        if any(not 0 < rate <= 1 for rate in self.lrs):
            raise ValueError(f"lrs is {self.lrs}, expected each above 0 and at most 1")
        for name in ("steps", "jobs", "threads"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} is {value}, expected at least 1")


def bench_quality(config: QualityBench) -> int:
    """Run what is missing, then print the comparison; as a worker, one run and its results line."""
    if not config.summary:
        check_device(config.device)
        for name in config.methods:
            quality_tasks.check_method(name)
        tasks = [quality_tasks.check_task(name, config.data_root) for name in config.tasks]
        runs = quality_runs.plan(tasks, config.methods, config.seeds, rates=config.lrs, steps=config.steps)
        if config.worker:
            if len(runs) != 1:
                raise BenchError(f"a worker executes one run, got {len(runs)}")
            result = prime_quality.execute(runs[0], tasks[0], config.data_root, config.device)
            where = machine()
            print(json.dumps({**result, "machine": where, "commit": where["commit"]}, allow_nan=False))
            return 0
        quality_runs.run_all(
            runs,
            lambda run: quality_runs.worker_command(run, SCRIPT, config.data_root, config.device),
            config.results,
            jobs=config.jobs,
            threads=config.threads,
        )
    methods = {*config.methods, config.baseline}
    lines = [x for x in read_lines(config.results) if x["task"] in config.tasks and x["method"] in methods]
    rows = quality_summary.summary(lines, config.steps, config.baseline)
    print_table(
        f"{config.results}: nats per token, beside {config.baseline}",
        quality_summary.COLUMNS,
        [quality_summary.cells(row) for row in rows],
    )
    if config.markdown:
        config.markdown.write_text(quality_summary.markdown(rows), encoding="utf-8")
    return 0

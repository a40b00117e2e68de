"""Many runs in processes: plan, results, failures, the command line."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from tiny_tasks import LINES, line

import prime_cli
import quality_runs
import quality_tasks
import qwen_prime_bench as bench
from prime_quality import Run
from prime_telemetry import read_lines


def test_a_plan_finishes_a_seed_before_the_next() -> None:
    tasks = [quality_tasks.TASKS["stdlib"], quality_tasks.TASKS["stdlib-low"]]
    runs = quality_runs.plan(tasks, ["adamw", "lora"], [0, 1])
    assert len(runs) == len(set(runs)) == 2 * 2 * 3 * 2
    assert [r.seed for r in runs] == [0] * 12 + [1] * 12
    assert {r.lr for r in runs if r.task == "stdlib-low" and r.method != "lora"} == {1e-5, 3e-5, 1e-4}
    assert {(r.lr, r.steps) for r in quality_runs.plan(tasks, ["adamw"], [0], rates=[0.5], steps=7)} == {(0.5, 7)}


def test_workers_run_what_is_missing_and_failures_are_one_line(tmp_path: Path) -> None:
    """Workers that only say what they were told, and one that fails."""
    path = tmp_path / "deep" / "results.jsonl"
    runs = [Run("toy", "adamw", lr, 0, 5) for lr in (1e-3, 2e-3, 3e-3)]
    quality_runs.append_result(path, line("adamw", 1e-3, 0, 2.5, 2.1))
    with path.open("a") as file:
        file.write('{"torn')
    calls: list[float] = []

    def command(run: Run) -> list[str]:
        calls.append(run.lr)
        said = json.dumps({**line("adamw", run.lr, 0, 2.4, 2.1), "threads": "?"})
        code = (
            f"import os, sys; print('a note'); d = {said!r}\n"
            "print(d.replace('?', os.environ['OMP_NUM_THREADS'] + os.environ['OMP_WAIT_POLICY']))"
        )
        if run.lr == 3e-3:
            code = "import sys; print('error: out of luck', file=sys.stderr); sys.exit(1)"
        return [sys.executable, "-c", code]

    with pytest.raises(
        quality_tasks.QualityError, match=r"1 of 2 runs failed; toy adamw lr 0\.003 seed 0: out of luck"
    ):
        quality_runs.run_all(runs, command, path, jobs=2, threads=3)
    assert sorted(calls) == [2e-3, 3e-3]
    assert [x["lr"] for x in read_lines(path)] == [1e-3, 2e-3]
    assert list(read_lines(path))[-1]["threads"] == "3passive"
    assert quality_runs.run_all(runs[:2], command, path, jobs=2, threads=1) == 0


def cli(arguments: list[str]) -> int:
    return prime_cli.run(bench.BenchConfig, bench.main, (bench.BenchError, quality_tasks.QualityError), arguments)


def test_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "results.jsonl"
    for result in LINES:
        quality_runs.append_result(path, {**result, "task": "stdlib"})
    table = tmp_path / "table.md"
    options = ["quality", "--results", str(path), "--summary", "--steps", "5"]
    assert cli([*options, "--markdown", str(table)]) == 0
    assert "momentum" in capsys.readouterr().out
    assert table.read_text().count("| stdlib | ") == 2
    assert cli(["quality", "--tasks", "atto", "--methods", "adamw", "--data-root", str(tmp_path)]) == 1
    assert capsys.readouterr().err.count("\n") == 1
    for wrong in (["--tasks", "x"], ["--methods", "sgd"], ["--jobs", "0"], ["--lrs", "2"]):
        assert cli(["quality", *wrong]) == 2
        assert capsys.readouterr().err.count("\n") == 1
    assert cli(["quality", "--worker", "--tasks", "stdlib", "--methods", "adamw"]) == 1


def test_a_worker_command_says_one_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the parent writes is what the worker reads back, to the last bit of the learning rate."""
    run = Run("stdlib", "adamw", 1 / 3, 4, 7)
    command = quality_runs.worker_command(run, Path("bench.py"), tmp_path, "cpu")
    seen: list[bench.QualityBench] = []
    prime_cli.run(bench.BenchConfig, lambda c: seen.append(c) or 0, (), command[2:])
    (config,) = seen
    assert config.worker and config.data_root == tmp_path.resolve()
    assert quality_runs.plan(
        [quality_tasks.TASKS["stdlib"]], config.methods, config.seeds, rates=config.lrs, steps=config.steps
    ) == [run]


def test_what_the_others_are_compared_with_is_in_the_table_unasked(tmp_path: Path) -> None:
    results = quality_tasks.ROOT / "assets" / "quality.jsonl"
    table = tmp_path / "table.md"
    lines = ["quality", "--summary", "--results", str(results), "--tasks", "stdlib", "--methods", "momentum"]
    assert cli([*lines, "--baseline", "adamw-0.7-0.95", "--markdown", str(table)]) == 0
    rows = [[cell.strip() for cell in row.split("|")[1:-1]] for row in table.read_text().splitlines()[2:]]
    assert [row[1] for row in rows] == ["adamw-0.7-0.95", "momentum"]
    assert all("-" not in row[-3:] for row in rows)

"""Every sub-command runs on a tiny setting, prints a table, and its JSON has what a figure needs."""

from __future__ import annotations

import contextlib
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

import bench_growth
import prime_cli
import qwen_prime_bench as bench

pytestmark = pytest.mark.usefixtures("one_thread")

TINY: dict[str, list[str]] = {
    "train": ["--models", "toy", "--methods", "momentum", "adamw", "--seq-len", "16", "--micro-batches", "2"],
    "generate": ["--model", "toy", "--tokens", "2", "--prompt", "4", "--rounds", "1"],
    "kernels": ["--rows", "8", "--columns", "32", "--rounds", "1"],
    "grow": ["--geometry", "toy", "--axes", "micro_batches", "--steps", "1"],
    "import": ["--geometry", "toy"],
    "memory": ["--settings", "toy"],
    "save": ["--geometry", "toy", "--seq-len", "16", "--saves", "2"],
}
LINES: dict[str, tuple[str, set[str]]] = {
    "train": ("results", {"model", "method", "version", "tokens_per_s", "bare_gb", "over_bare_gb", "process_gb"}),
    "generate": ("results", {"way", "tokens_per_s", "middle_half", "over_transformers", "same_tokens"}),
    "kernels": ("functions", {"function", "ns_per_weight", "middle_half"}),
    "grow": ("planned_24_gb", {"geometry", "vote_rule", "planned_gb", "fits_24_gb"}),
    "memory": ("results", {"setting", "peak_gb", "planned_gb", "seconds"}),
    "save": ("results", {"checkpoint_bytes", "save_seconds", "step_seconds", "share_of_run"}),
}


def run(arguments: list[str]) -> int:
    return prime_cli.run(bench.BenchConfig, bench.main, bench._ERRORS, arguments)


@pytest.fixture
def workers_here(monkeypatch: pytest.MonkeyPatch) -> None:
    """Workers run in this process, whose allocator stays as it is; that they start is tested in test_bench_tools."""

    def here(arguments: Sequence[str]) -> dict[str, Any]:
        said = io.StringIO()
        with contextlib.redirect_stdout(said):
            assert run(list(arguments)) == 0
        return json.loads(said.getvalue().splitlines()[-1])

    for room in ("bench_training", "bench_memory", "bench_growth", "bench_saving"):
        monkeypatch.setattr(f"{room}.in_own_process", here)
        monkeypatch.setattr(f"{room}.return_freed_memory", lambda: True)


@pytest.mark.parametrize("arguments", [["memory", "--settings", "toy"], ["quality"]], ids=str)
def test_a_device_that_is_none_is_one_line(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert run([*arguments, "--device", "nonsense"]) == 1
    assert capsys.readouterr().err == "error: device is 'nonsense', expected cpu, cuda or cuda:N\n"


@pytest.mark.usefixtures("workers_here")
@pytest.mark.parametrize("name", TINY)
def test_a_sub_command(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = [name, *TINY[name], "--json", str(tmp_path / "x.json")]
    if name == "grow":
        label, points = bench_growth.AXES["micro_batches"]
        monkeypatch.setitem(bench_growth.AXES, "micro_batches", (label, points[:2]))
        arguments += ["--plot", str(tmp_path / "x.png")]
    if name == "train":
        arguments += ["--rounds", "1"]
    if name == "import":
        arguments += ["--folder", str(tmp_path / "folder")]
    assert run(arguments) == 0
    out = capsys.readouterr().out
    content: dict[str, Any] = json.loads((tmp_path / "x.json").read_text())
    assert {"cpu", "threads", "torch", "python", "commit"} <= content["machine"].keys()
    assert "python" in out
    if name in LINES:
        key, fields = LINES[name]
        assert content[key] and all(fields <= line.keys() for line in content[key])
    else:
        assert {"parameters", "seconds, process", "peak resident memory, GB", "lowest SNR, dB"} <= content.keys()
        assert not (tmp_path / "folder").exists()


def test_a_missing_package_is_named_and_not_skipped(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("bench_training.version_of", lambda name: None if name == "galore-torch" else "1")
    path = tmp_path / "x.json"
    arguments = ["train", "--models", "toy", "--methods", "momentum", "galore", "--seq-len", "8", "--no-memory"]
    assert run([*arguments, "--micro-batches", "1", "--rounds", "1", "--json", str(path)]) == 0
    lines = json.loads(path.read_text())["results"]
    assert [x["version"] for x in lines] == ["this suite", "galore-torch is not installed"]
    assert "tokens_per_s" not in lines[1] and lines[0]["speed_over_adamw"] is None
    assert "galore-torch is not installed" in " ".join(capsys.readouterr().out.split())


def test_a_profile(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["train", "--models", "toy", "--methods", "compact", "--seq-len", "8", "--micro-batches", "1"]
    assert run([*arguments, "--profile", str(tmp_path / "profile")]) == 0
    assert "kernel cast_votes" in capsys.readouterr().out
    assert {f.name for f in (tmp_path / "profile").iterdir()} == {"trace.json", "breakdown.txt"}


def test_bad_usage_exits_2(capsys: pytest.CaptureFixture[str]) -> None:
    for wrong in (["train", "--methods", "sgd"], ["grow", "--axes", "x"], ["kernels", "--rows", "0"], ["memory", "-x"]):
        assert run(wrong) == 2
        assert capsys.readouterr().err.count("\n") == 1

"""Turns are fair, ratios are taken within a round, and memory counts from where it was told to."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import bench_tools as tools


def test_functions_take_turns_and_warm_up_does_not_count() -> None:
    calls: list[str] = []
    times = tools.alternate({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, 3, warm_up=2)
    assert "".join(calls) == "ab" * 5
    assert [len(t.seconds) for t in times.values()] == [3, 3]


def test_a_ratio_is_taken_within_each_round() -> None:
    """The machine became ten times slower in the second round: the ratio does not care, a ratio of medians would."""
    slow, fast = tools.Times((2.0, 20.0, 2.0)), tools.Times((1.0, 10.0, 4.0))
    assert slow.over(fast) == 2.0
    assert slow.median == 2.0 and fast.median == 4.0


def test_the_middle_half() -> None:
    assert tools.quartiles((5.0, 1.0)) == (1.0, 5.0)
    assert tools.quartiles((0.0, 1.0, 2.0, 3.0, 100.0)) == (1.0, 3.0)


def test_the_peak_begins_again_after_a_reset() -> None:
    held = torch.ones(30_000_000)
    high = tools.peak_bytes()
    assert tools.resident_bytes() >= held.nbytes
    del held
    tools.reset_peak()
    low = tools.peak_bytes()
    assert low < high - 60_000_000
    again = torch.ones(30_000_000)
    assert tools.peak_bytes() > low + 60_000_000
    del again


def test_machine_has_versions_and_commit() -> None:
    where = tools.machine("torch", "no-such-package-at-all")
    assert where["torch"] == torch.__version__ and where["no-such-package-at-all"] is None
    assert {"cpu", "cores", "threads", "python", "commit"} <= where.keys()


def test_json_is_written_where_asked_and_refuses_what_json_does_not_have(tmp_path: Path) -> None:
    tools.write_json(None, {})
    tools.write_json(tmp_path / "deep" / "x.json", {"a": [1, None]})
    assert json.loads((tmp_path / "deep" / "x.json").read_text()) == {"a": [1, None]}
    with pytest.raises(ValueError, match="Out of range float"):
        tools.write_json(tmp_path / "y.json", {"a": float("nan")})


def test_a_worker_that_fails_is_named() -> None:
    with pytest.raises(tools.BenchError, match="train --rounds 0 ended with 2"):
        tools.in_own_process(["train", "--rounds", "0"])

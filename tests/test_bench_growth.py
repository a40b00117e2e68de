"""Lines through points, and a plan that says what it is."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import bench_growth as growth


def test_a_line_through_points_on_a_line_and_off_it() -> None:
    line = growth.straight([1, 2, 4], [5.0, 7.0, 11.0])
    assert line["slope"] == pytest.approx(2) and line["start"] == pytest.approx(3)
    assert line["r2"] == 1.0 and line["rise"] == 2.2
    assert growth.straight([1, 2, 3, 4], [1.0, 4.0, 9.0, 16.0])["r2"] < 0.98
    assert growth.straight([1, 2], [0.0, 3.0])["rise"] is None


def test_large_models_are_planned_and_compact_is_smaller() -> None:
    lines = growth.large_models()
    sizes = {(x["geometry"], x["vote_rule"], x["seq_len"], x["open_layers"]): x["planned_gb"] for x in lines}
    assert sizes["Qwen2.5-7B", "compact", 512, 28] < sizes["Qwen2.5-7B", "momentum", 512, 28]
    for line in lines:
        static = line["parameters"] * 2 / 1e9
        assert line["planned_gb"] > static and line["fits_24_gb"] == (line["planned_gb"] <= 24)
    assert {round(x["parameters"] / 1e9, 1) for x in lines} == {7.6, 14.8}


@pytest.mark.parametrize("first", [6.0, 0.0])
def test_a_picture_is_drawn(first: float, tmp_path: Path) -> None:
    """Also where the first point took no memory that had not been there already."""
    points = [
        {"seq_len": n, "processor_seconds": float(n), "peak_mb": first * n, "planned_mb": 6.0 + n} for n in (1, 2, 4)
    ]
    lines = {k: growth.straight([1, 2, 4], [p[k] for p in points]) for k in growth.FIGURES}
    pytest.importorskip("matplotlib")
    growth.draw(tmp_path / "growth.png", {"seq_len": {"points": points, "lines": lines}})
    assert (tmp_path / "growth.png").read_bytes().startswith(b"\x89PNG")


def test_a_point_is_what_it_was_asked_to_be(one_thread: None, monkeypatch: pytest.MonkeyPatch) -> None:
    # The allocator of the test process stays as it is.
    monkeypatch.setattr(growth, "return_freed_memory", lambda: True)
    found = growth.measure_point(growth.Point(layers=3, seq_len=16, micro_batches=2), "toy", 1)
    assert (found["layers"], found["seq_len"], found["micro_batches"]) == (3, 16, 2)
    smaller = growth.measure_point(growth.Point(layers=1, seq_len=16), "toy", 1)
    assert smaller["parameters"] < found["parameters"]
    json.dumps(found, allow_nan=False)

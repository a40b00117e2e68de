"""Reading curves: each method at its best rate, beside the baseline, at equal loss."""

from __future__ import annotations

import numpy as np
import pytest
from tiny_tasks import LINES, line

import quality_summary


def test_a_curve_begins_at_the_start_and_rises_with_the_rate() -> None:
    curve = quality_summary.curve_of([x for x in LINES[::-1] if x["method"] == "adamw"])
    assert np.allclose(curve, [(3.0, 0.0), (2.51, 0.1), (2.31, 0.4), (2.9, 1.0)])
    assert quality_summary.curve_of([]) == []


def test_forgetting_is_read_between_points_on_the_way_down() -> None:
    curve = [(3.0, 0.0), (2.5, 0.1), (2.3, 0.4), (2.9, 1.0)]
    assert quality_summary.forgetting_at(curve, 2.4) == pytest.approx(0.25)
    assert quality_summary.forgetting_at(curve, 2.75) == pytest.approx(0.05)
    assert quality_summary.forgetting_at(curve, 2.3) == pytest.approx(0.4)
    assert quality_summary.forgetting_at(curve, 2.2) is None
    assert quality_summary.forgetting_at([(3.0, 0.0), (3.0, 0.2)], 3.0) == 0.0


def test_the_summary_compares_at_best_and_at_equal_loss() -> None:
    adamw, momentum = quality_summary.summary([*LINES, line("momentum", 9e-3, 0, 1.0, 2.0, steps=2)], steps=5)
    assert (adamw.method, adamw.lr, adamw.rates) == ("adamw", 3e-3, 3)
    assert adamw.target == pytest.approx(2.31) and adamw.targets == (2.3, 2.32)
    assert adamw.target_ratio == adamw.forgetting_ratio == adamw.equal_ratio == 1.0
    assert (momentum.lr, momentum.target, momentum.rates) == (4e-3, 2.2, 2)
    assert momentum.forgetting == pytest.approx(0.3)
    assert momentum.forgetting_ratio == pytest.approx(0.75)
    assert momentum.target_ratio == pytest.approx(2.2 / 2.31)
    assert momentum.equal_target == pytest.approx(2.31)
    assert momentum.equal_forgetting == pytest.approx(0.1 + 0.2 * 0.09 / 0.2)
    assert momentum.equal_ratio == pytest.approx((0.1 + 0.2 * 0.09 / 0.2) / 0.4)
    assert not adamw.equal_rough and not momentum.equal_rough


def test_another_baseline_may_be_named() -> None:
    rows = {r.method: r for r in quality_summary.summary(LINES, baseline="momentum")}
    assert rows["momentum"].target_ratio == 1.0 and rows["adamw"].target_ratio == pytest.approx(2.31 / 2.2)


def test_a_best_rate_that_is_the_highest_tried_is_marked() -> None:
    """A higher one that diverged was tried; a single one says nothing of others."""
    rows = {r.method: r for r in quality_summary.summary(LINES)}
    assert not rows["adamw"].highest and not rows["momentum"].highest
    higher = quality_summary.summary([*LINES, *(line("adamw", 3e-2, s, 2.0, 3.0) for s in (0, 1))])
    assert higher[0].highest and quality_summary.cells(higher[0])[3] == "0.03^ (4)"
    (single,) = quality_summary.summary([line("lora", 1e-3, 0, 2.7, 2.02)])
    assert quality_summary.cells(single)[3] == "0.001 (1)"


def test_a_comparison_on_the_first_line_of_a_curve_is_marked() -> None:
    """A method that never comes as low as the baseline's lowest learning rate."""
    rows = {r.method: r for r in quality_summary.summary([*LINES, line("lora", 1e-3, 0, 2.7, 2.02)])}
    assert rows["lora"].equal_target == 2.7 and rows["lora"].equal_rough
    assert quality_summary.cells(rows["lora"])[-1].startswith("~")


def test_a_summary_without_baseline_or_with_missing_seeds() -> None:
    (row,) = quality_summary.summary([x for x in LINES if x["method"] == "momentum"])
    assert row.equal_ratio is row.target_ratio is None
    assert "-" in quality_summary.cells(row)
    half = quality_summary.summary([*LINES, line("momentum", 8e-3, 0, 2.0, 2.0)])
    assert half[1].lr == 8e-3
    table = quality_summary.markdown(half).splitlines()
    assert len(table) == 4 and {x.count("|") for x in table} == {len(quality_summary.COLUMNS) + 1}
    assert quality_summary.summary([line("lora", 1e-3, 0, None, 2.0)]) == []

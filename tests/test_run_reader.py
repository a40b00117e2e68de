"""Reading a run while it is written, cut, replaced and resumed; columns and the points that a screen gets of them."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

import pytest

import run_reader
from prime_telemetry import RunLog
from run_reader import Evaluation, History, Run, Tail, depth, number


def append(path: Path, text: str) -> None:
    with open(path, "a", encoding="utf-8") as file:
        file.write(text)


def lines(steps: Any, **fields: Any) -> str:
    return "".join(json.dumps({"step": s, "loss": float(s), **fields}) + "\n" for s in steps)


def history(values: list[float], name: str = "loss") -> History:
    found = History()
    for step, value in enumerate(values, 1):
        found.add({"step": step, name: value}, {})
    return found


# -- files ------------------------------------------------------------------------------------------------------------


def test_a_tail_gives_each_line_once_and_waits_for_torn_ones(tmp_path: Path) -> None:
    path = tmp_path / "stats.jsonl"
    tail = Tail(path)
    assert tail.read() == []
    append(path, '{"step": 1}\n{"step"')
    assert tail.read() == [{"step": 1}]
    assert tail.read() == []
    append(path, ": 2}\n")
    assert tail.read() == [{"step": 2}]
    append(path, 'rubbish\n[3]\n\n{"step": 4}\n\xff\n')
    assert tail.read() == [{"step": 4}]
    assert (tail.bad, tail.restarts) == (3, 0)


def test_a_torn_line_that_the_writer_closed_after_a_crash_is_passed_over(tmp_path: Path) -> None:
    run, log = Run(tmp_path), RunLog(tmp_path)
    log.stats(step=1, loss=2.0)
    append(tmp_path / "stats.jsonl", '{"step": 2, "lo')
    run.refresh()
    log.stats(step=2, loss=1.0)
    run.refresh()
    assert run.history.known("loss") == [(1, 2.0), (2, 1.0)]


@pytest.mark.parametrize("how", ["truncated", "rotated", "rewritten in place, longer"])
def test_another_file_is_read_from_its_beginning(tmp_path: Path, how: str) -> None:
    path = tmp_path / "stats.jsonl"
    path.write_text(lines(range(1, 9)))
    run = Run(tmp_path)
    run.refresh()
    before = run.generation
    if how == "rotated":
        os.rename(path, tmp_path / "stats.jsonl.1")
        run.refresh()
        assert len(run.history) == 8, "between two files the old one's lines stay"
    path.write_text(lines(range(1, 3 if how == "truncated" else 30), lr=0.5))
    run.refresh()
    assert list(run.history.steps) == list(range(1, 3 if how == "truncated" else 30))
    assert run.history.value("lr") == 0.5 and run.generation > before


def test_links_and_pipes_are_not_read(tmp_path: Path) -> None:
    (tmp_path / "secret").write_text(lines([1]))
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "stats.jsonl").symlink_to(tmp_path / "secret")
    (folder / "EVAL_x_step_1.json").symlink_to(tmp_path / "secret")
    os.mkfifo(folder / "events.jsonl")
    run = Run(folder)
    run.refresh()
    assert not run.exists and run.evaluations == []


def test_portions_have_the_same_end_as_the_whole(tmp_path: Path) -> None:
    (tmp_path / "stats.jsonl").write_text(lines(range(1, 500)))
    run, whole = Run(tmp_path), Run(tmp_path)
    looks = 0
    while run.refresh(limit=700):
        looks += 1
    whole.read_all()
    # As bytes: NaN is not equal to itself.
    columns = [{n: c.tobytes() for n, c in r.history.columns.items()} for r in (run, whole)]
    assert looks > 10 and run.behind == 0 and columns[0] == columns[1]
    assert list(run.history.steps) == list(range(1, 500))


def test_a_long_file_is_glanced_at_until_it_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_reader, "GLANCE_FROM", 10_000)
    path = tmp_path / "stats.jsonl"
    path.write_text(lines(range(1, 20_001)) + '{"step": 20001, "lo')
    run = Run(tmp_path)
    run.refresh(limit=50_000)
    assert run.glanced and 600 < len(run.history) < 20_000
    assert run.history.steps[0] == 1 and run.history.steps[-1] == 20_000
    assert list(run.history.steps) == sorted(set(run.history.steps))
    generation = run.generation
    while run.behind:
        run.refresh(limit=50_000)
    assert not run.glanced and list(run.history.steps) == list(range(1, 20_001))
    assert run.generation > generation, "a client that has the glance must begin anew"


# -- columns ----------------------------------------------------------------------------------------------------------


def test_numbers_that_are_none() -> None:
    found = [number(v) for v in (None, "1", True, float("nan"), float("inf"), 10**400, [1], {})]
    assert all(math.isnan(v) for v in found)
    assert number(3) == 3.0 and number(-0.5) == -0.5


def test_null_and_nan_leave_gaps_and_broken_lines_leave_nothing() -> None:
    found = History()
    for text in (
        '{"step": 1, "loss": null}',
        '{"step": 2, "loss": NaN, "movement": {"3": null, "head": 2.0}}',
        '{"step": 3, "loss": 1.5, "movement": {"3": 0.5, "x": 1, "../": 2}}',
        '{"step": "4", "loss": 1.0}',
        '{"step": -1, "loss": 1.0}',
        '{"step": true, "loss": 1.0}',
        '{"step": 5, "loss": {}, "movement": 7, "flips_by_layer": [1]}',
    ):
        found.add(json.loads(text), {})
    assert list(found.steps) == [1, 2, 3, 5]
    assert found.known("loss") == [(3, 1.5)]
    assert set(found.layers["movement"]) == {"3", "head"}
    _, layers, rows = found.heat("movement", 10)
    assert layers == ["head", "3"] and rows == [[None, 2.0, None, None], [None, None, 0.5, None]]


def test_flip_rates_come_from_flips_or_from_the_rates_of_matrices() -> None:
    found = History()
    grids = {"model.embed_tokens.grid": 0.5, "model.layers.12.mlp.up_proj.grid": 0.1, "model.layers.12.o.grid": 0.3}
    found.add({"step": 1, "flips_by_layer": {"head": 5, "12": 1, "7": 1}}, {"head": 10.0, "12": 4.0})
    found.add({"step": 2, "flip_rate_by_grid": grids}, {})
    rates = {name: list(column) for name, column in found.layers["flip_rate"].items()}
    assert rates == {"head": [0.5, 0.5], "12": [0.25, pytest.approx(0.2)]}


def test_after_a_return_later_steps_are_gone(tmp_path: Path) -> None:
    path = tmp_path / "stats.jsonl"
    path.write_text(lines(range(1, 16), flips_by_layer={"1": 1}))
    run = Run(tmp_path)
    run.refresh()
    generation = run.generation
    append(path, lines(range(13, 15), lr=0.5))
    run.refresh()
    assert list(run.history.steps) == list(range(1, 15))
    assert run.history.known("lr") == [(13, 0.5), (14, 0.5)]
    assert run.history.rewinds == 1 and run.generation > generation
    sizes = {len(c) for c in run.history.columns.values()}
    sizes |= {len(c) for known in run.history.layers.values() for c in known.values()}
    assert sizes == {14}


def test_points_keep_extremes_and_ends() -> None:
    values = [math.sin(i / 50) for i in range(10_000)]
    values[4321], values[8765], values[5000] = 99.0, -99.0, math.nan
    found = history(values)
    steps, columns = found.points(["loss"], 200)
    assert len(steps) <= 202 and steps[0] == 1 and steps[-1] == 10_000 and steps == sorted(set(steps))
    at = dict(zip(steps, columns["loss"], strict=True))
    assert at[4322] == 99.0 and at[8766] == -99.0 and max(v for v in columns["loss"] if v is not None) == 99.0
    inside, _ = found.points(["loss"], 200, first=100, last=150)
    assert inside == list(range(100, 151)), "what fits is whole"
    assert found.points(["loss"], 200, first=20_000)[0] == []
    assert json.dumps(columns, allow_nan=False)


def test_sparse_columns_keep_every_extreme_of_a_bucket() -> None:
    found = History()
    for step in range(1, 5001):
        found.add({"step": step, "loss": 1.0, "val_loss": 3.0 - step / 5000 if step % 500 == 0 else None}, {})
    steps, columns = found.points(["loss", "val_loss"], 100)
    known = [s for s, v in zip(steps, columns["val_loss"], strict=True) if v is not None]
    assert known == list(range(500, 5001, 500))


def test_heat_is_the_mean_of_what_is_known() -> None:
    found = History()
    for step in range(1, 101):
        found.add({"step": step, "movement": {"head": step, **({"0": 2.0} if step > 55 else {})}}, {})
    bounds, layers, rows = found.heat("movement", 10)
    assert bounds == [*range(1, 101, 10), 101] and layers == ["head", "0"]
    assert rows[0] == [5.5 + 10 * i for i in range(10)]
    assert rows[1] == [None] * 5 + [2.0] * 5
    bounds, _, rows = found.heat("movement", 10, 54, 57)
    assert bounds == [54, 55, 56, 57, 58] and rows[1] == [None, None, 2.0, 2.0]


def test_layers_are_sorted_from_the_head_down() -> None:
    assert sorted(["0", "10", "head", "9"], key=depth) == ["head", "10", "9", "0"]


# -- the rest of a folder ---------------------------------------------------------------------------------------------


def test_config_events_samples_and_evaluations(tmp_path: Path) -> None:
    run, log = Run(tmp_path), RunLog(tmp_path)
    run.refresh()
    assert not run.exists and not run.refresh()
    log.config({"steps": 7, "layer_weights": {"head": 10, "0": 4}})
    log.event("start", step=0)
    log.sample(step=1, prompt="a", text="first")
    log.sample(step=2, prompt="a", text="second")
    log.sample(step=1, prompt="a", text="again")
    score = {"scores": {"nll": 2.5, "passed": [3, 4], "none": None, "odd": "x", "bad": [1]}, "step": 5, "name": "core"}
    (tmp_path / "EVAL_core_step_5.json").write_text(json.dumps({**score, "kind": "core"}))
    (tmp_path / "EVAL_torn_step_6.json").write_text('{"scores": {')
    (tmp_path / "EVAL_no_number.json").write_text("{}")
    assert run.refresh()
    assert run.config["steps"] == 7 and run.weights == {"head": 10.0, "0": 4.0}
    assert [s["text"] for s in run.samples.values()] == ["second", "again"]
    expected = Evaluation("core", 5, "core", {"nll": 2.5, "passed": (3, 4), "none": None, "odd": None})
    assert run.evaluations == [expected]
    (tmp_path / "EVAL_torn_step_6.json").write_text('{"scores": {"nll": 2}}')
    (tmp_path / "config.json").write_text('{"steps": ')
    assert run.refresh() and [e.step for e in run.evaluations] == [5, 6]
    assert run.config["steps"] == 7, "a torn configuration does not replace a whole one"
    (tmp_path / "EVAL_core_step_5.json").unlink()
    assert run.refresh() and [e.step for e in run.evaluations] == [6]
    assert not run.refresh()


def test_after_a_return_samples_and_evaluations_of_later_steps_are_gone(tmp_path: Path) -> None:
    def evaluation(step: int, written: float) -> None:
        path = tmp_path / f"EVAL_x_step_{step}.json"
        path.write_text(json.dumps({"name": "x", "step": step, "scores": {"suite": [step, 400]}}))
        os.utime(path, (written, written))

    def line(name: str, **fields: Any) -> None:
        with open(tmp_path / name, "a") as file:
            file.write(json.dumps(fields) + "\n")

    run = Run(tmp_path)
    for step in (100, 200, 300):
        line("samples.jsonl", step=step, prompt="p", text=f"before {step}", timestamp=1000.0 + step)
        evaluation(step, 1000.0 + step)
    run.refresh()
    assert [step for step, _ in run.samples] == [e.step for e in run.evaluations] == [100, 200, 300]
    line("events.jsonl", event="roll_back", step=310, to=100, timestamp=1310.0)
    assert run.refresh()
    assert [step for step, _ in run.samples] == [e.step for e in run.evaluations] == [100]
    line("samples.jsonl", step=200, prompt="p", text="after", timestamp=1410.0)
    line("samples.jsonl", step=300, prompt="q", text="no time is known")
    evaluation(200, 1410.0)
    for reader in (run, Run(tmp_path)):
        reader.refresh()
        assert [s["text"] for s in reader.samples.values()] == ["before 100", "after", "no time is known"]
        assert [e.step for e in reader.evaluations] == [100, 200]
    (tmp_path / "events.jsonl").write_text("")
    run.refresh()
    assert [e.step for e in run.evaluations] == [100, 200, 300], "another run's events: nothing is known of a return"


def test_a_folder_that_comes_later(tmp_path: Path) -> None:
    run = Run(tmp_path / "later")
    assert not run.refresh()
    RunLog(tmp_path / "later").stats(step=1, loss=1.0)
    assert run.refresh() and len(run.history) == 1

"""One frame of the terminal monitor: what stands in it, at any width and height, whatever the run."""

from __future__ import annotations

import io
import json
import os
import pty
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from watched_run import STEPS, append, copy_run, cut, recorded_line

import monitor_terminal
import run_reader
from monitor_terminal import amount, grouped, render, share, sparkline, status_line
from prime_telemetry import RunLog, this_process
from run_reader import Evaluation, Run
from run_summary import Layer, duration, harmless, names_of, score_table, score_text, summarize

ROOT = Path(__file__).resolve().parent.parent


def frame(folder: Path, now: float | None = None, width: int = 80, height: int | None = None) -> list[str]:
    """The lines of a frame without colour."""
    run = Run(folder)
    run.read_all()
    out = io.StringIO()
    now = run.history.value("timestamp") + 3 if now is None and run.history else now or time.time()
    Console(file=out, width=width, height=height or 50).print(render(run, now, width, height))
    return out.getvalue().splitlines()


def line_of(lines: list[str], begin: str) -> str:
    return next(line for line in lines if line.startswith(begin))


@pytest.fixture
def finished(tmp_path: Path) -> Path:
    return copy_run(tmp_path / "run")


# -- a frame ----------------------------------------------------------------------------------------------------------


def test_a_finished_run(finished: Path) -> None:
    lines = frame(finished)
    text = "\n".join(lines)
    last = recorded_line(STEPS)
    assert lines[0].startswith("tiny_coder") and "● finished" in lines[0]
    assert f"step {STEPS} of {STEPS}" in text and "100 %" in text
    assert "CRYSTALLIZATION  all 6 layers are open" in text
    assert f"{last['val_loss']:.4f}" in line_of(lines, "held-out")
    assert f"{last['flips']:,} weights moved" in line_of(lines, "flip rate")
    assert f"{last['flips_by_layer']['head']:,}" in line_of(lines, "■ head")
    assert f"{last['tokens']:,} tokens seen" in line_of(lines, "data")
    assert "of 25.28 GB" in line_of(lines, "memory")
    assert f"step {STEPS}" in line_of(lines, "last save") and "layers opened 5 and 4" in text
    assert "SAMPLES  step 240" in text and "SCORES" in text and "nll" in line_of(lines, "SCORES")


def test_a_layer_peel_on_its_way(finished: Path) -> None:
    lines = frame(cut(finished, 65))
    text = "\n".join(lines)
    assert "LAYER PEEL  4 of 6 layers are open" in text
    assert "head ■  5 ■ ■ ◆ ◆ □ □ 0" in text, "3 and 2 have just opened"
    assert re.search(r"next  1 and 0 open at step 81  in 15 steps, \d+ (s|min)", text)
    assert [line_of(lines, f"□ {n}").split(None, 2)[2] for n in (1, 0)] == ["locked, opens at step 81"] * 2
    assert line_of(lines, "◆ 3").endswith("opened")
    last, before = recorded_line(65), recorded_line(16)
    assert f"{last['flips_by_layer']['5']:,}" in line_of(lines, "■ 5")
    s = summarize(_read(finished), last["timestamp"])
    assert (s.state, s.how) == ("running", "lines keep coming")
    assert s.pace == pytest.approx((last["timestamp"] - before["timestamp"]) / 49)
    assert s.eta == pytest.approx(s.pace * (STEPS - 65)) and s.next_eta == pytest.approx(s.pace * 15)


def _read(folder: Path) -> Run:
    run = Run(folder)
    run.read_all()
    return run


def test_the_head_alone_is_stabilization(finished: Path) -> None:
    text = "\n".join(frame(cut(finished, 20)))
    assert "STABILIZATION  the head alone is open" in text and "head ■  5 □ □ □ □ □ □ 0" in text
    assert "5 and 4 open at step 41" in text


@pytest.mark.parametrize("width", [60, 80, 100, 200])
@pytest.mark.parametrize("height", [None, 10, 24, 40])
def test_every_line_fits(finished: Path, width: int, height: int | None) -> None:
    for steps in (STEPS, 65, 1):
        lines = frame(cut(finished, steps) if steps < STEPS else finished, width=width, height=height)
        assert max(map(len, lines)) <= min(width, 120)
        assert height is None or len(lines) <= height
        assert lines[0].startswith("tiny_coder")


def test_layers_share_lines_where_there_are_many() -> None:
    def layer(name: str, state: Any) -> Layer:
        return Layer(name, state, None, 10, 0.5, 1e-3, 0.1, 0.2, 0.0, None)

    layers = [layer("head", "open"), *(layer(str(n), "open" if n > 13 else "locked") for n in range(27, -1, -1))]
    rows = grouped(layers, 9)
    assert len(rows) <= 9 and [layer for row in rows for layer in row.layers] == layers
    assert rows[0].name == "head" and rows[-1].name == "13 to 0"
    assert rows[1].total("flips") == 10 * len(rows[1].layers) and rows[1].mean("movement") == 1e-3
    assert len(grouped(layers, 100)) == 29


def test_what_a_run_writes_cannot_command_the_terminal(finished: Path) -> None:
    evil = "\x1b]0;owned\x07\x1b[2J\x9b31m\r\u202egpj[bold red]x[/]\nline"
    append(finished / "samples.jsonl", step=999, prompt=evil, text=evil, reference=evil, timestamp=1.0)
    append(finished / "events.jsonl", event=f"od{evil}d", step=240, reason=evil, timestamp=2e9)
    config = json.loads((finished / "config.json").read_text())
    (finished / "config.json").write_text(json.dumps({**config, "checkpoint": f"{evil}.pt"}))
    text = "\n".join(frame(finished, width=120))
    assert "SAMPLES  step 999" in text and "[bold red]" in text and "␛]0;owned␇" in text
    assert not re.search("[\x00-\x09\x0b-\x1f\x7f-\x9f\u202e]", text)


def test_numbers_that_are_missing(tmp_path: Path) -> None:
    run = RunLog(tmp_path)
    run.stats(step=1, loss=None)
    assert "step 1" in status_line(_read(tmp_path), time.time())
    text = "\n".join(frame(tmp_path, time.time()))
    assert "running" in text and "nan" not in text.lower() and "None" not in text
    run.config({"steps": "many", "layer_weights": {"head": 0}, "phases": [{"step": "x"}, 3], "memory_total_bytes": -1})
    run.event("peel", step=1, opened="all", closed=None)
    run.event("save", step=None, path=3)
    run.event("governor", layer=1)
    run.stats(step=2, loss=1.5, mem_peak_bytes=10, data={"epoch": 1, "block": 2, "row": 30, "rows": 400})
    run.stats(step=3, loss=1.5, data_seconds=1.0, seconds=3.0, tokens_per_s=10.0)
    text = "\n".join(frame(tmp_path, time.time()))
    assert "33.3 % waiting for data" in text and "nan" not in text.lower().replace("nan, limit nan", "")


def test_data_position(tmp_path: Path) -> None:
    RunLog(tmp_path).stats(step=1, loss=1.0, tokens=5000, data={"epoch": 1, "block": 2, "row": 30, "rows": 4000})
    assert line_of(frame(tmp_path), "data").split(None, 1)[1] == "epoch 1, block 2, row 30 of 4,000, 5,000 tokens seen"


# -- the state of a run -----------------------------------------------------------------------------------------------


def state(folder: Path, now: float | None = None) -> tuple[str, str]:
    s = summarize(_read(folder), now)
    return s.state, s.how


def test_states_and_how_they_are_known(tmp_path: Path) -> None:
    assert state(tmp_path / "absent")[0] == "waiting"
    run = RunLog(tmp_path)
    run.config({"steps": 5})
    assert state(tmp_path) == ("waiting", "config.json is there, no step yet")
    run.event("start", step=0, process=this_process())
    assert state(tmp_path)[0] == "waiting"
    run.stats(step=1, loss=1.0, seconds=2.0)
    assert state(tmp_path) == ("running", f"process {os.getpid()}")
    found, how = state(tmp_path, time.time() + 1000)
    assert found == "stale" and "no line for 16 min 4" in how and "still lives" in how
    run.event("signal", step=1, signal="SIGTERM")
    run.event("end", step=1)
    assert state(tmp_path) == ("stopped", "by SIGTERM; --resume goes on")
    run.event("start", step=1, process={**this_process(), "host": "elsewhere"})
    assert state(tmp_path) == ("running", "lines keep coming")
    assert "cannot be seen from here" in state(tmp_path, time.time() + 1000)[1]
    run.event("failed", step=1, reason="no more")
    assert state(tmp_path) == ("crashed", "it said: no more")
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    run.event("start", step=1, process={**this_process(), "pid": gone.pid})
    found, how = state(tmp_path)
    assert found == "crashed" and "gone without a word" in how
    run.event("end", step=5)
    assert state(tmp_path)[0] == "finished"


def test_a_long_finished_run_is_not_called_crashed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its end stands behind more events than one look reads, and its process is gone."""
    monkeypatch.setattr(run_reader, "GLANCE_FROM", 2000)
    run = RunLog(tmp_path)
    gone = {**this_process(), "ticks": 0}
    run.event("start", step=0, checkpoint="x_prime_init.pt", process=gone)
    for step in range(1, 3001):
        append(tmp_path / "stats.jsonl", step=step, loss=1.0, timestamp=1e9 + step, seconds=1.0)
        append(tmp_path / "events.jsonl", event="save", step=step, place="x" * 99, timestamp=1e9 + step)
    run.event("end", step=3000, path="x")
    run.sample(step=3000, prompt="p", text="the last words")
    first = Run(tmp_path)
    first.refresh()
    assert first.glanced and first.events_behind and first.behind > 0
    s = summarize(first)
    assert (s.state, s.how) == ("waiting", "its events are still being read")
    out = io.StringIO()
    monitor_terminal.show_once(Run(tmp_path), Console(file=out, width=80), time.time())
    assert "● finished" in out.getvalue() and "the last words" in out.getvalue()


def test_best_is_of_the_whole_run_and_knows_the_first_evaluation(tmp_path: Path) -> None:
    run = RunLog(tmp_path)
    run.event("evaluation", step=0, val_loss=1.5)
    for step, value in ((1, 2.0), (2, None), (3, 1.75)):
        run.stats(step=step, loss=1.0, val_loss=value)
    s = summarize(_read(tmp_path))
    assert (s.best, s.best_step, s.val_loss, s.val_step) == (1.5, 0, 1.75, 3)


def test_a_run_without_a_plan_shows_what_its_steps_say(finished: Path) -> None:
    config = json.loads((finished / "config.json").read_text())
    del config["phases"], config["layer_weights"]
    (finished / "config.json").write_text(json.dumps(config))
    s = summarize(_read(cut(finished, 85)))
    assert [layer.name for layer in s.layers] == ["head", "5", "4", "3", "2", "1", "0"]
    assert s.unlocks == [(41, "5 and 4"), (61, "3 and 2"), (81, "1 and 0")] and s.next_step is None


# -- small pieces -----------------------------------------------------------------------------------------------------


def test_small_pieces() -> None:
    assert sparkline([1, 2, float("nan"), 3]) == "▁▄▄▇" and sparkline([float("nan"), 2, 1]) == " ▇▁"
    assert sparkline([float("nan")]) == "" and sparkline([5, 5]) == "▃▃"
    assert [amount(v) for v in (None, 0, 1234.5, 0.00012345)] == ["-", "0", "1.23e+03", "1.2e-04"]
    assert [share(v) for v in (None, 0, 0.5, 0.00001)] == ["-", "0.0 %", "50.0 %", "0.001 %"]
    assert [duration(s) for s in (None, 5, 125, 3700, 100000)] == ["-", "5 s", "2 min 05 s", "1 h 01 min", "1 d 3 h"]
    assert [names_of(n) for n in ((), (3,), (2, 3), (0, 1, 2, 9))] == ["", "3", "3 and 2", "9 and 2 to 0"]
    assert harmless("a\x00\x7f\x85\u2066é\ud800\t") == "a␀␡\\u0085\\u2066é\\ud800\t"
    assert [score_text(s) for s in (None, 0.5, (3, 4), (0, 0))] == ["-", "0.5", "3 / 4 (75%)", "0 / 0"]


def test_scores_have_a_row_per_checkpoint() -> None:
    found = [
        Evaluation("a", 60, "tiny", {"nll": 2.5, "suite": (3, 4), "suite.code": (1, 2), "text.nll": 1.0}),
        Evaluation("b", 60, "core", {"nll": 2.0}),
        Evaluation("a", 120, "quick", {"nll": None, "suite": (5, 40)}),
    ]
    columns, rows = score_table(found)
    assert columns == ["a nll", "suite", "text.nll", "b nll"], "parts of a score that is there are left out"
    assert rows == [(60, ["2.5", "3 / 4 (75%)", "1", "2"]), (120, ["-", "5 / 40 (12%)", "", ""])]
    assert score_table(found[:1])[0] == ["nll", "suite", "text.nll"]
    assert score_table([]) == ([], [])


# -- watching ---------------------------------------------------------------------------------------------------------


def read_until(descriptor: int, text: str, seconds: float = 20.0) -> str:
    """What a pseudo terminal has said until it says ``text``."""
    said, deadline = "", time.monotonic() + seconds
    while text not in said and time.monotonic() < deadline:
        try:
            said += os.read(descriptor, 65536).decode(errors="replace")
        except OSError:
            break
    return said


@pytest.mark.skipif(sys.platform != "linux", reason="needs a pseudo terminal as Linux has them")
def test_on_a_terminal_a_new_step_appears_and_ctrl_c_leaves_the_frame(finished: Path) -> None:
    cut(finished, 65)
    primary, secondary = pty.openpty()
    environment = {**os.environ, "TERM": "xterm-256color", "COLUMNS": "80", "LINES": "50"}
    command = [sys.executable, str(ROOT / "monitor_qwen.py"), str(finished)]
    process = subprocess.Popen(
        command,
        stdin=secondary,
        stdout=secondary,
        stderr=secondary,
        env=environment,
        # Tests that run in the background of a script ignore Ctrl-C, and children would inherit it.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    os.close(secondary)
    try:
        first = read_until(primary, "SAMPLES")
        assert "step 65 of 240" in first and "\x1b[?1049h" in first, "a screen of its own, in colour"
        append(finished / "stats.jsonl", **recorded_line(66))
        assert "step 66 of 240" in read_until(primary, "step 66 of 240")
        process.send_signal(2)
        last = read_until(primary, "SAMPLES") + read_until(primary, "never said", 0.5)
        assert "step 66 of 240" in last.rpartition("\x1b[?1049l")[2]
        assert process.wait(timeout=60) == 0
    finally:
        process.kill()
        process.wait()
        os.close(primary)


def test_through_a_pipe_a_line_for_news_until_the_end(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert monitor_terminal.terminal(finished, once=False, console=Console(width=40)) == 0
    said = capsys.readouterr().out
    assert said.startswith("finished, step 240 of 240 · loss ") and said.count("\n") == 1

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path

from prime_telemetry import RunLog, is_alive, read_lines, this_process


def test_lines_are_appended_whole_and_read_back(tmp_path: Path) -> None:
    run = RunLog(tmp_path / "run")
    run.stats(step=1, loss=2.5, path=Path("a/b"))
    run.stats(step=2, loss=2.0)
    run.event("save", step=2)
    lines = list(read_lines(tmp_path / "run" / "stats.jsonl"))
    assert [x["step"] for x in lines] == [1, 2] and lines[0]["path"] == "a/b"
    assert all(x["timestamp"] > 1.7e9 for x in lines)
    assert next(read_lines(tmp_path / "run" / "events.jsonl"))["event"] == "save"


def test_numbers_that_json_lacks_become_null(tmp_path: Path) -> None:
    run = RunLog(tmp_path)
    run.stats(loss=math.nan, nested={"a": [math.inf, 1.0]})
    raw = (tmp_path / "stats.jsonl").read_text()
    assert "NaN" not in raw and "Infinity" not in raw
    line = json.loads(raw)
    assert line["loss"] is None and line["nested"]["a"] == [None, 1.0]


def test_a_torn_line_is_passed_over_and_does_not_swallow_the_next(tmp_path: Path) -> None:
    run = RunLog(tmp_path)
    run.stats(step=1)
    with open(tmp_path / "stats.jsonl", "a") as file:
        file.write('{"step": 2, "lo')
    assert [x["step"] for x in read_lines(tmp_path / "stats.jsonl")] == [1]
    run.stats(step=3)
    assert [x["step"] for x in read_lines(tmp_path / "stats.jsonl")] == [1, 3]


def test_lines_that_are_no_objects_and_missing_files(tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").write_bytes(b'3\n\xff\xfe\n[1]\n\n{"a": 1}\n')
    assert list(read_lines(tmp_path / "x.jsonl")) == [{"a": 1}]
    assert list(read_lines(tmp_path / "absent.jsonl")) == []


def test_a_process_is_told_from_others_and_from_its_successors() -> None:
    mine = this_process()
    assert is_alive(mine) is True
    assert is_alive({**mine, "host": "elsewhere"}) is None and is_alive({}) is None
    if mine["ticks"] is not None:
        assert is_alive({**mine, "ticks": mine["ticks"] - 1}) is False
    code = "import json, prime_telemetry; print(json.dumps(prime_telemetry.this_process()))"
    ended = json.loads(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout)
    assert is_alive(ended) is False

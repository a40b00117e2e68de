"""The monitor's command: its line, its start, one frame."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from watched_run import copy_run

import monitor_qwen
from monitor_qwen import MonitorConfig, parse

ROOT = Path(__file__).resolve().parent.parent


def test_the_command_line() -> None:
    assert parse(["a"]) == MonitorConfig(runs=(Path("a"),))
    given = parse(["a", "b", "--web", "--host", "::1", "--port", "0"])
    assert given == MonitorConfig(runs=(Path("a"), Path("b")), web=True, host="::1", port=0)
    remote = parse(["a", "--web", "--host", "0.0.0.0", "--allow-remote", "--token-file", "t"])
    assert remote.allow_remote and remote.token_file == Path("t")


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        ([], "RUN"),
        (["a", "b"], "--web"),
        (["a", "--web", "--once"], "choose one"),
        (["a", "--web", "--host", "0.0.0.0"], "--allow-remote"),
        (["a", "--allow-remote"], "add --web"),
        (["a", "--port", "70000"], "70000"),
        (["a", "--port", "x"], "--port"),
        (["a", "--hots", "x"], "--hots"),
        ([__file__], "expected a run's folder"),
    ],
)
def test_bad_usage_exits_2_with_one_line(arguments: list[str], word: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        monitor_qwen.run(arguments)
    said = capsys.readouterr().err
    assert stop.value.code == 2 and word in said and said.startswith("error: ") and said.count("\n") == 1


def test_defaults_stand_in_one_place() -> None:
    assert parse(["a"]).host == MonitorConfig.host == "127.0.0.1" and parse(["a"]).port == MonitorConfig.port == 8005


def test_once_prints_a_plain_frame_and_needs_no_torch(tmp_path: Path) -> None:
    copy_run(tmp_path / "run")
    code = (
        "import sys, monitor_qwen; code = monitor_qwen.run(sys.argv[1:]); "
        "slow = {'torch', 'numpy', 'transformers', 'tyro', 'http.server'} & sys.modules.keys(); "
        "print(slow, file=sys.stderr); sys.exit(code)"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "run"), "--once"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=60)
    assert (done.returncode, done.stderr) == (0, "set()\n")
    assert "step 240 of 240" in done.stdout and "\x1b" not in done.stdout
    assert max(map(len, done.stdout.splitlines())) <= 80


def test_once_waits_politely(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    copy_run(tmp_path / "parent" / "run")
    assert monitor_qwen.run([str(tmp_path / "parent"), "--once"]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "waiting" in said and "There is a run in" in said
    assert monitor_qwen.run([str(tmp_path / "nowhere" / "deep"), "--once"]) == 0


def test_what_cannot_be_served_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert monitor_qwen.run([str(tmp_path), "--web", "--host", "203.0.113.1", "--allow-remote", "--port", "0"]) == 1
    assert capsys.readouterr().err.startswith("error: cannot serve at 203.0.113.1")

"""Every parser meets some hundred hostile files; tests/fuzz/run.py is the long form."""

from __future__ import annotations

import logging
import os
import random
import signal
import time
from pathlib import Path

import pytest
from fuzz import run as fuzzing
from fuzz.run import Target, build_targets, fuzz, mutate

import prime_cli
from text_records import DataError

pytestmark = pytest.mark.usefixtures("one_thread")

KINDS = ["checkpoint", "packed", "low-bit", "patch", "shard", "manifest", "records", "stats", "report", "problems"]
KINDS += ["list of records", "run config", "model config"]


@pytest.fixture(scope="module")
def targets(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Target]:
    return build_targets(tmp_path_factory.mktemp("targets"))


def test_every_kind_is_a_target(targets: dict[str, Target]) -> None:
    assert sorted(targets) == sorted(KINDS)


@pytest.mark.parametrize("kind", KINDS)
def test_good_files_are_read_and_hostile_ones_refused(targets: dict[str, Target], tmp_path: Path, kind: str) -> None:
    target = targets[kind]
    (tmp_path / target.name).write_bytes(target.data)
    target.parse(tmp_path / target.name)
    seed = random.SystemRandom().randrange(1 << 40)
    found = fuzz(target, tmp_path, seed, 1.0, [t.data for t in targets.values()], least=5)
    assert found.files >= 5 and not found.failed


def test_the_harness_notices(targets: dict[str, Target], tmp_path: Path) -> None:
    """A parser that raises something else, takes a terabyte, hangs, or crashes."""

    def wrong(path: Path) -> None:
        if path.read_bytes() != b"good":
            raise ZeroDivisionError

    def hangs(path: Path) -> None:
        while True:
            pass

    def dies(path: Path) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    for parse, words in (
        (wrong, "ZeroDivisionError"),
        (lambda path: bytearray(1 << 40), "MemoryError"),
        (hangs, "TooSlow"),
        (dies, "ended with -9"),
    ):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(fuzzing, "SECONDS", 0.3)
            failed = fuzz(Target(b"good", parse, ()), tmp_path, 1, 0.2, [b"x" * 50]).failed
        assert failed and words in failed[0][1]


def test_a_pause_of_the_process_is_no_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A process that was stopped meets the alarm when it goes on; one that sleeps meets it again and again."""
    monkeypatch.setattr(fuzzing, "SECONDS", 0.1)
    for pause, found in ((0.15, "None"), (20.0, "TooSlow")):
        target = Target(b"", lambda path: time.sleep(pause), ())  # noqa: B023
        assert str(fuzzing.attempt(target, tmp_path / "x", b"")).startswith(found)


def test_changes_come_again_from_their_seed(targets: dict[str, Target]) -> None:
    pool = [b"x" * 50]
    for target in targets.values():
        first, again, other = (mutate(target, random.Random(seed), pool) for seed in (5, 5, 6))
        assert first == again and (first != other or len(target.data) < 10)


def test_messages_and_log_lines_cannot_steer_a_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    from dataclasses import dataclass

    @dataclass(frozen=True)
    class Config:
        """Nothing."""

    def main(config: Config) -> int:
        logging.getLogger("data").warning("a row: %s", "\x1b]0;owned\x07\x9b31m")
        raise DataError("a row:\n \x1b[2J in row 3")

    root = logging.getLogger()
    before, level = root.handlers[:], root.level
    root.handlers.clear()
    try:
        assert prime_cli.run(Config, main, (DataError,), []) == 1
    finally:
        root.handlers[:], root.level = before, level
    shown = capsys.readouterr().err
    assert "\x1b" not in shown and "\x07" not in shown and "\x9b" not in shown
    assert shown.splitlines() == ["a row: \u241b]0;owned\u2407\\u009b31m", "error: a row: \u241b[2J in row 3"]

"""Checkpoints of a run: which are kept, which is best, which is the newest whole one."""

from __future__ import annotations

import os
import shutil
import types
from pathlib import Path
from typing import Any

import pytest
from tiny_models import import_source, tiny_config, write_source

import run_folder
from prime_checkpoint import load_checkpoint
from run_folder import RunFolder, RunLocked, run_name


@pytest.fixture(scope="module")
def content(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("content")
    import_source(write_source(folder / "source", tiny_config()), folder / "x.pt")
    return load_checkpoint(folder / "x.pt")


def test_names() -> None:
    for file in ("a-b_prime_init.pt", "a-b_prime_step_12.pt", "a-b_prime_step_12_stopped.pt", "a-b_prime_best.pt"):
        assert run_name(Path("x") / file) == "a-b"
    assert run_name(Path("other.pt")) == "other"


def test_the_last_few_are_kept_and_the_best_beside_them(content: dict[str, Any], tmp_path: Path) -> None:
    folder = RunFolder(tmp_path, "a", 2)
    assert folder.saved() == [] and folder.newest() is None
    for step in (0, 5, 10, 100):
        folder.save(step, content, is_best=step == 5)
    (tmp_path / "b_prime_step_7.pt").write_bytes(b"another run's")
    assert [step for step, _ in folder.saved()] == [10, 100]
    assert folder.best.exists() and folder.best.stat().st_nlink == 1
    assert load_checkpoint(folder.best)["stage"] == "init"
    folder.save(101, content, is_best=True, prune=False)
    assert [step for step, _ in folder.saved()] == [10, 100, 101]
    assert folder.best.samefile(tmp_path / "a_prime_step_101.pt")
    folder.make_best(tmp_path / "a_prime_step_101.pt")
    assert folder.best.samefile(tmp_path / "a_prime_step_101.pt") and not list(tmp_path.glob("*.new"))


def test_the_newest_whole_one(content: dict[str, Any], tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = RunFolder(tmp_path, "a", 5)
    for step in (1, 2, 3):
        folder.save(step, content, is_best=False)
    damaged = tmp_path / "a_prime_step_3.pt"
    damaged.write_bytes(damaged.read_bytes()[:-100])
    found = folder.newest()
    assert found is not None and found[0].name == "a_prime_step_2.pt" and "step_3" in caplog.text
    earlier = folder.newest(at_most=1)
    assert earlier is not None and earlier[0].name == "a_prime_step_1.pt"
    assert folder.newest(at_most=0) is None


def test_where_a_run_stopped_is_newer_than_the_step_before_and_goes_with_the_next_save(
    content: dict[str, Any], tmp_path: Path
) -> None:
    folder = RunFolder(tmp_path, "a", 2)

    def next_one() -> str:
        found = folder.newest_to_resume()
        assert found is not None
        return found[0].name

    for step in (4, 8):
        folder.save(step, content, is_best=False)
    assert folder.save_stopped(8, content).name == next_one() == "a_prime_step_8_stopped.pt"
    assert [step for step, _ in folder.saved()] == [4, 8] and folder.newest(at_most=9)[0].name == "a_prime_step_8.pt"
    # Nothing to return to, nothing that is kept twice, no other run's.
    folder.save_stopped(11, content)
    assert folder.stopped() == [(11, tmp_path / "a_prime_step_11_stopped.pt")] and folder.other_names() == []
    (tmp_path / "a_prime_step_11_stopped.pt").write_bytes(b"damaged")
    assert next_one() == "a_prime_step_8.pt"
    folder.save_stopped(11, content)
    # A save that was killed before it could tidy up leaves both.
    shutil.copy(tmp_path / "a_prime_step_8.pt", tmp_path / "a_prime_step_12.pt")
    assert next_one() == "a_prime_step_12.pt"
    folder.save(12, content, is_best=False)
    assert folder.stopped() == [] and [step for step, _ in folder.saved()] == [8, 12]


def test_where_a_run_stopped_after_a_return_is_what_it_goes_on_from(content: dict[str, Any], tmp_path: Path) -> None:
    folder = RunFolder(tmp_path, "a", keep_last=3)
    for step in (8, 9):
        folder.save(step, content, is_best=False, prune=False)
    folder.save_stopped(8, content)
    found = folder.newest_to_resume()
    assert found is not None and found[0].name == "a_prime_step_8_stopped.pt"
    assert [step for step, _ in folder.saved()] == [8]


def test_room_for_what_a_run_may_come_to_hold(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three checkpoints, an older best one and one being written; what is there already counts once."""
    folder = RunFolder(tmp_path, "x", keep_last=3)
    free = 350
    monkeypatch.setattr(shutil, "disk_usage", lambda where: types.SimpleNamespace(free=free))
    assert folder.lacks_room(70, 9) is None
    assert folder.lacks_room(71, 9) == (355, 350)
    assert folder.lacks_room(100, 3) is None and folder.lacks_room(100, 4) == (400, 350)
    for step in (1, 2):
        (tmp_path / f"x_prime_step_{step}.pt").write_bytes(bytes(100))
    (tmp_path / "x_prime_best.pt").hardlink_to(tmp_path / "x_prime_step_1.pt")
    (tmp_path / "y_prime_step_1.pt").write_bytes(bytes(100))
    assert folder.lacks_room(110, 9) is None
    assert folder.lacks_room(111, 9) == (555, 550)
    assert folder.other_names() == ["y"]
    (tmp_path / "x_prime_step_2_stopped.pt").write_bytes(bytes(100))
    assert folder.lacks_room(108, 9) is None
    assert folder.lacks_room(109, 9) == (654, 650)

    def silent(where: Path) -> None:
        raise OSError("no such thing on this file system")

    monkeypatch.setattr(shutil, "disk_usage", silent)
    assert folder.lacks_room(10**9, 9) is None


def test_without_hard_links_the_best_is_a_copy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(source: Path, target: Path) -> None:
        raise OSError("no links here")

    (tmp_path / "a").write_bytes(b"content")
    monkeypatch.setattr(os, "link", refuse)
    run_folder._link_or_copy(tmp_path / "a", tmp_path / "b")
    assert (tmp_path / "b").read_bytes() == b"content" and not (tmp_path / "a").samefile(tmp_path / "b")


def test_a_lock_leaves_a_folder_only_where_there_is_something_in_it(tmp_path: Path) -> None:
    pytest.importorskip("fcntl")
    empty, used = RunFolder(tmp_path / "empty", "a", 1), RunFolder(tmp_path / "used", "a", 1)
    with pytest.raises(ValueError), empty.lock():
        raise ValueError("refused")
    with pytest.raises(ValueError), used.lock():
        (used.folder / "stats.jsonl").write_text("{}\n")
        raise ValueError("broken off")
    assert [path.name for path in tmp_path.iterdir()] == ["used"]
    with used.lock(), pytest.raises(RunLocked, match="running process"), RunFolder(used.folder, "b", 1).lock():
        pass


def test_a_lock_on_what_has_lost_its_name_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Somebody else left, and took the file away, between its being opened and being locked."""
    fcntl = pytest.importorskip("fcntl")
    flock, folder = fcntl.flock, tmp_path / "run"

    def late(file: Any, how: int) -> None:
        (folder / run_folder.LOCK).unlink()
        flock(file, how)

    monkeypatch.setattr(fcntl, "flock", late)
    with pytest.raises(RunLocked, match="just left"), RunFolder(folder, "a", 1).lock():
        raise AssertionError("never entered")

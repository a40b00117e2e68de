"""Crash safety in short (tests/crash/kill_runs.py is the long form), and the order of a save, for power cuts."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from crash import kill_runs, soak
from crash.kill_runs import (
    Blow,
    Reference,
    Stage,
    Tally,
    at_random,
    blows,
    seen_by_the_kernel,
    strike,
    undisturbed,
    wait,
)
from tiny_models import tiny_config, write_source

from prime_checkpoint import load_checkpoint
from run_folder import LOCK, RunFolder, RunLocked

ROOT = Path(__file__).resolve().parent.parent

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def stage(tmp_path_factory: pytest.TempPathFactory) -> Stage:
    return Stage.build(tmp_path_factory.mktemp("stage"))


@pytest.fixture(scope="module")
def reference(stage: Stage) -> Reference:
    return undisturbed(stage)


def test_a_save_is_a_few_calls_and_all_of_them_are_tried(reference: Reference) -> None:
    assert len(reference.saves) == 3 and all(high - low <= 20 for low, high in reference.saves)
    for number in range(3):
        # The archive, the length of its closing comment, and that comment.
        assert len(reference.of_save(number, "write")) == 3
    before = [blow.at for blow in blows(reference) if blow.kind == "before"]
    torn = {blow.at for blow in blows(reference) if blow.kind == "torn"}
    assert before == list(range(1, len(reference.calls) + 1))
    assert torn == {at for at, call in enumerate(reference.calls, 1) if call == "write"}


def test_the_kernel_sees_no_other_calls(stage: Stage) -> None:
    found = seen_by_the_kernel(stage)
    if found is None:
        pytest.skip("strace is not there, or may not watch")
    counted, seen = found
    assert counted == seen and {"open", "write", "fsync", "replace", "link", "unlink"} <= set(seen)


def test_killed_at_calls_of_a_save_nothing_is_lost(stage: Stage, reference: Reference) -> None:
    """Of the first save and of the one in the middle."""
    tally = Tally()
    wanted = [(1, "replace"), (1, "fsync"), (1, "unlink"), (0, "replace")]
    for at in (*(reference.of_save(number, call)[0] for number, call in wanted), len(reference.calls)):
        strike(stage, Blow(at, reference.calls[at - 1], "before"), reference.outcome, tally)
    strike(stage, Blow(reference.of_save(1, "write")[0], "write", "torn"), reference.outcome, tally)
    # Killed there once more when it is resumed, where it clears away what the first kill has left.
    earlier = reference.of_save(1, "replace")[0]
    strike(stage, Blow(5, "unlink", "again", earlier=earlier), reference.outcome, tally)
    assert tally.kills == 7 and not tally.losses


def test_killed_behind_the_last_save_the_best_is_still_made(stage: Stage, reference: Reference) -> None:
    last = reference.of_save(2, "replace")[-1]
    tally = Tally()
    for at in (last, last - 1, last + 1):
        strike(stage, Blow(at, reference.calls[at - 1], "before"), reference.outcome, tally)
    strike(stage, Blow(last, "replace", "full"), reference.outcome, tally)
    assert not tally.losses


def test_a_full_disk_ends_a_run_and_not_its_checkpoints(stage: Stage, reference: Reference) -> None:
    tally = Tally()
    for at in (reference.of_save(0, "fsync")[0], reference.of_save(1, "write")[0]):
        strike(stage, Blow(at, reference.calls[at - 1], "full"), reference.outcome, tally)
    assert tally.trials == {"full": 2} and not tally.losses


def test_killed_at_random_nothing_is_lost(stage: Stage, reference: Reference) -> None:
    tally = Tally()
    at_random(stage, reference.seconds, 3, int.from_bytes(os.urandom(4), "big"), reference.outcome, tally)
    assert not tally.losses


def test_the_harness_notices_a_loss(stage: Stage, reference: Reference) -> None:
    """A trainer that forgets its votes when it resumes."""
    tally = Tally()
    # Before the last checkpoint has its name the run goes on from step 2.
    at = reference.of_save(2, "replace")[0]
    strike(stage, Blow(at, "replace", "before"), reference.outcome, tally, sabotage=True)
    assert len(tally.losses) == 1 and "differ" in tally.losses[0]


# -- the order of a save ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def content(stage: Stage) -> dict[str, Any]:
    return load_checkpoint(stage.folder / "tiny_prime_init.pt")


@pytest.fixture
def journal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[str, str, int]]]:
    """Calls on files in order: name, file, and the size of what it is about."""
    seen: list[tuple[str, str, int]] = []

    def note(name: str) -> None:
        function = getattr(os, name)

        def noted(target: Any, *rest: Any, **more: Any) -> Any:
            path = Path(os.readlink(f"/proc/self/fd/{target}") if isinstance(target, int) else os.fspath(target))
            seen.append((name, str(path), path.stat().st_size if path.exists() else -1))
            return function(target, *rest, **more)

        monkeypatch.setattr(os, name, noted)

    for name in ("fsync", "replace", "link", "unlink"):
        note(name)
    yield seen


def test_content_before_name_and_name_before_old_files_go(
    content: dict[str, Any], tmp_path: Path, journal: list[tuple[str, str, int]]
) -> None:
    folder = RunFolder(tmp_path, "a", 1)
    folder.save(1, content, is_best=True)
    journal.clear()
    path = folder.save(2, content, is_best=True)
    names = [name for name, _, _ in journal]
    first = names.index("replace")
    temporary, size = journal[first][1], journal[first][2]
    assert ("fsync", temporary, size) in journal[:first] and path.stat().st_size == size
    folders = [at for at, (name, file, _) in enumerate(journal) if name == "fsync" and file == str(tmp_path)]
    gone = [at for at, (name, file, _) in enumerate(journal) if name == "unlink" and file.endswith("step_1.pt")]
    assert len(gone) == 1 and folders[0] == first + 1
    best = next(at for at, (name, file, _) in enumerate(journal) if name == "replace" and file.endswith(".new"))
    assert first < folders[0] < best < folders[-1] < gone[0]


def test_the_only_good_checkpoint_is_never_pruned(content: dict[str, Any], tmp_path: Path) -> None:
    """A run that goes on from step 1 because 3 is damaged saves step 2: 3 goes, whatever keep_last is."""
    folder = RunFolder(tmp_path, "a", 1)
    for step in (1, 3):
        folder.save(step, content, is_best=False, prune=False)
    damaged = tmp_path / "a_prime_step_3.pt"
    damaged.write_bytes(damaged.read_bytes()[:-1])
    found = folder.newest()
    assert found is not None and found[0].name == "a_prime_step_1.pt"
    folder.save(2, content, is_best=False)
    assert [step for step, _ in folder.saved()] == [2]
    found = folder.newest()
    assert found is not None and found[0].name == "a_prime_step_2.pt"


# -- the lock ---------------------------------------------------------------------------------------------------------

HOLD = """
import sys, time
sys.path.insert(0, {root!r})
from pathlib import Path
from run_folder import RunFolder
with RunFolder(Path({folder!r}), "a", 1).lock():
    print("held", flush=True)
    time.sleep(60)
"""


def test_a_folder_belongs_to_one_living_process(tmp_path: Path) -> None:
    program = HOLD.format(root=str(ROOT), folder=str(tmp_path / "run"))
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None and holder.stdout.readline() == "held\n"
        with (
            pytest.raises(RunLocked, match=rf"running process \(pid {holder.pid} on "),
            RunFolder(tmp_path / "run", "a", 1).lock(),
        ):
            pass
        holder.send_signal(signal.SIGKILL)
    # A dead process holds nothing, whatever the file says.
    assert json.loads((tmp_path / "run" / LOCK).read_text())["pid"] == holder.pid
    with RunFolder(tmp_path / "run", "a", 1).lock():
        assert json.loads((tmp_path / "run" / LOCK).read_text())["pid"] == os.getpid()
    assert (tmp_path / "run" / LOCK).read_text() == ""


def test_what_a_killed_save_left_is_cleared_away(tmp_path: Path) -> None:
    left = [".a_prime_step_4.pt.x1y2.tmp", ".EVAL_a_step_2.json.q.tmp", ".config.json.tmp", "a_prime_best.new"]
    kept = ["a_prime_step_2.pt", "notes.txt", "x.tmp"]
    for name in (*left, *kept):
        (tmp_path / name).write_text("x")
    with RunFolder(tmp_path, "a", 1).lock():
        assert sorted(f.name for f in tmp_path.iterdir()) == sorted([*kept, LOCK])


def test_a_second_trainer_in_the_folder_is_refused_in_a_line(stage: Stage) -> None:
    run = stage.folder / "run"
    with RunFolder(run, "tiny", 1).lock():
        assert wait(stage.start(run)) == 1
    lines = stage.said().splitlines()
    assert lines[-1].startswith("error: ") and f"pid {os.getpid()}" in lines[-1]


def test_a_damaged_newest_checkpoint_is_passed_over(stage: Stage, reference: Reference) -> None:
    """End to end: the run goes on from the one before and ends as if nothing had been."""
    run = stage.folder / "run"
    kill_runs.shutil.rmtree(run, ignore_errors=True)
    # Killed where step 2 is saved and step 0 not yet gone.
    at = reference.of_save(1, "unlink")[-1]
    assert wait(stage.start(run, kill_runs.Faults(str(run), at))) == -signal.SIGKILL
    saved = RunFolder(run, "tiny", 1).saved()
    assert len(saved) == 2
    newest = saved[-1][1]
    newest.write_bytes(newest.read_bytes()[:-7])
    assert wait(stage.start(run)) == 0 and f"passing over {newest}" in stage.said()
    assert kill_runs.outcome(run)["last"] == reference.outcome["last"]


# -- a soak, in short -------------------------------------------------------------------------------------------------


def test_a_run_with_accidents_that_is_ended_and_resumed_is_the_one_that_is_not(tmp_path: Path) -> None:
    """tests/crash/soak.py in a hundred steps of a tiny model; where they are over before a kill comes, that is that."""
    texts = [{"text": f"{n} and {n + 1} and {n * n} make a line of text."} for n in range(80)]
    (tmp_path / "texts.jsonl").write_text("".join(json.dumps(line) + "\n" for line in texts))
    settings = {"--seq-len": 64, "--batch-size": 2, "--grad-accum": 3, "--shortest-seq-len": 32, "--lr": 1e-3}
    settings |= {"--eval-every": 20, "--sample-every": 0, "--save-every": 10, "--hold-out": 0.2}
    plan = soak.Plan(tmp_path, tmp_path / "texts.jsonl", settings, steps=100, kills=2, stops=2, full=1)
    plan.import_model(write_source(tmp_path / "source", tiny_config()))
    assert {"nan_loss", "nan_gradient", "out_of_memory"} <= set(plan.accidents().values())
    report = soak.soak(plan)
    assert (
        report["same_state"]
        and report["endings"]["full"] == 1
        and report["endings"]["kill"] + report["endings"]["stop"] >= 1
    )
    assert report["out_of_memory"] == 2 and report["micro_batches_not_finite"] >= 2
    assert report["held_out_after"] < report["held_out_before"]

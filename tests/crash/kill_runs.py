"""Kill training runs wherever they write, resume them, and compare with a run that nobody disturbed.

    python tests/crash/kill_runs.py --kills 200 --json assets/kills.json

Each trial is a real run of qwen_prime_train.py's ``main`` in a process of its own, on a tiny model: four steps, a save
every second, evaluations, statistics, events. Five kinds of trial:

    before      SIGKILL before the n-th system call by which the run changes its folder (open, write, fsync, chmod,
                rename, link, unlink, truncate, mkdir): each of them has its turn, from the first of the run to the last
    torn        SIGKILL in the middle of a write, each of them: half of it has reached the file; of the long ones, which
                are checkpoints', also a byte, all but a byte and every eighth between
    again       killed before a checkpoint has its name, or before the last one becomes the best; resumed, and killed
                before the n-th call of that, each of them
    full        from the n-th call on the disk is full, for each call that needs room; of a write half still fits. The
                run must end in a line, exit code 1
    random      SIGKILL at a random moment, again and again in one run

Then the run is resumed, until it ends well. It counts as lost if its final state differs in one bit from the
undisturbed run's (indices, scales, norms, votes, random states, data cursor, supervisor, governor, float optimizer;
only ``created_by``, which has the time, is left out), if the statistics that a reader sees differ in a loss, if it went
back behind the last save that it had reported, or if anything is left over in the folder.

A write that is torn leaves what a kill between two shorter ones would. Where strace is there and may watch, the calls
counted are compared with those that the kernel saw, of the whole run.

A kill leaves what was written to the system's care, so this says nothing on power cuts. For those the order counts, and
tests/test_crash.py checks it: content on the disk before its name, the name before old files go.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import multiprocessing
import os
import platform
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
for variable in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ.setdefault(variable, "1")

import torch  # noqa: E402
from tiny_models import import_source, tiny_config, write_source  # noqa: E402

from crash import child  # noqa: E402
from crash.child import Faults  # noqa: E402
from prime_checkpoint import load_checkpoint, tensor_sha256  # noqa: E402
from prime_telemetry import read_lines  # noqa: E402
from run_folder import RunFolder  # noqa: E402

STEPS, SAVE_EVERY, NAME = 4, 2, "tiny"
PATIENCE = 240
"""Seconds that a run may take, on a machine however busy."""
LONG_WRITE = 1 << 16
"""Bytes: a write of more is torn at nine places."""
RANDOM_RUNS = 30
"""At least so many runs are killed at random moments."""
CONTEXT = multiprocessing.get_context("forkserver")
# Forked from a process that has no threads and has imported everything: a start costs nothing and inherits no locks.
CONTEXT.set_forkserver_preload(["crash.child"])


# -- runs -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Stage:
    """What all trials share: the checkpoint to begin from, and the data."""

    folder: Path

    @staticmethod
    def build(folder: Path) -> Stage:
        # The server's own search path is not ours: what it cannot import it leaves to each of its children.
        os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT / "tests"), str(ROOT), os.environ.get("PYTHONPATH", "")])
        import_source(write_source(folder / "source", tiny_config()), folder / f"{NAME}_prime_init.pt")
        texts = [{"text": f"{n} and {n + 1} and {n * n} make a line of text."} for n in range(80)]
        (folder / "texts.jsonl").write_text("".join(json.dumps(line) + "\n" for line in texts))
        return Stage(folder)

    def arguments(self, run: Path, resume: bool) -> list[str]:
        settings = {
            "--checkpoint": self.folder / f"{NAME}_prime_init.pt",
            "--data": self.folder / "texts.jsonl",
            "--data-cache": self.folder / "cache",
            "--output-dir": run,
            "--steps": STEPS,
            "--save-every": SAVE_EVERY,
            "--eval-every": 2,
            "--keep-last": 1,
            "--batch-size": 1,
            "--grad-accum": 2,
            "--seq-len": 64,
            "--hold-out": 0.2,
            "--sample-every": 2,
            "--samples": 1,
            "--sample-tokens": 4,
            "--peel": "1:2:1",
            "--device": "cpu",
        }
        flags = ["--no-core-eval", *(["--resume"] if resume else [])]
        return [str(part) for pair in settings.items() for part in pair] + flags

    def start(self, run: Path, faults: Faults | None = None, sabotage: bool = False, gate: Path | None = None) -> Any:
        """Begin or go on in a process of its own; with a gate, when that file is there."""
        resume = bool(RunFolder(run, NAME, 1).saved())
        calls = self.folder / "calls.json" if faults is not None and not faults.at else None
        arguments = (self.arguments(run, resume), self.folder / "child.log", faults, calls, sabotage, gate)
        process = CONTEXT.Process(target=child.run, args=arguments)
        process.start()
        return process

    def said(self) -> str:
        """What the last process printed."""
        return (self.folder / "child.log").read_text(errors="replace").strip()


class Lost(Exception):
    """A run that did not come back as it should have."""


def wait(process: Any) -> int:
    """Exit code of a process, or minus the signal that ended it."""
    process.join(PATIENCE)
    if process.is_alive():
        process.kill()
        process.join()
        raise Lost(f"a run did not end within {PATIENCE} s")
    return process.exitcode


def state_hash(path: Path) -> str:
    """SHA-256 over everything in a checkpoint but ``created_by``."""

    def plain(tree: Any) -> Any:
        if isinstance(tree, torch.Tensor):
            return [str(tree.dtype), list(tree.shape), tensor_sha256(tree)]
        if isinstance(tree, dict):
            return sorted([str(key), plain(value)] for key, value in tree.items())
        return [plain(value) for value in tree] if isinstance(tree, list | tuple) else repr(tree)

    content = {key: value for key, value in load_checkpoint(path).items() if key not in ("created_by", "sha256")}
    return hashlib.sha256(json.dumps(plain(content)).encode()).hexdigest()


def outcome(run: Path) -> dict[str, Any]:
    """What must be the same of two runs: the last state, the best one, the losses, the files."""
    folder = RunFolder(run, NAME, 1)
    losses = {
        line["step"]: (line["loss"], line["val_loss"], line["tokens"]) for line in read_lines(run / "stats.jsonl")
    }
    samples = {line["step"]: line["text"] for line in read_lines(run / "samples.jsonl")}
    return {
        "last": state_hash(folder.saved()[-1][1]),
        "best": state_hash(folder.best),
        "losses": losses,
        "samples": samples,
        "files": sorted(file.name for file in run.iterdir()),
    }


def last_reported(run: Path) -> int:
    """Step of the last save that the run reported, -1 before the first."""
    return max((e["step"] for e in read_lines(run / "events.jsonl") if e.get("event") == "save"), default=-1)


def finish(stage: Stage, run: Path, expected: dict[str, Any], sabotage: bool = False) -> None:
    """Resume a disturbed run to its end and compare.

    Raises:
        Lost: with how it differs.
    """
    reported = last_reported(run)
    found = RunFolder(run, NAME, 1).newest()
    step = -1 if found is None else found[1]["train_state"]["step"]
    if step < reported:
        raise Lost(f"step {reported} was saved, the newest whole checkpoint is of step {step}")
    starts = sum(e.get("event") == "start" for e in read_lines(run / "events.jsonl"))
    code = wait(stage.start(run, sabotage=sabotage))
    if code != (1 if step == STEPS else 0):
        raise Lost(f"the resumed run ended with {code}: {stage.said()[-300:]}")
    later = [e for e in read_lines(run / "events.jsonl") if e.get("event") == "start"][starts:]
    if [e["step"] for e in later] != ([] if step == STEPS else [max(step, 0)]):
        raise Lost(f"went on from {[e['step'] for e in later]}, the newest whole checkpoint was of step {step}")
    got = outcome(run)
    if step == STEPS:
        if "nothing to do" not in stage.said():
            raise Lost(f"killed behind its last save, it said {stage.said()[-300:]}")
        # What followed that save, lines and the removal of older files, may be missing.
        got["losses"], got["samples"] = expected["losses"], expected["samples"]
        if set(expected["files"]) <= set(got["files"]):
            got["files"] = expected["files"]
    for key, value in expected.items():
        if got[key] != value:
            raise Lost(f"{key} differ: {got[key]} instead of {value}")


# -- trials -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Blow:
    """What happens to a run at one of its calls.

    Attributes:
        at: number of the call, from 1.
        call: its name.
        kind: ``before``, ``torn``, ``again`` or ``full``.
        part: of a torn write, or of one that fills the disk, how much reaches the file; a byte at least.
        earlier: number of the call at which the run was killed before, and resumed; 0 if it was not.
    """

    at: int
    call: str
    kind: str
    part: float = 0.5
    earlier: int = 0

    def __str__(self) -> str:
        more = f" at {self.part:.3f}" if self.kind == "torn" else f" behind {self.earlier}" if self.earlier else ""
        return f"{self.kind} call {self.at} ({self.call}){more}"


@dataclass(frozen=True)
class Reference:
    """A run that nothing disturbs.

    Attributes:
        outcome: see :func:`outcome`.
        calls, sizes, saves: see :class:`crash.child.Faults`.
        seconds: how long it takes.
    """

    outcome: dict[str, Any]
    calls: list[str]
    sizes: list[int]
    saves: list[tuple[int, int]]
    seconds: float

    def of_save(self, number: int, call: str) -> list[int]:
        """Numbers of the calls of this name in a save, the first of which is 0."""
        low, high = self.saves[number]
        return [at for at in range(low, high) if self.calls[at - 1] == call]


@dataclass
class Tally:
    """Trials, kills and losses so far."""

    trials: dict[str, int] = field(default_factory=dict)
    kills: int = 0
    losses: list[str] = field(default_factory=list)

    def count(self, kind: str, kills: int, name: str, check: Callable[[], None]) -> None:
        self.trials[kind] = self.trials.get(kind, 0) + 1
        self.kills += kills
        try:
            check()
        except Lost as error:
            self.losses.append(f"{name}: {error}")


def strike(stage: Stage, blow: Blow, expected: dict[str, Any], tally: Tally, sabotage: bool = False) -> None:
    """One trial of any kind but ``random``; with ``sabotage`` the resumed run is a bad one."""
    run = stage.folder / "run"
    shutil.rmtree(run, ignore_errors=True)
    if blow.earlier and wait(stage.start(run, Faults(str(run), blow.earlier))) != -signal.SIGKILL:
        raise SystemExit(f"error: {blow}: the run was not killed before: {stage.said()}")
    code = wait(stage.start(run, Faults(str(run), blow.at, blow.kind, blow.part)))

    def check() -> None:
        if blow.kind == "full":
            lines = [line for line in stage.said().splitlines() if line.startswith(("error", "Traceback"))]
            if code != 1 or len(lines) != 1 or not lines[0].startswith("error: "):
                raise Lost(f"a full disk ended it with {code}: {stage.said()[-300:]}")
        elif code != -signal.SIGKILL:
            raise Lost(f"was not killed but ended with {code}: {stage.said()[-300:]}")
        finish(stage, run, expected, sabotage)

    tally.count(blow.kind, 0 if blow.kind == "full" else 1, str(blow), check)


def at_random(stage: Stage, seconds: float, kills: int, seed: int, expected: dict[str, Any], tally: Tally) -> None:
    """One run that is killed ``kills`` times, at random moments of at most ``seconds``."""
    run, draw = stage.folder / "run", random.Random(seed)
    shutil.rmtree(run, ignore_errors=True)
    done = 0
    for _ in range(kills):
        process = stage.start(run)
        time.sleep(draw.uniform(0.05, seconds))
        process.kill()
        code = wait(process)
        done += code == -signal.SIGKILL
        if code == 0:
            break
    tally.count("random", done, f"random, seed {seed}", lambda: finish(stage, run, expected))


def undisturbed(stage: Stage) -> Reference:
    """What disturbed runs are compared with."""
    run = stage.folder / "run"
    outcomes = []
    for watched in (True, False):
        shutil.rmtree(run, ignore_errors=True)
        begun = time.perf_counter()
        if code := wait(stage.start(run, Faults(str(run)) if watched else None)):
            raise SystemExit(f"error: the undisturbed run ended with {code}: {stage.said()}")
        seconds = time.perf_counter() - begun
        outcomes.append(outcome(run))
    if outcomes[0] != outcomes[1]:
        raise SystemExit("error: two undisturbed runs differ: nothing can be compared here")
    calls, sizes, saves = json.loads((stage.folder / "calls.json").read_text())
    return Reference(outcomes[0], calls, sizes, saves, seconds)


def blows(reference: Reference) -> list[Blow]:
    """One before every call, some in every write, and a full disk from every call on that needs room."""
    calls = list(enumerate(zip(reference.calls, reference.sizes, strict=True), 1))
    found = [Blow(at, call, "before") for at, (call, _) in calls]
    for at, (call, size) in calls:
        if call == "write" and size > 1:
            parts = [0.0, *(eighth / 8 for eighth in range(1, 8)), 1 - 0.5 / size] if size > LONG_WRITE else [0.5]
            found += [Blow(at, call, "torn", part) for part in parts]
    return found + [Blow(at, call, "full") for at, (call, _) in calls if call in child.NEED_ROOM]


def blows_again(stage: Stage, reference: Reference) -> list[Blow]:
    """One before every call of a run that goes on where another was killed: in the save in the middle, and where the
    last checkpoint was to become the best."""
    run, found = stage.folder / "run", []
    for earlier in (reference.of_save(1, "replace")[0], reference.of_save(2, "replace")[-1]):
        shutil.rmtree(run, ignore_errors=True)
        wait(stage.start(run, Faults(str(run), earlier)))
        wait(stage.start(run, Faults(str(run))))
        calls = json.loads((stage.folder / "calls.json").read_text())[0]
        found += [Blow(at, call, "again", earlier=earlier) for at, call in enumerate(calls, 1)]
    return found


# -- what the kernel saw ----------------------------------------------------------------------------------------------

KERNEL_CALLS = {
    **{"open": "open", "openat": "open", "creat": "open", "write": "write", "pwrite64": "write", "writev": "write"},
    **{"fsync": "fsync", "fdatasync": "fsync", "rename": "replace", "renameat": "replace", "renameat2": "replace"},
    **{"link": "link", "linkat": "link", "unlink": "unlink", "unlinkat": "unlink", "rmdir": "rmdir"},
    **{"chmod": "chmod", "fchmod": "chmod", "fchmodat": "chmod", "truncate": "truncate", "ftruncate": "truncate"},
    **{"mkdir": "mkdir", "mkdirat": "mkdir", "fallocate": "fallocate", "sendfile": "sendfile"},
    **{"copy_file_range": "copy_file_range", "symlink": "symlink", "symlinkat": "symlink", "pwritev": "write"},
}
"""What may change a folder, by the name that the faults give it, or by its own: then they have missed it."""


def seen_by_the_kernel(stage: Stage) -> tuple[list[str], list[str]] | None:
    """The calls by which an undisturbed run changes its folder, as counted here and as strace counts them; None where
    strace is not there or may not watch."""
    run, gate, trace = (stage.folder / name for name in ("run", "gate", "trace"))
    shutil.rmtree(run, ignore_errors=True)
    gate.unlink(missing_ok=True)
    program = shutil.which("strace")
    if program is None:
        return None
    process = stage.start(run, Faults(str(run)), gate=gate)
    command = [program, "-f", "-y", "-s", "0", "-e", f"trace={','.join(f'?{name}' for name in KERNEL_CALLS)}"]
    with subprocess.Popen(
        [*command, "-o", str(trace), "-p", str(process.pid)], stderr=subprocess.PIPE, text=True
    ) as watcher:
        assert watcher.stderr is not None
        attached = "attached" in watcher.stderr.readline()
        gate.touch()
        code = wait(process)
        watcher.wait(PATIENCE)
    if not attached:
        return None
    if code:
        raise SystemExit(f"error: the undisturbed run ended with {code}: {stage.said()}")
    seen = []
    for line in trace.read_text(errors="replace").splitlines():
        name = KERNEL_CALLS.get(line.split("(")[0].split()[-1], "") if "(" in line else ""
        looks = name == "open" and not any(flag in line for flag in ("O_WRONLY", "O_RDWR", "O_CREAT", "O_TRUNC"))
        if name and str(run) in line and not looks:
            seen.append(name)
    return json.loads((stage.folder / "calls.json").read_text())[0], seen


# -- all of it --------------------------------------------------------------------------------------------------------

Trial = Callable[[Stage, Reference], None]


def in_turns(stages: list[Stage], trials: Iterator[Trial]) -> None:
    """Let every stage take trials from a common list until it is empty."""
    lock = threading.Lock()

    def work(stage: Stage) -> None:
        reference = undisturbed(stage)
        while True:
            with lock:
                trial = next(trials, None)
            if trial is None:
                return
            trial(stage, reference)

    with ThreadPoolExecutor(len(stages)) as pool:
        list(pool.map(work, stages))


def all_trials(plan: list[Blow], tally: Tally, kills: int) -> Iterator[Trial]:
    """Every trial of a long run; those at random moments last, more of them while there are fewer than ``kills``."""

    def one(blow: Blow) -> Trial:
        return lambda stage, own: strike(stage, blow, own.outcome, tally)

    def some(seed: int) -> Trial:
        return lambda stage, own: at_random(stage, own.seconds, 4, seed, own.outcome, tally)

    for number, blow in enumerate(plan, 1):
        yield one(blow)
        if number % 25 == 0:
            print(f"{number} of {len(plan)}: {tally.kills} kills, {len(tally.losses)} losses", flush=True)
    seed = 0
    while tally.kills < kills or seed < RANDOM_RUNS:
        yield some(seed)
        seed += 1


def main(arguments: argparse.Namespace) -> int:
    torch.set_num_threads(1)
    begun, tally = time.perf_counter(), Tally()
    with tempfile.TemporaryDirectory() as name:
        folders = [Path(name) / str(number) for number in range(arguments.jobs + 1)]
        for folder in folders:
            folder.mkdir()
        first, *stages = map(Stage.build, folders)
        reference, compared = undisturbed(first), seen_by_the_kernel(first)
        calls = reference.calls
        print(f"an undisturbed run changes its folder by {len(calls)} calls", flush=True)
        if compared is not None and compared[0] != compared[1]:
            raise SystemExit(f"error: the kernel saw other calls than were counted: {compared}")
        plan = [*blows(reference), *blows_again(first, reference)]
        in_turns(stages, all_trials(plan, tally, arguments.kills))
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    report = {
        "kills": tally.kills,
        "losses": len(tally.losses),
        "trials": tally.trials,
        "calls": {call: calls.count(call) for call in sorted(set(calls))},
        "calls_of_each_save": [" ".join(calls[low - 1 : high - 1]) for low, high in reference.saves],
        "kernel_saw_the_same": compared is not None,
        "seconds": round(time.perf_counter() - begun),
        "commit": commit.stdout.strip(),
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "system": platform.platform(),
    }
    for loss in tally.losses:
        print(f"LOST {loss}")
    print(json.dumps(report))
    if arguments.json:
        arguments.json.write_text(json.dumps({**report, "lost": tally.losses}, indent=2) + "\n")
    return 1 if tally.losses else 0


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=200, help="at least so many, the rest of them at random moments")
    parser.add_argument("--jobs", type=int, default=2, help="trials at a time")
    parser.add_argument("--json", type=Path, help="also write the summary here")
    raise SystemExit(main(parser.parse_args()))

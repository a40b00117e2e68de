"""A long run with accidents beside the same run without an end put to it by anyone.

    python tests/crash/soak.py --json assets/soak.json

Two runs of qwen_prime_train.py's ``main`` at a time, 10,000 steps of tiny_coder on the standard library's
instructions. Both meet the same accidents that a run has to survive by itself, drawn from a seed: losses that are not a
number, in one micro-batch or in all of a step; a gradient that stops being a number in the middle of a backward pass;
memory that runs out in the middle of one. One of them is also ended again and again, by SIGKILL and SIGTERM at random
moments and by a disk that is full from a random call on, and resumed each time.

At the end both must be the same to the last bit (indices, scales, votes, random states, data cursor, supervisor,
governor, float optimizer), the held-out loss must be better than at the beginning, and the memory of the run that
nobody ended must not have grown while its batches had one shape.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
for variable in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ.setdefault(variable, "1")

import torch  # noqa: E402
from tiny_models import import_source  # noqa: E402

from bench_tools import resident_bytes  # noqa: E402
from crash import child  # noqa: E402
from crash.child import Faults  # noqa: E402
from crash.kill_runs import CONTEXT, state_hash  # noqa: E402
from ghost_grid import GhostGrid  # noqa: E402
from prime_telemetry import read_lines  # noqa: E402
from run_folder import RunFolder, run_name  # noqa: E402

WATCHED = ("nan_loss", "nan_step", "nan_gradient", "out_of_memory")
RESIDENT = "resident.jsonl"


@dataclass(frozen=True)
class Plan:
    """What both runs are, and what happens to them.

    Attributes:
        folder: for the checkpoint to begin from, the encoded data and the runs.
        data: what to learn.
        settings: flags of the trainer beyond those that are here.
        steps: of the run.
        kills, stops, full: how often one of the runs is ended by SIGKILL, by SIGTERM, and by a full disk.
        seed: of everything random.
    """

    folder: Path
    data: Path
    settings: Mapping[str, Any]
    steps: int
    kills: int
    stops: int
    full: int
    seed: int = 0

    @property
    def checkpoint(self) -> Path:
        """Where both begin."""
        return self.folder / "soak_prime_init.pt"

    def import_model(self, source: Path) -> None:
        """Make the checkpoint. The forked runs find the modules of this folder by the variable set here."""
        os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT / "tests"), str(ROOT), os.environ.get("PYTHONPATH", "")])
        import_source(source, self.checkpoint)

    def accidents(self) -> dict[int, str]:
        """Step to accident. Memory runs out twice, in the first half: batches keep their shape from then on."""
        draw = random.Random(self.seed)
        found: dict[int, str] = {}
        for step in range(1, self.steps):
            chance = draw.random()
            for kind, share in (("nan_loss", 0.01), ("nan_gradient", 0.005), ("nan_step", 0.002)):
                if chance < share:
                    found[step] = kind
                    break
                chance -= share
        for part in (0.1, 0.3):
            found[round(part * self.steps)] = "out_of_memory"
        return found

    def endings(self) -> list[tuple[int, str]]:
        """(step, kind) of what ends the disturbed run, in order."""
        draw = random.Random(self.seed + 1)
        kinds = ["kill"] * self.kills + ["stop"] * self.stops + ["full"] * self.full
        draw.shuffle(kinds)
        return sorted((draw.randrange(self.steps), kind) for kind in kinds)

    def arguments(self, run: Path) -> list[str]:
        """The trainer's command line."""
        settings = {
            "--checkpoint": self.checkpoint,
            "--data": self.data,
            "--data-cache": self.folder / f"cache_{run.name}",
            "--output-dir": run,
            "--steps": self.steps,
            "--device": "cpu",
            **self.settings,
        }
        resumed = RunFolder(run, run_name(self.checkpoint), 1).saved()
        flags = ["--no-core-eval", *(["--resume"] if resumed else [])]
        return [str(part) for pair in settings.items() for part in pair] + flags


# -- in the trainer's process -----------------------------------------------------------------------------------------


@dataclass
class Accidents:
    """Strikes inside the trainer's process, each accident once; notes what memory it holds."""

    plan: Plan
    run: Path
    full_at: int | None
    struck: set[int] = field(default_factory=set)

    def install(self) -> None:
        """Put itself around the trainer's step, its loss and the votes of every grid."""
        import vote_casting
        import vote_trainer

        patched: Any = vote_trainer
        casting: Any = vote_casting
        self.planned = self.plan.accidents()
        self.draw = random.Random(f"{self.plan.seed} {self.full_at}")
        self.faults = Faults(f"{self.run}{os.sep}", kind="full")
        if self.full_at is not None:
            self.faults.install()
        self.loss, self.step, self.accept = casting.answer_loss, patched.VoteTrainer.step, GhostGrid.accept
        self.trainer: Any = None
        self.accepted = 0
        patched.VoteTrainer.step = lambda trainer: self.one_step(trainer)
        casting.answer_loss = self.answer_loss
        GhostGrid.accept = lambda grid, *rest: self.one_accept(grid, *rest)  # type: ignore[method-assign]

    def one_step(self, trainer: Any) -> Any:
        """A step; from the one that was asked for on, the disk is about to be full."""
        self.trainer = trainer
        if self.full_at is not None and trainer.done >= self.full_at and not self.faults.at:
            # Two calls for the statistics of each step, some thirty for a save: about what lies between two saves.
            between = 2 * int(self.plan.settings["--save-every"]) + 30
            self.faults.at = len(self.faults.calls) + self.draw.randint(1, between)
        result = self.step(trainer)
        if trainer.done % max(1, self.plan.steps // 500) == 0:
            with open(self.plan.folder / f"{self.run.name}_{RESIDENT}", "a", encoding="utf-8") as file:
                file.write(json.dumps({"step": trainer.done, "bytes": resident_bytes()}) + "\n")
        return result

    def answer_loss(self, model: Any, *inputs: Any) -> Any:
        """The loss, or what an accident makes of it."""
        ballot, handle = self.trainer.ballot, None
        kind = self.planned.get(ballot.step) if ballot.mode == "cast" else None
        self.accepted = 0
        if kind == "nan_gradient" and ballot.micro_batch == 0:
            layers = model.model.layers
            handle = layers[ballot.step % len(layers)].register_forward_hook(_break_gradient)
        loss, count = self.loss(model, *inputs)
        if handle is not None:
            handle.remove()
        bad = kind == "nan_step" or (kind == "nan_loss" and ballot.micro_batch == 0)
        return (loss * math.nan if bad else loss), count

    def one_accept(self, grid: Any, *rest: Any) -> None:
        """A gradient arrives; memory may run out here, when the layers above have voted."""
        ballot = grid.ballot
        self.accepted += 1
        planned = self.planned.get(ballot.step) == "out_of_memory" and ballot.step not in self.struck
        if ballot.mode == "cast" and planned and self.accepted == 5:
            self.struck.add(ballot.step)
            raise RuntimeError("planned: can't allocate memory")
        self.accept(grid, *rest)


def _break_gradient(module: Any, arguments: Any, output: Any) -> Any:
    hidden = output[0] if isinstance(output, tuple) else output
    if hidden.requires_grad:
        hidden.register_hook(lambda gradient: gradient * math.nan)
    return output


def worker(plan: Plan, run: Path, full_at: int | None, log: Path) -> None:
    """The process: train with accidents, end with the trainer's exit code."""
    Accidents(plan, run, full_at).install()
    child.run(plan.arguments(run), log, None, None, False)


# -- in the parent's --------------------------------------------------------------------------------------------------


class Failed(Exception):
    """A run that did not survive what it should have."""


def last_step(stats: Path) -> int:
    """Step of the last whole line, without reading all of them."""
    if not stats.exists():
        return 0
    with open(stats, "rb") as file:
        file.seek(max(0, file.seek(0, os.SEEK_END) - (1 << 16)))
        lines = [line for line in file.read().split(b"\n")[:-1] if line.startswith(b"{")]
    return json.loads(lines[-1])["step"] if lines else 0


def start(plan: Plan, run: Path, full_at: int | None = None) -> Any:
    """Begin or go on in a process of its own."""
    process = CONTEXT.Process(target=worker, args=(plan, run, full_at, plan.folder / f"{run.name}.log"))
    process.start()
    return process


def said(plan: Plan, run: Path) -> str:
    """The end of what the last process printed."""
    return (plan.folder / f"{run.name}.log").read_text(errors="replace").strip()[-500:]


def undisturbed(plan: Plan, run: Path) -> None:
    """The run that nobody ends."""
    process = start(plan, run)
    process.join()
    if process.exitcode:
        raise Failed(f"the run that nobody ended, ended with {process.exitcode}: {said(plan, run)}")


def disturbed(plan: Plan, run: Path) -> dict[str, int]:
    """The run that is ended again and again; how often by what."""
    draw, count = random.Random(plan.seed + 2), {"kill": 0, "stop": 0, "full": 0}
    for step, kind in plan.endings():
        process = start(plan, run, step if kind == "full" else None)
        if kind != "full":
            while process.is_alive() and last_step(run / "stats.jsonl") < step:
                time.sleep(0.05)
            time.sleep(draw.uniform(0, 1))
            process.kill() if kind == "kill" else process.terminate()
        process.join()
        if process.exitcode == 0 and last_step(run / "stats.jsonl") == plan.steps:
            return count
        if kind == "full":
            lines = [line for line in said(plan, run).splitlines() if line.startswith(("error", "Traceback"))]
            if process.exitcode != 1 or len(lines) != 1 or not lines[0].startswith("error: "):
                raise Failed(f"a full disk ended it with {process.exitcode}: {said(plan, run)}")
        elif process.exitcode not in {"kill": (-signal.SIGKILL,), "stop": (0, -signal.SIGTERM)}[kind]:
            # SIGTERM ends a process that does not listen yet.
            raise Failed(f"{kind} ended it with {process.exitcode}: {said(plan, run)}")
        count[kind] += 1
    process = start(plan, run)
    process.join()
    if process.exitcode:
        raise Failed(f"the resumed run ended with {process.exitcode}: {said(plan, run)}")
    return count


def resident(plan: Plan, run: Path) -> dict[str, float]:
    """Memory of the run that nobody ended, MB: medians over a tenth of the steps, soon after the shape of its batches
    changed for the last time and at the end; and the largest of all."""
    lines = list(read_lines(plan.folder / f"{run.name}_{RESIDENT}"))

    def median(low: float, high: float) -> float:
        held = [line["bytes"] for line in lines if low * plan.steps <= line["step"] <= high * plan.steps]
        return round(statistics.median(held) / 1e6, 1)

    return {
        "at_half_mb": median(0.45, 0.55),
        "at_end_mb": median(0.9, 1.0),
        "most_mb": round(max(line["bytes"] for line in lines) / 1e6, 1),
    }


def soak(plan: Plan) -> dict[str, Any]:
    """Both runs, and what became of them.

    Raises:
        Failed: with how.
    """
    calm, ended = plan.folder / "calm", plan.folder / "ended"
    with ThreadPoolExecutor(2) as pool:
        futures = [pool.submit(undisturbed, plan, calm), pool.submit(disturbed, plan, ended)]
        counts = [future.result() for future in futures][1]
    folders = [RunFolder(run, run_name(plan.checkpoint), 1) for run in (calm, ended)]
    states = [state_hash(folder.saved()[-1][1]) for folder in folders]
    losses = {line["step"]: line["val_loss"] for line in read_lines(ended / "stats.jsonl") if line["val_loss"]}
    events = list(read_lines(calm / "events.jsonl"))
    first = next(e["val_loss"] for e in events if e.get("event") == "evaluation" and e["step"] == 0)
    skipped = sum(line["skipped"] for line in read_lines(calm / "stats.jsonl"))
    kinds = [e.get("event") for e in events]
    return {
        "steps": plan.steps,
        "endings": counts,
        "micro_batches_not_finite": skipped,
        "out_of_memory": kinds.count("out_of_memory"),
        "returns_to_a_checkpoint": kinds.count("roll_back"),
        "same_state": states[0] == states[1],
        "held_out_before": first,
        "held_out_after": losses[max(losses)],
        "resident": resident(plan, calm),
    }


def main(arguments: argparse.Namespace) -> int:
    torch.set_num_threads(1)
    begun = time.perf_counter()
    settings = {"--batch-size": 1, "--seq-len": 128, "--grad-accum": 2, "--lr": 1e-4, "--eval-every": 500}
    settings |= {"--sample-every": 1000, "--sample-tokens": 16, "--save-every": 50, "--shortest-seq-len": 96}
    with tempfile.TemporaryDirectory(dir=arguments.folder) as name:
        data = ROOT / "assets" / "stdlib_instruct.jsonl"
        plan = Plan(
            Path(name),
            data,
            settings,
            arguments.steps,
            arguments.kills,
            arguments.stops,
            arguments.full,
            arguments.seed,
        )
        plan.import_model(ROOT / "assets" / "tiny_coder")
        try:
            report = soak(plan)
        except Failed as error:
            print(f"FAILED {error}")
            return 1
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    report |= {
        "seconds": round(time.perf_counter() - begun),
        "commit": commit.stdout.strip(),
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "system": platform.platform(),
    }
    print(json.dumps(report))
    if arguments.json:
        arguments.json.write_text(json.dumps(report, indent=2) + "\n")
    held = report["resident"]
    better = report["held_out_after"] < report["held_out_before"]
    return 0 if report["same_state"] and better and held["at_end_mb"] <= 1.02 * held["at_half_mb"] else 1


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=10_000)
    parser.add_argument("--kills", type=int, default=40, help="how often one run is killed")
    parser.add_argument("--stops", type=int, default=25, help="how often it is asked to stop")
    parser.add_argument("--full", type=int, default=15, help="how often its disk is full")
    parser.add_argument("--seed", type=int, default=0, help="of every accident")
    parser.add_argument("--folder", type=Path, help="where the runs may lie; by default with the system's other files")
    parser.add_argument("--json", type=Path, help="also write the summary here")
    raise SystemExit(main(parser.parse_args()))

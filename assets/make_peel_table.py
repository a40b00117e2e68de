"""What a schedule of open layers costs and brings: assets/peel.jsonl, and the table of README.

    python assets/make_peel_table.py             run what is missing, a line each
    python assets/make_peel_table.py --summary   print the table

tiny_coder on the standard library's instructions, 120 steps of two micro-batches of 512 tokens: everything open from
the first step; v7 in its proportions (the head alone for 20 steps, then two layers every 20, so half of the run has
everything open); the same with a window of two layers that goes on rolling. Forgetting is the rise of the loss on
held-out files of the library. Time is the processor's, not the clock's: machines are shared.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, Literal

ASSETS = Path(__file__).resolve().parent
sys.path.insert(0, str(ASSETS.parent))

STEPS, ACCUMULATION = 120, 2
SCHEDULES: dict[str, tuple[str, int | None]] = {
    "none": ("none", None),
    "v7": ("20:20:2", None),
    "v7, window 2": ("20:20:2", 2),
}
RATES = (3e-4, 6e-4)
SEEDS = (0, 1)
RULE: Literal["momentum"] = "momentum"
RESULTS = ASSETS / "peel.jsonl"
LOOKS = (40, 80, 120)


def execute(schedule: str, rate: float, seed: int) -> dict[str, Any]:
    """One run in this process: losses in nats a token, seconds of the processor, bytes of votes and their state."""
    import manifolds
    import quality_tasks
    from answer_masks import EncodedSet
    from ghost_core import grids_of
    from night_shift import AntigravitySentinel, LayerPeel, MemoryContingency, Shape, TrainingGovernor
    from night_watch import NightWatch
    from packed_batches import PackedBatches, evaluation_batches
    from prime_quality import to_grid
    from qwen_prime_wrapper import load_model, mean_answer_loss
    from training_recipe import Recipe
    from vote_trainer import VoteTrainer

    task = quality_tasks.TASKS["stdlib"]
    folder = task.path(task.model, ASSETS)
    dense, tokenizer, _ = load_model(folder)
    data = quality_tasks.load_data(task, tokenizer, ASSETS)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    model = to_grid(dense, config, manifolds.build())
    batches = PackedBatches(data.train, seq_len=task.seq_len, batch_size=1, pad_id=data.pad_id, seed=seed)

    def score(part: EncodedSet) -> float:
        return mean_answer_loss(model, evaluation_batches(part, task.seq_len, 4, data.pad_id))[0]

    peel, window = SCHEDULES[schedule]
    watch = NightWatch(
        LayerPeel.parse(peel, window),
        AntigravitySentinel(),
        TrainingGovernor.for_rule(RULE),
        MemoryContingency(Shape(task.seq_len, 1, ACCUMULATION)),
    )
    recipe = Recipe(
        steps=STEPS, grad_accum=ACCUMULATION, lr=rate, seed=seed, vote_rule=RULE, device="cpu", compute="float32"
    )
    trainer = VoteTrainer(model, batches, recipe, watch)
    before = score(data.target), score(data.source)
    curve, seconds, most = [(0, before[0])], 0.0, 0
    for step in range(1, STEPS + 1):
        begun = time.process_time()
        trainer.step()
        seconds += time.process_time() - begun
        votes = sum(t.nbytes for g in grids_of(model).values() for t in g.vote_state().values())
        most = max(most, votes)
        if step in LOOKS:
            curve.append((step, score(data.target)))
    return {
        "schedule": schedule,
        "lr": rate,
        "seed": seed,
        "curve": curve,
        "source_before": before[1],
        "source_after": score(data.source),
        "cpu_seconds": round(seconds, 1),
        "vote_bytes": most,
    }


def run_missing() -> None:
    """Each run in a process of its own, seed by seed."""
    from prime_telemetry import read_lines
    from quality_runs import append_result, worker_environment

    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=ASSETS, capture_output=True, text=True, check=True
    ).stdout.strip()
    done = {(x["schedule"], x["lr"], x["seed"]) for x in read_lines(RESULTS)}
    for seed in SEEDS:
        for rate in RATES:
            for schedule in SCHEDULES:
                if (schedule, rate, seed) in done:
                    continue
                command = [sys.executable, __file__, "--run", schedule, str(rate), str(seed)]
                process = subprocess.run(
                    command, stdout=subprocess.PIPE, text=True, env=worker_environment(1), check=True
                )
                append_result(RESULTS, {**json.loads(process.stdout.splitlines()[-1]), "commit": commit})


def summary() -> str:
    """The table as markdown; seconds against those of ``none`` at the same rate and seed."""
    from prime_telemetry import read_lines

    lines = list(read_lines(RESULTS))
    usual = {(x["lr"], x["seed"]): x["cpu_seconds"] for x in lines if x["schedule"] == "none"}
    rows = [
        "| schedule | lr | held-out loss at step 80 | at 120 (seeds) | forgetting | time | votes, MB |",
        "|---|---|---|---|---|---|---|",
    ]
    for schedule in SCHEDULES:
        for rate in RATES:
            own = [x for x in lines if (x["schedule"], x["lr"]) == (schedule, rate)]
            if not own:
                continue
            half, last = ([dict(x["curve"])[step] for x in own] for step in (80, 120))
            forgot = statistics.mean(x["source_after"] - x["source_before"] for x in own)
            pace = statistics.mean(x["cpu_seconds"] / usual[x["lr"], x["seed"]] for x in own)
            seeds = ", ".join(f"{x:.4f}" for x in last)
            rows.append(
                f"| {schedule} | {rate:g} | {statistics.mean(half):.4f} | {statistics.mean(last):.4f} ({seeds}) | "
                f"{forgot:+.4f} | {pace:.2f} | {max(x['vote_bytes'] for x in own) / 1e6:.2f} |"
            )
    return "\n".join(rows)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--summary", action="store_true")
    parser.add_argument("--run", nargs=3, metavar=("SCHEDULE", "LR", "SEED"), help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.run:
        print(json.dumps(execute(given.run[0], float(given.run[1]), int(given.run[2]))))
    elif given.summary:
        print(summary())
    else:
        run_missing()

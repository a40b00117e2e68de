"""A night with accidents, recorded: assets/night_run.jsonl.

    python assets/make_night_run.py --folder runs/night --baseline   AdamW without accidents, usual and tuned betas
    python assets/make_night_run.py --folder runs/night              the run with its accidents, and the record

600 steps of tiny_coder on the standard library's instructions through all phases of a v7 schedule scaled to its
length. On the way: batches whose loss is not a number, a gradient that stops being one in the middle of a backward
pass, a neighbour that takes the memory away in the middle of a step (an address-space limit that makes the allocator
fail), SIGTERM, SIGKILL. The trainer is the one that users start; only the accidents are added, from outside.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import resource
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

ASSETS = Path(__file__).resolve().parent
sys.path.insert(0, str(ASSETS.parent))

STEPS, ACCUMULATION, SEQ_LEN = 600, 2, 512
PEEL = "40:10:2"
"""v7 at a fifth of its length: the head alone for 40 steps, then two layers every 10."""
RATE = 3e-4
"""The best of the baseline's rates."""
NAN_LOSS = ((20, 0), (20, 1), (52, 1), (290, 0))
"""(step, micro-batch) whose loss is not a number; at step 20 both, so that nothing moves."""
NAN_GRADIENT = (330, 1)
"""Where a gradient breaks in the middle of the backward pass, after the upper layers have voted."""
MEMORY_GONE, MEMORY_BACK = 400, 406
LEFT = 0.92
"""What the neighbour leaves of the memory that a step needs beyond what lies there anyway."""
TERMINATE, KILL = 250, 480
"""Steps after which the process is sent SIGTERM and SIGKILL."""
BASELINES = (*(("adamw", rate) for rate in (1.5e-4, 3e-4, 6e-4)), *(("adamw-0.5-0.95", rate) for rate in (3e-4, 6e-4)))
"""Methods of quality_tasks, with their rates."""
RECORD = ASSETS / "night_run.jsonl"


def settings(folder: Path) -> Any:
    """The run as a user would start it."""
    import qwen_prime_train as train

    return train.TrainConfig(
        checkpoint=folder / "tiny_coder_prime_init.pt",
        data=str(ASSETS / "stdlib_instruct.jsonl"),
        output_dir=folder / "run",
        steps=STEPS,
        batch_size=1,
        grad_accum=ACCUMULATION,
        lr=RATE,
        seq_len=SEQ_LEN,
        peel=PEEL,
        eval_every=100,
        sample_every=200,
        save_every=50,
        core_eval=False,
        compute="float32",
        resume=bool(list((folder / "run").glob("*_prime_step_*.pt"))),
    )


def virtual_bytes() -> int:
    """Address space of this process."""
    return int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")


class Accidents:
    """Plants what goes wrong inside the trainer's process."""

    def __init__(self) -> None:
        import vote_casting
        import vote_trainer

        self.loss = vote_casting.answer_loss
        self.step = vote_trainer.VoteTrainer.step
        self.trainer: Any = None
        self.base = self.peak = 0
        self.limited = False
        self.armed = False
        accidents = self

        def step(trainer: Any) -> Any:
            accidents.trainer = trainer
            return accidents.one_step(trainer)

        patched: tuple[Any, Any] = vote_trainer, vote_casting
        patched[0].VoteTrainer.step = step
        patched[1].answer_loss = self.answer_loss

    def one_step(self, trainer: Any) -> Any:
        """A step, under a limit while the neighbour is there; its use of memory is watched just before."""
        if trainer.done in range(MEMORY_GONE - 3, MEMORY_GONE):
            return self.watched(trainer)
        if trainer.done == MEMORY_GONE and self.peak and not self.limited:
            self.limited = self.armed = True
        if trainer.done >= MEMORY_BACK and self.limited:
            resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
            self.limited = False
        return self.step(trainer)

    def watched(self, trainer: Any) -> Any:
        """A step during which another thread looks at the address space."""
        done = threading.Event()
        before = 0

        def look() -> None:
            nonlocal before
            before = virtual_bytes()
            while not done.wait(0.0005):
                self.peak = max(self.peak, virtual_bytes() - before)

        thread = threading.Thread(target=look)
        thread.start()
        try:
            return self.step(trainer)
        finally:
            done.set()
            thread.join()

    def answer_loss(self, model: Any, *inputs: Any) -> Any:
        """The loss, or what the accident makes of it."""
        ballot = self.trainer.ballot
        place = (ballot.step, ballot.micro_batch)
        handle = None
        if ballot.mode == "cast" and place == NAN_GRADIENT:

            def broken(module: Any, arguments: Any, output: Any) -> Any:
                hidden = output[0] if isinstance(output, tuple) else output
                hidden.register_hook(lambda gradient: gradient * math.nan)
                return output

            handle = model.model.layers[2].register_forward_hook(broken)
        if self.armed and ballot.mode == "cast" and ballot.micro_batch == 1:
            # In the middle of a step: the first micro-batch has voted.
            limit = virtual_bytes() + round(LEFT * self.peak)
            resource.setrlimit(resource.RLIMIT_AS, (limit, resource.RLIM_INFINITY))
            self.armed = False
        loss, count = self.loss(model, *inputs)
        if handle is not None:
            handle.remove()
        return (loss * math.nan if ballot.mode == "cast" and place in NAN_LOSS else loss), count


def worker(folder: Path) -> int:
    """The trainer with accidents, in a process of its own."""
    import prime_device
    import qwen_prime_train

    train: Any = qwen_prime_train
    # A small model's blocks are small: they too must go back when they are freed, or a limit bites on nothing.
    train.settle_memory = lambda config, checkpoint: prime_device.return_freed_memory(1 << 18)
    Accidents()
    return train.main(settings(folder))


def lines(path: Path) -> list[dict[str, Any]]:
    """Lines of a JSON-lines file that are whole."""
    from prime_telemetry import read_lines

    return list(read_lines(path))


def night(folder: Path) -> None:
    """Start the trainer, send it its signals, start it again until it is done; write the record."""
    import qwen_prime_importer as importer

    folder.mkdir(parents=True, exist_ok=True)
    init = folder / "tiny_coder_prime_init.pt"
    if not init.exists():
        importer.main(importer.ImportConfig(model=str(ASSETS / "tiny_coder"), output=init))
    stats = folder / "run" / "stats.jsonl"
    environment = {**os.environ, "MALLOC_ARENA_MAX": "1"}
    signals = [(TERMINATE, signal.SIGTERM), (KILL, signal.SIGKILL)]
    starts = []
    while True:
        process = subprocess.Popen([sys.executable, __file__, "--folder", str(folder), "--worker"], env=environment)
        while process.poll() is None:
            time.sleep(0.2)
            done = lines(stats)
            if signals and done and done[-1]["step"] >= signals[0][0]:
                process.send_signal(signals.pop(0)[1])
                process.wait()
        starts.append(process.returncode)
        if lines(stats)[-1]["step"] >= STEPS:
            break
        if process.returncode not in (0, -signal.SIGKILL):
            raise SystemExit(f"the trainer ended with {process.returncode}")
    record: list[dict[str, Any]] = [{"kind": "exit_codes", "codes": starts}]
    record += [{"kind": "event", **e, "path": None} for e in lines(folder / "run" / "events.jsonl")]
    last = {s["step"]: s for s in lines(stats)}
    keys: tuple[str, ...] = (
        "step",
        "loss",
        "val_loss",
        "lr",
        "thawed_layers",
        "peel_phase",
        "sentinel",
        "skipped",
        "micro_batches",
        "seq_len",
    )
    keys = (*keys, "tokens", "tokens_per_s", "mem_peak_bytes", "flip_rate")
    for step in sorted(last):
        agreement = {k: last[step][k].get("head") for k in ("agreement", "agreement_control", "consensus")}
        record.append({"kind": "step", **{k: last[step][k] for k in keys}, **agreement})
    record += lines(folder / "baseline.jsonl")
    RECORD.write_text("".join(json.dumps(line) + "\n" for line in record), encoding="utf-8")


def baseline(folder: Path, method: str, rate: float) -> dict[str, Any]:
    """AdamW float32 on the dense model, the same data order, schedule, steps and evaluation."""
    import qwen_prime_train as train
    from packed_batches import PackedBatches, evaluation_batches
    from prime_quality import DenseTrainer
    from quality_tasks import METHODS
    from qwen_prime_wrapper import load_model, mean_answer_loss
    from training_recipe import Recipe

    config = settings(folder)
    model, tokenizer, _ = load_model(ASSETS / "tiny_coder")
    data = train.load_data(config, tokenizer)
    held = data.held
    assert held is not None
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    batches = PackedBatches(data.blocks, seq_len=SEQ_LEN, batch_size=1, pad_id=pad, seed=config.seed)
    recipe = Recipe(steps=STEPS, grad_accum=ACCUMULATION, lr=rate, device="cpu")
    trainer = DenseTrainer(model, batches, recipe, METHODS[method])
    curve = []
    for step in range(1, STEPS + 1):
        trainer.step()
        if step % 100 == 0:
            curve.append((step, mean_answer_loss(model, evaluation_batches(held, SEQ_LEN, 1, pad))[0]))
    return {"kind": "baseline", "method": method, "lr": rate, "curve": curve}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("runs/night"))
    parser.add_argument("--baseline", action="store_true")
    parser.add_argument("--worker", action="store_true")
    given = parser.parse_args()
    if given.worker:
        raise SystemExit(worker(given.folder))
    if given.baseline:
        given.folder.mkdir(parents=True, exist_ok=True)
        results = given.folder / "baseline.jsonl"
        there = {(line["method"], line["lr"]) for line in lines(results)}
        for method, rate in BASELINES:
            if (method, rate) not in there:
                with open(results, "a", encoding="utf-8") as file:
                    file.write(json.dumps(baseline(given.folder, method, rate)) + "\n")
    else:
        night(given.folder)

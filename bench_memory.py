"""Peak memory of training steps on real geometries with random weights, beside what ``--plan`` says."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch

import manifolds
import memory_plan
from bench_models import Endless, ghost_model
from bench_tools import BenchError, in_own_process, machine, print_table, resident_bytes, write_json
from night_shift import AntigravitySentinel, LayerPeel, MemoryContingency, Shape, TrainingGovernor
from night_watch import NightWatch
from prime_device import check_device, memory_peak, return_freed_memory
from qwen_prime_wrapper import count_parameters
from training_recipe import Recipe
from vote_rules import rule_named
from vote_trainer import VoteTrainer


@dataclass(frozen=True)
class MemorySetting:
    """A geometry and how it is trained: with gradient checkpointing, on a CPU in float32."""

    geometry: str
    vote_rule: str
    seq_len: int
    rows: int = 1
    peel: str = "none"
    window: int | None = None
    limit_gb: float | None = None
    """What it may need."""


MEMORY_SETTINGS = {
    "coder-512": MemorySetting("Qwen2.5-Coder-1.5B", "momentum", 512, limit_gb=6.0),
    "coder-512-compact": MemorySetting("Qwen2.5-Coder-1.5B", "compact", 512, limit_gb=4.6),
    "coder-1024": MemorySetting("Qwen2.5-Coder-1.5B", "momentum", 1024, limit_gb=6.6),
    # The trainer's default, whose size nobody has set a limit to.
    "coder-4x512": MemorySetting("Qwen2.5-Coder-1.5B", "momentum", 512, rows=4),
    "coder-4x512-compact": MemorySetting("Qwen2.5-Coder-1.5B", "compact", 512, rows=4),
    "qwen3-512": MemorySetting("Qwen3-1.7B", "momentum", 512, limit_gb=6.8),
    "coder-512-phase-1": MemorySetting("Qwen2.5-Coder-1.5B", "momentum", 512, peel="v7", limit_gb=4.2),
    # Eight layers open from the first step, the next eight below from the second.
    "coder-512-window-8": MemorySetting("Qwen2.5-Coder-1.5B", "momentum", 512, peel="0:1:8", window=8),
    "hundred-million": MemorySetting("hundred-million", "momentum", 512),
    "toy": MemorySetting("toy", "momentum", 64),
}


@dataclass(frozen=True)
class MemoryBench:
    """Peak memory of training steps on real geometries with random weights, beside what --plan says."""

    settings: tuple[str, ...] = ()
    """Which of the settings, by name; all by default."""
    steps: int = 1
    """Training steps of one micro-batch."""
    device: str = "cpu"
    """Where to train; on the CPU memory is what is resident beyond what the imports are."""
    json: Path | None = None
    """Also write the results as JSON."""
    worker: bool = False
    """For internal use: measure the one selected setting in this process and print its line."""

    def __post_init__(self) -> None:
        if unknown := [x for x in self.settings if x not in MEMORY_SETTINGS]:
            raise ValueError(f"settings has {unknown[0]}, expected of {', '.join(MEMORY_SETTINGS)}")
        if self.steps < 1:
            raise ValueError(f"steps is {self.steps}, expected at least 1")


def measure_memory(name: str, steps: int, device: str) -> dict[str, Any]:
    """Train so many steps of one micro-batch in this process; bytes above those before the model was built.

    The watch of a real run is on. Its probe of the coming shape, whose peak is that of a step, is left out of a
    measurement of one step: on a CPU it takes a third of the time.
    """
    setting = MEMORY_SETTINGS[name]
    rule = rule_named(setting.vote_rule)
    on_cpu = torch.device(device).type == "cpu"
    return_freed_memory()
    # A first small product starts the libraries' threads, whose memory belongs to the imports.
    (torch.ones(64, 64) @ torch.ones(64, 64)).sum().item()
    before = resident_bytes() if on_cpu else 0
    model = ghost_model(setting.geometry, manifolds.build("compact" if rule.vote_bits else manifolds.DEFAULT))
    model.to(torch.device(device))  # type: ignore[arg-type]
    recipe = Recipe(
        steps=100,
        grad_accum=1,
        lr=1e-4,
        vote_rule=cast(Any, setting.vote_rule),
        compute="float32" if on_cpu else "auto",
        device=device,
    )
    peel = LayerPeel.parse(setting.peel, setting.window)
    watch = NightWatch(
        peel,
        AntigravitySentinel(),
        TrainingGovernor.for_rule(setting.vote_rule),
        MemoryContingency(Shape(setting.seq_len, setting.rows, 1)),
    )
    data = Endless(model.config.vocab_size, setting.seq_len, setting.rows)
    trainer = VoteTrainer(model, cast(Any, data), recipe, watch)
    trainer._probed = steps == 1
    trainer.supervisor.apply(0)
    seconds, losses, flips = [], [], 0
    for _ in range(steps):
        started = time.perf_counter()
        result = trainer.step()
        seconds.append(round(time.perf_counter() - started, 1))
        losses.append(round(result.loss, 4))
        flips += sum(m.flips for m in result.moved.values())
        if result.events and result.events[-1][0] == "out_of_memory":
            raise BenchError(f"{name}: out of memory, {result.events[-1][1]}")
    peak = memory_peak(device) - before
    open_layers = len(trainer.supervisor.now or ())
    settings = memory_plan.Settings(
        vote_rule=setting.vote_rule,
        seq_len=setting.seq_len,
        batch_size=setting.rows,
        peel=peel,
        compute=recipe.compute,
        cuda=not on_cpu,
    )
    planned = memory_plan.total(memory_plan.budget(model, settings, open_layers))
    if not on_cpu:
        # The peak is of what is in use.
        planned -= memory_plan.CUDA_CONTEXT + memory_plan.CUDA_HELD
    return {
        "setting": name,
        **{key: getattr(setting, key) for key in ("geometry", "vote_rule", "rows", "seq_len", "limit_gb")},
        "open_layers": open_layers,
        "parameters": count_parameters(model),
        "peak_gb": round(peak / 1e9, 3),
        "planned_gb": round(planned / 1e9, 3),
        "peak_over_plan": round(peak / planned, 3),
        "losses": losses,
        "flips": flips,
        "seconds": seconds,
    }


def bench_memory(config: MemoryBench) -> int:
    """Measure each setting in a process of its own; as a worker, one of them."""
    check_device(config.device)
    names = config.settings or tuple(n for n in MEMORY_SETTINGS if n != "toy")
    if config.worker:
        print(json.dumps(measure_memory(names[0], config.steps, config.device)))
        return 0
    results = []
    for name in names:
        arguments = ["memory", "--settings", name, "--steps", str(config.steps), "--device", config.device]
        results.append(in_own_process([*arguments, "--worker"]))
    how = ("setting", "vote_rule", "rows", "seq_len", "open_layers")
    shown = (*how, "peak_gb", "limit_gb", "planned_gb", "peak_over_plan")
    rows = [[*(line[c] for c in shown), ", ".join(map(str, line["seconds"]))] for line in results]
    print_table(machine(), (*shown, "seconds"), rows)
    write_json(config.json, {"machine": machine(), "results": results})
    return 0

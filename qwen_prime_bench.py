"""Measurements, each with the machine, the versions and the commit it was taken on.

    python qwen_prime_bench.py train
    python qwen_prime_bench.py train --profile runs/profile
    python qwen_prime_bench.py generate
    python qwen_prime_bench.py kernels
    python qwen_prime_bench.py grow --plot assets/growth.png
    python qwen_prime_bench.py import --geometry Qwen2.5-Coder-1.5B
    python qwen_prime_bench.py memory --settings coder-512 --steps 2
    python qwen_prime_bench.py save
    python qwen_prime_bench.py gpu --data runs/shards
    python qwen_prime_bench.py quality --tasks stdlib --methods adamw momentum

``train`` compares a step of vote training with what people would use instead: tokens per second and memory, and how
much of the step went into casting and applying votes; with ``--profile`` it writes a trace and a page on where the time
of one step goes. ``generate`` compares ways to write tokens. ``kernels`` times every hot operation against what it
replaces. ``grow`` shows how a step's cost grows with parameters, tokens and micro-batches. ``import`` converts a model
folder of a real geometry with random weights. ``memory`` trains whole steps of the real geometries and compares the
peak with the plan. ``save`` times saves of the whole training state. ``gpu`` is ``train`` at full size on a card, with
the phases of the Night Shift and enforced limits of memory. ``quality`` compares training methods by what they learn
and what they forget (``prime_quality``); its results file grows line by line, so it can be stopped and called again.

Each sub-command has a room of its own (``bench_*.py``), prints a table and writes ``--json``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any

import tyro

import prime_cli
from bench_generation import GenerateBench, bench_generate
from bench_gpu import GpuBench, bench_gpu
from bench_growth import GrowBench, bench_grow
from bench_import import ImportBench, bench_import
from bench_kernels import KernelBench, bench_kernels
from bench_memory import MemoryBench, bench_memory
from bench_quality import QualityBench, bench_quality
from bench_saving import SaveBench, bench_saving
from bench_tools import BenchError
from bench_training import TrainBench, bench_train
from ghost_grid import GhostError
from night_shift import NightShiftError
from prime_checkpoint import CheckpointError
from prime_device import DeviceError
from quality_tasks import QualityError
from qwen_prime_wrapper import ModelError
from text_records import DataError
from training_recipe import TrainError

BenchConfig = (
    Annotated[TrainBench, tyro.conf.subcommand("train")]
    | Annotated[GenerateBench, tyro.conf.subcommand("generate")]
    | Annotated[KernelBench, tyro.conf.subcommand("kernels")]
    | Annotated[GrowBench, tyro.conf.subcommand("grow")]
    | Annotated[ImportBench, tyro.conf.subcommand("import")]
    | Annotated[MemoryBench, tyro.conf.subcommand("memory")]
    | Annotated[SaveBench, tyro.conf.subcommand("save")]
    | Annotated[GpuBench, tyro.conf.subcommand("gpu")]
    | Annotated[QualityBench, tyro.conf.subcommand("quality")]
)
_ROOMS: dict[type, Callable[[Any], int]] = {
    TrainBench: bench_train,
    GenerateBench: bench_generate,
    KernelBench: bench_kernels,
    GrowBench: bench_grow,
    ImportBench: bench_import,
    MemoryBench: bench_memory,
    SaveBench: bench_saving,
    GpuBench: bench_gpu,
    QualityBench: bench_quality,
}
_ERRORS = (
    *(BenchError, QualityError, DataError, ModelError, CheckpointError, GhostError, OSError),
    *(TrainError, NightShiftError, DeviceError),
)


def main(config: BenchConfig) -> int:
    return _ROOMS[type(config)](config)


if __name__ == "__main__":
    raise SystemExit(prime_cli.run(BenchConfig, main, _ERRORS))

"""Measurements, each with the machine, the versions and the commit it was taken on.

    python qwen_prime_bench.py kernels
    python qwen_prime_bench.py import --geometry Qwen2.5-Coder-1.5B
    python qwen_prime_bench.py memory --settings coder-512 --steps 2
    python qwen_prime_bench.py quality --tasks stdlib --methods adamw momentum

``kernels`` times every hot operation against what it replaces, alternating in one process, medians over rounds:
machines are shared, so the ratio within a round counts, not the time. Then it trains one whole step of a model of
about a hundred million parameters and says how much of it went into casting and applying votes. ``import`` writes a
model folder of a real geometry with random weights and converts it in a process of its own, whose time and peak memory
are reported. ``memory`` trains whole steps of the real geometries and compares the peak with the plan. ``quality``
compares training methods by what they learn and what they forget (``prime_quality.py``); its results file grows line
by line, so it can be stopped and called again.
"""

from __future__ import annotations

import json
import logging
import math
import os
import platform
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, cast
from unittest import mock

import torch
import tyro
from rich.console import Console
from rich.table import Table
from safetensors.torch import save_file
from tqdm import tqdm
from transformers import PreTrainedModel

import ghost_kernels as kernels
import manifolds
import memory_plan
import prime_cli
import prime_quality as quality
import vote_trainer
from ghost_core import GhostError, GhostGrid
from night_shift import AntigravitySentinel, LayerPeel, MemoryContingency, NightShiftError, Shape, TrainingGovernor
from packed_batches import Batch
from prime_checkpoint import CheckpointError
from prime_device import memory_peak, return_freed_memory
from prime_telemetry import read_lines
from qwen_prime_wrapper import (
    ModelError,
    assign_tensors,
    build_model,
    count_parameters,
    expected_tensors,
    source_name,
)
from text_records import DataError
from vote_rules import rule_named
from vote_trainer import NightWatch, Recipe, TrainError, VoteTrainer

log = logging.getLogger("bench")

ROOT = Path(__file__).resolve().parent
_COMMON = {
    "hidden_act": "silu",
    "num_hidden_layers": 28,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1000000.0,
    "tie_word_embeddings": True,
    "vocab_size": 151936,
    "bos_token_id": 151643,
    "eos_token_id": 151645,
    "torch_dtype": "bfloat16",
}
GEOMETRIES: dict[str, dict[str, Any]] = {
    "Qwen2.5-Coder-1.5B": {
        **_COMMON,
        "model_type": "qwen2",
        "architectures": ["Qwen2ForCausalLM"],
        "hidden_size": 1536,
        "intermediate_size": 8960,
        "num_attention_heads": 12,
        "num_key_value_heads": 2,
        "max_position_embeddings": 32768,
    },
    "hundred-million": {
        **_COMMON,
        "model_type": "qwen2",
        "architectures": ["Qwen2ForCausalLM"],
        "hidden_size": 768,
        "intermediate_size": 2560,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "num_key_value_heads": 4,
        "max_position_embeddings": 2048,
        "vocab_size": 16384,
        "bos_token_id": 0,
        "eos_token_id": 0,
    },
    "Qwen3-1.7B": {
        **_COMMON,
        "model_type": "qwen3",
        "architectures": ["Qwen3ForCausalLM"],
        "hidden_size": 2048,
        "intermediate_size": 6144,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "max_position_embeddings": 40960,
    },
}


@dataclass(frozen=True)
class MemorySetting:
    """A geometry and how it is trained: batch 1, gradient checkpointing, float32."""

    geometry: str
    vote_rule: str
    seq_len: int
    peel: str = "none"
    window: int | None = None
    limit_gb: float | None = None
    """What it may need."""


MEMORY_SETTINGS = {
    "coder-512": MemorySetting("Qwen2.5-Coder-1.5B", "momentum", 512, limit_gb=6.0),
    "coder-512-compact": MemorySetting("Qwen2.5-Coder-1.5B", "compact", 512, limit_gb=4.6),
    "coder-1024": MemorySetting("Qwen2.5-Coder-1.5B", "momentum", 1024, limit_gb=6.6),
    "qwen3-512": MemorySetting("Qwen3-1.7B", "momentum", 512, limit_gb=6.8),
    "coder-512-phase-1": MemorySetting("Qwen2.5-Coder-1.5B", "momentum", 512, "v7", limit_gb=4.2),
    # Eight layers open from the first step, the next eight below from the second.
    "coder-512-window-8": MemorySetting("Qwen2.5-Coder-1.5B", "momentum", 512, "0:1:8", window=8),
    "hundred-million": MemorySetting("hundred-million", "momentum", 512),
}


class BenchError(RuntimeError):
    """A measurement that cannot be made here."""


@dataclass(frozen=True)
class ImportBench:
    """Convert a folder of a real geometry with random weights."""

    geometry: Literal["Qwen2.5-Coder-1.5B", "Qwen3-1.7B"] = "Qwen2.5-Coder-1.5B"
    """Shapes of this model."""
    folder: Path = Path("runs/bench_import")
    """Where the model folder (3 to 4 GB) and the checkpoint (as large) go."""
    keep: bool = False
    """Keep both afterwards."""
    json: Path | None = None
    """Also write the result as JSON."""


@dataclass(frozen=True)
class KernelBench:
    """Time snap, dequantize, cast and apply against what they replace."""

    rows: int = 4096
    """Rows of the matrix."""
    columns: int = 2048
    """Columns of the matrix."""
    rounds: int = 7
    """Rounds; medians are reported."""
    micro_batches: int = 32
    """Micro-batches of 512 tokens in the step of a whole model; 0 leaves that part out."""
    vote_rule: Literal["momentum", "compact", "supermajority", "stochastic"] = "momentum"
    """The rule of that step."""
    json: Path | None = None
    """Also write the result as JSON."""

    def __post_init__(self) -> None:
        if min(self.rows, self.columns, self.rounds) < 1:
            raise ValueError("rows, columns and rounds are expected to be at least 1")


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


@dataclass(frozen=True)
class QualityBench:
    """Compare training methods: held-out loss of a new domain, and what it costs in the old one."""

    tasks: tuple[str, ...] = tuple(quality.TASKS)
    """Which tasks, by name."""
    methods: tuple[str, ...] = quality.DEFAULT_METHODS
    """Which methods, by name."""
    seeds: tuple[int, ...] = (0, 1)
    """Order of the data and random draws."""
    lrs: tuple[float, ...] = ()
    """Learning rates instead of the task's and method's own."""
    steps: int | None = None
    """Steps instead of the task's own; results of other numbers of steps are not compared."""
    data_root: Path = Path("../shared/data")
    """Folder of the corpora and models that are not in assets/."""
    results: Path = Path("runs/quality/results.jsonl")
    """Where results are kept; runs that are in it are not run again."""
    markdown: Path | None = None
    """Also write the summary as a markdown table."""
    jobs: int = 2
    """Worker processes at a time."""
    threads: int = 1
    """Threads of each."""
    device: str = "cpu"
    """Where to train."""
    summary: bool = False
    """Run nothing; print the summary of the results that are there."""
    worker: bool = False
    """For internal use: execute the one selected run in this process and print its results line."""

    def __post_init__(self) -> None:
        for name, known in (("tasks", quality.TASKS), ("methods", quality.METHODS)):
            chosen = getattr(self, name)
            if not chosen or (unknown := [x for x in chosen if x not in known]):
                raise ValueError(f"{name} has {unknown[0] if chosen else 'none'}, expected of {', '.join(known)}")
        if not self.seeds:
            raise ValueError("seeds has none, expected at least one")
        if any(not 0 < rate <= 1 for rate in self.lrs):
            raise ValueError(f"lrs is {self.lrs}, expected each above 0 and at most 1")
        for name in ("steps", "jobs", "threads"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} is {value}, expected at least 1")


BenchConfig = (
    Annotated[ImportBench, tyro.conf.subcommand("import")]
    | Annotated[KernelBench, tyro.conf.subcommand("kernels")]
    | Annotated[MemoryBench, tyro.conf.subcommand("memory")]
    | Annotated[QualityBench, tyro.conf.subcommand("quality")]
)


def machine() -> dict[str, Any]:
    """What a figure belongs to."""
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    model = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").exists():
        names = [x for x in Path("/proc/cpuinfo").read_text().splitlines() if x.startswith("model name")]
        model = names[0].split(":", 1)[1].strip() if names else model
    return {
        "cpu": model,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "torch": str(torch.__version__),
        "python": platform.python_version(),
        "commit": commit.stdout.strip() or None,
    }


# -- import -----------------------------------------------------------------------------------------------------------


def make_folder(geometry: str, folder: Path) -> int:
    """Write a bf16 model folder of that geometry with random weights in shards; returns its parameters."""
    folder.mkdir(parents=True, exist_ok=True)
    config = GEOMETRIES[geometry]
    model = build_model(config, manifolds.build())
    shapes = {source_name(n): s for n, (s, _) in expected_tensors(model).items() if not n.endswith(".grid.scale")}
    generator = torch.Generator().manual_seed(0)
    shard: dict[str, torch.Tensor] = {}
    weight_map: dict[str, str] = {}
    pending = list(shapes.items())
    with tqdm(total=sum(math.prod(s) for s in shapes.values()), unit="weight", unit_scale=True, desc="make") as bar:
        for number in range(len(pending)):
            name, shape = pending[number]
            norm = len(shape) == 1 and "norm" in name
            value = torch.empty(shape, dtype=torch.bfloat16)
            value.fill_(1.0) if norm else value.normal_(0, 0.02, generator=generator)
            shard[name] = value
            bar.update(value.numel())
            if sum(v.numel() for v in shard.values()) > 4e8 or number == len(pending) - 1:
                file = f"model-{len(set(weight_map.values())) + 1:05d}.safetensors"
                save_file(shard, folder / file, metadata={"format": "pt"})
                weight_map.update(dict.fromkeys(shard, file))
                shard.clear()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    (folder / "config.json").write_text(json.dumps(config))
    tokenizer = ROOT / "assets" / "tiny_coder"
    for file in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        if not (tokenizer / file).is_file():
            raise BenchError(f"{tokenizer / file} is missing: restore the assets folder")
        shutil.copy(tokenizer / file, folder)
    return sum(math.prod(s) for s in shapes.values())


def bench_import(config: ImportBench) -> dict[str, Any]:
    """Time and peak memory of a conversion, the writing of the checkpoint included."""
    folder = config.folder / config.geometry
    parameters = make_folder(config.geometry, folder)
    output, report = config.folder / f"{config.geometry}_prime_init.pt", config.folder / "report.json"
    command = [sys.executable, str(ROOT / "qwen_prime_importer.py"), "--model", str(folder), "--output", str(output)]
    started = time.perf_counter()
    result = subprocess.run([*command, "--report", str(report), "--force"])
    seconds = time.perf_counter() - started
    if result.returncode:
        raise BenchError(f"the importer failed with exit code {result.returncode}")
    written = json.loads(report.read_text())
    figures = {
        "geometry": config.geometry,
        "parameters": parameters,
        "seconds, process": round(seconds, 1),
        "peak resident memory, GB": round(written["peak_rss_bytes"] / 1e9, 2),
        "source, GB": round(sum(f.stat().st_size for f in folder.glob("*.safetensors")) / 1e9, 2),
        "checkpoint, GB": round(output.stat().st_size / 1e9, 2),
        "lowest SNR, dB": written["lowest_snr_db"],
    }
    if not config.keep:
        shutil.rmtree(config.folder)
    return figures


# -- kernels ----------------------------------------------------------------------------------------------------------


def alternate(functions: dict[str, Callable[[], Any]], rounds: int) -> dict[str, float]:
    """Median seconds of each function; one call of each per round, after one round that is not counted."""
    times: dict[str, list[float]] = {name: [] for name in functions}
    for turn in tqdm(range(rounds + 1), desc="kernels", leave=False, disable=None):
        for name, function in functions.items():
            started = time.perf_counter()
            function()
            if turn:
                times[name].append(time.perf_counter() - started)
    return {name: statistics.median(values) for name, values in times.items()}


def bench_kernels(config: KernelBench) -> dict[str, Any]:
    """Nanoseconds per weight of each kernel and of the operation it is measured against."""
    rows, columns = config.rows, config.columns
    table = manifolds.build()
    generator = torch.Generator().manual_seed(0)
    weights = torch.randn(rows, columns, generator=generator) * 0.02
    gradient = torch.randn(rows, columns, generator=generator) * 1e-3
    scale = kernels.row_scales(weights, 1.25)
    indices, _ = kernels.snap(weights, scale, table)
    normal = weights / scale[:, None]
    out = torch.empty_like(weights)
    units = kernels.VoteUnits.for_buffer(8, 32)
    yardstick = torch.full((rows,), 0.3 * units.unit / 32 / 1e-3)
    votes = torch.zeros(rows, columns, dtype=torch.int8)
    squares, sketch = torch.zeros(2, rows, dtype=torch.int64)
    every = torch.arange(rows)
    for k in range(32):
        kernels.cast_votes(
            gradient, every, yardstick, votes, squares, sketch, keys=kernels.hash_keys(0), slot=k, units=units
        )
    stride = kernels.integer_strides(kernels.inverse_scales(scale), 1e-4, units.unit)
    saved = indices.clone(), votes.clone()
    scratch = indices.clone(), votes.clone()
    tokens, inputs = torch.randn(512, rows), torch.randn(512, columns)

    def restore() -> None:
        scratch[0].copy_(saved[0])
        scratch[1].copy_(saved[1])

    def apply(backend: str) -> None:
        restore()
        kernels.apply_votes(*scratch, stride, table, keys=(1, 2, 3, 4), decay=45875, carry=units.carry, backend=backend)

    def cast(backend: str) -> None:
        kernels.cast_votes(
            gradient, every, yardstick, scratch[1], squares, sketch, keys=(1, 2), slot=3, units=units, backend=backend
        )

    short = alternate(
        {
            "snap": lambda: kernels.snap(weights, scale, table, out=scratch[0]),
            "torch.searchsorted": lambda: torch.searchsorted(table.values, normal),
            "dequantize": lambda: kernels.dequantize(saved[0], scale, table, out=out),
            "copy of its output": lambda: out.copy_(weights),
            "cast votes": lambda: cast("numba"),
            "cast votes, torch": lambda: cast("torch"),
            "weight gradient of 512 tokens": lambda: tokens.T @ inputs,
            "apply votes (with restoring)": lambda: apply("numba"),
            "apply votes, torch (with restoring)": lambda: apply("torch"),
            "restoring its state": restore,
        },
        config.rounds,
    )
    figures: dict[str, Any] = {f"{n}, ns per weight": round(t / weights.numel() * 1e9, 3) for n, t in short.items()}
    figures["snap, million weights per second"] = round(weights.numel() / short["snap"] / 1e6, 1)
    figures["snap against searchsorted"] = round(short["torch.searchsorted"] / short["snap"], 1)
    figures["dequantize against copy"] = round(short["copy of its output"] / short["dequantize"], 2)
    figures["cast, share of its matrix product"] = round(
        short["cast votes"] / short["weight gradient of 512 tokens"], 3
    )
    if config.micro_batches:
        figures |= bench_step(config.micro_batches, config.vote_rule)
    return figures


def random_model(geometry: str, manifold: manifolds.Manifold) -> PreTrainedModel:
    """A model of that geometry with Gaussian weights on a manifold: for time and memory, not for what it says."""
    model = build_model(GEOMETRIES[geometry], manifold)
    generator = torch.Generator().manual_seed(0)
    tensors: dict[str, torch.Tensor] = {}
    for name, (shape, _) in expected_tensors(model).items():
        if name.endswith(".grid.indices"):
            grid = GhostGrid(shape[0], shape[1], manifold)
            grid.import_weights(torch.randn(shape, generator=generator) * 0.02)
            tensors[name], tensors[name.removesuffix("indices") + "scale"] = grid.indices, grid.scale
        elif not name.endswith(".grid.scale"):
            tensors[name] = torch.ones(shape) if "norm" in name else torch.zeros(shape)
    assign_tensors(model, tensors, copy=False)
    return model


class _Endless:
    """Micro-batches of one row of random tokens, every position an answer."""

    def __init__(self, vocabulary: int, tokens: int) -> None:
        self.vocabulary, self.tokens = vocabulary, tokens
        self.seq_len, self.batch_size, self.pad_id = tokens, 1, 0
        self.generator = torch.Generator().manual_seed(0)

    def __next__(self) -> Batch:
        ids = torch.randint(self.vocabulary, (1, self.tokens), generator=self.generator)
        return Batch(ids, ids.clone(), torch.arange(self.tokens)[None], 1, self.tokens, self.tokens - 1)

    def state_dict(self) -> dict[str, Any]:
        """Nothing: random tokens need not be dealt out twice."""
        return {}


def bench_step(micro_batches: int, vote_rule: str) -> dict[str, Any]:
    """Share of a training step that casting and applying votes take; the first, unmeasured step is a short one.

    Casting is all of ``GhostGrid.accept``: the test for finite numbers, the conversion, the kernel. Applying includes
    the rows' new yardsticks.
    """
    rule = rule_named(vote_rule)
    model = random_model("hundred-million", manifolds.build("compact" if rule.vote_bits else manifolds.DEFAULT))
    batches: Any = _Endless(model.config.vocab_size, 512)
    spent = {"cast": 0.0, "apply": 0.0}

    def timed(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def run(*arguments: Any, **options: Any) -> Any:
            started = time.perf_counter()
            result = function(*arguments, **options)
            spent[name] += time.perf_counter() - started
            return result

        return run

    seconds = 0.0
    for count in (1, micro_batches):
        recipe = Recipe(steps=2, grad_accum=count, lr=1e-4, vote_rule=cast(Any, vote_rule), device="cpu")
        trainer = VoteTrainer(model, batches, recipe)
        with mock.patch.object(GhostGrid, "accept", timed("cast", GhostGrid.accept)):
            # Observations first: a step that also measures would not be like any other.
            trainer._measure(next(batches), 1.0)
            spent.update(dict.fromkeys(spent, 0.0))
            started = time.perf_counter()
            with mock.patch.object(vote_trainer, "apply_votes", timed("apply", vote_trainer.apply_votes)):
                trainer.step()
            seconds = time.perf_counter() - started
    return {
        "whole step, parameters": count_parameters(model),
        "whole step, tokens": 512 * micro_batches,
        "whole step, seconds": round(seconds, 1),
        "casting, share of the step": round(spent["cast"] / seconds, 4),
        "applying, share of the step": round(spent["apply"] / seconds, 4),
        "casting and applying, share of the step": round((spent["cast"] + spent["apply"]) / seconds, 4),
    }


# -- memory -----------------------------------------------------------------------------------------------------------


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
    model = random_model(setting.geometry, manifolds.build("compact" if rule.vote_bits else manifolds.DEFAULT))
    model.to(torch.device(device))  # type: ignore[arg-type]
    recipe = Recipe(steps=100, grad_accum=1, lr=1e-4, vote_rule=cast(Any, setting.vote_rule), device=device)
    peel = LayerPeel.parse(setting.peel, setting.window)
    watch = NightWatch(
        peel,
        AntigravitySentinel(),
        TrainingGovernor.for_rule(setting.vote_rule),
        MemoryContingency(Shape(setting.seq_len, 1, 1)),
    )
    trainer = VoteTrainer(model, cast(Any, _Endless(model.config.vocab_size, setting.seq_len)), recipe, watch)
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
        vote_rule=setting.vote_rule, seq_len=setting.seq_len, peel=peel, compute=recipe.compute, cuda=not on_cpu
    )
    planned = memory_plan.total(memory_plan.budget(model, settings, open_layers))
    if not on_cpu:
        planned -= memory_plan.CUDA_CONTEXT
    return {
        "setting": name,
        **{key: getattr(setting, key) for key in ("geometry", "vote_rule", "seq_len", "limit_gb")},
        "open_layers": open_layers,
        "parameters": count_parameters(model),
        "peak_gb": round(peak / 1e9, 3),
        "planned_gb": round(planned / 1e9, 3),
        "peak_over_plan": round(peak / planned, 3),
        "losses": losses,
        "flips": flips,
        "seconds": seconds,
    }


def resident_bytes() -> int:
    """Resident memory of this process now; Linux only."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def bench_memory(config: MemoryBench) -> int:
    """Measure each setting in a process of its own; as a worker, one of them."""
    names = config.settings or tuple(MEMORY_SETTINGS)
    if config.worker:
        print(json.dumps({**measure_memory(names[0], config.steps, config.device), "machine": machine()}))
        return 0
    results = []
    for name in names:
        command = [sys.executable, __file__, "memory", "--settings", name, "--steps", str(config.steps)]
        process = subprocess.run(
            [*command, "--device", config.device, "--worker"], stdout=subprocess.PIPE, text=True, cwd=ROOT
        )
        if process.returncode:
            raise BenchError(f"the measurement of {name} ended with {process.returncode}")
        results.append(json.loads(process.stdout.splitlines()[-1]))
    table = Table(title=", ".join(f"{k} {v}" for k, v in machine().items() if v is not None), title_justify="left")
    shown = ("setting", "vote_rule", "seq_len", "open_layers", "peak_gb", "limit_gb", "planned_gb", "peak_over_plan")
    for column in (*shown, "seconds"):
        table.add_column(column)
    for line in results:
        table.add_row(*(str(line[c]) for c in shown), ", ".join(map(str, line["seconds"])))
    Console(width=None if sys.stdout.isatty() else 160).print(table)
    if config.json:
        config.json.write_text("".join(json.dumps(line) + "\n" for line in results), encoding="utf-8")
    return 0


# -- quality ----------------------------------------------------------------------------------------------------------


def bench_quality(config: QualityBench) -> int:
    """Run what is missing, then print the comparison; as a worker, one run and its results line."""
    if not config.summary:
        for name in config.methods:
            quality.check_method(name)
        tasks = [quality.check_task(name, config.data_root) for name in config.tasks]
        runs = quality.plan(tasks, config.methods, config.seeds, rates=config.lrs, steps=config.steps)
        if config.worker:
            if len(runs) != 1:
                raise BenchError(f"a worker executes one run, got {len(runs)}")
            result = quality.execute(runs[0], tasks[0], config.data_root, config.device)
            where = machine()
            print(json.dumps({**result, "machine": where, "commit": where["commit"]}, allow_nan=False))
            return 0
        quality.run_all(
            runs,
            lambda run: quality.worker_command(run, Path(__file__), config.data_root, config.device),
            config.results,
            jobs=config.jobs,
            threads=config.threads,
        )
    lines = [x for x in read_lines(config.results) if x["task"] in config.tasks and x["method"] in config.methods]
    rows = quality.summary(lines, config.steps)
    table = Table(title=f"{config.results}: nats per token", title_justify="left")
    for column in quality.COLUMNS:
        table.add_column(column, overflow="fold")
    for row in rows:
        table.add_row(*quality.cells(row))
    # Wide enough for the columns where the width of the output is unknown.
    Console(width=None if sys.stdout.isatty() else 200).print(table)
    if config.markdown:
        config.markdown.write_text(quality.markdown(rows), encoding="utf-8")
    return 0


def main(config: BenchConfig) -> int:
    if isinstance(config, QualityBench):
        return bench_quality(config)
    if isinstance(config, MemoryBench):
        return bench_memory(config)
    where = machine()
    figures = bench_import(config) if isinstance(config, ImportBench) else bench_kernels(config)
    table = Table(title=", ".join(f"{k} {v}" for k, v in where.items() if v is not None), title_justify="left")
    table.add_column("figure")
    table.add_column("value", justify="right")
    for name, value in figures.items():
        table.add_row(name, str(value))
    Console().print(table)
    if config.json:
        config.json.write_text(json.dumps({"machine": where, **figures}, indent=2) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(
        prime_cli.run(
            BenchConfig,
            main,
            (
                *(BenchError, quality.QualityError, DataError, ModelError, CheckpointError, GhostError, OSError),
                *(TrainError, NightShiftError),
            ),
        )
    )

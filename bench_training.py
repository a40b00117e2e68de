"""A step of vote training beside what people would use instead: tokens per second, and memory over the bare model.

Every method trains the same model on the same number of tokens in the same precision, with gradient checkpointing and
the same loss: summed nats of the answer tokens (``answer_loss``), each method on its own copy. A step is K
micro-batches, then the end of the step, which moves the weights; both are timed apart, so that a short step also
says what a long one costs: K' micro-batches of the same kind and one end. Both are also given in seconds of the
processor: where other programs come and go within a step, the clock says more of them than of the methods. What a
method does only once in hundreds of steps (the projections of GaLore and APOLLO, torchao's compilation) happens in the
first step, which does not count.

Memory is resident memory. *Bare* is what the model adds when it stands, before any training; *over bare* the
high-water mark of two steps above that; *process* the high-water mark of all, imports included.

The dense methods run as transformers' Trainer would run them, AdamW in its fused form. bfloat16 autocast where the
processor multiplies bfloat16 itself, else float32 for all: emulated, it is ten times slower than float32.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal, Protocol, cast
from unittest import mock

import torch
from tqdm import tqdm
from transformers import PreTrainedModel

import manifolds
import vote_trainer
from bench_models import NAMES, Endless, dense_model, ghost_model
from bench_tools import (
    Times,
    in_own_process,
    machine,
    peak_bytes,
    print_table,
    reset_peak,
    resident_bytes,
    version_of,
    write_json,
)
from ghost_grid import GhostGrid
from prime_device import has_native_bfloat16, return_freed_memory
from prime_quality import add_adapters
from qwen_prime_wrapper import answer_loss, count_parameters
from step_profile import profile_step
from training_recipe import Recipe
from vote_casting import Turn
from vote_rules import rule_named
from vote_trainer import VoteTrainer

BASELINE = "adamw"
STEP_ROWS = 32
"""Rows in the step that the targets speak of, in however many micro-batches."""


@dataclass(frozen=True)
class Method:
    """A way to train.

    Attributes:
        package: distribution that it needs beside the suite's own.
        vote_rule: of the suite's own methods.
        optimizer: of the others: from a model whose parameters that want gradients are to be trained.
        adapters: whether LoRA of rank 16 is put on the model first.
    """

    package: str | None = None
    vote_rule: str | None = None
    optimizer: Callable[[PreTrainedModel], torch.optim.Optimizer] | None = None
    adapters: bool = False


_RATE = 1e-5


def _trained(model: PreTrainedModel) -> list[torch.nn.Parameter]:
    return [p for p in model.parameters() if p.requires_grad]


def _adamw(model: PreTrainedModel) -> torch.optim.Optimizer:
    return torch.optim.AdamW(_trained(model), lr=_RATE, fused=True)


def _torchao(model: PreTrainedModel) -> torch.optim.Optimizer:
    from torchao.optim import AdamW8bit

    return AdamW8bit(_trained(model), lr=_RATE)


def _bitsandbytes(model: PreTrainedModel) -> torch.optim.Optimizer:
    import bitsandbytes

    return bitsandbytes.optim.AdamW8bit(_trained(model), lr=_RATE)


def _by_projection(model: PreTrainedModel, **settings: Any) -> list[dict[str, Any]]:
    """Matrices of attention and MLP with a projection of a quarter of the width, everything else without, as both
    authors' own scripts do."""
    inner = {id(p) for n, p in model.named_parameters() if p.ndim == 2 and (".self_attn." in n or ".mlp." in n)}
    low = [p for p in _trained(model) if id(p) in inner]
    rest = [p for p in _trained(model) if id(p) not in inner]
    rank = max(1, cast(Any, model.config).hidden_size // 4)
    return [{"params": rest}, {"params": low, "rank": rank, "update_proj_gap": 200, "proj_type": "std", **settings}]


def _apollo(model: PreTrainedModel) -> torch.optim.Optimizer:
    from apollo_torch import APOLLOAdamW

    groups = _by_projection(model, proj="random", scale_type="channel", scale=1.0)
    return APOLLOAdamW(groups, lr=_RATE)


def _galore(model: PreTrainedModel) -> torch.optim.Optimizer:
    from galore_torch import GaLoreAdamW

    return GaLoreAdamW(_by_projection(model, scale=0.25), lr=_RATE, no_deprecation_warning=True)


METHODS: Mapping[str, Method] = MappingProxyType(
    {
        "momentum": Method(vote_rule="momentum"),
        "compact": Method(vote_rule="compact"),
        BASELINE: Method("torch", optimizer=_adamw),
        "adamw-8bit-torchao": Method("torchao", optimizer=_torchao),
        "adamw-8bit-bitsandbytes": Method("bitsandbytes", optimizer=_bitsandbytes),
        "apollo": Method("apollo-torch", optimizer=_apollo),
        "galore": Method("galore-torch", optimizer=_galore),
        "lora": Method("peft", optimizer=_adamw, adapters=True),
    }
)
PACKAGES = tuple(dict.fromkeys(m.package for m in METHODS.values() if m.package and m.package != "torch"))


@dataclass(frozen=True)
class TrainBench:
    """Tokens per second and memory of vote training beside AdamW, 8-bit AdamW, APOLLO, GaLore and LoRA."""

    models: tuple[str, ...] = ("hundred-million", "tiny_coder")
    """Which models, by name."""
    methods: tuple[str, ...] = tuple(METHODS)
    """Which methods, by name; one whose package is not installed is listed as that."""
    seq_len: int = 512
    """Tokens in a row."""
    rows: int = 1
    """Rows in a micro-batch; what the trainer takes by default is four."""
    micro_batches: int | None = None
    """Micro-batches in a measured step; left out, as many as have 32 rows."""
    rounds: int = 3
    """Measured steps of each method; medians are reported."""
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """Of matrix products, for all methods; auto is bfloat16 where the processor has it in hardware."""
    speed: bool = True
    """Measure tokens per second."""
    memory: bool = True
    """Measure memory, each method in a process of its own."""
    profile: Path | None = None
    """Instead of comparing: write a trace and a breakdown of one step of the first model and method to this folder."""
    json: Path | None = None
    """Also write the results as JSON."""
    worker: bool = False
    """For internal use: measure the memory of the one selected method in this process and print its line."""

    def __post_init__(self) -> None:
        for name, known in (("models", NAMES), ("methods", METHODS)):
            chosen = getattr(self, name)
            if not chosen or (unknown := [x for x in chosen if x not in known]):
                raise ValueError(f"{name} has {unknown[0] if chosen else 'none'}, expected of {', '.join(known)}")
        for name, least in (("seq_len", 2), ("rows", 1), ("micro_batches", 1), ("rounds", 1)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise ValueError(f"{name} is {value}, expected at least {least}")
        if STEP_ROWS % self.rows:
            raise ValueError(f"rows is {self.rows}, expected a divisor of {STEP_ROWS}, the rows of a step")

    @property
    def step_of(self) -> int:
        """Micro-batches of the step that figures are given for."""
        return STEP_ROWS // self.rows

    @property
    def ran(self) -> int:
        """Micro-batches of a measured step."""
        return self.micro_batches or self.step_of

    @property
    def compute(self) -> str:
        """Type of matrix products."""
        if self.precision == "auto":
            return "bfloat16" if has_native_bfloat16("cpu") else "float32"
        return self.precision


# -- one method -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Parts:
    """Seconds of one step: all of its micro-batches, and its end, on the clock and of the processor; of votes also what
    casting and applying took."""

    micro_batches: float
    end: float
    processor_micro_batches: float
    processor_end: float
    casting: float = 0.0
    applying: float = 0.0

    def of_step(self, ran: int, count: int) -> float:
        """Seconds of a step of ``count`` micro-batches, from this one of ``ran``."""
        return self.micro_batches / ran * count + self.end

    def processor_of_step(self, ran: int, count: int) -> float:
        """The same in seconds of the processor, all threads together."""
        return self.processor_micro_batches / ran * count + self.processor_end


class Trained(Protocol):
    """A model with what trains it."""

    def step(self, count: int) -> Parts:
        """One step of ``count`` micro-batches."""
        ...


class DenseStep:
    """Steps of a float optimizer. Owns the model and the optimizer."""

    def __init__(self, model: PreTrainedModel, method: Method, compute: str, seq_len: int, rows: int) -> None:
        assert method.optimizer is not None
        if method.adapters:
            add_adapters(model, 0)
        self.model = model.train()
        self.compute = compute
        self.batches = Endless(model.config.vocab_size, seq_len, rows)
        model.activation_checkpointing_enable({"use_reentrant": False})
        self.optimizer = method.optimizer(model)

    def step(self, count: int) -> Parts:
        """One step; gradients are dropped at its end, as transformers' Trainer does."""
        times, processor = [time.perf_counter()], [time.process_time()]
        for _ in range(count):
            batch = next(self.batches)
            with torch.autocast("cpu", torch.bfloat16, enabled=self.compute == "bfloat16"):
                loss, _ = answer_loss(self.model, batch.input_ids, batch.labels, batch.position_ids)
            (loss / (count * batch.answer_tokens)).backward()
            loss.item()
        times.append(time.perf_counter())
        processor.append(time.process_time())
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        times.append(time.perf_counter())
        processor.append(time.process_time())
        return Parts(times[1] - times[0], times[2] - times[1], processor[1] - processor[0], processor[2] - processor[1])


class VoteStep:
    """Steps of a :class:`VoteTrainer`, taken apart by timing what it calls. Owns the model.

    Casting is all of ``GhostGrid.accept``: the test for finite numbers, the conversion, the kernel. Applying includes
    the rows' new yardsticks.
    """

    def __init__(self, model: PreTrainedModel, vote_rule: str, compute: str, seq_len: int, rows: int) -> None:
        self.model = model
        self.settings: dict[str, Any] = {"lr": 1e-4, "vote_rule": vote_rule, "compute": compute, "device": "cpu"}
        self.batches: Any = Endless(model.config.vocab_size, seq_len, rows)
        self._trainers: dict[int, VoteTrainer] = {}

    def trainer(self, count: int) -> VoteTrainer:
        """The trainer whose steps have so many micro-batches; all share the model and its votes."""
        if count not in self._trainers:
            self._trainers[count] = VoteTrainer(
                self.model, self.batches, Recipe(steps=1000, warmup=0, grad_accum=count, **self.settings)
            )
            # Observations first: a step that also measures would not be like any other.
            self._trainers[count].caster.measure(next(self.batches), Turn(0, 0, count, 1.0))
        return self._trainers[count]

    def step(self, count: int) -> Parts:
        """One step, its calls timed."""
        spent = {"cast": 0.0, "apply": 0.0, "micro": 0.0}
        processor = dict.fromkeys(spent, 0.0)

        def timed(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
            def run(*arguments: Any, **options: Any) -> Any:
                begun, worked = time.perf_counter(), time.process_time()
                result = function(*arguments, **options)
                spent[name] += time.perf_counter() - begun
                processor[name] += time.process_time() - worked
                return result

            return run

        trainer = self.trainer(count)
        with (
            mock.patch.object(GhostGrid, "accept", timed("cast", GhostGrid.accept)),
            mock.patch.object(vote_trainer, "apply_votes", timed("apply", vote_trainer.apply_votes)),
            mock.patch.object(trainer.caster, "cast", timed("micro", trainer.caster.cast)),
        ):
            started, worked = time.perf_counter(), time.process_time()
            trainer.step()
            whole, work = time.perf_counter() - started, time.process_time() - worked
        return Parts(
            spent["micro"],
            whole - spent["micro"],
            processor["micro"],
            work - processor["micro"],
            spent["cast"],
            spent["apply"],
        )


def bare_model(name: str, method: Method) -> PreTrainedModel:
    """The model that a method trains, on its manifold where it is the suite's own."""
    if method.vote_rule is None:
        return dense_model(name)
    compact = rule_named(method.vote_rule).vote_bits > 0
    return ghost_model(name, manifolds.build("compact" if compact else manifolds.DEFAULT))


def make_trained(model: PreTrainedModel, method: Method, config: TrainBench) -> Trained:
    """A bare model with what trains it."""
    batch = config.compute, config.seq_len, config.rows
    if method.vote_rule is None:
        return DenseStep(model, method, *batch)
    return VoteStep(model, method.vote_rule, *batch)


# -- speed ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Speed:
    """What the rounds of one method say."""

    parts: tuple[Parts, ...]
    config: TrainBench

    @cached_property
    def step(self) -> Times:
        """Seconds of a step of ``STEP_ROWS`` rows, round by round."""
        return Times(tuple(p.of_step(self.config.ran, self.config.step_of) for p in self.parts))

    @cached_property
    def processor_step(self) -> Times:
        """The same in seconds of the processor, which other programs on the machine do not take away."""
        return Times(tuple(p.processor_of_step(self.config.ran, self.config.step_of) for p in self.parts))

    def figures(self, baseline: Speed | None) -> dict[str, Any]:
        """Tokens per second of that step, with the middle half of the rounds, against the baseline's."""
        ran, step_of = self.config.ran, self.config.step_of
        work = STEP_ROWS * self.config.seq_len
        slow, fast = (work / s for s in reversed(self.step.spread))
        figures: dict[str, Any] = {
            "tokens_per_s": round(work / self.step.median, 1),
            "tokens_per_s_middle_half": [round(slow, 1), round(fast, 1)],
            "micro_batch_seconds": round(statistics.median(p.micro_batches / ran for p in self.parts), 4),
            "end_of_step_seconds": round(statistics.median(p.end for p in self.parts), 4),
            "speed_over_adamw": None if baseline is None else round(baseline.step.over(self.step), 3),
            "processor_speed_over_adamw": None
            if baseline is None
            else round(baseline.processor_step.over(self.processor_step), 3),
        }
        if any(p.casting for p in self.parts):
            for name, seconds in (
                ("casting", [p.casting / ran * step_of for p in self.parts]),
                ("applying", [p.applying for p in self.parts]),
            ):
                shares = (a / b for a, b in zip(seconds, self.step.seconds, strict=True))
                figures[f"{name}_share"] = round(statistics.median(shares), 4)
        return figures


def measure_speed(name: str, methods: Sequence[str], config: TrainBench) -> dict[str, Speed]:
    """Steps of all methods, alternating in this process."""
    trained = {m: make_trained(bare_model(name, METHODS[m]), METHODS[m], config) for m in methods}
    found: dict[str, list[Parts]] = {m: [] for m in methods}
    bar = tqdm(total=(config.rounds + 1) * len(methods), desc=name, unit="step", leave=False, disable=None)
    for one in trained.values():
        one.step(1)
        bar.update()
    for _ in range(config.rounds):
        for method, one in trained.items():
            found[method].append(one.step(config.ran))
            bar.update()
    bar.close()
    return {m: Speed(tuple(parts), config) for m, parts in found.items()}


# -- memory -----------------------------------------------------------------------------------------------------------


def measure_memory(name: str, method: str, config: TrainBench) -> dict[str, Any]:
    """Resident memory of two steps of one method in this process, which must be a fresh one."""
    return_freed_memory()
    # A first small product starts the libraries' threads, whose memory belongs to the imports.
    (torch.ones(64, 64) @ torch.ones(64, 64)).sum().item()
    before = resident_bytes()
    model = bare_model(name, METHODS[method])
    bare = resident_bytes()
    reset_peak()
    trained = make_trained(model, METHODS[method], config)
    # The second step meets what the first leaves behind, and its second micro-batch the gradients of its first; more of
    # either need no more.
    trained.step(1)
    trained.step(min(2, config.ran))
    peak = peak_bytes()
    return {
        "bare_gb": round((bare - before) / 1e9, 3),
        "over_bare_gb": round((peak - bare) / 1e9, 3),
        "process_gb": round(peak / 1e9, 3),
    }


# -- the comparison ---------------------------------------------------------------------------------------------------

COLUMNS = {
    "model": "model",
    "method": "method",
    "version": "version",
    "tokens_per_s": "tokens/s",
    "tokens_per_s_middle_half": "middle half",
    "speed_over_adamw": "x AdamW",
    "processor_speed_over_adamw": "by CPU time",
    "casting_share": "casting",
    "applying_share": "applying",
    "bare_gb": "bare GB",
    "over_bare_gb": "over bare GB",
    "memory_over_adamw": "x AdamW ",
    "process_gb": "process GB",
}


def bench_train(config: TrainBench) -> int:
    """Compare the methods on every model; as a worker, the memory of one; with ``profile``, look into one step."""
    if config.worker:
        print(json.dumps(measure_memory(config.models[0], config.methods[0], config)))
        return 0
    installed = [m for m in config.methods if METHODS[m].package is None or version_of(str(METHODS[m].package))]
    if config.profile is not None:
        return _profile(config, config.models[0], installed[0])
    where = machine(*PACKAGES)
    results: list[dict[str, Any]] = []
    for name in config.models:
        lines: dict[str, dict[str, Any]] = {
            m: {"model": name, "method": m, "version": _version(m)} for m in config.methods
        }
        if config.memory:
            # Before this process is large: the machine has one memory.
            for m in tqdm(installed, desc=f"{name}, memory", unit="method", leave=False, disable=None):
                lines[m] |= in_own_process(_worker_arguments(name, m, config))
            if BASELINE in installed:
                base = lines[BASELINE]["over_bare_gb"]
                for m in installed:
                    lines[m]["memory_over_adamw"] = round(lines[m]["over_bare_gb"] / base, 3) if base else None
        if config.speed:
            speeds = measure_speed(name, installed, config)
            for m, speed in speeds.items():
                lines[m] |= speed.figures(speeds.get(BASELINE))
        results += lines.values()
    rows = [[_cell(line.get(c)) for c in COLUMNS] for line in results]
    print_table(where, list(COLUMNS.values()), rows)
    print(
        f"batch {config.rows} x {config.seq_len} tokens, {config.compute}, gradient checkpointing, {config.rounds} "
        f"rounds of {config.ran} micro-batches; tokens/s and shares are of a step of {config.step_of}"
    )
    settings = {k: getattr(config, k) for k in ("seq_len", "rows", "rounds", "compute", "step_of")}
    write_json(config.json, {"machine": where, **settings, "micro_batches": config.ran, "results": results})
    return 0


def _version(method: str) -> str:
    package = METHODS[method].package
    if package is None:
        return "this suite"
    found = version_of(package)
    return f"{package} {found}" if found else f"{package} is not installed"


def _worker_arguments(name: str, method: str, config: TrainBench) -> list[str]:
    return [
        *("train", "--worker", "--models", name, "--methods", method, "--micro-batches", str(config.ran)),
        *("--seq-len", str(config.seq_len), "--rows", str(config.rows), "--precision", config.compute),
    ]


def _cell(value: Any) -> Any:
    return " to ".join(map(str, value)) if isinstance(value, list) else value


def _profile(config: TrainBench, name: str, method: str) -> int:
    model = bare_model(name, METHODS[method])
    trained = make_trained(model, METHODS[method], config)
    trained.step(1)
    folder = cast(Path, config.profile)
    title = (
        f"{name}, {count_parameters(model):,} parameters, {method}, one step of {config.ran} x "
        f"{config.rows} x {config.seq_len} tokens, {config.compute}"
    )
    where = machine()
    print(profile_step(lambda: trained.step(config.ran), folder, title, where))
    write_json(config.json, {"machine": where, "folder": str(folder), "title": title})
    return 0

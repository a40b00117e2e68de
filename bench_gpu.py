"""Full-size training on a card: tokens per second and memory beside AdamW, its 8-bit form and LoRA, and real limits.

Every method trains the same geometry with random weights on the same packed rows of real tokens, with gradient
checkpointing, in bfloat16. Vote training runs with the watch that a user's run has. The dense methods run as
transformers' Trainer runs them: fused AdamW, bfloat16 weights or float32 weights under autocast, nothing waited for
within a step. Methods take turns in one process; a step ends when the card is done.

Memory is what was in use on the card at once (``allocated``), model included, and for one method alone also what torch
held for it (``reserved``); the CUDA context (0.4 to 0.6 GB) is beside it.

``--limit-gb`` trains under a limit that torch enforces, context included, with 0.5 GB set aside for it.
"""

from __future__ import annotations

import gc
import json
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any, cast

import torch
from tqdm import tqdm
from transformers import AutoModelForCausalLM, PreTrainedModel

import manifolds
from bench_models import GEOMETRIES, config_of, gaussian_model
from bench_tools import BenchError, Times, in_own_process, machine, print_table, version_of, write_json
from night_shift import AntigravitySentinel, LayerPeel, MemoryContingency, Shape, TrainingGovernor
from night_watch import NightWatch
from packed_batches import Batch, PackedBatches
from prime_device import make_deterministic
from prime_quality import add_adapters
from qwen_prime_wrapper import answer_loss, parse_config
from token_shards import Manifest, ShardBlocks
from training_recipe import Recipe
from vote_rules import rule_named
from vote_trainer import VoteTrainer

DEVICE = torch.device("cuda")
CONTEXT = 500_000_000
"""Bytes set aside for the CUDA context where a limit is enforced."""
PAD = 151643
_RATE = 1e-5


@dataclass(frozen=True)
class CardMethod:
    """A way to train on a card.

    Attributes:
        package: distribution that it needs beside the suite's own.
        vote_rule: of the suite's own methods.
        dtype: of the dense methods' weights.
        optimizer: of the dense methods.
        adapters: whether LoRA of rank 16 is put on the model first.
    """

    package: str | None = None
    vote_rule: str | None = None
    dtype: torch.dtype = torch.bfloat16
    optimizer: Callable[[list[torch.nn.Parameter]], torch.optim.Optimizer] | None = None
    adapters: bool = False


def _adamw(parameters: list[torch.nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=_RATE, fused=True)


def _torchao(parameters: list[torch.nn.Parameter]) -> torch.optim.Optimizer:
    from torchao.optim import AdamW8bit

    return AdamW8bit(parameters, lr=_RATE)


BASELINE = "adamw-bf16"
METHODS = MappingProxyType(
    {
        "momentum": CardMethod(vote_rule="momentum"),
        "compact": CardMethod(vote_rule="compact"),
        BASELINE: CardMethod(optimizer=_adamw),
        "adamw": CardMethod(dtype=torch.float32, optimizer=_adamw),
        "adamw-8bit-torchao": CardMethod("torchao", optimizer=_torchao),
        "lora": CardMethod("peft", optimizer=_adamw, adapters=True),
    }
)


@dataclass(frozen=True)
class GpuBench:
    """Tokens per second and memory of full-size training on a card, beside AdamW, 8-bit AdamW and LoRA."""

    data: Path
    """Folder of token shards (qwen_prime_data.py materialize)."""
    models: tuple[str, ...] = ("Qwen2.5-Coder-1.5B", "Qwen3-1.7B")
    """Which geometries."""
    methods: tuple[str, ...] = tuple(METHODS)
    """Which methods; one whose package is not installed is listed as that."""
    seq_lens: tuple[int, ...] = (512, 1024, 2048)
    """Tokens in a micro-batch of one row."""
    micro_batches: int = 32
    """Micro-batches in a step."""
    rounds: int = 3
    """Measured steps of each method."""
    peel: bool = False
    """Instead of comparing: each phase of the Night Shift, of the first method, model and length."""
    limit_gb: tuple[float, ...] = ()
    """Instead of comparing: train the first method, model and length under these limits."""
    steps: int = 50
    """Steps under a limit."""
    json: Path | None = None
    """Also write the results as JSON."""
    worker: bool = False
    """For internal use: one limit, in this process."""

    def __post_init__(self) -> None:
        for name, known in (("models", GEOMETRIES), ("methods", METHODS)):
            chosen = getattr(self, name)
            if not chosen or (unknown := [x for x in chosen if x not in known]):
                raise ValueError(f"{name} has {unknown[0] if chosen else 'none'}, expected of {', '.join(known)}")
        if not self.seq_lens or min(*self.seq_lens, self.micro_batches, self.rounds, self.steps) < 1:
            raise ValueError("seq-lens, micro-batches, rounds and steps are expected to be at least 1")


def _batches(config: GpuBench, seq_len: int) -> PackedBatches:
    shards = Manifest.read(config.data).splits["train"]
    blocks = ShardBlocks(config.data, tuple(shards), seq_len, 0)
    return PackedBatches(blocks, seq_len=seq_len, batch_size=1, pad_id=PAD, seed=0)


class DenseCard:
    """Steps of a float optimizer on the card."""

    def __init__(self, name: str, method: CardMethod, batches: Iterator[Batch]) -> None:
        assert method.optimizer is not None
        self.batches, self.autocast = batches, method.dtype == torch.float32 or method.adapters
        parsed = parse_config({**config_of(name), "initializer_range": 0.02}, name)
        with DEVICE:
            model = AutoModelForCausalLM.from_config(parsed, dtype=method.dtype, attn_implementation="sdpa")
        if method.adapters:
            add_adapters(model, 0)
        self.model: PreTrainedModel = model.to(DEVICE).train()
        self.model.gradient_checkpointing_enable({"use_reentrant": False, "preserve_rng_state": False})
        self.optimizer = method.optimizer([p for p in self.model.parameters() if p.requires_grad])

    def step(self, count: int) -> int:
        """One step; how many tokens it read. Its bits may differ from run to run, as they do for everybody."""
        torch.use_deterministic_algorithms(False)
        try:
            return self._step(count)
        finally:
            torch.use_deterministic_algorithms(True)

    def _step(self, count: int) -> int:
        tokens = 0
        for _ in range(count):
            batch = next(self.batches)
            placed = (t.to(DEVICE, non_blocking=True) for t in (batch.input_ids, batch.labels, batch.position_ids))
            with torch.autocast("cuda", torch.bfloat16, enabled=self.autocast):
                loss, _ = answer_loss(self.model, *placed)
            (loss / (count * batch.answer_tokens)).backward()
            tokens += batch.input_ids.numel()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return tokens


class VoteCard:
    """Steps of a :class:`VoteTrainer` with its watch on the card."""

    def __init__(
        self, name: str, method: CardMethod, batches: PackedBatches, count: int, peel: LayerPeel | None = None
    ) -> None:
        assert method.vote_rule is not None
        rule = rule_named(method.vote_rule)
        table = manifolds.build("compact" if rule.vote_bits else manifolds.DEFAULT)
        model = gaussian_model(config_of(name), table, "cuda")
        recipe = Recipe(
            steps=1000, grad_accum=count, lr=1e-4, vote_rule=cast(Any, method.vote_rule), device="cuda", warmup=0
        )
        watch = NightWatch(
            peel or LayerPeel(),
            AntigravitySentinel(),
            TrainingGovernor.for_rule(method.vote_rule),
            MemoryContingency(Shape(batches.seq_len, 1, count)),
        )
        self.trainer = VoteTrainer(model, batches, recipe, watch)
        self.events: list[tuple[str, dict[str, Any]]] = []

    def step(self, count: int) -> int:
        """One step; how many tokens it read."""
        result = self.trainer.step()
        self.events += [e for e in result.events if e[0] in ("out_of_memory", "cuda_graphs")]
        self.loss = result.loss
        return result.micro_batches * self.trainer.batches.seq_len


def _make(config: GpuBench, name: str, method: str, seq_len: int, peel: LayerPeel | None = None) -> Any:
    batches = _batches(config, seq_len)
    if METHODS[method].vote_rule is None:
        return DenseCard(name, METHODS[method], batches)
    return VoteCard(name, METHODS[method], batches, config.micro_batches, peel)


def _timed(one: Any, count: int) -> tuple[float, int]:
    torch.cuda.synchronize()
    started = time.perf_counter()
    tokens = one.step(count)
    torch.cuda.synchronize()
    return time.perf_counter() - started, tokens


def _emptied() -> None:
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()


def _memory() -> dict[str, float]:
    return {
        "allocated_gb": round(torch.cuda.max_memory_allocated() / 1e9, 3),
        "reserved_gb": round(torch.cuda.max_memory_reserved() / 1e9, 3),
    }


def compare(config: GpuBench, name: str, seq_len: int) -> list[dict[str, Any]]:
    """All methods on one geometry and length: memory alone, then speed in turn."""
    lines: dict[str, dict[str, Any]] = {}
    installed = []
    for method in config.methods:
        package = METHODS[method].package
        lines[method] = {"model": name, "seq_len": seq_len, "method": method}
        if package is not None and version_of(package) is None:
            lines[method]["note"] = f"{package} is not installed"
            continue
        installed.append(method)
    built: dict[str, Any] = {}
    for method in tqdm(installed, desc=f"{name}, {seq_len}", leave=False, disable=None):
        held = torch.cuda.memory_allocated()
        _emptied()
        built[method] = _make(config, name, method, seq_len)
        for _ in range(2):
            built[method].step(config.micro_batches if METHODS[method].vote_rule else 2)
        torch.cuda.synchronize()
        # What torch holds beyond that depends here on the holes that the methods before have left.
        lines[method]["allocated_gb"] = round(_memory()["allocated_gb"] - held / 1e9, 3)
    times: dict[str, list[float]] = {m: [] for m in built}
    tokens = dict.fromkeys(built, 0)
    for _ in range(config.rounds):
        for method, one in built.items():
            seconds, tokens[method] = _timed(one, config.micro_batches)
            times[method].append(seconds)
    measured = {m: Times(tuple(s)) for m, s in times.items()}
    for method, t in measured.items():
        lines[method]["tokens_per_s"] = round(tokens[method] / t.median, 1)
        for base in (BASELINE, "adamw"):
            if base in measured:
                lines[method][f"speed_over_{base}"] = round(measured[base].over(t), 3)
        if isinstance(built[method], VoteCard):
            lines[method]["events"] = built[method].events
    built.clear()
    _emptied()
    return list(lines.values())


def peel_phases(config: GpuBench) -> list[dict[str, Any]]:
    """Speed and memory of each phase of the Night Shift, one after the other in one model."""
    name, method, seq_len = config.models[0], config.methods[0], config.seq_lens[0]
    one = _make(config, name, method, seq_len, LayerPeel.parse("v7"))
    layers = int(config_of(name)["num_hidden_layers"])
    lines = []
    for phase in range(1 + -(-layers // 2)):
        one.trainer.done = 0 if phase == 0 else 200 + 50 * (phase - 1)
        # The step that opens a phase also measures, and its first micro-batch is recorded in the next: that one has the
        # peak. What is replayed afterwards asks torch for nothing.
        one.step(config.micro_batches)
        torch.cuda.reset_peak_memory_stats()
        one.step(config.micro_batches)
        found = [_timed(one, config.micro_batches) for _ in range(config.rounds)]
        lines.append(
            {
                "model": name,
                "method": method,
                "seq_len": seq_len,
                "phase": one.trainer.phase,
                "tokens_per_s": round(found[0][1] / statistics.median(s for s, _ in found), 1),
                **_memory(),
            }
        )
    return lines


def under_limit(config: GpuBench) -> dict[str, Any]:
    """Train under one limit in this process, which must be a fresh one."""
    limit = int(config.limit_gb[0] * 1e9) - CONTEXT
    total = torch.cuda.get_device_properties(DEVICE).total_memory
    torch.cuda.set_per_process_memory_fraction(limit / total)
    method = config.methods[0]
    one = _make(config, config.models[0], method, config.seq_lens[0])
    losses, times = [], []
    for _ in range(config.steps):
        seconds, tokens = _timed(one, config.micro_batches)
        times.append(seconds)
        losses.append(round(float(one.loss), 4) if hasattr(one, "loss") else None)
    return {
        "model": config.models[0],
        "method": method,
        "seq_len": config.seq_lens[0],
        "limit_gb": config.limit_gb[0],
        "steps": config.steps,
        **_memory(),
        "tokens_per_s": round(tokens / statistics.median(times), 1),
        "events": getattr(one, "events", []),
        "losses": [losses[0], losses[-1]],
    }


def bench_gpu(config: GpuBench) -> int:
    """Compare the methods, or measure phases or limits; needs a CUDA device."""
    if not torch.cuda.is_available():
        raise BenchError("no CUDA device: this measurement is of one; on a CPU: qwen_prime_bench.py train")
    make_deterministic("cuda")
    if config.worker:
        print(json.dumps(under_limit(config)))
        return 0
    where = machine("torchao", "peft", "transformers", "triton")
    results: list[dict[str, Any]] = []
    if config.limit_gb:
        for limit in config.limit_gb:
            for model in config.models:
                for method in config.methods:
                    results.append(_limited(replace(config, models=(model,), methods=(method,)), limit))
    elif config.peel:
        results = peel_phases(config)
    else:
        for name in config.models:
            for seq_len in config.seq_lens:
                results += compare(config, name, seq_len)
                write_json(config.json, {"machine": where, "micro_batches": config.micro_batches, "results": results})
    columns = list(dict.fromkeys(key for line in results for key in line))
    print_table(where, columns, [[line.get(c) for c in columns] for line in results])
    settings = {"micro_batches": config.micro_batches, "rounds": config.rounds}
    write_json(config.json, {"machine": where, **settings, "results": results})
    return 0


def _limited(config: GpuBench, limit: float) -> dict[str, Any]:
    arguments = ["gpu", "--worker", "--data", str(config.data), "--limit-gb", str(limit), "--steps", str(config.steps)]
    arguments += ["--models", config.models[0], "--methods", config.methods[0]]
    arguments += ["--seq-lens", str(config.seq_lens[0]), "--micro-batches", str(config.micro_batches)]
    try:
        return in_own_process(arguments)
    except BenchError as error:
        return {
            "model": config.models[0],
            "method": config.methods[0],
            "limit_gb": limit,
            "seq_len": config.seq_lens[0],
            "note": str(error)[-60:],
        }

"""How well a method fine-tunes: loss on the new domain against loss on the old one, at equal data and equal steps.

One run is a (task, method, learning rate, seed). Every method starts from the same weights, sees the same packed rows
in the same order, takes the same number of steps under the same schedule (``training_recipe.learning_rate``) and
minimises the same number: summed nats of a step's answer tokens over their count. What differs is what moves the
weights. Each run becomes one JSON line with the losses before and after; ``quality_summary`` compares methods at their
best learning rates.

Two losses, because one alone can be bought with the other. *Target* is held-out text of the domain that is learned,
*source* text of the domain the model came from; forgetting is the rise of the source loss.

Bytes per parameter are counted on the tensors that exist after a step: weights, gradients that outlive a layer's
backward pass, optimizer or vote state. Activations and temporaries of one layer are left out, the same for all.

Rejected: comparing at equal time (kernels differ in maturity, rules are what is compared); one learning rate for all
methods (each is judged at its best of several); a separate training loop for votes (they run through ``VoteTrainer``,
as a user's would).
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from transformers import PreTrainedModel

import manifolds
from answer_masks import EncodedSet
from ghost_core import grids_of
from ghost_grid import GhostGrid
from manifolds import Manifold
from packed_batches import PackedBatches, evaluation_batches
from quality_tasks import METHODS, Method, QualityError, Task, load_data
from qwen_prime_wrapper import (
    answer_loss,
    assign_tensors,
    build_model,
    expected_tensors,
    load_model,
    mean_answer_loss,
    source_name,
)
from training_recipe import Recipe, learning_rate
from vote_trainer import VoteTrainer

_EVALUATION_ROWS = 4
_CURVE_POINTS = 4


@torch.no_grad()
def to_grid(dense: PreTrainedModel, hf_config: dict[str, Any], manifold: Manifold) -> PreTrainedModel:
    """The ghost model of a dense float32 one: matrices snapped to their nearest entries, norms and biases copied."""
    model = build_model(hf_config, manifold)
    weights = dense.state_dict()
    tensors = {}
    for name, (shape, _) in expected_tensors(model).items():
        if name.endswith(".grid.indices"):
            grid = GhostGrid(shape[0], shape[1], manifold)
            grid.import_weights(weights[source_name(name)])
            tensors[name], tensors[name.removesuffix("indices") + "scale"] = grid.indices, grid.scale
        elif not name.endswith(".grid.scale"):
            tensors[name] = weights[name].clone()
    assign_tensors(model, tensors, copy=False)
    return model


class DenseTrainer:
    """Steps of a float optimizer on the loss that ``VoteTrainer`` uses. Owns the model, the optimizer and the cursor.

    Its parameters are those that want gradients when it is made.
    """

    def __init__(self, model: PreTrainedModel, batches: PackedBatches, recipe: Recipe, method: Method) -> None:
        self.model = model.train()
        self.batches = batches
        self.recipe = recipe
        self.done = 0
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        self.optimizer = _optimizer(method, self.parameters)

    def step(self) -> tuple[float, int]:
        """One step; its loss in nats per answer token (NaN where it was not finite, and nothing moved) and tokens."""
        micro_batches = [next(self.batches) for _ in range(self.recipe.grad_accum)]
        answers = sum(b.answer_tokens for b in micro_batches)
        if answers == 0:
            raise QualityError(f"step {self.done} has no answer token: the data has nothing to learn at this seq_len")
        device, total = self.recipe.device, 0.0
        for batch in micro_batches:
            loss, _ = answer_loss(
                self.model, batch.input_ids.to(device), batch.labels.to(device), batch.position_ids.to(device)
            )
            (loss / answers).backward()
            total += loss.item()
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.recipe, self.done)
        if math.isfinite(total):
            self.optimizer.step()
        # Zeroed, not dropped: the gradients of a step exist while it runs, and bytes are counted after it.
        self.optimizer.zero_grad(set_to_none=False)
        self.done += 1
        return total / answers if math.isfinite(total) else math.nan, sum(b.tokens for b in micro_batches)


def _optimizer(method: Method, parameters: list[torch.nn.Parameter]) -> torch.optim.Optimizer:
    """AdamW without decay; the learning rate is set at every step."""
    if method.family == "adamw-8bit":
        import bitsandbytes

        return bitsandbytes.optim.AdamW8bit(parameters, lr=0.0, betas=method.betas, weight_decay=0.0)
    return torch.optim.AdamW(parameters, lr=0.0, betas=method.betas, weight_decay=0.0)


def add_adapters(model: PreTrainedModel, seed: int) -> None:
    """LoRA of rank 16 on every linear layer of the decoder, in place; only the adapters want gradients afterwards."""
    import peft

    torch.manual_seed(seed)
    settings = peft.LoraConfig(
        r=16, lora_alpha=32, lora_dropout=0.0, target_modules="all-linear", bias="none", task_type="CAUSAL_LM"
    )
    peft.get_peft_model(model, settings)


def _tensors_of(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, Mapping):
        for part in value.values():
            yield from _tensors_of(part)
    elif isinstance(value, list | tuple):
        for part in value:
            yield from _tensors_of(part)
    elif hasattr(value, "__dataclass_fields__"):
        yield from _tensors_of(vars(value))


def stored_bytes(trainer: DenseTrainer | VoteTrainer) -> int:
    """Bytes of weights, gradients that outlive a layer, and optimizer or vote state; each storage once.

    Counted on what exists after a step. Float parameters of a vote trainer have gradients only while a step runs; they
    are added.
    """
    model = trainer.model
    tensors = [*model.parameters(), *(p.grad for p in model.parameters() if p.grad is not None)]
    tensors += _tensors_of(dict(trainer.optimizer.state))
    if isinstance(trainer, VoteTrainer):
        for grid in grids_of(model).values():
            tensors += [grid.indices, grid.scale, *_tensors_of(grid.state)]
    seen = {(t.untyped_storage().data_ptr(), t.untyped_storage().nbytes()) for t in tensors if t.numel()}
    extra = 0
    if isinstance(trainer, VoteTrainer):
        extra = sum(p.numel() * p.element_size() for p in trainer.floats.values() if p.grad is None)
    return sum(size for _, size in seen) + extra


@dataclass(frozen=True)
class Run:
    """One line of the results."""

    task: str
    method: str
    lr: float
    seed: int
    steps: int

    def same_as(self, result: Mapping[str, Any]) -> bool:
        """Whether a results line is of this run."""
        return all(result.get(k) == getattr(self, k) for k in ("task", "method", "lr", "seed", "steps"))

    def __str__(self) -> str:
        return f"{self.task} {self.method} lr {self.lr:g} seed {self.seed}"


def execute(run: Run, task: Task, data_root: Path, device: str = "cpu") -> dict[str, Any]:
    """Train and score one run in this process; its results line, without machine and commit.

    ``task`` may be one that is not in ``TASKS``. Losses are nats per token, None where not finite.
    """
    started = time.perf_counter()
    method = METHODS[run.method]
    folder = task.path(task.model, data_root)
    model, tokenizer, _ = load_model(folder)
    parameters = sum(p.numel() for p in model.parameters())
    data = load_data(task, tokenizer, data_root)
    recipe = Recipe(
        steps=run.steps,
        grad_accum=task.grad_accum,
        lr=run.lr,
        warmup=task.warmup,
        vote_rule=cast(Any, method.vote_rule or "momentum"),
        compute="float32",
        gradient_checkpointing=False,
        seed=run.seed,
        device=device,
    )
    batches = PackedBatches(
        data.train, seq_len=task.seq_len, batch_size=task.batch_size, pad_id=data.pad_id, seed=run.seed
    )
    if method.family == "votes":
        hf_config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        model = to_grid(model, hf_config, manifolds.build(method.manifold))
    elif method.family == "lora":
        add_adapters(model, run.seed)
    model.to(torch.device(device))  # type: ignore[arg-type]

    def score(part: EncodedSet) -> float | None:
        rows = evaluation_batches(part, task.seq_len, _EVALUATION_ROWS, data.pad_id)
        loss = mean_answer_loss(model, rows)[0]
        return loss if math.isfinite(loss) else None

    before = score(data.target), score(data.source)
    votes = method.family == "votes"
    trainer = VoteTrainer(model, batches, recipe) if votes else DenseTrainer(model, batches, recipe, method)
    curve: list[tuple[int, float | None]] = [(0, before[0])]
    looks = {math.ceil(run.steps * k / _CURVE_POINTS) for k in range(1, _CURVE_POINTS + 1)}
    tokens, training = 0, 0.0
    for step in range(1, run.steps + 1):
        begun = time.perf_counter()
        result = trainer.step()
        training += time.perf_counter() - begun
        tokens += result[1] if isinstance(result, tuple) else result.tokens
        if step in looks:
            curve.append((step, score(data.target)))
    return {
        "task": run.task,
        "method": run.method,
        "lr": run.lr,
        "seed": run.seed,
        "steps": run.steps,
        "bytes_per_parameter": round(stored_bytes(trainer) / parameters, 3),
        "target_before": before[0],
        "target_after": curve[-1][1],
        "source_before": before[1],
        "source_after": score(data.source),
        "curve": curve,
        "seconds": round(time.perf_counter() - started, 1),
        "training_tokens_per_s": round(tokens / training),
        "data": data.fingerprint(),
    }

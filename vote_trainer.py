"""The training step: cast the votes of every micro-batch, then move the weights by them. No files, no screens.

A step is ``grad_accum`` micro-batches. Each one's backward pass casts votes and leaves no weight gradient behind;
at the end of the step the votes move the weights. Norms and biases, the only float parameters, follow a small AdamW.
The loss of a step is the mean over all its answer tokens, however they are spread over micro-batches.

A micro-batch whose loss or gradients are not finite leaves no trace: it is skipped, and if it broke in the middle of
the backward pass the votes that it had cast are taken back by casting them again with the opposite sign.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from transformers import PreTrainedModel

from ghost_core import Movement, apply_votes, grids_of, name_grids
from qwen_prime_data import Batch, PackedBatches
from qwen_prime_wrapper import answer_loss
from vote_rules import Ballot, VoteRule, rule_named


class TrainError(RuntimeError):
    """A run that cannot start or go on."""


DEFAULT_RATE = 0.25
"""Learning rate times width, where none is given."""


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How to train, without a word on files: what a :class:`VoteTrainer` is told."""

    steps: int = 300
    """How many steps in all."""
    grad_accum: int = 32
    """Micro-batches in a step."""
    lr: float | None = None
    """Learning rate of weights, norms and biases alike, of the size that suits AdamW; by default 0.25 / hidden size."""
    weight_decay: float = 0.0
    """As AdamW's: every step a weight loses lr times this share of itself; norms and biases do not."""
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    """After the warm-up: cosine or a straight line to a tenth of --lr, or constant."""
    warmup: int = 10
    """Steps over which the learning rate rises."""
    vote_rule: Literal["momentum", "compact", "supermajority", "stochastic"] = "momentum"
    """The vote rule; see vote_rules.py. "compact" needs 2 bytes a weight in all, "momentum" 3, the others 4."""
    vote_buffer: Literal["int8", "int16"] | None = None
    """Type of the vote buffer; by default the rule's own: int8 for momentum, int16 for the rules of whisper votes."""
    beta: float | None = None
    """Share of the votes that survives a step of momentum or compact; by default 0.7."""
    gradient_checkpointing: bool = True
    """Recompute activations in the backward pass: less memory, more time, the same votes."""
    seed: int = 0
    """Decides the order of the data and every random draw of the votes."""
    device: str = "cuda" if torch.cuda.is_available() else "cpu"
    """Where to train."""

    def __post_init__(self) -> None:
        for name in ("steps", "grad_accum"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name.replace('_', '-')} is {getattr(self, name)}, expected at least 1")
        if self.warmup < 0:
            raise ValueError(f"warmup is {self.warmup}, expected at least 0")
        if self.lr is not None and not 0 <= self.lr <= 1:
            raise ValueError(f"lr is {self.lr}, expected 0 to 1")
        if not 0 <= self.weight_decay * (self.lr or 2**-10) <= 2**-10:
            most = 2**-10 / (self.lr or 2**-10)
            raise ValueError(f"weight-decay is {self.weight_decay}, expected 0 to {most:g} (lr times it below 0.001)")
        if self.weight_decay and not self.rule().decays:
            raise ValueError(f"vote-rule {self.vote_rule} has no weight decay: leave --weight-decay at 0")
        if self.vote_rule == "compact" and self.vote_buffer is not None:
            raise ValueError("vote-rule compact has its votes inside the indices: leave --vote-buffer out")
        self.rule()

    def rule(self) -> VoteRule:
        """The vote rule with this recipe's hyperparameters."""
        return rule_named(self.vote_rule, buffer=self.vote_buffer, beta=self.beta)


def default_rate(width: int) -> float:
    """Learning rate for a model of that hidden size: inversely proportional, as rates of one optimizer transfer between
    widths (Yang et al. 2022, arXiv 2203.03466); the factor is the best of the measured tasks, of widths 128 and 256."""
    return DEFAULT_RATE / width


def learning_rate(recipe: Recipe, step: int) -> float:
    """Rate of a step, counted from 0; ``recipe.lr`` must be a number."""
    if recipe.lr is None:
        raise TrainError("the recipe has no learning rate yet: expected the trainer's own recipe, which does")
    if step < recipe.warmup:
        return recipe.lr * (step + 1) / recipe.warmup
    if recipe.schedule == "constant":
        return recipe.lr
    share = min((step - recipe.warmup) / max(1, recipe.steps - recipe.warmup), 1.0)
    fall = (1 + math.cos(math.pi * share)) / 2 if recipe.schedule == "cosine" else 1 - share
    return recipe.lr * (0.1 + 0.9 * fall)


@dataclass
class StepResult:
    """What one step did."""

    loss: float
    tokens: int
    answer_tokens: int
    skipped: int
    moved: dict[str, Movement]


class VoteTrainer:
    """The training state and the one operation on it, :meth:`step`; knows nothing of files or screens.

    Owns the model (mutated), the ballot, the float optimizer and the data cursor.
    """

    def __init__(self, model: PreTrainedModel, batches: PackedBatches, recipe: Recipe) -> None:
        if recipe.lr is None:
            try:
                recipe = replace(recipe, lr=default_rate(model.config.hidden_size))
            except ValueError as error:
                # What a recipe cannot know before it meets a model: its weight decay at the model's learning rate.
                raise TrainError(str(error)) from error
        self.model = model
        self.batches = batches
        self.recipe = recipe
        self.done = 0
        self.tokens = 0
        self.ballot = Ballot(seed=recipe.seed, rule=recipe.rule())
        name_grids(model, self.ballot)
        self.grids = grids_of(model)
        for grid in self.grids.values():
            self.ballot.rule.check(grid.tables(), recipe.grad_accum, grid.uses)
            grid.unlock()
        self.floats = dict(model.named_parameters())
        self.optimizer = torch.optim.AdamW(
            self.floats.values(), lr=learning_rate(recipe, 0), betas=(0.9, 0.99), weight_decay=0.0
        )
        if recipe.gradient_checkpointing:
            # The newer name where transformers has it; the older one warns there.
            enable = getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)
            enable({"use_reentrant": False})
        model.train()

    def step(self) -> StepResult:
        """One step: measure what has no yardstick yet, cast the votes of every micro-batch, apply them."""
        count = self.recipe.grad_accum
        micro_batches = [next(self.batches) for _ in range(count)]
        answers = sum(b.answer_tokens for b in micro_batches)
        if answers == 0:
            raise TrainError(f"step {self.done} has no answer token: the data has nothing to learn at this seq-len")
        rate = learning_rate(self.recipe, self.done)
        weight = count / answers
        self._measure(micro_batches[0], weight)
        total, learned, skipped = 0.0, 0, 0
        for k, batch in enumerate(micro_batches):
            nats = self._cast(batch, k, weight)
            if nats is None:
                skipped += 1
            else:
                total += nats
                learned += batch.answer_tokens
        moved: dict[str, Movement] = {}
        if skipped < count:
            self.ballot.close()
            moved = apply_votes(self.grids, rate, self.recipe.weight_decay)
            self._step_floats(rate, count)
        self.optimizer.zero_grad(set_to_none=True)
        self.done += 1
        tokens = sum(b.tokens for b in micro_batches)
        self.tokens += tokens
        return StepResult(total / learned if learned else math.nan, tokens, answers, skipped, moved)

    def _loss(self, batch: Batch) -> torch.Tensor:
        device = self.recipe.device
        loss, _ = answer_loss(
            self.model, batch.input_ids.to(device), batch.labels.to(device), batch.position_ids.to(device)
        )
        return loss

    def _measure(self, batch: Batch, weight: float) -> None:
        """Give grids without an observation their first, from the step's first micro-batch; no votes."""
        waiting = [g for g in self.grids.values() if g.waiting]
        if not waiting:
            return
        self.ballot.open("measure", self.done, 0, self.recipe.grad_accum)
        self.ballot.non_finite.clear()
        loss = self._loss(batch)
        if math.isfinite(loss.item()):
            (loss * weight).backward()
            for grid in waiting:
                grid.finish_measuring()
        self.ballot.close()
        self.optimizer.zero_grad(set_to_none=True)

    def _cast(self, batch: Batch, k: int, weight: float) -> float | None:
        """Votes of one micro-batch; its summed loss, or None where it was not finite and left no trace."""
        before = {n: None if p.grad is None else p.grad.clone() for n, p in self.floats.items()}
        self.ballot.open("cast", self.done, k, self.recipe.grad_accum)
        self.ballot.non_finite.clear()
        loss = self._loss(batch)
        nats = loss.item()
        if not math.isfinite(nats):
            return None
        (loss * weight).backward()
        broken = bool(self.ballot.non_finite) or any(
            p.grad is not None and not bool(torch.isfinite(p.grad).all()) for p in self.floats.values()
        )
        if broken:
            self.ballot.open("retract", self.done, k, self.recipe.grad_accum)
            (self._loss(batch) * weight).backward()
            for name, parameter in self.floats.items():
                parameter.grad = before[name]
            return None
        return nats

    def _step_floats(self, rate: float, count: int) -> None:
        for parameter in self.floats.values():
            if parameter.grad is not None:
                parameter.grad.div_(count)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.step()

    def state(self) -> dict[str, Any]:
        """Everything beside the model's tensors that the next step depends on, as a checkpoint's ``train_state``."""
        return {
            "step": self.done,
            "tokens": self.tokens,
            "seed": self.recipe.seed,
            "vote_rule": self.recipe.vote_rule,
            "vote_buffer": self.ballot.rule.buffer,
            "micro_batches": self.recipe.grad_accum,
            "data": self.batches.state_dict(),
            "float_optimizer": self.optimizer.state_dict(),
        }

    def votes(self) -> dict[str, dict[str, torch.Tensor]]:
        """Vote state of the unlocked grids."""
        return {name: grid.vote_state() for name, grid in self.grids.items() if grid.unlocked}

    def restore(self, checkpoint: dict[str, Any]) -> None:
        """Continue from a training checkpoint of the same run.

        Raises:
            TrainError: another seed, vote rule or number of micro-batches: the units of the votes depend on them.
        """
        state, own = checkpoint["train_state"], self.state()
        for name in ("seed", "vote_rule", "vote_buffer", "micro_batches"):
            mine = own[name]
            if state[name] != mine:
                raise TrainError(f"cannot resume: the checkpoint has {name} {state[name]}, this run {mine}")
        self.done, self.tokens = state["step"], state["tokens"]
        self.batches.load_state_dict(state["data"])
        self.optimizer.load_state_dict(state["float_optimizer"])
        for name, grid in self.grids.items():
            grid.load_vote_state(checkpoint["votes"].get(name, {}))

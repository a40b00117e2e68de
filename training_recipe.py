"""How to train, in numbers: steps, learning rate and its course, vote rule, precision. Nothing of models or data."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch

from ballots import VoteRule
from prime_device import DeviceError, device_of, has_native_bfloat16
from vote_rules import rule_named

log = logging.getLogger("train")


class TrainError(RuntimeError):
    """A run that cannot start or go on."""


DEFAULT_RATE = 0.25
"""Learning rate times width, where none is given."""


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How to train, without a word on files: what a :class:`VoteTrainer` is told."""

    steps: int = 300
    """How many steps in all."""
    # Of a buffer's few bits each micro-batch has its share: many small ones are counted more coarsely than a few wide.
    grad_accum: int = 8
    """Micro-batches in a step. Few wide ones (--batch-size) learn more than many narrow ones."""
    lr: float | None = None
    """Learning rate of weights, norms and biases alike, of the size that suits AdamW; by default 0.25 / hidden size."""
    weight_decay: float = 0.0
    """As AdamW's: every step a weight loses lr times this share of itself; norms and biases do not."""
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    """After the warm-up: cosine or a straight line to a tenth of --lr, or constant."""
    warmup: int = 10
    """Steps over which the learning rate rises."""
    vote_rule: Literal["momentum", "compact", "supermajority", "stochastic"] = "momentum"
    """The vote rule; see momentum_rules.py. "compact" needs 2 bytes a weight in all, "momentum" 3, the others 4."""
    vote_buffer: Literal["int8", "int16"] | None = None
    """Type of the vote buffer; by default the rule's own: int8 for momentum, int16 for the rules of whisper votes."""
    beta: float | None = None
    """Share of the votes that survives a step of momentum or compact; by default 0.5."""
    compute: Literal["auto", "float32", "bfloat16"] = "auto"
    """Type of matrix products: bfloat16 where the device has it in hardware, else float32; votes do not change type."""
    gradient_checkpointing: bool = True
    """Recompute activations in the backward pass: less memory, more time, the same votes."""
    cuda_graphs: Literal["auto", "on", "off"] = "auto"
    """Record micro-batches and replay them: auto does so on cards of compute capability 8.0 and up, where Python would
    be slower than the card. Off computes the head at the answers alone: votes equal to rounding, not to the bit."""
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
        try:
            device_of(self.device)
        except DeviceError as error:
            raise ValueError(str(error)) from error
        if self.compute == "auto":
            object.__setattr__(self, "compute", "bfloat16" if has_native_bfloat16(self.device) else "float32")
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


def course(recipe: Recipe) -> dict[str, Any]:
    """What decides where every step goes, as a checkpoint keeps it."""
    names = ("steps", "lr", "schedule", "warmup", "weight_decay", "compute")
    return {**{name: getattr(recipe, name) for name in names}, "beta": getattr(recipe.rule(), "beta", None)}


def check_course(recipe: Recipe, begun: Mapping[str, Any]) -> None:
    """A run goes on as it began; it may only become longer, or go on where products are of another type: the log says
    so.

    Args:
        begun: the run's :func:`course`; what it does not name is not compared.

    Raises:
        TrainError: it does not.
    """
    for name, mine in course(recipe).items():
        was = begun.get(name, mine)
        if was == mine:
            continue
        if name == "compute":
            # "auto" means one thing on one machine and another on the next.
            log.warning(
                "products are in %s now, the run began with %s: it does not end with the bits that it would have had "
                "(--compute %s)",
                *(mine, was, was),
            )
            continue
        if name != "steps" or mine < was:
            raise TrainError(
                f"cannot resume: the run began with {name} {was}, this command says {mine}: add "
                f"--{name.replace('_', '-')} {was} to go on as it began, or begin a new run from the checkpoint "
                "with --checkpoint and another --output-dir"
            )
        other = "" if recipe.schedule == "constant" else ": the learning rate takes another course"
        log.warning("the run was to have %d steps, now %d%s", was, mine, other)

"""The ballot and what gathers on it: what the backward pass is to do with weight gradients, what an unlocked grid keeps
of them, and what every vote rule offers.

A rule is a frozen set of hyperparameters with four operations on a grid's tensors: ``measure`` (the first observation
of a grid that has none), ``cast`` (in the backward pass, once per use and micro-batch), ``close_step`` (once a step,
numbers per row and column only) and ``apply`` (once a step, integers only). The state is one integer per weight and a
few numbers per row and column; :class:`Ballot` says which step, which micro-batch, and whether votes are cast at all.

``r2``, a row's mean square, comes from earlier steps, so that loud and quiet micro-batches keep their say; before a
grid's first step it is measured on that step's first micro-batch with votes off. No random bit depends on the order of
micro-batches.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, ClassVar, Protocol

import torch

import vote_units
from manifolds import Manifold

BUFFER_BITS = {"int8": 8, "int16": 16}
_BUFFER_TYPES = {"int8": torch.int8, "int16": torch.int16}


class RuleError(ValueError):
    """A rule that does not exist, or does not go with a manifold or a number of micro-batches."""


@dataclass
class VoteState:
    """What a rule keeps of an unlocked grid.

    Attributes:
        votes: int8 or int16 ``(out, in)``; None where the grid's words hold their own votes.
        rows: the rule's numbers per row, each ``(out,)``: float32 running means, int64 sums of the present step.
        columns: the rule's numbers per column, each ``(in,)``: float32 running means.
        shares: what each column of a gradient is scaled by before it votes, powers of two, float32 ``(in,)``; keeps its
            place in memory. None where the rule has no measure of columns.
        push: how far a vote of each row moves a weight, as a multiple of 2^-16, int64 ``(out,)``; of the last step
            that was closed.
        observations: how many steps the running means have seen.
        anchor: a scalar that makes autograd visit the grid's backward though nothing there is a float parameter.
        cached: what :meth:`VoteRule.yardstick` last computed, and for what.
    """

    votes: torch.Tensor | None
    rows: dict[str, torch.Tensor]
    observations: int
    anchor: torch.Tensor
    cached: tuple[Any, Any] | None = None
    columns: dict[str, torch.Tensor] = field(default_factory=dict)
    shares: torch.Tensor | None = None
    push: torch.Tensor | None = None

    def on(self, device: torch.device) -> VoteState:
        """The same on another device."""

        def there(tensor: torch.Tensor | None) -> torch.Tensor | None:
            return None if tensor is None else tensor.to(device)

        return VoteState(
            votes=there(self.votes),
            rows={name: tensor.to(device) for name, tensor in self.rows.items()},
            observations=self.observations,
            anchor=self.anchor.detach().to(device).requires_grad_(),
            columns={name: tensor.to(device) for name, tensor in self.columns.items()},
            shares=there(self.shares),
            push=there(self.push),
        )


class Grid(Protocol):
    """What a rule sees of a :class:`ghost_grid.GhostGrid`."""

    name: str
    number: int
    uses: int
    heat: float
    indices: torch.Tensor
    state: VoteState | None
    ballot: Ballot

    def tables(self) -> Manifold: ...

    def inverse_scale(self) -> torch.Tensor: ...


@lru_cache(maxsize=4096)
def tensor_id(name: str) -> int:
    """A 63-bit number from a grid's name, for the hash keys: independent of the order in which modules are visited."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "little") >> 1


def state_of(grid: Grid) -> VoteState:
    """The state of an unlocked grid.

    Raises:
        RuleError: the grid is locked.
    """
    if grid.state is None:
        raise RuleError(f"{grid.name or 'the grid'} is locked: it has no votes")
    return grid.state


def keys_of(grid: Grid, salt: int) -> tuple[int, int]:
    """Two 32-bit keys of a grid's draws in the ballot's step; ``salt`` is one of ``CAST``, ``DRAW`` and ``FADE``."""
    return _hashed(grid.ballot.seed, grid.ballot.step, salt, grid.name)


# The same in all micro-batches of a step.
@lru_cache(maxsize=4096)
def _hashed(seed: int, step: int, salt: int, name: str) -> tuple[int, int]:
    return vote_units.hash_keys(seed, step, salt, tensor_id(name))


CAST, DRAW, FADE = 0, 1, 2
"""What a step draws for: votes, places between two neighbours, what survives."""


def cast_keys(grid: Grid) -> tuple[int, int]:
    """Keys of a grid's draws while votes are cast in the ballot's step."""
    return keys_of(grid, CAST)


@dataclass(frozen=True)
class VoteRule:
    """What all rules share: the buffer, the memory of row statistics, the checks of hyperparameters."""

    name: ClassVar[str]
    decays: ClassVar[bool] = True
    """Whether the rule knows weight decay."""
    recordable: ClassVar[bool] = False
    """Whether a cast depends on nothing of the host's but what a ballot's controls and a yardstick hold."""
    row_means: ClassVar[tuple[str, ...]] = ("r2",)
    row_sums: ClassVar[tuple[str, ...]] = ("row_squares",)
    column_means: ClassVar[tuple[str, ...]] = ()

    buffer: str = "int8"
    """Type of the vote buffer: int8 or int16."""
    beta2: float = 0.95
    """Memory of a row's mean square."""

    def __post_init__(self) -> None:
        if self.buffer not in BUFFER_BITS:
            raise RuleError(f"buffer is {self.buffer!r}, expected one of {', '.join(BUFFER_BITS)}")
        # At 0 one step without a gradient would forget how large they were, and the grid would never vote again.
        self._expect("beta2", 0.1, 1.0)

    def _expect(self, name: str, low: float, below: float) -> None:
        if not low <= getattr(self, name) < below:
            raise RuleError(f"{name} is {getattr(self, name)}, expected {low} to below {below}")

    def check(self, manifold: Manifold, micro_batches: int, uses: int) -> None:
        """The rule goes with this manifold, and a step of so many micro-batches cannot leave the buffer's range.

        Raises:
            RuleError: it does not.
        """
        if manifold.vote_bits != self.vote_bits:
            wanted = "compact" if self.vote_bits else "prime-harmonic or linear"
            raise RuleError(
                f"rule {self.name} needs the manifold {wanted}, the checkpoint has {manifold.name}: "
                f"choose --vote-rule {'momentum' if self.vote_bits else 'compact'}, or import again"
            )

    @property
    def vote_bits(self) -> int:
        """Low bits of a word that this rule uses as its buffer; 0 where the buffer is a tensor of its own."""
        return 0

    @property
    def carry(self) -> int:
        """Largest magnitude that a buffer keeps from one step to the next; the rest is for the step's own votes."""
        raise NotImplementedError

    @property
    def bytes_per_weight(self) -> int:
        """Index and votes."""
        return 2 + (0 if self.vote_bits else BUFFER_BITS[self.buffer] // 8)

    def open_state(self, indices: torch.Tensor) -> VoteState:
        """No votes and no observation yet, for words ``(out, in)``."""
        (rows, columns), device = indices.shape, indices.device
        numbers = {n: torch.zeros(rows, dtype=torch.float32, device=device) for n in self.row_means}
        numbers |= {n: torch.zeros(rows, dtype=torch.int64, device=device) for n in self.row_sums}
        return VoteState(
            votes=None if self.vote_bits else torch.zeros_like(indices, dtype=_BUFFER_TYPES[self.buffer]),
            rows=numbers,
            observations=0,
            anchor=torch.zeros((), device=device, requires_grad=True),
            columns={n: torch.zeros(columns, dtype=torch.float32, device=device) for n in self.column_means},
            shares=torch.ones(columns, dtype=torch.float32, device=device) if self.column_means else None,
        )

    def columns_changed(self, state: VoteState) -> None:
        """Follow the running means of columns, where the rule has any; ``shares`` keeps its place."""

    def measure(self, grid: Grid, gradient: torch.Tensor, rows: torch.Tensor) -> None:
        """Add one use's gradient, float32 ``(n, in)`` of rows ``(n,)``, to the grid's first observation."""
        # In units of votes this would need the yardstick that it is to find.
        state_of(grid).rows["r2"][rows] += (1 - self.beta2) * gradient.square().mean(1).clamp(max=1e30)

    def corrected(self, state: VoteState, name: str = "r2") -> torch.Tensor:
        """A running mean, float32 ``(out,)``, without the bias of its start."""
        return state.rows[name] / (1.0 - self.beta2**state.observations)

    def _fold(self, running: torch.Tensor, mean: torch.Tensor) -> None:
        running.copy_((self.beta2 * running.double() + (1.0 - self.beta2) * mean).clamp(max=1e30))

    def cast(self, grid: Grid, gradient: torch.Tensor, rows: torch.Tensor, use: int, sign: int) -> None:
        """Votes of one use in one micro-batch: float32 or bfloat16 ``(n, in)`` of rows ``(n,)``; ``sign`` -1 takes them
        back."""
        raise NotImplementedError

    def close_step(self, grid: Grid) -> None:
        """Everything is cast: fold the step's sums into the running means that the next step's votes are measured by.
        Numbers per row and column only."""
        raise NotImplementedError

    def apply(self, grid: Grid, rate: float, shrink: int) -> tuple[int, int, int]:
        """Move the weights, when the step is closed; (flips, travel, clipped) as :func:`ghost_kernels.apply_votes`.
        Integers only."""
        raise NotImplementedError

    def consensus(self, grid: Grid) -> float | None:
        """How far a step's micro-batches agree: 1/K for noise, 1 for one opinion; None where the rule cannot say."""
        return None


@dataclass
class Ballot:
    """What the backward pass is to do with weight gradients; one object shared by all grids of a model.

    ``mode``: ``closed`` ignores them; ``measure`` takes the row statistics of grids that have none yet; ``cast``
    votes; ``retract`` takes the votes of an identical earlier pass back; ``probe`` computes weight gradients and drops
    them, to find out whether they fit into memory.
    """

    rule: VoteRule
    seed: int = 0
    step: int = 0
    micro_batch: int = 0
    micro_batches: int = 1
    voted: int | None = None
    """How many micro-batches of the step have votes in the buffers, where others were skipped or did not fit; None:
    all. Means over micro-batches are over these."""
    mode: str = "closed"
    backend: str | None = None
    non_finite: list[str] = field(default_factory=list)
    """Names of grids that met a non-finite gradient since the list was last cleared; they did not vote."""
    standing: set[tuple[str, int, int]] = field(default_factory=set)
    """(grid, use, slice) of this micro-batch's votes that are in the buffers: what ``retract`` has to take back."""
    marks: torch.Tensor | None = None
    """int32 ``(grids,)`` on a card, by :attr:`Grid.number`: 1 where a gradient was not finite since last read.
    Its kernels then test while they cast, without waiting; whoever sets this reads it. None: a gradient is tested
    first, and one that is not finite casts nothing."""
    controls: torch.Tensor | None = None
    """int32 ``(grids, uses, 4)`` on a card while a micro-batch is recorded: see :func:`ghost_kernels.cast_votes`."""
    torn: bool = False
    """Whether casting a slice was interrupted: what it left cannot be taken back."""
    listening: bool = False
    """Whether the first micro-batch of a step is compared with the votes that are there already."""

    def open(self, mode: str, step: int, micro_batch: int, micro_batches: int) -> None:
        """Set mode and place; ``micro_batches`` is K, constant within a step."""
        if mode not in ("measure", "cast", "retract", "probe"):
            raise ValueError(f"unknown ballot mode {mode!r}")
        if mode == "cast":
            self.standing.clear()
            self.torn = False
        if not 0 <= micro_batch < micro_batches:
            raise ValueError(f"micro-batch {micro_batch} of {micro_batches}")
        self.mode, self.step, self.micro_batch, self.micro_batches = mode, step, micro_batch, micro_batches

    def read_marks(self, names: Sequence[str]) -> None:
        """Add the grids that kernels have marked to ``non_finite``, and take the marks off; waits for the card.

        Args:
            names: of all grids, by number.
        """
        if self.marks is not None:
            found = [names[number] for number, mark in enumerate(self.marks.tolist()) if mark]
            if found:
                self.non_finite += found
                self.marks.zero_()

    def control(self, grid: Grid, use: int) -> torch.Tensor | None:
        """Where a recorded cast of one use of a grid finds its keys, slot and sign; None where nothing is recorded."""
        return None if self.controls is None else self.controls[grid.number, use]

    def mark(self, grid: Grid) -> torch.Tensor | None:
        """Where a cast says that its gradient was not finite; None where that is tested before."""
        return None if self.marks is None else self.marks[grid.number : grid.number + 1]

    def close(self) -> None:
        """Gradients pass through and leave nothing behind."""
        self.mode = "closed"

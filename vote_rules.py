"""Vote rules: how a gradient becomes votes, what votes do to a weight, and what is remembered between steps.

A rule is a frozen set of hyperparameters with four operations on a grid's tensors: ``measure`` (the first observation
of a grid that has none), ``cast`` (in the backward pass, once per use and micro-batch), ``close_step`` (once a step,
numbers per row and column only) and ``apply`` (once a step, integers only). The state is one integer per weight and a
few numbers per row and column; ``Ballot`` says which step, which micro-batch, and whether votes are cast at all.
Symbols: K micro-batches a step, g the gradient of one micro-batch's loss, lr the learning rate in units of weight, SR
unbiased stochastic rounding.

``momentum`` (3 bytes a weight: index 2, buffer 1; 4 with an int16 buffer), the default:

    size[row] = max(sqrt(r2[row]), floor · RMS of sqrt(r2) over the tensor's rows that have seen a gradient)
    h         = g · share[column]                                           each micro-batch
    votes    -= SR((1 - β) · U · h / (K · ρ · size[row]))
    votes     = votes within ±reach · U                                     each step
    value     = (1 - lr · λ) · value + lr · gain[row] · fresh[row] · votes / (U · scale[row])    drawn
    votes     = SR(β · votes)                                                                   between neighbours
    fresh[row] = ρ · size[row] of before the step / the same with the step's own gradients in it
    gain[row] = (size[row] / RMS of sqrt(r2) over those rows)^tilt
    r2[row]   = β2 · r2[row] + (1 - β2) · mean of h² over columns and micro-batches, bias-corrected
    g2[row]   = the same mean of (Σ_k h_k / K)², the gradient of the step, estimated from its sketch
    ρ²        = Σ g2 / Σ r2 over the tensor's rows, within [1/K, 1]
    c2[col]   = β2 · c2[col] + (1 - β2) · mean of (votes / share[col])² over a sample of rows, once a step
    share[col] = 2^-k nearest to sqrt(mean of c2 / c2[col])

It divides before it averages, as LaProp does (arXiv 2002.04839). A vote is counted in units of its row, which uses the
few bits of the buffer well; how far it moves a weight is another matter. With tilt 0 every row moves as far as any
other, which is Adam at the granularity of rows (Adam-mini, arXiv 2406.16793); with tilt 1 the row's size cancels out
and one RMS measures the whole tensor, so that rows with little to say (rare tokens, dead units) move little. Half of
each, the default, learns more and forgets less than either.

Votes must be counted before their step is over, in units of the steps before; but a step that is louder than those
must not go farther for it, which AdamW sees to by having a step's own gradient in the mean that divides it. ``fresh``
mends that when the step is over; float prototypes without it lose as much as votes do.

Columns are as unlike as rows: what a few inputs of a matrix carry is many times what others do, and without a measure
of their own the quiet ones hardly move. Rows times columns is Adafactor's factored second moment (arXiv 1804.04235),
with the step's votes in the place of the squared gradient: they are there, they are integers, their sum has no order,
and a few hundred rows of them say enough. A share is a power of two: the product that makes the gradient has its input
scaled by it, which rounds nothing, so a gradient's votes do not know at which of the two places they were scaled, and
no kernel has to.

A row's size says little of its loudest weights, which can be thirty times as loud. AdamW has a size for each weight and
hardly ever moves one much farther than its rate; here ``reach`` cuts what is beyond. Less of it takes the noise of
small steps for signal, as signs of gradients do; more of it lets large steps at high rates break what was learned.

ρ is what averaging over micro-batches leaves of a gradient's size: 1 where they agree, 1/sqrt(K) where they are noise.
With it a vote is measured by the size of the step's gradient, as AdamW measures, so a learning rate means the same at
any number of micro-batches; without it 32 of them move a weight up to 5.7 times less.

``compact`` (2 bytes a weight in all): the same on the manifold ``compact``, whose words hold ten bits of index and six
bits of votes.

``supermajority`` (4 bytes; the rule of the first plans): a whisper of a gradient stays silent, others have one vote.

    votes    -= sign(g) where |g| > mean|g| + sensitivity · std|g|         each micro-batch
    index    += sign(votes) · stride[row], votes = 0, where |votes| >= threshold                  each step
    votes     = SR(decay · votes) elsewhere

Mean and deviation are the tensor's, from earlier steps: a slice of the head cannot know those of the whole, and a quiet
micro-batch should have less to say. stride = lr · 32768 / scale[row] indices, so that on the linear manifold a flip
moves a weight by lr; the plans' stride of one index is a learning rate of about 1e-5.

``stochastic`` (4 bytes; the plans' second form): as ``supermajority``, but any vote may break through: an integer noise
uniform in [-jitter, jitter] is added to the votes, not kept, and a weight whose sum is not zero flips in its direction
with probability ``chance``. In the plans the noise also moved weights that nobody had voted on, a random walk of the
whole model; here a weight without votes stays.

``r2`` comes from earlier steps, so that loud and quiet micro-batches keep their say; before a grid's first step it is
measured on that step's first micro-batch with votes off. No random bit depends on the order of micro-batches.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from functools import lru_cache
from typing import Any, ClassVar, Protocol

import torch

import ghost_kernels as kernels
import vote_units
from manifolds import Manifold
from vote_units import VoteUnits

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


def _state(grid: Grid) -> VoteState:
    if grid.state is None:
        raise RuleError(f"{grid.name or 'the grid'} is locked: it has no votes")
    return grid.state


def _keys(grid: Grid, salt: int) -> tuple[int, int]:
    return _keys_of(grid.ballot.seed, grid.ballot.step, salt, grid.name)


# The same in all micro-batches of a step.
@lru_cache(maxsize=4096)
def _keys_of(seed: int, step: int, salt: int, name: str) -> tuple[int, int]:
    return vote_units.hash_keys(seed, step, salt, tensor_id(name))


_CAST, _DRAW, _FADE = 0, 1, 2


def cast_keys(grid: Grid) -> tuple[int, int]:
    """Keys of a grid's draws while votes are cast in the ballot's step."""
    return _keys(grid, _CAST)


GAIN_MAX = 4.0
"""Most by which a row may move farther than its tensor's average."""
FRESHNESS_MAX = 4.0
"""Most by which a step that is quieter than those before moves a row farther than they would have."""
COLUMN_ROWS = 512
"""About how many rows a measure of columns looks at."""
_QUIETEST, _LOUDEST = -4, 10
"""Powers of two that a column's size may differ by from its tensor's: one without a gradient must not be blown up."""


def column_shares(c2: torch.Tensor) -> torch.Tensor:
    """The power of two nearest, by its logarithm, to the root of ``mean(c2) / c2``: mean squares, float32 ``(in,)``,
    to float32 ``(in,)``; ones where there is nothing yet. Exponents are read, not computed: every device has the
    same."""
    squares = c2.double()
    mean = squares.mean()
    relative = torch.where(mean > 0, squares / mean, 1.0).clamp(min=2.0 ** (2 * _QUIETEST - 2))
    # x = m · 2^e with m in [0.5, 1): half of its logarithm, rounded, is e / 2 rounded down.
    exponent = torch.frexp(relative).exponent >> 1
    # The bits of a float: a power computed on a card need not be exact.
    return (127 - exponent.clamp(_QUIETEST, _LOUDEST) << 23).to(torch.int32).view(torch.float32)


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
        """Follow the running means of columns; ``shares`` keeps its place."""
        if state.shares is not None:
            state.shares.copy_(column_shares(state.columns["c2"]))

    def measure(self, grid: Grid, gradient: torch.Tensor, rows: torch.Tensor) -> None:
        """Add one use's gradient, float32 ``(n, in)`` of rows ``(n,)``, to the grid's first observation."""
        # In units of votes this would need the yardstick that it is to find.
        _state(grid).rows["r2"][rows] += (1 - self.beta2) * gradient.square().mean(1).clamp(max=1e30)

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


@dataclass(frozen=True)
class MomentumRule(VoteRule):
    """The rule ``momentum`` of the module docstring."""

    name: ClassVar[str] = "momentum"
    recordable: ClassVar[bool] = True
    row_means: ClassVar[tuple[str, ...]] = ("r2", "g2")
    row_sums: ClassVar[tuple[str, ...]] = ("row_squares", "row_sketch")
    column_means: ClassVar[tuple[str, ...]] = ("c2",)

    beta: float = 0.5
    """Share of the votes that survives a step."""
    beta2: float = 0.9
    floor: float = 0.5
    """Rows quieter than this share of their tensor's RMS are measured by the tensor's."""
    tilt: float = 0.5
    """Power of a row's size, against its tensor's, by which its weights move: 0 moves all rows alike."""
    reach: float = 0.75
    """Most by which the votes of one weight count, in row RMS."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self._expect("beta", 0.0, 1.0)
        self._expect("tilt", 0.0, 2.0)
        if not 0 < self.reach < math.inf:
            raise RuleError(f"reach is {self.reach}, expected a finite number above 0")
        if not self.floor >= 0:
            raise RuleError(f"floor is {self.floor}, expected at least 0")

    @property
    def bits(self) -> int:
        """Width of the buffer."""
        return BUFFER_BITS[self.buffer]

    @property
    def carry(self) -> int:
        return VoteUnits.for_buffer(self.bits, 1).carry

    def check(self, manifold: Manifold, micro_batches: int, uses: int) -> None:
        super().check(manifold, micro_batches, uses)
        most = vote_units.SLOTS_MAX // uses
        if micro_batches > most:
            raise RuleError(f"rule {self.name} counts at most {most} micro-batches in a step, got {micro_batches}")

    def units(self, grid: Grid) -> VoteUnits:
        """Units of the grid's buffer at the ballot's number of micro-batches."""
        return VoteUnits.for_buffer(self.bits, grid.ballot.micro_batches, grid.uses)

    def yardstick(self, grid: Grid) -> tuple[torch.Tensor, torch.Tensor]:
        """Votes per unit of gradient for each row, float32 ``(out,)``, 0 for a tensor that has seen no gradient; and
        the rows' gains as multiples of 2^-16, int64 ``(out,)``."""
        state, count = _state(grid), grid.ballot.micro_batches
        key = (self, state.observations, count, grid.uses)
        if state.cached is None or state.cached[0] != key:
            corrected = self.corrected(state)
            seen = (corrected > 0).sum().clamp(min=1)
            tensor_rms = corrected.sum().div(seen).sqrt()
            rms = torch.maximum(corrected.sqrt(), self.floor * tensor_rms)
            # Without a floor, a row that has seen nothing yet is measured by its tensor: else it could never begin.
            rms = torch.where(rms > 0, rms, tensor_rms)
            gain = ((rms / tensor_rms).nan_to_num(1.0) ** self.tilt).clamp(max=GAIN_MAX)
            value = (1.0 - self.beta) * self.units(grid).unit / count / (rms * self.agreement(state, count) ** 0.5)
            # A factor 2^16 is still to come in the kernel.
            value = torch.where(rms > 0, value, 0.0).clamp(max=torch.finfo(torch.float32).max / 2**17)
            state.cached = (key, (value, (gain * 2.0**16).round().long()))
        return state.cached[1]

    def agreement(self, state: VoteState, micro_batches: int) -> float:
        """ρ²: mean square of a step's gradient over that of its micro-batches, 1/K for noise and 1 for one opinion."""
        if state.observations < 2:
            return 1.0
        # The first observation is one micro-batch's and says nothing of a sum.
        step = float(state.rows["g2"].double().sum()) / (1.0 - self.beta2 ** (state.observations - 1))
        single = float(self.corrected(state).double().sum())
        return min(max(step / single, 1.0 / micro_batches), 1.0) if single > 0 else 1.0

    def consensus(self, grid: Grid) -> float | None:
        state = _state(grid)
        return self.agreement(state, grid.ballot.micro_batches) if state.observations >= 2 else None

    def cast(self, grid: Grid, gradient: torch.Tensor, rows: torch.Tensor, use: int, sign: int) -> None:
        state, ballot = _state(grid), grid.ballot
        kernels.cast_votes(
            gradient,
            rows,
            self.yardstick(grid)[0],
            grid.indices if state.votes is None else state.votes,
            state.rows["row_squares"],
            state.rows["row_sketch"],
            keys=cast_keys(grid),
            slot=ballot.micro_batch * grid.uses + use,
            units=self.units(grid),
            sign=sign,
            backend=ballot.backend,
            control=ballot.control(grid, use),
            mark=ballot.mark(grid),
        )

    def close_step(self, grid: Grid) -> None:
        state = _state(grid)
        cast_by, _ = self.yardstick(grid)
        self._fold_columns(grid, state)
        self._fold_rows(grid, state, cast_by)
        yardstick, gain = self.yardstick(grid)
        fresh = torch.where(cast_by > 0, yardstick / cast_by, 1.0).clamp(max=FRESHNESS_MAX)
        state.push = (gain * fresh.double()).round().long()
        # Not before: what the step has gathered is in the old shares.
        self.columns_changed(state)

    def apply(self, grid: Grid, rate: float, shrink: int) -> tuple[int, int, int]:
        units, state = self.units(grid), _state(grid)
        if state.observations == 0:
            return 0, 0, 0
        assert state.push is not None, "the step was not closed"
        # A scale below 2^-16 counts as that: its weights leave their range at a touch either way.
        inverse = grid.inverse_scale().clamp(max=1 << 36) * state.push >> 16
        return kernels.apply_votes(
            grid.indices,
            state.votes,
            kernels.integer_strides(inverse, rate, units.unit),
            grid.tables(),
            keys=(*_keys(grid, _DRAW), *_keys(grid, _FADE)),
            decay=round(self.beta * 65536),
            carry=units.carry,
            shrink=shrink,
            reach=self.most(units),
            backend=grid.ballot.backend,
        )

    def most(self, units: VoteUnits) -> int:
        """:attr:`reach` in votes."""
        return min(max(round(self.reach * units.unit), 1), vote_units.REACH_MAX)

    def _fold_columns(self, grid: Grid, state: VoteState) -> None:
        """Fold the squares of the votes that are about to be applied into the columns' running means."""
        rows = slice(None, None, max(1, len(grid.indices) // COLUMN_ROWS))
        votes = grid.tables().votes(grid.indices[rows]) if state.votes is None else state.votes[rows]
        most = self.most(self.units(grid))
        # Squares of 16 bits need 32; integers have one sum, whoever adds them up.
        squares = votes.int().clamp(-most, most).square().sum(0, dtype=torch.int64).double() / len(votes)
        assert state.shares is not None
        self._fold(state.columns["c2"], squares / state.shares.double().square())

    def _fold_rows(self, grid: Grid, state: VoteState, cast_by: torch.Tensor) -> None:
        """Fold the step's row sums, of votes cast by a yardstick, into the rows' running means."""
        yard = cast_by.double()
        columns, count = grid.indices.shape[1], grid.ballot.micro_batches
        squares = state.rows["row_squares"].double() / 4.0 ** (16 - self.units(grid).stat_shift)
        sketch = state.rows["row_sketch"].double() / 2.0**16
        for name, total in (("r2", squares / count), ("g2", (sketch / count).square())):
            self._fold(state.rows[name], torch.where(yard > 0, total / columns / yard.square(), 0.0))
        state.rows["row_squares"].zero_()
        state.rows["row_sketch"].zero_()
        state.observations += 1


@dataclass(frozen=True)
class CompactRule(MomentumRule):
    """The rule ``compact`` of the module docstring; ``buffer`` has no say, the words are the buffer."""

    name: ClassVar[str] = "compact"

    @property
    def bits(self) -> int:
        return 6

    @property
    def vote_bits(self) -> int:
        return 6


@dataclass(frozen=True)
class SupermajorityRule(VoteRule):
    """The rule ``supermajority`` of the module docstring."""

    name: ClassVar[str] = "supermajority"
    decays: ClassVar[bool] = False
    row_means: ClassVar[tuple[str, ...]] = ("r1", "r2")
    row_sums: ClassVar[tuple[str, ...]] = ("row_sizes", "row_squares")

    buffer: str = "int16"
    sensitivity: float = 0.15
    """Deviations above the mean from which a gradient is no whisper."""
    threshold: int = 5
    """Votes that flip a weight."""
    decay: float = 0.95
    """Share of the votes that survives a step."""
    jitter: int = 0
    """Largest integer noise on the votes at the moment of decision."""
    chance: float = 1.0
    """Probability of a flip where the threshold is reached."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self._expect("decay", 0.0, 1.0)
        if not math.isfinite(self.sensitivity):
            raise RuleError(f"sensitivity is {self.sensitivity}, expected a finite number")
        if self.threshold < 1 or self.jitter < 0:
            raise RuleError(f"threshold is {self.threshold} and jitter {self.jitter}, expected at least 1 and 0")
        if not 0 <= self.chance <= 1:
            raise RuleError(f"chance is {self.chance}, expected 0 to 1")

    @property
    def carry(self) -> int:
        return (1 << BUFFER_BITS[self.buffer] - 2) - 1

    def check(self, manifold: Manifold, micro_batches: int, uses: int) -> None:
        super().check(manifold, micro_batches, uses)
        most = min(self.carry + 1, vote_units.SLOTS_MAX // 2) // uses
        if micro_batches > most:
            raise RuleError(
                f"rule {self.name} with an {self.buffer} buffer counts at most {most} micro-batches in a step, got "
                f"{micro_batches}: choose --vote-buffer int16, or fewer"
            )

    def measure(self, grid: Grid, gradient: torch.Tensor, rows: torch.Tensor) -> None:
        super().measure(grid, gradient, rows)
        _state(grid).rows["r1"][rows] += (1 - self.beta2) * gradient.abs().mean(1).clamp(max=1e30)

    def yardstick(self, grid: Grid) -> tuple[torch.Tensor, int]:
        """Reciprocal of the tensor's RMS for each row, float32 ``(out,)``, and the gate in units of that RMS."""
        state = _state(grid)
        key = (self, state.observations, grid.heat)
        if state.cached is None or state.cached[0] != key:
            square = float(self.corrected(state).double().mean())
            size = float(self.corrected(state, "r1").double().mean())
            rms = square**0.5
            deviation = max(square - size * size, 0.0) ** 0.5
            # Below 1, a layer's heat also raises the gate, so that fewer weights flip and not only less far.
            gate = (size + self.sensitivity * deviation) / rms / grid.heat if rms > 0 else 0.0
            gate = round(min(gate, 2.0 * vote_units.WHISPER_LIMIT) * 2**vote_units.WHISPER_BITS)
            one = min(1 / rms, 1e30) if rms > 0 else 0.0
            state.cached = (key, (torch.full_like(state.rows["r2"], one), gate))
        return state.cached[1]

    def cast(self, grid: Grid, gradient: torch.Tensor, rows: torch.Tensor, use: int, sign: int) -> None:
        state = _state(grid)
        yardstick, gate = self.yardstick(grid)
        assert state.votes is not None, "check() refuses manifolds whose words hold votes"
        kernels.cast_whispers(
            gradient.float(),
            rows,
            yardstick,
            state.votes,
            state.rows["row_sizes"],
            state.rows["row_squares"],
            gate=gate,
            sign=sign,
            backend=grid.ballot.backend,
            mark=grid.ballot.mark(grid),
        )

    def apply(self, grid: Grid, rate: float, shrink: int) -> tuple[int, int, int]:
        state = _state(grid)
        assert state.votes is not None, "check() refuses manifolds whose words hold votes"
        if shrink:
            raise RuleError(f"rule {self.name} has no weight decay: leave --weight-decay at 0")
        return kernels.flip_by_majority(
            grid.indices,
            state.votes,
            # From fixed point to indices on an even table: 2^-40 of the scale is 2^-25 of an index, kept with 16 bits.
            kernels.integer_strides(grid.inverse_scale(), rate, 1) >> 9,
            grid.tables(),
            keys=(*_keys(grid, _DRAW), *_keys(grid, _FADE)),
            threshold=self.threshold,
            jitter=self.jitter,
            chance=round(self.chance * 65536),
            decay=round(self.decay * 65536),
            carry=self.carry,
            backend=grid.ballot.backend,
        )

    def close_step(self, grid: Grid) -> None:
        state = _state(grid)
        yard = float(self.yardstick(grid)[0].amax())
        scale = 2.0**vote_units.WHISPER_BITS * yard
        count = grid.indices.shape[1] * grid.ballot.micro_batches
        for mean, total, power in (("r1", "row_sizes", 1), ("r2", "row_squares", 2)):
            value = state.rows[total].double() / (count * scale**power) if yard > 0 else state.rows[mean].double() * 0
            self._fold(state.rows[mean], value)
            state.rows[total].zero_()
        state.observations += 1


@dataclass(frozen=True)
class StochasticRule(SupermajorityRule):
    """The rule ``stochastic`` of the module docstring."""

    name: ClassVar[str] = "stochastic"

    threshold: int = 1
    jitter: int = 2
    chance: float = 0.25


RULES: dict[str, type[VoteRule]] = {
    rule.name: rule for rule in (MomentumRule, CompactRule, SupermajorityRule, StochasticRule)
}
DEFAULT = MomentumRule.name


def rule_named(name: str, **changes: Any) -> VoteRule:
    """The rule of that name; ``changes`` are hyperparameters, None where the rule's own default holds.

    Raises:
        RuleError: unknown name, a hyperparameter that the rule does not have, or a value that it refuses.
    """
    if name not in RULES:
        raise RuleError(f"unknown vote rule {name!r}, expected one of {', '.join(RULES)}")
    given = {key: value for key, value in changes.items() if value is not None}
    if unknown := sorted(set(given) - {f.name for f in fields(RULES[name])}):
        raise RuleError(f"rule {name} has no {', '.join(unknown)}")
    return replace(RULES[name](), **given)


@dataclass
class Ballot:
    """What the backward pass is to do with weight gradients; one object shared by all grids of a model.

    ``mode``: ``closed`` ignores them; ``measure`` takes the row statistics of grids that have none yet; ``cast``
    votes; ``retract`` takes the votes of an identical earlier pass back; ``probe`` computes weight gradients and drops
    them, to find out whether they fit into memory.
    """

    seed: int = 0
    rule: VoteRule = field(default_factory=MomentumRule)
    step: int = 0
    micro_batch: int = 0
    micro_batches: int = 1
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

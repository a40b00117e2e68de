"""The rules ``momentum`` and ``compact``: graded votes in units of a slow RMS of their row and column.

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
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch

import ghost_kernels as kernels
import vote_units
from ballots import BUFFER_BITS, DRAW, FADE, Grid, RuleError, VoteRule, VoteState, cast_keys, keys_of, state_of
from manifolds import Manifold
from vote_units import VoteUnits

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

    def columns_changed(self, state: VoteState) -> None:
        assert state.shares is not None
        state.shares.copy_(column_shares(state.columns["c2"]))

    def yardstick(self, grid: Grid) -> tuple[torch.Tensor, torch.Tensor]:
        """Votes per unit of gradient for each row, float32 ``(out,)``, 0 for a tensor that has seen no gradient; and
        the rows' gains as multiples of 2^-16, int64 ``(out,)``."""
        state, count = state_of(grid), grid.ballot.micro_batches
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
        state = state_of(grid)
        return self.agreement(state, grid.ballot.micro_batches) if state.observations >= 2 else None

    def cast(self, grid: Grid, gradient: torch.Tensor, rows: torch.Tensor, use: int, sign: int) -> None:
        state, ballot = state_of(grid), grid.ballot
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
        state = state_of(grid)
        cast_by, _ = self.yardstick(grid)
        self._fold_columns(grid, state)
        self._fold_rows(grid, state, cast_by)
        yardstick, gain = self.yardstick(grid)
        fresh = torch.where(cast_by > 0, yardstick / cast_by, 1.0).clamp(max=FRESHNESS_MAX)
        state.push = (gain * fresh.double()).round().long()
        # Not before: what the step has gathered is in the old shares.
        self.columns_changed(state)

    def apply(self, grid: Grid, rate: float, shrink: int) -> tuple[int, int, int]:
        units, state = self.units(grid), state_of(grid)
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
            keys=(*keys_of(grid, DRAW), *keys_of(grid, FADE)),
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
        columns, count = grid.indices.shape[1], grid.ballot.voted or grid.ballot.micro_batches
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

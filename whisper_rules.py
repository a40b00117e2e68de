"""The rules ``supermajority`` and ``stochastic`` of the first plans: one vote a micro-batch, and whispers stay silent.

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
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch

import ghost_kernels as kernels
import vote_units
from ballots import BUFFER_BITS, DRAW, FADE, Grid, RuleError, VoteRule, keys_of, state_of
from manifolds import Manifold


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
        state_of(grid).rows["r1"][rows] += (1 - self.beta2) * gradient.abs().mean(1).clamp(max=1e30)

    def yardstick(self, grid: Grid) -> tuple[torch.Tensor, int]:
        """Reciprocal of the tensor's RMS for each row, float32 ``(out,)``, and the gate in units of that RMS."""
        state = state_of(grid)
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
        state = state_of(grid)
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
        state = state_of(grid)
        assert state.votes is not None, "check() refuses manifolds whose words hold votes"
        if shrink:
            raise RuleError(f"rule {self.name} has no weight decay: leave --weight-decay at 0")
        return kernels.flip_by_majority(
            grid.indices,
            state.votes,
            # From fixed point to indices on an even table: 2^-40 of the scale is 2^-25 of an index, kept with 16 bits.
            kernels.integer_strides(grid.inverse_scale(), rate, 1) >> 9,
            grid.tables(),
            keys=(*keys_of(grid, DRAW), *keys_of(grid, FADE)),
            threshold=self.threshold,
            jitter=self.jitter,
            chance=round(self.chance * 65536),
            decay=round(self.decay * 65536),
            carry=self.carry,
            backend=grid.ballot.backend,
        )

    def close_step(self, grid: Grid) -> None:
        state = state_of(grid)
        yard = float(self.yardstick(grid)[0].amax())
        scale = 2.0**vote_units.WHISPER_BITS * yard
        count = grid.indices.shape[1] * (grid.ballot.voted or grid.ballot.micro_batches)
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

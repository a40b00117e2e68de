"""What a grid finds out about its own votes while its ballot listens: two sums over a sample of rows.

``Agreement`` is a cosine with a shuffled control beside it, for votes and gradients that are mostly noise;
``Obedience`` a share of signs weighted by size, for what should follow exactly. What they mean for a run is
``vote_guard``'s business.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch


@dataclass
class Agreement:
    """Do the votes that are there point where a fresh gradient points? Sums over a sample of rows."""

    votes: float = 0.0
    control: float = 0.0
    gradient_square: float = 0.0
    votes_square: float = 0.0
    use: int | None = None
    """The one use of the grid that is compared: by the next, this micro-batch's own votes are in the buffer."""

    def add(self, gradient: torch.Tensor, votes: torch.Tensor, order: torch.Tensor) -> bool:
        """Add rows of a gradient, float ``(n, in)``, and the votes there, any integers ``(n, in)``; a gradient that is
        not finite says nothing and is left out.

        Args:
            order: a permutation of the columns, int64 ``(in,)``; with it, and shifted by a row, the votes are the
            control.

        Returns:
            Whether any of the gradient is not zero.
        """
        g, v = gradient.double(), votes.double()
        products = (g * v, g * v.roll(1, 0)[:, order], g.square(), v.square())
        # One question to the device.
        along, control, size, votes_size = torch.stack([p.sum() for p in products]).tolist()
        if not math.isfinite(size):
            return False
        self.votes -= along
        self.control -= control
        self.gradient_square += size
        self.votes_square += votes_size
        return size > 0

    @property
    def cosines(self) -> tuple[float, float] | None:
        """Cosine of the votes, and of shuffled votes, with the descent direction; None before there are any votes."""
        size = math.sqrt(self.gradient_square * self.votes_square)
        return (self.votes / size, self.control / size) if size > 0 else None


@dataclass
class Obedience:
    """Does one thing go where another points? Sums over a sample of rows."""

    together: float = 0.0
    size: float = 0.0
    deeds: int = 0
    """How many elements of the second kind were not zero."""

    def add(self, wish: torch.Tensor, deed: torch.Tensor) -> None:
        """Add rows of two tensors of one shape; what is not finite is left out."""
        product = wish.double() * deed.double()
        found = (product.sum(), product.abs().sum(), torch.count_nonzero(deed).double())
        together, size, deeds = torch.stack(found).tolist()
        if not math.isfinite(size):
            return
        self.together += together
        self.size += size
        self.deeds += int(deeds)

    @property
    def share(self) -> float | None:
        """From -1 (always against) over 0 (what shuffling leaves, on average) to 1 (never against), weighted by the
        sizes of both; None where one of them was nothing everywhere."""
        return self.together / self.size if self.size else None

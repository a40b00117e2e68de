"""What a grid finds out about its own votes while its ballot listens: sums over a sample of rows.

``Agreement`` is a cosine with a shuffled control beside it, for votes and gradients that are mostly noise;
``Obedience`` a share of signs weighted by size, for what should follow exactly. What they mean for a run is
``vote_guard``'s business.

The sums stay where the grid is until somebody asks: a card is not waited for in the middle of a backward pass, and a
recorded pass goes on adding to the same numbers when it is replayed.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Agreement:
    """Do votes point where a fresh gradient points?"""

    votes: float
    control: float
    gradient_square: float
    votes_square: float

    @property
    def cosines(self) -> tuple[float, float] | None:
        """Cosine of the votes, and of shuffled votes, with the descent direction; None before there are any votes."""
        size = math.sqrt(self.gradient_square * self.votes_square)
        return (self.votes / size, self.control / size) if size > 0 else None


@dataclass(frozen=True)
class Obedience:
    """Does one thing go where another points? ``deeds`` is how many elements of the second kind were not zero."""

    together: float
    size: float
    deeds: int

    @property
    def share(self) -> float | None:
        """From -1 (always against) over 0 (what shuffling leaves, on average) to 1 (never against), weighted by the
        sizes of both; None where one of them was nothing everywhere."""
        return self.together / self.size if self.size else None


_AGREEMENT, _SECONDED, _FOLLOWED, _OBEYED = slice(0, 4), slice(4, 8), slice(8, 11), slice(11, 14)


class Hearing:
    """The sums of one grid since the last :meth:`begin`. What is not finite says nothing and is left out."""

    def __init__(self, device: torch.device) -> None:
        self.sums = torch.zeros(14, dtype=torch.float64, device=device)
        self.use: int | None = None
        """The one use of the grid that is compared: by the next, this micro-batch's own votes are in the buffer."""
        self._numbers: list[float] | None = None

    def begin(self) -> None:
        """Forget everything."""
        self.sums.zero_()
        self.use = None
        self._numbers = None

    def changed(self) -> None:
        """The sums are not those that were last asked for: a recorded pass was replayed."""
        self._numbers = None

    def _note(self, where: slice, found: list[torch.Tensor], size: torch.Tensor) -> None:
        self._numbers = None
        self.sums[where] += torch.where(torch.isfinite(size), torch.stack(found), 0.0)

    def agree(self, gradient: torch.Tensor, votes: torch.Tensor, order: torch.Tensor) -> None:
        """Compare votes of earlier steps, any integers ``(n, in)``, with rows of a gradient, float ``(n, in)``.

        Args:
            order: a permutation of the columns, int64 ``(in,)``; with it, and shifted by a row, the votes are the
                control.
        """
        self._compare(_AGREEMENT, gradient, votes, order)

    def second(self, gradient: torch.Tensor, votes: torch.Tensor, order: torch.Tensor) -> None:
        """The same of votes that the gradient had no say in."""
        self._compare(_SECONDED, gradient, votes, order)

    def _compare(self, where: slice, gradient: torch.Tensor, votes: torch.Tensor, order: torch.Tensor) -> None:
        g, v = gradient.double(), votes.double()
        size = g.square().sum()
        self._note(where, [-(g * v).sum(), -(g * v.roll(1, 0)[:, order]).sum(), size, v.square().sum()], size)

    def follow(self, wish: torch.Tensor, deed: torch.Tensor) -> None:
        """Compare what a gradient asked for with the votes that it cast: two tensors of one shape."""
        self._obey(_FOLLOWED, wish, deed)

    def obey(self, wish: torch.Tensor, deed: torch.Tensor) -> None:
        """Compare votes with the moves that they made."""
        self._obey(_OBEYED, wish, deed)

    def _obey(self, where: slice, wish: torch.Tensor, deed: torch.Tensor) -> None:
        product = wish.double() * deed.double()
        size = product.abs().sum()
        self._note(where, [product.sum(), size, torch.count_nonzero(deed).double()], size)

    @staticmethod
    def read(hearings: list[Hearing]) -> None:
        """Ask for the sums of many grids at once, all on one device: one answer instead of one for each."""
        if hearings:
            for hearing, numbers in zip(hearings, torch.stack([h.sums for h in hearings]).tolist(), strict=True):
                hearing._numbers = numbers

    def _of(self, where: slice) -> list[float]:
        if self._numbers is None:
            self._numbers = self.sums.tolist()
        return self._numbers[where]

    @property
    def agreement(self) -> Agreement:
        """Of the votes of earlier steps."""
        return Agreement(*self._of(_AGREEMENT))

    @property
    def seconded(self) -> Agreement:
        """Of the votes of a step's other micro-batches."""
        return Agreement(*self._of(_SECONDED))

    @property
    def followed(self) -> Obedience:
        """Of the votes that a gradient cast."""
        together, size, deeds = self._of(_FOLLOWED)
        return Obedience(together, size, int(deeds))

    @property
    def obeyed(self) -> Obedience:
        """Of the moves that votes made."""
        together, size, deeds = self._of(_OBEYED)
        return Obedience(together, size, int(deeds))

"""Is the machinery of votes connected? A run whose votes go nowhere looks like one that learns little; this one stops.

A step is a chain: the loss depends on a weight, its gradient reaches the grid and becomes votes, votes move the weight.
Each link is looked at on a few rows of every open grid, every step:

    heard       the backward pass came by with a gradient that is not all zero
    followed    how far the votes that the step's first micro-batch cast go in its own descent direction
    obeyed      how far the weights that moved went where the votes pointed

The last two are shares from -1 (always against) to 1 (never against); shuffled votes have 0 on average, with a wide
spread where few weights move, so it is a fixed limit that counts and not a drawn control. Healthy votes follow at 1.000
by every rule, at learning rates from 1e-6 to 3e-3 and with 1 to 16 micro-batches, and are obeyed at 1.000 (the
stochastic rule, which moves weights by noise too: from 0.46 on, less where only a handful moves, so a mean over steps
counts). A dropped hook and a layer that the backward pass does not visit are not heard; an inverted sign is followed or
obeyed at -1. A grid that fails for too long ends the run by name.

Rejected: agreement of the votes that earlier steps left with a fresh gradient, which telemetry has as ``agreement``. It
is 0.4 when a run begins and falls to zero, of either sign, in runs that go on to learn for hours: noise of
micro-batches is all that it measures then.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Mapping
from dataclasses import dataclass, field

LIMIT = 0.1
"""Lowest mean share that counts as following."""


@dataclass(frozen=True)
class Evidence:
    """What one step showed of one open grid.

    Attributes:
        heard: whether a gradient arrived that was not all zero.
        followed: share of the votes cast that go in the descent direction; None where nothing was cast on the rows that
            are looked at.
        obeyed: share of the moves that go where votes point; None where nothing there moved.
        flips: weights that moved, of the whole grid.
    """

    heard: bool
    followed: float | None
    obeyed: float | None
    flips: int


@dataclass
class _Past:
    """What a grid's last steps were like: steps in a row by kind of fault, and the last shares."""

    streaks: Counter[str] = field(default_factory=Counter)
    followed: deque[float] = field(default_factory=deque)
    obeyed: deque[float] = field(default_factory=deque)


@dataclass
class VoteGuard:
    """Remembers what speaks against a grid. Not part of a checkpoint: a resumed run looks anew."""

    patience: int = 8
    """Steps in a row without a gradient; steps over whose mean votes or moves must not go elsewhere."""
    idle_max: int = 64
    """Steps in a row in which not one weight moved, or nothing was cast on the rows that are looked at."""
    _past: dict[str, _Past] = field(default_factory=dict)

    def look(self, evidence: Mapping[str, Evidence], rate: float) -> str | None:
        """Look at a step's open grids.

        Args:
            rate: learning rate of the step; at 0 nothing is expected to move.

        Returns:
            What is wrong, with the grid's name, when it has been wrong for too long; else None.
        """
        for name in self._past.keys() - evidence.keys():
            del self._past[name]
        for name, seen in evidence.items():
            fault = self._fault(self._past.setdefault(name, _Past()), seen, rate)
            if fault is not None:
                return f"{name}: {fault}; the run is not training this matrix"
        return None

    def _fault(self, past: _Past, seen: Evidence, rate: float) -> str | None:
        signs = {
            "silent": not seen.heard,
            "mute": seen.heard and seen.followed is None,
            "still": rate > 0 and seen.flips == 0,
        }
        for kind, present in signs.items():
            past.streaks[kind] = past.streaks[kind] + 1 if present else 0
        for shares, share in ((past.followed, seen.followed), (past.obeyed, seen.obeyed)):
            if share is not None:
                shares.append(share)
            while len(shares) > self.patience:
                shares.popleft()
        if past.streaks["silent"] >= self.patience:
            return (
                f"it is open and no gradient reaches it, {self.patience} steps in a row: the loss does not depend on it"
            )
        if past.streaks["mute"] >= self.idle_max:
            return f"gradients reach it and no votes are cast, {self.idle_max} steps in a row"
        if past.streaks["still"] >= self.idle_max:
            return f"not one of its weights moves, {self.idle_max} steps in a row"
        for shares, words in (
            (past.followed, "its votes follow their gradients"),
            (past.obeyed, "its weights follow their votes"),
        ):
            if len(shares) == self.patience and (mean := sum(shares) / len(shares)) < LIMIT:
                return f"{words} at {mean:.3f} over {self.patience} steps (shuffled: 0, expected: near 1)"
        return None

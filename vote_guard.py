"""Is the machinery of votes connected? A run whose votes go nowhere looks like one that learns little; this one stops.

A step is a chain: the loss depends on a weight, its gradient reaches the grid and becomes votes, votes move the weight.
Each link is looked at on a few rows of every open grid, every step:

    heard       the backward pass came by with a gradient that is not all zero
    followed    how far the votes that the step's first micro-batch cast go in its own descent direction
    obeyed      how far the weights that moved went where the votes pointed

The last two are shares from -1 (always against) to 1 (never against); shuffled votes have 0 on average, with a wide
spread where few weights move, so it is a fixed limit that counts and not a drawn control. Healthy votes follow at 1.000
by every rule, at learning rates from 1e-6 to 3e-3 and with 1 to 16 micro-batches, and are obeyed at 1.000 (the
stochastic rule, which moves weights by noise too: from 0.46 on, and anything where only a handful moves, so a mean over
steps counts, and over a hundred moves at least). A dropped hook and a layer that the backward pass does not visit are
not heard; an inverted sign is followed or obeyed at -1. A grid that fails for too long ends the run by name.

A chain that holds may still carry nothing: gradients that are noise cast votes that follow them well. So the votes that
a step's micro-batches cast are compared with the gradient of its last one, which had no say in them:

    seconded    cosine of the votes with that fresh gradient's descent direction, less that of the same votes shuffled

Taken at the same weights and on independent data, its expectation is the square of what the gradients have in common,
so it is positive wherever there is something to learn; one step's is mostly noise (0.01 with a spread of 0.02, two
micro-batches of 512 tokens, late in a run). Votes that over a thousand steps are seconded no better than shuffled ones,
while the held-out loss finds no new low, end the run: it learns nothing, or nothing more.

Rejected: agreement of the votes that earlier steps left with a fresh gradient, which telemetry has as ``agreement``. It
is 0.4 when a run begins and falls to zero, of either sign, in runs that go on to learn for hours: the weights have
moved since, and the votes that are left over are those that had nothing to say.
"""

from __future__ import annotations

import math
from collections import Counter, deque
from collections.abc import Mapping
from dataclasses import dataclass, field

LIMIT = 0.1
"""Lowest mean share that counts as following."""
ENOUGH = 100
"""Fewest moves that a mean share is taken over."""


@dataclass(frozen=True)
class Evidence:
    """What one step showed of one open grid.

    Attributes:
        heard: whether a gradient arrived that was not all zero.
        followed: share of the votes cast that go in the descent direction; None where nothing was cast on the rows that
            are looked at.
        obeyed: share of the moves that go where votes point; None where nothing there moved.
        flips: weights that moved, of the whole grid.
        moves: weights that moved on the rows that are looked at.
        seconded: how much better than shuffled votes those cast agree with a fresh gradient; None where unknown.
    """

    heard: bool
    followed: float | None
    obeyed: float | None
    flips: int
    moves: int
    seconded: float | None = None


@dataclass
class _Past:
    """What a grid's last steps were like: steps in a row by kind of fault, and the last shares with their weights."""

    streaks: Counter[str] = field(default_factory=Counter)
    followed: deque[tuple[float, int]] = field(default_factory=deque)
    obeyed: deque[tuple[float, int]] = field(default_factory=deque)


@dataclass
class VoteGuard:
    """Remembers what speaks against a grid. Not part of a checkpoint: a resumed run looks anew."""

    patience: int = 8
    """Steps in a row without a gradient; steps over whose mean votes or moves must not go elsewhere."""
    idle_max: int = 64
    """Steps in a row in which not one weight moved, or nothing was cast on the rows that are looked at."""
    unseconded_max: int = 1000
    """Steps over whose mean votes must be seconded better than shuffled ones, unless the loss falls; 0: never mind."""
    _past: dict[str, _Past] = field(default_factory=dict)
    _seconded: deque[float] = field(default_factory=deque)
    _losses: deque[float] = field(default_factory=deque)
    _low: float = math.inf
    _since_low: int = 0
    _since_evaluation: float = math.inf

    def evaluated(self, loss: float) -> None:
        """Take note of a held-out loss."""
        self._since_evaluation = 0
        if loss < self._low:
            self._low, self._since_low = loss, 0

    def look(self, evidence: Mapping[str, Evidence], rate: float, loss: float) -> str | None:
        """Look at a step's open grids.

        Args:
            rate: learning rate of the step; at 0 nothing is expected to move.
            loss: of the step; says whether anything is learned where no held-out loss does.

        Returns:
            What is wrong, with the grid's name, when it has been wrong for too long; else None.
        """
        for name in self._past.keys() - evidence.keys():
            del self._past[name]
        for name, seen in evidence.items():
            fault = self._fault(self._past.setdefault(name, _Past()), seen, rate)
            if fault is not None:
                return f"{name}: {fault}; the run is not training this matrix"
        return self._doubt(evidence, loss)

    def _doubt(self, evidence: Mapping[str, Evidence], loss: float) -> str | None:
        """Whether votes as a whole say nothing, and nothing says otherwise."""
        self._since_low += 1
        self._since_evaluation += 1
        known = [seen.seconded for seen in evidence.values() if seen.seconded is not None]
        if not known or not self.unseconded_max:
            return None
        self._seconded.append(sum(known) / len(known))
        self._losses.append(loss)
        if len(self._seconded) <= self.unseconded_max:
            return None
        self._seconded.popleft()
        self._losses.popleft()
        mean = sum(self._seconded) / len(self._seconded)
        if mean > 0 or self._improves():
            return None
        return (
            f"over {self.unseconded_max} steps the votes agree with fresh gradients no better than shuffled ones "
            f"({mean:+.4f}), and the loss does not fall: there is nothing (more) that micro-batches have in common; "
            "look at the data, raise --grad-accum, or go on regardless with --unseconded-max 0"
        )

    def _improves(self) -> bool:
        """Whether the held-out loss had a new low within the window; where nothing was evaluated in it, whether the
        steps' own loss is lower in its second half."""
        if self._since_evaluation <= self.unseconded_max:
            return self._since_low <= self.unseconded_max
        half = len(self._losses) // 2
        older, newer = list(self._losses)[:half], list(self._losses)[-half:]
        return sum(newer) < sum(older)

    def _fault(self, past: _Past, seen: Evidence, rate: float) -> str | None:
        signs = {
            "silent": not seen.heard,
            "mute": seen.heard and seen.followed is None,
            "still": rate > 0 and seen.flips == 0,
        }
        for kind, present in signs.items():
            past.streaks[kind] = past.streaks[kind] + 1 if present else 0
        for shares, share, weight in ((past.followed, seen.followed, ENOUGH), (past.obeyed, seen.obeyed, seen.moves)):
            if share is not None:
                shares.append((share, weight))
            # As many steps back as it takes, but not for ever.
            while len(shares) > self.patience and (
                sum(w for _, w in shares) - shares[0][1] >= ENOUGH or len(shares) > self.idle_max
            ):
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
            weights = sum(w for _, w in shares)
            if len(shares) < self.patience or weights < ENOUGH:
                continue
            if (mean := sum(share * w for share, w in shares) / weights) < LIMIT:
                return f"{words} at {mean:.3f} over {len(shares)} steps (shuffled: 0, expected: near 1)"
        return None

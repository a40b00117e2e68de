"""What one step did, layer by layer, and what those who watch the run make of it.

A trainer fills in what it knows of a step (:class:`StepResult`); :func:`describe` adds what can be read off the grids
afterwards, and :meth:`NightWatch.judge` asks governor, sentinel and guard, who set the rates of the next step or send
the run back. All of it happens between steps: nothing here knows a gradient, a file or a screen, and what is asked of
grids on a card is asked once for all of them.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from ghost_core import Movement
from ghost_grid import GhostGrid
from night_shift import AntigravitySentinel, LayerGroup, LayerPeel, MemoryContingency, TrainingGovernor, Verdict
from training_recipe import TrainError
from vote_evidence import Hearing
from vote_guard import Evidence, VoteGuard

PRESSURE_ROWS = 32
"""About how many rows of a grid are looked at to measure its vote pressure."""


@dataclass
class StepResult:
    """What one step did.

    Attributes:
        loss: mean over the answer tokens that were learned, nats; NaN where none was.
        tokens, answer_tokens: of the micro-batches that were run.
        skipped: micro-batches that were not finite.
        micro_batches: how many were run.
        moved: by grid.
        rate: learning rate of the step.
        data_seconds: spent on getting its micro-batches.
        earlier_seconds: that its first micro-batches took before it was left and gone on with.
        verdict: the sentinel's; ``ok`` where there is none.
        measured: what the governor measured, by group of layers.
        agreement: cosines of (votes, shuffled votes) with the first micro-batch's descent direction, by group.
        seconded: cosine of the votes cast with a fresh gradient's descent direction, less that of shuffled votes.
        consensus: how far the micro-batches agreed with each other, by group: 1/K for noise, 1 for one opinion.
        movement: mean |change| over mean |weight|, by group.
        flips: how many weights changed their index, by group.
        pressure: how full the vote buffers were when they were applied, by group: see :func:`vote_pressure`.
        events: (kind, fields) of what happened beside the step.
    """

    loss: float
    tokens: int
    answer_tokens: int
    skipped: int
    micro_batches: int
    moved: dict[str, Movement]
    rate: float
    data_seconds: float = field(default=0.0, compare=False)
    earlier_seconds: float = field(default=0.0, compare=False)
    verdict: Verdict = field(default_factory=lambda: Verdict("ok"))
    measured: dict[str, float] = field(default_factory=dict)
    agreement: dict[str, tuple[float, float]] = field(default_factory=dict)
    seconded: float | None = None
    consensus: dict[str, float] = field(default_factory=dict)
    movement: dict[str, float] = field(default_factory=dict)
    flips: dict[str, int] = field(default_factory=dict)
    pressure: dict[str, float] = field(default_factory=dict)
    events: list[tuple[str, dict[str, Any]]] = field(default_factory=list)


@torch.no_grad()
def vote_pressure(groups: Iterable[LayerGroup]) -> dict[str, float]:
    """Vote pressure by group: RMS of the votes that are about to move the weights, in units of the largest vote that
    their buffer holds (0 silent, 1 every vote at the edge). Of a few evenly spaced rows of each grid, every grid
    counted by its weights; groups that are locked are left out."""
    found: dict[str, float] = {}
    for group in groups:
        total, weights = 0.0, 0
        for grid in group.grids.values():
            if grid.state is None:
                continue
            rows = slice(None, None, max(1, grid.shape[0] // PRESSURE_ROWS))
            if grid.state.votes is None:
                votes, most = grid.tables().votes(grid.indices[rows]), 2 ** (grid.tables().vote_bits - 1) - 1
            else:
                votes, most = grid.state.votes[rows], torch.iinfo(grid.state.votes.dtype).max
            count = grid.indices.numel()
            total += float(votes.float().square().mean()) / most**2 * count
            weights += count
        if weights:
            found[group.name] = math.sqrt(total / weights)
    return found


def describe(result: StepResult, groups: Iterable[LayerGroup]) -> None:
    """Fill in, by group, what a finished step did and how its votes agreed (``result`` mutated)."""
    groups = list(groups)
    Hearing.read([grid.hearing for group in groups for name, grid in group.grids.items() if name in result.moved])
    for group in groups:
        moved = {name: result.moved[name] for name in group.grids if name in result.moved}
        if not moved:
            continue
        grids = [group.grids[name] for name in moved]
        weights = sum(m.weights for m in moved.values())
        result.flips[group.name] = sum(m.flips for m in moved.values())
        result.movement[group.name] = sum(m.relative * m.weights for m in moved.values()) / weights
        heard = [cosines for grid in grids if (cosines := grid.hearing.agreement.cosines) is not None]
        if heard:
            result.agreement[group.name] = (
                sum(votes for votes, _ in heard) / len(heard),
                sum(control for _, control in heard) / len(heard),
            )
        opinions = [opinion for grid in grids if (opinion := grid.ballot.rule.consensus(grid)) is not None]
        if opinions:
            result.consensus[group.name] = sum(opinions) / len(opinions)


@dataclass
class NightWatch:
    """Who watches a run: layers, bad steps, speed, memory, and whether votes arrive. Mutated by the trainer, saved
    with it."""

    peel: LayerPeel
    sentinel: AntigravitySentinel
    governor: TrainingGovernor | None
    contingency: MemoryContingency
    guard: VoteGuard = field(default_factory=VoteGuard)

    def judge(self, result: StepResult, step: int, groups: Iterable[LayerGroup]) -> None:
        """Set the heats of the next step, and what this one is called.

        Args:
            result: of a step that :func:`describe` has been at; ``measured``, ``seconded``, ``verdict`` and ``events``
                are mutated.
            step: its number, counted from 1.
            groups: of the whole model; the heats of their grids are mutated.
        """
        groups = list(groups)
        if self.governor is not None:
            self._steer(self.governor, result, groups)
        moves = result.moved.values()
        weights = sum(m.weights for m in moves)
        travel = sum(m.travel * m.weights for m in moves)
        size = sum(m.mean_size * m.weights for m in moves)
        movement = travel / weights / result.rate if weights and result.rate > 0 else 0.0
        share = travel / size if size > 0 else 0.0
        result.verdict = self.sentinel.judge(step, result.loss, movement, share, result.skipped, result.micro_batches)
        known = {name: grid for group in groups for name, grid in group.grids.items()}
        grids = {name: known[name] for name in result.moved}
        cosines = {name: grid.hearing.seconded.cosines for name, grid in grids.items()}
        seconded = {name: pair[0] - pair[1] for name, pair in cosines.items() if pair is not None}
        if seconded:
            result.seconded = sum(seconded.values()) / len(seconded)
        if result.skipped < result.micro_batches and result.verdict.kind in ("ok", "spike", "non_finite"):
            evidence = {n: _evidence(g, result.moved[n].flips, seconded.get(n)) for n, g in grids.items()}
            if (reason := self.guard.look(evidence, result.rate, result.loss)) is not None:
                result.verdict = Verdict("end", reason, step)

    def _steer(self, governor: TrainingGovernor, result: StepResult, groups: list[LayerGroup]) -> None:
        braked = governor.braked()
        result.measured = governor.steer(
            {g.name: {n: result.moved[n] for n in g.grids if n in result.moved} for g in groups}
        )
        self.set_heats(groups)
        for name in sorted(governor.braked().keys() - braked.keys()):
            result.events.append(
                ("governor", {"layer": name, "measured": result.measured[name], "limit": governor.limit})
            )

    def set_heats(self, groups: Iterable[LayerGroup]) -> None:
        """Tell every grid how far it is braked."""
        heats = self.governor.heat if self.governor is not None else {}
        for group in groups:
            for grid in group.grids.values():
                grid.heat = heats.get(group.name, 1.0)

    def state_dict(self) -> dict[str, Any]:
        """Everything that later steps depend on, plain types; the guard begins anew with each process."""
        return {
            "supervisor": {"peel": str(self.peel), "window": self.peel.window},
            "sentinel": self.sentinel.state_dict(),
            "governor": None if self.governor is None else self.governor.state_dict(),
            "contingency": self.contingency.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore :meth:`state_dict`; other keys are somebody else's.

        Raises:
            TrainError: the state is of a run without a watch, or with another schedule, or with a governor where this
                one has none, or the reverse.
            NightShiftError: the run was begun with another shape or governor's limit.
        """
        own = self.state_dict()
        if missing := own.keys() - state.keys():
            raise TrainError(
                f"cannot resume: the checkpoint has no {', '.join(sorted(missing))}; it was written by an older "
                "version, begin a new run from it with --checkpoint"
            )
        self.contingency.load_state_dict(state["contingency"])
        if state["supervisor"] != own["supervisor"]:
            raise TrainError(
                f"cannot resume: the checkpoint has supervisor {state['supervisor']}, this run {own['supervisor']}"
            )
        if (state["governor"] is None) != (self.governor is None):
            raise TrainError("cannot resume: the checkpoint and this run disagree on --governor")
        self.sentinel.load_state_dict(state["sentinel"])
        if self.governor is not None:
            self.governor.load_state_dict(state["governor"])


def _evidence(grid: GhostGrid, flips: int, seconded: float | None) -> Evidence:
    found = grid.hearing
    return Evidence(grid.heard, found.followed.share, found.obeyed.share, flips, found.obeyed.deeds, seconded=seconded)

"""What watches over a run that nobody watches: which layers are open, what a bad step is, how fast weights may move.

``LayerPeel`` is a schedule: a pure function of the step, so a resumed run is in the phase that it left. Top layers
open first; the lower ones then meet gradients from layers that have begun to settle (gradual unfreezing, Howard and
Ruder 2018, arXiv 1801.06146). With a window only so many layers hold vote buffers at a time, as in block-wise training
(BAdam, arXiv 2404.02827), and the window rolls down the model and begins again at the top. ``NightShiftSupervisor``
carries a schedule out. A locked layer has no vote buffer, no row state and no optimizer state, costs no weight
gradient, and keeps norms and biases as they are; nothing is hoarded behind its lock, so an unlock begins from zero
votes. The head is open from the first step, and so is an embedding that is tied to it; but the embedding's *lookup*
casts votes only while the lowest layer is open, because its gradient would need a backward pass through everything.

``AntigravitySentinel`` judges finished steps. Micro-batches that were not finite have left no trace already; the
sentinel counts them. A loss far above its recent median for several steps, or a movement far beyond the usual, calls
for a return to the last checkpoint from before it, at half the rate and on new data: the remedy of PaLM (arXiv
2204.02311, 5.1), which also skipped the data it had spiked on. Too much of either ends the run.

``TrainingGovernor`` brakes single layers. It measures what a step did to each of them and, above the rule's limit,
lowers the layer's heat by a fifth (the plans' constant); below it the heat recovers slowly to 1. It never pushes: a
low learning rate is the user's own wish.

``MemoryContingency`` is a ladder of smaller shapes with as many tokens per step. Rejected: shrinking the model's part
instead (fewer open layers), which would change what is learned; a shorter row only changes how it is cut.

None of these knows a gradient, a file or a screen, and all state is plain types, for checkpoints.
"""

from __future__ import annotations

import math
import re
import statistics
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from torch import nn

from ghost_core import GhostEmbedding, Movement, grids_of
from ghost_grid import GhostGrid

_LAYER = re.compile(r"(?:^|\.)layers\.(\d+)\.")
TOP = "head"
"""Group of everything outside the decoder's layers: head, embedding, last norm."""


class PeelError(ValueError):
    """A schedule that cannot be read."""


class NightShiftError(RuntimeError):
    """A run that should not go on."""


# -- the schedule -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class LayerPeel:
    """When layers open, top first. ``every`` = 0: all of them from the first step.

    With ``window`` at most so many layers are open at once: once that many are, the lowest open ones are followed by
    the next below and the highest close again; after the bottom comes the top.
    """

    start: int = 0
    """Step of the first unlock, counted from 0; before it only the head is open."""
    every: int = 0
    """Steps between unlocks."""
    layers: int = 0
    """Layers in an unlock."""
    window: int | None = None
    """Most layers open at a time; None for no limit."""

    def __post_init__(self) -> None:
        if self.every and (self.start < 0 or self.every < 1 or self.layers < 1):
            raise PeelError(
                f"peel {self.start}:{self.every}:{self.layers}, expected START:EVERY:LAYERS of at least 0:1:1"
            )
        if self.window is not None and (self.window < 1 or not self.every):
            raise PeelError(
                f"peel-window is {self.window} with peel {self}, expected at least 1 layer and a schedule by which the "
                "window moves: --peel v7 or START:EVERY:LAYERS"
            )

    @staticmethod
    def parse(text: str, window: int | None = None) -> LayerPeel:
        """``none``, ``v7`` (the head alone until step 200, then two layers every 50 steps) or ``START:EVERY:LAYERS``.

        Raises:
            PeelError: anything else.
        """
        if text == "none":
            return LayerPeel(window=window)
        numbers = re.fullmatch(r"(\d+):(\d+):(\d+)", "200:50:2" if text == "v7" else text)
        if not numbers or not int(numbers[2]):
            raise PeelError(f"peel is {text!r}, expected v7, none or START:EVERY:LAYERS such as 200:50:2")
        start, every, layers = map(int, numbers.groups())
        return LayerPeel(start, every, layers, window)

    def __str__(self) -> str:
        return f"{self.start}:{self.every}:{self.layers}" if self.every else "none"

    def open_layers(self, step: int, count: int) -> tuple[int, ...]:
        """Open layers of ``count`` at a step (from 0), by number, lowest first."""
        if not self.every:
            return tuple(range(count))
        opened = 0 if step < self.start else self.layers * (1 + (step - self.start) // self.every)
        most = min(self.window or count, count)
        if self.window is None or opened <= most:
            return tuple(range(count - min(opened, most), count))
        # Counted from the top, the window is at places opened - most to opened - 1 of an endless row of models.
        return tuple(sorted(count - 1 - place % count for place in range(opened - most, opened)))

    def phase(self, step: int, count: int) -> str:
        """The phase in words: ``head``, ``peeling``, ``window`` or ``all open``."""
        number = len(self.open_layers(step, count))
        if number == count:
            return "all open"
        if number == 0:
            return "head"
        return "window" if number == self.window else "peeling"

    def phases(self, steps: int, count: int) -> list[dict[str, Any]]:
        """The plan for a run of so many steps: ``step`` (from 0) before which the open layers change, which are
        ``open`` from then on, and the ``phase`` that it is."""
        found: list[dict[str, Any]] = []
        for step in (0, *(range(self.start, steps, self.every) if self.every else ())):
            layers = list(self.open_layers(step, count))
            if not found or layers != found[-1]["open"]:
                found.append({"step": step, "open": layers, "phase": self.phase(step, count)})
        return found


# -- who is open ------------------------------------------------------------------------------------------------------


@dataclass
class LayerGroup:
    """What opens and closes together."""

    name: str
    """Number of the decoder layer, or ``head``."""
    grids: dict[str, GhostGrid] = field(default_factory=dict)
    floats: dict[str, nn.Parameter] = field(default_factory=dict)


def layer_groups(model: nn.Module) -> list[LayerGroup]:
    """Grids and float parameters of a model by decoder layer, the lowest first; the last group is all the rest."""
    layers: dict[int, LayerGroup] = {}
    top = LayerGroup(TOP)

    def group_of(name: str) -> LayerGroup:
        found = _LAYER.search(name)
        return layers.setdefault(int(found[1]), LayerGroup(found[1])) if found else top

    for name, grid in grids_of(model).items():
        group_of(name).grids[name] = grid
    for name, parameter in model.named_parameters():
        group_of(name).floats[name] = parameter
    return [*(layers[i] for i in sorted(layers)), top]


@dataclass(frozen=True)
class Change:
    """What :meth:`NightShiftSupervisor.apply` did: numbers of layers, and the phase that began."""

    opened: tuple[int, ...]
    closed: tuple[int, ...]
    phase: str
    floats_closed: tuple[nn.Parameter, ...] = ()


def untied_embeddings(model: nn.Module) -> list[GhostGrid]:
    """Grids of embeddings that are no head as well: the lowest part of the model, which opens with the lowest layer."""
    heads = [m.grid for m in model.modules() if hasattr(m, "grid") and not isinstance(m, GhostEmbedding)]
    lookups = [m.grid for m in model.modules() if isinstance(m, GhostEmbedding)]
    return [grid for grid in lookups if not any(grid is head for head in heads)]


class NightShiftSupervisor:
    """Opens and locks the layers of a model (mutated) by a schedule; its only state is the step."""

    def __init__(self, model: nn.Module, peel: LayerPeel) -> None:
        *self.layers, self.top = layer_groups(model)
        self.peel = peel
        self.now: tuple[int, ...] | None = None
        """Layers that are open, or None before the first :meth:`apply`."""
        self._lookups = [m for m in model.modules() if isinstance(m, GhostEmbedding)]
        self._untied = untied_embeddings(model)

    def due(self, step: int) -> bool:
        """Whether the open layers change before this step."""
        return self.peel.open_layers(step, len(self.layers)) != self.now

    def apply(self, step: int) -> Change:
        """Open and lock what the schedule says for this step; layers that stay open keep their votes."""
        wanted = self.peel.open_layers(step, len(self.layers))
        before = self.now or ()
        closed_floats: list[nn.Parameter] = []
        for number, group in enumerate(self.layers):
            heard = number in wanted
            for grid in group.grids.values():
                grid.unlock() if heard else grid.lock()
            for parameter in group.floats.values():
                parameter.requires_grad_(heard)
                if not heard:
                    parameter.grad = None
                    closed_floats.append(parameter)
        bottom = not self.layers or 0 in wanted
        for lookup in self._lookups:
            lookup.heard = bottom
        for grid in self.top.grids.values():
            lowest = any(grid is other for other in self._untied)
            grid.lock() if lowest and not bottom else grid.unlock()
        self.now = wanted
        return Change(
            opened=tuple(sorted(set(wanted) - set(before))),
            closed=tuple(sorted(set(before) - set(wanted))),
            phase=self.phase(step),
            floats_closed=tuple(closed_floats),
        )

    def phase(self, step: int) -> str:
        """The schedule's phase in words."""
        return self.peel.phase(step, len(self.layers))


# -- bad steps --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Verdict:
    """What a step was: ``ok``, ``non_finite`` (some micro-batches left no trace), ``spike``, ``roll_back`` (return to a
    checkpoint of step ``to`` or earlier, as far as there is one) or ``end`` (with a reason)."""

    kind: Literal["ok", "non_finite", "spike", "roll_back", "end"]
    reason: str = ""
    to: int = 0


@dataclass
class AntigravitySentinel:
    """Judges finished steps. Losses in nats a token; movement is mean |change| of open weights over the rate, ``share``
    the same over their mean size.

    A step spikes when its loss is not finite or exceeds the median of the last ``memory`` good steps by ``nats`` and by
    ``deviations`` of their spread; it is an avalanche when its movement exceeds ``times`` their median and is more than
    ``harmless`` of the weights: where usual steps hardly move, as on data that are known by heart, the next ordinary
    one is many times as large. ``patience`` spikes in a row or one avalanche roll back, to before all that is under
    suspicion: a loss is that of the weights which the step before has left. Steps in which every micro-batch was lost
    neither move nor spike. Returns are counted while they come within ``calm`` good steps of each other.
    """

    memory: int = 32
    learn: int = 8
    """Good steps before anything can spike."""
    nats: float = 0.5
    deviations: float = 8.0
    times: float = 8.0
    harmless: float = 0.001
    """Usual steps at default rates move weights by 0.0002 to 0.003 of their size."""
    patience: int = 3
    cooling: float = 0.5
    """What a return does to the learning rate."""
    returns_max: int = 3
    """Returns, one after the other; one more ends the run."""
    calm: int = 500
    """Good steps after which earlier returns no longer count; the rate stays where they have brought it."""
    lost_max: int = 10
    """Steps in a row without one finite micro-batch; they end the run."""

    heat: float = 1.0
    """Factor on the learning rate."""
    returns: int = 0
    """Returns that still count."""
    since: int = 0
    """Good steps since the last return."""
    skipped: int = 0
    """Micro-batches that were not finite, in the whole run."""
    lost: int = 0
    """Steps in a row that lost every micro-batch."""
    streak: int = 0
    """Spikes in a row."""
    suspect: int = 0
    """The step that left the weights which the first of them speaks of."""

    def __post_init__(self) -> None:
        self._losses: deque[float] = deque(maxlen=self.memory)
        self._moves: deque[float] = deque(maxlen=self.memory)

    def forget_movement(self) -> None:
        """Other layers are open now: what is usual has to be learned anew."""
        self._moves.clear()

    def judge(self, step: int, loss: float, movement: float, share: float, skipped: int, micro_batches: int) -> Verdict:
        """Verdict on a step (its number counted from 1) of so many micro-batches, ``skipped`` of them not finite."""
        self.skipped += skipped
        if skipped >= micro_batches:
            self.lost += 1
            if self.lost >= self.lost_max:
                # Nothing has moved in them: whatever was saved last is good.
                return Verdict("end", f"{self.lost} steps in a row had no finite micro-batch", step)
            return Verdict("non_finite", f"all {skipped} micro-batches were not finite: nothing moved")
        self.lost = 0
        if share > self.harmless and self._is_avalanche(movement):
            usual = statistics.median(self._moves)
            return self._return(step, f"weights moved {movement / usual:.1f} times as far as usual")
        if self._is_spike(loss):
            if self.streak == 0:
                self.suspect = step - 1
            self.streak += 1
            usual = statistics.median(self._losses) if self._losses else math.nan
            reason = f"loss {loss:.3f}, usual {usual:.3f}"
            if self.streak >= self.patience:
                return self._return(step, f"{reason}, {self.streak} steps in a row")
            return Verdict("spike", reason)
        self.streak = 0
        self.since += 1
        if self.since >= self.calm:
            self.returns = 0
        self._losses.append(loss)
        self._moves.append(movement)
        if skipped:
            return Verdict(
                "non_finite", f"{skipped} of {micro_batches} micro-batches were not finite and left no trace"
            )
        return Verdict("ok")

    def _is_spike(self, loss: float) -> bool:
        if not math.isfinite(loss):
            return True
        if len(self._losses) < self.learn:
            return False
        usual = statistics.median(self._losses)
        spread = 1.4826 * statistics.median(abs(x - usual) for x in self._losses)
        return loss - usual > max(self.nats, self.deviations * spread)

    def _is_avalanche(self, movement: float) -> bool:
        usual = statistics.median(self._moves) if len(self._moves) >= self.learn else 0.0
        return usual > 0 and movement > self.times * usual

    def _return(self, step: int, reason: str) -> Verdict:
        to = (self.suspect if self.streak else step) - 1
        self.returns += 1
        self.heat *= self.cooling
        self.streak = self.since = 0
        if self.returns > self.returns_max:
            return Verdict("end", f"{reason}; {self.returns_max} returns to a checkpoint did not help", to)
        return Verdict("roll_back", reason, to)

    def recall(self, state: Mapping[str, Any]) -> None:
        """Take what was usual from :meth:`state_dict` of the checkpoint that a run returns to: should its weights be
        damaged, too, that shows."""
        self._losses = deque(state["losses"], maxlen=self.memory)
        self._moves = deque(state["moves"], maxlen=self.memory)

    _PLAIN = ("heat", "returns", "since", "skipped", "lost", "streak", "suspect")

    def state_dict(self) -> dict[str, Any]:
        """Everything that later verdicts depend on, plain types."""
        return {
            **{name: getattr(self, name) for name in self._PLAIN},
            "losses": list(self._losses),
            "moves": list(self._moves),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore :meth:`state_dict`."""
        for name in self._PLAIN:
            # Older checkpoints have no count of steps since a return, and suspect none.
            setattr(self, name, state.get(name, 0) if name in ("since", "suspect") else state[name])
        self.recall(state)


# -- how fast ---------------------------------------------------------------------------------------------------------

LIMITS: dict[str, tuple[Literal["movement", "flips"], float]] = {
    "momentum": ("movement", 0.02),
    "compact": ("movement", 0.02),
    "supermajority": ("flips", 0.0005),
    "stochastic": ("flips", 0.0005),
}
"""What of a layer is limited in a step, by vote rule: mean |change| over mean |weight|, or the share of flipped
weights; the plans' 0.05% for the plans' own rules."""


@dataclass
class TrainingGovernor:
    """Keeps what a step does to each layer below a limit, by that layer's heat (a factor on its rate; for the rules of
    whisper votes also on the gate that a whisper must pass). 0.8 and the limits of whisper votes: the plans."""

    measure: Literal["movement", "flips"]
    limit: float
    cooling: float = 0.8
    recovery: float = 1.05
    lowest: float = 2**-6
    heat: dict[str, float] = field(default_factory=dict)
    """Factor of each layer, by group name; 1 where it is missing."""

    def __post_init__(self) -> None:
        if not self.limit > 0:
            raise NightShiftError(f"the governor's limit is {self.limit}, expected above 0")

    @staticmethod
    def for_rule(rule: str, limit: float | None = None) -> TrainingGovernor:
        """With the limit of a vote rule, or another one."""
        measure, usual = LIMITS[rule]
        return TrainingGovernor(measure, usual if limit is None else limit)

    def steer(self, groups: Mapping[str, Mapping[str, Movement]]) -> dict[str, float]:
        """Set every layer's heat by what a step did to its grids.

        Returns:
            What was measured, by group; groups in which nothing may move are left out.
        """
        measured: dict[str, float] = {}
        for name, moved in groups.items():
            weights = sum(m.weights for m in moved.values())
            if not weights:
                continue
            if self.measure == "flips":
                value = sum(m.flips for m in moved.values()) / weights
            else:
                value = sum(m.relative * m.weights for m in moved.values()) / weights
            measured[name] = value
            heat = self.heat.get(name, 1.0) * (self.cooling if value > self.limit else self.recovery)
            self.heat[name] = min(max(heat, self.lowest), 1.0)
        return measured

    def braked(self) -> dict[str, float]:
        """Layers whose heat is below 1."""
        return {name: heat for name, heat in self.heat.items() if heat < 1.0}

    def state_dict(self) -> dict[str, Any]:
        """The heats and what they come from, plain types."""
        return {"heat": dict(self.heat), "measure": self.measure, "limit": self.limit}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore :meth:`state_dict`.

        Raises:
            NightShiftError: the run was begun with another limit.
        """
        # Checkpoints from before limits were kept have none.
        began, limit = state.get("measure", self.measure), state.get("limit", self.limit)
        if (began, limit) != (self.measure, self.limit):
            raise NightShiftError(
                f"cannot resume: the run was begun with a limit of {limit:g} {began}, this command says {self.limit:g} "
                f"{self.measure}: add --governor-limit {limit:g}"
            )
        self.heat = dict(state["heat"])


# -- how large --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Shape:
    """Size of a step: rows of ``seq_len`` tokens, ``batch_size`` of them in each of ``grad_accum`` micro-batches."""

    seq_len: int
    batch_size: int
    grad_accum: int

    @property
    def tokens(self) -> int:
        """Positions in a step."""
        return self.seq_len * self.batch_size * self.grad_accum

    def __str__(self) -> str:
        return f"{self.grad_accum} x {self.batch_size} x {self.seq_len} tokens"


@dataclass
class MemoryContingency:
    """A ladder of shapes, each with less in memory at a time and at least as many tokens per step.

    Batches are halved first, which costs time, and votes some of their grain; then rows shorten to 3/4, 1/2, 3/8,
    ... down to ``shortest``, which cuts longer documents: by default to 256 (512, 384, 256), and runs that begin with
    short rows may halve them.
    """

    first: Shape
    shortest: int | None = None
    rung: int = 0
    """Where on the ladder the run is; 0 is the top."""

    def ladder(self) -> list[Shape]:
        """All shapes, the widest first."""
        whole, batch = self.first.seq_len, self.first.batch_size
        batches = [batch >> k for k in range(batch.bit_length())]
        lengths = [part for k in range(whole.bit_length()) for part in (whole * 3 >> k + 2, whole >> k + 1)]
        least = max(2, min(256, whole // 2) if self.shortest is None else self.shortest)
        sizes = [(whole, b) for b in batches] + [(s, 1) for s in lengths if s >= least]
        return [Shape(s, b, math.ceil(self.first.tokens / (s * b))) for s, b in sizes]

    @property
    def shape(self) -> Shape:
        """The present shape."""
        return self.ladder()[self.rung]

    def lower(self) -> Shape | None:
        """One rung down; None at the bottom."""
        ladder = self.ladder()
        if self.rung + 1 >= len(ladder):
            return None
        self.rung += 1
        return ladder[self.rung]

    def state_dict(self) -> dict[str, Any]:
        """The rung and what it stands on, plain types."""
        return {"rung": self.rung, "first": [self.first.seq_len, self.first.batch_size, self.first.grad_accum]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore :meth:`state_dict`.

        Raises:
            NightShiftError: the run was begun with another shape, or has come to rows that are too short now.
        """
        first = Shape(*state["first"])
        if first != self.first:
            raise NightShiftError(
                f"cannot resume: the run was begun with {first}, this is {self.first}: give the same --seq-len, "
                "--batch-size and --grad-accum"
            )
        if state["rung"] >= len(self.ladder()):
            reached = replace(self, shortest=2).ladder()[state["rung"]]
            raise NightShiftError(
                f"cannot resume: the run has come down to {reached}, --shortest-seq-len says {self.shortest}: give "
                f"{reached.seq_len} or leave it out"
            )
        self.rung = state["rung"]

"""One discrete weight matrix: its words and scales, the votes while it is unlocked, and what it finds out about them.

A ``GhostGrid`` knows how to be looked up, imported, unlocked, voted on and moved. Where it stands in a model, and how a
gradient comes to it, is ``ghost_core``'s business; what votes mean and do, the vote rule's (``momentum_rules``).
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache

import torch
from torch import nn

import ghost_kernels as kernels
from ballots import Ballot, VoteState
from manifolds import Manifold
from momentum_rules import MomentumRule
from vote_evidence import Hearing

HEADROOM = 1.25
"""A row's largest weight sits at 1/1.25 of its scale after import: it can grow by a quarter before it saturates."""
SLICE_ELEMENTS = 1 << 24
"""Weights dequantized at a time: 64 MiB of float32."""

LENT_ELEMENTS = 1 << 22
"""Most weights that are lent in a buffer that stays: 16 MiB of float32."""
_LISTEN_ROWS = 16
"""Rows of a slice, or of a grid, that are looked at while the ballot listens."""
_SAMPLE = 1 << 16
"""About how many weights an estimate of their mean size looks at."""
_lent = threading.local()
_placed: dict[tuple[str, torch.device], Manifold] = {}


def _on_device(manifold: Manifold, device: torch.device) -> Manifold:
    """A manifold on a device; one copy of it there for the whole process."""
    if manifold.values.device == device:
        return manifold
    key = (manifold.sha256, device)
    if key not in _placed:
        _placed[key] = manifold.to(device)
    return _placed[key]


class GhostError(RuntimeError):
    """A grid used in a way that its state does not allow."""


@dataclass(eq=False)
class _LookedAt:
    """Votes of a few rows at one time, int16 ``(n, in)``, and which rows of what these are."""

    votes: torch.Tensor
    rows: torch.Tensor | None = None
    places: torch.Tensor | None = None
    step: int = -1

    def is_of(self, rows: torch.Tensor, places: torch.Tensor, recording: bool) -> bool:
        """Whether these are the same rows."""
        if self.rows is rows:
            return True
        assert self.places is not None
        return not recording and torch.equal(self.places, places)


class GhostGrid(nn.Module):
    """One discrete weight matrix.

    Buffers:
        indices: int16 ``(out, in)``: the words; on a manifold with vote bits their low bits are the vote buffer.
        scale: float32 ``(out,)``, positive; never trained.
    While unlocked also ``state``, a :class:`ballots.VoteState`. ``uses`` is in how many places of the model the grid
    stands: 2 where head and embedding are tied. ``keeps`` says that its layer is computed twice (gradient
    checkpointing), where a card may keep dense weights from the second time to the backward pass. ``heat`` is a factor
    on this grid's learning rate, 1 unless a governor brakes it. Where the ballot listens, ``hearing`` says whether the
    votes of earlier steps agree with a fresh gradient (``agreement``), whether the votes that a gradient cast follow it
    (``followed``), whether the gradient of a step's last micro-batch agrees with the votes of the others, in which it
    had no say (``seconded``; where a step has one micro-batch, with the votes that the step before cast), and whether
    moves follow the votes that made them (``obeyed``).
    """

    indices: torch.Tensor
    scale: torch.Tensor

    def __init__(self, out_features: int, in_features: int, manifold: Manifold, ballot: Ballot | None = None) -> None:
        super().__init__()
        self.name = ""
        self.number = 0
        self.manifold = manifold
        self.ballot = ballot or Ballot(MomentumRule())
        self.register_buffer("indices", torch.zeros(out_features, in_features, dtype=torch.int16))
        self.register_buffer("scale", torch.ones(out_features, dtype=torch.float32))
        self.state: VoteState | None = None
        self.uses = 1
        self.keeps = False
        self.heat = 1.0
        self._looked_at: dict[int, _LookedAt] = {}
        self._later = False
        self._hearing: Hearing | None = None
        self._inverse_scale: torch.Tensor | None = None

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> GhostGrid:
        """Moves of the module, as ``nn.Module``'s, its votes with it; a cast of its floats (``half``,
        ``to(torch.bfloat16)``) is not for scales, which stay float32, bit for bit."""
        exact = self.scale
        super()._apply(fn, recurse)
        if self.scale.dtype != exact.dtype:
            self.scale = exact.to(self.scale.device)
        if self.scale.device != exact.device:
            self._looked_at.clear()
            if self.state is not None:
                self.state = self.state.on(self.scale.device)
        return self

    # -- the weight -------------------------------------------------------------------------------------------------

    @property
    def shape(self) -> tuple[int, int]:
        """``(out, in)``."""
        rows, columns = self.indices.shape
        return rows, columns

    @property
    def base_idx(self) -> torch.Tensor:
        """Coarse coordinate: the high byte of each index as uint8 ``(out, in)``, a view of the same storage."""
        return self.indices.view(torch.uint8)[:, 1::2]

    @property
    def fine_idx(self) -> torch.Tensor:
        """Fine coordinate: the low byte of each index as uint8 ``(out, in)``, a view of the same storage."""
        return self.indices.view(torch.uint8)[:, 0::2]

    def tables(self) -> Manifold:
        """The manifold on this grid's device; one copy per device and process."""
        device = self.indices.device
        if self.manifold.values.device != device:
            self.manifold = _on_device(self.manifold, device)
        return self.manifold

    def slices(self) -> Iterator[slice]:
        """Consecutive row ranges of at most ``SLICE_ELEMENTS`` weights."""
        rows, columns = self.shape
        step = max(1, SLICE_ELEMENTS // columns)
        for start in range(0, rows, step):
            yield slice(start, min(start + step, rows))

    @property
    def in_one_slice(self) -> bool:
        """Whether :meth:`slices` has one range only."""
        return len(self.indices) <= max(1, SLICE_ELEMENTS // self.indices.shape[1])

    def dequantize(self, rows: slice = slice(None), dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """Weights of a range of rows, ``(rows, in)``, computed in float32 and rounded once."""
        indices, scale = self.indices, self.scale
        if rows != slice(None) and rows != slice(0, len(scale)):
            indices, scale = indices[rows], scale[rows]
        fused = dtype if dtype == torch.bfloat16 else torch.float32
        weights = kernels.dequantize(indices, scale, self.tables(), backend=self.ballot.backend, dtype=fused)
        return weights if fused == dtype else weights.to(dtype)

    def lend(self, rows: slice, dtype: torch.dtype) -> torch.Tensor:
        """Weights as from :meth:`dequantize`, for one product: on the CPU they may lie in a buffer of this thread that
        the next call, of any grid, writes over. Fresh memory for each product costs more than it holds: the system
        has to find and clear its pages, and the caches have none of it."""
        indices = self.indices[rows]
        fits = indices.device.type == "cpu" and indices.numel() <= LENT_ELEMENTS
        if not fits or dtype not in (torch.float32, torch.bfloat16):
            return self.dequantize(rows, dtype)
        buffer: torch.Tensor | None = getattr(_lent, str(dtype), None)
        if buffer is None or buffer.numel() < indices.numel():
            buffer = torch.empty(indices.numel(), dtype=dtype)
            setattr(_lent, str(dtype), buffer)
        out = buffer[: indices.numel()].view(indices.shape)
        return kernels.dequantize(
            indices, self.scale[rows], self.tables(), out=out, backend=self.ballot.backend, dtype=dtype
        )

    def dequantize_rows(self, rows: torch.Tensor) -> torch.Tensor:
        """Weights of chosen rows: int64 ``(n,)`` to float32 ``(n, in)``."""
        return kernels.dequantize(self.indices[rows], self.scale[rows], self.tables(), backend=self.ballot.backend)

    @torch.no_grad()
    def import_weights(self, weights: torch.Tensor, headroom: float = HEADROOM) -> kernels.SnapReport:
        """Set scale and indices to the nearest entries of a dense matrix, float ``(out, in)``, finite."""
        if tuple(weights.shape) != self.shape:
            raise GhostError(f"weights have shape {tuple(weights.shape)}, expected {self.shape}")
        self.scale.copy_(kernels.row_scales(weights, headroom))
        self.scale_changed()
        parts = []
        for rows in self.slices():
            dense = weights[rows].to(torch.float32).contiguous()
            parts.append(kernels.snap(dense, self.scale[rows], self.tables(), out=self.indices[rows])[1])
        return kernels.SnapReport.total(parts)

    @torch.no_grad()
    def move_to(self, manifold: Manifold) -> kernels.SnapReport:
        """Snap the present weights to the nearest entries of another manifold; scales stay, the grid must be locked."""
        if self.state is not None:
            raise GhostError(f"{self.name or 'the grid'} is unlocked: its votes belong to the manifold {manifold.name}")
        parts = []
        target = _on_device(manifold, self.indices.device)
        for rows in self.slices():
            dense = self.dequantize(rows)
            parts.append(kernels.snap(dense, self.scale[rows], target, out=self.indices[rows])[1])
        self.manifold = target
        return kernels.SnapReport.total(parts)

    # -- voting -----------------------------------------------------------------------------------------------------

    @property
    def unlocked(self) -> bool:
        """Whether the grid has a vote buffer."""
        return self.state is not None

    @property
    def votes(self) -> torch.Tensor | None:
        """The votes, int8 or int16 ``(out, in)``, or None while locked; a copy where the words hold them."""
        if self.state is None:
            return None
        return self.tables().votes(self.indices) if self.state.votes is None else self.state.votes

    @property
    def waiting(self) -> bool:
        """Unlocked, but without the first observation that its yardstick needs."""
        return self.state is not None and self.state.observations == 0

    def unlock(self) -> None:
        """Allocate an empty vote buffer and row state; a grid that is already unlocked keeps its own.

        Raises:
            GhostError: the words hold votes beyond what a step begins with.
        """
        if self.state is None and self._open_empty().votes is None:
            self._check_carried()

    def _open_empty(self) -> VoteState:
        self.ballot.rule.check(self.tables(), 1, self.uses)
        self.state = self.ballot.rule.open_state(self.indices)
        return self.state

    def lock(self) -> None:
        """Drop the votes and the row state: nothing is hoarded behind a lock."""
        self._looked_at.clear()
        if self.state is not None and self.state.votes is None:
            self._empty_words()
        self.state = None

    def _empty_words(self) -> None:
        for rows in self.slices():
            self.indices[rows] = self.tables().levels(self.indices[rows]) << self.tables().vote_bits

    def forget_votes(self) -> None:
        """Empty the votes that words hold: those of an earlier run. The grid must be locked."""
        if self.state is not None:
            raise GhostError(f"{self.name or 'the grid'} is unlocked: its votes belong to the present run")
        if self.tables().vote_bits:
            self._empty_words()

    @property
    def anchor(self) -> torch.Tensor | None:
        """The state's anchor while a gradient is wanted, else None: nothing below needs visiting for this grid."""
        return self.state.anchor if self.state is not None and self.ballot.mode != "closed" else None

    def wants_gradient(self) -> bool:
        """Whether the running backward pass should compute this grid's weight gradient."""
        if self.state is None or self.ballot.mode == "closed":
            return False
        return self.ballot.mode == "probe" or self.waiting == (self.ballot.mode == "measure")

    def _open_state(self) -> VoteState:
        if self.state is None:
            raise GhostError(f"{self.name or 'the grid'} is locked: it has no votes")
        return self.state

    def scale_changed(self) -> None:
        """Forget what was computed from the scale."""
        self._inverse_scale = None

    def inverse_scale(self) -> torch.Tensor:
        """``2^20 / scale``, int64 ``(out,)``: what a move in units of the scale needs instead of a division."""
        if self._inverse_scale is None or self._inverse_scale.device != self.scale.device:
            self._inverse_scale = kernels.inverse_scales(self.scale)
        return self._inverse_scale

    def begin_step(self) -> None:
        """Forget what was found of the step before."""
        self._later = False
        self.hearing.begin()

    @property
    def hearing(self) -> Hearing:
        """What was found out since :meth:`begin_step`, kept on the grid's device."""
        if self._hearing is None or self._hearing.sums.device != self.indices.device:
            self._hearing = Hearing(self.indices.device)
        return self._hearing

    def shared(self, x: torch.Tensor) -> torch.Tensor:
        """``x`` ``(n, in)`` with each column scaled by its share, a power of two: what a product is given so that its
        gradient of this grid comes out scaled (``momentum_rules``)."""
        shares = self._open_state().shares
        return x if shares is None else x * shares.to(x.dtype)

    def accept(self, gradient: torch.Tensor, rows: torch.Tensor, use: int, part: int = 0) -> None:
        """Measure or vote with the gradient of some rows.

        Args:
            gradient: float ``(n, in)`` of one micro-batch, its columns :meth:`shared`; bfloat16 is read as it is.
            rows: int64 ``(n,)``, each row at most once.
            use: tells two uses of one grid (head and embedding) apart in the random draw.
            part: tells the slices of one use apart.

        Raises:
            GhostError: the grid is locked; or its votes of this use, part and micro-batch stand already.
        """
        ballot = self.ballot
        self._open_state()
        gradient = gradient.contiguous() if gradient.dtype == torch.bfloat16 else gradient.float().contiguous()
        # With marks the kernel itself looks while it casts: asking here would wait for the device at every product.
        marks = ballot.marks is not None and ballot.mode in ("cast", "retract")
        # One sum is the cheapest test: it is finite only if every element is.
        if not marks and not math.isfinite(gradient.sum().item()):
            ballot.non_finite.append(self.name)
        elif ballot.mode == "measure":
            ballot.rule.measure(self, gradient.float(), rows)
        elif ballot.mode == "cast":
            if (self.name, use, part) in ballot.standing:
                # A micro-batch has room for its own votes only: a second time they could wrap.
                raise GhostError(
                    "two forward passes voted in one micro-batch: call backward after each forward, or join them into "
                    "one batch"
                )
            first, last = ballot.micro_batch == 0, ballot.micro_batch == ballot.micro_batches - 1
            if ballot.listening and (first or last) and self.hearing.use in (None, use):
                self.hearing.use = use
                self._listen(gradient, rows, use, part, first, last)
            else:
                self._vote(gradient, rows, use, part, 1)
                self._later = True
        elif ballot.mode == "retract" and (self.name, use, part) in ballot.standing:
            self._vote(gradient, rows, use, part, -1)

    def _listen(self, gradient: torch.Tensor, rows: torch.Tensor, use: int, part: int, first: bool, last: bool) -> None:
        """Vote, and look at a few of the rows before and after it."""
        recorded = recording(gradient)
        chosen = _spread(len(rows), gradient.device)
        wanted, places = gradient[chosen].float(), rows[chosen]
        known: torch.Tensor | None = None
        if recorded and use == USE_EMBEDDING:
            # Rows of tokens that came before, see gather_rows.
            known = (places >= 0)[:, None]
            wanted, places = torch.where(known, wanted, 0.0), places.clamp(min=0)
        before = self._votes_of(places).int()
        if known is not None:
            before = before * known
        order, step = _shuffled(gradient.shape[1], gradient.device), self.ballot.step
        kept = self._looked_at.get(part)
        if last and kept is not None and kept.step == step - first and kept.is_of(rows, places, recorded):
            self.hearing.second(wanted, kept.votes if first else before - kept.votes, order)
        if first:
            self.hearing.agree(wanted, before, order)
        self._vote(gradient, rows, use, part, 1)
        if first:
            cast = self._votes_of(places).int() - before
            if known is not None:
                cast = cast * known
            self.hearing.follow(-wanted, cast)
            # For the last micro-batch: where the step began, or what it cast, where that one comes in the next step.
            self._keep(part, rows, places, cast if last else before)
        else:
            self._later = True

    def _keep(self, part: int, rows: torch.Tensor, places: torch.Tensor, votes: torch.Tensor) -> None:
        kept = self._looked_at.get(part)
        if kept is None or kept.votes.shape != votes.shape:
            kept = self._looked_at[part] = _LookedAt(torch.empty_like(votes, dtype=torch.int16))
        # In place: a recorded pass goes on writing here, and another reading.
        kept.votes.copy_(votes)
        kept.rows, kept.places, kept.step = rows, places, self.ballot.step

    def replayed(self, first: bool) -> None:
        """A recorded pass of the present micro-batch has done to this grid what :meth:`accept` does; ``first`` where it
        also looked at the first micro-batch of a step."""
        self.hearing.changed()
        self._later |= not first
        for kept in self._looked_at.values() if first else ():
            kept.step = self.ballot.step

    def looked_at(self, step: int) -> bool:
        """Whether the first micro-batch of a step has left what its last one is compared with."""
        return bool(self._looked_at) and all(kept.step == step for kept in self._looked_at.values())

    def ready_to_be_recorded(self, tokens: int) -> None:
        """Make every tensor that all passes share now: made while something is recorded, it would lie in memory that
        another recording writes over.

        Args:
            tokens: of a micro-batch: as many rows as an embedding's gradient then has.
        """
        device = self.indices.device
        _shuffled(self.shape[1], device)
        _spread(tokens, device)
        for rows in self.slices():
            _spread(rows.stop - rows.start, device)
            row_range(rows.start, rows.stop, device)

    @property
    def heard(self) -> bool:
        """Whether a gradient came by since :meth:`begin_step`: any in a later micro-batch, one that is not all zeros in
        the first."""
        return self._later or self.hearing.agreement.gradient_square > 0

    def _vote(self, gradient: torch.Tensor, rows: torch.Tensor, use: int, part: int, sign: int) -> None:
        ballot = self.ballot
        # Where memory runs out in the middle, nobody can say how much of the slice was cast.
        ballot.torn = True
        ballot.rule.cast(self, gradient, rows, use % self.uses, sign)
        ballot.torn = False
        (ballot.standing.add if sign > 0 else ballot.standing.discard)((self.name, use, part))

    def _votes_of(self, rows: torch.Tensor) -> torch.Tensor:
        """Votes of chosen rows, integers ``(n, in)``, a copy."""
        state = self._open_state()
        return self.tables().votes(self.indices[rows]) if state.votes is None else state.votes[rows]

    def mean_size(self) -> float:
        """Mean |weight| in units of the scale, over an evenly spaced sample of rows."""
        rows, columns = self.shape
        step = max(1, rows * columns // _SAMPLE)
        levels = self.tables().levels(self.indices[::step]).long().abs().clamp(max=self.tables().top)
        # Integers have one sum, whoever adds them up.
        return int(self.tables().fixed[levels].sum()) / 2.0**40 / levels.numel()

    def forget_measuring(self) -> None:
        """Drop what an interrupted measuring pass has found."""
        if self.waiting:
            for numbers in self._open_state().rows.values():
                numbers.zero_()

    def measure_anew(self) -> None:
        """Drop the first observation, of a micro-batch that turned out to be of no use; while nothing was voted."""
        if self.state is not None:
            self.state.observations, self.state.cached = 0, None
            self.forget_measuring()

    def finish_measuring(self) -> None:
        """Close a measuring pass: a tensor that saw any gradient has its first observation; one that met a non-finite
        gradient begins again."""
        state = self._open_state()
        if not self.waiting:
            return
        if self.name in self.ballot.non_finite:
            self.forget_measuring()
        elif bool((state.rows["r2"] > 0).any()):
            state.observations = 1

    def apply_votes(self, rate: float, shrink: int = 0) -> tuple[int, int, int]:
        """End a step: move the weights by their votes, with integers only, and renew what the next step's votes are
        measured by.

        Returns:
            (flips, travel, clipped) as :func:`ghost_kernels.apply_votes`.
        """
        self._open_state()
        if not self.waiting:
            self.ballot.rule.close_step(self)
        if not self.ballot.listening:
            return self.ballot.rule.apply(self, rate * self.heat, shrink)
        rows = _spread(len(self.indices), self.indices.device)
        votes, tables = self._votes_of(rows), self.tables()
        before = tables.levels(self.indices[rows]).int()
        result = self.ballot.rule.apply(self, rate * self.heat, shrink)
        moves = tables.levels(self.indices[rows]).int() - before
        self.hearing.obey(votes, moves)
        return result

    def vote_state(self) -> dict[str, torch.Tensor]:
        """Everything the rule needs to continue, by reference; empty while locked. Votes inside words are not in it."""
        if self.state is None:
            return {}
        state: dict[str, torch.Tensor] = {} if self.state.votes is None else {"votes": self.state.votes}
        state |= {**self.state.rows, **self.state.columns}
        return {**state, "observations": torch.tensor(self.state.observations, dtype=torch.int64)}

    def load_vote_state(self, state: dict[str, torch.Tensor]) -> None:
        """Restore :meth:`vote_state` (copied); an empty one locks the grid. One of before columns were measured begins
        to measure them.

        Raises:
            GhostError: the state is another rule's, or its votes are beyond what a step begins with.
        """
        if not state:
            self.lock()
            return
        # Votes inside words came with the words and stay.
        mine = self._open_empty()
        own = self.vote_state()
        # What has seen nothing yet is zeros, as in a state that is opened.
        state = {name: numbers for name, numbers in own.items() if name in mine.columns} | state
        for name in sorted(own.keys() | state.keys()):
            if name not in own or name not in state or own[name].dtype != state[name].dtype:
                raise GhostError(
                    f"the votes of {self.name or 'the grid'} are not those of rule {self.ballot.rule.name}: {name} is "
                    f"{state[name].dtype if name in state else 'missing'}, expected "
                    f"{own[name].dtype if name in own else 'none'}; continue with the rule that wrote them"
                )
        if mine.votes is not None:
            mine.votes.copy_(state["votes"])
        for name, numbers in {**mine.rows, **mine.columns}.items():
            numbers.copy_(state[name])
        self.ballot.rule.columns_changed(mine)
        mine.observations = int(state["observations"])
        self._check_carried()

    def _check_carried(self) -> None:
        """Between steps the votes leave the next step's own the room that they need: no sum is tested when it is cast.
        In the middle of a step, which its row sums show, there is less to ask of them."""
        state, rule = self._open_state(), self.ballot.rule
        if any(bool(state.rows[name].any()) for name in rule.row_sums):
            return
        for rows in self.slices():
            votes = self.tables().votes(self.indices[rows]) if state.votes is None else state.votes[rows]
            low, high = torch.aminmax(votes)
            if (most := max(-int(low), int(high))) > rule.carry:
                self.state = None
                raise GhostError(
                    f"the votes of {self.name or 'the grid'} reach {most}, rule {rule.name} ends a step with at most "
                    f"{rule.carry}: they are damaged, continue with another checkpoint"
                )

    def extra_repr(self) -> str:
        return f"{self.shape[0]}x{self.shape[1]}, {self.manifold.name}, {'unlocked' if self.unlocked else 'locked'}"


USE_LINEAR, USE_EMBEDDING = 0, 1
"""Tell the two uses of one grid apart in the random draw: a product, a lookup."""


# None of the three ever forgets: what is recorded on a card goes on reading these tensors.
@cache
def _spread(count: int, device: torch.device) -> torch.Tensor:
    """A few evenly spaced row numbers, int64; shared, not to be written to."""
    return torch.linspace(0, count - 1, min(count, _LISTEN_ROWS), device=device).long()


@cache
def _shuffled(count: int, device: torch.device) -> torch.Tensor:
    """A permutation, int64 ``(count,)``, the same everywhere; shared, not to be written to. The golden section spreads
    neighbours, and no generator has a state."""
    columns = torch.arange(count, device=device, dtype=torch.float64)
    return (columns * 0.6180339887498949 % 1).argsort()


@cache
def row_range(start: int, stop: int, device: torch.device) -> torch.Tensor:
    """Row numbers, int64; shared, not to be written to."""
    return torch.arange(start, stop, device=device)


def recording(tensor: torch.Tensor) -> bool:
    """Whether what is queued for a card is being recorded: then nothing runs, and nothing may wait for it."""
    return tensor.is_cuda and torch.cuda.is_current_stream_capturing()

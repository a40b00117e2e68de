"""Layers whose weights are grid indices, and the votes that move them.

A ``GhostGrid`` holds one weight matrix: int16 indices ``(out, in)`` into the manifold and a float32 scale per row;
weight = manifold[index] * scale[row]. ``GhostLinearTandem``, ``GhostEmbedding`` and ``ghost_cross_entropy`` are three
uses of a grid; a tied head is the same grid in two places, with one vote buffer.

Nothing dense outlives its use. The forward pass dequantizes a slice of rows, multiplies, drops it (on the CPU into one
small buffer for all grids); the backward pass dequantizes it again for the gradient of the input, and turns the slice's
weight gradient into integer votes at once.
Votes are cast in the backward pass only, so recomputing a forward pass (gradient checkpointing) never votes twice.

Who may vote is explicit: a grid votes while it is unlocked (its buffer exists) and its ``Ballot`` is open. Flags such
as ``requires_grad`` have no say over integers. Closed, the same modules are an ordinary frozen network, and a locked
grid costs no weight gradient; nothing below the lowest open grid is visited by the backward pass at all.

What votes mean and do is the vote rule's business (``vote_rules``); this module only brings gradients to it.
"""

from __future__ import annotations

import math
import threading
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import nn

import ghost_kernels as kernels
import ghost_kernels_cuda as cuda_kernels
import sliced_softmax
from manifolds import Manifold
from vote_evidence import Hearing
from vote_rules import Ballot, VoteState

HEADROOM = 1.25
"""A row's largest weight sits at 1/1.25 of its scale after import: it can grow by a quarter before it saturates."""
SLICE_ELEMENTS = 1 << 24
"""Weights dequantized at a time: 64 MiB of float32."""

LENT_ELEMENTS = 1 << 22
"""Most weights that are lent in a buffer that stays: 16 MiB of float32."""

KEPT_LOGITS = 1 << 27
"""Most bytes of logits that wait for their backward pass: in bfloat16, 512 tokens of a Qwen vocabulary are 148 MiB."""

_LISTEN_ROWS = 16
"""Rows of a slice, or of a grid, that are looked at while the ballot listens."""
_SAMPLE = 1 << 16
"""About how many weights an estimate of their mean size looks at."""
_lent = threading.local()
_placed: dict[tuple[str, torch.device], Manifold] = {}


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
    While unlocked also ``state``, a :class:`vote_rules.VoteState`. ``uses`` is in how many places of the model the grid
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
        self.ballot = ballot or Ballot()
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
            key = (self.manifold.sha256, device)
            if key not in _placed:
                _placed[key] = self.manifold.to(device)
            self.manifold = _placed[key]
        return self.manifold

    def slices(self) -> Iterator[slice]:
        """Consecutive row ranges of at most ``SLICE_ELEMENTS`` weights."""
        rows, columns = self.shape
        step = max(1, SLICE_ELEMENTS // columns)
        for start in range(0, rows, step):
            yield slice(start, min(start + step, rows))

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
        target = manifold.to(self.indices.device)
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
            for rows in self.slices():
                self.indices[rows] = self.tables().levels(self.indices[rows]) << self.tables().vote_bits
        self.state = None

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

    def accept(self, gradient: torch.Tensor, rows: torch.Tensor, use: int, part: int = 0) -> None:
        """Measure or vote with the gradient of some rows.

        Args:
            gradient: float ``(n, in)`` of one micro-batch; bfloat16 is read as it is.
            rows: int64 ``(n,)``, each row at most once.
            use: tells two uses of one grid (head and embedding) apart in the random draw.
            part: tells the slices of one use apart.
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
        recording = _recording(gradient)
        chosen = _spread(len(rows), gradient.device)
        wanted, places = gradient[chosen].float(), rows[chosen]
        known: torch.Tensor | None = None
        if recording and use == _USE_EMBEDDING:
            # Rows of tokens that came before, see gather_rows.
            known = (places >= 0)[:, None]
            wanted, places = torch.where(known, wanted, 0.0), places.clamp(min=0)
        before = self._votes_of(places).int()
        if known is not None:
            before = before * known
        order, step = _shuffled(gradient.shape[1], gradient.device), self.ballot.step
        kept = self._looked_at.get(part)
        if last and kept is not None and kept.step == step - first and kept.is_of(rows, places, recording):
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
            _row_range(rows.start, rows.stop, device)

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
        """Move the weights by their votes, with integers only.

        Returns:
            (flips, travel, clipped) as :func:`ghost_kernels.apply_votes`.
        """
        self._open_state()
        if not self.ballot.listening:
            return self.ballot.rule.apply(self, rate * self.heat, shrink)
        rows = _spread(len(self.indices), self.indices.device)
        votes, tables = self._votes_of(rows), self.tables()
        before = tables.levels(self.indices[rows]).int()
        result = self.ballot.rule.apply(self, rate * self.heat, shrink)
        moves = tables.levels(self.indices[rows]).int() - before
        self.hearing.obey(votes, moves)
        return result

    def update_yardstick(self) -> None:
        """Fold the step's row statistics into the running ones; the next step's votes are measured by them."""
        if self.state is not None and not self.waiting:
            self.ballot.rule.update(self)

    def vote_state(self) -> dict[str, torch.Tensor]:
        """Everything the rule needs to continue, by reference; empty while locked. Votes inside words are not in it."""
        if self.state is None:
            return {}
        state: dict[str, torch.Tensor] = {} if self.state.votes is None else {"votes": self.state.votes}
        return {**state, **self.state.rows, "observations": torch.tensor(self.state.observations, dtype=torch.int64)}

    def load_vote_state(self, state: dict[str, torch.Tensor]) -> None:
        """Restore :meth:`vote_state` (copied); an empty one locks the grid.

        Raises:
            GhostError: the state is another rule's, or its votes are beyond what a step begins with.
        """
        if not state:
            self.lock()
            return
        # Votes inside words came with the words and stay.
        mine = self._open_empty()
        own = self.vote_state()
        for name in sorted(own.keys() | state.keys()):
            if name not in own or name not in state or own[name].dtype != state[name].dtype:
                raise GhostError(
                    f"the votes of {self.name or 'the grid'} are not those of rule {self.ballot.rule.name}: {name} is "
                    f"{state[name].dtype if name in state else 'missing'}, expected "
                    f"{own[name].dtype if name in own else 'none'}; continue with the rule that wrote them"
                )
        if mine.votes is not None:
            mine.votes.copy_(state["votes"])
        for name, numbers in mine.rows.items():
            numbers.copy_(state[name])
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


_USE_LINEAR, _USE_EMBEDDING = 0, 1


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
def _row_range(start: int, stop: int, device: torch.device) -> torch.Tensor:
    """Row numbers, int64; shared, not to be written to."""
    return torch.arange(start, stop, device=device)


class _KeepFunction(torch.autograd.Function):
    """Saves the input of a product for its votes, and on a card its dense weights, before the product is computed.

    Gradient checkpointing ends a recomputation at the last tensor that the first pass saved, and what a Function saves
    counts only when its forward is done. Saved by the product itself, every layer's last product would be computed
    once more for nothing: with a wide MLP a sixteenth of a step's products.

    Under checkpointing nothing that is saved outlives the first pass; what the second pass saves waits for the backward
    pass of its own layer only. So a card dequantizes twice instead of three times, for a layer's weights in memory.
    """

    @staticmethod
    def forward(ctx, anchor: torch.Tensor, x: torch.Tensor, weights: torch.Tensor | None, contexts: list):
        ctx.save_for_backward(x, weights)
        contexts.append(ctx)
        return anchor.detach()

    @staticmethod
    def backward(ctx, gradient: torch.Tensor):
        return None, None, None, None


class _LinearFunction(torch.autograd.Function):
    """``x @ W.T`` over a grid, row slice by row slice; the backward casts votes.

    ``keeper`` is the context of the :class:`_KeepFunction` that holds ``x``, None where no gradient is wanted;
    ``weights`` are all of the grid's where these are kept, else None.
    """

    @staticmethod
    def forward(
        ctx, x: torch.Tensor, anchor: torch.Tensor | None, weights: torch.Tensor | None, keeper: Any, grid: GhostGrid
    ) -> torch.Tensor:
        ctx.grid, ctx.keeper, ctx.shape = grid, keeper, x.shape
        flat = x.reshape(-1, x.shape[-1])
        parts = list(grid.slices())
        if len(parts) == 1:
            out = flat @ (grid.lend(parts[0], x.dtype) if weights is None else weights).T
        else:
            out = flat.new_empty(len(flat), grid.shape[0])
            for rows in parts:
                out[:, rows] = flat @ grid.lend(rows, x.dtype).T
        return out.view(*x.shape[:-1], grid.shape[0])

    @staticmethod
    def backward(ctx, gradient: torch.Tensor):
        grid: GhostGrid = ctx.grid
        gradient = gradient.reshape(-1, grid.shape[0])
        votes = ctx.keeper is not None and grid.wants_gradient()
        flat = weights = below = None
        if votes:
            flat, weights = ctx.keeper.saved_tensors
            flat = flat.reshape(-1, grid.shape[1])
        for k, rows in enumerate(grid.slices()):
            part = gradient[:, rows]
            if ctx.needs_input_grad[0]:
                product = part @ (grid.lend(rows, gradient.dtype) if weights is None else weights)
                below = product if below is None else below.add_(product)
            if flat is not None:
                grid.accept(part.T @ flat, _row_range(rows.start, rows.stop, flat.device), _USE_LINEAR, k)
        return None if below is None else below.view(ctx.shape), None, None, None, None


def _linear(x: torch.Tensor, grid: GhostGrid) -> torch.Tensor:
    """``x @ W.T`` of a grid, float ``(..., in)`` to ``(..., out)``; its backward casts votes."""
    anchor = grid.anchor if torch.is_grad_enabled() else None
    contexts: list[Any] = []
    weights = None
    if anchor is not None:
        if grid.keeps and x.is_cuda and grid.indices.numel() <= SLICE_ELEMENTS:
            weights = grid.dequantize(dtype=x.dtype)
        anchor = _KeepFunction.apply(anchor, x.detach(), weights, contexts)
    return _LinearFunction.apply(x, anchor, weights, contexts[0] if contexts else None, grid)


class _EmbeddingFunction(torch.autograd.Function):
    """Rows of a grid by token id; the backward casts votes for the rows that occurred."""

    @staticmethod
    def forward(ctx, ids: torch.Tensor, anchor: torch.Tensor | None, grid: GhostGrid) -> torch.Tensor:
        # While passes are recorded nothing can be asked; whoever records looks at the ids first.
        if not _recording(ids) and ids.numel() and int(ids.min()) < 0:
            raise IndexError(f"token id {int(ids.min())} is negative, expected 0 to {grid.shape[0] - 1}")
        ctx.grid = grid
        ctx.save_for_backward(ids)
        return grid.dequantize_rows(ids.reshape(-1)).view(*ids.shape, grid.shape[1])

    @staticmethod
    def backward(ctx, gradient: torch.Tensor):
        (ids,) = ctx.saved_tensors
        grid: GhostGrid = ctx.grid
        if grid.wants_gradient():
            flat = gradient.reshape(-1, grid.shape[1]).float()
            if kernels.backend_for(flat.device, grid.ballot.backend) == "cuda":
                summed, rows = cuda_kernels.gather_rows(flat.contiguous(), ids.reshape(-1))
                if not _recording(ids):
                    summed, rows = summed[rows >= 0], rows[rows >= 0]
            else:
                rows, place = torch.unique(ids, return_inverse=True)
                summed = torch.zeros(len(rows), grid.shape[1], device=gradient.device)
                summed.index_add_(0, place.reshape(-1), flat)
            grid.accept(summed, rows, _USE_EMBEDDING)
        return None, None, None


class _CrossEntropyFunction(torch.autograd.Function):
    """Summed cross-entropy of ``x @ W.T`` against targets, by slices of the vocabulary; logits never exist whole.

    Forward keeps a running maximum and sum (online softmax, Milakov and Gimelshein 2018); backward computes each
    slice's logits again. One extra product of the head buys the memory of logits, their gradient and the dense head.
    Up to ``KEPT_LOGITS`` bytes of them are kept instead: backward comes next, and gives each slice back as it goes.
    """

    @staticmethod
    def forward(ctx, x: torch.Tensor, targets: torch.Tensor, anchor: torch.Tensor | None, grid: GhostGrid):
        ctx.grid = grid
        top = x.new_full((len(x),), -math.inf, dtype=torch.float32)
        total = torch.zeros_like(top)
        picked = torch.zeros_like(top)
        ctx.logits = {}
        left = KEPT_LOGITS if any(ctx.needs_input_grad) else 0
        for k, rows in enumerate(grid.slices()):
            logits = x @ grid.lend(rows, x.dtype).T
            if (size := logits.numel() * logits.element_size()) <= left:
                ctx.logits[k], left = logits, left - size
            sliced_softmax.observe(logits, targets, rows.start, top, total, picked)
        norm = top + total.log()
        ctx.save_for_backward(x, targets, norm)
        return torch.where(targets < 0, 0.0, norm - picked).sum()

    @staticmethod
    def backward(ctx, gradient: torch.Tensor):
        x, targets, norm = ctx.saved_tensors
        grid: GhostGrid = ctx.grid
        votes = grid.wants_gradient()
        below = torch.zeros_like(x) if ctx.needs_input_grad[0] else None
        for k, rows in enumerate(grid.slices()):
            weights = grid.lend(rows, x.dtype)
            # A second pass over the same graph must find no logits that the first has changed.
            kept = ctx.logits.pop(k, None)
            logits = x @ weights.T if kept is None else kept
            del kept
            part = sliced_softmax.turn_into_gradient(logits, targets, rows.start, norm, gradient)
            del logits
            if below is not None:
                below.addmm_(part, weights)
            del weights
            if votes:
                grid.accept(part.T @ x, _row_range(rows.start, rows.stop, x.device), _USE_LINEAR, k)
        return below, None, None, None


def _recording(tensor: torch.Tensor) -> bool:
    """Whether what is queued for a card is being recorded: then nothing runs, and nothing may wait for it."""
    return tensor.is_cuda and torch.cuda.is_current_stream_capturing()


def _autocast(x: torch.Tensor) -> torch.Tensor:
    """``x`` in the dtype that an enclosing autocast region asks for."""
    kind = x.device.type
    return x.to(torch.get_autocast_dtype(kind)) if torch.is_autocast_enabled(kind) else x


def ghost_cross_entropy(hidden: torch.Tensor, targets: torch.Tensor, grid: GhostGrid) -> torch.Tensor:
    """Summed cross-entropy in nats of a bias-free head, without its logits or its dense weights.

    Args:
        hidden: float ``(tokens, in)``.
        targets: int64 ``(tokens,)``, each in [0, out), or below 0: a token that counts nothing.
        grid: the head.

    Returns:
        float32 scalar; differentiable in ``hidden``; its backward casts the head's votes.
    """
    return _CrossEntropyFunction.apply(_autocast(hidden), targets, grid.anchor, grid)


class GhostLinearTandem(nn.Module):
    """``nn.Linear`` over a grid: ``y = x W^T + bias``, with W ``(out, in)`` discrete and the bias float32."""

    def __init__(self, grid: GhostGrid, bias: bool = False) -> None:
        super().__init__()
        self.grid = grid
        self.out_features, self.in_features = grid.shape
        device = grid.indices.device
        self.bias = nn.Parameter(torch.zeros(self.out_features, device=device)) if bias else None

    @property
    def base_idx(self) -> torch.Tensor:
        """Coarse tandem coordinate, uint8 ``(out, in)``, a view."""
        return self.grid.base_idx

    @property
    def fine_idx(self) -> torch.Tensor:
        """Fine tandem coordinate, uint8 ``(out, in)``, a view."""
        return self.grid.fine_idx

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = _linear(_autocast(x), self.grid)
        return y if self.bias is None else y + self.bias.to(y.dtype)


class GhostEmbedding(nn.Module):
    """``nn.Embedding`` over a grid: token ids to float32 rows ``(..., in)``.

    ``heard`` off, its gradient is not asked for and casts no votes, and the backward pass need not come down to it.
    """

    def __init__(self, grid: GhostGrid) -> None:
        super().__init__()
        self.grid = grid
        self.heard = True
        self.num_embeddings, self.embedding_dim = grid.shape

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return _EmbeddingFunction.apply(ids, self.grid.anchor if self.heard else None, self.grid)


def grids_of(model: nn.Module) -> dict[str, GhostGrid]:
    """Every grid once, by the name under which the model first mentions it (a tied head is the embedding's grid)."""
    return {name: m for name, m in model.named_modules() if isinstance(m, GhostGrid)}


def name_grids(model: nn.Module, ballot: Ballot) -> None:
    """Tell every grid its name and in how many places it stands, and give all of them one ballot."""
    places = Counter(id(m) for _, m in model.named_modules(remove_duplicate=False) if isinstance(m, GhostGrid))
    grids = grids_of(model)
    for number, (name, grid) in enumerate(grids.items()):
        grid.name, grid.number = name, number
        grid.uses = places[id(grid)]
        grid.ballot = ballot


@dataclass(frozen=True)
class Movement:
    """What one step did to a grid.

    Attributes:
        weights: how many it has.
        flips: how many changed their index.
        mean_travel: how far these were sent, in units of their scale.
        clipped: how many were stopped by the edge of their row's range.
        mean_size: mean |weight| in units of the scale.
    """

    weights: int
    flips: int
    mean_travel: float
    clipped: int = 0
    mean_size: float = 0.0

    @property
    def travel(self) -> float:
        """Mean |change| of all weights, in units of the scale."""
        return self.flips * self.mean_travel / self.weights

    @property
    def relative(self) -> float:
        """Mean |change| over mean |weight|."""
        return self.travel / self.mean_size if self.mean_size > 0 else 0.0

    @property
    def flip_rate(self) -> float:
        """Share of weights that changed their index."""
        return self.flips / self.weights


def apply_votes(grids: dict[str, GhostGrid], rate: float, weight_decay: float = 0.0) -> dict[str, Movement]:
    """End a step: apply the votes of every unlocked grid and renew their yardsticks.

    Args:
        rate: learning rate, in units of weight.
        weight_decay: as AdamW's: every weight loses ``rate * weight_decay`` of itself (arXiv 1711.05101).
    """
    shrink = round(rate * weight_decay * 2**32)
    moved = {}
    for name, grid in grids.items():
        if grid.unlocked:
            flips, travel, clipped = grid.apply_votes(rate, shrink)
            grid.update_yardstick()
            travel_each = travel / 2.0**40 / max(flips, 1)
            moved[name] = Movement(grid.indices.numel(), flips, travel_each, clipped, grid.mean_size())
    return moved

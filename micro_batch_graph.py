"""A micro-batch recorded once and replayed: on a fast card its thousands of launches take longer than its arithmetic.

A forward and backward pass with votes is some ten thousand operations, each queued by Python in microseconds and done
by an H100 in fewer. A CUDA graph holds them as one object that the driver replays. What a micro-batch depends on lies
in memory that keeps its place: the tokens; per grid the keys, slot and sign of its draws (``Ballot.controls``) and its
yardstick; votes, indices and row sums, which are where they always are; the gradients of norms and biases, which add
up from one micro-batch to the next, and a copy of what they were before, in case it must be undone. What it leaves is
the loss and the marks of gradients that were not finite.

The positions of the answers change with the text, so the head here sees all positions, and those without an answer
count nothing: more work for the head, no waiting. Where documents begin is a list of fixed length; a row of more
documents than fit is not recorded. Passes that are not recorded (the first with its layers, after a resume, where
memory is short) compute the same products in the same shapes, so a run's bits do not depend on what was recorded.

Where a watch listens, the first and the last micro-batch of a step also look at their votes and are recordings of their
own; all share one memory. A recording is of one set of open layers, one shape and one number of micro-batches:
``forget`` it when they change.

Rejected: recording the steps' ends as well (once in 32 micro-batches, and full of decisions).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, cast

import torch
from transformers import PreTrainedModel

from ballots import Ballot, cast_keys
from ghost_core import GhostLinearTandem, ghost_cross_entropy
from ghost_grid import GhostGrid
from momentum_rules import MomentumRule
from packed_attention import Starts, document_lengths, serves, starts_of
from packed_batches import Batch
from prime_device import is_out_of_memory

CAPABILITY = (8, 0)
"""From which compute capability on a recording pays: older cards take longer to compute than Python to ask."""
TOKENS_OF_A_DOCUMENT = 16
"""Room for documents in a row, as if none were shorter on average."""


class Outcome(NamedTuple):
    """What a replayed micro-batch left: the summed loss, and the numbers of grids with gradients that were not finite;
    -1 stands for norms and biases."""

    nats: float
    marked: list[int]


class Arranged(NamedTuple):
    """A micro-batch in shapes that do not depend on what it says.

    Attributes:
        rows: int64 ``(3, batch, tokens)``: tokens; what each position is to say, -100 where nothing; positions.
        edges: int32 ``(room + 1,)``, see ``packed_attention.Starts``.
    """

    rows: torch.Tensor
    edges: torch.Tensor


def room_for_documents(batch: Batch) -> int:
    """How many documents a micro-batch of this size may have to be arranged."""
    return max(1, batch.input_ids.numel() // TOKENS_OF_A_DOCUMENT)


def arranged(batch: Batch) -> Arranged | None:
    """A batch on the CPU, arranged; None where it has more documents than there is room for."""
    room = room_for_documents(batch)
    edges = starts_of(document_lengths(batch.position_ids), room)
    if len(edges) > room + 1:
        return None
    if (lowest := int(batch.input_ids.min())) < 0:
        # On the card nobody would ask.
        raise IndexError(f"token id {lowest} is negative, expected at least 0")
    # Labels are moved up to the position that is to say them; the last one says nothing.
    targets = torch.nn.functional.pad(batch.labels[:, 1:], (0, 1), value=-100)
    return Arranged(torch.stack([batch.input_ids, targets, batch.position_ids]), torch.tensor(edges, dtype=torch.int32))


def arranged_loss(model: PreTrainedModel, micro_batch: Arranged) -> torch.Tensor:
    """``answer_loss`` of an arranged micro-batch on the model's device, without a question to it: the head sees all
    positions, and those without an answer count nothing. The same bits whether it is recorded or not."""
    ids, targets, positions = micro_batch.rows
    hidden = model.model(
        input_ids=ids,
        position_ids=positions,
        use_cache=False,
        attention_mask={"full_attention": None},
        documents=Starts(micro_batch.edges, ids.shape[1]),
    )
    head = cast(GhostLinearTandem, model.get_output_embeddings())
    return ghost_cross_entropy(hidden.last_hidden_state.flatten(0, 1), targets.flatten(), head.grid)


class _Memory:
    """What lies where a recording expects it: inputs, what must be remembered, and what is left."""

    def __init__(self, example: Arranged, grids: Sequence[GhostGrid], voting: Sequence[GhostGrid]) -> None:
        device = grids[0].indices.device
        self.shape = example.rows.shape[1:]
        uses = max(grid.uses for grid in grids)
        controls = torch.zeros(len(grids), uses, 4, dtype=torch.int32)
        self.host = tuple(torch.empty_like(t).pin_memory() for t in (*example, controls))
        rows, edges, self.controls = (t.to(device) for t in (*example, controls))
        self.micro_batch = Arranged(rows, edges)
        self.weight = torch.zeros((), device=device)
        # The loss, then the marks: of norms and biases, and of every grid.
        self.left = torch.zeros(2 + len(grids), dtype=torch.float64, device=device)
        self.voting = list(voting)
        self.yardsticks = [_rule(grid).yardstick(grid)[0].clone() for grid in voting]

    def write(self, micro_batch: Arranged, k: int, weight: float, sign: int) -> None:
        """Put a micro-batch where the recording reads it."""
        rows, edges, controls = self.host
        rows.copy_(micro_batch.rows)
        edges.copy_(micro_batch.edges)
        table = controls.numpy().view("uint32")
        for grid in self.voting:
            units = _rule(grid).units(grid)
            for use in range(grid.uses):
                table[grid.number, use] = (*cast_keys(grid), units.offset(k * grid.uses + use), sign & 0xFFFFFFFF)
        for here, there in zip(self.host, (*self.micro_batch, self.controls), strict=True):
            there.copy_(here, non_blocking=True)
        self.weight.fill_(weight)

    def write_yardsticks(self) -> None:
        """Put the step's yardsticks where the recording reads them."""
        _copy(self.yardsticks, [_rule(grid).yardstick(grid)[0] for grid in self.voting])


def _copy(there: list[torch.Tensor], here: list[torch.Tensor]) -> None:
    # torch's own refuses lists of nothing.
    if there:
        torch._foreach_copy_(there, here)


def _rule(grid: GhostGrid) -> MomentumRule:
    return cast(MomentumRule, grid.ballot.rule)


class MicroBatchGraph:
    """The recordings of a model's micro-batches. Owns their inputs; mutates votes, row sums and float gradients.

    Args:
        floats: the parameters that are trained as floats; their ``grad`` tensors keep their place while something is
            recorded.
        stream: where the trainer's work is queued; what is recorded is recorded and replayed there.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        ballot: Ballot,
        grids: Mapping[str, GhostGrid],
        floats: Mapping[str, torch.nn.Parameter],
        compute: str,
        stream: torch.cuda.Stream,
    ) -> None:
        self.model, self.ballot, self.floats, self.compute, self.stream = model, ballot, floats, compute, stream
        self.grids = list(grids.values())
        self._graphs: dict[str, torch.cuda.CUDAGraph] = {}
        self._memory: _Memory | None = None
        self._gradients: list[torch.Tensor] = []
        self._saved: list[torch.Tensor] = []
        self._step = -1

    @staticmethod
    def serves(model: PreTrainedModel, ballot: Ballot, device: torch.device) -> bool:
        """Whether micro-batches of this model, rule and device can be recorded: nothing in them asks the card, and
        nothing draws but votes."""
        config: Any = model.config
        rotation = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
        asks = rotation.get("rope_type", "default") in ("dynamic", "longrope")
        draws = getattr(config, "attention_dropout", 0.0) > 0
        able = ballot.marks is not None and ballot.rule.recordable and serves(model)
        return device.type == "cuda" and able and not asks and not draws

    @staticmethod
    def pays(device: torch.device) -> bool:
        """Whether recording makes a step faster on this card."""
        return torch.cuda.get_device_capability(device) >= CAPABILITY

    @property
    def recorded(self) -> bool:
        """Whether there is a recording; it holds memory."""
        return bool(self._graphs)

    def forget(self) -> None:
        """Drop the recording and its memory."""
        if self._graphs:
            torch.cuda.synchronize(self.grids[0].indices.device)
        self._graphs, self._memory, self._gradients, self._saved = {}, None, [], []

    def _voters(self) -> list[GhostGrid]:
        return [grid for grid in self.grids if grid.unlocked and not grid.waiting]

    def fits(self, batch: Batch) -> bool:
        """Whether a micro-batch has the shape of what is recorded, if anything is, and can be arranged, and somebody
        votes."""
        if not any(grid.unlocked and not grid.waiting for grid in self.grids):
            return False
        documents = sum(map(len, document_lengths(batch.position_ids)))
        same = self._memory is None or batch.input_ids.shape == self._memory.shape
        return same and documents <= room_for_documents(batch)

    def _passes(self, memory: _Memory) -> None:
        """Forward and backward pass from the inputs to what is left."""
        _copy(self._saved, self._gradients)
        with torch.autocast("cuda", torch.bfloat16, enabled=self.compute == "bfloat16", cache_enabled=False):
            loss = arranged_loss(self.model, memory.micro_batch)
        (loss * memory.weight).backward()
        marks = cast(torch.Tensor, self.ballot.marks)
        memory.left[0].copy_(loss.detach())
        if self._gradients:
            largest = torch.stack(torch._foreach_norm(self._gradients, float("inf")))
            memory.left[1].copy_(~torch.isfinite(largest).all())
        memory.left[2:].copy_(marks)
        marks.zero_()

    def _prepare(self, example: Arranged) -> _Memory:
        memory = _Memory(example, self.grids, self._voters())
        for grid in memory.voting:
            grid.ready_to_be_recorded(example.rows[0].numel())
        for parameter in self.floats.values():
            if parameter.requires_grad and parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        self._gradients = [cast(torch.Tensor, p.grad) for p in self.floats.values() if p.grad is not None]
        self._saved = [torch.empty_like(g) for g in self._gradients]
        self._step = -1
        return memory

    def _kind(self) -> str:
        """Which recording serves the ballot's micro-batch: where the watch listens, that is recorded too."""
        first, last = self.ballot.micro_batch == 0, self.ballot.micro_batch == self.ballot.micro_batches - 1
        if not self.ballot.listening:
            return "plain"
        if last and not all(grid.looked_at(self.ballot.step - first) for grid in self._voters()):
            # The step's first micro-batch was no number: there is nothing to compare with.
            return "first" if first else "plain"
        return "first and last" if first and last else "first" if first else "last" if last else "plain"

    def _record(self, memory: _Memory) -> torch.cuda.CUDAGraph:
        for grid, yardstick in zip(memory.voting, memory.yardsticks, strict=True):
            # What is recorded reads the yardstick where it will be written.
            _, gains = _rule(grid).yardstick(grid)
            assert grid.state is not None and grid.state.cached is not None
            grid.state.cached = (grid.state.cached[0], (yardstick, gains))
        standing = set(self.ballot.standing)
        graph = torch.cuda.CUDAGraph()
        self.ballot.controls = memory.controls
        try:
            pool = next((other.pool() for other in self._graphs.values()), None)
            with torch.cuda.graph(graph, pool=pool, stream=self.stream):
                self._passes(memory)
        except RuntimeError as error:
            # Ending a recording that memory has broken off may fail in its turn, and would hide why.
            cause = error.__context__
            if isinstance(cause, Exception) and is_out_of_memory(cause):
                raise cause from None
            raise
        finally:
            self.ballot.controls, self.ballot.torn, self.ballot.standing = None, False, standing
            for grid in memory.voting:
                assert grid.state is not None
                grid.state.cached = None
        return graph

    def run(self, batch: Batch, k: int, weight: float, sign: int = 1) -> Outcome:
        """Cast the votes of micro-batch ``k``, or with ``sign`` -1 take those of the same micro-batch back, unwatched;
        the ballot is open for it. Records first, where nothing of the kind is recorded.

        Raises:
            torch.OutOfMemoryError: while recording; then nothing was cast.
        """
        if self._memory is not None and self._step != self.ballot.step and self._voters() != self._memory.voting:
            self.forget()
        micro_batch = arranged(batch)
        assert micro_batch is not None, "fits() refuses a batch of more documents"
        memory = self._memory or self._prepare(micro_batch)
        kind = self._kind() if sign > 0 else "plain"
        if kind not in self._graphs:
            listening, self.ballot.listening = self.ballot.listening, self.ballot.listening and kind != "plain"
            try:
                self._graphs[kind] = self._record(memory)
            finally:
                self.ballot.listening = listening
        self._memory = memory
        memory.write(micro_batch, k, weight, sign)
        if self._step != self.ballot.step:
            memory.write_yardsticks()
            self._step = self.ballot.step
        self._graphs[kind].replay()
        for grid in memory.voting if sign > 0 else ():
            grid.replayed(first=kind.startswith("first"))
        nats, *marks = memory.left.tolist()
        return Outcome(nats, [number - 1 for number, mark in enumerate(marks) if mark])

    def undo(self, batch: Batch, k: int, weight: float) -> None:
        """Take back everything that the last replay has left, by replaying it with the other sign."""
        before = [saved.clone() for saved in self._saved]
        self.run(batch, k, weight, sign=-1)
        _copy(self._gradients, before)

    def clear_gradients(self) -> None:
        """Begin the gradients of norms and biases anew, where they are."""
        if self._gradients:
            torch._foreach_zero_(self._gradients)

"""A micro-batch recorded once and replayed: on a fast card its thousands of launches take longer than its arithmetic.

A forward and backward pass with votes is some ten thousand operations, each queued by Python in microseconds and done
by an H100 in fewer. A CUDA graph holds them as one object that the driver replays. What a micro-batch depends on lies
in memory that keeps its place: the tokens; per grid the keys, slot and sign of its draws (``Ballot.controls``) and its
yardstick; votes, indices and row sums, which are where they always are; the gradients of norms and biases, which add
up from one micro-batch to the next, and a copy of what they were before, in case it must be undone. What it leaves is
the loss and the marks of gradients that were not finite.

The positions of the answers change with the text, so the head here sees all positions, and those without an answer
count nothing: more work for the head, no waiting. Documents are kept apart by a mask that is made of the positions; a
row of one document goes without. That makes two graphs; they share their memory.

A graph is of one set of open layers, one shape and one number of micro-batches: ``forget`` it when they change.

Rejected: recording the steps' ends as well (once in 32 micro-batches, and full of decisions).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple, cast

import torch
from transformers import PreTrainedModel

from ghost_core import GhostGrid, ghost_cross_entropy
from packed_attention import document_lengths
from packed_batches import Batch
from vote_rules import Ballot, MomentumRule, cast_keys

CAPABILITY = (8, 0)
"""From which compute capability on a recording pays: older cards take longer to compute than Python to ask."""


class Outcome(NamedTuple):
    """What a replayed micro-batch left: the summed loss, and the numbers of grids with gradients that were not finite;
    -1 stands for norms and biases."""

    nats: float
    marked: list[int]


class MicroBatchGraph:
    """Recordings of a model's micro-batches. Owns their inputs; mutates votes, row sums and float gradients.

    Args:
        floats: the parameters that are trained as floats; their ``grad`` tensors keep their place from the first
            recording on.
        stream: where the trainer's work is queued; recordings are made and replayed there.
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
        self.device = self.grids[0].indices.device
        self._graphs: dict[bool, torch.cuda.CUDAGraph] = {}
        self._pool: Any = None
        self._step = -1

    @staticmethod
    def serves(model: PreTrainedModel, ballot: Ballot, device: torch.device) -> bool:
        """Whether micro-batches of this model, rule and device can be recorded."""
        kinds = set(getattr(model.config, "layer_types", None) or ["full_attention"])
        return (
            device.type == "cuda"
            and ballot.marks is not None
            and ballot.rule.recordable
            and kinds == {"full_attention"}
        )

    @staticmethod
    def pays(device: torch.device) -> bool:
        """Whether recording makes a step faster on this card."""
        return torch.cuda.get_device_capability(device) >= CAPABILITY

    def forget(self) -> None:
        """Drop the recordings and their memory."""
        if self._graphs:
            torch.cuda.synchronize(self.device)
        self._graphs.clear()
        self._pool = None
        self._saved: list[torch.Tensor] = []
        self._gradients: list[torch.Tensor] = []

    def fits(self, batch: Batch) -> bool:
        """Whether a micro-batch has the shape of what is recorded, if anything is."""
        return not self._graphs or tuple(batch.input_ids.shape) == self._shape

    def _voters(self) -> list[GhostGrid]:
        return [grid for grid in self.grids if grid.unlocked and not grid.waiting]

    @property
    def recorded(self) -> bool:
        """Whether there is a recording that holds memory."""
        return bool(self._graphs)

    # -- what is written before a replay -------------------------------------------------------------------------------

    def _prepare(self, batch: Batch) -> None:
        """Allocate what all recordings share."""
        shape = tuple(batch.input_ids.shape)
        uses = max(grid.uses for grid in self.grids)
        self._inputs = torch.zeros(3, *shape, dtype=torch.int64, device=self.device)
        self._inputs_host = torch.zeros(3, *shape, dtype=torch.int64).pin_memory()
        self._controls = torch.zeros(len(self.grids), uses, 4, dtype=torch.int32, device=self.device)
        self._controls_host = torch.zeros(len(self.grids), uses, 4, dtype=torch.int32).pin_memory()
        self._weight = torch.zeros((), device=self.device)
        # The loss, then the marks: of norms and biases, and of every grid.
        self._left = torch.zeros(2 + len(self.grids), dtype=torch.float64, device=self.device)
        self._voting = self._voters()
        self._shape, self._step = shape, -1
        rule = cast(MomentumRule, self.ballot.rule)
        self._yardsticks = [rule.yardstick(grid)[0].clone() for grid in self._voting]
        for parameter in self.floats.values():
            if parameter.requires_grad and parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        self._gradients = [cast(torch.Tensor, p.grad) for p in self.floats.values() if p.grad is not None]
        self._saved = [torch.empty_like(g) for g in self._gradients]

    def _write(self, batch: Batch, k: int, weight: float, sign: int) -> None:
        ballot, rule = self.ballot, cast(MomentumRule, self.ballot.rule)
        # Labels are moved up to the position that is to say them; the last one says nothing.
        self._inputs_host[0].copy_(batch.input_ids)
        self._inputs_host[1, :, :-1].copy_(batch.labels[:, 1:])
        self._inputs_host[1, :, -1].fill_(-100)
        self._inputs_host[2].copy_(batch.position_ids)
        table = self._controls_host.numpy().view("uint32")
        for grid in self._voting:
            units = rule.units(grid)
            for use in range(grid.uses):
                table[grid.number, use] = (*cast_keys(grid), units.offset(k * grid.uses + use), sign & 0xFFFFFFFF)
        self._inputs.copy_(self._inputs_host, non_blocking=True)
        self._controls.copy_(self._controls_host, non_blocking=True)
        self._weight.fill_(weight)
        if self._step != ballot.step:
            torch._foreach_copy_(self._yardsticks, [rule.yardstick(grid)[0] for grid in self._voting])
            self._step = ballot.step

    # -- recording -----------------------------------------------------------------------------------------------------

    def _passes(self, masked: bool) -> None:
        """Forward and backward pass from the inputs to what is left."""
        ids, targets, positions = self._inputs
        torch._foreach_copy_(self._saved, self._gradients)
        mask = None
        if masked:
            jumps = torch.nn.functional.pad(torch.diff(positions) != 1, (1, 0))
            document = jumps.cumsum(1)
            tokens = ids.shape[1]
            causal = torch.ones(tokens, tokens, dtype=torch.bool, device=self.device).tril()
            mask = (document[:, None, :, None] == document[:, None, None, :]) & causal
        with torch.autocast("cuda", torch.bfloat16, enabled=self.compute == "bfloat16", cache_enabled=False):
            hidden = self.model.model(
                input_ids=ids, position_ids=positions, use_cache=False, attention_mask={"full_attention": mask}
            )
            flat = hidden.last_hidden_state.reshape(-1, hidden.last_hidden_state.shape[-1])
            head = self.model.get_output_embeddings().grid
            loss = ghost_cross_entropy(flat, targets.reshape(-1), head)
        (loss * self._weight).backward()
        largest = torch.stack(torch._foreach_norm(self._gradients, float("inf")))
        marks = cast(torch.Tensor, self.ballot.marks)
        self._left[0].copy_(loss.detach())
        self._left[1].copy_(~torch.isfinite(largest).all())
        self._left[2:].copy_(marks)
        marks.zero_()

    def _record(self, masked: bool) -> torch.cuda.CUDAGraph:
        rule = cast(MomentumRule, self.ballot.rule)
        for grid, yardstick in zip(self._voting, self._yardsticks, strict=True):
            # What is recorded reads the yardstick where it will be written.
            _, gains = rule.yardstick(grid)
            assert grid.state is not None and grid.state.cached is not None
            grid.state.cached = (grid.state.cached[0], (yardstick, gains))
        graph = torch.cuda.CUDAGraph()
        standing = set(self.ballot.standing)
        self.ballot.controls = self._controls
        try:
            with torch.cuda.graph(graph, pool=self._pool, stream=self.stream):
                self._passes(masked)
        finally:
            self.ballot.controls = None
            self.ballot.torn = False
            self.ballot.standing = standing
            for grid in self._voting:
                assert grid.state is not None
                grid.state.cached = None
        self._pool = graph.pool()
        return graph

    def run(self, batch: Batch, k: int, weight: float, sign: int = 1) -> Outcome:
        """Cast the votes of micro-batch ``k``, or with ``sign`` -1 take those of the same micro-batch back; the ballot
        is open for it. Records first, where there is no recording for its kind.

        Raises:
            torch.OutOfMemoryError: while recording; then nothing was cast.
        """
        if self._step != self.ballot.step and self._graphs and self._voters() != self._voting:
            self.forget()
        if not self._graphs:
            self._prepare(batch)
        masked = any(len(lengths) > 1 for lengths in document_lengths(batch.position_ids))
        if masked not in self._graphs:
            self._graphs[masked] = self._record(masked)
        self._write(batch, k, weight, sign)
        self._graphs[masked].replay()
        nats, *marks = self._left.tolist()
        return Outcome(nats, [number - 1 for number, mark in enumerate(marks) if mark])

    def undo(self, batch: Batch, k: int, weight: float) -> None:
        """Take back everything that the last replay has left, by replaying it with the other sign."""
        before = [saved.clone() for saved in self._saved]
        self.run(batch, k, weight, sign=-1)
        torch._foreach_copy_(self._gradients, before)

    def clear_gradients(self) -> None:
        """Begin the gradients of norms and biases anew, where they are."""
        if self._gradients:
            torch._foreach_zero_(self._gradients)

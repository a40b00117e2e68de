"""The votes of one micro-batch: all of them, or none.

A backward pass casts votes and leaves no weight gradient behind, so there is nothing to look at before it counts. One
that breaks, because a loss or gradient is not finite or because memory runs out, has already cast some. They are taken
back by the same pass with the opposite sign: every draw of the rounding is keyed by its place, so what is subtracted is
what was added, bit for bit. That costs a second pass for the rare micro-batch that needs it; a copy of all buffers to
return to would cost every step a third of the model. Where memory ran out the second pass keeps its activations with
the CPU. If that is not enough either the votes are of no use, which :class:`VotesLost` says.

On a card whole micro-batches are recorded once and replayed (``micro_batch_graph``). A recording holds memory, so it
is given up before anybody is told that there is none.
"""

from __future__ import annotations

import contextlib
import gc
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import torch
from transformers import PreTrainedModel

import ghost_kernels as kernels
from ballots import Ballot
from ghost_grid import GhostGrid
from micro_batch_graph import Arranged, MicroBatchGraph, arranged, arranged_loss
from packed_batches import Batch
from prime_device import is_out_of_memory, trim_memory
from qwen_prime_wrapper import answer_loss
from training_recipe import Recipe, TrainError

Outcome: TypeAlias = float | Literal["memory"] | None
"""Summed loss of a micro-batch in nats; None where it was not finite, "memory" where that ran out."""


class VotesLost(RuntimeError):
    """Memory ran out where votes could not be taken back: the state is of no use, return to a checkpoint."""


@dataclass(frozen=True)
class Turn:
    """A micro-batch's place: which of ``count`` it is in step ``step`` (both from 0), and the weight of its summed loss
    in the step's gradient."""

    step: int
    number: int
    count: int
    weight: float


class VoteCaster:
    """Forward and backward passes of micro-batches over a model whose grids vote. Mutates the grids' votes and row
    sums, the ballot, and the gradients of norms and biases.

    Args:
        ballot: of the grids.
        grids, floats: the model's, by name.
        recipe: its ``compute`` and ``cuda_graphs``.
        survives: whether memory that runs out is an outcome; else it is raised.
        tell: told of what a run's log should know, by name and content.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        ballot: Ballot,
        grids: Mapping[str, GhostGrid],
        floats: Mapping[str, torch.nn.Parameter],
        recipe: Recipe,
        *,
        survives: bool,
        tell: Callable[[str, dict[str, Any]], None],
    ) -> None:
        self.model, self.ballot, self.grids, self.floats = model, ballot, grids, floats
        self.recipe, self.survives, self.tell = recipe, survives, tell
        self._names = list(grids)
        self._warm = False
        self.graph = self._new_graph()
        self._arranges = self.graph is not None

    @property
    def device(self) -> torch.device:
        """Where the grids are."""
        return next(iter(self.grids.values())).indices.device

    @property
    def backend(self) -> str:
        """Which kernels serve, and whether micro-batches are recorded, in words."""
        name = kernels.backend_for(self.device, self.ballot.backend)
        return f"{name}, micro-batches recorded" if self.graph is not None else name

    # -- a micro-batch ----------------------------------------------------------------------------------------------

    def measure(self, batch: Batch, turn: Turn) -> Outcome:
        """Give grids without an observation their first, from a step's first micro-batch; no votes. One that is not
        finite at one grid measures none, and what it leaves there is the caller's to forget."""
        waiting = [g for g in self.grids.values() if g.waiting]
        if not waiting:
            return 0.0
        nats = self._guarded(lambda: self.backward("measure", batch, turn))
        finite = nats is not None and math.isfinite(nats) and self._finite_gradients()
        for grid in waiting if finite else []:
            grid.finish_measuring()
        self.ballot.close()
        self.clear_gradients()
        return "memory" if nats is None else nats if finite else None

    def cast(self, batch: Batch, turn: Turn) -> Outcome:
        """Cast the votes of a micro-batch and add to the gradients of norms and biases; without a loss it left no
        trace.

        Raises:
            VotesLost: it left one.
        """
        if self.recordable(batch):
            done, nats = self._replay(batch, turn)
            if done:
                return nats
        before = {n: None if p.grad is None else p.grad.clone() for n, p in self.floats.items()}
        nats = self._guarded(lambda: self.backward("cast", batch, turn))
        if nats is not None and not math.isfinite(nats):
            return None
        if nats is not None and self._finite_gradients():
            # Only a first one makes all that the others are compared with, outside of what a recording writes over.
            self._warm |= turn.number == 0
            return nats
        held = nats is None and self.graph is not None and self.graph.recorded
        if held:
            # Before anything else: taking back needs the memory that a recording holds.
            self._give_up_graph()
        self._take_back(batch, turn)
        for name, parameter in self.floats.items():
            old = before[name]
            if old is not None and parameter.grad is not None:
                # In place: a recording adds to this memory.
                parameter.grad.copy_(old)
            else:
                parameter.grad = old
        if held:
            return self.cast(batch, turn)
        return "memory" if nats is None else None

    def fits(self, batch: Batch, turn: Turn) -> bool:
        """Whether there is memory for a micro-batch, whose weight gradients nobody counts."""
        nats = self._guarded(lambda: self.backward("probe", batch, turn))
        self.ballot.close()
        self.clear_gradients()
        return nats is not None

    def loss(self, batch: Batch) -> torch.Tensor:
        """Loss of a micro-batch, nats summed over its answer tokens."""
        micro_batch = arranged(batch) if self._arranges else None
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.recipe.compute == "bfloat16"):
            if micro_batch is not None:
                # As it would be recorded: when that begins or ends must not change a bit.
                return arranged_loss(self.model, Arranged(*(t.to(self.device) for t in micro_batch)))
            ids, labels, positions = (t.to(self.device) for t in (batch.input_ids, batch.labels, batch.position_ids))
            loss, _ = answer_loss(self.model, ids, labels, positions)
        return loss

    def backward(self, mode: str, batch: Batch, turn: Turn) -> float:
        """Loss of a micro-batch, summed, and unless it is not finite the backward pass with the ballot in ``mode``."""
        self.ballot.open(mode, turn.step, turn.number, turn.count)
        self.ballot.non_finite.clear()
        loss = self.loss(batch)
        nats = loss.item()
        if math.isfinite(nats):
            (loss * turn.weight).backward()
            self.ballot.read_marks(self._names)
        return nats

    def _finite_gradients(self) -> bool:
        """Whether the last backward pass met no gradient of a grid that is not finite, and left none to the floats."""
        grads = [p.grad for p in self.floats.values() if p.grad is not None]
        if self.ballot.non_finite or not grads:
            return not self.ballot.non_finite
        return bool(torch.isfinite(torch.stack(torch._foreach_norm(grads, math.inf))).all())

    def _take_back(self, batch: Batch, turn: Turn) -> None:
        """Retract what the micro-batch has cast, by the same computation, the second time with activations kept in the
        memory of the CPU.

        Raises:
            VotesLost: memory ran out again before everything was taken back.
        """
        for place in (contextlib.nullcontext, torch.autograd.graph.save_on_cpu):
            if self.ballot.torn:
                break
            if self.ballot.standing:
                with place():
                    self._guarded(lambda: self.backward("retract", batch, turn))
            if not self.ballot.standing and not self.ballot.torn:
                return
        raise VotesLost(
            f"step {turn.step}: memory ran out, and again while votes of micro-batch {turn.number} were taken back"
        )

    # -- gradients of norms and biases ------------------------------------------------------------------------------

    def gradients(self) -> dict[str, torch.Tensor]:
        """Copies of what there is, on the CPU."""
        return {n: p.grad.detach().cpu().clone() for n, p in self.floats.items() if p.grad is not None}

    def put_gradients(self, gradients: Mapping[str, torch.Tensor]) -> None:
        """Set those that are named."""
        for name, gradient in gradients.items():
            parameter = self.floats[name]
            if parameter.grad is None:
                parameter.grad = gradient.to(parameter.device)
            else:
                # In place: a recording adds to this memory.
                parameter.grad.copy_(gradient)

    def clear_gradients(self) -> None:
        """Forget all; those that a recording adds to keep their place."""
        if self.graph is not None and self.graph.recorded:
            self.graph.clear_gradients()
            return
        for parameter in self.floats.values():
            parameter.grad = None

    # -- recordings -------------------------------------------------------------------------------------------------

    def _new_graph(self) -> MicroBatchGraph | None:
        """What records micro-batches; None where that is not to be or does not pay. On a card, this is also where marks
        begin, and a stream of the process's own: what runs on the default one cannot be recorded."""
        device = self.device
        if kernels.backend_for(device, self.ballot.backend) != "cuda":
            return None
        self.ballot.marks = torch.zeros(len(self.grids), dtype=torch.int32, device=device)
        if self.recipe.cuda_graphs == "off":
            return None
        if not MicroBatchGraph.serves(self.model, self.ballot, device):
            if self.recipe.cuda_graphs == "on":
                raise TrainError(
                    f"cuda-graphs is on, but micro-batches of this model with rule {self.ballot.rule.name} cannot be "
                    "recorded: leave --cuda-graphs at auto"
                )
            return None
        if self.recipe.cuda_graphs == "auto" and not MicroBatchGraph.pays(device):
            return None
        if torch.cuda.current_stream(device) == torch.cuda.default_stream(device):
            torch.cuda.synchronize(device)
            torch.cuda.set_stream(torch.cuda.Stream(device))
        settings = (self.recipe.compute, torch.cuda.current_stream(device))
        return MicroBatchGraph(self.model, self.ballot, self.grids, self.floats, *settings)

    def recordable(self, batch: Batch) -> bool:
        """Whether a micro-batch is one of those that are recorded: the first with its layers is not, libraries prepare
        themselves then."""
        return self.graph is not None and self._warm and self.graph.fits(batch)

    def _replay(self, batch: Batch, turn: Turn) -> tuple[bool, float | None]:
        """Cast by the recording: whether that was possible, and what :meth:`cast` returns."""
        assert self.graph is not None
        self.ballot.open("cast", turn.step, turn.number, turn.count)
        try:
            outcome = self.graph.run(batch, turn.number, turn.weight)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            outcome = None
        if outcome is None:
            # Nothing was cast.
            self._give_up_graph()
            return False, None
        if math.isfinite(outcome.nats) and not outcome.marked:
            return True, outcome.nats
        self.ballot.non_finite[:] = [self._names[number] for number in outcome.marked if number >= 0]
        try:
            self.graph.undo(batch, turn.number, turn.weight)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            raise VotesLost(
                f"step {turn.step}: memory ran out while votes of micro-batch {turn.number} were taken back"
            ) from error
        return True, None

    def forget_recording(self) -> bool:
        """What was recorded is of another time: layers, shape, or tensors have changed. Whether there was anything."""
        self._warm = False
        if self.graph is None or not self.graph.recorded:
            return False
        self.graph.forget()
        self.clear_gradients()
        return True

    def _give_up_graph(self) -> None:
        """A recording holds memory between its replays, of which there is not enough."""
        gradients = {n: None if p.grad is None else p.grad.clone() for n, p in self.floats.items()}
        self.forget_recording()
        self.graph = None
        self.free()
        for name, parameter in self.floats.items():
            parameter.grad = gradients[name]
        self.tell("cuda_graphs", {"state": "off", "reason": "out of memory"})

    # -- memory -----------------------------------------------------------------------------------------------------

    def _guarded(self, function: Callable[[], float]) -> float | None:
        """The function's value, or None where memory ran out and that is survived."""
        try:
            return function()
        except Exception as error:
            if not self.survives or not is_out_of_memory(error):
                raise
        # Only here are the exception and the tensors in its frames gone.
        self.free()
        return None

    @staticmethod
    def free() -> None:
        """Give the system back what nobody uses."""
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        trim_memory()

    def release(self) -> bool:
        """Give back memory that is only held to be faster, for somebody between two steps; whether there was any."""
        held = self.forget_recording()
        if held:
            self.free()
        return held

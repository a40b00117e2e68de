"""The training step: cast the votes of every micro-batch, then move the weights by them. No files, no screens.

A step is ``grad_accum`` micro-batches. Each one's backward pass casts votes and leaves no weight gradient behind;
at the end of the step the votes move the weights. Norms and biases, the only float parameters, follow a small AdamW.
The loss of a step is the mean over all its answer tokens, however they are spread over micro-batches.

A micro-batch whose loss or gradients are not finite leaves no trace: it is skipped, and if it broke in the middle of
the backward pass the votes that it had cast are taken back by casting them again with the opposite sign. One that runs
out of memory leaves none either: what it had cast is taken back in the same way, its data are dealt out again in a
smaller shape, and the step ends with the micro-batches that were complete. Whatever comes, no half micro-batch counts.

A run that is to watch itself hands over a ``NightWatch``: the supervisor then opens layers before a step, the governor
and the sentinel look at it afterwards, and every new set of open layers is probed for memory before it votes.
"""

from __future__ import annotations

import contextlib
import gc
import logging
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

import torch
from transformers import PreTrainedModel

import ghost_kernels as kernels
from ballots import Ballot, RuleError
from ghost_core import Movement, apply_votes, grids_of, name_grids
from micro_batch_graph import Arranged, MicroBatchGraph, arranged, arranged_loss
from night_shift import LayerGroup, LayerPeel, NightShiftSupervisor, Shape, layer_groups
from night_watch import NightWatch, StepResult, describe, vote_pressure
from packed_batches import Batch, PackedBatches
from prime_device import is_out_of_memory, trim_memory
from qwen_prime_wrapper import answer_loss, copy_tensors, model_tensors
from training_recipe import Recipe, TrainError, check_course, course, default_rate, learning_rate

log = logging.getLogger("train")


class VotesLost(RuntimeError):
    """Memory ran out where votes could not be taken back: the state is of no use, return to a checkpoint."""


class StepPaused(Exception):
    """A step was left between two of its micro-batches, as somebody asked; the next call goes on with the rest."""


@dataclass(frozen=True)
class HalfStep:
    """A step that was left: what its micro-batches so far have come to, beside the votes in the grids.

    Attributes:
        ran: how many micro-batches are done.
        skipped: how many of these were not finite.
        nats, answer_tokens: sums over the others.
        seconds: that they took.
        gradients: of norms and biases, on the CPU, by name.
    """

    ran: int
    skipped: int
    nats: float
    answer_tokens: int
    seconds: float
    gradients: dict[str, torch.Tensor]


def _on_the_cpu(optimizer: dict[str, Any]) -> dict[str, Any]:
    """An optimizer's state dict without a word of where its tensors were."""
    moments = {i: {n: t.cpu() for n, t in found.items()} for i, found in optimizer["state"].items()}
    return {**optimizer, "state": moments}


class VoteTrainer:
    """The training state and the one operation on it, :meth:`step`; knows nothing of files or screens.

    Owns the model (mutated), the ballot, the float optimizer, the data cursor and the watch. Without a watch every
    layer is open, and what goes wrong is raised.
    """

    def __init__(
        self, model: PreTrainedModel, batches: PackedBatches, recipe: Recipe, watch: NightWatch | None = None
    ) -> None:
        if recipe.lr is None:
            try:
                recipe = replace(recipe, lr=default_rate(model.config.hidden_size))
            except ValueError as error:
                # What a recipe cannot know before it meets a model: its weight decay at the model's learning rate.
                raise TrainError(str(error)) from error
        self.model = model
        self.batches = batches
        self.recipe = recipe
        self.watch = watch
        self.done = 0
        self.tokens = 0
        self.events: list[tuple[str, dict[str, Any]]] = []
        self.asked_to_stop: Callable[[], bool] = lambda: False
        """Asked between micro-batches; where it says so, :meth:`step` raises :class:`StepPaused`."""
        self.half: HalfStep | None = None
        """The step that was left, until it is gone on with."""
        self.ballot = Ballot(seed=recipe.seed, rule=recipe.rule(), listening=watch is not None)
        name_grids(model, self.ballot)
        self.grids = grids_of(model)
        self._names = list(self.grids)
        self.groups: list[LayerGroup] = layer_groups(model)
        self.supervisor = NightShiftSupervisor(model, watch.peel if watch else LayerPeel())
        self._probed = watch is None
        for grid in self.grids.values():
            self.ballot.rule.check(grid.tables(), self.shape.grad_accum, grid.uses)
        self.floats = dict(model.named_parameters())
        self.optimizer = self._new_optimizer()
        if recipe.gradient_checkpointing:
            # The newer name where transformers has it; the older one warns there.
            enable = getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)
            # Nothing random is computed twice, unless attention drops something out.
            draws = getattr(model.config, "attention_dropout", 0.0) > 0
            enable({"use_reentrant": False, "preserve_rng_state": draws})
            # transformers has the embedding's output want a gradient, for adapters: the backward pass would then come
            # down through every layer, whichever of them is open.
            model.disable_input_require_grads()
            # The backward pass reaches the top layer next: it would compute again what has just been there. Head and
            # layers have their peaks of memory at different times.
            model.model.layers[-1].gradient_checkpointing = False
            for layer in model.model.layers[:-1]:
                for grid in grids_of(layer).values():
                    grid.keeps = True
        self._warm = False
        self._graph = self._new_graph()
        self._arranges = self._graph is not None
        if watch is None:
            self.supervisor.apply(0)
        model.train()

    @property
    def _device(self) -> torch.device:
        return next(iter(self.grids.values())).indices.device

    def _new_graph(self) -> MicroBatchGraph | None:
        """What records micro-batches; None where that is not to be or does not pay. On a card, this is also where marks
        begin, and a stream of the process's own: what runs on the default one cannot be recorded."""
        device = self._device
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

    def _forget_graph(self) -> None:
        """What was recorded is of another time: layers, shape, or tensors have changed."""
        self._warm = False
        if self._graph is not None and self._graph.recorded:
            self._graph.forget()
            self.optimizer.zero_grad(set_to_none=True)

    def _clear_gradients(self) -> None:
        """Forget the gradients of norms and biases; those that a recording adds to keep their place."""
        if self._graph is None or not self._graph.recorded:
            self.optimizer.zero_grad(set_to_none=True)
        else:
            self._graph.clear_gradients()

    def _new_optimizer(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(
            self.floats.values(), lr=learning_rate(self.recipe, 0), betas=(0.9, 0.99), weight_decay=0.0
        )

    @property
    def backend(self) -> str:
        """Which kernels serve the run, and whether its micro-batches are recorded, in words."""
        name = kernels.backend_for(self._device, self.ballot.backend)
        return f"{name}, micro-batches recorded" if self._graph is not None else name

    @property
    def shape(self) -> Shape:
        """Size of the present step."""
        if self.watch is not None:
            return self.watch.contingency.shape
        return Shape(self.batches.seq_len, self.batches.batch_size, self.recipe.grad_accum)

    @property
    def phase(self) -> str:
        """What is open at the step that comes next, in words."""
        return self.supervisor.phase(self.done)

    # -- a step -----------------------------------------------------------------------------------------------------

    def step(self) -> StepResult:
        """One step: open what the schedule says, measure what has no yardstick yet, cast the votes of every
        micro-batch, apply them, and let the watch judge.

        Raises:
            TrainError: no answer token in the step's data, or no shape fits into memory.
            VotesLost: the state is of no use; see there.
            StepPaused: ``asked_to_stop`` said so in the middle; a checkpoint of this state, or another call, goes on
                there and ends the step with the same bits.
        """
        events = self.events = []
        if self.supervisor.due(self.done):
            self._forget_graph()
            change = self.supervisor.apply(self.done)
            for parameter in change.floats_closed:
                self.optimizer.state.pop(parameter, None)
            if self.watch is not None:
                self.watch.sentinel.forget_movement()
                events.append(("peel", {"opened": change.opened, "closed": change.closed, "phase": change.phase}))
                self._probed = False
        if not self._probed:
            self._probe(events)
        while (result := self._attempt(events)) is None:
            pass
        describe(result, self.groups)
        if self.watch is not None:
            self.watch.judge(result, self.done, self.groups)
        return result

    def _attempt(self, events: list[tuple[str, dict[str, Any]]]) -> StepResult | None:
        """The step's micro-batches and moves; None where memory ran out before the first was complete."""
        count = self.shape.grad_accum
        cursors, micro_batches = [], []
        begun = time.perf_counter()
        for _ in range(count):
            cursors.append(self.batches.state_dict())
            micro_batches.append(next(self.batches))
        waited = time.perf_counter() - begun
        answers = sum(b.answer_tokens for b in micro_batches)
        if answers == 0:
            raise TrainError(f"step {self.done} has no answer token: the data has nothing to learn at this seq-len")
        rate = learning_rate(self.recipe, self.done) * (self.watch.sentinel.heat if self.watch else 1.0)
        weight = count / answers
        for grid in self.grids.values():
            grid.begin_step()
        half = self._go_on()
        if half.ran:
            # Nothing may be left to cast, which would say this.
            self.ballot.open("cast", self.done, count - 1, count)
            self.ballot.close()
        ran, total, learned, skipped = half.ran, half.nats, half.answer_tokens, half.skipped
        fits = True
        waiting = [g for g in self.grids.values() if g.waiting]
        leave = False
        for k, batch in enumerate(micro_batches[ran:], ran):
            if k and (leave := self.asked_to_stop()):
                break
            outcome = self._measure(batch, weight) if k == 0 else 0.0
            if isinstance(outcome, float):
                outcome = self._cast(batch, k, weight)
            if k == 0 and not isinstance(outcome, float):
                # A yardstick would be its trace. The others cannot vote without one: the next step begins anew.
                for grid in waiting:
                    grid.measure_anew()
            if outcome == "memory":
                fits = False
                self.batches.load_state_dict(cursors[k])
                self._shrink(events, f"micro-batch {k} of {count}")
                break
            ran += 1
            if outcome is None:
                skipped += 1
            else:
                total += float(outcome)
                learned += batch.answer_tokens
        if ran == 0:
            self._probe(events)
            return None
        if fits and (leave or self.asked_to_stop()):
            # Behind the last one, too: what follows a step may take long.
            self.batches.load_state_dict(cursors[0])
            seconds = half.seconds + time.perf_counter() - begun
            self._pause(HalfStep(ran, skipped, total, learned, seconds, self._float_gradients()))
        moved: dict[str, Movement] = {}
        self.ballot.close()
        pressure: dict[str, float] = {}
        if skipped < ran:
            pressure = vote_pressure(self.groups)
            moved = self._apply(rate, count)
        self._clear_gradients()
        if not fits:
            self._probe(events)
        self.done += 1
        run = micro_batches[:ran]
        tokens = sum(b.tokens for b in run)
        self.tokens += tokens
        return StepResult(
            loss=total / learned if learned else math.nan,
            tokens=tokens,
            answer_tokens=sum(b.answer_tokens for b in run),
            skipped=skipped,
            micro_batches=ran,
            moved=moved,
            rate=rate,
            data_seconds=waited,
            earlier_seconds=half.seconds,
            pressure=pressure,
            events=events,
        )

    def _float_gradients(self) -> dict[str, torch.Tensor]:
        return {n: p.grad.detach().cpu().clone() for n, p in self.floats.items() if p.grad is not None}

    def _pause(self, half: HalfStep) -> None:
        self.ballot.close()
        self._clear_gradients()
        self.half = half
        raise StepPaused(f"step {self.done} was left after {half.ran} of {self.shape.grad_accum} micro-batches")

    def _go_on(self) -> HalfStep:
        """What there is of the step: what it was left with, or nothing yet."""
        half, self.half = self.half or HalfStep(0, 0, 0.0, 0, 0.0, {}), None
        for name, gradient in half.gradients.items():
            parameter = self.floats[name]
            if parameter.grad is None:
                parameter.grad = gradient.to(parameter.device)
            else:
                # In place: a recording adds to this memory.
                parameter.grad.copy_(gradient)
        return half

    def _loss(self, batch: Batch) -> torch.Tensor:
        device = self._device
        micro_batch = arranged(batch) if self._arranges else None
        with torch.autocast(device.type, torch.bfloat16, enabled=self.recipe.compute == "bfloat16"):
            if micro_batch is not None:
                # As it would be recorded: when that begins or ends must not change a bit.
                return arranged_loss(self.model, Arranged(*(t.to(device) for t in micro_batch)))
            loss, _ = answer_loss(
                self.model, batch.input_ids.to(device), batch.labels.to(device), batch.position_ids.to(device)
            )
        return loss

    def _backward(self, mode: str, batch: Batch, k: int, weight: float) -> float:
        """Loss of a micro-batch, summed, and unless it is not finite the backward pass with the ballot in ``mode``."""
        self.ballot.open(mode, self.done, k, self.shape.grad_accum)
        self.ballot.non_finite.clear()
        loss = self._loss(batch)
        nats = loss.item()
        if math.isfinite(nats):
            (loss * weight).backward()
            self.ballot.read_marks(self._names)
        return nats

    def _measure(self, batch: Batch, weight: float) -> float | Literal["memory"] | None:
        """Give grids without an observation their first, from the step's first micro-batch; no votes. Returns what
        :meth:`_cast` does: a micro-batch that is not finite at one grid measures none; the caller forgets."""
        waiting = [g for g in self.grids.values() if g.waiting]
        if not waiting:
            return 0.0
        nats = self._guarded(lambda: self._backward("measure", batch, 0, weight))
        finite = nats is not None and math.isfinite(nats) and self._finite_gradients()
        for grid in waiting if finite else []:
            grid.finish_measuring()
        self.ballot.close()
        self._clear_gradients()
        return "memory" if nats is None else nats if finite else None

    def _finite_gradients(self) -> bool:
        """Whether the last backward pass met no gradient of a grid that is not finite, and left none to the floats."""
        grads = [p.grad for p in self.floats.values() if p.grad is not None]
        if self.ballot.non_finite or not grads:
            return not self.ballot.non_finite
        return bool(torch.isfinite(torch.stack(torch._foreach_norm(grads, math.inf))).all())

    def _cast(self, batch: Batch, k: int, weight: float) -> float | Literal["memory"] | None:
        """Votes of one micro-batch: its summed loss; None where it was not finite, "memory" where that ran out; either
        way it left no trace."""
        if self._recordable(batch):
            done, nats = self._replay(batch, k, weight)
            if done:
                return nats
        before = {n: None if p.grad is None else p.grad.clone() for n, p in self.floats.items()}
        nats = self._guarded(lambda: self._backward("cast", batch, k, weight))
        if nats is not None and not math.isfinite(nats):
            return None
        if nats is not None and self._finite_gradients():
            # Only a first one makes all that the others are compared with, outside of what a recording writes over.
            self._warm |= k == 0
            return nats
        held = nats is None and self._graph is not None and self._graph.recorded
        if held:
            # Before anything else: taking back needs the memory that a recording holds.
            self._give_up_graph()
        self._take_back(batch, k, weight)
        for name, parameter in self.floats.items():
            old = before[name]
            if old is not None and parameter.grad is not None:
                # In place: a recording adds to this memory.
                parameter.grad.copy_(old)
            else:
                parameter.grad = old
        if held:
            return self._cast(batch, k, weight)
        return "memory" if nats is None else None

    def _recordable(self, batch: Batch) -> bool:
        """Whether a micro-batch is one of those that are recorded: the first with its layers is not, libraries prepare
        themselves then."""
        return self._graph is not None and self._warm and self._graph.fits(batch)

    def _replay(self, batch: Batch, k: int, weight: float) -> tuple[bool, float | None]:
        """Cast by the recording: whether that was possible, and what :meth:`_cast` returns."""
        assert self._graph is not None
        self.ballot.open("cast", self.done, k, self.shape.grad_accum)
        try:
            outcome = self._graph.run(batch, k, weight)
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
            self._graph.undo(batch, k, weight)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            raise VotesLost(
                f"step {self.done}: memory ran out while votes of micro-batch {k} were taken back"
            ) from error
        return True, None

    def release(self) -> bool:
        """Give back memory that is only held to be faster, for somebody between two steps; whether there was any."""
        if self._graph is None or not self._graph.recorded:
            return False
        self._forget_graph()
        self._free()
        return True

    def _give_up_graph(self) -> None:
        """A recording holds memory between its replays, of which there is not enough."""
        gradients = {n: None if p.grad is None else p.grad.clone() for n, p in self.floats.items()}
        self._forget_graph()
        self._graph = None
        self._free()
        for name, parameter in self.floats.items():
            parameter.grad = gradients[name]
        self.events.append(("cuda_graphs", {"state": "off", "reason": "out of memory"}))

    def _take_back(self, batch: Batch, k: int, weight: float) -> None:
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
                    self._guarded(lambda: self._backward("retract", batch, k, weight))
            if not self.ballot.standing and not self.ballot.torn:
                return
        raise VotesLost(f"step {self.done}: memory ran out, and again while votes of micro-batch {k} were taken back")

    def _apply(self, rate: float, count: int) -> dict[str, Movement]:
        try:
            moved = apply_votes(self.grids, rate, self.recipe.weight_decay)
        except Exception as error:
            if self.watch is None or not is_out_of_memory(error):
                raise
            # Some grids have moved, and the votes of one may be half applied.
            raise VotesLost(f"step {self.done}: memory ran out while votes were applied") from error
        self._step_floats(rate, count)
        return moved

    def _step_floats(self, rate: float, count: int) -> None:
        for parameter in self.floats.values():
            if parameter.grad is not None:
                parameter.grad.div_(count)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.step()

    # -- memory -----------------------------------------------------------------------------------------------------

    def _guarded(self, function: Callable[[], float]) -> float | None:
        """The function's value, or None where memory ran out; without a watch that is raised."""
        try:
            return function()
        except Exception as error:
            if self.watch is None or not is_out_of_memory(error):
                raise
        # Only here are the exception and the tensors in its frames gone.
        self._free()
        return None

    @staticmethod
    def _free() -> None:
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        trim_memory()

    def _probe(self, events: list[tuple[str, dict[str, Any]]]) -> None:
        """Run a full row of answers forward and backward with weight gradients that nobody counts, in ever smaller
        shapes until one fits."""
        while True:
            shape = self.shape
            ids = torch.arange(shape.seq_len).remainder(self.model.config.vocab_size).expand(shape.batch_size, -1)
            tokens = ids.numel()
            batch = Batch(
                ids.contiguous(), ids.contiguous(), torch.arange(shape.seq_len).expand_as(ids), 1, tokens, tokens
            )
            fits = self._guarded(partial(self._backward, "probe", batch, 0, 1 / tokens))
            self.ballot.close()
            self._clear_gradients()
            if fits is not None:
                self._probed = True
                return
            self._shrink(events, "probe")

    def shrink(self, where: str) -> None:
        """Make the step smaller, for somebody between two steps; the events say so.

        Raises:
            TrainError: no smaller shape is left.
        """
        self._shrink(self.events, where)

    def _shrink(self, events: list[tuple[str, dict[str, Any]]], where: str) -> None:
        assert self.watch is not None, "without a watch memory errors are raised"
        before, shape = self.shape, self.watch.contingency.lower()
        if shape is None:
            raise TrainError(
                f"{before} do not fit into memory ({where}), and no smaller shape is left: ask --plan what does; "
                "--vote-rule compact and --peel-window need less"
            )
        for grid in self.grids.values():
            try:
                self.ballot.rule.check(grid.tables(), shape.grad_accum, grid.uses)
            except RuleError as error:
                raise TrainError(
                    f"{before} do not fit into memory ({where}), {shape} not into the rule: {error}"
                ) from error
        self._forget_graph()
        self.batches.resize(shape.seq_len, shape.batch_size)
        events.append(("out_of_memory", {"where": where, "from": str(before), "to": str(shape)}))

    # -- state ------------------------------------------------------------------------------------------------------

    def state(self) -> dict[str, Any]:
        """Everything beside the model's tensors that the next step depends on, as a checkpoint's ``train_state``."""
        state: dict[str, Any] = {
            "step": self.done,
            "tokens": self.tokens,
            "seed": self.recipe.seed,
            "vote_rule": self.recipe.vote_rule,
            "vote_buffer": self.ballot.rule.buffer,
            "micro_batches": self.shape.grad_accum,
            "recipe": course(self.recipe),
            "data": self.batches.state_dict(),
            "float_optimizer": self.optimizer.state_dict(),
        }
        if self.half is not None:
            state["half_step"] = vars(self.half)
        return state if self.watch is None else {**state, **self.watch.state_dict()}

    def checkpoint(self, base: Mapping[str, Any]) -> dict[str, Any]:
        """All of the present state as the content of a checkpoint of stage "train" (``prime_checkpoint``).

        Args:
            base: the checkpoint whose config, tokenizer, manifold and source it repeats.

        Returns:
            Its tensors are the model's own where these are on the CPU.
        """
        return {
            **{key: base[key] for key in ("format", "version", "hf_config", "tokenizer", "manifold", "source")},
            "stage": "train",
            "model": {n: t.detach().cpu().contiguous() for n, t in model_tensors(self.model).items()},
            "probes": {},
            "votes": {n: {k: t.cpu() for k, t in s.items()} for n, s in self.votes().items()},
            "train_state": {**(state := self.state()), "float_optimizer": _on_the_cpu(state["float_optimizer"])},
        }

    def votes(self) -> dict[str, dict[str, torch.Tensor]]:
        """Vote state of the unlocked grids."""
        return {name: grid.vote_state() for name, grid in self.grids.items() if grid.unlocked}

    def restore(self, checkpoint: dict[str, Any]) -> None:
        """Continue from a training checkpoint of the same run, whose tensors the model already has.

        Raises:
            TrainError, NightShiftError: another seed, vote rule, shape, learning rate or course of it, peel schedule
                or governor than the run's.
        """
        state = checkpoint["train_state"]
        own = self.state()
        # With a watch the shape that the run had come to is part of what follows, and compared with its first.
        for name in ("seed", "vote_rule", "vote_buffer", *(["micro_batches"] if self.watch is None else [])):
            if state[name] != own[name]:
                raise TrainError(f"cannot resume: the checkpoint has {name} {state[name]}, this run {own[name]}")
        if self.watch is not None:
            self.watch.load_state_dict(state)
        # Checkpoints of before these were kept have none.
        check_course(self.recipe, state.get("recipe", {}))
        self.done, self.tokens = state["step"], state["tokens"]
        self.batches.load_state_dict(state["data"])
        self.optimizer.load_state_dict(state["float_optimizer"])
        half = state.get("half_step")
        self.half = None if half is None else HalfStep(**half)
        self._restore_votes(checkpoint["votes"])

    def _restore_votes(self, votes: dict[str, dict[str, torch.Tensor]]) -> None:
        self._forget_graph()
        for name, grid in self.grids.items():
            grid.load_vote_state(votes.get(name, {}))
        if self.watch is None:
            return
        if self.half is not None:
            # What it opened is open, and has found room.
            self.supervisor.apply(self.done)
        elif self.done > 0:
            # As the step before left it; what the next one changes is its own affair.
            self.supervisor.apply(self.done - 1)
        else:
            self.supervisor.now = None
        self._probed = self.half is not None
        self.watch.set_heats(self.groups)

    def roll_back(self, checkpoint: dict[str, Any]) -> None:
        """Return to the weights, votes and step of a checkpoint of this run, and go on from there with data that were
        not seen yet, at the sentinel's present heat and in the present shape."""
        assert self.watch is not None, "a run that nobody watches is not rolled back"
        state = checkpoint["train_state"]
        copy_tensors(self.model, checkpoint["model"])
        assert "half_step" not in state, "returns are to whole steps"
        self.half = None
        self.done, self.tokens = state["step"], state["tokens"]
        self.optimizer = self._new_optimizer()
        self.optimizer.load_state_dict(state["float_optimizer"])
        self.watch.sentinel.recall(state["sentinel"])
        if self.watch.governor is not None:
            self.watch.governor.load_state_dict(state["governor"])
        self._restore_votes(checkpoint["votes"])
        self.optimizer.zero_grad(set_to_none=True)

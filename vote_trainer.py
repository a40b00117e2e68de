"""The training step: cast the votes of every micro-batch, then move the weights by them. No files, no screens.

A step is ``grad_accum`` micro-batches. Each one's backward pass casts votes and leaves no weight gradient behind;
at the end of the step the votes move the weights. Norms and biases, the only float parameters, follow a small AdamW.
The loss of a step is the mean over all its answer tokens, however they are spread over micro-batches.

A micro-batch that is not finite, or for which memory runs out, leaves no trace (``vote_casting``). The first kind is
skipped. Of the second the data are dealt out again in a smaller shape, and the step ends with the micro-batches that
were complete.

A run that is to watch itself hands over a ``NightWatch``: the supervisor then opens layers before a step, the governor
and the sentinel look at it afterwards, and every new set of open layers is probed for memory before it votes.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from transformers import PreTrainedModel

from ballots import Ballot, RuleError
from ghost_core import Movement, apply_votes, grids_of, name_grids
from night_shift import LayerGroup, LayerPeel, NightShiftSupervisor, Shape, layer_groups
from night_watch import NightWatch, StepResult, describe, vote_pressure
from packed_batches import Batch, PackedBatches
from prime_device import is_out_of_memory
from qwen_prime_wrapper import copy_tensors, model_tensors
from text_records import DataError
from training_recipe import Recipe, TrainError, check_course, course, default_rate, learning_rate
from vote_casting import Turn, VoteCaster, VotesLost

log = logging.getLogger("train")


class StepPaused(Exception):
    """A step was left between two of its micro-batches, as somebody asked; the next call goes on with the rest."""


@dataclass(frozen=True)
class HalfStep:
    """A step that was left: what its micro-batches so far have come to, beside the votes in the grids.

    Attributes:
        ran: how many micro-batches are done.
        skipped: how many of these were not finite.
        voted: how many of the others had something to learn.
        nats, answer_tokens: sums over the others.
        seconds: that they took.
        gradients: of norms and biases, on the CPU, by name.
    """

    ran: int
    skipped: int
    voted: int
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
        self.undealt: dict[str, Any] | None = None
        """The data cursor of a step for which data could not be read: a checkpoint goes on there."""
        self.ballot = Ballot(seed=recipe.seed, rule=recipe.rule(), listening=watch is not None)
        name_grids(model, self.ballot)
        self.grids = grids_of(model)
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
        self.caster = VoteCaster(
            model,
            self.ballot,
            self.grids,
            self.floats,
            recipe,
            survives=watch is not None,
            tell=lambda name, content: self.events.append((name, content)),
        )
        if watch is None:
            self.supervisor.apply(0)
        model.train()

    def _new_optimizer(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(
            self.floats.values(), lr=learning_rate(self.recipe, 0), betas=(0.9, 0.99), weight_decay=0.0
        )

    @property
    def backend(self) -> str:
        """Which kernels serve the run, and whether its micro-batches are recorded, in words."""
        return self.caster.backend

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
            DataError: the data cannot be read; a checkpoint of this state goes on with this step.
            VotesLost: the state is of no use; see there.
            StepPaused: ``asked_to_stop`` said so in the middle; a checkpoint of this state, or another call, goes on
                there and ends the step with the same bits.
        """
        events = self.events = []
        if self.supervisor.due(self.done):
            self.caster.forget_recording()
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
        try:
            for _ in range(count):
                cursors.append(self.batches.state_dict())
                micro_batches.append(next(self.batches))
        except DataError:
            self.undealt = cursors[0]
            raise
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
        ran, skipped, voted, total, learned = half.ran, half.skipped, half.voted, half.nats, half.answer_tokens
        fits = True
        waiting = [g for g in self.grids.values() if g.waiting]
        leave = False
        for k, batch in enumerate(micro_batches[ran:], ran):
            if k and (leave := self.asked_to_stop()):
                break
            turn = Turn(self.done, k, count, weight)
            outcome = self.caster.measure(batch, turn) if k == 0 else 0.0
            if isinstance(outcome, float):
                outcome = self.caster.cast(batch, turn)
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
                total += outcome
                learned += batch.answer_tokens
                # What has nothing to learn casts nothing, and is as if it had been skipped.
                voted += batch.answer_tokens > 0
        if ran == 0:
            self._probe(events)
            return None
        if fits and (leave or self.asked_to_stop()):
            # Behind the last one, too: what follows a step may take long.
            self.batches.load_state_dict(cursors[0])
            seconds = half.seconds + time.perf_counter() - begun
            self._pause(HalfStep(ran, skipped, voted, total, learned, seconds, self.caster.gradients()))
        moved: dict[str, Movement] = {}
        self.ballot.close()
        pressure: dict[str, float] = {}
        self.ballot.voted = voted
        if voted > 0:
            pressure = vote_pressure(self.groups)
            moved = self._apply(rate, count)
        self.caster.clear_gradients()
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

    def _pause(self, half: HalfStep) -> None:
        self.ballot.close()
        self.caster.clear_gradients()
        self.half = half
        raise StepPaused(f"step {self.done} was left after {half.ran} of {self.shape.grad_accum} micro-batches")

    def _go_on(self) -> HalfStep:
        """What there is of the step: what it was left with, or nothing yet."""
        half, self.half = self.half or HalfStep(0, 0, 0, 0.0, 0, 0.0, {}), None
        self.caster.put_gradients(half.gradients)
        return half

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
            if self.caster.fits(batch, Turn(self.done, 0, shape.grad_accum, 1 / tokens)):
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
        self.caster.forget_recording()
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
            "data": self.undealt or self.batches.state_dict(),
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
        # Checkpoints of before votes were counted have skipped ones only.
        self.half = None if half is None else HalfStep(**{"voted": half["ran"] - half["skipped"], **half})
        self._restore_votes(checkpoint["votes"])

    def _restore_votes(self, votes: dict[str, dict[str, torch.Tensor]]) -> None:
        self.caster.forget_recording()
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

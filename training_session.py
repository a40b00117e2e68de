"""One process's part of a run: steps, and between them evaluations, samples, statistics, checkpoints and returns.

What a step does is ``vote_trainer``'s, what watches over it ``night_shift``'s, what becomes of files ``run_folder``'s
and ``prime_telemetry``'s. Here is the order in which they meet, which is what makes a run end well however it ends: the
held-out loss is known before a step's line is written, a step's line is written before its checkpoint is, a verdict
is looked at only between steps, and a signal also between micro-batches. A look at the model (evaluation, sample, core
evaluation) that runs out of memory is left out and said to be; a step that does is the trainer's to make smaller.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from pathlib import Path
from statistics import mean
from types import FrameType
from typing import Any, TypeVar

from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

import core_eval
from answer_masks import EncodedSet
from night_shift import AntigravitySentinel, LayerPeel, MemoryContingency, Shape, TrainingGovernor, Verdict
from night_watch import NightWatch, StepResult
from packed_batches import evaluation_batches
from prime_checkpoint import created_by, recorded_hash
from prime_device import GIB, is_out_of_memory, memory_peak
from prime_telemetry import RunLog
from qwen_prime_wrapper import continue_texts, mean_answer_loss
from run_folder import RunFolder
from training_recipe import Recipe, TrainError
from vote_casting import VotesLost
from vote_guard import VoteGuard
from vote_trainer import StepPaused, VoteTrainer
from whole_output import write_whole

log = logging.getLogger("train")
T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class RunSettings(Recipe):
    """A recipe, the size of its steps, who watches them, and what is done between them."""

    seq_len: int = 512
    """Tokens in a packed row."""
    batch_size: int = 4
    """Rows in a micro-batch. Halved, at twice the micro-batches, where memory runs out."""
    peel: str = "none"
    """Which layers are open when: none (all of them, from the first step), v7 (the head alone until step 200, then two
    layers every 50 steps from the top) or START:EVERY:LAYERS."""
    peel_window: int | None = None
    """Most layers open at a time: the window rolls down the model by the schedule of --peel."""
    governor: bool = True
    """Brake layers that move too fast."""
    governor_limit: float | None = None
    """What is too fast, by default 0.02 of the mean weight in a step, for the rules of whisper votes 0.0005 flips."""
    unseconded_max: int = 1000
    """Steps over whose mean votes must agree with fresh gradients better than shuffled votes do, unless the held-out
    loss still falls; otherwise the run ends. 0: never."""
    shortest_seq_len: int | None = None
    """Where memory runs out rows shorten, not below this; by default 256, or half of --seq-len where that is less."""
    eval_every: int = 50
    """Steps between held-out evaluations, and one at each save; 0 evaluates only before the first step and at the end.
    """
    sample_every: int = 100
    """Steps between sample generations, and one at the end; 0 for none."""
    samples: int = 2
    """How many held-out prompts are continued."""
    sample_tokens: int = 48
    """Tokens of a continuation."""
    core_eval: bool = True
    """A tiny evaluation beside each save, but for a stop's, and all prompts at the end: EVAL_name_step.json."""
    save_every: int = 100
    """Steps between checkpoints; the last step always has one."""
    keep_last: int = 3
    """How many of the run's checkpoints to keep, beside the best."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("seq_len", "batch_size", "save_every", "keep_last", "samples", "sample_tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name.replace('_', '-')} is {getattr(self, name)}, expected at least 1")
        for name in ("eval_every", "sample_every", "unseconded_max"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name.replace('_', '-')} is {getattr(self, name)}, expected at least 0")
        if self.shortest_seq_len is not None and self.shortest_seq_len < 2:
            raise ValueError(f"shortest-seq-len is {self.shortest_seq_len}, expected at least 2")
        LayerPeel.parse(self.peel, self.peel_window)
        if self.governor:
            TrainingGovernor.for_rule(self.vote_rule, self.governor_limit)

    def shape(self) -> Shape:
        """Size of a step."""
        return Shape(self.seq_len, self.batch_size, self.grad_accum)

    def watch(self) -> NightWatch:
        """Who watches this run."""
        return NightWatch(
            LayerPeel.parse(self.peel, self.peel_window),
            AntigravitySentinel(),
            TrainingGovernor.for_rule(self.vote_rule, self.governor_limit) if self.governor else None,
            MemoryContingency(self.shape(), self.shortest_seq_len),
            VoteGuard(unseconded_max=self.unseconded_max),
        )


class _StopFlag:
    """Set by SIGINT and SIGTERM; a second signal has its ordinary effect."""

    def __init__(self) -> None:
        self.signal: str | None = None
        self._before = {s: signal.signal(s, self._set) for s in (signal.SIGINT, signal.SIGTERM)}

    def _set(self, number: int, frame: FrameType | None) -> None:
        self.signal = signal.Signals(number).name
        self.restore()

    def restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)


class Session:
    """One process's part of a run: steps, evaluations, samples, statistics, checkpoints, returns.

    Args:
        base: the checkpoint whose config, tokenizer, manifold and source every checkpoint of the run repeats.
        held: held-out documents, or None.
        best: step and loss of the best checkpoint so far, if there is one.
        folder: locked.
        started_from: the checkpoint that this process read.
    """

    def __init__(
        self,
        trainer: VoteTrainer,
        settings: RunSettings,
        base: dict[str, Any],
        held: EncodedSet | None,
        tokenizer: PreTrainedTokenizerBase,
        best: dict[str, Any] | None,
        folder: RunFolder,
        started_from: Path,
    ) -> None:
        assert trainer.watch is not None, "given by train"
        self.trainer = trainer
        self.watch = trainer.watch
        self.settings = settings
        self.base = base
        self.held = held
        self.tokenizer = tokenizer
        self.best = best
        self.run = RunLog(folder.folder)
        self.folder = folder
        self.started_from = started_from
        self.stop = _StopFlag()
        trainer.asked_to_stop = lambda: self.stop.signal is not None
        self.path: Path | None = None
        self.saved_at: int | None = None
        self.returned = False
        self.votes_lost = 0
        self.lost_after = -1
        self.paces: list[float] | None = None

    def evaluate(self) -> float | None:
        """Held-out loss, nats per answer token."""
        if self.held is None:
            return None
        # Rows stay as long as they were, or losses could not be compared; there may be room for fewer.
        shape = (self.settings.seq_len, self.trainer.shape.batch_size, self.trainer.batches.pad_id)
        held = self.held

        def look() -> float:
            # The rows are made anew: a first look may have gone through some of them.
            return mean_answer_loss(self.trainer.model, evaluation_batches(held, *shape))[0]

        with self._unless_memory_runs_out("evaluation"):
            loss = self._with_more_memory(look)
            self.watch.guard.evaluated(loss)
            return loss
        return None

    @contextlib.contextmanager
    def _unless_memory_runs_out(self, what: str) -> Iterator[None]:
        """Looking at a model is not worth a run: without memory for it, say so and go on."""
        try:
            yield
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            log.warning("step %d: no memory for the %s, left out", self.trainer.done, what)
            self.run.event("left_out", step=self.trainer.done, what=what)
        finally:
            self.trainer.model.train()

    def _with_more_memory(self, look: Callable[[], T]) -> T:
        """What ``look`` returns; where memory runs out, once more without what the trainer holds to be faster."""
        try:
            return look()
        except Exception as error:
            if not is_out_of_memory(error) or not self.trainer.caster.release():
                raise
        return look()

    def sample(self) -> None:
        """Continue a few held-out prompts (of the training data where nothing is held out) into ``samples.jsonl``."""
        documents = self.held or self.trainer.batches.encoded
        count = min(self.settings.samples, len(documents))
        for number in range(count):
            document = documents.document(number * len(documents) // count)
            ids, answer = list(document.input_ids), list(document.answer)
            begin = answer.index(True)
            # A plain text has no question: its beginning serves.
            begin = begin if begin > 1 else max(1, min(32, len(ids) // 2))
            stop = next((i for i in range(begin, len(ids)) if not answer[i]), len(ids))
            text = None
            with self._unless_memory_runs_out("sample"):
                prompt, tokens = [ids[:begin]], self.settings.sample_tokens
                (text,) = self._with_more_memory(
                    partial(continue_texts, self.trainer.model, self.tokenizer, prompt, tokens)
                )
            if text is None:
                return
            self.run.sample(
                step=self.trainer.done,
                prompt=self.tokenizer.decode(ids[:begin]),
                text=text,
                reference=self.tokenizer.decode(ids[begin:stop]),
            )

    def save(self, val_loss: float | None, *, assess: bool = True) -> None:
        """Write the whole training state; the lowest held-out loss so far becomes the best."""
        trainer = self.trainer
        is_best = (
            val_loss is not None and math.isfinite(val_loss) and (self.best is None or val_loss < self.best["val_loss"])
        )
        if is_best:
            self.best = {"step": trainer.done, "val_loss": val_loss}
        checkpoint = self._checkpoint()
        checkpoint["train_state"]["is_best"] = is_best
        # While losses are spiking the last good checkpoint is still needed.
        self.path = self.folder.save(trainer.done, checkpoint, is_best=is_best, prune=self.watch.sentinel.streak == 0)
        self.saved_at = trainer.done
        self.run.event("save", step=trainer.done, path=self.path, best=is_best)
        if self.settings.core_eval and assess:
            self.assess("quick" if trainer.done == self.settings.steps else "tiny", val_loss)

    def _checkpoint(self) -> dict[str, Any]:
        checkpoint = self.trainer.checkpoint(self.base)
        checkpoint["train_state"]["best"] = self.best
        checkpoint["train_state"]["held_out"] = None if self.held is None else self.held.fingerprint
        checkpoint["created_by"] = created_by("qwen_prime_train.py")
        return checkpoint

    def save_where_it_stops(self) -> str:
        """Write the state for somebody who wants the process gone: at once, without a look at the model. What was
        saved, in words."""
        trainer, half = self.trainer, self.trainer.half
        if half is None:
            if self.saved_at != trainer.done:
                self.save(None, assess=False)
            return f"saved {self.path} after step {trainer.done}"
        self.path = self.folder.save_stopped(trainer.done, self._checkpoint())
        self.run.event("save", step=trainer.done, path=self.path, best=False, micro_batches=half.ran)
        many = f"{half.ran} of {trainer.shape.grad_accum}"
        return f"saved {self.path} in step {trainer.done + 1}, after {many} micro-batches"

    def assess(self, size: core_eval.Size, val_loss: float | None) -> None:
        """Evaluate what was just saved, into a report beside it."""
        assert self.path is not None, "called behind a save"
        found = None
        with self._unless_memory_runs_out("core evaluation"):
            found = self._with_more_memory(lambda: core_eval.evaluate(self.trainer.model, self.tokenizer, size))
        if found is None:
            return
        scores, details = found
        held = {} if self.held is None else {"held_out": self.held.fingerprint}
        report = core_eval.make_report(
            kind=size,
            name=self.folder.name,
            step=self.trainer.done,
            model={"path": self.path.name, "kind": "prime", "sha256": recorded_hash(self.path)},
            tokenizer=self.tokenizer,
            scores={**({"held_out.nll_per_token": val_loss} if val_loss is not None else {}), **scores},
            details=details,
            # Nothing is looked at under the autocast of training.
            settings={"dtype": "float32", "device": self.settings.device, **held},
        )
        text = json.dumps(report, indent=2, allow_nan=False) + "\n"
        write_whole(self.path.parent / core_eval.report_name(self.path.stem), text.encode())
        broken = [check["name"] for check in details["invariants"] if not check["passed"]]
        if broken:
            log.warning("step %d: invariants do not hold: %s", self.trainer.done, ", ".join(broken))
        self.run.event("core_eval", step=self.trainer.done, size=size, scores=report["scores"])

    def return_to(self, verdict: Verdict) -> None:
        """Roll back to the newest whole checkpoint of at most the verdict's step; where none is so old, to the newest
        there is: should it be damaged, the sentinel sees it again.

        Raises:
            TrainError: the verdict ends the run, or there is none; names the last good checkpoint.
        """
        found = self.folder.newest(at_most=verdict.to) or self.folder.newest(at_most=self.trainer.done)
        if found is None:
            raise TrainError(f"step {self.trainer.done}: {verdict.reason}; no whole checkpoint is left")
        path, checkpoint = found
        if verdict.kind == "end":
            raise TrainError(
                f"the run ends at step {self.trainer.done}: {verdict.reason}. The last whole checkpoint is {path}; "
                "look at events.jsonl before you begin again from there (a lower --lr, other --data)"
            )
        came_from = self.trainer.done
        self.trainer.roll_back(checkpoint)
        # The file has not the rate, the data and the shape with which the run goes on.
        self.saved_at, self.returned = None, True
        log.warning(
            "step %d: %s; back to %s, learning rate x %g, on new data",
            *(came_from, verdict.reason, path.name, self.watch.sentinel.heat),
        )
        self.run.event(
            "roll_back", step=came_from, to=self.trainer.done, reason=verdict.reason, rate=self.watch.sentinel.heat
        )

    def _write_events(self, step: int) -> None:
        """The trainer's word on a step that is over, or was left."""
        for kind, fields in self.trainer.events:
            self.run.event(kind, step=step, **fields)
            if kind == "out_of_memory":
                log.warning(
                    "step %d: out of memory (%s): %s -> %s", step, *(fields[k] for k in ("where", "from", "to"))
                )
        self.trainer.events = []

    def record(self, result: StepResult, seconds: float, val_loss: float | None) -> None:
        """One line of statistics, and the step's events."""
        trainer, done = self.trainer, self.trainer.done
        self._write_events(done)
        weights = sum(m.weights for m in result.moved.values())
        flips = sum(m.flips for m in result.moved.values())
        self.run.stats(
            step=done,
            loss=result.loss,
            val_loss=val_loss,
            flips=flips,
            flip_rate=flips / weights if weights else 0.0,
            clipped=sum(m.clipped for m in result.moved.values()),
            tokens=trainer.tokens,
            answer_tokens=result.answer_tokens,
            tokens_per_s=result.tokens / seconds,
            seconds=seconds,
            data=trainer.batches.position,
            data_seconds=round(result.data_seconds, 6),
            lr=result.rate,
            peel_phase=trainer.supervisor.phase(done - 1),
            thawed_layers=len(trainer.supervisor.now or ()),
            sentinel=result.verdict.kind,
            skipped=result.skipped,
            micro_batches=result.micro_batches,
            seq_len=trainer.batches.seq_len,
            batch_size=trainer.batches.batch_size,
            mem_peak_bytes=memory_peak(self.settings.device),
            agreement={n: a for n, (a, _) in result.agreement.items()},
            agreement_control={n: c for n, (_, c) in result.agreement.items()},
            consensus=result.consensus,
            seconded=result.seconded,
            governor=self.watch.governor.braked() if self.watch.governor else {},
            measured=result.measured,
            movement=result.movement,
            vote_pressure=result.pressure,
            flips_by_layer=result.flips,
            flip_rate_by_grid={n: m.flip_rate for n, m in result.moved.items()},
        )
        if result.verdict.kind not in ("ok", "roll_back", "end"):
            self.run.event(result.verdict.kind, step=done, reason=result.verdict.reason, micro_batches=result.skipped)
            log.warning("step %d: %s", done, result.verdict.reason)

    def go(self) -> Path:
        """Run until ``--steps`` or a signal; the path of the last checkpoint.

        Raises:
            TrainError: the sentinel ended the run, or memory cannot hold it.
            CheckpointError, OSError: nothing can be written any more.
            DataError: the data end, or have changed.
        """
        try:
            return self._go()
        except Exception as error:
            if self.trainer.undealt is not None:
                # Hours may have passed since the last save, and nothing but data was missing.
                with contextlib.suppress(OSError):
                    log.info("%s; continue with --resume when the data can be read", self.save_where_it_stops())
            # A full disk may have ended the run, and has no room for these lines either.
            with contextlib.suppress(OSError):
                self._write_events(self.trainer.done)
                self.run.event("failed", step=self.trainer.done, reason=str(error))
            raise
        finally:
            self.stop.restore()

    def _go(self) -> Path:
        trainer, settings = self.trainer, self.settings
        begun, half = trainer.done, trainer.half
        if begun == 0 and half is None:
            val_loss = self.evaluate()
            if val_loss is not None:
                self.run.event("evaluation", step=0, val_loss=val_loss)
            self.save(val_loss)
        with tqdm(total=settings.steps, initial=begun, desc="train", unit="step", disable=None) as bar:
            while trainer.done < settings.steps and self.stop.signal is None:
                self._step(bar)
        if self.stop.signal is not None:
            self.run.event("signal", step=trainer.done, signal=self.stop.signal)
            if trainer.done == begun and self.path is None and trainer.half is half and not self.returned:
                log.info("%s: nothing to save, step %d was not left", self.stop.signal, trainer.done)
                return self.started_from
            log.info("%s: %s; continue with --resume", self.stop.signal, self.save_where_it_stops())
        assert self.path is not None, "the last step is always saved"
        if trainer.done == settings.steps and self.best is not None:
            log.info(
                "%d steps are done; the lowest held-out loss is %.4f, of step %d: %s",
                *(trainer.done, self.best["val_loss"], self.best["step"], self.folder.best),
            )
        return self.path

    def _step(self, bar: Any) -> None:
        trainer, settings = self.trainer, self.settings
        started = time.perf_counter()
        try:
            result = trainer.step()
        except StepPaused:
            # Of the step that was left.
            self._write_events(trainer.done + 1)
            return
        except VotesLost as error:
            self._write_events(trainer.done + 1)
            self._lost(error)
            bar.n = trainer.done
            return
        if trainer.done > self.lost_after:
            self.votes_lost = 0
        seconds = result.earlier_seconds + time.perf_counter() - started
        done, verdict = trainer.done, result.verdict
        sound = verdict.kind not in ("roll_back", "end")
        last = sound and done == settings.steps
        save = last or (done % settings.save_every == 0 and sound and self.watch.sentinel.streak == 0)
        look = last or (settings.eval_every and (save or done % settings.eval_every == 0))
        val_loss = self.evaluate() if look and sound else None
        self.record(result, seconds, val_loss)
        if not sound:
            self.return_to(verdict)
            bar.n = trainer.done
            return
        bar.update()
        memory = memory_peak(settings.device) / GIB
        shown = {
            "loss": f"{result.loss:.4f}",
            "tok/s": f"{result.tokens / seconds:.0f}",
            "flips": f"{sum(m.flips for m in result.moved.values()):,}",
            "mem": f"{memory:.1f}G",
        }
        bar.set_postfix(shown | ({"held-out": f"{val_loss:.4f}"} if val_loss is not None else {}))
        if bar.disable:
            self._say(result, seconds, val_loss, save)
        leaving = self.stop.signal is not None
        if settings.sample_every and (last or done % settings.sample_every == 0) and not leaving:
            self.sample()
        if save:
            self.save(val_loss, assess=not leaving)

    def _say(self, result: StepResult, seconds: float, val_loss: float | None, save: bool) -> None:
        """A line now and then where there is no terminal to draw a bar on: a log, a pipe."""
        done, steps = self.trainer.done, self.settings.steps
        first, self.paces = self.paces is None, self.paces or []
        if not first:
            # What the first one takes, compiling kernels and measuring rows, says nothing of the others.
            self.paces.append(seconds)
        if not (save or first or val_loss is not None):
            return
        held = f", held out {val_loss:.4f}" if val_loss is not None else ""
        pace = ""
        if self.paces:
            left = timedelta(seconds=round(mean(self.paces) * (steps - done)))
            pace = f"; {mean(self.paces):.1f} s a step, {left} left"
        log.info("step %d of %d: loss %.4f%s%s", done, steps, result.loss, held, pace)

    def _lost(self, error: VotesLost) -> None:
        """Go on from a checkpoint, in a smaller shape: in the same one memory would run out again."""
        self.votes_lost += 1
        self.lost_after = max(self.lost_after, self.trainer.done)
        if self.votes_lost > 3:
            raise TrainError(f"{error}; for the fourth time before step {self.lost_after + 1} was over") from error
        self.return_to(Verdict("roll_back", str(error), self.trainer.done))
        self.trainer.shrink("votes were lost")
        self._write_events(self.trainer.done)

"""Fine-tune a PRIME checkpoint by integer votes.

    python qwen_prime_train.py --checkpoint coder_prime_init.pt --data records.jsonl --output-dir runs/coder

A step is ``--grad-accum`` micro-batches. Each one's backward pass casts votes and leaves no weight gradient behind;
at the end of the step the votes move the weights. Norms and biases, the only float parameters, follow a small AdamW.
The loss of a step is the mean over all its answer tokens, however they are spread over micro-batches.

A micro-batch whose loss or gradients are not finite leaves no trace: it is skipped, and if it broke in the middle of
the backward pass the votes that it had cast are taken back by casting them again with the opposite sign.
``stats.jsonl`` gets one line a step; checkpoints are whole training states, and ``--resume`` goes on bit for bit.
"""

from __future__ import annotations

import logging
import math
import re
import resource
import signal
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from types import FrameType
from typing import Any, Literal

import torch
from tqdm import tqdm
from transformers import PreTrainedModel

import prime_cli
from ghost_core import Ballot, GhostError, MomentumRule, Movement, apply_votes, grids_of, name_grids
from ghost_kernels import VoteUnits
from prime_checkpoint import CheckpointError, created_by, load_checkpoint, save_checkpoint
from prime_telemetry import RunLog
from qwen_prime_data import (
    Batch,
    DataError,
    EncodedSet,
    PackedBatches,
    describe,
    encode_records,
    evaluation_batches,
    read_records,
)
from qwen_prime_wrapper import (
    ModelError,
    answer_loss,
    mean_answer_loss,
    model_from_checkpoint,
    model_tensors,
    tokenizer_from_checkpoint,
)

log = logging.getLogger("train")


class TrainError(RuntimeError):
    """A run that cannot start or go on."""


@dataclass(frozen=True)
class TrainConfig:
    """Fine-tune a PRIME checkpoint by integer votes."""

    checkpoint: Path
    """Where to start: NAME_prime_init.pt, or a training checkpoint."""
    data: Path
    """Records to learn: .jsonl, .json, .txt or a folder; where records carry a split, those of "train"."""
    output_dir: Path
    """The run's folder: config, statistics, events and checkpoints."""
    eval_data: Path | None = None
    """Held-out records; by default those of --data whose split is "eval", if there are any."""
    steps: int = 300
    """How many steps in all."""
    seq_len: int = 512
    """Tokens in a packed row."""
    batch_size: int = 1
    """Rows in a micro-batch."""
    grad_accum: int = 32
    """Micro-batches in a step."""
    lr: float = 1e-4
    """Learning rate of weights, norms and biases alike, of the size that suits AdamW."""
    schedule: Literal["cosine", "constant"] = "cosine"
    """After the warm-up: cosine to a tenth of --lr, or constant."""
    warmup: int = 10
    """Steps over which the learning rate rises."""
    vote_rule: Literal["momentum"] = "momentum"
    """The vote rule; see ghost_core.py."""
    beta: float = MomentumRule.beta
    """Share of the votes that survives a step."""
    gradient_checkpointing: bool = True
    """Recompute activations in the backward pass: less memory, more time, the same votes."""
    eval_every: int = 50
    """Steps between held-out evaluations; 0 evaluates only before the first step and at the end."""
    save_every: int = 100
    """Steps between checkpoints; the last step always has one."""
    keep_last: int = 3
    """How many of the run's checkpoints to keep."""
    seed: int = 0
    """Decides the order of the data and every random draw of the votes."""
    device: str = "cuda" if torch.cuda.is_available() else "cpu"
    """Where to train."""
    resume: bool = False
    """Go on from the newest checkpoint of --output-dir."""

    def __post_init__(self) -> None:
        for name in ("steps", "seq_len", "batch_size", "grad_accum", "save_every", "keep_last"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name.replace('_', '-')} is {getattr(self, name)}, expected at least 1")
        for name in ("warmup", "eval_every"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name.replace('_', '-')} is {getattr(self, name)}, expected at least 0")
        if not (0 <= self.lr <= 1):
            raise ValueError(f"lr is {self.lr}, expected 0 to 1")
        MomentumRule(beta=self.beta)
        VoteUnits.for_int16(self.grad_accum)


def learning_rate(config: TrainConfig, step: int) -> float:
    """Rate of a step, counted from 0."""
    if step < config.warmup:
        return config.lr * (step + 1) / config.warmup
    if config.schedule == "constant":
        return config.lr
    share = (step - config.warmup) / max(1, config.steps - config.warmup)
    return config.lr * (0.1 + 0.45 * (1 + math.cos(math.pi * min(share, 1.0))))


@dataclass
class StepResult:
    """What one step did."""

    loss: float
    tokens: int
    answer_tokens: int
    skipped: int
    moved: dict[str, Movement]


class VoteTrainer:
    """The training state and the one operation on it, :meth:`step`; knows nothing of files or screens.

    Owns the model (mutated), the ballot, the float optimizer and the data cursor.
    """

    def __init__(self, model: PreTrainedModel, batches: PackedBatches, config: TrainConfig) -> None:
        self.model = model
        self.batches = batches
        self.config = config
        self.done = 0
        self.tokens = 0
        self.ballot = Ballot(seed=config.seed, rule=MomentumRule(beta=config.beta))
        name_grids(model, self.ballot)
        self.grids = grids_of(model)
        for grid in self.grids.values():
            grid.unlock()
        self.floats = dict(model.named_parameters())
        self.optimizer = torch.optim.AdamW(self.floats.values(), lr=config.lr, betas=(0.9, 0.99), weight_decay=0.0)
        if config.gradient_checkpointing:
            # The newer name where transformers has it; the older one warns there.
            enable = getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)
            enable({"use_reentrant": False})
        model.train()

    def step(self) -> StepResult:
        """One step: measure what has no yardstick yet, cast the votes of every micro-batch, apply them."""
        count = self.config.grad_accum
        micro_batches = [next(self.batches) for _ in range(count)]
        answers = sum(b.answer_tokens for b in micro_batches)
        if answers == 0:
            raise TrainError(f"step {self.done} has no answer token: the data has nothing to learn at this seq-len")
        rate = learning_rate(self.config, self.done)
        weight = count / answers
        self._measure(micro_batches[0], weight)
        total, learned, skipped = 0.0, 0, 0
        for k, batch in enumerate(micro_batches):
            nats = self._cast(batch, k, weight)
            if nats is None:
                skipped += 1
            else:
                total += nats
                learned += batch.answer_tokens
        moved: dict[str, Movement] = {}
        if skipped < count:
            self.ballot.close()
            moved = apply_votes(self.grids, rate)
            self._step_floats(rate, count)
        self.optimizer.zero_grad(set_to_none=True)
        self.done += 1
        tokens = sum(b.tokens for b in micro_batches)
        self.tokens += tokens
        return StepResult(total / learned if learned else math.nan, tokens, answers, skipped, moved)

    def _loss(self, batch: Batch) -> torch.Tensor:
        device = self.config.device
        loss, _ = answer_loss(
            self.model, batch.input_ids.to(device), batch.labels.to(device), batch.position_ids.to(device)
        )
        return loss

    def _measure(self, batch: Batch, weight: float) -> None:
        """Give grids without an observation their first, from the step's first micro-batch; no votes."""
        waiting = [g for g in self.grids.values() if g.waiting]
        if not waiting:
            return
        self.ballot.open("measure", self.done, 0, self.config.grad_accum)
        self.ballot.non_finite.clear()
        loss = self._loss(batch)
        if math.isfinite(loss.item()):
            (loss * weight).backward()
            for grid in waiting:
                grid.finish_measuring()
        self.ballot.close()
        self.optimizer.zero_grad(set_to_none=True)

    def _cast(self, batch: Batch, k: int, weight: float) -> float | None:
        """Votes of one micro-batch; its summed loss, or None where it was not finite and left no trace."""
        before = {n: None if p.grad is None else p.grad.clone() for n, p in self.floats.items()}
        self.ballot.open("cast", self.done, k, self.config.grad_accum)
        self.ballot.non_finite.clear()
        loss = self._loss(batch)
        nats = loss.item()
        if not math.isfinite(nats):
            return None
        (loss * weight).backward()
        broken = bool(self.ballot.non_finite) or any(
            p.grad is not None and not bool(torch.isfinite(p.grad).all()) for p in self.floats.values()
        )
        if broken:
            self.ballot.open("retract", self.done, k, self.config.grad_accum)
            (self._loss(batch) * weight).backward()
            for name, parameter in self.floats.items():
                parameter.grad = before[name]
            return None
        return nats

    def _step_floats(self, rate: float, count: int) -> None:
        for parameter in self.floats.values():
            if parameter.grad is not None:
                parameter.grad.div_(count)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.step()

    def state(self) -> dict[str, Any]:
        """Everything beside the model's tensors that the next step depends on, as a checkpoint's ``train_state``."""
        return {
            "step": self.done,
            "tokens": self.tokens,
            "seed": self.config.seed,
            "vote_rule": self.config.vote_rule,
            "micro_batches": self.config.grad_accum,
            "data": self.batches.state_dict(),
            "float_optimizer": self.optimizer.state_dict(),
        }

    def votes(self) -> dict[str, dict[str, torch.Tensor]]:
        """Vote state of the unlocked grids."""
        return {name: grid.vote_state() for name, grid in self.grids.items() if grid.unlocked}

    def restore(self, checkpoint: dict[str, Any]) -> None:
        """Continue from a training checkpoint of the same run.

        Raises:
            TrainError: another seed or number of micro-batches; votes are counted in units that depend on them.
        """
        state = checkpoint["train_state"]
        for name, mine in (("seed", self.config.seed), ("micro_batches", self.config.grad_accum)):
            if state[name] != mine:
                raise TrainError(f"cannot resume: the checkpoint has {name} {state[name]}, this run {mine}")
        self.done, self.tokens = state["step"], state["tokens"]
        self.batches.load_state_dict(state["data"])
        self.optimizer.load_state_dict(state["float_optimizer"])
        for name, grid in self.grids.items():
            grid.load_vote_state(checkpoint["votes"].get(name, {}))


# -- files ------------------------------------------------------------------------------------------------------------


def run_name(checkpoint: Path) -> str:
    """NAME of NAME_prime_init.pt or NAME_prime_step_N.pt."""
    return re.sub(r"_prime_(init|step_\d+)$", "", checkpoint.stem)


def saved_steps(folder: Path, name: str) -> list[tuple[int, Path]]:
    """The run's checkpoints by step, oldest first."""
    pattern = re.compile(re.escape(name) + r"_prime_step_(\d+)\.pt")
    found = [(int(m.group(1)), f) for f in folder.glob("*.pt") if (m := pattern.fullmatch(f.name))]
    return sorted(found)


def newest_checkpoint(folder: Path, name: str) -> tuple[Path, dict[str, Any]]:
    """The newest checkpoint that is whole; damaged ones are named in the log and passed over.

    Raises:
        TrainError: none.
    """
    for _, file in reversed(saved_steps(folder, name)):
        try:
            return file, load_checkpoint(file)
        except CheckpointError as error:
            log.warning("passing over %s: %s", file, error)
    raise TrainError(f"nothing to resume: {folder} has no whole {name}_prime_step_N.pt; leave --resume out to begin")


def save(trainer: VoteTrainer, base: dict[str, Any], config: TrainConfig, name: str) -> Path:
    """Write the whole training state, then remove all but the last ``--keep-last`` checkpoints."""
    path = config.output_dir / f"{name}_prime_step_{trainer.done}.pt"
    checkpoint = {
        **{key: base[key] for key in ("format", "version", "hf_config", "tokenizer", "manifold", "source")},
        "stage": "train",
        "model": {n: t.detach().cpu().contiguous() for n, t in model_tensors(trainer.model).items()},
        "probes": {},
        "votes": {n: {k: t.cpu() for k, t in s.items()} for n, s in trainer.votes().items()},
        "train_state": trainer.state(),
        "created_by": created_by("qwen_prime_train.py"),
    }
    save_checkpoint(checkpoint, path)
    for _, old in saved_steps(config.output_dir, name)[: -config.keep_last]:
        old.unlink()
    return path


def load_data(config: TrainConfig, tokenizer: Any) -> tuple[EncodedSet, EncodedSet | None]:
    """Training records and, where there are any, held-out ones, encoded with the checkpoint's tokenizer."""
    records = read_records(config.data, split="train")
    encoded = encode_records(records, tokenizer, config.seq_len)
    log.info(describe(records, encoded))
    if config.eval_data is None and records.split is None:
        return encoded, None
    held_out = read_records(config.eval_data or config.data, split="eval")
    if not held_out.records:
        return encoded, None
    held = encode_records(held_out, tokenizer, config.seq_len)
    log.info("held out: " + describe(held_out, held))
    return encoded, held


def peak_memory(device: str) -> int:
    """Peak bytes on the device, or peak resident memory of the process on the CPU."""
    if torch.device(device).type == "cuda":
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


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


def train(
    trainer: VoteTrainer, held: EncodedSet | None, base: dict[str, Any], config: TrainConfig, run: RunLog
) -> Path:
    """Run until ``--steps`` or a signal; the path of the last checkpoint."""
    name = run_name(config.checkpoint)
    pad = trainer.batches.pad_id
    if held is not None and trainer.done == 0:
        rows = evaluation_batches(held, config.seq_len, config.batch_size, pad)
        run.event("evaluation", step=0, val_loss=mean_answer_loss(trainer.model, rows)[0])
    stop = _StopFlag()
    path: Path | None = None
    bar = tqdm(total=config.steps, initial=trainer.done, desc="train", unit="step", disable=None)
    try:
        while trainer.done < config.steps and stop.signal is None:
            started = time.perf_counter()
            result = trainer.step()
            seconds = time.perf_counter() - started
            done = trainer.done
            last = done == config.steps or stop.signal is not None
            val_loss = None
            if held is not None and (last or (config.eval_every and done % config.eval_every == 0)):
                rows = evaluation_batches(held, config.seq_len, config.batch_size, pad)
                val_loss = mean_answer_loss(trainer.model, rows)[0]
            weights = sum(m.weights for m in result.moved.values())
            flips = sum(m.flips for m in result.moved.values())
            run.stats(
                step=done,
                loss=result.loss,
                val_loss=val_loss,
                flips=flips,
                flip_rate=flips / weights if weights else 0.0,
                tokens=trainer.tokens,
                answer_tokens=result.answer_tokens,
                tokens_per_s=result.tokens / seconds,
                lr=learning_rate(config, done - 1),
                peel_phase="all open",
                thawed_layers=trainer.model.config.num_hidden_layers,
                sentinel="ok" if not result.skipped else f"skipped {result.skipped} micro-batches",
                mem_peak_bytes=peak_memory(config.device),
                flip_rate_by_grid={n: m.flip_rate for n, m in result.moved.items()},
            )
            if result.skipped:
                run.event("non_finite", step=done, micro_batches=result.skipped)
                log.warning("step %d: %d micro-batches were not finite and left no trace", done, result.skipped)
            bar.update()
            shown = {"loss": f"{result.loss:.4f}", "tok/s": f"{result.tokens / seconds:.0f}", "flips": f"{flips:,}"}
            bar.set_postfix(shown | ({"held-out": f"{val_loss:.4f}"} if val_loss is not None else {}))
            if last or done % config.save_every == 0:
                path = save(trainer, base, config, name)
                run.event("save", step=done, path=path)
    finally:
        bar.close()
        stop.restore()
    if stop.signal is not None:
        run.event("signal", step=trainer.done, signal=stop.signal)
        log.info("%s: saved %s after step %d; continue with --resume", stop.signal, path, trainer.done)
    if path is None:
        raise TrainError(f"nothing to do: the checkpoint is at step {trainer.done} of {config.steps}; raise --steps")
    return path


def main(config: TrainConfig) -> int:
    name = run_name(config.checkpoint)
    existing = saved_steps(config.output_dir, name)
    if existing and not config.resume:
        raise TrainError(
            f"{config.output_dir} holds a run ({existing[-1][1].name}): add --resume, or choose another folder"
        )
    source = config.checkpoint
    if config.resume:
        source, checkpoint = newest_checkpoint(config.output_dir, name)
    else:
        checkpoint = load_checkpoint(source)
    tokenizer = tokenizer_from_checkpoint(checkpoint)
    model = model_from_checkpoint(checkpoint)
    model.to(torch.device(config.device))  # type: ignore[arg-type]
    context = model.config.max_position_embeddings
    if config.seq_len > context:
        raise TrainError(f"seq-len is {config.seq_len}, the model's context {context}: choose at most that")
    encoded, held = load_data(config, tokenizer)
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    batches = PackedBatches(encoded, seq_len=config.seq_len, batch_size=config.batch_size, pad_id=pad, seed=config.seed)
    trainer = VoteTrainer(model, batches, config)
    if config.resume:
        trainer.restore(checkpoint)
    run = RunLog(config.output_dir)
    run.config({**asdict(config), "started_from": source, "created_by": created_by("qwen_prime_train.py")})
    run.event("start", step=trainer.done, checkpoint=source)
    path = train(trainer, held, checkpoint, config, run)
    run.event("end", step=trainer.done, path=path)
    log.info("%s", path)
    return 0


if __name__ == "__main__":
    raise SystemExit(
        prime_cli.run(TrainConfig, main, (TrainError, DataError, ModelError, CheckpointError, GhostError, OSError))
    )

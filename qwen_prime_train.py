"""Fine-tune a PRIME checkpoint by integer votes.

    python qwen_prime_train.py --checkpoint coder_prime_init.pt --data records.jsonl --output-dir runs/coder

The step itself is in ``vote_trainer.py``; this script reads records, writes statistics and checkpoints, and stops well.
``stats.jsonl`` gets one line a step; checkpoints are whole training states, and ``--resume`` goes on bit for bit.
"""

from __future__ import annotations

import logging
import re
import resource
import signal
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from tqdm import tqdm
from transformers import PreTrainedModel

import manifolds
import prime_cli
from ghost_core import GhostError, grids_of
from prime_checkpoint import CheckpointError, created_by, load_checkpoint, save_checkpoint
from prime_telemetry import RunLog
from qwen_prime_data import (
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
    manifold_record,
    mean_answer_loss,
    model_from_checkpoint,
    model_tensors,
    tokenizer_from_checkpoint,
)
from vote_rules import RuleError
from vote_trainer import Recipe, TrainError, VoteTrainer, learning_rate

log = logging.getLogger("train")


@dataclass(frozen=True, kw_only=True)
class TrainConfig(Recipe):
    """Fine-tune a PRIME checkpoint by integer votes."""

    checkpoint: Path
    """Where to start: NAME_prime_init.pt, or a training checkpoint."""
    data: Path
    """Records to learn: .jsonl, .json, .txt or a folder; where records carry a split, those of "train"."""
    output_dir: Path
    """The run's folder: config, statistics, events and checkpoints."""
    eval_data: Path | None = None
    """Held-out records; by default those of --data whose split is "eval", if there are any."""
    seq_len: int = 512
    """Tokens in a packed row."""
    batch_size: int = 1
    """Rows in a micro-batch."""
    eval_every: int = 50
    """Steps between held-out evaluations; 0 evaluates only before the first step and at the end."""
    save_every: int = 100
    """Steps between checkpoints; the last step always has one."""
    keep_last: int = 3
    """How many of the run's checkpoints to keep."""
    resume: bool = False
    """Go on from the newest checkpoint of --output-dir."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("seq_len", "batch_size", "save_every", "keep_last"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name.replace('_', '-')} is {getattr(self, name)}, expected at least 1")
        if self.eval_every < 0:
            raise ValueError(f"eval-every is {self.eval_every}, expected at least 0")


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


def make_compact(model: PreTrainedModel, checkpoint: dict[str, Any]) -> dict[str, Any]:
    """Move a model (mutated) to the manifold ``compact``; the checkpoint as it is to be saved from then on."""
    target = manifolds.build("compact")
    reports = {name: grid.move_to(target) for name, grid in grids_of(model).items()}
    lowest = min(reports, key=lambda name: reports[name].snr_db)
    log.info(
        "rule compact: the weights move from the manifold %s to compact, lowest SNR %.1f dB (%s)",
        *(checkpoint["manifold"]["name"], reports[lowest].snr_db, lowest),
    )
    return {**checkpoint, "manifold": manifold_record(target)}


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
    started_at = saved_at = trainer.done

    def keep() -> None:
        nonlocal path, saved_at
        path, saved_at = save(trainer, base, config, name), trainer.done
        run.event("save", step=saved_at, path=path)

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
            clipped = sum(m.clipped for m in result.moved.values())
            run.stats(
                step=done,
                loss=result.loss,
                val_loss=val_loss,
                flips=flips,
                flip_rate=flips / weights if weights else 0.0,
                clipped=clipped,
                tokens=trainer.tokens,
                answer_tokens=result.answer_tokens,
                tokens_per_s=result.tokens / seconds,
                lr=learning_rate(trainer.recipe, done - 1),
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
                keep()
        if started_at < trainer.done != saved_at:
            # The signal came after its step had been found not to be the last.
            keep()
    finally:
        bar.close()
        stop.restore()
    if stop.signal is not None:
        run.event("signal", step=trainer.done, signal=stop.signal)
        if path is None:
            log.info("%s: nothing to save, step %d was not left", stop.signal, trainer.done)
            return config.checkpoint
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
    if config.rule().vote_bits and not checkpoint["manifold"]["vote_bits"]:
        checkpoint = make_compact(model, checkpoint)
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
    run.config(
        {
            **asdict(config),
            "lr": trainer.recipe.lr,
            "started_from": source,
            "created_by": created_by("qwen_prime_train.py"),
        }
    )
    run.event("start", step=trainer.done, checkpoint=source)
    path = train(trainer, held, checkpoint, config, run)
    run.event("end", step=trainer.done, path=path)
    log.info("%s", path)
    return 0


if __name__ == "__main__":
    raise SystemExit(
        prime_cli.run(
            TrainConfig, main, (TrainError, RuleError, DataError, ModelError, CheckpointError, GhostError, OSError)
        )
    )

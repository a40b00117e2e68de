"""Fine-tune a PRIME checkpoint by integer votes, unattended.

    python qwen_prime_train.py --checkpoint coder_prime_init.pt --data records.jsonl --output-dir runs/coder
    python qwen_prime_train.py --checkpoint coder_prime_init.pt --plan

The step is in ``vote_trainer.py``, what watches over it in ``night_shift.py``, what is done between steps in
``training_session.py``; this script brings a checkpoint, data and a folder together and begins or goes on. ``--resume``
goes on bit for bit, in the middle of a step if that is where Ctrl-C came. ``--plan`` says what a run needs of which
memory, and trains nothing.
"""

from __future__ import annotations

import logging
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

import manifolds
import memory_plan
import prime_cli
from answer_masks import EncodedSet
from ballots import RuleError
from ghost_core import grids_of
from ghost_grid import GhostError
from night_shift import LayerPeel, NightShiftError, PeelError
from packed_batches import PackedBatches
from prime_checkpoint import CheckpointError, created_by, load_checkpoint, walk_tensors
from prime_device import (
    GIB,
    DeviceError,
    check_device,
    make_deterministic,
    may_keep_freed_memory,
    memory_available,
    memory_total,
    return_freed_memory,
)
from prime_telemetry import this_process
from qwen_prime_wrapper import (
    ModelError,
    build_model,
    manifold_of,
    manifold_record,
    model_from_checkpoint,
    model_tensors,
    tokenizer_from_checkpoint,
)
from run_folder import RunFolder, RunLocked, run_name
from text_records import DataError
from training_data import DataSettings, TrainingData, open_data, revisions_of
from training_recipe import TrainError
from training_session import RunSettings, Session
from vote_trainer import VoteTrainer

log = logging.getLogger("train")


@dataclass(frozen=True, kw_only=True)
class RunFiles:
    """What a run reads and where it writes."""

    checkpoint: Path
    """Where to start: NAME_prime_init.pt, or a training checkpoint."""
    data: str | None = None
    """What to learn: a .jsonl, .json, .parquet or .txt file, a folder of them or of token shards, or a dataset id
    OWNER/NAME[:CONFIG][@REVISION], which is streamed."""
    output_dir: Path | None = None
    """The run's folder: config, statistics, events, samples and checkpoints."""
    eval_data: str | None = None
    """What to score, in the same forms; by default what --data holds out itself, else a share of it (--hold-out)."""
    resume: bool = False
    """Go on from the newest checkpoint of --output-dir."""
    plan: bool = False
    """Print the memory that this run needs, line by line, and what fits; train nothing."""
    memory: float | None = None
    """For --plan: GiB of the card; by default those of --device."""


@dataclass(frozen=True, kw_only=True)
class TrainConfig(DataSettings, RunSettings, RunFiles):
    """Fine-tune a PRIME checkpoint by integer votes."""

    # The bases are written from the last to the first, as --help lists their fields.

    def __post_init__(self) -> None:
        RunSettings.__post_init__(self)
        DataSettings.__post_init__(self)
        if self.memory is not None and not self.memory > 0:
            raise ValueError(f"memory is {self.memory}, expected GiB above 0")
        if not self.plan and (self.data is None or self.output_dir is None):
            raise ValueError("training needs --data and --output-dir (only --plan does not)")


def load_data(config: TrainConfig, tokenizer: PreTrainedTokenizerBase) -> TrainingData:
    """The run's documents, encoded with the checkpoint's tokenizer; those of the hub as they were when it began."""
    assert config.data is not None and config.output_dir is not None, "checked by the config"
    revisions = revisions_of(config.output_dir) if config.resume else {}
    found = open_data(config.data, config.eval_data, tokenizer, config.seq_len, config, config.seed, revisions)
    log.info(found.summary)
    return found


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


def plan_settings(config: TrainConfig) -> memory_plan.Settings:
    """What of a run decides its memory."""
    return memory_plan.Settings(
        vote_rule=config.vote_rule,
        vote_buffer=config.vote_buffer,
        seq_len=config.seq_len,
        batch_size=config.batch_size,
        grad_accum=config.grad_accum,
        peel=LayerPeel.parse(config.peel, config.peel_window),
        gradient_checkpointing=config.gradient_checkpointing,
        compute=config.compute,
        cuda=torch.device(config.device).type == "cuda" or config.memory is not None,
    )


def settle_memory(config: TrainConfig, checkpoint: dict[str, Any]) -> None:
    """Decide, before the first large tensor, what becomes of freed memory: kept for speed where there is plenty."""
    on_cpu = torch.device(config.device).type == "cpu"
    if on_cpu:
        model = build_model(checkpoint["hf_config"], manifold_of(checkpoint), str(config.checkpoint))
        need = memory_plan.total(memory_plan.budget(model, plan_settings(config)))
        if may_keep_freed_memory(need, memory_available(config.device)):
            return
    if return_freed_memory() and on_cpu:
        log.info("memory is short: what is freed is given back at once, which costs a third of the speed")


def say_if_disk_is_small(
    trainer: VoteTrainer, config: TrainConfig, checkpoint: dict[str, Any], folder: RunFolder
) -> None:
    """A warning at the start where the disk would fill up during the night."""
    buffer = trainer.ballot.rule.bytes_per_weight - 2
    weights = sum(grid.indices.numel() for grid in trainer.grids.values())
    model = sum(tensor.nbytes for tensor in model_tensors(trainer.model).values())
    floats = sum(parameter.nbytes for parameter in trainer.floats.values())
    beside = sum(tensor.nbytes for key in ("tokenizer", "manifold") for _, tensor in walk_tensors(checkpoint[key]))
    size = model + buffer * weights + 2 * floats + beside
    # One at the beginning of a run, and one at its end.
    saves = (trainer.done == 0) + -(-max(0, config.steps - trainer.done) // config.save_every)
    if (found := folder.lacks_room(size, saves)) is not None:
        log.warning(
            "%s has room for %.1f GB of checkpoints, the run may need %.1f (%.1f each: the last %d, the best, one "
            "being written): lower --keep-last, or the run ends when the disk is full",
            *(folder.folder, found[1] / 1e9, found[0] / 1e9, size / 1e9, folder.keep_last),
        )


def best_of(state: dict[str, Any], held: EncodedSet | None) -> dict[str, Any] | None:
    """Step and loss of a resumed run's best checkpoint, unless that loss is of other documents than ``held``."""
    best, now = state.get("best"), None if held is None else held.fingerprint
    # Checkpoints of before this was kept have none.
    if now == state.get("held_out", now):
        return best
    lost = (
        ""
        if best is None
        else f", and the best so far, {best['val_loss']:.4f} of step {best['step']}, no longer counts"
    )
    log.warning(
        "other documents are held out than before: losses from here on are not to be compared with those in "
        "stats.jsonl%s; the --eval-data that the run began with would go on as it was",
        lost,
    )
    return None


def print_plan(config: TrainConfig, checkpoint: dict[str, Any]) -> int:
    """Print the budget of the run, and which settings fit; 0 if this one does, else 1."""
    model = build_model(checkpoint["hf_config"], manifold_of(checkpoint), str(config.checkpoint))
    available = round(config.memory * GIB) if config.memory else memory_total(config.device)
    text, fits = memory_plan.report(model, plan_settings(config), available)
    print(f"matrix products in {config.compute} (cards before Ampere have no bfloat16: --compute float32)\n{text}")
    context = model.config.max_position_embeddings
    if config.seq_len > context:
        print(f"\nseq-len is {config.seq_len}, the model's context {context}: training will want at most that")
    return 0 if fits else 1


def main(config: TrainConfig) -> int:
    if config.plan:
        if config.memory is None:
            check_device(config.device)
        return print_plan(config, load_checkpoint(config.checkpoint))
    assert config.output_dir is not None, "checked by the config"
    if config.output_dir.is_file():
        raise TrainError(f"--output-dir {config.output_dir} is a file, expected the folder of a run")
    check_device(config.device)
    make_deterministic(config.device)
    if not config.resume and not config.checkpoint.is_file():
        # It says what is wrong, before there is a folder for nothing.
        load_checkpoint(config.checkpoint)
    folder = RunFolder(config.output_dir, run_name(config.checkpoint), config.keep_last)
    with folder.lock():
        log.info("the last checkpoint is %s", train(config, folder))
    return 0


def train(config: TrainConfig, folder: RunFolder) -> Path:
    """The run in a folder that is locked: begin or go on, to the last step or a signal; path of the last checkpoint."""
    existing = sorted(folder.saved() + folder.stopped())
    if existing and not config.resume:
        raise TrainError(
            f"{folder.folder} holds a run ({existing[-1][1].name}): add --resume, or choose another folder"
        )
    source = config.checkpoint
    if config.resume:
        found = folder.newest_to_resume()
        if found is None:
            raise TrainError(
                f"nothing to resume: {folder.folder} has no whole {folder.name}_prime_step_N.pt"
                + (f", it has those of {', '.join(others)}" if (others := folder.other_names()) else "")
                + ": leave --resume out to begin, or give the --checkpoint that the run began with"
            )
        source, checkpoint = found
        state = checkpoint["train_state"]
        best_here = bool(state.get("best")) and state["best"]["step"] == state["step"]
        # After a return a step is saved a second time; older checkpoints do not say which of the two they are.
        if state.get("is_best", best_here) and "half_step" not in state:
            folder.make_best(source)
        if state["vote_rule"] != config.vote_rule:
            # Before the weights are moved to another manifold for it.
            raise TrainError(
                f"cannot resume: the run has vote_rule {state['vote_rule']}, this command says {config.vote_rule}: add "
                f"--vote-rule {state['vote_rule']}, or begin a new run from the checkpoint"
            )
    else:
        checkpoint = load_checkpoint(source)
        if "half_step" in checkpoint["train_state"]:
            raise TrainError(
                f"{source} was left in the middle of a step: go on with --resume in its own --output-dir, or begin a "
                "new run from a checkpoint of a whole step"
            )
    settle_memory(config, checkpoint)
    tokenizer = tokenizer_from_checkpoint(checkpoint)
    model = model_from_checkpoint(checkpoint)
    model.to(torch.device(config.device))  # type: ignore[arg-type]
    if config.rule().vote_bits and not checkpoint["manifold"]["vote_bits"]:
        checkpoint = make_compact(model, checkpoint)
    context = model.config.max_position_embeddings
    if config.seq_len > context:
        raise TrainError(f"seq-len is {config.seq_len}, the model's context {context}: choose at most that")
    data = load_data(config, tokenizer)
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    batches = PackedBatches(
        data.blocks, seq_len=config.seq_len, batch_size=config.batch_size, pad_id=pad, seed=config.seed
    )
    trainer = VoteTrainer(model, batches, config, config.watch())
    best = None
    if config.resume:
        trainer.restore(checkpoint)
        if any("c2" not in state and "g2" in state for state in checkpoint["votes"].values()):
            log.warning(
                "%s was written before votes measured columns: the run goes on by the present rule, which is not the "
                "future that it had",
                source.name,
            )
        best = best_of(checkpoint["train_state"], data.held)
        if trainer.done >= config.steps:
            raise TrainError(
                f"nothing to do: the checkpoint is at step {trainer.done} of {config.steps}; raise --steps"
            )
    elif checkpoint["stage"] == "train":
        # Where words hold votes, they are those of the run that it comes from.
        for grid in trainer.grids.values():
            grid.forget_votes()
    say_if_disk_is_small(trainer, config, checkpoint, folder)
    base = {key: value for key, value in checkpoint.items() if key not in ("model", "votes")}
    session = Session(trainer, config, base, data.held, tokenizer, best, folder, source)
    settings: dict[str, Any] = {
        **asdict(config),
        "lr": trainer.recipe.lr,
        "started_from": source,
        "revisions": data.revisions,
        "created_by": created_by("qwen_prime_train.py"),
        "backend": trainer.backend,
        "memory_total_bytes": memory_total(config.device),
        "layer_weights": {g.name: sum(grid.indices.numel() for grid in g.grids.values()) for g in trainer.groups},
        "phases": config.watch().peel.phases(config.steps, len(trainer.supervisor.layers)),
    }
    log.info("kernels: %s on %s, products in %s", trainer.backend, config.device, config.compute)
    session.run.config(settings)
    session.run.event("start", step=trainer.done, checkpoint=source, process=this_process())
    del checkpoint
    path = session.go()
    session.run.event("end", step=trainer.done, path=path)
    return path


ERRORS = (
    TrainError,
    RunLocked,
    NightShiftError,
    PeelError,
    RuleError,
    DataError,
    ModelError,
    CheckpointError,
    GhostError,
    DeviceError,
    OSError,
)

if __name__ == "__main__":
    raise SystemExit(prime_cli.run(TrainConfig, main, ERRORS))

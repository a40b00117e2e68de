"""Runs of a random model of two layers, each within a fraction of a second, and ways to disturb them."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
from tiny_models import import_source, tiny_config, write_source

import manifolds
import prime_cli
import qwen_prime_train as train
import vote_casting
import vote_trainer
from vote_casting import Turn, VoteCaster

ARGUMENTS = ["--checkpoint", "x", "--data", "x", "--output-dir", "x"]


def import_everywhere(folder: Path) -> dict[str, Path]:
    """The model, imported on each manifold."""
    source = write_source(folder / "source", tiny_config())
    for name in manifolds.NAMES:
        import_source(source, folder / f"{name}_prime_init.pt", manifold=name)
    return {name: folder / f"{name}_prime_init.pt" for name in manifolds.NAMES}


def quick_config(checkpoint: Path, folder: Path) -> train.TrainConfig:
    """A run of four steps; plain texts, since the model's tokenizer knows no roles."""
    lines = [{"text": f"abc {i} " * (2 + i % 5), "split": "train" if i < 40 else "eval"} for i in range(46)]
    data = folder / "texts.jsonl"
    data.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return train.TrainConfig(
        checkpoint=checkpoint,
        data=data,
        output_dir=folder / "quick",
        steps=4,
        seq_len=64,
        batch_size=1,
        grad_accum=6,
        lr=4e-3,
        warmup=1,
        eval_every=2,
        save_every=2,
        core_eval=False,
        device="cpu",
    )


def command(config: train.TrainConfig) -> int:
    """Exit code of the command line program with this config."""
    return prime_cli.run(type(config), lambda _: train.main(config), train.ERRORS, ARGUMENTS)


def the_error(printed: str) -> str:
    """The only line of stderr that is an error, its last."""
    lines = printed.splitlines()
    assert [line for line in lines if line.startswith("error: ")] == lines[-1:]
    return lines[-1]


def stop_after(steps: int, config: train.TrainConfig) -> None:
    """Run the script until a signal arrives at the end of a step."""
    trainer_step = train.VoteTrainer.step

    def stopping(self: train.VoteTrainer) -> Any:
        result = trainer_step(self)
        if self.done == steps:
            os.kill(os.getpid(), signal.SIGTERM)
        return result

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train.VoteTrainer, "step", stopping)
        assert train.main(config) == 0


def stop_within(step: int, micro_batch: int, config: train.TrainConfig) -> None:
    """Run the script until a signal arrives in the middle of a step."""
    cast = VoteCaster.cast

    def stopping(self: VoteCaster, batch: Any, turn: Turn) -> Any:
        if (turn.step, turn.number) == (step, micro_batch):
            os.kill(os.getpid(), signal.SIGTERM)
        return cast(self, batch, turn)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(VoteCaster, "cast", stopping)
        assert train.main(config) == 0


def accident(monkeypatch: pytest.MonkeyPatch, change: Any) -> None:
    """Change the loss of a micro-batch while votes are cast: ``change(step, micro_batch)`` is its factor."""
    plain, step = vote_casting.answer_loss, vote_trainer.VoteTrainer.step
    now: list[Any] = []

    def noted(trainer: vote_trainer.VoteTrainer) -> Any:
        now[:] = [trainer.ballot]
        return step(trainer)

    def loss(*inputs: Any) -> Any:
        value, count = plain(*inputs)
        if not now or now[0].mode != "cast":
            return value, count
        return value * change(now[0].step, now[0].micro_batch), count

    monkeypatch.setattr(vote_trainer.VoteTrainer, "step", noted)
    monkeypatch.setattr(vote_casting, "answer_loss", loss)

"""The trainer on the embedded model: it learns, leaves what it should alone, stops and resumes bit for bit."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import prime_cli
import qwen_prime_importer as importer
import qwen_prime_train as train
from prime_checkpoint import load_checkpoint, tensor_sha256, walk_tensors
from prime_telemetry import read_lines
from qwen_prime_data import PackedBatches, encode_records, read_records
from qwen_prime_wrapper import model_from_checkpoint, tokenizer_from_checkpoint

ROOT = Path(__file__).resolve().parent.parent
MODEL = ROOT / "assets" / "tiny_coder"


@pytest.fixture(scope="module")
def init(tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("init") / "tiny_prime_init.pt"
    assert importer.main(importer.ImportConfig(model=str(MODEL), output=output)) == 0
    return output


@pytest.fixture(scope="module")
def records(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A handful of records that a few steps can learn, some of them held out."""
    lines = [
        {"instruction": f"add {i}", "output": f"def add_{i}(x):\n    return x + {i}\n", "split": "train"}
        for i in range(40)
    ]
    lines += [{**line, "instruction": line["instruction"] + " please", "split": "eval"} for line in lines[:6]]
    path = tmp_path_factory.mktemp("data") / "records.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


@pytest.fixture
def config(init: Path, records: Path, tmp_path: Path) -> train.TrainConfig:
    return train.TrainConfig(
        checkpoint=init,
        data=records,
        output_dir=tmp_path / "run",
        steps=4,
        seq_len=128,
        grad_accum=2,
        lr=2e-3,
        warmup=1,
        eval_every=2,
        save_every=2,
        device="cpu",
    )


def make_trainer(config: train.TrainConfig) -> train.VoteTrainer:
    checkpoint = load_checkpoint(config.checkpoint)
    tokenizer = tokenizer_from_checkpoint(checkpoint)
    encoded = encode_records(read_records(config.data, split="train"), tokenizer, config.seq_len, progress=False)
    batches = PackedBatches(
        encoded, seq_len=config.seq_len, batch_size=config.batch_size, pad_id=tokenizer.pad_token_id, seed=config.seed
    )
    return train.VoteTrainer(model_from_checkpoint(checkpoint), batches, config)


def fingerprint(trainer: train.VoteTrainer) -> dict[str, str]:
    """Hash of every tensor that the next step depends on."""
    tree: dict[str, Any] = {
        "model": train.model_tensors(trainer.model),
        "votes": trainer.votes(),
        "state": trainer.state(),
    }
    return {name: tensor_sha256(tensor) for name, tensor in walk_tensors(tree)}


def test_a_run_learns_and_writes_what_it_promises(config: train.TrainConfig) -> None:
    config = replace(config, steps=10, save_every=3, keep_last=2)
    assert train.main(config) == 0
    stats = list(read_lines(config.output_dir / "stats.jsonl"))
    assert [s["step"] for s in stats] == list(range(1, 11))
    promised = ("loss", "val_loss", "flips", "flip_rate", "tokens_per_s", "lr", "peel_phase", "thawed_layers")
    for line in stats:
        assert set(promised) | {"sentinel", "mem_peak_bytes", "timestamp"} <= set(line)
    assert [s["step"] for s in stats if s["val_loss"] is not None] == [2, 4, 6, 8, 10]
    assert stats[-1]["loss"] < 0.7 * stats[0]["loss"]
    assert all(s["flips"] > 0 for s in stats)
    # Every 3 steps and at the end; the last two are kept.
    assert [n for n, _ in train.saved_steps(config.output_dir, "tiny")] == [9, 10]
    assert json.loads((config.output_dir / "config.json").read_text())["lr"] == config.lr
    events = list(read_lines(config.output_dir / "events.jsonl"))
    assert [e["event"] for e in events] == ["start", "evaluation", "save", "save", "save", "save", "end"]
    assert stats[-1]["val_loss"] < 0.8 * events[1]["val_loss"]


def test_every_matrix_moves_and_nothing_has_a_gradient(config: train.TrainConfig) -> None:
    trainer = make_trainer(config)
    before = {n: g.indices.clone() for n, g in trainer.grids.items()}
    floats = {n: p.detach().clone() for n, p in trainer.floats.items()}
    trainer.step()
    for name, grid in trainer.grids.items():
        assert not torch.equal(grid.indices, before[name]), name
    assert any(not torch.equal(p, floats[n]) for n, p in trainer.floats.items())
    assert all(p.grad is None for p in trainer.floats.values())


def test_votes_are_the_same_with_and_without_gradient_checkpointing(config: train.TrainConfig) -> None:
    prints = []
    for checkpointing in (True, False):
        trainer = make_trainer(replace(config, gradient_checkpointing=checkpointing))
        for _ in range(2):
            trainer.step()
        prints.append(fingerprint(trainer))
    assert prints[0] == prints[1]


def test_resume_is_bit_for_bit(config: train.TrainConfig, tmp_path: Path) -> None:
    whole = replace(config, output_dir=tmp_path / "whole")
    assert train.main(whole) == 0
    # The schedule looks at --steps, so the first half is stopped, not shortened.
    half = replace(config, output_dir=tmp_path / "half")
    trainer_step = train.VoteTrainer.step

    def stopping(self: train.VoteTrainer) -> train.StepResult:
        result = trainer_step(self)
        if self.done == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return result

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train.VoteTrainer, "step", stopping)
        assert train.main(half) == 0
    assert [n for n, _ in train.saved_steps(half.output_dir, "tiny")] == [2]
    assert train.main(replace(half, resume=True)) == 0
    ends = [load_checkpoint(f / "tiny_prime_step_4.pt") for f in (whole.output_dir, half.output_dir)]
    first, second = ({n: tensor_sha256(t) for n, t in walk_tensors(c) if "sha256" not in n} for c in ends)
    assert first == second
    assert ends[0]["train_state"]["data"] == ends[1]["train_state"]["data"]
    assert ends[0]["train_state"]["tokens"] == ends[1]["train_state"]["tokens"]


def test_resume_passes_over_a_damaged_checkpoint(config: train.TrainConfig, caplog: pytest.LogCaptureFixture) -> None:
    assert train.main(config) == 0
    newest = config.output_dir / "tiny_prime_step_4.pt"
    data = bytearray(newest.read_bytes())
    data[len(data) // 2] ^= 1
    newest.write_bytes(data)
    path, _ = train.newest_checkpoint(config.output_dir, "tiny")
    assert path.name == "tiny_prime_step_2.pt"
    assert "damaged" in caplog.text


@pytest.mark.parametrize("where", ["loss", "middle"])
def test_a_micro_batch_that_is_not_finite_leaves_no_trace(config: train.TrainConfig, where: str) -> None:
    """Against a run in which that micro-batch never votes."""
    trainer, control = make_trainer(config), make_trainer(config)
    trainer.step()
    control.step()
    loss = trainer._loss
    cast = control._cast

    def poisoned(batch: Any) -> torch.Tensor:
        value = loss(batch)
        if trainer.ballot.mode != "closed" and trainer.ballot.micro_batch == 1:
            return value * torch.nan if where == "loss" else value
        return value

    def skipping(batch: Any, k: int, weight: float) -> float | None:
        return None if k == 1 else cast(batch, k, weight)

    layer = trainer.model.model.layers[2]
    hook = None
    if where == "middle":

        def explode(module: Any, inputs: Any, output: Any) -> Any:
            if trainer.ballot.micro_batch == 1 and output.requires_grad:
                output.register_hook(lambda g: g * torch.inf)
            return output

        hook = layer.register_forward_hook(explode)
    trainer._loss, control._cast = poisoned, skipping  # type: ignore[method-assign]
    result, wanted = trainer.step(), control.step()
    if hook:
        hook.remove()
    assert result.skipped == wanted.skipped == 1
    assert result.loss == wanted.loss
    assert fingerprint(trainer) == fingerprint(control)


def test_a_step_without_a_finite_micro_batch_moves_nothing(config: train.TrainConfig) -> None:
    trainer = make_trainer(config)
    trainer.step()
    indices = {n: tensor_sha256(g.indices) for n, g in trainer.grids.items()}
    votes = {n: tensor_sha256(g.votes) for n, g in trainer.grids.items()}
    loss = trainer._loss
    trainer._loss = lambda batch: loss(batch) * torch.nan  # type: ignore[method-assign]
    result = trainer.step()
    assert result.skipped == config.grad_accum and result.moved == {}
    assert {n: tensor_sha256(g.indices) for n, g in trainer.grids.items()} == indices
    assert {n: tensor_sha256(g.votes) for n, g in trainer.grids.items()} == votes


def test_random_targets_do_not_help_the_held_out_loss(config: train.TrainConfig) -> None:
    """The same number of flips without a signal must not look like learning."""
    losses = {}
    for name in ("true", "random"):
        trainer = make_trainer(replace(config, lr=1e-3))
        held = [next(trainer.batches) for _ in range(2)]
        generator = torch.Generator().manual_seed(1)
        loss = trainer._loss

        def shuffled(batch: Any, loss: Any = loss, generator: torch.Generator = generator) -> torch.Tensor:
            labels = batch.labels.clone()
            wanted = labels != -100
            labels[wanted] = torch.randint(4096, (int(wanted.sum()),), generator=generator)
            return loss(replace(batch, labels=labels))

        if name == "random":
            trainer._loss = shuffled  # type: ignore[method-assign]
        before = float(sum(loss(b).detach() for b in held))
        for _ in range(4):
            trainer.step()
        losses[name] = float(sum(loss(b).detach() for b in held)) / before
    assert losses["true"] < 0.8
    assert losses["random"] > 0.98


def test_the_learning_rate_rises_and_falls() -> None:
    config = train.TrainConfig(checkpoint=Path("a"), data=Path("b"), output_dir=Path("c"), steps=100, warmup=10, lr=1.0)
    rates = [train.learning_rate(config, s) for s in range(100)]
    assert rates[0] == pytest.approx(0.1) and rates[9] == pytest.approx(1.0) and max(rates) <= 1.0
    assert rates[10:] == sorted(rates[10:], reverse=True) and rates[-1] == pytest.approx(0.1, abs=0.01)
    constant = replace(config, schedule="constant")
    assert train.learning_rate(constant, 99) == 1.0


def test_refusals(config: train.TrainConfig, tmp_path: Path) -> None:
    with pytest.raises(train.TrainError, match="context"):
        train.main(replace(config, seq_len=4096))
    with pytest.raises(train.TrainError, match="nothing to resume"):
        train.main(replace(config, resume=True))
    assert train.main(replace(config, steps=1)) == 0
    with pytest.raises(train.TrainError, match="--resume"):
        train.main(config)
    with pytest.raises(train.TrainError, match="raise --steps"):
        train.main(replace(config, steps=1, resume=True))
    with pytest.raises(train.TrainError, match="seed"):
        train.main(replace(config, seed=5, resume=True))
    for wrong in ({"steps": 0}, {"lr": 2.0}, {"beta": 1.0}, {"warmup": -1}, {"grad_accum": 10_000}):
        with pytest.raises(ValueError):
            replace(config, **wrong)
    missing = replace(config, checkpoint=tmp_path / "absent.pt", output_dir=tmp_path / "other")
    assert prime_cli.run(type(missing), lambda _: train.main(missing), (train.CheckpointError,), _arguments()) == 1


def _arguments() -> list[str]:
    return ["--checkpoint", "x", "--data", "x", "--output-dir", "x"]


def test_sigint_in_a_real_process_saves_and_exits_0(config: train.TrainConfig) -> None:
    command = [sys.executable, str(ROOT / "qwen_prime_train.py"), "--checkpoint", str(config.checkpoint)]
    command += ["--data", str(config.data), "--output-dir", str(config.output_dir), "--steps", "10000"]
    command += ["--seq-len", "128", "--grad-accum", "2", "--save-every", "5000", "--device", "cpu"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    stats = config.output_dir / "stats.jsonl"
    deadline = time.monotonic() + 120
    while len(list(read_lines(stats))) < 2 and time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    steps = [s["step"] for s in read_lines(stats)]
    assert [n for n, _ in train.saved_steps(config.output_dir, "tiny")] == [steps[-1]]
    assert "--resume" in errors

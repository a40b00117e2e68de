"""One run of a comparison: equal data and loss for all methods, what it reports."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_models import clone_tree
from tiny_tasks import tiny_task

import manifolds
import prime_quality as quality
from ghost_core import grids_of
from packed_batches import PackedBatches
from quality_tasks import METHODS, QualityError, Task, TaskData, check_method, load_data
from qwen_prime_wrapper import load_model
from training_recipe import Recipe
from vote_trainer import VoteTrainer

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def task(tmp_path_factory: pytest.TempPathFactory) -> Task:
    return tiny_task(tmp_path_factory.mktemp("quality"))


def execute(task: Task, method: str, lr: float, seed: int = 0, steps: int | None = None) -> dict[str, Any]:
    run = quality.Run(task.name, method, lr, seed, steps or task.steps)
    return quality.execute(run, task, Path("nowhere"))


def make_parts(task: Task) -> tuple[Any, TaskData, Callable[[], PackedBatches]]:
    model, tokenizer, _ = load_model(task.model)
    data = load_data(task, tokenizer, Path("nowhere"))
    pad = data.pad_id
    return model, data, lambda: PackedBatches(data.train, seq_len=task.seq_len, batch_size=1, pad_id=pad, seed=0)


def test_dense_and_votes_see_the_same_tokens_and_the_same_loss(task: Task) -> None:
    model, _, batches = make_parts(task)
    hf_config = json.loads((Path(task.model) / "config.json").read_text())
    ghost = quality.to_grid(model, hf_config, manifolds.build())
    recipe = Recipe(
        steps=2, grad_accum=2, lr=0.0, warmup=0, compute="float32", gradient_checkpointing=False, device="cpu"
    )
    dense = quality.DenseTrainer(model, batches(), recipe, METHODS["adamw"])
    votes = VoteTrainer(ghost, batches(), recipe)
    for _ in range(2):
        (loss, tokens), other = dense.step(), votes.step()
        assert tokens == other.tokens
        assert loss == pytest.approx(other.loss, abs=1e-3)


def test_a_dense_step_minimises_the_mean_over_all_answer_tokens(task: Task) -> None:
    """Against one batch with all rows of the step and the mean that torch takes itself."""
    model, data, batches = make_parts(task)
    twin, _, _ = load_model(task.model)
    recipe = Recipe(steps=1, grad_accum=3, lr=1e-3, warmup=0, gradient_checkpointing=False, device="cpu")
    trainer = quality.DenseTrainer(model, batches(), recipe, METHODS["adamw"])
    wide = next(PackedBatches(data.train, seq_len=task.seq_len, batch_size=3, pad_id=data.pad_id, seed=0))
    logits = twin(input_ids=wide.input_ids, position_ids=wide.position_ids, use_cache=False).logits
    torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), wide.labels[:, 1:].flatten()).backward()
    gradients: dict[str, torch.Tensor] = {}
    original = trainer.optimizer.step
    names = {id(p): n for n, p in model.named_parameters()}

    def keep(*_: Any) -> Any:
        gradients.update({names[id(p)]: p.grad.clone() for p in trainer.parameters if p.grad is not None})
        return original()

    trainer.optimizer.step = keep  # type: ignore[method-assign]
    trainer.step()
    assert set(gradients) == {n for n, _ in twin.named_parameters()}
    for name, parameter in twin.named_parameters():
        assert parameter.grad is not None
        torch.testing.assert_close(gradients[name], parameter.grad, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("manifold", [n for n in ("prime-harmonic", "compact") if n in manifolds.NAMES])
def test_a_grid_model_computes_what_the_dense_one_does(task: Task, manifold: str) -> None:
    model, _, _ = make_parts(task)
    hf_config = json.loads((Path(task.model) / "config.json").read_text())
    ghost = quality.to_grid(model, hf_config, manifolds.build(manifold))
    ids = torch.arange(40)[None]
    with torch.no_grad():
        difference = (ghost(input_ids=ids).logits - model(input_ids=ids).logits).abs().max()
        assert difference < (1e-2 if manifold == "prime-harmonic" else 0.5)
    assert {g.manifold.name for g in grids_of(ghost).values()} == {manifold}


@pytest.mark.parametrize("method", ["adamw", "momentum", "supermajority", "stochastic", "compact"])
def test_a_run_learns_and_reports(task: Task, method: str) -> None:
    try:
        check_method(method)
    except QualityError as error:
        pytest.skip(str(error))
    result = execute(task, method, 1e-2 if method != "adamw" else 3e-3)
    assert result["target_after"] < result["target_before"]
    assert result["source_before"] > 0 and result["source_after"] > 0
    steps = [step for step, _ in result["curve"]]
    assert steps == [0, 2, 3, 5, 6]
    assert result["curve"][0][1] == result["target_before"] and result["curve"][-1][1] == result["target_after"]
    if method == "adamw":
        assert result["bytes_per_parameter"] == pytest.approx(16, abs=0.01)
    else:
        # Rows of 48 weights: their states weigh more here than in a real model.
        assert result["bytes_per_parameter"] < 6
    json.dumps(result, allow_nan=False)


def test_a_run_repeats_and_seeds_differ(task: Task) -> None:
    one, two, three = (execute(task, "adamw", 3e-3, seed, steps=2) for seed in (0, 0, 1))
    assert one["target_after"] == two["target_after"] != three["target_after"]
    assert one["target_before"] == three["target_before"] and one["data"] == three["data"]


def test_lora_trains_the_adapters_alone(task: Task) -> None:
    pytest.importorskip("peft")
    model, _, batches = make_parts(task)
    base = clone_tree(dict(model.state_dict()))
    quality.add_adapters(model, seed=0)
    recipe = Recipe(steps=1, grad_accum=2, lr=1e-2, warmup=0, gradient_checkpointing=False, device="cpu")
    trainer = quality.DenseTrainer(model, batches(), recipe, METHODS["lora"])
    trainer.step()
    now = {n.replace(".base_layer", ""): t for n, t in model.state_dict().items()}
    assert all(torch.equal(now[name], tensor) for name, tensor in base.items())
    # Seven linear layers in each of two decoder layers, two factors of each.
    assert len(trainer.parameters) == 2 * 7 * 2
    assert any(n.endswith("lora_B.default.weight") and bool(t.any()) for n, t in now.items())
    assert quality.stored_bytes(trainer) < 16 * sum(p.numel() for p in model.parameters())


def test_8_bit_adamw_learns(task: Task) -> None:
    pytest.importorskip("bitsandbytes")
    result = execute(task, "adamw-8bit", 3e-3)
    assert result["target_after"] < result["target_before"]
    # Matrices of fewer than 4,096 weights keep float32 states, else it would be 10.
    assert 10 < result["bytes_per_parameter"] < 14


def test_a_loss_that_is_not_finite_moves_nothing_and_is_reported_as_none(
    task: Task, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, _, batches = make_parts(task)
    recipe = Recipe(steps=1, grad_accum=2, lr=1e-2, warmup=0, gradient_checkpointing=False, device="cpu")
    trainer = quality.DenseTrainer(model, batches(), recipe, METHODS["adamw"])
    before = clone_tree(dict(model.state_dict()))
    answer_loss = quality.answer_loss
    with monkeypatch.context() as patch:
        patch.setattr(quality, "answer_loss", lambda *a: (answer_loss(*a)[0] * torch.nan, 1))
        assert np.isnan(trainer.step()[0])
    assert all(torch.equal(before[n], t) for n, t in model.state_dict().items())
    monkeypatch.setattr(quality, "mean_answer_loss", lambda *_: (float("nan"), 1))
    assert execute(task, "adamw", 1e-3, steps=1)["target_after"] is None

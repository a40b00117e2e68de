"""The comparison compares like with like: same loss, every method moves what it should, parts add up."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import bench_training as training
from bench_models import dense_model, ghost_model
from bench_tools import version_of
from ghost_core import grids_of

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("name", training.METHODS)
def test_a_step_moves_what_the_method_trains(name: str) -> None:
    method = training.METHODS[name]
    if method.package and version_of(method.package) is None:
        pytest.skip(f"{method.package} is not installed: pip install -r requirements-bench.txt")
    if name == "adamw-8bit-torchao":
        pytest.skip("compiles for half a minute")
    model = training.bare_model("toy", method)
    config = training.TrainBench(precision="float32", seq_len=32, rows=2)
    trained = training.make_trained(model, method, config)
    assert next(trained.batches).input_ids.shape == (2, 32)  # type: ignore[attr-defined]
    if method.vote_rule:
        before = {n: g.indices.clone() for n, g in grids_of(model).items()}
    else:
        before = {n: p.detach().clone() for n, p in model.named_parameters()}
    parts = trained.step(2)
    assert min(parts.micro_batches, parts.end, parts.processor_micro_batches, parts.processor_end) > 0
    if method.vote_rule:
        after = {n: g.indices for n, g in grids_of(model).items()}
        assert 0 < parts.casting < parts.micro_batches and 0 < parts.applying < parts.end
    else:
        after = dict(model.named_parameters())
        assert parts.casting == parts.applying == 0
    moved = {n for n in before if not torch.equal(before[n], after[n])}
    if method.adapters:
        assert moved and all("lora_" in n for n in moved)
    else:
        matrices = {n for n, value in before.items() if value.ndim == 2}
        assert matrices <= moved


def test_dense_methods_recompute_activations_too() -> None:
    config = training.TrainBench(precision="float32", seq_len=32)
    step = training.make_trained(dense_model("toy"), training.METHODS["adamw"], config)
    assert isinstance(step, training.DenseStep)
    layers = step.model.model.layers
    assert all(layer.gradient_checkpointing for layer in layers) and step.model.training


def test_low_rank_methods_project_the_inner_matrices_alone() -> None:
    model = dense_model("toy")
    rest, low = training._by_projection(model, scale=1.0)
    names = {id(p): n for n, p in model.named_parameters()}
    assert low["rank"] == 16
    assert all(".mlp." in names[id(p)] or ".self_attn." in names[id(p)] for p in low["params"])
    assert len(low["params"]) == 2 * 7 and any("embed" in names[id(p)] for p in rest["params"])
    assert len(low["params"]) + len(rest["params"]) == len(names)


def test_a_long_step_is_computed_from_a_short_one() -> None:
    parts = training.Parts(4.0, 1.0, processor_micro_batches=2.0, processor_end=0.5, casting=0.4, applying=0.5)
    assert parts.of_step(2, 32) == 65.0 and parts.processor_of_step(2, 32) == 32.5
    config = training.TrainBench(micro_batches=2, seq_len=100)
    speed = training.Speed((parts, replace(parts, end=2.0), parts), config)
    slower = training.Speed(tuple(replace(p, micro_batches=8.0) for p in speed.parts), config)
    figures = speed.figures(slower)
    assert figures["tokens_per_s"] == round(32 * 100 / 65, 1)
    assert figures["speed_over_adamw"] == round(129 / 65, 3) and figures["processor_speed_over_adamw"] == 1.0
    assert figures["casting_share"] == round(0.2 * 32 / 65, 4)
    assert figures["applying_share"] == round(0.5 / 65, 4)
    # Eight micro-batches of four rows are as many tokens.
    wide = training.Speed((parts,), training.TrainBench(micro_batches=2, rows=4, seq_len=100)).figures(None)
    assert wide["tokens_per_s"] == round(32 * 100 / 17, 1)


def test_votes_train_the_dense_models_twin() -> None:
    """tiny_coder on a manifold is tiny_coder: the loss that both sides minimise is the same number."""
    import manifolds

    ghost, dense = ghost_model("tiny_coder", manifolds.build()), dense_model("tiny_coder")
    batch = next(training.Endless(4096, 48))
    with torch.no_grad():
        one, _ = training.answer_loss(ghost, batch.input_ids, batch.labels, batch.position_ids)
        other, _ = training.answer_loss(dense, batch.input_ids, batch.labels, batch.position_ids)
    assert float(one) == pytest.approx(float(other), rel=1e-4)


def test_names_that_do_not_exist_are_refused() -> None:
    for wrong in ({"models": ("gpt",)}, {"methods": ()}, {"rounds": 0}, {"rows": 3}):
        with pytest.raises(ValueError, match="expected"):
            training.TrainBench(**wrong)  # type: ignore[arg-type]

"""Calibration against its formulas in float64: sensitivities by hand, rounding by elimination, sizes by encoding."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from tiny_models import VOCABULARY, random_model, tiny_config

import low_bit
import low_bit_calibration as calibration
import manifolds
import prime_quality
from ghost_core import grids_of
from low_bit import LowBitError
from low_bit_calibration import DAMPING, Sensitivity
from packed_batches import Batch

pytestmark = pytest.mark.usefixtures("one_thread")


def ghost(kind: str = "qwen2", **changes: object):
    config = tiny_config(kind, **changes)
    return prime_quality.to_grid(random_model(config, seed=int(torch.randint(1 << 30, ()))), config, manifolds.build())


def a_batch(length: int = 40, padding: int = 6) -> Batch:
    ids = torch.randint(0, VOCABULARY, (1, length))
    labels = ids.clone()
    labels[0, :9] = -100
    labels[0, length - padding :] = -100
    places = torch.cat([torch.arange(15), torch.arange(length - 15 - padding), torch.arange(padding)])[None]
    return Batch(ids, labels, places, 2, length - padding, int((labels != -100).sum()))


@pytest.mark.parametrize("kind", ["qwen2", "qwen3", "llama"])
def test_grids_of_the_same_inputs_share_what_is_held_of_them(kind: str) -> None:
    """At 1.5 B each of H and its factors has 10 GB: once for the same inputs, and never both."""
    model = ghost(kind)
    costs = calibration.measure(model, [a_batch(), a_batch(33, 0)])
    held = {id(cost.inputs): cost.inputs.nbytes for cost in costs.values() if cost.inputs is not None}
    assert sum(held.values()) == calibration.moment_bytes(model)
    alone = {n: calibration.plan(g.shape, costs[n], 0, n) for n, g in grids_of(model).items()}
    plans = calibration.plans_of(model, costs, 0)
    assert not costs and set(plans) == set(alone)
    factors = {id(how.compensation): how.compensation.nbytes for how in plans.values() if how.compensation is not None}
    assert sum(factors.values()) == calibration.moment_bytes(model)
    for name, how in plans.items():
        assert how.compensation is not None and torch.equal(how.compensation, alone[name].compensation)
        assert (
            torch.equal(how.scales.columns, alone[name].scales.columns) and how.scales.unit == alone[name].scales.unit
        )


@pytest.mark.parametrize("tied", [True, False])
def test_sensitivities_are_those_of_their_formulas(tied: bool) -> None:
    model = ghost(tie_word_embeddings=tied)
    batches = [a_batch(), a_batch(33, 0)]
    found = calibration.measure(model, batches)
    assert set(found) == set(grids_of(model))
    # By hand: inputs of each linear and gradients of each output, padding cut off, through transformers' own loss.
    inputs: dict[str, list[torch.Tensor]] = {}
    grads: dict[str, list[torch.Tensor]] = {}
    names = {"model.layers.1.mlp.down_proj": "model.layers.1.mlp.down_proj.grid", "lm_head": ""}
    names["lm_head"] = "model.embed_tokens.grid" if tied else "lm_head.grid"
    lookups: list[tuple[torch.Tensor, torch.Tensor]] = []
    handles = []
    modules = dict(model.named_modules())
    for module, name in names.items():

        def hook(_: object, args: tuple, out: torch.Tensor, name: str = name) -> None:
            inputs.setdefault(name, []).append(args[0].detach().double().flatten(0, -2))
            out.register_hook(lambda g: grads.setdefault(name, []).append(g.double().flatten(0, -2)))

        handles.append(modules[module].register_forward_hook(hook))

    def look(_: object, args: tuple, out: torch.Tensor) -> torch.Tensor:
        out = out.detach().requires_grad_()
        ids = args[0].flatten()
        out.register_hook(lambda g: lookups.append((ids, g.double().flatten(0, 1))))
        return out

    handles.append(model.get_input_embeddings().register_forward_hook(look))
    tokens = 0
    for batch in batches:
        end = int((batch.labels[0] != -100).nonzero()[-1]) + 1
        tokens += end
        out = model(input_ids=batch.input_ids[:, :end], position_ids=batch.position_ids[:, :end], use_cache=False)
        F.cross_entropy(out.logits[0, :-1], batch.labels[0, 1:end], ignore_index=-100, reduction="sum").backward()
    for handle in handles:
        handle.remove()
    for name in set(names.values()):
        g = torch.cat(grads[name]).square().sum(0) / tokens
        h = found[name].inputs
        assert h is not None
        if name != "model.layers.1.mlp.down_proj.grid":
            # The head is asked for the targets' positions alone, which have all of the gradient; its H is theirs.
            ends = [int((b.labels[0] != -100).nonzero()[-1]) + 1 for b in batches]
            kept = torch.cat([b.labels[0, 1:e] != -100 for b, e in zip(batches, ends, strict=True)])
            x = torch.cat([x[: e - 1] for x, e in zip(inputs[name], ends, strict=True)])[kept]
        else:
            x = torch.cat(inputs[name])
        expected = x.T @ x / len(x)
        if name == "model.embed_tokens.grid":
            # Tied: what rows cost as embeddings, the same in every direction, joins what they cost as the head.
            as_head, as_embedding = g * expected.diagonal().mean(), torch.zeros(VOCABULARY, dtype=torch.float64)
            for ids, gradient in lookups:
                as_embedding.index_add_(0, ids, gradient.square().mean(1) / tokens)
            g = as_head + as_embedding
            share = as_embedding.sum() / g.sum()
            expected = (1 - share) * expected / expected.diagonal().mean() + share * torch.eye(len(expected))
        torch.testing.assert_close(h.double(), expected, rtol=1e-3, atol=1e-4 * float(expected.diagonal().mean()))
        torch.testing.assert_close(found[name].rows, g, rtol=1e-2, atol=1e-6 * float(g.mean()))
    if not tied:
        alone = found["model.embed_tokens.grid"]
        as_embedding = torch.zeros(VOCABULARY, dtype=torch.float64)
        for ids, gradient in lookups:
            as_embedding.index_add_(0, ids, gradient.square().mean(1) / tokens)
        assert alone.inputs is None
        torch.testing.assert_close(alone.rows, as_embedding, rtol=1e-2, atol=1e-9)


def correlated(columns: int, count: int = 500) -> torch.Tensor:
    mix = torch.randn(columns, columns) * torch.linspace(0.05, 1, columns)
    x = torch.randn(count, columns) @ mix
    return x.T @ x / count


def by_elimination(weights: torch.Tensor, steps: torch.Tensor, h: torch.Tensor, top: int) -> torch.Tensor:
    """Codes of a matrix, each column rounded and the others moved to where the cost of its error is least: the
    definition, with a new inverse for every column, float64."""
    h = h.double() + torch.eye(len(h)).double() * DAMPING * h.diagonal().double().mean()
    open_weights = weights.double().clone()
    codes = torch.empty(weights.shape, dtype=torch.int16)
    for j in range(weights.shape[1]):
        codes[:, j] = (open_weights[:, j] / steps[:, j].double()).round().clamp(-top, top).to(torch.int16)
        error = codes[:, j] * steps[:, j].double() - open_weights[:, j]
        rest = slice(j + 1, None)
        # Minimum over the rest of (error, d) H (error, d)^T is at d = -error H_jr H_rr^-1.
        open_weights[:, rest] -= error[:, None] * torch.linalg.solve(h[rest, rest], h[rest, j])[None]
    return codes


@pytest.mark.parametrize("columns", [20, 300])
def test_rounding_is_elimination(columns: int) -> None:
    weights, h = torch.randn(24, columns), correlated(columns)
    how = calibration.plan((24, columns), Sensitivity(h, torch.rand(24).double() + 0.1), 0, "x")
    grid = calibration.round_grid(weights, how, 0.3 / how.scales.unit)
    expected = by_elimination(weights, grid.scales.steps(), h, grid.top)
    # A tie that falls the other way in float32 changes what follows in its row.
    assert (grid.codes == expected).float().mean() > 0.97 and (grid.codes - expected).abs().max() <= 2


def test_compensation_saves_cost_where_inputs_are_correlated() -> None:
    weights, h = torch.randn(256, 96), correlated(96)
    how = calibration.plan((256, 96), Sensitivity(h, torch.ones(256).double()), 0, "x")
    h = h.double() + torch.eye(96) * DAMPING * h.diagonal().double().mean()

    def cost(grid: low_bit.LowBitGrid) -> float:
        error = (grid.weights() - weights).double()
        return float(((error @ h) * error).sum())

    plain = calibration.Plan(None, how.scales)
    ratio = cost(calibration.round_grid(weights, how, 0.1 / how.scales.unit)) / cost(
        calibration.round_grid(weights, plain, 0.1 / how.scales.unit)
    )
    # Of a column's error only what the others cannot make up for is left: its conditional variance.
    assert how.compensation is not None
    steps = how.scales.steps()[0].double().square()
    left = how.compensation.diagonal().double().pow(-2)
    expected = float((steps * left).sum() / (steps * h.diagonal()).sum())
    assert expected < 0.8 and ratio == pytest.approx(expected, rel=0.1)


def test_rows_that_matter_more_are_finer() -> None:
    g = torch.tensor([1.0, 100.0]).double().repeat(8)
    how = calibration.plan((16, 32), Sensitivity(None, g), 0, "x")
    steps = how.scales.steps()[:, 0]
    share = calibration.ROW_FLOOR * float(g.mean())
    expected = ((1 + share) / (100 + share)) ** 0.5
    assert float(steps[1] / steps[0]) == pytest.approx(expected, rel=0.1)


@pytest.mark.parametrize("bits", [8.0, 4.0, 2.5])
@pytest.mark.parametrize("table", low_bit.TABLES)
def test_the_size_is_the_one_asked_for(bits: float, table: str) -> None:
    model = ghost(hidden_size=64, intermediate_size=256)
    weights = sum(g.indices.numel() for g in grids_of(model).values())
    budget = int(bits * weights / 8)
    grids = calibration.quantize(model, calibration.without_text(model), budget, name=table)
    stored = sum(calibration.stored_bytes(g) for g in grids.values())
    assert budget * 0.985 <= stored <= budget
    assert {g.name for g in grids.values()} == {table}


def test_finer_is_closer_and_text_helps_on_that_text() -> None:
    model = ghost(hidden_size=64)
    batches = [a_batch(120, 0) for _ in range(6)]
    costs, blind = calibration.measure(model, batches), calibration.without_text(model)
    weights = sum(g.indices.numel() for g in grids_of(model).values())

    def error(sensitivities: dict[str, Sensitivity], bits: float) -> float:
        """Expected rise of the loss on the text, by the sensitivities of that text."""
        grids = calibration.quantize(model, sensitivities, int(bits * weights / 8))
        total = 0.0
        for name, grid in grids_of(model).items():
            h, g = costs[name].inputs, costs[name].rows
            off = (grids[name].weights() - grid.dequantize()).double()
            h = torch.eye(off.shape[1]) if h is None else h
            total += float((g * ((off @ h.double()) * off).sum(1)).sum()) / 2
        return total

    assert error(costs, 6.0) < 0.15 * error(costs, 4.0)
    assert error(costs, 4.0) < 0.8 * error(blind, 4.0)


def test_what_does_not_fit_is_refused(tmp_path: Path) -> None:
    model = ghost()
    costs = calibration.without_text(model)
    with pytest.raises(LowBitError, match="give more bits"):
        calibration.quantize(model, costs, 400)
    with pytest.raises(LowBitError, match="rows of 48 weights, not a multiple of the group 32"):
        calibration.quantize(model, costs, 100_000, group=32)

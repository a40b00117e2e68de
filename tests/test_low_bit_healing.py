"""Healing: a packed grid computes with its rounded weights, votes move the indices behind them, and loss falls."""

from __future__ import annotations

import json

import pytest
import torch
from tiny_models import VOCABULARY, dense_twin, random_model, tiny_config
from transformers import PreTrainedModel

import low_bit_calibration as calibration
import manifolds
import prime_quality
from answer_masks import EncodedSet
from ghost_core import grids_of
from ghost_grid import GhostGrid
from low_bit import LowBitGrid
from low_bit_healing import PackedGrid, heal, put_on_packed_grids, rounded_grids
from packed_batches import PackedBatches
from training_recipe import Recipe

pytestmark = pytest.mark.usefixtures("one_thread")


def ghost(**changes: object) -> PreTrainedModel:
    config = json.loads(json.dumps(tiny_config(hidden_size=64, **changes)))
    return prime_quality.to_grid(random_model(config, seed=3, spread=0.1), config, manifolds.build())


def packed(model: PreTrainedModel, bits: float) -> dict[str, LowBitGrid]:
    weights = sum(g.indices.numel() for g in grids_of(model).values())
    return calibration.quantize(model, calibration.without_text(model), int(bits * weights / 8))


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("bits", [3.0, 7.0])
def test_a_packed_grid_computes_with_the_rounded_weights(tied: bool, bits: float) -> None:
    model = ghost(tie_word_embeddings=tied)
    grids = packed(model, bits)
    put_on_packed_grids(model, grids)
    assert all(isinstance(g, PackedGrid) for g in grids_of(model).values())
    assert (model.lm_head.grid is model.model.embed_tokens.grid) == tied
    for name, grid in grids_of(model).items():
        torch.testing.assert_close(grid.dequantize(), grids[name].weights(), rtol=1e-6, atol=0)
        rows = torch.tensor([3, 0, 3])
        assert torch.equal(grid.dequantize_rows(rows), grid.dequantize()[rows])
        back = rounded_grids(model)[name]
        assert torch.equal(back.codes, grids[name].codes) and back.scales == grids[name].scales
    ids = torch.randint(0, VOCABULARY, (2, 9))
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, dense_twin(model)(ids).logits, rtol=1e-4, atol=1e-4)


def test_it_begins_where_weights_were_before_they_were_rounded() -> None:
    model = ghost()
    h = torch.randn(200, 64) @ torch.randn(64, 64)
    costs = calibration.without_text(model)
    for name, cost in costs.items():
        if "down_proj" not in name:
            costs[name] = calibration.Sensitivity(h.T @ h / 200, cost.rows)
    grids = calibration.quantize(model, costs, 40_000)
    plans = calibration.plans_of(model, costs, 0)
    before = {name: grid.dequantize() for name, grid in grids_of(model).items()}
    put_on_packed_grids(model, grids, lambda grid, packed: calibration.unrounded(grid, packed, plans[grid.name]))
    for name, grid in grids_of(model).items():
        # Beside the border of two codes the 16-bit snap may fall to the other side.
        assert (grid.rounded().codes != grids[name].codes).float().mean() < 0.01
        behind = GhostGrid.dequantize(grid)
        half = grids[name].scales.steps() / 2
        # The snap moves a weight by half the gap between two entries of the table at most; float32 rounds beside.
        snap = float(grid.manifold.fixed.diff().max()) / 2.0**41 * grid.scale[:, None]
        assert ((behind - grids[name].weights()).abs() <= half * 1.00001 + snap).all()
        assert torch.allclose(behind, before[name], atol=1e-3 * float(half.min())) == ("down_proj" in name)


def documents(count: int = 40) -> EncodedSet:
    """Sequences of one rule: every token is the one before it plus 3."""
    import numpy as np

    rows = [(np.arange(24) * 3 + start) % 250 for start in np.random.default_rng(0).integers(0, 250, count)]
    return EncodedSet(
        input_ids=np.concatenate(rows).astype(np.int32),
        answer=np.ones(24 * count, dtype=bool),
        starts=np.arange(count + 1, dtype=np.int64) * 24,
        record=np.arange(count, dtype=np.int64),
        seq_len=48,
        cut=0,
        dropped=0,
        split_texts=0,
    )


def test_healing_learns_at_the_resolution_of_the_codes() -> None:
    model = ghost()
    grids = packed(model, 3.0)
    batches = PackedBatches(documents(), seq_len=48, batch_size=2, pad_id=258, seed=0)
    recipe = Recipe(steps=25, grad_accum=1, lr=4e-3, warmup=2, gradient_checkpointing=False, device="cpu")
    put_on_packed_grids(model, grids)
    losses = list(heal(model, batches, recipe))
    assert len(losses) == 25 and not model.training
    healed = rounded_grids(model)
    # What it says after healing is said by the codes: in a fresh model, and better than before.
    fresh = ghost()
    learned = {name: parameter.detach() for name, parameter in model.named_parameters()}
    fresh.load_state_dict(learned, strict=False)
    put_on_packed_grids(fresh, healed)
    ids = torch.from_numpy(documents().input_ids[:24].astype("int64"))[None]

    @torch.no_grad()
    def loss(which: PreTrainedModel) -> float:
        return float(torch.nn.functional.cross_entropy(which(ids).logits[0, :-1], ids[0, 1:]))

    before = ghost()
    put_on_packed_grids(before, grids)
    assert loss(fresh) == pytest.approx(loss(model), rel=1e-5)
    assert loss(fresh) < loss(before) - 0.3
    moved = [float((healed[n].codes != grids[n].codes).float().mean()) for n in grids]
    assert all(0 < share < 0.9 for share in moved)
    assert all(healed[n].scales == grids[n].scales for n in grids)

"""Arranged micro-batches: the loss and the votes of any other; what recordings do with them only a card can show."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import manifolds
import micro_batch_graph
from bench_models import ghost_model
from ghost_core import grids_of, name_grids
from micro_batch_graph import Arranged, arranged, arranged_loss, room_for_documents
from packed_batches import Batch
from qwen_prime_wrapper import answer_loss
from vote_rules import Ballot, MomentumRule

pytestmark = pytest.mark.usefixtures("one_thread")
TOKENS = 96


def batch_of(*rows: list[int], seed: int = 0) -> Batch:
    """Rows of documents of these lengths, a third of each row no answer."""
    ids = torch.randint(4096, (len(rows), TOKENS), generator=torch.Generator().manual_seed(seed))
    positions = torch.stack([torch.cat([torch.arange(n) for n in row]) for row in rows])
    labels = ids.clone()
    labels[:, 10:40] = -100
    return Batch(ids, labels, positions, len(rows), ids.numel(), int((labels[:, 1:] != -100).sum()))


BATCHES = [batch_of([96]), batch_of([30, 1, 65]), batch_of([50, 46], [96], [10, 20, 66], seed=3)]


@pytest.mark.parametrize("batch", BATCHES, ids=["one", "three", "rows"])
def test_an_arranged_micro_batch_has_the_loss_and_the_votes_of_any_other(batch: Batch) -> None:
    results: list[Any] = []
    for arrange in (False, True):
        model = ghost_model("toy", manifolds.build()).train()
        ballot = Ballot(seed=5, rule=MomentumRule(buffer="int16"))
        name_grids(model, ballot)
        for grid in grids_of(model).values():
            grid.unlock()
        for mode in ("measure", "cast"):
            ballot.open(mode, 0, 0, 1)
            found = arranged(batch)
            assert found is not None
            loss = (
                arranged_loss(model, found)
                if arrange
                else answer_loss(model, batch.input_ids, batch.labels, batch.position_ids)[0]
            )
            loss.backward()
            for grid in grids_of(model).values():
                grid.finish_measuring()
        votes = {n: g.votes for n, g in grids_of(model).items()}
        results.append((float(loss.detach()), {n: p.grad for n, p in model.named_parameters()}, votes))
    (loss_a, floats_a, votes_a), (loss_b, floats_b, votes_b) = results
    assert loss_a == pytest.approx(loss_b, rel=1e-5)
    for name, gradient in floats_a.items():
        assert torch.allclose(gradient, floats_b[name], rtol=1e-3, atol=1e-4 * float(gradient.abs().max()))
    for name, votes in votes_a.items():
        assert votes is not None and bool(votes.any())
        # The draws are the same: votes differ where a rounding error meets a threshold.
        assert int((votes.int() - votes_b[name].int()).abs().max()) <= 1
        assert float((votes != votes_b[name]).float().mean()) < 0.02


def test_shapes_do_not_depend_on_documents() -> None:
    for batch in BATCHES[:2]:
        found = arranged(batch)
        assert found is not None and found.edges.shape == (room_for_documents(batch) + 1,) == (7,)
        assert found.rows.shape == (3, 1, TOKENS) and found.edges.dtype == torch.int32
        assert found.edges[0] == 0 and found.edges[-1] == TOKENS
        assert torch.equal(found.rows[1, :, :-1], batch.labels[:, 1:]) and int(found.rows[1, 0, -1]) == -100
    assert arranged(batch_of([10] * 6 + [36])) is None
    assert arranged(batch_of([10] * 5 + [46])) is not None


def test_a_micro_batch_of_a_few_tokens_has_room_for_one_document() -> None:
    ids = torch.zeros(1, 5, dtype=torch.int64)
    found = arranged(Batch(ids, ids.clone(), torch.arange(5)[None], 1, 5, 4))
    assert isinstance(found, Arranged) and found.edges.tolist() == [0, 5]


def test_on_a_cpu_nothing_is_recorded() -> None:
    model, ballot = ghost_model("toy", manifolds.build()), Ballot()
    assert not micro_batch_graph.MicroBatchGraph.serves(model, ballot, torch.device("cpu"))

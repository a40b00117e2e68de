"""Arranged micro-batches have the loss and votes of any other; recordings, played by hand where there is no card."""

from __future__ import annotations

import copy
import math
from dataclasses import replace
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch

import ghost_kernels
import manifolds
from ballots import Ballot
from bench_models import Endless, config_of, gaussian_model, ghost_model
from ghost_core import grids_of, name_grids
from ghost_grid import GhostGrid
from micro_batch_graph import Arranged, MicroBatchGraph, arranged, arranged_loss, room_for_documents
from momentum_rules import MomentumRule
from night_shift import AntigravitySentinel, LayerPeel, MemoryContingency, Shape, TrainingGovernor
from night_watch import NightWatch, StepResult
from packed_batches import Batch
from qwen_prime_wrapper import answer_loss, model_tensors
from training_recipe import Recipe
from vote_casting import Turn
from vote_trainer import VoteTrainer

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
    model, ballot = ghost_model("toy", manifolds.build()), Ballot(MomentumRule())
    assert not MicroBatchGraph.serves(model, ballot, torch.device("cpu"))


# -- recordings, played by hand ---------------------------------------------------------------------------------------


class PlayedByHand(MicroBatchGraph):
    """On the CPU: a recording that is computed again each time, from the memory that a card's would read. The kernels
    are the card's, compiled for the CPU; what Python notes down on the way is taken back, as a card would not do it."""

    def _record(self, memory: Any) -> Any:
        listening, kind = self.ballot.listening, (self.ballot.micro_batch, self.ballot.micro_batches)

        def replay() -> None:
            ballot = self.ballot
            before = (ballot.listening, ballot.micro_batch, ballot.standing, [g._later for g in self.grids])
            ballot.listening, ballot.micro_batch = listening, kind[0]
            ballot.controls, ballot.standing = memory.controls, set()
            steps = {g.number: {p: k.step for p, k in g._looked_at.items()} for g in self.grids}
            for grid, yardstick in zip(memory.voting, memory.yardsticks, strict=True):
                assert grid.state is not None
                key, (_, gains) = grid.state.cached or (None, (None, ballot.rule.yardstick(grid)[1]))
                grid.state.cached = (key or grid.state.cached[0], (yardstick, gains))
            # Keys, slot and sign of a step that is no other's: a kernel that does not read the controls would use them.
            step, ballot.step = ballot.step, 10**6
            for grid in self.grids:
                for kept in grid._looked_at.values():
                    kept.step = ballot.step - (kind == (0, 1))
            try:
                self._passes(memory)
            finally:
                ballot.controls, ballot.step = None, step
                ballot.listening, ballot.micro_batch, ballot.standing, later = before
                for grid, was in zip(self.grids, later, strict=True):
                    grid._later = was
                    for part, kept in grid._looked_at.items():
                        kept.step = steps[grid.number].get(part, kept.step)

        return SimpleNamespace(replay=replay, pool=lambda: None)


class Texts(Endless):
    """Rows of two documents every second time, with prompts that are no answers; goes on where it was."""

    count = 0

    def __init__(self, vocabulary: int, tokens: int, rows: int = 1) -> None:
        super().__init__(vocabulary, tokens)
        self.batch_size = rows

    def __next__(self) -> Batch:
        self.count += 1
        first = [96] if self.count % 2 else [30, 66]
        batch = batch_of(first, *[[40, 26, 30]] * (self.batch_size - 1), seed=self.count)
        # The end of further rows is padding: a document of one token over and over that answers nothing.
        batch.input_ids[1:, 66:], batch.labels[1:, 66:] = 0, -100
        return replace(batch, answer_tokens=int((batch.labels[:, 1:] != -100).sum()))

    def state_dict(self) -> dict[str, Any]:
        return {"count": self.count}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.count = state["count"]


def trainer_of(played: bool, rule: str, count: int, watched: bool, *, tied: bool = True, rows: int = 1) -> VoteTrainer:
    table = manifolds.build("compact" if rule == "compact" else "prime-harmonic")
    recipe = Recipe(
        steps=50, grad_accum=count, lr=1e-3, vote_rule=cast(Any, rule), compute="float32", warmup=0, device="cpu"
    )
    watch = NightWatch(
        LayerPeel(),
        AntigravitySentinel(),
        TrainingGovernor.for_rule(rule),
        MemoryContingency(Shape(TOKENS, rows, count)),
    )
    model = gaussian_model({**config_of("toy"), "tie_word_embeddings": tied}, table)
    trainer = VoteTrainer(model, cast(Any, Texts(4096, TOKENS, rows)), recipe, watch if watched else None)
    trainer.ballot.backend = "cuda"
    trainer.ballot.marks = torch.zeros(len(trainer.grids), dtype=torch.int32)
    trainer.caster._arranges = True
    if played:
        settings: Any = ("float32", None)
        trainer.caster.graph = PlayedByHand(model, trainer.ballot, trainer.grids, trainer.floats, *settings)
    return trainer


def state_of(trainer: VoteTrainer) -> dict[str, torch.Tensor]:
    state = {f"{n}.indices": g.indices for n, g in trainer.grids.items()}
    for name, grid in trainer.grids.items():
        state |= {f"{name}.{k}": v for k, v in grid.vote_state().items()}
    return {k: v.detach().clone() for k, v in {**state, **trainer.floats}.items()}


@pytest.fixture
def without_a_card(monkeypatch: pytest.MonkeyPatch) -> None:
    if "cuda" not in ghost_kernels.BACKENDS:
        pytest.skip("no C++ compiler for the card's kernels")
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: tensor)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device=None: None)


@pytest.mark.filterwarnings("ignore:User provided device_type of 'cuda'")
@pytest.mark.parametrize("watched", [False, True])
@pytest.mark.parametrize(("rule", "count"), [("momentum", 1), ("momentum", 2), ("momentum", 4), ("compact", 3)])
def test_a_run_with_recordings_is_bit_for_bit_one_without(
    rule: str, count: int, watched: bool, without_a_card: None
) -> None:
    recorded, ordinary = (trainer_of(played, rule, count, watched) for played in (True, False))
    for _ in range(4):
        a, b = recorded.step(), ordinary.step()
        assert a.loss == b.loss and a.agreement == b.agreement and a.seconded == b.seconded
        assert a.flips == b.flips and a.verdict == b.verdict
        for name, grid in recorded.grids.items():
            assert grid.heard and torch.equal(grid.hearing.sums, ordinary.grids[name].hearing.sums)
    assert recorded.caster.graph is not None and recorded.caster.graph.recorded
    x, y = state_of(recorded), state_of(ordinary)
    assert x.keys() == y.keys() and all(torch.equal(x[k], y[k]) for k in x)


@pytest.mark.filterwarnings("ignore:User provided device_type of 'cuda'")
@pytest.mark.parametrize("watched", [False, True])
@pytest.mark.parametrize(("tied", "rows"), [(False, 1), (True, 2), (False, 3)])
def test_other_heads_and_several_rows_are_recorded_to_the_same_bits(
    tied: bool, rows: int, watched: bool, without_a_card: None
) -> None:
    recorded, ordinary = (trainer_of(x, "momentum", 3, watched, tied=tied, rows=rows) for x in (True, False))
    for _ in range(4):
        a, b = recorded.step(), ordinary.step()
        assert a.loss == b.loss and a.flips == b.flips and a.verdict == b.verdict
    assert recorded.caster.graph is not None and recorded.caster.graph.recorded
    assert ("lm_head.grid" in recorded.grids) is not tied
    x, y = state_of(recorded), state_of(ordinary)
    assert x.keys() == y.keys() and all(torch.equal(x[k], y[k]) for k in x)


@pytest.mark.filterwarnings("ignore:User provided device_type of 'cuda'")
def test_a_return_to_a_checkpoint_leaves_nothing_recorded_of_what_was_led_astray(without_a_card: None) -> None:
    recorded, ordinary = (trainer_of(x, "momentum", 3, True) for x in (True, False))
    kept = []
    for trainer in (recorded, ordinary):
        trainer.step()
        trainer.step()
        # At a save nothing is shared with what goes on.
        kept.append(copy.deepcopy(trainer_content(trainer)))
        trainer.step()
    assert recorded.caster.graph is not None and recorded.caster.graph.recorded
    for trainer, content in zip((recorded, ordinary), kept, strict=True):
        trainer.roll_back(content)
        assert trainer.done == 2
    for _ in range(3):
        a, b = recorded.step(), ordinary.step()
        assert a.loss == b.loss and a.flips == b.flips
    assert recorded.caster.graph.recorded
    x, y = state_of(recorded), state_of(ordinary)
    assert all(torch.equal(x[k], y[k]) for k in x)


@pytest.mark.parametrize("end", [None, RuntimeError("CUDA error: operation failed due to a previous error")])
def test_memory_that_breaks_a_recording_off_is_called_that_whatever_its_end_says(
    end: Exception | None, without_a_card: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Recording:
        def __init__(self, *given: Any, **more: Any) -> None: ...

        def __enter__(self) -> None: ...

        def __exit__(self, *found: Any) -> None:
            if end is not None:
                raise end

    trainer = trainer_of(True, "momentum", 2, True)
    trainer.step()
    assert trainer.caster.graph is not None and trainer.caster.graph._memory is not None
    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: None)
    monkeypatch.setattr(torch.cuda, "graph", Recording)

    def short(memory: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    trainer.caster.graph._passes = short  # type: ignore[method-assign]
    trainer.caster.graph._graphs = {}
    with pytest.raises(torch.OutOfMemoryError):
        MicroBatchGraph._record(trainer.caster.graph, trainer.caster.graph._memory)


def trainer_content(trainer: VoteTrainer) -> dict[str, Any]:
    return {"model": model_tensors(trainer.model), "votes": trainer.votes(), "train_state": trainer.state()}


@pytest.mark.filterwarnings("ignore:User provided device_type of 'cuda'")
@pytest.mark.parametrize("k", [0, 1, 3])
@pytest.mark.parametrize("watched", [False, True])
def test_what_is_not_finite_is_taken_back(k: int, watched: bool, without_a_card: None) -> None:
    trainer = trainer_of(True, "momentum", 4, watched)
    for _ in range(2):
        trainer.step()
    batch = next(trainer.batches)
    trainer.ballot.open("cast", trainer.done, 0, 4)
    before, gradients = state_of(trainer), {n: cast(Any, p.grad).clone() for n, p in trainer.floats.items()}
    grid = trainer.grids["model.layers.1.mlp.down_proj.grid"]
    scale = grid.scale.clone()
    grid.scale[3] = math.nan
    assert trainer.caster.cast(batch, Turn(trainer.done, k, trainer.shape.grad_accum, 1.0)) is None
    grid.scale.copy_(scale)
    after = state_of(trainer)
    assert all(torch.equal(before[n], after[n]) for n in before)
    assert all(torch.equal(gradients[n], cast(Any, p.grad)) for n, p in trainer.floats.items())
    assert math.isfinite(cast(float, trainer.caster.cast(batch, Turn(trainer.done, k, trainer.shape.grad_accum, 1.0))))
    assert not torch.equal(state_of(trainer)["model.embed_tokens.grid.votes"], before["model.embed_tokens.grid.votes"])


@pytest.mark.filterwarnings("ignore:User provided device_type of 'cuda'")
@pytest.mark.parametrize("name", ["model.embed_tokens.grid", "model.layers.0.self_attn.k_proj.grid"])
@pytest.mark.parametrize("played", [False, True])
@pytest.mark.parametrize("k", [0, 2])
def test_one_gradient_that_is_not_finite_under_a_sound_loss_is_marked_and_taken_back(
    k: int, played: bool, name: str, without_a_card: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = trainer_of(played, "momentum", 4, True)
    for _ in range(2):
        trainer.step()
    batch, accept, broken = next(trainer.batches), GhostGrid.accept, [True]

    def break_one(grid: GhostGrid, gradient: torch.Tensor, *rest: Any) -> None:
        if broken[0] and grid.name == name:
            gradient = gradient.clone()
            gradient[len(gradient) // 2, 5] = math.inf
        accept(grid, gradient, *rest)

    monkeypatch.setattr(GhostGrid, "accept", break_one)
    trainer.ballot.open("cast", trainer.done, 0, 4)
    before, gradients = state_of(trainer), {n: cast(Any, p.grad) for n, p in trainer.floats.items()}
    gradients = {n: None if g is None else g.clone() for n, g in gradients.items()}
    assert trainer.caster.cast(batch, Turn(trainer.done, k, trainer.shape.grad_accum, 1.0)) is None
    assert set(trainer.ballot.non_finite) == {name}
    after = state_of(trainer)
    assert all(torch.equal(before[n], after[n]) for n in before)
    for n, p in trainer.floats.items():
        assert (gradients[n] is None and p.grad is None) or torch.equal(cast(Any, gradients[n]), cast(Any, p.grad))
    broken[0] = False
    assert math.isfinite(cast(float, trainer.caster.cast(batch, Turn(trainer.done, k, trainer.shape.grad_accum, 1.0))))
    assert not torch.equal(state_of(trainer)[f"{name}.votes"], before[f"{name}.votes"])


def step_with_a_broken_first(trainer: VoteTrainer) -> StepResult:
    """A step whose first micro-batch is no number."""
    grid = trainer.grids["model.layers.1.mlp.down_proj.grid"]
    scale, cast_ = grid.scale.clone(), trainer.caster.cast

    def first_breaks(batch: Batch, turn: Turn) -> Any:
        if turn.number == 0:
            grid.scale[0] = math.nan
        try:
            return cast_(batch, turn)
        finally:
            grid.scale.copy_(scale)

    trainer.caster.cast = first_breaks  # type: ignore[method-assign]
    try:
        return trainer.step()
    finally:
        trainer.caster.cast = cast_  # type: ignore[method-assign]


@pytest.mark.filterwarnings("ignore:User provided device_type of 'cuda'")
def test_a_first_micro_batch_that_is_not_finite_leaves_nothing_to_compare_with(without_a_card: None) -> None:
    trainer = trainer_of(True, "momentum", 3, True)
    trainer.step()
    assert step_with_a_broken_first(trainer).skipped == 1
    result = trainer.step()
    assert result.skipped == 0 and result.seconded is not None and math.isfinite(result.seconded)


@pytest.mark.filterwarnings("ignore:User provided device_type of 'cuda'")
def test_what_later_micro_batches_are_compared_with_is_never_made_while_recording(
    without_a_card: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It would lie in memory that other recordings write over. A resumed run whose first micro-batch is not finite
    came there."""
    trainer = trainer_of(True, "momentum", 4, True)
    trainer.step()
    trainer.caster.forget_recording()
    for grid in trainer.grids.values():
        grid._looked_at.clear()
    record, recorded = PlayedByHand._record, []

    def looked_at_first(self: PlayedByHand, memory: Any) -> Any:
        recorded.append(all(grid._looked_at for grid in trainer.grids.values()))
        return record(self, memory)

    monkeypatch.setattr(PlayedByHand, "_record", looked_at_first)
    assert step_with_a_broken_first(trainer).skipped == 1 and not recorded
    trainer.step()
    trainer.step()
    assert recorded and all(recorded)


@pytest.mark.filterwarnings("ignore:User provided device_type of 'cuda'")
def test_where_memory_runs_out_while_recording_the_run_goes_on_to_the_same_bits(
    without_a_card: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    short, ordinary = trainer_of(True, "momentum", 3, True), trainer_of(False, "momentum", 3, True)

    def out_of_memory(self: PlayedByHand, memory: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(PlayedByHand, "_record", out_of_memory)
    events = []
    for _ in range(3):
        a, b = short.step(), ordinary.step()
        events += a.events
        assert a.loss == b.loss
    assert ("cuda_graphs", {"state": "off", "reason": "out of memory"}) in events and short.caster.graph is None
    x, y = state_of(short), state_of(ordinary)
    assert all(torch.equal(x[k], y[k]) for k in x)

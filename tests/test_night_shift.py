"""Schedules, verdicts, brakes and shapes: pure logic, and the locks that the supervisor turns."""

from __future__ import annotations

import itertools
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import import_source, tiny_config, write_source

from ghost_core import GhostEmbedding, Movement, grids_of
from ghost_grid import GhostGrid
from night_shift import (
    LIMITS,
    AntigravitySentinel,
    LayerPeel,
    MemoryContingency,
    NightShiftError,
    NightShiftSupervisor,
    PeelError,
    Shape,
    TrainingGovernor,
    layer_groups,
)
from prime_checkpoint import load_checkpoint
from qwen_prime_wrapper import model_from_checkpoint
from vote_rules import RULES

# -- the schedule -----------------------------------------------------------------------------------------------------


def test_v7_is_the_schedule_of_the_plans() -> None:
    """The head alone until step 200, then two layers every 50 steps, top first; 28 layers are open from step 850."""
    peel = LayerPeel.parse("v7")
    for step in range(1000):
        wanted = 0 if step < 200 else min(28, 2 * (1 + (step - 200) // 50))
        assert peel.open_layers(step, 28) == tuple(range(28 - wanted, 28)), step
    phases = [peel.phase(step, 28) for step in (0, 199, 200, 849, 850)]
    assert phases == ["head", "head", "peeling", "peeling", "all open"]


def test_none_opens_everything_at_once() -> None:
    assert LayerPeel.parse("none").open_layers(0, 5) == (0, 1, 2, 3, 4)
    assert LayerPeel.parse("none").phase(0, 5) == "all open"


@pytest.mark.parametrize(("layers", "count", "window"), [(1, 6, 2), (2, 6, 2), (2, 7, 4), (3, 5, 4), (2, 6, 9)])
def test_a_window_rolls_down_and_begins_again(layers: int, count: int, window: int) -> None:
    peel = LayerPeel(3, 2, layers, window)
    seen: set[int] = set()
    before: tuple[int, ...] = ()
    for step in range(60):
        now = peel.open_layers(step, count)
        assert len(now) <= min(window, count) and set(now) <= set(range(count)) and list(now) == sorted(set(now))
        assert len(now) >= len(before), "once as many are open as may be, so many stay open"
        if step < 3:
            assert now == ()
        elif (step - 3) % 2:
            assert now == before
        if set(now) - set(before) and len(now) == len(before):
            assert len(set(now) - set(before)) <= layers
        seen |= set(now)
        before = now
    assert seen == set(range(count))
    if window >= count:
        assert before == tuple(range(count))


@pytest.mark.parametrize("text", ["", "v6", "1:2", "1:0:2", "1:2:0", "-1:2:3", "a:b:c", "1:2:3:4"])
def test_schedules_that_cannot_be_read(text: str) -> None:
    with pytest.raises(PeelError, match="peel"):
        LayerPeel.parse(text)


@pytest.mark.parametrize(("text", "window"), [("none", None), ("v7", None), ("3:2:2", None), ("3:2:2", 3)])
def test_the_plan_is_the_schedule(text: str, window: int | None) -> None:
    peel, steps, layers = LayerPeel.parse(text, window), 40, 7
    plan = peel.phases(steps, layers)
    assert plan[0]["step"] == 0 and all(a["open"] != b["open"] for a, b in itertools.pairwise(plan))
    for step in range(steps):
        now = [entry for entry in plan if entry["step"] <= step][-1]
        assert (tuple(now["open"]), now["phase"]) == (peel.open_layers(step, layers), peel.phase(step, layers))


def test_a_window_needs_a_schedule() -> None:
    for text, window in (("none", 4), ("v7", 0)):
        with pytest.raises(PeelError, match="peel-window"):
            LayerPeel.parse(text, window)
    assert str(LayerPeel.parse("v7", 4)) == "200:50:2" and str(LayerPeel.parse("none")) == "none"


# -- the supervisor ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=["tied", "untied"])
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder: Path = tmp_path_factory.mktemp("supervisor")
    config = tiny_config(num_hidden_layers=4, tie_word_embeddings=request.param == "tied")
    import_source(write_source(folder / "source", config), folder / "x.pt")
    return load_checkpoint(folder / "x.pt")


def test_groups_hold_every_grid_and_parameter_once(checkpoint: dict[str, Any]) -> None:
    model = model_from_checkpoint(checkpoint)
    groups = layer_groups(model)
    assert [g.name for g in groups] == ["0", "1", "2", "3", "head"]
    assert sorted(n for g in groups for n in g.grids) == sorted(grids_of(model))
    assert sorted(n for g in groups for n in g.floats) == sorted(n for n, _ in model.named_parameters())
    assert all(len(g.grids) == 7 for g in groups[:-1])


def open_names(grids: dict[str, GhostGrid]) -> set[str]:
    return {n for n, g in grids.items() if g.unlocked}


def test_the_supervisor_opens_and_locks(checkpoint: dict[str, Any]) -> None:
    model = model_from_checkpoint(checkpoint)
    grids = grids_of(model)
    lookup = next(m for m in model.modules() if isinstance(m, GhostEmbedding))
    supervisor = NightShiftSupervisor(model, LayerPeel(2, 2, 1, 2))
    tied = model.config.tie_word_embeddings
    head = {"model.embed_tokens.grid"} if tied else {"lm_head.grid"}
    assert supervisor.due(0)
    supervisor.apply(0)
    assert open_names(grids) == head and not lookup.heard and not supervisor.due(1)
    wanted = {2: (3,), 4: (2, 3), 6: (1, 2), 8: (0, 1), 10: (0, 3)}
    for step, layers in wanted.items():
        assert supervisor.due(step)
        change = supervisor.apply(step)
        names = {n for n in grids if any(f"layers.{i}." in n for i in layers)}
        bottom = 0 in layers
        lowest = {"model.embed_tokens.grid"} if bottom and not tied else set()
        assert open_names(grids) == head | names | lowest
        assert lookup.heard == bottom
        assert set(change.opened) == set(layers) - set(wanted.get(step - 2, ()))
        for name, parameter in model.named_parameters():
            inside = [i for i in range(4) if f"layers.{i}." in name]
            assert parameter.requires_grad == (not inside or inside[0] in layers), name


def test_a_lock_keeps_nothing_and_an_open_layer_keeps_its_votes(checkpoint: dict[str, Any]) -> None:
    model = model_from_checkpoint(checkpoint)
    grids = grids_of(model)
    supervisor = NightShiftSupervisor(model, LayerPeel(0, 1, 1, 2))
    supervisor.apply(1)
    for grid in grids.values():
        if grid.votes is not None:
            grid.votes.fill_(100)
    supervisor.apply(2)
    for name, grid in grids.items():
        if "layers.2." in name:
            assert grid.votes is not None and bool((grid.votes == 100).all())
        if "layers.1." in name:
            assert grid.votes is not None and not bool(grid.votes.any())
        if "layers.3." in name:
            assert grid.votes is None
    supervisor.apply(5)
    assert all(not bool(g.votes.any()) for n, g in grids.items() if "layers.3." in n and g.votes is not None)


# -- the sentinel -----------------------------------------------------------------------------------------------------


def judged(sentinel: AntigravitySentinel, losses: list[float], start: int = 1, **fields: Any) -> list[str]:
    given = {"movement": 1.0, "share": 0.01, "skipped": 0, "micro_batches": 4, **fields}
    return [sentinel.judge(start + i, loss, **given).kind for i, loss in enumerate(losses)]


USUAL = [2.0 + 0.1 * (-1) ** i for i in range(12)]


def test_one_spike_is_noted_and_three_in_a_row_return() -> None:
    sentinel = AntigravitySentinel()
    assert judged(sentinel, USUAL) == ["ok"] * 12
    assert judged(sentinel, [9.0, 9.0, 2.0, 9.0], 13) == ["spike", "spike", "ok", "spike"]
    sentinel.judge(17, 9.0, 1.0, 0.01, 0, 4)
    verdict = sentinel.judge(18, math.nan, 1.0, 0.01, 0, 4)
    assert (verdict.kind, verdict.to) == ("roll_back", 14), "the first of the three speaks of what step 15 has left"
    assert sentinel.heat == 0.5 and sentinel.returns == 1 and sentinel.streak == 0


def test_a_first_loss_that_is_no_number_spikes() -> None:
    assert AntigravitySentinel().judge(1, math.nan, 1.0, 0.01, 0, 4).kind == "spike"


def test_spikes_are_counted_from_the_first_whatever_lies_between() -> None:
    """A step that lost every micro-batch moved nothing and says nothing."""
    sentinel = AntigravitySentinel()
    judged(sentinel, [*USUAL, 9.0])
    assert sentinel.judge(14, math.nan, 0.0, 0.0, 4, 4).kind == "non_finite"
    other = AntigravitySentinel()
    other.load_state_dict(sentinel.state_dict())
    other.judge(15, 9.0, 1.0, 0.01, 0, 4)
    assert other.judge(16, 9.0, 1.0, 0.01, 0, 4).to == 11


def test_what_is_usual_is_what_was_usual_where_a_run_returns_to() -> None:
    sentinel = AntigravitySentinel()
    judged(sentinel, USUAL)
    then = sentinel.state_dict()
    judged(sentinel, [5.0, 5.0, 5.0], 13)
    sentinel.recall(then)
    assert sentinel.heat == 0.5, "but not how often it returned"
    assert judged(sentinel, [5.0, 2.0], 9) == ["spike", "ok"]


def test_noise_falling_losses_and_the_first_steps_are_no_spikes() -> None:
    generator = torch.Generator().manual_seed(0)
    noisy = (3 + torch.randn(300, generator=generator)).tolist()
    assert set(judged(AntigravitySentinel(), noisy)) == {"ok"}
    assert set(judged(AntigravitySentinel(), [10.0 / (1 + i) for i in range(50)])) == {"ok"}
    assert judged(AntigravitySentinel(), [1.0, 9.0, 1.0]) == ["ok"] * 3


def test_an_avalanche_returns_at_once() -> None:
    sentinel = AntigravitySentinel()
    judged(sentinel, USUAL)
    verdict = sentinel.judge(13, 2.0, 8.5, 0.01, 0, 4)
    assert (verdict.kind, verdict.to) == ("roll_back", 12) and "8.5 times" in verdict.reason
    sentinel = AntigravitySentinel()
    judged(sentinel, [*USUAL, 9.0, 9.0])
    assert sentinel.judge(15, 9.0, 8.5, 0.01, 0, 4).to == 11, "before the spikes that came before it"
    sentinel = AntigravitySentinel()
    judged(sentinel, USUAL)
    sentinel.forget_movement()
    assert sentinel.judge(13, 2.0, 8.5, 0.01, 0, 4).kind == "ok", "other layers are open: what is usual is not known"


def test_too_many_returns_end_the_run() -> None:
    sentinel = AntigravitySentinel()
    kinds = []
    for _ in range(4):
        judged(sentinel, USUAL)
        kinds.append(sentinel.judge(13, 2.0, 99.0, 0.01, 0, 4).kind)
    assert kinds == ["roll_back"] * 3 + ["end"]


def test_an_ordinary_step_among_steps_that_hardly_move_is_no_avalanche() -> None:
    sentinel = AntigravitySentinel()
    judged(sentinel, USUAL, movement=0.001)
    assert sentinel.judge(13, 2.0, 0.1, 0.0009, 0, 4).kind == "ok", "a hundred times the usual, and nothing"
    assert sentinel.judge(14, 2.0, 0.1, 0.0011, 0, 4).kind == "roll_back"


def test_returns_far_apart_do_not_add_up() -> None:
    sentinel = AntigravitySentinel(calm=20)
    for number in range(1, 8):
        judged(sentinel, USUAL * 2)
        assert sentinel.judge(25, 2.0, 99.0, 0.01, 0, 4).kind == "roll_back"
        assert sentinel.returns == 1 and sentinel.heat == 0.5**number
    kept = sentinel.state_dict()
    assert kept["since"] == 0
    del kept["since"]
    AntigravitySentinel().load_state_dict(kept)


def test_lost_steps_are_counted_and_end_the_run() -> None:
    sentinel = AntigravitySentinel()
    kinds = judged(sentinel, [math.nan] * 9, skipped=4)
    kinds += judged(sentinel, [2.0], skipped=1) + judged(sentinel, [math.nan] * 10, skipped=4)
    assert kinds == ["non_finite"] * 19 + ["end"]
    assert sentinel.skipped == 77


def test_a_sentinel_goes_on_where_it_was() -> None:
    whole, first = AntigravitySentinel(), AntigravitySentinel()
    losses = [*USUAL, 9.0, 9.0]
    assert judged(whole, losses) == judged(first, losses)
    second = AntigravitySentinel()
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    assert judged(second, [9.0, 2.0], 15) == judged(whole, [9.0, 2.0], 15) == ["roll_back", "ok"]
    assert second.state_dict() == whole.state_dict()


# -- the governor -----------------------------------------------------------------------------------------------------


def test_every_rule_has_a_limit() -> None:
    assert set(LIMITS) == set(RULES)
    assert LIMITS["supermajority"] == ("flips", 0.0005), "the plans' 0.05%"


def test_the_governor_brakes_the_fast_layer_only_and_lets_go() -> None:
    governor = TrainingGovernor.for_rule("momentum")
    fast = {"x": Movement(100, 100, 0.05, 0, 1.0)}
    slow = {"y": Movement(100, 50, 0.002, 0, 1.0)}
    measured = governor.steer({"0": fast, "1": slow, "2": {}})
    assert measured == pytest.approx({"0": 0.05, "1": 0.001})
    assert governor.braked() == {"0": pytest.approx(0.8)}
    governor.steer({"0": fast, "1": slow})
    assert governor.heat["0"] == pytest.approx(0.64)
    for _ in range(20):
        governor.steer({"0": slow, "1": slow})
    assert governor.braked() == {}
    for _ in range(200):
        governor.steer({"0": fast})
    assert governor.heat["0"] == 2**-6
    copy = TrainingGovernor.for_rule("momentum")
    copy.load_state_dict(json.loads(json.dumps(governor.state_dict())))
    assert copy.heat == governor.heat
    with pytest.raises(NightShiftError, match="above 0"):
        TrainingGovernor.for_rule("momentum", 0.0)


# -- shapes -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("first", [Shape(512, 1, 32), Shape(1024, 3, 8), Shape(128, 1, 4), Shape(2048, 8, 1)])
def test_the_ladder_keeps_the_tokens_and_halves_batches_first(first: Shape) -> None:
    ladder = MemoryContingency(first).ladder()
    assert ladder[0] == first
    for wide, narrow in itertools.pairwise(ladder):
        assert narrow.seq_len * narrow.batch_size < wide.seq_len * wide.batch_size
        assert narrow.tokens >= first.tokens
        assert narrow.tokens - first.tokens < narrow.seq_len * narrow.batch_size
        assert narrow.batch_size < wide.batch_size or wide.batch_size == 1
    assert ladder[-1].seq_len == min(256, first.seq_len // 2)


def test_the_ladder_of_the_plans() -> None:
    contingency = MemoryContingency(Shape(512, 1, 32))
    assert [(s.seq_len, s.grad_accum) for s in contingency.ladder()] == [(512, 32), (384, 43), (256, 64)]
    assert contingency.lower() == Shape(384, 1, 43)
    other = MemoryContingency(Shape(512, 1, 32))
    other.load_state_dict(json.loads(json.dumps(contingency.state_dict())))
    assert other.shape == Shape(384, 1, 43) and other.lower() == Shape(256, 1, 64) and other.lower() is None
    with pytest.raises(NightShiftError, match="--grad-accum"):
        MemoryContingency(Shape(512, 1, 16)).load_state_dict(contingency.state_dict())


def test_rows_do_not_become_shorter_than_they_may() -> None:
    def lengths(first: int, shortest: int | None) -> list[int]:
        return [s.seq_len for s in MemoryContingency(Shape(first, 2, 4), shortest).ladder()]

    assert lengths(512, None) == [512, 512, 384, 256] and lengths(128, None) == [128, 128, 96, 64]
    assert lengths(512, 512) == lengths(512, 400) == [512, 512] and lengths(512, 384) == [512, 512, 384]
    assert lengths(128, 48) == [128, 128, 96, 64, 48]
    low = MemoryContingency(Shape(512, 2, 4))
    for _ in range(3):
        low.lower()
    MemoryContingency(Shape(512, 2, 4), 256).load_state_dict(low.state_dict())
    with pytest.raises(NightShiftError, match=r"come down to .* x 256 tokens.* give 256"):
        MemoryContingency(Shape(512, 2, 4), 300).load_state_dict(low.state_dict())

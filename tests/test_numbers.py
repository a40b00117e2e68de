"""Numbers at their limits: votes and indices saturate and never wrap, whatever the gradients, rates and shapes; what is
not finite leaves no trace, at any matrix and in any micro-batch."""

from __future__ import annotations

import bisect
import copy
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tiny_models import import_source, tiny_config, write_source
from torch import nn

import ghost_core as core
import ghost_kernels as kernels
import manifolds
import vote_units
from ballots import Ballot, VoteRule, tensor_id
from ghost_core import GhostEmbedding, GhostLinearTandem, ghost_cross_entropy
from ghost_grid import GhostError, GhostGrid
from momentum_rules import CompactRule, MomentumRule
from night_watch import StepResult
from packed_batches import Batch
from prime_checkpoint import load_checkpoint, walk_tensors
from qwen_prime_wrapper import copy_tensors, model_from_checkpoint, model_tensors
from training_recipe import Recipe, TrainError
from vote_casting import Turn
from vote_trainer import VoteTrainer
from whisper_rules import StochasticRule, SupermajorityRule

pytestmark = pytest.mark.usefixtures("one_thread")

RULES: dict[str, VoteRule] = {
    "int8": MomentumRule(),
    "int16": MomentumRule(buffer="int16", beta=0.99, beta2=0.1, floor=0.0, tilt=1.9),
    "compact": CompactRule(),
    "supermajority": SupermajorityRule(),
    "stochastic": StochasticRule(buffer="int8"),
}
every_rule = pytest.mark.parametrize("name", RULES)
MAX = float(np.finfo(np.float32).max)
SUBNORMAL = float(np.finfo(np.float32).smallest_subnormal)
SIZES = (0.0, SUBNORMAL, 1e-38, 3e-22, 1e-20, 1e-3, 1.0, 1e3, 1e15, 1e30, MAX)
SCALES = (float(np.finfo(np.float32).tiny), 1e-20, 1e-3, 1.0, 1e20, MAX)
RATES = (0.0, 5e-324, 1e-30, 1e-8, 1e-5, 1e-3, 1.0, 1e6, 1e30, 1.7e308)
BUFFER_TOP = {"int8": 127, "int16": 32_767, "compact": 31, "supermajority": 32_767, "stochastic": 127}
CARRY = {"int8": 31, "int16": 8191, "compact": 7, "supermajority": 16_383, "stochastic": 63}
"""Largest magnitude that a buffer brings into a step, written down a second time."""


def new_grid(name: str, words: np.ndarray, votes: np.ndarray, scale: np.ndarray, uses: int, backend: str) -> GhostGrid:
    """An unlocked grid of these levels, votes and scales, none of which came from an import."""
    rule = RULES[name]
    table = manifolds.build("compact" if name == "compact" else "prime-harmonic")
    grid = GhostGrid(*words.shape, table, Ballot(seed=3, rule=rule, backend=backend))
    grid.name, grid.uses = "g", uses
    grid.scale.copy_(torch.from_numpy(scale))
    grid.unlock()
    assert grid.state is not None
    if grid.state.votes is None:
        grid.indices.copy_(torch.from_numpy((words << table.vote_bits) + votes))
    else:
        grid.indices.copy_(torch.from_numpy(words))
        grid.state.votes.copy_(torch.from_numpy(votes))
    return grid


def levels_of(grid: GhostGrid) -> np.ndarray:
    return grid.tables().levels(grid.indices).numpy().astype(np.int64)


def votes_of(grid: GhostGrid) -> np.ndarray:
    assert grid.votes is not None
    return grid.votes.numpy().astype(np.int64)


def numbers_of(grid: GhostGrid) -> dict[str, torch.Tensor]:
    return {"indices": grid.indices, **grid.vote_state()}


def hashes(grid: GhostGrid) -> np.ndarray:
    """The draws of a step's cast, in Python integers."""
    key0, key1 = vote_units.hash_keys(grid.ballot.seed, grid.ballot.step, 0, tensor_id(grid.name))
    found = []
    for position in range(grid.indices.numel()):
        x = (position * 0x9E3779B1 + key0) % 2**32
        x ^= x >> 16
        x = (x * 0x85EBCA6B) % 2**32 ^ key1
        x ^= x >> 13
        x = x * 0xC2B2AE35 % 2**32
        found.append(x ^ x >> 16)
    return np.array(found).reshape(grid.shape)


def new_votes(grid: GhostGrid, gradient: np.ndarray, use: int) -> np.ndarray:
    """What one use casts in one micro-batch, int64, which has room for anything."""
    rule, ballot = grid.ballot.rule, grid.ballot
    if isinstance(rule, SupermajorityRule):
        yardstick, gate = rule.yardstick(grid)
        scaled = in_fixed_point(gradient, yardstick, 2.0**vote_units.WHISPER_BITS, vote_units.WHISPER_LIMIT << 12)
        return -np.where(np.abs(scaled) > max(gate, 0), np.sign(scaled), 0)
    assert isinstance(rule, MomentumRule)
    units = rule.units(grid)
    scaled = in_fixed_point(gradient, rule.yardstick(grid)[0], 65536.0, units.wide)
    draw = hashes(grid) + (ballot.micro_batch * grid.uses + use) * units.spacing & 0xFFFF
    return -((np.clip(scaled, -units.limit, units.limit) + draw) >> 16)


def in_fixed_point(gradient: np.ndarray, yardstick: torch.Tensor, one: float, most: int) -> np.ndarray:
    assert bool(torch.isfinite(yardstick).all()) and bool((yardstick >= 0).all())
    with np.errstate(over="ignore", under="ignore"):
        scaled = gradient * yardstick.numpy()[:, None] * np.float32(one)
    assert not np.isnan(scaled).any()
    return np.rint(np.clip(scaled, -most, most)).astype(np.int64)


def assert_moved_by_votes(grid: GhostGrid, rate: float, shrink: int, before: np.ndarray, votes: np.ndarray) -> None:
    """Graded votes: every weight stands on one of the two levels around its target, which Python integers name."""
    rule = grid.ballot.rule
    assert isinstance(rule, MomentumRule)
    assert grid.state is not None and grid.state.push is not None
    assert int(grid.state.push.min()) >= 0 and int(grid.state.push.max()) <= 2**21
    inverse = grid.inverse_scale().clamp(max=1 << 36) * grid.state.push >> 16
    stride = kernels.integer_strides(inverse, rate, rule.units(grid).unit).tolist()
    assert all(0 <= s <= 2**46 for s in stride)
    fixed = grid.tables().fixed.tolist()
    after = levels_of(grid)
    for (i, j), old in np.ndenumerate(before):
        size = fixed[abs(int(old))]
        size -= size * shrink >> 32
        target = (size if old >= 0 else -size) + int(votes[i, j]) * stride[i]
        target = min(max(target, -(2**40)), 2**40)
        low = bisect.bisect_right(fixed, abs(target)) - 1
        sign = -1 if target < 0 else 1
        allowed = {sign * low, sign * min(low + (fixed[low] < abs(target)), len(fixed) - 1)}
        assert int(after[i, j]) in (allowed if votes[i, j] or shrink else {int(old)})


def assert_faded(before: np.ndarray, after: np.ndarray, carry: int) -> None:
    """Votes keep their sign or vanish, and never grow."""
    assert ((after == 0) | (np.sign(after) == np.sign(before))).all()
    assert (np.abs(after) <= np.minimum(np.abs(before), carry)).all()


def assert_rows_are_sane(grid: GhostGrid) -> None:
    assert grid.state is not None
    for name, numbers in {**grid.state.rows, **grid.state.columns}.items():
        assert bool(torch.isfinite(numbers).all()), name
        assert name == "row_sketch" or bool((numbers >= 0).all()), name


CASE: dict[str, object] = {"shape": (3, 4), "micro_batches": 1, "uses": 1, "first": [1e-3, 1.0], "seed": 1}


@st.composite
def cases(draw: st.DrawFn) -> dict[str, object]:
    """A grid's shape and some steps of it; what fills them comes from a seed."""
    few = st.integers(1, 6)
    return {
        "shape": draw(st.one_of(st.tuples(few, few), st.tuples(st.just(1), few), st.tuples(few, st.just(1)))),
        "micro_batches": draw(st.sampled_from((1, 2, 3, 5, 9))),
        "uses": draw(st.integers(1, 2)),
        "first": draw(st.lists(st.sampled_from(SIZES), min_size=1, max_size=3)),
        "steps": draw(
            st.lists(
                st.tuples(
                    st.lists(st.sampled_from(SIZES), min_size=1, max_size=4),
                    st.sampled_from(RATES),
                    st.sampled_from((0, 0, 1, 1 << 22)),
                ),
                min_size=1,
                max_size=4,
            )
        ),
        "seed": draw(st.integers(0, 2**32 - 1)),
    }


def gradients(rng: np.random.Generator, sizes: list[float], shape: tuple[int, ...]) -> np.ndarray:
    """Of these sizes, mixed within rows or row by row, of either sign; some rows, and some uses, are all zero."""
    by_row = rng.choice(sizes, (*shape[:-1], 1)) * np.ones(shape)
    chosen = np.where(rng.random((*shape[:-1], 1)) < 0.5, rng.choice(sizes, shape), by_row)
    # Each element by itself, a row as a whole, or an element always alike, so that votes add up.
    chosen *= rng.choice([-1.0, 1.0], (shape, (*shape[:-1], 1), shape[-2:])[rng.integers(3)])
    chosen[rng.random(shape[:-1]) < 0.1] = 0.0
    return chosen.astype(np.float32)


@every_rule
@settings(derandomize=True, deadline=None, max_examples=40)
@example(case={**CASE, "first": [3e-22], "steps": [([0.0], 1e-3, 0)] * 4})
@example(case={**CASE, "micro_batches": 32, "uses": 2, "steps": [([1e15], 1e-3, 0)] * 4})
@given(case=cases())
def test_whole_steps_of_extremes_never_wrap(name: str, case: dict[str, object]) -> None:
    """Votes are those of 64-bit integers, weights go where votes point, row numbers stay finite; in both backends the
    same bits. Of the two given cases, one lets the row means vanish and one fills the smallest buffer."""
    (rows, columns), count, uses = case["shape"], case["micro_batches"], case["uses"]  # type: ignore[misc]
    rng = np.random.default_rng(case["seed"])
    top = 511 if name == "compact" else 32_767
    words = rng.choice([-top, 1 - top, -2, -1, 0, 1, 2, top - 1, top], (rows, columns)).astype(np.int16)
    votes = rng.choice([-CARRY[name], -1, 0, 1, CARRY[name]], (rows, columns)).astype(np.int16)
    scale = rng.choice(SCALES, rows).astype(np.float32)
    grids = {b: new_grid(name, words, votes, scale, uses, b) for b in kernels.BACKENDS}
    grid, every = grids["torch"], torch.arange(rows)
    first = torch.from_numpy(gradients(rng, case["first"], (uses, rows, columns)))  # type: ignore[arg-type]
    for g in grids.values():
        g.ballot.open("measure", 0, 0, count)
        for use in range(uses):
            g.ballot.rule.measure(g, first[use], every)
        g.finish_measuring()
        assert_rows_are_sane(g)
    for step, (sizes, rate, shrink) in enumerate(case["steps"]):  # type: ignore[arg-type]
        shrink = shrink if grid.ballot.rule.decays else 0
        step_gradients = gradients(rng, sizes, (count, uses, rows, columns))
        expected = votes_of(grid)
        for g in grids.values():
            g.begin_step()
        for k, use in np.ndindex(count, uses):
            if grid.waiting:
                break
            for g in grids.values():
                g.ballot.open("cast", step, k, count)
                g.ballot.rule.cast(g, torch.from_numpy(step_gradients[k, use]), every, use, 1)
            expected = expected + new_votes(grid, step_gradients[k, use], use)
            assert np.abs(expected).max() <= BUFFER_TOP[name]
            assert np.array_equal(votes_of(grid), expected)
        assert_rows_are_sane(grid)
        before = levels_of(grid)
        counts = {b: g.apply_votes(rate, shrink) for b, g in grids.items()}
        assert counts["torch"] == counts["numba"] and all(0 <= c <= 2**41 * before.size for c in counts["torch"])
        after = levels_of(grid)
        assert grid.tables().unused(grid.indices) == 0 and np.abs(after).max() <= top
        moved = np.sign(after - before)
        if isinstance(grid.ballot.rule, SupermajorityRule):
            clear = np.abs(expected) > grid.ballot.rule.jitter
            assert (~clear | (moved == 0) | (moved == np.sign(expected))).all() and not moved[expected == 0].any()
        elif not grid.waiting:
            most = grid.ballot.rule.most(grid.ballot.rule.units(grid))
            expected = expected.clip(-most, most)
            assert_moved_by_votes(grid, rate, shrink, before, expected)
            assert shrink or ((moved == 0) | (moved == np.sign(expected))).all()
        if not (grid.waiting and isinstance(grid.ballot.rule, MomentumRule)):
            assert_faded(expected, votes_of(grid), CARRY[name])
        for g in grids.values():
            assert_rows_are_sane(g)
        numbers = [numbers_of(g) for g in grids.values()]
        assert all(torch.equal(numbers[0][n], numbers[1][n]) for n in numbers[0]), "the backends differ"
    assert math.isfinite(grid.mean_size())


@pytest.mark.parametrize("sign", [-1, 1])
@every_rule
def test_votes_that_would_wrap_are_not_let_in(name: str, sign: int) -> None:
    """From a file: what a step begins with is at most what one ends with, else its own votes find no room."""
    rule = RULES[name]
    shape = (2, 3)
    assert rule.carry == CARRY[name]
    for most in (CARRY[name], CARRY[name] + 1, BUFFER_TOP[name]):
        votes = np.zeros(shape, np.int16)
        votes[1, 2] = sign * most
        grid = new_grid(name, np.full(shape, 5, np.int16), np.zeros(shape, np.int16), np.ones(shape[0]), 1, "numba")
        state = {k: v.clone() for k, v in grid.vote_state().items()}
        if "votes" in state:
            state["votes"].copy_(torch.from_numpy(votes))
        else:
            grid.indices += torch.from_numpy(votes)
        if most == CARRY[name]:
            grid.load_vote_state(state)
            assert np.array_equal(votes_of(grid), votes)
            continue
        words = f"^the votes of g reach {most}, rule {rule.name} ends a step with at most {CARRY[name]}: [^\\n]+$"
        with pytest.raises(GhostError, match=words):
            grid.load_vote_state(state)
        assert not grid.unlocked
        if name == "compact":
            with pytest.raises(GhostError, match=words):
                grid.unlock()


# -- layers of one column, one row, or nothing ------------------------------------------------------------------------


class Net(nn.Module):
    """An embedding, a projection with a bias, and a head: sizes (vocabulary, columns, rows, classes)."""

    def __init__(self, name: str, sizes: tuple[int, int, int, int], zeros: str, backend: str) -> None:
        super().__init__()
        ballot = Ballot(rule=RULES[name], backend=backend)
        table = manifolds.build("compact" if name == "compact" else "prime-harmonic")
        vocabulary, columns, rows, classes = sizes
        generator = torch.Generator().manual_seed(sum(sizes))
        grids = []
        for shape in ((vocabulary, columns), (rows, columns), (classes, rows)):
            grid = GhostGrid(*shape, table, ballot)
            dense = torch.randn(shape, generator=generator) * 0.3
            if zeros != "none":
                dense[:: 2 if zeros == "rows" else 1] = 0.0
            grid.import_weights(dense)
            grids.append(grid)
        self.embed = GhostEmbedding(grids[0])
        self.up = GhostLinearTandem(grids[1], bias=True)
        self.head = GhostLinearTandem(grids[2])
        core.name_grids(self, ballot)
        self.grids, self.ballot = core.grids_of(self), ballot
        for grid in grids:
            grid.unlock()

    def forward(self, ids: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return ghost_cross_entropy(torch.tanh(self.up(self.embed(ids)) + 0.1), targets, self.head.grid)

    def dense(self, ids: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """The loss and the gradients of the three matrices, by autograd in float64."""
        found = {n: g.dequantize().double().requires_grad_() for n, g in self.grids.items()}
        embed, up, head = found.values()
        assert self.up.bias is not None
        h = torch.tanh(embed[ids] @ up.T + self.up.bias.detach().double() + 0.1)
        loss = F.cross_entropy(h @ head.T, targets, reduction="sum")
        return loss, dict(zip(found, torch.autograd.grad(loss, list(found.values())), strict=True))


SHAPES = [(1, 1, 1, 1), (1, 1, 1, 3), (5, 1, 4, 3), (5, 4, 1, 3), (1, 4, 5, 3), (5, 4, 3, 1), (5, 4, 4, 6)]


@pytest.mark.parametrize("zeros", ["none", "rows", "all"])
@pytest.mark.parametrize("sizes", SHAPES, ids=str)
@every_rule
def test_layers_of_one_column_one_row_and_zeros(name: str, sizes: tuple[int, int, int, int], zeros: str) -> None:
    """Loss and gradients are those of float64; steps move weights against them, and both backends leave the same."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(sizes[0], (6,), generator=generator)
    targets = torch.randint(sizes[3], (6,), generator=generator)
    ends = []
    heard: dict[str, torch.Tensor] = {}
    for backend in kernels.BACKENDS:
        net = Net(name, sizes, zeros, backend)
        for grid in net.grids.values():

            def listen(gradient: torch.Tensor, rows: torch.Tensor, *rest: int, grid: GhostGrid = grid) -> None:
                shares = 1.0 if grid.state is None or grid.state.shares is None else grid.state.shares
                heard[grid.name] = torch.zeros(grid.shape).index_copy(0, rows, gradient.float() / shares)
                GhostGrid.accept(grid, gradient, rows, *rest)

            grid.accept = listen  # type: ignore[method-assign]
        for step in range(3):
            wanted_loss, wanted = net.dense(ids, targets)
            before = {n: levels_of(g) for n, g in net.grids.items()}
            old_votes = {n: votes_of(g) for n, g in net.grids.items()}
            heard.clear()
            for mode in ("measure", "cast"):
                net.ballot.open(mode, step, 0, 1)
                loss = net(ids, targets)
                loss.backward()
                net.ballot.close()
                for grid in net.grids.values():
                    grid.finish_measuring()
            torch.testing.assert_close(loss.detach().double(), wanted_loss.detach(), rtol=1e-4, atol=1e-5)
            assert not net.ballot.non_finite
            for n, gradient in wanted.items():
                torch.testing.assert_close(heard[n].double(), gradient, rtol=1e-3, atol=1e-5)
                votes = votes_of(net.grids[n])
                cast = votes - old_votes[n]
                assert (cast * np.sign(heard[n].numpy()) <= 0).all()
            votes_before = {n: votes_of(g) for n, g in net.grids.items()}
            moved = core.apply_votes(net.grids, 0.05)
            for n, grid in net.grids.items():
                way = np.sign(levels_of(grid) - before[n])
                clear = np.abs(votes_before[n]) > getattr(RULES[name], "jitter", 0)
                assert (~clear | (way == 0) | (way == np.sign(votes_before[n]))).all()
                assert not way[votes_before[n] == 0].any()
                assert grid.tables().unused(grid.indices) == 0 and moved[n].flips == np.count_nonzero(way)
                assert math.isfinite(moved[n].relative) and 0 <= moved[n].flip_rate <= 1
                assert_rows_are_sane(grid)
        if zeros == "none" and sizes[3] > 1:
            assert all((g.indices != 0).any() for g in net.grids.values())
        if zeros == "all" and sizes[3] > 1:
            # Where every weight is nothing the head alone has a gradient: it begins.
            assert not net.head.grid.waiting
        if sizes[3] == 1:
            # The only class is certain: no gradient, nothing to measure, nothing moves.
            assert all(g.waiting for g in net.grids.values())
        ends.append({n: {k: t.clone() for k, t in numbers_of(g).items()} for n, g in net.grids.items()})
    for n in ends[0]:
        assert all(torch.equal(ends[0][n][k], ends[1][n][k]) for k in ends[0][n]), n


@every_rule
@pytest.mark.parametrize("listening", [False, True])
def test_no_tokens_leave_no_trace(name: str, listening: bool) -> None:
    """Forward and backward of nothing in each mode, before and after the first observation."""
    for armed in (False, True):
        net = Net(name, (5, 4, 3, 6), "none", "numba")
        net.ballot.listening = listening
        ids = torch.arange(5)
        if armed:
            net.ballot.open("measure", 0, 0, 1)
            net(ids, ids).backward()
            for grid in net.grids.values():
                grid.finish_measuring()
        before = {n: {k: t.clone() for k, t in numbers_of(g).items()} for n, g in net.grids.items()}
        for mode in ("measure", "cast", "retract"):
            net.ballot.open(mode, 1, 0, 1)
            loss = net(ids[:0], ids[:0])
            loss.backward()
            assert float(loss.detach()) == 0.0 and not net.ballot.non_finite
            for n, grid in net.grids.items():
                grid.finish_measuring()
                assert all(torch.equal(before[n][k], t) for k, t in numbers_of(grid).items())
                assert grid.hearing.agreement.cosines is None


# -- training on what is not finite, or is nothing --------------------------------------------------------------------

TRAINED = {
    "int8": {"vote_rule": "momentum"},
    "int16": {"vote_rule": "momentum", "vote_buffer": "int16"},
    "compact": {"vote_rule": "compact"},
    "supermajority": {"vote_rule": "supermajority"},
    "stochastic": {"vote_rule": "stochastic", "vote_buffer": "int8"},
}
COUNT = 3
"""Micro-batches in a step."""


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """A random model of two narrow layers with a tied head, on two manifolds."""
    folder = tmp_path_factory.mktemp("numbers")
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2, "num_key_value_heads": 1}
    source = write_source(folder / "source", tiny_config(**sizes))
    found = {}
    for manifold in ("prime-harmonic", "compact"):
        import_source(source, folder / f"{manifold}.pt", manifold=manifold)
        found[manifold] = load_checkpoint(folder / f"{manifold}.pt")
    return found


class Batches:
    """Micro-batches of three rows of ten tokens, counted; those in ``masked`` have nothing to learn."""

    seq_len, batch_size = 10, 3

    def __init__(self) -> None:
        self.count = 0
        self.masked: set[int] = set()

    def __next__(self) -> Batch:
        ids = torch.randint(256, (3, 10), generator=torch.Generator().manual_seed(self.count))
        labels = torch.full_like(ids, -100) if self.count in self.masked else ids.clone()
        labels[:, 0] = -100
        self.count += 1
        return Batch(ids, labels, torch.arange(10).expand(3, -1), 3, 30, int((labels != -100).sum()))

    def state_dict(self) -> dict[str, Any]:
        return {"count": self.count}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.count = state["count"]


def new_trainer(checkpoints: dict[str, dict[str, Any]], name: str, **changes: Any) -> VoteTrainer:
    settings: dict[str, Any] = {"lr": 4e-3, "warmup": 0, "gradient_checkpointing": False, "device": "cpu", **changes}
    recipe = Recipe(steps=9, grad_accum=COUNT, **TRAINED[name], **settings)
    model = model_from_checkpoint(checkpoints["compact" if name == "compact" else "prime-harmonic"])
    return VoteTrainer(model, Batches(), recipe)  # type: ignore[arg-type]


State = dict[str, torch.Tensor]


def state_of(trainer: VoteTrainer) -> State:
    """All tensors that the next step depends on, by reference."""
    return dict(
        walk_tensors({"model": model_tensors(trainer.model), "votes": trainer.votes(), "state": trainer.state()})
    )


def same(a: State, b: State) -> bool:
    return a.keys() == b.keys() and all(torch.equal(tensor, b[name]) for name, tensor in a.items())


def saved(trainer: VoteTrainer) -> dict[str, Any]:
    """What a checkpoint would hold, as copies."""
    return copy.deepcopy(
        {"model": model_tensors(trainer.model), "votes": trainer.votes(), "train_state": trainer.state()}
    )


def put_back(trainer: VoteTrainer, content: dict[str, Any]) -> None:
    copy_tensors(trainer.model, content["model"])
    trainer.optimizer = trainer._new_optimizer()
    # The optimizer would go on with the tensors that it is handed.
    trainer.restore({**content, "train_state": copy.deepcopy(content["train_state"])})


def leave_out(trainer: VoteTrainer, missing: set[int], patch: pytest.MonkeyPatch) -> None:
    """Some micro-batches of a step neither measure nor vote."""
    cast, measure = trainer.caster.cast, trainer.caster.measure
    patch.setattr(trainer.caster, "cast", lambda batch, turn: None if turn.number in missing else cast(batch, turn))
    patch.setattr(trainer.caster, "measure", lambda *given: None if 0 in missing else measure(*given))


POISONS = ("nan", "inf", "-inf", "overflow")


def poison(gradient: torch.Tensor, kind: str) -> torch.Tensor:
    """A copy with one element that is not finite, or finite throughout with a sum beyond its type."""
    damaged = gradient.clone()
    flat = damaged.view(-1)
    if kind == "overflow":
        flat[: len(flat) // 2 + 1] = torch.finfo(damaged.dtype).max
        assert bool(torch.isfinite(damaged).all()) and not bool(torch.isfinite(damaged.sum()))
    else:
        flat[len(flat) // 2] = float(kind)
    return damaged


def spoiled(trainer: VoteTrainer, site: tuple[str, str], missing: int, kind: str) -> StepResult:
    """A step in which one micro-batch breaks at one place, every time that it is run.

    Args:
        site: ("weight", grid and use), whose gradient breaks alone; ("output", module), from where on everything
            below is broken too; ("float", parameter).
    """
    hooks: list[Any] = []
    broken = []
    what, name = site

    def here(gradient: torch.Tensor) -> torch.Tensor:
        if trainer.ballot.micro_batch != missing:
            return gradient
        broken.append(trainer.ballot.mode)
        return poison(gradient, kind)

    with pytest.MonkeyPatch.context() as patch:
        if what == "weight":
            grid, wanted = trainer.grids[name[:-2]], int(name[-1])

            def accept(gradient: torch.Tensor, rows: torch.Tensor, use: int, part: int = 0) -> None:
                GhostGrid.accept(grid, here(gradient) if use == wanted else gradient, rows, use, part)

            patch.setattr(grid, "accept", accept, raising=False)
        elif what == "float":
            hooks.append(trainer.floats[name].register_hook(here))
        else:

            def follow(module: nn.Module, inputs: Any, output: torch.Tensor) -> None:
                if output.requires_grad:
                    output.register_hook(here)

            hooks.append(trainer.model.get_submodule(name).register_forward_hook(follow))
        result = trainer.step()
    for hook in hooks:
        hook.remove()
    assert broken
    return result


def sites_of(trainer: VoteTrainer) -> list[tuple[str, str]]:
    """Every use of every grid, every module that has one, every norm and bias."""
    uses = [("weight", f"{n}/{use}") for n, grid in trainer.grids.items() for use in range(grid.uses)]
    outputs = [("output", n.removesuffix(".grid")) for n in trainer.grids]
    return uses + outputs + [("float", n) for n in trainer.floats]


def check_sites(trainer: VoteTrainer, missings: Sequence[int], offset: int) -> None:
    """Break the next step at every site, in each of these micro-batches; in four ways by turns."""
    start = saved(trainer)
    sites = sites_of(trainer)
    assert len(sites) > 40
    for missing in missings:
        put_back(trainer, start)
        with pytest.MonkeyPatch.context() as patch:
            leave_out(trainer, {missing}, patch)
            wanted = trainer.step()
        control = copy.deepcopy(state_of(trainer))
        assert not same(control, dict(walk_tensors(start)))
        trainer.step()
        later = copy.deepcopy(state_of(trainer))
        for turn, site in enumerate(sites):
            # The sums of norms and of what modules hand down are not asked for: only single numbers count there.
            kinds = POISONS if site[0] == "weight" else POISONS[:-1]
            kind = kinds[(turn + missing + offset) % len(kinds)]
            put_back(trainer, start)
            result = spoiled(trainer, site, missing, kind)
            assert result.skipped == wanted.skipped == 1, (site, missing, kind)
            assert result.loss == wanted.loss
            assert same(state_of(trainer), control), (site, missing, kind)
            if turn == 0:
                # Nor is there a trace where no checkpoint would show it.
                trainer.step()
                assert same(state_of(trainer), later)


@pytest.mark.parametrize("name", TRAINED)
def test_what_is_not_finite_leaves_no_trace_anywhere(checkpoints: dict[str, dict[str, Any]], name: str) -> None:
    """At every matrix, norm and bias, in every micro-batch: the step is the one without that micro-batch."""
    trainer = new_trainer(checkpoints, name)
    trainer.step()
    check_sites(trainer, range(COUNT), list(TRAINED).index(name))


@pytest.mark.parametrize("name", ["int8", "supermajority"])
@pytest.mark.parametrize("waiting", ["all", "some"])
def test_a_micro_batch_that_breaks_anywhere_measures_nothing(
    checkpoints: dict[str, dict[str, Any]], name: str, waiting: str
) -> None:
    """The same where all matrices, or those of one layer that was opened later, have no yardstick yet."""
    trainer = new_trainer(checkpoints, name)
    if waiting == "some":
        trainer.step()
        for n, grid in trainer.grids.items():
            if "layers.1." in n:
                grid.lock()
                grid.unlock()
    assert sum(grid.waiting for grid in trainer.grids.values()) >= 7
    check_sites(trainer, [0], len(waiting))


@pytest.mark.parametrize("name", TRAINED)
def test_a_micro_batch_with_nothing_to_learn_is_as_if_it_never_was(
    checkpoints: dict[str, dict[str, Any]], name: str
) -> None:
    """Every position masked: it casts nothing. The step counts it, as one that was skipped."""
    trainer = new_trainer(checkpoints, name)
    for start in (saved(trainer), None):
        if start is None:
            trainer.step()
            start = saved(trainer)
        for masked in ({0}, {1}, {2}, {0, 1}, {1, 2}):
            ends = []
            for away in (False, True):
                put_back(trainer, start)
                first = trainer.batches.count  # type: ignore[attr-defined]
                trainer.batches.masked = {first + k for k in masked}  # type: ignore[attr-defined]
                with pytest.MonkeyPatch.context() as patch:
                    if away:
                        leave_out(trainer, masked, patch)
                    result = trainer.step()
                assert math.isfinite(result.loss) and result.loss > 0
                assert result.skipped == (len(masked) if away else 0)
                ends.append((result.loss, copy.deepcopy(state_of(trainer))))
            assert ends[0][0] == ends[1][0] and same(ends[0][1], ends[1][1]), masked


def test_a_step_with_nothing_to_learn_is_refused_and_moves_nothing(checkpoints: dict[str, dict[str, Any]]) -> None:
    for name in TRAINED:
        trainer = new_trainer(checkpoints, name)
        trainer.step()
        before = copy.deepcopy(state_of(trainer))
        trainer.batches.masked = set(range(3, 6))  # type: ignore[attr-defined]
        with pytest.raises(TrainError, match=r"^step 1 has no answer token: [^\n]+$"):
            trainer.step()
        assert same(state_of(trainer), before)
        # The next data are as good as ever.
        assert math.isfinite(trainer.step().loss) and not same(state_of(trainer), before)


def test_a_masked_micro_batch_casts_nothing(checkpoints: dict[str, dict[str, Any]]) -> None:
    """Its loss is nothing and its gradients are zeros, not NaN, whether or not activations are computed again."""
    for checkpointing in (False, True):
        trainer = new_trainer(checkpoints, "int8", gradient_checkpointing=checkpointing)
        trainer.step()
        before = copy.deepcopy(state_of(trainer))
        trainer.batches.masked = {3}  # type: ignore[attr-defined]
        batch = next(trainer.batches)
        assert (
            trainer.caster.cast(batch, Turn(trainer.done, 0, trainer.shape.grad_accum, 1.0)) == 0.0
            and not trainer.ballot.non_finite
        )
        assert all(p.grad is None or not p.grad.any() for p in trainer.floats.values())
        assert same(state_of(trainer), before)

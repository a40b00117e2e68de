"""Numbers at their limits: votes and indices saturate and never wrap, whatever the gradients, rates and shapes; what is
not finite leaves no trace, at any matrix and in any micro-batch."""

from __future__ import annotations

import bisect
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import ghost_kernels as kernels
import manifolds
from ghost_core import GhostGrid
from vote_rules import Ballot, CompactRule, MomentumRule, StochasticRule, SupermajorityRule, VoteRule, tensor_id

pytestmark = pytest.mark.usefixtures("one_thread")

RULES: dict[str, VoteRule] = {
    "int8": MomentumRule(),
    "int16": MomentumRule(buffer="int16", beta=0.99, floor=0.0, tilt=1.9),
    "compact": CompactRule(),
    "supermajority": SupermajorityRule(),
    "stochastic": StochasticRule(buffer="int8"),
}
every_rule = pytest.mark.parametrize("name", RULES)
MAX = float(np.finfo(np.float32).max)
SUBNORMAL = float(np.finfo(np.float32).smallest_subnormal)
SIZES = (0.0, SUBNORMAL, 1e-38, 1e-20, 1e-3, 1.0, 1e3, 1e15, 1e30, MAX)
SCALES = (float(np.finfo(np.float32).tiny), 1e-20, 1e-3, 1.0, 1e20, MAX)
RATES = (0.0, 5e-324, 1e-30, 1e-8, 1e-5, 1e-3, 1.0, 1e6, 1e30, 1.7e308)
BUFFER_TOP = {"int8": 127, "int16": 32_767, "compact": 31, "supermajority": 32_767, "stochastic": 127}
CARRY = {"int8": 31, "int16": 8191, "compact": 7, "supermajority": 16_383, "stochastic": 63}
"""Largest magnitude that a buffer brings into a step."""


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
    key0, key1 = kernels.hash_keys(grid.ballot.seed, grid.ballot.step, 0, tensor_id(grid.name))
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
        scaled = in_fixed_point(gradient, yardstick, 2.0**kernels.WHISPER_BITS, kernels.WHISPER_LIMIT << 12)
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
    inverse = grid.inverse_scale().clamp(max=1 << 36) * rule.yardstick(grid)[1] >> 16
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
    for name, numbers in grid.state.rows.items():
        assert bool(torch.isfinite(numbers).all()), name
        assert name == "row_sketch" or bool((numbers >= 0).all()), name


@st.composite
def cases(draw: st.DrawFn) -> dict[str, object]:
    """A grid's shape and three steps of it; what fills them comes from a seed."""
    few = st.integers(1, 6)
    return {
        "shape": draw(st.one_of(st.tuples(few, few), st.tuples(st.just(1), few), st.tuples(few, st.just(1)))),
        "micro_batches": draw(st.integers(1, 5)),
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
                max_size=3,
            )
        ),
        "seed": draw(st.integers(0, 2**32 - 1)),
    }


def gradients(rng: np.random.Generator, sizes: list[float], shape: tuple[int, ...]) -> np.ndarray:
    """Of these sizes, mixed within rows or row by row, of either sign; some rows, and some uses, are all zero."""
    by_row = rng.choice(sizes, (*shape[:-1], 1)) * np.ones(shape)
    chosen = np.where(rng.random((*shape[:-1], 1)) < 0.5, rng.choice(sizes, shape), by_row)
    chosen *= rng.choice([-1.0, 1.0], shape) if rng.random() < 0.5 else rng.choice([-1.0, 1.0], (*shape[:-1], 1))
    chosen[rng.random(shape[:-1]) < 0.1] = 0.0
    return chosen.astype(np.float32)


@every_rule
@settings(derandomize=True, deadline=None, max_examples=60)
@given(case=cases())
def test_whole_steps_of_extremes_never_wrap(name: str, case: dict[str, object]) -> None:
    """Votes are those of 64-bit integers, weights go where votes point, row numbers stay finite; in both backends the
    same bits."""
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
            assert_moved_by_votes(grid, rate, shrink, before, expected)
            assert shrink or ((moved == 0) | (moved == np.sign(expected))).all()
        if not (grid.waiting and isinstance(grid.ballot.rule, MomentumRule)):
            assert_faded(expected, votes_of(grid), CARRY[name])
        for g in grids.values():
            g.update_yardstick()
            assert_rows_are_sane(g)
        numbers = [numbers_of(g) for g in grids.values()]
        assert all(torch.equal(numbers[0][n], numbers[1][n]) for n in numbers[0]), "the backends differ"
    assert math.isfinite(grid.mean_size())

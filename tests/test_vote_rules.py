"""Vote rules: each follows its update equation, written here a second time in float64; they learn, and only from signs
that mean something; their state and draws depend on what they should and on nothing else."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import ghost_core as core
import ghost_kernels as kernels
import manifolds
import momentum_rules
import vote_rules
import vote_units
from ballots import Ballot, RuleError, VoteRule
from ghost_core import GhostLinearTandem
from ghost_grid import GhostError, GhostGrid
from momentum_rules import CompactRule, MomentumRule
from vote_rules import rule_named
from whisper_rules import StochasticRule, SupermajorityRule

pytestmark = pytest.mark.usefixtures("one_thread")

MOMENTUM = {
    "int8": MomentumRule(),
    "int16": MomentumRule(buffer="int16", beta=0.9, floor=0.1, tilt=0.0),
    "compact": CompactRule(tilt=0.5),
}
UNIT = {"int8": 16, "int16": 512, "compact": 4}
EVERY = {**MOMENTUM, "supermajority": SupermajorityRule(), "stochastic": StochasticRule(buffer="int8")}

every_rule = pytest.mark.parametrize("rule", EVERY.values(), ids=list(EVERY))


def generator(*seed: int) -> np.random.Generator:
    return np.random.default_rng(seed)


def new_grid(
    rule: VoteRule,
    shape: tuple[int, int] = (6, 40),
    seed: int = 1,
    ballot_seed: int = 0,
    uses: int = 1,
    weights: np.ndarray | None = None,
    table: str | None = None,
    backend: str | None = None,
) -> GhostGrid:
    """An unlocked grid on a table that suits the rule, of Gaussian weights where none are given."""
    table = table or ("compact" if rule.vote_bits else "linear")
    grid = GhostGrid(*shape, manifolds.build(table), Ballot(seed=ballot_seed, rule=rule, backend=backend))
    grid.name, grid.uses = "model.layer", uses
    weights = generator(seed).standard_normal(shape) * 0.3 if weights is None else weights
    grid.import_weights(torch.from_numpy(weights.astype(np.float32)))
    grid.unlock()
    return grid


def value_of(grid: GhostGrid) -> np.ndarray:
    """The grid's weights in float64, from the table and not from a kernel."""
    table = grid.manifold.values.double().numpy()
    return table[grid.indices.numpy().astype(int) + 32768] * grid.scale.double().numpy()[:, None]


def every_row(grid: GhostGrid) -> torch.Tensor:
    return torch.arange(len(grid.indices))


def measure(grid: GhostGrid, gradient: np.ndarray, micro_batches: int = 1) -> None:
    grid.ballot.open("measure", 0, 0, micro_batches)
    grid.accept(torch.from_numpy(gradient.astype(np.float32)), every_row(grid), 0)
    grid.ballot.close()
    grid.finish_measuring()


def cast(grid: GhostGrid, step: int, gradients: np.ndarray, order: list[int] | None = None) -> None:
    """Cast a step's gradients, ``(micro-batches, uses, out, in)``; without ``uses`` for a grid used once."""
    gradients = gradients.reshape(len(gradients), grid.uses, *grid.shape)
    for k in range(len(gradients)) if order is None else order:
        grid.ballot.open("cast", step, k, len(gradients))
        for use in range(grid.uses):
            gradient = torch.from_numpy(gradients[k, use].astype(np.float32))
            grid.accept(grid.shared(gradient), every_row(grid), use)
    grid.ballot.close()


def run_step(
    grid: GhostGrid, step: int, gradients: np.ndarray, rate: float, shrink: int = 0, order: list[int] | None = None
) -> tuple[int, int, int]:
    cast(grid, step, gradients, order)
    return grid.apply_votes(rate, shrink)


def everything(grid: GhostGrid) -> dict[str, torch.Tensor]:
    return {"indices": grid.indices.clone(), **{name: t.clone() for name, t in grid.vote_state().items()}}


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


# -- momentum and compact ---------------------------------------------------------------------------------------------


def sizes_of(
    rule: MomentumRule, r2: np.ndarray, g2: np.ndarray, observations: int, count: int
) -> tuple[np.ndarray, np.ndarray, float]:
    """``size[row]``, ``gain[row]`` and rho of the docstring, from the running means as stored, in float64."""
    mean = r2 / (1 - rule.beta2**observations)
    tensor = math.sqrt(mean[mean > 0].mean())
    size = np.maximum(np.sqrt(mean), rule.floor * tensor)
    agreement = 1.0
    if observations > 1:
        step = g2 / (1 - rule.beta2 ** (observations - 1))
        agreement = min(max(step.sum() / mean.sum(), 1 / count), 1.0)
    return size[:, None], (size[:, None] / tensor) ** rule.tilt, math.sqrt(agreement)


COPIES = 500
"""How often every weight and its gradient stand in a row, each time with draws of its own."""


def mean_of_copies(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean over a row's copies and the mean's own deviation, ``(out, in)`` each."""
    x = x.reshape(len(x), COPIES, -1)
    return x.mean(1), x.std(1) / math.sqrt(COPIES)


def assert_mean(found: np.ndarray, wanted: np.ndarray, grain: float) -> None:
    """The mean over copies is the wanted one, for integers times ``grain`` that were rounded by a draw."""
    mean, spread = mean_of_copies(found)
    error = mean - wanted
    # An outcome rarer than one in the copies leaves no trace in the spread: allow a handful.
    assert (np.abs(error) <= 5 * spread + 15 / COPIES * grain).all(), float((np.abs(error) - 5 * spread).max())
    # As a whole too: many small errors of one sign would pass the line above.
    clear = spread * math.sqrt(COPIES) > 0.05 * grain
    assert clear.sum() >= clear.size / 4
    assert abs((error[clear] / spread[clear]).mean()) < 5 / math.sqrt(clear.sum())


@pytest.mark.parametrize("shrink", [0, 2_000_000])
@pytest.mark.parametrize(("micro_batches", "uses"), [(1, 1), (4, 1), (3, 2)])
@pytest.mark.parametrize("name", MOMENTUM)
def test_momentum_follows_its_equation(
    name: str, micro_batches: int, uses: int, shrink: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Votes and weights, averaged over thousands of draws, are those of float64 for four steps; r2 is exact. What
    shares columns have and where votes are cut is tested below."""
    rule = dataclasses.replace(MOMENTUM[name], reach=1e9)
    rng = generator(2, micro_batches)
    rows, columns = 5, 4
    base = rng.uniform(-0.5, 0.5, (rows, columns))
    base[:, 0] = 0.9
    grid = new_grid(rule, (rows, columns * COPIES), weights=np.tile(base, COPIES), uses=uses)
    # One row far below the floor, one that sees nothing at first.
    loudness = np.array([1.0, 3.0, 0.01, 0.0, 0.5])[:, None]
    first = rng.standard_normal((rows, columns)) * loudness
    measure(grid, np.tile(first, COPIES), micro_batches)
    unit, rate = UNIT[name], 0.01
    grain = float(grid.manifold.fixed.diff().max()) / 2.0**40 * float(grid.scale.max())
    r2 = (1 - rule.beta2) * (first**2).mean(1)
    value, votes = value_of(grid)[:, :columns], np.zeros((rows, columns))
    shares, next_shares = np.ones(columns), np.array([1.0, 2.0, 0.5, 1.0])
    patched = torch.from_numpy(np.tile(next_shares, COPIES)).float()
    monkeypatch.setattr(momentum_rules, "column_shares", lambda c2: patched)
    for step in range(4):
        loudness[3] = 0.2 * step
        noise = rng.standard_normal((micro_batches, uses, rows, columns))
        gradients = (noise + rng.standard_normal((rows, columns))) * loudness
        state = grid.state.rows
        means = (state["r2"].double().numpy(), state["g2"].double().numpy())
        size, _, rho = sizes_of(rule, *means, step + 1, micro_batches)
        scaled = gradients * shares
        votes = votes - (1 - rule.beta) * unit * scaled.sum((0, 1)) / (micro_batches * rho * size)
        cast(grid, step, np.tile(gradients, COPIES))
        assert_mean(grid.votes.double().numpy(), votes, 1.0)
        grid.apply_votes(rate, shrink)
        means = (state["r2"].double().numpy(), state["g2"].double().numpy())
        new_size, gain, new_rho = sizes_of(rule, *means, step + 2, micro_batches)
        fresh = np.minimum(rho * size / (new_rho * new_size), momentum_rules.FRESHNESS_MAX)
        value = (1 - shrink / 2**32) * value + rate * gain * fresh * votes / unit
        votes = rule.beta * votes
        assert_mean(grid.votes.double().numpy(), votes, 1.0)
        assert_mean(value_of(grid), value, grain)
        r2 = rule.beta2 * r2 + (1 - rule.beta2) * (scaled**2).mean((0, 3)).sum(0)
        shares = next_shares
        # What a row a hundred times below its tensor's size casts is a handful of the units that are squared.
        np.testing.assert_allclose(state["r2"].double().numpy(), r2, rtol=2e-2)
        assert not state["row_squares"].any() and not state["row_sketch"].any()
    assert grid.state.observations == 5
    # A model that is itself at rest would prove nothing.
    assert np.abs(value - base).max() > 0.005


@pytest.mark.parametrize("rows", [100, 1300])
@pytest.mark.parametrize("name", MOMENTUM)
def test_columns_are_measured_by_the_votes_that_move_them(name: str, rows: int) -> None:
    """c2 in float64 from the votes that count, of every row or of some; shares are its powers of two."""
    rule, rng = MOMENTUM[name], generator(8)
    most = round(rule.reach * UNIT[name])
    grid = new_grid(rule, (rows, 24))
    loudness = 2.0 ** np.linspace(-6, 6, 24)
    c2 = np.zeros(24)
    every = rows // momentum_rules.COLUMN_ROWS or 1
    for step in range(12):
        gradients = rng.standard_normal((2, rows, 24)) * loudness * 1e-3
        if step == 0:
            measure(grid, gradients[0], 2)
        cast(grid, step, gradients)
        assert grid.state is not None and grid.state.shares is not None
        shares = grid.state.shares.double().numpy()
        votes = grid.votes.double().numpy()[::every].clip(-most, most)
        place = grid.state.shares.data_ptr()
        grid.apply_votes(1e-3)
        c2 = rule.beta2 * c2 + (1 - rule.beta2) * (votes**2).mean(0) / shares**2
        np.testing.assert_allclose(grid.state.columns["c2"].double().numpy(), c2, rtol=1e-6)
        exact = np.sqrt(c2.mean() / np.maximum(c2, 1e-300))
        found = grid.state.shares.double().numpy()
        inside = (exact > 2.0**-10) & (exact < 2.0**4)
        assert (np.abs(np.log2(found / exact))[inside] <= 0.5 + 1e-6).all()
        assert (found[exact >= 2.0**4.5] == 2.0**4).all()
        assert (np.frexp(found)[0] == 0.5).all(), "powers of two"
        assert grid.state.shares.data_ptr() == place
    # What is quiet to a fiftieth is heard in the end, to a bit of rounding; what was loud is no louder than others.
    assert grid.state.shares.max() >= 8 and grid.state.shares.min() <= 1 / 2
    heard = np.sqrt((votes**2).mean(0))
    assert heard.max() / heard[loudness > 2.0**-1].min() < 6 < loudness.max() / loudness[loudness > 2.0**-1].min()


def test_shares_without_votes_and_of_single_columns() -> None:
    ones = torch.ones(5)
    assert torch.equal(momentum_rules.column_shares(torch.zeros(5)), ones)
    assert torch.equal(momentum_rules.column_shares(torch.full((5,), 1e30)), ones)
    assert torch.equal(momentum_rules.column_shares(torch.full((5,), 1e-38)), ones)
    lonely = momentum_rules.column_shares(torch.tensor([0.0, 0.0, 0.0, 1e20]))
    assert lonely.tolist() == [16.0, 16.0, 16.0, 0.5]
    # Half way between two powers of two, by the logarithm.
    assert momentum_rules.column_shares(torch.tensor([1.0, 3.0])).tolist() == [1.0, 1.0]
    assert momentum_rules.column_shares(torch.tensor([1.0, 7.1])).tolist() == [2.0, 1.0]


# By the row's mean of before and of then: 10 / sqrt(0.9 + 0.1 * 100), which is 3, and 4.1 with a longer memory; where
# bits are few, votes are clipped beside. With reach there is hardly a vote of it that is not cut to a tenth.
@pytest.mark.parametrize(("reach", "least", "most"), [(1e9, 0.6, 4.5), (0.75, 0.25, 1.0)])
@pytest.mark.parametrize("name", MOMENTUM)
def test_a_loud_step_moves_weights_no_farther_than_others(name: str, reach: float, least: float, most: float) -> None:
    """Ten times as loud as all before: by the mean of before it would move them ten times as far."""
    rule = dataclasses.replace(MOMENTUM[name], beta=0.0, reach=reach)
    rng = generator(9)
    grid = new_grid(rule, (64, 64), weights=np.full((64, 64), 0.4))
    travelled = []
    for step in range(30):
        loud = 10.0 if step == 29 else 1.0
        gradients = rng.standard_normal((4, 64, 64)) * loud
        if step == 0:
            measure(grid, gradients[0], 4)
        before = value_of(grid)
        run_step(grid, step, gradients, 1e-3)
        travelled.append(np.abs(value_of(grid) - before).mean())
    usual = np.median(travelled[10:29])
    assert least < travelled[29] / usual < most


@pytest.mark.parametrize("reach", [0.01, 0.4, 1.0, 2.5, 1e9])
@pytest.mark.parametrize("name", MOMENTUM)
def test_votes_beyond_reach_neither_move_a_weight_nor_stay(name: str, reach: float) -> None:
    """A step's end is that of a grid whose votes were cut by hand: weights, votes, measures of columns, counts."""
    found = []
    for by_hand in (False, True):
        rng = generator(10)
        rule = dataclasses.replace(MOMENTUM[name], beta=0.1, reach=1e9 if by_hand else reach)
        grid = new_grid(rule, (30, 40), weights=np.full((30, 40), 0.4))
        gradients = rng.standard_t(2, (4, 30, 40))
        measure(grid, gradients[0] / 3, 4)
        cast(grid, 0, gradients)
        votes = grid.votes.numpy().astype(int)
        most = max(1, round(reach * UNIT[name]))
        assert (np.abs(votes).max() > most) == (reach < 1e9)
        if by_hand:
            cut = torch.from_numpy(votes.clip(-most, most) - votes).to(grid.indices.dtype)
            (grid.indices if grid.state.votes is None else grid.state.votes).add_(cut)
        found.append((grid.apply_votes(1e-3, 99), everything(grid)))
    assert found[0][0] == found[1][0] and same(found[0][1], found[1][1])


@pytest.mark.parametrize("name", MOMENTUM)
def test_the_steps_gradient_is_estimated_by_its_sketch(name: str) -> None:
    """g2 is unbiased: over many seeds its mean is the mean square of the averaged gradient."""
    rule = MOMENTUM[name]
    rng = generator(3)
    gradients = rng.standard_normal((4, 6, 40)) * 0.3 + rng.standard_normal((6, 40)) * 0.2
    exact = (gradients.mean(0) ** 2).mean(1)
    rounds = 400
    found = np.empty((rounds, 6))
    for seed in range(rounds):
        grid = new_grid(rule, ballot_seed=seed)
        measure(grid, gradients[0], 4)
        run_step(grid, 0, gradients, 0.0)
        found[seed] = grid.state.rows["g2"].double().numpy() / (1 - rule.beta2)
    spread = found.std(0) / math.sqrt(rounds)
    assert (np.abs(found.mean(0) - exact) < 5 * spread).all() and (spread < 0.1 * exact).all()


@pytest.mark.parametrize("name", MOMENTUM)
@pytest.mark.parametrize("count", [4, 32])
def test_agreement_is_one_over_k_for_noise_and_one_for_one_opinion(name: str, count: int) -> None:
    rule = dataclasses.replace(MOMENTUM[name], beta2=0.9)
    for opinions, wanted in (("same", 1.0), ("noise", 1 / count), ("opposite", 1 / count)):
        rng = generator(4, count)
        grid = new_grid(rule, (100, 64))
        for step in range(12):
            gradients = rng.standard_normal((count, 100, 64))
            if opinions == "same":
                gradients[:] = gradients[0]
            elif opinions == "opposite":
                gradients[::2] = -gradients[1::2]
            if step == 0:
                measure(grid, gradients[0], count)
                assert rule.agreement(grid.state, count) == 1.0
            run_step(grid, step, gradients, 0.0)
        # Of 100 rows over about ten steps: a relative error of about 5 %.
        assert wanted <= rule.agreement(grid.state, count) * (1.2 if opinions == "same" else 1.0) + 1e-9
        assert rule.agreement(grid.state, count) <= wanted * 1.2
        mean = float(rule.corrected(grid.state).mean())
        step_mean = float(grid.state.rows["g2"].mean()) / (1 - 0.9**12)
        assert mean == pytest.approx(1.0, rel=0.05)
        assert step_mean == pytest.approx(0.0 if opinions == "opposite" else wanted, rel=0.2, abs=1e-6)


@pytest.mark.parametrize("tilt", [0.0, 0.5, 1.0, 1.9])
def test_rows_move_by_their_size_to_the_power_of_the_tilt(tilt: float) -> None:
    """Two rows, one ten times as loud: alike at tilt 0, ten times as far at 1, by one RMS for the tensor."""
    rule = MomentumRule(buffer="int16", tilt=tilt, floor=0.0, beta=0.0, reach=1e9)
    shape = (2, 4000)
    grid = new_grid(rule, shape, weights=np.full(shape, 0.4))
    gradients = np.array([[1.0], [10.0]]) * np.ones(shape)
    measure(grid, gradients)
    before = value_of(grid)
    run_step(grid, 0, gradients[None], 1e-2)
    moved = (before - value_of(grid)).mean(1)
    tensor = math.sqrt(50.5)
    np.testing.assert_allclose(moved, 1e-2 * np.array([1 / tensor, 10 / tensor]) ** tilt, rtol=5e-3)


@pytest.mark.parametrize("tilt", [1.0, 1.9])
def test_the_gain_of_a_row_is_limited(tilt: float) -> None:
    """One loud row among ten thousand silent ones: it moves ``GAIN_MAX`` times as far as the tensor's average."""
    rule = MomentumRule(buffer="int16", tilt=tilt, beta=0.0)
    shape = (10_000, 2)
    grid = new_grid(rule, shape)
    gradient = np.full(shape, 1e-6)
    gradient[17] = 1.0
    measure(grid, gradient)
    gain = rule.yardstick(grid)[1]
    assert int(gain.argmax()) == 17
    assert 0.9 * momentum_rules.GAIN_MAX * 65536 < int(gain[17]) <= momentum_rules.GAIN_MAX * 65536


@pytest.mark.parametrize("tilt", [1.0, 1.9, 1.99])
def test_a_loud_row_of_tiny_weights_moves_against_its_gradient(tilt: float) -> None:
    """The largest gain meets the smallest scale: the product fits."""
    rule = MomentumRule(buffer="int16", tilt=tilt, beta=0.0, reach=1e9)
    shape = (10_000, 2)
    weights = np.full(shape, 0.1)
    weights[17] = 1e-6
    grid = new_grid(rule, shape, weights=weights)
    gradient = np.full(shape, 1e-6)
    gradient[17] = 1.0
    measure(grid, gradient)
    before = grid.indices.clone()
    run_step(grid, 0, gradient[None], 1e-9)
    assert (grid.indices[17] < before[17]).all()
    # Scales below 2^-16 count as that: the row moves by the largest gain times 1e-9 · 2^16 of its own scale.
    assert (value_of(grid)[17] <= 1e-6 - 0.8 * momentum_rules.GAIN_MAX * 1e-9 * 2**16 * 1.25e-6).all()


@pytest.mark.parametrize("name", MOMENTUM)
def test_many_small_micro_batches_vote_like_one_large(name: str) -> None:
    """32 micro-batches of one row and one micro-batch of 32 rows: after some steps, the same votes up to rounding."""
    rule = MOMENTUM[name]
    rng = generator(5)
    shape = (64, 48)
    grids = {count: new_grid(rule, shape) for count in (1, 32)}
    signal = rng.standard_normal(shape) * 0.15
    total = {count: np.zeros(shape) for count in grids}
    for step in range(80):
        # One gradient per row of text; a micro-batch's loss is the mean over its rows.
        rows_of_text = signal + rng.standard_normal((32, *shape))
        for count, grid in grids.items():
            gradients = rows_of_text.reshape(count, 32 // count, *shape).mean(1)
            if step == 0:
                measure(grid, gradients[0], count)
            cast(grid, step, gradients)
            if step >= 40:
                total[count] += grid.votes.double().numpy()
            grid.apply_votes(0.0)
    assert not np.array_equal(total[1], total[32])
    slope = (total[1] * total[32]).sum() / (total[1] ** 2).sum()
    assert slope == pytest.approx(1.0, abs=0.1)
    assert np.corrcoef(total[1].ravel(), total[32].ravel())[0, 1] > 0.95
    assert np.corrcoef(total[32].ravel(), -signal.ravel())[0, 1] > 0.5


@every_rule
def test_a_step_that_is_cut_short_measures_what_it_saw(rule: VoteRule) -> None:
    """Two micro-batches of eight, the others skipped, say of rows what the same two say as a step of their own."""
    gradients = generator(20).standard_normal((8, 1, 6, 400))
    found = []
    for kept, voted in ((2, None), (8, 2), (8, None)):
        grid = new_grid(rule, (6, 400))
        measure(grid, gradients[0, 0], kept)
        for k in range(2):
            grid.ballot.open("cast", 0, k, kept)
            grid.accept(grid.shared(torch.from_numpy(gradients[k, 0].astype(np.float32))), every_row(grid), 0)
        grid.ballot.close()
        grid.ballot.voted = voted
        grid.apply_votes(0.0)
        found.append({name: grid.state.rows[name].double().numpy() for name in rule.row_means})
    whole, short, mistaken = found
    for name in rule.row_means:
        # The sketch of a few coarse votes is no exact number.
        np.testing.assert_allclose(short[name], whole[name], rtol=0.1 if name != "g2" else 0.5)
        assert (mistaken[name] < 0.97 * short[name]).all()


# -- supermajority and stochastic -------------------------------------------------------------------------------------


def gate_of(rule: SupermajorityRule, r1: np.ndarray, r2: np.ndarray, observations: int) -> float:
    """mean|g| + sensitivity · std|g| over the whole tensor, from the running means."""
    bias = 1 - rule.beta2**observations
    size, square = r1.mean() / bias, r2.mean() / bias
    return size + rule.sensitivity * math.sqrt(square - size**2)


@pytest.mark.parametrize("micro_batches", [1, 8])
@pytest.mark.parametrize("buffer", ["int8", "int16"])
def test_supermajority_follows_its_equation(buffer: str, micro_batches: int) -> None:
    """Without memory between steps nothing is drawn: votes, flips and means are those of float64, weight by weight.

    The stride is 16 indices at this rate and scale; gradients within rounding of the gate are left out.
    """
    threshold = 1 if micro_batches == 1 else 5
    rule = SupermajorityRule(buffer=buffer, decay=0.0, threshold=threshold, sensitivity=0.4, beta2=0.8)
    rng = generator(6, micro_batches)
    shape, rate = (12, 50), 2.0**-11
    weights = rng.uniform(-0.5, 0.5, shape)
    weights[:, 0] = 0.8
    grid = new_grid(rule, shape, weights=weights)
    assert grid.scale.tolist() == [1.0] * 12
    first = rng.standard_normal(shape) * 10.0 ** rng.uniform(-1, 1, (12, 1))
    measure(grid, first, micro_batches)
    r1, r2 = 0.2 * np.abs(first).mean(1), 0.2 * (first**2).mean(1)
    clear = np.ones(shape, dtype=bool)
    index = grid.indices.numpy().astype(int)
    for step in range(5):
        gradients = (rng.standard_normal((micro_batches, *shape)) + rng.standard_normal(shape)) * 3
        gate = gate_of(rule, r1, r2, step + 1)
        rms = math.sqrt(r2.mean() / (1 - 0.8 ** (step + 1)))
        clear &= (np.abs(np.abs(gradients) - gate) > 4e-3 * rms).all(0)
        votes = -(np.sign(gradients) * (np.abs(gradients) > gate)).sum(0).astype(int)
        cast(grid, step, gradients)
        assert (grid.votes.numpy() == votes)[clear].all()
        through = np.abs(votes) >= threshold
        index = index + np.where(through, 16 * np.sign(votes), 0)
        flips, *_ = grid.apply_votes(rate)
        assert (grid.indices.numpy() == index)[clear].all()
        assert abs(flips - through.sum()) <= (~clear).sum() and 0 < through[clear].sum() < clear.sum()
        assert not grid.votes.any()
        r1 = 0.8 * r1 + 0.2 * np.abs(gradients).mean((0, 2))
        r2 = 0.8 * r2 + 0.2 * (gradients**2).mean((0, 2))
        np.testing.assert_allclose(grid.state.rows["r1"].double().numpy(), r1, rtol=1e-3)
        np.testing.assert_allclose(grid.state.rows["r2"].double().numpy(), r2, rtol=1e-3)
        assert not grid.state.rows["row_sizes"].any() and not grid.state.rows["row_squares"].any()
    assert clear.mean() > 0.5


def test_supermajority_keeps_quiet_votes_and_lets_them_fade() -> None:
    """Votes below the threshold add up over steps, each step times the decay on average."""
    rule = SupermajorityRule(decay=0.75, threshold=60, beta2=0.9)
    base = np.array([[1.0, -1.0, 5.0, -5.0, 0.01]])
    grid = new_grid(rule, (1, 5 * COPIES), weights=np.full((1, 5 * COPIES), 0.4))
    measure(grid, np.tile(base, COPIES), 2)
    before, votes = grid.indices.clone(), np.zeros((1, 5))
    for step in range(6):
        # The mean of sizes stays 2.4, their deviation about 2.1: only the two loud ones vote, in both micro-batches.
        cast(grid, step, np.tile(np.stack([base, base]), COPIES))
        votes = votes + np.array([[0, 0, -2, 2, 0]])
        grid.apply_votes(0.01)
        votes = votes * 0.75
        mean, spread = mean_of_copies(grid.votes.double().numpy())
        assert (np.abs(mean - votes) <= 5 * spread).all()
        assert (mean[0, [0, 1, 4]] == 0).all() and (spread[0, [2, 3]] > 0).all() == (step > 0 or spread[0, 2] > 0)
    assert torch.equal(grid.indices, before)


@pytest.mark.parametrize("jitter", [0, 2])
def test_stochastic_flips_with_its_probabilities(jitter: int) -> None:
    """A weight with votes flips in the direction of votes plus noise, at the rule's chance; one without stays."""
    rule = StochasticRule(jitter=jitter, chance=0.3)
    count = 20_000
    grid = new_grid(rule, (4, count), weights=np.full((4, count), 0.4))
    measure(grid, np.ones((4, count)))
    votes = np.array([1, -2, 0, 4])
    grid.state.votes.copy_(torch.from_numpy(votes)[:, None].expand(4, count))
    before = grid.indices.clone()
    # The scale is 0.5 in every row: a flip of 1/64 is 1/32 of the table, 1024 indices.
    grid.apply_votes(2.0**-6)
    moved = (grid.indices.int() - before.int()).numpy()
    assert set(np.unique(moved)) <= {-1024, 0, 1024}
    noise = np.arange(-jitter, jitter + 1)
    for row, m in enumerate(votes):
        for way in (-1, 1):
            wanted = 0.3 * (np.sign(m + noise) == way).mean() if m else 0.0
            found = (moved[row] == 1024 * way).mean()
            assert abs(found - wanted) <= 5 * math.sqrt(wanted * (1 - wanted) / count)
        # Who was not drawn keeps votes that fade without bias: the two draws know nothing of each other.
        kept = grid.votes[row].double().numpy()[moved[row] == 0]
        sure = np.abs(noise).max() < abs(m)
        if sure or m == 0:
            assert abs(kept.mean() - 0.95 * m) <= 5 * kept.std() / math.sqrt(len(kept))
            assert (kept.std() > 0) == (m != 0)


# -- all rules --------------------------------------------------------------------------------------------------------


def gradients_for(rng: np.random.Generator, count: int, grid: GhostGrid) -> np.ndarray:
    return rng.standard_normal((count, *grid.shape)) + rng.standard_normal(grid.shape) * 2


@every_rule
@pytest.mark.parametrize("backend", kernels.BACKENDS)
def test_order_of_micro_batches_changes_no_bit(rule: VoteRule, backend: str) -> None:
    results = []
    for order in (list(range(8)), list(range(7, -1, -1)), [3, 0, 7, 5, 1, 6, 2, 4]):
        rng = generator(7)
        grid = new_grid(rule, backend=backend)
        measure(grid, gradients_for(rng, 1, grid)[0], 8)
        flips = 0
        for step in range(3):
            flips += run_step(grid, step, gradients_for(rng, 8, grid), 0.02, order=order)[0]
        assert flips > 0
        results.append(everything(grid))
    assert same(results[0], results[1]) and same(results[0], results[2])


@every_rule
def test_both_backends_leave_the_same_bits(rule: VoteRule) -> None:
    results = []
    for backend in kernels.BACKENDS:
        rng = generator(8)
        grid = new_grid(rule, (9, 33), backend=backend)
        measure(grid, gradients_for(rng, 1, grid)[0], 4)
        counts = [run_step(grid, step, gradients_for(rng, 4, grid), 0.02) for step in range(4)]
        results.append((everything(grid), counts))
    assert same(results[0][0], results[1][0]) and results[0][1] == results[1][1]


@pytest.mark.parametrize("part", ["seed", "step", "name"])
@pytest.mark.parametrize("name", MOMENTUM)
def test_every_part_of_the_key_changes_the_rounding_of_votes(name: str, part: str) -> None:
    """Half a vote everywhere: about half of the elements vote, others in another step, tensor or run."""

    def votes(seed: int = 3, step: int = 5, tensor: str = "a.b", micro_batch: int = 0) -> torch.Tensor:
        rule = MOMENTUM[name]
        grid = new_grid(rule, (20, 100), ballot_seed=seed)
        grid.name = tensor
        ones = np.ones((20, 100))
        measure(grid, ones, 2)
        half = 0.5 * 2 / ((1 - rule.beta) * UNIT[name])
        cast(grid, step, np.stack([ones, ones]) * half, order=[micro_batch])
        return grid.votes.clone()

    base = votes()
    assert torch.equal(base, votes())
    assert set(base.unique().tolist()) == {-1, 0} and abs(base.double().mean() + 0.5) < 5 * 0.5 / math.sqrt(2000)
    changed = votes(**{"seed": {"seed": 4}, "step": {"step": 6}, "name": {"tensor": "a.c"}}[part])
    assert abs((base == changed).double().mean() - 0.5) < 5 * 0.5 / math.sqrt(2000)
    # Elements of a tensor draw apart: neighbours agree half of the time, down and across.
    for other in (base.roll(1, 0), base.roll(1, 1)):
        assert abs((base == other).double().mean() - 0.5) < 5 * 0.5 / math.sqrt(2000)
    # The two halves of a step share their draw: together exactly one vote.
    assert bool((base + votes(micro_batch=1) == -1).all())


@pytest.mark.parametrize("uses", [1, 2])
@pytest.mark.parametrize("name", MOMENTUM)
def test_all_uses_in_all_micro_batches_share_one_rounding(name: str, uses: int) -> None:
    """Half a vote in each of a step's slots: together exactly half their number, in every weight."""
    rule = dataclasses.replace(MOMENTUM[name], beta=0.5)
    grid = new_grid(rule, (20, 50), uses=uses)
    ones = np.ones((20, 50))
    measure(grid, ones, 4)
    gradient = 0.5 / (1 - rule.beta) / UNIT[name] * 4
    cast(grid, 0, np.full((4, uses, 20, 50), gradient))
    assert grid.votes.unique().tolist() == [-2 * uses]


@pytest.mark.parametrize("part", ["seed", "step", "name"])
@every_rule
def test_every_part_of_the_key_changes_moves_and_fading(rule: VoteRule, part: str) -> None:
    def after(seed: int = 3, step: int = 5, tensor: str = "a.b") -> tuple[torch.Tensor, torch.Tensor]:
        shape = (20, 100)
        grid = new_grid(rule, shape, ballot_seed=seed, weights=np.full(shape, 0.4))
        grid.name = tensor
        measure(grid, np.ones(shape))
        if grid.state.votes is None:
            grid.indices += 3
        else:
            grid.state.votes.fill_(3 if rule.name in ("supermajority", "stochastic") else 7)
        if rule.name == "supermajority":
            grid.state.votes[:10] = 9
        grid.ballot.step = step
        # Three tenths of an index, or of a compact level.
        level = int(grid.manifold.levels(grid.indices)[0, 0])
        gap = int(grid.manifold.fixed[level + 1] - grid.manifold.fixed[level]) / 2.0**40 * float(grid.scale[0])
        rate = 0.3 * gap
        if isinstance(rule, MomentumRule):
            rate *= vote_units.UNITS[rule.bits] / int(grid.votes[0, 0])
        grid.apply_votes(rate)
        return grid.manifold.levels(grid.indices), grid.votes.clone()

    levels, votes = after()
    again = after()
    assert torch.equal(levels, again[0]) and torch.equal(votes, again[1])
    other_levels, other_votes = after(**{"seed": {"seed": 4}, "step": {"step": 6}, "name": {"tensor": "a.c"}}[part])
    assert len(levels.unique()) > 1 and len(votes.unique()) > 1
    assert (levels != other_levels).double().mean() > 0.02
    assert (votes != other_votes).double().mean() > 0.02


class NoFloats(TorchDispatchMode):
    """Raises where an operation reads or writes a floating tensor."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        pending = [args, kwargs or {}, result]
        while pending:
            value = pending.pop()
            if isinstance(value, torch.Tensor) and (value.is_floating_point() or value.is_complex()):
                raise AssertionError(f"{func} touched a {value.dtype} tensor")
            if isinstance(value, list | tuple):
                pending.extend(value)
            elif isinstance(value, dict):
                pending.extend(value.values())
        return result


@every_rule
def test_no_float_tensor_is_touched_when_votes_are_applied(rule: VoteRule) -> None:
    rng = generator(9)
    grid = new_grid(rule, (9, 33), backend="torch")
    measure(grid, gradients_for(rng, 1, grid)[0], 8)
    cast(grid, 0, gradients_for(rng, 8, grid))
    before = grid.indices.clone()
    with pytest.raises(AssertionError, match="touched"), NoFloats():
        grid.dequantize()
    # Computed once for a layer, from its float scales; moves only read it.
    grid.inverse_scale()
    rule.close_step(grid)
    with NoFloats():
        flips, *_ = rule.apply(grid, 0.05, 5000 if isinstance(rule, MomentumRule) else 0)
    assert flips > 0 and not torch.equal(grid.indices, before)


RATES = {"int8": 0.02, "int16": 0.02, "compact": 0.02, "supermajority": 0.03, "stochastic": 0.1}


def regression(name: str, scramble: bool) -> tuple[float, float]:
    """Mean square error before and after 120 steps of 8 micro-batches; votes by true gradients, or by their sizes with
    random signs."""
    rng = generator(10)
    shape, count, steps = (8, 24), 8, 120
    target = rng.standard_normal(shape) * 0.3
    grid = new_grid(EVERY[name], shape, weights=rng.standard_normal(shape) * 0.3)
    test_inputs = rng.standard_normal((400, 24))

    def loss() -> float:
        return float(((test_inputs @ (value_of(grid) - target).T) ** 2).mean())

    start = loss()
    for step in range(steps):
        x = rng.standard_normal((count, 16, 24))
        error = x @ (value_of(grid) - target).T
        gradients = 2 / 16 * error.transpose(0, 2, 1) @ x
        if scramble:
            gradients *= rng.choice([-1, 1], gradients.shape)
        if step == 0:
            measure(grid, gradients[0], count)
        run_step(grid, step, gradients, RATES[name] * (1 - step / steps))
    return start, loss()


@pytest.mark.parametrize("name", EVERY)
def test_every_rule_learns_a_regression_and_not_from_shuffled_signs(name: str) -> None:
    start, end = regression(name, scramble=False)
    assert end < 0.02 * start
    start, end = regression(name, scramble=True)
    assert end > 0.7 * start


@every_rule
def test_a_locked_grid_is_unchanged(rule: VoteRule) -> None:
    """Its neighbour learns; the locked one keeps every bit, has no state and refuses votes."""
    ballot = Ballot(rule=rule)
    layers = {}
    for name in ("open", "locked"):
        grid = new_grid(rule, (12, 12), seed=len(name))
        grid.name, grid.ballot = name, ballot
        layers[name] = GhostLinearTandem(grid)
    grids = {name: layer.grid for name, layer in layers.items()}
    grids["locked"].lock()
    before = {name: grid.indices.clone() for name, grid in grids.items()}
    x = torch.from_numpy(generator(11).standard_normal((30, 12)).astype(np.float32))
    for mode, count in (("measure", 1), ("cast", 8)):
        for k in range(count):
            ballot.open(mode, 0, k, 8)
            layers["open"](layers["locked"](x)).square().sum().backward()
        ballot.close()
        grids["open"].finish_measuring()
    moved = core.apply_votes(grids, 0.05)
    assert moved.keys() == {"open"} and moved["open"].flips > 0
    assert torch.equal(grids["locked"].indices, before["locked"])
    assert not torch.equal(grids["open"].indices, before["open"])
    assert grids["locked"].state is None and grids["locked"].votes is None
    for refused in (
        lambda: grids["locked"].apply_votes(0.1),
        lambda: grids["locked"].accept(torch.ones(12, 12), torch.arange(12), 0),
    ):
        with pytest.raises(GhostError, match="locked is locked"):
            refused()
    with pytest.raises(RuleError, match="locked is locked: it has no votes"):
        rule.cast(grids["locked"], torch.ones(12, 12), torch.arange(12), 0, 1)


@every_rule
def test_retracting_restores_every_bit(rule: VoteRule) -> None:
    rng = generator(12)
    grid = new_grid(rule)
    measure(grid, gradients_for(rng, 1, grid)[0], 4)
    run_step(grid, 0, gradients_for(rng, 4, grid), 0.02)
    before = everything(grid)
    gradients = torch.from_numpy(gradients_for(rng, 1, grid)[0].astype(np.float32) * 5)
    for mode in ("cast", "retract"):
        grid.ballot.open(mode, 1, 2, 4)
        grid.accept(gradients, every_row(grid), 0)
        assert same(everything(grid), before) == (mode == "retract")


@every_rule
def test_the_loudest_step_at_the_most_micro_batches_does_not_wrap(rule: VoteRule) -> None:
    """At the largest count that ``check`` lets through, from a carry at its limit, votes never change sides."""
    table = manifolds.build("compact" if rule.vote_bits else "linear")
    most = 0
    for count in range(1, 1026):
        try:
            rule.check(table, count, 1)
        except ValueError:
            break
        most = count
    assert most >= 64
    grid = new_grid(rule, (2, 30))
    measure(grid, np.full((2, 30), 1e-6), most)
    bits = 6 if rule.vote_bits else {"int8": 8, "int16": 16}[rule.buffer]
    carry = rule.carry if isinstance(rule, SupermajorityRule) else (1 << bits - 3) - 1
    sign = torch.tensor([[1], [-1]])
    if grid.state.votes is None:
        grid.indices += (sign * carry).to(torch.int16)
    else:
        grid.state.votes += (sign * carry).to(grid.state.votes.dtype)
    loud = np.array([[-1e6], [1e6]]) * np.ones((1, 30))
    for k in range(most):
        cast(grid, 0, np.broadcast_to(loud, (most, 2, 30)), order=[k])
        assert bool((grid.votes.int() * sign >= carry).all())
    assert int((grid.votes.int() * sign).max()) <= (1 << bits - 1) - 1
    assert grid.manifold.unused(grid.indices) == 0


# -- checks and names -------------------------------------------------------------------------------------------------


@every_rule
def test_check_refuses_the_other_manifolds(rule: VoteRule) -> None:
    for name in manifolds.NAMES:
        table = manifolds.build(name)
        if (name == "compact") == (rule.name == "compact"):
            rule.check(table, 1, 1)
            rule.check(table, 32, 2)
            continue
        other = "momentum" if rule.name == "compact" else "compact"
        with pytest.raises(RuleError, match=rf"rule {rule.name} needs.*has {name}: choose --vote-rule {other}, or"):
            rule.check(table, 1, 1)


@pytest.mark.parametrize(
    ("rule", "most"),
    [
        (MomentumRule(), 1024),
        (MomentumRule(buffer="int16"), 1024),
        (CompactRule(), 1024),
        (SupermajorityRule(), 512),
        (SupermajorityRule(buffer="int8"), 64),
        (StochasticRule(), 512),
        (StochasticRule(buffer="int8"), 64),
    ],
    ids=lambda x: f"{x.name}-{x.buffer}" if isinstance(x, VoteRule) else None,
)
@pytest.mark.parametrize("uses", [1, 2])
def test_check_refuses_more_micro_batches_than_a_buffer_counts(rule: VoteRule, most: int, uses: int) -> None:
    table = manifolds.build("compact" if rule.vote_bits else "linear")
    rule.check(table, most // uses, uses)
    with pytest.raises(RuleError, match=rf"{most // uses}.*micro-batches"):
        rule.check(table, most // uses + 1, uses)


@every_rule
def test_bytes_per_weight_are_what_a_grid_holds(rule: VoteRule) -> None:
    grid = new_grid(rule, (3, 50))
    held = grid.indices.nbytes + (0 if grid.state.votes is None else grid.state.votes.nbytes)
    assert rule.bytes_per_weight * 150 == held


def test_bytes_per_weight_as_documented() -> None:
    assert [rule_named(name).bytes_per_weight for name in vote_rules.RULES] == [3, 2, 4, 4]
    assert MomentumRule(buffer="int16").bytes_per_weight == 4
    assert SupermajorityRule(buffer="int8").bytes_per_weight == 3


def test_rule_named() -> None:
    assert list(vote_rules.RULES) == ["momentum", "compact", "supermajority", "stochastic"]
    for name, kind in vote_rules.RULES.items():
        assert type(rule_named(name)) is kind and rule_named(name) == kind() and rule_named(name).name == name
    assert rule_named(vote_rules.DEFAULT) == MomentumRule(
        buffer="int8", beta=0.5, beta2=0.9, floor=0.5, tilt=0.5, reach=0.75
    )
    assert rule_named("momentum", buffer="int16", beta=None) == MomentumRule(buffer="int16")
    assert rule_named("stochastic", chance=0.0, jitter=0) == StochasticRule(chance=0.0, jitter=0)
    assert rule_named("supermajority", beta=None) == SupermajorityRule()
    with pytest.raises(RuleError, match=r"'majority'.*momentum, compact, supermajority, stochastic"):
        rule_named("majority")
    with pytest.raises(RuleError, match="rule supermajority has no beta, floor"):
        rule_named("supermajority", floor=0.1, beta=0.7, decay=0.5)
    with pytest.raises(RuleError, match="rule momentum has no threshold"):
        rule_named("momentum", threshold=3)


@pytest.mark.parametrize(
    ("name", "change", "words"),
    [
        *((name, {"buffer": "int32"}, "buffer is 'int32', expected one of int8, int16") for name in vote_rules.RULES),
        *((name, {"beta2": 1.0}, "beta2 is 1.0, expected 0.1 to below 1.0") for name in vote_rules.RULES),
        *((name, {"beta2": math.nan}, "beta2 is nan") for name in vote_rules.RULES),
        ("momentum", {"beta": 1.0}, "beta is 1.0"),
        ("momentum", {"beta": -0.1}, "beta is -0.1"),
        ("compact", {"beta": math.nan}, "beta is nan"),
        ("momentum", {"floor": -0.5}, "floor is -0.5, expected at least 0"),
        ("compact", {"floor": math.nan}, "floor is nan"),
        ("momentum", {"tilt": -0.1}, "tilt is -0.1, expected 0.0 to below 2.0"),
        ("momentum", {"reach": 0.0}, "reach is 0.0, expected a finite number above 0"),
        ("momentum", {"reach": math.nan}, "reach is nan"),
        ("compact", {"reach": math.inf}, "reach is inf, expected a finite number above 0"),
        ("compact", {"tilt": 2.0}, "tilt is 2.0"),
        ("supermajority", {"decay": 1.0}, "decay is 1.0"),
        ("supermajority", {"threshold": 0}, "threshold is 0 and jitter 0, expected at least 1 and 0"),
        ("stochastic", {"jitter": -1}, "jitter -1"),
        ("stochastic", {"chance": 1.5}, "chance is 1.5, expected 0 to 1"),
        ("stochastic", {"chance": math.nan}, "chance is nan"),
        ("supermajority", {"sensitivity": math.nan}, "sensitivity is nan"),
        ("supermajority", {"sensitivity": math.inf}, "sensitivity is inf"),
    ],
)
def test_hyperparameters_out_of_range_are_refused(name: str, change: dict[str, Any], words: str) -> None:
    with pytest.raises(RuleError, match=words):
        rule_named(name, **change)


def test_rules_are_immutable_and_compare_by_value() -> None:
    rule = MomentumRule()
    with pytest.raises(dataclasses.FrozenInstanceError):
        rule.beta = 0.5  # type: ignore[misc]
    assert rule == MomentumRule() != MomentumRule(beta=0.7) and hash(rule) == hash(MomentumRule())
    assert MomentumRule() != CompactRule()

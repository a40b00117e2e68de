"""Kernels: both backends give the same bits, and they are right by brute force, in exact integers or in float64."""

from __future__ import annotations

import math
import os
import signal
from collections.abc import Callable
from typing import Any

import numba
import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import ghost_kernels as kernels
import manifolds
from ghost_kernels import KernelError, VoteUnits
from manifolds import FIXED_BITS, INDEX_MAX, Manifold

ONE = 1 << FIXED_BITS
GARBAGE = -12_345
KEYS = (0x12345678, 0x9ABCDEF0)
FOUR_KEYS = (0x12345678, 0x9ABCDEF0, 0xFFFFFFFF, 0x00000001)
SHAPES = [(1, 1), (1, 37), (23, 1), (2, 3000), (61, 127), (130, 1031), (40, 4099)]
SLICED = [(shape, None) for shape in SHAPES] + [((23, 1), 1), ((23, 1), 7), ((5, 127), 100), ((61, 127), 1000)]
"""With the torch backend's slices as shipped, of one row each, and of a few rows with a remainder."""
MANIFOLD = manifolds.build("prime-harmonic")
LINEAR = manifolds.build("linear")


def coarse_table() -> torch.Tensor:
    """A table whose upper part has gaps just below the largest that a manifold may have, 2^-10."""
    upper = 1 - np.arange(1001) * (2.0**-10 - 2.0**-22)
    half = np.concatenate([np.arange(INDEX_MAX - 1000) * 12 * 2.0**-24, upper[::-1]])
    return torch.from_numpy(np.concatenate([[-2.0], -half[:0:-1], half]).astype(np.float32))


COARSE = manifolds.from_values("coarse", coarse_table())


pytestmark = pytest.mark.usefixtures("one_thread")


def set_slices(monkeypatch: pytest.MonkeyPatch, elements: int | None) -> None:
    if elements is not None:
        monkeypatch.setattr(kernels, "SLICE_ELEMENTS", elements)


def generator(*seed: int) -> np.random.Generator:
    return np.random.default_rng(seed)


def some_scale(rows: int, rng: np.random.Generator) -> torch.Tensor:
    return torch.from_numpy((10.0 ** rng.uniform(-4, 1, rows)).astype(np.float32))


def some_weights(shape: tuple[int, int], scale: torch.Tensor, rng: np.random.Generator) -> torch.Tensor:
    """Weights of all sizes: bulk, near zero, entries themselves, zeros of both signs, beyond the scale, subnormal."""
    x = rng.standard_normal(shape) * 0.3 * 10.0 ** rng.choice([0.0, 0.0, -2.0, -5.0], shape)
    entries = MANIFOLD.values.numpy()[rng.integers(1, 65536, shape)]
    x = np.where(rng.random(shape) < 0.1, entries, x)
    odd = np.array([0.0, -0.0, 1.0, -1.0, 1.5, -7.0, 1e30, -1e30, 1e-41, -1e-45])
    x = np.where(rng.random(shape) < 0.1, rng.choice(odd, shape), x)
    return torch.from_numpy(x.astype(np.float32)) * scale[:, None]


def some_indices(shape: tuple[int, int], rng: np.random.Generator) -> torch.Tensor:
    x = rng.integers(-INDEX_MAX, INDEX_MAX + 1, shape)
    x = np.where(rng.random(shape) < 0.1, rng.choice([0, 1, -1, INDEX_MAX, -INDEX_MAX], shape), x)
    return torch.from_numpy(x.astype(np.int16))


def some_votes(shape: tuple[int, int], rng: np.random.Generator, limit: int = INDEX_MAX) -> torch.Tensor:
    x = np.rint(rng.standard_normal(shape) * 10.0 ** rng.uniform(-1, 5, shape)).clip(-limit, limit)
    return torch.from_numpy(x.astype(np.int16))


def some_stride(rows: int, rng: np.random.Generator) -> torch.Tensor:
    return torch.from_numpy((2.0 ** rng.uniform(0, 46, rows)).astype(np.int64))


def garbage(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    return torch.full(shape, GARBAGE, dtype=dtype)


# -- both backends, the same bits -------------------------------------------------------------------------------------


@pytest.mark.parametrize(("shape", "elements"), SLICED)
def test_dequantize_same_bits(shape: tuple[int, int], elements: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    set_slices(monkeypatch, elements)
    rng = generator(1, *shape)
    indices, scale = some_indices(shape, rng), some_scale(shape[0], rng)
    fused = kernels.dequantize(indices, scale, MANIFOLD, garbage(shape, torch.float32), "numba")
    reference = kernels.dequantize(indices, scale, MANIFOLD, garbage(shape, torch.float32), "torch")
    expected = MANIFOLD.values.numpy()[indices.numpy().astype(int) + 32768] * scale.numpy()[:, None]
    assert fused.dtype == torch.float32
    assert torch.equal(fused.view(torch.int32), reference.view(torch.int32))
    assert torch.equal(fused.view(torch.int32), torch.from_numpy(expected).view(torch.int32))


@pytest.mark.parametrize(("shape", "elements"), SLICED)
@pytest.mark.parametrize("table", [MANIFOLD, LINEAR], ids=lambda m: m.name)
def test_snap_same_bits(
    shape: tuple[int, int], table: Manifold, elements: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    set_slices(monkeypatch, elements)
    rng = generator(2, *shape)
    scale = some_scale(shape[0], rng)
    weights = some_weights(shape, scale, rng)
    fused, fused_report = kernels.snap(weights, scale, table, garbage(shape, torch.int16), "numba")
    reference, report = kernels.snap(weights, scale, table, garbage(shape, torch.int16), "torch")
    assert fused.dtype == torch.int16
    assert torch.equal(fused, reference)
    for count in ("elements", "zeros", "saturated"):
        assert getattr(fused_report, count) == getattr(report, count), count
    assert fused_report.signal == pytest.approx(report.signal, rel=1e-12)
    assert fused_report.noise == pytest.approx(report.noise, rel=1e-9)


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize(("shape", "elements"), SLICED)
def test_cast_same_bits(
    shape: tuple[int, int], sign: int, elements: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A shuffled subset of the rows of a larger tensor, gradients from nothing to far beyond the limit."""
    set_slices(monkeypatch, elements)
    rng = generator(3, *shape, sign + 1)
    total = shape[0] + 5
    rows = torch.from_numpy(rng.permutation(total)[: shape[0]])
    gradient = rng.standard_normal(shape) * 10.0 ** rng.uniform(-9, 4, shape)
    gradient = torch.from_numpy(np.where(rng.random(shape) < 0.02, 1e38, gradient).astype(np.float32))
    yardstick = torch.from_numpy((10.0 ** rng.uniform(-2, 4, total)).astype(np.float32))
    yardstick[rows[0]] = 0.0
    yardstick[rows[-1]] = torch.finfo(torch.float32).max
    votes = some_votes((total, shape[1]), rng, 16_000)
    squares = torch.from_numpy(rng.integers(0, 1 << 50, total))
    results = []
    for backend in kernels.BACKENDS:
        v, s = votes.clone(), squares.clone()
        kernels.cast_votes(gradient, rows, yardstick, v, s, keys=KEYS, limit=500, sign=sign, backend=backend)
        results.append((v, s))
    (v, s), (v_reference, s_reference) = results
    assert torch.equal(v, v_reference) and torch.equal(s, s_reference)
    others = torch.ones(total, dtype=torch.bool)
    others[rows] = False
    assert torch.equal(v[others], votes[others]) and torch.equal(s[others], squares[others])
    assert shape[0] * shape[1] == 1 or not torch.equal(v, votes)


@pytest.mark.parametrize(("shape", "elements"), SLICED)
@pytest.mark.parametrize("table", [MANIFOLD, LINEAR], ids=lambda m: m.name)
def test_apply_same_bits(
    shape: tuple[int, int], table: Manifold, elements: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    set_slices(monkeypatch, elements)
    rng = generator(4, *shape)
    indices, votes, stride = some_indices(shape, rng), some_votes(shape, rng), some_stride(shape[0], rng)
    votes[0, 0] = 3
    results = []
    for backend in kernels.BACKENDS:
        i, v = indices.clone(), votes.clone()
        counts = kernels.apply_votes(i, v, stride, table, keys=FOUR_KEYS, decay=45_875, carry=9_000, backend=backend)
        results.append((i, v, counts))
    (i, v, counts), (i_reference, v_reference, counts_reference) = results
    assert torch.equal(i, i_reference) and torch.equal(v, v_reference)
    assert counts == counts_reference and all(type(c) is int for c in counts)
    assert counts[0] == int((i != indices).sum()) > 0


def test_thread_count_changes_nothing() -> None:
    """All four operations with one thread, two and three; 130 x 1031 is just large enough for three."""
    shape = (130, 1031)
    rng = generator(5)
    scale = some_scale(shape[0], rng)
    weights = some_weights(shape, scale, rng)
    gradient = torch.from_numpy(rng.standard_normal(shape).astype(np.float32))
    stride = some_stride(shape[0], rng)
    votes, squares = some_votes(shape, rng, 16_000), torch.zeros(shape[0], dtype=torch.int64)
    results = []
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        indices, report = kernels.snap(weights, scale, MANIFOLD, garbage(shape, torch.int16), "numba")
        v, s = votes.clone(), squares.clone()
        rows = torch.arange(shape[0])
        kernels.cast_votes(gradient, rows, torch.ones(shape[0]) * 99, v, s, keys=KEYS, limit=500, backend="numba")
        counts = kernels.apply_votes(indices, v, stride, MANIFOLD, keys=FOUR_KEYS, decay=9, carry=9, backend="numba")
        dense = kernels.dequantize(indices, scale, MANIFOLD, garbage(shape, torch.float32), "numba")
        results.append([indices, v, s, dense, torch.tensor([*counts, report.zeros, report.saturated])])
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_strided_tensors_are_worked_in_place() -> None:
    """Every second column of a larger buffer: the rest of it stays as it was."""
    rng = generator(6)
    whole = garbage((5, 14), torch.float32)
    indices = some_indices((5, 7), rng)
    scale = some_scale(5, rng)
    expected = kernels.dequantize(indices, scale, MANIFOLD, backend="torch")
    kernels.dequantize(indices, scale, MANIFOLD, whole[:, ::2], "numba")
    assert torch.equal(whole[:, ::2], expected) and bool((whole[:, 1::2] == GARBAGE).all())


# -- snap and scale ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("table", [MANIFOLD, LINEAR], ids=lambda m: m.name)
def test_snap_is_the_nearest_entry(table: Manifold) -> None:
    rng = generator(7)
    shape = (12, 90)
    scale = some_scale(shape[0], rng)
    weights = some_weights(shape, scale, rng)
    indices, report = kernels.snap(weights, scale, table, garbage(shape, torch.int16))
    half = table.values.numpy()[32768:].astype(np.float64)
    quotient = (weights / scale[:, None]).double().clamp(-2, 2).numpy()
    expected = np.empty(shape, dtype=np.int64)
    for i in range(shape[0]):
        expected[i] = np.abs(half[None, :] - np.abs(quotient[i])[:, None]).argmin(1)
    expected = np.where(quotient < 0, -expected, expected)
    np.testing.assert_array_equal(indices.numpy(), expected)

    # The quotient above is rounded to float32; seen from exact arithmetic it costs at most its own rounding.
    exact = weights.double().numpy() / scale.double().numpy()[:, None]
    inside = np.abs(exact) <= 1
    error = np.abs(np.sign(exact) * half[np.abs(expected)] - exact)
    for i in range(shape[0]):
        least = np.abs(half[None, :] - np.abs(exact[i])[:, None]).min(1)
        assert (error[i] <= least + np.abs(exact[i]) * 2.0**-23)[inside[i]].all()

    dense = half[np.abs(expected)] * np.sign(expected) * scale.double().numpy()[:, None]
    assert report.elements == indices.numel()
    assert report.zeros == int((expected == 0).sum()) > 0
    assert report.saturated == int((np.abs(quotient) > 1).sum()) > 0
    assert report.signal == pytest.approx(float((weights.double() ** 2).sum()), rel=1e-12)
    assert report.noise == pytest.approx(float(((weights.double().numpy() - dense) ** 2).sum()), rel=1e-5)


@pytest.mark.parametrize("backend", kernels.BACKENDS)
@pytest.mark.parametrize("table", [MANIFOLD, LINEAR], ids=lambda m: m.name)
def test_all_usable_indices_survive_the_round_trip(backend: str, table: Manifold) -> None:
    every = torch.arange(-INDEX_MAX, INDEX_MAX + 1).to(torch.int16).view(5, -1)
    scale = torch.tensor([1.0, 0.25, 2.0**-100, 1024.0, 1.0])
    dense = kernels.dequantize(every, scale, table, backend=backend)
    back, report = kernels.snap(dense, scale, table, garbage(tuple(every.shape), torch.int16), backend)
    assert torch.equal(back, every)
    assert (report.noise, report.saturated, report.zeros, report.snr_db) == (0.0, 0, 1, math.inf)


@pytest.mark.parametrize("backend", kernels.BACKENDS)
def test_snap_of_midpoints_zeros_and_what_lies_beyond(backend: str) -> None:
    half = MANIFOLD.values.numpy()[32768:].astype(np.float64)
    middle = (half[:-1] + half[1:]) / 2
    lower = np.flatnonzero(middle.astype(np.float32) == middle)[::97]
    assert len(lower) > 100
    weights = torch.from_numpy(middle[lower].astype(np.float32))
    weights = torch.stack([weights, -weights])
    out, _ = kernels.snap(weights, torch.ones(2), MANIFOLD, garbage(tuple(weights.shape), torch.int16), backend)
    np.testing.assert_array_equal(out.numpy(), np.stack([lower, -lower]))

    weights = torch.tensor([[0.0, -0.0, 1.0, -1.0, 1.0000001, -1.0000001, 1e-45, -1e-45, math.inf, -math.inf, 3e38]])
    out, report = kernels.snap(weights, torch.ones(1), MANIFOLD, garbage((1, 11), torch.int16), backend)
    top = INDEX_MAX
    assert out.tolist() == [[0, 0, top, -top, top, -top, 0, 0, top, -top, top]]
    assert report.zeros == 4 and report.saturated == 5


def test_snap_allocates_where_no_output_is_given() -> None:
    out, _ = kernels.snap(torch.tensor([[0.5]]), torch.ones(1), MANIFOLD)
    assert out.dtype == torch.int16 and MANIFOLD.values[int(out) + 32768] == 0.5


def test_snr_in_decibels() -> None:
    weights = torch.from_numpy(generator(8).standard_normal((4, 1000)).astype(np.float32))
    scale = kernels.row_scales(weights, 1.25)
    indices, report = kernels.snap(weights, scale, MANIFOLD)
    dense = kernels.dequantize(indices, scale, MANIFOLD).double()
    noise = float(((weights.double() - dense) ** 2).sum())
    assert report.snr_db == pytest.approx(10 * math.log10(float((weights.double() ** 2).sum()) / noise), abs=1e-6)
    assert 75 < report.snr_db < 100
    assert kernels.snap(torch.zeros(2, 2), torch.ones(2), MANIFOLD)[1].snr_db == math.inf


def test_row_scales_leave_headroom() -> None:
    weights = torch.from_numpy(generator(9).standard_normal((50, 20)).astype(np.float32))
    scale = kernels.row_scales(weights, 1.25)
    largest = weights.double().abs().max(1).values
    assert scale.dtype == torch.float32
    torch.testing.assert_close(scale.double(), largest * 1.25, rtol=2e-7, atol=0)
    indices, report = kernels.snap(weights, scale, MANIFOLD)
    assert report.saturated == 0 and int(indices.abs().max()) < INDEX_MAX
    assert torch.equal(kernels.row_scales(-weights, 1.25), scale)
    exact = kernels.row_scales(weights, 1.0)
    assert torch.equal(exact, weights.abs().max(1).values)
    assert kernels.snap(weights, exact, MANIFOLD)[1].saturated == 0


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_row_scales_of_other_floats(dtype: torch.dtype) -> None:
    weights = torch.from_numpy(generator(10).standard_normal((9, 33))).to(dtype)
    scale = kernels.row_scales(weights, 1.25)
    assert scale.dtype == torch.float32
    torch.testing.assert_close(scale.double(), weights.double().abs().max(1).values * 1.25, rtol=2e-7, atol=0)


def test_rows_of_zeros_take_the_mean_scale() -> None:
    weights = torch.tensor([[0.0, 0.0], [2.0, -4.0], [0.0, -0.0], [1.0, 0.5]])
    assert kernels.row_scales(weights, 1.25).tolist() == [3.125, 5.0, 3.125, 1.25]
    assert kernels.row_scales(torch.zeros(3, 4), 1.25).tolist() == [1.0, 1.0, 1.0]


@pytest.mark.parametrize("backend", kernels.BACKENDS)
def test_scales_stay_normal_numbers(backend: str) -> None:
    """Subnormal rows, and rows whose headroom leaves float32."""
    info = torch.finfo(torch.float32)
    weights = torch.tensor([[1e-45, 0.0], [1e-39, -2e-39], [info.max, -1.0], [3e38, 3e38], [1.0, 2.0]])
    scale = kernels.row_scales(weights, 1.25)
    assert bool(torch.isfinite(scale).all()) and bool((scale >= info.tiny).all())
    assert scale[0] == info.tiny and scale[1] == info.tiny and scale[2] == info.max
    out, _ = kernels.snap(weights, scale, MANIFOLD, garbage((5, 2), torch.int16), backend)
    assert int(out.abs().max()) <= INDEX_MAX
    dense = kernels.dequantize(out, scale, MANIFOLD, backend=backend)
    error = (dense.double() - weights.double()).abs()
    assert bool((error <= scale.double()[:, None] / 32768 + 1e-45).all())


# -- votes ------------------------------------------------------------------------------------------------------------


def sixteenths(gradient: torch.Tensor, yardstick: torch.Tensor, limit: int) -> np.ndarray:
    """The votes to cast, in units of 2^-16, as float64 (``cast`` in the module docstring)."""
    t = (gradient * yardstick[:, None]).double().numpy()
    return np.rint(t.clip(-limit, limit) * 65536)


def test_casting_is_unbiased() -> None:
    """Over many keys the mean vote is -f / 2^16; the spread is that of a coin with the fraction's probability."""
    rng = generator(20)
    rounds = 4000
    gradient = torch.from_numpy((rng.standard_normal((4, 16)) * 10.0 ** rng.uniform(-3, 1, (4, 16))).astype(np.float32))
    yardstick = torch.tensor([0.3, 1.0, 2.5, 0.01])
    f = sixteenths(gradient, yardstick, 16_000)
    rows = torch.arange(4)
    total = np.zeros(gradient.shape)
    for round_ in range(rounds):
        votes, squares = torch.zeros(4, 16, dtype=torch.int16), torch.zeros(4, dtype=torch.int64)
        kernels.cast_votes(gradient, rows, yardstick, votes, squares, keys=kernels.hash_keys(7, round_), limit=16_000)
        cast = -votes.double().numpy()
        assert ((cast == np.floor(f / 65536)) | (cast == np.ceil(f / 65536))).all()
        total += cast
        assert squares.tolist() == ((f.astype(np.int64) >> kernels.STAT_SHIFT) ** 2).sum(1).tolist()
    fraction = f / 65536 - np.floor(f / 65536)
    spread = np.sqrt(fraction * (1 - fraction) / rounds)
    error = total / rounds - f / 65536
    often = rounds * fraction * (1 - fraction) > 10
    assert often.sum() > 30
    assert np.abs(error[~often]).max(initial=0) < 40 / rounds
    z = error[often] / spread[often]
    assert np.abs(z).max() < 5
    assert abs((z**2).sum() - z.size) < 5 * math.sqrt(2 * z.size)


@pytest.mark.parametrize("backend", kernels.BACKENDS)
def test_retracting_restores_every_bit(backend: str) -> None:
    rng = generator(21)
    shape = (31, 257)
    gradient = torch.from_numpy((rng.standard_normal(shape) * 1e3).astype(np.float32))
    yardstick = torch.from_numpy((10.0 ** rng.uniform(-4, 3, shape[0])).astype(np.float32))
    rows = torch.from_numpy(rng.permutation(shape[0]))
    votes, squares = some_votes(shape, rng, 16_000), torch.from_numpy(rng.integers(0, 1 << 40, shape[0]))
    v, s = votes.clone(), squares.clone()
    for sign in (1, -1):
        kernels.cast_votes(gradient, rows, yardstick, v, s, keys=KEYS, limit=16_383, sign=sign, backend=backend)
        assert torch.equal(v, votes) == torch.equal(s, squares) == (sign == -1)


@pytest.mark.parametrize("backend", kernels.BACKENDS)
def test_votes_beyond_the_limit_are_clipped(backend: str) -> None:
    gradient = torch.tensor([[1e30, -1e30, 500.4, -500.4, 499.0, -499.0, 3.4e38, 0.0]])
    votes, squares = torch.zeros(1, 8, dtype=torch.int16), torch.zeros(1, dtype=torch.int64)
    rows, yardstick = torch.zeros(1, dtype=torch.int64), torch.ones(1)
    kernels.cast_votes(gradient, rows, yardstick, votes, squares, keys=KEYS, limit=500, backend=backend)
    assert votes.tolist() == [[-500, 500, -500, 500, -499, 499, -500, 0]]
    assert squares.item() == (5 * 500**2 + 2 * 499**2) << 2 * (16 - kernels.STAT_SHIFT)


@pytest.mark.parametrize("backend", kernels.BACKENDS)
@pytest.mark.parametrize("micro_batches", [1, 2, 3, 7, 32, 1000])
def test_a_step_of_the_loudest_votes_does_not_wrap(micro_batches: int, backend: str) -> None:
    units = VoteUnits.for_int16(micro_batches)
    votes = torch.tensor([[units.carry, -units.carry, units.carry, 0]], dtype=torch.int16)
    squares = torch.zeros(1, dtype=torch.int64)
    gradient = torch.tensor([[-1e30, 1e30, 1e30, -1e30]])
    for k in range(micro_batches):
        keys = kernels.hash_keys(1, k)
        rows = torch.zeros(1, dtype=torch.int64)
        kernels.cast_votes(gradient, rows, torch.ones(1), votes, squares, keys=keys, limit=units.limit, backend=backend)
    step = micro_batches * units.limit
    assert votes.tolist() == [[units.carry + step, -units.carry - step, units.carry - step, step]]


def test_units_leave_room_at_every_count() -> None:
    most = INDEX_MAX // 2 // kernels.USES
    for micro_batches in range(1, most + 1):
        units = VoteUnits.for_int16(micro_batches)
        assert units.limit >= 1 and units.carry + kernels.USES * micro_batches * units.limit <= INDEX_MAX
    for micro_batches in (0, -1, most + 1):
        with pytest.raises(KernelError, match="micro_batches"):
            VoteUnits.for_int16(micro_batches)


@pytest.mark.parametrize("backend", kernels.BACKENDS)
@pytest.mark.parametrize("columns", [1536, 4096, 8960])
def test_row_statistics_of_the_loudest_votes_do_not_wrap(columns: int, backend: str) -> None:
    """Row lengths of Qwen2.5-Coder-1.5B and between; one micro-batch a step, every vote at the limit."""
    limit = VoteUnits.for_int16(1).limit
    votes, squares = torch.zeros(1, columns, dtype=torch.int16), torch.zeros(1, dtype=torch.int64)
    gradient = torch.full((1, columns), 1e30)
    rows = torch.zeros(1, dtype=torch.int64)
    kernels.cast_votes(gradient, rows, torch.ones(1), votes, squares, keys=KEYS, limit=limit, backend=backend)
    exact = columns * (limit << 16 - kernels.STAT_SHIFT) ** 2
    assert squares.item() == exact or (exact >= 1 << 63 and squares.item() >= 1 << 62), "saturate, never wrap"


@pytest.mark.parametrize("backend", kernels.BACKENDS)
def test_order_of_micro_batches_does_not_matter(backend: str) -> None:
    rng = generator(22)
    shape = (9, 50)
    gradients = [torch.from_numpy(rng.standard_normal(shape).astype(np.float32) * 300) for _ in range(6)]
    results = []
    for order in (range(6), range(5, -1, -1), rng.permutation(6).tolist()):
        votes, squares = torch.zeros(shape, dtype=torch.int16), torch.zeros(9, dtype=torch.int64)
        for k in order:
            keys = kernels.hash_keys(1, 2, k)
            kernels.cast_votes(
                gradients[k], torch.arange(9), torch.ones(9), votes, squares, keys=keys, limit=900, backend=backend
            )
        results.append((votes, squares))
    assert all(torch.equal(v, results[0][0]) and torch.equal(s, results[0][1]) for v, s in results[1:])


@pytest.mark.parametrize("backend", kernels.BACKENDS)
def test_a_row_votes_the_same_alone_and_among_others(backend: str) -> None:
    rng = generator(23)
    shape = (12, 40)
    gradient = torch.from_numpy(rng.standard_normal(shape).astype(np.float32))
    yardstick = torch.from_numpy(rng.uniform(1, 9, 12).astype(np.float32))
    together, squares = torch.zeros(shape, dtype=torch.int16), torch.zeros(12, dtype=torch.int64)
    apart, squares_apart = together.clone(), squares.clone()
    options: dict[str, Any] = {"keys": KEYS, "limit": 99, "backend": backend}
    kernels.cast_votes(gradient, torch.arange(12), yardstick, together, squares, **options)
    for rows in ([7], [3, 0], [1, 2, 4, 5, 6], [11, 10, 9, 8]):
        picked = torch.tensor(rows)
        kernels.cast_votes(gradient[picked], picked, yardstick, apart, squares_apart, **options)
    assert torch.equal(together, apart) and torch.equal(squares, squares_apart)


# -- moves ------------------------------------------------------------------------------------------------------------


def hash_in_python(position: int, key0: int, key1: int) -> int:
    """The position hash in Python's integers; pinned because a resumed run must draw the same numbers."""
    mask = 0xFFFFFFFF
    x = (position * 0x9E3779B1 + key0) & mask
    x ^= x >> 16
    x = (x * 0x85EBCA6B & mask) ^ key1
    x ^= x >> 13
    x = x * 0xC2B2AE35 & mask
    return x ^ x >> 16


def apply_in_python(
    indices: torch.Tensor,
    votes: torch.Tensor,
    stride: torch.Tensor,
    table: Manifold,
    keys: tuple[int, ...],
    decay: int,
    carry: int,
) -> tuple[list[list[int]], list[list[int]], int, int]:
    """``apply`` of the module docstring, element by element, in Python's unbounded integers."""
    fixed = table.fixed.tolist()
    new_indices, new_votes = indices.tolist(), votes.tolist()
    flips = travel = 0
    for i, (index_row, vote_row) in enumerate(zip(indices.tolist(), votes.tolist(), strict=True)):
        for j, (old, m) in enumerate(zip(index_row, vote_row, strict=True)):
            if m == 0:
                continue
            position = (i * len(index_row) + j) & 0xFFFFFFFF
            current = fixed[abs(old)] * (1 if old >= 0 else -1)
            target = max(-ONE, min(ONE, current + m * int(stride[i])))
            low = int(np.searchsorted(table.fixed.numpy(), abs(target), side="right")) - 1
            new = low
            if low < INDEX_MAX:
                # P(up) = share of the gap that lies below the target.
                gap, rest = fixed[low + 1] - fixed[low], abs(target) - fixed[low]
                new += hash_in_python(position, keys[0], keys[1]) * gap < rest << 32
            new = new if target >= 0 else -new
            if new != old:
                flips += 1
                travel += abs(target - current)
            new_indices[i][j] = new
            faded = (m * decay + (hash_in_python(position, keys[2], keys[3]) & 0xFFFF)) >> 16
            new_votes[i][j] = max(-carry, min(carry, faded))
    return new_indices, new_votes, flips, travel


@pytest.mark.parametrize("backend", kernels.BACKENDS)
@pytest.mark.parametrize("table", [MANIFOLD, LINEAR, COARSE], ids=lambda m: m.name)
def test_apply_by_brute_force(table: Manifold, backend: str) -> None:
    rng = generator(30)
    shape = (47, 31)
    indices, votes, stride = some_indices(shape, rng), some_votes(shape, rng), some_stride(shape[0], rng)
    stride[0], stride[1] = 0, 1 << 46
    keys = (0xFFFFFFFF, 0xDEADBEEF, 3, 0xFFFFFFFF)
    expected = apply_in_python(indices, votes, stride, table, keys, 45_875, 16_383)
    counts = kernels.apply_votes(indices, votes, stride, table, keys=keys, decay=45_875, carry=16_383, backend=backend)
    assert indices.tolist() == expected[0]
    assert votes.tolist() == expected[1]
    assert counts == expected[2:]


def test_the_hash_in_both_backends_is_the_one_written_down() -> None:
    rng = generator(31)
    hashed = numba.njit(lambda p, a, b: kernels._hash(p, a, b))
    for position, key0, key1 in [*rng.integers(0, 1 << 32, (200, 3)).tolist(), [0, 0, 0], [2**32 - 1] * 3]:
        expected = hash_in_python(position, key0, key1)
        assert int(kernels._hash_reference(torch.tensor(position), key0, key1)) == expected
        assert int(hashed(np.uint32(position), np.uint32(key0), np.uint32(key1))) == expected
    # A tensor of more than 2^32 elements: positions wrap, in range.
    rows = torch.tensor([2_796_202, 2_796_203, 1 << 31])
    expected_positions = [[(r * 1536 + j) & 0xFFFFFFFF for j in range(1536)] for r in rows.tolist()]
    assert kernels._positions(rows, 1536).tolist() == expected_positions


def move_many(index: int, vote: int, stride: int, count: int, seed: int, backend: str | None = None) -> np.ndarray:
    """New indices of ``count`` weights that all have the same index, votes and stride."""
    shape = (8, count // 8)
    indices = torch.full(shape, index, dtype=torch.int16)
    votes = torch.full(shape, vote, dtype=torch.int16)
    keys = (*kernels.hash_keys(seed, 1), *kernels.hash_keys(seed, 2))
    strides = torch.full((8,), stride, dtype=torch.int64)
    kernels.apply_votes(indices, votes, strides, MANIFOLD, keys=keys, decay=0, carry=1, backend=backend)
    return indices.numpy().ravel()


def test_a_move_hits_its_target_on_average() -> None:
    """Each case lands on the two neighbours of its target only, and on average on the target itself."""
    rng = generator(32)
    fixed = MANIFOLD.fixed.numpy()
    signed = np.concatenate([-fixed[:0:-1], fixed])
    count = 20_000
    z = []
    for case in range(50):
        index = int(some_indices((1, 1), rng)[0, 0]) if case % 3 else int(rng.integers(-3000, 3000))
        vote = int(rng.choice([-1, 1])) * int(rng.integers(1, 600))
        stride = int(2.0 ** rng.uniform(8, 30))
        target = int(np.clip(signed[index + INDEX_MAX] + vote * stride, -ONE, ONE))
        low = int(np.searchsorted(signed, target, side="right")) - 1
        new = move_many(index, vote, stride, count, case)
        if signed[low] == target:
            assert (new == low - INDEX_MAX).all()
            continue
        assert set(np.unique(new)) <= {low - INDEX_MAX, low + 1 - INDEX_MAX}
        gap = int(signed[low + 1] - signed[low])
        share = (target - int(signed[low])) / gap
        spread = math.sqrt(share * (1 - share) / count)
        if spread * count > 10:
            z.append(((new == low + 1 - INDEX_MAX).mean() - share) / spread)
    assert len(z) > 25
    assert np.abs(z).max() < 5 and abs(np.square(z).sum() - len(z)) < 5 * math.sqrt(2 * len(z))


def test_a_move_far_below_a_grid_step_still_happens_at_times() -> None:
    """A thousandth of a gap moves one weight in a thousand."""
    index = 30_000
    gap = int(MANIFOLD.fixed[index + 1] - MANIFOLD.fixed[index])
    new = move_many(index, 1, gap // 1000, 400_000, 5)
    assert set(np.unique(new)) == {index, index + 1}
    assert abs((new != index).sum() - 400) < 100


@pytest.mark.parametrize("backend", kernels.BACKENDS)
def test_moves_saturate_and_never_write_the_lowest_index(backend: str) -> None:
    rng = generator(33)
    shape = (64, 200)
    indices, votes = some_indices(shape, rng), some_votes(shape, rng)
    indices[0], indices[1], indices[2] = INDEX_MAX, -INDEX_MAX, 0
    votes[0], votes[1] = INDEX_MAX, -INDEX_MAX
    votes[2] = torch.where(torch.arange(200) % 2 == 0, INDEX_MAX, -32768).to(torch.int16)
    stride = torch.full((64,), 1 << 46)
    sign = votes.sign()
    old = indices.clone()
    kernels.apply_votes(indices, votes, stride, MANIFOLD, keys=FOUR_KEYS, decay=65_536, carry=16_383, backend=backend)
    assert torch.equal(indices, torch.where(sign == 0, old, sign * INDEX_MAX))
    assert bool((indices >= -INDEX_MAX).all())
    assert int(votes.abs().max()) == 16_383

    # Just short of the end, where the draw could overshoot.
    for index, vote in ((INDEX_MAX - 1, 1), (1 - INDEX_MAX, -1), (INDEX_MAX, 1), (-INDEX_MAX, -1)):
        new = move_many(index, vote, int(MANIFOLD.fixed[-1] - MANIFOLD.fixed[-2]) // 2, 4000, 6, backend)
        assert set(np.unique(np.abs(new))) <= {INDEX_MAX - 1, INDEX_MAX} and (np.sign(new) == np.sign(vote)).all()


@pytest.mark.parametrize("backend", kernels.BACKENDS)
def test_zero_votes_leave_everything_untouched(backend: str) -> None:
    rng = generator(34)
    shape = (20, 60)
    indices = some_indices(shape, rng)
    before = indices.clone()
    votes = torch.zeros(shape, dtype=torch.int16)
    stride = some_stride(20, rng)
    counts = kernels.apply_votes(
        indices, votes, stride, MANIFOLD, keys=KEYS * 2, decay=65_536, carry=9, backend=backend
    )
    assert counts == (0, 0) and torch.equal(indices, before) and not votes.any()


@pytest.mark.parametrize("backend", kernels.BACKENDS)
def test_rate_zero_moves_nothing_but_votes_fade(backend: str) -> None:
    rng = generator(35)
    shape = (20, 60)
    indices, votes = some_indices(shape, rng), some_votes(shape, rng)
    before, votes_before = indices.clone(), votes.clone()
    stride = kernels.integer_strides(kernels.inverse_scales(some_scale(20, rng)), 0.0, 256)
    assert not stride.any()
    counts = kernels.apply_votes(
        indices, votes, stride, MANIFOLD, keys=FOUR_KEYS, decay=32_768, carry=32_767, backend=backend
    )
    assert counts == (0, 0) and torch.equal(indices, before)
    assert int((2 * votes.int() - votes_before.int()).abs().max()) == 1


@pytest.mark.parametrize("decay", [0, 1, 45_875, 65_535, 65_536])
def test_fading_is_unbiased(decay: int) -> None:
    """A single vote survives with probability beta: it is never deleted for being small."""
    start = [1, -1, 3, -250, 16_383]
    shape = (len(start), 20_000)
    votes = torch.tensor(start, dtype=torch.int16)[:, None].repeat(1, shape[1])
    indices, stride = torch.zeros(shape, dtype=torch.int16), torch.zeros(len(start), dtype=torch.int64)
    keys = (*KEYS, *kernels.hash_keys(1, decay))
    kernels.apply_votes(indices, votes, stride, MANIFOLD, keys=keys, decay=decay, carry=16_383)
    for vote, kept in zip(start, votes, strict=True):
        exact = vote * decay / 65536
        assert set(kept.unique().tolist()) <= {math.floor(exact), math.ceil(exact)}
        fraction = exact - math.floor(exact)
        spread = math.sqrt(fraction * (1 - fraction) / shape[1])
        # Where a rounding is rarer than one in the sample, the spread of a coin says little: allow a handful.
        assert abs(kept.double().mean().item() - exact) <= max(5 * spread, 15 / shape[1] * (0 < fraction < 1))


@pytest.mark.parametrize("backend", kernels.BACKENDS)
def test_what_is_carried_over_is_limited(backend: str) -> None:
    votes = torch.tensor([[32_767, -32_768, 101, -101, 100]], dtype=torch.int16)
    indices, stride = torch.zeros(1, 5, dtype=torch.int16), torch.zeros(1, dtype=torch.int64)
    kernels.apply_votes(indices, votes, stride, MANIFOLD, keys=FOUR_KEYS, decay=65_536, carry=100, backend=backend)
    assert votes.tolist() == [[100, -100, 100, -100, 100]]


@pytest.mark.parametrize("unit", [4, 256])
def test_integer_strides_follow_the_formula(unit: int) -> None:
    """Sixteen orders of magnitude of the rate, eight of the scale, against float64."""
    scale = torch.from_numpy((10.0 ** generator(36).uniform(-6, 2, 500)).astype(np.float32))
    inverse = kernels.inverse_scales(scale)
    largest_error = 0.0
    for rate in 10.0 ** generator(37).uniform(-12, 4, 200):
        got = kernels.integer_strides(inverse, float(rate), unit)
        assert got.dtype == torch.int64
        exact = np.minimum(rate * 2.0**FIXED_BITS / (unit * scale.double().numpy()), 2.0**46)
        # Half a unit for the result; the mantissa's 20 bits; half a unit for the inverse scale.
        allowed = 0.5 + exact * (2.0**-20 + 0.5 * scale.double().numpy() / 2**20) * 1.001
        error = np.abs(got.numpy() - exact)
        assert (error <= allowed).all()
        clear = (exact > 1e5) & (scale.numpy() < 10)
        largest_error = max(largest_error, (error[clear] / exact[clear]).max(initial=0.0))
    assert 0 < largest_error < 1.2e-5


def test_integer_strides_at_the_ends() -> None:
    scale = torch.tensor([1e-38, 1e-3, 1.0, 100.0, 1e5])
    inverse = kernels.inverse_scales(scale)
    assert inverse.dtype == torch.int64 and inverse.tolist() == [1 << 42, 1_048_575_950, 1 << 20, 10_486, 10]
    assert kernels.inverse_scales(torch.tensor([3e38])).tolist() == [1]
    assert not kernels.integer_strides(inverse, 0.0, 256).any()
    assert not kernels.integer_strides(inverse, 5e-324, 256).any()
    assert kernels.integer_strides(inverse, 1e-25, 256).tolist() == [0] * 5
    assert kernels.integer_strides(inverse, 256.0, 256).tolist()[2] == ONE
    assert kernels.integer_strides(inverse, 2.0**14, 256).tolist()[:3] == [1 << 46] * 3
    for rate in (-1e-9, math.nan, math.inf):
        with pytest.raises(KernelError, match="learning rate"):
            kernels.integer_strides(inverse, rate, 256)


def test_strides_grow_with_the_rate_up_to_their_clamp() -> None:
    """Also for rows of large scale, whose inverse has few bits, and at rates that nobody should ask for."""
    inverse = kernels.inverse_scales(torch.tensor([1e-3, 1.0, 100.0, 1e4, 1e6]))
    strides = torch.stack([kernels.integer_strides(inverse, 10.0**e, 256) for e in range(-12, 31)])
    assert bool((strides.diff(dim=0) >= 0).all())
    assert strides[-1].tolist() == [1 << 46] * 5


# -- no floats after the cast -----------------------------------------------------------------------------------------


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


def test_the_detector_of_floats_detects() -> None:
    integers = torch.arange(3)
    for operation in (
        lambda: integers * 0.5,
        lambda: torch.ones(2),
        lambda: MANIFOLD.values[3],
        lambda: integers.double(),
    ):
        with pytest.raises(AssertionError, match="touched"), NoFloats():
            operation()
    with NoFloats():
        assert int((integers * 2).sum()) == 6


def test_no_float_tensor_is_dispatched_after_the_cast() -> None:
    rng = generator(40)
    shape = (33, 65)
    indices, votes, scale = some_indices(shape, rng), some_votes(shape, rng), some_scale(shape[0], rng)
    inverse = kernels.inverse_scales(scale)
    before = indices.clone()
    with NoFloats():
        stride = kernels.integer_strides(inverse, 3e-3, 256)
        flips, _ = kernels.apply_votes(
            indices, votes, stride, MANIFOLD, keys=FOUR_KEYS, decay=45_875, carry=16_383, backend="torch"
        )
    assert flips > 0 and not torch.equal(indices, before)


def test_the_compiled_move_holds_no_float_variable() -> None:
    """Types that numba inferred for every variable of the kernel; compiled afresh because a cache keeps no types."""

    def floats_of(function: Callable[..., Any], signature: Any) -> list[str]:
        compiled = numba.njit(function)
        compiled.compile(signature)
        found = compiled.overloads[compiled.signatures[0]].type_annotation.typemap
        assert len(found) > 2
        return [name for name, kind in found.items() if "float" in str(kind)]

    int16, int32, int64, uint32 = numba.int16, numba.int32, numba.int64, numba.uint32
    signature = (
        *(int16[:, ::1], int16[:, ::1], int64[::1], int64[::1], int32[::1]),
        *(int64, uint32[::1], int64, int64, int64[::1], int64, int64),
    )
    assert floats_of(kernels._apply_rows.py_func, signature) == []
    assert floats_of(lambda a: int(a * 0.5), (int64,)) != []


# -- randomness -------------------------------------------------------------------------------------------------------


def hashes(count: int, *parts: int) -> np.ndarray:
    return kernels._hash_reference(torch.arange(count), *kernels.hash_keys(*parts)).numpy()


def test_low_and_high_bits_are_uniform() -> None:
    """Rounding draws from the low 16 bits, the choice between neighbours from all 32."""
    words = hashes(1 << 20, 1, 2, 3, 4)
    for shift in (0, 16):
        counts = np.bincount(words >> shift & 0xFFFF, minlength=65536)
        chi_square = ((counts - 16.0) ** 2 / 16.0).sum()
        assert abs(chi_square - 65535) < 5 * math.sqrt(2 * 65535)
    for bit in range(32):
        assert abs((words >> bit & 1).mean() - 0.5) < 5 * 0.5 / 1024


def test_neighbouring_keys_and_elements_are_uncorrelated() -> None:
    """Seed, step, micro-batch, tensor and use each changed by one; neighbours in a row; and elements a row apart."""
    count = 1 << 15
    base = (5, 100, 3, 12_345, 0)
    draws = {base: hashes(count, *base)}
    for place in range(len(base)):
        for change in (1, -1):
            key = tuple(p + change * (i == place) for i, p in enumerate(base))
            draws[key] = hashes(count, *key)

    def correlation(a: np.ndarray, b: np.ndarray) -> float:
        return float(np.corrcoef(a, b)[0, 1]) * math.sqrt(len(a))

    for part in (lambda w: w & 0xFFFF, lambda w: w >> 16, lambda w: w & 1, lambda w: w >> 31):
        words = {key: part(word).astype(np.float64) for key, word in draws.items()}
        names = list(words)
        for i, a in enumerate(names):
            for b in names[:i]:
                assert abs(correlation(words[a], words[b])) < 5, (a, b)
        for lag in (1, 2, 64, 256, 1536):
            assert abs(correlation(words[base][:-lag], words[base][lag:])) < 5, lag


def test_keys_are_distinct_and_their_parts_ordered() -> None:
    keys = {kernels.hash_keys(*(int(p) for p in parts)) for parts in np.ndindex(9, 9, 9, 9)}
    assert len(keys) == 9**4
    assert kernels.hash_keys(1, 2) != kernels.hash_keys(2, 1)
    assert kernels.hash_keys(0) != kernels.hash_keys(0, 0) != kernels.hash_keys(0, 0, 0)
    assert kernels.hash_keys(-1) == kernels.hash_keys((1 << 64) - 1)
    assert all(0 <= k < 1 << 32 for pair in keys for k in pair)
    # splitmix64 from state 0, as published: first output 0xE220A8397B1DCDAF.
    assert kernels.hash_keys(0) == (0x7B1DCDAF, 0xE220A839)


# -- refusals ---------------------------------------------------------------------------------------------------------


def call_dequantize(**change: Any) -> None:
    arguments: dict[str, Any] = {
        "indices": torch.zeros(3, 4, dtype=torch.int16),
        "scale": torch.ones(3),
        "manifold": MANIFOLD,
        "out": torch.zeros(3, 4),
    }
    kernels.dequantize(**arguments | change)


def call_snap(**change: Any) -> None:
    arguments: dict[str, Any] = {
        "weights": torch.zeros(3, 4),
        "scale": torch.ones(3),
        "manifold": MANIFOLD,
        "out": torch.zeros(3, 4, dtype=torch.int16),
    }
    kernels.snap(**arguments | change)


def call_cast(**change: Any) -> None:
    arguments: dict[str, Any] = {
        "gradient": torch.zeros(2, 4),
        "rows": torch.tensor([0, 2]),
        "yardstick": torch.ones(3),
        "votes": torch.zeros(3, 4, dtype=torch.int16),
        "row_squares": torch.zeros(3, dtype=torch.int64),
        "keys": KEYS,
        "limit": 5,
    }
    kernels.cast_votes(**arguments | change)


def call_apply(**change: Any) -> None:
    arguments: dict[str, Any] = {
        "indices": torch.zeros(3, 4, dtype=torch.int16),
        "votes": torch.ones(3, 4, dtype=torch.int16),
        "stride": torch.ones(3, dtype=torch.int64),
        "manifold": MANIFOLD,
        "keys": FOUR_KEYS,
        "decay": 5,
        "carry": 5,
    }
    kernels.apply_votes(**arguments | change)


CALLS: list[Callable[..., None]] = [call_dequantize, call_snap, call_cast, call_apply]


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("backend", kernels.BACKENDS)
def test_the_calls_below_are_right_but_for_one_argument(call: Callable[..., None], backend: str) -> None:
    call(backend=backend)


@pytest.mark.parametrize(
    ("call", "change", "words"),
    [
        (call_dequantize, {"indices": torch.zeros(3, 4, dtype=torch.int32)}, "indices is torch.int32"),
        (call_dequantize, {"scale": torch.ones(4)}, r"scale is torch.float32 \(4,\), expected torch.float32 \(3,\)"),
        (call_dequantize, {"scale": torch.ones(3).double()}, "scale is torch.float64"),
        (call_dequantize, {"scale": torch.ones(3, 1)}, "scale"),
        (call_dequantize, {"out": torch.zeros(4, 3)}, "out"),
        (call_dequantize, {"out": torch.zeros(3, 4, dtype=torch.bfloat16)}, "out is torch.bfloat16"),
        (call_dequantize, {"backend": "triton"}, "unknown backend 'triton'"),
        (call_snap, {"weights": torch.zeros(3, 4, dtype=torch.bfloat16)}, "weights is torch.bfloat16"),
        (call_snap, {"scale": torch.ones(2)}, "scale"),
        (call_snap, {"out": torch.zeros(3, 4, dtype=torch.int32)}, "out is torch.int32"),
        (call_snap, {"out": torch.zeros(3, 5, dtype=torch.int16)}, "out"),
        (call_cast, {"gradient": torch.zeros(2, 4).double()}, "gradient is torch.float64"),
        (call_cast, {"gradient": torch.zeros(2, 5)}, "votes"),
        (call_cast, {"rows": torch.tensor([0, 1, 2])}, "rows"),
        (call_cast, {"rows": torch.tensor([0, 2], dtype=torch.int32)}, "rows is torch.int32"),
        (call_cast, {"yardstick": torch.ones(2)}, "yardstick"),
        (call_cast, {"votes": torch.zeros(3, 4, dtype=torch.int8)}, "votes is torch.int8"),
        (call_cast, {"row_squares": torch.zeros(3, dtype=torch.int32)}, "row_squares is torch.int32"),
        (call_cast, {"row_squares": torch.zeros(2, dtype=torch.int64)}, "row_squares"),
        (call_cast, {"limit": 0}, "limit is 0"),
        (call_cast, {"limit": 16_384}, "limit is 16384"),
        (call_cast, {"sign": 2}, "sign 2"),
        (call_apply, {"indices": torch.zeros(3, 4, dtype=torch.int64)}, "indices is torch.int64"),
        (call_apply, {"votes": torch.zeros(3, 4, dtype=torch.int8)}, "votes is torch.int8"),
        (call_apply, {"votes": torch.zeros(3, 3, dtype=torch.int16)}, "votes"),
        (call_apply, {"stride": torch.ones(3)}, "stride is torch.float32"),
        (call_apply, {"stride": torch.ones(4, dtype=torch.int64)}, "stride"),
        (call_apply, {"decay": -1}, "decay is -1"),
        (call_apply, {"decay": 65_537}, "decay is 65537"),
    ],
)
def test_wrong_arguments_are_named(call: Callable[..., None], change: dict[str, Any], words: str) -> None:
    with pytest.raises(KernelError, match=words):
        call(**change)


@pytest.mark.parametrize(
    ("call", "name"),
    [(call_dequantize, "indices"), (call_snap, "weights"), (call_cast, "gradient"), (call_apply, "indices")],
)
def test_a_vector_for_a_matrix_is_a_kernel_error(call: Callable[..., None], name: str) -> None:
    dtype = torch.int16 if name == "indices" else torch.float32
    with pytest.raises(KernelError, match=name):
        call(**{name: torch.zeros(12, dtype=dtype)})


@pytest.mark.parametrize(
    ("call", "change"),
    [
        (call_dequantize, {"scale": torch.ones(3, device="meta")}),
        (call_snap, {"out": torch.zeros(3, 4, dtype=torch.int16, device="meta")}),
        (call_cast, {"votes": torch.zeros(3, 4, dtype=torch.int16, device="meta")}),
        (call_apply, {"manifold": MANIFOLD.to("meta")}),
    ],
)
def test_a_tensor_on_another_device_is_a_kernel_error(call: Callable[..., None], change: dict[str, Any]) -> None:
    with pytest.raises(KernelError):
        call(**change)


def test_row_scales_refuse() -> None:
    for headroom in (0.99, -1.0, math.nan):
        with pytest.raises(KernelError, match="headroom"):
            kernels.row_scales(torch.ones(2, 2), headroom)
    with pytest.raises(KernelError, match="column"):
        kernels.row_scales(torch.ones(2, 0), 1.25)
    for bad in (math.nan, math.inf, -math.inf):
        weights = torch.ones(5, 4)
        weights[3, 2] = weights[4, 0] = bad
        with pytest.raises(KernelError, match="row 3 has NaN or Inf"):
            kernels.row_scales(weights, 1.25)


def test_backend_for() -> None:
    assert kernels.backend_for("cpu") == "numba"
    assert kernels.backend_for(torch.device("cuda", 1)) == kernels.backend_for("meta") == "torch"
    assert kernels.backend_for("cpu", "torch") == kernels.backend_for("cuda", "torch") == "torch"
    assert kernels.backend_for("cpu", "numba") == "numba"
    with pytest.raises(KernelError, match="numba serves the cpu, not cuda"):
        kernels.backend_for("cuda", "numba")
    with pytest.raises(KernelError, match=r"'Numba'.*numba, torch"):
        kernels.backend_for("cpu", "Numba")


def test_kernels_work_in_a_forked_child() -> None:
    """The thread pool of the parent does not exist in the child."""
    indices = some_indices((130, 1031), generator(50))
    scale = torch.ones(130)
    torch.set_num_threads(2)
    expected = kernels.dequantize(indices, scale, MANIFOLD, backend="numba")
    assert kernels._pool is not None
    # Nothing of torch's own in the child: OpenMP does not outlive a fork.
    out = garbage((130, 1031), torch.float32)
    wanted = expected.numpy().tobytes()
    child = os.fork()
    if child == 0:
        signal.alarm(20)
        kernels.dequantize(indices, scale, MANIFOLD, out, "numba")
        os._exit(0 if out.numpy().tobytes() == wanted else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_no_rows_is_no_work() -> None:
    for backend in kernels.BACKENDS:
        assert kernels.dequantize(
            torch.zeros(0, 4, dtype=torch.int16), torch.ones(0), MANIFOLD, None, backend
        ).shape == (0, 4)
        votes, squares = some_votes((3, 4), generator(51)), torch.ones(3, dtype=torch.int64)
        before = votes.clone()
        none = torch.zeros(0, dtype=torch.int64)
        call_cast(gradient=torch.zeros(0, 4), rows=none, votes=votes, row_squares=squares, backend=backend)
        assert torch.equal(votes, before) and squares.tolist() == [1, 1, 1]

"""Kernels: both backends give the same bits, and they are right by brute force, in exact integers or in float64."""

from __future__ import annotations

import bisect
import itertools
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

import cuda_compiler
import ghost_kernels as kernels
import ghost_kernels_cpu
import ghost_kernels_cuda
import ghost_kernels_torch
import manifolds
import row_threads
import vote_units
from manifolds import FIXED_BITS, INDEX_MAX, Manifold
from vote_units import KernelError, VoteUnits

ONE = 1 << FIXED_BITS
GARBAGE = -12_345
KEYS = (0x12345678, 0x9ABCDEF0)
FOUR_KEYS = (0x12345678, 0x9ABCDEF0, 0xFFFFFFFF, 0x00000001)
SHAPES = [(1, 1), (1, 37), (23, 1), (2, 3000), (61, 127), (130, 1031), (40, 4099)]
SLICED = [(shape, None) for shape in SHAPES] + [((23, 1), 1), ((23, 1), 7), ((5, 127), 100), ((61, 127), 1000)]
"""With the torch backend's slices as shipped, of one row each, and of a few rows with a remainder."""
MANIFOLD = manifolds.build("prime-harmonic")
LINEAR = manifolds.build("linear")
COMPACT = manifolds.build("compact")
TABLES = [MANIFOLD, LINEAR, COMPACT]
BITS = {"int8": 8, "int16": 16, "compact": 6}
"""Kinds of vote buffers and their widths; a compact word holds level and votes."""
KINDS = tuple(BITS)


def coarse_table() -> torch.Tensor:
    """A table whose upper part has gaps just below the largest that a manifold may have, 2^-7."""
    upper = 1 - np.arange(101) * (2.0**-7 - 2.0**-22)
    half = np.concatenate([np.arange(INDEX_MAX - 100) * 7 * 2.0**-20, upper[::-1]])
    return torch.from_numpy(np.concatenate([[-2.0], -half[:0:-1], half]).astype(np.float32))


COARSE = manifolds.from_values("coarse", coarse_table())


pytestmark = pytest.mark.usefixtures("one_thread")


def set_slices(monkeypatch: pytest.MonkeyPatch, elements: int | None) -> None:
    if elements is not None:
        monkeypatch.setattr(ghost_kernels_torch, "SLICE_ELEMENTS", elements)


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


def some_indices(shape: tuple[int, int], rng: np.random.Generator, top: int = INDEX_MAX) -> torch.Tensor:
    x = rng.integers(-top, top + 1, shape)
    x = np.where(rng.random(shape) < 0.1, rng.choice([0, 1, -1, top, -top], shape), x)
    return torch.from_numpy(x.astype(np.int16))


def most_of(kind: str) -> int:
    """Most votes that a step can leave in a buffer before they are applied: half its range carried, half new."""
    return (1 << BITS[kind] - 1) - 1


def some_votes(shape: tuple[int, int], rng: np.random.Generator, limit: int, kind: str = "int16") -> torch.Tensor:
    """Votes of all sizes up to the limit; in compact words they stand beside random levels."""
    x = np.rint(rng.standard_normal(shape) * 10.0 ** rng.uniform(-1, math.log10(limit) + 0.5, shape))
    x = torch.from_numpy(x.clip(-limit, limit).astype(np.int16))
    if kind == "compact":
        return some_indices(shape, rng, COMPACT.top) * 64 + x
    return x.to(torch.int8 if kind == "int8" else torch.int16)


def some_state(
    kind: str, shape: tuple[int, int], rng: np.random.Generator
) -> tuple[torch.Tensor, torch.Tensor | None, Manifold]:
    """Words, votes (None where the words hold them) and a table, as at the end of a step."""
    votes = some_votes(shape, rng, most_of(kind), kind)
    if kind == "compact":
        return votes, None, COMPACT
    return some_indices(shape, rng), votes, MANIFOLD if kind == "int8" else LINEAR


def copied(tensor: torch.Tensor | None) -> torch.Tensor | None:
    return None if tensor is None else tensor.clone()


def same(a: torch.Tensor | None, b: torch.Tensor | None) -> bool:
    return a is b is None or (a is not None and b is not None and torch.equal(a, b))


def votes_in(kind: str, buffer: torch.Tensor) -> np.ndarray:
    """The votes that a buffer holds, int64."""
    return (COMPACT.votes(buffer) if kind == "compact" else buffer).numpy().astype(np.int64)


def empty_sums(rows: int) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.zeros(rows, dtype=torch.int64), torch.zeros(rows, dtype=torch.int64)


def some_stride(rows: int, rng: np.random.Generator) -> torch.Tensor:
    return torch.from_numpy((2.0 ** rng.uniform(0, 46, rows)).astype(np.int64))


def garbage(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    return torch.full(shape, GARBAGE, dtype=dtype)


# -- both backends, the same bits -------------------------------------------------------------------------------------


@pytest.mark.parametrize(("shape", "elements"), SLICED)
@pytest.mark.parametrize("table", TABLES, ids=lambda m: m.name)
def test_dequantize_same_bits(
    shape: tuple[int, int], table: Manifold, elements: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All words are looked up alike; on compact that includes every number of votes."""
    set_slices(monkeypatch, elements)
    rng = generator(1, *shape)
    indices, scale = some_indices(shape, rng), some_scale(shape[0], rng)
    fused = kernels.dequantize(indices, scale, table, garbage(shape, torch.float32), "numba")
    reference = kernels.dequantize(indices, scale, table, garbage(shape, torch.float32), "torch")
    expected = table.values.numpy()[indices.numpy().astype(int) + 32768] * scale.numpy()[:, None]
    assert fused.dtype == torch.float32
    assert torch.equal(fused.view(torch.int32), reference.view(torch.int32))
    assert torch.equal(fused.view(torch.int32), torch.from_numpy(expected).view(torch.int32))


@pytest.mark.parametrize(("shape", "elements"), SLICED)
@pytest.mark.parametrize("table", TABLES, ids=lambda m: m.name)
def test_dequantize_to_bfloat16_rounds_once(
    shape: tuple[int, int], table: Manifold, elements: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    set_slices(monkeypatch, elements)
    rng = generator(2, *shape)
    indices, scale = some_indices(shape, rng), some_scale(shape[0], rng)
    expected = kernels.dequantize(indices, scale, table).to(torch.bfloat16)
    for backend in kernels.BACKENDS:
        out = garbage(shape, torch.bfloat16)
        rounded = kernels.dequantize(indices, scale, table, out, backend, dtype=torch.bfloat16)
        assert rounded is out and torch.equal(out.view(torch.int16), expected.view(torch.int16)), backend


def test_bfloat16_rounds_ties_to_even_and_overflows_as_torch_does() -> None:
    """Scales in which the table's 1.0 is a tie, next to one, tiny, or above the largest bfloat16."""
    bits = [0x3F808000, 0x3F818000, 0x3F807FFF, 0x3F808001, 0x00000001, 0x00018000, 0x7F7F8000, 0x7F7FFFFF]
    scale = torch.tensor(bits, dtype=torch.int32).view(torch.float32)
    indices = torch.tensor([[32767, -32767, 0]], dtype=torch.int16).repeat(len(bits), 1)
    table = manifolds.build("linear")
    dense = kernels.dequantize(indices, scale, table)
    for backend in kernels.BACKENDS:
        rounded = kernels.dequantize(indices, scale, table, None, backend, dtype=torch.bfloat16)
        assert torch.equal(rounded.view(torch.int16), dense.to(torch.bfloat16).view(torch.int16)), backend


@pytest.mark.parametrize(("shape", "elements"), SLICED)
@pytest.mark.parametrize("table", TABLES, ids=lambda m: m.name)
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


def loud_gradient(shape: tuple[int, int], rng: np.random.Generator) -> torch.Tensor:
    """Gradients from nothing to far beyond every limit."""
    gradient = rng.standard_normal(shape) * 10.0 ** rng.uniform(-9, 4, shape)
    odd = rng.choice([1e38, -1e38, 0.0, -0.0], shape)
    return torch.from_numpy(np.where(rng.random(shape) < 0.05, odd, gradient).astype(np.float32))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("shape", "elements"), SLICED)
def test_cast_same_bits(
    shape: tuple[int, int], kind: str, elements: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A shuffled subset of the rows of a larger tensor, at several counts of micro-batches, both signs."""
    set_slices(monkeypatch, elements)
    rng = generator(3, *shape)
    total = shape[0] + 5
    for micro_batches, sign in ((1, 1), (3, -1), (32, 1), (512, -1)):
        units = VoteUnits.for_buffer(BITS[kind], micro_batches)
        rows = torch.from_numpy(rng.permutation(total)[: shape[0]])
        gradient = loud_gradient(shape, rng)
        gradient[0, 0] = 1e38
        yardstick = torch.from_numpy((10.0 ** rng.uniform(-2, 4, total)).astype(np.float32))
        yardstick[rows[-1]] = torch.finfo(torch.float32).max
        votes = some_votes((total, shape[1]), rng, units.carry, kind)
        squares, sketch = torch.from_numpy(rng.integers(-(1 << 50), 1 << 50, (2, total)))
        results = []
        for backend in kernels.BACKENDS:
            v, s, t = votes.clone(), squares.clone(), sketch.clone()
            options: dict[str, Any] = {"keys": KEYS, "slot": micro_batches - 1, "units": units, "sign": sign}
            kernels.cast_votes(gradient, rows, yardstick, v, s, t, **options, backend=backend)
            results.append((v, s, t))
        for other in results[1:]:
            assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))
        v, s, t = results[0]
        others = torch.ones(total, dtype=torch.bool)
        others[rows] = False
        assert torch.equal(v[others], votes[others])
        assert torch.equal(s[others], squares[others]) and torch.equal(t[others], sketch[others])
        assert not torch.equal(s, squares) and not torch.equal(t, sketch)


@pytest.mark.parametrize("kind", KINDS)
def test_a_gradient_in_bfloat16_votes_as_the_same_numbers_in_float32(kind: str) -> None:
    rng = generator(12)
    units = VoteUnits.for_buffer(BITS[kind], 3)
    gradient, rows = loud_gradient((9, 37), rng).to(torch.bfloat16), torch.from_numpy(rng.permutation(9))
    yardstick = torch.from_numpy((10.0 ** rng.uniform(-2, 4, 9)).astype(np.float32))
    results = []
    for numbers in (gradient, gradient.float()):
        for backend in kernels.BACKENDS:
            votes, squares, sketch = some_votes((9, 37), generator(13), units.carry, kind), *empty_sums(9)
            sums = (votes, squares, sketch)
            kernels.cast_votes(numbers, rows, yardstick, *sums, keys=KEYS, slot=1, units=units, backend=backend)
            results.append(sums)
    assert bool(results[0][0].any())
    assert all(torch.equal(a, b) for other in results[1:] for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("kind", ["int8", "int16"])
@pytest.mark.parametrize(("shape", "elements"), SLICED)
def test_whispers_same_bits(
    shape: tuple[int, int], kind: str, elements: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    set_slices(monkeypatch, elements)
    rng = generator(8, *shape)
    total = shape[0] + 5
    for gate, sign in ((0, 1), (4096, -1), (1 << 19, 1), (1 << 40, 1)):
        rows = torch.from_numpy(rng.permutation(total)[: shape[0]])
        gradient = loud_gradient(shape, rng)
        gradient[0, 0] = 1e38
        yardstick = torch.from_numpy((10.0 ** rng.uniform(-2, 4, total)).astype(np.float32))
        votes = some_votes((total, shape[1]), rng, 63, kind)
        sizes, squares = torch.from_numpy(rng.integers(-(1 << 50), 1 << 50, (2, total)))
        results = []
        for backend in kernels.BACKENDS:
            v, a, b = votes.clone(), sizes.clone(), squares.clone()
            kernels.cast_whispers(gradient, rows, yardstick, v, a, b, gate=gate, sign=sign, backend=backend)
            results.append((v, a, b))
        for other in results[1:]:
            assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))
        assert not torch.equal(results[0][1], sizes) and not torch.equal(results[0][2], squares)
        others = torch.ones(total, dtype=torch.bool)
        others[rows] = False
        assert torch.equal(results[0][0][others], votes[others])
        # The largest magnitude is 2^19: at this gate and above nobody is heard.
        assert torch.equal(results[0][0], votes) == (gate >= 1 << 19)


@pytest.mark.parametrize(("shrink", "reach"), [(0, 1 << 15), (99_999, 7)])
@pytest.mark.parametrize(("shape", "elements"), SLICED)
@pytest.mark.parametrize("kind", KINDS)
def test_apply_same_bits(
    shape: tuple[int, int], kind: str, shrink: int, reach: int, elements: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    set_slices(monkeypatch, elements)
    rng = generator(4, *shape)
    words, votes, table = some_state(kind, shape, rng)
    (words if votes is None else votes)[0, 0] = 3
    stride = some_stride(shape[0], rng)
    stride[0] = 1 << 36
    carry = VoteUnits.for_buffer(BITS[kind], 1).carry
    results = []
    for backend in kernels.BACKENDS:
        w, v = words.clone(), copied(votes)
        options: dict[str, Any] = {"keys": FOUR_KEYS, "decay": 45_875, "carry": carry, "shrink": shrink, "reach": reach}
        counts = kernels.apply_votes(w, v, stride, table, **options, backend=backend)
        results.append((w, v, counts))
    w, v, counts = results[0]
    for w_other, v_other, counts_other in results[1:]:
        assert torch.equal(w, w_other) and same(v, v_other)
        assert counts == counts_other and all(type(c) is int for c in counts_other)
    assert counts[0] == int((table.levels(w) != table.levels(words)).sum()) > 0


@pytest.mark.parametrize("kind", ["int8", "int16"])
@pytest.mark.parametrize(("shape", "elements"), SLICED)
def test_flip_same_bits(
    shape: tuple[int, int], kind: str, elements: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    set_slices(monkeypatch, elements)
    rng = generator(9, *shape)
    indices, votes, table = some_state(kind, shape, rng)
    votes[0, 0], indices[0, 0] = 50, 7
    stride = torch.from_numpy((2.0 ** rng.uniform(0, 37, shape[0])).astype(np.int64))
    stride[0] = 3 << 16
    for threshold, jitter, chance in ((1, 2, 16_384), (5, 0, 65_536), (3, 7, 50_000)):
        results = []
        for backend in kernels.BACKENDS:
            i, v = indices.clone(), votes.clone()
            options: dict[str, Any] = {"threshold": threshold, "jitter": jitter, "chance": chance, "decay": 62_259}
            counts = kernels.flip_by_majority(
                i, v, stride, table, keys=FOUR_KEYS, **options, carry=(most_of(kind) - 1) // 2, backend=backend
            )
            results.append((i, v, counts))
        i, v, counts = results[0]
        assert not torch.equal(v, votes)
        for i_other, v_other, counts_other in results[1:]:
            assert torch.equal(i, i_other) and torch.equal(v, v_other)
            assert counts == counts_other and all(type(c) is int for c in counts_other)
        assert counts[0] == int((i != indices).sum())
        assert counts[0] > 0 or chance < 65_536


@pytest.mark.parametrize("kind", KINDS)
def test_thread_count_changes_nothing(kind: str) -> None:
    """All operations with one thread, two and three; 130 x 1031 is just large enough for three."""
    shape = (130, 1031)
    rng = generator(5)
    table = COMPACT if kind == "compact" else MANIFOLD
    scale = some_scale(shape[0], rng)
    weights = some_weights(shape, scale, rng)
    gradient = torch.from_numpy(rng.standard_normal(shape).astype(np.float32))
    stride = some_stride(shape[0], rng)
    votes = some_votes(shape, rng, (most_of(kind) - 1) // 2, kind)
    units = VoteUnits.for_buffer(BITS[kind], 4)
    rows = torch.arange(shape[0])
    results = []
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        words, report = kernels.snap(weights, scale, table, garbage(shape, torch.int16), "numba")
        v = words if kind == "compact" else votes.clone()
        sums = (*empty_sums(shape[0]), *empty_sums(shape[0]))
        yardstick = torch.ones(shape[0]) * 9
        kernels.cast_votes(gradient, rows, yardstick, v, *sums[:2], keys=KEYS, slot=3, units=units, backend="numba")
        kernels.cast_whispers(gradient, rows, yardstick, v, *sums[2:], gate=4096, backend="numba")
        options: dict[str, Any] = {"keys": FOUR_KEYS, "decay": 60_000, "carry": units.carry, "backend": "numba"}
        buffer = None if kind == "compact" else v
        counts = kernels.apply_votes(words, buffer, stride, table, shrink=1234, **options)
        if kind != "compact":
            counts += kernels.flip_by_majority(words, v, stride >> 16, table, threshold=2, jitter=1, **options)
        dense = kernels.dequantize(words, scale, table, garbage(shape, torch.float32), "numba")
        results.append([words, v, *sums, dense, torch.tensor([*counts, report.zeros, report.saturated])])
    torch.set_num_threads(1)
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


@pytest.mark.parametrize("table", TABLES, ids=lambda m: m.name)
def test_snap_is_the_nearest_entry(table: Manifold) -> None:
    rng = generator(7)
    shape = (12, 90)
    scale = some_scale(shape[0], rng)
    weights = some_weights(shape, scale, rng)
    indices, report = kernels.snap(weights, scale, table, garbage(shape, torch.int16))
    half = table.values.numpy()[32768 :: 1 << table.vote_bits].astype(np.float64)
    quotient = (weights / scale[:, None]).double().clamp(-2, 2).numpy()
    expected = np.empty(shape, dtype=np.int64)
    for i in range(shape[0]):
        expected[i] = np.abs(half[None, :] - np.abs(quotient[i])[:, None]).argmin(1)
    expected = np.where(quotient < 0, -expected, expected)
    np.testing.assert_array_equal(table.levels(indices).numpy(), expected)
    assert not table.votes(indices).any(), "an import holds no votes"

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
@pytest.mark.parametrize("table", TABLES, ids=lambda m: m.name)
def test_all_usable_indices_survive_the_round_trip(backend: str, table: Manifold) -> None:
    every = torch.arange(-table.top, table.top + 1).to(torch.int16).view(1, -1) << table.vote_bits
    every = every.expand(5, -1).contiguous()
    scale = torch.tensor([1.0, 0.25, 2.0**-100, 1024.0, 1.0])
    dense = kernels.dequantize(every, scale, table, backend=backend)
    back, report = kernels.snap(dense, scale, table, garbage(tuple(every.shape), torch.int16), backend)
    assert torch.equal(back, every)
    assert (report.noise, report.saturated, report.zeros, report.snr_db) == (0.0, 0, 5, math.inf)


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


def hash_in_python(position: int, key0: int, key1: int) -> int:
    """The position hash in Python's integers; pinned because a resumed run must draw the same numbers."""
    mask = 0xFFFFFFFF
    x = (position * 0x9E3779B1 + key0) & mask
    x ^= x >> 16
    x = (x * 0x85EBCA6B & mask) ^ key1
    x ^= x >> 13
    x = x * 0xC2B2AE35 & mask
    return x ^ x >> 16


def hashes_of(shape: tuple[int, int], keys: tuple[int, int]) -> np.ndarray:
    """The hash of every element of a matrix, int64."""
    return ghost_kernels_torch.hash_of(torch.arange(shape[0] * shape[1]), *keys).view(shape).numpy()


def sixteenths(gradient: torch.Tensor, yardstick: torch.Tensor, limit: int) -> np.ndarray:
    """The votes to cast, in units of 2^-16 and clipped, as int64 (``cast`` in the module docstring)."""
    t = (gradient * yardstick[:, None]).double().numpy() * 65536
    return np.rint(t.clip(-limit, limit)).astype(np.int64)


@pytest.mark.parametrize("backend", kernels.BACKENDS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("micro_batches", "uses"), [(1, 1), (5, 1), (16, 2), (512, 1)])
def test_cast_by_brute_force(micro_batches: int, uses: int, kind: str, backend: str) -> None:
    """Votes, squares and sketch, element by element, in Python's unbounded integers."""
    rng = generator(24, micro_batches)
    units = VoteUnits.for_buffer(BITS[kind], micro_batches, uses)
    slots = micro_batches * uses
    gradient = torch.from_numpy((rng.standard_normal((3, 20)) * 10.0 ** rng.uniform(-3, 3, (3, 20))).astype(np.float32))
    rows, yardstick = torch.tensor([4, 0, 3]), torch.tensor([0.3, 1.0, 2.5, 0.01, 17.0])
    f = sixteenths(gradient, yardstick[rows], units.wide)
    votes, (squares, sketch) = some_votes((5, 20), rng, units.carry, kind), empty_sums(5)
    expected = votes.tolist()
    expected_squares, expected_sketch = [0] * 5, [0] * 5
    for slot in sorted({0, slots // 2, slots - 1}):
        kernels.cast_votes(
            gradient, rows, yardstick, votes, squares, sketch, keys=KEYS, slot=slot, units=units, backend=backend
        )
        for k, i in enumerate(rows.tolist()):
            for j in range(20):
                h = hash_in_python(i * 20 + j, *KEYS)
                r = (h + slot * (65536 // slots)) % 65536
                amount = int(f[k, j])
                expected[i][j] -= math.floor((max(-units.limit, min(units.limit, amount)) + r) / 65536)
                rounded = math.floor(amount / 2**units.stat_shift + 0.5)
                expected_squares[i] += rounded**2
                expected_sketch[i] += -amount if h >= 1 << 31 else amount
    assert votes.tolist() == expected
    assert squares.tolist() == expected_squares
    assert sketch.tolist() == expected_sketch


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("micro_batches", [1, 3, 8])
def test_casting_is_unbiased(micro_batches: int, kind: str) -> None:
    """In every slot, over many elements and keys: the mean vote is -f / 2^16, the spread a coin's with its fraction."""
    rng = generator(20, micro_batches)
    rounds, columns = 4, 2000
    units = VoteUnits.for_buffer(BITS[kind], micro_batches)
    gradient = (rng.standard_normal(24) * 10.0 ** rng.uniform(-3, 0, 24) * units.limit / 65536).astype(np.float32)
    wide = torch.from_numpy(gradient)[:, None].expand(-1, columns).contiguous()
    f = sixteenths(wide, torch.ones(24), units.limit)[:, 0]
    for slot in range(micro_batches):
        total = np.zeros(24)
        for round_ in range(rounds):
            votes, sums = torch.zeros(24, columns, dtype=torch.int16), empty_sums(24)
            keys = vote_units.hash_keys(7, round_)
            kernels.cast_votes(wide, torch.arange(24), torch.ones(24), votes, *sums, keys=keys, slot=slot, units=units)
            cast = -votes.numpy().astype(np.int64)
            assert ((cast == f[:, None] // 65536) | (cast == -(-f[:, None] // 65536))).all()
            total += cast.sum(1)
        fraction = f / 65536 - np.floor(f / 65536)
        count = rounds * columns
        error = total / count - f / 65536
        often = count * fraction * (1 - fraction) > 10
        assert often.sum() > 12
        assert np.abs(error[~often]).max(initial=0) < 40 / count
        z = error[often] / np.sqrt(fraction * (1 - fraction) / count)[often]
        assert np.abs(z).max() < 5
        assert abs((z**2).sum() - z.size) < 5 * math.sqrt(2 * z.size)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("micro_batches", [2, 7, 32, 100])
def test_slots_share_one_rounding(micro_batches: int, kind: str) -> None:
    """K equal gradients together are off by less than one vote where K divides 2^16 (else two), and unbiased.

    Independent draws would be off by up to K.
    """
    rng = generator(26, micro_batches)
    columns = 4000
    units = VoteUnits.for_buffer(BITS[kind], micro_batches)
    gradient = (rng.uniform(-1, 1, 20) * units.limit / 65536).astype(np.float32)
    wide = torch.from_numpy(gradient)[:, None].expand(-1, columns).contiguous()
    exact = micro_batches * sixteenths(wide, torch.ones(20), units.limit)[:, 0] / 65536
    votes, sums = torch.zeros(20, columns, dtype=torch.int16), empty_sums(20)
    for slot in range(micro_batches):
        kernels.cast_votes(wide, torch.arange(20), torch.ones(20), votes, *sums, keys=KEYS, slot=slot, units=units)
    error = -votes.double().numpy() - exact[:, None]
    assert np.abs(error).max() < (1 if 65536 % micro_batches == 0 else 2)
    spread = error.std(1) / math.sqrt(columns)
    assert (np.abs(error.mean(1)) < 5 * spread + 1e-9).all()
    assert (spread > 0).sum() > 15


@pytest.mark.parametrize("backend", kernels.BACKENDS)
@pytest.mark.parametrize("kind", KINDS)
def test_retracting_restores_every_bit(kind: str, backend: str) -> None:
    rng = generator(21)
    shape = (31, 257)
    units = VoteUnits.for_buffer(BITS[kind], 4)
    gradient = torch.from_numpy((rng.standard_normal(shape) * 1e3).astype(np.float32))
    yardstick = torch.from_numpy((10.0 ** rng.uniform(-4, 3, shape[0])).astype(np.float32))
    rows = torch.from_numpy(rng.permutation(shape[0]))
    votes = some_votes(shape, rng, units.carry, kind)
    sums = torch.from_numpy(rng.integers(0, 1 << 40, (2, shape[0]))).unbind()
    v, (s, t) = votes.clone(), (x.clone() for x in sums)
    for sign in (1, -1):
        kernels.cast_votes(
            gradient, rows, yardstick, v, s, t, keys=KEYS, slot=2, units=units, sign=sign, backend=backend
        )
        for now, before in ((v, votes), (s, sums[0]), (t, sums[1])):
            assert torch.equal(now, before) == (sign == -1)
    for sign in (1, -1):
        kernels.cast_whispers(gradient, rows, yardstick, v, s, t, gate=2000, sign=sign, backend=backend)
        for now, before in ((v, votes), (s, sums[0]), (t, sums[1])):
            assert torch.equal(now, before) == (sign == -1)


PATTERNS = 6


def adversary(slot: int, hashes: np.ndarray, units: VoteUnits, rng: np.random.Generator) -> np.ndarray:
    """Gradients of one slot, one row for each way to break a buffer."""
    columns = hashes.shape[1]
    loud = np.full(columns, 1e6)
    rounded_up = (hashes[3] + slot * units.spacing & 0xFFFF) + units.limit % 65536 >= 65536
    rounded_away = (hashes[4] + slot * units.spacing & 0xFFFF) < units.limit % 65536
    # The last three know the draws: vote only where it counts, one way, the other, and both ways.
    return np.stack(
        [
            loud,
            -loud,
            loud * (-1) ** slot,
            np.where(rounded_up, loud, 0),
            np.where(rounded_away, -loud, 0),
            rng.choice([-1e6, 0, 1e6, 0.3, -0.3], columns),
        ]
    ).astype(np.float32)


@pytest.mark.parametrize(
    ("micro_batches", "uses"),
    [(1, 1), (2, 1), (3, 1), (5, 2), (16, 1), (31, 1), (32, 1), (100, 1), (257, 1), (256, 2), (511, 1), (512, 1)],
)
@pytest.mark.parametrize("kind", KINDS)
def test_a_step_of_the_loudest_votes_does_not_wrap(kind: str, micro_batches: int, uses: int) -> None:
    """After every slot of a step, from a carry at its limit on either side, the buffer is what wide integers say.

    Votes one way never add up to more than what the carry leaves free: so no order can leave the range.
    """
    rng = generator(27, micro_batches)
    units = VoteUnits.for_buffer(BITS[kind], micro_batches, uses)
    budget, slots = 3 << BITS[kind] - 3, micro_batches * uses
    assert units.carry + budget == most_of(kind)
    shape = (3 * PATTERNS, 64)
    rows, yardstick = torch.arange(shape[0]), torch.ones(shape[0])
    carry = np.repeat([units.carry, 0, -units.carry], PATTERNS)[:, None] * np.ones(64, dtype=np.int64)
    levels = torch.zeros(shape, dtype=torch.int16)
    buffer = torch.from_numpy(carry).to(torch.int8 if kind == "int8" else torch.int16)
    if kind == "compact":
        levels = some_indices(shape, rng, COMPACT.top)
        levels[:, :2] = torch.tensor([COMPACT.top, -COMPACT.top])
        buffer = levels * 64 + buffer
    hashes = hashes_of(shape, KEYS)
    total, for_, against = carry.copy(), np.zeros(shape, dtype=np.int64), np.zeros(shape, dtype=np.int64)
    squares, sketch = empty_sums(shape[0])
    reference = buffer.clone()
    for slot in range(slots):
        gradient = np.concatenate(
            [adversary(slot, hashes[a : a + PATTERNS], units, rng) for a in range(0, shape[0], PATTERNS)]
        )
        f = np.rint((gradient.astype(np.float64) * 65536).clip(-units.limit, units.limit)).astype(np.int64)
        cast = -(f + (hashes + slot * units.spacing & 0xFFFF) >> 16)
        total += cast
        for_ += np.maximum(cast, 0)
        against += np.maximum(-cast, 0)
        options: dict[str, Any] = {"keys": KEYS, "slot": slot, "units": units}
        given = torch.from_numpy(gradient)
        kernels.cast_votes(given, rows, yardstick, buffer, squares, sketch, **options, backend="numba")
        if slots <= 32 or slot % 16 == 0:
            kernels.cast_votes(given, rows, yardstick, reference, *empty_sums(shape[0]), **options, backend="torch")
            if slots <= 32:
                assert torch.equal(reference, buffer)
        np.testing.assert_array_equal(votes_in(kind, buffer), total)
    assert for_.max() <= budget and against.max() <= budget
    # The bound is used up: an honest test, and no range given away.
    if units.limit < budget * units.spacing:
        assert for_.max() == against.max() == units.limit >> 16
    elif 65536 % slots == 0:
        assert for_.max() == against.max() == budget and np.abs(total).max() == most_of(kind)
    else:
        assert min(for_.max(), against.max()) > 0.9 * budget
    if kind == "compact":
        assert torch.equal(COMPACT.levels(buffer), levels) and COMPACT.unused(buffer) == 0


def test_units_leave_room_at_every_count() -> None:
    """No vote is clipped to nothing, a step's votes fill three quarters of the buffer's range, statistics fit."""
    for bits, unit in vote_units.UNITS.items():
        for uses in (1, 2):
            most = vote_units.SLOTS_MAX // uses
            for micro_batches in range(1, most + 1):
                units = VoteUnits.for_buffer(bits, micro_batches, uses)
                slots = micro_batches * uses
                assert units.unit == unit and units.spacing == 65536 // slots and units.slots == slots
                assert units.carry == (1 << bits - 3) - 1 and units.limit == min(
                    (3 << bits - 3) * units.spacing, 1 << 30
                )
                assert float(np.float32(units.wide)) == units.wide
                assert 0 < slots * units.limit <= 3 << bits + 13
                assert units.wide >= units.limit
                assert ((units.wide >> units.stat_shift) + 1) ** 2 * slots * vote_units.COLUMNS_MAX < 1 << 63
            for micro_batches in (0, -1, most + 1):
                with pytest.raises(KernelError, match=f"micro_batches is {micro_batches}, expected 1 to {most}"):
                    VoteUnits.for_buffer(bits, micro_batches, uses)
    for bits in (0, 7, 32):
        with pytest.raises(KernelError, match=f"a vote buffer has {bits} bits, expected one of 16, 8, 6"):
            VoteUnits.for_buffer(bits, 1)


@pytest.mark.parametrize("backend", kernels.BACKENDS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("slots", [1, 2, 1024])
def test_row_statistics_of_the_loudest_votes_do_not_wrap(slots: int, kind: str, backend: str) -> None:
    """The widest row with every vote at its limit; what is left of a step's slots would fit as well."""
    columns = vote_units.COLUMNS_MAX
    units = VoteUnits.for_buffer(BITS[kind], slots)
    votes, (squares, sketch) = torch.zeros(1, columns, dtype=torch.int16), empty_sums(1)
    signs = np.where(hashes_of((1, columns), KEYS) >> 31, -1, 1)
    rounded = math.floor(units.wide / 2**units.stat_shift + 0.5)
    rows, options = torch.zeros(1, dtype=torch.int64), {"keys": KEYS, "units": units, "backend": backend}
    cast = min(slots, 2)
    for slot in range(cast):
        # All signs as in the sketch: its loudest sum.
        gradient = torch.from_numpy((signs * 1e30).astype(np.float32))
        kernels.cast_votes(gradient, rows, torch.ones(1), votes, squares, sketch, slot=slot, **options)
    assert squares.item() == cast * columns * rounded**2
    assert sketch.item() == cast * columns * units.wide
    assert slots * columns * rounded**2 < 1 << 63 and slots * columns * units.wide < 1 << 62


@pytest.mark.parametrize("backend", kernels.BACKENDS)
def test_whisper_statistics_of_the_loudest_votes_do_not_wrap(backend: str) -> None:
    """The widest row at the cut; 512 uses in a step are the most that the rules of whisper votes allow."""
    columns = vote_units.COLUMNS_MAX
    votes, (sizes, squares) = torch.zeros(1, columns, dtype=torch.int16), empty_sums(1)
    gradient = torch.full((1, columns), -1e30)
    rows = torch.zeros(1, dtype=torch.int64)
    kernels.cast_whispers(gradient, rows, torch.ones(1), votes, sizes, squares, gate=9, backend=backend)
    loudest = vote_units.WHISPER_LIMIT << vote_units.WHISPER_BITS
    assert sizes.item() == columns * loudest and squares.item() == columns * loudest**2
    assert vote_units.SLOTS_MAX // 2 * squares.item() <= 1 << 62
    assert bool((votes == 1).all())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("micro_batches", [1, 6, 64])
def test_row_statistics_are_the_gradients(micro_batches: int, kind: str) -> None:
    """Summed squares against float64, also for gradients whose votes are clipped."""
    rng = generator(28, micro_batches)
    units = VoteUnits.for_buffer(BITS[kind], micro_batches)
    loudness = 0.99 * units.wide / 65536
    yardstick = torch.from_numpy(10.0 ** rng.uniform(-3, 3, 7)).float()
    gradients = rng.uniform(-1, 1, (micro_batches, 7, 900)) * loudness / yardstick.numpy()[:, None]
    votes, (squares, sketch) = torch.zeros(7, 900, dtype=torch.int16), empty_sums(7)
    for slot in range(micro_batches):
        gradient = torch.from_numpy(gradients[slot].astype(np.float32))
        kernels.cast_votes(
            gradient, torch.arange(7), yardstick, votes, squares, sketch, keys=KEYS, slot=slot, units=units
        )
    exact = (gradients**2).sum((0, 2)) * yardstick.double().numpy() ** 2
    measured = squares.double().numpy() / 4.0 ** (16 - units.stat_shift)
    np.testing.assert_allclose(measured, exact, rtol=1e-3)
    signs = np.where(hashes_of((7, 900), KEYS) >> 31, -1, 1)
    wanted = (gradients.sum(0) * signs).sum(1) * yardstick.double().numpy()
    slack = micro_batches * 900 * (0.5 / 65536 + loudness * 2.0**-23)
    np.testing.assert_allclose(sketch.double().numpy() / 65536, wanted, rtol=0, atol=slack)


@pytest.mark.parametrize("micro_batches", [1, 4])
def test_the_sketch_measures_the_sum(micro_batches: int) -> None:
    """Over many keys, the mean square of a row's sketch is the squared norm of its summed gradient.

    With gradients that cancel in one row, agree in the next, and are noise in the third.
    """
    rng = generator(29)
    columns, rounds = 64, 3000
    units = VoteUnits.for_buffer(16, micro_batches)
    noise = rng.standard_normal((micro_batches, 3, columns))
    noise[:, 1] = noise[0, 1]
    if micro_batches > 1:
        noise[:, 0] *= np.array([1, -1] * (micro_batches // 2))[:, None]
        noise[1::2, 0] = -noise[::2, 0]
    gradients = torch.from_numpy(noise.astype(np.float32))
    f = np.stack([sixteenths(g, torch.ones(3), units.wide) for g in gradients])
    exact = (f.sum(0).astype(np.float64) ** 2).sum(1)
    found = np.zeros((rounds, 3))
    for round_ in range(rounds):
        votes, (squares, sketch) = torch.zeros(3, columns, dtype=torch.int16), empty_sums(3)
        keys = vote_units.hash_keys(3, round_)
        for slot in range(micro_batches):
            kernels.cast_votes(
                *(gradients[slot], torch.arange(3), torch.ones(3), votes, squares, sketch),
                keys=keys,
                slot=slot,
                units=units,
            )
        found[round_] = sketch.double().numpy() ** 2
    # The square of a sum of many signs is about chi-squared: its deviation is the square root of two times its mean.
    error = np.abs(found.mean(0) - exact)
    assert (error <= 5 * math.sqrt(2 / rounds) * exact).all()
    assert (exact[0] == 0) == (micro_batches > 1) and (found[:, 0] == 0).all() == (micro_batches > 1)


@pytest.mark.parametrize("backend", kernels.BACKENDS)
@pytest.mark.parametrize("kind", KINDS)
def test_order_of_slots_does_not_matter(kind: str, backend: str) -> None:
    """Nor does a micro-batch that was taken back in between."""
    rng = generator(22)
    shape = (9, 50)
    units = VoteUnits.for_buffer(BITS[kind], 6)
    gradients = [torch.from_numpy(rng.standard_normal(shape).astype(np.float32) * 30) for _ in range(6)]
    start = some_votes(shape, rng, units.carry, kind)
    results = []
    orders = [range(6), range(5, -1, -1), rng.permutation(6).tolist(), [2, 0, ~2, 5, 4, 3, ~5, 2, 1, 5]]
    for order in orders:
        votes, sums = start.clone(), empty_sums(9)
        for k in order:
            slot, sign = (k, 1) if k >= 0 else (~k, -1)
            kernels.cast_votes(
                *(gradients[slot], torch.arange(9), torch.ones(9), votes, *sums),
                keys=KEYS,
                slot=slot,
                units=units,
                sign=sign,
                backend=backend,
            )
        results.append((votes, *sums))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))
    assert not torch.equal(results[0][0], start)


@pytest.mark.parametrize("backend", kernels.BACKENDS)
@pytest.mark.parametrize("kind", KINDS)
def test_a_row_votes_the_same_alone_and_among_others(kind: str, backend: str) -> None:
    rng = generator(23)
    shape = (12, 40)
    units = VoteUnits.for_buffer(BITS[kind], 2)
    gradient = torch.from_numpy(rng.standard_normal(shape).astype(np.float32))
    yardstick = torch.from_numpy(rng.uniform(1, 9, 12).astype(np.float32))
    together = some_votes(shape, rng, units.carry, kind)
    apart = together.clone()
    sums, sums_apart = empty_sums(12), empty_sums(12)
    options: dict[str, Any] = {"keys": KEYS, "slot": 1, "units": units, "backend": backend}
    kernels.cast_votes(gradient, torch.arange(12), yardstick, together, *sums, **options)
    for rows in ([7], [3, 0], [1, 2, 4, 5, 6], [11, 10, 9, 8]):
        picked = torch.tensor(rows)
        kernels.cast_votes(gradient[picked], picked, yardstick, apart, *sums_apart, **options)
    assert torch.equal(together, apart)
    assert torch.equal(sums[0], sums_apart[0]) and torch.equal(sums[1], sums_apart[1])


def whisper_in_python(
    gradient: torch.Tensor, rows: list[int], yardstick: torch.Tensor, votes: list[list[int]], gate: int, sign: int
) -> tuple[list[int], list[int]]:
    """``cast_whispers``, element by element; changes ``votes`` and returns sums of sizes and of squares."""
    sizes, squares = [0] * len(votes), [0] * len(votes)
    units = (gradient * yardstick[rows, None]).double().tolist()
    for k, i in enumerate(rows):
        for j, unit in enumerate(units[k]):
            size = round(min(abs(unit), 128.0) * 4096)
            sizes[i] += sign * size
            squares[i] += sign * size**2
            if size > gate:
                votes[i][j] -= sign * int(math.copysign(1, unit))
    return sizes, squares


@pytest.mark.parametrize("backend", kernels.BACKENDS)
@pytest.mark.parametrize("kind", ["int8", "int16"])
def test_whispers_by_brute_force(kind: str, backend: str) -> None:
    """One vote against the sign above the gate, none at it or below; statistics of all, loud and silent."""
    rng = generator(25)
    for gate, sign in ((0, 1), (1, 1), (3000, -1), (4096, 1)):
        gradient = torch.from_numpy((rng.standard_normal((4, 60)) * 10.0 ** rng.uniform(-4, 3, (4, 60))).astype("f4"))
        gradient[:, :6] = torch.tensor([0.0, -0.0, gate / 4096, -gate / 4096, (gate + 1) / 4096, -(gate + 1) / 4096])
        rows = [5, 1, 0, 3]
        yardstick = torch.tensor([1.0, 1.0, 7.0, 0.1, 1.0, 3.0])
        votes, (sizes, squares) = some_votes((6, 60), rng, 63, kind), empty_sums(6)
        expected = votes.tolist()
        sums = whisper_in_python(gradient, rows, yardstick, expected, gate, sign)
        picked = torch.tensor(rows)
        kernels.cast_whispers(gradient, picked, yardstick, votes, sizes, squares, gate=gate, sign=sign, backend=backend)
        assert votes.tolist() == expected
        assert (sizes.tolist(), squares.tolist()) == sums
    # The last gate, rows 1 and 0, whose yardstick is 1: just above votes, just at does not.
    before = torch.zeros(6, 60, dtype=votes.dtype)
    kernels.cast_whispers(gradient, picked, yardstick, before, *empty_sums(6), gate=4096, backend=backend)
    assert before[:2, :6].tolist() == [[0, 0, 0, 0, -1, 1]] * 2


def test_nothing_is_no_whisper_below_any_gate() -> None:
    """A gradient of exactly zero has no sign to vote against, also where the gate is negative."""
    results = []
    for backend in kernels.BACKENDS:
        votes = torch.zeros(1, 4, dtype=torch.int16)
        gradient, rows = torch.tensor([[0.0, -0.0, 1.0, -1.0]]), torch.zeros(1, dtype=torch.int64)
        kernels.cast_whispers(gradient, rows, torch.ones(1), votes, *empty_sums(1), gate=-1, backend=backend)
        results.append(votes.tolist())
    assert results[0] == results[1] == [[0, 0, -1, 1]]


# -- moves ------------------------------------------------------------------------------------------------------------


def fade_in_python(votes: int, decay: int, carry: int, draw: int) -> int:
    return max(-carry, min(carry, (votes * decay + draw) >> 16))


def apply_in_python(
    words: torch.Tensor,
    votes: torch.Tensor | None,
    stride: torch.Tensor,
    table: Manifold,
    keys: tuple[int, ...],
    decay: int,
    carry: int,
    shrink: int,
    reach: int,
) -> tuple[list[list[int]], list[list[int]], tuple[int, int, int]]:
    """``apply`` of the module docstring, element by element, in Python's unbounded integers: levels, votes, counts."""
    fixed = table.fixed.tolist()
    levels = table.levels(words).tolist()
    buffer = (table.votes(words) if votes is None else votes).tolist()
    flips = travel = clipped = 0
    for i, (level_row, vote_row) in enumerate(zip(levels, buffer, strict=True)):
        for j, (old, m) in enumerate(zip(level_row, vote_row, strict=True)):
            m = max(-reach, min(reach, m))
            if m == 0 and shrink == 0:
                continue
            position = (i * len(level_row) + j) & 0xFFFFFFFF
            current = (fixed[abs(old)] - (fixed[abs(old)] * shrink >> 32)) * (1 if old >= 0 else -1)
            wanted = current + m * int(stride[i])
            target = max(-ONE, min(ONE, wanted))
            clipped += target != wanted
            new = bisect.bisect_right(fixed, abs(target)) - 1
            if new < table.top:
                # P(up) = share of the gap that lies below the target.
                gap, rest = fixed[new + 1] - fixed[new], abs(target) - fixed[new]
                new += (hash_in_python(position, keys[0], keys[1]) >> 4) * gap < rest << 28
            new = new if target >= 0 else -new
            if new != old:
                flips += 1
                travel += abs(target - current)
            level_row[j] = new
            vote_row[j] = fade_in_python(m, decay, carry, hash_in_python(position, keys[2], keys[3]) & 0xFFFF)
    return levels, buffer, (flips, travel, clipped)


@pytest.mark.parametrize("backend", kernels.BACKENDS)
@pytest.mark.parametrize(("shrink", "reach"), [(0, 1 << 15), (0, 5), (1, 1 << 15), (77_777, 17), (1 << 22, 1)])
@pytest.mark.parametrize(
    ("kind", "table"),
    [("int16", MANIFOLD), ("int8", LINEAR), ("int16", COARSE), ("compact", COMPACT)],
    ids=lambda x: x if isinstance(x, str) else x.name,
)
def test_apply_by_brute_force(kind: str, table: Manifold, shrink: int, reach: int, backend: str) -> None:
    rng = generator(30, shrink, reach)
    shape = (29, 31)
    votes = some_votes(shape, rng, most_of(kind), kind)
    words, buffer = (votes, None) if kind == "compact" else (some_indices(shape, rng), votes)
    stride = some_stride(shape[0], rng)
    stride[0], stride[1] = 0, 1 << 46
    keys = (0xFFFFFFFF, 0xDEADBEEF, 3, 0xFFFFFFFF)
    carry = VoteUnits.for_buffer(BITS[kind], 1).carry
    levels, kept, counts = apply_in_python(words, buffer, stride, table, keys, 45_875, carry, shrink, reach)
    assert min(counts) > 0
    options = {"decay": 45_875, "carry": carry, "shrink": shrink, "reach": reach}
    got = kernels.apply_votes(words, buffer, stride, table, keys=keys, **options, backend=backend)
    assert table.levels(words).tolist() == levels
    assert (table.votes(words) if buffer is None else buffer).tolist() == kept
    assert got == counts
    assert table.unused(words) == 0


def test_the_hash_in_both_backends_is_the_one_written_down() -> None:
    rng = generator(31)
    hashed = numba.njit(lambda p, a, b: ghost_kernels_cpu._hash(p, a, b))
    for position, key0, key1 in [*rng.integers(0, 1 << 32, (200, 3)).tolist(), [0, 0, 0], [2**32 - 1] * 3]:
        expected = hash_in_python(position, key0, key1)
        assert int(ghost_kernels_torch.hash_of(torch.tensor(position), key0, key1)) == expected
        assert int(hashed(np.uint32(position), np.uint32(key0), np.uint32(key1))) == expected
    # A tensor of more than 2^32 elements: positions wrap, in range.
    rows = torch.tensor([2_796_202, 2_796_203, 1 << 31])
    expected_positions = [[(r * 1536 + j) & 0xFFFFFFFF for j in range(1536)] for r in rows.tolist()]
    assert ghost_kernels_torch.positions(rows, 1536).tolist() == expected_positions


def move_many(
    index: int,
    vote: int,
    stride: int,
    count: int,
    seed: int,
    backend: str | None = None,
    table: Manifold = MANIFOLD,
    shrink: int = 0,
) -> np.ndarray:
    """New levels of ``count`` weights that all have the same level, votes and stride."""
    shape = (8, count // 8)
    words = torch.full(shape, (index << table.vote_bits) + (vote if table.vote_bits else 0), dtype=torch.int16)
    votes = None if table.vote_bits else torch.full(shape, vote, dtype=torch.int16)
    keys = (*vote_units.hash_keys(seed, 1), *vote_units.hash_keys(seed, 2))
    strides = torch.full((8,), stride, dtype=torch.int64)
    kernels.apply_votes(words, votes, strides, table, keys=keys, decay=0, carry=1, shrink=shrink, backend=backend)
    return table.levels(words).numpy().ravel()


@pytest.mark.parametrize("shrink", [0, 1 << 20])
@pytest.mark.parametrize("table", TABLES, ids=lambda m: m.name)
def test_a_move_hits_its_target_on_average(table: Manifold, shrink: int) -> None:
    """Each case lands on the two neighbours of its target only, and on average on the target itself.

    With weight decay the target is the weight's shrunken value plus its votes.
    """
    rng = generator(32, shrink)
    fixed = table.fixed.numpy()
    top = table.top
    signed = np.concatenate([-fixed[:0:-1], fixed])
    count = 10_000
    z = []
    for case in range(50):
        index = int(some_indices((1, 1), rng, top)[0, 0]) if case % 3 else int(rng.integers(-top // 10, top // 10))
        vote = int(rng.choice([-1, 1])) * int(rng.integers(1, 32 if table.vote_bits else 600))
        stride = int(2.0 ** rng.uniform(*((20, 35) if table.vote_bits else (8, 30))))
        value = float(signed[index + top]) * (1 - shrink / 2**32)
        target = float(np.clip(value + vote * stride, -ONE, ONE))
        low = min(int(np.searchsorted(signed, target, side="right")) - 1, 2 * top - 1)
        new = move_many(index, vote, stride, count, case, table=table, shrink=shrink)
        gap = int(signed[low + 1] - signed[low])
        share = (target - int(signed[low])) / gap
        if share in (0.0, 1.0):
            assert (new == low + share - top).all()
            continue
        assert set(np.unique(new)) <= {low - top, low + 1 - top}
        spread = math.sqrt(share * (1 - share) / count)
        if spread * count > 10:
            z.append(((new == low + 1 - top).mean() - share) / spread)
    assert len(z) > 20
    assert np.abs(z).max() < 5 and abs(np.square(z).sum() - len(z)) < 5 * math.sqrt(2 * len(z))


@pytest.mark.parametrize("table", TABLES, ids=lambda m: m.name)
def test_weight_decay_alone_is_its_share_on_average(table: Manifold) -> None:
    """Without a vote, every weight loses the same share of itself, far below a grid step; zero stays zero."""
    rng = generator(44)
    shrink, shape = 3_333_333, (40, 4000)
    levels = rng.integers(1, table.top + 1, shape[0]) * rng.choice([-1, 1], shape[0])
    levels[:3] = [0, table.top, -table.top]
    words = torch.from_numpy(levels.astype(np.int16) << table.vote_bits)[:, None].repeat(1, shape[1])
    votes = None if table.vote_bits else torch.zeros(shape, dtype=torch.int8)
    stride = some_stride(shape[0], rng)
    counts = kernels.apply_votes(words, votes, stride, table, keys=FOUR_KEYS, decay=45_875, carry=9, shrink=shrink)
    fixed = table.fixed.numpy().astype(np.float64) / ONE
    before = np.sign(levels) * fixed[np.abs(levels)]
    now = table.levels(words).numpy().astype(int)
    after = np.sign(now) * fixed[np.abs(now)]
    error = after.mean(1) - before * (1 - shrink / 2**32)
    # The longest gap in reach is the one towards zero.
    spread = after.std(1) / math.sqrt(shape[1])
    assert (np.abs(error) <= 5 * spread + 2.0**-27 * np.abs(before)).all()
    assert (now[0] == 0).all() and (spread[1:] > 0).all()
    assert np.abs(before - after.mean(1)).sum() > 20 * np.abs(error).sum(), "the decay is far larger than the error"
    assert counts[0] == int((now != levels[:, None]).sum()) and counts[2] == 0
    assert not (table.votes(words) if votes is None else votes).any()


@pytest.mark.parametrize("backend", kernels.BACKENDS)
@pytest.mark.parametrize("kind", KINDS)
def test_weights_stopped_by_the_edge_are_counted(kind: str, backend: str) -> None:
    """Beyond ±1 counts, exactly ±1 does not; nor does a weight at the edge that nobody pushes."""
    table = COMPACT if kind == "compact" else LINEAR
    levels = torch.tensor([[table.top, table.top, -table.top, -table.top, 0, 0, 0, table.top]], dtype=torch.int16)
    votes = torch.tensor([[1, -1, -1, 0, 2, -2, 3, 0]], dtype=torch.int8 if kind == "int8" else torch.int16)
    words, buffer = ((levels << 6) + votes, None) if kind == "compact" else (levels, votes)
    stride = torch.tensor([ONE // 2])
    options: dict[str, Any] = {"keys": FOUR_KEYS, "decay": 0, "carry": 9, "backend": backend}
    counts = kernels.apply_votes(words, buffer, stride, table, **options)
    assert counts[2] == 3
    top = table.top
    new = table.levels(words)[0].tolist()
    assert [new[0], *new[2:]] == [top, -top, -top, top, -top, top, top]
    assert counts[0] == 4 and counts[1] == ONE // 2 + 3 * ONE


def test_a_move_far_below_a_grid_step_still_happens_at_times() -> None:
    """A thousandth of a gap moves one weight in a thousand."""
    index = 30_000
    gap = int(MANIFOLD.fixed[index + 1] - MANIFOLD.fixed[index])
    new = move_many(index, 1, gap // 1000, 400_000, 5)
    assert set(np.unique(new)) == {index, index + 1}
    assert abs((new != index).sum() - 400) < 100


@pytest.mark.parametrize("backend", kernels.BACKENDS)
@pytest.mark.parametrize("kind", KINDS)
def test_moves_saturate_and_never_write_the_lowest_index(kind: str, backend: str) -> None:
    rng = generator(33)
    shape = (64, 200)
    most = most_of(kind)
    table = COMPACT if kind == "compact" else MANIFOLD
    top = table.top
    levels = some_indices(shape, rng, top)
    levels[0], levels[1], levels[2] = top, -top, 0
    votes = some_votes(shape, rng, most).to(torch.int8 if kind == "int8" else torch.int16)
    votes[0], votes[1] = most, -most
    votes[2] = torch.where(torch.arange(200) % 2 == 0, most, -most).to(votes.dtype)
    sign = votes.sign().to(torch.int16)
    words, buffer = ((levels << 6) + votes, None) if kind == "compact" else (levels.clone(), votes)
    stride = torch.full((64,), 1 << 46)
    carry = (most - 1) // 2
    kernels.apply_votes(words, buffer, stride, table, keys=FOUR_KEYS, decay=65_536, carry=carry, backend=backend)
    assert torch.equal(table.levels(words), torch.where(sign == 0, levels, sign * top))
    assert table.unused(words) == 0
    assert np.abs(votes_in(kind, words if buffer is None else buffer)).max() == carry

    # Just short of the end, where the draw could overshoot.
    for level, vote in ((top - 1, 1), (1 - top, -1), (top, 1), (-top, -1)):
        new = move_many(level, vote, int(table.fixed[-1] - table.fixed[-2]) // 2, 4000, 6, backend, table)
        assert set(np.unique(np.abs(new))) <= {top - 1, top} and (np.sign(new) == np.sign(vote)).all()


@pytest.mark.parametrize("backend", kernels.BACKENDS)
@pytest.mark.parametrize("kind", KINDS)
def test_zero_votes_leave_everything_untouched(kind: str, backend: str) -> None:
    rng = generator(34)
    shape = (20, 60)
    table = COMPACT if kind == "compact" else MANIFOLD
    words = some_indices(shape, rng, table.top) << table.vote_bits
    before = words.clone()
    votes = None if kind == "compact" else torch.zeros(shape, dtype=torch.int8 if kind == "int8" else torch.int16)
    stride = some_stride(20, rng)
    counts = kernels.apply_votes(words, votes, stride, table, keys=KEYS * 2, decay=65_536, carry=9, backend=backend)
    assert counts == (0, 0, 0) and torch.equal(words, before) and (votes is None or not votes.any())


@pytest.mark.parametrize("backend", kernels.BACKENDS)
@pytest.mark.parametrize("kind", KINDS)
def test_rate_zero_moves_nothing_but_votes_fade(kind: str, backend: str) -> None:
    rng = generator(35)
    shape = (20, 60)
    words, votes, table = some_state(kind, shape, rng)
    levels, votes_before = table.levels(words).clone(), votes_in(kind, words if votes is None else votes)
    stride = kernels.integer_strides(kernels.inverse_scales(some_scale(20, rng)), 0.0, 256)
    assert not stride.any()
    counts = kernels.apply_votes(
        words, votes, stride, table, keys=FOUR_KEYS, decay=32_768, carry=32_767, backend=backend
    )
    assert counts == (0, 0, 0) and torch.equal(table.levels(words), levels)
    assert np.abs(2 * votes_in(kind, words if votes is None else votes) - votes_before).max() == 1


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("decay", [0, 1, 45_875, 65_535, 65_536])
def test_fading_is_unbiased(decay: int, kind: str) -> None:
    """A single vote survives with probability beta: it is never deleted for being small."""
    carry = VoteUnits.for_buffer(BITS[kind], 1).carry
    start = [1, -1, 3, -5, carry]
    shape = (len(start), 20_000)
    votes = torch.tensor(start, dtype=torch.int8 if kind == "int8" else torch.int16)[:, None].repeat(1, shape[1])
    stride = torch.zeros(len(start), dtype=torch.int64)
    keys = (*KEYS, *vote_units.hash_keys(1, decay))
    if kind == "compact":
        kernels.apply_votes(votes, None, stride, COMPACT, keys=keys, decay=decay, carry=carry)
    else:
        indices = torch.zeros(shape, dtype=torch.int16)
        kernels.apply_votes(indices, votes, stride, MANIFOLD, keys=keys, decay=decay, carry=carry)
    check_fading(start, votes, decay)


def check_fading(start: list[int], votes: torch.Tensor, decay: int) -> None:
    for vote, kept in zip(start, votes, strict=True):
        exact = vote * decay / 65536
        assert set(kept.unique().tolist()) <= {math.floor(exact), math.ceil(exact)}
        fraction = exact - math.floor(exact)
        spread = math.sqrt(fraction * (1 - fraction) / votes.shape[1])
        # Where a rounding is rarer than one in the sample, the spread of a coin says little: allow a handful.
        assert abs(kept.double().mean().item() - exact) <= max(5 * spread, 15 / votes.shape[1] * (0 < fraction < 1))


@pytest.mark.parametrize("backend", kernels.BACKENDS)
def test_what_is_carried_over_is_limited(backend: str) -> None:
    votes = torch.tensor([[32_767, -32_768, 101, -101, 100]], dtype=torch.int16)
    indices, stride = torch.zeros(1, 5, dtype=torch.int16), torch.zeros(1, dtype=torch.int64)
    options: dict[str, Any] = {"keys": FOUR_KEYS, "decay": 65_536, "backend": backend}
    kernels.apply_votes(indices, votes, stride, MANIFOLD, carry=100, **options)
    assert votes.tolist() == [[100, -100, 100, -100, 100]]
    votes = torch.tensor([[127, -128, 64, -64, 63]], dtype=torch.int8)
    kernels.apply_votes(indices, votes, stride, MANIFOLD, carry=63, **options)
    assert votes.tolist() == [[63, -63, 63, -63, 63]]
    words = torch.tensor([[64 * 511 + 31, -64 * 511 - 31, 64 + 16, 64 - 16, 15]], dtype=torch.int16)
    kernels.apply_votes(words, None, stride, COMPACT, carry=15, **options)
    assert words.tolist() == [[64 * 511 + 15, -64 * 511 - 15, 64 + 15, 64 - 15, 15]]


# -- flips by majority ------------------------------------------------------------------------------------------------


def flip_in_python(
    indices: torch.Tensor,
    votes: torch.Tensor,
    stride: torch.Tensor,
    table: Manifold,
    keys: tuple[int, ...],
    threshold: int,
    jitter: int,
    chance: int,
    decay: int,
    carry: int,
) -> tuple[list[list[int]], list[list[int]], tuple[int, int, int]]:
    """``flip_by_majority``, element by element, in Python's unbounded integers."""
    fixed = table.fixed.tolist()
    value = {i: fixed[abs(i)] * (1 if i >= 0 else -1) for i in range(-table.top, table.top + 1)}
    new_indices, new_votes = indices.tolist(), votes.tolist()
    columns = indices.shape[1]
    flips = travel = clipped = 0
    for i, j in itertools.product(range(len(new_indices)), range(columns)):
        old, m = new_indices[i][j], new_votes[i][j]
        if m == 0:
            continue
        position = (i * columns + j) & 0xFFFFFFFF
        first, second = hash_in_python(position, *keys[:2]), hash_in_python(position, *keys[2:])
        n = m + (first % 65536 * (2 * jitter + 1) // 65536 - jitter)
        if n != 0 and abs(n) >= threshold and first // 65536 < chance:
            way = (int(stride[i]) + second % 65536) // 65536
            wanted = old + (way if n > 0 else -way)
            new = max(-table.top, min(table.top, wanted))
            clipped += new != wanted
            flips += new != old
            travel += abs(value[new] - value[old])
            new_indices[i][j], new_votes[i][j] = new, 0
        else:
            new_votes[i][j] = fade_in_python(m, decay, carry, second // 65536)
    return new_indices, new_votes, (flips, travel, clipped)


@pytest.mark.parametrize("backend", kernels.BACKENDS)
@pytest.mark.parametrize(("threshold", "jitter", "chance"), [(5, 0, 65_536), (1, 2, 16_384), (3, 10, 40_000)])
@pytest.mark.parametrize(("kind", "table"), [("int16", MANIFOLD), ("int8", LINEAR)], ids=["int16", "int8"])
def test_flips_by_brute_force(
    kind: str, table: Manifold, threshold: int, jitter: int, chance: int, backend: str
) -> None:
    rng = generator(45, threshold)
    shape = (23, 41)
    indices = some_indices(shape, rng)
    votes = torch.from_numpy(rng.integers(-12, 13, shape)).to(torch.int8 if kind == "int8" else torch.int16)
    votes[0, :20] = most_of(kind)
    stride = torch.from_numpy((2.0 ** rng.uniform(8, 32, shape[0])).astype(np.int64))
    stride[1], stride[2] = 0, 1 << 37
    keys = (0xFFFFFFFF, 0xDEADBEEF, 3, 0xFFFFFFFF)
    options = {"threshold": threshold, "jitter": jitter, "chance": chance, "decay": 62_259, "carry": 8}
    expected = flip_in_python(indices, votes, stride, table, keys, **options)
    assert min(expected[2]) > 0
    counts = kernels.flip_by_majority(indices, votes, stride, table, keys=keys, **options, backend=backend)
    assert (indices.tolist(), votes.tolist(), counts) == expected


def flip_many(votes: list[int], stride: int, count: int, **options: Any) -> tuple[np.ndarray, torch.Tensor]:
    """New indices of ``count`` weights for each number of votes, all from index 100, and the votes they keep."""
    shape = (len(votes), count)
    buffer = torch.tensor(votes, dtype=torch.int16)[:, None].repeat(1, count)
    indices = torch.full(shape, 100, dtype=torch.int16)
    given: dict[str, Any] = {"keys": FOUR_KEYS, "threshold": 5, "decay": 65_536, "carry": 1000} | options
    kernels.flip_by_majority(indices, buffer, torch.full((len(votes),), stride), LINEAR, **given)
    return indices.numpy().astype(int), buffer


def test_a_flip_needs_the_threshold() -> None:
    """From the threshold on every weight moves by the stride; below nobody does, and votes stay for later."""
    votes = [0, 1, 4, 5, 6, 300, -1, -4, -5, -300]
    indices, kept = flip_many(votes, 7 << 16, 50)
    moved = [0, 0, 0, 7, 7, 7, 0, 0, -7, -7]
    assert (indices == 100 + np.array(moved)[:, None]).all()
    assert (kept.numpy() == np.where(np.array(moved) == 0, votes, 0)[:, None]).all()


def test_a_flip_by_part_of_an_index_is_drawn() -> None:
    """2.25 indices on average: two, or three in a quarter of cases."""
    indices, _ = flip_many([9, -9], (9 << 16) // 4, 20_000)
    for row, sign in zip(indices, (1, -1), strict=True):
        assert set(np.unique(sign * (row - 100))) == {2, 3}
        assert abs((sign * (row - 100)).mean() - 2.25) < 5 * math.sqrt(0.25 * 0.75 / 20_000)


def test_a_flip_has_its_chance() -> None:
    """Where the threshold is reached, a weight moves with the given probability; the others keep their votes."""
    for chance in (0, 6554, 32_768, 65_536):
        indices, kept = flip_many([8], 1 << 16, 20_000, chance=chance)
        share = (indices == 101).mean()
        probability = chance / 65_536
        assert abs(share - probability) <= 5 * math.sqrt(probability * (1 - probability) / 20_000)
        assert torch.equal(kept == 0, torch.from_numpy(indices == 101)) and set(kept.unique().tolist()) <= {0, 8}


def test_noise_lets_quiet_votes_break_through() -> None:
    """An integer uniform from -3 to 3 on the votes: 2 reach 5 in one case of seven, -4 reach -5 in three; 1 never do.

    The noise is not kept, and gives no vote to a weight that has none.
    """
    count = 30_000
    indices, kept = flip_many([2, -4, 1, 0, 8], 1 << 16, count, jitter=3)
    for row, way, probability in zip(indices, (1, -1, 1, 1, 1), (1 / 7, 3 / 7, 0, 0, 1), strict=True):
        assert set(np.unique(row)) <= {100, 100 + way}
        assert abs((row != 100).mean() - probability) <= 5 * math.sqrt(probability * (1 - probability) / count)
    for vote, row, left in zip([2, -4, 1, 0], indices, kept, strict=False):
        assert set(left[torch.from_numpy(row == 100)].tolist()) == {vote}

    # Noise larger than the votes turns some of them around; a sum of nothing moves nobody.
    indices, kept = flip_many([1], 1 << 16, count, threshold=1, jitter=2)
    for way, probability in ((1, 3 / 5), (-1, 1 / 5), (0, 1 / 5)):
        share = (indices == 100 + way).mean()
        assert abs(share - probability) < 5 * math.sqrt(probability * (1 - probability) / count)
    assert bool((kept[torch.from_numpy(indices == 100)] == 1).all())


@pytest.mark.parametrize("backend", kernels.BACKENDS)
def test_flips_stop_at_the_edge(backend: str) -> None:
    """Beyond the last index is clipped and counted; a weight already there spends its votes on nothing."""
    top = INDEX_MAX
    indices = torch.tensor([[top, top - 2, top - 3, -top, 2 - top, top, 0]], dtype=torch.int16)
    votes = torch.tensor([[5, 5, 5, -9, -9, -9, 0]], dtype=torch.int8)
    counts = kernels.flip_by_majority(
        *(indices, votes, torch.tensor([3 << 16]), LINEAR),
        keys=FOUR_KEYS,
        threshold=5,
        decay=65_536,
        carry=63,
        backend=backend,
    )
    assert indices.tolist() == [[top, top, top, -top, -top, top - 3, 0]]
    fixed = LINEAR.fixed
    travel = 2 * int(fixed[top] - fixed[top - 2]) + 2 * int(fixed[top] - fixed[top - 3])
    assert counts == (4, travel, 4) and not votes.any()
    # The largest stride there is, in one go from end to end.
    votes[0, 0] = -5
    kernels.flip_by_majority(
        *(indices, votes, torch.tensor([1 << 37]), LINEAR),
        keys=FOUR_KEYS,
        threshold=1,
        decay=0,
        carry=63,
        backend=backend,
    )
    assert indices[0, 0] == -top


@pytest.mark.parametrize("decay", [0, 1, 32_768, 62_259, 65_536])
def test_votes_below_the_threshold_fade_without_bias(decay: int) -> None:
    """A single vote survives a step with the probability that decay is: it is not deleted for being one."""
    start = [1, -1, 3, -10, 63]
    indices, kept = flip_many(start, 1 << 16, 20_000, threshold=64, decay=decay)
    assert (indices == 100).all()
    check_fading(start, kept, decay)


# -- strides ----------------------------------------------------------------------------------------------------------


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


@pytest.mark.parametrize("shrink", [0, 5000])
@pytest.mark.parametrize("kind", KINDS)
def test_no_float_tensor_is_dispatched_after_the_cast(kind: str, shrink: int) -> None:
    rng = generator(40)
    shape = (33, 65)
    words, votes, table = some_state(kind, shape, rng)
    inverse = kernels.inverse_scales(some_scale(shape[0], rng))
    before = words.clone()
    with NoFloats():
        stride = kernels.integer_strides(inverse, 3e-3, 256)
        flips, *_ = kernels.apply_votes(
            words, votes, stride, table, keys=FOUR_KEYS, decay=45_875, carry=15, shrink=shrink, backend="torch"
        )
    assert flips > 0 and not torch.equal(words, before)


@pytest.mark.parametrize("kind", ["int8", "int16"])
def test_no_float_tensor_is_dispatched_by_flips(kind: str) -> None:
    rng = generator(41)
    shape = (33, 65)
    indices, votes, table = some_state(kind, shape, rng)
    inverse = kernels.inverse_scales(some_scale(shape[0], rng))
    before = indices.clone()
    with NoFloats():
        stride = kernels.integer_strides(inverse, 3e-3, 1) >> 9
        options = {"threshold": 2, "jitter": 1, "chance": 40_000, "decay": 60_000, "carry": 63}
        flips, *_ = kernels.flip_by_majority(indices, votes, stride, table, keys=FOUR_KEYS, **options, backend="torch")
    assert flips > 0 and not torch.equal(indices, before)


def test_the_compiled_moves_hold_no_float_variable() -> None:
    """Types that numba inferred for every variable of the kernels; compiled afresh because a cache keeps no types."""

    def floats_of(function: Callable[..., Any], signature: Any) -> list[str]:
        compiled = numba.njit(function)
        compiled.compile(signature)
        found = compiled.overloads[compiled.signatures[0]].type_annotation.typemap
        assert len(found) > 2
        return [name for name, kind in found.items() if "float" in str(kind)]

    int8, int16, int32, int64, uint32 = numba.int8, numba.int16, numba.int32, numba.int64, numba.uint32
    last = (int64[:, ::1], int64, int64)
    tables = (int64[::1], int64[::1], int32[::1])
    rest = (int64, uint32[::1], *(int64,) * 4, *last)
    assert floats_of(ghost_kernels_cpu.apply_rows.py_func, (int16[:, ::1], int8[:, ::1], *tables, *rest)) == []
    assert floats_of(ghost_kernels_cpu.apply_words.py_func, (int16[:, ::1], int64, *tables, *rest)) == []
    flip = (int16[:, ::1], int8[:, ::1], int64[::1], int64[::1], int64, uint32[::1], *(int64,) * 5, *last)
    assert floats_of(ghost_kernels_cpu.flip_rows.py_func, flip) == []
    assert floats_of(lambda a: int(a * 0.5), (int64,)) != []


# -- randomness -------------------------------------------------------------------------------------------------------


def hashes(count: int, *parts: int) -> np.ndarray:
    return ghost_kernels_torch.hash_of(torch.arange(count), *vote_units.hash_keys(*parts)).numpy()


def test_low_and_high_bits_are_uniform() -> None:
    """Rounding draws from the low 16 bits, the choice between neighbours from the upper 28, signs from the last."""
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
    keys = {vote_units.hash_keys(*(int(p) for p in parts)) for parts in np.ndindex(9, 9, 9, 9)}
    assert len(keys) == 9**4
    assert vote_units.hash_keys(1, 2) != vote_units.hash_keys(2, 1)
    assert vote_units.hash_keys(0) != vote_units.hash_keys(0, 0) != vote_units.hash_keys(0, 0, 0)
    assert vote_units.hash_keys(-1) == vote_units.hash_keys((1 << 64) - 1)
    assert all(0 <= k < 1 << 32 for pair in keys for k in pair)
    # splitmix64 from state 0, as published: first output 0xE220A8397B1DCDAF.
    assert vote_units.hash_keys(0) == (0x7B1DCDAF, 0xE220A839)


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
        "row_sketch": torch.zeros(3, dtype=torch.int64),
        "keys": KEYS,
        "slot": 2,
        "units": VoteUnits.for_buffer(16, 3),
    }
    kernels.cast_votes(**arguments | change)


def call_whispers(**change: Any) -> None:
    arguments: dict[str, Any] = {
        "gradient": torch.zeros(2, 4),
        "rows": torch.tensor([0, 2]),
        "yardstick": torch.ones(3),
        "votes": torch.zeros(3, 4, dtype=torch.int8),
        "row_sizes": torch.zeros(3, dtype=torch.int64),
        "row_squares": torch.zeros(3, dtype=torch.int64),
        "gate": 5,
    }
    kernels.cast_whispers(**arguments | change)


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


def call_words(**change: Any) -> None:
    call_apply(**{"votes": None, "manifold": COMPACT, "shrink": 1 << 22} | change)


def call_flip(**change: Any) -> None:
    arguments: dict[str, Any] = {
        "indices": torch.zeros(3, 4, dtype=torch.int16),
        "votes": torch.ones(3, 4, dtype=torch.int8),
        "stride": torch.ones(3, dtype=torch.int64),
        "manifold": LINEAR,
        "keys": FOUR_KEYS,
        "threshold": 1,
        "decay": 5,
        "carry": 5,
    }
    kernels.flip_by_majority(**arguments | change)


CALLS: list[Callable[..., None]] = [
    call_dequantize,
    call_snap,
    call_cast,
    call_whispers,
    call_apply,
    call_words,
    call_flip,
]


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
        (call_dequantize, {"dtype": torch.float16}, "dtype is torch.float16, expected torch.float32 or torch.bfloat16"),
        (call_dequantize, {"dtype": torch.bfloat16, "out": torch.zeros(3, 4)}, "out is torch.float32"),
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
        (call_cast, {"votes": torch.zeros(3, 4, dtype=torch.int32)}, "votes is torch.int32"),
        (call_cast, {"votes": torch.zeros(3, 4)}, "votes is torch.float32"),
        (call_cast, {"votes": torch.zeros(3, 4, dtype=torch.uint8)}, "votes is torch.uint8"),
        (call_cast, {"row_squares": torch.zeros(3, dtype=torch.int32)}, "row_squares is torch.int32"),
        (call_cast, {"row_squares": torch.zeros(2, dtype=torch.int64)}, "row_squares"),
        (call_cast, {"row_sketch": torch.zeros(3)}, "row_sketch is torch.float32"),
        (call_cast, {"row_sketch": torch.zeros(4, dtype=torch.int64)}, "row_sketch"),
        (call_cast, {"slot": -1}, "slot is -1, expected 0 to 2"),
        (call_cast, {"slot": 4}, "slot is 4, expected 0 to 2"),
        (call_cast, {"slot": 3}, "slot is 3, expected 0 to 2"),
        (call_cast, {"slot": 32, "units": VoteUnits.for_buffer(8, 16, 2)}, "slot is 32, expected 0 to 31"),
        (call_cast, {"sign": 2}, "sign is 2, expected 1 or -1"),
        (call_cast, {"sign": 0}, "sign is 0, expected 1 or -1"),
        (call_cast, {"rows": torch.tensor([0, 3]), "backend": "numba"}, "rows run from 0 to 3, expected 0 to 2"),
        (call_cast, {"rows": torch.tensor([-1, 1]), "backend": "numba"}, "rows run from -1 to 1, expected 0 to 2"),
        (
            call_cast,
            {"gradient": torch.zeros(2, 32_769), "votes": torch.zeros(3, 32_769, dtype=torch.int8)},
            "gradient has 32769 columns, expected at most 32768",
        ),
        (call_whispers, {"gradient": torch.zeros(2, 4).double()}, "gradient is torch.float64"),
        (call_whispers, {"gradient": torch.zeros(2, 4).bfloat16()}, "gradient is torch.bfloat16"),
        (call_whispers, {"votes": torch.zeros(3, 4, dtype=torch.int64)}, "votes is torch.int64"),
        (call_whispers, {"row_sizes": torch.zeros(3, dtype=torch.int32)}, "row_sizes is torch.int32"),
        (call_whispers, {"row_squares": torch.zeros(4, dtype=torch.int64)}, "row_squares"),
        (call_whispers, {"rows": torch.tensor([0, 3]), "backend": "numba"}, "rows run from 0 to 3"),
        (call_whispers, {"sign": 3}, "sign is 3"),
        (
            call_whispers,
            {"gradient": torch.zeros(2, 32_769), "votes": torch.zeros(3, 32_769, dtype=torch.int8)},
            "32769 columns",
        ),
        (call_apply, {"indices": torch.zeros(3, 4, dtype=torch.int64)}, "indices is torch.int64"),
        (call_apply, {"votes": torch.zeros(3, 4, dtype=torch.int32)}, "votes is torch.int32"),
        (call_apply, {"votes": torch.zeros(3, 3, dtype=torch.int16)}, "votes"),
        (call_apply, {"votes": None}, "prime-harmonic has 0 vote bits: expected a buffer"),
        (call_apply, {"stride": torch.ones(3)}, "stride is torch.float32"),
        (call_apply, {"stride": torch.ones(4, dtype=torch.int64)}, "stride"),
        (call_apply, {"decay": -1}, "decay is -1"),
        (call_apply, {"decay": 65_537}, "decay is 65537"),
        (call_apply, {"shrink": -1}, r"shrink is -1, expected 0 to 4194304"),
        (call_words, {"shrink": (1 << 22) + 1}, r"shrink is 4194305, expected 0 to 4194304"),
        (call_words, {"votes": torch.zeros(3, 4, dtype=torch.int16)}, "compact has 6 vote bits"),
        (call_words, {"indices": torch.zeros(3, 4, dtype=torch.int8)}, "indices is torch.int8"),
        (call_flip, {"manifold": COMPACT}, "compact keeps its votes in the indices"),
        (call_flip, {"threshold": 0}, "threshold is 0"),
        (call_flip, {"jitter": -1}, "jitter -1"),
        (call_flip, {"chance": -1}, "chance -1"),
        (call_flip, {"chance": 65_537}, "chance 65537"),
        (call_flip, {"decay": 65_537}, "decay 65537"),
        (call_flip, {"votes": torch.zeros(3, 4, dtype=torch.int32)}, "votes is torch.int32"),
        (call_flip, {"stride": torch.ones(3, dtype=torch.int32)}, "stride is torch.int32"),
    ],
)
def test_wrong_arguments_are_named(call: Callable[..., None], change: dict[str, Any], words: str) -> None:
    with pytest.raises(KernelError, match=words):
        call(**change)


@pytest.mark.parametrize(
    ("call", "name"),
    [
        (call_dequantize, "indices"),
        (call_snap, "weights"),
        (call_cast, "gradient"),
        (call_whispers, "gradient"),
        (call_apply, "indices"),
        (call_words, "indices"),
        (call_flip, "indices"),
    ],
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
        (call_whispers, {"row_sizes": torch.zeros(3, dtype=torch.int64, device="meta")}),
        (call_apply, {"manifold": MANIFOLD.to("meta")}),
        (call_words, {"manifold": COMPACT.to("meta")}),
        (call_flip, {"stride": torch.ones(3, dtype=torch.int64, device="meta")}),
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


def test_backend_for(monkeypatch: pytest.MonkeyPatch) -> None:
    assert kernels.backend_for("cpu") == "numba"
    assert kernels.backend_for("meta") == "torch"
    assert kernels.backend_for("cpu", "torch") == kernels.backend_for("cuda", "torch") == "torch"
    assert kernels.backend_for("cpu", "numba") == "numba"
    with pytest.raises(KernelError, match="numba serves cpu, not cuda"):
        kernels.backend_for("cuda", "numba")
    with pytest.raises(KernelError, match=r"'Numba'.*numba, torch"):
        kernels.backend_for("cpu", "Numba")
    monkeypatch.setitem(kernels.SERVES, "cuda", ("cuda",))
    with pytest.raises(KernelError, match="cuda serves cuda, not cpu"):
        kernels.backend_for("cpu", "cuda")


def test_a_card_has_its_kernels_or_says_why_not(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    device = torch.device("cuda", 1)

    def refuse(device: torch.device) -> None:
        raise cuda_compiler.CudaCompilerError("no NVRTC of CUDA 12 found")

    monkeypatch.setattr(ghost_kernels_cuda, "module_of", refuse)
    ghost_kernels_cuda.available.cache_clear()
    assert kernels.backend_for(device) == kernels.backend_for(device) == "torch"
    assert [r.getMessage() for r in caplog.records if "NVRTC" in r.getMessage()] == [
        "tensor operations serve cuda:1, ten times slower: no NVRTC of CUDA 12 found"
    ]
    monkeypatch.setattr(ghost_kernels_cuda, "module_of", lambda device: None)
    ghost_kernels_cuda.available.cache_clear()
    assert kernels.backend_for(device) == "cuda"
    ghost_kernels_cuda.available.cache_clear()


def test_kernels_work_in_a_forked_child() -> None:
    """The thread pool of the parent does not exist in the child."""
    indices = some_indices((130, 1031), generator(50))
    scale = torch.ones(130)
    torch.set_num_threads(2)
    expected = kernels.dequantize(indices, scale, MANIFOLD, backend="numba")
    assert row_threads.RUNS_IN == "team" or row_threads._pool is not None
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
        votes, (squares, sketch) = some_votes((3, 4), generator(51), 100), empty_sums(3)
        before = votes.clone()
        none = torch.zeros(0, dtype=torch.int64)
        given: dict[str, Any] = {"gradient": torch.zeros(0, 4), "rows": none, "votes": votes, "backend": backend}
        call_cast(**given, row_squares=squares, row_sketch=sketch)
        call_whispers(**given, row_squares=squares, row_sizes=sketch)
        assert torch.equal(votes, before) and not squares.any() and not sketch.any()
        for table, held in ((MANIFOLD, votes[:0]), (COMPACT, None)):
            empty = torch.zeros(0, 4, dtype=torch.int16)
            counts = kernels.apply_votes(
                empty, held, none, table, keys=FOUR_KEYS, decay=9, carry=9, shrink=9, backend=backend
            )
            assert counts == (0, 0, 0)

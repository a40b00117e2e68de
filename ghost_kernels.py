"""Every hot operation on indices and votes, as functions on tensors: snap, dequantize, cast votes, apply votes.

Two backends behind one signature, with the same bits: ``torch`` (the reference: plain tensor operations on any device,
worked in slices) and ``numba`` (the CPU's: one fused pass per operation, a weight is read and written once).
``backend_for`` chooses by device and says which; nothing falls back in silence.

The vote rule ``momentum`` in symbols. K micro-batches a step, g the gradient of one micro-batch's loss,
SR unbiased stochastic rounding, U the votes per row RMS (``VoteUnits.unit``):

    cast   f = rint(2^16 · yardstick[row] · g)        with yardstick = (1 - β) U / (K · rms[row])
           votes -= (f + r) >> 16                     r uniform in [0, 2^16): E[vote] is exactly f / 2^16
           row_squares[row] += Σ (f >> 6)^2           the row's measured size, for the next step's yardstick
    apply  target = value[index] + stride[row] · votes, in fixed point with 40 fractional bits, clipped to ±1
           index  = one of the two entries around target, drawn so that its expectation is target
           votes  = SR(β · votes)

Casting reads a float gradient and is the last place where a float occurs: ``apply_votes`` is integers from end to end,
in both backends. Randomness is a hash of (two 32-bit keys, the element's position in the whole tensor); keys come from
(seed, step, micro-batch, tensor), so no bit depends on slices, threads, device or the order of micro-batches.
Sums cannot overflow: a vote is limited to what K of them may add up to (``VoteUnits.limit``), and is clipped, not
wrapped.

Rejected: normalising a micro-batch by its own gradient's RMS (a row that sees only noise would vote as loud as one with
signal); float noise from a generator (its bits depend on device and order); numba's own thread pool (not safe to enter
from the autograd thread beside the main one: a plain pool of threads over rows is, since the kernels release the GIL).
"""

from __future__ import annotations

import itertools
import math
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numba
import numpy as np
import torch

from manifolds import BUCKET_BITS, FIXED_BITS, INDEX_MAX, Manifold

SLICE_ELEMENTS = 1 << 20
"""The torch backend works on at most about this many elements at a time, so no full-size temporary exists."""
STAT_SHIFT = 6
"""Votes enter the row statistics with ``16 - STAT_SHIFT`` fractional bits: sums of squares of rows of up to
``COLUMNS_MAX`` columns stay below 2^63 however loud the votes are."""
COLUMNS_MAX = 1 << 15
USES = 2
"""How often a grid may vote in a micro-batch: a tied one does as head and as embedding."""
_MASK = 0xFFFFFFFF
_ONE = 1 << FIXED_BITS


class KernelError(ValueError):
    """Arguments of the wrong dtype, shape or device."""


@dataclass(frozen=True)
class VoteUnits:
    """What the integers of a vote buffer mean.

    Attributes:
        unit: votes in one row RMS of the accumulated, averaged gradient.
        limit: largest magnitude of a single vote; K micro-batches of them, from ``USES`` uses each, on top of a decayed
            buffer cannot leave the buffer's dtype.
        carry: largest magnitude that a buffer keeps from one step to the next.
    """

    unit: int
    limit: int
    carry: int

    @staticmethod
    def for_int16(micro_batches: int) -> VoteUnits:
        """Units of an int16 buffer: half of its range for what is carried over, half for a step's new votes."""
        half = INDEX_MAX // 2
        if not 1 <= micro_batches <= half // USES:
            raise KernelError(f"micro_batches is {micro_batches}, expected 1 to {half // USES}")
        return VoteUnits(unit=256, limit=half // (USES * micro_batches), carry=half)


@dataclass(frozen=True)
class SnapReport:
    """What one snap lost: sums in float64, counts of elements."""

    elements: int
    zeros: int
    saturated: int
    signal: float
    noise: float

    @property
    def snr_db(self) -> float:
        """Signal to noise of the dequantized tensor in dB; infinite where nothing was lost, and for all zeros."""
        return math.inf if self.noise == 0 else 10 * math.log10(self.signal / self.noise)


def hash_keys(*parts: int) -> tuple[int, int]:
    """Two 32-bit keys from integers such as (seed, step, micro-batch, tensor): splitmix64 (Steele et al. 2014)."""
    state = 0
    for part in parts:
        state = (state ^ (part & 0xFFFFFFFFFFFFFFFF)) + 0x9E3779B97F4A7C15 & 0xFFFFFFFFFFFFFFFF
        state = (state ^ state >> 30) * 0xBF58476D1CE4E5B9 & 0xFFFFFFFFFFFFFFFF
        state = (state ^ state >> 27) * 0x94D049BB133111EB & 0xFFFFFFFFFFFFFFFF
        state ^= state >> 31
    return state & _MASK, state >> 32


# ---------------------------------------------------------------------------------------------------------------------
# numba: compiled once per machine, kept in the cache folder beside this file


@numba.njit(inline="always")
def _hash(position, key0, key1):
    # numba widens uint32 products to 64 bits: every step is cut back.
    x = np.uint32(np.uint32(position) * np.uint32(0x9E3779B1) + key0)
    x = np.uint32(x ^ (x >> np.uint32(16)))
    x = np.uint32(np.uint32(x * np.uint32(0x85EBCA6B)) ^ key1)
    x = np.uint32(x ^ (x >> np.uint32(13)))
    x = np.uint32(x * np.uint32(0xC2B2AE35))
    return np.uint32(x ^ (x >> np.uint32(16)))


@numba.njit(nogil=True, cache=True, error_model="numpy")
def _dequantize_rows(indices, scale, values, out, start, stop):
    for i in range(start, stop):
        s = scale[i]
        for j in range(indices.shape[1]):
            out[i, j] = values[np.int32(indices[i, j]) + 32768] * s


@numba.njit(nogil=True, cache=True, error_model="numpy")
def _snap_rows(weights, scale, thresholds, buckets, values, out, sums, start, stop):
    # No array is indexed by a value that was not brought into [0, 1] first: NaN saturates.
    zeros = 0
    saturated = 0
    signal = 0.0
    noise = 0.0
    for i in range(start, stop):
        s = scale[i]
        for j in range(weights.shape[1]):
            w = weights[i, j]
            x = abs(w / s)
            if not (x <= np.float32(1.0)):
                saturated += 1
                x = np.float32(1.0)
            bucket = np.int32(x * np.float32(32768.0))
            low = buckets[bucket]
            high = buckets[bucket + 1]
            while low < high:
                middle = (low + high + 1) >> 1
                if thresholds[middle] <= x:
                    low = middle
                else:
                    high = middle - 1
            index = low if w >= np.float32(0.0) else -low
            out[i, j] = index
            if low == 0:
                zeros += 1
            error = np.float64(w) - np.float64(values[index + 32768] * s)
            noise += error * error
            signal += np.float64(w) * np.float64(w)
    sums[0] += zeros
    sums[1] += saturated
    sums[2] += signal
    sums[3] += noise


@numba.njit(nogil=True, cache=True, error_model="numpy")
def _cast_rows(gradient, rows, yardstick, votes, squares, columns, key0, key1, limit, sign, start, stop):
    top = np.float32(limit)
    for k in range(start, stop):
        i = rows[k]
        y = yardstick[i]
        base = np.uint32(i * columns)
        total = np.int64(0)
        for j in range(columns):
            t = gradient[k, j] * y
            t = min(max(t, -top), top)
            f = np.int32(np.rint(t * np.float32(65536.0)))
            r = np.int32(_hash(base + np.uint32(j), key0, key1) & np.uint32(0xFFFF))
            v = (f + r) >> np.int32(16)
            votes[i, j] -= np.int16(v * sign)
            q = np.int64(f >> np.int32(6))
            total += q * q
        squares[i] += total * sign


@numba.njit(nogil=True, cache=True, error_model="numpy")
def _apply_rows(indices, votes, stride, fixed, buckets, columns, keys, decay, carry, counts, start, stop):
    one = np.int64(1) << np.int64(40)
    flips = np.int64(0)
    travel = np.int64(0)
    for i in range(start, stop):
        step = stride[i]
        base = np.uint32(i * columns)
        for j in range(columns):
            m = np.int64(votes[i, j])
            if m == 0:
                continue
            position = base + np.uint32(j)
            old = np.int64(indices[i, j])
            current = fixed[min(abs(old), 32767)]
            if old < 0:
                current = -current
            target = min(max(current + m * step, -one), one)
            size = abs(target)
            bucket = size >> np.int64(25)
            low = buckets[bucket]
            high = buckets[bucket + 1]
            while low < high:
                middle = (low + high + 1) >> 1
                if fixed[middle] <= size:
                    low = middle
                else:
                    high = middle - 1
            rest = size - fixed[low]
            new = np.int64(low)
            if rest > 0:
                gap = fixed[low + 1] - fixed[low]
                if np.int64(_hash(position, keys[0], keys[1])) * gap < rest << np.int64(32):
                    new += 1
            if target < 0:
                new = -new
            if new != old:
                flips += 1
                travel += abs(target - current)
                indices[i, j] = np.int16(new)
            r = np.int64(_hash(position, keys[2], keys[3]) & np.uint32(0xFFFF))
            m = (m * decay + r) >> np.int64(16)
            votes[i, j] = np.int16(min(max(m, -carry), carry))
    counts[0] += flips
    counts[1] += travel


_pool: ThreadPoolExecutor | None = None
_pool_size = 0


def _run_rows(function: Callable[..., None], rows: int, elements: int, *arguments: object) -> None:
    """Call a row kernel over all rows, on as many threads as torch is set to use."""
    global _pool, _pool_size
    threads = min(torch.get_num_threads(), rows, 1 + elements // 65536)
    if threads <= 1:
        function(*arguments, 0, rows)
        return
    if _pool is None or _pool_size < threads:
        _pool = ThreadPoolExecutor(threads, thread_name_prefix="ghost")
        _pool_size = threads
    edges = [rows * t // threads for t in range(threads + 1)]
    waiting = [_pool.submit(function, *arguments, a, b) for a, b in itertools.pairwise(edges)]
    for future in waiting:
        future.result()


def _forget_pool() -> None:
    global _pool
    _pool = None


os.register_at_fork(after_in_child=_forget_pool)


# ---------------------------------------------------------------------------------------------------------------------
# torch: the reference


def _hash_reference(position: torch.Tensor, key0: int, key1: int) -> torch.Tensor:
    """The same hash on int64 tensors that hold 32-bit values; products wrap modulo 2^64, of which 32 bits are kept."""
    x = (position * 0x9E3779B1 + key0) & _MASK
    x = x ^ (x >> 16)
    x = ((x * 0x85EBCA6B) & _MASK) ^ key1
    x = x ^ (x >> 13)
    x = (x * 0xC2B2AE35) & _MASK
    return x ^ (x >> 16)


def _positions(rows: torch.Tensor, columns: int) -> torch.Tensor:
    return (rows[:, None] * columns + torch.arange(columns, device=rows.device)) & _MASK


def _row_slices(rows: int, columns: int) -> list[range]:
    step = max(1, SLICE_ELEMENTS // max(columns, 1))
    return [range(a, min(a + step, rows)) for a in range(0, rows, step)]


def _dequantize_reference(indices: torch.Tensor, scale: torch.Tensor, manifold: Manifold, out: torch.Tensor) -> None:
    for rows in _row_slices(*indices.shape):
        part = slice(rows.start, rows.stop)
        picked = manifold.values[indices[part].int() + 32768]
        torch.mul(picked, scale[part, None], out=out[part])


def _snap_reference(
    weights: torch.Tensor, scale: torch.Tensor, manifold: Manifold, out: torch.Tensor, sums: np.ndarray
) -> None:
    for rows in _row_slices(*weights.shape):
        part = slice(rows.start, rows.stop)
        w = weights[part]
        x = (w / scale[part, None]).abs()
        sums[1] += (~(x <= 1)).sum().item()
        low = torch.bucketize(torch.where(x <= 1, x, 1.0), manifold.thresholds, right=True, out_int32=True) - 1
        sums[0] += (low == 0).sum().item()
        low = torch.where(w < 0, -low, low)
        out[part] = low.to(torch.int16)
        error = w.double() - (manifold.values[low + 32768] * scale[part, None]).double()
        sums[3] += error.square().sum().item()
        sums[2] += w.double().square().sum().item()


def _cast_reference(
    gradient: torch.Tensor,
    rows: torch.Tensor,
    yardstick: torch.Tensor,
    votes: torch.Tensor,
    squares: torch.Tensor,
    keys: tuple[int, int],
    limit: int,
    sign: int,
) -> None:
    columns = gradient.shape[1]
    for part in _row_slices(*gradient.shape):
        i = rows[part.start : part.stop]
        t = gradient[part.start : part.stop] * yardstick[i, None]
        f = torch.round(t.clamp_(-float(limit), float(limit)) * 65536.0).to(torch.int64)
        r = _hash_reference(_positions(i, columns), *keys) & 0xFFFF
        votes[i] -= (((f + r) >> 16) * sign).to(votes.dtype)
        squares[i] += (f >> STAT_SHIFT).square().sum(1) * sign


def _apply_reference(
    indices: torch.Tensor,
    votes: torch.Tensor,
    stride: torch.Tensor,
    manifold: Manifold,
    keys: tuple[int, int, int, int],
    decay: int,
    carry: int,
) -> tuple[int, int]:
    columns = indices.shape[1]
    fixed = manifold.fixed
    flips = travel = 0
    for rows in _row_slices(*indices.shape):
        part = slice(rows.start, rows.stop)
        m = votes[part].long()
        old = indices[part].long()
        current = fixed[old.abs().clamp(max=INDEX_MAX)] * old.sign()
        target = (current + m * stride[part, None]).clamp_(-_ONE, _ONE)
        size = target.abs()
        low = torch.bucketize(size, fixed, right=True) - 1
        rest = size - fixed[low]
        gap = fixed[(low + 1).clamp_(max=INDEX_MAX)] - fixed[low]
        position = _positions(torch.arange(rows.start, rows.stop, device=indices.device), columns)
        up = _hash_reference(position, keys[0], keys[1]) * gap < rest << 32
        new = (low + up.long()) * torch.where(target < 0, -1, 1)
        new = torch.where(m == 0, old, new)
        moved = new != old
        flips += int(moved.sum())
        travel += int(torch.where(moved, (target - current).abs(), 0).sum())
        indices[part] = new.to(torch.int16)
        r = _hash_reference(position, keys[2], keys[3]) & 0xFFFF
        kept = ((m * decay + r) >> 16).clamp_(-carry, carry)
        votes[part] = torch.where(m == 0, 0, kept).to(votes.dtype)
    return flips, travel


# ---------------------------------------------------------------------------------------------------------------------
# the functions

BACKENDS = ("numba", "torch")


def backend_for(device: torch.device | str, wanted: str | None = None) -> str:
    """Name of the backend that serves ``device``: numba on the CPU, torch elsewhere, or the one asked for.

    Raises:
        KernelError: a backend that does not exist or does not serve the device.
    """
    kind = torch.device(device).type
    if wanted is None:
        return "numba" if kind == "cpu" else "torch"
    if wanted not in BACKENDS:
        raise KernelError(f"unknown backend {wanted!r}, expected one of {', '.join(BACKENDS)}")
    if wanted == "numba" and kind != "cpu":
        raise KernelError(f"backend numba serves the cpu, not {kind}: leave the backend out or choose torch")
    return wanted


def _matrix(name: str, tensor: torch.Tensor) -> tuple[int, int]:
    if tensor.ndim != 2:
        raise KernelError(f"{name} is {tensor.dtype} {tuple(tensor.shape)}, expected a matrix")
    rows, columns = tensor.shape
    return rows, columns


def _check(name: str, tensor: torch.Tensor, dtype: torch.dtype, shape: tuple[int, ...], device: torch.device) -> None:
    if tensor.dtype != dtype or tuple(tensor.shape) != shape:
        raise KernelError(f"{name} is {tensor.dtype} {tuple(tensor.shape)}, expected {dtype} {shape}")
    if tensor.device != device:
        raise KernelError(f"{name} is on {tensor.device}, expected {device} like the rest")


def _check_table(manifold: Manifold, device: torch.device) -> None:
    if manifold.values.device != device:
        raise KernelError(f"the manifold is on {manifold.values.device}, expected {device}: use manifold.to(...)")


def dequantize(
    indices: torch.Tensor,
    scale: torch.Tensor,
    manifold: Manifold,
    out: torch.Tensor | None = None,
    backend: str | None = None,
) -> torch.Tensor:
    """Weights ``manifold[index] * scale[row]``.

    Args:
        indices: int16 ``(out, in)``.
        scale: float32 ``(out,)``.
        manifold: on the same device.
        out: float32 ``(out, in)`` to write into; allocated where None.

    Returns:
        ``out``, float32 ``(out, in)``.
    """
    rows, columns = _matrix("indices", indices)
    device = indices.device
    _check("indices", indices, torch.int16, (rows, columns), device)
    _check("scale", scale, torch.float32, (rows,), device)
    _check_table(manifold, device)
    if out is None:
        out = torch.empty(rows, columns, dtype=torch.float32, device=device)
    _check("out", out, torch.float32, (rows, columns), device)
    if backend_for(device, backend) == "numba":
        arrays = (indices.numpy(), scale.detach().numpy(), manifold.values.numpy(), out.numpy())
        _run_rows(_dequantize_rows, rows, indices.numel(), *arrays)
    else:
        _dequantize_reference(indices, scale.detach(), manifold, out)
    return out


def row_scales(weights: torch.Tensor, headroom: float) -> torch.Tensor:
    """Scale of each row: ``headroom`` times its largest magnitude, so that this weight can still grow by that factor.

    A row of zeros takes the tensor's mean scale, so that it can learn in the units of its neighbours (1.0 where all
    rows are zero). Scales stay normal float32 numbers.

    Args:
        weights: floating ``(out, in)``.
        headroom: at least 1.

    Returns:
        float32 ``(out,)``, positive.

    Raises:
        KernelError: NaN or Inf among the weights, naming the first row.
    """
    if not headroom >= 1:
        raise KernelError(f"headroom is {headroom}, expected at least 1")
    if _matrix("weights", weights)[1] == 0:
        raise KernelError(f"weights have shape {tuple(weights.shape)}, expected at least one column")
    low, high = torch.aminmax(weights, dim=1)
    largest = torch.maximum(low.abs(), high.abs()).float()
    if not bool(torch.isfinite(largest).all()):
        row = int((~torch.isfinite(largest)).nonzero()[0])
        raise KernelError(f"row {row} has NaN or Inf weights; a conversion needs finite ones")
    alive = largest > 0
    stand_in = largest[alive].mean() if bool(alive.any()) else torch.tensor(1.0 / headroom)
    scale = torch.where(alive, largest, stand_in) * headroom
    return scale.clamp(torch.finfo(torch.float32).tiny, torch.finfo(torch.float32).max)


def snap(
    weights: torch.Tensor,
    scale: torch.Tensor,
    manifold: Manifold,
    out: torch.Tensor | None = None,
    backend: str | None = None,
) -> tuple[torch.Tensor, SnapReport]:
    """Nearest index of ``weights / scale[row]``; half-way goes to the smaller magnitude, beyond ±1 saturates.

    Args:
        weights: float32 ``(out, in)``, finite (the caller checks: NaN has no nearest entry).
        scale: float32 ``(out,)``, positive.
        out: int16 ``(out, in)`` to write into; allocated where None.

    Returns:
        The indices and what the snap lost.
    """
    rows, columns = _matrix("weights", weights)
    device = weights.device
    _check("weights", weights, torch.float32, (rows, columns), device)
    _check("scale", scale, torch.float32, (rows,), device)
    _check_table(manifold, device)
    if out is None:
        out = torch.empty(rows, columns, dtype=torch.int16, device=device)
    _check("out", out, torch.int16, (rows, columns), device)
    if backend_for(device, backend) == "numba":
        tables = (manifold.thresholds.numpy(), manifold.threshold_buckets.numpy(), manifold.values.numpy())
        parts: dict[int, np.ndarray] = {}

        def run(start: int, stop: int) -> None:
            sums = parts[start] = np.zeros(4)
            _snap_rows(weights.numpy(), scale.numpy(), *tables, out.numpy(), sums, start, stop)

        _run_rows(run, rows, weights.numel())
        # In the order of rows, not of completion: float sums depend on it.
        sums = np.sum([parts[start] for start in sorted(parts)], axis=0)
    else:
        sums = np.zeros(4)
        _snap_reference(weights, scale, manifold, out, sums)
    return out, SnapReport(weights.numel(), int(sums[0]), int(sums[1]), float(sums[2]), float(sums[3]))


def cast_votes(
    gradient: torch.Tensor,
    rows: torch.Tensor,
    yardstick: torch.Tensor,
    votes: torch.Tensor,
    row_squares: torch.Tensor,
    *,
    keys: tuple[int, int],
    limit: int,
    sign: int = 1,
    backend: str | None = None,
) -> None:
    """Turn a gradient into votes against it and add them to the buffer (module docstring, ``cast``).

    The same call with ``sign=-1`` takes exactly these votes back.

    Args:
        gradient: float32 ``(n, in)``, finite: whole rows of the tensor's gradient.
        rows: int64 ``(n,)``, each at most once: which rows of the tensor these are.
        yardstick: float32 ``(out,)``: votes per unit of gradient.
        votes: int16 ``(out, in)``, mutated.
        row_squares: int64 ``(out,)``, mutated.
        keys: from :func:`hash_keys`.
        limit: from :class:`VoteUnits`.
    """
    count, columns = _matrix("gradient", gradient)
    out_rows, _ = _matrix("votes", votes)
    device = gradient.device
    _check("gradient", gradient, torch.float32, (count, columns), device)
    _check("rows", rows, torch.int64, (count,), device)
    _check("yardstick", yardstick, torch.float32, (out_rows,), device)
    _check("votes", votes, torch.int16, (out_rows, columns), device)
    _check("row_squares", row_squares, torch.int64, (out_rows,), device)
    if columns > COLUMNS_MAX:
        raise KernelError(
            f"gradient has {columns} columns, expected at most {COLUMNS_MAX}: row statistics would overflow"
        )
    if not 1 <= limit <= INDEX_MAX // 2 or sign not in (1, -1):
        raise KernelError(f"limit is {limit} and sign {sign}, expected 1 to {INDEX_MAX // 2} and 1 or -1")
    if backend_for(device, backend) == "numba":
        if count and not (int(rows.min()) >= 0 and int(rows.max()) < out_rows):
            raise KernelError(f"rows run from {int(rows.min())} to {int(rows.max())}, expected 0 to {out_rows - 1}")
        arrays = (gradient.numpy(), rows.numpy(), yardstick.numpy(), votes.numpy(), row_squares.numpy())
        plain = (columns, np.uint32(keys[0]), np.uint32(keys[1]), limit, np.int32(sign))
        _run_rows(_cast_rows, count, gradient.numel(), *arrays, *plain)
    else:
        _cast_reference(gradient, rows, yardstick, votes, row_squares, keys, limit, sign)


def integer_strides(inverse_scale: torch.Tensor, rate: float, unit: int) -> torch.Tensor:
    """How far one vote moves a weight of each row, in the manifold's fixed point: ``rate / (unit * scale)``.

    Integers only: ``rate / unit`` becomes a 20-bit mantissa and a shift before it meets a tensor.

    Args:
        inverse_scale: int64 ``(out,)`` from :func:`inverse_scales`.
        rate: learning rate in units of weight per row RMS, at least 0.
        unit: from :class:`VoteUnits`.

    Returns:
        int64 ``(out,)``; at most 2^46, so that a full int16 buffer cannot overflow the move.
    """
    if not (rate >= 0 and math.isfinite(rate)):
        raise KernelError(f"learning rate is {rate}, expected a finite number of at least 0")
    if rate == 0:
        return torch.zeros_like(inverse_scale)
    mantissa, exponent = math.frexp(rate / unit)
    shift = _INVERSE_BITS + 20 - exponent - FIXED_BITS
    product = inverse_scale * round(mantissa * 2**20)
    if shift >= 0:
        # Rounded to nearest; a shift beyond 62 bits leaves nothing.
        product = torch.zeros_like(product) if shift > 62 else (product + (1 << shift >> 1)) >> shift
    else:
        room = min(-shift, 46)
        product = product.clamp(max=1 << 46 - room) << room
    return product.clamp(max=1 << 46)


_INVERSE_BITS = 20


def inverse_scales(scale: torch.Tensor) -> torch.Tensor:
    """``2^20 / scale`` as int64 ``(out,)``, at most 2^42: computed once for a layer, so that moves need no division."""
    return (2.0**_INVERSE_BITS / scale.double()).round().clamp(1, 2.0**42).long()


def apply_votes(
    indices: torch.Tensor,
    votes: torch.Tensor,
    stride: torch.Tensor,
    manifold: Manifold,
    *,
    keys: tuple[int, int, int, int],
    decay: int,
    carry: int,
    backend: str | None = None,
) -> tuple[int, int]:
    """Move every weight by its votes and let the votes fade (module docstring, ``apply``). Integer operations only.

    Args:
        indices: int16 ``(out, in)``, mutated.
        votes: int16 ``(out, in)``, mutated.
        stride: int64 ``(out,)`` from :func:`integer_strides`.
        keys: two pairs from :func:`hash_keys`: for the draw between neighbours and for the rounding of the decay.
        decay: β as a multiple of 2^-16, 0 to 65536.
        carry: from :class:`VoteUnits`.

    Returns:
        Number of flips, and the summed distance aimed at by the flipped weights in units of 2^-40 of their row's scale.
    """
    rows, columns = _matrix("indices", indices)
    device = indices.device
    _check("indices", indices, torch.int16, (rows, columns), device)
    _check("votes", votes, torch.int16, (rows, columns), device)
    _check("stride", stride, torch.int64, (rows,), device)
    _check_table(manifold, device)
    if not 0 <= decay <= 65536:
        raise KernelError(f"decay is {decay}, expected 0 to 65536")
    if backend_for(device, backend) == "torch":
        return _apply_reference(indices, votes, stride, manifold, keys, decay, carry)
    tables = (manifold.fixed.numpy(), manifold.fixed_buckets.numpy())
    arrays = (indices.numpy(), votes.numpy(), stride.numpy())
    key_array = np.array(keys, dtype=np.uint32)
    parts: list[np.ndarray] = []

    def run(start: int, stop: int) -> None:
        counts = np.zeros(2, dtype=np.int64)
        parts.append(counts)
        _apply_rows(*arrays, *tables, columns, key_array, decay, carry, counts, start, stop)

    _run_rows(run, rows, indices.numel())
    flips, travel = np.sum(parts, axis=0)
    return int(flips), int(travel)


assert BUCKET_BITS == 15 and FIXED_BITS == 40 and STAT_SHIFT == 6, "the compiled kernels spell these two out"

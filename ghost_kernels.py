"""Every hot operation on indices and votes, as functions on tensors: snap, dequantize, cast votes, apply votes.

Three backends behind one signature, with the same bits: ``torch`` (the reference: plain tensor operations on any
device, worked in slices), ``numba`` (the CPU's: one fused pass per operation, a weight is read and written once) and
``cuda`` (the same for NVIDIA cards: ``ghost_kernels_cuda``, all but the snap, which is no part of a step).
``backend_for`` chooses by device and says which; nothing falls back in silence.

The rule ``momentum`` in symbols (``vote_rules`` has the others). K micro-batches a step, g the gradient of one
micro-batch's loss, SR unbiased stochastic rounding, U the votes per row RMS (``VoteUnits.unit``):

    cast   f = rint(2^16 · yardstick[row] · g)        with yardstick = (1 - β) U / (K · rms[row])
           votes -= (f + r) >> 16                     r uniform in [0, 2^16): E[vote] is exactly f / 2^16
           row_squares[row] += Σ f^2                  how large a micro-batch's gradient is, and
           row_sketch[row]  += Σ ±f                   how large their sum is: signs by the element's hash, the same in
                                                      all micro-batches, so E[row_sketch^2] = Σ (Σ_k f_k)^2, the
                                                      squared norm of a sum that is never formed (Alon, Matias and
                                                      Szegedy 1996)
    apply  target = value[index] + stride[row] · votes, in fixed point with 40 fractional bits, clipped to ±1
           index  = one of the two entries around target, drawn so that its expectation is target
           votes  = SR(β · votes)

Casting reads a float gradient and is the last place where a float occurs: what applies votes is integers from end to
end, in both backends. Randomness is a hash of (two 32-bit keys, the element's position in the whole tensor); keys come
from (seed, step, tensor), so no bit depends on slices, threads, device or the order of micro-batches.

A buffer never wraps and never saturates in the middle of a step, which would make the order of micro-batches matter.
A quarter of its range belongs to what is carried over, the rest to the step's new votes, and the K micro-batches of a
step share that like this: an element draws one random number a step, h, and micro-batch k rounds with
r = (h + k · s) mod 2^16, s = 2^16 / K. Each r is uniform, so each vote is unbiased; together they are spread evenly
(systematic sampling), so of K gradients clipped at B/K votes never more than B can round up, however small B/K is. So
even a six-bit buffer holds at any K, and the rounding noise of K similar votes is that of one.

Rejected: normalising a micro-batch by its own gradient's RMS (a row that sees only noise would vote as loud as one with
signal); float noise from a generator (its bits depend on device and order); numba's own thread pool (not safe to enter
from the autograd thread beside the main one: a plain pool of threads over rows is, since the kernels release the GIL).
"""

from __future__ import annotations

import functools
import itertools
import math
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import llvmlite.ir
import numba
import numpy as np
import torch

import ghost_kernels_cuda as cuda_kernels
from manifolds import BUCKET_BITS, FIXED_BITS, Manifold

SLICE_ELEMENTS = 1 << 20
"""The torch backend works on at most about this many elements at a time, so no full-size temporary exists."""
COLUMNS_MAX = 1 << 15
"""Widest row whose statistics cannot overflow 64 bits in a step, however loud its votes are."""
UNITS = {16: 512, 8: 16, 6: 4}
"""Votes in one row RMS, by the width of the buffer."""
SLOTS_MAX = 1024
"""Most uses of a grid in one step."""
DRAW_BITS = 28
"""Bits of the draw between two neighbours."""
WHISPER_BITS = 12
"""Fractional bits of a gradient in units of its tensor's RMS, where the rules of whisper votes compare it."""
WHISPER_LIMIT = 128
"""Largest such gradient; louder ones are cut."""
_MASK = 0xFFFFFFFF
_ONE = 1 << FIXED_BITS


class KernelError(ValueError):
    """Arguments of the wrong dtype, shape or device."""


@dataclass(frozen=True)
class VoteUnits:
    """What the integers of a vote buffer mean, and how a step's votes share its range (module docstring).

    Attributes:
        unit: votes in one row RMS of the accumulated, averaged gradient.
        slots: uses of the grid in one step.
        limit: largest magnitude of a single expected vote, as a multiple of 2^-16.
        wide: largest magnitude that enters the row statistics, as a multiple of 2^-16. Were they taken of clipped
            votes, a row that is clipped would look quieter, be clipped more, and drift away.
        spacing: what the draws of two neighbouring slots differ by, of 2^16; a slot is one use in one micro-batch.
        carry: largest magnitude that a buffer keeps from one step to the next.
        stat_shift: bits by which f is rounded before it is squared for the row statistics.
    """

    unit: int
    slots: int
    limit: int
    wide: int
    spacing: int
    carry: int
    stat_shift: int

    def offset(self, slot: int) -> int:
        """What a slot adds to an element's draw, of 2^16."""
        return slot * self.spacing

    @staticmethod
    @functools.lru_cache(maxsize=256)
    def for_buffer(bits: int, micro_batches: int, uses: int = 1) -> VoteUnits:
        """Units of a buffer of 6, 8 or 16 bits in a step of so many micro-batches, each using the grid ``uses`` times.

        Raises:
            KernelError: another width, or more micro-batches than the draws can be spread over.
        """
        if bits not in UNITS:
            raise KernelError(f"a vote buffer has {bits} bits, expected one of {', '.join(map(str, UNITS))}")
        slots = micro_batches * uses
        if not 1 <= slots <= SLOTS_MAX:
            raise KernelError(f"micro_batches is {micro_batches}, expected 1 to {SLOTS_MAX // uses}")
        half = 1 << bits - 1
        budget = half * 3 // 4
        spacing = 65536 // slots
        # Both stay well inside 32-bit integers.
        limit = min(budget * spacing, 1 << 30)
        wide = min(limit << 6, 1 << 30)
        # (wide >> shift)^2 over a step's slots and a row's columns stays below 2^62.
        shift = max(0, math.ceil((math.log2(wide * wide * slots * COLUMNS_MAX) - 62) / 2))
        return VoteUnits(UNITS[bits], slots, limit, wide, spacing, half - 1 - budget, shift)


@dataclass(frozen=True)
class SnapReport:
    """What one snap lost: sums in float64, counts of elements."""

    elements: int
    zeros: int
    saturated: int
    signal: float
    noise: float

    @staticmethod
    def total(parts: Sequence[SnapReport]) -> SnapReport:
        """The report of all parts together."""
        return SnapReport(
            elements=sum(p.elements for p in parts),
            zeros=sum(p.zeros for p in parts),
            saturated=sum(p.saturated for p in parts),
            signal=sum(p.signal for p in parts),
            noise=sum(p.noise for p in parts),
        )

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


_STRIDE = np.uint32(0x9E3779B1)


@numba.njit(inline="always")
def _scramble(x, key1):
    """The hash of an element from ``position * _STRIDE + key0``; along a row that sum needs an addition and no product,
    the dearest of a vector's integer operations."""
    # numba widens uint32 products to 64 bits: every step is cut back.
    x = np.uint32(x ^ (x >> np.uint32(16)))
    x = np.uint32(np.uint32(x * np.uint32(0x85EBCA6B)) ^ key1)
    x = np.uint32(x ^ (x >> np.uint32(13)))
    x = np.uint32(x * np.uint32(0xC2B2AE35))
    return np.uint32(x ^ (x >> np.uint32(16)))


@numba.njit(inline="always")
def _hash(position, key0, key1):
    return _scramble(np.uint32(np.uint32(np.uint32(position) * _STRIDE) + key0), key1)


def as_float(number):
    """A float32 as it is, or one from the bits of a bfloat16; for compiled code only."""
    raise NotImplementedError


@numba.extending.overload(as_float, inline="always")
def _as_float_typed(number):
    if isinstance(number, numba.types.Float):
        return lambda number: number
    return lambda number: np.uint32(np.uint32(number) << np.uint32(16)).view(np.float32)


def _prefetch_typed(typing_context, array, position):
    def code(context, builder, signature, arguments):
        data = context.make_array(signature.args[0])(context, builder, arguments[0]).data
        place = builder.bitcast(builder.gep(data, [arguments[1]]), numba.core.cgutils.voidptr_t)
        number = llvmlite.ir.IntType(32)
        kind = llvmlite.ir.FunctionType(llvmlite.ir.VoidType(), [place.type, number, number, number])
        fetch = builder.module.declare_intrinsic("llvm.prefetch", [place.type], kind)
        # To be read, kept in all caches, data.
        builder.call(fetch, [place, number(0), number(3), number(1)])
        return context.get_dummy_value()

    return numba.types.void(array, position), code


_prefetch: Callable[..., None] = numba.extending.intrinsic(_prefetch_typed)
"""``_prefetch(array, position)`` has the cache line of an element of a contiguous array fetched; for compiled code."""

_LINE = 32
"""int16 in a cache line."""
_AHEAD = 2048
"""How many elements ahead lines are fetched: weights come from memory once a pass, and a loop that looks every one of
them up in a table reaches too little of what comes next to keep memory busy. A third of a lookup's time."""


# Arrays are indexed by unsigned numbers: with signed ones numba asks every time whether they count from the end.
_at = np.uintp


@numba.njit(nogil=True, cache=True, error_model="numpy")
def _dequantize_rows(indices, scale, values, out, start, stop):
    columns = indices.shape[1]
    whole = columns // _LINE * _LINE
    for i in range(start, stop):
        s = scale[i]
        for b in range(0, whole, _LINE):
            _prefetch(indices, i * columns + b + _AHEAD)
            for j in range(_at(b), _at(b) + _at(_LINE)):
                out[i, j] = values[_at(np.uint16(indices[i, j]) ^ np.uint16(0x8000))] * s
        for j in range(whole, columns):
            # The sign bit turned over is what adding 32768 does to 16 bits.
            out[i, j] = values[_at(np.uint16(indices[i, j]) ^ np.uint16(0x8000))] * s


@numba.njit(nogil=True, cache=True, error_model="numpy")
def _dequantize_rows_bfloat16(indices, scale, values, out, start, stop):
    # The bits of bfloat16 are the upper half of float32's, rounded to even; weights are finite.
    row = np.empty(indices.shape[1], np.float32)
    bits = row.view(np.uint32)
    columns = indices.shape[1]
    whole = columns // _LINE * _LINE
    for i in range(start, stop):
        s = scale[i]
        # Unrolled because its length is fixed: with a fetch in it, a loop of another kind is not.
        for b in range(0, whole, _LINE):
            _prefetch(indices, i * columns + b + _AHEAD)
            for j in range(_at(b), _at(b) + _at(_LINE)):
                row[j] = values[_at(np.uint16(indices[i, j]) ^ np.uint16(0x8000))] * s
        for j in range(whole, columns):
            row[j] = values[_at(np.uint16(indices[i, j]) ^ np.uint16(0x8000))] * s
        for j in range(columns):
            odd = np.uint32((bits[j] >> np.uint32(16)) & np.uint32(1))
            out[i, j] = np.uint16(np.uint32(np.uint32(bits[j] + np.uint32(0x7FFF)) + odd) >> np.uint32(16))


# Sums of squares may be added up in any order, so that they vectorise; nothing else here is a sum.
@numba.njit(nogil=True, cache=True, error_model="numpy", fastmath={"reassoc"})
def _snap_rows(weights, scale, thresholds, buckets, values, vote_bits, out, sums, start, stop):
    # Three passes over a row in the cache: the outer two vectorise, and the middle one, all lookups, has no branch
    # that a processor guesses wrong. Two comparisons settle 98% of weights; the search below is for those near zero,
    # where a bucket holds many levels. No array is indexed by a value that was not brought into [0, 1] first: NaN
    # saturates.
    columns = weights.shape[1]
    half = values[32768:]
    sizes = np.empty(columns, np.float32)
    words = np.empty(columns, np.uint32)
    zeros = 0
    saturated = 0
    signal = 0.0
    noise = 0.0
    for i in range(start, stop):
        s = scale[i]
        for j in range(columns):
            x = abs(weights[i, j] / s)
            inside = x <= np.float32(1.0)
            saturated += 0 if inside else 1
            x = x if inside else np.float32(1.0)
            sizes[j] = x
            words[j] = np.uint32(np.int32(x * np.float32(32768.0)))
        for j in range(columns):
            x = sizes[j]
            bucket = _at(words[j])
            low = np.uint32(buckets[bucket])
            low += np.uint32(thresholds[_at(low) + _at(1)] <= x)
            low += np.uint32(thresholds[_at(low) + _at(1)] <= x)
            if thresholds[_at(low) + _at(1)] <= x:
                high = np.uint32(buckets[bucket + _at(1)])
                while low < high:
                    middle = np.uint32((low + high + np.uint32(1)) >> np.uint32(1))
                    if thresholds[_at(middle)] <= x:
                        low = middle
                    else:
                        high = np.uint32(middle - np.uint32(1))
            word = np.uint32(low << vote_bits)
            words[j] = word
            sizes[j] = half[_at(word)]
        for j in range(columns):
            w = weights[i, j]
            signless = np.int32(words[j])
            zeros += 1 if signless == 0 else 0
            out[i, j] = signless if w >= np.float32(0.0) else -signless
            error = np.float64(abs(w)) - np.float64(sizes[j] * s)
            noise += error * error
            signal += np.float64(w) * np.float64(w)
    sums[0] += zeros
    sums[1] += saturated
    sums[2] += signal
    sums[3] += noise


@numba.njit(nogil=True, cache=True)
def _all_below(rows, count):
    inside = True
    for row in rows:
        inside &= 0 <= row < count
    return inside


@numba.njit(nogil=True, cache=True, error_model="numpy")
def _cast_rows(
    gradient,
    rows,
    yardstick,
    votes,
    squares,
    sketch,
    columns,
    key0,
    key1,
    offset,
    limit,
    wide,
    shift,
    sign,
    start,
    stop,
):
    top = np.float32(wide)
    half = np.int32(np.int32(np.int32(1) << shift) >> np.int32(1))
    # Signs are changed by turning bits over, -v = ~v + 1.
    turn = np.int32(np.int32(sign) >> np.int32(31))
    for k in range(start, stop):
        i = rows[k]
        y = yardstick[i]
        x = np.uint32(np.uint32(np.uint32(i * columns) * _STRIDE) + key0)
        total = np.int64(0)
        signed = np.int64(0)
        for j in range(columns):
            # Every sum of 32-bit numbers is cut back at once: numba widens it to 64 bits, half as many a register.
            # 2^16 must not meet the yardstick first: its product may be infinite where the gradient's is not.
            t = np.float32(np.float32(as_float(gradient[k, j]) * y) * np.float32(65536.0))
            f = np.int32(np.rint(min(max(t, -top), top)))
            h = _scramble(x, key1)
            x = np.uint32(x + _STRIDE)
            r = np.int32(np.uint32(h + offset) & np.uint32(0xFFFF))
            v = np.int32(np.int32(min(max(f, -limit), limit) + r) >> np.int32(16))
            votes[i, j] -= np.int32(np.int32(v ^ turn) - turn)
            q = np.int64(np.int32(np.int32(f + half) >> shift))
            total += q * q
            flip = np.int32(np.int32(h) >> np.int32(31))
            signed += np.int64(np.int32(np.int32(f ^ flip) - flip))
        squares[i] += total * sign
        sketch[i] += signed * sign


@numba.njit(nogil=True, cache=True, error_model="numpy")
def _whisper_rows(gradient, rows, yardstick, gate, votes, sizes, squares, sign, start, stop):
    one = np.float32(1 << WHISPER_BITS)
    top = np.float32(WHISPER_LIMIT << WHISPER_BITS)
    for k in range(start, stop):
        i = rows[k]
        y = yardstick[i]
        total = np.int64(0)
        squared = np.int64(0)
        for j in range(gradient.shape[1]):
            t = gradient[k, j] * y * one
            f = np.int32(np.rint(min(max(t, -top), top)))
            size = abs(f)
            if size > gate:
                votes[i, j] -= sign if f > 0 else -sign
            total += size
            squared += np.int64(size) * np.int64(size)
        sizes[i] += total * sign
        squares[i] += squared * sign


@numba.njit(inline="always")
def _draws(out, base, key0, key1):
    """The hashes of a row's elements; apart from what uses them, because only so do they vectorise."""
    for j in range(len(out)):
        out[j] = _hash(base + np.uint32(j), key0, key1)


@numba.njit(inline="always")
def _move(level, push, shrink, fixed, buckets, draw):
    """The level that a weight moves to, how far it was sent, and whether ±1 cut it short."""
    one = np.int64(1) << np.int64(40)
    top = np.int64(len(fixed) - 1)
    size = fixed[_at(np.int64(min(abs(level), top)))]
    size -= (size * shrink) >> np.int64(32)
    start = -size if level < 0 else size
    wanted = start + push
    target = min(max(wanted, -one), one)
    size = abs(target)
    bucket = _at(size >> np.int64(25))
    low = np.int64(buckets[bucket])
    high = np.int64(buckets[bucket + _at(1)])
    # As in the snap: one comparison without a branch settles nearly all, since a bucket seldom holds two levels.
    low += (low < high) & (fixed[_at(np.int64(min(low + 1, top)))] <= size)
    if low < high and fixed[_at(low + 1)] <= size:
        while low < high:
            middle = (low + high + 1) >> 1
            if fixed[_at(middle)] <= size:
                low = middle
            else:
                high = middle - 1
    rest = size - fixed[_at(low)]
    gap = fixed[_at(np.int64(min(low + 1, top)))] - fixed[_at(low)]
    new = low + (np.int64(draw >> np.uint32(4)) * gap < rest << np.int64(28))
    return -new if target < 0 else new, abs(target - start), wanted != target


@numba.njit(inline="always")
def _fade(votes, decay, carry, draw):
    kept = (votes * decay + np.int64(draw & np.uint32(0xFFFF))) >> np.int64(16)
    return min(max(kept, -carry), carry)


@numba.njit(nogil=True, cache=True, error_model="numpy")
def _apply_rows(indices, votes, stride, fixed, buckets, columns, keys, decay, carry, shrink, counts, start, stop):
    flips = np.int64(0)
    travel = np.int64(0)
    clipped = np.int64(0)
    draws = np.empty(columns, np.uint32)
    for i in range(start, stop):
        step = stride[i]
        base = np.uint32(i * columns)
        _draws(draws, base, keys[0], keys[1])
        for j in range(columns):
            m = np.int64(votes[i, j])
            if m == 0 and shrink == 0:
                continue
            old = np.int64(indices[i, j])
            new, way, cut = _move(old, m * step, shrink, fixed, buckets, draws[j])
            moved = new != old
            clipped += cut
            flips += moved
            travel += way if moved else 0
            indices[i, j] = new
        _draws(draws, base, keys[2], keys[3])
        for j in range(columns):
            m = np.int64(votes[i, j])
            # Nothing fades to nothing whatever is drawn: decay is at most 2^16 and the draw below that.
            votes[i, j] = _fade(m, decay, carry, draws[j]) if m != 0 else 0
    counts[0] += flips
    counts[1] += travel
    counts[2] += clipped


@numba.njit(nogil=True, cache=True, error_model="numpy")
def _apply_words(words, bits, stride, fixed, buckets, columns, keys, decay, carry, shrink, counts, start, stop):
    half = (np.int64(1) << bits) >> np.int64(1)
    flips = np.int64(0)
    travel = np.int64(0)
    clipped = np.int64(0)
    draws = np.empty(columns, np.uint32)
    fades = np.empty(columns, np.uint32)
    for i in range(start, stop):
        step = stride[i]
        base = np.uint32(i * columns)
        _draws(draws, base, keys[0], keys[1])
        _draws(fades, base, keys[2], keys[3])
        for j in range(columns):
            word = np.int64(words[i, j])
            old = (word + half) >> bits
            m = word - (old << bits)
            if m == 0 and shrink == 0:
                continue
            new, way, cut = _move(old, m * step, shrink, fixed, buckets, draws[j])
            moved = new != old
            clipped += cut
            flips += moved
            travel += way if moved else 0
            words[i, j] = (new << bits) + _fade(m, decay, carry, fades[j])
    counts[0] += flips
    counts[1] += travel
    counts[2] += clipped


@numba.njit(nogil=True, cache=True, error_model="numpy")
def _flip_rows(
    indices, votes, stride, fixed, columns, keys, threshold, jitter, chance, decay, carry, counts, start, stop
):
    top = np.int64(len(fixed) - 1)
    flips = np.int64(0)
    travel = np.int64(0)
    clipped = np.int64(0)
    for i in range(start, stop):
        step = stride[i]
        base = np.uint32(i * columns)
        for j in range(columns):
            m = np.int64(votes[i, j])
            if m == 0:
                continue
            position = base + np.uint32(j)
            first = _hash(position, keys[0], keys[1])
            second = _hash(position, keys[2], keys[3])
            noise = (np.int64(first & np.uint32(0xFFFF)) * (2 * jitter + 1)) >> np.int64(16)
            n = m + noise - jitter
            if n != 0 and abs(n) >= threshold and np.int64(first >> np.uint32(16)) < chance:
                old = np.int64(indices[i, j])
                way = (step + np.int64(second & np.uint32(0xFFFF))) >> np.int64(16)
                wanted = old + way if n > 0 else old - way
                new = min(max(wanted, -top), top)
                clipped += wanted != new
                if new != old:
                    flips += 1
                    size = fixed[min(abs(old), top)]
                    before = size if old >= 0 else -size
                    after = fixed[abs(new)] if new >= 0 else -fixed[abs(new)]
                    travel += abs(after - before)
                    indices[i, j] = new
                votes[i, j] = 0
            else:
                votes[i, j] = _fade(m, decay, carry, second >> np.uint32(16))
    counts[0] += flips
    counts[1] += travel
    counts[2] += clipped


_pool: ThreadPoolExecutor | None = None
_pool_size = 0


def run_rows(function: Callable[..., None], rows: int, elements: int, *arguments: object) -> None:
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
        out[part] = picked.mul_(scale[part, None])


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
        word = torch.where(w < 0, -low, low) << manifold.vote_bits
        out[part] = word.to(torch.int16)
        error = w.double() - (manifold.values[word + 32768] * scale[part, None]).double()
        sums[3] += error.square().sum().item()
        sums[2] += w.double().square().sum().item()


def _cast_reference(
    gradient: torch.Tensor,
    rows: torch.Tensor,
    yardstick: torch.Tensor,
    votes: torch.Tensor,
    squares: torch.Tensor,
    sketch: torch.Tensor,
    keys: tuple[int, int],
    offset: int,
    units: VoteUnits,
    sign: int,
) -> None:
    columns = gradient.shape[1]
    half = 1 << units.stat_shift >> 1
    for part in _row_slices(*gradient.shape):
        i = rows[part.start : part.stop]
        t = gradient[part.start : part.stop].float() * yardstick[i, None] * 65536.0
        f = torch.round(t.clamp_(-float(units.wide), float(units.wide))).to(torch.int64)
        h = _hash_reference(_positions(i, columns), *keys)
        r = (h + offset) & 0xFFFF
        votes[i] -= (((f.clamp(-units.limit, units.limit) + r) >> 16) * sign).to(votes.dtype)
        squares[i] += ((f + half) >> units.stat_shift).square().sum(1) * sign
        sketch[i] += torch.where(h >> 31 == 1, -f, f).sum(1) * sign


def _whisper_reference(
    gradient: torch.Tensor,
    rows: torch.Tensor,
    yardstick: torch.Tensor,
    gate: int,
    votes: torch.Tensor,
    sizes: torch.Tensor,
    squares: torch.Tensor,
    sign: int,
) -> None:
    top = float(WHISPER_LIMIT << WHISPER_BITS)
    for part in _row_slices(*gradient.shape):
        i = rows[part.start : part.stop]
        t = gradient[part.start : part.stop] * yardstick[i, None] * float(1 << WHISPER_BITS)
        f = torch.round(t.clamp_(-top, top)).to(torch.int64)
        size = f.abs()
        votes[i] -= (torch.where(size > gate, f.sign(), 0) * sign).to(votes.dtype)
        sizes[i] += size.sum(1) * sign
        squares[i] += size.square().sum(1) * sign


def _signed(levels: torch.Tensor, fixed: torch.Tensor) -> torch.Tensor:
    return fixed[levels.abs().clamp(max=len(fixed) - 1)] * levels.sign()


def _apply_reference(
    words: torch.Tensor,
    votes: torch.Tensor | None,
    stride: torch.Tensor,
    manifold: Manifold,
    keys: tuple[int, int, int, int],
    decay: int,
    carry: int,
    shrink: int,
) -> tuple[int, int, int]:
    columns = words.shape[1]
    fixed, bits = manifold.fixed, manifold.vote_bits
    flips = travel = clipped = 0
    for rows in _row_slices(*words.shape):
        part = slice(rows.start, rows.stop)
        old = manifold.levels(words[part]).long()
        m = words[part].long() - (old << bits) if votes is None else votes[part].long()
        size = fixed[old.abs().clamp(max=manifold.top)]
        size = size - (size * shrink >> 32)
        start = torch.where(old < 0, -size, size)
        wanted = start + m * stride[part, None]
        target = wanted.clamp(-_ONE, _ONE)
        size = target.abs()
        low = torch.bucketize(size, fixed, right=True) - 1
        rest = size - fixed[low]
        gap = fixed[(low + 1).clamp_(max=manifold.top)] - fixed[low]
        position = _positions(torch.arange(rows.start, rows.stop, device=words.device), columns)
        up = (_hash_reference(position, keys[0], keys[1]) >> 32 - DRAW_BITS) * gap < rest << DRAW_BITS
        new = (low + up.long()) * torch.where(target < 0, -1, 1)
        still = (m == 0) & (shrink == 0)
        new = torch.where(still, old, new)
        moved = new != old
        flips += int(moved.sum())
        travel += int(torch.where(moved, (target - start).abs(), 0).sum())
        clipped += int((~still & (wanted != target)).sum())
        r = _hash_reference(position, keys[2], keys[3]) & 0xFFFF
        kept = torch.where(m == 0, 0, ((m * decay + r) >> 16).clamp_(-carry, carry))
        if votes is None:
            words[part] = ((new << bits) + kept).to(torch.int16)
        else:
            words[part] = new.to(torch.int16)
            votes[part] = kept.to(votes.dtype)
    return flips, travel, clipped


def _flip_reference(
    indices: torch.Tensor,
    votes: torch.Tensor,
    stride: torch.Tensor,
    manifold: Manifold,
    keys: tuple[int, int, int, int],
    threshold: int,
    jitter: int,
    chance: int,
    decay: int,
    carry: int,
) -> tuple[int, int, int]:
    columns = indices.shape[1]
    flips = travel = clipped = 0
    for rows in _row_slices(*indices.shape):
        part = slice(rows.start, rows.stop)
        m, old = votes[part].long(), indices[part].long()
        position = _positions(torch.arange(rows.start, rows.stop, device=indices.device), columns)
        first = _hash_reference(position, keys[0], keys[1])
        second = _hash_reference(position, keys[2], keys[3])
        n = m + ((first & 0xFFFF) * (2 * jitter + 1) >> 16) - jitter
        through = (m != 0) & (n != 0) & (n.abs() >= threshold) & ((first >> 16) < chance)
        way = (stride[part, None] + (second & 0xFFFF)) >> 16
        wanted = torch.where(through, old + n.sign() * way, old)
        new = wanted.clamp(-manifold.top, manifold.top)
        flips += int((new != old).sum())
        clipped += int((new != wanted).sum())
        travel += int((_signed(new, manifold.fixed) - _signed(old, manifold.fixed)).abs().sum())
        indices[part] = new.to(torch.int16)
        kept = ((m * decay + (second >> 16)) >> 16).clamp_(-carry, carry)
        votes[part] = torch.where((m == 0) | through, 0, kept).to(votes.dtype)
    return flips, travel, clipped


# ---------------------------------------------------------------------------------------------------------------------
# the functions

BACKENDS = ("numba", "torch", "cuda")
SERVES = {"numba": ("cpu",), "cuda": ("cuda",)}
"""Kinds of devices that a backend serves; torch serves all."""
BUFFERS = (torch.int8, torch.int16)
"""Types of a vote buffer."""


def backend_for(device: torch.device | str, wanted: str | None = None) -> str:
    """Name of the backend that serves ``device``: numba on the CPU, cuda on a card that its kernels can be compiled
    for, torch elsewhere, or the one asked for.

    Raises:
        KernelError: a backend that does not exist or does not serve the device.
    """
    device = device if isinstance(device, torch.device) else torch.device(device)
    kind = device.type
    if wanted is None:
        if kind == "cpu":
            return "numba"
        return "cuda" if kind == "cuda" and cuda_kernels.available(device) else "torch"
    if wanted not in BACKENDS:
        raise KernelError(f"unknown backend {wanted!r}, expected one of {', '.join(BACKENDS)}")
    if wanted in SERVES and kind not in SERVES[wanted]:
        raise KernelError(
            f"backend {wanted} serves {SERVES[wanted][0]}, not {kind}: leave the backend out or choose torch"
        )
    return wanted


def _matrix(name: str, tensor: torch.Tensor) -> tuple[int, int]:
    if tensor.ndim != 2:
        raise KernelError(f"{name} is {tensor.dtype} {tuple(tensor.shape)}, expected a matrix")
    rows, columns = tensor.shape
    return rows, columns


def _check(name: str, tensor: torch.Tensor, dtype: torch.dtype, shape: tuple[int, ...], device: torch.device) -> None:
    if tensor.dtype != dtype or tensor.shape != shape:
        raise KernelError(f"{name} is {tensor.dtype} {tuple(tensor.shape)}, expected {dtype} {shape}")
    if tensor.device != device:
        raise KernelError(f"{name} is on {tensor.device}, expected {device} like the rest")


def _dense(tensor: torch.Tensor) -> torch.Tensor:
    """What a kernel that counts addresses itself may read."""
    return tensor if tensor.is_contiguous() else tensor.contiguous()


def _all_dense(*tensors: torch.Tensor | None) -> None:
    for tensor in tensors:
        if tensor is not None and not tensor.is_contiguous():
            raise KernelError(f"a tensor of strides {tensor.stride()} cannot be written to, expected a contiguous one")


def _read_counts(counts: torch.Tensor) -> tuple[int, int, int]:
    flips, travel, clipped = counts.tolist()
    return flips, travel, clipped


def _check_table(manifold: Manifold, device: torch.device) -> None:
    if manifold.values.device != device:
        raise KernelError(f"the manifold is on {manifold.values.device}, expected {device}: use manifold.to(...)")


def dequantize(
    indices: torch.Tensor,
    scale: torch.Tensor,
    manifold: Manifold,
    out: torch.Tensor | None = None,
    backend: str | None = None,
    *,
    dtype: torch.dtype = torch.float32,
) -> torch.Tensor:
    """Weights ``manifold[index] * scale[row]``, computed in float32 and rounded once.

    Args:
        indices: int16 ``(out, in)``.
        scale: float32 ``(out,)``, finite.
        manifold: on the same device.
        out: ``(out, in)`` of type ``dtype`` to write into; allocated where None.
        dtype: float32 or bfloat16.

    Returns:
        ``out``.
    """
    if dtype not in (torch.float32, torch.bfloat16):
        raise KernelError(f"dtype is {dtype}, expected torch.float32 or torch.bfloat16")
    rows, columns = _matrix("indices", indices)
    device = indices.device
    _check("indices", indices, torch.int16, (rows, columns), device)
    _check("scale", scale, torch.float32, (rows,), device)
    _check_table(manifold, device)
    if out is None:
        out = torch.empty(rows, columns, dtype=dtype, device=device)
    _check("out", out, dtype, (rows, columns), device)
    name = backend_for(device, backend)
    if name == "cuda":
        _all_dense(out)
        cuda_kernels.dequantize(_dense(indices), _dense(scale.detach()), manifold, out)
    elif name == "numba":
        arrays = (indices.numpy(), scale.detach().numpy(), manifold.values.numpy())
        if dtype == torch.float32:
            run_rows(_dequantize_rows, rows, indices.numel(), *arrays, out.numpy())
        else:
            run_rows(_dequantize_rows_bfloat16, rows, indices.numel(), *arrays, out.view(torch.uint16).numpy())
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
        bits = np.uint32(manifold.vote_bits)
        parts: dict[int, np.ndarray] = {}

        def run(start: int, stop: int) -> None:
            sums = parts[start] = np.zeros(4)
            _snap_rows(weights.numpy(), scale.numpy(), *tables, bits, out.numpy(), sums, start, stop)

        run_rows(run, rows, weights.numel())
        # In the order of rows, not of completion: float sums depend on it.
        sums = np.sum([parts[start] for start in sorted(parts)], axis=0)
    else:
        sums = np.zeros(4)
        _snap_reference(weights, scale, manifold, out, sums)
    return out, SnapReport(weights.numel(), int(sums[0]), int(sums[1]), float(sums[2]), float(sums[3]))


def _check_cast(
    gradient: torch.Tensor,
    rows: torch.Tensor,
    yardstick: torch.Tensor,
    votes: torch.Tensor,
    statistics: dict[str, torch.Tensor],
    sign: int,
    backend: str | None,
    floats: tuple[torch.dtype, ...] = (torch.float32,),
) -> str:
    """What the two ways to cast ask of their arguments; returns the backend."""
    count, columns = _matrix("gradient", gradient)
    out_rows, _ = _matrix("votes", votes)
    device = gradient.device
    _check("gradient", gradient, gradient.dtype if gradient.dtype in floats else floats[0], (count, columns), device)
    _check("rows", rows, torch.int64, (count,), device)
    _check("yardstick", yardstick, torch.float32, (out_rows,), device)
    _check("votes", votes, votes.dtype if votes.dtype in BUFFERS else torch.int16, (out_rows, columns), device)
    for name, tensor in statistics.items():
        _check(name, tensor, torch.int64, (out_rows,), device)
    if columns > COLUMNS_MAX:
        raise KernelError(
            f"gradient has {columns} columns, expected at most {COLUMNS_MAX}: row statistics would overflow"
        )
    if sign not in (1, -1):
        raise KernelError(f"sign is {sign}, expected 1 or -1")
    name = backend_for(device, backend)
    if name == "cuda":
        # That rows are in range is not looked at: it would wait for the device in the middle of a backward pass.
        _all_dense(votes, yardstick, *statistics.values())
    if name == "numba" and not _all_below(rows.numpy(), out_rows):
        raise KernelError(f"rows run from {int(rows.min())} to {int(rows.max())}, expected 0 to {out_rows - 1}")
    return name


def cast_votes(
    gradient: torch.Tensor,
    rows: torch.Tensor,
    yardstick: torch.Tensor,
    votes: torch.Tensor,
    row_squares: torch.Tensor,
    row_sketch: torch.Tensor,
    *,
    keys: tuple[int, int],
    slot: int,
    units: VoteUnits,
    sign: int = 1,
    backend: str | None = None,
    control: torch.Tensor | None = None,
    mark: torch.Tensor | None = None,
) -> None:
    """Turn a gradient into votes against it and add them to the buffer (module docstring, ``cast``).

    The same call with ``sign=-1`` takes exactly these votes back.

    Args:
        gradient: float32 or bfloat16 ``(n, in)``, finite: whole rows of the tensor's gradient.
        rows: int64 ``(n,)``, each at most once: which rows of the tensor these are.
        yardstick: float32 ``(out,)``: votes per unit of gradient.
        votes: int8 or int16 ``(out, in)``, mutated; words of a manifold with vote bits are such a buffer too.
        row_squares: int64 ``(out,)``, mutated: sums of squares, in units of 2^(stat_shift - 16) votes.
        row_sketch: int64 ``(out,)``, mutated: sums with random signs, in units of 2^-16 votes.
        keys: from :func:`hash_keys`, the same for all slots of a step.
        slot: number of this use in this micro-batch among those of the step, from 0.
        units: those of the buffer and the step.
        control: cuda only: int32 ``(4,)`` on the device, read when the kernel runs instead of keys, slot and sign: the
            two keys, what :meth:`VoteUnits.offset` gives, the sign. A recorded call can be replayed with others.
        mark: cuda only: int32 ``(1,)``, set to 1 where the gradient is not finite; such elements then cast nothing and
            count nothing, and a row below 0 is passed over. Without it the gradient must be finite.
    """
    statistics = {"row_squares": row_squares, "row_sketch": row_sketch}
    floats = (torch.float32, torch.bfloat16)
    name = _check_cast(gradient, rows, yardstick, votes, statistics, sign, backend, floats)
    if not 0 <= slot < units.slots:
        raise KernelError(f"slot is {slot}, expected 0 to {units.slots - 1}")
    offset = units.offset(slot)
    if name == "cuda":
        plain = {"limit": units.limit, "wide": units.wide, "shift": units.stat_shift, "sign": sign}
        tensors = (_dense(gradient), rows, yardstick, votes, row_squares, row_sketch)
        cuda_kernels.cast(*tensors, keys=keys, offset=offset, **plain, control=control, mark=mark)
    elif name == "numba":
        read = gradient if gradient.dtype == torch.float32 else gradient.view(torch.uint16)
        arrays = (read.numpy(), rows.numpy(), yardstick.numpy(), votes.numpy())
        sums = (row_squares.numpy(), row_sketch.numpy())
        plain = (np.uint32(keys[0]), np.uint32(keys[1]), np.uint32(offset), np.int32(units.limit), np.int32(units.wide))
        signs = (np.int32(units.stat_shift), np.int32(sign))
        run_rows(_cast_rows, len(rows), gradient.numel(), *arrays, *sums, gradient.shape[1], *plain, *signs)
    else:
        _cast_reference(gradient, rows, yardstick, votes, row_squares, row_sketch, keys, offset, units, sign)


def cast_whispers(
    gradient: torch.Tensor,
    rows: torch.Tensor,
    yardstick: torch.Tensor,
    votes: torch.Tensor,
    row_sizes: torch.Tensor,
    row_squares: torch.Tensor,
    *,
    gate: int,
    sign: int = 1,
    backend: str | None = None,
    mark: torch.Tensor | None = None,
) -> None:
    """One vote against the gradient's sign wherever it is larger than a gate; nothing elsewhere.

    Args:
        gradient: float32 ``(n, in)``, finite: whole rows of the tensor's gradient.
        rows: int64 ``(n,)``, each at most once.
        yardstick: float32 ``(out,)``: the reciprocal of the RMS in whose units the gate is given.
        votes: int8 or int16 ``(out, in)``, mutated.
        row_sizes: int64 ``(out,)``, mutated: sums of magnitudes with ``WHISPER_BITS`` fractional bits.
        row_squares: int64 ``(out,)``, mutated: sums of their squares.
        gate: a multiple of ``2**-WHISPER_BITS``; below 0 counts as 0, since nothing has no sign to vote against.
        mark: as in :func:`cast_votes`.
    """
    gate = min(max(gate, 0), 2**31 - 1)
    statistics = {"row_sizes": row_sizes, "row_squares": row_squares}
    name = _check_cast(gradient, rows, yardstick, votes, statistics, sign, backend)
    if name == "cuda":
        fixed = {"one": float(1 << WHISPER_BITS), "top": float(WHISPER_LIMIT << WHISPER_BITS), "sign": sign}
        tensors = (_dense(gradient), rows, yardstick, gate, votes, row_sizes, row_squares)
        cuda_kernels.whispers(*tensors, **fixed, mark=mark)
    elif name == "numba":
        arrays = (votes.numpy(), row_sizes.numpy(), row_squares.numpy(), np.int32(sign))
        read = (gradient.numpy(), rows.numpy(), yardstick.numpy(), np.int32(gate))
        run_rows(_whisper_rows, len(rows), gradient.numel(), *read, *arrays)
    else:
        _whisper_reference(gradient, rows, yardstick, gate, votes, row_sizes, row_squares, sign)


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


def _check_apply(indices: torch.Tensor, votes: torch.Tensor, stride: torch.Tensor, manifold: Manifold) -> None:
    rows, columns = _matrix("indices", indices)
    device = indices.device
    _check("indices", indices, torch.int16, (rows, columns), device)
    _check("votes", votes, votes.dtype if votes.dtype in BUFFERS else torch.int16, (rows, columns), device)
    _check("stride", stride, torch.int64, (rows,), device)
    _check_table(manifold, device)


def _count_rows(function: Callable[..., None], indices: torch.Tensor, *arguments: object) -> tuple[int, int, int]:
    """Run a row kernel that ends in (counts, start, stop) and add the counts up."""
    parts: list[np.ndarray] = []

    def run(start: int, stop: int) -> None:
        counts = np.zeros(3, dtype=np.int64)
        parts.append(counts)
        function(*arguments, counts, start, stop)

    run_rows(run, len(indices), indices.numel())
    flips, travel, clipped = np.sum(parts, axis=0)
    return int(flips), int(travel), int(clipped)


def apply_votes(
    indices: torch.Tensor,
    votes: torch.Tensor | None,
    stride: torch.Tensor,
    manifold: Manifold,
    *,
    keys: tuple[int, int, int, int],
    decay: int,
    carry: int,
    shrink: int = 0,
    backend: str | None = None,
) -> tuple[int, int, int]:
    """Move every weight by its votes and let the votes fade (module docstring, ``apply``). Integer operations only.

    Args:
        indices: int16 ``(out, in)``, mutated.
        votes: int8 or int16 ``(out, in)``, mutated; None where the words hold their own votes.
        stride: int64 ``(out,)`` from :func:`integer_strides`.
        keys: two pairs from :func:`hash_keys`: for the draw between neighbours and for the rounding of the decay.
        decay: β as a multiple of 2^-16, 0 to 65536.
        carry: from :class:`VoteUnits`.
        shrink: weight decay of this step as a multiple of 2^-32, at most 2^22: every weight loses this share of itself.

    Returns:
        Number of flips; the summed distance aimed at by the flipped weights in units of 2^-40 of their row's scale; and
        how many weights were stopped by the edge of their row's range.
    """
    _check_apply(indices, indices if votes is None else votes, stride, manifold)
    if (votes is None) != (manifold.vote_bits > 0):
        raise KernelError(f"{manifold.name} has {manifold.vote_bits} vote bits: expected a buffer without, none with")
    if not 0 <= decay <= 65536:
        raise KernelError(f"decay is {decay}, expected 0 to 65536")
    if not 0 <= shrink <= 1 << 22:
        raise KernelError(f"shrink is {shrink}, expected 0 to {1 << 22}: a share of 2^-10 in a step")
    name = backend_for(indices.device, backend)
    if name == "torch":
        return _apply_reference(indices, votes, stride, manifold, keys, decay, carry, shrink)
    if name == "cuda":
        _all_dense(indices, votes)
        return _read_counts(cuda_kernels.apply(indices, votes, _dense(stride), manifold, keys, decay, carry, shrink))
    tables = (manifold.fixed.numpy(), manifold.fixed_buckets.numpy(), indices.shape[1])
    plain = (np.array(keys, dtype=np.uint32), np.int64(decay), np.int64(carry), np.int64(shrink))
    if votes is None:
        bits = np.int64(manifold.vote_bits)
        return _count_rows(_apply_words, indices, indices.numpy(), bits, stride.numpy(), *tables, *plain)
    return _count_rows(_apply_rows, indices, indices.numpy(), votes.numpy(), stride.numpy(), *tables, *plain)


def flip_by_majority(
    indices: torch.Tensor,
    votes: torch.Tensor,
    stride: torch.Tensor,
    manifold: Manifold,
    *,
    keys: tuple[int, int, int, int],
    threshold: int,
    jitter: int = 0,
    chance: int = 65536,
    decay: int,
    carry: int,
    backend: str | None = None,
) -> tuple[int, int, int]:
    """Move the weights whose votes break through by a number of indices; the others' votes fade. Integers only.

    A weight without votes stays. Another adds an integer noise to its votes, uniform from -jitter to jitter and not
    kept; if the sum reaches the threshold and a draw is below the chance, its index moves by the row's stride in the
    sum's direction, and its votes begin again from nothing.

    Args:
        indices: int16 ``(out, in)``, mutated.
        votes: int8 or int16 ``(out, in)``, mutated.
        stride: int64 ``(out,)``: indices per flip as a multiple of 2^-16; rounded by a draw.
        keys: two pairs from :func:`hash_keys`: for noise and chance, and for the two roundings.
        threshold: at least 1.
        chance: a multiple of 2^-16, 0 to 65536.
        decay: as in :func:`apply_votes`.

    Returns:
        As :func:`apply_votes`.
    """
    _check_apply(indices, votes, stride, manifold)
    if manifold.vote_bits:
        raise KernelError(f"{manifold.name} keeps its votes in the indices: this rule needs a table of 65,536 entries")
    if threshold < 1 or jitter < 0 or not 0 <= chance <= 65536 or not 0 <= decay <= 65536:
        raise KernelError(
            f"threshold is {threshold}, jitter {jitter}, chance {chance}, decay {decay}, "
            "expected at least 1, at least 0, and 0 to 65536"
        )
    name = backend_for(indices.device, backend)
    if name == "torch":
        return _flip_reference(indices, votes, stride, manifold, keys, threshold, jitter, chance, decay, carry)
    if name == "cuda":
        _all_dense(indices, votes)
        plain_numbers = (threshold, jitter, chance, decay, carry)
        return _read_counts(cuda_kernels.flip(indices, votes, _dense(stride), manifold, keys, *plain_numbers))
    arrays = (indices.numpy(), votes.numpy(), stride.numpy(), manifold.fixed.numpy(), indices.shape[1])
    plain = (np.int64(x) for x in (threshold, jitter, chance, decay, carry))
    return _count_rows(_flip_rows, indices, *arrays, np.array(keys, dtype=np.uint32), *plain)


assert BUCKET_BITS == 15 and FIXED_BITS == 40 and DRAW_BITS == 28, "the compiled kernels spell these out"

"""The numba backend of ``ghost_kernels``: one fused pass per operation over rows of numpy arrays, on any CPU.

Compiled once per machine, kept in the cache folder beside this file. Each is a row kernel, dealt out to threads by
``row_threads``. What operations mean, and what their arguments are, ``ghost_kernels`` says.
"""

from __future__ import annotations

from collections.abc import Callable

import llvmlite.ir
import numba
import numpy as np

from manifolds import BUCKET_BITS, FIXED_BITS
from row_threads import compiled, deal, team_of
from vote_units import DRAW_BITS, WHISPER_BITS, WHISPER_LIMIT

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


@compiled()
def dequantize_rows(indices, scale, values, out, start, stop):
    """Weights of rows ``start`` to ``stop`` into float32 ``out``; ``values`` is the whole table."""
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


@team_of(dequantize_rows)
def _dequantize_rows_team(rows, pieces, threads, *arguments):
    return deal(dequantize_rows, arguments, rows, pieces, threads)


@compiled()
def dequantize_rows_bfloat16(indices, scale, values, out, start, stop):
    """The same into the bits of bfloat16, uint16, rounded once to even."""
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


@team_of(dequantize_rows_bfloat16)
def _dequantize_rows_bfloat16_team(rows, pieces, threads, *arguments):
    return deal(dequantize_rows_bfloat16, arguments, rows, pieces, threads)


# Sums of squares may be added up in any order, so that they vectorise; nothing else here is a sum.
@compiled(fastmath={"reassoc"})
def snap_rows(weights, scale, thresholds, buckets, values, vote_bits, out, sums, start, stop):
    """Nearest words of rows into int16 ``out``; zeros, saturated, signal, noise to float64 ``sums`` ``(out, 4)``."""
    # Three passes over a row in the cache: the outer two vectorise, and the middle one, all lookups, has no branch
    # that a processor guesses wrong. Two comparisons settle 98% of weights; the search below is for those near zero,
    # where a bucket holds many levels. No array is indexed by a value that was not brought into [0, 1] first: NaN
    # saturates.
    columns = weights.shape[1]
    half = values[32768:]
    sizes = np.empty(columns, np.float32)
    words = np.empty(columns, np.uint32)
    for i in range(start, stop):
        zeros = 0
        saturated = 0
        signal = 0.0
        noise = 0.0
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
        sums[i, 0] = zeros
        sums[i, 1] = saturated
        sums[i, 2] = signal
        sums[i, 3] = noise


@team_of(snap_rows)
def _snap_rows_team(rows, pieces, threads, *arguments):
    return deal(snap_rows, arguments, rows, pieces, threads)


@compiled()
def all_below(rows, count):
    """Whether all row numbers, int64 ``(n,)``, lie in [0, count)."""
    inside = True
    for row in rows:
        inside &= 0 <= row < count
    return inside


@compiled()
def cast_rows(
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
    """Votes of gradient rows, float32 or the bits of bfloat16, into ``votes``; adds to both row sums, int64."""
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


@team_of(cast_rows)
def _cast_rows_team(rows, pieces, threads, *arguments):
    return deal(cast_rows, arguments, rows, pieces, threads)


@compiled()
def whisper_rows(gradient, rows, yardstick, gate, votes, sizes, squares, sign, start, stop):
    """One vote against the sign of what is louder than the gate, into ``votes``; adds to both row sums, int64."""
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


@team_of(whisper_rows)
def _whisper_rows_team(rows, pieces, threads, *arguments):
    return deal(whisper_rows, arguments, rows, pieces, threads)


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


@compiled()
def apply_rows(indices, votes, stride, fixed, buckets, columns, keys, decay, carry, shrink, reach, counts, start, stop):
    """Move indices by their votes and let these fade, in place. Flips, travel, clipped: ``counts`` ``(out, 3)``."""
    draws = np.empty(columns, np.uint32)
    for i in range(start, stop):
        flips = travel = clipped = np.int64(0)
        step = stride[i]
        base = np.uint32(i * columns)
        _draws(draws, base, keys[0], keys[1])
        for j in range(columns):
            m = min(max(np.int64(votes[i, j]), -reach), reach)
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
            m = min(max(np.int64(votes[i, j]), -reach), reach)
            # Nothing fades to nothing whatever is drawn: decay is at most 2^16 and the draw below that.
            votes[i, j] = _fade(m, decay, carry, draws[j]) if m != 0 else 0
        counts[i, 0] = flips
        counts[i, 1] = travel
        counts[i, 2] = clipped


@team_of(apply_rows)
def _apply_rows_team(rows, pieces, threads, *arguments):
    return deal(apply_rows, arguments, rows, pieces, threads)


@compiled()
def apply_words(words, bits, stride, fixed, buckets, columns, keys, decay, carry, shrink, reach, counts, start, stop):
    """The same of words that hold their own votes."""
    half = (np.int64(1) << bits) >> np.int64(1)
    draws = np.empty(columns, np.uint32)
    fades = np.empty(columns, np.uint32)
    for i in range(start, stop):
        flips = travel = clipped = np.int64(0)
        step = stride[i]
        base = np.uint32(i * columns)
        _draws(draws, base, keys[0], keys[1])
        _draws(fades, base, keys[2], keys[3])
        for j in range(columns):
            word = np.int64(words[i, j])
            old = (word + half) >> bits
            m = min(max(word - (old << bits), -reach), reach)
            if m == 0 and shrink == 0:
                continue
            new, way, cut = _move(old, m * step, shrink, fixed, buckets, draws[j])
            moved = new != old
            clipped += cut
            flips += moved
            travel += way if moved else 0
            words[i, j] = (new << bits) + _fade(m, decay, carry, fades[j])
        counts[i, 0] = flips
        counts[i, 1] = travel
        counts[i, 2] = clipped


@team_of(apply_words)
def _apply_words_team(rows, pieces, threads, *arguments):
    return deal(apply_words, arguments, rows, pieces, threads)


@compiled()
def flip_rows(
    indices, votes, stride, fixed, columns, keys, threshold, jitter, chance, decay, carry, counts, start, stop
):
    """Move the indices whose votes break through, in place; ``counts`` as in :func:`apply_rows`."""
    top = np.int64(len(fixed) - 1)
    for i in range(start, stop):
        flips = travel = clipped = np.int64(0)
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
        counts[i, 0] = flips
        counts[i, 1] = travel
        counts[i, 2] = clipped


@team_of(flip_rows)
def _flip_rows_team(rows, pieces, threads, *arguments):
    return deal(flip_rows, arguments, rows, pieces, threads)


assert BUCKET_BITS == 15 and FIXED_BITS == 40 and DRAW_BITS == 28, "the compiled kernels spell these out"

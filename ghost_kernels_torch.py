"""The reference backend of ``ghost_kernels``: plain tensor operations, on any device, in slices of rows.

Slow, and short enough to be checked by eye: the other backends give its bits. 32-bit arithmetic is done in int64 and
cut back. What operations mean, and what their arguments are, ``ghost_kernels`` says.
"""

from __future__ import annotations

import numpy as np
import torch

from manifolds import FIXED_BITS, Manifold
from vote_units import DRAW_BITS, WHISPER_BITS, WHISPER_LIMIT, VoteUnits

SLICE_ELEMENTS = 1 << 20
"""At most about this many elements are worked on at a time, so no full-size temporary exists."""
_MASK = 0xFFFFFFFF
_ONE = 1 << FIXED_BITS


def hash_of(position: torch.Tensor, key0: int, key1: int) -> torch.Tensor:
    """The same hash on int64 tensors that hold 32-bit values; products wrap modulo 2^64, of which 32 bits are kept."""
    x = (position * 0x9E3779B1 + key0) & _MASK
    x = x ^ (x >> 16)
    x = ((x * 0x85EBCA6B) & _MASK) ^ key1
    x = x ^ (x >> 13)
    x = (x * 0xC2B2AE35) & _MASK
    return x ^ (x >> 16)


def positions(rows: torch.Tensor, columns: int) -> torch.Tensor:
    """Numbers of the elements of chosen rows in the whole tensor, 32 bits in int64 ``(n, columns)``."""
    return (rows[:, None] * columns + torch.arange(columns, device=rows.device)) & _MASK


def row_slices(rows: int, columns: int) -> list[range]:
    """Consecutive ranges of rows of at most ``SLICE_ELEMENTS`` elements."""
    step = max(1, SLICE_ELEMENTS // max(columns, 1))
    return [range(a, min(a + step, rows)) for a in range(0, rows, step)]


def dequantize(indices: torch.Tensor, scale: torch.Tensor, manifold: Manifold, out: torch.Tensor) -> None:
    """As :func:`ghost_kernels.dequantize`, into ``out``."""
    for rows in row_slices(*indices.shape):
        part = slice(rows.start, rows.stop)
        picked = manifold.values[indices[part].int() + 32768]
        out[part] = picked.mul_(scale[part, None])


def snap(weights: torch.Tensor, scale: torch.Tensor, manifold: Manifold, out: torch.Tensor, sums: np.ndarray) -> None:
    """As :func:`ghost_kernels.snap`; adds zeros, saturated, signal and noise to float64 ``sums`` ``(4,)``."""
    for rows in row_slices(*weights.shape):
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


def cast(
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
    """As :func:`ghost_kernels.cast_votes`; ``offset`` is the slot's."""
    columns = gradient.shape[1]
    half = 1 << units.stat_shift >> 1
    for part in row_slices(*gradient.shape):
        i = rows[part.start : part.stop]
        t = gradient[part.start : part.stop].float() * yardstick[i, None] * 65536.0
        f = torch.round(t.clamp_(-float(units.wide), float(units.wide))).to(torch.int64)
        h = hash_of(positions(i, columns), *keys)
        r = (h + offset) & 0xFFFF
        votes[i] -= (((f.clamp(-units.limit, units.limit) + r) >> 16) * sign).to(votes.dtype)
        squares[i] += ((f + half) >> units.stat_shift).square().sum(1) * sign
        sketch[i] += torch.where(h >> 31 == 1, -f, f).sum(1) * sign


def whispers(
    gradient: torch.Tensor,
    rows: torch.Tensor,
    yardstick: torch.Tensor,
    gate: int,
    votes: torch.Tensor,
    sizes: torch.Tensor,
    squares: torch.Tensor,
    sign: int,
) -> None:
    """As :func:`ghost_kernels.cast_whispers`."""
    top = float(WHISPER_LIMIT << WHISPER_BITS)
    for part in row_slices(*gradient.shape):
        i = rows[part.start : part.stop]
        t = gradient[part.start : part.stop] * yardstick[i, None] * float(1 << WHISPER_BITS)
        f = torch.round(t.clamp_(-top, top)).to(torch.int64)
        size = f.abs()
        votes[i] -= (torch.where(size > gate, f.sign(), 0) * sign).to(votes.dtype)
        sizes[i] += size.sum(1) * sign
        squares[i] += size.square().sum(1) * sign


def _signed(levels: torch.Tensor, fixed: torch.Tensor) -> torch.Tensor:
    return fixed[levels.abs().clamp(max=len(fixed) - 1)] * levels.sign()


def apply(
    words: torch.Tensor,
    votes: torch.Tensor | None,
    stride: torch.Tensor,
    manifold: Manifold,
    keys: tuple[int, int, int, int],
    decay: int,
    carry: int,
    shrink: int,
    reach: int,
) -> tuple[int, int, int]:
    """As :func:`ghost_kernels.apply_votes`."""
    columns = words.shape[1]
    fixed, bits = manifold.fixed, manifold.vote_bits
    flips = travel = clipped = 0
    for rows in row_slices(*words.shape):
        part = slice(rows.start, rows.stop)
        old = manifold.levels(words[part]).long()
        m = words[part].long() - (old << bits) if votes is None else votes[part].long()
        m = m.clamp(-reach, reach)
        size = fixed[old.abs().clamp(max=manifold.top)]
        size = size - (size * shrink >> 32)
        start = torch.where(old < 0, -size, size)
        wanted = start + m * stride[part, None]
        target = wanted.clamp(-_ONE, _ONE)
        size = target.abs()
        low = torch.bucketize(size, fixed, right=True) - 1
        rest = size - fixed[low]
        gap = fixed[(low + 1).clamp_(max=manifold.top)] - fixed[low]
        position = positions(torch.arange(rows.start, rows.stop, device=words.device), columns)
        up = (hash_of(position, keys[0], keys[1]) >> 32 - DRAW_BITS) * gap < rest << DRAW_BITS
        new = (low + up.long()) * torch.where(target < 0, -1, 1)
        still = (m == 0) & (shrink == 0)
        new = torch.where(still, old, new)
        moved = new != old
        flips += int(moved.sum())
        travel += int(torch.where(moved, (target - start).abs(), 0).sum())
        clipped += int((~still & (wanted != target)).sum())
        r = hash_of(position, keys[2], keys[3]) & 0xFFFF
        kept = torch.where(m == 0, 0, ((m * decay + r) >> 16).clamp_(-carry, carry))
        if votes is None:
            words[part] = ((new << bits) + kept).to(torch.int16)
        else:
            words[part] = new.to(torch.int16)
            votes[part] = kept.to(votes.dtype)
    return flips, travel, clipped


def flip(
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
    """As :func:`ghost_kernels.flip_by_majority`."""
    columns = indices.shape[1]
    flips = travel = clipped = 0
    for rows in row_slices(*indices.shape):
        part = slice(rows.start, rows.stop)
        m, old = votes[part].long(), indices[part].long()
        position = positions(torch.arange(rows.start, rows.stop, device=indices.device), columns)
        first = hash_of(position, keys[0], keys[1])
        second = hash_of(position, keys[2], keys[3])
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

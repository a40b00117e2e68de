"""What the integers of a vote buffer mean, how a step's votes share its range, and where their randomness comes from.

A buffer never wraps and never saturates in the middle of a step, which would make the order of micro-batches matter.
A quarter of its range belongs to what is carried over, the rest to the step's new votes, and the K micro-batches of a
step share that like this: an element draws one random number a step, h, and micro-batch k rounds with
r = (h + k · s) mod 2^16, s = 2^16 / K. Each r is uniform, so each vote is unbiased; together they are spread evenly
(systematic sampling), so of K gradients clipped at B/K votes never more than B can round up, however small B/K is. So
even a six-bit buffer holds at any K, and the rounding noise of K similar votes is that of one.

Randomness is a hash of (two 32-bit keys, the element's position in the whole tensor); keys come from (seed, step,
tensor), so no bit depends on slices, threads, device or the order of micro-batches.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

COLUMNS_MAX = 1 << 15
"""Widest row whose statistics cannot overflow 64 bits in a step, however loud its votes are."""
UNITS = {16: 512, 8: 16, 6: 4}
"""Votes in one row RMS, by the width of the buffer."""
REACH_MAX = 1 << 15
"""Most votes that a buffer can hold."""
SLOTS_MAX = 1024
"""Most uses of a grid in one step."""
DRAW_BITS = 28
"""Bits of the draw between two neighbours."""
WHISPER_BITS = 12
"""Fractional bits of a gradient in units of its tensor's RMS, where the rules of whisper votes compare it."""
WHISPER_LIMIT = 128
"""Largest such gradient; louder ones are cut."""
_MASK = 0xFFFFFFFF


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


def hash_keys(*parts: int) -> tuple[int, int]:
    """Two 32-bit keys from integers such as (seed, step, micro-batch, tensor): splitmix64 (Steele et al. 2014)."""
    state = 0
    for part in parts:
        state = (state ^ (part & 0xFFFFFFFFFFFFFFFF)) + 0x9E3779B97F4A7C15 & 0xFFFFFFFFFFFFFFFF
        state = (state ^ state >> 30) * 0xBF58476D1CE4E5B9 & 0xFFFFFFFFFFFFFFFF
        state = (state ^ state >> 27) * 0x94D049BB133111EB & 0xFFFFFFFFFFFFFFFF
        state ^= state >> 31
    return state & _MASK, state >> 32

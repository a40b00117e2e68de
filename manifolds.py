"""Manifolds: the fixed tables of 65,536 weight values that grid indices point into.

A manifold is built once, by name, from nothing but arithmetic, and never trained. Index 0 of a signed int16 is the
value 0.0 exactly; index -i is the negative of index i. The lowest index, -32768, has no mirror image: its value
continues the table one gap below -1 so that the table stays strictly increasing, and neither the snap nor a move
ever writes it. That keeps every operation symmetric in sign, and a checkpoint that holds it is damaged.

Two tables:

``prime-harmonic``  A nucleus of prime powers 1/p^1.05 (primes up to 60,000), harmonics 1/(1.2 i), a linear tail i/8192,
                    then the largest gap halved again and again until the table is full. Near zero it is
                    thousands of times finer than in the bulk, where its gap is 1/16384.
``linear``          i/32767.

Every entry is exact in fixed point with 40 fractional bits (``fixed``), which lets the vote rules move weights in value
space with integers only. Rejected: building on the device that uses the table. Transcendental functions differ in the
last place between libraries; here they run in double precision on the host, and the tests check that no value lies
near a float32 rounding boundary, so the SHA-256 of a table is the same on every machine.
"""

from __future__ import annotations

import functools
import hashlib
import heapq
import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

ENTRIES = 65_536
INDEX_MAX = 32_767
"""Largest index; the smallest that is ever written is ``-INDEX_MAX``."""
FIXED_BITS = 40
"""Fractional bits of the fixed-point image of a table."""
GAP_BITS = 30
"""Gaps between entries stay below ``2**GAP_BITS`` in fixed point."""
BUCKET_BITS = 15
"""[0, 1] is cut into ``2**BUCKET_BITS`` equal buckets; the search for an entry starts from its bucket's range."""

DEFAULT = "prime-harmonic"


class ManifoldError(ValueError):
    """A table that breaks the rules above, or a name that no builder answers to."""


@dataclass(frozen=True, eq=False)
class Manifold:
    """A lookup table with the search tables derived from it. Immutable; share one object per process and device.

    Attributes:
        name: the builder's name.
        values: float32 ``(65536,)``, strictly increasing; ``values[index + 32768]`` is the value of ``index``.
        sha256: hex digest of ``values`` as little-endian bytes.
        fixed: int64 ``(32768,)``: the non-negative half times ``2**40``, exact.
        thresholds: float32 ``(32769,)``: the nearest index of a magnitude x is the largest i with
            ``x >= thresholds[i]``. ``thresholds[0]`` is 0 and the last is infinity. A magnitude half-way between two
            entries belongs to the smaller.
        threshold_buckets: int32 ``(32770,)``: for each bucket of [0, 1], where the search in ``thresholds`` begins.
        fixed_buckets: int32 ``(32770,)``: the same for ``fixed``.
    """

    name: str
    values: torch.Tensor
    sha256: str
    fixed: torch.Tensor
    thresholds: torch.Tensor
    threshold_buckets: torch.Tensor
    fixed_buckets: torch.Tensor

    def to(self, device: torch.device | str) -> Manifold:
        """The same manifold with its tables on ``device``."""
        device = torch.device(device)
        if self.values.device == device:
            return self
        return Manifold(
            self.name,
            self.values.to(device),
            self.sha256,
            self.fixed.to(device),
            self.thresholds.to(device),
            self.threshold_buckets.to(device),
            self.fixed_buckets.to(device),
        )


def fingerprint(values: torch.Tensor) -> str:
    """SHA-256 (hex) of a float32 table's little-endian bytes."""
    return hashlib.sha256(values.detach().cpu().numpy().astype("<f4").tobytes()).hexdigest()


def from_values(name: str, values: torch.Tensor) -> Manifold:
    """A manifold from its table, float32 ``(65536,)``.

    Raises:
        ManifoldError: wrong dtype or shape, not finite, not strictly increasing, not antisymmetric around an exact
            zero, an entry that 40 fractional bits cannot hold, or a gap of 2**-10 or more.
    """
    if values.dtype != torch.float32 or tuple(values.shape) != (ENTRIES,):
        raise ManifoldError(f"table is {values.dtype} {tuple(values.shape)}, expected torch.float32 ({ENTRIES},)")
    table = values.detach().cpu().numpy()
    if not np.isfinite(table).all():
        raise ManifoldError("table has non-finite entries")
    if not (np.diff(table) > 0).all():
        at = int(np.argmin(np.diff(table) > 0))
        raise ManifoldError(f"table is not strictly increasing: entries {at} and {at + 1} are {table[at : at + 2]}")
    half = table[INDEX_MAX + 1 :].astype(np.float64)
    if half[0] != 0.0 or not (table[1 : INDEX_MAX + 2][::-1] == -table[INDEX_MAX + 1 :]).all():
        raise ManifoldError("table is not antisymmetric around an exact 0 at index 0")
    if half[-1] != 1.0:
        raise ManifoldError(f"the largest entry is {half[-1]}, expected 1.0")
    fixed = np.rint(half * 2.0**FIXED_BITS).astype(np.int64)
    if not (fixed / 2.0**FIXED_BITS == half).all():
        raise ManifoldError(f"an entry needs more than {FIXED_BITS} fractional bits")
    if np.diff(fixed).max() >= 1 << GAP_BITS:
        # A move compares a 32-bit draw times the gap in 64-bit integers.
        raise ManifoldError(
            f"the largest gap is {np.diff(half).max()}, expected below {2.0 ** (GAP_BITS - FIXED_BITS)}"
        )

    # The smallest float32 above the midpoint: comparing with it decides "nearest" without rounding.
    middle = (half[:-1] + half[1:]) / 2  # exact: two float32 of near exponents added in double precision
    above = middle.astype(np.float32)
    above = np.where(above.astype(np.float64) > middle, above, np.nextafter(above, np.float32(np.inf)))
    thresholds = np.concatenate([[0.0], above, [np.inf]]).astype(np.float32)
    edges = np.arange(2**BUCKET_BITS + 2, dtype=np.float64) / 2**BUCKET_BITS
    threshold_buckets = np.searchsorted(thresholds[:-1].astype(np.float64), edges, side="right") - 1
    fixed_buckets = np.searchsorted(half, edges, side="right") - 1
    return Manifold(
        name,
        values.detach().cpu().clone(),
        fingerprint(values),
        torch.from_numpy(fixed),
        torch.from_numpy(thresholds),
        torch.from_numpy(threshold_buckets.astype(np.int32)),
        torch.from_numpy(fixed_buckets.astype(np.int32)),
    )


def _primes(limit: int) -> np.ndarray:
    sieve = np.ones(limit + 1, dtype=bool)
    sieve[:2] = False
    for n in range(2, math.isqrt(limit) + 1):
        if sieve[n]:
            sieve[n * n :: n] = False
    return np.flatnonzero(sieve)


def _mirrored(half: np.ndarray) -> torch.Tensor:
    """Full table from its non-negative half ``(32768,)``, the unpaired lowest entry one last gap below -1."""
    lowest = -(2 * half[-1] - half[-2])
    return torch.from_numpy(np.concatenate([[lowest], -half[:0:-1], half]).astype(np.float32))


def prime_harmonic_seeds() -> np.ndarray:
    """The positive entries before gaps are halved, float64, family after family."""
    nucleus = [math.pow(int(p), -1.05) for p in _primes(60_000)]
    harmonics = [1.0 / (1.2 * i) for i in range(2, 10_000)]
    tail = [i / 8192.0 for i in range(1, 8193)]
    return np.array(nucleus + harmonics + tail)


def _prime_harmonic() -> torch.Tensor:
    entries = np.unique(np.concatenate([[0.0], prime_harmonic_seeds()]).astype(np.float32)).tolist()
    # Largest gap first, the lower one of equals: the order is part of the table's definition.
    gaps = [(a - b, a, b) for a, b in itertools.pairwise(entries)]
    heapq.heapify(gaps)
    while len(entries) < INDEX_MAX + 1:
        _, low, high = heapq.heappop(gaps)
        middle = float(np.float32((low + high) / 2))
        entries.append(middle)
        heapq.heappush(gaps, (low - middle, low, middle))
        heapq.heappush(gaps, (middle - high, middle, high))
    return _mirrored(np.array(sorted(entries), dtype=np.float32))


def _linear() -> torch.Tensor:
    return _mirrored((np.arange(INDEX_MAX + 1, dtype=np.float64) / INDEX_MAX).astype(np.float32))


_BUILDERS: dict[str, Callable[[], torch.Tensor]] = {"prime-harmonic": _prime_harmonic, "linear": _linear}
NAMES = tuple(_BUILDERS)


def build(name: str = DEFAULT) -> Manifold:
    """The manifold of that name, on the CPU; built once per process.

    Raises:
        ManifoldError: unknown name.
    """
    if name not in _BUILDERS:
        raise ManifoldError(f"unknown manifold {name!r}, expected one of {', '.join(NAMES)}")
    return _build(name)


@functools.cache
def _build(name: str) -> Manifold:
    return from_values(name, _BUILDERS[name]())

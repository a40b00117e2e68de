"""Manifolds: the fixed tables of weight values that grid indices point into.

A manifold is built once, by name, from nothing but arithmetic, and never trained. Index 0 of a signed int16 is the
value 0.0 exactly; index -i is the negative of index i. The lowest index, -32768, has no mirror image: its value
continues the table one gap below -1 so that the table stays strictly increasing, and neither the snap nor a move
ever writes it. That keeps every operation symmetric in sign, and a checkpoint that holds it is damaged.

Three tables:

``prime-harmonic``  A nucleus of prime powers 1/p^1.05 (primes up to 60,000), harmonics 1/(1.2 i), a linear tail i/8192,
                    then the largest gap halved again and again until the table is full. Near zero it is
                    thousands of times finer than in the bulk, where its gap is 1/16384.
``linear``          i/32767.
``compact``         t (7 + 9 t²) / 16 with t = i/511: 1,023 levels, finer in the bulk than at a row's edge. The lower
                    six bits of the 16 are a vote buffer: see below.

The 16 bits that stand for a weight are its *word*. On the first two tables the word is the grid index. On ``compact``
it is 64 · level + votes with votes from -31 to 31: index and optimizer state in the same two bytes. A vote is added to
the word like to any int16 buffer, and since the table repeats each level's value for all its votes, dequantizing a
word needs no unpacking: it is one lookup among 65,536 entries here as there. Of 10-bit tables, an even one imports
Gaussian rows at 52.0 dB with 1.25 headroom, this one at 54.9, about what rounding to bf16 costs; between 0.35 and 0.5
for the linear term the difference is below 0.2 dB.

Every level is exact in fixed point with 40 fractional bits (``fixed``), which lets the vote rules move weights in value
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
COMPACT_VOTE_BITS = 6
"""Low bits of a ``compact`` word that hold votes."""
GAP_BITS = 33
"""Gaps between levels stay below ``2**GAP_BITS`` in fixed point: a move multiplies a gap by a 28-bit draw."""
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
        vote_bits: how many low bits of a word are votes: 0, or 6 on ``compact``.
        values: float32 ``(65536,)``, increasing (strictly without vote bits); ``values[word + 32768]`` is the value of
            ``word``.
        sha256: hex digest of ``values`` as little-endian bytes.
        fixed: int64 ``(top + 1,)``: the values of levels 0 to ``top`` times ``2**40``, exact.
        thresholds: float32 ``(top + 2,)``: the nearest level of a magnitude x is the largest i with
            ``x >= thresholds[i]``. ``thresholds[0]`` is 0 and the last is infinity. A magnitude half-way between two
            levels belongs to the smaller.
        threshold_buckets: int32 ``(32770,)``: for each bucket of [0, 1], where the search in ``thresholds`` begins.
        fixed_buckets: int32 ``(32770,)``: the same for ``fixed``.
    """

    name: str
    vote_bits: int
    values: torch.Tensor
    sha256: str
    fixed: torch.Tensor
    thresholds: torch.Tensor
    threshold_buckets: torch.Tensor
    fixed_buckets: torch.Tensor

    @property
    def snr_limit_db(self) -> float:
        """Signal to noise in dB that a tensor without outliers keeps on import: limit of importer and verifier."""
        return 50.0 if self.vote_bits else 75.0

    @property
    def top(self) -> int:
        """Largest level, 32767 or 511; the smallest that is ever written is ``-top``."""
        return len(self.fixed) - 1

    def levels(self, words: torch.Tensor) -> torch.Tensor:
        """Levels of int16 words, int16 of the same shape: the grid indices without votes."""
        if self.vote_bits == 0:
            return words
        return ((words.int() + (1 << self.vote_bits >> 1)) >> self.vote_bits).to(torch.int16)

    def votes(self, words: torch.Tensor) -> torch.Tensor:
        """Votes inside int16 words, int8 of the same shape; zeros on a manifold without vote bits."""
        return (words.int() - (self.levels(words).int() << self.vote_bits)).to(torch.int8)

    def unused(self, words: torch.Tensor) -> int:
        """How many int16 words are none that an import or a move ever writes."""
        wrong = (self.levels(words).abs() > self.top) | (words == -INDEX_MAX - 1)
        if self.vote_bits:
            wrong |= self.votes(words) == -(1 << self.vote_bits >> 1)
        return int(wrong.sum())

    def to(self, device: torch.device | str) -> Manifold:
        """The same manifold with its tables on ``device``."""
        device = torch.device(device)
        if self.values.device == device:
            return self
        return Manifold(
            name=self.name,
            vote_bits=self.vote_bits,
            values=self.values.to(device),
            sha256=self.sha256,
            fixed=self.fixed.to(device),
            thresholds=self.thresholds.to(device),
            threshold_buckets=self.threshold_buckets.to(device),
            fixed_buckets=self.fixed_buckets.to(device),
        )


def fingerprint(values: torch.Tensor) -> str:
    """SHA-256 (hex) of a float32 table's little-endian bytes."""
    return hashlib.sha256(values.detach().cpu().numpy().astype("<f4").tobytes()).hexdigest()


def from_values(name: str, values: torch.Tensor, vote_bits: int = 0) -> Manifold:
    """A manifold from its table, float32 ``(65536,)``.

    Raises:
        ManifoldError: wrong dtype or shape, not finite, not increasing level by level, levels that are not constant
            over their votes, not antisymmetric around an exact zero, a level that 40 fractional bits cannot hold, or
            a gap of 2**-7 or more.
    """
    if values.dtype != torch.float32 or tuple(values.shape) != (ENTRIES,):
        raise ManifoldError(f"table is {values.dtype} {tuple(values.shape)}, expected torch.float32 ({ENTRIES},)")
    if vote_bits not in (0, COMPACT_VOTE_BITS):
        raise ManifoldError(f"vote bits are {vote_bits}, expected 0 or {COMPACT_VOTE_BITS}")
    table = values.detach().cpu().numpy()
    if not np.isfinite(table).all():
        raise ManifoldError("table has non-finite entries")
    half = table[INDEX_MAX + 1 :: 1 << vote_bits].astype(np.float64)
    if vote_bits and not np.array_equal(_spread(half, vote_bits).numpy(), table):
        raise ManifoldError(f"table does not repeat each of its levels for {vote_bits} bits of votes")
    rising = half if vote_bits else table
    if not (np.diff(rising) > 0).all():
        at = int(np.argmin(np.diff(rising) > 0))
        raise ManifoldError(f"table is not strictly increasing: entries {at} and {at + 1} are {rising[at : at + 2]}")
    if half[0] != 0.0 or (not vote_bits and not (table[1 : INDEX_MAX + 2][::-1] == -half).all()):
        raise ManifoldError("table is not antisymmetric around an exact 0 at index 0")
    if half[-1] != 1.0:
        raise ManifoldError(f"the largest entry is {half[-1]}, expected 1.0")
    fixed = np.rint(half * 2.0**FIXED_BITS).astype(np.int64)
    if not (fixed / 2.0**FIXED_BITS == half).all():
        raise ManifoldError(f"an entry needs more than {FIXED_BITS} fractional bits")
    if np.diff(fixed).max() >= 1 << GAP_BITS:
        # A move multiplies a 28-bit draw by the gap in 64-bit integers.
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
        vote_bits,
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


def _spread(half: np.ndarray, vote_bits: int = 0) -> torch.Tensor:
    """Full table ``(65536,)`` from the values of levels 0 to top; past the last level on either side, which only
    words that nothing writes reach, it continues by one gap."""
    longer = np.append(half, 2 * half[-1] - half[-2])
    words = np.arange(-INDEX_MAX - 1, INDEX_MAX + 1)
    levels = (words + (1 << vote_bits >> 1)) >> vote_bits
    return torch.from_numpy((np.sign(levels) * longer[np.abs(levels)]).astype(np.float32))


def prime_harmonic_seeds() -> np.ndarray:
    """The positive entries before gaps are halved, float64, family after family."""
    nucleus = [math.pow(int(p), -1.05) for p in _primes(60_000)]
    harmonics = [1.0 / (1.2 * i) for i in range(2, 10_000)]
    tail = [i / 8192.0 for i in range(1, 8193)]
    return np.array(nucleus + harmonics + tail)


def _prime_harmonic() -> np.ndarray:
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
    return np.array(sorted(entries))


def _linear() -> np.ndarray:
    return np.arange(INDEX_MAX + 1, dtype=np.float64) / INDEX_MAX


def _compact() -> np.ndarray:
    # Integer over integer is rounded once: the same double everywhere.
    top = INDEX_MAX >> COMPACT_VOTE_BITS
    return np.array([i * (7 * top**2 + 9 * i**2) / (16 * top**3) for i in range(top + 1)])


_BUILDERS: dict[str, tuple[Callable[[], np.ndarray], int]] = {
    "prime-harmonic": (_prime_harmonic, 0),
    "linear": (_linear, 0),
    "compact": (_compact, COMPACT_VOTE_BITS),
}
"""Builder of the levels 0 to top, float64, and the vote bits of the words."""
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
    levels, vote_bits = _BUILDERS[name]
    return from_values(name, _spread(levels().astype(np.float32), vote_bits), vote_bits)

"""Low-bit grids: small codes on a table, a scale per group of weights, and the search for the nearest code.

    weight = table[code] · unit · 2^(scale_code / 8)

``code`` is an int16, at most ``top`` in size, and points into a small antisymmetric table of the manifold family (0
is the value 0.0, index -i the negative of i, as on the 16-bit tables). ``scale_code`` is an int8 per group of
``group`` consecutive weights of a row, an eighth of an octave fine; ``unit`` is one float per tensor.

The codes are meant to be entropy-coded, and that decides what table and what scales are good. For a code of fixed
length the table should be dense where weights are and a group's scale should follow its largest weight (NF4, GGUF);
the mean entropy of such codes is below their length all the same. With entropy coding the best table at every rate
that matters here is the even one, cut where nothing lies any more (Gish and Pierce 1968, IEEE IT-14), and a scale has
nothing to do with the size of its weights: it says how fine they need to be, which depends on what their error costs.
Measured on Gaussian weights, signal to noise in dB at a mean of bits per weight, scales included:

    4.25 bits   fixed codes, 15 levels, absmax of 64    20.5        entropy-coded even table     23.5

``TABLES`` keeps two more members of the family for comparison: ``compact``, the curve of the compact manifold, and
``prime-harmonic``, levels 1/p of the first primes p. Both lose against the even table once codes are entropy-coded.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch

TABLES = ("linear", "compact", "prime-harmonic")
TOP_MAX = 2047
"""Most levels on either side of 0: so many that nothing is cut off, even at a mean of eight bits."""
OCTAVE = 8
"""Scale codes to a factor of two."""
GROUPS = (0, 32, 64, 128)
"""Weights that share a scale; 0 is a whole row."""
_SLICE = 1 << 22


class LowBitError(ValueError):
    """Codes, scales or settings that do not make a low-bit grid."""


@functools.cache
def table(name: str, top: int) -> torch.Tensor:
    """Values of the codes -top to top, float32 ``(2 · top + 1,)``, increasing; the largest is ``top`` itself, so that
    on the even table a code is its own value.

    Raises:
        LowBitError: unknown name or size.
    """
    if name not in TABLES or not 1 <= top <= TOP_MAX:
        raise LowBitError(f"table {name!r} with {top} levels, expected one of {', '.join(TABLES)} with 1 to {TOP_MAX}")
    half = torch.arange(1, top + 1, dtype=torch.float64)
    if name == "compact":
        t = half / top
        half = top * t * (7 + 9 * t.square()) / 16
    elif name == "prime-harmonic":
        primes = [n for n in range(2, 18_000) if all(n % d for d in range(2, int(n**0.5) + 1))]
        half = torch.tensor([top * 2.0 / p for p in reversed(primes[:top])], dtype=torch.float64)
    return torch.cat([-half.flip(0), torch.zeros(1), half]).float()


@dataclass(frozen=True)
class LowBitGrid:
    """One weight matrix in low-bit codes.

    Attributes:
        codes: int16 ``(out, in)``.
        scale_codes: int8 ``(out, groups)``.
        unit: factor of the whole tensor.
        name, top: the table.
    """

    codes: torch.Tensor
    scale_codes: torch.Tensor
    unit: float
    name: str = "linear"
    top: int = TOP_MAX

    def __post_init__(self) -> None:
        rows, columns = self.codes.shape
        if self.codes.dtype != torch.int16 or self.scale_codes.dtype != torch.int8:
            found = f"codes are {self.codes.dtype} and scales {self.scale_codes.dtype}"
            raise LowBitError(f"{found}, expected torch.int16 and torch.int8")
        if self.scale_codes.ndim != 2 or len(self.scale_codes) != rows or columns % max(1, self.scale_codes.shape[1]):
            raise LowBitError(f"scales of shape {tuple(self.scale_codes.shape)} do not fit codes {rows} x {columns}")
        if not 0 < self.unit < float("inf"):
            raise LowBitError(f"the unit is {self.unit}, expected a positive number")
        if rows and columns and max(int(self.codes.max()), -int(self.codes.min())) > self.top:
            raise LowBitError(f"a code is larger than {self.top}")
        table(self.name, self.top)

    def steps(self, rows: slice = slice(None)) -> torch.Tensor:
        """Size of one step for each weight of some rows, float32 ``(rows, in)``."""
        return steps_of(self.scale_codes[rows], self.unit, self.codes.shape[1])

    def weights(self) -> torch.Tensor:
        """Dequantized, float32 ``(out, in)``."""
        values = table(self.name, self.top)
        out = torch.empty(self.codes.shape, dtype=torch.float32)
        step = max(1, _SLICE // max(1, self.codes.shape[1]))
        for start in range(0, len(out), step):
            rows = slice(start, start + step)
            out[rows] = values[self.codes[rows].int() + self.top] * self.steps(rows)
        return out


def steps_of(scale_codes: torch.Tensor, unit: float, columns: int) -> torch.Tensor:
    """``unit · 2^(code / 8)`` for each weight, float32 ``(out, columns)``, from int8 ``(out, groups)``."""
    scales = (unit * torch.exp2(scale_codes.double() / OCTAVE)).float()
    return scales.repeat_interleave(columns // max(1, scales.shape[1]), 1)


def nearest(weights: torch.Tensor, steps: torch.Tensor, name: str, top: int) -> torch.Tensor:
    """Code of the table's value nearest to ``weights / steps``, int16 of the same shape; beyond the table its end."""
    scaled = weights / steps
    if name == "linear":
        return scaled.round_().clamp_(-top, top).to(torch.int16)
    values = table(name, top).to(scaled.dtype)
    middles = (values[1:] + values[:-1]) / 2
    return (torch.bucketize(scaled, middles) - top).to(torch.int16)


def check_group(columns: int, group: int, name: str) -> int:
    """Groups in a row of ``columns`` weights.

    Raises:
        LowBitError: ``group`` does not divide it.
    """
    if group not in GROUPS:
        raise LowBitError(f"group is {group}, expected one of {', '.join(map(str, GROUPS))}")
    if group and columns % group:
        raise LowBitError(f"{name} has rows of {columns} weights, not a multiple of the group {group}: use --group 0")
    return columns // group if group else 1


def scale_codes(factors: torch.Tensor) -> tuple[torch.Tensor, float]:
    """Nearest scale codes of wanted steps, positive ``(out, groups)``, and their unit: int8 and float.

    The unit is the geometric mean; steps farther than 2^15 from it are drawn in.
    """
    logs = factors.double().clamp(min=1e-30).log2()
    middle = float(logs.mean())
    codes = ((logs - middle) * OCTAVE).round().clamp(-120, 120).to(torch.int8)
    return codes, float(torch.tensor(2.0**middle, dtype=torch.float32))

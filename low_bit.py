"""Low-bit grids: small codes on a table, scales of rows and columns, and the search for the nearest code.

    weight[r, c] = table[code] · step[r, c]        step = unit · 2^((row_code[r, group of c] + column_code[c]) / 8)

``code`` is an int16, at most ``top`` in size, and points into a small antisymmetric table of the manifold family (0
is the value 0.0, index -i the negative of i, as on the 16-bit tables). ``row_code`` is an int8 per group of ``group``
consecutive weights of a row (by default the whole row), ``column_code`` an int8 per column, both an eighth of an
octave fine; ``unit`` is one float per tensor.

The codes are meant to be entropy-coded, and that decides what table and what scales are good. For a code of fixed
length the table should be dense where weights are and a group's scale should follow its largest weight (NF4, GGUF);
the mean entropy of such codes is below their length all the same. With entropy coding the best table at every rate
that matters here is the even one, cut where nothing lies any more (Gish and Pierce 1968, IEEE IT-14), and a scale has
nothing to do with the size of its weights: it says how fine they need to be, which depends on what their error costs.
Measured on Gaussian weights, signal to noise in dB at a mean of bits per weight, scales included:

    4.25 bits   fixed codes, 15 levels, absmax of 64    20.5        entropy-coded even table     23.5

Codes are stored sorted by their scales (:meth:`LowBitGrid.stored`): whoever decodes them knows the scales, and a coder
that learns a new distribution every so often does better where the like stands together.

``TABLES`` keeps two more members of the family for comparison: ``compact``, the curve of the compact manifold, and
``prime-harmonic``, the even table with a nucleus of levels 1/p around zero, p the first primes, as the 16-bit manifold
has one. Once codes are entropy-coded the first is as good as the even table and the second loses to it (README).
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import numba
import numpy as np
import torch

TABLES = ("linear", "compact", "prime-harmonic")
TOP_MAX = 16383
"""Most levels on either side of 0: so many that nothing is cut off, even at a mean of nine bits."""
NUCLEUS = (2, 3, 5, 7)
"""Primes whose reciprocals are levels of the prime-harmonic table."""
OCTAVE = 8
"""Scale codes to a factor of two."""
GROUPS = (0, 32, 64, 128)
"""Weights of a row that share a row code; 0 is the whole row."""
_STRIPES = 16
"""Ranges of columns that are stored one after the other."""
_SLICE = 1 << 22


class LowBitError(ValueError):
    """Codes, scales or settings that do not make a low-bit grid."""


@functools.cache
def table(name: str, top: int) -> torch.Tensor:
    """Values of the codes -top to top, float32 ``(2 · top + 1,)``, increasing; on the even table a code is its own
    value.

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
        nucleus = [1 / p for p in NUCLEUS[: top - 1]][::-1]
        half = torch.cat([torch.tensor(nucleus, dtype=torch.float64), half[: top - len(nucleus)]])
    return torch.cat([-half.flip(0), torch.zeros(1), half]).float()


@dataclass(frozen=True)
class Scales:
    """Steps of a matrix.

    Attributes:
        rows: int8 ``(out, groups)``.
        columns: int8 ``(in,)``.
        unit: factor of the whole tensor.
    """

    rows: torch.Tensor
    columns: torch.Tensor
    unit: float

    def __post_init__(self) -> None:
        if self.rows.dtype != torch.int8 or self.columns.dtype != torch.int8:
            raise LowBitError(f"scales are {self.rows.dtype} and {self.columns.dtype}, expected torch.int8")
        if self.rows.ndim != 2 or self.columns.ndim != 1 or len(self.columns) % max(1, self.rows.shape[1]):
            shapes = f"{tuple(self.rows.shape)} and {tuple(self.columns.shape)}"
            raise LowBitError(f"scales of shapes {shapes} do not fit together")
        if not 0 < self.unit < float("inf"):
            raise LowBitError(f"the unit is {self.unit}, expected a positive number")

    @property
    def shape(self) -> tuple[int, int]:
        """``(out, in)`` of the matrix."""
        return len(self.rows), len(self.columns)

    def steps(self, rows: slice | torch.Tensor = slice(None)) -> torch.Tensor:
        """Size of one step for each weight of some rows, float32 ``(rows, in)``."""
        of_rows = (self.unit * torch.exp2(self.rows[rows].double() / OCTAVE)).float()
        of_columns = torch.exp2(self.columns.double() / OCTAVE).float()
        return of_rows.repeat_interleave(len(self.columns) // max(1, self.rows.shape[1]), 1) * of_columns

    def times(self, factor: float) -> Scales:
        """All steps multiplied by a positive factor."""
        return Scales(self.rows, self.columns, float(torch.tensor(self.unit * factor, dtype=torch.float32)))

    def storage_order(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Rows and columns from the finest to the coarsest, int64."""
        rows = self.rows.int().sum(1).argsort(stable=True)
        return rows, self.columns.argsort(stable=True)


@dataclass(frozen=True)
class LowBitGrid:
    """One weight matrix in low-bit codes.

    Attributes:
        codes: int16 ``(out, in)``.
        scales: steps of the same shape.
        name, top: the table.
    """

    codes: torch.Tensor
    scales: Scales
    name: str = "linear"
    top: int = TOP_MAX

    def __post_init__(self) -> None:
        if self.codes.dtype != torch.int16 or tuple(self.codes.shape) != self.scales.shape:
            found = f"codes are {self.codes.dtype} {tuple(self.codes.shape)}"
            raise LowBitError(f"{found}, expected torch.int16 {self.scales.shape}")
        if self.codes.numel() and max(int(self.codes.max()), -int(self.codes.min())) > self.top:
            raise LowBitError(f"a code is larger than {self.top}")
        table(self.name, self.top)

    def weights(self) -> torch.Tensor:
        """Dequantized, float32 ``(out, in)``."""
        values = table(self.name, self.top)
        out = torch.empty(self.codes.shape, dtype=torch.float32)
        step = max(1, _SLICE // max(1, self.codes.shape[1]))
        for start in range(0, len(out), step):
            rows = slice(start, start + step)
            out[rows] = values[self.codes[rows].int() + self.top] * self.scales.steps(rows)
        return out

    def stored(self) -> torch.Tensor:
        """The codes in the order in which they are stored, int16 ``(out · in,)``: stripes of columns, in each all
        rows, both from fine to coarse."""
        rows, columns = self.scales.storage_order()
        return torch.cat([self.codes[rows[:, None], part].reshape(-1) for part in columns.tensor_split(_STRIPES)])

    @staticmethod
    def restored(stored: torch.Tensor, scales: Scales, name: str, top: int) -> LowBitGrid:
        """The inverse of :meth:`stored`.

        Raises:
            LowBitError: not as many codes as the scales have weights.
        """
        out, width = scales.shape
        if stored.dtype != torch.int16 or stored.shape != (out * width,):
            raise LowBitError(f"codes are {stored.dtype} {tuple(stored.shape)}, expected torch.int16 ({out * width},)")
        rows, columns = scales.storage_order()
        codes = torch.empty(out, width, dtype=torch.int16)
        at = 0
        for part in columns.tensor_split(_STRIPES):
            codes[rows[:, None], part] = stored[at : at + out * len(part)].view(out, len(part))
            at += out * len(part)
        return LowBitGrid(codes, scales, name, top)


def nearest(weights: torch.Tensor, steps: torch.Tensor, name: str, top: int) -> torch.Tensor:
    """Code of the table's value nearest to ``weights / steps``, int16 of the same shape; beyond the table its end."""
    scaled = weights / steps
    if name == "linear":
        return scaled.round_().clamp_(-top, top).to(torch.int16)
    return (torch.bucketize(scaled, _middles(name, top).to(scaled.dtype)) - top).to(torch.int16)


@functools.cache
def _middles(name: str, top: int) -> torch.Tensor:
    values = table(name, top)
    return (values[1:] + values[:-1]) / 2


def round_columns(
    weights: torch.Tensor, steps: torch.Tensor, factor: torch.Tensor, name: str, top: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Round a block of columns one after the other, each column's error carried into those of the block to its right.

    Args:
        weights: float32 ``(rows, block)``, contiguous; mutated: what each weight was when its turn came.
        steps: float32 of the same shape.
        factor: float32 ``(block, block)``, upper triangular: the block's part of the Cholesky factor of the inverse
            of the inputs' second moments.

    Returns:
        Codes, int16; and the errors divided by the factor's diagonal, float32, which times the factor's rows are what
        the columns right of the block have to make up for. Both of the shape of ``weights``.
    """
    codes = torch.empty(weights.shape, dtype=torch.int16)
    errors = torch.empty_like(weights)
    middles = _middles(name, top).numpy() if name != "linear" else np.empty(0, dtype=np.float32)
    _round_columns(
        weights.numpy(),
        steps.contiguous().numpy(),
        factor.contiguous().numpy(),
        table(name, top).numpy(),
        middles,
        top,
        codes.numpy(),
        errors.numpy(),
    )
    return codes, errors


@numba.njit(nogil=True, cache=True, error_model="numpy")
def _round_columns(weights, steps, factor, values, middles, top, codes, errors):
    even = len(middles) == 0
    block = weights.shape[1]
    for i in range(weights.shape[0]):
        for j in range(block):
            scaled = weights[i, j] / steps[i, j]
            if even:
                code = int(min(max(np.rint(scaled), np.float32(-top)), np.float32(top)))
            else:
                code = np.searchsorted(middles, scaled) - top
            codes[i, j] = code
            error = (weights[i, j] - values[code + top] * steps[i, j]) / factor[j, j]
            errors[i, j] = error
            for k in range(j + 1, block):
                weights[i, k] -= error * factor[j, k]


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


def scales_of(rows: torch.Tensor, columns: torch.Tensor) -> Scales:
    """Scales nearest to wanted steps ``rows[r, group] · columns[c]``.

    Args:
        rows: positive ``(out, groups)``.
        columns: positive ``(in,)``.

    Steps farther than 2^15 from the geometric mean, which becomes the unit, are drawn in.
    """

    def codes(factors: torch.Tensor) -> tuple[torch.Tensor, float]:
        logs = factors.double().clamp(min=1e-30, max=1e30).log2()
        middle = float(logs.mean())
        return ((logs - middle) * OCTAVE).round().clamp(-120, 120).to(torch.int8), middle

    (of_rows, one), (of_columns, other) = codes(rows), codes(columns)
    return Scales(of_rows, of_columns, float(torch.tensor(2.0 ** (one + other), dtype=torch.float32)))

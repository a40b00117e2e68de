"""Every hot operation on indices and votes, as functions on tensors: snap, dequantize, cast votes, apply votes.

Three backends behind one signature, with the same bits: ``torch`` (the reference: plain tensor operations on any
device, worked in slices), ``numba`` (the CPU's: one fused pass per operation, a weight is read and written once) and
``cuda`` (the same for NVIDIA cards: ``ghost_kernels_cuda``, all but the snap, which is no part of a step).
``backend_for`` chooses by device and says which; nothing falls back in silence.

The rule ``momentum`` in symbols (``momentum_rules`` has all of it). K micro-batches a step, g the gradient of one
micro-batch's loss, its columns scaled, SR unbiased stochastic rounding, U the votes per row RMS (``VoteUnits.unit``):

    cast   f = rint(2^16 · yardstick[row] · g)        with yardstick = (1 - β) U / (K · rms[row])
           votes -= (f + r) >> 16                     r uniform in [0, 2^16): E[vote] is exactly f / 2^16
           row_squares[row] += Σ f^2                  how large a micro-batch's gradient is, and
           row_sketch[row]  += Σ ±f                   how large their sum is: signs by the element's hash, the same in
                                                      all micro-batches, so E[row_sketch^2] = Σ (Σ_k f_k)^2, the
                                                      squared norm of a sum that is never formed (Alon, Matias and
                                                      Szegedy 1996)
    apply  votes  = votes within ±reach
           target = value[index] + stride[row] · votes, in fixed point with 40 fractional bits, clipped to ±1
           index  = one of the two entries around target, drawn so that its expectation is target
           votes  = SR(β · votes)

Casting reads a float gradient and is the last place where a float occurs: what applies votes is integers from end to
end, in all backends. ``vote_units`` has how a buffer's range is shared and where randomness comes from.

Rejected: normalising a micro-batch by its own gradient's RMS (a row that sees only noise would vote as loud as one with
signal); float noise from a generator (its bits depend on device and order).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

import ghost_kernels_cpu as cpu
import ghost_kernels_cuda as cuda
import ghost_kernels_torch as reference
from manifolds import FIXED_BITS, Manifold
from row_threads import run_rows
from vote_units import COLUMNS_MAX, REACH_MAX, WHISPER_BITS, WHISPER_LIMIT, KernelError, VoteUnits


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
        return "cuda" if kind == "cuda" and cuda.available(device) else "torch"
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
        cuda.dequantize(_dense(indices), _dense(scale.detach()), manifold, out)
    elif name == "numba":
        arrays = (indices.numpy(), scale.detach().numpy(), manifold.values.numpy())
        if dtype == torch.float32:
            run_rows(cpu.dequantize_rows, rows, indices.numel(), *arrays, out.numpy())
        else:
            run_rows(cpu.dequantize_rows_bfloat16, rows, indices.numel(), *arrays, out.view(torch.uint16).numpy())
    else:
        reference.dequantize(indices, scale.detach(), manifold, out)
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
        parts = np.empty((rows, 4))
        arrays = (weights.numpy(), scale.numpy(), *tables, bits, out.numpy(), parts)
        run_rows(cpu.snap_rows, rows, weights.numel(), *arrays)
        sums = parts.sum(axis=0)
    else:
        sums = np.zeros(4)
        reference.snap(weights, scale, manifold, out, sums)
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
    if name == "numba" and not cpu.all_below(rows.numpy(), out_rows):
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
        cuda.cast(
            *(_dense(gradient), rows, yardstick, votes, row_squares, row_sketch),
            keys=keys,
            offset=offset,
            limit=units.limit,
            wide=units.wide,
            shift=units.stat_shift,
            sign=sign,
            control=control,
            mark=mark,
        )
    elif name == "numba":
        read = gradient if gradient.dtype == torch.float32 else gradient.view(torch.uint16)
        arrays = (read.numpy(), rows.numpy(), yardstick.numpy(), votes.numpy())
        sums = (row_squares.numpy(), row_sketch.numpy())
        plain = (np.uint32(keys[0]), np.uint32(keys[1]), np.uint32(offset), np.int32(units.limit), np.int32(units.wide))
        signs = (np.int32(units.stat_shift), np.int32(sign))
        run_rows(cpu.cast_rows, len(rows), gradient.numel(), *arrays, *sums, gradient.shape[1], *plain, *signs)
    else:
        reference.cast(gradient, rows, yardstick, votes, row_squares, row_sketch, keys, offset, units, sign)


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
        cuda.whispers(
            *(_dense(gradient), rows, yardstick, gate, votes, row_sizes, row_squares),
            one=float(1 << WHISPER_BITS),
            top=float(WHISPER_LIMIT << WHISPER_BITS),
            sign=sign,
            mark=mark,
        )
    elif name == "numba":
        arrays = (votes.numpy(), row_sizes.numpy(), row_squares.numpy(), np.int32(sign))
        read = (gradient.numpy(), rows.numpy(), yardstick.numpy(), np.int32(gate))
        run_rows(cpu.whisper_rows, len(rows), gradient.numel(), *read, *arrays)
    else:
        reference.whispers(gradient, rows, yardstick, gate, votes, row_sizes, row_squares, sign)


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


def _count_rows(kernel: Callable[..., None], indices: torch.Tensor, *arguments: object) -> tuple[int, int, int]:
    """Run a row kernel whose last argument before its rows is counts, and add these up."""
    counts = np.empty((len(indices), 3), dtype=np.int64)
    run_rows(kernel, len(indices), indices.numel(), *arguments, counts)
    flips, travel, clipped = counts.sum(axis=0)
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
    reach: int = REACH_MAX,
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
        reach: most votes of one weight that count, 1 to 2^15; what is beyond moves nothing and is not kept.

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
    if not 1 <= reach <= REACH_MAX:
        raise KernelError(f"reach is {reach}, expected 1 to {REACH_MAX}")
    name = backend_for(indices.device, backend)
    if name == "torch":
        return reference.apply(indices, votes, stride, manifold, keys, decay, carry, shrink, reach)
    if name == "cuda":
        _all_dense(indices, votes)
        return _read_counts(cuda.apply(indices, votes, _dense(stride), manifold, keys, decay, carry, shrink, reach))
    tables = (manifold.fixed.numpy(), manifold.fixed_buckets.numpy(), indices.shape[1])
    plain = (np.array(keys, dtype=np.uint32), np.int64(decay), np.int64(carry), np.int64(shrink), np.int64(reach))
    if votes is None:
        bits = np.int64(manifold.vote_bits)
        return _count_rows(cpu.apply_words, indices, indices.numpy(), bits, stride.numpy(), *tables, *plain)
    return _count_rows(cpu.apply_rows, indices, indices.numpy(), votes.numpy(), stride.numpy(), *tables, *plain)


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
        return reference.flip(indices, votes, stride, manifold, keys, threshold, jitter, chance, decay, carry)
    if name == "cuda":
        _all_dense(indices, votes)
        plain_numbers = (threshold, jitter, chance, decay, carry)
        return _read_counts(cuda.flip(indices, votes, _dense(stride), manifold, keys, *plain_numbers))
    arrays = (indices.numpy(), votes.numpy(), stride.numpy(), manifold.fixed.numpy(), indices.shape[1])
    plain = (np.int64(x) for x in (threshold, jitter, chance, decay, carry))
    return _count_rows(cpu.flip_rows, indices, *arrays, np.array(keys, dtype=np.uint32), *plain)

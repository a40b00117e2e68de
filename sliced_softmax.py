"""Softmax cross-entropy over a vocabulary that is seen slice by slice, with one pass over each slice's logits.

``observe`` folds a slice into what is known of each token: the largest logit, the sum of the exponentials below it
(online softmax, Milakov and Gimelshein 2018) and the target's own logit. ``turn_into_gradient`` makes a slice's logits
the gradient of the loss with respect to them, in place. Both take logits in the type of the products and compute in
float32; where that is bfloat16, no slice of logits exists in float32.

Written in tensor operations this is ten passes over memory, most of them into fresh pages, and on a CPU took 3% of a
training step. So the CPU has compiled kernels that read a row twice while it is in the cache, NVIDIA cards have theirs
(``ghost_kernels_cuda``), and elsewhere, and as a reference, tensor operations do it. The CPU kernels' exponential is
Cephes' polynomial (Moshier), exact to float32's last bit or two, because a library's is a call for each number and
would not vectorise. Unlike indices and votes, these are
floats: the backends agree to rounding, and a row's result does not depend on threads.
"""

from __future__ import annotations

import numba
import numpy as np
import torch

import ghost_kernels_cuda as cuda_kernels
from ghost_kernels import backend_for
from ghost_kernels_cpu import as_float
from row_threads import compiled, deal, run_rows, team_of

_LANES = 64
_BLOCK = 1024
"""Exponentials that are added up in float32, before the sum goes on in float64."""


@numba.extending.register_jitable
def _exp(x):
    """Of a float32 up to about 0; NaN stays NaN."""
    x = np.float32(-87.0) if x < np.float32(-87.0) else x
    n = np.float32(np.rint(x * np.float32(1.44269504)))
    # ln 2 in two parts, the first of which n times is exact.
    r = np.float32(np.float32(x - n * np.float32(0.693359375)) + n * np.float32(2.12194440e-4))
    p = np.float32(1.9875691500e-4) * r + np.float32(1.3981999507e-3)
    p = p * r + np.float32(8.3334519073e-3)
    p = p * r + np.float32(4.1665795894e-2)
    p = p * r + np.float32(1.6666665459e-1)
    p = p * r + np.float32(5.0000001201e-1)
    p = p * r * r + r + np.float32(1.0)
    return np.float32(p) * np.uint32(np.uint32(np.int32(n) + np.int32(127)) << np.uint32(23)).view(np.float32)


def _stored(number, like):
    """A float32 in the type of an array's numbers: itself, or the bits of a bfloat16; for compiled code only."""
    raise NotImplementedError


@numba.extending.overload(_stored, inline="always")
def _stored_typed(number, like):
    if isinstance(like, numba.types.Float):
        return lambda number, like: number

    def rounded(number, like):
        bits = np.float32(number).view(np.uint32)
        even = np.uint32(np.uint32(bits + np.uint32(0x7FFF)) + np.uint32((bits >> np.uint32(16)) & np.uint32(1)))
        # What is not finite must stay so: rounding up the bits of a NaN may end anywhere.
        return np.uint16((even if number == number else np.uint32(0x7FC00000)) >> np.uint32(16))

    return rounded


# Sums may be added up in any order, so that they vectorise.
@compiled(fastmath={"reassoc", "contract"})
def _observe_rows(logits, targets, first, top, total, picked, start, stop):
    columns = logits.shape[1]
    whole = columns // _LANES * _LANES
    lanes = np.empty(_LANES, np.float32)
    for i in range(start, stop):
        largest = top[i]
        lanes[:] = largest
        for a in range(0, whole, _LANES):
            for j in range(_LANES):
                x = as_float(logits[i, a + j])
                lanes[j] = x if x > lanes[j] else lanes[j]
        for j in range(_LANES):
            largest = lanes[j] if lanes[j] > largest else largest
        for j in range(whole, columns):
            x = as_float(logits[i, j])
            largest = x if x > largest else largest
        sum_of_all = np.float64(total[i] * np.exp(np.float32(top[i] - largest)))
        for a in range(0, columns, _BLOCK):
            part = np.float32(0.0)
            for j in range(a, min(a + _BLOCK, columns)):
                part += _exp(np.float32(as_float(logits[i, j]) - largest))
            sum_of_all += part
        total[i] = sum_of_all
        top[i] = largest
        place = targets[i] - first
        if 0 <= place < columns:
            picked[i] = as_float(logits[i, place])


@team_of(_observe_rows)
def _observe_rows_team(rows, pieces, threads, *arguments):
    return deal(_observe_rows, arguments, rows, pieces, threads)


@compiled(fastmath={"contract"})
def _gradient_rows(logits, targets, first, norm, factor, start, stop):
    columns = logits.shape[1]
    row = np.empty(columns, np.float32)
    for i in range(start, stop):
        z = norm[i]
        share = factor if targets[i] >= 0 else np.float32(0.0)
        for j in range(columns):
            row[j] = _exp(np.float32(as_float(logits[i, j]) - z)) * share
        place = targets[i] - first
        if 0 <= place < columns:
            row[place] -= share
        for j in range(columns):
            logits[i, j] = _stored(row[j], logits[i, j])


@team_of(_gradient_rows)
def _gradient_rows_team(rows, pieces, threads, *arguments):
    return deal(_gradient_rows, arguments, rows, pieces, threads)


def _numbers(logits: torch.Tensor) -> np.ndarray:
    return (logits.view(torch.uint16) if logits.dtype == torch.bfloat16 else logits).numpy()


def _backend(logits: torch.Tensor) -> str:
    return backend_for(logits.device) if logits.dtype in (torch.float32, torch.bfloat16) else "torch"


def observe(
    logits: torch.Tensor,
    targets: torch.Tensor,
    first: int,
    top: torch.Tensor,
    total: torch.Tensor,
    picked: torch.Tensor,
) -> None:
    """Fold a slice of logits into what is known of each token.

    Args:
        logits: float ``(tokens, columns)``, of the vocabulary's entries ``first`` to ``first + columns``.
        targets: int64 ``(tokens,)``, numbers in the whole vocabulary, or one below 0: a token without a target.
        first: number of the slice's first entry.
        top: float32 ``(tokens,)``, mutated: the largest logit so far, -inf before the first slice.
        total: float32 ``(tokens,)``, mutated: sum of ``exp(logit - top)`` so far, 0 before the first slice.
        picked: float32 ``(tokens,)``, mutated: the target's logit, where the target lies in this slice.
    """
    name = _backend(logits)
    if name == "cuda":
        cuda_kernels.observe(logits.contiguous(), targets.contiguous(), first, top, total, picked)
        return
    if name == "numba":
        arrays = (targets.numpy(), first, top.numpy(), total.numpy(), picked.numpy())
        run_rows(_observe_rows, len(logits), logits.numel(), _numbers(logits), *arrays)
        return
    logits = logits.float()
    largest = torch.maximum(top, logits.max(1).values)
    total.mul_((top - largest).exp()).add_((logits - largest[:, None]).exp_().sum(1))
    top.copy_(largest)
    here = (targets >= first) & (targets < first + logits.shape[1])
    column = (targets - first).clamp(0, logits.shape[1] - 1)
    picked.copy_(torch.where(here, logits.gather(1, column[:, None])[:, 0], picked))


def turn_into_gradient(
    logits: torch.Tensor, targets: torch.Tensor, first: int, norm: torch.Tensor, factor: torch.Tensor
) -> torch.Tensor:
    """``factor · (softmax - one hot)`` of a slice, in the type of the logits.

    Args:
        logits: float ``(tokens, columns)``, as in :func:`observe`; of no use afterwards.
        targets, first: as there.
        norm: float32 ``(tokens,)``: the logarithm of the sum of all exponentials.
        factor: float32 scalar: the gradient of what is made of the loss.

    Returns:
        The gradient with respect to the logits, in their memory where they are compiled code's; 0 for a token without
        a target.
    """
    name = _backend(logits)
    if name == "cuda":
        logits = logits.contiguous()
        cuda_kernels.softmax_gradient(logits, targets.contiguous(), first, norm, factor)
        return logits
    if name == "numba":
        arrays = (targets.numpy(), first, norm.numpy(), np.float32(factor.item()))
        run_rows(_gradient_rows, len(logits), logits.numel(), _numbers(logits), *arrays)
        return logits
    part = logits.float().sub_(norm[:, None]).exp_()
    here = ((targets >= first) & (targets < first + logits.shape[1])).nonzero()[:, 0]
    part[here, targets[here] - first] -= 1.0
    return part.mul_(torch.where(targets[:, None] < 0, 0.0, factor)).to(logits.dtype)

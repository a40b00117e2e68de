"""The CUDA backend of ``ghost_kernels``: the same operations by the kernels of ``ghost_kernels.cu``, for NVIDIA cards.

Arguments are checked by whoever calls; here they become pointers and sizes. Nothing waits for the device but what
returns numbers, so a training step can be queued ahead of it, or recorded once and replayed.
"""

from __future__ import annotations

import functools
import logging
import weakref
from ctypes import c_float, c_int, c_longlong, c_uint, c_ulonglong, c_void_p
from pathlib import Path

import torch

from cuda_compiler import CudaCompilerError, Module
from manifolds import Manifold

SOURCE = Path(__file__).resolve().parent / "ghost_kernels.cu"
_NULL = c_void_p(0)
_THREADS = 256
_ROW_THREADS = 64
"""A thread casts eight elements at a time: few rows are so short that some have none."""
_TYPES = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.int8: "int8", torch.int16: "int16"}
_near: weakref.WeakKeyDictionary[Manifold, torch.Tensor] = weakref.WeakKeyDictionary()


@functools.cache
def module_of(device: torch.device) -> Module:
    """The compiled kernels for a device; compiled at the first call in a process, in about half a second."""
    return Module(SOURCE.read_text(encoding="utf-8"), device)


@functools.cache
def available(device: torch.device) -> bool:
    """Whether the kernels can be had for a device; why not is logged, once."""
    try:
        module_of(device)
    except CudaCompilerError as error:
        logging.getLogger(__name__).warning("tensor operations serve %s, ten times slower: %s", device, error)
        return False
    return True


def _pointer(tensor: torch.Tensor | None) -> c_void_p:
    return _NULL if tensor is None else c_void_p(tensor.data_ptr())


def _magnitudes(manifold: Manifold) -> torch.Tensor:
    """Magnitudes of the table by level, float32 ``(32769,)`` or ``(513,)``: it is antisymmetric, and the last is that
    of the lowest level, which has no mirror image."""
    if manifold not in _near:
        upper = manifold.values[32768 :: 1 << manifold.vote_bits]
        _near[manifold] = torch.cat([upper, -manifold.values[:1]]).contiguous()
    return _near[manifold]


def dequantize(indices: torch.Tensor, scale: torch.Tensor, manifold: Manifold, out: torch.Tensor) -> None:
    """As :func:`ghost_kernels.dequantize`, into ``out``."""
    module, table = module_of(indices.device), _magnitudes(manifold)
    count, columns = indices.numel(), indices.shape[1]
    if count == 0:
        return
    width = 8 if columns % 8 == 0 else 1
    blocks = min(8 * module.processors, -(-count // (width * _THREADS)))
    name = f"dequantize_{_TYPES[out.dtype]}{'_words' if manifold.vote_bits else ''}"
    pointers = map(_pointer, (indices, scale, table, out))
    module.launch(name, blocks, _THREADS, *pointers, c_ulonglong(count), c_uint(columns))


def cast(
    gradient: torch.Tensor,
    rows: torch.Tensor,
    yardstick: torch.Tensor,
    votes: torch.Tensor,
    squares: torch.Tensor,
    sketch: torch.Tensor,
    *,
    keys: tuple[int, int],
    offset: int,
    limit: int,
    wide: int,
    shift: int,
    sign: int,
    control: torch.Tensor | None,
    mark: torch.Tensor | None,
) -> None:
    """As :func:`ghost_kernels.cast_votes`."""
    name = f"cast_{_TYPES[gradient.dtype]}_{_TYPES[votes.dtype]}"
    pointers = map(_pointer, (gradient, rows, yardstick, votes, squares, sketch))
    draws = map(c_uint, (gradient.shape[1], *keys, offset))
    numbers = map(c_int, (limit, wide, shift, sign))
    places = map(_pointer, (control, mark))
    module_of(gradient.device).launch(name, len(rows), _ROW_THREADS, *pointers, *draws, *numbers, *places)


def whispers(
    gradient: torch.Tensor,
    rows: torch.Tensor,
    yardstick: torch.Tensor,
    gate: int,
    votes: torch.Tensor,
    sizes: torch.Tensor,
    squares: torch.Tensor,
    *,
    one: float,
    top: float,
    sign: int,
    mark: torch.Tensor | None,
) -> None:
    """As :func:`ghost_kernels.cast_whispers`; ``one`` and ``top`` are its fixed point and limit."""
    read, written = map(_pointer, (gradient, rows, yardstick)), map(_pointer, (votes, sizes, squares))
    numbers = (c_uint(gradient.shape[1]), c_float(one), c_float(top), c_int(sign))
    module_of(gradient.device).launch(
        f"whispers_{_TYPES[votes.dtype]}",
        len(rows),
        _ROW_THREADS,
        *read,
        c_int(gate),
        *written,
        *numbers,
        _pointer(mark),
    )


def _counts(device: torch.device) -> torch.Tensor:
    return torch.zeros(3, dtype=torch.int64, device=device)


def apply(
    indices: torch.Tensor,
    votes: torch.Tensor | None,
    stride: torch.Tensor,
    manifold: Manifold,
    keys: tuple[int, int, int, int],
    decay: int,
    carry: int,
    shrink: int,
    reach: int,
) -> torch.Tensor:
    """As :func:`ghost_kernels.apply_votes`; the three counts, int64 ``(3,)``, stay on the device."""
    counts = _counts(indices.device)
    pointers = map(_pointer, (indices, votes, stride, manifold.fixed, manifold.fixed_buckets))
    sizes = (c_uint(indices.shape[1]), c_uint(manifold.top), c_int(manifold.vote_bits))
    draws, plain = map(c_uint, keys), map(c_longlong, (decay, carry, shrink, reach))
    name = "apply_words" if votes is None else f"apply_{_TYPES[votes.dtype]}"
    launch = module_of(indices.device).launch
    launch(name, len(indices), _THREADS, *pointers, *sizes, *draws, *plain, _pointer(counts))
    return counts


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
) -> torch.Tensor:
    """As :func:`ghost_kernels.flip_by_majority`; the three counts, int64 ``(3,)``, stay on the device."""
    counts = _counts(indices.device)
    pointers = map(_pointer, (indices, votes, stride, manifold.fixed))
    sizes = (c_uint(indices.shape[1]), c_int(manifold.top))
    draws, small = map(c_uint, keys), map(c_int, (threshold, jitter, chance))
    plain = (c_longlong(decay), c_longlong(carry), _pointer(counts))
    launch = module_of(indices.device).launch
    launch(f"flip_{_TYPES[votes.dtype]}", len(indices), _THREADS, *pointers, *sizes, *draws, *small, *plain)
    return counts


def observe(
    logits: torch.Tensor,
    targets: torch.Tensor,
    first: int,
    top: torch.Tensor,
    total: torch.Tensor,
    picked: torch.Tensor,
) -> None:
    """As :func:`sliced_softmax.observe`."""
    read, written = map(_pointer, (logits, targets)), map(_pointer, (top, total, picked))
    launch = module_of(logits.device).launch
    name = f"observe_{_TYPES[logits.dtype]}"
    launch(name, len(logits), _THREADS, *read, c_longlong(first), *written, c_uint(logits.shape[1]))


def softmax_gradient(
    logits: torch.Tensor, targets: torch.Tensor, first: int, norm: torch.Tensor, factor: torch.Tensor
) -> None:
    """As :func:`sliced_softmax.turn_into_gradient`, in place."""
    places, numbers = map(_pointer, (logits, targets)), map(_pointer, (norm, factor))
    launch = module_of(logits.device).launch
    name = f"softmax_gradient_{_TYPES[logits.dtype]}"
    launch(name, len(logits), _THREADS, *places, c_longlong(first), *numbers, c_uint(logits.shape[1]))


def gather_rows(gradient: torch.Tensor, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The gradient of an embedding's rows from that of its output, in shapes that do not depend on the ids.

    Args:
        gradient: float32 ``(tokens, in)``.
        ids: int64 ``(tokens,)``.

    Returns:
        float32 ``(tokens, in)``, one row for each id that occurs, added up in the order of the tokens, the others not
        written; and which row of the embedding each is, int64 ``(tokens,)``, -1 for those.
    """
    ordered, order = torch.sort(ids, stable=True)
    summed, rows = torch.empty_like(gradient), torch.empty_like(ids)
    pointers = map(_pointer, (gradient, order, ordered, summed, rows))
    module_of(gradient.device).launch("gather_rows", len(ids), _THREADS, *pointers, *map(c_uint, gradient.shape))
    return summed, rows

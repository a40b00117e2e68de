"""The weights of a PRIME checkpoint as dense tensors, one at a time and in the source model's names.

Every export reads a checkpoint through this module. A tensor is dequantized when it is asked for, a slice of rows at a
time, so an export needs memory for one tensor and not for a model; the checkpoint itself stays mapped from its file.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import ghost_kernels as kernels
from ghost_grid import SLICE_ELEMENTS
from manifolds import Manifold
from packed_checkpoint import open_checkpoint
from prime_checkpoint import CheckpointError
from qwen_prime_wrapper import build_model, manifold_of, source_name, tensor_mismatches, tokenizer_files

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class ExportError(RuntimeError):
    """A checkpoint that the asked format cannot hold."""


@dataclass(frozen=True)
class DenseWeight:
    """One weight, norm or bias.

    Attributes:
        name: as in the source model, ``....weight`` or ``....bias``.
        shape: ``(out, in)`` of a weight, ``(out,)`` of norms and biases.
        words: int16 of that shape, or the float32 values themselves.
        scale: float32 ``(out,)``; None for norms and biases.
        manifold: the checkpoint's.
    """

    name: str
    shape: tuple[int, ...]
    words: torch.Tensor
    scale: torch.Tensor | None
    manifold: Manifold

    def slices(self, dtype: torch.dtype = torch.float32) -> Iterator[torch.Tensor]:
        """The values in ``dtype``, consecutive rows of at most ``SLICE_ELEMENTS`` weights at a time.

        Raises:
            ExportError: a value is beyond the range of ``dtype``.
        """
        if self.scale is None:
            yield self._rounded(self.words, dtype)
            return
        step = max(1, SLICE_ELEMENTS // self.shape[1])
        for start in range(0, self.shape[0], step):
            rows = slice(start, start + step)
            # A mapped tensor of a read-only file is copied: kernels take views of its bytes.
            words, scale = self.words[rows].clone(), self.scale[rows].clone()
            yield self._rounded(kernels.dequantize(words, scale, self.manifold), dtype)

    def _rounded(self, values: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        rounded = values.to(dtype)
        if not torch.isfinite(rounded).all():
            raise ExportError(
                f"{self.name} has |values| up to {float(values.abs().max()):.6g}, beyond {str(dtype)[6:]}'s "
                f"{torch.finfo(dtype).max:g}: export it as bfloat16 or float32"
            )
        return rounded


@dataclass(frozen=True)
class DenseSource:
    """A checkpoint that was found to fit its own config."""

    path: Path
    checkpoint: dict[str, Any]
    manifold: Manifold
    weights: list[DenseWeight]

    @property
    def config(self) -> dict[str, Any]:
        """The source model's config.json."""
        return dict(self.checkpoint["hf_config"])

    @property
    def tied(self) -> bool:
        """Whether the head is the embedding; it is then not among the weights."""
        return bool(self.config.get("tie_word_embeddings", False))

    @property
    def files(self) -> dict[str, bytes]:
        """Tokenizer, template and generation config as the source had them, by file name."""
        return tokenizer_files(self.checkpoint)


def open_dense(path: Path) -> DenseSource:
    """Read and check a PRIME checkpoint, packed or not, for export; no weight is dequantized yet.

    Raises:
        CheckpointError, ModelError: not a checkpoint, damaged, or its tensors do not fit its config.
    """
    checkpoint = open_checkpoint(path)
    manifold = manifold_of(checkpoint)
    model = build_model(checkpoint["hf_config"], manifold, "the checkpoint's config")
    tokenizer_files(checkpoint)
    tensors = checkpoint["model"]
    if wrong := tensor_mismatches(model, tensors):
        raise CheckpointError(f"{path} does not fit its own config: {wrong[0]}")
    weights = [
        DenseWeight(
            source_name(name),
            tuple(tensor.shape),
            tensor,
            tensors[name.removesuffix("indices") + "scale"] if name.endswith(".grid.indices") else None,
            manifold,
        )
        for name, tensor in tensors.items()
        if not name.endswith(".grid.scale")
    ]
    return DenseSource(path, checkpoint, manifold, weights)

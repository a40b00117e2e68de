"""Healing by votes: the trainer on a packed grid.

Rounding moves a model off its optimum in thousands of small ways that error compensation cannot see. Healing trains it
back at the resolution that it will be stored in. A ``PackedGrid`` is a grid whose forward and backward passes see the
rounded weights, while votes move the 16-bit indices behind them (straight-through estimation, arXiv 1308.3432): a
weight that is pushed far enough crosses to the next code, one that is pushed to and fro stays. The indices begin where
the weights were before they were rounded, the errors of others in them: next to the border of two codes a nudge
decides, and most of healing is done there. Tables, steps and scales do not change, so the file grows by no more than
what its codes' entropy does; nothing is float but norms and biases, which learn as in any training by votes.

It is training, on the text that it is given: what it learns of that text comes on top of what it mends. A fair
comparison gives the unpacked model the same steps.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from transformers import PreTrainedModel

import low_bit
from ghost_core import GhostEmbedding, GhostLinearTandem, grids_of
from ghost_grid import GhostGrid
from low_bit import LowBitGrid
from packed_batches import PackedBatches
from training_recipe import Recipe
from vote_trainer import VoteTrainer


class PackedGrid(GhostGrid):
    """A grid that computes with its rounded weights and votes on the indices behind them.

    Args:
        grid: the one whose place it takes.
        packed: the codes.
        start: float32 ``(out, in)``, weights whose nearest codes these are; by default the codes' own.
    """

    def __init__(self, grid: GhostGrid, packed: LowBitGrid, start: torch.Tensor | None = None) -> None:
        super().__init__(*grid.shape, grid.manifold, grid.ballot)
        self.name, self.uses = grid.name, grid.uses
        self.packed = packed
        self.import_weights(packed.weights() if start is None else start)

    def _codes(self, weights: torch.Tensor, rows: slice | torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        packed = self.packed
        steps = packed.scales.steps(rows)
        return low_bit.nearest(weights, steps, packed.name, packed.top), steps

    def _round(self, weights: torch.Tensor, rows: slice | torch.Tensor) -> torch.Tensor:
        codes, steps = self._codes(weights, rows)
        return low_bit.table(self.packed.name, self.packed.top)[codes.int() + self.packed.top] * steps

    def dequantize(self, rows: slice = slice(None), dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """Rounded weights of a range of rows, ``(rows, in)``."""
        return self._round(super().dequantize(rows), rows).to(dtype)

    def lend(self, rows: slice, dtype: torch.dtype) -> torch.Tensor:
        """As :meth:`dequantize`."""
        return self.dequantize(rows, dtype)

    def dequantize_rows(self, rows: torch.Tensor) -> torch.Tensor:
        """Rounded weights of chosen rows: int64 ``(n,)`` to float32 ``(n, in)``."""
        return self._round(super().dequantize_rows(rows), rows)

    def rounded(self) -> LowBitGrid:
        """What it computes with, in codes."""
        codes, _ = self._codes(super().dequantize(), slice(None))
        return LowBitGrid(codes, self.packed.scales, self.packed.name, self.packed.top)


def put_on_packed_grids(
    model: PreTrainedModel,
    packed: dict[str, LowBitGrid],
    start: Callable[[GhostGrid, LowBitGrid], torch.Tensor] | None = None,
) -> None:
    """Replace every grid of ``model`` (mutated) by its :class:`PackedGrid`; a tied head keeps sharing one.

    Args:
        start: from a grid and its codes to where its indices begin; one grid at a time.
    """
    twins: dict[str, PackedGrid] = {}
    for module in list(model.modules()):
        if isinstance(module, GhostLinearTandem | GhostEmbedding):
            grid, name = module.grid, module.grid.name
            if name not in twins:
                twins[name] = PackedGrid(grid, packed[name], start(grid, packed[name]) if start else None)
            module.grid = twins[name]


def heal(model: PreTrainedModel, batches: PackedBatches, recipe: Recipe) -> Iterator[float]:
    """Train a model on packed grids by votes; afterwards :func:`rounded_grids` has the codes.

    Args:
        model: see :func:`put_on_packed_grids`; mutated, its norms and biases learn as well.

    Yields:
        The loss of each step, nats per answer token.
    """
    trainer = VoteTrainer(model, batches, recipe)
    for _ in range(recipe.steps):
        yield trainer.step().loss
    model.eval()


def rounded_grids(model: PreTrainedModel) -> dict[str, LowBitGrid]:
    """The codes of a model on packed grids."""
    return {name: grid.rounded() for name, grid in grids_of(model).items() if isinstance(grid, PackedGrid)}

"""Layers whose weights are grid indices, and the votes that move them.

A ``GhostGrid`` holds one weight matrix: int16 indices ``(out, in)`` into the manifold and a float32 scale per row;
weight = manifold[index] * scale[row]. ``GhostLinearTandem``, ``GhostEmbedding`` and ``ghost_cross_entropy`` are three
uses of a grid; a tied head is the same grid in two places, with one vote buffer.

Nothing dense outlives its use. The forward pass dequantizes a slice of rows, multiplies, drops it (on the CPU into one
small buffer for all grids); the backward pass dequantizes it again for the gradient of the input, and turns the slice's
weight gradient into integer votes at once.
Votes are cast in the backward pass only, so recomputing a forward pass (gradient checkpointing) never votes twice.

Who may vote is explicit: a grid votes while it is unlocked (its buffer exists) and its ``Ballot`` is open. Flags such
as ``requires_grad`` have no say over integers. Closed, the same modules are an ordinary frozen network, and a locked
grid costs no weight gradient; nothing below the lowest open grid is visited by the backward pass at all.

What votes mean and do is the vote rule's business (``momentum_rules``, ``whisper_rules``); this module only brings
gradients to it.
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

import ghost_kernels as kernels
import ghost_kernels_cuda as cuda_kernels
import sliced_softmax
from ballots import Ballot
from ghost_grid import USE_EMBEDDING, USE_LINEAR, GhostGrid, recording, row_range

KEPT_LOGITS = 1 << 27
"""Most bytes of logits that wait for their backward pass: in bfloat16, 512 tokens of a Qwen vocabulary are 148 MiB."""


class _KeepFunction(torch.autograd.Function):
    """Saves the input of a product for its votes, and on a card its dense weights, before the product is computed.

    Gradient checkpointing ends a recomputation at the last tensor that the first pass saved, and what a Function saves
    counts only when its forward is done. Saved by the product itself, every layer's last product would be computed
    once more for nothing: with a wide MLP a sixteenth of a step's products.

    Under checkpointing nothing that is saved outlives the first pass; what the second pass saves waits for the backward
    pass of its own layer only. So a card dequantizes twice instead of three times, for a layer's weights in memory.
    """

    @staticmethod
    def forward(ctx, anchor: torch.Tensor, x: torch.Tensor, weights: torch.Tensor | None, contexts: list):
        ctx.save_for_backward(x, weights)
        contexts.append(ctx)
        return anchor.detach()

    @staticmethod
    def backward(ctx, gradient: torch.Tensor):
        return None, None, None, None


class _LinearFunction(torch.autograd.Function):
    """``x @ W.T`` over a grid, row slice by row slice; the backward casts votes.

    ``keeper`` is the context of the :class:`_KeepFunction` that holds ``x``, None where no gradient is wanted;
    ``weights`` are all of the grid's where these are kept, else None.
    """

    @staticmethod
    def forward(
        ctx, x: torch.Tensor, anchor: torch.Tensor | None, weights: torch.Tensor | None, keeper: Any, grid: GhostGrid
    ) -> torch.Tensor:
        ctx.grid, ctx.keeper, ctx.shape = grid, keeper, x.shape
        flat = x.reshape(-1, x.shape[-1])
        parts = list(grid.slices())
        if len(parts) == 1:
            out = flat @ (grid.lend(parts[0], x.dtype) if weights is None else weights).T
        else:
            out = flat.new_empty(len(flat), grid.shape[0])
            for rows in parts:
                out[:, rows] = flat @ grid.lend(rows, x.dtype).T
        return out.view(*x.shape[:-1], grid.shape[0])

    @staticmethod
    def backward(ctx, gradient: torch.Tensor):
        grid: GhostGrid = ctx.grid
        gradient = gradient.reshape(-1, grid.shape[0])
        votes = ctx.keeper is not None and grid.wants_gradient()
        flat = weights = below = None
        if votes:
            flat, weights = ctx.keeper.saved_tensors
            flat = grid.shared(flat.reshape(-1, grid.shape[1]))
        for k, rows in enumerate(grid.slices()):
            part = gradient[:, rows]
            if ctx.needs_input_grad[0]:
                product = part @ (grid.lend(rows, gradient.dtype) if weights is None else weights)
                below = product if below is None else below.add_(product)
            if flat is not None:
                grid.accept(part.T @ flat, row_range(rows.start, rows.stop, flat.device), USE_LINEAR, k)
        return None if below is None else below.view(ctx.shape), None, None, None, None


def _linear(x: torch.Tensor, grid: GhostGrid) -> torch.Tensor:
    """``x @ W.T`` of a grid, float ``(..., in)`` to ``(..., out)``; its backward casts votes."""
    anchor = grid.anchor if torch.is_grad_enabled() else None
    contexts: list[Any] = []
    weights = None
    if anchor is not None:
        if grid.keeps and x.is_cuda and grid.in_one_slice:
            weights = grid.dequantize(dtype=x.dtype)
        anchor = _KeepFunction.apply(anchor, x.detach(), weights, contexts)
    return _LinearFunction.apply(x, anchor, weights, contexts[0] if contexts else None, grid)


class _EmbeddingFunction(torch.autograd.Function):
    """Rows of a grid by token id; the backward casts votes for the rows that occurred."""

    @staticmethod
    def forward(ctx, ids: torch.Tensor, anchor: torch.Tensor | None, grid: GhostGrid) -> torch.Tensor:
        # While passes are recorded nothing can be asked; whoever records looks at the ids first.
        if not recording(ids) and ids.numel() and int(ids.min()) < 0:
            raise IndexError(f"token id {int(ids.min())} is negative, expected 0 to {grid.shape[0] - 1}")
        ctx.grid = grid
        ctx.save_for_backward(ids)
        return grid.dequantize_rows(ids.reshape(-1)).view(*ids.shape, grid.shape[1])

    @staticmethod
    def backward(ctx, gradient: torch.Tensor):
        (ids,) = ctx.saved_tensors
        grid: GhostGrid = ctx.grid
        if grid.wants_gradient():
            flat = grid.shared(gradient.reshape(-1, grid.shape[1]).float())
            if kernels.backend_for(flat.device, grid.ballot.backend) == "cuda":
                summed, rows = cuda_kernels.gather_rows(flat.contiguous(), ids.reshape(-1))
                if not recording(ids):
                    summed, rows = summed[rows >= 0], rows[rows >= 0]
            else:
                rows, place = torch.unique(ids, return_inverse=True)
                summed = torch.zeros(len(rows), grid.shape[1], device=gradient.device)
                summed.index_add_(0, place.reshape(-1), flat)
            grid.accept(summed, rows, USE_EMBEDDING)
        return None, None, None


class _CrossEntropyFunction(torch.autograd.Function):
    """Summed cross-entropy of ``x @ W.T`` against targets, by slices of the vocabulary; logits never exist whole.

    Forward keeps a running maximum and sum (online softmax, Milakov and Gimelshein 2018); backward computes each
    slice's logits again. One extra product of the head buys the memory of logits, their gradient and the dense head.
    Up to ``KEPT_LOGITS`` bytes of them are kept instead: backward comes next, and gives each slice back as it goes.
    """

    @staticmethod
    def forward(ctx, x: torch.Tensor, targets: torch.Tensor, anchor: torch.Tensor | None, grid: GhostGrid):
        ctx.grid = grid
        top = x.new_full((len(x),), -math.inf, dtype=torch.float32)
        total = torch.zeros_like(top)
        picked = torch.zeros_like(top)
        ctx.logits = {}
        left = KEPT_LOGITS if any(ctx.needs_input_grad) else 0
        for k, rows in enumerate(grid.slices()):
            logits = x @ grid.lend(rows, x.dtype).T
            if (size := logits.numel() * logits.element_size()) <= left:
                ctx.logits[k], left = logits, left - size
            sliced_softmax.observe(logits, targets, rows.start, top, total, picked)
        norm = top + total.log()
        ctx.save_for_backward(x, targets, norm)
        return torch.where(targets < 0, 0.0, norm - picked).sum()

    @staticmethod
    def backward(ctx, gradient: torch.Tensor):
        x, targets, norm = ctx.saved_tensors
        grid: GhostGrid = ctx.grid
        votes = grid.wants_gradient()
        below = torch.zeros_like(x) if ctx.needs_input_grad[0] else None
        scaled = grid.shared(x) if votes else x
        for k, rows in enumerate(grid.slices()):
            weights = grid.lend(rows, x.dtype)
            # A second pass over the same graph must find no logits that the first has changed.
            kept = ctx.logits.pop(k, None)
            logits = x @ weights.T if kept is None else kept
            del kept
            part = sliced_softmax.turn_into_gradient(logits, targets, rows.start, norm, gradient)
            del logits
            if below is not None:
                below.addmm_(part, weights)
            del weights
            if votes:
                grid.accept(part.T @ scaled, row_range(rows.start, rows.stop, x.device), USE_LINEAR, k)
        return below, None, None, None


def _autocast(x: torch.Tensor) -> torch.Tensor:
    """``x`` in the dtype that an enclosing autocast region asks for."""
    kind = x.device.type
    return x.to(torch.get_autocast_dtype(kind)) if torch.is_autocast_enabled(kind) else x


def ghost_cross_entropy(hidden: torch.Tensor, targets: torch.Tensor, grid: GhostGrid) -> torch.Tensor:
    """Summed cross-entropy in nats of a bias-free head, without its logits or its dense weights.

    Args:
        hidden: float ``(tokens, in)``.
        targets: int64 ``(tokens,)``, each in [0, out), or below 0: a token that counts nothing.
        grid: the head.

    Returns:
        float32 scalar; differentiable in ``hidden``; its backward casts the head's votes.
    """
    return _CrossEntropyFunction.apply(_autocast(hidden), targets, grid.anchor, grid)


class GhostLinearTandem(nn.Module):
    """``nn.Linear`` over a grid: ``y = x W^T + bias``, with W ``(out, in)`` discrete and the bias float32."""

    def __init__(self, grid: GhostGrid, bias: bool = False) -> None:
        super().__init__()
        self.grid = grid
        self.out_features, self.in_features = grid.shape
        device = grid.indices.device
        self.bias = nn.Parameter(torch.zeros(self.out_features, device=device)) if bias else None

    @property
    def base_idx(self) -> torch.Tensor:
        """Coarse tandem coordinate, uint8 ``(out, in)``, a view."""
        return self.grid.base_idx

    @property
    def fine_idx(self) -> torch.Tensor:
        """Fine tandem coordinate, uint8 ``(out, in)``, a view."""
        return self.grid.fine_idx

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = _linear(_autocast(x), self.grid)
        return y if self.bias is None else y + self.bias.to(y.dtype)


class GhostEmbedding(nn.Module):
    """``nn.Embedding`` over a grid: token ids to float32 rows ``(..., in)``.

    ``heard`` off, its gradient is not asked for and casts no votes, and the backward pass need not come down to it.
    """

    def __init__(self, grid: GhostGrid) -> None:
        super().__init__()
        self.grid = grid
        self.heard = True
        self.num_embeddings, self.embedding_dim = grid.shape

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return _EmbeddingFunction.apply(ids, self.grid.anchor if self.heard else None, self.grid)


def grids_of(model: nn.Module) -> dict[str, GhostGrid]:
    """Every grid once, by the name under which the model first mentions it (a tied head is the embedding's grid)."""
    return {name: m for name, m in model.named_modules() if isinstance(m, GhostGrid)}


def name_grids(model: nn.Module, ballot: Ballot) -> None:
    """Tell every grid its name and in how many places it stands, and give all of them one ballot."""
    places = Counter(id(m) for _, m in model.named_modules(remove_duplicate=False) if isinstance(m, GhostGrid))
    grids = grids_of(model)
    for number, (name, grid) in enumerate(grids.items()):
        grid.name, grid.number = name, number
        grid.uses = places[id(grid)]
        grid.ballot = ballot


@dataclass(frozen=True)
class Movement:
    """What one step did to a grid.

    Attributes:
        weights: how many it has.
        flips: how many changed their index.
        mean_travel: how far these were sent, in units of their scale.
        clipped: how many were stopped by the edge of their row's range.
        mean_size: mean |weight| in units of the scale.
    """

    weights: int
    flips: int
    mean_travel: float
    clipped: int = 0
    mean_size: float = 0.0

    @property
    def travel(self) -> float:
        """Mean |change| of all weights, in units of the scale."""
        return self.flips * self.mean_travel / self.weights

    @property
    def relative(self) -> float:
        """Mean |change| over mean |weight|."""
        return self.travel / self.mean_size if self.mean_size > 0 else 0.0

    @property
    def flip_rate(self) -> float:
        """Share of weights that changed their index."""
        return self.flips / self.weights


def apply_votes(grids: dict[str, GhostGrid], rate: float, weight_decay: float = 0.0) -> dict[str, Movement]:
    """End a step: apply the votes of every unlocked grid.

    Args:
        rate: learning rate, in units of weight.
        weight_decay: as AdamW's: every weight loses ``rate * weight_decay`` of itself (arXiv 1711.05101).
    """
    shrink = round(rate * weight_decay * 2**32)
    moved = {}
    for name, grid in grids.items():
        if grid.unlocked:
            flips, travel, clipped = grid.apply_votes(rate, shrink)
            travel_each = travel / 2.0**40 / max(flips, 1)
            moved[name] = Movement(grid.indices.numel(), flips, travel_each, clipped, grid.mean_size())
    return moved

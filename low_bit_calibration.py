"""From a checkpoint to low-bit grids: how fine each weight must be, rounding with error compensation.

**What an error costs.** With y = W x, an error E of W raises the loss by about ½ Σ_r g_r · E_r H E_rᵀ, where
H = E[x xᵀ] and g_r = E[(dL/dy_r)²] come from a calibration text (the Kronecker form of the Fisher matrix, arXiv
1503.05671). A tied head adds what its rows cost as embeddings.

**How fine.** Codes are entropy-coded, so a weight of twice the step saves a bit wherever it is. The bits are spent best
where every weight's expected cost is the same (reverse water-filling): step² · g_r · d = constant over the whole
model, d being the mean conditional variance that H leaves a column (Cholesky). One constant then sets the size of the
file, rows and layers that matter more are finer by themselves, and ``bits`` may be any number.

**Rounding.** Column by column, each column's error carried into the columns that are still open (GPTQ, arXiv
2210.17323), so that the rounding errors of a row cancel where the text looks.

Without a text H is the identity and g_r the inverse of a tensor's mean square: the same signal to noise everywhere.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm
from transformers import PreTrainedModel

import low_bit
from entropy_coding import encode, zero_order_entropy
from ghost_core import GhostEmbedding, GhostGrid, GhostLinearTandem, grids_of
from low_bit import LowBitGrid
from packed_batches import Batch

DAMPING = 0.01
"""Added to H's diagonal, as a share of its mean: directions that the text never showed still count for something."""
ROW_FLOOR = 0.3
"""Added to g_r, as a share of its mean: rows that the text never used still count for something."""
_BLOCK = 128
_SAMPLE = 1 << 18


@dataclass
class Sensitivity:
    """What errors of one grid cost.

    Attributes:
        inputs: H, float32 ``(in, in)``, or None where only its mean is known, which is then 1.
        rows: g, float64 ``(out,)``.
    """

    inputs: torch.Tensor | None
    rows: torch.Tensor


def without_text(model: PreTrainedModel) -> dict[str, Sensitivity]:
    """Sensitivities of the same signal to noise for every tensor."""
    found = {}
    for name, grid in grids_of(model).items():
        square = sum(float(grid.dequantize(rows).double().square().sum()) for rows in grid.slices())
        mean = max(square / grid.indices.numel(), 1e-30)
        found[name] = Sensitivity(None, torch.full((grid.shape[0],), 1 / mean, dtype=torch.float64))
    return found


def measure(model: PreTrainedModel, batches: Iterable[Batch]) -> dict[str, Sensitivity]:
    """Sensitivities on a text, by one forward and backward pass per row.

    Args:
        batches: of one row each, with at least one target.
    """
    inputs: dict[str, torch.Tensor] = {}
    rows: dict[str, torch.Tensor] = {}
    lookups: dict[str, torch.Tensor] = {}
    handles = []
    for module in model.modules():
        if isinstance(module, GhostLinearTandem):
            name, (out, width) = module.grid.name, module.grid.shape
            inputs[name] = torch.zeros(width, width)
            rows.setdefault(name, torch.zeros(out, dtype=torch.float64))
            handles.append(module.register_forward_hook(_linear_hook(name, inputs, rows)))
        elif isinstance(module, GhostEmbedding):
            lookups[module.grid.name] = torch.zeros(module.grid.shape[0], dtype=torch.float64)
            handles.append(module.register_forward_hook(_lookup_hook(module.grid.name, lookups)))
    tokens = 0
    try:
        for batch in tqdm(batches, desc="calibrate", unit="row", leave=False, disable=None):
            # Padding has no say: a row ends with its last target.
            end = int((batch.labels[0] != -100).nonzero()[-1]) + 1
            ids, labels, places = (t[:, :end] for t in (batch.input_ids, batch.labels, batch.position_ids))
            out = model.model(input_ids=ids, position_ids=places, attention_mask=None, use_cache=False)
            wanted = labels[:, 1:] != -100
            logits = model.get_output_embeddings()(out.last_hidden_state[:, :-1][wanted])
            F.cross_entropy(logits.float(), labels[:, 1:][wanted], reduction="sum").backward()
            tokens += end
            model.zero_grad(set_to_none=True)
    finally:
        for handle in handles:
            handle.remove()
    found = {}
    for name, grid in grids_of(model).items():
        g = torch.zeros(grid.shape[0], dtype=torch.float64)
        h = inputs[name] / tokens if name in inputs else None
        if name in rows:
            g += rows[name] / tokens
        if name in lookups:
            # A lookup's error costs the same in every direction, a linear's in those of H: brought to H's mean.
            g += lookups[name] / tokens / (float(h.diagonal().mean()) if h is not None else 1.0)
        found[name] = Sensitivity(h, g)
    return found


def _linear_hook(name: str, inputs: dict[str, torch.Tensor], rows: dict[str, torch.Tensor]):
    def hear(gradient: torch.Tensor) -> None:
        rows[name] += gradient.reshape(-1, gradient.shape[-1]).square().sum(0).double()

    def hook(module: nn.Module, arguments: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        x = arguments[0].detach().reshape(-1, arguments[0].shape[-1]).float()
        inputs[name].addmm_(x.T, x)
        output.register_hook(hear)

    return hook


def _lookup_hook(name: str, lookups: dict[str, torch.Tensor]):
    def hook(module: nn.Module, arguments: tuple[torch.Tensor, ...], output: torch.Tensor) -> torch.Tensor:
        ids = arguments[0].reshape(-1)
        heard = output.detach().requires_grad_()

        def hear(gradient: torch.Tensor) -> None:
            lookups[name].index_add_(0, ids, gradient.reshape(len(ids), -1).square().mean(1).double())

        heard.register_hook(hear)
        return heard

    return hook


# -- rounding ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Plan:
    """How one grid is to be rounded, up to the constant that all grids share.

    Attributes:
        compensation: upper Cholesky factor of the inverse of H, float64 ``(in, in)``, or None.
        scale_codes, unit: steps of the groups, int8 ``(out, groups)``, at a shared constant of 1.
    """

    compensation: torch.Tensor | None
    scale_codes: torch.Tensor
    unit: float


def plan(shape: tuple[int, int], cost: Sensitivity, group: int, name: str) -> Plan:
    """Steps of a grid that make every weight's expected cost the same.

    Raises:
        LowBitError: the group does not divide the width.
    """
    groups = low_bit.check_group(shape[1], group, name)
    g = cost.rows + ROW_FLOOR * cost.rows.mean() + 1e-30
    if cost.inputs is None:
        return Plan(None, *low_bit.scale_codes(g.rsqrt()[:, None].expand(-1, groups)))
    h = cost.inputs.double()
    h = h + torch.eye(len(h), dtype=torch.float64) * (DAMPING * h.diagonal().mean() + 1e-30)
    factor = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(h)), upper=True)
    # Geometric mean of the conditional variances of a group's columns.
    spread = (-2 * factor.diagonal().log()).view(groups, -1).mean(1).exp()
    return Plan(factor, *low_bit.scale_codes((g[:, None] * spread[None]).rsqrt()))


def round_grid(
    weights: torch.Tensor, how: Plan, constant: float, name: str = "linear", top: int = low_bit.TOP_MAX
) -> LowBitGrid:
    """Codes of a matrix, float ``(out, in)``, at steps ``constant`` times the plan's, with compensation where the plan
    has one."""
    unit = float(torch.tensor(how.unit * constant, dtype=torch.float32))
    columns = weights.shape[1]
    if how.compensation is None:
        codes = torch.cat(
            [
                low_bit.nearest(w, low_bit.steps_of(s, unit, columns), name, top)
                for w, s in zip(weights.split(4096), how.scale_codes.split(4096), strict=True)
            ]
        )
        return LowBitGrid(codes, how.scale_codes, unit, name, top)
    values = low_bit.table(name, top)
    factor = how.compensation.float()
    codes = torch.empty(weights.shape, dtype=torch.int16)
    for start in range(0, len(weights), 1 << 14):
        rows = slice(start, start + (1 << 14))
        open_weights = weights[rows].float().clone()
        steps = low_bit.steps_of(how.scale_codes[rows], unit, columns)
        for first in range(0, columns, _BLOCK):
            last = min(first + _BLOCK, columns)
            errors = torch.empty(len(open_weights), last - first)
            for j in range(first, last):
                code = low_bit.nearest(open_weights[:, j], steps[:, j], name, top)
                codes[rows, j] = code
                error = (open_weights[:, j] - values[code.int() + top] * steps[:, j]) / factor[j, j]
                errors[:, j - first] = error
                open_weights[:, j:last] -= error[:, None] * factor[j, j:last]
            open_weights[:, last:] -= errors @ factor[first:last, last:]
    return LowBitGrid(codes, how.scale_codes, unit, name, top)


def stored_bytes(grid: LowBitGrid) -> int:
    """What a grid takes in a packed file."""
    return len(encode(grid.codes.numpy())) + len(encode(grid.scale_codes.numpy()))


def quantize(
    model: PreTrainedModel,
    costs: dict[str, Sensitivity],
    budget: int,
    *,
    group: int = 0,
    name: str = "linear",
    top: int = low_bit.TOP_MAX,
) -> dict[str, LowBitGrid]:
    """Every grid of a model in low-bit codes that together take at most ``budget`` bytes, and hardly less.

    Raises:
        LowBitError: no steps are coarse enough, or a group does not divide a width.
    """
    grids = grids_of(model)
    plans = {n: plan(g.shape, costs[n], group, n) for n, g in grids.items()}
    # Finer than this, weights would be cut off by the table's end.
    low = max(_finest(grids[n], p, top) for n, p in plans.items())
    high = low + 32.0
    for _ in range(20):
        middle = (low + high) / 2
        if sum(_estimate(grids[n], p, 2.0**middle, name, top) for n, p in plans.items()) > budget:
            low = middle
        else:
            high = middle
    weights = sum(g.indices.numel() for g in grids.values())
    for _ in range(6):
        packed = {
            n: round_grid(grids[n].dequantize(), p, 2.0**high, name, top)
            for n, p in tqdm(plans.items(), desc="round", unit="grid", leave=False, disable=None)
        }
        excess = 8 * (sum(stored_bytes(g) for g in packed.values()) - budget) / weights
        # A bit a weight is a factor of two of the step; aim a little below, rounding is not smooth.
        if -0.02 <= excess <= 0:
            return packed
        high += excess + 0.005
    if excess > 0:
        raise low_bit.LowBitError(f"no steps make the grids fit into {budget} bytes: give more bits")
    return packed


def _finest(grid: GhostGrid, how: Plan, top: int) -> float:
    """Binary logarithm of the constant at which a grid's largest weight has the table's last code."""
    largest = 0.0
    for rows in grid.slices():
        steps = low_bit.steps_of(how.scale_codes[rows], how.unit, grid.shape[1])
        largest = max(largest, float((grid.dequantize(rows).abs() / steps).max()))
    return math.log2(max(largest / top, 2.0**-60))


def _estimate(grid: GhostGrid, how: Plan, constant: float, name: str, top: int) -> float:
    """Bytes of a grid by the entropy of the codes of some of its rows, without compensation."""
    rows, columns = grid.shape
    picked = torch.arange(0, rows, max(1, rows * columns // _SAMPLE))
    steps = low_bit.steps_of(how.scale_codes[picked], how.unit * constant, columns)
    codes = low_bit.nearest(grid.dequantize_rows(picked), steps, name, top)
    return zero_order_entropy(codes.numpy()) * rows * columns / 8 + how.scale_codes.numel() / 2

"""From a checkpoint to low-bit grids: how fine each weight must be, rounding with error compensation.

**What an error costs.** With y = W x, an error E of W raises the loss by about ½ Σ_r g_r · E_r H E_rᵀ, where
H = E[x xᵀ] and g_r = E[(dL/dy_r)²] come from a calibration text (the Kronecker form of the Fisher matrix, arXiv
1503.05671). Of a tied grid a row's error costs as part of the head by H and as an embedding in every direction alike;
both are joined in the mean over rows, or compensation would hide the head's errors where embeddings suffer from them.

**How fine.** Codes are entropy-coded, so a weight of twice the step saves a bit wherever it is. The bits are spent best
where every weight's expected cost is the same (reverse water-filling): step² · g_r · d = constant over the whole
model, d being the conditional variance that H leaves a column (Cholesky). One constant then sets the size of the
file, rows, columns and layers that matter more are finer by themselves, and ``bits`` may be any number.

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
from entropy_coding import encode
from ghost_core import GhostEmbedding, GhostLinearTandem, grids_of
from ghost_grid import GhostGrid
from low_bit import LowBitGrid
from packed_batches import Batch

DAMPING = 0.01
"""Added to H's diagonal, as a share of its mean: directions that the text never showed still count for something."""
ROW_FLOOR = 0.3
"""Added to g_r, as a share of its mean: rows that the text never used still count for something."""
_BLOCK = 128
_ROWS = 4096
_SAMPLE = 1 << 18
_MARGIN = 1.25
"""How much farther than a grid's largest weight its table reaches at least: what compensation may add to a weight."""


@dataclass
class Sensitivity:
    """What errors of one grid cost.

    Attributes:
        inputs: H, float32 ``(in, in)``, or None where only its mean is known, which is then 1; one tensor of all grids
            that see the same inputs (queries, keys and values; the two that go into an MLP).
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


def moment_bytes(model: PreTrainedModel) -> int:
    """What the second moments of a model's inputs take while it is calibrated and rounded, in float32."""
    shared = ("k_proj", "v_proj", "up_proj")
    linears = [m.grid for n, m in model.named_modules() if isinstance(m, GhostLinearTandem) and not n.endswith(shared)]
    return sum(4 * grid.shape[1] ** 2 for grid in linears)


def measure(model: PreTrainedModel, batches: Iterable[Batch]) -> dict[str, Sensitivity]:
    """Sensitivities on a text, by one forward and backward pass per row; holds :func:`moment_bytes`.

    Args:
        batches: of one row each, with at least one target.
    """
    heard: dict[str, _Heard] = {}
    lookups: dict[str, torch.Tensor] = {}
    handles = []
    last = _Last()
    for module in model.modules():
        if isinstance(module, GhostLinearTandem):
            name, out = module.grid.name, module.grid.shape[0]
            heard[name] = _Heard(torch.zeros(out, dtype=torch.float64))
            handles.append(module.register_forward_hook(_linear_hook(heard[name], last)))
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
        linear, lookup = heard.get(name), lookups.get(name)
        if linear is None:
            assert lookup is not None, "a grid is of a linear or of an embedding"
            found[name] = Sensitivity(None, lookup / tokens)
            continue
        h, g = _mean(linear.moments, grid.shape[1]), linear.rows / tokens
        if lookup is not None:
            mean = h.diagonal().mean()
            as_head, as_embedding = g * float(mean), lookup / tokens
            share = float(as_embedding.sum() / (as_head.sum() + as_embedding.sum()).clamp(min=1e-30))
            h = (1 - share) * h / mean.clamp(min=1e-30) + share * torch.eye(grid.shape[1])
            g = as_head + as_embedding
        found[name] = Sensitivity(h, g)
    return found


@dataclass
class _Moments:
    """Sum of x xᵀ over inputs x, float32 ``(in, in)``, and how many; a mean once ``closed``."""

    inputs: torch.Tensor
    count: int = 0
    closed: bool = False


@dataclass
class _Heard:
    """What a linear saw: the sum of squared gradients of its outputs, and the moments of its inputs."""

    rows: torch.Tensor
    moments: _Moments | None = None


@dataclass
class _Last:
    """The inputs that were last seen, and their moments: linears of the same inputs come one after the other."""

    inputs: torch.Tensor | None = None
    moments: _Moments | None = None


def _mean(moments: _Moments | None, width: int) -> torch.Tensor:
    """H of the moments, in their place: as many again would not fit beside them."""
    if moments is None:
        return torch.zeros(width, width)
    if not moments.closed:
        moments.inputs /= max(1, moments.count)
        moments.closed = True
    return moments.inputs


def _linear_hook(heard: _Heard, last: _Last):
    def hear(gradient: torch.Tensor) -> None:
        heard.rows += gradient.reshape(-1, gradient.shape[-1]).square().sum(0).double()

    def hook(module: nn.Module, arguments: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        output.register_hook(hear)
        if arguments[0] is last.inputs:
            heard.moments = last.moments
            return
        x = arguments[0].detach().reshape(-1, arguments[0].shape[-1]).float()
        if heard.moments is None:
            heard.moments = _Moments(torch.zeros(x.shape[1], x.shape[1]))
        heard.moments.inputs.addmm_(x.T, x)
        heard.moments.count += len(x)
        last.inputs, last.moments = arguments[0], heard.moments

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
        compensation: upper Cholesky factor of the inverse of H, float32 ``(in, in)``, or None.
        scales: steps at a shared constant of 1.
    """

    compensation: torch.Tensor | None
    scales: low_bit.Scales


def plans_of(model: PreTrainedModel, costs: dict[str, Sensitivity], group: int) -> dict[str, Plan]:
    """The plan of every grid.

    Args:
        costs: emptied on the way, so that whoever keeps nothing of them holds H or its factor, not both.

    Raises:
        LowBitError: the group does not divide a width.
    """
    plans: dict[str, Plan] = {}
    inputs, factor = None, None
    for name, grid in grids_of(model).items():
        cost = costs.pop(name)
        if cost.inputs is None or cost.inputs is not inputs:
            inputs, factor = cost.inputs, _factor(cost.inputs)
        plans[name] = plan(grid.shape, cost, group, name, factor)
    return plans


def _factor(inputs: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor] | None:
    """Upper Cholesky factor of the inverse of H, float32 ``(in, in)``, and its diagonal, float64."""
    if inputs is None:
        return None
    h = inputs.double()
    h = h + torch.eye(len(h), dtype=torch.float64) * (DAMPING * h.diagonal().mean() + 1e-30)
    factor = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(h)), upper=True)
    return factor.float(), factor.diagonal().clone()


def plan(
    shape: tuple[int, int],
    cost: Sensitivity,
    group: int,
    name: str,
    factor: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> Plan:
    """Steps of a grid that make every weight's expected cost the same.

    Args:
        factor: of H, where another grid has it already.

    Raises:
        LowBitError: the group does not divide the width.
    """
    groups = low_bit.check_group(shape[1], group, name)
    g = cost.rows + ROW_FLOOR * cost.rows.mean() + 1e-30
    rows = g.rsqrt()[:, None].expand(-1, groups)
    if cost.inputs is None:
        return Plan(None, low_bit.scales_of(rows, torch.ones(shape[1])))
    found = factor or _factor(cost.inputs)
    assert found is not None, "there is an H"
    # The factor's diagonal is the inverse root of the conditional variances.
    return Plan(found[0], low_bit.scales_of(rows, found[1]))


def round_grid(
    weights: torch.Tensor, how: Plan, constant: float, name: str = "linear", top: int = low_bit.TOP_MAX
) -> LowBitGrid:
    """Codes of a matrix, float ``(out, in)``, at steps ``constant`` times the plan's, with compensation where the plan
    has one."""
    return _round(weights, how, how.scales.times(constant), name, top)[0]


def unrounded(grid: GhostGrid, packed: LowBitGrid, how: Plan) -> torch.Tensor:
    """What the weights of a grid that was rounded by a plan were when their turn came, the errors of others in them:
    the codes are the nearest to them. Float32 ``(out, in)``."""
    return _round(grid.dequantize(), how, packed.scales, packed.name, packed.top)[1]


def _round(
    weights: torch.Tensor, how: Plan, scales: low_bit.Scales, name: str, top: int
) -> tuple[LowBitGrid, torch.Tensor]:
    codes = torch.empty(weights.shape, dtype=torch.int16)
    turned = weights.float().clone()
    columns = weights.shape[1]
    for start in range(0, len(weights), _ROWS):
        rows = slice(start, start + _ROWS)
        steps = scales.steps(rows)
        if how.compensation is None:
            codes[rows] = low_bit.nearest(turned[rows], steps, name, top)
            continue
        for first in range(0, columns, _BLOCK):
            last = min(first + _BLOCK, columns)
            block = turned[rows, first:last].contiguous()
            inside = how.compensation[first:last, first:last]
            codes[rows, first:last], errors = low_bit.round_columns(block, steps[:, first:last], inside, name, top)
            turned[rows, first:last] = block
            turned[rows, last:] -= errors @ how.compensation[first:last, last:]
    return LowBitGrid(codes, scales, name, top), turned


def stored_bytes(grid: LowBitGrid) -> int:
    """What a grid takes in a packed file."""
    scales = (grid.scales.rows, grid.scales.columns)
    return len(encode(grid.stored().numpy())) + sum(len(encode(codes.numpy())) for codes in scales)


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
    return quantize_planned(model, plans_of(model, dict(costs), group), budget, name=name, top=top)


def quantize_planned(
    model: PreTrainedModel, plans: dict[str, Plan], budget: int, *, name: str = "linear", top: int = low_bit.TOP_MAX
) -> dict[str, LowBitGrid]:
    """As :func:`quantize`, by plans that there are already.

    Raises:
        LowBitError: no steps are coarse enough.
    """
    grids = grids_of(model)
    # Finer than this, a grid's largest weights would be cut off.
    finest = {n: _finest(grids[n], p, name, top) for n, p in plans.items()}
    low, high = math.log2(min(finest.values())), math.log2(max(finest.values())) + 32.0
    samples = {n: _sample(grids[n], p) for n, p in plans.items()}
    for _ in range(20):
        middle = (low + high) / 2
        constants = {n: max(2.0**middle, least) for n, least in finest.items()}
        if sum(_estimate(*samples[n], constants[n], name, top) for n in plans) > budget:
            low = middle
        else:
            high = middle
    weights = sum(g.indices.numel() for g in grids.values())
    for _ in range(6):
        packed = {
            n: round_grid(grids[n].dequantize(), p, max(2.0**high, finest[n]), name, top)
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


def _finest(grid: GhostGrid, how: Plan, name: str, top: int) -> float:
    """The constant at which a grid's largest weight is as near to the table's end as it may come."""
    largest = 0.0
    for rows in grid.slices():
        largest = max(largest, float((grid.dequantize(rows).abs() / how.scales.steps(rows)).max()))
    return max(_MARGIN * largest / float(low_bit.table(name, top)[-1]), 2.0**-60)


def _sample(grid: GhostGrid, how: Plan) -> tuple[torch.Tensor, low_bit.Scales, float]:
    """Some rows of a grid, float32 ``(n, in)``, their scales, and how many times as many the grid has."""
    rows, columns = grid.shape
    picked = torch.arange(0, rows, max(1, rows * columns // _SAMPLE))
    scales = low_bit.Scales(how.scales.rows[picked], how.scales.columns, how.scales.unit)
    return grid.dequantize_rows(picked), scales, rows / len(picked)


def _estimate(
    weights: torch.Tensor, scales: low_bit.Scales, share: float, constant: float, name: str, top: int
) -> float:
    """Bytes of a grid by what those of a :func:`_sample` take, rounded without compensation."""
    finer = scales.times(constant)
    return share * stored_bytes(LowBitGrid(low_bit.nearest(weights, finer.steps(), name, top), finer, name, top))

"""Ghost modules: equal to dense layers in value and gradient; votes counted once, unbiased and against the gradient."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import ghost_core as core
import ghost_grid
import ghost_kernels as kernels
import manifolds
import momentum_rules
import vote_units
from ballots import RuleError, VoteRule, tensor_id
from ghost_core import Ballot, GhostEmbedding, GhostLinearTandem, ghost_cross_entropy
from ghost_grid import GhostError, GhostGrid
from manifolds import INDEX_MAX, Manifold
from momentum_rules import CompactRule, MomentumRule
from vote_rules import RULES, rule_named

MANIFOLD = manifolds.build("prime-harmonic")
COMPACT = manifolds.build("compact")
PLAIN = MomentumRule(buffer="int16", beta=0.0, beta2=0.5, reach=1e9)
"""Without memory, and with the finest votes."""
UNIT = vote_units.UNITS[16]


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(params=[None, 100, 1], ids=["whole", "slices", "rows"])
def slices(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int | None:
    """Slices of a grid as shipped (all of these small grids at once), of several rows, and of one row."""
    if request.param is not None:
        monkeypatch.setattr(ghost_grid, "SLICE_ELEMENTS", request.param)
    return request.param


def randn(*shape: int, seed: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def randint(high: int, shape: tuple[int, ...], seed: int) -> torch.Tensor:
    return torch.randint(high, shape, generator=torch.Generator().manual_seed(seed))


def table_for(rule: VoteRule) -> Manifold:
    """A manifold that the rule goes with."""
    return COMPACT if rule.vote_bits else MANIFOLD


def new_grid(rows: int, columns: int, seed: int, ballot: Ballot | None = None, name: str = "g") -> GhostGrid:
    """A grid of Gaussian weights of deviation 0.3, rows of differing size, on a manifold that suits its ballot."""
    grid = GhostGrid(rows, columns, table_for(ballot.rule) if ballot else MANIFOLD, ballot)
    grid.import_weights(randn(rows, columns, seed=seed) * 0.3 * (1 + torch.arange(rows)[:, None] % 3))
    grid.name = name
    return grid


def dense(grid: GhostGrid) -> torch.Tensor:
    """The grid's weights in float64, from the table and not from a kernel."""
    values = torch.from_numpy(grid.manifold.values.numpy()[grid.indices.numpy().astype(int) + 32768])
    return (values * grid.scale[:, None]).double()


def arm(grid: GhostGrid, yardstick: float) -> None:
    """Unlock and give every row the same yardstick, as if it had been measured, for the ballot's micro-batches."""
    rule = grid.ballot.rule
    assert isinstance(rule, MomentumRule)
    grid.unlock()
    rms = (1 - rule.beta) * rule.units(grid).unit / grid.ballot.micro_batches / yardstick
    empty = {name: torch.zeros_like(tensor) for name, tensor in grid.vote_state().items()}
    measured = {
        "r2": torch.full((len(grid.indices),), rms**2 * (1 - rule.beta2)),
        "observations": torch.tensor(1),
    }
    grid.load_vote_state(empty | measured)
    torch.testing.assert_close(row_yardstick(grid), torch.full((len(grid.indices),), yardstick, dtype=torch.float64))


def row_yardstick(grid: GhostGrid) -> torch.Tensor:
    """Votes per unit of gradient, float64 ``(out,)``."""
    rule = grid.ballot.rule
    assert isinstance(rule, MomentumRule)
    found = rule.yardstick(grid)
    return (found[0] if isinstance(found, tuple) else found).double()


def everything(grid: GhostGrid) -> dict[str, torch.Tensor]:
    """All that the next step depends on, by reference."""
    return {"indices": grid.indices, **grid.vote_state()}


def assert_voted(grid: GhostGrid, gradient: torch.Tensor, yardstick: float, uses: int = 1) -> None:
    """Votes are minus the gradient in units of the yardstick, each use rounded to one of its two neighbours."""
    wanted = gradient.double() * yardstick
    assert 100 < wanted.abs().max() < 8_000, "the comparison would be blunt, or clipped"
    off = (-grid.votes.double() - wanted).abs()
    assert float(off.max()) < uses * 1.01 + 1e-4 * float(wanted.abs().max())


class Tiny(nn.Module):
    """Embedding, two projections, and a head that is the embedding's grid: every use of a grid in a few weights."""

    def __init__(self, ballot: Ballot, vocabulary: int = 37, width: int = 24, seed: int = 0) -> None:
        super().__init__()
        self.embed = GhostEmbedding(new_grid(vocabulary, width, seed + 1, ballot))
        self.up = GhostLinearTandem(new_grid(40, width, seed + 2, ballot), bias=True)
        self.down = GhostLinearTandem(new_grid(width, 40, seed + 3, ballot))
        core.name_grids(self, ballot)
        # The head is a function here, not a module that could be counted.
        self.embed.grid.uses = 2

    def block(self, h: torch.Tensor) -> torch.Tensor:
        return h + self.down(torch.tanh(self.up(h)))

    def forward(self, ids: torch.Tensor, targets: torch.Tensor, recompute: bool = False) -> torch.Tensor:
        h = self.embed(ids)
        h = checkpoint(self.block, h, use_reentrant=False) if recompute else self.block(h)
        return ghost_cross_entropy(h.reshape(-1, h.shape[-1]), targets.reshape(-1), self.embed.grid) / ids.numel()

    def unlock(self) -> dict[str, GhostGrid]:
        grids = core.grids_of(self)
        for grid in grids.values():
            grid.unlock()
        return grids


def step(
    model: nn.Module, ballot: Ballot, number: int, losses: list[Callable[[], torch.Tensor]], rate: float
) -> dict[str, core.Movement]:
    """One step of training: measure where needed, vote micro-batch by micro-batch, apply."""
    grids = core.grids_of(model)
    waiting = [g for g in grids.values() if g.waiting]
    if waiting:
        ballot.open("measure", number, 0, len(losses))
        losses[0]().backward()
        for grid in waiting:
            grid.finish_measuring()
    for k, loss in enumerate(losses):
        ballot.open("cast", number, k, len(losses))
        loss().backward()
    ballot.close()
    return core.apply_votes(grids, rate)


# -- value and gradient -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(19,), (7, 19), (2, 3, 19)])
@pytest.mark.parametrize("bias", [False, True])
def test_linear_equals_dense(bias: bool, shape: tuple[int, ...], slices: int | None) -> None:
    ballot = Ballot(rule=PLAIN)
    layer = GhostLinearTandem(new_grid(23, 19, 1, ballot), bias)
    reference = nn.Linear(19, 23, bias, dtype=torch.float64)
    with torch.no_grad():
        reference.weight.copy_(dense(layer.grid))
        if bias:
            layer.bias.copy_(randn(23, seed=2))
            reference.bias.copy_(layer.bias)
    arm(layer.grid, 40.0)
    ballot.open("cast", 0, 0, 1)
    x = randn(*shape, seed=3, dtype=torch.float64).requires_grad_()
    x_reference = x.detach().clone().requires_grad_()
    y, y_reference = layer(x), reference(x_reference)
    assert y.shape == y_reference.shape and y.dtype == torch.float64
    torch.testing.assert_close(y, y_reference, rtol=1e-12, atol=1e-12)
    upstream = randn(*y.shape, seed=4, dtype=torch.float64)
    y.backward(upstream)
    y_reference.backward(upstream)
    torch.testing.assert_close(x.grad, x_reference.grad, rtol=1e-12, atol=1e-12)
    if bias:
        torch.testing.assert_close(layer.bias.grad.double(), reference.bias.grad, rtol=1e-6, atol=1e-6)
    assert_voted(layer.grid, reference.weight.grad, 40.0)


def test_linear_of_no_tokens() -> None:
    """As ``nn.Linear``: an empty result, an empty gradient, no votes."""
    ballot = Ballot(rule=PLAIN)
    layer = GhostLinearTandem(new_grid(23, 19, 1, ballot))
    arm(layer.grid, 40.0)
    ballot.open("cast", 0, 0, 1)
    x = torch.zeros(0, 19, requires_grad=True)
    y = layer(x)
    y.sum().backward()
    assert y.shape == (0, 23) and x.grad.shape == (0, 19) and not layer.grid.votes.any()


def test_linear_in_float32_stays_within_its_rounding(slices: int | None) -> None:
    layer = GhostLinearTandem(new_grid(31, 64, 5))
    x = randn(50, 64, seed=6).requires_grad_()
    y = layer(x)
    y.sum().backward()
    exact = x.detach().double() @ dense(layer.grid).T
    bound = x.detach().double().abs() @ dense(layer.grid).T.abs()
    assert y.dtype == torch.float32
    assert bool(((y.double() - exact).abs() <= bound * 64 * 2.0**-24).all())
    torch.testing.assert_close(x.grad.double(), dense(layer.grid).sum(0).expand(50, -1), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("shape", [(), (9,), (3, 17)])
def test_embedding_equals_dense(shape: tuple[int, ...], slices: int | None) -> None:
    """Ids that repeat and ids that do not occur; the latter's rows get no votes."""
    ballot = Ballot(rule=PLAIN)
    layer = GhostEmbedding(new_grid(29, 11, 7, ballot))
    arm(layer.grid, 200.0)
    ballot.open("cast", 0, 0, 1)
    reference = nn.Embedding(29, 11, _weight=dense(layer.grid))
    ids = randint(20, shape, 8)
    y, y_reference = layer(ids), reference(ids)
    assert y.dtype == torch.float32 and y.shape == y_reference.shape
    assert torch.equal(y.double(), y_reference)
    upstream = randn(*y.shape, seed=9)
    y.backward(upstream)
    y_reference.backward(upstream.double())
    assert_voted(layer.grid, reference.weight.grad, 200.0)
    absent = torch.ones(29, dtype=torch.bool)
    absent[ids.reshape(-1)] = False
    assert absent.sum() >= 9 and not layer.grid.votes[absent].any()
    assert not any(layer.grid.state.rows[name][absent].any() for name in ("row_squares", "row_sketch"))


@pytest.mark.parametrize("bad", [29, -30, -1])
def test_embedding_refuses_ids_outside_the_table(bad: int) -> None:
    """As ``nn.Embedding`` does; -1 is not the last row."""
    layer = GhostEmbedding(new_grid(29, 11, 7))
    with pytest.raises(IndexError):
        nn.Embedding(29, 11)(torch.tensor([3, bad]))
    with pytest.raises(IndexError):
        layer(torch.tensor([3, bad]))


@pytest.mark.parametrize("factor", [1.0, 0.25])
def test_cross_entropy_equals_dense(factor: float, slices: int | None) -> None:
    """Also where logits are in the hundreds, and with a factor on the loss (the mean over tokens)."""
    ballot = Ballot(rule=PLAIN)
    grid = new_grid(41, 13, 10, ballot)
    arm(grid, 25.0)
    ballot.open("cast", 0, 0, 1)
    hidden = randn(30, 13, seed=11) * torch.linspace(0.1, 60, 30)[:, None]
    targets = randint(41, (30,), 12)
    hidden.requires_grad_()
    loss = ghost_cross_entropy(hidden, targets, grid) * factor
    loss.backward()
    weight = dense(grid).requires_grad_()
    hidden_reference = hidden.detach().double().requires_grad_()
    reference = F.cross_entropy(hidden_reference @ weight.T, targets, reduction="sum") * factor
    reference.backward()
    assert loss.dtype == torch.float32 and loss.shape == ()
    torch.testing.assert_close(loss.double(), reference, rtol=2e-6, atol=1e-6)
    torch.testing.assert_close(hidden.grad.double(), hidden_reference.grad, rtol=1e-4, atol=5e-5)
    assert_voted(grid, weight.grad, 25.0)


def test_cross_entropy_of_frozen_hidden_states_still_votes(slices: int | None) -> None:
    ballot = Ballot(rule=PLAIN)
    grid = new_grid(41, 13, 10, ballot)
    arm(grid, 500.0)
    ballot.open("cast", 0, 0, 1)
    ghost_cross_entropy(randn(30, 13, seed=11), randint(41, (30,), 12), grid).backward()
    assert grid.votes.any()


def test_autocast_computes_in_bfloat16() -> None:
    ballot = Ballot(rule=PLAIN)
    layer = GhostLinearTandem(new_grid(23, 64, 13, ballot), bias=True)
    head = new_grid(41, 23, 14, ballot, "head")
    arm(layer.grid, 20.0)
    arm(head, 20.0)
    ballot.open("cast", 0, 0, 1)
    x, targets = randn(50, 64, seed=15).requires_grad_(), randint(41, (50,), 16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = layer(x)
        loss = ghost_cross_entropy(y, targets, head)
    loss.backward()
    assert y.dtype == torch.bfloat16 and loss.dtype == torch.float32 and x.grad.dtype == torch.float32
    weight, top = dense(layer.grid).requires_grad_(), dense(head).requires_grad_()
    x_reference = x.detach().double().requires_grad_()
    reference = F.cross_entropy(x_reference @ weight.T @ top.T, targets, reduction="sum")
    reference.backward()
    assert loss.item() == pytest.approx(reference.item(), rel=0.02)
    for got, exact in ((x.grad, x_reference.grad), (-layer.grid.votes, weight.grad), (-head.votes, top.grad)):
        assert F.cosine_similarity(got.double().flatten(), exact.flatten(), 0) > 0.995


def test_gradient_of_an_expanded_and_transposed_input() -> None:
    """Inputs and upstream gradients that are not contiguous."""
    layer = GhostLinearTandem(new_grid(6, 5, 17))
    base = randn(5, 4, seed=18, dtype=torch.float64).requires_grad_()
    other = base.detach().clone().requires_grad_()
    layer(base.T.expand(3, 4, 5)).sum().backward()
    F.linear(other.T.expand(3, 4, 5), dense(layer.grid)).sum().backward()
    torch.testing.assert_close(base.grad, other.grad, rtol=1e-12, atol=1e-12)


# -- indices ----------------------------------------------------------------------------------------------------------


def test_tandem_coordinates_are_views_of_the_indices() -> None:
    layer = GhostLinearTandem(new_grid(5, 7, 20))
    grid = layer.grid
    for base, fine in ((grid.base_idx, grid.fine_idx), (layer.base_idx, layer.fine_idx)):
        assert base.dtype == fine.dtype == torch.uint8 and base.shape == fine.shape == (5, 7)
        storage = grid.indices.untyped_storage().data_ptr()
        assert base.untyped_storage().data_ptr() == fine.untyped_storage().data_ptr() == storage
    base, fine = grid.base_idx, grid.fine_idx
    for value in (0, 1, -1, 255, 256, -256, 12_345, -12_345, INDEX_MAX, -INDEX_MAX):
        grid.indices[2, 3] = value
        assert int(base[2, 3]) * 256 + int(fine[2, 3]) == value & 0xFFFF
    combined = (base.to(torch.int32) * 256 + fine.to(torch.int32)).to(torch.int16)
    assert torch.equal(combined, grid.indices)
    before = layer(torch.eye(7))[:, 2].clone()
    base[2, 3], fine[2, 3] = 0x40, 0x01
    assert grid.indices[2, 3] == 0x4001
    changed = layer(torch.eye(7))[:, 2] != before
    assert changed.nonzero().flatten().tolist() == [3]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_import_of_gaussian_weights_is_above_75_db(dtype: torch.dtype, slices: int | None) -> None:
    weights = randn(48, 64, seed=21, dtype=dtype) * 0.02
    grid = GhostGrid(48, 64, MANIFOLD)
    grid.indices.fill_(-12_345)
    report = grid.import_weights(weights)
    noise = ((dense(grid) - weights.double()) ** 2).sum().item()
    signal = (weights.double() ** 2).sum().item()
    assert report.snr_db > 75
    assert report.snr_db == pytest.approx(10 * math.log10(signal / noise), abs=0.01)
    assert (report.elements, report.saturated) == (48 * 64, 0)
    assert report.zeros == int((grid.indices == 0).sum())
    largest = (dense(grid) / grid.scale[:, None].double()).abs().max(1).values
    torch.testing.assert_close(largest, torch.full((48,), 0.8, dtype=torch.float64), rtol=1e-4, atol=0)


def test_import_of_trained_weights_is_above_75_db(shared_data: Any) -> None:
    safetensors = pytest.importorskip("safetensors.torch")
    matrices = safetensors.load_file(shared_data / "models" / "stories260K-qwen2" / "model.safetensors")
    ratios = {}
    for name, weights in matrices.items():
        if weights.ndim == 2:
            grid = GhostGrid(*weights.shape, MANIFOLD)
            ratios[name] = grid.import_weights(weights).snr_db
    assert len(ratios) > 30
    assert {name: snr for name, snr in ratios.items() if not snr > 75} == {}


def test_import_refuses_another_shape() -> None:
    with pytest.raises(GhostError, match=r"\(3, 4\), expected \(4, 3\)"):
        GhostGrid(4, 3, MANIFOLD).import_weights(torch.zeros(3, 4))


def test_import_refuses_what_is_not_finite_and_keeps_the_old_weights() -> None:
    grid = new_grid(4, 3, 22)
    before = dense(grid)
    for bad in (math.nan, math.inf):
        weights = torch.ones(4, 3)
        weights[2, 1] = bad
        with pytest.raises(vote_units.KernelError, match="row 2"):
            grid.import_weights(weights)
    assert torch.equal(dense(grid), before)


def test_import_of_zeros_and_of_a_row_of_zeros() -> None:
    grid = GhostGrid(3, 4, MANIFOLD)
    grid.indices.fill_(77)
    report = grid.import_weights(torch.zeros(3, 4))
    assert report.zeros == 12 and not grid.indices.any() and grid.scale.tolist() == [1.0, 1.0, 1.0]
    report = grid.import_weights(torch.tensor([[1.0, -1, 0, 0], [0, 0, 0, 0], [3.0, 0, 0, 0]]))
    assert grid.scale.tolist() == [1.25, 2.5, 3.75] and not grid.indices[1].any() and report.zeros == 9


def move(grid: GhostGrid, rate: float) -> None:
    """Move weights by votes that were put there: no step is closed."""
    assert isinstance(grid.ballot.rule, MomentumRule) and grid.state is not None
    grid.state.push = grid.ballot.rule.yardstick(grid)[1]
    grid.ballot.rule.apply(grid, rate, 0)


@pytest.fixture
def columns_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    """Columns are not measured, so that the statistics of rows are those of the gradients themselves."""
    monkeypatch.setattr(momentum_rules, "column_shares", torch.ones_like)


def test_a_second_import_moves_in_the_new_scale() -> None:
    """The reciprocal of the scale is kept between steps; a new import must not leave the old one behind."""
    moves = []
    for first in (1.0, 100.0):
        grid = GhostGrid(1, 2000, MANIFOLD, Ballot(rule=PLAIN))
        grid.name = "g"
        grid.import_weights(torch.full((1, 2000), first))
        arm(grid, 1.0)
        grid.votes.fill_(UNIT)
        move(grid, 1e-2)
        grid.import_weights(torch.full((1, 2000), 1.0))
        before = dense(grid)
        grid.votes.fill_(UNIT)
        move(grid, 1e-2)
        moves.append((dense(grid) - before).mean().item())
    assert moves == [pytest.approx(1e-2, rel=0.01)] * 2


@pytest.mark.parametrize("table", [MANIFOLD, COMPACT], ids=lambda m: m.name)
def test_an_import_writes_no_word_without_a_meaning(table: Manifold) -> None:
    """Also where a weight is beyond its row's range: words stay among the levels, and without votes."""
    grid = GhostGrid(6, 50, table)
    grid.indices.fill_(-32_768)
    assert grid.tables().unused(grid.indices) == 300
    grid.import_weights(randn(6, 50, seed=23) * 5, headroom=1.0)
    assert grid.tables().unused(grid.indices) == 0 and not grid.tables().votes(grid.indices).any()
    assert int(grid.tables().levels(grid.indices).abs().max()) == grid.tables().top
    grid.indices[2, 3] = -32_768
    assert grid.tables().unused(grid.indices) == 1


# -- locks ------------------------------------------------------------------------------------------------------------


def test_a_tied_grid_is_listed_once_and_has_one_buffer() -> None:
    ballot = Ballot(MomentumRule())
    model = Tiny(ballot)
    model.head = GhostLinearTandem(model.embed.grid)
    grids = core.grids_of(model)
    assert list(grids) == ["embed.grid", "up.grid", "down.grid"]
    core.name_grids(model, ballot)
    assert [g.name for g in grids.values()] == list(grids) and all(g.ballot is ballot for g in grids.values())
    assert len({tensor_id(name) for name in grids}) == 3
    assert [g.uses for g in grids.values()] == [2, 1, 1]


def test_unlock_and_lock() -> None:
    grid = new_grid(5, 7, 30)
    assert not grid.unlocked and not grid.waiting and grid.vote_state() == {} and grid.anchor is None
    grid.unlock()
    assert (
        grid.unlocked
        and grid.waiting
        and grid.votes.dtype == torch.int8
        and grid.votes.shape == (5, 7)
        and not grid.votes.any()
    )
    state = grid.vote_state()
    assert state["row_squares"].dtype == torch.int64 and state["r2"].dtype == torch.float32
    assert state["row_squares"].shape == state["r2"].shape == (5,) and state["observations"].item() == 0
    grid.votes.fill_(3)
    grid.unlock()
    assert bool((grid.votes == 3).all()), "unlocking twice keeps the votes"
    grid.lock()
    assert not grid.unlocked and grid.vote_state() == {}
    assert grid.votes is None and grid.anchor is None
    with pytest.raises(GhostError, match="g is locked"):
        grid.apply_votes(1e-3)
    with pytest.raises(GhostError, match="g is locked"):
        grid.accept(torch.zeros(5, 7), torch.arange(5), 0)
    grid.unlock()
    assert not grid.votes.any(), "nothing is hoarded behind a lock"


@pytest.mark.parametrize("name", RULES)
def test_a_locked_grid_keeps_every_bit_while_others_learn(name: str) -> None:
    ballot = Ballot(seed=8, rule=rule_named(name))
    model = Tiny(ballot)
    grids = model.unlock()
    model.up.grid.lock()
    locked = model.up.grid.indices.clone(), model.up.grid.scale.clone()
    before = {n: g.indices.clone() for n, g in grids.items()}
    for number in range(3):
        losses = [lambda k=k: model(randint(37, (4, 9), k), randint(37, (4, 9), 90 + k)) for k in range(6)]
        step(model, ballot, number, losses, 1e-2)
    assert torch.equal(model.up.grid.indices, locked[0]) and torch.equal(model.up.grid.scale, locked[1])
    moved = {n for n, g in grids.items() if not torch.equal(g.indices, before[n])}
    assert moved == {"embed.grid", "down.grid"}


class Watch(TorchDispatchMode):
    """Notes every float tensor that an operation makes: by which operation, its shape, whether its storage lives."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[str, tuple[int, ...], StorageWeakRef]] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        for value in result if isinstance(result, tuple | list) else [result]:
            if isinstance(value, torch.Tensor) and value.is_floating_point():
                self.seen.append((str(func), tuple(value.shape), StorageWeakRef(value.untyped_storage())))
        return result

    def alive(self, *shapes: tuple[int, ...]) -> list[str]:
        return [name for name, shape, storage in self.seen if shape in shapes and not storage.expired()]

    def made(self, operation: str, *shapes: tuple[int, ...]) -> int:
        return sum(operation in name and shape in shapes for name, shape, _ in self.seen)


@pytest.mark.parametrize("kind", ["linear", "embedding", "head", "nn.Linear"])
def test_no_dense_weight_gradient_survives(kind: str) -> None:
    """The last case shows that the watch would see one."""
    ballot = Ballot(rule=PLAIN)
    grid = new_grid(23, 19, 31, ballot)
    arm(grid, 40.0)
    ballot.open("cast", 0, 0, 1)
    ids = torch.arange(23).repeat(2)
    x, targets = randn(46, 19, seed=32).requires_grad_(), randint(23, (46,), 33)
    plain = nn.Linear(19, 23, bias=False)
    ghost = GhostLinearTandem(grid)
    embedding = GhostEmbedding(grid)
    losses = {
        "linear": lambda: ghost(x).square().sum(),
        "embedding": lambda: embedding(ids).square().sum(),
        "head": lambda: ghost_cross_entropy(x, targets, grid),
        "nn.Linear": lambda: plain(x).square().sum(),
    }
    with Watch() as watch:
        loss = losses[kind]()
        loss.backward()
    del loss
    made = watch.made("", (23, 19), (19, 23))
    # The one buffer in which weights are lent stays.
    vars(ghost_grid._lent).clear()
    alive = watch.alive((23, 19), (19, 23))
    if kind == "nn.Linear":
        assert alive
    else:
        assert made and not alive and grid.votes.any()
        assert list(grid.parameters()) == [] and grid.anchor.grad is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_lent_weights_are_those_of_the_grid(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """In one buffer, whatever was in it and whoever had it before; what does not fit into it is fresh."""
    monkeypatch.setattr(ghost_grid, "LENT_ELEMENTS", 23 * 19)
    vars(ghost_grid._lent).clear()
    small, large = new_grid(7, 5, 41), new_grid(23, 19, 42)
    places = set()
    for grid, rows in ((large, slice(4, 23)), (small, slice(0, 7)), (large, slice(0, 23)), (small, slice(2, 3))):
        lent = grid.lend(rows, dtype)
        places.add(lent.data_ptr())
        assert torch.equal(lent, grid.dequantize(rows, dtype)) and lent.dtype == dtype
        lent.fill_(math.nan)
    assert len(places) == 2, "the buffer grew once"
    wide = new_grid(23, 20, 43)
    lent = wide.lend(slice(0, 23), dtype)
    # The buffer that it had outgrown is gone, and its place may be anybody's.
    assert lent.data_ptr() != getattr(ghost_grid._lent, str(dtype)).data_ptr()
    assert torch.equal(lent, wide.dequantize(dtype=dtype))
    kept = lent.clone()
    wide.lend(slice(0, 23), dtype)
    assert torch.equal(lent, kept)


@pytest.mark.parametrize("kind", ["linear", "head"])
def test_neither_weights_nor_logits_nor_gradient_exist_whole(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In slices of 3 rows no float tensor as large as the matrix, or as tokens times the vocabulary, is ever made."""
    monkeypatch.setattr(ghost_grid, "SLICE_ELEMENTS", 3 * 19)
    monkeypatch.setattr(core, "KEPT_LOGITS", 0)
    ballot = Ballot(rule=PLAIN)
    grid = new_grid(64, 19, 34, ballot)
    arm(grid, 40.0)
    ballot.open("cast", 0, 0, 1)
    x, targets = randn(11, 19, seed=35).requires_grad_(), randint(64, (11,), 36)
    with Watch() as watch:
        if kind == "head":
            ghost_cross_entropy(x, targets, grid).backward()
        else:
            GhostLinearTandem(grid)(x).backward(torch.ones(11, 64))
    assert grid.votes.any()
    allowed = [(65_536,), (11, 64)] if kind == "linear" else [(65_536,)]  # the table; the layer's own output
    sizes = [math.prod(shape) for _, shape, _ in watch.seen if shape not in allowed]
    assert max(sizes) <= 11 * 19, "the largest is the gradient of the input"


def test_a_locked_grid_computes_no_weight_gradient_and_casts_nothing() -> None:
    ballot = Ballot(rule=PLAIN)
    layer = GhostLinearTandem(new_grid(23, 19, 37, ballot))
    products = []
    for unlocked, mode in ((False, "cast"), (True, "closed"), (True, "cast"), (False, "measure")):
        layer.grid.lock()
        if unlocked:
            arm(layer.grid, 40.0)
        ballot.close() if mode == "closed" else ballot.open(mode, 0, 0, 1)
        indices = layer.grid.indices.clone()
        x = randn(5, 19, seed=38).requires_grad_()
        with Watch() as watch:
            layer(x).square().sum().backward()
        products.append(watch.made("aten.mm", (23, 19)))
        assert x.grad is not None and torch.equal(layer.grid.indices, indices)
        if not unlocked:
            assert layer.grid.vote_state() == {} and layer.grid.state is None
        elif mode == "closed":
            assert not layer.grid.votes.any()
    assert products == [0, 0, 1, 0]


def test_nothing_below_the_lowest_open_grid_is_visited() -> None:
    ballot = Ballot(rule=PLAIN)
    model = Tiny(ballot)
    model.up.bias.requires_grad_(False)
    arm(model.down.grid, 40.0)
    ballot.open("cast", 0, 0, 1)
    hidden = torch.tanh(model.up(model.embed(randint(37, (2, 5), 39))))
    assert not hidden.requires_grad
    out = model.down(hidden)
    assert out.requires_grad
    out.square().sum().backward()
    assert model.down.grid.votes.any()
    ballot.close()
    assert not model.down(hidden).requires_grad


def test_apply_skips_locked_grids() -> None:
    ballot = Ballot(rule=PLAIN)
    model = Tiny(ballot)
    before = {name: grid.indices.clone() for name, grid in core.grids_of(model).items()}
    arm(model.up.grid, 300.0)
    ballot.open("cast", 0, 0, 1)
    model(randint(37, (2, 5), 40), randint(37, (2, 5), 41)).backward()
    moved = core.apply_votes(core.grids_of(model), 1e-2)
    assert list(moved) == ["up.grid"]
    changed = {name: int((grid.indices != before[name]).sum()) for name, grid in core.grids_of(model).items()}
    assert changed == {"embed.grid": 0, "up.grid": moved["up.grid"].flips, "down.grid": 0}
    assert moved["up.grid"].flips > 0 and moved["up.grid"].weights == 40 * 24
    assert moved["up.grid"].flip_rate == changed["up.grid"] / 960
    assert moved["up.grid"].mean_travel > 0


# -- votes ------------------------------------------------------------------------------------------------------------


def test_a_cast_of_a_module_leaves_scales_alone() -> None:
    """What bf16_full_eval and ``model.half()`` do: weights have no dtype, and rounded scales would move whole rows."""
    for cast in (lambda m: m.to(torch.bfloat16), lambda m: m.half(), lambda m: m.double(), lambda m: m.to("cpu")):
        layer = GhostLinearTandem(new_grid(23, 19, 3), bias=True)
        scale, weights = layer.grid.scale.clone(), layer.grid.dequantize()
        cast(layer)
        assert torch.equal(layer.grid.scale, scale) and layer.grid.scale.dtype == torch.float32
        assert torch.equal(layer.grid.dequantize(), weights)
        assert layer.bias is not None and set(dict(layer.named_buffers())) == {"grid.indices", "grid.scale"}
    moved = GhostLinearTandem(new_grid(23, 19, 3)).to("meta", torch.float16)
    assert moved.grid.scale.is_meta and moved.grid.scale.dtype == torch.float32 and moved.grid.indices.is_meta


def test_votes_move_with_their_module() -> None:
    """A trainer moves a model to its card after an optimizer was made for it."""
    layer = GhostLinearTandem(new_grid(23, 19, 3))
    layer.grid.unlock()
    state = layer.grid.state
    assert state is not None and state.votes is not None and state.shares is not None
    layer.to("cpu")
    assert layer.grid.state is state
    layer.to("meta")
    moved = layer.grid.state
    assert moved is not None and moved.votes is not None and moved.shares is not None
    every = [moved.votes, moved.shares, moved.anchor, *moved.rows.values(), *moved.columns.values()]
    assert all(t.is_meta for t in every) and moved.anchor.requires_grad and moved.anchor.is_leaf
    assert moved.rows.keys() == state.rows.keys() and moved.columns.keys() == state.columns.keys()


def test_a_micro_batch_votes_once() -> None:
    """Two forward passes before a backward pass would have the room of one micro-batch, and could wrap a buffer."""
    ids, targets = randint(37, (4, 9), 52), randint(37, (4, 9), 53)
    ballot = Ballot(rule=PLAIN)
    model = Tiny(ballot)
    for grid in core.grids_of(model).values():
        arm(grid, 100.0)
    ballot.open("cast", 0, 0, 2)
    with pytest.raises(GhostError, match="two forward passes voted in one micro-batch"):
        (model(ids, targets) + model(ids, targets)).backward()
    ballot.open("retract", 0, 0, 2)
    model(ids, targets).backward()
    ballot.open("cast", 0, 1, 2)
    model(ids, targets).backward()


@pytest.mark.parametrize("mode", ["cast", "measure"])
def test_gradient_checkpointing_changes_no_vote(mode: str, slices: int | None) -> None:
    states = []
    for recompute in (False, True, None):
        ballot = Ballot(MomentumRule(), seed=3)
        model = Tiny(ballot)
        grids = model.unlock()
        ids, targets = randint(37, (4, 9), 50), randint(37, (4, 9), 51)
        for stage in ("measure", "cast"):
            ballot.open(stage, 0, 0, 1)
            if recompute is not None:
                model(ids, targets, recompute).backward()
            else:  # what counting a recomputed forward pass would give: everything twice
                model(ids, targets).backward()
                ballot.standing.clear()  # a second time is refused
                model(ids, targets).backward()
            if stage == "measure":
                for grid in grids.values():
                    grid.finish_measuring()
            if stage == mode:
                break
        states.append({name: grid.vote_state() for name, grid in grids.items()})
    plain, recomputed, twice = states
    key = "votes" if mode == "cast" else "r2"
    for name, state in plain.items():
        assert state[key].any(), name
        assert all(torch.equal(state[part], recomputed[name][part]) for part in state), name
        assert not torch.equal(state[key], twice[name][key]), name


def products(run: Callable[[], Any]) -> int:
    """How many matrix products a computation makes."""
    with Watch() as watch:
        run()
    return sum(name.startswith(("aten.mm", "aten.addmm", "aten.matmul")) for name, _, _ in watch.seen)


def test_a_recomputation_leaves_out_the_last_product() -> None:
    """Two layers, the second of which needs nothing but the input that is there once the first is computed again."""
    ballot = Ballot(rule=PLAIN)
    first, last = (GhostLinearTandem(new_grid(19, 19, seed, ballot, str(seed))) for seed in (61, 62))
    for layer in (first, last):
        arm(layer.grid, 40.0)
    x = randn(7, 19, seed=63).requires_grad_()

    def run(recompute: bool) -> None:
        ballot.open("cast", 0, 0, 1)
        both = lambda x: last(first(x).sin())  # noqa: E731
        out = checkpoint(both, x, use_reentrant=False) if recompute else both(x)
        out.sum().backward()

    plain, recomputed = products(lambda: run(False)), products(lambda: run(True))
    assert plain == 6 and recomputed == plain + 1


def test_a_head_computes_logits_again_only_where_they_are_large(
    monkeypatch: pytest.MonkeyPatch, slices: int | None
) -> None:
    ballot = Ballot(rule=PLAIN)
    grid = new_grid(23, 19, 64, ballot)
    arm(grid, 40.0)
    parts = list(grid.slices())
    targets = randint(23, (46,), 66)
    results = []
    for limit, again in ((46 * 23 * 4, 0), (46 * 23 * 4 - 1, 1), (0, len(parts))):
        monkeypatch.setattr(core, "KEPT_LOGITS", limit)
        ballot.open("cast", 0, 0, 1)
        x = randn(46, 19, seed=65).requires_grad_()
        assert products(lambda x=x: ghost_cross_entropy(x, targets, grid).backward()) == 3 * len(parts) + again
        results.append(x.grad)
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])
    # Nothing wants a gradient: nothing waits.
    monkeypatch.setattr(core, "KEPT_LOGITS", 1 << 28)
    grid.lock()
    with Watch() as watch:
        loss = ghost_cross_entropy(randn(46, 19, seed=65), targets, grid)
    assert watch.made("aten.mm", *((46, rows.stop - rows.start) for rows in parts))
    assert not watch.alive(*((46, rows.stop - rows.start) for rows in parts)) and not loss.requires_grad


def test_a_second_pass_over_a_heads_graph_finds_whole_logits(slices: int | None) -> None:
    grid = new_grid(23, 19, 64)
    x, targets = randn(46, 19, seed=65).requires_grad_(), randint(23, (46,), 66)
    loss = ghost_cross_entropy(x, targets, grid)
    first, second = (torch.autograd.grad(loss, x, retain_graph=True)[0] for _ in range(2))
    assert first.any() and torch.equal(first, second)


def test_votes_point_against_the_gradient() -> None:
    """A step along the votes lowers the loss, for each use of a grid by itself; embeddings as much as projections."""
    ids, targets = randint(37, (4, 9), 52), randint(37, (4, 9), 53)
    for open_grid in ("embed", "up", "down"):
        ballot = Ballot(rule=PLAIN)
        model = Tiny(ballot)
        grid = getattr(model, open_grid).grid
        arm(grid, 3000.0)
        ballot.open("cast", 0, 0, 1)
        before = model(ids, targets)
        before.backward()
        ballot.close()
        core.apply_votes({open_grid: grid}, 0.02)
        after = model(ids, targets)
        assert after < before - 1e-3, open_grid


def test_embedding_votes_have_the_sign_of_dense_autograd() -> None:
    ballot = Ballot(rule=PLAIN)
    layer = GhostEmbedding(new_grid(12, 8, 54, ballot))
    arm(layer.grid, 1000.0)
    ballot.open("cast", 0, 0, 1)
    ids, upstream = torch.tensor([3, 3, 3, 5]), randn(4, 8, seed=55)
    layer(ids).backward(upstream)
    summed = torch.zeros(12, 8).index_add_(0, ids, upstream)
    clear = summed.abs() > 2e-3
    assert clear.sum() == 16
    assert torch.equal(layer.grid.votes.sign()[clear].float(), -summed.sign()[clear])


def test_a_tied_grid_receives_both_uses() -> None:
    ballot = Ballot(rule=PLAIN)
    model = Tiny(ballot)
    grid = model.embed.grid
    arm(grid, 2500.0)
    ids, targets = randint(20, (4, 9), 56), randint(37, (4, 9), 57)
    ballot.open("cast", 0, 0, 1)
    model(ids, targets).backward()

    def reference(embedding: torch.Tensor, head: torch.Tensor) -> torch.Tensor:
        h = F.embedding(ids, embedding)
        inner = torch.tanh(F.linear(h, dense(model.up.grid), model.up.bias.detach().double()))
        h = h + F.linear(inner, dense(model.down.grid))
        return F.cross_entropy((h @ head.T).reshape(-1, 37), targets.reshape(-1))

    embedding, head = dense(grid).requires_grad_(), dense(grid).requires_grad_()
    reference(embedding, head).backward()
    assert_voted(grid, embedding.grad + head.grad, 2500.0, uses=2)
    for one in (embedding.grad, head.grad):
        assert float((-grid.votes.double() - one * 2500).abs().max()) > 50, "one use alone would not explain the votes"


@pytest.mark.parametrize("micro_batches", [1, 3, 32])
@pytest.mark.parametrize("rule", [PLAIN, MomentumRule(), CompactRule()], ids=["int16", "int8", "compact"])
def test_a_tied_grid_at_its_limits_saturates_and_does_not_wrap(rule: VoteRule, micro_batches: int) -> None:
    """Both uses of every micro-batch as loud as can be, on top of what a loud step before left behind."""
    ballot = Ballot(rule=rule)
    grid = new_grid(6, 5, 58, ballot)
    grid.uses = 2
    levels = grid.tables().levels(grid.indices)
    ballot.open("cast", 1, 0, micro_batches)
    arm(grid, 1.0)
    carry, bits = rule.units(grid).carry, rule.bits
    (grid.indices if grid.state.votes is None else grid.state.votes).sub_(carry)
    for k in range(micro_batches):
        ballot.open("cast", 1, k, micro_batches)
        GhostEmbedding(grid)(torch.arange(6)).backward(torch.full((6, 5), 1e6))
        GhostLinearTandem(grid)(torch.ones(1, 5)).backward(torch.full((1, 6), 1e6))
    # All but what is lost where 2^16 is no multiple of the step's slots.
    most = 1 << bits - 1
    assert bool((grid.votes > -most).all()) and bool((grid.votes < -0.97 * (most - 2)).all()), "votes wrapped"
    assert torch.equal(grid.tables().levels(grid.indices), levels)


@pytest.mark.parametrize("rule", [MomentumRule(beta=0.7), CompactRule(beta=0.7)], ids=lambda r: r.name)
def test_mean_vote_is_the_gradient_in_units_of_the_yardstick(rule: VoteRule) -> None:
    """Over seeds, with an ordinary rule and four micro-batches, where single votes are mostly -1, 0 and 1."""
    ballot = Ballot(rule=rule)
    layer = GhostLinearTandem(new_grid(6, 8, 59, ballot))
    x, upstream = randn(10, 8, seed=60), randn(10, 6, seed=61)
    ballot.open("cast", 3, 2, 4)
    arm(layer.grid, 0.1)
    words = layer.grid.indices if layer.grid.state.votes is None else layer.grid.state.votes
    empty = words.clone()
    rounds = 3000
    total = torch.zeros(6, 8, dtype=torch.float64)
    for seed in range(rounds):
        ballot.seed = seed
        ballot.open("cast", 3, 2, 4)
        words.copy_(empty)
        layer(x).backward(upstream)
        total -= layer.grid.votes
    wanted = (upstream.double().T @ x.double()) * 0.1
    assert 0.2 < wanted.abs().mean() < 2 and float(wanted.abs().max()) < 4, "16 votes for four micro-batches"
    fraction = wanted - wanted.floor()
    spread = (fraction * (1 - fraction) / rounds).sqrt()
    often = spread * rounds > 4
    assert often.sum() > 35
    z = ((total / rounds - wanted) / spread)[often]
    assert float(z.abs().max()) < 5 and abs(float(z.square().sum()) - len(z)) < 5 * math.sqrt(2 * len(z))


@pytest.mark.parametrize("name", RULES)
def test_order_of_micro_batches_and_backend_change_no_bit(name: str) -> None:
    count = 6
    results = []
    for backend, order in (("numba", range(count)), ("torch", range(count)), ("numba", [5, 2, 0, 4, 1, 3])):
        ballot = Ballot(seed=9, backend=backend, rule=rule_named(name))
        model = Tiny(ballot)
        grids = model.unlock()
        before = [grid.indices.clone() for grid in grids.values()]
        ids, targets = randint(37, (count, 4, 9), 62), randint(37, (count, 4, 9), 63)
        ballot.open("measure", 0, 0, count)
        model(ids[0], targets[0]).backward()
        for grid in grids.values():
            grid.finish_measuring()
        # Two rounds, so that votes carried over and the statistics of all micro-batches decide too.
        for number in range(2):
            for k in order:
                ballot.open("cast", number, k, count)
                model(ids[k], targets[k]).backward()
            core.apply_votes(grids, 1e-2)
        assert all(not torch.equal(g.indices, b) for g, b in zip(grids.values(), before, strict=True))
        results.append([t for g in grids.values() for t in everything(g).values()])
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def draw_votes(ballot: Ballot, name: str = "a", use: int = 0, uses: int = 1) -> torch.Tensor:
    """Votes of a gradient of half a vote everywhere: each is the toss of a coin."""
    grid = new_grid(20, 30, 64, ballot, name=name)
    grid.uses = uses
    arm(grid, 1.0)
    grid.accept(torch.full((20, 30), 0.5), torch.arange(20), use)
    return grid.votes


@pytest.mark.parametrize("change", ["seed", "step", "name"])
def test_every_part_of_the_key_changes_the_draw(change: str) -> None:
    drawn = []
    for other in (0, 1):
        ballot = Ballot(rule=PLAIN, seed=4 + (change == "seed" and other))
        ballot.open("cast", int(change == "step" and other), 0, 2)
        drawn.append(draw_votes(ballot, name="b" if change == "name" and other else "a"))
    assert 200 < (drawn[0] != drawn[1]).sum() < 400, "two fair coins differ on about half of 600"
    assert 200 < -drawn[0].sum() < 400


@pytest.mark.parametrize("part", ["micro_batch", "use"])
def test_the_halves_of_a_step_share_their_draws(part: str) -> None:
    """Half a vote in each of two slots is one vote in one of them, never none or two: nothing is lost to rounding."""
    ballot = Ballot(rule=PLAIN, seed=4)
    drawn = []
    for slot in (0, 1):
        ballot.open("cast", 0, slot if part == "micro_batch" else 0, 2 if part == "micro_batch" else 1)
        drawn.append(draw_votes(ballot, use=slot if part == "use" else 0, uses=2 if part == "use" else 1))
    assert bool((drawn[0] + drawn[1] == -1).all())
    assert 200 < -drawn[0].sum() < 400


@pytest.mark.parametrize("name", RULES)
def test_retracting_a_pass_restores_the_state(name: str) -> None:
    ballot = Ballot(seed=5, rule=rule_named(name))
    model = Tiny(ballot)
    grids = model.unlock()
    batches = [(randint(37, (4, 9), 65 + k), randint(37, (4, 9), 75 + k)) for k in range(2)]
    step(model, ballot, 0, [lambda b=b: model(*b) for b in batches], 1e-2)
    before = {name: copy.deepcopy(everything(grid)) for name, grid in grids.items()}
    for mode in ("cast", "retract"):
        ballot.open(mode, 1, 0, 1)
        model(*batches[0]).backward()
        same = all(torch.equal(before[n][p], everything(g)[p]) for n, g in grids.items() for p in before[n])
        assert same == (mode == "retract")


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("mode", ["measure", "cast"])
def test_a_non_finite_gradient_casts_nothing_and_is_named(mode: str, bad: float) -> None:
    ballot = Ballot(rule=PLAIN)
    layer = GhostLinearTandem(new_grid(5, 7, 80, ballot, name="layers.3.up"))
    if mode == "cast":
        arm(layer.grid, 10.0)
    else:
        layer.grid.unlock()
    before = copy.deepcopy(layer.grid.vote_state())
    ballot.open(mode, 0, 0, 1)
    upstream = randn(3, 5, seed=81)
    upstream[1, 2] = bad
    layer(randn(3, 7, seed=82)).backward(upstream)
    assert ballot.non_finite == ["layers.3.up"]
    assert all(torch.equal(layer.grid.vote_state()[part], before[part]) for part in before)
    assert layer.grid.waiting == (mode == "measure")


def test_closing_a_measuring_pass_leaves_a_measured_grid_alone() -> None:
    """Also one that met a non-finite gradient: its row statistics are from earlier steps."""
    ballot = Ballot(rule=PLAIN)
    grid = new_grid(5, 7, 80, ballot)
    arm(grid, 10.0)
    before = copy.deepcopy(grid.vote_state())
    grid.finish_measuring()
    assert all(torch.equal(grid.vote_state()[part], before[part]) for part in before)
    ballot.non_finite.append("g")
    grid.finish_measuring()
    assert all(torch.equal(grid.vote_state()[part], before[part]) for part in before)


def test_a_measuring_pass_that_is_non_finite_in_a_late_slice_begins_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ghost_grid, "SLICE_ELEMENTS", 14)
    ballot = Ballot(rule=PLAIN)
    layer = GhostLinearTandem(new_grid(6, 7, 83, ballot))
    layer.grid.unlock()
    x, upstream = randn(3, 7, seed=85), randn(3, 6, seed=84)
    states = []
    for bad in (math.nan, None):
        damaged = upstream.clone()
        damaged[0, 5] = bad if bad is not None else upstream[0, 5]
        ballot.non_finite.clear()
        ballot.open("measure", 0, 0, 1)
        layer(x).backward(damaged)
        layer.grid.finish_measuring()
        assert layer.grid.waiting == (bad is not None)
        states.append(layer.grid.vote_state()["r2"].clone())
    mean_square = (upstream.double().T @ x.double()).square().mean(1)
    assert not states[0].any()
    torch.testing.assert_close(states[1].double() / 0.5, mean_square, rtol=1e-5, atol=0)


def test_a_gradient_that_is_non_finite_in_a_late_slice_leaves_no_trace_after_retracting(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The slices before have voted by the time it is found; the same pass in mode ``retract`` takes that back."""
    monkeypatch.setattr(ghost_grid, "SLICE_ELEMENTS", 14)
    ballot = Ballot(rule=PLAIN)
    layer = GhostLinearTandem(new_grid(6, 7, 83, ballot))
    arm(layer.grid, 100.0)
    upstream = randn(3, 6, seed=84)
    upstream[0, 5] = math.nan
    for mode in ("cast", "retract"):
        ballot.open(mode, 0, 0, 1)
        layer(randn(3, 7, seed=85)).backward(upstream)
        assert "g" in ballot.non_finite
        assert not layer.grid.votes[4:].any()
    assert not layer.grid.votes.any() and not layer.grid.state.rows["row_squares"].any()


# -- the yardstick ----------------------------------------------------------------------------------------------------


def test_measuring_takes_mean_squares_and_casts_nothing() -> None:
    ballot = Ballot(MomentumRule())
    layer = GhostLinearTandem(new_grid(6, 9, 90, ballot))
    layer.grid.unlock()
    x, upstream = randn(4, 9, seed=91), randn(4, 6, seed=92) * torch.tensor([1, 10, 0.01, 0, 1e3, 1.0])

    def run(mode: str) -> None:
        ballot.open(mode, 0, 0, 2)
        layer(x).backward(upstream)

    run("cast")
    assert not layer.grid.votes.any(), "an unmeasured grid does not vote"
    run("measure")
    assert not layer.grid.votes.any() and layer.grid.state.observations == 0
    layer.grid.finish_measuring()
    assert layer.grid.state.observations == 1
    mean_square = (upstream.double().T @ x.double()).square().mean(1)
    corrected = layer.grid.state.rows["r2"].double() / (1 - ballot.rule.beta2)
    torch.testing.assert_close(corrected, mean_square, rtol=1e-5, atol=0)

    # yardstick = (1 - beta) U / (K rms), rms floored at half the tensor's RMS over rows that saw a gradient
    tensor_rms = (mean_square.sum() / 5).sqrt()
    rms = torch.maximum(mean_square.sqrt(), 0.5 * tensor_rms)
    wanted = (1 - ballot.rule.beta) * ballot.rule.units(layer.grid).unit / 2 / rms
    torch.testing.assert_close(row_yardstick(layer.grid), wanted, rtol=1e-5, atol=0)
    assert len(wanted.unique()) == 2, "five quiet rows share the floor"

    before = layer.grid.state.rows["r2"].clone()
    run("measure")
    assert torch.equal(layer.grid.state.rows["r2"], before), "a grid is measured once"
    run("cast")
    assert layer.grid.votes.any() and torch.equal(layer.grid.state.rows["r2"], before)


def test_a_grid_without_gradient_stays_unmeasured_and_votes_later() -> None:
    ballot = Ballot(MomentumRule())
    layer = GhostLinearTandem(new_grid(6, 9, 93, ballot))
    layer.grid.unlock()
    x = randn(4, 9, seed=94)
    for number, factor in enumerate((0.0, 0.0, 1.0, 1.0)):
        moved = step(layer, ballot, number, [lambda f=factor: (layer(x) * f).square().sum()], 1e-2)
        assert (moved["grid"].flips > 0) == (factor > 0)
        assert layer.grid.waiting == (factor == 0)
        assert layer.grid.state.observations == max(0, 2 * (number == 2) + 3 * (number == 3))


@pytest.mark.parametrize("floor", [0.5, 1e-3, 0.0])
def test_an_embedding_row_that_first_occurs_later_still_learns(floor: float) -> None:
    ballot = Ballot(rule=MomentumRule(floor=floor))
    layer = GhostEmbedding(new_grid(6, 9, 95, ballot))
    layer.grid.unlock()
    before = layer.grid.indices.clone()
    for number, ids in enumerate(([0, 1, 2], [0, 1, 2], [3, 3, 0], [3, 4, 1])):
        step(layer, ballot, number, [lambda i=ids: layer(torch.tensor(i)).square().sum()], 1e-2)
    changed = (layer.grid.indices != before).any(1)
    assert changed.tolist() == [True, True, True, True, True, False]


def noise_losses(
    layer: GhostLinearTandem, number: int, count: int, size: float = 1.0, same: bool = False
) -> tuple[list[Callable[[], torch.Tensor]], torch.Tensor]:
    """Losses of micro-batches of random data, linear in the weights, and their gradients, float64 ``(count, ...)``."""
    rows, columns = layer.grid.shape
    seeds = [1000 * number + 2 * (0 if same else k) for k in range(count)]
    xs = [randn(4, columns, seed=s) for s in seeds]
    ups = [randn(4, rows, seed=s + 1) * size for s in seeds]
    gradients = torch.stack([u.double().T @ x.double() for u, x in zip(ups, xs, strict=True)])
    return [lambda x=x, u=u: (layer(x) * u).sum() for x, u in zip(xs, ups, strict=True)], gradients


@pytest.mark.usefixtures("columns_alike")
@pytest.mark.parametrize("drift", [0.4, 1.0])
def test_row_statistics_follow_the_gradients_over_steps(drift: float) -> None:
    """Against float64, over steps of three micro-batches whose sizes fall by a factor of 600, or stay."""
    ballot = Ballot(rule=MomentumRule(buffer="int16", beta2=0.8))
    layer = GhostLinearTandem(new_grid(6, 64, 96, ballot))
    layer.grid.unlock()
    exact = torch.zeros(6, dtype=torch.float64)
    for number in range(8):
        losses, gradients = noise_losses(layer, number, 3, drift**number)
        if number == 0:
            exact = 0.2 * gradients[0].square().mean(1)
        exact = 0.8 * exact + 0.2 * gradients.square().mean((0, 2))
        step(layer, ballot, number, losses, 0.0)
        assert not layer.grid.state.rows["row_squares"].any() and not layer.grid.state.rows["row_sketch"].any()
        torch.testing.assert_close(layer.grid.state.rows["r2"].double(), exact, rtol=2e-3, atol=0)
    assert layer.grid.state.observations == 9


@pytest.mark.usefixtures("columns_alike")
@pytest.mark.parametrize("micro_batches", [1, 4, 32])
@pytest.mark.parametrize("present", [1.0, 0.125], ids=["every-row", "rows-now-and-then"])
@pytest.mark.parametrize("rule", [MomentumRule(buffer="int16"), MomentumRule(), CompactRule()], ids=["16", "8", "6"])
def test_row_statistics_do_not_drift_under_noise(rule: VoteRule, present: float, micro_batches: int) -> None:
    """However short the buffer: the running mean square stays that of the gradients over 40 steps.

    Also where a row has a gradient in one of eight micro-batches only, as a token's row of an embedding does.
    """
    ballot = Ballot(rule=rule)
    layer = GhostLinearTandem(new_grid(16, 64, 97, ballot))
    layer.grid.unlock()
    generator = torch.Generator().manual_seed(98)
    for number in range(40):
        losses = []
        for _ in range(micro_batches):
            x, up = torch.randn(8, 64, generator=generator), torch.randn(8, 16, generator=generator)
            up *= torch.rand(1, 16, generator=generator) < present
            losses.append(lambda x=x, up=up: (layer(x) * up).sum())
        step(layer, ballot, number, losses, 0.0)
    mean = float(rule.corrected(layer.grid.state).double().mean()) / (8 * present)
    assert 0.6 < mean < 1.4


@pytest.mark.parametrize("same", [False, True], ids=["noise", "one-opinion"])
@pytest.mark.parametrize("count", [1, 3, 16])
def test_agreement_tells_noise_from_one_opinion(count: int, same: bool) -> None:
    """1/K where the micro-batches of a step are independent, 1 where they are the same; the yardstick follows."""
    rule = MomentumRule(buffer="int16", beta2=0.8)
    ballot = Ballot(rule=rule)
    layer = GhostLinearTandem(new_grid(40, 64, 100, ballot))
    layer.grid.unlock()
    sizes = []
    for number in range(10):
        losses, gradients = noise_losses(layer, number, count, same=same)
        sizes.append(float(gradients.mean(0).square().mean()))
        step(layer, ballot, number, losses, 0.0)
        if number == 0:
            assert rule.agreement(layer.grid.state, count) <= 1.0
    expected = 1.0 if same else 1 / count
    agreement = rule.agreement(layer.grid.state, count)
    # 400 rows-and-steps of a squared sum: a relative error of sqrt(2 / 400), less the fading of the early ones.
    assert agreement == pytest.approx(expected, rel=0.25) and 1 / count <= agreement <= 1
    rms = rule.corrected(layer.grid.state).double().sqrt()
    floored = torch.maximum(rms, 0.5 * rms.square().mean().sqrt())
    wanted = (1 - rule.beta) * UNIT / count / (floored * agreement**0.5)
    torch.testing.assert_close(row_yardstick(layer.grid), wanted, rtol=1e-5, atol=0)


def test_a_sudden_spike_does_not_silence_a_wide_row() -> None:
    """One micro-batch a step, 4,096 columns, a gradient a million times the measured one: the next steps still vote."""
    ballot = Ballot(MomentumRule())
    layer = GhostLinearTandem(new_grid(1, 4096, 97, ballot))
    layer.grid.unlock()
    x = randn(2, 4096, seed=98)
    for number, factor in enumerate((1.0, 1e6, 1.0)):
        step(layer, ballot, number, [lambda f=factor: layer(x).sum() * f], 0.0)
        assert bool((layer.grid.state.rows["r2"] > 0).all()) and bool((row_yardstick(layer.grid) > 0).all()), number


def test_a_vote_of_one_row_rms_moves_a_weight_by_the_rate() -> None:
    """unit votes = one RMS: value moves by the rate, in weight space and whatever the row's scale."""
    grid = GhostGrid(3, 3000, MANIFOLD, Ballot(rule=PLAIN))
    grid.name = "g"
    grid.import_weights(randn(3, 3000, seed=99) * torch.tensor([[0.02], [1.0], [30.0]]))
    arm(grid, 1.0)
    before = dense(grid)
    grid.votes[:, :1500], grid.votes[:, 1500:] = UNIT, -2 * UNIT
    move(grid, 1e-4)
    moved = dense(grid) - before
    # Twenty standard errors of the draw between neighbours at most a gap apart would be visible in the tiny rows only.
    gap = grid.scale.double() / 16384
    for part, wanted in ((moved[:, :1500], 1e-4), (moved[:, 1500:], -2e-4)):
        error = (part.mean(1) - wanted).abs()
        assert bool((error < 1e-6 + 5 * 0.5 * gap / math.sqrt(1500)).all())
    assert float((moved[0, :1500].mean() - 1e-4).abs()) < 1e-6


# -- learning ---------------------------------------------------------------------------------------------------------


def train_regression(scramble: bool) -> tuple[float, float]:
    """Loss before and after 60 steps on a teacher's answers; scrambled: the gradient's signs are shuffled."""
    ballot = Ballot(MomentumRule(), seed=1)
    layer = GhostLinearTandem(new_grid(8, 24, 100, ballot, name="g"))
    layer.grid.unlock()
    teacher = dense(layer.grid).float() + randn(8, 24, seed=101) * 0.2
    signs = torch.Generator().manual_seed(102)

    def loss(seed: int) -> torch.Tensor:
        x = randn(32, 24, seed=seed)
        y = layer(x)
        if scramble and y.requires_grad:
            y.register_hook(lambda g: g * (torch.randint(2, g.shape, generator=signs) * 2 - 1))
        return (y - x @ teacher.T).square().mean()

    test_seed = 999
    start = loss(test_seed).item()
    for number in range(60):
        rate = 0.02 * (1 - number / 60)
        step(layer, ballot, number, [lambda k=k, n=number: loss(10_000 + 2 * n + k) for k in range(2)], rate)
    return start, loss(test_seed).item()


def test_votes_solve_a_regression_and_shuffled_signs_do_not() -> None:
    start, end = train_regression(scramble=False)
    assert end < 0.02 * start
    start, end = train_regression(scramble=True)
    assert end > 0.8 * start


def train_tiny(random_labels: bool, backend: str | None = None) -> tuple[float, float, dict[str, int]]:
    """Loss on the task (token t is followed by 3 t + 1) before and after 40 steps; and flips of each grid."""
    ballot = Ballot(MomentumRule(), seed=2, backend=backend)
    model = Tiny(ballot)
    grids = model.unlock()
    before = {name: grid.indices.clone() for name, grid in grids.items()}
    probe = torch.arange(37)[None]
    answers = (3 * probe + 1) % 37
    start = model(probe, answers).item()
    for number in range(40):
        losses = []
        for k in range(2):
            ids = randint(37, (4, 16), 5000 + 2 * number + k)
            targets = randint(37, (4, 16), 9000 + 2 * number + k) if random_labels else (3 * ids + 1) % 37
            losses.append(lambda i=ids, t=targets: model(i, t))
        step(model, ballot, number, losses, 0.03)
    ballot.close()
    changed = {name: int((grid.indices != before[name]).sum()) for name, grid in grids.items()}
    return start, model(probe, answers).item(), changed


def test_votes_teach_a_classifier_and_random_labels_do_not() -> None:
    start, end, changed = train_tiny(random_labels=False)
    assert end < 0.5 < start
    assert all(count > 100 for count in changed.values())
    start, end, _ = train_tiny(random_labels=True)
    assert end > 0.9 * math.log(37)


def test_a_weight_at_its_rows_largest_magnitude_can_still_grow() -> None:
    grid = new_grid(4, 16, 103, Ballot(rule=PLAIN))
    arm(grid, 1.0)
    largest = dense(grid).abs().max(1)
    sign = dense(grid).gather(1, largest.indices[:, None]).sign()
    grid.votes.scatter_(1, largest.indices[:, None], (UNIT * sign).to(torch.int16))
    move(grid, 0.05)
    grown = dense(grid).gather(1, largest.indices[:, None])[:, 0].abs() - largest.values
    torch.testing.assert_close(grown, torch.full((4,), 0.05, dtype=torch.float64), rtol=0.01, atol=0)


@pytest.mark.parametrize("name", RULES)
def test_the_vote_state_continues_bit_for_bit(name: str) -> None:
    """Saved in the middle of a step, between its micro-batches, and loaded into a fresh model."""

    def losses(model: Tiny, number: int) -> list[Callable[[], torch.Tensor]]:
        return [
            lambda k=k: model(randint(37, (2, 8), 100 * number + k), randint(37, (2, 8), 100 * number + 50 + k))
            for k in range(2)
        ]

    def finish(model: Tiny, ballot: Ballot) -> list[torch.Tensor]:
        ballot.open("cast", 3, 1, 2)
        losses(model, 3)[1]().backward()
        core.apply_votes(core.grids_of(model), 1e-2)
        for number in (4, 5, 6):
            step(model, ballot, number, losses(model, number), 1e-2)
        return [t.clone() for g in core.grids_of(model).values() for t in everything(g).values()]

    ballot = Ballot(seed=6, rule=rule_named(name))
    model = Tiny(ballot)
    model.unlock()
    for number in range(3):
        step(model, ballot, number, losses(model, number), 1e-2)
    ballot.open("cast", 3, 0, 2)
    losses(model, 3)[0]().backward()
    weights = copy.deepcopy(model.state_dict())
    saved = {grid.name: copy.deepcopy(grid.vote_state()) for grid in core.grids_of(model).values()}
    assert model.up.grid.votes.any() and saved["up.grid"]["row_squares"].any()
    assert ("votes" in saved["up.grid"]) == (name != "compact")
    through = finish(model, ballot)

    ballot = Ballot(seed=6, rule=rule_named(name))
    fresh = Tiny(ballot, seed=40)
    fresh.load_state_dict(weights)
    for grid in core.grids_of(fresh).values():
        grid.load_vote_state(saved[grid.name])
    resumed = finish(fresh, ballot)
    assert all(torch.equal(a, b) for a, b in zip(through, resumed, strict=True))


def test_loading_an_empty_vote_state_locks() -> None:
    grid = new_grid(3, 4, 104)
    grid.unlock()
    grid.load_vote_state({})
    assert not grid.unlocked


@pytest.mark.parametrize(
    ("writer", "reader", "part"),
    [
        (MomentumRule(buffer="int16"), MomentumRule(), "votes is torch.int16, expected torch.int8"),
        (MomentumRule(), MomentumRule(buffer="int16"), "votes is torch.int8, expected torch.int16"),
        (rule_named("supermajority"), MomentumRule(buffer="int16"), "is missing, expected torch"),
        (MomentumRule(buffer="int16"), rule_named("stochastic"), "expected none"),
    ],
)
def test_votes_of_another_rule_are_refused(writer: VoteRule, reader: VoteRule, part: str) -> None:
    """A buffer read in other units would move weights by nonsense; what the grid had is not overwritten in part."""
    source, grid = new_grid(3, 4, 104, Ballot(rule=writer)), new_grid(3, 4, 104, Ballot(rule=reader))
    source.unlock()
    grid.unlock()
    with pytest.raises(GhostError, match=f"the votes of g are not those of rule {reader.name}.*{part}"):
        grid.load_vote_state(source.vote_state())


def test_loading_copies_the_state() -> None:
    """The saved tensors, mapped from a file perhaps, are not written to by later votes."""
    grid = new_grid(3, 4, 104)
    grid.unlock()
    saved = copy.deepcopy(grid.vote_state())
    grid.load_vote_state(saved)
    for name, tensor in grid.vote_state().items():
        tensor.fill_(9)
        assert not saved[name].any(), name


# -- votes inside the words -------------------------------------------------------------------------------------------


def compact_grid(seed: int = 110) -> GhostGrid:
    return new_grid(12, 30, seed, Ballot(rule=CompactRule()))


def test_locking_drops_the_votes_inside_the_words_and_leaves_the_levels(slices: int | None) -> None:
    grid = compact_grid()
    words = grid.indices.clone()
    weights = dense(grid)
    grid.unlock()
    assert torch.equal(grid.indices, words), "unlocking touches no word"
    assert grid.state.votes is None and "votes" not in grid.vote_state()
    planted = randint(63, (12, 30), 111).to(torch.int16) - 31
    grid.indices += planted
    assert torch.equal(grid.votes.short(), planted) and grid.votes.dtype == torch.int8
    assert torch.equal(dense(grid), weights), "votes move no weight by themselves"
    assert torch.equal(grid.dequantize().double(), weights)
    grid.unlock()
    assert torch.equal(grid.votes.short(), planted), "unlocking twice keeps the votes"
    grid.lock()
    assert torch.equal(grid.indices, words) and grid.votes is None
    grid.unlock()
    assert not grid.votes.any() and torch.equal(grid.indices, words)


def test_votes_inside_the_words_stay_when_their_state_is_loaded() -> None:
    grid = compact_grid()
    grid.unlock()
    grid.indices += 7
    saved = copy.deepcopy(grid.vote_state())
    fresh = compact_grid(seed=112)
    fresh.indices.copy_(grid.indices)
    fresh.load_vote_state(saved)
    assert bool((fresh.votes == 7).all()) and torch.equal(fresh.indices, grid.indices)
    fresh.load_vote_state({})
    assert not fresh.unlocked and torch.equal(fresh.indices, grid.indices - 7)


@pytest.mark.parametrize(("start", "end"), [(MANIFOLD, COMPACT), (COMPACT, MANIFOLD)], ids=["in", "out"])
def test_moving_to_another_manifold_snaps_to_its_nearest_entries(
    start: Manifold, end: Manifold, slices: int | None
) -> None:
    """Scales stay; the report is the float64 noise; a grid with votes does not move."""
    grid = GhostGrid(12, 30, start, Ballot(rule=CompactRule() if start is COMPACT else PLAIN))
    grid.name = "g"
    grid.import_weights(randn(12, 30, seed=113))
    scale, before, words = grid.scale.clone(), dense(grid), grid.indices.clone()
    grid.unlock()
    with pytest.raises(GhostError, match="g is unlocked"):
        grid.move_to(end)
    assert torch.equal(grid.indices, words) and grid.manifold is start
    grid.lock()
    report = grid.move_to(end)
    assert torch.equal(grid.scale, scale) and grid.manifold.name == end.name
    assert not end.votes(grid.indices).any() and end.unused(grid.indices) == 0
    share = before / scale.double()[:, None]
    levels = (end.fixed.double() / 2.0**40)[None, None]
    distance = (share.abs()[..., None] - levels).abs().min(-1).values if end is COMPACT else None
    if distance is not None:
        off = (dense(grid) / scale.double()[:, None] - share).abs()
        assert float((off - distance).max()) < 1e-7
    noise, signal = (dense(grid) - before).square().sum(), before.square().sum()
    assert report.elements == 360 and report.saturated == 0
    if float(noise):
        assert report.snr_db == pytest.approx(10 * math.log10(float(signal / noise)), abs=0.01)
    assert report.snr_db > end.snr_limit_db


@pytest.mark.parametrize("name", RULES)
def test_a_rule_on_the_wrong_manifold_is_refused(name: str) -> None:
    rule = rule_named(name)
    grid = GhostGrid(3, 4, MANIFOLD if rule.vote_bits else COMPACT, Ballot(rule=rule))
    with pytest.raises(RuleError, match=f"rule {name} needs the manifold") as error:
        grid.unlock()
    assert "\n" not in str(error.value) and not grid.unlocked


# -- weight decay -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["momentum", "compact"])
def test_weight_decay_takes_its_share_of_every_weight(name: str) -> None:
    """lr times weight_decay of each weight a step, in the mean over the draws; a grid of zeros stays zero."""
    rule = rule_named(name)
    model = nn.Module()
    model.one = GhostLinearTandem(new_grid(64, 500, 114, Ballot(rule=rule)))
    model.zero = GhostLinearTandem(GhostGrid(4, 5, table_for(rule)))
    core.name_grids(model, ballot := Ballot(seed=3, rule=rule))
    grids = core.grids_of(model)
    for grid in grids.values():
        arm(grid, 1.0)
    grid = grids["one.grid"]
    before = dense(grid)
    rate, decay, steps = 5e-3, 0.1, 40
    for ballot.step in range(steps):
        moved = core.apply_votes(grids, rate, decay)
    expected = (1 - rate * decay) ** steps
    after = dense(grid)
    share = float((after * before).sum() / before.square().sum())
    # Five standard deviations of the mean over the draws, measured over 60 seeds; the decay itself is 0.02.
    error = 2e-5 if name == "momentum" else 5e-4
    assert share == pytest.approx(expected, abs=error) and expected < 0.981
    for rows in (slice(0, 64, 3), slice(1, 64, 3)):
        part = float((after[rows] * before[rows]).sum() / before[rows].square().sum())
        assert part == pytest.approx(expected, abs=2 * error), "whatever the scale of the row"
    assert moved["one.grid"].flips > 0 and moved["zero.grid"].flips == 0
    assert not grids["zero.grid"].indices.any()
    core.apply_votes(grids, rate)
    assert torch.equal(dense(grid), after), "without weight decay a weight without votes stays"


@pytest.mark.parametrize("name", ["supermajority", "stochastic"])
def test_rules_without_weight_decay_refuse_it(name: str) -> None:
    grid = new_grid(3, 4, 115, Ballot(rule=rule_named(name)))
    grid.unlock()
    with pytest.raises(RuleError, match="no weight decay"):
        core.apply_votes({"g": grid}, 1e-3, 0.1)


# -- refusals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "change", [{"beta": 1.0}, {"beta": -0.1}, {"beta2": 1.0}, {"beta2": math.nan}, {"floor": -1.0}]
)
def test_the_rule_refuses(change: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=next(iter(change))):
        MomentumRule(**change)


@pytest.mark.parametrize(("beta", "wanted"), [(0.7, 45_875), (0.0, 0)])
def test_the_share_that_survives_in_the_kernels_units(
    beta: float, wanted: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[dict[str, Any]] = []
    monkeypatch.setattr(kernels, "apply_votes", lambda *_, **given: seen.append(given) or (0, 0, 0))
    grid = new_grid(2, 3, 105, Ballot(rule=MomentumRule(beta=beta)))
    arm(grid, 1.0)
    grid.apply_votes(1e-3)
    assert seen[0]["decay"] == wanted and seen[0]["shrink"] == 0


def test_the_ballot_refuses() -> None:
    ballot = Ballot(MomentumRule())
    with pytest.raises(ValueError, match="'closed'"):
        ballot.open("closed", 0, 0, 1)
    for micro_batch, micro_batches in ((1, 1), (-1, 2), (0, 0)):
        with pytest.raises(ValueError, match="micro-batch"):
            ballot.open("cast", 0, micro_batch, micro_batches)
    assert ballot.mode == "closed"


def test_names_give_distinct_ids() -> None:
    names = [f"model.layers.{i}.{p}.grid" for i in range(100) for p in ("q_proj", "k_proj", "up_proj")]
    ids = {tensor_id(name) for name in names}
    assert len(ids) == len(names) and all(0 <= i < 1 << 63 for i in ids)


def test_no_float_operation_when_a_grid_applies_votes() -> None:
    """All of a move after the first, which takes the reciprocal of the scale, is integers."""
    ballot = Ballot(rule=PLAIN, backend="torch")
    grid = new_grid(7, 9, 105, ballot)
    arm(grid, 1.0)
    grid.votes.fill_(UNIT)
    move(grid, 1e-3)
    grid.votes.fill_(UNIT)
    before = grid.indices.clone()
    with Watch() as watch:
        move(grid, 1e-3)
    assert watch.seen == [] and not torch.equal(grid.indices, before)


def test_kernels_are_reached_through_the_ballots_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str | None] = []
    original = kernels.backend_for
    monkeypatch.setattr(kernels, "backend_for", lambda d, wanted=None: asked.append(wanted) or original(d, wanted))
    ballot = Ballot(rule=PLAIN, backend="torch")
    layer = GhostLinearTandem(new_grid(5, 7, 106))
    asked.clear()
    layer.grid.ballot = ballot
    arm(layer.grid, 10.0)
    ballot.open("cast", 0, 0, 1)
    layer(randn(3, 7, seed=107).requires_grad_()).square().sum().backward()
    layer.grid.apply_votes(1e-3)
    assert len(asked) >= 4 and set(asked) == {"torch"}
    assert np.array_equal(layer.grid.dequantize(slice(1, 3)).numpy(), dense(layer.grid).float()[1:3].numpy())

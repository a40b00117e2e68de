"""Low-bit codes against their definition in float64: tables, nearest codes, scales, and what is refused."""

from __future__ import annotations

import math

import pytest
import torch

import low_bit
from entropy_coding import encode
from low_bit import GROUPS, OCTAVE, TABLES, TOP_MAX, LowBitError, LowBitGrid, Scales

pytestmark = pytest.mark.usefixtures("one_thread")


def random_scales(rows: int = 7, columns: int = 64, groups: int = 2) -> Scales:
    of_rows, of_columns = (torch.randint(-60, 61, shape).to(torch.int8) for shape in ((rows, groups), (columns,)))
    return Scales(of_rows, of_columns, 0.0371)


def random_grid(rows: int = 7, columns: int = 64, groups: int = 2, name: str = "linear", top: int = 40) -> LowBitGrid:
    codes = torch.randint(-top, top + 1, (rows, columns)).to(torch.int16)
    return LowBitGrid(codes, random_scales(rows, columns, groups), name, top)


@pytest.mark.parametrize("name", TABLES)
@pytest.mark.parametrize("top", [1, 7, 500, TOP_MAX])
def test_tables_are_antisymmetric_and_increasing(name: str, top: int) -> None:
    values = low_bit.table(name, top)
    assert values.shape == (2 * top + 1,) and values.dtype == torch.float32
    assert values[top] == 0 and torch.equal(values, -values.flip(0))
    assert (values.diff() > 0).all() and top - len(low_bit.NUCLEUS) <= values[-1] <= top


@pytest.mark.parametrize("name", TABLES)
def test_the_nearest_code_is_the_nearest(name: str) -> None:
    top = 25
    weights = torch.randn(20, 30) * 15
    steps = torch.rand(20, 30) + 0.5
    codes = low_bit.nearest(weights, steps, name, top)
    values = low_bit.table(name, top).double()
    distance = (weights.double()[..., None] / steps.double()[..., None] - values).abs()
    taken = distance.gather(-1, (codes.long() + top)[..., None])[..., 0]
    assert codes.dtype == torch.int16 and (taken <= distance.min(-1).values + 1e-5).all()


@pytest.mark.parametrize("name", TABLES)
def test_weights_are_table_times_steps(name: str) -> None:
    grid = random_grid(name=name)
    scales = grid.scales
    exponents = scales.rows.double().repeat_interleave(32, 1) + scales.columns.double()
    steps = scales.unit * torch.exp2(exponents / OCTAVE)
    expected = low_bit.table(name, grid.top).double()[grid.codes.long() + grid.top] * steps
    torch.testing.assert_close(grid.weights().double(), expected, rtol=1e-6, atol=0)
    assert grid.weights().dtype == torch.float32
    rows = torch.tensor([5, 0, 5])
    assert torch.equal(scales.steps(rows), scales.steps()[rows])
    torch.testing.assert_close(scales.times(3.0).steps(), scales.steps() * 3, rtol=1e-6, atol=0)


@pytest.mark.parametrize(("rows", "columns", "groups"), [(7, 64, 2), (1, 5, 1), (300, 1, 1), (0, 8, 1), (40, 96, 3)])
def test_codes_are_stored_in_an_order_that_the_scales_tell(rows: int, columns: int, groups: int) -> None:
    grid = random_grid(rows, columns, groups)
    stored = grid.stored()
    assert stored.shape == (rows * columns,) and stored.dtype == torch.int16
    back = LowBitGrid.restored(stored, grid.scales, grid.name, grid.top)
    assert torch.equal(back.codes, grid.codes)
    with pytest.raises(LowBitError, match="codes are"):
        LowBitGrid.restored(torch.cat([stored, stored[:1], torch.zeros(1).short()]), grid.scales, "linear", 40)


def test_the_like_is_stored_together() -> None:
    """Codes of one spread stand next to each other, so that chunks of the stored order differ in spread."""
    scales = Scales(
        torch.randint(-20, 21, (512, 1)).to(torch.int8), torch.randint(-20, 21, (512,)).to(torch.int8), 0.05
    )
    codes = low_bit.nearest(torch.randn(512, 512), scales.steps(), "linear", TOP_MAX)
    stored = LowBitGrid(codes, scales).stored()
    assert len(encode(stored.numpy())) < 0.98 * len(encode(codes.numpy()))


def test_scales_are_within_a_sixteenth_of_an_octave() -> None:
    rows, columns = torch.exp(torch.randn(50, 3) * 1.5).double(), torch.exp(torch.randn(12)).double()
    scales = low_bit.scales_of(rows, columns)
    wanted = rows.repeat_interleave(4, 1) * columns
    error = (torch.log2(scales.steps().double()) - wanted.log2()).abs()
    assert scales.rows.dtype == scales.columns.dtype == torch.int8 and error.max() <= 2 / 16 + 1e-5
    far = low_bit.scales_of(torch.tensor([[1e-30], [1.0], [1e30]]).double(), torch.ones(2))
    assert far.rows.tolist() == [[-120], [0], [120]] and math.isfinite(far.unit) and far.unit > 0


@pytest.mark.parametrize("name", TABLES)
def test_rounding_columns_carries_errors_to_the_right(name: str) -> None:
    rows, block, top = 9, 17, 30
    weights, steps = torch.randn(rows, block) * 4, torch.rand(rows, block) + 0.5
    factor = torch.triu(torch.randn(block, block) * 0.3) + 2 * torch.eye(block)
    codes, errors = low_bit.round_columns(weights.clone(), steps, factor, name, top)
    left = weights.double()
    values = low_bit.table(name, top).double()
    for j in range(block):
        distance = (left[:, j, None] / steps[:, j, None].double() - values).abs()
        taken = distance.gather(1, (codes[:, j].long() + top)[:, None])[:, 0]
        assert (taken <= distance.min(1).values + 1e-4).all()
        error = (left[:, j] - values[codes[:, j].long() + top] * steps[:, j].double()) / factor[j, j].double()
        torch.testing.assert_close(errors[:, j].double(), error, rtol=1e-4, atol=1e-4)
        left = left - error[:, None] * factor[j].double()


def test_groups() -> None:
    assert [low_bit.check_group(128, group, "x") for group in GROUPS] == [1, 4, 2, 1]
    with pytest.raises(LowBitError, match=r"q_proj has rows of 341 weights, not a multiple of the group 32: .*group 0"):
        low_bit.check_group(341, 32, "q_proj")
    with pytest.raises(LowBitError, match="group is 48, expected one of 0, 32, 64, 128"):
        low_bit.check_group(96, 48, "x")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"rows": torch.zeros(7, 2)}, "scales are torch.float32"),
        ({"columns": torch.zeros(64, dtype=torch.int16)}, "scales are torch.int8 and torch.int16"),
        ({"rows": torch.zeros(7, 3, dtype=torch.int8)}, "do not fit together"),
        ({"rows": torch.zeros(7, dtype=torch.int8)}, "do not fit together"),
        ({"unit": 0.0}, "unit is 0.0"),
        ({"unit": float("nan")}, "unit is nan"),
        ({"unit": float("inf")}, "unit is inf"),
    ],
)
def test_what_are_no_scales_is_refused(change: dict, words: str) -> None:
    good = random_scales()
    parts = {"rows": good.rows, "columns": good.columns, "unit": good.unit}
    Scales(**parts)
    with pytest.raises(LowBitError, match=words):
        Scales(**{**parts, **change})


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"codes": torch.zeros(7, 64, dtype=torch.int32)}, "codes are torch.int32"),
        ({"codes": torch.zeros(6, 64, dtype=torch.int16)}, r"codes are torch.int16 \(6, 64\), expected"),
        ({"codes": torch.full((7, 64), -41, dtype=torch.int16)}, "a code is larger than 40"),
        ({"name": "cubic"}, "table 'cubic'"),
        ({"top": TOP_MAX + 1}, "levels"),
    ],
)
def test_what_is_no_grid_is_refused(change: dict, words: str) -> None:
    parts = {"codes": random_grid().codes, "scales": random_scales(), "name": "linear", "top": 40}
    LowBitGrid(**parts)
    with pytest.raises(LowBitError, match=words):
        LowBitGrid(**{**parts, **change})

"""sliced_softmax: both backends against float64, slice by slice and whole, in both types, and what is not finite."""

from __future__ import annotations

import math

import pytest
import torch

import ghost_kernels as kernels
import sliced_softmax
from sliced_softmax import observe, turn_into_gradient

TYPES = [torch.float32, torch.bfloat16]
SHAPES = [(1, 1), (3, 7), (5, 64), (4, 65), (2, 1024), (3, 5001)]

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(params=kernels.BACKENDS, autouse=True)
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr(sliced_softmax, "_backend", lambda logits: request.param)
    return request.param


def known(tokens: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """What is known of tokens before the first slice; the last is garbage until the target is met."""
    return torch.full((tokens,), -math.inf), torch.zeros(tokens), torch.full((tokens,), 77.0)


def some(shape: tuple[int, int], kind: torch.dtype, size: float, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    logits = (size * torch.randn(shape, generator=generator)).to(kind)
    return logits, torch.randint(shape[1], (shape[0],), generator=generator)


@pytest.mark.parametrize("size", [0.0, 1.0, 30.0, 1e4], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("kind", TYPES, ids=str)
def test_loss_and_gradient_are_those_of_float64(kind: torch.dtype, shape: tuple[int, int], size: float) -> None:
    logits, targets = some(shape, kind, size, shape[1])
    exact = logits.double().requires_grad_()
    loss = torch.nn.functional.cross_entropy(exact, targets, reduction="sum")
    (0.37 * loss).backward()
    for parts in (1, 3):
        width = -(-shape[1] // parts)
        top, total, picked = known(shape[0])
        slices = [(a, logits[:, a : a + width].clone()) for a in range(0, shape[1], width)]
        for first, part in slices:
            observe(part, targets, first, top, total, picked)
        norm = top + total.log()
        torch.testing.assert_close((norm - picked).double().sum(), loss.detach(), rtol=2e-6, atol=1e-5 * shape[0])
        assert torch.equal(picked, logits.float().gather(1, targets[:, None])[:, 0])
        found = [turn_into_gradient(p.clone(), targets, first, norm, torch.tensor(0.37)) for first, p in slices]
        gradient = torch.cat(found, 1)
        assert gradient.dtype == kind
        rtol = 1e-5 if kind == torch.float32 else 5e-3
        # Far from 0 a logit has few digits behind the point, and so have differences of it.
        atol = 1e-7 * max(1.0, size) if kind == torch.float32 else 1e-5 * max(1.0, size)
        assert exact.grad is not None
        torch.testing.assert_close(gradient.double(), exact.grad, rtol=rtol, atol=atol)


@pytest.mark.parametrize("odd", [math.nan, math.inf], ids=str)
@pytest.mark.parametrize("column", [0, 63, 64, 70], ids=str)
@pytest.mark.parametrize("kind", TYPES, ids=str)
def test_what_is_not_finite_does_not_vanish(kind: torch.dtype, column: int, odd: float) -> None:
    logits, targets = some((3, 71), kind, 1.0, 5)
    logits[1, column] = odd
    top, total, picked = known(3)
    observe(logits, targets, 0, top, total, picked)
    norm = top + total.log()
    assert norm.isfinite().tolist() == [True, False, True]
    gradient = turn_into_gradient(logits, targets, 0, norm, torch.tensor(1.0))
    assert gradient.isfinite().all(1).tolist() == [True, False, True]


@pytest.mark.parametrize("kind", TYPES, ids=str)
def test_logits_that_are_impossible_count_for_nothing(kind: torch.dtype) -> None:
    logits, targets = some((4, 130), kind, 1.0, 6)
    logits[:, 100:] = -math.inf
    targets %= 100
    top, total, picked = known(4)
    observe(logits, targets, 0, top, total, picked)
    norm = top + total.log()
    torch.testing.assert_close(norm, logits[:, :100].float().logsumexp(1))
    gradient = turn_into_gradient(logits, targets, 0, norm, torch.tensor(1.0))
    assert float(gradient[:, 100:].abs().max()) < 1e-35


def test_rows_do_not_depend_on_threads_and_no_rows_are_no_work() -> None:
    logits, targets = some((64, 4096), torch.bfloat16, 3.0, 7)
    results = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        top, total, picked = known(64)
        observe(logits, targets, 0, top, total, picked)
        gradient = turn_into_gradient(logits.clone(), targets, 0, top + total.log(), torch.tensor(0.1))
        results.append((top, total, picked, gradient))
    torch.set_num_threads(1)
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    observe(logits[:0], targets[:0], 0, *known(0))

"""All ways to write use the same weights and write as much as asked."""

from __future__ import annotations

import pytest
import torch

import bench_generation as generation
from ghost_core import grids_of

pytestmark = pytest.mark.usefixtures("one_thread")


def test_ways_agree_on_weights_and_differ_in_kind() -> None:
    models = generation.make_models(generation.GenerateBench("toy", precision="float32"))
    assert bool(grids_of(models["indices"])) and not grids_of(models["dense copy"])
    assert not grids_of(models["transformers"])
    prompt = torch.arange(7)[None]
    logits = {way: model(prompt).logits for way, model in models.items()}
    torch.testing.assert_close(logits["dense copy"], logits["transformers"], rtol=0, atol=0)
    torch.testing.assert_close(logits["indices"], logits["transformers"], rtol=1e-4, atol=1e-4)
    written = generation.write_tokens(models["indices"], prompt, 5)
    assert written.shape == (1, 5)
    assert torch.equal(written[:, 0], logits["indices"][:, -1].argmax(-1))


def test_bad_settings_are_refused() -> None:
    for wrong in ({"model": "gpt"}, {"tokens": 0}, {"ways": ()}):
        with pytest.raises(ValueError, match="expected"):
            generation.GenerateBench(**wrong)  # type: ignore[arg-type]

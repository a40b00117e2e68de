"""A profile sees the kernels, says where time went, and leaves nothing behind."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import bench_training as training
import ghost_kernels
from step_profile import BREAKDOWN, TRACE, kind_of, named_kernels, profile_step


def test_a_profile_of_a_vote_step(tmp_path: Path, one_thread: None) -> None:
    method = training.METHODS["momentum"]
    config = training.TrainBench(precision="float32", seq_len=32)
    trained = training.make_trained(training.bare_model("toy", method), method, config)
    trained.step(1)
    text = profile_step(lambda: trained.step(1), tmp_path, "a step", {"cpu": "this one", "gpu": None})
    assert text.splitlines()[0] == "a step" and "None" not in text
    for word in ("matrix products", "kernel dequantize", "kernel cast_votes", "kernel apply_votes"):
        assert word in text
    shares = [float(line.split("%")[0]) for line in text.splitlines()[5:] if "%" in line and " ms  kernel" in line]
    assert shares and all(0 < share < 100 for share in shares)
    assert (tmp_path / BREAKDOWN).read_text() == text + "\n" and len(text.splitlines()) < 60
    names = {event.get("name") for event in json.loads((tmp_path / TRACE).read_text())["traceEvents"]}
    assert {"kernel dequantize", "aten::mm"} <= names


def test_kernels_are_themselves_again_afterwards() -> None:
    before = ghost_kernels.dequantize
    with pytest.raises(RuntimeError, match="stop"), named_kernels():
        assert ghost_kernels.dequantize is not before
        raise RuntimeError("stop")
    assert ghost_kernels.dequantize is before


def test_every_operator_has_a_kind() -> None:
    assert kind_of("aten::addmm_") == "matrix products"
    assert kind_of("aten::_scaled_dot_product_flash_attention_for_cpu") == "attention"
    assert kind_of("kernel snap") == "kernel snap"
    assert kind_of("aten::silu") == "elementwise and everything else"

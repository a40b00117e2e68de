"""bench_gpu: what it refuses, and that its data are packed rows of shards; its figures are a card's."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tiny_models import tiny_config, write_source

import bench_gpu
import qwen_prime_data
from bench_gpu import GpuBench
from bench_gpu import bench_gpu as run
from bench_tools import BenchError


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"methods": ("adam",)}, "methods has adam, expected of momentum"),
        ({"models": ("Qwen9",)}, "models has Qwen9"),
        ({"methods": ()}, "methods has none"),
        ({"seq_lens": ()}, "at least 1"),
        ({"steps": 0}, "at least 1"),
    ],
)
def test_settings_that_mean_nothing_are_refused(settings: dict[str, object], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        GpuBench(data=Path("x"), **settings)  # type: ignore[arg-type]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a card")
def test_without_a_card_it_says_what_to_run_instead(tmp_path: Path) -> None:
    with pytest.raises(BenchError, match=r"no CUDA device.*qwen_prime_bench\.py train"):
        run(GpuBench(data=tmp_path))


def test_rows_come_from_shards(tmp_path: Path) -> None:
    source, texts = write_source(tmp_path / "model", tiny_config("qwen2")), tmp_path / "texts.jsonl"
    texts.write_text("".join(f'{{"text": "a short text, number {n}, that is one of many"}}\n' for n in range(60)))
    config = qwen_prime_data.MaterializeConfig(data=str(texts), tokenizer=str(source), output=tmp_path / "shards")
    assert qwen_prime_data.main(config) == 0
    batches = bench_gpu._batches(GpuBench(data=tmp_path / "shards"), 64)
    batch = next(batches)
    assert batch.input_ids.shape == (1, 64) and int((batch.position_ids == 0).sum()) > 1

"""model_checks: sound models pass, and each planted defect fails under its own name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from data_tools import CHATML, SHARED, THINK, build_tokenizer, load_shared
from tiny_models import random_model, tiny_config

from model_checks import Check, check_isolation, check_model, check_tokenizer
from qwen_prime_wrapper import load_model

pytestmark = pytest.mark.usefixtures("one_thread")
ASSETS = Path(__file__).resolve().parent.parent / "assets"


def failed(checks: list[Check]) -> list[str]:
    return [check.name for check in checks if not check.passed]


def test_tiny_coder_holds() -> None:
    model, tokenizer, _ = load_model(ASSETS / "tiny_coder")
    model.train()
    checks = check_model(model, tokenizer)
    assert failed(checks) == [] and len(checks) == 7 and model.training
    assert {c.name for c in checks} >= {"tokenizer.round_trip", "template", "attention.packed", "attention.cache"}


@pytest.mark.parametrize("kind", ["qwen2", "qwen3", "llama"])
def test_random_models_hold(kind: str) -> None:
    assert failed(check_isolation(random_model(tiny_config(kind)))) == []


def test_a_model_that_looks_at_its_neighbour_or_loses_its_cache_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    model = random_model(tiny_config("qwen2"))
    forward = model.forward

    def without_positions(**options: Any) -> Any:
        options.pop("position_ids", None)
        return forward(**options)

    monkeypatch.setattr(model, "forward", without_positions)
    assert failed(check_isolation(model)) == ["attention.packed"]

    def without_cache(**options: Any) -> Any:
        out = forward(**{**options, "past_key_values": None})
        return out

    monkeypatch.setattr(model, "forward", without_cache)
    assert failed(check_isolation(model)) == ["attention.cache"]


def test_tokenizers_of_every_kind_hold() -> None:
    for template in (CHATML, THINK):
        assert failed(check_tokenizer(build_tokenizer(template), 400)) == []
    if SHARED.is_dir():
        for name in ("qwen3", "qwen2.5-coder"):
            assert failed(check_tokenizer(load_shared(name), 151_936)) == []


def test_planted_defects_of_tokenizers() -> None:
    assert failed(check_tokenizer(build_tokenizer(CHATML), 10)) == ["tokenizer.special"]
    lossy = build_tokenizer(CHATML)
    from tokenizers import normalizers

    lossy.backend_tokenizer.normalizer = normalizers.Lowercase()
    assert "tokenizer.round_trip" in failed(check_tokenizer(lossy, 400))
    broken = build_tokenizer(CHATML.replace("'<|im_end|>\\n'", "'\\n'"))
    assert "template" in failed(check_tokenizer(broken, 400))
    other = build_tokenizer(CHATML.replace("<|im_start|>assistant\\n", "Answer:"))
    assert "template" in failed(check_tokenizer(other, 400))


def test_the_tokenizers_vectors(shared_data: Path) -> None:
    """47 texts and their ids, as published for Qwen2's tokenizer."""
    folder = shared_data / "reference/qwen2_tokenizer_vectors"
    texts = (folder / "ggml-vocab-qwen2.gguf.inp").read_text(encoding="utf-8").split("\n__ggml_vocab_test__\n")
    lines = (folder / "ggml-vocab-qwen2.gguf.out").read_text().split("\n")
    texts, lines = texts[:47], lines[:47]
    for name in ("qwen2.5-coder", "qwen3"):
        tokenizer = load_shared(name)
        for text, line in zip(texts, lines, strict=True):
            ids = tokenizer(text, add_special_tokens=False)["input_ids"]
            assert ids == list(map(int, line.split())), repr(text)
            assert tokenizer.decode(ids) == text


def test_a_logit_that_is_not_finite_fails() -> None:
    model = random_model(tiny_config("qwen2"))
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[3, 3] = float("nan")
    checks = check_model(model, build_tokenizer(CHATML))
    assert "logits.finite" in failed(checks)

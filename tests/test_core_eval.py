"""core_eval: checks of answers, two protocols of perplexity against plain computations, reports."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import random_model, tiny_config, write_source

import core_eval
from core_eval import Prompt, compare, evaluate, load_suite, make_report, report_name, score_text
from qwen_prime_wrapper import load_model
from text_records import DataError

pytestmark = pytest.mark.usefixtures("one_thread")
ASSETS = Path(__file__).resolve().parent.parent / "assets"


@pytest.fixture(scope="module")
def coder() -> Any:
    model, tokenizer, _ = load_model(ASSETS / "tiny_coder")
    return model, tokenizer


def test_the_suite_is_the_pinned_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prompts = load_suite()
    assert len(prompts) == 40 and len({p.id for p in prompts}) == 40
    assert {p.category for p in prompts} == {"arithmetic", "facts", "reasoning", "code", "format"}
    assert [p.id for p in load_suite("tiny")] == ["arithmetic-1", "facts-1", "format-1"]
    changed = tmp_path / "suite.jsonl"
    changed.write_bytes(core_eval.SUITE.read_bytes().replace(b"7 + 5", b"7 + 6"))
    monkeypatch.setattr(core_eval, "SUITE", changed)
    with pytest.raises(DataError, match="scores would not compare"):
        load_suite()
    monkeypatch.setattr(core_eval, "SUITE", tmp_path / "absent")
    with pytest.raises(DataError, match="cannot read"):
        load_suite()


RIGHT = {
    "arithmetic-1": ["12", "The answer is 12.", "7 + 5 = 12", "12.0", "<think>maybe 13</think>12"],
    "arithmetic-10": ["55", "1,2,...,10 gives 55"],
    "facts-1": ["Paris", "paris.", "The capital is Paris", "\n\nParis\nLyon"],
    "facts-7": ["CO2", "carbon dioxide"],
    "reasoning-2": ["From 14:20 to 15:05 it is 45", "45"],
    "code-2": [
        "```python\ndef add(a, b):\n    return a + b\n```",
        'def add(a, b) -> int:\n    """Sum."""\n    return a + b',
    ],
    "code-4": ["[x ** 2 for x in range(10)]", "[i*i for i in range(0, 10)]"],
    "format-2": ['{"ok": true}', '```json\n{"ok":true}\n```'],
    "format-5": ["- a\n- b\n- c", "- apple\n-pear\n- plum\n"],
}
WRONG = {
    "arithmetic-1": ["", "twelve", "13", "12 or 13"],
    "facts-1": ["Paris, in France", "London", "", "..."],
    "reasoning-2": ["45 minutes and 0", "fourty-five"],
    "code-2": ["def add(a, b):\n    return a - b"],
    "code-4": ["[x ** 3 for x in range(10)]", "[x ** 2 for y in range(10)]"],
    "format-1": ["Yes", "yes.", "yes\nno"],
    "format-2": ['Here: {"ok": true}', '{"ok": false}'],
    "format-5": ["- a\n- b", "- a\n- b\n- c\n- d"],
}


@pytest.mark.parametrize(("cases", "passes"), [(RIGHT, True), (WRONG, False)])
def test_answers_are_judged_as_a_person_would(cases: dict[str, list[str]], passes: bool) -> None:
    prompts = {p.id: p for p in load_suite()}
    for name, texts in cases.items():
        for text in texts:
            assert prompts[name].passes(text) is passes, (name, text)


def test_numbers_with_separators() -> None:
    prompt = Prompt("x", "x", "?", "number", "1200", 8)
    assert prompt.passes("1,200") and prompt.passes("about 7, no: 1200") and not prompt.passes("1,20")


def plain_nats(model: Any, ids: torch.Tensor, window: int, stride: int) -> tuple[float, int]:
    """Each token once, from the first window that reaches it, in float64."""
    nats, count, scored_to = 0.0, 0, 0
    with torch.no_grad():
        for start in range(0, len(ids), stride):
            stop = min(start + window, len(ids))
            logits = model(input_ids=ids[None, start:stop], use_cache=False).logits[0].double().log_softmax(-1)
            for position in range(max(start + 1, scored_to), stop):
                nats -= float(logits[position - start - 1, ids[position]])
                count += 1
            scored_to = stop
            if stop == len(ids):
                break
    return nats, count


@pytest.mark.parametrize(("window", "stride"), [(64, None), (64, 64), (64, 16), (64, 63), (16, 1), (128, 32)])
def test_text_by_both_protocols(window: int, stride: int | None, tmp_path: Path) -> None:
    model, tokenizer, _ = load_model(write_source(tmp_path / "m", tiny_config()))
    text = "def area(width, height): return width * height  # größer\n" * 5
    found = score_text(model, tokenizer, text, window=window, stride=stride)
    ids = torch.tensor(tokenizer(text)["input_ids"])
    if stride is None:
        nats = count = 0.0
        for piece in ids.split(window):
            more = plain_nats(model, piece, window, window)
            nats, count = nats + more[0], count + more[1]
    else:
        nats, count = plain_nats(model, ids, window, stride)
        # By a stride every token but the first of the text is scored, unless windows do not overlap at all.
        assert stride == window or count == len(ids) - 1
    assert found["tokens"] == count
    assert found["nll_per_token"] == pytest.approx(nats / count, rel=1e-5)
    assert found["perplexity"] == pytest.approx(math.exp(nats / count), rel=1e-4)
    # One token is one byte here.
    assert found["bytes"] == pytest.approx(count, abs=1)
    assert found["bits_per_byte"] == pytest.approx(nats / math.log(2) / found["bytes"], rel=1e-5)


def test_windows_that_do_not_fit_are_refused(coder: Any) -> None:
    for options in ({"window": 4096}, {"window": 1}, {"stride": 2000}, {"window": 64, "stride": 65}):
        with pytest.raises(DataError, match="expected a window of 2 to 1024 tokens"):
            score_text(*coder, "text", **options)
    with pytest.raises(DataError, match="at least 2"):
        score_text(*coder, "")


def test_an_evaluation_is_the_same_again_and_leaves_the_model_alone(coder: Any) -> None:
    model, tokenizer = coder
    model.train()
    first, second = (evaluate(model, tokenizer, "tiny") for _ in range(2))
    assert first == second and model.training
    scores, details = first
    assert scores["invariants"] == [7, 7] and scores["suite"][1] == 3  # type: ignore[index]
    assert {a["id"] for a in details["answers"]} == {"arithmetic-1", "facts-1", "format-1"}
    json.dumps(first, allow_nan=False)


def test_answers_do_not_depend_on_the_batch(coder: Any) -> None:
    prompts = [p for p in load_suite() if p.tokens == 16][::3]
    one, eight = (core_eval.ask(*coder, prompts, batch_size=n) for n in (1, 4))
    assert sum(one[p.id] == eight[p.id] for p in prompts) >= len(prompts) - 1, "padding moves roundings only"


def test_a_broken_model_fails_its_invariants_in_the_scores() -> None:
    from data_tools import CHATML, build_tokenizer

    model = random_model(tiny_config(vocab_size=400))
    with torch.no_grad():
        model.model.norm.weight[0] = math.nan
    scores, details = evaluate(model, build_tokenizer(CHATML), "tiny")
    passed, total = scores["invariants"]  # type: ignore[misc]
    assert passed < total
    json.dumps(details, allow_nan=False)


def test_reports_and_their_comparison(coder: Any) -> None:
    def report(**scores: Any) -> dict[str, Any]:
        rest: Any = {"model": {"path": "x"}, "tokenizer": coder[1], "details": {}, "settings": {}}
        return make_report(kind="core", name="x", step=3, scores=scores, **rest)

    before = report(loss=2.5, suite=[3, 40], tokens=7, broken=math.nan, gone=1.0)
    after = report(loss=2.25, suite=[5, 40], tokens=7, broken=1.0, new=[1, 2])
    assert before["scores"]["broken"] is None
    json.dumps(before, allow_nan=False)
    assert compare([before, after]) == [
        ("loss", ["2.5000", "2.2500"], "-0.2500"),
        ("suite", ["3 of 40", "5 of 40"], "+2"),
        ("tokens", ["7", "7"], "+0"),
        ("broken", ["-", "1.0000"], ""),
        ("gone", ["1.0000", "-"], ""),
        ("new", ["-", "1 of 2"], ""),
    ]
    assert {"suite_sha256", "tokenizer_sha256", "torch", "transformers", "decoding"} <= set(before["settings"])
    assert report_name("tiny_coder_prime_step_7") == "EVAL_tiny_coder_step_7.json"
    assert report_name("tiny_coder_prime_init") == "EVAL_tiny_coder_init.json"
    assert core_eval.name_and_step("a_b_prime_step_12") == ("a_b", 12)
    assert core_eval.name_and_step("folder") == ("folder", None)

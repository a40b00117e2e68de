"""What is compared: splits, samples, tasks and methods that are all there, refusals."""

from __future__ import annotations

import importlib.util
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny_tasks import tiny_task

import quality_tasks
from answer_masks import encode_records
from quality_tasks import Task
from qwen_prime_wrapper import load_model

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def task(tmp_path_factory: pytest.TempPathFactory) -> Task:
    return tiny_task(tmp_path_factory.mktemp("quality"))


def test_the_split_goes_by_prompts_and_the_samples_by_content(task: Task, tmp_path: Path) -> None:
    _, tokenizer, _ = load_model(task.model)
    data = quality_tasks.load_data(task, tokenizer, Path("nowhere"))
    again = json.loads(Path(task.records).read_text())
    # Reversed, and every question with a second answer: no prompt may change or straddle sides.
    more = [*reversed(again), *({**row, "answer": "no idea"} for row in again)]
    (tmp_path / "more.json").write_text(json.dumps(more))
    changed = replace(task, records=str(tmp_path / "more.json"), target_tokens=10**9)
    other = quality_tasks.load_data(changed, tokenizer, Path("nowhere"))

    def prompts(part: Any) -> set[str]:
        return {tokenizer.decode(part.document(i).input_ids).split("\n")[0] for i in range(len(part))}

    assert prompts(data.train).isdisjoint(prompts(other.target))
    assert prompts(data.train) == prompts(other.train)
    assert 10 < len(prompts(other.target)) < 40
    assert prompts(data.target) < prompts(other.target)


def test_a_sample_is_the_same_in_any_order_and_just_large_enough(task: Task) -> None:
    _, tokenizer, _ = load_model(task.model)
    texts = [f"text {i} " + "x" * (i % 7) for i in range(50)]
    sets = [encode_records(t, tokenizer, 64, progress=False) for t in (texts, texts[::-1])]
    first, second = (quality_tasks.sample(s, 200) for s in sets)
    ids = [sorted(tuple(s.document(i).input_ids) for i in range(len(s))) for s in (first, second)]
    assert ids[0] == ids[1]
    assert 200 <= first.tokens < 200 + 64
    assert first.lengths.sum() == len(first.answer) == first.tokens
    assert np.all(np.diff(first.record) > 0)
    assert quality_tasks.sample(sets[0], 10**6).tokens == sets[0].tokens


def test_tasks_and_methods_are_complete() -> None:
    for name, task in quality_tasks.TASKS.items():
        assert task.name == name
        for method in quality_tasks.METHODS:
            assert len(task.rates_of(method)) >= 3
    assert quality_tasks.BASELINE in quality_tasks.DEFAULT_METHODS
    assert set(quality_tasks.TASKS["stdlib-low"].rates_of("momentum")) == {1e-5, 3e-5, 1e-4}


def test_the_library_has_held_out_files() -> None:
    texts = quality_tasks.library_texts()
    assert len(texts) > 20 and texts == quality_tasks.library_texts()


def test_the_real_tasks_load(shared_data: Path) -> None:
    """Only the smallest: the others differ in paths, which ``check_task`` looks at."""
    for name in quality_tasks.TASKS:
        quality_tasks.check_task(name, shared_data)
    task = quality_tasks.TASKS["atto"]
    _, tokenizer, _ = load_model(task.path(task.model, shared_data))
    data = quality_tasks.load_data(replace(task, held_out_one_in=200), tokenizer, shared_data)
    assert data.source.tokens >= task.source_tokens
    assert len(data.target) > 20


# -- one run ----------------------------------------------------------------------------------------------------------


def test_refusals(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(quality_tasks.QualityError, match="unknown task"):
        quality_tasks.check_task("x", tmp_path)
    with pytest.raises(quality_tasks.QualityError, match="is missing; give the folder of the data with --data-root"):
        quality_tasks.check_task("atto", tmp_path)
    with pytest.raises(quality_tasks.QualityError, match="unknown method"):
        quality_tasks.check_method("sgd")
    with monkeypatch.context() as patch:
        patch.setattr(importlib.util, "find_spec", lambda _: None)
        with pytest.raises(quality_tasks.QualityError, match=r"needs the package peft: .* requirements-bench\.txt"):
            quality_tasks.check_method("lora")
    odd = quality_tasks.Method("votes", (1e-3,), vote_rule="shouting")
    monkeypatch.setitem(quality_tasks.METHODS, "odd", odd)
    with pytest.raises(quality_tasks.QualityError, match="unknown vote rule 'shouting'"):
        quality_tasks.check_method("odd")
    monkeypatch.setitem(quality_tasks.METHODS, "odd", replace(odd, vote_rule="momentum", manifold="hilly"))
    with pytest.raises(quality_tasks.QualityError, match="unknown manifold 'hilly'"):
        quality_tasks.check_method("odd")

"""The plan: static lines are what exists, the real geometries fit where they must, and advice is consistent."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import import_source, tiny_config, write_source

import manifolds
import memory_plan as plan
from answer_masks import encode_records
from night_shift import LayerPeel
from packed_batches import PackedBatches
from prime_checkpoint import load_checkpoint
from qwen_prime_wrapper import build_model, model_from_checkpoint, tokenizer_from_checkpoint
from training_recipe import Recipe
from vote_rules import RULES, rule_named
from vote_trainer import VoteTrainer


def geometry(shared_data: Path, name: str, rule: str = "momentum") -> Any:
    config = json.loads((shared_data / "configs" / name / "config.json").read_text())
    return build_model(config, manifolds.build("compact" if rule_named(rule).vote_bits else manifolds.DEFAULT))


LIMITS = [
    ("Qwen2.5-Coder-1.5B-Instruct", {}, None, 6.0),
    ("Qwen2.5-Coder-1.5B-Instruct", {"vote_rule": "compact"}, None, 4.6),
    ("Qwen2.5-Coder-1.5B-Instruct", {"seq_len": 1024}, None, 6.6),
    ("Qwen3-1.7B", {}, None, 6.8),
    ("Qwen2.5-Coder-1.5B-Instruct", {"peel": LayerPeel.parse("v7")}, 0, 4.2),
]


@pytest.mark.parametrize(("name", "changes", "layers", "limit"), LIMITS, ids=str)
def test_real_geometries_are_planned_within_their_limits(
    shared_data: Path, name: str, changes: dict[str, Any], layers: int | None, limit: float
) -> None:
    settings = plan.Settings(**changes)
    model = geometry(shared_data, name, settings.vote_rule)
    lines = plan.budget(model, settings, layers)
    assert all(p.is_meta for p in model.parameters()), "nothing may be allocated"
    assert 0.75 * limit < plan.total(lines) / 1e9 < limit
    assert next(line.bytes for line in lines if line.what == "indices") / 2 > 1.5e9


@pytest.mark.parametrize("rule", RULES)
def test_static_lines_are_what_exists_after_a_step(rule: str, tmp_path: Path) -> None:
    manifold = "compact" if rule_named(rule).vote_bits else "prime-harmonic"
    import_source(write_source(tmp_path / "source", tiny_config()), tmp_path / "x.pt", manifold=manifold)
    checkpoint = load_checkpoint(tmp_path / "x.pt")
    encoded = encode_records(["abcabc" * 4] * 20, tokenizer_from_checkpoint(checkpoint), 32, progress=False)
    batches = PackedBatches(encoded, seq_len=32, batch_size=1, pad_id=258, seed=0)
    recipe = Recipe(steps=4, grad_accum=2, lr=1e-3, vote_rule=rule, device="cpu")  # type: ignore[arg-type]
    trainer = VoteTrainer(model_from_checkpoint(checkpoint), batches, recipe)
    for _ in range(2):
        trainer.step()
    grids = trainer.grids.values()
    size = {line.what: line.bytes for line in plan.budget(trainer.model, plan.Settings(vote_rule=rule))}

    def count(*tensors: torch.Tensor) -> int:
        return sum(t.numel() * t.element_size() for t in tensors)

    assert size["indices"] == sum(count(g.indices) for g in grids)
    assert size["votes"] == sum(count(g.state.votes) for g in grids if g.state and g.state.votes is not None)
    rows = 0
    for grid in grids:
        assert grid.state is not None and grid.state.cached is not None
        cached = [t for t in grid.state.cached[1] if isinstance(t, torch.Tensor)]
        rows += count(grid.scale, grid.inverse_scale(), *grid.state.rows.values(), *cached)
        made = (grid.state.shares, grid.state.push)
        rows += count(*grid.state.columns.values(), *(t for t in made if t is not None))
    assert rows <= size["scales, rows and columns"] <= 1.3 * rows
    moments = [t for s in trainer.optimizer.state.values() for t in s.values() if t.numel() > 1]
    parameters = list(trainer.floats.values())
    assert size["norms and biases"] == count(*parameters) * 2 + count(*moments)


def test_what_is_given_up_saves_something(shared_data: Path) -> None:
    model = geometry(shared_data, "Qwen2.5-Coder-1.5B-Instruct")

    def size(**changes: Any) -> int:
        return plan.total(plan.budget(model, plan.Settings(**changes)))

    assert size(vote_rule="compact") < size() < size(vote_buffer="int16")
    assert size(seq_len=256) < size(seq_len=384) < size() < size(seq_len=1024) < size(seq_len=1024, batch_size=2)
    assert size(peel=LayerPeel.parse("v7", 4)) < size(peel=LayerPeel.parse("v7", 8)) < size()
    assert size() < size(gradient_checkpointing=False)
    assert size(compute="bfloat16") < 1.01 * size() < size(cuda=True)


def test_what_to_give_up_first_is_wide_micro_batches_at_the_same_tokens_a_step() -> None:
    found = plan.alternatives(plan.Settings(batch_size=6, grad_accum=5))
    assert [(s.batch_size, s.grad_accum) for s in found[:3]] == [(6, 5), (3, 10), (1, 30)]
    assert all(s.batch_size == 1 and s.tokens >= 512 * 30 for s in found[3:]) and len(found) > 3
    assert {(s.seq_len, s.grad_accum) for s in found[3:]} == {(512, 30), (384, 40), (256, 60)}
    assert found[1].flags.endswith("--batch-size 3 --grad-accum 10")
    assert all(s.vote_rule == "momentum" and s.seq_len == 512 for s in found[:3])


def test_a_vote_buffer_that_is_set_is_planned_with_and_named() -> None:
    model = build_model(tiny_config(), manifolds.build(), "a test")
    settings = plan.Settings(vote_buffer="int16")
    found = plan.alternatives(settings)
    assert {(s.vote_rule, s.vote_buffer) for s in found} == {("momentum", "int16"), ("compact", None)}
    assert all(("--vote-buffer int16" in s.flags) == (s.vote_rule == "momentum") for s in found)
    assert "--vote-buffer" not in plan.Settings().flags
    text, _ = plan.report(model, settings, 10**9)
    assert text.count("--vote-rule momentum --vote-buffer int16 --peel") == text.count("--vote-rule momentum")


def test_an_untied_embedding_votes_only_where_the_lowest_layer_is_open() -> None:
    table = manifolds.build()
    embedding = tiny_config()["vocab_size"] * tiny_config()["hidden_size"]
    votes: dict[bool, list[int]] = {}
    for tied in (True, False):
        model = build_model(tiny_config(tie_word_embeddings=tied), table, "a test")
        settings = plan.Settings(peel=LayerPeel.parse("v7"))
        found = (plan.budget(model, settings, count) for count in (0, 1, 2, None))
        votes[tied] = [next(line.bytes for line in lines if line.what == "votes") for lines in found]
    assert votes[True][0] == votes[False][0] == embedding
    assert [b - a for a, b in zip(votes[True], votes[False], strict=True)] == [0, 0, embedding, embedding]


def test_the_report_answers_whether_it_fits_and_with_which_flags(shared_data: Path) -> None:
    model = geometry(shared_data, "Qwen2.5-Coder-1.5B-Instruct")
    text, fits = plan.report(model, plan.Settings(), 11 * 2**30)
    assert fits and "fits: 5." in text and "of 11.81 GB" in text
    text, fits = plan.report(model, plan.Settings(), 4_000_000_000)
    assert not fits and text.count("--vote-rule") >= 8
    advice = [line for line in text.splitlines() if line.startswith("  fits ")]
    assert advice and all("compact" in line or "--peel-window" in line for line in advice)
    text, _ = plan.report(model, plan.Settings(peel=LayerPeel.parse("v7")), 11 * 2**30)
    assert "before the first unlock" in text

"""The comparison of methods: equal data and loss, what a run reports, reading curves, many runs in processes."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_models import clone_tree, tiny_config, write_source

import manifolds
import prime_cli
import prime_quality as quality
import quality_summary
import qwen_prime_bench as bench
from answer_masks import encode_records
from ghost_core import grids_of
from packed_batches import PackedBatches
from prime_telemetry import read_lines
from qwen_prime_wrapper import load_model
from training_recipe import Recipe
from vote_trainer import VoteTrainer

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def task(tmp_path_factory: pytest.TempPathFactory) -> quality.Task:
    """A random model of bytes, sums to learn and a sentence to forget."""
    folder = tmp_path_factory.mktemp("quality")
    write_source(folder / "model", tiny_config())
    rows = [{"question": f"{a} plus {b}", "answer": f"gives {a + b}."} for a in range(10) for b in range(10)]
    (folder / "sums.json").write_text(json.dumps(rows))
    (folder / "old.json").write_text(json.dumps([f"the cat number {i} sat on the mat" for i in range(40)]))
    return quality.Task(
        "tiny",
        str(folder / "model"),
        str(folder / "sums.json"),
        str(folder / "old.json"),
        held_out_one_in=4,
        seq_len=64,
        grad_accum=2,
        steps=6,
        warmup=1,
        target_tokens=300,
        source_tokens=300,
    )


def execute(task: quality.Task, method: str, lr: float, seed: int = 0, steps: int | None = None) -> dict[str, Any]:
    run = quality.Run(task.name, method, lr, seed, steps or task.steps)
    return quality.execute(run, task, Path("nowhere"))


def make_parts(task: quality.Task) -> tuple[Any, quality.TaskData, Callable[[], PackedBatches]]:
    model, tokenizer, _ = load_model(task.model)
    data = quality.load_data(task, tokenizer, Path("nowhere"))
    pad = data.pad_id
    return model, data, lambda: PackedBatches(data.train, seq_len=task.seq_len, batch_size=1, pad_id=pad, seed=0)


# -- data -------------------------------------------------------------------------------------------------------------


def test_the_split_goes_by_prompts_and_the_samples_by_content(task: quality.Task, tmp_path: Path) -> None:
    _, tokenizer, _ = load_model(task.model)
    data = quality.load_data(task, tokenizer, Path("nowhere"))
    again = json.loads(Path(task.records).read_text())
    # Reversed, and every question with a second answer: no prompt may change or straddle sides.
    more = [*reversed(again), *({**row, "answer": "no idea"} for row in again)]
    (tmp_path / "more.json").write_text(json.dumps(more))
    changed = replace(task, records=str(tmp_path / "more.json"), target_tokens=10**9)
    other = quality.load_data(changed, tokenizer, Path("nowhere"))

    def prompts(part: Any) -> set[str]:
        return {tokenizer.decode(part.document(i).input_ids).split("\n")[0] for i in range(len(part))}

    assert prompts(data.train).isdisjoint(prompts(other.target))
    assert prompts(data.train) == prompts(other.train)
    assert 10 < len(prompts(other.target)) < 40
    assert prompts(data.target) < prompts(other.target)


def test_a_sample_is_the_same_in_any_order_and_just_large_enough(task: quality.Task) -> None:
    _, tokenizer, _ = load_model(task.model)
    texts = [f"text {i} " + "x" * (i % 7) for i in range(50)]
    sets = [encode_records(t, tokenizer, 64, progress=False) for t in (texts, texts[::-1])]
    first, second = (quality.sample(s, 200) for s in sets)
    ids = [sorted(tuple(s.document(i).input_ids) for i in range(len(s))) for s in (first, second)]
    assert ids[0] == ids[1]
    assert 200 <= first.tokens < 200 + 64
    assert first.lengths.sum() == len(first.answer) == first.tokens
    assert np.all(np.diff(first.record) > 0)
    assert quality.sample(sets[0], 10**6).tokens == sets[0].tokens


def test_tasks_and_methods_are_complete() -> None:
    for name, task in quality.TASKS.items():
        assert task.name == name
        for method in quality.METHODS:
            assert len(task.rates_of(method)) >= 3
    assert quality.BASELINE in quality.DEFAULT_METHODS
    assert set(quality.TASKS["stdlib-low"].rates_of("momentum")) == {1e-5, 3e-5, 1e-4}


def test_the_library_has_held_out_files() -> None:
    texts = quality.library_texts()
    assert len(texts) > 20 and texts == quality.library_texts()


def test_the_real_tasks_load(shared_data: Path) -> None:
    """Only the smallest: the others differ in paths, which ``check_task`` looks at."""
    for name in quality.TASKS:
        quality.check_task(name, shared_data)
    task = quality.TASKS["atto"]
    _, tokenizer, _ = load_model(task.path(task.model, shared_data))
    data = quality.load_data(replace(task, held_out_one_in=200), tokenizer, shared_data)
    assert data.source.tokens >= task.source_tokens
    assert len(data.target) > 20


# -- one run ----------------------------------------------------------------------------------------------------------


def test_dense_and_votes_see_the_same_tokens_and_the_same_loss(task: quality.Task) -> None:
    model, _, batches = make_parts(task)
    hf_config = json.loads((Path(task.model) / "config.json").read_text())
    ghost = quality.to_grid(model, hf_config, manifolds.build())
    recipe = Recipe(
        steps=2, grad_accum=2, lr=0.0, warmup=0, compute="float32", gradient_checkpointing=False, device="cpu"
    )
    dense = quality.DenseTrainer(model, batches(), recipe, quality.METHODS["adamw"])
    votes = VoteTrainer(ghost, batches(), recipe)
    for _ in range(2):
        (loss, tokens), other = dense.step(), votes.step()
        assert tokens == other.tokens
        assert loss == pytest.approx(other.loss, abs=1e-3)


def test_a_dense_step_minimises_the_mean_over_all_answer_tokens(task: quality.Task) -> None:
    """Against one batch with all rows of the step and the mean that torch takes itself."""
    model, data, batches = make_parts(task)
    twin, _, _ = load_model(task.model)
    recipe = Recipe(steps=1, grad_accum=3, lr=1e-3, warmup=0, gradient_checkpointing=False, device="cpu")
    trainer = quality.DenseTrainer(model, batches(), recipe, quality.METHODS["adamw"])
    wide = next(PackedBatches(data.train, seq_len=task.seq_len, batch_size=3, pad_id=data.pad_id, seed=0))
    logits = twin(input_ids=wide.input_ids, position_ids=wide.position_ids, use_cache=False).logits
    torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), wide.labels[:, 1:].flatten()).backward()
    gradients: dict[str, torch.Tensor] = {}
    original = trainer.optimizer.step
    names = {id(p): n for n, p in model.named_parameters()}

    def keep(*_: Any) -> Any:
        gradients.update({names[id(p)]: p.grad.clone() for p in trainer.parameters if p.grad is not None})
        return original()

    trainer.optimizer.step = keep  # type: ignore[method-assign]
    trainer.step()
    assert set(gradients) == {n for n, _ in twin.named_parameters()}
    for name, parameter in twin.named_parameters():
        assert parameter.grad is not None
        torch.testing.assert_close(gradients[name], parameter.grad, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("manifold", [n for n in ("prime-harmonic", "compact") if n in manifolds.NAMES])
def test_a_grid_model_computes_what_the_dense_one_does(task: quality.Task, manifold: str) -> None:
    model, _, _ = make_parts(task)
    hf_config = json.loads((Path(task.model) / "config.json").read_text())
    ghost = quality.to_grid(model, hf_config, manifolds.build(manifold))
    ids = torch.arange(40)[None]
    with torch.no_grad():
        difference = (ghost(input_ids=ids).logits - model(input_ids=ids).logits).abs().max()
        assert difference < (1e-2 if manifold == "prime-harmonic" else 0.5)
    assert {g.manifold.name for g in grids_of(ghost).values()} == {manifold}


@pytest.mark.parametrize("method", ["adamw", "momentum", "supermajority", "stochastic", "compact"])
def test_a_run_learns_and_reports(task: quality.Task, method: str) -> None:
    try:
        quality.check_method(method)
    except quality.QualityError as error:
        pytest.skip(str(error))
    result = execute(task, method, 1e-2 if method != "adamw" else 3e-3)
    assert result["target_after"] < result["target_before"]
    assert result["source_before"] > 0 and result["source_after"] > 0
    steps = [step for step, _ in result["curve"]]
    assert steps == [0, 2, 3, 5, 6]
    assert result["curve"][0][1] == result["target_before"] and result["curve"][-1][1] == result["target_after"]
    if method == "adamw":
        assert result["bytes_per_parameter"] == pytest.approx(16, abs=0.01)
    else:
        # Rows of 48 weights: their states weigh more here than in a real model.
        assert result["bytes_per_parameter"] < 6
    json.dumps(result, allow_nan=False)


def test_a_run_repeats_and_seeds_differ(task: quality.Task) -> None:
    one, two, three = (execute(task, "adamw", 3e-3, seed, steps=2) for seed in (0, 0, 1))
    assert one["target_after"] == two["target_after"] != three["target_after"]
    assert one["target_before"] == three["target_before"] and one["data"] == three["data"]


def test_lora_trains_the_adapters_alone(task: quality.Task) -> None:
    pytest.importorskip("peft")
    model, _, batches = make_parts(task)
    base = clone_tree(dict(model.state_dict()))
    quality.add_adapters(model, seed=0)
    recipe = Recipe(steps=1, grad_accum=2, lr=1e-2, warmup=0, gradient_checkpointing=False, device="cpu")
    trainer = quality.DenseTrainer(model, batches(), recipe, quality.METHODS["lora"])
    trainer.step()
    now = {n.replace(".base_layer", ""): t for n, t in model.state_dict().items()}
    assert all(torch.equal(now[name], tensor) for name, tensor in base.items())
    # Seven linear layers in each of two decoder layers, two factors of each.
    assert len(trainer.parameters) == 2 * 7 * 2
    assert any(n.endswith("lora_B.default.weight") and bool(t.any()) for n, t in now.items())
    assert quality.stored_bytes(trainer) < 16 * sum(p.numel() for p in model.parameters())


def test_8_bit_adamw_learns(task: quality.Task) -> None:
    pytest.importorskip("bitsandbytes")
    result = execute(task, "adamw-8bit", 3e-3)
    assert result["target_after"] < result["target_before"]
    # Matrices of fewer than 4,096 weights keep float32 states, else it would be 10.
    assert 10 < result["bytes_per_parameter"] < 14


def test_a_loss_that_is_not_finite_moves_nothing_and_is_reported_as_none(
    task: quality.Task, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, _, batches = make_parts(task)
    recipe = Recipe(steps=1, grad_accum=2, lr=1e-2, warmup=0, gradient_checkpointing=False, device="cpu")
    trainer = quality.DenseTrainer(model, batches(), recipe, quality.METHODS["adamw"])
    before = clone_tree(dict(model.state_dict()))
    answer_loss = quality.answer_loss
    with monkeypatch.context() as patch:
        patch.setattr(quality, "answer_loss", lambda *a: (answer_loss(*a)[0] * torch.nan, 1))
        assert np.isnan(trainer.step()[0])
    assert all(torch.equal(before[n], t) for n, t in model.state_dict().items())
    monkeypatch.setattr(quality, "mean_answer_loss", lambda *_: (float("nan"), 1))
    assert execute(task, "adamw", 1e-3, steps=1)["target_after"] is None


# -- summary ----------------------------------------------------------------------------------------------------------


def line(method: str, lr: float, seed: int, target: float | None, source: float | None, **more: Any) -> dict[str, Any]:
    return {
        "task": "toy",
        "method": method,
        "lr": lr,
        "seed": seed,
        "steps": 5,
        "bytes_per_parameter": 16.0 if method == "adamw" else 4.0,
        "target_before": 3.0,
        "source_before": 2.0,
        "target_after": target,
        "source_after": source,
        **more,
    }


LINES = [
    *(line("adamw", 1e-3, s, 2.5 + 0.02 * s, 2.1) for s in (0, 1)),
    *(line("adamw", 3e-3, s, 2.3 + 0.02 * s, 2.4) for s in (0, 1)),
    *(line("adamw", 1e-2, s, 2.9, 3.0) for s in (0, 1)),
    *(line("momentum", 1e-3, s, 2.4, 2.1) for s in (0, 1)),
    *(line("momentum", 4e-3, s, 2.2, 2.3) for s in (0, 1)),
    *(line("momentum", 1.6e-2, s, None, None) for s in (0, 1)),
]


def test_a_curve_begins_at_the_start_and_rises_with_the_rate() -> None:
    curve = quality_summary.curve_of([x for x in LINES[::-1] if x["method"] == "adamw"])
    assert np.allclose(curve, [(3.0, 0.0), (2.51, 0.1), (2.31, 0.4), (2.9, 1.0)])
    assert quality_summary.curve_of([]) == []


def test_forgetting_is_read_between_points_on_the_way_down() -> None:
    curve = [(3.0, 0.0), (2.5, 0.1), (2.3, 0.4), (2.9, 1.0)]
    assert quality_summary.forgetting_at(curve, 2.4) == pytest.approx(0.25)
    assert quality_summary.forgetting_at(curve, 2.75) == pytest.approx(0.05)
    assert quality_summary.forgetting_at(curve, 2.3) == pytest.approx(0.4)
    assert quality_summary.forgetting_at(curve, 2.2) is None
    assert quality_summary.forgetting_at([(3.0, 0.0), (3.0, 0.2)], 3.0) == 0.0


def test_the_summary_compares_at_best_and_at_equal_loss() -> None:
    adamw, momentum = quality_summary.summary([*LINES, line("momentum", 9e-3, 0, 1.0, 2.0, steps=2)], steps=5)
    assert (adamw.method, adamw.lr, adamw.rates) == ("adamw", 3e-3, 3)
    assert adamw.target == pytest.approx(2.31) and adamw.targets == (2.3, 2.32)
    assert adamw.target_ratio == adamw.forgetting_ratio == adamw.equal_ratio == 1.0
    assert (momentum.lr, momentum.target, momentum.rates) == (4e-3, 2.2, 2)
    assert momentum.forgetting == pytest.approx(0.3)
    assert momentum.forgetting_ratio == pytest.approx(0.75)
    assert momentum.target_ratio == pytest.approx(2.2 / 2.31)
    assert momentum.equal_target == pytest.approx(2.31)
    assert momentum.equal_forgetting == pytest.approx(0.1 + 0.2 * 0.09 / 0.2)
    assert momentum.equal_ratio == pytest.approx((0.1 + 0.2 * 0.09 / 0.2) / 0.4)
    assert not adamw.equal_rough and not momentum.equal_rough


def test_a_best_rate_that_is_the_highest_tried_is_marked() -> None:
    """A higher one that diverged was tried; a single one says nothing of others."""
    rows = {r.method: r for r in quality_summary.summary(LINES)}
    assert not rows["adamw"].highest and not rows["momentum"].highest
    higher = quality_summary.summary([*LINES, *(line("adamw", 3e-2, s, 2.0, 3.0) for s in (0, 1))])
    assert higher[0].highest and quality_summary.cells(higher[0])[3] == "0.03^ (4)"
    (single,) = quality_summary.summary([line("lora", 1e-3, 0, 2.7, 2.02)])
    assert quality_summary.cells(single)[3] == "0.001 (1)"


def test_a_comparison_on_the_first_line_of_a_curve_is_marked() -> None:
    """A method that never comes as low as the baseline's lowest learning rate."""
    rows = {r.method: r for r in quality_summary.summary([*LINES, line("lora", 1e-3, 0, 2.7, 2.02)])}
    assert rows["lora"].equal_target == 2.7 and rows["lora"].equal_rough
    assert quality_summary.cells(rows["lora"])[-1].startswith("~")


def test_a_summary_without_baseline_or_with_missing_seeds() -> None:
    (row,) = quality_summary.summary([x for x in LINES if x["method"] == "momentum"])
    assert row.equal_ratio is row.target_ratio is None
    assert "-" in quality_summary.cells(row)
    half = quality_summary.summary([*LINES, line("momentum", 8e-3, 0, 2.0, 2.0)])
    assert half[1].lr == 8e-3
    table = quality_summary.markdown(half).splitlines()
    assert len(table) == 4 and {x.count("|") for x in table} == {len(quality_summary.COLUMNS) + 1}
    assert quality_summary.summary([line("lora", 1e-3, 0, None, 2.0)]) == []


# -- many runs --------------------------------------------------------------------------------------------------------


def test_a_plan_finishes_a_seed_before_the_next() -> None:
    tasks = [quality.TASKS["stdlib"], quality.TASKS["stdlib-low"]]
    runs = quality.plan(tasks, ["adamw", "lora"], [0, 1])
    assert len(runs) == len(set(runs)) == 2 * 2 * 3 * 2
    assert [r.seed for r in runs] == [0] * 12 + [1] * 12
    assert {r.lr for r in runs if r.task == "stdlib-low" and r.method != "lora"} == {1e-5, 3e-5, 1e-4}
    assert {(r.lr, r.steps) for r in quality.plan(tasks, ["adamw"], [0], rates=[0.5], steps=7)} == {(0.5, 7)}


def test_workers_run_what_is_missing_and_failures_are_one_line(tmp_path: Path) -> None:
    """Workers that only say what they were told, and one that fails."""
    path = tmp_path / "deep" / "results.jsonl"
    runs = [quality.Run("toy", "adamw", lr, 0, 5) for lr in (1e-3, 2e-3, 3e-3)]
    quality.append_result(path, line("adamw", 1e-3, 0, 2.5, 2.1))
    with path.open("a") as file:
        file.write('{"torn')
    calls: list[float] = []

    def command(run: quality.Run) -> list[str]:
        calls.append(run.lr)
        said = json.dumps({**line("adamw", run.lr, 0, 2.4, 2.1), "threads": "?"})
        code = (
            f"import os, sys; print('a note'); d = {said!r}\n"
            "print(d.replace('?', os.environ['OMP_NUM_THREADS'] + os.environ['OMP_WAIT_POLICY']))"
        )
        if run.lr == 3e-3:
            code = "import sys; print('error: out of luck', file=sys.stderr); sys.exit(1)"
        return [sys.executable, "-c", code]

    with pytest.raises(quality.QualityError, match=r"1 of 2 runs failed; toy adamw lr 0\.003 seed 0: out of luck"):
        quality.run_all(runs, command, path, jobs=2, threads=3)
    assert sorted(calls) == [2e-3, 3e-3]
    assert [x["lr"] for x in read_lines(path)] == [1e-3, 2e-3]
    assert list(read_lines(path))[-1]["threads"] == "3passive"
    assert quality.run_all(runs[:2], command, path, jobs=2, threads=1) == 0


def test_refusals(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(quality.QualityError, match="unknown task"):
        quality.check_task("x", tmp_path)
    with pytest.raises(quality.QualityError, match="is missing; give the folder of the data with --data-root"):
        quality.check_task("atto", tmp_path)
    with pytest.raises(quality.QualityError, match="unknown method"):
        quality.check_method("sgd")
    with monkeypatch.context() as patch:
        patch.setattr(quality.importlib.util, "find_spec", lambda _: None)
        with pytest.raises(quality.QualityError, match=r"needs the package peft: .* requirements-bench\.txt"):
            quality.check_method("lora")
    odd = quality.Method("votes", (1e-3,), vote_rule="shouting")
    monkeypatch.setitem(quality.METHODS, "odd", odd)
    with pytest.raises(quality.QualityError, match="unknown vote rule 'shouting'"):
        quality.check_method("odd")
    monkeypatch.setitem(quality.METHODS, "odd", replace(odd, vote_rule="momentum", manifold="hilly"))
    with pytest.raises(quality.QualityError, match="unknown manifold 'hilly'"):
        quality.check_method("odd")


def cli(arguments: list[str]) -> int:
    return prime_cli.run(bench.BenchConfig, bench.main, (bench.BenchError, quality.QualityError), arguments)


def test_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "results.jsonl"
    for result in LINES:
        quality.append_result(path, {**result, "task": "stdlib"})
    table = tmp_path / "table.md"
    options = ["quality", "--results", str(path), "--summary", "--steps", "5"]
    assert cli([*options, "--markdown", str(table)]) == 0
    assert "momentum" in capsys.readouterr().out
    assert table.read_text().count("| stdlib | ") == 2
    assert cli(["quality", "--tasks", "atto", "--methods", "adamw", "--data-root", str(tmp_path)]) == 1
    assert capsys.readouterr().err.count("\n") == 1
    for wrong in (["--tasks", "x"], ["--methods", "sgd"], ["--jobs", "0"], ["--lrs", "2"]):
        assert cli(["quality", *wrong]) == 2
        assert capsys.readouterr().err.count("\n") == 1
    assert cli(["quality", "--worker", "--tasks", "stdlib", "--methods", "adamw"]) == 1


def test_a_worker_command_says_one_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the parent writes is what the worker reads back, to the last bit of the learning rate."""
    run = quality.Run("stdlib", "adamw", 1 / 3, 4, 7)
    command = quality.worker_command(run, Path("bench.py"), tmp_path, "cpu")
    seen: list[bench.QualityBench] = []
    prime_cli.run(bench.BenchConfig, lambda c: seen.append(c) or 0, (), command[2:])
    (config,) = seen
    assert config.worker and config.data_root == tmp_path.resolve()
    assert quality.plan(
        [quality.TASKS["stdlib"]], config.methods, config.seeds, rates=config.lrs, steps=config.steps
    ) == [run]

"""The transformers plug-in: folders of indices that open, close, train, resume, and refuse to open wrongly."""

from __future__ import annotations

import copy
import gc
import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import import_source, rewrite_json, tiny_config, write_source
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

import modeling_prime
from ballots import Ballot, RuleError
from dense_weights import open_dense
from ghost_core import apply_votes, grids_of, name_grids
from ghost_grid import GhostError
from momentum_rules import MomentumRule
from prime_checkpoint import load_checkpoint
from prime_hf import PrimeConfig, PrimeVoteOptimizer, export_prime_hf
from qwen_prime_wrapper import load_model, load_tokenizer

pytestmark = pytest.mark.usefixtures("one_thread")
IDS = torch.arange(3, 43)[None]
KINDS: dict[str, dict[str, Any]] = {
    "qwen2-tied": {},
    "qwen2-untied": {"tie_word_embeddings": False},
    "qwen3-tied": {},
    "qwen3-untied": {"tie_word_embeddings": False},
}


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("sources")
    paths = {}
    for name, changes in KINDS.items():
        source = write_source(folder / name, tiny_config(name.split("-")[0], **changes))
        import_source(source, paths.setdefault(name, folder / f"{name}.pt"))
    import_source(folder / "qwen2-tied", paths.setdefault("compact", folder / "compact.pt"), manifold="compact")
    return paths


@pytest.fixture(scope="module")
def folders(checkpoints: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    base = tmp_path_factory.mktemp("folders")
    for name, path in checkpoints.items():
        export_prime_hf(open_dense(path), base / name, 10**9, False)
    return {name: base / name for name in checkpoints}


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=IDS).logits.float()


def indices(model: Any) -> dict[str, torch.Tensor]:
    return {name: grid.indices.clone() for name, grid in grids_of(model).items()}


# -- opening and saving -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [*KINDS, "compact"])
def test_opens_saves_and_dequantizes(
    checkpoints: dict[str, Path], folders: dict[str, Path], tmp_path: Path, kind: str
) -> None:
    ours, _, _ = load_model(checkpoints[kind])
    model, info = AutoModelForCausalLM.from_pretrained(folders[kind], output_loading_info=True)
    assert not any(info.values()), info
    assert model.is_quantized and model.dtype == torch.float32
    assert torch.equal(logits(model), logits(ours))
    stored = load_checkpoint(checkpoints[kind])["model"]
    for name, grid in grids_of(model).items():
        assert torch.equal(grid.indices, stored[f"{name}.indices"]) and torch.equal(grid.scale, stored[f"{name}.scale"])

    model.save_pretrained(tmp_path / "again", max_shard_size="20KB")
    assert (tmp_path / "again" / "modeling_prime.py").is_file()
    # Placing a model takes accelerate, which the suite itself does without.
    where = {"device_map": "auto"} if importlib.util.find_spec("accelerate") else {}
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again", **where)
    assert torch.equal(logits(again), logits(ours))

    again.dequantize()
    assert not grids_of(again) and not hasattr(again.config, "quantization_config")
    assert torch.allclose(logits(again), logits(ours), atol=1e-4)
    tied = again.get_output_embeddings().weight is again.get_input_embeddings().weight
    assert tied == bool(ours.config.tie_word_embeddings)
    again.save_pretrained(tmp_path / "dense")
    dense, info = AutoModelForCausalLM.from_pretrained(tmp_path / "dense", output_loading_info=True)
    assert not any(info.values()), info
    assert torch.equal(logits(dense), logits(again))


def test_dequantizes_to_the_asked_dtype(folders: dict[str, Path]) -> None:
    model = AutoModelForCausalLM.from_pretrained(folders["qwen3-tied"])
    exact = logits(model)
    model.dequantize(torch.bfloat16)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert float((logits(model) - exact).abs().max()) < 0.05 * float(exact.abs().max())


@pytest.mark.parametrize("place", ["cpu", {"": "cpu"}, {"model": "cpu", "lm_head": "cpu"}])
def test_device_maps(folders: dict[str, Path], checkpoints: dict[str, Path], place: Any) -> None:
    pytest.importorskip("accelerate", reason="pip install -r requirements-bench.txt")
    model = AutoModelForCausalLM.from_pretrained(folders["qwen2-tied"], device_map=place)
    assert torch.equal(logits(model), logits(load_model(checkpoints["qwen2-tied"])[0]))


def test_disk_offload_and_dense_sources_are_refused(folders: dict[str, Path], tmp_path: Path) -> None:
    pytest.importorskip("accelerate", reason="pip install -r requirements-bench.txt")
    with pytest.raises(ValueError, match="disk"):
        AutoModelForCausalLM.from_pretrained(folders["qwen2-tied"], device_map={"model": "cpu", "lm_head": "disk"})
    source = write_source(tmp_path / "dense", tiny_config())
    record = json.loads((folders["qwen2-tied"] / "config.json").read_text())["quantization_config"]
    with pytest.raises(ValueError, match="qwen_prime_importer"):
        AutoModelForCausalLM.from_pretrained(source, quantization_config=PrimeConfig(**record))


def test_another_dtype_is_declined_with_a_word(folders: dict[str, Path], caplog: pytest.LogCaptureFixture) -> None:
    model = AutoModelForCausalLM.from_pretrained(folders["qwen2-tied"], dtype=torch.bfloat16)
    assert model.dtype == torch.float32 and "autocast" in caplog.text


def test_a_table_without_a_name_travels_with_the_folder(folders: dict[str, Path], tmp_path: Path) -> None:
    """A manifold that no builder makes is read from the folder; a damaged one, or a missing tensor, is refused."""
    folder = tmp_path / "renamed"
    shutil.copytree(folders["qwen2-tied"], folder)
    config = json.loads((folder / "config.json").read_text())
    rewrite_json(folder / "config.json", quantization_config={**config["quantization_config"], "manifold": "own"})
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert next(iter(grids_of(model).values())).manifold.name == "own"
    tensors = load_file(folder / "model.safetensors")
    tensors[modeling_prime.TABLE][40_000] *= 1.00001
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match="antisymmetric"):
        AutoModelForCausalLM.from_pretrained(folder)
    del tensors["model.layers.0.mlp.up_proj.grid.scale"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    rewrite_json(folder / "config.json", quantization_config=config["quantization_config"])
    with pytest.raises(ValueError, match=r"lacks 1 tensors .*up_proj\.grid\.scale"):
        AutoModelForCausalLM.from_pretrained(folder)


def test_votes_stay_behind(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    """Words of a compact training checkpoint lose their votes; the weights are the same."""
    source = open_dense(checkpoints["compact"])
    words = source.checkpoint["model"]["model.embed_tokens.grid.indices"]
    changed = dict(source.checkpoint["model"])
    changed["model.embed_tokens.grid.indices"] = words.clone() + 5
    source.checkpoint["model"] = changed
    export_prime_hf(source, tmp_path / "out", 10**9, False)
    assert torch.equal(load_file(tmp_path / "out" / "model.safetensors")["model.embed_tokens.grid.indices"], words)


STRANGER = """
import sys, torch
from transformers import AutoModelForCausalLM, AutoModel, Qwen2ForCausalLM
for loader, extra in ((AutoModelForCausalLM, {}), (Qwen2ForCausalLM, {}), (AutoModel, {}),
                      (AutoModelForCausalLM, {"trust_remote_code": True})):
    try:
        model = loader.from_pretrained(sys.argv[1], **extra)
    except Exception as error:
        print("refused", type(error).__name__)
    else:
        torch.save(model(input_ids=torch.arange(3, 43)[None]).logits, sys.argv[2])
        print("opened", type(model).__name__)
"""


def test_without_the_plug_in_nothing_opens_with_random_weights(
    checkpoints: dict[str, Path], folders: dict[str, Path], tmp_path: Path
) -> None:
    """In a process that cannot see the suite: refused, or opened rightly by the folder's own code."""
    environment = {**os.environ, "PYTHONPATH": "", "HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1"}
    out = subprocess.run(
        [sys.executable, "-c", STRANGER, folders["qwen2-tied"], tmp_path / "logits.pt"],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    ).stdout.split("\n")
    assert out[:4] == ["refused RuntimeError"] * 3 + ["opened Qwen2ForCausalLM"], out
    ours = logits(load_model(checkpoints["qwen2-tied"])[0])
    assert torch.allclose(torch.load(tmp_path / "logits.pt"), ours, atol=1e-4)


# -- the optimizer ----------------------------------------------------------------------------------------------------


def rows(count: int, seed: int = 0) -> list[dict[str, Any]]:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, 250, (count, 16), generator=generator)
    return [{"input_ids": r.tolist(), "labels": r.tolist(), "attention_mask": [1] * 16} for r in ids]


def collate(batch: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    return {key: torch.tensor([row[key] for row in batch]) for key in batch[0]}


def run_micro_batch(model: Any, row: dict[str, Any], share: float = 1.0) -> float:
    loss = model(**collate([row])).loss
    (loss * share).backward()
    return float(loss.detach())


def open_for_training(folder: Path, **options: Any) -> tuple[Any, PrimeVoteOptimizer]:
    model = AutoModelForCausalLM.from_pretrained(folder)
    return model.train(), PrimeVoteOptimizer(model, **{"lr": 2e-3, **options})


def test_a_step_is_measure_cast_and_apply(folders: dict[str, Path]) -> None:
    """Against the same operations by hand: first micro-batch measured, the others cast, then applied, twice."""
    data = rows(8)
    model, optimizer = open_for_training(folders["qwen2-tied"], micro_batches=4, weight_decay=0.1)
    twin = AutoModelForCausalLM.from_pretrained(folders["qwen2-tied"]).train()
    ballot = Ballot(rule=optimizer.ballot.rule)
    name_grids(twin, ballot)
    grids = grids_of(twin)
    for grid in grids.values():
        grid.unlock()
    floats = torch.optim.AdamW(twin.parameters(), lr=2e-3, betas=(0.9, 0.99), weight_decay=0.0)
    for step in range(2):
        for k in range(4):
            run_micro_batch(model, data[4 * step + k], 0.25)
            ballot.open("measure" if step == 0 and k == 0 else "cast", step, k, 4)
            run_micro_batch(twin, data[4 * step + k], 0.25)
            for grid in grids.values():
                grid.finish_measuring()
        optimizer.step()
        optimizer.zero_grad()
        ballot.close()
        ballot.voted = 3 if step == 0 else 4
        moved = apply_votes(grids, 2e-3, 0.1)
        floats.step()
        floats.zero_grad()
        assert {n: m.flips for n, m in moved.items()} == {n: m.flips for n, m in optimizer.moved.items()}
    assert sum(m.flips for m in optimizer.moved.values()) > 1000
    for name, words in indices(model).items():
        assert torch.equal(words, grids[name].indices), name
    for mine, theirs in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(mine, theirs)


@pytest.mark.parametrize("kind", ["qwen2-tied", "qwen3-untied", "compact"])
def test_it_learns(folders: dict[str, Path], kind: str) -> None:
    data = rows(2)
    model, optimizer = open_for_training(folders[kind], micro_batches=2, lr=4e-3)
    losses = []
    for _ in range(12):
        losses.append(sum(run_micro_batch(model, row, 0.5) for row in data))
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < 0.7 * losses[0], losses


def test_micro_batches_are_counted_by_backward_passes(folders: dict[str, Path]) -> None:
    """Evaluation, forward passes that nobody follows up and gradient-free looks do not count; too many are an error."""
    data = rows(6)
    plain, first = open_for_training(folders["qwen2-tied"], micro_batches=3)
    other, second = open_for_training(folders["qwen2-tied"], micro_batches=3)
    for step in range(2):
        for k in range(3):
            run_micro_batch(plain, data[3 * step + k])
            other(**collate([data[5]]))
            loss = other(**collate([data[3 * step + k]])).loss
            with torch.no_grad():
                other(**collate([data[4]]))
            loss.backward()
            other.eval()
            with torch.no_grad():
                other(**collate([data[3]]))
            other(**collate([data[2]])).loss.backward()
            other.train()
        for model, optimizer in ((plain, first), (other, second)):
            # Gradients of the look in evaluation mode reached norms and biases, and are no business of this test.
            model.zero_grad()
            optimizer.step()
    for name, words in indices(plain).items():
        assert torch.equal(words, indices(other)[name]), name
    for k in range(3):
        run_micro_batch(plain, data[k])
    with pytest.raises(RuntimeError, match="gradient_accumulation_steps"):
        run_micro_batch(plain, data[3])


def test_what_is_not_finite_does_not_move_anything(folders: dict[str, Path]) -> None:
    data = rows(3)
    model, optimizer = open_for_training(folders["qwen2-tied"], micro_batches=2)
    for k in range(2):
        run_micro_batch(model, data[k], 0.5)
    optimizer.step()
    optimizer.zero_grad()
    before, floats = indices(model), [p.detach().clone() for p in model.parameters()]
    run_micro_batch(model, data[2], float("nan"))
    optimizer.step()
    optimizer.zero_grad()
    assert optimizer.moved == {}
    assert all(torch.equal(words, before[name]) for name, words in indices(model).items())
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), floats, strict=True))
    run_micro_batch(model, data[0])
    optimizer.step()
    assert sum(m.flips for m in optimizer.moved.values()) > 0


def test_a_head_that_is_read_votes_like_one_that_is_called(folders: dict[str, Path]) -> None:
    """What TRL's fused head does, ``hidden @ lm_head.weight.T``, moves the same weights."""
    found = []
    for fused in (False, True):
        model, optimizer = open_for_training(folders["qwen2-tied"], micro_batches=1)
        for row in rows(3):
            batch = collate([row])
            hidden = model.model(input_ids=batch["input_ids"]).last_hidden_state
            # The hook that opens the ballot is the whole model's.
            optimizer._begin(model, None)
            hidden = model.model(input_ids=batch["input_ids"]).last_hidden_state
            head = model.lm_head
            out = hidden @ head.weight.T if fused else head(hidden)
            torch.nn.functional.cross_entropy(out[0, :-1], batch["labels"][0, 1:]).backward()
            optimizer.step()
            optimizer.zero_grad()
        found.append(indices(model))
    assert all(torch.equal(words, found[1][name]) for name, words in found[0].items())


def test_two_forward_passes_before_one_backward_pass_are_refused(folders: dict[str, Path]) -> None:
    model, optimizer = open_for_training(folders["qwen2-tied"], micro_batches=2)
    data = rows(4)
    run_micro_batch(model, data[0])
    with pytest.raises(GhostError, match="call backward after each forward"):
        (model(**collate([data[1]])).loss + model(**collate([data[2]])).loss).backward()
    assert optimizer.ballot.step == 0


@pytest.mark.parametrize("kind", ["eval", "decoder"])
def test_a_step_in_which_no_weight_voted_is_refused(folders: dict[str, Path], kind: str) -> None:
    """Norms alone would learn, and nobody would be told: in eval mode, or past the model that opens the ballot."""
    model, optimizer = open_for_training(folders["qwen2-tied"])
    data = rows(3)
    for row in data[:2]:  # the first is measured and does not vote
        run_micro_batch(model, row)
        optimizer.step()
        optimizer.zero_grad()
    optimizer.step()
    floats = [p.detach().clone() for p in model.parameters()]
    if kind == "eval":
        run_micro_batch(model.eval(), data[2])
    else:
        hidden = model.model(input_ids=collate([data[2]])["input_ids"]).last_hidden_state
        model.lm_head(hidden).sum().backward()
    with pytest.raises(RuntimeError, match=r"no weight voted .* call model\.train\(\)"):
        optimizer.step()
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), floats, strict=True))
    optimizer.zero_grad()
    run_micro_batch(model.train(), data[2])
    optimizer.step()
    assert sum(m.flips for m in optimizer.moved.values()) > 0


@pytest.mark.parametrize("scale", [1.0, 2.0**120])
def test_a_scaler_is_refused_at_the_first_step(folders: dict[str, Path], scale: float) -> None:
    """Whether the scaled gradients are finite or not."""
    model, optimizer = open_for_training(folders["qwen2-tied"])
    scaler = torch.amp.GradScaler("cpu", init_scale=scale)
    scaler.scale(model(**collate(rows(1))).loss).backward()
    scaler.unscale_(optimizer)
    with pytest.raises(RuntimeError, match="needs no GradScaler and works with none: use bf16=True or float32"):
        scaler.step(optimizer)


def test_several_cards_are_refused(folders: dict[str, Path]) -> None:
    """transformers' Trainer takes all it sees, by copies of the model that vote on nothing of ours."""
    model, _ = open_for_training(folders["qwen2-tied"])
    with pytest.raises(RuntimeError, match="CUDA_VISIBLE_DEVICES=0"):
        model._replicate_for_data_parallel()(**collate(rows(1)))


def test_a_second_optimizer_begins_anew(folders: dict[str, Path]) -> None:
    """A notebook cell that is run again: no votes of the first, which no longer hears the model."""
    data = rows(4)
    model, first = open_for_training(folders["qwen2-tied"])
    for row in data:
        run_micro_batch(model, row)
        first.step()
        first.zero_grad()
    second = PrimeVoteOptimizer(model, lr=2e-3, rule=MomentumRule(buffer="int16"))
    assert all(grid.waiting and not grid.votes.any() for grid in second.grids.values())
    for row in data:
        run_micro_batch(model, row)
        second.step()
        second.zero_grad()
    assert second.ballot.step == 4 and sum(m.flips for m in second.moved.values()) > 0


def test_a_copy_of_the_model_is_nobody_s(folders: dict[str, Path]) -> None:
    """A frozen reference made with deepcopy computes the same and casts no votes; nor does an optimizer that is gone
    hear the model."""
    model, optimizer = open_for_training(folders["qwen2-tied"])
    run_micro_batch(model, rows(1)[0])
    optimizer.step()
    reference = copy.deepcopy(model)
    assert torch.equal(logits(reference), logits(model))
    run_micro_batch(reference, rows(2)[1])
    assert optimizer.ballot.mode == "closed" and optimizer._count == 0
    del optimizer
    gc.collect()
    run_micro_batch(model, rows(2)[1])
    assert next(iter(grids_of(model).values())).ballot.mode == "closed"


def test_a_state_of_other_settings_is_refused(folders: dict[str, Path]) -> None:
    _, optimizer = open_for_training(folders["qwen2-tied"], weight_decay=0.1, rule=MomentumRule(beta=0.9))
    state = optimizer.state_dict()
    for options, words in (
        ({"weight_decay": 0.1}, r"beta 0\.9, this optimizer 0\.5"),
        ({"rule": MomentumRule(beta=0.9)}, r"weight_decay 0\.1, this optimizer 0\.0"),
    ):
        with pytest.raises(ValueError, match=words):
            open_for_training(folders["qwen2-tied"], **options)[1].load_state_dict(state)
    # States of before these were kept.
    older = {key: state["prime"][key] for key in ("rule", "buffer", "seed", "micro_batches", "step", "votes")}
    open_for_training(folders["qwen2-tied"])[1].load_state_dict({**state, "prime": older})


def test_refusals(folders: dict[str, Path], tmp_path: Path) -> None:
    dense = AutoModelForCausalLM.from_pretrained(write_source(tmp_path / "dense", tiny_config()))
    with pytest.raises(ValueError, match="no grids"):
        PrimeVoteOptimizer(dense, lr=1e-3)
    with pytest.raises(ValueError, match="micro_batches"):
        open_for_training(folders["qwen2-tied"], micro_batches=0)
    with pytest.raises(ValueError, match="weight_decay"):
        open_for_training(folders["qwen2-tied"], weight_decay=10.0)
    with pytest.raises(RuleError, match="compact"):
        open_for_training(folders["compact"], rule="momentum")
    _, optimizer = open_for_training(folders["qwen2-tied"], micro_batches=2)
    state = optimizer.state_dict()
    for other, words in (
        (open_for_training(folders["qwen2-tied"], micro_batches=3)[1], "micro_batches 2, this optimizer 3"),
        (open_for_training(folders["qwen2-tied"], micro_batches=2, rule="stochastic")[1], "rule momentum"),
        (open_for_training(folders["qwen2-untied"], micro_batches=2)[1], "another model"),
    ):
        with pytest.raises(ValueError, match=words):
            other.load_state_dict(state)
    with pytest.raises(ValueError, match="no votes"):
        optimizer.load_state_dict({"state": {}, "param_groups": []})


# -- trainers ---------------------------------------------------------------------------------------------------------


def trainer(folder: Path, output: Path, data: list[dict[str, Any]], **options: Any) -> tuple[Any, PrimeVoteOptimizer]:
    model, optimizer = open_for_training(folder, micro_batches=4)
    arguments = TrainingArguments(
        output_dir=str(output),
        per_device_train_batch_size=1,
        gradient_accumulation_steps=4,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        logging_steps=1,
        seed=1,
        **options,
    )
    made = Trainer(model, arguments, train_dataset=data, data_collator=collate, optimizers=(optimizer, None))
    return made, optimizer


@pytest.mark.parametrize("kind", ["qwen2-tied", "qwen3-untied", "compact"])
def test_the_trainer_resumes_to_the_same_bits(folders: dict[str, Path], tmp_path: Path, kind: str) -> None:
    """Six steps at a stretch against four, a checkpoint, and two more in a new model: weights, votes, floats. An
    epoch of ten rows ends in a step of two micro-batches."""
    pytest.importorskip("accelerate", reason="pip install -r requirements-bench.txt")
    whole, optimizer = trainer(folders[kind], tmp_path / "run", rows(10), max_steps=6, save_steps=4)
    whole.train()
    resumed, second = trainer(folders[kind], tmp_path / "run", rows(10), max_steps=6, save_strategy="no")
    resumed.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-4"))
    assert optimizer.ballot.step == second.ballot.step == 6
    for (name, mine), theirs in zip(grids_of(whole.model).items(), grids_of(resumed.model).values(), strict=True):
        assert torch.equal(mine.indices, theirs.indices), name
        for part, value in mine.vote_state().items():
            assert torch.equal(value, theirs.vote_state()[part]), (name, part)
    for mine, theirs in zip(whole.model.parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(mine, theirs)
    assert not torch.equal(
        next(iter(indices(whole.model).values())),
        next(iter(indices(AutoModelForCausalLM.from_pretrained(folders[kind])).values())),
    )
    # What the Trainer wrote is a folder like any other.
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "checkpoint-6")
    assert torch.equal(logits(again), logits(whole.model.eval()))


def test_sft_trainer(folders: dict[str, Path], tmp_path: Path) -> None:
    """TRL's trainer, with its fused head and gradient checkpointing, trains the indices."""
    trl = pytest.importorskip("trl", reason="pip install -r requirements-bench.txt")
    from datasets import Dataset

    model, optimizer = open_for_training(folders["qwen2-tied"], micro_batches=2, lr=4e-3)
    config = trl.SFTConfig(
        output_dir=str(tmp_path / "run"),
        per_device_train_batch_size=1,
        gradient_accumulation_steps=2,
        max_steps=10,
        lr_scheduler_type="constant",
        logging_steps=1,
        report_to=[],
        use_cpu=True,
        bf16=False,
        disable_tqdm=True,
        save_strategy="no",
        max_length=64,
    )
    data = Dataset.from_list([{"prompt": "one and ", "completion": "two"}, {"prompt": "three, ", "completion": "four"}])
    made = trl.SFTTrainer(
        model,
        args=config,
        train_dataset=data,
        processing_class=load_tokenizer(folders["qwen2-tied"]),
        optimizers=(optimizer, None),
    )
    made.train()
    losses = [entry["loss"] for entry in made.state.log_history if "loss" in entry]
    assert losses[-1] < 0.7 * losses[0], losses
    assert all(move.flips for move in optimizer.moved.values())


def test_the_suite_s_own_loader_opens_the_folder(folders: dict[str, Path], checkpoints: dict[str, Path]) -> None:
    model, tokenizer, kind = load_model(folders["qwen3-untied"])
    assert kind == "prime" and torch.equal(logits(model), logits(load_model(checkpoints["qwen3-untied"])[0]))
    assert tokenizer("ab")["input_ids"] == load_model(checkpoints["qwen3-untied"])[1]("ab")["input_ids"]

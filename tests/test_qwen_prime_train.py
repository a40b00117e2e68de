"""The training script: what it writes, how it stops and resumes bit for bit, what it refuses.

The step itself is tested in test_vote_trainer.py.
"""

from __future__ import annotations

import copy
import json
import os
import re
import signal
import subprocess
import sys
import time
import types
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_runs import accident, command, import_everywhere, quick_config, stop_after, stop_within, the_error

import manifolds
import prime_checkpoint
import qwen_prime_eval as evaluation
import qwen_prime_importer as importer
import qwen_prime_train as train
import run_folder
import training_data
import training_session
import verify_qwen_prime as verify
from prime_checkpoint import check_file, load_checkpoint, save_checkpoint, tensor_sha256, walk_tensors
from prime_telemetry import read_lines
from qwen_prime_wrapper import model_from_checkpoint, model_tensors, tokenizer_from_checkpoint
from run_folder import RunFolder
from vote_casting import VoteCaster

ROOT = Path(__file__).resolve().parent.parent
MODEL = ROOT / "assets" / "tiny_coder"

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def init(tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("init") / "tiny_prime_init.pt"
    assert importer.main(importer.ImportConfig(model=str(MODEL), output=output)) == 0
    return output


@pytest.fixture(scope="module")
def records(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A handful of records that a few steps can learn, some of them held out."""
    lines = [
        {"instruction": f"add {i}", "output": f"def add_{i}(x):\n    return x + {i}\n", "split": "train"}
        for i in range(40)
    ]
    lines += [{**line, "instruction": line["instruction"] + " please", "split": "eval"} for line in lines[:6]]
    path = tmp_path_factory.mktemp("data") / "records.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


@pytest.fixture
def config(init: Path, records: Path, tmp_path: Path) -> train.TrainConfig:
    return train.TrainConfig(
        checkpoint=init,
        data=records,
        output_dir=tmp_path / "run",
        steps=4,
        seq_len=128,
        batch_size=1,
        grad_accum=2,
        lr=2e-3,
        warmup=1,
        eval_every=2,
        save_every=2,
        core_eval=False,
        device="cpu",
    )


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return import_everywhere(tmp_path_factory.mktemp("sources"))


@pytest.fixture
def quick(sources: dict[str, Path], tmp_path: Path) -> train.TrainConfig:
    return quick_config(sources["prime-harmonic"], tmp_path)


# -- what a run writes ------------------------------------------------------------------------------------------------


def test_a_run_learns_and_writes_what_it_promises(config: train.TrainConfig) -> None:
    config = replace(config, steps=10, save_every=3, keep_last=2)
    assert train.main(config) == 0
    stats = list(read_lines(config.output_dir / "stats.jsonl"))
    assert [s["step"] for s in stats] == list(range(1, 11))
    promised = ("loss", "val_loss", "flips", "flip_rate", "tokens_per_s", "lr", "peel_phase", "thawed_layers")
    for line in stats:
        assert set(promised) | {"sentinel", "mem_peak_bytes", "timestamp", "clipped"} <= set(line)
    assert [s["step"] for s in stats if s["val_loss"] is not None] == [2, 3, 4, 6, 8, 9, 10]
    assert stats[-1]["loss"] < 0.7 * stats[0]["loss"]
    assert all(s["flips"] > 0 for s in stats)
    # Every 3 steps and at the end; the last two are kept.
    assert [n for n, _ in RunFolder(config.output_dir, "tiny", 3).saved()] == [9, 10]
    assert json.loads((config.output_dir / "config.json").read_text())["lr"] == config.lr
    events = list(read_lines(config.output_dir / "events.jsonl"))
    kinds = [e["event"] for e in events]
    assert kinds == ["start", "evaluation", "save", "peel", "save", "save", "save", "save", "end"]
    assert [e["step"] for e in events if e["event"] == "save"] == [0, 3, 6, 9, 10]
    assert stats[-1]["val_loss"] < 0.8 * events[1]["val_loss"]
    losses = {s["step"]: s["val_loss"] for s in stats if s["step"] in (3, 6, 9, 10)}
    best = load_checkpoint(config.output_dir / "tiny_prime_best.pt")["train_state"]
    assert best["step"] == best["best"]["step"] == min(losses, key=losses.__getitem__)
    samples = list(read_lines(config.output_dir / "samples.jsonl"))
    assert [s["step"] for s in samples] == [10, 10]
    assert all(s["prompt"].startswith("<|im_start|>") and s["text"] and "def add_" in s["reference"] for s in samples)
    # Votes point where fresh gradients point; shuffled votes do not.
    assert set(stats[-1]["agreement"]) == set(stats[-1]["agreement_control"]) == {*map(str, range(6)), "head"}
    mean = {k: sum(s[k]["head"] for s in stats[1:]) / 9 for k in ("agreement", "agreement_control")}
    assert mean["agreement"] > 0.05 > abs(mean["agreement_control"])
    assert all(1 / 6 <= c <= 1 for c in stats[-1]["consensus"].values())


def test_every_save_is_evaluated_and_the_run_is_the_same_without(quick: train.TrainConfig, tmp_path: Path) -> None:
    config = replace(quick, core_eval=True, steps=2)
    assert train.main(config) == 0
    reports = {f.name: json.loads(f.read_text()) for f in quick.output_dir.glob("EVAL_*.json")}
    assert set(reports) == {f"EVAL_prime-harmonic_step_{n}.json" for n in (0, 2)}
    last = reports["EVAL_prime-harmonic_step_2.json"]
    assert (last["kind"], last["step"], reports["EVAL_prime-harmonic_step_0.json"]["kind"]) == ("quick", 2, "tiny")
    stats = list(read_lines(quick.output_dir / "stats.jsonl"))
    assert last["scores"]["held_out.nll_per_token"] == stats[-1]["val_loss"]
    assert last["scores"]["suite"][1] == 40
    saved = quick.output_dir / "prime-harmonic_prime_step_2.pt"
    assert last["model"]["sha256"] == check_file(saved)
    events = [e for e in read_lines(quick.output_dir / "events.jsonl") if e["event"] == "core_eval"]
    assert [(e["step"], e["size"]) for e in events] == [(0, "tiny"), (2, "quick")]
    other = tmp_path / "without"
    assert train.main(replace(config, output_dir=other, core_eval=False)) == 0
    assert load_checkpoint(other / saved.name)["sha256"] == load_checkpoint(saved)["sha256"]


def test_a_stream_resumes_bit_for_bit(
    quick: train.TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(training_data, "STREAM_BYTES", 100)
    config = replace(quick, block_rows=7, hold_out=0.1)
    assert train.main(replace(config, output_dir=tmp_path / "whole")) == 0
    positions = [s["data"] for s in read_lines(tmp_path / "whole" / "stats.jsonl")]
    assert {p["block"] for p in positions} > {0} and all(p["row"] <= p["rows"] for p in positions)
    assert train.main(replace(config, output_dir=tmp_path / "parts", steps=4)) == 0
    (tmp_path / "parts" / "prime-harmonic_prime_step_4.pt").unlink()
    assert train.main(replace(config, output_dir=tmp_path / "parts", resume=True)) == 0
    one, other = (load_checkpoint(tmp_path / f / "prime-harmonic_prime_step_4.pt") for f in ("whole", "parts"))
    assert one["sha256"] == other["sha256"]
    assert one["train_state"]["data"] == other["train_state"]["data"]


def test_a_dataset_of_the_hub_stays_at_the_revision_that_the_run_began_with(
    quick: train.TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import datasets
    import huggingface_hub

    head = ["a" * 40]

    def info(self: Any, name: str, revision: str | None = None) -> Any:
        return types.SimpleNamespace(sha=revision or head[0], card_data=None)

    def load(name: str, config: Any, *, split: str, revision: str, streaming: bool) -> Any:
        rows = [{"text": f"{split} {revision[0]} {i} " * (2 + i % 5)} for i in range(40)]
        return datasets.Dataset.from_list(rows).to_iterable_dataset()

    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", info)
    monkeypatch.setattr(datasets, "load_dataset", load)
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    config = replace(quick, data="owner/set", eval_data="owner/scored", block_rows=15)
    assert train.main(replace(config, output_dir=tmp_path / "whole")) == 0
    run = tmp_path / "parts"
    stop_after(2, replace(config, output_dir=run))
    head[0] = "b" * 40
    assert train.main(replace(config, output_dir=run, resume=True)) == 0
    one, other = (load_checkpoint(tmp_path / f / "prime-harmonic_prime_step_4.pt") for f in ("whole", "parts"))
    assert one["sha256"] == other["sha256"]
    assert one["train_state"]["held_out"] == other["train_state"]["held_out"]
    held, _ = evaluation.held_out_of(run, tokenizer_from_checkpoint(other))
    assert held.fingerprint == other["train_state"]["held_out"]


def test_the_rate_that_was_not_given_is_recorded(quick: train.TrainConfig) -> None:
    assert train.main(replace(quick, lr=None, steps=2)) == 0
    rate = json.loads((quick.output_dir / "config.json").read_text())["lr"]
    assert rate == pytest.approx(0.25 / 48)
    assert next(s["lr"] for s in read_lines(quick.output_dir / "stats.jsonl")) == rate


@pytest.mark.parametrize("manifold", ["compact", "prime-harmonic", "linear"])
def test_a_compact_run_is_sound_from_any_start(
    quick: train.TrainConfig, sources: dict[str, Path], manifold: str, tmp_path: Path
) -> None:
    """Verified and evaluated; where it starts on another manifold its weights are moved once, at the start."""
    config = replace(quick, vote_rule="compact", checkpoint=sources[manifold])
    assert train.main(config) == 0
    path = config.output_dir / f"{manifold}_prime_step_4.pt"
    assert verify.main(verify.VerifyConfig(path)) == 0
    trained, start = load_checkpoint(path), load_checkpoint(sources[manifold])
    table = manifolds.build("compact")
    assert trained["manifold"]["sha256"] == table.sha256 and trained["manifold"]["vote_bits"] == 6
    assert trained["train_state"]["vote_rule"] == "compact"
    words = {n: t for n, t in trained["model"].items() if n.endswith(".grid.indices")}
    assert set(trained["votes"]) == {n.removesuffix(".indices") for n in words}
    for name, tensor in words.items():
        assert "votes" not in trained["votes"][name.removesuffix(".indices")]
        assert table.votes(tensor).any() and table.unused(tensor) == 0, name
        scale = name.replace("indices", "scale")
        assert torch.equal(trained["model"][scale], start["model"][scale]), "scales are never trained"
    report = tmp_path / "evaluation.json"
    losses = []
    for model in (sources[manifold], path):
        settings = evaluation.EvalConfig(model=model, data=config.data, seq_len=64, json=report)
        assert evaluation.main(settings) == 0
        losses.append(json.loads(report.read_text())["nll_per_token"])
    assert losses[1] < losses[0]


def test_moving_to_the_compact_manifold_is_nearly_what_an_import_gives(
    sources: dict[str, Path], caplog: pytest.LogCaptureFixture
) -> None:
    """16-bit values are not quite the source's, so a weight near a border may fall on its other side."""
    checkpoint = load_checkpoint(sources["prime-harmonic"])
    model = model_from_checkpoint(checkpoint)
    with caplog.at_level("INFO"):
        moved = train.make_compact(model, checkpoint)
    assert "compact" in caplog.text and "lowest SNR" in caplog.text
    assert checkpoint["manifold"]["name"] == "prime-harmonic", "the checkpoint that was given stays"
    assert moved["manifold"]["name"] == "compact"
    wanted = load_checkpoint(sources["compact"])["model"]
    for name, tensor in model_tensors(model).items():
        if name.endswith(".indices"):
            off = (tensor.int() - wanted[name].int()).abs()
            assert int(off.max()) <= 64 and float((off > 0).double().mean()) < 0.03, name
        else:
            assert torch.equal(tensor, wanted[name]), name


# -- stopping and going on --------------------------------------------------------------------------------------------


def content(path: Path) -> dict[str, str]:
    """Hash of every tensor of a checkpoint."""
    return {n: tensor_sha256(t) for n, t in walk_tensors(load_checkpoint(path)) if "sha256" not in n}


RUNS = [
    ("momentum", "prime-harmonic"),
    ("compact", "compact"),
    ("compact", "prime-harmonic"),
    ("supermajority", "prime-harmonic"),
    ("stochastic", "linear"),
]
"""Vote rule, and the manifold of the checkpoint that the run starts from."""


@pytest.mark.parametrize(("rule", "manifold"), RUNS)
def test_resume_is_bit_for_bit(
    quick: train.TrainConfig, sources: dict[str, Path], rule: Any, manifold: str, tmp_path: Path
) -> None:
    """Stopped half way against uninterrupted; the schedule looks at --steps, so the first half is not shortened."""
    config = replace(quick, vote_rule=rule, checkpoint=sources[manifold])
    whole = replace(config, output_dir=tmp_path / "whole")
    assert train.main(whole) == 0
    half = replace(config, output_dir=tmp_path / "half")
    stop_after(2, half)
    assert [n for n, _ in RunFolder(half.output_dir, manifold, 3).saved()] == [0, 2]
    assert train.main(replace(half, resume=True)) == 0
    ends = [folder / f"{manifold}_prime_step_4.pt" for folder in (whole.output_dir, half.output_dir)]
    assert content(ends[0]) == content(ends[1])
    first, second = (load_checkpoint(end) for end in ends)
    assert first["train_state"]["data"] == second["train_state"]["data"]
    assert first["train_state"]["tokens"] == second["train_state"]["tokens"]
    assert first["manifold"]["name"] == ("compact" if rule == "compact" else manifold)
    lines = [list(read_lines(folder / "stats.jsonl")) for folder in (whole.output_dir, half.output_dir)]
    first_run, second_run = ([(s["step"], s["loss"], s["flips"], s["lr"]) for s in part] for part in lines)
    assert len(first_run) == 4 and first_run == second_run


@pytest.mark.parametrize(("rule", "manifold"), RUNS)
def test_a_run_that_is_stopped_in_the_middle_of_steps_is_the_one_that_is_not(
    quick: train.TrainConfig, sources: dict[str, Path], rule: Any, manifold: str, tmp_path: Path
) -> None:
    """In the first step, right behind a save, and again in the step that was left."""
    config = replace(quick, vote_rule=rule, checkpoint=sources[manifold])
    whole = replace(config, output_dir=tmp_path / "whole")
    assert train.main(whole) == 0
    half = replace(config, output_dir=tmp_path / "half")
    folder = RunFolder(half.output_dir, manifold, 3)
    for step, micro_batch, resume in ((0, 0, False), (0, 4, True), (2, 2, True), (2, 4, True)):
        stop_within(step, micro_batch, replace(half, resume=resume))
        ((found, path),) = folder.stopped()
        assert found == step and {n for n, _ in folder.saved()} == ({0} if step == 0 else {0, 2})
        assert load_checkpoint(path)["train_state"]["half_step"]["ran"] == micro_batch + 1
        assert verify.main(verify.VerifyConfig(path)) == 0
        with pytest.raises(train.TrainError, match="in the middle of a step: go on with --resume"):
            train.main(replace(half, checkpoint=path, output_dir=tmp_path / "other"))
    assert train.main(replace(half, resume=True)) == 0
    assert folder.stopped() == []
    ends = [where / f"{manifold}_prime_step_4.pt" for where in (whole.output_dir, half.output_dir)]
    assert content(ends[0]) == content(ends[1])
    states = [load_checkpoint(end)["train_state"] for end in ends]
    assert all(states[0][name] == states[1][name] for name in states[0] if name != "float_optimizer")
    lines = [list(read_lines(where / "stats.jsonl")) for where in (whole.output_dir, half.output_dir)]
    same = (
        "step",
        "loss",
        "val_loss",
        "flips",
        "lr",
        "tokens",
        "answer_tokens",
        "micro_batches",
        "movement",
        "measured",
    )
    first, second = ([{name: line[name] for name in same} for line in part] for part in lines)
    assert len(first) == 4 and first == second
    both = [list(read_lines(where / "events.jsonl")) for where in (whole.output_dir, half.output_dir)]
    peels = [[(e["event"], e["step"]) for e in part if e["event"] == "peel"] for part in both]
    assert peels[0] == peels[1] and len(peels[0]) == 1, "opened once, and said once, of the same step"
    events = [e for e in both[1] if e["event"] in ("save", "signal")]
    assert [e["micro_batches"] for e in events if "micro_batches" in e] == [1, 5, 3, 5]


def test_a_signal_that_comes_before_anything_was_done_saves_nothing_new(
    quick: train.TrainConfig, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    stop_within(1, 3, quick)
    (before,) = RunFolder(quick.output_dir, "prime-harmonic", 3).stopped()
    content, time_of = before[1].read_bytes(), before[1].stat().st_mtime_ns
    caplog.set_level("INFO")
    go = training_session.Session._go

    def asked_at_once(self: training_session.Session) -> Path:
        self.stop.signal = "SIGTERM"
        return go(self)

    monkeypatch.setattr(training_session.Session, "_go", asked_at_once)
    assert train.main(replace(quick, resume=True)) == 0
    assert "nothing to save" in caplog.text
    (after,) = RunFolder(quick.output_dir, "prime-harmonic", 3).stopped()
    assert after == before and after[1].read_bytes() == content and after[1].stat().st_mtime_ns == time_of


def test_resume_passes_over_a_damaged_checkpoint(quick: train.TrainConfig, caplog: pytest.LogCaptureFixture) -> None:
    assert train.main(quick) == 0
    newest = quick.output_dir / "prime-harmonic_prime_step_4.pt"
    data = bytearray(newest.read_bytes())
    data[len(data) // 2] ^= 1
    newest.write_bytes(data)
    found = RunFolder(quick.output_dir, "prime-harmonic", 3).newest()
    assert found is not None
    path, _ = found
    assert path.name == "prime-harmonic_prime_step_2.pt"
    assert "damaged" in caplog.text


def test_sigint_in_a_real_process_saves_and_exits_0(quick: train.TrainConfig) -> None:
    command = [sys.executable, str(ROOT / "qwen_prime_train.py"), "--checkpoint", str(quick.checkpoint)]
    command += ["--data", str(quick.data), "--output-dir", str(quick.output_dir), "--steps", "10000"]
    command += ["--seq-len", "64", "--grad-accum", "2", "--save-every", "5000", "--device", "cpu"]
    # One thread that does not spin: on a busy machine two cost many times what they save.
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive"}
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment)
    stats = quick.output_dir / "stats.jsonl"
    deadline = time.monotonic() + 120
    while len(list(read_lines(stats))) < 2 and time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    last = [s["step"] for s in read_lines(stats)][-1]
    folder = RunFolder(quick.output_dir, "prime-harmonic", 3)
    # Between its two micro-batches, or between two steps.
    assert [n for n, _ in folder.stopped()] == [last] or [n for n, _ in folder.saved()] == [0, last]
    assert "--resume" in errors


# -- refusals ---------------------------------------------------------------------------------------------------------


def test_refusals(quick: train.TrainConfig, tmp_path: Path) -> None:
    with pytest.raises(train.TrainError, match="context"):
        train.main(replace(quick, seq_len=4096))
    with pytest.raises(train.TrainError, match="nothing to resume"):
        train.main(replace(quick, resume=True))
    assert train.main(replace(quick, steps=1)) == 0
    with pytest.raises(train.TrainError, match="--resume"):
        train.main(quick)
    with pytest.raises(train.TrainError, match="raise --steps"):
        train.main(replace(quick, steps=1, resume=True))
    for wrong in ({"steps": 0}, {"lr": 2.0}, {"beta": 1.0}, {"warmup": -1}, {"keep_last": 0}, {"eval_every": -1}):
        with pytest.raises(ValueError):
            replace(quick, **wrong)
    assert command(replace(quick, checkpoint=tmp_path / "absent.pt", output_dir=tmp_path / "other")) == 1
    with pytest.raises(train.TrainError, match="is a file, expected the folder of a run"):
        train.main(replace(quick, output_dir=quick.data))


def test_a_run_tells_of_itself_where_no_bar_is_drawn(
    quick: train.TrainConfig, caplog: pytest.LogCaptureFixture
) -> None:
    """As under nohup, or through a pipe."""
    caplog.set_level("INFO")
    assert train.main(replace(quick, steps=5, eval_every=4, save_every=3)) == 0
    said = [r.getMessage() for r in caplog.records]
    lines = [line for line in said if " of 5: loss " in line]
    assert [line.split()[1] for line in lines] == ["1", "3", "4", "5"]
    assert all(", held out " in line for line in lines[1:]) and lines[-1].endswith("0:00:00 left")
    assert any("5 steps are done; the lowest held-out loss is " in line and "_best.pt" in line for line in said)
    assert said[-1].startswith("the last checkpoint is ")


OTHER_RUNS: list[tuple[dict[str, Any], dict[str, Any], str]] = [
    ({}, {"seed": 5}, "seed"),
    ({}, {"vote_buffer": "int16"}, "vote_buffer"),
    ({}, {"vote_rule": "supermajority"}, "vote_rule"),
    ({}, {"vote_rule": "compact"}, "vote_rule"),
    ({"vote_rule": "compact"}, {"vote_rule": "momentum"}, "compact"),
    ({"vote_rule": "compact"}, {"vote_rule": "stochastic"}, "compact"),
    ({}, {"grad_accum": 3}, "--grad-accum"),
    ({}, {"lr": 1e-3}, "add --lr 0.004 "),
    ({}, {"lr": None}, "add --lr 0.004 "),
    ({}, {"schedule": "linear"}, "add --schedule cosine "),
    ({}, {"warmup": 3}, "add --warmup 1 "),
    ({}, {"weight_decay": 0.01}, "add --weight-decay 0.0 "),
    ({}, {"beta": 0.7}, "add --beta 0.5 "),
    ({"beta": 0.7}, {"beta": None}, "add --beta 0.7 "),
    ({}, {"governor_limit": 0.01}, "add --governor-limit 0.02"),
]


@pytest.mark.parametrize(("wrote", "reads", "word"), OTHER_RUNS, ids=str)
def test_resuming_as_another_run_is_one_line(
    quick: train.TrainConfig,
    wrote: dict[str, Any],
    reads: dict[str, Any],
    word: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """And nothing is written over what the run has."""
    assert train.main(replace(quick, steps=1, **wrote)) == 0
    before = {f.name: f.read_bytes() for f in quick.output_dir.iterdir()}
    capsys.readouterr()
    assert command(replace(quick, **{**wrote, **reads}, resume=True)) == 1
    assert word in the_error(capsys.readouterr().err)
    assert {f.name: f.read_bytes() for f in quick.output_dir.iterdir()} == before


def test_a_run_may_become_longer(quick: train.TrainConfig, caplog: pytest.LogCaptureFixture) -> None:
    assert train.main(replace(quick, steps=1)) == 0
    assert train.main(replace(quick, resume=True)) == 0
    assert "was to have 1 steps, now 4: the learning rate" in caplog.text
    with pytest.raises(train.TrainError, match="add --steps 4 "):
        train.main(replace(quick, resume=True, steps=3))


def test_what_is_the_default_may_be_said(quick: train.TrainConfig) -> None:
    assert train.main(replace(quick, steps=2, schedule="constant")) == 0
    assert train.main(replace(quick, steps=3, schedule="constant", beta=0.5, resume=True)) == 0


def test_a_checkpoint_of_before_the_recipe_was_kept_goes_on(quick: train.TrainConfig) -> None:
    assert train.main(replace(quick, steps=2)) == 0
    newest = quick.output_dir / "prime-harmonic_prime_step_2.pt"
    content = copy.deepcopy(load_checkpoint(newest))
    del content["train_state"]["recipe"]
    save_checkpoint(content, newest)
    assert train.main(replace(quick, resume=True, lr=1e-3)) == 0


@pytest.mark.parametrize("rule", ["momentum", "compact"])
def test_a_checkpoint_of_before_columns_were_measured_goes_on_where_it_was(
    quick: train.TrainConfig, caplog: pytest.LogCaptureFixture, rule: str
) -> None:
    """It was taken for damaged once, and the run began anew from its step 0, over all that it had learned."""
    quick = replace(quick, vote_rule=rule)
    assert train.main(replace(quick, steps=2)) == 0
    newest = quick.output_dir / "prime-harmonic_prime_step_2.pt"
    content = copy.deepcopy(load_checkpoint(newest))
    for state in content["votes"].values():
        del state["c2"]
    save_checkpoint(content, newest)
    assert train.main(replace(quick, steps=3, resume=True)) == 0
    assert "written before votes measured columns" in caplog.text
    assert "passing over" not in caplog.text
    assert load_checkpoint(quick.output_dir / "prime-harmonic_prime_step_3.pt")["train_state"]["step"] == 3


def test_a_checkpoint_of_another_version_is_not_passed_over(
    quick: train.TrainConfig, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert train.main(replace(quick, steps=2)) == 0
    newest = quick.output_dir / "prime-harmonic_prime_step_2.pt"
    content = copy.deepcopy(load_checkpoint(newest))
    with monkeypatch.context() as later:
        later.setattr(prime_checkpoint, "VERSION", content["version"] + 1)
        save_checkpoint({**content, "version": content["version"] + 1}, newest)
    before = sorted(file.name for file in quick.output_dir.iterdir())
    assert command(replace(quick, resume=True)) == 1
    assert "use the suite that wrote it" in the_error(capsys.readouterr().err)
    assert sorted(file.name for file in quick.output_dir.iterdir()) == before


def test_resuming_under_another_name_names_those_that_are_there(
    quick: train.TrainConfig, sources: dict[str, Path]
) -> None:
    assert train.main(replace(quick, steps=1)) == 0
    with pytest.raises(train.TrainError, match="it has those of prime-harmonic: "):
        train.main(replace(quick, checkpoint=sources["linear"], resume=True))


def test_a_folder_is_no_checkpoint_and_leaves_none(
    quick: train.TrainConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = replace(quick, checkpoint=MODEL, output_dir=tmp_path / "none")
    assert command(config) == 1
    assert "qwen_prime_importer.py --model" in the_error(capsys.readouterr().err)
    assert not config.output_dir.exists()


def test_an_evaluation_that_runs_out_of_memory_on_its_way_is_done_again_whole(
    quick: train.TrainConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the trainer has something to give back, as with recorded micro-batches on a card."""
    measure = training_session.mean_answer_loss
    tired, released = [], []

    def short_of_memory(model: Any, rows: Iterator[Any]) -> Any:
        if not tired:
            tired.append(next(rows))
            raise torch.OutOfMemoryError("CUDA out of memory")
        return measure(model, rows)

    monkeypatch.setattr(training_session, "mean_answer_loss", short_of_memory)
    monkeypatch.setattr(VoteCaster, "release", lambda self: released.append(1) or True)
    assert train.main(replace(quick, steps=1, batch_size=1)) == 0
    monkeypatch.undo()
    assert train.main(replace(quick, steps=1, output_dir=quick.output_dir.with_name("calm"))) == 0
    first, calm = (
        [e["val_loss"] for e in read_lines(folder / "events.jsonl") if e["event"] == "evaluation"]
        for folder in (quick.output_dir, quick.output_dir.with_name("calm"))
    )
    assert released and tired and first == calm and len(first) == 1


def test_a_small_disk_is_named_at_the_start(
    quick: train.TrainConfig, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What it foresees is what the files come to be."""
    assert train.main(replace(quick, steps=2)) == 0
    assert "keep-last" not in caplog.text
    size = (quick.output_dir / "prime-harmonic_prime_step_2.pt").stat().st_size
    room = types.SimpleNamespace(free=2 * size)
    monkeypatch.setattr(run_folder.shutil, "disk_usage", lambda folder: room)
    assert train.main(replace(quick, resume=True)) == 0
    assert "has room for" not in caplog.text, "there is only one more to come"
    room.free = 0
    assert train.main(replace(quick, steps=9, resume=True)) == 0
    found = re.search(r"room for ([\d.]+) GB of checkpoints, the run may need ([\d.]+) \(([\d.]+) each", caplog.text)
    assert found is not None
    foreseen = []
    monkeypatch.setattr(RunFolder, "lacks_room", lambda self, size, saves: foreseen.append(size))
    assert train.main(replace(quick, resume=True, steps=10)) == 0
    # Beside these a file holds row state and torch's own records.
    assert 0.8 * size < foreseen[0] < size


@pytest.mark.parametrize(
    ("change", "start", "word"),
    [
        ({"vote_rule": "momentum"}, "compact", "needs the manifold"),
        ({"vote_rule": "supermajority"}, "compact", "needs the manifold"),
        ({"grad_accum": 10_000}, "prime-harmonic", "10000"),
        ({"grad_accum": 10_000, "vote_rule": "compact"}, "compact", "10000"),
        ({"grad_accum": 10_000, "vote_rule": "supermajority"}, "prime-harmonic", "10000"),
        ({"weight_decay": 1.0, "lr": None}, "prime-harmonic", "weight"),
    ],
    ids=str,
)
def test_what_cannot_start_is_one_line(
    quick: train.TrainConfig,
    sources: dict[str, Path],
    change: dict[str, Any],
    start: str,
    word: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """And leaves no run behind that a second start would trip over."""
    config = replace(quick, checkpoint=sources[start], **change)
    assert command(config) == 1
    assert word in the_error(capsys.readouterr().err)
    assert not list(config.output_dir.glob("*.pt"))


# -- the night --------------------------------------------------------------------------------------------------------


def test_resume_is_bit_for_bit_across_an_unlock(quick: train.TrainConfig, tmp_path: Path) -> None:
    config = replace(quick, steps=6, peel="1:2:1", save_every=10)
    whole, half = (replace(config, output_dir=tmp_path / name) for name in ("whole", "half"))
    assert train.main(whole) == 0
    stop_after(3, half)
    assert train.main(replace(half, resume=True)) == 0
    ends = [folder / "prime-harmonic_prime_step_6.pt" for folder in (whole.output_dir, half.output_dir)]
    assert content(ends[0]) == content(ends[1])
    lines = [list(read_lines(c.output_dir / "stats.jsonl")) for c in (whole, half)]
    assert [s["thawed_layers"] for s in lines[0]] == [0, 1, 1, 2, 2, 2]
    assert [s["peel_phase"] for s in lines[1]] == ["head", "peeling", "peeling", "all open", "all open", "all open"]


def test_three_spikes_return_to_the_last_good_checkpoint(
    quick: train.TrainConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At half the rate and on new data; the run then ends as if nothing had been. The checkpoint of the step before the
    first spike has the weights that it speaks of."""
    spiked: list[int] = []

    def change(step: int, micro_batch: int) -> float:
        if step in (12, 13, 14) and spiked.count(step) < quick.grad_accum:
            spiked.append(step)
            return 20.0
        return 1.0

    accident(monkeypatch, change)
    assert train.main(replace(quick, steps=18, save_every=4, schedule="constant", warmup=0)) == 0
    stats = list(read_lines(quick.output_dir / "stats.jsonl"))
    assert [s["step"] for s in stats] == [*range(1, 16), *range(9, 19)]
    assert [s["sentinel"] for s in stats][12:15] == ["spike", "spike", "roll_back"]
    assert {s["lr"] for s in stats[:15]} == {4e-3} and {s["lr"] for s in stats[15:]} == {2e-3}
    event = next(e for e in read_lines(quick.output_dir / "events.jsonl") if e["event"] == "roll_back")
    assert (event["step"], event["to"], event["rate"]) == (15, 8, 0.5) and "3 steps in a row" in event["reason"]


def test_a_run_without_a_finite_loss_ends_with_its_last_good_checkpoint(
    quick: train.TrainConfig, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    accident(monkeypatch, lambda step, k: float("nan") if step >= 3 else 1.0)
    assert command(replace(quick, steps=100, save_every=3)) == 1
    said = the_error(capsys.readouterr().err)
    assert "10 steps in a row had no finite micro-batch" in said and "events.jsonl" in said
    path = next(word.rstrip(";.") for word in said.split() if word.startswith(str(quick.output_dir)))
    good = load_checkpoint(Path(path))
    assert verify.main(verify.VerifyConfig(Path(path))) == 0
    first = load_checkpoint(quick.output_dir / "prime-harmonic_prime_step_12.pt")
    # Steps without a finite micro-batch move nothing.
    assert content_of_model(good) == content_of_model(first)
    events = [e["event"] for e in read_lines(quick.output_dir / "events.jsonl")]
    assert events.count("non_finite") == 9 and events[-1] == "failed"


def content_of_model(checkpoint: dict[str, Any]) -> dict[str, str]:
    return {name: tensor_sha256(tensor) for name, tensor in walk_tensors(checkpoint["model"])}


LIMITED = """
import sys
from dataclasses import replace
from pathlib import Path
sys.path[:0] = [{assets!r}]
import make_night_run as night
night.PEEL, night.NAN_LOSS, night.NAN_GRADIENT = "none", ((0, 0),), (1, 1)
night.MEMORY_GONE, night.MEMORY_BACK, night.LEFT = 4, 6, 0.7
plain = night.settings
def settings(folder):
    changes = dict(steps=7, seq_len=1024, batch_size=1, eval_every=0, sample_every=0, save_every=100, device="cpu")
    return replace(plain(folder), checkpoint=Path({checkpoint!r}), data=Path({data!r}), **changes)
night.settings = settings
raise SystemExit(night.worker(Path({folder!r})))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="limits the address space")
def test_memory_that_is_really_gone_makes_rows_shorter(init: Path, tmp_path: Path) -> None:
    """The allocator of a process whose address space is limited in the middle of a step fails; the run goes on."""
    lines = [{"text": f"def function_{i}(x):\n    return x * {i}\n" * (4 + i % 30)} for i in range(60)]
    data = tmp_path / "texts.jsonl"
    data.write_text("".join(json.dumps(line) + "\n" for line in lines))
    code = LIMITED.format(
        assets=str(ROOT / "assets"), data=str(data), checkpoint=str(init), folder=str(tmp_path / "night")
    )
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "NUMBA_NUM_THREADS": "1"}
    environment |= {"MALLOC_ARENA_MAX": "1"}
    process = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=300)
    assert process.returncode == 0, process.stderr[-2000:]
    stats = list(read_lines(tmp_path / "night" / "run" / "stats.jsonl"))
    assert [s["step"] for s in stats] == list(range(1, 8))
    assert [s["skipped"] for s in stats[:3]] == [1, 1, 0]
    assert all(s["seq_len"] == 1024 for s in stats[:4]) and stats[-1]["seq_len"] in (768, 512, 384, 256)
    # The step in which it happened counted its complete micro-batches, the following have as many tokens as before.
    cut = next(s for s in stats if s["seq_len"] < 1024)
    assert stats[-1]["seq_len"] * stats[-1]["micro_batches"] >= 2048
    events = [e for e in read_lines(tmp_path / "night" / "run" / "events.jsonl") if e["event"] == "out_of_memory"]
    complete = int(events[0]["where"].split()[1])
    assert cut["step"] == events[0]["step"] in (5, 6) and events[0]["where"].endswith("of 2")
    assert cut["micro_batches"] == complete if complete else cut["micro_batches"] > 2


@pytest.mark.parametrize("room", [1.4, 1.6])
def test_freed_memory_is_given_back_where_it_is_short(
    quick: train.TrainConfig, room: float, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """By what ``--plan`` says the run needs, beside what there is."""
    checkpoint = load_checkpoint(quick.checkpoint)
    model = model_from_checkpoint(checkpoint)
    need = train.memory_plan.total(train.memory_plan.budget(model, train.plan_settings(quick)))
    calls: list[int] = []
    monkeypatch.setattr(train, "memory_available", lambda device: int(room * need))
    monkeypatch.setattr(train, "return_freed_memory", lambda: calls.append(1) or True)
    with caplog.at_level("INFO"):
        train.settle_memory(quick, checkpoint)
    assert len(calls) == (room < 1.5) and ("memory is short" in caplog.text) == (room < 1.5)


def test_plan_needs_no_data_and_trains_nothing(quick: train.TrainConfig, capsys: pytest.CaptureFixture[str]) -> None:
    plan = train.TrainConfig(checkpoint=quick.checkpoint, plan=True, memory=1.0, device="cpu")
    assert train.main(plan) == 0
    said = capsys.readouterr().out
    assert "fits: 0." in said and "of 1.07 GB" in said and "indices" in said
    assert train.main(replace(plan, memory=1e-4)) == 1
    assert "does not fit" in capsys.readouterr().out
    train.main(replace(plan, seq_len=129))
    assert "seq-len is 129, the model's context 128: training will want at most that" in capsys.readouterr().out
    train.main(replace(plan, seq_len=128))
    assert "context" not in capsys.readouterr().out.replace("CUDA context", "")
    with pytest.raises(ValueError, match="device is 'nonsense', expected cpu"):
        replace(plan, device="nonsense", compute="auto")
    with pytest.raises(ValueError, match="--data and --output-dir"):
        replace(plan, plan=False)

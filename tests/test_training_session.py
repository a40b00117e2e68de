"""What a run does when things go wrong between its steps: returns, lost votes, signals at bad moments, reports."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_runs import command, import_everywhere, quick_config, stop_after, the_error

import qwen_prime_train as train
import training_session
import vote_trainer
from night_shift import AntigravitySentinel, Verdict
from packed_batches import Batch, PackedBatches
from prime_checkpoint import load_checkpoint, tensor_sha256, walk_tensors
from prime_telemetry import read_lines
from run_folder import RunFolder
from text_records import DataError
from training_session import Session
from vote_casting import Turn, VoteCaster
from vote_trainer import VoteTrainer

pytestmark = pytest.mark.usefixtures("one_thread")

NAME = "prime-harmonic"


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return import_everywhere(tmp_path_factory.mktemp("sources"))


@pytest.fixture
def quick(sources: dict[str, Path], tmp_path: Path) -> train.TrainConfig:
    return replace(quick_config(sources[NAME], tmp_path), grad_accum=2, sample_every=0)


def events(config: train.TrainConfig, *kinds: str) -> list[dict[str, Any]]:
    found = list(read_lines(config.output_dir / "events.jsonl"))
    return [e for e in found if not kinds or e["event"] in kinds]


def stats(config: train.TrainConfig) -> list[dict[str, Any]]:
    return list(read_lines(config.output_dir / "stats.jsonl"))


def model_of(path: Path) -> dict[str, str]:
    return {name: tensor_sha256(tensor) for name, tensor in walk_tensors(load_checkpoint(path)["model"])}


# -- returns ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def broken_at_20(monkeypatch: pytest.MonkeyPatch) -> None:
    """Norms and biases are spoiled at the end of step 20, the first time, before its checkpoint is written."""
    step, done = VoteTrainer.step, []

    def spoiling(self: VoteTrainer) -> Any:
        result = step(self)
        if self.done == 20 and not done:
            done.append(True)
            for parameter in self.floats.values():
                parameter.data.mul_(-3.0)
        return result

    monkeypatch.setattr(VoteTrainer, "step", spoiling)


@pytest.mark.usefixtures("broken_at_20")
def test_a_return_is_to_before_the_weights_that_the_first_spike_speaks_of(quick: train.TrainConfig) -> None:
    config = replace(quick, steps=30, save_every=10, eval_every=0, schedule="constant", warmup=0, lr=1e-4)
    assert train.main(config) == 0
    (back,) = events(config, "roll_back")
    assert (back["step"], back["to"]) == (23, 10)
    losses = [s["loss"] for s in stats(config)]
    assert max(losses[:20]) + 0.5 < min(losses[20:23]) and max(losses[23:]) < min(losses[20:23])
    assert [s["step"] for s in stats(config)] == [*range(1, 24), *range(11, 31)]


@pytest.mark.usefixtures("broken_at_20")
def test_damaged_weights_are_not_taken_for_usual_where_nothing_older_is_left(
    quick: train.TrainConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    config = replace(quick, steps=40, save_every=20, eval_every=0, keep_last=1, schedule="constant", warmup=0, lr=1e-4)
    assert command(config) == 1
    assert "3 returns to a checkpoint did not help" in the_error(capsys.readouterr().err)
    assert [e["to"] for e in events(config, "roll_back")] == [20, 20, 20]


def judged_otherwise(patch: pytest.MonkeyPatch, at: int, to: int) -> list[int]:
    """The first time that the sentinel judges step ``at``, it sends the run back to ``to``; where it did."""
    judge, done = AntigravitySentinel.judge, []

    def judging(self: AntigravitySentinel, step: int, *found: Any) -> Verdict:
        verdict = judge(self, step, *found)
        if step == at and not done:
            done.append(step)
            self.heat *= 0.5
            return Verdict("roll_back", "a test", to)
        return verdict

    patch.setattr(AntigravitySentinel, "judge", judging)
    return done


def test_a_signal_during_a_return_does_not_lose_it(
    quick: train.TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The run that goes on is the one that was not asked to stop: at half the rate, on new data."""
    config = replace(quick, steps=8, save_every=4, eval_every=0, schedule="constant", warmup=0)
    whole = replace(config, output_dir=tmp_path / "whole")
    with monkeypatch.context() as patch:
        judged_otherwise(patch, 6, 5)
        assert train.main(whole) == 0
    returning = Session.return_to

    def signalled(self: Session, verdict: Verdict) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        returning(self, verdict)

    with monkeypatch.context() as patch:
        judged_otherwise(patch, 6, 5)
        patch.setattr(Session, "return_to", signalled)
        assert train.main(config) == 0
    assert [(e["event"], e["step"]) for e in events(config)][-4:] == [
        ("roll_back", 6),
        ("signal", 4),
        ("save", 4),
        ("end", 4),
    ]
    assert train.main(replace(config, resume=True)) == 0
    last = f"{NAME}_prime_step_8.pt"
    assert model_of(config.output_dir / last) == model_of(whole.output_dir / last)
    assert {s["lr"] for s in stats(config)[6:]} == {2e-3}


# -- votes that are lost ----------------------------------------------------------------------------------------------


def memory_runs_out_applying(monkeypatch: pytest.MonkeyPatch, when: Callable[[VoteTrainer], bool]) -> None:
    """Votes cannot be applied in steps of a trainer in such a state."""
    apply, step = vote_trainer.apply_votes, VoteTrainer.step
    now: list[VoteTrainer] = []

    def noting(self: VoteTrainer) -> Any:
        now[:] = [self]
        return step(self)

    def failing(*inputs: Any) -> Any:
        if when(now[0]):
            raise torch.OutOfMemoryError("a test")
        return apply(*inputs)

    monkeypatch.setattr(VoteTrainer, "step", noting)
    monkeypatch.setattr(vote_trainer, "apply_votes", failing)


def test_memory_that_runs_out_while_votes_are_applied_makes_the_step_smaller(
    quick: train.TrainConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = replace(quick, steps=6, batch_size=2, eval_every=0)
    memory_runs_out_applying(monkeypatch, lambda trainer: trainer.done == 3 and trainer.shape.batch_size == 2)
    assert train.main(config) == 0
    found = [(e["event"], e["step"]) for e in events(config, "roll_back", "out_of_memory")]
    assert found == [("roll_back", 3), ("out_of_memory", 2)]
    lines = stats(config)
    assert [(s["step"], s["batch_size"]) for s in lines] == [
        *((n, 2) for n in (1, 2, 3)),
        *((n, 1) for n in (3, 4, 5, 6)),
    ]
    assert {s["seq_len"] * s["batch_size"] * s["micro_batches"] for s in lines} == {256}


def test_votes_that_are_lost_in_any_shape_end_the_run(
    quick: train.TrainConfig, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Although there is a whole step between any two of them, the one behind the checkpoint."""
    memory_runs_out_applying(monkeypatch, lambda trainer: trainer.done == 3)
    assert command(replace(quick, steps=6, batch_size=8, eval_every=0)) == 1
    assert "for the fourth time before step 4 was over" in the_error(capsys.readouterr().err)
    assert events(quick)[-1]["event"] == "failed" and len(events(quick, "out_of_memory")) == 3


def test_what_a_step_came_to_before_its_votes_were_lost_is_told(
    quick: train.TrainConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its probe had made it smaller already."""
    backward, lost = VoteCaster.backward, []

    def failing(self: VoteCaster, mode: str, batch: Batch, turn: Turn) -> float:
        if mode == "probe" and batch.input_ids.shape[0] > 2:
            raise torch.OutOfMemoryError("a test")
        nats = backward(self, mode, batch, turn)
        if mode == "cast" and not lost:
            lost.append(True)
            self.ballot.torn = True
            raise torch.OutOfMemoryError("a test")
        return nats

    monkeypatch.setattr(VoteCaster, "backward", failing)
    assert train.main(replace(quick, batch_size=4)) == 0
    told = [(e["where"], e["to"]) for e in events(quick, "out_of_memory")]
    assert told == [("probe", "4 x 2 x 64 tokens"), ("votes were lost", "8 x 1 x 64 tokens")]


def test_a_shape_that_the_rule_cannot_count_ends_the_run_and_its_events_say_why(
    quick: train.TrainConfig, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    backward = VoteCaster.backward

    def failing(self: VoteCaster, mode: str, batch: Batch, turn: Turn) -> float:
        if batch.input_ids.shape[0] == 2:
            raise torch.OutOfMemoryError("a test")
        return backward(self, mode, batch, turn)

    monkeypatch.setattr(VoteCaster, "backward", failing)
    assert command(replace(quick, batch_size=2, grad_accum=300, eval_every=0)) == 1
    assert "at most 512 micro-batches" in the_error(capsys.readouterr().err)
    assert events(quick)[-1]["event"] == "failed" and "at most 512" in events(quick)[-1]["reason"]


def test_data_that_cannot_be_read_cost_no_step(
    quick: train.TrainConfig, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """The steps behind the last save are saved, and the run goes on, later, to the bits of one that nothing befell."""
    whole = replace(quick, output_dir=tmp_path / "whole")
    assert train.main(whole) == 0
    following, dealt = PackedBatches.__next__, []

    def breaking(self: PackedBatches) -> Batch:
        dealt.append(True)
        if len(dealt) > 7:
            raise DataError("the stream broke")
        return following(self)

    with monkeypatch.context() as patch:
        patch.setattr(PackedBatches, "__next__", breaking)
        assert command(quick) == 1
    assert "the stream broke" in the_error(capsys.readouterr().err)
    assert (events(quick)[-1]["event"], events(quick)[-1]["reason"]) == ("failed", "the stream broke")
    assert [step for step, _ in RunFolder(quick.output_dir, NAME, 3).saved()] == [0, 2, 3]
    assert train.main(replace(quick, resume=True)) == 0
    assert model_of(quick.output_dir / f"{NAME}_prime_step_4.pt") == model_of(
        whole.output_dir / f"{NAME}_prime_step_4.pt"
    )


# -- stops ------------------------------------------------------------------------------------------------------------


def test_a_signal_at_the_end_of_a_step_waits_for_no_look(
    quick: train.TrainConfig, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The step is left before its votes are applied: evaluation, sample, save and report are the resumed run's."""
    config = replace(quick, sample_every=2, core_eval=True)
    whole = replace(config, output_dir=tmp_path / "whole")
    assert train.main(whole) == 0
    cast = VoteCaster.cast
    done: list[str] = []

    def signalled(self: VoteCaster, batch: Batch, turn: Turn) -> Any:
        if (turn.step, turn.number) == (1, 1):
            os.kill(os.getpid(), signal.SIGTERM)
            done.append("signal")
        return cast(self, batch, turn)

    with monkeypatch.context() as patch:
        patch.setattr(VoteCaster, "cast", signalled)
        for name in ("evaluate", "sample", "assess"):
            patch.setattr(Session, name, noted(name, getattr(Session, name), done))
        assert train.main(config) == 0
    assert done[-1] == "signal", done
    ((step, _),) = RunFolder(config.output_dir, NAME, 3).stopped()
    assert step == 1
    assert train.main(replace(config, resume=True)) == 0
    for kind, key in (("stats.jsonl", "val_loss"), ("samples.jsonl", "text")):
        found, wanted = (
            [(line["step"], line[key]) for line in read_lines(c.output_dir / kind)] for c in (config, whole)
        )
        assert found == wanted
    assert model_of(config.output_dir / f"{NAME}_prime_best.pt") == model_of(whole.output_dir / f"{NAME}_prime_best.pt")
    assert sorted(f.name for f in config.output_dir.glob("EVAL_*")) == sorted(
        f.name for f in whole.output_dir.glob("EVAL_*")
    )


def noted(name: str, function: Callable[..., Any], into: list[str]) -> Callable[..., Any]:
    def run(*inputs: Any, **options: Any) -> Any:
        into.append(name)
        return function(*inputs, **options)

    return run


def test_a_signal_during_an_evaluation_is_followed_by_the_save_alone(
    quick: train.TrainConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[str] = []
    evaluate = Session.evaluate

    def signalled(self: Session) -> float | None:
        if self.trainer.done == 2:
            os.kill(os.getpid(), signal.SIGTERM)
            done.clear()
        return evaluate(self)

    monkeypatch.setattr(Session, "evaluate", signalled)
    for name in ("sample", "save", "assess"):
        monkeypatch.setattr(Session, name, noted(name, getattr(Session, name), done))
    assert train.main(replace(quick, sample_every=2, core_eval=True)) == 0
    assert done == ["save"]


def test_nothing_to_do_leaves_the_run_as_it_was(quick: train.TrainConfig, capsys: pytest.CaptureFixture[str]) -> None:
    """A monitor would call it crashed otherwise."""
    assert train.main(quick) == 0
    before = {f.name: f.read_bytes() for f in quick.output_dir.iterdir()}
    capsys.readouterr()
    assert command(replace(quick, resume=True)) == 1
    assert "nothing to do" in the_error(capsys.readouterr().err)
    assert {f.name: f.read_bytes() for f in quick.output_dir.iterdir()} == before


# -- the best, and what is said of it ---------------------------------------------------------------------------------


def scores(monkeypatch: pytest.MonkeyPatch, losses: Iterator[float]) -> None:
    """Held-out losses of the evaluations to come."""
    monkeypatch.setattr(training_session, "mean_answer_loss", lambda *inputs: (next(losses), 1))


def test_a_step_that_is_saved_again_with_a_worse_loss_does_not_become_the_best_when_resumed(
    quick: train.TrainConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed right behind the second save of step 8, which a return to step 4 had made possible."""
    config = replace(quick, steps=12, save_every=4, eval_every=4, keep_last=5, schedule="constant", warmup=0)
    folder = RunFolder(config.output_dir, NAME, 5)
    with monkeypatch.context() as patch:
        scores(patch, iter([9.0, 5.0, 2.0, 3.0]))
        returned = judged_otherwise(patch, 10, 7)
        step = VoteTrainer.step

        def killed(self: VoteTrainer) -> Any:
            if returned and self.done == 8:
                raise KeyboardInterrupt
            return step(self)

        patch.setattr(VoteTrainer, "step", killed)
        with pytest.raises(KeyboardInterrupt):
            train.main(config)
    best = model_of(folder.best)
    scores(monkeypatch, iter([4.0]))
    assert train.main(replace(config, resume=True)) == 0
    assert model_of(folder.best) == best
    state = load_checkpoint(folder.best)["train_state"]
    assert (state["best"], state["is_best"]) == ({"step": 8, "val_loss": 2.0}, True)


def test_what_a_run_began_with_is_its_best_until_something_is_better(
    quick: train.TrainConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    scores(monkeypatch, iter([1.0, 2.0, 3.0]))
    assert train.main(quick) == 0
    assert [(e["step"], e["best"]) for e in events(quick, "save")] == [(0, True), (2, False), (4, False)]
    assert load_checkpoint(quick.output_dir / f"{NAME}_prime_best.pt")["train_state"]["step"] == 0


def test_a_loss_that_is_no_number_is_never_the_best(quick: train.TrainConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    scores(monkeypatch, iter([float("nan"), float("nan"), 2.0]))
    assert train.main(quick) == 0
    assert [(e["step"], e["best"]) for e in events(quick, "save")] == [(0, False), (2, False), (4, True)]


def test_every_save_is_scored_whatever_the_steps_between_evaluations(quick: train.TrainConfig) -> None:
    assert train.main(replace(quick, steps=7, eval_every=2, save_every=3)) == 0
    assert [s["step"] for s in stats(quick) if s["val_loss"] is not None] == [2, 3, 4, 6, 7]


def test_a_report_names_the_type_that_it_was_made_in(quick: train.TrainConfig) -> None:
    """Training products may be narrower; nothing is looked at in them."""
    assert train.main(replace(quick, compute="bfloat16", core_eval=True, steps=2)) == 0
    reports = [json.loads(f.read_text()) for f in quick.output_dir.glob("EVAL_*.json")]
    assert reports and {r["settings"]["dtype"] for r in reports} == {"float32"}


def test_an_evaluation_has_as_many_rows_at_a_time_as_there_is_room_for(
    quick: train.TrainConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    backward, score = VoteCaster.backward, training_session.mean_answer_loss
    rows: list[int] = []

    def failing(self: VoteCaster, mode: str, batch: Batch, turn: Turn) -> float:
        if batch.input_ids.shape[0] > 1:
            raise torch.OutOfMemoryError("a test")
        return backward(self, mode, batch, turn)

    def looking(model: Any, batches: Iterator[Batch]) -> Any:
        found = list(batches)
        rows.append(max(len(b.input_ids) for b in found))
        return score(model, iter(found))

    monkeypatch.setattr(VoteCaster, "backward", failing)
    monkeypatch.setattr(training_session, "mean_answer_loss", looking)
    assert train.main(replace(quick, batch_size=4)) == 0
    assert rows[0] > 1 and rows[1:] == [1, 1]


# -- going on otherwise -----------------------------------------------------------------------------------------------


def test_products_of_another_type_are_named(quick: train.TrainConfig, caplog: pytest.LogCaptureFixture) -> None:
    """``auto`` may mean another one on the next machine."""
    stop_after(2, replace(quick, compute="float32"))
    assert train.main(replace(quick, resume=True, compute="float32", steps=5)) == 0
    assert "products are" not in caplog.text
    assert train.main(replace(quick, resume=True, compute="bfloat16", steps=6)) == 0
    assert "products are in bfloat16 now, the run began with float32" in caplog.text


def test_a_new_run_does_not_begin_with_an_old_ones_votes(
    quick: train.TrainConfig, sources: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """``compact`` keeps them in the words of the checkpoint."""
    config = replace(quick, checkpoint=sources["compact"], vote_rule="compact")
    assert train.main(config) == 0
    trained = config.output_dir / "compact_prime_step_4.pt"
    step, voted = VoteTrainer.step, []

    def looking(self: VoteTrainer) -> Any:
        voted.append(sum(int(grid.tables().votes(grid.indices).count_nonzero()) for grid in self.grids.values()))
        return step(self)

    monkeypatch.setattr(VoteTrainer, "step", looking)
    again = replace(config, checkpoint=trained, output_dir=config.output_dir / "again", steps=1)
    assert train.main(again) == 0
    assert voted == [0]
    before, begun = (load_checkpoint(p)["model"] for p in (trained, again.output_dir / "compact_prime_step_0.pt"))
    words = next(name for name in before if name.endswith("up_proj.grid.indices"))
    old, new = before[words].int(), begun[words].int()
    assert torch.equal(old + 32 >> 6, new >> 6) and not new.remainder(64).any() and not torch.equal(old, new)


def test_other_held_out_documents_are_named_and_their_losses_are_not_compared(
    quick: train.TrainConfig, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    """The best of before would be compared with losses of other documents."""
    easy, hard = tmp_path / "easy.jsonl", tmp_path / "hard.jsonl"
    easy.write_text("".join(json.dumps({"text": f"abc {i} abc {i} abc {i}"}) + "\n" for i in range(4)))
    hard.write_text("".join(json.dumps({"text": f"{i} ^&*zq~ {i * 7919} $#"}) + "\n" for i in range(4)))
    assert train.main(replace(quick, eval_data=easy)) == 0
    assert train.main(replace(quick, eval_data=easy, resume=True, steps=6)) == 0
    assert "other documents" not in caplog.text
    before = load_checkpoint(RunFolder(quick.output_dir, NAME, 3).best)["train_state"]["best"]
    assert train.main(replace(quick, eval_data=hard, resume=True, steps=8)) == 0
    assert f"the best so far, {before['val_loss']:.4f} of step {before['step']}, no longer counts" in caplog.text
    after = load_checkpoint(RunFolder(quick.output_dir, NAME, 3).best)["train_state"]["best"]
    assert after["val_loss"] > before["val_loss"] and after["step"] == 8


def test_a_start_that_is_refused_leaves_no_folder(quick: train.TrainConfig, capsys: pytest.CaptureFixture[str]) -> None:
    assert command(replace(quick, seq_len=100_000)) == 1
    assert "the model's context" in the_error(capsys.readouterr().err) and not quick.output_dir.exists()
    quick.output_dir.mkdir()
    assert command(replace(quick, seq_len=100_000)) == 1
    assert quick.output_dir.exists(), "a folder that was there before is somebody's"

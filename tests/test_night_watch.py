"""A trainer that watches itself: phases, memory that runs out anywhere, returns, a resume that is exact through all."""

from __future__ import annotations

import copy
import random
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from string import ascii_lowercase
from typing import Any

import pytest
import torch
from tiny_models import import_source, tiny_config, write_source

import ghost_grid
from answer_masks import EncodedSet, encode_records
from ghost_grid import GhostGrid
from momentum_rules import MomentumRule
from night_shift import AntigravitySentinel, LayerPeel, MemoryContingency, Shape, TrainingGovernor
from night_watch import NightWatch, StepResult, vote_pressure
from packed_batches import Batch, PackedBatches
from prime_checkpoint import load_checkpoint, tensor_sha256, walk_tensors
from qwen_prime_wrapper import model_from_checkpoint, model_tensors, tokenizer_from_checkpoint
from training_recipe import Recipe, TrainError
from vote_casting import Turn, VoteCaster, VotesLost
from vote_trainer import StepPaused, VoteTrainer

RECIPE = Recipe(steps=12, grad_accum=3, lr=4e-3, warmup=1, gradient_checkpointing=False, device="cpu")
SEQUENCE = 32
PEEL = LayerPeel(2, 2, 1)

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("watched")
    source = write_source(folder / "source", tiny_config(num_hidden_layers=3))
    found = {}
    for manifold in ("prime-harmonic", "compact"):
        import_source(source, folder / f"{manifold}.pt", manifold=manifold)
        found[manifold] = load_checkpoint(folder / f"{manifold}.pt")
    return found


@pytest.fixture(scope="module")
def texts(checkpoints: dict[str, dict[str, Any]]) -> EncodedSet:
    chance = random.Random(0)
    syllables = ["".join(chance.choices(ascii_lowercase, k=3)) for _ in range(60)]
    tokenizer = tokenizer_from_checkpoint(checkpoints["compact"])
    return encode_records(
        [s * chance.randint(3, SEQUENCE // 3) for s in syllables], tokenizer, SEQUENCE, progress=False
    )


Make = Callable[..., VoteTrainer]


@pytest.fixture
def make(checkpoints: dict[str, dict[str, Any]], texts: EncodedSet) -> Make:
    def build(peel: LayerPeel = PEEL, limit: float | None = None, **changes: Any) -> VoteTrainer:
        recipe = replace(RECIPE, **changes)
        manifold = "compact" if recipe.rule().vote_bits else "prime-harmonic"
        batches = PackedBatches(texts, seq_len=SEQUENCE, batch_size=1, pad_id=258, seed=recipe.seed)
        watch = NightWatch(
            peel,
            AntigravitySentinel(),
            TrainingGovernor.for_rule(recipe.vote_rule, limit),
            MemoryContingency(Shape(SEQUENCE, 1, recipe.grad_accum)),
        )
        return VoteTrainer(model_from_checkpoint(checkpoints[manifold]), batches, recipe, watch)

    return build


def fingerprint(trainer: VoteTrainer) -> dict[str, Any]:
    """Everything that the next step depends on: hashes of tensors, and the plain values."""
    tree = {"model": model_tensors(trainer.model), "votes": trainer.votes(), "state": trainer.state()}
    tensors = {name: tensor_sha256(tensor) for name, tensor in walk_tensors(tree)}
    plain = {k: v for k, v in trainer.state().items() if k != "float_optimizer"}
    return {**tensors, "plain": repr(plain)}


def integers(trainer: VoteTrainer) -> dict[str, str]:
    tree = {n: {"words": g.indices, **g.vote_state()} for n, g in trainer.grids.items()}
    return {name: tensor_sha256(tensor) for name, tensor in walk_tensors(tree)}


def saved(trainer: VoteTrainer) -> dict[str, Any]:
    """What a checkpoint would hold."""
    return copy.deepcopy(
        {
            "stage": "train",
            "model": {n: t.detach() for n, t in model_tensors(trainer.model).items()},
            "votes": trainer.votes(),
            "train_state": trainer.state(),
        }
    )


def go_on(make: Make, content: dict[str, Any], **changes: Any) -> VoteTrainer:
    trainer = make(**changes)
    own = model_tensors(trainer.model)
    with torch.no_grad():
        for name, tensor in content["model"].items():
            own[name].copy_(tensor)
    trainer.restore(copy.deepcopy(content))
    return trainer


# -- phases -----------------------------------------------------------------------------------------------------------


def test_locked_layers_never_move_and_cost_no_weight_gradient(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = make()
    seen: dict[int, set[str]] = {}
    accept = GhostGrid.accept

    def noting(grid: GhostGrid, *arguments: Any) -> None:
        if trainer.ballot.mode == "cast":
            seen.setdefault(trainer.done, set()).add(grid.name)
        accept(grid, *arguments)

    monkeypatch.setattr(GhostGrid, "accept", noting)
    floats = {n: p.detach().clone() for n, p in trainer.floats.items()}
    words = {n: g.indices.clone() for n, g in trainer.grids.items()}
    for step in range(8):
        opened = set(trainer.watch.peel.open_layers(step, 3))  # type: ignore[union-attr]
        trainer.step()
        for number in range(3):
            inside = f"layers.{number}."
            for name, grid in trainer.grids.items():
                if inside in name:
                    assert torch.equal(grid.indices, words[name]) == (number not in opened), (step, name)
                    assert grid.unlocked == (number in opened)
            for name, parameter in trainer.floats.items():
                if inside in name:
                    assert torch.equal(parameter, floats[name]) == (number not in opened), (step, name)
        wanted = {n for n in trainer.grids if any(f"layers.{i}." in n for i in opened)} | {"model.embed_tokens.grid"}
        assert seen[step] == wanted
        for name, grid in trainer.grids.items():
            words[name].copy_(grid.indices)
        floats = {n: p.detach().clone() for n, p in trainer.floats.items()}


@pytest.mark.parametrize("checkpointing", [True, False])
def test_the_backward_pass_stops_at_the_lowest_open_layer(make: Make, checkpointing: bool) -> None:
    """Hidden states below it want no gradient and are computed once; the tied embedding's lookup is silent until the
    bottom is open."""
    trainer = make(gradient_checkpointing=checkpointing)
    layers: Any = trainer.model.model.layers
    begun: Counter[int] = Counter()
    wants: dict[int, bool] = {}
    for number, layer in enumerate(layers):
        # Of an inner module: checkpointing goes around a layer's own hooks.
        layer.self_attn.register_forward_pre_hook(lambda module, given, number=number: begun.update([number]))
        layer.register_forward_hook(
            lambda module, given, result, number=number: wants.update({number: result.requires_grad})
        )
    top = len(layers) - 1
    open_layers = {0: 0, 2: 1, 4: 2, 6: 3}
    for step in range(7):
        begun.clear()
        trainer.step()
        if step in open_layers:
            lowest = len(layers) - open_layers[step]
            assert wants == {number: number >= lowest for number in range(len(layers))}, step
            # The top layer is never computed again.
            again = {number for number in range(len(layers)) if begun[number] > begun[top]}
            assert again == (set(range(lowest, top)) if checkpointing else set()), step


def test_an_unlock_begins_from_nothing(make: Make) -> None:
    """What a layer's votes were before it was locked has no say when it opens again."""
    window = LayerPeel(0, 1, 1, 1)
    trainer = make(window)
    for _ in range(3):
        trainer.step()
    top = "model.layers.2.mlp.up_proj.grid"
    assert not trainer.grids[top].unlocked
    assert not any("layers.2." in n for n, p in trainer.floats.items() if p in trainer.optimizer.state)
    trainer.step()
    assert trainer.grids[top].unlocked and trainer.grids[top].state.observations == 2  # type: ignore[union-attr]


@pytest.mark.parametrize("rule", ["momentum", "compact", "supermajority"])
@pytest.mark.parametrize("peel", [PEEL, LayerPeel(1, 2, 1, 2)], ids=str)
def test_resume_is_exact_in_every_phase(make: Make, peel: LayerPeel, rule: str) -> None:
    whole = make(peel, limit=1e-4, vote_rule=rule)
    contents = [saved(whole)]
    for _ in range(9):
        whole.step()
        contents.append(saved(whole))
    assert whole.watch.governor.braked(), "the brake must have been at work"  # type: ignore[union-attr]
    wanted = fingerprint(whole)
    for k in (0, 1, 2, 5, 8):
        part = go_on(make, contents[k], peel=peel, limit=1e-4, vote_rule=rule)
        while part.done < 9:
            part.step()
        assert fingerprint(part) == wanted, k


def test_resume_as_another_schedule_is_refused(make: Make) -> None:
    content = saved(make())
    with pytest.raises(TrainError, match="supervisor"):
        go_on(make, content, peel=LayerPeel(2, 2, 2))
    del content["train_state"]["sentinel"]
    with pytest.raises(TrainError, match="no sentinel"):
        go_on(make, content)


# -- a step that is left ----------------------------------------------------------------------------------------------


def numbers(result: StepResult) -> tuple[Any, ...]:
    """What a step came to, but for what was found out about its votes on the way."""
    counts = (result.tokens, result.answer_tokens, result.skipped, result.micro_batches)
    return (result.loss, *counts, result.moved, result.rate, result.measured, result.pressure, result.verdict)


def break_losses(monkeypatch: pytest.MonkeyPatch, places: set[tuple[int, int]]) -> None:
    """Losses that are not a number, at (step, micro-batch)."""
    loss = VoteCaster.loss

    def broken(self: VoteCaster, batch: Batch) -> torch.Tensor:
        at = (self.ballot.step, self.ballot.micro_batch)
        return loss(self, batch) * (torch.nan if at in places else 1.0)

    monkeypatch.setattr(VoteCaster, "loss", broken)


def asked_twice() -> Callable[[], bool]:
    """Says no, then yes: a trainer that is asked behind each micro-batch is left after each."""
    answers = iter((False, True))
    return lambda: next(answers)


@pytest.mark.parametrize("rule", ["momentum", "compact", "supermajority"])
@pytest.mark.parametrize("peel", [PEEL, LayerPeel(1, 2, 1, 2), LayerPeel()], ids=str)
def test_steps_that_are_left_behind_any_micro_batch_end_with_the_same_bits(
    make: Make, peel: LayerPeel, rule: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A new process after each micro-batch, some of which are not finite; a step has three."""
    break_losses(monkeypatch, {(0, 0), (2, 1), (4, 2), (5, 0), (5, 1), (5, 2)})
    whole = make(peel, limit=1e-4, vote_rule=rule)
    wanted = [numbers(whole.step()) for _ in range(7)]
    part, found, left = make(peel, limit=1e-4, vote_rule=rule), [], []
    part.asked_to_stop = lambda: True
    while part.done < 7:
        try:
            found.append(numbers(part.step()))
        except StepPaused as word:
            assert part.half is not None and f"after {part.half.ran} of 3" in str(word)
            left.append((part.done, part.half.ran))
            part = go_on(make, saved(part), peel=peel, limit=1e-4, vote_rule=rule)
            part.asked_to_stop = asked_twice() if part.half is not None and part.half.ran < 3 else lambda: False
        else:
            part.asked_to_stop = lambda: True
    assert left == [(step, ran) for step in range(7) for ran in (1, 2, 3)]
    assert found == wanted
    assert fingerprint(part) == fingerprint(whole)


def test_the_same_trainer_may_go_on(make: Make) -> None:
    whole, part = make(), make()
    for trainer in (whole, part):
        trainer.step()
    cursor = part.batches.state_dict()
    part.asked_to_stop = lambda: True
    for _ in range(2):
        # Asked again before anything was done it is where it was.
        with pytest.raises(StepPaused):
            part.step()
        assert part.batches.state_dict() == cursor and part.done == 1
        assert part.half is not None and part.half.ran == 1 and part.half.seconds > 0
    part.asked_to_stop = lambda: False
    result = part.step()
    assert result.earlier_seconds > 0 and part.half is None
    assert numbers(result) == numbers(whole.step()) and fingerprint(part) == fingerprint(whole)


def test_memory_that_runs_out_after_a_step_was_left_ends_it_as_it_would_have(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, part = make(LayerPeel()), make(LayerPeel())
    per_pass = 22
    with monkeypatch.context() as patched:
        shortage = Shortage(patched, whole)
        shortage.at(cast=[2 * per_pass + 5])
        result = whole.step()
    assert result.micro_batches == 2
    part.asked_to_stop = lambda: True
    with pytest.raises(StepPaused):
        part.step()
    part = go_on(make, saved(part), peel=LayerPeel())
    with monkeypatch.context() as patched:
        shortage = Shortage(patched, part)
        shortage.at(cast=[per_pass + 5])
        assert numbers(part.step()) == numbers(result)
        assert next(iter(shortage.calls)) == "cast", "it had found room: only the smaller shape is probed"
    assert part.shape == whole.shape != make(LayerPeel()).shape
    assert fingerprint(part) == fingerprint(whole)


def test_a_return_forgets_a_step_that_was_left(make: Make) -> None:
    trainer = make()
    trainer.step()
    content = saved(trainer)
    trainer.step()
    trainer.asked_to_stop = lambda: True
    with pytest.raises(StepPaused):
        trainer.step()
    trainer.roll_back(content)
    assert trainer.half is None and all(p.grad is None for p in trainer.floats.values())
    trainer.asked_to_stop = lambda: False
    assert trainer.step().micro_batches == 3


# -- memory -----------------------------------------------------------------------------------------------------------


class Shortage:
    """Makes ``GhostGrid.accept`` fail as an allocator does, at the calls of a mode that it is told."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, trainer: VoteTrainer) -> None:
        self.plan: dict[str, list[int]] = {}
        self.calls: dict[str, int] = {}
        accept = GhostGrid.accept

        def failing(grid: GhostGrid, *arguments: Any) -> None:
            mode = trainer.ballot.mode
            at = self.calls[mode] = self.calls.get(mode, 0) + 1
            if at in self.plan.get(mode, []):
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
            accept(grid, *arguments)

        monkeypatch.setattr(GhostGrid, "accept", failing)

    def at(self, **plan: list[int]) -> None:
        self.plan, self.calls = plan, {}


@pytest.mark.parametrize("rule", ["momentum", "compact", "stochastic"])
def test_a_micro_batch_that_runs_out_of_memory_leaves_no_trace(
    make: Make, monkeypatch: pytest.MonkeyPatch, rule: str
) -> None:
    """Wherever it does, and also when taking it back runs out once more."""
    monkeypatch.setattr(ghost_grid, "SLICE_ELEMENTS", 48 * 40)
    trainer = make(LayerPeel(), vote_rule=rule)
    trainer.step()
    batches = [next(trainer.batches) for _ in range(2)]
    shortage = Shortage(monkeypatch, trainer)
    trainer.caster.backward("probe", batches[1], Turn(trainer.done, 1, trainer.shape.grad_accum, 0.01))
    calls = shortage.calls["probe"]
    assert calls > 25
    trainer.optimizer.zero_grad(set_to_none=True)
    assert trainer.caster.cast(batches[0], Turn(trainer.done, 0, trainer.shape.grad_accum, 0.01)) is not None
    before = integers(trainer)
    grads = {n: p.grad.clone() for n, p in trainer.floats.items() if p.grad is not None}
    for place in [1, 2, 9, calls // 2, calls - 1, calls]:
        for again in ([], [1], [max(1, place - 1)]):
            shortage.at(cast=[place], retract=again)
            assert trainer.caster.cast(batches[1], Turn(trainer.done, 1, trainer.shape.grad_accum, 0.01)) == "memory"
            assert integers(trainer) == before, (place, again)
            for name, gradient in grads.items():
                assert torch.equal(trainer.floats[name].grad, gradient)  # type: ignore[arg-type]
    shortage.at()
    assert trainer.caster.cast(batches[1], Turn(trainer.done, 1, trainer.shape.grad_accum, 0.01)) is not None
    assert integers(trainer) != before


@pytest.mark.parametrize("rule", ["momentum", "compact"])
@pytest.mark.parametrize("mode", ["measure", "cast"])
@pytest.mark.parametrize(("peel", "opened"), [(LayerPeel.parse("none", None), 0), (PEEL, 2)], ids=["all", "a layer"])
def test_memory_that_runs_out_beside_a_first_measuring_leaves_no_yardstick(
    make: Make, monkeypatch: pytest.MonkeyPatch, rule: str, mode: str, peel: LayerPeel, opened: int
) -> None:
    """In it or right after it, before one micro-batch is complete: the step is that of a run whose probe found out.
    What was open earlier keeps its own yardstick."""
    start = make(peel, vote_rule=rule)
    for _ in range(opened):
        start.step()
    content = saved(start)
    wanted = go_on(make, content, peel=peel, vote_rule=rule)
    with monkeypatch.context() as patched:
        shortage = Shortage(patched, wanted)
        shortage.at(probe=[1])
        wanted.step()
    calls = shortage.calls[mode] // (1 if mode == "measure" else 4)
    assert calls == {("measure", 0): 23, ("measure", 2): 7, ("cast", 0): 23, ("cast", 2): 8}[mode, opened]
    for place in (1, 5, calls):
        trainer = go_on(make, content, peel=peel, vote_rule=rule)
        with monkeypatch.context() as patched:
            Shortage(patched, trainer).at(**{mode: [place]})
            result = trainer.step()
        assert [fields["where"] for kind, fields in result.events if kind == "out_of_memory"] == ["micro-batch 0 of 3"]
        assert trainer.shape == wanted.shape == Shape(24, 1, 4)
        assert fingerprint(trainer) == fingerprint(wanted), place


def test_votes_that_cannot_be_taken_back_are_said_to_be_lost(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = make(LayerPeel())
    trainer.step()
    shortage = Shortage(monkeypatch, trainer)
    shortage.at(cast=[9], retract=[1, 2])
    with pytest.raises(VotesLost, match="taken back"):
        trainer.step()
    # And where a slice itself was interrupted nobody knows what it left.
    trainer = make(LayerPeel())
    trainer.step()
    monkeypatch.undo()
    cast = MomentumRule.cast
    calls = 0

    def torn(*arguments: Any) -> None:
        nonlocal calls
        calls += 1
        cast(*arguments)
        if calls == 5:
            raise MemoryError

    monkeypatch.setattr(MomentumRule, "cast", torn)
    with pytest.raises(VotesLost):
        trainer.step()


def test_a_step_goes_on_smaller_after_it_ran_out_of_memory(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """The complete micro-batches count, the data of the others are dealt out again, none twice."""
    trainer = make(LayerPeel())
    trainer.step()
    cursor = trainer.batches.state_dict()
    shortage = Shortage(monkeypatch, trainer)
    per_pass = 22
    shortage.at(cast=[2 * per_pass + 5])
    result = trainer.step()
    assert (result.micro_batches, trainer.done) == (2, 2)
    assert [kind for kind, _ in result.events] == ["out_of_memory"]
    assert result.events[0][1] == {
        "where": "micro-batch 2 of 3",
        "from": "3 x 1 x 32 tokens",
        "to": "4 x 1 x 24 tokens",
    }
    state = trainer.batches.state_dict()
    assert state["earlier"] == [[32, cursor["row"] + 2]] and (state["row"], state["seq_len"]) == (0, 24)
    assert trainer.shape == Shape(24, 1, 4)
    shortage.at(cast=[1])
    result = trainer.step()
    assert (result.micro_batches, trainer.shape, trainer.done) == (6, Shape(16, 1, 6), 3)
    assert [fields["where"] for _, fields in result.events] == ["micro-batch 0 of 4"]
    shortage.at(cast=[1])
    with pytest.raises(TrainError, match="--plan"):
        trainer.step()


def test_every_unlock_is_probed_before_it_votes(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = make()
    shortage = Shortage(monkeypatch, trainer)
    probed = []
    for step in range(8):
        shortage.at()
        trainer.step()
        if "probe" in shortage.calls:
            probed.append(step)
    assert probed == [0, 2, 4, 6]
    trainer = make()
    shortage = Shortage(monkeypatch, trainer)
    shortage.at(probe=[1])
    events = trainer.step().events
    assert [kind for kind, _ in events] == ["peel", "out_of_memory"] and trainer.shape.seq_len == 24
    trainer = make()
    shortage = Shortage(monkeypatch, trainer)
    before = integers(trainer)
    trainer.supervisor.apply(0)
    shortage.at()
    trainer._probe([])
    assert shortage.calls["probe"] > 0
    trainer.supervisor.top.grids["model.embed_tokens.grid"].lock()
    assert integers(trainer) == before


@pytest.mark.parametrize("rule", ["momentum", "compact"])
def test_resume_is_exact_across_a_change_of_sequence_length(
    make: Make, monkeypatch: pytest.MonkeyPatch, rule: str
) -> None:
    whole = make(vote_rule=rule)
    with monkeypatch.context() as patched:
        shortage = Shortage(patched, whole)
        for step in range(5):
            shortage.at(**({"cast": [12]} if step == 3 else {}))
            whole.step()
    content = saved(whole)
    assert whole.shape.seq_len == 24
    for _ in range(5):
        whole.step()
    part = go_on(make, content, vote_rule=rule)
    assert part.shape == Shape(24, 1, 4)
    for _ in range(5):
        part.step()
    assert fingerprint(part) == fingerprint(whole)


def test_without_a_watch_memory_errors_are_raised(
    checkpoints: dict[str, dict[str, Any]], texts: EncodedSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    batches = PackedBatches(texts, seq_len=SEQUENCE, batch_size=1, pad_id=258, seed=0)
    trainer = VoteTrainer(model_from_checkpoint(checkpoints["prime-harmonic"]), batches, RECIPE)
    Shortage(monkeypatch, trainer).at(cast=[3])
    with pytest.raises(torch.OutOfMemoryError):
        trainer.step()


# -- brakes, returns, sensors -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", ["momentum", "supermajority"])
def test_the_governor_brings_a_fast_layer_down(make: Make, rule: str) -> None:
    def run(limit: float | None) -> tuple[list[dict[str, float]], VoteTrainer]:
        trainer = make(LayerPeel(), limit=limit, vote_rule=rule, schedule="constant")
        return [trainer.step().measured for _ in range(10)], trainer

    free, _ = run(1e9)
    limit = 0.3 * sum(free[-1].values()) / len(free[-1])
    braked, trainer = run(limit)
    assert sum(braked[-1].values()) < 0.6 * sum(free[-1].values())
    assert trainer.watch is not None and trainer.watch.governor is not None
    heats = trainer.watch.governor.braked()
    assert heats and all(g.heat == heats.get(group.name, 1.0) for group in trainer.groups for g in group.grids.values())


def test_a_return_restores_weights_and_votes_and_takes_new_data_at_half_the_rate(make: Make) -> None:
    trainer = make()
    for _ in range(5):
        trainer.step()
    content, here = saved(trainer), integers(trainer)
    rates = [trainer.step().rate for _ in range(4)]
    data = trainer.batches.state_dict()
    assert trainer.watch is not None
    trainer.watch.sentinel.heat = 0.5
    trainer.roll_back(content)
    assert trainer.done == 5 and integers(trainer) == here and trainer.batches.state_dict() == data
    assert trainer.supervisor.now == (1, 2)
    result = trainer.step()
    assert result.rate == pytest.approx(rates[0] / 2)
    assert ("peel", {"opened": (0,), "closed": (), "phase": "all open"}) not in result.events
    assert trainer.step().events[0][0] == "peel"


def test_votes_agree_with_fresh_gradients_only_where_there_is_a_signal(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same rows again and again at a small rate are all signal; shuffled votes, and random targets, are none."""

    def run(random_targets: bool) -> list[dict[str, tuple[float, float]]]:
        trainer = make(LayerPeel(), grad_accum=1, lr=1e-6)
        row = next(trainer.batches)
        generator = torch.Generator().manual_seed(0)

        def deal(batches: PackedBatches) -> Any:
            labels = row.labels.clone()
            if random_targets:
                labels[labels != -100] = torch.randint(250, (int((labels != -100).sum()),), generator=generator)
            return replace(row, labels=labels)

        monkeypatch.setattr(PackedBatches, "__next__", deal)
        found = [trainer.step() for _ in range(8)]
        monkeypatch.undo()
        assert found[0].agreement == {}, "there were no votes yet"
        assert all(r.consensus[g] == 1.0 for r in found[2:] for g in r.consensus), "one micro-batch has one opinion"
        return [r.agreement for r in found[2:]]

    signal, noise = run(False), run(True)
    for group in ("0", "1", "2", "head"):
        votes, control = (sum(a[group][i] for a in signal) / len(signal) for i in (0, 1))
        assert votes > 0.3 and abs(control) < 0.1, group
        assert sum(a[group][0] for a in noise) / len(noise) < 0.5 * votes, group


@pytest.mark.parametrize("rule", ["momentum", "compact", "supermajority"])
def test_open_layers_report_their_movement_and_vote_pressure(make: Make, rule: str) -> None:
    """Whatever the governor does; locked layers report nothing."""
    trainer = make(vote_rule=rule)
    trainer.watch.governor = None
    opened: list[set[str]] = []
    for _ in range(4):
        result = trainer.step()
        opened.append(set(result.flips))
        assert result.measured == {}
        assert set(result.movement) == set(result.pressure) == set(result.flips)
        assert all(0 < p < 1 for p in result.pressure.values())
        assert sum(result.flips.values()) == sum(m.flips for m in result.moved.values())
    assert opened[0] == {"head"} and opened[3] == {"head", "2"}


def test_vote_pressure_is_one_where_every_vote_is_at_the_edge(make: Make) -> None:
    trainer = make()
    trainer.step()
    head = trainer.supervisor.top.grids
    for grid in head.values():
        grid.state.votes.fill_(-127)
    assert vote_pressure(trainer.groups)["head"] == pytest.approx(1.0)
    for grid in head.values():
        grid.state.votes.zero_()
    assert vote_pressure(trainer.groups)["head"] == 0.0

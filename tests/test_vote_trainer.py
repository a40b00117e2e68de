"""The training step: it learns, leaves what it should alone, and goes on bit for bit, under every vote rule."""

from __future__ import annotations

import copy
import random
from dataclasses import replace
from pathlib import Path
from string import ascii_lowercase
from typing import Any

import pytest
import torch
from tiny_models import import_source, tiny_config, write_source

from answer_masks import EncodedSet, encode_records
from ballots import RuleError
from ghost_core import grids_of
from packed_batches import Batch, PackedBatches
from prime_checkpoint import load_checkpoint, tensor_sha256, walk_tensors
from qwen_prime_wrapper import model_from_checkpoint, model_tensors, tokenizer_from_checkpoint
from text_records import read_records
from training_recipe import DEFAULT_RATE, Recipe, TrainError, default_rate, learning_rate
from vote_casting import Turn
from vote_rules import RULES
from vote_trainer import VoteTrainer

ASSETS = Path(__file__).resolve().parent.parent / "assets"
RECIPE = Recipe(steps=4, grad_accum=6, lr=4e-3, warmup=1, gradient_checkpointing=False, device="cpu")
SEQUENCE = 32


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """A random model of two layers with a tied head, on two manifolds."""
    folder = tmp_path_factory.mktemp("trainer")
    source = write_source(folder / "source", tiny_config())
    found = {}
    for manifold in ("prime-harmonic", "compact"):
        import_source(source, folder / f"{manifold}.pt", manifold=manifold)
        found[manifold] = load_checkpoint(folder / f"{manifold}.pt")
    return found


@pytest.fixture(scope="module")
def texts(checkpoints: dict[str, dict[str, Any]]) -> EncodedSet:
    """Sixty texts of a repeated syllable, of differing length, so that rows differ in their number of targets."""
    chance = random.Random(0)
    syllables = ["".join(chance.choices(ascii_lowercase, k=3)) for _ in range(60)]
    tokenizer = tokenizer_from_checkpoint(checkpoints["compact"])
    repeated = [s * chance.randint(3, SEQUENCE // 3) for s in syllables]
    return encode_records(repeated, tokenizer, SEQUENCE, progress=False)


class Bench:
    """Makes trainers on the same model and data."""

    def __init__(self, checkpoints: dict[str, dict[str, Any]], texts: EncodedSet) -> None:
        self.checkpoints = checkpoints
        self.texts = texts

    def trainer(self, recipe: Recipe = RECIPE, batch_size: int = 1, **changes: Any) -> VoteTrainer:
        recipe = replace(recipe, **changes)
        manifold = "compact" if recipe.rule().vote_bits else "prime-harmonic"
        return VoteTrainer(model_from_checkpoint(self.checkpoints[manifold]), self.batches(recipe, batch_size), recipe)

    def batches(self, recipe: Recipe = RECIPE, batch_size: int = 1) -> PackedBatches:
        return PackedBatches(self.texts, seq_len=SEQUENCE, batch_size=batch_size, pad_id=258, seed=recipe.seed)


@pytest.fixture(scope="module")
def bench(checkpoints: dict[str, dict[str, Any]], texts: EncodedSet) -> Bench:
    return Bench(checkpoints, texts)


def hashes(tree: dict[str, Any]) -> dict[str, str]:
    return {name: tensor_sha256(tensor) for name, tensor in walk_tensors(tree)}


def fingerprint(trainer: VoteTrainer) -> dict[str, str]:
    """Hash of every tensor that the next step depends on."""
    return hashes({"model": model_tensors(trainer.model), "votes": trainer.votes(), "state": trainer.state()})


def integers(trainer: VoteTrainer) -> dict[str, str]:
    """Hash of every word, vote and row number."""
    return hashes({n: {"words": g.indices, **g.vote_state()} for n, g in trainer.grids.items()})


def weights(trainer: VoteTrainer) -> dict[str, torch.Tensor]:
    return {n: g.dequantize().double() for n, g in trainer.grids.items()}


# -- what moves -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", RULES)
def test_every_matrix_moves_and_nothing_has_a_gradient(bench: Bench, name: str) -> None:
    trainer = bench.trainer(vote_rule=name)
    before = {n: g.tables().levels(g.indices).clone() for n, g in trainer.grids.items()}
    floats = {n: p.detach().clone() for n, p in trainer.floats.items()}
    assert len(before) == 2 * 7 + 1 and len(floats) > 8
    results = [trainer.step() for _ in range(3)]
    for n, grid in trainer.grids.items():
        assert bool((grid.tables().levels(grid.indices) != before[n]).any()), n
        assert grid.tables().unused(grid.indices) == 0
    assert all(not torch.equal(p, floats[n]) for n, p in trainer.floats.items())
    assert all(p.grad is None for p in trainer.floats.values())
    assert trainer.done == 3 and trainer.tokens == sum(r.tokens for r in results)
    for result in results[1:]:
        assert set(result.moved) == set(before) and result.skipped == 0
        assert all(0 < m.flips <= m.weights and m.clipped <= m.weights for m in result.moved.values())


@pytest.mark.parametrize("name", RULES)
def test_a_locked_grid_keeps_its_hash_while_the_others_move(bench: Bench, name: str) -> None:
    trainer = bench.trainer(vote_rule=name)
    trainer.step()
    chosen = [n for n in trainer.grids if "layers.1.mlp" in n or "layers.0.self_attn.q" in n]
    for n in chosen:
        trainer.grids[n].lock()
    before = hashes({n: {"i": g.indices, "s": g.scale} for n, g in trainer.grids.items()})
    assert not any(trainer.grids[n].tables().votes(trainer.grids[n].indices).any() for n in chosen)
    results = [trainer.step() for _ in range(2)]
    after = hashes({n: {"i": g.indices, "s": g.scale} for n, g in trainer.grids.items()})
    changed = {n.removesuffix("/i") for n in before if before[n] != after[n]}
    assert len(chosen) == 4 and changed == set(trainer.grids) - set(chosen)
    assert all(set(r.moved) == changed for r in results) and set(trainer.votes()) == changed


@pytest.mark.parametrize("name", RULES)
def test_each_rule_learns_and_shuffled_targets_do_not_help(bench: Bench, name: str) -> None:
    """Loss on the training texts after twelve steps; of shuffled targets only how common they are can be learned."""
    whisper = name in ("supermajority", "stochastic")
    losses = {}
    for kind in ("true", "random"):
        trainer = bench.trainer(
            vote_rule=name, steps=12, lr=3e-3 if whisper else 8e-3, grad_accum=8, schedule="constant"
        )
        generator = torch.Generator().manual_seed(1)
        loss = trainer.caster.loss

        def shuffled(batch: Batch, loss: Any = loss, generator: torch.Generator = generator) -> torch.Tensor:
            labels = batch.labels.clone()
            wanted = labels != -100
            labels[wanted] = torch.randint(256, (int(wanted.sum()),), generator=generator)
            return loss(replace(batch, labels=labels))

        held = list(zip(range(12), bench.batches(), strict=False))
        tokens = sum(b.answer_tokens for _, b in held)
        before = float(sum(loss(b).detach() for _, b in held)) / tokens
        if kind == "random":
            trainer.caster.loss = shuffled  # type: ignore[method-assign]
        for _ in range(12):
            trainer.step()
        losses[kind] = float(sum(loss(b).detach() for _, b in held)) / tokens - before
    assert losses["true"] < -1.5 and losses["random"] > 0.4 * losses["true"]


# -- no bit depends on what it should not -----------------------------------------------------------------------------


@pytest.mark.parametrize("name", RULES)
def test_gradient_checkpointing_changes_no_bit(bench: Bench, name: str) -> None:
    prints = []
    for checkpointing in (True, False):
        trainer = bench.trainer(vote_rule=name, gradient_checkpointing=checkpointing)
        for _ in range(2):
            trainer.step()
        prints.append(fingerprint(trainer))
    assert prints[0] == prints[1]


def test_all_layers_but_the_top_are_computed_again(bench: Bench) -> None:
    layers = bench.trainer(gradient_checkpointing=True).model.model.layers
    assert [layer.gradient_checkpointing for layer in layers] == [True] * (len(layers) - 1) + [False]


@pytest.mark.parametrize("name", RULES)
def test_the_order_in_which_micro_batches_run_changes_no_bit_of_words_and_votes(bench: Bench, name: str) -> None:
    """Each keeps its number; only the turn changes. Norms and biases sum floats, so theirs may differ by rounding."""
    prints, floats = [], []
    for order in (range(6), [3, 5, 0, 2, 4, 1]):
        trainer = bench.trainer(vote_rule=name)
        trainer.step()
        cast, waiting = trainer.caster.cast, []

        def in_turn(batch: Batch, turn: Turn, cast: Any = cast, waiting: Any = waiting, order: Any = order) -> float:
            waiting.append((batch, turn))
            return sum(cast(*waiting[i]) for i in order) if len(waiting) == 6 else 0.0

        trainer.caster.cast = in_turn  # type: ignore[method-assign]
        trainer.step()
        prints.append(integers(trainer))
        floats.append([p.detach().clone() for p in trainer.floats.values()])
    assert prints[0] == prints[1]
    torch.testing.assert_close(floats[0], floats[1], rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("where", ["loss", "middle"])
def test_a_micro_batch_that_is_not_finite_leaves_no_trace(bench: Bench, name: str, where: str) -> None:
    """Against a run in which that micro-batch never votes."""
    trainer, control = bench.trainer(vote_rule=name), bench.trainer(vote_rule=name)
    trainer.step()
    control.step()
    loss, cast = trainer.caster.loss, control.caster.cast

    def poisoned(batch: Batch) -> torch.Tensor:
        value = loss(batch)
        return value * torch.nan if where == "loss" and trainer.ballot.micro_batch == 1 else value

    def skipping(batch: Batch, turn: Turn) -> float | None:
        return None if turn.number == 1 else cast(batch, turn)

    voted = []

    def explode(module: Any, inputs: Any, output: Any) -> Any:
        if trainer.ballot.micro_batch == 1 and output.requires_grad:
            before = integers(trainer)
            output.register_hook(lambda g: voted.append(before != integers(trainer)) or g * torch.inf)
        return output

    hook = trainer.model.model.layers[0].register_forward_hook(explode) if where == "middle" else None
    trainer.caster.loss, control.caster.cast = poisoned, skipping  # type: ignore[method-assign]
    result, wanted = trainer.step(), control.step()
    if hook:
        hook.remove()
        assert voted == [True, True], "the layers above had voted when it broke, and were asked to take it back"
    assert result.skipped == wanted.skipped == 1 and trainer.ballot.voted == 5
    assert result.loss == wanted.loss
    assert fingerprint(trainer) == fingerprint(control)


@pytest.mark.parametrize("name", RULES)
def test_a_step_without_a_finite_micro_batch_moves_nothing(bench: Bench, name: str) -> None:
    trainer = bench.trainer(vote_rule=name)
    trainer.step()
    before = integers(trainer), hashes(trainer.floats)
    loss = trainer.caster.loss
    trainer.caster.loss = lambda batch: loss(batch) * torch.nan  # type: ignore[method-assign]
    result = trainer.step()
    assert result.skipped == 6 and result.moved == {} and result.loss != result.loss
    assert (integers(trainer), hashes(trainer.floats)) == before
    trainer.caster.loss = loss  # type: ignore[method-assign]
    assert trainer.step().skipped == 0


def test_a_first_micro_batch_that_is_not_finite_measures_nothing(bench: Bench) -> None:
    """The grids go on waiting for their yardstick, and the next step gives it."""
    trainer = bench.trainer()
    loss = trainer.caster.loss
    trainer.caster.loss = lambda batch: loss(batch) * torch.nan  # type: ignore[method-assign]
    before = integers(trainer)
    trainer.step()
    assert integers(trainer) == before and all(g.waiting for g in trainer.grids.values())
    trainer.caster.loss = loss  # type: ignore[method-assign]
    trainer.step()
    assert not any(g.waiting for g in trainer.grids.values()) and integers(trainer) != before


# -- how a batch is split ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("width", "name", "buffer"), [("16", "momentum", "int16"), ("8", "momentum", "int8"), ("6", "compact", None)]
)
def test_32_micro_batches_of_a_sequence_move_as_one_of_32(
    bench: Bench, width: str, name: str, buffer: str | None
) -> None:
    """The same learning rate moves the weights about as far, in the same direction, however a batch is split.

    Twelve steps with the rate at 0 let the row statistics settle; then one step with the same gradients counts.
    """
    moves = []
    for count, rows in ((32, 1), (1, 32)):
        trainer = bench.trainer(
            vote_rule=name, vote_buffer=buffer, grad_accum=count, batch_size=rows, lr=0.0, warmup=0, schedule="constant"
        )
        for _ in range(12):
            trainer.step()
        trainer.recipe = replace(trainer.recipe, lr=4e-3)
        before = weights(trainer)
        trainer.step()
        moves.append({n: w - before[n] for n, w in weights(trainer).items()})
    many, one = moves
    for n in one:
        size = many[n].norm() / one[n].norm()
        cosine = (many[n] * one[n]).sum() / many[n].norm() / one[n].norm()
        # With few bits, the votes of a row that only one micro-batch in many sees are clipped: part of the rule.
        low, alike = {"16": (0.85, 0.97), "8": (0.5, 0.75), "6": (0.65, 0.6)}[width]
        assert low < size < 1.33 and cosine > alike, f"{n}: size {size:.3f}, cosine {cosine:.3f}"
    total = [torch.cat([m.flatten() for m in move.values()]) for move in moves]
    assert (0.78 if width == "8" else 0.85) < float(total[0].norm() / total[1].norm()) < 1.18
    assert float(torch.nn.functional.cosine_similarity(*total, dim=0)) > alike


def test_the_loss_is_the_mean_over_all_answer_tokens(bench: Bench) -> None:
    """However they are spread over micro-batches: norms and biases see the same gradient too."""
    results, floats = [], []
    for count, rows in ((8, 1), (2, 4), (1, 8)):
        trainer = bench.trainer(grad_accum=count, batch_size=rows, compute="float32")
        seen: dict[str, torch.Tensor] = {}
        step = trainer.optimizer.step
        trainer.optimizer.step = lambda t=trainer, seen=seen, step=step: (  # type: ignore[method-assign]
            seen.update({n: p.grad.clone() for n, p in t.floats.items()}),
            step(),
        )
        results.append(trainer.step())
        floats.append(seen)
    for result, seen in zip(results[1:], floats[1:], strict=True):
        assert result.answer_tokens == results[0].answer_tokens > 100
        assert result.loss == pytest.approx(results[0].loss, rel=1e-5)
        for n, gradient in floats[0].items():
            torch.testing.assert_close(seen[n], gradient, rtol=1e-3, atol=1e-4 * float(gradient.abs().max()))


# -- weight decay -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["momentum", "compact"])
def test_weight_decay_shrinks_weights_by_lr_times_wd_a_step(bench: Bench, name: str) -> None:
    """Against the same run without it; norms and biases have none."""
    ends = []
    for decay in (0.0, 0.4):
        trainer = bench.trainer(vote_rule=name, steps=16, lr=2e-3, warmup=0, schedule="constant", weight_decay=decay)
        start = weights(trainer)
        for _ in range(16):
            trainer.step()
        assert all(group["weight_decay"] == 0 for group in trainer.optimizer.param_groups)
        ends.append(weights(trainer))
    plain, decayed = ends
    expected = (1 - 2e-3 * 0.4) ** 16 - 1
    difference = torch.cat([(decayed[n] - plain[n]).flatten() for n in start])
    first = torch.cat([w.flatten() for w in start.values()])
    assert float((difference * first).sum() / first.square().sum()) == pytest.approx(expected, rel=0.2)


@pytest.mark.parametrize("name", ["supermajority", "stochastic"])
def test_weight_decay_of_a_rule_that_has_none_is_one_line(bench: Bench, name: str) -> None:
    with pytest.raises(ValueError, match="no weight decay") as error:
        bench.trainer(vote_rule=name, weight_decay=0.1).step()
    assert "\n" not in str(error.value)


# -- going on ---------------------------------------------------------------------------------------------------------


def saved(trainer: VoteTrainer) -> dict[str, Any]:
    """The part of a checkpoint that the trainer goes on from, as copies."""
    return copy.deepcopy(
        {"model": model_tensors(trainer.model), "votes": trainer.votes(), "train_state": trainer.state()}
    )


def continued(bench: Bench, content: dict[str, Any], **changes: Any) -> VoteTrainer:
    trainer = bench.trainer(**changes)
    for name, grid in grids_of(trainer.model).items():
        grid.indices.copy_(content["model"][f"{name}.indices"])
        grid.scale.copy_(content["model"][f"{name}.scale"])
    with torch.no_grad():
        for name, parameter in trainer.floats.items():
            parameter.copy_(content["model"][name])
    trainer.restore(content)
    return trainer


@pytest.mark.parametrize("buffer", ["int8", "int16"])
@pytest.mark.parametrize("name", RULES)
def test_a_restored_trainer_goes_on_bit_for_bit(bench: Bench, name: str, buffer: str) -> None:
    changes = {"vote_rule": name, "vote_buffer": None if name == "compact" else buffer}
    trainer = bench.trainer(**changes)
    for _ in range(2):
        trainer.step()
    middle = saved(trainer)
    fresh = continued(bench, middle, **changes)
    assert fingerprint(fresh) == fingerprint(trainer)
    for _ in range(2):
        assert replace(trainer.step()) == replace(fresh.step())
    assert fingerprint(fresh) == fingerprint(trainer)
    assert fresh.state()["data"] == trainer.state()["data"] and fresh.done == 4


def test_a_grid_that_was_locked_stays_locked(bench: Bench) -> None:
    trainer = bench.trainer(vote_rule="compact")
    trainer.step()
    locked = next(iter(trainer.grids))
    trainer.grids[locked].lock()
    fresh = continued(bench, saved(trainer), vote_rule="compact")
    assert not fresh.grids[locked].unlocked and sum(g.unlocked for g in fresh.grids.values()) == len(fresh.grids) - 1
    trainer.step()
    fresh.step()
    assert fingerprint(fresh) == fingerprint(trainer)


@pytest.mark.parametrize(
    ("wrote", "reads", "words"),
    [
        ({}, {"vote_buffer": "int16"}, "vote_buffer int8, this run int16"),
        ({"vote_buffer": "int16"}, {}, "vote_buffer int16, this run int8"),
        ({}, {"vote_rule": "supermajority"}, "vote_rule momentum, this run supermajority"),
        ({"vote_rule": "supermajority"}, {"vote_rule": "stochastic"}, "vote_rule supermajority, this run stochastic"),
        ({}, {"vote_rule": "compact"}, "vote_rule momentum, this run compact"),
        ({"vote_rule": "compact"}, {"vote_rule": "momentum"}, "vote_rule compact, this run momentum"),
        ({}, {"grad_accum": 3}, "micro_batches 6, this run 3"),
        ({}, {"seed": 1}, "seed 0, this run 1"),
    ],
    ids=str,
)
def test_going_on_as_another_run_is_one_line(
    bench: Bench, wrote: dict[str, Any], reads: dict[str, Any], words: str
) -> None:
    content = saved(bench.trainer(**wrote))
    trainer = bench.trainer(**reads)
    before = fingerprint(trainer)
    with pytest.raises(TrainError, match=words) as error:
        trainer.restore(content)
    assert "\n" not in str(error.value) and fingerprint(trainer) == before


@pytest.mark.parametrize("name", RULES)
def test_a_rule_on_the_wrong_manifold_is_one_line(bench: Bench, name: str) -> None:
    recipe = replace(RECIPE, vote_rule=name)
    wrong = "prime-harmonic" if recipe.rule().vote_bits else "compact"
    model = model_from_checkpoint(bench.checkpoints[wrong])
    with pytest.raises(RuleError, match=f"rule {name} needs the manifold .*, the checkpoint has {wrong}") as error:
        VoteTrainer(model, bench.batches(), recipe)
    assert "\n" not in str(error.value)
    assert not any(g.unlocked for g in grids_of(model).values())


@pytest.mark.parametrize(("name", "most"), [("momentum", 512), ("compact", 512), ("supermajority", 256)])
def test_more_micro_batches_than_a_step_can_count_are_one_line(bench: Bench, name: str, most: int) -> None:
    """With a tied head, which votes twice in each."""
    bench.trainer(vote_rule=name, grad_accum=most)
    with pytest.raises((RuleError, TrainError), match=str(most)) as error:
        bench.trainer(vote_rule=name, grad_accum=most + 1)
    assert "\n" not in str(error.value)


# -- the rate ---------------------------------------------------------------------------------------------------------


def test_the_learning_rate_rises_and_falls() -> None:
    recipe = Recipe(steps=100, warmup=10, lr=1.0)
    rates = [learning_rate(recipe, s) for s in range(100)]
    assert rates[0] == pytest.approx(0.1) and rates[9] == pytest.approx(1.0) and max(rates) <= 1.0
    assert rates[10:] == sorted(rates[10:], reverse=True) and rates[-1] == pytest.approx(0.1, abs=0.01)
    assert rates[55] == pytest.approx(0.55)
    assert learning_rate(replace(recipe, schedule="constant"), 99) == 1.0
    straight = [learning_rate(replace(recipe, schedule="linear"), s) for s in range(10, 101)]
    assert straight == pytest.approx([1 - 0.9 * i / 90 for i in range(91)])
    for schedule in ("cosine", "linear"):
        assert learning_rate(replace(recipe, schedule=schedule), 500) == pytest.approx(0.1)
        assert learning_rate(replace(recipe, schedule=schedule, steps=5), 3) == pytest.approx(0.4)


def test_without_a_rate_it_is_taken_from_the_width(bench: Bench) -> None:
    trainer = bench.trainer(lr=None)
    assert trainer.recipe.lr == default_rate(48) == DEFAULT_RATE / 48
    assert default_rate(96) == default_rate(48) / 2
    trainer.step()
    assert trainer.optimizer.param_groups[0]["lr"] == learning_rate(trainer.recipe, 0)
    with pytest.raises(TrainError, match="no learning rate"):
        learning_rate(Recipe(lr=None), 0)


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"steps": 0}, "steps"),
        ({"grad_accum": 0}, "grad-accum"),
        ({"warmup": -1}, "warmup"),
        ({"lr": 2.0}, "lr"),
        ({"lr": float("nan")}, "lr"),
        ({"beta": 1.0}, "beta"),
        ({"beta": 0.5, "vote_rule": "supermajority"}, "beta"),
        ({"vote_rule": "majority"}, "majority"),
        ({"vote_buffer": "int4"}, "int4"),
        ({"vote_rule": "compact", "vote_buffer": "int8"}, "vote-buffer"),
        ({"weight_decay": -0.1}, "weight-decay"),
        ({"weight_decay": -0.1, "lr": None}, "weight-decay"),
        ({"weight_decay": 1.0, "lr": 1e-2}, "weight-decay"),
        ({"weight_decay": float("nan")}, "weight-decay"),
        ({"weight_decay": float("inf"), "lr": None}, "weight-decay"),
    ],
    ids=str,
)
def test_a_recipe_refuses(change: dict[str, Any], word: str) -> None:
    with pytest.raises(ValueError, match=word) as error:
        replace(RECIPE, **change)
    assert "\n" not in str(error.value)


# -- a trained model --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def coder(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("coder")
    found = {}
    for manifold in ("prime-harmonic", "compact"):
        import_source(ASSETS / "tiny_coder", folder / f"{manifold}.pt", manifold=manifold)
        found[manifold] = load_checkpoint(folder / f"{manifold}.pt")
    return found


@pytest.mark.parametrize("name", ["momentum", "compact"])
def test_random_targets_do_not_help_the_held_out_loss(coder: dict[str, dict[str, Any]], name: str) -> None:
    """The same number of flips without a signal must not look like learning."""
    checkpoint = coder["compact" if name == "compact" else "prime-harmonic"]
    tokenizer = tokenizer_from_checkpoint(checkpoint)
    records = read_records(ASSETS / "stdlib_instruct.jsonl", split="train").records
    encoded = encode_records(records[:200], tokenizer, 128, progress=False)
    recipe = replace(RECIPE, vote_rule=name, grad_accum=2, lr=1e-3)
    losses = {}
    for kind in ("true", "random"):
        batches = PackedBatches(encoded, seq_len=128, batch_size=1, pad_id=tokenizer.pad_token_id, seed=0)
        trainer = VoteTrainer(model_from_checkpoint(checkpoint), batches, recipe)
        held = [next(trainer.batches) for _ in range(2)]
        generator = torch.Generator().manual_seed(1)
        loss = trainer.caster.loss

        def shuffled(batch: Batch, loss: Any = loss, generator: torch.Generator = generator) -> torch.Tensor:
            labels = batch.labels.clone()
            wanted = labels != -100
            labels[wanted] = torch.randint(4096, (int(wanted.sum()),), generator=generator)
            return loss(replace(batch, labels=labels))

        if kind == "random":
            trainer.caster.loss = shuffled  # type: ignore[method-assign]
        before = float(sum(loss(b).detach() for b in held))
        for _ in range(4):
            trainer.step()
        losses[kind] = float(sum(loss(b).detach() for b in held)) / before
    assert losses["true"] < 0.85
    assert losses["random"] > 0.98

"""Silent failure: every way in which votes can go nowhere is made here, in the real trainer, and has to be noticed."""

from __future__ import annotations

import math
import re
import zlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
from test_night_watch import PEEL, Make, checkpoints, make, texts  # noqa: F401  fixtures

from ghost_grid import GhostGrid
from momentum_rules import MomentumRule
from night_shift import LayerPeel, Verdict
from qwen_prime_wrapper import answer_loss
from vote_evidence import Hearing
from vote_guard import Evidence, VoteGuard
from vote_trainer import VoteTrainer

pytestmark = pytest.mark.usefixtures("one_thread")

OPEN = LayerPeel.parse("none", None)
SOUND = Evidence(heard=True, followed=1.0, obeyed=1.0, flips=100, moves=50)
STEPS = 12


# -- counting ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("evidence", "limit", "words"),
    [
        (Evidence(False, None, 1.0, 5, 50), 8, "no gradient reaches it"),
        (Evidence(True, -1.0, 1.0, 5, 50), 8, r"votes follow their gradients at -1\.000"),
        (Evidence(True, 0.0, 1.0, 5, 50), 8, r"votes follow their gradients at 0\.000"),
        (Evidence(True, 1.0, -1.0, 5, 50), 8, r"weights follow their votes at -1\.000"),
        (Evidence(True, 1.0, None, 0, 50), 64, "not one of its weights moves"),
        (Evidence(True, None, None, 3, 50), 64, "no votes are cast"),
    ],
)
def test_a_fault_ends_the_run_when_it_lasts(evidence: Evidence, limit: int, words: str) -> None:
    guard = VoteGuard()
    for _ in range(limit - 1):
        assert guard.look({"good": SOUND, "bad": evidence}, 1e-3, 2.0) is None
    reason = guard.look({"good": SOUND, "bad": evidence}, 1e-3, 2.0)
    assert reason is not None and reason.startswith("bad: ")
    assert re.search(words, reason)


@pytest.mark.parametrize("evidence", [Evidence(False, None, 1.0, 5, 50), Evidence(True, 1.0, None, 0, 50)])
def test_one_sound_step_and_the_count_begins_again(evidence: Evidence) -> None:
    guard = VoteGuard(patience=5, idle_max=5)
    for _ in range(20):
        for _ in range(4):
            assert guard.look({"bad": evidence}, 1e-3, 2.0) is None
        assert guard.look({"bad": SOUND}, 1e-3, 2.0) is None


def test_shares_count_by_their_mean() -> None:
    guard = VoteGuard()
    for step in range(100):
        assert guard.look({"noisy": Evidence(True, 1.0, -0.5 if step % 3 == 0 else 0.6, 4, 50)}, 1e-3, 2.0) is None
    reasons = [guard.look({"noisy": Evidence(True, 1.0, -0.3, 4, 50)}, 1e-3, 2.0) for _ in range(8)]
    assert reasons[-1] is not None and "weights follow" in reasons[-1]


def test_a_handful_of_moves_says_nothing() -> None:
    guard = VoteGuard()
    for _ in range(200):
        assert guard.look({"few": Evidence(True, 1.0, -1.0, 1, 1)}, 1e-3, 2.0) is None
    reasons = [guard.look({"few": Evidence(True, 1.0, -1.0, 10, 10)}, 1e-3, 2.0) for _ in range(10)]
    assert reasons[2] is None and "weights follow" in str(reasons[-1])


def test_what_is_sound_or_expected_does_not_count() -> None:
    guard = VoteGuard()
    resting = Evidence(True, 1.0, None, 0, 50)
    sparse = Evidence(True, 1.0, None, 3, 50)
    for _ in range(200):
        assert guard.look({"a": SOUND, "b": sparse}, 1e-3, 2.0) is None
        assert guard.look({"a": SOUND, "b": resting}, 0.0, 2.0) is None
    for _ in range(7):
        guard.look({"b": Evidence(False, None, None, 3, 50)}, 1e-3, 2.0)
    # Closed in between: it begins anew.
    guard.look({"a": SOUND}, 1e-3, 2.0)
    for _ in range(7):
        assert guard.look({"b": Evidence(False, None, None, 3, 50)}, 1e-3, 2.0) is None


def seconded_by(*values: float) -> dict[str, Evidence]:
    return {f"m{n}": Evidence(True, 1.0, 1.0, 100, 50, seconded=value) for n, value in enumerate(values)}


def test_votes_that_nobody_seconds_end_a_run_that_learns_nothing() -> None:
    guard = VoteGuard(unseconded_max=50)
    # A hundred steps whose mean is above nothing, whatever single ones say and whatever the loss does.
    for step in range(200):
        assert guard.look(seconded_by(-0.5 if step % 2 else 0.3, 0.3), 1e-3, 2.0) is None
    reasons = [guard.look(seconded_by(-0.2, 0.1), 1e-3, 2.0) for _ in range(50)]
    first = next(n for n, reason in enumerate(reasons) if reason)
    assert 30 < first < 49 and re.search(r"over 50 steps .* no better than shuffled ones \(-0\.0", str(reasons[first]))


@pytest.mark.parametrize("held_out", [True, False])
def test_a_loss_that_falls_speaks_for_votes_that_nobody_seconds(held_out: bool) -> None:
    guard = VoteGuard(unseconded_max=50)
    for step in range(300):
        if held_out and step % 40 == 0:
            guard.evaluated(2.0 - step / 1000)
        # Where something is held out, what the steps themselves say has no weight.
        assert guard.look(seconded_by(-0.1), 1e-3, 2.0 + (step if held_out else -step) / 1000) is None
    for step in range(100):
        if held_out and step % 40 == 0:
            guard.evaluated(1.75)
        if guard.look(seconded_by(-0.1), 1e-3, 2.0 - step / 1000 if held_out else 1.7) is not None:
            break
    # From the last low on: in the first kind 20 steps before the loop, in the second when half a window is level.
    assert 25 <= step <= 50


def test_without_votes_or_when_told_not_to_nobody_is_asked() -> None:
    for guard, evidence in (
        (VoteGuard(unseconded_max=5), {"a": SOUND}),
        (VoteGuard(unseconded_max=0), seconded_by(-1)),
    ):
        assert not any(guard.look(evidence, 1e-3, 2.0) for _ in range(50))


def test_obedience_is_a_share() -> None:
    wish, noise = torch.randn(8, 400), torch.randn(8, 400)
    for deed, expected in ((wish.sign(), 1.0), (-wish * 3, -1.0), (torch.zeros(8, 400), None)):
        hearing = Hearing(torch.device("cpu"))
        hearing.follow(wish, deed)
        assert hearing.followed.share == (None if expected is None else pytest.approx(expected))
        assert hearing.obeyed.share is None and hearing.followed.deeds == (0 if expected is None else 3200)
    hearing = Hearing(torch.device("cpu"))
    hearing.obey(wish, noise)
    assert hearing.obeyed.share is not None and abs(hearing.obeyed.share) < 0.15


def test_hearings_add_up_are_read_together_and_leave_out_what_is_not_finite() -> None:
    hearings = [Hearing(torch.device("cpu")) for _ in range(2)]
    gradient, votes, order = torch.randn(4, 30), torch.randint(-3, 4, (4, 30)), torch.randperm(30)
    for _ in range(2):
        hearings[0].agree(gradient, votes, order)
        hearings[0].agree(torch.full((4, 30), math.nan), votes, order)
        hearings[1].second(gradient, -votes, order)
    Hearing.read(hearings)
    along = float((gradient.double() * votes).sum())
    square = float(gradient.double().square().sum())
    assert hearings[0].agreement.votes == pytest.approx(-2 * along)
    assert hearings[0].agreement.gradient_square == pytest.approx(2 * square)
    pair = hearings[0].agreement.cosines
    assert pair is not None
    assert pair[0] == pytest.approx(-along / math.sqrt(square * float(votes.double().square().sum())))
    assert hearings[0].seconded.cosines is None and hearings[1].seconded.votes == pytest.approx(2 * along)
    hearings[0].agree(gradient, votes, order)
    assert hearings[0].agreement.votes == pytest.approx(-3 * along)
    hearings[0].begin()
    assert hearings[0].agreement.cosines is None


# -- mutations --------------------------------------------------------------------------------------------------------


def train(trainer: VoteTrainer, steps: int = STEPS) -> Verdict:
    """Steps until one is not sound; its verdict."""
    for _ in range(steps):
        verdict = trainer.step().verdict
        if verdict.kind == "end":
            return verdict
    return verdict


RULES = ("momentum", "compact", "supermajority", "stochastic")


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("peel", [OPEN, PEEL], ids=["open", "peel"])
def test_a_sound_run_goes_on(make: Make, rule: str, peel: LayerPeel, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    seen: list[Evidence] = []
    look = VoteGuard.look

    def noted(self: VoteGuard, evidence: dict[str, Evidence], rate: float, loss: float) -> str | None:
        seen.extend(evidence.values())
        return look(self, evidence, rate, loss)

    monkeypatch.setattr(VoteGuard, "look", noted)
    assert train(make(peel, vote_rule=rule)).kind == "ok"
    assert all(e.heard for e in seen)
    assert min(e.followed for e in seen if e.followed is not None) > 0.9
    obeyed = [e.obeyed for e in seen if e.obeyed is not None]
    assert sum(obeyed) / len(obeyed) > 0.3 and (rule == "stochastic" or min(obeyed) > 0.9)


def dropped_hook(trainer: VoteTrainer, monkeypatch: pytest.MonkeyPatch) -> str:
    wants = GhostGrid.wants_gradient
    name = "model.layers.1.mlp.up_proj.grid"
    monkeypatch.setattr(GhostGrid, "wants_gradient", lambda self: self.name != name and wants(self))
    return name


def inverted_votes(trainer: VoteTrainer, monkeypatch: pytest.MonkeyPatch) -> str:
    vote = GhostGrid._vote
    name = "model.layers.0.self_attn.o_proj.grid"

    def against(self: GhostGrid, gradient: torch.Tensor, *rest: Any) -> None:
        vote(self, -gradient if self.name == name else gradient, *rest)

    monkeypatch.setattr(GhostGrid, "_vote", against)
    return name


def inverted_moves(trainer: VoteTrainer, monkeypatch: pytest.MonkeyPatch) -> str:
    apply = MomentumRule.apply
    name = "model.embed_tokens.grid"

    def against(self: MomentumRule, grid: GhostGrid, *rest: Any) -> tuple[int, int, int]:
        if grid.name == name:
            grid.state.votes.neg_()
        return apply(self, grid, *rest)

    monkeypatch.setattr(MomentumRule, "apply", against)
    return name


def cut_off(trainer: VoteTrainer, monkeypatch: pytest.MonkeyPatch) -> str:
    """As when a checkpointed layer is given an input that asks for no gradient: what is below is not visited."""
    layer = trainer.model.model.layers[1]
    forward = layer.forward
    monkeypatch.setattr(layer, "forward", lambda hidden, *rest, **more: forward(hidden.detach(), *rest, **more))
    return "model.layers.0."


def a_loss_of_something_else(trainer: VoteTrainer, monkeypatch: pytest.MonkeyPatch) -> str:
    """The loss hangs on a bias alone; every matrix is open and none of them matters."""
    import vote_casting

    def other(model: Any, *rest: Any) -> tuple[torch.Tensor, int]:
        _, count = answer_loss(model, *rest)
        return model.model.layers[0].self_attn.q_proj.bias.square().sum() * count, count

    monkeypatch.setattr(vote_casting, "answer_loss", other)
    return "model."


MUTATIONS: list[tuple[Callable[..., str], str]] = [
    (dropped_hook, "no gradient reaches it"),
    (inverted_votes, "votes follow their gradients at -1.000"),
    (inverted_moves, "weights follow their votes at -1.000"),
    (cut_off, "no gradient reaches it"),
    (a_loss_of_something_else, "no gradient reaches it"),
]


@pytest.mark.parametrize(("mutate", "words"), MUTATIONS, ids=lambda m: getattr(m, "__name__", None))
@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_broken_link_ends_the_run_by_name(
    make: Make,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
    mutate: Callable[..., str],
    words: str,
    checkpointing: bool,
) -> None:
    trainer = make(OPEN, gradient_checkpointing=checkpointing)
    name = mutate(trainer, monkeypatch)
    verdict = train(trainer)
    assert verdict.kind == "end" and verdict.reason.startswith(name) and words in verdict.reason
    assert trainer.done == VoteGuard.patience


@pytest.mark.parametrize(("rule", "count"), [("momentum", 3), ("compact", 3), ("momentum", 1)])
def test_votes_of_noise_are_seconded_by_nobody(
    make: Make,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
    rule: str,
    count: int,
) -> None:
    """Gradients of the right sizes in places drawn anew for each micro-batch: every link of the chain holds."""
    accept = GhostGrid.accept
    means, verdicts = [], []
    for noise in (False, True):
        trainer = make(OPEN, vote_rule=rule, grad_accum=count, steps=400, lr=1e-3)
        assert trainer.watch is not None
        trainer.watch.guard.unseconded_max = 40

        def shuffled(grid: GhostGrid, gradient: torch.Tensor, *rest: Any) -> None:
            place = f"{trainer.done} {trainer.ballot.micro_batch} {grid.name}"  # noqa: B023
            random = torch.Generator().manual_seed(zlib.crc32(place.encode()))
            accept(grid, gradient[:, torch.randperm(gradient.shape[1], generator=random)], *rest)

        seconded = []
        with monkeypatch.context() as patched:
            if noise:
                patched.setattr(GhostGrid, "accept", shuffled)
            for _ in range(400 if noise else 60):
                # No new low: what is left to say is whether votes are seconded.
                trainer.watch.guard.evaluated(2.0)
                result = trainer.step()
                if result.seconded is not None:
                    seconded.append(result.seconded)
                if result.verdict.kind == "end":
                    break
        assert len(seconded) >= trainer.done - 1
        means.append(sum(seconded) / len(seconded))
        verdicts.append(result.verdict)
    assert means[0] > 0.01 and abs(means[1]) < means[0] / 3
    assert verdicts[0].kind == "ok" and verdicts[1].kind == "end"
    assert "no better than shuffled" in verdicts[1].reason and trainer.done > 40


def test_watching_changes_no_bit(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    hashes = []
    for listening in (True, False):
        trainer = make(OPEN)
        trainer.ballot.listening = listening
        if not listening:
            monkeypatch.setattr(VoteGuard, "look", lambda self, evidence, rate, loss: None)
        train(trainer, 5)
        hashes.append([grid.indices.sum().item() for grid in trainer.grids.values()])
        hashes[-1] += [grid.state.votes.long().sum().item() for grid in trainer.grids.values()]
    assert hashes[0] == hashes[1] and isinstance(trainer.grids["model.embed_tokens.grid"], GhostGrid)

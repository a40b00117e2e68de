"""Silent failure: every way in which votes can go nowhere is made here, in the real trainer, and has to be noticed."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from test_night_watch import PEEL, Make, checkpoints, make, texts  # noqa: F401  fixtures

import ghost_core
from ghost_core import GhostGrid, Obedience
from night_shift import LayerPeel, Verdict
from qwen_prime_wrapper import answer_loss
from vote_guard import Evidence, VoteGuard
from vote_rules import MomentumRule
from vote_trainer import VoteTrainer

pytestmark = pytest.mark.usefixtures("one_thread")

OPEN = LayerPeel.parse("none", None)
SOUND = Evidence(heard=True, followed=1.0, obeyed=1.0, flips=100)
STEPS = 12


# -- counting ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("evidence", "limit", "words"),
    [
        (Evidence(False, None, 1.0, 5), 8, "no gradient reaches it"),
        (Evidence(True, -1.0, 1.0, 5), 8, r"votes follow their gradients at -1\.000"),
        (Evidence(True, 0.0, 1.0, 5), 8, r"votes follow their gradients at 0\.000"),
        (Evidence(True, 1.0, -1.0, 5), 8, r"weights follow their votes at -1\.000"),
        (Evidence(True, 1.0, None, 0), 64, "not one of its weights moves"),
        (Evidence(True, None, None, 3), 64, "no votes are cast"),
    ],
)
def test_a_fault_ends_the_run_when_it_lasts(evidence: Evidence, limit: int, words: str) -> None:
    guard = VoteGuard()
    for _ in range(limit - 1):
        assert guard.look({"good": SOUND, "bad": evidence}, 1e-3) is None
    reason = guard.look({"good": SOUND, "bad": evidence}, 1e-3)
    assert reason is not None and reason.startswith("bad: ")
    assert re.search(words, reason)


@pytest.mark.parametrize("evidence", [Evidence(False, None, 1.0, 5), Evidence(True, 1.0, None, 0)])
def test_one_sound_step_and_the_count_begins_again(evidence: Evidence) -> None:
    guard = VoteGuard(patience=5, idle_max=5)
    for _ in range(20):
        for _ in range(4):
            assert guard.look({"bad": evidence}, 1e-3) is None
        assert guard.look({"bad": SOUND}, 1e-3) is None


def test_shares_count_by_their_mean() -> None:
    guard = VoteGuard()
    for step in range(100):
        assert guard.look({"noisy": Evidence(True, 1.0, -0.5 if step % 3 == 0 else 0.6, 4)}, 1e-3) is None
    reasons = [guard.look({"noisy": Evidence(True, 1.0, -0.3, 4)}, 1e-3) for _ in range(8)]
    assert reasons[-1] is not None and "weights follow" in reasons[-1]


def test_what_is_sound_or_expected_does_not_count() -> None:
    guard = VoteGuard()
    resting = Evidence(True, 1.0, None, 0)
    sparse = Evidence(True, 1.0, None, 3)
    for _ in range(200):
        assert guard.look({"a": SOUND, "b": sparse}, 1e-3) is None
        assert guard.look({"a": SOUND, "b": resting}, 0.0) is None
    for _ in range(7):
        guard.look({"b": Evidence(False, None, None, 3)}, 1e-3)
    # Closed in between: it begins anew.
    guard.look({"a": SOUND}, 1e-3)
    for _ in range(7):
        assert guard.look({"b": Evidence(False, None, None, 3)}, 1e-3) is None


def test_obedience_is_a_share() -> None:
    wish, noise = torch.randn(8, 400), torch.randn(8, 400)
    for deed, expected in ((wish.sign(), 1.0), (-wish * 3, -1.0), (torch.zeros(8, 400), None)):
        obedience = Obedience()
        obedience.add(wish, deed)
        assert obedience.share == (None if expected is None else pytest.approx(expected))
    obedience = Obedience()
    obedience.add(wish, noise)
    assert obedience.share is not None and abs(obedience.share) < 0.15


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

    def noted(self: VoteGuard, evidence: dict[str, Evidence], rate: float) -> str | None:
        seen.extend(evidence.values())
        return look(self, evidence, rate)

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
    import vote_trainer

    def other(model: Any, *rest: Any) -> tuple[torch.Tensor, int]:
        _, count = answer_loss(model, *rest)
        return model.model.layers[0].self_attn.q_proj.bias.square().sum() * count, count

    monkeypatch.setattr(vote_trainer, "answer_loss", other)
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


def test_watching_changes_no_bit(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    hashes = []
    for listening in (True, False):
        trainer = make(OPEN)
        trainer.ballot.listening = listening
        if not listening:
            monkeypatch.setattr(VoteGuard, "look", lambda self, evidence, rate: None)
        train(trainer, 5)
        hashes.append([grid.indices.sum().item() for grid in trainer.grids.values()])
        hashes[-1] += [grid.state.votes.long().sum().item() for grid in trainer.grids.values()]
    assert hashes[0] == hashes[1] and isinstance(trainer.grids["model.embed_tokens.grid"], ghost_core.GhostGrid)

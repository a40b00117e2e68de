"""Vote rules by name, as commands and checkpoints call them."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

from ballots import RuleError, VoteRule
from momentum_rules import CompactRule, MomentumRule
from whisper_rules import StochasticRule, SupermajorityRule

RULES: dict[str, type[VoteRule]] = {
    rule.name: rule for rule in (MomentumRule, CompactRule, SupermajorityRule, StochasticRule)
}
DEFAULT = MomentumRule.name


def rule_named(name: str, **changes: Any) -> VoteRule:
    """The rule of that name; ``changes`` are hyperparameters, None where the rule's own default holds.

    Raises:
        RuleError: unknown name, a hyperparameter that the rule does not have, or a value that it refuses.
    """
    if name not in RULES:
        raise RuleError(f"unknown vote rule {name!r}, expected one of {', '.join(RULES)}")
    given = {key: value for key, value in changes.items() if value is not None}
    if unknown := sorted(set(given) - {f.name for f in fields(RULES[name])}):
        raise RuleError(f"rule {name} has no {', '.join(unknown)}")
    return replace(RULES[name](), **given)

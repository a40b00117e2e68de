"""Results of many runs as one table: each method at its best learning rate, beside an AdamW at its own.

A method that moves weights less forgets less and learns less, so forgetting is also compared at equal target loss: over
rising learning rates the points (target loss, forgetting) form a curve that begins at (loss before, 0); both methods'
curves are read, by straight lines between points, at the lowest target loss that both reach. Forgetting begins slower
than linearly, so the first line of a curve, from the start to its lowest learning rate, reads high: a comparison that
uses one is marked with ``~`` and wants a lower learning rate on that curve before it counts. A best rate that is the
highest tried is marked with ``^``: the method might do better still.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from quality_tasks import BASELINE, METHODS, TASKS


@dataclass(frozen=True)
class Summary:
    """A method on a task at its best learning rate; losses in nats per token, means over seeds.

    ``forgetting`` is the rise of the source loss. ``*_ratio`` are against the baseline at its own best rate.
    ``equal_*`` are read off both curves over learning rates at ``equal_target``, the lowest target loss that both
    reach. None where there is nothing to compare with.
    """

    task: str
    method: str
    bytes_per_parameter: float
    lr: float
    target: float
    targets: tuple[float, ...]
    source: float
    sources: tuple[float, ...]
    forgetting: float
    rates: int
    highest: bool = False
    """Whether ``lr`` is the highest rate tried."""
    target_ratio: float | None = None
    forgetting_ratio: float | None = None
    equal_target: float | None = None
    equal_forgetting: float | None = None
    equal_ratio: float | None = None
    equal_rough: bool = False
    """Whether ``equal_target`` lies on the first line of either curve."""


def forgetting_at(curve: Sequence[tuple[float, float]], target: float) -> float | None:
    """Forgetting where a curve of (target loss, forgetting) points first comes down to ``target``, between points by
    straight lines; None where it never does."""
    for (high, first), (low, second) in itertools.pairwise(curve):
        if high >= target >= low:
            return first if high == low else first + (second - first) * (high - target) / (high - low)
    return None


def _by_rate(results: Sequence[Mapping[str, Any]]) -> dict[float, list[Mapping[str, Any]]]:
    """Lines by rising learning rate, each in order of seeds, the last of a seed winning; rates with a loss that is not
    finite are left out."""
    rates: dict[float, dict[int, Mapping[str, Any]]] = {}
    for line in results:
        rates.setdefault(line["lr"], {})[line["seed"]] = line
    return {
        rate: [seeds[s] for s in sorted(seeds)]
        for rate, seeds in sorted(rates.items())
        if all(x["target_after"] is not None is not x["source_after"] for x in seeds.values())
    }


def _best_rate(rates: Mapping[float, Sequence[Mapping[str, Any]]]) -> float:
    """The rate of the lowest mean target loss over the seeds that all rates have: a further seed at some of them only
    must not decide between them."""
    common = set.intersection(*({x["seed"] for x in lines} for lines in rates.values()))
    shared = {rate: [x for x in lines if x["seed"] in common] or lines for rate, lines in rates.items()}
    return min(shared, key=lambda rate: _mean(shared[rate], "target_after"))


def _mean(lines: Sequence[Mapping[str, Any]], key: str) -> float:
    return sum(line[key] for line in lines) / len(lines)


def curve_of(results: Sequence[Mapping[str, Any]]) -> list[tuple[float, float]]:
    """(target loss, forgetting) of one method on one task over rising learning rates, means over seeds, in nats per
    token; first the start, at which nothing is forgotten."""
    rates = _by_rate(results)
    if not rates:
        return []
    start = next(iter(rates.values()))
    points = [(_mean(x, "target_after"), _mean(x, "source_after") - _mean(x, "source_before")) for x in rates.values()]
    return [(_mean(start, "target_before"), 0.0), *points]


def summary(results: Iterable[Mapping[str, Any]], steps: int | None = None, baseline: str = BASELINE) -> list[Summary]:
    """One line per task and method, in the order of ``TASKS`` and ``METHODS``, names unknown to them last.

    Args:
        results: lines of a results file; those of another number of steps than their task's (or ``steps``) are left
            out.
        baseline: the method that the others are compared with.
    """
    groups: dict[tuple[str, str], list[Mapping[str, Any]]] = {}
    for line in results:
        task = TASKS.get(line["task"])
        if line["steps"] == (steps or (task.steps if task else line["steps"])):
            groups.setdefault((line["task"], line["method"]), []).append(line)
    places = [*TASKS], [*METHODS]

    def order(key: tuple[str, str]) -> tuple[int, ...]:
        return tuple(p.index(k) if k in p else len(p) for k, p in zip(key, places, strict=True))

    rows: list[Summary] = []
    for name, method in sorted(groups, key=order):
        rates = _by_rate(groups[name, method])
        if not rates:
            continue
        rate = _best_rate(rates)
        best = rates[rate]
        row = Summary(
            task=name,
            method=method,
            bytes_per_parameter=_mean(best, "bytes_per_parameter"),
            lr=rate,
            target=_mean(best, "target_after"),
            targets=tuple(x["target_after"] for x in best),
            source=_mean(best, "source_after"),
            sources=tuple(x["source_after"] for x in best),
            forgetting=_mean(best, "source_after") - _mean(best, "source_before"),
            rates=len(rates),
            highest=rate == max(tried := {x["lr"] for x in groups[name, method]}) and len(tried) > 1,
        )
        rows.append(_against_baseline(row, curve_of(groups[name, method]), groups.get((name, baseline), [])))
    return rows


def _against_baseline(
    row: Summary, mine: Sequence[tuple[float, float]], baseline: Sequence[Mapping[str, Any]]
) -> Summary:
    theirs = curve_of(baseline)
    if not theirs:
        return row
    target, forgetting = min(theirs[1:])
    equal = max(min(mine)[0], min(theirs)[0])
    here, there = forgetting_at(mine, equal), forgetting_at(theirs, equal)
    return replace(
        row,
        target_ratio=row.target / target,
        forgetting_ratio=row.forgetting / forgetting if forgetting > 0 else None,
        equal_target=equal,
        equal_forgetting=here,
        equal_ratio=here / there if here is not None and there is not None and there > 0 else None,
        equal_rough=any(equal > curve[1][0] for curve in (mine, theirs)),
    )


COLUMNS = (
    "task",
    "method",
    "bytes / parameter",
    "best lr (of)",
    "held-out loss (seeds)",
    "source loss (seeds)",
    "forgetting",
    "loss / baseline's",
    "forgetting / baseline's",
    "the same at equal loss",
)


def cells(row: Summary) -> tuple[str, ...]:
    """A summary line as text, one string for each of ``COLUMNS``."""

    def ratio(value: float | None, digits: int = 2) -> str:
        return "-" if value is None else f"{value:.{digits}f}"

    def seeds(values: Sequence[float]) -> str:
        return ", ".join(f"{v:.4f}" for v in values)

    equal = f"{'~' * row.equal_rough}{ratio(row.equal_ratio)} at {row.equal_target:.4f}" if row.equal_target else "-"
    return (
        row.task,
        row.method,
        f"{row.bytes_per_parameter:.2f}",
        f"{row.lr:g}{'^' * row.highest} ({row.rates})",
        f"{row.target:.4f} ({seeds(row.targets)})",
        f"{row.source:.4f} ({seeds(row.sources)})",
        f"{row.forgetting:+.4f}",
        ratio(row.target_ratio, 4),
        ratio(row.forgetting_ratio),
        equal,
    )


def markdown(rows: Iterable[Summary]) -> str:
    """The summary as a markdown table."""
    lines = [COLUMNS, ("---",) * len(COLUMNS), *map(cells, rows)]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)

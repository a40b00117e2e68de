"""What a run is at this moment, in the words that both monitors show: a pure function of what was read and the time.

**Phases.** *Stabilization*: the head alone is open. *Layer peel*: layers open from the top down, or a window of them
rolls. *Crystallization*: everything is open. Which layers are open is the plan's word (``phases`` in config.json, a
function of the step), for runs without it the number that the last step recorded.

**State.** The events say how a run ended: ``end``, ``signal``, ``failed``. Where they say nothing, the process that
wrote the last ``start`` is asked for; where that is on another machine, only silence is left: longer than twenty steps
usually take, and than two minutes, is stale. So "crashed" is known and "stale" is a suspicion, and the text says which.
"""

from __future__ import annotations

import math
import time
from bisect import bisect_right
from typing import Any, Literal, NamedTuple

from harmless_text import harmless
from prime_telemetry import is_alive
from run_reader import HEAD, Evaluation, Run, depth, number, whole

State = Literal["waiting", "running", "finished", "stopped", "crashed", "stale"]
PHASES = {"head": "stabilization", "peeling": "layer peel", "window": "layer peel", "all open": "crystallization"}
RECENT = 50
"""Steps by which pace, loss and trend are judged."""
OPENED_FOR = 15
"""Steps for which an unlocked layer counts as just opened."""
SILENCE, SILENT_STEPS = 120.0, 20
"""Seconds and steps without a line after which a run is stale."""


class Layer(NamedTuple):
    """A layer, or the head; numbers of the last step, None where they are not known."""

    name: str
    state: Literal["open", "opened", "locked"]
    opens_at: int | None
    """The first step, counted from 1, of a layer that is locked and planned to open."""
    flips: int | None
    flip_rate: float | None
    movement: float | None
    pressure: float | None
    agreement: float | None
    control: float | None
    heat: float | None
    """The governor's brake: below 1, else None."""


class Entry(NamedTuple):
    """An event, as a line of text."""

    step: int | None
    timestamp: float | None
    kind: str
    level: Literal["info", "good", "unlock", "warning", "error"]
    text: str


class Summary(NamedTuple):
    """Everything but the curves. Times are seconds since 1970 or seconds, losses nats a token, None: not known."""

    name: str
    folder: str
    state: State
    how: str
    """How the state is known."""
    step: int
    steps: int | None
    updated: float | None
    """When the last line was written."""
    pace: float | None
    """Seconds a step takes, evaluation and saving included."""
    eta: float | None
    """Seconds left."""
    phase: str
    phase_detail: str
    next_step: int | None
    next_layers: tuple[str, ...]
    next_closed: tuple[str, ...]
    next_eta: float | None
    layers: list[Layer]
    loss: float | None
    """Mean of the last steps."""
    trend: float | None
    """Change of the loss in 100 steps."""
    val_loss: float | None
    val_step: int | None
    first_val_loss: float | None
    """Of the evaluation before the first step."""
    best: float | None
    best_step: int | None
    agreement: float | None
    control: float | None
    flip_rate: float | None
    flips: int | None
    tokens: int | None
    tokens_per_s: float | None
    waiting: float | None
    """Share of the time that was spent waiting for data."""
    memory: int | None
    memory_total: int | None
    rate: float | None
    data: str
    """Where in its data the run is; empty where it does not say."""
    saved_step: int | None
    saved_at: float | None
    saved_best: bool
    reading: float
    """Share of the telemetry that is still to be read."""
    settings: list[tuple[str, str]]
    unlocks: list[tuple[int, str]]
    """(step, layers) that opened or are planned to, for marks in a picture."""
    events: list[Entry]


def _known(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _count(value: float) -> int | None:
    return round(value) if math.isfinite(value) else None


# -- state ------------------------------------------------------------------------------------------------------------


def _last(run: Run, *kinds: str) -> dict[str, Any] | None:
    return next((e for e in reversed(run.events) if e.get("event") in kinds), None)


def state_of(run: Run, now: float, pace: float | None) -> tuple[State, str]:
    """The state of a run, and how it is known."""
    if run.events_behind:
        return "waiting", "its events are still being read"
    start = _last(run, "start")
    if start is None and not run.history:
        return (
            "waiting",
            "config.json is there, no step yet" if run.config else f"nothing in {harmless(run.folder, 300)} yet",
        )
    since: list[dict[str, Any]] = []
    for event in reversed(run.events):
        if event is start:
            break
        since.append(event)
    for event in since:
        # A signal is followed by an end of its own.
        if event.get("event") == "failed":
            return "crashed", f"it said: {harmless(event.get('reason', 'failed'), 300)}"
        if event.get("event") == "signal":
            return "stopped", f"by {harmless(event.get('signal', 'a signal'), 20)}; --resume goes on"
    if any(event.get("event") == "end" for event in since):
        return "finished", "the run wrote its end"
    process = start.get("process") if start else None
    process = process if isinstance(process, dict) else {}
    alive = is_alive(process)
    if alive is False:
        return "crashed", f"process {process.get('pid')} is gone without a word; --resume goes on"
    silent = now - (_updated(run) or now)
    if silent > max(SILENCE, SILENT_STEPS * (pace or 0.0)):
        where = f"process {process.get('pid')} still lives" if alive else "its process cannot be seen from here"
        return "stale", f"no line for {duration(silent)}; {where}"
    if not run.history:
        return "waiting", "started, before its first step"
    return "running", f"process {process.get('pid')}" if alive else "lines keep coming"


def _updated(run: Run) -> float | None:
    times = [run.history.value("timestamp")] + [number(e.get("timestamp")) for e in (*run.events,)[-1:]]
    return max((t for t in times if t == t), default=None)


def _pace(run: Run) -> float | None:
    """Mean seconds between the lines of the last steps, of the present process only."""
    start = _last(run, "start")
    since = number(start.get("timestamp")) if start else math.nan
    times = [(step, t) for step, t in run.history.known("timestamp")[-RECENT:] if not t < since]
    if len(times) > 1 and times[-1][0] > times[0][0] and times[-1][1] > times[0][1]:
        return (times[-1][1] - times[0][1]) / (times[-1][0] - times[0][0])
    return _known(run.history.value("seconds"))


# -- layers -----------------------------------------------------------------------------------------------------------


class _Plan(NamedTuple):
    """The planned phases, checked: before which step (from 0) which layers are open."""

    begins: list[int]
    open: list[tuple[str, ...]]
    names: list[str]

    def at(self, done: int) -> int:
        """The entry that holds after so many steps."""
        return max(0, bisect_right(self.begins, done) - 1)


def _plan(run: Run) -> _Plan | None:
    entries = run.config.get("phases")
    if not isinstance(entries, list):
        return None
    begins: list[int] = []
    layers, names = [], []
    for entry in entries:
        step = whole(entry.get("step")) if isinstance(entry, dict) else None
        opened = entry.get("open") if isinstance(entry, dict) else None
        if step is None or not isinstance(opened, list) or (begins and step <= begins[-1]):
            return None
        begins.append(step)
        layers.append(tuple(str(n) for n in opened if whole(n) is not None))
        names.append(str(entry.get("phase", "")))
    return _Plan(begins, layers, names) if begins else None


def _layer_names(run: Run) -> list[str]:
    """All layers, the head first, then from the top down."""
    found = set(run.weights) | {name for known in run.history.layers.values() for name in known}
    return sorted(found, key=depth)


def _open_now(run: Run, plan: _Plan | None, names: list[str], done: int) -> set[str]:
    if plan is not None:
        return {HEAD, *plan.open[plan.at(done)]}
    layers = [name for name in names if name != HEAD]
    count = whole(run.history.last.get("thawed_layers"))
    return {HEAD, *(layers if count is None else layers[:count])}


def _layers(run: Run, plan: _Plan | None, done: int, ended: bool) -> list[Layer]:
    names = _layer_names(run)
    now = _open_now(run, plan, names, done)
    fresh: set[str] = set()
    if plan is not None and not ended:
        entry = plan.at(done)
        if entry and done - plan.begins[entry] < OPENED_FOR:
            fresh = set(plan.open[entry]) - set(plan.open[entry - 1])
    weights, heats = run.weights, run.history.last.get("governor")
    heats = heats if isinstance(heats, dict) else {}

    def last(quantity: str, name: str) -> float | None:
        column = run.history.layers[quantity].get(name)
        return _known(column[-1]) if column else None

    layers = []
    for name in names:
        rate, heat = last("flip_rate", name), number(heats.get(name))
        layers.append(
            Layer(
                name=name,
                state="opened" if name in fresh else "open" if name in now else "locked",
                opens_at=None if plan is None or name in now else _opens_at(plan, name, done),
                flips=round(rate * weights[name]) if rate is not None and weights.get(name, 0) > 0 else None,
                flip_rate=rate,
                movement=last("movement", name),
                pressure=last("vote_pressure", name),
                agreement=last("agreement", name),
                control=last("agreement_control", name),
                heat=heat if heat < 1 else None,
            )
        )
    return layers


def _opens_at(plan: _Plan, name: str, done: int) -> int | None:
    later = zip(plan.begins, plan.open, strict=True)
    return next((step + 1 for step, layers in later if step > done and name in layers), None)


def _phase(run: Run, plan: _Plan | None, layers: list[Layer], done: int) -> tuple[str, str]:
    if not layers:
        return "", ""
    count = sum(layer.name != HEAD for layer in layers)
    opened = sum(layer.name != HEAD and layer.state != "locked" for layer in layers)
    raw = plan.names[plan.at(done)] if plan else str(run.history.last.get("peel_phase", ""))
    name = PHASES.get(raw, "")
    if raw == "window":
        return name, f"a window of {opened} of {count} layers is open"
    detail = {"stabilization": "the head alone is open", "crystallization": f"all {count} layers are open"}
    return name, detail.get(name, f"{opened} of {count} layers are open")


# -- the rest ---------------------------------------------------------------------------------------------------------


def _trend(points: list[tuple[int, float]]) -> float | None:
    """Slope of a straight line through the points, for 100 steps."""
    if len(points) < 5:
        return None
    mean_x = sum(x for x, _ in points) / len(points)
    mean_y = sum(y for _, y in points) / len(points)
    below = sum((x - mean_x) ** 2 for x, _ in points)
    return 100 * sum((x - mean_x) * (y - mean_y) for x, y in points) / below if below else None


def _data(last: dict[str, Any]) -> str:
    data = last.get("data")
    parts = []
    if isinstance(data, dict):
        for name in ("epoch", "block"):
            if (value := whole(data.get(name))) is not None:
                parts.append(f"{name} {value:,}")
        row, rows = whole(data.get("row")), whole(data.get("rows"))
        if row is not None:
            parts.append(f"row {row:,}" + (f" of {rows:,}" if rows else ""))
    return ", ".join(parts)


_SHOWN = ("vote_rule", "lr", "grad_accum", "batch_size", "seq_len", "peel", "peel_window", "seed", "device")


def _settings(config: dict[str, Any]) -> list[tuple[str, str]]:
    return [(n.replace("_", " "), harmless(config[n], 60)) for n in _SHOWN if config.get(n) is not None]


def names_of(layers: Any) -> str:
    """Layers as text: ``5 and 4``; runs of three and more as ``27 to 20``."""
    numbers = sorted((int(n) for n in layers), reverse=True)
    parts: list[str] = []
    while numbers:
        length = next((i for i in range(1, len(numbers)) if numbers[i] != numbers[0] - i), len(numbers))
        parts += [f"{numbers[0]} to {numbers[length - 1]}"] if length > 2 else [str(n) for n in numbers[:length]]
        numbers = numbers[length:]
    return " and ".join([", ".join(parts[:-1]), parts[-1]] if len(parts) > 1 else parts)


def _entry(event: dict[str, Any]) -> Entry:
    """An event as text; of kinds that are not known here all fields are shown."""
    kind = harmless(event.get("event", "event"), 40)
    fields = {k: v for k, v in event.items() if k not in ("event", "step", "timestamp", "process")}

    def said(name: str) -> str:
        return " ".join(harmless(fields.get(name, "?"), 300).split())

    def numbered(name: str) -> str:
        value = fields.get(name)
        return names_of([n for n in value if whole(n) is not None]) if isinstance(value, list) else ""

    level: Any = "info"
    if kind == "start":
        text = f"started from {said('checkpoint').rpartition('/')[2]}"
    elif kind == "evaluation":
        text = f"held-out loss {number(fields.get('val_loss')):.4f} before the first step"
    elif kind == "peel":
        opened, closed = numbered("opened"), numbered("closed")
        level = "unlock"
        parts = [f"opened {opened}"] if opened else []
        parts += [f"closed {closed}"] if closed else []
        text = f"layers {', '.join(parts)}" if parts else f"phase: {PHASES.get(said('phase'), said('phase'))}"
    elif kind == "save":
        best = fields.get("best") is True
        level = "good" if best else "info"
        text = f"saved {said('path').rpartition('/')[2]}" + (", the best so far" if best else "")
    elif kind == "out_of_memory":
        level, text = "warning", f"out of memory ({said('where')}): {said('from')} -> {said('to')}"
    elif kind == "cuda_graphs":
        level, text = "warning", f"recording of micro-batches {said('state')}: {said('reason')}"
    elif kind in ("spike", "non_finite"):
        level, text = "warning", f"{kind.replace('_', ' ')}: {said('reason')}"
    elif kind == "roll_back":
        level = "error"
        text = f"rolled back to step {said('to')}, rate x {said('rate')}: {said('reason')}"
    elif kind == "governor":
        measured, limit = number(fields.get("measured")), number(fields.get("limit"))
        level, text = "warning", f"layer {said('layer')} braked: {measured:.2g}, limit {limit:.2g}"
    elif kind == "core_eval":
        scores = fields.get("scores")
        pairs = {k: v for k, v in scores.items() if "." not in k} if isinstance(scores, dict) else {}
        counts = [
            f"{harmless(k, 40)} {v[0]} of {v[1]}" for k, v in pairs.items() if isinstance(v, list) and len(v) == 2
        ]
        text = harmless(f"evaluated: {', '.join(counts)}", 200)
    elif kind == "left_out":
        level, text = "warning", f"no memory for the {said('what')}, left out"
    elif kind == "signal":
        level, text = "warning", f"stopped by {said('signal')}"
    elif kind == "failed":
        level, text = "error", f"failed: {said('reason')}"
    elif kind == "end":
        level, text = "good", f"ended: {said('path').rpartition('/')[2]}"
    else:
        text = ": ".join([kind.replace("_", " "), ", ".join(f"{harmless(k, 40)} {said(k)}" for k in fields)])
    return Entry(whole(event.get("step")), _known(number(event.get("timestamp"))), kind, level, text)


def _unlocks(run: Run, plan: _Plan | None) -> list[tuple[int, str]]:
    """First steps (from 1) with newly opened layers: those of the plan, without one those that events tell of."""
    if plan is not None:
        pairs = zip(plan.begins[1:], plan.open, plan.open[1:], strict=False)
        return [(step + 1, names_of(set(new) - set(old))) for step, old, new in pairs if set(new) - set(old)]
    found = []
    for event in run.events:
        step, opened = whole(event.get("step")), event.get("opened")
        layers = [n for n in opened if whole(n) is not None] if isinstance(opened, list) else []
        if event.get("event") == "peel" and step is not None and layers:
            found.append((step, names_of(layers)))
    return found


def summarize(run: Run, now: float | None = None, events: int = 100) -> Summary:
    """The present of a run; ``now``: seconds since 1970, by default the clock's."""
    now = time.time() if now is None else now
    history, last = run.history, run.history.last
    pace = _pace(run)
    state, how = state_of(run, now, pace)
    start = _last(run, "start")
    done = history.steps[-1] if history else (whole(start.get("step")) or 0 if start else 0)
    steps = whole(run.config.get("steps"))
    plan = _plan(run)
    layers = _layers(run, plan, done, ended=state in ("finished", "stopped", "crashed"))
    phase, detail = _phase(run, plan, layers, done)
    upcoming = plan.at(done) + 1 if plan else 0
    planned = plan is not None and state in ("waiting", "running", "stale") and upcoming < len(plan.begins)
    next_step, opening, closing = None, set(), set()
    if plan is not None and planned:
        next_step = plan.begins[upcoming]
        opening = set(plan.open[upcoming]) - set(plan.open[upcoming - 1])
        closing = set(plan.open[upcoming - 1]) - set(plan.open[upcoming])
    losses = history.known("loss", max(0, len(history) - RECENT))
    recent = [v for _, v in losses[-20:]]
    held_out = history.known("val_loss")
    first = _known(number((_last(run, "evaluation") or {}).get("val_loss")))
    held_out += [] if first is None else [(0, first)]
    best = min(held_out, key=lambda point: point[1], default=None)
    latest = max(held_out, key=lambda point: point[0], default=None)
    seconds, waited = history.value("seconds"), history.value("data_seconds")
    rate = _known(history.value("flip_rate"))
    save = _last(run, "save")
    return Summary(
        name=_name(run),
        folder=harmless(run.folder, 300),
        state=state,
        how=how,
        step=done,
        steps=steps,
        updated=_updated(run),
        pace=pace,
        eta=(steps - done) * pace if state == "running" and steps is not None and pace is not None else None,
        phase=phase,
        phase_detail=detail,
        next_step=None if next_step is None else next_step + 1,
        next_layers=tuple(sorted(opening, key=depth)),
        next_closed=tuple(sorted(closing, key=depth)),
        next_eta=(next_step - done) * pace if next_step is not None and pace is not None else None,
        layers=layers,
        loss=sum(recent) / len(recent) if recent else None,
        trend=_trend(losses),
        val_loss=latest[1] if latest else None,
        val_step=latest[0] if latest else None,
        first_val_loss=first,
        best=best[1] if best else None,
        best_step=best[0] if best else None,
        agreement=_known(history.value("agreement")),
        control=_known(history.value("agreement_control")),
        flip_rate=rate,
        flips=_count(history.value("flips")),
        tokens=_count(history.value("tokens")),
        tokens_per_s=_known(history.value("tokens_per_s")),
        # A step's seconds hold those in which it waited.
        waiting=min(1.0, waited / seconds) if seconds > 0 and waited >= 0 else None,
        memory=_count(history.value("mem_peak_bytes")),
        memory_total=whole(run.config.get("memory_total_bytes")),
        rate=_known(history.value("lr")),
        data=_data(last),
        saved_step=whole(save.get("step")) if save else None,
        saved_at=_known(number(save.get("timestamp"))) if save else None,
        saved_best=bool(save and save.get("best") is True),
        reading=run.behind,
        settings=_settings(run.config),
        unlocks=_unlocks(run, plan),
        events=[_entry(e) for e in (*run.events,)[-events:]],
    )


def _name(run: Run) -> str:
    """The model's name, of the checkpoint that the run started from."""
    checkpoint = harmless(run.config.get("checkpoint", ""), 300).replace("\\", "/").rpartition("/")[2]
    return checkpoint.removesuffix(".pt").partition("_prime_")[0] or run.folder.resolve().name


def sample_steps(run: Run) -> list[int]:
    """Steps of which there are samples."""
    return sorted({step for step, _ in run.samples})


def samples_at(run: Run, step: int) -> list[dict[str, str]]:
    """Samples of a step: ``prompt``, ``text`` and ``reference``, harmless."""
    found = [sample for (at, _), sample in run.samples.items() if at == step]
    return [{name: harmless(s.get(name, "")) for name in ("prompt", "text", "reference")} for s in found]


def score_table(evaluations: list[Evaluation]) -> tuple[list[str], list[tuple[int | None, list[str]]]]:
    """Columns, and for each step with an evaluation its scores as text in that order, empty where it has none. Columns
    bear the names of scores, with the evaluation's name in front where several names use one. Parts of a score that is
    there (``suite.code`` beside ``suite``) are left to the report."""
    users: dict[str, set[str]] = {}
    for e in evaluations:
        for name in e.scores:
            users.setdefault(name, set()).add(e.name)
    columns: dict[str, None] = {}
    rows: dict[int | None, dict[str, str]] = {}
    for e in evaluations:
        for name, score in e.scores.items():
            if name.rpartition(".")[0] in e.scores:
                continue
            column = harmless(f"{e.name} {name}" if len(users[name]) > 1 else name, 60)
            columns[column] = None
            rows.setdefault(e.step, {})[column] = score_text(score)
    return list(columns), [(step, [cells.get(c, "") for c in columns]) for step, cells in rows.items()]


def score_text(score: float | tuple[int, int] | None) -> str:
    """A score as text: ``0.7512``, ``12 / 20 (60%)``, a dash for None."""
    if score is None:
        return "-"
    if isinstance(score, tuple):
        passed, total = score
        return f"{passed} / {total}" + (f" ({100 * passed / total:.0f}%)" if total else "")
    return f"{score:.5g}"


def duration(seconds: float | None) -> str:
    """``48 s``, ``3 min 20 s``, ``5 h 07 min``, ``2 d 3 h``; a dash for None."""
    if seconds is None or not math.isfinite(seconds):
        return "-"
    total = max(0, round(seconds))
    if total < 60:
        return f"{total} s"
    if total < 3600:
        return f"{total // 60} min {total % 60:02d} s"
    if total < 86400:
        return f"{total // 3600} h {total % 3600 // 60:02d} min"
    return f"{total // 86400} d {total % 86400 // 3600} h"

"""Follow the telemetry of a run: growing files to columns in memory, and columns to as many points as a screen has.

A reader comes at any moment: before the first line, in the middle of a write, after a crash, after somebody cut or
replaced a file, a hundred thousand steps late. So a file is read from where the last look ended, whole lines only, and
from its beginning where what was read is no longer there (another file, a shorter one, other bytes before the place).
What is not a JSON object is passed over; numbers that are missing or not finite are NaN. After a return to an earlier
checkpoint, or a resume, steps are counted again from there: lines of later steps then describe a past that did not
happen, and are dropped with the first line that goes back; samples and evaluations of such steps with the event that
tells of the return.

Columns are arrays of the standard library (eight bytes a number of the run, four a number of a layer): 100,000 steps of
28 layers are some 70 MB. Rejected: keeping every k-th step, which loses the spike that one looks for; a database beside
the run, which a reader must not write. Points for a screen are chosen by bucket, the lowest and the highest of each, so
that no extreme is lost at any zoom (the M4 idea of Jugel et al. 2014, doi 10.14778/2732951.2732953, without its first
and last). Where a file is long, ``glance`` reads some lines spread over it at once; the whole follows in portions.

Needs no torch, and numpy only where points are chosen: a monitor starts at once.
"""

from __future__ import annotations

import json
import math
import os
import re
import stat
from array import array
from bisect import bisect_left, bisect_right
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from prime_telemetry import CONFIG, EVENTS, SAMPLES, STATS

SCALARS = (
    *("loss", "val_loss", "lr", "flips", "flip_rate", "clipped", "tokens", "tokens_per_s", "seconds", "data_seconds"),
    *("skipped", "seq_len", "batch_size", "micro_batches", "mem_peak_bytes", "thawed_layers", "timestamp"),
)
"""Fields of a step that are one number."""
MEANS = ("agreement", "agreement_control", "consensus")
"""Fields by layer whose mean over the layers is a column of its own."""
BY_LAYER = ("flip_rate", "movement", "vote_pressure", "agreement", "agreement_control", "consensus")
"""What is known of a step by layer."""
HEAD = "head"
PORTION = 1 << 18
"""Bytes that one look parses before it lets others have their turn."""
EVENTS_KEPT, SAMPLES_KEPT, RETURNS_KEPT, LAYERS_MAX = 5000, 2000, 100, 1000
GLANCE_FROM, GLANCE_LINES = 8 << 20, 400
"""From how many bytes on a file is glanced at first, and at how many lines."""

_LAYER = re.compile(r"(?:^|\.)layers\.(\d+)\.")
_EVAL = re.compile(r"EVAL_(.+)_step_(\d+)\.json")


# -- files ------------------------------------------------------------------------------------------------------------


def _open(path: Path) -> int | None:
    """A descriptor of a regular file, or None: links lead out of the run, and a pipe would never answer."""
    flags = os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)
    try:
        descriptor = os.open(path, flags)
    except OSError:
        return None
    if stat.S_ISREG(os.fstat(descriptor).st_mode):
        return descriptor
    os.close(descriptor)
    return None


def _object(line: bytes) -> dict[str, Any] | None:
    try:
        value = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


class Tail:
    """What was appended to a JSON-lines file since the last look."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.offset = 0
        self.behind = 0
        """Bytes that the last look has left, a torn last line not among them."""
        self.restarts = 0
        """How often the file was found to be another one."""
        self.bad = 0
        """Lines that were no JSON objects."""
        self._inode = 0
        self._before = b""
        self._seen: tuple[int, int, int] | None = None

    def read(self, limit: int = PORTION) -> list[dict[str, Any]]:
        """The next objects, of about ``limit`` bytes; none where nothing has changed."""
        try:
            now = os.stat(self.path, follow_symlinks=False)
        except OSError:
            # Between two files of a rotation there may be none.
            return []
        seen = (now.st_ino, now.st_size, now.st_mtime_ns)
        if seen == self._seen and not self.behind:
            return []
        descriptor = _open(self.path)
        if descriptor is None:
            return []
        with os.fdopen(descriptor, "rb") as file:
            if not self._is_the_same(file, now.st_ino, now.st_size):
                self.offset, self._before, self.behind = 0, b"", 0
                self.restarts += 1
            self._inode, self._seen = now.st_ino, seen
            file.seek(self.offset)
            pieces = [file.read(limit)]
            while b"\n" not in pieces[-1] and (more := file.read(limit)):
                pieces.append(more)
        data = b"".join(pieces)
        whole = data.rfind(b"\n") + 1
        self.offset += whole
        self._before = (self._before + data[:whole])[-64:]
        self.behind = now.st_size - self.offset if whole and self.offset + len(data) - whole < now.st_size else 0
        lines = [line for line in data[:whole].split(b"\n") if line.strip()]
        found = [value for line in lines if (value := _object(line)) is not None]
        self.bad += len(lines) - len(found)
        return found

    def _is_the_same(self, file: Any, inode: int, size: int) -> bool:
        if not self._inode:
            return True
        if inode != self._inode or size < self.offset:
            return False
        file.seek(self.offset - len(self._before))
        return file.read(len(self._before)) == self._before


def glance(path: Path, lines: int = GLANCE_LINES) -> list[dict[str, Any]]:
    """Objects from some evenly spread places of a long file and all of its last ones, in order."""
    descriptor = _open(path)
    if descriptor is None:
        return []
    found: list[dict[str, Any]] = []
    with os.fdopen(descriptor, "rb") as file:
        size = os.fstat(descriptor).st_size
        for place in range(lines):
            file.seek(size * place // lines)
            if place:
                file.readline()
            if (value := _object(file.readline())) is not None:
                found.append(value)
        file.seek(max(0, size - PORTION))
        file.readline()
        found += [value for line in file if (value := _object(line)) is not None]
    steps = [line.get("step") for line in found]
    # Places overlap in the last part, and the last line there may have been torn when it was read first.
    return [line for i, line in enumerate(found) if i == len(found) - 1 or steps[i] != steps[i + 1]]


# -- columns ----------------------------------------------------------------------------------------------------------


def number(value: Any) -> float:
    """A finite float of what JSON gave, else NaN."""
    if type(value) is float:
        return value if math.isfinite(value) else math.nan
    if type(value) is not int:
        return math.nan
    try:
        return float(value)
    except OverflowError:
        return math.nan


def whole(value: Any) -> int | None:
    """A non-negative integer of what JSON gave, that a column can hold, else None."""
    return value if isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1 << 62 else None


def _groups(value: Any) -> dict[str, float]:
    """Numbers by layer of what JSON gave; names that are no layer's are left out."""
    if not isinstance(value, dict):
        return {}
    return {name: number(v) for name, v in value.items() if name == HEAD or (name.isdecimal() and len(name) < 5)}


def _mean(values: Iterable[float]) -> float:
    known = [v for v in values if v == v]
    return sum(known) / len(known) if known else math.nan


class History:
    """The steps of a run as columns, in order; NaN where a step has nothing to say."""

    def __init__(self) -> None:
        self.steps = array("q")
        self.columns: dict[str, array[float]] = {name: array("d") for name in (*SCALARS, *MEANS)}
        self.layers: dict[str, dict[str, array[float]]] = {name: {} for name in BY_LAYER}
        self.last: dict[str, Any] = {}
        self.rewinds = 0
        """How often steps were counted again from an earlier one."""
        self.grids_of: dict[str, str] = {}

    def __len__(self) -> int:
        return len(self.steps)

    def add(self, line: dict[str, Any], weights: dict[str, float]) -> None:
        """One line of statistics; ``weights``: how many each layer has, for its flip rate."""
        step = whole(line.get("step"))
        if step is None:
            return
        if self.steps and step <= self.steps[-1]:
            self._cut(bisect_left(self.steps, step))
            self.rewinds += 1
        before = len(self.steps)
        self.steps.append(step)
        by_layer = {name: _groups(line.get(name)) for name in BY_LAYER if name != "flip_rate"}
        by_layer["flip_rate"] = self._flip_rates(line, weights)
        for name in SCALARS:
            self.columns[name].append(number(line.get(name)))
        for name in MEANS:
            self.columns[name].append(_mean(by_layer[name].values()))
        for name, values in by_layer.items():
            known = self.layers[name]
            for group in values.keys() - known.keys():
                if len(known) < LAYERS_MAX:
                    known[group] = array("f", [math.nan]) * before
            for group, column in known.items():
                column.append(values.get(group, math.nan))
        self.last = line

    def _flip_rates(self, line: dict[str, Any], weights: dict[str, float]) -> dict[str, float]:
        flips = _groups(line.get("flips_by_layer"))
        if flips:
            return {group: n / weights[group] for group, n in flips.items() if weights.get(group, 0) > 0}
        # Older runs have rates by matrix only: their mean, each counted alike.
        rates: dict[str, list[float]] = {}
        grids = line.get("flip_rate_by_grid")
        for grid, rate in grids.items() if isinstance(grids, dict) else ():
            if grid not in self.grids_of and len(self.grids_of) < 100 * LAYERS_MAX:
                found = _LAYER.search(grid)
                self.grids_of[grid] = found[1] if found else HEAD
            rates.setdefault(self.grids_of.get(grid, HEAD), []).append(number(rate))
        return {group: _mean(values) for group, values in rates.items()}

    def _cut(self, place: int) -> None:
        del self.steps[place:]
        for column in self.columns.values():
            del column[place:]
        for known in self.layers.values():
            for column in known.values():
                del column[place:]

    # -- for a screen -----------------------------------------------------------------------------------------------

    def value(self, name: str) -> float:
        """The last step's number of a column; NaN where it has none."""
        return self.columns[name][-1] if self.steps else math.nan

    def known(self, name: str, after: int = 0) -> list[tuple[int, float]]:
        """(step, number) of a column where it has one, from the place ``after`` in it."""
        steps, column = self.steps[after:], self.columns[name][after:]
        return [(step, v) for step, v in zip(steps, column, strict=True) if v == v]

    def range(self, first: int | None, last: int | None) -> tuple[int, int]:
        """Places of the steps from ``first`` to ``last`` inclusive: begin and end of a slice."""
        begin = 0 if first is None else bisect_left(self.steps, first)
        end = len(self.steps) if last is None else bisect_right(self.steps, last)
        return begin, max(begin, end)

    def points(
        self, names: list[str], most: int, first: int | None = None, last: int | None = None
    ) -> tuple[list[int], dict[str, list[float | None]]]:
        """At most about ``most`` steps from ``first`` to ``last``, and the columns' numbers there (None for NaN).

        Among them are the lowest and the highest of every column in each of some buckets of steps, the first step and
        the last.
        """
        begin, end = self.range(first, last)
        few = end - begin <= most
        places = list(range(begin, end)) if few else self._extremes(names, most, begin, end)
        steps = [self.steps[i] for i in places]
        return steps, {name: [_short(self.columns[name][i]) for i in places] for name in names}

    def _extremes(self, names: list[str], most: int, begin: int, end: int) -> list[int]:
        import numpy as np

        count = end - begin
        buckets = max(1, most // (2 * max(1, len(names))))
        width = -(-count // buckets)
        keep = {begin, end - 1}
        for name in names:
            values = np.full(width * buckets, np.nan)
            # A copy: an array that is looked into cannot grow.
            values[:count] = self.columns[name][begin:end]
            table = values.reshape(buckets, width)
            empty = np.isnan(table)
            rows = np.flatnonzero(~empty.all(1))
            for places in (np.where(empty, np.inf, table).argmin(1), np.where(empty, -np.inf, table).argmax(1)):
                keep.update((begin + rows * width + places[rows]).tolist())
        return sorted(keep)

    def heat(
        self, name: str, most: int, first: int | None = None, last: int | None = None
    ) -> tuple[list[int], list[str], list[list[float | None]]]:
        """A quantity by layer and step: bounds of at most ``most`` ranges of steps (one more than ranges, the last one
        past the end), the layers (head first, then from the top down), and for each the mean of every range, None
        where it was locked."""
        import numpy as np

        begin, end = self.range(first, last)
        layers = sorted(self.layers[name], key=depth)
        if end == begin:
            return [], layers, [[] for _ in layers]
        starts = np.unique(np.linspace(begin, end, min(most, end - begin), endpoint=False).astype(np.int64))
        bounds = [self.steps[i] for i in starts] + [self.steps[end - 1] + 1]
        rows = []
        for layer in layers:
            values = np.array(self.layers[name][layer][begin:end], dtype=np.float64)
            known = ~np.isnan(values)
            total = np.add.reduceat(np.where(known, values, 0.0), starts - begin)
            count = np.add.reduceat(known.astype(np.int64), starts - begin)
            means = np.where(count > 0, total / np.maximum(count, 1), np.nan)
            rows.append([_short(v) for v in means.tolist()])
        return bounds, layers, rows


def _short(value: float) -> float | None:
    return float(f"{value:.7g}") if value == value else None


def depth(layer: str) -> int:
    """Sorting key: the head, then layers from the top down."""
    return -1 << 30 if layer == HEAD else -int(layer)


# -- a run ------------------------------------------------------------------------------------------------------------


class Evaluation(NamedTuple):
    """An ``EVAL_<name>_step_<N>.json``; a score is a number, None, or (passed, total)."""

    name: str
    step: int | None
    kind: str
    scores: dict[str, float | tuple[int, int] | None]


def _evaluation(path: Path) -> Evaluation | None:
    found = _EVAL.fullmatch(path.name)
    value = _read_object(path)
    if found is None or value is None or not isinstance(value.get("scores"), dict):
        return None
    scores: dict[str, float | tuple[int, int] | None] = {}
    for name, score in value["scores"].items():
        if isinstance(score, list):
            pair = [whole(v) for v in score]
            if len(pair) == 2 and pair[0] is not None and pair[1] is not None:
                scores[name] = (pair[0], pair[1])
        else:
            known = number(score)
            scores[name] = known if known == known else None
    step = whole(value.get("step"))
    return Evaluation(
        name=str(value.get("name", found[1])),
        step=int(found[2]) if step is None else step,
        kind=str(value.get("kind", "")),
        scores=scores,
    )


def _read_object(path: Path, most: int = 16 << 20) -> dict[str, Any] | None:
    descriptor = _open(path)
    if descriptor is None:
        return None
    with os.fdopen(descriptor, "rb") as file:
        return _object(file.read(most))


@dataclass
class Run:
    """Everything that a run's folder says, as far as it was read; :meth:`refresh` reads on."""

    folder: Path
    config: dict[str, Any] = field(default_factory=dict)
    history: History = field(default_factory=History)
    events: deque[dict[str, Any]] = field(default_factory=lambda: deque(maxlen=EVENTS_KEPT))
    samples: dict[tuple[int, str], dict[str, Any]] = field(default_factory=dict)
    """By step and prompt, in the order of steps."""
    evaluations: list[Evaluation] = field(default_factory=list)
    generation: int = 0
    """Rises when what was read before no longer holds: a client then begins anew."""
    changes: int = 0
    """Rises with everything that is new."""
    glanced: bool = False
    """Whether ``history`` is a glance at a long file that has not been read to its end."""

    def __post_init__(self) -> None:
        self._stats, self._events, self._samples = (Tail(self.folder / name) for name in (STATS, EVENTS, SAMPLES))
        self._seen: dict[str, tuple[int, int, int]] = {}
        self._evaluations: dict[str, Evaluation | None] = {}
        self._returns: deque[tuple[int, float]] = deque(maxlen=RETURNS_KEPT)
        self._whole = self.history

    @property
    def exists(self) -> bool:
        """Whether there is anything of a run in the folder."""
        return bool(self.config or self.history or self.events)

    @property
    def behind(self) -> float:
        """Share of the telemetry that is still to be read, 0 to 1."""
        tails = (self._stats, self._events, self._samples)
        left = sum(tail.behind for tail in tails)
        return left / max(1, left + sum(tail.offset for tail in tails))

    @property
    def events_behind(self) -> bool:
        """Whether there are events that were not read yet: what was read then says nothing of how the run ended."""
        return self._events.behind > 0

    @property
    def weights(self) -> dict[str, float]:
        """How many weights each layer has; empty where the run does not say."""
        return _groups(self.config.get("layer_weights"))

    def refresh(self, limit: int = PORTION, *, glancing: bool = True) -> bool:
        """Read what is new, of the statistics about ``limit`` bytes, and where these are long and have not been looked
        at a glance over all of them; whether anything was new."""
        before = self.changes
        self._refresh_files()
        self._refresh_stats(limit, glancing)
        self._refresh_events()
        return self.changes != before

    def read_all(self) -> None:
        """Read to the present end of all files."""
        self.refresh(glancing=False)
        while self.behind:
            self.refresh()

    def read_events(self) -> None:
        """Read events and samples to their present end; of the statistics what there is stays as it is."""
        self._refresh_events()
        while self._events.behind or self._samples.behind:
            self._refresh_events()

    def _refresh_events(self) -> None:
        """What is new of events and samples. After a return to a checkpoint what was written of later steps is of a
        past that did not happen: it is dropped."""
        before = self.changes
        for event in self._follow(self._events, self._forget_events, PORTION):
            self.events.append(event)
            to = whole(event.get("to"))
            if event.get("event") == "roll_back" and to is not None:
                self._returns.append((to, number(event.get("timestamp"))))
        for sample in self._follow(self._samples, self.samples.clear, PORTION):
            step = whole(sample.get("step"))
            if step is not None:
                # Put back at the end: of two of one step and prompt the later one holds.
                key = (step, str(sample.get("prompt", "")))
                self.samples.pop(key, None)
                self.samples[key] = sample
                while len(self.samples) > SAMPLES_KEPT:
                    del self.samples[next(iter(self.samples))]
        if self.changes == before:
            return
        for key in [k for k, s in self.samples.items() if self._undone(k[0], number(s.get("timestamp")))]:
            del self.samples[key]
        self._choose_evaluations()

    def _undone(self, step: int, written: float) -> bool:
        return any(step > to and written <= at for to, at in self._returns)

    def _forget_events(self) -> None:
        self.events.clear()
        self._returns.clear()

    def _follow(self, tail: Tail, forget: Any, limit: int) -> list[dict[str, Any]]:
        restarts = tail.restarts
        lines = tail.read(limit)
        if tail.restarts != restarts:
            forget()
            self.generation += 1
        if lines or tail.restarts != restarts:
            self.changes += 1
        return lines

    def _refresh_stats(self, limit: int, glancing: bool) -> None:
        begun = self._stats.offset > 0
        lines = self._follow(self._stats, self._forget, limit)
        rewinds, weights = self._whole.rewinds, self.weights
        for line in lines:
            self._whole.add(line, weights)
        if self._whole.rewinds != rewinds and not self.glanced:
            self.generation += 1
        if glancing and not begun and self._stats.behind + self._stats.offset > GLANCE_FROM:
            self.history = History()
            for line in glance(self.folder / STATS):
                self.history.add(line, weights)
            self.glanced = True
        elif self.glanced and not self._stats.behind:
            self.history, self.glanced = self._whole, False
            self.generation += 1

    def _forget(self) -> None:
        self.history = self._whole = History()
        self.glanced = False

    def _refresh_files(self) -> None:
        """The configuration and the evaluations, where they have changed."""
        now: dict[str, tuple[int, int, int]] = {}
        try:
            with os.scandir(self.folder) as entries:
                for entry in entries:
                    if (entry.name == CONFIG or _EVAL.fullmatch(entry.name)) and entry.is_file(follow_symlinks=False):
                        info = entry.stat(follow_symlinks=False)
                        now[entry.name] = (info.st_ino, info.st_size, info.st_mtime_ns)
        except OSError:
            return
        if now == self._seen:
            return
        for name in now.keys() - self._seen.keys() | {n for n in now if now[n] != self._seen.get(n)}:
            if name != CONFIG:
                self._evaluations[name] = _evaluation(self.folder / name)
            elif (config := _read_object(self.folder / name)) is not None:
                self.config = config
        for name in self._seen.keys() - now.keys():
            self._evaluations.pop(name, None)
        self._seen = now
        self._choose_evaluations()
        self.changes += 1

    def _choose_evaluations(self) -> None:
        """Those of the present past, in the order of steps."""
        found = [
            e
            for name, e in self._evaluations.items()
            if e is not None and not self._undone(e.step or 0, self._seen[name][2] / 1e9)
        ]
        self.evaluations = sorted(found, key=lambda e: (e.step or 0, e.name))

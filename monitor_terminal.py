"""A run as one frame of text: a pure function of what was read, the width and the height.

From top to bottom: what it is and whether it lives; how far; which layers are open; the curves; the layers; what
happened; what the model writes. Nothing is told by colour alone, so a frame reads the same through a pipe. At a given
height the lower parts give way first: samples, then events, then neighbouring layers share a line.

Rejected: boxes and panels. They spend four columns and two lines on each part, and at 80 columns the eye finds its way
by alignment. Text of samples and events is data: what a terminal would obey is made visible before it is drawn.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from rich.console import Console, Group, RenderableType
from rich.text import Text

from run_reader import HEAD, History, Run
from run_summary import (
    Entry,
    Layer,
    Summary,
    duration,
    harmless,
    names_of,
    sample_steps,
    samples_at,
    score_table,
    summarize,
)

BARS = "▁▂▃▄▅▆▇"
"""Without the full block, which would run into the line above."""
STATE_STYLES = {
    "waiting": "cyan",
    "running": "green",
    "finished": "blue",
    "stopped": "yellow",
    "crashed": "bold red",
    "stale": "yellow",
}
LEVEL_STYLES = {"info": "dim", "good": "green", "unlock": "cyan", "warning": "yellow", "error": "red"}
LAYER_GLYPHS = {"open": "■", "opened": "◆", "locked": "□"}
LAYER_STYLES = {"open": "blue", "opened": "bold cyan", "locked": "dim"}
LAYER_WORDS = {"open": "open", "opened": "just opened", "locked": "locked"}
NARROWEST, WIDEST = 60, 120
LABEL, VALUE, NOTE = 11, 10, 31
"""Columns of a curve's line: what, how much, (the curve), and what else there is to say."""


# -- small pieces -----------------------------------------------------------------------------------------------------


def trace(history: History, name: str, cells: int) -> list[float]:
    """A column as so many means of equal shares of the run; NaN where a share has none. Of a long share some evenly
    spread steps are looked at, of a sparse column all."""
    column = history.columns[name]
    count = len(column)
    found = []
    for cell in range(min(cells, count)):
        begin, end = cell * count // min(cells, count), (cell + 1) * count // min(cells, count)
        stride = 1 if name == "val_loss" else max(1, (end - begin) // 16)
        known = [v for v in column[begin:end:stride] if v == v]
        found.append(sum(known) / len(known) if known else math.nan)
    return found


def sparkline(values: Sequence[float]) -> str:
    """One character a value, the lowest and the highest at the ends of the scale; a value holds until the next."""
    known = [v for v in values if v == v]
    if not known:
        return ""
    low, high = min(known), max(known)
    signs, sign = [], " "
    for v in values:
        if v == v:
            sign = BARS[round((v - low) / (high - low) * (len(BARS) - 1)) if high > low else 2]
        signs.append(sign)
    return "".join(signs)


def bar(share: float, cells: int) -> Text:
    """A bar of so many columns, filled to a share of 0 to 1."""
    filled = round(min(max(share, 0.0), 1.0) * cells)
    return Text.assemble(("━" * filled, "blue"), ("─" * (cells - filled), "dim"))


def amount(value: float | None, digits: int = 3) -> str:
    """A number in few characters; a dash for None."""
    if value is None:
        return "-"
    return "0" if value == 0 else f"{value:.{digits}g}" if abs(value) >= 1e-3 else f"{value:.{digits - 2}e}"


def share(value: float | None) -> str:
    """A share as a percentage."""
    if value is None:
        return "-"
    return f"{100 * value:.1f} %" if value >= 0.001 or value == 0 else f"{100 * value:.1g} %"


def size(count: int | None) -> str:
    """Bytes in GB."""
    return "-" if count is None else f"{count / 1e9:.2f} GB"


def clock(timestamp: float | None, now: float) -> str:
    """Local time of day, with the date where that is not today's."""
    if timestamp is None:
        return "-"
    try:
        then = time.localtime(timestamp)
    except (OverflowError, ValueError, OSError):
        return "-"
    return time.strftime("%H:%M:%S" if then[:3] == time.localtime(now)[:3] else "%m-%d %H:%M", then)


def fit(text: str, width: int) -> str:
    """At most ``width`` characters, an ellipsis where it was cut."""
    return text if len(text) <= width else text[: max(0, width - 1)] + "…"


def one_line(text: str) -> str:
    """Line breaks and tabs of a sample made visible, so that it takes one line."""
    return " ".join(text.replace("\n", " ⏎ ").split())


# -- parts ------------------------------------------------------------------------------------------------------------


def spread(left: Text, right: Text, width: int) -> Text:
    """Two texts at the ends of a line; the left one gives way."""
    room = width - right.cell_len - 2
    if left.cell_len > room:
        left.truncate(room, overflow="ellipsis")
    return Text.assemble(left, " " * (width - left.cell_len - right.cell_len), right)


def heading(title: str, note: str, width: int) -> Text:
    """The beginning of a part."""
    line = Text.assemble((title.upper(), "bold"), ("  " + note if note else "", "dim"))
    line.truncate(width, overflow="ellipsis")
    return line


def header(s: Summary, glanced: bool, now: float, width: int) -> Iterator[Text]:
    """What it is, whether it lives, how far it is."""
    age = "" if s.updated is None else f", last line {duration(now - s.updated)} ago"
    state = Text.assemble(("● " + s.state, STATE_STYLES[s.state]), (age, "dim"))
    yield spread(Text.assemble((s.name, "bold"), ("  " + s.folder, "dim")), state, width)
    if s.state not in ("running", "finished"):
        yield Text(fit(s.how, width), style=STATE_STYLES[s.state])
    if glanced:
        yield Text("a glance at a long history: curves and best are of some of its steps", style="dim")
    if not s.steps:
        return
    done = min(1.0, s.step / s.steps)
    label, percent = f"step {s.step:,} of {s.steps:,} ", f" {100 * done:.0f} %"
    yield Text.assemble(label, bar(done, width - len(label) - len(percent)), percent)
    parts = []
    if s.pace is not None:
        parts.append(f"{amount(s.pace)} s a step")
    if s.eta is not None:
        parts.append(f"{duration(s.eta)} left, ends {clock(now + s.eta, now)}")
    if parts:
        yield Text(" · ".join(parts), style="dim")


def layer_strip(layers: list[Layer], width: int) -> Text:
    """The stack from the head down, one sign a layer."""
    numbered = [layer for layer in layers if layer.name != HEAD]
    line = Text()
    for layer in layers:
        if layer.name == HEAD:
            line.append("head ").append(LAYER_GLYPHS[layer.state], LAYER_STYLES[layer.state])
    if not numbered:
        return line
    top, bottom = f"  {numbered[0].name} ", f" {numbered[-1].name}"
    line.append(top, "dim")
    wide = line.cell_len + 2 * len(numbered) + len(bottom) <= width
    for layer in numbered:
        line.append(LAYER_GLYPHS[layer.state] + (" " if wide else ""), LAYER_STYLES[layer.state])
    line.append(bottom.strip() if wide else bottom, "dim")
    return line


def phase(s: Summary, width: int) -> Iterator[Text]:
    """The phase, the stack, the next unlock."""
    if not s.layers:
        return
    yield heading(s.phase or "layers", s.phase_detail, width)
    line = layer_strip(s.layers, width)
    key = "  ".join(f"{LAYER_GLYPHS[k]} {LAYER_WORDS[k]}" for k in ("open", "opened", "locked"))
    yield spread(line, Text(key, style="dim"), width) if line.cell_len + len(key) + 2 <= width else line
    if s.next_step is not None:
        changes = ((s.next_layers, "open"), (s.next_closed, "close"))
        moves = [f"{names_of(names)} {verb}" for names, verb in changes if names]
        when = f"in {s.next_step - 1 - s.step:,} steps" if s.next_step - 1 > s.step else "now"
        eta = f", {duration(s.next_eta)}" if s.next_eta else ""
        yield Text.assemble(("next  ", "dim"), f"{', '.join(moves)} at step {s.next_step:,}", (f"  {when}{eta}", "dim"))
    elif s.phase == "crystallization":
        yield Text("every unlock is done" if s.unlocks else "no unlock is planned", style="dim")


def curve(label: str, value: str, values: Sequence[float], note: str, width: int, style: str = "blue") -> Text:
    """One line of the curves."""
    cells = width - LABEL - VALUE - NOTE - 3
    picture = sparkline(values)[:cells].ljust(cells)
    return Text.assemble(
        (label.ljust(LABEL), "dim"), (value.rjust(VALUE), "bold"), "  ", (picture, style), " ", (fit(note, NOTE), "dim")
    )


def curves(s: Summary, history: History, now: float, width: int) -> Iterator[Text]:
    """Numbers with their course over the whole run."""
    cells = width - LABEL - VALUE - NOTE - 3

    def course(name: str) -> list[float]:
        return trace(history, name, cells)

    yield heading("curves", "over the whole run; losses in nats a token", width)
    if s.trend is None:
        trend = "mean of the last 20 steps"
    else:
        trend = f"{'▼' if s.trend < 0 else '▲'} {abs(s.trend):.3f} in 100 steps"
    yield curve("loss", "-" if s.loss is None else f"{s.loss:.4f}", course("loss"), trend, width)
    if s.val_loss is not None:
        best = "" if s.best is None else f"best {s.best:.4f} at step {s.best_step:,}"
        held_out = course("val_loss")
        if s.first_val_loss is not None and held_out and held_out[0] != held_out[0]:
            held_out[0] = s.first_val_loss
        yield curve("held-out", f"{s.val_loss:.4f}", held_out, best, width, "magenta")
    if s.flip_rate is not None:
        note = "" if s.flips is None else f"{s.flips:,} weights moved"
        yield curve("flip rate", share(s.flip_rate), course("flip_rate"), note, width)
    if s.agreement is not None:
        control = "" if s.control is None else f"shuffled votes {s.control:+.3f}"
        yield curve("agreement", f"{s.agreement:+.3f}", course("agreement"), control, width)
    waiting = "" if s.waiting is None else f"{share(s.waiting)} waiting for data"
    yield curve("tokens/s", amount(s.tokens_per_s), course("tokens_per_s"), waiting, width)
    of_all = f"{share(s.memory / s.memory_total)} of {size(s.memory_total)}" if s.memory and s.memory_total else ""
    yield curve("memory", size(s.memory), course("mem_peak_bytes"), of_all, width)
    yield curve("rate", "-" if s.rate is None else f"{s.rate:.2e}", course("lr"), "learning rate", width)


def facts(s: Summary, now: float, width: int) -> Iterator[Text]:
    """What has no curve."""
    seen = [s.data] if s.data else []
    seen += [] if s.tokens is None else [f"{s.tokens:,} tokens seen"]
    if seen:
        yield Text.assemble(("data".ljust(LABEL), "dim"), fit(", ".join(seen), width - LABEL))
    if s.saved_step is not None:
        ago = "" if s.saved_at is None else f", {duration(now - s.saved_at)} ago"
        best = ", the best so far" if s.saved_best else ""
        yield Text.assemble(("last save".ljust(LABEL), "dim"), f"step {s.saved_step:,}{ago}{best}")


class _Rows:
    """Neighbouring layers that share a line."""

    def __init__(self, first: Layer) -> None:
        self.layers = [first]

    @property
    def name(self) -> str:
        names = [layer.name for layer in self.layers]
        return names[0] if len(names) == 1 else f"{names[0]} to {names[-1]}"

    def total(self, what: str) -> float | None:
        """Sum of a number over the layers."""
        known = [v for layer in self.layers if (v := getattr(layer, what)) is not None]
        return sum(known) if known else None

    def mean(self, what: str) -> float | None:
        """Mean of a number over the layers."""
        known = [v for layer in self.layers if (v := getattr(layer, what)) is not None]
        return sum(known) / len(known) if known else None


def grouped(layers: list[Layer], most: int) -> list[_Rows]:
    """Layers on at most about ``most`` lines: neighbours of one state share one where they must."""
    for together in range(1, len(layers) + 1):
        rows: list[_Rows] = []
        for layer in layers:
            mates = rows[-1].layers if rows else []
            alike = mates and mates[0].state == layer.state and mates[0].name != HEAD
            # What is locked has nothing to say: it shares a line as soon as anything does.
            if alike and (len(mates) < together or (together > 1 and layer.state == "locked")):
                mates.append(layer)
            else:
                rows.append(_Rows(layer))
        if len(rows) <= most:
            break
    return rows


def layer_table(s: Summary, most: int, width: int) -> Iterator[Text]:
    """Flips, movement, vote pressure and agreement by layer."""
    if most < 2 or not s.layers:
        return
    rows = grouped(s.layers, most - 1)
    bar_width = max(0, min(20, width - 74))
    loudest = max((p for row in rows if (p := row.mean("pressure")) is not None), default=0.0)
    narrow = width < 66
    titles = "flips".rjust(12) + "flip rate".rjust(11) + ("" if narrow else "movement".rjust(11))
    titles += "pressure".rjust(11) + "agreement".rjust(11 + bar_width)
    yield Text.assemble(("LAYER".ljust(10), "bold"), (titles, "dim"))
    for row in rows:
        first = row.layers[0]
        line = Text.assemble((LAYER_GLYPHS[first.state] + " ", LAYER_STYLES[first.state]), row.name.ljust(8))
        if first.state == "locked":
            when = [f"{layer.opens_at:,}" for layer in row.layers if layer.opens_at]
            until = (
                "" if not when else f", opens at step {when[0]}" + (f" to {when[-1]}" if when[-1] != when[0] else "")
            )
            line.append("     locked" + until, "dim")
            yield line
            continue
        flips, pressure, agreement = row.total("flips"), row.mean("pressure"), row.mean("agreement")
        line.append(("-" if flips is None else f"{flips:,.0f}").rjust(12))
        line.append(share(row.mean("flip_rate")).rjust(11))
        line.append("" if narrow else amount(row.mean("movement")).rjust(11))
        line.append(share(pressure).rjust(11))
        if bar_width:
            filled = round((pressure or 0) / loudest * (bar_width - 2)) if loudest else 0
            line.append((" " + "▪" * filled).ljust(bar_width), "blue")
        line.append(("-" if agreement is None else f"{agreement:+.3f}").rjust(11))
        heat = row.mean("heat")
        if first.state == "opened":
            line.append("  opened", "bold cyan")
        elif heat is not None:
            line.append(f"  x{heat:.2f}", "yellow")
        line.truncate(width)
        yield line


def event_lines(entries: list[Entry], most: int, now: float, width: int) -> Iterator[Text]:
    """The last events, the newest first."""
    if most < 2 or not entries:
        return
    yield heading("events", "", width)
    for entry in entries[: -most if most <= len(entries) else None : -1]:
        step = "" if entry.step is None else f"step {entry.step:,}"
        begin = f"{clock(entry.timestamp, now):<12}{step:<14}"
        line = Text.assemble((begin, "dim"), (one_line(entry.text), LEVEL_STYLES[entry.level]))
        line.truncate(width, overflow="ellipsis")
        yield line


_SAMPLE_PARTS = (("prompt", "prompt", "dim"), ("model", "text", ""), ("reference", "reference", "dim"))


def sample_lines(run: Run, most: int, width: int) -> Iterator[Text]:
    """The newest samples, three lines each."""
    steps = sample_steps(run)
    if most < 4 or not steps:
        return
    yield heading("samples", f"step {steps[-1]:,}", width)
    for sample in samples_at(run, steps[-1])[: (most - 1) // 3]:
        for label, name, style in _SAMPLE_PARTS:
            text = one_line(sample[name])
            # Of a prompt the end matters: chat templates begin alike.
            room = width - LABEL
            text = "…" + text[1 - room :] if name == "prompt" and len(text) > room else fit(text, room)
            line = Text.assemble((label.ljust(LABEL), "dim"), (text, style))
            line.truncate(width)
            yield line


def score_lines(run: Run, most: int, width: int) -> Iterator[Text]:
    """The newest evaluations, a line each."""
    names, rows = score_table(run.evaluations)
    if most < 3 or not rows:
        return
    widths = [max(len(name), *(len(scores[i]) for _, scores in rows)) for i, name in enumerate(names)]
    titles = "  ".join(name.rjust(w) for name, w in zip(names, widths, strict=True))
    yield Text.assemble(("SCORES".ljust(20), "bold"), (fit(titles, width - 20), "dim"))
    for step, scores in rows[-(most - 1) :]:
        cells = "  ".join(score.rjust(w) for score, w in zip(scores, widths, strict=True))
        yield Text(fit(("-" if step is None else f"step {step:,}").ljust(20) + cells, width))


# -- a frame ----------------------------------------------------------------------------------------------------------


def render(run: Run, now: float, width: int, height: int | None = None) -> RenderableType:
    """The run as lines of at most ``width`` columns (60 at least, 120 at most are used), and at most ``height`` of
    them where that is given."""
    width = max(NARROWEST, min(width, WIDEST)) - 1
    s = summarize(run, now)
    parts = [list(header(s, run.glanced, now, width))]
    if s.state == "waiting":
        parts.append([Text(hint, style="dim") for hint in waiting_hints(run)])
        return Group(*_joined(parts))
    parts.append(list(phase(s, width)))
    parts.append([*curves(s, run.history, now, width), *facts(s, now, width)])
    room = 10**6 if height is None else height - sum(len(p) + 1 for p in parts)
    wanted = {"layers": len(s.layers) + 1, "events": 13, "scores": 5, "samples": 7}
    smallest = {"layers": 4, "events": 3, "scores": 3, "samples": 4}
    given: dict[str, int] = {}
    for name in wanted:
        given[name] = min(wanted[name], smallest[name]) if room > smallest[name] else 0
        room -= given[name] + 1 if given[name] else 0
    for name in wanted:
        more = min(wanted[name] - given[name], max(0, room)) if given[name] else 0
        given[name] += more
        room -= more
    parts.append(list(layer_table(s, given["layers"], width)))
    parts.append(list(event_lines(s.events, given["events"], now, width)))
    parts.append(list(score_lines(run, given["scores"], width)))
    parts.append(list(sample_lines(run, given["samples"], width)))
    lines = _joined(parts)
    return Group(*(lines if height is None else lines[:height]))


def _joined(parts: list[list[Text]]) -> list[Text]:
    """Parts with an empty line between those that have any."""
    lines: list[Text] = []
    for part in (p for p in parts if p):
        lines += [Text(""), *part] if lines else part
    return lines


def waiting_hints(run: Run) -> list[str]:
    """What to do where nothing is to be seen."""
    if run.events_behind:
        return []
    if run.config:
        return ["The trainer is reading its data or compiling; the first step is shown as soon as it is written."]
    hints = ["Waiting for config.json and stats.jsonl there; the trainer writes them, Ctrl-C ends the waiting."]
    near = [p.parent for folder in (run.folder, run.folder.parent) for p in sorted(folder.glob("*/stats.jsonl"))[:4]]
    return hints + [f"There is a run in {harmless(p, 300)}" for p in dict.fromkeys(near)]


def status_line(run: Run, now: float) -> str:
    """The run on one line, for a log."""
    s = summarize(run, now)
    parts = [f"{s.state}, step {s.step:,}" + (f" of {s.steps:,}" if s.steps else "")]
    parts += [] if s.loss is None else [f"loss {s.loss:.4f}"]
    parts += [] if s.val_loss is None else [f"held-out {s.val_loss:.4f}"]
    parts += [f"{s.phase}, {s.phase_detail}"] if s.phase else [s.how]
    parts += [] if s.eta is None else [f"{duration(s.eta)} left"]
    return " · ".join(parts)


# -- watching ---------------------------------------------------------------------------------------------------------


def show_once(run: Run, console: Console, now: float) -> None:
    """Print one frame of the run as it is; where its history is long, at a glance."""
    run.refresh()
    run.read_events() if run.glanced else run.read_all()
    console.print(render(run, now, console.width), no_wrap=True, crop=True)


LOOK, REDRAW, LOG = 1.0, 10.0, 10.0
"""Seconds between looks at the files, between drawings of a run that is silent, between lines of a log."""


def watch(run: Run, console: Console) -> None:
    """Show the run until Ctrl-C: on a terminal as a screen that follows, elsewhere as a line when there is news, until
    the run has ended."""
    if console.is_terminal:
        _watch_screen(run, console)
    else:
        _watch_log(run, console)


def _watch_screen(run: Run, console: Console) -> None:
    from rich.live import Live

    drawn, size_drawn, news = 0.0, None, False
    try:
        with Live(console=console, screen=True, auto_refresh=False, vertical_overflow="crop") as live:
            while True:
                news |= run.refresh()
                now = time.time()
                # A long history comes in many portions: they are not worth a frame each.
                due = news and now - drawn >= LOOK * 0.9
                if due or now - drawn >= REDRAW or console.size != size_drawn:
                    news = False
                    drawn, size_drawn = now, console.size
                    live.update(render(run, now, console.width, console.height), refresh=True)
                if not run.behind:
                    time.sleep(LOOK)
    finally:
        # The other screen is gone with all that was on it: leave the last frame behind.
        console.print(render(run, time.time(), console.width), no_wrap=True, crop=True)


def _watch_log(run: Run, console: Console) -> None:
    said, step = 0.0, None
    while True:
        run.refresh()
        now = time.time()
        if not run.behind:
            s = summarize(run, now)
            over = s.state in ("finished", "stopped", "crashed")
            if over or (s.step != step and now - said >= LOG):
                said, step = now, s.step
                console.print(status_line(run, now), soft_wrap=True, markup=False, highlight=False)
            if over:
                return
            time.sleep(LOOK)


def terminal(folder: Path, once: bool, console: Console | None = None) -> int:
    """What ``monitor_qwen.py RUN`` does; Ctrl-C is how one stops to watch, so 0 after it too."""
    console = console or Console()
    run = Run(folder)
    if once:
        show_once(run, console, time.time())
        return 0
    try:
        watch(run, console)
    except KeyboardInterrupt:
        return 0
    return 0

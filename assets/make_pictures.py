"""Draw the pictures of the README into this folder: manifolds, methods compared, and the demo's run if there is one.

python assets/make_pictures.py
"""

from __future__ import annotations

import sys
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

import manifolds  # noqa: E402
import quality_summary  # noqa: E402
from prime_telemetry import read_lines  # noqa: E402

COLOURS = {"prime-harmonic": "#1f6f8b", "linear": "#d1793b", "compact": "#6b8e3d"}
METHODS = {
    "adamw": ("AdamW, betas 0.9, 0.95, 16 bytes", "#333333", "s:"),
    "adamw-0.5-0.95": ("AdamW, betas 0.5, 0.95, 16 bytes", "#333333", "s-"),
    "adamw-8bit": ("AdamW 8 bit, 10 bytes", "#999999", "s--"),
    "lora": ("LoRA r = 16", "#a05fa0", "^--"),
    "supermajority": ("supermajority, 4 bytes", "#c9a227", "v--"),
    "momentum": ("momentum, 3 bytes", "#1f6f8b", "o-"),
    "compact": ("compact, 2 bytes", "#d1793b", "o-"),
}
TITLES = {
    "stdlib": "standard library instructions",
    "code-alpaca": "code-alpaca",
    "atto": "story model learns arithmetic problems",
    "stdlib-low": "learning rates 1e-5 to 1e-4",
}


def draw_manifolds(path: Path) -> None:
    """Value against word, and gap against value, of every table."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.8), layout="constrained")
    for name in manifolds.NAMES:
        values = manifolds.build(name).values.numpy()
        indices = np.arange(-manifolds.INDEX_MAX - 1, manifolds.INDEX_MAX + 1)
        left.plot(indices, values, color=COLOURS[name], label=name, linewidth=1.6)
        half = manifolds.build(name).fixed.numpy() / 2.0**manifolds.FIXED_BITS
        gaps, places = np.diff(half), half[1:]
        # The geometric mean over short stretches: single gaps of the nucleus scatter over four decades.
        edges = np.geomspace(1e-5, 1.0, 60)
        which = np.digitize(places, edges)
        filled = [b for b in range(61) if (which == b).any()]
        centres = [places[which == b].mean() for b in filled]
        means = [np.exp(np.log(gaps[which == b]).mean()) for b in filled]
        right.plot(centres, means, color=COLOURS[name], label=name, linewidth=1.6)
    left.set(xlabel="word (16 bits)", ylabel="value", title="what a word stands for")
    right.set(xscale="log", yscale="log", xlabel="value (share of the row's scale)", ylabel="gap to the next entry")
    right.set_title("resolution")
    for axis in (left, right):
        axis.grid(alpha=0.25)
        axis.legend(frameon=False)
    figure.savefig(path, dpi=130)
    plt.close(figure)


RUINED = 4
"""Times the median rise of the old loss from which on a point lies outside of its panel."""


def draw_quality(results: Path, path: Path) -> None:
    """What each method learned against what it forgot, one curve over learning rates per method, one panel per task."""
    lines = list(read_lines(results))
    tasks = [name for name in TITLES if any(x["task"] == name for x in lines)]
    columns = 2 if len(tasks) > 1 else 1
    rows = -(-len(tasks) // columns)
    figure, axes = plt.subplots(rows, columns, figsize=(5.4 * columns, 4.1 * rows), layout="constrained", squeeze=False)
    for axis in axes.flat[len(tasks) :]:
        axis.axis("off")
    for axis, task in zip(axes.flat, tasks, strict=False):
        drawn: list[tuple[float, float]] = []
        for method, (label, colour, style) in METHODS.items():
            # Without the start, which all share: a line from there to the lowest rate would be no measurement.
            curve = quality_summary.curve_of([x for x in lines if (x["task"], x["method"]) == (task, method)])[1:]
            drawn += curve
            if curve:
                axis.plot(*zip(*curve, strict=True), style, color=colour, label=label, markersize=4.5, linewidth=1.4)
        axis.set(title=TITLES[task], xlabel="held-out loss of the new domain, nats per token (better: to the right)")
        axis.set_ylabel("rise of the old domain's loss (better: low)")
        axis.invert_xaxis()
        # A rate that ruins a model would leave no room for the others: its line leaves the panel.
        limit = RUINED * sorted(rise for _, rise in drawn)[len(drawn) // 2]
        seen = [point for point in drawn if point[1] <= limit]
        if len(seen) < len(drawn):
            (low, high), (least, most) = ((min(x), max(x)) for x in zip(*seen, strict=True))
            axis.set_xlim(high + 0.05 * (high - low), low - 0.05 * (high - low))
            axis.set_ylim(least - 0.05 * (most - least), most + 0.08 * (most - least))
        axis.grid(alpha=0.25)
    axes.flat[0].legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def draw_night(record: Path, path: Path) -> None:
    """A night with its accidents: held-out loss beside AdamW's without any, and whether votes agree with gradients."""
    lines = list(read_lines(record))
    steps = [x for x in lines if x["kind"] == "step"]
    events = [x for x in lines if x["kind"] == "event"]
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 3.8), layout="constrained", width_ratios=(3, 2))
    shades = {"adamw": iter(("#444444", "#999999", "#cccccc")), "adamw-0.5-0.95": iter(("#8a5a2b", "#c9a57a"))}
    for line in (x for x in lines if x["kind"] == "baseline"):
        tuned = "" if line["method"] == "adamw" else ", betas tuned"
        style = {"color": next(shades[line["method"]]), "markersize": 3.5, "linewidth": 1}
        left.plot(*zip(*line["curve"], strict=True), "s--", label=f"AdamW{tuned}, lr {line['lr']:g}", **style)
    held = [(x["step"], x["val_loss"]) for x in steps if x["val_loss"] is not None]
    left.plot(*zip(*held, strict=True), "o-", color="#1f6f8b", label="votes, with accidents")
    low, high = left.get_ylim()
    seen: dict[str, int] = {}
    for event in events:
        words = {"non_finite": "not a number", "out_of_memory": "out of memory", "signal": "SIGTERM", "peel": "unlock"}
        name = words.get(event["event"], "restart after SIGKILL" if event["event"] == "start" and event["step"] else "")
        if event["event"] == "start" and any(e["event"] == "signal" and e["step"] == event["step"] for e in events):
            continue
        if not name or seen.get(name) == event["step"]:
            continue
        seen[name] = event["step"]
        colour = "#c9d6b8" if name == "unlock" else "#e3a08a"
        left.axvline(event["step"], color=colour, linewidth=1, zorder=0)
        if name != "unlock":
            left.text(event["step"], high, f" {name}", rotation=90, va="top", ha="right", fontsize=6.5, color="#a04a30")
    left.set(
        xlabel="step", ylabel="held-out answers, nats per token", title="600 steps with accidents", ylim=(low, high)
    )
    left.legend(frameon=False, fontsize=8, loc="center right")
    for key, label, colour in (
        ("agreement", "votes", "#1f6f8b"),
        ("agreement_control", "the same, shuffled", "#bbbbbb"),
    ):
        points = [(x["step"], x[key]) for x in steps if x[key] is not None]
        window = 20
        smooth = [
            (points[i][0], sum(v for _, v in points[i - window : i]) / window) for i in range(window, len(points))
        ]
        right.plot(*zip(*smooth, strict=True), color=colour, label=label)
    right.axhline(0, color="black", linewidth=0.5)
    right.set(xlabel="step", ylabel="cosine, mean of 20 steps", title="do votes agree with the next gradient? (head)")
    right.legend(frameon=False, fontsize=8)
    for axis in (left, right):
        axis.grid(alpha=0.25)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def draw_run(stats: Path, path: Path) -> None:
    """Training and held-out loss, and the share of weights that flip, step by step."""
    lines = list(read_lines(stats))
    steps = [x["step"] for x in lines]
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.4), layout="constrained")
    left.plot(steps, [x["loss"] for x in lines], color="#9bb7c4", linewidth=1, label="training answers")
    first = [x for x in read_lines(stats.with_name("events.jsonl")) if x["event"] == "evaluation"]
    held = [(x["step"], x["val_loss"]) for x in [*first, *lines] if x["val_loss"] is not None]
    left.plot(*zip(*held, strict=True), "o-", color="#1f6f8b", label="held-out answers")
    left.set(xlabel="step", ylabel="nats per token", title="loss")
    left.legend(frameon=False)
    right.plot(steps, [100 * x["flip_rate"] for x in lines], color="#d1793b")
    right.set(xlabel="step", ylabel="% of all weights", title="weights that move to another entry", ylim=(0, None))
    for axis in (left, right):
        axis.grid(alpha=0.25)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def main() -> int:
    draw_manifolds(HERE / "manifolds.png")
    draw_quality(HERE / "quality.jsonl", HERE / "quality.png")
    if (HERE / "night_run.jsonl").exists():
        draw_night(HERE / "night_run.jsonl", HERE / "night_run.png")
    stats = HERE.parent / "runs" / "demo" / "run" / "stats.jsonl"
    if stats.exists():
        draw_run(stats, HERE / "demo_run.png")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

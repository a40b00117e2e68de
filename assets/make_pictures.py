"""Draw the pictures of the README into this folder: the manifolds, and the loss of the demo's run if there is one.

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
from prime_telemetry import read_lines  # noqa: E402

COLOURS = {"prime-harmonic": "#1f6f8b", "linear": "#d1793b"}


def draw_manifolds(path: Path) -> None:
    """Value against index, and gap against value, of both tables."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.8), layout="constrained")
    for name in manifolds.NAMES:
        values = manifolds.build(name).values.numpy()
        indices = np.arange(-manifolds.INDEX_MAX - 1, manifolds.INDEX_MAX + 1)
        left.plot(indices, values, color=COLOURS[name], label=name, linewidth=1.6)
        half = values[manifolds.INDEX_MAX + 1 :].astype(np.float64)
        gaps, places = np.diff(half), half[1:]
        # The geometric mean over short stretches: single gaps of the nucleus scatter over four decades.
        edges = np.geomspace(1e-5, 1.0, 60)
        which = np.digitize(places, edges)
        centres = [places[which == b].mean() for b in range(1, 61) if (which == b).any()]
        means = [np.exp(np.log(gaps[which == b]).mean()) for b in range(1, 61) if (which == b).any()]
        right.plot(centres, means, color=COLOURS[name], label=name, linewidth=1.6)
    left.set(xlabel="grid index", ylabel="value", title="65,536 entries, zero at index 0")
    right.set(xscale="log", yscale="log", xlabel="value (share of the row's scale)", ylabel="gap to the next entry")
    right.set_title("resolution")
    for axis in (left, right):
        axis.grid(alpha=0.25)
        axis.legend(frameon=False)
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
    stats = HERE.parent / "runs" / "demo" / "run" / "stats.jsonl"
    if stats.exists():
        draw_run(stats, HERE / "demo_run.png")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

"""What a run needs of the memory, before it asks for any: a budget line by line, from shapes alone.

The model is built on the meta device, so nothing is allocated. Static lines are exact: they count tensors. Those of a
step follow the three places where memory peaks, of which only the largest counts because they follow one another: the
head (a slice of its weights, that slice's logits, and its weight gradient), the widest layer (its activations,
computed again in the backward pass, one slice of weights and one of weight gradients), and the forward pass of that
layer without checkpointing. What an allocator and a library add is an allowance, measured and named as such.

``qwen_prime_bench.py memory`` measures the same settings; the two are compared in README.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from transformers import PreTrainedModel

from ballots import VoteRule
from ghost_core import KEPT_LOGITS
from ghost_grid import SLICE_ELEMENTS, GhostGrid
from night_shift import LayerGroup, LayerPeel, layer_groups, untied_embeddings
from vote_rules import rule_named

GB = 1_000_000_000
"""Sizes are printed in decimal gigabytes, as models' and cards' makers count them."""
CUDA_CONTEXT = 450_000_000
"""Allowance for a CUDA context with cuBLAS; not measured here, 0.3 to 0.6 GB by card and driver."""
CUDA_HELD = 400_000_000
"""What torch's allocator holds on a card beyond what is in use: 0.22 to 0.40 GB on an H200, 1.5 and 1.7 B weights."""
CPU_KERNELS = 60_000_000
"""What kernels take that are compiled when they are first needed: 55 to 70 MB."""
ALLOWANCE = 0.10
"""Share of a step's activations and slices that allocators keep beyond what is in use."""


@dataclass(frozen=True)
class Settings:
    """What of a run decides its memory, and with ``grad_accum`` how many micro-batches make a step; fields as those of
    the trainer."""

    vote_rule: str = "momentum"
    vote_buffer: str | None = None
    seq_len: int = 512
    batch_size: int = 1
    grad_accum: int = 32
    peel: LayerPeel = field(default_factory=LayerPeel)
    gradient_checkpointing: bool = True
    compute: str = "float32"
    cuda: bool = False

    @property
    def rule(self) -> VoteRule:
        """The vote rule."""
        return rule_named(self.vote_rule, buffer=self.vote_buffer)

    @property
    def flags(self) -> str:
        """The settings as the trainer's flags."""
        window = f" --peel-window {self.peel.window}" if self.peel.window else ""
        buffer = f" --vote-buffer {self.vote_buffer}" if self.vote_buffer else ""
        parts = [f"--vote-rule {self.vote_rule}{buffer}", f"--peel {self.peel}{window}", f"--seq-len {self.seq_len}"]
        return " ".join([*parts, f"--batch-size {self.batch_size} --grad-accum {self.grad_accum}"])

    @property
    def tokens(self) -> int:
        """Positions in a step."""
        return self.seq_len * self.batch_size * self.grad_accum

    def of_rows(self, batch_size: int) -> Settings:
        """The same tokens a step in micro-batches of so many rows."""
        count = math.ceil(self.grad_accum * self.batch_size / batch_size)
        return replace(self, batch_size=batch_size, grad_accum=count)


@dataclass(frozen=True)
class Line:
    """One line of a budget."""

    what: str
    bytes: int
    note: str = ""


def most_open(peel: LayerPeel, layers: int) -> int:
    """The largest number of layers that a schedule ever opens together."""
    return min(peel.window or layers, layers)


def budget(model: PreTrainedModel, settings: Settings, open_layers: int | None = None) -> list[Line]:
    """What a run needs at its peak with the head and ``open_layers`` layers open (default: the most that the schedule
    ever opens).

    Args:
        model: ghost modules, on any device; meta will do.
    """
    *layers, top = layer_groups(model)
    count = most_open(settings.peel, len(layers)) if open_layers is None else open_layers
    opened = sorted(layers, key=_weights, reverse=True)[:count]
    # Whatever is open, at some time the lowest layer is; of less than a schedule opens it is not.
    bottom = count > 0 and (open_layers is None or count == len(layers))
    closed = [] if bottom else untied_embeddings(model)
    heard = {name: grid for name, grid in top.grids.items() if not any(grid is other for other in closed)}
    everything, voting = [*layers, top], [*opened, replace(top, grids=heard)]
    rule = settings.rule
    grids = [g for group in everything for g in group.grids.values()]
    floats = sum(p.numel() for group in everything for p in group.floats.values())
    open_floats = sum(p.numel() for group in voting for p in group.floats.values())
    open_weights, open_rows, open_columns = (sum(f(g) for g in voting) for f in (_weights, _rows, _columns))
    weights = sum(g.indices.numel() for g in grids)
    buffer, rows = rule.bytes_per_weight - 2, sum(map(_rows, everything))
    lines = [
        Line("indices", 2 * weights, f"{weights:,} weights x 2"),
        Line("votes", buffer * open_weights, f"{open_weights:,} open weights x {buffer}"),
        Line(
            "scales, rows and columns",
            4 * rows + _row_state(rule) * open_rows + 8 * len(rule.column_means) * open_columns,
            f"{open_rows:,} open rows",
        ),
        Line("norms and biases", 4 * floats + 12 * open_floats, "with gradient and AdamW"),
        Line("tables", _tables(grids[0]), f"manifold {grids[0].manifold.name}"),
    ]
    lines += _step_lines(model, settings, layers, top, count)
    if settings.cuda:
        lines.append(Line("held by torch, not in use", CUDA_HELD, "an allowance; less where memory is short"))
        lines.append(Line("CUDA context", CUDA_CONTEXT, "an allowance"))
    else:
        lines.append(Line("compiled kernels", CPU_KERNELS, "an allowance"))
    return lines


def _weights(group: LayerGroup) -> int:
    return sum(g.indices.numel() for g in group.grids.values())


def _rows(group: LayerGroup) -> int:
    return sum(g.shape[0] for g in group.grids.values())


def _columns(group: LayerGroup) -> int:
    return sum(g.shape[1] for g in group.grids.values())


def _row_state(rule: VoteRule) -> int:
    """Bytes per open row: means, sums, and what is computed from them once a step (yardstick, gain, push, inverse
    scale)."""
    return 4 * len(rule.row_means) + 8 * len(rule.row_sums) + 4 + 8 + (8 if rule.column_means else 0) + 8


def _tables(grid: GhostGrid) -> int:
    manifold = grid.manifold
    return sum(t.numel() * t.element_size() for t in vars(manifold).values() if hasattr(t, "element_size"))


def _step_lines(
    model: PreTrainedModel, settings: Settings, layers: Sequence[LayerGroup], top: LayerGroup, open_layers: int
) -> list[Line]:
    config: Any = model.config
    tokens = settings.seq_len * settings.batch_size
    hidden, width = config.hidden_size, 2 if settings.compute == "bfloat16" else 4
    row = 4 * tokens * hidden
    graph = len(layers) if open_layers == len(layers) else open_layers
    kept = (graph if settings.gradient_checkpointing else 0) * row
    heads = config.num_attention_heads
    # A CPU keeps attention's results and the logarithms of its sums, see packed_attention.
    again = 0 if settings.cuda else max(0, kept // row - 1)
    attended = again * tokens * heads * (_head_size(config) * width + 4)
    layer = _layer_bytes(config, tokens, width)
    widest = max((_slice(g) for group in layers for g in group.grids.values()), default=0)
    # Gradients come in the type of the products and are read as float32.
    dense, gradient = width, 4 if width == 4 else 4 + width
    # Dense weights and their gradient, or the next slice's weights beside this one's gradient.
    layer_peak = layer + widest * (dense + gradient if graph else dense)
    if settings.cuda and settings.gradient_checkpointing and graph:
        # A card keeps a layer's dense weights from its second forward pass to its backward pass.
        kept_weights = ([g.indices.numel() for g in group.grids.values()] for group in layers)
        layer_peak += width * max((sum(n for n in sizes if n <= SLICE_ELEMENTS) for sizes in kept_weights), default=0)
    if not settings.gradient_checkpointing:
        layer_peak += layer * max(0, graph - 1)
    head = max(top.grids.values(), key=lambda g: g.indices.numel())
    columns = min(max(1, SLICE_ELEMENTS // head.shape[1]), head.shape[0])
    # Logits, their softmax and its cast; weights and their gradient; the hidden states, normed, and their gradient.
    # A CPU makes the logits their own gradient.
    logits = tokens * columns * (8 if settings.cuda else width)
    # What waits of the other slices.
    logits += min(tokens * (head.shape[0] - columns) * width, KEPT_LOGITS)
    head_peak = logits + _slice(head) * (dense + gradient) + 4 * row
    if graph and settings.gradient_checkpointing:
        # The top layer is not computed again and waits, without the gradients that make up half of its share.
        head_peak += layer // 2
    mask = settings.batch_size * settings.seq_len**2 * 5
    peak, where = max((layer_peak, "in a layer"), (head_peak, "in the head"))
    lines = [
        Line("layer inputs kept for the backward pass", kept, f"{graph if kept else 0} x {tokens} x {hidden} x 4"),
        Line(
            "attention kept for the backward pass",
            attended,
            f"{again} layers computed again",
        ),
        Line("attention mask, hidden states", mask + 3 * row, ""),
        Line(f"activations and slices {where}", peak, "the larger of layer and head"),
    ]
    extra = math.ceil(ALLOWANCE * sum(line.bytes for line in lines))
    return [*lines, Line("allocators", extra, f"an allowance, {ALLOWANCE:.0%} of the four lines above")]


def _head_size(config: Any) -> int:
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def _layer_bytes(config: Any, tokens: int, width: int) -> int:
    """Activations of one decoder layer that its backward pass holds, with the gradients that meet them."""
    hidden = config.hidden_size
    size = _head_size(config)
    queries, keys = config.num_attention_heads * size, config.num_key_value_heads * size
    # Norms work in float32 whatever the products do: input, normed, scaled, twice; residuals and their gradients.
    norms = 4 * tokens * hidden * 10
    attention = width * tokens * (6 * queries + 8 * keys)
    # gate, up, silu(gate), their product; the gradients of the last three.
    mlp = width * tokens * config.intermediate_size * 7
    return norms + attention + mlp


def _slice(grid: GhostGrid) -> int:
    """Weights in the largest slice of a grid."""
    rows, columns = grid.shape
    return min(rows, max(1, SLICE_ELEMENTS // columns)) * columns


def total(lines: Sequence[Line]) -> int:
    """Sum of a budget in bytes."""
    return sum(line.bytes for line in lines)


def alternatives(settings: Settings) -> list[Settings]:
    """The settings themselves, then others in the order in which a user would give something up."""
    other = "compact" if settings.vote_rule != "compact" else "momentum"
    window = LayerPeel.parse("v7", 8)
    shorter = sorted({s for s in (settings.seq_len, 512, 384, 256) if s <= settings.seq_len}, reverse=True)
    found = [settings.of_rows(settings.batch_size >> k) for k in range(settings.batch_size.bit_length())]
    narrow = found[-1]
    for length in shorter:
        for peel in dict.fromkeys((settings.peel, window)):
            for rule in (settings.vote_rule, other):
                count = math.ceil(settings.tokens / length)
                buffer = settings.vote_buffer if rule == settings.vote_rule else None
                found.append(
                    replace(narrow, seq_len=length, grad_accum=count, peel=peel, vote_rule=rule, vote_buffer=buffer)
                )
    return list(dict.fromkeys(found))


def report(model: PreTrainedModel, settings: Settings, available: int) -> tuple[str, bool]:
    """The budget as text, whether it fits into ``available`` bytes, and which other settings do."""
    lines = budget(model, settings)
    layers = len(layer_groups(model)) - 1
    need = total(lines)
    width = max(len(line.what) for line in lines)
    out = [f"{line.what:<{width}}  {line.bytes / GB:7.3f} GB  {line.note}" for line in lines]
    out.append(f"{'total':<{width}}  {need / GB:7.3f} GB  {most_open(settings.peel, layers)} of {layers} layers open")
    if settings.peel.every:
        first = total(budget(model, settings, 0))
        out.append(f"{'before the first unlock':<{width}}  {first / GB:7.3f} GB")
    fits = need <= available
    out.append("")
    word = "fits" if fits else "does not fit"
    out.append(f"{word}: {need / GB:.2f} of {available / GB:.2f} GB ({available / 2**30:.4g} GiB)")
    out.append("")
    for other in alternatives(settings):
        size = total(budget(model, other))
        out.append(f"  {'fits        ' if size <= available else 'does not fit'}  {size / GB:6.2f} GB  {other.flags}")
    return "\n".join(out), fits

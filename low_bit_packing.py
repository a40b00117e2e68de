"""A checkpoint in low-bit grids, from settings: calibrate on a text, round to a size, heal by votes."""

from __future__ import annotations

import logging
from dataclasses import dataclass, fields
from itertools import islice
from pathlib import Path
from typing import Any, Literal

from tqdm import tqdm

from entropy_coding import encode
from low_bit import GROUPS, LowBitError, LowBitGrid
from low_bit_calibration import (
    measure,
    moment_bytes,
    plans_of,
    quantize,
    quantize_planned,
    stored_bytes,
    unrounded,
    without_text,
)
from low_bit_healing import heal, put_on_packed_grids, rounded_grids
from packed_batches import PackedBatches
from prime_pack import carrier
from qwen_prime_wrapper import model_from_checkpoint, tokenizer_from_checkpoint
from training_data import DataSettings, open_data
from training_recipe import Recipe

log = logging.getLogger("pack")

HEALING_ROOM = 0.015
"""Share of the bytes that is kept for what healing adds to the codes' entropy (0.5 to 1% measured)."""


@dataclass(frozen=True, kw_only=True)
class LowBitSettings:
    """How small, on what text, and how long to heal."""

    bits: float | None = None
    """Mean bits a weight, scales, norms and embeddings included, the tokenizer not: 8, 6, 5, 4, 3 or between."""
    group: int = 0
    """Weights of a row that share a scale: 32, 64, 128, or 0 for the whole row."""
    table: Literal["linear", "compact", "prime-harmonic"] = "linear"
    """Table of values behind the codes; see low_bit.py."""
    data: Path | None = None
    """Records or text on which to find out how fine each weight must be, and on which to heal; as for the trainer."""
    calibration_tokens: int = 65536
    """How much of it to read for that."""
    heal: int = 0
    """Steps of training by votes on the packed grid."""
    heal_lr: float | None = None
    """Learning rate of these steps; by default the trainer's."""
    seq_len: int = 512
    """Tokens in a row of --data."""
    grad_accum: int = 8
    """Rows in a step of --heal."""
    seed: int = 0
    """Of the order of --data and of the rounding while healing."""

    def __post_init__(self) -> None:
        given = [f.name for f in fields(LowBitSettings) if f.name != "bits" and getattr(self, f.name) != f.default]
        if self.bits is None and given:
            names = ", ".join(name.replace("_", "-") for name in given)
            raise ValueError(f"{names}: only for --bits; without it packing is lossless")
        if self.bits is not None and not 1.5 <= self.bits <= 9:
            raise ValueError(f"bits is {self.bits}, expected 1.5 to 9; without --bits packing is lossless")
        if self.group not in GROUPS:
            raise ValueError(f"group is {self.group}, expected one of {', '.join(map(str, GROUPS))}")
        if self.heal < 0 or self.calibration_tokens < 1 or self.seq_len < 2 or self.grad_accum < 1:
            raise ValueError("heal, calibration-tokens, seq-len and grad-accum are expected to be positive")
        if self.heal and self.data is None:
            raise ValueError("heal needs --data to learn from")


def weights_of(checkpoint: dict[str, Any]) -> int:
    """Parameters of a checkpoint's model; row scales are part of the format and not counted."""
    return sum(t.numel() for n, t in checkpoint["model"].items() if not n.endswith(".grid.scale"))


def low_bit_grids(
    checkpoint: dict[str, Any], settings: LowBitSettings
) -> tuple[dict[str, LowBitGrid], dict[str, Any], dict[str, Any]]:
    """The grids of a checkpoint in codes of ``settings.bits``.

    Returns:
        The grids by name; the checkpoint with the norms and biases that go with them (which healing trains); and
        notes on how they were made, plain values.

    Raises:
        LowBitError: the size or a group does not fit the model.
        DataError, ModelError, TrainError: of data, model and healing.
    """
    if settings.bits is None:
        raise LowBitError("low-bit grids need bits, got none")
    model = model_from_checkpoint(checkpoint)
    floats = sum(len(encode(carrier(t))) for n, t in checkpoint["model"].items() if ".grid." not in n)
    budget = int(settings.bits * weights_of(checkpoint) / 8) - floats
    notes = {f.name: getattr(settings, f.name) for f in fields(LowBitSettings)}
    notes["data"] = settings.data.name if settings.data else None
    if settings.data is None:
        grids = quantize(model, without_text(model), budget, group=settings.group, name=settings.table)
        return grids, checkpoint, notes
    tokenizer = tokenizer_from_checkpoint(checkpoint)
    seq_len = min(settings.seq_len, model.config.max_position_embeddings)
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    data = open_data(settings.data, None, tokenizer, seq_len, DataSettings(), settings.seed)
    log.info("%s", data.summary)

    def batches(seed: int) -> PackedBatches:
        return PackedBatches(data.blocks, seq_len=seq_len, batch_size=1, pad_id=pad, seed=seed)

    rows = islice((b for b in batches(settings.seed) if b.answer_tokens), -(-settings.calibration_tokens // seq_len))
    log.info("calibration holds %.1f GB of second moments beside the model", moment_bytes(model) / 1e9)
    plans = plans_of(model, measure(model, rows), settings.group)
    room = int(budget * (1 - HEALING_ROOM)) if settings.heal else budget
    grids = quantize_planned(model, plans, room, name=settings.table)
    if not settings.heal:
        return grids, checkpoint, notes
    recipe = Recipe(
        steps=settings.heal,
        grad_accum=settings.grad_accum,
        lr=settings.heal_lr,
        warmup=max(1, settings.heal // 10),
        # The packed grids vote on the table that the checkpoint's own are on.
        vote_rule="compact" if checkpoint["manifold"]["vote_bits"] else "momentum",
        gradient_checkpointing=False,
        seed=settings.seed,
        device=str(model.device),
    )
    put_on_packed_grids(model, grids, lambda grid, packed: unrounded(grid, packed, plans[grid.name]))
    steps = heal(model, batches(settings.seed + 1), recipe)
    losses = list(tqdm(steps, total=settings.heal, desc="heal", unit="step", disable=None))
    log.info("healed by votes: loss %.4f at the first step, %.4f at the last", losses[0], losses[-1])
    grids = rounded_grids(model)
    excess = sum(stored_bytes(grid) for grid in grids.values()) / budget - 1
    if excess > 0:
        log.warning("healing made the codes richer: the file is %.1f%% above --bits", 100 * excess)
    learned = {name: p.detach() for name, p in model.named_parameters()}
    return grids, {**checkpoint, "model": {**checkpoint["model"], **learned}}, notes

"""Check a PRIME checkpoint: named checks, each with its value and limit; exit code 0 only if all of them pass.

    python verify_qwen_prime.py coder_prime_init.pt
    python verify_qwen_prime.py coder_prime_init.pt --reference Qwen/Qwen2.5-Coder-1.5B-Instruct

Without a reference: the file (hash, contract, tensor hashes), the manifold, every tensor, the votes, and the running
model (logits finite, later tokens do not move earlier logits). A checkpoint straight from the importer also carries
probes, one product per row taken from the source before conversion, so a lost bias, a permuted row or a wrong scale
shows without the source. With a reference the model is compared with it on text: KL, loss, top-1 agreement, and SNR
tensor by tensor.
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm
from transformers import PreTrainedModel

import manifolds
import prime_cli
from ghost_core import grids_of
from ghost_grid import GhostGrid
from model_checks import Check, check_forward, show
from prime_checkpoint import (
    CheckpointError,
    changed_tensors,
    check_file,
    load_checkpoint,
    one_line,
    probe,
    probe_vector,
)
from qwen_prime_wrapper import (
    ModelError,
    build_model,
    load_model,
    locate_source,
    manifold_of,
    model_from_checkpoint,
    source_name,
    tensor_mismatches,
    tokenizer_from_checkpoint,
)
from whole_output import OutputError, check_writable

log = logging.getLogger("verify")

KL_LIMIT = {0: 1e-7, 6: 1e-4}
"""Nats per token, by the manifold's vote bits: ten bits of index cost about what rounding to bf16 costs."""
LOSS_LIMIT = {0: 1e-5, 6: 1e-3}
"""Nats per token, over the default number of tokens or more; see :func:`loss_limit`."""
TOP1_LIMIT = {0: 0.999, 6: 0.99}
COARSE_ENTROPY_LIMIT = 2.0
"""Bits of entropy of the coarse coordinate below which a tensor counts as collapsed; trained ones have about 6."""
ROW_NOISE_LIMIT = 8.0
"""How many standard deviations of rounding noise a row's probe may be off."""
_TOKENS = 8192
_TEXT = Path(__file__).resolve().parent / "assets" / "stdlib_instruct.jsonl"
"""Its held-out answers are compared on where no text is given. They stay as they are: of a sound import the difference
of losses is noise, and a text that is edited would decide now and then whether it is within its limit."""


@dataclass(frozen=True)
class VerifyConfig:
    """Check a PRIME checkpoint."""

    checkpoint: prime_cli.PositionalPath
    """The .pt file."""
    reference: str | None = None
    """Folder or hub id of the source model, to compare with."""
    text: Path | None = None
    """Text for the comparison; by default functions of Python's library, held-out answers of the demo's data."""
    tokens: int = _TOKENS
    """How many tokens of the text to compare on."""
    json: Path | None = None
    """Also write the result as JSON."""

    def __post_init__(self) -> None:
        if self.tokens < 16:
            raise ValueError(f"tokens is {self.tokens}, expected at least 16")


def short(name: str) -> str:
    """A tensor's name without what all of them share."""
    for part in ("model.", ".grid.indices", ".grid", ".weight"):
        name = name.removeprefix(part).removesuffix(part)
    return name


# -- what needs only the tensors --------------------------------------------------------------------------------------


def check_manifold(checkpoint: dict[str, Any]) -> list[Check]:
    """The recorded table is strictly increasing, antisymmetric, and the one that its name builds."""
    recorded = checkpoint["manifold"]
    values = recorded["values"]
    # With vote bits the table rises by levels: between the middles of their runs.
    steps = values[:: 1 << recorded["vote_bits"]].diff()
    falling = int((~(steps > 0)).sum()) + int((values.diff() < 0).sum())
    checks = [Check("manifold.monotone", falling == 0, falling, 0, "steps that do not rise")]
    if recorded["name"] not in manifolds.NAMES:
        known = ", ".join(manifolds.NAMES)
        checks.append(Check("manifold.recorded", False, recorded["name"], known, "unknown name"))
        return checks
    table = manifolds.build(recorded["name"])
    built = table.sha256
    own = manifolds.fingerprint(values)
    same = built == recorded["sha256"] == own and table.vote_bits == recorded["vote_bits"]
    detail = "" if same else f"table {own[:12]}, recorded {recorded['sha256'][:12]}, {recorded['name']} is {built[:12]}"
    checks.append(Check("manifold.recorded", same, recorded["sha256"][:12], built[:12], detail))
    return checks


def check_tensors(checkpoint: dict[str, Any]) -> list[Check]:
    """Tensors fit the config; scales, floats and indices are in range; no index distribution has collapsed."""
    manifold = manifold_of(checkpoint)
    model = build_model(checkpoint["hf_config"], manifold, "the checkpoint's config")
    tensors = checkpoint["model"]
    wrong = tensor_mismatches(model, tensors)
    tied = bool(getattr(model.config, "tie_word_embeddings", False))
    listed = any(name.startswith("lm_head.grid") for name in tensors)
    word = "tied" if tied else "untied"
    checks = [
        Check("tensors.fit_config", not wrong, len(wrong), 0, "; ".join(wrong[:3])),
        Check("tensors.head", listed != tied, f"{'own' if listed else 'no'} head", word),
    ]
    scales = {n: t for n, t in tensors.items() if n.endswith(".grid.scale")}
    floats = {n: t for n, t in tensors.items() if not n.endswith((".grid.scale", ".grid.indices"))}
    indices = {n: t for n, t in tensors.items() if n.endswith(".grid.indices")}
    bad_scales = [n for n, t in scales.items() if not bool((torch.isfinite(t) & (t > 0)).all())]
    checks.append(Check("scales.positive", not bad_scales, len(bad_scales), 0, ", ".join(bad_scales[:3])))
    bad_floats = [n for n, t in floats.items() if not bool(torch.isfinite(t).all())]
    checks.append(Check("floats.finite", not bad_floats, len(bad_floats), 0, ", ".join(bad_floats[:3])))
    unused = {n: manifold.unused(t) for n, t in indices.items()}
    checks.append(
        Check("indices.range", not any(unused.values()), sum(unused.values()), 0, "words that nothing ever writes")
    )
    entropies = {n: coarse_entropy(t) for n, t in indices.items()}
    known = {n: e for n, e in entropies.items() if e is not None}
    lowest = min(known, key=known.__getitem__, default=None)
    value = known[lowest] if lowest else math.inf
    checks.append(
        Check(
            "indices.distribution",
            value >= COARSE_ENTROPY_LIMIT,
            round(value, 2) if lowest else None,
            COARSE_ENTROPY_LIMIT,
            f"coarse entropy in bits, {short(lowest)}" if lowest else "all weights are zero",
        )
    )
    return checks


def coarse_entropy(indices: torch.Tensor) -> float | None:
    """Entropy in bits of the coarse coordinate over the rows that are not all zero; None where every row is."""
    counts = torch.zeros(256, dtype=torch.int64)
    step = max(1, (1 << 24) // max(1, indices.shape[1]))
    for start in range(0, len(indices), step):
        part = indices[start : start + step]
        part = part[(part != 0).any(1)]
        counts += torch.bincount((part >> 8).reshape(-1).int() + 128, minlength=256)
    if counts.sum() == 0:
        return None
    share = counts[counts > 0].double() / counts.sum()
    return float(-(share * share.log2()).sum())


def check_votes(checkpoint: dict[str, Any]) -> Check:
    """An imported checkpoint has no votes and no training state; a trained one has votes of its own grids only."""
    votes = checkpoint["votes"]
    if checkpoint["stage"] == "init":
        left = sorted(votes) + (["train_state"] if checkpoint["train_state"] else [])
        words = checkpoint["model"] if checkpoint["manifold"]["vote_bits"] else {}
        table = manifold_of(checkpoint)
        left += [n for n, t in words.items() if n.endswith(".grid.indices") and bool(table.votes(t).any())]
        return Check("votes.absent", not left, len(left), 0, ", ".join(left[:3]))
    means = {n: torch.cat([s[k] for k in ("r1", "r2", "g2", "c2") if k in s]) for n, s in votes.items()}
    bad = [n for n, r in means.items() if bool((r < 0).any()) or not bool(torch.isfinite(r).all())]
    return Check("votes.sound", not bad, len(bad), 0, ", ".join(bad[:3]) or f"{len(votes)} grids are open")


def check_probes(checkpoint: dict[str, Any], model: PreTrainedModel) -> Check:
    """Every row's product with the fixed signs is what the source gave, to within the noise of rounding."""
    probes = checkpoint["probes"]
    tensors = {source_name(n): n for n in checkpoint["model"] if not n.endswith(".grid.scale")}
    missing = sorted(set(tensors) ^ set(probes))
    if missing:
        return Check("probes.match", False, len(missing), 0, f"no pair of tensor and probe: {', '.join(missing[:3])}")
    gap = float(manifolds.build(checkpoint["manifold"]["name"]).values.diff().max())
    grids = grids_of(model)
    worst, where = 0.0, ""
    for origin, name in tensors.items():
        stored = probes[origin]
        if name.endswith(".grid.indices"):
            grid = grids[name.removesuffix(".indices")]
            found = torch.cat([probe(grid.dequantize(rows)) for rows in grid.slices()])
            noise = grid.scale * (gap / math.sqrt(12) + 1e-6) * probe_vector(grid.shape[1]).norm()
        else:
            found = probe(checkpoint["model"][name])
            noise = checkpoint["model"][name].square().sum().sqrt()[None] * 1e-6 + 1e-30
        if found.shape != stored.shape:
            return Check("probes.match", False, str(tuple(stored.shape)), str(tuple(found.shape)), origin)
        off = (found - stored).abs() / noise
        off = torch.where(torch.isfinite(off), off, torch.inf)
        at = int(off.argmax())
        if float(off[at]) > worst:
            worst, where = float(off[at]), f"{short(origin)} row {at}"
    return Check(
        "probes.match", worst <= ROW_NOISE_LIMIT, round(worst, 2), ROW_NOISE_LIMIT, f"sigmas of rounding, {where}"
    )


# -- against the source -----------------------------------------------------------------------------------------------


def reference_text(config: VerifyConfig) -> str:
    """The text to compare on: the file asked for, or functions that do not change with this suite."""
    file = config.text or _TEXT
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ModelError(f"cannot read {file}: {error}; give --text another one") from error
    if config.text is not None:
        return text
    rows = map(json.loads, text.splitlines())
    return "\n\n".join(row["output"] for row in rows if row["split"] == "eval")


def loss_limit(scored: int, vote_bits: int) -> float:
    """How far the mean loss of so many tokens may be from the source's, in nats, for the manifold's vote bits.

    A right import's difference is noise of about sqrt(2 KL / tokens), so fewer tokens than the default's get five
    standard deviations of what they add to it.
    """
    added = max(0.0, 1 / max(scored, 1) - 1 / _TOKENS)
    return max(LOSS_LIMIT[vote_bits], 5 * math.sqrt(2 * KL_LIMIT[vote_bits] * added))


@torch.no_grad()
def compare_on_text(
    model: PreTrainedModel, source: PreTrainedModel, ids: torch.Tensor, strict: bool, vote_bits: int = 0
) -> list[Check]:
    """KL, loss difference and top-1 agreement over windows of the context (at most 512 tokens).

    Args:
        ids: int64 ``(tokens,)``.
        strict: hold the values against the limits of a conversion; else they are only reported.
        vote_bits: those of the manifold, which decide the limits.
    """
    window = min(512, model.config.max_position_embeddings)
    kl = difference = same = 0.0
    count = scored = 0
    for start in tqdm(range(0, len(ids), window), desc="compare", unit="window", disable=None):
        piece = ids[None, start : start + window]
        ours = model(input_ids=piece, use_cache=False).logits[0]
        theirs = source(input_ids=piece, use_cache=False).logits[0]
        for a in range(0, len(ours), 64):
            # Float64 a few rows at a time: at 1e-8 nats the rounding of float32 would be what is measured.
            p = theirs[a : a + 64].double().log_softmax(-1)
            q = ours[a : a + 64].double().log_softmax(-1)
            kl += float((p.exp() * (p - q)).sum())
            same += int((p.argmax(-1) == q.argmax(-1)).sum())
            targets = piece[0, a + 1 : a + 65]
            rows = torch.arange(len(targets))
            difference += float((p[rows, targets] - q[rows, targets]).sum())
            scored += len(targets)
            count += len(p)
    kl, difference, same = kl / count, difference / max(scored, 1), same / count
    detail = f"over {count} tokens"
    kl_limit, most = KL_LIMIT[vote_bits], loss_limit(scored, vote_bits)
    # Two tokens that are equally likely are no mistake, and of a few hundred one alone would be below the limit.
    top1_limit = min(TOP1_LIMIT[vote_bits], (count - 1) / count)

    def judge(name: str, value: float, limit: float, good: bool, words: str) -> Check:
        return Check(name, good or not strict, value, limit if strict else None, words)

    return [
        judge("reference.kl", kl, kl_limit, kl <= kl_limit, f"mean KL to the source, nats, {detail}"),
        judge(
            "reference.loss",
            difference,
            most,
            abs(difference) <= most,
            f"against the source, nats, {detail}",
        ),
        judge("reference.top1", same, top1_limit, same >= top1_limit, f"same top token, {detail}"),
    ]


def compare_tensors(model: PreTrainedModel, source: PreTrainedModel, strict: bool) -> list[Check]:
    """SNR of every dequantized matrix against the source, and equality of everything kept in float."""
    theirs = source.state_dict()
    limit = next(iter(grids_of(model).values())).manifold.snr_limit_db
    lowest, where = math.inf, ""
    for name, grid in grids_of(model).items():
        snr = grid_snr(grid, theirs[source_name(f"{name}.indices")])
        if snr < lowest:
            lowest, where = snr, name
    checks = [
        Check(
            "reference.snr_db",
            lowest >= limit or not strict,
            round(lowest, 2) if math.isfinite(lowest) else None,
            limit if strict else None,
            f"lowest, {short(where)}",
        )
    ]
    different = [n for n, p in model.named_parameters() if not torch.equal(p.detach(), theirs[n].float())]
    checks.append(
        Check(
            "reference.floats",
            not different or not strict,
            len(different),
            0 if strict else None,
            "; ".join(different[:3]),
        )
    )
    return checks


def check_same_model(model: PreTrainedModel, source: PreTrainedModel) -> None:
    """The reference has the weights that the checkpoint has, in the same shapes.

    Raises:
        ModelError: naming the first that differs.
    """
    ours: dict[str, tuple[int, ...]] = {source_name(f"{n}.indices"): g.shape for n, g in grids_of(model).items()}
    ours |= {name: tuple(p.shape) for name, p in model.named_parameters()}
    theirs = {name: tuple(p.shape) for name, p in source.named_parameters()}
    for name in sorted(ours.keys() | theirs.keys()):
        if ours.get(name) != theirs.get(name):
            raise ModelError(f"the reference is another model: {name} is {theirs.get(name)}, here {ours.get(name)}")


def grid_snr(grid: GhostGrid, weights: torch.Tensor) -> float:
    """SNR in dB of a grid against a dense matrix; infinite where nothing differs."""
    noise = signal = 0.0
    for rows in grid.slices():
        dense = weights[rows].double()
        noise += float((dense - grid.dequantize(rows).double()).square().sum())
        signal += float(dense.square().sum())
    return math.inf if noise == 0 else 10 * math.log10(max(signal, 1e-300) / noise)


# -- all of it --------------------------------------------------------------------------------------------------------


def _guard(name: str, function: Callable[[], Any], checks: list[Check]) -> Any:
    """Run one group of checks; an error of the suite's own becomes a failed check of that name."""
    try:
        result = function()
    except (CheckpointError, ModelError, manifolds.ManifoldError) as error:
        checks.append(Check(name, False, None, None, str(error)))
        return None
    if isinstance(result, Check):
        checks.append(result)
    elif isinstance(result, list):
        checks.extend(result)
    return result


def verify(config: VerifyConfig) -> list[Check]:
    """All checks of a checkpoint; those that an earlier failure makes meaningless are left out."""
    path = config.checkpoint
    checks: list[Check] = []
    digest = _guard("file.hash", lambda: check_file(path), checks)
    if digest is None:
        return checks
    checks.append(Check("file.hash", True, digest[:12], digest[:12], "all bytes"))
    checkpoint = _guard("file.contract", lambda: load_checkpoint(path, check_hash=False), checks)
    if checkpoint is None:
        return checks
    checks.append(Check("file.contract", True, checkpoint["stage"], "init or train"))
    wrong = changed_tensors(checkpoint)
    checks.append(Check("tensors.hash", not wrong, len(wrong), 0, ", ".join(wrong[:3])))
    for name, part in (("manifold", check_manifold), ("tensors", check_tensors), ("votes", check_votes)):
        _guard(name, partial(part, checkpoint), checks)
    if not all(c.passed for c in checks):
        return checks

    tokenizer = _guard("tokenizer", lambda: tokenizer_from_checkpoint(checkpoint), checks)
    model = _guard("model", lambda: model_from_checkpoint(checkpoint, copy=False), checks)
    if tokenizer is not None:
        size = checkpoint["hf_config"]["vocab_size"]
        checks.append(Check("tokenizer", len(tokenizer) <= size, len(tokenizer), size, "entries, vocabulary"))
    if model is None:
        return checks
    if checkpoint["stage"] == "init":
        _guard("probes.match", lambda: check_probes(checkpoint, model), checks)
    _guard("model", lambda: check_forward(model), checks)
    reference = config.reference
    if reference is not None and tokenizer is not None:

        def against_reference() -> list[Check]:
            source, _, _ = load_model(locate_source(reference)[0])
            check_same_model(model, source)
            strict = checkpoint["stage"] == "init"
            ids = torch.tensor(
                tokenizer(reference_text(config), add_special_tokens=False, verbose=False)["input_ids"][: config.tokens]
            )
            if len(ids) < 16:
                raise ModelError(f"the text has {len(ids)} tokens, expected at least 16")
            bits = checkpoint["manifold"]["vote_bits"]
            return compare_tensors(model, source, strict) + compare_on_text(model, source, ids, strict, bits)

        _guard("reference", against_reference, checks)
    return checks


def main(config: VerifyConfig) -> int:
    if config.json:
        try:
            check_writable(config.json)
        except OutputError as error:
            raise ModelError(str(error)) from error
    checks = verify(config)
    passed = all(c.passed for c in checks)
    if config.json:
        # JSON has no NaN and no infinity: such a value is written as a word.
        lines = [asdict(c) for c in checks]
        for line in lines:
            if isinstance(line["value"], float) and not math.isfinite(line["value"]):
                line["value"] = str(line["value"])
        text = json.dumps({"passed": passed, "checks": lines}, indent=2, allow_nan=False)
        try:
            config.json.write_text(text + "\n", encoding="utf-8")
        except OSError as error:
            raise ModelError(f"cannot write {config.json}: {one_line(error)}") from error
    show(checks, str(config.checkpoint))
    return 0 if passed else 1


if __name__ == "__main__":
    raise SystemExit(prime_cli.run(VerifyConfig, main, (CheckpointError, ModelError)))

"""What a model can do, measured the same way each time: perplexity, a small suite of prompts, invariants, one report.

Three sizes. ``tiny`` fits beside every save of a run: the invariants of ``model_checks`` and a prompt of each category
with short answers. ``quick`` ends a run: all prompts. ``core`` is what ``qwen_prime_eval.py --core`` adds files to:
text, records, HumanEval. All of it is greedy and pinned: prompts by their hash, the rest by what a report records.

A report is a JSON object (``EVAL_name_step.json`` beside the checkpoint). Its ``scores`` map a name to a number, null
(could not be computed) or ``[passed, total]``; the monitor shows and ``compare`` subtracts them without knowing any.

Text is scored by one of two protocols. Windows that do not overlap: the first token of a window is context only, every
other one is scored; the plainest number, a little high because contexts are short. With a stride, as in Hugging Face's
recipe, each window scores only the tokens that the one before it has not, so contexts are at least window - stride
long. Bits per byte divides by the bytes of the text that the scored tokens stand for, so tokenizers can be compared.
"""

from __future__ import annotations

import hashlib
import json
import math
import platform
import re
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import transformers
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from answer_masks import tokenizer_fingerprint
from model_checks import Check, check_model
from qwen_prime_wrapper import answer_loss, continue_texts
from text_records import DataError

FORMAT = "qwen-prime-eval"
VERSION = 1
SUITE = Path(__file__).resolve().parent / "assets" / "micro_suite.jsonl"
SUITE_SHA256 = "5117016906541133230bbdd467f871edd124eb2e6c2951ea1f7811b394475829"

_SHORT = 32
"""Tokens of an answer that a tiny evaluation waits for."""

Size = Literal["tiny", "quick", "core"]
Score = float | int | None | list[int]


# -- prompts ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Prompt:
    """One question of the suite; ``kind`` and ``wanted`` are its check."""

    id: str
    category: str
    prompt: str
    kind: Literal["answer", "number", "pattern"]
    wanted: str | tuple[str, ...]
    tokens: int

    def passes(self, text: str) -> bool:
        """Whether a model's text answers the question; see ``assets/make_micro_suite.py``."""
        text = re.sub(r"<think>.*?</think>", "", text, flags=re.DOTALL)
        if self.kind == "pattern":
            return re.search(str(self.wanted), text, re.DOTALL) is not None
        if self.kind == "number":
            numbers = re.findall(r"-?\d+(?:\.\d+)?", re.sub(r"(?<=\d),(?=\d{3}\b)", "", text))
            return bool(numbers) and float(numbers[-1]) == float(str(self.wanted))
        line = next((line for line in text.splitlines() if re.search(r"\w", line)), "")
        words = re.findall(r"\w+", line.lower())
        return bool(words) and words[-1] in self.wanted


def load_suite(size: Size = "core") -> list[Prompt]:
    """The prompts of that size.

    Raises:
        DataError: the file is not the one that this version pins.
    """
    try:
        data = SUITE.read_bytes()
    except OSError as error:
        raise DataError(f"cannot read {SUITE}: {error.strerror}") from error
    found = hashlib.sha256(data).hexdigest()
    if found != SUITE_SHA256:
        raise DataError(
            f"{SUITE} has SHA-256 {found[:12]}..., pinned is {SUITE_SHA256[:12]}...: scores would not compare; restore "
            "the file, or make it with assets/make_micro_suite.py"
        )
    prompts = []
    for line in data.decode().splitlines():
        item = json.loads(line)
        wanted = item["check"]["wanted"]
        prompts.append(
            Prompt(
                item["id"],
                item["category"],
                item["prompt"],
                item["check"]["kind"],
                tuple(wanted) if isinstance(wanted, list) else wanted,
                item["tokens"],
            )
        )
    if size != "tiny":
        return prompts
    short = [p for p in prompts if p.tokens <= _SHORT]
    return list({p.category: p for p in reversed(short)}.values())[::-1]


def ask(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[Prompt], batch_size: int = 8
) -> dict[str, str]:
    """Greedy answers by prompt id, through the chat template where there is one."""
    answers: dict[str, str] = {}
    for length in sorted({p.tokens for p in prompts}):
        group = [p for p in prompts if p.tokens == length]
        ids: list[list[int]] = []
        for prompt in group:
            text = prompt.prompt + "\n"
            if tokenizer.chat_template is not None:
                turn = [{"role": "user", "content": prompt.prompt}]
                # Where a template can do without a thought (Qwen3), it should: the answers are short.
                text = str(
                    tokenizer.apply_chat_template(
                        turn, tokenize=False, add_generation_prompt=True, enable_thinking=False
                    )
                )
            ids.append(list(tokenizer(text, add_special_tokens=False)["input_ids"]))
        texts = continue_texts(model, tokenizer, ids, length, batch_size, "ask")
        answers.update(zip((p.id for p in group), texts, strict=True))
    return answers


# -- text -------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def score_text(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    text: str,
    *,
    window: int | None = None,
    stride: int | None = None,
) -> dict[str, Any]:
    """Loss of a text, by one of the module's two protocols.

    Args:
        window: tokens of a window, by default the model's context.
        stride: tokens between the beginnings of windows; None for windows that do not overlap.

    Raises:
        DataError: a text of less than two tokens, or a window that the model does not have.
    """
    context = model.config.max_position_embeddings
    window = window or context
    if not 2 <= window <= context or not 1 <= (stride or 1) <= window:
        raise DataError(
            f"window is {window} and stride {stride}, expected a window of 2 to {context} tokens (the model's context) "
            "and a stride of at most that"
        )
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    ids = torch.tensor(encoded["input_ids"], dtype=torch.int64)
    offsets = encoded["offset_mapping"]
    if len(ids) < 2:
        raise DataError(f"the text has {len(ids)} tokens, expected at least 2")
    nats, tokens, scored_bytes, scored_to = 0.0, 0, 0, 0
    starts = range(0, len(ids), stride or window)
    for start in tqdm(starts, desc="score", unit="window", leave=False, disable=None):
        stop = min(start + window, len(ids))
        piece = ids[None, start:stop].to(model.device)
        if piece.shape[1] < 2:
            break
        labels = piece.clone()
        if stride is not None and start:
            # Tokens that the window before has scored are context here.
            labels[:, : scored_to - start] = -100
        loss, count = answer_loss(model, piece, labels)
        nats += float(loss)
        tokens += count
        first = max(start + 1, scored_to if stride is not None else 0)
        scored_bytes += len(text[offsets[first - 1][1] : offsets[stop - 1][1]].encode()) if first < stop else 0
        scored_to = stop
        if stride is not None and stop == len(ids):
            break
    mean = nats / tokens
    return {
        "nll_per_token": mean,
        "perplexity": math.exp(min(mean, 700.0)),
        "bits_per_byte": nats / math.log(2) / max(1, scored_bytes),
        "tokens": tokens,
        "bytes": scored_bytes,
        "window": window,
        "stride": stride,
    }


# -- reports ----------------------------------------------------------------------------------------------------------


def evaluate(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, size: Size, *, batch_size: int = 8
) -> tuple[dict[str, Score], dict[str, Any]]:
    """Invariants and prompts of that size: scores, and the details behind them."""
    checks = check_model(model, tokenizer)
    prompts = load_suite(size)
    answers = ask(model, tokenizer, prompts, batch_size)
    passed = {p.id: p.passes(answers[p.id]) for p in prompts}
    totals = Counter(p.category for p in prompts)
    right = Counter(p.category for p in prompts if passed[p.id])
    scores: dict[str, Score] = {"invariants": [sum(c.passed for c in checks), len(checks)]}
    scores["suite"] = [sum(passed.values()), len(prompts)]
    scores |= {f"suite.{name}": [right[name], totals[name]] for name in totals}
    details = {
        "invariants": [_plain(check) for check in checks],
        "answers": [{"id": p.id, "passed": passed[p.id], "text": answers[p.id]} for p in prompts],
    }
    return scores, details


def _plain(check: Check) -> dict[str, Any]:
    """A check as JSON has it."""
    line = asdict(check)
    if isinstance(line["value"], float) and not math.isfinite(line["value"]):
        line["value"] = str(line["value"])
    return line


def make_report(
    *,
    kind: Size,
    name: str,
    step: int | None,
    model: Mapping[str, Any],
    tokenizer: PreTrainedTokenizerBase,
    scores: Mapping[str, Score],
    details: Mapping[str, Any],
    settings: Mapping[str, Any],
) -> dict[str, Any]:
    """A report, ready to be written as JSON.

    Args:
        model: what was measured: path, kind of file, SHA-256.
        settings: what else decides the numbers: windows, dtype, hashes of data.
    """
    finite = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in scores.items()}
    return {
        "format": FORMAT,
        "version": VERSION,
        "kind": kind,
        "name": name,
        "step": step,
        "model": dict(model),
        "scores": finite,
        "details": dict(details),
        "settings": {
            **settings,
            "suite_sha256": SUITE_SHA256,
            "tokenizer_sha256": tokenizer_fingerprint(tokenizer),
            "decoding": "greedy",
            "torch": str(torch.__version__),
            "transformers": transformers.__version__,
            "python": platform.python_version(),
            "machine": platform.machine(),
            "platform": sys.platform,
        },
    }


def report_name(stem: str) -> str:
    """Name of the report beside a checkpoint: ``x_prime_step_7`` becomes ``EVAL_x_step_7.json``."""
    return f"EVAL_{stem.replace('_prime_', '_')}.json"


def name_and_step(stem: str) -> tuple[str, int | None]:
    """Name and step in a checkpoint's file name; for a report's title only, nothing is inferred from it."""
    found = re.fullmatch(r"(.+?)_prime_step_(\d+)", stem)
    return (found[1], int(found[2])) if found else (stem, None)


def compare(reports: Sequence[Mapping[str, Any]]) -> list[tuple[str, list[str], str]]:
    """Rows (score, its value in each report, difference of the last to the first) over all scores of the reports."""
    rows = []
    for name in dict.fromkeys(key for report in reports for key in report["scores"]):
        values = [report["scores"].get(name) for report in reports]
        rows.append((name, [shown(v) for v in values], _difference(values[0], values[-1])))
    return rows


def shown(score: Score) -> str:
    """A score as text."""
    if score is None:
        return "-"
    if isinstance(score, list):
        return f"{score[0]} of {score[1]}"
    return f"{score:.4f}" if isinstance(score, float) else f"{score:,}"


def _difference(first: Score, last: Score) -> str:
    if isinstance(first, list) and isinstance(last, list) and first[1] == last[1]:
        return f"{last[0] - first[0]:+d}"
    if isinstance(first, int | float) and isinstance(last, int | float):
        return f"{last - first:+.4f}" if isinstance(first, float) else f"{last - first:+d}"
    return ""

"""What must hold of any model and tokenizer, trained or not: named checks, each with its value and limit.

A tokenizer gives text back, its special tokens are one token each, its template renders an answer where the trainer
finds it. A model's logits are finite; later tokens do not move earlier ones; documents packed into a row do not see
each other; a cache changes nothing. None of these depends on what the model knows, so a failure is a defect of the file
or of this program, never of the training data.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from answer_masks import END_OF_DOCUMENT, END_OF_TURN, encode_conversation
from text_records import DataError

CAUSAL_LIMIT = 1e-4
"""Largest movement of logits, as a share of the largest logit, that is rounding."""
_TEXTS = (
    "Hello, world! 1234567890 0.5e-3",
    "def f(x):\n\tif x:\n        return [x, *{1: 'a'}]  # done\n",
    "  leading and trailing  ",
    "\n\n\r\n\t mixed \u00a0 white\u2003space",
    "caf\u00e9 \u4f60\u597d\u3002 \u041f\u0440\u0438\u0432\u0435\u0442 \u0645\u0631\u062d\u0628\u0627",
    "\U0001f44d\U0001f3fd \U0001f9d1\u200d\U0001f680",
    "I'll we've IT'S don\u2019t",
    "<|im_start|>user\nhi<|im_end|>",
    "\\ / \x00 \x1b[0m ~`^",
)


@dataclass(frozen=True)
class Check:
    """One check's outcome; ``limit`` is None where a value is only reported."""

    name: str
    passed: bool
    value: float | int | str | None
    limit: float | int | str | None
    detail: str = ""


@torch.no_grad()
def check_forward(model: PreTrainedModel) -> list[Check]:
    """Logits of random tokens are finite, and changing later tokens leaves earlier logits where they were."""
    generator = torch.Generator().manual_seed(0)
    vocabulary = model.config.vocab_size
    ids = torch.randint(vocabulary, (1, 24), generator=generator)
    changed = ids.clone()
    changed[:, 16:] = torch.randint(vocabulary, (1, 8), generator=generator)
    first, second = (model(input_ids=i.to(model.device), use_cache=False).logits for i in (ids, changed))
    broken = int((~torch.isfinite(first)).sum())
    checks = [Check("logits.finite", broken == 0, broken, 0, f"range {first.min():.2f} to {first.max():.2f}")]
    size = max(1.0, float(first.abs().max()))
    moved = float((first[:, :16] - second[:, :16]).abs().max()) / size
    checks.append(
        Check(
            "attention.causal",
            moved <= CAUSAL_LIMIT,
            moved,
            CAUSAL_LIMIT,
            "earlier logits moved by later tokens",
        )
    )
    return checks


@torch.no_grad()
def check_isolation(model: PreTrainedModel) -> list[Check]:
    """Packed documents have the logits they have alone; and a cache, filled token by token, gives the same."""
    generator = torch.Generator().manual_seed(1)
    first, second = (
        torch.randint(model.config.vocab_size, (1, n), generator=generator).to(model.device) for n in (9, 7)
    )
    ids = torch.cat([first, second], 1)
    positions = torch.cat([torch.arange(9), torch.arange(7)])[None].to(model.device)
    packed = model(input_ids=ids, position_ids=positions, attention_mask=None, use_cache=False).logits
    alone = torch.cat([model(input_ids=part, use_cache=False).logits for part in (first, second)], 1)
    size = max(1.0, float(alone.abs().max()))
    moved = float((packed - alone).abs().max()) / size
    checks = [
        Check("attention.packed", moved <= CAUSAL_LIMIT, moved, CAUSAL_LIMIT, "logits moved by a row's neighbour")
    ]
    cache, steps = None, []
    for position in range(first.shape[1]):
        out = model(input_ids=first[:, position : position + 1], past_key_values=cache, use_cache=True)
        cache = out.past_key_values
        steps.append(out.logits)
    moved = float((torch.cat(steps, 1) - alone[:, :9]).abs().max()) / size
    checks.append(Check("attention.cache", moved <= CAUSAL_LIMIT, moved, CAUSAL_LIMIT, "logits moved by the cache"))
    return checks


def check_tokenizer(tokenizer: PreTrainedTokenizerBase, vocabulary: int) -> list[Check]:
    """Texts come back (in Unicode's composed form, as Qwen's tokenizers make them), special tokens are one token within
    the model's vocabulary, and the template renders an answer that the trainer finds."""

    def back(text: str) -> str:
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        return str(tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))

    wrong = [text for text in _TEXTS if back(text) not in (text, unicodedata.normalize("NFC", text))]
    detail = f"first {wrong[0]!r} -> {back(wrong[0])!r}" if wrong else f"{len(_TEXTS)} texts"
    checks = [Check("tokenizer.round_trip", not wrong, len(wrong), 0, detail)]
    odd = []
    for token in (END_OF_DOCUMENT, "<|im_start|>", END_OF_TURN, tokenizer.eos_token):
        number = tokenizer.convert_tokens_to_ids(token) if token else None
        if number is None or number == tokenizer.unk_token_id or tokenizer.convert_ids_to_tokens(number) != token:
            continue
        if (
            not isinstance(number, int)
            or number >= vocabulary
            or tokenizer(token, add_special_tokens=False)["input_ids"] != [number]
        ):
            odd.append(token)
    if tokenizer.eos_token_id is None:
        odd.append("no eos token")
    checks.append(Check("tokenizer.special", not odd, ", ".join(odd) or "one token each", None))
    if tokenizer.chat_template is not None:
        checks.append(_check_template(tokenizer))
    return checks


def _check_template(tokenizer: PreTrainedTokenizerBase) -> Check:
    messages = [
        ("system", "Be brief."),
        ("user", "Say hi."),
        ("assistant", "hi there"),
        ("user", "Bye."),
        ("assistant", "bye"),
    ]
    turns = [{"role": role, "content": content} for role, content in messages]
    try:
        encoded = encode_conversation(tokenizer, messages)
        whole = str(tokenizer.apply_chat_template(turns, tokenize=False))
        opening = str(tokenizer.apply_chat_template(turns[:2], tokenize=False, add_generation_prompt=True))
    except DataError as error:
        return Check("template", False, None, None, str(error))
    learned = str(tokenizer.decode([t for t, a in zip(encoded.input_ids, encoded.answer, strict=True) if a]))
    wanted = f"hi there{END_OF_TURN}bye{END_OF_TURN}"
    # Qwen3 opens a thought where it generates, which a finished conversation no longer shows.
    begun = opening.split("<think>")[0]
    if learned != wanted:
        return Check("template", False, learned, wanted, "what would be learned of two answers")
    return Check(
        "template", whole.startswith(begun), "answers found", None, "generation prompt opens the rendered turn"
    )


def check_model(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[Check]:
    """All checks of this module; the model is put into eval mode for them and its own mode restored."""
    training = model.training
    model.eval()
    try:
        checks = check_forward(model) + check_isolation(model)
    finally:
        model.train(training)
    return check_tokenizer(tokenizer, model.config.vocab_size) + checks


def show(checks: Sequence[Check], title: str) -> None:
    """The checks as a table on the terminal."""
    table = Table(title=escape(title), title_justify="left", box=None, pad_edge=False)
    for column in ("check", "", "value", "limit"):
        table.add_column(column, no_wrap=True)
    table.add_column("detail", style="dim", overflow="fold")
    for c in checks:
        mark = "[green]pass[/]" if c.passed else "[red]FAIL[/]"
        value, limit = (f"{v:.3g}" if isinstance(v, float) else "" if v is None else str(v) for v in (c.value, c.limit))
        table.add_row(c.name, mark, escape(value), escape(limit), escape(c.detail))
    console = Console()
    console.print(table)
    failed = [c.name for c in checks if not c.passed]
    console.print(f"{len(checks)} checks, all passed" if not failed else f"FAILED: {', '.join(failed)}")

"""Talk to a PRIME checkpoint or a Hugging Face folder.

    python qwen_prime_chat.py coder_prime_step_300.pt
    python qwen_prime_chat.py coder_prime_step_300.pt --prompt "Write a haiku on integers." > haiku.txt
    git diff | python qwen_prime_chat.py coder_prime_step_300.pt --system "Review this diff."
    python qwen_prime_chat.py coder_prime_init.pt --compare coder_prime_step_300.pt

Answers go to standard output, everything else to standard error. Ctrl-C stops the answer and not the program (a second
one does not wait for the running token); Ctrl-D or /quit leaves. /help lists the commands. Control characters in an
answer are shown as symbols, so that no answer can steer the terminal.

Indices are looked up in every forward pass, which is what training needs and generation pays for with every token.
Where memory allows, the weights are therefore looked up once, into a dense copy (``--weights``).
"""

from __future__ import annotations

import contextlib
import logging
import signal
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import transformers
from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text
from transformers import PreTrainedModel, PreTrainedTokenizerBase

import prime_cli
import prime_hf  # noqa: F401  its import registers the plug-in for folders of indices
from chat_session import Chat, ChatError, Reply, Sampling
from ghost_core import grids_of
from harmless_text import harmless
from prime_checkpoint import CheckpointError
from prime_device import DeviceError, check_device, has_native_bfloat16, memory_available
from qwen_prime_wrapper import ModelError, count_parameters, load_model, restore_modules

log = logging.getLogger("chat")

HELP = """/reset          forget the conversation
/system TEXT    begin anew with another system prompt
/stats          tokens and speed of the last answer
/help           this list
/quit           leave, as Ctrl-D
A line that ends with \\ goes on with the next. Ctrl-C stops an answer."""


_NO_TEXT = "{} has bytes that are no UTF-8: expected text"


def is_text(text: str) -> bool:
    """Whether a string is one: bytes that are no UTF-8 Python may keep as lone surrogates."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


@dataclass(frozen=True)
class ChatConfig:
    """Talk to a PRIME checkpoint or a Hugging Face folder."""

    model: prime_cli.PositionalPath
    """PRIME .pt file or model folder."""
    compare: Path | None = None
    """A second checkpoint or folder that answers the same, side by side."""
    prompt: str | None = None
    """One message to answer, then leave; "-" reads it from standard input, as does a pipe without --prompt."""
    system: str | None = None
    """System prompt; by default what the model's template puts there."""
    temperature: float | None = None
    """0 always takes the likeliest token; by default the model's own generation config, as for the next three."""
    top_p: float | None = None
    """Choose among the likeliest tokens that have this probability together."""
    top_k: int | None = None
    """Choose among this many tokens."""
    repetition_penalty: float | None = None
    """Above 1: tokens that occurred become less likely."""
    max_new_tokens: int = 1024
    """Longest answer."""
    seed: int | None = None
    """Of the sampling; by default another every time."""
    weights: Literal["auto", "dense", "indices"] = "auto"
    """A dense copy of the weights (fast), the indices as they are (2 bytes a weight), or what memory allows."""
    device: str = "cuda" if torch.cuda.is_available() else "cpu"
    """Where to compute."""

    def __post_init__(self) -> None:
        for name, low, high in (("temperature", 0, 100), ("top_p", 0, 1), ("repetition_penalty", 0.01, 100)):
            value = getattr(self, name)
            if value is not None and not low <= value <= high:
                raise ValueError(f"{name.replace('_', '-')} is {value}, expected {low} to {high}")
        if self.top_k is not None and self.top_k < 0:
            raise ValueError(f"top-k is {self.top_k}, expected at least 0")
        if self.max_new_tokens < 1:
            raise ValueError(f"max-new-tokens is {self.max_new_tokens}, expected at least 1")
        if self.prompt is not None and not self.prompt.strip():
            raise ValueError("prompt is empty")
        for name, text in (("prompt", self.prompt), ("system", self.system)):
            if text is not None and not is_text(text):
                raise ValueError(_NO_TEXT.format(name))


def open_model(path: Path, weights: str, device: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A model for generation and its tokenizer; says once which weights it computes with.

    Raises:
        CheckpointError, ModelError: see ``load_model``.
        ChatError: a dense copy was asked for and does not fit.
    """
    loaded, tokenizer, _ = load_model(path)
    model: Any = loaded
    dtype = torch.bfloat16 if has_native_bfloat16(device) else torch.float32
    if not grids_of(model):
        model = model.to(device, dtype)
        log.info("%s: dense %s", path.name, str(dtype)[6:])
        return model, tokenizer
    needed, free = count_parameters(model) * dtype.itemsize, memory_available(device)
    # A tenth on top for the cache and what a forward pass holds.
    fits = needed * 1.1 < free
    sizes = f"{needed / 1e9:.2f} GB, {free / 1e9:.2f} GB free"
    if weights == "dense" and not fits:
        raise ChatError(f"a dense copy needs {sizes}: leave --weights out or choose --weights indices")
    if weights == "dense" or (weights == "auto" and fits):
        restore_modules(model, dtype)
        log.info("%s: dense %s copy of the weights (%s)", path.name, str(dtype)[6:], sizes)
    else:
        why = "as asked" if weights == "indices" else f"a dense copy would need {sizes}"
        log.info("%s: indices, looked up in every forward pass (%s)", path.name, why)
    return model.to(device), tokenizer


@contextlib.contextmanager
def interruptible() -> Iterator[Callable[[], bool]]:
    """Within the block Ctrl-C sets a flag, which the given function reads, and only the second one raises."""
    flag = False

    def note(*_: Any) -> None:
        nonlocal flag
        if flag:
            raise KeyboardInterrupt
        flag = True

    before = signal.signal(signal.SIGINT, note)
    try:
        yield lambda: flag
    finally:
        signal.signal(signal.SIGINT, before)


def summary(reply: Reply) -> str:
    """One line on an answer: why it ended if not by itself, tokens, speed, cache."""
    ends = {"length": "cut at --max-new-tokens", "context": "the context is full", "interrupted": "stopped"}
    parts = [ends[reply.end]] if reply.end in ends else []
    parts.append(f"{reply.tokens} tokens")
    if reply.speed:
        parts.append(f"{reply.speed:.1f} tokens/s")
    parts.append(f"prompt {reply.prompt_tokens} ({reply.reused_tokens} cached) in {reply.prompt_seconds:.1f} s")
    return f"[{', '.join(parts)}]"


def note(text: str) -> None:
    """A remark beside the answers."""
    print(text, file=sys.stderr, flush=True)


def _note_dropped(reply: Reply) -> None:
    if reply.dropped:
        note(f"[the context was full: the oldest {reply.dropped} exchange(s) were dropped]")


def say(chat: Chat, text: str) -> Reply:
    """Stream one answer to standard output."""

    def emit(piece: str) -> None:
        sys.stdout.write(harmless(piece, len(piece)))
        sys.stdout.flush()

    with interruptible() as stopped:
        reply = chat.ask(text, emit, stopped)
    if not reply.text.endswith("\n"):
        print(flush=True)
    _note_dropped(reply)
    note(summary(reply))
    return reply


def side_by_side(names: list[str], texts: list[str]) -> Table:
    """Answers in columns of equal width."""
    table = Table(expand=True, show_edge=False, pad_edge=False)
    for name in names:
        table.add_column(Text(harmless(name)), ratio=1, overflow="fold")
    table.add_row(*(Text(harmless(text, len(text))) for text in texts))
    return table


def say_both(chats: list[Chat], names: list[str], text: str) -> Reply:
    """Stream the answers of two models, one after the other, into two columns; in a pipe, under headings."""
    console = Console()
    texts = ["" for _ in chats]
    replies: list[Reply] = []

    def run(k: int, refresh: Callable[[], None]) -> None:
        def emit(piece: str) -> None:
            texts[k] += piece
            refresh()

        with interruptible() as stopped:
            replies.append(chats[k].ask(text, emit, stopped))

    if console.is_terminal:
        with Live(console=console, transient=True, auto_refresh=False) as live:
            for k in range(len(chats)):
                run(k, lambda: live.update(side_by_side(names, texts), refresh=True))
        console.print(side_by_side(names, texts))
    else:
        for k, name in enumerate(names):
            run(k, lambda: None)
            print(f"== {name}\n{harmless(texts[k], len(texts[k]))}", flush=True)
    for name, reply in zip(names, replies, strict=True):
        _note_dropped(reply)
        note(f"{name} {summary(reply)}")
    return replies[0]


def read_message() -> str | None:
    """What was typed, lines ended by a backslash joined; None at the end of input."""
    lines: list[str] = []
    try:
        while True:
            line = input("... " if lines else "> ")
            if not line.endswith("\\"):
                return "\n".join([*lines, line])
            lines.append(line[:-1])
    except EOFError:
        return None


@dataclass
class Conversation:
    """What a line that was typed does."""

    chats: list[Chat]
    answer: Callable[[str], Reply]
    last: Reply | None = None

    def take(self, text: str) -> bool:
        """Carry out a command or answer a message; false where it was the last."""
        word, _, rest = text.strip().partition(" ")
        if word in ("/quit", "/exit"):
            return False
        if not is_text(text):
            note(f"error: {_NO_TEXT.format('the message')}")
            return True
        if word in ("/reset", "/system"):
            for chat in self.chats:
                chat.system = rest.strip() if word == "/system" and rest.strip() else chat.system
                chat.reset()
            note("[new conversation]")
        elif word == "/stats":
            note(summary(self.last) if self.last else "[no answer yet]")
        elif word == "/help":
            note(HELP)
        elif word.startswith("/") and "/" not in word[1:]:
            note(f"no command {word}; /help lists them")
        elif word:
            try:
                self.last = self.answer(text)
            except ChatError as error:
                note(f"error: {error}")
        return True


def converse(conversation: Conversation) -> int:
    """Read messages and commands until the end of input or /quit; no Ctrl-C leaves."""
    with contextlib.suppress(ImportError):
        # Where it exists, its import gives input() line editing and a history.
        import readline  # noqa: F401
    note("/help lists the commands, Ctrl-C stops an answer, Ctrl-D leaves.")
    while True:
        try:
            text = read_message()
            if text is None:
                note("")
                return 0
            if not conversation.take(text):
                return 0
        except UnicodeDecodeError:
            note(f"error: {_NO_TEXT.format('the message')}")
        except KeyboardInterrupt:
            note("\n(Ctrl-D or /quit leaves)")


def main(config: ChatConfig) -> int:
    check_device(config.device)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    prompt = config.prompt
    if prompt == "-" or (prompt is None and not sys.stdin.isatty()):
        try:
            prompt = sys.stdin.read().strip()
        except UnicodeDecodeError as error:
            raise ChatError(_NO_TEXT.format("standard input")) from error
        if not prompt:
            raise ChatError("standard input is empty: expected a message, or a terminal to talk in")
        if not is_text(prompt):
            raise ChatError(_NO_TEXT.format("standard input"))
    if config.seed is not None:
        torch.manual_seed(config.seed)
    sampling = Sampling(
        config.temperature, config.top_p, config.top_k, config.repetition_penalty, config.max_new_tokens
    )
    paths = [config.model] if config.compare is None else [config.model, config.compare]
    chats = [Chat(*open_model(p, config.weights, config.device), config.system, sampling) for p in paths]
    if chats[0].tokenizer.chat_template is None:
        note("[the model has no chat template: text is continued as it stands]")

    def answer(text: str) -> Reply:
        return say(chats[0], text) if len(chats) == 1 else say_both(chats, [p.name for p in paths], text)

    if prompt is None:
        return converse(Conversation(chats, answer))
    return 130 if answer(prompt).end == "interrupted" else 0


if __name__ == "__main__":
    raise SystemExit(prime_cli.run(ChatConfig, main, (ChatError, ModelError, CheckpointError, DeviceError, OSError)))

"""Conversations: what is cached, what stops, what is dropped; and the program in a pipe and in a terminal."""

from __future__ import annotations

import io
import os
import pty
import select
import signal
import sys
import time
from pathlib import Path

import pytest
import torch
from tiny_models import import_source, tiny_config, write_source

import prime_cli
import qwen_prime_chat as program
from chat_session import Chat, ChatError, Sampling
from ghost_core import grids_of
from qwen_prime_wrapper import load_model

pytestmark = pytest.mark.usefixtures("one_thread")
ROOT = Path(__file__).resolve().parent.parent
MODEL = ROOT / "assets" / "tiny_coder"
GREEDY = Sampling(temperature=0.0, max_new_tokens=6)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("chat") / "tiny_coder.pt"
    import_source(MODEL, path)
    return path


@pytest.fixture(scope="module")
def loaded() -> tuple:
    return load_model(MODEL)[:2]


def afresh(chat: Chat, ids: list[int], tokens: int) -> list[int]:
    """Greedy continuation without any cache, stops excluded."""
    found: list[int] = []
    with torch.no_grad():
        for _ in range(tokens):
            token = int(chat.model(input_ids=torch.tensor([ids + found]), use_cache=False).logits[0, -1].argmax())
            if token in chat.stops:
                break
            found.append(token)
    return found


def test_turns_reuse_the_cache_and_change_nothing(loaded: tuple) -> None:
    chat = Chat(*loaded, system="Be brief.", sampling=GREEDY)
    reused = []
    for text in ("Write a function.", "And another one, with 2 arguments.", "Thanks"):
        pieces: list[str] = []
        before = list(chat.messages)
        reply = chat.ask(text, pieces.append)
        chat.messages, after = [*before, {"role": "user", "content": text}], chat.messages
        ids = chat.render()
        chat.messages = after
        wanted = afresh(chat, ids, 6)
        assert reply.text == "".join(pieces) == chat.tokenizer.decode(wanted, skip_special_tokens=True)
        assert reply.prompt_tokens == len(ids)
        assert chat.messages[-1] == {"role": "assistant", "content": reply.text}
        reused.append(reply.reused_tokens)
    assert reused[0] == 0 and 10 < reused[1] < reused[2]
    chat.reset()
    assert chat.messages == [{"role": "system", "content": "Be brief."}]
    assert chat.ask("Thanks").reused_tokens == 0


def test_answers_stop_where_a_turn_ends(loaded: tuple, monkeypatch: pytest.MonkeyPatch) -> None:
    chat = Chat(*loaded, sampling=Sampling(temperature=0.0, max_new_tokens=8))
    end = chat.tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert end in chat.stops
    real = chat.model.forward

    def ends(*args, **kwargs):
        out = real(*args, **kwargs)
        if chat.cache is not None and chat.cache.get_seq_length() >= prompt + 2:
            out.logits[..., end] = 1e4
        return out

    prompt = len(
        chat.tokenizer.apply_chat_template([{"role": "user", "content": "x"}], add_generation_prompt=True)["input_ids"]
    )
    monkeypatch.setattr(chat.model, "forward", ends)
    reply = chat.ask("x")
    assert reply.end == "stop" and reply.tokens == 3 and "<|" not in reply.text


def test_a_stopped_answer_is_kept_and_the_talk_goes_on(loaded: tuple) -> None:
    chat = Chat(*loaded, sampling=Sampling(temperature=0.0, max_new_tokens=50))
    seen: list[str] = []
    reply = chat.ask("def f(x):", seen.append, lambda: len(seen) >= 3)
    assert reply.end == "interrupted" and reply.tokens < 8
    assert chat.messages[-1]["content"] == reply.text
    chat.sampling = GREEDY
    assert chat.ask("go on").reused_tokens > 10

    def second(piece: str) -> None:
        raise KeyboardInterrupt

    reply = chat.ask("again", second)
    assert reply.end == "interrupted" and chat.cache is None
    assert chat.ask("and on").reused_tokens == 0
    with pytest.raises(RuntimeError):
        chat.ask("broken", lambda _: (_ for _ in ()).throw(RuntimeError("x")))
    assert chat.messages[-1]["role"] == "assistant" and chat.cache is None


def test_the_oldest_exchanges_make_room(tmp_path: Path) -> None:
    model, tokenizer, _ = load_model(write_source(tmp_path / "m", tiny_config(max_position_embeddings=128)))
    tokenizer.chat_template = "{% for m in messages %}<|im_start|>{{ m.role[0] + m.content }}<|im_end|>{% endfor %}"
    chat = Chat(model, tokenizer, system="S" * 10, sampling=Sampling(temperature=0.0, max_new_tokens=12))
    dropped = [chat.ask(f"{i}" * 20).dropped for i in range(6)]
    assert dropped[:2] == [0, 0] and sum(dropped) >= 2
    assert chat.messages[0] == {"role": "system", "content": "S" * 10}
    assert [m["role"] for m in chat.messages[1:]] == ["user", "assistant"] * ((len(chat.messages) - 1) // 2)
    assert len(chat.render()) <= 128
    before = list(chat.messages)
    with pytest.raises(ChatError, match="holds 128"):
        chat.ask("x" * 200)
    assert chat.messages == before
    chat.reset()
    reply = chat.ask("y" * 105)
    assert reply.prompt_tokens + reply.tokens <= 128 and reply.end in ("context", "stop")


def test_sampling_follows_the_model_until_told_otherwise(loaded: tuple) -> None:
    model = loaded[0]
    kept = model.generation_config
    model.generation_config = type(kept)(do_sample=True, temperature=0.7, top_p=0.8, top_k=20, eos_token_id=4095)
    try:
        config = Sampling().config(model, [1], 0, 100)
        assert (config.do_sample, config.temperature, config.top_p, config.top_k) == (True, 0.7, 0.8, 20)
        assert config.max_new_tokens == 100 and config.eos_token_id == [1]
        assert Sampling(temperature=0.3).config(model, [1], 0, 2000).temperature == 0.3
        assert Sampling(temperature=0.0).config(model, [1], 0, 9).do_sample is False
        assert model.generation_config.temperature == 0.7
    finally:
        model.generation_config = kept
    assert Sampling().config(model, [1], 0, 9).do_sample is False
    assert Sampling(top_k=5).config(model, [1], 0, 9).do_sample is True


@pytest.mark.parametrize("native", [False, True])
def test_a_dense_copy_computes_the_same(
    native: bool, checkpoint: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """In the type that the machine multiplies itself."""
    monkeypatch.setattr(program, "has_native_bfloat16", lambda device: native)
    caplog.set_level("INFO")
    replies = []
    for weights in ("auto", "dense", "indices"):
        model, tokenizer = program.open_model(checkpoint, weights, "cpu")
        assert bool(grids_of(model)) == (weights == "indices")
        replies.append(Chat(model, tokenizer, sampling=GREEDY).ask("def add(a, b):").text)
    # In bfloat16 a near tie may fall the other way.
    assert replies[0] == replies[1] and replies[0] and (native or replies[2] == replies[0])
    copied = f"dense {'bfloat16' if native else 'float32'} copy"
    assert len(caplog.records) == 3 and copied in caplog.text and "looked up" in caplog.text


def test_a_dense_copy_that_does_not_fit(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    monkeypatch.setattr(program, "has_native_bfloat16", lambda device: False)
    monkeypatch.setattr(program, "memory_available", lambda device: 10_000_000)
    assert grids_of(program.open_model(checkpoint, "auto", "cpu")[0])
    assert "would need 0.02 GB" in caplog.text
    with pytest.raises(ChatError, match="--weights indices"):
        program.open_model(checkpoint, "dense", "cpu")


def test_no_answer_steers_the_terminal() -> None:
    text = "a\x1b[31mred\x07\x9b2J\r\x7f\u202eab\u2066\tok\n\u00e9\u4e2d"
    shown = program.harmless(text)
    assert shown == "a\u241b[31mred\u2407\\u009b2J\u240d\u2421\\u202eab\\u2066\tok\n\u00e9\u4e2d"


def run(*arguments: object) -> int:
    errors = (ChatError, OSError, program.ModelError, program.CheckpointError)
    return prime_cli.run(program.ChatConfig, program.main, errors, [str(a) for a in arguments])


def test_one_shot_and_pipe(
    checkpoint: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The answer alone on standard output, the rest on standard error, the same from flag and pipe."""
    options = ("--max-new-tokens", 8, "--temperature", 0)
    assert run(checkpoint, "--prompt", "def add(a, b):", *options) == 0
    flag = capsys.readouterr()
    assert "tokens/s" in flag.err and "tokens/s" not in flag.out and flag.out.endswith("\n")
    for arguments in ((), ("--prompt", "-")):
        monkeypatch.setattr(sys, "stdin", io.StringIO("def add(a, b):\n"))
        assert run(checkpoint, *arguments, *options) == 0
        assert capsys.readouterr().out == flag.out
    monkeypatch.setattr(sys, "stdin", io.StringIO(" \n"))
    assert run(checkpoint) == 1
    assert "standard input is empty" in capsys.readouterr().err


@pytest.mark.parametrize("errors", ["strict", "surrogateescape"])
def test_bytes_that_are_no_text_are_one_line(
    errors: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of standard input in either way that a locale has Python read it, and of flags."""
    for arguments, code, what in (((), 1, "standard input"), (("--prompt", "caf\udce9"), 2, "prompt")):
        stdin = io.TextIOWrapper(io.BytesIO(b"caf\xe9"), encoding="utf-8", errors=errors)
        monkeypatch.setattr(sys, "stdin", stdin)
        assert run(tmp_path / "absent.pt", *arguments) == code
        said = capsys.readouterr().err
        assert f"{what} has bytes that are no UTF-8: expected text" in said and said.count("\n") == 1
    notes: list[str] = []
    monkeypatch.setattr(program, "note", notes.append)
    assert program.Conversation([], lambda _: pytest.fail("asked")).take("caf\udce9")
    assert notes == ["error: the message has bytes that are no UTF-8: expected text"]


def test_a_sliding_window_is_computed_again_past_its_end(tmp_path: Path) -> None:
    """The next prompt of a template goes back behind what the cache still knows."""
    config = tiny_config(use_sliding_window=True, sliding_window=16, max_window_layers=1, max_position_embeddings=256)
    model, tokenizer, _ = load_model(write_source(tmp_path, config))
    tokenizer.chat_template = "{% for m in messages %}[{{ m.content }}]{% endfor %}!"
    chat = Chat(model, tokenizer, sampling=GREEDY)
    for text in ("hello there, how are you", "and now?", "third"):
        before = list(chat.messages)
        reply = chat.ask(text)
        chat.messages, after = [*before, {"role": "user", "content": text}], chat.messages
        ids = chat.render()
        chat.messages = after
        wanted = ids + afresh(chat, ids, 6)
        assert chat.cached == wanted[: len(chat.cached)] and len(ids) < len(chat.cached)
        assert reply.reused_tokens == 0


def test_two_models_side_by_side(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ("--max-new-tokens", 8, "--temperature", 0, "--prompt", "def add(a, b):")
    assert run(checkpoint, "--compare", MODEL, *options) == 0
    out = capsys.readouterr().out
    assert out.index("== tiny_coder.pt") < out.index("== tiny_coder\n")
    first, second = out.split("== tiny_coder.pt\n")[1].split("== tiny_coder\n")
    assert first.strip() == second.strip()


def test_bad_usage(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, code, words in (
        (("--temperature", -1), 2, "temperature is -1"),
        (("--top-p", 1.5), 2, "top-p is 1.5"),
        (("--prompt", " "), 2, "prompt is empty"),
        (("--max-new-tokens", 0), 2, "max-new-tokens"),
        (("--prompt", "x"), 1, "absent.pt"),
    ):
        assert run(tmp_path / "absent.pt", *arguments) == code
        said = capsys.readouterr().err
        assert words in said and len(said.strip().splitlines()) == 1


class Terminal:
    """The program in a terminal of its own, 80 columns wide."""

    def __init__(self, *arguments: object) -> None:
        command = [sys.executable, str(ROOT / "qwen_prime_chat.py"), *map(str, arguments)]
        environment = {**os.environ, "TERM": "xterm", "COLUMNS": "80", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        self.pid, self.master = pty.fork()
        if self.pid == 0:
            # Tests that run in the background of a script ignore Ctrl-C, and children would inherit it.
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            os.execve(sys.executable, command, environment)
        self.seen = ""

    def until(self, text: str, seconds: float = 180) -> str:
        """Everything shown until ``text`` appears."""
        end = time.monotonic() + seconds
        while text not in self.seen:
            assert time.monotonic() < end, f"no {text!r} in {self.seen!r}"
            if select.select([self.master], [], [], 0.2)[0]:
                self.seen += os.read(self.master, 65536).decode(errors="replace")
        shown, _, self.seen = self.seen.partition(text)
        return shown

    def type(self, text: str) -> None:
        os.write(self.master, text.encode())


def test_in_a_terminal(checkpoint: Path) -> None:
    """Ctrl-C stops an answer and not the program, at the prompt it says how to leave; commands; Ctrl-D leaves."""
    terminal = Terminal(checkpoint, "--max-new-tokens", 100_000, "--temperature", 1, "--top-k", 0)
    try:
        terminal.until("> ")
        terminal.type("/nonsense\n")
        terminal.until("no command /nonsense")
        terminal.until("> ")
        # A signal between the prompt's drawing and the wait for a key is seen with the next key only.
        time.sleep(0.5)
        terminal.type("\x03")
        terminal.until("/quit leaves")
        for _ in range(2):
            terminal.until("> ")
            terminal.type("Write a long function.\n")
            terminal.until("function.\r\n")
            terminal.until("\n")
            terminal.type("\x03")
            terminal.until("[stopped")
        terminal.until("> ")
        terminal.type("/reset\n")
        terminal.until("[new conversation]")
        terminal.until("> ")
        terminal.type("\x04")
        assert os.waitstatus_to_exitcode(os.waitpid(terminal.pid, 0)[1]) == 0
        terminal.pid = 0
    finally:
        if terminal.pid:
            os.kill(terminal.pid, signal.SIGKILL)
            os.waitpid(terminal.pid, 0)
        os.close(terminal.master)

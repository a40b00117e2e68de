"""Instruction data and text for fine-tuning: records -> chat template -> answer mask -> packed, resumable batches.

Method. ``read_records`` turns local files into conversations or plain texts and names every row it could not use.
``encode_records`` renders each conversation once with the model's own chat template and tokenizes that one string
with character offsets; a token is a target when its characters lie inside an assistant's content or in the
``<|im_end|>`` that closes it. ``pack`` fills rows of ``seq_len`` tokens with whole documents, and ``PackedBatches``
deals the rows out, epoch after epoch, from a cursor that a checkpoint can hold.

Where an answer starts and stops is measured on the template itself: the conversation is rendered a second time with
that answer replaced by a marker, and what stands before and after the marker must be a prefix and a suffix of the
real text. So a template may strip an answer, drop its reasoning or put an empty ``<think>`` block before it (Qwen3):
what it adds is never learned, what it leaves of the answer is. An answer that changes what stands before it (Qwen3
with real reasoning) starts where the generation prompt ends. A template that fits neither raises ``DataError``.

Layout. Documents lie in flat arrays (``EncodedSet``): token ids, a target mask of the same length, and the start of
each document. A batch row holds documents end to end, then padding. ``position_ids`` restart at 0 for each of them:
given ``attention_mask=None`` and ``use_cache=False``, transformers reads document borders from these restarts, with
its eager and sdpa attention in any number of rows (5.23, tested). Its flash attention reads them in a batch of one
row only and lets the documents of wider batches see each other: no flash attention with ``batch_size`` above 1.

Order. Every random choice is a hash of (seed, epoch, element), so it needs no generator state and outlives numpy's.
Each epoch packs anew within windows of shuffled documents, then shuffles the rows.

Rejected: ``return_assistant_tokens_mask`` (Qwen's templates carry no ``{% generation %}`` marks), a search for the ids
of ``<|im_start|>assistant`` (an answer may quote them), and tokenizing prompt and answer apart (at the seam it gives
tokens that the model never meets when the whole is tokenized).
"""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jinja2
import numpy as np
import torch
from tqdm import tqdm

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

END_OF_TURN = "<|im_end|>"
END_OF_DOCUMENT = "<|endoftext|>"
NOT_LEARNED = -100

_SUFFIXES = (".json", ".jsonl", ".txt")
# Keys whose content the templates would need and this module does not pass on; ignoring them would change the data.
_UNSUPPORTED_ROW_KEYS = ("tools", "functions", "history")
_UNSUPPORTED_MESSAGE_KEYS = ("tool_calls", "function_call", "reasoning_content")
_ROLES = ("system", "user", "assistant", "tool")
_SHAREGPT_ROLES = {
    "system": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "chatgpt": "assistant",
    "tool": "tool",
    "observation": "tool",
}
_MARKER = "\ue000"  # private use: no template contains it, and it grows until no conversation does
_CHUNK = 256  # records per call of the tokenizer
_WINDOW = 1024  # documents packed together
_SPACE = re.compile(r"[ \t\n\r]*")
_SHOWN = 5  # bad rows quoted in messages


class DataError(ValueError):
    """The data, the tokenizer's template or a saved data cursor cannot be used as asked."""


class _RowError(ValueError):
    """Reason why one row is bad; becomes a ``BadRow``."""


Messages = tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class Conversation:
    """``messages``: (role, content) pairs in order; roles are system, user, assistant and tool."""

    messages: Messages


Record = Conversation | str


@dataclass(frozen=True)
class BadRow:
    """A row that was left out: its file, its line (from 1) and why."""

    file: str
    line: int
    reason: str

    def __str__(self) -> str:
        return f"{self.file}:{self.line}: {self.reason}"


@dataclass(frozen=True)
class RecordSet:
    """What ``read_records`` found.

    ``records``: conversations and plain texts (``str``) in the order of files and rows. ``format``: the one format
    recognised, or all of them with counts. ``bad_rows``: every row left out. ``files``: files read. ``ignored``:
    files of a folder that have another suffix. ``split``: the split kept, None where no row names one.
    ``other_splits``: rows left to other splits.
    """

    records: tuple[Record, ...]
    format: str
    bad_rows: tuple[BadRow, ...]
    files: tuple[str, ...]
    ignored: tuple[str, ...] = ()
    split: str | None = None
    other_splits: int = 0


@dataclass(frozen=True)
class Encoded:
    """One document: token ids, and for each token whether it is to be learned as a target."""

    input_ids: list[int]
    answer: list[bool]


@dataclass(frozen=True, eq=False)
class EncodedSet:
    """Documents of at most ``seq_len`` tokens, ready to pack.

    ``input_ids`` int32 (N,) and ``answer`` bool (N,) hold all documents end to end, ``starts`` int64 (D + 1,) their
    borders, ``record`` int64 (D,) the index of the record each came from. The first token of a document is never a
    target: nothing precedes it. ``cut``: conversations longer than ``seq_len``; ``dropped``: those among them that
    kept no target and were left out; ``split_texts``: plain texts spread over several documents.
    """

    input_ids: np.ndarray
    answer: np.ndarray
    starts: np.ndarray
    record: np.ndarray
    seq_len: int
    cut: int
    dropped: int
    split_texts: int

    def __len__(self) -> int:
        return len(self.starts) - 1

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each document, int64 (D,)."""
        return np.diff(self.starts)

    @property
    def tokens(self) -> int:
        return len(self.input_ids)

    @property
    def answer_tokens(self) -> int:
        """Targets of one epoch: the sum of ``Batch.answer_tokens`` over it."""
        return int(self.answer.sum())

    def document(self, index: int) -> Encoded:
        """Document ``index`` as lists."""
        part = slice(self.starts[index], self.starts[index + 1])
        return Encoded(self.input_ids[part].tolist(), self.answer[part].tolist())


@dataclass(frozen=True, eq=False)
class Batch:
    """Rows of packed documents, all int64 (B, T), for ``attention_mask=None, use_cache=False``.

    ``labels[t]`` is the token at t (not shifted, as transformers expects) or -100; ``position_ids`` restart at 0 for
    each document and for the padding at a row's end. ``documents`` and ``tokens`` do not count padding;
    ``answer_tokens`` counts the labels that are not -100.
    """

    input_ids: torch.Tensor
    labels: torch.Tensor
    position_ids: torch.Tensor
    documents: int
    tokens: int
    answer_tokens: int


# Reading


def read_records(
    path: Path | str, *, strict: bool = False, max_bad_share: float = 0.01, split: str | None = None
) -> RecordSet:
    """Read a ``.jsonl``, ``.json`` (list of objects or strings) or ``.txt`` file (one document), or a folder of them.

    A folder is read with its subfolders in sorted order; hidden files and other suffixes are left out. Per row the
    formats ``messages``, ``sharegpt`` (``conversations``), ``prompt/completion``, ``alpaca`` (``instruction``,
    ``input``, ``output``), ``question/answer`` and ``text`` are recognised, in this order. A ``system`` string beside
    a conversation becomes its first message. Where rows carry ``split`` and ``split`` is given, only the rows of that
    split are examined; where none carries it, all are kept and ``RecordSet.split`` is None.

    Raises ``DataError`` at the first bad row if ``strict``; when more than ``max_bad_share`` of the examined rows are
    bad; when nothing usable is left; and for a ``.json`` file that is not one well-formed list, since how much is
    lost behind the fault cannot be known.
    """
    if not 0 <= max_bad_share <= 1:
        raise DataError(f"max_bad_share is {max_bad_share}, expected a share from 0 to 1")
    files, ignored = _list_files(Path(path))
    records: list[Record] = []
    names: list[str] = []
    places: list[tuple[str, int]] = []
    labelled: list[bool] = []
    bad: list[BadRow] = []
    others: Counter[str] = Counter()

    def refuse(file: str, line: int, reason: str) -> None:
        bad.append(BadRow(file, line, reason))
        if strict:
            raise DataError(f"bad row: {bad[-1]} (repair it, or read without --strict to leave such rows out)")

    for file in files:
        for line, value, reason in _rows(file):
            if reason is not None:
                refuse(str(file), line, reason)
                continue
            has_split = split is not None and isinstance(value, dict) and "split" in value
            if has_split and value["split"] != split:
                others[str(value["split"])] += 1
                continue
            try:
                name, record = _parse(value)
            except _RowError as error:
                refuse(str(file), line, str(error))
                continue
            records.append(record)
            names.append(name)
            places.append((str(file), line))
            labelled.append(has_split)

    uses_split = bool(others) or any(labelled)
    if uses_split and not all(labelled):
        # Neither keeping nor dropping these silently is right: they could belong to either side.
        for (name, line), has_split in zip(places, labelled, strict=True):
            if not has_split:
                refuse(name, line, 'no "split" key, while other rows have one')
        records = [r for r, has_split in zip(records, labelled, strict=True) if has_split]
        names = [n for n, has_split in zip(names, labelled, strict=True) if has_split]

    examined = len(records) + len(bad)
    if len(bad) > max_bad_share * examined:
        quoted = "; ".join(str(b) for b in bad[:_SHOWN])
        raise DataError(
            f"{path}: {len(bad)} of {examined} rows are bad, expected at most {max_bad_share:.2%}; the first: {quoted}."
            " Repair the file, or allow a larger share with max_bad_share"
        )
    if not records:
        there = f"; splits found: {dict(others)}" if others else ""
        raise DataError(f"{path}: no usable record{f' in split {split!r}' if split else ''}{there}")
    counts = Counter(names).most_common()
    return RecordSet(
        records=tuple(records),
        format=counts[0][0] if len(counts) == 1 else " + ".join(f"{name} ({count})" for name, count in counts),
        bad_rows=tuple(bad),
        files=tuple(str(f) for f in files),
        ignored=tuple(str(f) for f in ignored),
        split=split if uses_split else None,
        other_splits=sum(others.values()),
    )


def _list_files(path: Path) -> tuple[list[Path], list[Path]]:
    """Files to read, and files of a folder that are not read."""
    if path.is_file():
        if path.suffix.lower() not in _SUFFIXES:
            raise DataError(f"{path}: got suffix {path.suffix!r}, expected one of {', '.join(_SUFFIXES)}")
        return [path], []
    if not path.is_dir():
        raise DataError(f"{path}: no such file or folder; give --data a {', '.join(_SUFFIXES)} file or a folder")
    found = [
        f
        for f in sorted(path.rglob("*"), key=lambda f: f.relative_to(path).as_posix())
        if f.is_file() and not any(part.startswith(".") for part in f.relative_to(path).parts)
    ]
    files = [f for f in found if f.suffix.lower() in _SUFFIXES]
    if not files:
        raise DataError(f"{path}: the folder holds none of {', '.join(_SUFFIXES)} among its {len(found)} files")
    return files, [f for f in found if f.suffix.lower() not in _SUFFIXES]


def _rows(file: Path) -> Iterator[tuple[int, Any, str | None]]:
    """(line, value, None) of each row of ``file``, or (line, None, reason) where it cannot be decoded."""
    suffix = file.suffix.lower()
    if suffix == ".jsonl":
        yield from _rows_of_lines(file)
    elif suffix == ".json":
        yield from _rows_of_list(file)
    else:
        data = file.read_bytes()
        try:
            yield 1, data.decode("utf-8-sig"), None
        except UnicodeDecodeError as error:
            line = 1 + data.count(b"\n", 0, error.start)
            yield line, None, f"invalid UTF-8 at byte {error.start} of the file ({error.reason})"


def _rows_of_lines(file: Path) -> Iterator[tuple[int, Any, str | None]]:
    # Binary iteration breaks at \n alone: JSON strings may hold the other line separators of Unicode.
    with file.open("rb") as lines:
        for number, raw in enumerate(lines, 1):
            if not raw.strip():
                continue
            try:
                value, reason = json.loads(raw.decode("utf-8-sig" if number == 1 else "utf-8")), None
            except UnicodeDecodeError as error:
                value, reason = None, f"invalid UTF-8 at byte {error.start} of the line ({error.reason})"
            except (ValueError, RecursionError) as error:
                value, reason = None, f"malformed JSON: {error}"
            yield number, value, reason


def _rows_of_list(file: Path) -> Iterator[tuple[int, Any, str | None]]:
    # Element by element, to know each one's line. Bytes that are no UTF-8 become lone surrogates, which
    # _string refuses in the one row that holds them.
    text = file.read_bytes().decode("utf-8-sig", errors="surrogateescape")
    decoder = json.JSONDecoder()

    def fail(position: int, what: str) -> DataError:
        line = 1 + text.count("\n", 0, position)
        return DataError(
            f"{file}:{line}: {what}; expected one list of objects or strings. What follows cannot be read: repair the "
            "file, or store one object per line as .jsonl"
        )

    def skip(position: int) -> int:
        found = _SPACE.match(text, position)
        return found.end() if found else position

    position = skip(0)
    if text[position : position + 1] != "[":
        raise fail(position, f"malformed JSON: got {text[position : position + 20]!r} where a list should begin")
    position = skip(position + 1)
    closed = text[position : position + 1] == "]"
    line, counted = 1, 0
    while not closed:
        line, counted = line + text.count("\n", counted, position), position
        try:
            value, position = decoder.raw_decode(text, position)
        except (ValueError, RecursionError) as error:
            raise fail(getattr(error, "pos", position), f"malformed JSON: {error}") from error
        yield line, value, None
        position = skip(position)
        closed = text[position : position + 1] == "]"
        if not closed:
            if text[position : position + 1] != ",":
                raise fail(position, "malformed JSON: expected ',' or ']' after a row")
            position = skip(position + 1)
    rest = skip(position + 1)
    if rest != len(text):
        raise fail(rest, "malformed JSON: something follows the list")


def _parse(value: Any) -> tuple[str, Record]:
    """Format name and record of a decoded row; raises ``_RowError``."""
    if isinstance(value, str):
        return "text", _text(value)
    if not isinstance(value, dict):
        raise _RowError(f"wrong type: got {_kind(value)}, expected an object or a string")
    for key in _UNSUPPORTED_ROW_KEYS:
        if value.get(key):
            raise _RowError(f'the key "{key}" is not supported')
    for name, keys, build in _FORMATS:
        if all(key in value for key in keys):
            return name, build(value)
    known = ", ".join("+".join(keys) for _, keys, _ in _FORMATS)
    raise _RowError(f"missing keys: got {', '.join(map(str, value)) or 'none'}; expected one of: {known}")


def _from_messages(row: dict[str, Any]) -> Record:
    return _from_turns(row, "messages", "role", "content", {role: role for role in _ROLES})


def _from_sharegpt(row: dict[str, Any]) -> Record:
    return _from_turns(row, "conversations", "from", "value", _SHAREGPT_ROLES)


def _from_turns(row: dict[str, Any], key: str, role_key: str, content_key: str, roles: dict[str, str]) -> Record:
    turns = row[key]
    if not isinstance(turns, list):
        raise _RowError(f'wrong type: "{key}" is {_kind(turns)}, expected a list')
    messages = []
    for number, turn in enumerate(turns, 1):
        where = f"{key}[{number - 1}]"
        if not isinstance(turn, dict):
            raise _RowError(f"wrong type: {where} is {_kind(turn)}, expected an object")
        for unsupported in _UNSUPPORTED_MESSAGE_KEYS:
            if turn.get(unsupported):
                raise _RowError(f'{where}: the key "{unsupported}" is not supported')
        missing = [k for k in (role_key, content_key) if k not in turn]
        if missing:
            raise _RowError(f"missing keys: {where} has no {', '.join(missing)}")
        role = _string(turn[role_key], f"{where}.{role_key}")
        if role not in roles:
            raise _RowError(f"unknown role {role!r} in {where}, expected one of {', '.join(roles)}")
        messages.append((roles[role], _string(turn[content_key], f"{where}.{content_key}")))
    return _conversation(row, messages)


def _from_pair(prompt_key: str, answer_key: str) -> Callable[[dict[str, Any]], Record]:
    def build(row: dict[str, Any]) -> Record:
        user, answer = _string(row[prompt_key], prompt_key), _string(row[answer_key], answer_key)
        return _conversation(row, [("user", user), ("assistant", answer)])

    return build


def _from_alpaca(row: dict[str, Any]) -> Record:
    user = _string(row["instruction"], "instruction")
    extra = row.get("input")
    if extra is not None and _string(extra, "input"):
        user += "\n\n" + extra
    return _conversation(row, [("user", user), ("assistant", _string(row["output"], "output"))])


def _conversation(row: dict[str, Any], messages: list[tuple[str, str]]) -> Conversation:
    if row.get("system") is not None:
        system = _string(row["system"], "system")
        if system and (not messages or messages[0][0] != "system"):
            messages = [("system", system), *messages]
    roles = [role for role, _ in messages]
    if "assistant" not in roles:
        raise _RowError("missing answer: no message of the assistant")
    if "user" not in roles[: roles.index("assistant")]:
        raise _RowError("missing prompt: no message of the user before the first answer")
    for role, content in messages:
        if role in ("user", "assistant") and not content.strip():
            raise _RowError("empty answer" if role == "assistant" else "empty prompt")
    return Conversation(tuple(messages))


def _text(value: Any) -> str:
    text = _string(value, "text")
    if not text.strip():
        raise _RowError("empty text")
    return text


def _string(value: Any, where: str) -> str:
    if not isinstance(value, str):
        raise _RowError(f'wrong type: "{where}" is {_kind(value)}, expected a string')
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise _RowError(f'invalid UTF-8: "{where}" holds a lone surrogate or a stray byte at {error.start}') from error
    return value


def _kind(value: Any) -> str:
    kinds = {dict: "an object", list: "a list", str: "a string", bool: "a boolean", type(None): "null"}
    return kinds.get(type(value), "a number")


# Most specific first: an Alpaca file often carries the rendered whole as "text" too.
_FORMATS: tuple[tuple[str, tuple[str, ...], Callable[[dict[str, Any]], Record]], ...] = (
    ("messages", ("messages",), _from_messages),
    ("sharegpt", ("conversations",), _from_sharegpt),
    ("prompt/completion", ("prompt", "completion"), _from_pair("prompt", "completion")),
    ("alpaca", ("instruction", "output"), _from_alpaca),
    ("question/answer", ("question", "answer"), _from_pair("question", "answer")),
    ("text", ("text",), lambda row: _text(row["text"])),
)


# Encoding


def encode_conversation(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[tuple[str, str]], *, last_turn_only: bool = False
) -> Encoded:
    """Render ``messages`` ((role, content) pairs) with the tokenizer's chat template, tokenize, mark the answers.

    Marked are the tokens that lie wholly inside an assistant's content (of the last turn alone if
    ``last_turn_only``) and the ``<|im_end|>`` that closes it. A token that begins before the answer is not marked.
    Text in a message that spells a special token is tokenized as that token, as it would be at inference.

    Raises ``DataError`` when there is no answer, no template, no character offsets, or when the template does not
    let the answers be located.
    """
    return _encode_conversations(tokenizer, [tuple(messages)], last_turn_only)[0]


def encode_text(tokenizer: PreTrainedTokenizerBase, text: str) -> Encoded:
    """Tokenize a plain text, close it with ``<|endoftext|>`` (or the tokenizer's eos where it lacks that token).

    All tokens are marked. Raises ``DataError`` where the tokenizer has neither.
    """
    return _encode_texts(tokenizer, [text])[0]


def encode_records(
    records: RecordSet | Sequence[Record],
    tokenizer: PreTrainedTokenizerBase,
    seq_len: int,
    *,
    last_turn_only: bool = False,
    progress: bool = True,
) -> EncodedSet:
    """Encode all records, in order, as documents of at most ``seq_len`` tokens.

    A longer conversation is cut at ``seq_len``, or dropped where the cut leaves no target. A longer plain text is
    spread over several documents, each beginning with the last token of the one before, so that every token of the
    text but its first is a target exactly once. ``progress`` shows a bar on a terminal. Raises ``DataError`` as
    ``encode_conversation`` does, and when no document is left.
    """
    if seq_len < 2:
        raise DataError(f"seq_len is {seq_len}, expected at least 2: a target needs a token before it (--seq-len)")
    items = records.records if isinstance(records, RecordSet) else records
    ids: list[np.ndarray] = []
    answers: list[np.ndarray] = []
    sources: list[int] = []
    cut = dropped = split_texts = 0

    def keep(index: int, tokens: list[int], answer: list[bool]) -> bool:
        mask = np.array(answer, dtype=bool)
        mask[0] = False
        if not mask.any():
            return False
        ids.append(np.array(tokens, dtype=np.int32))
        answers.append(mask)
        sources.append(index)
        return True

    with tqdm(total=len(items), desc="tokenize", unit="rec", disable=None if progress else True) as bar:
        for first in range(0, len(items), _CHUNK):
            chunk = items[first : first + _CHUNK]
            for offset, encoded in enumerate(_encode_chunk(tokenizer, chunk, last_turn_only)):
                index, tokens, answer = first + offset, encoded.input_ids, encoded.answer
                if isinstance(chunk[offset], str):
                    split_texts += len(tokens) > seq_len
                    for start in range(0, max(1, len(tokens) - 1), seq_len - 1):
                        keep(index, tokens[start : start + seq_len], answer[start : start + seq_len])
                else:
                    cut += len(tokens) > seq_len
                    dropped += not keep(index, tokens[:seq_len], answer[:seq_len])
            bar.update(len(chunk))
    if not ids:
        raise DataError(
            f"none of {len(items)} records left a target token: {cut} were longer than {seq_len} tokens before their "
            "answer began; give a larger --seq-len"
        )
    return EncodedSet(
        input_ids=np.concatenate(ids),
        answer=np.concatenate(answers),
        starts=np.cumsum([0, *map(len, ids)], dtype=np.int64),
        record=np.array(sources, dtype=np.int64),
        seq_len=seq_len,
        cut=cut,
        dropped=dropped,
        split_texts=split_texts,
    )


@dataclass(frozen=True)
class Spans:
    """Documents as ranges of an ``EncodedSet``'s tokens, nothing copied.

    Attributes:
        start, stop: int64 ``(n,)``.
        origin: int64 ``(n,)``, the document that each is (a part of), not falling.
    """

    start: np.ndarray
    stop: np.ndarray
    origin: np.ndarray

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each, int64 ``(n,)``."""
        return self.stop - self.start

    @staticmethod
    def of(encoded: EncodedSet) -> Spans:
        """The documents as they are."""
        return Spans(encoded.starts[:-1], encoded.starts[1:], np.arange(len(encoded)))


def shorten(encoded: EncodedSet, seq_len: int) -> Spans:
    """The same documents in at most ``seq_len`` tokens, by the rules of ``encode_records``: longer texts (every token
    but the first a target) are spread over several documents, longer conversations cut, or dropped where the cut leaves
    no target. Where a piece begins its first token is no target.

    Raises ``DataError`` when none is left.
    """
    if seq_len < 2:
        raise DataError(f"seq_len is {seq_len}, expected at least 2: a target needs a token before it (--seq-len)")
    whole = Spans.of(encoded)
    short = whole.lengths <= seq_len
    parts = [np.stack([whole.start[short], whole.stop[short], whole.origin[short]])]
    for index in np.flatnonzero(~short).tolist():
        start, stop = int(whole.start[index]), int(whole.stop[index])
        if encoded.answer[start + 1 : stop].all():
            first = np.arange(start, stop - 1, seq_len - 1)
        elif encoded.answer[start + 1 : start + seq_len].any():
            first = np.array([start])
        else:
            continue
        parts.append(np.stack([first, np.minimum(first + seq_len, stop), np.full_like(first, index)]))
    start, stop, origin = np.concatenate(parts, axis=1)
    if not len(start):
        raise DataError(f"none of {len(encoded)} documents has a target in {seq_len} tokens; give a larger --seq-len")
    order = np.argsort(start, kind="stable")
    return Spans(start[order], stop[order], origin[order])


def describe(record_set: RecordSet, encoded: EncodedSet) -> str:
    """A few lines for the log: format, records, tokens, answer tokens, cut, dropped, bad rows."""
    files = record_set.files[0] if len(record_set.files) == 1 else f"{len(record_set.files)} files"
    lines = [f"data: {len(record_set.records):,} records from {files}, format {record_set.format}"]
    if record_set.split is not None:
        lines.append(f"data: split {record_set.split}; {record_set.other_splits:,} rows belong to other splits")
    if record_set.ignored:
        lines.append(f"data: {len(record_set.ignored)} files of other kinds left out, first {record_set.ignored[0]}")
    lines.append(
        f"data: {len(encoded):,} documents, {encoded.tokens:,} tokens, {encoded.answer_tokens:,} answer tokens "
        f"({encoded.answer_tokens / encoded.tokens:.1%})"
    )
    lines.append(
        f"data: {encoded.cut:,} records cut at {encoded.seq_len} tokens, {encoded.dropped:,} of them dropped with no "
        f"answer left; {encoded.split_texts:,} texts split"
    )
    lines.append(f"data: {len(record_set.bad_rows):,} bad rows")
    lines += [f"data:   {bad}" for bad in record_set.bad_rows[:_SHOWN]]
    return "\n".join(lines)


def _encode_chunk(
    tokenizer: PreTrainedTokenizerBase, chunk: Sequence[Record], last_turn_only: bool
) -> Iterator[Encoded]:
    """Encode a mixed chunk with one tokenizer call for its texts and one for its conversations, in order."""
    texts = iter(_encode_texts(tokenizer, [r for r in chunk if isinstance(r, str)]))
    conversations = [r.messages for r in chunk if not isinstance(r, str)]
    dialogues = iter(_encode_conversations(tokenizer, conversations, last_turn_only))
    for record in chunk:
        yield next(texts if isinstance(record, str) else dialogues)


def _encode_texts(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> list[Encoded]:
    if not texts:
        return []
    end = tokenizer.convert_tokens_to_ids(END_OF_DOCUMENT)
    if end is None or tokenizer.convert_ids_to_tokens(end) != END_OF_DOCUMENT:
        end = tokenizer.eos_token_id
    if end is None:
        raise DataError(
            f"the tokenizer has neither {END_OF_DOCUMENT} nor an eos token, expected one to end a text with"
        )
    # verbose=False: a text longer than the model's context is split later, the tokenizer need not warn of it.
    batch = tokenizer(texts, add_special_tokens=False, return_attention_mask=False, verbose=False)["input_ids"]
    return [Encoded([*ids, end], [True] * (len(ids) + 1)) for ids in batch]  # type: ignore[list-item]


def _encode_conversations(
    tokenizer: PreTrainedTokenizerBase, conversations: Sequence[Messages], last_turn_only: bool
) -> list[Encoded]:
    if not conversations:
        return []
    if not tokenizer.is_fast:
        raise DataError(f"{type(tokenizer).__name__} gives no character offsets, expected a fast tokenizer")
    located = [_locate_answers(tokenizer, messages, last_turn_only) for messages in conversations]
    batch = tokenizer(
        [text for text, _ in located],
        add_special_tokens=False,
        return_offsets_mapping=True,
        return_attention_mask=False,
        verbose=False,
    )
    return [
        Encoded(ids, _mask(offsets, spans))
        for ids, offsets, (_, spans) in zip(batch["input_ids"], batch["offset_mapping"], located, strict=True)
    ]


def _locate_answers(
    tokenizer: PreTrainedTokenizerBase, messages: Messages, last_turn_only: bool
) -> tuple[str, list[tuple[int, int]]]:
    """The rendered conversation and the character span of each answer in it, ``<|im_end|>`` included."""
    turns = [i for i, (role, _) in enumerate(messages) if role == "assistant"]
    if not turns:
        raise DataError("the conversation has no message of the assistant, expected at least one to learn from")
    text = _render(tokenizer, messages)
    marker = _MARKER
    while marker in text:
        marker += _MARKER
    spans: list[tuple[int, int]] = []
    for i in turns[-1:] if last_turn_only else turns:
        probe = _render(tokenizer, (*messages[:i], ("assistant", marker), *messages[i + 1 :]))
        before, found, after = probe.partition(marker)
        if not found or marker in after:
            raise _template_error(i, "does not render the answer exactly once")
        if not after.startswith(END_OF_TURN):
            raise _template_error(i, f"closes the answer with {after[:20]!r}, expected {END_OF_TURN}")
        stop = len(text) - len(after)
        if not (text.endswith(after) and stop >= 0):
            raise _template_error(i, "renders what follows the answer differently depending on the answer")
        if not text[:stop].startswith(before):
            # The answer changes what stands before it (Qwen3 puts reasoning into the <think> block): the model
            # itself would write everything behind the generation prompt.
            before = _render(tokenizer, messages[:i], generation_prompt=True)
            if not text[:stop].startswith(before):
                raise _template_error(i, "renders what precedes the answer differently depending on the answer")
        if spans and len(before) < spans[-1][1]:
            raise _template_error(i, "renders the answers out of order")
        spans.append((len(before), stop + len(END_OF_TURN)))
    return text, spans


def _render(tokenizer: PreTrainedTokenizerBase, messages: Messages, generation_prompt: bool = False) -> str:
    if tokenizer.chat_template is None:
        raise DataError("the tokenizer has no chat template, expected that of a Qwen2 or Qwen3 instruct model")
    try:
        return tokenizer.apply_chat_template(  # type: ignore[return-value]
            [{"role": role, "content": content} for role, content in messages],
            tokenize=False,
            add_generation_prompt=generation_prompt,
        )
    except jinja2.TemplateError as error:
        roles = ", ".join(role for role, _ in messages)
        raise DataError(f"the chat template refuses a conversation of the roles {roles}: {error}") from error


def _template_error(turn: int, problem: str) -> DataError:
    return DataError(
        f"the chat template {problem} (message {turn}), so the answer cannot be located; expected a ChatML template "
        "as Qwen2.5 and Qwen3 have (tokenizer.chat_template)"
    )


def _mask(offsets: list[tuple[int, int]], spans: list[tuple[int, int]]) -> list[bool]:
    """For each token whether its characters lie inside one of ``spans``."""
    begin, end = np.array(offsets, dtype=np.int64).reshape(-1, 2).T
    learned = np.zeros(len(begin), dtype=bool)
    for start, stop in spans:
        if not ((begin == stop - len(END_OF_TURN)) & (end == stop)).any():
            raise DataError(
                f"the tokenizer does not hold {END_OF_TURN} as one token, expected that of a Qwen2 or Qwen3"
            )
        learned |= (begin >= start) & (end <= stop)
    return learned.tolist()


# Packing


def pack(lengths: Sequence[int] | np.ndarray, seq_len: int, seed: int, epoch: int) -> list[list[int]]:
    """Distribute documents of the given ``lengths`` over rows of ``seq_len`` tokens; every index occurs exactly once.

    Documents are shuffled, packed best fit from the longest to the shortest within windows of about 1,024 of them,
    and the rows shuffled. A function of its arguments alone. Raises ``DataError`` for a length outside 1..seq_len.
    """
    lengths = _checked_lengths(lengths, seq_len)
    order = _shuffled(len(lengths), seed, epoch, 0)
    rows: list[list[int]] = []
    for window in np.array_split(order, max(1, round(len(order) / _WINDOW))):
        rows += _best_fit(window[np.argsort(-lengths[window], kind="stable")].tolist(), lengths.tolist(), seq_len)
    return [rows[i] for i in _shuffled(len(rows), seed, epoch, 1)]


def pack_in_order(lengths: Sequence[int] | np.ndarray, seq_len: int) -> list[list[int]]:
    """Rows of documents in their given order, a new row where the next does not fit. Raises as ``pack``."""
    rows: list[list[int]] = []
    space = 0
    for index, length in enumerate(_checked_lengths(lengths, seq_len).tolist()):
        if length > space:
            rows.append([])
            space = seq_len
        rows[-1].append(index)
        space -= length
    return rows


def fill_share(rows: Sequence[Sequence[int]], lengths: Sequence[int] | np.ndarray, seq_len: int) -> float:
    """Share of the rows' positions that hold a document's token rather than padding."""
    return sum(int(lengths[i]) for row in rows for i in row) / (len(rows) * seq_len)


def _checked_lengths(lengths: Sequence[int] | np.ndarray, seq_len: int) -> np.ndarray:
    lengths = np.asarray(lengths, dtype=np.int64)
    if len(lengths) and not (lengths.min() >= 1 and lengths.max() <= seq_len):
        raise DataError(
            f"got documents of {lengths.min()} to {lengths.max()} tokens, expected 1 to {seq_len}; encode_records cuts "
            "them when given the same seq_len"
        )
    return lengths


def _best_fit(documents: list[int], lengths: list[int], seq_len: int) -> list[list[int]]:
    rows: list[list[int]] = []
    by_space: list[list[list[int]]] = [[] for _ in range(seq_len + 1)]
    spaces = 0  # bit s set: a row with s free positions exists
    for document in documents:
        length = lengths[document]
        fitting = spaces >> length
        if fitting:
            space = length + (fitting & -fitting).bit_length() - 1
            row = by_space[space].pop()
            if not by_space[space]:
                spaces ^= 1 << space
        else:
            space, row = seq_len, []
            rows.append(row)
        row.append(document)
        by_space[space - length].append(row)
        spaces |= 1 << (space - length)
    return rows


def _shuffled(count: int, *salts: int) -> np.ndarray:
    """A permutation of ``range(count)``, int64: the order of the elements' hashes under ``salts``."""
    key = np.zeros(1, dtype=np.uint64)
    for salt in salts:
        key = _mix(key ^ np.array([salt % 2**64], dtype=np.uint64))
    return np.argsort(_mix(np.arange(count, dtype=np.uint64) ^ key), kind="stable")


def _mix(x: np.ndarray) -> np.ndarray:
    """SplitMix64 of each element, uint64; arrays wrap silently as wanted, numpy scalars would warn."""
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


# Batches


class PackedBatches:
    """Endless iterator of ``Batch`` objects with exactly ``batch_size`` rows of ``seq_len`` tokens.

    Each epoch deals out every document once, packed by ``pack`` (in file order where ``shuffle`` is False); a batch
    may take its last rows from the next epoch. One object is one cursor: ``state_dict`` taken after a batch names the
    batch that follows it, and iterating again goes on from there. ``resize`` changes the size of rows and batches from
    the next batch on: what the epoch has not dealt yet is packed anew in rows of that size.

    Raises ``DataError`` for sizes out of range, no documents, or documents longer than ``seq_len``.
    """

    def __init__(
        self, encoded: EncodedSet, *, seq_len: int, batch_size: int, pad_id: int, seed: int, shuffle: bool = True
    ) -> None:
        _check_sizes(encoded, seq_len, batch_size, pad_id)
        self.encoded = encoded
        self.seq_len = seq_len
        self.batch_size = batch_size
        self.pad_id = pad_id
        self.seed = seed
        self.shuffle = shuffle
        self._whole = seq_len, batch_size
        self._earlier: tuple[tuple[int, int], ...] = ()
        self._epoch = self._row = 0
        self._enter(0)

    @property
    def epoch(self) -> int:
        """Epoch of the row dealt out next, or the one just finished at its very end."""
        return self._epoch

    @property
    def rows_in_epoch(self) -> int:
        """Rows of the current epoch since the last change of their size; a shuffled epoch may differ from the next by a
        few."""
        return len(self._rows)

    @property
    def fill(self) -> float:
        """Share of the current epoch's positions that is not padding."""
        return fill_share(self._rows, self._spans.lengths, self.seq_len)

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 over all that fixes the order of batches except the seed: ids, masks, borders, shuffle, and the sizes
        before any ``resize``."""
        encoded, (seq_len, batch_size) = self.encoded, self._whole
        digest = hashlib.sha256(f"packing 1, {seq_len}, {batch_size}, {self.shuffle}\0".encode())
        for array, dtype in ((encoded.input_ids, "<i4"), (encoded.answer, "u1"), (encoded.starts, "<i8")):
            digest.update(np.ascontiguousarray(array, dtype=dtype).data)
        return digest.hexdigest()

    def __iter__(self) -> PackedBatches:
        return self

    def __next__(self) -> Batch:
        rows = []
        for _ in range(self.batch_size):
            if self._row == len(self._rows):
                self._row, self._earlier = 0, ()
                self._enter(self._epoch + 1)
            rows.append(self._rows[self._row])
            self._row += 1
        return _assemble(self.encoded, self._spans, rows, self.seq_len, self.pad_id)

    def resize(self, seq_len: int, batch_size: int) -> None:
        """Batches of ``batch_size`` rows of ``seq_len`` tokens from the next one on; longer documents are cut as by
        ``shorten``, so that one already cut may be longer again after a later resize.

        Raises ``DataError``, nothing changed, for more tokens than the documents were encoded for.
        """
        if not 2 <= seq_len <= self._whole[0] or batch_size < 1:
            raise DataError(
                f"rows of {seq_len} tokens in batches of {batch_size}, expected 2 to {self._whole[0]} and at least 1"
            )
        self.batch_size = batch_size
        if seq_len == self.seq_len:
            return
        earlier = (*self._earlier, (self.seq_len, self._row))
        spans, rows = self._plan(self._epoch, seq_len, earlier)
        self._spans, self.seq_len, self._earlier, self._rows, self._row = spans, seq_len, earlier, rows, 0

    def state_dict(self) -> dict[str, Any]:
        """The cursor in plain types: ``epoch`` and ``row`` of the next row, ``seed``, ``fingerprint``; the present
        ``seq_len`` and ``batch_size``; ``earlier``: row lengths used before in this epoch, each with how many rows."""
        return {
            "epoch": self._epoch,
            "row": self._row,
            "seed": self.seed,
            "fingerprint": self.fingerprint,
            "seq_len": self.seq_len,
            "batch_size": self.batch_size,
            "earlier": [list(pair) for pair in self._earlier],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on at the batch after which ``state`` was taken.

        Raises ``DataError``, the cursor unmoved, when keys are missing or when the state belongs to other data,
        another seed or a position that does not exist.
        """
        kinds = {"epoch": int, "row": int, "seed": int, "fingerprint": str}
        kinds |= {"seq_len": int, "batch_size": int, "earlier": list}
        for key, kind in kinds.items():
            if not isinstance(state.get(key), kind):
                raise DataError(f"data state: {key!r} is {state.get(key)!r}, expected {kind.__name__}")
        if state["fingerprint"] != self.fingerprint:
            raise DataError(
                f"data state: got fingerprint {state['fingerprint'][:12]}, expected {self.fingerprint[:12]}: the data, "
                "tokenizer, --seq-len or --batch-size are not those of the run that saved it; give the same, or start "
                "without --resume"
            )
        if state["seed"] != self.seed:
            raise DataError(
                f"data state: got seed {state['seed']}, this run has --seed {self.seed}; give --resume the same"
            )
        seq_len, batch_size = state["seq_len"], state["batch_size"]
        earlier = tuple((int(tokens), int(rows)) for tokens, rows in state["earlier"])
        whole = self._whole[0]
        if not all(2 <= s <= whole for s in (seq_len, *(s for s, _ in earlier))) or batch_size < 1:
            raise DataError(
                f"data state: got rows of {seq_len} tokens in batches of {batch_size}, expected 2 to {whole} and at "
                "least 1; the checkpoint is damaged, resume from an older one"
            )
        spans, rows = self._plan(state["epoch"], seq_len, earlier) if state["epoch"] >= 0 else (self._spans, [])
        if not 0 <= state["row"] <= len(rows) or not (rows or earlier):
            raise DataError(
                f"data state: got row {state['row']} of epoch {state['epoch']}, expected 0 to {len(rows)}; the "
                "checkpoint is damaged, resume from an older one"
            )
        self._epoch, self._row, self._rows, self._earlier = state["epoch"], state["row"], rows, earlier
        self._spans, self.seq_len, self.batch_size = spans, seq_len, batch_size

    def _enter(self, epoch: int) -> None:
        self._epoch = epoch
        self._spans, self._rows = self._plan(epoch, self.seq_len, ())

    def _plan(self, epoch: int, seq_len: int, earlier: Sequence[tuple[int, int]]) -> tuple[Spans, list[list[int]]]:
        """Documents at that length, and the rows of those that the epoch has not dealt out in ``earlier`` sizes."""
        waiting = np.ones(len(self.encoded), dtype=bool)
        for tokens, count in earlier:
            spans, rows = self._pack(epoch, tokens, waiting)
            # A text in several pieces counts as dealt out with the first of them.
            waiting[spans.origin[[i for row in rows[:count] for i in row]]] = False
        return self._pack(epoch, seq_len, waiting)

    def _pack(self, epoch: int, seq_len: int, waiting: np.ndarray) -> tuple[Spans, list[list[int]]]:
        whole = seq_len == self._whole[0]
        spans = Spans.of(self.encoded) if whole else shorten(self.encoded, seq_len)
        chosen = np.flatnonzero(waiting[spans.origin])
        lengths = spans.lengths[chosen]
        rows = pack(lengths, seq_len, self.seed, epoch) if self.shuffle else pack_in_order(lengths, seq_len)
        return spans, [chosen[row].tolist() for row in rows]


def evaluation_batches(encoded: EncodedSet, seq_len: int, batch_size: int, pad_id: int) -> Iterator[Batch]:
    """Batches of every document once, in file order; the last may have fewer than ``batch_size`` rows.

    Raises ``DataError`` as ``PackedBatches``, at the call.
    """
    _check_sizes(encoded, seq_len, batch_size, pad_id)
    rows = pack_in_order(encoded.lengths, seq_len)
    return (
        _assemble(encoded, Spans.of(encoded), rows[first : first + batch_size], seq_len, pad_id)
        for first in range(0, len(rows), batch_size)
    )


def _check_sizes(encoded: EncodedSet, seq_len: int, batch_size: int, pad_id: int) -> None:
    if batch_size < 1:
        raise DataError(f"batch_size is {batch_size}, expected at least 1 (--batch-size)")
    if pad_id is None or pad_id < 0:
        raise DataError(f"pad_id is {pad_id}, expected a token id such as the tokenizer's pad_token_id")
    if len(encoded) == 0:
        raise DataError("got no documents, expected at least one")
    _checked_lengths(encoded.lengths, seq_len)


def _assemble(encoded: EncodedSet, spans: Spans, rows: Sequence[Sequence[int]], seq_len: int, pad_id: int) -> Batch:
    ids = np.full((len(rows), seq_len), pad_id, dtype=np.int64)
    labels = np.full((len(rows), seq_len), NOT_LEARNED, dtype=np.int64)
    positions = np.zeros((len(rows), seq_len), dtype=np.int64)
    count = np.arange(seq_len)
    tokens = 0
    for r, row in enumerate(rows):
        at = 0
        for document in row:
            start, stop = spans.start[document], spans.stop[document]
            end = at + int(stop - start)
            ids[r, at:end] = encoded.input_ids[start:stop]
            labels[r, at:end] = np.where(encoded.answer[start:stop], ids[r, at:end], NOT_LEARNED)
            # Shifted by the loss, this label would be predicted from the document before.
            labels[r, at] = NOT_LEARNED
            positions[r, at:end] = count[: end - at]
            at = end
        positions[r, at:] = count[: seq_len - at]
        tokens += at
    return Batch(
        input_ids=torch.from_numpy(ids),
        labels=torch.from_numpy(labels),
        position_ids=torch.from_numpy(positions),
        documents=sum(map(len, rows)),
        tokens=tokens,
        answer_tokens=int((labels != NOT_LEARNED).sum()),
    )

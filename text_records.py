"""Rows to records: conversations and plain texts, and a word on every row that could not be used.

A row is one line of a ``.jsonl`` file, one element of a ``.json`` list, one row of a ``.parquet`` table, one ``.txt``
file, or one row of a stream (``record_streams``). Its format is recognised by its keys, the most specific first. A row
that cannot be used is named with its file, its line and the reason, and counted: more than a small share of such rows
stops the reading, because they are then no accident.

Every record has a key by which splits are drawn: the row's own ``id`` where it has one, else a hash of its prompt (two
answers to one question stay together), so that a split depends on no order and survives an edit of its neighbours.

``.json`` lists are decoded element by element, so that every row has its line; a list that is broken somewhere is
refused whole, since how much is lost behind the fault cannot be known.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import re
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

SUFFIXES = (".json", ".jsonl", ".parquet", ".txt")
# Keys whose content the templates would need and this module does not pass on; ignoring them would change the data.
_UNSUPPORTED_ROW_KEYS = ("tools", "functions", "history")
_UNSUPPORTED_MESSAGE_KEYS = ("tool_calls", "function_call", "reasoning_content", "thinking")
_SYSTEM_KEYS = ("system", "system_prompt")
_NO_CONTENT = ("id", "split")  # row keys that are neither learned nor missed
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
_SPACE = re.compile(r"[ \t\n\r]*")
_SHOWN = 5  # bad rows quoted in errors
_QUOTED = 300  # characters of a row quoted in the reason against it


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
class Row:
    """A row as it lies in its file: ``value`` decoded, or None and the ``fault`` that kept it from being decoded."""

    file: str
    line: int
    value: Any
    fault: str | None = None


@dataclass(frozen=True)
class RecordSet:
    """What reading found.

    ``records``: conversations and plain texts (``str``) in the order of files and rows. ``keys``: of each record, what
    decides its split. ``formats``: those recognised, each with its count. ``bad_rows``: every row left out. ``files``:
    what was read. ``ignored``: files of a folder that have another suffix. ``split``: the split kept, None where no row
    names one. ``other_splits``: rows left to other splits. ``unused``: keys of rows that hold something and are not
    used, the most frequent first, each with its count. ``places``: of each record, its file and line.
    """

    records: tuple[Record, ...]
    keys: tuple[str, ...]
    formats: tuple[tuple[str, int], ...]
    bad_rows: tuple[BadRow, ...]
    files: tuple[str, ...]
    ignored: tuple[str, ...] = ()
    split: str | None = None
    other_splits: int = 0
    unused: tuple[tuple[str, int], ...] = ()
    places: tuple[tuple[str, int], ...] = ()

    @property
    def format(self) -> str:
        """The one format recognised, or all of them with counts."""
        if len(self.formats) == 1:
            return self.formats[0][0]
        return " + ".join(f"{name} ({count})" for name, count in self.formats)

    def where(self, wanted: Callable[[str], bool]) -> RecordSet:
        """The records whose key is wanted; what was found beside records stays."""
        return self.at([i for i, key in enumerate(self.keys) if wanted(key)])

    def at(self, chosen: Sequence[int]) -> RecordSet:
        """The records of these numbers; what was found beside records stays."""
        return replace(
            self,
            records=tuple(self.records[i] for i in chosen),
            keys=tuple(self.keys[i] for i in chosen),
            places=tuple(self.places[i] for i in chosen),
        )


def bad_row_error(bad: BadRow) -> DataError:
    """What ``--strict`` says of a row."""
    return DataError(f"bad row: {bad} (repair it, or read without --strict to leave such rows out)")


def check_share(bad: Sequence[BadRow], examined: int, max_bad_share: float, where: str) -> None:
    """Raise ``DataError`` where more than that share of the examined rows is bad."""
    if len(bad) > max_bad_share * examined:
        quoted = "; ".join(str(b) for b in bad[:_SHOWN])
        raise DataError(
            f"{where}: {len(bad)} of {examined} rows are bad, expected at most {max_bad_share:.2%}; the first: {quoted}"
            ". Repair the data, or allow a larger share with --max-bad-share"
        )


def drawn(key: str, share: float) -> bool:
    """Whether a key belongs to the ``share`` (0 to 1) of all keys that is drawn: those with the lowest hashes."""
    return int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big") < share * 2.0**64


def read_records(
    path: Path | str,
    *,
    strict: bool = False,
    max_bad_share: float = 0.01,
    split: str | None = None,
    without: Collection[Path] = (),
    limit: int | None = None,
) -> RecordSet:
    """Read a ``.jsonl``, ``.json`` (list of objects or strings), ``.parquet`` or ``.txt`` file (one document), or a
    folder of them.

    A folder is read with its subfolders in sorted order; hidden files, other suffixes and ``without`` (files, resolved)
    are left out. Of all rows the first ``limit`` are read. Raises ``DataError`` as ``sort_rows``, when nothing usable
    is left, and for a ``.json`` file that is not one well-formed list, since how much is lost behind the fault cannot
    be known.
    """
    files, ignored = list_files(Path(path))
    files = [file for file in files if file.resolve() not in without]
    rows = itertools.islice((row for file in files for row in rows_of(file)), limit)
    found = sort_rows(rows, strict=strict, max_bad_share=max_bad_share, split=split, where=str(path))
    return replace(found, files=tuple(map(str, files)), ignored=tuple(map(str, ignored)))


def sort_rows(
    rows: Iterable[Row],
    *,
    strict: bool = False,
    max_bad_share: float = 0.01,
    split: str | None = None,
    where: str = "the rows",
    may_be_empty: bool = False,
) -> RecordSet:
    """Records of rows, and the rows that are none.

    Per row the formats ``messages``, ``sharegpt`` (``conversations``), ``prompt/completion``, ``alpaca``
    (``instruction``, ``input``, ``output``), ``question/answer`` and ``text`` are recognised, in this order. A
    ``system`` or ``system_prompt`` string beside a conversation becomes its first message, a ``context`` string beside
    a prompt or question a part of it. Where rows carry ``split`` and ``split`` is
    given, only the rows of that split are examined; where none carries it, all are kept and the result names no split.

    Raises ``DataError`` at the first bad row if ``strict``; when more than ``max_bad_share`` of the examined rows are
    bad; and, unless it ``may_be_empty``, when nothing usable is left.
    """
    if not 0 <= max_bad_share <= 1:
        raise DataError(f"max_bad_share is {max_bad_share}, expected a share from 0 to 1")
    kept: list[tuple[Row, str, Record, bool]] = []
    bad: list[BadRow] = []
    others: Counter[str] = Counter()
    unused: Counter[str] = Counter()

    def refuse(row: Row, reason: str) -> None:
        bad.append(BadRow(row.file, row.line, reason))
        if strict:
            raise bad_row_error(bad[-1])

    for row in rows:
        if row.fault is not None:
            refuse(row, row.fault)
            continue
        has_split = split is not None and isinstance(row.value, dict) and "split" in row.value
        if has_split and row.value["split"] != split:
            others[str(row.value["split"])] += 1
            continue
        try:
            name, record = _parse(row.value)
        except _RowError as error:
            refuse(row, str(error))
            continue
        kept.append((row, name, record, has_split))

    uses_split = bool(others) or any(labelled for *_, labelled in kept)
    if uses_split and not all(labelled for *_, labelled in kept):
        # Neither keeping nor dropping these silently is right: they could belong to either side.
        for row, _, _, labelled in kept:
            if not labelled:
                refuse(row, 'no "split" key, while other rows have one')
        kept = [entry for entry in kept if entry[3]]
    for row, name, _, _ in kept:
        unused.update(_unused(row.value, name))

    check_share(bad, len(kept) + len(bad), max_bad_share, where)
    if not kept and not may_be_empty:
        there = f"; splits found: {dict(others)}" if others else ""
        raise DataError(f"{where}: no usable record{f' in split {split!r}' if split else ''}{there}")
    return RecordSet(
        records=tuple(record for _, _, record, _ in kept),
        keys=tuple(_key(row, record) for row, _, record, _ in kept),
        formats=tuple(Counter(name for _, name, _, _ in kept).most_common()),
        bad_rows=tuple(bad),
        files=(where,),
        split=split if uses_split else None,
        other_splits=sum(others.values()),
        unused=tuple(unused.most_common()),
        places=tuple((row.file, row.line) for row, *_ in kept),
    )


def _key(row: Row, record: Record) -> str:
    """What decides a record's split; see the module's docstring."""
    own = row.value.get("id") if isinstance(row.value, dict) else None
    if isinstance(own, str | int) and not isinstance(own, bool) and own != "":
        return str(own)
    return prompt_key(record)


def prompt_key(record: Record) -> str:
    """SHA-256 of a record's first prompt, or of a text."""
    prompt = record if isinstance(record, str) else next(text for role, text in record.messages if role == "user")
    return hashlib.sha256(prompt.encode()).hexdigest()


def list_files(path: Path) -> tuple[list[Path], list[Path]]:
    """Files to read, and files of a folder that are not read.

    Raises ``DataError`` where there is none to read.
    """
    if path.is_file():
        if path.suffix.lower() not in SUFFIXES:
            raise DataError(f"{path}: got suffix {path.suffix!r}, expected one of {', '.join(SUFFIXES)}")
        return [path], []
    if not path.is_dir():
        raise DataError(f"{path}: no such file or folder; give --data a {', '.join(SUFFIXES)} file or a folder")
    found = [
        f
        for f in sorted(path.rglob("*"), key=lambda f: f.relative_to(path).as_posix())
        if f.is_file() and not any(part.startswith(".") for part in f.relative_to(path).parts)
    ]
    files = [f for f in found if f.suffix.lower() in SUFFIXES]
    if not files:
        raise DataError(f"{path}: the folder holds none of {', '.join(SUFFIXES)} among its {len(found)} files")
    return files, [f for f in found if f.suffix.lower() not in SUFFIXES]


def rows_of(file: Path) -> Iterator[Row]:
    """The rows of one file, in order and as they are asked for. Raises ``DataError`` where the file as a whole cannot
    be read."""
    kind = {".jsonl": _rows_of_lines, ".json": _rows_of_list, ".parquet": _rows_of_table, ".txt": _row_of_text}
    for line, value, fault in kind[file.suffix.lower()](file):
        yield Row(str(file), line, value, fault)


def _row_of_text(file: Path) -> Iterator[tuple[int, Any, str | None]]:
    data = file.read_bytes()
    try:
        yield 1, data.decode("utf-8-sig"), None
    except UnicodeDecodeError as error:
        line = 1 + data.count(b"\n", 0, error.start)
        yield line, None, f"invalid UTF-8 at byte {error.start} of the file ({error.reason})"


def _rows_of_table(file: Path) -> Iterator[tuple[int, Any, str | None]]:
    # pyarrow comes with datasets; a run on JSON does without the second it takes to import.
    import pyarrow
    import pyarrow.parquet

    number = 0
    try:
        with pyarrow.parquet.ParquetFile(file) as table:
            for batch in table.iter_batches(batch_size=1024):
                for value in batch.to_pylist():
                    number += 1
                    yield number, value, None
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        raise DataError(
            f"{file}: cannot be read as Parquet behind row {number}: {' '.join(str(error).split())[:200]}; fetch the "
            "file again, or store its rows as .jsonl"
        ) from error


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
    if isinstance(value.get("id"), str):
        _string(value["id"], "id")
    for key in _UNSUPPORTED_ROW_KEYS:
        if value.get(key):
            raise _RowError(f'the key "{key}" is not supported')
    for name, keys, build in _FORMATS:
        if all(key in value for key in keys):
            return name, build(value)
    known = ", ".join("+".join(keys) for _, keys, _ in _FORMATS)
    raise _RowError(f"missing keys: got {', '.join(map(str, value))[:_QUOTED] or 'none'}; expected one of: {known}")


def _unused(value: Any, name: str) -> list[str]:
    """Keys of a row of that format that hold something and are not used."""
    if not isinstance(value, dict):
        return []
    used = _USED[name]
    return [
        key
        for key, held in value.items()
        if held not in (None, "", [], {}) and (key not in used or (key == "context" and not isinstance(held, str)))
    ]


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
            raise _RowError(f"unknown role {role[:_QUOTED]!r} in {where}, expected one of {', '.join(roles)}")
        if roles[role] == "assistant" and turn.get("weight", 1) not in (None, 1):
            raise _RowError(f'{where}: a "weight" other than 1 is not supported: every answer is learned')
        messages.append((roles[role], _string(turn[content_key], f"{where}.{content_key}")))
    return _conversation(row, messages)


def _from_pair(prompt_key: str, answer_key: str) -> Callable[[dict[str, Any]], Record]:
    def build(row: dict[str, Any]) -> Record:
        user, answer = _string(row[prompt_key], prompt_key), _string(row[answer_key], answer_key)
        if isinstance(row.get("context"), str):
            user = _with_more(user, row["context"], "context")
        return _conversation(row, [("user", user), ("assistant", answer)])

    return build


def _from_alpaca(row: dict[str, Any]) -> Record:
    user = _string(row["instruction"], "instruction")
    if row.get("input") is not None:
        user = _with_more(user, row["input"], "input")
    return _conversation(row, [("user", user), ("assistant", _string(row["output"], "output"))])


def _with_more(user: str, more: Any, key: str) -> str:
    return "\n\n".join(part for part in (user, _string(more, key)) if part)


def _conversation(row: dict[str, Any], messages: list[tuple[str, str]]) -> Conversation:
    for key in _SYSTEM_KEYS:
        if row.get(key) is not None:
            system = _string(row[key], key)
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
# Beside the keys that name a format: those that it uses where they are there.
_MORE_KEYS = {"alpaca": ("input",), "prompt/completion": ("context",), "question/answer": ("context",)}
_USED = {
    name: (*keys, *_NO_CONTENT, *_MORE_KEYS.get(name, ()), *(() if name == "text" else _SYSTEM_KEYS))
    for name, keys, _ in _FORMATS
}

"""Records to documents: chat template -> tokens -> which of them are to be learned.

Method. Each conversation is rendered once with the model's own chat template, and that one string is tokenized with
character offsets; a token is a target when its characters lie inside an assistant's content or in the ``<|im_end|>``
that closes it.

Where an answer starts and stops is measured on the template itself: the conversation is rendered a second time with
that answer replaced by a marker, and what stands before and after the marker must be a prefix and a suffix of the
real text. So a template may strip an answer, drop its reasoning or put an empty ``<think>`` block before it (Qwen3):
what it adds is never learned, what it leaves of the answer is. An answer that changes what stands before it (Qwen3
with real reasoning) starts where the generation prompt ends. A conversation that fits neither is a bad row; where none
fits, it is the template, which raises ``DataError``.

Layout. Documents lie in flat arrays (``EncodedSet``): token ids, a target mask of the same length, and the start of
each document.

Rejected: ``return_assistant_tokens_mask`` (Qwen's templates carry no ``{% generation %}`` marks), a search for the ids
of ``<|im_start|>assistant`` (an answer may quote them), and tokenizing prompt and answer apart (at the seam it gives
tokens that the model never meets when the whole is tokenized).
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

import jinja2
import numpy as np
from tqdm import tqdm

from harmless_text import harmless
from text_records import BadRow, DataError, Messages, Record, RecordSet, bad_row_error, check_share

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

END_OF_TURN = "<|im_end|>"
END_OF_DOCUMENT = "<|endoftext|>"
ENCODING = "documents 2"
"""Raised whenever the same records become other documents: what is kept on disk is then made again."""

_MARKER = "\ue000"  # private use: no template contains it, and it grows until no conversation does
_CHUNK = 256  # records per call of the tokenizer
_CHARACTERS = 1 << 20  # of them about so many per call: a tokenizer needs hundreds of bytes for each
_BORDER = re.compile(r"\n(?=\S)|(?<=[^\W\d_])(?= [^\W\d_])")  # behind a line, or before the space of a word
_AROUND = 400  # characters on either side that prove a border
_TRIES = 32  # borders that are tried, one after the other
_SHOWN = 5  # bad rows quoted in a description
_COLUMNS = 12  # columns named in a description
_QUOTED = 300  # characters of a conversation's roles quoted in the reason against it


class _NotHeld(DataError):
    """The template cannot hold this conversation; others it may."""


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
    kept no target and were left out; ``split_texts``: plain texts spread over several documents; ``refused``:
    conversations that the template cannot hold.
    """

    input_ids: np.ndarray
    answer: np.ndarray
    starts: np.ndarray
    record: np.ndarray
    seq_len: int
    cut: int
    dropped: int
    split_texts: int
    refused: tuple[BadRow, ...] = ()

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

    def part(self, first: int, stop: int) -> EncodedSet:
        """Documents ``first`` to ``stop`` - 1 as a set of its own: views of the same arrays, the whole's counts."""
        begin, end = self.starts[first], self.starts[stop]
        return replace(
            self,
            input_ids=self.input_ids[begin:end],
            answer=self.answer[begin:end],
            starts=self.starts[first : stop + 1] - begin,
            record=self.record[first:stop],
        )

    @staticmethod
    def joined(sets: Sequence[EncodedSet]) -> EncodedSet:
        """The documents of several sets (at least one) of one ``seq_len``, in order; ``record`` counts on."""
        borders = np.cumsum([0, *(s.tokens for s in sets)])
        records = np.cumsum([0, *(int(s.record.max(initial=-1)) + 1 for s in sets)])
        return EncodedSet(
            input_ids=np.concatenate([s.input_ids for s in sets]),
            answer=np.concatenate([s.answer for s in sets]),
            starts=np.concatenate([[0], *(s.starts[1:] + b for s, b in zip(sets, borders, strict=False))]),
            record=np.concatenate([s.record + r for s, r in zip(sets, records, strict=False)]),
            seq_len=sets[0].seq_len,
            cut=sum(s.cut for s in sets),
            dropped=sum(s.dropped for s in sets),
            split_texts=sum(s.split_texts for s in sets),
            refused=tuple(bad for s in sets for bad in s.refused),
        )

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 over token ids, targets and borders."""
        digest = hashlib.sha256()
        for array, dtype in ((self.input_ids, "<i4"), (self.answer, "u1"), (self.starts, "<i8")):
            digest.update(np.ascontiguousarray(array, dtype=dtype).data)
        return digest.hexdigest()


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
    (found,) = _encode_conversations(tokenizer, [tuple(messages)], last_turn_only)
    if isinstance(found, str):
        raise DataError(found)
    ids, answer = found
    return Encoded(ids.tolist(), answer.tolist())


def encode_text(tokenizer: PreTrainedTokenizerBase, text: str) -> Encoded:
    """Tokenize a plain text, close it with ``<|endoftext|>`` (or the tokenizer's eos where it lacks that token).

    All tokens are marked. Raises ``DataError`` where the tokenizer has neither.
    """
    ((ids, answer),) = _encode_texts(tokenizer, [text])
    return Encoded(ids.tolist(), answer.tolist())


def encode_records(
    records: RecordSet | Sequence[Record],
    tokenizer: PreTrainedTokenizerBase,
    seq_len: int,
    *,
    last_turn_only: bool = False,
    progress: bool = True,
    may_be_empty: bool = False,
    strict: bool = False,
    max_bad_share: float = 0.01,
) -> EncodedSet:
    """Encode all records, in order, as documents of at most ``seq_len`` tokens.

    A longer conversation is cut at ``seq_len``, or dropped where the cut leaves no target. A longer plain text is
    spread over several documents, each beginning with the last token of the one before, so that every token of the
    text but its first is a target exactly once. A conversation that the template cannot hold, or whose answers cannot
    be located in it, is a bad row and left out. ``progress`` shows a bar on a terminal.

    Raises ``DataError`` for a tokenizer that is of no use, as ``encode_conversation`` does; at the first bad row if
    ``strict``; when more than ``max_bad_share`` of the rows are bad, with those that reading left out; and, unless it
    ``may_be_empty``, when the template holds no conversation, or no document is left.
    """
    if seq_len < 2:
        raise DataError(f"seq_len is {seq_len}, expected at least 2: a target needs a token before it (--seq-len)")
    items = records.records if isinstance(records, RecordSet) else records
    ids: list[np.ndarray] = []
    answers: list[np.ndarray] = []
    sources: list[int] = []
    refused: list[BadRow] = []
    cut = dropped = split_texts = conversations = 0

    def keep(index: int, tokens: np.ndarray, answer: np.ndarray) -> bool:
        mask = answer.copy()
        mask[0] = False
        if not mask.any():
            return False
        ids.append(tokens.copy())
        answers.append(mask)
        sources.append(index)
        return True

    with tqdm(total=len(items), desc="tokenize", unit="rec", disable=None if progress else True) as bar:
        for first, chunk in _chunks(items):
            for offset, found in enumerate(_encode_chunk(tokenizer, chunk, last_turn_only)):
                index = first + offset
                conversations += not isinstance(chunk[offset], str)
                if isinstance(found, str):
                    refused.append(BadRow(*_place(records, index), found))
                    if strict:
                        raise bad_row_error(refused[-1])
                    continue
                tokens, answer = found
                if isinstance(chunk[offset], str):
                    split_texts += len(tokens) > seq_len
                    for start in range(0, max(1, len(tokens) - 1), seq_len - 1):
                        keep(index, tokens[start : start + seq_len], answer[start : start + seq_len])
                else:
                    cut += len(tokens) > seq_len
                    dropped += not keep(index, tokens[:seq_len], answer[:seq_len])
            bar.update(len(chunk))
    if refused and len(refused) == conversations and not may_be_empty:
        raise DataError(refused[0].reason)
    if refused:
        bad = [*(records.bad_rows if isinstance(records, RecordSet) else ()), *refused]
        where = records.files[0] if isinstance(records, RecordSet) else "the records"
        check_share(bad, len(bad) - len(refused) + len(items), max_bad_share, where)
    if not ids and not may_be_empty:
        raise DataError(
            f"none of {len(items)} records left a target token: {cut} were longer than {seq_len} tokens before their "
            "answer began; give a larger --seq-len"
        )
    return EncodedSet(
        input_ids=np.concatenate([np.zeros(0, dtype=np.int32), *ids]),
        answer=np.concatenate([np.zeros(0, dtype=bool), *answers]),
        starts=np.cumsum([0, *map(len, ids)], dtype=np.int64),
        record=np.array(sources, dtype=np.int64),
        seq_len=seq_len,
        cut=cut,
        dropped=dropped,
        split_texts=split_texts,
        refused=tuple(refused),
    )


def _place(records: RecordSet | Sequence[Record], index: int) -> tuple[str, int]:
    """File and line of a record; where they are not known, its number among the records, from 1."""
    return records.places[index] if isinstance(records, RecordSet) else ("record", index + 1)


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """SHA-256 over what decides a record's tokens: vocabulary, merges, normaliser, special tokens, chat template.

    Raises ``DataError`` for a tokenizer that is not a fast one.
    """
    if not tokenizer.is_fast:
        raise DataError(f"{type(tokenizer).__name__} gives no character offsets, expected a fast tokenizer")
    backend = json.loads(tokenizer.backend_tokenizer.to_str())
    # Set by earlier calls, and no part of what a text becomes here.
    backend.pop("truncation", None)
    backend.pop("padding", None)
    parts = [backend, tokenizer.chat_template, tokenizer.eos_token_id, tokenizer.pad_token_id]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def describe(record_set: RecordSet, encoded: EncodedSet) -> str:
    """A few lines for the log: format, records, columns not used, tokens, answer tokens, cut, dropped, bad rows."""
    files = record_set.files[0] if len(record_set.files) == 1 else f"{len(record_set.files)} files"
    count = len(record_set.records) - len(encoded.refused)
    lines = [f"data: {count:,} records from {files}, format {record_set.format}"]
    if record_set.split is not None:
        lines.append(f"data: split {record_set.split}; {record_set.other_splits:,} rows belong to other splits")
    if record_set.ignored:
        lines.append(f"data: {len(record_set.ignored)} files of other kinds left out, first {record_set.ignored[0]}")
    lines += unused_columns(record_set)
    lines.append(
        f"data: {len(encoded):,} documents, {encoded.tokens:,} tokens, {encoded.answer_tokens:,} answer tokens "
        f"({encoded.answer_tokens / max(1, encoded.tokens):.1%})"
    )
    lines += what_was_cut(encoded)
    bad_rows = (*record_set.bad_rows, *encoded.refused)
    if bad_rows:
        lines.append(f"data: {len(bad_rows):,} bad rows")
    lines += [f"data:   {bad}" for bad in bad_rows[:_SHOWN]]
    return "\n".join(lines)


def what_was_cut(encoded: EncodedSet, where: str = "") -> list[str]:
    """A line that counts what was cut, dropped and split, ``where`` at its front; none where nothing was."""
    if not encoded.cut and not encoded.split_texts:
        return []
    return [
        f"data: {where}{encoded.cut:,} records cut at {encoded.seq_len} tokens, {encoded.dropped:,} of them dropped "
        f"with no answer left; {encoded.split_texts:,} texts split"
    ]


def unused_columns(record_set: RecordSet) -> list[str]:
    """A line that names columns of the rows that are not used, the most frequent first; none where all are."""
    names = [" ".join(harmless(name, 40).split()) for name, _ in record_set.unused]
    if not names:
        return []
    more = f" and {len(names) - _COLUMNS} more" if len(names) > _COLUMNS else ""
    return [f"data: columns not used: {', '.join(names[:_COLUMNS])}{more}"]


_Document = tuple[np.ndarray, np.ndarray]
"""Token ids, int32, and whether each is learned, bool."""


def _size(record: Record) -> int:
    return len(record) if isinstance(record, str) else sum(len(content) for _, content in record.messages)


def _chunks(items: Sequence[Record]) -> Iterator[tuple[int, Sequence[Record]]]:
    """Runs of records, each with the number of its first."""
    first = characters = 0
    for number, record in enumerate(items):
        size = _size(record)
        if number > first and (number - first == _CHUNK or characters + size > _CHARACTERS):
            yield first, items[first:number]
            first, characters = number, 0
        characters += size
    if items:
        yield first, items[first:]


def _encode_chunk(
    tokenizer: PreTrainedTokenizerBase, chunk: Sequence[Record], last_turn_only: bool
) -> Iterator[_Document | str]:
    """Encode a mixed chunk with one tokenizer call for its texts and one for its conversations, in order; of a
    conversation that the template cannot hold, why."""
    texts = iter(_encode_texts(tokenizer, [r for r in chunk if isinstance(r, str)]))
    conversations = [r.messages for r in chunk if not isinstance(r, str)]
    dialogues = iter(_encode_conversations(tokenizer, conversations, last_turn_only))
    for record in chunk:
        yield next(texts if isinstance(record, str) else dialogues)


def _encode_texts(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> list[_Document]:
    if not texts:
        return []
    end = tokenizer.convert_tokens_to_ids(END_OF_DOCUMENT)
    if end is None or tokenizer.convert_ids_to_tokens(end) != END_OF_DOCUMENT:
        end = tokenizer.eos_token_id
    if end is None:
        raise DataError(
            f"the tokenizer has neither {END_OF_DOCUMENT} nor an eos token, expected one to end a text with"
        )
    if len(texts) > 1 and sum(map(len, texts)) <= _CHARACTERS:
        whole = [np.array(ids, dtype=np.int32) for ids in _ids_of(tokenizer, texts)]
    else:
        whole = [
            np.concatenate(
                [np.array(_ids_of(tokenizer, [piece])[0], dtype=np.int32) for piece in _pieces(tokenizer, t)]
            )
            for t in texts
        ]
    return [(np.append(ids, np.array([end], dtype=np.int32)), np.ones(len(ids) + 1, dtype=bool)) for ids in whole]


def _ids_of(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> list[list[int]]:
    # verbose=False: a text longer than the model's context is split later, the tokenizer need not warn of it.
    found: Any = tokenizer(texts, add_special_tokens=False, return_attention_mask=False, verbose=False)
    return found["input_ids"]


def _pieces(tokenizer: PreTrainedTokenizerBase, text: str) -> Iterator[str]:
    """A text in pieces whose tokens, one after the other, are the text's."""
    begin = 0
    while len(text) - begin > 2 * _CHARACTERS:
        stop = _border(tokenizer, text, begin + _CHARACTERS)
        if stop is None:
            break
        yield text[begin:stop]
        begin = stop
    yield text[begin:]


def _border(tokenizer: PreTrainedTokenizerBase, text: str, near: int) -> int | None:
    """A place behind ``near`` where no token goes across, as the tokens of its surroundings show; None where there is
    none to be found."""
    for _, found in zip(range(_TRIES), _BORDER.finditer(text, near, near + _CHARACTERS), strict=False):
        place = found.end()
        before, behind = text[place - _AROUND : place], text[place : place + _AROUND]
        whole, *parts = _ids_of(tokenizer, [before + behind, before, behind])
        if whole == parts[0] + parts[1]:
            return place
    return None


def _encode_conversations(
    tokenizer: PreTrainedTokenizerBase, conversations: Sequence[Messages], last_turn_only: bool
) -> list[_Document | str]:
    """Documents; of a conversation that the template cannot hold, why."""
    if not conversations:
        return []
    if not tokenizer.is_fast:
        raise DataError(f"{type(tokenizer).__name__} gives no character offsets, expected a fast tokenizer")
    located: list[tuple[str, list[tuple[int, int]]] | str] = []
    for messages in conversations:
        try:
            located.append(_locate_answers(tokenizer, messages, last_turn_only))
        except _NotHeld as error:
            located.append(str(error))
    held = [found for found in located if not isinstance(found, str)]
    if not held:
        return [found for found in located if isinstance(found, str)]
    batch = tokenizer(
        [text for text, _ in held],
        add_special_tokens=False,
        return_offsets_mapping=True,
        return_attention_mask=False,
        verbose=False,
    )
    documents = (
        (np.array(ids, dtype=np.int32), _mask(offsets, spans))
        for ids, offsets, (_, spans) in zip(batch["input_ids"], batch["offset_mapping"], held, strict=True)
    )
    return [found if isinstance(found, str) else next(documents) for found in located]


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
        roles = ", ".join(role for role, _ in messages)[:_QUOTED]
        raise _NotHeld(f"the chat template refuses a conversation of the roles {roles}: {error}") from error


def _template_error(turn: int, problem: str) -> _NotHeld:
    return _NotHeld(
        f"the chat template {problem} (message {turn}), so the answer cannot be located; expected a ChatML template "
        "as Qwen2.5 and Qwen3 have (tokenizer.chat_template)"
    )


def _mask(offsets: list[tuple[int, int]], spans: list[tuple[int, int]]) -> np.ndarray:
    """For each token whether its characters lie inside one of ``spans``."""
    begin, end = np.array(offsets, dtype=np.int64).reshape(-1, 2).T
    learned = np.zeros(len(begin), dtype=bool)
    for start, stop in spans:
        if not ((begin == stop - len(END_OF_TURN)) & (end == stop)).any():
            raise DataError(
                f"the tokenizer does not hold {END_OF_TURN} as one token, expected that of a Qwen2 or Qwen3"
            )
        learned |= (begin >= start) & (end <= stop)
    return learned

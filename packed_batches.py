"""Documents to batches: packed rows of fixed length, dealt out from a cursor that a checkpoint can hold.

Layout. A row holds whole documents end to end, then padding. ``position_ids`` restart at 0 for each of them: given
``attention_mask=None`` and ``use_cache=False``, transformers reads document borders from these restarts, with its eager
and sdpa attention in any number of rows (5.23, tested). Its flash attention reads them in a batch of one row only and
lets the documents of wider batches see each other: no flash attention with ``batch_size`` above 1.

Order. Every random choice is a hash of (seed, epoch, element), so it needs no generator state and outlives numpy's.
Each epoch packs anew within windows of shuffled documents, then shuffles the rows. Documents come in blocks: one for a
file, as many as it takes for a stream or a folder of token shards. A block is packed and dealt out by itself, so only
one (and the next, while it is being prepared) is in memory, and a cursor names a block and a row in it.

Several workers take turns: of a step's micro-batches, in the one global order, worker w of W takes those whose number
leaves w when divided by W (:class:`WorkerShare`). The cursor is global and does not know how many workers there are.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, Protocol

import numpy as np
import torch

from answer_masks import EncodedSet
from text_records import DataError

NOT_LEARNED = -100

_WINDOW = 1024  # documents packed together


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
    no target. Where a piece begins its first token is no target. None may be left.
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
    order = np.argsort(start, kind="stable")
    return Spans(start[order], stop[order], origin[order])


def recut(encoded: EncodedSet, seq_len: int) -> EncodedSet:
    """The same documents as a set of documents of at most ``seq_len`` tokens, cut by the rules of ``shorten``; the set
    itself where none is longer, an empty one where none keeps a target."""
    longest = int(encoded.lengths.max(initial=0))
    if longest <= seq_len:
        return replace(encoded, seq_len=seq_len)
    texts = [bool(encoded.answer[a + 1 : b].all()) for a, b in pairwise(encoded.starts.tolist())]
    longer = encoded.lengths > seq_len
    spans = shorten(encoded, seq_len)
    ids = [encoded.input_ids[a:b] for a, b in zip(spans.start, spans.stop, strict=True)]
    answers = [encoded.answer[a:b].copy() for a, b in zip(spans.start, spans.stop, strict=True)]
    for answer in answers:
        answer[0] = False
    dialogue = longer & ~np.array(texts)
    return EncodedSet(
        input_ids=np.concatenate([encoded.input_ids[:0], *ids]),
        answer=np.concatenate([encoded.answer[:0], *answers]),
        starts=np.cumsum([0, *map(len, ids)], dtype=np.int64),
        record=encoded.record[spans.origin],
        seq_len=seq_len,
        cut=int(dialogue.sum()),
        dropped=int((dialogue & ~np.isin(np.arange(len(encoded)), spans.origin)).sum()),
        split_texts=int((longer & np.array(texts)).sum()),
    )


def pack(lengths: Sequence[int] | np.ndarray, seq_len: int, seed: int, epoch: int) -> list[list[int]]:
    """Distribute documents of the given ``lengths`` over rows of ``seq_len`` tokens; every index occurs exactly once.

    Documents are shuffled, packed best fit from the longest to the shortest within windows of about 1,024 of them,
    and the rows shuffled. A function of its arguments alone. Raises ``DataError`` for a length outside 1..seq_len.
    """
    lengths = _checked_lengths(lengths, seq_len)
    order = _shuffled(len(lengths), seed, epoch, 0)
    plain = lengths.tolist()
    rows: list[list[int]] = []
    for window in np.array_split(order, max(1, round(len(order) / _WINDOW))):
        rows += _best_fit(window[np.argsort(-lengths[window], kind="stable")].tolist(), plain, seq_len)
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
    """Share of the rows' positions that hold a document's token rather than padding; 0 without rows."""
    return sum(int(lengths[i]) for row in rows for i in row) / max(1, len(rows) * seq_len)


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


def order_of(count: int, seed: int, epoch: int) -> list[int]:
    """The order in which an epoch takes ``count`` blocks that can be taken in any order."""
    return _shuffled(count, seed, epoch, 2).tolist()


def _mix(x: np.ndarray) -> np.ndarray:
    """SplitMix64 of each element, uint64; arrays wrap silently as wanted, numpy scalars would warn."""
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


class Blocks(Protocol):
    """Documents in blocks, epoch after epoch, each of them to be had at any time."""

    @property
    def fingerprint(self) -> str:
        """SHA-256 over what fixes all blocks; where content cannot be known in advance, over what names it."""
        ...

    def block(self, epoch: int, number: int) -> EncodedSet | None:
        """Block ``number`` (from 0) of an epoch, perhaps an empty one; None behind the last."""
        ...


@dataclass(frozen=True)
class OneBlock:
    """Documents that are all there: every epoch is one block of them."""

    encoded: EncodedSet

    @property
    def fingerprint(self) -> str:
        return self.encoded.fingerprint

    def block(self, epoch: int, number: int) -> EncodedSet | None:
        return self.encoded if number == 0 else None


_Placed = tuple[EncodedSet, Spans, list[int]]
"""A row: documents by number among the spans of a set."""


class PackedBatches:
    """Endless iterator of ``Batch`` objects with exactly ``batch_size`` rows of ``seq_len`` tokens.

    Each epoch deals out every document once, block by block, packed by ``pack`` (in their own order where ``shuffle``
    is False); a batch may take its last rows from the next block or epoch. One object is one cursor: ``state_dict``
    taken after a batch names the batch that follows it, and iterating again goes on from there. ``resize`` changes the
    size of rows and batches from the next batch on: what the block has not dealt yet is packed anew in rows of that
    size.

    Raises ``DataError`` for sizes out of range, no documents, or documents longer than ``seq_len``.
    """

    def __init__(
        self,
        documents: EncodedSet | Blocks,
        *,
        seq_len: int,
        batch_size: int,
        pad_id: int,
        seed: int,
        shuffle: bool = True,
    ) -> None:
        self.blocks: Blocks = OneBlock(documents) if isinstance(documents, EncodedSet) else documents
        self.seq_len = seq_len
        self.batch_size = batch_size
        self.pad_id = pad_id
        self.seed = seed
        self.shuffle = shuffle
        self._encoded: EncodedSet
        self._whole = seq_len, batch_size
        self._earlier: tuple[tuple[int, int], ...] = ()
        self._epoch = self._block = self._row = 0
        self._enter(0, 0)

    @property
    def epoch(self) -> int:
        """Epoch of the row dealt out next, or the one just finished at its very end."""
        return self._epoch

    @property
    def encoded(self) -> EncodedSet:
        """The present block's documents."""
        return self._encoded

    @property
    def rows_in_block(self) -> int:
        """Rows of the current block since the last change of their size; a shuffled epoch may differ from the next by a
        few."""
        return len(self._rows)

    @property
    def position(self) -> dict[str, int]:
        """Where the cursor is: ``epoch``, ``block``, ``row`` of ``rows``, counted from 0."""
        return {"epoch": self._epoch, "block": self._block, "row": self._row, "rows": len(self._rows)}

    @property
    def fill(self) -> float:
        """Share of the current block's positions that is not padding."""
        return fill_share(self._rows, self._spans.lengths, self.seq_len)

    @property
    def fingerprint(self) -> str:
        """SHA-256 over all that fixes the order of batches except the seed: the blocks, shuffle, and the sizes before
        any ``resize``."""
        seq_len, batch_size = self._whole
        text = f"packing 2, {seq_len}, {batch_size}, {self.shuffle}, {self.blocks.fingerprint}"
        return hashlib.sha256(text.encode()).hexdigest()

    def __iter__(self) -> PackedBatches:
        return self

    def __next__(self) -> Batch:
        rows = [self._next_row() for _ in range(self.batch_size)]
        return _assemble(rows, self.seq_len, self.pad_id)

    def skip(self, batches: int) -> None:
        """Pass over so many batches without making them."""
        for _ in range(batches * self.batch_size):
            self._next_row()

    def _next_row(self) -> _Placed:
        while self._row == len(self._rows):
            self._row, self._earlier = 0, ()
            self._enter(self._epoch, self._block + 1)
        self._row += 1
        return self._encoded, self._spans, self._rows[self._row - 1]

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
        spans, rows = self._plan(self._encoded, self._epoch, seq_len, earlier)
        self._spans, self.seq_len, self._earlier, self._rows, self._row = spans, seq_len, earlier, rows, 0

    def state_dict(self) -> dict[str, Any]:
        """The cursor in plain types: ``epoch``, ``block`` and ``row`` of the next row, ``seed``, ``fingerprint``,
        ``content`` (the block's fingerprint); the present ``seq_len`` and ``batch_size``; ``earlier``: row lengths used
        before in this block, each with how many rows."""
        return {
            "epoch": self._epoch,
            "block": self._block,
            "row": self._row,
            "seed": self.seed,
            "fingerprint": self.fingerprint,
            "content": self._encoded.fingerprint,
            "seq_len": self.seq_len,
            "batch_size": self.batch_size,
            "earlier": [list(pair) for pair in self._earlier],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on at the batch after which ``state`` was taken.

        Raises ``DataError``, the cursor unmoved, when keys are missing or when the state belongs to other data,
        another seed or a position that does not exist.
        """
        kinds = {"epoch": int, "block": int, "row": int, "seed": int, "fingerprint": str, "content": str}
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
        epoch, number = state["epoch"], state["block"]
        present = (epoch, number) == (self._epoch, self._block)
        if present:
            encoded: EncodedSet | None = self._encoded
        else:
            encoded = self.blocks.block(epoch, number) if min(epoch, number) >= 0 else None
        if encoded is not None and encoded.fingerprint != state["content"]:
            raise DataError(
                f"data state: block {number} of epoch {epoch} has changed since the checkpoint was saved: the stream "
                "no longer gives the same rows; pin its revision (ID@REVISION), or start without --resume"
            )
        spans, rows = self._plan(encoded, epoch, seq_len, earlier) if encoded is not None else (self._spans, [])
        if encoded is None or not 0 <= state["row"] <= len(rows) or not (rows or earlier):
            raise DataError(
                f"data state: got row {state['row']} of block {number} of epoch {epoch}, expected 0 to {len(rows)}; "
                "the checkpoint is damaged, resume from an older one"
            )
        self._encoded, self._epoch, self._block, self._row = encoded, epoch, number, state["row"]
        self._rows, self._earlier, self._spans = rows, earlier, spans
        self.seq_len, self.batch_size = seq_len, batch_size

    def _enter(self, epoch: int, number: int) -> None:
        """The first block from there on with documents that keep a target in rows of the present length."""
        begun, met = epoch, 0
        while True:
            encoded = self.blocks.block(epoch, number)
            if encoded is None:
                epoch, number = epoch + 1, 0
                if epoch > begun + 1:
                    if met:
                        raise DataError(
                            f"none of {met} documents has a target in {self.seq_len} tokens; give a larger --seq-len"
                        )
                    raise DataError("got no documents in a whole epoch, expected at least one")
                continue
            if len(encoded):
                _check_sizes(encoded, self._whole[0], self.batch_size, self.pad_id)
                spans, rows = self._plan(encoded, epoch, self.seq_len, ())
                if rows:
                    break
                met += len(encoded)
            number += 1
        self._encoded, self._epoch, self._block = encoded, epoch, number
        self._spans, self._rows = spans, rows

    def _plan(
        self, encoded: EncodedSet, epoch: int, seq_len: int, earlier: Sequence[tuple[int, int]]
    ) -> tuple[Spans, list[list[int]]]:
        """Documents at that length, and the rows of those that the block has not dealt out in ``earlier`` sizes."""
        waiting = np.ones(len(encoded), dtype=bool)
        for tokens, count in earlier:
            spans, rows = self._pack(encoded, epoch, tokens, waiting)
            # A text in several pieces counts as dealt out with the first of them.
            waiting[spans.origin[[i for row in rows[:count] for i in row]]] = False
        return self._pack(encoded, epoch, seq_len, waiting)

    def _pack(
        self, encoded: EncodedSet, epoch: int, seq_len: int, waiting: np.ndarray
    ) -> tuple[Spans, list[list[int]]]:
        whole = seq_len == self._whole[0]
        spans = Spans.of(encoded) if whole else shorten(encoded, seq_len)
        chosen = np.flatnonzero(waiting[spans.origin])
        lengths = spans.lengths[chosen]
        rows = pack(lengths, seq_len, self.seed, epoch) if self.shuffle else pack_in_order(lengths, seq_len)
        return spans, [chosen[row].tolist() for row in rows]


class WorkerShare:
    """Of the batches of one global order, those of one of several workers.

    Batch number n (from 0) belongs to worker n mod ``workers``. After each worker's n-th batch all cursors have passed
    the same n · ``workers`` batches: a state taken then serves any number of workers.
    """

    def __init__(self, batches: PackedBatches, worker: int, workers: int) -> None:
        if not 0 <= worker < workers:
            raise DataError(f"worker is {worker} of {workers}, expected 0 to {workers - 1}")
        self.batches = batches
        self.worker = worker
        self.workers = workers

    def __iter__(self) -> WorkerShare:
        return self

    def __next__(self) -> Batch:
        self.batches.skip(self.worker)
        batch = next(self.batches)
        self.batches.skip(self.workers - 1 - self.worker)
        return batch


def evaluation_batches(encoded: EncodedSet, seq_len: int, batch_size: int, pad_id: int) -> Iterator[Batch]:
    """Batches of every document once, in file order; the last may have fewer than ``batch_size`` rows.

    Raises ``DataError`` as ``PackedBatches``, at the call.
    """
    _check_sizes(encoded, seq_len, batch_size, pad_id)
    spans = Spans.of(encoded)
    rows: list[_Placed] = [(encoded, spans, row) for row in pack_in_order(encoded.lengths, seq_len)]
    return (_assemble(rows[first : first + batch_size], seq_len, pad_id) for first in range(0, len(rows), batch_size))


def _check_sizes(encoded: EncodedSet, seq_len: int, batch_size: int, pad_id: int) -> None:
    if batch_size < 1:
        raise DataError(f"batch_size is {batch_size}, expected at least 1 (--batch-size)")
    if pad_id is None or pad_id < 0:
        raise DataError(f"pad_id is {pad_id}, expected a token id such as the tokenizer's pad_token_id")
    if len(encoded) == 0:
        raise DataError("got no documents, expected at least one")
    _checked_lengths(encoded.lengths, seq_len)


def _assemble(rows: Sequence[_Placed], seq_len: int, pad_id: int) -> Batch:
    ids = np.full((len(rows), seq_len), pad_id, dtype=np.int64)
    labels = np.full((len(rows), seq_len), NOT_LEARNED, dtype=np.int64)
    positions = np.zeros((len(rows), seq_len), dtype=np.int64)
    count = np.arange(seq_len)
    tokens = 0
    for r, (encoded, spans, row) in enumerate(rows):
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
        documents=sum(len(row) for *_, row in rows),
        tokens=tokens,
        answer_tokens=int((labels != NOT_LEARNED).sum()),
    )

"""Rows that are too many to read at once: local files and datasets of the hub, one pass after another, from any row.

A stream is a name, a fingerprint and ``rows(epoch, start)``. The hub's come through ``datasets`` in streaming mode, at
one revision, which is looked up when a run begins and kept (``training_data``), so a resumed run reads what the first
one read. Shuffling has two parts: an epoch draws the order of the dataset's files anew, and ``StreamBlocks`` packs
blocks of some thousand rows, within which ``packed_batches`` shuffles. Both are functions of (seed, epoch), and
resuming needs the number of a block, not the content of a buffer.

Rejected: ``datasets``' own shuffle buffer. Its state is the buffer; restoring it means filling it again, and what it
has dealt out is known to the library alone.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import logging
import os
import re
import time
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from answer_masks import EncodedSet, encode_records, tokenizer_fingerprint
from packed_batches import Blocks
from text_records import BadRow, DataError, RecordSet, Row, drawn, list_files, rows_of, sort_rows

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

log = logging.getLogger("data")

_DATASET = re.compile(
    r"(?P<name>[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(?::(?P<config>[\w.+-]+))?(?:@(?P<revision>[\w./-]+))?"
)
_WAITS = (2, 10, 60)
"""Seconds before a read that has failed is tried again."""
_FEW_ROWS = 1000
"""Below so many rows a share of bad ones says little."""
_MUCH_DROPPED = 0.05
"""Share of an epoch's records without a target left that is worth a warning."""


class ReadFailed(DataError):
    """A read that may succeed when it is tried again."""


@dataclass(frozen=True)
class DatasetId:
    """A dataset of the hub, written ``OWNER/NAME[:CONFIG][@REVISION]``."""

    name: str
    config: str | None = None
    revision: str | None = None

    def __str__(self) -> str:
        return self.name + (f":{self.config}" if self.config else "") + (f"@{self.revision}" if self.revision else "")


def parse_source(text: str | Path) -> Path | DatasetId:
    """A local path where there is one, else a dataset id.

    Raises ``DataError`` for what is neither.
    """
    path = Path(text)
    if text == "":
        # Of all paths it would be the present folder: a shell variable that is not set, more likely.
        raise DataError("the data have an empty name; expected a file, a folder (. for this one) or a dataset id")
    if path.exists():
        return path
    found = _DATASET.fullmatch(str(text))
    # A mistyped path is nobody else's business.
    local = str(path.parent) != "." and path.parent.is_dir()
    if found is None or local or path.suffix in (".json", ".jsonl", ".parquet", ".txt"):
        raise DataError(
            f"{text}: no such file or folder, and not a dataset id; expected a .json, .jsonl, .parquet or .txt file, a "
            "folder of them, or OWNER/NAME[:CONFIG][@REVISION]"
        )
    return DatasetId(**found.groupdict())


class RowStream(Protocol):
    """Rows in an order that an epoch decides."""

    name: str
    about: dict[str, Any]
    """Where the rows come from: id or path, config, split, revision, licence; None where unknown."""

    @property
    def fingerprint(self) -> str:
        """What names the rows and their order, seed aside."""
        ...

    def rows(self, epoch: int, start: int) -> Iterator[Row]:
        """The rows of an epoch from row ``start`` (from 0) on."""
        ...


class FileRows:
    """Rows of local files, every epoch in the same order; ``without`` (files, resolved) some of a folder."""

    def __init__(self, path: Path, without: Collection[Path] = ()) -> None:
        found, self.ignored = list_files(path)
        self.files = [file for file in found if file.resolve() not in without]
        self.without = without
        self.name = str(path)
        self.about: dict[str, Any] = {"id": path.name, "config": None, "split": None, "revision": None, "licence": None}
        self.root = path if path.is_dir() else path.parent

    @property
    def bytes(self) -> int:
        """Size of all files together."""
        return sum(file.stat().st_size for file in self.files)

    @property
    def fingerprint(self) -> str:
        # Sizes, not contents: these files are large, and each block's content is checked when a run resumes.
        parts = [(f.relative_to(self.root).as_posix(), f.stat().st_size) for f in self.files]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()

    def content(self) -> str:
        """SHA-256 over names and bytes of all files."""
        digest = hashlib.sha256()
        for file in self.files:
            digest.update(f"{file.relative_to(self.root).as_posix()}\0{file.stat().st_size}\0".encode())
            with open(file, "rb") as data:
                while chunk := data.read(1 << 22):
                    digest.update(chunk)
        return digest.hexdigest()

    def rows(self, epoch: int, start: int) -> Iterator[Row]:
        """The rows from row ``start`` on."""
        return itertools.islice((row for file in self.files for row in rows_of(file)), start, None)


class HubRows:
    """Rows of one split of a dataset of the hub, streamed; with ``shuffle`` each epoch orders its files anew.

    Raises ``DataError`` where the hub does not give the dataset, at the call or while reading.
    """

    def __init__(self, source: DatasetId, split: str, *, shuffle: bool, seed: int = 0) -> None:
        if os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE"):
            raise DataError(
                f"{source} would be read from the hub and HF_HUB_OFFLINE is set: unset it, or give a local file"
            )
        self.source = source
        self.split = split
        self.shuffle = shuffle
        self.seed = seed
        self.name = f"{source} ({split})"
        revision, licence = self._look_up()
        self.about: dict[str, Any] = {
            "id": source.name,
            "config": source.config,
            "split": split,
            "revision": revision,
            "licence": licence,
        }

    def _look_up(self) -> tuple[str | None, str | None]:
        from huggingface_hub import HfApi

        try:
            info = HfApi().dataset_info(self.source.name, revision=self.source.revision)
        except Exception as error:
            # The hub client raises its own errors, its transport's and OS errors; all mean that nothing can be read.
            raise DataError(f"{self.source}: the hub does not give this dataset: {_one_line(error)}") from error
        licence = info.card_data.get("license") if info.card_data else None
        return info.sha, None if licence is None else str(licence)

    @property
    def fingerprint(self) -> str:
        return hashlib.sha256(json.dumps([self.about, self.shuffle]).encode()).hexdigest()

    def rows(self, epoch: int, start: int) -> Iterator[Row]:
        """The rows of an epoch from row ``start`` on; a row's line is its number in the epoch, from 1."""
        import datasets

        try:
            stream = datasets.load_dataset(
                self.source.name,
                self.source.config,
                split=self.split,
                revision=self.about["revision"],
                streaming=True,
            )
            if self.shuffle:
                # A buffer of one row: the order of files is drawn anew, rows within a file keep theirs.
                stream = stream.shuffle(seed=self.seed + epoch, buffer_size=1)
            for number, value in enumerate(stream.skip(start), start + 1):
                yield Row(self.name, number, value)
        except DataError:
            raise
        except Exception as error:
            # Network, decoding, unknown configs and splits: each layer below has errors of its own.
            raise ReadFailed(f"{self.name}: reading failed: {_one_line(error)}") from error


def _one_line(error: BaseException) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]


class StreamBlocks:
    """A stream as blocks of ``rows_per_block`` rows; see ``packed_batches.Blocks``. Not for several threads at a time.

    Args:
        limit: rows of an epoch, from its front; None for all.
        split, eval_split: which rows to learn and to score, of those that name a split; None: names are not looked at.
        hold_out: share of the records, by their keys, to score instead of learn in blocks whose rows name no split.

    Raises ``DataError`` as ``sort_rows``; bad rows, and conversations that the template cannot hold, are counted over
    the whole epoch, and so are records that are dropped because they are too long: where those are many, a warning
    says so once an epoch.
    """

    def __init__(
        self,
        stream: RowStream,
        tokenizer: PreTrainedTokenizerBase,
        *,
        seq_len: int,
        rows_per_block: int,
        limit: int | None = None,
        split: str | None = None,
        eval_split: str | None = None,
        hold_out: float = 0.0,
        strict: bool = False,
        max_bad_share: float = 0.01,
        last_turn_only: bool = False,
    ) -> None:
        self.stream = stream
        self.tokenizer = tokenizer
        self.seq_len = seq_len
        self.rows_per_block = rows_per_block
        self.limit = limit
        self.split = split
        self.eval_split = eval_split
        self.hold_out = hold_out
        self.strict = strict
        self.max_bad_share = max_bad_share
        self.last_turn_only = last_turn_only
        self._reading: tuple[int, int, Iterator[Row]] | None = None
        self._has_read = False
        self._counted: dict[int, Counter[str]] = {}
        """Of each block of the present epoch: rows examined, bad ones, records encoded, those that were dropped."""
        self._epoch = self._block = 0
        self._warned = False
        self._made = 0

    @cached_property
    def fingerprint(self) -> str:
        """What names the blocks; their content is known only when they are read."""
        options = (self.seq_len, self.rows_per_block, self.limit, self.hold_out, self.last_turn_only)
        parts: list[Any] = [self.stream.fingerprint, tokenizer_fingerprint(self.tokenizer), options]
        if self.split is not None:
            parts += [self.split, self.eval_split]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()

    def parts(self, epoch: int, number: int) -> tuple[RecordSet, RecordSet] | None:
        """Records of a block to learn, and those to score; None behind the last."""
        rows = self._rows(epoch, number)
        if rows is None:
            return None

        def sort(split: str | None) -> RecordSet:
            return sort_rows(
                rows, strict=self.strict, max_bad_share=1.0, split=split, where=self.stream.name, may_be_empty=True
            )

        found = sort(self.split)
        if found.split is None:
            learned = found.where(lambda key: not drawn(key, self.hold_out))
            # What was found beside records is told once.
            scored = replace(found.where(lambda key: drawn(key, self.hold_out)), bad_rows=(), formats=())
        elif self.eval_split is None:
            learned, scored = found, found.where(lambda key: False)
        else:
            learned, scored = found, sort(self.eval_split)
            more = tuple(row for row in scored.bad_rows if row not in found.bad_rows)
            scored = replace(scored, bad_rows=more)
        self._count(epoch, number, len(rows), learned.bad_rows + scored.bad_rows)
        return learned, scored

    def _rows(self, epoch: int, number: int) -> list[Row] | None:
        first = number * self.rows_per_block
        count = self.rows_per_block if self.limit is None else min(self.rows_per_block, self.limit - first)
        if count <= 0:
            return None
        for wait in (*_WAITS, None):
            if self._reading is None or self._reading[:2] != (epoch, number):
                self._reading = (epoch, number, self.stream.rows(epoch, first))
            try:
                rows = list(itertools.islice(self._reading[2], count))
            except ReadFailed as error:
                # What has raised gives no more rows.
                self._reading = None
                # What never was read, a split that is not there, will not be in a minute.
                if wait is None or not self._has_read:
                    raise
                log.warning("data: %s; again in %d s", error, wait)
                time.sleep(wait)
                continue
            self._reading = (epoch, number + 1, self._reading[2])
            self._has_read = True
            return rows or None
        raise AssertionError("the last try raises")

    def _count(self, epoch: int, number: int, rows: int, bad_rows: Sequence[BadRow]) -> None:
        if epoch != self._epoch:
            self._epoch, self._counted, self._warned = epoch, {}, False
        self._block, self._counted[number] = number, Counter(rows=rows, bad=len(bad_rows))
        self._check(bad_rows)

    def _check(self, bad_rows: Sequence[BadRow]) -> None:
        """Bad rows of the present block that were just counted, beside those of the epoch so far."""
        so_far = self._so_far()
        examined, bad = so_far["rows"], so_far["bad"]
        if bad_rows:
            log.warning("data: %d bad rows in block %d, first %s", len(bad_rows), self._block, bad_rows[0])
        if bad > self.max_bad_share * max(examined, _FEW_ROWS):
            raise DataError(
                f"{self.stream.name}: {bad} of {examined} rows are bad, expected at most {self.max_bad_share:.2%}; the "
                f"last: {bad_rows[-1] if bad_rows else '?'}. Allow a larger share with --max-bad-share"
            )

    def _so_far(self) -> Counter[str]:
        return sum(self._counted.values(), Counter())

    def encode(self, records: RecordSet) -> EncodedSet:
        """Documents of records of the block that was read last, none of them too long."""
        encoded = encode_records(
            records,
            self.tokenizer,
            self.seq_len,
            last_turn_only=self.last_turn_only,
            progress=False,
            may_be_empty=True,
            strict=self.strict,
            max_bad_share=1.0,
        )
        self._made += len(encoded)
        if encoded.refused and not self._made and len(encoded.refused) == len(records.records):
            # The template's fault, not that of a row.
            raise DataError(encoded.refused[0].reason)
        self._counted.setdefault(self._block, Counter()).update(
            records=len(records.records), dropped=encoded.dropped, bad=len(encoded.refused)
        )
        if encoded.refused:
            self._check(encoded.refused)
        so_far = self._so_far()
        if so_far["dropped"] > _MUCH_DROPPED * so_far["records"] and not self._warned:
            self._warned = True
            log.warning(
                "data: %d of %d records so far in epoch %d were dropped, their answers begin behind %d tokens: give a "
                "larger --seq-len",
                *(so_far["dropped"], so_far["records"], self._epoch, self.seq_len),
            )
        return encoded

    def block(self, epoch: int, number: int) -> EncodedSet | None:
        """Documents to learn of a block."""
        found = self.parts(epoch, number)
        return None if found is None else self.encode(found[0])


class Prefetched:
    """Blocks of which the next is being prepared, in one other thread, while the present one is in use.

    Args:
        first: block 0 of epoch 0 where it is there already: it is not made a second time.
    """

    def __init__(self, blocks: Blocks, first: EncodedSet | None = None) -> None:
        self._blocks = blocks
        self._worker = ThreadPoolExecutor(1, "data")
        self._coming: tuple[int, int, Future[EncodedSet | None]] | None = None
        if first is not None:
            ready: Future[EncodedSet | None] = Future()
            ready.set_result(first)
            self._coming = 0, 0, ready

    @property
    def fingerprint(self) -> str:
        """That of the blocks."""
        return self._blocks.fingerprint

    def block(self, epoch: int, number: int) -> EncodedSet | None:
        """The block, waited for if it is not ready; its successor is begun."""
        coming = self._coming
        if coming is not None and coming[:2] == (epoch, number):
            found = coming[2].result()
        else:
            # All reading in the one thread: a stream stands at one place.
            found = self._worker.submit(self._blocks.block, epoch, number).result()
        after = (epoch, number + 1) if found is not None else (epoch + 1, 0)
        self._coming = (*after, self._worker.submit(self._blocks.block, *after))
        return found

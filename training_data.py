"""What a trainer asks for: from a file, a folder, a dataset id or token shards, documents to learn and to score.

Four kinds of source. A folder with a ``manifest.json`` holds token shards (``token_files``). A dataset id is streamed,
and so are local files too large to be held at once (``record_streams``). Everything else is read and encoded whole,
which gives the best shuffling, and kept in a cache under the hash of all that decides the result: file contents,
tokenizer, template, settings. A second run with the same data begins at once.

Something is always held out, so that a run knows whether it learned: records that name the split ``eval``, what
``--eval-data`` names, the ``valid`` shards, or else a small share of the records, drawn by the hash of their keys.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from answer_masks import (
    ENCODING,
    EncodedSet,
    describe,
    encode_records,
    tokenizer_fingerprint,
    unused_columns,
    what_was_cut,
)
from document_cache import cache_folder, from_cache, to_cache
from packed_batches import Blocks, OneBlock, recut
from prime_telemetry import CONFIG
from record_streams import DatasetId, FileRows, HubRows, Prefetched, RowStream, StreamBlocks, parse_source
from text_records import DataError, Record, RecordSet, check_share, drawn, list_files, prompt_key, read_records
from token_files import read_tokens
from token_shards import MANIFEST, Manifest, ShardBlocks

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

log = logging.getLogger("data")

STREAM_BYTES = 1 << 30
"""Local files of more bytes are read as a stream."""
HELD_OUT_MOST = 512
"""Most records that are held out where the data names none."""
FEW_HELD = 16
"""Held-out documents that are called too few."""
_SCORED_NAMES = frozenset(("test", "validation", "valid", "val", "dev", "eval"))
_SHOWN = 5  # files named in a line


@dataclass(frozen=True, kw_only=True)
class DataSettings:
    """How data becomes documents."""

    split: str = "train"
    """What to learn of records that name a split, or which split of a dataset id."""
    eval_split: str = "eval"
    """What to score of records that name a split, or which split of the dataset id given to --eval-data."""
    hold_out: float = 0.02
    """Share of the records to score instead of learn, at most 512, where the data holds out none itself."""
    limit: int | None = None
    """Rows of an epoch, from the front of the data; all by default."""
    block_rows: int = 8192
    """Rows of a stream that are shuffled and packed together."""
    last_turn_only: bool = False
    """Of a conversation learn the last answer alone."""
    strict: bool = False
    """Stop at the first row that cannot be used."""
    max_bad_share: float = 0.01
    """Stop when more than this share of the rows cannot be used."""
    data_cache: Path | None = None
    """Where encoded data are kept; by default in ~/.cache/qwen-prime."""

    def __post_init__(self) -> None:
        if not 0 <= self.hold_out < 1 or not 0 <= self.max_bad_share <= 1:
            raise ValueError(f"hold-out is {self.hold_out} and max-bad-share {self.max_bad_share}, expected shares")
        if self.block_rows < 1 or (self.limit is not None and self.limit < 1):
            raise ValueError(f"block-rows is {self.block_rows} and limit {self.limit}, expected at least 1")


@dataclass(frozen=True)
class TrainingData:
    """Documents to learn, documents to score (None where there are none), lines for the log, and the revisions of the
    datasets that were opened, by the ids that were given."""

    blocks: Blocks
    held: EncodedSet | None
    summary: str
    revisions: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class _Asked:
    """What ``--eval-data`` names: documents, lines for the log, the files read (resolved), what tells its records from
    others (``_marks``), and whether its rows name splits."""

    held: EncodedSet
    summary: str
    files: frozenset[Path] = frozenset()
    marks: frozenset[str] = frozenset()
    splits: bool = False


def open_data(
    data: str | Path,
    eval_data: str | Path | None,
    tokenizer: PreTrainedTokenizerBase,
    seq_len: int,
    settings: DataSettings,
    seed: int = 0,
    revisions: Mapping[str, str] | None = None,
) -> TrainingData:
    """Open what ``--data`` and ``--eval-data`` name.

    Files that ``--eval-data`` names are not learned, and of data that are read whole neither are records that it holds,
    by their prompt or their key. ``revisions``: those to open of datasets, by the ids given; by default the newest of
    what an id names.

    Raises:
        DataError: data that cannot be read or used; no target left in what ``--eval-data`` names.
    """
    source = parse_source(data)
    if isinstance(source, DatasetId) and eval_data is not None:
        _refuse_one_split_for_both(source, parse_source(eval_data), settings)
    opened = dict(revisions or {})
    asked = None if eval_data is None else _open_held(eval_data, tokenizer, seq_len, settings, opened)
    if isinstance(source, Path) and (source / MANIFEST).is_file():
        _refuse_what_shards_settle(source, settings, asked is None or not asked.marks)
        found = _open_shards(source, tokenizer, seq_len, seed)
    elif isinstance(source, DatasetId):
        rows = _hub_rows(source, settings.split, opened, shuffle=True, seed=seed)
        found = _open_stream(rows, tokenizer, seq_len, settings, asked is None)
    elif (files := _files_to_learn(source, asked, settings)).bytes > STREAM_BYTES:
        # Rows of a dataset are all of the split that was asked for; those of a file may say of which they are.
        splits = {"split": settings.split, "eval_split": settings.eval_split if asked is None else None}
        found = _open_stream(files, tokenizer, seq_len, settings, asked is None, **splits)
    else:
        found = _open_files(files, source, tokenizer, seq_len, settings, asked)
    found = replace(found, revisions=opened)
    if asked is None:
        return found if settings.hold_out == 0 else _with_a_word_on_few(found)
    return replace(found, held=asked.held, summary=f"{found.summary}\n{asked.summary}")


def _refuse_one_split_for_both(source: DatasetId, scored: Path | DatasetId, settings: DataSettings) -> None:
    same = isinstance(scored, DatasetId) and (scored.name, scored.config) == (source.name, source.config)
    if same and settings.split == settings.eval_split:
        raise DataError(
            f"{source}: --data and --eval-data name the split {settings.split}, so what is learned would be scored: "
            "give another --eval-split, or leave --eval-data out to hold out a share (--hold-out)"
        )


def _hub_rows(source: DatasetId, split: str, opened: dict[str, str], *, shuffle: bool, seed: int = 0) -> HubRows:
    """Rows of a dataset, at the revision in ``opened`` (mutated) if one is there: an id may name none, or a branch."""
    pinned = replace(source, revision=opened.get(str(source), source.revision))
    rows = HubRows(pinned, split, shuffle=shuffle, seed=seed)
    if rows.about["revision"] is not None:
        opened[str(source)] = rows.about["revision"]
    return rows


def revisions_of(run: Path) -> dict[str, str]:
    """The revisions that a run's datasets had when it began, as its ``config.json`` says; none where it does not."""
    try:
        found = json.loads((run / CONFIG).read_text(encoding="utf-8"))["revisions"]
        return {str(name): str(revision) for name, revision in found.items()}
    except (OSError, ValueError, RecursionError, KeyError, TypeError, AttributeError):
        return {}


def _refuse_what_shards_settle(folder: Path, settings: DataSettings, only_shards: bool) -> None:
    """Shards are encoded and split already; ``eval_split`` may still be meant for what ``--eval-data`` names."""
    settled = ("last_turn_only", "hold_out", "split", "limit", *(("eval_split",) if only_shards else ()))
    given = [f.name for f in fields(DataSettings) if f.name in settled and getattr(settings, f.name) != f.default]
    if given:
        raise DataError(
            f"{folder} holds token shards, whose documents and splits are settled: got --"
            f"{', --'.join(given).replace('_', '-')}, expected none of these; choose when making the shards "
            "(qwen_prime_data.py materialize)"
        )


def _files_to_learn(path: Path, asked: _Asked | None, settings: DataSettings) -> FileRows:
    """Those that ``--eval-data`` does not name; where it names all of them, rows must say which are to be scored."""
    files = FileRows(path)
    both = {file.resolve() for file in files.files} & (asked.files if asked else frozenset())
    if not asked or not both:
        return files
    rest = FileRows(path, both)
    if rest.files:
        return rest
    if not asked.splits or settings.split == settings.eval_split:
        raise DataError(
            f"{path}: --data and --eval-data name the same files, so what is learned would be scored: leave "
            "--eval-data out to hold out a share (--hold-out), or give other files"
        )
    return files


def _about_files(files: FileRows, scores_itself: bool) -> list[str]:
    """A word on files of a folder that are there to be scored by their names, or by ``--eval-data``."""

    def names(chosen: Sequence[Path]) -> str:
        more = f" and {len(chosen) - _SHOWN} more" if len(chosen) > _SHOWN else ""
        return ", ".join(file.relative_to(files.root).as_posix() for file in chosen[:_SHOWN]) + more

    lines = []
    if files.without:
        left = [file for file in list_files(files.root)[0] if file.resolve() in files.without]
        lines.append(f"data: not learned, since --eval-data names them: {names(left)}")
    named = [file for file in files.files if _SCORED_NAMES & set(re.split(r"[^a-z0-9]+", file.stem.lower()))]
    if scores_itself and 0 < len(named) < len(files.files):
        lines.append(
            f"data: learned like the others, though named as if made to score: {names(named)}; give --eval-data FILE "
            "(or a folder of several) to score instead of learn"
        )
    return lines


def _marks(key: str, record: Record) -> set[str]:
    """What tells that two records are one: the prompt, and the key; but not a number, by which any rows are counted."""
    return {prompt_key(record)} if key.isdigit() else {prompt_key(record), key}


def _marks_of(records: RecordSet) -> frozenset[str]:
    return frozenset(mark for pair in zip(records.keys, records.records, strict=True) for mark in _marks(*pair))


def _with_a_word_on_few(found: TrainingData) -> TrainingData:
    count = 0 if found.held is None else len(found.held)
    if count >= FEW_HELD:
        return found
    said = f"held out: {count or 'no'} documents, too few to tell how a run goes: give --eval-data, or more --hold-out"
    return replace(found, summary=f"{found.summary}\n{said}")


def _marked(summary: str) -> str:
    return summary.replace("data: ", "held out: ")


def _open_held(
    data: str | Path,
    tokenizer: PreTrainedTokenizerBase,
    seq_len: int,
    settings: DataSettings,
    opened: dict[str, str],
) -> _Asked:
    source = parse_source(data)
    if isinstance(source, Path) and (source / MANIFEST).is_file():
        held = _valid_of(source, _manifest_of(source, tokenizer), seq_len)
        if held is None:
            raise DataError(f"{source} has no shards of the split valid, expected some in --eval-data")
        return _Asked(_with_a_target(held, source), f"held out: {len(held):,} documents of the shards in {source}")
    if isinstance(source, DatasetId):
        rows = _hub_rows(source, settings.eval_split, opened, shuffle=False)
        limited = _blocks_of(rows, tokenizer, seq_len, settings, rows_per_block=HELD_OUT_MOST)
        parts = limited.parts(0, 0)
        if parts is None or not parts[0].records:
            raise DataError(f"{rows.name}: no usable record, expected some in --eval-data")
        held = limited.encode(parts[0])
        summary = _marked(describe(parts[0], held))
        return _Asked(_with_a_target(held, source), summary, marks=_marks_of(parts[0]))
    records = read_records(
        source, strict=settings.strict, max_bad_share=settings.max_bad_share, split=settings.eval_split
    )
    held = encode_records(
        records,
        tokenizer,
        seq_len,
        last_turn_only=settings.last_turn_only,
        may_be_empty=True,
        strict=settings.strict,
        max_bad_share=settings.max_bad_share,
    )
    return _Asked(
        _with_a_target(held, source),
        _marked(describe(records, held)),
        files=frozenset(file.resolve() for file in list_files(source)[0]),
        marks=_marks_of(records),
        splits=records.split is not None,
    )


def _with_a_target(held: EncodedSet, source: Path | DatasetId) -> EncodedSet:
    if not len(held):
        raise DataError(
            f"{source}: none of the records that --eval-data names left a target in {held.seq_len} tokens: give a "
            "larger --seq-len, or others"
        )
    return held


def _any(held: EncodedSet | None) -> EncodedSet | None:
    """Documents to score, None where there are none: none of the records may have a target left."""
    return held if held is not None and len(held) else None


def _manifest_of(folder: Path, tokenizer: PreTrainedTokenizerBase) -> Manifest:
    manifest = Manifest.read(folder)
    manifest.check_tokenizer(tokenizer_fingerprint(tokenizer))
    return manifest


def _valid_of(folder: Path, manifest: Manifest, seq_len: int) -> EncodedSet | None:
    """Documents to score of a folder of shards."""
    shards = manifest.splits.get("valid")
    if not shards:
        return None
    first = read_tokens(folder / shards[0].file, shards[0].sha256)[0]
    return recut(first.part(0, min(HELD_OUT_MOST, len(first))), seq_len)


def _open_shards(folder: Path, tokenizer: PreTrainedTokenizerBase, seq_len: int, seed: int) -> TrainingData:
    manifest = _manifest_of(folder, tokenizer)
    shards = {name: tuple(manifest.splits.get(name, ())) for name in ("train", "valid")}
    if not shards["train"]:
        raise DataError(f"{folder}: the manifest has no shards of the split train")
    valid = _valid_of(folder, manifest, seq_len)
    counts = {name: sum(s.tokens for s in part) for name, part in shards.items()}
    lines = [
        f"data: {counts['train']:,} tokens in {len(shards['train'])} shards of {folder}, from "
        f"{manifest.source.get('id')}; {counts['valid']:,} tokens held out"
    ]
    blocks = ShardBlocks(folder, shards["train"], seq_len, seed)
    opened = blocks.block(0, 0)
    if opened is not None:
        lines += what_was_cut(opened, "of the first shard ")
    return TrainingData(Prefetched(blocks, opened), _any(valid), "\n".join(lines))


def _blocks_of(
    stream: RowStream, tokenizer: PreTrainedTokenizerBase, seq_len: int, settings: DataSettings, **more: Any
) -> StreamBlocks:
    return StreamBlocks(
        stream,
        tokenizer,
        seq_len=seq_len,
        strict=settings.strict,
        max_bad_share=settings.max_bad_share,
        last_turn_only=settings.last_turn_only,
        **more,
    )


def _open_stream(
    stream: RowStream,
    tokenizer: PreTrainedTokenizerBase,
    seq_len: int,
    settings: DataSettings,
    hold_out: bool,
    **splits: str | None,
) -> TrainingData:
    share = settings.hold_out if hold_out else 0.0
    size: dict[str, Any] = {"rows_per_block": settings.block_rows, "limit": settings.limit}
    blocks = _blocks_of(stream, tokenizer, seq_len, settings, hold_out=share, **size, **splits)
    parts = blocks.parts(0, 0)
    if parts is None or not any(part.records for part in parts):
        raise DataError(f"{stream.name}: no usable record among its first {settings.block_rows} rows")
    first, scored = parts
    where = f"data: {stream.name}, revision {stream.about['revision'] or 'unknown'}, licence "
    lines = [where + f"{stream.about['licence'] or 'unknown'}, streamed in blocks of {settings.block_rows:,} rows"]
    lines.append(f"data: the first block has {len(first.records):,} records to learn, format {first.format}")
    opened = blocks.encode(first)
    lines += unused_columns(first) + what_was_cut(opened, "of the first block ")
    if isinstance(stream, FileRows):
        lines += _about_files(stream, hold_out and first.split is None)
    held = None
    if scored.records:
        scored = scored.where(set(scored.keys[:HELD_OUT_MOST]).__contains__)
        held = _any(blocks.encode(scored))
        lines.append(f"held out: {len(scored.records):,} records of the first block")
    elif hold_out and first.split is not None:
        lines.append(
            f"held out: nothing, the first {settings.block_rows:,} rows have none of split {settings.eval_split}: give "
            "--eval-data"
        )
    return TrainingData(Prefetched(blocks, opened), held, "\n".join(lines))


# -- files that fit, and their cache ----------------------------------------------------------------------------------


def _open_files(
    files: FileRows,
    path: Path,
    tokenizer: PreTrainedTokenizerBase,
    seq_len: int,
    settings: DataSettings,
    asked: _Asked | None,
) -> TrainingData:
    unread = ("data_cache", "block_rows")
    decides = {f.name: getattr(settings, f.name) for f in fields(DataSettings) if f.name not in unread}
    marks = None if asked is None else sorted(asked.marks)
    parts = [ENCODING, files.content(), tokenizer_fingerprint(tokenizer), seq_len, marks, decides]
    key = hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:32]
    folder = settings.data_cache or cache_folder()
    kept = None if folder is None else from_cache(folder, key)
    if kept is not None:
        train, held, summary = kept
        # Names of files are the user's, and may differ from those of the run that filled the cache.
        return TrainingData(OneBlock(train), held, f"{summary}\ndata: encoded before, from {folder}")
    records, scored = _read_split(path, settings, files, asked is None)
    learned = records if asked is None else _without_marked(records, asked.marks)
    how: dict[str, Any] = {"last_turn_only": settings.last_turn_only, "strict": settings.strict, "max_bad_share": 1.0}
    train = encode_records(learned, tokenizer, seq_len, **how)
    both = [(learned, train)]
    lines = [describe(learned, train), *_about_files(files, asked is None and records.split is None)]
    if count := len(records.records) - len(learned.records):
        lines.append(f"data: {count:,} records left out, since --eval-data has them, too")
    summary = "\n".join(lines)
    held = None
    if scored is not None and scored.records:
        found = encode_records(scored, tokenizer, seq_len, may_be_empty=True, **how)
        summary += "\n" + _marked(describe(scored, found))
        held = _any(found)
        both.append((scored, found))
    _check_bad_rows(both, settings, str(path))
    if folder is None:
        log.warning("data: nothing kept for the next run, there is no home folder: give --data-cache")
    else:
        to_cache(folder, key, train, held, summary)
    return TrainingData(OneBlock(train), held, summary)


def _check_bad_rows(parts: Sequence[tuple[RecordSet, EncodedSet]], settings: DataSettings, where: str) -> None:
    """What reading and the template refused, of records to learn and to score together: of a few the one bad row may be
    a large share."""
    refused = [bad for _, encoded in parts for bad in encoded.refused]
    if refused:
        # A row that cannot be read at all is found for every split.
        unread = dict.fromkeys(bad for records, _ in parts for bad in records.bad_rows)
        examined = len(unread) + sum(len(records.records) for records, _ in parts)
        check_share([*refused, *unread], examined, settings.max_bad_share, where)


def _without_marked(records: RecordSet, marks: frozenset[str]) -> RecordSet:
    """The records that are not among those to be scored."""
    pairs = enumerate(zip(records.keys, records.records, strict=True))
    left = records.at([i for i, pair in pairs if marks.isdisjoint(_marks(*pair))])
    if not left.records:
        raise DataError(f"{records.files[0]}: --eval-data has all of its records, so nothing is left to learn")
    return left


def _read_split(
    path: Path, settings: DataSettings, files: FileRows, hold_out: bool
) -> tuple[RecordSet, RecordSet | None]:
    """Records to learn and to score."""

    def read(split: str) -> RecordSet:
        return read_records(
            path,
            strict=settings.strict,
            max_bad_share=settings.max_bad_share,
            split=split,
            without=files.without,
            limit=settings.limit,
        )

    records = read(settings.split)
    if not hold_out:
        return records, None
    if records.split is not None:
        # Without rows of the other split nothing is scored: the data's author decided on splits.
        return records, read(settings.eval_split) if records.other_splits else None
    share = min(settings.hold_out, HELD_OUT_MOST / len(records.records))
    scored = records.where(lambda key: drawn(key, share))
    learned = records.where(lambda key: not drawn(key, share))
    # What was found beside records is told once.
    return (learned, replace(scored, bad_rows=(), ignored=())) if learned.records else (records, None)

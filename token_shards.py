"""Token shards: a stream of text made into files once, to be trained on many times.

A folder holds ``manifest.json`` (``Manifest``): where the text came from, how it became tokens, and the name, size and
SHA-256 of every shard. Documents lie in shards uncut, each closed by its end-of-document token: the context length is
the trainer's to choose. A shard is hashed before it is used; one that has changed is refused.

Train and valid are told apart by the hash of a document's key, so that a document stays on its side when the stream
grows, and making the folder again gives the same bytes: no times, no names of machines, no order of a file system.
"""

from __future__ import annotations

import hashlib
import itertools
import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from answer_masks import ENCODING, EncodedSet, tokenizer_fingerprint
from packed_batches import order_of, recut
from record_streams import RowStream, StreamBlocks
from text_records import DataError
from token_files import FORMAT, VERSION, read_tokens, write_tokens
from whole_output import write_whole

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MANIFEST = "manifest.json"
_ROWS_AT_A_TIME = 1024


@dataclass(frozen=True)
class Shard:
    """One file of a manifest."""

    file: str
    sha256: str
    documents: int
    tokens: int


@dataclass(frozen=True)
class Manifest:
    """What a folder of shards is.

    ``source``: id or path, config, split, revision and licence of the text. ``tokenizer``: its name and SHA-256.
    ``settings``: everything else that decides the bytes. ``rows``: counts of rows read, bad, and per format.
    ``splits``: shards of ``train`` and ``valid`` in order. The file closes with the SHA-256 of the rest, so that no
    licence, count or hash in it changes unnoticed.
    """

    source: dict[str, Any]
    tokenizer: dict[str, str]
    settings: dict[str, Any]
    rows: dict[str, Any] = field(default_factory=dict)
    splits: dict[str, list[Shard]] = field(default_factory=dict)

    def write(self, folder: Path) -> None:
        """Write ``manifest.json``."""
        content = {"format": FORMAT, "version": VERSION, **asdict(self)}
        text = json.dumps({**content, "sha256": _hash_of(content)}, indent=2, sort_keys=True)
        write_whole(folder / MANIFEST, (text + "\n").encode())

    @staticmethod
    def read(folder: Path) -> Manifest:
        """Read ``manifest.json``.

        Raises:
            DataError: it is not a manifest, has changed, or names a file outside its folder.
        """
        path = folder / MANIFEST
        try:
            text = path.read_text(encoding="utf-8")
            content = json.loads(text)
            recorded = content.pop("sha256", None)
            if (content["format"], content["version"]) != (FORMAT, VERSION):
                raise DataError(f"{path}: format {content['format']!r} version {content['version']!r} is not ours")
            splits = {
                name: [Shard(str(s["file"]), str(s["sha256"]), int(s["documents"]), int(s["tokens"])) for s in shards]
                for name, shards in content["splits"].items()
            }
            source, tokenizer, settings, rows = (
                dict(content[key]) for key in ("source", "tokenizer", "settings", "rows")
            )
            found = Manifest(source, tokenizer, settings, rows, splits)
            written = json.dumps({**content, "sha256": recorded}, indent=2, sort_keys=True) + "\n"
            if recorded != _hash_of(content) or text != written:
                raise DataError(
                    f"{path} has changed since it was written, or is of an earlier suite: make the folder again with "
                    "qwen_prime_data.py materialize"
                )
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError, OverflowError) as error:
            if isinstance(error, DataError):
                raise
            raise DataError(f"{path}: not a manifest of token shards ({type(error).__name__}: {error})") from error
        for shards in splits.values():
            for shard in shards:
                if Path(shard.file).name != shard.file or shard.file in ("", ".", ".."):
                    raise DataError(f"{path} names the file {shard.file!r}, expected one beside it")
                if shard.documents < 0 or shard.tokens < shard.documents:
                    raise DataError(f"{path}: {shard.file} has {shard.documents} documents of {shard.tokens} tokens")
        return found

    def check_tokenizer(self, sha256: str) -> None:
        """Raise ``DataError`` unless the shards were made with the tokenizer of that fingerprint."""
        if self.tokenizer.get("sha256") != sha256:
            raise DataError(
                f"the shards hold tokens of {self.tokenizer.get('name')} ({str(self.tokenizer.get('sha256'))[:12]}), "
                f"the model's tokenizer is another ({sha256[:12]}): make them again with --tokenizer of this model"
            )


def _hash_of(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


@dataclass(frozen=True)
class ShardBlocks:
    """The shards of one split as blocks, in an order that each epoch draws anew; see ``packed_batches.Blocks``."""

    folder: Path
    shards: tuple[Shard, ...]
    seq_len: int
    seed: int

    @property
    def fingerprint(self) -> str:
        text = json.dumps([[shard.sha256 for shard in self.shards], self.seq_len])
        return hashlib.sha256(text.encode()).hexdigest()

    def block(self, epoch: int, number: int) -> EncodedSet | None:
        if number >= len(self.shards):
            return None
        shard = self.shards[order_of(len(self.shards), self.seed, epoch)[number]]
        return recut(read_tokens(self.folder / shard.file, shard.sha256)[0], self.seq_len)


# -- making them ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ShardPlan:
    """What decides the bytes of a folder of shards, beside the rows and the tokenizer."""

    limit: int | None = None
    """Rows to read at most; None for all."""
    valid: float = 0.005
    """Share of the documents that is held out where rows name no split."""
    split: str | None = None
    """Which rows to learn of those that name a split; None: names are not looked at."""
    eval_split: str | None = None
    """Which of them to hold out."""
    shard_tokens: int = 16_000_000
    """Tokens of a shard at most, unless one document has more."""
    max_bad_share: float = 0.01
    strict: bool = False


def materialize(
    stream: RowStream, tokenizer: PreTrainedTokenizerBase, tokenizer_name: str, plan: ShardPlan, folder: Path
) -> Manifest:
    """Write a stream as token shards with a manifest into a new or empty folder.

    Documents keep the stream's order; those of ``plan.eval_split``, or where rows name no split those whose key is
    drawn with probability ``plan.valid``, form the split ``valid``. The manifest is written last: a folder without one
    is unfinished.

    Raises:
        DataError: rows or a tokenizer that cannot be used; a folder that is not empty.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise DataError(f"{folder} exists and is not an empty folder: choose another, or remove it")
    blocks = StreamBlocks(
        stream,
        tokenizer,
        seq_len=2**31 - 1,  # no document is cut
        rows_per_block=_ROWS_AT_A_TIME,
        limit=plan.limit,
        split=plan.split,
        eval_split=plan.eval_split,
        hold_out=plan.valid,
        strict=plan.strict,
        max_bad_share=plan.max_bad_share,
    )
    writers = {name: _ShardWriter(folder, name, plan.shard_tokens) for name in ("train", "valid")}
    counts: dict[str, Any] = {"records": 0, "bad": 0, "other_splits": 0, "formats": {}}
    for number in itertools.count():
        parts = blocks.parts(0, number)
        if parts is None:
            break
        for name, found in zip(("train", "valid"), parts, strict=True):
            encoded = blocks.encode(found)
            counts["records"] += len(found.records) - len(encoded.refused)
            counts["bad"] += len(found.bad_rows) + len(encoded.refused)
            for form, count in found.formats:
                counts["formats"][form] = counts["formats"].get(form, 0) + count
            writers[name].add(encoded)
        learned, scored = parts
        if learned.split is not None:
            counts["other_splits"] += learned.other_splits - (scored.split is not None) * len(scored.records)
    if not counts["records"]:
        raise DataError(f"{stream.name}: no usable record")
    manifest = Manifest(
        source=stream.about,
        tokenizer={"name": tokenizer_name, "sha256": tokenizer_fingerprint(tokenizer)},
        settings={**asdict(plan), "encoding": ENCODING},
        rows=counts,
        splits={name: writer.finish() for name, writer in writers.items()},
    )
    manifest.write(folder)
    return manifest


class _ShardWriter:
    """Collects documents of one split and writes a shard whenever there are enough for one."""

    def __init__(self, folder: Path, split: str, tokens: int) -> None:
        self.folder = folder
        self.split = split
        self.tokens = tokens
        self.waiting: list[EncodedSet] = []
        self.shards: list[Shard] = []

    def add(self, encoded: EncodedSet) -> None:
        """Take documents; whole shards are written at once."""
        self.waiting.append(encoded)
        if sum(s.tokens for s in self.waiting) > self.tokens:
            self._write(keep_rest=True)

    def finish(self) -> list[Shard]:
        """All shards, the last one written."""
        self._write(keep_rest=False)
        return self.shards

    def _write(self, *, keep_rest: bool) -> None:
        documents = EncodedSet.joined(self.waiting)
        first = 0
        while first < len(documents):
            most = documents.starts[first] + self.tokens
            stop = max(first + 1, int(documents.starts.searchsorted(most, side="right")) - 1)
            if stop == len(documents) and keep_rest:
                break
            shard = documents.part(first, stop)
            self.folder.mkdir(parents=True, exist_ok=True)
            name = f"{self.split}_{len(self.shards):05d}.safetensors"
            sha256 = write_tokens(self.folder / name, shard)
            self.shards.append(Shard(name, sha256, len(shard), shard.tokens))
            first = stop
        self.waiting = [documents.part(first, len(documents))]

"""Look at data as the trainer will, and turn a stream into token shards.

    python qwen_prime_data.py show records.jsonl --tokenizer coder_prime_init.pt
    python qwen_prime_data.py materialize HuggingFaceFW/fineweb-edu:sample-10BT --tokenizer coder_prime_init.pt \
        --output healing --limit 200000

``show`` prints what a file, folder, dataset id or folder of shards holds, how full its rows become, and a few documents
in which what is learned is marked. ``materialize`` writes shards with a manifest (``token_shards.py``); the trainer
takes the folder as its ``--data``.
"""

from __future__ import annotations

import logging
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro
from rich.console import Console
from rich.text import Text

import prime_cli
from answer_masks import Encoded
from harmless_text import harmless
from packed_batches import PackedBatches
from prime_checkpoint import CheckpointError
from qwen_prime_wrapper import ModelError, find_tokenizer
from record_streams import DatasetId, FileRows, HubRows, RowStream, parse_source
from text_records import DataError
from token_shards import MANIFEST, ShardPlan, materialize
from training_data import DataSettings, open_data

log = logging.getLogger("data")


@dataclass(frozen=True, kw_only=True)
class ShowConfig(DataSettings):
    """Look at data as the trainer will."""

    data: Annotated[str, tyro.conf.Positional]
    """File, folder, OWNER/NAME[:CONFIG][@REVISION] or folder of token shards."""
    tokenizer: str
    """Whose tokenizer and chat template: a PRIME checkpoint, a model folder or a hub id."""
    seq_len: int = 512
    """Tokens in a packed row."""
    count: int = 3
    """Documents to print."""
    seed: int = 0
    """Decides their order."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.seq_len < 2 or self.count < 0:
            raise ValueError(f"seq-len is {self.seq_len} and count {self.count}, expected at least 2 and 0")


@dataclass(frozen=True, kw_only=True)
class MaterializeConfig:
    """Turn a file, a folder or a stream into token shards with a manifest."""

    data: Annotated[str, tyro.conf.Positional]
    """File, folder or OWNER/NAME[:CONFIG][@REVISION]."""
    tokenizer: str
    """Whose tokenizer and chat template: a PRIME checkpoint, a model folder or a hub id."""
    output: Path
    """Folder to write, new or empty."""
    split: str = "train"
    """Which split of a dataset id, or of rows of files that name one, to learn."""
    eval_split: str = "eval"
    """Which rows of files that name a split to hold out."""
    limit: int | None = None
    """Rows to read, from the front; all by default."""
    valid: float = 0.005
    """Share of the documents that is held out, by the hash of their ids, where rows name no split."""
    shard_tokens: int = 16_000_000
    """Tokens of a shard at most."""
    max_bad_share: float = 0.01
    """Stop when more than this share of the rows cannot be used."""
    strict: bool = False
    """Stop at the first row that cannot be used."""

    def __post_init__(self) -> None:
        if not 0 <= self.valid < 1 or not 0 <= self.max_bad_share <= 1:
            raise ValueError(f"valid is {self.valid} and max-bad-share {self.max_bad_share}, expected shares")
        if self.shard_tokens < 1 or (self.limit is not None and self.limit < 1):
            raise ValueError(f"shard-tokens is {self.shard_tokens} and limit {self.limit}, expected at least 1")


DataConfig = (
    Annotated[ShowConfig, tyro.conf.subcommand("show")]
    | Annotated[MaterializeConfig, tyro.conf.subcommand("materialize")]
)


def marked(tokenizer: Any, document: Encoded, *, plain: bool) -> Text:
    """A document's text, what is learned in bold green or, ``plain``, between double angle brackets; control characters
    are shown as pictures of themselves."""
    text = Text()
    begin = 0
    for stop in range(1, len(document.input_ids) + 1):
        if stop < len(document.input_ids) and document.answer[stop] == document.answer[begin]:
            continue
        piece = tokenizer.decode(document.input_ids[begin:stop], skip_special_tokens=False)
        piece = "".join(c if c.isprintable() or c == "\n" else visible(c) for c in piece)
        learned = document.answer[begin]
        text.append(f"«{piece}»" if plain and learned else piece, style="bold green" if learned else "dim")
        begin = stop
    return text


def visible(character: str) -> str:
    """A control character as Unicode's picture of it, any other unprintable one as its number."""
    code = ord(character)
    return chr(0x2400 + code) if code < 32 else f"\\u{code:04x}"


def show(config: ShowConfig) -> int:
    """Print what the data hold."""
    tokenizer = find_tokenizer(config.tokenizer)
    found = open_data(config.data, None, tokenizer, config.seq_len, config, config.seed)
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    batches = PackedBatches(found.blocks, seq_len=config.seq_len, batch_size=1, pad_id=pad, seed=config.seed)
    plain = not sys.stdout.isatty()
    console = Console(highlight=False, width=None if not plain else 120)
    print(harmless(found.summary, len(found.summary)))
    print(f"data: {batches.rows_in_block:,} rows of {config.seq_len} tokens, {batches.fill:.1%} filled", flush=True)
    for number in range(min(config.count, len(batches.encoded))):
        document = batches.encoded.document(number * len(batches.encoded) // config.count)
        console.rule(f"document {number + 1}: {len(document.input_ids)} tokens, {sum(document.answer)} learned")
        console.print(marked(tokenizer, document, plain=plain), soft_wrap=True)
    return 0


def main(config: ShowConfig | MaterializeConfig) -> int:
    if isinstance(config, ShowConfig):
        return show(config)
    source = parse_source(config.data)
    if isinstance(source, Path) and (source / MANIFEST).is_file():
        raise DataError(f"{source} holds token shards already")
    rows: RowStream = (
        HubRows(source, config.split, shuffle=False) if isinstance(source, DatasetId) else FileRows(source)
    )
    # Rows of a dataset are all of the split that was asked for; those of a file may say of which they are.
    named = isinstance(rows, FileRows)
    plan = ShardPlan(
        limit=config.limit,
        valid=config.valid,
        split=config.split if named else None,
        eval_split=config.eval_split if named else None,
        shard_tokens=config.shard_tokens,
        max_bad_share=config.max_bad_share,
        strict=config.strict,
    )
    manifest = materialize(rows, find_tokenizer(config.tokenizer), Path(config.tokenizer).name, plan, config.output)
    for name, shards in manifest.splits.items():
        tokens, documents = sum(s.tokens for s in shards), sum(s.documents for s in shards)
        print(f"{name:6} {documents:12,} documents {tokens:14,} tokens {len(shards):5} shards")
    others = f"{left:,} rows of other splits left out; " if (left := manifest.rows["other_splits"]) else ""
    print(f"{manifest.rows['bad']:,} bad rows; {others}{config.output / MANIFEST}")
    return 0


if __name__ == "__main__":
    raise SystemExit(prime_cli.run(DataConfig, main, (DataError, ModelError, CheckpointError, OSError)))

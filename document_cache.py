"""Encoded documents kept on disk, under the hash of all that decides them: a second run with the same data begins at
once. What cannot be read again is made again, what cannot be written is not kept; neither ends a run.
"""

from __future__ import annotations

import contextlib
import logging
import os
from pathlib import Path

from answer_masks import EncodedSet
from text_records import DataError
from token_files import read_tokens, write_tokens

log = logging.getLogger("data")

CACHE_ENTRIES = 16
"""Encoded data sets that are kept; the one used longest ago goes first."""


def cache_folder() -> Path | None:
    """Where encoded data are kept by default; None for somebody without a home folder."""
    try:
        root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    except RuntimeError:
        return None
    return Path(root) / "qwen-prime"


def from_cache(folder: Path, key: str) -> tuple[EncodedSet, EncodedSet | None, str] | None:
    """Documents to learn, documents to score (None where there are none) and the summary that was kept with them; None
    where nothing usable is kept under the key."""
    path = folder / f"{key}.train.safetensors"
    if not path.is_file():
        return None
    try:
        train, about = read_tokens(path)
        held = read_tokens(folder / f"{key}.held.safetensors", about["held"])[0] if about["held"] else None
        if train.fingerprint != about["fingerprint"]:
            raise DataError(f"{path}: its content is not what was written")
    except (DataError, KeyError, TypeError) as error:
        log.warning("data: the cache is damaged, encoding again: %s", error)
        return None
    # It may be somebody else's, to be read and not to be touched.
    with contextlib.suppress(OSError):
        os.utime(path)
    return train, held, str(about["summary"])


def to_cache(folder: Path, key: str, train: EncodedSet, held: EncodedSet | None, summary: str) -> None:
    """Keep documents and their summary; of more than :data:`CACHE_ENTRIES` sets those used longest ago are removed."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        digest = write_tokens(folder / f"{key}.held.safetensors", held) if held is not None else None
        about = {"held": digest, "fingerprint": train.fingerprint, "summary": summary}
        write_tokens(folder / f"{key}.train.safetensors", train, about)
        entries = sorted(folder.glob("*.train.safetensors"), key=lambda f: f.stat().st_mtime)
        for old in entries[:-CACHE_ENTRIES]:
            for part in ("train", "held"):
                (folder / f"{old.name.split('.')[0]}.{part}.safetensors").unlink(missing_ok=True)
    except OSError as error:
        log.warning("data: nothing kept for the next run, %s cannot be written: %s", folder, error)

"""The checkpoints of one run: named by step, the last few and the best of them kept, every one a whole training state.

RUN/NAME_prime_step_N.pt    after step N; N = 0 is the run's beginning, so that there is always one to return to
RUN/NAME_prime_best.pt      the same file as the one with the lowest held-out loss (a hard link where links exist)
"""

from __future__ import annotations

import logging
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from prime_checkpoint import CheckpointError, load_checkpoint, save_checkpoint

log = logging.getLogger("train")


def run_name(checkpoint: Path) -> str:
    """NAME of NAME_prime_init.pt, NAME_prime_step_N.pt or NAME_prime_best.pt."""
    return re.sub(r"_prime_(init|best|step_\d+)$", "", checkpoint.stem)


class RunFolder:
    """Checkpoints of the run ``name`` in a folder."""

    def __init__(self, folder: Path, name: str, keep_last: int) -> None:
        self.folder = folder
        self.name = name
        self.keep_last = keep_last

    @property
    def best(self) -> Path:
        """Where the best checkpoint is, if there is one."""
        return self.folder / f"{self.name}_prime_best.pt"

    def saved(self) -> list[tuple[int, Path]]:
        """Checkpoints by step, oldest first."""
        pattern = re.compile(re.escape(self.name) + r"_prime_step_(\d+)\.pt")
        return sorted((int(m[1]), f) for f in self.folder.glob("*.pt") if (m := pattern.fullmatch(f.name)))

    def newest(self, at_most: int | None = None) -> tuple[Path, dict[str, Any]] | None:
        """The newest checkpoint that is whole, of a step up to ``at_most``; damaged ones are named in the log and
        passed over. None where there is none."""
        for step, file in reversed(self.saved()):
            if at_most is not None and step > at_most:
                continue
            try:
                return file, load_checkpoint(file)
            except CheckpointError as error:
                log.warning("passing over %s: %s", file, error)
        return None

    def save(self, step: int, checkpoint: dict[str, Any], *, is_best: bool, prune: bool = True) -> Path:
        """Write the checkpoint of a step; with ``prune`` remove all but the last ``keep_last``."""
        path = self.folder / f"{self.name}_prime_step_{step}.pt"
        save_checkpoint(checkpoint, path)
        if is_best:
            beside = self.best.with_suffix(".new")
            beside.unlink(missing_ok=True)
            _link_or_copy(path, beside)
            os.replace(beside, self.best)
        if prune:
            for _, old in self.saved()[: -self.keep_last]:
                old.unlink()
        return path


def _link_or_copy(source: Path, target: Path, link: Callable[[Path, Path], None] = os.link) -> None:
    try:
        link(source, target)
    except OSError:
        # Not every file system has hard links; a copy costs its size.
        shutil.copy2(source, target)

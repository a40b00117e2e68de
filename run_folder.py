"""The checkpoints of one run: named by step, the last few and the best of them kept, every one a whole training state.

RUN/NAME_prime_step_N.pt            after step N; N = 0 is the run's beginning, so that there is always one to return to
RUN/NAME_prime_step_N_stopped.pt    after step N, in the middle of the next: where a run was asked to stop
RUN/NAME_prime_best.pt              the one with the lowest held-out loss once more (a hard link where links exist)
RUN/.lock                           held by the process that writes the run; the system lets go of it however that ends

The order of a save is what makes a power cut harmless: the new file is whole and on the disk before it gets its name,
the name is on the disk before ``best`` follows, and only then do old ones go. Checkpoints of later steps go with them:
a run that went on from an earlier one, because the later were damaged or led astray, has another future.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import re
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from prime_checkpoint import CheckpointError, UnknownVersion, load_checkpoint, save_checkpoint
from prime_telemetry import this_process
from whole_output import sync

log = logging.getLogger("train")

LOCK = ".lock"


class RunLocked(RuntimeError):
    """A run's folder that another process writes."""


def run_name(checkpoint: Path) -> str:
    """NAME of NAME_prime_init.pt, NAME_prime_step_N.pt (or its ..._stopped.pt) or NAME_prime_best.pt."""
    return re.sub(r"_prime_(init|best|step_\d+(_stopped)?)$", "", checkpoint.stem)


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
        """Checkpoints of whole steps, oldest first."""
        return self._named("")

    def stopped(self) -> list[tuple[int, Path]]:
        """Checkpoints from the middle of a step, by the steps before it; at most one, unless a save was killed."""
        return self._named("_stopped")

    def _named(self, ending: str) -> list[tuple[int, Path]]:
        pattern = re.compile(rf"{re.escape(self.name)}_prime_step_(\d+){ending}\.pt")
        return sorted((int(m[1]), f) for f in self.folder.glob("*.pt") if (m := pattern.fullmatch(f.name)))

    def other_names(self) -> list[str]:
        """Names of other runs whose checkpoints lie in the folder."""
        found = {run_name(file) for file in self.folder.glob("*_prime_step_*.pt")}
        return sorted(found - {self.name})

    def lacks_room(self, size: int, saves: int) -> tuple[int, int] | None:
        """Whether the disk is too small for what the run may come to hold: the last ``keep_last`` checkpoints, an older
        best one, and one that is being written.

        Args:
            size: bytes of a checkpoint.
            saves: how many are still to come.

        Returns:
            (needed, there) in bytes, what the run already has counted as there; None where it is enough, or where the
            system does not say.
        """
        stopped = self.stopped()
        files = [file for _, file in self.saved() + stopped] + ([self.best] if self.best.exists() else [])
        held = {(s := file.stat()).st_ino: s.st_size for file in files}
        try:
            there = shutil.disk_usage(self.folder).free + sum(held.values())
        except OSError:
            return None
        needed = min(self.keep_last + 2 + len(stopped), len(held) + saves) * size
        return (needed, there) if needed > there else None

    def newest(self, at_most: int | None = None) -> tuple[Path, dict[str, Any]] | None:
        """The newest checkpoint of a whole step up to ``at_most``; damaged ones are named in the log and passed over.
        None where there is none."""
        return _first_sound([file for step, file in reversed(self.saved()) if at_most is None or step <= at_most])

    def newest_to_resume(self) -> tuple[Path, dict[str, Any]] | None:
        """The same, where one from the middle of a step counts as newer than that of the step before."""
        both = [(step, 0, file) for step, file in self.saved()] + [(step, 1, file) for step, file in self.stopped()]
        return _first_sound([file for *_, file in sorted(both, reverse=True)])

    def save(self, step: int, checkpoint: dict[str, Any], *, is_best: bool, prune: bool = True) -> Path:
        """Write the checkpoint of a step; with ``prune`` remove all but the last ``keep_last`` up to that step."""
        path = self.folder / f"{self.name}_prime_step_{step}.pt"
        save_checkpoint(checkpoint, path)
        if is_best:
            self.make_best(path)
        if prune:
            saved = self.saved()
            past = [file for number, file in saved if number <= step]
            for old in [*past[: -self.keep_last], *(file for number, file in saved if number > step)]:
                old.unlink()
        self._forget_stopped(path)
        return path

    def save_stopped(self, step: int, checkpoint: dict[str, Any]) -> Path:
        """Write the checkpoint of a run that stops in the middle of the step after ``step``; only to resume from."""
        path = self.folder / f"{self.name}_prime_step_{step}_stopped.pt"
        save_checkpoint(checkpoint, path)
        # Of a future that a return has given up: it would be taken for the newest.
        for number, later in self.saved():
            if number > step:
                later.unlink()
        self._forget_stopped(path)
        return path

    def _forget_stopped(self, newer: Path) -> None:
        for _, old in self.stopped():
            if old != newer:
                old.unlink()

    def make_best(self, path: Path) -> None:
        """Make a checkpoint the best one; also where a run was killed between writing it and this."""
        if self.best.exists() and self.best.samefile(path):
            # Renaming one link over another of the same file does nothing and leaves both.
            return
        beside = self.best.with_suffix(".new")
        beside.unlink(missing_ok=True)
        _link_or_copy(path, beside)
        os.replace(beside, self.best)
        sync(self.folder)

    @contextlib.contextmanager
    def lock(self) -> Iterator[None]:
        """Keep the folder to this process while the block runs, and clear away what a killed save left in it.

        Creates the folder, and takes it away again if nothing comes into it. Where the system has no such locks
        (Windows) nothing is locked, and the log says so.

        Raises:
            RunLocked: another process holds it.
            OSError: the folder cannot be written, or its file system has no locks.
        """
        made = not self.folder.exists()
        self.folder.mkdir(parents=True, exist_ok=True)
        try:
            import fcntl
        except ImportError:
            log.warning("this system has no file locks: do not start a second run in %s", self.folder)
            yield
            return
        with open(self.folder / LOCK, "a+", encoding="utf-8") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                file.seek(0)
                raise RunLocked(
                    f"{self.folder} belongs to a running process ({_holder(file.read())}): stop it first, or choose "
                    "another folder"
                ) from error
            if not os.fstat(file.fileno()).st_nlink:
                # Between opening and locking: a lock on what has no name keeps nobody out.
                raise RunLocked(f"{self.folder} was just left by another process: start again")
            file.truncate(0)
            file.write(json.dumps(this_process()))
            file.flush()
            try:
                self._clear()
                yield
            finally:
                file.truncate(0)
                if made:
                    self._leave_nothing()

    def _leave_nothing(self) -> None:
        """Remove a folder that was made for a run which was then refused."""
        if os.listdir(self.folder) == [LOCK]:
            (self.folder / LOCK).unlink()
            with contextlib.suppress(OSError):
                self.folder.rmdir()

    def _clear(self) -> None:
        """Remove unfinished files of a process that was killed."""
        for left in [*self.folder.glob(".*.tmp"), self.best.with_suffix(".new")]:
            left.unlink(missing_ok=True)


def _first_sound(files: Iterable[Path]) -> tuple[Path, dict[str, Any]] | None:
    for file in files:
        try:
            return file, load_checkpoint(file)
        except UnknownVersion:
            # Not damaged: a run that went on from an older one would remove it.
            raise
        except CheckpointError as error:
            log.warning("passing over %s: %s", file, error)
    return None


def _holder(text: str) -> str:
    try:
        found = json.loads(text)
        return f"pid {int(found['pid'])} on {found['host']}"
    except (ValueError, KeyError, TypeError):
        return "it did not say which"


def _link_or_copy(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except OSError:
        # Not every file system has hard links; a copy costs its size.
        shutil.copy2(source, target)
        sync(target)

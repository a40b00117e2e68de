"""A trainer in a process of its own, with faults where it writes; forked from a server that has imported everything."""

from __future__ import annotations

import builtins
import errno
import io
import json
import logging
import os
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import torch  # noqa: E402

import prime_cli  # noqa: E402
import qwen_prime_train as train  # noqa: E402
import run_folder  # noqa: E402

NEED_ROOM = ("open", "write", "fsync", "link", "mkdir")
"""Calls that a full disk refuses."""


@dataclass
class Faults:
    """Counts the system calls by which this process changes a folder, and strikes at one of them.

    Files are opened as Python opens them, buffers included, but for their lowest layer: what counts is a write that
    reaches the system, not one that reaches a buffer. Calls that change nothing (read, seek, close) do not count:
    a kill before one of them leaves what a kill before the next that counts leaves.

    Attributes:
        folder: whose files count.
        at: number of the call to strike at, from 1; 0 never.
        kind: ``before``, ``torn`` or ``full``.
        part: of the write that a kill tears, or that fills the disk, how much reaches the file.
        calls: names of the calls so far.
        sizes: bytes of each of them, 0 where it is no write.
        saves: for each save of a checkpoint, the number of its first call and of the one behind its last.
    """

    folder: str
    at: int = 0
    kind: str = "before"
    part: float = 0.5
    calls: list[str] = field(default_factory=list)
    sizes: list[int] = field(default_factory=list)
    saves: list[tuple[int, int]] = field(default_factory=list)
    full: bool = False

    def install(self) -> None:
        """Put itself around the functions; for a process that is about to end."""
        for name in ("fsync", "chmod", "replace", "link", "unlink", "truncate", "mkdir", "rmdir"):
            setattr(os, name, self._around(name, getattr(os, name)))
        for name, same in (("rename", "replace"), ("ftruncate", "truncate"), ("fdatasync", "fsync")):
            setattr(os, name, self._around(same, getattr(os, name)))
        low_open, opened, save = os.open, builtins.open, run_folder.RunFolder.save

        def watched_low_open(path: Any, flags: int, *rest: Any, **more: Any) -> int:
            if flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC) and self._inside(path):
                self._strike("open")
            return low_open(path, flags, *rest, **more)

        def watched_open(file: Any, mode: str = "r", buffering: int = -1, *rest: Any, **more: Any) -> Any:
            if not set(mode) & set("wax+") or not self._inside(file):
                return opened(file, mode, buffering, *rest, **more)
            self._strike("open")
            return _buffered(_Watched(file, mode, self), mode, buffering, *rest, **more)

        def marked_save(*arguments: Any, **more: Any) -> Path:
            begun = len(self.calls) + 1
            path = save(*arguments, **more)
            self.saves.append((begun, len(self.calls) + 1))
            return path

        os.open, builtins.open = watched_low_open, watched_open
        io.open = watched_open
        run_folder.RunFolder.save = marked_save  # type: ignore[method-assign]

    def _inside(self, target: Any) -> bool:
        if isinstance(target, int):
            target = os.readlink(f"/proc/self/fd/{target}")
        return os.path.abspath(os.fspath(target)).startswith(self.folder)

    def _around(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def watched(target: Any, *rest: Any, **more: Any) -> Any:
            if self._inside(target):
                self._strike(name)
            return function(target, *rest, **more)

        return watched

    def _strike(self, name: str, size: int = 0) -> int | None:
        """Count a call.

        Returns:
            How many bytes of a write may still reach the file; None for all that it has.

        Raises:
            OSError: the disk is full.
        """
        self.calls.append(name)
        self.sizes.append(size)
        struck = len(self.calls) == self.at
        if struck and self.kind == "full":
            self.full = True
            if name == "write" and size > 1:
                # A disk that fills up in the middle of a write takes what fits and says so; the next one fails.
                return int(size * self.part) or 1
        elif struck and self.kind == "torn" and name == "write":
            return min(max(1, int(size * self.part)), size)
        elif struck:
            os.kill(os.getpid(), signal.SIGKILL)
        if self.full and name in NEED_ROOM:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return None


class _Watched(io.FileIO):
    """The lowest layer of a file: each write is a system call."""

    def __init__(self, file: Any, mode: str, faults: Faults) -> None:
        super().__init__(file, mode.replace("b", "").replace("t", ""))
        self._faults = faults

    def write(self, data: Any) -> int:
        view = memoryview(data).cast("B")
        fits = self._faults._strike("write", len(view))
        if fits is None:
            return super().write(view)
        written = super().write(view[:fits])
        if self._faults.kind == "torn":
            os.kill(os.getpid(), signal.SIGKILL)
        return written

    def truncate(self, size: int | None = None) -> int:
        self._faults._strike("truncate")
        return super().truncate(size)


def _buffered(
    raw: io.FileIO,
    mode: str,
    buffering: int,
    encoding: str | None = None,
    errors: str | None = None,
    newline: str | None = None,
) -> Any:
    """What ``open`` puts on top of a file's lowest layer."""
    if buffering == 0:
        return raw
    # The system's block size, as io.open takes it; where that is not told, the module's own default.
    size = buffering if buffering > 1 else getattr(raw, "_blksize", io.DEFAULT_BUFFER_SIZE)
    layer = io.BufferedRandom(raw, size) if "+" in mode else io.BufferedWriter(raw, size)
    if "b" in mode:
        return layer
    return io.TextIOWrapper(layer, encoding, errors, newline, line_buffering=buffering == 1)


def forget_votes() -> None:
    """Make the trainer lose its votes on every resume: what a harness worth its name notices."""
    restore = train.VoteTrainer.restore

    def forgetful(self: Any, checkpoint: dict[str, Any]) -> None:
        restore(self, checkpoint)
        for grid in self.grids.values():
            for tensor in grid.vote_state().values():
                tensor.zero_()

    train.VoteTrainer.restore = forgetful  # type: ignore[method-assign]


def run(
    arguments: list[str],
    log: Path,
    faults: Faults | None,
    calls: Path | None,
    sabotage: bool,
    gate: Path | None = None,
) -> None:
    """The process: train, then end with the trainer's exit code.

    Args:
        log: what is printed goes there.
        calls: where to write what the faults have counted: names and sizes of the calls, and which are a save's.
        sabotage: see :func:`forget_votes`.
        gate: a file to wait for, or not to wait.
    """
    code = 70
    try:
        while gate is not None and not gate.exists():
            time.sleep(0.01)
        torch.set_num_threads(1)
        sys.stdout = sys.stderr = open(log, "w", buffering=1, encoding="utf-8")  # noqa: SIM115
        logging.getLogger().handlers.clear()
        if sabotage:
            forget_votes()
        if faults is not None:
            faults.install()
        code = prime_cli.run(train.TrainConfig, train.main, train.ERRORS, arguments)
        if faults is not None and calls is not None:
            calls.write_text(json.dumps([faults.calls, faults.sizes, faults.saves]))
    finally:
        sys.stdout.flush()
        os._exit(code)

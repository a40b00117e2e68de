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
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import torch  # noqa: E402

import prime_cli  # noqa: E402
import qwen_prime_train as train  # noqa: E402


@dataclass
class Faults:
    """Counts the calls by which this process changes a folder, and strikes at one of them.

    Attributes:
        folder: whose files count.
        at: number of the call to strike at, from 1; 0 never.
        kind: ``before``, ``torn`` or ``full``.
        calls: names of the calls so far.
    """

    folder: str
    at: int = 0
    kind: str = "before"
    calls: list[str] = field(default_factory=list)
    full: bool = False

    def install(self) -> None:
        """Put itself around the functions; for a process that is about to end."""
        for name in ("fsync", "chmod", "replace", "rename", "link", "unlink", "truncate"):
            setattr(os, name, self._around(name, getattr(os, name)))
        opened = builtins.open

        def watched_open(file: Any, mode: str = "r", *rest: Any, **more: Any) -> Any:
            if not set(mode) & set("wax+") or not self._inside(file):
                return opened(file, mode, *rest, **more)
            self._strike("open")
            return _Watched(opened(file, mode, *rest, **more), self)

        builtins.open = io.open = watched_open  # type: ignore[assignment]

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

    def _strike(self, name: str) -> bool:
        """Count a call; True if the caller is to write half and then die."""
        self.calls.append(name)
        if len(self.calls) == self.at:
            if self.kind == "torn" and name == "write":
                return True
            if self.kind != "full":
                os.kill(os.getpid(), signal.SIGKILL)
            self.full = True
        if self.full and name in ("open", "write", "fsync", "link"):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return False


class _Watched:
    """A file whose writes count."""

    def __init__(self, file: Any, faults: Faults) -> None:
        self._file, self._faults = file, faults

    def write(self, data: Any) -> int:
        if self._faults._strike("write"):
            self._file.write(data[: len(data) // 2])
            self._file.flush()
            os.kill(os.getpid(), signal.SIGKILL)
        return self._file.write(data)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)

    def __enter__(self) -> _Watched:
        return self

    def __exit__(self, *error: Any) -> None:
        self._file.close()


def forget_votes() -> None:
    """Make the trainer lose its votes on every resume: what a harness worth its name notices."""
    restore = train.VoteTrainer.restore

    def forgetful(self: Any, checkpoint: dict[str, Any]) -> None:
        restore(self, checkpoint)
        for grid in self.grids.values():
            for tensor in grid.vote_state().values():
                tensor.zero_()

    train.VoteTrainer.restore = forgetful  # type: ignore[method-assign]


def run(arguments: list[str], log: Path, faults: Faults | None, calls: Path | None, sabotage: bool) -> None:
    """The process: train, then end with the trainer's exit code.

    Args:
        log: what is printed goes there.
        calls: where to write the names of the calls that the faults have counted.
        sabotage: see :func:`forget_votes`.
    """
    code = 70
    try:
        torch.set_num_threads(1)
        sys.stdout = sys.stderr = open(log, "w", buffering=1, encoding="utf-8")  # noqa: SIM115
        logging.getLogger().handlers.clear()
        if sabotage:
            forget_votes()
        if faults is not None:
            faults.install()
        code = prime_cli.run(train.TrainConfig, train.main, train.ERRORS, arguments)
        if faults is not None and calls is not None:
            calls.write_text(json.dumps(faults.calls))
    finally:
        sys.stdout.flush()
        os._exit(code)

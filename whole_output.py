"""Files and folders that are there whole or not at all.

A writer works on a temporary neighbour; it is flushed to the disk and renamed when everything is written, and removed
on any error, so that a full disk or Ctrl-C leaves behind what was there before. A folder that replaces another first
moves it aside and deletes it last: renames cannot replace a folder that has content.
"""

from __future__ import annotations

import contextlib
import fnmatch
import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path


class OutputError(OSError):
    """An output that exists already, or cannot be written."""


def refuse_existing(path: Path, force: bool, flag: str = "--output") -> None:
    """Raise unless ``path``, which the command names with ``flag``, may be written.

    Raises:
        OutputError: it exists and ``force`` is off, or its parent folder does not exist.
    """
    if not path.parent.is_dir():
        raise OutputError(f"{path.parent} is no folder: cannot write {path.name} there")
    if path.exists() and not force:
        raise OutputError(f"{path} exists: choose another {flag}, or --force to replace it")


def check_writable(path: Path) -> None:
    """Whether a file may be written there, before there is anything to write.

    Raises:
        OutputError: a folder has its name, its own folder does not exist, or there is no permission.
    """
    refuse_existing(path, force=True)
    if path.is_dir():
        raise OutputError(f"cannot write {path}: it is a folder, expected a file name")
    if not os.access(path if path.exists() else path.parent, os.W_OK):
        raise OutputError(f"cannot write {path}: no permission")


@contextlib.contextmanager
def new_file(path: Path, force: bool = False) -> Iterator[Path]:
    """A temporary path beside ``path`` to write to; it becomes ``path`` if the block ends well.

    Raises:
        OutputError: see :func:`refuse_existing`; ``path`` is a folder; or the block met an OSError (disk full).
    """
    refuse_existing(path, force)
    if path.is_dir():
        raise OutputError(f"cannot write {path}: it is a folder, expected a file name")
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        sync(temporary)
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
        sync(path.parent)
    except OSError as error:
        raise _unwritable(path, error) from error
    finally:
        temporary.unlink(missing_ok=True)


def write_whole(path: Path, data: bytes) -> None:
    """Write a small file, replacing what was there.

    Raises:
        OutputError: see :func:`new_file`.
    """
    with new_file(path, force=True) as temporary:
        temporary.write_bytes(data)


def refuse_folder(path: Path, force: bool, replaceable: Sequence[str] = ("config.json",)) -> None:
    """Raise unless the folder ``path`` may be written.

    Args:
        replaceable: patterns of the file names of a folder that may be deleted to make room; one that has anything
            else is somebody's work.

    Raises:
        OutputError: see :func:`refuse_existing`; ``path`` is a file; or it is a folder that is not empty and has no
            config.json, or anything that is not ``replaceable``, whatever ``force`` says.
    """
    if path.is_dir():
        entries = sorted(path.iterdir())
        if entries and not (path / "config.json").is_file():
            raise OutputError(f"{path} has files but no config.json: --force replaces model folders only")
        for entry in entries:
            if entry.is_dir() or not any(fnmatch.fnmatchcase(entry.name, pattern) for pattern in replaceable):
                raise OutputError(
                    f"{path} has {entry.name}, which no export writes, and is never replaced: choose another --output"
                )
    refuse_existing(path, force)
    if path.exists() and not path.is_dir():
        raise OutputError(f"{path} is a file, expected a folder name")


@contextlib.contextmanager
def new_folder(path: Path, force: bool = False, replaceable: Sequence[str] = ("config.json",)) -> Iterator[Path]:
    """A temporary folder beside ``path`` to fill; it becomes ``path`` if the block ends well.

    Raises:
        OutputError: see :func:`refuse_folder`; or the block met an OSError (disk full).
    """
    refuse_folder(path, force, replaceable)
    temporary = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent))
    aside: Path | None = None
    try:
        yield temporary
        for file in temporary.rglob("*"):
            sync(file)
        sync(temporary)
        temporary.chmod(0o755)
        if path.is_dir():
            aside = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".old", dir=path.parent))
            os.replace(path, aside)
        os.replace(temporary, path)
        sync(path.parent)
    except OSError as error:
        raise _unwritable(path, error) from error
    finally:
        if aside is not None:
            # Whatever ended the block between the two renames, Ctrl-C too: one of old and new stands.
            if not path.exists():
                os.replace(aside, path)
            shutil.rmtree(aside, ignore_errors=True)
        shutil.rmtree(temporary, ignore_errors=True)


def _unwritable(path: Path, error: OSError) -> OutputError:
    return OutputError(f"cannot write {path}: {error.strerror or error}; nothing was left behind")


def sync(path: Path) -> None:
    """Bring a file's content, or a folder's names, to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)

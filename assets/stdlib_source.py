"""The Python standard library as a corpus: which files belong to it and which of them are held out.

Both asset scripts read the library through this module, so a file that the pretraining never saw is
also one whose functions never enter the training half of the instruction set.

The split is a property of a file's path alone (its SHA-256), not of a list or of an order: adding,
removing or changing other files moves no file from one side to the other.
"""

from __future__ import annotations

import hashlib
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

HELD_OUT_ONE_IN = 20
_SKIPPED_FOLDERS = {"site-packages", "dist-packages", "__pycache__"}


@dataclass(frozen=True)
class SourceFile:
    """One file: ``path`` relative to the library's root with forward slashes, and its decoded text."""

    path: str
    text: str

    @property
    def held_out(self) -> bool:
        return is_held_out(self.path)


def is_held_out(path: str) -> bool:
    """True for the one path in ``HELD_OUT_ONE_IN`` whose SHA-256, read as an integer, is divisible by it."""
    return int.from_bytes(hashlib.sha256(path.encode()).digest(), "big") % HELD_OUT_ONE_IN == 0


def library_root() -> Path:
    """Folder of the running interpreter's standard library."""
    return Path(sysconfig.get_paths()["stdlib"])


def iter_library(root: Path | None = None) -> Iterator[SourceFile]:
    """Every ``.py`` file under ``root`` in sorted order of its path.

    Files that are not UTF-8 (the library keeps a few on purpose, as test data) are left out.
    """
    root = root or library_root()
    for file in sorted(root.rglob("*.py"), key=lambda f: f.relative_to(root).as_posix()):
        relative = file.relative_to(root)
        if _SKIPPED_FOLDERS.intersection(relative.parts):
            continue
        try:
            text = file.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue
        if text.strip():
            yield SourceFile(relative.as_posix(), text)


def fingerprint(files: list[SourceFile]) -> str:
    """SHA-256 over the paths and texts of ``files``, to record which library a model was trained on."""
    digest = hashlib.sha256()
    for file in files:
        digest.update(file.path.encode() + b"\0" + file.text.encode() + b"\0")
    return digest.hexdigest()

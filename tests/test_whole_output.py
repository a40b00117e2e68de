"""Outputs are whole or absent."""

from __future__ import annotations

from pathlib import Path

import pytest

from whole_output import OutputError, new_file, new_folder


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_a_file_appears_when_it_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "out.bin"
    with new_file(path) as temporary:
        temporary.write_bytes(b"x")
        assert not path.exists()
    assert path.read_bytes() == b"x" and names(tmp_path) == {"out.bin"}


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt(), ValueError("v")])
@pytest.mark.parametrize("kind", [new_file, new_folder])
def test_an_error_leaves_what_was_there(tmp_path: Path, kind, error: BaseException) -> None:
    path = tmp_path / "out"
    with kind(path) as temporary:
        (temporary / "config.json" if kind is new_folder else temporary).write_text("old")
    wanted = OutputError if isinstance(error, OSError) else type(error)
    with pytest.raises(wanted) as caught, kind(path, force=True) as temporary:
        (temporary / "config.json" if kind is new_folder else temporary).write_text("new")
        raise error
    if isinstance(error, OSError):
        assert "No space left" in str(caught.value) and "nothing was left" in str(caught.value)
    assert (path / "config.json" if kind is new_folder else path).read_text() == "old"
    assert names(tmp_path) == {"out"}


def test_existing_outputs_are_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat.jpg").write_text("x")
    cases = [
        (new_file, "file", False, "exists"),
        (new_folder, "model", False, "--force"),
        (new_file, "model", True, "is a folder"),
        (new_folder, "file", True, "is a file"),
        (new_folder, "photos", True, "config.json"),
        (new_file, "absent/file", False, "no folder"),
    ]
    for kind, name, force, words in cases:
        with pytest.raises(OutputError, match=words), kind(tmp_path / name, force):
            raise AssertionError("the block must not run")
    assert names(tmp_path) == {"file", "model", "photos"}
    with new_folder(tmp_path / "model", force=True) as temporary:
        (temporary / "other.json").write_text("{}")
    assert names(tmp_path / "model") == {"other.json"} and names(tmp_path) == {"file", "model", "photos"}

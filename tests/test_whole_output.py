"""Outputs are whole or absent."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from whole_output import OutputError, check_writable, new_file, new_folder


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


def test_where_nothing_can_be_written_is_known_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    check_writable(tmp_path / "new.json")
    (tmp_path / "old.json").write_text("x")
    check_writable(tmp_path / "old.json")
    for path, words in ((tmp_path, "is a folder"), (tmp_path / "absent" / "x", "no folder")):
        with pytest.raises(OutputError, match=words):
            check_writable(path)
    monkeypatch.setattr("os.access", lambda path, mode: path != tmp_path)
    with pytest.raises(OutputError, match="no permission"):
        check_writable(tmp_path / "new.json")
    assert names(tmp_path) == {"old.json"}


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


def test_only_a_folder_of_files_that_an_export_writes_is_replaced(tmp_path: Path) -> None:
    """A run's folder has a config.json too: whatever else lies in a folder keeps all of it, and --force is no offer."""
    patterns = ("config.json", "model-?????-of-?????.safetensors")
    run = tmp_path / "run"
    run.mkdir()
    for name in ("config.json", "model-00001-of-00002.safetensors", "stats.jsonl"):
        (run / name).write_text("x")
    for force in (False, True):
        with pytest.raises(OutputError, match=r"stats\.jsonl") as caught, new_folder(run, force, patterns):
            raise AssertionError("the block must not run")
        assert "--force" not in str(caught.value)
    (run / "stats.jsonl").rename(tmp_path / "stats.jsonl")
    (run / "model-00002-of-00002.safetensors").mkdir()
    with pytest.raises(OutputError, match="00002-of-00002"), new_folder(run, True, patterns):
        raise AssertionError("the block must not run")
    (run / "model-00002-of-00002.safetensors").rmdir()
    with new_folder(run, True, patterns) as temporary:
        (temporary / "config.json").write_text("new")
    assert names(run) == {"config.json"} and names(tmp_path) == {"run", "stats.jsonl"}


@pytest.mark.parametrize(("rename", "standing"), [(1, "old"), (2, "new")])
def test_an_interrupt_between_the_renames_keeps_one_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rename: int, standing: str
) -> None:
    path = tmp_path / "model"
    path.mkdir()
    (path / "config.json").write_text("old")
    replace, done = os.replace, []

    def interrupted(source: Path, target: Path) -> None:
        replace(source, target)
        done.append(target)
        if len(done) == rename:
            raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt), new_folder(path, force=True) as temporary:
        (temporary / "config.json").write_text("new")
    assert (path / "config.json").read_text() == standing and names(tmp_path) == {"model"}

"""The command line of the hand-over: what it takes, refuses, prints and leaves behind."""

from __future__ import annotations

from pathlib import Path

import pytest
from tiny_models import import_source, tiny_config, write_source

import prime_cli
import qwen_prime_pack as pack

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pack")
    import_source(write_source(folder / "source", tiny_config(hidden_size=64)), folder / "tiny.pt")
    return folder / "tiny.pt"


def run(*arguments: object) -> int:
    return prime_cli.run(pack.PackScriptConfig, pack.main, pack.ERRORS, [str(a) for a in arguments])


def size(path: Path) -> int:
    return sum(f.stat().st_size for f in path.glob("*.safetensors")) if path.is_dir() else path.stat().st_size


def test_every_format_weighs_what_sizes_says(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("sizes", checkpoint) == 0
    rows = capsys.readouterr().out.splitlines()
    said = {row[:22].strip(): 1e6 * float(row[22:].split()[0].replace(",", "")) for row in rows}
    exports = {
        "hf float32": ("hf", "--dtype", "float32"),
        "hf bfloat16, float16": ("hf", "--dtype", "float16"),
        "prime-hf": ("prime-hf",),
        "gguf F16, BF16": ("gguf", "--type", "BF16"),
        "gguf Q8_0": ("gguf", "--type", "Q8_0"),
    }
    assert set(said) == {*exports, "pack --bits 4"}
    for number, (name, arguments) in enumerate(exports.items()):
        output = tmp_path / str(number)
        assert run("export", checkpoint, "--output", output, "--to", *arguments) == 0
        assert str(output) in capsys.readouterr().out
        # Beside weights: headers, a vocabulary, the table of a prime-hf folder.
        assert said[name] - 0.1e6 <= size(output) <= said[name] + 0.4e6, name


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--to", "hf", "--type", "F16"), "--type is for --to gguf"),
        (("--to", "gguf", "--dtype", "float32"), "--dtype is for --to hf"),
        (("--to", "prime-hf", "--dtype", "float16"), "--dtype is for --to hf"),
        (("--to", "hf", "--shard-size", "many"), "shard-size"),
        (("--to", "onnx"), "onnx"),
        ((), "--to"),
    ],
)
def test_bad_usage_exits_2_with_one_line(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...], words: str
) -> None:
    assert run("export", checkpoint, "--output", tmp_path / "out", *arguments) == 2
    said = capsys.readouterr().err
    assert words in said and len(said.strip().splitlines()) == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("to", ["hf", "prime-hf", "gguf"])
def test_known_errors_exit_1_and_leave_nothing(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], to: str
) -> None:
    damaged = tmp_path / "damaged.pt"
    content = bytearray(checkpoint.read_bytes())
    content[len(content) // 2] ^= 1
    damaged.write_bytes(content)
    taken = tmp_path / "taken"
    taken.write_text("mine")
    for source, output, words in (
        (damaged, tmp_path / "out", "damaged"),
        (tmp_path / "absent.pt", tmp_path / "out", "absent.pt"),
        (checkpoint, taken, "exists"),
        (checkpoint, tmp_path / "no" / "out", "no folder"),
    ):
        assert run("export", source, "--to", to, "--output", output) == 1
        said = capsys.readouterr().err.strip()
        assert words in said and len(said.splitlines()) == 1
        assert {p.name for p in tmp_path.iterdir()} == {"damaged.pt", "taken"}
    assert taken.read_text() == "mine"


@pytest.mark.parametrize("to", ["hf", "prime-hf"])
def test_force_replaces_an_export_and_no_other_folder(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], to: str
) -> None:
    """Whatever names an export writes, the next may take their place; a run's folder is refused before any work."""
    output = tmp_path / "out"
    assert run("export", checkpoint, "--to", "prime-hf", "--shard-size", "20KB", "--output", output) == 0
    assert run("export", checkpoint, "--to", to, "--output", output) == 1
    assert "--force" in capsys.readouterr().err
    assert run("export", checkpoint, "--to", to, "--output", output, "--force") == 0
    assert (output / "model.safetensors").is_file() and not list(output.glob("model-*"))
    (output / "stats.jsonl").write_text("mine")
    before = sorted(output.iterdir())
    for flags in ((), ("--force",)):
        capsys.readouterr()
        assert run("export", tmp_path / "absent.pt", "--to", to, "--output", output, *flags) == 1
        said = capsys.readouterr().err
        assert "stats.jsonl" in said and "--force" not in said
    assert sorted(output.iterdir()) == before

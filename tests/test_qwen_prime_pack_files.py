"""The script's pack, unpack, diff and patch: what a user types, what comes out, and what bad input gets."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from test_packed_checkpoint import trained
from tiny_models import import_source, tiny_config, write_source

import prime_cli
import qwen_prime_eval
import qwen_prime_pack as script
import verify_qwen_prime
from entropy_coding import zero_order_entropy
from prime_checkpoint import CheckpointError
from prime_pack import Pack, carrier

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("script")
    import_source(write_source(folder / "source", tiny_config()), folder / "base.pt")
    return folder / "base.pt", trained(folder / "base.pt", folder / "new.pt")


def run(*arguments: object) -> int:
    return prime_cli.run(script.PackScriptConfig, script.main, script.ERRORS, [str(a) for a in arguments])


def refused(capsys: pytest.CaptureFixture[str], folder: Path, *arguments: object, code: int = 1) -> str:
    """The one line of a refusal, after which the folder is as it was."""
    before = sorted(folder.iterdir())
    capsys.readouterr()
    assert run(*arguments) == code
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: ") and sorted(folder.iterdir()) == before
    return lines[0]


def test_pack_and_unpack(pair: tuple[Path, Path], tmp_path: Path) -> None:
    for path in pair:
        packed, back = tmp_path / f"{path.stem}.prime", tmp_path / f"{path.stem}.pt"
        assert run("pack", path, "--output", packed, "--json", tmp_path / f"{path.stem}.json") == 0
        assert json.loads((tmp_path / f"{path.stem}.json").read_text())["packed, bytes"] == packed.stat().st_size
        assert run("unpack", packed, "--output", back) == 0
        assert back.read_bytes() == path.read_bytes()


def test_votes_may_stay_behind(pair: tuple[Path, Path], tmp_path: Path) -> None:
    assert run("pack", pair[1], "--output", tmp_path / "full") == 0
    assert run("pack", pair[1], "--output", tmp_path / "lean", "--no-votes") == 0
    assert (tmp_path / "lean").stat().st_size < (tmp_path / "full").stat().st_size
    assert run("unpack", tmp_path / "lean", "--output", tmp_path / "lean.pt") == 0
    assert verify_qwen_prime.main(verify_qwen_prime.VerifyConfig(tmp_path / "lean.pt")) == 0


def test_diff_patch_revert(pair: tuple[Path, Path], tmp_path: Path) -> None:
    base, new = pair
    report = tmp_path / "sizes.json"
    assert run("diff", base, new, "--output", tmp_path / "p", "--votes", "--json", report) == 0
    sizes = json.loads(report.read_text())
    assert sizes["patch, bytes"] == (tmp_path / "p").stat().st_size and sizes["LoRA adapter, r=16, bytes"] > 0
    assert run("patch", base, tmp_path / "p", "--output", tmp_path / "n.pt") == 0
    assert (tmp_path / "n.pt").read_bytes() == new.read_bytes()
    assert run("patch", tmp_path / "n.pt", tmp_path / "p", "--revert", "--output", tmp_path / "b.pt") == 0
    assert (tmp_path / "b.pt").read_bytes() == base.read_bytes()


def test_a_packed_file_is_scored_as_its_checkpoint(pair: tuple[Path, Path], tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("the quick brown fox jumps over the lazy dog. " * 8, encoding="utf-8")
    assert run("pack", pair[0], "--output", tmp_path / "x.pt") == 0
    scores = []
    for number, model in enumerate((pair[0], tmp_path / "x.pt")):
        report = tmp_path / f"{number}.json"
        assert qwen_prime_eval.main(qwen_prime_eval.EvalConfig(model, text=text, json=report)) == 0
        scores.append(json.loads(report.read_text())["nll_per_token"])
    assert scores[0] == scores[1]


def test_bad_input_is_one_line_and_leaves_nothing(
    pair: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base, new = pair
    inputs, out = tmp_path / "in", tmp_path / "out"
    inputs.mkdir()
    out.mkdir()
    assert run("diff", base, new, "--output", inputs / "p") == 0
    assert run("pack", base, "--output", inputs / "x.prime") == 0
    damaged = bytearray((inputs / "x.prime").read_bytes())
    damaged[len(damaged) // 2] ^= 1
    (inputs / "damaged").write_bytes(damaged)
    (inputs / "short").write_bytes(damaged[:5000])
    output = ("--output", out / "x")
    assert "damaged" in refused(capsys, out, "unpack", inputs / "damaged", *output)
    assert "damaged" in refused(capsys, out, "unpack", inputs / "short", *output)
    assert "not a packed file" in refused(capsys, out, "unpack", base, *output)
    assert "is a packed patch" in refused(capsys, out, "unpack", inputs / "p", *output)
    assert "is a packed checkpoint" in refused(capsys, out, "patch", base, inputs / "x.prime", *output)
    assert "use --revert" in refused(capsys, out, "patch", new, inputs / "p", *output)
    assert "cannot read" in refused(capsys, out, "pack", inputs / "none.pt", *output)
    assert "no folder" in refused(capsys, out, "pack", base, "--output", out / "no" / "x")
    assert "exists" in refused(capsys, out, "pack", base, "--output", inputs / "p")
    refused(capsys, out, "pack", base, "--outptu", out / "x", code=2)
    refused(capsys, out, "pakc", base, code=2)
    assert issubclass(CheckpointError, script.ERRORS)


@pytest.mark.parametrize("command", ["pack", "diff", "inspect"])
def test_a_report_replaces_nothing_unasked(
    pair: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], command: str
) -> None:
    """Least of all the checkpoint, whatever --force says; and that is found before any work."""
    base, kept = tmp_path / "base.pt", tmp_path / "kept.json"
    base.write_bytes(pair[0].read_bytes())
    kept.write_text("mine")
    arguments: list[object] = [command, base, *([pair[1]] if command == "diff" else [])]
    arguments += [] if command == "inspect" else ["--output", tmp_path / "x"]
    said = refused(capsys, tmp_path, *arguments, "--json", kept)
    assert "kept.json exists: choose another --json, or --force" in said and kept.read_text() == "mine"
    for taken in [base] if command == "inspect" else [base, tmp_path / "x", tmp_path / "." / "base.pt"]:
        for flags in ([], ["--force"]):
            assert "reads or writes" in refused(capsys, tmp_path, *arguments, "--json", taken, *flags)
    assert base.read_bytes() == pair[0].read_bytes()


def test_inspect_says_what_is_in_a_file(
    pair: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base, new = pair
    assert run("pack", base, "--output", tmp_path / "x") == 0
    assert run("diff", base, new, "--output", tmp_path / "p") == 0
    for file, kind in (("x", "checkpoint"), ("p", "patch")):
        assert run("inspect", tmp_path / file, "--json", tmp_path / "r.json", "--force") == 0
        report = json.loads((tmp_path / "r.json").read_text())
        packed = Pack(tmp_path / file)
        assert report["kind"] == kind and report["sha256"] == packed.sha256
        assert {line["name"] for line in report["tensors"]} == set(packed.sections)
        for line in report["tensors"]:
            values = packed.tensor(line["name"])
            assert line["elements"] == values.numel() and line["raw"] == values.nbytes
            assert line["entropy"] == pytest.approx(zero_order_entropy(carrier(values)))
        assert max(report["tensors"], key=lambda line: line["bytes"])["name"][-52:] in capsys.readouterr().out
    assert run("inspect", base) == 1

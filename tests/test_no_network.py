"""What is local stays local: no command speaks to the network over a local model, a mistyped path is not sent to the
hub, and offline a hub id ends in one line. And no command writes a pickle beside the one in a ``.pt``."""

from __future__ import annotations

import json
import os
import pickle
import pickletools
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import tiny_config, write_source

ROOT = Path(__file__).resolve().parent.parent
pytestmark = pytest.mark.usefixtures("one_thread")

Command = tuple[str, str, list[object]]


def offline_run(folder: Path, commands: list[Command], **environment: str | None) -> dict[str, Any]:
    """Run commands one after the other in a process without a network; the report of each."""
    texts = [(name, script, list(map(str, arguments))) for name, script, arguments in commands]
    (folder / "commands.json").write_text(json.dumps(texts), encoding="utf-8")
    own = {"HF_HOME": str(folder / "hub"), "XDG_CACHE_HOME": str(folder / "cache"), "HF_HUB_OFFLINE": None}
    given = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore", **own, **environment}
    done = subprocess.run(
        [sys.executable, str(ROOT / "tests" / "offline_run.py"), "commands.json", "report.json"],
        cwd=folder,
        env={name: value for name, value in given.items() if value is not None},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    report: dict[str, Any] = json.loads((folder / "report.json").read_text(encoding="utf-8"))
    return report


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny source and a few rows."""
    folder = tmp_path_factory.mktemp("offline")
    write_source(folder / "source", tiny_config(hidden_size=16, intermediate_size=32, num_hidden_layers=1))
    rows = [{"text": f"the quick brown fox number {n} jumps over the lazy dog"} for n in range(40)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    (folder / "text.txt").write_text("the quick brown fox jumps over the lazy dog. " * 8, encoding="utf-8")
    return folder


TRAIN = ["--seq-len", 32, "--batch-size", 1, "--grad-accum", 1, "--warmup", 1, "--device", "cpu"]
COMMANDS: list[Command] = [
    ("import", "qwen_prime_importer", ["--model", "source", "--output", "a.pt", "--report", "import.json"]),
    ("verify", "verify_qwen_prime", ["a.pt", "--json", "verify.json"]),
    ("verify with a reference", "verify_qwen_prime", ["a.pt", "--reference", "source", "--tokens", 2048]),
    (
        "train",
        "qwen_prime_train",
        ["--checkpoint", "a.pt", "--data", "rows.jsonl", "--output-dir", "run", "--steps", 2, *TRAIN],
    ),
    ("plan", "qwen_prime_train", ["--checkpoint", "a.pt", "--plan", "--memory", 1, "--device", "cpu"]),
    ("show", "qwen_prime_data", ["show", "rows.jsonl", "--tokenizer", "a.pt", "--seq-len", 32]),
    ("show from a folder", "qwen_prime_data", ["show", "rows.jsonl", "--tokenizer", "source"]),
    ("materialize", "qwen_prime_data", ["materialize", "rows.jsonl", "--tokenizer", "a.pt", "--output", "shards"]),
    (
        "train on shards",
        "qwen_prime_train",
        ["--checkpoint", "a.pt", "--data", "shards", "--output-dir", "run2", "--steps", 1, "--no-core-eval", *TRAIN],
    ),
    ("eval", "qwen_prime_eval", ["a.pt", "--text", "text.txt", "--device", "cpu", "--json", "eval.json"]),
    ("eval of a folder", "qwen_prime_eval", ["source", "--text", "text.txt", "--device", "cpu"]),
    ("pack", "qwen_prime_pack", ["pack", "a.pt", "--output", "a.prime", "--json", "pack.json"]),
    ("unpack", "qwen_prime_pack", ["unpack", "a.prime", "--output", "b.pt"]),
    ("diff", "qwen_prime_pack", ["diff", "a.pt", "run/a_prime_step_2.pt", "--output", "tune.patch"]),
    ("patch", "qwen_prime_pack", ["patch", "a.pt", "tune.patch", "--output", "c.pt"]),
    ("export hf", "qwen_prime_pack", ["export", "a.pt", "--to", "hf", "--output", "hf"]),
    ("export prime-hf", "qwen_prime_pack", ["export", "a.pt", "--to", "prime-hf", "--output", "prime-hf"]),
    ("eval of a folder of indices", "qwen_prime_eval", ["prime-hf", "--text", "text.txt", "--device", "cpu"]),
    ("chat", "qwen_prime_chat", ["a.pt", "--prompt", "hello", "--max-new-tokens", 3, "--device", "cpu"]),
    ("chat with a packed file", "qwen_prime_chat", ["a.prime", "--prompt", "hello", "--max-new-tokens", 3]),
    ("chat with a folder", "qwen_prime_chat", ["hf", "--prompt", "hello", "--max-new-tokens", 3]),
]
NOWHERE = ["./nowhere", "../nowhere", "/no/such/folder", "nowhere.pt", "nowhere", "source/nowhere", "no/such/folder"]
NOWHERE += ["~/nowhere", "./no/where.pt", "runs/nowhere.pt", "runs/nowhere.prime", "C:\\no\\where"]
MISTYPED: list[Command] = [
    command
    for path in NOWHERE
    for command in (
        (f"import {path}", "qwen_prime_importer", ["--model", path, "--output", "x.pt"]),
        (f"verify {path}", "verify_qwen_prime", ["a.pt", "--reference", path]),
        (f"tokenizer {path}", "qwen_prime_data", ["show", "rows.jsonl", "--tokenizer", path]),
        (f"data {path}", "qwen_prime_data", ["show", path, "--tokenizer", "a.pt"]),
        (f"eval {path}", "qwen_prime_eval", [path, "--text", "text.txt", "--device", "cpu"]),
        (f"chat {path}", "qwen_prime_chat", [path, "--prompt", "hello", "--device", "cpu"]),
    )
    # Two words may be a dataset whatever they end with.
    if not command[0].startswith("data runs/")
]
HUB: list[Command] = [
    ("import", "qwen_prime_importer", ["--model", "made-up/model", "--output", "x.pt"]),
    ("reference", "verify_qwen_prime", ["a.pt", "--reference", "made-up/model"]),
    ("tokenizer", "qwen_prime_data", ["show", "rows.jsonl", "--tokenizer", "made-up/model"]),
    ("data", "qwen_prime_data", ["show", "made-up/set", "--tokenizer", "a.pt"]),
    ("materialize", "qwen_prime_data", ["materialize", "made-up/set", "--tokenizer", "a.pt", "--output", "x"]),
    (
        "train",
        "qwen_prime_train",
        ["--checkpoint", "a.pt", "--data", "made-up/set:tiny@main", "--output-dir", "x", "--steps", 1, *TRAIN],
    ),
]


@pytest.fixture(scope="module")
def online(folder: Path) -> dict[str, Any]:
    """Everything that must not speak, and two that do, with HF_HUB_OFFLINE unset."""
    speaks: list[Command] = [("speaks", "socket", []), ("asks the hub", *HUB[0][1:])]
    return offline_run(folder, [*speaks, *COMMANDS, *MISTYPED])


@pytest.mark.parametrize("name", ["speaks", "asks the hub"])
def test_what_speaks_is_noticed(name: str, online: dict[str, Any]) -> None:
    assert online[name]["attempts"], "the hook sees nothing: the tests below show nothing"


@pytest.mark.parametrize("name", [command[0] for command in COMMANDS])
def test_local_models_and_data_need_no_network(name: str, online: dict[str, Any]) -> None:
    found = online[name]
    assert found["attempts"] == [] and found["code"] == 0, found


def test_nothing_speaks_around_python(online: dict[str, Any]) -> None:
    """The hub's client for large files is compiled and no hook sees it; nor does any hook see another process."""
    assert not {"hf_xet", "hf_transfer"} & set(online["modules"])


@pytest.mark.parametrize("path", NOWHERE)
def test_a_path_that_does_not_exist_is_not_sent_to_the_hub(path: str, online: dict[str, Any]) -> None:
    found = {name: online[name] for name in online if name.endswith(f" {path}") and name != "modules"}
    assert len(found) >= 5
    for name, one in found.items():
        assert one["attempts"] == [] and one["code"] == 1, (name, one)
        if name.startswith("verify"):
            assert "FAILED: reference" in one["printed"] and "no such folder" in " ".join(one["printed"].split()), one
        else:
            assert one["said"].startswith("error: ") and one["said"].count("\n") == 1, (name, one)


def test_offline_a_hub_id_ends_in_one_line(folder: Path, online: dict[str, Any]) -> None:
    found = offline_run(folder, HUB, HF_HUB_OFFLINE="1")
    for name, *_ in HUB:
        one = found[name]
        assert one["attempts"] == [] and one["code"] == 1, (name, one)
        if name == "reference":
            assert "FAILED: reference" in one["printed"] and "HF_HUB_OFFLINE" in one["printed"], one
            continue
        assert one["said"].count("\n") == 1 and one["said"].startswith("error: "), (name, one)
        assert "HF_HUB_OFFLINE is set" in one["said"] and "made-up/" in one["said"], (name, one)
    assert not (folder / "x.pt").exists() and not list((folder / "x").glob("*.safetensors"))


# -- what was written -------------------------------------------------------------------------------------------------


def is_pickle(data: bytes, whole: bool = False) -> bool:
    """Whether bytes begin with a pickle; with ``whole``, whether they are one from their beginning to their end, or
    begin with one that says so."""
    try:
        places = [place for *_, place in pickletools.genops(data)]
        return len(places) > 1 and (not whole or places[-1] + 1 == len(data) or data[:1] == b"\x80")
    except Exception:
        # pickletools says of what is none whatever its parts happen to raise.
        return False


def pickles_in(path: Path) -> list[str]:
    """Names of what is pickled in a file: entries of an archive, or the file itself."""
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            # What torch reads as a tensor's bytes may happen to begin with two or three that are a pickle: votes did.
            return [
                n
                for n in archive.namelist()
                if n.endswith((".pkl", ".pickle")) or is_pickle(archive.read(n), whole="/data/" in n)
            ]
    data = path.read_bytes()
    marks = any(b"\x80" + bytes([v]) in data[:2] for v in range(2, 6)) or b"ctorch._utils\n" in data
    return [path.name] if marks or is_pickle(data) else []


def test_a_pickle_is_noticed(tmp_path: Path) -> None:
    for protocol in range(6):
        (tmp_path / "a").write_bytes(pickle.dumps({"a": [1, 2.5, "x"]}, protocol))
        assert pickles_in(tmp_path / "a") == ["a"], protocol
    torch.save({"a": torch.zeros(3)}, tmp_path / "a")
    assert pickles_in(tmp_path / "a") == ["a/data.pkl"]
    torch.save({"a": 1}, tmp_path / "a", _use_new_zipfile_serialization=False)
    assert pickles_in(tmp_path / "a") == ["a"]
    for text in ("{}", '{"a": 1}\n', "", "text.", "[[1.0], 2]"):
        (tmp_path / "a").write_text(text)
        assert pickles_in(tmp_path / "a") == []


def test_no_command_writes_a_pickle_but_a_checkpoints_own(folder: Path, online: dict[str, Any]) -> None:
    written = [f for f in folder.rglob("*") if f.is_file() and "source" not in f.parts and f.parent.name != "hub"]
    kinds = {f.suffix for f in written}
    assert {".pt", ".prime", ".patch", ".safetensors", ".json", ".jsonl"} <= kinds
    checkpoints = [f for f in written if pickles_in(f)]
    assert {f.suffix for f in checkpoints} == {".pt"} and len(checkpoints) == len(
        [f for f in written if f.suffix == ".pt"]
    )
    assert {"a.pt", "b.pt", "c.pt", "a_prime_step_2.pt"} <= {f.name for f in checkpoints}
    for file in checkpoints:
        assert [name.split("/")[-1] for name in pickles_in(file)] == ["data.pkl"]
        assert isinstance(torch.load(file, weights_only=True), dict)

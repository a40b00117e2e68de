"""qwen_prime_data: the two commands, through their ``main``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from data_tools import CHATML, build_tokenizer, write_lines

import prime_cli
import qwen_prime_data as script
from text_records import DataError
from token_shards import MANIFEST


@pytest.fixture(scope="module")
def tokenizer_folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("tokenizer")
    build_tokenizer(CHATML).save_pretrained(folder)
    return str(folder)


def rows(tmp_path: Path) -> Path:
    return write_lines(
        tmp_path / "rows.jsonl", [{"prompt": f"q {i}", "completion": f"an\x1b[31mswer {i}"} for i in range(40)]
    )


def test_show_marks_what_is_learned(tmp_path: Path, tokenizer_folder: str, capsys: Any) -> None:
    config = script.ShowConfig(data=str(rows(tmp_path)), tokenizer=tokenizer_folder, hold_out=0.0, count=2, seq_len=64)
    assert script.main(config) == 0
    out = capsys.readouterr().out
    assert "40 records" in out and "% filled" in out
    assert "<|im_start|>user\nq 0<|im_end|>\n<|im_start|>assistant\n«an" in out
    assert "swer 0<|im_end|>»" in out
    assert "\x1b" not in out and "\u241b" in out, "control characters are shown, not obeyed"


def test_show_obeys_no_escape_of_a_bad_row(tmp_path: Path, tokenizer_folder: str, capsys: Any) -> None:
    good = [{"prompt": f"q {i}", "completion": "a"} for i in range(200)]
    data = str(write_lines(tmp_path / "rows.jsonl", [*good, {"\x1b[2J\x1b[31mEVIL": 1}]))
    config = script.ShowConfig(data=data, tokenizer=tokenizer_folder, count=0, data_cache=tmp_path / "cache")
    assert script.main(config) == 0
    out = capsys.readouterr().out
    assert "\x1b" not in out and "got \u241b[2J\u241b[31mEVIL" in out


def test_materialize_then_show(tmp_path: Path, tokenizer_folder: str, capsys: Any) -> None:
    config = script.MaterializeConfig(
        data=str(rows(tmp_path)), tokenizer=tokenizer_folder, output=tmp_path / "out", valid=0.2, limit=30
    )
    assert script.main(config) == 0
    manifest = json.loads((tmp_path / "out" / MANIFEST).read_text())
    assert manifest["rows"]["records"] == 30 and manifest["settings"]["limit"] == 30
    assert script.main(script.ShowConfig(data=str(tmp_path / "out"), tokenizer=tokenizer_folder, count=1)) == 0
    assert "shards of" in capsys.readouterr().out
    with pytest.raises(DataError, match="holds token shards already"):
        script.main(
            script.MaterializeConfig(data=str(tmp_path / "out"), tokenizer=tokenizer_folder, output=tmp_path / "x")
        )


def test_usage(tmp_path: Path, tokenizer_folder: str, capsys: Any) -> None:
    errors = (DataError, OSError)

    def run(*arguments: str) -> tuple[int, str]:
        code = prime_cli.run(script.DataConfig, script.main, errors, arguments)
        return code, capsys.readouterr().err

    code, err = run("show", "nowhere.jsonl", "--tokenizer", tokenizer_folder)
    assert code == 1 and "nowhere.jsonl: no such file or folder" in err and err.count("\n") == 1
    code, err = run("show", "x", "--tokenizer", "y", "--seq-len", "1")
    assert code == 2 and "seq-len is 1" in err
    code, err = run("materialize", "x", "--tokenizer", "y", "--output", "z", "--valid", "1")
    assert code == 2 and "valid is 1" in err

"""text_records: formats, bad rows, splits, files that cannot be read."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from data_tools import SHARED, dialogue, write_lines

from text_records import BadRow, Conversation, DataError, drawn, read_records

FORMATS = {
    "messages": (
        {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]},
        dialogue("q", "a"),
    ),
    "sharegpt": (
        {
            "system": "s",
            "conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}],
        },
        Conversation((("system", "s"), ("user", "q"), ("assistant", "a"))),
    ),
    "prompt/completion": ({"prompt": "q", "completion": "a"}, dialogue("q", "a")),
    "alpaca": ({"instruction": "q", "input": "i", "output": "a", "text": "whole"}, dialogue("q\n\ni", "a")),
    "question/answer": ({"question": "q", "answer": "a"}, dialogue("q", "a")),
    "text": ({"text": "t\u2028t"}, "t\u2028t"),
}


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("suffix", [".json", ".jsonl"])
def test_formats(tmp_path, name, suffix):
    row, record = FORMATS[name]
    file = tmp_path / f"x{suffix}"
    rows = [json.dumps(row, ensure_ascii=False)] * 2
    file.write_text("[" + ",\n".join(rows) + "]" if suffix == ".json" else "\n\n".join(rows), encoding="utf-8")
    found = read_records(str(file))
    assert found.records == (record, record)
    assert (found.format, found.bad_rows, found.files) == (name, (), (str(file),))


def test_alpaca_without_input(tmp_path):
    rows = [{"instruction": "q", "output": "a"}, {"instruction": "q", "input": "", "output": "a"}]
    assert read_records(write_lines(tmp_path / "x.jsonl", rows)).records == (dialogue("q", "a"),) * 2


def test_alpaca_whose_instruction_is_its_input(tmp_path):
    rows = [{"instruction": "", "input": "q", "output": "a"}]
    assert read_records(write_lines(tmp_path / "x.jsonl", rows)).records == (dialogue("q", "a"),)


def test_what_belongs_to_the_prompt_is_not_dropped(tmp_path):
    rows = [
        {"question": "q", "context": "c", "answer": "a"},
        {"prompt": "q", "context": "c", "completion": "a"},
        {"question": "q", "context": "", "answer": "a"},
        {"system_prompt": "s", "question": "q", "answer": "a"},
        {"system": "s", "system_prompt": "other", "instruction": "q", "output": "a"},
        {"system": "", "system_prompt": "s", **FORMATS["messages"][0]},
    ]
    found = read_records(write_lines(tmp_path / "x.jsonl", rows))
    told = Conversation((("system", "s"), ("user", "q"), ("assistant", "a")))
    assert found.records == (*[dialogue("q\n\nc", "a")] * 2, dialogue("q", "a"), told, told, told)
    assert found.unused == ()
    wrong = write_lines(tmp_path / "y.jsonl", [{"system_prompt": ["s"], "question": "q", "answer": "a"}])
    with pytest.raises(DataError, match='"system_prompt" is a list, expected a string'):
        read_records(wrong)


def test_columns_that_are_not_used_are_kept_by_name(tmp_path):
    rows = [
        {"id": 1, "split": "train", "text": "t", "url": "u", "title": "x"},
        {"text": "t", "url": "u", "empty": None, "tools": []},
        {"text": "t", "system": "s"},
        {"question": "q", "answer": "a", "context": ["c"], "url": "u"},
        "t",
        {"text": "t", "split": "eval", "of": "another split"},
    ]
    rows = [{**r, "split": r.get("split", "train")} if isinstance(r, dict) else r for r in rows]
    file = write_lines(tmp_path / "x.jsonl", rows)
    found = read_records(file, split="train", max_bad_share=0.5)
    assert found.unused == (("url", 3), ("title", 1), ("system", 1), ("context", 1))
    assert found.where(lambda key: False).unused == found.unused


def test_texts_and_folders(tmp_path):
    (tmp_path / "b.txt").write_bytes(b"\xef\xbb\xbfone\r\ndocument\n")
    (tmp_path / "a.json").write_text('["first", "second"]')
    write_lines(tmp_path / "sub" / "c.jsonl", [{"prompt": "q", "completion": "a"}])
    (tmp_path / "README.md").write_text("not data")
    (tmp_path / ".hidden.txt").write_text("not data")
    found = read_records(tmp_path)
    assert found.records == ("first", "second", "one\r\ndocument\n", dialogue("q", "a"))
    assert found.format == "text (3) + prompt/completion (1)"
    assert [Path(f).name for f in found.files] == ["a.json", "b.txt", "c.jsonl"]
    assert [Path(f).name for f in found.ignored] == ["README.md"]


GOOD = {"prompt": "q", "completion": "a"}
ASKED = [{"role": "user", "content": "q"}]
BAD_ROWS = [
    (b'{"prompt": "q", \n', "malformed JSON"),
    (b'{"prompt": "q", "completion": "\xff"}\n', "invalid UTF-8 at byte 31"),
    (b'{"prompt": "q", "completion": "\\ud800"}\n', "invalid UTF-8"),
    (b"7\n", "got a number, expected an object"),
    ({}, "missing keys: got none"),
    ({"prompt": "q"}, "missing keys: got prompt"),
    ({"instruction": "q", "input": ""}, "missing keys: got instruction, input"),
    ({"prompt": "q", "completion": ""}, "empty answer"),
    ({"prompt": "q", "completion": " \n"}, "empty answer"),
    ({"prompt": " ", "completion": "a"}, "empty prompt"),
    ({"prompt": "q", "completion": None}, 'wrong type: "completion" is null, expected a string'),
    ({"instruction": "q", "input": 3, "output": "a"}, 'wrong type: "input" is a number'),
    ({"text": ["t"]}, 'wrong type: "text" is a list'),
    ({"text": ""}, "empty text"),
    ({"messages": "q"}, 'wrong type: "messages" is a string, expected a list'),
    ({"messages": []}, "missing answer"),
    ({"messages": [{"role": "user", "content": "q"}]}, "missing answer"),
    ({"messages": [{"role": "assistant", "content": "a"}]}, "missing prompt"),
    ({"messages": ["q"]}, "wrong type: messages[0] is a string, expected an object"),
    ({"messages": [{"role": "user"}]}, "missing keys: messages[0] has no content"),
    ({"messages": [{"role": "narrator", "content": "q"}]}, "unknown role 'narrator'"),
    ({"messages": [{"role": "assistant", "content": "", "tool_calls": [{}]}]}, '"tool_calls" is not supported'),
    (
        {"messages": [*ASKED, {"role": "assistant", "content": "a", "thinking": "t"}]},
        '"thinking" is not supported',
    ),
    (
        {"messages": [*ASKED, {"role": "assistant", "content": "a", "weight": 0}]},
        'messages[1]: a "weight" other than 1 is not supported',
    ),
    ({"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": ""}]}, "empty answer"),
    ({**GOOD, "tools": [{}]}, '"tools" is not supported'),
]


@pytest.mark.parametrize(("row", "reason"), BAD_ROWS)
def test_bad_rows_are_named_with_file_line_and_reason(tmp_path, row, reason):
    file = write_lines(tmp_path / "x.jsonl", [GOOD, b"\n", row, GOOD])
    found = read_records(file, max_bad_share=0.5)
    assert found.records == (dialogue("q", "a"),) * 2
    (bad,) = found.bad_rows
    assert (bad.file, bad.line) == (str(file), 3)
    assert reason in bad.reason
    with pytest.raises(DataError) as raised:
        read_records(file, strict=True, max_bad_share=0.5)
    assert f"{file}:3: {bad.reason}" in str(raised.value)


def test_weights_that_say_what_is_done_are_fine(tmp_path):
    """Every answer is learned, no question is."""
    rows = [
        {"messages": [{**ASKED[0], "weight": 0}, {"role": "assistant", "content": "a", "weight": weight}]}
        for weight in (1, 1.0, None)
    ]
    assert read_records(write_lines(tmp_path / "x.jsonl", rows)).records == (dialogue("q", "a"),) * 3


def test_bad_rows_of_lists_and_texts(tmp_path):
    (tmp_path / "a.json").write_bytes(b'["good",\n"",\n {"text":\n"g\xffd"}, "good"]')
    (tmp_path / "b.txt").write_bytes(b"one\ntwo\xff")
    (tmp_path / "c.txt").write_bytes(b"\n")
    found = read_records(tmp_path, max_bad_share=1)
    assert found.records == ("good", "good")
    assert [(Path(b.file).name, b.line) for b in found.bad_rows] == [
        ("a.json", 2),
        ("a.json", 3),
        ("b.txt", 2),
        ("c.txt", 1),
    ]
    for bad, reason in zip(found.bad_rows, ("empty text", "invalid UTF-8", "invalid UTF-8", "empty text"), strict=True):
        assert reason in bad.reason


@pytest.mark.parametrize(
    ("content", "line", "message"),
    [
        ('["a",\n{"text": }]', 2, "malformed JSON"),
        ('["a"\n"b"]', 2, "expected ',' or ']'"),
        ('["a",\n', 2, "malformed JSON"),
        ('["a"]\n["b"]', 2, "follows the list"),
        ('{"text": "a"}', 1, "where a list should begin"),
        ("", 1, "where a list should begin"),
    ],
)
def test_broken_list_is_refused_whole(tmp_path, content, line, message):
    file = tmp_path / "x.json"
    file.write_text(content)
    with pytest.raises(DataError) as raised:
        read_records(file, max_bad_share=1)
    assert f"{file}:{line}: " in str(raised.value) and message in str(raised.value)


def test_share_of_bad_rows(tmp_path):
    file = write_lines(tmp_path / "x.jsonl", [GOOD] * 97 + [{"prompt": "q", "completion": ""}, {}, b"{\n"])
    assert len(read_records(file, max_bad_share=0.03).bad_rows) == 3
    with pytest.raises(DataError) as raised:
        read_records(file)
    message = str(raised.value)
    assert "3 of 100 rows are bad" in message and "1.00%" in message
    assert all(part in message for part in (f"{file}:98: empty answer", f"{file}:99: ", f"{file}:100: malformed"))
    with pytest.raises(DataError, match=r"expected at most 2\.00%"):
        read_records(file, max_bad_share=0.02)
    with pytest.raises(DataError, match="from 0 to 1"):
        read_records(file, max_bad_share=3)


def test_split(tmp_path):
    rows = [{"prompt": "q", "completion": str(i), "split": "valid" if i % 4 == 0 else "train"} for i in range(8)]
    rows[4]["completion"] = ""  # a bad row of the other split is not examined
    file = write_lines(tmp_path / "x.jsonl", rows)
    found = read_records(file, split="train", max_bad_share=0)
    assert [r.messages[1][1] for r in found.records] == ["1", "2", "3", "5", "6", "7"]
    assert (found.split, found.other_splits) == ("train", 2)
    assert len(read_records(file, max_bad_share=0.2).records) == 7
    with pytest.raises(DataError, match=r"no usable record in split 'test'; splits found: .*'train': 6"):
        read_records(file, split="test")
    # Where no row names a split, the set says that none was applied.
    plain = read_records(write_lines(tmp_path / "y.jsonl", [GOOD] * 2), split="train")
    assert (len(plain.records), plain.split) == (2, None)
    mixed = read_records(
        write_lines(tmp_path / "z.jsonl", [{**GOOD, "split": "train"}, GOOD]), split="train", max_bad_share=1
    )
    assert len(mixed.records) == 1
    assert mixed.bad_rows == (BadRow(str(tmp_path / "z.jsonl"), 2, 'no "split" key, while other rows have one'),)


def test_paths_that_cannot_be_read(tmp_path):
    (tmp_path / "x.csv").write_text("a,b")
    for path, message in (
        (tmp_path / "x.csv", "got suffix '.csv', expected one of .json, .jsonl, .parquet, .txt"),
        (tmp_path / "none.jsonl", "no such file or folder"),
        (tmp_path, "the folder holds none of .json, .jsonl, .parquet, .txt among its 1 files"),
        (tmp_path / "empty.jsonl", "no usable record"),
    ):
        if path.name == "empty.jsonl":
            path.touch()
        with pytest.raises(DataError) as raised:
            read_records(path)
        assert message in str(raised.value) and str(path) in str(raised.value)


def test_real_files_and_their_formats():
    if not SHARED.is_dir():
        pytest.skip(f"{SHARED} is absent")
    for name, form, records, bad_lines in (
        ("code/new_codealpaca.json", "alpaca", 4535, []),
        ("code/code_alpaca_2k.json", "alpaca", 2015, [1187, 9297]),
        ("chat/identity.json", "alpaca", 91, []),
        ("corpora/gsm8k_train.jsonl", "question/answer", 7473, []),
        ("corpora/tinystories_850.json", "text", 850, []),
        ("corpora/wikitext2_valid.txt", "text", 1, []),
    ):
        found = read_records(SHARED / name)
        assert (found.format, len(found.records)) == (form, records)
        assert [(b.line, b.reason) for b in found.bad_rows] == [(line, "empty answer") for line in bad_lines]


def test_tables(tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    rows = [{"instruction": f"q{i}", "input": "", "output": f"a{i}"} for i in range(2500)]
    rows[1700]["output"] = ""
    path = tmp_path / "rows.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    found = read_records(path)
    assert (found.format, len(found.records)) == ("alpaca", 2499)
    assert [(b.line, b.reason) for b in found.bad_rows] == [(1701, "empty answer")]
    assert found.records[1] == dialogue("q1", "a1")
    nested = pyarrow.Table.from_pylist(
        [{"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}]
    )
    pyarrow.parquet.write_table(nested, tmp_path / "nested.parquet")
    assert read_records(tmp_path / "nested.parquet").records == (dialogue("q", "a"),)
    data = path.read_bytes()
    for damage in (data[:-200], b"PAR1" + data[60:], b""):
        path.write_bytes(damage)
        with pytest.raises(DataError, match="cannot be read as Parquet"):
            read_records(path)


def test_keys_decide_splits(tmp_path: Path) -> None:
    rows = [
        {"id": "doc-7", "text": "one"},
        {"id": 7, "text": "two"},
        {"text": "three"},
        {"prompt": "three", "completion": "x"},
        {"prompt": "three", "completion": "y"},
        {"id": "", "text": "four"},
    ]
    found = read_records(write_lines(tmp_path / "rows.jsonl", rows))
    assert found.keys[:2] == ("doc-7", "7")
    assert found.keys[2] == found.keys[3] == found.keys[4] != found.keys[5] and len(found.keys[5]) == 64
    keys = [f"key {i}" for i in range(4000)]
    share = sum(drawn(key, 0.25) for key in keys) / 4000
    assert 0.22 < share < 0.28
    assert {k for k in keys if drawn(k, 0.1)} < {k for k in keys if drawn(k, 0.2)}
    assert not any(drawn(k, 0.0) for k in keys) and all(drawn(k, 1.0) for k in keys)
    part = found.where(lambda key: key == "7")
    assert part.records == ("two",) and part.keys == ("7",)

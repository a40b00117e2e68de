"""training_data: what is learned and what is scored, the cache, and sources of every kind."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from data_tools import ALTERNATE, CHATML, THINK, build_tokenizer, dialogue, twice_answered, write_lines
from test_record_streams import hub, pairs  # noqa: F401

import document_cache
import record_streams
import training_data
from packed_batches import PackedBatches
from record_streams import FileRows, Prefetched
from text_records import DataError, drawn, prompt_key
from token_shards import ShardPlan, materialize
from training_data import DataSettings, open_data


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return build_tokenizer(CHATML)


def opened(data: Any, tokenizer: Any, cache: Path, eval_data: Any = None, **settings: Any) -> Any:
    return open_data(data, eval_data, tokenizer, 64, DataSettings(data_cache=cache, **settings))


def texts(tokenizer: Any, encoded: Any) -> list[str]:
    return [tokenizer.decode(encoded.document(i).input_ids) for i in range(len(encoded))]


def test_a_share_is_held_out_where_the_data_say_nothing(tokenizer: Any, tmp_path: Path) -> None:
    path = write_lines(tmp_path / "rows.jsonl", pairs(200))
    found = opened(path, tokenizer, tmp_path / "cache", hold_out=0.1)
    learned, held = texts(tokenizer, found.blocks.block(0, 0)), texts(tokenizer, found.held)
    assert len(learned) + len(held) == 200 and not set(learned) & set(held) and 8 <= len(held) <= 35
    assert "held out" in found.summary and found.blocks.block(0, 1) is None
    everything = opened(path, tokenizer, tmp_path / "cache", hold_out=0.0)
    assert everything.held is None and len(everything.blocks.block(0, 0)) == 200


def test_splits_of_the_data_are_kept(tokenizer: Any, tmp_path: Path) -> None:
    rows = [{**row, "split": "eval" if i % 4 == 0 else "train"} for i, row in enumerate(pairs(40))]
    path = write_lines(tmp_path / "rows.jsonl", rows)
    found = opened(path, tokenizer, tmp_path / "cache")
    assert (len(found.blocks.block(0, 0)), len(found.held)) == (30, 10)
    other = opened(path, tokenizer, tmp_path / "cache", split="eval", eval_split="train")
    assert (len(other.blocks.block(0, 0)), len(other.held)) == (10, 30)
    alone = write_lines(tmp_path / "alone.jsonl", [row for row in rows if row["split"] == "train"])
    assert opened(alone, tokenizer, tmp_path / "cache").held is None
    given = opened(alone, tokenizer, tmp_path / "cache", eval_data=path)
    assert len(given.held) == 10


def test_a_second_run_reads_the_cache_and_a_changed_file_does_not(
    tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: Any
) -> None:
    path, cache = write_lines(tmp_path / "rows.jsonl", pairs(100)), tmp_path / "cache"
    calls: list[int] = []
    encode = training_data.encode_records
    monkeypatch.setattr(training_data, "encode_records", lambda *a, **k: calls.append(1) or encode(*a, **k))

    def run(expected: int, tokenizer: Any = tokenizer, **settings: Any) -> Any:
        calls.clear()
        found = opened(path, tokenizer, cache, **settings)
        assert len(calls) == expected
        return found

    first = run(2)
    again = run(0)
    assert again.blocks.fingerprint == first.blocks.fingerprint and again.held.fingerprint == first.held.fingerprint
    told = again.summary.replace(str(tmp_path), "")
    assert "encoded before" in told and "100" not in told.split("encoded before")[1]
    run(1, hold_out=0.0)
    run(2, last_turn_only=True)
    run(2, tokenizer=build_tokenizer(THINK))
    run(0, block_rows=5)
    path.write_text(path.read_text().replace("question 3", "question x"))
    changed = run(2)
    assert changed.blocks.fingerprint != first.blocks.fingerprint
    for file in cache.glob("*.train.*"):
        data = bytearray(file.read_bytes())
        data[-1] ^= 1
        file.write_bytes(bytes(data))
    repaired = run(2)
    assert "the cache is damaged" in caplog.text
    assert repaired.blocks.fingerprint == changed.blocks.fingerprint


def test_the_cache_is_bounded_and_not_needed(tokenizer: Any, tmp_path: Path, monkeypatch: Any, caplog: Any) -> None:
    monkeypatch.setattr(document_cache, "CACHE_ENTRIES", 2)
    path, cache = tmp_path / "rows.jsonl", tmp_path / "cache"
    for count in (50, 60, 70, 80):
        opened(write_lines(path, pairs(count)), tokenizer, cache)
    assert len(list(cache.glob("*.train.safetensors"))) == 2 and len(list(cache.iterdir())) == 4
    (tmp_path / "file").write_text("in the way")
    found = opened(path, tokenizer, tmp_path / "file")
    assert len(found.blocks.block(0, 0)) + len(found.held) == 80
    assert "cannot be written" in caplog.text


def test_a_cache_that_is_only_to_be_read_serves(tokenizer: Any, tmp_path: Path, monkeypatch: Any) -> None:
    path = write_lines(tmp_path / "rows.jsonl", pairs(50))
    opened(path, tokenizer, tmp_path / "cache")

    def refuse(path: Path) -> None:
        raise PermissionError(1, "Operation not permitted", str(path))

    monkeypatch.setattr(document_cache.os, "utime", refuse)
    assert "encoded before" in opened(path, tokenizer, tmp_path / "cache").summary


def test_without_a_home_there_is_no_cache(tokenizer: Any, tmp_path: Path, monkeypatch: Any, caplog: Any) -> None:
    def nowhere() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(training_data.Path, "home", nowhere)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    found = open_data(write_lines(tmp_path / "rows.jsonl", pairs(50)), None, tokenizer, 64, DataSettings())
    assert len(found.blocks.block(0, 0)) + len(found.held) == 50
    assert "no home folder: give --data-cache" in caplog.text
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert document_cache.cache_folder() == tmp_path / "qwen-prime"


def test_large_files_are_streamed(tokenizer: Any, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(training_data, "STREAM_BYTES", 1000)
    path = write_lines(tmp_path / "rows.jsonl", pairs(120))
    found = opened(path, tokenizer, tmp_path / "cache", block_rows=50, hold_out=0.1)
    assert isinstance(found.blocks, Prefetched) and "streamed in blocks of 50 rows" in found.summary
    batches = PackedBatches(found.blocks, seq_len=64, batch_size=1, pad_id=0, seed=0)
    seen: list[str] = []
    while batches.epoch == 0:
        seen += tokenizer.decode(next(batches).input_ids[0].tolist()).split("question ")[1:]
    learned = {s.split("<")[0] for s in seen}
    held = {t.split("question ")[1].split("<")[0] for t in texts(tokenizer, found.held)}
    # Of the held-out records those of the first block are scored; none is learned.
    assert held and not held & learned and all(int(i) < 50 for i in held)
    assert not (tmp_path / "cache").exists()


def test_large_files_whose_rows_name_splits_are_learned_and_scored_by_them(
    tokenizer: Any, tmp_path: Path, monkeypatch: Any
) -> None:
    monkeypatch.setattr(training_data, "STREAM_BYTES", 0)
    rows = [{**row, "split": "eval" if i % 4 == 3 else "train"} for i, row in enumerate(pairs(40))]
    path = write_lines(tmp_path / "rows.jsonl", rows)
    found = opened(path, tokenizer, tmp_path / "cache", block_rows=8)
    learned = [t for n in range(5) for t in texts(tokenizer, found.blocks.block(0, n))]
    assert len(learned) == 30 and len(found.held) == 2 and not set(learned) & set(texts(tokenizer, found.held))
    other = opened(path, tokenizer, tmp_path / "cache", block_rows=8, eval_split="valid")
    assert other.held is None and "have none of split valid: give --eval-data" in other.summary


LONG = [
    {"prompt": f"q{i} " * (40 if i % 3 == 0 else 1), "completion": "a " * (90 if i % 3 == 1 else 1)} for i in range(60)
]


def test_what_is_cut_and_dropped_is_said_of_streams_and_shards_too(
    tokenizer: Any, tmp_path: Path, monkeypatch: Any
) -> None:
    path = write_lines(tmp_path / "rows.jsonl", [{**row, "url": "u"} for row in LONG])
    wanted = "40 records cut at 64 tokens, 20 of them dropped with no answer left; 0 texts split"
    assert f"data: {wanted}" in opened(path, tokenizer, tmp_path / "cache", hold_out=0.0).summary
    monkeypatch.setattr(training_data, "STREAM_BYTES", 0)
    calls: list[int] = []
    encode = record_streams.encode_records
    monkeypatch.setattr(record_streams, "encode_records", lambda *a, **k: calls.append(1) or encode(*a, **k))
    found = opened(path, tokenizer, tmp_path / "cache", block_rows=100, hold_out=0.0)
    assert f"data: of the first block {wanted}" in found.summary
    assert "data: columns not used: url" in found.summary
    assert len(found.blocks.block(0, 0)) == 40 and calls == [1], "encoded once"
    texts = write_lines(tmp_path / "texts.jsonl", [{"text": "t " * 100}] * 3)
    materialize(FileRows(texts), tokenizer, "tiny", ShardPlan(valid=0.0), tmp_path / "shards")
    shards = opened(tmp_path / "shards", tokenizer, tmp_path / "cache")
    assert "data: of the first shard 0 records cut at 64 tokens, 0 of them dropped with no" in shards.summary
    assert "3 texts split" in shards.summary


def test_records_to_score_that_leave_no_target_stop_no_run(tokenizer: Any, tmp_path: Path, monkeypatch: Any) -> None:
    rows = [{**row, "split": "train"} for row in pairs(20)]
    rows += [{"prompt": "q " * 100, "completion": "a", "split": "eval"}] * 3
    path = write_lines(tmp_path / "rows.jsonl", rows)
    asked = write_lines(tmp_path / "asked.jsonl", rows[20:])
    with pytest.raises(DataError, match="none of the records that --eval-data names left a target in 64 tokens"):
        opened(path, tokenizer, tmp_path / "cache", eval_data=asked)
    for _ in range(2):
        found = opened(path, tokenizer, tmp_path / "cache")
        assert found.held is None and "held out: no documents, too few" in found.summary
    monkeypatch.setattr(training_data, "STREAM_BYTES", 0)
    found = opened(path, tokenizer, tmp_path / "cache")
    assert found.held is None and "held out: no documents, too few" in found.summary
    write_lines(path, rows[:21])
    plan = ShardPlan(split="train", eval_split="eval")
    materialize(FileRows(path), tokenizer, "tiny", plan, tmp_path / "shards")
    shards = open_data(tmp_path / "shards", None, tokenizer, 64, DataSettings())
    assert shards.held is None and "held out: no documents, too few" in shards.summary
    with pytest.raises(DataError, match="none of the records that --eval-data names left a target"):
        opened(path, tokenizer, tmp_path / "cache", eval_data=tmp_path / "shards")


@pytest.mark.parametrize("stream", [False, True])
def test_files_that_are_scored_are_not_learned(tokenizer: Any, tmp_path: Path, monkeypatch: Any, stream: bool) -> None:
    folder, cache = tmp_path / "data", tmp_path / "cache"
    write_lines(folder / "train.jsonl", pairs(40)[:30])
    test = write_lines(folder / "test.jsonl", pairs(40)[30:])
    (tmp_path / "link.jsonl").symlink_to(test)
    if stream:
        monkeypatch.setattr(training_data, "STREAM_BYTES", 0)
    whole = opened(folder, tokenizer, cache)
    assert "learned like the others, though named as if made to score: test.jsonl; give --eval-data" in whole.summary
    for eval_data in (test, tmp_path / "link.jsonl"):
        found = opened(folder, tokenizer, cache, eval_data=eval_data)
        assert len(found.blocks.block(0, 0)) == 30 and len(found.held) == 10
        assert not set(texts(tokenizer, found.blocks.block(0, 0))) & set(texts(tokenizer, found.held))
        assert "not learned, since --eval-data names them: test.jsonl" in found.summary
        assert "named as if" not in found.summary
        assert ("encoded before" in found.summary) == (not stream and eval_data != test)
    for same in (folder, folder / "test.jsonl"):
        with pytest.raises(DataError, match="--data and --eval-data name the same files"):
            opened(same, tokenizer, cache, eval_data=same)


def test_rows_that_name_splits_may_be_learned_and_scored_of_the_same_files(tokenizer: Any, tmp_path: Path) -> None:
    rows = [{**row, "split": "eval" if i % 4 == 0 else "train"} for i, row in enumerate(pairs(40))]
    path = write_lines(tmp_path / "data" / "valid.jsonl", rows)
    write_lines(tmp_path / "data" / "other.jsonl", [{**row, "split": "train"} for row in rows[:1]])
    found = opened(path, tokenizer, tmp_path / "cache", eval_data=path)
    assert (len(found.blocks.block(0, 0)), len(found.held)) == (30, 10)
    assert "named as if" not in opened(tmp_path / "data", tokenizer, tmp_path / "cache").summary
    with pytest.raises(DataError, match="name the same files"):
        opened(path, tokenizer, tmp_path / "cache", eval_data=path, eval_split="train")


def test_records_that_are_scored_are_not_learned(tokenizer: Any, tmp_path: Path) -> None:
    """By the prompt, whatever the answer; by the key, but for numbers, by which the rows of any file are counted."""
    rows = [{"id": i, **row} for i, row in enumerate(pairs(40))]
    named = [{"id": f"doc {i}", "text": f"text {i}"} for i in range(10)]
    path = write_lines(tmp_path / "rows.jsonl", [*rows, *named])
    scored = [{"id": i, "prompt": row["prompt"], "completion": "other"} for i, row in enumerate(rows[30:])]
    asked = write_lines(tmp_path / "asked.jsonl", [*scored, {"id": "doc 7", "text": "edited"}])
    for _ in range(2):
        found = opened(path, tokenizer, tmp_path / "cache", eval_data=asked)
        learned = texts(tokenizer, found.blocks.block(0, 0))
        assert len(learned) == 39 and len(found.held) == 11 and not any("text 7" in text for text in learned)
        assert "data: 11 records left out, since --eval-data has them, too" in found.summary
    assert "encoded before" in found.summary
    write_lines(asked, [*scored[:9], {"id": "doc 7", "text": "edited"}])
    fewer = opened(path, tokenizer, tmp_path / "cache", eval_data=asked)
    assert len(fewer.blocks.block(0, 0)) == 40 and "encoded before" not in fewer.summary
    copy = write_lines(tmp_path / "copy.jsonl", [*rows, *named])
    with pytest.raises(DataError, match="--eval-data has all of its records"):
        opened(path, tokenizer, tmp_path / "cache", eval_data=copy)


def test_names_of_files_are_looked_at_word_by_word(tokenizer: Any, tmp_path: Path) -> None:
    names = ("train", "latest", "developer", "a/test-00000-of-00001", "my_dev", "Validation", "evals", "eval.old")
    for number, name in enumerate(names):
        write_lines(tmp_path / "data" / f"{name}.jsonl", pairs(20)[number : number + 1])
    (said,) = (
        line
        for line in opened(tmp_path / "data", tokenizer, tmp_path / "cache").summary.splitlines()
        if "as if" in line
    )
    assert "to score: Validation.jsonl, a/test-00000-of-00001.jsonl, eval.old.jsonl, my_dev.jsonl;" in said
    everything = opened(tmp_path / "data" / "a", tokenizer, tmp_path / "cache")
    assert "as if" not in everything.summary


@pytest.mark.parametrize(("rows", "few"), [(5, True), (200, True), (2000, False)])
def test_too_few_held_out_documents_are_called_that(tokenizer: Any, tmp_path: Path, rows: int, few: bool) -> None:
    path = write_lines(tmp_path / "rows.jsonl", pairs(rows))
    assert ("too few to tell" in opened(path, tokenizer, tmp_path / "cache").summary) == few
    assert "too few" not in opened(path, tokenizer, tmp_path / "cache", hold_out=0.0).summary


def test_a_dataset_of_the_hub(tokenizer: Any, tmp_path: Path, hub: Any) -> None:  # noqa: F811
    found = opened("owner/set", tokenizer, tmp_path / "cache", block_rows=8, hold_out=0.0)
    assert "revision 0123456789" in found.summary and "licence mit" in found.summary and found.held is None
    batches = PackedBatches(found.blocks, seq_len=64, batch_size=1, pad_id=0, seed=0)
    seen: list[str] = []
    while batches.epoch == 0:
        seen += tokenizer.decode(next(batches).input_ids[0].tolist()).split("question ")[1:]
    assert {s.split("<")[0] for s in seen} == {str(i) for i in range(30)}
    scored = opened("owner/set", tokenizer, tmp_path / "cache", eval_data="owner/set:other", eval_split="train")
    assert scored.held is not None and len(scored.held) == 30
    with pytest.raises(DataError, match="--data and --eval-data name the split train"):
        opened("owner/set", tokenizer, tmp_path / "cache", eval_data="owner/set@main", eval_split="train")
    with pytest.raises(DataError, match="Bad split"):
        opened("owner/set", tokenizer, tmp_path / "cache", eval_data="owner/set", eval_split="test")


def test_a_revision_that_was_opened_can_be_opened_again(
    tokenizer: Any,
    tmp_path: Path,
    hub: Any,  # noqa: F811
    monkeypatch: Any,
) -> None:
    import huggingface_hub

    head = ["a" * 40]

    def info(self: Any, name: str, revision: str | None = None) -> Any:
        return SimpleNamespace(sha=revision or head[0], card_data=None)

    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", info)

    def run(data: str, eval_data: str | None = None, **more: Any) -> tuple[Any, set[str]]:
        settings = DataSettings(hold_out=0.0, eval_split="train")
        hub.clear()
        return open_data(data, eval_data, tokenizer, 64, settings, **more), {load["revision"] for load in hub}

    first, asked = run("owner/set", "owner/other")
    assert asked == {"a" * 40} and first.revisions == dict.fromkeys(("owner/set", "owner/other"), "a" * 40)
    head[0] = "b" * 40
    later, asked = run("owner/set", "owner/other", revisions=first.revisions)
    assert asked == {"a" * 40} and later.revisions == first.revisions
    assert later.blocks.fingerprint == first.blocks.fingerprint
    moved, asked = run("owner/set", "owner/other")
    assert asked == {"b" * 40} and moved.blocks.fingerprint != first.blocks.fingerprint
    _, asked = run("owner/set@" + "c" * 40, revisions=first.revisions)
    assert asked == {"c" * 40}
    _, asked = run("owner/set@main", revisions={"owner/set@main": "d" * 40})
    assert asked == {"d" * 40}, "a branch moves, too"


def test_revisions_of_a_run(tmp_path: Path) -> None:
    assert training_data.revisions_of(tmp_path) == {}
    for text, found in (("{", {}), ("[]", {}), ("{}", {}), ('{"revisions": {"a/b": "c"}}', {"a/b": "c"})):
        (tmp_path / "config.json").write_text(text)
        assert training_data.revisions_of(tmp_path) == found


def test_settings_are_checked() -> None:
    for changes in ({"hold_out": 1.0}, {"max_bad_share": -0.1}, {"block_rows": 0}, {"limit": 0}):
        with pytest.raises(ValueError, match="expected"):
            DataSettings(**changes)  # type: ignore[arg-type]


@pytest.mark.parametrize("stream", [False, True])
def test_a_limit_is_of_all_rows_that_are_read(tokenizer: Any, tmp_path: Path, monkeypatch: Any, stream: bool) -> None:
    if stream:
        monkeypatch.setattr(training_data, "STREAM_BYTES", 0)
    write_lines(tmp_path / "data" / "a.jsonl", [*pairs(20), b"\n"])
    write_lines(tmp_path / "data" / "b.jsonl", pairs(40)[20:])
    for limit, wanted in ((None, 40), (25, 25), (5, 5)):
        found = opened(tmp_path / "data", tokenizer, tmp_path / "cache", limit=limit, hold_out=0.0)
        learned = texts(tokenizer, found.blocks.block(0, 0))
        assert len(learned) == wanted and f"question {wanted - 1}<" in learned[-1]
    splits = [{**row, "split": "eval" if i % 4 == 0 else "train"} for i, row in enumerate(pairs(40))]
    path = write_lines(tmp_path / "rows.jsonl", splits)
    limited = opened(path, tokenizer, tmp_path / "cache", limit=8)
    assert (len(limited.blocks.block(0, 0)), len(limited.held)) == (6, 2)


def test_shards_refuse_what_was_settled_when_they_were_made(tokenizer: Any, tmp_path: Path) -> None:
    path = write_lines(tmp_path / "rows.jsonl", pairs(300))
    materialize(FileRows(path), tokenizer, "tiny", ShardPlan(valid=0.1), tmp_path / "shards")
    for changes in ({"last_turn_only": True}, {"hold_out": 0.0}, {"split": "x"}, {"eval_split": "x"}, {"limit": 5}):
        (name,) = changes
        with pytest.raises(DataError, match=f"whose documents and splits are settled: got --{name.replace('_', '-')},"):
            opened(tmp_path / "shards", tokenizer, tmp_path / "cache", **changes)
    with pytest.raises(DataError, match="got --split, --limit, expected none"):
        opened(tmp_path / "shards", tokenizer, tmp_path / "cache", split="x", limit=5)
    rows = [{**row, "split": "x" if i % 2 else "y"} for i, row in enumerate(pairs(40))]
    scored = write_lines(tmp_path / "scored.jsonl", rows)
    found = opened(tmp_path / "shards", tokenizer, tmp_path / "cache", eval_data=scored, eval_split="x")
    assert len(found.held) == 20


def test_conversations_that_the_template_cannot_hold_are_bad_rows(tmp_path: Path, monkeypatch: Any) -> None:
    tokenizer = build_tokenizer(ALTERNATE)
    rows: list[Any] = pairs(300)
    keys = [prompt_key(dialogue(row["prompt"], "a")) for row in rows]
    held = next(i for i, key in enumerate(keys) if drawn(key, 0.02))
    for at, part in ((held, "held out"), (next(i for i, key in enumerate(keys) if not drawn(key, 0.02)), "data")):
        changed = [*rows[:at], twice_answered(rows[at]["prompt"]), *rows[at + 1 :]]
        path = write_lines(tmp_path / "rows.jsonl", changed)
        found = opened(path, tokenizer, tmp_path / "cache")
        assert len(found.blocks.block(0, 0)) + len(found.held) == 299
        assert f"{part}: 1 bad rows\n{part}:   {path}:{at + 1}: the chat template refuses" in found.summary
        with pytest.raises(DataError, match="1 of 300 rows are bad"):
            opened(path, tokenizer, tmp_path / "cache", max_bad_share=0.003)
        with pytest.raises(DataError, match=f"bad row: .*:{at + 1}: the chat template"):
            opened(path, tokenizer, tmp_path / "cache", strict=True)
    with pytest.raises(DataError, match="1 of 300 rows are bad"):
        opened(write_lines(tmp_path / "x.jsonl", pairs(9)), tokenizer, tmp_path, eval_data=path, max_bad_share=0.003)
    monkeypatch.setattr(training_data, "STREAM_BYTES", 0)
    stream = opened(path, tokenizer, tmp_path / "cache")
    assert len(stream.blocks.block(0, 0)) + len(stream.held) == 299


def test_strict_and_the_share_of_bad_rows_reach_the_reader(tokenizer: Any, tmp_path: Path) -> None:
    rows: list[Any] = pairs(300)
    rows[5] = {"prompt": "x"}
    path = write_lines(tmp_path / "rows.jsonl", rows)
    assert "1 bad rows" in opened(path, tokenizer, tmp_path / "cache").summary
    with pytest.raises(DataError, match="bad row"):
        opened(path, tokenizer, tmp_path / "cache", strict=True)
    with pytest.raises(DataError, match="allow a larger share"):
        opened(path, tokenizer, tmp_path / "cache", max_bad_share=0.001)

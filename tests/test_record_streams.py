"""record_streams: what names a source, streams in blocks, fetching ahead, and what goes wrong on the way."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from data_tools import ALTERNATE, CHATML, build_tokenizer, twice_answered, write_lines

import record_streams
from answer_masks import EncodedSet
from packed_batches import PackedBatches, WorkerShare
from record_streams import DatasetId, FileRows, HubRows, Prefetched, ReadFailed, StreamBlocks, parse_source
from text_records import DataError, Row, drawn

REVISION = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return build_tokenizer(CHATML)


def pairs(count: int) -> list[dict[str, str]]:
    return [{"prompt": f"question {i}", "completion": f"answer {i} " * (1 + i % 5)} for i in range(count)]


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A hub of one dataset: three files of ten rows, read by the library itself from this machine."""
    import datasets
    import huggingface_hub

    files = [write_lines(tmp_path / f"part{n}.jsonl", pairs(30)[10 * n : 10 * n + 10]) for n in range(3)]
    library, asked = datasets.load_dataset, []

    def load(name: str, config: str | None, **options: Any) -> Any:
        asked.append({"name": name, "config": config, **options})
        if options["split"] != "train":
            raise ValueError(f"Bad split: {options['split']}. Available splits: ['train']")
        paths = [str(f) for f in files]
        return library("json", data_files={"train": paths}, split="train", streaming=options["streaming"])

    def info(self: Any, name: str, revision: str | None = None) -> Any:
        if name != "owner/set":
            raise OSError("404: no such dataset")
        return SimpleNamespace(sha=REVISION, card_data={"license": "mit"})

    monkeypatch.setattr(datasets, "load_dataset", load)
    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", info)
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    return asked


def test_sources(tmp_path: Path) -> None:
    assert parse_source(tmp_path) == tmp_path
    assert parse_source("owner/set") == DatasetId("owner/set")
    assert parse_source("owner/set:config-1.0@refs/pr/1") == DatasetId("owner/set", "config-1.0", "refs/pr/1")
    assert str(DatasetId("a/b", "c", "d")) == "a/b:c@d"
    for text in ("nowhere", "no/such/file", "folder/records.jsonl", "a b/c"):
        with pytest.raises(DataError, match="no such file or folder, and not a dataset id"):
            parse_source(text)


class Unreliable:
    """Rows of a stream that breaks off at a row, the first so many times that it comes to it."""

    name, fingerprint = "unreliable", "0"

    def __init__(self, breaks_at: int, times: int) -> None:
        self.breaks_at, self.times = breaks_at, times
        self.begun: list[int] = []
        self.about: dict[str, Any] = {}

    def rows(self, epoch: int, start: int) -> Iterator[Row]:
        self.begun.append(start)
        for number, value in enumerate(pairs(30)[start:], start + 1):
            if number == self.breaks_at and self.times:
                self.times -= 1
                raise ReadFailed("reading failed: ConnectionError: reset by peer")
            yield Row(self.name, number, value)


@pytest.mark.parametrize(("times", "begun"), [(1, [0, 10]), (3, [0, 10, 10, 10])])
def test_a_read_that_fails_is_tried_again(
    tokenizer: Any, monkeypatch: pytest.MonkeyPatch, times: int, begun: list[int]
) -> None:
    """From the block's first row, and the blocks are those of a stream that does not break."""
    monkeypatch.setattr(record_streams, "_WAITS", (0, 0, 0))
    found = []
    for stream in (Unreliable(17, times), Unreliable(17, 0)):
        blocks = StreamBlocks(stream, tokenizer, seq_len=64, rows_per_block=10)
        found.append([blocks.block(0, n) for n in range(4)])
        assert stream.begun == (begun if stream.breaks_at and len(found) == 1 else [0])
    for block, wanted in zip(*found, strict=True):
        assert (block is None) == (wanted is None)
        assert block is None or wanted is None or block.fingerprint == wanted.fingerprint


def test_a_read_that_goes_on_failing_and_one_that_never_worked_are_errors(
    tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(record_streams, "_WAITS", (0, 0, 0))
    late, early = Unreliable(17, 99), Unreliable(1, 99)
    blocks = StreamBlocks(late, tokenizer, seq_len=64, rows_per_block=10)
    assert blocks.block(0, 0) is not None
    with pytest.raises(ReadFailed):
        blocks.block(0, 1)
    with pytest.raises(ReadFailed):
        StreamBlocks(early, tokenizer, seq_len=64, rows_per_block=10).block(0, 0)
    assert late.begun == [0, 10, 10, 10] and early.begun == [0]


def test_an_empty_name_is_not_the_present_folder() -> None:
    with pytest.raises(DataError, match="the data have an empty name"):
        parse_source("")
    assert parse_source(".") == Path(".")


def test_hub_rows_are_pinned_and_resume_anywhere(hub: Any) -> None:
    rows = HubRows(DatasetId("owner/set", "tiny"), "train", shuffle=True, seed=3)
    assert rows.about == {
        **{"id": "owner/set", "config": "tiny", "split": "train"},
        **{"revision": REVISION, "licence": "mit"},
    }
    first, second = ([row.value["prompt"] for row in rows.rows(epoch, 0)] for epoch in (0, 1))
    assert hub[0] == {
        **{"name": "owner/set", "config": "tiny", "split": "train"},
        **{"revision": REVISION, "streaming": True},
    }
    assert sorted(first) == sorted(second) == sorted(f"question {i}" for i in range(30))
    orders = {tuple(r.value["prompt"] for r in rows.rows(epoch, 0)) for epoch in range(6)}
    assert len(orders) > 1, "epochs draw the order of files"
    assert [row.value["prompt"] for row in rows.rows(0, 17)] == first[17:]
    assert next(rows.rows(0, 17)).line == 18
    plain = HubRows(DatasetId("owner/set"), "train", shuffle=False)
    assert [r.value["prompt"] for r in plain.rows(0, 0)] == [f"question {i}" for i in range(30)]
    assert plain.fingerprint != rows.fingerprint


def test_hub_refusals(hub: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(DataError, match="owner/other: the hub does not give this dataset: OSError: 404"):
        HubRows(DatasetId("owner/other"), "train", shuffle=False)
    rows = HubRows(DatasetId("owner/set"), "validation", shuffle=False)
    with pytest.raises(DataError, match="reading failed: ValueError: Bad split"):
        next(rows.rows(0, 0))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(DataError, match="HF_HUB_OFFLINE is set"):
        HubRows(DatasetId("owner/set"), "train", shuffle=False)


def stream_of(tmp_path: Path, count: int, tokenizer: Any, **options: Any) -> StreamBlocks:
    path = tmp_path / "rows.jsonl"
    if not path.exists():
        write_lines(path, pairs(count))
    settings = {"seq_len": 64, "rows_per_block": 8, **options}
    return StreamBlocks(FileRows(path), tokenizer, **settings)


def texts(tokenizer: Any, encoded: EncodedSet | None) -> list[str]:
    assert encoded is not None
    return [tokenizer.decode(encoded.document(i).input_ids) for i in range(len(encoded))]


def test_blocks_hold_every_row_once_and_can_be_had_in_any_order(tmp_path: Path, tokenizer: Any) -> None:
    blocks = stream_of(tmp_path, 27, tokenizer)
    inorder = [texts(tokenizer, blocks.block(0, n)) for n in range(4)]
    assert blocks.block(0, 4) is None
    assert [len(part) for part in inorder] == [8, 8, 8, 3]
    assert [t for part in inorder for t in part] == [
        f"<|im_start|>user\nquestion {i}<|im_end|>\n<|im_start|>assistant\n{p['completion']}<|im_end|>\n"
        for i, p in enumerate(pairs(27))
    ]
    assert texts(tokenizer, blocks.block(0, 2)) == inorder[2]
    assert texts(tokenizer, blocks.block(1, 0)) == inorder[0]
    limited = stream_of(tmp_path, 27, tokenizer, limit=10)
    assert len(texts(tokenizer, limited.block(0, 1))) == 2 and limited.block(0, 2) is None
    assert limited.fingerprint != blocks.fingerprint


def test_held_out_records_are_in_no_block(tmp_path: Path, tokenizer: Any) -> None:
    blocks = stream_of(tmp_path, 40, tokenizer, hold_out=0.3)
    records = [blocks.parts(0, n) for n in range(5)]
    held = [key for parts in records if parts for found in parts for key in found.keys if drawn(key, 0.3)]
    assert held == [key for parts in records if parts for key in parts[1].keys]
    assert 4 <= len(held) <= 20
    again = stream_of(tmp_path, 40, tokenizer, hold_out=0.3)
    learned = [t for n in range(5) for t in texts(tokenizer, again.block(0, n))]
    assert len(learned) == 40 - len(held)


def test_bad_rows_are_counted_over_the_whole_stream(tmp_path: Path, tokenizer: Any, caplog: Any) -> None:
    path = tmp_path / "rows.jsonl"
    rows: list[Any] = pairs(40)
    rows[9] = {"prompt": "no answer"}
    write_lines(path, rows)
    blocks = stream_of(tmp_path, 40, tokenizer)
    # One row of eight, but of few rows in all: no reason to stop yet.
    assert len(texts(tokenizer, blocks.block(0, 1))) == 7
    assert "1 bad rows in block 1" in caplog.text and "rows.jsonl:10: missing keys" in caplog.text
    for i in range(20, 31):
        rows[i] = {"prompt": "no answer"}
    write_lines(path, rows)
    blocks = stream_of(tmp_path, 40, tokenizer)
    with pytest.raises(DataError, match=r"bad, expected at most 1\.00%"):
        for n in range(5):
            blocks.block(0, n)
    with pytest.raises(DataError, match=r"bad row: .*rows\.jsonl:10"):
        stream_of(tmp_path, 40, tokenizer, strict=True).block(0, 1)


def test_conversations_that_the_template_cannot_hold_are_bad_rows(tmp_path: Path, caplog: Any) -> None:
    tokenizer = build_tokenizer(ALTERNATE)
    rows: list[Any] = pairs(40)
    rows[9] = twice_answered("q")
    write_lines(tmp_path / "rows.jsonl", rows)
    blocks = stream_of(tmp_path, 40, tokenizer)
    assert [len(texts(tokenizer, blocks.block(0, n))) for n in range(5)] == [8, 7, 8, 8, 8]
    assert "1 bad rows in block 1" in caplog.text and "rows.jsonl:10: the chat template refuses" in caplog.text
    with pytest.raises(DataError, match=r"bad row: .*rows\.jsonl:10: the chat template refuses"):
        stream_of(tmp_path, 40, tokenizer, strict=True).block(0, 1)
    # A block that has no other row ends nothing; one that begins the stream, and many, do.
    write_lines(tmp_path / "rows.jsonl", [*pairs(8), twice_answered("q")])
    blocks = stream_of(tmp_path, 9, tokenizer)
    assert [len(texts(tokenizer, blocks.block(0, n))) for n in range(2)] == [8, 0]
    write_lines(tmp_path / "rows.jsonl", [twice_answered("q")] * 8)
    with pytest.raises(DataError, match=r"^the chat template refuses"):
        stream_of(tmp_path, 8, tokenizer).block(0, 0)
    write_lines(tmp_path / "rows.jsonl", [*pairs(5), *[twice_answered("q")] * 11])
    blocks = stream_of(tmp_path, 16, tokenizer)
    blocks.block(0, 0)
    with pytest.raises(
        DataError, match=r"11 of 16 rows are bad, .* the last: .*rows\.jsonl:16: the chat template refuses"
    ):
        blocks.block(0, 1)


def test_an_epoch_that_drops_much_is_warned_of_once(tmp_path: Path, tokenizer: Any, caplog: Any) -> None:
    rows: list[Any] = pairs(80)
    # One of the 32 records of four blocks is less than one in twenty, three of 56 are more.
    for i in (20, 40, 50, 60, 70):
        rows[i]["prompt"] = "q " * 100
    write_lines(tmp_path / "rows.jsonl", rows)
    blocks = stream_of(tmp_path, 80, tokenizer)

    def warnings(epoch: int, count: int) -> list[str]:
        caplog.clear()
        for n in range(count):
            blocks.block(epoch, n)
        return [r.getMessage() for r in caplog.records]

    assert warnings(0, 4) == []
    (said,) = warnings(0, 10)
    assert said.startswith("data: 3 of 56 records so far in epoch 0 were dropped") and "--seq-len" in said
    assert warnings(0, 10) == [] and len(warnings(1, 10)) == 1


def batches_of(blocks: Any, **changes: Any) -> PackedBatches:
    settings = {"seq_len": 64, "batch_size": 2, "pad_id": 0, "seed": 5, **changes}
    return PackedBatches(blocks, **settings)


def prompts(tokenizer: Any, batch: Any) -> list[str]:
    found = [tokenizer.decode(row.tolist()).split("question ")[1:] for row in batch.input_ids]
    return [part.split("<")[0] for row in found for part in row]


@pytest.mark.parametrize("prefetch", [False, True])
def test_batches_of_a_stream_deal_every_record_once_and_resume_exactly(
    tmp_path: Path, tokenizer: Any, prefetch: bool
) -> None:
    def fresh() -> PackedBatches:
        blocks = stream_of(tmp_path, 50, tokenizer)
        return batches_of(Prefetched(blocks) if prefetch else blocks)

    whole = fresh()
    dealt, states, made = [], [], []
    while whole.epoch < 2:
        states.append(json.loads(json.dumps(whole.state_dict())))
        made.append(next(whole))
        dealt += prompts(tokenizer, made[-1])
    numbers = [str(i) for i in range(50)]
    assert sorted(dealt[:50]) == sorted(dealt[50:100]) == sorted(numbers)
    assert dealt[:50] != dealt[50:100] and dealt[:50] != numbers
    assert {state["block"] for state in states} == set(range(7))
    for place in (0, 3, len(states) // 2, len(states) - 1):
        resumed = fresh()
        resumed.load_state_dict(states[place])
        for expected in made[place : place + 4]:
            assert next(resumed).input_ids.tolist() == expected.input_ids.tolist()


def test_a_stream_that_has_changed_is_refused(tmp_path: Path, tokenizer: Any) -> None:
    batches = batches_of(stream_of(tmp_path, 30, tokenizer))
    while batches.position["block"] < 2:
        next(batches)
    state = batches.state_dict()
    rows: Any = pairs(30)
    rows[17]["completion"] = rows[17]["completion"].replace("a", "b")
    write_lines(tmp_path / "rows.jsonl", rows)
    with pytest.raises(DataError, match="block 2 of epoch 0 has changed"):
        batches_of(stream_of(tmp_path, 30, tokenizer)).load_state_dict(state)


def test_a_shorter_row_in_the_middle_of_a_stream(tmp_path: Path, tokenizer: Any) -> None:
    batches = batches_of(stream_of(tmp_path, 40, tokenizer), batch_size=1)
    seen = [p for _ in range(4) for p in prompts(tokenizer, next(batches))]
    batches.resize(48, 1)
    state = batches.state_dict()
    rest = []
    while batches.epoch == 0:
        rest.append(next(batches))
    assert all(batch.input_ids.shape == (1, 48) for batch in rest)
    dealt = seen + [p for batch in rest for p in prompts(tokenizer, batch)]
    assert sorted(dealt[:40]) == sorted(map(str, range(40)))
    resumed = batches_of(stream_of(tmp_path, 40, tokenizer), batch_size=1)
    resumed.load_state_dict(state)
    assert [next(resumed).input_ids.tolist() for _ in rest] == [b.input_ids.tolist() for b in rest]


@pytest.mark.parametrize("workers", [1, 2, 4])
def test_any_number_of_workers_deals_out_one_order(tmp_path: Path, tokenizer: Any, workers: int) -> None:
    whole = batches_of(stream_of(tmp_path, 50, tokenizer))
    wanted = [next(whole).input_ids.tolist() for _ in range(16)]
    shares = [WorkerShare(batches_of(stream_of(tmp_path, 50, tokenizer)), w, workers) for w in range(workers)]
    got: list[Any] = [None] * 16
    for turn in range(16 // workers):
        for w, share in enumerate(shares):
            got[turn * workers + w] = next(share).input_ids.tolist()
    assert got == wanted
    states = [share.batches.state_dict() for share in shares]
    assert all(state == whole.state_dict() for state in states), "one cursor, whoever saves it"
    with pytest.raises(DataError, match="worker is 2 of 2"):
        WorkerShare(whole, 2, 2)


class SlowBlocks:
    """Blocks that note in which thread they were made, and break behind the second."""

    fingerprint = "slow"

    def __init__(self, inner: StreamBlocks) -> None:
        self.inner = inner
        self.asked: list[tuple[int, int, str]] = []
        self.ready = threading.Event()

    def block(self, epoch: int, number: int) -> EncodedSet | None:
        self.asked.append((epoch, number, threading.current_thread().name))
        if number == 1:
            self.ready.set()
        if number == 2:
            raise DataError("the network is gone")
        return self.inner.block(epoch, number)


def test_the_next_block_is_fetched_ahead_in_one_other_thread(tmp_path: Path, tokenizer: Any) -> None:
    slow = SlowBlocks(stream_of(tmp_path, 50, tokenizer))
    ahead = Prefetched(slow)
    ahead.block(0, 0)
    assert slow.ready.wait(10), "block 1 is begun while block 0 is in use"
    ahead.block(0, 1)
    with pytest.raises(DataError, match="the network is gone"):
        ahead.block(0, 2)
    assert {name for *_, name in slow.asked} == {"data_0"}
    assert [(e, n) for e, n, _ in slow.asked][:3] == [(0, 0), (0, 1), (0, 2)]


def test_a_stream_without_records_is_no_endless_search(tokenizer: Any) -> None:
    class Empty:
        name, about, fingerprint = "empty", dict.fromkeys(("id", "revision")), "0"

        def rows(self, epoch: int, start: int) -> Iterator[Row]:
            return iter([Row("empty", 1, {"prompt": "x"})][start:])

    blocks = StreamBlocks(Empty(), tokenizer, seq_len=64, rows_per_block=8)
    with pytest.raises(DataError, match="no documents in a whole epoch"):
        batches_of(blocks)

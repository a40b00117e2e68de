"""token_shards: a stream made into files that are the same again, split by key, refused when changed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from data_tools import ALTERNATE, CHATML, build_tokenizer, twice_answered, write_lines

from answer_masks import END_OF_DOCUMENT, tokenizer_fingerprint
from packed_batches import PackedBatches
from record_streams import FileRows
from text_records import DataError, drawn
from token_files import read_tokens
from token_shards import MANIFEST, Manifest, ShardBlocks, ShardPlan, _hash_of, materialize
from training_data import DataSettings, open_data

TEXTS = [f"the {i} tale " * (1 + i * 7 % 40) for i in range(300)]


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return build_tokenizer(CHATML)


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    rows = [{"id": f"doc {i}", "text": text} for i, text in enumerate(TEXTS)]
    return write_lines(
        tmp_path_factory.mktemp("rows") / "tales.jsonl", [*rows[:150], {"id": "x", "text": ""}, *rows[150:]]
    )


PLAN = ShardPlan(valid=0.1, shard_tokens=5000)


@pytest.fixture(scope="module")
def folder(rows: Path, tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("shards") / "tales"
    materialize(FileRows(rows), tokenizer, "tiny", PLAN, folder)
    return folder


def test_shards_hold_every_document_whole_on_its_side(folder: Path, tokenizer: Any) -> None:
    manifest = Manifest.read(folder)
    seen: dict[str, list[str]] = {}
    for split, shards in manifest.splits.items():
        seen[split] = []
        for shard in shards:
            encoded, _ = read_tokens(folder / shard.file, shard.sha256)
            assert (len(encoded), encoded.tokens) == (shard.documents, shard.tokens)
            assert shard.tokens <= PLAN.shard_tokens
            for i in range(len(encoded)):
                document = encoded.document(i)
                assert document.input_ids[-1] == tokenizer.convert_tokens_to_ids(END_OF_DOCUMENT)
                assert document.answer == [False] + [True] * (len(document.input_ids) - 1)
                seen[split].append(tokenizer.decode(document.input_ids[:-1]))
    for split, wanted in (("valid", True), ("train", False)):
        assert seen[split] == [t for i, t in enumerate(TEXTS) if drawn(f"doc {i}", 0.1) is wanted]
    assert len(manifest.splits["train"]) > 3 and 10 <= len(seen["valid"]) <= 60
    assert manifest.rows == {"records": 300, "bad": 1, "other_splits": 0, "formats": {"text": 300}}
    assert manifest.source["id"] == "tales.jsonl"
    assert manifest.tokenizer == {"name": "tiny", "sha256": tokenizer_fingerprint(tokenizer)}


def test_making_them_again_gives_the_same_bytes(folder: Path, rows: Path, tokenizer: Any, tmp_path: Path) -> None:
    materialize(FileRows(rows), tokenizer, "tiny", PLAN, tmp_path / "again")
    names = sorted(f.name for f in folder.iterdir())
    assert names == sorted(f.name for f in (tmp_path / "again").iterdir()) and MANIFEST in names
    for name in names:
        assert (folder / name).read_bytes() == (tmp_path / "again" / name).read_bytes(), name
    with pytest.raises(DataError, match="not an empty folder"):
        materialize(FileRows(rows), tokenizer, "tiny", PLAN, tmp_path / "again")


def test_rows_that_name_a_split_are_learned_or_held_out_by_it(tokenizer: Any, tmp_path: Path) -> None:
    """In any order, a few rows at a time; those of a third split are left out."""
    splits = ["train", "eval", "train", "test", "train"]
    lines = [{"text": f"tale {i}", "split": splits[i % 5]} for i in range(3000)]
    path = tmp_path / "split.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    plan = ShardPlan(valid=0.1, split="train", eval_split="eval", shard_tokens=5000)
    manifest = materialize(FileRows(path), tokenizer, "tiny", plan, tmp_path / "shards")
    assert manifest.rows == {"records": 2400, "bad": 0, "other_splits": 600, "formats": {"text": 2400}}
    for name, split in (("train", "train"), ("valid", "eval")):
        sets = [read_tokens(tmp_path / "shards" / s.file, s.sha256)[0] for s in manifest.splits[name]]
        found = [tokenizer.decode(e.document(i).input_ids) for e in sets for i in range(len(e))]
        wanted = [line["text"] for line in lines if line["split"] == split]
        assert len(found) == len(wanted) and all(want in text for want, text in zip(wanted, found, strict=True))


def test_the_trainer_reads_them(folder: Path, tokenizer: Any) -> None:
    found = open_data(folder, None, tokenizer, 32, DataSettings(), seed=1)
    batches = PackedBatches(found.blocks, seq_len=32, batch_size=1, pad_id=0, seed=1)
    targets: dict[int, int] = {0: 0, 1: 0}
    while batches.epoch < 1:
        batch = next(batches)
        targets[0] += batch.answer_tokens
    wanted = sum(len(tokenizer(t)["input_ids"]) for i, t in enumerate(TEXTS) if not drawn(f"doc {i}", 0.1))
    # The last batch may be of the next epoch; a text's tokens are targets once each, but for its first.
    assert wanted - 32 <= targets[0] <= wanted + 32
    assert found.held is not None and int(found.held.lengths.max()) <= 32
    orders = [
        [
            ShardBlocks(folder, tuple(Manifest.read(folder).splits["train"]), 32, 1).block(e, n).fingerprint
            for n in (0, 1)
        ]  # type: ignore[union-attr]
        for e in range(4)
    ]
    assert len({tuple(o) for o in orders}) > 1, "each epoch draws the order of shards"


def test_changed_shards_and_manifests_are_refused(folder: Path, tokenizer: Any, tmp_path: Path) -> None:
    import shutil

    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    shard = copy / "train_00000.safetensors"
    data = bytearray(shard.read_bytes())
    data[-3] ^= 1
    shard.write_bytes(bytes(data))
    found = open_data(copy, None, tokenizer, 32, DataSettings(), seed=0)
    with pytest.raises(DataError, match="has changed or is damaged"):
        PackedBatches(found.blocks, seq_len=32, batch_size=1, pad_id=0, seed=0).skip(3000)
    manifest = json.loads((copy / MANIFEST).read_text())

    def refused(message: str, change: Any) -> None:
        """Whoever changes a manifest can also make its hash right."""
        content = json.loads(json.dumps(manifest))
        change(content)
        content["sha256"] = _hash_of({key: value for key, value in content.items() if key != "sha256"})
        (copy / MANIFEST).write_text(json.dumps(content, indent=2, sort_keys=True) + "\n")
        with pytest.raises(DataError, match=message):
            open_data(copy, None, tokenizer, 32, DataSettings(), seed=0)

    refused("names the file '../x'", lambda m: m["splits"]["train"][0].update(file="../x"))
    refused("format 'other'", lambda m: m.update(format="other"))
    refused("not a manifest", lambda m: m.pop("splits"))
    refused("not a manifest", lambda m: m["splits"]["train"].append(7))
    refused("model's tokenizer is another", lambda m: m["tokenizer"].update(sha256="0" * 64))
    refused("no shards of the split train", lambda m: m["splits"].update(train=[]))
    (copy / MANIFEST).write_text("[" * 100_000)
    with pytest.raises(DataError, match="not a manifest"):
        Manifest.read(copy)


def test_every_changed_byte_and_every_cut_of_a_manifest_is_found(folder: Path, tmp_path: Path) -> None:
    data = (folder / MANIFEST).read_bytes()
    for at in range(len(data)):
        changed = bytearray(data)
        changed[at] ^= 1 << at % 8
        for damaged in (changed, data[:at]):
            (tmp_path / MANIFEST).write_bytes(damaged)
            with pytest.raises(DataError):
                Manifest.read(tmp_path)
    (tmp_path / MANIFEST).write_bytes(data)
    assert Manifest.read(tmp_path) == Manifest.read(folder)


def test_what_the_template_cannot_hold_is_counted_as_bad(tmp_path: Path) -> None:
    rows = [{"prompt": f"q {i}", "completion": "a"} for i in range(200)] + [twice_answered("q")]
    path = write_lines(tmp_path / "rows.jsonl", rows)
    manifest = materialize(FileRows(path), build_tokenizer(ALTERNATE), "tiny", PLAN, tmp_path / "out")
    assert (manifest.rows["records"], manifest.rows["bad"]) == (200, 1)


def test_no_record_leaves_no_manifest(tokenizer: Any, tmp_path: Path) -> None:
    empty = write_lines(tmp_path / "rows.jsonl", [{"text": ""}])
    with pytest.raises(DataError, match="no usable record"):
        materialize(FileRows(empty), tokenizer, "tiny", PLAN, tmp_path / "out")
    assert not (tmp_path / "out").exists()

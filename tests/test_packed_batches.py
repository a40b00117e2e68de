"""packed_batches: packing, order, resuming, and rows whose documents do not see each other."""

from __future__ import annotations

import dataclasses
import itertools
import json

import numpy as np
import pytest
import torch
from data_tools import CHATML, LOADERS, SHARED, build_tokenizer
from transformers import Qwen2Config, Qwen2ForCausalLM

import packed_batches as data
from answer_masks import EncodedSet, encode_records
from packed_batches import PackedBatches, evaluation_batches, pack
from text_records import DataError, read_records

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def tiny():
    return build_tokenizer(CHATML)


def random_lengths(count: int, seq_len: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(1, seq_len, count, endpoint=True)


@pytest.mark.parametrize("count", [1, 7, 3000])
def test_pack_holds_every_document_once_and_is_deterministic(count):
    lengths = random_lengths(count, 100)
    rows = pack(lengths, 100, seed=5, epoch=2)
    assert sorted(i for row in rows for i in row) == list(range(count))
    assert max(int(lengths[row].sum()) for row in rows) <= 100
    assert rows == pack(lengths.tolist(), 100, seed=5, epoch=2)
    if count > 7:
        assert rows != pack(lengths, 100, seed=5, epoch=3)
        assert rows != pack(lengths, 100, seed=6, epoch=2)


def test_order_is_pinned():
    # A checkpoint's cursor means these rows: a change of the order must fail here and raise the packing version.
    assert pack([3, 9, 2, 5, 8, 1, 7, 4], 10, seed=1, epoch=0) == [[4, 2], [1], [3, 7, 5], [6, 0]]
    assert pack([3, 9, 2, 5, 8, 1, 7, 4], 10, seed=-1, epoch=1) == [[4, 2], [6, 0], [3, 7, 5], [1]]


def test_all_windows_look_at_one_list_of_lengths(monkeypatch):
    """A new one for every window is quadratic in the number of documents."""
    lists: list[list[int]] = []
    best_fit = data._best_fit
    monkeypatch.setattr(
        data, "_best_fit", lambda part, lengths, size: lists.append(lengths) or best_fit(part, lengths, size)
    )
    pack(random_lengths(5000, 64), 64, 3, 1)
    assert len(lists) == 5 and all(lengths is lists[0] for lengths in lists)


def test_best_fit_prefers_the_tightest_row():
    # 6 and 5 open rows with 4 and 5 free. 4 belongs to the first: in the second it would leave no room for 3 and 2.
    rows = pack([3, 6, 2, 5, 4], 10, seed=0, epoch=0)
    assert sorted(map(sorted, rows)) == [[0, 2, 3], [1, 4]]


def test_packed_order_is_random():
    lengths = np.sort(random_lengths(5000, 64))
    dealt = [i for row in pack(lengths, 64, seed=0, epoch=0) for i in row]
    position = np.empty(5000)
    position[dealt] = np.arange(5000)
    assert abs(np.corrcoef(position, np.arange(5000))[0, 1]) < 0.05
    first, second = ({frozenset(r) for r in pack(lengths, 64, seed=0, epoch=e) if len(r) > 1} for e in (0, 1))
    assert len(first & second) < 0.05 * len(first), "documents must meet other neighbours in the next epoch"


def test_lengths_out_of_range_are_refused():
    for lengths in ([5, 11], [0, 5]):
        for call in (lambda: pack(lengths, 10, 0, 0), lambda: data.pack_in_order(lengths, 10)):  # noqa: B023
            with pytest.raises(DataError, match="expected 1 to 10"):
                call()
    assert pack([], 10, 0, 0) == []


@pytest.mark.parametrize("name", ["qwen2.5", "qwen3"])
def test_fill_on_codealpaca(name):
    tokenizer = LOADERS[name]()
    file = SHARED / "code/new_codealpaca.json"
    if not file.is_file():
        pytest.skip(f"{file} is absent")
    encoded = encode_records(read_records(file).records[:1500], tokenizer, 512, progress=False)
    for epoch in range(3):
        assert data.fill_share(pack(encoded.lengths, 512, 0, epoch), encoded.lengths, 512) >= 0.95


# Batches


def fake_set(lengths, seq_len: int, vocabulary: int = 64, seed: int = 0) -> EncodedSet:
    """Documents of random tokens in which about half the tokens are targets."""
    rng = np.random.default_rng(seed)
    starts = np.cumsum([0, *lengths], dtype=np.int64)
    answer = rng.random(starts[-1]) < 0.5
    answer[starts[:-1]] = False
    ids = rng.integers(0, vocabulary, starts[-1]).astype(np.int32)
    record = np.arange(len(lengths), dtype=np.int64)
    return EncodedSet(ids, answer, starts, record, seq_len, cut=0, dropped=0, split_texts=0)


def documents_of(batch: data.Batch, pad_id: int) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    """(ids, labels) of each document of a batch, told apart by the restarts of its positions; no padding."""
    found = []
    for ids, labels, positions in zip(batch.input_ids, batch.labels, batch.position_ids, strict=True):
        borders = [*(positions == 0).nonzero().flatten().tolist(), len(positions)]
        for start, stop in itertools.pairwise(borders):
            assert positions[start:stop].tolist() == list(range(stop - start))
            piece = tuple(ids[start:stop].tolist())
            if set(piece) == {pad_id}:
                assert stop == len(positions) and set(labels[start:stop].tolist()) == {-100}
            else:
                found.append((piece, tuple(labels[start:stop].tolist())))
    return found


def documents_in(encoded: EncodedSet) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    parts = [encoded.document(i) for i in range(len(encoded))]
    return [
        (tuple(p.input_ids), tuple(t if a else -100 for t, a in zip(p.input_ids, p.answer, strict=True))) for p in parts
    ]


def same(one: data.Batch, other: data.Batch) -> bool:
    return all(
        torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b
        for a, b in ((getattr(one, f.name), getattr(other, f.name)) for f in dataclasses.fields(data.Batch))
    )


@pytest.mark.parametrize("shuffle", [True, False])
@pytest.mark.parametrize("batch_size", [1, 3])
def test_every_document_once_per_epoch(shuffle, batch_size):
    encoded = fake_set(random_lengths(200, 32), 32)
    batches = PackedBatches(encoded, seq_len=32, batch_size=batch_size, pad_id=99, seed=3, shuffle=shuffle)
    wanted, seen = documents_in(encoded), []
    while len(seen) < 2 * len(wanted):
        batch = next(batches)
        assert batch.input_ids.shape == batch.labels.shape == batch.position_ids.shape == (batch_size, 32)
        assert {t.dtype for t in (batch.input_ids, batch.labels, batch.position_ids)} == {torch.int64}
        found = documents_of(batch, pad_id=99)
        assert batch.documents == len(found)
        assert batch.tokens == sum(len(ids) for ids, _ in found)
        assert batch.answer_tokens == int((batch.labels != -100).sum())
        seen += found
    # Batches run on across the border of epochs, where a batch may hold rows of both.
    assert sorted(seen[: len(wanted)]) == sorted(wanted)
    assert sorted(seen[len(wanted) : 2 * len(wanted)]) == sorted(wanted)
    assert (seen[: len(wanted)] == wanted) is not shuffle
    assert (seen[: len(wanted)] == seen[len(wanted) : 2 * len(wanted)]) is not shuffle


def test_first_token_of_a_document_is_never_a_label():
    encoded = fake_set([4, 4], 8)
    everything = dataclasses.replace(encoded, answer=np.ones(8, dtype=bool))
    batch = next(PackedBatches(everything, seq_len=8, batch_size=1, pad_id=0, seed=0))
    assert (batch.labels[0] == -100).nonzero().flatten().tolist() == [0, 4]
    assert batch.answer_tokens == 6


@pytest.mark.parametrize("taken", [0, 1, 41, 60, 100])
@pytest.mark.parametrize("shuffle", [True, False])
def test_resume_goes_on_with_the_exact_next_batch(taken, shuffle):
    def fresh() -> PackedBatches:
        encoded = fake_set(random_lengths(150, 32), 32)
        return PackedBatches(encoded, seq_len=32, batch_size=2, pad_id=0, seed=7, shuffle=shuffle)

    whole = fresh()
    for _ in range(taken):
        next(whole)
    state = json.loads(json.dumps(whole.state_dict()))
    assert set(state) == {
        *("epoch", "block", "row", "seed", "fingerprint", "content", "seq_len", "batch_size", "earlier")
    }
    if taken <= 41:
        assert (state["epoch"], state["row"]) == (0, 2 * taken)
    else:
        assert state["epoch"] >= 1, "this case is meant to lie behind the first epoch"
    resumed = fresh()
    next(resumed)
    resumed.load_state_dict(state)
    for expected, got in itertools.islice(zip(whole, resumed, strict=True), 60):
        assert same(expected, got)
    assert resumed.state_dict() == whole.state_dict() != state


def test_resume_at_the_very_end_of_an_epoch():
    encoded = fake_set(random_lengths(40, 32), 32)
    whole, resumed = (PackedBatches(encoded, seq_len=32, batch_size=1, pad_id=0, seed=7) for _ in range(2))
    for _ in range(whole.rows_in_block):
        next(whole)
    resumed.load_state_dict(whole.state_dict())
    assert same(next(whole), next(resumed))
    assert resumed.state_dict() == whole.state_dict()
    assert (resumed.epoch, resumed.state_dict()["row"]) == (1, 1)


def test_same_seed_same_order_other_seed_other_order():
    encoded = fake_set(random_lengths(150, 32), 32)
    runs = [PackedBatches(encoded, seq_len=32, batch_size=2, pad_id=0, seed=s) for s in (1, 1, 2)]
    first, again, other = ([next(run) for _ in range(50)] for run in runs)
    assert all(map(same, first, again))
    assert not all(map(same, first, other))


def test_state_of_other_data_is_refused():
    encoded = fake_set([5, 6, 7, 8], 16)
    sizes = {"seq_len": 16, "batch_size": 2, "pad_id": 0, "seed": 0}
    state = PackedBatches(encoded, **sizes).state_dict()
    ids, answer = encoded.input_ids.copy(), encoded.answer.copy()
    ids[3] += 1
    answer[3] ^= True
    others = [
        PackedBatches(dataclasses.replace(encoded, input_ids=ids), **sizes),
        PackedBatches(dataclasses.replace(encoded, answer=answer), **sizes),
        PackedBatches(dataclasses.replace(encoded, starts=np.array([0, 6, 11, 18, 26])), **sizes),
        PackedBatches(encoded, **{**sizes, "seq_len": 17}),
        PackedBatches(encoded, **{**sizes, "batch_size": 1}),
        PackedBatches(encoded, **sizes, shuffle=False),
    ]
    for other in others:
        with pytest.raises(DataError, match="fingerprint"):
            other.load_state_dict(state)
    batches = PackedBatches(encoded, **sizes)
    for change, message in (
        ({"seed": 1}, "--seed"),
        ({"row": 99}, "row 99"),
        ({"row": -1}, "row -1"),
        ({"epoch": -1}, "epoch -1"),
        ({"row": None}, "'row' is None"),
        ({"fingerprint": 3}, "'fingerprint' is 3"),
    ):
        with pytest.raises(DataError, match=message):
            batches.load_state_dict({**state, **change})
    assert batches.state_dict() == state, "a refused state must not move the cursor"


def test_shorter_documents_follow_the_rules_of_encoding():
    encoded = fake_set([5, 9, 12, 3], 12)
    answer = encoded.answer.copy()
    answer[5:14] = True  # the second is a text: every token but the first is learned
    answer[[0, 5]] = False
    answer[14:26] = False
    answer[24] = True  # the third is a conversation whose answer begins behind the cut
    answer[1] = True
    answer[27] = True
    encoded = dataclasses.replace(encoded, answer=answer)
    spans = data.shorten(encoded, 5)
    assert spans.origin.tolist() == [0, 1, 1, 3], "a text is split, a conversation without a target left is dropped"
    assert spans.lengths.tolist() == [5, 5, 5, 3]
    assert (spans.start[1], spans.stop[1] - 1, spans.stop[2]) == (5, spans.start[2], 14)
    assert not len(data.shorten(dataclasses.replace(encoded, answer=np.zeros(29, dtype=bool)), 2).start)


class SomeBlocks:
    """Blocks that are there."""

    fingerprint = "some"

    def __init__(self, *blocks: EncodedSet) -> None:
        self.blocks = blocks

    def block(self, epoch: int, number: int) -> EncodedSet | None:
        return self.blocks[number] if number < len(self.blocks) else None


def behind(lengths: list[int], begin: int) -> EncodedSet:
    """Conversations whose answers begin at a token."""
    encoded = fake_set(lengths, 12)
    places = np.concatenate([np.arange(length) for length in lengths])
    return dataclasses.replace(encoded, answer=places >= begin)


def test_a_block_without_a_target_in_shorter_rows_is_passed_over() -> None:
    good, late = behind([8, 8], 2), behind([12], 10)
    batches = PackedBatches(SomeBlocks(good, late, good), seq_len=12, batch_size=1, pad_id=0, seed=0)
    next(batches)
    next(batches)
    batches.resize(8, 1)
    blocks = []
    for _ in range(4):
        blocks.append((next(batches), batches.position["epoch"], batches.position["block"])[1:])
    assert blocks == [(0, 2), (0, 2), (1, 0), (1, 0)]
    # In the middle of such a block the rest of it is passed over, too, and a cursor there can be gone on from.
    batches = PackedBatches(SomeBlocks(late, good), seq_len=12, batch_size=1, pad_id=0, seed=0)
    batches.resize(8, 1)
    state = batches.state_dict()
    again = PackedBatches(SomeBlocks(late, good), seq_len=12, batch_size=1, pad_id=0, seed=0)
    again.load_state_dict(state)
    assert same(next(batches), next(again)) and again.position["block"] == 1
    alone = PackedBatches(late, seq_len=12, batch_size=1, pad_id=0, seed=0)
    alone.resize(8, 1)
    with pytest.raises(DataError, match=r"none of .* documents has a target in 8 tokens"):
        next(alone)


def test_shorten_equals_encoding_at_that_length(tiny):
    records = ["one two three four five six seven eight nine ten " * 3, "short"]
    long = encode_records(records, tiny, 400, progress=False)
    wanted = encode_records(records, tiny, 7, progress=False)
    spans = data.shorten(long, 7)
    got = [long.input_ids[a:b].tolist() for a, b in zip(spans.start, spans.stop, strict=True)]
    assert got == [list(wanted.document(i).input_ids) for i in range(len(wanted))]
    # And the batches are those of documents encoded at that length.
    settings = {"batch_size": 2, "pad_id": 0, "seed": 3}
    cut, short = PackedBatches(long, seq_len=400, **settings), PackedBatches(wanted, seq_len=7, **settings)
    cut.resize(7, 2)
    for _ in range(4):
        assert same(next(cut), next(short))


@pytest.mark.parametrize("shuffle", [True, False])
def test_resize_deals_out_the_rest_of_the_epoch_and_resumes_exactly(shuffle):
    def fresh() -> PackedBatches:
        encoded = fake_set(random_lengths(150, 32), 32)
        return PackedBatches(encoded, seq_len=32, batch_size=2, pad_id=99, seed=7, shuffle=shuffle)

    whole = fresh()
    lengths = whole.encoded.lengths
    dealt = [next(whole) for _ in range(10)]
    whole.resize(24, 2)
    dealt += [next(whole) for _ in range(9)]
    whole.resize(16, 1)
    state = json.loads(json.dumps(whole.state_dict()))
    assert state["earlier"] == [[32, 20], [24, 18]]
    resumed = fresh()
    next(resumed)
    resumed.load_state_dict(state)
    rest = []
    while whole.epoch == 0:
        batch = next(whole)
        assert batch.input_ids.shape == (1, 16)
        assert same(batch, next(resumed))
        rest.append(batch)
    # Every document that fits is seen once in the epoch, whatever the sizes; the last batch begins the next epoch.
    seen = [ids for b in [*dealt, *rest[:-1]] for ids, _ in documents_of(b, pad_id=99)]
    short = [tuple(fresh().encoded.document(i).input_ids) for i in range(150) if lengths[i] <= 16]
    assert sorted(ids for ids in seen if ids in set(short)) == sorted(short)
    for _ in range(40):
        assert same(next(whole), next(resumed))
    with pytest.raises(DataError, match="expected 2 to 32"):
        whole.resize(33, 1)
    # Back to whole rows: the documents are whole again.
    whole.resize(32, 2)
    assert next(whole).input_ids.shape == (2, 32)


def test_sizes_out_of_range_are_refused():
    encoded = fake_set([5, 16], 16)
    good = {"seq_len": 16, "batch_size": 2, "pad_id": 0}
    for change, message in (
        ({"batch_size": 0}, "--batch-size"),
        ({"pad_id": None}, "pad_id"),
        ({"seq_len": 8}, "1 to 8"),
    ):
        with pytest.raises(DataError, match=message):
            PackedBatches(encoded, **{**good, **change}, seed=0)
        with pytest.raises(DataError, match=message):
            evaluation_batches(encoded, **{**good, **change})
    with pytest.raises(DataError, match="no documents"):
        evaluation_batches(fake_set([], 16), **good)


def test_evaluation_batches_are_in_order_and_finite():
    encoded = fake_set(random_lengths(50, 32), 32)
    batches = list(evaluation_batches(encoded, 32, 4, pad_id=99))
    assert [d for batch in batches for d in documents_of(batch, 99)] == documents_in(encoded)
    assert sum(b.answer_tokens for b in batches) == encoded.answer_tokens
    assert sum(b.tokens for b in batches) == encoded.tokens
    assert all(b.input_ids.shape == (4, 32) for b in batches[:-1])
    assert 1 <= batches[-1].input_ids.shape[0] <= 4 and batches[-1].input_ids.shape[1] == 32


# Isolation of packed documents in transformers


@pytest.fixture(scope="module", params=["eager", "sdpa"])
def model(request):
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        # Large enough that attention differs clearly between neighbours, small enough for float32 to agree to 1e-5.
        initializer_range=0.15,
        attn_implementation=request.param,
    )
    return Qwen2ForCausalLM(config)


def worst_difference(model, encoded: EncodedSet, batch: data.Batch, logits: torch.Tensor) -> float:
    alone = {}
    for i in range(len(encoded)):
        ids = encoded.document(i).input_ids
        alone[tuple(ids)] = model(input_ids=torch.tensor([ids]), use_cache=False).logits[0]
    worst, documents = 0.0, 0
    for row, positions in enumerate(batch.position_ids):
        borders = [*(positions == 0).nonzero().flatten().tolist(), len(positions)]
        for start, stop in itertools.pairwise(borders):
            reference = alone.get(tuple(batch.input_ids[row, start:stop].tolist()))
            if reference is not None:
                documents += 1
                worst = max(worst, (logits[row, start:stop] - reference).abs().max().item())
    assert documents == batch.documents
    return worst


@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize("lengths", [[9, 1, 7, 12, 3, 10, 5, 1], [16, 5, 5, 5], [16, 16]])
@pytest.mark.parametrize("batch_size", [1, 2])
@torch.no_grad()
def test_packed_logits_equal_unpacked(model, batch_size, lengths, train):
    model.train(train)
    encoded = fake_set(lengths, 16)
    for batch in itertools.islice(PackedBatches(encoded, seq_len=16, batch_size=batch_size, pad_id=0, seed=1), 4):
        inputs = {"input_ids": batch.input_ids, "position_ids": batch.position_ids}
        logits = model(**inputs, attention_mask=None, use_cache=False).logits
        assert worst_difference(model, encoded, batch, logits) < 1e-5
        if batch.documents > batch_size:
            # The comparison has teeth: with the default cache, documents do see their neighbours.
            assert worst_difference(model, encoded, batch, model(**inputs).logits) > 1e-2


def test_loss_of_a_batch_is_that_of_its_documents_alone(model):
    encoded = fake_set([9, 7, 12, 3, 10, 5], 16)
    (batch,) = evaluation_batches(encoded, 16, 8, pad_id=0)
    with torch.no_grad():
        packed = model(
            input_ids=batch.input_ids, labels=batch.labels, position_ids=batch.position_ids, use_cache=False
        ).loss.item()
        total = 0.0
        for ids, labels in documents_in(encoded):
            logits = model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, :-1]
            total += torch.nn.functional.cross_entropy(logits, torch.tensor(labels[1:]), reduction="sum").item()
    assert packed == pytest.approx(total / encoded.answer_tokens, rel=1e-5)
    assert batch.answer_tokens == encoded.answer_tokens

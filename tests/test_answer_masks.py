"""answer_masks: what of a conversation is learned, and how records become documents.

Masks are checked against an oracle that knows nothing of offsets or templates: the learned runs of tokens, decoded,
must be the answers with their ``<|im_end|>``. Qwen's own tokenizers come from ``../shared/data``; the tests that need
them skip where it is absent, and a small tokenizer built here stands in for the logic.
"""

from __future__ import annotations

import itertools
import json
import random
import unicodedata

import pytest
from data_tools import ALTERNATE, CHATML, END, LOADERS, SHARED, build_tokenizer, dialogue, twice_answered, write_lines
from transformers import Qwen2Tokenizer

import answer_masks as data
from answer_masks import encode_conversation, encode_records, encode_text
from text_records import DataError, read_records

pytestmark = pytest.mark.usefixtures("one_thread")

ODD_ANSWERS = [
    "plain",
    " leading space",
    "\n\n    x",
    "\n",
    ".",
    " ",
    "\ttab\r\nline\n",
    "ends with newlines\n\n",
    "caf\u00e9 \u4f60\u597d \U0001f44d\U0001f3fd e\u0301 \u0958",
    "quotes <|im_end|> and <|im_start|>assistant\nplain<|im_end|>\n and goes on",
    "<|im_start|>assistant\n",
    "<|im_end|>",
    "<|endoftext|>",
    "cut <|im_end",
    "\ue000 private \ue000\ue000",
]


@pytest.fixture(scope="module", params=list(LOADERS))
def tokenizer(request):
    return LOADERS[request.param]()


@pytest.fixture(scope="module")
def tiny():
    return build_tokenizer(CHATML)


def learned_runs(encoded: data.Encoded) -> list[list[int]]:
    """Positions of the learned tokens as runs without a gap."""
    runs: list[list[int]] = []
    for position, learned in enumerate(encoded.answer):
        if learned and position and encoded.answer[position - 1]:
            runs[-1].append(position)
        elif learned:
            runs.append([position])
    return runs


def learned_texts(tokenizer, encoded: data.Encoded) -> list[str]:
    return [
        tokenizer.decode([encoded.input_ids[p] for p in run], skip_special_tokens=False)
        for run in learned_runs(encoded)
    ]


def expected_text(answer: str) -> str:
    # Newlines at the front are stripped by Qwen3's template and share the header's token in the others.
    return unicodedata.normalize("NFC", answer.lstrip("\n")) + END


# Masks


@pytest.mark.parametrize("answer", ODD_ANSWERS)
def test_mask_is_exactly_the_answer(tokenizer, answer):
    # The prompt repeats the answer: a mask that finds it by its text or its ids would hit the prompt too.
    encoded = encode_conversation(tokenizer, [("user", answer + " plain"), ("assistant", answer)])
    (run,) = learned_runs(encoded)
    assert learned_texts(tokenizer, encoded) == [expected_text(answer)]
    assert run[-1] == len(encoded.input_ids) - 2, "only the newline after <|im_end|> may follow the answer"
    rendered = tokenizer.apply_chat_template(
        [{"role": "user", "content": answer + " plain"}, {"role": "assistant", "content": answer}], tokenize=False
    )
    assert encoded.input_ids == tokenizer(rendered, add_special_tokens=False)["input_ids"]


def test_token_that_straddles_the_start_is_not_learned(tiny):
    encoded = encode_conversation(tiny, [("user", "q"), ("assistant", "\n\nplain")])
    first = encoded.answer.index(True)
    assert tiny.decode([encoded.input_ids[first - 1]]) == "\n\n\n"
    assert learned_texts(tiny, encoded) == ["plain" + END]


def test_mask_of_several_turns(tokenizer):
    turns = [("system", "Be brief."), ("user", "one")]
    answers = ["first", " second <|im_end|>\n<|im_start|>assistant\nno", "first", "fourth"]
    for answer in answers:
        turns += [("assistant", answer), ("user", "go on <|im_start|>assistant\nfirst<|im_end|>")]
    turns = turns[:-1]
    encoded = encode_conversation(tokenizer, turns)
    assert learned_texts(tokenizer, encoded) == [expected_text(a) for a in answers]
    last = encode_conversation(tokenizer, turns, last_turn_only=True)
    assert last.input_ids == encoded.input_ids
    assert learned_runs(last) == learned_runs(encoded)[-1:]


def test_mask_with_a_question_left_open(tokenizer):
    encoded = encode_conversation(tokenizer, [("user", "a"), ("assistant", "b"), ("user", "c")])
    assert learned_texts(tokenizer, encoded) == ["b" + END]


@pytest.mark.parametrize("name", ["tiny-think", "qwen3"])
def test_reasoning_is_learned_where_the_template_keeps_it(name):
    tokenizer = LOADERS[name]()
    thinking = "<think>\nplain thought\n</think>\n\nanswer"
    turns = [("user", "a"), ("assistant", thinking), ("user", "b"), ("assistant", thinking)]
    encoded = encode_conversation(tokenizer, turns)
    assert learned_texts(tokenizer, encoded) == ["answer" + END, thinking + END]
    # An empty think block is the template's, not the answer's.
    encoded = encode_conversation(tokenizer, [("user", "a"), ("assistant", "answer")])
    start = encoded.answer.index(True)
    assert tokenizer.decode(encoded.input_ids[:start]).endswith("<think>\n\n</think>\n\n")


@pytest.mark.parametrize("name", ["qwen2.5", "qwen3"])
@pytest.mark.parametrize("file", ["code/new_codealpaca.json", "chat/alpaca_en_demo.json"])
def test_masks_of_real_records(name, file):
    tokenizer = LOADERS[name]()
    if not (SHARED / file).is_file():
        pytest.skip(f"{SHARED / file} is absent")
    rows = json.loads((SHARED / file).read_text(encoding="utf-8"))
    encoded = encode_records(read_records(SHARED / file).records[:200], tokenizer, 8192, progress=False)
    assert len(encoded) == 200 and encoded.cut == encoded.dropped == 0
    for index, row in enumerate(rows[:200]):
        document = encoded.document(index)
        assert learned_texts(tokenizer, document) == [expected_text(row["output"])]
        prompt = tokenizer.decode(document.input_ids[: document.answer.index(True)])
        assert unicodedata.normalize("NFC", row["instruction"]) in prompt
        assert unicodedata.normalize("NFC", row["input"]) in prompt


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (None, "no chat template"),
        (CHATML.replace("m.content", "m.content + m.content"), "exactly once"),
        (CHATML.replace("m.content", "m.role"), "exactly once"),
        (CHATML.replace("+ '<|im_end|>\\n'", "+ '</s>\\n'"), "expected <|im_end|>"),
        (CHATML.replace("'<|im_start|>' +", "m.content|length|string + '<|im_start|>' +"), "precedes the answer"),
        (CHATML.replace("<|im_end|>\\n'", "<|im_end|>\\n' + m.content|length|string"), "follows the answer"),
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
    ],
)
def test_template_that_hides_the_answer_is_refused(template, message):
    with pytest.raises(DataError) as raised:
        encode_conversation(build_tokenizer(template), [("user", "a"), ("assistant", "bbb")])
    assert message in str(raised.value)


def test_template_that_reorders_answers_is_refused():
    tokenizer = build_tokenizer(CHATML.replace("in messages", "in messages[::-1]"))
    with pytest.raises(DataError, match="out of order"):
        encode_conversation(tokenizer, [("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d")])


def test_conversation_without_answer_and_tokenizer_without_end_of_turn_are_refused(tiny):
    with pytest.raises(DataError, match="no message of the assistant"):
        encode_conversation(tiny, [("user", "a")])
    other = Qwen2Tokenizer(vocab=tiny.get_vocab(), merges=[], unk_token=None, eos_token="<|endoftext|>")
    other.chat_template = CHATML
    if END in other.added_tokens_encoder:
        pytest.fail("this tokenizer was meant to lack <|im_end|>")
    with pytest.raises(DataError, match="as one token"):
        encode_conversation(other, [("user", "a"), ("assistant", "b")])


# Encoding of sets


def test_text_is_learned_whole_and_ends(tokenizer):
    encoded = encode_text(tokenizer, "Once upon a time.\n")
    assert tokenizer.decode(encoded.input_ids) == "Once upon a time.\n<|endoftext|>"
    assert all(encoded.answer)
    assert encoded.input_ids[-1] == tokenizer.convert_tokens_to_ids("<|endoftext|>")


def test_set_equals_its_records_one_by_one(tiny, monkeypatch):
    monkeypatch.setattr(data, "_CHUNK", 3)
    records = [f"text {i}" if i % 3 == 1 else dialogue(f"question {i}", f"answer {i}" * i) for i in range(1, 12)]
    encoded = encode_records(records, tiny, 512, progress=False)
    assert encoded.record.tolist() == list(range(11))
    for index, record in enumerate(records):
        alone = encode_text(tiny, record) if isinstance(record, str) else encode_conversation(tiny, record.messages)
        assert encoded.document(index).input_ids == alone.input_ids
        # Nothing precedes the first token: it is no target in a set.
        assert encoded.document(index).answer == [False, *alone.answer[1:]]


def test_long_conversations_are_cut_and_dropped_with_counts(tiny):
    short, long_answer, long_prompt = dialogue("q", "a"), dialogue("q", "b " * 50), dialogue("q " * 50, "c")
    whole = encode_conversation(tiny, long_answer.messages)
    prompt = whole.answer.index(True)
    seq_len = prompt + 7
    assert len(encode_conversation(tiny, short.messages).input_ids) <= seq_len
    encoded = encode_records([short, long_answer, long_prompt, short], tiny, seq_len, progress=False)
    assert (encoded.cut, encoded.dropped, len(encoded)) == (2, 1, 3)
    assert encoded.record.tolist() == [0, 1, 3]
    assert encoded.document(1).input_ids == whole.input_ids[:seq_len]
    assert encoded.document(1).answer == [False] * prompt + [True] * 7
    # A cut that leaves the prompt alone leaves nothing to learn.
    assert encode_records(["text", long_answer], tiny, prompt, progress=False).dropped == 1
    with pytest.raises(DataError, match="--seq-len"):
        encode_records([long_prompt], tiny, seq_len, progress=False)
    with pytest.raises(DataError, match="at least 2"):
        encode_records([short], tiny, 1, progress=False)


@pytest.mark.parametrize("tokens", [2, 15, 16, 17, 31, 32, 46, 47, 100])
def test_long_text_is_split_with_every_target_once(tiny, tokens):
    text = "0 " * (tokens // 2)
    text = text[: tokens - 1]  # byte-level digits and single spaces: one token per character
    whole = encode_text(tiny, text).input_ids
    encoded = encode_records([text], tiny, 16, progress=False)
    pieces = [encoded.document(i) for i in range(len(encoded))]
    assert all(2 <= len(p.input_ids) <= 16 for p in pieces)
    assert [t for p in pieces for t, a in zip(p.input_ids, p.answer, strict=True) if a] == whole[1:]
    for before, after in itertools.pairwise(pieces):
        assert after.input_ids[0] == before.input_ids[-1]
    assert encoded.split_texts == (len(whole) > 16)
    assert encoded.cut == encoded.dropped == 0
    assert encoded.answer_tokens == len(whole) - 1


WILD = (
    "def f(x):\n    return x\r\n\r\n\n  \u00e9 n\u0303 \u4f60\u597d\u3002 it's 1234 5 --- !!\t\ttabs   \n"
    "end<|im_end|> of\n\n\nlines \U0001f600\n\u0301x"
)


def test_a_text_in_pieces_has_the_tokens_of_the_whole(tokenizer, monkeypatch):
    chance = random.Random(0)
    words = [*WILD.split(" "), *WILD.split("\n"), "\n", "\n\n", " ", "word", "Words", "x1"]
    texts = ["".join(chance.choice(words) + chance.choice(["", " ", "\n"]) for _ in range(900)) for _ in range(6)]
    whole = [encode_text(tokenizer, text) for text in texts]
    monkeypatch.setattr(data, "_CHARACTERS", 300)
    monkeypatch.setattr(data, "_AROUND", 60)
    for text, wanted in zip(texts, whole, strict=True):
        pieces = list(data._pieces(tokenizer, text))
        assert "".join(pieces) == text and len(pieces) > 5 and max(map(len, pieces)) <= 900
        assert encode_text(tokenizer, text) == wanted
    encoded = encode_records(texts, tokenizer, 10**6, progress=False)
    assert [encoded.document(i).input_ids for i in range(6)] == [w.input_ids for w in whole]


def test_a_text_without_a_border_is_one_piece(tiny, monkeypatch):
    monkeypatch.setattr(data, "_CHARACTERS", 100)
    assert list(data._pieces(tiny, "0" * 1000)) == ["0" * 1000]
    # A tokenizer that puts something before every text has no border anywhere.
    monkeypatch.setattr(data, "_ids_of", lambda tokenizer, texts: [[7, *map(ord, text)] for text in texts])
    assert list(data._pieces(tiny, "a word\n" * 100)) == ["a word\n" * 100]


def test_a_call_of_the_tokenizer_has_so_many_records_and_characters_at_most(monkeypatch):
    monkeypatch.setattr(data, "_CHUNK", 3)
    monkeypatch.setattr(data, "_CHARACTERS", 10)
    items = ["a", "b", "c", "d", "e" * 9, "f" * 20, dialogue("g" * 5, "h" * 4), "i"]
    runs = list(data._chunks(items))
    assert [item for _, run in runs for item in run] == items
    assert [(first, len(run)) for first, run in runs] == [(0, 3), (3, 2), (5, 1), (6, 2)]
    assert list(data._chunks([])) == []


def test_a_conversation_that_the_template_cannot_hold_is_a_bad_row(tmp_path):
    tokenizer = build_tokenizer(ALTERNATE)
    rows = [{"prompt": f"q{i}", "completion": "a"} for i in range(5)]
    file = write_lines(tmp_path / "x.jsonl", [*rows[:2], twice_answered("q"), {"text": "t"}, {}, *rows[2:]])
    records = read_records(file, max_bad_share=0.5)
    encoded = encode_records(records, tokenizer, 64, progress=False, max_bad_share=0.25)
    (bad,) = encoded.refused
    assert (bad.file, bad.line) == (
        str(file),
        3,
    ) and "roles user, assistant, assistant: roles must alternate" in bad.reason
    assert encoded.record.tolist() == [0, 1, 3, 4, 5, 6]
    log = data.describe(records, encoded)
    assert "6 records from" in log and "2 bad rows" in log and f"{file}:3: the chat template refuses" in log
    assert data.EncodedSet.joined([encoded, encoded]).refused == (bad, bad)
    # The row that could not be read counts, too.
    with pytest.raises(DataError, match=r"2 of 8 rows are bad, expected at most 24\.00%"):
        encode_records(records, tokenizer, 64, progress=False, max_bad_share=0.24)
    with pytest.raises(DataError, match=r"bad row: .*x\.jsonl:3: the chat template refuses"):
        encode_records(records, tokenizer, 64, progress=False, max_bad_share=1.0, strict=True)
    with pytest.raises(DataError, match=r"2 of 8 rows are bad, .*: record:2: the chat template refuses"):
        encode_records(records.records[1:5] * 2, tokenizer, 64, progress=False, max_bad_share=0.1)


def test_a_template_that_holds_no_conversation_is_refused_itself(tmp_path):
    tokenizer = build_tokenizer(ALTERNATE)
    file = write_lines(tmp_path / "x.jsonl", [twice_answered("a"), twice_answered("b"), {"text": "t"}])
    with pytest.raises(DataError, match=r"^the chat template refuses"):
        encode_records(read_records(file), tokenizer, 64, progress=False, max_bad_share=1.0)
    # Of records to score nothing may be left: who asked for them says what that means.
    found = encode_records(read_records(file), tokenizer, 64, progress=False, max_bad_share=1.0, may_be_empty=True)
    assert len(found.refused) == 2 and len(found) == 1


def test_describe(tiny, tmp_path):
    rows = [{"prompt": "q", "completion": "a" * n} for n in (1, 2, 300)] + [{"prompt": "q"}]
    file = write_lines(tmp_path / "x.jsonl", rows)
    record_set = read_records(file, max_bad_share=0.5)
    encoded = encode_records(record_set, tiny, 64, progress=False)
    log = data.describe(record_set, encoded)
    for part in (
        "3 records",
        "format prompt/completion",
        f"{encoded.tokens} tokens",
        f"{encoded.answer_tokens} answer tokens",
        "1 records cut at 64 tokens, 0 of them dropped",
        "1 bad rows",
        f"{file}:4: missing keys",
    ):
        assert part in log, log
    assert "columns not used" not in log


def test_describe_names_columns_that_are_not_used(tiny, tmp_path):
    rows = [{"text": "t", "\x1b[2J\nx": 1, **{f"c{n:02}": 1 for n in range(i, 15)}} for i in range(15)]
    record_set = read_records(write_lines(tmp_path / "x.jsonl", rows))
    (line,) = [
        line
        for line in data.describe(record_set, encode_records(record_set, tiny, 64, progress=False)).splitlines()
        if line.startswith("data: columns")
    ]
    names = ", ".join(f"c{n:02}" for n in range(14, 3, -1))
    assert line == f"data: columns not used: \u241b[2J x, {names} and 4 more"

"""qwen_prime_data: reading, answer masks, packing, batches, resuming.

Masks are checked against an oracle that knows nothing of offsets or templates: the learned runs of tokens, decoded,
must be the answers with their ``<|im_end|>``. Qwen's own tokenizers come from ``../shared/data``; the tests that need
them skip where it is absent, and a small tokenizer built here stands in for the logic.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import json
import unicodedata
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import AutoTokenizer, Qwen2Config, Qwen2ForCausalLM, Qwen2Tokenizer
from transformers.models.qwen2.tokenization_qwen2 import PRETOKENIZE_REGEX

import qwen_prime_data as data
from qwen_prime_data import (
    BadRow,
    Conversation,
    DataError,
    EncodedSet,
    PackedBatches,
    encode_conversation,
    encode_records,
    encode_text,
    evaluation_batches,
    pack,
    read_records,
)

SHARED = Path(__file__).parents[2] / "shared" / "data"
END = "<|im_end|>"
SPECIAL = ["<|endoftext|>", "<|im_start|>", END]

CHATML = (
    "{%- for m in messages -%}{{- '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' -}}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}"
)
# Qwen3's treatment of answers: reasoning is split off, kept in the last turn alone, and a last turn has a think block.
THINK = (
    "{%- for m in messages -%}{%- set content = m.content -%}{%- set ns = namespace(reasoning='') -%}"
    "{%- if m.role == 'assistant' and '</think>' in content -%}"
    "{%- set ns.reasoning = content.split('</think>')[0].split('<think>')[-1].strip('\\n') -%}"
    "{%- set content = content.split('</think>')[-1].lstrip('\\n') -%}{%- endif -%}"
    "{{- '<|im_start|>' + m.role + '\\n' -}}"
    "{%- if m.role == 'assistant' and loop.last -%}"
    "{{- '<think>\\n' + ns.reasoning + '\\n</think>\\n\\n' + content.lstrip('\\n') -}}"
    "{%- else -%}{{- content -}}{%- endif -%}{{- '<|im_end|>\\n' -}}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}"
)

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


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def build_tokenizer(template: str | None) -> Qwen2Tokenizer:
    bpe = Tokenizer(models.BPE())
    bpe.normalizer = normalizers.NFC()
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PRETOKENIZE_REGEX), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320, initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()), show_progress=False
    )
    # Runs of newlines become one token, so that an answer beginning with them shares it with the template.
    bpe.train_from_iterator(["user system assistant plain\n\n\n x\n\n\n\n think answer question 0 1 2 3"] * 20, trainer)
    model = json.loads(bpe.to_str())["model"]
    tokenizer = Qwen2Tokenizer(
        vocab=model["vocab"],
        merges=[tuple(m) for m in model["merges"]],
        eos_token=END,
        pad_token="<|endoftext|>",
        unk_token=None,
        additional_special_tokens=SPECIAL,
    )
    tokenizer.chat_template = template
    return tokenizer


@functools.cache
def load_shared(name: str):
    folder = SHARED / "tokenizers" / name
    if not folder.is_dir():
        pytest.skip(f"{folder} is absent")
    return AutoTokenizer.from_pretrained(folder)


LOADERS = {
    "tiny": lambda: build_tokenizer(CHATML),
    "tiny-think": lambda: build_tokenizer(THINK),
    "qwen2.5": lambda: load_shared("qwen2.5-coder"),
    "qwen3": lambda: load_shared("qwen3"),
}


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


# Reading


def dialogue(user: str, answer: str) -> Conversation:
    return Conversation((("user", user), ("assistant", answer)))


def write_lines(file: Path, rows: list) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(b"".join(r if isinstance(r, bytes) else json.dumps(r).encode() + b"\n" for r in rows))
    return file


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
        (tmp_path / "x.csv", "got suffix '.csv', expected one of .json, .jsonl, .txt"),
        (tmp_path / "none.jsonl", "no such file or folder"),
        (tmp_path, "the folder holds none of .json, .jsonl, .txt among its 1 files"),
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


# Packing


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
    assert set(state) == {"epoch", "row", "seed", "fingerprint", "seq_len", "batch_size", "earlier"}
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
    for _ in range(whole.rows_in_epoch):
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
    with pytest.raises(data.DataError, match="no"):
        data.shorten(dataclasses.replace(encoded, answer=np.zeros(29, dtype=bool)), 2)


def test_shorten_equals_encoding_at_that_length(tiny):
    records = ["one two three four five six seven eight nine ten " * 3, "short"]
    long = data.encode_records(records, tiny, 400, progress=False)
    wanted = data.encode_records(records, tiny, 7, progress=False)
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
    with pytest.raises(data.DataError, match="expected 2 to 32"):
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

"""The embedded model and data are what the README says they are."""

from __future__ import annotations

import json
import math
from collections import Counter
from pathlib import Path

import pytest
import stdlib_source
import torch
from safetensors import safe_open
from transformers import AutoTokenizer, Qwen2Tokenizer

from qwen_prime_wrapper import load_model, load_tokenizer

ASSETS = Path(__file__).resolve().parent.parent / "assets"
MODEL = ASSETS / "tiny_coder"
RECORDS = ASSETS / "stdlib_instruct.jsonl"

CONVERSATIONS = [
    [{"role": "user", "content": "hello"}],
    [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "hello"}],
    [
        {"role": "user", "content": " a\n\nb "},
        {"role": "assistant", "content": "def f():\n    pass"},
        {"role": "user", "content": "again"},
    ],
]


def test_tiny_coder_has_the_promised_shape() -> None:
    weights = MODEL / "model.safetensors"
    assert weights.stat().st_size <= 16e6
    config = json.loads((MODEL / "config.json").read_text())
    assert config["model_type"] == "qwen2" and config["tie_word_embeddings"]
    with safe_open(weights, framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    assert 5e6 <= sum(t.numel() for t in tensors.values()) <= 8e6
    assert all(t.dtype == torch.bfloat16 for t in tensors.values())
    assert all(t.shape[1] % 256 == 0 for t in tensors.values() if t.ndim == 2)
    biases = [t for n, t in tensors.items() if n.endswith("_proj.bias")]
    assert len(biases) == 3 * config["num_hidden_layers"] and all(bool((b != 0).any()) for b in biases)
    assert "lm_head.weight" not in tensors


def test_tokenizer_is_qwens_kind_and_round_trips() -> None:
    ours, theirs = load_tokenizer(MODEL), AutoTokenizer.from_pretrained(MODEL)
    assert isinstance(theirs, Qwen2Tokenizer) and len(ours) == len(theirs) == 4096
    for text in ("def f(x):\n    return x + 1\n", "é 日本 \t\n\n  x", "<|im_start|>user\nhi<|im_end|>\n", ""):
        ids = ours(text, add_special_tokens=False)["input_ids"]
        assert ids == theirs(text, add_special_tokens=False)["input_ids"]
        assert ours.decode(ids) == text
    assert len(ours("<|im_end|>")["input_ids"]) == 1


@pytest.mark.parametrize("conversation", CONVERSATIONS)
@pytest.mark.parametrize("prompt", [False, True])
def test_chat_template_renders_as_qwens(conversation: list[dict[str, str]], prompt: bool, shared_data: Path) -> None:
    template = (shared_data / "reference" / "chat_templates" / "Qwen-Qwen2.5-7B-Instruct.jinja").read_text()
    tokenizer = load_tokenizer(MODEL)
    ours = tokenizer.apply_chat_template(conversation, tokenize=False, add_generation_prompt=prompt)
    tokenizer.chat_template = template
    assert ours == tokenizer.apply_chat_template(conversation, tokenize=False, add_generation_prompt=prompt)


def test_recorded_figure_is_the_models() -> None:
    """On this interpreter's library, if it is the one the model was trained on; a sample of the held-out files."""
    record = json.loads((MODEL / "training.json").read_text())
    files = list(stdlib_source.iter_library())
    if stdlib_source.fingerprint(files) != record["library_sha256"]:
        pytest.skip(f"the model was trained on the library of Python {record['python']}, this is another")
    held = [f for f in files if f.held_out]
    assert len(held) == record["held_out_files"]
    sample = [f for f in held if 2000 < len(f.text) < 12000][:12]
    model, tokenizer, _ = load_model(MODEL)
    nats, size = 0.0, 0
    with torch.no_grad():
        for file in sample:
            ids = torch.tensor([tokenizer.eos_token_id, *tokenizer(file.text)["input_ids"]])
            ids[0] = tokenizer.convert_tokens_to_ids("<|endoftext|>")
            for start in range(0, len(ids) - 1, 1024):
                piece = ids[start : start + 1025]
                logits = model(input_ids=piece[None, :-1], use_cache=False).logits[0]
                nats += float(torch.nn.functional.cross_entropy(logits, piece[1:], reduction="sum"))
            size += len(file.text.encode())
    # Twelve files of many: near the recorded figure, far from an untrained model's 2.8 and a zip's 2.
    assert nats / math.log(2) / size < record["bits_per_byte"] + 0.3


def test_records_are_enough_whole_and_split_by_module() -> None:
    rows = [json.loads(line) for line in RECORDS.read_text(encoding="utf-8").splitlines()]
    assert len(rows) >= 5000
    splits = Counter(row["split"] for row in rows)
    assert set(splits) == {"train", "eval"} and splits["eval"] >= 150
    for row in rows:
        assert set(row) == {"instruction", "input", "output", "split", "source"}
        assert all(isinstance(v, str) and v for v in row.values())
        path = row["source"].rsplit(":", 1)[0]
        assert stdlib_source.is_held_out(path) == (row["split"] == "eval")
        compile(row["output"], path, "exec", dont_inherit=True, flags=0x400)  # ast only
    assert len({row["output"] for row in rows}) == len(rows)


def test_licence_notice_stands_beside_the_records() -> None:
    text = (ASSETS / "stdlib_instruct.LICENSE.md").read_text(encoding="utf-8")
    assert "Python Software Foundation" in text and "PSF LICENSE AGREEMENT" in text.upper()


def test_split_depends_on_the_path_alone() -> None:
    share = sum(stdlib_source.is_held_out(f"package/module_{i}.py") for i in range(20_000)) / 20_000
    assert abs(share - 1 / stdlib_source.HELD_OUT_ONE_IN) < 0.006
    assert [stdlib_source.is_held_out(p) for p in ("abc.py", "textwrap.py")] == [
        stdlib_source.is_held_out(p) for p in ("abc.py", "textwrap.py")
    ]

"""For the tests of data: a small tokenizer trained on the spot, Qwen's own where they are, small files."""

from __future__ import annotations

import functools
import json
from pathlib import Path

import pytest
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import AutoTokenizer, Qwen2Tokenizer
from transformers.models.qwen2.tokenization_qwen2 import PRETOKENIZE_REGEX

from text_records import Conversation

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


# Refuses two answers in a row.
ALTERNATE = (
    "{%- for m in messages -%}{%- if not loop.first and m.role == messages[loop.index0 - 1].role -%}"
    "{{- raise_exception('roles must alternate') -}}{%- endif -%}{%- endfor -%}" + CHATML
)


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


def dialogue(user: str, answer: str) -> Conversation:
    return Conversation((("user", user), ("assistant", answer)))


def twice_answered(user: str) -> dict:
    """A row that ``ALTERNATE`` cannot hold."""
    said = [("user", user), ("assistant", "one moment"), ("assistant", "the answer")]
    return {"messages": [{"role": role, "content": content} for role, content in said]}


def write_lines(file: Path, rows: list) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(b"".join(r if isinstance(r, bytes) else json.dumps(r).encode() + b"\n" for r in rows))
    return file

"""Greedy continuations in llama.cpp against the float32 model in transformers, prompt by prompt.

    python assets/compare_llama_cpp.py tiny_coder.pt tiny_coder.gguf --records assets/stdlib_instruct.jsonl
    python assets/compare_llama_cpp.py atto.pt atto.gguf --stories ../shared/data/corpora/tinystories_850.json

llama.cpp tokenizes each prompt itself and takes the likeliest token again and again. Where the two part, the float32
model's lead of its choice over the next best is printed: a lead within the file's rounding is a tie, not a fault.
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import prime_cli  # noqa: E402
from prime_checkpoint import CheckpointError  # noqa: E402
from qwen_prime_wrapper import ModelError, load_model  # noqa: E402


@dataclass(frozen=True)
class CompareConfig:
    """Compare a GGUF file in llama.cpp with the checkpoint that it came from."""

    checkpoint: prime_cli.PositionalPath
    """PRIME .pt file or model folder."""
    gguf: prime_cli.PositionalPath
    """GGUF file of the same model."""
    records: Path | None = None
    """Instruction records (those of split "eval") as prompts, through the chat template."""
    stories: Path | None = None
    """JSON list of texts whose beginnings (60 characters and to the next space) are prompts; the last 150 texts."""
    prompts: int = 100
    """How many prompts."""
    tokens: int = 24
    """Tokens to continue each by."""

    def __post_init__(self) -> None:
        if (self.records is None) == (self.stories is None):
            raise ValueError("give either --records or --stories")


def prompts_of(config: CompareConfig, tokenizer: Any) -> list[str]:
    """The prompts as text."""
    if config.stories is not None:
        texts = json.loads(config.stories.read_text(encoding="utf-8"))[-150:]
        return [text[: text.find(" ", 60)] for text in texts[: config.prompts]]
    assert config.records is not None
    records = [json.loads(line) for line in config.records.read_text(encoding="utf-8").splitlines()]
    tasks = [f"{r['instruction']}\n{r.get('input') or ''}" for r in records if r.get("split", "eval") == "eval"]
    return [
        tokenizer.apply_chat_template([{"role": "user", "content": task}], tokenize=False, add_generation_prompt=True)
        for task in tasks[: config.prompts]
    ]


def main(config: CompareConfig) -> int:
    from llama_cpp import Llama

    model, tokenizer, _ = load_model(config.checkpoint)
    llama = Llama(str(config.gguf), n_ctx=model.config.max_position_embeddings, n_threads=1, verbose=False)
    prompts = prompts_of(config, tokenizer)
    same = alike = 0
    for number, prompt in enumerate(prompts):
        ids = tokenizer(prompt)["input_ids"]
        alike += llama.tokenize(prompt.encode(), add_bos=True, special=True) == ids
        batch = torch.tensor([ids])
        out = model.generate(  # type: ignore[operator]
            batch,
            attention_mask=torch.ones_like(batch),
            max_new_tokens=config.tokens,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
        )
        ours = out[0, len(ids) :].tolist()
        llama.reset()
        theirs: list[int] = []
        for token in llama.generate(ids, temp=0.0, top_k=1, repeat_penalty=1.0):
            theirs.append(token)
            if len(theirs) == config.tokens:
                break
        if theirs == ours:
            same += 1
            continue
        first = next(k for k, (a, b) in enumerate(zip(ours, theirs, strict=True)) if a != b)
        with torch.no_grad():
            top = model(input_ids=torch.tensor([ids + ours[:first]])).logits[0, -1].topk(2).values
        print(
            f"prompt {number}: token {first} differs, lead of the float32 model's choice {float(top[0] - top[1]):.1e}"
        )
    llama.close()
    print(f"{len(prompts)} prompts: {alike} tokenized alike, {same} continued alike for {config.tokens} tokens")
    return 0


if __name__ == "__main__":
    raise SystemExit(prime_cli.run(CompareConfig, main, (CheckpointError, ModelError, ImportError, OSError)))

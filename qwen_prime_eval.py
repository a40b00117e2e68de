"""Score a PRIME checkpoint or a Hugging Face folder on held-out data.

    python qwen_prime_eval.py coder_prime_init.pt --text book.txt
    python qwen_prime_eval.py coder_prime_step_300.pt --data records.jsonl

``--text`` scores a file in windows of the context length that do not overlap: the first token of each window is context
only, every other token is scored, and bits per byte divides by the bytes of the text that the scored tokens stand for.
``--data`` scores the answers of instruction records (those of split "eval" where records carry a split), packed as in
training.
"""

from __future__ import annotations

import json
import logging
import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

import prime_cli
import prime_hf  # noqa: F401  its import registers the plug-in for folders of indices
from prime_checkpoint import CheckpointError
from qwen_prime_data import DataError, describe, encode_records, evaluation_batches, read_records
from qwen_prime_wrapper import ModelError, answer_loss, load_model, mean_answer_loss

log = logging.getLogger("eval")


@dataclass(frozen=True)
class EvalConfig:
    """Score a PRIME checkpoint or a Hugging Face folder on held-out data."""

    model: prime_cli.PositionalPath
    """PRIME .pt file or model folder."""
    text: Path | None = None
    """Plain text to score."""
    data: Path | None = None
    """Instruction records whose answers to score."""
    seq_len: int = 512
    """Tokens in a packed row of --data."""
    batch_size: int = 1
    """Rows scored at a time."""
    json: Path | None = None
    """Also write the result as JSON."""

    def __post_init__(self) -> None:
        if (self.text is None) == (self.data is None):
            raise ValueError("give either --text or --data")
        if self.batch_size < 1 or self.seq_len < 2:
            raise ValueError(f"batch-size is {self.batch_size} and seq-len {self.seq_len}, expected at least 1 and 2")


@torch.no_grad()
def score_text(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, text: str) -> dict[str, Any]:
    """Loss of a text in non-overlapping windows of the model's context."""
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    ids = torch.tensor(encoded["input_ids"], dtype=torch.int64)
    offsets = encoded["offset_mapping"]
    if len(ids) < 2:
        raise DataError(f"the text has {len(ids)} tokens, expected at least 2")
    window = model.config.max_position_embeddings
    nats, tokens, scored_bytes = 0.0, 0, 0
    for start in tqdm(range(0, len(ids), window), desc="score", unit="window", disable=None):
        piece = ids[None, start : start + window].to(model.device)
        if piece.shape[1] < 2:
            continue
        loss, count = answer_loss(model, piece, piece)
        nats += float(loss)
        tokens += count
        scored_bytes += len(text[offsets[start][1] : offsets[start + count][1]].encode())
    mean = nats / tokens
    return {
        "nll_per_token": mean,
        "perplexity": math.exp(min(mean, 700.0)),
        "bits_per_byte": nats / math.log(2) / max(1, scored_bytes),
        "tokens": tokens,
        "bytes": scored_bytes,
        "window": window,
    }


def score_data(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, data: Path, config: EvalConfig
) -> dict[str, Any]:
    """Loss of the answers of instruction records."""
    records = read_records(data, split="eval")
    seq_len = min(config.seq_len, model.config.max_position_embeddings)
    encoded = encode_records(records, tokenizer, seq_len)
    log.info(describe(records, encoded))
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    mean, tokens = mean_answer_loss(model, evaluation_batches(encoded, seq_len, config.batch_size, pad))
    return {
        "nll_per_token": mean,
        "perplexity": math.exp(min(mean, 700.0)),
        "tokens": tokens,
        "records": len(records.records),
        "seq_len": seq_len,
    }


def main(config: EvalConfig) -> int:
    model, tokenizer, kind = load_model(config.model)
    started = time.perf_counter()
    if config.text is not None:
        try:
            text = config.text.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise DataError(f"cannot read {config.text}: {error}") from error
        result = score_text(model, tokenizer, text)
    elif config.data is not None:
        result = score_data(model, tokenizer, config.data, config)
    scored = str(config.text or config.data)
    result = {"model": str(config.model), "kind": kind, "scored": scored, **result}
    result["seconds"] = round(time.perf_counter() - started, 2)
    if config.json:
        config.json.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    for key, value in result.items():
        print(f"{key:14} {value:.6f}" if isinstance(value, float) else f"{key:14} {value}")
    return 0


if __name__ == "__main__":
    raise SystemExit(prime_cli.run(EvalConfig, main, (DataError, ModelError, CheckpointError, OSError)))

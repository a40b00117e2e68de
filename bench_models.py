"""Models and tokens to measure with: real geometries with random weights, and random tokens without end.

Time and memory do not depend on what a model says, except where they do: an index that never leaves the innermost part
of the table is looked up faster than real ones. Weights are therefore Gaussian, as trained ones nearly are.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

import manifolds
from bench_tools import BenchError
from ghost_grid import GhostGrid
from packed_batches import Batch
from prime_quality import to_grid
from qwen_prime_wrapper import assign_tensors, build_model, expected_tensors, load_model, parse_config

_COMMON = {
    "hidden_act": "silu",
    "num_hidden_layers": 28,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1000000.0,
    "tie_word_embeddings": True,
    "vocab_size": 151936,
    "bos_token_id": 151643,
    "eos_token_id": 151645,
    "torch_dtype": "bfloat16",
}
_QWEN2 = {**_COMMON, "model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"]}
GEOMETRIES: dict[str, dict[str, Any]] = {
    "Qwen2.5-Coder-1.5B": {
        **_QWEN2,
        "hidden_size": 1536,
        "intermediate_size": 8960,
        "num_attention_heads": 12,
        "num_key_value_heads": 2,
        "max_position_embeddings": 32768,
    },
    "hundred-million": {
        **_QWEN2,
        "hidden_size": 768,
        "intermediate_size": 2560,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "num_key_value_heads": 4,
        "max_position_embeddings": 2048,
        "vocab_size": 16384,
        "bos_token_id": 0,
        "eos_token_id": 0,
    },
    # Small enough for many measurements, large enough that products outweigh what surrounds them.
    "growing": {
        **_QWEN2,
        "hidden_size": 512,
        "intermediate_size": 1536,
        "num_hidden_layers": 2,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "max_position_embeddings": 2048,
        "vocab_size": 2048,
        "bos_token_id": 0,
        "eos_token_id": 0,
    },
    "toy": {
        **_QWEN2,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "vocab_size": 4096,
        "bos_token_id": 0,
        "eos_token_id": 0,
    },
    "Qwen3-1.7B": {
        **_COMMON,
        "model_type": "qwen3",
        "architectures": ["Qwen3ForCausalLM"],
        "hidden_size": 2048,
        "intermediate_size": 6144,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "max_position_embeddings": 40960,
    },
    "Qwen2.5-7B": {
        **_QWEN2,
        "hidden_size": 3584,
        "intermediate_size": 18944,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "max_position_embeddings": 32768,
        "vocab_size": 152064,
        "tie_word_embeddings": False,
    },
    "Qwen2.5-14B": {
        **_QWEN2,
        "hidden_size": 5120,
        "intermediate_size": 13824,
        "num_hidden_layers": 48,
        "num_attention_heads": 40,
        "num_key_value_heads": 8,
        "max_position_embeddings": 32768,
        "vocab_size": 152064,
        "tie_word_embeddings": False,
    },
}


TINY_CODER = Path(__file__).resolve().parent / "assets" / "tiny_coder"
NAMES = (*GEOMETRIES, "tiny_coder")


def config_of(name: str) -> dict[str, Any]:
    """Content of config.json: a geometry's, or that of the embedded model.

    Raises:
        BenchError: unknown name.
    """
    if name == "tiny_coder":
        return json.loads((TINY_CODER / "config.json").read_text(encoding="utf-8"))
    if name not in GEOMETRIES:
        raise BenchError(f"unknown model {name!r}, expected one of {', '.join(NAMES)}")
    return GEOMETRIES[name]


def ghost_model(name: str, manifold: manifolds.Manifold) -> PreTrainedModel:
    """A model with its weights on a manifold: the embedded one, or a geometry with Gaussian weights."""
    if name == "tiny_coder":
        return to_grid(dense_model(name), config_of(name), manifold)
    return gaussian_model(config_of(name), manifold)


def gaussian_model(config: dict[str, Any], manifold: manifolds.Manifold, device: str = "cpu") -> PreTrainedModel:
    """A model of a config's geometry with Gaussian weights on a manifold; one dense matrix exists at a time. They are
    drawn on the device: each kind has its own."""
    model = build_model(config, manifold)
    manifold = manifold.to(device)
    generator = torch.Generator(device).manual_seed(0)
    tensors: dict[str, torch.Tensor] = {}
    for name, (shape, _) in expected_tensors(model).items():
        if name.endswith(".grid.indices"):
            grid = GhostGrid(shape[0], shape[1], manifold).to(device)
            grid.import_weights(torch.randn(shape, generator=generator, device=device) * 0.02)
            tensors[name], tensors[name.removesuffix("indices") + "scale"] = grid.indices, grid.scale
        elif not name.endswith(".grid.scale"):
            tensors[name] = (torch.ones if "norm" in name else torch.zeros)(shape, device=device)
    assign_tensors(model, tensors, copy=False)
    return model.to(device)  # type: ignore[arg-type]


def dense_model(name: str) -> PreTrainedModel:
    """transformers' own float32 model: the embedded one, or of that geometry with Gaussian weights."""
    if name == "tiny_coder":
        return load_model(TINY_CODER)[0]
    torch.manual_seed(0)
    config = parse_config({**config_of(name), "initializer_range": 0.02}, name)
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="sdpa")


class Endless:
    """Micro-batches of rows of random tokens, each row one document and every position an answer; what a trainer asks
    of its data."""

    def __init__(self, vocabulary: int, tokens: int, rows: int = 1) -> None:
        self.vocabulary, self.tokens = vocabulary, tokens
        self.seq_len, self.batch_size, self.pad_id = tokens, rows, 0
        self.generator = torch.Generator().manual_seed(0)

    def __next__(self) -> Batch:
        rows = self.batch_size
        ids = torch.randint(self.vocabulary, (rows, self.tokens), generator=self.generator)
        places = torch.arange(self.tokens).expand(rows, -1).contiguous()
        return Batch(ids, ids.clone(), places, rows, rows * self.tokens, rows * (self.tokens - 1))

    def state_dict(self) -> dict[str, Any]:
        """Nothing: random tokens need not be dealt out twice."""
        return {}

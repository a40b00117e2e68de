"""Tokens per second of generation: a model of indices, its dense copy, and transformers' own dense model.

All three are the same weights in the same type, write the same number of greedy tokens after the same prompt with
transformers' own ``generate`` and key-value cache, and take turns in one process. The dense copy is what
``qwen_prime_chat.py`` computes with where memory allows; the indices are looked up slice by slice in every forward pass
where it does not. Reading a token is one product of every matrix with a vector, so a dense model is bound by reading
its weights, and looking up indices costs several times what using them does.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

import torch
from transformers import PreTrainedModel

import manifolds
from bench_models import NAMES, config_of, ghost_model
from bench_tools import alternate, machine, print_table, resident_bytes, write_json
from prime_device import has_native_bfloat16
from qwen_prime_wrapper import count_parameters, parse_config, restore_modules

Way = Literal["transformers", "dense copy", "indices"]
WAYS: tuple[Way, ...] = ("transformers", "dense copy", "indices")


@dataclass(frozen=True)
class GenerateBench:
    """Tokens per second of a checkpoint, dense and by indices, beside transformers' dense model of the same type."""

    model: str = "hundred-million"
    """Which model, by name."""
    tokens: int = 16
    """Tokens to write."""
    prompt: int = 32
    """Random tokens before them."""
    rounds: int = 5
    """Rounds; medians are reported."""
    ways: tuple[Way, ...] = WAYS
    """Which models to compare; the largest geometries leave no room for all."""
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """Type of the dense weights; auto is bfloat16 where the processor has it in hardware."""
    json: Path | None = None
    """Also write the result as JSON."""

    def __post_init__(self) -> None:
        if self.model not in NAMES:
            raise ValueError(f"model is {self.model}, expected of {', '.join(NAMES)}")
        for name in ("tokens", "prompt", "rounds"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}, expected at least 1")
        if not self.ways:
            raise ValueError(f"ways has none, expected of {', '.join(WAYS)}")

    @property
    def dtype(self) -> torch.dtype:
        """Type of the dense weights."""
        auto = torch.bfloat16 if has_native_bfloat16("cpu") else torch.float32
        return {"auto": auto, "float32": torch.float32, "bfloat16": torch.bfloat16}[self.precision]


def make_models(config: GenerateBench) -> dict[str, PreTrainedModel]:
    """The same weights as each way has them, in eval mode."""
    made: dict[str, PreTrainedModel] = {}
    for way in config.ways:
        model = ghost_model(config.model, manifolds.build())
        if way != "indices":
            restore_modules(model, config.dtype)
        if way == "transformers":
            # Not the copy itself: a model that transformers has built, with the copy's tensors in it.
            own: Any = type(model)(parse_config(config_of(config.model), config.model))
            own.to(config.dtype).load_state_dict(model.state_dict())
            model = own
        model.generation_config.eos_token_id = None
        made[way] = model.eval()
    return made


@torch.no_grad()
def write_tokens(model: PreTrainedModel, prompt: torch.Tensor, tokens: int) -> torch.Tensor:
    """Exactly so many greedy tokens after a prompt, int64 ``(1, tokens)``."""
    out = cast(Any, model).generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=tokens,
        min_new_tokens=tokens,
        do_sample=False,
        pad_token_id=0,
    )
    return out[:, prompt.shape[1] :]


def bench_generate(config: GenerateBench) -> int:
    """Let each way write, alternating, and print tokens per second."""
    where = machine()
    begun = time.perf_counter()
    models = make_models(config)
    ready = time.perf_counter() - begun
    vocabulary = next(iter(models.values())).config.vocab_size
    prompt = torch.randint(vocabulary, (1, config.prompt), generator=torch.Generator().manual_seed(1))
    written: dict[str, torch.Tensor] = {}

    def writer(way: str) -> Any:
        def write() -> None:
            written[way] = write_tokens(models[way], prompt, config.tokens)

        return write

    times = alternate({way: writer(way) for way in config.ways}, config.rounds)
    base = times.get("transformers")
    first = next(iter(written.values()))
    results = [
        {
            "way": way,
            "tokens_per_s": round(config.tokens / t.median, 2),
            "middle_half": [round(config.tokens / s, 2) for s in reversed(t.spread)],
            "over_transformers": None if base is None else round(base.over(t), 3),
            "same_tokens": bool(torch.equal(written[way], first)),
        }
        for way, t in times.items()
    ]
    columns = ("way", "tokens/s", "middle half", "x transformers", "same tokens")
    rows = [[" to ".join(map(str, v)) if isinstance(v, list) else v for v in line.values()] for line in results]
    print_table(where, columns, rows)
    settings = {
        "model": config.model,
        "parameters": count_parameters(next(iter(models.values()))),
        "dtype": str(config.dtype)[6:],
        "prompt": config.prompt,
        "tokens": config.tokens,
        "rounds": config.rounds,
        "ready_seconds": round(ready, 1),
        "resident_gb": round(resident_bytes() / 1e9, 2),
    }
    print(", ".join(f"{k} {v}" for k, v in settings.items()))
    write_json(config.json, {"machine": where, **settings, "results": results})
    return 0

"""Tiny models for the tests of importer, wrapper and verifier: sources on disk, text to score, measures."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

import qwen_prime_importer as importer
from ghost_core import grids_of
from prime_checkpoint import load_checkpoint, save_checkpoint

VOCABULARY = 272
SPECIAL = ("<|bos|>", "<|im_start|>", "<|im_end|>")


def write_tokenizer(folder: Path) -> None:
    """A byte-level tokenizer without merges: 256 bytes and three special tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({c: i for i, c in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(list(SPECIAL))
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<|bos|>", eos_token="<|im_end|>")
    fast.save_pretrained(folder)


def tiny_config(kind: str = "qwen2", **changes: Any) -> dict[str, Any]:
    """Content of a config.json: two layers, grouped queries; in Qwen3 and Llama head_dim is not hidden / heads."""
    settings: dict[str, Any] = {
        "vocab_size": VOCABULARY,
        "hidden_size": 48,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 128,
        "tie_word_embeddings": True,
        "bos_token_id": 256,
        "eos_token_id": 258,
        **({"head_dim": 16} if kind != "qwen2" else {}),
        **({"attention_bias": True, "mlp_bias": True} if kind == "llama" else {}),
        **changes,
    }
    # Through transformers, so that the file has every field that a saved model's has.
    return CONFIG_MAPPING[kind](**settings).to_dict()


def random_model(hf_config: dict[str, Any], seed: int = 0, spread: float = 0.2) -> PreTrainedModel:
    """transformers' own model with random weights, biases and norms, none at its usual start; float32, eval."""
    model = AutoModelForCausalLM.from_config(CONFIG_MAPPING[hf_config["model_type"]].from_dict(dict(hf_config)))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator) * spread
            parameter.copy_(1 + noise if "norm" in name else noise)
    return model.float().eval()


def write_source(folder: Path, hf_config: dict[str, Any], seed: int = 0, **save: Any) -> Path:
    """A source folder: config, random weights as safetensors, tokenizer. ``save`` goes to save_pretrained."""
    folder.mkdir(parents=True, exist_ok=True)
    model = random_model(hf_config, seed)
    model.save_pretrained(folder, **save)
    write_tokenizer(folder)
    return folder


def rewrite_weights(folder: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    """Change the tensors of a source's single safetensors file."""
    path = folder / "model.safetensors"
    tensors = {name: tensor.clone() for name, tensor in load_file(path).items()}
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


def rewrite_json(path: Path, **changes: Any) -> None:
    """Change or, with None, remove fields of a JSON object."""
    content = {**json.loads(path.read_text(encoding="utf-8")), **changes}
    path.write_text(json.dumps({k: v for k, v in content.items() if v is not None}), encoding="utf-8")


def import_source(source: Path | str, output: Path, **options: Any) -> dict[str, Any]:
    """Run the importer's ``main`` and return its report."""
    report = output.with_suffix(".report.json")
    assert importer.main(importer.ImportConfig(str(source), output, report=report, **options)) == 0
    return json.loads(report.read_text(encoding="utf-8"))


def clone_tree(tree: Any) -> Any:
    """A nested dict or list whose tensors are copies."""
    if isinstance(tree, torch.Tensor):
        return tree.clone()
    if isinstance(tree, dict):
        return {key: clone_tree(value) for key, value in tree.items()}
    return [clone_tree(value) for value in tree] if isinstance(tree, list) else tree


def plant(checkpoint: Path, output: Path, change: Callable[[dict[str, Any]], None]) -> Path:
    """Change a checkpoint's content and write it anew, with every hash right again."""
    content = clone_tree(load_checkpoint(checkpoint))
    change(content)
    save_checkpoint(content, output)
    return output


def dense_twin(model: PreTrainedModel) -> PreTrainedModel:
    """transformers' own model with the dequantized weights of a ghost model."""
    twin = AutoModelForCausalLM.from_config(model.config, dtype=torch.float32)
    weights = {name: parameter.detach() for name, parameter in model.named_parameters()}
    for name, grid in grids_of(model).items():
        weights[name.removesuffix(".grid") + ".weight"] = grid.dequantize()
    missing, unexpected = twin.load_state_dict(weights, strict=False)
    tied = {"lm_head.weight"} if model.config.tie_word_embeddings else set()
    assert set(missing) <= tied and not unexpected
    return twin.eval()


def stories(shared_data: Path) -> tuple[list[str], list[str]]:
    """The TinyStories sample as (to train on, held out)."""
    texts = json.loads((shared_data / "corpora" / "tinystories_850.json").read_text(encoding="utf-8"))
    return texts[:700], texts[700:]


def encode_documents(
    tokenizer: PreTrainedTokenizerFast, texts: Iterable[str], window: int, tokens: int
) -> list[torch.Tensor]:
    """Documents as int64 ``(1, n)``, each cut into pieces of ``window``, until ``tokens`` tokens are there."""
    pieces: list[torch.Tensor] = []
    count = 0
    for text in texts:
        for piece in torch.tensor([tokenizer(text)["input_ids"]]).split(window, dim=1):
            pieces.append(piece)
            count += piece.shape[1]
            if count >= tokens:
                return pieces
    raise AssertionError(f"the texts have {count} tokens, {tokens} are wanted")


@torch.no_grad()
def difference(
    model: PreTrainedModel, source: PreTrainedModel, pieces: Iterable[torch.Tensor]
) -> tuple[float, float, float, int]:
    """Mean KL(source, model), mean loss of the model minus the source's, the source's mean loss, and how many tokens.

    In nats, with float64 log-softmax: what is measured is smaller than float32's rounding of a softmax.
    """
    kl = gap = loss = 0.0
    count = scored = 0
    for piece in pieces:
        p = source(input_ids=piece, use_cache=False).logits[0].double().log_softmax(-1)
        q = model(input_ids=piece, use_cache=False).logits[0].double().log_softmax(-1)
        kl += float((p.exp() * (p - q)).sum())
        targets = piece[0, 1:, None]
        theirs, ours = p[:-1].gather(1, targets), q[:-1].gather(1, targets)
        gap += float((theirs - ours).sum())
        loss -= float(theirs.sum())
        count += len(p)
        scored += len(targets)
    assert math.isfinite(kl)
    return kl / count, gap / scored, loss / scored, count

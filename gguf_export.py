"""A PRIME checkpoint as one GGUF file, for llama.cpp and the tools built on it.

Matrices are F16, BF16 or Q8_0 (blocks of 32 weights of a row with one half-precision scale), norms and biases F32, as
llama.cpp's own converter writes them. The library lays out the file; this module says what goes in: the architecture's
numbers, tensor names, vocabulary, merges, special tokens, chat template.

The format names a pre-tokenizer instead of describing it, and a wrong name tokenizes wrongly without a word. So the
name is found from the tokenizer's own regular expression, and one that has no name is refused. What the format cannot
say at all is the NFC normalization that Qwen tokenizers begin with: text that is not NFC tokenizes differently there.
Any other normalization would change ordinary text, and is refused.
"""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from dense_weights import DenseSource, DenseWeight, ExportError
from qwen_prime_wrapper import parse_config, parse_generation, tokenizer_from_checkpoint
from whole_output import new_file

log = logging.getLogger("export")

ARCHITECTURES = ("qwen2", "qwen3")
TYPES = ("F16", "BF16", "Q8_0")
_BLOCK = 32
"""Weights in a block of Q8_0."""
_WORDS = r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+"
PRE_TOKENIZERS = {
    _CONTRACTIONS + _WORDS: "qwen2",
    _CONTRACTIONS + _WORDS.replace(r"\p{N}|", r"\p{N}{1,3}|", 1): "llama-bpe",
}
"""llama.cpp's name for a tokenizer.json's splitting expression."""


def pre_tokenizer_name(description: dict[str, Any]) -> str:
    """GGUF's name for the pre-tokenizer of a parsed tokenizer.json.

    Raises:
        ExportError: not a byte-level BPE, or split by an expression that the format has no name for.
    """
    model, pre = description["model"], description.get("pre_tokenizer") or {}
    steps = pre["pretokenizers"] if pre.get("type") == "Sequence" else [pre]
    kinds = [step.get("type") for step in steps]
    if model.get("type") != "BPE" or model.get("byte_fallback") or kinds not in (["ByteLevel"], ["Split", "ByteLevel"]):
        raise ExportError(
            f"the tokenizer is {model.get('type')} with pre-tokenizer {kinds}: --to gguf takes byte-level BPE, as "
            "Qwen's is; export --to hf instead"
        )
    if steps[-1].get("add_prefix_space"):
        raise ExportError("the tokenizer puts a space before every text, which GGUF cannot say: export --to hf instead")
    if kinds == ["Split", "ByteLevel"]:
        pattern = steps[0]["pattern"].get("Regex", "")
        if pattern not in PRE_TOKENIZERS or steps[0].get("behavior") != "Isolated" or steps[0].get("invert"):
            raise ExportError(f"the tokenizer splits text by {pattern!r}, which GGUF has no name for: export --to hf")
        return PRE_TOKENIZERS[pattern]
    if steps[0].get("use_regex", True):
        return "gpt-2"
    log.warning(
        "the tokenizer does not split text into words, and GGUF has no name for that: written as qwen2, which splits; "
        "a few texts will tokenize differently"
    )
    return "qwen2"


def check_normalizer(description: dict[str, Any]) -> None:
    """Raise unless a parsed tokenizer.json normalizes text by NFC at most.

    Raises:
        ExportError: it does something else, which GGUF cannot say.
    """
    normalizer = description.get("normalizer") or {"type": "NFC"}
    steps = normalizer["normalizers"] if normalizer["type"] == "Sequence" else [normalizer]
    if odd := [step["type"] for step in steps if step["type"] != "NFC"]:
        raise ExportError(
            f"the tokenizer normalizes text by {odd[0]}, expected NFC or nothing, GGUF cannot say it: export --to hf "
            "instead"
        )


def _vocabulary(description: dict[str, Any], size: int) -> tuple[list[str], list[int]]:
    """Token texts and GGUF token types of ids 0 to ``size`` - 1; ids that the tokenizer lacks are unused."""
    import gguf

    kinds = gguf.TokenType
    by_id = {i: (text, kinds.NORMAL) for text, i in description["model"]["vocab"].items()}
    for added in description["added_tokens"]:
        by_id[added["id"]] = (added["content"], kinds.CONTROL if added["special"] else kinds.USER_DEFINED)
    if max(by_id) >= size:
        raise ExportError(f"the tokenizer has ids up to {max(by_id)}, the model a vocabulary of {size}")
    entries = [by_id.get(i, (f"[PAD{i}]", kinds.UNUSED)) for i in range(size)]
    return [text for text, _ in entries], [int(kind) for _, kind in entries]


def _end_of_answer(source: DenseSource, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The ids at which the model stops, the first being the one to name as end of sequence."""
    generation = parse_generation(source.files.get("generation_config.json", b"{}"), "the checkpoint's")
    for ids in (generation.eos_token_id, source.config.get("eos_token_id"), tokenizer.eos_token_id):
        if ids is not None:
            return [int(i) for i in (ids if isinstance(ids, list) else [ids])]
    return []


def _add_tokenizer(writer: Any, source: DenseSource) -> None:
    tokenizer = tokenizer_from_checkpoint(source.checkpoint)
    description = json.loads(tokenizer.backend_tokenizer.to_str())
    check_normalizer(description)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre_tokenizer_name(description))
    tokens, kinds = _vocabulary(description, source.config["vocab_size"])
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    merges = description["model"]["merges"]
    if not merges:
        log.warning("the tokenizer has no merges: llama.cpp will not open the file, other readers may")
    writer.add_token_merges([merge if isinstance(merge, str) else " ".join(merge) for merge in merges])
    stops = _end_of_answer(source, tokenizer)
    if stops:
        writer.add_eos_token_id(stops[0])
    turn_ends = [i for i, token in enumerate(tokens) if token == "<|im_end|>"]
    if turn_ends:
        writer.add_eot_token_id(turn_ends[0])
    pairs = (
        (writer.add_bos_token_id, tokenizer.bos_token_id, "bos_token_id"),
        (writer.add_pad_token_id, tokenizer.pad_token_id, "pad_token_id"),
    )
    for add, own, key in pairs:
        value = own if own is not None else source.config.get(key)
        if value is not None:
            add(int(value))
    bare = tokenizer("a", add_special_tokens=False)["input_ids"]
    framed = tokenizer("a")["input_ids"]
    writer.add_add_bos_token(len(framed) > len(bare) and framed[0] == tokenizer.bos_token_id)
    writer.add_add_eos_token(len(framed) > len(bare) and framed[-1] == tokenizer.eos_token_id)
    template = tokenizer.chat_template
    if isinstance(template, dict):
        template = template.get("default")
    if template:
        writer.add_chat_template(template)


def _add_architecture(writer: Any, source: DenseSource, kind: str) -> None:
    import gguf

    config: Any = parse_config(source.config, "the checkpoint's config")
    rope = dict(config.rope_parameters or {})
    if rope.get("rope_type", "default") != "default" or getattr(config, "use_sliding_window", False):
        raise ExportError(
            f"the model has rope type {rope.get('rope_type')!r}, sliding window {config.use_sliding_window}: --to gguf "
            "writes default rope and full attention only; export --to hf instead"
        )
    if config.hidden_act != "silu":
        raise ExportError(f"the model's hidden_act is {config.hidden_act!r}, GGUF means silu: export --to hf instead")
    if source.config["model_type"] == "qwen3" and config.attention_bias:
        raise ExportError("the model has attention_bias, which qwen3 has no place for in GGUF: export --to hf instead")
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    writer.add_type("model")
    writer.add_name(str(source.checkpoint["source"].get("id") or source.path.stem).rstrip("/").rsplit("/", 1)[-1])
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(head)
    writer.add_value_length(head)
    writer.add_rope_dimension_count(head)
    writer.add_rope_freq_base(float(rope.get("rope_theta", 10000.0)))
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    files = {"F16": "MOSTLY_F16", "BF16": "MOSTLY_BF16", "Q8_0": "MOSTLY_Q8_0"}
    writer.add_file_type(int(gguf.LlamaFileType[files[kind]]))
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)


def _type_of(weight: DenseWeight, kind: str) -> str:
    """GGUF type of a tensor in a file whose matrices are ``kind``: norms and biases stay exact."""
    return "F32" if weight.scale is None else kind


def _bytes_of(weight: DenseWeight, kind: str) -> np.ndarray:
    """A tensor as GGUF stores it, whole; made from slices."""
    import gguf

    kind = _type_of(weight, kind)
    if kind == "F32":
        parts = [part.numpy() for part in weight.slices()]
    elif kind == "Q8_0":
        limit = 127 * float(np.finfo(np.float16).max)
        parts = []
        for part in weight.slices():
            if float(part.abs().max()) > limit:
                raise ExportError(f"{weight.name} has values beyond {limit:.3g}, the most a block of Q8_0 can scale")
            parts.append(gguf.quants.quantize(part.numpy(), gguf.GGMLQuantizationType.Q8_0))
    elif kind == "BF16":
        parts = [part.view(torch.int16).numpy() for part in weight.slices(torch.bfloat16)]
    else:
        parts = [part.numpy() for part in weight.slices(torch.float16)]
    return parts[0] if len(parts) == 1 else np.concatenate(parts)


def export_gguf(source: DenseSource, output: Path, kind: str, force: bool) -> None:
    """Write the file ``output``; one tensor is in memory at a time.

    Args:
        kind: type of the matrices, one of :data:`TYPES`.

    Raises:
        ExportError: an architecture, tokenizer or width that the format or type does not take, or a value beyond its
            range.
        OutputError: the file exists, or cannot be written; nothing is left behind.
    """
    try:
        import gguf
    except ImportError as error:
        raise ExportError("--to gguf needs the gguf package: pip install gguf==0.19.0") from error
    architecture = source.config["model_type"]
    if architecture not in ARCHITECTURES:
        raise ExportError(f"model_type is {architecture!r}, --to gguf writes {' and '.join(ARCHITECTURES)}")
    for weight in source.weights:
        if kind == "Q8_0" and weight.scale is not None and weight.shape[1] % _BLOCK:
            raise ExportError(
                f"{weight.name} has rows of {weight.shape[1]} weights, Q8_0 needs multiples of {_BLOCK}: choose --type "
                "F16 or BF16"
            )
    logging.getLogger("gguf").setLevel(logging.WARNING)
    numbers = {v: k for k, v in gguf.MODEL_ARCH_NAMES.items()}
    names = gguf.get_tensor_name_map(numbers[architecture], source.config["num_hidden_layers"])
    with new_file(output, force) as temporary:
        writer = gguf.GGUFWriter(temporary, architecture)
        try:
            _add_architecture(writer, source, kind)
            _add_tokenizer(writer, source)
            for weight in source.weights:
                own = gguf.GGMLQuantizationType[_type_of(weight, kind)]
                name = names.get_name(weight.name, try_suffixes=(".weight", ".bias"))
                if name is None:
                    raise ExportError(f"{weight.name} has no place in a {architecture} GGUF file")
                block, size = gguf.GGML_QUANT_SIZES[own]
                nbytes = int(np.prod(weight.shape)) // block * size
                writer.add_tensor_info(name, weight.shape, np.dtype(np.float32), nbytes, own)
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_ti_data_to_file()
            for weight in source.weights:
                writer.write_tensor_data(_bytes_of(weight, kind))
        finally:
            writer.close()

"""transformers' own Qwen2 / Qwen3 model with its linears and embeddings swapped for ghost modules.

The decoder is not written again: attention, rotary embedding, grouped queries, causal masks, cache, generation and chat
template are transformers'. The model is built on the meta device, every ``nn.Linear`` and ``nn.Embedding`` is
replaced by its ghost twin of the same name, and tensors are then assigned from a checkpoint, so nothing is allocated
twice and no weight is initialised at random. A tied head is the embedding's grid: one index tensor, one vote buffer,
two uses.

Norm weights and biases stay float32 parameters. Any architecture made of linears and embeddings works by the same
swap; the list below holds those that are tested.
"""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from huggingface_hub import constants, snapshot_download
from torch import nn
from tqdm import tqdm
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

import manifolds
import packed_attention
from ballots import Ballot
from ghost_core import GhostEmbedding, GhostLinearTandem, ghost_cross_entropy, grids_of, name_grids
from ghost_grid import GhostGrid
from manifolds import Manifold
from momentum_rules import MomentumRule
from packed_checkpoint import open_checkpoint
from prime_checkpoint import CheckpointError, one_line
from prime_pack import is_pack

ARCHITECTURES = {"qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM", "llama": "LlamaForCausalLM"}

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_HUB_FILES = ("*.safetensors", "*.json", "*.txt", "*.jinja")
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.json",
    "merges.txt",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "generation_config.json",
)
"""What a checkpoint keeps of its source besides weights and config, where present."""
INDEX_METHOD = "prime"
"""``quant_method`` in the config.json of a folder of indices (``prime_hf``)."""
TURN_END = "<|im_end|>"
"""What ends a turn in Qwen's templates; base models name another token as their end."""
_LOGIT_ROWS = 512
"""Tokens whose logits a dense head makes at a time: 0.3 GB in float32 for a vocabulary of 151,936."""


_MOST = {
    "vocab_size": 1 << 24,
    "hidden_size": 1 << 20,
    "intermediate_size": 1 << 22,
    "num_hidden_layers": 1 << 12,
    "num_attention_heads": 1 << 16,
    "num_key_value_heads": 1 << 16,
    "head_dim": 1 << 16,
}
"""Far beyond any model. A module is built for every layer, and a list in transformers' config even before."""


class ModelError(RuntimeError):
    """A model, config or tokenizer that this suite cannot use."""


def parse_config(hf_config: dict[str, Any], where: str) -> PreTrainedConfig:
    """transformers' config object from a config.json's content.

    Raises:
        ModelError: architecture not supported, or fields that transformers refuses.
    """
    if not isinstance(hf_config, dict):
        raise ModelError(f"{where} holds a {type(hf_config).__name__}, expected a JSON object")
    kind = hf_config.get("model_type")
    if not isinstance(kind, str) or kind not in ARCHITECTURES:
        raise ModelError(
            f"{where} has model_type {kind!r} ({', '.join(map(str, hf_config.get('architectures') or ['?']))}), "
            f"supported are {', '.join(f'{k} ({v})' for k, v in ARCHITECTURES.items())}"
        )
    quantized = hf_config.get("quantization_config")
    method = quantized.get("quant_method") if isinstance(quantized, dict) else quantized
    if method != INDEX_METHOD and quantized:
        raise ModelError(
            f"{where} has a quantization_config ({str(method)[:40]}): expected a folder of unquantized weights, which "
            "the model that it was made from has"
        )
    for name, most in _MOST.items():
        size = hf_config.get(name)
        if size is not None and (type(size) is not int or not 1 <= size <= most):
            raise ModelError(f"{where} has {name} {str(size)[:40]!r}, expected an integer from 1 to {most:,}")
    try:
        return CONFIG_MAPPING[kind].from_dict(dict(hf_config))
    except Exception as error:
        # Config classes validate with exceptions of many types; the user needs the file and the reason.
        raise ModelError(f"{where}: transformers refuses this config: {one_line(error)}") from error


def build_model(hf_config: dict[str, Any], manifold: Manifold, where: str = "config") -> PreTrainedModel:
    """The model of a config with ghost modules, all tensors on the meta device.

    Args:
        hf_config: content of config.json.
        manifold: shared by all grids.
        where: what to call the config in errors.
    """
    config = parse_config(hf_config, where)
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(
                config, dtype=torch.float32, attn_implementation=packed_attention.NAME
            )
            swap_modules(model, manifold)
        _restore_computed_buffers(model)
    except Exception as error:
        # A config of impossible sizes fails somewhere inside transformers, with whatever error that place raises.
        raise ModelError(
            f"{where}: no model can be built from this config: {type(error).__name__}: {one_line(error)}"
        ) from error
    name_grids(model, Ballot(MomentumRule()))
    return model.eval()


def swap_modules(model: PreTrainedModel, manifold: Manifold) -> None:
    """Replace every ``nn.Linear`` and ``nn.Embedding`` of ``model`` by a ghost module on the current device, empty."""
    tied = bool(getattr(model.config, "tie_word_embeddings", False))
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, nn.Embedding):
                setattr(parent, name, GhostEmbedding(GhostGrid(child.num_embeddings, child.embedding_dim, manifold)))
            elif isinstance(child, nn.Linear):
                grid = GhostGrid(child.out_features, child.in_features, manifold)
                setattr(parent, name, GhostLinearTandem(grid, bias=child.bias is not None))
    if tied and head is not embedding:
        model.get_output_embeddings().grid = model.get_input_embeddings().grid
    # Tied grids are one shared module; transformers' own tying looks for parameters, which these are not.
    model._tied_weights_keys = {}
    model.all_tied_weights_keys = {}


def restore_modules(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """The inverse of :func:`swap_modules`: ``model`` (mutated) gets dense linears and embeddings in place of its ghost
    modules, one at a time, and every parameter in ``dtype``; a tied head stays tied."""
    weights: dict[int, nn.Parameter] = {}
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if not isinstance(child, GhostEmbedding | GhostLinearTandem):
                continue
            grid = child.grid
            if id(grid) not in weights:
                weight = torch.empty(grid.shape, dtype=dtype, device=grid.indices.device)
                for rows in grid.slices():
                    weight[rows] = grid.dequantize(rows, dtype)
                weights[id(grid)] = nn.Parameter(weight)
            out_features, in_features = grid.shape
            with torch.device("meta"):
                dense: Any
                if isinstance(child, GhostEmbedding):
                    dense = nn.Embedding(out_features, in_features)
                else:
                    dense = nn.Linear(in_features, out_features, bias=child.bias is not None)
                    dense.bias = child.bias
            dense.weight = weights[id(grid)]
            dense.train(child.training)
            setattr(parent, name, dense)
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    model.__dict__.pop("_tied_weights_keys", None)
    model.all_tied_weights_keys = model.get_expanded_tied_weights_keys(all_submodels=True)


def _restore_computed_buffers(model: PreTrainedModel) -> None:
    """Rebuild what a config determines and no checkpoint stores (rotary frequencies): on meta they have no values."""
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            own = [b for n, b in child.named_buffers(recurse=False) if n in child._non_persistent_buffers_set]
            if any(b.is_meta for b in own):
                setattr(parent, name, type(child)(config=model.config))


def expected_tensors(model: PreTrainedModel) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Name, shape and dtype of every tensor that a checkpoint of this model holds; a tied head appears once."""
    expected: dict[str, tuple[tuple[int, ...], torch.dtype]] = {}
    for name, grid in grids_of(model).items():
        expected[f"{name}.indices"] = (grid.shape, torch.int16)
        expected[f"{name}.scale"] = (grid.shape[:1], torch.float32)
    for name, parameter in model.named_parameters():
        expected[name] = (tuple(parameter.shape), torch.float32)
    return expected


def source_name(name: str) -> str:
    """Name of a checkpoint's tensor in the source model: ``x.grid.indices`` comes from ``x.weight``."""
    return name.removesuffix(".grid.indices") + ".weight" if name.endswith(".grid.indices") else name


def count_parameters(model: PreTrainedModel) -> int:
    """Weights, norms and biases of the model; a tied head counts once, row scales do not count."""
    grids = sum(g.indices.numel() for g in grids_of(model).values())
    return grids + sum(p.numel() for p in model.parameters())


def tensor_mismatches(model: PreTrainedModel, tensors: dict[str, torch.Tensor]) -> list[str]:
    """One line for each tensor that is missing, unexpected, or of another shape or dtype than the model's."""
    expected = expected_tensors(model)
    lines = [f"{name} is missing" for name in expected if name not in tensors]
    lines += [f"{name} is not part of the model" for name in tensors if name not in expected]
    for name, (shape, dtype) in expected.items():
        tensor = tensors.get(name)
        if tensor is not None and (tuple(tensor.shape) != shape or tensor.dtype != dtype):
            lines.append(f"{name} is {tensor.dtype} {tuple(tensor.shape)}, expected {dtype} {shape}")
    return lines


def assign_tensors(model: PreTrainedModel, tensors: dict[str, torch.Tensor], *, copy: bool) -> None:
    """Give a model on meta its tensors. With ``copy`` they are cloned, else shared (and must not be written).

    Raises:
        CheckpointError: a tensor is missing, unexpected or of the wrong shape.
    """
    if wrong := tensor_mismatches(model, tensors):
        more = f" (and {len(wrong) - 1} more)" if len(wrong) > 1 else ""
        raise CheckpointError(f"the checkpoint does not fit its own config: {wrong[0]}{more}")
    for name, tensor in tensors.items():
        path, _, leaf = name.rpartition(".")
        module = model.get_submodule(path)
        value = tensor.clone() if copy else tensor
        if leaf in module._buffers:
            module._buffers[leaf] = value
        else:
            module._parameters[leaf] = nn.Parameter(value)


@torch.no_grad()
def copy_tensors(model: PreTrainedModel, tensors: dict[str, torch.Tensor]) -> None:
    """Copy a checkpoint's tensors into those that the model (mutated) has, on whatever device they are.

    Raises:
        CheckpointError: a tensor is missing, unexpected or of the wrong shape.
    """
    if wrong := tensor_mismatches(model, tensors):
        raise CheckpointError(f"the checkpoint does not fit the model: {wrong[0]}")
    for name, own in model_tensors(model).items():
        own.copy_(tensors[name])
    for grid in grids_of(model).values():
        grid.scale_changed()


def model_tensors(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """The tensors a checkpoint stores under ``model``: those of :func:`expected_tensors`, by reference."""
    tensors: dict[str, torch.Tensor] = {}
    for name, grid in grids_of(model).items():
        tensors[f"{name}.indices"] = grid.indices
        tensors[f"{name}.scale"] = grid.scale
    for name, parameter in model.named_parameters():
        tensors[name] = parameter.detach()
    return tensors


def manifold_record(manifold: Manifold) -> dict[str, Any]:
    """What a checkpoint keeps of a manifold."""
    return {
        "name": manifold.name,
        "sha256": manifold.sha256,
        "vote_bits": manifold.vote_bits,
        "values": manifold.values.cpu(),
    }


def manifold_of(checkpoint: dict[str, Any]) -> Manifold:
    """The manifold that a checkpoint records, rebuilt by name where its fingerprint agrees, else from its own table.

    Raises:
        CheckpointError: the table is not a manifold or does not have the recorded fingerprint.
    """
    recorded = checkpoint["manifold"]
    if recorded["name"] in manifolds.NAMES:
        built = manifolds.build(recorded["name"])
        if built.sha256 == recorded["sha256"] and built.vote_bits == recorded["vote_bits"]:
            return built
    try:
        table = manifolds.from_values(recorded["name"], recorded["values"], recorded["vote_bits"])
    except manifolds.ManifoldError as error:
        raise CheckpointError(f"the checkpoint's manifold is unusable: {error}") from error
    if table.sha256 != recorded["sha256"]:
        raise CheckpointError(
            f"the checkpoint's manifold has sha256 {table.sha256[:16]}..., recorded is {recorded['sha256'][:16]}..."
        )
    return table


def model_from_checkpoint(checkpoint: dict[str, Any], *, copy: bool = True) -> PreTrainedModel:
    """The model of a loaded checkpoint, in eval mode, all grids locked; votes are the trainer's to restore."""
    model = build_model(checkpoint["hf_config"], manifold_of(checkpoint), "the checkpoint's config")
    assign_tensors(model, checkpoint["model"], copy=copy)
    generation = checkpoint["tokenizer"]["files"].get("generation_config.json")
    if generation is not None:
        model.generation_config = parse_generation(generation.numpy().tobytes(), "the checkpoint's")
    return model


def parse_generation(data: bytes, whose: str) -> GenerationConfig:
    """A generation_config.json's content.

    Raises:
        ModelError: no JSON object, or fields that transformers refuses.
    """
    try:
        if not isinstance(content := json.loads(data), dict):
            raise TypeError(f"it holds a {type(content).__name__}, expected a JSON object")
        return GenerationConfig.from_dict(content)
    except (ValueError, TypeError, AttributeError, RecursionError) as error:
        raise ModelError(f"{whose} generation_config.json is unusable: {one_line(error)}") from error


def load_tokenizer(folder: Path | str) -> PreTrainedTokenizerBase:
    """Tokenizer of a local folder.

    A tokenizer.json is read as it says: transformers would give every ``qwen2`` folder a Qwen2Tokenizer, which silently
    wrecks other vocabularies. Only folders without one (vocab.json and merges.txt) are left to their declared class.

    Raises:
        ModelError: no tokenizer there, or one that does not load.
    """
    folder = Path(folder)
    try:
        json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
        loader = PreTrainedTokenizerFast if (folder / "tokenizer.json").is_file() else AutoTokenizer
        tokenizer = loader.from_pretrained(folder, local_files_only=True)
    except Exception as error:
        # Rust and Python tokenizers raise bare Exception among others; whatever it is, the tokenizer is unusable.
        raise ModelError(f"cannot read a tokenizer in {folder}: {one_line(error)}") from error
    if not tokenizer("a", add_special_tokens=False)["input_ids"]:
        # transformers makes an empty tokenizer of settings whose vocabulary is missing.
        raise ModelError(f"the tokenizer in {folder} knows no text: its vocabulary is missing or empty")
    return tokenizer


def pack_tokenizer(folder: Path) -> dict[str, torch.Tensor]:
    """A source folder's tokenizer files as uint8 tensors, for a checkpoint."""
    return {
        name: torch.frombuffer(bytearray((folder / name).read_bytes()), dtype=torch.uint8)
        for name in TOKENIZER_FILES
        if (folder / name).is_file() and (folder / name).stat().st_size
    }


def tokenizer_files(checkpoint: dict[str, Any]) -> dict[str, bytes]:
    """The tokenizer's files kept in a checkpoint, by name.

    Raises:
        ModelError: one has another name, and could be a config or code where it is written.
    """
    files = checkpoint["tokenizer"]["files"]
    if odd := [name for name in files if name not in TOKENIZER_FILES]:
        raise ModelError(f"the checkpoint has a tokenizer file {odd[0]!r}, expected one of {TOKENIZER_FILES}")
    return {name: data.numpy().tobytes() for name, data in files.items()}


def tokenizer_from_checkpoint(checkpoint: dict[str, Any]) -> PreTrainedTokenizerBase:
    """The tokenizer kept in a checkpoint.

    Raises:
        ModelError: it does not load.
    """
    with tempfile.TemporaryDirectory(prefix="qwen-prime-") as name:
        for file, data in tokenizer_files(checkpoint).items():
            (Path(name) / file).write_bytes(data)
        return load_tokenizer(name)


def find_tokenizer(model: Path | str) -> PreTrainedTokenizerBase:
    """Tokenizer of a PRIME checkpoint, a folder or a hub id, of which only its small files are fetched.

    Raises:
        CheckpointError, ModelError: with what is wrong.
    """
    if Path(model).is_file():
        return tokenizer_from_checkpoint(open_checkpoint(model))
    return load_tokenizer(locate_source(str(model), files=_HUB_FILES[1:])[0])


def locate_source(
    model: str, revision: str | None = None, files: Sequence[str] = _HUB_FILES
) -> tuple[Path, str | None]:
    """Folder of a source and its revision; of a hub id those files are downloaded, or found in the cache when offline.

    Raises:
        ModelError: no such folder, and no such model on the hub.
    """
    folder = Path(model)
    if folder.is_dir():
        return folder, None
    if folder.is_file():
        raise ModelError(f"{model} is a file, expected a Hugging Face model folder or a hub id")
    here = folder.suffix in (".pt", ".prime") or (folder.parent.is_dir() and str(folder.parent) != ".")
    if here or not _HUB_ID.fullmatch(model):
        # A mistyped path is nobody else's business.
        raise ModelError(f"no such folder: {model}")
    try:
        snapshot = Path(snapshot_download(model, revision=revision, allow_patterns=list(files)))
    except Exception as error:
        # The hub client raises its own, its transport's and OS errors; offline, unknown id and no access all end here.
        offline = "; HF_HUB_OFFLINE is set, so that only its cache was asked" if constants.HF_HUB_OFFLINE else ""
        raise ModelError(f"no folder {model}, and the hub does not give it{offline}: {one_line(error)}") from error
    return snapshot, snapshot.name


def load_model(path: Path | str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase, str]:
    """A PRIME checkpoint, a packed one (told by its content) or a Hugging Face folder alike, float32, eval mode, with
    its tokenizer and a word for which.

    Raises:
        CheckpointError, ModelError: with what is wrong.
    """
    path = Path(path)
    if path.is_dir():
        if (path / "stats.jsonl").is_file() and (checkpoints := sorted(path.glob("*_prime_*.pt"))):
            raise ModelError(f"{path} is the folder of a run: give one of its checkpoints, such as {checkpoints[0]}")
        config_file = path / "config.json"
        if not config_file.is_file():
            raise ModelError(f"{path} has no config.json: expected a Hugging Face model folder or a PRIME .pt file")
        try:
            content = json.loads(config_file.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError) as error:
            raise ModelError(f"cannot read {config_file}: {one_line(error)}") from error
        parse_config(content, str(config_file))
        try:
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                path, dtype=torch.float32, local_files_only=True, output_loading_info=True
            )
        except (OSError, ValueError, RuntimeError) as error:
            raise ModelError(f"cannot load {path}: {one_line(error)}") from error
        model, found = loaded
        if found["missing_keys"]:
            # transformers only warns, and fills them with random numbers.
            raise ModelError(f"{path} lacks tensors of its model: {sorted(found['missing_keys'])[:3]}")
        return model.eval(), load_tokenizer(path), "prime" if grids_of(model) else "dense"
    checkpoint = open_checkpoint(path)
    kind = "packed" if is_pack(path) else "prime"
    return model_from_checkpoint(checkpoint, copy=False), tokenizer_from_checkpoint(checkpoint), kind


def answer_loss(
    model: PreTrainedModel, input_ids: torch.Tensor, labels: torch.Tensor, position_ids: torch.Tensor | None = None
) -> tuple[torch.Tensor, int]:
    """Summed next-token loss over the labelled positions.

    Args:
        input_ids: int64 ``(batch, tokens)``.
        labels: int64 ``(batch, tokens)``, not shifted; -100 where nothing is to be learned.
        position_ids: int64 ``(batch, tokens)``, restarting with each document of a packed row.

    Returns:
        Loss in nats, summed, float32 scalar; and the number of labelled positions (the first of a row never counts).
    """
    if position_ids is None:
        position_ids = torch.arange(input_ids.shape[1], device=input_ids.device).expand_as(input_ids)
    known = packed_attention.model_arguments(model, position_ids)
    hidden = model.model(input_ids=input_ids, position_ids=position_ids, use_cache=False, **known)
    targets = labels[:, 1:]
    wanted = targets != -100
    picked = hidden.last_hidden_state[:, :-1][wanted]
    targets = targets[wanted]
    head = model.get_output_embeddings()
    if isinstance(head, GhostLinearTandem):
        return ghost_cross_entropy(picked, targets, head.grid), len(targets)
    # Of a long window the logits are many times what the model is; a backward pass keeps them all anyway.
    rows = max(1, len(targets)) if torch.is_grad_enabled() else _LOGIT_ROWS
    parts = zip(picked.split(rows), targets.split(rows), strict=True)
    losses = [F.cross_entropy(head(some).float(), wanted, reduction="sum") for some, wanted in parts]
    return torch.stack(losses).sum(), len(targets)


def stop_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Ids that end an answer: the model's own, the tokenizer's, and the end of a turn."""
    own = model.generation_config.eos_token_id if model.generation_config else None
    ids = set(own if isinstance(own, list) else [own]) | {tokenizer.eos_token_id}
    if TURN_END in tokenizer.get_vocab():
        ids.add(tokenizer.convert_tokens_to_ids(TURN_END))
    return sorted(i for i in ids if i is not None)


@torch.no_grad()
def continue_texts(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    tokens: int,
    batch_size: int = 8,
    description: str | None = None,
) -> list[str]:
    """The most likely continuations of prompts, each of at most so many tokens and up to where a chat would stop,
    without votes; special tokens are left out of the text. The model's mode and generation config are kept.

    Prompts of similar length share a batch, padded on the left. A prompt that leaves no room for its continuation in
    the model's context loses its beginning.

    Args:
        prompts: token ids, at least one each.
        description: of a progress bar; none without.
    """
    training = model.training
    model.eval()
    stops = stop_ids(model, tokenizer)
    pad = next(i for i in (tokenizer.pad_token_id, tokenizer.eos_token_id, *stops, 0) if i is not None)
    greedy = GenerationConfig(
        max_new_tokens=tokens, do_sample=False, num_beams=1, eos_token_id=stops or None, pad_token_id=pad
    )
    # Whatever a call leaves open transformers takes from the model: Qwen's repetition penalty, say.
    own, model.generation_config = model.generation_config, greedy
    room = max(1, model.config.max_position_embeddings - tokens)
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    texts = [""] * len(prompts)
    try:
        with tqdm(total=len(prompts), desc=description, leave=False, disable=None if description else True) as bar:
            for first in range(0, len(order), batch_size):
                chosen = order[first : first + batch_size]
                cut = [list(prompts[i])[-room:] for i in chosen]
                width = max(map(len, cut))
                ids = torch.tensor([[pad] * (width - len(row)) + row for row in cut], device=model.device)
                mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in cut], device=model.device)
                out = model.generate(ids, attention_mask=mask, generation_config=greedy)  # type: ignore[operator]
                for i, row in zip(chosen, out, strict=True):
                    texts[i] = str(tokenizer.decode(row[width:], skip_special_tokens=True))
                bar.update(len(chosen))
    finally:
        model.generation_config = own
    model.train(training)
    return texts


@torch.no_grad()
def mean_answer_loss(
    model: PreTrainedModel, batches: Iterable[Any], description: str = "evaluate"
) -> tuple[float, int]:
    """Mean loss per labelled token over batches with ``input_ids``, ``labels`` and ``position_ids``, without votes.

    Returns:
        Nats per token and the number of tokens scored.

    Raises:
        ModelError: nothing to score.
    """
    training = model.training
    model.eval()
    total, tokens = 0.0, 0
    device = model.device
    for batch in tqdm(batches, desc=description, unit="batch", leave=False, disable=None):
        loss, count = answer_loss(
            model, batch.input_ids.to(device), batch.labels.to(device), batch.position_ids.to(device)
        )
        total += float(loss)
        tokens += count
    model.train(training)
    if tokens == 0:
        raise ModelError("the evaluation data has no token to score")
    return total / tokens, tokens

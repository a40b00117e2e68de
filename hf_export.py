"""A PRIME checkpoint as an ordinary Hugging Face folder: dense safetensors, config, tokenizer, chat template.

This is the default hand-off: whatever reads a Qwen2 or Qwen3 folder reads this one, without our code. Tensors stream
from the mapped checkpoint through one slice of rows into the file: a safetensors file is a length, a JSON header with
every tensor's place, and the bytes, so it can be written front to back once the shapes are known. The library's own
writer wants all tensors of a shard in memory, which is why it is used for reading only (in the tests). A tied head is
not written: transformers ties it again.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from dense_weights import DTYPES, DenseSource, DenseWeight
from qwen_prime_wrapper import ARCHITECTURES, TOKENIZER_FILES, TURN_END, tokenizer_from_checkpoint
from whole_output import new_folder

SAFETENSORS_NAMES = {
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.int16: "I16",
}
FOLDER_FILES = (
    "config.json",
    *TOKENIZER_FILES,
    "model.safetensors",
    "model-?????-of-?????.safetensors",
    "model.safetensors.index.json",
    "modeling_prime.py",
)
"""Patterns of all names that an export gives to files of a folder: a folder of these alone may be replaced."""
_SIZES = {"KB": 10**3, "MB": 10**6, "GB": 10**9}


@dataclass(frozen=True)
class StoredTensor:
    """A tensor that is made while it is written: its parts, in order, are its rows."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    parts: Iterable[torch.Tensor]

    @property
    def nbytes(self) -> int:
        """Size in the file."""
        count = 1
        for size in self.shape:
            count *= size
        return count * self.dtype.itemsize


def parse_size(text: str) -> int:
    """Bytes of ``"5GB"``, ``"200MB"``, ``"64KB"`` (powers of ten, as transformers counts).

    Raises:
        ValueError: not a positive size.
    """
    number, unit = text.strip()[:-2], text.strip()[-2:].upper()
    try:
        size = int(float(number) * _SIZES[unit])
    except (KeyError, ValueError, OverflowError):
        size = 0
    if size < 1:
        raise ValueError(f"shard-size is {text!r}, expected a size such as 5GB, 200MB or 64KB")
    return size


def write_safetensors(path: Path, tensors: list[StoredTensor]) -> None:
    """One safetensors file, written front to back; of the tensors one part is in memory at a time.

    Raises:
        ExportError: from a tensor's parts.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for tensor in tensors:
        header[tensor.name] = {
            "dtype": SAFETENSORS_NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [offset, offset + tensor.nbytes],
        }
        offset += tensor.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    # The data begin at a multiple of eight, so that readers can map them.
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little"))
        file.write(text)
        for tensor in tensors:
            end = file.tell() + tensor.nbytes
            for part in tensor.parts:
                file.write(part.contiguous().reshape(-1).view(torch.uint8).numpy().data)
            assert file.tell() == end, f"{tensor.name} is not as long as its shape"


def write_shards(folder: Path, tensors: list[StoredTensor], shard_size: int) -> list[str]:
    """``model.safetensors``, or numbered shards of at most ``shard_size`` bytes (a larger tensor has one of its own)
    and their index.

    Returns:
        Names of the weight files.
    """
    shards: list[list[StoredTensor]] = [[]]
    room = shard_size
    for tensor in tensors:
        if shards[-1] and tensor.nbytes > room:
            shards.append([])
            room = shard_size
        shards[-1].append(tensor)
        room -= tensor.nbytes
    if len(shards) == 1:
        names = ["model.safetensors"]
    else:
        names = [f"model-{i:05}-of-{len(shards):05}.safetensors" for i in range(1, len(shards) + 1)]
        places = {tensor.name: name for name, shard in zip(names, shards, strict=True) for tensor in shard}
        index = {"metadata": {"total_size": sum(t.nbytes for t in tensors)}, "weight_map": places}
        write_json(folder / "model.safetensors.index.json", index)
    for name, shard in zip(names, shards, strict=True):
        write_safetensors(folder / name, shard)
    return names


def write_json(path: Path, content: Any) -> None:
    """Indented, as transformers writes its own."""
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def folder_config(source: DenseSource, dtype: str) -> dict[str, Any]:
    """The source's config.json with the dtype of the folder's tensors and the architecture's class."""
    config = {k: v for k, v in source.config.items() if k not in ("torch_dtype", "quantization_config", "auto_map")}
    return {**config, "architectures": [ARCHITECTURES[config["model_type"]]], "dtype": dtype}


def write_companions(folder: Path, source: DenseSource) -> None:
    """Tokenizer, chat template and generation config, byte for byte as the source had them; but a trained model ends
    its answers where conversations taught it to, which the generation config of a base model does not name."""
    for name, data in source.files.items():
        (folder / name).write_bytes(data)
    tokenizer = tokenizer_from_checkpoint(source.checkpoint)
    if source.checkpoint["stage"] != "train" or TURN_END not in str(tokenizer.chat_template or ""):
        return
    generation = json.loads(source.files.get("generation_config.json", b"{}"))
    own = generation.get("eos_token_id", source.config.get("eos_token_id"))
    stops = own if isinstance(own, list) else [] if own is None else [own]
    end = tokenizer.get_vocab().get(TURN_END)
    if end is not None and end not in stops:
        write_json(folder / "generation_config.json", {**generation, "eos_token_id": [*stops, end]})


def _stored(weight: DenseWeight, dtype: torch.dtype) -> StoredTensor:
    return StoredTensor(weight.name, dtype, weight.shape, weight.slices(dtype))


def export_hf(source: DenseSource, output: Path, dtype: str, shard_size: int, force: bool) -> list[str]:
    """Write the folder ``output``.

    Args:
        dtype: name of a key of :data:`dense_weights.DTYPES`; all tensors are rounded to it.
        shard_size: bytes.

    Returns:
        Names of the weight files.

    Raises:
        ExportError: a value is beyond the dtype's range.
        OutputError: the folder exists, or cannot be written; nothing is left behind.
    """
    tensors = [_stored(weight, DTYPES[dtype]) for weight in source.weights]
    with new_folder(output, force, FOLDER_FILES) as folder:
        write_json(folder / "config.json", folder_config(source, dtype))
        write_companions(folder, source)
        return write_shards(folder, tensors, shard_size)

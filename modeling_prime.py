"""Opens a folder of 16-bit PRIME indices with transformers alone: ``from_pretrained(..., trust_remote_code=True)``.

This file is copied into every such folder and imports nothing of the suite that wrote it. It looks each index up in the
folder's own table, multiplies by the row's scale, and hands the dense tensors to transformers' own model class: for
inference, or as the start of any ordinary fine-tuning. To train the indices themselves, import ``prime_hf`` of the
suite first; this class then steps aside.
"""

import copy
import json
import os
from typing import Any

import torch
from safetensors import safe_open
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING
from transformers.utils import cached_file

TABLE = "manifold.values"
GUARD = "model.embed_tokens.weight"
HUB_ARGUMENTS = ("cache_dir", "force_download", "local_files_only", "token", "revision", "subfolder")


def _weight_files(path, **hub):
    index = cached_file(path, "model.safetensors.index.json", _raise_exceptions_for_missing_entries=False, **hub)
    if index is None:
        return [cached_file(path, "model.safetensors", **hub)]
    with open(index, encoding="utf-8") as file:
        names = sorted(set(json.load(file)["weight_map"].values()))
    return [cached_file(path, name, **hub) for name in names]


def dense_tensors(files, dtype):
    """The folder's weights, norms and biases in ``dtype``, by their names in transformers' model."""
    places: dict[str, str] = {}
    for file in files:
        with safe_open(file, "pt") as opened:
            places |= {name: file for name in opened.keys()}  # noqa: SIM118, not a dict

    def read(name):
        with safe_open(places[name], "pt") as opened:
            return opened.get_tensor(name)

    table = read(TABLE)
    dense = {}
    for name in places:
        if name.endswith(".grid.indices"):
            words = read(name)
            values = table[words.int() + 32768] * read(name.removesuffix("indices") + "scale")[:, None]
            dense[name.removesuffix("grid.indices") + "weight"] = values.to(dtype)
        elif name not in (TABLE, GUARD) and not name.endswith(".grid.scale"):
            dense[name] = read(name).to(dtype)
    return dense


class PrimeForCausalLM:
    """What config.json's ``auto_map`` names; makes transformers' own model, never an instance of itself."""

    @classmethod
    def register_for_auto_class(cls, auto_class="AutoModelForCausalLM"):
        """Asked for by transformers; there is nothing to register."""

    @classmethod
    def from_pretrained(cls, path, *args, config=None, dtype="auto", torch_dtype=None, **kwargs):
        """The dense model in ``dtype``, by default float32; other arguments as transformers' ``from_pretrained``."""
        kwargs.pop("trust_remote_code", None)
        hub = {name: kwargs[name] for name in HUB_ARGUMENTS if kwargs.get(name) is not None}
        config = copy.deepcopy(config if config is not None else AutoConfig.from_pretrained(os.fspath(path), **hub))
        dtype = dtype if torch_dtype is None else torch_dtype
        model_class: Any = AutoModelForCausalLM._model_mapping[type(config)]
        if "prime" in AUTO_QUANTIZER_MAPPING:
            return model_class.from_pretrained(path, *args, config=config, dtype=dtype, **kwargs)
        dtype = torch.float32 if dtype in ("auto", None) else getattr(torch, dtype) if isinstance(dtype, str) else dtype
        del config.quantization_config, config.auto_map
        for name in HUB_ARGUMENTS:
            kwargs.pop(name, None)
        tensors = dense_tensors(_weight_files(os.fspath(path), **hub), dtype)
        return model_class.from_pretrained(None, *args, config=config, state_dict=tensors, dtype=dtype, **kwargs)

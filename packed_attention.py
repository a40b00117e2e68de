"""Attention of packed rows, document by document.

transformers keeps the documents of a packed row apart with a mask: every query meets every key of the row, and what it
must not see is thrown away. So is the upper triangle of a causal square, which torch's kernel for the CPU computes
whether it is asked to or not (2.13: 512 tokens take as long with ``is_causal`` as without any mask). In a training step
of a small model in bfloat16 that is a quarter of the time. Here each document is a call of its own, and a long one is
two: its first half sees itself, its second half all of it. The same sums, in another order.

It is an attention implementation of transformers' registry. Without ``documents``, a keyword that reaches it from
whoever calls the model, it is ``sdpa`` and nothing else; so generation, evaluation with padding and strangers' trainers
notice nothing. On a GPU the masked call stays: many small kernels are no gain there, and nothing could be measured.

Rejected: shorter blocks than halves. Each begins at the first key, and adding up the gradients of so many beginnings
costs what is saved (1,024 tokens in blocks of 128: half as long again as in one piece).
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

NAME = "by-document"
"""What transformers calls it."""
HALVED = 320
"""Tokens from which on a document is computed in two halves."""


def document_lengths(position_ids: torch.Tensor) -> tuple[tuple[int, ...], ...]:
    """Lengths of the documents of each row, in order, from int64 ``(batch, tokens)`` that restart with each; padding
    counts as one."""
    found = []
    for row in position_ids.cpu():
        starts = (torch.diff(row) != 1).nonzero().flatten().add(1).tolist()
        edges = [0, *starts, len(row)]
        found.append(tuple(b - a for a, b in itertools.pairwise(edges)))
    return tuple(found)


def model_arguments(model: PreTrainedModel, position_ids: torch.Tensor) -> dict[str, Any]:
    """Keywords for a call of a model without cache or padding: what its attention should know of the row's documents.

    Args:
        model: one that was built with this implementation, or any other, which gets no mask and makes its own.
        position_ids: int64 ``(batch, tokens)``, restarting with each document.
    """
    config: Any = model.config
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    if config._attn_implementation != NAME or position_ids.device.type != "cpu" or kinds != {"full_attention"}:
        return {"attention_mask": None}
    return {"attention_mask": {"full_attention": None}, "documents": document_lengths(position_ids)}


def attend(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    documents: Sequence[Sequence[int]] | None = None,
    **options: Any,
) -> tuple[torch.Tensor, None]:
    """Attention as transformers' models call it.

    Args:
        query: float ``(batch, heads, tokens, size)``.
        key, value: float ``(batch, key heads, tokens, size)``.
        attention_mask: for ``sdpa``; not looked at where documents are given.
        documents: lengths of each row's documents; each token sees its own document up to itself.

    Returns:
        ``(batch, tokens, heads, size)``, and no weights.
    """
    if documents is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **options)
    groups = query.shape[1] // key.shape[1]
    tensors = [query, repeat_kv(key, groups), repeat_kv(value, groups)]
    settings = {"dropout_p": options.get("dropout", 0.0), "scale": options.get("scaling")}
    if len(set(documents)) == 1:
        out = _row(tensors, documents[0], settings)
    else:
        rows = (_row([t[r : r + 1] for t in tensors], lengths, settings) for r, lengths in enumerate(documents))
        out = torch.cat(list(rows))
    return out.transpose(1, 2).contiguous(), None


def _row(tensors: Sequence[torch.Tensor], lengths: Sequence[int], settings: dict[str, Any]) -> torch.Tensor:
    """Rows with documents of the same lengths, ``(batch, heads, tokens, size)`` each."""
    parts = zip(*(t.split(list(lengths), 2) for t in tensors), strict=True)
    return torch.cat([_document(q, k, v, settings) for q, k, v in parts], 2)


def _document(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, settings: dict[str, Any]) -> torch.Tensor:
    tokens = q.shape[2]
    if tokens < HALVED:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, **settings)
    half = tokens // 2
    first = F.scaled_dot_product_attention(q[:, :, :half], k[:, :, :half], v[:, :, :half], is_causal=True, **settings)
    seen = torch.ones(tokens - half, tokens, dtype=torch.bool, device=q.device).tril(half)
    second = F.scaled_dot_product_attention(q[:, :, half:], k, v, attn_mask=seen, **settings)
    return torch.cat([first, second], 2)


AttentionInterface.register(NAME, attend)
AttentionMaskInterface.register(NAME, sdpa_mask)

"""Attention of packed rows, document by document.

transformers keeps the documents of a packed row apart with a mask: every query meets every key of the row, and what it
must not see is thrown away. So is the upper triangle of a causal square, which torch's kernel for the CPU computes
whether it is asked to or not (2.13: 512 tokens take as long with ``is_causal`` as without any mask). In a training step
of a small model in bfloat16 that is a quarter of the time. Here each document is a call of its own, and a long one is
two: its first half sees itself, its second half all of it. The same sums, in another order.

Gradient checkpointing computes a layer twice. Its attention need not be: what the first pass found waits for the second
in a :class:`Kept`, one for each call of the model. In bfloat16 that is half as much again as checkpointing keeps of a
layer anyway, and saves a twentieth of a step of a small model.

It is an attention implementation of transformers' registry. Without ``documents``, a keyword that reaches it from
whoever calls the model, it is ``sdpa`` and nothing else; so generation, evaluation with padding and strangers' trainers
notice nothing.

On a card, documents are where they begin (``Starts``), in one call of flash attention for rows of many lengths: on an
H200 the masked call's backward pass, asked for the same bits every time, is a sixth of a step of 512 tokens. That call
wants 16-bit numbers and compute capability 8.0; elsewhere a mask is made of the beginnings.

Rejected: shorter blocks than halves. Each begins at the first key, and adding up the gradients of so many beginnings
costs what is saved (1,024 tokens in blocks of 128: half as long again as in one piece).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

NAME = "by-document"
"""What transformers calls it."""
HALVED = 320
"""Tokens from which on a document is computed in two halves."""


class Starts(NamedTuple):
    """Where the documents of a batch begin, its rows laid end to end.

    Attributes:
        edges: int32 ``(documents + 1,)`` on the card: the first token of each, then the number of tokens; the last
            number may be repeated, for documents of no tokens.
        longest: tokens of the longest document, or more.
    """

    edges: torch.Tensor
    longest: int


class Kept(dict[int, Any]):
    """Results and sums of layers that are computed twice, by their number, for one call of a model."""

    def __init__(self, layers: int) -> None:
        super().__init__()
        self.layers = layers
        self._block: torch.Tensor | None = None

    def opens(self, layer: int) -> bool:
        """Whether a layer's first pass may leave its result; where it ran before, whose result it is could not be told,
        and neither is kept."""
        if layer in self:
            self[layer] = None
            return False
        return True

    def close(self, layer: int) -> None:
        """A layer's backward pass has come by."""
        self.pop(layer, None)
        if not self:
            # What still needs its part holds the memory itself.
            self._block = None

    def room(self, layer: int, like: torch.Tensor, shape: Sequence[int]) -> torch.Tensor:
        """Memory for a layer's result, in one block for all: many that stay would leave a heap full of holes."""
        size = math.prod(shape)
        if self._block is None or len(self._block) != size * self.layers or self._block.dtype != like.dtype:
            self._block = like.new_empty(size * self.layers)
        # No view: autograd would take what is written for one layer for a change of all the others' results.
        return like.new_empty(0).set_(self._block.untyped_storage(), layer * size, shape)  # type: ignore[call-overload]


def starts_of(lengths: Sequence[Sequence[int]], capacity: int | None = None) -> list[int]:
    """The edges of :class:`Starts` from each row's :func:`document_lengths`; filled up to ``capacity`` documents."""
    edges = [0, *itertools.accumulate(itertools.chain.from_iterable(lengths))]
    return edges + edges[-1:] * (0 if capacity is None else capacity + 1 - len(edges))


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
    if not serves(model) or position_ids.device.type not in ("cpu", "cuda"):
        return {"attention_mask": None}
    documents: Any = document_lengths(position_ids)
    kept: Kept | None = Kept(model.config.num_hidden_layers)
    if position_ids.device.type == "cuda":
        longest = max(itertools.chain.from_iterable(documents))
        documents = Starts(torch.tensor(starts_of(documents), dtype=torch.int32, device=position_ids.device), longest)
        kept = None
    return {"attention_mask": {"full_attention": None}, "documents": documents, "kept": kept}


def serves(model: PreTrainedModel) -> bool:
    """Whether a model's attention can be told of documents: built with this implementation, no layer with a window."""
    config: Any = model.config
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    return config._attn_implementation == NAME and kinds == {"full_attention"}


def attend(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    documents: Sequence[Sequence[int]] | Starts | None = None,
    kept: Kept | None = None,
    **options: Any,
) -> tuple[torch.Tensor, None]:
    """Attention as transformers' models call it.

    Args:
        query: float ``(batch, heads, tokens, size)``.
        key, value: float ``(batch, key heads, tokens, size)``.
        attention_mask: for ``sdpa``; not looked at where documents are given.
        documents: lengths of each row's documents, on a card where they begin; each token sees its own document up to
            itself.
        kept: where a layer that is computed twice leaves its result; one for each call of the model. Mutated.

    Returns:
        ``(batch, tokens, heads, size)``, and no weights.
    """
    if documents is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **options)
    # Rotation leaves queries and keys in the type of the positions; torch's own attention is cast unasked.
    narrow = query.dtype
    if torch.is_autocast_enabled(query.device.type) and narrow != torch.float64:
        narrow = torch.get_autocast_dtype(query.device.type)
    if isinstance(documents, Starts):
        query, key, value = query.to(narrow), key.to(narrow), value.to(narrow)
        if flash_serves(query):
            return _flash(query, key, value, documents, options), None
        return sdpa_attention_forward(module, query, key, value, _mask(documents.edges, query), **options)
    batch, _, tokens, _ = query.shape
    if len(documents) not in (1, batch) or any(sum(lengths) != tokens for lengths in documents):
        raise ValueError(
            f"documents of {documents} tokens, expected {tokens} in each of {batch} rows, or in one for all"
        )
    if options.get("dropout"):
        edges = torch.tensor(starts_of([*documents] * (batch // len(documents))))
        return sdpa_attention_forward(module, query, key, value, _mask(edges, query), **options)
    groups = query.shape[1] // key.shape[1]
    tensors = [query, repeat_kv(key, groups), repeat_kv(value, groups)]
    # The kernel is called without what torch looks at before it is.
    tensors = [t if t.stride(-1) == 1 else t.contiguous() for t in tensors]
    place = None
    if kept is not None and torch.is_grad_enabled() and any(t.requires_grad for t in tensors):
        layer = getattr(module, "layer_idx", None)
        place = None if layer is None else (kept, int(layer))
    settings = (narrow, options.get("scaling"))
    return _ByPieces.apply(*tensors, _pieces(documents), settings, place).transpose(1, 2), None


class _Piece(NamedTuple):
    """Neighbouring queries of a document, in some rows of the batch, and the keys from its beginning to their end;
    ``again`` where the piece before has these keys too."""

    rows: slice
    queries: slice
    keys: slice
    again: bool = False

    @property
    def whole(self) -> bool:
        """Whether the queries begin where the keys do."""
        return self.queries == self.keys

    def mask(self, like: torch.Tensor) -> torch.Tensor | None:
        """What is added to the scores, ``(queries, keys)``; None where a kernel's own triangle does it."""
        if self.whole:
            return None
        count, total = (s.stop - s.start for s in (self.queries, self.keys))
        return like.new_full((count, total), -torch.inf).triu(total - count + 1)


def _pieces(documents: Sequence[Sequence[int]]) -> list[_Piece]:
    """What is computed in one call each; of a long document first its second half, which sees all of it."""
    if len(set(documents)) == 1:
        rows = [(slice(None), documents[0])]
    else:
        rows = [(slice(r, r + 1), lengths) for r, lengths in enumerate(documents)]
    found = []
    for row, lengths in rows:
        for begin, end in itertools.pairwise(itertools.accumulate(lengths, initial=0)):
            whole, half = slice(begin, end), begin + (end - begin) // 2
            if end - begin < HALVED:
                found.append(_Piece(row, whole, whole))
            else:
                found.append(_Piece(row, slice(half, end), whole))
                found.append(_Piece(row, slice(begin, half), slice(begin, half), again=True))
    return found


class _ByPieces(torch.autograd.Function):
    """Attention of pieces that together hold every query once, ``(batch, heads, tokens, size)`` throughout.

    ``settings`` are the type to compute in and the scale. What comes is cast here, so that gradients of halves, and of
    keys that several heads share, are added up in the type of what came. ``place`` is a :class:`Kept` and a layer: what
    is found there is not computed, what is not is left there.
    """

    @staticmethod
    def forward(ctx, query, key, value, pieces: Sequence[_Piece], settings, place: tuple[Kept, int] | None):
        narrow, scale = settings
        ctx.pieces, ctx.scale, ctx.place = pieces, scale, place
        ctx.kinds = [t.dtype for t in (query, key, value)]
        query, key, value = (t.to(narrow) for t in (query, key, value))
        # In a backward pass this is a layer's second time.
        again = torch._C._current_graph_task_id() != -1
        found = place[0].pop(place[1], None) if place is not None and again else None
        keeps = place is not None and not again and place[0].opens(place[1])
        if found is None:
            batch, heads, tokens, size = query.shape
            shape = (batch, tokens, heads, size)
            out = (place[0].room(place[1], query, shape) if place and keeps else query.new_empty(shape)).transpose(1, 2)
            sums = []
            for piece in pieces:
                q = query[piece.rows, :, piece.queries]
                k, v = (t[piece.rows, :, piece.keys] for t in (key, value))
                part, logs = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
                    q, k, v, 0.0, piece.whole, attn_mask=piece.mask(query), scale=scale
                )
                out[piece.rows, :, piece.queries] = part
                sums.append(logs)
            if place and keeps:
                place[0][place[1]] = (out.detach(), sums)
        else:
            out, sums = found
        ctx.save_for_backward(query, key, value, out, *sums)
        return out

    @staticmethod
    def backward(ctx, gradient: torch.Tensor):
        query, key, value, out, *sums = ctx.saved_tensors
        if ctx.place is not None:
            # A layer that was computed once has left its result for nobody.
            ctx.place[0].close(ctx.place[1])
        gradient = gradient.contiguous() if gradient.stride(-1) != 1 else gradient
        below = [torch.empty_like(t, dtype=kind) for t, kind in zip((query, key, value), ctx.kinds, strict=True)]
        for piece, logs in zip(ctx.pieces, sums, strict=True):
            up, q, o = (t[piece.rows, :, piece.queries] for t in (gradient, query, out))
            k, v = (t[piece.rows, :, piece.keys] for t in (key, value))
            parts = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
                up, q, k, v, o, logs, 0.0, piece.whole, attn_mask=piece.mask(query), scale=ctx.scale
            )
            below[0][piece.rows, :, piece.queries] = parts[0]
            for whole, part in zip(below[1:], parts[1:], strict=True):
                there = whole[piece.rows, :, piece.keys]
                _ = there.add_(part) if piece.again else there.copy_(part)
        return (*below, None, None, None)


def flash_serves(query: torch.Tensor) -> bool:
    """Whether the call for rows of many lengths takes these numbers on their card."""
    size = query.shape[-1]
    able = query.is_cuda and query.dtype in (torch.bfloat16, torch.float16) and size <= 256 and size % 8 == 0
    return able and torch.cuda.get_device_capability(query.device) >= (8, 0)


def _flash(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, documents: Starts, options: dict[str, Any]
) -> torch.Tensor:
    batch, _, tokens, _ = query.shape
    flat = [t.transpose(1, 2).flatten(0, 1) for t in (query, key, value)]
    edges, longest, dropout = documents.edges, documents.longest, options.get("dropout", 0.0)
    # By position: queries, keys, values, where each begins, how long it may be, dropout, causal, no mask for debugging.
    out = torch.ops.aten._flash_attention_forward(
        *flat, edges, edges, longest, longest, dropout, True, False, scale=options.get("scaling")
    )
    return out[0].unflatten(0, (batch, tokens))


def _mask(edges: torch.Tensor, query: torch.Tensor) -> torch.Tensor:
    """What each query may see, bool ``(batch, 1, tokens, tokens)``."""
    batch, _, tokens, _ = query.shape
    places = torch.arange(batch * tokens, device=edges.device, dtype=edges.dtype)
    document = torch.bucketize(places, edges, right=True).view(batch, tokens)
    causal = torch.ones(tokens, tokens, dtype=torch.bool, device=edges.device).tril()
    return ((document[:, :, None] == document[:, None, :]) & causal)[:, None]


AttentionInterface.register(NAME, attend)
AttentionMaskInterface.register(NAME, sdpa_mask)

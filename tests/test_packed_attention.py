"""Attention by documents is attention under transformers' mask, and sees nothing else."""

from __future__ import annotations

import random
from collections import Counter
from typing import Any

import pytest
import torch
from tiny_models import import_source, tiny_config, write_source
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import Qwen2Config, Qwen2ForCausalLM, Qwen3Config, Qwen3ForCausalLM

import packed_attention
from packed_attention import NAME, Starts, attend, document_lengths, model_arguments, starts_of
from prime_checkpoint import load_checkpoint
from qwen_prime_wrapper import answer_loss, model_from_checkpoint

pytestmark = pytest.mark.usefixtures("one_thread")


def positions_of(*rows: list[int]) -> torch.Tensor:
    return torch.stack([torch.cat([torch.arange(n) for n in row]) for row in rows])


def drawn_rows(seed: int, tokens: int, count: int) -> list[list[int]]:
    draw, rows = random.Random(seed), []
    for _ in range(count):
        row: list[int] = []
        while (left := tokens - sum(row)) > 0:
            row.append(min(left, draw.choice([1, 1, 2, 5, 17, 40, 90])))
        rows.append(row)
    return rows


def test_lengths_of_documents() -> None:
    assert document_lengths(positions_of([3, 1, 1, 4], [9], [1] * 9)) == ((3, 1, 1, 4), (9,), (1,) * 9)
    # A row that begins in the middle of a document, as a window of a long text does.
    assert document_lengths(torch.tensor([[5, 6, 0, 1]])) == ((2, 2),)
    for seed in range(20):
        rows = drawn_rows(seed, 120, 3)
        assert document_lengths(positions_of(*rows)) == tuple(tuple(row) for row in rows)


def test_where_documents_begin() -> None:
    assert starts_of(((3, 1), (4,))) == [0, 3, 4, 8]
    assert starts_of(((3, 1), (4,)), 5) == [0, 3, 4, 8, 8, 8]
    assert starts_of(((3, 1), (4,)), 2) == [0, 3, 4, 8]


def test_the_call_for_a_card_is_torchs() -> None:
    """By position, as packed_attention gives them; only a card can run it."""
    wanted = ["query", "key", "value", "cum_seq_q", "cum_seq_k", "max_q", "max_k", "dropout_p", "is_causal"]
    schema = torch.ops.aten._flash_attention_forward.default._schema
    assert [a.name for a in schema.arguments][:11] == [*wanted, "return_debug_mask", "scale"]


@pytest.mark.parametrize("halved", [320, 16, None])
@pytest.mark.parametrize("key_heads", [1, 2, 6])
@pytest.mark.parametrize(
    "rows", [[[120]], [[70, 1, 1, 48], [120]], [[30, 90], [30, 90]], drawn_rows(3, 120, 3)], ids=str
)
def test_results_and_gradients_equal_a_masked_softmax(
    rows: list[list[int]], key_heads: int, halved: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By lengths, documents halved or not, and (None) by where they begin, as on a card without flash attention."""
    monkeypatch.setattr(packed_attention, "HALVED", halved)
    draw = torch.Generator().manual_seed(len(rows) + key_heads)
    shapes = [(len(rows), heads, 120, 8) for heads in (6, key_heads, key_heads)]
    q, k, v = (torch.randn(s, generator=draw, dtype=torch.float64, requires_grad=True) for s in shapes)
    upstream = torch.randn(len(rows), 120, 6, 8, generator=draw, dtype=torch.float64)
    lengths = document_lengths(positions_of(*rows))
    documents: Any = lengths
    if halved is None:
        documents = Starts(torch.tensor(starts_of(lengths, 300), dtype=torch.int32), 120)
    groups = torch.nn.Module()
    groups.num_key_value_groups = 6 // key_heads  # type: ignore[assignment]
    out, _ = attend(groups, q, k, v, None, documents=documents, scaling=0.3)
    got = torch.autograd.grad(out, (q, k, v), upstream)
    number = torch.stack([torch.arange(len(row)).repeat_interleave(torch.tensor(row)) for row in rows])
    seen = (number[:, :, None] == number[:, None, :]) & torch.ones(120, 120, dtype=torch.bool).tril()
    k_all, v_all = (t.repeat_interleave(6 // key_heads, 1) for t in (k, v))
    scores = (q @ k_all.transpose(2, 3) * 0.3).masked_fill(~seen[:, None], -torch.inf)
    expected = (scores.softmax(-1) @ v_all).transpose(1, 2)
    torch.testing.assert_close(out, expected, rtol=1e-10, atol=1e-12)
    for mine, reference in zip(got, torch.autograd.grad(expected, (q, k, v), upstream), strict=True):
        torch.testing.assert_close(mine, reference, rtol=1e-10, atol=1e-12)


MODELS = {
    "qwen2": (Qwen2Config, Qwen2ForCausalLM),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM),
}


@pytest.fixture(params=MODELS)
def pair(request: pytest.FixtureRequest) -> tuple[Any, Any]:
    """The same model twice: with this implementation, and with transformers' masks."""
    config_class, model_class = MODELS[request.param]
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2}
    models = []
    for kind in (NAME, "sdpa"):
        torch.manual_seed(0)
        config = config_class(
            **sizes, vocab_size=64, num_hidden_layers=2, head_dim=8, initializer_range=0.15, attn_implementation=kind
        )
        models.append(model_class(config))
    return models[0], models[1]


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_model_learns_the_same(pair: tuple[Any, Any], checkpointing: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packed_attention, "HALVED", 30)
    calls: list[int] = []
    pieces = packed_attention._pieces
    monkeypatch.setattr(packed_attention, "_pieces", lambda *given: calls.append(1) or pieces(*given))
    positions = positions_of([40, 1, 7, 16], [64])
    ids = torch.randint(64, (2, 64), generator=torch.Generator().manual_seed(5))
    results = []
    for model in pair:
        model.train()
        if checkpointing:
            model.activation_checkpointing_enable({"use_reentrant": False})
        loss, count = answer_loss(model, ids, ids, positions)
        loss.backward()
        results.append((loss, count, {n: p.grad for n, p in model.named_parameters()}))
    # Two layers, and again where they are computed again.
    assert len(calls) == (4 if checkpointing else 2)
    (mine, count, grads), (reference, other, wanted) = results
    assert count == other
    torch.testing.assert_close(mine, reference, rtol=1e-6, atol=0)
    for name, gradient in grads.items():
        torch.testing.assert_close(gradient, wanted[name], rtol=1e-4, atol=2e-5 * float(wanted[name].abs().max()))


class Counted(TorchDispatchMode):
    """Counts the calls of attention's kernels."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if "scaled_dot_product" in str(func):
            self.calls["backward" if "backward" in str(func) else "forward"] += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("computed_once", [0, 1, 2])
def test_what_is_computed_again_keeps_its_attention(
    pair: tuple[Any, Any], computed_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same bits with and without; nothing is left behind, for layers without a gradient nothing begins to wait."""
    monkeypatch.setattr(packed_attention, "HALVED", 30)
    model = pair[0].train()
    model.activation_checkpointing_enable({"use_reentrant": False})
    model.disable_input_require_grads()
    layers = model.model.layers
    for layer in layers[len(layers) - computed_once :]:
        layer.gradient_checkpointing = False
    positions = positions_of([40, 1, 7, 16], [64])
    ids = torch.randint(64, (2, 64), generator=torch.Generator().manual_seed(8))
    results = []
    for keeps in (True, False):
        known = model_arguments(model, positions)
        kept = known["kept"] = known["kept"] if keeps else None
        model.zero_grad()
        with Counted() as counted:
            hidden = model.model(input_ids=ids, position_ids=positions, use_cache=False, **known).last_hidden_state
            # Five pieces of two halved documents and two short ones, twice: in rows of their own.
            assert counted.calls["forward"] == 2 * (4 + 1 + 2)
            assert kept is None or set(kept) == {0, 1}
            hidden.square().sum().backward()
        again = 0 if keeps else 2 - computed_once
        assert counted.calls == {"forward": 7 * (2 + again), "backward": 14}
        assert not kept
        results.append([hidden.detach(), *(p.grad for p in model.model.parameters())])
    assert all(map(torch.equal, *results))
    known = model_arguments(model, positions)
    model.requires_grad_(False)
    layers[1].requires_grad_(True)
    model.model(input_ids=ids, position_ids=positions, use_cache=False, **known)
    assert set(known["kept"]) == {1}
    known["kept"].clear()
    with torch.no_grad():
        model.model(input_ids=ids, position_ids=positions, use_cache=False, **known)
    assert not known["kept"]


def test_nobody_takes_anothers_attention(pair: tuple[Any, Any]) -> None:
    """The same keywords for two calls, a layer that stands in two places: what was found could be either's."""
    positions = positions_of([40, 24])
    first, second = torch.randint(64, (2, 1, 64), generator=torch.Generator().manual_seed(10))
    results = []
    for shared in (True, False):
        model = pair[0].train()
        model.activation_checkpointing_enable({"use_reentrant": False})
        model.model.layers[1] = model.model.layers[0]
        model.zero_grad()
        known = model_arguments(model, positions)
        losses = []
        for ids in (first, second):
            given = known if shared else {**known, "kept": None}
            hidden = model.model(input_ids=ids, position_ids=positions, use_cache=False, **given).last_hidden_state
            losses.append(hidden.square().sum())
        sum(losses).backward()
        assert not known["kept"]
        results.append([*(x.detach() for x in losses), *(p.grad for p in model.model.parameters())])
    assert all(map(torch.equal, *results))


def test_what_attention_keeps_is_gone_with_the_backward_pass(pair: tuple[Any, Any]) -> None:
    """Also while somebody holds the loss."""
    positions = positions_of([64])
    ids = torch.randint(64, (1, 64), generator=torch.Generator().manual_seed(11))
    model = pair[0].train()
    model.activation_checkpointing_enable({"use_reentrant": False})
    known = model_arguments(model, positions)
    loss = model.model(input_ids=ids, position_ids=positions, use_cache=False, **known).last_hidden_state.sum()
    assert known["kept"]._block is not None
    loss.backward()
    assert known["kept"]._block is None


def test_under_autocast_it_is_torchs_own_attention_to_the_bit() -> None:
    """Queries and keys come in float32 from their rotation: gradients of shared heads and of halves are added up so."""
    draw = torch.Generator().manual_seed(12)
    q, k, v = (torch.randn(1, heads, 400, 8, generator=draw) for heads in (6, 2, 2))
    given = [t.requires_grad_() for t in (q, k, v.bfloat16())]
    upstream = torch.randn(1, 400, 6, 8, generator=draw).bfloat16()
    module = torch.nn.Module()
    module.num_key_value_groups = 3  # type: ignore[assignment]
    with torch.autocast("cpu", torch.bfloat16):
        out, _ = attend(module, *given, None, documents=((400,),), kept=packed_attention.Kept(1))
        q, k, v = given[0], *(t.repeat_interleave(3, 1) for t in given[1:])
        own = torch.nn.functional.scaled_dot_product_attention
        first = own(q[:, :, :200], k[:, :, :200], v[:, :, :200], is_causal=True)
        seen = torch.ones(200, 400, dtype=torch.bool).tril(200)
        second = own(q[:, :, 200:], k, v, attn_mask=seen)
        expected = torch.cat([first, second], 2).transpose(1, 2)
    assert out.dtype == torch.bfloat16 and torch.equal(out, expected)
    for mine, reference in zip(
        torch.autograd.grad(out, given, upstream), torch.autograd.grad(expected, given, upstream), strict=True
    ):
        assert mine.dtype == reference.dtype and torch.equal(mine, reference)


def test_documents_that_are_not_the_rows_are_refused() -> None:
    q = torch.randn(2, 2, 6, 8)
    module = torch.nn.Module()
    for documents in (((5,), (6,)), ((5,),), ((6,), (6,), (6,))):
        with pytest.raises(ValueError, match="expected 6 in each of 2 rows"):
            attend(module, q, q, q, None, documents=documents)


def test_numbers_may_lie_in_any_order() -> None:
    q, k, v = (torch.randn(1, 2, 8, 5, dtype=torch.float64).transpose(2, 3).requires_grad_() for _ in range(3))
    upstream = torch.randn(1, 5, 2, 8, dtype=torch.float64)
    module = torch.nn.Module()
    found = []
    for tensors in ((q, k, v), [t.detach().contiguous().requires_grad_() for t in (q, k, v)]):
        out, _ = attend(module, *tensors, None, documents=((2, 3),))
        found.append([out.detach(), *torch.autograd.grad(out, tensors, upstream)])
    assert all(map(torch.equal, *found))


def test_dropout_is_transformers_own(pair: tuple[Any, Any]) -> None:
    positions = positions_of([40, 24]).expand(2, -1)
    ids = torch.randint(64, (2, 64), generator=torch.Generator().manual_seed(9))
    losses = []
    for model in pair:
        for layer in model.model.layers:
            layer.self_attn.attention_dropout = 0.5
        torch.manual_seed(3)
        losses.append(answer_loss(model.train(), ids, ids, positions)[0])
    torch.testing.assert_close(*losses, rtol=1e-5, atol=0)


def test_without_documents_it_is_sdpa_to_the_bit(pair: tuple[Any, Any]) -> None:
    """Padding on the left, a cache, packed rows that somebody else brings."""
    ids = torch.randint(64, (2, 20), generator=torch.Generator().manual_seed(6))
    mask = torch.ones(2, 20, dtype=torch.int64)
    mask[0, :7] = 0
    inputs = [
        {"input_ids": ids, "attention_mask": mask},
        {"input_ids": ids, "position_ids": positions_of([9, 11], [20]), "use_cache": False},
    ]
    with torch.no_grad():
        for given in inputs:
            assert torch.equal(*(model.eval()(**given).logits for model in pair))
        written = [
            model.generate(ids, attention_mask=mask, max_new_tokens=6, do_sample=False, pad_token_id=0)
            for model in pair
        ]
    assert torch.equal(*written) and written[0].shape == (2, 26)


def test_models_and_devices_that_it_is_not_for_make_their_own_mask(pair: tuple[Any, Any]) -> None:
    positions = positions_of([9, 11])
    assert model_arguments(pair[0], positions)["documents"] == ((9, 11),)
    assert model_arguments(pair[1], positions) == {"attention_mask": None}
    assert model_arguments(pair[0], positions.to("meta")) == {"attention_mask": None}
    pair[0].config.layer_types = ["full_attention", "sliding_attention"]
    assert model_arguments(pair[0], positions) == {"attention_mask": None}


def test_a_checkpoints_model_attends_by_document(tmp_path: Any) -> None:
    """And no document is touched by what stands in another, in a single bit."""
    import_source(write_source(tmp_path / "source", tiny_config()), tmp_path / "m.pt")
    model = model_from_checkpoint(load_checkpoint(tmp_path / "m.pt"))
    assert model.config._attn_implementation == NAME
    positions = positions_of([13, 1, 26])
    ids = torch.randint(250, (1, 40), generator=torch.Generator().manual_seed(7))
    other = ids.clone()
    other[0, :14] = (other[0, :14] + 100) % 250
    with torch.no_grad():
        known = model_arguments(model, positions)
        first, second = (
            model.model(input_ids=i, position_ids=positions, use_cache=False, **known).last_hidden_state
            for i in (ids, other)
        )
    assert torch.equal(first[:, 14:], second[:, 14:]) and not torch.equal(first[:, :14], second[:, :14])

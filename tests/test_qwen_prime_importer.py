"""The importer: what it costs trained models, what it records, and what it says of sources it cannot convert."""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import math
import os
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from huggingface_hub import constants as hub_constants
from safetensors.torch import load_file, save_file
from tiny_models import (
    difference,
    encode_documents,
    import_source,
    random_model,
    rewrite_json,
    rewrite_weights,
    stories,
    tiny_config,
    write_source,
)
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, Qwen3Config

import manifolds
import prime_checkpoint
import prime_cli
import qwen_prime_importer as importer
import qwen_prime_wrapper as wrapper
from ghost_core import grids_of
from ghost_grid import HEADROOM
from prime_checkpoint import CheckpointError, load_checkpoint
from qwen_prime_importer import ImportConfig, ImportProblem
from qwen_prime_wrapper import ModelError

ROOT = Path(__file__).resolve().parent.parent
KL_LIMIT, LOSS_LIMIT, TOKENS = 1e-7, 1e-5, 8192
TRAINED = ("stories260K-qwen2", "atto-qwen2-bias", "qwen3-trained-here", "tiny_coder")
UP = "model.layers.1.mlp.up_proj.weight"

Imported = tuple[Path, Path, dict[str, Any]]
"""Source folder, checkpoint, report."""


pytestmark = pytest.mark.usefixtures("one_thread")


# -- exactness on trained models --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained_qwen3(shared_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Qwen3 (q_norm and k_norm, head_dim 24 beside hidden / heads 16, untied) trained on stories, as a folder."""
    folder = tmp_path_factory.mktemp("qwen3")
    atto = shared_data / "models" / "atto-qwen2-bias"
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_bytes((atto / name).read_bytes())
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    texts, _ = stories(shared_data)
    stream = torch.cat([torch.tensor(ids) for ids in tokenizer(texts)["input_ids"]])
    config = Qwen3Config(
        vocab_size=2048,
        hidden_size=64,
        intermediate_size=160,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=24,
        max_position_embeddings=256,
        tie_word_embeddings=False,
        bos_token_id=2045,
        eos_token_id=2046,
    )
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.01, betas=(0.9, 0.95))
    generator = torch.Generator().manual_seed(0)
    steps = 240
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = 1e-2 * min((step + 1) / 10, 1 - step / steps)
        starts = torch.randint(len(stream) - 65, (8, 1), generator=generator)
        batch = stream[starts + torch.arange(65)]
        loss = model(input_ids=batch, labels=batch, use_cache=False).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    model.eval().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module", params=TRAINED)
def trained(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Imported:
    if request.param == "tiny_coder":
        source = ROOT / "assets" / "tiny_coder"
        if not (source / "model.safetensors").is_file():
            pytest.skip(f"{source} has no weights: make them with assets/make_tiny_coder.py")
    elif request.param == "qwen3-trained-here":
        source = request.getfixturevalue("trained_qwen3")
    else:
        source = request.getfixturevalue("shared_data") / "models" / request.param
    checkpoint = tmp_path_factory.mktemp("trained") / "prime_init.pt"
    return source, checkpoint, import_source(source, checkpoint)


def domain_texts(source: Path, request: pytest.FixtureRequest) -> list[str]:
    """Text of a model's domain that its training here did not see: Python source, or stories."""
    if source.name != "tiny_coder":
        return stories(request.getfixturevalue("shared_data"))[1]
    library = Path(sysconfig.get_path("stdlib"))
    return [(library / name).read_text(encoding="utf-8") for name in ("argparse.py", "heapq.py", "textwrap.py")]


def test_conversion_costs_nothing_measurable(trained: Imported, request: pytest.FixtureRequest) -> None:
    source_folder, checkpoint, report = trained
    source, _, _ = wrapper.load_model(source_folder)
    model, tokenizer, _ = wrapper.load_model(checkpoint)
    window = min(512, model.config.max_position_embeddings)
    pieces = encode_documents(tokenizer, domain_texts(source_folder, request), window, TOKENS)
    kl, gap, loss, count = difference(model, source, pieces)
    print(f"KL {kl:.3g}, loss {loss:.4f}, difference {gap:+.3g} nats, lowest SNR {report['lowest_snr_db']} dB")
    assert count >= TOKENS
    # In its domain a trained model is far better than guessing; else the comparison would mean little.
    assert loss < 0.7 * math.log(model.config.vocab_size)
    # More than 0: the two are different networks.
    assert 0 < kl <= KL_LIMIT
    assert abs(gap) <= LOSS_LIMIT


def test_every_tensor_of_a_trained_model_keeps_75_db(trained: Imported) -> None:
    source_folder, checkpoint, report = trained
    weights = load_file(source_folder / "model.safetensors")
    grids = grids_of(wrapper.model_from_checkpoint(load_checkpoint(checkpoint)))
    assert {f"{name.removesuffix('.grid')}.weight" for name in grids} == set(report["per_tensor"])
    for name, grid in grids.items():
        origin = f"{name.removesuffix('.grid')}.weight"
        dense = weights[origin].double()
        noise = (grid.dequantize().double() - dense).square().sum()
        snr = 10 * math.log10(float(dense.square().sum() / noise))
        line = report["per_tensor"][origin]
        assert line["snr_db"] == pytest.approx(snr, abs=0.01)
        assert snr >= manifolds.build().snr_limit_db or line["worst_row"]["snr_db"] < manifolds.build().snr_limit_db, (
            origin
        )


def test_floats_of_a_trained_model_are_kept_exactly(trained: Imported) -> None:
    source_folder, checkpoint, _ = trained
    weights = load_file(source_folder / "model.safetensors")
    kept = {n: t for n, t in load_checkpoint(checkpoint)["model"].items() if ".grid." not in n}
    assert any(n.endswith("norm.weight") for n in kept)
    assert all(torch.equal(t, weights[n].float()) for n, t in kept.items())
    grids = {n for n in weights if weights[n].ndim == 2}
    assert set(weights) == grids | set(kept)


def test_the_trained_qwen3_has_what_makes_it_one(trained_qwen3: Path) -> None:
    names = set(load_file(trained_qwen3 / "model.safetensors"))
    assert {"model.layers.0.self_attn.q_norm.weight", "model.layers.0.self_attn.k_norm.weight"} <= names
    hf_config = json.loads((trained_qwen3 / "config.json").read_text(encoding="utf-8"))
    assert hf_config["head_dim"] != hf_config["hidden_size"] // hf_config["num_attention_heads"]


def test_the_kept_tokenizer_is_the_tokenizer_json(trained: Imported, request: pytest.FixtureRequest) -> None:
    source_folder, checkpoint, _ = trained
    truth = Tokenizer.from_file(str(source_folder / "tokenizer.json"))
    tokenizer = wrapper.tokenizer_from_checkpoint(load_checkpoint(checkpoint))
    for text in domain_texts(source_folder, request)[:3]:
        assert (
            tokenizer(text, add_special_tokens=False)["input_ids"] == truth.encode(text, add_special_tokens=False).ids
        )


# -- what is recorded -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Imported:
    folder = tmp_path_factory.mktemp("tiny")
    source = write_source(folder / "source", tiny_config())
    return source, folder / "tiny_prime_init.pt", import_source(source, folder / "tiny_prime_init.pt")


@pytest.fixture
def source(tiny: Imported, tmp_path: Path) -> Path:
    """A copy of the tiny source that a test may damage."""
    return Path(shutil.copytree(tiny[0], tmp_path / "source"))


def sha256_of(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def same_tensors(first: Path, second: Path) -> bool:
    """Whether two checkpoints hold the same model, bit by bit, and the same probes, to within the order of a sum."""
    a, b = load_checkpoint(first), load_checkpoint(second)
    assert list(a["model"]) == list(b["model"]) and list(a["probes"]) == list(b["probes"])
    return all(torch.equal(a["model"][n], t) for n, t in b["model"].items()) and all(
        torch.allclose(a["probes"][n], t, rtol=1e-5, atol=1e-5) for n, t in b["probes"].items()
    )


def test_provenance_and_stage(tiny: Imported) -> None:
    source, path, report = tiny
    checkpoint = load_checkpoint(path)
    wanted = {name: sha256_of(source / name) for name in ("config.json", "model.safetensors")}
    assert checkpoint["source"] == {"id": str(source), "revision": None, "files": wanted}
    assert report["source"] == checkpoint["source"]
    assert (checkpoint["stage"], checkpoint["votes"], checkpoint["train_state"]) == ("init", {}, {})
    assert checkpoint["hf_config"] == json.loads((source / "config.json").read_text(encoding="utf-8"))
    assert checkpoint["created_by"]["program"] == "qwen_prime_importer.py"
    assert report["sha256"] == prime_checkpoint.check_file(path)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert checkpoint["tokenizer"]["files"][name].numpy().tobytes() == (source / name).read_bytes()


def test_report_has_its_fields(tiny: Imported) -> None:
    source, path, report = tiny
    weights = load_file(source / "model.safetensors")
    assert report["parameters"] == sum(t.numel() for t in weights.values())
    assert report["tensors"] == len(weights)
    assert report["output"] == str(path)
    assert report["manifold"]["name"] == "prime-harmonic"
    assert report["seconds"] > 0 and report["peak_rss_bytes"] > 100_000_000
    matrices = {n: list(t.shape) for n, t in weights.items() if t.ndim == 2}
    assert {n: line["shape"] for n, line in report["per_tensor"].items()} == matrices
    assert report["lowest_snr_db"] == min(line["snr_db"] for line in report["per_tensor"].values())
    for line in report["per_tensor"].values():
        assert line["saturated"] == 0 and 0 <= line["zeros"] < 0.01


def test_shares_of_saturated_and_zero_weights(source: Path, tmp_path: Path) -> None:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors[UP][:24] = 0.0

    rewrite_weights(source, change)
    report = import_source(source, tmp_path / "x.pt", headroom=1.0)
    line = report["per_tensor"][UP]
    assert line["zeros"] == pytest.approx(0.25, abs=0.001)
    # Without headroom the largest weight of each row is at the end of the table.
    assert report["headroom"] == 1.0
    indices = load_checkpoint(tmp_path / "x.pt")["model"]["model.layers.1.mlp.up_proj.grid.indices"]
    assert int((indices.abs() == 32767).sum()) >= 72
    assert line["saturated"] <= 72 / (96 * 48)


def test_the_largest_weight_of_a_row_has_headroom(tiny: Imported) -> None:
    grids = grids_of(wrapper.model_from_checkpoint(load_checkpoint(tiny[1])))
    for name, grid in grids.items():
        largest = grid.dequantize().abs().amax(1) / grid.scale
        assert torch.allclose(largest, torch.full_like(largest, 1 / HEADROOM), atol=5e-5), name


def test_sharded_and_single_files_give_the_same_checkpoint(tiny: Imported, tmp_path: Path) -> None:
    _, path, report = tiny
    sharded = write_source(tmp_path / "sharded", tiny_config(), max_shard_size="60KB")
    shards = sorted(sharded.glob("model-*.safetensors"))
    assert len(shards) > 2 and (sharded / "model.safetensors.index.json").is_file()
    assert not (sharded / "model.safetensors").exists()
    found = import_source(sharded, tmp_path / "x.pt")
    assert same_tensors(path, tmp_path / "x.pt")
    assert found["per_tensor"] == report["per_tensor"]
    assert found["source"]["files"] == {f.name: sha256_of(f) for f in [sharded / "config.json", *shards]}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_a_source_in_another_float_type_keeps_its_values(source: Path, tmp_path: Path, dtype: torch.dtype) -> None:
    def change(to: torch.dtype) -> Callable[[dict[str, torch.Tensor]], None]:
        return lambda tensors: tensors.update({n: t.to(to) for n, t in tensors.items()})

    rewrite_weights(source, change(dtype))
    report = import_source(source, tmp_path / "other.pt")
    rewrite_weights(source, change(torch.float32))
    import_source(source, tmp_path / "float32.pt")
    assert same_tensors(tmp_path / "other.pt", tmp_path / "float32.pt")
    assert report["lowest_snr_db"] > manifolds.build().snr_limit_db


def test_two_imports_are_the_same_bytes_of_tensors(tiny: Imported, tmp_path: Path) -> None:
    import_source(tiny[0], tmp_path / "again.pt")
    assert same_tensors(tiny[1], tmp_path / "again.pt")


@pytest.mark.parametrize(("name", "low", "high"), [("linear", 75, 100), ("compact", 50, 60)])
def test_another_manifold(name: str, low: float, high: float, tiny: Imported, tmp_path: Path) -> None:
    """It is recorded whole, and every tensor keeps what its limit promises."""
    report = import_source(tiny[0], tmp_path / "other.pt", manifold=name)
    table = manifolds.build(name)
    recorded = load_checkpoint(tmp_path / "other.pt")["manifold"]
    assert recorded["name"] == report["manifold"]["name"] == name
    assert recorded["sha256"] == table.sha256 and recorded["vote_bits"] == table.vote_bits
    assert torch.equal(recorded["values"], table.values)
    assert not same_tensors(tiny[1], tmp_path / "other.pt")
    assert low == table.snr_limit_db < report["lowest_snr_db"] < high
    assert not any("worst_row" in line for line in report["per_tensor"].values())


def test_words_with_room_for_votes_are_imported_without_votes(tiny: Imported, tmp_path: Path) -> None:
    """The nearest of 1,023 levels, in float64; nothing in the low bits."""
    source, _, _ = tiny
    import_source(source, tmp_path / "compact.pt", manifold="compact")
    table = manifolds.build("compact")
    model = load_checkpoint(tmp_path / "compact.pt")["model"]
    levels = torch.cat([-table.fixed.flip(0), table.fixed[1:]]).double() / 2.0**40
    for name, dense in load_file(source / "model.safetensors").items():
        if dense.ndim == 2:
            words = model[f"{name.removesuffix('weight')}grid.indices"]
            scale = model[f"{name.removesuffix('weight')}grid.scale"].double()[:, None]
            assert table.unused(words) == 0 and not bool((words % 64).any()), name
            share = dense.double() / scale
            found = levels[words.long() // 64 + table.top]
            nearest = (share[..., None] - levels).abs().amin(-1) if dense.numel() < 8000 else None
            if nearest is not None:
                assert float(((found - share).abs() - nearest).max()) < 1e-7, name


def test_a_low_snr_names_the_row_that_forbids_more(tmp_path: Path) -> None:
    name = "model.layers.0.mlp.down_proj.weight"
    source = write_source(tmp_path / "source", tiny_config(intermediate_size=1024))

    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors[name][3, 5] = 500.0

    rewrite_weights(source, change)
    report = import_source(source, tmp_path / "x.pt", manifold="linear")
    line = report["per_tensor"][name]
    assert line["snr_db"] < manifolds.build().snr_limit_db
    assert line["worst_row"]["row"] == 3
    assert line["worst_row"]["snr_db"] == pytest.approx(line["snr_db"], abs=0.1)
    assert line["worst_row"]["peak_to_rms"] > 30
    assert "worst_row" not in report["per_tensor"][UP]


def test_an_all_zero_row_works(source: Path, tmp_path: Path) -> None:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors[UP][7] = 0.0
        tensors["model.layers.0.self_attn.o_proj.weight"].zero_()

    rewrite_weights(source, change)
    report = import_source(source, tmp_path / "x.pt")
    model = wrapper.model_from_checkpoint(load_checkpoint(tmp_path / "x.pt"))
    grid = model.model.layers[1].mlp.up_proj.grid
    assert not grid.indices[7].any() and not grid.dequantize()[7].any()
    assert float(grid.scale[7]) > 0 and grid.indices[8].any()
    whole = model.model.layers[0].self_attn.o_proj.grid
    assert not whole.indices.any() and bool((whole.scale > 0).all())
    assert report["per_tensor"]["model.layers.0.self_attn.o_proj.weight"]["snr_db"] is None
    assert report["per_tensor"]["model.layers.0.self_attn.o_proj.weight"]["zeros"] == 1.0
    assert torch.isfinite(model(torch.arange(20)[None]).logits).all()


def test_a_tied_model_may_carry_its_head_twice(tiny: Imported, source: Path, tmp_path: Path) -> None:
    rewrite_weights(source, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].clone()}))
    import_source(source, tmp_path / "x.pt")
    assert same_tensors(tiny[1], tmp_path / "x.pt")


def test_stored_rotary_frequencies_are_ignored(tiny: Imported, source: Path, tmp_path: Path) -> None:
    rewrite_weights(source, lambda t: t.update({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(6)}))
    import_source(source, tmp_path / "x.pt")
    assert same_tensors(tiny[1], tmp_path / "x.pt")


def test_llama_is_converted_by_the_same_swap(tmp_path: Path) -> None:
    source = write_source(tmp_path / "llama", tiny_config("llama", tie_word_embeddings=False))
    report = import_source(source, tmp_path / "x.pt")
    assert report["parameters"] == sum(t.numel() for t in load_file(source / "model.safetensors").values())
    model, _, _ = wrapper.load_model(tmp_path / "x.pt")
    dense, _, _ = wrapper.load_model(source)
    kl, _, _, _ = difference(model, dense, [torch.arange(100)[None]])
    assert kl < 1e-4


def test_a_hub_id_is_found_in_the_cache_with_its_revision(
    tiny: Imported, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    revision = "0123456789abcdef0123456789abcdef01234567"
    repository = tmp_path / "hub" / "models--made-up--tiny"
    shutil.copytree(tiny[0], repository / "snapshots" / revision)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(revision, encoding="utf-8")
    monkeypatch.setattr(hub_constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(hub_constants, "HF_HUB_OFFLINE", True)
    monkeypatch.chdir(tmp_path)
    import_source("made-up/tiny", tmp_path / "x.pt")
    recorded = load_checkpoint(tmp_path / "x.pt")["source"]
    assert (recorded["id"], recorded["revision"]) == ("made-up/tiny", revision)
    assert same_tensors(tiny[1], tmp_path / "x.pt")


# -- bad input: one line, nothing written -----------------------------------------------------------------------------


@pytest.fixture
def refuse(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Run the command; it must exit 1 with one line of error, which is returned, and leave the output folder alone."""
    outputs = tmp_path / "outputs"
    outputs.mkdir()

    def run(model: Path | str, *more: str, output: Path = outputs / "x.pt", words: Sequence[str] = ()) -> str:
        before = {p: p.read_bytes() if p.is_file() else None for p in outputs.rglob("*")}
        arguments = ["--model", str(model), "--output", str(output), *more]
        capsys.readouterr()
        errors = (ImportProblem, ModelError, CheckpointError)
        assert prime_cli.run(ImportConfig, importer.main, errors, arguments) == 1
        printed = capsys.readouterr()
        text = printed.err[printed.err.index("error: ") :]
        assert printed.out == "" and text.count("\n") == 1 and text.endswith("\n"), text
        assert {p: p.read_bytes() if p.is_file() else None for p in outputs.rglob("*")} == before
        for word in words:
            assert word in text
        return text

    return run


@pytest.mark.parametrize("content", ["[]", "3", "null", "{"])
def test_generation_settings_that_are_no_object(
    refuse: Callable[..., str], tiny: Imported, tmp_path: Path, content: str
) -> None:
    """Found at the import, not when the model is opened for the first time."""
    source = shutil.copytree(tiny[0], tmp_path / "source")
    (source / "generation_config.json").write_text(content)
    refuse(source, words=["generation_config.json is unusable"])


def test_missing_folder(refuse: Callable[..., str], tmp_path: Path) -> None:
    refuse(tmp_path / "none", words=["no such folder", str(tmp_path / "none")])
    (tmp_path / "file").write_text("x", encoding="utf-8")
    refuse(tmp_path / "file", words=[str(tmp_path / "file")])
    refuse("not an id", words=["no such folder"])
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    refuse(tmp_path / "model.gguf", words=["is a file, expected a Hugging Face model folder"])


@pytest.mark.parametrize("content", [None, "{", "", "[]", "null", "3", b"\xff\xfe{"], ids=repr)
def test_no_config_or_a_broken_one(refuse: Callable[..., str], source: Path, content: str | bytes | None) -> None:
    path = source / "config.json"
    if content is None:
        path.unlink()
    else:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    refuse(source, words=["config.json"])


def test_unsupported_architecture(refuse: Callable[..., str], source: Path) -> None:
    rewrite_json(source / "config.json", model_type="gpt2", architectures=["GPT2LMHeadModel"])
    refuse(source, words=["gpt2", "GPT2LMHeadModel", *wrapper.ARCHITECTURES, *wrapper.ARCHITECTURES.values()])


@pytest.mark.parametrize(("field", "value"), [("hidden_size", "big"), ("hidden_act", "nonsense"), ("hidden_size", 0)])
def test_a_config_that_transformers_refuses(refuse: Callable[..., str], source: Path, field: str, value: Any) -> None:
    rewrite_json(source / "config.json", **{field: value})
    refuse(source, words=["config.json"])


TENSOR_DAMAGE: dict[str, tuple[Callable[[dict[str, torch.Tensor]], object], list[str]]] = {
    "missing weight": (lambda t: t.pop(UP), [UP, "lacks", "(96, 48)"]),
    "missing bias": (lambda t: t.pop("model.layers.0.self_attn.k_proj.bias"), ["self_attn.k_proj.bias", "lacks"]),
    "extra": (
        lambda t: t.update({"model.layers.2.mlp.up_proj.weight": t[UP] * 1}),
        ["model.layers.2.mlp.up_proj.weight"],
    ),
    "extra bias": (lambda t: t.update({"model.layers.1.self_attn.o_proj.bias": torch.ones(48)}), ["o_proj.bias"]),
    "shape": (lambda t: t.update({UP: t[UP].T.contiguous()}), [UP, "(48, 96)", "(96, 48)"]),
    "norm shape": (lambda t: t.update({"model.norm.weight": torch.ones(())}), ["model.norm.weight"]),
    "unequal head": (
        lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"] + 1e-3}),
        ["lm_head.weight", "model.embed_tokens.weight", "tie_word_embeddings"],
    ),
    "NaN": (lambda t: t[UP][5].fill_(math.nan), [UP, "NaN"]),
    "one Inf": (lambda t: t[UP][5, 6].fill_(math.inf), [UP, "Inf"]),
    "minus Inf": (lambda t: t[UP][0, 0].fill_(-math.inf), [UP, "Inf"]),
    "NaN bias": (lambda t: t["model.layers.0.self_attn.q_proj.bias"][1].fill_(math.nan), ["q_proj.bias", "NaN"]),
    "Inf norm": (lambda t: t["model.norm.weight"][1].fill_(math.inf), ["model.norm.weight", "Inf"]),
    "double too large": (
        lambda t: t.update({"model.norm.weight": torch.full((48,), 1e300, dtype=torch.float64)}),
        ["model.norm.weight"],
    ),
    "integers": (lambda t: t.update({UP: t[UP].to(torch.int8)}), [UP, "int8", "bfloat16"]),
    "float8": (lambda t: t.update({UP: t[UP].to(torch.float8_e4m3fn)}), [UP, "float8", "bfloat16"]),
    "integer bias": (
        lambda t: t.update({"model.layers.0.self_attn.q_proj.bias": torch.ones(48, dtype=torch.int32)}),
        ["q_proj.bias", "int32"],
    ),
}


@pytest.mark.parametrize("case", TENSOR_DAMAGE)
def test_a_source_with_wrong_tensors(refuse: Callable[..., str], source: Path, case: str) -> None:
    damage, words = TENSOR_DAMAGE[case]
    rewrite_weights(source, damage)
    refuse(source, words=words)


def test_an_untied_model_without_its_head(refuse: Callable[..., str], source: Path) -> None:
    rewrite_json(source / "config.json", tie_word_embeddings=False)
    refuse(source, words=["lm_head.weight", "lacks"])


@pytest.mark.parametrize("keep", [0, 5, 400, -1])
def test_truncated_safetensors(refuse: Callable[..., str], source: Path, keep: int) -> None:
    path = source / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    refuse(source, words=["model.safetensors"])


def test_no_safetensors(refuse: Callable[..., str], source: Path) -> None:
    (source / "model.safetensors").rename(source / "pytorch_model.bin")
    refuse(source, words=["no safetensors", "save_pretrained"])


def test_a_shard_that_the_index_names_is_missing(refuse: Callable[..., str], tmp_path: Path) -> None:
    sharded = write_source(tmp_path / "sharded", tiny_config(), max_shard_size="60KB")
    shard = sorted(sharded.glob("model-*.safetensors"))[1]
    shard.unlink()
    refuse(sharded, words=[shard.name, "index.json"])


@pytest.mark.parametrize(
    "content", ["{", "[]", "{}", '{"weight_map": []}', '{"weight_map": {"a": 3}}', '{"weight_map": {}}']
)
def test_a_broken_index(refuse: Callable[..., str], source: Path, content: str) -> None:
    # Beside a model.safetensors nobody reads it.
    (source / "model.safetensors").rename(source / "model-00001-of-00001.safetensors")
    (source / "model.safetensors.index.json").write_text(content, encoding="utf-8")
    refuse(source)


def test_weights_are_chosen_as_transformers_does(
    refuse: Callable[..., str], tiny: Imported, source: Path, tmp_path: Path
) -> None:
    """Other files and an older save's index beside model.safetensors are not the model."""
    single, backup = source / "model.safetensors", source / "zz_backup.safetensors"
    save_file({name: tensor * 0.5 for name, tensor in load_file(single).items()}, backup)
    index = source / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": dict.fromkeys(load_file(single), backup.name)}), encoding="utf-8")
    import_source(source, tmp_path / "x.pt")
    assert same_tensors(tiny[1], tmp_path / "x.pt")
    single.rename(source / "aa.safetensors")
    import_source(source, tmp_path / "backup.pt")
    assert not same_tensors(tiny[1], tmp_path / "backup.pt")
    index.unlink()
    refuse(source, words=["aa.safetensors", backup.name, "expected once"])


def test_a_tensor_in_another_shard_than_the_index_says(refuse: Callable[..., str], tmp_path: Path) -> None:
    sharded = write_source(tmp_path / "sharded", tiny_config(), max_shard_size="60KB")
    path = sharded / "model.safetensors.index.json"
    content = json.loads(path.read_text(encoding="utf-8"))
    first = sorted(content["weight_map"].values())[0]
    content["weight_map"]["model.norm.weight"] = first
    path.write_text(json.dumps(content), encoding="utf-8")
    refuse(sharded, words=["model.norm.weight", first, "index"])


@pytest.mark.parametrize(
    ("name", "content"),
    [
        *[("tokenizer.json", content) for content in ("", "garbage", "null", "[]", "{}")],
        *[("tokenizer_config.json", content) for content in ("", "garbage", "null", "[]")],
    ],
)
def test_unreadable_tokenizer(refuse: Callable[..., str], source: Path, name: str, content: str) -> None:
    (source / name).write_text(content, encoding="utf-8")
    refuse(source, words=["tokenizer", str(source)])


@pytest.mark.parametrize("named", ["TokenizersBackend", "Qwen2Tokenizer", None])
def test_settings_of_a_tokenizer_without_its_vocabulary(
    refuse: Callable[..., str], source: Path, named: str | None
) -> None:
    """As when only *.json and *.safetensors were downloaded of a source that keeps vocab.json and merges.txt."""
    (source / "tokenizer.json").unlink()
    rewrite_json(source / "tokenizer_config.json", tokenizer_class=named)
    refuse(source, words=["tokenizer", str(source)])


def test_no_tokenizer(refuse: Callable[..., str], source: Path) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (source / name).unlink()
    refuse(source, words=["tokenizer", str(source)])


def test_a_tokenizer_larger_than_the_vocabulary(refuse: Callable[..., str], tmp_path: Path) -> None:
    source = write_source(tmp_path / "source", tiny_config(vocab_size=258))
    refuse(source, words=["259", "258"])


def test_an_existing_output_is_kept_without_force(refuse: Callable[..., str], tiny: Imported, tmp_path: Path) -> None:
    output = tmp_path / "outputs" / "x.pt"
    output.write_bytes(b"precious")
    refuse(tiny[0], words=["exists", "--force"])
    import_source(tiny[0], output, force=True)
    assert same_tensors(tiny[1], output)


def test_an_output_that_cannot_be_a_file(refuse: Callable[..., str], tiny: Imported, tmp_path: Path) -> None:
    refuse(tiny[0], output=tmp_path / "outputs" / "none" / "x.pt", words=["no such folder", "none"])
    refuse(tiny[0], output=tmp_path / "outputs", words=["is a folder"])
    refuse(tiny[0], "--force", output=tmp_path / "outputs", words=["is a folder"])


@pytest.mark.parametrize("report", ["outputs/none/report.json", "outputs"])
def test_an_unwritable_report(refuse: Callable[..., str], tiny: Imported, tmp_path: Path, report: str) -> None:
    refuse(tiny[0], "--report", str(tmp_path / report), words=[str(tmp_path / report)])


@pytest.mark.parametrize("device", ["nonsense", "cuda:99", "meta", "mps"])
def test_a_device_that_is_not_there(refuse: Callable[..., str], tiny: Imported, device: str) -> None:
    refuse(tiny[0], "--device", device, words=[device])


def test_too_little_free_disk(refuse: Callable[..., str], tiny: Imported, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=100_000))
    refuse(tiny[0], words=["disk", "GB free"])


@pytest.mark.parametrize("existing", [False, True])
def test_the_disk_fills_up_while_writing(
    refuse: Callable[..., str], tiny: Imported, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, existing: bool
) -> None:
    if existing:
        (tmp_path / "outputs" / "x.pt").write_bytes(b"precious")
    written = []

    def save(checkpoint: object, file: Any) -> None:
        file.write(b"half")
        file.flush()
        written.append(file.name)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(prime_checkpoint.torch, "save", save)
    refuse(tiny[0], "--force", words=["cannot write", "x.pt", "No space left"])
    assert written


def test_nothing_is_read_when_the_output_cannot_be_written(
    tiny: Imported, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "x.pt").write_bytes(b"precious")
    monkeypatch.setattr(importer, "open_source", lambda *_: pytest.fail("the source was opened"))
    with pytest.raises(ImportProblem, match="exists"):
        importer.main(ImportConfig(str(tiny[0]), tmp_path / "x.pt"))


def test_the_log_says_what_was_written(tiny: Imported, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        report = import_source(tiny[0], tmp_path / "x.pt")
    last = caplog.messages[-1]
    assert f"{report['parameters']:,} parameters" in last and "dB" in last and str(tmp_path / "x.pt") in last


# -- as a command -----------------------------------------------------------------------------------------------------


def command(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(folder / "empty_home"), "OMP_NUM_THREADS": "1"}
    script = str(ROOT / "qwen_prime_importer.py")
    return subprocess.run(
        [sys.executable, script, *arguments], cwd=folder, env=environment, capture_output=True, text=True, check=False
    )


def test_an_unknown_hub_id_offline_is_one_line_and_exit_1(tmp_path: Path) -> None:
    done = command(tmp_path, "--model", "made-up/no-such-model", "--output", "x.pt")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
    assert "made-up/no-such-model" in done.stderr
    assert not list(tmp_path.glob("*.pt")) and not list(tmp_path.glob(".*"))


def test_bad_usage_is_one_line_and_exit_2(tmp_path: Path) -> None:
    done = command(tmp_path, "--model", "made-up/no-such-model", "--output", "x.pt", "--manifold", "cubic")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
    assert "prime-harmonic" in done.stderr


@pytest.mark.parametrize("headroom", [0.5, 17.0, math.nan])
def test_headroom_out_of_range_is_refused(headroom: float, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="headroom"):
        ImportConfig("x", tmp_path / "x.pt", headroom=headroom)


def test_random_models_have_no_parameter_left_at_one_or_zero() -> None:
    """What the tests above rest on: a dropped norm or bias changes the model."""
    for name, parameter in random_model(tiny_config("qwen3")).named_parameters():
        assert parameter.std() > 0.05, name

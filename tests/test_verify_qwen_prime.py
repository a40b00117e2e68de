"""The verifier: a good checkpoint passes, and each kind of damage fails under the name of the check that is for it."""

from __future__ import annotations

import json
import math
import os
import pickle
import random
from collections.abc import Callable
from pathlib import Path
from string import ascii_lowercase
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tiny_models import clone_tree, import_source, plant, rewrite_json, stories, tiny_config, write_source

import manifolds
import prime_cli
import verify_qwen_prime as verifier
from ballots import Ballot, VoteRule
from ghost_core import grids_of
from ghost_grid import GhostGrid
from momentum_rules import CompactRule, MomentumRule
from prime_checkpoint import (
    CheckpointError,
    _seal,
    load_checkpoint,
    probe,
    save_checkpoint,
    tensor_sha256,
    walk_tensors,
)
from qwen_prime_wrapper import ModelError, model_from_checkpoint
from verify_qwen_prime import VerifyConfig
from vote_rules import RULES, rule_named

Outcome = tuple[int, dict[str, Any]]
Checkpoint = dict[str, Any]

UP = "model.layers.1.mlp.up_proj"
Q = "model.layers.0.self_attn.q_proj"
CODER = Path(__file__).resolve().parent.parent / "assets/tiny_coder"


pytestmark = pytest.mark.usefixtures("one_thread")


def verify(checkpoint: Path, folder: Path, **options: Any) -> Outcome:
    """Exit code of the verifier and what it wrote as JSON."""
    output = folder / "verify.json"
    code = verifier.main(VerifyConfig(checkpoint, json=output, **options))
    result = json.loads(output.read_text(encoding="utf-8"))
    assert code == (0 if result["passed"] else 1)
    assert result["passed"] == all(c["passed"] for c in result["checks"])
    return code, result


def failed(outcome: Outcome) -> set[str]:
    """Names of the failed checks; the exit code says whether there are any."""
    code, result = outcome
    names = {c["name"] for c in result["checks"] if not c["passed"]}
    assert (code == 1) == bool(names)
    return names


def value_of(outcome: Outcome, name: str) -> Any:
    return next(c["value"] for c in outcome[1]["checks"] if c["name"] == name)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("verify")


@pytest.fixture(scope="module")
def source(folder: Path) -> Path:
    return write_source(folder / "source", tiny_config())


@pytest.fixture(scope="module")
def tied(folder: Path, source: Path) -> Path:
    import_source(source, folder / "tied.pt")
    return folder / "tied.pt"


@pytest.fixture(scope="module")
def compact(folder: Path, source: Path) -> Path:
    """The source of ``tied`` on the manifold whose words hold votes."""
    import_source(source, folder / "compact.pt", manifold="compact")
    return folder / "compact.pt"


@pytest.fixture(scope="module")
def untied(folder: Path) -> Path:
    """A Qwen3 with a head of its own."""
    write_source(folder / "untied", tiny_config("qwen3", tie_word_embeddings=False))
    import_source(folder / "untied", folder / "untied.pt")
    return folder / "untied.pt"


def vote_state(grid: GhostGrid, rule: VoteRule) -> dict[str, torch.Tensor]:
    """What a trained checkpoint stores of a grid that was just unlocked."""
    grid.ballot = Ballot(rule=rule)
    grid.unlock()
    return {name: tensor.clone() for name, tensor in grid.vote_state().items()}


def make_trained(checkpoint: Checkpoint, rule: VoteRule | None = None) -> None:
    """Turn an imported checkpoint into one of stage train with two open grids, with votes where words hold them."""
    inside = checkpoint["manifold"]["vote_bits"] > 0
    rule = rule or (CompactRule() if inside else MomentumRule())
    grids = grids_of(model_from_checkpoint(checkpoint))
    checkpoint.update(stage="train", probes={}, train_state={"step": 3})
    checkpoint["votes"] = {f"{name}.grid": vote_state(grids[f"{name}.grid"], rule) for name in (UP, Q)}
    if inside:
        generator = torch.Generator().manual_seed(0)
        for name in (UP, Q):
            words = checkpoint["model"][f"{name}.grid.indices"]
            words += torch.randint(-31, 32, words.shape, generator=generator).to(torch.int16)


# -- good ones --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("which", ["tied", "untied", "compact"])
def test_a_good_checkpoint_passes_and_the_json_has_its_structure(
    which: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    code, result = verify(request.getfixturevalue(which), tmp_path)
    assert code == 0
    assert set(result) == {"passed", "checks"} and result["passed"] is True
    for check in result["checks"]:
        assert set(check) == {"name", "passed", "value", "limit", "detail"}
        assert isinstance(check["passed"], bool) and isinstance(check["detail"], str)
    names = [c["name"] for c in result["checks"]]
    assert len(names) == len(set(names))
    assert {
        "file.hash",
        "file.contract",
        "tensors.hash",
        "manifold.monotone",
        "manifold.recorded",
        "tensors.fit_config",
        "tensors.head",
        "scales.positive",
        "floats.finite",
        "indices.range",
        "indices.distribution",
        "votes.absent",
        "tokenizer",
        "probes.match",
        "logits.finite",
        "attention.causal",
    } <= set(names)


def test_writing_anew_without_a_change_still_passes(tied: Path, tmp_path: Path) -> None:
    """What every plant below rests on."""
    assert failed(verify(plant(tied, tmp_path / "x.pt", lambda c: None), tmp_path)) == set()


def test_other_manifold_and_architecture_pass(source: Path, tmp_path: Path) -> None:
    import_source(source, tmp_path / "linear.pt", manifold="linear")
    assert failed(verify(tmp_path / "linear.pt", tmp_path)) == set()
    llama = write_source(tmp_path / "llama", tiny_config("llama"))
    import_source(llama, tmp_path / "llama.pt")
    assert failed(verify(tmp_path / "llama.pt", tmp_path)) == set()


@pytest.mark.parametrize("name", RULES)
def test_a_trained_checkpoint_with_votes_passes(name: str, tied: Path, compact: Path, tmp_path: Path) -> None:
    rule = rule_named(name)
    path = plant(compact if rule.vote_bits else tied, tmp_path / "x.pt", lambda c: make_trained(c, rule))
    outcome = verify(path, tmp_path)
    assert failed(outcome) == set()
    assert "votes.sound" in {c["name"] for c in outcome[1]["checks"]}


def test_an_all_zero_row_passes(source: Path, tied: Path, tmp_path: Path) -> None:
    def change(checkpoint: Checkpoint) -> None:
        checkpoint["model"][f"{UP}.grid.indices"][7] = 0
        checkpoint["probes"][f"{UP}.weight"][7] = 0.0

    assert failed(verify(plant(tied, tmp_path / "x.pt", change), tmp_path)) == set()


@pytest.mark.parametrize("name", ["stories260K-qwen2", "atto-qwen2-bias"])
def test_trained_models_pass_against_their_source_on_their_own_text(
    shared_data: Path, tmp_path: Path, name: str
) -> None:
    source = shared_data / "models" / name
    import_source(source, tmp_path / "x.pt")
    text = tmp_path / "stories.txt"
    text.write_text("\n".join(stories(shared_data)[1]), encoding="utf-8")
    outcome = verify(tmp_path / "x.pt", tmp_path, reference=str(source), text=text)
    assert failed(outcome) == set()
    assert {"reference.kl", "reference.loss", "reference.top1", "reference.snr_db", "reference.floats"} <= {
        c["name"] for c in outcome[1]["checks"]
    }
    assert 0 < value_of(outcome, "reference.kl") < 1e-7
    assert value_of(outcome, "reference.snr_db") > 80


@pytest.mark.parametrize("name", ["stories260K-qwen2", "atto-qwen2-bias"])
def test_trained_models_on_the_compact_manifold_pass_by_its_own_limits(
    shared_data: Path, tmp_path: Path, name: str
) -> None:
    """Ten bits of index cost what they cost; half of them are too few even for these limits."""
    source = shared_data / "models" / name
    import_source(source, tmp_path / "x.pt", manifold="compact")
    text = tmp_path / "stories.txt"
    text.write_text("\n".join(stories(shared_data)[1]), encoding="utf-8")
    outcome = verify(tmp_path / "x.pt", tmp_path, reference=str(source), text=text)
    assert failed(outcome) == set()
    limits = {c["name"]: c["limit"] for c in outcome[1]["checks"]}
    names = ("reference.snr_db", "reference.kl", "reference.loss", "reference.top1")
    assert [limits[n] for n in names] == [50.0, 1e-4, 1e-3, 0.99]
    assert value_of(outcome, "reference.kl") > 1e-7 and 50 < value_of(outcome, "reference.snr_db") < 75

    def coarser(checkpoint: Checkpoint) -> None:
        """Every fourth level only, with the probes of what is left."""
        table = manifolds.build("compact")
        for key, words in checkpoint["model"].items():
            if key.endswith(".grid.indices"):
                words.copy_(((table.levels(words) + 1).clamp(-508, 508) >> 2) << 8)
        for key, grid in grids_of(model_from_checkpoint(checkpoint)).items():
            checkpoint["probes"][f"{key.removesuffix('.grid')}.weight"] = probe(grid.dequantize())

    found = failed(verify(plant(tmp_path / "x.pt", tmp_path / "y.pt", coarser), tmp_path, reference=str(source)))
    assert {"reference.snr_db", "reference.kl"} <= found and "probes.match" not in found


# -- the file ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("keep", [0, 1, 60, 0.5, -1, -40, -82, -83])
def test_a_truncated_file(tied: Path, tmp_path: Path, keep: float) -> None:
    content = tied.read_bytes()
    length = int(keep * len(content)) if isinstance(keep, float) else keep
    (tmp_path / "x.pt").write_bytes(content[:length])
    assert failed(verify(tmp_path / "x.pt", tmp_path)) == {"file.hash"}


def test_appended_bytes(tied: Path, tmp_path: Path) -> None:
    for tail in (b"\0", b"\n", tied.read_bytes()):
        (tmp_path / "x.pt").write_bytes(tied.read_bytes()[:1000] + tail)
        assert failed(verify(tmp_path / "x.pt", tmp_path)) == {"file.hash"}


def test_one_flipped_byte_anywhere(tied: Path, tmp_path: Path) -> None:
    content = bytearray(tied.read_bytes())
    chance = random.Random(0)
    size = len(content)
    places = [0, 1, 2, 3, 26, 30, *range(size - 110, size, 4), size - 1]
    places += [min(size - 1, i * size // 60 + chance.randrange(size // 60)) for i in range(60)]
    path = tmp_path / "x.pt"
    missed = []
    for i, place in enumerate(places):
        content[place] ^= 1 << i % 8
        path.write_bytes(content)
        checks = verifier.verify(VerifyConfig(path))
        if [c.name for c in checks if not c.passed] != ["file.hash"]:
            missed.append(place)
        content[place] ^= 1 << i % 8
    assert missed == []
    path.write_bytes(content)
    assert failed(verify(path, tmp_path)) == set()


def test_a_flipped_byte_in_a_tensor_that_was_sealed_again(tied: Path, tmp_path: Path) -> None:
    checkpoint = clone_tree(load_checkpoint(tied))
    checkpoint["model"][f"{UP}.grid.indices"][3, 4] += 1
    torch.save(checkpoint, tmp_path / "x.pt")
    _seal(tmp_path / "x.pt")
    assert "tensors.hash" in failed(verify(tmp_path / "x.pt", tmp_path))


def test_a_missing_file_and_a_folder(tmp_path: Path) -> None:
    assert failed(verify(tmp_path / "none.pt", tmp_path)) == {"file.hash"}
    assert failed(verify(tmp_path, tmp_path)) == {"file.hash"}


def test_something_else_than_a_checkpoint(tied: Path, tmp_path: Path) -> None:
    path = tmp_path / "x.pt"
    path.write_bytes(random.Random(1).randbytes(100_000))
    assert failed(verify(path, tmp_path)) == {"file.hash"}
    torch.save({"weight": torch.ones(3)}, path)
    assert failed(verify(path, tmp_path)) == {"file.hash"}
    # The right content by torch alone: no hash vouches for it.
    torch.save(load_checkpoint(tied), path)
    assert failed(verify(path, tmp_path)) == {"file.hash"}


@pytest.mark.parametrize(
    "content", [{"weight": torch.ones(3)}, [1, 2], {"format": "qwen-prime", "version": 2}], ids=str
)
def test_a_sealed_file_with_other_content(tmp_path: Path, content: object) -> None:
    torch.save(content, tmp_path / "x.pt")
    _seal(tmp_path / "x.pt")
    assert failed(verify(tmp_path / "x.pt", tmp_path)) == {"file.contract"}


class Bomb:
    """Makes a folder when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = str(mark)

    def __reduce__(self) -> tuple[Callable[[str], None], tuple[str]]:
        return os.mkdir, (self.mark,)


def test_a_pickle_that_would_run_code(tied: Path, tmp_path: Path) -> None:
    mark = tmp_path / "ran"
    checkpoint = dict(load_checkpoint(tied))
    checkpoint["created_by"] = {"program": Bomb(mark)}
    torch.save(checkpoint, tmp_path / "x.pt", pickle_module=pickle)
    _seal(tmp_path / "x.pt")
    assert failed(verify(tmp_path / "x.pt", tmp_path)) == {"file.contract"}
    assert not mark.exists()
    # It is a live one.
    torch.load(tmp_path / "x.pt", weights_only=False)
    assert mark.exists()


# -- content: every hash is right, only the meaning is wrong ----------------------------------------------------------


def swap(tensor: torch.Tensor, first: int, second: int) -> None:
    tensor[[first, second]] = tensor[[second, first]].clone()


def set_manifold(checkpoint: Checkpoint, values: torch.Tensor, name: str | None = None) -> None:
    name = name or checkpoint["manifold"]["name"]
    checkpoint["manifold"] |= {"name": name, "sha256": manifolds.fingerprint(values), "values": values}


def not_monotone(checkpoint: Checkpoint) -> None:
    values = checkpoint["manifold"]["values"]
    swap(values, 40_000, 40_001)
    set_manifold(checkpoint, values)


def not_monotone_by_a_tie(checkpoint: Checkpoint) -> None:
    values = checkpoint["manifold"]["values"]
    values[50_000] = values[50_001]
    set_manifold(checkpoint, values)


def manifold_with_nan(checkpoint: Checkpoint) -> None:
    values = checkpoint["manifold"]["values"]
    values[50_000] = math.nan
    set_manifold(checkpoint, values)


def other_table_under_the_name(checkpoint: Checkpoint) -> None:
    set_manifold(checkpoint, manifolds.build("linear").values.clone(), "prime-harmonic")


def other_name_for_the_table(checkpoint: Checkpoint) -> None:
    checkpoint["manifold"]["name"] = "linear"


def other_fingerprint(checkpoint: Checkpoint) -> None:
    checkpoint["manifold"]["sha256"] = manifolds.build("linear").sha256


def unknown_manifold(checkpoint: Checkpoint) -> None:
    checkpoint["manifold"]["name"] = "homemade"


def indices_of_another_manifold(checkpoint: Checkpoint) -> None:
    set_manifold(checkpoint, manifolds.build("linear").values.clone(), "linear")


def vote_bits(value: int) -> Callable[[Checkpoint], None]:
    def change(checkpoint: Checkpoint) -> None:
        checkpoint["manifold"]["vote_bits"] = value

    return change


def scale(value: float) -> Callable[[Checkpoint], None]:
    def change(checkpoint: Checkpoint) -> None:
        checkpoint["model"][f"{UP}.grid.scale"][5] = value

    return change


def negative_scale(checkpoint: Checkpoint) -> None:
    checkpoint["model"][f"{UP}.grid.scale"][5] *= -1


def double_scale(checkpoint: Checkpoint) -> None:
    checkpoint["model"][f"{UP}.grid.scale"][5] *= 2


def swapped_scales(checkpoint: Checkpoint) -> None:
    swap(checkpoint["model"][f"{UP}.grid.scale"], 5, 6)


def missing_bias(checkpoint: Checkpoint) -> None:
    del checkpoint["model"][f"{Q}.bias"]


def missing_bias_and_probe(checkpoint: Checkpoint) -> None:
    del checkpoint["model"][f"{Q}.bias"], checkpoint["probes"][f"{Q}.bias"]


def all_biases_missing(checkpoint: Checkpoint) -> None:
    for part in ("model", "probes"):
        checkpoint[part] = {n: t for n, t in checkpoint[part].items() if not n.endswith(".bias")}


def zeroed_bias(checkpoint: Checkpoint) -> None:
    checkpoint["model"][f"{Q}.bias"].zero_()


def half_a_bias(checkpoint: Checkpoint) -> None:
    checkpoint["model"][f"{Q}.bias"][:24] = 0


def permuted_bias(checkpoint: Checkpoint) -> None:
    swap(checkpoint["model"][f"{Q}.bias"], 5, 6)


def permuted_bias_that_a_sum_with_signs_misses(checkpoint: Checkpoint) -> None:
    """Of three entries two have the same sign."""
    bias = checkpoint["model"][f"{Q}.bias"]
    for first, second in ((0, 1), (0, 2), (1, 2)):
        swap(bias, first, second)
        if torch.allclose(probe(bias), checkpoint["probes"][f"{Q}.bias"], rtol=1e-5, atol=1e-5):
            return
        swap(bias, first, second)
    swap(bias, 0, 1)


def norm_of_ones(checkpoint: Checkpoint) -> None:
    checkpoint["model"]["model.layers.1.input_layernorm.weight"].fill_(1.0)


def rows_with_their_scales(checkpoint: Checkpoint) -> None:
    for part in ("indices", "scale"):
        swap(checkpoint["model"][f"{UP}.grid.{part}"], 10, 11)


def rows_without_their_scales(checkpoint: Checkpoint) -> None:
    swap(checkpoint["model"][f"{UP}.grid.indices"], 10, 11)


def all_rows(checkpoint: Checkpoint) -> None:
    order = torch.randperm(96, generator=torch.Generator().manual_seed(0))
    for part in ("indices", "scale"):
        name = f"{UP}.grid.{part}"
        checkpoint["model"][name] = checkpoint["model"][name][order].contiguous()


def rows_of_the_vocabulary(checkpoint: Checkpoint) -> None:
    for part in ("indices", "scale"):
        swap(checkpoint["model"][f"model.embed_tokens.grid.{part}"], 100, 200)


def columns(checkpoint: Checkpoint) -> None:
    name = f"{UP}.grid.indices"
    order = torch.randperm(48, generator=torch.Generator().manual_seed(0))
    checkpoint["model"][name] = checkpoint["model"][name][:, order].contiguous()


def shifted_columns(checkpoint: Checkpoint) -> None:
    name = f"{UP}.grid.indices"
    checkpoint["model"][name] = checkpoint["model"][name].roll(1, 1)


def two_columns(first: int, second: int) -> Callable[[Checkpoint], None]:
    def change(checkpoint: Checkpoint) -> None:
        indices = checkpoint["model"][f"{UP}.grid.indices"]
        indices[:, [first, second]] = indices[:, [second, first]].clone()

    return change


def transposed(checkpoint: Checkpoint) -> None:
    name = f"{Q}.grid.indices"
    checkpoint["model"][name] = checkpoint["model"][name].T.contiguous()


def exchanged_matrices(checkpoint: Checkpoint) -> None:
    for part in ("indices", "scale"):
        a, b = f"{UP}.grid.{part}", f"{UP.replace('up', 'gate')}.grid.{part}"
        checkpoint["model"][a], checkpoint["model"][b] = checkpoint["model"][b], checkpoint["model"][a]


def flipped_sign(checkpoint: Checkpoint) -> None:
    checkpoint["model"][f"{UP}.grid.indices"].mul_(-1)


def one_value(value: int) -> Callable[[Checkpoint], None]:
    def change(checkpoint: Checkpoint) -> None:
        checkpoint["model"][f"{UP}.grid.indices"].fill_(value)

    return change


def only_signs(checkpoint: Checkpoint) -> None:
    indices = checkpoint["model"][f"{UP}.grid.indices"]
    indices.copy_(torch.where(indices < 0, -20_000, 20_000).short())


def unwritten_index(checkpoint: Checkpoint) -> None:
    checkpoint["model"][f"{UP}.grid.indices"][1, 2] = -32768


def one_word(word: int) -> Callable[[Checkpoint], None]:
    def change(checkpoint: Checkpoint) -> None:
        checkpoint["model"][f"{UP}.grid.indices"][1, 2] = word

    return change


def one_vote(vote: int) -> Callable[[Checkpoint], None]:
    def change(checkpoint: Checkpoint) -> None:
        checkpoint["model"][f"{Q}.grid.indices"][3, 4] += vote

    return change


def table_entry(at: int, other: int) -> Callable[[Checkpoint], None]:
    """One entry of the manifold takes the value of another."""

    def change(checkpoint: Checkpoint) -> None:
        values = checkpoint["manifold"]["values"]
        values[at] = values[other]
        set_manifold(checkpoint, values)

    return change


def exchanged_levels(checkpoint: Checkpoint) -> None:
    values = checkpoint["manifold"]["values"]
    level = 32 + 64 * 700
    first = values[level : level + 64].clone()
    values[level : level + 64] = values[level + 64 : level + 128]
    values[level + 64 : level + 128] = first
    set_manifold(checkpoint, values)


def leftover_votes(checkpoint: Checkpoint) -> None:
    grid = grids_of(model_from_checkpoint(checkpoint))[f"{UP}.grid"]
    checkpoint["votes"] = {f"{UP}.grid": vote_state(grid, MomentumRule())}


def leftover_train_state(checkpoint: Checkpoint) -> None:
    checkpoint["train_state"] = {"step": 1}


def bidirectional(checkpoint: Checkpoint) -> None:
    checkpoint["hf_config"]["is_causal"] = False


def tie(value: bool) -> Callable[[Checkpoint], None]:
    def change(checkpoint: Checkpoint) -> None:
        checkpoint["hf_config"]["tie_word_embeddings"] = value

    return change


def head_beside_a_tied_one(checkpoint: Checkpoint) -> None:
    for part in ("indices", "scale"):
        checkpoint["model"][f"lm_head.grid.{part}"] = checkpoint["model"][f"model.embed_tokens.grid.{part}"].clone()
    checkpoint["probes"]["lm_head.weight"] = checkpoint["probes"]["model.embed_tokens.weight"].clone()


def norm_of(value: float) -> Callable[[Checkpoint], None]:
    def change(checkpoint: Checkpoint) -> None:
        norm = checkpoint["model"]["model.norm.weight"].fill_(value)
        checkpoint["probes"]["model.norm.weight"] = probe(norm)

    return change


def norm_that_overflows(checkpoint: Checkpoint) -> None:
    norm = checkpoint["model"]["model.norm.weight"]
    norm.zero_()[:2] = 3e38
    checkpoint["probes"]["model.norm.weight"] = probe(norm)


def missing_probe(checkpoint: Checkpoint) -> None:
    del checkpoint["probes"][f"{UP}.weight"]


def no_probes(checkpoint: Checkpoint) -> None:
    checkpoint["probes"] = {}


def nan_probe(checkpoint: Checkpoint) -> None:
    checkpoint["probes"][f"{UP}.weight"][4] = math.nan


def missing_tensor(checkpoint: Checkpoint) -> None:
    for part in ("indices", "scale"):
        del checkpoint["model"][f"{UP}.grid.{part}"]


def extra_tensor(checkpoint: Checkpoint) -> None:
    checkpoint["model"]["model.layers.9.mlp.up_proj.bias"] = torch.ones(3)


def another_geometry(checkpoint: Checkpoint) -> None:
    checkpoint["hf_config"]["num_hidden_layers"] = 3
    checkpoint["hf_config"].pop("layer_types", None)


def another_architecture(checkpoint: Checkpoint) -> None:
    checkpoint["hf_config"]["model_type"] = "gpt2"


def broken_tokenizer(checkpoint: Checkpoint) -> None:
    checkpoint["tokenizer"]["files"]["tokenizer.json"][:40] = ord("x")


def flipped_tokenizer_byte(checkpoint: Checkpoint) -> None:
    files = checkpoint["tokenizer"]["files"]
    files["tokenizer.json"][0] ^= 0x80


def no_tokenizer(checkpoint: Checkpoint) -> None:
    checkpoint["tokenizer"]["files"] = {}


def tokenizer_without_vocabulary(checkpoint: Checkpoint) -> None:
    settings = bytearray(b'{"tokenizer_class": "Qwen2Tokenizer"}')
    files = {"tokenizer_config.json": torch.frombuffer(settings, dtype=torch.uint8)}
    checkpoint["tokenizer"]["files"] = files


def tokenizer_with_code(checkpoint: Checkpoint) -> None:
    checkpoint["tokenizer"]["files"]["modeling_prime.py"] = torch.zeros(3, dtype=torch.uint8)


PLANTS: list[tuple[Callable[[Checkpoint], None], set[str]]] = [
    (not_monotone, {"manifold.monotone", "manifold.recorded"}),
    (not_monotone_by_a_tie, {"manifold.monotone"}),
    (manifold_with_nan, {"manifold.monotone"}),
    (other_table_under_the_name, {"manifold.recorded"}),
    (other_name_for_the_table, {"manifold.recorded"}),
    (other_fingerprint, {"manifold.recorded"}),
    (unknown_manifold, {"manifold.recorded"}),
    (vote_bits(6), {"manifold.recorded"}),
    (indices_of_another_manifold, {"probes.match"}),
    (scale(math.nan), {"scales.positive"}),
    (scale(math.inf), {"scales.positive"}),
    (scale(0.0), {"scales.positive"}),
    (negative_scale, {"scales.positive"}),
    (double_scale, {"probes.match"}),
    (swapped_scales, {"probes.match"}),
    (missing_bias, {"tensors.fit_config"}),
    (missing_bias_and_probe, {"tensors.fit_config"}),
    (all_biases_missing, {"tensors.fit_config"}),
    (zeroed_bias, {"probes.match"}),
    (half_a_bias, {"probes.match"}),
    (permuted_bias, {"probes.match"}),
    (permuted_bias_that_a_sum_with_signs_misses, {"probes.match"}),
    (norm_of_ones, {"probes.match"}),
    (rows_with_their_scales, {"probes.match"}),
    (rows_without_their_scales, {"probes.match"}),
    (all_rows, {"probes.match"}),
    (rows_of_the_vocabulary, {"probes.match"}),
    (columns, {"probes.match"}),
    (shifted_columns, {"probes.match"}),
    (two_columns(0, 1), {"probes.match"}),
    (two_columns(0, 2), {"probes.match"}),
    (two_columns(1, 2), {"probes.match"}),
    (transposed, {"probes.match"}),
    (exchanged_matrices, {"probes.match"}),
    (flipped_sign, {"probes.match"}),
    (one_value(12_345), {"indices.distribution"}),
    (one_value(0), {"probes.match"}),
    (only_signs, {"indices.distribution"}),
    (unwritten_index, {"indices.range"}),
    (leftover_votes, {"votes.absent"}),
    (leftover_train_state, {"votes.absent"}),
    (bidirectional, {"attention.causal"}),
    (tie(False), {"tensors.head", "tensors.fit_config"}),
    (head_beside_a_tied_one, {"tensors.head", "tensors.fit_config"}),
    (norm_that_overflows, {"logits.finite"}),
    (norm_of(math.inf), {"floats.finite"}),
    (norm_of(math.nan), {"floats.finite"}),
    (missing_probe, {"probes.match"}),
    (no_probes, {"probes.match"}),
    (nan_probe, {"probes.match"}),
    (missing_tensor, {"tensors.fit_config"}),
    (extra_tensor, {"tensors.fit_config"}),
    (another_geometry, {"tensors.fit_config"}),
    (another_architecture, {"tensors"}),
    (broken_tokenizer, {"tokenizer"}),
    (flipped_tokenizer_byte, {"tokenizer"}),
    (no_tokenizer, {"tokenizer"}),
    (tokenizer_without_vocabulary, {"tokenizer"}),
    (tokenizer_with_code, {"tokenizer"}),
]


@pytest.mark.parametrize(
    ("change", "names"),
    PLANTS,
    ids=[f"{i}-{change.__qualname__.split('.')[0]}" for i, (change, _) in enumerate(PLANTS)],
)
def test_a_plant_is_caught_by_its_check(
    tied: Path, tmp_path: Path, change: Callable[[Checkpoint], None], names: set[str]
) -> None:
    found = failed(verify(plant(tied, tmp_path / "x.pt", change), tmp_path))
    assert names <= found, f"expected {sorted(names)} to fail, failed: {sorted(found)}"


COMPACT_PLANTS: list[tuple[str, Callable[[Checkpoint], None], set[str]]] = [
    ("vote", one_vote(1), {"votes.absent"}),
    ("negative vote", one_vote(-31), {"votes.absent"}),
    ("vote state", lambda c: leftover(c, CompactRule()), {"votes.absent"}),
    ("lowest word", one_word(-32_768), {"indices.range"}),
    ("highest word", one_word(32_767), {"indices.range"}),
    ("level 512", one_word(512 * 64 - 31), {"indices.range"}),
    ("level -512", one_word(-512 * 64 + 31), {"indices.range"}),
    ("vote of -32", one_word(5 * 64 - 32), {"indices.range"}),
    ("no vote bits", vote_bits(0), {"manifold.recorded"}),
    ("broken run", table_entry(32 + 64 * 700 + 5, 32 + 64 * 701 + 5), {"manifold.recorded"}),
    ("exchanged levels", exchanged_levels, {"manifold.monotone", "manifold.recorded"}),
    ("NaN", manifold_with_nan, {"manifold.recorded"}),
    ("other name", other_name_for_the_table, {"manifold.recorded"}),
    ("other table", other_table_under_the_name, {"manifold.recorded"}),
    ("double scale", double_scale, {"probes.match"}),
    ("rows", rows_with_their_scales, {"probes.match"}),
    ("columns", columns, {"probes.match"}),
    ("two columns", two_columns(0, 1), {"probes.match"}),
    ("transposed", transposed, {"probes.match"}),
    ("flipped sign", flipped_sign, {"probes.match"}),
    ("one value", one_value(64 * 100), {"indices.distribution"}),
]


def leftover(checkpoint: Checkpoint, rule: VoteRule) -> None:
    grid = grids_of(model_from_checkpoint(checkpoint))[f"{UP}.grid"]
    checkpoint["votes"] = {f"{UP}.grid": vote_state(grid, rule)}


@pytest.mark.parametrize(
    ("change", "names"), [plant[1:] for plant in COMPACT_PLANTS], ids=[plant[0] for plant in COMPACT_PLANTS]
)
def test_a_plant_in_words_with_votes_is_caught_by_its_check(
    compact: Path, tmp_path: Path, change: Callable[[Checkpoint], None], names: set[str]
) -> None:
    found = failed(verify(plant(compact, tmp_path / "x.pt", change), tmp_path))
    assert names <= found, f"expected {sorted(names)} to fail, failed: {sorted(found)}"


@pytest.mark.parametrize("bits", [-1, 1, 5, 7, 16, 64, 1 << 40])
@pytest.mark.parametrize("which", ["tied", "compact"])
def test_vote_bits_that_no_manifold_has(which: str, bits: int, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    """A failed check, not a traceback and not a number of that many bits."""
    checkpoint = clone_tree(load_checkpoint(request.getfixturevalue(which)))
    checkpoint["manifold"]["vote_bits"] = bits
    torch.save(checkpoint, tmp_path / "x.pt")
    _seal(tmp_path / "x.pt")
    assert failed(verify(tmp_path / "x.pt", tmp_path)) & {"manifold.recorded", "file.contract"}


@pytest.mark.parametrize(("change", "count"), [(one_word(-32_768), 1), (one_word(5 * 64 - 32), 1)])
def test_unused_words_are_counted_once(
    compact: Path, tmp_path: Path, change: Callable[[Checkpoint], None], count: int
) -> None:
    outcome = verify(plant(compact, tmp_path / "x.pt", change), tmp_path)
    assert value_of(outcome, "indices.range") == count


@pytest.mark.parametrize("change", [norm_that_overflows, nan_probe])
def test_the_json_is_json_where_a_value_is_not_finite(
    tied: Path, tmp_path: Path, change: Callable[[Checkpoint], None]
) -> None:
    def refuse(name: str) -> float:
        raise AssertionError(f"{name} is not JSON")

    verify(plant(tied, tmp_path / "x.pt", change), tmp_path)
    json.loads((tmp_path / "verify.json").read_text(encoding="utf-8"), parse_constant=refuse)


@pytest.mark.parametrize("tokenizer", [{}, {"source": "x", "files": []}, {"files": {"vocab.json": "{}"}}])
def test_a_tokenizer_entry_that_breaks_the_contract(tied: Path, tmp_path: Path, tokenizer: dict[str, Any]) -> None:
    checkpoint = {**load_checkpoint(tied), "tokenizer": tokenizer, "sha256": {}}
    checkpoint["sha256"] = {name: tensor_sha256(tensor) for name, tensor in walk_tensors(checkpoint)}
    torch.save(checkpoint, tmp_path / "x.pt")
    _seal(tmp_path / "x.pt")
    assert failed(verify(tmp_path / "x.pt", tmp_path)) & {"file.contract", "tokenizer"}


def test_an_untied_head_under_a_config_that_ties(untied: Path, tmp_path: Path) -> None:
    found = failed(verify(plant(untied, tmp_path / "x.pt", tie(True)), tmp_path))
    assert {"tensors.head", "tensors.fit_config"} <= found


def test_an_untied_head_that_was_dropped(untied: Path, tmp_path: Path) -> None:
    def change(checkpoint: Checkpoint) -> None:
        tie(True)(checkpoint)
        for part in ("indices", "scale"):
            del checkpoint["model"][f"lm_head.grid.{part}"]

    assert "probes.match" in failed(verify(plant(untied, tmp_path / "x.pt", change), tmp_path))


@pytest.mark.parametrize("name", ["q_norm", "k_norm"])
def test_a_lost_norm_of_qwen3(untied: Path, tmp_path: Path, name: str) -> None:
    def change(checkpoint: Checkpoint) -> None:
        checkpoint["model"][f"model.layers.1.self_attn.{name}.weight"].fill_(1.0)

    assert "probes.match" in failed(verify(plant(untied, tmp_path / "x.pt", change), tmp_path))


STATISTICS = [
    ("momentum", "r2"),
    ("momentum", "g2"),
    ("momentum", "c2"),
    ("supermajority", "r1"),
    ("compact", "r2"),
    ("compact", "g2"),
    ("compact", "c2"),
]


@pytest.mark.parametrize("value", [-1.0, math.nan, math.inf])
@pytest.mark.parametrize(("rule", "part"), STATISTICS)
def test_unsound_row_statistics_in_a_trained_checkpoint(
    tied: Path, compact: Path, tmp_path: Path, rule: str, part: str, value: float
) -> None:
    def change(checkpoint: Checkpoint) -> None:
        make_trained(checkpoint, rule_named(rule))
        checkpoint["votes"][f"{UP}.grid"][part][3] = value

    path = plant(compact if rule == "compact" else tied, tmp_path / "x.pt", change)
    assert "votes.sound" in failed(verify(path, tmp_path))


@pytest.mark.parametrize("word", [-32_768, 32_767, 5 * 64 - 32])
def test_words_out_of_range_in_a_trained_compact_checkpoint(compact: Path, tmp_path: Path, word: int) -> None:
    def change(checkpoint: Checkpoint) -> None:
        make_trained(checkpoint)
        one_word(word)(checkpoint)

    assert failed(verify(plant(compact, tmp_path / "x.pt", change), tmp_path)) == {"indices.range"}


@pytest.mark.parametrize(
    ("change", "name"),
    [
        (scale(math.nan), "scales.positive"),
        (unwritten_index, "indices.range"),
        (one_value(12_345), "indices.distribution"),
        (norm_that_overflows, "logits.finite"),
        (bidirectional, "attention.causal"),
        (missing_bias, "tensors.fit_config"),
        (not_monotone, "manifold.monotone"),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_damage_to_a_trained_checkpoint(
    tied: Path, tmp_path: Path, change: Callable[[Checkpoint], None], name: str
) -> None:
    def both(checkpoint: Checkpoint) -> None:
        make_trained(checkpoint)
        change(checkpoint)
        checkpoint["probes"] = {}

    assert name in failed(verify(plant(tied, tmp_path / "x.pt", both), tmp_path))


# -- against the source -----------------------------------------------------------------------------------------------


def test_a_different_source_of_the_same_shape_fails(tied: Path, tmp_path: Path) -> None:
    other = write_source(tmp_path / "other", tiny_config(), seed=1)
    found = failed(verify(tied, tmp_path, reference=str(other), tokens=64))
    assert {"reference.snr_db", "reference.floats", "reference.kl", "reference.loss", "reference.top1"} <= found


def test_one_changed_weight_shows_against_the_source(source: Path, tied: Path, tmp_path: Path) -> None:
    """A change that keeps the probes, in stage init: only the comparison can find it."""

    def change(checkpoint: Checkpoint) -> None:
        checkpoint["model"][f"{UP}.grid.indices"][5, 6] = 0
        grid = grids_of(model_from_checkpoint(checkpoint))[f"{UP}.grid"]
        checkpoint["probes"][f"{UP}.weight"] = probe(grid.dequantize())

    path = plant(tied, tmp_path / "x.pt", change)
    assert failed(verify(path, tmp_path)) == set()
    assert {"reference.snr_db", "reference.kl"} <= failed(verify(path, tmp_path, reference=str(source), tokens=64))


def test_the_limits_of_the_default_size_are_the_stated_ones() -> None:
    for bits, limit in ((0, 1e-5), (6, 1e-3)):
        for scored in (8192 - 64, 8192 - 16, 8192, 100_000):
            assert verifier.loss_limit(scored, bits) == limit
        limits = [verifier.loss_limit(scored, bits) for scored in (0, 1, 15, 47, 511, 4096, 8000)]
        assert limits == sorted(limits, reverse=True) and limits[-1] < 1.1 * limit
        assert limits[3] == pytest.approx(5 * math.sqrt(2 * verifier.KL_LIMIT[bits] / 47), rel=0.01)


@pytest.fixture(scope="module")
def coder(folder: Path) -> Path:
    import_source(CODER, folder / "coder.pt")
    return folder / "coder.pt"


@pytest.mark.parametrize("tokens", [16, 48, 512])
def test_a_right_import_passes_with_few_tokens(coder: Path, tmp_path: Path, tokens: int) -> None:
    assert failed(verify(coder, tmp_path, reference=str(CODER), tokens=tokens)) == set()


@pytest.mark.parametrize(
    ("damage", "names"),
    [
        (lambda indices, scale: scale.mul_(1.001), {"reference.snr_db"}),
        (lambda indices, scale: indices[7].zero_(), {"reference.snr_db", "reference.kl"}),
    ],
    ids=["scaled", "a row of zeros"],
)
def test_a_wrong_import_fails_with_few_tokens(
    coder: Path, tmp_path: Path, damage: Callable[[torch.Tensor, torch.Tensor], object], names: set[str]
) -> None:
    def change(checkpoint: Checkpoint) -> None:
        damage(checkpoint["model"][f"{UP}.grid.indices"], checkpoint["model"][f"{UP}.grid.scale"])
        # The probes agree: only the comparison can find it.
        grid = grids_of(model_from_checkpoint(checkpoint))[f"{UP}.grid"]
        checkpoint["probes"][f"{UP}.weight"] = probe(grid.dequantize())

    assert names <= failed(verify(plant(coder, tmp_path / "x.pt", change), tmp_path, reference=str(CODER), tokens=16))


def test_one_mismatch_of_few_tokens_is_no_failure() -> None:
    class Model:
        config = SimpleNamespace(max_position_embeddings=512)

        def __init__(self, count: int, others: int) -> None:
            self.logits = torch.zeros(1, count, 4)
            self.logits[0, :, 0] = 1e-6
            self.logits[0, :others, 1] = 2e-6

        def __call__(self, input_ids: torch.Tensor, **options: Any) -> Any:
            return SimpleNamespace(logits=self.logits)

    def passes(count: int, others: int) -> bool:
        ids = torch.zeros(count, dtype=torch.int64)
        checks = verifier.compare_on_text(Model(count, others), Model(count, 0), ids, True)  # type: ignore[arg-type]
        return {c.name: c.passed for c in checks}["reference.top1"]

    assert passes(16, 1) and not passes(16, 2) and passes(512, 1) and not passes(512, 2)


def test_a_trained_checkpoint_is_compared_but_not_judged(source: Path, tied: Path, tmp_path: Path) -> None:
    def change(checkpoint: Checkpoint) -> None:
        make_trained(checkpoint)
        double_scale(checkpoint)

    outcome = verify(plant(tied, tmp_path / "x.pt", change), tmp_path, reference=str(source), tokens=64)
    assert failed(outcome) == set()
    assert value_of(outcome, "reference.kl") > 1e-7


BAD_REFERENCES: dict[str, Callable[[Path], object]] = {
    "nothing": lambda path: None,
    "empty folder": lambda path: path.mkdir(),
    "other geometry": lambda path: write_source(path, tiny_config(hidden_size=64)),
    "more layers": lambda path: write_source(path, tiny_config(num_hidden_layers=3)),
    "fewer layers": lambda path: write_source(path, tiny_config(num_hidden_layers=1)),
    "other architecture": lambda path: write_source(path, tiny_config("qwen3")),
    "larger vocabulary": lambda path: write_source(path, tiny_config(vocab_size=288)),
    "broken config": lambda path: rewrite_config(path, "{"),
    "config without object": lambda path: rewrite_config(path, "[]"),
}


def rewrite_config(path: Path, text: str) -> None:
    write_source(path, tiny_config())
    (path / "config.json").write_text(text, encoding="utf-8")


@pytest.mark.parametrize("case", BAD_REFERENCES)
def test_a_reference_that_cannot_be_the_source_is_a_failed_check(tied: Path, tmp_path: Path, case: str) -> None:
    BAD_REFERENCES[case](tmp_path / "other")
    found = failed(verify(tied, tmp_path, reference=str(tmp_path / "other"), tokens=64))
    assert any(name.startswith("reference") for name in found)


def test_a_checkpoint_as_reference_is_a_failed_check(tied: Path, tmp_path: Path) -> None:
    found = failed(verify(tied, tmp_path, reference=str(tied), tokens=64))
    assert any(name.startswith("reference") for name in found)


@pytest.mark.parametrize("content", [None, b"", b"x", b"\xff\xfe\xff"], ids=repr)
def test_a_text_without_enough_to_compare_is_a_failed_check(
    source: Path, tied: Path, tmp_path: Path, content: bytes | None
) -> None:
    text = tmp_path / "text"
    if content is not None:
        text.write_bytes(content)
    found = failed(verify(tied, tmp_path, reference=str(source), text=text))
    assert any(name.startswith("reference") for name in found)


def test_the_comparison_is_the_one_defined(source: Path, tied: Path, tmp_path: Path) -> None:
    """KL and loss difference of the verifier against the same from transformers' own loss."""
    text = tmp_path / "text"
    text.write_text("".join(random.Random(0).choices(ascii_lowercase, k=128)), encoding="utf-8")

    def change(checkpoint: Checkpoint) -> None:
        make_trained(checkpoint)
        checkpoint["model"][f"{Q}.grid.scale"] *= 1.5

    path = plant(tied, tmp_path / "x.pt", change)
    outcome = verify(path, tmp_path, reference=str(source), text=text)
    dense, tokenizer, _ = verifier.load_model(source)
    ours, _, _ = verifier.load_model(path)
    ids = tokenizer(text.read_text(encoding="utf-8"), return_tensors="pt", add_special_tokens=False)["input_ids"]
    assert ids.shape[1] == 128
    with torch.no_grad():
        losses = [float(m(input_ids=ids, labels=ids, use_cache=False).loss) for m in (ours, dense)]
        logs = [m(input_ids=ids, use_cache=False).logits[0].log_softmax(-1) for m in (dense, ours)]
    kl = torch.nn.functional.kl_div(logs[1], logs[0], log_target=True, reduction="sum") / 128
    assert value_of(outcome, "reference.loss") == pytest.approx(losses[0] - losses[1], rel=1e-3)
    assert value_of(outcome, "reference.kl") == pytest.approx(float(kl), rel=1e-3)


# -- the command ------------------------------------------------------------------------------------------------------


def run(*arguments: str) -> int:
    return prime_cli.run(VerifyConfig, verifier.main, (CheckpointError, ModelError), arguments)


def test_the_command_prints_a_table_and_exits_by_the_result(
    tied: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(str(tied)) == 0
    printed = capsys.readouterr().out
    assert "file.hash" in printed and "all passed" in printed and "FAIL" not in printed
    bad = plant(tied, tmp_path / "x.pt", unwritten_index)
    assert run(str(bad)) == 1
    assert "FAILED: indices.range" in capsys.readouterr().out


def test_bad_usage_exits_2(tied: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(str(tied), "--tokens", "3") == 2
    assert run() == 2
    assert capsys.readouterr().err.count("error: ") == 2


def test_a_name_with_brackets_is_printed_as_it_is(
    tied: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Brackets are markup to the library that prints the table."""
    for name in ("run[bold].pt", "run[/b].pt"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        for content, code in ((tied.read_bytes(), 0), (b"", 1)):
            path.write_bytes(content)
            assert run(str(path)) == code
            assert name in "".join(capsys.readouterr().out.split())


def test_a_result_that_cannot_be_written_is_one_line(
    tied: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(str(tied), "--json", str(tmp_path / "none" / "x.json")) == 1
    text = capsys.readouterr().err
    assert text.count("error: ") == 1 and "x.json" in text


def test_where_the_json_goes_is_looked_at_before_anything_is_verified(
    tied: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(verifier, "verify", lambda config: pytest.fail("verified"))
    with pytest.raises(ModelError, match=r"absent is no folder: cannot write x\.json there"):
        verifier.main(VerifyConfig(tied, json=tmp_path / "absent" / "x.json"))


def test_the_json_of_a_failure_names_value_and_limit(tied: Path, tmp_path: Path) -> None:
    path = plant(tied, tmp_path / "x.pt", double_scale)
    _, result = verify(path, tmp_path)
    check = next(c for c in result["checks"] if c["name"] == "probes.match")
    assert check["value"] > check["limit"] == verifier.ROW_NOISE_LIMIT
    assert "layers.1.mlp.up_proj" in check["detail"] and "row 5" in check["detail"]


def test_the_tokenizer_may_not_be_larger_than_the_vocabulary(tied: Path, tmp_path: Path) -> None:
    bigger = tmp_path / "bigger"
    write_source(bigger, tiny_config())
    content = json.loads((bigger / "tokenizer.json").read_text(encoding="utf-8"))
    template = content["added_tokens"][0]
    content["added_tokens"] += [{**template, "id": 259 + i, "content": f"<|extra{i}|>"} for i in range(20)]
    rewrite_json(bigger / "tokenizer.json", added_tokens=content["added_tokens"])

    def change(checkpoint: Checkpoint) -> None:
        data = bytearray((bigger / "tokenizer.json").read_bytes())
        checkpoint["tokenizer"]["files"]["tokenizer.json"] = torch.frombuffer(data, dtype=torch.uint8)

    outcome = verify(plant(tied, tmp_path / "x.pt", change), tmp_path)
    assert failed(outcome) == {"tokenizer"}
    assert value_of(outcome, "tokenizer") == 279


def test_verifying_changes_nothing(tied: Path, tmp_path: Path) -> None:
    path = tmp_path / "x.pt"
    path.write_bytes(tied.read_bytes())
    before = path.read_bytes()
    verify(path, tmp_path)
    assert path.read_bytes() == before
    assert sorted(f.name for f in tmp_path.iterdir()) == ["verify.json", "x.pt"]


def test_save_of_an_unchanged_clone_keeps_the_tensor_hashes(tied: Path, tmp_path: Path) -> None:
    content = clone_tree(load_checkpoint(tied))
    save_checkpoint(content, tmp_path / "x.pt")
    assert load_checkpoint(tmp_path / "x.pt")["sha256"] == load_checkpoint(tied)["sha256"]

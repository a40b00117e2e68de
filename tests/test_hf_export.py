"""Dense folders: transformers alone reads them, and computes what the checkpoint computes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny_models import dense_twin, import_source, plant, tiny_config, write_source
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

import dense_weights
import qwen_prime_pack as pack
from dense_weights import ExportError, open_dense
from hf_export import StoredTensor, export_hf, parse_size, write_safetensors
from prime_checkpoint import CheckpointError
from qwen_prime_wrapper import load_model
from whole_output import OutputError

pytestmark = pytest.mark.usefixtures("one_thread")
IDS = torch.arange(3, 43)[None]
KINDS = {
    "qwen2-tied": tiny_config("qwen2"),
    "qwen2-untied": tiny_config("qwen2", tie_word_embeddings=False),
    "qwen3-tied": tiny_config("qwen3"),
    "qwen3-untied": tiny_config("qwen3", tie_word_embeddings=False),
}


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("sources")
    paths = {}
    for name, config in KINDS.items():
        import_source(write_source(folder / name, config), paths.setdefault(name, folder / f"{name}.pt"))
    return paths


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=IDS).logits.float()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", dense_weights.DTYPES)
def test_logits_are_ours_to_the_rounding_of_the_dtype(
    checkpoints: dict[str, Path], tmp_path: Path, kind: str, dtype: str
) -> None:
    """The folder's tensors are the rounded ones of the dequantized model, and so are its logits."""
    names = export_hf(open_dense(checkpoints[kind]), tmp_path / "out", dtype, 10**9, False)
    assert names == ["model.safetensors"]
    loaded, info = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    wanted = dense_weights.DTYPES[dtype]
    assert loaded.dtype == wanted and loaded.config.dtype == wanted
    ours, _, _ = load_model(checkpoints[kind])
    twin = dense_twin(ours)
    rounded = {name: tensor.to(wanted) for name, tensor in twin.state_dict().items()}
    for name, tensor in loaded.state_dict().items():
        assert torch.equal(tensor, rounded[name]), name
    twin.load_state_dict({name: tensor.float() for name, tensor in rounded.items()})
    assert torch.equal(logits(loaded.float()), logits(twin))
    reference = logits(ours)
    limit = {"float32": 1e-5, "float16": 1e-2, "bfloat16": 5e-2}[dtype]
    assert float((logits(loaded) - reference).abs().max()) < limit * float(reference.abs().max())
    head, embedding = loaded.get_output_embeddings().weight, loaded.get_input_embeddings().weight
    assert (head is embedding) == kind.endswith("-tied")


def test_shards_have_their_size_and_an_index(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    one, many = tmp_path / "one", tmp_path / "many"
    source = open_dense(checkpoints["qwen3-untied"])
    export_hf(source, one, "float32", 10**9, False)
    names = export_hf(source, many, "float32", 30_000, False)
    index = json.loads((many / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"].values()) == set(names) and len(names) > 3
    whole = load_file(one / "model.safetensors")
    for name in names:
        tensors = load_file(many / name)
        size = sum(t.nbytes for t in tensors.values())
        assert size <= 30_000 or len(tensors) == 1
        for key, tensor in tensors.items():
            assert index["weight_map"][key] == name and torch.equal(whole.pop(key), tensor)
    assert not whole
    sharded = AutoModelForCausalLM.from_pretrained(many)
    assert torch.equal(logits(sharded), logits(AutoModelForCausalLM.from_pretrained(one)))


def test_companions_are_the_source_s_own(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    """Tokenizer and generation config byte for byte; the tokenizer counts alike."""
    source = Path(checkpoints["qwen2-tied"]).with_suffix("")
    export_hf(open_dense(checkpoints["qwen2-tied"]), tmp_path / "out", "bfloat16", 10**9, False)
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        assert (tmp_path / "out" / name).read_bytes() == (source / name).read_bytes()
    assert GenerationConfig.from_pretrained(tmp_path / "out").eos_token_id == 258
    text = "def f(x):\n    return x  # größer"
    ours = load_model(checkpoints["qwen2-tied"])[1]
    assert AutoTokenizer.from_pretrained(tmp_path / "out")(text)["input_ids"] == ours(text)["input_ids"]


@pytest.mark.parametrize(
    ("stage", "template", "own", "wanted"),
    [
        ("train", "<|im_end|>", 7, [7, "end"]),
        ("train", "<|im_end|>", [7, 8], [7, 8, "end"]),
        ("train", "<|im_end|>", ["end", 7], ["end", 7]),
        ("train", "other", 7, 7),
        ("init", "<|im_end|>", 7, 7),
    ],
)
def test_a_trained_model_ends_where_conversations_taught_it(
    checkpoints: dict[str, Path], tmp_path: Path, stage: str, template: str, own: Any, wanted: Any
) -> None:
    """Base models know another end of a text; what writes nothing new writes the source's bytes."""
    source = open_dense(checkpoints["qwen2-tied"])
    end = load_model(checkpoints["qwen2-tied"])[1].convert_tokens_to_ids("<|im_end|>")

    def named(ids: Any) -> Any:
        return [end if i == "end" else i for i in ids] if isinstance(ids, list) else ids

    given = json.dumps({"eos_token_id": named(own), "top_k": 20}).encode()
    files = {"chat_template.jinja": template.encode(), "generation_config.json": given}
    kept = source.checkpoint["tokenizer"]["files"]
    kept |= {name: torch.frombuffer(bytearray(data), dtype=torch.uint8) for name, data in files.items()}
    source.checkpoint["stage"] = stage
    export_hf(source, tmp_path / "out", "bfloat16", 10**9, False)
    written = (tmp_path / "out" / "generation_config.json").read_bytes()
    assert json.loads(written) == {"eos_token_id": named(wanted), "top_k": 20}
    assert (written == given) == (named(wanted) == named(own))
    assert GenerationConfig.from_pretrained(tmp_path / "out").eos_token_id == named(wanted)


def test_overflow_is_refused_by_name_and_leaves_nothing(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    def loud(content: dict) -> None:
        content["model"]["model.layers.1.mlp.up_proj.grid.scale"][3] = 1e6

    path = plant(checkpoints["qwen2-tied"], tmp_path / "loud.pt", loud)
    out = tmp_path / "out"
    with pytest.raises(ExportError, match=r"model\.layers\.1\.mlp\.up_proj\.weight .* float16"):
        export_hf(open_dense(path), out, "float16", 10**9, False)
    assert {p.name for p in tmp_path.iterdir()} == {"loud.pt"}
    export_hf(open_dense(path), out, "bfloat16", 10**9, False)


def test_a_full_disk_leaves_nothing(
    checkpoints: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []

    def slices(self, dtype: torch.dtype = torch.float32):
        seen.append(self.name)
        if len(seen) == 5:
            raise OSError(28, "No space left on device")
        yield torch.zeros(self.shape, dtype=dtype)

    monkeypatch.setattr(dense_weights.DenseWeight, "slices", slices)
    with pytest.raises(OutputError, match="No space left"):
        export_hf(open_dense(checkpoints["qwen2-tied"]), tmp_path / "out", "float32", 10**9, False)
    assert not list(tmp_path.iterdir())


def test_tensors_are_made_one_after_the_other(tmp_path: Path) -> None:
    """The writer asks for a part, writes it, and only then asks for the next."""
    alive: list[int] = []

    def parts(k: int):
        for _ in range(3):
            alive.append(k)
            assert alive == [k], "a part of another tensor is still in memory"
            yield torch.full((2, 4), float(k))
            alive.pop()

    write_safetensors(
        tmp_path / "x.safetensors", [StoredTensor(f"t{k}", torch.float32, (6, 4), parts(k)) for k in range(3)]
    )
    read = load_file(tmp_path / "x.safetensors")
    assert all(torch.equal(read[f"t{k}"], torch.full((6, 4), float(k))) for k in range(3))


def test_a_checkpoint_that_does_not_fit_its_config_is_refused(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    path = plant(
        checkpoints["qwen2-tied"],
        tmp_path / "bad.pt",
        lambda c: c["model"].pop("model.layers.0.input_layernorm.weight"),
    )
    with pytest.raises(CheckpointError, match="input_layernorm"):
        open_dense(path)


def test_sizes_of_shards() -> None:
    assert parse_size("5GB") == 5 * 10**9 and parse_size("1.5 mb".replace(" ", "")) == 1_500_000
    for wrong in ("", "5", "GB", "-1GB", "0KB", "5TB", "nanGB", "1e400GB"):
        with pytest.raises(ValueError, match="shard-size"):
            parse_size(wrong)


def test_the_command_line(checkpoints: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = pack.ExportConfig(checkpoints["qwen3-tied"], "hf", tmp_path / "out", shard_size="20KB")
    assert pack.main(config) == 0
    assert "file(s)" in capsys.readouterr().out
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "bfloat16"

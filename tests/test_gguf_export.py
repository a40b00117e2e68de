"""GGUF files: what is in them, and what two readers that are not ours make of it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from tiny_models import dense_twin, import_source, plant, stories, tiny_config, write_source
from tokenizers import Tokenizer, normalizers, pre_tokenizers
from transformers import AutoModelForCausalLM

import dense_weights
import qwen_prime_pack as pack
from dense_weights import ExportError, open_dense
from gguf_export import PRE_TOKENIZERS, check_normalizer, export_gguf, pre_tokenizer_name
from qwen_prime_wrapper import load_model
from whole_output import OutputError

pytestmark = pytest.mark.usefixtures("one_thread")
MODEL = Path(__file__).resolve().parent.parent / "assets" / "tiny_coder"
IDS = torch.arange(3, 43)[None]
WIDE = {"hidden_size": 64, "intermediate_size": 96}
# transformers reads every qwen3 GGUF file with heads of 128, which the real ones have.
TALL = {**WIDE, "head_dim": 128}
KINDS = {
    "qwen2-tied": tiny_config("qwen2", **WIDE),
    "qwen2-untied": tiny_config("qwen2", tie_word_embeddings=False, **WIDE),
    "qwen3-tied": tiny_config("qwen3", **TALL),
    "qwen3-untied": tiny_config("qwen3", tie_word_embeddings=False, **TALL),
    "narrow": tiny_config("qwen2"),
    "llama": tiny_config("llama"),
}


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("sources")
    paths = {}
    for name, config in KINDS.items():
        import_source(write_source(folder / name, config), paths.setdefault(name, folder / f"{name}.pt"))
    return paths


@pytest.fixture(scope="module")
def tiny_coder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("coder") / "tiny_coder.pt"
    import_source(MODEL, path)
    return path


def field(reader: gguf.GGUFReader, name: str) -> Any:
    return reader.get_field(name).contents()


@pytest.mark.parametrize("kind", ["qwen2-tied", "qwen2-untied", "qwen3-tied", "qwen3-untied"])
@pytest.mark.parametrize("type_", ["F16", "BF16", "Q8_0"])
def test_tensors_and_logits(checkpoints: dict[str, Path], tmp_path: Path, kind: str, type_: str) -> None:
    """Every tensor is the rounded weight, and transformers reads a model of the same logits from the file."""
    path = tmp_path / "model.gguf"
    export_gguf(open_dense(checkpoints[kind]), path, type_, False)
    reader = gguf.GGUFReader(path)
    names = gguf.get_tensor_name_map(
        {v: k for k, v in gguf.MODEL_ARCH_NAMES.items()}[kind.split("-")[0]], KINDS[kind]["num_hidden_layers"]
    )
    ours, _, _ = load_model(checkpoints[kind])
    twin = dense_twin(ours)
    stored = {t.name: t for t in reader.tensors}
    bound = {"F16": 2.0**-11, "BF16": 2.0**-8, "Q8_0": 1 / 127}[type_]
    for name, tensor in twin.named_parameters():
        place = stored.pop(names.get_name(name, try_suffixes=(".weight", ".bias")))
        assert place.tensor_type.name == (type_ if tensor.ndim == 2 else "F32")
        values = gguf.quants.dequantize(place.data, place.tensor_type).reshape(tensor.shape)
        exact = tensor.detach().numpy()
        if tensor.ndim == 1:
            assert np.array_equal(values, exact)
        elif type_ == "Q8_0":
            largest = np.abs(exact.reshape(-1, 32)).max(1, keepdims=True)
            assert (np.abs(values - exact).reshape(-1, 32) <= largest * bound * 0.57).all()
        else:
            assert (np.abs(values - exact) <= np.abs(exact) * bound + 1e-7).all()
    assert not stored, "a tied head is not stored, and nothing else is"
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="model.gguf", dtype=torch.float32)
    assert theirs.config.tie_word_embeddings == kind.endswith("-tied")
    with torch.no_grad():
        a, b = ours(input_ids=IDS).logits, theirs(input_ids=IDS).logits
    assert float((a - b).abs().max()) < {"F16": 0.01, "BF16": 0.05, "Q8_0": 0.1}[type_] * float(a.abs().max())


def test_numbers_of_the_architecture(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    export_gguf(open_dense(checkpoints["qwen3-tied"]), path, "F16", False)
    reader, config = gguf.GGUFReader(path), KINDS["qwen3-tied"]
    assert field(reader, "general.architecture") == "qwen3"
    for name, value in {
        "context_length": config["max_position_embeddings"],
        "embedding_length": 64,
        "block_count": 2,
        "feed_forward_length": 96,
        "attention.head_count": 4,
        "attention.head_count_kv": 2,
        "attention.key_length": 128,
        "attention.value_length": 128,
        "rope.freq_base": config["rope_parameters"]["rope_theta"],
        "attention.layer_norm_rms_epsilon": pytest.approx(config["rms_norm_eps"]),
    }.items():
        assert field(reader, f"qwen3.{name}") == value, name


def test_vocabulary_merges_template_and_special_tokens(tiny_coder: Path, tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    export_gguf(open_dense(tiny_coder), path, "Q8_0", False)
    reader = gguf.GGUFReader(path)
    description = json.loads((MODEL / "tokenizer.json").read_text(encoding="utf-8"))
    tokens = field(reader, "tokenizer.ggml.tokens")
    assert tokens[: len(description["model"]["vocab"])] == sorted(
        description["model"]["vocab"], key=description["model"]["vocab"].__getitem__
    )
    assert tokens[4093:] == ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    assert field(reader, "tokenizer.ggml.token_type")[4092:] == [1, 3, 3, 3]
    assert field(reader, "tokenizer.ggml.merges") == [" ".join(pair) for pair in description["model"]["merges"]]
    assert field(reader, "tokenizer.ggml.pre") == "qwen2"
    assert field(reader, "tokenizer.ggml.eos_token_id") == 4095 == field(reader, "tokenizer.ggml.eot_token_id")
    assert field(reader, "tokenizer.ggml.add_bos_token") is False
    assert field(reader, "tokenizer.chat_template") == (MODEL / "chat_template.jinja").read_text(encoding="utf-8")


def describe(pre: Any) -> dict[str, Any]:
    tokenizer = Tokenizer.from_file(str(MODEL / "tokenizer.json"))
    tokenizer.pre_tokenizer = pre
    tokenizer.normalizer = normalizers.NFC()
    return json.loads(tokenizer.to_str())


def test_the_pre_tokenizer_has_a_name_or_is_refused(caplog: pytest.LogCaptureFixture) -> None:
    from tokenizers import Regex

    plain = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    for pattern, name in PRE_TOKENIZERS.items():
        split = pre_tokenizers.Split(Regex(pattern), "isolated")
        assert pre_tokenizer_name(describe(pre_tokenizers.Sequence([split, plain]))) == name
    assert pre_tokenizer_name(describe(pre_tokenizers.ByteLevel(add_prefix_space=False))) == "gpt-2"
    assert not caplog.records
    assert pre_tokenizer_name(describe(plain)) == "qwen2"
    assert "does not split" in caplog.text
    odd = pre_tokenizers.Split(Regex(r"\d+"), "isolated")
    for pre, words in (
        (pre_tokenizers.Sequence([odd, plain]), "no name"),
        (pre_tokenizers.Whitespace(), "byte-level BPE"),
        (pre_tokenizers.ByteLevel(add_prefix_space=True), "space before"),
    ):
        with pytest.raises(ExportError, match=words):
            pre_tokenizer_name(describe(pre))


def test_normalizers_beside_nfc_are_refused() -> None:
    plain = describe(pre_tokenizers.ByteLevel(add_prefix_space=False))
    for good in (None, normalizers.NFC(), normalizers.Sequence([normalizers.NFC()])):
        check_normalizer({**plain, "normalizer": good and json.loads(good.__getstate__())})
    for odd, name in (
        (normalizers.NFKC(), "NFKC"),
        (normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()]), "Lowercase"),
    ):
        with pytest.raises(ExportError, match=f"normalizes text by {name}"):
            check_normalizer({**plain, "normalizer": json.loads(odd.__getstate__())})


def test_what_the_format_or_type_does_not_take_is_refused(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    """One line that names the tensor or the reason, and no file."""

    def loud(content: dict) -> None:
        content["model"]["model.layers.1.mlp.up_proj.grid.scale"][3] = 1e8

    def long_rope(content: dict) -> None:
        content["hf_config"]["rope_parameters"] = {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}

    def gelu(content: dict) -> None:
        content["hf_config"]["hidden_act"] = "gelu"

    def lowered(content: dict) -> None:
        files = content["tokenizer"]["files"]
        tokenizer = json.loads(files["tokenizer.json"].numpy().tobytes())
        tokenizer["normalizer"] = {"type": "Lowercase"}
        files["tokenizer.json"] = torch.frombuffer(bytearray(json.dumps(tokenizer).encode()), dtype=torch.uint8)

    biased = write_source(tmp_path / "biased", tiny_config("qwen3", attention_bias=True, **TALL))
    import_source(biased, tmp_path / "biased.pt")
    gelu_path = plant(checkpoints["qwen2-tied"], tmp_path / "gelu.pt", gelu)
    lowered_path = plant(checkpoints["qwen2-tied"], tmp_path / "lowered.pt", lowered)
    loud_path = plant(checkpoints["qwen2-tied"], tmp_path / "loud.pt", loud)
    rope_path = plant(checkpoints["qwen2-tied"], tmp_path / "rope.pt", long_rope)
    before = set(tmp_path.iterdir())
    for path, type_, words in (
        (checkpoints["narrow"], "Q8_0", r"rows of 48 weights, Q8_0 needs multiples of 32"),
        (checkpoints["llama"], "F16", "model_type is 'llama'"),
        (loud_path, "F16", r"model\.layers\.1\.mlp\.up_proj\.weight .* float16"),
        (loud_path, "Q8_0", r"model\.layers\.1\.mlp\.up_proj\.weight"),
        (rope_path, "F16", "rope type 'linear'"),
        (gelu_path, "F16", "hidden_act is 'gelu', GGUF means silu"),
        (lowered_path, "F16", "normalizes text by Lowercase"),
        (tmp_path / "biased.pt", "F16", "attention_bias"),
    ):
        with pytest.raises(ExportError, match=words) as error:
            export_gguf(open_dense(path), tmp_path / "model.gguf", type_, False)
        assert "\n" not in str(error.value)
        assert set(tmp_path.iterdir()) == before


def test_a_full_disk_leaves_nothing(
    checkpoints: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(self, dtype: torch.dtype = torch.float32):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(dense_weights.DenseWeight, "slices", full)
    with pytest.raises(OutputError, match="No space left"):
        export_gguf(open_dense(checkpoints["qwen2-tied"]), tmp_path / "model.gguf", "F16", False)
    assert not list(tmp_path.iterdir())


def greedy(model: Any, ids: list[int], tokens: int) -> tuple[list[int], list[float]]:
    """The float32 model's continuation, and by how much each token's logit leads the next best."""
    found, leads = [], []
    with torch.no_grad():
        for _ in range(tokens):
            top = model(input_ids=torch.tensor([ids + found])).logits[0, -1].topk(2)
            found.append(int(top.indices[0]))
            leads.append(float(top.values[0] - top.values[1]))
    return found, leads


def in_llama_cpp(path: Path, texts: list[str], tokenizer: Any, model: Any, tokens: int) -> None:
    """llama.cpp tokenizes alike and continues alike, except where the float32 model's choice is a near tie."""
    llama_cpp = pytest.importorskip("llama_cpp", reason="pip install -r requirements-bench.txt")
    llama = llama_cpp.Llama(str(path), n_ctx=256, n_threads=1, verbose=False)
    try:
        same = 0
        for text in texts:
            ids = llama.tokenize(text.encode(), add_bos=True, special=True)
            assert ids == tokenizer(text)["input_ids"]
            llama.reset()
            theirs = []
            for token in llama.generate(ids, temp=0.0, top_k=1, repeat_penalty=1.0):
                theirs.append(token)
                if len(theirs) == tokens:
                    break
            ours, leads = greedy(model, ids, tokens)
            same += theirs == ours
            first = next((k for k, (a, b) in enumerate(zip(ours, theirs, strict=True)) if a != b), None)
            assert first is None or leads[first] < 0.02, f"{text!r} differs at token {first}, lead {leads[first]}"
        assert same >= 0.8 * len(texts)
    finally:
        llama.close()


def test_llama_cpp_continues_tiny_coder(tiny_coder: Path, tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    assert pack.main(pack.ExportConfig(tiny_coder, "gguf", path)) == 0
    model, tokenizer, _ = load_model(tiny_coder)
    texts = [
        tokenizer.apply_chat_template([{"role": "user", "content": task}], tokenize=False, add_generation_prompt=True)
        for task in (
            "Write a function that adds two numbers.",
            "def area(w, h):",
            "Größe 123\n\n\tx = 'it''s'",
            "class A",
        )
    ]
    in_llama_cpp(path, [*texts, "import os\nimport sys\n\n\ndef main():\n"], tokenizer, model, 8)


def test_llama_cpp_continues_a_model_with_biases_and_its_own_head(shared_data: Path, tmp_path: Path) -> None:
    checkpoint, path = tmp_path / "atto.pt", tmp_path / "atto.gguf"
    import_source(shared_data / "models" / "atto-qwen2-bias", checkpoint)
    export_gguf(open_dense(checkpoint), path, "F16", False)
    model, tokenizer, _ = load_model(checkpoint)
    in_llama_cpp(path, [text[:90] for text in stories(shared_data)[1][:5]], tokenizer, model, 8)


def test_llama_cpp_continues_a_qwen3(tmp_path: Path) -> None:
    """Random weights, tiny_coder's tokenizer: llama.cpp takes none without merges."""
    config = tiny_config(
        "qwen3", vocab_size=4096, tie_word_embeddings=False, bos_token_id=4093, eos_token_id=4095, **TALL
    )
    source = write_source(tmp_path / "source", config)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copyfile(MODEL / name, source / name)
    checkpoint, path = tmp_path / "tiny.pt", tmp_path / "tiny.gguf"
    import_source(source, checkpoint)
    export_gguf(open_dense(checkpoint), path, "F16", False)
    model, tokenizer, _ = load_model(checkpoint)
    in_llama_cpp(path, ["one text", "Another, with 3 numbers: 1 2 3.", "def f(x):\n    return x"], tokenizer, model, 8)

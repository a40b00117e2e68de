"""The wrapper: transformers' models with ghost modules inside compute what the dense ones compute."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from tiny_models import (
    VOCABULARY,
    dense_twin,
    difference,
    encode_documents,
    import_source,
    plant,
    random_model,
    rewrite_json,
    stories,
    tiny_config,
    write_source,
)
from tokenizers import Tokenizer
from torch import nn
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedModel, PreTrainedTokenizerFast

import manifolds
import qwen_prime_wrapper as wrapper
from ballots import Ballot
from ghost_core import GhostEmbedding, GhostLinearTandem, grids_of, name_grids
from ghost_grid import GhostGrid
from prime_checkpoint import CheckpointError, load_checkpoint
from qwen_prime_wrapper import ModelError
from vote_rules import RULES, rule_named

PARAMETERS = {
    "Qwen2.5-Coder-1.5B-Instruct": 1_543_714_304,
    "Qwen3-1.7B": 1_720_574_976,
    "Qwen3-0.6B": 596_049_920,
    "Qwen2.5-0.5B": 494_032_768,
}
STORY_MODELS = ("stories260K-qwen2", "atto-qwen2-bias")
KINDS = ("qwen2", "qwen3", "llama")
STRANGE = "Once upon a time, there was Lily's  cat.\n\n  123 caf\u00e9"


pytestmark = pytest.mark.usefixtures("one_thread")


@dataclass(frozen=True)
class Batch:
    """What ``mean_answer_loss`` reads of a batch."""

    input_ids: torch.Tensor
    labels: torch.Tensor
    position_ids: torch.Tensor


@pytest.fixture(scope="module", params=[(kind, tied) for kind in KINDS for tied in (True, False)], ids=str)
def imported(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A random tiny source and its checkpoint."""
    kind, tied = request.param
    folder = tmp_path_factory.mktemp("wrapper")
    source = write_source(folder / "source", tiny_config(kind, tie_word_embeddings=tied))
    import_source(source, folder / "tiny.pt")
    return source, folder / "tiny.pt"


@pytest.fixture(scope="module")
def story_checkpoints(shared_data: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("stories")
    for name in STORY_MODELS:
        import_source(shared_data / "models" / name, folder / f"{name}.pt")
    return {name: folder / f"{name}.pt" for name in STORY_MODELS}


def ghost_model(kind: str = "qwen2", manifold: str = manifolds.DEFAULT, **changes: object) -> PreTrainedModel:
    """A ghost model with the weights of a random dense one."""
    hf_config = tiny_config(kind, **changes)
    dense = random_model(hf_config).state_dict()
    table = manifolds.build(manifold)
    model = wrapper.build_model(hf_config, table)
    tensors = {}
    for name, (shape, _) in wrapper.expected_tensors(model).items():
        if name.endswith(".grid.indices"):
            grid = GhostGrid(*shape, table)
            grid.import_weights(dense[wrapper.source_name(name)])
            tensors[name], tensors[name.removesuffix("indices") + "scale"] = grid.indices, grid.scale
        elif not name.endswith(".grid.scale"):
            tensors[name] = dense[name]
    wrapper.assign_tensors(model, tensors, copy=False)
    return model


def random_ids(rows: int, tokens: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(VOCABULARY, (rows, tokens), generator=torch.Generator().manual_seed(seed))


# -- building ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PARAMETERS)
def test_real_configs_have_their_published_size_and_no_dense_layer(shared_data: Path, name: str) -> None:
    hf_config = json.loads((shared_data / "configs" / name / "config.json").read_text(encoding="utf-8"))
    model = wrapper.build_model(hf_config, manifolds.build())
    assert wrapper.count_parameters(model) == PARAMETERS[name]
    left = [n for n, m in model.named_modules() if isinstance(m, nn.Linear | nn.Embedding)]
    assert left == []
    assert all(g.indices.is_meta and g.scale.is_meta for g in grids_of(model).values())
    # Seven projections a layer, and one grid for embedding and head, which all four configs tie.
    assert hf_config["tie_word_embeddings"]
    assert len(grids_of(model)) == 7 * hf_config["num_hidden_layers"] + 1


def test_ghost_and_plain_models_have_the_same_parameter_count() -> None:
    for kind in KINDS:
        for tied in (True, False):
            hf_config = tiny_config(kind, tie_word_embeddings=tied)
            plain = sum(p.numel() for p in random_model(hf_config).parameters())
            assert wrapper.count_parameters(wrapper.build_model(hf_config, manifolds.build())) == plain


def test_a_tied_head_is_the_embeddings_grid_and_an_untied_one_is_not() -> None:
    tied = ghost_model(tie_word_embeddings=True)
    untied = ghost_model(tie_word_embeddings=False)
    for model in (tied, untied):
        assert isinstance(model.get_input_embeddings(), GhostEmbedding)
        assert isinstance(model.get_output_embeddings(), GhostLinearTandem)
    assert tied.get_output_embeddings().grid is tied.get_input_embeddings().grid
    assert untied.get_output_embeddings().grid is not untied.get_input_embeddings().grid
    assert "lm_head.grid.indices" not in wrapper.model_tensors(tied)
    assert "lm_head.grid.indices" in wrapper.model_tensors(untied)
    assert len(grids_of(untied)) == len(grids_of(tied)) + 1


def test_every_grid_knows_its_name_and_shares_one_ballot() -> None:
    model = ghost_model()
    grids = grids_of(model)
    assert {name: grid.name for name, grid in grids.items()} == {name: name for name in grids}
    assert len({id(grid.ballot) for grid in grids.values()}) == 1


@pytest.mark.parametrize("kind", KINDS)
def test_rotary_frequencies_are_rebuilt(kind: str) -> None:
    model = ghost_model(kind)
    plain = random_model(tiny_config(kind))
    found, wanted = dict(model.named_buffers()), dict(plain.named_buffers())
    assert any(name.endswith("inv_freq") for name in wanted)
    for name, buffer in wanted.items():
        assert torch.equal(found[name], buffer), name
    assert not [n for n, t in [*model.named_parameters(), *model.named_buffers()] if t.is_meta]


def test_scaled_rotary_frequencies_are_rebuilt() -> None:
    rope = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 32}
    model = ghost_model(rope_parameters=rope)
    plain = random_model(tiny_config(rope_parameters=rope))
    assert torch.equal(model.model.rotary_emb.inv_freq, plain.model.rotary_emb.inv_freq)
    assert not torch.equal(model.model.rotary_emb.inv_freq, ghost_model().model.rotary_emb.inv_freq)
    ids = random_ids(1, 60)
    torch.testing.assert_close(model(ids).logits, dense_twin(model)(ids).logits, rtol=1e-5, atol=1e-5)


def test_an_unsupported_architecture_is_named_with_the_supported_ones() -> None:
    hf_config = {"model_type": "mamba2", "architectures": ["Mamba2ForCausalLM"]}
    with pytest.raises(ModelError) as caught:
        wrapper.build_model(hf_config, manifolds.build(), "there/config.json")
    for word in ("there/config.json", "mamba2", "Mamba2ForCausalLM", *wrapper.ARCHITECTURES.values()):
        assert word in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("record", [{"quant_method": "gptq", "bits": 4}, {"bits": 8}, ["gptq"]], ids=str)
def test_quantized_weights_are_refused_with_what_is_expected(record: object) -> None:
    with pytest.raises(
        ModelError, match=r"there/config\.json has a quantization_config .*unquantized weights"
    ) as caught:
        wrapper.parse_config({**tiny_config(), "quantization_config": record}, "there/config.json")
    assert "\n" not in str(caught.value)
    for allowed in (None, {"quant_method": "prime"}):
        wrapper.parse_config({**tiny_config(), "quantization_config": allowed}, "there/config.json")


@pytest.mark.parametrize(
    "changes",
    [
        {"num_attention_heads": 0},
        {"hidden_size": -48},
        {"hidden_size": "big"},
        {"hidden_act": "nonsense"},
        {"rope_parameters": {"rope_type": "nonsense", "rope_theta": 10000.0}},
        {"pad_token_id": 9999},
        {"model_type": ["qwen2"]},
    ],
    ids=str,
)
def test_a_config_that_transformers_cannot_build_is_a_model_error_in_one_line(changes: dict[str, object]) -> None:
    with pytest.raises(ModelError) as caught:
        wrapper.build_model({**tiny_config(), **changes}, manifolds.build(), "there/config.json")
    assert "there/config.json" in str(caught.value) and "\n" not in str(caught.value)


# -- the same function as a dense model -------------------------------------------------------------------------------


def test_logits_are_the_sources_to_within_rounding(imported: tuple[Path, Path]) -> None:
    source, checkpoint = imported
    model, _, kind = wrapper.load_model(checkpoint)
    dense, _, dense_kind = wrapper.load_model(source)
    assert (kind, dense_kind) == ("prime", "dense")
    ids = random_ids(2, 100)
    with torch.no_grad():
        ours, theirs = model(ids).logits, dense(ids).logits
    # Weights carry about 83 dB, two layers of random ones lose a few: an error in wiring would be of the order of 1.
    noise = (ours - theirs).square().mean() / theirs.square().mean()
    assert 0 < float(noise) < 10 ** (-65 / 10)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_logits_and_input_gradients_are_those_of_the_dequantized_model(kind: str, tied: bool) -> None:
    model = ghost_model(kind, tie_word_embeddings=tied)
    twin = dense_twin(model)
    ids = random_ids(2, 40)
    weight = torch.randn(2, 40, VOCABULARY, generator=torch.Generator().manual_seed(1))
    results = []
    for network in (model, twin):
        embedded = network.get_input_embeddings()(ids).detach().requires_grad_()
        logits = network(inputs_embeds=embedded, use_cache=False).logits
        (logits * weight).sum().backward()
        results.append((logits.detach(), embedded.grad))
    (logits, gradient), (wanted_logits, wanted_gradient) = results
    torch.testing.assert_close(logits, wanted_logits, rtol=1e-5, atol=1e-5 * float(wanted_logits.abs().max()))
    torch.testing.assert_close(gradient, wanted_gradient, rtol=1e-4, atol=1e-5 * float(wanted_gradient.abs().max()))
    biases = {n: p.grad for n, p in twin.named_parameters() if n.endswith("bias") or "norm" in n}
    for name, parameter in model.named_parameters():
        wanted = biases[name]
        torch.testing.assert_close(parameter.grad, wanted, rtol=1e-4, atol=1e-5 * float(wanted.abs().max()), msg=name)


@pytest.mark.parametrize("name", STORY_MODELS)
def test_greedy_generation_is_the_sources(shared_data: Path, story_checkpoints: dict[str, Path], name: str) -> None:
    model, tokenizer, _ = wrapper.load_model(story_checkpoints[name])
    source, _, _ = wrapper.load_model(shared_data / "models" / name)
    _, held_out = stories(shared_data)
    prompt = tokenizer(held_out[0], return_tensors="pt")["input_ids"][:, :20]
    ours = model.generate(prompt, max_new_tokens=48, do_sample=False)
    theirs = source.generate(prompt, max_new_tokens=48, do_sample=False)
    assert ours.shape[1] > 30
    assert ours.tolist() == theirs.tolist()


def test_generation_stops_where_the_sources_generation_config_says(tmp_path: Path) -> None:
    """Qwen2.5-Instruct ends at two tokens of which config.json names one; generation_config.json has both."""
    source = write_source(tmp_path / "source", tiny_config())
    rewrite_json(source / "generation_config.json", eos_token_id=[258, 7], repetition_penalty=1.05)
    import_source(source, tmp_path / "tiny.pt")
    wanted = wrapper.load_model(source)[0].generation_config
    found = wrapper.load_model(tmp_path / "tiny.pt")[0].generation_config
    assert wanted.eos_token_id == [258, 7]
    assert (found.eos_token_id, found.repetition_penalty) == (wanted.eos_token_id, wanted.repetition_penalty)


def test_continuations_are_greedy_and_stop_where_a_chat_does(tmp_path: Path) -> None:
    """What the model's own generation config makes of answers is its affair in a chat; base models name another end."""
    write_source(tmp_path, tiny_config())
    model, tokenizer, _ = wrapper.load_model(tmp_path)
    prompt = tokenizer("def f")["input_ids"]
    # No token but bytes is likely in this model.
    model.get_output_embeddings().weight.data[256:] = 0.0
    wanted: list[int] = []
    with torch.no_grad():
        for _ in range(12):
            logits = model(input_ids=torch.tensor([prompt + wanted]), use_cache=False).logits[0, -1]
            wanted.append(int(logits.argmax()))
    own = model.generation_config = GenerationConfig(
        eos_token_id=256,
        do_sample=True,
        repetition_penalty=3.0,
        no_repeat_ngram_size=1,
        suppress_tokens=wanted[:1],
        min_length=40,
        bad_words_ids=[wanted[:2]],
    )
    kept = own.to_dict()
    assert wrapper.continue_texts(model, tokenizer, [prompt], 12) == [tokenizer.decode(wanted)]
    assert model.generation_config is own and own.to_dict() == kept
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    tokenizer.eos_token = "<|bos|>"
    assert wrapper.stop_ids(model, tokenizer) == [256, end]
    real = model.forward

    def ends(*args: object, **kwargs: object) -> object:
        out = real(*args, **kwargs)
        out.logits[..., end] = 1e4
        return out

    model.forward = ends
    assert wrapper.continue_texts(model, tokenizer, [prompt], 12) == [""]


# -- loss -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tied", [True, False])
def test_answer_loss_is_transformers_loss_times_its_tokens(tied: bool) -> None:
    model = ghost_model(tie_word_embeddings=tied)
    ids = random_ids(3, 30)
    labels = ids.clone()
    labels[:, :11] = -100
    labels[1, 20:25] = -100
    for network in (model, dense_twin(model)):
        loss, count = wrapper.answer_loss(network, ids, labels)
        assert count == 3 * 19 - 5
        wanted = network(input_ids=ids, labels=labels, use_cache=False).loss * count
        assert math.isclose(loss.item(), wanted.item(), rel_tol=2e-6)


def test_a_dense_head_makes_a_few_tokens_logits_at_a_time() -> None:
    """A long window in slices: the same loss to float32's rounding of a sum; with a backward pass in one piece."""
    dense = dense_twin(ghost_model())
    ids = random_ids(9, 128)
    rows: list[int] = []
    dense.get_output_embeddings().register_forward_hook(lambda _, inputs, __: rows.append(len(inputs[0])))
    whole, count = wrapper.answer_loss(dense, ids, ids)
    with torch.no_grad():
        sliced, same = wrapper.answer_loss(dense, ids, ids)
        again, _ = wrapper.answer_loss(dense, ids, ids)
    assert rows == [1143, 512, 512, 119, 512, 512, 119] and count == same == 1143
    assert sliced.dtype == torch.float32 and sliced.item() == again.item()
    assert math.isclose(sliced.item(), whole.item(), rel_tol=1e-6)
    with torch.no_grad():
        few, _ = wrapper.answer_loss(dense, ids[:4], ids[:4])
    assert few.item() == wrapper.answer_loss(dense, ids[:4], ids[:4])[0].item(), "one slice is the whole"
    assert wrapper.answer_loss(dense, ids, torch.full_like(ids, -100))[0].item() == 0.0


def test_answer_loss_never_counts_the_first_token_of_a_row() -> None:
    model = ghost_model()
    ids = random_ids(2, 10)
    loss, count = wrapper.answer_loss(model, ids, ids)
    changed = ids.clone()
    changed[:, 0] = -100
    assert count == 18
    assert loss.item() == wrapper.answer_loss(model, ids, changed)[0].item()


def test_answer_loss_of_nothing_is_zero() -> None:
    ids = random_ids(1, 6)
    loss, count = wrapper.answer_loss(ghost_model(), ids, torch.full_like(ids, -100))
    assert (loss.item(), count) == (0.0, 0)


def test_packed_documents_do_not_see_each_other() -> None:
    model = ghost_model("qwen3")
    lengths = [(13, 17, 10), (25, 15)]
    documents = [[random_ids(1, n, seed=10 * r + i) for i, n in enumerate(row)] for r, row in enumerate(lengths)]
    ids = torch.cat([torch.cat(row, 1) for row in documents])
    labels = ids.clone()
    for r, row in enumerate(lengths):
        for start in (0, *torch.tensor(row).cumsum(0)[:-1].tolist()):
            labels[r, start] = -100
    positions = torch.stack([torch.cat([torch.arange(n) for n in row]) for row in lengths])
    for network in (model, dense_twin(model)):
        packed, count = wrapper.answer_loss(network, ids, labels, positions)
        alone = [wrapper.answer_loss(network, d, d) for row in documents for d in row]
        assert count == sum(n for _, n in alone) == 75
        assert math.isclose(packed.item(), sum(loss.item() for loss, _ in alone), rel_tol=1e-5)
        forward = network(input_ids=ids, position_ids=positions, labels=labels, use_cache=False)
        assert math.isclose(packed.item(), forward.loss.item() * count, rel_tol=1e-5)
        # Without positions the documents do see each other, so the equality above is not for free.
        assert abs(wrapper.answer_loss(network, ids, labels)[0].item() - packed.item()) > 0.01


def test_mean_answer_loss_weighs_by_tokens_and_leaves_the_mode() -> None:
    model = ghost_model().train()
    batches = []
    for seed, (rows, tokens) in enumerate([(1, 12), (2, 30)]):
        ids = random_ids(rows, tokens, seed)
        batches.append(Batch(ids, ids, torch.arange(tokens).repeat(rows, 1)))
    mean, tokens = wrapper.mean_answer_loss(model, batches)
    assert model.training
    model.eval()
    sums = [wrapper.answer_loss(model, b.input_ids, b.labels, b.position_ids) for b in batches]
    assert tokens == 11 + 58
    assert math.isclose(mean, sum(loss.item() for loss, _ in sums) / tokens, rel_tol=1e-6)
    assert not math.isclose(mean, sum(loss.item() / n for loss, n in sums) / 2, rel_tol=1e-6)


@pytest.mark.parametrize("name", RULES)
def test_mean_answer_loss_casts_no_votes(name: str) -> None:
    rule = rule_named(name)
    model = ghost_model(manifold="compact" if rule.vote_bits else manifolds.DEFAULT)
    name_grids(model, ballot := Ballot(rule=rule))
    grid = model.get_input_embeddings().grid
    grid.unlock()
    assert grid.uses == 2
    ids = random_ids(1, 12)
    for mode in ("measure", "cast"):
        ballot.open(mode, 0, 0, 1)
        before = {n: t.clone() for n, t in {"words": grid.indices, **grid.vote_state()}.items()}
        wrapper.mean_answer_loss(model, [Batch(ids, ids, torch.arange(12)[None])])
        state = {"words": grid.indices, **grid.vote_state()}
        assert all(torch.equal(before[n], t) for n, t in state.items()), mode
        wrapper.answer_loss(model, ids, ids)[0].backward()
        assert not all(torch.equal(before[n], t) for n, t in state.items()), mode
        grid.finish_measuring()
    assert grid.votes.any()


def test_mean_answer_loss_of_nothing_is_an_error() -> None:
    model = ghost_model()
    with pytest.raises(ModelError, match="no token to score"):
        wrapper.mean_answer_loss(model, [])
    ids = random_ids(1, 5)
    with pytest.raises(ModelError, match="no token to score"):
        wrapper.mean_answer_loss(model, [Batch(ids, torch.full_like(ids, -100), torch.arange(5)[None])])


# -- tokenizer --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", STORY_MODELS)
def test_story_tokenizers_survive_in_the_checkpoint(
    shared_data: Path, story_checkpoints: dict[str, Path], name: str
) -> None:
    folder = shared_data / "models" / name
    wanted = PreTrainedTokenizerFast.from_pretrained(folder)
    _, held_out = stories(shared_data)
    for tokenizer in (
        wrapper.load_tokenizer(folder),
        wrapper.tokenizer_from_checkpoint(load_checkpoint(story_checkpoints[name])),
    ):
        assert len(tokenizer) == len(wanted)
        for text in [STRANGE, *held_out[:20]]:
            assert tokenizer(text)["input_ids"] == wanted(text)["input_ids"]
        assert tokenizer.eos_token_id == wanted.eos_token_id
        assert tokenizer.decode(tokenizer(STRANGE, add_special_tokens=False)["input_ids"]).strip() == STRANGE


@pytest.mark.parametrize(
    "named", ["PreTrainedTokenizerFast", "TokenizersBackend", "LlamaTokenizer", "Qwen2Tokenizer", None]
)
def test_a_qwen2_folder_with_another_vocabulary_is_read_as_its_tokenizer_json_says(
    shared_data: Path, tmp_path: Path, named: str | None
) -> None:
    """The trap: AutoTokenizer makes every folder of model_type qwen2 a Qwen2Tokenizer (1.43 nats become 5.91)."""
    source = shared_data / "models" / "stories260K-qwen2"
    for file in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        (tmp_path / file).write_bytes((source / file).read_bytes())
    rewrite_json(tmp_path / "tokenizer_config.json", tokenizer_class=named)
    truth = Tokenizer.from_file(str(source / "tokenizer.json")).encode(STRANGE, add_special_tokens=False).ids
    kept = {"tokenizer": {"files": wrapper.pack_tokenizer(tmp_path)}}
    for tokenizer in (wrapper.load_tokenizer(tmp_path), wrapper.tokenizer_from_checkpoint(kept)):
        assert tokenizer(STRANGE, add_special_tokens=False)["input_ids"] == truth


@pytest.mark.parametrize("name", ["qwen2.5-coder", "qwen3"])
def test_qwens_own_tokenizer_survives_in_the_checkpoint(shared_data: Path, name: str) -> None:
    folder = shared_data / "tokenizers" / name
    vectors = shared_data / "reference" / "qwen2_tokenizer_vectors"
    texts = (vectors / "ggml-vocab-qwen2.gguf.inp").read_text(encoding="utf-8").split("\n__ggml_vocab_test__\n")
    wanted = [
        [int(i) for i in line.split()] for line in (vectors / "ggml-vocab-qwen2.gguf.out").read_text().splitlines()
    ]
    assert len(wanted) > 40
    tokenizer = wrapper.tokenizer_from_checkpoint({"tokenizer": {"files": wrapper.pack_tokenizer(folder)}})
    for text, ids in zip(texts, wanted, strict=False):
        assert tokenizer(text)["input_ids"] == ids, text
    assert tokenizer("<|im_start|><|im_end|>")["input_ids"] == [151644, 151645]
    template = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))["chat_template"]
    assert tokenizer.chat_template == template
    chat = tokenizer.apply_chat_template([{"role": "user", "content": "hello"}], tokenize=False)
    assert "<|im_start|>user\nhello<|im_end|>" in chat


def test_a_folder_without_a_usable_tokenizer_is_named(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="cannot read a tokenizer in"):
        wrapper.load_tokenizer(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("{", encoding="utf-8")
    with pytest.raises(ModelError, match="cannot read a tokenizer in"):
        wrapper.load_tokenizer(tmp_path)


def test_a_checkpoint_may_not_name_files_outside_the_tokenizer() -> None:
    files = {"../evil.json": torch.zeros(2, dtype=torch.uint8)}
    with pytest.raises(ModelError, match="evil"):
        wrapper.tokenizer_from_checkpoint({"tokenizer": {"files": files}})


# -- loading ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "nats"), [("stories260K-qwen2", 1.43), ("atto-qwen2-bias", 2.15)])
def test_folder_and_file_score_stories_about_as_published(
    shared_data: Path, story_checkpoints: dict[str, Path], name: str, nats: float
) -> None:
    source, tokenizer, _ = wrapper.load_model(shared_data / "models" / name)
    model, own, _ = wrapper.load_model(story_checkpoints[name])
    _, held_out = stories(shared_data)
    pieces = encode_documents(own, held_out, 512, 3000)
    assert [p.tolist() for p in pieces] == [p.tolist() for p in encode_documents(tokenizer, held_out, 512, 3000)]
    _, gap, loss, _ = difference(model, source, pieces)
    # Which stories were held out is not recorded; the wrong tokenizer costs 4 nats.
    assert abs(loss - nats) < 0.5
    assert abs(gap) < 1e-4


def test_a_loaded_model_is_float32_in_eval_mode_and_locked(imported: tuple[Path, Path]) -> None:
    source, checkpoint = imported
    for path in (source, checkpoint):
        model, tokenizer, _ = wrapper.load_model(path)
        assert not model.training
        assert {p.dtype for p in model.parameters()} == {torch.float32}
        assert len(tokenizer) == 259
    assert not any(grid.unlocked for grid in grids_of(model).values())


def test_copied_tensors_do_not_alias_the_checkpoint(imported: tuple[Path, Path]) -> None:
    checkpoint = load_checkpoint(imported[1])
    first = next(n for n in checkpoint["model"] if n.endswith(".grid.indices"))
    before = checkpoint["model"][first].clone()
    model = wrapper.model_from_checkpoint(checkpoint)
    model.get_submodule(first.rpartition(".")[0]).indices.add_(1)
    assert torch.equal(checkpoint["model"][first], before)


def test_model_tensors_are_the_checkpoints(imported: tuple[Path, Path]) -> None:
    checkpoint = load_checkpoint(imported[1])
    found = wrapper.model_tensors(wrapper.model_from_checkpoint(checkpoint))
    assert set(found) == set(checkpoint["model"])
    assert all(torch.equal(found[n], t) and found[n].dtype == t.dtype for n, t in checkpoint["model"].items())


@pytest.mark.parametrize("name", manifolds.NAMES)
def test_the_record_of_a_manifold_gives_it_back(name: str) -> None:
    """By its name, or from its own table where the name is another suite's."""
    table = manifolds.build(name)
    record = wrapper.manifold_record(table)
    assert wrapper.manifold_of({"manifold": record}) is table
    stranger = wrapper.manifold_of({"manifold": {**record, "name": "homemade"}})
    assert (stranger.sha256, stranger.vote_bits) == (table.sha256, table.vote_bits)
    assert torch.equal(stranger.fixed, table.fixed) and torch.equal(stranger.thresholds, table.thresholds)


@pytest.mark.parametrize("bits", [-1, 0, 5, 6, 7, 1 << 40])
@pytest.mark.parametrize("name", manifolds.NAMES)
def test_a_manifold_with_other_vote_bits_is_refused(name: str, bits: int) -> None:
    """Words read with the wrong bits would be other weights."""
    table = manifolds.build(name)
    if bits != table.vote_bits:
        with pytest.raises(CheckpointError, match="manifold is unusable"):
            wrapper.manifold_of({"manifold": {**wrapper.manifold_record(table), "vote_bits": bits}})


@pytest.mark.parametrize("tied", [True, False])
def test_votes_inside_the_words_are_no_part_of_the_model(tied: bool) -> None:
    """Whatever votes the words of a compact model hold, its logits are those of the dequantized one, to the bit."""
    model = ghost_model(manifold="compact", tie_word_embeddings=tied)
    twin = dense_twin(model)
    ids = random_ids(2, 40)
    with torch.no_grad():
        logits = model(ids).logits
        wanted = twin(ids).logits
        torch.testing.assert_close(logits, wanted, rtol=1e-5, atol=1e-5 * float(wanted.abs().max()))
        generator = torch.Generator().manual_seed(2)
        for grid in grids_of(model).values():
            grid.indices += torch.randint(-31, 32, grid.shape, generator=generator).to(torch.int16)
            assert bool(grid.tables().votes(grid.indices).any()) and grid.tables().unused(grid.indices) == 0
        assert torch.equal(model(ids).logits, logits)


@pytest.mark.parametrize("what", ["missing", "extra", "shape"])
def test_a_checkpoint_that_does_not_fit_its_config_is_refused_by_name(tmp_path: Path, what: str) -> None:
    source = write_source(tmp_path / "source", tiny_config())
    import_source(source, tmp_path / "tiny.pt")
    name = "model.layers.1.self_attn.v_proj.bias"

    def change(checkpoint: dict) -> None:
        tensors = checkpoint["model"]
        if what == "missing":
            del tensors[name]
        elif what == "extra":
            tensors[name.replace("v_proj", "o_proj")] = torch.zeros(48)
        else:
            tensors[name] = torch.zeros(3)

    with pytest.raises(CheckpointError, match=name.replace("v_proj", "o_proj") if what == "extra" else name):
        wrapper.load_model(plant(tmp_path / "tiny.pt", tmp_path / "changed.pt", change))


@pytest.mark.parametrize("content", [None, "{", "[]", '{"model_type": "gpt2"}'])
def test_load_model_names_what_is_wrong_with_a_folder(tmp_path: Path, content: str | None) -> None:
    if content is not None:
        (tmp_path / "config.json").write_text(content, encoding="utf-8")
    with pytest.raises(ModelError, match=r"config\.json"):
        wrapper.load_model(tmp_path)


def test_load_model_of_a_folder_without_weights_and_of_nothing(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(tiny_config()), encoding="utf-8")
    with pytest.raises(ModelError, match="cannot load"):
        wrapper.load_model(tmp_path)
    with pytest.raises(CheckpointError, match="cannot read"):
        wrapper.load_model(tmp_path / "none.pt")


def test_the_dense_folder_is_loaded_by_transformers_itself(imported: tuple[Path, Path]) -> None:
    source, _ = imported
    wanted = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    model, _, _ = wrapper.load_model(source)
    ids = random_ids(1, 20)
    assert torch.equal(model(ids).logits, wanted(ids).logits)

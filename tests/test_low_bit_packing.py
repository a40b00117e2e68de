"""Low-bit files from the command line on: sizes as asked, content as made, models as packed, bad input as one line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from test_prime_pack import rewrite_header
from tiny_models import import_source, tiny_config, write_source

import prime_cli
import qwen_prime_eval
import qwen_prime_pack as script
import verify_qwen_prime
from ballots import RuleError
from ghost_core import grids_of
from low_bit_packing import LowBitSettings, low_bit_grids, weights_of
from packed_checkpoint import low_bit_grid, read_checkpoint, write_low_bit
from prime_checkpoint import load_checkpoint, save_checkpoint
from prime_pack import Pack, PackError
from qwen_prime_wrapper import load_model

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("low")
    import_source(write_source(folder / "source", tiny_config(hidden_size=64)), folder / "tiny.pt")
    return folder / "tiny.pt"


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("texts") / "texts.jsonl"
    lines = [{"text": f"line {n} of the text, {n * n} squared and so on."} for n in range(60)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return path


def run(*arguments: object) -> int:
    return prime_cli.run(script.PackScriptConfig, script.main, script.ERRORS, [str(a) for a in arguments])


@pytest.mark.parametrize("bits", [8, 4, 2.5])
def test_bits_are_the_bits_asked_for(checkpoint: Path, tmp_path: Path, bits: float) -> None:
    packed = tmp_path / "x"
    assert run("pack", checkpoint, "--bits", bits, "--output", packed, "--json", tmp_path / "x.json") == 0
    sizes = json.loads((tmp_path / "x.json").read_text())
    # Norms and biases are float32 and an eighth of this small model; all of it counts.
    assert bits - 0.15 <= sizes["bits per weight, model"] <= bits
    assert sizes["packed, bytes"] == packed.stat().st_size


def test_text_table_group_and_healing_end_in_a_file(checkpoint: Path, texts: Path, tmp_path: Path) -> None:
    for number, more in enumerate(
        (["--data", texts], ["--table", "prime-harmonic", "--group", "32"], ["--data", texts, "--heal", "2"])
    ):
        packed = tmp_path / str(number)
        few = ("--bits", "5", "--seq-len", "64", "--calibration-tokens", "512")
        assert run("pack", checkpoint, *few, *more, "--output", packed) == 0
        notes = Pack(packed, "checkpoint").content["low_bit"]
        assert notes["bits"] == 5 and notes["heal"] == (2 if "--heal" in more else 0)
        assert notes["data"] == ("texts.jsonl" if texts in more else None)
        grid = low_bit_grid(Pack(packed), "model.layers.0.mlp.up_proj.grid")
        assert grid.name == ("prime-harmonic" if "--table" in more else "linear")
        assert grid.scales.rows.shape[1] == (2 if "--group" in more else 1)


def test_the_model_of_a_file_is_the_one_that_was_packed(checkpoint: Path, tmp_path: Path) -> None:
    content = load_checkpoint(checkpoint)
    grids, kept, notes = low_bit_grids(content, LowBitSettings(bits=4))
    write_low_bit(kept, grids, tmp_path / "x", notes)
    model, tokenizer, kind = load_model(tmp_path / "x")
    assert kind == "packed" and tokenizer.convert_ids_to_tokens(258) == "<|im_end|>"
    for name, grid in grids_of(model).items():
        wanted = grids[name].weights()
        # What a 16-bit import loses beside the codes: 75 dB and more below the weights.
        assert float((grid.dequantize() - wanted).norm() / wanted.norm()) < 10 ** (-75 / 20)
        assert torch.equal(low_bit_grid(Pack(tmp_path / "x"), name).codes, grids[name].codes)
    names = {n for n, t in content["model"].items() if ".grid." not in n}
    read = read_checkpoint(tmp_path / "x")
    assert all(torch.equal(read["model"][n], content["model"][n]) for n in names)
    assert weights_of(read) == weights_of(content)


def test_unpacked_it_passes_verification_and_scores_alike(checkpoint: Path, texts: Path, tmp_path: Path) -> None:
    packed, unpacked = tmp_path / "x", tmp_path / "x.pt"
    assert run("pack", checkpoint, "--bits", "4", "--output", packed) == 0
    assert run("unpack", packed, "--output", unpacked) == 0
    assert verify_qwen_prime.main(verify_qwen_prime.VerifyConfig(unpacked)) == 0
    assert load_checkpoint(unpacked)["stage"] == "init"
    scores = []
    for model in (packed, unpacked):
        report = tmp_path / "r.json"
        assert qwen_prime_eval.main(qwen_prime_eval.EvalConfig(model, text=texts, json=report)) == 0
        scores.append(json.loads(report.read_text())["nll_per_token"])
    assert scores[0] == scores[1]


def test_healing_keeps_what_it_learned_of_norms(checkpoint: Path, texts: Path, tmp_path: Path) -> None:
    packed = tmp_path / "x"
    arguments = ("--data", texts, "--heal", "3", "--heal-lr", "0.01", "--seq-len", "64", "--calibration-tokens", "512")
    assert run("pack", checkpoint, "--bits", "4", *arguments, "--output", packed, "--json", tmp_path / "j") == 0
    assert json.loads((tmp_path / "j").read_text())["bits per weight, model"] <= 4
    before, after = load_checkpoint(checkpoint)["model"], read_checkpoint(packed)["model"]
    assert not torch.equal(before["model.norm.weight"], after["model.norm.weight"])


def test_a_compact_checkpoint_is_healed_on_its_own_table(texts: Path, checkpoint: Path, tmp_path: Path) -> None:
    """Its rule is not the default one, which refused the model when everything else was done."""
    compact, packed = tmp_path / "compact.pt", tmp_path / "x"
    import_source(checkpoint.parent / "source", compact, manifold="compact")
    arguments = ("--data", texts, "--heal", "2", "--seq-len", "64", "--calibration-tokens", "512")
    assert run("pack", compact, "--bits", "4", *arguments, "--output", packed) == 0
    before, after = load_checkpoint(compact)["model"], read_checkpoint(packed)
    assert after["manifold"]["name"] == "compact" and not torch.equal(
        before["model.norm.weight"], after["model"]["model.norm.weight"]
    )
    assert issubclass(RuleError, script.ERRORS)


def test_bad_input_is_one_line_and_leaves_nothing(
    checkpoint: Path, texts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def refused(*arguments: object, code: int = 1) -> str:
        capsys.readouterr()
        assert run("pack", checkpoint, "--output", tmp_path / "x", *arguments) == code
        lines = [line for line in capsys.readouterr().err.strip().splitlines() if line.startswith("error")]
        assert len(lines) == 1 and not list(tmp_path.iterdir())
        return lines[0]

    assert "not a multiple of the group 128" in refused("--bits", 4, "--group", 128)
    assert "none.jsonl" in refused("--bits", 4, "--data", texts.parent / "none.jsonl")
    assert "expected 1.5 to 9" in refused("--bits", 16, code=2)
    assert "--data" in refused("--bits", 4, "--heal", 5, code=2)
    assert "lossless" in refused("--group", 32, code=2)
    for flag, value in (("--table", "compact"), ("--heal-lr", 0.01), ("--calibration-tokens", 9), ("--seed", 1)):
        assert f"{flag[2:]}: only for --bits" in refused(flag, value, code=2)
    assert "seq-len, grad-accum: only for --bits" in refused("--seq-len", 64, "--grad-accum", 2, code=2)


def test_a_grid_stands_once_in_a_tree(checkpoint: Path, tmp_path: Path) -> None:
    assert run("pack", checkpoint, "--bits", "4", "--output", tmp_path / "x") == 0

    def twice(header: dict) -> dict:
        model = header["content"]["checkpoint"]["model"]
        name = next(name for name, value in model.items() if "$grid" in value)
        model["again"] = {"$grid": {**model[name]["$grid"], "more": 1}}
        return header

    with pytest.raises(PackError, match="stands in it twice"):
        read_checkpoint(rewrite_header(tmp_path / "x", twice))


def test_damage_is_found(checkpoint: Path, tmp_path: Path) -> None:
    packed = tmp_path / "x"
    assert run("pack", checkpoint, "--bits", "4", "--output", packed) == 0
    content = bytearray(packed.read_bytes())
    for place in (20, len(content) // 3, len(content) // 2, len(content) - 60):
        content[place] ^= 16
        (tmp_path / "y").write_bytes(content)
        with pytest.raises(PackError, match="damaged"):
            read_checkpoint(tmp_path / "y")
        content[place] ^= 16
    save_checkpoint(read_checkpoint(packed), tmp_path / "back.pt")

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch

import qwen_prime_eval as evaluation
import qwen_prime_importer as importer
from qwen_prime_wrapper import ModelError, load_model
from text_records import DataError

MODEL = Path(__file__).resolve().parent.parent / "assets" / "tiny_coder"
TEXT = "def area(width, height):\n    return width * height  # größer\n\n\n" * 60


@pytest.fixture(scope="module")
def prime(tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("eval") / "tiny_prime_init.pt"
    assert importer.main(importer.ImportConfig(model=str(MODEL), output=output)) == 0
    return output


def test_text_is_scored_as_documented(tmp_path: Path) -> None:
    """Against a plain float64 computation, window by window."""
    file, report = tmp_path / "text.txt", tmp_path / "out.json"
    file.write_text(TEXT, encoding="utf-8")
    assert evaluation.main(evaluation.EvalConfig(model=MODEL, text=file, json=report)) == 0
    result = json.loads(report.read_text())
    model, tokenizer, _ = load_model(MODEL)
    ids = torch.tensor(tokenizer(TEXT)["input_ids"])
    window = model.config.max_position_embeddings
    assert len(ids) > window + 10
    nats, tokens, size = 0.0, 0, 0
    with torch.no_grad():
        for start in range(0, len(ids), window):
            piece = ids[start : start + window]
            scores = model(input_ids=piece[None], use_cache=False).logits[0].double().log_softmax(-1)
            nats -= float(scores[:-1].gather(1, piece[1:, None]).sum())
            tokens += len(piece) - 1
            size += len(tokenizer.decode(piece[1:]).encode())
    assert result["tokens"] == tokens
    assert result["bytes"] == size
    assert result["nll_per_token"] == pytest.approx(nats / tokens, rel=1e-5)
    assert result["perplexity"] == pytest.approx(math.exp(nats / tokens), rel=1e-4)
    assert result["bits_per_byte"] == pytest.approx(nats / math.log(2) / size, rel=1e-5)


def test_folder_and_checkpoint_score_alike(prime: Path, tmp_path: Path) -> None:
    file = tmp_path / "records.jsonl"
    rows = [{"instruction": f"say {i}", "output": f"print({i})", "split": "eval"} for i in range(20)]
    file.write_text("".join(json.dumps(r) + "\n" for r in rows))
    losses = []
    for model in (MODEL, prime):
        report = tmp_path / "out.json"
        assert evaluation.main(evaluation.EvalConfig(model=model, data=file, json=report)) == 0
        result = json.loads(report.read_text())
        assert result["records"] == 20 and result["tokens"] > 60
        losses.append(result["nll_per_token"])
    assert losses[0] != losses[1]
    assert abs(losses[0] - losses[1]) < 1e-4


def test_bad_input_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError):
        evaluation.EvalConfig(model=MODEL)
    short = tmp_path / "short.txt"
    short.write_text("")
    with pytest.raises(DataError, match="at least 2"):
        evaluation.main(evaluation.EvalConfig(model=MODEL, text=short))
    with pytest.raises(DataError, match="cannot read"):
        evaluation.main(evaluation.EvalConfig(model=MODEL, text=tmp_path / "absent.txt"))
    with pytest.raises(ModelError, match=r"config\.json"):
        evaluation.main(evaluation.EvalConfig(model=tmp_path, text=short))

"""The stages chained through their ``main``, as the demo chains the commands."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import qwen_prime_eval as evaluation
import qwen_prime_importer as importer
import qwen_prime_train as train
import verify_qwen_prime as verify
from prime_checkpoint import load_checkpoint

pytestmark = pytest.mark.usefixtures("one_thread")
ASSETS = Path(__file__).resolve().parent.parent / "assets"


@pytest.mark.parametrize(
    ("manifold", "rule"),
    [("prime-harmonic", "momentum"), ("linear", "momentum"), ("compact", "compact"), ("prime-harmonic", "compact")],
)
def test_import_verify_train_verify_evaluate(manifold: Any, rule: Any, tmp_path: Path) -> None:
    """Held to the limits of its own manifold; the last case moves to another one where training starts."""
    init, run = tmp_path / "tiny_prime_init.pt", tmp_path / "run"
    lines = (ASSETS / "stdlib_instruct.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    data = tmp_path / "records.jsonl"
    short = sorted(rows, key=lambda r: len(r["output"]))
    chosen = [r for r in short if r["split"] == "train"][:60] + [r for r in short if r["split"] == "eval"][:10]
    data.write_text("".join(json.dumps(r) + "\n" for r in chosen))

    config = importer.ImportConfig(model=str(ASSETS / "tiny_coder"), output=init, manifold=manifold)
    assert importer.main(config) == 0
    report = tmp_path / "verify.json"
    reference = verify.VerifyConfig(init, reference=str(ASSETS / "tiny_coder"), json=report)
    assert verify.main(reference) == 0, report.read_text()
    settings = train.TrainConfig(
        checkpoint=init,
        data=data,
        output_dir=run,
        steps=6,
        seq_len=256,
        grad_accum=2,
        lr=2e-3,
        warmup=1,
        save_every=3,
        core_eval=False,
        vote_rule=rule,
        device="cpu",
    )
    assert train.main(settings) == 0
    trained = run / "tiny_prime_step_6.pt"
    assert verify.main(verify.VerifyConfig(trained, json=report)) == 0, report.read_text()
    losses = []
    for model in (ASSETS / "tiny_coder", init, trained):
        assert evaluation.main(evaluation.EvalConfig(model=model, data=data, seq_len=256, json=report)) == 0
        losses.append(json.loads(report.read_text())["nll_per_token"])
    source, imported, tuned = losses
    assert abs(imported - source) < (2e-3 if manifold == "compact" else 1e-4)
    assert tuned < imported - 0.1
    first, last = load_checkpoint(init), load_checkpoint(trained)
    assert (first["stage"], last["stage"]) == ("init", "train")
    assert last["source"] == first["source"]
    ends_on = "compact" if rule == "compact" else manifold
    assert last["manifold"]["name"] == ends_on
    assert last["manifold"]["sha256"] == first["manifold"]["sha256"] or ends_on != manifold
    assert set(last["votes"]) == {n.removesuffix(".indices") for n in first["model"] if n.endswith(".grid.indices")}
    assert last["train_state"]["step"] == 6

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

import qwen_prime_eval as evaluation
import qwen_prime_importer as importer
import qwen_prime_train as train
from prime_checkpoint import check_file
from prime_device import DeviceError
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


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("x"), RuntimeError("DefaultCPUAllocator: can't allocate memory")]
)
def test_memory_that_runs_out_is_one_line_with_what_helps(
    error: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "text.txt").write_text(TEXT, encoding="utf-8")

    def short_of_memory(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr(evaluation.core_eval, "score_text", short_of_memory)
    with pytest.raises(DeviceError, match=r"memory ran out on cpu.*--window.*--batch-size"):
        evaluation.main(evaluation.EvalConfig(model=MODEL, text=tmp_path / "text.txt", device="cpu"))


@pytest.mark.parametrize("flag", ["json", "save_completions"])
def test_outputs_are_looked_at_before_anything_is_measured(
    flag: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(evaluation, "measure", lambda config: pytest.fail("measured"))
    path = tmp_path / "absent" / "x.json"
    config = evaluation.EvalConfig(model=MODEL, core=True, **{flag: path})  # type: ignore[arg-type]
    with pytest.raises(OSError, match=r"absent is no folder: cannot write x\.json there"):
        evaluation.main(config)


def test_what_a_run_holds_out_is_scored_again(
    prime: Path, tmp_path: Path, capsys: Any, caplog: pytest.LogCaptureFixture
) -> None:
    """Records that name no split: by default all are scored, and the log says so."""
    file = tmp_path / "records.jsonl"
    rows = [{"instruction": f"say {i}", "output": f"print({i} + {i})"} for i in range(60)]
    file.write_text("".join(json.dumps(r) + "\n" for r in rows))
    run = train.TrainConfig(
        checkpoint=prime,
        data=str(file),
        output_dir=tmp_path / "run",
        steps=1,
        seq_len=128,
        grad_accum=1,
        hold_out=0.2,
        last_turn_only=True,
        sample_every=0,
        data_cache=tmp_path / "cache",
        compute="float32",
        device="cpu",
    )
    assert train.main(run) == 0
    at_its_end = json.loads((tmp_path / "run" / "EVAL_tiny_step_1.json").read_text())
    reports = []
    for run_or_file in ({"data": file, "seq_len": 128}, {"run": tmp_path / "run"}):
        out = tmp_path / "out.json"
        config = evaluation.EvalConfig(model=tmp_path / "run" / "tiny_prime_step_1.pt", json=out, **run_or_file)  # type: ignore[arg-type]
        caplog.clear()
        with caplog.at_level("INFO"):
            assert evaluation.main(config) == 0
        assert ("names a split" in caplog.text) == ("data" in run_or_file)
        reports.append(json.loads(out.read_text()))
    everything, held = reports
    assert everything["records"] == 60 and 0 < held["records"] < 30
    assert held["sha256"] == at_its_end["settings"]["held_out"]
    expected = at_its_end["scores"]["held_out.nll_per_token"]
    assert held["nll_per_token"] == pytest.approx(expected, rel=1e-5)
    assert everything["nll_per_token"] != pytest.approx(expected, rel=1e-3)


def test_core_writes_a_report_beside_the_checkpoint_and_reports_compare(
    prime: Path, tmp_path: Path, capsys: Any
) -> None:
    file = tmp_path / "text.txt"
    file.write_text(TEXT[:2000], encoding="utf-8")
    assert evaluation.main(evaluation.EvalConfig(model=prime, core=True, text=file, window=256, stride=128)) == 0
    beside = prime.parent / "EVAL_tiny_init.json"
    report = json.loads(beside.read_text())
    assert (report["format"], report["kind"], report["name"]) == ("qwen-prime-eval", "core", "tiny_prime_init")
    assert report["model"] == {"path": str(prime), "kind": "prime", "sha256": check_file(prime)}
    assert report["settings"]["text"]["stride"] == 128 and len(report["settings"]["text"]["sha256"]) == 64
    assert report["scores"]["invariants"] == [7, 7] and report["scores"]["suite"][1] == 40
    assert report["nll_per_token"] == report["scores"]["text.nll_per_token"]
    capsys.readouterr()
    assert evaluation.main(evaluation.EvalConfig(compare=(beside, beside))) == 0
    out = capsys.readouterr().out
    assert "invariants" in out and "+0.0000" in out and "difference" in out
    broken = tmp_path / "broken.json"
    broken.write_text("[" * 100_000)
    for path in (broken, tmp_path / "absent.json", file):
        with pytest.raises(DataError, match=r"cannot read|is not a report"):
            evaluation.main(evaluation.EvalConfig(compare=(beside, path)))


def test_humaneval_is_written_and_only_run_when_asked(tmp_path: Path, capsys: Any) -> None:
    problem = {
        "task_id": "t/0",
        "prompt": "def one():\n",
        "entry_point": "one",
        "test": "def check(f): assert f() == 1",
    }
    problems, kept, report = (tmp_path / n for n in ("p.jsonl", "kept.jsonl", "r.json"))
    problems.write_text(json.dumps(problem) + "\n")
    config = evaluation.EvalConfig(
        model=MODEL, humaneval=problems, save_completions=kept, max_new_tokens=8, json=report
    )
    assert evaluation.main(config) == 0
    assert json.loads(report.read_text())["scores"]["humaneval"] is None
    assert json.loads(kept.read_text())["task_id"] == "t/0"
    kept.write_text(json.dumps({"task_id": "t/0", "completion": "    return 1\n"}))
    judged = evaluation.EvalConfig(humaneval=problems, completions=kept, execute=True, json=report)
    assert evaluation.main(judged) == 0
    result = json.loads(report.read_text())
    assert result["scores"]["humaneval"] == [1, 1]
    assert result["details"]["humaneval"]["verdicts"] == [{"task_id": "t/0", "passed": True, "reason": ""}]


def test_bfloat16_scores_close_to_float32(tmp_path: Path) -> None:
    file, losses = tmp_path / "text.txt", []
    file.write_text(TEXT[:1500], encoding="utf-8")
    for dtype in ("float32", "bfloat16"):
        report = tmp_path / "out.json"
        assert evaluation.main(evaluation.EvalConfig(model=MODEL, text=file, dtype=dtype, json=report)) == 0  # type: ignore[arg-type]
        losses.append(json.loads(report.read_text())["nll_per_token"])
    assert losses[0] != losses[1] and abs(losses[0] - losses[1]) < 0.02


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": MODEL}, "nothing to measure"),
        ({"core": True}, "which model"),
        ({"model": MODEL, "core": True, "compare": (MODEL, MODEL)}, "give it alone"),
        ({"compare": (MODEL,)}, "at least 2"),
        ({"humaneval": MODEL, "completions": MODEL}, "--execute"),
        ({"model": MODEL, "text": MODEL, "stride": 0}, "stride is 0"),
        ({"model": MODEL, "text": MODEL, "batch_size": 0}, "batch-size is 0"),
        ({"model": MODEL, "data": MODEL, "run": MODEL}, "choose one"),
    ],
)
def test_usage(changes: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        evaluation.EvalConfig(**changes)


def test_bad_input_is_refused(tmp_path: Path) -> None:
    short = tmp_path / "short.txt"
    short.write_text("")
    with pytest.raises(DataError, match="at least 2"):
        evaluation.main(evaluation.EvalConfig(model=MODEL, text=short))
    with pytest.raises(DataError, match="cannot read"):
        evaluation.main(evaluation.EvalConfig(model=MODEL, text=tmp_path / "absent.txt"))
    with pytest.raises(ModelError, match=r"config\.json"):
        evaluation.main(evaluation.EvalConfig(model=tmp_path, text=short))

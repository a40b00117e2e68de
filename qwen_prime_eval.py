"""Measure a PRIME checkpoint or any Hugging Face folder: perplexity, answers, prompts, HumanEval, invariants.

    python qwen_prime_eval.py coder_prime_init.pt --text book.txt
    python qwen_prime_eval.py coder_prime_step_300.pt --data records.jsonl
    python qwen_prime_eval.py runs/coder/coder_prime_step_300.pt --run runs/coder
    python qwen_prime_eval.py coder_prime_step_300.pt --core --humaneval HumanEval.jsonl.gz --execute
    python qwen_prime_eval.py --compare EVAL_coder_init.json EVAL_coder_step_300.json

``--text``, ``--data`` and ``--run`` measure loss, ``--core`` adds the prompts and invariants of ``core_eval`` and
writes ``EVAL_name_step.json`` beside the checkpoint; before and after, source and import are one command each.
``--humaneval`` writes functions; they are run only with ``--execute``, contained (``code_sandbox``). ``--completions``
judges functions that somebody else wrote, without a model.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import tyro
from rich.console import Console
from rich.table import Table
from transformers import PreTrainedModel, PreTrainedTokenizerBase

import core_eval
import prime_cli
import prime_hf  # noqa: F401  its import registers the plug-in for folders of indices
from answer_masks import EncodedSet, describe, encode_records
from code_eval import complete, judge, read_completions, read_problems
from code_sandbox import Limits, SandboxError
from packed_batches import evaluation_batches
from packed_checkpoint import sha256_of_file
from prime_checkpoint import CheckpointError
from prime_device import DeviceError, check_device, is_out_of_memory
from qwen_prime_wrapper import ModelError, load_model, mean_answer_loss
from text_records import DataError, read_records
from training_data import DataSettings, open_data, revisions_of
from whole_output import check_writable, write_whole

log = logging.getLogger("eval")


@dataclass(frozen=True)
class EvalConfig:
    """Measure a PRIME checkpoint or a Hugging Face folder."""

    model: Annotated[Path | None, tyro.conf.Positional] = None
    """PRIME .pt file or model folder; none to --compare reports or to judge --completions."""
    text: Path | None = None
    """Plain text to score."""
    window: int | None = None
    """Tokens of a window of --text; by default the model's context."""
    stride: int | None = None
    """Tokens between windows of --text that overlap, the usual recipe; by default they do not."""
    data: Path | None = None
    """Instruction records whose answers to score (those of split "eval" where records name one)."""
    run: Path | None = None
    """Score the answers that this run holds out, by the data and settings of its config.json."""
    seq_len: int = 512
    """Tokens in a packed row of --data."""
    core: bool = False
    """Also ask the suite's prompts, check invariants, and write EVAL_name_step.json beside the model."""
    humaneval: Path | None = None
    """Problems in HumanEval's form (.jsonl, .jsonl.gz): write the functions, and with --execute run them."""
    completions: Path | None = None
    """Judge these completions (task_id, completion) of --humaneval instead of writing any."""
    save_completions: Path | None = None
    """Where to keep the functions that were written."""
    execute: bool = False
    """Run functions that a model wrote: contained, but somebody else's code all the same."""
    max_new_tokens: int = 512
    """Longest function, in tokens."""
    timeout: float = 10.0
    """Seconds of the processor for each problem's test; by the clock five times as many."""
    jobs: int = max(1, (os.cpu_count() or 2) // 2)
    """Tests that run at a time."""
    compare: tuple[Path, ...] = ()
    """Print reports side by side, with the difference of the last to the first."""
    batch_size: int = 8
    """Rows scored, or prompts continued, at a time."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Type of matrix products."""
    device: str = "cuda" if torch.cuda.is_available() else "cpu"
    """Where to run the model."""
    json: Path | None = None
    """Also write the report here."""

    def __post_init__(self) -> None:
        asked = (self.text, self.data, self.run, self.humaneval)
        if self.data is not None and self.run is not None:
            raise ValueError("--data scores a file, --run what a run holds out: choose one")
        if self.compare:
            if self.model or self.core or any(asked):
                raise ValueError("--compare reads reports and measures nothing: give it alone")
            if len(self.compare) < 2:
                raise ValueError(f"compare has {len(self.compare)} report, expected at least 2")
            return
        if not self.core and not any(asked):
            raise ValueError("nothing to measure: give --text, --data, --run, --core, --humaneval or --compare")
        if self.model is None and (not self.completions or self.core or self.text or self.data or self.run):
            raise ValueError("which model? give a PRIME .pt file or a model folder first")
        if self.completions is not None and (self.humaneval is None or not self.execute):
            raise ValueError("completions are judged with --humaneval FILE and --execute, which runs their code")
        if self.batch_size < 1 or self.seq_len < 2 or self.jobs < 1 or self.max_new_tokens < 1 or self.timeout <= 0:
            raise ValueError(
                f"batch-size is {self.batch_size}, seq-len {self.seq_len}, jobs {self.jobs}, max-new-tokens "
                f"{self.max_new_tokens} and timeout {self.timeout}, expected at least 1, 2, 1, 1 and above 0"
            )
        if self.stride is not None and self.stride < 1:
            raise ValueError(f"stride is {self.stride}, expected at least 1")


def sha256_of_model(path: Path) -> str:
    """What tells a model's weights apart: a checkpoint's recorded hash, or one over a folder's weight files."""
    if path.is_file():
        return sha256_of_file(path)
    digest = hashlib.sha256()
    for file in sorted([*path.glob("*.safetensors"), path / "config.json"]):
        digest.update(f"{file.name}\0".encode())
        with open(file, "rb") as data:
            while chunk := data.read(1 << 22):
                digest.update(chunk)
    return digest.hexdigest()


def read_text(path: Path) -> str:
    """The text to score.

    Raises:
        DataError: it cannot be read.
    """
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"cannot read {path}: {error}") from error


def held_out_of(run: Path, tokenizer: PreTrainedTokenizerBase) -> tuple[EncodedSet, int]:
    """What a run holds out, as it does: its documents, and tokens in a row of them.

    Raises:
        DataError: no such run, its data cannot be read or used, or it holds out nothing.
    """
    path = run / "config.json"
    try:
        told = json.loads(path.read_text(encoding="utf-8"))
        known = {field.name for field in fields(DataSettings)}
        chosen = {name: value for name, value in told.items() if name in known}
        settings = DataSettings(**{**chosen, "data_cache": Path(told["data_cache"]) if told["data_cache"] else None})
        arguments = (told["data"], told["eval_data"], tokenizer, int(told["seq_len"]), settings, int(told["seed"]))
    except (OSError, ValueError, RecursionError, AttributeError, KeyError, TypeError) as error:
        raise DataError(
            f"{path} does not say what the run reads ({type(error).__name__}: {error}): expected the folder of a run "
            "of qwen_prime_train.py"
        ) from error
    found = open_data(*arguments, revisions=revisions_of(run))
    log.info(found.summary)
    if found.held is None:
        raise DataError(f"{run} holds out nothing: score a file with --data")
    return found.held, arguments[3]


def score_data(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, config: EvalConfig) -> dict[str, Any]:
    """Loss of the answers of instruction records, or of what a run holds out.

    Raises:
        DataError: they cannot be read or used, or nothing is held out.
    """
    if config.run is not None:
        encoded, seq_len = held_out_of(config.run, tokenizer)
        count = len(encoded)
    else:
        assert config.data is not None, "the caller looked"
        seq_len = min(config.seq_len, model.config.max_position_embeddings)
        records = read_records(config.data, split="eval")
        encoded = encode_records(records, tokenizer, seq_len)
        count = len(records.records)
        log.info(describe(records, encoded))
        if records.split is None:
            log.info(
                "no record names a split: all are scored, also those that a run with this file has learned; "
                "--run RUN scores what that run holds out"
            )
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    mean, tokens = mean_answer_loss(model, evaluation_batches(encoded, seq_len, config.batch_size, pad))
    return {
        "nll_per_token": mean,
        "perplexity": math.exp(min(mean, 700.0)),
        "tokens": tokens,
        "records": count,
        "seq_len": seq_len,
        "sha256": encoded.fingerprint,
    }


@contextmanager
def precision(config: EvalConfig) -> Iterator[None]:
    """Matrix products in the type that was asked for."""
    kind = torch.device(config.device).type
    with torch.autocast(kind, torch.bfloat16, enabled=config.dtype == "bfloat16"):
        yield


def run_humaneval(
    config: EvalConfig, model: PreTrainedModel | None, tokenizer: PreTrainedTokenizerBase | None
) -> tuple[core_eval.Score, dict[str, Any]]:
    """Functions written (or read) and, where that is asked for, run."""
    assert config.humaneval is not None, "the caller looked"
    problems = read_problems(config.humaneval)
    if config.completions is not None:
        texts = read_completions(config.completions, problems)
    else:
        assert model is not None and tokenizer is not None, "the config wants a model or completions"
        texts = complete(model, tokenizer, problems, tokens=config.max_new_tokens, batch_size=config.batch_size)
    if config.save_completions is not None:
        lines = (json.dumps({"task_id": p.task_id, "completion": texts[p.task_id]}) + "\n" for p in problems)
        config.save_completions.write_text("".join(lines), encoding="utf-8")
    if not config.execute:
        log.info("%d functions written and not run: --execute runs them, contained", len(texts))
        return None, {}
    verdicts = judge(problems, texts, limits=Limits(config.timeout), jobs=config.jobs)
    return [sum(v.passed for v in verdicts), len(verdicts)], {"verdicts": [asdict(v) for v in verdicts]}


def measure(config: EvalConfig) -> dict[str, Any]:
    """Everything that was asked for, as a report."""
    started = time.perf_counter()
    scores: dict[str, core_eval.Score] = {}
    details: dict[str, Any] = {}
    loss: dict[str, Any] = {}
    settings: dict[str, Any] = {key: getattr(config, key) for key in ("dtype", "device", "batch_size")}
    if config.model is None:
        scores["humaneval"], details["humaneval"] = run_humaneval(config, None, None)
        return {"model": None, "scores": scores, "details": details, "settings": settings}
    check_device(config.device)
    model, tokenizer, kind = load_model(config.model)
    model.to(torch.device(config.device))  # type: ignore[arg-type]
    with precision(config):
        if config.data is not None or config.run is not None:
            loss = score_data(model, tokenizer, config)
            scores |= {f"answers.{k}": loss[k] for k in ("nll_per_token", "tokens")}
            settings["data"] = {
                "file": config.data.name if config.data is not None else None,
                "run": str(config.run) if config.run is not None else None,
                **{k: loss[k] for k in ("records", "seq_len", "sha256")},
            }
        if config.text is not None:
            text = read_text(config.text)
            loss = core_eval.score_text(model, tokenizer, text, window=config.window, stride=config.stride)
            scores |= {f"text.{k}": loss[k] for k in ("nll_per_token", "perplexity", "bits_per_byte", "tokens")}
            digest = hashlib.sha256(text.encode()).hexdigest()
            settings["text"] = {
                "file": config.text.name,
                "sha256": digest,
                **{k: loss[k] for k in ("window", "stride")},
            }
        if config.core:
            more, details["core"] = core_eval.evaluate(model, tokenizer, "core", batch_size=config.batch_size)
            scores |= more
        if config.humaneval is not None:
            settings["humaneval"] = {"file": config.humaneval.name, "max_new_tokens": config.max_new_tokens}
            scores["humaneval"], details["humaneval"] = run_humaneval(config, model, tokenizer)
    settings["seconds"] = round(time.perf_counter() - started, 2)
    name, step = core_eval.name_and_step(config.model.stem if config.model.is_file() else config.model.name)
    report = core_eval.make_report(
        kind="core",
        name=name,
        step=step,
        model={"path": str(config.model), "kind": kind, "sha256": sha256_of_model(config.model)},
        tokenizer=tokenizer,
        scores=scores,
        details=details,
        settings=settings,
    )
    # The loss stands in front as well: that of the text where there is one, else that of the answers.
    return {**loss, **report}


def read_report(path: Path) -> dict[str, Any]:
    """A report that was written before.

    Raises:
        DataError: it is none.
    """
    try:
        report = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"cannot read {path}: {error}") from error
    if not isinstance(report, dict) or not isinstance(report.get("scores"), dict):
        raise DataError(f"{path} is not a report of this program: it has no scores")
    return report


def print_reports(reports: list[dict[str, Any]], names: list[str]) -> None:
    """Scores as a table; of several reports side by side, with the difference of the last to the first."""
    table = Table(box=None, pad_edge=False)
    table.add_column("score")
    for name in names:
        table.add_column(name, justify="right", overflow="fold")
    if len(reports) > 1:
        table.add_column("difference", justify="right")
    for name, values, difference in core_eval.compare(reports):
        table.add_row(name, *values, *([difference] if len(reports) > 1 else []))
    Console(highlight=False).print(table)


def main(config: EvalConfig) -> int:
    if config.compare:
        print_reports([read_report(path) for path in config.compare], [path.stem for path in config.compare])
        return 0
    for path in (config.json, config.save_completions):
        if path is not None:
            # Else hours of work would end here.
            check_writable(path)
    try:
        report = measure(config)
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        window = f"--window of less than {config.window}" if config.window else "--window"
        raise DeviceError(
            f"memory ran out on {config.device}: a {window} (tokens of --text at a time, by default the model's "
            f"context) or a --batch-size of less than {config.batch_size} needs less"
        ) from error
    text = (json.dumps(report, indent=2, allow_nan=False) + "\n").encode()
    if config.core and config.model is not None:
        stem = config.model.stem if config.model.is_file() else config.model.name
        beside = config.model.parent / core_eval.report_name(stem)
        write_whole(beside, text)
        log.info("%s", beside)
    if config.json:
        write_whole(config.json, text)
    print_reports([report], ["value"])
    invariants = report["scores"].get("invariants")
    return 0 if invariants is None or invariants[0] == invariants[1] else 1


if __name__ == "__main__":
    ERRORS = (DataError, ModelError, CheckpointError, DeviceError, SandboxError, OSError)
    raise SystemExit(prime_cli.run(EvalConfig, main, ERRORS))

"""How well a method fine-tunes: loss on the new domain against loss on the old one, at equal data and equal steps.

One run is a (task, method, learning rate, seed). Every method starts from the same weights, sees the same packed rows
in the same order, takes the same number of steps under the same schedule (``training_recipe.learning_rate``) and
minimises the same number: summed nats of a step's answer tokens over their count. What differs is what moves the
weights. Each run becomes one JSON line with the losses before and after; ``quality_summary`` compares methods at their
best learning rates.

Two losses, because one alone can be bought with the other. *Target* is held-out text of the domain that is learned,
*source* text of the domain the model came from; forgetting is the rise of the source loss.

Splits are hashes of content or path, so they depend on no order: ``held_out_one_in`` on a record's prompt, the standard
library's files on their path (as the embedded model's own training did). Samples of documents are the lowest hashes.

Bytes per parameter are counted on the tensors that exist after a step: weights, gradients that outlive a layer's
backward pass, optimizer or vote state. Activations and temporaries of one layer are left out, the same for all.

Rejected: comparing at equal time (kernels differ in maturity, rules are what is compared); one learning rate for all
methods (each is judged at its best of several); a separate training loop for votes (they run through ``VoteTrainer``,
as a user's would); 8-bit AdamW by torchao: it compiles a kernel for every shape, 27 s in each process on one core, and
its presence makes every import of transformers write warnings. That of bitsandbytes starts at once on the CPU.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import json
import math
import os
import signal
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal, cast, get_args, get_type_hints

import numpy as np
import torch
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

import manifolds
from answer_masks import EncodedSet, encode_records
from ghost_core import grids_of
from ghost_grid import GhostGrid
from manifolds import Manifold
from packed_batches import PackedBatches, evaluation_batches
from prime_telemetry import read_lines
from qwen_prime_wrapper import (
    answer_loss,
    assign_tensors,
    build_model,
    expected_tensors,
    load_model,
    mean_answer_loss,
    source_name,
)
from text_records import Conversation, Record, read_records
from training_recipe import Recipe, learning_rate
from vote_trainer import VoteTrainer

ROOT = Path(__file__).resolve().parent
LIBRARY = "python standard library"
"""A task's ``source`` that stands for the held-out files of the running interpreter's library."""
LIBRARY_ONE_IN = 20
OPTIONAL = "requirements-bench.txt"
BASELINE = "adamw"
_EVALUATION_ROWS = 4
_CURVE_POINTS = 4


class QualityError(RuntimeError):
    """A comparison that cannot be made: unknown names, missing data or packages, a run that failed."""


# -- methods ----------------------------------------------------------------------------------------------------------

Family = Literal["adamw", "adamw-8bit", "lora", "votes"]
_PACKAGES: dict[Family, str] = {"adamw-8bit": "bitsandbytes", "lora": "peft"}


@dataclass(frozen=True)
class Method:
    """A way to move weights. ``betas`` are those of the float optimizer of the three dense families."""

    family: Family
    rates: tuple[float, ...]
    """Learning rates to try."""
    betas: tuple[float, float] = (0.9, 0.95)
    vote_rule: str | None = None
    """Of the family ``votes``: the rule's name in ``training_recipe.Recipe``."""
    manifold: str = manifolds.DEFAULT
    """Of the family ``votes``: the table the weights are snapped onto."""


_RATES = (3e-4, 6e-4, 1.2e-3)
_BETAS = ((0.7, 0.95), (0.8, 0.95), (0.8, 0.99), (0.9, 0.99), (0.9, 0.999), (0.95, 0.95), (0.95, 0.99))
METHODS: dict[str, Method] = {
    "adamw": Method("adamw", _RATES),
    # What other betas would have given it, beside votes whose constants were tried out as well.
    **{f"adamw-{one}-{two}": Method("adamw", _RATES, betas=(one, two)) for one, two in _BETAS},
    "adamw-8bit": Method("adamw-8bit", _RATES),
    "lora": Method("lora", (1e-3, 3e-3, 1e-2)),
    "supermajority": Method("votes", _RATES, vote_rule="supermajority"),
    "stochastic": Method("votes", _RATES, vote_rule="stochastic"),
    "momentum": Method("votes", _RATES, vote_rule="momentum"),
    "compact": Method("votes", _RATES, vote_rule="compact", manifold="compact"),
}
DEFAULT_METHODS = tuple(name for name in METHODS if name != "stochastic" and not name.startswith("adamw-0."))


def check_method(name: str) -> Method:
    """The method of that name, after looking whether this installation can run it.

    Raises:
        QualityError: unknown name, a vote rule or manifold that does not exist, or an optional package not installed.
    """
    if name not in METHODS:
        raise QualityError(f"unknown method {name!r}, expected one of {', '.join(METHODS)}")
    method = METHODS[name]
    package = _PACKAGES.get(method.family)
    if package and importlib.util.find_spec(package) is None:
        raise QualityError(f"method {name} needs the package {package}: python -m pip install -r {OPTIONAL}")
    if method.family == "votes":
        rules = get_args(get_type_hints(Recipe)["vote_rule"])
        if rules and method.vote_rule not in rules:
            raise QualityError(f"method {name}: unknown vote rule {method.vote_rule!r}, expected of {', '.join(rules)}")
        if method.manifold not in manifolds.NAMES:
            raise QualityError(
                f"method {name}: unknown manifold {method.manifold!r}, expected of {', '.join(manifolds.NAMES)}"
            )
    return method


# -- tasks ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Task:
    """What is learned and what must not be forgotten.

    Paths that begin with ``assets/`` lie beside this module, all others in the data folder (absolute ones where they
    say). Documents are at most ``seq_len`` tokens.
    """

    name: str
    model: str
    """Folder of the model that every method starts from."""
    records: str
    """Records to learn and, held out from them, to score."""
    source: str
    """File of the model's own domain, or ``LIBRARY``."""
    held_out_one_in: int | None = None
    """Records whose prompt's hash this number divides are held out; None: the file names its splits itself."""
    seq_len: int = 512
    batch_size: int = 1
    grad_accum: int = 4
    steps: int = 48
    warmup: int = 5
    target_tokens: int = 16_000
    """Size of the sample of held-out documents that is scored."""
    source_tokens: int = 12_000
    """Size of the sample of the model's own domain."""
    rates: Mapping[str, tuple[float, ...]] = field(default_factory=lambda: MappingProxyType({}))
    """Learning rates per method where they are not the method's own."""

    def rates_of(self, method: str) -> tuple[float, ...]:
        """Learning rates to try with a method."""
        return self.rates.get(method, METHODS[method].rates)

    def path(self, value: str, data_root: Path) -> Path:
        """Where one of the task's paths lies."""
        return (ROOT if value.startswith("assets/") else data_root) / value


def _rates(*rates: float) -> Mapping[str, tuple[float, ...]]:
    """Learning rates for every method but LoRA, whose own hold."""
    return MappingProxyType({name: rates for name, method in METHODS.items() if method.family != "lora"})


_STDLIB = Task("stdlib", "assets/tiny_coder", "assets/stdlib_instruct.jsonl", LIBRARY)
TASKS: dict[str, Task] = {
    task.name: task
    for task in (
        _STDLIB,
        replace(
            _STDLIB,
            name="code-alpaca",
            records="code/new_codealpaca.json",
            held_out_one_in=30,
            rates=_rates(5e-4, 1e-3, 2e-3, 4e-3),
        ),
        Task(
            "atto",
            "models/atto-qwen2-bias",
            "corpora/gsm8k_train.jsonl",
            "corpora/tinystories_850.json",
            held_out_one_in=50,
            source_tokens=48_000,
            rates=_rates(1e-3, 2e-3, 4e-3),
        ),
        replace(_STDLIB, name="stdlib-low", rates=_rates(1e-5, 3e-5, 1e-4)),
    )
}


def check_task(name: str, data_root: Path) -> Task:
    """The task of that name, after looking whether its data is there.

    Raises:
        QualityError: unknown name, or a file or folder that is missing.
    """
    if name not in TASKS:
        raise QualityError(f"unknown task {name!r}, expected one of {', '.join(TASKS)}")
    task = TASKS[name]
    for value in (task.model, task.records, *([] if task.source == LIBRARY else [task.source])):
        path = task.path(value, data_root)
        if not path.exists():
            raise QualityError(f"task {name}: {path} is missing; give the folder of the data with --data-root")
    return task


def _hash(text: str | bytes) -> int:
    return int.from_bytes(hashlib.sha256(text.encode() if isinstance(text, str) else text).digest(), "big")


def library_texts() -> list[str]:
    """Texts of the standard library's files that are held out: those whose path's SHA-256 20 divides."""
    root = Path(sysconfig.get_paths()["stdlib"])
    texts = []
    for file in sorted(root.rglob("*.py"), key=lambda f: f.relative_to(root).as_posix()):
        place = file.relative_to(root)
        foreign = {"site-packages", "dist-packages", "__pycache__"}.intersection(place.parts)
        if foreign or _hash(place.as_posix()) % LIBRARY_ONE_IN:
            continue
        with contextlib.suppress(UnicodeDecodeError):
            if (text := file.read_text(encoding="utf-8")).strip():
                texts.append(text)
    return texts


def _prompt(record: Record) -> str:
    """What decides a record's split: its first user message, so that two answers to one question stay together."""
    return record if isinstance(record, str) else next(text for role, text in record.messages if role == "user")


def _readable(records: Iterable[Record], tokenizer: PreTrainedTokenizerBase) -> list[Record]:
    """Conversations as plain text, every token a target, where the tokenizer has no chat template to render them."""
    if tokenizer.chat_template is not None:
        return list(records)
    return ["\n".join(t for _, t in r.messages) if isinstance(r, Conversation) else r for r in records]


def sample(encoded: EncodedSet, tokens: int) -> EncodedSet:
    """Documents of the lowest hashes until ``tokens`` tokens are there, in the set's order; all if it has fewer."""
    keys = [_hash(np.asarray(encoded.document(i).input_ids, dtype="<i4").tobytes()) for i in range(len(encoded))]
    order = np.array(sorted(range(len(encoded)), key=keys.__getitem__), dtype=np.int64)
    lengths = encoded.lengths
    chosen = np.sort(order[: int(np.searchsorted(np.cumsum(lengths[order]), tokens)) + 1])
    wanted = np.repeat(np.isin(np.arange(len(encoded)), chosen), lengths)
    return replace(
        encoded,
        input_ids=encoded.input_ids[wanted],
        answer=encoded.answer[wanted],
        starts=np.concatenate([[0], np.cumsum(lengths[chosen])]).astype(np.int64),
        record=encoded.record[chosen],
    )


@dataclass(frozen=True)
class TaskData:
    """Encoded documents of a task: to learn, held out, and of the model's own domain."""

    train: EncodedSet
    target: EncodedSet
    source: EncodedSet
    pad_id: int

    def fingerprint(self) -> str:
        """First 12 hex digits of a SHA-256 over all token ids: runs that differ in it are not comparable."""
        digest = hashlib.sha256()
        for part in (self.train, self.target, self.source):
            digest.update(np.ascontiguousarray(part.input_ids, dtype="<i4").data)
        return digest.hexdigest()[:12]


def load_data(task: Task, tokenizer: PreTrainedTokenizerBase, data_root: Path) -> TaskData:
    """Read, split, encode and sample the data of a task.

    Raises:
        DataError: records that cannot be used.
    """
    records = task.path(task.records, data_root)
    one_in = task.held_out_one_in
    if one_in is None:
        learned, held = (read_records(records, split=split).records for split in ("train", "eval"))
    else:
        every = read_records(records).records
        learned = tuple(r for r in every if _hash(_prompt(r)) % one_in)
        held = tuple(r for r in every if not _hash(_prompt(r)) % one_in)
    if task.source == LIBRARY:
        source: Sequence[Record] = library_texts()
    else:
        source = read_records(task.path(task.source, data_root)).records

    def encode(part: Sequence[Record]) -> EncodedSet:
        return encode_records(_readable(part, tokenizer), tokenizer, task.seq_len, progress=False)

    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    return TaskData(
        encode(learned), sample(encode(held), task.target_tokens), sample(encode(source), task.source_tokens), pad
    )


# -- one run ----------------------------------------------------------------------------------------------------------


@torch.no_grad()
def to_grid(dense: PreTrainedModel, hf_config: dict[str, Any], manifold: Manifold) -> PreTrainedModel:
    """The ghost model of a dense float32 one: matrices snapped to their nearest entries, norms and biases copied."""
    model = build_model(hf_config, manifold)
    weights = dense.state_dict()
    tensors = {}
    for name, (shape, _) in expected_tensors(model).items():
        if name.endswith(".grid.indices"):
            grid = GhostGrid(shape[0], shape[1], manifold)
            grid.import_weights(weights[source_name(name)])
            tensors[name], tensors[name.removesuffix("indices") + "scale"] = grid.indices, grid.scale
        elif not name.endswith(".grid.scale"):
            tensors[name] = weights[name].clone()
    assign_tensors(model, tensors, copy=False)
    return model


class DenseTrainer:
    """Steps of a float optimizer on the loss that ``VoteTrainer`` uses. Owns the model, the optimizer and the cursor.

    Its parameters are those that want gradients when it is made.
    """

    def __init__(self, model: PreTrainedModel, batches: PackedBatches, recipe: Recipe, method: Method) -> None:
        self.model = model.train()
        self.batches = batches
        self.recipe = recipe
        self.done = 0
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        self.optimizer = _optimizer(method, self.parameters)

    def step(self) -> tuple[float, int]:
        """One step; its loss in nats per answer token (NaN where it was not finite, and nothing moved) and tokens."""
        micro_batches = [next(self.batches) for _ in range(self.recipe.grad_accum)]
        answers = sum(b.answer_tokens for b in micro_batches)
        if answers == 0:
            raise QualityError(f"step {self.done} has no answer token: the data has nothing to learn at this seq_len")
        device, total = self.recipe.device, 0.0
        for batch in micro_batches:
            loss, _ = answer_loss(
                self.model, batch.input_ids.to(device), batch.labels.to(device), batch.position_ids.to(device)
            )
            (loss / answers).backward()
            total += loss.item()
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.recipe, self.done)
        if math.isfinite(total):
            self.optimizer.step()
        # Zeroed, not dropped: the gradients of a step exist while it runs, and bytes are counted after it.
        self.optimizer.zero_grad(set_to_none=False)
        self.done += 1
        return total / answers if math.isfinite(total) else math.nan, sum(b.tokens for b in micro_batches)


def _optimizer(method: Method, parameters: list[torch.nn.Parameter]) -> torch.optim.Optimizer:
    """AdamW without decay; the learning rate is set at every step."""
    if method.family == "adamw-8bit":
        import bitsandbytes

        return bitsandbytes.optim.AdamW8bit(parameters, lr=0.0, betas=method.betas, weight_decay=0.0)
    return torch.optim.AdamW(parameters, lr=0.0, betas=method.betas, weight_decay=0.0)


def add_adapters(model: PreTrainedModel, seed: int) -> None:
    """LoRA of rank 16 on every linear layer of the decoder, in place; only the adapters want gradients afterwards."""
    import peft

    torch.manual_seed(seed)
    settings = peft.LoraConfig(
        r=16, lora_alpha=32, lora_dropout=0.0, target_modules="all-linear", bias="none", task_type="CAUSAL_LM"
    )
    peft.get_peft_model(model, settings)


def _tensors_of(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, Mapping):
        for part in value.values():
            yield from _tensors_of(part)
    elif isinstance(value, list | tuple):
        for part in value:
            yield from _tensors_of(part)
    elif hasattr(value, "__dataclass_fields__"):
        yield from _tensors_of(vars(value))


def stored_bytes(trainer: DenseTrainer | VoteTrainer) -> int:
    """Bytes of weights, gradients that outlive a layer, and optimizer or vote state; each storage once.

    Counted on what exists after a step. Float parameters of a vote trainer have gradients only while a step runs; they
    are added.
    """
    model = trainer.model
    tensors = [*model.parameters(), *(p.grad for p in model.parameters() if p.grad is not None)]
    tensors += _tensors_of(dict(trainer.optimizer.state))
    if isinstance(trainer, VoteTrainer):
        for grid in grids_of(model).values():
            tensors += [grid.indices, grid.scale, *_tensors_of(grid.state)]
    seen = {(t.untyped_storage().data_ptr(), t.untyped_storage().nbytes()) for t in tensors if t.numel()}
    extra = 0
    if isinstance(trainer, VoteTrainer):
        extra = sum(p.numel() * p.element_size() for p in trainer.floats.values() if p.grad is None)
    return sum(size for _, size in seen) + extra


@dataclass(frozen=True)
class Run:
    """One line of the results."""

    task: str
    method: str
    lr: float
    seed: int
    steps: int

    def same_as(self, result: Mapping[str, Any]) -> bool:
        """Whether a results line is of this run."""
        return all(result.get(k) == getattr(self, k) for k in ("task", "method", "lr", "seed", "steps"))

    def __str__(self) -> str:
        return f"{self.task} {self.method} lr {self.lr:g} seed {self.seed}"


def execute(run: Run, task: Task, data_root: Path, device: str = "cpu") -> dict[str, Any]:
    """Train and score one run in this process; its results line, without machine and commit.

    ``task`` may be one that is not in ``TASKS``. Losses are nats per token, None where not finite.
    """
    started = time.perf_counter()
    method = METHODS[run.method]
    folder = task.path(task.model, data_root)
    model, tokenizer, _ = load_model(folder)
    parameters = sum(p.numel() for p in model.parameters())
    data = load_data(task, tokenizer, data_root)
    recipe = Recipe(
        steps=run.steps,
        grad_accum=task.grad_accum,
        lr=run.lr,
        warmup=task.warmup,
        vote_rule=cast(Any, method.vote_rule or "momentum"),
        compute="float32",
        gradient_checkpointing=False,
        seed=run.seed,
        device=device,
    )
    batches = PackedBatches(
        data.train, seq_len=task.seq_len, batch_size=task.batch_size, pad_id=data.pad_id, seed=run.seed
    )
    if method.family == "votes":
        hf_config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        model = to_grid(model, hf_config, manifolds.build(method.manifold))
    elif method.family == "lora":
        add_adapters(model, run.seed)
    model.to(torch.device(device))  # type: ignore[arg-type]

    def score(part: EncodedSet) -> float | None:
        rows = evaluation_batches(part, task.seq_len, _EVALUATION_ROWS, data.pad_id)
        loss = mean_answer_loss(model, rows)[0]
        return loss if math.isfinite(loss) else None

    before = score(data.target), score(data.source)
    votes = method.family == "votes"
    trainer = VoteTrainer(model, batches, recipe) if votes else DenseTrainer(model, batches, recipe, method)
    curve: list[tuple[int, float | None]] = [(0, before[0])]
    looks = {math.ceil(run.steps * k / _CURVE_POINTS) for k in range(1, _CURVE_POINTS + 1)}
    tokens, training = 0, 0.0
    for step in range(1, run.steps + 1):
        begun = time.perf_counter()
        result = trainer.step()
        training += time.perf_counter() - begun
        tokens += result[1] if isinstance(result, tuple) else result.tokens
        if step in looks:
            curve.append((step, score(data.target)))
    return {
        "task": run.task,
        "method": run.method,
        "lr": run.lr,
        "seed": run.seed,
        "steps": run.steps,
        "bytes_per_parameter": round(stored_bytes(trainer) / parameters, 3),
        "target_before": before[0],
        "target_after": curve[-1][1],
        "source_before": before[1],
        "source_after": score(data.source),
        "curve": curve,
        "seconds": round(time.perf_counter() - started, 1),
        "training_tokens_per_s": round(tokens / training),
        "data": data.fingerprint(),
    }


# -- many runs --------------------------------------------------------------------------------------------------------


def plan(
    tasks: Sequence[Task],
    methods: Sequence[str],
    seeds: Sequence[int],
    *,
    rates: Sequence[float] = (),
    steps: int | None = None,
) -> list[Run]:
    """All runs, seed by seed, so that a comparison with few seeds is complete before one with more begins.

    Args:
        rates: instead of the learning rates of tasks and methods.
        steps: instead of the tasks' own.
    """
    return [
        Run(task.name, method, rate, seed, steps or task.steps)
        for seed in seeds
        for task in tasks
        for method in methods
        for rate in (rates or task.rates_of(method))
    ]


def append_result(path: Path, result: Mapping[str, Any]) -> None:
    """Add one line, written whole; a torn last line of an earlier crash is closed first."""
    path.parent.mkdir(parents=True, exist_ok=True)
    content = path.read_bytes() if path.exists() else b""
    torn = bool(content) and not content.endswith(b"\n")
    with open(path, "a", encoding="utf-8") as file:
        file.write(("\n" if torn else "") + json.dumps(result, allow_nan=False) + "\n")


def worker_environment(threads: int) -> dict[str, str]:
    """This process's environment with the thread counts of a worker; waiting threads sleep instead of spinning."""
    counts = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "NUMBA_NUM_THREADS"), str(threads))
    return {**os.environ, **counts, "OMP_WAIT_POLICY": "passive", "TOKENIZERS_PARALLELISM": "false"}


def run_all(runs: Sequence[Run], command: Callable[[Run], list[str]], results: Path, *, jobs: int, threads: int) -> int:
    """Execute the runs that ``results`` does not hold yet in worker processes and append their lines as they end.

    Args:
        command: of a run, whose process prints the results line as its last on stdout.
        jobs: processes at a time.
        threads: of each.

    Returns:
        How many were run.

    Raises:
        QualityError: runs that failed, after all others are done.
    """
    done = list(read_lines(results))
    waiting = [run for run in runs if not any(run.same_as(result) for result in done)]
    count, failed = len(waiting), []
    running: list[tuple[Run, subprocess.Popen[str], Any, Any]] = []
    bar = tqdm(total=len(runs), initial=len(runs) - count, desc="quality", unit="run", disable=None)
    try:
        while waiting or running:
            while waiting and len(running) < jobs:
                run = waiting.pop(0)
                # Files, not pipes: a worker that writes more than a pipe holds would wait for a reader.
                out, err = (tempfile.TemporaryFile("w+", encoding="utf-8") for _ in range(2))  # noqa: SIM115
                process = subprocess.Popen(
                    command(run), stdout=out, stderr=err, text=True, env=worker_environment(threads), cwd=ROOT
                )
                running.append((run, process, out, err))
            time.sleep(0.1)
            for entry in [e for e in running if e[1].poll() is not None]:
                running.remove(entry)
                run, process, out, err = entry
                said, complaint = ([line for line in _content(f).splitlines() if line.strip()] for f in (out, err))
                try:
                    if process.returncode:
                        raise ValueError(complaint[-1].removeprefix("error: ") if complaint else "no word on why")
                    result = json.loads(said[-1] if said else "")
                    append_result(results, result)
                    bar.set_postfix_str(f"{run}: {result['target_after']}")
                except ValueError as error:
                    failed.append(f"{run}: {error}")
                bar.update()
    finally:
        for _, process, _, _ in running:
            process.send_signal(signal.SIGTERM)
        for _, process, out, err in running:
            process.wait()
            out.close()
            err.close()
        bar.close()
    if failed:
        more = f" (and {len(failed) - 1} more)" if len(failed) > 1 else ""
        raise QualityError(f"{len(failed)} of {count} runs failed; {failed[0]}{more}")
    return count


def _content(file: Any) -> str:
    with file:
        file.seek(0)
        return file.read()


def worker_command(run: Run, script: Path, data_root: Path, device: str) -> list[str]:
    """Command line that lets a bench script with the subcommand ``quality`` execute one run and print its line."""
    options = {"tasks": run.task, "methods": run.method, "lrs": repr(run.lr), "seeds": run.seed, "steps": run.steps}
    flags = [str(x) for name, value in options.items() for x in (f"--{name}", value)]
    place = ["--data-root", str(data_root.resolve()), "--device", device]
    return [sys.executable, str(script), "quality", *flags, *place, "--worker"]

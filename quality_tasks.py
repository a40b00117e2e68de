"""What is compared: methods that move weights, and tasks to learn with a domain that must not be forgotten.

Splits are hashes of content or path, so they depend on no order: ``held_out_one_in`` on a record's prompt, the standard
library's files on their path (as the embedded model's own training did). Samples of documents are the lowest hashes.

Rejected: 8-bit AdamW by torchao: it compiles a kernel for every shape, 27 s in each process on one core, and its
presence makes every import of transformers write warnings. That of bitsandbytes starts at once on the CPU.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import sysconfig
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import MappingProxyType
from typing import Literal, get_args, get_type_hints

import numpy as np
from transformers import PreTrainedTokenizerBase

import manifolds
from answer_masks import EncodedSet, encode_records
from text_records import Conversation, Record, read_records
from training_recipe import Recipe

ROOT = Path(__file__).resolve().parent
LIBRARY = "python standard library"
"""A task's ``source`` that stands for the held-out files of the running interpreter's library."""
LIBRARY_ONE_IN = 20
OPTIONAL = "requirements-bench.txt"
BASELINE = "adamw"


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
_BETAS = ((0.5, 0.95), (0.7, 0.95), (0.9, 0.99), (0.9, 0.999))
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
DEFAULT_METHODS = ("adamw", "adamw-0.5-0.95", "adamw-8bit", "lora", "supermajority", "momentum", "compact")


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
_ALPACA = replace(
    _STDLIB,
    name="code-alpaca",
    records="code/new_codealpaca.json",
    held_out_one_in=30,
    rates=_rates(1e-3, 2e-3, 4e-3, 8e-3),
)
TASKS: dict[str, Task] = {
    task.name: task
    for task in (
        _STDLIB,
        _ALPACA,
        # The trainer's own size of a step, and the same in micro-batches of one row.
        replace(_ALPACA, name="code-alpaca-16k", batch_size=4, grad_accum=8),
        replace(_ALPACA, name="code-alpaca-16k-narrow", grad_accum=32),
        Task(
            "atto",
            "models/atto-qwen2-bias",
            "corpora/gsm8k_train.jsonl",
            "corpora/tinystories_850.json",
            held_out_one_in=50,
            source_tokens=48_000,
            rates=_rates(4e-3, 8e-3, 1.6e-2),
        ),
        replace(_STDLIB, name="stdlib-low", rates=_rates(1e-5, 3e-5, 1e-4)),
    )
}

DEFAULT_TASKS = ("stdlib", "code-alpaca", "atto", "stdlib-low")
"""Those whose runs take a minute or two; with 16k tokens a step it is eight times that."""


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

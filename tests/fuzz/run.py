"""Feed damaged and hostile files to every parser of the suite: each has to end well or with its own error.

    python tests/fuzz/run.py --minutes 10 --json assets/fuzz.json        # ten minutes for each kind: over two hours

Each target is a real file of its kind, changed in a few random places: bits, bytes, numbers at the edge of their types,
pieces cut out, doubled, moved or taken from elsewhere; of JSON also values replaced by other types, depths, lengths and
names. Files that carry their own hash get a right one afterwards, or no change would ever reach the parser behind it.

A target runs in a process of its own with two gigabytes of address space beyond what it begins with, so that a file
which asks for a terabyte is a failure, and so is a crash of the interpreter or a file that takes longer than ten
seconds. What fails is kept under --keep and printed with its target and seed.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import io
import json
import os
import pickle
import platform
import random
import resource
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
for variable in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ.setdefault(variable, "1")

import torch  # noqa: E402
from test_packed_checkpoint import trained  # noqa: E402
from tiny_models import import_source, tiny_config, write_source  # noqa: E402

import prime_checkpoint  # noqa: E402
from answer_masks import encode_records  # noqa: E402
from code_eval import read_problems  # noqa: E402
from low_bit_packing import LowBitSettings, low_bit_grids  # noqa: E402
from packed_checkpoint import read_checkpoint, write_checkpoint, write_low_bit  # noqa: E402
from prime_checkpoint import CheckpointError, check_file, load_checkpoint  # noqa: E402
from prime_patch import apply_patch, write_patch  # noqa: E402
from prime_telemetry import RunLog, read_lines  # noqa: E402
from qwen_prime_eval import read_report  # noqa: E402
from qwen_prime_wrapper import ModelError, build_model, load_tokenizer, manifold_of  # noqa: E402
from run_reader import Run  # noqa: E402
from run_summary import summarize  # noqa: E402
from text_records import DataError, read_records  # noqa: E402
from token_files import read_tokens, write_tokens  # noqa: E402
from token_shards import MANIFEST, Manifest, _hash_of  # noqa: E402

SPACE = 2 << 30
SECONDS = 10


@dataclass(frozen=True)
class Target:
    """A parser and a file that it takes.

    Attributes:
        data: a good file.
        parse: reads a file.
        errors: what a bad file may raise.
        seal: makes the hash of a changed file right, or leaves it.
        text: whether it is JSON, or lines of it.
        name: of the file.
    """

    data: bytes
    parse: Callable[[Path], Any]
    errors: tuple[type[Exception], ...]
    seal: Callable[[bytes], bytes] = bytes
    text: bool = False
    name: str = "file"


# -- hashes made right ------------------------------------------------------------------------------------------------


def seal_checkpoint(data: bytes) -> bytes:
    """The closing comment of a checkpoint anew."""
    body = data[: -prime_checkpoint._COMMENT_LENGTH]
    return body + f"qwen-prime sha256={hashlib.sha256(body).hexdigest()}".encode()


def seal_pack(data: bytes) -> bytes:
    """The closing hash of a packed file anew."""
    return data[:-32] + hashlib.sha256(data[:-32]).digest()


def seal_manifest(data: bytes) -> bytes:
    """The hash inside a manifest anew, where it is still a JSON object."""
    try:
        content = json.loads(data)
        content["sha256"] = _hash_of({key: value for key, value in content.items() if key != "sha256"})
        return (json.dumps(content, indent=2, sort_keys=True) + "\n").encode()
    except (ValueError, TypeError, AttributeError, RecursionError):
        return data


# -- targets ----------------------------------------------------------------------------------------------------------


def build_targets(folder: Path) -> dict[str, Target]:
    """Every kind of file that the suite reads, small."""
    source = write_source(folder / "source", tiny_config(hidden_size=16, intermediate_size=32, num_hidden_layers=1))
    base = folder / "x_prime_init.pt"
    import_source(source, base)
    new = trained(base, folder / "new.pt")
    content, other = load_checkpoint(base), load_checkpoint(new)
    write_checkpoint(other, folder / "packed")
    write_low_bit(content, low_bit_grids(content, LowBitSettings(bits=6))[0], folder / "low", {"bits": 6})
    write_patch(content, other, folder / "patch", (check_file(base), check_file(new)), votes=True)
    rows = [{"instruction": f"do {n}", "input": "", "output": f"done {n}"} for n in range(6)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    texts = folder / "texts.jsonl"
    texts.write_text("".join(json.dumps({"text": f"some text {n}"}) + "\n" for n in range(9)))
    encoded = encode_records(read_records(texts), load_tokenizer(source), 32, progress=False)
    digest = write_tokens(folder / "shard.safetensors", encoded)
    shard = {"file": "train_00000.safetensors", "sha256": digest, "documents": len(encoded), "tokens": encoded.tokens}
    Manifest({"id": "x"}, {"name": "t", "sha256": "0"}, {"seed": 1}, {"read": 9}).write(folder)
    manifest = json.loads((folder / MANIFEST).read_text())
    manifest["splits"] = {"train": [shard], "valid": []}
    run = folder / "run"
    log = RunLog(run)
    log.config({"steps": 3, "phases": [], "layer_weights": {"0": 10}, "lr": 1e-3, "seq_len": 32})
    for step in range(1, 4):
        log.stats(step=step, loss=1.5, val_loss=None, flip_rate=0.1, flips=3, movement={"0": 0.1}, thawed_layers=1)
    problems = [{"task_id": "a/0", "prompt": "def f():\n", "entry_point": "f", "test": "def check(f): pass"}]
    report = {"version": 1, "scores": {"text.nll_per_token": 2.0, "prompts": [3, 40]}, "settings": {}}

    def watch(path: Path) -> None:
        (run / path.name).write_bytes(path.read_bytes())
        looked = Run(run)
        looked.read_all()
        summarize(looked)
        list(read_lines(run / path.name))

    def configure(path: Path) -> None:
        build_model(json.loads(path.read_text()), manifold_of(content), "x")

    data_errors = (DataError,)
    return {
        "checkpoint": Target(new.read_bytes(), load_checkpoint, (CheckpointError,), seal_checkpoint),
        "packed": Target((folder / "packed").read_bytes(), read_checkpoint, (CheckpointError,), seal_pack),
        "low-bit": Target((folder / "low").read_bytes(), read_checkpoint, (CheckpointError,), seal_pack),
        "patch": Target(
            (folder / "patch").read_bytes(), lambda p: apply_patch(content, p), (CheckpointError,), seal_pack
        ),
        "shard": Target((folder / "shard.safetensors").read_bytes(), read_tokens, data_errors),
        "manifest": Target(
            seal_manifest(json.dumps(manifest).encode()),
            lambda p: Manifest.read(p.parent),
            data_errors,
            seal_manifest,
            True,
            MANIFEST,
        ),
        "records": Target((folder / "rows.jsonl").read_bytes(), read_records, data_errors, text=True, name="r.jsonl"),
        "list of records": Target(json.dumps(rows).encode(), read_records, data_errors, text=True, name="r.json"),
        "stats": Target((run / "stats.jsonl").read_bytes(), watch, (), text=True, name="stats.jsonl"),
        "run config": Target((run / "config.json").read_bytes(), watch, (), text=True, name="config.json"),
        "report": Target(json.dumps(report).encode(), read_report, data_errors, text=True),
        "problems": Target(json.dumps(problems[0]).encode(), read_problems, data_errors, text=True, name="p.jsonl"),
        # Reading JSON is not ours here: ValueError is what it says of a file that is none.
        "model config": Target(
            (source / "config.json").read_bytes(), configure, (ModelError, ValueError, RecursionError), text=True
        ),
    }


# -- changes ----------------------------------------------------------------------------------------------------------

EDGES = [0, 1, 0x7F, 0x80, 0xFF, 0x7FFF, 0x8000, 0xFFFF, 2**31 - 1, 2**31, 2**32 - 1, 2**40, 2**63 - 1, 2**64 - 1]
ODD: list[Any] = [None, True, -1, 0, 1e308, 2**53, 10**40, "", "a\x1b[31mb", "\x00", [], {}, [[]], "x" * 5000, -0.0]
RAW = [b"NaN", b"Infinity", b"-Infinity", b"1e999", b"[" * 3000, b'{"a":' * 3000, b"9" * 5000, b"\xff\xfe", b"null"]


def change_bytes(data: bytearray, draw: random.Random, pool: list[bytes]) -> None:
    """One change of a file's bytes, in place."""
    at = draw.randrange(len(data) + 1)
    # Headers lie at both ends and are short: half of all changes go there.
    if draw.random() < 0.5:
        at = min(at, draw.randrange(1, 400)) if draw.random() < 0.5 else max(0, len(data) - draw.randrange(1, 1500))
    length = draw.choice([1, 2, 4, 8, 30, draw.randrange(1, 400)])
    kind = draw.randrange(7)
    if kind == 0 and at < len(data):
        data[at] ^= 1 << draw.randrange(8)
    elif kind == 1:
        width = draw.choice([1, 2, 4, 8])
        number = draw.choice(EDGES) & ((1 << 8 * width) - 1)
        data[at : at + width] = number.to_bytes(width, draw.choice(["little", "big"]))  # type: ignore[arg-type]
    elif kind == 2:
        del data[at : at + length]
    elif kind == 3:
        data[at:at] = data[at : at + length]
    elif kind == 4:
        data[at : at + length] = draw.randbytes(length)
    elif kind == 5:
        other = draw.choice(pool)
        begin = draw.randrange(len(other))
        data[at : at + length] = other[begin : begin + length]
    else:
        del data[at:]


def change_json(data: bytes, draw: random.Random) -> bytes:
    """One change of a JSON text or of one of its lines, still JSON or nearly so."""
    lines = data.split(b"\n")
    number = draw.randrange(len(lines))
    try:
        tree = json.loads(lines[number] if len(lines) > 3 else data)
    except (ValueError, RecursionError):
        return data
    places: list[tuple[Any, Any]] = []

    def walk(node: Any) -> None:
        for key, value in list(node.items() if isinstance(node, dict) else enumerate(node)):
            places.append((node, key))
            if isinstance(value, dict | list):
                walk(value)

    if isinstance(tree, dict | list):
        walk(tree)
    if not places:
        return data
    node, key = draw.choice(places)
    kind = draw.randrange(4)
    if kind == 0 and isinstance(node, dict):
        del node[key]
    elif kind == 1:
        node[key] = draw.choice(ODD)
    elif kind == 2 and isinstance(node, dict):
        node[draw.choice(["", "\x1b]0;x\x07", "a" * 300, str(key) * 2])] = node[key]
    else:
        node[key] = "@@RAW@@"
    text = json.dumps(tree).encode().replace(b'"@@RAW@@"', draw.choice(RAW))
    if len(lines) > 3:
        lines[number] = text
        return b"\n".join(lines)
    return text


def mutate(target: Target, draw: random.Random, pool: list[bytes]) -> bytes:
    """A changed file with its hash made right."""
    data = bytearray(target.data)
    for _ in range(draw.choice([1, 1, 2, 4, 8])):
        if target.text and draw.random() < 0.6:
            data = bytearray(change_json(bytes(data), draw))
        elif data:
            change_bytes(data, draw, pool)
    return target.seal(bytes(data)) if draw.random() < 0.9 else bytes(data)


# -- running ----------------------------------------------------------------------------------------------------------


def attempt(target: Target, path: Path, data: bytes) -> str | None:
    """Parse a changed file in this process; a line on what went wrong, or None."""
    path.write_bytes(data)
    watch = Watch()
    watch.begin()
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            target.parse(path)
    except target.errors:
        return None
    except BaseException as error:
        return f"{type(error).__name__}: {str(error)[:160]!r} at {traceback.extract_tb(error.__traceback__)[-1]}"
    finally:
        watch.end()
    return None


class TooSlow(BaseException):
    """A file that takes longer than it may."""


class Watch:
    """Raises :class:`TooSlow` where a file takes longer than it may. A process that was itself stopped meanwhile is
    asked again: then hardly any of the time was spent on the processor. One that sleeps has three chances."""

    def __init__(self) -> None:
        self.busy, self.chances = 0.0, 0
        self.before: Any = None

    def begin(self) -> None:
        """From now on."""
        self.busy, self.chances = time.process_time(), 3
        self.before = signal.signal(signal.SIGALRM, self._ring)
        signal.setitimer(signal.ITIMER_REAL, SECONDS)

    def end(self) -> None:
        """The file is done."""
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, self.before)

    def _ring(self, number: int, frame: Any) -> None:
        self.chances -= 1
        if not self.chances or time.process_time() - self.busy > SECONDS / 2:
            raise TooSlow
        self.busy = time.process_time()
        signal.setitimer(signal.ITIMER_REAL, SECONDS)


@dataclass
class Found:
    """What the attempts at one target came to.

    Attributes:
        files: tried.
        seconds: that they took, a pause of the process left out.
        slowest: processor time of the slowest file, in seconds.
        failed: seeds and what happened.
    """

    files: int = 0
    seconds: float = 0.0
    slowest: float = 0.0
    failed: list[tuple[int, str]] = field(default_factory=list)


def work(target: Target, folder: Path, seed: int, seconds: float, pool: list[bytes], least: int = 1) -> Found:
    """Attempts from a seed on, for some seconds and at least so many files, in this process."""
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + SPACE, used + SPACE))
    folder.mkdir(exist_ok=True)
    path, found = folder / target.name, Found()
    while (found.seconds < seconds or found.files < least) and len(found.failed) < 20:
        begun, this = time.perf_counter(), seed + found.files
        (folder / "seed").write_text(str(this))
        data, busy = mutate(target, random.Random(this), pool), time.process_time()
        what = attempt(target, path, data)
        found.slowest = max(found.slowest, time.process_time() - busy)
        if what is not None:
            found.failed.append((this, what))
        found.files += 1
        # No file takes longer than the alarm allows: more is a process that was stopped and went on later.
        found.seconds += min(time.perf_counter() - begun, SECONDS)
    return found


def fuzz(target: Target, folder: Path, seed: int, seconds: float, pool: list[bytes], least: int = 1) -> Found:
    """As :func:`work`, in a process of its own that may crash."""
    reading, writing = os.pipe()
    if (child := os.fork()) == 0:
        code = 1
        try:
            os.close(reading)
            os.write(writing, pickle.dumps(work(target, folder, seed, seconds, pool, least)))
            code = 0
        finally:
            os._exit(code)
    os.close(writing)
    with os.fdopen(reading, "rb") as pipe:
        said = pipe.read()
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if code != 0 or not said:
        at = int((folder / "seed").read_text()) if (folder / "seed").exists() else seed
        return Found(at - seed + 1, failed=[(at, f"the process ended with {code}")])
    return pickle.loads(said)


def main(arguments: argparse.Namespace) -> int:
    torch.set_num_threads(1)
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    where = {
        "seed": arguments.seed,
        "commit": commit.stdout.strip(),
        "python": platform.python_version(),
        "torch": str(torch.__version__),
    }
    failures = 0
    with tempfile.TemporaryDirectory() as name:
        targets = build_targets(Path(name))
        pool = [target.data for target in targets.values()]
        if unknown := set(arguments.kinds or ()) - targets.keys():
            print(f"kinds has {', '.join(sorted(unknown))}, expected of: {', '.join(targets)}")
            return 2
        for kind in arguments.kinds or targets:
            target = targets[kind]
            found = fuzz(target, Path(name) / "work", arguments.seed, 60 * arguments.minutes, pool)
            failures += len(found.failed)
            print(
                f"{kind}: {found.files:,} files in {found.seconds / 60:.1f} minutes, the slowest {found.slowest:.2f} s,"
                f" {len(found.failed)} failures",
                flush=True,
            )
            for seed, what in found.failed:
                print(f"FAILED {kind}, seed {seed}: {what}", flush=True)
                if arguments.keep:
                    arguments.keep.mkdir(parents=True, exist_ok=True)
                    data = mutate(target, random.Random(seed), pool)
                    (arguments.keep / f"{kind}-{seed}").write_bytes(data)
            if arguments.json:
                record(arguments.json, kind, found, where)
    return 1 if failures else 0


def record(path: Path, kind: str, found: Found, where: dict[str, Any]) -> None:
    """Put what was found of a kind in the place of what is written there of it, and add up all kinds."""
    kinds = json.loads(path.read_text())["kinds"] if path.exists() else {}
    kinds[kind] = {
        "files": found.files,
        "minutes": round(found.seconds / 60, 2),
        "slowest_seconds": round(found.slowest, 3),
        "failed": [f"seed {seed}: {what}" for seed, what in found.failed],
        **where,
    }
    totals = {
        "files": sum(k["files"] for k in kinds.values()),
        "minutes": round(sum(k["minutes"] for k in kinds.values()), 2),
        "slowest_seconds": max(k["slowest_seconds"] for k in kinds.values()),
        "failures": sum(len(k["failed"]) for k in kinds.values()),
    }
    path.write_text(json.dumps({**totals, "kinds": kinds}, indent=2) + "\n")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=10.0, help="of each kind")
    parser.add_argument("--kinds", nargs="+", metavar="KIND", help="only these")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--keep", type=Path, help="folder for the files that failed")
    parser.add_argument("--json", type=Path, help="also write the summary here; what it has of other kinds stays")
    raise SystemExit(main(parser.parse_args()))

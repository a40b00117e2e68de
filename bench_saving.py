"""What a save of the whole training state takes from the training, on a real geometry with random weights.

A save is what the trainer does every ``--save-every`` steps: hashes of all tensors, the archive, its own hash, the
disk, the rename, the removal of an older one. Nothing is learned meanwhile. How much that is of a run is a matter of
its steps, of which one is measured here, with one micro-batch; a step of 32 is that micro-batch 32 times and one end.
"""

from __future__ import annotations

import json
import shutil
import statistics
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

import manifolds
from bench_models import NAMES, config_of
from bench_tools import in_own_process, machine, print_table, write_json
from bench_training import METHODS, STEP_ROWS, VoteStep, bare_model
from prime_checkpoint import FORMAT, VERSION, created_by
from prime_device import return_freed_memory
from qwen_prime_wrapper import count_parameters, manifold_record
from run_folder import RunFolder


@dataclass(frozen=True)
class SaveBench:
    """Time of saving a run's whole state, beside the time of the steps between two saves."""

    geometry: str = "Qwen2.5-Coder-1.5B"
    """Which model, by name."""
    vote_rule: str = "momentum"
    """The vote rule, whose votes are part of the state."""
    seq_len: int = 512
    """Tokens in the micro-batch of the measured step."""
    save_every: int = 100
    """Steps between two saves: the trainer's default."""
    saves: int = 3
    """How many saves; the median counts."""
    folder: Path | None = None
    """On which disk to write; by default where temporary files are."""
    json: Path | None = None
    """Also write the results as JSON."""
    worker: bool = False
    """For internal use: measure in this process and print its line."""

    def __post_init__(self) -> None:
        rules = [name for name, method in METHODS.items() if method.vote_rule is not None]
        for name, known in (("geometry", NAMES), ("vote_rule", rules)):
            if getattr(self, name) not in known:
                raise ValueError(f"{name} is {getattr(self, name)}, expected one of {', '.join(known)}")
        for name, least in (("seq_len", 2), ("save_every", 1), ("saves", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} is {getattr(self, name)}, expected at least {least}")


def measure_saving(config: SaveBench) -> dict[str, Any]:
    """Train one step, then save its state again and again into one folder that keeps a single checkpoint."""
    return_freed_memory()
    method = METHODS[config.vote_rule]
    model = bare_model(config.geometry, method)
    trained = VoteStep(model, config.vote_rule, "float32", config.seq_len, rows=1)
    step = trained.step(1)
    table = manifolds.build("compact" if config.vote_rule == "compact" else manifolds.DEFAULT)
    base = {
        "format": FORMAT,
        "version": VERSION,
        "hf_config": config_of(config.geometry),
        "tokenizer": {"source": "none", "files": {}},
        "manifold": manifold_record(table),
        "source": {"id": config.geometry, "revision": None, "files": {}},
    }
    seconds = []
    folder = Path(tempfile.mkdtemp(prefix="qwen-prime-save-", dir=config.folder))
    try:
        run = RunFolder(folder, "bench", 1)
        for number in tqdm(range(config.saves), desc="saves", leave=False, disable=None):
            started = time.perf_counter()
            checkpoint = trained.trainer(1).checkpoint(base)
            checkpoint["created_by"] = created_by("qwen_prime_bench.py")
            path = run.save(number, checkpoint, is_best=False)
            seconds.append(time.perf_counter() - started)
        size = path.stat().st_size
    finally:
        shutil.rmtree(folder)
    of_step = step.of_step(1, STEP_ROWS)
    save = statistics.median(seconds)
    return {
        "geometry": config.geometry,
        "parameters": count_parameters(model),
        "vote_rule": config.vote_rule,
        "checkpoint_bytes": size,
        "save_seconds": [round(s, 2) for s in seconds],
        "mb_per_s": round(size / save / 1e6, 1),
        "step_seconds": round(of_step, 2),
        "share_of_run": round(save / (save + config.save_every * of_step), 6),
        "step_seconds_for_5_percent": round(save * 19 / config.save_every, 3),
    }


def bench_saving(config: SaveBench) -> int:
    """Measure in a process of its own."""
    if config.worker:
        print(json.dumps(measure_saving(config)))
        return 0
    names = ("geometry", "vote_rule", "seq_len", "save_every", "saves", "folder")
    given = {name: getattr(config, name) for name in names if getattr(config, name) is not None}
    arguments = [str(part) for name, value in given.items() for part in (f"--{name.replace('_', '-')}", value)]
    found = in_own_process(["save", "--worker", *arguments])
    shown = [name for name in found if name not in ("geometry", "parameters")]
    print_table(machine(), ("geometry", *shown), [[found["geometry"], *(found[name] for name in shown)]])
    print(
        f"a save every {config.save_every} steps of {STEP_ROWS} x {config.seq_len} tokens, float32; where a step is "
        "shorter than in the last column, saving takes more than 5% of a run"
    )
    write_json(config.json, {"machine": machine(), "results": [found]})
    return 0

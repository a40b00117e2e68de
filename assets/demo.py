"""The main job on the embedded model and data: import, verify, train by votes, verify, evaluate.

Runs the suite's own commands as a user would type them, one after the other, and ends with what came of it.
Everything is offline and goes to ``runs/demo``, which is replaced.
"""

from __future__ import annotations

import json
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path

from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).resolve().parent.parent
FOLDER = Path("runs/demo")
MODEL = Path("assets/tiny_coder")
DATA = Path("assets/stdlib_instruct.jsonl")
STEPS = 36

console = Console()


def run(command: str) -> None:
    """Run one of the suite's commands from the repository's root; a failure ends the demo with its exit code."""
    console.print(f"\n[bold]$ python {command}[/]", highlight=False, soft_wrap=True)
    result = subprocess.run([sys.executable, *shlex.split(command)], cwd=ROOT)
    if result.returncode != 0:
        raise SystemExit(result.returncode)


def answer_loss(name: str, model: Path) -> float:
    """Held-out answer loss of a folder or checkpoint, by qwen_prime_eval.py."""
    report = FOLDER / f"eval_{name}.json"
    run(f"qwen_prime_eval.py {model} --data {DATA} --json {report}")
    return float(json.loads((ROOT / report).read_text())["nll_per_token"])


def main() -> int:
    started = time.perf_counter()
    shutil.rmtree(ROOT / FOLDER, ignore_errors=True)
    (ROOT / FOLDER).mkdir(parents=True)
    imported = FOLDER / "tiny_coder_prime_init.pt"
    trained = FOLDER / "run" / f"tiny_coder_prime_step_{STEPS}.pt"

    run(f"qwen_prime_importer.py --model {MODEL} --output {imported} --report {FOLDER / 'import.json'}")
    run(f"verify_qwen_prime.py {imported} --reference {MODEL}")
    run(
        f"qwen_prime_train.py --checkpoint {imported} --data {DATA} --output-dir {FOLDER / 'run'} --steps {STEPS} "
        "--batch-size 2 --grad-accum 4 --warmup 5 --eval-every 12 --no-gradient-checkpointing"
    )
    run(f"verify_qwen_prime.py {trained}")
    before, after_import, after = (
        answer_loss(name, path) for name, path in (("source", MODEL), ("imported", imported), ("trained", trained))
    )

    table = Table(title="held-out answer loss, nats per token", title_justify="left")
    table.add_column("model")
    table.add_column("loss", justify="right")
    table.add_column("change", justify="right")
    table.add_column("where", overflow="fold")
    for name, loss, place in (
        ("source", before, MODEL),
        ("imported", after_import, imported),
        (f"after {STEPS} steps", after, trained),
    ):
        table.add_row(name, f"{loss:.6f}", f"{loss - before:+.6f}", str(place))
    console.print()
    console.print(table)
    console.print(f"{time.perf_counter() - started:.0f} s. Statistics of the run: {FOLDER / 'run' / 'stats.jsonl'}\n")
    console.print("Next, the real model (3 GB download, then records of your own):", highlight=False)
    console.print(
        "  python qwen_prime_importer.py --model Qwen/Qwen2.5-Coder-1.5B-Instruct --output coder_prime_init.pt\n"
        "  python verify_qwen_prime.py coder_prime_init.pt\n"
        "  python qwen_prime_train.py --checkpoint coder_prime_init.pt --data YOUR.jsonl --output-dir runs/coder",
        highlight=False,
        soft_wrap=True,
    )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

"""Runs commands in this process and notes on which addresses each of them tried to speak; for test_no_network.py.

    python offline_run.py COMMANDS.json REPORT.json

COMMANDS is a list of [name, script, arguments]; of each the report has the exit code, what it said on standard error
and printed, and the attempts. Every attempt fails. An audit hook sees them all, also those of a library that took its
functions out of ``socket`` before.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import json
import socket
import sys
import traceback
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
EVENTS = ("socket.connect", "socket.getaddrinfo", "socket.gethostbyname", "socket.sendto", "socket.sendmsg")
attempts: list[str] = []


def hook(event: str, arguments: tuple[Any, ...]) -> None:
    """Note and refuse what leads to the network; sockets of this machine's own file system do not."""
    if event not in EVENTS or getattr(arguments[0], "family", None) == socket.AF_UNIX:
        return
    attempts.append(f"{event} {arguments[-1] if event == 'socket.connect' else arguments[:2]}")
    raise OSError(f"this test has no network: {event}")


CONFIGS = {
    "qwen_prime_importer": ("ImportConfig", ("ImportProblem", "ModelError", "CheckpointError")),
    "verify_qwen_prime": ("VerifyConfig", ("CheckpointError", "ModelError")),
    "qwen_prime_train": ("TrainConfig", ("TrainError", "CheckpointError", "ModelError", "DataError")),
    "qwen_prime_data": ("DataConfig", ("DataError", "ModelError", "CheckpointError")),
    "qwen_prime_eval": ("EvalConfig", ("ModelError", "CheckpointError", "DataError")),
    "qwen_prime_pack": ("PackScriptConfig", ("CheckpointError", "ModelError", "ExportError")),
    "qwen_prime_chat": ("ChatConfig", ("ChatError", "ModelError", "CheckpointError")),
}


def run(script: str, arguments: list[str]) -> int | str:
    """A command's exit code, or the traceback with which it ended."""
    try:
        if script == "socket":
            # The one that has to be noticed.
            with contextlib.suppress(OSError):
                socket.create_connection(("192.0.2.1", 80), timeout=1)
            with contextlib.suppress(OSError):
                socket.socket(socket.AF_INET, socket.SOCK_DGRAM).connect(("192.0.2.1", 53))
            return 0
        import prime_cli

        module = importlib.import_module(script)
        config, errors = CONFIGS[script]
        return prime_cli.run(getattr(module, config), module.main, tuple(getattr(module, e) for e in errors), arguments)
    except Exception:
        return traceback.format_exc()


def main(commands: Path, output: Path) -> None:
    import torch

    torch.set_num_threads(1)
    sys.addaudithook(hook)
    report = {}
    for name, script, arguments in json.loads(commands.read_text(encoding="utf-8")):
        attempts.clear()
        said, printed = io.StringIO(), io.StringIO()
        with contextlib.redirect_stderr(said), contextlib.redirect_stdout(printed):
            code = run(script, arguments)
        texts = {"said": said.getvalue(), "printed": printed.getvalue()}
        report[name] = {"code": code, "attempts": list(attempts), **texts}
    report["modules"] = sorted(sys.modules)  # type: ignore[assignment]
    output.write_text(json.dumps(report), encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))

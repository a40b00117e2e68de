"""Watch a training run: in the terminal, or as a web page.

    python monitor_qwen.py runs/coder
    python monitor_qwen.py runs/coder --once
    python monitor_qwen.py runs/coder runs/coder2 --web --port 8005

Reads what the trainer writes into the run's folder and nothing else; writes nothing. ``run_reader.py`` follows the
files, ``run_summary.py`` says what they mean, ``monitor_terminal.py`` and ``monitor_web.py`` show it.

The command line is read by argparse, not by tyro as elsewhere in this suite: importing tyro takes longer than all the
rest of a frame, and a monitor is called to glance at. For the same reason each screen is imported when it is asked for.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

LOOPBACK = ("127.0.0.1", "localhost", "::1")


@dataclass(frozen=True, kw_only=True)
class MonitorConfig:
    """Watch a training run: in the terminal, or as a web page."""

    runs: tuple[Path, ...]
    """Folders of runs, as given to the trainer's --output-dir; more than one with --web only."""
    once: bool = False
    """Print one frame and exit."""
    web: bool = False
    """Serve a web page instead."""
    host: str = "127.0.0.1"
    """Address to serve at; any but this machine's own needs --allow-remote."""
    port: int = 8005
    """Port to serve at; 0 takes a free one."""
    allow_remote: bool = False
    """Let other machines in, with the token that is printed at the start."""
    token_file: Path | None = None
    """With --allow-remote: where the token is kept, made at first use and readable by its owner only; else it is new
    with every start."""

    def __post_init__(self) -> None:
        if not self.runs:
            raise ValueError("no run given: expected the folder of one")
        if len(self.runs) > 1 and not self.web:
            raise ValueError(f"{len(self.runs)} runs given, the terminal shows one: add --web to compare them")
        if self.web and self.once:
            raise ValueError("--once prints a frame, --web serves a page: choose one")
        if (self.allow_remote or self.token_file is not None) and not self.web:
            raise ValueError("--allow-remote and --token-file are about the web page: add --web")
        for run in self.runs:
            if run.is_file():
                raise ValueError(f"{run} is a file, expected a run's folder: {run.parent} perhaps")
        if not 0 <= self.port <= 65535:
            raise ValueError(f"port is {self.port}, expected 0 to 65535")
        if self.host not in LOOPBACK and not self.allow_remote:
            raise ValueError(
                f"host is {self.host!r}, which other machines can reach: add --allow-remote (it asks for a token), or "
                "keep 127.0.0.1 and forward the port by ssh -L 8005:127.0.0.1:8005"
            )


class _Parser(argparse.ArgumentParser):
    """Complains on one line, with exit code 2."""

    def error(self, message: str) -> NoReturn:
        print(f"error: {message} (see --help)", file=sys.stderr)
        raise SystemExit(2)


def parse(arguments: Sequence[str] | None = None) -> MonitorConfig:
    """The command line as a config.

    Raises:
        SystemExit: 2 on bad usage, 0 after --help.
    """
    parser = _Parser(prog="monitor_qwen.py", description=MonitorConfig.__doc__)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="folder of a run; several with --web")
    parser.add_argument("--once", action="store_true", help="print one frame and exit")
    parser.add_argument("--web", action="store_true", help="serve a web page instead")
    parser.add_argument("--host", default=MonitorConfig.host, help="address to serve at (%(default)s)")
    parser.add_argument("--port", type=int, default=MonitorConfig.port, help="port, 0 for a free one (%(default)s)")
    parser.add_argument("--allow-remote", action="store_true", help="let other machines in, with a token")
    parser.add_argument("--token-file", type=Path, metavar="FILE", help="where that token is kept between starts")
    given: dict[str, Any] = vars(parser.parse_args(arguments))
    try:
        return MonitorConfig(**{**given, "runs": tuple(given["runs"])})
    except ValueError as error:
        parser.error(str(error))


def main(config: MonitorConfig) -> int:
    if config.web:
        import monitor_web

        return monitor_web.serve(
            config.runs, config.host, config.port, remote=config.allow_remote, token_file=config.token_file
        )
    import monitor_terminal

    return monitor_terminal.terminal(config.runs[0], config.once)


def run(arguments: Sequence[str] | None = None) -> int:
    """Parse, run, known errors on one line."""
    config = parse(arguments)
    try:
        return main(config)
    except OSError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    raise SystemExit(run())

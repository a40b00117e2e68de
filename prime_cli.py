"""The command line that all scripts share: a frozen dataclass becomes the flags, known errors become one line.

Exit codes: what ``main`` returns; 1 for an error that a script declares as its own; 2 for bad usage (tyro's, which
suggests the nearest flag, or a value that the config's ``__post_init__`` refuses); 141 where nobody reads the output
any more.
"""

from __future__ import annotations

import contextlib
import io
import logging
import os
import re
import select
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

import tyro

from harmless_text import harmless

PositionalPath = Annotated[Path, tyro.conf.Positional]
"""A path given by its place on the command line."""


def run(
    config_class: Any,
    main: Callable[[Any], int],
    errors: tuple[type[Exception], ...],
    arguments: Sequence[str] | None = None,
) -> int:
    """Parse, run, and turn errors into exit codes.

    Args:
        config_class: a dataclass, or a union of dataclasses that are subcommands.
        errors: those whose message is meant for the user.
    """
    try:
        code = _run(config_class, main, errors, arguments)
        if sys.stdout is not None and not sys.stdout.closed:
            sys.stdout.flush()
    except (BrokenPipeError, SystemExit):
        # rich ends the program itself where its output goes nowhere.
        if not _nobody_reads():
            raise
        return READER_GONE
    except OSError as error:
        print(f"error: what was to be printed is not whole: {error}", file=sys.stderr)
        _discard(sys.stdout.fileno())
        return 1
    return code


READER_GONE = 141
"""Exit code where whoever read the output has stopped reading (``--help | head``): 128 + SIGPIPE, as a shell says."""


def _nobody_reads() -> bool:
    """Whether standard output leads to a closed pipe; if so, what is left of it goes nowhere from now on."""
    try:
        output = sys.stdout.fileno()
    except (AttributeError, OSError, ValueError):
        return False
    if not hasattr(select, "poll"):
        return False
    watch = select.poll()
    watch.register(output, 0)
    if not any(events & (select.POLLERR | select.POLLHUP) for _, events in watch.poll(0)):
        return False
    _discard(output)
    return True


def _discard(output: int) -> None:
    """Send what is still to be written nowhere: at its end Python would try once more, and complain."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), output)


def _run(
    config_class: Any,
    main: Callable[[Any], int],
    errors: tuple[type[Exception], ...],
    arguments: Sequence[str] | None,
) -> int:
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_Harmless("%(message)s"))
    logging.basicConfig(level=logging.INFO, handlers=[handler])
    complaint = io.StringIO()
    try:
        with contextlib.redirect_stderr(complaint):
            config = tyro.cli(config_class, args=arguments)
    except SystemExit as stop:
        if stop.code:
            print(f"error: {_one_line(complaint.getvalue())}", file=sys.stderr)
        return int(stop.code or 0)
    try:
        return main(config)
    except errors as error:
        if isinstance(error, BrokenPipeError) and _nobody_reads():
            return READER_GONE
        # A message quotes what it complains of: rows, names, what a library says of them over several lines.
        print(f"error: {harmless(' '.join(str(error).split()))}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("stopped by Ctrl-C", file=sys.stderr)
        return 130


class _Harmless(logging.Formatter):
    """Log lines quote data and names of files; escapes in them are for show only."""

    def format(self, record: logging.LogRecord) -> str:
        return harmless(super().format(record), 20_000)


def _one_line(box: str) -> str:
    """tyro's boxed complaint as one line: borders, rules and the pointer to --help cut away."""
    text = re.sub(r"[\u2500-\u257f]+|-{4,}", " ", re.sub(r"\x1b\[[0-9;]*m", "", box))
    # In a narrow box a line may break anywhere.
    text = re.sub(r"For full helptext.*", "", " ".join(text.split())).rstrip()
    # The title of the box says again what its text says.
    text = re.sub(r"^Value error Error parsing \w+: ", "", text)
    text = re.sub(r"^(Unrecognized options) \1", r"\1", text)
    return f"{text} (see --help)"

from __future__ import annotations

import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

import prime_cli


@dataclass(frozen=True)
class Example:
    """An example."""

    count: int = 3
    """How many."""
    name: str = "x"
    """A name."""

    def __post_init__(self) -> None:
        if self.count < 1:
            raise ValueError(f"count is {self.count}, expected at least 1")


class Known(RuntimeError):
    pass


def run(arguments: list[str], main=lambda config: config.count) -> int:
    return prime_cli.run(Example, main, (Known,), arguments)


def test_the_exit_code_is_what_main_returns() -> None:
    assert run(["--count", "7"]) == 7


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (["--cuont", "1"], "--count"),
        (["--count", "many"], "many"),
        (["--count", "0"], "at least 1"),
        (["extra"], "error: Unrecognized options: extra "),
        (["--count", "0"], "error: count is 0, "),
    ],
)
def test_bad_usage_is_one_line_and_exit_code_2(
    arguments: list[str], word: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(arguments) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: ") and word in lines[0]


def test_known_errors_are_one_line_and_exit_code_1(capsys: pytest.CaptureFixture[str]) -> None:
    def fail(config: Example) -> int:
        raise Known("what, got, expected")

    assert run([], fail) == 1
    assert capsys.readouterr().err == "error: what, got, expected\n"


def test_unknown_errors_are_not_hidden() -> None:
    def fail(config: Example) -> int:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        run([], fail)


def test_help_goes_to_the_screen_and_exits_0(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["--help"]) == 0
    assert "How many." in capsys.readouterr().out


@pytest.mark.parametrize("what", ["--help", "talk", "talk and end"])
def test_a_reader_that_has_left_is_no_error(what: str) -> None:
    """As in ``--help | head -1``: no traceback, neither at once nor when Python empties its buffers at the end."""
    program = (
        "import sys, test_prime_cli as t, prime_cli\n"
        "sys.stdin.readline()\n"
        "def main(config):\n"
        "    print('x' * (10 if sys.argv[1].endswith('end') else 1_000_000))\n"
        "    return 0\n"
        "arguments = ['--help'] if sys.argv[1] == '--help' else []\n"
        "sys.exit(prime_cli.run(t.Example, main, (OSError,), arguments))\n"
    )
    here = Path(__file__).parent
    process = subprocess.Popen(
        [sys.executable, "-c", program, what],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={"PYTHONPATH": f"{here}:{here.parent}"},
        text=True,
    )
    assert process.stdout is not None
    process.stdout.close()
    _, said = process.communicate("go\n", timeout=60)
    assert (process.returncode, said) == (prime_cli.READER_GONE, "")


@pytest.mark.parametrize(("how", "code", "word"), [(">&-", 7, ""), (">/dev/full", 1, "error: what was to be printed")])
def test_output_that_goes_nowhere_or_is_full(how: str, code: int, word: str) -> None:
    """Closed, as under some supervisors, it is nobody's loss; cut short it is."""
    program = "import sys, test_prime_cli as t; sys.exit(t.run(['--count', '7'], lambda c: print('x') or c.count))"
    here = Path(__file__).parent
    done = subprocess.run(
        ["sh", "-c", f'exec "$@" {how}', "sh", sys.executable, "-c", program],
        capture_output=True,
        env={"PYTHONPATH": f"{here}:{here.parent}"},
        text=True,
        timeout=60,
    )
    assert done.returncode == code and done.stderr.startswith(word) and done.stderr.count("\n") == bool(word)


def test_a_pipe_that_breaks_elsewhere_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    def fail(config: Example) -> int:
        raise BrokenPipeError("the server hung up")

    assert prime_cli.run(Example, fail, (OSError,), []) == 1
    assert "the server hung up" in capsys.readouterr().err

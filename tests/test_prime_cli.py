from __future__ import annotations

from dataclasses import dataclass

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
        (["extra"], "extra"),
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

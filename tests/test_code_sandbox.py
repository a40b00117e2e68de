"""code_sandbox: what a program may do, and everything it may not."""

from __future__ import annotations

import os
import platform
import struct
import sys
import time
from pathlib import Path

import pytest

import code_sandbox as sandbox
from code_sandbox import Limits, Outcome, SandboxError, filter_program, run_program

pytestmark = pytest.mark.skipif(
    not sys.platform.startswith("linux") or platform.machine() not in ("x86_64", "aarch64"),
    reason="programs are contained on Linux, x86_64 and aarch64, only",
)
LIMITS = Limits(5.0, 1 << 30)
SYSCALL = "import ctypes\nlibc = ctypes.CDLL(None, use_errno=True)\nassert libc.syscall({}) != -1, ctypes.get_errno()\n"


@pytest.mark.parametrize(
    "program",
    [
        "x = sum(range(100))\nassert x == 4950",
        "import math, re, collections, itertools, typing, hashlib, random, heapq, datetime, fractions, decimal\n"
        "assert hashlib.md5(b'a').hexdigest() and random.random() < 1 and datetime.datetime.now().year > 2000",
        "print('x' * 100_000)\nassert __name__ == '__main__'",
        "import resource\nassert resource.getrlimit(resource.RLIMIT_FSIZE) == (0, 0)",
        "import json, asyncio, unittest, logging, email, concurrent.futures, xml.dom, collections.abc\n"
        "assert json.loads('[1]') == [1]",
        "import time\ntime.sleep(0.01)",
        "assert 'caf\u00e9 \u4f60' == 'caf\\u00e9 \\u4f60'",
        "",
    ],
)
def test_a_computation_runs(program: str) -> None:
    assert run_program(program, LIMITS) == Outcome(True)


@pytest.mark.parametrize(
    ("program", "reason"),
    [
        ("assert 1 == 2, 'no'", "AssertionError: no"),
        ("import sys\nsys.exit(0)", "SystemExit: 0"),
        ("import os\nos._exit(0)", "ended without a word, exit code 0"),
        ("raise KeyboardInterrupt", "KeyboardInterrupt"),
        ("def (", "SyntaxError"),
        ("import ctypes\nctypes.string_at(0)", "killed by SIGSEGV"),
        ("x = 'a' * (1 << 33)", "MemoryError"),
        ("import os\nwhile True: os.fork()", "PermissionError"),
        ("import subprocess\nsubprocess.run(['ls'])", "PermissionError"),
        ("import threading\nthreading.Thread(target=print).start()", "RuntimeError"),
        ("import socket\nsocket.socket()", "PermissionError"),
        ("import os\nos.kill(os.getppid(), 9)", "PermissionError"),
        ("import os\nos.kill(-1, 9)", "PermissionError"),
        ("import os\nos.execv('/bin/true', ['true'])", "PermissionError"),
        ("import resource\nresource.setrlimit(resource.RLIMIT_CPU, (1, 1))", "not allowed"),
        ("raise ValueError('\\x1b[31m red\\n')", "ValueError:"),
    ],
)
def test_what_fails_or_is_refused_says_why(program: str, reason: str) -> None:
    found = run_program(program, LIMITS)
    assert not found.passed and reason in found.reason
    assert found.reason.isprintable() and len(found.reason) < 400


@pytest.mark.parametrize(
    "attempt",
    [
        "open({path!r}, 'w')",
        "open({path!r}, 'a')",
        "open({path!r}, 'r+')",
        "import os; os.open({path!r}, os.O_RDONLY | os.O_TRUNC)",
        "import os; os.open({path!r} + 'x', os.O_CREAT)",
        "import os; os.unlink({path!r})",
        "import os; os.rename({path!r}, {path!r} + 'x')",
        "import os; os.truncate({path!r}, 0)",
        "import os; os.chmod({path!r}, 0)",
        "import os; os.utime({path!r}, (0, 0))",
        "import os; os.mkdir({path!r} + 'x')",
        "import os; os.symlink({path!r}, {path!r} + 'x')",
        "import os; os.link({path!r}, {path!r} + 'x')",
        "import os; os.mkfifo({path!r} + 'x')",
        "import tempfile; tempfile.TemporaryFile()",
    ],
)
def test_no_file_is_changed(attempt: str, tmp_path: Path) -> None:
    path = tmp_path / "precious"
    path.write_text("kept")
    before = path.stat()
    assert not run_program(attempt.format(path=str(path)), LIMITS).passed
    after = path.stat()
    assert path.read_text() == "kept" and list(tmp_path.iterdir()) == [path]
    assert (before.st_mtime_ns, before.st_mode) == (after.st_mtime_ns, after.st_mode)


@pytest.mark.skipif(platform.machine() != "x86_64", reason="numbers of x86_64")
@pytest.mark.parametrize(
    "call",
    [
        "41, 2, 1, 0",  # socket, around Python's module
        "425, 2, 0",  # io_uring_setup, which could do all of it unseen
        "257, -100, b'.', 0o20200000, 0",  # openat, a file without a name: O_TMPFILE
        "257, -100, b'.', 0o20200001, 0o600",  # the same for writing
        "435, 0, 0",  # clone3
        "437, -100, 0, 0, 0",  # openat2
        "101, 16, 0, 0, 0",  # ptrace
        "310, 1, 0, 0, 0, 0, 0",  # process_vm_readv
        "0x40000000 + 1, 1, 0, 0",  # write, by x32's number
        "16, 0, 0x5412, 0",  # ioctl TIOCSTI: types into a terminal
        "157, 22, 2, 0",  # prctl: another filter
        "160, 0, 0",  # setrlimit
        "302, 0, 0, ctypes.byref((ctypes.c_long * 2)()), 0",  # prlimit64 with new limits
    ],
)
def test_system_calls_by_number_are_refused(call: str) -> None:
    found = run_program(SYSCALL.format(call), LIMITS)
    assert not found.passed
    assert found.reason == "AssertionError: 1", "EPERM, by the filter"


def test_time_is_up_for_whole_groups() -> None:
    for program in ("while True: pass", "import time\ntime.sleep(60)"):
        begun = time.monotonic()
        found = run_program(program, Limits(0.5))
        assert not found.passed and time.monotonic() - begun < 20
        assert found.reason.startswith("not done after")
    assert not [p for p in Path("/proc").glob("[0-9]*") if str(Path(sandbox.__file__)) in _command(p)]


def test_a_busy_machine_does_not_decide(monkeypatch: pytest.MonkeyPatch) -> None:
    """The processor's seconds are the limit: by the clock three times as many have passed here."""

    class Clock:
        now = iter([0.0])

        def monotonic(self) -> float:
            return next(self.now, 30.0)

    monkeypatch.setattr(sandbox, "time", Clock())
    assert run_program("x = 1", Limits(10.0)) == Outcome(True)
    monkeypatch.setattr(sandbox, "time", Clock())
    Clock.now = iter([-100.0])
    assert run_program("x = 1", Limits(10.0)).reason == "not done after 52 s by the clock"


def _command(process: Path) -> str:
    try:
        return (process / "cmdline").read_bytes().decode(errors="replace")
    except OSError:
        return ""


def test_a_machine_that_cannot_contain_runs_nothing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with pytest.raises(SandboxError, match="cannot be contained on riscv64"):
        filter_program("riscv64")
    monkeypatch.setattr(sandbox.sys, "platform", "darwin")
    with pytest.raises(SandboxError, match="on Linux only"):
        run_program("x = 1")
    monkeypatch.undo()
    # A kernel that refuses the filter: the child says so instead of running the program.
    broken = tmp_path / "code_sandbox.py"
    text = (
        Path(sandbox.__file__)
        .read_text()
        .replace("_SECCOMP_MODE_FILTER = 1, 22, 38, 2", "_SECCOMP_MODE_FILTER = 1, 22, 38, 9")
    )
    broken.write_text(text)
    monkeypatch.setattr(sandbox, "__file__", str(broken))
    with pytest.raises(SandboxError, match="programs cannot be contained here: the kernel refuses"):
        run_program(f"open({str(tmp_path / 'x')!r}, 'w')")
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize("machine", ["x86_64", "aarch64"])
def test_every_jump_of_the_filter_lands_inside(machine: str) -> None:
    program = filter_program(machine)
    lines = [struct.unpack("=HBBI", program[i : i + 8]) for i in range(0, len(program), 8)]
    assert len(lines) < 4096 and os.O_WRONLY
    for place, (code, yes, no, _) in enumerate(lines):
        if code in (0x15, 0x35, 0x45):
            assert place + 1 + max(yes, no) < len(lines)
    assert lines[-1][0] == 0x06 and lines[-1][3] != 0x7FFF0000, "what is not listed is refused"

"""Run a program that nobody has read, contained: nothing written, no network, no processes, bounded time and memory.

The program runs in a Python process of its own that gives up, before the program's first line, everything it does not
need. Resource limits bound processor time, address space, file size and open files. A seccomp filter (Linux 3.5 and
later, without privileges) then allows the system calls of a computation and refuses all others with an error: a file
can be opened for reading only; sockets, processes, threads, signals to others, changes of files and of limits do not
exist. The filter cannot be taken off again. The process is the leader of its own session, and the parent kills that
whole process group when time is up.

Allowed calls are listed, not forbidden ones: a kernel's new call is refused until somebody has looked at it.

What this is not: a judge that cannot be fooled. A program that searches its own process for the word that reports
success can print it. It is contained all the same. Rejected: containers and namespaces (they need privileges or
settings that many machines do not have, and keep the file system writable somewhere); only resource limits (they stop
no socket and no file); audit hooks (the program can go around them through ctypes).
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import platform
import resource
import secrets
import select
import signal
import struct
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any


class SandboxError(RuntimeError):
    """This machine cannot contain a program."""


@dataclass(frozen=True)
class Limits:
    """What a program may use."""

    seconds: float = 10.0
    """Of the processor, rounded up."""
    memory_bytes: int = 1 << 30
    """Address space."""

    @property
    def clock_seconds(self) -> float:
        """When a program is stopped that does not compute: the clock runs on while others have the processor."""
        return 5 * self.seconds + 2.0


@dataclass(frozen=True)
class Outcome:
    """``passed``: the program ran to its end. Else ``reason`` says in one line why not."""

    passed: bool
    reason: str = ""


# -- system calls -----------------------------------------------------------------------------------------------------

# Name: (x86_64, aarch64); None where the architecture has no such call.
_ALLOWED: dict[str, tuple[int | None, int | None]] = {
    "read": (0, 63),
    "write": (1, 64),
    "close": (3, 57),
    "stat": (4, None),
    "fstat": (5, 80),
    "lstat": (6, None),
    "poll": (7, None),
    "lseek": (8, 62),
    "mmap": (9, 222),
    "mprotect": (10, 226),
    "munmap": (11, 215),
    "brk": (12, 214),
    "rt_sigaction": (13, 134),
    "rt_sigprocmask": (14, 135),
    "rt_sigreturn": (15, 139),
    "pread64": (17, 67),
    "readv": (19, 65),
    "writev": (20, 66),
    "access": (21, None),
    "select": (23, None),
    "sched_yield": (24, 124),
    "mremap": (25, 216),
    "madvise": (28, 233),
    "dup": (32, 23),
    "nanosleep": (35, 101),
    "getitimer": (36, 102),
    "alarm": (37, None),
    "setitimer": (38, 103),
    "getpid": (39, 172),
    "exit": (60, 93),
    "uname": (63, 160),
    "getcwd": (79, 17),
    "readlink": (89, None),
    "gettimeofday": (96, 169),
    "getrlimit": (97, None),
    "getrusage": (98, 165),
    "sysinfo": (99, 179),
    "times": (100, 153),
    "getuid": (102, 174),
    "getgid": (104, 176),
    "geteuid": (107, 175),
    "getegid": (108, 177),
    "getppid": (110, 173),
    "sigaltstack": (131, 132),
    "arch_prctl": (158, None),
    "gettid": (186, 178),
    "time": (201, None),
    "futex": (202, 98),
    "sched_getaffinity": (204, 123),
    "getdents64": (217, 61),
    "restart_syscall": (219, 128),
    "clock_gettime": (228, 113),
    "clock_getres": (229, 114),
    "clock_nanosleep": (230, 115),
    "exit_group": (231, 94),
    "newfstatat": (262, 79),
    "readlinkat": (267, 78),
    "faccessat": (269, 48),
    "pselect6": (270, 72),
    "ppoll": (271, 73),
    "set_robust_list": (273, 99),
    "getcpu": (309, 168),
    "getrandom": (318, 278),
    "membarrier": (324, 283),
    "statx": (332, 291),
    "rseq": (334, 293),
    "faccessat2": (439, 439),
}
_OPEN, _OPENAT, _PRLIMIT, _IOCTL, _FCNTL = (2, None), (257, 56), (302, 261), (16, 29), (72, 25)
_ARCHITECTURES = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}
# O_TMPFILE holds the bit of O_DIRECTORY, which only reads: importing a package lists its folder.
_WRITING = (os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | getattr(os, "O_TMPFILE", 0)) & ~os.O_DIRECTORY
_TERMINAL_QUESTIONS = (0x5401, 0x5413, 0x541B, 0x5450, 0x5451)  # TCGETS, TIOCGWINSZ, FIONREAD, FIONCLEX, FIOCLEX
_FILE_QUESTIONS = (0, 1, 2, 3, 4, 1030)  # F_DUPFD, F_GETFD, F_SETFD, F_GETFL, F_SETFL, F_DUPFD_CLOEXEC
_X32 = 0x40000000
"""Numbers from here on are x86_64's calls with 32-bit pointers, a way around a filter."""

# Classic BPF: load a word at an absolute offset, jump if equal / at least / any bit set, return.
_LOAD, _EQUAL, _AT_LEAST, _ANY_BIT, _RETURN = 0x20, 0x15, 0x35, 0x45, 0x06
_ALLOW, _KILL, _REFUSE = 0x7FFF0000, 0x80000000, 0x00050000 | 1  # EPERM


def filter_program(machine: str) -> bytes:
    """The seccomp filter of an architecture, as an array of ``struct sock_filter``.

    Raises:
        SandboxError: an architecture whose system calls are not listed.
    """
    if machine not in _ARCHITECTURES:
        raise SandboxError(
            f"programs cannot be contained on {machine}, expected of {', '.join(_ARCHITECTURES)} with Linux"
        )
    column, audit = _ARCHITECTURES[machine]
    lines: list[tuple[int, int, int, int]] = [
        (_LOAD, 0, 0, 4),
        (_EQUAL, 1, 0, audit),
        (_RETURN, 0, 0, _KILL),
        (_LOAD, 0, 0, 0),
        (_AT_LEAST, 0, 1, _X32),
        (_RETURN, 0, 0, _REFUSE),
    ]

    def only_if(call: tuple[int | None, int | None], *body: tuple[int, int, int, int]) -> None:
        """For that call run ``body``, which ends in a return or falls through into a refusal."""
        number = call[column]
        if number is not None:
            lines.append((_EQUAL, 0, len(body) + 1, number))
            lines.extend(body)
            lines.append((_RETURN, 0, 0, _REFUSE))

    def argument(index: int, *, high: bool = False) -> tuple[int, int, int, int]:
        return (_LOAD, 0, 0, 16 + 8 * index + 4 * high)

    for numbers in _ALLOWED.values():
        number = numbers[column]
        if number is not None:
            lines += [(_EQUAL, 0, 1, number), (_RETURN, 0, 0, _ALLOW)]
    for call, index in ((_OPEN, 1), (_OPENAT, 2)):
        only_if(call, argument(index), (_ANY_BIT, 1, 0, _WRITING), (_RETURN, 0, 0, _ALLOW))
    # Asking for limits is allowed, setting them is not: the pointer to new ones must be null.
    nothing_new = [argument(2), (_EQUAL, 0, 3, 0), argument(2, high=True), (_EQUAL, 0, 1, 0), (_RETURN, 0, 0, _ALLOW)]
    only_if(_PRLIMIT, *nothing_new)
    for call, questions in ((_IOCTL, _TERMINAL_QUESTIONS), (_FCNTL, _FILE_QUESTIONS)):
        body = [argument(1)]
        for question in questions:
            body += [(_EQUAL, 0, 1, question), (_RETURN, 0, 0, _ALLOW)]
        only_if(call, *body)
    lines.append((_RETURN, 0, 0, _REFUSE))
    return b"".join(struct.pack("=HBBI", *line) for line in lines)


# -- inside -----------------------------------------------------------------------------------------------------------

_PR_SET_PDEATHSIG, _PR_SET_SECCOMP, _PR_SET_NO_NEW_PRIVS, _SECCOMP_MODE_FILTER = 1, 22, 38, 2


def lock_down(limits: Limits) -> None:
    """Give up everything but computing, for good (this process, mutated).

    Raises:
        SandboxError: the kernel does not take the filter.
    """
    seconds = int(limits.seconds) + 1
    # The softer limit first: its signal has a name of its own.
    resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds + 1))
    for what, most in (
        (resource.RLIMIT_AS, limits.memory_bytes),
        (resource.RLIMIT_FSIZE, 0),
        (resource.RLIMIT_NOFILE, 32),
        (resource.RLIMIT_CORE, 0),
    ):
        resource.setrlimit(what, (most, most))
    program = filter_program(platform.machine())
    libc = ctypes.CDLL(None, use_errno=True)
    libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    array = ctypes.create_string_buffer(program, len(program))
    # struct sock_fprog: a count of 16 bits, then a pointer at its natural alignment.
    header = ctypes.create_string_buffer(struct.pack("@HP", len(program) // 8, ctypes.addressof(array)))
    refused = libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) or libc.prctl(
        _PR_SET_SECCOMP, _SECCOMP_MODE_FILTER, header, 0, 0
    )
    if refused:
        raise SandboxError(f"the kernel refuses the filter: {os.strerror(ctypes.get_errno())}")


def _inside(report: int, token: str, limits: Limits) -> None:
    """Run the program on standard input; the first word written to ``report`` says how that went."""
    program = sys.stdin.read()
    try:
        lock_down(limits)
    except (SandboxError, OSError, ValueError) as error:
        os.write(report, f"open {error}".encode())
        os._exit(1)
    said = f"{token} passed"
    try:
        exec(compile(program, "<program>", "exec"), {"__name__": "__main__"})
    except BaseException as error:
        # Whatever the program raises, SystemExit and KeyboardInterrupt too, is a failure and no more.
        said = f"{token} failed {type(error).__name__}"
        with contextlib.suppress(BaseException):
            said += f": {str(error)[:160]}"
    os.write(report, said.encode(errors="replace")[:400])
    os._exit(0)


# -- outside ----------------------------------------------------------------------------------------------------------


def run_program(program: str, limits: Limits = Limits()) -> Outcome:
    """Run a Python program to its end, contained as the module says; its output is thrown away.

    Raises:
        SandboxError: this machine cannot contain it; nothing was run.
    """
    if not sys.platform.startswith("linux"):
        raise SandboxError(f"programs can be contained on Linux only, this is {sys.platform}")
    filter_program(platform.machine())
    token = secrets.token_hex(16)
    reader, writer = os.pipe()
    arguments = [str(writer), token, str(limits.seconds), str(limits.memory_bytes)]
    with tempfile.TemporaryFile() as source, tempfile.TemporaryDirectory(prefix="sandbox-") as folder:
        source.write(program.encode("utf-8", errors="surrogatepass"))
        source.seek(0)
        process = subprocess.Popen(
            [sys.executable, "-I", "-S", "-B", str(Path(__file__).resolve()), *arguments],
            stdin=source,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            cwd=folder,
            env={"PATH": "/usr/bin:/bin", "LANG": "C.UTF-8", "PYTHONHASHSEED": "0"},
            pass_fds=(writer,),
            start_new_session=True,
        )
        os.close(writer)
        try:
            said, in_time = _wait(process, reader, limits.clock_seconds)
        finally:
            _kill(process)
            os.close(reader)
    if said.startswith("open "):
        raise SandboxError(f"programs cannot be contained here: {said[5:]}")
    if said == f"{token} passed":
        return Outcome(True)
    if said.startswith(f"{token} failed "):
        return Outcome(False, _printable(said.removeprefix(f"{token} failed ")))
    if process.returncode == -signal.SIGXCPU:
        return Outcome(False, f"not done after {limits.seconds:g} s of the processor")
    if not in_time:
        return Outcome(False, f"not done after {limits.clock_seconds:g} s by the clock")
    return Outcome(False, f"ended without a word, {_ending(process.returncode)}")


def _wait(process: subprocess.Popen[Any], reader: int, seconds: float) -> tuple[str, bool]:
    """What the process reported before it ended or its time was up."""
    deadline = time.monotonic() + seconds
    parts: list[bytes] = []
    while (left := deadline - time.monotonic()) > 0:
        ready, _, _ = select.select([reader], [], [], left)
        if not ready:
            break
        part = os.read(reader, 4096)
        if not part:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(timeout=max(0.0, deadline - time.monotonic()))
                return b"".join(parts).decode(errors="replace"), True
            break
        parts.append(part)
        if sum(map(len, parts)) > 4096:
            break
    return b"".join(parts).decode(errors="replace"), False


def _kill(process: subprocess.Popen[Any]) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _ending(code: int) -> str:
    if code < 0:
        with contextlib.suppress(ValueError):
            return f"killed by {signal.Signals(-code).name}"
    return f"exit code {code}"


def _printable(text: str) -> str:
    return "".join(c if c.isprintable() else " " for c in text)


if __name__ == "__main__":
    _inside(int(sys.argv[1]), sys.argv[2], Limits(float(sys.argv[3]), int(sys.argv[4])))

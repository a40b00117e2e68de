"""Compiled row kernels on several threads: those that torch's own operations run on.

A row kernel is a compiled function whose last two arguments are ``start`` and ``stop`` and that does these rows; no row
depends on another. ``run_rows`` cuts all rows into pieces, and threads take piece after piece until none is left: the
caller and, where torch's operations run on OpenMP, the other threads of its team, woken by the same call that compilers
make of ``#pragma omp parallel``. Nothing of it holds Python's lock: one compiled call goes in and one comes out.

A team has to be compiled in, a call for each kernel (``team_of``). Where torch has no OpenMP, or in a process forked
from one whose team it has lost, a pool of Python threads runs the same kernel on the same pieces (``RUNS_IN``).

Rejected, and measured on two cores beside AdamW (102 M weights in bfloat16, AdamW's speed 1.00): the pool for all,
0.88, because threads of torch's team go on spinning after their work and share a core with the pool's for about as long
as a kernel takes; Python functions called by the team, 0.95, each waiting for the interpreter's lock; numba's own
threads, a second team beside torch's, and not to be entered by two threads at once.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import llvmlite.binding
import llvmlite.ir
import numba
import torch
from numba.core import cgutils, types

PIECES = 4
"""Into how many pieces rows are cut for each thread."""
SMALLEST = 65536
"""Fewest elements that are worth a second thread."""
_FORK = "ghost_fork_team"
"""The name under which compiled code finds the call that starts a team."""


def _find_team() -> str:
    """Tell compiled code where torch's OpenMP has ``GOMP_parallel(function, data, threads, flags)``, if it has."""
    if os.name == "nt" or "parallel backend: OpenMP" not in torch.__config__.parallel_info():
        return "pool"
    call = getattr(ctypes.CDLL(None), "GOMP_parallel", None)
    if call is None:
        return "pool"
    llvmlite.binding.add_symbol(_FORK, ctypes.cast(call, ctypes.c_void_p).value)
    return "team"


RUNS_IN = _find_team()
"""Which threads row kernels run on: ``team``, torch's own, or ``pool``."""


def compiled(**options: Any) -> Callable[[Callable[..., Any]], Any]:
    """Decorator: compile for the CPU, once a machine, to run without Python's lock."""
    return numba.njit(nogil=True, cache=True, error_model="numpy", **options)


# Machine code of this is kept in the caches of the files whose kernels are dealt out: they have to be touched too when
# it changes.
def _deal_typed(typing_context, kernel, arguments, rows, pieces, threads):
    def code(context, builder, signature, values):
        number, word, byte = llvmlite.ir.IntType(64), llvmlite.ir.IntType(32), llvmlite.ir.IntType(8).as_pointer()
        dispatcher = signature.args[0].dispatcher
        own = types.void(*signature.args[1].types, types.int64, types.int64)
        found = dispatcher.get_compile_result(own)
        context.active_code_library.add_linking_library(found.library)
        # What threads share: the next piece, how many failed, all rows, all pieces, the kernel's arguments.
        shared = llvmlite.ir.LiteralStructType([number] * 4 + [values[1].type])

        def place(at, pointer, member):
            return at.gep(pointer, [word(0), word(member)], inbounds=True)

        # void body(shared *all): what each thread of the team runs.
        kind = llvmlite.ir.FunctionType(llvmlite.ir.VoidType(), [byte])
        name = builder.module.get_unique_name(f"{dispatcher.py_func.__name__}.team")
        body = llvmlite.ir.Function(builder.module, kind, name)
        body.linkage = "internal"
        inner = llvmlite.ir.IRBuilder(body.append_basic_block("begin"))
        again, take, failed, end = (body.append_basic_block(x) for x in ("again", "take", "failed", "end"))
        all_of = inner.bitcast(body.args[0], shared.as_pointer())
        count, cut, packed = (inner.load(place(inner, all_of, member)) for member in (2, 3, 4))
        inner.branch(again)
        inner.position_at_end(again)
        turn = inner.atomic_rmw("add", place(inner, all_of, 0), number(1), "monotonic")
        inner.cbranch(inner.icmp_signed("<", turn, cut), take, end)
        inner.position_at_end(take)
        start = inner.sdiv(inner.mul(count, turn), cut)
        stop = inner.sdiv(inner.mul(count, inner.add(turn, number(1))), cut)
        given = [inner.extract_value(packed, k) for k in range(len(signature.args[1].types))]
        status, _ = context.call_internal_no_propagate(inner, found.fndesc, own, [*given, start, stop])
        inner.cbranch(status.is_error, failed, again)
        inner.position_at_end(failed)
        inner.atomic_rmw("add", place(inner, all_of, 1), number(1), "monotonic")
        inner.branch(again)
        inner.position_at_end(end)
        inner.ret_void()

        mine = cgutils.alloca_once(builder, shared)
        for member, value in enumerate((number(0), number(0), values[2], values[3], values[1])):
            builder.store(value, place(builder, mine, member))
        kind = llvmlite.ir.FunctionType(llvmlite.ir.VoidType(), [body.type, byte, word, word])
        fork = cgutils.get_or_insert_function(builder.module, kind, _FORK)
        builder.call(fork, [body, builder.bitcast(mine, byte), builder.trunc(values[4], word), word(0)])
        return builder.load(place(builder, mine, 1))

    return types.int64(kernel, arguments, types.int64, types.int64, types.int64), code


deal: Callable[..., int] = numba.extending.intrinsic(_deal_typed)
"""``deal(kernel, arguments, rows, pieces, threads)`` runs a row kernel in torch's team and returns how many pieces
failed; for compiled code only. ``arguments`` is a tuple of all but the last two of the kernel's."""

_teams: dict[Any, Any] = {}


def team_of(kernel: Any) -> Callable[[Callable[..., int]], Any]:
    """Decorator: the function ``(rows, pieces, threads, *arguments)`` that deals ``kernel`` out, which it has to name
    itself: what compiled code finds in its globals can be kept on the disk, what it gets from outside can not."""

    def register(function: Callable[..., int]) -> Any:
        _teams[kernel] = compiled()(function)
        return _teams[kernel]

    return register


_pool: ThreadPoolExecutor | None = None
_pool_size = 0


def run_rows(kernel: Callable[..., None], rows: int, elements: int, *arguments: Any) -> None:
    """Call a row kernel over all rows, on as many threads as torch is set to use.

    Args:
        kernel: compiled, with a team of its own (:func:`team_of`).
        elements: how many the rows have together; few are left to the caller.
        arguments: all of the kernel's but the last two.

    Raises:
        MemoryError: there was none for a row; which rows are done is then unknown.
    """
    wanted = min(1 + elements // SMALLEST, rows)
    # All of torch's threads or none: OpenMP ends those that a smaller team leaves over, and has to make them again.
    threads = torch.get_num_threads() if wanted > 1 else 1
    pieces = min(wanted, PIECES * threads) if threads > 1 else 1
    if RUNS_IN == "pool":
        _run_in_pool(kernel, rows, pieces, threads, arguments)
    elif _teams[kernel](rows, pieces, threads, *arguments):
        raise MemoryError(f"a thread had no memory for a row of {elements // max(rows, 1)} elements")


def _run_in_pool(kernel: Callable[..., None], rows: int, pieces: int, threads: int, arguments: tuple[Any, ...]) -> None:
    global _pool, _pool_size
    if threads <= 1:
        kernel(*arguments, 0, rows)
        return
    if _pool is None or _pool_size < threads:
        _pool = ThreadPoolExecutor(threads, thread_name_prefix="ghost")
        _pool_size = threads
    # One iterator for all: next() of a list's is one step of the interpreter.
    left = iter([(rows * p // pieces, rows * (p + 1) // pieces) for p in range(pieces)])

    def work() -> None:
        for start, stop in left:
            kernel(*arguments, start, stop)

    # A helper that has not begun when nothing is left is not waited for.
    helpers = [_pool.submit(work) for _ in range(min(threads, pieces) - 1)]
    try:
        work()
    finally:
        for helper in helpers:
            if not helper.cancel():
                helper.result()


def _forget_threads() -> None:
    """A forked process has none of its parent's threads, and OpenMP does not know it."""
    global _pool, RUNS_IN
    _pool, RUNS_IN = None, "pool"


os.register_at_fork(after_in_child=_forget_threads)

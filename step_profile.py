"""Where the time of a step goes: a trace for a browser, and one page of text.

torch's profiler sees torch's operators and nothing of the compiled kernels between them, whose time it would book on
whatever operator encloses them. For the length of a profile the kernels are therefore wrapped into named ranges; an
unprofiled step pays nothing for that.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch.profiler import ProfilerActivity, profile, record_function

import ghost_kernels
import sliced_softmax

KERNELS = {
    **dict.fromkeys(("dequantize", "cast_votes", "cast_whispers", "apply_votes", "flip_by_majority"), ghost_kernels),
    **dict.fromkeys(("observe", "turn_into_gradient"), sliced_softmax),
}
TRACE, BREAKDOWN = "trace.json", "breakdown.txt"
_PREFIX = "kernel "
_KINDS: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("matrix products", ("aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm", "aten::matmul", "aten::linear")),
    ("attention", ("attention",)),
    ("optimizer", ("Optimizer", "_fused_adam", "aten::lerp", "aten::addcdiv", "aten::addcmul")),
    ("copies and conversions", ("aten::copy_", "aten::clone", "aten::_to_copy", "aten::cat", "aten::contiguous")),
    ("sums (norms, softmax, the test for finite numbers)", ("aten::sum", "aten::mean", "aten::max", "softmax")),
)
_OTHER = "elementwise and everything else"
_LINES = 24


@contextlib.contextmanager
def named_kernels() -> Iterator[None]:
    """Within the block every call of a kernel is a range of its name in the profiler's trace."""

    def named(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def run(*arguments: Any, **options: Any) -> Any:
            with record_function(_PREFIX + name):
                return function(*arguments, **options)

        return run

    with contextlib.ExitStack() as stack:
        for name, module in KERNELS.items():
            stack.enter_context(mock.patch.object(module, name, named(name, getattr(module, name))))
        yield


def kind_of(operator: str) -> str:
    """What a profiler's operator is counted as."""
    if operator.startswith(_PREFIX):
        return operator
    return next((kind for kind, words in _KINDS if any(word in operator for word in words)), _OTHER)


def profile_step(step: Callable[[], Any], folder: Path, title: str, where: Mapping[str, Any]) -> str:
    """Run one step under the profiler; write ``trace.json`` (chrome://tracing, Perfetto) and ``breakdown.txt``.

    Args:
        step: run once; a first, unprofiled one is the caller's business.
        folder: created.
        where: the machine, for the page's head.

    Returns:
        The breakdown: shares of the step by kind of work, then the operators that took longest by themselves.
    """
    folder.mkdir(parents=True, exist_ok=True)
    activities = [ProfilerActivity.CPU]
    if torch.cuda.is_available():
        activities.append(ProfilerActivity.CUDA)
    with named_kernels(), profile(activities=activities) as seen:
        step()
    seen.export_chrome_trace(str(folder / TRACE))
    text = breakdown(seen.key_averages(), title, where)
    (folder / BREAKDOWN).write_text(text + "\n", encoding="utf-8")
    return text


def breakdown(averages: Any, title: str, where: Mapping[str, Any]) -> str:
    """One page on a profiler's averages; the time of an operator is its own, without that of what it calls."""
    own = [(a.key, a.self_cpu_time_total + getattr(a, "self_device_time_total", 0), a.count) for a in averages]
    total = sum(time for _, time, _ in own) or 1
    kinds: dict[str, float] = {}
    for key, time, _ in own:
        kinds[kind_of(key)] = kinds.get(kind_of(key), 0) + time
    lines = [title, ", ".join(f"{k} {v}" for k, v in where.items() if v is not None), ""]
    lines.append(f"{total / 1e6:.2f} s under the profiler, which slows small operators")
    lines.append("")
    for kind, time in sorted(kinds.items(), key=lambda item: -item[1]):
        lines.append(f"{time / total:7.1%}  {time / 1e3:10.1f} ms  {kind}")
    lines += ["", f"{'share':>7}  {'own time':>13}  {'calls':>6}  operator"]
    for key, time, count in sorted(own, key=lambda item: -item[1])[:_LINES]:
        lines.append(f"{time / total:7.1%}  {time / 1e3:10.1f} ms  {count:6}  {key}")
    return "\n".join(lines)

"""What the machine is and can do: device, architecture, memory. Nothing of models."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import logging
import os
import resource
import sys
from pathlib import Path

import torch

log = logging.getLogger("device")

GIB = 2**30


class DeviceError(RuntimeError):
    """A device that is not there, or that the installed torch has no code for."""


def has_native_bfloat16(device: str) -> bool:
    """Whether a device multiplies bfloat16 itself; torch also does where it has to emulate.

    A CPU that emulates is ten times slower than with float32, one with AVX-512 BF16 or AMX five times faster. Only
    Linux says which it is.
    """
    kind = torch.device(device).type
    if kind == "cuda":
        # torch's own question is about the card in use, which need not be this one.
        index = torch.device(device).index
        there = torch.cuda.is_available() and (index or 0) < torch.cuda.device_count()
        return there and torch.cuda.get_device_capability(index) >= (8, 0)
    return kind == "cpu" and not _BFLOAT16_FLAGS.isdisjoint(_cpu_flags())


_BFLOAT16_FLAGS = {"avx512_bf16", "amx_bf16"}


@functools.lru_cache(maxsize=1)
def _cpu_flags() -> frozenset[str]:
    """What /proc/cpuinfo lists for the first core; empty where there is none."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return frozenset()
    return frozenset(next((line.split(":", 1)[1].split() for line in lines if line.startswith("flags")), []))


_DRIVERS = (Path("/proc/driver/nvidia/version"), Path("/usr/lib/wsl/lib/libcuda.so.1"))
"""Files that are there where NVIDIA's driver is: Linux, and Windows' Linux."""
_CONTAINERS = (Path("/.dockerenv"), Path("/run/.containerenv"))
"""Files that are there in a container, which sees its host's driver even where it was given no card."""


def _has_hidden_card() -> bool:
    """Whether the machine has a card that this torch does not see, though nobody asked it not to."""
    masked = os.environ.get("CUDA_VISIBLE_DEVICES", "0").strip() in ("", "-1")
    given = Path("/dev/nvidiactl").exists() or not any(path.exists() for path in _CONTAINERS)
    driver = any(path.exists() for path in _DRIVERS)
    return driver and given and not masked and not torch.cuda.is_available()


def _other_torch(backend: str = "auto") -> str:
    """The command that puts another build of the same torch into this environment."""
    python, version = sys.executable, torch.__version__.split("+")[0]
    return (
        f"{python} -m pip install uv && {python} -m uv pip install --python {python} --reinstall-package torch "
        f"torch=={version} --torch-backend={backend}"
    )


def device_of(name: str) -> torch.device:
    """The device of that name, there or not.

    Raises:
        DeviceError: no CPU or CUDA device.
    """
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda"):
        raise DeviceError(f"device is {name!r}, expected cpu, cuda or cuda:N")
    return device


def check_device(device: str) -> None:
    """The device exists and the installed torch has code for it. Where the machine has a card that this torch does not
    see, the log says so.

    Raises:
        DeviceError: with the command that installs a torch that has.
    """
    kind = device_of(device).type
    hidden = _has_hidden_card()
    if kind != "cuda":
        if hidden:
            log.warning(
                "this machine has an NVIDIA driver, but torch %s sees no card: working on the CPU. A torch that fits "
                "the driver (cards before Turing: cu126 instead of auto): %s",
                *(torch.__version__, _other_torch()),
            )
        return
    if not torch.cuda.is_available():
        way = f"a torch that fits its driver: {_other_torch()}" if hidden else "try --device cpu"
        raise DeviceError(f"device is {device}, but torch {torch.__version__} sees no CUDA device: {way}")
    if (torch.device(device).index or 0) >= (count := torch.cuda.device_count()):
        raise DeviceError(f"device is {device}, but this machine has {count}: the first is cuda:0")
    major, minor = torch.cuda.get_device_capability(device)
    built = torch.cuda.get_arch_list()
    if not any(_runs_on(architecture, major, minor) for architecture in built):
        raise DeviceError(
            f"{torch.cuda.get_device_name(device)} has compute capability {major}.{minor}, torch {torch.__version__} "
            f"was built for {', '.join(built) or 'none'}. A build that has it: {_other_torch('cu126')}"
        )


def _runs_on(architecture: str, major: int, minor: int) -> bool:
    """Machine code runs on its own generation from its revision up, intermediate code on everything later."""
    kind, _, number = architecture.partition("_")
    digits = "".join(c for c in number if c.isdigit())
    if not digits:
        return False
    has = int(digits[:-1]), int(digits[-1])
    if kind == "compute":
        return has <= (major, minor)
    return has[0] == major and has[1] <= minor


def make_deterministic(device: str) -> None:
    """Ask torch for the same bits in every run, where a device would choose speed; to be called before its first
    use."""
    if torch.device(device).type == "cuda":
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        # Not as a mere warning: with that, torch's memory-efficient attention stays as it is.
        torch.use_deterministic_algorithms(True)
        # Else every new tensor is written once more, with NaN.
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]


KEPT_FREED = 1.5
"""How many times what it needs a process may take that keeps what it frees: 1.2 at 1.5 B weights, 1.4 at 0.1 B."""


def return_freed_memory(threshold: int = 1 << 20) -> bool:
    """Make glibc take blocks from ``threshold`` bytes up from the system and give each back when it is freed.

    Left alone it raises that size to 32 MB as it goes, keeps smaller blocks in a heap full of holes, and a training
    process on the CPU grows to a fifth or a third more than it uses. But every block that is new costs the system's
    pages: a step of 0.1 B weights takes a third longer, one of 1.5 B half as long again. To be called before the first
    large tensor.

    Returns:
        Whether the C library knows how (glibc does; others manage on their own).
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError, TypeError):
        return False
    mmap_threshold, trim_threshold = -3, -1
    return bool(mallopt(mmap_threshold, threshold)) and bool(mallopt(trim_threshold, threshold))


def trim_memory() -> None:
    """Have glibc give back what it keeps of freed memory now; nothing where the C library does not know how."""
    with contextlib.suppress(OSError, AttributeError, TypeError):
        ctypes.CDLL(None).malloc_trim(0)


def may_keep_freed_memory(need: int, available: int) -> bool:
    """Whether a process that needs so many bytes of the available ones has room to keep what it frees."""
    return KEPT_FREED * need <= available


def memory_total(device: str) -> int:
    """Bytes of the device, or of the machine (or its container's limit) for the CPU."""
    if torch.device(device).type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit = Path("/sys/fs/cgroup/memory.max")
    if limit.is_file() and (text := limit.read_text().strip()).isdigit():
        total = min(total, int(text))
    return total


def memory_available(device: str) -> int:
    """Bytes that a new allocation may take without pushing anything out: of the device, or of the machine for the CPU
    (by the kernel's own estimate, where there is one, and within a container's and the process's limits)."""
    if torch.device(device).type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    available = memory_total(device)
    table = Path("/proc/meminfo")
    if table.is_file():
        lines = dict(line.split(":", 1) for line in table.read_text().splitlines())
        available = min(available, int(lines["MemAvailable"].split()[0]) * 1024)
    limit, used = Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current")
    if used.is_file() and limit.is_file() and (text := limit.read_text().strip()).isdigit():
        # Cached files count as used, and make room where it is wanted.
        counts = used.with_name("memory.stat")
        found = dict(line.split() for line in counts.read_text().splitlines()) if counts.is_file() else {}
        taken = int(used.read_text()) - sum(int(found.get(f"{kind}_file", 0)) for kind in ("inactive", "active"))
        available = min(available, max(0, int(text) - taken))
    address_space, _ = resource.getrlimit(resource.RLIMIT_AS)
    size = Path("/proc/self/statm")
    if address_space != resource.RLIM_INFINITY and size.is_file():
        taken = int(size.read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
        available = min(available, max(0, address_space - taken))
    return available


def memory_peak(device: str) -> int:
    """Peak bytes on the device, or peak resident memory of the process on the CPU."""
    if torch.device(device).type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception says that memory ran out: the device's allocator, the CPU's, or Python's own."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    words = ("can't allocate memory", "out of memory", "bad_alloc", "CUBLAS_STATUS_ALLOC_FAILED")
    return isinstance(error, RuntimeError) and any(word in str(error) for word in words)

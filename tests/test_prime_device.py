"""What a machine can do: architectures, bfloat16, memory, and whether an error was one of memory."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

import prime_device as device

ROOT = Path(__file__).resolve().parent.parent


def pretend(monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], built: list[str]) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "NVIDIA GeForce GTX 1080 Ti")
    monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: built)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)


@pytest.mark.parametrize(
    ("capability", "built", "runs"),
    [
        ((6, 1), ["sm_50", "sm_60", "sm_70", "sm_90"], True),
        ((6, 1), ["sm_75", "sm_80", "sm_86", "sm_90", "sm_100", "compute_120"], False),
        ((8, 9), ["sm_80"], True),
        ((8, 0), ["sm_86"], False),
        ((12, 1), ["sm_80", "compute_90"], True),
        ((9, 0), ["sm_90a"], True),
        ((6, 1), [], False),
    ],
)
def test_a_card_that_this_torch_has_no_code_for_is_named_with_the_way_out(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], built: list[str], runs: bool
) -> None:
    pretend(monkeypatch, capability, built)
    if runs:
        device.check_device("cuda")
        return
    with pytest.raises(device.DeviceError, match=rf"GTX 1080 Ti has compute capability {capability[0]}\.") as error:
        device.check_device("cuda")
    version = torch.__version__.split("+")[0]
    assert f"--reinstall-package torch torch=={version} --torch-backend=cu126" in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["nonsense", "mps", "meta", "", "cuda:x", "cpu:-1"])
def test_what_is_no_cpu_or_cuda_device_is_refused_by_name(name: str) -> None:
    with pytest.raises(device.DeviceError, match=rf"device is {name!r}, expected cpu, cuda or cuda:N"):
        device.check_device(name)
    assert device.device_of("cuda:3") == torch.device("cuda", 3), "there or not"


def test_no_cuda_device_at_all(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    device.check_device("cpu")
    with pytest.raises(device.DeviceError, match="--device cpu"):
        device.check_device("cuda")


def test_a_card_that_torch_does_not_see_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A torch for another CUDA falls silent, and so would a run on the CPU that takes fifty times as long."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(device, "_CONTAINERS", ())
    monkeypatch.setattr(device, "_DRIVERS", (tmp_path / "version",))
    device.check_device("cpu")
    assert not caplog.text
    (tmp_path / "version").write_text("NVRM version")
    device.check_device("cpu")
    assert "sees no card" in caplog.text and "--torch-backend=auto" in caplog.text
    with pytest.raises(device.DeviceError, match="--torch-backend=auto"):
        device.check_device("cuda")
    caplog.clear()
    for masked in ("", "-1"):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", masked)
        device.check_device("cpu")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    if not Path("/dev/nvidiactl").exists():
        # A container sees its host's driver, and no card where it was given none.
        monkeypatch.setattr(device, "_CONTAINERS", (tmp_path,))
        device.check_device("cpu")
        monkeypatch.setattr(device, "_CONTAINERS", ())
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    device.check_device("cpu")
    assert not caplog.text


def test_bfloat16_only_where_it_is_native(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the card that is named, not of the one in use; a card or torch that is not there has none."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: [(9, 0), (6, 1), (8, 0)][index or 0])
    assert [device.has_native_bfloat16(f"cuda{x}") for x in ("", ":0", ":1", ":2", ":3")] == [1, 1, 0, 1, 0]
    with pytest.raises(device.DeviceError, match="cuda:3, but this machine has 3"):
        device.check_device("cuda:3")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert not device.has_native_bfloat16("cuda")
    for flags, native in (({"avx2"}, False), ({"avx512f", "avx512_bf16"}, True), ({"amx_bf16"}, True), (set(), False)):
        monkeypatch.setattr(device, "_cpu_flags", lambda flags=flags: frozenset(flags))
        assert device.has_native_bfloat16("cpu") is native


@pytest.mark.skipif(not Path("/proc/cpuinfo").exists(), reason="no /proc/cpuinfo here")
def test_the_processors_flags_are_those_of_this_machine() -> None:
    flags = device._cpu_flags()
    assert flags and all(f" {flag} " in f"{Path('/proc/cpuinfo').read_text()} ".replace("\n", " ") for flag in flags)


def test_what_counts_as_out_of_memory() -> None:
    with pytest.raises(RuntimeError) as error:
        torch.empty(1 << 60, dtype=torch.uint8)
    assert device.is_out_of_memory(error.value), "the CPU's allocator"
    for yes in (MemoryError(), torch.OutOfMemoryError("x"), RuntimeError("CUDA error: out of memory")):
        assert device.is_out_of_memory(yes)
    for no in (RuntimeError("shape mismatch"), ValueError("out of memory"), KeyError("bad_alloc")):
        assert not device.is_out_of_memory(no)


def test_memory_of_this_machine() -> None:
    assert device.memory_total("cpu") > 1 << 30
    assert 1 << 26 < device.memory_peak("cpu") < device.memory_total("cpu")


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_limit_of_the_process_is_what_is_available() -> None:
    code = (
        "import sys; sys.path.insert(0, {root!r}); import prime_device, resource\n"
        "taken = int(open('/proc/self/statm').read().split()[0]) * resource.getpagesize()\n"
        "resource.setrlimit(resource.RLIMIT_AS, (taken + (64 << 20), resource.RLIM_INFINITY))\n"
        "assert 32 << 20 < prime_device.memory_available('cpu') <= 64 << 20\n"
    )
    subprocess.run([sys.executable, "-c", code.format(root=str(ROOT))], check=True, timeout=120)


def test_freed_memory_is_kept_where_there_is_plenty() -> None:
    assert device.may_keep_freed_memory(2, 3) and not device.may_keep_freed_memory(1000, 1499)


RESIDENT = """
import sys; sys.path.insert(0, {root!r}); import prime_device, torch, os
page = os.sysconf('SC_PAGE_SIZE')
now = lambda: int(open('/proc/self/statm').read().split()[1]) * page
"""
"""Begins a process that asks for its own resident bytes."""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_freed_memory_goes_back() -> None:
    """Blocks of 8 MB with small ones between them: left alone they would stay in the heap."""
    code = RESIDENT + (
        "assert prime_device.return_freed_memory()\n"
        "torch.ones(1 << 23); torch.ones(1 << 22)\n"
        "before = now()\n"
        "kept = []\n"
        "for _ in range(40):\n"
        "    block = torch.ones(1 << 21); kept.append(torch.ones(300)); del block\n"
        "blocks = [torch.ones(1 << 21) for _ in range(40)]\n"
        "del blocks\n"
        "assert now() - before < 20e6, now() - before\n"
    )
    subprocess.run([sys.executable, "-c", code.format(root=str(ROOT))], check=True, timeout=120)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_what_was_kept_can_be_given_back() -> None:
    code = RESIDENT + (
        # A freed block of 32 MB has glibc keep what is smaller.
        "del [torch.ones(1 << 22), torch.ones(1 << 22)][:]\n"
        "blocks, small = [], []\n"
        "for _ in range(40):\n"
        "    blocks.append(torch.ones(1 << 20)); small.append(torch.ones(300))\n"
        "before = now()\n"
        "del blocks\n"
        "prime_device.trim_memory()\n"
        "assert before - now() > 120e6, before - now()\n"
    )
    subprocess.run([sys.executable, "-c", code.format(root=str(ROOT))], check=True, timeout=120)

"""CUDA C compiled while a program runs (NVRTC) and launched on torch's tensors and streams.

torch brings the compiler with every CUDA build, and it knows all cards that this build serves, Pascal (6.1) included;
Triton begins at 7.0 and wants a C compiler beside it. One source in a language of thirty years is then the fast path of
every card, with one set of bits to verify. Two small C interfaces do it, NVRTC's and the driver's, both stable since
2016; torch's own wrapper of them is private, has no 64-bit integers and no null pointers.

Rejected: compiled extensions (a toolkit and minutes of compiling on the user's machine).
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import importlib.util
from pathlib import Path

import torch

Argument = ctypes.c_void_p | ctypes.c_int | ctypes.c_uint | ctypes.c_longlong | ctypes.c_ulonglong | ctypes.c_float
"""What a kernel is given."""


class CudaCompilerError(RuntimeError):
    """No compiler, a source that it refuses, or a launch that the driver refuses."""


def _libraries(major: str) -> list[str]:
    """Where NVRTC may lie: on the loader's path, or in the packages that torch depends on."""
    names = [f"libnvrtc.so.{major}", f"nvrtc64_{major}0_0.dll", f"libnvrtc-{major}.so"]
    found = list(names)
    for package in ("nvidia.cuda_nvrtc", f"nvidia.cu{major}"):
        with contextlib.suppress(ModuleNotFoundError):
            spec = importlib.util.find_spec(package)
            for folder in (spec.submodule_search_locations or []) if spec else []:
                found += [str(p) for p in Path(folder).glob("lib/*nvrtc*") if p.name in names]
    return found


@functools.cache
def _nvrtc(major: str) -> ctypes.CDLL:
    for name in _libraries(major):
        with contextlib.suppress(OSError):
            return ctypes.CDLL(name)
    raise CudaCompilerError(
        f"no NVRTC of CUDA {major} found, which torch {torch.__version__} brings: reinstall torch, "
        f"or pip install nvidia-cuda-nvrtc-cu{major}"
    )


def compile_source(source: str, architecture: str, major: str) -> bytes:
    """Machine code of CUDA C.

    Args:
        architecture: as ``sm_61``.
        major: CUDA version of the compiler, as ``12``; 13 does not know Pascal and Volta any more.

    Raises:
        CudaCompilerError: with the compiler's own words.
    """
    nvrtc = _nvrtc(major)
    program = ctypes.c_void_p()
    code = source.encode()
    _ask(nvrtc, nvrtc.nvrtcCreateProgram(ctypes.byref(program), code, b"kernels.cu", 0, None, None))
    try:
        # No fused multiply-add: a float operation is rounded where the source says so, on every card and on the CPU.
        options = [f"--gpu-architecture={architecture}".encode(), b"--fmad=false", b"--std=c++14"]
        result = nvrtc.nvrtcCompileProgram(program, len(options), (ctypes.c_char_p * len(options))(*options))
        if result != 0:
            size = ctypes.c_size_t()
            nvrtc.nvrtcGetProgramLogSize(program, ctypes.byref(size))
            log = ctypes.create_string_buffer(size.value)
            nvrtc.nvrtcGetProgramLog(program, log)
            raise CudaCompilerError(f"NVRTC refuses the kernels for {architecture}:\n{log.value.decode().strip()}")
        size = ctypes.c_size_t()
        _ask(nvrtc, nvrtc.nvrtcGetCUBINSize(program, ctypes.byref(size)))
        binary = ctypes.create_string_buffer(size.value)
        _ask(nvrtc, nvrtc.nvrtcGetCUBIN(program, binary))
        return binary.raw
    finally:
        nvrtc.nvrtcDestroyProgram(ctypes.byref(program))


def architecture_for(generation: int, revision: int, major: str) -> str:
    """The newest architecture that the compiler of a CUDA version knows and that a card of a compute capability runs:
    machine code runs on its own generation from its revision up."""
    nvrtc = _nvrtc(major)
    count = ctypes.c_int()
    _ask(nvrtc, nvrtc.nvrtcGetNumSupportedArchs(ctypes.byref(count)))
    known = (ctypes.c_int * count.value)()
    _ask(nvrtc, nvrtc.nvrtcGetSupportedArchs(known))
    fitting = [a for a in known if a // 10 == generation and a % 10 <= revision]
    if not fitting:
        raise CudaCompilerError(
            f"the card has compute capability {generation}.{revision}, NVRTC of CUDA {major} knows "
            f"{', '.join(f'{a // 10}.{a % 10}' for a in known)}: install a torch for the card"
        )
    return f"sm_{max(fitting)}"


def _ask(nvrtc: ctypes.CDLL, result: int) -> None:
    if result != 0:
        nvrtc.nvrtcGetErrorString.restype = ctypes.c_char_p
        raise CudaCompilerError(f"NVRTC: {nvrtc.nvrtcGetErrorString(result).decode()}")


@functools.cache
def _driver() -> ctypes.CDLL:
    for name in ("libcuda.so.1", "nvcuda.dll"):
        with contextlib.suppress(OSError):
            return ctypes.CDLL(name)
    raise CudaCompilerError("no CUDA driver library found (libcuda.so.1): install NVIDIA's driver")


def _check(result: int, what: str) -> None:
    if result != 0:
        words = ctypes.c_char_p()
        _driver().cuGetErrorString(result, ctypes.byref(words))
        raise CudaCompilerError(f"{what}: {words.value.decode() if words.value else f'CUDA error {result}'}")


class Module:
    """The kernels of one source on one device; they run on torch's current stream of that device."""

    def __init__(self, source: str, device: torch.device) -> None:
        if torch.version.cuda is None:
            raise CudaCompilerError(f"torch {torch.__version__} has no CUDA: a build that has it compiles the kernels")
        self.device = device
        self._index = torch.cuda.current_device() if device.index is None else device.index
        properties = torch.cuda.get_device_properties(device)
        self.processors: int = properties.multi_processor_count
        cuda = torch.version.cuda.split(".")[0]
        binary = compile_source(source, architecture_for(properties.major, properties.minor, cuda), cuda)
        self._module = ctypes.c_void_p()
        self._functions: dict[str, ctypes.c_void_p] = {}
        with torch.cuda.device(device):
            # The driver's interface acts on the thread's present context: torch makes one at its first allocation.
            torch.empty(1, device=device)
            _check(_driver().cuModuleLoadData(ctypes.byref(self._module), binary), "loading kernels")

    def _function(self, name: str) -> ctypes.c_void_p:
        function = self._functions.get(name)
        if function is None:
            function = ctypes.c_void_p()
            found = _driver().cuModuleGetFunction(ctypes.byref(function), self._module, name.encode())
            _check(found, f"kernel {name}")
            self._functions[name] = function
        return function

    def launch(self, name: str, blocks: int, threads: int, *arguments: Argument) -> None:
        """Queue a kernel; nothing is waited for, and nothing is queued where there are no blocks.

        Args:
            arguments: C values in the kernel's order; a tensor's is ``c_void_p(tensor.data_ptr())``. Whoever launches
                keeps the tensors alive as torch does: until memory is reused on this stream.
        """
        if blocks == 0:
            return
        if torch.cuda.current_device() != self._index:
            # The driver launches in the present context: that of another card would not know the kernel.
            with torch.cuda.device(self._index):
                self.launch(name, blocks, threads, *arguments)
            return
        function = self._function(name)
        pointers = (ctypes.c_void_p * len(arguments))(*map(ctypes.addressof, arguments))
        stream = ctypes.c_void_p(torch.cuda.current_stream(self.device).cuda_stream)
        result = _driver().cuLaunchKernel(function, blocks, 1, 1, threads, 1, 1, 0, stream, pointers, None)
        if result != 0:
            _check(result, f"launching {name}")

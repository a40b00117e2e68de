"""The CUDA kernels' own source, compiled by a C++ compiler and run on the CPU: every test of a backend covers it too.

A block has one thread here, and blocks come one after the other: all arithmetic is tested, bit for bit, and every
address; what threads do side by side (adding up, not meeting) only a card can show: ``test_cuda.py``.
"""

from __future__ import annotations

import ctypes
import shutil
import subprocess
import tempfile
from pathlib import Path

import ghost_kernels
import ghost_kernels_cuda
from cuda_compiler import Argument

BEFORE = """
#include <cmath>
#include <cstring>
using std::fabs;
struct Place { unsigned int x; };
static Place blockIdx, gridDim;
static const Place threadIdx = {0}, blockDim = {1};
extern "C" void set_place(unsigned int block, unsigned int blocks) { blockIdx.x = block; gridDim.x = blocks; }
#define __device__
#define __global__
#define __shared__
#define __forceinline__ inline
#define __syncthreads()
static inline float __uint_as_float(unsigned int x) { float y; std::memcpy(&y, &x, 4); return y; }
static inline unsigned int __float_as_uint(float x) { unsigned int y; std::memcpy(&y, &x, 4); return y; }
template <typename T> static inline T __shfl_down_sync(unsigned int, T, unsigned int) { return 0; }
template <typename T> static inline T __ldg(const T *place) { return *place; }
static inline float __fmul_rn(float x, float y) { return x * y; }
static inline int __float2int_rn(float x) { return (int)std::nearbyintf(x); }
static inline void atomicAdd(unsigned long long *place, unsigned long long x) { *place += x; }
"""
WRONG = 1 << 30
"""Blocks or threads that no launch has."""


class CpuModule:
    """What ``cuda_compiler.Module`` is, on the CPU."""

    processors = 2

    def __init__(self, library: ctypes.CDLL) -> None:
        self.library = library

    def launch(self, name: str, blocks: int, threads: int, *arguments: Argument) -> None:
        """Run all blocks."""
        assert 0 <= blocks < WRONG and 0 < threads <= 1024 and threads % 32 == 0
        kernel = getattr(self.library, name)
        kernel.restype = None
        for block in range(blocks):
            self.library.set_place(block, blocks)
            kernel(*arguments)


def compile_for_cpu() -> CpuModule | None:
    """The kernels, or None where there is no C++ compiler."""
    compiler = shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        return None
    with tempfile.TemporaryDirectory() as folder:
        source, library = Path(folder, "kernels.cpp"), Path(folder, "kernels.so")
        source.write_text(BEFORE + ghost_kernels_cuda.SOURCE.read_text(encoding="utf-8"), encoding="utf-8")
        options = [
            "-std=c++14",
            "-O1",
            "-ffp-contract=off",
            "-fwrapv",
            "-fno-strict-aliasing",
            "-shared",
            "-fPIC",
            "-w",
        ]
        subprocess.run([compiler, *options, str(source), "-o", str(library)], check=True)
        return CpuModule(ctypes.CDLL(str(library)))


def install() -> str:
    """Let the backend ``cuda`` serve the CPU as well, for this process; says what was done."""
    module = compile_for_cpu()
    if module is None:
        ghost_kernels.BACKENDS = ("numba", "torch")
        return "CUDA kernels: not tested, there is no C++ compiler"
    on_card = ghost_kernels_cuda.module_of
    ghost_kernels_cuda.module_of = lambda device: module if device.type == "cpu" else on_card(device)  # type: ignore
    ghost_kernels.SERVES["cuda"] = ("cuda", "cpu")
    return "CUDA kernels: compiled for the CPU"

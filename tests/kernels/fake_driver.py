"""Triton's whole launch path without a GPU: a driver that compiles for a named chip and notes what would be launched.

Run as a program by test_launch.py, because its own process runs under the interpreter, which has no launcher. Prints
"same" when launches by the short path reach the chip's launcher as those by Triton's own do.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase
from triton.runtime.driver import driver
from triton.tools.tensor_descriptor import TensorDescriptor

import jmlr_kernels.launch as ours
from jmlr_kernels.maxsim.triton_forward import maxsim_kept_kernel, maxsim_norms_kernel
from jmlr_kernels.shifted_attention.triton_common import descriptor
from jmlr_kernels.shifted_attention.triton_forward_tma import forward_tma_kernel

launched: list[tuple[Any, ...]] = []


class Launcher:
    def __init__(self, source: Any, metadata: Any) -> None:
        self.source = source

    def __call__(self, *arguments: Any) -> None:
        launched.append((self.source, *arguments))


class Utils:
    def get_device_properties(self, device: int) -> dict[str, int]:
        return {"max_shared_mem": 227 * 1024}

    def load_binary(self, name: str, kernel: bytes, shared: int, device: int) -> tuple[Any, ...]:
        return object(), name, 32, 0, 1024


class FakeDriver(DriverBase):
    """An sm_90 with one stream, 7, on device 0."""

    launcher_cls = Launcher
    utils = Utils()

    def __init__(self) -> None:
        pass

    @classmethod
    def is_active(cls) -> bool:
        return True

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 7

    def map_python_to_cpp_type(self, ty: str) -> str:
        return ty

    def get_benchmarker(self) -> Callable[..., Any]:
        raise NotImplementedError


def main() -> None:
    driver.set_active(FakeDriver())
    runs: list[tuple[Any, tuple[Any, ...], tuple[Any, ...]]] = []
    for length in (17, 1, 16):  # a plain integer: one kernel for all three
        mask = torch.ones(3, length, dtype=torch.uint8)
        runs.append((maxsim_kept_kernel, (mask, None, torch.empty(3 * length), torch.empty(3), length), (512,)))
    for stride in (32, 33, 1):  # a specialised one: divisible by 16, not, and a constant
        tokens, scales = torch.zeros(100), torch.empty(2)
        runs.append((maxsim_norms_kernel, (tokens, scales, 2, 1, stride, stride), (16, 16, 16)))
    misaligned = torch.zeros(100)[1:]
    runs.append((maxsim_norms_kernel, (misaligned, torch.empty(2), 2, 1, 32, 32), (16, 16, 16)))
    out, lse = torch.empty(1, 64, 1, 16, dtype=torch.bfloat16), torch.empty(1, 1, 64)
    for dtype in (torch.bfloat16, torch.float16):  # of the descriptors alone; every count that can be 1 is
        queries, keys = (descriptor(torch.zeros(1, 64, 1, 16, dtype=dtype), rows, 16) for rows in (64, 32))
        integers = (64, 0, 1, 1, 1, 64, 1)
        arguments = (queries, keys, keys, out, lse, None, None, *integers, 0.25)
        runs.append((forward_tma_kernel, arguments, (16, 16, 64, 32, False, False, "tf32")))
    for kernel, arguments, constants in runs:
        launched.clear()
        options = (4, 1, 255)
        ours._start(kernel, 5, arguments, constants, options)
        ours._start_remembered(kernel, 5, arguments, constants, options, 0)
        ours._start_remembered(kernel, 5, arguments, constants, options, 0)
        assert len(launched) == 3
        for other in launched[1:]:
            assert len(other) == len(launched[0]), (launched[0], other)
            for one, two in zip(launched[0], other, strict=True):
                if isinstance(one, (torch.Tensor, TensorDescriptor)):
                    assert one is two
                else:  # what a profiler's hook is told compares by its contents
                    assert type(one) is type(two) and getattr(one, "data", one) == getattr(two, "data", two)
        assert all(entry[1:5] == (5, 1, 1, 7) for entry in launched)
    assert len(ours._compiled) == 1 + 4 + 2, f"{len(ours._compiled)} kernels are remembered, expected 7"
    assert all(isinstance(kernel, triton.compiler.CompiledKernel) for kernel in ours._compiled.values())
    print("same")


if __name__ == "__main__":
    main()

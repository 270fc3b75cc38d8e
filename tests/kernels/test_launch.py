"""The short launch path: nothing that Triton compiles into a kernel may change behind a remembered one."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import jmlr_kernels.launch as launching

pytest.importorskip("triton.backends.nvidia")
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import CUDABackend
from triton.runtime.jit import JITFunction, create_function_from_signature
from triton.tools.tensor_descriptor import TensorDescriptor

INTEGERS = (0, 1, 2, 15, 16, 17, 32, 2**31 - 1, 2**31, 2**31 + 16, 2**32, 2**63 - 1)
DTYPES = (
    torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.float8_e4m3fn,
    torch.uint8, torch.uint16, torch.int32, torch.int64, torch.bool,
)  # fmt: skip


def every_value() -> list[Any]:
    """Whatever a launch may be given: each dtype at each distance from a 16-byte boundary, integers, floats, None."""
    values: list[Any] = [None, True, False, 0.0, 1.0, 16.0, 0.5, 2.0**40]
    values += [sign * value for value in INTEGERS for sign in (1, -1)] + [-(2**31) - 1, -(2**63)]
    for dtype in DTYPES:
        storage = torch.empty(48, dtype=torch.uint8)
        first = -storage.data_ptr() % 16
        for shift in range(0, 16, dtype.itemsize):
            values.append(storage[first + shift : first + shift + 8].view(dtype))
    return values


def plain_or_not(plain, other, BLOCK):  # type: ignore[no-untyped-def]
    """A kernel's signature: one parameter that is not specialised on, one that is."""


def test_equal_keys_mean_equal_kernels() -> None:
    """Of any two arguments that the short path does not tell apart, Triton's own binder thinks the same."""
    kernel = JITFunction(plain_or_not, do_not_specialize=["plain", "of another kernel"])
    binder = create_function_from_signature(kernel.signature, kernel.params, CUDABackend(GPUTarget("cuda", 90, 32)))
    values = every_value()
    for position in range(2):
        seen: dict[Any, tuple[Any, Any]] = {}
        for value in values:
            arguments = [17, 17]
            arguments[position] = value
            facts = launching._specialization(kernel, tuple(arguments))
            _, specialization, _ = binder(*arguments, 64)
            other, expected = seen.setdefault(facts, (value, specialization))
            assert specialization == expected, f"{value!r} and {other!r} share a key at position {position}"
        assert len(seen) < len(values) / 2, "the key tells more apart than it needs to"


class FakeKernel:
    """Stands for a `@triton.jit` function and for what it compiles to."""

    arg_names = ("tensor", "count", "stride", "BLOCK")
    do_not_specialize = ("count",)

    def __init__(self) -> None:
        self.compiled: list[tuple[Any, ...]] = []
        self.launched: list[tuple[Any, ...]] = []
        self.refuse = False

    def __getitem__(self, grid: tuple[int]) -> Any:
        def start(*arguments: Any, **options: Any) -> Any:
            self.compiled.append((grid, arguments, options))
            return None if self.refuse else self.Compiled(self)

        return start

    class Compiled:
        def __init__(self, kernel: FakeKernel) -> None:
            self.kernel = kernel

        def __getitem__(self, grid: tuple[int, int, int]) -> Any:
            return lambda *arguments: self.kernel.launched.append((grid, arguments))


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch) -> FakeKernel:
    monkeypatch.setattr(launching, "_compiled", {})
    monkeypatch.setattr(launching, "_plain", {})
    return FakeKernel()


def test_a_launch_is_remembered_under_what_it_was_compiled_for(kernel: FakeKernel) -> None:
    storage = torch.zeros(64)
    aligned = storage[-(storage.data_ptr() // 4) % 4 :]
    rows = aligned[:32].view(4, 8)
    launches = [  # the tensor, the count, the stride, constants, options, device
        (aligned, 5, 32, (64,), (4, 1, 255), 0),
        (aligned[1:], 5, 32, (64,), (4, 1, 255), 0),
        (aligned.int(), 5, 32, (64,), (4, 1, 255), 0),
        (aligned, 2**31, 32, (64,), (4, 1, 255), 0),
        (aligned, 5, 33, (64,), (4, 1, 255), 0),
        (aligned, 5, 1, (64,), (4, 1, 255), 0),
        (aligned, 5, 2**32, (64,), (4, 1, 255), 0),
        (aligned, 5, 32, (128,), (4, 1, 255), 0),
        (aligned, 5, 32, (64,), (8, 1, 255), 0),
        (aligned, 5, 32, (64,), (4, 1, 255), 1),
        (None, 5, 32, (64,), (4, 1, 255), 0),
        *(
            (TensorDescriptor.from_tensor(rows, block), 5, 32, (64,), (4, 1, 255), 0)
            for rows, block in ((rows, [2, 8]), (rows, [4, 8]), (rows.int(), [2, 8]))
        ),
    ]
    for tensor, count, stride, constants, options, device in launches:
        launching._start_remembered(kernel, 3, (tensor, count, stride), constants, options, device)
    assert len(kernel.compiled) == len(launches) and not kernel.launched
    # Again, with other values that mean the same kernel.
    other = torch.zeros(64)
    other = other[-(other.data_ptr() // 4) % 4 :]
    launching._start_remembered(kernel, 7, (other, 1, 48), (64,), (4, 1, 255), 0)
    assert len(kernel.compiled) == len(launches)
    ((grid, arguments),) = kernel.launched
    assert grid == (7, 1, 1) and arguments[0] is other and arguments[1:] == (1, 48, 64)


def test_a_launch_that_a_hook_suppressed_is_not_remembered(kernel: FakeKernel) -> None:
    kernel.refuse = True
    arguments = (torch.zeros(4), 5, 32)
    launching._start_remembered(kernel, 3, arguments, (64,), (4, 1, 255), 0)
    kernel.refuse = False
    launching._start_remembered(kernel, 3, arguments, (64,), (4, 1, 255), 0)
    assert len(kernel.compiled) == 2 and not kernel.launched
    launching._start_remembered(kernel, 3, arguments, (64,), (4, 1, 255), 0)
    assert len(kernel.compiled) == 2 and len(kernel.launched) == 1


def test_nothing_is_started_for_no_programs(kernel: FakeKernel) -> None:
    launching.launch(kernel, 0, (torch.zeros(4), 5, 32), (64,), (4, 1, 255))
    assert not kernel.compiled and not kernel.launched


def test_the_short_path_reaches_the_chip_as_triton_does() -> None:
    """Triton's own compiler and launch code on a driver that notes what would be launched."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    folder = Path(__file__).parent
    run = subprocess.run(
        [sys.executable, str(folder / "fake_driver.py")],
        cwd=folder.parents[1],
        env={**environment, "PYTHONPATH": str(folder.parents[1])},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert run.returncode == 0 and run.stdout.strip() == "same", run.stderr

"""The compiled library (csrc/, docs/native.md): loads it once, and says what is in it and where it can run.

Two environment variables are read when the package is imported: ``JMLR_LIBRARY``, the path of another ``_C.so`` than
the one beside this file, and ``JMLR_NATIVE=0``, which leaves it alone. A third, ``JMLR_CUDA_KERNELS``, is the library's
own: ``sm80`` keeps a GPU of compute capability 9.0 from the kernels that are written for it alone (docs/hopper.md).
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch

NAMESPACE = "jmlr_native"
OLDEST_TORCH = (2, 10)
DTYPES = (torch.float16, torch.bfloat16, torch.float32)
# The least that tile sizes are chosen for (SharedMemory of csrc/tiles/platform.h): compute capability 8.6.
SHARED_MEMORY = 99 * 1024


@dataclass(frozen=True)
class Library:
    """What was loaded. `problem` says in words why nothing was; `chosen` that it was left out on purpose.

    `cuda_problem` says why a loaded library has no CUDA part; else `cuda_version` is its toolkit's and `cuda_targets`
    what it was compiled for: machine code ("80", "90a") and PTX ("80+PTX"), which the driver compiles for newer chips.
    """

    problem: str | None = None
    chosen: bool = False
    cuda_problem: str | None = None
    cuda_version: str = ""
    cuda_targets: tuple[str, ...] = ()


@cache
def loaded() -> Library:
    """Load the library, the first time."""
    if os.environ.get("JMLR_NATIVE") == "0":
        return Library("JMLR_NATIVE=0 is set", chosen=True)
    path = Path(os.environ.get("JMLR_LIBRARY") or Path(__file__).with_name("_C.so"))
    record = _record(path.with_name("_build.json"))
    if not path.is_file():
        built = record.get("problem") or "the source tree holds no build of it; run `python csrc/build_library.py`"
        return Library(f"{path} does not exist" if os.environ.get("JMLR_LIBRARY") else built, "JMLR_NATIVE=0" in built)
    if tuple(int(part) for part in re.findall(r"\d+", torch.__version__)[:2]) < OLDEST_TORCH:
        return Library(f"it needs torch 2.10 or newer, and this is torch {torch.__version__}")
    try:
        torch.ops.load_library(str(path))
        built_in = json.loads(torch.ops.jmlr_native.build_info())
    except Exception as error:  # whatever the loader or torch says about a file that does not fit
        return Library(f"{path.name} cannot be loaded ({type(error).__name__}: {error})")
    if not built_in["cuda"]:
        return Library(cuda_problem=record.get("cuda_problem") or "it was built without CUDA")
    return Library(cuda_version=built_in["cuda"], cuda_targets=tuple(built_in["cuda_targets"].split(";")))


def _record(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):
        return {}


@cache
def has(operation: str, device_type: str) -> bool:
    """Whether the library has the operation for "cpu" or "cuda" tensors."""
    return _registered(operation, device_type.upper())


@cache
def _registered(operation: str, key: str) -> bool:
    if loaded().problem:
        return False
    return torch._C._dispatch_has_kernel_for_dispatch_key(f"{NAMESPACE}::{operation}", key)


def function(operation: str) -> Callable[..., Any]:
    """The operation itself; takes what `jmlr_kernels`' operation of this name takes, less the backend."""
    return getattr(getattr(torch.ops, NAMESPACE), operation).default


def register_fake(operation: str, fake: Callable[..., Any]) -> None:
    """Shapes and dtypes of the operation's results, for meta tensors and torch.compile."""
    if loaded().problem is None:
        torch.library.register_fake(f"{NAMESPACE}::{operation}", fake)


def why_not(operations: tuple[str, ...], backend: str, device: torch.device, dtype: torch.dtype) -> str | None:
    """Why `backend` ("cpu" or "cuda") cannot run these operations on such tensors, or None when it can."""
    found = loaded()
    if found.problem:
        return f"the native library is not there: {found.problem}"
    if backend == "cuda" and found.cuda_problem:
        return f"the native library has no CUDA part: {found.cuda_problem}"
    lacking = [name for name in operations if not has(name, backend)]
    if lacking:
        return f"the native library has no {backend} kernel of {lacking[0]}"
    if dtype not in DTYPES:
        return f"the native {backend} kernels take float16, bfloat16 and float32, not {dtype}; use backend='torch'"
    if device.type != backend:
        return f"the native {backend} kernels run on {backend} tensors, and these are on {device.type!r}"
    return _gpu_problem(found, device) if backend == "cuda" else None


def _gpu_problem(found: Library, device: torch.device) -> str | None:
    if torch.version.cuda is None:
        return f"this torch ({torch.__version__}) is not built for NVIDIA GPUs"
    driver = torch._C._cuda_getDriverVersion()  # type: ignore[attr-defined]  # builds with CUDA have it
    if driver // 1000 < int(found.cuda_version.split(".")[0]):
        return (
            f"the native library is built with CUDA {found.cuda_version}, and the driver supports CUDA"
            f" {driver // 1000}.{driver % 1000 // 10}; update the driver, or build with an older toolkit"
        )
    shared = shared_memory(device)
    if shared < SHARED_MEMORY:
        return (
            f"the native CUDA kernels need {SHARED_MEMORY // 1024} KB of shared memory a block, as GPUs of compute"
            f" capability 8.0 and later have, and this GPU has {shared // 1024}; use backend='triton'"
        )
    capability = torch.cuda.get_device_capability(device)
    if not any(runs_on(target, capability) for target in found.cuda_targets):
        return (
            f"the native library is compiled for {', '.join(found.cuda_targets)}, and this GPU is"
            f" sm_{capability[0]}{capability[1]}; build it with JMLR_CUDA_ARCHS={capability[0]}{capability[1]}"
        )
    return None


def has_hopper_kernels(device: torch.device) -> bool:
    """Whether a GPU is one that the library has kernels of its own for (csrc/*/sm90*): compute capability 9.0."""
    if device.type != "cuda" or not _registered("cuda_kernels", "CompositeExplicitAutograd"):
        return False
    return "90a" in loaded().cuda_targets and torch.cuda.get_device_capability(device) == (9, 0)


@contextmanager
def cuda_kernels(choice: str) -> Iterator[None]:
    """Within it, the library's CUDA kernels are those of a kind: "auto", "sm80" (those for compute capability 8.0 and
    later), or "sm90", an error where they cannot run. For the whole process; for tests and timings.

    Raises:
        RuntimeError: there is no such kind, or the library has no CUDA part.
    """
    if not _registered("cuda_kernels", "CompositeExplicitAutograd"):
        raise RuntimeError("the native library has no CUDA part, so there is nothing to choose among")
    before = function("cuda_kernels")(choice)
    try:
        yield
    finally:
        function("cuda_kernels")(before)


def shared_memory(device: torch.device) -> int:
    """Bytes of shared memory that a block may ask for on a GPU, by which the library chooses tile sizes."""
    properties: Any = torch.cuda.get_device_properties(device)
    return int(properties.shared_memory_per_block_optin)


def runs_on(target: str, capability: tuple[int, int]) -> bool:
    """Whether what was compiled for `target` runs on a GPU: PTX on that chip and all newer ones, machine code on that
    chip and newer ones of its generation, and code with a suffix ("90a") on exactly that chip."""
    number, suffix = re.fullmatch(r"(\d+)(.*)", target).groups()  # type: ignore[union-attr]
    wanted = (int(number[:-1]), int(number[-1]))
    if suffix == "+PTX":
        return capability >= wanted
    if suffix == "a":
        return capability == wanted
    return capability[0] == wanted[0] and capability >= wanted

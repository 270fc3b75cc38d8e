"""Registers, stack and shared memory of every compiled CUDA kernel, read out of the library; any stack is a failure.

    python -m tools.resources [jmlr_kernels/_C.so | wheel | object file] [--out table.json]

A kernel with a stack frame spills registers or indexes an array by a number that the compiler does not know: both go
to memory, at a price that no timing on another machine shows. Names say for which class of devices a kernel's tiles
are chosen (SharedMemory of csrc/tiles/platform.h). The last line is the verdict; exit code 1 when a kernel has a stack,
2 when there is nothing to read.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path

DEFAULT = Path(__file__).resolve().parents[1] / "jmlr_kernels" / "_C.so"
_ARCHITECTURE = re.compile(r"^arch = (sm_\w+)", re.MULTILINE)
_FUNCTION = re.compile(r"Function (\S+):\s*\n\s*REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)")
# tiles::kernel_entry<kernel, bytes>: the second is the shared memory that the kernel is launched with.
_ENTRY = re.compile(r"^void tiles::kernel_entry<(.*), (\d+)>\(.*\)$")
_CLASS = re.compile(r"\(tiles::SharedMemory\)(\d)")
_CLASSES = ("small", "large")  # as csrc/tiles/platform.h declares them


@dataclass(frozen=True)
class Kernel:
    """What one kernel needs: 32-bit registers of a thread, bytes of stack, of static and of dynamic shared memory.

    From sm_90 on the static ones hold the kilobyte that the system takes of each block, which no limit counts.
    """

    architecture: str
    name: str
    registers: int
    stack: int
    shared: int
    dynamic: int = 0


def _demangle(names: list[str]) -> list[str]:
    if shutil.which("c++filt") is None:
        return names
    run = subprocess.run(["c++filt"], input="\n".join(names), capture_output=True, text=True, check=True)
    return run.stdout.splitlines()


def _named(kernel: Kernel, name: str) -> Kernel:
    """The kernel under its demangled name, less what says nothing that the reader does not know."""
    entry = _ENTRY.match(name)
    if entry is None:
        return replace(kernel, name=name)
    short = _CLASS.sub(lambda number: _CLASSES[int(number[1])], entry[1])
    return replace(kernel, name=short, dynamic=int(entry[2]))


def parse(listing: str) -> list[Kernel]:
    """Kernels out of what ``cuobjdump -res-usage`` prints."""
    kernels = []
    pieces = _ARCHITECTURE.split(listing)
    for architecture, text in zip(pieces[1::2], pieces[2::2], strict=True):
        for name, registers, stack, shared, local in _FUNCTION.findall(text):
            kernels.append(Kernel(architecture, name, int(registers), int(stack) + int(local), int(shared)))
    names = _demangle([kernel.name for kernel in kernels])
    return [_named(kernel, name) for kernel, name in zip(kernels, names, strict=True)]


def read(path: Path) -> list[Kernel]:
    """The kernels in a library, an object file or a wheel.

    Raises:
        RuntimeError: the file cannot be read, or the tool that Triton carries is missing.
    """
    from triton import knobs

    with tempfile.TemporaryDirectory() as scratch:
        if path.suffix == ".whl":
            with zipfile.ZipFile(path) as wheel:
                inside = [name for name in wheel.namelist() if name.endswith("_C.so")]
                if not inside:
                    raise RuntimeError(f"{path.name} holds no compiled library")
                path = Path(wheel.extract(inside[0], scratch))
        try:
            run = subprocess.run(
                [knobs.nvidia.cuobjdump.path, "-res-usage", str(path)], capture_output=True, text=True, check=True
            )
        except (OSError, subprocess.CalledProcessError) as error:
            said = getattr(error, "stderr", "") or error
            raise RuntimeError(f"cuobjdump cannot read {path}: {said}") from error
    return parse(run.stdout)


def rows(kernels: list[Kernel]) -> Iterator[str]:
    yield f"{'arch':<8}{'registers':>9}{'stack':>7}{'static':>8}{'dynamic':>9}  kernel"
    for kernel in sorted(kernels, key=lambda kernel: (kernel.name, kernel.architecture)):
        numbers = f"{kernel.registers:>9}{kernel.stack:>7}{kernel.shared:>8}{kernel.dynamic:>9}"
        yield f"{kernel.architecture:<8}{numbers}  {kernel.name}"


def main(arguments: list[str] | None = None) -> int:
    """Print the table; 0: no kernel has a stack, 1: one has, 2: nothing to read."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("file", type=Path, nargs="?", default=DEFAULT, help="library, object file or wheel")
    parser.add_argument("--out", type=Path, help="also write the table as JSON")
    options = parser.parse_args(arguments)
    try:
        kernels = read(options.file)
    except RuntimeError as error:
        print(f"tools.resources: {error}", file=sys.stderr)
        return 2
    if not kernels:
        print(f"tools.resources: {options.file} holds no CUDA kernel; build it where nvcc is found", file=sys.stderr)
        return 2
    print("\n".join(rows(kernels)))
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps([asdict(kernel) for kernel in kernels], indent=1) + "\n", encoding="utf-8")
    spilled = [kernel for kernel in kernels if kernel.stack]
    architectures = ", ".join(sorted({kernel.architecture for kernel in kernels}))
    print(f"{len(kernels)} kernels ({architectures}), {len(spilled)} with a stack")
    return 1 if spilled else 0


if __name__ == "__main__":
    sys.exit(main())

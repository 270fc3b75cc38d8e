"""Compiles the kernels of csrc/ for the CPU: one shared object, rebuilt where a source is newer."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from types import ModuleType

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
NAME = "jmlr_host_build"
FLAGS = ("-std=c++17", "-O2", "-g1", "-fPIC", "-fvisibility=hidden", "-DJMLR_HOST_BUILD", "-Wall", "-Wextra", "-Werror")
# Enough to tell a fault apart from a tolerance, and no more: contraction would hide what a GPU's separate steps round.
FLAGS += ("-ffp-contract=off", "-Wno-unknown-pragmas")


def sources() -> list[Path]:
    return sorted(HERE.glob("*.cpp"))


def build(
    directory: Path,
    sanitize: bool = False,
    here: Path = HERE,
    chosen: list[Path] | None = None,
    extra: tuple[str, ...] = (),
) -> Path:
    """The module's path in `directory`; raises RuntimeError with the compiler's words where it does not compile.

    `here` is this folder or a copy of it, `chosen` the sources where not all are built, `extra` flags that come last.
    """
    import pybind11

    directory.mkdir(parents=True, exist_ok=True)
    flags = [*FLAGS, f"-I{here}", f"-I{pybind11.get_include()}", f"-I{sysconfig.get_paths()['include']}"]
    if sanitize:
        # Faults are the same at -O1, which compiles in half of the time.
        flags += ["-O1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-fno-omit-frame-pointer"]
    flags += extra
    compiler = os.environ.get("CXX", "g++")
    target = directory / f"{NAME}{sysconfig.get_config_var('EXT_SUFFIX')}"
    objects = []
    ninja = ["ninja_required_version = 1.5", f"flags = {' '.join(flags)}", "rule compile"]
    ninja += [f"  command = {compiler} -MD -MF $out.d $flags -c $in -o $out", "  depfile = $out.d", "  deps = gcc"]
    ninja += ["rule link", f"  command = {compiler} -shared $flags $in -o $out"]
    for source in sources() if chosen is None else chosen:
        objects.append(f"{source.stem}.o")
        ninja.append(f"build {source.stem}.o: compile {source}")
    ninja.append(f"build {target.name}: link {' '.join(objects)}")
    (directory / "build.ninja").write_text("\n".join(ninja) + "\n", encoding="utf-8")
    beside = Path(sys.executable).with_name("ninja")
    command = str(beside) if beside.is_file() else shutil.which("ninja") or "ninja"
    done = subprocess.run([command, "-C", str(directory), target.name], capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"the host build of csrc/ does not compile:\n{(done.stdout + done.stderr)[-8000:]}")
    return target


@cache
def load() -> ModuleType:
    """The module, built into `.host_build/` at the root of the repository.

    JMLR_HOST_BUILD_SANITIZE=1 takes the one with AddressSanitizer and UBSan, which a process can load only where their
    libraries were loaded before (test_sanitized.py).
    """
    sanitize = os.environ.get("JMLR_HOST_BUILD_SANITIZE") == "1"
    path = build(ROOT / ".host_build" / ("sanitized" if sanitize else "plain"), sanitize)
    spec = importlib.util.spec_from_file_location(NAME, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@contextmanager
def device(module: ModuleType, number: int = 0, kilobytes: int = 163) -> Iterator[ModuleType]:
    """Within it, kernels run on a GPU of this number, whose blocks may have so much shared memory."""
    module.set_device(number, kilobytes * 1024)
    try:
        yield module
    finally:
        module.set_device()

"""Compiles csrc/ into one shared library, without importing torch: what setup.py runs.

``python csrc/build_library.py`` builds ``jmlr_kernels/_C.so`` in the source tree, for work on the kernels. A file's
name says how it is compiled:

* ``*.cpp``: g++. ``*_avx2.cpp``, ``*_avx512.cpp`` and ``*_avx512bf16.cpp`` with those instructions, on x86-64 only.
* ``*_cuda.cpp``: g++, in builds with CUDA only. ``*.cu``: nvcc. ``sm90*.cu`` for sm_90a alone, whose instructions no
  newer chip has; builds without that architecture leave them out, and ``JMLR_SM90`` is not defined.

Switches, all environment variables: ``JMLR_NATIVE`` (0: no library; 1: an error where it cannot be built),
``JMLR_CUDA_ARCHS`` ("80;90a"; "none": no CUDA part), ``JMLR_TORCH`` (folder of another torch package), ``MAX_JOBS``.
"""

from __future__ import annotations

import json
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

SOURCES = Path(__file__).resolve().parent
OLDEST_TORCH = (2, 10)
DEFAULT_ARCHS = "80;90a"
PTX_ARCH = 80  # runs, compiled by the driver, on every newer chip
HOPPER_ARCH = "90a"
NAMESPACE = "jmlr_native"
GIGABYTES_PER_JOB = 2

_AVX512 = "-mavx512f -mavx512bw -mavx512vl -mavx512dq -mfma -mf16c"
_INSTRUCTIONS = {"_avx2": "-mavx2 -mfma -mf16c", "_avx512": _AVX512, "_avx512bf16": f"{_AVX512} -mavx512bf16"}


@dataclass
class Plan:
    """What will be built, decided before anything is compiled.

    `problem` says in words why there is no library at all, `cuda_problem` why it has no CUDA part.
    """

    problem: str | None = None
    cuda_problem: str | None = None
    torch: Path = Path()
    torch_version: str = ""
    compiler: str = ""
    nvcc: str = ""  # empty: no CUDA part
    cuda_version: str = ""
    archs: list[str] = field(default_factory=list)

    def record(self) -> dict[str, object]:
        """What ``jmlr_kernels/_build.json`` holds."""
        return {
            "problem": self.problem,
            "cuda_problem": self.cuda_problem,
            "torch_headers": self.torch_version or None,
            "nvcc": self.cuda_version or None,
            "cuda_archs": self.archs,
        }


# --------------------------------------------------------------------------- what is there


def plan(environment: Mapping[str, str] = os.environ) -> Plan:
    """Look for torch, compilers and switches. Raises RuntimeError where JMLR_NATIVE=1 asks for what is not there."""
    wanted = environment.get("JMLR_NATIVE", "")
    if wanted == "0":
        return Plan(problem="it was installed with JMLR_NATIVE=0", cuda_problem="it was installed with JMLR_NATIVE=0")
    found = _plan(environment)
    if wanted == "1" and found.problem:
        raise RuntimeError(f"JMLR_NATIVE=1, but the native library cannot be built: {found.problem}")
    return found


def _plan(environment: Mapping[str, str]) -> Plan:
    if sys.platform != "linux":
        return Plan(problem=f"it is built on Linux only, and this is {sys.platform}")
    torch, version = _torch(environment)
    if torch is None:
        return Plan(problem=f"torch was not found for {sys.executable} when jmlr-kernels was installed")
    if tuple(int(part) for part in re.findall(r"\d+", version)[:2]) < OLDEST_TORCH:
        return Plan(problem=f"it needs the headers of torch 2.10 or newer, and torch {version} was found")
    compiler = shutil.which(environment.get("CXX", "g++"))
    if compiler is None:
        return Plan(problem=f"no C++ compiler was found ({environment.get('CXX', 'g++')})")
    found = Plan(torch=torch, torch_version=version, compiler=compiler)
    _plan_cuda(found, environment)
    return found


def _plan_cuda(found: Plan, environment: Mapping[str, str]) -> None:
    archs = (environment.get("JMLR_CUDA_ARCHS") or DEFAULT_ARCHS).replace(",", ";").split(";")
    archs = [arch.strip().replace(".", "").removeprefix("sm_") for arch in archs if arch.strip()]
    if archs == ["none"]:
        found.cuda_problem = "it was built with JMLR_CUDA_ARCHS=none"
        return
    wrong = [arch for arch in archs if not re.fullmatch(r"\d{2,3}[af]?", arch)]
    if wrong:
        raise RuntimeError(f"JMLR_CUDA_ARCHS: {wrong[0]!r} is no architecture; give for example '80;90a', or 'none'")
    old = [arch for arch in archs if _number(arch) < PTX_ARCH]
    if old:
        raise RuntimeError(f"JMLR_CUDA_ARCHS: the kernels need sm_{PTX_ARCH} or newer, not sm_{old[0]}")
    if not any(SOURCES.rglob("*.cu")):
        found.cuda_problem = "this version has no CUDA kernels"
        return
    homes = [environment.get("CUDA_HOME"), environment.get("CUDA_PATH")]
    candidates = [str(Path(home, "bin", "nvcc")) for home in homes if home] + ["nvcc", "/usr/local/cuda/bin/nvcc"]
    nvcc = next(filter(None, map(shutil.which, candidates)), None)
    if nvcc is None:
        found.cuda_problem = "no nvcc was found when it was built"
        if environment.get("JMLR_CUDA_ARCHS"):
            raise RuntimeError(f"JMLR_CUDA_ARCHS asks for {'; '.join(archs)}, but no nvcc was found; set CUDA_HOME")
        return
    printed = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=True).stdout
    release = re.search(r"release (\d+\.\d+)", printed)
    found.nvcc, found.archs = nvcc, archs
    found.cuda_version = release.group(1) if release else "unknown"


def _torch(environment: Mapping[str, str]) -> tuple[Path | None, str]:
    """Folder and version of the torch that the package is installed for.

    pip builds in an environment of its own, laid over the interpreter through PYTHON* variables, without torch; a
    process that ignores them (-E) sees the interpreter's own packages. Nothing of torch runs.
    """
    if environment.get("JMLR_TORCH"):
        folder = Path(environment["JMLR_TORCH"])
    else:
        code = "import importlib.util as u; s = u.find_spec('torch'); print(s.origin if s and s.origin else '')"
        run = subprocess.run(
            [sys.executable, "-E", "-c", code], cwd=Path(sys.executable).parent, capture_output=True, text=True
        )
        if run.returncode or not run.stdout.strip():
            return None, ""
        folder = Path(run.stdout.strip()).parent
    try:
        version = re.search(r"^__version__ = '([^']+)'", (folder / "version.py").read_text(), re.MULTILINE)
    except OSError:
        version = None
    if version is None or not (folder / "include").is_dir():
        return None, ""
    return folder, version.group(1)


def _number(arch: str) -> int:
    return int(arch.rstrip("af"))


def _cuda_home(nvcc: str) -> Path:
    """The toolkit's folder: nvcc itself says, for what is on the path may be a script."""
    printed = subprocess.run([nvcc, "--dryrun", "-E", "x.cu"], capture_output=True, text=True).stderr
    top = re.search(r"^#\$ TOP=(.+)$", printed, re.MULTILINE)
    return Path(top.group(1)).resolve() if top else Path(nvcc).resolve().parents[1]


def jobs(environment: Mapping[str, str] = os.environ) -> int:
    """Compilers at a time: MAX_JOBS, else as many as there are cores and free memory for."""
    if environment.get("MAX_JOBS", "").isdigit():
        return max(1, int(environment["MAX_JOBS"]))
    try:
        free = re.search(r"^MemAvailable:\s+(\d+) kB", Path("/proc/meminfo").read_text(), re.MULTILINE)
    except OSError:
        free = None
    by_memory = int(free.group(1)) // (GIGABYTES_PER_JOB * 2**20) if free else 1
    return max(1, min(len(os.sched_getaffinity(0)), by_memory))


# --------------------------------------------------------------------------- the commands


def compile_steps(found: Plan, objects: Path) -> list[tuple[Path, Path, list[str]]]:
    """(source, object, command) for every source file that this build has."""
    steps = []
    cuda = bool(found.nvcc)
    include = ["-isystem", str(found.torch / "include"), "-I", str(SOURCES)]
    common = ["-std=c++17", "-O3", "-DNDEBUG", "-DTORCH_TARGET_VERSION=0x020a000000000000", *include]
    common += [f"-DJMLR_NAMESPACE={NAMESPACE}"]
    if cuda:
        targets = ";".join([*found.archs, f"{PTX_ARCH}+PTX"])
        common += [f'-DJMLR_CUDA_TARGETS="{targets}"', f'-DJMLR_CUDA_VERSION="{found.cuda_version}"', "-DJMLR_CUDA"]
        common += ["-isystem", str(_cuda_home(found.nvcc) / "include")]
        common += ["-DJMLR_SM90"] if HOPPER_ARCH in found.archs else []
    for source in sorted([*SOURCES.rglob("*.cpp"), *(SOURCES.rglob("*.cu") if cuda else [])]):
        target = objects / f"{'.'.join(source.relative_to(SOURCES).with_suffix('').parts)}.o"
        if source.suffix == ".cu":
            hopper = source.stem.startswith("sm90")
            if not hopper:
                steps.append((source, target, [found.nvcc, *common, *_nvcc_flags(found, found.archs, ptx=True)]))
            elif HOPPER_ARCH in found.archs:
                checked = [sys.executable, str(SOURCES / "checked_ptxas.py"), found.nvcc]
                steps.append((source, target, [*checked, *common, *_nvcc_flags(found, [HOPPER_ARCH], ptx=False)]))
            continue
        suffix = next((name for name in _INSTRUCTIONS if source.stem.endswith(name)), None)
        if (source.stem.endswith("_cuda") and not cuda) or (suffix and platform.machine() != "x86_64"):
            continue
        flags = ["-fPIC", "-fvisibility=hidden", "-fvisibility-inlines-hidden", "-Wall", "-Wextra"]
        flags += _INSTRUCTIONS[suffix].split() if suffix else []
        steps.append((source, target, [found.compiler, *common, *flags]))
    return [(source, target, [*command, "-c", str(source), "-o", str(target)]) for source, target, command in steps]


def _nvcc_flags(found: Plan, archs: list[str], ptx: bool) -> list[str]:
    flags = ["--expt-relaxed-constexpr", "-Xcompiler", "-fPIC,-fvisibility=hidden", "-cudart", "static"]
    # Tiles are chosen for the default architectures. Elsewhere a spill is slow, and no reason to have no library.
    proven = set(found.archs) <= set(DEFAULT_ARCHS.split(";"))
    flags += ["-Xptxas", "--warn-on-spills" + (",--warning-as-error" if proven else "")]
    for arch in archs:
        flags += ["-gencode", f"arch=compute_{arch},code=sm_{arch}"]
    if ptx:
        flags += ["-gencode", f"arch=compute_{PTX_ARCH},code=compute_{PTX_ARCH}"]
    return flags


def link_command(found: Plan, objects: list[Path], library: Path, before: list[str]) -> list[str]:
    """g++ over the objects. `before` comes last but for the system's libraries.

    Nothing is exported: loading the library registers its operations.
    """
    exports = SOURCES / "exports.map"
    command = [found.compiler, "-shared", "-o", str(library), *map(str, objects)]
    if found.nvcc:
        home = _cuda_home(found.nvcc)
        places = [home / "lib64", home / "lib", home / "targets" / f"{platform.machine()}-linux" / "lib"]
        command += [f"-L{place}" for place in places if place.is_dir()] + [
            "-lcudart_static",
            "-lpthread",
            "-ldl",
            "-lrt",
        ]
    # libtorch has no code of its own, but brings all of torch at run time: with CUDA where torch has it.
    command += [f"-L{found.torch / 'lib'}", "-Wl,--no-as-needed", "-ltorch", "-Wl,--as-needed"]
    return [*command, *before, f"-Wl,--version-script={exports}", "-Wl,--gc-sections", "-Wl,-O1", "-s"]


def build(found: Plan, library: Path, scratch: Path) -> None:
    """Compile and link. Raises subprocess.CalledProcessError where a compiler fails."""
    if found.problem:
        raise RuntimeError(f"the native library cannot be built: {found.problem}")
    sys.path.insert(0, str(SOURCES))
    import portable_link

    scratch.mkdir(parents=True, exist_ok=True)
    library.parent.mkdir(parents=True, exist_ok=True)
    steps = compile_steps(found, scratch)
    _compile(steps, scratch)
    objects = [target for _, target, _ in steps]
    unlinked = scratch / library.name  # moved into place at the end: a process may have the old one open
    portable_link.link(
        str(found.compiler), lambda before: link_command(found, objects, unlinked, before), unlinked, scratch
    )
    os.replace(shutil.copy2(unlinked, library.with_name(library.name + ".new")), library)


def _compile(steps: list[tuple[Path, Path, list[str]]], scratch: Path) -> None:
    beside = Path(sys.executable).parent / "ninja"  # an environment that is not activated
    ninja = str(beside) if beside.is_file() else shutil.which("ninja")
    if ninja is None:
        for _, _, command in steps:
            print(shlex.join(command), flush=True)
            subprocess.run(command, check=True)
        return
    lines = ["ninja_required_version = 1.5", "rule compile", "  command = $line -MD -MF $out.d", "  depfile = $out.d"]
    lines += ["  deps = gcc", "  description = $in"]
    for source, target, command in steps:
        lines += [f"build {_escaped(target)}: compile {_escaped(source)}", f"  line = {_escaped(shlex.join(command))}"]
    path = scratch / "build.ninja"
    path.write_text("\n".join(lines) + "\n")
    subprocess.run([ninja, "-C", str(scratch), "-j", str(jobs())], check=True)


def _escaped(text: object) -> str:
    """As ninja reads it; in a path, spaces and colons mean something too."""
    escaped = str(text).replace("$", "$$")
    return escaped.replace(" ", "$ ").replace(":", "$:") if isinstance(text, Path) else escaped


def write_record(found: Plan, path: Path) -> None:
    """``_build.json``: what was built, or why not, for `jmlr_kernels.backend_info()`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(found.record(), indent=1) + "\n")


def main() -> int:
    """Build into the source tree; 0 too where there is nothing to build with, which the record then says."""
    package = SOURCES.parent / "jmlr_kernels"
    try:
        found = plan()
        if found.problem:
            print(f"no native library: {found.problem}")
            (package / "_C.so").unlink(missing_ok=True)
        else:
            build(found, package / "_C.so", SOURCES.parent / "build" / "native")
    except (RuntimeError, subprocess.CalledProcessError) as error:
        print(f"build_library: {error}", file=sys.stderr)
        return 1
    write_record(found, package / "_build.json")
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""`make wheel`, `make test-wheel` and `make wheel-matrix`: what a wheel must be, and its tests without the sources.

    python -m tools.wheel check dist/*.whl
    python -m tools.wheel test dist/*.whl --torch 2.13.0 [--constraints FILE] [--out DIR]

``test`` makes a new environment of the Python that runs it, installs torch and the wheel file there, copies the tests
to a folder from which the source tree cannot be imported, and runs them. ``--out`` keeps the result as a JSON file,
named after Python and torch. Needs nothing but Python.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
import zipfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
LARGEST = 30 * 2**20
# Triton's kernels are Python and the same in the source tree: interpreting them again here would take minutes.
TESTS = ("tests/native", "tests/kernels/test_maxsim.py", "tests/kernels/test_maxsim_cpu*.py",
         "tests/kernels/test_maxsim_registration.py",
         "tests/kernels/test_shifted_attention.py", "tests/kernels/test_shifted_attention_registration.py")  # fmt: skip
NEEDED = ("pytest", "pytest-timeout", "hypothesis", "numpy")
_REPORT = """
import json, platform, sys
import torch, jmlr_kernels
from jmlr_kernels import native
library = native.loaded()
print(json.dumps({
    "package": jmlr_kernels.__file__, "problem": library.problem, "cuda_targets": library.cuda_targets,
    "python": platform.python_version(), "torch": torch.__version__, "backends": jmlr_kernels.backend_info(),
    "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
}))
"""


def problems(wheel: Path) -> list[str]:
    """What is wrong with a wheel file, one sentence each."""
    sys.path.insert(0, str(ROOT / "csrc"))
    import portable_link

    found = []
    if wheel.stat().st_size > LARGEST:
        found.append(f"it has {wheel.stat().st_size / 2**20:.1f} MB, more than {LARGEST // 2**20}")
    if not re.search(rf"-py3-none-manylinux_2_28_{platform.machine()}\.whl$", wheel.name):
        found.append("its name promises something else than py3-none-manylinux_2_28")
    with zipfile.ZipFile(wheel) as archive, tempfile.TemporaryDirectory() as folder:
        libraries = [name for name in archive.namelist() if name.endswith(".so")]
        if libraries != ["jmlr_kernels/_C.so"]:
            return [*found, f"it holds {libraries or 'no library'} instead of jmlr_kernels/_C.so alone"]
        library = Path(archive.extract(libraries[0], folder))
        newer = portable_link.not_portable(library)
        if newer:
            found.append(f"its library needs what manylinux_2_28 does not have: {', '.join(newer)}")
        found += [f"its library asks for {name}" for name in portable_link.unexpected_libraries(library)]
    return found


def check(wheel: Path) -> int:
    """Print what is in a wheel and what is wrong with it."""
    found = problems(wheel)
    for problem in found:
        print(f"{wheel.name}: {problem}", file=sys.stderr)
    if not found:
        with zipfile.ZipFile(wheel) as archive:
            record = json.loads(archive.read("jmlr_kernels/_build.json"))
        cuda = f"CUDA {record['nvcc']} for sm_{', sm_'.join(record['cuda_archs'])}" if record["nvcc"] else None
        size = wheel.stat().st_size / 2**20
        print(f"{wheel.name}: {size:.1f} MB, {cuda or 'no CUDA part: ' + record['cuda_problem']}")
    return 1 if found else 0


def test(wheel: Path, torch: str, constraints: Path | None, out: Path | None) -> int:
    """Install and test a wheel in a new environment; the exit code of the tests."""
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        python = scratch / "venv" / "bin" / "python"
        subprocess.run([sys.executable, "-m", "venv", str(scratch / "venv")], check=True)
        install = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        limits = ["-c", str(constraints)] if constraints else []
        subprocess.run([*install, *limits, f"torch=={torch}", str(wheel.resolve()), *NEEDED], check=True)

        tests = scratch / "work" / "tests"
        shutil.copytree(ROOT / "tests", tests, ignore=shutil.ignore_patterns("__pycache__"))
        (scratch / "work" / "pytest.ini").write_text(_pytest_settings())
        environment = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "JMLR_"))}
        where = {"cwd": scratch / "work", "env": environment}
        printed = subprocess.run([str(python), "-c", _REPORT], capture_output=True, text=True, **where)  # type: ignore[call-overload]
        if printed.returncode:
            print(printed.stderr, file=sys.stderr)
            return 1
        report: dict[str, Any] = json.loads(printed.stdout.splitlines()[-1])
        print(json.dumps(report, indent=1), flush=True)
        if report["problem"] or not report["package"].startswith(str(scratch)):
            print(f"{wheel.name}: the library was not loaded out of the wheel", file=sys.stderr)
            return 1
        chosen = sorted(str(path.relative_to(scratch / "work")) for name in TESTS for path in tests.parent.glob(name))
        marks = ["-m", "not slow and not gpu and not source", "-k", "not triton"]
        command = [str(python), "-m", "pytest", "-q", *marks, *chosen]
        run = subprocess.run([*command, f"--junitxml={scratch / 'report.xml'}"], **where)  # type: ignore[call-overload]
        report |= {"wheel": wheel.name, "sha256": hashlib.sha256(wheel.read_bytes()).hexdigest()}
        report |= {
            "system": platform.platform(),
            "tests": _counts(scratch / "report.xml"),
            "passed": not run.returncode,
        }
    if out:
        report["package"] = "site-packages/jmlr_kernels"
        out.mkdir(parents=True, exist_ok=True)
        path = out / f"python{'.'.join(report['python'].split('.')[:2])}-torch{report['torch']}.json"
        path.write_text(json.dumps(report, indent=1) + "\n")
        print(f"result in {path}")
    return int(run.returncode)


def _pytest_settings() -> str:
    """The project's marks and limits, without its way to the source tree."""
    text = (ROOT / "pyproject.toml").read_text()
    marks = re.search(r"^markers = \[\n(.*?)^\]", text, re.MULTILINE | re.DOTALL)
    lines = re.findall(r'"([^"]+)"', marks.group(1)) if marks else []
    return "\n    ".join(["[pytest]\naddopts = --strict-markers\ntimeout = 300\nmarkers =", *lines]) + "\n"


def _counts(report: Path) -> dict[str, int]:
    if not report.is_file():
        return {}
    suite = next(ElementTree.parse(report).getroot().iter("testsuite"))
    return {name: int(suite.get(name, 0)) for name in ("tests", "failures", "errors", "skipped")}


def main(arguments: list[str] | None = None) -> int:
    """0 where the wheel is as it should be."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("action", choices=("check", "test"))
    parser.add_argument("wheel", type=Path)
    parser.add_argument("--torch", help="version to install")
    parser.add_argument("--constraints", type=Path, help="versions of everything else")
    parser.add_argument("--out", type=Path, help="folder for the result")
    options = parser.parse_args(arguments)
    if not options.wheel.is_file():
        parser.error(f"{options.wheel} does not exist; `make wheel` builds it")
    if options.action == "check":
        return check(options.wheel)
    if not options.torch:
        parser.error("test needs --torch")
    return test(options.wheel, options.torch, options.constraints, options.out)


if __name__ == "__main__":
    sys.exit(main())

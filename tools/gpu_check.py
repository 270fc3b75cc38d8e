"""`make gpu`: everything that needs a GPU, in one command of under nine minutes, without a network.

Seven phases, each a process of its own with its own time limit, so that a kernel that kills the CUDA context ends its
phase and not the others: a first look at the kernels for compute capability 9.0 (where one does not end or differs, the
later phases do without them), the GPU tests, the compiled kernels under compute-sanitizer, what the timings need
compiled (in parallel), the timings of both operations, and a few steps of joint training. ``tune`` and ``tune_hopper``,
which search tile sizes, and ``profile`` run only when they are asked for. Results go to ``benchmarks/results/<gpu>/``
(``--out`` overrides): one JSON file for each operation, ``summary.json``, and ``log.txt`` with all that the phases
printed. The last thing printed is a short table.
Exit code 1 when a phase fails.

    python -m tools.gpu_check [--out DIR] [--phases tests,attention] [--seconds maxsim=400] [--commit HASH] [--dry-run]

``--dry-run`` walks the same path on the CPU with tiny shapes and trains nothing.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any

from benchmarks.environment import ROOT, describe, folder_name
from benchmarks.peers import unpack_wheels
from tools.gpu_table import operation_table, phase_table

TOTAL_SECONDS = 525.0
PHASE_SECONDS = {
    "hopper": 40.0,
    "tests": 105.0,
    "sanitize": 55.0,
    "warm": 55.0,
    "attention": 105.0,
    "maxsim": 120.0,
    "training": 45.0,
}
ON_REQUEST_SECONDS = {"tune": 450.0, "tune_hopper": 500.0, "profile": 240.0}


@dataclass
class Phase:
    """What became of one phase: "passed", "failed" or "skipped", and one clause that says what or why."""

    name: str
    outcome: str
    seconds: float
    detail: str


@dataclass
class Context:
    """What every phase needs to know."""

    out: Path
    scratch: Path
    log: IO[str]
    environment: dict[str, str]
    dry_run: bool
    commit: str | None

    def run(
        self, command: list[str], seconds: float, environment: dict[str, str] | None = None
    ) -> tuple[int | None, str]:
        """Exit code (None past the time limit) and all output of a command, which also goes to the log."""
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            env={**self.environment, **(environment or {})},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        try:
            output, _ = process.communicate(timeout=seconds)
            code: int | None = process.returncode
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)  # compile workers and all
            output, _ = process.communicate()
            code = None
        self.log.write(f"$ {' '.join(command)}\n{output}\n")
        self.log.flush()
        return code, output


def _missing(*modules: str) -> str | None:
    absent = [module for module in modules if importlib.util.find_spec(module) is None]
    return f"{', '.join(absent)} cannot be imported here" if absent else None


def _last_line(output: str) -> str:
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    return lines[-1][:200] if lines else "no output"


def _verdict(name: str, code: int | None, seconds: float, limit: float, detail: str) -> Phase:
    if code is None:
        return Phase(name, "failed", seconds, f"stopped after its {limit:.0f} s; {detail}")
    return Phase(name, "passed" if code == 0 else "failed", seconds, detail)


def _test_counts(reports: list[Path]) -> str:
    """ "12 passed, 1 failed, 3 skipped" out of JUnit files, with the names of what failed."""
    found = [report for report in reports if report.is_file()]
    cases = [case for report in found for case in ElementTree.parse(report).getroot().iter("testcase")]
    kinds = {"failed": ("failure", "error"), "skipped": ("skipped",)}
    groups = {
        kind: [case for case in cases if any(case.find(tag) is not None for tag in tags)]
        for kind, tags in kinds.items()
    }
    passed = len(cases) - sum(map(len, groups.values()))
    names = ", ".join(case.get("name", "?") for case in groups["failed"][:5])
    counts = f"{passed} passed, {len(groups['failed'])} failed, {len(groups['skipped'])} skipped"
    return counts + (f" ({names})" if names else "")


# Beside tests/gpu: files whose tests take a CUDA device where there is one, and compile there what CI interprets.
_KERNEL_TESTS = (
    "tests/kernels/test_*_triton.py",
    "tests/kernels/test_maxsim_corners.py",
    "tests/kernels/test_maxsim_losses.py",
)


@dataclass(frozen=True)
class Job:
    """A file of tests, and which of the library's CUDA kernels it runs (docs/hopper.md)."""

    path: Path
    kernels: str = "auto"

    @property
    def name(self) -> str:
        return self.path.stem + (f"-{self.kernels}" if self.kernels != "auto" else "")


def _hopper_tests(context: Context) -> list[Path]:
    """Files to run a second time with the kernels for compute capability 8.0: none where no others are used."""
    code = "import torch, jmlr_kernels.native as n; print(n.has_hopper_kernels(torch.device('cuda', 0)))"
    if (
        context.dry_run
        or "JMLR_CUDA_KERNELS" in context.environment
        or _last_line(context.run([sys.executable, "-c", code], 60)[1]) != "True"
    ):
        return []
    return [ROOT / "tests" / "gpu" / f"test_gpu_{family}.py" for family in ("attention", "maxsim")]


def tests(context: Context, limit: float) -> Phase:
    """Every test marked `gpu`, and the kernels' tests, each file in a process of its own, several at a time: most of
    the time goes into compiling. Files that ask for an absent library are left out and named."""
    started = time.monotonic()
    missing = _missing("pytest")
    if missing:
        return Phase("tests", "skipped", 0.0, missing)
    files = sorted(ROOT.glob("tests/gpu/test_*.py"))
    again = _hopper_tests(context)
    if not context.dry_run:
        files += sorted(path for pattern in _KERNEL_TESTS for path in ROOT.glob(pattern))
    wanting = [path for path in files if "hypothesis" in path.read_text()] if _missing("hypothesis") else []
    chosen = [path for path in files if path not in wanting]

    # Where a GPU has kernels of its own, the others are tested on it too.
    jobs = [Job(path) for path in chosen] + [Job(path, "sm80") for path in again if path in chosen]

    def run(job: Job) -> tuple[int | None, str]:
        marked = "gpu" if job.path.parent.name == "gpu" else "not gpu and not slow"
        command = [sys.executable, "-m", "pytest", "-q", "-m", marked, "-p", "no:cacheprovider", "-p", "no:benchmark"]
        report = f"--junitxml={context.scratch / job.name}.xml"
        forced = {} if job.kernels == "auto" else {"JMLR_CUDA_KERNELS": job.kernels}
        return context.run([*command, str(job.path), report], limit, forced)

    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        outcomes = dict(zip(jobs, pool.map(run, jobs), strict=True))
    # 5: nothing of this file was chosen.
    worst = [code for code, _ in outcomes.values() if code not in (0, 5)]
    code = 0 if not worst else None if None in worst else worst[0]
    detail = _test_counts([context.scratch / f"{job.name}.xml" for job in jobs])
    stopped = [job.name for job, (one, _) in outcomes.items() if one is None]
    silent = [job for job, (one, _) in outcomes.items() if one not in (0, 1, 5, None)]
    if silent:
        detail += f"; {silent[0].name}: {_last_line(outcomes[silent[0]][1])}"
    if stopped:
        detail += f"; not finished: {', '.join(stopped)}"
    if wanting:
        detail += f"; left out for want of hypothesis: {', '.join(path.name for path in wanting)}"
    return _verdict("tests", code, time.monotonic() - started, limit, detail)


def operation(name: str) -> Callable[[Context, float], Phase]:
    """The phase that times one operation."""

    def phase(context: Context, limit: float) -> Phase:
        started = time.monotonic()
        path = context.out / f"{name}.json"
        path.unlink(missing_ok=True)
        command = [sys.executable, "-m", "benchmarks.run", name, "--out", str(path), "--budget", f"{limit - 15:.0f}"]
        command += ["--dry-run"] * context.dry_run + (["--commit", context.commit] if context.commit else [])
        code, output = context.run(command, limit)
        if not path.is_file():
            return _verdict(name, code or 1, time.monotonic() - started, limit, _last_line(output))
        cases = len(json.loads(path.read_text())["cases"])
        detail = f"{cases} cases timed" + ("" if code == 0 else f"; {_last_line(output)}")
        return _verdict(name, code, time.monotonic() - started, limit, detail)

    return phase


HOPPER_CHECKS = ("attention-forward", "attention-backward", "maxsim-forward", "maxsim-backward")


def hopper(context: Context, limit: float) -> Phase:
    """Whether the kernels for compute capability 9.0 run, end and agree with the others; else nobody uses them here."""
    started = time.monotonic()
    if context.dry_run:
        return Phase("hopper", "skipped", 0.0, "a dry run has no GPU")
    bad = []
    for check in HOPPER_CHECKS:
        left = limit - (time.monotonic() - started)
        code, output = context.run([sys.executable, "-m", "tools.hopper_smoke", check], max(5.0, min(20.0, left)))
        if code == 2:
            return Phase("hopper", "skipped", time.monotonic() - started, _last_line(output))
        if code != 0:
            bad.append(f"{check} " + ("does not end" if code is None else f"fails: {_last_line(output)}"))
    seconds = time.monotonic() - started
    if not bad:
        return Phase("hopper", "passed", seconds, f"{len(HOPPER_CHECKS)} operations agree")
    context.environment["JMLR_CUDA_KERNELS"] = "sm80"
    return Phase("hopper", "failed", seconds, f"{'; '.join(bad)}; later phases use the kernels for 8.0")


def warm(context: Context, limit: float) -> Phase:
    """Compile in parallel what the timings would else compile one after the other."""
    started = time.monotonic()
    command = [sys.executable, "-m", "benchmarks.warm", "attention", "maxsim", "--budget", f"{limit - 10:.0f}"]
    code, output = context.run(command + ["--dry-run"] * context.dry_run, limit)
    return _verdict("warm", code, time.monotonic() - started, limit, _last_line(output))


def tool(name: str) -> Callable[[Context, float], Phase]:
    """A phase that runs `tools.<name>` and keeps what it wrote as `<name>.json`."""

    def phase(context: Context, limit: float) -> Phase:
        started = time.monotonic()
        command = [sys.executable, "-m", f"tools.{name}", "--out", str(context.out / f"{name}.json")]
        command += ["--budget", f"{limit - 15:.0f}", *["--dry-run"] * context.dry_run]
        command += ["--commit", context.commit] if context.commit else []
        code, output = context.run(command, limit)
        if code == 2:  # what it needs is not here
            return Phase(name, "skipped", time.monotonic() - started, _last_line(output))
        return _verdict(name, code, time.monotonic() - started, limit, _last_line(output))

    return phase


def train_steps(context: Context, limit: float, steps: int = 20, device: str = "cuda") -> Phase:
    """A few steps of the quick-start recipe on the GPU, from reading the corpus to the report."""
    started = time.monotonic()
    if context.dry_run:
        return Phase("training", "skipped", 0.0, "a dry run trains nothing")
    missing = _missing("faiss", "transformers", "tokenizers", "yaml", "matplotlib", "jinja2", "tqdm")
    if missing:
        return Phase("training", "skipped", 0.0, missing)
    command = [sys.executable, "-m", "jmlr", "train", "--recipe", "quickstart", "--max-steps", str(steps)]
    command += ["--device", device, "--name", "gpu-check", "--runs", str(context.scratch)]
    command += ["--set", "joint.rank_warmup_steps=5"]  # else so few steps would never rank
    code, output = context.run(command, limit)
    detail = f"{steps} joint steps" if code == 0 else _last_line(output)
    return _verdict("training", code, time.monotonic() - started, limit, detail)


PHASES: dict[str, Callable[[Context, float], Phase]] = {
    "hopper": hopper,
    "tests": tests,
    "sanitize": tool("sanitize"),
    "warm": warm,
    "attention": operation("attention"),
    "maxsim": operation("maxsim"),
    "training": train_steps,
    "tune": tool("tune"),
    "tune_hopper": tool("tune_hopper"),
    "profile": tool("profile"),
}


def _environment(wheels: Path, caches: Path) -> dict[str, str]:
    """The phases' environment: the working tree and the unpacked wheels come first on the module path. Where the tree
    has no native library and a wheel of this package lies among them, its library is used.

    Compiled kernels lie in `caches`, which all phases share and nobody else does.
    """
    environment = {**os.environ, "PYTHONUNBUFFERED": "1", "PYTHONPATH": os.pathsep.join([str(ROOT), str(wheels)])}
    environment |= {"TRITON_CACHE_DIR": str(caches / "triton"), "TORCHINDUCTOR_CACHE_DIR": str(caches / "inductor")}
    if os.environ.get("PYTHONPATH"):
        environment["PYTHONPATH"] += os.pathsep + os.environ["PYTHONPATH"]
    built_here, built_elsewhere = ROOT / "jmlr_kernels" / "_C.so", wheels / "jmlr_kernels" / "_C.so"
    if built_elsewhere.is_file() and not built_here.is_file():
        environment.setdefault("JMLR_LIBRARY", str(built_elsewhere))
    return environment


def main(arguments: list[str] | None = None) -> int:
    """Run the phases, write summary.json, print the table. 0: all passed or skipped; 1: one failed; 2: no GPU."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--out", type=Path, help="folder for the results (default: benchmarks/results/<gpu>)")
    parser.add_argument("--phases", default=",".join(PHASE_SECONDS), help="comma-separated (default: %(default)s)")
    parser.add_argument("--seconds", action="append", default=[], metavar="PHASE=N", help="another limit for a phase")
    parser.add_argument("--commit", help="the commit to name where there is no repository")
    parser.add_argument("--dry-run", action="store_true", help="tiny shapes on the CPU, nothing trained")
    options = parser.parse_args(arguments)
    chosen = options.phases.split(",")
    unknown = [name for name in chosen if name not in PHASES]
    if unknown:
        print(f"tools.gpu_check: no phase {unknown[0]!r}; choose from {', '.join(PHASES)}", file=sys.stderr)
        return 2
    try:
        seconds = {**PHASE_SECONDS, **ON_REQUEST_SECONDS, **_limits(options.seconds)}
    except ValueError as error:
        print(f"tools.gpu_check: {error}", file=sys.stderr)
        return 2

    machine = describe(options.commit)
    if machine["gpu"] is None and not options.dry_run:
        print("tools.gpu_check: no CUDA device was found; --dry-run walks the same path on the CPU", file=sys.stderr)
        return 2
    default = (
        ROOT / "runs" / "gpu-dry-run" if options.dry_run else ROOT / "benchmarks" / "results" / folder_name(machine)
    )
    out = (options.out or default).resolve()
    out.mkdir(parents=True, exist_ok=True)
    print("\n".join(f"{key}: {value}" for key, value in machine.items()), flush=True)

    started = time.monotonic()
    phases: list[Phase] = []
    with tempfile.TemporaryDirectory() as scratch, (out / "log.txt").open("w") as log:
        wheels = Path(scratch, "wheels")
        carried = unpack_wheels(ROOT / ".whl", wheels)
        sys.path.append(str(wheels))  # so that this process sees what the phases will see
        if carried:
            print(f"carried wheels: {', '.join(carried)}", flush=True)
        context = Context(
            out, Path(scratch), log, _environment(wheels, ROOT / "runs" / "cache"), options.dry_run, options.commit
        )
        for name in chosen:
            left = TOTAL_SECONDS - (time.monotonic() - started)
            limit = min(seconds[name], left)
            if limit < 20:
                phase = Phase(name, "failed", 0.0, "no time was left for it")
            else:
                try:
                    phase = PHASES[name](context, limit)
                except Exception as error:  # the other phases must still run
                    phase = Phase(name, "failed", 0.0, f"{type(error).__name__}: {error}")
            phases.append(phase)
            print(f"{phase.name}: {phase.outcome} after {phase.seconds:.0f} s: {phase.detail}", flush=True)

    summary: dict[str, Any] = {"environment": machine, "phases": [asdict(phase) for phase in phases]}
    (out / "summary.json").write_text(json.dumps(summary, indent=1) + "\n")
    _print_tables(machine, out, [asdict(phase) for phase in phases])
    return 1 if any(phase.outcome == "failed" for phase in phases) else 0


def _limits(given: list[str]) -> dict[str, float]:
    """{"maxsim": 400.0} out of ["maxsim=400"]; ValueError with one sentence for anything else."""
    limits = {}
    for item in given:
        name, _, number = item.partition("=")
        if name not in PHASES or not number.isdigit():
            raise ValueError(f"--seconds takes PHASE=N with one of {', '.join(PHASES)}, as maxsim=400, not {item!r}")
        limits[name] = float(number)
    return limits


def _print_tables(machine: dict[str, Any], out: Path, phases: list[dict[str, Any]]) -> None:
    for phase in phases:
        path = out / f"{phase['name']}.json"
        if phase["name"] in ("attention", "maxsim") and path.is_file():
            print(f"\n{operation_table(json.loads(path.read_text()))}")
    print(
        f"\n{machine['gpu'] or machine['cpu']}, driver {machine.get('driver', '-')}, torch {machine['torch']},"
        f" triton {machine['triton']}, python {machine['python']}, commit {machine['commit'][:12]}; results in {out}"
    )
    print(phase_table(phases))


if __name__ == "__main__":
    sys.exit(main())

"""Time the tiles of the kernels for compute capability 9.0 on this GPU and write down the fastest.

Of each kernel and dimension the best predicted tiles (tools/hopper_tiles.py), the present choice first, are compiled
into libraries of their own, side by side on all cores. Every library registers its operations under a name of its own,
so that one process holds all of them: on each shape those that err from float64 more than the timings allow, or give
other bits in a second run, are dropped, and the others raced in turns. The winner has the least geometric mean; the
present choice keeps its place unless beaten by more than the noise. Winners go to
``csrc/<family>/sm90_tuned_<kernel>.inc``, which the C++ functions read; the library must be built again then.

    python -m tools.tune_hopper [maxsim-forward ...] [--top 6] [--budget 450] [--out FILE] [--commit HASH] [--dry-run]

``--dry-run`` compiles one library of each kernel and stops before anything would run.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.candidate import BACKWARD, FORWARD, Candidate
from benchmarks.environment import ROOT, describe
from benchmarks.prepare import compare, context_is_alive, results_of, steps_of
from benchmarks.timing import described, race, warm_up
from jmlr_kernels import native, ops
from tools import hopper_tiles, tune

SECONDS_PER_RACE = 1.5
DTYPE = torch.bfloat16
OPERATIONS = {"shifted_attention": "attention", "maxsim": "maxsim"}
SHAPES: dict[str, tuple[Any, ...]] = {
    "maxsim-forward": tune.FORWARD_SHAPES[128],
    "maxsim-backward": tune.BACKWARD_SHAPES,
    "attention-forward": tune.ATTENTION_SHAPES,
    "attention-backward-dq": tune.ATTENTION_SHAPES,
    "attention-backward-dkdv": tune.ATTENTION_SHAPES,
}


@dataclass(frozen=True)
class Variant:
    """Tiles of one kernel for one dimension, and the namespace that their library registers its operations in."""

    kernel: str
    dimension: int
    tiles: tuple[tuple[str, int], ...]
    number: int

    @property
    def namespace(self) -> str:
        return f"jmlr_tune_{self.kernel.replace('-', '_')}_{self.dimension}_{self.number}"

    @property
    def label(self) -> str:
        return " ".join(f"{name}={value}" for name, value in self.tiles)

    def header(self) -> str:
        """What makes the C++ function of these tiles answer them. Not a flag: nvcc cuts those at commas."""
        values = ", ".join(str(value) for _, value in self.tiles)
        macro = hopper_tiles.KERNELS[self.kernel].macro
        return f"#define {macro} {values}\n#define JMLR_TUNE_DIMENSION {self.dimension}\n"


def variants(kernel: str, dimension: int, top: int) -> list[Variant]:
    """The present choice, then the best predicted others."""
    present = hopper_tiles.chosen()[kernel][dimension]
    others = [tiles for tiles, _ in hopper_tiles.search(hopper_tiles.KERNELS[kernel], dimension) if tiles != present]
    chosen = [present, *others[: top - 1]]
    return [Variant(kernel, dimension, tuple(tiles.items()), number) for number, tiles in enumerate(chosen)]


# --------------------------------------------------------------------------- libraries


def _build_library() -> Any:
    sys.path.insert(0, str(ROOT / "csrc"))
    return importlib.import_module("build_library")


def build(chosen: list[Variant], scratch: Path, workers: int) -> dict[Variant, Path | str]:
    """A library for each variant, or why there is none: the last words of a compiler."""
    library = _build_library()
    plan = library.plan({**os.environ, "JMLR_CUDA_ARCHS": library.HOPPER_ARCH})
    if not plan.nvcc:
        raise RuntimeError(plan.problem or plan.cuda_problem)
    shared = scratch / "shared"
    shared.mkdir(parents=True, exist_ok=True)
    families = {hopper_tiles.KERNELS[variant.kernel].family for variant in chosen}
    steps = [step for step in library.compile_steps(plan, shared) if _is_needed(step[0], families)]
    own = {variant: scratch / variant.namespace for variant in chosen}
    jobs: list[tuple[Path, list[str]]] = [(target, command) for _, target, command in steps]
    for variant, folder in own.items():
        folder.mkdir(exist_ok=True)
        (folder / "variant.h").write_text(variant.header())
        jobs += [
            (folder / target.name, _for_variant(command, folder / target.name, variant))
            for source, target, command in steps
            if _differs(source, variant)
        ]
    with ThreadPoolExecutor(workers) as pool:
        problems = dict(zip([target for target, _ in jobs], pool.map(lambda job: _run(job[1]), jobs), strict=True))
    built: dict[Variant, Path | str] = {}
    for variant, folder in own.items():
        family = hopper_tiles.KERNELS[variant.kernel].family
        objects = [
            folder / target.name if _differs(source, variant) else target
            for source, target, _ in steps
            if source.parent.name == family or source.parent == library.SOURCES
        ]
        said = next((problems[item] for item in objects if problems[item]), None)
        path = folder / "library.so"
        built[variant] = said or _run(library.link_command(plan, objects, path, [])) or path
    return built


def _is_needed(source: Path, families: set[str]) -> bool:
    """The library's frame, and what the families' main operations need: not smooth, compressed or CPU paths."""
    if source.parent.name not in families:
        return source.name in ("library.cpp", "kernel_choice_cuda.cpp")
    name = source.stem
    return name == "torch_cuda" or (source.suffix == ".cu" and "smooth" not in name and "compressed" not in name)


def _differs(source: Path, variant: Variant) -> bool:
    """Whether a source registers operations, or holds the variant's kernel in the type that is timed."""
    if source.suffix == ".cpp":
        return True
    kernel = variant.kernel.split("-")[1]
    ours = source.parent.name == hopper_tiles.KERNELS[variant.kernel].family
    return ours and source.stem.startswith("sm90") and "bfloat16" in source.stem and _holds(source.stem, kernel)


def _holds(stem: str, kernel: str) -> bool:
    return kernel in stem or not ("forward" in stem or "backward" in stem)


def _for_variant(command: list[str], target: Path, variant: Variant) -> list[str]:
    library = _build_library()
    usual = f"-DJMLR_NAMESPACE={library.NAMESPACE}"
    changed = [f"-DJMLR_NAMESPACE={variant.namespace}" if word == usual else word for word in command]
    return [*changed[:-1], str(target), "-include", str(target.with_name("variant.h"))]


def _run(command: list[str]) -> str | None:
    run = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    return None if run.returncode == 0 else (run.stdout.strip().splitlines() or ["no output"])[-1][:300]


# --------------------------------------------------------------------------- the race


@contextlib.contextmanager
def registered_as(namespace: str) -> Iterator[None]:
    """Within it, the package's compiled operations are those of another library."""
    usual = native.NAMESPACE
    native.NAMESPACE = namespace  # type: ignore[misc]
    ops._implementation.cache_clear()
    try:
        yield
    finally:
        native.NAMESPACE = usual  # type: ignore[misc]
        ops._implementation.cache_clear()


def search_one(
    kernel: str, dimension: int, libraries: dict[Variant, Path | str], device: torch.device, deadline: float
) -> dict[str, Any] | None:
    """What the variants took on each shape, and the winner; None when time ran out."""
    suite = tune.SUITES[OPERATIONS[hopper_tiles.KERNELS[kernel].family]]
    direction = BACKWARD if "backward" in kernel else FORWARD
    mine = [variant for variant in libraries if (variant.kernel, variant.dimension) == (kernel, dimension)]
    problems = {variant.label: str(libraries[variant]) for variant in mine if isinstance(libraries[variant], str)}
    ready = [variant for variant in mine if isinstance(libraries[variant], Path)]
    for variant in ready:
        torch.ops.load_library(str(libraries[variant]))
        getattr(torch.ops, variant.namespace).cuda_kernels("sm90")
    times: dict[str, dict[str, float]] = {variant.label: {} for variant in ready}
    for case in (replace(case, dim=dimension) for case in SHAPES[kernel]):
        if time.perf_counter() > deadline:
            return None
        steps = _checked_steps(suite, case, direction, ready, device, problems)
        result = race(steps, device, SECONDS_PER_RACE)
        problems |= result.failures
        for name, timing in result.timings.items():
            times[name][case.name] = timing.median
    times = {name: by_case for name, by_case in times.items() if name not in problems}
    found = tune.winner(times, mine[0].label)
    if found is None:
        return {"tiles": None, "problems": problems}
    best, means = found
    tiles = next(dict(variant.tiles) for variant in mine if variant.label == best)
    gain = means[mine[0].label] / means[best] if mine[0].label in means else None
    return {"tiles": tiles, "gain_over_present": gain, "milliseconds": times, "problems": problems}


def _checked_steps(
    suite: Any, case: Any, direction: str, ready: list[Variant], device: torch.device, problems: dict[str, str]
) -> dict[str, Callable[[], Any]]:
    """Steps of the variants that run, are right and repeat themselves bit by bit."""
    *tensors, grad = case.inputs(device, DTYPE)
    exact = suite.exact(case, tensors, grad)[1 if direction == BACKWARD else 0 :]
    steps = {}
    for variant in ready:
        if variant.label in problems:
            continue
        under = partial(registered_as, variant.namespace)
        candidate = Candidate(lambda: suite.ours(case, "cuda", device), under=under)
        step = candidate.steps(steps_of(candidate.make(), tensors, grad))[direction]
        try:
            warm_up(step, device)
            first, second = (results_of(step, case, candidate) for _ in range(2))
            compare(first, exact, candidate, DTYPE, direction)
            if not all(torch.equal(one, other) for one, other in zip(first, second, strict=True)):
                raise ArithmeticError("two runs differ")
            steps[variant.label] = step
        except Exception as failure:
            problems[variant.label] = f"{case.name}: {described(failure)}"
            if not context_is_alive(device):
                raise RuntimeError(f"{variant.label} killed the CUDA context: {described(failure)}") from failure
    return steps


def write_winner(kernel: str, dimension: int, entry: dict[str, Any], environment: dict[str, Any]) -> Path:
    """A line of C++ for the dimension, in place of an earlier one."""
    family, name = hopper_tiles.KERNELS[kernel].family, kernel.partition("-")[2].replace("-", "_")
    path = ROOT / "csrc" / family / f"sm90_tuned_{name}.inc"
    start = f"if (dimension == {dimension})"
    kept = [line for line in path.read_text().splitlines() if not line.startswith(start)]
    values = ", ".join(map(str, entry["tiles"].values()))
    where = f"{environment['gpu']}, {environment['date']}, commit {environment['commit'][:12]}"
    path.write_text("\n".join([*kept, f"{start} return {{{values}}};  // {where}", ""]))
    return path


def main(arguments: list[str] | None = None) -> int:
    """0: done; 1: a kernel has no tiles that run; 2: no GPU, or no compiler."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("kernels", nargs="*", metavar="kernel", help=f"{', '.join(SHAPES)} (default: all)")
    parser.add_argument("--dimension", type=int, action="append", help="head dimension or embedding (default: 128)")
    parser.add_argument("--top", type=int, default=6, help="tiles to time of each kernel (default: %(default)s)")
    parser.add_argument("--budget", type=float, default=450.0, help="seconds, compilation included")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="compilers at a time")
    parser.add_argument("--out", type=Path, help="JSON of all that was measured")
    parser.add_argument("--commit", help="the commit to name where there is no repository")
    parser.add_argument("--dry-run", action="store_true", help="compile, and run nothing")
    options = parser.parse_args(arguments)
    unknown = [name for name in options.kernels if name not in SHAPES]
    if unknown:
        print(f"tools.tune_hopper: no kernel {unknown[0]!r}; choose from {', '.join(SHAPES)}", file=sys.stderr)
        return 2
    hopper = torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)
    if not hopper and not options.dry_run:
        print("tools.tune_hopper: no GPU of compute capability 9.0 was found; --dry-run compiles", file=sys.stderr)
        return 2
    deadline = time.perf_counter() + options.budget
    top = 1 if options.dry_run else options.top
    pairs = [(name, dimension) for name in options.kernels or SHAPES for dimension in options.dimension or [128]]
    with tempfile.TemporaryDirectory() as scratch:
        try:
            chosen = [variant for name, dimension in pairs for variant in variants(name, dimension, top)]
            libraries = build(chosen, Path(scratch), options.jobs)
        except RuntimeError as error:
            print(f"tools.tune_hopper: {error}", file=sys.stderr)
            return 2
        failed = {variant: said for variant, said in libraries.items() if isinstance(said, str)}
        for variant, said in failed.items():
            print(f"{variant.kernel}, {variant.label}: does not compile: {said}", flush=True)
        print(f"{len(libraries) - len(failed)} of {len(libraries)} libraries compiled", flush=True)
        if options.dry_run:
            return 1 if failed else 0
        return _search(pairs, libraries, deadline, options)


def _search(
    pairs: list[tuple[str, int]], libraries: dict[Variant, Path | str], deadline: float, options: argparse.Namespace
) -> int:
    environment, record, without = describe(options.commit), {}, 0
    for name, dimension in pairs:
        try:
            entry = search_one(name, dimension, libraries, torch.device("cuda"), deadline)
        except RuntimeError as error:
            print(f"tools.tune_hopper: {error}", file=sys.stderr)
            return 1
        if entry is None:
            break
        record[f"{name} {dimension}"] = entry
        if options.out:
            options.out.parent.mkdir(parents=True, exist_ok=True)
            options.out.write_text(json.dumps({"environment": environment, "kernels": record}, indent=1) + "\n")
        if entry["tiles"] is None:
            without += 1
            print(f"{name} {dimension}: no tiles run: {next(iter(entry['problems'].values()), '')}", flush=True)
            continue
        path = write_winner(name, dimension, entry, environment)
        gain = entry["gain_over_present"]
        said = "-" if gain is None else f"{gain:.3f}"
        print(f"{name} {dimension}: {entry['tiles']}, {said} x the present choice, in {path.name}", flush=True)
    print(f"{len(record)} of {len(pairs)} kernels searched")
    return 1 if without else 0


if __name__ == "__main__":
    sys.exit(main())

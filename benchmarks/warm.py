"""Compile ahead what the timings will need: peers' tuning and torch.compile, case by case in parallel processes.

    python -m benchmarks.warm attention maxsim --budget 50 --workers 12

A worker runs the candidates of one case that compile the same kernels, once each; the kernels land in Triton's and
Inductor's disk caches, from which the timing process then loads them. Figures that tuners measured on a device so
crowded are thrown away; for that their results must lie in a cache folder of their own, so TRITON_CACHE_DIR must be
set. A worker that fails or comes too late costs nothing but the compilation that is then done later.
"""

from __future__ import annotations

import argparse
import itertools
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from benchmarks import attention, maxsim
from benchmarks.candidate import FORWARD, STEP, Candidate
from benchmarks.environment import ROOT
from benchmarks.prepare import steps_of

SUITES: dict[str, Any] = {"attention": attention, "maxsim": maxsim}
# Twelve workers at once share the device's memory.
MOST_SIMILARITY_BYTES = 2 * 2**30


def jobs(cases: tuple[Any, ...], device: torch.device, suite: Any = maxsim) -> list[tuple[int, str]]:
    """(position of the case, what is compiled together) for all that takes seconds, in the order of the timings.

    A peer's MaxSim kernels depend on the layout and the length of the queries and little else: each is compiled for the
    first such case alone. What torch.compile makes depends on the shape, not on the data.
    """
    found, seen = [], set()
    for position, case in enumerate(cases):
        for candidate in suite.candidates(case, device, compiled=1).values():
            group = candidate.compiled_with
            if group is None or not set(_directions(case)) & set(candidate.directions):
                continue
            key = (group, case) if suite is not maxsim else (group, _maxsim_key(case, candidate))
            if key[1] is not None and key not in seen:
                seen.add(key)
                found.append((position, group))
    return found


def _maxsim_key(case: maxsim.MaxSimCase, candidate: Candidate) -> Any:
    """Cases of one key compile the same kernels; None for what is not compiled ahead."""
    if candidate.peer:
        return case.layout, case.query_length, case.backward
    return None if maxsim.similarity_bytes(case) > MOST_SIMILARITY_BYTES else replace(case, data="")


def _directions(case: Any) -> tuple[str, ...]:
    """A forward and a step compile all that there is to a case."""
    return (FORWARD, STEP) if getattr(case, "backward", True) else (FORWARD,)


def one(case: Any, group: str, device: torch.device, suite: Any = maxsim) -> int:
    """What a worker does: run each candidate of the group once; how many ran."""
    *tensors, grad = case.inputs(device, torch.bfloat16 if device.type == "cuda" else torch.float32)
    ran = 0
    for candidate in suite.candidates(case, device, compiled=1).values():
        if candidate.compiled_with != group:
            continue
        own = [tensors[0], case.padded(tensors[1])] if candidate.padded else tensors
        steps = steps_of(candidate.make(), own, grad)
        for direction in _directions(case):
            if direction in candidate.directions:
                steps[direction]()
        ran += 1
    if device.type == "cuda":
        torch.cuda.synchronize()
    return ran


def merged(found: dict[str, list[tuple[int, str]]]) -> list[tuple[str, int, str]]:
    """The operations' jobs in turns, so that each has its first cases' kernels when time runs out."""
    rounds = itertools.zip_longest(*([(name, *job) for job in jobs_of] for name, jobs_of in found.items()))
    return [job for turn in rounds for job in turn if job is not None]


def run_all(found: list[tuple[str, int, str]], arguments: list[str], workers: int, budget: float) -> tuple[int, int]:
    """(done, failed) of the jobs, `workers` at a time, for at most `budget` seconds."""
    deadline = time.monotonic() + budget
    waiting, done, failed = list(found), 0, 0
    running: list[subprocess.Popen[bytes]] = []
    while (waiting or running) and time.monotonic() < deadline:
        while waiting and len(running) < workers:
            operation, position, name = waiting.pop(0)
            command = [sys.executable, "-m", "benchmarks.warm", operation, *arguments, "--one", str(position), name]
            running.append(subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL))
        time.sleep(0.1)
        for process in [process for process in running if process.poll() is not None]:
            running.remove(process)
            done, failed = done + (process.returncode == 0), failed + (process.returncode != 0)
    for process in running:
        process.kill()
        process.wait()
    return done, failed


def forget_tuning(cache: Path) -> int:
    """Delete what Triton's tuners measured, keep what they compiled; how many results that were."""
    results = list(cache.rglob("*.autotune.json")) if cache.is_dir() else []
    for result in results:
        result.unlink()
    return len(results)


def main(arguments: list[str] | None = None) -> int:
    """0 also when some jobs failed: the timings do without. 2 without a GPU or a cache folder."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("operations", nargs="+", choices=SUITES, metavar="operation", help=", ".join(SUITES))
    parser.add_argument("--budget", type=float, default=50.0, help="seconds")
    parser.add_argument("--workers", type=int, default=max(1, min(12, (os.cpu_count() or 2) - 2)))
    parser.add_argument("--dry-run", action="store_true", help="a tiny shape on the CPU, to run the code")
    parser.add_argument("--one", nargs=2, metavar=("CASE", "GROUP"), help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if not options.dry_run and not torch.cuda.is_available():
        print("benchmarks.warm: no CUDA device was found; use --dry-run to run the code on the CPU", file=sys.stderr)
        return 2
    device = torch.device("cpu" if options.dry_run else "cuda")
    cases = {name: SUITES[name].DRY_CASES if options.dry_run else SUITES[name].GPU_CASES for name in options.operations}
    if options.one:
        name = options.operations[0]
        return 0 if one(cases[name][int(options.one[0])], options.one[1], device, SUITES[name]) else 1
    if "TRITON_CACHE_DIR" not in os.environ:
        print(
            "benchmarks.warm: set TRITON_CACHE_DIR to a folder of its own; tuning results in it are deleted",
            file=sys.stderr,
        )
        return 2
    found = merged({name: jobs(cases[name], device, SUITES[name]) for name in cases})
    if options.dry_run:
        found = found[:1]
    done, failed = run_all(found, ["--dry-run"] * options.dry_run, options.workers, options.budget)
    forget_tuning(Path(os.environ["TRITON_CACHE_DIR"]))
    print(f"{done} of {len(found)} compiled ahead, {failed} failed")
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Compile ahead what the timings will need: peers' tuning and torch.compile, case by case in parallel processes.

    python -m benchmarks.warm maxsim --budget 50 --workers 12

A worker runs the candidates of one case that compile the same kernels, once each; the kernels land in Triton's and
Inductor's disk caches, from which the timing process then loads them. Figures that tuners measured on a device so
crowded are thrown away; for that their results must lie in a cache folder of their own, so TRITON_CACHE_DIR must be
set. A worker that fails or comes too late costs nothing but the compilation that is then done later.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from benchmarks import maxsim
from benchmarks.candidate import FORWARD, STEP
from benchmarks.environment import ROOT
from benchmarks.prepare import steps_of

# Twelve workers at once share the device's memory.
MOST_SIMILARITY_BYTES = 2 * 2**30


def jobs(cases: tuple[maxsim.MaxSimCase, ...], device: torch.device) -> list[tuple[int, str]]:
    """(position of the case, what is compiled together) for all that takes seconds, in the order of the timings.

    A peer's kernels depend on the layout and the length of the queries and little else: each is compiled for the first
    such case alone. What torch.compile makes depends on the shape, not on the data.
    """
    found, seen = [], set()
    for position, case in enumerate(cases):
        directions = {FORWARD, STEP} if case.backward else {FORWARD}
        for candidate in maxsim.candidates(case, device, compiled=1).values():
            group = candidate.compiled_with
            too_large = not candidate.peer and maxsim.similarity_bytes(case) > MOST_SIMILARITY_BYTES
            if group is None or too_large or not directions & set(candidate.directions):
                continue
            shape: Any = (case.layout, case.query_length, case.backward) if candidate.peer else replace(case, data="")
            if (group, shape) not in seen:
                seen.add((group, shape))
                found.append((position, group))
    return found


def one(case: maxsim.MaxSimCase, group: str, device: torch.device) -> int:
    """What a worker does: run each candidate of the group once; how many ran."""
    *tensors, grad = case.inputs(device, torch.bfloat16 if device.type == "cuda" else torch.float32)
    ran = 0
    for candidate in maxsim.candidates(case, device, compiled=1).values():
        if candidate.compiled_with != group:
            continue
        own = [tensors[0], case.padded(tensors[1])] if candidate.padded else tensors
        steps = steps_of(candidate.make(), own, grad)
        for direction in (FORWARD, STEP) if case.backward else (FORWARD,):
            if direction in candidate.directions:
                steps[direction]()
        ran += 1
    if device.type == "cuda":
        torch.cuda.synchronize()
    return ran


def run_all(found: list[tuple[int, str]], arguments: list[str], workers: int, budget: float) -> tuple[int, int]:
    """(done, failed) of the jobs, `workers` at a time, for at most `budget` seconds."""
    deadline = time.monotonic() + budget
    waiting, done, failed = list(found), 0, 0
    running: list[subprocess.Popen[bytes]] = []
    while (waiting or running) and time.monotonic() < deadline:
        while waiting and len(running) < workers:
            position, name = waiting.pop(0)
            command = [sys.executable, "-m", "benchmarks.warm", *arguments, "--one", str(position), name]
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
    parser.add_argument("operation", choices=["maxsim"])
    parser.add_argument("--budget", type=float, default=50.0, help="seconds")
    parser.add_argument("--workers", type=int, default=max(1, min(12, (os.cpu_count() or 2) - 2)))
    parser.add_argument("--dry-run", action="store_true", help="a tiny shape on the CPU, to run the code")
    parser.add_argument("--one", nargs=2, metavar=("CASE", "GROUP"), help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if not options.dry_run and not torch.cuda.is_available():
        print("benchmarks.warm: no CUDA device was found; use --dry-run to run the code on the CPU", file=sys.stderr)
        return 2
    device = torch.device("cpu" if options.dry_run else "cuda")
    cases = maxsim.DRY_CASES if options.dry_run else maxsim.GPU_CASES
    if options.one:
        return 0 if one(cases[int(options.one[0])], options.one[1], device) else 1
    if "TRITON_CACHE_DIR" not in os.environ:
        print(
            "benchmarks.warm: set TRITON_CACHE_DIR to a folder of its own; tuning results in it are deleted",
            file=sys.stderr,
        )
        return 2
    found = jobs(cases, device)
    if options.dry_run:
        found = found[:1]
    again = [options.operation, *(["--dry-run"] * options.dry_run)]
    done, failed = run_all(found, again, options.workers, options.budget)
    forget_tuning(Path(os.environ["TRITON_CACHE_DIR"]))
    print(f"{done} of {len(found)} compiled ahead, {failed} failed")
    return 0


if __name__ == "__main__":
    sys.exit(main())

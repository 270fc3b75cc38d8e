"""MaxSim and smooth MaxSim on this CPU against torch, einsum and maxsim-cpu, in turns in one process: `make bench`, or

    python -m benchmarks.cpu [--out FILE] [--threads N] [--seconds S]
    python -m benchmarks.cpu --processor-time

Every candidate is compared with float64 before it is timed. The second form counts the seconds that the processor spent
on each, with one thread: on a machine that others use too, the only ones that repeat. The ceiling is measured in the
same run, before and after, by a loop of fused products in registers (cpu_peak.cpp, where there is a C++ compiler).
docs/maxsim-cpu.md reads the result.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from benchmarks import cpu_compressed, maxsim, maxsim_smooth
from benchmarks.candidate import FORWARD, STEP
from benchmarks.environment import describe
from benchmarks.maxsim_cases import MaxSimCase
from benchmarks.peers import maxsim_cpu
from benchmarks.prepare import prepare
from benchmarks.timing import race
from jmlr_kernels import native

CPU = torch.device("cpu")
LEFT_OUT = ("einsum-input-dtype", "recompute")
Results = dict[str, dict[str, Any]]  # by direction, then by candidate


def peak_gflops(threads: int) -> dict[str, float] | None:
    """GFLOP/s of float32 products and of bfloat16 pairs, or None where it cannot be measured."""
    compiler = shutil.which(os.environ.get("CXX", "g++"))
    if compiler is None:
        return None
    with tempfile.TemporaryDirectory() as folder:
        program = Path(folder, "peak")
        source = Path(__file__).with_name("cpu_peak.cpp")
        built = subprocess.run([compiler, "-O2", "-march=native", "-pthread", str(source), "-o", str(program)])
        if built.returncode:
            return None
        printed = subprocess.run([str(program), str(threads)], capture_output=True, text=True, check=True).stdout
    float32, pairs = map(float, printed.split())
    return {"float32": float32, "bfloat16": pairs or float32}


def run_case(
    suite: Any, case: MaxSimCase, dtype: torch.dtype, seconds: float, clock: Callable[[], float] = time.perf_counter
) -> dict[str, Any]:
    """Milliseconds of every candidate, by direction; `problems` says who was not timed, and why."""
    directions = [FORWARD, STEP] if case.backward else [FORWARD]
    candidates = {name: some for name, some in suite.candidates(case, CPU, 0).items() if name not in LEFT_OUT}
    records, ready = prepare(suite, case, candidates, CPU, dtype, directions, float("inf"))
    problems = {name: record["problem"] for name, record in records.items() if "problem" in record}
    results: Results = {}
    for direction in directions:
        timed = race(ready[direction], CPU, seconds, clock)
        problems |= timed.failures
        results[direction] = {name: asdict(timing) for name, timing in timed.timings.items()}
    flops = {FORWARD: case.forward_flops(), STEP: case.forward_flops() + case.backward_flops()}
    return {
        "case": case.name,
        "dtype": str(dtype).removeprefix("torch."),
        "least_ratio": case.least_ratio,
        "flops": {direction: flops[direction] for direction in directions},
        "milliseconds": results,
        "problems": problems,
    }


def lines(result: dict[str, Any], peak: dict[str, float] | None) -> list[str]:
    """One row for each direction: ours, its share of the measured peak, and how many times longer the others take."""
    rows = []
    for direction, timings in result["milliseconds"].items():
        if "jmlr" not in timings:
            rows.append(f"{result['case']:32} {result['dtype']:9} {direction:17} jmlr: {result['problems']['jmlr']}")
            continue
        ours = timings["jmlr"]["median"]
        rate = result["flops"][direction] / ours / 1e6
        share = f"{100 * rate / peak[result['dtype']]:5.0f} %" if peak and direction == FORWARD else " " * 7
        others = "  ".join(
            f"{name} {timing['median'] / ours:.2f}x" for name, timing in timings.items() if name != "jmlr"
        )
        rows.append(f"{result['case']:32} {result['dtype']:9} {direction:17} {ours:8.2f} ms {share}  {others}")
    return rows


def main() -> int:
    """Time every case of the CPU, float32 and then the first ones in bfloat16."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="write JSON there")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--seconds", type=float, default=2.0, help="for each case and direction")
    parser.add_argument("--processor-time", action="store_true", help="of one thread, instead of the time on the wall")
    arguments = parser.parse_args()
    if arguments.processor_time:
        arguments.threads = 1
    clock = time.process_time if arguments.processor_time else time.perf_counter
    torch.set_num_threads(arguments.threads)
    for variable in ("RAYON_NUM_THREADS", "OMP_NUM_THREADS"):  # maxsim-cpu's own threads, read when it is imported
        os.environ[variable] = str(arguments.threads)
    peaks = [peak_gflops(arguments.threads)]
    instructions = torch.ops.jmlr_native.cpu_instructions() if native.has("maxsim_backward", "cpu") else None
    print(f"threads: {arguments.threads}; instructions: {instructions or native.loaded().problem}; peak: {peaks[0]}")
    results = []
    cases = [(suite, case) for suite in (maxsim, maxsim_smooth) for case in suite.CPU_CASES]
    for suite, case in cases:
        for dtype in (torch.float32, torch.bfloat16):
            results.append(run_case(suite, case, dtype, arguments.seconds, clock))
            print("\n".join(lines(results[-1], peaks[0])), flush=True)
    compressed = []
    for case in cpu_compressed.CASES:
        for dtype in (torch.float32, torch.bfloat16):
            compressed.append(cpu_compressed.run(case, dtype, arguments.seconds, clock))
            print("\n".join(cpu_compressed.lines(compressed[-1])), flush=True)
    peaks.append(peak_gflops(arguments.threads))
    print(f"peak afterwards: {peaks[1]}")
    if not any(maxsim_cpu.NAME in result["milliseconds"][FORWARD] for result in results):
        print("maxsim-cpu was not timed: it is not installed, or failed; `make bench` installs it", file=sys.stderr)
    if arguments.out:
        record = {
            "environment": describe(),
            "threads": arguments.threads,
            "clock": "processor" if arguments.processor_time else "wall",
            "instructions": instructions,
            "peak_gflops": peaks,
            "results": results,
            "compressed": compressed,
        }
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        arguments.out.write_text(json.dumps(record, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())

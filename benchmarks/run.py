"""Time one operation against its baselines, case by case, within a time budget, and write JSON as it goes.

    python -m benchmarks.run attention --budget 150 --out attention.json
    python -m benchmarks.run maxsim --dry-run --out maxsim.json

For every case: make each candidate, warm it up, compare it with float64 (a candidate that computes something else is
not timed), measure its peak memory, then race all of them. A candidate that kills the CUDA context is left out and the
run starts over behind it, in a new process. How to read the result: docs/benchmarks.md.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

import jmlr_kernels
from benchmarks import attention, maxsim, roofline
from benchmarks.candidate import BACKWARD, FORWARD, STEP
from benchmarks.environment import describe
from benchmarks.prepare import ContextLost, context_is_alive, prepare
from benchmarks.timing import described, race, race_eagerly

SUITES: dict[str, Any] = {"attention": attention, "maxsim": maxsim}
# Seconds that a case must have before torch.compile is tried: in its default mode, in its tuned mode.
SECONDS_TO_COMPILE = (8.0, 30.0)
LONGEST_RACE = {"cuda": 3.0, "cpu": 0.2}


def run_case(
    suite: Any,
    case: Any,
    device: torch.device,
    dtype: torch.dtype,
    seconds: float,
    ceilings: roofline.Ceilings | None = None,
    excluded: list[str] | None = None,
) -> dict[str, Any]:
    """Everything about one case as JSON-ready numbers. `excluded` candidates are left out and named."""
    started = time.perf_counter()
    directions = directions_of(case)
    compiled = sum(seconds >= least for least in SECONDS_TO_COMPILE) if device.type == "cuda" else 0
    candidates = suite.candidates(case, device, compiled)
    for name in excluded or ():
        candidates.pop(name, None)
    deadline = started + 0.7 * seconds
    records, ready = prepare(suite, case, candidates, device, dtype, directions, deadline)
    records |= {name: {"problem": "it killed the CUDA context"} for name in excluded or ()}
    left = max(seconds - (time.perf_counter() - started), 1.0)
    for direction in directions:
        result = race(ready[direction], device, min(left / len(directions), LONGEST_RACE[device.type]))
        for name, timing in result.timings.items():
            records[name][direction] = asdict(timing)
        for name, failure in result.failures.items():
            records[name]["problem"] = f"{direction}: {failure}"
        if getattr(case, "launch_bound", False):
            survivors = {name: step for name, step in ready[direction].items() if name in result.timings}
            for name, milliseconds in race_eagerly(survivors, device).items():
                records[name][direction]["eager"] = milliseconds
    flops = {FORWARD: case.forward_flops(), BACKWARD: case.backward_flops()}
    flops[STEP] = sum(flops.values())
    for record in records.values():
        record["useful_tflops"] = _tflops(record, flops)
    executed = suite.executed_flops(case, device, dtype) if hasattr(suite, "executed_flops") else None
    if executed:
        records["jmlr"]["executed_tflops"] = _tflops(records["jmlr"], executed)
    if not context_is_alive(device):
        raise ContextLost(case.name, None)
    torch.compiler.reset()  # the next case's shapes are new: no recompilation limit is to be met
    element_size = dtype.itemsize
    return {
        "case": case.name,
        "shape": asdict(case),
        "work": roofline.record(case.work(element_size), element_size) if hasattr(case, "work") else None,
        "compiled_modes": [mode for mode, _ in zip(("default", maxsim.TUNED), range(compiled), strict=False)],
        "candidates": records,
        "summary": {
            direction: _summary(suite, case, direction, records, ceilings, element_size) for direction in directions
        },
        "seconds": round(time.perf_counter() - started, 1),
    }


def directions_of(case: Any) -> list[str]:
    """What a case is timed on."""
    if hasattr(case, "directions"):
        return list(case.directions)
    return [FORWARD, STEP] if case.backward else [FORWARD]


def _tflops(record: dict[str, Any], flops: dict[str, int]) -> dict[str, float]:
    """TFLOP/s by direction. A backward that was not timed alone is the difference of the other two medians."""
    times = {direction: record[direction]["median"] for direction in flops if direction in record}
    if BACKWARD not in times and FORWARD in times and times.get(STEP, 0.0) > times[FORWARD]:
        times[BACKWARD] = times[STEP] - times[FORWARD]
    return {direction: flops[direction] / times[direction] / 1e9 for direction in times}


def _figures(records: dict[str, dict[str, Any]], direction: str, figure: str) -> dict[str, float]:
    found = {name: record[direction].get(figure) for name, record in records.items() if direction in record}
    return {name: value for name, value in found.items() if value is not None}


def _summary(
    suite: Any,
    case: Any,
    direction: str,
    records: dict[str, dict[str, Any]],
    ceilings: roofline.Ceilings | None,
    element_size: int,
) -> dict[str, Any]:
    """Ours beside the best of the others: time, time with warm caches, eager time, memory; bars and roofline."""
    times = _figures(records, direction, "median")
    rivals = {name: value for name, value in times.items() if suite.is_baseline(name)}
    best = min(rivals, key=lambda name: rivals[name]) if rivals else None
    ours = times.get("jmlr")
    summary: dict[str, Any] = {
        "jmlr_ms": ours,
        "torch_ms": times.get("torch"),
        "best_baseline": best,
        "best_baseline_ms": rivals[best] if best else None,
        "ratio_to_best": rivals[best] / ours if best and ours else None,
    }
    for figure in ("warm", "eager"):
        values = _figures(records, direction, figure)
        others = {name: value for name, value in values.items() if suite.is_baseline(name)}
        summary[f"jmlr_{figure}_ms"] = values.get("jmlr")
        summary[f"best_{figure}"] = min(others, key=lambda name: others[name]) if others else None
        summary[f"best_{figure}_ms"] = min(others.values(), default=None)
    peaks = {name: records[name]["peak_bytes"].get(direction) for name in times}
    least = {name: peak for name, peak in peaks.items() if peak is not None and suite.is_baseline(name)}
    summary["jmlr_peak_bytes"] = peaks.get("jmlr")
    summary["least_memory"] = min(least, key=lambda name: least[name]) if least else None
    summary["least_peak_bytes"] = min(least.values(), default=None)
    if hasattr(case, "memory_bar"):
        summary["bar_bytes"] = case.memory_bar(direction, element_size)
    if ceilings is not None and hasattr(case, "work"):
        work = case.work(element_size)
        summary["floor_ms"] = roofline.time_floor(work, ceilings, direction) * 1e3
        summary["roofline_share"] = roofline.share(work, ours, ceilings, direction) if ours else None
    record = records.get("jmlr", {})
    for kind in ("useful_tflops", "executed_tflops"):
        summary[kind] = record.get(kind, {}).get(direction)
    if ceilings is not None and summary["useful_tflops"]:
        summary["matrix_share"] = summary["useful_tflops"] * 1e12 / ceilings.flops
    if hasattr(case, "bar_tflops"):
        summary["bar_tflops"] = (case.bar_tflops or {}).get(direction)
        summary["least_ratio"] = case.least_ratio
    elif case.bar is not None and direction == (STEP if case.backward else FORWARD):
        summary |= {"bar_ms": case.bar, "least_ratio": case.least_ratio}
    return summary


def _weight(case: Any) -> float:
    """Share of the time that is left: cases with a bar come first and get more."""
    return 1.5 if case.bar else 1.0


def _new_report(options: argparse.Namespace, dtype: torch.dtype, device: torch.device) -> dict[str, Any]:
    environment = describe(options.commit)
    published = roofline.published(environment["gpu"])
    return {
        "environment": environment,
        "operation": options.operation,
        "dtype": str(dtype).removeprefix("torch."),
        "backends": jmlr_kernels.backend_info(),
        "ceilings": {
            "measured": asdict(roofline.measured(device)),
            "published": asdict(published) if published else None,
        },
        "cases": [],
        "left_out": [],
        "killers": [],
    }


def main(arguments: list[str] | None = None) -> int:
    """Returns 1 when our own operation could not run or was wrong in any case, else 0."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("operation", choices=SUITES)
    parser.add_argument("--budget", type=float, default=150.0, help="seconds in all; later cases are left out")
    parser.add_argument("--out", type=Path, required=True, help="JSON file, rewritten after every case")
    parser.add_argument("--match", default="", help="only cases whose name contains this")
    parser.add_argument("--dry-run", action="store_true", help="a tiny shape on the CPU, to run the code")
    parser.add_argument("--commit", help="the commit to name where there is no repository")
    parser.add_argument("--resume", action="store_true", help="go on where --out ends")
    options = parser.parse_args(arguments)

    if not options.dry_run and not torch.cuda.is_available():
        print("benchmarks.run: no CUDA device was found; use --dry-run to run the code on the CPU", file=sys.stderr)
        return 2
    started = time.perf_counter()
    device = torch.device("cpu" if options.dry_run else "cuda")
    dtype = torch.float32 if options.dry_run else torch.bfloat16
    suite = SUITES[options.operation]
    cases = [case for case in (suite.DRY_CASES if options.dry_run else suite.GPU_CASES) if options.match in case.name]
    report = json.loads(options.out.read_text()) if options.resume else _new_report(options, dtype, device)
    ceilings = roofline.Ceilings(**report["ceilings"]["measured"])
    done = {case["case"] for case in report["cases"]}
    cases = [case for case in cases if case.name not in done]
    deadline = started + options.budget
    for position, case in enumerate(cases):
        left = deadline - time.perf_counter()
        least = 0.0 if options.dry_run else getattr(case, "least_seconds", 0.0)
        if left <= max(2.0, least):
            report["left_out"].append(case.name)
        else:
            share = _weight(case) / sum(_weight(later) for later in cases[position:])
            excluded = [candidate for name, candidate in report["killers"] if name == case.name and candidate]
            try:
                result = run_case(suite, case, device, dtype, max(left * share, least), ceilings, excluded)
            except ContextLost as lost:
                return _start_over(options, report, case, lost.candidate, deadline - time.perf_counter())
            except Exception as error:  # the oracle ran out of memory, say: the other cases must still run
                if not context_is_alive(device):
                    return _start_over(options, report, case, None, deadline - time.perf_counter())
                result = _failed_case(case, described(error))
            report["cases"].append(result)
            print(f"{options.operation} {case.name}: {result['seconds']} s", flush=True)
        options.out.write_text(json.dumps(report, indent=1) + "\n")
    failed = any("problem" in case["candidates"]["jmlr"] for case in report["cases"])
    return 1 if failed or any(candidate == "jmlr" for _, candidate in report["killers"]) else 0


def _failed_case(case: Any, problem: str) -> dict[str, Any]:
    return {
        "case": case.name,
        "shape": asdict(case),
        "work": None,
        "compiled_modes": [],
        "candidates": {"jmlr": {"problem": problem, "peak_bytes": {}, "error": {}, "useful_tflops": {}}},
        "summary": {},
        "seconds": 0.0,
    }


def _start_over(
    options: argparse.Namespace, report: dict[str, Any], case: Any, candidate: str | None, left: float
) -> int:
    """Replace this process, whose CUDA context is gone, by one that goes on without whoever killed it."""
    report["killers"].append([case.name, candidate])
    if candidate is None or [case.name, candidate] in report["killers"][:-1]:
        # Nobody to leave out, or leaving them out did not help: without the case, then.
        report["cases"].append(_failed_case(case, "the CUDA context was lost while it was timed"))
    options.out.write_text(json.dumps(report, indent=1) + "\n")
    print(f"{case.name}: {candidate or 'somebody'} killed the CUDA context; starting over behind it", flush=True)
    command = [sys.executable, "-m", "benchmarks.run", options.operation, "--out", str(options.out), "--resume"]
    command += ["--budget", f"{max(left - 10.0, 0.0):.0f}", "--match", options.match]
    command += ["--commit", options.commit] if options.commit else []
    sys.stdout.flush()
    os.execv(sys.executable, command)


if __name__ == "__main__":
    sys.exit(main())

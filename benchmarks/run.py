"""Time one operation against its baselines, case by case, within a time budget, and write JSON as it goes.

    python -m benchmarks.run attention --budget 150 --out attention.json
    python -m benchmarks.run maxsim --dry-run --out maxsim.json

For every case: make each candidate, warm it up, compare it with the plain-torch backend in float64 (a candidate that
computes something else is not timed), measure its peak memory, then race all of them. ``backward`` is the difference
of the medians of forward+backward and forward.
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

import jmlr_kernels
from benchmarks import attention, maxsim
from benchmarks.environment import describe
from benchmarks.timing import peak_bytes, race, relative_error, warm_up

SUITES: dict[str, Any] = {"attention": attention, "maxsim": maxsim}
# ||error|| / ||exact||: twice what rounding inputs and outputs of these products costs. Not the tests' tolerance.
PARITY = {torch.bfloat16: 2e-2, torch.float32: 1e-4}
LEAST_SECONDS_TO_COMPILE = 10.0

Function = Callable[..., torch.Tensor]


def exact_results(suite: Any, case: Any, tensors: list[torch.Tensor], grad: torch.Tensor) -> list[torch.Tensor]:
    """Output and gradients by the plain-torch backend in float64."""
    wide = [tensor.detach().double().requires_grad_() for tensor in tensors]
    function = suite.ours(case, "torch") if suite is attention else suite.ours("torch")
    out = function(*wide)
    return [out.detach(), *torch.autograd.grad(out, wide, grad.to(out.dtype))]


def steps_of(function: Function, tensors: list[torch.Tensor], grad: torch.Tensor) -> dict[str, Callable[[], Any]]:
    """The two things that are timed, as functions without arguments."""

    def forward() -> torch.Tensor:
        with torch.no_grad():
            return function(*tensors)

    def forward_backward() -> tuple[torch.Tensor, ...]:
        out = function(*tensors)
        return (out, *torch.autograd.grad(out, tensors, grad.to(out.dtype)))

    return {"forward": forward, "forward+backward": forward_backward}


def prepare(
    suite: Any, case: Any, device: torch.device, dtype: torch.dtype, directions: list[str], compiled: bool
) -> tuple[dict[str, dict[str, Any]], dict[str, dict[str, Callable[[], Any]]]]:
    """Warm, compared and measured candidates: (records by name, steps by direction and name)."""
    *tensors, grad = case.inputs(device, dtype)
    exact = exact_results(suite, case, tensors, grad)
    records: dict[str, dict[str, Any]] = {}
    ready: dict[str, dict[str, Callable[[], Any]]] = {direction: {} for direction in directions}
    for name, make in suite.candidates(case, device, compiled).items():
        record: dict[str, Any] = {"peak_bytes": {}, "error": {}}
        records[name] = record
        try:
            steps = steps_of(make(), tensors, grad)
            for direction in directions:
                step = steps[direction]
                warm_up(step, device)
                if not name.startswith("sdpa-dense"):
                    results = step()
                    results = results if isinstance(results, tuple) else (results,)
                    error = max(relative_error(result, right) for result, right in zip(results, exact, strict=False))
                    record["error"][direction] = error
                    if error > PARITY[dtype]:
                        raise ArithmeticError(f"{direction} is off by {error:.1e}, allowed {PARITY[dtype]:.0e}")
                    del results
                record["peak_bytes"][direction] = peak_bytes(step, device)
            for direction in directions:
                ready[direction][name] = steps[direction]
        except Exception as failure:  # a baseline that cannot run is a finding, not the end of the benchmark
            record["problem"] = f"{type(failure).__name__}: {' '.join(str(failure).split())[:300]}"
            gc.collect()
            if device.type == "cuda":
                torch.cuda.empty_cache()
    return records, ready


def run_case(suite: Any, case: Any, device: torch.device, dtype: torch.dtype, seconds: float) -> dict[str, Any]:
    """Everything about one case as JSON-ready numbers."""
    started = time.perf_counter()
    directions = ["forward", "forward+backward"] if getattr(case, "backward", True) else ["forward"]
    compiled = device.type == "cuda" and seconds > LEAST_SECONDS_TO_COMPILE
    records, ready = prepare(suite, case, device, dtype, directions, compiled)
    left = max(seconds - (time.perf_counter() - started), 1.0)
    for direction in directions:
        for name, timing in race(ready[direction], device, min(left / len(directions), 3.0)).items():
            records[name][direction] = asdict(timing)
    for record in records.values():
        flops = {"forward": case.forward_flops(), "backward": case.backward_flops()}
        record["useful_tflops"] = _tflops(record, flops)
    torch.compiler.reset()  # the next case's shapes are new: no recompilation limit is to be met
    return {
        "case": case.name,
        "shape": asdict(case),
        "compiled_baselines": compiled,
        "candidates": records,
        "summary": {direction: _summary(suite, case, direction, records) for direction in directions},
        "seconds": round(time.perf_counter() - started, 1),
    }


def _tflops(record: dict[str, Any], flops: dict[str, int]) -> dict[str, float]:
    forward, both = record.get("forward"), record.get("forward+backward")
    rates = {}
    if forward:
        rates["forward"] = flops["forward"] / forward["median"] / 1e9
    if forward and both and both["median"] > forward["median"]:
        rates["backward"] = flops["backward"] / (both["median"] - forward["median"]) / 1e9
    return rates


def _summary(suite: Any, case: Any, direction: str, records: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Ours, plain torch and the best baseline in milliseconds, and how many times faster ours is."""
    times = {name: record[direction]["median"] for name, record in records.items() if direction in record}
    rivals = {name: value for name, value in times.items() if suite.is_baseline(name)}
    best = min(rivals, key=lambda name: rivals[name]) if rivals else None
    summary: dict[str, Any] = {
        "jmlr_ms": times.get("jmlr"),
        "torch_ms": times.get("torch"),
        "best_baseline": best,
        "best_baseline_ms": rivals[best] if best else None,
        "ratio_to_best": rivals[best] / times["jmlr"] if best and "jmlr" in times else None,
    }
    bar = getattr(case, "bar", None)
    if bar is not None and direction == ("forward+backward" if case.backward else "forward"):
        summary["bar_ms"] = bar
    bars = attention.H200_BARS.get(getattr(case, "group_size", 0)) if suite is attention else None
    if bars:
        summary["bar_tflops"] = dict(zip(("forward", "backward"), bars, strict=True))
    return summary


def main(arguments: list[str] | None = None) -> int:
    """Returns 1 when our own operation could not run or was wrong in any case, else 0."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("operation", choices=SUITES)
    parser.add_argument("--budget", type=float, default=150.0, help="seconds in all; later cases are left out")
    parser.add_argument("--out", type=Path, required=True, help="JSON file, rewritten after every case")
    parser.add_argument("--dry-run", action="store_true", help="a tiny shape on the CPU, to run the code")
    parser.add_argument("--commit", help="the commit to name where there is no repository")
    options = parser.parse_args(arguments)

    if not options.dry_run and not torch.cuda.is_available():
        print("benchmarks.run: no CUDA device was found; use --dry-run to run the code on the CPU", file=sys.stderr)
        return 2
    device = torch.device("cpu" if options.dry_run else "cuda")
    dtype = torch.float32 if options.dry_run else torch.bfloat16
    suite = SUITES[options.operation]
    cases = suite.DRY_CASES if options.dry_run else suite.GPU_CASES
    report: dict[str, Any] = {
        "environment": describe(options.commit),
        "operation": options.operation,
        "dtype": str(dtype).removeprefix("torch."),
        "backends": jmlr_kernels.backend_info(),
        "cases": [],
        "left_out": [],
    }
    deadline = time.perf_counter() + options.budget
    failed = False
    for position, case in enumerate(cases):
        left = deadline - time.perf_counter()
        if left <= 2.0:
            report["left_out"].append(case.name)
        else:
            result = run_case(suite, case, device, dtype, left / (len(cases) - position))
            failed |= "problem" in result["candidates"]["jmlr"]
            report["cases"].append(result)
            print(f"{options.operation} {case.name}: {result['seconds']} s", flush=True)
        options.out.write_text(json.dumps(report, indent=1) + "\n")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())

"""MaxSim on this CPU against compressed documents: every format beside plain torch and uncompressed documents.

`python -m benchmarks.cpu` runs it after its own cases. Each format's scores are compared with those of its decoded
documents in float64 first.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.maxsim_cases import MaxSimCase
from benchmarks.prepare import PARITY
from benchmarks.timing import race, relative_error, warm_up
from jmlr_kernels import ResidualCodec, maxsim, maxsim_quantized, maxsim_residual, quantize_documents

CPU = torch.device("cpu")
CASES = (MaxSimCase(1, 1000, 32, 300, backward=False), MaxSimCase(32, 32, 32, 300, backward=False))
UNCOMPRESSED = "uncompressed"
CENTROIDS = 4096


def formats(documents: Tensor) -> dict[str, Callable[..., Tensor]]:
    """What scores queries against the documents in each format, given `backend`. Residuals are drawn: any bits take
    the same time."""
    draw = torch.Generator().manual_seed(0)
    found: dict[str, Callable[..., Tensor]] = {}
    for name, stored in (("int8", torch.int8), ("float8", torch.float8_e4m3fn)):
        values, scales = quantize_documents(documents, stored)
        found[name] = partial(maxsim_quantized, values=values, scales=scales)
    shape, dimension = documents.shape[:-1], documents.shape[-1]
    centroids = torch.nn.functional.normalize(torch.randn(CENTROIDS, dimension, generator=draw), dim=-1).half()
    codes = torch.randint(CENTROIDS, shape, generator=draw, dtype=torch.int32)
    for bits in (1, 2, 4, 8):
        codec = ResidualCodec(centroids, 0.05 * torch.randn(2**bits, generator=draw))
        residuals = torch.randint(256, (*shape, dimension * bits // 8), generator=draw, dtype=torch.uint8)
        found[f"residual, {bits} bits"] = partial(maxsim_residual, codes=codes, residuals=residuals, codec=codec)
    return found


@torch.no_grad()
def run(case: MaxSimCase, dtype: torch.dtype, seconds: float, clock: Callable[[], float] = time.perf_counter) -> Any:
    """Milliseconds of every format by backend, and of uncompressed documents; `problems` says who was not timed."""
    queries, documents, _ = case.inputs(CPU, torch.float32)
    queries, plain = queries.to(dtype), documents.to(dtype)
    steps: dict[str, Callable[[], Any]] = {UNCOMPRESSED: partial(maxsim, queries, plain)}
    problems: dict[str, str] = {}
    for name, score in formats(documents).items():
        exact = score(queries.double(), backend="torch")
        for label, backend in ((name, "auto"), (f"{name}, torch", "torch")):
            step = partial(score, queries, backend=backend)
            error = relative_error(step(), exact)
            if error <= PARITY[dtype]:
                steps[label] = step
            else:
                problems[label] = f"scores are off by {error:.1e}, allowed {PARITY[dtype]:.0e}"
    for known in steps.values():
        warm_up(known, CPU)
    timed = race(steps, CPU, seconds, clock)
    return {
        "case": case.name,
        "dtype": str(dtype).removeprefix("torch."),
        "milliseconds": {name: asdict(timing) for name, timing in timed.timings.items()},
        "problems": problems | timed.failures,
    }


def lines(result: dict[str, Any]) -> list[str]:
    """One row for each format: ours, over the time of uncompressed documents, and how many times longer torch takes."""
    timings = {name: timing["median"] for name, timing in result["milliseconds"].items()}
    head = f"{result['case']:32} {result['dtype']:9}"
    rows = [f"{head} {name}: {problem}" for name, problem in result["problems"].items()]
    for name, ours in timings.items():
        if name.endswith(", torch"):
            continue
        row = f"{head} {name:17} {ours:8.2f} ms  {ours / timings[UNCOMPRESSED]:.2f} of {UNCOMPRESSED}"
        others = timings.get(f"{name}, torch")
        rows.append(row if others is None else f"{row}  torch {others / ours:.2f}x")
    return rows

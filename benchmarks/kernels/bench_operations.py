"""Both operations on the CPU against plain torch, forward and forward+backward, in float32: `make bench`."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from benchmarks import attention, maxsim
from benchmarks.prepare import compare, results_of, steps_of

CPU = torch.device("cpu")
CASES = [(suite, case) for suite in (attention, maxsim) for case in suite.CPU_CASES]
RUNS = [
    (suite, case, direction, name)
    for suite, case in CASES
    for direction in (("forward", "forward+backward") if getattr(case, "backward", True) else ("forward",))
    for name in suite.candidates(case, CPU, compiled=0)
    if name not in ("torch", "einsum-input-dtype")  # in float32 on a CPU they are what ours and einsum run
]


@pytest.mark.parametrize(
    ("suite", "case", "direction", "name"), RUNS, ids=[f"{case.name}-{way}-{name}" for _, case, way, name in RUNS]
)
def bench_operation(benchmark: Any, suite: Any, case: Any, direction: str, name: str) -> None:
    """One candidate on one shape; it must compute the right thing before it is timed."""
    benchmark.group = f"{suite.__name__.split('.')[-1]} {case.name}, {direction}"
    benchmark.name = name
    candidate = suite.candidates(case, CPU, compiled=0)[name]
    *tensors, grad = case.inputs(CPU, torch.float32)
    own = [tensors[0], case.padded(tensors[1])] if candidate.padded else tensors
    step = steps_of(candidate.make(), own, grad)[direction]
    if candidate.comparable:
        compare(
            results_of(step, case, candidate), suite.exact(case, tensors, grad), candidate, torch.float32, direction
        )
    benchmark.pedantic(step, rounds=9, warmup_rounds=2)

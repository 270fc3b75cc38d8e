"""Both operations on the CPU against plain torch, forward and forward+backward, in float32: `make bench`."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from benchmarks import attention, maxsim
from benchmarks.run import exact_results, steps_of
from benchmarks.timing import relative_error

CPU = torch.device("cpu")
CASES = [(suite, case) for suite in (attention, maxsim) for case in suite.CPU_CASES]
RUNS = [
    (suite, case, direction, name)
    for suite, case in CASES
    for direction in (("forward", "forward+backward") if getattr(case, "backward", True) else ("forward",))
    for name in suite.candidates(case, CPU, compiled=False)
    if name != "torch"  # on a CPU that is what ours runs
]


@pytest.mark.parametrize(
    ("suite", "case", "direction", "name"), RUNS, ids=[f"{case.name}-{way}-{name}" for _, case, way, name in RUNS]
)
def bench_operation(benchmark: Any, suite: Any, case: Any, direction: str, name: str) -> None:
    """One candidate on one shape; it must compute the right thing before it is timed."""
    benchmark.group = f"{suite.__name__.split('.')[-1]} {case.name}, {direction}"
    benchmark.name = name
    *tensors, grad = case.inputs(CPU, torch.float32)
    step = steps_of(suite.candidates(case, CPU, compiled=False)[name](), tensors, grad)[direction]
    results = step()
    if not name.startswith("sdpa-dense"):  # another function
        results = results if isinstance(results, tuple) else (results,)
        for result, exact in zip(results, exact_results(suite, case, tensors, grad), strict=False):
            assert relative_error(result, exact) < 1e-4
    benchmark.pedantic(step, rounds=9, warmup_rounds=2)

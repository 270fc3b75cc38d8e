"""Both operations on the CPU against plain torch, in float32: `make bench`.

Forward and forward+backward, and attention's backward alone; packed documents and right padding among its cases.
One candidate after the other: for ratios, `python -m benchmarks.cpu` times MaxSim's in turns.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from benchmarks import attention, maxsim
from benchmarks.candidate import BACKWARD
from benchmarks.prepare import compare, results_of, steps_of
from benchmarks.run import directions_of
from jmlr_kernels import native

CPU = torch.device("cpu")
CASES = [(suite, case) for suite in (attention, maxsim) for case in suite.CPU_CASES]
RUNS = [
    (suite, case, direction, name)
    for suite, case in CASES
    for direction in directions_of(case)
    for name in suite.candidates(case, CPU, compiled=0)
    if name != "einsum-input-dtype"  # in float32 it is what einsum runs
    and (name != "torch" or (suite is maxsim and native.has("maxsim_backward", "cpu")))  # elsewhere ours is torch
    and direction in suite.candidates(case, CPU, compiled=0)[name].directions
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
        exact = suite.exact(case, tensors, grad)[1 if direction == BACKWARD else 0 :]
        compare(results_of(step, case, candidate), exact, candidate, torch.float32, direction, suite)
    benchmark.pedantic(step, rounds=9, warmup_rounds=2)

"""What happens to a candidate before it is timed: warm-up, comparison with float64, peak memory."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from typing import Any

import torch

from benchmarks.candidate import BACKWARD, FORWARD, STEP, Candidate, Function
from benchmarks.timing import described, peak_bytes, relative_error, warm_up

# ||error|| / ||exact||: twice what rounding inputs and outputs of these products costs. Not the tests' tolerance.
PARITY = {torch.bfloat16: 2e-2, torch.float32: 1e-4}
# Similarities rounded to bfloat16 tie or change places in a few of a hundred rows, and then another token, just as
# similar, gets the whole gradient. Exact sums in float32 are what the CPU tests hold these baselines to.
ROUNDED_GRADIENT_PARITY = 0.75

Steps = dict[str, Callable[[], Any]]


class ContextLost(Exception):
    """The CUDA context died, and with it this process's use of the device."""

    def __init__(self, case: str, candidate: str | None) -> None:
        super().__init__(f"{case}: {candidate}")
        self.case, self.candidate = case, candidate


def context_is_alive(device: torch.device) -> bool:
    """False after an illegal memory access and the like, which no later call survives."""
    if device.type != "cuda":
        return True
    try:
        torch.cuda.synchronize()
        torch.zeros(1, device=device)
        torch.cuda.synchronize()
    except RuntimeError:
        return False
    return True


def steps_of(function: Function, tensors: list[torch.Tensor], grad: torch.Tensor) -> Steps:
    """The three things that are timed, as functions without arguments.

    The backward runs again and again over one graph, which its first call makes and keeps. The forward gets tensors
    that ask for no gradient: some libraries look at that, not at the grad mode, when they decide whether to save
    winners.
    """
    plain = [tensor.detach() for tensor in tensors]

    def forward() -> torch.Tensor:
        with torch.no_grad():
            return function(*plain)

    def forward_backward() -> tuple[torch.Tensor, ...]:
        out = function(*tensors)
        return (out, *torch.autograd.grad(out, tensors, grad.to(out.dtype)))

    graph: list[torch.Tensor] = []

    def backward() -> tuple[torch.Tensor, ...]:
        if not graph:
            graph.append(function(*tensors))
        return torch.autograd.grad(graph[0], tensors, grad.to(graph[0].dtype), retain_graph=True)

    return {FORWARD: forward, BACKWARD: backward, STEP: forward_backward}


def prepare(
    suite: Any,
    case: Any,
    candidates: dict[str, Candidate],
    device: torch.device,
    dtype: torch.dtype,
    directions: list[str],
    deadline: float,
) -> tuple[dict[str, dict[str, Any]], dict[str, Steps]]:
    """Warm, compared and measured candidates: (records by name, steps by direction and name).

    Past `deadline` plain baselines are left out; ours and the peers never are. Raises ContextLost.
    """
    *tensors, grad = case.inputs(device, dtype)
    exact = suite.exact(case, tensors, grad)
    wide = [tensors[0], case.padded(tensors[1])] if any(some.padded for some in candidates.values()) else []
    records: dict[str, dict[str, Any]] = {}
    ready: dict[str, Steps] = {direction: {} for direction in directions}
    functions: dict[str, Function] = {}
    for name, candidate in candidates.items():
        record: dict[str, Any] = {"peak_bytes": {}, "error": {}}
        wanted = [direction for direction in directions if direction in candidate.directions]
        if not wanted:
            continue
        records[name] = record
        if time.perf_counter() > deadline and name != "jmlr" and not candidate.peer:
            record["problem"] = "no time was left for it"
            continue
        try:
            functions[name] = function = candidate.make()
            steps = candidate.steps(steps_of(function, wide if candidate.padded else tensors, grad))
            for direction in wanted:
                warm_up(steps[direction], device)
                if candidate.comparable:
                    results = results_of(steps[direction], case, candidate)
                    expected = exact[1:] if direction == BACKWARD else exact
                    record["error"][direction] = compare(results, expected, candidate, dtype, direction, suite)
                    del results
                record["peak_bytes"][direction] = peak_bytes(steps[direction], device)
            for direction in wanted:
                ready[direction][name] = steps[direction]
        except Exception as failure:  # a baseline that cannot run is a finding, not the end of the benchmark
            record["problem"] = described(failure)
            _clean_up(device, case.name, name)
    del exact, wide
    _look_at_other_data(suite, case, candidates, functions, device, dtype, directions[-1], records, ready)
    return records, ready


def _look_at_other_data(
    suite: Any,
    case: Any,
    candidates: dict[str, Candidate],
    functions: dict[str, Function],
    device: torch.device,
    dtype: torch.dtype,
    direction: str,
    records: dict[str, dict[str, Any]],
    ready: dict[str, Steps],
) -> None:
    """Ours and the peers on the same shape with other data: right on both, or not timed."""
    other = case.second_data() if hasattr(case, "second_data") else None
    if other is None:
        return
    *tensors, grad = other.inputs(device, dtype)
    exact = suite.exact(other, tensors, grad)
    for name in list(ready[direction]):
        candidate = candidates[name]
        if name != "jmlr" and not candidate.peer:
            continue
        try:
            own = [tensors[0], other.padded(tensors[1])] if candidate.padded else tensors
            steps = candidate.steps(steps_of(functions[name], own, grad))
            results = results_of(steps[direction], other, candidate)
            records[name]["second_data_error"] = compare(
                results, exact, candidate, dtype, f"{other.data} {direction}", suite
            )
        except Exception as failure:
            records[name]["problem"] = described(failure)
            for steps in ready.values():
                steps.pop(name, None)
            _clean_up(device, case.name, name)


def results_of(step: Callable[[], Any], case: Any, candidate: Candidate) -> list[torch.Tensor]:
    """Scores, or scores and gradients, in the case's own layout."""
    results = step()
    results = list(results) if isinstance(results, tuple) else [results]
    if candidate.padded and len(results) == 3:
        results[2] = results[2][case.mask(results[2].device)]
    return results


def compare(
    results: list[torch.Tensor],
    exact: list[torch.Tensor],
    candidate: Candidate,
    dtype: torch.dtype,
    what: str,
    suite: Any = None,
) -> float:
    """The largest relative error; ArithmeticError when one is too large.

    `suite` may hold a wider ``GRADIENT_PARITY`` by dtype for results after the first.
    """
    errors = [relative_error(result, right) for result, right in zip(results, exact, strict=False)]
    for position, error in enumerate(errors):
        wider = candidate.rounds and position > 0 and dtype == torch.bfloat16
        allowed = ROUNDED_GRADIENT_PARITY if wider else PARITY[dtype]
        if position > 0:
            allowed = max(allowed, getattr(suite, "GRADIENT_PARITY", {}).get(dtype, 0))
        if not error <= allowed:
            raise ArithmeticError(f"{what} is off by {error:.1e}, allowed {allowed:.0e}")
    return max(errors)


def _clean_up(device: torch.device, case: str, candidate: str) -> None:
    gc.collect()
    if device.type == "cuda":
        if not context_is_alive(device):
            raise ContextLost(case, candidate)
        torch.cuda.empty_cache()

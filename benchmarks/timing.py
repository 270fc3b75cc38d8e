"""Timing rules for one process: warm up, interleave the candidates round by round, flush the L2 cache, take medians.

On a GPU every candidate is captured as a CUDA graph where it can be, so that Python and launch overhead stay out, and
timed by events around one replay. The flush before each replay keeps the GPU busy while the CPU enqueues events and
replay: the launch hides behind it.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

Step = Callable[[], Any]

FLUSH_BYTES = 256 * 1024 * 1024  # several times the L2 of any GPU sold until now
FEWEST_ROUNDS, MOST_ROUNDS = 7, 60


@dataclass(frozen=True)
class Timing:
    """Milliseconds of one step: median and quartiles over `rounds`, and whether a CUDA graph, events or a clock."""

    median: float
    first_quartile: float
    third_quartile: float
    rounds: int
    method: str


def warm_up(step: Step, device: torch.device, runs: int = 3) -> None:
    """Compile, allocate and autotune outside of the timed region.

    Runs on a side stream, which a later graph capture of autograd code asks for.
    """
    if device.type != "cuda":
        step()
        return
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(runs):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()


def captured(step: Step) -> tuple[Step, str]:
    """`step` as a CUDA graph's replay, or as it is where it cannot be captured."""
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            step()
    except RuntimeError:
        torch.cuda.synchronize()
        return step, "events"
    return graph.replay, "graph"


def race(steps: dict[str, Step], device: torch.device, seconds: float) -> dict[str, Timing]:
    """Time all candidates in turns for about `seconds`; every round times each once, in rotated order.

    The steps are already warm. Returns one Timing for each name.
    """
    samples: dict[str, list[float]] = {name: [] for name in steps}
    if device.type == "cuda":
        ready = {name: captured(step) for name, step in steps.items()}
        methods = {name: method for name, (_, method) in ready.items()}
        flush = torch.empty(FLUSH_BYTES, dtype=torch.int8, device=device)

        def one_round(order: list[str]) -> None:
            pending = []
            for name in order:
                start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
                flush.zero_()
                start.record()
                ready[name][0]()
                end.record()
                pending.append((name, start, end))
            torch.cuda.synchronize()
            for name, start, end in pending:
                samples[name].append(start.elapsed_time(end))
    else:
        methods = dict.fromkeys(steps, "clock")

        def one_round(order: list[str]) -> None:
            for name in order:
                began = time.perf_counter()
                steps[name]()
                samples[name].append((time.perf_counter() - began) * 1e3)

    names = list(steps)
    deadline = time.perf_counter() + seconds
    for turn in range(MOST_ROUNDS):
        if turn >= FEWEST_ROUNDS and time.perf_counter() > deadline:
            break
        shift = turn % len(names)
        one_round(names[shift:] + names[:shift])
    return {name: _summary(samples[name][1:], methods[name]) for name in names}  # the first round is one more warm-up


def _summary(values: list[float], method: str) -> Timing:
    first, median, third = statistics.quantiles(values, n=4, method="inclusive")
    return Timing(median, first, third, len(values), method)


def peak_bytes(step: Step, device: torch.device) -> int | None:
    """The most memory that one step holds at a time beyond what was allocated before it; None on a CPU."""
    if device.type != "cuda":
        return None
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    result = step()
    torch.cuda.synchronize()
    peak = torch.cuda.max_memory_allocated() - before
    del result
    return peak


def relative_error(actual: torch.Tensor, exact: torch.Tensor) -> float:
    """||actual - exact|| / ||exact|| in float64; infinite when anything is not finite."""
    if actual.shape != exact.shape:
        raise ValueError(f"compared shapes differ: {tuple(actual.shape)} and {tuple(exact.shape)}")
    actual, exact = actual.detach().double(), exact.detach().double()
    error = (actual - exact).norm() / exact.norm().clamp_min(1e-30)
    return float(error) if bool(torch.isfinite(error)) else float("inf")

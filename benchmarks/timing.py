"""Timing rules for one process: warm up, interleave the candidates round by round, flush the L2 cache, take medians.

On a GPU every candidate is captured as a CUDA graph where it can be, so that Python and launch overhead stay out, and
timed by events around one replay, twice per round: once after a flush of the L2 cache, once after another replay
("warm"). Before either, a kernel that touches no memory keeps the GPU busy while the CPU enqueues events and replay:
the launch hides behind it. What the launch costs is a figure of its own, :func:`race_eagerly`.
"""

from __future__ import annotations

import functools
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

Step = Callable[[], Any]

FLUSH_BYTES = 256 * 1024 * 1024  # several times the L2 of any GPU sold until now
FEWEST_ROUNDS, MOST_ROUNDS = 7, 60
# About 0.1 ms to launch a graph behind, 1 ms for the many launches of a step that cannot be captured.
SPIN_CYCLES = {"graph": 200_000, "events": 2_000_000}
# Over this, what is left in the cache is no part of the time: one replay per round instead of three.
LONGEST_WARM_MS = 20.0
EAGER_ROUNDS, EAGER_CALLS = 7, 20
# On a CPU, threads of the candidate before spin for a while, each library's own, before they sleep.
REST_SECONDS = 0.003


@dataclass(frozen=True)
class Timing:
    """Milliseconds of one step: median and quartiles over `rounds`, and whether a CUDA graph, events or a clock.

    The `warm` figures leave the caches as the step itself left them; None where they were not taken.
    """

    median: float
    first_quartile: float
    third_quartile: float
    rounds: int
    method: str
    warm: float | None = None
    warm_first_quartile: float | None = None
    warm_third_quartile: float | None = None


@dataclass(frozen=True)
class Race:
    """Timings by name, and for each step that failed while it was timed, why."""

    timings: dict[str, Timing]
    failures: dict[str, str]


def warm_up(step: Step, device: torch.device, runs: int = 3) -> None:
    """Compile, allocate and autotune outside of the timed region.

    Runs on a side stream, which a later graph capture of autograd code asks for: on the stream of that capture, since
    a backward pass runs where its forward ran.
    """
    if device.type != "cuda":
        step()
        return
    stream = _side_stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(runs):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()


@functools.cache
def _side_stream() -> torch.cuda.Stream:
    """The one stream of all warm-ups and captures."""
    return torch.cuda.Stream()


def captured(step: Step, pool: Any) -> tuple[Step, str]:
    """`step` as a CUDA graph's replay, or as it is where it cannot be captured.

    All graphs share one memory pool, or a few candidates that store much would fill the device. That is safe because
    nothing reads what a replay left behind.
    """
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph, pool=pool, stream=_side_stream()):
            step()
    except RuntimeError:
        torch.cuda.synchronize()
        return step, "events"
    return graph.replay, "graph"


def race(
    steps: dict[str, Step], device: torch.device, seconds: float, clock: Callable[[], float] = time.perf_counter
) -> Race:
    """Time all candidates in turns for about `seconds`; every round times each once, in rotated order.

    The steps are already warm. One that fails drops out, the others go on. `clock` is for CPUs alone.
    """
    cold: dict[str, list[float]] = {name: [] for name in steps}
    warm: dict[str, list[float]] = {name: [] for name in steps}
    failures: dict[str, str] = {}
    on_gpu = device.type == "cuda"
    methods = dict.fromkeys(steps, "clock")
    ready = dict(steps)
    if on_gpu:
        pool = None
        flush = torch.empty(FLUSH_BYTES, dtype=torch.int8, device=device)
        for name, step in steps.items():
            # A capture that failed may leave its pool in use; the next ones take another.
            if pool is None:
                pool = torch.cuda.graph_pool_handle()
            ready[name], methods[name] = captured(step, pool)
            if methods[name] == "events":
                pool = None

    def on_events(name: str) -> tuple[float, float | None]:
        cycles = SPIN_CYCLES[methods[name]]
        flush.zero_()
        torch.cuda._sleep(cycles)
        first = _between_events(ready[name])
        if cold[name] and cold[name][-1] > LONGEST_WARM_MS:
            torch.cuda.synchronize()
            return first[0].elapsed_time(first[1]), None
        ready[name]()
        torch.cuda._sleep(cycles)
        second = _between_events(ready[name])
        torch.cuda.synchronize()
        return first[0].elapsed_time(first[1]), second[0].elapsed_time(second[1])

    def on_clock(name: str) -> tuple[float, float | None]:
        time.sleep(REST_SECONDS)
        began = clock()
        ready[name]()
        return (clock() - began) * 1e3, None

    deadline = time.perf_counter() + seconds
    for turn in range(MOST_ROUNDS):
        names = [name for name in steps if name not in failures]
        if not names or (turn >= FEWEST_ROUNDS and time.perf_counter() > deadline):
            break
        shift = turn % len(names)
        for name in names[shift:] + names[:shift]:
            try:
                cold_ms, warm_ms = on_events(name) if on_gpu else on_clock(name)
            except Exception as error:  # out of memory, say: a finding about this one alone
                failures[name] = described(error)
                continue
            cold[name].append(cold_ms)
            if warm_ms is not None:
                warm[name].append(warm_ms)
    timings = {name: _summary(cold[name][1:], warm[name][1:], methods[name]) for name in steps if name not in failures}
    return Race(timings, failures)  # the first round is one more warm-up


def _between_events(step: Step) -> tuple[torch.cuda.Event, torch.cuda.Event]:
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    step()
    end.record()
    return start, end


def described(error: Exception) -> str:
    """One line for a result file."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


def _quartiles(values: list[float]) -> tuple[float, float, float]:
    first, median, third = statistics.quantiles(values, n=4, method="inclusive")
    return median, first, third


def _summary(cold: list[float], warm: list[float], method: str) -> Timing:
    around = _quartiles(warm) if len(warm) > 1 else (None, None, None)
    return Timing(*_quartiles(cold), len(cold), method, *around)


def race_eagerly(steps: dict[str, Step], device: torch.device) -> dict[str, float]:
    """Wall-clock milliseconds of one call among many in a row, no graph: host launch included, medians.

    Where the host is slower than the device, as with small batches, this is the host's time.
    """
    samples: dict[str, list[float]] = {name: [] for name in steps}
    calls = EAGER_CALLS if device.type == "cuda" else 1
    for _ in range(EAGER_ROUNDS):
        for name, step in steps.items():
            _synchronize(device)
            began = time.perf_counter()
            for _ in range(calls):
                step()
            _synchronize(device)
            samples[name].append((time.perf_counter() - began) * 1e3 / calls)
    return {name: statistics.median(values[1:]) for name, values in samples.items()}


def best_seconds(step: Step, device: torch.device, rounds: int = 5, calls: int = 10) -> float:
    """Seconds of one call: the least of a few averages. For ceilings, where the best is what is asked for."""
    warm_up(step, device)
    best = float("inf")
    for _ in range(rounds):
        _synchronize(device)
        began = time.perf_counter()
        for _ in range(calls):
            step()
        _synchronize(device)
        best = min(best, (time.perf_counter() - began) / calls)
    return best


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


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

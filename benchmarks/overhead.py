"""What a MaxSim call costs on the host, from the public function to the kernel launch, in microseconds.

    python -m benchmarks.overhead [--out FILE]

Runs on the CPU, with the launch itself replaced by nothing: what is left is Python's share of a small batch, argument
checks, dispatch, autograd, allocations and the preparation of each launch. On a GPU the driver's own few microseconds
per launch come on top. Kernels compute nothing here, so the results of the calls mean nothing.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

CALLS, ROUNDS = 200, 15


@contextlib.contextmanager
def stubbed_launches() -> Iterator[list[tuple[Any, ...]]]:
    """Every launch of the package does nothing but append its arguments to the list that is given.

    All modules that hold ``jmlr_kernels.launch.launch`` by name get the stub, and the real one back.
    """
    real = importlib.import_module("jmlr_kernels.launch").launch
    made: list[tuple[Any, ...]] = []

    def stub(*arguments: Any) -> None:
        made.append(arguments)

    holders = [
        module
        for name, module in list(sys.modules.items())
        if name.startswith("jmlr_kernels") and getattr(module, "launch", None) is real
    ]
    for module in holders:
        vars(module)["launch"] = stub
    try:
        yield made
    finally:
        for module in holders:
            vars(module)["launch"] = real


def microseconds(call: Callable[[], Any], made: list[tuple[Any, ...]]) -> float:
    """Median over rounds of the mean time of one call."""
    samples = []
    for _ in range(ROUNDS):
        began = time.perf_counter()
        for _ in range(CALLS):
            call()
        samples.append((time.perf_counter() - began) / CALLS * 1e6)
        made.clear()
    return statistics.median(samples[1:])


class _AnyKernel:
    """Stands for a compiled kernel where the package asks what a kernel is specialised on."""

    do_not_specialize: tuple[str, ...] = ()
    arg_names: tuple[str, ...] = ()


_ANY_KERNEL = _AnyKernel()


def _keys(launch: Any, launches: list[tuple[Any, ...]]) -> list[int]:
    return [hash((one[3], one[4], launch._specialization(_ANY_KERNEL, one[2]))) for one in launches]


def measure() -> dict[str, dict[str, float]]:
    """{"forward": {"us": ..., "launches": ...}, ...} for a batch of 32 x 32; the first row is a yardstick."""
    import torch

    import jmlr_kernels

    launch = importlib.import_module("jmlr_kernels.launch")
    queries, documents = (torch.randn(32, length, 128, dtype=torch.float16) for length in (32, 80))
    leaves = [queries.clone().requires_grad_(), documents.clone().requires_grad_()]
    grad = torch.randn(32, 32)

    def score(tensors: list[Any]) -> Any:
        return jmlr_kernels.maxsim(*tensors, backend="triton")

    def step() -> Any:
        return torch.autograd.grad(score(leaves), leaves, grad)

    calls: dict[str, Callable[[], Any]] = {
        "forward": lambda: score([queries, documents]),
        "forward that saves for backward": lambda: score(leaves),
        "forward+backward": step,
    }
    found: dict[str, dict[str, float]] = {}
    with stubbed_launches() as made:
        small = torch.zeros(1)
        found["torch.add of one number"] = {"us": microseconds(lambda: small + small, made), "launches": 0}
        for name, call in calls.items():
            call()
            if not made:
                raise LookupError("no launch of MaxSim goes through jmlr_kernels.launch")
            made.clear()
            call()
            launches = list(made)
            found[name] = {"us": microseconds(call, made), "launches": len(launches)}
            # What the stub leaves out of a launch that is remembered: the key that finds it.
            found[name]["keys_us"] = microseconds(partial(_keys, launch, launches), made)
    return found


def main(arguments: list[str] | None = None) -> int:
    """0; 2 where the package launches its kernels in another way."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--out", type=Path, help="JSON file")
    parser.add_argument("--commit", help="the commit to name where there is no repository")
    options = parser.parse_args(arguments)
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when Triton is first imported: CPU tensors are let through
    try:
        found = measure()
    except (ImportError, AttributeError, LookupError) as error:
        print(f"benchmarks.overhead: launches cannot be replaced: {error}", file=sys.stderr)
        return 2
    for name, numbers in found.items():
        keys = f", launch keys {numbers['keys_us']:.1f} us" if "keys_us" in numbers else ""
        print(f"{name}: {numbers['us']:.1f} us, {numbers['launches']:.0f} launches{keys}")
    if options.out:
        from benchmarks.environment import describe

        options.out.write_text(json.dumps({"environment": describe(options.commit), "host": found}, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())

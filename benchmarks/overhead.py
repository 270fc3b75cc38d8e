"""What a MaxSim call costs on the host, from the public function to the kernel launch, in microseconds.

    python -m benchmarks.overhead [--out FILE]

Runs on the CPU, with the launch itself replaced by nothing: what is left is Python's share of a small batch, argument
checks, dispatch, autograd, allocations and the preparation of each launch. On a GPU the driver's own few microseconds
per launch come on top. Kernels compute nothing here, so the results of the calls mean nothing.

The rows under "dispatch" leave the backend out altogether: public function, checks, autograd, operation. What stands in
for it hands out tensors, and its time is subtracted. Times are of this thread's processor, which a busy machine hardly
changes.
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
        began = time.thread_time()
        for _ in range(CALLS):
            call()
        samples.append((time.thread_time() - began) / CALLS * 1e6)
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


def measure_dispatch() -> dict[str, dict[str, float]]:
    """{"maxsim, forward with gradients": {"us": ...}, ...} without the backend; the first row is a yardstick."""
    import torch

    import jmlr_kernels
    from jmlr_kernels import ops

    def leaf(*shape: int) -> Any:
        return torch.randn(*shape, requires_grad=True)

    q, d, heads = leaf(2, 4, 32), leaf(3, 8, 32), (leaf(1, 8, 2, 32), leaf(1, 8, 2, 32), leaf(1, 8, 2, 32))
    nothing = torch.zeros(0)
    made = {
        "maxsim_forward": (torch.zeros(2, 3), torch.zeros(2, 3, 4, dtype=torch.uint8), nothing, nothing),
        "maxsim_backward": (torch.zeros_like(q), torch.zeros_like(d), nothing),
        "shifted_attention_forward": (torch.zeros_like(heads[0]), torch.zeros(1, 2, 8)),
        "shifted_attention_backward": tuple(torch.zeros_like(one) for one in heads),
    }
    stand_ins = {
        name: lambda *_, results=results: tuple([one.detach() for one in results]) for name, results in made.items()
    }

    class Bare(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, queries: Any, documents: Any) -> Any:
            ctx.save_for_backward(queries, documents)
            return nothing.detach()

        @staticmethod
        def backward(ctx: Any, grad: Any) -> Any:
            return made["maxsim_backward"][:2]

    def maxsim() -> Any:
        return jmlr_kernels.maxsim(q, d)

    def attention() -> Any:
        return jmlr_kernels.shifted_sparse_attention(*heads, 4)

    def without_gradients(call: Callable[[], Any]) -> Any:
        with torch.no_grad():
            return call()

    def backward(call: Callable[[], Any], leaves: tuple[Any, ...], grad: Any) -> Any:
        return torch.autograd.grad(call(), leaves, grad)

    real = ops._implementation
    vars(ops)["_implementation"] = lambda name, backend: stand_ins[name]
    try:
        found = {"an autograd.Function that does nothing": microseconds(lambda: Bare.apply(q, d), [])}
        for family, call, leaves, name in (
            ("maxsim", maxsim, (q, d), "maxsim"),
            ("attention", attention, heads, "shifted_attention"),
        ):
            forward, grad = microseconds(stand_ins[f"{name}_forward"], []), made[f"{name}_forward"][0]
            both = forward + microseconds(stand_ins[f"{name}_backward"], [])
            found[f"{family}, forward"] = microseconds(partial(without_gradients, call), []) - forward
            found[f"{family}, forward with gradients"] = microseconds(call, []) - forward
            found[f"{family}, forward and backward"] = microseconds(partial(backward, call, leaves, grad), []) - both
    finally:
        vars(ops)["_implementation"] = real
    return {name: {"us": us} for name, us in found.items()}


def main(arguments: list[str] | None = None) -> int:
    """0; 2 where the package launches its kernels in another way."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--out", type=Path, help="JSON file")
    parser.add_argument("--commit", help="the commit to name where there is no repository")
    options = parser.parse_args(arguments)
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when Triton is first imported: CPU tensors are let through
    try:
        found, dispatch = measure(), measure_dispatch()
    except (ImportError, AttributeError, LookupError) as error:
        print(f"benchmarks.overhead: launches cannot be replaced: {error}", file=sys.stderr)
        return 2
    for name, numbers in found.items():
        keys = f", launch keys {numbers['keys_us']:.1f} us" if "keys_us" in numbers else ""
        print(f"{name}: {numbers['us']:.1f} us, {numbers['launches']:.0f} launches{keys}")
    for name, numbers in dispatch.items():
        print(f"dispatch: {name}: {numbers['us']:.1f} us")
    if options.out:
        from benchmarks.environment import describe

        report = {"environment": describe(options.commit), "host": found, "dispatch": dispatch}
        options.out.write_text(json.dumps(report, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Tiles for the kernels of compute capability 9.0, searched by arithmetic: registers, shared memory, cycles of units.

    python -m tools.hopper_tiles [--kernel attention-forward] [--dimension 128] [--top 10]

For each kernel it lists the tiles that fit a multiprocessor, the least predicted time first, and marks the choice of
csrc/<family>/sm90_tiles.h. No GPU is needed, and nothing here is a measurement: `tools.tune_hopper` times the best of
these on a GPU. What a multiprocessor does in a clock cycle is NVIDIA's documentation for compute capability 9.0; units
are taken to overlap perfectly, so a predicted time is a bound from below. tests/host_build/test_hopper_choices.py holds
the choices to what fits here.
"""

from __future__ import annotations

import argparse
import itertools
import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]

SHARED_LIMIT = 227 * 1024
REGISTERS = 65536
CLOCK = 1.755e9  # of an H100 or H200 under load
PROCESSORS = 132
# Per multiprocessor and cycle: multiply-adds of 16-bit numbers, float operations (a multiply-add is one), comparisons
# and maxima and selections, exponentials, bytes of shared memory; bytes from the L2 cache are an assumption
# (benchmarks/roofline.py).
MULTIPLY_ADDS = 2048
FLOATS, LOGIC, EXPONENTIALS, ISSUED = 128, 64, 16, 128
SHARED_BYTES = 128
# What a step costs beside: waiting for a stage, filling and draining the tensor cores. A guess, the same for all tiles,
# so that of equals the larger come first.
STEP_CYCLES = 100
L2_BYTES = 5.5e12 / PROCESSORS / CLOCK


@dataclass(frozen=True)
class Estimate:
    """What tiles need, and the cycles that each unit of a multiprocessor works on one step of the kernel's loop.

    `useful` are the multiply-adds of the step that nothing is wasted of, in cycles of the tensor cores. `registers`
    are those of a consumer's thread that the algorithm itself needs; `granted` is what it has.
    """

    registers: int
    granted: int
    shared: int
    cycles: dict[str, float]
    useful: float

    @property
    def feasible(self) -> bool:
        return self.registers <= self.granted and self.shared <= SHARED_LIMIT

    @property
    def bound(self) -> str:
        return max(self.cycles, key=lambda unit: self.cycles[unit])

    @property
    def share(self) -> float:
        """Of the tensor cores' rate, if units overlap perfectly."""
        return self.useful / (max(self.cycles.values()) + STEP_CYCLES)


def granted_registers(consumers: int) -> int:
    """Of a consumer's thread, beside a producer warpgroup: hopper.h's hand-over, as the kernels do it."""
    return {1: 240, 2: 240, 3: 160}[consumers]


def _products(rows: int, columns: int, inner: int, a_in_registers: bool) -> tuple[float, float]:
    """Cycles of the tensor cores, and bytes of shared memory that they read, for rows x columns x inner."""
    steps = rows / 64 * inner / 16
    return rows * columns * inner / MULTIPLY_ADDS, steps * (columns * 32 + (0 if a_in_registers else 64 * 32))


# What each thread holds beside accumulators and operands: addresses, counters, barriers, maxima and sums of its rows.
BOOKKEEPING = 40


def attention_forward(dimension: int, tiles: dict[str, int]) -> Estimate:
    """A step: one tile of keys for all queries of a block."""
    groups, keys, stages = tiles["warpgroups"], tiles["keys"], tiles["stages"]
    queries = groups * 64
    scores, read_scores = _products(queries, keys, dimension, False)
    values, read_values = _products(queries, dimension, keys, True)
    elements = queries * keys
    incoming = 2 * keys * dimension * 2
    from_cache = incoming / 2 if tiles["pair_heads"] else incoming  # where query heads share a kv head
    cycles = {
        "products": scores + values,
        "shared": (read_scores + read_values + incoming) / SHARED_BYTES,
        "exponentials": elements / EXPONENTIALS,
        "logic": elements / LOGIC,  # the maximum
        "floats": 2 * elements / FLOATS,  # scale and subtract, sum
        "issue": 4.5 * elements / ISSUED,  # and half a conversion
        "L2": from_cache / L2_BYTES,
    }
    # Output, scores of two tiles while they overlap, weights as operands.
    registers = dimension // 2 + keys // 2 + keys // 4 + BOOKKEEPING
    own = queries * dimension * 2 if tiles["own_output"] else 0
    shared = queries * dimension * 2 + own + stages * incoming + 1024
    return Estimate(registers, granted_registers(groups), shared, cycles, scores + values)


def maxsim_forward(dimension: int, tiles: dict[str, int]) -> Estimate:
    """A step: one tile of tokens for all query rows of a block; rows in turns take two tiles in the time of one."""
    groups, row_tiles, tokens, stages = (tiles[name] for name in ("groups", "row_tiles", "tokens", "stages"))
    rows = groups * row_tiles * 64
    products, read = _products(rows, tokens, dimension, True)
    elements = rows * tokens
    incoming = tokens * dimension * 2 * (groups if tiles["in_turns"] else 1)
    find = {"floats": 2.0, "logic": 1.0} if tiles["by_sums"] else {"floats": 0.0, "logic": 3.0}
    cycles = {
        "products": products,
        "shared": (read + incoming) / SHARED_BYTES,
        "logic": elements * find["logic"] / LOGIC,
        "floats": elements * find["floats"] / FLOATS,
        "issue": elements * sum(find.values()) / ISSUED,
        "L2": incoming / L2_BYTES,
    }
    registers = row_tiles * (dimension // 4 + tokens // 2) + BOOKKEEPING
    shared = stages * tokens * dimension * 2 + 8 * 1024
    return Estimate(registers, granted_registers(groups), shared, cycles, products)


def attention_backward_dq(dimension: int, tiles: dict[str, int]) -> Estimate:
    """A step: one tile of keys for all queries of a block."""
    groups, keys, stages = tiles["warpgroups"], tiles["streamed"], tiles["stages"]
    queries = groups * 64
    own = bool(tiles["own_in_registers"])
    scores, read_scores = _products(queries, keys, dimension, own)
    sums, read_sums = _products(queries, dimension, keys, True)
    elements = queries * keys
    incoming = 2 * keys * dimension * 2
    cycles = {
        "products": 2 * scores + sums,
        "shared": (2 * read_scores + read_sums + incoming) / SHARED_BYTES,
        "exponentials": elements / EXPONENTIALS,
        "floats": 3 * elements / FLOATS,
        "issue": 5 * elements / ISSUED,
        "L2": incoming / L2_BYTES,
    }
    # dq, scores and gradients of weights, which become operands in place; the own rows of both products.
    registers = dimension // 2 + 2 * keys // 2 + own * 2 * dimension // 4 + BOOKKEEPING
    shared = tiles["buffers"] * 2 * queries * dimension * 2 + stages * incoming + 1024
    # Scores and gradients of weights are computed a second time for the other kernel: useful is what one of them needs.
    return Estimate(registers, granted_registers(groups), shared, cycles, sums + scores)


def attention_backward_dkdv(dimension: int, tiles: dict[str, int]) -> Estimate:
    """A step: one tile of queries for all keys of a block."""
    groups, queries, stages = tiles["warpgroups"], tiles["streamed"], tiles["stages"]
    keys = groups * 64
    own = bool(tiles["own_in_registers"])
    scores, read_scores = _products(keys, queries, dimension, own)
    sums, read_sums = _products(keys, dimension, queries, True)
    elements = queries * keys
    incoming = 2 * queries * dimension * 2 + 2 * queries * 4
    cycles = {
        "products": 2 * scores + 2 * sums,
        "shared": (2 * read_scores + 2 * read_sums + incoming + 2 * elements * 4 / 8) / SHARED_BYTES,
        "exponentials": elements / EXPONENTIALS,
        "floats": 3 * elements / FLOATS,
        "issue": 5.5 * elements / ISSUED,
        "L2": incoming / L2_BYTES,
    }
    # dk and dv, both kinds of scores, and where a tile's last product runs on, its operand; the own rows.
    registers = 2 * dimension // 2 + 2 * queries // 2 + tiles["carry"] * queries // 4 + own * 2 * dimension // 4
    registers += BOOKKEEPING
    shared = tiles["buffers"] * 2 * keys * dimension * 2 + stages * incoming + 1024
    return Estimate(registers, granted_registers(groups), shared, cycles, 2 * sums + scores)


# Instructions of a warp for each winner of d(documents), two rows at a time, counted in the listing; the latency of the
# L2 cache in cycles is a guess.
_INSTRUCTIONS_A_ROW, _ROWS_A_STEP, _LATENCY = 25, 64, 700


def maxsim_backward(dimension: int, tiles: dict[str, int]) -> Estimate:
    """A step: 64 rows gathered for d(documents). What bounds it is the L2 cache; `share` is of its rate."""
    warps, blocks = tiles["warps"], tiles["min_blocks"]
    row = dimension * 2
    groups = warps * 32 // (row // 16)
    under_way = blocks * groups * tiles["rows_under_way"]
    cycles = {
        "L2": _ROWS_A_STEP * row / L2_BYTES,
        "issue": _ROWS_A_STEP * _INSTRUCTIONS_A_ROW * 32 / ISSUED,
        "latency": _ROWS_A_STEP * _LATENCY / under_way,
    }
    registers = tiles["rows_under_way"] * 4 + 8 + BOOKKEEPING
    granted = min(REGISTERS // (warps * 32 * blocks) // 8 * 8, 255)
    shared = groups * dimension * 4 + tiles["gradients"] * 4 + warps * tiles["tokens"] * 2 + tiles["rows"] * 2
    shared += tiles["tokens"] * 4 + 2048
    return Estimate(registers, granted, blocks * shared, cycles, cycles["L2"])


@dataclass(frozen=True)
class Kernel:
    """A kernel whose tiles are searched: the struct of its tiles in C++, the call that chooses, what may be chosen."""

    family: str
    choice: str  # the C++ expression, of `dimension`
    fields: dict[str, tuple[int, ...]]
    estimate: Callable[[int, dict[str, int]], Estimate]
    macro: str
    dimensions: tuple[int, ...] = (64, 128)
    header: str = "sm90_tiles.h"

    def candidates(self) -> Iterator[dict[str, int]]:
        for values in itertools.product(*self.fields.values()):
            yield dict(zip(self.fields, values, strict=True))


_BACKWARD = {
    "warpgroups": (2, 3),
    "streamed": (32, 64, 96, 128),
    "stages": (2, 3, 4, 6),
    "buffers": (2, 1),
    "carry": (1, 0),
    "own_in_registers": (1, 0),
}

KERNELS: dict[str, Kernel] = {
    "attention-forward": Kernel(
        "shifted_attention",
        "forward_tiles({dimension})",
        {
            "warpgroups": (2, 3),
            "keys": (64, 96, 128, 160, 192),
            "stages": (2, 3, 4),
            "take_turns": (1, 0),
            "own_output": (1, 0),
            "pair_heads": (1, 0),
        },
        attention_forward,
        "JMLR_TUNE_ATTENTION_FORWARD",
    ),
    "attention-backward-dq": Kernel(
        "shifted_attention",
        "backward_dq_tiles({dimension})",
        _BACKWARD,
        attention_backward_dq,
        "JMLR_TUNE_ATTENTION_BACKWARD_DQ",
    ),
    "attention-backward-dkdv": Kernel(
        "shifted_attention",
        "backward_dkdv_tiles({dimension})",
        _BACKWARD,
        attention_backward_dkdv,
        "JMLR_TUNE_ATTENTION_BACKWARD_DKDV",
    ),
    "maxsim-forward": Kernel(
        "maxsim",
        "forward_tiles({dimension}, Sharing::many)",
        {
            "groups": (2, 3),
            "row_tiles": (1, 2),
            "in_turns": (0,),
            "tokens": (64, 128),
            "box": (64,),
            "step": (16,),
            "stages": (4, 6, 8),
            "ordered": (1, 0),
            "by_sums": (1, 0),
        },
        maxsim_forward,
        "JMLR_TUNE_MAXSIM_FORWARD",
    ),
    "maxsim-backward": Kernel(
        "maxsim",
        "backward_tiles(2, {dimension}, false)",
        {
            "warps": (16, 8, 32),
            "rows_under_way": (2, 4, 6, 8),
            "min_blocks": (1, 2, 3, 4),
            "tokens": (512, 256),
            "rows": (16384,),
            "gradients": (2048,),
        },
        maxsim_backward,
        "JMLR_TUNE_MAXSIM_BACKWARD",
        header="sm90_backward_tiles.h",
    ),
}


def search(kernel: Kernel, dimension: int) -> list[tuple[dict[str, int], Estimate]]:
    """All tiles that fit, the best predicted share of the limiting rate first, then the most stages."""
    found = [(tiles, kernel.estimate(dimension, tiles)) for tiles in kernel.candidates()]
    fitting = [(tiles, estimate) for tiles, estimate in found if estimate.feasible]
    return sorted(fitting, key=lambda pair: (-round(pair[1].share, 3), -pair[0].get("stages", 0)))


@cache
def chosen() -> dict[str, dict[int, dict[str, int]]]:
    """What the C++ functions answer, by kernel and dimension.

    Raises:
        RuntimeError: there is no C++ compiler, or it does not take the headers.
    """
    with tempfile.TemporaryDirectory() as scratch:
        source, program = Path(scratch, "choices.cpp"), Path(scratch, "choices")
        source.write_text(_program())
        command = [shutil.which("g++") or "g++", "-std=c++17", f"-I{ROOT / 'csrc'}", str(source), "-o", str(program)]
        try:
            subprocess.run(command, capture_output=True, text=True, check=True)
            printed = subprocess.run([program], capture_output=True, text=True, check=True).stdout
        except (OSError, subprocess.CalledProcessError) as error:
            raise RuntimeError(f"the tiles' headers do not compile: {getattr(error, 'stderr', '') or error}") from error
    rows = [json.loads(line) for line in printed.splitlines()]
    return {name: {row["dimension"]: row["tiles"] for row in rows if row["kernel"] == name} for name in KERNELS}


def _program() -> str:
    """Prints a line of JSON for each kernel and dimension."""
    headers = sorted({f"{kernel.family}/{kernel.header}" for kernel in KERNELS.values()})
    lines = ["#include <cstdio>", *(f'#include "{header}"' for header in headers), "int main() {"]
    for name, kernel in KERNELS.items():
        for dimension in kernel.dimensions:
            form = ", ".join(f'\\"{field}\\": %d' for field in kernel.fields)
            values = ", ".join(f"int(tiles.{field})" for field in kernel.fields)
            head = f'{{\\"kernel\\": \\"{name}\\", \\"dimension\\": {dimension}, \\"tiles\\": {{{form}}}}}\\n'
            lines += ["{", f"using namespace jmlr::{kernel.family}::sm90;"]
            lines += [f"constexpr auto tiles = {kernel.choice.format(dimension=dimension)};"]
            lines += [f'std::printf("{head}", {values});', "}"]
    return "\n".join([*lines, "}", ""])


def table(name: str, dimension: int, top: int) -> Iterator[str]:
    kernel = KERNELS[name]
    fitting = search(kernel, dimension)
    choice = chosen()[name][dimension]
    yield f"{name}, dimension {dimension}: {len(fitting)} of {sum(1 for _ in kernel.candidates())} tiles fit"
    limit = "L2 gives" if name == "maxsim-backward" else "the tensor cores do"
    shown = fitting[:top] + [pair for pair in fitting[top:] if pair[0] == choice]
    for tiles, estimate in shown:
        units = ", ".join(f"{unit} {cycles:.0f}" for unit, cycles in estimate.cycles.items())
        mark = "*" if tiles == choice else " "
        yield (
            f"{mark} {' '.join(f'{field}={value}' for field, value in tiles.items())}: {estimate.registers} of"
            f" {estimate.granted} registers, {estimate.shared / 1024:.0f} KB, at most {estimate.share:.0%} of what"
            f" {limit}, bound by {estimate.bound} ({units})"
        )


def main(arguments: list[str] | None = None) -> int:
    """Print the tables; 1 where a choice does not fit, 2 where choices cannot be read."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--kernel", choices=KERNELS, help="one kernel (default: all)")
    parser.add_argument("--dimension", type=int, help="one head dimension or embedding (default: all)")
    parser.add_argument("--top", type=int, default=8, help="tiles to list of each (default: %(default)s)")
    options = parser.parse_args(arguments)
    try:
        choices = chosen()
    except RuntimeError as error:
        print(f"tools.hopper_tiles: {error}", file=sys.stderr)
        return 2
    unfit = []
    for name in [options.kernel] if options.kernel else KERNELS:
        for dimension in KERNELS[name].dimensions:
            if options.dimension in (None, dimension):
                print("\n".join(table(name, dimension, options.top)) + "\n")
                if not KERNELS[name].estimate(dimension, choices[name][dimension]).feasible:
                    unfit.append(f"{name} at {dimension}")
    print(f"choices that do not fit: {', '.join(unfit) or 'none'}")
    return 1 if unfit else 0


if __name__ == "__main__":
    sys.exit(main())

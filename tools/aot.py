"""Compile every Triton configuration of the package ahead of time and read what the compiler made of it.

No GPU is needed: Triton lowers a kernel to machine code for a named chip, and the `cuobjdump` that it carries reads
registers and stack from the result. A configuration fails

* when it needs more shared memory (or, on sm_100, tensor memory) than a block of the chip may have,
* when it keeps anything on the stack: a spilled register, or an array that the compiler could not place,
* when it must use Hopper's asynchronous matrix instruction (`wants_wgmma`) and the sm_90 code has none,
* when hardly a register is used: the compiler took the body for unreachable and left no code,
* when it does not compile.

A module takes part by a function ``configurations(capability) -> list[dict]`` with the keys ``name``, ``kernel`` (the
``@triton.jit`` function), ``signature`` (argument -> Triton type or "constexpr"), ``constexprs``, ``options``
(``num_warps``, ``num_stages``, ...) and ``wants_wgmma``.

    python -m tools.aot [--capability 90] [--match NAME] [--loops] [--json FILE]
"""

from __future__ import annotations

import argparse
import importlib
import json
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from tools.machine_code import disassemble, innermost_product_loop

MODULES = (
    "jmlr_kernels.shifted_attention.aot",
    "jmlr_kernels.maxsim.aot",
    "jmlr_kernels.maxsim.aot_quantized",
    "jmlr_kernels.maxsim.aot_smooth",
)
CAPABILITIES = (80, 90, 100)

# The most shared memory of one block, by CUDA's programming guide (table of compute capabilities).
SHARED_LIMIT = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}
FEWEST_REGISTERS = 16  # addresses and bounds alone take more
TENSOR_MEMORY_COLUMNS = 512

_RESOURCES = re.compile(r"REG:(\d+)\s+STACK:(\d+)\s+SHARED:(\d+)\s+LOCAL:(\d+)")


@dataclass
class Report:
    """What the compiler made of one configuration on one chip; `problems` is empty when nothing is wrong."""

    module: str
    name: str
    kernel: str
    capability: int
    seconds: float = 0.0
    shared_bytes: int = 0
    registers: int = 0
    stack_bytes: int = 0
    wgmma: bool = False
    loop_instructions: int | None = None
    problems: list[str] = field(default_factory=list)


def resource_usage(cubin: bytes) -> tuple[int, int]:
    """Registers per thread and bytes of stack (spills and local arrays) per thread of a compiled kernel.

    Raises:
        RuntimeError: the disassembler is missing, failed, or printed no resource line.
    """
    from triton import knobs

    tool = knobs.nvidia.cuobjdump.path
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "kernel.cubin")
        path.write_bytes(cubin)
        run = subprocess.run([tool, "-res-usage", str(path)], capture_output=True, text=True)
    found = _RESOURCES.findall(run.stdout + run.stderr)
    if not found:
        raise RuntimeError(f"cuobjdump told no resource usage: {(run.stderr or run.stdout).strip()[:300]}")
    registers, stack, _, local = (max(int(row[column]) for row in found) for column in range(4))
    return registers, max(stack, local)


def compile_one(module: str, index: int, capability: int, loops: bool = False) -> Report:
    """Compile configuration `index` of `module` for one chip; with `loops`, count instructions too."""
    os.environ.pop("TRITON_INTERPRET", None)
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    configuration: dict[str, Any] = importlib.import_module(module).configurations(capability)[index]
    report = Report(module, configuration["name"], configuration["kernel"].__name__, capability)
    started = time.perf_counter()
    try:
        source = ASTSource(
            fn=configuration["kernel"],
            signature=configuration["signature"],
            constexprs=configuration["constexprs"],
            attrs=configuration.get("attrs"),
        )
        compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=configuration["options"])
        report.registers, report.stack_bytes = resource_usage(compiled.asm["cubin"])
        if loops:
            report.loop_instructions = innermost_product_loop(disassemble(compiled.asm["cubin"]))
    except Exception as error:  # whatever the compiler raises is the finding
        text = " ".join(str(error).split())
        report.problems.append(f"does not compile: {type(error).__name__}: {text[:80]} ... {text[-320:]}")
        return report
    finally:
        report.seconds = round(time.perf_counter() - started, 2)
    report.shared_bytes = compiled.metadata.shared
    report.wgmma = "wgmma.mma_async" in compiled.asm["ptx"]
    if report.shared_bytes > SHARED_LIMIT[capability]:
        report.problems.append(f"{report.shared_bytes} bytes of shared memory, the chip has {SHARED_LIMIT[capability]}")
    columns = getattr(compiled.metadata, "tmem_size", None) or 0
    if columns > TENSOR_MEMORY_COLUMNS:
        report.problems.append(f"{columns} columns of tensor memory, the chip has {TENSOR_MEMORY_COLUMNS}")
    if report.registers < FEWEST_REGISTERS:
        report.problems.append(f"{report.registers} registers: the compiler left no code of it")
    if report.stack_bytes > 0:
        report.problems.append(f"{report.stack_bytes} bytes of stack per thread: registers spill or an array is local")
    if capability == 90 and configuration["wants_wgmma"] and not report.wgmma:
        report.problems.append("no wgmma in the sm_90 code: the matrix product fell back to mma.sync or to no tile")
    return report


def collect(modules: list[str], capabilities: list[int], match: str) -> list[tuple[str, int, int]]:
    """Every (module, index, capability) to compile.

    Raises:
        ValueError: a module lists no configuration, two under one name, or none whose name holds `match`.
    """
    jobs = []
    for module in modules:
        for capability in capabilities:
            names = [
                configuration["name"] for configuration in importlib.import_module(module).configurations(capability)
            ]
            if not names:
                raise ValueError(
                    f"{module}: no configuration for sm_{capability}; list every kernel that it can launch"
                )
            if len(set(names)) != len(names):
                twice = sorted({name for name in names if names.count(name) > 1})
                raise ValueError(f"{module}: two configurations named {', '.join(twice[:3])}; give each its own name")
            jobs += [(module, index, capability) for index, name in enumerate(names) if match in name]
    if not jobs:
        raise ValueError(f"no configuration has {match!r} in its name; run without --match to see the names")
    return jobs


def print_table(reports: list[Report]) -> None:
    """One line for each kernel and chip: the most that any of its configurations takes."""
    kernels: dict[tuple[str, int], list[Report]] = {}
    for report in reports:
        kernels.setdefault((report.kernel, report.capability), []).append(report)
    width = max(len(kernel) for kernel, _ in kernels)
    print(f"{'kernel':<{width}}  chip    configurations  most shared  most registers  with wgmma  failing  seconds")
    for (kernel, capability), group in kernels.items():
        print(
            f"{kernel:<{width}}  sm_{capability:<4}{len(group):>15}  {max(row.shared_bytes for row in group):>11}"
            f"  {max(row.registers for row in group):>14}  {sum(row.wgmma for row in group):>10}"
            f"  {sum(bool(row.problems) for row in group):>7}  {sum(row.seconds for row in group):>7.0f}"
        )


def compile_all(jobs: list[tuple[str, int, int]], processes: int, loops: bool) -> list[Report]:
    """Compile in `processes` processes, in the order of the jobs, with a line of progress every minute."""
    reports: list[Report] = []
    told = time.perf_counter()
    with ProcessPoolExecutor(processes, mp_context=multiprocessing.get_context("spawn")) as pool:
        for report in pool.map(partial(compile_one, loops=loops), *zip(*jobs, strict=True), chunksize=4):
            reports.append(report)
            if time.perf_counter() - told > 60:
                told = time.perf_counter()
                print(f"{len(reports)} of {len(jobs)} compiled", flush=True)
    return reports


def main(arguments: list[str] | None = None) -> int:
    """Compile, print the table, return 1 when any configuration fails and 2 when the request makes no sense."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--module", action="append", help="module with configurations(); repeatable (default: all)")
    parser.add_argument("--capability", action="append", type=int, choices=CAPABILITIES, help="chip (default: all)")
    parser.add_argument("--match", default="", help="only configurations with this in their name")
    parser.add_argument("--loops", action="store_true", help="count the innermost matrix-product loop's instructions")
    parser.add_argument("--json", type=Path, help="write every configuration's resources here")
    parser.add_argument("--processes", type=int, default=min(2, os.cpu_count() or 1))
    options = parser.parse_args(arguments)

    # The interpreter replaces the compiler, and is chosen when triton is first imported: here and in the children.
    os.environ.pop("TRITON_INTERPRET", None)
    try:
        jobs = collect(options.module or list(MODULES), options.capability or list(CAPABILITIES), options.match)
    except ImportError as error:
        print(f"tools.aot: a module with configurations cannot be imported: {error}", file=sys.stderr)
        return 2
    except ValueError as error:
        print(f"tools.aot: {error}", file=sys.stderr)
        return 2
    started = time.perf_counter()
    reports = compile_all(jobs, options.processes, options.loops)
    print_table(reports)
    for report in reports if options.loops else []:
        if report.loop_instructions:
            print(f"{report.loop_instructions} instructions in the loop of {report.name} on sm_{report.capability}")
    if options.json:
        import triton

        options.json.parent.mkdir(parents=True, exist_ok=True)
        rows = {"triton": triton.__version__, "configurations": [asdict(report) for report in reports]}
        options.json.write_text(json.dumps(rows, indent=1) + "\n")
    failed = [report for report in reports if report.problems]
    for report in failed:
        print(f"FAILS {report.name} on sm_{report.capability}: {'; '.join(report.problems)}")
    seconds = time.perf_counter() - started
    print(f"{len(reports)} compiled ahead of time in {seconds:.0f} s, {len(failed)} of them failing")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())

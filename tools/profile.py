"""What limits a kernel, by Nsight Compute's counters: matrix units, L2 cache, memory, or waiting.

Runs ours and the strongest peer under ``ncu`` and writes for each kernel launch its time, the bytes through L2 and
device memory, how busy the matrix units were and what its warps waited for.

MaxSim, beside late-interaction-kernels: the forward of 128 x 128 and forward and backward of B = 256 (32 query tokens,
300 document tokens). The hypothesis under test: libraries that give each (query, document) pair a program of its own
re-read every document from L2 once per query and are limited by that; tiles of several queries are not. Attention,
beside two calls of torch's variable-length attention: forward and backward of 16k tokens in groups of 1024. The
question there is how busy the matrix units are in either, and what warps wait for at the edges of short groups.

    python -m tools.profile [attention] [maxsim] [--out FILE] [--ncu PATH] [--budget 120] [--dry-run]

Needs a GPU, ``ncu`` on PATH, and the right to read performance counters (as root, or by the driver's setting).
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.attention_cases import AttentionCase
from benchmarks.candidate import BACKWARD, FORWARD, STEP
from benchmarks.environment import ROOT, describe, folder_name
from benchmarks.maxsim_cases import MaxSimCase
from tools.gpu_table import align

# By operation: who is profiled, and the shape of each step.
CANDIDATES = {"maxsim": ("jmlr", "late-interaction-kernels"), "attention": ("jmlr", "varlen")}
CASES: dict[str, dict[str, Any]] = {
    "maxsim": {
        FORWARD: MaxSimCase(128, 128, 32, 300, backward=False),
        STEP: MaxSimCase(256, 256, 32, 300, backward=True),
    },
    "attention": dict.fromkeys((FORWARD, BACKWARD), AttentionCase(4096, 1024, kv_heads=8, batch=4)),
}

TIME = "gpu__time_duration.sum"
L2_BYTES, L2_SHARE = "lts__t_bytes.sum", "lts__throughput.avg.pct_of_peak_sustained_elapsed"
MEMORY_BYTES, MEMORY_SHARE = "dram__bytes.sum", "dram__throughput.avg.pct_of_peak_sustained_elapsed"
# Chips name their matrix pipe differently; those that this one lacks are not asked for.
MATRIX_SHARES = (
    "sm__pipe_tensor_cycles_active.avg.pct_of_peak_sustained_active",
    "sm__inst_executed_pipe_tensor.avg.pct_of_peak_sustained_active",
    "sm__pipe_tensor_op_hmma_cycles_active.avg.pct_of_peak_sustained_active",
    "sm__inst_executed_pipe_tensor_op_gmma.avg.pct_of_peak_sustained_active",
    "sm__inst_executed_pipe_tensor_op_hmma.avg.pct_of_peak_sustained_active",
)
ALU_SHARE = "sm__inst_executed_pipe_alu.avg.pct_of_peak_sustained_active"
ISSUE_SHARE = "sm__issue_active.avg.pct_of_peak_sustained_elapsed"
STALL = "smsp__average_warps_issue_stalled_{}_per_issue_active.ratio"
STALLS = (
    "barrier",
    "gmma",
    "lg_throttle",
    "long_scoreboard",
    "math_pipe_throttle",
    "mio_throttle",
    "no_instruction",
    "not_selected",
    "short_scoreboard",
    "sleeping",
    "wait",
)
METRICS = (
    TIME,
    L2_BYTES,
    L2_SHARE,
    MEMORY_BYTES,
    MEMORY_SHARE,
    *MATRIX_SHARES,
    ALU_SHARE,
    ISSUE_SHARE,
    *(STALL.format(reason) for reason in STALLS),
)


def parse(text: str) -> list[dict[str, Any]]:
    """Kernel launches out of ``ncu --csv --page raw --print-units base``: {"kernel": name, metric: number, ...}.

    Lines before the heading are ncu's own messages, the line after it holds units. What is no number is left out.
    """
    lines = text.splitlines()
    heading = next((position for position, line in enumerate(lines) if line.startswith('"ID"')), None)
    if heading is None:
        return []
    launches = []
    for row in csv.DictReader(lines[heading:]):
        if not (row["ID"] or "").isdigit() or row.get("Kernel Name") is None:
            continue  # the units, and ncu's last words
        launch: dict[str, Any] = {"kernel": row["Kernel Name"]}
        for name, value in row.items():
            if name in METRICS and value:
                try:
                    launch[name] = float(value.replace(",", ""))
                except ValueError:
                    continue  # "n/a" where the chip lacks a counter
        launches.append(launch)
    return launches


def judge(launch: dict[str, Any]) -> dict[str, Any]:
    """Rates, shares and a verdict for one launch; None where a counter is missing."""
    seconds = launch.get(TIME, 0.0) * 1e-9
    matrix = max((launch[name] for name in MATRIX_SHARES if name in launch), default=None)
    stalls = {reason: launch[STALL.format(reason)] for reason in STALLS if STALL.format(reason) in launch}
    judged = {
        "kernel": launch["kernel"],
        "microseconds": seconds * 1e6,
        "l2_bytes_per_second": launch[L2_BYTES] / seconds if seconds and L2_BYTES in launch else None,
        "l2_percent": launch.get(L2_SHARE),
        "memory_bytes_per_second": launch[MEMORY_BYTES] / seconds if seconds and MEMORY_BYTES in launch else None,
        "memory_percent": launch.get(MEMORY_SHARE),
        "matrix_percent": matrix,
        "alu_percent": launch.get(ALU_SHARE),
        "issue_percent": launch.get(ISSUE_SHARE),
        "stalls": dict(sorted(stalls.items(), key=lambda item: -item[1])[:3]),
    }
    shares = {
        "matrix units": matrix,
        "L2": launch.get(L2_SHARE),
        "memory": launch.get(MEMORY_SHARE),
        "ALU": launch.get(ALU_SHARE),
    }
    known = {name: share for name, share in shares.items() if share is not None}
    busiest = max(known, key=lambda name: known[name]) if known else None
    # Nsight's own rule: a unit over 60 % of its peak is what limits a kernel, below that it waits.
    judged["verdict"] = "unknown" if busiest is None else busiest if known[busiest] >= 60 else "latency"
    return judged


def table(results: dict[str, list[dict[str, Any]]]) -> str:
    """One row per launch that takes a notable share of its step."""
    rows = [["step: kernel", "us", "L2 TB/s", "L2 %", "DRAM %", "matrix %", "ALU %", "limited by", "first stall"]]
    for name, launches in results.items():
        longest = max((launch["microseconds"] for launch in launches), default=0.0)
        for launch in launches:
            if launch["microseconds"] < 0.02 * longest:
                continue
            rate = launch["l2_bytes_per_second"]
            numbers = [launch[key] for key in ("l2_percent", "memory_percent", "matrix_percent", "alu_percent")]
            rows.append(
                [
                    f"{name}: {launch['kernel'][:48]}",
                    f"{launch['microseconds']:.1f}",
                    "-" if rate is None else f"{rate / 1e12:.2f}",
                    *("-" if number is None else f"{number:.0f}" for number in numbers),
                    launch["verdict"],
                    next(iter(launch["stalls"]), "-"),
                ]
            )
    return align(rows)


def available(ncu: str, metrics: tuple[str, ...]) -> list[str]:
    """The metrics whose counter this chip has; all of them when ncu cannot say."""
    asked = subprocess.run([ncu, "--query-metrics"], capture_output=True, text=True, timeout=60)
    known = {line.split()[0] for line in asked.stdout.splitlines() if line.strip()}
    found = [name for name in metrics if name.split(".")[0] in known]
    return found or list(metrics)


def step_of(operation: str, name: str, direction: str, device: torch.device) -> Callable[[], Any]:
    """The step that is profiled, warm."""
    from benchmarks import attention, maxsim
    from benchmarks.prepare import steps_of
    from benchmarks.timing import warm_up

    suite: Any = {"attention": attention, "maxsim": maxsim}[operation]
    case, dtype = CASES[operation][direction], torch.bfloat16
    if device.type != "cuda":
        small = {"queries": 2, "documents": 3} if operation == "maxsim" else {"length": 64, "group_size": 16}
        case, dtype = replace(case, **small), torch.float32
    *tensors, grad = case.inputs(device, dtype)
    step = steps_of(suite.candidates(case, device, 0)[name].make(), tensors, grad)[direction]
    warm_up(step, device)
    return step


def child(operation: str, name: str, direction: str) -> None:
    """Runs under ncu: everything is compiled and tuned before the profiler starts."""
    step = step_of(operation, name, direction, torch.device("cuda"))
    torch.cuda.synchronize()
    runtime: Any = torch.cuda.cudart()
    runtime.cudaProfilerStart()
    step()
    torch.cuda.synchronize()
    runtime.cudaProfilerStop()


def profile(ncu: str, metrics: list[str], step: tuple[str, str, str], seconds: float) -> tuple[str, str]:
    """(ncu's CSV, problem or "") of one step: operation, candidate and direction."""
    command = [ncu, "--csv", "--page", "raw", "--print-units", "base", "--profile-from-start", "off"]
    command += ["--metrics", ",".join(metrics), sys.executable, "-m", "tools.profile", "--child", *step]
    try:
        run = subprocess.run(command, cwd=ROOT, env=os.environ, capture_output=True, text=True, timeout=seconds)
    except subprocess.TimeoutExpired:
        return "", f"stopped after {seconds:.0f} s"
    if "ERR_NVGPUCTRPERM" in run.stdout + run.stderr:
        return "", "no right to read performance counters; run as root or let the driver allow it"
    tail = " ".join((run.stdout + run.stderr).split())[-200:]
    return run.stdout, "" if run.returncode == 0 else tail


def main(arguments: list[str] | None = None) -> int:
    """0: at least ours was profiled; 1: not; 2: no GPU or no ncu."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("operations", nargs="*", metavar="operation", help=f"{', '.join(CASES)} (default: all)")
    parser.add_argument("--out", type=Path, help="JSON file (default: benchmarks/results/<gpu>/profile.json)")
    parser.add_argument("--ncu", default=shutil.which("ncu"), help="path of Nsight Compute's command line")
    parser.add_argument("--budget", type=float, default=240.0, help="seconds in all")
    parser.add_argument("--commit", help="the commit to name where there is no repository")
    parser.add_argument("--dry-run", action="store_true", help="run the steps on the CPU, profile nothing")
    parser.add_argument("--child", nargs=3, metavar=("OPERATION", "NAME", "DIRECTION"), help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    unknown = [name for name in options.operations if name not in CASES]
    if unknown:
        print(f"tools.profile: no operation {unknown[0]!r}; choose from {', '.join(CASES)}", file=sys.stderr)
        return 2
    steps = [
        (operation, name, direction)
        for operation in options.operations or CASES
        for name in CANDIDATES[operation]
        for direction in CASES[operation]
    ]
    if options.dry_run:
        own = [step for step in steps if step[1] == "jmlr"]
        for operation, name, direction in own:
            step_of(operation, name, direction, torch.device("cpu"))()
        print(f"tools.profile: {len(own)} steps ran on the CPU; nothing was profiled")
        return 0
    if not torch.cuda.is_available():
        print("tools.profile: no CUDA device was found; --dry-run runs the steps on the CPU", file=sys.stderr)
        return 2
    if options.child:
        child(*options.child)
        return 0
    if not options.ncu:
        print("tools.profile: ncu was not found; install Nsight Compute or name it with --ncu", file=sys.stderr)
        return 2
    environment = describe(options.commit)
    out = options.out or ROOT / "benchmarks" / "results" / folder_name(environment) / "profile.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    metrics = available(options.ncu, METRICS)
    results: dict[str, list[dict[str, Any]]] = {}
    problems: dict[str, str] = {}
    for step in steps:
        operation, name, direction = step
        label = f"{name} {CASES[operation][direction].name} {direction}"
        text, problem = profile(options.ncu, metrics, step, options.budget / len(steps))
        if problem:
            problems[label] = problem
        results[label] = [judge(launch) for launch in parse(text)]
    report = {"environment": environment, "metrics": metrics, "steps": results, "problems": problems}
    out.write_text(json.dumps(report, indent=1) + "\n")
    print(table(results))
    for label, problem in problems.items():
        print(f"  {label}: {problem}")
    ours = sum(len(launches) for label, launches in results.items() if label.startswith("jmlr"))
    print(f"{ours} launches of ours profiled" + (f"; {len(problems)} steps failed" if problems else ""))
    return 0 if ours else 1


if __name__ == "__main__":
    sys.exit(main())

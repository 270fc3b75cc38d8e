"""The compiled CUDA kernels under NVIDIA's compute-sanitizer: memory, races, initialisation, barriers.

    python -m tools.sanitize [--out sanitize.json] [--budget 240] [--tools memcheck,racecheck] [--dry-run]

Each of its tools runs the same small, odd problems of both families, forward and backward, in a process of its own.
Exit code 1 when one of them reports an error, 2 when there is no compute-sanitizer, no GPU that it supports or no
compiled kernel; ``--dry-run`` walks the problems on the CPU without it.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import torch

import jmlr_kernels

TOOLS = ("memcheck", "racecheck", "initcheck", "synccheck")
ERROR_CODE = 9
# An allocation of its own for each tensor: else an access past a tensor's end lands in a neighbour's memory.
ENVIRONMENT = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1", "CUDA_LAUNCH_BLOCKING": "1"}
_UNSUPPORTED = re.compile(r"Device not supported|No attachable process|not supported on this")
_SUMMARY = re.compile(r"(?:ERROR|RACECHECK) SUMMARY: .*")


def workload(device: str, backend: str) -> int:
    """Runs small problems that leave tiles half full, pack, pad, mask and share heads; returns how many."""
    count = 0
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int, dtype: torch.dtype) -> torch.Tensor:
        return torch.randn(shape, generator=generator).to(device, dtype).requires_grad_()

    def offsets(*lengths: int) -> torch.Tensor:
        return torch.tensor([0, *lengths]).cumsum(0).to(device, torch.int32)

    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        for dim in (64, 80, 128):
            q = random(2, 133, 6, dim, dtype=dtype)
            k, v = random(2, 133, 3, dim, dtype=dtype), random(2, 133, 3, dim, dtype=dtype)
            lengths = torch.tensor([133, 70], dtype=torch.int32, device=device)
            options = [{}, {"seq_lens": lengths}, {"boundary": "wrap"}]
            for extra in options:
                out = jmlr_kernels.shifted_sparse_attention(q, k, v, 48, backend=backend, **extra)  # type: ignore[arg-type]
                torch.autograd.grad(out.float().square().sum(), (q, k, v))
                count += 1
            packed = [x.detach().flatten(0, 1).requires_grad_() for x in (q, k, v)]
            out = jmlr_kernels.shifted_sparse_attention(
                packed[0], packed[1], packed[2], 33, cu_seqlens=offsets(100, 1, 130), backend=backend
            )
            torch.autograd.grad(out.float().square().sum(), packed)
            count += 1
    maxsim_backend = "cpu" if backend == "torch" and "available" in jmlr_kernels.backend_info()["cpu"] else backend
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        for dim in (20, 96, 128):
            queries, documents = random(5, 33, dim, dtype=dtype), random(7, 130, dim, dtype=dtype)
            mask = (torch.rand(7, 130, generator=generator) < 0.7).to(device)
            for normalize in (False, True):
                scores = jmlr_kernels.maxsim(
                    queries, documents, document_mask=mask, normalize=normalize, backend=maxsim_backend
                )
                torch.autograd.grad(scores.square().sum(), (queries, documents))
                count += 1
            tokens = random(300, dim, dtype=dtype)
            scores = jmlr_kernels.maxsim(queries, tokens, cu_seqlens=offsets(100, 0, 200), backend=maxsim_backend)
            torch.autograd.grad(scores.square().sum(), (queries, tokens))
            candidates = random(5, 3, 40, dim, dtype=dtype)
            scores = jmlr_kernels.maxsim_candidates(queries, candidates, backend=maxsim_backend)
            torch.autograd.grad(scores.square().sum(), (queries, candidates))
            count += 2
        for dim in (20, 128, 150):
            queries, documents = random(5, 33, dim, dtype=dtype), random(7, 130, dim, dtype=dtype)
            mask = (torch.rand(7, 130, generator=generator) < 0.7).to(device)
            for layout in ({"document_mask": mask}, {"cu_seqlens": offsets(100, 0, 810)}):
                text = documents.flatten(0, 1) if "cu_seqlens" in layout else documents
                scores = jmlr_kernels.maxsim_smooth(queries, text, temperature=0.5, backend=backend, **layout)  # type: ignore[arg-type]
                torch.autograd.grad(scores.square().sum(), (queries, documents))
                count += 1
    if device == "cuda":
        torch.cuda.synchronize()
    return count


def _run(program: str, tool: str, seconds: float) -> tuple[str, str]:
    """("clean" | "errors" | "unsupported" | "stopped", what it said last) of one of compute-sanitizer's tools."""
    command = [program, "--tool", tool, "--error-exitcode", str(ERROR_CODE), "--print-limit", "20"]
    command += [sys.executable, "-m", "tools.sanitize", "--workload"]
    try:
        done = subprocess.run(
            command, env={**os.environ, **ENVIRONMENT}, capture_output=True, text=True, timeout=max(1.0, seconds)
        )
    except subprocess.TimeoutExpired:
        return "stopped", f"not finished after {seconds:.0f} s"
    said = done.stdout + done.stderr
    print(f"--- {tool}\n{said}", flush=True)
    if _UNSUPPORTED.search(said):
        return "unsupported", "compute-sanitizer does not support this device"
    summaries = _SUMMARY.findall(said)
    last = summaries[-1] if summaries else (said.strip().splitlines() or ["no output"])[-1]
    return ("clean" if done.returncode == 0 else "errors"), last


def main(arguments: list[str] | None = None) -> int:
    """Run the tools, print one line for each. 0: clean; 1: errors; 2: it cannot run here."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--out", type=Path)
    parser.add_argument("--budget", type=float, default=240.0, help="seconds for all tools together")
    parser.add_argument("--tools", default=",".join(TOOLS))
    parser.add_argument("--dry-run", action="store_true", help="the problems on the CPU, without compute-sanitizer")
    parser.add_argument("--workload", action="store_true", help="the problems on the GPU, as the tools run them")
    parser.add_argument("--commit", help="taken and not needed, as the other phases take it")
    options = parser.parse_args(arguments)
    if options.workload or options.dry_run:
        count = workload("cpu", "torch") if options.dry_run else workload("cuda", "cuda")
        print(f"{count} problems ran")
        return 0
    program = shutil.which("compute-sanitizer")
    state = jmlr_kernels.backend_info()["cuda"]
    if program is None or not torch.cuda.is_available() or not state.startswith("available"):
        reason = "there is no compute-sanitizer" if program is None else f"the compiled kernels cannot run: {state}"
        print(f"tools.sanitize: {reason}")
        return 2
    started = time.monotonic()
    results = {}
    for tool in options.tools.split(","):
        results[tool] = _run(program, tool, options.budget - (time.monotonic() - started))
        print(f"{tool}: {results[tool][0]}, {results[tool][1]}", flush=True)
    if options.out:
        options.out.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    if all(outcome == "unsupported" for outcome, _ in results.values()):
        print("tools.sanitize: compute-sanitizer does not support this device")
        return 2
    print("; ".join(f"{tool} {outcome}" for tool, (outcome, _) in results.items()))
    return 0 if all(outcome == "clean" for outcome, _ in results.values()) else 1


if __name__ == "__main__":
    sys.exit(main())

"""What a figure was measured on: every result file begins with this."""

from __future__ import annotations

import datetime
import os
import platform
import re
import subprocess
from pathlib import Path
from typing import Any

import torch

import jmlr_kernels.version

ROOT = Path(__file__).resolve().parents[1]


def _output(*command: str) -> str | None:
    try:
        run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return run.stdout.strip() if run.returncode == 0 else None


def _commit() -> str:
    commit = _output("git", "rev-parse", "HEAD")
    if not commit:
        return "unknown"
    return commit + ("-modified" if _output("git", "status", "--porcelain", "--untracked-files=no") else "")


def _processor() -> str:
    try:
        found = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        found = None
    return found.group(1) if found else platform.processor() or platform.machine()


def _version(module: str) -> str | None:
    try:
        return str(__import__(module).__version__)
    except Exception:  # a library that is there but broken is as good as absent for a figure
        return None


def describe(commit: str | None = None) -> dict[str, Any]:
    """Machine, software versions and commit ("unknown" outside a repository, unless given), JSON-ready."""
    environment: dict[str, Any] = {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "commit": commit or _commit(),
        "jmlr_kernels": jmlr_kernels.version.__version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": _version("triton"),
        "transformers": _version("transformers"),
        "cpu": _processor(),
        "cpu_count": os.cpu_count(),
        "gpu": None,
    }
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        environment |= {
            "gpu": properties.name,
            "gpu_memory_bytes": properties.total_memory,
            "multiprocessors": properties.multi_processor_count,
            "capability": f"sm_{properties.major}{properties.minor}",
            "cuda": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version(),
            "driver": (
                _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader") or "unknown"
            ).splitlines()[0],
        }
    return environment


def folder_name(environment: dict[str, Any]) -> str:
    """The results folder of this machine: "NVIDIA H200" -> "h200", no GPU -> "cpu"."""
    name = (environment["gpu"] or "cpu").lower().removeprefix("nvidia ")
    return re.sub(r"[^a-z0-9]+", "-", name).strip("-")

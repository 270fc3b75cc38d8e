"""Adapters to other libraries, one file each, imported only where the library is there.

A folder ``.whl`` in the working tree may hold wheels of peers for a machine without a network: :func:`unpack_wheels`
makes them importable without installing anything.
"""

from __future__ import annotations

import importlib
import importlib.util
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from benchmarks.candidate import Candidate

if TYPE_CHECKING:
    from benchmarks.attention_cases import AttentionCase
    from benchmarks.maxsim_cases import MaxSimCase

# By the device whose tensors they take.
_MAXSIM = {
    "cuda": {
        "late_interaction_kernels": "benchmarks.peers.late_interaction",
        "flash_maxsim": "benchmarks.peers.flash_maxsim",
    },
    "cpu": {"maxsim_cpu": "benchmarks.peers.maxsim_cpu"},
}


def maxsim(case: MaxSimCase, device: torch.device, made_for: str | None = None) -> dict[str, Candidate]:
    """What the installed peers offer for a case: name -> candidate.

    `made_for` is the type of device whose peers are meant, where it is another than that of the tensors (a test of GPU
    libraries in Triton's interpreter).
    """
    found: dict[str, Candidate] = {}
    for module, adapter in _MAXSIM.get(made_for or device.type, {}).items():
        if importlib.util.find_spec(module) is not None:
            found |= importlib.import_module(adapter).candidates(case, device)
    return found


def attention(case: AttentionCase, device: torch.device) -> dict[str, Candidate]:
    """What this torch and the installed peers offer for a case: name -> candidate."""
    return importlib.import_module("benchmarks.peers.varlen").candidates(case, device)


def unpack_wheels(folder: Path, target: Path) -> list[str]:
    """Unpack every wheel of `folder` into `target`, to be put on the module search path; their file names."""
    wheels = sorted(folder.glob("*.whl")) if folder.is_dir() else []
    for wheel in wheels:
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(target)
    return [wheel.name for wheel in wheels]

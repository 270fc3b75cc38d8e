"""Adapters to other libraries, one file each, imported only where the library is there.

A folder ``.whl`` in the working tree may hold wheels of peers for a machine without a network: :func:`unpack_wheels`
makes them importable without installing anything.
"""

from __future__ import annotations

import importlib
import importlib.util
import zipfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

_MAXSIM = {
    "late-interaction-kernels": ("late_interaction_kernels", "benchmarks.peers.late_interaction"),
    "flash-maxsim": ("flash_maxsim", "benchmarks.peers.flash_maxsim"),
}


def maxsim() -> dict[str, Callable[[], Callable[[torch.Tensor, torch.Tensor], torch.Tensor]]]:
    """Peers of `maxsim` that are installed: name -> a maker of a function (queries, documents) -> scores."""

    def load(adapter: str) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
        return importlib.import_module(adapter).load()

    return {
        name: partial(load, adapter)
        for name, (module, adapter) in _MAXSIM.items()
        if importlib.util.find_spec(module) is not None
    }


def unpack_wheels(folder: Path, target: Path) -> list[str]:
    """Unpack every wheel of `folder` into `target`, to be put on the module search path; their file names."""
    wheels = sorted(folder.glob("*.whl")) if folder.is_dir() else []
    for wheel in wheels:
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(target)
    return [wheel.name for wheel in wheels]

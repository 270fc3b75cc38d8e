"""Smooth MaxSim's CUDA kernels on the emulated block: every way through them, every dtype, against float64."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from maxsim_smooth_calls import in_place_of_triton
from maxsim_smooth_probes import PROBES, SHAPES, shape

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


@pytest.fixture(autouse=True)
def emulated(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    with in_place_of_triton(monkeypatch):
        yield


@pytest.mark.parametrize(("dtype", "masked"), [*((dtype, True) for dtype in DTYPES), (torch.float16, False)], ids=str)
@pytest.mark.parametrize("name", SHAPES)
def test_shapes(name: str, dtype: torch.dtype, masked: bool) -> None:
    shape(name, dtype, masked)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", PROBES)
def test_corners(name: str, dtype: torch.dtype) -> None:
    PROBES[name](dtype)

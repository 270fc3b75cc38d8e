"""MaxSim's backward pass of compute capability 9.0 on the emulated block: what the kernels of 8.0 must do, and the ways
through that only these have. The forward pass is that of 8.0."""

from __future__ import annotations

from collections.abc import Iterator

import maxsim_calls
import pytest
import torch
from maxsim_probes import PROBES, SHAPES, shape
from maxsim_sm90_backward_probes import PROBES as OWN_PROBES
from maxsim_sm90_backward_probes import in_place_of_sm80

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


@pytest.fixture(autouse=True)
def emulated(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    with in_place_of_sm80(monkeypatch):
        yield


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("name", SHAPES)
def test_shapes(name: str, masked: bool, dtype: torch.dtype) -> None:
    shape(name, dtype, masked)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", PROBES)
def test_corners(name: str, dtype: torch.dtype) -> None:
    PROBES[name](dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", OWN_PROBES)
def test_own_ways(name: str, dtype: torch.dtype) -> None:
    OWN_PROBES[name](dtype)


def test_these_kernels_run() -> None:
    assert maxsim_calls.backward_kernels == "maxsim_sm90_backward"

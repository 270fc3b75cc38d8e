"""MaxSim's backward pass of compute capability 9.0 on the emulated block: what the kernels of 8.0 must do, and the ways
through that only these have. The forward pass is that of 8.0."""

from __future__ import annotations

from collections.abc import Iterator

import maxsim_calls
import pytest
import test_maxsim_losses
import torch
from maxsim_probes import PROBES, SHAPES, shape
from maxsim_sm90_backward_probes import PROBES as OWN_PROBES
from maxsim_sm90_backward_probes import SLOW, in_place_of_sm80
from test_maxsim_shared import LEFT_OUT, on_triton_alone

# The types share their code; 16 bits differ from 32 in the lanes that share a row.
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
EVERY_TYPE = [pytest.param(dtype, marks=[] if dtype == torch.float16 else [pytest.mark.slow]) for dtype in DTYPES]


@pytest.fixture(autouse=True)
def emulated(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    with in_place_of_sm80(monkeypatch):
        yield


@pytest.mark.parametrize("dtype", EVERY_TYPE, ids=str)
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("name", SHAPES)
def test_shapes(name: str, masked: bool, dtype: torch.dtype) -> None:
    shape(name, dtype, masked)


@pytest.mark.parametrize("dtype", EVERY_TYPE, ids=str)
@pytest.mark.parametrize("name", PROBES)
def test_corners(name: str, dtype: torch.dtype) -> None:
    PROBES[name](dtype)


OWN_WAYS = [
    pytest.param(name, dtype, id=f"{name}-{dtype}", marks=[pytest.mark.slow] if name in SLOW else [])
    for name in OWN_PROBES
    for dtype in (DTYPES if name not in SLOW else DTYPES[1:2])
]


@pytest.mark.parametrize(("name", "dtype"), OWN_WAYS)
def test_own_ways(name: str, dtype: torch.dtype) -> None:
    OWN_PROBES[name](dtype)


# The gradient rules of the losses.
globals().update(on_triton_alone(test_maxsim_losses, set(), LEFT_OUT))


def test_these_kernels_run() -> None:
    assert maxsim_calls.backward_kernels == "maxsim_sm90_backward"

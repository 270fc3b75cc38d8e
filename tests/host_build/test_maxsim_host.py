"""MaxSim's CUDA kernels on the emulated block: every way through them, every dtype, against the float64 definition."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from maxsim_calls import in_place_of_triton
from maxsim_cases import Case
from maxsim_probes import PROBES, SHAPES, close, shape

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


@pytest.fixture(autouse=True)
def emulated(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    with in_place_of_triton(monkeypatch):
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


@pytest.mark.slow
@pytest.mark.parametrize("masked", [False, True])
def test_document_of_65536_tokens(masked: bool) -> None:
    """Every value of two bytes is a position; who has no winner follows from the masks."""
    documents = torch.linspace(-1, 1, 2**16, dtype=torch.float64).repeat(2, 1)[..., None]
    grad = torch.tensor([[1.0, 2.0]], dtype=torch.float64)
    case = Case(torch.tensor([[[2.0], [-3.0], [5.0]]], dtype=torch.float64), documents, grad)
    if masked:
        document_mask = torch.ones(2, 2**16, dtype=torch.bool)
        document_mask[0, 0], document_mask[1] = False, False
        case.options = {"query_mask": torch.tensor([[True, True, False]]), "document_mask": document_mask}
    close(torch.float32, case.to(torch.float32))

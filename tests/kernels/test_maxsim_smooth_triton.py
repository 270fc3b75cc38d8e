"""The kernels of smooth MaxSim against float64, by the tolerance rule: compiled, or in the interpreter."""

from __future__ import annotations

import pytest
import torch
from maxsim_cases import make_case
from maxsim_smooth_cases import DEVICE, Smooth
from oracles import assert_as_exact_as_torch

from jmlr_kernels.maxsim import config_smooth

DTYPES = [torch.float32, torch.float16] + ([torch.bfloat16] if DEVICE == "cuda" else [])
LAYOUTS = [(False, False), (False, True), (True, False), (True, True)]

# The interpreter computes with infinities that a selection then drops, and numpy warns of each.
pytestmark = pytest.mark.filterwarnings("ignore:(invalid value|overflow|divide by zero|All-NaN):RuntimeWarning")


def check_triton(dtype: torch.dtype, temperature: float = 0.7, **sizes: object) -> None:
    call = Smooth(make_case(**sizes).to(dtype), temperature)
    exact, plain = call.exact(), call.plain()
    plain["scores"] = plain["scores"].float()
    found = Smooth(call.case.to(dtype, DEVICE), temperature).run("triton")
    for name, value in found.items():
        assert_as_exact_as_torch(name, value.cpu(), plain[name], exact[name])


# One shape per path through the kernels: several queries in a tile, a query longer than a tile, one token, several
# document tiles, embedding dimensions padded, walked in chunks, and both at once.
SHAPES = {
    "shared_tile": {"query_count": 5, "query_length": 24, "document_length": 40, "dimension": 64},
    "long_query": {"query_count": 2, "query_length": 150, "document_length": 20, "dimension": 16},
    "one_token": {"query_count": 1, "query_length": 1, "document_length": 1, "dimension": 32, "documents": 1},
    "long_document": {"query_count": 2, "query_length": 6, "document_length": 200, "dimension": 16, "documents": 2},
    "padded_dimension": {"dimension": 60},
    "chunked_dimension": {"dimension": 300, "documents": 2, "query_count": 2},
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES)
def test_paths(shape: str, dtype: torch.dtype) -> None:
    check_triton(dtype, masked=True, weighted=True, **SHAPES[shape])


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(("candidates", "packed"), LAYOUTS)
def test_layouts(candidates: bool, packed: bool, masked: bool) -> None:
    check_triton(torch.float16, candidates=candidates, packed=packed, masked=masked, weighted=masked, seed=1)


def test_runs_and_splits_of_documents(monkeypatch: pytest.MonkeyPatch) -> None:
    """Seven documents in runs of three forward, and shared out among three programs backward."""
    monkeypatch.setattr(config_smooth, "documents_per_program", lambda *_: 3)
    monkeypatch.setattr(config_smooth, "document_splits", lambda *_: 3)
    for dtype in DTYPES:
        check_triton(dtype, documents=7, document_length=5, masked=True, weighted=True)
    check_triton(torch.float32, documents=7, document_length=5, packed=True, candidates=True, query_count=2)


def test_packed_documents_longer_than_the_mean() -> None:
    """One document holds nearly all tokens: few programs share it, and each takes several tiles."""
    case = make_case(packed=True, documents=3, document_length=200, dimension=16, seed=5)
    tokens = case.documents.shape[0]
    case.options["cu_seqlens"] = torch.tensor([0, 1, tokens - 1, tokens], dtype=torch.int32)
    call = Smooth(case.to(torch.float32), 0.7)
    exact, plain = call.exact(), call.plain()
    for name, value in Smooth(case.to(torch.float32, DEVICE), 0.7).run("triton").items():
        assert_as_exact_as_torch(name, value.cpu(), plain[name], exact[name])


def test_small_float16_gradients_do_not_underflow() -> None:
    """Shares times gradients below float16's floor, whose sums are well inside its range."""
    case = make_case(query_count=16, documents=1, query_length=16, document_length=40, dimension=16)
    case.queries.fill_(0.25)
    case.documents.fill_(0.5)
    case.grad_scores.fill_(2.0**-21)
    call = Smooth(case.to(torch.float16, DEVICE), 1.0)
    found, exact = call.run("triton"), Smooth(case, 1.0).exact()
    assert exact["grad_documents"].abs().max() > 2.0**-21
    for name in ("grad_queries", "grad_documents"):
        torch.testing.assert_close(found[name].cpu().double(), exact[name], rtol=2.0**-8, atol=2.0**-25)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("seed", range(8))
def test_random_shapes(seed: int, dtype: torch.dtype) -> None:
    draw = torch.Generator().manual_seed(seed)

    def upto(limit: int) -> int:
        return int(torch.randint(1, limit + 1, (), generator=draw))

    sizes = {"query_count": upto(6), "documents": upto(6), "query_length": upto(140), "document_length": upto(150)}
    switches = {name: upto(2) == 2 for name in ("candidates", "packed", "masked", "weighted")}
    check_triton(dtype, dimension=(16, 63, 80, 111, 260)[seed % 5], seed=seed, **sizes, **switches)

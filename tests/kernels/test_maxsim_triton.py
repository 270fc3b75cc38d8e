"""The Triton kernels against float64, by the tolerance rule: on a GPU compiled, elsewhere in Triton's interpreter."""

from __future__ import annotations

import pytest
import torch
from maxsim_cases import make_case
from oracles import assert_as_exact_as_torch

from jmlr_kernels.maxsim import config

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float32, torch.float16] + ([torch.bfloat16] if DEVICE == "cuda" else [])

# One shape per path through the kernels: several queries in a tile, a query longer than a tile, one token, several
# document tiles, embedding dimensions padded, walked in chunks, and both at once.
SHAPES = {
    "shared_tile": {"query_count": 5, "query_length": 24, "document_length": 40, "dimension": 64},
    "long_query": {"query_count": 4, "query_length": 150, "document_length": 20, "dimension": 16},
    "one_token": {"query_count": 1, "query_length": 1, "document_length": 1, "dimension": 32, "documents": 1},
    "long_document": {"query_count": 2, "query_length": 6, "document_length": 300, "dimension": 16, "documents": 2},
    "padded_dimension": {"dimension": 60},
    "chunked_dimension": {"dimension": 300, "documents": 2, "query_count": 2},
}


def check(dtype: torch.dtype, **sizes: object) -> None:
    case = make_case(**sizes).to(dtype)
    exact = case.exact()
    found = case.to(dtype, DEVICE).run("triton")
    plain = case.plain(exact["winners"])
    plain["scores"] = plain["scores"].float()
    assert torch.equal(found.pop("winners").cpu(), exact["winners"])
    for name, value in found.items():
        assert_as_exact_as_torch(name, value.cpu(), plain[name], exact[name])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES)
def test_paths(shape: str, dtype: torch.dtype) -> None:
    check(dtype, masked=True, weighted=True, **SHAPES[shape])


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(("candidates", "packed"), [(False, False), (False, True), (True, False), (True, True)])
def test_layouts(candidates: bool, packed: bool, masked: bool) -> None:
    check(torch.float16, candidates=candidates, packed=packed, masked=masked, weighted=masked, documents=3, seed=1)


def test_documents_per_program_covers_the_last_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """Seven documents in runs of three: the last program has one."""
    monkeypatch.setattr(config, "documents_per_program", lambda *_: 3)
    check(torch.float32, documents=7, document_length=5, masked=True)
    check(torch.float32, documents=7, document_length=5, packed=True, candidates=True, query_count=2)


def test_packed_documents_longer_than_the_mean() -> None:
    """One document holds nearly all tokens: few programs share it, and each takes several tiles."""
    case = make_case(packed=True, documents=3, document_length=200, dimension=16, seed=5)
    tokens = case.documents.shape[0]
    case.options["cu_seqlens"] = torch.tensor([0, 1, tokens - 1, tokens], dtype=torch.int32)
    found, exact = case.to(torch.float32, DEVICE).run("triton"), case.exact()
    assert torch.equal(found.pop("winners").cpu(), exact["winners"])
    for name, value in found.items():
        torch.testing.assert_close(value.cpu().double(), exact[name], rtol=1e-5, atol=1e-5)


def test_small_float16_gradients_do_not_underflow() -> None:
    """Weights times gradients near float16's floor, whose sum is well inside its range."""
    case = make_case(query_count=16, documents=1, query_length=16, document_length=2, dimension=16).to(torch.float16)
    case.queries.fill_(0.25)
    case.grad_scores.fill_(2.0**-23)
    found = case.to(torch.float16, DEVICE).run("triton")
    exact = case.exact()["grad_documents"]
    assert exact.abs().max() > 2.0**-18
    torch.testing.assert_close(found["grad_documents"].cpu().double(), exact, rtol=2.0**-8, atol=2.0**-25)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("seed", range(8))
def test_random_shapes(seed: int, dtype: torch.dtype) -> None:
    draw = torch.Generator().manual_seed(seed)

    def upto(limit: int) -> int:
        return int(torch.randint(1, limit + 1, (), generator=draw))

    sizes = {"query_count": upto(6), "documents": upto(6), "query_length": upto(140), "document_length": upto(150)}
    switches = {name: upto(2) == 2 for name in ("candidates", "packed", "masked", "weighted")}
    check(dtype, dimension=(16, 63, 80, 111, 260)[seed % 5], seed=seed, **sizes, **switches)

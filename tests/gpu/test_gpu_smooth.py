"""Smooth MaxSim on a CUDA device, at real sizes: compiled products, bfloat16, temperatures near the hard maximum."""

from __future__ import annotations

import pytest
import torch
from oracles import assert_as_exact_as_torch
from test_gpu_maxsim import in_float64, random, results
from torch import Tensor

from jmlr_kernels import maxsim, maxsim_smooth

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

DTYPES = [torch.bfloat16, torch.float16, torch.float32]
NAMES = ("scores", "dq", "dd")


def definition(queries: Tensor, documents: Tensor, temperature: float, mask: Tensor | None = None) -> Tensor:
    similarities = torch.einsum("qld,nmd->qnlm", queries, documents)
    if mask is not None:
        similarities = similarities.masked_fill(~mask[None, :, None, :], float("-inf"))
    maxima = temperature * torch.logsumexp(similarities / temperature, -1)
    return maxima.sum(-1, dtype=torch.promote_types(queries.dtype, torch.float32))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("queries", "documents", "length", "dim"),
    [(16, 64, 300, 128), (1, 500, 90, 128), (9, 7, 70, 64), (4, 12, 180, 101), (4, 12, 70, 768)],
)
def test_against_float64(backend: str, queries: int, documents: int, length: int, dim: int, dtype: torch.dtype) -> None:
    """Queries that fill several tiles, one whose documents are split, dimensions that are padded and walked."""
    leaves = [random((queries, 32, dim), dtype, 0), random((documents, length, dim), dtype, 1)]
    mask = torch.rand(documents, length, generator=torch.Generator("cuda").manual_seed(2), device="cuda") > 0.2
    grad = torch.randn((queries, documents), generator=torch.Generator("cuda").manual_seed(3), device="cuda")
    exact = results(lambda q, d: definition(q, d, 0.1, mask), in_float64(leaves), grad)
    low = results(lambda q, d: definition(q, d, 0.1, mask), leaves, grad)
    options = {"temperature": 0.1, "document_mask": mask, "backend": backend}
    actual = results(lambda q, d: maxsim_smooth(q, d, **options), leaves, grad)
    for name, *triple in zip(NAMES, actual, low, exact, strict=True):
        assert_as_exact_as_torch(name, *triple)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dim", [128, 320])
def test_the_hard_maximum_is_the_limit(backend: str, dim: int, dtype: torch.dtype) -> None:
    """Shares of 0 and 1 need similarities of the same bits in the forward and in both kernels of the backward."""
    leaves = [random((16, 32, dim), dtype, 0), random((20, 300, dim), dtype, 1)]
    grad = torch.ones((16, 20), device="cuda")
    hard = results(lambda q, d: maxsim(q, d, backend=backend), leaves, grad)
    actual = results(lambda q, d: maxsim_smooth(q, d, temperature=2.0**-126, backend=backend), leaves, grad)
    for found, expected in zip(actual, hard, strict=True):
        torch.testing.assert_close(found, expected)


def test_packed_documents_equal_padded_ones(backend: str) -> None:
    documents = random((40, 300, 128), torch.bfloat16, 1)
    lengths = torch.randint(0, 301, (40,), generator=torch.Generator().manual_seed(4))
    mask = (torch.arange(300) < lengths[:, None]).cuda()
    packed = documents.detach()[mask].requires_grad_()
    ends = torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).int().cuda()
    queries, grad = random((12, 32, 128), torch.bfloat16, 0), torch.randn((12, 40), device="cuda")
    options = {"temperature": 0.1, "backend": backend}
    one = results(lambda q, d: maxsim_smooth(q, d, document_mask=mask, **options), [queries, documents], grad)
    other = results(lambda q, d: maxsim_smooth(q, d, cu_seqlens=ends, **options), [queries, packed], grad)
    torch.testing.assert_close((*other[:2], other[2]), (*one[:2], one[2][mask]))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_two_runs_are_bit_identical(backend: str, dtype: torch.dtype) -> None:
    leaves = [random((64, 32, 128), dtype, 0), random((100, 180, 128), dtype, 1)]
    grad = torch.randn((64, 100), device="cuda")

    def run() -> list[Tensor]:
        return results(lambda q, d: maxsim_smooth(q, d, temperature=0.1, backend=backend), leaves, grad)

    assert all(torch.equal(one, other) for one, other in zip(run(), run(), strict=True))


def test_no_similarities_are_stored(backend: str) -> None:
    leaves = [random((256, 32, 128), torch.bfloat16, 0), random((256, 180, 128), torch.bfloat16, 1)]
    grad = torch.randn((256, 256), device="cuda")

    def run() -> list[Tensor]:
        return results(lambda q, d: maxsim_smooth(q, d, temperature=0.1, backend=backend), leaves, grad)

    run()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    scores, *gradients = run()
    extra = torch.cuda.max_memory_allocated() - before
    maxima, sums = 4 * 32 * scores.numel(), 16 * 4 * leaves[0].numel()  # at most 16 parts of d(queries)
    wanted = 4 * scores.numel() + 2 * sum(gradient.numel() for gradient in gradients) + maxima + sums
    assert extra <= wanted + 4 * 2**20, f"{extra} bytes, and what is kept has {wanted}"

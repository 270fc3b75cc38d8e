"""Compressed documents on a CUDA device, at the sizes of reranking: bfloat16, float8 hardware, CUDA graphs, memory."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from oracles import assert_as_exact_as_torch
from torch import Tensor

from jmlr_kernels import ResidualCodec, maxsim_quantized, maxsim_residual, quantize_documents, residual_decompress

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

FORMATS = ["int8", "float8", "residual1", "residual2", "residual4", "residual8"]


def _problem(
    form: str, documents: int, length: int, backend: str, dimension: int = 128
) -> tuple[Tensor, Tensor, Callable[[Tensor], Tensor]]:
    """A mask with holes, decoded documents in float32, and the function that scores queries against the codes."""
    draw = torch.Generator(device="cuda").manual_seed(0)
    mask = torch.rand(documents, length, generator=draw, device="cuda") > 0.2
    if form.startswith("residual"):
        bits = int(form[-1])
        centroids = torch.randn(4096, dimension, generator=draw, device="cuda")
        codec = ResidualCodec(
            torch.nn.functional.normalize(centroids, dim=-1).half(),
            0.1 * torch.randn(2**bits, generator=draw, device="cuda"),
        )
        codes = torch.randint(4096, (documents, length), generator=draw, device="cuda", dtype=torch.int32)
        shape = (documents, length, dimension // 8 * bits)
        residuals = torch.randint(256, shape, generator=draw, device="cuda", dtype=torch.uint8)
        decoded = residual_decompress(codes, residuals, codec)
        return mask, decoded, lambda q: maxsim_residual(q, codes, residuals, codec, document_mask=mask, backend=backend)
    tokens = torch.randn(documents, length, dimension, generator=draw, device="cuda")
    stored = quantize_documents(tokens, torch.int8 if form == "int8" else torch.float8_e4m3fn)
    decoded = stored[0].float() * stored[1][..., None]
    return mask, decoded, lambda q: maxsim_quantized(q, *stored, document_mask=mask, backend=backend)


def _queries(count: int, dtype: torch.dtype, dimension: int = 128) -> Tensor:
    draw = torch.Generator(device="cuda").manual_seed(1)
    queries = torch.randn(count, 32, dimension, generator=draw, device="cuda")
    return torch.nn.functional.normalize(queries, dim=-1).to(dtype)


def _definition(queries: Tensor, decoded: Tensor, mask: Tensor) -> Tensor:
    similarities = torch.einsum("qld,nmd->qnlm", queries, decoded).masked_fill(~mask[None, :, None, :], float("-inf"))
    return similarities.amax(-1).sum(-1, dtype=torch.promote_types(queries.dtype, torch.float32))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("count", [1, 2, 9])
def test_against_float64(count: int, form: str, dtype: torch.dtype, backend: str) -> None:
    mask, decoded, score = _problem(form, 50, 300, backend)
    queries = _queries(count, dtype)
    exact = _definition(queries.double(), decoded.double(), mask)
    assert_as_exact_as_torch("scores", score(queries), _definition(queries, decoded.to(dtype), mask), exact)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("dimension", [48, 256, 384])
@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("count", [1, 9])
def test_every_dimension_block(count: int, form: str, dimension: int, dtype: torch.dtype, backend: str) -> None:
    if backend == "triton" and form.startswith("residual") and dimension > 256:
        pytest.skip("the Triton kernel decodes residual codes up to D=256")
    mask, decoded, score = _problem(form, 20, 100, backend, dimension)
    queries = _queries(count, dtype, dimension)
    exact = _definition(queries.double(), decoded.double(), mask)
    assert_as_exact_as_torch("scores", score(queries), _definition(queries, decoded.to(dtype), mask), exact)


@pytest.mark.parametrize("form", ["int8", "float8", "residual2"])
def test_little_memory_but_the_scores_and_cuda_graphs(form: str, backend: str) -> None:
    mask, decoded, score = _problem(form, 2000, 300, backend)
    del decoded
    listed = 4 * mask.numel() if backend == "cuda" else 0  # the compiled kernels list the kept tokens
    queries = _queries(1, torch.bfloat16)
    expected = score(queries)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    again = score(queries)
    assert torch.equal(again, expected)
    assert torch.cuda.max_memory_allocated() - before < 2**20 + listed
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = score(queries)
    queries.copy_(queries.flip(1))
    graph.replay()
    assert torch.equal(captured, score(queries))


@pytest.mark.parametrize("form", ["int8", "float8", "residual2"])
def test_nan_reaches_the_score(form: str, backend: str) -> None:
    _, _, score = _problem(form, 30, 100, backend)
    queries = _queries(2, torch.bfloat16)
    queries[1, 31, 5] = float("nan")
    scores = score(queries)
    assert scores[0].isfinite().all() and scores[1].isnan().all()

"""What PyTorch asks of the operations on compressed documents: fakes, torch.compile, autocast, FLOP counts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from maxsim_cases import Case, make_case
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from jmlr_kernels import ResidualCodec, maxsim_quantized, maxsim_residual, quantize_documents

LAYOUTS = [(False, False), (False, True), (True, False), (True, True)]
FORMATS = ["int8", "float8", "residual"]


def _case(form: str, candidates: bool, packed: bool) -> tuple[Case, Callable[..., Tensor], Callable[..., Tensor]]:
    """A case, the public function of its queries, and the operation's arguments of them."""
    case = make_case(candidates=candidates, packed=packed, masked=True, weighted=True).to(torch.float32)
    named = ("query_mask", "document_mask", "query_weights", "cu_seqlens")
    options: dict[str, Any] = {**case.options, "query_weights": case.query_weights}
    ordered = [options.get(name) for name in named]
    if form == "residual":
        codec = ResidualCodec(torch.randn(9, 20), torch.randn(4))
        shape = case.documents.shape[:-1]
        codes = torch.randint(9, shape, dtype=torch.int32)
        residuals = torch.randint(256, (*shape, 5), dtype=torch.uint8)
        stored: tuple[Any, ...] = (codes, residuals, codec)
        arguments = (codes, residuals, codec.centroids, codec.field_weights, *ordered, True, candidates, "torch")
        operation = torch.ops.jmlr_kernels.maxsim_residual_forward.default
        function: Callable[..., Tensor] = maxsim_residual
    else:
        stored = quantize_documents(case.documents, torch.int8 if form == "int8" else torch.float8_e4m3fn)
        arguments = (*stored, *ordered, candidates, "torch")
        operation = torch.ops.jmlr_kernels.maxsim_quantized_forward.default
        function = maxsim_quantized
    return (
        case,
        lambda queries: function(queries, *stored, candidates=candidates, **options),
        lambda check: check(operation, (case.queries, *arguments)),
    )


@pytest.mark.parametrize(("candidates", "packed"), LAYOUTS)
@pytest.mark.parametrize("form", ["int8", "residual"])
def test_opcheck(form: str, candidates: bool, packed: bool) -> None:
    _case(form, candidates, packed)[2](torch.library.opcheck)


@pytest.mark.parametrize(("candidates", "packed"), LAYOUTS)
@pytest.mark.parametrize("form", FORMATS)
def test_compile_without_graph_breaks(form: str, candidates: bool, packed: bool) -> None:
    case, score, _ = _case(form, candidates, packed)
    torch._dynamo.reset()  # the lambda below is one code object to the compiler, recompiled for every case
    compiled = torch.compile(lambda queries: score(2 * queries) + 1, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(case.queries), score(2 * case.queries) + 1)


@pytest.mark.parametrize("form", FORMATS)
def test_autocast_takes_its_dtype_and_keeps_float32_scores(form: str) -> None:
    case, score, _ = _case(form, False, False)
    with torch.autocast("cpu", torch.bfloat16):
        scores = score(case.queries)
    assert scores.dtype == torch.float32 and torch.equal(scores, score(case.queries.bfloat16()))


@pytest.mark.parametrize(("candidates", "packed"), LAYOUTS)
@pytest.mark.parametrize("form", ["int8", "residual"])
def test_flops(form: str, candidates: bool, packed: bool) -> None:
    case, score, _ = _case(form, candidates, packed)
    with FlopCounterMode(display=False) as counter:
        score(case.queries)
    tokens = case.documents.numel() // 20
    assert counter.get_total_flops() == 2 * 20 * 5 * tokens * (1 if candidates else 3)


def test_fakes_follow_shapes() -> None:
    queries = torch.empty(3, 5, 8, device="meta", dtype=torch.bfloat16)
    offsets = torch.empty(7, device="meta", dtype=torch.int32)
    values = torch.empty(50, 8, device="meta", dtype=torch.int8)
    scales = torch.empty(50, device="meta")
    scores = maxsim_quantized(queries, values, scales, cu_seqlens=offsets, candidates=True)
    assert scores.shape == (3, 2) and scores.dtype == torch.float32
    assert maxsim_quantized(queries.double(), values[None], scales[None]).dtype == torch.float64
    codec = ResidualCodec(torch.zeros(4, 8), torch.zeros(4)).to("meta")
    codes = torch.empty(4, 9, device="meta", dtype=torch.int32)
    residuals = torch.empty(4, 9, 2, device="meta", dtype=torch.uint8)
    assert maxsim_residual(queries, codes, residuals, codec).shape == (3, 4)

"""Small problems of MaxSim against compressed documents that together reach every line of the CUDA kernels.

``test_maxsim_compressed_host.py`` runs them on the kernels, ``mutations_maxsim_compressed.py`` on kernels with a seeded
bug, which one of them must find. All are called within ``maxsim_compressed_calls.in_place_of_triton``. What kernels for
plain documents share with these is probed by ``maxsim_probes.py``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import maxsim_calls
import torch
from compressed_cases import check_scores
from maxsim_cases import Case, make_case
from test_maxsim_residual import random_codec, random_codes
from torch import Tensor

from jmlr_kernels import ResidualCodec, maxsim_quantized, maxsim_residual, quantize_documents, residual_decompress

# One shape per way through the kernels, each with a format; `processors` divides the work as in maxsim_probes.py.
SHAPES: dict[str, dict[str, Any]] = {
    "few_rows": {"query_count": 2, "query_length": 7, "document_length": 150, "dimension": 128, "documents": 3},
    "several_tiles": {"query_count": 6, "query_length": 13, "document_length": 150, "dimension": 128, "documents": 3},
    "small": {"query_count": 6, "query_length": 24, "document_length": 40, "dimension": 64},
    "small_few_rows": {"query_count": 1, "query_length": 5, "document_length": 70, "dimension": 48},
    "long_query": {"query_count": 2, "query_length": 150, "document_length": 20, "dimension": 24, "documents": 3},
    "one_token": {"query_count": 1, "query_length": 1, "document_length": 1, "dimension": 8, "documents": 1},
    "resident_chunks": {"query_count": 3, "query_length": 30, "document_length": 70, "dimension": 200, "documents": 2},
    "resident_few_rows": {"query_length": 5, "document_length": 70, "dimension": 256, "documents": 2},
    "long_wide_query": {"query_count": 2, "query_length": 150, "document_length": 20, "dimension": 136, "documents": 3},
    "walked": {"query_count": 3, "query_length": 30, "document_length": 70, "dimension": 304, "documents": 2},
    "walked_few_rows": {"query_count": 2, "query_length": 5, "document_length": 70, "dimension": 304, "documents": 2},
    "candidates": {"candidates": True, "query_length": 33, "document_length": 70, "dimension": 64, "documents": 2},
    "packed": {"packed": True, "document_length": 150, "dimension": 64, "documents": 5},
    "packed_candidates": {"packed": True, "candidates": True, "document_length": 80, "dimension": 96, "documents": 3},
}  # fmt: skip
FORMATS = ["int8", "float8", "residual1", "residual2", "residual4", "residual8"]
_STORED = {"int8": torch.int8, "float8": torch.float8_e4m3fn}


def close(
    dtype: torch.dtype, form: str, *, normalize: bool = True, table: torch.dtype = torch.float16, **sizes: Any
) -> None:
    """Scores by the kernels against the definition on decoded documents in float64, by the tolerance rule."""
    case = make_case(**sizes)
    if form in _STORED:
        values, scales = quantize_documents(case.documents, _STORED[form])
        decoded = values.double() * scales.double()[..., None]
        check_scores(
            case,
            decoded,
            dtype,
            lambda queries, **rest: maxsim_quantized(queries, values, scales, backend="triton", **rest),
        )
        return
    codec = random_codec(case.documents.shape[-1], int(form[-1]), table)
    codes, residuals = random_codes(tuple(case.documents.shape[:-1]), codec)
    close_coded(dtype, case, codec, codes, residuals, normalize)


def close_coded(
    dtype: torch.dtype, case: Case, codec: ResidualCodec, codes: Tensor, residuals: Tensor, normalize: bool
) -> None:
    """The same for residual codes in place of the case's documents."""
    # Tokens are rounded to the queries' dtype, once: what is left to err is the sum.
    precise = torch.float64 if dtype == torch.float32 else torch.float32
    decoded = residual_decompress(codes, residuals, codec, normalize=normalize, dtype=precise)
    if dtype != torch.float32:
        decoded = decoded.to(dtype).double()
    check_scores(
        case,
        decoded,
        dtype,
        lambda queries, **rest: maxsim_residual(
            queries, codes, residuals, codec, normalize=normalize, backend="triton", **rest
        ),
    )


def shape(name: str, form: str, dtype: torch.dtype, masked: bool) -> None:
    """One of SHAPES in one of FORMATS; with masks, weights too."""
    close(dtype, form, masked=masked, weighted=masked, **SHAPES[name])


def rows_of_any_start(dtype: torch.dtype) -> None:
    """Rows that start anywhere and end anywhere: D that fills no slice, no chunk, no word; views with gaps."""
    close(dtype, "int8", dimension=101, document_length=70)
    close(dtype, "float8", dimension=17, masked=True)
    for bits, dimension in ((1, 40), (2, 20), (2, 212), (4, 10), (4, 138), (8, 7), (8, 131)):
        for table in (torch.float16, torch.float32):
            close(dtype, f"residual{bits}", table=table, dimension=dimension, document_length=70, query_count=2)
    case = make_case(dimension=64, document_length=70)
    queries = case.queries.to(dtype)
    values, scales = quantize_documents(case.documents)
    codec = random_codec(64, 2)
    codes, residuals = random_codes((4, 70), codec)
    expected = maxsim_quantized(queries, values, scales, backend="triton")
    coded = maxsim_residual(queries, codes, residuals, codec, backend="triton")
    for shift in (1, 2, 16):
        views = []
        for side in (queries, values, residuals, codec.centroids):
            storage = torch.full((*side.shape[:-1], side.shape[-1] + 16), 99, dtype=side.dtype)
            views.append(storage[..., shift % 16 : shift % 16 + side.shape[-1]])
            views[-1].copy_(side)
        found = maxsim_quantized(views[0], views[1], scales, backend="triton")
        assert torch.equal(found, expected)
        table = ResidualCodec(views[3], codec.bucket_weights)
        assert torch.equal(maxsim_residual(views[0], codes, views[2], table, backend="triton"), coded)


def rows_apart(dtype: torch.dtype) -> None:
    """Rows that start at whole words and end within one, the last of them at the tensor's end."""
    case, codec = make_case(dimension=20, document_length=70), random_codec(20, 2)
    codes, residuals = random_codes((4, 70), codec)
    apart = torch.nn.functional.pad(residuals, (0, 3))[..., :5]
    close_coded(dtype, case, codec, codes, apart, normalize=True)


def tables(dtype: torch.dtype) -> None:
    """Centroids of each dtype, with and without unit length, in one chunk and in several."""
    for table in (torch.float16, torch.bfloat16, torch.float32):
        for dimension in (32, 136, 264):
            for normalize in (False, True):
                close(dtype, "residual4", table=table, normalize=normalize, dimension=dimension, document_length=70,
                      query_count=2)  # fmt: skip


def _scores(form: str, queries: Tensor, shape: tuple[int, ...] = (3, 150), **options: Any) -> Tensor:
    if form in _STORED:
        documents = torch.randn(*shape, queries.shape[-1], generator=torch.Generator().manual_seed(0))
        return maxsim_quantized(queries, *quantize_documents(documents, _STORED[form]), backend="triton", **options)
    codec = random_codec(queries.shape[-1], int(form[-1]))
    return maxsim_residual(queries, *random_codes(shape, codec), codec, backend="triton", **options)


def not_a_number(dtype: torch.dtype) -> None:
    """NaN of a kept token, wherever it comes from, reaches every score of its document and no other."""
    queries = torch.randn(2, 3, 16, generator=torch.Generator().manual_seed(0)).to(dtype)
    for place in (0, 63, 64, 149):
        documents = torch.randn(3, 150, 16, generator=torch.Generator().manual_seed(1))
        values, scales = quantize_documents(documents, torch.float8_e4m3fn)
        for code in (0x7F, 0xFF):
            spoilt = values.view(torch.uint8).clone()
            spoilt[1, place, 5] = code
            found = maxsim_quantized(queries, spoilt.view(values.dtype), scales, backend="triton")
            assert found[:, 1].isnan().all() and found[:, [0, 2]].isfinite().all()
        scales[1, place] = torch.nan
        found = maxsim_quantized(queries, values, scales, backend="triton")
        assert found[:, 1].isnan().all() and found[:, [0, 2]].isfinite().all()
    for dimension in (16, 136):
        codec = random_codec(dimension, 2)
        queries = torch.randn(2, 3, dimension, generator=torch.Generator().manual_seed(0)).to(dtype)
        codes, residuals = random_codes((3, 150), codec)
        codes %= 10
        for normalize in (False, True):
            tables = (codec.centroids, codec.field_weights, None, None, None, None, normalize, False, "triton")
            for code in (-1, 11, 2**31 - 1, -(2**31)):  # no centroid has that number
                other = codes.clone()
                other[1, 140] = code
                found = torch.ops.jmlr_kernels.maxsim_residual_forward(queries, other, residuals, *tables)
                assert found[:, 1].isnan().all() and found[:, [0, 2]].isfinite().all()
            for number in (torch.nan, torch.inf):  # infinity over an infinite length is NaN as well
                spoilt = codec.centroids.clone()
                spoilt[10, -1] = number
                other[1, 140] = 10
                found = maxsim_residual(queries, other, residuals, ResidualCodec(spoilt, codec.bucket_weights),
                                        normalize=normalize, backend="triton")  # fmt: skip
                assert not found[:, 1].isfinite().all() and found[:, [0, 2]].isfinite().all()
                assert found[:, 1].isnan().all() or not normalize


def lengths(dtype: torch.dtype) -> None:
    """Unit length of a token of any length, float16's range or not; a token of length zero scores zero."""
    for dimension in (24, 152):
        case = make_case(documents=11, document_length=1, dimension=dimension)
        lengths = torch.logspace(-8, 8, 11)[:, None]
        codec = ResidualCodec(case.documents[:, 0].float() * lengths, torch.zeros(4))
        codes = torch.arange(11, dtype=torch.int32)[:, None]
        residuals = torch.zeros(11, 1, dimension // 4, dtype=torch.uint8)
        close_coded(dtype, case, codec, codes, residuals, normalize=True)
        empty = ResidualCodec(torch.zeros(1, dimension), torch.zeros(4))
        assert (maxsim_residual(case.queries.to(dtype), codes * 0, residuals, empty, backend="triton") == 0).all()


def excluded_anything(dtype: torch.dtype) -> None:
    """Whatever excluded tokens hold, and codes of padding in particular, changes nothing."""
    queries = torch.randn(3, 4, 24, generator=torch.Generator().manual_seed(0)).to(dtype)
    mask = torch.rand(3, 150, generator=torch.Generator().manual_seed(1)) > 0.5
    mask[2] = False
    values, scales = quantize_documents(torch.randn(3, 150, 24), torch.float8_e4m3fn)
    expected = maxsim_quantized(queries, values, scales, document_mask=mask, backend="triton")
    assert (expected[:, 2] == 0).all() and (expected[:, :2] != 0).all()
    values.view(torch.uint8)[~mask] = 0x7F
    scales[~mask] = torch.inf
    assert torch.equal(maxsim_quantized(queries, values, scales, document_mask=mask, backend="triton"), expected)
    codec = random_codec(24, 2)
    codes, residuals = random_codes((3, 150), codec)
    expected = maxsim_residual(queries, codes, residuals, codec, document_mask=mask, backend="triton")
    codes[~mask] = torch.randint(-(2**31), 2**31, codes[~mask].shape).int()
    residuals[~mask] = 255
    found = maxsim_residual(queries, codes, residuals, codec, document_mask=mask, backend="triton")
    assert torch.equal(found, expected) and (found[:, 2] == 0).all()


def empty_sides(dtype: torch.dtype) -> None:
    """Documents and queries without kept tokens score zero, whatever the weights; so do packed ones of no length."""
    queries = torch.randn(2, 3, 16).to(dtype)
    offsets = torch.tensor([0, 0, 4, 4, 9, 9], dtype=torch.int32)
    for form in ("int8", "residual2"):
        weights = torch.full((2, 3), torch.nan)
        scores = _scores(form, queries, (9,), cu_seqlens=offsets, query_weights=weights)
        assert (scores[:, [0, 2, 4]] == 0).all() and scores[:, [1, 3]].isnan().all()
        mask = torch.tensor([[True] * 3, [False] * 3])
        scores = _scores(form, queries, (9,), cu_seqlens=offsets, query_mask=mask)
        assert (scores[1] == 0).all() and (scores[0, [1, 3]] != 0).all()
        for shape in ((0, 3, 16), (2, 0, 16)):
            assert (_scores(form, torch.randn(shape).to(dtype), (4, 5)) == 0).all()
        assert _scores(form, queries, (0, 5)).shape == (2, 0) and (_scores(form, queries, (4, 0)) == 0).all()


def many_runs(dtype: torch.dtype) -> None:
    """The same bits however documents are divided among blocks, and whoever's turn it is."""
    queries = torch.randn(6, 12, 136, generator=torch.Generator().manual_seed(0)).to(dtype)
    for form in ("float8", "residual2"):
        found = []
        for processors, seed in ((1, 0), (2, 1), (1000, 2)):
            maxsim_calls.processors, maxsim_calls.seed = processors, seed
            try:
                found.append(_scores(form, queries, (9, 70)))
            finally:
                maxsim_calls.processors, maxsim_calls.seed = 2, 0
        assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])


PROBES: dict[str, Callable[[torch.dtype], None]] = {
    function.__name__: function
    for function in (
        rows_of_any_start,
        rows_apart,
        tables,
        not_a_number,
        lengths,
        excluded_anything,
        empty_sides,
        many_runs,
    )
}

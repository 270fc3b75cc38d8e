"""Residual codes: the bytes are ColBERT's own, and scores are those of the decoded documents in float64."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from compressed_cases import BACKEND_AND_DTYPE, BACKENDS, DEVICE, DTYPES, NATIVE, SHAPES, check_scores, random_sizes
from maxsim_cases import make_case
from torch import Tensor

from jmlr_kernels import ResidualCodec, maxsim, maxsim_residual, ops, residual_compress, residual_decompress
from jmlr_kernels.maxsim import config_compressed, torch_compressed

BITS = [1, 2, 4, 8]
# Made by colbert-ai 0.2.22: ResidualCodec.compress and .decompress of two embeddings for each number of bits, on a CPU.
GOLDEN = json.loads(Path(__file__).with_name("colbert_residual_codes.json").read_text())


def random_codec(dimension: int, bits: int, dtype: torch.dtype = torch.float16, count: int = 11) -> ResidualCodec:
    draw = torch.Generator().manual_seed(bits)
    centroids = torch.nn.functional.normalize(torch.randn(count, dimension, generator=draw), dim=-1)
    weights = 0.3 * torch.randn(2**bits, generator=draw)
    return ResidualCodec(centroids.to(dtype), weights, weights.sort().values[1:])


def random_codes(shape: tuple[int, ...], codec: ResidualCodec, seed: int = 0) -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(seed)
    codes = torch.randint(codec.centroids.shape[0], shape, generator=draw, dtype=torch.int32)
    return codes, torch.randint(256, (*shape, codec.dimension * codec.nbits // 8), generator=draw, dtype=torch.uint8)


def check(
    backend: str,
    dtype: torch.dtype,
    bits: int = 2,
    normalize: bool = True,
    table: torch.dtype = torch.float16,
    **sizes: Any,
) -> None:
    case = make_case(**sizes)
    codec = random_codec(case.documents.shape[-1], bits, table)
    codes, residuals = random_codes(tuple(case.documents.shape[:-1]), codec)
    decoded = residual_decompress(codes, residuals, codec, normalize=normalize, dtype=torch.float64)
    placed = codes.to(DEVICE), residuals.to(DEVICE), codec.to(DEVICE)

    def score(queries: Tensor, **options: Any) -> Tensor:
        return maxsim_residual(queries, *placed, normalize=normalize, backend=backend, **options)

    check_scores(case, decoded, dtype, score)


@pytest.mark.parametrize(("backend", "dtype"), BACKEND_AND_DTYPE, ids=str)
@pytest.mark.parametrize("shape", SHAPES)
def test_paths(shape: str, backend: str, dtype: torch.dtype) -> None:
    check(backend, dtype, masked=True, weighted=True, **SHAPES[shape])


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_every_number_of_bits(backend: str, bits: int) -> None:
    check(backend, torch.float32, bits=bits, dimension=24, table=torch.float32)
    check(backend, torch.float16, bits=bits, dimension=32, normalize=False, table=torch.bfloat16)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(("candidates", "packed"), [(False, False), (False, True), (True, False), (True, True)])
def test_layouts(candidates: bool, packed: bool, masked: bool, backend: str) -> None:
    sizes = {"candidates": candidates, "packed": packed, "masked": masked, "weighted": masked}
    check(backend, torch.float16, documents=3, seed=1, **sizes)


def test_documents_per_program_covers_the_last_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """Seven documents in runs of three: the last program has one."""
    monkeypatch.setattr(config_compressed, "documents_per_program", lambda *_: 3)
    check("triton", torch.float16, documents=7, document_length=5, packed=True, candidates=True, query_count=2)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(6))
def test_random_shapes(seed: int) -> None:
    for dtype in DTYPES["triton"]:
        bits = BITS[seed % 4]
        check("triton", dtype, bits=bits, dimension=(16, 64, 80, 112, 256, 136)[seed], **random_sizes(seed))


def test_float64_queries_keep_float64() -> None:
    case, codec = make_case(), random_codec(20, 2)
    codes, residuals = random_codes((4, 23), codec)
    decoded = residual_decompress(codes, residuals, codec, dtype=torch.float64)
    found = maxsim_residual(case.queries, codes, residuals, codec, backend="torch")
    torch.testing.assert_close(found, maxsim(case.queries, decoded, backend="torch"), rtol=1e-12, atol=1e-12)


# --------------------------------------------------------------------------- ColBERT's format


def _golden(bits: int) -> tuple[ResidualCodec, dict[str, Tensor]]:
    tensors = {name: torch.tensor(value) for name, value in GOLDEN[str(bits)].items()}
    tensors["codes"], tensors["residuals"] = tensors["codes"].int(), tensors["residuals"].to(torch.uint8)
    return ResidualCodec(*(tensors[name] for name in ("centroids", "bucket_weights", "bucket_cutoffs"))), tensors


@pytest.mark.parametrize("bits", BITS)
def test_codes_that_colbert_made(bits: int) -> None:
    codec, made = _golden(bits)
    codes, residuals = residual_compress(made["embeddings"], codec)
    assert torch.equal(codes, made["codes"]) and torch.equal(residuals, made["residuals"])
    torch.testing.assert_close(residual_decompress(codes, residuals, codec), made["decompressed"], rtol=1e-6, atol=1e-7)
    queries = torch.randn(1, 3, codec.dimension)
    offsets = torch.tensor([0, 1, 2], dtype=torch.int32)
    expected = maxsim(queries, made["decompressed"], cu_seqlens=offsets, backend="torch")
    for backend in BACKENDS:
        arguments = [tensor.to(DEVICE) for tensor in (queries, codes, residuals)]
        found = maxsim_residual(*arguments, codec.to(DEVICE), offsets.to(DEVICE), backend=backend)
        torch.testing.assert_close(found.cpu(), expected)


@pytest.mark.parametrize("bits", BITS)
def test_against_colbert_itself(bits: int, tmp_path: Path) -> None:
    """The library's own codec, through the files that it saves; on a CPU, where it computes in float32."""
    library = pytest.importorskip("colbert.indexing.codecs.residual", exc_type=ImportError)
    draw = torch.Generator().manual_seed(bits)
    dimension = 128
    embeddings = torch.nn.functional.normalize(torch.randn(300, dimension, generator=draw), dim=-1)
    centroids = embeddings[:20].half().float()  # what is saved is float16
    fitted = ResidualCodec.fit(centroids, embeddings[100:], bits)
    settings = SimpleNamespace(total_visible_gpus=0, dim=dimension, nbits=bits, rank=0)
    theirs = library.ResidualCodec(settings, centroids, torch.tensor(0.0), fitted.bucket_cutoffs, fitted.bucket_weights)
    theirs.save(str(tmp_path))
    codec = ResidualCodec.load(tmp_path)
    assert codec.nbits == bits and codec.dimension == dimension and codec.centroids.dtype == torch.float16
    compressed = theirs.compress(embeddings)
    codes, residuals = residual_compress(embeddings, codec)
    assert torch.equal(codes, compressed.codes) and torch.equal(residuals, compressed.residuals)
    decompressed = theirs.decompress(compressed)
    torch.testing.assert_close(residual_decompress(codes, residuals, codec), decompressed, rtol=1e-6, atol=1e-7)


def test_compression_comes_near() -> None:
    """More bits, less error; every one of them better than the centroid alone."""
    draw = torch.Generator().manual_seed(0)
    embeddings = torch.nn.functional.normalize(torch.randn(500, 32, generator=draw), dim=-1)
    centroids = embeddings[:40]
    alone = 1.0
    for bits, limit in zip(BITS, (0.8, 0.5, 0.2, 0.05), strict=True):
        codec = ResidualCodec.fit(centroids, embeddings[40:], bits)
        decoded = residual_decompress(*residual_compress(embeddings[40:], codec), codec)
        error = (decoded - embeddings[40:]).norm(dim=-1).mean().item()
        assert error < limit < alone
        alone = error


# --------------------------------------------------------------------------- corners


def _inputs(bits: int = 2) -> tuple[Tensor, Tensor, Tensor, ResidualCodec]:
    codec = random_codec(16, bits)
    queries = torch.randn(2, 3, 16, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    codes, residuals = random_codes((3, 70), codec)
    return queries, codes.to(DEVICE), residuals.to(DEVICE), codec.to(DEVICE)


@pytest.mark.parametrize("backend", BACKENDS)
def test_nan_of_kept_tokens_propagates_and_of_excluded_ones_does_not(backend: str) -> None:
    queries, codes, residuals, codec = _inputs()
    codes[codes == 4] = 5
    codes[1, 68] = 4
    codec.centroids[4, 7] = float("nan")
    scores = maxsim_residual(queries, codes, residuals, codec, backend=backend)
    assert scores[:, 1].isnan().all() and scores[:, [0, 2]].isfinite().all()
    mask = codes != 4
    assert maxsim_residual(queries, codes, residuals, codec, document_mask=mask, backend=backend).isfinite().all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_padding_may_hold_any_code(backend: str) -> None:
    queries, codes, residuals, codec = _inputs()
    expected = maxsim_residual(queries, codes[:, :50], residuals[:, :50], codec, backend="torch")
    codes[:, 50:] = -1
    codes[0, 60] = 2**31 - 1
    mask = (torch.arange(70, device=DEVICE) < 50).expand(3, 70)
    found = maxsim_residual(queries, codes, residuals, codec, document_mask=mask, backend=backend)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("code", [-1, 11, 2**31 - 1])
def test_a_code_outside_the_table_is_refused_or_nan(code: int) -> None:
    """Refused where looking costs nothing; in the kernel it must not read outside the table."""
    queries, codes, residuals, codec = _inputs()
    codes[1, 3] = code
    if DEVICE == "cpu":
        with pytest.raises(ValueError, match="the codec has centroids 0 to 10"):
            maxsim_residual(queries, codes, residuals, codec)
    tables = (codec.centroids, codec.field_weights, None, None, None, None, True, False)
    for backend in ("triton", *NATIVE):
        scores = torch.ops.jmlr_kernels.maxsim_residual_forward(queries, codes, residuals, *tables, backend)
        assert scores[:, 1].isnan().all() and scores[:, [0, 2]].isfinite().all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_token_of_length_zero_scores_zero(backend: str) -> None:
    codec = ResidualCodec(torch.zeros(1, 16), torch.zeros(4)).to(DEVICE)
    codes = torch.zeros(2, 5, dtype=torch.int32, device=DEVICE)
    residuals = torch.zeros(2, 5, 4, dtype=torch.uint8, device=DEVICE)
    scores = maxsim_residual(torch.ones(1, 3, 16, device=DEVICE), codes, residuals, codec, backend=backend)
    assert (scores == 0).all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("packed", [False, True])
def test_empty_documents_and_queries_score_zero(backend: str, packed: bool) -> None:
    queries, codes, residuals, codec = _inputs()
    options: dict[str, Tensor] = {"query_mask": torch.tensor([[True] * 3, [False] * 3], device=DEVICE)}
    if packed:
        codes, residuals = codes[:2].flatten(), residuals[:2].flatten(0, 1)
        options["cu_seqlens"] = torch.tensor([0, 70, 70, 140], dtype=torch.int32, device=DEVICE)
    else:
        options["document_mask"] = torch.ones(3, 70, dtype=torch.bool, device=DEVICE)
        options["document_mask"][1] = False
    scores = maxsim_residual(queries, codes, residuals, codec, backend=backend, **options)
    assert (scores[:, 1] == 0).all() and (scores[1] == 0).all() and (scores[0, [0, 2]] != 0).all()


@pytest.mark.parametrize("backend", ["triton", *NATIVE])
@pytest.mark.parametrize("far", ["residuals", "centroids"])
def test_offsets_past_two_to_the_31(far: str, backend: str) -> None:
    """A view whose strides overflow 32 bits; memory is reserved, not touched."""
    queries, codes, residuals, codec = _inputs()
    codes = codes % 3
    expected = maxsim_residual(queries, codes, residuals, codec, backend="torch")
    # A stride that fits 32 bits, and twice of it that does not.
    if far == "residuals":
        span = torch.empty(2**31 + 512, dtype=torch.uint8, device=DEVICE)
        residuals = span.as_strided((3, 70, 4), (2**30, 4, 1)).copy_(residuals)
    else:
        span = torch.empty(2**31 + 64, dtype=torch.float16, device=DEVICE)
        table = span.as_strided((3, 16), (2**30, 1)).copy_(codec.centroids[:3])
        codec = ResidualCodec(table, codec.bucket_weights)
    torch.testing.assert_close(maxsim_residual(queries, codes, residuals, codec, backend=backend), expected)


@pytest.mark.parametrize("backend", BACKENDS)
def test_strided_inputs(backend: str) -> None:
    queries, codes, residuals, codec = _inputs()
    spread, gaps = torch.stack([queries] * 2, 1)[:, 1], torch.stack([residuals] * 2, 1)[:, 1]
    turned = codes.T.contiguous().T
    table = ResidualCodec(torch.cat([codec.centroids] * 2, 1)[:, :16], codec.bucket_weights)
    assert not any(tensor.is_contiguous() for tensor in (spread, gaps, turned, table.centroids))
    expected = maxsim_residual(queries, codes, residuals, codec, backend="torch")
    torch.testing.assert_close(maxsim_residual(spread, turned, gaps, table, backend=backend), expected)
    own = maxsim_residual(
        queries, codes.expand(2, 3, 70), gaps.expand(2, 3, 70, 4), codec, candidates=True, backend=backend
    )
    torch.testing.assert_close(own, expected)


@pytest.mark.parametrize("backend", BACKENDS)
def test_bitwise_repeatable(backend: str) -> None:
    first, second = (maxsim_residual(*_inputs(), backend=backend) for _ in range(2))
    assert torch.equal(first, second)


def test_decoded_documents_are_never_whole_in_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch_compressed, "_CHUNK_ELEMENTS", 2**14)
    sizes: list[int] = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            if isinstance(out, Tensor) and out.is_floating_point():
                sizes.append(out.numel())
            return out

    codec = random_codec(64, 2)
    codes, residuals = random_codes((40, 30), codec)
    tables = (codec.centroids, codec.field_weights, None, None, None, None, True, False)
    with Watch():
        torch_compressed.residual_forward(torch.ones(1, 8, 64), codes, residuals, *tables)
    assert max(sizes) <= 2**14 < codes.numel() * 64


def test_ranking_survives_two_bits() -> None:
    """The best documents of unit vectors in clusters stay the best under two bits per element."""
    draw = torch.Generator().manual_seed(0)
    centres = torch.randn(40, 64, generator=draw)
    documents = centres[torch.randint(40, (200, 24), generator=draw)] + 0.5 * torch.randn(200, 24, 64, generator=draw)
    documents = torch.nn.functional.normalize(documents, dim=-1)
    queries = documents[:20, :8] + 0.1 * torch.randn(20, 8, 64, generator=draw)
    codec = ResidualCodec.fit(torch.nn.functional.normalize(centres, dim=-1), documents[::7].flatten(0, 1), 2)
    codes, residuals = residual_compress(documents.flatten(0, 1), codec)
    scores = maxsim_residual(queries, codes.view(200, 24), residuals.view(200, 24, -1), codec)
    exact = maxsim(queries, documents)
    assert torch.equal(scores.argmax(1), exact.argmax(1))
    best, kept = (ranking.topk(10).indices.tolist() for ranking in (exact, scores))
    assert sum(len(set(a) & set(b)) for a, b in zip(best, kept, strict=True)) >= 0.6 * 200


# --------------------------------------------------------------------------- refusals


_CODEC = ResidualCodec(torch.zeros(3, 8), torch.zeros(4))
_CODES, _RESIDUALS = torch.zeros(5, 6, dtype=torch.int32), torch.zeros(5, 6, 2, dtype=torch.uint8)
_QUERIES = torch.zeros(2, 3, 8)


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"codes": _CODES.long()}, TypeError, "codes are torch.int64; pass int32"),
        ({"codes": _CODES[:, :5]}, ValueError, r"codes must be \[5, 6\], one per token"),
        ({"codes": _CODES + 3}, ValueError, "codes run from 3 to 3, but the codec has centroids 0 to 2"),
        ({"residuals": _RESIDUALS.char()}, TypeError, "residuals are torch.int8; pass uint8"),
        ({"residuals": _RESIDUALS[..., :1]}, ValueError, r"residuals must be \[Nd, Ld, 2\].*D=8"),
        ({"queries": torch.zeros(2, 3, 7)}, ValueError, "queries have D=7 and the codec D=8"),
        ({"codec": _CODEC.to("meta")}, ValueError, "codec.centroids is on meta"),
        ({"queries": _QUERIES.clone().requires_grad_()}, ValueError, "queries requires a gradient"),
        ({"codec": ResidualCodec(torch.zeros(3, 8, requires_grad=True), torch.zeros(4))}, ValueError, "gradient"),
    ],
)
def test_bad_arguments_are_named(changed: dict[str, Any], error: type[Exception], message: str) -> None:
    arguments = {"queries": _QUERIES, "codes": _CODES, "residuals": _RESIDUALS, "codec": _CODEC, **changed}
    with pytest.raises(error, match=message):
        maxsim_residual(**arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((torch.zeros(8), torch.zeros(4)), r"centroids must be floating \[C, D\]"),
        ((torch.zeros(3, 8).double(), torch.zeros(4)), r"centroids must be floating \[C, D\] of 16 or 32 bits"),
        ((torch.zeros(3, 8), torch.zeros(5)), r"bucket_weights must be \[2\*\*nbits\]"),
        ((torch.zeros(3, 7), torch.zeros(4)), "D=7 times nbits=2 is no whole number of bytes"),
        ((torch.zeros(3, 8), torch.zeros(4), torch.zeros(4)), r"bucket_cutoffs must be \[3\]"),
    ],
)
def test_tables_that_do_not_fit_are_named(arguments: tuple[Tensor, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ResidualCodec(*arguments)


def test_compression_refuses_what_it_cannot_do() -> None:
    with pytest.raises(ValueError, match="no bucket_cutoffs"):
        residual_compress(torch.zeros(5, 8), _CODEC)
    with pytest.raises(ValueError, match=r"embeddings must be \[T, 8\]"):
        residual_compress(torch.zeros(5, 7), ResidualCodec(torch.zeros(3, 8), torch.zeros(4), torch.zeros(3)))
    with pytest.raises(ValueError, match="nbits=3: choose 1, 2, 4 or 8"):
        ResidualCodec.fit(torch.zeros(3, 8), torch.zeros(5, 8), 3)


def test_wide_embeddings_need_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    queries, codec = torch.ones(1, 2, 272), random_codec(272, 1)
    codes, residuals = random_codes((2, 3), codec)
    with pytest.raises(RuntimeError, match="up to D=256, not D=272; use backend='torch'"):
        maxsim_residual(queries, codes, residuals, codec, backend="triton")
    monkeypatch.setattr(ops, "resolve_backend", lambda *_: "triton")  # as on a GPU
    with pytest.warns(RuntimeWarning, match="falls back to plain torch: .* up to D=256"):
        assert maxsim_residual(queries, codes, residuals, codec).shape == (1, 2)

"""int8 and float8 documents against the definition on decoded documents in float64, and what quantising costs."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
import triton
import triton.language as tl
from compressed_cases import BACKEND_AND_DTYPE, BACKENDS, DEVICE, DTYPES, NATIVE, SHAPES, check_scores, random_sizes
from hypothesis import given, settings
from hypothesis import strategies as st
from maxsim_cases import make_case
from torch import Tensor

from jmlr_kernels import maxsim, maxsim_quantized, quantize_documents
from jmlr_kernels.maxsim import config, config_compressed, torch_compressed
from jmlr_kernels.maxsim.triton_compressed import _float8_from_bits

STORED = [torch.int8, torch.float8_e4m3fn]


def check(stored: torch.dtype, backend: str, dtype: torch.dtype, **sizes: object) -> None:
    case = make_case(**sizes)
    values, scales = quantize_documents(case.documents, stored)
    decoded = values.double() * scales.double()[..., None]
    values, scales = values.to(DEVICE), scales.to(DEVICE)
    check_scores(
        case,
        decoded,
        dtype,
        lambda queries, **options: maxsim_quantized(queries, values, scales, backend=backend, **options),
    )


@pytest.mark.parametrize(("backend", "dtype"), BACKEND_AND_DTYPE, ids=str)
@pytest.mark.parametrize("shape", [*SHAPES, "chunked_dimension"])
def test_paths(shape: str, backend: str, dtype: torch.dtype) -> None:
    sizes = SHAPES.get(shape, {"dimension": 300, "documents": 2, "query_count": 2})
    stored = torch.float8_e4m3fn if dtype == torch.float16 else torch.int8
    check(stored, backend, dtype, masked=True, weighted=True, **sizes)


@pytest.mark.parametrize("stored", STORED, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(("candidates", "packed"), [(False, False), (False, True), (True, False), (True, True)])
def test_layouts(candidates: bool, packed: bool, masked: bool, backend: str, stored: torch.dtype) -> None:
    sizes = {"candidates": candidates, "packed": packed, "masked": masked, "weighted": masked}
    check(stored, backend, torch.float16, documents=3, seed=1, **sizes)


@pytest.mark.slow
@pytest.mark.parametrize("stored", STORED, ids=str)
@pytest.mark.parametrize("seed", range(6))
def test_random_shapes(seed: int, stored: torch.dtype) -> None:
    for dtype in DTYPES["triton"]:
        check(stored, "triton", dtype, dimension=(16, 63, 80, 111, 260, 129)[seed], **random_sizes(seed))


def test_float64_queries_keep_float64() -> None:
    case = make_case(masked=True)
    values, scales = quantize_documents(case.documents)
    scores = maxsim_quantized(case.queries, values, scales, backend="torch", **case.options)
    exact = maxsim(case.queries, values.double() * scales.double()[..., None], backend="torch", **case.options)
    torch.testing.assert_close(scores, exact, rtol=1e-12, atol=1e-12)


def test_documents_per_program_covers_the_last_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """Seven documents in runs of three: the last program has one."""
    monkeypatch.setattr(config_compressed, "documents_per_program", lambda *_: 3)
    check(torch.int8, "triton", torch.float16, documents=7, document_length=5, masked=True)
    check(
        torch.int8, "triton", torch.float16, documents=7, document_length=5, packed=True, candidates=True, query_count=2
    )


def test_both_float8_decoders(monkeypatch: pytest.MonkeyPatch) -> None:
    """The chip's conversion, which the interpreter otherwise leaves to integer arithmetic, and the other way round."""
    for form in (config_compressed.FLOAT8, config_compressed.FLOAT8_BITS):
        monkeypatch.setattr(config_compressed, "format_of", lambda *_, form=form: form)
        check(torch.float8_e4m3fn, "triton", torch.float16, masked=True)
        check(torch.float8_e4m3fn, "triton", torch.float32, dimension=70)


@triton.jit
def _decode_kernel(codes, values, COUNT: tl.constexpr):
    index = tl.arange(0, COUNT)
    tl.store(values + index, _float8_from_bits(tl.load(codes + index)))


def test_float8_from_bits_on_all_codes() -> None:
    codes = torch.arange(256, dtype=torch.uint8, device=DEVICE)
    values = torch.empty(256, dtype=torch.float16, device=DEVICE)
    _decode_kernel[(1,)](codes, values, COUNT=256)
    expected = codes.view(torch.float8_e4m3fn).half()
    assert expected.isnan().sum() == 2 and torch.equal(values.isnan(), expected.isnan())
    finite = ~expected.isnan()
    assert torch.equal(values[finite], expected[finite])
    assert torch.equal(values[finite].signbit(), expected[finite].signbit())


def test_decoder_follows_chip_and_type() -> None:
    chosen = [config_compressed.format_of(torch.float8_e4m3fn, chip, False) for chip in (80, 86, 89, 90, 100)]
    bits, chip = config_compressed.FLOAT8_BITS, config_compressed.FLOAT8
    assert chosen == [bits, bits, chip, chip, chip]
    assert config_compressed.format_of(torch.int8, 80, False) == config_compressed.INT8


# --------------------------------------------------------------------------- quantising


_FLOATS = st.floats(width=32, allow_nan=False, allow_infinity=False)
_TOKENS = st.integers(1, 4).flatmap(
    lambda width: st.lists(st.lists(_FLOATS, min_size=width, max_size=width), min_size=1, max_size=5)
)


@settings(max_examples=100, deadline=None, database=None)
@given(_TOKENS)
def test_error_is_half_a_scale_at_most(tokens: list[list[float]]) -> None:
    """int8: half a step. The quotient that is rounded has itself been rounded, by 2**-24 of at most 127."""
    documents = torch.tensor(tokens, dtype=torch.float32)
    values, scales = quantize_documents(documents)
    assert values.abs().max() <= 127
    error = (values.double() * scales.double()[:, None] - documents.double()).abs()
    assert (error <= scales.double()[:, None] * (0.5 + 2.0**-17)).all()


@settings(max_examples=100, deadline=None, database=None)
@given(_TOKENS)
def test_float8_error_is_one_part_in_sixteen_or_the_smallest_step(tokens: list[list[float]]) -> None:
    documents = torch.tensor(tokens, dtype=torch.float32)
    values, scales = quantize_documents(documents, torch.float8_e4m3fn)
    error = (values.double() * scales.double()[:, None] - documents.double()).abs()
    allowed = torch.maximum(documents.double().abs() * 2.0**-4, scales.double()[:, None] * 2.0**-10)
    assert values.float().isfinite().all() and (error <= allowed * (1 + 2.0**-20)).all()


@pytest.mark.parametrize("stored", STORED, ids=str)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_zero_and_unusable_tokens(stored: torch.dtype, dtype: torch.dtype) -> None:
    documents = torch.ones(2, 4, 8, dtype=dtype)
    documents[0, 1] = 0
    documents[1, 2, 3], documents[1, 3, 3] = float("nan"), float("-inf")
    values, scales = quantize_documents(documents, stored)
    assert values.dtype == stored and scales.dtype == torch.float32 and scales.shape == (2, 4)
    decoded = values.float() * scales[..., None]
    assert (decoded[0, 1] == 0).all() and decoded[1, 2:].isnan().all()
    torch.testing.assert_close(decoded[0, [0, 2, 3]], torch.ones(3, 8))


@pytest.mark.parametrize("shape", [(3, 5, 8), (2, 3, 5, 8), (7, 8), (0, 8), (2, 0, 8)])
def test_shapes_of_quantised_documents(shape: tuple[int, ...]) -> None:
    values, scales = quantize_documents(torch.randn(shape, requires_grad=True))
    assert values.shape == shape and scales.shape == shape[:-1] and not scales.requires_grad


# --------------------------------------------------------------------------- corners


def _inputs(stored: torch.dtype = torch.int8, length: int = 70) -> tuple[Tensor, Tensor, Tensor]:
    draw = torch.Generator().manual_seed(0)
    queries = torch.randn(2, 3, 16, generator=draw).to(DEVICE)
    return queries, *quantize_documents(torch.randn(3, length, 16, generator=draw).to(DEVICE), stored)


@pytest.mark.parametrize("backend", BACKENDS)
def test_nan_of_kept_tokens_propagates_and_of_excluded_ones_does_not(backend: str) -> None:
    queries, values, scales = _inputs()
    clean = maxsim_quantized(queries, values, scales, backend=backend)
    scales[1, 68] = float("nan")
    scores = maxsim_quantized(queries, values, scales, backend=backend)
    assert scores[:, 1].isnan().all() and torch.equal(scores[:, [0, 2]], clean[:, [0, 2]])
    mask = torch.ones(3, 70, dtype=torch.bool, device=DEVICE)
    mask[1, 68] = False
    assert maxsim_quantized(queries, values, scales, document_mask=mask, backend=backend).isfinite().all()
    queries[0, 1, 3] = float("nan")
    assert maxsim_quantized(queries, values, scales, backend=backend)[0].isnan().all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("code", [0x7F, 0xFF])
def test_float8_nan_code_propagates(backend: str, code: int) -> None:
    queries, values, scales = _inputs(torch.float8_e4m3fn)
    values.view(torch.uint8)[1, 40, 5] = code
    scores = maxsim_quantized(queries, values, scales, backend=backend)
    assert scores[:, 1].isnan().all() and scores[:, [0, 2]].isfinite().all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("packed", [False, True])
def test_empty_documents_and_queries_score_zero(backend: str, packed: bool) -> None:
    """Whatever the weights and embeddings of what is excluded hold."""
    queries, values, scales = _inputs()
    queries[1, 1] = float("nan")
    weights = torch.ones(2, 3, device=DEVICE)
    weights[1] = float("inf")
    query_mask = torch.tensor([[True] * 3, [False] * 3], device=DEVICE)
    options: dict[str, Tensor] = {"query_mask": query_mask, "query_weights": weights}
    if packed:
        values, scales = values[:2].flatten(0, 1), scales[:2].flatten()
        options["cu_seqlens"] = torch.tensor([0, 70, 70, 140], dtype=torch.int32, device=DEVICE)
    else:
        options["document_mask"] = torch.ones(3, 70, dtype=torch.bool, device=DEVICE)
        options["document_mask"][1] = False
    scores = maxsim_quantized(queries, values, scales, backend=backend, **options)
    assert (scores[:, 1] == 0).all() and (scores[1] == 0).all() and (scores[0, [0, 2]] != 0).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_documents_no_tokens(backend: str) -> None:
    queries, values, scales = _inputs()
    assert maxsim_quantized(queries, values[:0], scales[:0], backend=backend).shape == (2, 0)
    assert maxsim_quantized(queries[:0], values, scales, backend=backend).shape == (0, 3)
    assert (maxsim_quantized(queries[:, :0], values, scales, backend=backend) == torch.zeros(2, 3, device=DEVICE)).all()
    assert (maxsim_quantized(queries, values[:, :0], scales[:, :0], backend=backend) == 0).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_all_similarities_negative_with_padding(backend: str) -> None:
    """Padding never wins with zero: the answer is -16."""
    queries = torch.zeros(1, 16, 16, device=DEVICE)
    queries[..., 0] = 1
    documents = torch.zeros(1, 8, 16, device=DEVICE)
    documents[0, :3, 0] = -1
    mask = torch.arange(8, device=DEVICE)[None] < 3
    scores = maxsim_quantized(queries, *quantize_documents(documents), document_mask=mask, backend=backend)
    assert scores.item() == pytest.approx(-16)


@pytest.mark.parametrize("backend", ["triton", *NATIVE])
@pytest.mark.parametrize("stored", STORED, ids=str)
def test_offsets_past_two_to_the_31(stored: torch.dtype, backend: str) -> None:
    """A view whose strides overflow 32 bits; memory is reserved, not touched."""
    queries, values, scales = _inputs(stored, 5)
    span = torch.empty(2**31 + 128, dtype=torch.uint8, device=DEVICE).view(stored)
    far = span.as_strided((3, 5, 16), (2**30, 16, 1))  # a stride that fits 32 bits, and twice of it that does not
    far.view(torch.uint8).copy_(values.view(torch.uint8))
    expected = maxsim_quantized(queries, values, scales, backend="torch")
    torch.testing.assert_close(maxsim_quantized(queries, far, scales, backend=backend), expected)
    rows = span.as_strided((3, 16), (2**30, 1))
    rows.view(torch.uint8).copy_(values[0, :3].view(torch.uint8))
    expected = maxsim_quantized(queries, values[:1, :3], scales[:1, :3], backend="torch")
    torch.testing.assert_close(maxsim_quantized(queries, rows[None], scales[:1, :3], backend=backend), expected)
    offsets = torch.tensor([0, 2, 3], dtype=torch.int32, device=DEVICE)
    expected = maxsim_quantized(queries, values[0, :3], scales[0, :3], cu_seqlens=offsets, backend="torch")
    found = maxsim_quantized(queries, rows, scales[0, :3], cu_seqlens=offsets, backend=backend)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("stored", STORED, ids=str)
def test_strided_inputs(backend: str, stored: torch.dtype) -> None:
    queries, values, scales = _inputs(stored)
    spread = torch.stack([queries, queries], -1).transpose(0, 1)[..., 0].transpose(0, 1)
    gaps = torch.stack([values.view(torch.uint8)] * 2, 1).view(stored)[:, 1]
    mask = (torch.arange(140, device=DEVICE) % 3 > 0)[None, ::2].expand(3, 70)
    expected = maxsim_quantized(queries, values, scales, document_mask=mask.contiguous(), backend="torch")
    assert not spread.is_contiguous() and not gaps.is_contiguous()
    torch.testing.assert_close(
        maxsim_quantized(spread, gaps, scales.T.contiguous().T, document_mask=mask, backend=backend), expected
    )
    shared = maxsim_quantized(
        queries, gaps[None].expand(2, 3, 70, 16), scales[None].expand(2, 3, 70), candidates=True, backend=backend
    )
    torch.testing.assert_close(shared, maxsim_quantized(queries, values, scales, backend="torch"))


@pytest.mark.parametrize("backend", BACKENDS)
def test_bitwise_repeatable(backend: str) -> None:
    first, second = (maxsim_quantized(*_inputs(), backend=backend) for _ in range(2))
    assert torch.equal(first, second)


def test_nan_reduction_of_the_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """The reduction that a GPU runs, which the interpreter replaces because it is slow there, gives the same."""
    if DEVICE == "cuda":
        pytest.skip("only the interpreter has two")
    queries, values, scales = _inputs()
    scales[1, 35] = float("nan")
    expected = maxsim_quantized(queries, values, scales, backend="triton")
    monkeypatch.setattr(config, "interpreted", lambda: False)
    found = maxsim_quantized(queries, values, scales, backend="triton")
    torch.testing.assert_close(found, expected, equal_nan=True)
    assert found[:, 1].isnan().all()


_COMPILE = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from jmlr_kernels.maxsim.aot_quantized import configurations
found = next(c for c in configurations(90) if c["name"] == "maxsim_compressed-int8-bare-bf16-d128-rows32")
source = ASTSource(*(found[key] for key in ("kernel", "signature", "constexprs", "attrs")))
print(triton.compile(source, target=GPUTarget("cuda", 90, 32), options=found["options"]).asm["ptx"])
"""


def test_compiled_maxima_propagate_nan() -> None:
    """The interpreter's maximum always does, the chip's only on request: read it from the code."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    run = subprocess.run([sys.executable, "-c", _COMPILE], env=environment, capture_output=True, text=True, timeout=200)
    assert "max.NaN.f32" in run.stdout and "max.f32" not in run.stdout, run.stderr


def test_decoded_documents_are_never_whole_in_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch_compressed, "_CHUNK_ELEMENTS", 2**14)
    sizes: list[int] = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            if isinstance(out, Tensor) and out.is_floating_point():
                sizes.append(out.numel())
            return out

    values, scales = quantize_documents(torch.randn(40, 30, 64))
    expected = maxsim_quantized(torch.ones(1, 8, 64), values, scales, backend="torch")
    with Watch():
        again = torch_compressed.quantized_forward(torch.ones(1, 8, 64), values, scales, None, None, None, None, False)
    assert max(sizes) <= 2**14 < values.numel() and torch.equal(again, expected)


def test_ranking_survives() -> None:
    """The best documents of unit vectors in clusters stay the best: the exact winner is among the first three."""
    draw = torch.Generator().manual_seed(0)
    centres = torch.randn(40, 64, generator=draw)
    documents = centres[torch.randint(40, (200, 24), generator=draw)] + 0.5 * torch.randn(200, 24, 64, generator=draw)
    documents = torch.nn.functional.normalize(documents, dim=-1)
    queries = documents[:20, :8] + 0.1 * torch.randn(20, 8, 64, generator=draw)
    exact = maxsim(queries, documents)
    for stored in STORED:
        scores = maxsim_quantized(queries, *quantize_documents(documents, stored))
        assert torch.equal(scores.argmax(1), exact.argmax(1))
        kept = [
            len(set(a) & set(b))
            for a, b in zip(scores.topk(10).indices.tolist(), exact.topk(10).indices.tolist(), strict=True)
        ]
        assert sum(kept) >= 0.9 * 200


# --------------------------------------------------------------------------- refusals


_VALUES, _SCALES = torch.zeros(5, 6, 4, dtype=torch.int8), torch.ones(5, 6)
_QUERIES = torch.zeros(2, 3, 4)


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"queries": torch.zeros(3, 4)}, ValueError, r"queries must be \[Nq, Lq, D\]"),
        ({"queries": _QUERIES.int()}, TypeError, "queries are torch.int32"),
        ({"values": _VALUES.float()}, TypeError, "values are torch.float32; pass int8 or float8"),
        ({"scales": _SCALES.half()}, TypeError, "scales are torch.float16; pass float32"),
        ({"scales": torch.ones(5, 7)}, ValueError, r"scales must be \[5, 6\], one per token"),
        ({"values": _VALUES[..., :3]}, ValueError, r"values must be \[Nd, Ld, 4\].*D=4"),
        ({"values": _VALUES[0]}, ValueError, r"or packed \[T, 4\] with cu_seqlens"),
        ({"candidates": True}, ValueError, r"values must be \[Nq, K, Ld, 4\]"),
        ({"values": _VALUES[None], "candidates": True}, ValueError, "candidates for 1 queries, but there are 2"),
        ({"document_mask": torch.ones(5, 6)}, TypeError, "document_mask must be bool"),
        ({"query_mask": torch.ones(3, dtype=torch.bool)}, ValueError, r"query_mask must be \[2, 3\]"),
        ({"query_weights": torch.ones(3)}, ValueError, r"query_weights must be \[Nq, Lq\]"),
        ({"query_weights": torch.ones(2, 3).int()}, TypeError, "query_weights must be floating"),
        (
            {"values": _VALUES[0], "scales": _SCALES[0], "cu_seqlens": torch.tensor([0, 5]).int()},
            ValueError,
            "rise from 0 to T=6",
        ),
        ({"queries": torch.zeros(2, 3, 4, device="meta")}, ValueError, "values is on cpu and queries on meta"),
        ({"queries": _QUERIES.clone().requires_grad_()}, ValueError, r"queries requires a gradient.*torch.no_grad\(\)"),
        ({"query_weights": torch.ones(2, 3, requires_grad=True)}, ValueError, "query_weights requires a gradient"),
        ({"scales": torch.ones(5, 6, requires_grad=True)}, ValueError, "scales requires a gradient"),
        ({"backend": "cuda"}, RuntimeError, "cannot run"),
    ],
)
def test_bad_arguments_are_named(changed: dict[str, object], error: type[Exception], message: str) -> None:
    arguments = {"queries": _QUERIES, "values": _VALUES, "scales": _SCALES, **changed}
    with pytest.raises(error, match=message):
        maxsim_quantized(**arguments)


def test_without_gradients_enabled_a_parameter_may_be_scored() -> None:
    with torch.no_grad():
        assert not maxsim_quantized(_QUERIES.clone().requires_grad_(), _VALUES, _SCALES).requires_grad


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((torch.zeros(2, 3), torch.int16), TypeError, "quantised to torch.int8 or torch.float8_e4m3fn"),
        ((torch.zeros(2, 3).int(),), TypeError, "documents are torch.int32"),
        ((torch.zeros(3),), ValueError, r"documents must be \[..., tokens, D\]"),
    ],
)
def test_what_cannot_be_quantised_is_named(arguments: tuple[object, ...], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        quantize_documents(*arguments)

"""Compressed documents in the C++ path of MaxSim: all codes, instruction sets, threads, strides, refusals.

The semantics (layouts, masks, NaN, empty documents) are tested with the other backends in tests/kernels.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1] / "kernels"))

from jmlr_kernels import ResidualCodec, maxsim, maxsim_quantized, native, quantize_documents  # noqa: E402
from jmlr_kernels.maxsim.residual import decode  # noqa: E402

pytestmark = pytest.mark.skipif(
    not native.has("maxsim_residual_forward", "cpu"), reason=f"no native library: {native.loaded().problem}"
)

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
STORED = [torch.int8, torch.float8_e4m3fn]
BITS = [1, 2, 4, 8]
INSTRUCTIONS = ["portable", "avx2", "avx512", "avx512bf16"]
FORMATS = [*STORED, *BITS]


def quantized(*tensors: Tensor | None, candidates: bool = False) -> Tensor:
    """The operation itself: queries, values, scales, query_mask, document_mask, query_weights, cu_seqlens."""
    return torch.ops.jmlr_native.maxsim_quantized_forward(*tensors, *([None] * (7 - len(tensors))), candidates)


def residual(*tensors: Tensor | None, normalize: bool = True, candidates: bool = False) -> Tensor:
    """queries, codes, residuals, centroids, field_weights, query_mask, document_mask, query_weights, cu_seqlens."""
    padded = (*tensors, *([None] * (9 - len(tensors))))
    return torch.ops.jmlr_native.maxsim_residual_forward(*padded, normalize, candidates)


def compressed(form: torch.dtype | int, shape: tuple[int, ...], dimension: int) -> tuple[Tensor, ...]:
    """The operation's tensors between the queries and the masks; a number is that of a residual's bits."""
    draw = torch.Generator().manual_seed(0)
    if isinstance(form, torch.dtype):
        return quantize_documents(torch.randn(*shape, dimension, generator=draw), form)
    codec = ResidualCodec(torch.randn(11, dimension, generator=draw).half(), torch.randn(2**form, generator=draw))
    codes = torch.randint(11, shape, generator=draw, dtype=torch.int32)
    residuals = torch.randint(256, (*shape, dimension * form // 8), generator=draw, dtype=torch.uint8)
    return codes, residuals, codec.centroids, codec.field_weights


def run(form: torch.dtype | int, queries: Tensor, stored: tuple[Tensor, ...], *options: Any, **switches: Any) -> Tensor:
    return (quantized if isinstance(form, torch.dtype) else residual)(queries, *stored, *options, **switches)


# --------------------------------------------------------------------------- values


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("stored", STORED, ids=str)
def test_all_codes(stored: torch.dtype, dtype: torch.dtype) -> None:
    """Each of the 256 codes at every place of a vector, and in what a vector leaves over, read back one by one."""
    dimension = 37
    codes = (torch.arange(256)[:, None] + torch.arange(dimension)).to(torch.uint8)
    expected = codes.view(stored).float()
    codes = codes.view(stored)
    queries = torch.eye(dimension, dtype=dtype)
    for element in range(dimension):
        scores = quantized(queries[None, element, None], codes[:, None], torch.full((256, 1), 0.5))
        finite = ~expected.isnan().any(1)  # 0 times NaN
        assert torch.equal(scores[0, finite], expected[finite, element] / 2)
        assert scores[0, ~finite].isnan().all()
    assert stored == torch.int8 or (~finite).sum() == 2 * dimension


@pytest.mark.parametrize("table", DTYPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bits", BITS)
def test_all_residual_bytes(bits: int, dtype: torch.dtype, table: torch.dtype) -> None:
    """Each of the 256 bytes at every place, read back one element at a time: small integers, exact in every type."""
    width = 5 if bits == 8 else 3 * bits + 5
    dimension = width * 8 // bits
    residuals = (torch.arange(256)[:, None] + 7 * torch.arange(width)).to(torch.uint8)
    centroids = torch.arange(dimension).remainder(13).to(table)[None].repeat(2, 1)
    weights = torch.arange(2**bits).float() - 5
    codes = torch.ones(256, 1, dtype=torch.int32)
    expected = decode(codes[:, 0], residuals, centroids, weights, False, torch.float32)
    queries = torch.eye(dimension, dtype=dtype)
    scores = residual(queries[:, None], codes, residuals[:, None], centroids, weights, normalize=False)
    if dtype == torch.bfloat16:  # 265 is the largest number
        expected = expected.bfloat16().float()
    assert torch.equal(scores, expected.T)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("normalize", [False, True])
def test_residual_tokens_are_rounded_to_the_queries_type(dtype: torch.dtype, normalize: bool) -> None:
    """As a decompressed document of that type would be: an element alone is the rounded one, up to the last bit of a
    length whose sum has another order."""
    codes, residuals, centroids, weights = compressed(4, (50, 1), 64)
    decoded = decode(codes, residuals, centroids, weights, normalize, torch.float32)[:, 0]
    scores = residual(torch.eye(64, dtype=dtype)[:, None], codes, residuals, centroids, weights, normalize=normalize)
    assert torch.equal(scores, scores.to(dtype).float())
    equal = scores.T == decoded.to(dtype).float()
    assert equal.all() if not normalize else equal.float().mean() > 0.99
    torch.testing.assert_close(scores.T.to(dtype), decoded.to(dtype))


# ------------------------------------------------------------- instructions, threads, memory


_EVERY_FORMAT = """
import test_maxsim_cpu_compressed as tests, torch
for dtype in tests.DTYPES:
    for stored in tests.STORED:
        tests.test_all_codes(stored, dtype)
    for bits in tests.BITS:
        tests.test_all_residual_bytes(bits, dtype, dtype)
    if dtype != torch.float32:
        tests.test_residual_tokens_are_rounded_to_the_queries_type(dtype, True)
from compressed_cases import SHAPES
import test_maxsim_quantized, test_maxsim_residual
for sizes in (SHAPES["shared_tile"], SHAPES["long_document"], {"dimension": 40, "query_length": 33}):
    for dtype in tests.DTYPES:
        for stored in tests.STORED:
            test_maxsim_quantized.check(stored, "cpu", dtype, masked=True, weighted=True, **sizes)
        for bits in tests.BITS:
            test_maxsim_residual.check("cpu", dtype, bits, masked=True, packed=True, **sizes)
print(torch.ops.jmlr_native.cpu_instructions())
"""


@pytest.mark.parametrize("name", INSTRUCTIONS)
def test_every_instruction_set(name: str) -> None:
    """In a process whose fresh memory is not zero: whatever is not written shows."""
    here = Path(__file__).parent
    path = os.pathsep.join(map(str, (here.parents[1], here, here.parent / "kernels", here.parent)))
    environment = {**os.environ, "PYTHONPATH": path, "MALLOC_PERTURB_": "165", "JMLR_CPU_ISA": name}
    ran = subprocess.run([sys.executable, "-c", _EVERY_FORMAT], env=environment, capture_output=True, text=True)
    if "this processor has no such instructions" in ran.stderr:
        pytest.skip(f"this processor has no {name}")
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.split() == [name]


@pytest.mark.parametrize("candidates", [False, True])
@pytest.mark.parametrize("form", FORMATS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_bits_do_not_depend_on_threads(dtype: torch.dtype, form: torch.dtype | int, candidates: bool) -> None:
    """Large enough that two and five threads get tasks; also query by query, where chunks are shorter."""
    shape = (13, 17, 70) if candidates else (17, 70)
    queries, stored = torch.randn(13, 29, 64).to(dtype), compressed(form, shape, 64)
    query_mask, mask, weights = torch.rand(13, 29) > 0.2, torch.rand(shape) > 0.3, torch.randn(13, 29)
    threads = torch.get_num_threads()
    try:
        results = []
        for count in (1, 2, 5, 2):
            torch.set_num_threads(count)
            results.append(run(form, queries, stored, query_mask, mask, weights, candidates=candidates))
    finally:
        torch.set_num_threads(threads)
    assert results[0].isfinite().all() and all(torch.equal(other, results[0]) for other in results[1:])
    per_token = 2  # tensors that follow the documents
    own = tuple(t[5:6] if candidates and i < per_token else t for i, t in enumerate(stored))
    one = (query_mask[5:6], mask[5:6] if candidates else mask, weights[5:6])
    assert torch.equal(run(form, queries[5:6], own, *one, candidates=candidates), results[0][5:6])


@pytest.mark.parametrize("form", FORMATS, ids=str)
def test_a_token_does_not_depend_on_its_place(form: torch.dtype | int) -> None:
    """Padded, packed and with holes: the same bits, wherever a chunk starts or ends."""
    queries, stored = torch.randn(2, 5, 48), compressed(form, (3, 130), 48)
    expected = run(form, queries, stored)
    flat = tuple(t.flatten(0, 1) if i < 2 else t for i, t in enumerate(stored))
    offsets = torch.tensor([0, 130, 260, 390], dtype=torch.int32)
    assert torch.equal(run(form, queries, flat, None, None, None, offsets), expected)
    spread = tuple(t.repeat_interleave(3, 1) if i < 2 else t for i, t in enumerate(stored))
    holes = (torch.arange(390) % 3 == 1).expand(3, 390)
    assert torch.equal(run(form, queries, spread, None, holes), expected)


# --------------------------------------------------------------------------- refusals


def test_direct_calls_are_checked() -> None:
    """The public functions explain more; a direct call must not read memory that is not there."""
    queries, (values, scales) = torch.randn(2, 3, 8), compressed(torch.int8, (4, 5), 8)
    codes, residuals, centroids, weights = compressed(2, (4, 5), 8)
    outside = torch.tensor([0, 5, 21], dtype=torch.int32)
    calls: list[tuple[str, Any]] = [
        ("values must be int8 or float8_e4m3fn, but are uint8",
         lambda: quantized(queries, values.view(torch.uint8), scales)),
        ("values must have 8 elements in their last dimension, but have 7",
         lambda: quantized(queries, values[..., :7], scales)),
        (r"scales must have the shape \[4, 5\]", lambda: quantized(queries, values, scales[:, :4])),
        ("scales must be float32, but is float16", lambda: quantized(queries, values, scales.half())),
        ("not float64", lambda: quantized(queries.double(), values, scales)),
        ("values holds candidates for 1 queries",
         lambda: quantized(queries, values[None], scales[None], candidates=True)),
        ("must rise within 0",
         lambda: quantized(queries, values.flatten(0, 1), scales.flatten(), None, None, None, outside)),
        ("residuals must be uint8, but is int8",
         lambda: residual(queries, codes, residuals.view(torch.int8), centroids, weights)),
        ("residuals must have 2 elements", lambda: residual(queries, codes, residuals[..., :1], centroids, weights)),
        ("codes must be int32, but is int64", lambda: residual(queries, codes.long(), residuals, centroids, weights)),
        ("codes must have the shape", lambda: residual(queries, codes[:3], residuals, centroids, weights)),
        ("centroids must have 8 elements", lambda: residual(queries, codes, residuals, centroids[:, :7], weights)),
        ("not int32", lambda: residual(queries, codes, residuals, centroids.int(), weights)),
        (r"field_weights must be \[2\], \[4\], \[16\] or \[256\], but has \[3\]",
         lambda: residual(queries, codes, residuals, centroids, weights[:3])),
        ("D=7 times 2 bits is no whole number of bytes",
         lambda: residual(queries[..., :7], codes, residuals, centroids, weights)),
    ]  # fmt: skip
    for message, call in calls:
        with pytest.raises(RuntimeError, match=message):
            call()


def test_auto_takes_it() -> None:
    queries, documents = torch.randn(2, 3, 8), torch.randn(4, 5, 8)
    with torch.profiler.profile() as profile:
        scores = maxsim_quantized(queries, *quantize_documents(documents))
    assert "jmlr_native::maxsim_quantized_forward" in {event.key for event in profile.key_averages()}
    torch.testing.assert_close(scores, maxsim(queries, documents), rtol=0.1, atol=0.1)

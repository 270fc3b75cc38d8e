"""On a GPU of compute capability 9.0: its own kernels really run; MaxSim's give the bits of the kernels for 8.0.

That they are right is for test_gpu_attention.py and test_gpu_maxsim.py, which run them by themselves there.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

import jmlr_kernels
from jmlr_kernels import native

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available() or not native.has_hopper_kernels(torch.device("cuda", 0)),
        reason="needs a GPU of compute capability 9.0, and a library with kernels for it",
    ),
]

DTYPES = [torch.bfloat16, torch.float16]


def integers(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    """Small ones: every sum is exact in any order, and maxima tie often."""
    return torch.randint(-2, 3, shape, device="cuda").to(dtype)


def maxsim_case(name: str, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, dict[str, Any]]:
    """(queries, documents, options): every way in which the forward kernel divides its work."""
    if name == "packed":
        lengths = torch.tensor([0, 300, 0, 1, 128, 77], device="cuda")
        offsets = lengths.cumsum(0).to(torch.int32)
        return (
            integers(9, 32, 128, dtype=dtype),
            integers(int(lengths.sum()), 128, dtype=dtype),
            {"cu_seqlens": offsets},
        )
    queries, length, documents, tokens, dim = {
        "many rows": (40, 32, 140, 300, 128),
        "some rows": (3, 32, 150, 300, 128),
        "one query": (1, 32, 1000, 300, 128),
        "long queries": (3, 300, 20, 130, 64),
        "a wide embedding": (9, 20, 30, 100, 256),
        "holes": (9, 32, 40, 300, 96),
    }[name]
    options: dict[str, Any] = {}
    if name == "holes":
        options["document_mask"] = torch.rand(documents, tokens, device="cuda") > 0.4
        options["document_mask"][3] = False
        options["query_mask"] = torch.rand(queries, length, device="cuda") > 0.2
        options["query_weights"] = torch.randint(0, 3, (queries, length), device="cuda").float()
    return integers(queries, length, dim, dtype=dtype), integers(documents, tokens, dim, dtype=dtype), options


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "name", ["many rows", "some rows", "one query", "long queries", "a wide embedding", "holes", "packed"]
)
def test_maxsim_gives_the_same_bits(name: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    queries, documents, options = maxsim_case(name, dtype)
    found = {}
    for kernels in ("sm80", "sm90"):  # "sm90" is an error where those cannot run
        with native.cuda_kernels(kernels):
            found[kernels] = jmlr_kernels.maxsim(queries, documents, return_alignment=True, backend="cuda", **options)
    for ours, others in zip(found["sm90"], found["sm80"], strict=True):
        assert torch.equal(ours, others)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", ["dense", "padded", "packed"])
@pytest.mark.parametrize(("dim", "kv_heads"), [(128, 2), (128, 4), (64, 1), (80, 4)])
def test_attention_runs_and_repeats_itself(dim: int, kv_heads: int, layout: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    options: dict[str, Any] = {}
    lead = (2, 700)
    if layout == "padded":
        options["seq_lens"] = torch.tensor([700, 333], dtype=torch.int32, device="cuda")
    if layout == "packed":
        lead = (700,)  # type: ignore[assignment]
        options["cu_seqlens"] = torch.tensor([0, 1, 256, 700], dtype=torch.int32, device="cuda")
    inputs = [
        torch.randn(*lead, heads, dim, device="cuda").to(dtype).requires_grad_() for heads in (4, kv_heads, kv_heads)
    ]
    found = []
    for _ in range(2):
        with native.cuda_kernels("sm90"):
            out = jmlr_kernels.shifted_sparse_attention(*inputs, 200, backend="cuda", **options)  # type: ignore[misc]
            found.append([out, *torch.autograd.grad(out, inputs, torch.ones_like(out))])
    for first, second in zip(*found, strict=True):
        assert torch.equal(first, second) and first.isfinite().all()

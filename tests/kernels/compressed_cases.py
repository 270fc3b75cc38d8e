"""What the tests of both compressed formats share: one call, its definition in float64, and the tolerance rule."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from maxsim_cases import Case
from oracles import assert_as_exact_as_torch
from torch import Tensor

from jmlr_kernels import native
from jmlr_kernels.maxsim.reference import maxsim_reference

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
_OPERATIONS = ("maxsim_quantized_forward", "maxsim_residual_forward")
_HERE = torch.device(DEVICE)
# The native library's, where it is there, beside the two that always are.
NATIVE = [name for name in ("cpu", "cuda") if native.why_not(_OPERATIONS, name, _HERE, torch.float32) is None]
BACKENDS = ["torch", "triton", *NATIVE]
DTYPES = {name: [torch.float32, torch.float16, torch.bfloat16] for name in BACKENDS}
if DEVICE == "cpu":
    DTYPES["triton"] = [torch.float32, torch.float16]  # its interpreter computes bfloat16 wrongly
BACKEND_AND_DTYPE = [(backend, dtype) for backend, dtypes in DTYPES.items() for dtype in dtypes]

# One shape per path: several queries in a tile, a query longer than a tile, one token, several document tiles, a padded
# embedding dimension, a width that is no power of two of tokens.
SHAPES = {
    "shared_tile": {"query_count": 5, "query_length": 24, "document_length": 40, "dimension": 64},
    "long_query": {"query_count": 2, "query_length": 150, "document_length": 20, "dimension": 16},
    "one_token": {"query_count": 1, "query_length": 1, "document_length": 1, "dimension": 32, "documents": 1},
    "long_document": {"query_count": 2, "query_length": 6, "document_length": 150, "dimension": 16, "documents": 2},
    "padded_dimension": {"dimension": 96, "documents": 3},
}


def random_sizes(seed: int) -> dict[str, int | bool]:
    """Sizes and switches for make_case, past the tiles' lengths."""
    draw = torch.Generator().manual_seed(seed)

    def upto(limit: int) -> int:
        return int(torch.randint(1, limit + 1, (), generator=draw))

    sizes = {"query_count": upto(6), "documents": upto(6), "query_length": upto(140), "document_length": upto(150)}
    switches = {name: upto(2) == 2 for name in ("candidates", "packed", "masked", "weighted")}
    return {**sizes, **switches, "seed": seed}


def check_scores(case: Case, decoded: Tensor, dtype: torch.dtype, score: Callable[..., Tensor]) -> Tensor:
    """`score(queries, **options)` against the definition on `decoded` documents (float64) for queries of `dtype`."""
    low = replace(case.to(dtype), documents=decoded.to(dtype))
    precise = replace(low.to(torch.float64), documents=decoded)
    exact, plain = (
        maxsim_reference(
            each.queries,
            each.documents,
            query_weights=each.query_weights,
            candidates=case.candidates,
            **case.options,
        )[0]
        for each in (precise, low)
    )
    placed = low.to(dtype, DEVICE)
    found = score(
        placed.queries, query_weights=placed.query_weights, candidates=case.candidates, **placed.options
    ).cpu()
    assert_as_exact_as_torch("scores", found, plain.to(found.dtype), exact)
    return found

"""Small MaxSim problems that together reach every line of the CUDA kernels; each probe asserts one of them.

``test_maxsim_host.py`` runs them on the kernels, ``mutations_maxsim.py`` on kernels with a seeded bug, which one of
them must find. All are called within ``maxsim_calls.in_place_of_triton``.
"""

from __future__ import annotations

from collections.abc import Callable

import maxsim_calls
import torch
from maxsim_cases import Case, make_case
from oracles import assert_as_exact_as_torch
from test_maxsim_losses import test_row_statistics_of_infinities_and_nan

from jmlr_kernels import maxsim, maxsim_tokens
from jmlr_kernels.maxsim import torch_chunked
from jmlr_kernels.maxsim.layout import winner_code

# One shape per way through the kernels. `processors` divides the work: 1000 gives each document a block of its own.
SHAPES: dict[str, dict[str, object]] = {
    "queries_share_a_tile": {"query_count": 6, "query_length": 24, "document_length": 40, "dimension": 64},
    "few_rows": {"query_count": 2, "query_length": 7, "document_length": 150, "dimension": 128, "documents": 3},
    "several_tiles": {"query_count": 6, "query_length": 13, "document_length": 150, "dimension": 128, "documents": 3},
    "long_query": {"query_count": 2, "query_length": 150, "document_length": 20, "dimension": 20, "documents": 3},
    "one_token": {"query_count": 1, "query_length": 1, "document_length": 1, "dimension": 1, "documents": 1},
    "unaligned": {"query_count": 3, "query_length": 31, "document_length": 70, "dimension": 101, "documents": 2},
    "resident_chunks": {"query_count": 3, "query_length": 30, "document_length": 70, "dimension": 200, "documents": 2},
    "walked": {"query_count": 3, "query_length": 30, "document_length": 70, "dimension": 300, "documents": 2},
    "walked_few_rows": {"query_count": 2, "query_length": 5, "document_length": 70, "dimension": 300, "documents": 2},
    "normalized": {"query_count": 3, "query_length": 20, "document_length": 70, "dimension": 128, "normalize": True},
    "normalized_walked": {"query_length": 5, "document_length": 70, "dimension": 300, "normalize": True},
    "candidates": {"candidates": True, "query_length": 33, "document_length": 70, "dimension": 64, "documents": 2},
    "packed": {"packed": True, "document_length": 150, "dimension": 64, "documents": 5},
    "packed_candidates": {"packed": True, "candidates": True, "document_length": 80, "dimension": 100, "documents": 3,
                          "normalize": True},
}  # fmt: skip


def close(dtype: torch.dtype, case: Case) -> None:
    """The case, computed by the kernels, within the tolerance rule of the definition in float64."""
    exact = case.exact()
    found = case.to(dtype).run("triton")
    plain = case.plain(exact["winners"])
    plain["scores"] = plain["scores"].float()
    assert torch.equal(found.pop("winners"), exact["winners"]), "winners"
    for name, value in found.items():
        assert_as_exact_as_torch(name, value, plain[name], exact[name])


def shape(name: str, dtype: torch.dtype, masked: bool) -> None:
    """One of SHAPES; with masks, weights too."""
    case = make_case(masked=masked, weighted=masked, **SHAPES[name])  # type: ignore[arg-type]
    close(dtype, case.to(dtype))


def scans_of_winners(dtype: torch.dtype) -> None:
    """More query tokens than one scan holds, over few document tokens: every warp shares a token with the next."""
    case = make_case(query_count=70, query_length=60, documents=2, document_length=3, dimension=8, weighted=True)
    close(dtype, case.to(dtype))


def longer_than_the_mean(dtype: torch.dtype) -> None:
    """One packed document holds nearly all tokens: few blocks share it, and each takes several of its tiles."""
    case = make_case(packed=True, documents=3, document_length=300, dimension=100, normalize=True, seed=5)
    tokens = case.documents.shape[0]
    case.options["cu_seqlens"] = torch.tensor([0, 1, tokens - 1, tokens], dtype=torch.int32)
    close(dtype, case.to(dtype))


def vectors_of_any_length(dtype: torch.dtype) -> None:
    """Norms whose squares overflow or vanish in float16, and a zero vector."""
    case = make_case(dimension=32, query_count=4, normalize=True, weighted=True)
    case.documents *= torch.logspace(-3, 3, case.documents.shape[1], dtype=torch.float64)[:, None]
    case.documents[1, 2] = 0
    close(dtype, case.to(dtype))


def unmarked_winners(dtype: torch.dtype) -> None:
    """256 tokens: every byte is a position, and who has no winner follows from the masks."""
    case = make_case(query_count=2, documents=3, query_length=3, document_length=256, dimension=16, masked=True)
    case.documents[0, -1] *= 50
    case.documents[0, 0] *= 40  # what an excluded query token's code says by chance
    close(dtype, case.to(dtype))


def ties(dtype: torch.dtype) -> None:
    """Equal similarities go to the lowest kept token, within a tile and across; zeros of both signs are equal."""
    queries, documents = torch.ones(1, 3, 16, dtype=dtype), torch.ones(2, 150, 16, dtype=dtype)
    mask = torch.ones(2, 150, dtype=torch.bool)
    mask[1, :70] = False
    documents[0, :3] = -1
    for count in (1, 30):
        many = queries.expand(count, 3, 16)
        _, winners = maxsim(many, documents, document_mask=mask, return_alignment=True, backend="triton")
        assert (winners[:, 0] == 3).all() and (winners[:, 1] == 70).all()
    documents.zero_()[:, ::2] = -0.0
    _, winners = maxsim(queries, documents, return_alignment=True, backend="triton")
    assert (winners == 0).all()


def not_a_number(dtype: torch.dtype) -> None:
    """NaN of a kept token reaches the score and names its place, infinity or not before it; -inf is a number."""
    draw = torch.Generator().manual_seed(0)
    for count in (1, 30):
        queries = torch.rand(count, 3, 16, generator=draw).to(dtype) + 1
        for place in (0, 40, 64, 149):
            documents = torch.randn(2, 150, 16, generator=draw).to(dtype)
            documents[1, place:, 5] = torch.nan
            documents[1, 9] = torch.inf
            scores, winners = maxsim(queries, documents, return_alignment=True, backend="triton")
            assert scores[:, 1].isnan().all() and scores[:, 0].isfinite().all()
            assert (winners[:, 1] == place).all()
        documents = torch.full((1, 70, 16), -torch.inf, dtype=dtype)
        mask = torch.arange(70)[None] >= 2
        scores, winners = maxsim(queries, documents, document_mask=mask, return_alignment=True, backend="triton")
        assert (winners == 2).all() and (scores == -torch.inf).all()


def excluded_anything(dtype: torch.dtype) -> None:
    """NaN and infinity in excluded tokens and weights change nothing, in scores and gradients."""
    for normalize in (False, True):
        case = make_case(query_count=3, documents=3, dimension=20, document_length=70, masked=True, weighted=True,
                         normalize=normalize)  # fmt: skip
        expected = case.to(dtype).run("triton")
        for tensor, mask in ((case.queries, "query_mask"), (case.documents, "document_mask")):
            tensor[~case.options[mask]] = torch.nan  # type: ignore[operator]
        case.query_weights[~case.options["query_mask"]] = torch.inf  # type: ignore[index, operator]
        for name, value in case.to(dtype).run("triton").items():
            assert torch.equal(value, expected[name]), name


def empty_sides(dtype: torch.dtype) -> None:
    """Documents and queries without kept tokens score zero, whatever the weights; so do packed ones of no length."""
    queries, documents = torch.randn(2, 3, 16).to(dtype), torch.randn(9, 16).to(dtype)
    offsets = torch.tensor([0, 0, 4, 4, 9, 9], dtype=torch.int32)
    weights = torch.full((2, 3), torch.nan)
    scores, winners = maxsim(queries, documents, cu_seqlens=offsets, query_weights=weights, return_alignment=True,
                             backend="triton")  # fmt: skip
    assert (scores[:, [0, 2, 4]] == 0).all() and scores[:, [1, 3]].isnan().all() and (winners[:, ::2] == -1).all()
    mask = torch.tensor([[True] * 3, [False] * 3])
    scores = maxsim(queries, documents, cu_seqlens=offsets, query_mask=mask, backend="triton")
    assert (scores[1] == 0).all() and (scores[0, [1, 3]] != 0).all()


def nothing_to_score(dtype: torch.dtype) -> None:
    """No queries, no tokens in them, no documents, none in them: zeros in every output that has elements."""
    for queries, documents in (
        ((0, 3, 4), (2, 5, 4)),
        ((2, 0, 4), (3, 5, 4)),
        ((2, 3, 4), (0, 5, 4)),
        ((2, 3, 4), (3, 0, 4)),
    ):
        sides = [torch.randn(size).to(dtype).requires_grad_() for size in (queries, documents)]
        weights = torch.randn(queries[:2], requires_grad=True)
        for normalize in (False, True):
            scores, winners = maxsim(*sides, query_weights=weights, normalize=normalize, return_alignment=True,
                                     backend="triton")  # fmt: skip
            assert (scores == 0).all() and (winners == -1).all()
            assert all((grad == 0).all() for grad in torch.autograd.grad(scores.sum(), (*sides, weights)))


def per_token(dtype: torch.dtype) -> None:
    """Maxima and their gradients, of which zeros send nothing; a longer document than promised is NaN."""
    case = make_case(masked=True, dimension=32, query_count=4, document_length=70).to(dtype)
    results = []
    for backend in ("torch", "triton"):
        queries, documents, _ = case.leaves()
        with torch.no_grad():
            queries[0, 1] = torch.inf
        maxima = maxsim_tokens(queries, documents, backend=backend, **case.options)
        grad = torch.linspace(-1, 1, maxima.numel()).view_as(maxima).clone()
        grad[0, :, 1] = 0
        maxima.backward(grad)
        results.append((maxima[:, :, 2:].detach(), queries.grad, documents.grad))
    for found, expected in zip(results[1], results[0], strict=True):
        torch.testing.assert_close(found, expected)
    # A winner of infinity whose maximum the loss does not look at, beside one that it does.
    queries = torch.ones(1, 2, 1, dtype=dtype, requires_grad=True)
    documents = torch.tensor([[[1.0]], [[torch.inf]]], dtype=dtype, requires_grad=True)
    maxsim_tokens(queries, documents, backend="triton")[:, 0].sum().backward()
    assert queries.grad.flatten().tolist() == [1, 1] and documents.grad.flatten().tolist() == [2, 0]
    offsets = torch.tensor([0, 20, 30], dtype=torch.int32)
    arguments = (torch.randn(2, 3, 16).to(dtype), torch.randn(30, 16).to(dtype), None, None, None, offsets)
    for tokens in (False, True):
        found, winners, *_ = torch.ops.jmlr_kernels.maxsim_forward(*arguments, False, False, tokens, True, 12, "triton")
        assert found[:, 0].isnan().all() and found[:, 1].isfinite().all() and winners.dtype == torch.uint8


def gaps_and_splits(dtype: torch.dtype) -> None:
    """Views with gaps, misaligned and aligned; documents divided among as many blocks and warps as there may be."""
    wide = make_case(query_count=2, documents=70, query_length=3, document_length=5, dimension=64, weighted=True,
                     masked=True).to(dtype)  # fmt: skip
    expected = wide.run("torch")
    for shift in (1, 8):
        views = []
        for side in (wide.queries, wide.documents):
            storage = torch.full((*side.shape[:-1], side.shape[-1] + 16), torch.nan, dtype=dtype)
            views.append(storage[..., shift : shift + side.shape[-1]])
            views[-1].copy_(side)
        other = Case(*views, wide.grad_scores, False, wide.query_weights, wide.options)
        for processors in (1, 1000):
            maxsim_calls.processors = processors
            try:
                scores, winners = maxsim(*views, query_weights=wide.query_weights, return_alignment=True,
                                         backend="triton", **wide.options)  # fmt: skip
                found = other.run("triton")
            finally:
                maxsim_calls.processors = 2
            torch.testing.assert_close(scores, expected["scores"])
            assert torch.equal(winners, expected["winners"])
            for name in ("grad_queries", "grad_documents", "grad_weights"):
                torch.testing.assert_close(found[name], expected[name])


def documents_split_among_warps(dtype: torch.dtype) -> None:
    """One query and many documents: d(queries) is summed in parts, in one chunk and in several."""
    maxsim_calls.processors = 1000
    try:
        for dimension, normalize in ((16, False), (20, True), (140, True)):
            case = make_case(query_count=1, documents=150, query_length=3, document_length=2, dimension=dimension,
                             weighted=True, normalize=normalize)  # fmt: skip
            close(dtype, case.to(dtype))
    finally:
        maxsim_calls.processors = 2


def uncovered_tokens(dtype: torch.dtype) -> None:
    """Tokens before, between and behind the packed documents have gradient zero, in one chunk and in several."""
    for dimension in (16, 130):
        queries, documents = torch.randn(2, 3, dimension).to(dtype), torch.randn(300, dimension).to(dtype)
        offsets = torch.tensor([3, 7, 280], dtype=torch.int32)
        tensors = (queries, documents, None, None, None, offsets)
        operations = torch.ops.jmlr_kernels
        _, winners, *scales = operations.maxsim_forward(*tensors, False, True, False, True, 0, "triton")
        assert winners.dtype == winner_code(documents, offsets, 0).dtype
        for kept_scales in (scales, (None, None)):
            arguments = ([torch.ones(2, 2)], queries, documents, winners, *tensors[2:], *kept_scales)
            found = operations.maxsim_backward(*arguments, "scores", False, 0, "triton")
            expected = torch_chunked.backward(*arguments, "scores", False, 0)
            assert (found[1][:3] == 0).all() and (found[1][280:] == 0).all() and (found[1][3:280] != 0).any()
            for one, other in zip(found, expected, strict=True):
                torch.testing.assert_close(one, other)


def turns(dtype: torch.dtype) -> None:
    """Bit-identical results whatever the order in which blocks and warps take their turns."""
    case = make_case(query_count=20, query_length=20, documents=3, document_length=140, dimension=64, weighted=True,
                     masked=True, normalize=True).to(dtype)  # fmt: skip
    results = []
    for seed in range(3):
        maxsim_calls.seed = seed
        try:
            results.append(case.run("triton"))
        finally:
            maxsim_calls.seed = 0
    for found in results[1:]:
        assert all(torch.equal(value, results[0][name]) for name, value in found.items())


def row_statistics(dtype: torch.dtype) -> None:
    """The losses' statistics of long rows; they are float32 whatever `dtype` the embeddings have."""
    test_row_statistics_of_infinities_and_nan("triton")


PROBES: dict[str, Callable[[torch.dtype], None]] = {
    function.__name__: function
    for function in (
        scans_of_winners,
        longer_than_the_mean,
        vectors_of_any_length,
        unmarked_winners,
        ties,
        not_a_number,
        excluded_anything,
        empty_sides,
        nothing_to_score,
        per_token,
        gaps_and_splits,
        documents_split_among_warps,
        uncovered_tokens,
        turns,
        row_statistics,
    )
}

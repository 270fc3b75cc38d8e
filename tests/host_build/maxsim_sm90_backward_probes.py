"""Small problems for the ways that MaxSim's backward kernels have at compute capability 9.0 alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import maxsim_calls
import torch
from maxsim_cases import make_case
from maxsim_probes import close

from jmlr_kernels import maxsim

# What a block of a GPU of compute capability 9.0 may ask for.
KILOBYTES = 227


@contextmanager
def in_place_of_sm80(monkeypatch) -> Iterator[None]:
    """Within it, the backward pass runs these kernels, the forward pass those of compute capability 8.0."""
    with monkeypatch.context() as patch, maxsim_calls.in_place_of_triton(patch, kilobytes=KILOBYTES):
        patch.setattr(maxsim_calls, "backward_kernels", "maxsim_sm90_backward")
        yield


def every_group_shares_a_token(dtype: torch.dtype) -> None:
    """Long lists of few document tokens: what a group has of a token that an earlier one began is added later."""
    for tokens in (1, 2, 3):
        case = make_case(query_count=9, query_length=60, documents=2, document_length=tokens, dimension=128)
        close(dtype, case.to(dtype))


def fewer_winners_than_groups(dtype: torch.dtype) -> None:
    """Groups without rows lie between those that share a token."""
    case = make_case(query_count=1, query_length=5, documents=3, document_length=2, dimension=64)
    close(dtype, case.to(dtype))


def tiles_of_tokens(dtype: torch.dtype) -> None:
    """A document of several tiles, for more processors than documents and for few."""
    for processors in (1000, 1):
        maxsim_calls.processors, before = processors, maxsim_calls.processors
        try:
            case = make_case(query_count=3, query_length=40, documents=2, document_length=530, dimension=32)
            close(dtype, case.to(dtype))
        finally:
            maxsim_calls.processors = before


def packed_documents_past_their_tiles(dtype: torch.dtype) -> None:
    """A document of many times the mean length: its blocks take further tiles."""
    case = make_case(query_count=3, query_length=20, documents=9, document_length=40, dimension=64, packed=True)
    lengths = torch.tensor([0, 1, 1, 2, 0, 1, 1, 1])
    tokens = case.documents.shape[0]
    offsets = torch.cat([torch.zeros(1), lengths.cumsum(0), torch.tensor([tokens])]).to(torch.int32)
    case.options["cu_seqlens"] = offsets
    close(dtype, case.to(dtype))


def chunks_of_aligned_rows(dtype: torch.dtype) -> None:
    """Embeddings of two chunks and whole slices: sums in float for the rows' ends, of padded and packed documents."""
    for options in ({"normalize": True}, {"weighted": True, "masked": True}, {"packed": True, "normalize": True}):
        case = make_case(query_count=3, query_length=20, documents=3, document_length=30, dimension=136, **options)
        close(dtype, case.to(dtype))


def aligned_candidates(dtype: torch.dtype) -> None:
    """Every query has documents of its own, of which some hold nothing; padded and packed, normalised and not."""
    for options in ({"normalize": True}, {"packed": True, "normalize": True}, {"weighted": True}):
        case = make_case(candidates=True, query_count=3, query_length=20, documents=4, document_length=30, dimension=64,
                         masked=True, **options)  # fmt: skip
        close(dtype, case.to(dtype))


def one_side_not_aligned(dtype: torch.dtype) -> None:
    """Rows of queries or of documents alone that start beside a multiple of 16 bytes."""
    case = make_case(query_count=3, query_length=9, documents=2, document_length=30, dimension=64).to(dtype)
    sides = {"queries": case.queries, "documents": case.documents}
    expected = case.run("torch")
    for name, side in sides.items():
        beside = torch.empty(*side.shape[:-1], side.shape[-1] + 8, dtype=dtype)[..., 1 : side.shape[-1] + 1]
        leaves = [tensor.detach().requires_grad_() for tensor in {**sides, name: beside.copy_(side)}.values()]
        maxsim(*leaves, backend="triton").backward(case.grad_scores)
        for leaf, gradient in zip(leaves, ("grad_queries", "grad_documents"), strict=True):
            torch.testing.assert_close(leaf.grad, expected[gradient])


def more_rows_than_a_list(dtype: torch.dtype) -> None:
    """Query tokens that do not fit the list are scanned as by the kernels of compute capability 8.0."""
    case = make_case(query_count=33, query_length=500, documents=2, document_length=3, dimension=8)
    close(dtype, case.to(dtype))


def more_queries_than_kept_gradients(dtype: torch.dtype) -> None:
    case = make_case(query_count=2050, query_length=1, documents=2, document_length=5, dimension=8, weighted=True)
    close(dtype, case.to(dtype))


# Many query tokens, which an emulator walks slowly.
SLOW = {"more_rows_than_a_list", "more_queries_than_kept_gradients"}
PROBES: dict[str, Callable[[torch.dtype], None]] = {
    probe.__name__: probe
    for probe in (
        every_group_shares_a_token,
        fewer_winners_than_groups,
        tiles_of_tokens,
        packed_documents_past_their_tiles,
        chunks_of_aligned_rows,
        aligned_candidates,
        one_side_not_aligned,
        more_rows_than_a_list,
        more_queries_than_kept_gradients,
    )
}

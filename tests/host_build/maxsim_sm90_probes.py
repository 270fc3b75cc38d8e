"""Small MaxSim problems that together reach every line of the forward kernels for compute capability 9.0.

``test_maxsim_sm90_host.py`` runs them on the kernels, ``mutations_maxsim_sm90.py`` on kernels with a seeded bug. All
are called within ``maxsim_sm90_calls.in_place_of_triton``. Embeddings are small integers, whose similarities and
sums are exact in any order: what the kernels for 8.0 give is what these must give, to the bit, ties and all.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import maxsim_calls
import maxsim_sm90_calls
import torch

from jmlr_kernels import maxsim

# Sizes: queries, their tokens, documents, their tokens, dimension. `holes`: tokens in a row that a mask excludes.
SHAPES: dict[str, dict[str, Any]] = {
    "few: documents in turns": {"sizes": (2, 31, 7, 150, 64)},
    "few: one query token": {"sizes": (1, 1, 3, 129, 128), "weighted": True},
    "some: two row tiles in turns": {"sizes": (3, 40, 5, 140, 128), "weighted": True},
    "some: one document": {"sizes": (1, 100, 1, 300, 64), "masked": True},
    "many: two warpgroups": {"sizes": (9, 32, 3, 300, 128), "weighted": True},
    "many: an absent row tile": {"sizes": (5, 60, 3, 40, 64), "masked": True, "weighted": True},
    "many: several sets": {"sizes": (23, 30, 3, 130, 64), "masked": True},
    "a query in parts": {"sizes": (2, 300, 3, 70, 64), "masked": True, "weighted": True},
    "a query in parts, 256 dimensions": {"sizes": (1, 300, 3, 100, 200), "weighted": True},
    "few, 256 dimensions": {"sizes": (2, 20, 3, 200, 256), "masked": True},
    "candidates: few": {"sizes": (3, 33, 3, 70, 64), "candidates": True, "masked": True},
    "candidates: some": {"sizes": (3, 70, 2, 140, 72), "candidates": True, "weighted": True},
    "candidates: parts in several sets": {"sizes": (2, 300, 3, 40, 64), "candidates": True, "masked": True},
    "packed: few": {"sizes": (1, 30, 9, 200, 128), "packed": True},
    "packed: many": {"sizes": (10, 32, 7, 300, 64), "packed": True, "masked": True},
    "packed candidates": {"sizes": (3, 20, 3, 150, 64), "packed": True, "candidates": True, "masked": True},
    "holes of a tile": {"sizes": (2, 20, 3, 500, 64), "masked": True, "holes": 200},
    "every last tile": {"sizes": (5, 32, 16, 256, 64), "packed": True, "lengths": range(1, 256, 17)},
}  # fmt: skip


def integers(*sizes: int, draw: torch.Generator, dtype: torch.dtype) -> torch.Tensor:
    return torch.randint(-2, 3, sizes, generator=draw).to(dtype)


def arguments_of(
    sizes: tuple[int, ...], dtype: torch.dtype, masked: bool = False, weighted: bool = False, candidates: bool = False,
    packed: bool = False, holes: int = 0, lengths: range | None = None,
) -> list[Any]:  # fmt: skip
    """Arguments of the operation up to cu_seqlens; queries, documents, two masks, weights, offsets."""
    draw = torch.Generator().manual_seed(sum(sizes))
    queries, query_tokens, documents, tokens, dimension = sizes
    total = queries * documents if candidates else documents
    offsets = None
    if packed:
        counts = torch.tensor(lengths) if lengths else torch.randint(0, tokens + 1, (total,), generator=draw)
        offsets = torch.zeros(len(counts) + 1, dtype=torch.int32)
        offsets[1:] = counts.cumsum(0)
        text_sizes = [int(offsets[-1])]
    else:
        text_sizes = [queries, documents, tokens] if candidates else [documents, tokens]
    text = integers(*text_sizes, dimension, draw=draw, dtype=dtype)
    query_mask = document_mask = weights = None
    if masked:
        query_mask = torch.rand(queries, query_tokens, generator=draw) < 0.8
        document_mask = torch.rand(text_sizes, generator=draw) < 0.7
        if not packed:
            document_mask.view(-1, tokens)[0] = False
            document_mask.view(-1, tokens)[-1, : tokens // 2] = False
            document_mask.view(-1, tokens)[:, 100 : 100 + holes] = False
        text[~document_mask] = torch.nan
    if weighted:
        weights = torch.randint(0, 4, (queries, query_tokens), generator=draw).float()
    query = integers(queries, query_tokens, dimension, draw=draw, dtype=dtype)
    if query_mask is not None:
        query[~query_mask] = torch.nan
        if weights is not None:
            weights[~query_mask] = torch.inf
    return [query, text, query_mask, document_mask, weights, offsets]


def same(
    arguments: list[Any], candidates: bool = False, per_token: bool = False, winners: bool = True, max_length: int = 0
) -> tuple[torch.Tensor, ...]:
    """The operation by both kernels, which must agree."""
    rest = (candidates, False, per_token, winners, max_length)
    own = maxsim_calls.forward(*arguments, *rest)
    assert maxsim_sm90_calls.served[-1], "the kernels for 9.0 did not take the problem"
    with maxsim_sm90_calls.on_sm80():
        other = maxsim_calls.forward(*arguments, *rest)
    for one, two in zip(own[:2], other[:2], strict=True):
        torch.testing.assert_close(one, two, rtol=0, atol=0, equal_nan=True)
    return own


def shape(name: str, dtype: torch.dtype) -> None:
    """One of SHAPES: scores and winners, scores alone, maxima; few and many multiprocessors."""
    options = SHAPES[name]
    arguments, candidates = arguments_of(dtype=dtype, **options), options.get("candidates", False)
    for processors in (1, 3, 1000):
        maxsim_calls.processors = processors
        try:
            same(arguments, candidates)
        finally:
            maxsim_calls.processors = 2
    same(arguments, candidates, winners=False)
    same(arguments, candidates, per_token=True)


def numbers_of_any_size(dtype: torch.dtype) -> None:
    """Maxima that the search by sums cannot take (zero, infinite, NaN, tiny), next to those that it can."""
    draw = torch.Generator().manual_seed(1)
    queries = torch.zeros(9, 32, 64, dtype=dtype)
    queries[:, :, 0], queries[:, :, 1] = 1, 0
    documents = torch.zeros(8, 140, 64, dtype=dtype)
    documents[..., 0] = torch.randn(8, 140, generator=draw).to(dtype)
    documents[0, :, 0] = 0
    documents[0, ::2, 0] = -0.0
    documents[1, 70, 0] = torch.inf
    documents[2, 20:, 0] = torch.nan
    documents[3, :, 0] = -torch.inf
    documents[4, :, 0] = -documents[4, :, 0].abs()
    documents[5, 33, 0] = torch.finfo(dtype).max
    documents[6, :, 0] = torch.finfo(dtype).smallest_normal  # times another one: below the reach of sums
    documents[6, 5, 0] *= 2
    documents[7, :, 0] = -1
    documents[7, 64:, 0] = -1 + torch.finfo(dtype).eps  # neighbours, below a power of two
    queries[1] *= torch.finfo(dtype).smallest_normal
    scores, winners, *_ = same([queries, documents, None, None, None, None])
    assert (winners[:, 0] == 0).all() and (winners[2:, 2] == 20).all() and scores[:, 2].isnan().all()
    assert (winners[2:, 7] == 64).all()
    mask = torch.ones(8, 140, dtype=torch.bool)
    mask[3, :70] = False
    _, winners, *_ = same([queries, documents, None, mask, None, None])
    assert (winners[:, 3] == 70).all()  # all are -inf: the first kept one


def neighbours(dtype: torch.dtype) -> None:
    """Every pair of similarities that lie next to each other in float32, around a power of two, at every column."""
    queries = torch.zeros(5, 32, 64, dtype=dtype)
    queries[..., 0], queries[..., 1] = 1, torch.tensor(2.0**-12).to(dtype)
    documents = torch.zeros(128, 128, 64, dtype=dtype)
    documents[..., 0] = 1
    documents[..., 1] = -torch.tensor(2.0**-12).to(dtype)  # 1 - 2**-24, next to 1
    for winner in range(128):
        documents[winner, winner, 1] = 0
    _, winners, *_ = same([queries, documents, None, None, None, None])
    assert torch.equal(winners[0, :, 0].long(), torch.arange(128))
    _, winners, *_ = same([-queries, documents, None, None, None, None])
    assert torch.equal(winners[0, :, 0].long(), (torch.arange(128) == 0).long())


def too_long(dtype: torch.dtype) -> None:
    """Packed documents longer than promised are NaN, in scores and maxima."""
    arguments = arguments_of((5, 32, 4, 150, 64), dtype, packed=True)
    longest = int(arguments[5].diff().sort().values[-2])
    for per_token in (False, True):
        scores, *_ = same(arguments, per_token=per_token, max_length=longest)
        assert scores.isnan().any() and not scores.isnan().all()


def turns(dtype: torch.dtype) -> None:
    """Bit-identical results whatever the order in which blocks, warps and copies take their turns."""
    draw = torch.Generator().manual_seed(3)
    for queries in (1, 12):
        sides = [torch.randn(size, generator=draw).to(dtype) for size in ((queries, 32, 128), (9, 200, 128))]
        results = []
        for seed in range(3):
            maxsim_calls.seed = seed
            try:
                results.append(maxsim_calls.forward(*sides, None, None, None, None, False, False, False, True, 0))
            finally:
                maxsim_calls.seed = 0
        for found in results[1:]:
            assert torch.equal(found[0], results[0][0]) and torch.equal(found[1], results[0][1])


def what_is_not_served(dtype: torch.dtype) -> None:
    """Operands that copies of boxes cannot take go to the other kernels, and are right."""
    queries, documents = torch.randn(2, 3, 20).to(dtype), torch.randn(3, 9, 20).to(dtype)
    wide = torch.randn(3, 9, 320).to(dtype)
    base = torch.randn(3 * 9 * 24 + 1).to(dtype)[1:].view(3, 9, 24)
    for case in ((queries, documents), (wide[:2, :3], wide), (base[:2, :3], base)):
        found = maxsim(*case, backend="triton")
        assert not maxsim_sm90_calls.served[-1]
        torch.testing.assert_close(found, maxsim(*case, backend="torch"))
    aligned = torch.randn(3, 9, 24).to(dtype)
    maxsim(aligned, aligned, normalize=True, backend="triton")
    assert not maxsim_sm90_calls.served[-1]
    odd = torch.randn(2 * 3 * 25 + 1).to(dtype)[1:].view(2, 3, 25)[..., :24]  # queries may lie anywhere
    found = maxsim(odd, aligned, backend="triton")
    assert maxsim_sm90_calls.served[-1]
    torch.testing.assert_close(found, maxsim(odd, aligned, backend="torch"))


PROBES: dict[str, Callable[[torch.dtype], None]] = {
    function.__name__: function for function in (numbers_of_any_size, neighbours, too_long, turns, what_is_not_served)
}

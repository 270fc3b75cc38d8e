"""Small problems of smooth MaxSim that together reach every line of its CUDA kernels; each probe asserts one of them.

``test_maxsim_smooth_host.py`` runs them on the kernels, ``mutations_maxsim_smooth.py`` on kernels with a seeded bug,
which one of them must find. All are called within ``maxsim_smooth_calls.in_place_of_triton``.
"""

from __future__ import annotations

from collections.abc import Callable

import maxsim_calls
import torch
from maxsim_cases import Case, make_case
from maxsim_smooth_cases import Smooth
from oracles import assert_as_exact_as_torch
from torch import Tensor

from jmlr_kernels import maxsim, maxsim_smooth

# One shape per way through the kernels. `processors` divides the work: 1000 gives each document a block of its own.
SHAPES: dict[str, dict[str, object]] = {
    "queries_share_a_tile": {"query_count": 6, "query_length": 24, "document_length": 40, "documents": 2},
    "few_rows": {"query_count": 2, "query_length": 7, "document_length": 150, "dimension": 128, "documents": 2},
    "several_tiles": {"query_count": 6, "query_length": 13, "document_length": 70, "dimension": 128, "documents": 2},
    "long_query": {"query_count": 2, "query_length": 150, "document_length": 20, "dimension": 20, "documents": 3},
    "one_token": {"query_count": 1, "query_length": 1, "document_length": 1, "dimension": 32, "documents": 1},
    "unaligned": {"query_count": 3, "query_length": 31, "document_length": 70, "dimension": 101, "documents": 2},
    "resident_chunks": {"query_count": 3, "query_length": 30, "document_length": 70, "dimension": 200, "documents": 2},
    "walked": {"query_count": 3, "query_length": 30, "document_length": 70, "dimension": 300, "documents": 2},
    "walked_few_rows": {"query_count": 2, "query_length": 5, "document_length": 70, "dimension": 300, "documents": 2},
    "candidates": {"candidates": True, "query_length": 33, "document_length": 70, "dimension": 64, "documents": 2},
    "packed": {"packed": True, "document_length": 150, "dimension": 64, "documents": 5, "seed": 1},
    "packed_candidates": {"packed": True, "candidates": True, "document_length": 80, "dimension": 100, "documents": 3},
    "many_documents": {"query_count": 2, "query_length": 5, "document_length": 3, "dimension": 16, "documents": 40},
}  # fmt: skip


def close(dtype: torch.dtype, case: Case, temperature: float = 0.7) -> None:
    """The case, computed by the kernels, within the tolerance rule of the definition in float64."""
    call = Smooth(case.to(dtype), temperature)
    exact, plain = call.exact(), call.plain()
    plain["scores"] = plain["scores"].float()
    for name, value in call.run("triton").items():
        assert_as_exact_as_torch(name, value, plain[name], exact[name])


def shape(name: str, dtype: torch.dtype, masked: bool) -> None:
    """One of SHAPES; with masks, weights too."""
    close(dtype, make_case(masked=masked, weighted=masked, **SHAPES[name]))  # type: ignore[arg-type]


def _random(shape: tuple[int, ...], dtype: torch.dtype, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def _step(queries: Tensor, documents: Tensor, grad: Tensor | None = None, **options: object) -> tuple[Tensor, ...]:
    """Scores and gradients of both sides, and of weights where there are any."""
    leaves = [queries.detach().requires_grad_(), documents.detach().requires_grad_()]
    if options.get("query_weights") is not None:
        leaves.append(options["query_weights"].detach().requires_grad_())  # type: ignore[union-attr]
        options["query_weights"] = leaves[2]
    scores = maxsim_smooth(*leaves[:2], backend="triton", **{"temperature": 0.5, **options})  # type: ignore[arg-type]
    return scores.detach(), *torch.autograd.grad(scores, leaves, torch.ones_like(scores) if grad is None else grad)


def longer_than_the_mean(dtype: torch.dtype) -> None:
    """One packed document holds nearly all tokens: few blocks share it, and each takes several of its tiles."""
    case = make_case(packed=True, documents=3, document_length=300, dimension=100, seed=5, masked=True)
    tokens = case.documents.shape[0]
    case.options["cu_seqlens"] = torch.tensor([0, 1, tokens - 1, tokens], dtype=torch.int32)
    close(dtype, case)


def work_divided(dtype: torch.dtype) -> None:
    """Documents in one run, or each in a block of its own with d(queries) summed in parts; a gradient in chunks."""
    try:
        for processors in (1, 1000):
            maxsim_calls.processors = processors
            for dimension in (21, 140):
                close(dtype, make_case(query_count=2, documents=7, query_length=3, document_length=4, weighted=True,
                                       masked=True, dimension=dimension))  # fmt: skip
            close(dtype, make_case(query_count=2, documents=3, query_length=70, document_length=4, candidates=True))
    finally:
        maxsim_calls.processors = 2


def temperatures(dtype: torch.dtype) -> None:
    """From all tokens alike to the hard maximum, where shares are 0 and 1: similarities have the same bits in the
    forward and in both kernels of the backward."""
    case = make_case(query_count=4, query_length=9, documents=3, document_length=70, dimension=160, weighted=True)
    close(dtype, case, 30.0)
    # Powers of two: what is left of rounding is that of the result.
    case.grad_scores.copy_(case.grad_scores.sign())
    case.query_weights.copy_(case.query_weights.sign() / 2)
    case = case.to(dtype)
    found = Smooth(case, 2.0**-126).run("triton")
    queries, documents, weights = case.leaves()
    scores = maxsim(queries, documents, query_weights=weights, backend="torch")
    scores.backward(case.grad_scores)
    wanted = {"scores": scores.detach(), "grad_queries": queries.grad, "grad_documents": documents.grad,
              "grad_weights": weights.grad}  # fmt: skip
    for name, value in found.items():
        torch.testing.assert_close(value, wanted[name], msg=lambda message, name=name: f"{name}: {message}")


def large_similarities(dtype: torch.dtype) -> None:
    """Hundreds of thousands of times the temperature, and tokens with equal shares in different tiles."""
    case = make_case(document_length=150, dimension=16)
    case.queries.mul_(100), case.documents.mul_(100)
    case.documents[:, 149] = case.documents[:, 3]
    call = Smooth(case.to(dtype), 0.5)
    # Plain float16 overflows: its scores are as exact as those of plain float32.
    exact, plain = call.exact(), Smooth(call.case.to(torch.float32), 0.5).plain()
    for name, value in call.run("triton").items():
        assert value.isfinite().all(), name
        if value.dtype == torch.float32:
            assert_as_exact_as_torch(name, value, plain[name], exact[name])


def infinities(dtype: torch.dtype) -> None:
    """Plus infinity is the score; minus infinity alone too, and beside others it has no share. No NaN."""
    values = torch.tensor([[-torch.inf] * 70, [0.0] * 69 + [torch.inf], [-torch.inf] * 69 + [2.0]])
    for count in (1, 40):
        queries = torch.ones(count, 1, 1, dtype=dtype)
        for order in (values, values.flip(1)):
            scores = maxsim_smooth(queries, order[..., None].to(dtype), temperature=0.1, backend="triton")
            assert (scores == torch.tensor([-torch.inf, torch.inf, 2.0])).all()
        (gradient,) = _step(queries, values[2:, :, None].to(dtype), temperature=0.1)[2:]
        assert gradient.flatten().tolist() == [0.0] * 69 + [float(count)]


def overflow(dtype: torch.dtype) -> None:
    """Finite embeddings whose similarities are all minus infinity have no share in the gradients, and send no NaN."""
    if dtype != torch.float32:  # products of float16 fit float32, and emulated tensor cores cut instead of overflowing
        return
    queries = torch.full((2, 20, 16), 1e30, dtype=dtype)
    documents = torch.full((2, 70, 16), -1e30, dtype=dtype)
    documents[1] = 1e-30 * _random((70, 16), dtype).abs()
    scores, grad_queries, grad_documents = _step(queries, documents)
    alone = _step(queries, documents[1:])
    assert (scores[:, 0] == -torch.inf).all() and torch.equal(scores[:, 1:], alone[0])
    assert torch.equal(grad_queries, alone[1]) and torch.equal(grad_documents[1:], alone[2])
    assert (grad_documents[0] == 0).all() and (grad_queries > 0).all()


def not_a_number(dtype: torch.dtype) -> None:
    """NaN of a kept token reaches score and gradients, behind an infinity too; other documents stay clean."""
    for count in (1, 30):
        queries = _random((count, 3, 16), dtype).abs() + 1
        for place in (0, 40, 64, 149):
            documents = _random((3, 150, 16), dtype, 1)
            documents[1, place, 5] = torch.nan
            if place != 9:
                documents[1, 9] = torch.inf
            scores, grad_queries, grad_documents = _step(queries, documents)
            assert scores[:, 1].isnan().all() and scores[:, [0, 2]].isfinite().all()
            assert grad_queries.isnan().all() and grad_documents[1, place].isnan().all()
            assert grad_documents[[0, 2]].isfinite().all()


def excluded_anything(dtype: torch.dtype) -> None:
    """NaN and infinity in excluded tokens and weights change nothing, in scores and gradients, which are zero there."""
    for packed in (False, True):
        case = make_case(query_count=4, query_length=9, document_length=70, masked=True, weighted=True, packed=packed)
        case = case.to(dtype)
        query_mask, document_mask = case.options["query_mask"], case.options["document_mask"]
        results = []
        for value in (0.0, torch.nan, torch.inf):
            queries = case.queries.masked_fill(~query_mask[..., None], value)
            documents = case.documents.masked_fill(~document_mask[..., None], value)
            weights = case.query_weights.masked_fill(~query_mask, value)
            results.append(_step(queries, documents, case.grad_scores, query_weights=weights, **case.options))
        for found in results[1:]:
            assert all(torch.equal(one, other) for one, other in zip(found, results[0], strict=True))
        assert (results[0][1][~query_mask] == 0).all() and (results[0][2][~document_mask] == 0).all()


def excluded_beside_nan(dtype: torch.dtype) -> None:
    """Zero times NaN is NaN: an excluded token's zero share must not meet a kept token's NaN."""
    queries, documents = _random((3, 20, 16), dtype), _random((3, 70, 16), dtype, 1)
    query_mask, document_mask = torch.ones(3, 20) > 0, torch.ones(3, 70) > 0
    query_mask[0, 1] = document_mask[:, 33] = document_mask[:, 66] = False
    queries[1, 0, 3] = documents[2, 7, 5] = torch.nan
    _, grad_queries, grad_documents = _step(queries, documents, query_mask=query_mask, document_mask=document_mask)
    assert (grad_queries[0, 1] == 0).all() and (grad_documents[:, [33, 66]] == 0).all()
    assert grad_queries[0, 0].isnan().any() and grad_documents[0, 0].isnan().any()


def far_below_zero(dtype: torch.dtype) -> None:
    """What is read as zeros has the greatest similarity of all, and would have an infinite share."""
    for packed in (False, True):
        queries, documents = torch.ones(3, 9, 16, dtype=dtype), torch.full((2, 70, 16), -100.0, dtype=dtype)
        mask = torch.arange(70).expand(2, 70) % 3 == 2
        options: dict[str, object] = {"document_mask": mask}
        if packed:
            documents, offsets = documents.flatten(0, 1), torch.tensor([0, 70, 140], dtype=torch.int32)
            options = {"document_mask": mask.flatten(), "cu_seqlens": offsets}
        scores, grad_queries, grad_documents = _step(queries, documents, **options)
        torch.testing.assert_close(scores, (9 * (-1600 + 0.5 * mask.sum(1).log()))[None].expand(3, 2))
        torch.testing.assert_close(grad_queries, torch.full_like(queries, -200.0), rtol=2**-8, atol=0)
        expected = torch.where(mask[..., None], 27 / mask.sum(1)[:, None, None], 0.0).to(dtype).expand(2, 70, 16)
        torch.testing.assert_close(grad_documents, expected.reshape(documents.shape), rtol=2**-6, atol=0)


def empty_sides(dtype: torch.dtype) -> None:
    """Documents and queries without kept tokens score zero, whatever the weights and the score's gradient."""
    queries, documents = _random((2, 3, 16), dtype), _random((9, 16), dtype)
    options: dict[str, object] = {"cu_seqlens": torch.tensor([0, 0, 4, 4, 9, 9], dtype=torch.int32)}
    weights = torch.tensor([[1.0] * 3, [torch.nan] * 3])
    mask = torch.tensor([[True] * 3, [False] * 3])
    grad = torch.tensor([[torch.inf, 1.0, torch.inf, 2.0, torch.inf], [torch.inf] * 5])
    found = _step(queries, documents, grad, query_weights=weights, query_mask=mask, **options)
    assert (found[0][:, ::2] == 0).all() and (found[0][1] == 0).all() and (found[0][0, [1, 3]] != 0).all()
    assert all(value.isfinite().all() for value in found)
    assert (found[1][1] == 0).all() and (found[3][1] == 0).all() and (found[3][0] != 0).all()
    _, maxima = torch.ops.jmlr_kernels.maxsim_smooth_forward(
        queries, documents, mask, None, None, options["cu_seqlens"], False, 0.5, True, "triton"
    )
    assert torch.equal(maxima.isneginf().all(-1), found[0] == 0) and maxima[0, [1, 3]].isfinite().all()


def nothing_to_score(dtype: torch.dtype) -> None:
    """No queries, no tokens in them, no documents, none in them: zeros in every output that has elements."""
    for queries, documents in (
        ((0, 3, 4), (2, 5, 4)),
        ((2, 0, 4), (3, 5, 4)),
        ((2, 3, 4), (0, 5, 4)),
        ((2, 3, 4), (3, 0, 4)),
    ):
        weights = _random(queries[:2], torch.float32)
        found = _step(_random(queries, dtype), _random(documents, dtype), query_weights=weights)
        assert all((value == 0).all() for value in found)


def gaps(dtype: torch.dtype) -> None:
    """Views with gaps, misaligned and aligned, give the bits of their copies."""
    wide = make_case(query_count=3, documents=5, query_length=9, document_length=20, dimension=64, weighted=True,
                     masked=True).to(dtype)  # fmt: skip
    expected = _case_step(wide, wide.queries, wide.documents)
    for shift in (1, 8):
        views = []
        for side in (wide.queries, wide.documents):
            storage = torch.full((*side.shape[:-1], side.shape[-1] + 16), torch.nan, dtype=dtype)
            views.append(storage[..., shift : shift + side.shape[-1]])
            views[-1].copy_(side)
        found = _case_step(wide, *views)
        assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


def _case_step(case: Case, queries: Tensor, documents: Tensor) -> tuple[Tensor, ...]:
    return _step(queries, documents, case.grad_scores, query_weights=case.query_weights, **case.options)


def far_apart(dtype: torch.dtype) -> None:
    """A view whose strides overflow 32 bits gives the bits of its copy."""
    # 2**31 elements are reserved, not touched: the system gives memory page by page, as it is written.
    span = torch.empty(2**31 + 2**27 + 128, dtype=dtype)
    queries = _random((2, 3, 16), dtype)
    for packed in (False, True):
        options: dict[str, object] = {}
        documents = span.as_strided((3, 5, 16), (2**30 + 16, 16, 1))
        if packed:
            documents = span.as_strided((18, 16), (2**27, 1))
            options["cu_seqlens"] = torch.tensor([0, 2, 16, 17, 18], dtype=torch.int32)
        documents.copy_(_random(tuple(documents.shape), dtype, 1))
        found = _step(queries, documents, **options)
        expected = _step(queries, documents.contiguous(), **options)
        assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


def uncovered_tokens(dtype: torch.dtype) -> None:
    """Tokens before and behind the packed documents have gradient zero."""
    queries, documents = _random((2, 3, 16), dtype), _random((300, 16), dtype)
    offsets = torch.tensor([3, 7, 280], dtype=torch.int32)
    tensors = (None, None, offsets, False, 30.0, "triton")
    _, maxima = torch.ops.jmlr_kernels.maxsim_smooth_forward(queries, documents, None, *tensors[:5], True, "triton")
    backward = torch.ops.jmlr_kernels.maxsim_smooth_backward
    gradient = backward(torch.ones(2, 2), queries, documents, maxima, *tensors)[1]
    assert (gradient[:3] == 0).all() and (gradient[280:] == 0).all() and (gradient[3:280] != 0).any(1).all()


def forward_alone(dtype: torch.dtype) -> None:
    """Without maxima the scores are the same."""
    case = make_case(query_count=6, query_length=13, document_length=70, masked=True, weighted=True).to(dtype)
    options = {"query_weights": case.query_weights, "temperature": 0.5, **case.options}
    alone = maxsim_smooth(case.queries, case.documents, backend="triton", **options)
    assert torch.equal(alone, _case_step(case, case.queries, case.documents)[0])


def small_gradients(dtype: torch.dtype) -> None:
    """Shares times gradients below float16's floor, whose sums are well inside its range."""
    queries, documents = torch.full((16, 16, 16), 0.25, dtype=dtype), torch.full((1, 40, 16), 0.5, dtype=dtype)
    _, grad_queries, grad_documents = _step(queries, documents, torch.full((16, 1), 2.0**-21), temperature=1.0)
    torch.testing.assert_close(grad_queries, torch.full_like(queries, 2.0**-22), rtol=2**-6, atol=2**-25)
    torch.testing.assert_close(grad_documents, torch.full_like(documents, 1.6 * 2.0**-21), rtol=2**-6, atol=2**-25)


def turns(dtype: torch.dtype) -> None:
    """Bit-identical results whatever the order in which blocks and warps take their turns."""
    case = make_case(query_count=4, query_length=20, documents=2, document_length=70, dimension=140, weighted=True,
                     masked=True).to(dtype)  # fmt: skip
    results = []
    for seed in range(3):
        maxsim_calls.seed = seed
        try:
            results.append(_case_step(case, case.queries, case.documents))
        finally:
            maxsim_calls.seed = 0
    for found in results[1:]:
        assert all(torch.equal(one, other) for one, other in zip(found, results[0], strict=True))


PROBES: dict[str, Callable[[torch.dtype], None]] = {
    function.__name__: function
    for function in (
        longer_than_the_mean,
        work_divided,
        temperatures,
        large_similarities,
        infinities,
        overflow,
        not_a_number,
        excluded_anything,
        excluded_beside_nan,
        far_below_zero,
        empty_sides,
        nothing_to_score,
        gaps,
        far_apart,
        uncovered_tokens,
        forward_alone,
        small_gradients,
        turns,
    )
}

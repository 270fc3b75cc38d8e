"""XTR scoring against a dense definition in float64: values, gradients, ties, and what is stored."""

from __future__ import annotations

import pytest
import torch
from maxsim_cases import make_case
from torch import Tensor

from jmlr_kernels import maxsim, xtr_scores
from jmlr_kernels.maxsim import xtr

hypothesis = pytest.importorskip("hypothesis")
strategies = hypothesis.strategies


def dense(
    queries: Tensor,
    documents: Tensor,
    k: int,
    *,
    query_mask: Tensor | None = None,
    document_mask: Tensor | None = None,
    query_weights: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> Tensor:
    """The definition, with every similarity in one matrix: document by document over the retrieved tokens."""
    flat = documents.reshape(-1, documents.shape[-1])
    if cu_seqlens is None:
        cu_seqlens = torch.arange(documents.shape[0] + 1) * documents.shape[1]
    kept = torch.ones(flat.shape[0], dtype=torch.bool) if document_mask is None else document_mask.reshape(-1)
    grid = queries @ flat.T  # [Nq, Lq, T]
    ranked = grid.detach().masked_fill(~kept, -torch.inf).sort(-1, descending=True).values
    threshold = ranked[..., min(k, ranked.shape[-1]) - 1 : min(k, ranked.shape[-1])]
    retrieved = (grid.detach() >= threshold) & kept
    if query_mask is not None:
        retrieved = retrieved & query_mask[:, :, None]
    scores = []
    for start, end in zip(cu_seqlens[:-1].tolist(), cu_seqlens[1:].tolist(), strict=True):
        here = retrieved[..., start:end]
        found = here.any(-1) if end > start else torch.zeros(queries.shape[:2], dtype=torch.bool)
        if not found.any():
            scores.append(0 * (queries.sum((1, 2)) + documents.sum()))
            continue
        best = grid[..., start:end].masked_fill(~here, -torch.inf).amax(-1).masked_fill(~found, 0)
        if query_weights is not None:
            best = best * query_weights
        scores.append(best.sum(-1) / found.sum(-1).clamp_min(1))
    return torch.stack(scores, 1)


def results(function, case, k: int, **options: object) -> list[Tensor]:  # type: ignore[no-untyped-def]
    queries, documents, weights = case.leaves()
    scores = function(queries, documents, k, query_weights=weights, **case.options, **options)
    leaves = [leaf for leaf in (queries, documents, weights) if leaf is not None]
    gradients = torch.autograd.grad(scores, leaves, case.grad_scores.to(scores.dtype), allow_unused=True)
    return [scores, *(torch.zeros_like(leaf) if g is None else g for leaf, g in zip(leaves, gradients, strict=True))]


@hypothesis.settings(max_examples=40, deadline=None, derandomize=True)
@hypothesis.given(
    query_count=strategies.integers(1, 4),
    documents=strategies.integers(1, 6),
    query_length=strategies.integers(1, 7),
    document_length=strategies.integers(1, 20),
    dimension=strategies.integers(1, 9),
    packed=strategies.booleans(),
    masked=strategies.booleans(),
    weighted=strategies.booleans(),
    k=strategies.sampled_from([1, 2, 5, 13, 1000]),
    seed=strategies.integers(0, 2**16),
)
def test_matches_the_dense_definition(k: int, **sizes: int) -> None:
    case = make_case(**sizes)
    for found, expected in zip(results(xtr_scores, case, k), results(dense, case, k), strict=True):
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("packed", [False, True])
def test_matches_in_chunks(packed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks of a few tokens, which end inside documents, and of a few query tokens."""
    case = make_case(documents=6, packed=packed, masked=True, weighted=True)
    expected = results(dense, case, 9)
    monkeypatch.setattr(xtr, "_CHUNK_TOKENS", 7)
    monkeypatch.setattr(xtr, "_CHUNK_ELEMENTS", 180)
    chunks = list(xtr._chunks(15, case.documents.numel() // 20, 9))
    assert len(chunks) > 1 and len(chunks[0][1]) > 1
    for found, wanted in zip(results(xtr_scores, case, 9), expected, strict=True):
        torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_triton_backend(dtype: torch.dtype) -> None:
    """The maxima come from another kernel than the thresholds; what is retrieved is the same, to the last token."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    case = make_case(documents=6, masked=True, weighted=True, dimension=64).to(dtype)
    expected = results(dense, case.to(torch.float64), 9)
    found = results(xtr_scores, case.to(dtype, device), 9, backend="triton")
    assert found[0].dtype == torch.float32 and found[1].dtype == dtype
    for value, wanted in zip(found, expected, strict=True):
        bound = torch.finfo(value.dtype).eps * wanted.abs().max().item()
        torch.testing.assert_close(value.cpu().double(), wanted, rtol=0, atol=8 * bound)


def test_k_of_all_tokens_is_the_mean_of_the_maxima() -> None:
    case = make_case(masked=True)
    kept = case.options["query_mask"].sum(1, keepdim=True)
    has_token = case.options["document_mask"].any(1)
    expected = maxsim(case.queries, case.documents, **case.options) / kept.clamp_min(1)
    for k in (case.documents.shape[0] * case.documents.shape[1], 10**6):
        torch.testing.assert_close(xtr_scores(case.queries, case.documents, k, **case.options), expected)
    assert (expected[:, ~has_token] == 0).all()
    retrieved = xtr.retrieved_documents(case.queries, case.documents, 80, case.options["document_mask"])
    assert retrieved[:, has_token].all() and not retrieved[:, ~has_token].any()


def test_ties_at_the_threshold_are_all_retrieved_in_any_order() -> None:
    """Integers, exact in any order of summation: three tokens tie for the second place, in three documents."""
    queries = torch.tensor([[[1.0, 0.0]]])
    documents = torch.tensor(
        [[[3.0, 0], [1, 0]], [[5, 0], [0, 0]], [[3, 0], [2, 0]], [[-1, 0], [3, 0]], [[2, 0], [2, 0]]]
    )
    for order in (torch.arange(5), torch.tensor([4, 3, 2, 1, 0]), torch.tensor([2, 0, 4, 1, 3])):
        scores = xtr_scores(queries, documents[order], 2)
        assert torch.equal(scores, torch.tensor([[3.0, 5.0, 3.0, 3.0, 0.0]])[:, order])
    assert torch.equal(xtr_scores(queries, documents, 5), torch.tensor([[3.0, 5.0, 3.0, 3.0, 2.0]]))


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_the_token_at_the_threshold_is_never_lost_to_rounding(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Documents of one token: each query token retrieves exactly k of them, whatever the maxima's last bits are."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    queries, documents = torch.randn(3, 8, 96, device=device), torch.randn(24, 1, 96, device=device)
    exact = xtr.maxsim_tokens
    for shift in (0.0, 1e-6, -1e-6):  # maxima of another kernel, a little off
        monkeypatch.setattr(xtr, "maxsim_tokens", lambda *a, _shift=shift, **o: exact(*a, **o) + _shift)
        for k in (1, 17):
            assert (xtr.retrieved_documents(queries, documents, k).sum(1) == k).all()
            scores = xtr_scores(queries, documents, k, backend=backend)
            grid = torch.einsum("ish,jh->ijs", queries.double(), documents[:, 0].double())
            kept = grid >= grid.topk(k, 1).values[:, -1:]
            expected = (grid * kept).sum(-1) / kept.sum(-1).clamp_min(1)
            torch.testing.assert_close(scores.double(), expected, rtol=1e-5, atol=1e-5)


def test_negative_maxima_count_and_the_other_normalizer_clips_them() -> None:
    """The paper divides by the tokens that retrieved; PyLate and PrimeQA by the positive maxima, at least 0.001."""
    queries = torch.tensor([[[1.0, 0.0], [0.0, 1.0]]])
    documents = torch.tensor([[[4.0, -3.0], [-9, -9]], [[-2.0, -1.0], [-9, -9]], [[-8, -8], [-9, -9]]])
    assert torch.equal(xtr_scores(queries, documents, 2), torch.tensor([[0.5, -1.5, 0.0]]))
    assert torch.equal(xtr_scores(queries, documents, 2, normalizer="positive"), torch.tensor([[4.0, 0.0, 0.0]]))


def test_positive_normalizer_is_pylate_restated() -> None:
    """PyLate 1.6.0: top-k over all tokens, the others multiplied by zero, Z = number of maxima above zero."""
    queries = torch.randn(3, 5, 8, dtype=torch.float64, requires_grad=True)
    documents = torch.randn(4, 7, 8, dtype=torch.float64, requires_grad=True)
    grid = (queries.flatten(0, 1) @ documents.flatten(0, 1).T).view(3, 5, 28)
    chosen = torch.zeros_like(grid, dtype=torch.bool).scatter_(-1, grid.topk(6, -1).indices, True)
    maxima = (grid * chosen).view(3, 5, 4, 7).amax(-1)
    expected = maxima.sum(1) / (maxima > 0).sum(1).clamp(min=1e-3)
    found = xtr_scores(queries, documents, 6, normalizer="positive")
    torch.testing.assert_close(found, expected)
    upstream = torch.randn(3, 4, dtype=torch.float64)
    for pair in zip(*(torch.autograd.grad(s, (queries, documents), upstream) for s in (found, expected)), strict=True):
        torch.testing.assert_close(*pair)


def test_what_was_not_retrieved_gets_no_gradient() -> None:
    queries, documents = torch.randn(2, 3, 8, requires_grad=True), torch.randn(9, 5, 8, requires_grad=True)
    xtr_scores(queries, documents, 2).sum().backward()
    grid = torch.einsum("ish,jth->isjt", queries, documents).detach()
    threshold = grid.flatten(2).topk(2).values[..., -1]
    retrieved = (grid >= threshold[:, :, None, None]).any(0).any(0)
    assert torch.equal(documents.grad.abs().sum(-1) > 0, retrieved & (documents.grad.abs().sum(-1) > 0))
    assert 1 <= (documents.grad.abs().sum(-1) > 0).sum() <= 12 and queries.grad.abs().sum() > 0


def test_gradcheck() -> None:
    case = make_case(query_count=2, documents=4, query_length=3, document_length=5, dimension=4, masked=True,
                     weighted=True, seed=3)  # fmt: skip

    def score(queries: Tensor, documents: Tensor, weights: Tensor) -> Tensor:
        return xtr_scores(queries, documents, 4, query_weights=weights, normalize=True, **case.options)

    assert torch.autograd.gradcheck(score, case.leaves(), eps=1e-6, atol=1e-6)


def test_nan_of_a_kept_token_is_retrieved_and_of_an_excluded_one_is_not() -> None:
    queries, documents = torch.randn(2, 3, 8), torch.randn(5, 4, 8)
    documents[1, 2, 0] = float("nan")
    for k in (1, 3):
        scores = xtr_scores(queries, documents, k)
        assert scores[:, 1].isnan().all() and scores[:, [0, 2, 3, 4]].isfinite().all()
    mask = torch.ones(5, 4, dtype=torch.bool)
    mask[1, 2] = False
    clean = documents.nan_to_num(50.0)
    query_mask = torch.tensor([[True, True, False], [True, True, True]])
    expected = xtr_scores(queries, clean, 3, document_mask=mask, query_mask=query_mask)
    queries[0, 2] = float("nan")
    weights = torch.where(query_mask, 1.0, float("nan"))
    leaves = [tensor.requires_grad_() for tensor in (queries, documents, weights)]
    scores = xtr_scores(queries, documents, 3, document_mask=mask, query_mask=query_mask, query_weights=weights)
    torch.testing.assert_close(scores, expected)
    assert all(gradient.isfinite().all() for gradient in torch.autograd.grad(scores.sum(), leaves))


@pytest.mark.parametrize(("shape_q", "shape_d"), [((0, 3, 4), (2, 5, 4)), ((2, 0, 4), (3, 5, 4)), ((2, 3, 4), (0, 5, 4)), ((2, 3, 4), (3, 0, 4))])  # fmt: skip  # noqa: E501
def test_nothing_to_score(shape_q: tuple[int, ...], shape_d: tuple[int, ...]) -> None:
    scores = xtr_scores(torch.randn(shape_q), torch.randn(shape_d), 3)
    assert scores.shape == (shape_q[0], shape_d[0]) and (scores == 0).all()


def test_the_matrix_of_all_similarities_is_never_stored(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            out = func(*args, **(kwargs or {}))
            outputs = out if isinstance(out, tuple) else (out,)
            sizes.extend(tensor.numel() for tensor in outputs if isinstance(tensor, Tensor))
            return out

    monkeypatch.setattr(xtr, "_CHUNK_ELEMENTS", 2**15)
    monkeypatch.setattr(xtr, "_CHUNK_TOKENS", 2**8)
    queries, documents = torch.randn(8, 32, 16), torch.randn(100, 50, 16)
    with Watch():
        xtr.retrieved_documents(queries, documents, 40)
    assert max(sizes) <= max(2**15, documents.numel(), 8 * 32 * 100) < 8 * 32 * 100 * 50


def test_compile_autocast_and_repeatability() -> None:
    case = make_case(masked=True, weighted=True).to(torch.float32)
    compiled = torch.compile(xtr_scores, fullgraph=True, backend="aot_eager")
    first, second, third = (results(f, case, 5) for f in (xtr_scores, xtr_scores, compiled))
    assert all(torch.equal(*pair) for pair in zip(first, second, strict=True))
    for pair in zip(first, third, strict=True):
        torch.testing.assert_close(*pair)
    with torch.autocast("cpu", torch.bfloat16):
        found = results(xtr_scores, case, 5)
    expected = results(xtr_scores, case.to(torch.bfloat16), 5)
    assert found[0].dtype == torch.float32
    for value, wanted in zip(found, expected, strict=True):
        torch.testing.assert_close(value, wanted.float())


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"k": 0}, ValueError, "k=0 must be a positive integer"),
        ({"k": 2.0}, ValueError, "positive integer"),
        ({"normalizer": "mean"}, ValueError, "choose one of retrieved, positive"),
        ({"documents": torch.zeros(5, 6, 3)}, ValueError, "documents have D=3 and queries D=4"),
        ({"document_mask": torch.ones(5, 6)}, TypeError, "document_mask must be bool"),
        ({"backend": "cuda"}, RuntimeError, "cannot run"),
    ],
)
def test_bad_arguments_are_named(changed: dict[str, object], error: type[Exception], message: str) -> None:
    arguments = {"queries": torch.zeros(2, 3, 4), "documents": torch.zeros(5, 6, 4), "k": 3, **changed}
    with pytest.raises(error, match=message):
        xtr_scores(**arguments)

"""Exact top-k: what a sort of all scores gives, chunk by chunk, without the scores ever lying side by side."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from jmlr_kernels import maxsim, maxsim_topk
from jmlr_kernels.maxsim import topk


def _integers(*shape: int, seed: int = 0, most: int = 3) -> Tensor:
    """Small integers: products and sums are exact in float32 in any order, and scores often tie."""
    return torch.randint(-most, most + 1, shape, generator=torch.Generator().manual_seed(seed)).float()


def _sorted(scores: Tensor, k: int) -> tuple[Tensor, Tensor]:
    values, indices = scores.sort(dim=1, descending=True, stable=True)
    return values[:, :k], indices[:, :k]


@pytest.mark.parametrize("chunk_size", [None, 1, 3, 40, 1000])
@pytest.mark.parametrize("k", [1, 7, 40])
def test_equals_a_stable_sort_of_all_scores(k: int, chunk_size: int | None) -> None:
    queries, corpus = _integers(5, 3, 4, most=1), _integers(40, 6, 4, seed=1, most=1)
    scores = maxsim(queries, corpus)
    assert (scores.sort(1).values.diff(dim=1) == 0).any(1).all(), "no ties: the test would show nothing"
    found, indices = maxsim_topk(queries, corpus, k, chunk_size=chunk_size)
    assert found.dtype == torch.float32 and indices.dtype == torch.int64
    assert torch.equal(found, scores.topk(k).values)
    assert all(torch.equal(*pair) for pair in zip((found, indices), _sorted(scores, k), strict=True))


@pytest.mark.parametrize("chunk_size", [1, 3, None])
@pytest.mark.parametrize("packed", [False, True])
def test_arguments_reach_the_scores(packed: bool, chunk_size: int | None) -> None:
    queries = torch.randn(4, 5, 8)
    query_mask, weights = torch.rand(4, 5) > 0.3, torch.rand(4, 5)
    options = {"query_mask": query_mask, "query_weights": weights, "normalize": True, "backend": "torch"}
    if packed:
        offsets = torch.tensor([0, 3, 3, 10, 11, 30, 31, 31, 40], dtype=torch.int32)
        corpus, options["cu_seqlens"] = torch.randn(40, 8), offsets
    else:
        corpus = torch.randn(8, 9, 8)
    options["document_mask"] = torch.rand(corpus.shape[:-1]) > 0.3
    scores = maxsim(queries, corpus, **options)
    found, indices = maxsim_topk(queries, corpus, 6, chunk_size=chunk_size, **options)
    expected = _sorted(scores, 6)
    torch.testing.assert_close(found, expected[0])
    torch.testing.assert_close(scores.gather(1, indices), found)
    assert indices.sort(1).values.diff(dim=1).all()


def test_triton_backend() -> None:
    queries, corpus = _integers(3, 4, 16), _integers(9, 5, 16, seed=1)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    found, indices = maxsim_topk(queries.to(device), corpus, 4, chunk_size=4, backend="triton")
    expected = _sorted(maxsim(queries, corpus), 4)
    assert torch.equal(found.cpu(), expected[0]) and torch.equal(indices.cpu(), expected[1])


def test_jagged_corpus_and_default_chunks_of_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    """A memory limit of seven tokens: documents of ten tokens go alone, short ones together."""
    monkeypatch.setattr(topk, "_CHUNK_EMBEDDINGS", 7 * 4)
    lengths = (3, 3, 10, 1, 0, 2, 4, 5)
    texts = [_integers(length, 4, seed=i) for i, length in enumerate(lengths)]
    queries = _integers(2, 3, 4, seed=20)
    offsets = torch.tensor([0, *torch.tensor(lengths).cumsum(0)], dtype=torch.int32)
    sizes = [int(part.cu_seqlens[-1]) for part in topk._packed(6, torch.cat(texts), None, offsets, None)]
    assert sizes == [6, 10, 7, 5] and [part.number for part in topk._packed(6, torch.cat(texts), None, offsets, None)] == [2, 1, 4, 1]  # fmt: skip  # noqa: E501
    expected = _sorted(maxsim(queries, torch.cat(texts), cu_seqlens=offsets), 5)
    nested = torch.nested.nested_tensor(texts, layout=torch.jagged)
    for corpus, options in ((nested, {}), (torch.cat(texts), {"cu_seqlens": offsets})):
        found = maxsim_topk(queries, corpus, 5, **options)
        assert torch.equal(found[0], expected[0]) and torch.equal(found[1], expected[1])


def test_iterable_of_padded_tensors_is_read_as_it_comes() -> None:
    queries = _integers(2, 3, 4)
    parts = [_integers(count, length, 4, seed=count) for count, length in ((3, 5), (1, 9), (6, 2))]
    mask = torch.rand(1, 9) > 0.5
    alive: list[int] = []

    def stream() -> Iterator[Tensor | tuple[Tensor, Tensor]]:
        for number, part in enumerate(parts):
            alive.append(number)
            yield (part, mask) if number == 1 else part

    scores = [maxsim(queries, part, document_mask=mask if part.shape[1] == 9 else None) for part in parts]
    expected = _sorted(torch.cat(scores, 1), 4)
    found = maxsim_topk(queries, stream(), 4, chunk_size=2)
    assert torch.equal(found[0], expected[0]) and torch.equal(found[1], expected[1]) and alive == [0, 1, 2]


def test_nan_comes_first_and_infinity_in_its_place() -> None:
    queries, corpus = torch.ones(1, 1, 1), torch.arange(7.0).view(7, 1, 1)
    corpus[2], corpus[4], corpus[5] = float("nan"), float("inf"), float("-inf")
    corpus[6] = float("nan")
    for chunk_size in (1, 3, None):
        found, indices = maxsim_topk(queries, corpus, 7, chunk_size=chunk_size)
        assert indices.tolist() == [[2, 6, 4, 3, 1, 0, 5]]
        torch.testing.assert_close(found, maxsim(queries, corpus).topk(7).values, equal_nan=True)


@pytest.mark.parametrize("packed", [False, True])
def test_the_scores_of_all_documents_never_lie_side_by_side(packed: bool) -> None:
    """No tensor that the search makes has Nq * Nd elements, nor as many as the corpus."""
    sizes: list[int] = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            out = func(*args, **(kwargs or {}))
            outputs = out if isinstance(out, tuple) else (out,)
            sizes.extend(tensor.numel() for tensor in outputs if isinstance(tensor, Tensor))
            return out

    queries, corpus = torch.randn(64, 2, 8), torch.randn(500, 9, 8)
    options = {"cu_seqlens": torch.arange(0, 4501, 9, dtype=torch.int32)} if packed else {}
    corpus = corpus.flatten(0, 1) if packed else corpus
    with Watch():
        maxsim_topk(queries, corpus, 10, chunk_size=5, **options)
    assert sizes and max(sizes) < 64 * 500 < corpus.numel()


def test_no_gradient_and_no_aliasing() -> None:
    queries, corpus = torch.randn(2, 3, 4, requires_grad=True), torch.randn(9, 3, 4, requires_grad=True)
    scores, indices = maxsim_topk(queries, corpus, 2)
    assert not scores.requires_grad
    assert scores.untyped_storage().nbytes() == scores.numel() * 4 and indices.untyped_storage().nbytes() == 2 * 2 * 8


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"k": 6}, ValueError, "k=6 exceeds the 5 documents"),
        ({"k": 0}, ValueError, "k=0 must be a positive integer"),
        ({"k": True}, ValueError, "positive integer"),
        ({"chunk_size": 0}, ValueError, "chunk_size=0 must be a positive integer"),
        ({"queries": torch.zeros(3, 4)}, ValueError, r"queries must be \[Nq, Lq, D\]"),
        ({"corpus": torch.zeros(5, 4)}, ValueError, "corpus must be padded"),
        ({"corpus": torch.zeros(5, 6, 3)}, ValueError, "D=3 and queries D=4"),
        ({"corpus": [torch.zeros(5, 6, 4)], "document_mask": torch.ones(5, 6).bool()}, ValueError, "as a pair"),
        ({"corpus": iter([]), "k": 1}, ValueError, "exceeds the 0 documents"),
        ({"document_mask": torch.ones(4, 6).bool()}, ValueError, r"document_mask must be \[5, 6\]"),
        ({"cu_seqlens": torch.tensor([0, 5]).int()}, ValueError, r"packed \[T, D\]"),
        ({"corpus": torch.zeros(9, 4), "cu_seqlens": torch.tensor([0, 9])}, ValueError, "must be int32"),
        ({"corpus": torch.zeros(9, 4), "cu_seqlens": torch.tensor([0, 4]).int()}, ValueError, "rise from 0 to T=9"),
        ({"backend": "cuda"}, RuntimeError, "cannot run"),
    ],
)
def test_bad_arguments_are_named(changed: dict[str, object], error: type[Exception], message: str) -> None:
    arguments = {"queries": torch.zeros(2, 3, 4), "corpus": torch.zeros(5, 6, 4), "k": 2, **changed}
    with pytest.raises(error, match=message):
        maxsim_topk(**arguments)

"""Ties, NaN, empty sides and excluded tokens, on every backend; several are defects once found in other libraries."""

from __future__ import annotations

import pytest
import torch
from maxsim_cases import BACKENDS
from torch import Tensor

from jmlr_kernels import maxsim, maxsim_candidates
from jmlr_kernels.maxsim import config

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = pytest.mark.parametrize("backend", BACKENDS)


def _leaf(*shape: int, seed: int = 0) -> Tensor:
    draw = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=draw).to(DEVICE).requires_grad_()


def test_ties_go_to_the_lowest_position(backend: str) -> None:
    """Equal tokens within one tile, across tiles, and behind an excluded one; the gradient goes to one of them."""
    queries = _leaf(2, 3, 16)
    documents = _leaf(1, 1, 16).detach().expand(2, 150, 16).clone().requires_grad_()
    mask = torch.ones(2, 150, dtype=torch.bool, device=DEVICE)
    mask[1, :140] = False
    scores, winners = maxsim(queries, documents, document_mask=mask, return_alignment=True, backend=backend)
    assert (winners[:, 0] == 0).all() and (winners[:, 1] == 140).all()
    scores.sum().backward()
    hit = documents.grad.abs().sum(-1) > 0
    assert hit[0].nonzero().flatten().tolist() == [0] and hit[1].nonzero().flatten().tolist() == [140]


def test_signed_zeros_tie(backend: str) -> None:
    queries, documents = torch.zeros(1, 1, 16, device=DEVICE), torch.zeros(1, 5, 16, device=DEVICE)
    queries[..., 0] = 1
    documents[0, :2, 0] = -0.0
    _, winners = maxsim(queries, documents, return_alignment=True, backend=backend)
    assert winners.item() == 0


@pytest.mark.parametrize("place", [0, 40, 149])
def test_nan_in_a_kept_token_reaches_the_score(backend: str, place: int) -> None:
    queries, documents = _leaf(2, 3, 16).detach(), _leaf(3, 150, 16).detach()
    documents[1, place, 5] = float("nan")
    scores, winners = maxsim(queries, documents, return_alignment=True, backend=backend)
    assert scores[:, 1].isnan().all() and scores[:, [0, 2]].isfinite().all()
    assert (winners[:, 1] == place).all()
    assert maxsim(queries, documents, backend=backend)[:, 1].isnan().all()
    queries[0, 2, 1] = float("nan")
    assert maxsim(queries, documents, backend=backend)[0].isnan().all()


def test_nan_in_an_excluded_token_goes_nowhere(backend: str) -> None:
    queries, documents = _leaf(2, 3, 16).detach(), _leaf(3, 70, 16).detach()
    weights = torch.ones(2, 3, device=DEVICE)
    document_mask = torch.ones(3, 70, dtype=torch.bool, device=DEVICE)
    query_mask = torch.ones(2, 3, dtype=torch.bool, device=DEVICE)
    expected_documents = documents.clone()
    document_mask[:, 7] = query_mask[1, 2] = False
    documents[:, 7], queries[1, 2], weights[1, 2] = float("nan"), float("inf"), float("nan")
    leaves = [tensor.requires_grad_() for tensor in (queries, documents, weights)]
    options = {"query_mask": query_mask, "document_mask": document_mask, "backend": backend}
    scores = maxsim(queries, documents, query_weights=weights, **options)
    clean = torch.where(query_mask[..., None], queries.detach(), 0)
    torch.testing.assert_close(scores, maxsim(clean, expected_documents, **options))
    scores.sum().backward()
    assert all(leaf.grad.isfinite().all() for leaf in leaves)
    assert (documents.grad[:, 7] == 0).all() and (queries.grad[1, 2] == 0).all() and weights.grad[1, 2] == 0


def test_infinite_similarities_keep_their_positions(backend: str) -> None:
    """A kept token at -inf beats an excluded one before it; +inf is an ordinary maximum."""
    queries = torch.zeros(1, 1, 16, device=DEVICE)
    queries[..., 0] = 1
    documents = torch.zeros(2, 4, 16, device=DEVICE)
    documents[0, :, 0], documents[1, 2, 0] = float("-inf"), float("inf")
    mask = torch.tensor([[False, False, True, True], [True] * 4], device=DEVICE)
    # One dimension only, so that infinity meets no zero.
    scores, winners = maxsim(queries[..., :1], documents[..., :1], document_mask=mask, return_alignment=True,
                             backend=backend)  # fmt: skip
    assert winners.flatten().tolist() == [2, 2] and scores.flatten().tolist() == [float("-inf"), float("inf")]


@pytest.mark.parametrize("packed", [False, True])
def test_empty_document_and_empty_query_score_zero(backend: str, packed: bool) -> None:
    """flash-maxsim 0.3.0 scores an empty document -inf and sends its gradient to token 0."""
    queries, documents = _leaf(2, 3, 16), _leaf(3, 5, 16)
    query_mask = torch.tensor([[True] * 3, [False] * 3], device=DEVICE)
    if packed:
        packed_documents = documents.detach()[[0, 2]].flatten(0, 1).requires_grad_()
        options = {"cu_seqlens": torch.tensor([0, 5, 5, 10], dtype=torch.int32, device=DEVICE)}
        documents = packed_documents
    else:
        mask = torch.ones(3, 5, dtype=torch.bool, device=DEVICE)
        mask[1] = False
        options = {"document_mask": mask}
    scores, winners = maxsim(
        queries, documents, query_mask=query_mask, return_alignment=True, backend=backend, **options
    )
    assert (scores[:, 1] == 0).all() and (scores[1] == 0).all() and (scores[0, [0, 2]] != 0).all()
    assert (winners[:, 1] == -1).all() and (winners[1] == -1).all()
    scores.backward(torch.full_like(scores, 3.0))
    assert (queries.grad[1] == 0).all() and queries.grad[0].isfinite().all()
    if not packed:
        assert (documents.grad[1] == 0).all()
    alone = maxsim(queries.detach()[:1], documents.detach(), backend=backend, **options)
    assert alone[0, 1] == 0


def test_all_similarities_negative_with_padding(backend: str) -> None:
    """PyLate and colpali score 0 here (padding wins with 0), ColBERT's CPU code too; the answer is -16."""
    queries = torch.zeros(1, 16, 16, device=DEVICE)
    queries[..., 0] = 1
    documents = torch.zeros(1, 8, 16, device=DEVICE)
    documents[0, :3, 0] = -1
    mask = torch.arange(8, device=DEVICE)[None] < 3
    assert maxsim(queries, documents, document_mask=mask, backend=backend).item() == -16


def test_mask_with_holes_selects_tokens_not_a_length(backend: str) -> None:
    """PyLate 1.6.0's flash backend takes the mask's sum for a length and scores the wrong tokens."""
    queries, documents = _leaf(3, 4, 16), _leaf(2, 40, 16)
    mask = torch.arange(40, device=DEVICE).expand(2, 40) % 3 == 2
    scores = maxsim(queries, documents, document_mask=mask, backend=backend)
    torch.testing.assert_close(scores, maxsim(queries, documents[:, 2::3], backend="torch"))


def test_gradients_are_never_dropped(backend: str) -> None:
    """PyLate's pairwise path over flash-maxsim returns scores without a graph."""
    queries, documents = _leaf(2, 3, 16), _leaf(2, 1, 9, 16)
    scores = maxsim_candidates(queries, documents, backend=backend)
    assert scores.requires_grad
    scores.sum().backward()
    assert queries.grad.abs().sum() > 0 and documents.grad.abs().sum() > 0
    for frozen, other in ((queries, documents), (documents, queries)):
        other.grad = None
        frozen.requires_grad_(False)
        maxsim_candidates(queries, documents, backend=backend).sum().backward()
        assert other.grad.abs().sum() > 0
        frozen.requires_grad_(True)


def test_float32_is_not_rounded_to_half(backend: str) -> None:
    """late-interaction-kernels 0.4.5 multiplies float32 in float16: error 4e-4, and overflow past 65504."""
    queries, documents = _leaf(2, 32, 128).detach() * 300, _leaf(3, 20, 128).detach() * 300
    exact = maxsim(queries.double(), documents.double(), backend="torch")
    scores = maxsim(queries, documents, backend=backend)
    assert scores.dtype == torch.float32
    assert ((scores - exact) / exact).abs().max() < 2e-6


@pytest.mark.parametrize("normalize", [False, True])
def test_offsets_past_two_to_the_31(backend: str, normalize: bool) -> None:
    """Views of a small part of a tensor: strides that fit 32 bits, whose multiples do not.

    late-interaction-kernels 0.4.5 computes them in 32 bits and leaves the tensor (4.3 GB of documents are enough).
    """
    if backend == "torch":
        pytest.skip("PyTorch computes its own offsets")
    # 2**31 elements are reserved, not touched: the system gives memory page by page, as it is written.
    stride = 2**30 + 16
    storage = torch.empty(2 * stride + 1024, dtype=torch.float16, device=DEVICE)
    sides = [storage.as_strided((3, 5, 16), (stride, 16, 1), offset) for offset in (0, 512)]
    for seed, side in enumerate(sides):
        side.copy_(_leaf(3, 5, 16, seed=seed).detach())
    weights = _leaf(3, 3, seed=2).detach()
    results = []
    for queries, documents, name in ((*sides, backend), (*(side.contiguous() for side in sides), "torch")):
        queries, documents = queries.requires_grad_(), documents.requires_grad_()
        scores = maxsim(queries, documents, normalize=normalize, backend=name)
        results.append((scores, *torch.autograd.grad((scores * weights).sum(), (queries, documents))))
    for found, expected in zip(*results, strict=True):
        torch.testing.assert_close(found, expected)


def test_bitwise_repeatable_and_allowed_by_deterministic_mode(backend: str) -> None:
    torch.use_deterministic_algorithms(True)
    try:
        results = []
        for _ in range(2):
            queries, documents = _leaf(3, 7, 16), _leaf(2, 33, 16)
            weights = _leaf(3, 7, seed=4)
            scores = maxsim(queries, documents, query_weights=weights, backend=backend)
            scores.backward(_leaf(3, 2, seed=3).detach())
            results.append((scores.detach(), queries.grad, documents.grad, weights.grad))
        assert all(torch.equal(first, second) for first, second in zip(*results, strict=True))
    finally:
        torch.use_deterministic_algorithms(False)


def test_strided_inputs(backend: str) -> None:
    """Any strides: transposed, sliced and expanded inputs give what their contiguous copies give."""
    queries = _leaf(4, 3, 32).detach()[..., ::2].transpose(0, 1)
    documents = _leaf(1, 20, 16).detach().expand(4, 20, 16)
    mask = (torch.arange(40, device=DEVICE) % 3 > 0)[None, ::2].expand(4, 20)
    weights = _leaf(4, 3).detach().T
    found = maxsim(queries, documents, document_mask=mask, query_weights=weights, backend=backend)
    copies = [tensor.contiguous() for tensor in (queries, documents, mask, weights)]
    expected = maxsim(copies[0], copies[1], document_mask=copies[2], query_weights=copies[3], backend="torch")
    torch.testing.assert_close(found, expected)
    shared = documents[None, :2].expand(3, 2, 20, 16)
    torch.testing.assert_close(
        maxsim_candidates(queries, shared, backend=backend), maxsim(queries, documents[:2], backend="torch")
    )


def test_nan_reduction_of_the_gpu(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The reduction that a GPU runs, which the interpreter replaces because it is slow there, gives the same."""
    if backend != "triton" or DEVICE == "cuda":
        pytest.skip("only the interpreter has two")
    queries, documents = _leaf(1, 3, 16).detach(), _leaf(1, 40, 16).detach()
    documents[0, 35, 0] = float("nan")
    expected = maxsim(queries, documents, return_alignment=True, backend=backend)
    monkeypatch.setattr(config, "interpreted", lambda: False)
    found = maxsim(queries, documents, return_alignment=True, backend=backend)
    torch.testing.assert_close(found, expected, equal_nan=True)
    assert found[0].isnan().all() and (found[1] == 35).all()

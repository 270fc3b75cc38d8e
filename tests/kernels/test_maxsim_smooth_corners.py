"""Smooth MaxSim's limits, NaN, infinities, empty sides and excluded tokens, on every backend."""

from __future__ import annotations

import pytest
import torch
from maxsim_cases import make_case
from maxsim_smooth_cases import BACKENDS, DEVICE, Smooth
from oracles import assert_as_exact_as_torch
from torch import Tensor

from jmlr_kernels import maxsim, maxsim_smooth

# The interpreter computes with infinities that a selection then drops, and numpy warns of each.
pytestmark = pytest.mark.filterwarnings("ignore:(invalid value|overflow|divide by zero|All-NaN):RuntimeWarning")
every = pytest.mark.parametrize("backend", BACKENDS)


def _leaf(*shape: int, seed: int = 0) -> Tensor:
    draw = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=draw).to(DEVICE).requires_grad_()


@every
def test_tends_to_the_hard_maximum(backend: str) -> None:
    """From above, by at most temperature * log(tokens) for each query token; the gradient is the winner's."""
    hard_leaves, leaves = [(_leaf(3, 5, 16), _leaf(4, 40, 16, seed=1)) for _ in range(2)]
    hard = maxsim(*hard_leaves, backend=backend)
    hard.sum().backward()
    for temperature in (1.0, 1e-1, 1e-2):
        above = maxsim_smooth(*leaves, temperature=temperature, backend=backend) - hard
        assert (above > -1e-5).all() and (above <= 5 * temperature * torch.tensor(40.0).log() + 1e-5).all()
    for temperature in (1e-5, 2.0**-126):
        scores = maxsim_smooth(*leaves, temperature=temperature, backend=backend)
        torch.testing.assert_close(scores, hard)
    for leaf in leaves:
        leaf.grad = None
    maxsim_smooth(*leaves, temperature=1e-6, backend=backend).sum().backward()
    for leaf, expected in zip(leaves, hard_leaves, strict=True):
        torch.testing.assert_close(leaf.grad, expected.grad)


@every
def test_large_similarities_neither_overflow_nor_round_away(backend: str) -> None:
    """Similarities near 1e6, whose naive exponentials are infinite: as exact as logsumexp at the same precision."""
    case = make_case(document_length=70, dimension=16)
    case.queries.mul_(300), case.documents.mul_(300)
    case.documents[:, 69] = case.documents[:, 3]  # two tokens with equal shares, in different tiles
    call = Smooth(case.to(torch.float32), 0.5)
    exact, plain = call.exact(), call.plain()
    for name, value in Smooth(case.to(torch.float32, DEVICE), 0.5).run(backend).items():
        assert_as_exact_as_torch(name, value.cpu(), plain[name], exact[name])


@every
def test_infinite_similarities(backend: str) -> None:
    """Plus infinity is the score; minus infinity alone too, and beside others it has no share. No NaN."""
    queries = torch.ones(1, 1, 1, device=DEVICE)
    values = torch.tensor([[float("-inf")] * 40, [0.0] * 39 + [float("inf")], [float("-inf")] * 39 + [2.0]])
    for order in (values, values.flip(1)):
        scores = maxsim_smooth(queries, order[..., None].to(DEVICE), temperature=0.1, backend=backend)
        assert scores.flatten().tolist() == [float("-inf"), float("inf"), 2.0]
    documents = values[2:, :, None].to(DEVICE).requires_grad_()
    (gradient,) = torch.autograd.grad(maxsim_smooth(queries, documents, temperature=0.1, backend=backend), documents)
    assert gradient.flatten().tolist() == [0.0] * 39 + [1.0]


@every
@pytest.mark.parametrize("place", [0, 40, 149])
def test_nan_in_a_kept_token_reaches_score_and_gradient(backend: str, place: int) -> None:
    queries, documents = _leaf(2, 3, 16), _leaf(3, 150, 16).detach()
    documents[1, place, 5] = float("nan")
    scores = maxsim_smooth(queries, documents, temperature=0.5, backend=backend)
    assert scores[:, 1].isnan().all() and scores[:, [0, 2]].isfinite().all()
    (gradient,) = torch.autograd.grad(scores.sum(), queries)
    assert gradient.isnan().all()


@every
def test_excluded_tokens_have_gradient_zero_beside_nan(backend: str) -> None:
    """Zero times NaN is NaN: an excluded token's zero share must not be multiplied with a kept token's NaN."""
    queries, documents = _leaf(2, 3, 16).detach(), _leaf(3, 40, 16, seed=1).detach()
    query_mask, document_mask = torch.ones(2, 3, device=DEVICE) > 0, torch.ones(3, 40, device=DEVICE) > 0
    query_mask[0, 1] = document_mask[:, 33] = False
    queries[1, 0, 3] = documents[2, 7, 5] = float("nan")
    leaves = (queries.requires_grad_(), documents.requires_grad_())
    options = {"query_mask": query_mask, "document_mask": document_mask, "temperature": 0.5, "backend": backend}
    gradients = torch.autograd.grad(maxsim_smooth(*leaves, **options).sum(), leaves)
    assert (gradients[0][0, 1] == 0).all() and (gradients[1][:, 33] == 0).all()


@every
def test_very_negative_similarities_beside_excluded_tokens(backend: str) -> None:
    """An excluded token read as zeros would have the greatest similarity of all, and an infinite share."""
    queries, documents = torch.ones(1, 2, 16, device=DEVICE), torch.full((2, 40, 16), -100.0, device=DEVICE)
    mask = torch.arange(40, device=DEVICE).expand(2, 40) % 3 == 2
    leaves = (queries.requires_grad_(), documents.requires_grad_())
    scores = maxsim_smooth(*leaves, temperature=0.5, document_mask=mask, backend=backend)
    torch.testing.assert_close(scores, 2 * (-1600 + 0.5 * mask.sum(1).log())[None].expand(1, 2))
    gradients = torch.autograd.grad(scores.sum(), leaves)
    torch.testing.assert_close(gradients[0], torch.full_like(queries, -200.0), rtol=1e-3, atol=0)
    expected = torch.where(mask[..., None], 2 / mask.sum(1)[:, None, None], 0.0).expand_as(documents)
    torch.testing.assert_close(gradients[1], expected, rtol=1e-3, atol=0)


@every
def test_nan_in_an_excluded_token_goes_nowhere(backend: str) -> None:
    queries, documents = _leaf(2, 3, 16).detach(), _leaf(3, 70, 16).detach()
    weights = torch.ones(2, 3, device=DEVICE)
    document_mask = torch.ones(3, 70, dtype=torch.bool, device=DEVICE)
    query_mask = torch.ones(2, 3, dtype=torch.bool, device=DEVICE)
    expected_documents = documents.clone()
    document_mask[:, 7] = query_mask[1, 2] = False
    documents[:, 7], queries[1, 2], weights[1, 2] = float("nan"), float("inf"), float("nan")
    leaves = [tensor.requires_grad_() for tensor in (queries, documents, weights)]
    options = {"query_mask": query_mask, "document_mask": document_mask, "temperature": 0.5, "backend": backend}
    scores = maxsim_smooth(queries, documents, query_weights=weights, **options)
    clean = torch.where(query_mask[..., None], queries.detach(), 0)
    torch.testing.assert_close(scores, maxsim_smooth(clean, expected_documents, **options))
    scores.sum().backward()
    assert all(leaf.grad.isfinite().all() for leaf in leaves)
    assert (documents.grad[:, 7] == 0).all() and (queries.grad[1, 2] == 0).all() and weights.grad[1, 2] == 0


@every
@pytest.mark.parametrize("packed", [False, True])
def test_empty_document_and_empty_query_score_zero(backend: str, packed: bool) -> None:
    queries, documents, weights = _leaf(2, 3, 16), _leaf(3, 5, 16), _leaf(2, 3, seed=2)
    query_mask = torch.tensor([[True] * 3, [False] * 3], device=DEVICE)
    if packed:
        documents = documents.detach()[[0, 2]].flatten(0, 1).requires_grad_()
        options = {"cu_seqlens": torch.tensor([0, 5, 5, 10], dtype=torch.int32, device=DEVICE)}
    else:
        mask = torch.ones(3, 5, dtype=torch.bool, device=DEVICE)
        mask[1] = False
        options = {"document_mask": mask}
    options |= {"query_mask": query_mask, "query_weights": weights}
    scores = maxsim_smooth(queries, documents, temperature=0.5, backend=backend, **options)
    assert (scores[:, 1] == 0).all() and (scores[1] == 0).all() and (scores[0, [0, 2]] != 0).all()
    upstream = torch.full_like(scores, 3.0)
    upstream[0, 1] = float("inf")  # of an empty document: it must not become 0 * inf
    scores.backward(upstream)
    assert (queries.grad[1] == 0).all() and queries.grad.isfinite().all() and documents.grad.isfinite().all()
    assert weights.grad.isfinite().all() and (weights.grad[1] == 0).all()
    assert packed or (documents.grad[1] == 0).all()


@every
@pytest.mark.parametrize(
    ("shape_q", "shape_d"),
    [((0, 3, 4), (2, 5, 4)), ((2, 0, 4), (3, 5, 4)), ((2, 3, 4), (0, 5, 4)), ((2, 3, 4), (3, 0, 4))],
)
def test_nothing_to_score(backend: str, shape_q: tuple[int, ...], shape_d: tuple[int, ...]) -> None:
    leaves = [torch.randn(shape, device=DEVICE, requires_grad=True) for shape in (shape_q, shape_d, shape_q[:2])]
    scores = maxsim_smooth(*leaves[:2], temperature=1.0, query_weights=leaves[2], backend=backend)
    assert scores.shape == (shape_q[0], shape_d[0]) and (scores == 0).all()
    assert all((gradient == 0).all() for gradient in torch.autograd.grad(scores.sum(), leaves))


@every
def test_strided_inputs(backend: str) -> None:
    """Any strides: transposed, sliced and expanded inputs give what their contiguous copies give."""
    queries = _leaf(4, 3, 32).detach()[..., ::2].transpose(0, 1).requires_grad_()
    documents = _leaf(1, 20, 16).detach().expand(4, 20, 16).requires_grad_()
    mask = (torch.arange(40, device=DEVICE) % 3 > 0)[None, ::2].expand(4, 20)
    weights = _leaf(4, 3).detach().T.requires_grad_()
    results = []
    for copy, run in ((False, backend), (True, "torch")):
        inputs = [tensor.detach().contiguous().requires_grad_() if copy else tensor for tensor in (queries, documents)]
        factors = weights.detach().contiguous().requires_grad_() if copy else weights
        scores = maxsim_smooth(
            *inputs, temperature=0.5, document_mask=mask.contiguous() if copy else mask, query_weights=factors,
            backend=run,
        )  # fmt: skip
        upstream = _leaf(4, 3, seed=9).detach().T  # not contiguous either
        results.append((scores, *torch.autograd.grad(scores, (*inputs, factors), upstream)))
    for found, expected in zip(*results, strict=True):
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("backend", [name for name in BACKENDS if name != "torch"])
@pytest.mark.parametrize("packed", [False, True])
def test_offsets_past_two_to_the_31(backend: str, packed: bool) -> None:
    """A view whose strides overflow 32 bits: an offset computed in int32 would leave it."""
    # 2**31 elements are reserved, not touched: the system gives memory page by page, as it is written.
    span = torch.empty(2**31 + 2**27 + 128, dtype=torch.float16, device=DEVICE)
    if packed:
        documents = span.as_strided((18, 16), (2**27, 1))
        options = {"cu_seqlens": torch.tensor([0, 2, 16, 17, 18], dtype=torch.int32, device=DEVICE)}
    else:
        documents, options = span.as_strided((3, 5, 16), (2**30 + 16, 16, 1)), {}
    documents.copy_(_leaf(*documents.shape).half().detach())
    queries = _leaf(2, 3, 16, seed=2).detach().half().requires_grad_()
    copy = documents.contiguous().requires_grad_()
    expected = maxsim_smooth(queries, copy, temperature=0.5, backend="torch", **options)
    expected_gradients = torch.autograd.grad(expected.sum(), (queries, copy))
    documents.requires_grad_()
    scores = maxsim_smooth(queries, documents, temperature=0.5, backend=backend, **options)
    gradients = torch.autograd.grad(scores.sum(), (queries, documents))
    torch.testing.assert_close((scores, *gradients), (expected, *expected_gradients))


@every
def test_bitwise_repeatable_and_allowed_by_deterministic_mode(backend: str) -> None:
    torch.use_deterministic_algorithms(True)
    try:
        results = []
        for _ in range(2):
            leaves = (_leaf(3, 7, 16), _leaf(2, 33, 16), _leaf(3, 7, seed=4))
            scores = maxsim_smooth(*leaves[:2], temperature=0.5, query_weights=leaves[2], backend=backend)
            results.append((scores, *torch.autograd.grad(scores, leaves, _leaf(3, 2, seed=3).detach())))
        assert all(torch.equal(first, second) for first, second in zip(*results, strict=True))
    finally:
        torch.use_deterministic_algorithms(False)


def test_jagged_documents() -> None:
    texts = [torch.randn(length, 8, dtype=torch.float64, requires_grad=True) for length in (3, 9, 1)]
    queries = torch.randn(2, 4, 8, dtype=torch.float64)
    nested = torch.nested.as_nested_tensor(texts, layout=torch.jagged)
    maxsim_smooth(queries, nested, temperature=0.5).pow(2).sum().backward()
    expected = torch.stack([0.5 * torch.logsumexp(queries @ text.T / 0.5, -1).sum(-1) for text in texts], dim=1)
    for text, gradient in zip(texts, torch.autograd.grad(expected.pow(2).sum(), texts), strict=True):
        torch.testing.assert_close(text.grad, gradient)


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"temperature": 0.0}, ValueError, "positive and finite; for the hard maximum call maxsim"),
        ({"temperature": -1.0}, ValueError, "positive and finite"),
        ({"temperature": float("nan")}, ValueError, "positive and finite"),
        ({"temperature": float("inf")}, ValueError, "positive and finite"),
        ({"temperature": torch.tensor(1.0)}, TypeError, "Python number"),
        ({"documents": torch.zeros(5, 6, 3)}, ValueError, "documents have D=3 and queries D=4"),
        ({"candidates": True}, ValueError, r"documents must be \[Nq, K, Ld, D\]"),
        ({"document_mask": torch.ones(5, 6)}, TypeError, "document_mask must be bool"),
        ({"backend": "cuda"}, RuntimeError, "cannot run"),
    ],
)
def test_bad_arguments_are_named(changed: dict[str, object], error: type[Exception], message: str) -> None:
    arguments = {"queries": torch.zeros(2, 3, 4), "documents": torch.zeros(5, 6, 4), "temperature": 1.0, **changed}
    with pytest.raises(error, match=message):
        maxsim_smooth(**arguments)

"""Smooth MaxSim: definition, corners and registration, on the torch backend and the Triton kernels.

On a GPU the kernels run compiled, elsewhere in Triton's interpreter.
"""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from maxsim_cases import Case, make_case
from oracles import assert_as_exact_as_torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from jmlr_kernels import maxsim, maxsim_smooth
from jmlr_kernels.maxsim import config_smooth, torch_smooth
from jmlr_kernels.maxsim.smooth_reference import maxsim_smooth_reference

hypothesis = pytest.importorskip("hypothesis")
strategies = hypothesis.strategies

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float32, torch.float16] + ([torch.bfloat16] if DEVICE == "cuda" else [])
LAYOUTS = [(False, False), (False, True), (True, False), (True, True)]
# The interpreter computes with infinities that a selection then drops, and numpy warns of each.
pytestmark = pytest.mark.filterwarnings("ignore:(invalid value|overflow|divide by zero|All-NaN):RuntimeWarning")
both = pytest.mark.parametrize("backend", ["torch", "triton"])


@dataclass
class Smooth:
    """One call with a temperature; `run` makes it, `exact` and `plain` compute the same by the definition."""

    case: Case
    temperature: float

    def run(self, backend: str) -> dict[str, Tensor]:
        return self._call(self.case, maxsim_smooth, backend=backend)

    def exact(self) -> dict[str, Tensor]:
        return self._call(self.case.to(torch.float64), maxsim_smooth_reference)

    def plain(self) -> dict[str, Tensor]:
        """The definition in the inputs' own dtype: the error that the precision itself brings."""
        return self._call(self.case, maxsim_smooth_reference)

    def _call(self, case: Case, function, **options: object) -> dict[str, Tensor]:  # type: ignore[no-untyped-def]
        queries, documents, weights = case.leaves()
        scores = function(
            queries,
            documents,
            temperature=self.temperature,
            query_weights=weights,
            candidates=case.candidates,
            **case.options,
            **options,
        )
        scores.backward(case.grad_scores.to(scores.dtype))
        found = {"scores": scores.detach(), "grad_queries": queries.grad, "grad_documents": documents.grad}
        return found if weights is None else {**found, "grad_weights": weights.grad}


def smooth(temperature: float = 0.7, **sizes: object) -> Smooth:
    return Smooth(make_case(**sizes), temperature)


def check_triton(dtype: torch.dtype, temperature: float = 0.7, **sizes: object) -> None:
    call = Smooth(make_case(**sizes).to(dtype), temperature)
    exact, plain = call.exact(), call.plain()
    plain["scores"] = plain["scores"].float()
    found = Smooth(call.case.to(dtype, DEVICE), temperature).run("triton")
    for name, value in found.items():
        assert_as_exact_as_torch(name, value.cpu(), plain[name], exact[name])


# --------------------------------------------------------------------------- definition


def test_reference_is_the_logsumexp() -> None:
    queries, documents = torch.randn(3, 4, 8), torch.randn(5, 6, 8)
    grid = torch.einsum("ish,jth->ijst", queries, documents)
    expected = 0.3 * torch.logsumexp(grid / 0.3, -1).sum(-1)
    torch.testing.assert_close(maxsim_smooth_reference(queries, documents, temperature=0.3), expected)


@hypothesis.settings(max_examples=40, deadline=None, derandomize=True)
@hypothesis.given(
    query_count=strategies.integers(1, 4),
    documents=strategies.integers(1, 5),
    query_length=strategies.integers(1, 7),
    document_length=strategies.integers(1, 40),
    dimension=strategies.integers(1, 9),
    candidates=strategies.booleans(),
    packed=strategies.booleans(),
    masked=strategies.booleans(),
    weighted=strategies.booleans(),
    temperature=strategies.sampled_from([0.05, 0.7, 20.0]),
    seed=strategies.integers(0, 2**16),
)
def test_torch_matches_definition(temperature: float, **sizes: int) -> None:
    call = smooth(temperature, **sizes)
    found, exact = call.run("torch"), call.exact()
    for name, value in found.items():
        torch.testing.assert_close(value, exact[name])


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(("candidates", "packed"), LAYOUTS)
def test_torch_in_chunks(candidates: bool, packed: bool, masked: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same with the memory limit so low that the loop over chunks turns more than once."""
    monkeypatch.setattr(torch_smooth, "_CHUNK_ELEMENTS", 800)
    call = smooth(candidates=candidates, packed=packed, masked=masked, weighted=masked, documents=6)
    found, exact = call.run("torch"), call.exact()
    for name, value in found.items():
        torch.testing.assert_close(value, exact[name])


@pytest.mark.parametrize(("candidates", "packed"), LAYOUTS)
def test_gradcheck(candidates: bool, packed: bool) -> None:
    case = make_case(
        query_count=2, documents=3, query_length=3, document_length=6, dimension=4,
        candidates=candidates, packed=packed, masked=True, weighted=True, seed=3,
    )  # fmt: skip

    def score(queries: Tensor, documents: Tensor, weights: Tensor) -> Tensor:
        return maxsim_smooth(
            queries, documents, temperature=0.8, query_weights=weights, candidates=candidates, **case.options
        )

    assert torch.autograd.gradcheck(score, case.leaves(), eps=1e-6, atol=1e-6)


def test_no_similarity_matrix_is_stored() -> None:
    """The largest tensor of forward and backward is a chunk or an input, whatever the number of documents."""
    sizes: list[int] = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            out = func(*args, **(kwargs or {}))
            outputs = out if isinstance(out, tuple) else (out,)
            sizes.extend(tensor.numel() for tensor in outputs if isinstance(tensor, Tensor))
            return out

    queries, documents = torch.randn(8, 32, 16), torch.randn(300, 100, 16)
    with Watch():
        arguments = (None, None, None, False, 1.0)
        _, maxima = torch_smooth.forward(queries, documents, None, *arguments, True)
        torch_smooth.backward(torch.ones(8, 300), queries, documents, maxima, *arguments)
    whole = 8 * 32 * 300 * 100
    assert max(sizes) <= max(torch_smooth._CHUNK_ELEMENTS, documents.numel()) < whole


# --------------------------------------------------------------------------- Triton kernels

# One shape per path through the kernels: several queries in a tile, a query longer than a tile, one token, several
# document tiles, embedding dimensions padded, walked in chunks, and both at once.
SHAPES = {
    "shared_tile": {"query_count": 5, "query_length": 24, "document_length": 40, "dimension": 64},
    "long_query": {"query_count": 2, "query_length": 150, "document_length": 20, "dimension": 16},
    "one_token": {"query_count": 1, "query_length": 1, "document_length": 1, "dimension": 32, "documents": 1},
    "long_document": {"query_count": 2, "query_length": 6, "document_length": 200, "dimension": 16, "documents": 2},
    "padded_dimension": {"dimension": 60},
    "chunked_dimension": {"dimension": 300, "documents": 2, "query_count": 2},
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES)
def test_paths(shape: str, dtype: torch.dtype) -> None:
    check_triton(dtype, masked=True, weighted=True, **SHAPES[shape])


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(("candidates", "packed"), LAYOUTS)
def test_layouts(candidates: bool, packed: bool, masked: bool) -> None:
    check_triton(torch.float16, candidates=candidates, packed=packed, masked=masked, weighted=masked, seed=1)


def test_runs_and_splits_of_documents(monkeypatch: pytest.MonkeyPatch) -> None:
    """Seven documents in runs of three forward, and shared out among three programs backward."""
    monkeypatch.setattr(config_smooth, "documents_per_program", lambda *_: 3)
    monkeypatch.setattr(config_smooth, "document_splits", lambda *_: 3)
    for dtype in DTYPES:
        check_triton(dtype, documents=7, document_length=5, masked=True, weighted=True)
    check_triton(torch.float32, documents=7, document_length=5, packed=True, candidates=True, query_count=2)


def test_packed_documents_longer_than_the_mean() -> None:
    """One document holds nearly all tokens: few programs share it, and each takes several tiles."""
    case = make_case(packed=True, documents=3, document_length=200, dimension=16, seed=5)
    tokens = case.documents.shape[0]
    case.options["cu_seqlens"] = torch.tensor([0, 1, tokens - 1, tokens], dtype=torch.int32)
    call = Smooth(case.to(torch.float32), 0.7)
    exact, plain = call.exact(), call.plain()
    for name, value in Smooth(case.to(torch.float32, DEVICE), 0.7).run("triton").items():
        assert_as_exact_as_torch(name, value.cpu(), plain[name], exact[name])


def test_small_float16_gradients_do_not_underflow() -> None:
    """Shares times gradients below float16's floor, whose sums are well inside its range."""
    case = make_case(query_count=16, documents=1, query_length=16, document_length=40, dimension=16)
    case.queries.fill_(0.25)
    case.documents.fill_(0.5)
    case.grad_scores.fill_(2.0**-21)
    call = Smooth(case.to(torch.float16, DEVICE), 1.0)
    found, exact = call.run("triton"), Smooth(case, 1.0).exact()
    assert exact["grad_documents"].abs().max() > 2.0**-21
    for name in ("grad_queries", "grad_documents"):
        torch.testing.assert_close(found[name].cpu().double(), exact[name], rtol=2.0**-8, atol=2.0**-25)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("seed", range(8))
def test_random_shapes(seed: int, dtype: torch.dtype) -> None:
    draw = torch.Generator().manual_seed(seed)

    def upto(limit: int) -> int:
        return int(torch.randint(1, limit + 1, (), generator=draw))

    sizes = {"query_count": upto(6), "documents": upto(6), "query_length": upto(140), "document_length": upto(150)}
    switches = {name: upto(2) == 2 for name in ("candidates", "packed", "masked", "weighted")}
    check_triton(dtype, dimension=(16, 63, 80, 111, 260)[seed % 5], seed=seed, **sizes, **switches)


# --------------------------------------------------------------------------- corners


def _leaf(*shape: int, seed: int = 0) -> Tensor:
    draw = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=draw).to(DEVICE).requires_grad_()


@both
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


@both
def test_large_similarities_neither_overflow_nor_round_away(backend: str) -> None:
    """Similarities near 1e6, whose naive exponentials are infinite: as exact as logsumexp at the same precision."""
    case = make_case(document_length=70, dimension=16)
    case.queries.mul_(300), case.documents.mul_(300)
    case.documents[:, 69] = case.documents[:, 3]  # two tokens with equal shares, in different tiles
    call = Smooth(case.to(torch.float32), 0.5)
    exact, plain = call.exact(), call.plain()
    for name, value in Smooth(case.to(torch.float32, DEVICE), 0.5).run(backend).items():
        assert_as_exact_as_torch(name, value.cpu(), plain[name], exact[name])


@both
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


@both
@pytest.mark.parametrize("place", [0, 40, 149])
def test_nan_in_a_kept_token_reaches_score_and_gradient(backend: str, place: int) -> None:
    queries, documents = _leaf(2, 3, 16), _leaf(3, 150, 16).detach()
    documents[1, place, 5] = float("nan")
    scores = maxsim_smooth(queries, documents, temperature=0.5, backend=backend)
    assert scores[:, 1].isnan().all() and scores[:, [0, 2]].isfinite().all()
    (gradient,) = torch.autograd.grad(scores.sum(), queries)
    assert gradient.isnan().all()


@both
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


@both
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


@both
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


@both
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


@both
@pytest.mark.parametrize(
    ("shape_q", "shape_d"),
    [((0, 3, 4), (2, 5, 4)), ((2, 0, 4), (3, 5, 4)), ((2, 3, 4), (0, 5, 4)), ((2, 3, 4), (3, 0, 4))],
)
def test_nothing_to_score(backend: str, shape_q: tuple[int, ...], shape_d: tuple[int, ...]) -> None:
    leaves = [torch.randn(shape, device=DEVICE, requires_grad=True) for shape in (shape_q, shape_d, shape_q[:2])]
    scores = maxsim_smooth(*leaves[:2], temperature=1.0, query_weights=leaves[2], backend=backend)
    assert scores.shape == (shape_q[0], shape_d[0]) and (scores == 0).all()
    assert all((gradient == 0).all() for gradient in torch.autograd.grad(scores.sum(), leaves))


@both
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


@pytest.mark.parametrize("packed", [False, True])
def test_offsets_past_two_to_the_31(packed: bool) -> None:
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
    scores = maxsim_smooth(queries, documents, temperature=0.5, backend="triton", **options)
    gradients = torch.autograd.grad(scores.sum(), (queries, documents))
    torch.testing.assert_close((scores, *gradients), (expected, *expected_gradients))


@both
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
    texts = [torch.randn(length, 8, requires_grad=True) for length in (3, 9, 1)]
    queries = torch.randn(2, 4, 8)
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


# --------------------------------------------------------------------------- registration


@pytest.mark.parametrize(("candidates", "packed"), LAYOUTS)
@pytest.mark.parametrize("weighted", [False, True])
def test_opcheck(candidates: bool, packed: bool, weighted: bool) -> None:
    case = make_case(candidates=candidates, packed=packed, masked=weighted, weighted=weighted).to(torch.float32)
    offsets, document_mask = case.options.get("cu_seqlens"), case.options.get("document_mask")
    forward = torch.ops.jmlr_kernels.maxsim_smooth_forward.default
    backward = torch.ops.jmlr_kernels.maxsim_smooth_backward.default
    masks = (case.options.get("query_mask"), document_mask)
    arguments = (case.queries, case.documents, *masks, case.query_weights, offsets, candidates, 0.5)
    torch.library.opcheck(forward, (*arguments, False, "torch"))
    torch.library.opcheck(forward, (*arguments, True, "torch"))
    _, maxima = forward(*arguments, True, "torch")
    inputs = (case.queries, case.documents, maxima, document_mask, case.query_weights, offsets, candidates, 0.5)
    torch.library.opcheck(backward, (case.grad_scores, *inputs, "torch"))


@pytest.mark.parametrize(("candidates", "packed"), LAYOUTS)
def test_compile_without_graph_breaks(candidates: bool, packed: bool) -> None:
    case = make_case(candidates=candidates, packed=packed, masked=True, weighted=True).to(torch.float32)

    def loss(queries: Tensor, documents: Tensor, weights: Tensor) -> Tensor:
        options = {"query_weights": weights, "candidates": candidates, **case.options}
        return maxsim_smooth(queries, documents, temperature=0.5, **options).logsumexp(-1).sum()

    gradients = []
    for call in (loss, torch.compile(loss, fullgraph=True, backend="aot_eager")):
        leaves = case.leaves()
        value = call(*leaves)
        value.backward()
        gradients.append([value.detach()] + [leaf.grad for leaf in leaves])
    for found, expected in zip(*gradients, strict=True):
        torch.testing.assert_close(found, expected)


def test_autocast_takes_its_dtype_and_keeps_float32_scores() -> None:
    """The inputs are rounded once; neither the operation nor its backward is rounded again inside."""
    call = Smooth(make_case(dimension=64, masked=True, weighted=True).to(torch.float32), 0.5)
    with torch.autocast("cpu", torch.bfloat16):
        found = call.run("torch")
    rounded = Smooth(call.case.to(torch.bfloat16), 0.5).run("torch")
    assert all(value.dtype == torch.float32 for value in found.values())
    assert all(torch.equal(value, rounded[name].float()) for name, value in found.items())


def test_second_derivative_is_refused() -> None:
    queries, documents = torch.randn(2, 3, 4, requires_grad=True), torch.randn(2, 3, 4)
    scores = maxsim_smooth(queries, documents, temperature=1.0)
    (gradient,) = torch.autograd.grad(scores.pow(2).sum(), queries, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


@pytest.mark.parametrize(("candidates", "packed"), LAYOUTS)
def test_flops(candidates: bool, packed: bool) -> None:
    case = make_case(candidates=candidates, packed=packed).to(torch.float32)
    queries, documents, _ = case.leaves()
    with FlopCounterMode(display=False) as counter:
        maxsim_smooth(queries, documents, temperature=1.0, candidates=candidates, **case.options).sum().backward()
    forward = 2 * 20 * 5 * (documents.numel() // 20) * (1 if candidates else 3)
    assert counter.get_total_flops() == 4 * forward


def test_fakes_follow_shapes_and_saved_state_is_inputs_and_maxima() -> None:
    meta = {"device": "meta", "dtype": torch.bfloat16}
    scores = maxsim_smooth(torch.empty(3, 5, 8, **meta), torch.empty(4, 9, 8, **meta), temperature=1.0)
    assert scores.shape == (3, 4) and scores.dtype == torch.float32
    saved: list[int] = []
    queries, documents = torch.randn(4, 8, 6, requires_grad=True), torch.randn(50, 60, 6, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: saved.append(t.numel() * t.element_size()) or t, lambda t: t
    ):
        maxsim_smooth(queries, documents, temperature=1.0)
    assert sum(saved) == 4 * (queries.numel() + documents.numel() + 4 * 50 * 8)

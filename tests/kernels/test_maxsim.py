"""MaxSim's semantics, on the torch backend: against the definition in float64, and the corners one by one."""

from __future__ import annotations

import pytest
import torch
from maxsim_cases import BACKENDS, Case, make_case
from torch import Tensor

from jmlr_kernels import maxsim, maxsim_candidates
from jmlr_kernels.maxsim import torch_chunked
from jmlr_kernels.maxsim.reference import maxsim_reference

hypothesis = pytest.importorskip("hypothesis")
strategies = hypothesis.strategies

LAYOUTS = [(False, False), (False, True), (True, False), (True, True)]


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor], **tolerance: float) -> None:
    assert torch.equal(found.pop("winners"), expected["winners"])
    for name, value in found.items():
        torch.testing.assert_close(value.double(), expected[name].double(), **tolerance)


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
    seed=strategies.integers(0, 2**16),
)
def test_matches_definition(**sizes: int) -> None:
    case = make_case(**sizes)
    assert_same(case.run("torch"), case.exact())


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(("candidates", "packed"), LAYOUTS)
def test_matches_definition_in_chunks(
    candidates: bool, packed: bool, masked: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same with the memory limits so low that every loop over chunks turns more than once."""
    monkeypatch.setattr(torch_chunked, "_CHUNK_ELEMENTS", 300)
    monkeypatch.setattr(torch_chunked, "_BACKWARD_ENTRIES", 20)
    case = make_case(candidates=candidates, packed=packed, masked=masked, weighted=masked, documents=6)
    assert_same(case.run("torch"), case.exact())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_multiplied_in_float32(dtype: torch.dtype) -> None:
    case = make_case(dimension=64, masked=True, weighted=True).to(dtype)
    found, exact = case.run("torch"), case.exact()
    assert found["scores"].dtype == torch.float32 and found["grad_documents"].dtype == dtype
    torch.testing.assert_close(found["scores"].double(), exact["scores"], rtol=1e-5, atol=1e-5)
    for name in ("grad_queries", "grad_documents"):
        one_rounding = torch.finfo(dtype).eps * exact[name].abs().max().item()
        torch.testing.assert_close(found[name].double(), exact[name], rtol=0, atol=one_rounding)


@pytest.mark.parametrize(("candidates", "packed"), LAYOUTS)
def test_gradcheck(candidates: bool, packed: bool) -> None:
    case = make_case(
        query_count=2, documents=3, query_length=3, document_length=6, dimension=4,
        candidates=candidates, packed=packed, masked=True, weighted=True, seed=3,
    )  # fmt: skip
    function = maxsim_candidates if candidates else maxsim

    def score(queries: Tensor, documents: Tensor, weights: Tensor) -> Tensor:
        return function(queries, documents, query_weights=weights, normalize=True, backend="torch", **case.options)

    assert torch.autograd.gradcheck(score, case.leaves(), eps=1e-6, atol=1e-6)


def test_second_derivative_is_refused() -> None:
    case = make_case()
    queries, documents, _ = case.leaves()
    (gradient,) = torch.autograd.grad(maxsim(queries, documents).pow(2).sum(), queries, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


@pytest.mark.parametrize(("candidates", "packed"), LAYOUTS)
def test_alignment_and_plain_scores_agree(candidates: bool, packed: bool) -> None:
    """Scores without gradients take another path, which skips the winners."""
    case = make_case(candidates=candidates, packed=packed, masked=True, weighted=True)
    function = maxsim_candidates if candidates else maxsim
    options = {**case.options, "query_weights": case.query_weights}
    scores = function(case.queries, case.documents, **options)
    again, winners = function(case.queries, case.documents, return_alignment=True, **options)
    assert torch.equal(scores, again)
    assert winners.dtype == torch.int32 and winners.shape == (3, 4, 5)
    assert (winners == -1)[~case.options["query_mask"][:, None, :].expand_as(winners)].all()


def test_candidates_are_the_diagonal_of_maxsim() -> None:
    case = make_case(candidates=True, masked=True, weighted=True)
    scores = maxsim_candidates(case.queries, case.documents, query_weights=case.query_weights, **case.options)
    for i in range(3):
        alone = maxsim(
            case.queries[i : i + 1],
            case.documents[i],
            query_mask=case.options["query_mask"][i : i + 1],
            document_mask=case.options["document_mask"][i],
            query_weights=case.query_weights[i : i + 1],
        )
        torch.testing.assert_close(scores[i : i + 1], alone)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("candidates", [False, True])
def test_packed_equals_padded(candidates: bool, masked: bool) -> None:
    case = make_case(candidates=candidates, packed=True, masked=masked, documents=5)
    offsets = case.options["cu_seqlens"].tolist()
    longest = max(end - start for start, end in zip(offsets, offsets[1:], strict=False))
    padded = torch.randn(len(offsets) - 1, longest, 20, dtype=torch.float64)
    mask = torch.zeros(len(offsets) - 1, longest, dtype=torch.bool)
    for j, (start, end) in enumerate(zip(offsets, offsets[1:], strict=False)):
        padded[j, : end - start] = case.documents[start:end]
        mask[j, : end - start] = case.options["document_mask"][start:end] if masked else True
    if candidates:
        padded, mask = padded.unflatten(0, (3, -1)), mask.unflatten(0, (3, -1))
    options = {"document_mask": mask, "query_mask": case.options.get("query_mask")}
    other = Case(case.queries, padded, case.grad_scores, candidates, None, options)
    found, expected = case.run("torch"), other.run("torch")
    gathered = expected.pop("grad_documents").reshape(-1, longest, 20)
    expected["grad_documents"] = torch.cat([gathered[j, : b - a] for j, (a, b) in enumerate(zip(offsets, offsets[1:], strict=False))])  # fmt: skip  # noqa: E501
    assert_same(found, expected)
    assert mask.all() or gathered.reshape(mask.shape + (20,))[~mask].abs().max() == 0


def test_mostly_padding_takes_the_packed_path(monkeypatch: pytest.MonkeyPatch) -> None:
    """A padded batch with many excluded tokens is computed without them, with the same result."""
    case = make_case(documents=6, document_length=40, masked=True)
    expected = case.exact()
    monkeypatch.setattr(torch_chunked, "_CHUNK_ELEMENTS", 100)
    monkeypatch.setattr(torch_chunked, "_padded_maxima", _counting(torch_chunked._padded_maxima, tokens := []))
    assert_same(case.run("torch"), expected)
    assert sum(tokens) < case.documents.shape[0] * case.documents.shape[1]


def _counting(function, tokens):  # type: ignore[no-untyped-def]
    def counted(rows, documents, *rest):  # type: ignore[no-untyped-def]
        tokens.append(documents.shape[0] * documents.shape[1] * documents.shape[2])
        return function(rows, documents, *rest)

    return counted


def test_jagged_documents() -> None:
    texts = [torch.randn(length, 8, requires_grad=True) for length in (3, 9, 1)]
    queries = torch.randn(2, 4, 8)
    nested = torch.nested.as_nested_tensor(texts, layout=torch.jagged)
    scores = maxsim(queries, nested)
    scores.pow(2).sum().backward()
    expected = torch.stack([(queries @ text.T).amax(-1).sum(-1) for text in texts], dim=1)
    torch.testing.assert_close(scores, expected)
    gradients = torch.autograd.grad(expected.pow(2).sum(), texts)
    for text, gradient in zip(texts, gradients, strict=True):
        torch.testing.assert_close(text.grad, gradient)


def test_normalize_gives_cosines_and_survives_a_zero_vector() -> None:
    queries, documents = torch.randn(2, 3, 8), 5 * torch.randn(4, 6, 8)
    documents[1, 2] = 0
    documents.requires_grad_()
    scores = maxsim(queries, documents, normalize=True)
    unit = torch.nn.functional.normalize
    torch.testing.assert_close(scores, maxsim(unit(queries, dim=-1), unit(documents, dim=-1)))
    scores.sum().backward()
    assert documents.grad.isfinite().all()


@pytest.mark.parametrize(("shape_q", "shape_d"), [((0, 3, 4), (2, 5, 4)), ((2, 0, 4), (3, 5, 4)), ((2, 3, 4), (0, 5, 4)), ((2, 3, 4), (3, 0, 4))])  # fmt: skip  # noqa: E501
@pytest.mark.parametrize("backend", [name for name in BACKENDS if name != "cuda"])
def test_nothing_to_score(shape_q: tuple[int, ...], shape_d: tuple[int, ...], backend: str) -> None:
    queries, documents = torch.randn(shape_q, requires_grad=True), torch.randn(shape_d, requires_grad=True)
    scores, winners = maxsim(queries, documents, return_alignment=True, backend=backend)
    assert scores.shape == (shape_q[0], shape_d[0]) and (scores == 0).all() and (winners == -1).all()
    gradients = torch.autograd.grad(scores.sum(), (queries, documents))
    assert all((gradient == 0).all() for gradient in gradients)


def test_scores_need_no_similarity_matrix() -> None:
    """The largest tensor of a forward is a chunk, whatever the number of documents."""
    sizes: list[int] = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            out = func(*args, **(kwargs or {}))
            sizes.extend(tensor.numel() for tensor in (out if isinstance(out, tuple) else (out,))
                         if isinstance(tensor, Tensor))  # fmt: skip
            return out

    queries, documents = torch.randn(8, 32, 16), torch.randn(300, 100, 16)
    with Watch():
        torch_chunked.forward(queries, documents, None, None, None, None, False, False, False, True, 0)
    whole = 8 * 32 * 300 * 100
    assert max(sizes) <= max(torch_chunked._CHUNK_ELEMENTS, documents.numel()) < whole


def test_reference_is_the_einsum() -> None:
    queries, documents = torch.randn(3, 4, 8), torch.randn(5, 6, 8)
    scores, winners = maxsim_reference(queries, documents)
    grid = torch.einsum("ish,jth->ijst", queries, documents)
    torch.testing.assert_close(scores, grid.amax(-1).sum(-1))
    assert torch.equal(winners.long(), grid.argmax(-1))


_Q, _D = torch.zeros(2, 3, 4), torch.zeros(5, 6, 4)


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"queries": torch.zeros(3, 4)}, ValueError, r"queries must be \[Nq, Lq, D\]"),
        ({"documents": torch.zeros(5, 6, 3)}, ValueError, "documents have D=3 and queries D=4"),
        ({"documents": torch.zeros(6, 4)}, ValueError, "packed .* with cu_seqlens"),
        ({"documents": _D.half()}, TypeError, "share one floating dtype"),
        ({"queries": _Q.long(), "documents": _D.long()}, TypeError, "share one floating dtype"),
        ({"document_mask": torch.ones(5, 6)}, TypeError, "document_mask must be bool"),
        ({"document_mask": torch.ones(5, 7, dtype=torch.bool)}, ValueError, r"document_mask must be \[5, 6\]"),
        ({"query_mask": torch.ones(3, dtype=torch.bool)}, ValueError, r"query_mask must be \[2, 3\]"),
        ({"query_weights": torch.ones(3)}, ValueError, r"query_weights must be \[Nq, Lq\] = \[2, 3\]"),
        ({"query_weights": torch.ones(2, 3).int()}, TypeError, "query_weights must be floating"),
        ({"documents": torch.zeros(9, 4), "cu_seqlens": torch.tensor([0, 4, 9])}, ValueError, "must be int32"),
        ({"documents": torch.zeros(9, 4), "cu_seqlens": torch.tensor([0, 4]).int()}, ValueError, "rise from 0 to T=9"),
        ({"documents": torch.zeros(9, 4), "cu_seqlens": torch.tensor([0, 5, 4, 9]).int()}, ValueError, "without decr"),
        ({"backend": "fast"}, ValueError, "backend='fast'"),
        ({"backend": "cuda"}, RuntimeError, "cannot run"),
    ],
)
def test_bad_arguments_are_named(changed: dict[str, object], error: type[Exception], message: str) -> None:
    arguments = {"queries": _Q, "documents": _D, **changed}
    with pytest.raises(error, match=message):
        maxsim(**arguments)


def test_bad_candidates_are_named() -> None:
    with pytest.raises(ValueError, match="candidates for 5 queries, but there are 2"):
        maxsim_candidates(_Q, torch.zeros(5, 7, 6, 4))
    with pytest.raises(ValueError, match="3 documents, which 2 queries cannot share evenly"):
        maxsim_candidates(_Q, torch.zeros(9, 4), cu_seqlens=torch.tensor([0, 3, 6, 9]).int())

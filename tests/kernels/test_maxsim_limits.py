"""Values and sizes at which an implementation changes its way: norms at their floor, winners at their integer's end,
masks longer than a scan, excluded NaN under normalisation. On every backend, against the definition in float64."""

from __future__ import annotations

import pytest
import torch
from maxsim_cases import BACKENDS, Case, make_case
from torch import Tensor

from jmlr_kernels import maxsim, maxsim_candidates, maxsim_tokens
from jmlr_kernels.maxsim import config, torch_chunked
from jmlr_kernels.maxsim.layout import WinnerCode, winner_code

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
everywhere = pytest.mark.parametrize("backend", BACKENDS)


def check(case: Case, backend: str) -> None:
    """Every result within float32's rounding of the definition's, relative to the largest."""
    exact, found = case.exact(), case.to(torch.float32, DEVICE).run(backend)
    assert torch.equal(found.pop("winners").cpu(), exact["winners"])
    for name, value in found.items():
        expected = exact[name]
        largest = expected.abs().max().item()
        torch.testing.assert_close(
            value.cpu().double(), expected, rtol=0, atol=1e-5 * largest, msg=lambda m, n=name: n + m
        )


@everywhere
@pytest.mark.parametrize("dimension", [20, 300])
@pytest.mark.parametrize("size", [1e-6, 1e-14])
def test_short_vectors_are_normalised_down_to_the_floor(size: float, dimension: int, backend: str) -> None:
    """Above 1e-12 any length is one; below, the floor is a constant, through which no length has a gradient."""
    case = make_case(dimension=dimension, weighted=True, normalize=True)
    for side in (case.queries, case.documents):
        side *= size
    # In float32 already, so that rounding the inputs is no part of the error.
    case.queries, case.documents = case.queries.float().double(), case.documents.float().double()
    check(case, backend)


@everywhere
def test_gradient_elements_of_zero_still_have_a_tangent(backend: str) -> None:
    """Sums over winners that are zero in one dimension only: the Jacobian's other term is not."""
    case = make_case(dimension=20, normalize=True, weighted=True)
    case.documents[..., 5:] = 0
    check(case, backend)
    case.queries, case.documents = case.documents[:3, :5].clone(), torch.randn(4, 23, 20, dtype=torch.float64)
    check(case, backend)


@everywhere
@pytest.mark.parametrize("dimension", [20, 300])
@pytest.mark.parametrize("query_count", [2, 40])
@pytest.mark.parametrize(("poison", "weighted"), [(float("nan"), False), (float("inf"), True)])
def test_excluded_tokens_hold_anything_under_normalisation(
    poison: float, weighted: bool, query_count: int, dimension: int, backend: str
) -> None:
    """Norms of excluded tokens are infinite, NaN or never computed; on the way (2 queries) and before (40)."""
    case = make_case(
        query_count=query_count, documents=2, dimension=dimension, document_length=9, masked=True, weighted=weighted,
        normalize=True,
    )  # fmt: skip
    expected = case.to(torch.float32, DEVICE).run(backend)
    for tensor, mask in ((case.queries, "query_mask"), (case.documents, "document_mask")):
        tensor[~case.options[mask]] = poison
    if case.query_weights is not None:
        case.query_weights[~case.options["query_mask"]] = poison
    for name, value in case.to(torch.float32, DEVICE).run(backend).items():
        assert torch.equal(value, expected[name]), name


@everywhere
def test_empty_document_scores_zero_whatever_the_weight(backend: str) -> None:
    weights = torch.tensor([[1.0, float("nan"), float("inf")]], device=DEVICE)
    queries, documents = torch.randn(1, 3, 16, device=DEVICE), torch.randn(2, 5, 16, device=DEVICE)
    mask = torch.ones(2, 5, dtype=torch.bool, device=DEVICE)
    mask[1] = False
    scores = maxsim(queries, documents, document_mask=mask, query_weights=weights, backend=backend)
    assert scores[0, 0].isnan() and scores[0, 1] == 0


@everywhere
@pytest.mark.parametrize("packed", [False, True])
def test_kept_tokens_of_a_long_document(packed: bool, backend: str) -> None:
    """A mask longer than one scan of it, with holes on both sides of each scan's end."""
    check(make_case(query_count=2, documents=3, query_length=4, document_length=1100, dimension=16, packed=packed,
                    masked=True, seed=2), backend)  # fmt: skip


@everywhere
def test_documents_with_gaps_between_them_are_normalised(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every second token of every second document: strides that no length explains."""
    queries = torch.randn(40, 5, 16, device=DEVICE)
    for count in (2, 40):  # norms on the way, and in a pass before
        wide = torch.randn(6, 14, 32, device=DEVICE)
        part = wide[::2, 1::2, :16].detach().requires_grad_()
        assert not part.is_contiguous()
        copy = part.detach().contiguous().requires_grad_()
        weights = torch.linspace(-1, 1, count * 3, device=DEVICE).view(count, 3)
        for side, name in ((part, backend), (copy, "torch")):
            (maxsim(queries[:count], side, normalize=True, backend=name) * weights).sum().backward()
        torch.testing.assert_close(part.grad, copy.grad)
        torch.testing.assert_close(
            maxsim(queries[:count], part, normalize=True, backend=backend),
            maxsim(queries[:count], copy, normalize=True, backend="torch"),
        )


@everywhere
def test_unused_maxima_send_nothing_whatever_their_winner_holds(backend: str) -> None:
    """A winner of infinity whose maximum the loss does not look at, beside one that it does."""
    queries = torch.ones(1, 2, 1, device=DEVICE, requires_grad=True)
    documents = torch.tensor([[[1.0]], [[float("inf")]]], device=DEVICE, requires_grad=True)
    maxima = maxsim_tokens(queries, documents, backend=backend)
    maxima[:, 0].sum().backward()
    assert queries.grad.flatten().tolist() == [1, 1] and documents.grad.flatten().tolist() == [2, 0]


@pytest.mark.parametrize(
    ("length", "code"),
    [
        (255, WinnerCode(torch.uint8, 255, True)),
        (256, WinnerCode(torch.uint8, 255, False)),
        (257, WinnerCode(torch.uint16, 65535, True)),
        (65535, WinnerCode(torch.uint16, 65535, True)),
        (65536, WinnerCode(torch.uint16, 65535, False)),
        (65537, WinnerCode(torch.int32, -1, True)),
    ],
)
def test_winners_take_the_smallest_integer(length: int, code: WinnerCode) -> None:
    assert winner_code(torch.zeros(1).expand(2, length, 1), None, 0) == code
    # Packed documents keep one value for nobody: one token fewer.
    packed = torch.zeros(1).expand(length - 1, 1)
    offsets = torch.tensor([0, 0, length - 1], dtype=torch.int32)
    assert winner_code(packed, offsets, 0) == code._replace(marked=True)
    assert winner_code(torch.zeros(1).expand(10**6, 1), offsets, length - 1) == code._replace(marked=True)


@everywhere
def test_packed_document_of_256_tokens_beside_an_empty_one(backend: str) -> None:
    """The last of 256 positions and nobody are two values."""
    case = make_case(query_count=2, documents=2, query_length=3, document_length=256, dimension=4, packed=True)
    case.options["cu_seqlens"] = torch.tensor([0, 256, 256], dtype=torch.int32)
    case.documents = torch.randn(256, 4, dtype=torch.float64)
    case.queries = case.queries.abs()
    case.documents[255] = 20
    assert (case.exact()["winners"][:, 0] == 255).all()
    check(case, backend)


@pytest.mark.parametrize(
    "backend", [pytest.param(name, marks=pytest.mark.slow) if name == "triton" else name for name in BACKENDS]
)
@pytest.mark.parametrize("masked", [False, True])
def test_document_of_65536_tokens(masked: bool, backend: str) -> None:
    """Every value of two bytes is a position; who has no winner follows from the masks."""
    documents = torch.linspace(-1, 1, 2**16, dtype=torch.float64).repeat(2, 1)[..., None]
    grad = torch.tensor([[1.0, 2.0]], dtype=torch.float64)
    case = Case(torch.tensor([[[2.0], [-3.0], [5.0]]], dtype=torch.float64), documents, grad)
    if masked:
        document_mask = torch.ones(2, 2**16, dtype=torch.bool)
        document_mask[0, 0], document_mask[1] = False, False
        case.options = {"query_mask": torch.tensor([[True, True, False]]), "document_mask": document_mask}
    check(case, backend)


@everywhere
@pytest.mark.parametrize("candidates", [False, True])
def test_packed_documents_emptied_by_their_mask_score_zero(candidates: bool, backend: str) -> None:
    """Scored without winners, which would say so."""
    case = make_case(packed=True, masked=True, candidates=candidates, seed=4).to(torch.float32, DEVICE)
    offsets = case.options["cu_seqlens"].tolist()
    emptied = max(range(len(offsets) - 1), key=lambda i: offsets[i + 1] - offsets[i])
    mask = case.options["document_mask"]
    mask[offsets[emptied] : offsets[emptied + 1]] = False
    function = maxsim_candidates if candidates else maxsim
    scores = function(case.queries, case.documents, backend=backend, **case.options).flatten(0 if candidates else 1)
    assert (scores[..., emptied] == 0).all() and scores.isfinite().all()


@pytest.mark.parametrize("candidates", [False, True])
@pytest.mark.parametrize("packed", [False, True])
def test_normalised_gradients_in_slices(candidates: bool, packed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each slice of documents takes the norms of its own tokens."""
    monkeypatch.setattr(torch_chunked, "_BACKWARD_ENTRIES", 20)
    case = make_case(candidates=candidates, packed=packed, masked=True, weighted=True, normalize=True, documents=6)
    case.documents *= torch.linspace(0.1, 10, case.documents.shape[-2], dtype=torch.float64)[:, None]
    check(case, "torch")


@everywhere
def test_tokens_of_no_packed_document_have_no_gradient(backend: str) -> None:
    """Offsets that end before the tokens do, which are not looked at on a GPU."""
    queries, documents = torch.randn(2, 3, 16, device=DEVICE), torch.randn(12, 16, device=DEVICE)
    offsets = torch.tensor([0, 4, 9], dtype=torch.int32, device=DEVICE)
    tensors = (queries, documents, None, None, None, offsets)
    operations = torch.ops.jmlr_kernels
    _, winners, *scales = operations.maxsim_forward(*tensors, False, True, False, True, 0, backend)
    for kept_scales in (scales, (None, None)):
        _, gradient, _ = operations.maxsim_backward(
            [torch.ones(2, 2, device=DEVICE)], queries, documents, winners, *tensors[2:], *kept_scales, "scores", False,
            0, backend,
        )  # fmt: skip
        assert gradient.isfinite().all() and (gradient[9:] == 0).all() and (gradient[:9] != 0).any()


@everywhere
def test_longer_documents_than_promised_are_loud(backend: str) -> None:
    """Under torch.compile offsets are not looked at; a winner that does not fit its integer makes the score NaN."""
    queries, documents = torch.randn(2, 3, 16, device=DEVICE), torch.randn(290, 16, device=DEVICE)
    offsets = torch.tensor([0, 280, 290], dtype=torch.int32, device=DEVICE)

    def score(queries: Tensor, documents: Tensor, offsets: Tensor) -> Tensor:
        return maxsim(queries, documents, cu_seqlens=offsets, max_seqlen=12, backend=backend)

    if backend == "torch":
        score = torch.compile(score, fullgraph=True, backend="eager")
    elif DEVICE == "cpu":  # the same by the operation itself

        def score(queries: Tensor, documents: Tensor, offsets: Tensor) -> Tensor:
            arguments = (queries, documents, None, None, None, offsets, False, False, False, True, 12, backend)
            return torch.ops.jmlr_kernels.maxsim_forward(*arguments)[0]

    scores = score(queries, documents, offsets)
    assert scores[:, 0].isnan().all() and scores[:, 1].isfinite().all()


def test_one_split_per_lane_of_documents(monkeypatch: pytest.MonkeyPatch) -> None:
    """Splits that do not divide the documents: the last ones have few or none."""
    for splits in (2, 5, 9):
        monkeypatch.setattr(config, "document_splits", lambda *_, splits=splits: splits)
        check(make_case(query_count=1, documents=19, document_length=3, query_length=2, dimension=16, weighted=True,
                        masked=True), "triton")  # fmt: skip

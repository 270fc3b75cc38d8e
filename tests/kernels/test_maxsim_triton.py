"""The Triton kernels against float64, by the tolerance rule: on a GPU compiled, elsewhere in Triton's interpreter."""

from __future__ import annotations

import pytest
import torch
from maxsim_cases import Case, make_case
from oracles import assert_as_exact_as_torch

from jmlr_kernels import maxsim, maxsim_candidates, maxsim_tokens
from jmlr_kernels.maxsim import config
from jmlr_kernels.maxsim.layout import winner_code

hypothesis = pytest.importorskip("hypothesis")
strategies = hypothesis.strategies

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float32, torch.float16] + ([torch.bfloat16] if DEVICE == "cuda" else [])

# One shape per path through the kernels: several queries in a tile, a query longer than a tile, one token, several
# document tiles, embedding dimensions padded, walked in chunks, and both at once.
SHAPES = {
    "shared_tile": {"query_count": 5, "query_length": 24, "document_length": 40, "dimension": 64},
    "long_query": {"query_count": 4, "query_length": 150, "document_length": 20, "dimension": 16},
    "one_token": {"query_count": 1, "query_length": 1, "document_length": 1, "dimension": 32, "documents": 1},
    "long_document": {"query_count": 2, "query_length": 6, "document_length": 300, "dimension": 16, "documents": 2},
    "padded_dimension": {"dimension": 60},
    "chunked_dimension": {"dimension": 300, "documents": 2, "query_count": 2},
}


def check(dtype: torch.dtype, **sizes: object) -> None:
    check_case(make_case(**sizes).to(dtype), dtype)


def check_case(case: Case, dtype: torch.dtype) -> None:
    exact = case.exact()
    found = case.to(dtype, DEVICE).run("triton")
    plain = case.plain(exact["winners"])
    plain["scores"] = plain["scores"].float()
    assert torch.equal(found.pop("winners").cpu(), exact["winners"])
    for name, value in found.items():
        assert_as_exact_as_torch(name, value.cpu(), plain[name], exact[name])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES)
def test_paths(shape: str, dtype: torch.dtype) -> None:
    check(dtype, masked=True, weighted=True, **SHAPES[shape])


@hypothesis.settings(max_examples=15, deadline=None, derandomize=True)
@hypothesis.given(
    query_count=strategies.integers(1, 4),
    documents=strategies.integers(1, 4),
    query_length=strategies.integers(1, 12),
    document_length=strategies.integers(1, 40),
    dimension=strategies.integers(1, 40),
    candidates=strategies.booleans(),
    packed=strategies.booleans(),
    masked=strategies.booleans(),
    weighted=strategies.booleans(),
    normalize=strategies.booleans(),
    seed=strategies.integers(0, 2**16),
)
def test_matches_definition(**sizes: int) -> None:
    """Any shape and any mix of options, in float32: winners exactly, the rest to a few roundings of the largest."""
    # In one dimension all unit vectors are 1 or -1: ties that float32's norms break.
    hypothesis.assume(sizes["dimension"] > 1 or not sizes["normalize"])
    case = make_case(**sizes).to(torch.float32)
    found, exact = case.to(torch.float32, DEVICE).run("triton"), case.exact()
    assert torch.equal(found.pop("winners").cpu(), exact["winners"])
    for name, value in found.items():
        largest = exact[name].abs().max().item() if value.numel() else 0.0
        torch.testing.assert_close(value.cpu().double(), exact[name], rtol=1e-5, atol=1e-5 * max(1.0, largest))


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(("candidates", "packed"), [(False, False), (False, True), (True, False), (True, True)])
def test_layouts(candidates: bool, packed: bool, masked: bool) -> None:
    check(torch.float16, candidates=candidates, packed=packed, masked=masked, weighted=masked, documents=3, seed=1)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("candidates", [False, True])
@pytest.mark.parametrize("shape", ["shared_tile", "long_query", "padded_dimension", "chunked_dimension"])
def test_normalisation_and_its_jacobian(shape: str, candidates: bool, dtype: torch.dtype) -> None:
    """Norms computed on the way and in a pass before; the Jacobian within a tile and after walking the dimension."""
    check(dtype, normalize=True, masked=True, weighted=True, candidates=candidates, **SHAPES[shape])
    check(dtype, normalize=True, packed=True, candidates=candidates, query_count=2, document_length=30)


def test_float16_vectors_of_any_length_are_normalised() -> None:
    """Norms whose squares overflow or vanish in float16, and a zero vector."""
    case = make_case(dimension=32, normalize=True)
    sizes = torch.logspace(-3, 3, case.documents.shape[1], dtype=torch.float64)
    case.documents *= sizes[:, None]
    case.documents[1, 2] = 0
    check_case(case.to(torch.float16), torch.float16)


@pytest.mark.parametrize("length", [255, 256, 257])
@pytest.mark.parametrize("masked", [False, True])
def test_winners_fit_their_integer(length: int, masked: bool) -> None:
    """At 256 tokens every byte is a position, and who has no winner follows from the masks."""
    case = make_case(query_count=2, documents=3, query_length=3, document_length=length, dimension=16, masked=masked)
    case.documents[0, -1] *= 50  # the last position wins, or is farthest from winning
    check_case(case.to(torch.float32), torch.float32)
    _, documents, _ = case.leaves()
    assert winner_code(documents, None, 0).dtype == (torch.uint16 if length > 256 else torch.uint8)


@pytest.mark.parametrize("candidates", [False, True])
def test_maxima_of_query_tokens(candidates: bool) -> None:
    """maxsim_tokens, forward and gradient; entries without a gradient send none, whatever their tokens hold."""
    case = make_case(masked=True, candidates=candidates, dimension=32).to(torch.float32)
    results = []
    for backend, device in (("torch", "cpu"), ("triton", DEVICE)):
        moved = case.to(torch.float32, device)
        queries, documents, _ = moved.leaves()
        with torch.no_grad():
            queries[0, 1] = float("inf")
        maxima = maxsim_tokens(queries, documents, candidates=candidates, backend=backend, **moved.options)
        grad = torch.linspace(-1, 1, maxima.numel(), device=device).view_as(maxima).clone()
        grad[0, :, 1] = 0
        maxima.backward(grad)
        results.append([value.detach().cpu() for value in (maxima[:, :, 2:], queries.grad, documents.grad)])
    for found, expected in zip(results[1], results[0], strict=True):
        assert expected.isfinite().all()
        torch.testing.assert_close(found, expected)
    scores = (maxsim_candidates if candidates else maxsim)(case.queries, case.documents, **case.options)
    torch.testing.assert_close(
        maxsim_tokens(case.queries, case.documents, candidates=candidates, **case.options).sum(-1), scores
    )


def test_documents_split_among_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    """One query and many documents: d(queries) is summed in parts."""
    monkeypatch.setattr(config, "document_splits", lambda *_: 3)
    for normalize in (False, True):
        check(torch.float32, query_count=1, documents=21, query_length=5, document_length=6, dimension=32,
              weighted=True, normalize=normalize)  # fmt: skip
    check(torch.float32, query_count=1, documents=21, query_length=5, document_length=6, dimension=300,
          weighted=True, normalize=True)  # fmt: skip


def test_winners_of_several_scans(monkeypatch: pytest.MonkeyPatch) -> None:
    """More query rows than a scan holds, more hits than a product takes, and programs with several tasks."""
    monkeypatch.setattr(config, "scan_length", lambda *_: 128)
    monkeypatch.setattr(config, "gradient_programs", lambda *_: 2)
    check(torch.float32, query_count=30, query_length=12, documents=3, document_length=70, dimension=16, masked=True)
    check(torch.float16, query_count=30, query_length=12, documents=2, document_length=3, dimension=16)


def test_longer_documents_than_promised() -> None:
    """A packed document longer than max_seqlen: an error where the offsets can be looked at, NaN where they cannot."""
    queries, documents = torch.randn(2, 3, 16), torch.randn(30, 16)
    offsets = torch.tensor([0, 20, 30], dtype=torch.int32)
    with pytest.raises(ValueError, match="max_seqlen=12"):
        maxsim(queries, documents, cu_seqlens=offsets, max_seqlen=12)
    arguments = (queries, documents, None, None, None, offsets, False, False, False, True, 12, "triton")
    scores, winners, *_ = torch.ops.jmlr_kernels.maxsim_forward(*(
        value.to(DEVICE) if isinstance(value, torch.Tensor) else value for value in arguments
    ))  # fmt: skip
    assert scores[:, 0].isnan().all() and scores[:, 1].isfinite().all() and winners.dtype == torch.uint8
    with pytest.raises(ValueError, match="max_seqlen is for packed"):
        maxsim(queries, documents[None], max_seqlen=30)


def test_documents_per_program_covers_the_last_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """Seven documents in runs of three: the last program has one."""
    monkeypatch.setattr(config, "documents_per_program", lambda *_: 3)
    check(torch.float32, documents=7, document_length=5, masked=True)
    check(torch.float32, documents=7, document_length=5, packed=True, candidates=True, query_count=2)


def test_packed_documents_longer_than_the_mean() -> None:
    """One document holds nearly all tokens: few programs share it, and each takes several tiles."""
    case = make_case(packed=True, documents=3, document_length=200, dimension=16, seed=5)
    tokens = case.documents.shape[0]
    case.options["cu_seqlens"] = torch.tensor([0, 1, tokens - 1, tokens], dtype=torch.int32)
    found, exact = case.to(torch.float32, DEVICE).run("triton"), case.exact()
    assert torch.equal(found.pop("winners").cpu(), exact["winners"])
    for name, value in found.items():
        torch.testing.assert_close(value.cpu().double(), exact[name], rtol=1e-5, atol=1e-5)


def test_small_float16_gradients_do_not_underflow() -> None:
    """Gradients below float16's least number, whose sum is inside its range."""
    case = make_case(query_count=16, documents=1, query_length=16, document_length=2, dimension=16).to(torch.float16)
    case.queries.fill_(4)
    case.grad_scores.fill_(2.0**-27)
    found = case.to(torch.float16, DEVICE).run("triton")
    exact = case.exact()["grad_documents"]
    assert exact.abs().max() >= 2.0**-18
    torch.testing.assert_close(found["grad_documents"].cpu().double(), exact, rtol=2.0**-8, atol=2.0**-25)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("seed", range(8))
def test_random_shapes(seed: int, dtype: torch.dtype) -> None:
    draw = torch.Generator().manual_seed(seed)

    def upto(limit: int) -> int:
        return int(torch.randint(1, limit + 1, (), generator=draw))

    sizes = {"query_count": upto(6), "documents": upto(6), "query_length": upto(140), "document_length": upto(150)}
    switches = {name: upto(2) == 2 for name in ("candidates", "packed", "masked", "weighted")}
    check(dtype, dimension=(16, 63, 80, 111, 260)[seed % 5], seed=seed, **sizes, **switches)

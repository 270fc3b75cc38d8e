"""Smooth MaxSim's C++ path on the CPU: precision, threads, pieces of long documents, memory, values that do not fit.

The semantics (NaN, infinities, empty and excluded tokens) are tested with the other backends in tests/kernels; every
instruction set is tested by cpu_worker.py.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from oracles import assert_as_exact_as_torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1] / "kernels"))

from maxsim_cases import make_case  # noqa: E402
from maxsim_smooth_cases import Smooth  # noqa: E402

from jmlr_kernels import native  # noqa: E402

hypothesis = pytest.importorskip("hypothesis")
strategies = hypothesis.strategies

pytestmark = pytest.mark.skipif(
    not native.has("maxsim_smooth_backward", "cpu"), reason=f"no native library: {native.loaded().problem}"
)

ROOT = Path(__file__).parents[2]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def check(call: Smooth) -> None:
    exact, plain = call.exact(), call.plain()
    plain["scores"] = plain["scores"].float()
    for name, value in call.run("cpu").items():
        assert_as_exact_as_torch(name, value, plain[name], exact[name])


def forward(*tensors: Tensor | None, candidates: bool = False, temperature: float = 0.5) -> tuple[Tensor, Tensor]:
    """The operation itself: queries, documents, query_mask, document_mask, query_weights, cu_seqlens."""
    padded = (*tensors, *([None] * (6 - len(tensors))))
    return torch.ops.jmlr_native.maxsim_smooth_forward(*padded, candidates, temperature, True)


def backward(*tensors: Tensor | None, candidates: bool = False, temperature: float = 0.5) -> tuple[Tensor, ...]:
    """grad_scores, queries, documents, maxima, document_mask, query_weights, cu_seqlens."""
    padded = (*tensors, *([None] * (7 - len(tensors))))
    return torch.ops.jmlr_native.maxsim_smooth_backward(*padded, candidates, temperature)


@hypothesis.settings(max_examples=60, deadline=None, derandomize=True)
@hypothesis.given(
    dtype=strategies.sampled_from(DTYPES),
    query_count=strategies.integers(1, 6),
    documents=strategies.integers(1, 6),
    query_length=strategies.integers(1, 40),
    document_length=strategies.integers(1, 60),
    dimension=strategies.integers(16, 140),
    candidates=strategies.booleans(),
    packed=strategies.booleans(),
    masked=strategies.booleans(),
    weighted=strategies.booleans(),
    temperature=strategies.sampled_from([0.7, 20.0]),
    seed=strategies.integers(0, 2**16),
)
def test_as_exact_as_torch(dtype: torch.dtype, temperature: float, **sizes: Any) -> None:
    check(Smooth(make_case(**sizes).to(dtype), temperature))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("packed", [False, True])
def test_documents_of_several_pieces_in_several_splits(dtype: torch.dtype, packed: bool) -> None:
    """Documents around multiples of 96 tokens, and so many tokens in all that a split holds several pieces."""
    for length in (96, 97, 193, 384):
        check(Smooth(make_case(documents=11, document_length=length, packed=packed, masked=packed).to(dtype), 20.0))
    check(Smooth(make_case(documents=40, document_length=130, dimension=16, query_length=2).to(dtype), 20.0))


@pytest.mark.parametrize("element", [0.0, 1.0, -87.0, -88.5, -100.0, -3e38])
def test_exponentials_over_their_whole_range(element: float) -> None:
    """One similarity of 0 and others below it, at temperature 1: log(1 + n * exp(x)), and shares that are exp(x)."""
    spread = torch.linspace(0, 0.69, 31)
    documents = torch.cat([torch.zeros(1), element - spread if element else -20 * spread])[None, :, None]
    similarities = documents.flatten().double()
    scores, maxima = forward(torch.ones(1, 1, 1), documents, temperature=1.0)
    assert torch.equal(scores.flatten(), maxima.flatten())
    torch.testing.assert_close(scores.flatten().double(), similarities.logsumexp(0, keepdim=True), rtol=4e-7, atol=0)
    _, gradient, _ = backward(torch.ones(1, 1), torch.ones(1, 1, 1), documents, maxima, temperature=1.0)
    share = (similarities - similarities.logsumexp(0)).exp()
    share[share < 2.0**-126] = 0  # below float32's normal numbers
    torch.testing.assert_close(
        gradient.flatten().double(), share, rtol=1.3e-5 if element < -80 else 1e-6, atol=2.0**-126
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dimension", [16, 17])
def test_nan_at_any_place_of_a_tile(dtype: torch.dtype, dimension: int) -> None:
    """In any lane and any row: it reaches its own score and maximum, and no others."""
    queries, documents = torch.randn(1, 19, dimension), torch.randn(1, 130, dimension)
    for place in (*range(30), 95, 96, 129):
        poisoned = documents.clone()
        poisoned[0, place, dimension - 1] = float("nan")
        assert forward(queries.to(dtype), poisoned.to(dtype))[1].isnan().all()
    for row in range(19):
        poisoned = queries.clone()
        poisoned[0, row, 0] = float("nan")
        _, maxima = forward(poisoned.to(dtype), documents.to(dtype))
        assert maxima[0, 0].isnan().nonzero().flatten().tolist() == [row]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_excluded_tokens_are_not_read(dtype: torch.dtype) -> None:
    call = Smooth(
        make_case(masked=True, weighted=True, query_length=20, document_length=140, dimension=17).to(dtype), 0.7
    )
    expected, case = call.run("cpu"), call.case
    for poison in (float("nan"), float("inf")):
        case.queries[~case.options["query_mask"]] = poison
        case.query_weights[~case.options["query_mask"]] = poison
        case.documents[~case.options["document_mask"]] = poison
        for name, value in call.run("cpu").items():
            assert torch.equal(value, expected[name]), name


def test_a_maximum_of_minus_infinity_has_no_gradient() -> None:
    """Whatever the similarities are: of a pair that does not count, nothing is multiplied by zero."""
    queries, documents = torch.randn(2, 3, 16), torch.randn(3, 20, 16)
    _, maxima = forward(queries, documents)
    maxima[:, 1] = float("-inf")
    grad = torch.ones(2, 3)
    gradients = backward(grad, queries, documents, maxima)
    grad[:, 1] = float("inf")
    for one, other in zip(gradients, backward(grad, queries, documents, maxima), strict=True):
        assert torch.equal(one, other)
    assert (gradients[1][1] == 0).all() and all(gradient.isfinite().all() for gradient in gradients)


def test_weights_of_other_types_keep_theirs() -> None:
    case = make_case(weighted=True).to(torch.float32)
    for dtype in (torch.float16, torch.float64):
        case.query_weights = case.query_weights.to(dtype)
        found, exact = Smooth(case, 0.7).run("cpu"), Smooth(case, 0.7).exact()
        assert found["grad_weights"].dtype == dtype
        torch.testing.assert_close(found["grad_weights"].float(), exact["grad_weights"].to(dtype).float())


def test_no_dimension() -> None:
    """All similarities are 0: the score is the logarithm of how many there are."""
    queries, documents, weights = torch.zeros(2, 3, 0), torch.zeros(4, 5, 0), torch.ones(2, 3)
    scores, maxima = forward(queries, documents, None, None, weights)
    torch.testing.assert_close(scores, torch.full((2, 4), 3 * 0.5).mul(torch.tensor(5.0).log()))
    gradients = backward(torch.ones(2, 4), queries, documents, maxima, None, weights)
    assert [tuple(gradient.shape) for gradient in gradients] == [(2, 3, 0), (4, 5, 0), (2, 3)]
    torch.testing.assert_close(gradients[2], maxima.sum(1))


@pytest.mark.parametrize("candidates", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("query_count", "query_length", "documents"), [(13, 29, 17), (4, 12, 5)], ids=["many", "a_panel_for_each"]
)
def test_bits_do_not_depend_on_threads(
    query_count: int, query_length: int, documents: int, dtype: torch.dtype, candidates: bool
) -> None:
    """Large enough that two and five threads get tasks, in both directions; with few queries, groups differ too."""
    case = make_case(
        query_count=query_count, query_length=query_length, documents=documents, document_length=170, dimension=64,
        candidates=candidates, masked=True, weighted=True,
    ).to(dtype)  # fmt: skip
    threads = torch.get_num_threads()
    try:
        results = []
        for count in (1, 2, 5, 2):
            torch.set_num_threads(count)
            results.append(Smooth(case, 0.7).run("cpu"))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        for name, value in other.items():
            assert torch.equal(value, results[0][name]), name


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_strides_of_every_kind(dtype: torch.dtype) -> None:
    """Reversed roles, gaps, expanded documents, odd offsets, a strided dimension: as their contiguous copies, to the
    bit."""
    wide = torch.randn(9, 50, 3, 80).to(dtype)
    views = [
        (wide[:3, :20, 0, :33], wide[:, :, 1, 1:34]),
        (wide[:3, ::5, 2, 7:40].transpose(0, 1), wide[4:, 3:40:3, 2, :33]),
        (wide[0, :20, :, :66:2].transpose(0, 1), wide[1, :1, :, 14:80:2].expand(4, 3, 33)),
        (wide[0, 0, :1, :33].expand(5, 7, 33), wide[2:3, :, 0, 3:36].expand(6, 50, 33)),
    ]
    for queries, documents in views:
        grad = torch.randn(documents.shape[0], queries.shape[0]).T
        found, copied = (
            (scores := forward(q, d), backward(g, q, d, scores[1]))
            for g, q, d in (
                (grad, queries, documents),
                (grad.contiguous(), queries.contiguous(), documents.contiguous()),
            )
        )
        for one, other in zip((*found[0], *found[1]), (*copied[0], *copied[1]), strict=True):
            assert torch.equal(one, other) and one.is_contiguous()


MEMORY = """
import resource, torch
from jmlr_kernels import maxsim_smooth
queries, documents = (torch.randn(64, length, 16, requires_grad=True) for length in (32, 512))
maxsim_smooth(queries[:1], documents[:1], temperature=1.0, backend="cpu").sum().backward()
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
maxsim_smooth(queries, documents, temperature=1.0, backend="cpu").sum().backward()
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024)
"""


def test_no_similarity_matrix_is_stored() -> None:
    """In a process of its own: its memory grows by a small part of what 64 x 64 x 32 x 512 similarities would take."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    ran = subprocess.run([sys.executable, "-c", MEMORY], env=environment, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    assert int(ran.stdout) < 4 * 64 * 64 * 32 * 512 / 8


def test_direct_calls_are_checked() -> None:
    """The public function explains more; a direct call must not read memory that is not there."""
    queries, documents = torch.randn(2, 3, 8), torch.randn(4, 5, 8)
    packed = documents.flatten(0, 1)
    _, maxima = forward(queries, documents)
    grad = torch.ones(2, 4)
    calls: list[tuple[str, Any]] = [
        ("must rise within 0", lambda: forward(queries, packed, None, None, None, torch.tensor([0, 5, 21]).int())),
        ("must rise within 0",
         lambda: backward(torch.ones(2, 1), queries, packed, torch.ones(2, 1, 3), None, None,
                          torch.tensor([-1, 20]).int())),
        ("not float64", lambda: forward(queries.double(), documents.double())),
        ("documents must be float32", lambda: forward(queries, documents.half())),
        ("documents have D=7", lambda: forward(queries, documents[..., :7])),
        ("query_mask must have the shape", lambda: forward(queries, documents, torch.ones(2, 2, dtype=torch.bool))),
        ("document_mask must be bool", lambda: backward(grad, queries, documents, maxima, torch.ones(4, 5))),
        ("temperature=0 must be positive", lambda: forward(queries, documents, temperature=0.0)),
        ("temperature=nan must be positive",
         lambda: backward(grad, queries, documents, maxima, temperature=float("nan"))),
        ("maxima must have the shape", lambda: backward(grad, queries, documents, maxima[:, :3])),
        ("maxima must be float32", lambda: backward(grad, queries, documents, maxima.double())),
        ("grad_scores must have the shape", lambda: backward(grad[:1], queries, documents, maxima)),
    ]  # fmt: skip
    for message, call in calls:
        with pytest.raises(RuntimeError, match=message):
            call()

"""Smooth MaxSim: its definition on the torch backend, and what PyTorch asks of an operation."""

from __future__ import annotations

import pytest
import torch
from maxsim_cases import make_case
from maxsim_smooth_cases import Smooth, smooth
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from jmlr_kernels import maxsim_smooth
from jmlr_kernels.maxsim import torch_smooth
from jmlr_kernels.maxsim.smooth_reference import maxsim_smooth_reference

hypothesis = pytest.importorskip("hypothesis")
strategies = hypothesis.strategies

LAYOUTS = [(False, False), (False, True), (True, False), (True, True)]


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

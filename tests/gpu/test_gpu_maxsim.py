"""MaxSim on a CUDA device, at real sizes: what the interpreter on a CPU cannot show."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
from oracles import assert_as_exact_as_torch

import jmlr_kernels

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

DTYPES = [torch.bfloat16, torch.float16, torch.float32]


def definition(
    queries: torch.Tensor,
    documents: torch.Tensor,
    query_mask: torch.Tensor | None = None,
    document_mask: torch.Tensor | None = None,
    query_weights: torch.Tensor | None = None,
) -> torch.Tensor:
    """Scores [Nq, Nd] by the definition; ties go to the lowest index, as `max` over one dimension gives them."""
    similarities = torch.einsum("qld,nmd->qnlm", queries, documents)
    if document_mask is not None:
        similarities = similarities.masked_fill(~document_mask[None, :, None, :], float("-inf"))
    # argmax of float64 on CUDA does not promise the first of equals: the smallest index that reaches the maximum does.
    best = similarities.amax(-1, keepdim=True)
    index = torch.arange(documents.shape[1], device=documents.device)
    winner = torch.where(similarities == best, index, documents.shape[1]).amin(-1, keepdim=True)
    best = similarities.gather(-1, winner.clamp_max(documents.shape[1] - 1)).squeeze(-1)
    best = torch.where(torch.isinf(best), 0.0, best)
    if query_weights is not None:
        best = best * query_weights[:, None]
    if query_mask is not None:
        best = best.masked_fill(~query_mask[:, None], 0.0)
    return best.sum(-1, dtype=torch.promote_types(queries.dtype, torch.float32))


def results(
    function: Callable[..., torch.Tensor], leaves: list[torch.Tensor], grad: torch.Tensor
) -> list[torch.Tensor]:
    """Scores and the gradients of queries and documents."""
    scores = function(*leaves)
    return [scores, *torch.autograd.grad(scores, leaves, grad.to(scores.dtype))]


def in_float64(tensors: list[torch.Tensor]) -> list[torch.Tensor]:
    return [tensor.detach().double().requires_grad_() for tensor in tensors]


def random(shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> torch.Tensor:
    generator = torch.Generator(device="cuda").manual_seed(seed)
    tokens = torch.randn(shape, generator=generator, device="cuda")
    return torch.nn.functional.normalize(tokens, dim=-1).to(dtype).requires_grad_()


def integers(shape: tuple[int, ...], dtype: torch.dtype, seed: int, largest: int = 2) -> torch.Tensor:
    generator = torch.Generator(device="cuda").manual_seed(seed)
    return torch.randint(-largest, largest + 1, shape, generator=generator, device="cuda").to(dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(64, 64, 32, 300, 128), (33, 17, 20, 1030, 96), (5, 7, 130, 65, 128)], ids=str)
def test_scores_of_unit_vectors(backend: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    query_count, document_count, query_length, document_length, dim = shape
    queries = random((query_count, query_length, dim), dtype, 0)
    documents = random((document_count, document_length, dim), dtype, 1)
    with torch.no_grad():
        actual = jmlr_kernels.maxsim(queries, documents, backend=backend)
        low, exact = definition(queries, documents), definition(queries.double(), documents.double())
    assert_as_exact_as_torch(f"scores {shape} {dtype}", actual, low, exact)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("masked", [False, True])
def test_small_integers_are_exact_to_the_last_bit(backend: str, dtype: torch.dtype, masked: bool) -> None:
    """Integer tokens make every product and sum exact, and ties frequent: nothing may differ, not even a winner."""
    queries = integers((48, 32, 64), dtype, 0).requires_grad_()
    documents = integers((40, 180, 64), dtype, 1).requires_grad_()
    grad = integers((48, 40), torch.float32, 2)
    masks: dict[str, torch.Tensor] = {}
    if masked:
        masks = {
            "query_mask": integers((48, 32), torch.float32, 3) > -1,
            "document_mask": integers((40, 180), torch.float32, 4) > 0,
            "query_weights": integers((48, 32), torch.float32, 5).exp2(),
        }
        masks["document_mask"][3] = False
        masks["query_mask"][5] = False
    wide = {name: mask.double() if mask.is_floating_point() else mask for name, mask in masks.items()}
    exact = results(lambda q, d: definition(q, d, **wide), in_float64([queries, documents]), grad)
    actual = results(lambda q, d: jmlr_kernels.maxsim(q, d, backend=backend, **masks), [queries, documents], grad)
    for name, got, right in zip(("scores", "queries' gradient", "documents' gradient"), actual, exact, strict=True):
        assert torch.equal(got, right.to(got.dtype)), f"{name}, {dtype}, masked={masked}"


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
def test_gradients_of_unit_vectors(backend: str, dtype: torch.dtype) -> None:
    leaves = [random((64, 32, 128), dtype, 0), random((64, 300, 128), dtype, 1)]
    grad = torch.randn((64, 64), generator=torch.Generator(device="cuda").manual_seed(2), device="cuda")
    exact = results(definition, in_float64(leaves), grad)
    low = results(definition, leaves, grad)
    actual = results(lambda q, d: jmlr_kernels.maxsim(q, d, backend=backend), leaves, grad)
    for name, *triple in zip(("scores", "dq", "dd"), actual, low, exact, strict=True):
        assert_as_exact_as_torch(f"{name} {dtype}", *triple)


def test_packed_documents_equal_padded_ones(backend: str) -> None:
    lengths = torch.randint(0, 181, (50,), generator=torch.Generator().manual_seed(0)).tolist()
    documents = integers((50, 180, 128), torch.bfloat16, 1)
    mask = torch.arange(180, device="cuda")[None, :] < torch.tensor(lengths, device="cuda")[:, None]
    queries, grad = integers((20, 32, 128), torch.bfloat16, 0).requires_grad_(), integers((20, 50), torch.float32, 2)
    padded = documents.clone().requires_grad_()
    packed = documents[mask].clone().requires_grad_()
    ends = torch.tensor([0, *lengths]).cumsum(0).to(device="cuda", dtype=torch.int32)
    one = results(lambda q, d: jmlr_kernels.maxsim(q, d, document_mask=mask, backend=backend), [queries, padded], grad)
    other = results(lambda q, d: jmlr_kernels.maxsim(q, d, cu_seqlens=ends, backend=backend), [queries, packed], grad)
    assert torch.equal(one[0], other[0]) and torch.equal(one[1], other[1]) and torch.equal(one[2][mask], other[2])


def test_candidates_equal_the_cross_products_diagonal(backend: str) -> None:
    queries = random((16, 32, 128), torch.bfloat16, 0)
    documents = random((16, 8, 180, 128), torch.bfloat16, 1)
    scores = jmlr_kernels.maxsim_candidates(queries, documents, backend=backend)
    for row in range(16):
        own = jmlr_kernels.maxsim(queries[row : row + 1], documents[row], backend=backend)
        torch.testing.assert_close(scores[row : row + 1], own)


def test_nan_reaches_the_score(backend: str) -> None:
    queries, documents = random((3, 32, 128), torch.bfloat16, 0), random((4, 300, 128), torch.bfloat16, 1)
    with torch.no_grad():
        documents[2, 277, 5] = float("nan")
        scores = jmlr_kernels.maxsim(queries, documents, backend=backend)
    assert torch.isnan(scores[:, 2]).all() and torch.isfinite(scores[:, [0, 1, 3]]).all()


def test_two_runs_are_bit_identical(backend: str) -> None:
    leaves = [random((256, 32, 128), torch.bfloat16, 0), random((256, 300, 128), torch.bfloat16, 1)]
    grad = torch.randn((256, 256), device="cuda")
    first, second = (results(partial(jmlr_kernels.maxsim, backend=backend), leaves, grad) for _ in range(2))
    assert all(torch.equal(one, other) for one, other in zip(first, second, strict=True))


def test_forward_takes_no_memory_beyond_scores(backend: str) -> None:
    queries, documents = random((256, 32, 128), torch.bfloat16, 0), random((256, 300, 128), torch.bfloat16, 1)
    with torch.no_grad():
        jmlr_kernels.maxsim(queries, documents, backend=backend)
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        scores = jmlr_kernels.maxsim(queries, documents, backend=backend)
    extra = torch.cuda.max_memory_allocated() - before
    assert extra <= scores.numel() * 4 + 2**20, f"{extra} bytes beyond the inputs"


def test_cuda_graph_replays_on_new_inputs(backend: str) -> None:
    leaves = [random((32, 32, 128), torch.bfloat16, 0), random((32, 180, 128), torch.bfloat16, 1)]
    grad = torch.randn((32, 32), device="cuda")
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        results(partial(jmlr_kernels.maxsim, backend=backend), leaves, grad)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        static = results(partial(jmlr_kernels.maxsim, backend=backend), leaves, grad)
    with torch.no_grad():
        leaves[0].copy_(random((32, 32, 128), torch.bfloat16, 7))
        leaves[1].copy_(random((32, 180, 128), torch.bfloat16, 8))
    graph.replay()
    eager = results(partial(jmlr_kernels.maxsim, backend=backend), leaves, grad)
    assert all(torch.equal(one, other) for one, other in zip(static, eager, strict=True))


def test_compiled_equals_eager(backend: str) -> None:
    leaves = [random((32, 32, 128), torch.bfloat16, 0), random((32, 180, 128), torch.bfloat16, 1)]
    grad = torch.randn((32, 32), device="cuda")

    def scores(queries: torch.Tensor, documents: torch.Tensor) -> torch.Tensor:
        return jmlr_kernels.maxsim(queries, documents, backend=backend)

    eager, compiled = results(scores, leaves, grad), results(torch.compile(scores, fullgraph=True), leaves, grad)
    assert all(torch.equal(one, other) for one, other in zip(eager, compiled, strict=True))


@pytest.mark.parametrize("packed", [False, True])
def test_documents_past_two_to_the_31_elements(backend: str, packed: bool) -> None:
    """The last documents, whose offsets need 64 bits, score and get gradients as they do on their own."""
    free, _ = torch.cuda.mem_get_info()
    if free < 24 * 2**30:
        pytest.skip(f"needs 24 GiB of free GPU memory, there are {free / 2**30:.0f}")
    length, dim = 300, 128
    count = 2**31 // (length * dim) + 8
    generator = torch.Generator(device="cuda").manual_seed(1)
    documents = torch.empty((count, length, dim), dtype=torch.bfloat16, device="cuda").normal_(generator=generator)
    queries = random((2, 32, dim), torch.bfloat16, 0)
    grad = torch.randn((2, count), generator=generator, device="cuda")
    last = documents[-4:].clone().requires_grad_()
    ends = torch.arange(count + 1, dtype=torch.int32, device="cuda") * length if packed else None
    whole = (documents.view(-1, dim) if packed else documents).requires_grad_()
    full = results(lambda q, d: jmlr_kernels.maxsim(q, d, cu_seqlens=ends, backend=backend), [queries, whole], grad)
    own = results(lambda q, d: jmlr_kernels.maxsim(q, d, backend=backend), [queries, last], grad[:, -4:])
    torch.testing.assert_close(full[0][:, -4:], own[0])
    torch.testing.assert_close(full[2].view(count, length, dim)[-4:], own[2])


def test_a_step_takes_no_memory_beyond_gradients_and_winners(backend: str) -> None:
    leaves = [random((256, 32, 128), torch.bfloat16, 0), random((256, 180, 128), torch.bfloat16, 1)]
    grad = torch.randn((256, 256), device="cuda")
    results(partial(jmlr_kernels.maxsim, backend=backend), leaves, grad)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    found = results(partial(jmlr_kernels.maxsim, backend=backend), leaves, grad)
    extra = torch.cuda.max_memory_allocated() - before
    scores, gradients = found[0].numel(), sum(value.numel() for value in found[1:])
    wanted = 4 * scores + 2 * gradients + 32 * scores  # scores, both gradients, a byte for each winner
    assert extra <= wanted + 4 * 2**20, f"{extra} bytes, scores, gradients and winners have {wanted}"


@pytest.mark.parametrize("length", [255, 256, 257])
def test_winners_fit_their_integer(backend: str, length: int) -> None:
    queries = integers((9, 32, 64), torch.bfloat16, 0).requires_grad_()
    documents = integers((7, length, 64), torch.bfloat16, 1).requires_grad_()
    mask = integers((7, length), torch.float32, 4) > 0
    mask[3] = False
    grad = integers((9, 7), torch.float32, 2)
    exact = results(lambda q, d: definition(q, d, document_mask=mask), in_float64([queries, documents]), grad)
    actual = results(
        lambda q, d: jmlr_kernels.maxsim(q, d, document_mask=mask, backend=backend), [queries, documents], grad
    )
    assert all(torch.equal(got, right.to(got.dtype)) for got, right in zip(actual, exact, strict=True))


@pytest.mark.parametrize("shape", [(64, 64), (1, 500)], ids=str)
@pytest.mark.parametrize("dim", [128, 320])
def test_normalisation_and_its_jacobian(backend: str, shape: tuple[int, int], dim: int) -> None:
    """Norms in a pass before (several row tiles) and on the way (one), Jacobian in the tile and apart."""
    leaves = [
        (3 * torch.randn((count, length, dim), device="cuda")).to(torch.bfloat16).requires_grad_()
        for count, length in ((shape[0], 32), (shape[1], 90))
    ]
    grad = torch.randn(shape, device="cuda")

    def plain(queries: torch.Tensor, documents: torch.Tensor) -> torch.Tensor:
        unit = torch.nn.functional.normalize
        return definition(unit(queries, dim=-1), unit(documents, dim=-1))

    exact, low = results(plain, in_float64(leaves), grad), results(plain, leaves, grad)
    actual = results(lambda q, d: jmlr_kernels.maxsim(q, d, normalize=True, backend=backend), leaves, grad)
    for name, *triple in zip(("scores", "dq", "dd"), actual, low, exact, strict=True):
        assert_as_exact_as_torch(name, *triple)


def test_contrastive_loss_equals_cross_entropy(backend: str) -> None:
    leaves = [random((64, 32, 128), torch.bfloat16, 0), random((128, 180, 128), torch.bfloat16, 1)]
    labels = torch.randperm(128, device="cuda")[:64]
    one = torch.ones((), device="cuda")

    def plain(queries: torch.Tensor, documents: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.cross_entropy(definition(queries, documents) / 0.05, labels)

    def fused(queries: torch.Tensor, documents: torch.Tensor) -> torch.Tensor:
        return jmlr_kernels.maxsim_contrastive_loss(queries, documents, labels, temperature=0.05, backend=backend)

    exact, low = results(plain, in_float64(leaves), one), results(plain, leaves, one)
    for name, *triple in zip(("loss", "dq", "dd"), results(fused, leaves, one), low, exact, strict=True):
        assert_as_exact_as_torch(name, *triple)


@pytest.mark.parametrize("loss", ["kl", "margin_mse"])
def test_distillation_loss_equals_its_definition(backend: str, loss: str) -> None:
    leaves = [random((32, 32, 128), torch.bfloat16, 0), random((32, 8, 180, 128), torch.bfloat16, 1)]
    teacher = torch.randn((32, 8), device="cuda")
    one = torch.ones((), device="cuda")

    def plain(queries: torch.Tensor, documents: torch.Tensor) -> torch.Tensor:
        scores = torch.cat([definition(queries[row : row + 1], documents[row]) for row in range(32)])
        wish = teacher.to(scores.dtype)
        if loss == "kl":
            divergence = torch.nn.functional.kl_div
            return divergence(scores.log_softmax(-1), wish.softmax(-1), reduction="batchmean")
        return ((scores[:, :1] - scores[:, 1:]) - (wish[:, :1] - wish[:, 1:])).square().mean()

    def fused(queries: torch.Tensor, documents: torch.Tensor) -> torch.Tensor:
        return jmlr_kernels.maxsim_distillation_loss(queries, documents, teacher, loss=loss, backend=backend)

    exact, low = results(plain, in_float64(leaves), one), results(plain, leaves, one)
    for name, *triple in zip(("loss", "dq", "dd"), results(fused, leaves, one), low, exact, strict=True):
        assert_as_exact_as_torch(name, *triple)


def test_one_query_and_many_documents_split_the_gradient(backend: str) -> None:
    leaves = [random((1, 32, 128), torch.bfloat16, 0), random((3000, 80, 128), torch.bfloat16, 1)]
    grad = torch.randn((1, 3000), device="cuda")
    exact, low = results(definition, in_float64(leaves), grad), results(definition, leaves, grad)
    actual = results(lambda q, d: jmlr_kernels.maxsim(q, d, backend=backend), leaves, grad)
    for name, *triple in zip(("scores", "dq", "dd"), actual, low, exact, strict=True):
        assert_as_exact_as_torch(name, *triple)


def test_remembered_launches_tell_shapes_apart(backend: str) -> None:
    """Every second call of a kernel takes the short path; strides, alignment and dtypes must not be mixed up."""
    for _ in range(2):
        for dtype in (torch.bfloat16, torch.float16):
            for length in (33, 48, 64):
                wide = integers((20, length, 136), dtype, 1)
                for documents in (wide[..., :128], wide[..., 8:], wide[..., 1:129], wide[:, :, :128].contiguous()):
                    queries = integers((5, 32, 128), dtype, 0)
                    scores = jmlr_kernels.maxsim(queries, documents, backend=backend)
                    assert torch.equal(scores, definition(queries.double(), documents.double()).float())

"""The fused losses: values and gradients against plain losses on the definition's scores, in float64 and in kernels."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from maxsim_cases import BACKENDS, make_case
from oracles import assert_as_exact_as_torch
from torch import Tensor
from torch.nn.functional import cross_entropy, kl_div, mse_loss
from torch.utils._python_dispatch import TorchDispatchMode

from jmlr_kernels import maxsim_contrastive_loss, maxsim_distillation_loss
from jmlr_kernels.maxsim import torch_chunked
from jmlr_kernels.maxsim.losses import _losses
from jmlr_kernels.maxsim.reference import maxsim_reference
from jmlr_kernels.maxsim.torch_losses import loss_rows

hypothesis = pytest.importorskip("hypothesis")
strategies = hypothesis.strategies

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
LABELS = [2, 0, 3]


def plain_contrastive(
    queries: Tensor,
    documents: Tensor,
    weights: Tensor | None,
    temperature: Tensor,
    negatives: Tensor | None,
    labels: Tensor,
    reduction: str,
    **options: Any,
) -> Tensor:
    scores, _ = maxsim_reference(queries, documents, query_weights=weights, **options)
    if negatives is not None:
        mask = {"query_mask": options.get("query_mask"), "normalize": options.get("normalize", False)}
        more, _ = maxsim_reference(queries, negatives, query_weights=weights, candidates=True, **mask)
        scores = torch.cat([scores, more], dim=1)
    return cross_entropy(scores / temperature, labels, reduction=reduction)


def plain_distillation(
    queries: Tensor,
    documents: Tensor,
    weights: Tensor | None,
    temperature: Tensor,
    teacher: Tensor,
    loss: str,
    teacher_temperature: float,
    **options: Any,
) -> Tensor:
    scores, _ = maxsim_reference(queries, documents, query_weights=weights, candidates=True, **options)
    if loss == "kl":
        target = (teacher / teacher_temperature).softmax(-1)
        return kl_div((scores / temperature).log_softmax(-1), target, reduction="batchmean")
    return mse_loss(scores[:, :1] - scores[:, 1:], teacher[:, :1] - teacher[:, 1:])


def differentiated(function: Any, leaves: list[Tensor | None]) -> list[Tensor]:
    fresh = [None if leaf is None else leaf.detach().clone().requires_grad_() for leaf in leaves]
    value = function(*fresh)
    value.sum().backward()
    return [value.detach()] + [leaf.grad for leaf in fresh if leaf is not None]


def compared(found: list[Tensor], expected: list[Tensor], **tolerance: float) -> None:
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, **tolerance)


@hypothesis.settings(max_examples=25, deadline=None, derandomize=True)
@hypothesis.given(
    query_count=strategies.integers(1, 4),
    extra=strategies.integers(0, 3),
    query_length=strategies.integers(1, 5),
    document_length=strategies.integers(1, 20),
    dimension=strategies.integers(1, 6),
    packed=strategies.booleans(),
    masked=strategies.booleans(),
    weighted=strategies.booleans(),
    normalize=strategies.booleans(),
    negatives=strategies.integers(0, 3),
    reduction=strategies.sampled_from(["mean", "sum", "none"]),
    seed=strategies.integers(0, 2**16),
)
def test_contrastive_matches_cross_entropy(
    query_count: int, extra: int, negatives: int, normalize: bool, reduction: str, seed: int, **sizes: Any
) -> None:
    case = make_case(query_count=query_count, documents=query_count + extra, seed=seed, **sizes)
    draw = torch.Generator().manual_seed(seed)
    own = torch.randn(query_count, negatives, 7, sizes["dimension"], generator=draw, dtype=torch.float64)
    labels = torch.randint(0, query_count + extra, (query_count,), generator=draw)
    options = {**case.options, "normalize": normalize}
    leaves = [
        case.queries, case.documents, case.query_weights, torch.tensor(0.7, dtype=torch.float64),
        own if negatives else None,
    ]  # fmt: skip

    def fused(q: Tensor, d: Tensor, w: Tensor | None, t: Tensor, n: Tensor | None) -> Tensor:
        return maxsim_contrastive_loss(
            q, d, labels, temperature=t, negatives=n, query_weights=w, reduction=reduction, **options
        )

    def plain(q: Tensor, d: Tensor, w: Tensor | None, t: Tensor, n: Tensor | None) -> Tensor:
        return plain_contrastive(q, d, w, t, n, labels, reduction, **options)

    compared(differentiated(fused, leaves), differentiated(plain, leaves))


@pytest.mark.parametrize("loss", ["kl", "margin_mse"])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("masked", [False, True])
def test_distillation_matches_its_definition(loss: str, packed: bool, normalize: bool, masked: bool) -> None:
    case = make_case(candidates=True, packed=packed, masked=masked, weighted=masked, seed=9)
    teacher = torch.randn(3, 4, dtype=torch.float64) * 3
    options = {**case.options, "normalize": normalize}
    leaves = [case.queries, case.documents, case.query_weights, torch.tensor(0.7, dtype=torch.float64)]

    def fused(q: Tensor, d: Tensor, w: Tensor | None, t: Tensor) -> Tensor:
        return maxsim_distillation_loss(
            q, d, teacher, loss=loss, temperature=t, teacher_temperature=1.3, query_weights=w, **options
        )

    def plain(q: Tensor, d: Tensor, w: Tensor | None, t: Tensor) -> Tensor:
        return plain_distillation(q, d, w, t, teacher, loss, 1.3, **options) + 0 * t

    compared(differentiated(fused, leaves), differentiated(plain, leaves))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("kind", ["contrastive", "negatives", "kl", "margin_mse"])
@pytest.mark.parametrize("backend", BACKENDS[1:])
def test_kernels_match_float64(backend: str, kind: str, dtype: torch.dtype) -> None:
    """Every rule of the kernels, with masks, holes, weights and normalisation, by the tolerance rule.

    The tensors are small, and plain torch may err by next to nothing out of luck: several cases are judged together.
    """
    cases = [_against_float64(backend, kind, dtype, seed) for seed in range(3, 7)]
    for position, found in enumerate(zip(*cases, strict=True)):
        if position == 4:  # d(temperature) of a few cases says nothing: test_row_statistics_match_float64 has many
            continue
        together = [torch.cat([value.flatten() for value in column]) for column in zip(*found, strict=True)]
        assert_as_exact_as_torch(f"{kind} {position}", *together)


def _against_float64(backend: str, kind: str, dtype: torch.dtype, seed: int) -> list[list[Tensor]]:
    """(found, plain torch in the same precision, exact) of the loss and every gradient."""
    candidates = kind in ("kl", "margin_mse")
    case = make_case(candidates=candidates, masked=True, weighted=True, document_length=12, dimension=16, seed=seed).to(
        dtype
    )
    draw = torch.Generator().manual_seed(seed)
    own = torch.randn(3, 2, 9, 16, generator=draw, dtype=torch.float64).to(dtype) if kind == "negatives" else None
    teacher = torch.randn(3, 4, generator=draw, dtype=torch.float64) * 3
    labels = torch.tensor(LABELS)
    wide = torch.float32
    leaves = [case.queries, case.documents, case.query_weights, torch.tensor(0.7, dtype=wide), own]
    options = {**case.options, "normalize": True}
    moved = {name: value.to(DEVICE) if isinstance(value, Tensor) else value for name, value in options.items()}

    def fused(q: Tensor, d: Tensor, w: Tensor, t: Tensor, n: Tensor | None) -> Tensor:
        common = {"temperature": t, "query_weights": w, "backend": backend, **moved}
        if candidates:
            return maxsim_distillation_loss(q, d, teacher.float().to(DEVICE), loss=kind, **common)
        return maxsim_contrastive_loss(q, d, labels.to(DEVICE), negatives=n, **common)

    def plain(q: Tensor, d: Tensor, w: Tensor, t: Tensor, n: Tensor | None) -> Tensor:
        if candidates:
            return plain_distillation(q, d, w, t, teacher.to(q.dtype), kind, 1.0, **options) + 0 * t
        return plain_contrastive(q, d, w, t, n, labels, "mean", **options)

    present = [leaf for leaf in leaves if leaf is not None]
    exact = differentiated(plain, [None if leaf is None else leaf.double() for leaf in leaves])
    low = differentiated(plain, leaves)
    found = differentiated(fused, [None if leaf is None else leaf.to(DEVICE) for leaf in leaves])
    dtypes = [wide, *(leaf.dtype for leaf in present)]
    return [
        [one.cpu(), other.to(dtype), right] for one, other, right, dtype in zip(found, low, exact, dtypes, strict=True)
    ]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", ["labels", "teacher", "margins"])
def test_row_statistics_match_float64(kind: str, backend: str) -> None:
    """Loss and d(temperature) of a hundred rows, and the probabilities that the backward pass makes of a row."""
    draw = torch.Generator().manual_seed(1)
    scores = 10 * torch.randn(100, 40, generator=draw, dtype=torch.float64)
    teacher = 5 * torch.randn(100, 40, generator=draw, dtype=torch.float64)
    labels = torch.randint(0, 40, (100,), generator=draw)

    def plain(dtype: torch.dtype) -> list[Tensor]:
        s = scores.float().to(dtype)
        t = torch.full((100, 1), 0.7, dtype=dtype, requires_grad=True)
        if kind == "margins":
            wish = teacher.float().to(dtype)
            margins = (s[:, :1] - s[:, 1:]) - (wish[:, :1] - wish[:, 1:])
            return [margins.square().mean(1)]
        if kind == "labels":
            loss = cross_entropy(s / t, labels, reduction="none")
        else:
            target = (teacher.float().to(dtype) / 1.3).softmax(-1)
            loss = kl_div((s / t).log_softmax(-1), target, reduction="none").sum(1)
        loss.sum().backward()
        return [loss.detach(), t.grad.squeeze(1), (s / 0.7).softmax(-1)]

    target = (labels if kind == "labels" else teacher.float()).to(DEVICE)
    temperatures = torch.tensor([0.7, 1.3], device=DEVICE)
    rows = torch.ops.jmlr_kernels.maxsim_loss_rows(scores.float().to(DEVICE), target, temperatures, kind, backend)
    loss, slope = _losses(rows, kind, temperatures, 40)
    top, mass = rows[:, :1], rows[:, 1:2]
    chance = torch.exp((scores.float().to(DEVICE) - top) / 0.7 - mass)
    found = [loss, slope, chance][: 1 if kind == "margins" else 3]
    names = ["loss", "d(temperature)", "probability"][: len(found)]
    for name, *triple in zip(names, found, plain(torch.float32), plain(torch.float64), strict=True):
        assert_as_exact_as_torch(f"{kind} {name}", *(value.cpu() for value in triple))


@pytest.mark.parametrize("backend", BACKENDS)
def test_row_statistics_of_infinities_and_nan(backend: str) -> None:
    """Rows longer than a block: -inf has no share wherever it stands, NaN and a label of no document are loud."""
    draw = torch.Generator().manual_seed(2)
    scores, teacher = (torch.randn(4, 700, generator=draw) for _ in range(2))
    scores[0, :300], scores[1, 650] = -torch.inf, 30
    teacher[0, 256:512], teacher[2, 0] = -torch.inf, -torch.inf
    temperatures = torch.tensor([0.7, 1.3])
    labels = torch.tensor([699, 0, -1, 700])

    def rows(kind: str, target: Tensor | None, scores: Tensor = scores) -> tuple[Tensor, Tensor]:
        moved = None if target is None else target.to(DEVICE)
        found = torch.ops.jmlr_kernels.maxsim_loss_rows(
            scores.to(DEVICE), moved, temperatures.to(DEVICE), kind, backend
        )
        exact = target.double() if target is not None and target.is_floating_point() else target
        return found.cpu(), loss_rows(scores.double(), exact, temperatures.double(), kind)

    found, exact = rows("labels", labels)
    assert found[2:, 1].isnan().all()
    torch.testing.assert_close(found[:, :2], exact[:, :2].float(), equal_nan=True)
    torch.testing.assert_close(found[:2, 2], exact[:2, 2].float())
    torch.testing.assert_close(found[1:, 4], exact[1:, 4].float(), equal_nan=True)
    found, exact = rows("labels", None)
    torch.testing.assert_close(found[:, :4], exact[:, :4].float())
    found, exact = rows("teacher", teacher, scores.clamp(min=-50))
    torch.testing.assert_close(found, exact.float())
    found, exact = rows("margins", teacher.clamp(min=-9), scores.clamp(min=-9))
    torch.testing.assert_close(found, exact.float())
    for position in (0, 699):
        broken = scores.clone()
        broken[1, position] = torch.nan
        found, _ = rows("labels", None, broken)
        assert found[1, 1].isnan() and found[[0, 2, 3], 1].isfinite().all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_label_offset_is_a_rank(backend: str) -> None:
    """Two ranks' queries against all gathered documents: each rank's loss is its part of the whole."""
    case = make_case(query_count=4, documents=4).to(torch.float32)
    queries, documents = case.queries.to(DEVICE), case.documents.to(DEVICE)
    whole = maxsim_contrastive_loss(queries, documents, reduction="none", backend=backend)
    for rank in (0, 1):
        mine = slice(2 * rank, 2 * rank + 2)
        part = maxsim_contrastive_loss(
            queries[mine], documents, label_offset=2 * rank, reduction="none", backend=backend
        )
        torch.testing.assert_close(part, whole[mine])


@pytest.mark.parametrize("backend", BACKENDS)
def test_teacher_rules_a_candidate_out(backend: str) -> None:
    case = make_case(candidates=True, query_count=2).to(torch.float32)
    leaves = [case.queries.to(DEVICE), case.documents.to(DEVICE)]
    teacher = torch.tensor([[1.0, float("-inf"), 0.0, 2.0]] * 2, device=DEVICE)

    def fused(queries: Tensor, documents: Tensor) -> Tensor:
        return maxsim_distillation_loss(queries, documents, teacher, backend=backend)

    found = differentiated(fused, leaves)
    assert all(value.isfinite().all() for value in found)
    scores, _ = maxsim_reference(*(leaf.cpu().double() for leaf in leaves), candidates=True)
    target = teacher.cpu().double().softmax(-1)
    expected = (target * (torch.where(target > 0, target.log(), 0) - scores.log_softmax(-1))).sum(-1).mean()
    torch.testing.assert_close(found[0].cpu().double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_many_documents_take_several_blocks(backend: str) -> None:
    """More documents than one pass over a row holds, with a score far above those before it."""
    queries = torch.randn(2, 1, 16, device=DEVICE)
    documents = torch.randn(600, 1, 16, device=DEVICE)
    documents[599] = 10 * queries[0]
    labels = torch.tensor([599, 3], device=DEVICE)
    found = maxsim_contrastive_loss(queries, documents, labels, reduction="none", backend=backend)
    scores = queries[:, 0].double() @ documents[:, 0].double().T
    torch.testing.assert_close(found.double(), cross_entropy(scores, labels, reduction="none"), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_teacher_rules_out_a_whole_block_of_a_lane(backend: str) -> None:
    """-inf first, a finite score one block later, in the same lane."""
    draw = torch.Generator().manual_seed(0)
    scores, teacher = (torch.randn(2, 600, generator=draw) for _ in range(2))
    teacher[:, :300] = float("-inf")
    temperatures = torch.tensor([0.7, 1.3])
    moved = [tensor.to(DEVICE) for tensor in (scores, teacher, temperatures)]
    rows = torch.ops.jmlr_kernels.maxsim_loss_rows(*moved, "teacher", backend)
    found, _ = _losses(rows, "teacher", moved[2], 600)
    target = (teacher.double() / 1.3).softmax(-1)
    expected = kl_div((scores.double() / 0.7).log_softmax(-1), target, reduction="none").nansum(1)
    torch.testing.assert_close(found.cpu().double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("label", [-100, -1, 4, 10**12])
def test_label_of_no_document_is_loud(backend: str, label: int) -> None:
    """Labels are not looked at on a GPU: the query's loss and every probability made of its row are NaN."""
    labels = torch.tensor([1, label, 3], device=DEVICE)
    temperatures = torch.ones(2, device=DEVICE)
    rows = torch.ops.jmlr_kernels.maxsim_loss_rows(torch.randn(3, 4, device=DEVICE), labels, temperatures, "labels",
                                                   backend)  # fmt: skip
    loss, _ = _losses(rows, "labels", temperatures, 4)
    assert loss.isnan().tolist() == [False, True, False]
    assert rows[:, 1].isnan().tolist() == [False, True, False]


def test_gradients_in_slices_of_documents(monkeypatch: pytest.MonkeyPatch) -> None:
    """The labels' and the margins' positives are named by their place among all documents, not in a slice of them."""
    case = make_case(query_count=4, documents=9)
    more = make_case(query_count=4, documents=9, candidates=True)
    teacher = torch.randn(4, 9, dtype=torch.float64)

    def losses(queries: Tensor, documents: Tensor, own: Tensor) -> Tensor:
        labels = torch.tensor([8, 0, 4, 3])
        margins = maxsim_distillation_loss(queries, own, teacher, loss="margin_mse")
        return maxsim_contrastive_loss(queries, documents, labels, normalize=True) + margins

    leaves: list[Tensor | None] = [case.queries, case.documents, more.documents]
    whole = differentiated(losses, leaves)
    monkeypatch.setattr(torch_chunked, "_BACKWARD_ENTRIES", 45)
    compared(differentiated(losses, leaves), whole)


@pytest.mark.parametrize("backend", BACKENDS)
def test_bitwise_repeatable(backend: str) -> None:
    case = make_case(query_count=4, documents=4, masked=True, weighted=True).to(torch.float32)
    leaves = [tensor.to(DEVICE) for tensor in (case.queries, case.documents, case.query_weights)]
    options = {name: value.to(DEVICE) for name, value in case.options.items()}

    def fused(queries: Tensor, documents: Tensor, weights: Tensor) -> Tensor:
        return maxsim_contrastive_loss(queries, documents, query_weights=weights, backend=backend, **options)

    torch.use_deterministic_algorithms(True)
    try:
        first, second = differentiated(fused, leaves), differentiated(fused, leaves)
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(one, other) for one, other in zip(first, second, strict=True))


def test_gradient_of_the_scores_is_never_stored() -> None:
    """Of [Nq, Nd] tensors, forward makes one that is kept (the scores) and backward none that has its size."""
    sizes: list[torch.Size] = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            out = function(*args, **(kwargs or {}))
            sizes.extend(t.shape for t in (out if isinstance(out, (tuple, list)) else [out]) if isinstance(t, Tensor))
            return out

    queries = torch.randn(11, 3, 16, requires_grad=True)
    documents = torch.randn(13, 5, 16, requires_grad=True)
    loss = maxsim_contrastive_loss(queries, documents, backend="triton")
    with Watch():
        loss.backward()
    assert sizes and not any(size.numel() >= 11 * 13 and size[:2] == (11, 13) for size in sizes)
    assert not any(size.numel() == 11 * 13 for size in sizes)


@pytest.mark.parametrize("backend", ["auto", "triton"])
@pytest.mark.parametrize("negatives", [False, True])
def test_compile_without_graph_breaks(negatives: bool, backend: str) -> None:
    torch.compiler.reset()
    case = make_case(query_count=4, documents=4, masked=True, weighted=True).to(torch.float32)
    own = torch.randn(4, 2, 6, 20) if negatives else None
    leaves = [case.queries, case.documents, case.query_weights, torch.tensor(0.5), own]

    def loss(q: Tensor, d: Tensor, w: Tensor, t: Tensor, n: Tensor | None) -> Tensor:
        return maxsim_contrastive_loss(
            q, d, temperature=t, query_weights=w, negatives=n, backend=backend, **case.options
        )

    compared(
        differentiated(torch.compile(loss, fullgraph=True, backend="aot_eager"), leaves), differentiated(loss, leaves)
    )


@pytest.mark.parametrize("rule", ["labels", "teacher", "margins"])
def test_opcheck(rule: str) -> None:
    scores = torch.randn(3, 5)
    target = torch.tensor([0, 4, 2]) if rule == "labels" else torch.randn(3, 5)
    operation = torch.ops.jmlr_kernels.maxsim_loss_rows.default
    torch.library.opcheck(operation, (scores, target, torch.ones(2), rule, "torch"))
    if rule == "labels":
        torch.library.opcheck(operation, (scores, None, torch.ones(2), rule, "torch"))


BAD = {
    "labels must be int64": {"labels": torch.zeros(3)},
    "labels run from 0 to 9": {"labels": torch.tensor([0, 9, 1])},
    "need documents 2 to 4": {"label_offset": 2},
    "reduction='avg'": {"reduction": "avg"},
    "temperature must be positive": {"temperature": 0.0},
    "temperature must have one element": {"temperature": torch.ones(2)},
    "negative_mask came without": {"negative_mask": torch.ones(3, 2, 4, dtype=torch.bool)},
    "at least one document": {"negatives": torch.zeros(3, 0, 4, 20)},
}


@pytest.mark.parametrize("sentence", BAD)
def test_bad_contrastive_arguments_get_one_sentence(sentence: str) -> None:
    case = make_case().to(torch.float32)
    with pytest.raises(ValueError, match=sentence):
        maxsim_contrastive_loss(case.queries, case.documents, **BAD[sentence])


def test_bad_distillation_arguments_get_one_sentence() -> None:
    case = make_case(candidates=True).to(torch.float32)
    teacher = torch.randn(3, 4)
    with pytest.raises(ValueError, match="teacher_scores must be \\[Nq, K\\]"):
        maxsim_distillation_loss(case.queries, case.documents, teacher[:, :2])
    with pytest.raises(TypeError, match="teacher_scores must be floating"):
        maxsim_distillation_loss(case.queries, case.documents, teacher.long())
    with pytest.raises(ValueError, match="loss='mse'"):
        maxsim_distillation_loss(case.queries, case.documents, teacher, loss="mse")
    with pytest.raises(ValueError, match="call .detach"):
        maxsim_distillation_loss(case.queries, case.documents, teacher.requires_grad_())
    with pytest.raises(ValueError, match="too few for margin_mse"):
        maxsim_distillation_loss(case.queries, case.documents[:, :1], torch.randn(3, 1), loss="margin_mse")

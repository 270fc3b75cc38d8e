"""The benchmark's own oracle, baselines, data and counts, each against something simpler."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from benchmarks import baselines, maxsim, maxsim_smooth, oracle
from benchmarks.candidate import FORWARD, STEP, Candidate
from benchmarks.maxsim_cases import DRY_CASES, GPU_CASES, MaxSimCase
from benchmarks.prepare import compare, prepare, results_of, steps_of

CPU = torch.device("cpu")
LAYOUTS = ("in-batch", "candidates", "packed")


def case_of(layout: str, **fields: object) -> MaxSimCase:
    return replace(MaxSimCase(3, 5, 4, 9, backward=True, dim=8, layout=layout, shortest=1), **fields)  # type: ignore[arg-type]


def definition(case: MaxSimCase, queries: torch.Tensor, documents: torch.Tensor) -> torch.Tensor:
    """Scores one (query, document) pair at a time; `max` gives a tie's gradient to one token."""
    if case.layout == "packed":
        texts = documents.split(case.lengths())
    scores = []
    for row, query in enumerate(queries):
        own = documents[row] if case.layout == "candidates" else texts if case.layout == "packed" else documents
        scores.append(torch.stack([(query @ text.T).max(-1).values.sum() for text in own]))
    return torch.stack(scores)


@pytest.mark.parametrize("block_bytes", [1, 2**30])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_oracle_is_the_definition(layout: str, block_bytes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(oracle, "BLOCK_BYTES", block_bytes)
    case = case_of(layout)
    queries, documents, grad = case.inputs(CPU, torch.float64)
    scores = definition(case, queries, documents)
    right = [scores, *torch.autograd.grad(scores, (queries, documents), grad.double())]
    for got, exact in zip(maxsim.exact(case, [queries, documents], grad), right, strict=True):
        torch.testing.assert_close(got, exact)


def test_oracle_gives_ties_to_the_lowest_index() -> None:
    queries, documents, grad = torch.ones(1, 1, 2), torch.ones(1, 3, 2), torch.ones(1, 1)
    _, _, grad_documents = oracle.maxsim(queries, documents, grad, [3], "in-batch")
    assert grad_documents.tolist() == [[[1.0, 1.0], [0.0, 0.0], [0.0, 0.0]]]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_candidate_computes_the_same(layout: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In float32, where no baseline needs the wider bound; chunk-and-recompute in several chunks."""
    monkeypatch.setattr(baselines, "CHUNK_BYTES", 2 * 4 * 3 * 4 * 9)
    case = case_of(layout)
    records, ready = prepare(
        maxsim, case, maxsim.candidates(case, CPU, 0), CPU, torch.float32, [FORWARD, STEP], float("inf")
    )
    assert set(ready[STEP]) == {"jmlr", "torch", "gemm", "einsum", "einsum-input-dtype", "recompute"}
    for name, record in records.items():
        assert "problem" not in record and max(record["error"].values()) < 1e-6, (name, record)
    assert records["jmlr"]["second_data_error"] < 1e-6 and "second_data_error" not in records["gemm"]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_candidate_of_smooth_maxsim_computes_the_same(layout: str) -> None:
    case = maxsim_smooth.MaxSimSmoothCase(3, 5, 4, 9, backward=True, dim=8, layout=layout, shortest=1)
    candidates = maxsim_smooth.candidates(case, CPU, 0)
    records, ready = prepare(maxsim_smooth, case, candidates, CPU, torch.float32, [FORWARD, STEP], float("inf"))
    assert set(ready[STEP]) == {"jmlr", "torch", "einsum"} and case.name.startswith("smooth 3 x")
    for name, record in records.items():
        assert "problem" not in record and max(record["error"].values()) < 1e-5, (name, record)


def test_recompute_holds_one_chunk_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []
    real = baselines.gemm
    monkeypatch.setattr(baselines, "CHUNK_BYTES", 2 * 4 * 3 * 4 * 9)  # two documents' similarities in float32
    monkeypatch.setattr(baselines, "gemm", lambda q, d, mask=None: (sizes.append(d.shape[0]), real(q, d, mask))[1])
    queries, documents, grad = case_of("in-batch").inputs(CPU, torch.float32)
    torch.autograd.grad(baselines.recompute(queries, documents), (queries, documents), grad)
    assert sizes[:3] == [2, 2, 1] and sorted(sizes[3:]) == [1, 2, 2]  # the backward computes them again


def test_a_candidate_that_is_wrong_on_the_second_data_alone_is_not_timed() -> None:
    case = case_of("in-batch")
    first = case.inputs(CPU, torch.float32)[0]

    def wrong(queries: torch.Tensor, documents: torch.Tensor) -> torch.Tensor:
        same = torch.equal(queries, first)
        return baselines.einsum(queries, documents) * (1.0 if same else 1.01)

    found = {"jmlr": Candidate(lambda: wrong), "gemm": Candidate(lambda: wrong)}
    records, ready = prepare(maxsim, case, found, CPU, torch.float32, [FORWARD, STEP], float("inf"))
    assert "clustered" in records["jmlr"]["problem"] and set(ready[STEP]) == set(ready[FORWARD]) == {"gemm"}


def test_forward_gets_tensors_that_ask_for_no_gradient() -> None:
    seen: list[bool] = []

    def function(queries: torch.Tensor, documents: torch.Tensor) -> torch.Tensor:
        seen.append(queries.requires_grad)
        return baselines.einsum(queries, documents)

    *tensors, grad = case_of("in-batch").inputs(CPU, torch.float32)
    steps = steps_of(function, tensors, grad)
    steps[FORWARD](), steps[STEP]()
    assert seen == [False, True]


def test_padded_gradients_come_back_packed() -> None:
    case = case_of("packed")
    *tensors, grad = case.inputs(CPU, torch.float32)
    candidate = maxsim.candidates(case, CPU, 0)["gemm"]
    own = [tensors[0], case.padded(tensors[1])]
    results = results_of(steps_of(candidate.make(), own, grad)[STEP], case, candidate)
    assert results[2].shape == tensors[1].shape and own[1].shape == (5, 9, 8)


def test_rounded_similarities_loosen_gradients_alone() -> None:
    exact = [torch.ones(4, 4), torch.ones(4, 4)]
    rounds = Candidate(lambda: baselines.gemm, rounds=True)
    off = [torch.ones(4, 4), torch.full((4, 4), 1.5)]
    assert compare(off, exact, rounds, torch.bfloat16, "step") == 0.5
    for wrong in (off[::-1], [exact[0], torch.full((4, 4), 2.0)], [exact[0], torch.full((4, 4), float("nan"))]):
        with pytest.raises(ArithmeticError, match="off by"):
            compare(wrong, exact, rounds, torch.bfloat16, "step")
    for candidate, dtype in ((rounds, torch.float32), (Candidate(lambda: baselines.gemm), torch.bfloat16)):
        with pytest.raises(ArithmeticError, match="off by"):
            compare(off, exact, candidate, dtype, "step")


def _share_of_the_busiest(case: MaxSimCase) -> float:
    """Share of a document's winners that its busiest 5 % of tokens take, over all documents."""
    queries, documents, _ = case.inputs(CPU, torch.float32)
    winners = torch.einsum("qld,nmd->nqlm", queries, documents).argmax(-1).flatten(1)
    counts = torch.zeros(documents.shape[:2]).scatter_add_(1, winners, torch.ones_like(winners, dtype=torch.float32))
    top = counts.sort(descending=True).values[:, : case.document_length // 20].sum(1)
    return float((top / counts.sum(1)).mean())


def test_clustered_winners_concentrate() -> None:
    case = MaxSimCase(32, 32, 32, 200, backward=True)
    random, clustered = _share_of_the_busiest(case), _share_of_the_busiest(replace(case, data="clustered"))
    assert random < 0.15 and clustered > 3 * random, (random, clustered)


def test_data_is_unit_and_repeats_itself() -> None:
    for data in ("random", "clustered"):
        case = case_of("in-batch", data=data)
        one, other = (case.inputs(CPU, torch.float32) for _ in range(2))
        assert all(torch.equal(*pair) for pair in zip(one, other, strict=True))
        torch.testing.assert_close(one[1].norm(dim=-1), torch.ones(5, 9))
        assert one[2].std() > 0.1  # upstream gradients differ


def test_cases_with_bars_come_first_and_names_differ() -> None:
    bars = [case.bar is not None for case in GPU_CASES]
    assert bars == sorted(bars, reverse=True) and sum(bars) == 9
    for cases in (GPU_CASES, DRY_CASES):
        assert len({case.name for case in cases}) == len(cases)
        assert {case.layout for case in cases} == set(LAYOUTS) and "clustered" in {case.data for case in cases}
    assert any(case.data == "clustered" and case.backward for case in GPU_CASES)


def test_memory_bar_is_gradients_winners_and_scores() -> None:
    """B = 256, Ld = 300: two bytes hold a winner; gradients are as large as the inputs."""
    case = MaxSimCase(256, 256, 32, 300, backward=True)
    scores, winners, inputs = 4 * 256 * 256, 2 * 256 * 256 * 32, 2 * 128 * (256 * 32 + 256 * 300)
    assert case.memory_bar(STEP, 2) == scores + winners + inputs and case.memory_bar(FORWARD, 2) == scores
    assert replace(case, document_length=256).work(2).winners_bytes == 256 * 256 * 32

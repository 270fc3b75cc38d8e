"""The LLM-Rank objective against its definition, written out in loops."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from jmlr.objective import rank_loss, sample_documents, scale_scores


def test_scaled_scores_span_minus_one_to_one() -> None:
    scaled = scale_scores(torch.tensor([[3.0, 5.0, 4.0], [-1.0, -3.0, -2.5]]))
    torch.testing.assert_close(scaled, torch.tensor([[-1.0, 1.0, 0.0], [1.0, -1.0, -0.5]]))


def test_tied_scores_are_all_zero_with_zero_gradient() -> None:
    scores = torch.full((1, 4), 2.5, requires_grad=True)
    scaled = scale_scores(scores)
    assert scaled.tolist() == [[0.0] * 4]
    scaled.sum().backward()
    assert scores.grad is not None and scores.grad.tolist() == [[0.0] * 4]


def test_missing_candidates_neither_count_nor_get_gradient() -> None:
    scores = torch.tensor([[1.0, 3.0, 100.0], [7.0, 0.0, 0.0]], requires_grad=True)
    mask = torch.tensor([[True, True, False], [False, False, False]])
    scaled = scale_scores(scores, mask)
    assert scaled.tolist() == [[-1.0, 1.0, 0.0], [0.0, 0.0, 0.0]]
    (scaled**2).sum().backward()
    assert torch.isfinite(scores.grad).all() and scores.grad[0, 2] == 0 and (scores.grad[1] == 0).all()


def test_gradient_flows_through_minimum_and_maximum() -> None:
    scores = torch.tensor([[1.0, 2.0, 4.0]], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(scale_scores, (scores,))


@settings(max_examples=60, deadline=None)
@given(
    n=st.integers(1, 7),
    margin=st.sampled_from([0.0, 0.3]),
    seed=st.integers(0, 10_000),
    ties=st.booleans(),
)
def test_rank_loss_is_the_mean_over_pairs(n: int, margin: float, seed: int, ties: bool) -> None:
    generator = torch.Generator().manual_seed(seed)
    scaled = torch.rand(3, n, generator=generator, dtype=torch.float64) * 2 - 1
    losses = torch.rand(3, n, generator=generator, dtype=torch.float64)
    if ties:
        losses = (losses * 3).round() / 3
    mask = torch.rand(3, n, generator=generator) > 0.2
    expected = []
    for row in range(3):
        for a in range(n):
            for b in range(a + 1, n):
                gap = float(losses[row, b] - losses[row, a])
                if not (mask[row, a] and mask[row, b]) or abs(gap) <= margin:
                    continue
                p = 1 / (1 + math.exp(-float(scaled[row, a] - scaled[row, b])))
                expected.append(-math.log(p if gap > 0 else 1 - p))
    loss, pairs = rank_loss(scaled, losses, margin=margin, mask=mask)
    assert pairs == len(expected)
    assert float(loss) == pytest.approx(sum(expected) / len(expected) if expected else 0.0)


def test_the_better_document_rises() -> None:
    scaled = torch.zeros(1, 2, requires_grad=True)
    loss, pairs = rank_loss(scaled, torch.tensor([[0.1, 2.0]]))  # the first lowers the language model's loss
    loss.backward()
    assert pairs == 1 and scaled.grad[0, 0] < 0 < scaled.grad[0, 1]


def test_no_pair_gives_a_differentiable_zero() -> None:
    scaled = torch.rand(2, 3, requires_grad=True)
    loss, pairs = rank_loss(scaled, torch.ones(2, 3))
    loss.backward()
    assert pairs == 0 and float(loss) == 0.0 and (scaled.grad == 0).all()


def test_losses_are_constants() -> None:
    scaled = torch.rand(1, 3, requires_grad=True)
    losses = torch.rand(1, 3, requires_grad=True)
    rank_loss(scaled, losses)[0].backward()
    assert losses.grad is None


def test_sampling_is_without_replacement_and_repeatable() -> None:
    scaled = torch.rand(50, 8) * 2 - 1
    drawn = sample_documents(scaled, 5, torch.Generator().manual_seed(3))
    assert all(len(set(row)) == 5 for row in drawn.tolist())
    again = sample_documents(scaled, 5, torch.Generator().manual_seed(3))
    assert torch.equal(drawn, again)


def test_sampling_follows_the_softmax() -> None:
    scaled = torch.tensor([[1.0, 0.0, -1.0]]).expand(20_000, 3)
    drawn = sample_documents(scaled, 2, torch.Generator().manual_seed(0))
    p = torch.softmax(scaled[0].double(), 0)
    first = torch.bincount(drawn[:, 0], minlength=3) / len(drawn)
    torch.testing.assert_close(first.double(), p, atol=0.015, rtol=0)
    # Second draw given the first: the rest, renormalised.
    given_zero = drawn[drawn[:, 0] == 0, 1]
    share = (given_zero == 1).double().mean().item()
    assert share == pytest.approx(float(p[1] / (p[1] + p[2])), abs=0.02)


def test_sampling_more_than_there_are() -> None:
    drawn = sample_documents(torch.zeros(2, 3), 10, torch.Generator().manual_seed(0))
    assert sorted(drawn[0].tolist()) == [0, 1, 2]
    masked = sample_documents(
        torch.zeros(1, 4), 3, torch.Generator().manual_seed(0), torch.tensor([[True, False, True, False]])
    )
    assert sorted(masked[0].tolist()) == [-1, 0, 2]

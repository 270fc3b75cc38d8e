"""Row statistics of the fused losses in plain PyTorch; what each column means: losses.py."""

from __future__ import annotations

import torch
from torch import Tensor


def loss_rows(scores: Tensor, target: Tensor | None, temperatures: Tensor, rule: str) -> Tensor:
    """[Nq, 6] from scores [Nq, N] and the rule's target, in the scores' dtype."""
    columns = [scores.new_zeros(scores.shape[0]) for _ in range(6)]
    if rule == "margins":
        assert target is not None
        residual = scores - target
        columns[0], columns[1] = residual[:, 0], residual.sum(1)
        columns[5] = (residual[:, :1] - residual).square().sum(1)
        return torch.stack(columns, dim=1)
    columns[0], columns[1], log_chance = _log_softmax(scores, temperatures[0])
    chance = torch.exp(log_chance)
    if rule == "teacher":
        assert target is not None
        columns[2], columns[3], log_share = _log_softmax(target, temperatures[1])
        share = torch.exp(log_share)
        columns[4] = ((chance - share) * (scores - columns[0][:, None])).sum(1)
        # A document that the teacher rules out (-inf) has no share, whatever it scores.
        columns[5] = torch.where(share > 0, share * (log_share - log_chance), 0).sum(1)
        return torch.stack(columns, dim=1)
    columns[4] = (chance * (scores - columns[0][:, None])).sum(1)
    if target is not None:
        inside = (target >= 0) & (target < scores.shape[1])
        columns[2] = scores.gather(1, torch.where(inside, target, 0)[:, None]).squeeze(1)
        # No such document: loud, not wrong, in the loss and in its gradient.
        columns[1] = torch.where(inside, columns[1], torch.nan)
    return torch.stack(columns, dim=1)


def _log_softmax(scores: Tensor, temperature: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Maximum [Nq], log of the sum of exponentials relative to it [Nq], and log probabilities [Nq, N]."""
    top = scores.amax(1)
    logits = (scores - top[:, None]) / temperature
    mass = logits.logsumexp(1)
    return top, mass, logits - mass[:, None]

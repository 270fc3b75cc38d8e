"""The LLM-Rank objective of JMLR (arXiv 2402.17887) on plain tensors.

One question a row. ``scores`` are MaxSim scores of its candidates, ``losses`` the language model's mean
cross-entropy of the gold answer given each sampled document alone. The gradient reaches the scores only.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional


def scale_scores(scores: Tensor, mask: Tensor | None = None) -> Tensor:
    """Min-max scaling of each row to [-1, 1]: s^ = 2 (s - min) / (max - min) - 1; all zeros where every score ties.

    scores float32 [B, K]; mask bool [B, K], True = a candidate. Other places give 0. The gradient flows through
    minimum and maximum, as in the authors' code.
    """
    if mask is None:
        mask = torch.ones_like(scores, dtype=torch.bool)
    low = scores.masked_fill(~mask, float("inf")).amin(-1, keepdim=True)
    high = scores.masked_fill(~mask, float("-inf")).amax(-1, keepdim=True)
    spread = high - low
    usable = mask & (spread > 0)  # an empty row has spread -inf, a tied row 0
    safe = torch.where(spread > 0, spread, torch.ones_like(spread))
    low = torch.where(usable, low, torch.zeros_like(low))
    return torch.where(usable, 2 * (torch.where(usable, scores, low) - low) / safe - 1, torch.zeros_like(scores))


def sample_documents(scaled: Tensor, count: int, generator: torch.Generator, mask: Tensor | None = None) -> Tensor:
    """Draws `count` candidates a row without replacement from softmax(scaled): int64 [B, min(count, K)].

    -1 stands where a row has fewer candidates than that. Drawn by the Gumbel maximum, which is the same law as
    repeated drawing without replacement, on the CPU, so that a seed gives the same documents on every device.
    """
    logits = scaled.detach().double().cpu()
    uniform = torch.rand(logits.shape, generator=generator, dtype=torch.float64)
    keys = logits - torch.log(-torch.log(uniform.clamp(1e-300, 1 - 1e-16)))
    if mask is not None:
        keys = keys.masked_fill(~mask.cpu(), float("-inf"))
    best = keys.topk(min(count, keys.shape[-1]), dim=-1)
    return torch.where(torch.isinf(best.values), torch.full_like(best.indices, -1), best.indices)


def rank_loss(scaled: Tensor, losses: Tensor, *, margin: float = 0.0, mask: Tensor | None = None) -> tuple[Tensor, int]:
    """RankNet over the sampled documents: mean over pairs a < b of BCE(sigmoid(s^_a - s^_b), [l_b > l_a]).

    scaled float32 [B, n] with gradient, losses [B, n] without; mask bool [B, n]. A pair counts only where the two
    losses differ by more than `margin` nats: ties carry no label, and small differences are noise.

    Returns the loss (a differentiable zero when no pair counts) and the number of pairs.
    """
    n = scaled.shape[-1]
    a, b = torch.triu_indices(n, n, offset=1, device=scaled.device)
    losses = losses.detach()
    gap = losses[:, b] - losses[:, a]
    counts = gap.abs() > margin
    if mask is not None:
        counts &= mask[:, a] & mask[:, b]
    pairs = int(counts.sum())
    if pairs == 0:
        return (scaled * 0.0).sum(), 0
    difference = (scaled[:, a] - scaled[:, b])[counts]
    return functional.binary_cross_entropy_with_logits(difference, (gap > 0)[counts].to(difference.dtype)), pairs

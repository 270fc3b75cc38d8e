"""MaxSim in float64, written apart from the package: what every candidate is compared with before it is timed."""

from __future__ import annotations

import torch
from torch import Tensor

BLOCK_BYTES = 2**30


def maxsim(queries: Tensor, documents: Tensor, grad: Tensor, lengths: list[int], layout: str) -> list[Tensor]:
    """Scores and both gradients in float64, ties to the lowest index: [scores, d(queries), d(documents)].

    `documents` are those of a case: [Nd, Ld, D], [Nq, K, Ld, D] or packed [T, D] with a length for each.
    """
    queries, documents, grad = (tensor.detach().double() for tensor in (queries, documents, grad))
    if layout == "candidates":
        parts = [
            maxsim(
                queries[row : row + 1], documents[row], grad[row : row + 1], lengths[: documents.shape[1]], "in-batch"
            )
            for row in range(queries.shape[0])
        ]
        scores, grad_queries = (torch.cat([part[position] for part in parts]) for position in (0, 1))
        return [scores, grad_queries, torch.stack([part[2] for part in parts])]
    count, longest, dim = len(lengths), max(lengths), documents.shape[-1]
    flat = documents.reshape(-1, dim)
    starts = torch.tensor([0, *lengths[:-1]], device=flat.device).cumsum(0)
    ends = starts + torch.tensor(lengths, device=flat.device)
    rows = queries.reshape(-1, dim)
    block = max(1, BLOCK_BYTES // (8 * rows.shape[0] * max(longest, dim)))
    scores = queries.new_zeros((queries.shape[0], count))
    grad_rows, grad_flat = torch.zeros_like(rows), torch.zeros_like(flat)
    for first in range(0, count, block):
        some = slice(first, min(first + block, count))
        position = starts[some, None] + torch.arange(longest, device=flat.device)
        inside = position < ends[some, None]
        position = position.where(inside, 0)
        similarities = (rows @ flat[position].flatten(0, 1).T).view(rows.shape[0], -1, longest)
        similarities = similarities.where(inside, float("-inf"))
        best, winner = _first_maximum(similarities)
        scores[:, some] = best.view(*queries.shape[:2], -1).sum(1)
        token = position.gather(1, winner.T).T  # [rows, documents of the block]: row of `flat`
        weight = grad[:, some].repeat_interleave(queries.shape[1], dim=0)[..., None]
        grad_rows += (weight * flat[token]).sum(1)
        grad_flat.index_add_(0, token.flatten(), (weight * rows[:, None]).flatten(0, 1))
    return [scores, grad_rows.view_as(queries), grad_flat.view_as(documents)]


def _first_maximum(similarities: Tensor) -> tuple[Tensor, Tensor]:
    """Maximum over the last dimension and the lowest index that reaches it, which `max` promises on no GPU."""
    best = similarities.amax(-1, keepdim=True)
    index = torch.arange(similarities.shape[-1], device=similarities.device)
    winner = torch.where(similarities == best, index, similarities.shape[-1]).amin(-1)
    return best.squeeze(-1), winner.clamp_max(similarities.shape[-1] - 1)

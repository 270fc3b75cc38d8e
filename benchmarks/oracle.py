"""Both operations in float64, written apart from the package: what every candidate is compared with before timing."""

from __future__ import annotations

import torch
from torch import Tensor

BLOCK_BYTES = 2**30
ATTENTION_ROWS = 512  # queries whose scores are held at a time


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


def attention(
    q: Tensor, k: Tensor, v: Tensor, grad: Tensor, documents: list[tuple[int, int]], group_size: int
) -> list[Tensor]:
    """Shifted sparse attention ("split") and its gradients in float64: [out, d(q), d(k), d(v)], shaped as they are.

    `documents` are (first row, row after the last) in q, k, v [..., heads, dim] seen as [rows, heads, dim]; rows of no
    document give zeros.
    """
    shapes = [q.shape, q.shape, k.shape, v.shape]
    q, k, v, grad = (tensor.detach().double().flatten(0, -3) for tensor in (q, k, v, grad))
    results = out, grad_q, grad_k, grad_v = [torch.zeros_like(tensor) for tensor in (q, q, k, v)]
    heads, dim = q.shape[1:]
    ratio, scale = heads // k.shape[1], dim**-0.5
    for start, end in documents:
        for half in (range(heads // 2), range(heads // 2, heads)):
            if len(half) == 0:
                continue
            moved = (group_size + 1) // 2 if half.start or heads < 2 else 0
            chosen = slice(half.start, half.stop)
            kv = torch.tensor([head // ratio for head in half], device=q.device)
            for first in range(start, end, ATTENTION_ROWS):
                last = min(first + ATTENTION_ROWS, end)
                begin = max(start, start + (first - start + moved) // group_size * group_size - moved)
                i = torch.arange(first - start, last - start, device=q.device)[:, None]
                j = torch.arange(begin - start, last - start, device=q.device)[None, :]
                attends = (j <= i) & ((i + moved) // group_size == (j + moved) // group_size)
                keys, values = k[begin:last].index_select(1, kv), v[begin:last].index_select(1, kv)
                queries, upstream = q[first:last, chosen], grad[first:last, chosen]
                scores = torch.einsum("ihd,jhd->hij", queries, keys).mul_(scale)
                weights = torch.softmax(scores.masked_fill_(~attends, float("-inf")), dim=-1)
                out[first:last, chosen] = torch.einsum("hij,jhd->ihd", weights, values)
                grad_v[begin:last].index_add_(1, kv, torch.einsum("hij,ihd->jhd", weights, upstream))
                grad_weights = torch.einsum("ihd,jhd->hij", upstream, values)
                inner = (weights * grad_weights).sum(-1, keepdim=True)
                grad_scores = weights.mul_(grad_weights.sub_(inner)).mul_(scale)
                grad_q[first:last, chosen] = torch.einsum("hij,jhd->ihd", grad_scores, keys)
                grad_k[begin:last].index_add_(1, kv, torch.einsum("hij,ihd->jhd", grad_scores, queries))
    return [result.view(shape) for result, shape in zip(results, shapes, strict=True)]

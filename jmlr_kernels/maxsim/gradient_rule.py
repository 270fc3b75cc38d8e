"""Where the backward pass gets d(loss)/d(score) from: read, or computed on the spot from a loss's row statistics.

A fused loss never stores the gradient of its scores. The backward operation takes a rule by name and its tensors:

| rule | tensors | d(loss)/d(score of query i and document j) |
|---|---|---|
| ``scores`` | grad [Nq, N] | grad_ij |
| ``tokens`` | grad [Nq, N, Lq] | grad_ijr, of the maximum of query token r |
| ``labels`` | up [Nq], scores [Nq, N], lse [Nq], temperatures [2], labels int64 [Nq] | up_i / t * (p_ij - [j = label_i]) |
| ``teacher`` | up, scores, lse, temperatures, teacher [Nq, N], teacher_lse [Nq] | up_i / t * (p_ij - target_ij) |
| ``margins`` | up, scores, margins [Nq, 2], teacher [Nq, N] | up_i * (j = 0: N * first_i - total_i, else r_ij - first_i) |

with ``p_ij = exp(s_ij / t - lse_i)``, ``target_ij = exp(teacher_ij / t' - teacher_lse_i)``, ``r = s - teacher``, and
``margins`` the pair of ``first_i = r_i0`` and ``total_i = sum_j r_ij``. All are float32, temperatures (t, t').
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

RULES = ("scores", "tokens", "labels", "teacher", "margins")


class RuleInputs(NamedTuple):
    """The rule's tensors by role, as the kernels take them; None where a rule has none."""

    grad: Tensor
    scores: Tensor | None = None
    row: Tensor | None = None
    temperatures: Tensor | None = None
    target: Tensor | None = None
    target_row: Tensor | None = None


def unpack(rule: str, tensors: list[Tensor], dtype: torch.dtype = torch.float32) -> RuleInputs:
    """Tensors of the operation's list by role, contiguous and floating ones in `dtype`."""
    cast = [tensor.contiguous() if tensor.dtype == torch.int64 else tensor.to(dtype).contiguous() for tensor in tensors]
    if rule == "margins":
        grad, scores, row, target = cast
        return RuleInputs(grad, scores, row, None, target)
    return RuleInputs(*cast)


def pair_gradient(rule: str, inputs: RuleInputs, chosen: tuple[slice, slice]) -> Tensor:
    """d(loss)/d(score) [queries, documents] of a slice of all pairs, in plain PyTorch; [.., Lq] for ``tokens``."""
    if rule in ("scores", "tokens"):
        return inputs.grad[chosen]
    queries, documents = chosen
    up = inputs.grad[queries, None]
    assert inputs.scores is not None and inputs.row is not None and inputs.target is not None
    scores, row = inputs.scores[chosen], inputs.row[queries]
    positions = torch.arange(inputs.scores.shape[1], device=scores.device)[documents]
    if rule == "margins":
        residual = scores - inputs.target[chosen]
        first, total = row[:, :1], row[:, 1:]
        return up * torch.where(positions == 0, inputs.scores.shape[1] * first - total, residual - first)
    assert inputs.temperatures is not None
    probability = torch.exp(scores / inputs.temperatures[0] - row[:, None])
    if rule == "labels":
        target = (positions == inputs.target[queries, None]).to(scores.dtype)
    else:
        assert inputs.target_row is not None
        target = torch.exp(inputs.target[chosen] / inputs.temperatures[1] - inputs.target_row[queries, None])
    return up / inputs.temperatures[0] * (probability - target)


@triton.jit
def score_gradient(
    grad, scores, row, temperatures, target, target_row, query, document, token, mask, document_count, query_length,
    RULE: tl.constexpr,
):  # fmt: skip
    """The same for lanes of (query, document, query token), zero where `mask` is not set. Indices of 64 bits."""
    pair = query * document_count + document
    if RULE == "scores":
        result = tl.load(grad + pair, mask=mask, other=0.0)
    elif RULE == "tokens":
        result = tl.load(grad + pair * query_length + token, mask=mask, other=0.0)
    else:
        up = tl.load(grad + query, mask=mask, other=0.0)
        score = tl.load(scores + pair, mask=mask, other=0.0)
        if RULE == "margins":
            first = tl.load(row + 2 * query, mask=mask, other=0.0)
            total = tl.load(row + 2 * query + 1, mask=mask, other=0.0)
            residual = score - tl.load(target + pair, mask=mask, other=0.0)
            result = up * tl.where(document == 0, document_count * first - total, residual - first)
        else:
            inverse = 1.0 / tl.load(temperatures)
            probability = tl.exp(score * inverse - tl.load(row + query, mask=mask, other=0.0))
            if RULE == "labels":
                aim = (tl.load(target + query, mask=mask, other=-1) == document).to(tl.float32)
            else:
                logit = tl.load(target + pair, mask=mask, other=0.0) / tl.load(temperatures + 1)
                aim = tl.exp(logit - tl.load(target_row + query, mask=mask, other=0.0))
            result = up * inverse * (probability - aim)
        result = tl.where(mask, result, 0.0)
    return result

"""Where the backward pass gets d(loss)/d(score) from: read, or computed on the spot from a loss's row statistics.

A fused loss never stores the gradient of its scores. The backward operation takes a rule by name and its tensors:

| rule | tensors | d(loss)/d(score of query i and document j) |
|---|---|---|
| ``scores`` | grad [Nq, N] | grad_ij |
| ``tokens`` | grad [Nq, N, Lq] | grad_ijr, of the maximum of query token r |
| ``labels`` | up [Nq], scores [Nq, N], row [Nq, 2], temperatures [2], labels int64 [Nq] | up_i / t * (p_ij - y_ij) |
| | the same without labels: none of these documents is right | up_i / t * p_ij |
| ``teacher`` | up, scores, row, temperatures, teacher [Nq, N], teacher_row [Nq, 2] | up_i / t * (p_ij - q_ij) |
| ``margins`` | up, scores, row, teacher [Nq, N] | up_i * (j = 0: N * first_i - total_i, else r_ij - first_i) |

``y_ij`` is 1 for ``j = label_i``, else 0. For ``margins``, ``r = s - teacher`` and a row is the pair of
``first_i = r_i0`` and ``total_i = sum_j r_ij``. Elsewhere it is the pair of ``top_i = max_j s_ij`` and
``mass_i = log sum_j exp((s_ij - top_i) / t)``, so that ``p_ij = exp((s_ij - top_i) / t - mass_i)`` has no difference of
two large numbers; q in the same way from the teacher's scores. All are float32, temperatures (t, t').
"""

from __future__ import annotations

from typing import NamedTuple

import torch
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
    assert inputs.scores is not None and inputs.row is not None
    scores, row = inputs.scores[chosen], inputs.row[queries]
    positions = torch.arange(inputs.scores.shape[1], device=scores.device)[documents]
    if rule == "margins":
        assert inputs.target is not None
        residual = scores - inputs.target[chosen]
        first, total = row[:, :1], row[:, 1:]
        return up * torch.where(positions == 0, inputs.scores.shape[1] * first - total, residual - first)
    assert inputs.temperatures is not None
    probability = torch.exp((scores - row[:, :1]) / inputs.temperatures[0] - row[:, 1:])
    if inputs.target is None:
        return up / inputs.temperatures[0] * probability
    if rule == "labels":
        target = (positions == inputs.target[queries, None]).to(scores.dtype)
    else:
        assert inputs.target_row is not None
        target_row = inputs.target_row[queries]
        target = torch.exp((inputs.target[chosen] - target_row[:, :1]) / inputs.temperatures[1] - target_row[:, 1:])
    return up / inputs.temperatures[0] * (probability - target)

"""Training losses on MaxSim scores that store neither similarities nor the gradient of the scores.

The forward pass is MaxSim's own, followed by one pass over each query's scores (an operation of its own, with the
statistics below); the backward pass computes each score's gradient on the spot, in the kernels that send it to queries
and documents (gradient_rule.py). Kept between the two: the scores [Nq, N], the winners, and a few numbers per query.

Statistics [Nq, 6] of a row of scores s, temperature t, by rule:

| rule | 0, 1 | 2, 3 | 4 | 5 |
|---|---|---|---|---|
| ``labels`` | max s, log sum exp((s - max s) / t) | s of the labelled document, 0 | sum p (s - max s) | 0 |
| ``teacher`` | the same | the same of the teacher's scores and t' | sum (p - q) (s - max s) | sum q (log q - log p) |
| ``margins`` | r_0, sum r | 0, 0 | 0 | sum (r_0 - r_j)^2 |

with p = softmax(s / t), q = softmax(teacher / t'), r = s - teacher.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .. import ops
from .function import SAVED, Switches, Tensors, gradients, prepare, run_forward, to_save, wants_gradient


def maxsim_contrastive_loss(
    queries: Tensor,
    documents: Tensor,
    labels: Tensor | None = None,
    *,
    temperature: float | Tensor = 1.0,
    label_offset: int = 0,
    negatives: Tensor | None = None,
    negative_mask: Tensor | None = None,
    query_mask: Tensor | None = None,
    document_mask: Tensor | None = None,
    query_weights: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    max_seqlen: int | None = None,
    normalize: bool = False,
    reduction: str = "mean",
    backend: str = "auto",
) -> Tensor:
    """InfoNCE over all documents of the batch: cross-entropy of ``softmax(maxsim(queries, documents) / temperature)``.

    The loss that ColBERT, PyLate's ``Contrastive`` and sentence-transformers' ``MultipleNegativesRankingLoss`` train
    with, in one operation. Deterministic; differentiable, once, in queries, documents, query_weights, negatives and
    temperature.

    Args:
        queries: [Nq, Lq, D].
        documents: [Nd, Ld, D], packed [T, D] with `cu_seqlens`, or a jagged nested tensor: the positives, and whatever
            negatives all queries share.
        labels: int64 [Nq], the index of each query's positive document. Left out: 0 to Nq - 1.
        temperature: positive; a tensor of one element may be a learnable parameter.
        label_offset: added to the labels: rank * Nq when `documents` were gathered from several ranks.
        negatives: [Nq, K, Ln, D], further negatives of each query alone.
        negative_mask: bool [Nq, K, Ln], True counts.
        reduction: "mean" over queries, "sum" or "none".

    The other arguments are those of :func:`jmlr_kernels.maxsim`. An empty document scores 0 and takes part.

    Returns:
        Scalar float32 (float64 for float64 inputs); [Nq] with reduction "none". A label outside the documents is an
        error on a CPU; on a GPU and under torch.compile it gives NaN, to its query's gradient too.

    Raises:
        ValueError, TypeError, RuntimeError: as for :func:`jmlr_kernels.maxsim`, with one sentence.
    """
    tensors, switches = prepare(
        queries, documents, query_mask, document_mask, query_weights, cu_seqlens, max_seqlen, normalize, False, backend
    )
    _check_reduction(reduction)
    labels = _labels(labels, label_offset, tensors)
    temperatures = _temperatures(temperature, 1.0, tensors[0])
    further: tuple[Tensors, Switches] | None = None
    if negatives is not None:
        if negatives.shape[:2].numel() == 0:
            raise ValueError("negatives must hold at least one document for each query; leave them out instead")
        further = prepare(
            queries, negatives, query_mask, negative_mask, query_weights, None, None, normalize, True, backend
        )
    elif negative_mask is not None:
        raise ValueError("negative_mask came without negatives; pass both or neither")
    loss = _run(tensors, switches, further, "labels", labels, temperatures)
    return _reduced(loss, reduction)


def maxsim_distillation_loss(
    queries: Tensor,
    documents: Tensor,
    teacher_scores: Tensor,
    *,
    loss: str = "kl",
    temperature: float | Tensor = 1.0,
    teacher_temperature: float = 1.0,
    query_mask: Tensor | None = None,
    document_mask: Tensor | None = None,
    query_weights: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    max_seqlen: int | None = None,
    normalize: bool = False,
    reduction: str = "mean",
    backend: str = "auto",
) -> Tensor:
    """Distillation of a teacher's scores into MaxSim scores of each query's own candidates.

    * ``"kl"``: KL(softmax(teacher / teacher_temperature) || softmax(score / temperature)) over the candidates
      (ColBERTv2, Santhanam et al. 2022).
    * ``"margin_mse"``: mean over k of ((s_0 - s_k) - (teacher_0 - teacher_k))^2, candidate 0 being the positive
      (Hofstaetter et al. 2020, arXiv 2010.02666). The temperatures are not used.

    Args:
        queries: [Nq, Lq, D].
        documents: [Nq, K, Ld, D], or packed [T, D] with `cu_seqlens` [Nq * K + 1].
        teacher_scores: floating [Nq, K]. For "kl", -inf gives a candidate no share of the target.
        temperature: positive; a tensor of one element may be a learnable parameter.
        teacher_temperature: positive.
        reduction: "mean" over queries, "sum" or "none".

    The other arguments are those of :func:`jmlr_kernels.maxsim_candidates`. Differentiable, once, in queries,
    documents, query_weights and temperature, not in the teacher's scores; deterministic.

    Returns:
        Scalar float32 (float64 for float64 inputs); [Nq] with reduction "none".

    Raises:
        ValueError, TypeError, RuntimeError: as for :func:`jmlr_kernels.maxsim_candidates`, with one sentence.
    """
    tensors, switches = prepare(
        queries, documents, query_mask, document_mask, query_weights, cu_seqlens, max_seqlen, normalize, True, backend
    )
    _check_reduction(reduction)
    if loss not in ("kl", "margin_mse"):
        raise ValueError(f'loss={loss!r}: choose "kl" or "margin_mse"')
    count = tensors[1].shape[1] if cu_seqlens is None else (cu_seqlens.shape[0] - 1) // max(1, queries.shape[0])
    if teacher_scores.shape != (queries.shape[0], count):
        raise ValueError(
            f"teacher_scores must be [Nq, K] = [{queries.shape[0]}, {count}], but its shape is"
            f" {list(teacher_scores.shape)}"
        )
    if not teacher_scores.dtype.is_floating_point:
        raise TypeError(f"teacher_scores must be floating, but is {teacher_scores.dtype}; call .float() on it")
    if teacher_scores.requires_grad and torch.is_grad_enabled():
        raise ValueError("teacher_scores asks for a gradient, which this loss does not send; call .detach() on it")
    if count < (2 if loss == "margin_mse" else 1):
        raise ValueError(f"documents hold {count} candidates for each query, too few for {loss}")
    dtype = torch.float64 if queries.dtype == torch.float64 else torch.float32
    temperatures = _temperatures(temperature, teacher_temperature, tensors[0])
    rule = "teacher" if loss == "kl" else "margins"
    return _reduced(_run(tensors, switches, None, rule, teacher_scores.to(dtype), temperatures), reduction)


# --------------------------------------------------------------------------- one loss, row by row


def _run(
    tensors: Tensors,
    switches: Switches,
    further: tuple[Tensors, Switches] | None,
    rule: str,
    target: Tensor,
    temperatures: Tensor,
) -> Tensor:
    """Loss [Nq]."""
    others = (None, None) if further is None else (further[0][1], further[0][3])
    if wants_gradient(tensors, temperatures, others[0]):
        second = None if further is None else further[1]
        return ops.apply(_RowLoss, *tensors, *others, target, temperatures, switches, second, rule)
    blocks = [(tensors, switches)] + ([] if further is None else [further])
    scores = [run_forward(*block, per_token=False, need_winners=False)[0] for block in blocks]
    statistics = _statistics(scores, target, temperatures, rule, switches.backend)
    return _losses(statistics, rule, temperatures, scores[0].shape[1])[0]


def _statistics(scores: list[Tensor], target: Tensor, temperatures: Tensor, rule: str, backend: str) -> Tensor:
    """Statistics [Nq, 6] of one block of scores, or of several under one softmax."""
    backend = ops.companion_backend(backend, scores[0], "maxsim_loss_rows")
    blocks = [
        ops.call("maxsim_loss_rows", block, target if position == 0 else None, temperatures, rule, backend)
        for position, block in enumerate(scores)
    ]
    if len(blocks) == 1:
        return blocks[0]
    tops, masses, inner = (torch.stack([block[:, column] for block in blocks], dim=1) for column in (0, 1, 4))
    top = tops.amax(1, keepdim=True)
    parts = (tops - top) / temperatures[0] + masses
    mass = parts.logsumexp(1, keepdim=True)
    expected = (torch.exp(parts - mass) * (inner + tops - top)).sum(1, keepdim=True)
    return torch.cat([top, mass, blocks[0][:, 2:4], expected, blocks[0][:, 5:]], dim=1)


def _losses(statistics: Tensor, rule: str, temperatures: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Loss [Nq], and its slope [Nq] in the temperature."""
    t = temperatures[0]
    top, mass, picked, _, expected, total = statistics.unbind(1)
    if rule == "margins":
        return total / (count - 1), torch.zeros_like(total)
    if rule == "teacher":
        return total, -expected / t**2
    return mass - (picked - top) / t, (picked - top - expected) / t**2


class _RowLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        queries: Tensor,
        documents: Tensor,
        query_mask: Tensor | None,
        document_mask: Tensor | None,
        query_weights: Tensor | None,
        cu_seqlens: Tensor | None,
        negatives: Tensor | None,
        negative_mask: Tensor | None,
        target: Tensor,
        temperatures: Tensor,
        switches: Switches,
        further: Switches | None,
        rule: str,
    ) -> Tensor:
        tensors = (queries, documents, query_mask, document_mask, query_weights, cu_seqlens)
        blocks = [(tensors, switches)]
        if negatives is not None and further is not None:
            blocks.append(((queries, negatives, query_mask, negative_mask, query_weights, None), further))
        saved: list[Tensor | None] = []
        scores: list[Tensor] = []
        for block in blocks:
            block_scores, winners, *scales = run_forward(*block, per_token=False, need_winners=True)
            scores.append(block_scores)
            saved += to_save(*block, winners, tuple(scales))
        statistics = _statistics(scores, target, temperatures, rule, switches.backend)
        loss, slope = _losses(statistics, rule, temperatures, scores[0].shape[1])
        row = statistics[:, :2].contiguous()
        aim_row = statistics[:, 2:4].contiguous() if rule == "teacher" else None
        ctx.save_for_backward(*saved, target, temperatures, row, aim_row, slope, *scores)
        ctx.switches, ctx.further, ctx.rule = switches, further, rule
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[Tensor | None, ...]:
        blocks = 1 if ctx.further is None else 2
        saved, rest = ctx.saved_tensors[: SAVED * blocks], ctx.saved_tensors[SAVED * blocks :]
        target, temperatures, row, aim_row, slope, *scores = rest
        grad_temperatures = None
        if ctx.needs_input_grad[9]:
            grad_temperatures = torch.stack([(grad_loss * slope).sum(), torch.zeros_like(slope[0])])
        if ctx.rule == "margins":
            up = grad_loss * (2 / (scores[0].shape[1] - 1))
            rule_tensors = [up, scores[0], row, target]
        else:
            up = grad_loss.contiguous()
            rule_tensors = [up, scores[0], row, temperatures, target]
            rule_tensors += [] if aim_row is None else [aim_row]
        grad_queries, grad_documents, grad_weights = gradients(saved[:SAVED], ctx.switches, ctx.rule, rule_tensors)
        grad_negatives = None
        if blocks == 2:
            more_queries, grad_negatives, more_weights = gradients(
                saved[SAVED:], ctx.further, ctx.rule, [up, scores[1], row, temperatures]
            )
            grad_queries = grad_queries + more_queries
            if grad_weights is not None and more_weights is not None:
                grad_weights = grad_weights + more_weights
        return (
            grad_queries, grad_documents, None, None, grad_weights, None, grad_negatives, None, None,
            grad_temperatures, None, None, None,
        )  # fmt: skip


def fake_loss_rows(scores: Tensor, target: Tensor | None, temperatures: Tensor, rule: str, backend: str) -> Tensor:
    """Shape and dtype of the statistics."""
    return scores.new_empty((scores.shape[0], 6))


# --------------------------------------------------------------------------- arguments


def _check_reduction(reduction: str) -> None:
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f'reduction={reduction!r}: choose "mean", "sum" or "none"')


def _reduced(loss: Tensor, reduction: str) -> Tensor:
    return loss if reduction == "none" else loss.mean() if reduction == "mean" else loss.sum()


def _labels(labels: Tensor | None, offset: int, tensors: Tensors) -> Tensor:
    queries, documents, cu_seqlens = tensors[0], tensors[1], tensors[5]
    count = documents.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    if labels is None:
        if not (0 <= offset and offset + queries.shape[0] <= count):
            raise ValueError(
                f"{queries.shape[0]} queries with label_offset={offset} need documents {offset} to"
                f" {offset + queries.shape[0] - 1}, but there are {count}; pass labels"
            )
        return torch.arange(offset, offset + queries.shape[0], device=queries.device)
    if labels.shape != queries.shape[:1] or labels.dtype != torch.int64:
        raise ValueError(
            f"labels must be int64 [Nq] = [{queries.shape[0]}], but are {labels.dtype} {list(labels.shape)}"
        )
    if labels.device != queries.device:
        raise ValueError(f"labels are on {labels.device} and queries on {queries.device}; move them together")
    labels = labels + offset if offset else labels
    if labels.device.type == "cpu" and not torch.compiler.is_compiling() and labels.numel() and type(labels) is Tensor:
        lowest, highest = int(labels.min()), int(labels.max())
        if lowest < 0 or highest >= count:
            raise ValueError(f"labels run from {lowest} to {highest}, but there are documents 0 to {count - 1}")
    return labels


def _temperatures(temperature: float | Tensor, teacher: float, queries: Tensor) -> Tensor:
    """Both temperatures [2] in the scores' precision, made on the device; differentiable in the first."""
    dtype = torch.float64 if queries.dtype == torch.float64 else torch.float32
    if teacher <= 0:
        raise ValueError(f"teacher_temperature must be positive, but is {teacher}")
    second = torch.full((1,), teacher, dtype=dtype, device=queries.device)
    if isinstance(temperature, Tensor):
        if temperature.numel() != 1:
            raise ValueError(f"temperature must have one element, but its shape is {list(temperature.shape)}")
        return torch.cat([temperature.to(queries.device, dtype).reshape(1), second])
    if temperature <= 0:
        raise ValueError(f"temperature must be positive, but is {temperature}")
    return torch.cat([torch.full((1,), temperature, dtype=dtype, device=queries.device), second])

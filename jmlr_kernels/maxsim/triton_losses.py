"""Row statistics of the fused losses in Triton: one pass over a query's scores; what each column means: losses.py."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..launch import launch
from . import config


@triton.jit
def _top_and_mass(row, inverse, count, BLOCK: tl.constexpr):
    """max(row) and log(sum(exp((row - max) * inverse))): a maximum and a sum for each lane, put together at the end."""
    highest = tl.full([BLOCK], float("-inf"), tl.float32)
    mass = tl.zeros([BLOCK], tl.float32)
    for start in range(0, count, BLOCK):
        document = start + tl.arange(0, BLOCK)
        value = tl.load(row + document, mask=document < count, other=float("-inf"))
        higher = tl.maximum(highest, value)
        # Nothing was summed at -inf, and a value of -inf adds nothing: no difference of infinities.
        mass = tl.where(highest == float("-inf"), 0.0, mass * tl.exp((highest - higher) * inverse))
        mass += tl.where(value == float("-inf"), 0.0, tl.exp((value - higher) * inverse))
        highest = higher
    top = tl.max(highest, axis=0)
    scaled = tl.where(highest == float("-inf"), 0.0, mass * tl.exp((highest - top) * inverse))
    return top, tl.log(tl.sum(scaled, axis=0))


@triton.jit(do_not_specialize=["count"])
def maxsim_loss_rows_kernel(
    scores, target, temperatures, statistics, count, RULE: tl.constexpr, HAS_TARGET: tl.constexpr, BLOCK: tl.constexpr
):
    """Statistics [Nq, 6] of scores [Nq, count]; program i owns query i and walks its documents in order."""
    query = tl.program_id(0).to(tl.int64)
    lanes = tl.arange(0, BLOCK)
    row = scores + query * count
    aims = target + query * count if RULE != "labels" else row
    out = statistics + query * 6
    # Lane by lane through the row, then the lanes together.
    one = tl.zeros([BLOCK], tl.float32)
    other = tl.zeros([BLOCK], tl.float32)
    if RULE == "margins":
        first = tl.load(row) - tl.load(aims)
        for start in range(0, count, BLOCK):
            inside = start + lanes < count
            score = tl.load(row + start + lanes, mask=inside, other=0.0)
            residual = score - tl.load(aims + start + lanes, mask=inside, other=0.0)
            one += residual
            other += tl.where(inside, (first - residual) * (first - residual), 0.0)
        tl.store(out, first)
        tl.store(out + 1, tl.sum(one, axis=0))
        tl.store(out + 2, 0.0)
        tl.store(out + 3, 0.0)
        tl.store(out + 4, 0.0)
        tl.store(out + 5, tl.sum(other, axis=0))
    else:
        inverse = 1.0 / tl.load(temperatures)
        top, mass = _top_and_mass(row, inverse, count, BLOCK)
        if RULE == "teacher":
            aim_inverse = 1.0 / tl.load(temperatures + 1)
            aim_top, aim_mass = _top_and_mass(aims, aim_inverse, count, BLOCK)
        elif HAS_TARGET:
            label = tl.load(target + query)
        for start in range(0, count, BLOCK):
            document = start + lanes
            inside = document < count
            score = tl.load(row + document, mask=inside, other=0.0)
            log_chance = (score - top) * inverse - mass
            chance = tl.where(inside, tl.exp(log_chance), 0.0)
            if RULE == "teacher":
                wish = tl.load(aims + document, mask=inside, other=float("-inf"))
                log_share = (wish - aim_top) * aim_inverse - aim_mass
                share = tl.exp(log_share)
                one += tl.where(inside, (chance - share) * (score - top), 0.0)
                # A document that the teacher rules out (-inf) has no share, whatever it scores.
                other += tl.where(share > 0.0, share * (log_share - log_chance), 0.0)
            else:
                one += tl.where(inside, chance * (score - top), 0.0)
                if HAS_TARGET:
                    other += tl.where(inside & (document == label), score, 0.0)
        if RULE == "labels" and HAS_TARGET:  # no such document: loud, not wrong, in the loss and in its gradient
            mass = tl.where((label >= 0) & (label < count), mass, float("nan"))
        tl.store(out, top)
        tl.store(out + 1, mass)
        tl.store(out + 4, tl.sum(one, axis=0))
        found = tl.sum(other, axis=0)
        if RULE == "teacher":
            tl.store(out + 2, aim_top)
            tl.store(out + 3, aim_mass)
            tl.store(out + 5, found)
        else:
            tl.store(out + 2, found)
            tl.store(out + 3, 0.0)
            tl.store(out + 5, 0.0)


def loss_rows(scores: Tensor, target: Tensor | None, temperatures: Tensor, rule: str) -> Tensor:
    """[Nq, 6] float32 from scores float32 [Nq, N] and the rule's target."""
    rows, count = scores.shape
    statistics = torch.empty((rows, 6), dtype=torch.float32, device=scores.device)
    launch(
        maxsim_loss_rows_kernel,
        rows,
        (scores.contiguous(), None if target is None else target.contiguous(), temperatures, statistics, count),
        (rule, target is not None, 256),
        (4, 1, config.REGISTERS),
    )
    return statistics

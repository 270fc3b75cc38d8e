"""A score's gradient inside a Triton kernel, by the rules of gradient_rule.py."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def score_gradient(
    grad, scores, row, temperatures, target, target_row, query, document, token, mask, document_count, query_length,
    RULE: tl.constexpr,
):  # fmt: skip
    """d(loss)/d(score) for lanes of (query, document, query token), zero where `mask` is not set. 64-bit indices."""
    pair = query * document_count + document
    if RULE == "scores":
        result = tl.load(grad + pair, mask=mask, other=0.0)
    elif RULE == "tokens":
        result = tl.load(grad + pair * query_length + token, mask=mask, other=0.0)
    else:
        up = tl.load(grad + query, mask=mask, other=0.0)
        score = tl.load(scores + pair, mask=mask, other=0.0)
        top = tl.load(row + 2 * query, mask=mask, other=0.0)
        mass = tl.load(row + 2 * query + 1, mask=mask, other=0.0)
        if RULE == "margins":
            residual = score - tl.load(target + pair, mask=mask, other=0.0)
            result = up * tl.where(document == 0, document_count * top - mass, residual - top)
        else:
            inverse = 1.0 / tl.load(temperatures)
            probability = tl.exp((score - top) * inverse - mass)
            if target is None:
                aim = 0.0
            elif RULE == "labels":
                aim = (tl.load(target + query, mask=mask, other=-1) == document).to(tl.float32)
            else:
                aim_top = tl.load(target_row + 2 * query, mask=mask, other=0.0)
                aim_mass = tl.load(target_row + 2 * query + 1, mask=mask, other=0.0)
                wish = tl.load(target + pair, mask=mask, other=0.0)
                aim = tl.exp((wish - aim_top) / tl.load(temperatures + 1) - aim_mass)
            result = up * inverse * (probability - aim)
        result = tl.where(mask, result, 0.0)
    return result

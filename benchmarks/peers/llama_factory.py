"""LLaMA-Factory's ``shift_attn``, re-stated: what its S2 attention computes, not how. For the label-leak proof only.

Read in hiyouga/LLaMA-Factory, src/llamafactory/model/model_utils/longlora.py, at commits ff6d4d12e and 01fa38a25: all
three of its forwards roll the shifted heads, attend inside groups, and then call ``attn_output.reshape(...)`` without
keeping the result. The roll back thus turns inside each group instead of along the sequence: in the shifted heads the
first half of every group gets the output of a token one group later.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn import functional

NAME = "llama-factory-shift"


def shift_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, group_size: int) -> torch.Tensor:
    """q, k, v [B, S, H, D] with S a multiple of `group_size` -> [B, S, H, D], the misplaced outputs included."""
    batch, length, heads, dim = q.shape

    def grouped(x: torch.Tensor) -> torch.Tensor:
        shifted = x[:, :, heads // 2 :].roll(-(group_size // 2), dims=1)
        x = torch.cat((x[:, :, : heads // 2], shifted), dim=2)
        return x.reshape(batch * (length // group_size), group_size, heads, dim).transpose(1, 2)

    out = functional.scaled_dot_product_attention(grouped(q), grouped(k), grouped(v), is_causal=True).transpose(1, 2)
    # Still [groups, group_size, ...]: dims=1 is a place inside the group, not in the sequence.
    back = out[:, :, heads // 2 :].roll(group_size // 2, dims=1)
    return torch.cat((out[:, :, : heads // 2], back), dim=2).reshape(batch, length, heads, dim)


def register() -> None:
    """As ``attn_implementation=NAME`` in transformers: dense in evaluation, groups of ``config.s2_group_size``."""
    from transformers import AttentionInterface, AttentionMaskInterface

    from jmlr_kernels.integrations.transformers import s2_attention, s2_mask

    def forward(
        module: nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: Any, **options: Any
    ) -> tuple[torch.Tensor, None]:
        if not module.training:
            return s2_attention(module, query, key, value, mask, **options)
        repeat = query.shape[1] // key.shape[1]
        q, k, v = (
            x.transpose(1, 2) for x in (query, key.repeat_interleave(repeat, 1), value.repeat_interleave(repeat, 1))
        )
        return shift_attention(q, k, v, module.config.s2_group_size), None  # type: ignore[union-attr,arg-type]

    AttentionInterface.register(NAME, forward)
    AttentionMaskInterface.register(NAME, s2_mask)

"""Shifted sparse attention as ``attn_implementation="s2"`` of any transformers model that uses the registry.

    from jmlr_kernels.integrations.transformers import register

    register()
    model = AutoModelForCausalLM.from_pretrained(name, attn_implementation="s2")
    model.config.s2_group_size = 1024

Sparse in training only, as LongLoRA trains; evaluation, generation and every call with a cache are dense. The group
size is a field of the config, saved with the model, or a keyword of the call, ``model(..., s2_group_size=1024)``. So
is ``s2_boundary``: "split" where nothing is set, or "wrap", which leaks and is there for comparison.

Padding stands on the right: rows are taken to hold ``attention_mask.sum(-1)`` tokens from their start. On a CPU a mask
with padding on the left or with holes raises; on a GPU that check would wait for the device at every layer, so it
runs only where ``JMLR_KERNELS_CHECK_MASK=1`` asks for it. Packed rows come with ``cu_seq_lens_q``, as
``DataCollatorWithFlattening(return_flash_attn_kwargs=True)`` makes it; restarts in ``position_ids`` alone are not
seen.
"""

from __future__ import annotations

import os
from typing import Any

import torch
import torch.nn.functional as F

from ..shifted_attention.function import shifted_sparse_attention

NAME = "s2"


def register(name: str = NAME) -> None:
    """Registers the attention function and its mask function under `name`, in transformers >= 5.17.

    The mask function is needed too: without one of the same name transformers passes no mask at all, and padding
    would be attended to.

    Raises:
        ValueError: a name that transformers gives a meaning of its own.
    """
    if any(reserved in name for reserved in ("flash", "sdpa", "flex", "/")):
        raise ValueError(f"name={name!r}: transformers gives 'flash', 'sdpa', 'flex' and '/' a meaning; leave them out")
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(name, s2_attention)
    AttentionMaskInterface.register(name, s2_mask)


def s2_mask(
    *,
    q_length: int,
    kv_length: int,
    attention_mask: torch.Tensor | None = None,
    local_size: int | None = None,
    **options: Any,
) -> torch.Tensor | None:
    """transformers' mask interface: the 2-D padding mask as it is, or SDPA's 4-D mask where a cache is in use.

    Whether anything is padded at all is not asked: the answer would wait for the device.

    Raises:
        ValueError: a sliding window, which no group of "s2" knows.
    """
    if local_size is not None:
        raise ValueError(f"attention 's2' has no sliding window (got {local_size}): unset it in the config")
    if q_length == kv_length:
        return attention_mask
    from transformers.masking_utils import sdpa_mask

    # Only the cache knows at which of its places the queries are.
    options["allow_is_causal_skip"] = False
    return sdpa_mask(q_length=q_length, kv_length=kv_length, attention_mask=attention_mask, **options)


def s2_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    s2_group_size: int | None = None,
    s2_boundary: str | None = None,
    cu_seq_lens_q: torch.Tensor | None = None,
    **options: Any,
) -> tuple[torch.Tensor, None]:
    """transformers' attention interface: query [B, H, S, D], key and value [B, Hkv, S, D] -> ([B, S, H, D], None).

    Raises:
        ValueError: no group size; dropout, softcap or a sliding window; a mask that is not right padding.
    """
    for option in ("softcap", "sliding_window"):
        if options.get(option):
            raise ValueError(f"attention 's2' has no {option} ({option}={options[option]}): unset it in the config")
    if options.get("is_causal") is False or getattr(module, "is_causal", True) is False:
        raise ValueError("attention 's2' is causal: use another implementation for a bidirectional layer")
    query, key, value = _one_dtype(query, key, value)
    sparse = module.training and query.shape[2] == key.shape[2]
    if not sparse:
        return _dense(query, key, value, attention_mask, scaling, cu_seq_lens_q), None
    if dropout:
        raise ValueError(f"attention 's2' has no dropout (got {dropout}): set attention_dropout=0.0 in the config")
    group_size = s2_group_size if s2_group_size is not None else getattr(module.config, "s2_group_size", None)
    if group_size is None:
        raise ValueError("attention 's2' needs a group size: set config.s2_group_size, in tokens, before training")
    boundary = s2_boundary if s2_boundary is not None else getattr(module.config, "s2_boundary", None) or "split"
    q, k, v = query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)
    if cu_seq_lens_q is not None:
        _only_one_row(q)
        out = shifted_sparse_attention(
            q[0], k[0], v[0], group_size, cu_seqlens=cu_seq_lens_q.to(torch.int32), boundary=boundary, scale=scaling
        )
        return out[None], None
    seq_lens = None if attention_mask is None else _row_lengths(attention_mask, q.shape[1])
    out = shifted_sparse_attention(q, k, v, group_size, seq_lens=seq_lens, boundary=boundary, scale=scaling)
    return out, None


def _dense(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None,
    cu_seq_lens: torch.Tensor | None,
) -> torch.Tensor:
    """Causal attention over everything: [B, S, H, D]. Queries are the last positions of the keys (a cache)."""
    length, total = query.shape[2], key.shape[2]
    mask = None
    if attention_mask is not None or cu_seq_lens is not None or (length > 1 and length != total):
        at = torch.arange(total, device=query.device)
        mask = (at[None, :] <= at[total - length :, None])[None, None]
        if cu_seq_lens is not None:
            _only_one_row(query)
            document = torch.bucketize(at, cu_seq_lens[1:], right=True)
            mask = mask & (document[None, :] == document[total - length :, None])
        elif attention_mask is not None and attention_mask.dim() == 4:
            mask = attention_mask
        elif attention_mask is not None:
            padding = _two_dimensional(attention_mask, total)
            # A query that is padding keeps itself: an empty row of a softmax is NaN.
            mask = (mask & padding[:, None, None, :]) | (at[None, :] == at[total - length :, None])
    out = F.scaled_dot_product_attention(
        query,
        key,
        value,
        attn_mask=mask,
        is_causal=mask is None and length > 1,
        scale=scaling,
        enable_gqa=query.shape[1] != key.shape[1],
    )
    return out.transpose(1, 2).contiguous()


def _one_dtype(*tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """PEFT keeps norms in float32, so q and k may arrive wider than v; v has the model's dtype."""
    dtype = tensors[-1].dtype
    return tuple(tensor.to(dtype) for tensor in tensors)


def _only_one_row(packed: torch.Tensor) -> None:
    if packed.shape[0] != 1:
        raise ValueError(f"packed documents (cu_seq_lens_q) come as one row, not as a batch of {packed.shape[0]}")


def _two_dimensional(mask: torch.Tensor, total: int) -> torch.Tensor:
    if mask.dim() != 2:
        raise ValueError(f"attention 's2' takes a 2-D padding mask, not one of shape {tuple(mask.shape)}")
    return mask[:, :total].to(torch.bool)


def _row_lengths(mask: torch.Tensor, total: int) -> torch.Tensor:
    """A right-padding mask's lengths, int32 [B]."""
    mask = _two_dimensional(mask, total)
    if not torch.compiler.is_compiling() and (mask.device.type == "cpu" or _check_asked_for()):
        if bool((mask[:, 1:] & ~mask[:, :-1]).any()):
            raise ValueError("attention_mask has padding before a token: attention 's2' trains with right padding only")
    return mask.sum(-1, dtype=torch.int32)


def _check_asked_for() -> bool:
    return os.environ.get("JMLR_KERNELS_CHECK_MASK", "0") not in ("", "0")

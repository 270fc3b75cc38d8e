"""Shifted sparse attention as ``attn_implementation="s2"`` of any transformers model that uses the registry.

    from jmlr_kernels.integrations.transformers import register

    register()
    model = AutoModelForCausalLM.from_pretrained(name, attn_implementation="s2")
    model.config.s2_group_size = 1024

Works from transformers 4.53, which introduced the mask interface, on. Sparse in training only, as LongLoRA trains;
evaluation, generation and every call in which keys outnumber queries are dense, by transformers' own ``sdpa``.
docs/transformers.md is the manual.

Fields of the config, saved with the model; the first two also keywords of the call:

- ``s2_group_size``: G, tokens; no default.
- ``s2_boundary``: "split" where nothing is set, or "wrap", which leaks and is there for comparison.
- ``s2_max_documents``: see packing.py.

Padding stands on the right: rows are taken to hold ``attention_mask.sum(-1)`` tokens from their start. A mask with
padding on the left or with holes is an error, on a GPU by an assertion on the device: nothing waits for it.

Packed rows are known by ``cu_seq_lens_q``, or else by ``position_ids``: a position that is not its predecessor's plus
one begins a document, where there is no attention_mask. While training a cache changes nothing; elsewhere it means one
document per row, as everywhere in transformers.
"""

from __future__ import annotations

from typing import Any

import torch

from ..shifted_attention.function import BOUNDARIES, shifted_sparse_attention
from .packing import documents_of, may_wait, restarts

try:
    import transformers
    from transformers import AttentionInterface, AttentionMaskInterface, masking_utils
    from transformers.integrations.sdpa_attention import sdpa_attention_forward
except ImportError as error:
    raise ImportError("attention 's2' needs transformers 4.53 or newer: pip install -U transformers") from error

NAME = "s2"
# A group that holds every document whole, in both halves of the heads: dense causal attention.
_ONE_GROUP = 1 << 30
# What other attention functions of transformers take, by the keyword with which it comes.
_UNSUPPORTED = {
    "softcap": "softcap: set attn_logit_softcapping = None in the config",
    "sliding_window": "sliding window: set sliding_window = None in the config",
    "s_aux": "attention sinks",
    "position_bias": "position bias",
    "cache": "paged cache",
}
# Older versions look for packing in their flash attention alone, and tell no mask function about it.
_MASKS_KNOW_PACKING = hasattr(masking_utils, "find_packed_sequence_indices")
# Versions between the two tell a layer use_cache=False whatever the model does.
_LAYERS_KNOW_CACHE = not _MASKS_KNOW_PACKING or not transformers.__version__.startswith("4.")


def register(name: str = NAME) -> None:
    """Registers the attention function and its mask function under `name`.

    The mask function is needed too: without one of the same name transformers passes no mask at all, and padding
    would be attended to.

    Raises:
        ValueError: a name that transformers gives a meaning of its own.
    """
    if any(reserved in name for reserved in ("flash", "sdpa", "flex", "/")):
        raise ValueError(f"name={name!r}: transformers gives 'flash', 'sdpa', 'flex' and '/' a meaning; leave them out")
    AttentionInterface.register(name, s2_attention)
    AttentionMaskInterface.register(name, s2_mask)


# --------------------------------------------------------------------------- the mask function, once per forward


def s2_mask(
    *,
    kv_length: int,
    q_length: int | None = None,
    cache_position: torch.Tensor | None = None,
    mask_function: Any = masking_utils.causal_mask_function,
    attention_mask: torch.Tensor | None = None,
    local_size: int | None = None,
    config: Any = None,
    **options: Any,
) -> torch.Tensor | None:
    """transformers' mask interface. What it returns reaches :func:`s2_attention` as its attention_mask.

    Returns:
        None where nothing restricts causal attention; the padding mask as it is, bool [B, S]; the documents of packed
        rows, int32 [N + 1]; or SDPA's mask [B, 1, q_length, kv_length] where queries are not all of the keys, or where
        the model lays a pattern of its own over causality.

    Raises:
        ValueError: a sliding window or chunks; a bidirectional layer.
    """
    if local_size is not None:
        if set(getattr(config, "layer_types", None) or [""]) == {"full_attention"}:
            return None  # made on principle, read by no layer (Gemma)
        raise ValueError(_window_message(local_size, config))
    if q_length is None:  # older versions give the queries' places instead
        assert cache_position is not None
        q_length = cache_position.shape[0]
        options["cache_position"] = cache_position
    else:
        options["q_length"] = q_length
    pattern = _pattern(mask_function, options.get("use_vmap", False), attention_mask)
    if pattern == "bidirectional":
        raise ValueError(_BIDIRECTIONAL)
    if q_length != kv_length or pattern == "other":
        # Only the cache knows at which of its places the queries are.
        options["allow_is_causal_skip"] = False
        sdpa_mask = AttentionMaskInterface._global_mapping["sdpa"]
        return sdpa_mask(
            kv_length=kv_length, mask_function=mask_function, attention_mask=attention_mask, config=config, **options
        )
    if pattern == "packed":
        return _documents_of_mask(mask_function, q_length, config=config, **options)
    # In training, whether anything is padded is never asked: the answer would wait for the device. Nor where None would
    # make the attention function look for packing, which a mask excludes.
    asked = _MASKS_KNOW_PACKING and _LAYERS_KNOW_CACHE and not torch.is_grad_enabled()
    if attention_mask is not None and asked and may_wait(attention_mask, training=False):
        return None if bool(attention_mask.all()) else attention_mask
    return attention_mask


def _pattern(mask_function: Any, overlaid: bool, attention_mask: torch.Tensor | None) -> str:
    """What transformers asks for: "causal", "packed", "bidirectional", or "other", a pattern of the model's own."""
    if mask_function is masking_utils.causal_mask_function:
        return "causal"
    name = mask_function.__qualname__
    if "bidirectional" in name:
        return "bidirectional"
    # Packing is causality *and* the same document, looked for where there is no padding mask.
    if _MASKS_KNOW_PACKING and attention_mask is None and not overlaid and name.startswith("and_masks."):
        return "packed"
    return "other"


def _documents_of_mask(
    mask_function: Any, length: int, *, config: Any, batch_size: int, device: Any = None, **options: Any
) -> torch.Tensor | None:
    """The documents of which transformers tells in a function of two tokens: a token that may not attend to the one
    before it begins a document."""
    if "cache_position" in options:
        device = options["cache_position"].device
    row = torch.arange(batch_size, device=device)[:, None]
    token = torch.arange(length, device=device)[None, :]
    joined = mask_function(row, 0, token, (token - 1).clamp(min=0)).expand(batch_size, length)
    return documents_of(~joined | (token == 0), torch.is_grad_enabled(), getattr(config, "s2_max_documents", None))


# --------------------------------------------------------------------------- the attention function, in every layer


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
    position_ids: torch.Tensor | None = None,
    **options: Any,
) -> tuple[torch.Tensor, None]:
    """transformers' attention interface: query [B, H, S, D], key and value [B, Hkv, S, D] -> ([B, S, H, D], None).

    The result has the query's dtype, but for float32 queries of a model in another dtype, see `_target_dtype`.

    Raises:
        ValueError: no group size, or no length; dropout, softcap, a sliding window, a bidirectional layer; a mask that
            is not right padding; packed documents beside a cache, or in more than one row of `cu_seq_lens_q`.
    """
    for option, meaning in _UNSUPPORTED.items():
        if options.get(option) is not None:
            raise ValueError(f"attention 's2' has no {meaning} (got {option})")
    if options.get("is_causal") is False or getattr(module, "is_causal", True) is False:
        raise ValueError(_BIDIRECTIONAL)
    dtype = _target_dtype(module, query)
    query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    length, whole = query.shape[2], query.shape[2] == key.shape[2]
    generating = bool(options.get("use_cache")) and not torch.is_grad_enabled()
    sparse = module.training and whole and not generating

    documents: torch.Tensor | None = None
    if cu_seq_lens_q is not None:
        if query.shape[0] != 1 or not whole:
            raise ValueError(
                f"packed documents (cu_seq_lens_q) come as one row without a cache: got a batch of {query.shape[0]}, "
                f"{length} queries and {key.shape[2]} keys"
            )
        documents = cu_seq_lens_q.to(torch.int32)
    elif attention_mask is not None and attention_mask.dim() == 1:
        documents = attention_mask
    elif attention_mask is None and whole and _unseen_by_the_mask(position_ids, length, sparse, options):
        assert position_ids is not None
        begins = restarts(position_ids).expand(query.shape[0], -1)
        documents = documents_of(begins, module.training, getattr(module.config, "s2_max_documents", None))

    if not sparse and documents is None:
        return _dense(module, query, key, value, attention_mask, scaling, dropout), None
    if dropout:
        raise ValueError(f"attention 's2' has no dropout (got {dropout}): set attention_dropout = 0.0 in the config")
    group_size = _group_size(module, s2_group_size) if sparse else _ONE_GROUP
    boundary = _boundary(module, s2_boundary) if sparse else "split"
    q, k, v = query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)
    if documents is not None:
        batch = q.shape[:2]
        q, k, v = q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1)
        out = shifted_sparse_attention(q, k, v, group_size, cu_seqlens=documents, boundary=boundary, scale=scaling)
        return out.unflatten(0, batch), None
    seq_lens = None if attention_mask is None else _row_lengths(attention_mask, length)
    return shifted_sparse_attention(q, k, v, group_size, seq_lens=seq_lens, boundary=boundary, scale=scaling), None


def _unseen_by_the_mask(position_ids: torch.Tensor | None, length: int, sparse: bool, options: dict[str, Any]) -> bool:
    """Whether the positions may hold documents for which transformers did not look: beside a cache, or in versions
    whose masks know no packing. Outside training a cache means one document per row, as everywhere in transformers.
    Positions of several axes (text and image) are no packing."""
    if position_ids is None or position_ids.dim() != 2 or position_ids.shape[1] != length or length == 1:
        return False
    if not _LAYERS_KNOW_CACHE:
        return sparse
    return sparse if options.get("use_cache") else not _MASKS_KNOW_PACKING


def _dense(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None,
    dropout: float,
) -> torch.Tensor:
    """transformers' ``sdpa``: [B, S, H, D]. Queries are the last positions of the keys unless a 4-D mask knows it."""
    length, total = query.shape[2], key.shape[2]
    if attention_mask is None and 1 < length < total or attention_mask is not None and attention_mask.dim() != 4:
        at = torch.arange(total, device=query.device)
        causal = (at[None, :] <= at[total - length :, None])[None, None]
        if attention_mask is None:
            attention_mask = causal
        else:
            padding = _two_dimensional(attention_mask, total)[:, None, None, :]
            # A query that is padding keeps itself: an empty row of a softmax is NaN.
            attention_mask = (causal & padding) | (at[None, :] == at[total - length :, None])
    return sdpa_attention_forward(module, query, key, value, attention_mask, dropout=dropout, scaling=scaling)[0]


# --------------------------------------------------------------------------- what model and call ask for

_BIDIRECTIONAL = (
    "attention 's2' is causal self-attention: load encoders, cross-attention and bidirectional layers with "
    "attn_implementation='sdpa'"
)


def _window_message(size: int, config: Any) -> str:
    kinds = getattr(config, "layer_types", None)
    remedy = "set config.sliding_window = None; the model then attends to its whole context"
    if kinds is not None:
        remedy = (
            "load the model with layer_types=['full_attention'] * num_hidden_layers (its layers are made from "
            "layer_types, not from sliding_window); it then attends to its whole context"
        )
    return f"attention 's2' has no sliding window, and {type(config).__name__} has one of {size} tokens: {remedy}"


def _group_size(module: torch.nn.Module, keyword: int | None) -> int:
    size = keyword if keyword is not None else getattr(module.config, "s2_group_size", None)
    if size is None:
        raise ValueError(
            f"attention 's2' needs a group size: set s2_group_size, in tokens, in the model's "
            f"{type(module.config).__name__} before training"
        )
    if isinstance(size, (float, str)) or size < 2:
        raise ValueError(f"s2_group_size={size!r}: give a length of at least 2 tokens as an int, not a ratio")
    return size


def _boundary(module: torch.nn.Module, keyword: str | None) -> str:
    boundary = keyword if keyword is not None else getattr(module.config, "s2_boundary", None)
    if boundary is None:
        return "split"
    if boundary not in BOUNDARIES:
        raise ValueError(f"s2_boundary={boundary!r}: choose 'split' or 'wrap'")
    return boundary


def _target_dtype(module: torch.nn.Module, query: torch.Tensor) -> torch.dtype:
    """The dtype to compute and return in, by the rule of transformers' flash attention.

    Norms kept in float32 (PEFT's k-bit training) make float32 queries in a model of another dtype. They become
    autocast's dtype, or a quantised model's compute dtype, or that of the layer's projections.
    """
    if query.dtype != torch.float32:
        return query.dtype
    if torch.is_autocast_enabled(query.device.type):
        return torch.get_autocast_dtype(query.device.type)
    config: Any = module.config
    if hasattr(config, "_pre_quantization_dtype"):
        return config._pre_quantization_dtype
    if hasattr(config, "_is_quantized"):
        return config.dtype
    for layer in module.modules():
        if isinstance(layer, torch.nn.Linear) and layer.weight.is_floating_point():
            return layer.weight.dtype
    return query.dtype


def _two_dimensional(mask: torch.Tensor, total: int) -> torch.Tensor:
    if mask.dim() != 2:
        raise ValueError(
            f"attention 's2' trains with a 2-D padding mask, not with one of shape {tuple(mask.shape)}: pass "
            "[batch, length], or pack documents by position_ids"
        )
    return mask[:, :total].to(torch.bool)


def _row_lengths(mask: torch.Tensor, total: int) -> torch.Tensor:
    """A right-padding mask's lengths, int32 [B]. Any other mask is an error, by an assertion on the device where asking
    would wait for it."""
    mask = _two_dimensional(mask, total)
    resumes = (mask[:, 1:] & ~mask[:, :-1]).any()
    message = "attention_mask has padding before a token: attention 's2' trains with right padding only"
    if not may_wait(mask, training=True):
        torch._assert_async(~resumes, message)
    elif bool(resumes):
        raise ValueError(message)
    return mask.sum(-1, dtype=torch.int32)

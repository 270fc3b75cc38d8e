"""Shifted sparse attention in torch's own words, every form that a user might write.

Each function takes a case and gives a function of q, k, v in the case's layout. Which case each can compute is said in
``attention.candidates``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.attention_cases import AttentionCase
from benchmarks.candidate import Function
from benchmarks.peers.varlen import Call, group_ends


def definition(case: AttentionCase, device: torch.device) -> Function:
    """The package's readable reference, which stores all scores."""
    from jmlr_kernels.shifted_attention.reference import shifted_sparse_attention_reference

    arguments: dict[str, Any] = case.arguments(device)
    return lambda q, k, v: shifted_sparse_attention_reference(q, k, v, case.group_size, **arguments)


# --------------------------------------------------------------------------- FlexAttention


def mask_of(case: AttentionCase, device: torch.device) -> Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]:
    """The definition as a mask of (batch row, query head, query, key)."""
    group_size, half = case.group_size, case.heads // 2
    shift = group_size - group_size // 2
    ends = torch.tensor(case.lengths(), device=device)
    starts = torch.tensor([start for start, _ in case.documents()], device=device)
    document = torch.arange(len(ends), device=device).repeat_interleave(ends)  # of each packed token

    def same_group(head: Tensor, i: Tensor, j: Tensor) -> Tensor:
        moved = torch.where(head >= half, shift, 0)
        return (j <= i) & ((i + moved) // group_size == (j + moved) // group_size)

    def packed(_: Tensor, head: Tensor, i: Tensor, j: Tensor) -> Tensor:
        start = starts[document[i]]
        return (document[i] == document[j]) & same_group(head, i - start, j - start)

    def padded(row: Tensor, head: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return (i < ends[row]) & same_group(head, i, j)

    def dense(_: Tensor, head: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return same_group(head, i, j)

    return {"packed": packed, "padded": padded, "dense": dense}[case.layout]


def block_mask(case: AttentionCase, device: torch.device) -> Any:
    """The block mask of all heads, made from one head of each half: a mask of every pair and head fills a GPU."""
    from torch.nn.attention.flex_attention import BlockMask, create_block_mask

    mask = mask_of(case, device)
    half = case.heads // 2
    rows = case.batch if case.layout == "padded" else None
    first_and_last = torch.tensor([0, case.heads - 1], device=device)
    two = create_block_mask(
        lambda row, head, i, j: mask(row, first_and_last[head], i, j), rows, 2, case.length, case.length, device=device
    )
    which = (torch.arange(case.heads, device=device) >= half).long()

    def of_all(blocks: Tensor | None) -> Tensor | None:
        return None if blocks is None else blocks.index_select(1, which)

    kv_num_blocks, kv_indices = of_all(two.kv_num_blocks), of_all(two.kv_indices)
    assert kv_num_blocks is not None and kv_indices is not None
    return BlockMask.from_kv_blocks(
        kv_num_blocks,
        kv_indices,
        of_all(two.full_kv_num_blocks),
        of_all(two.full_kv_indices),
        BLOCK_SIZE=two.BLOCK_SIZE,
        mask_mod=mask,
        seq_lengths=(case.length, case.length),
    )


def flex(
    case: AttentionCase, device: torch.device, mode: str | None = None, options: dict[str, Any] | None = None
) -> Function:
    """FlexAttention with the definition as its mask; compiled, but on a CPU. The block mask is made here, once."""
    from torch.nn.attention.flex_attention import flex_attention

    blocks = block_mask(case, device)
    # A row of padding sees nothing; elsewhere every row sees itself, and the kernel may rely on it.
    kernel_options: Any = {"ROWS_GUARANTEED_SAFE": case.layout != "padded"} | (options or {})
    attend: Callable[..., Any] = flex_attention
    if device.type == "cuda":
        # The backward alone is timed over a graph that is kept.
        torch._functorch.config.donated_buffer = False  # type: ignore[attr-defined]
        attend = torch.compile(flex_attention, dynamic=False, mode=mode)

    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        packed = case.layout == "packed"
        q, k, v = ((x[None] if packed else x).transpose(1, 2) for x in (q, k, v))
        grouped = case.heads != case.kv_heads
        out = attend(q, k, v, block_mask=blocks, enable_gqa=grouped, kernel_options=kernel_options).transpose(1, 2)
        return out[0] if packed else out

    return attention


# --------------------------------------------------------------------------- scaled_dot_product_attention


def sdpa(backend: SDPBackend | None, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Dense causal attention of [B, S, H, D], by the backend that is forced, if any."""
    q, k, v = (tensor.transpose(1, 2) for tensor in (q, k, v))
    grouped = q.shape[1] != k.shape[1]
    if backend is None:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=grouped).transpose(1, 2)
    with sdpa_kernel(backend):
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=grouped).transpose(1, 2)


def sdpa_groups(case: AttentionCase, device: torch.device) -> Function:
    """Each group a batch row of SDPA: one call for the plain half, one for whole shifted groups, one for the ends.

    For dense rows of whole groups of even size, and kv heads that can be cut where the query heads are.
    """
    backend = SDPBackend.CUDNN_ATTENTION if device.type == "cuda" else None
    batch, size, half = case.batch, case.group_size, case.group_size // 2

    def rows(tensor: Tensor, length: int) -> Tensor:
        return tensor.reshape(-1, length, *tensor.shape[2:])

    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        (q0, q1), (k0, k1), (v0, v1) = (tensor.chunk(2, dim=2) for tensor in (q, k, v))
        plain = sdpa(backend, *(rows(tensor, size) for tensor in (q0, k0, v0))).reshape(q0.shape)
        middle = [rows(tensor[:, half:-half], size) for tensor in (q1, k1, v1)]
        inner = sdpa(backend, *middle).reshape(batch, -1, *q1.shape[2:])
        ends = [torch.cat([tensor[:, :half], tensor[:, -half:]]) for tensor in (q1, k1, v1)]
        first, last = sdpa(backend, *ends).chunk(2)
        return torch.cat([plain, torch.cat([first, inner, last], dim=1)], dim=2)

    return attention


# --------------------------------------------------------------------------- LongLoRA


def longlora_copies(case: AttentionCase, device: torch.device, call: Call) -> Function:
    """The data movement of LongLoRA's flash path around one varlen call, for dense rows of whole groups.

    k and v repeated to all heads; q, k, v stacked; head halves made batch rows; padding (of which there is none)
    gathered away and scattered back. Its indices are made here and not in each call: more than the original does.
    """
    batch, length, heads, dim = case.batch, case.length, case.heads, case.dim
    half, ratio = heads // 2, heads // case.kv_heads
    # Rows of the halves alternate: of each sequence first the plain half, then the shifted one.
    ends = [
        2 * row * length + shifted * length + end
        for row in range(batch)
        for shifted in (False, True)
        for end in group_ends([length], case.group_size, shifted)[:-1]
    ]
    bounds = torch.tensor([*ends, 2 * batch * length], dtype=torch.int32, device=device)
    kept = torch.arange(2 * batch * length, device=device)

    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        k, v = k.repeat_interleave(ratio, dim=2), v.repeat_interleave(ratio, dim=2)
        qkv = torch.stack([q, k, v], dim=2).view(batch, length, 3, 2, half, dim)
        rows = qkv.permute(0, 3, 1, 2, 4, 5).reshape(2 * batch * length, 3, half, dim)
        unpadded = rows.index_select(0, kept)
        q, k, v = unpadded.unbind(1)
        out = call(q, k, v, bounds, case.group_size)
        padded = torch.zeros_like(out).index_copy(0, kept, out)
        return padded.view(batch, 2, length, half, dim).transpose(1, 2).reshape(batch, length, heads, dim)

    return attention

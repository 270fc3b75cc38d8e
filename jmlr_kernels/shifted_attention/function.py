"""The public function, its autograd rule and the fake kernels of its two operations."""

from __future__ import annotations

from typing import Any

import torch
from torch.autograd.function import once_differentiable

from .. import ops
from . import config

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
BOUNDARIES = ("split", "wrap")


def shifted_sparse_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    group_size: int,
    *,
    cu_seqlens: torch.Tensor | None = None,
    seq_lens: torch.Tensor | None = None,
    boundary: str = "split",
    scale: float | None = None,
    backend: str = "auto",
) -> torch.Tensor:
    """Causal attention inside groups of tokens, shifted by half a group in the second half of the query heads.

    Per query head h and position i of a document::

        group(i, h) = i // G                      for h <  H // 2
        group(i, h) = (i + G - G // 2) // G       for h >= H // 2
        i attends to j  iff  j <= i  and  group(i, h) == group(j, h)  and  j is not padding

    This is the attention with which LongLoRA (Chen et al., arXiv 2309.12307) trains, on its flash path.
    ``jmlr_kernels.shifted_attention.reference`` is the same in readable torch.

    Args:
        q: [B, S, H, D], float16, bfloat16, float32 (or float64 on the torch backend), any strides but a unit stride
            in D. With `cu_seqlens`, [T, H, D].
        k, v: [B, S, Hkv, D] (or [T, Hkv, D]), same dtype; H is a multiple of Hkv, which may be odd.
        group_size: G >= 2, in tokens. A length, never a ratio of S: otherwise padding would change the result.
        cu_seqlens: int32 [N + 1], starts at 0, on q's device: packed documents. Groups restart in each document;
            tokens past the last boundary are padding. Values are checked on CPU tensors only (a check on a GPU would
            wait for it).
        seq_lens: int32 [B], on q's device: tokens per row before right padding. Padding gives zeros and gets zero
            gradients, whatever it holds.
        boundary: "split" (half groups at both ends), or "wrap", LongLoRA's non-flash path, in which the first
            tokens of a document read its last ones; for comparison only.
        scale: multiplies the scores; D ** -0.5 by default.
        backend: "auto", "cuda", "triton" (both D up to 256) or "torch". A forced backend raises where it cannot run.

    Returns:
        q's shape and dtype, contiguous. Under autocast, the autocast dtype.

    Raises:
        ValueError: a shape, dtype, device or option that the operation does not define.
        RuntimeError: a forced backend that cannot run here.

    The backward pass is deterministic on every backend; a second derivative is not defined. Forward memory of the
    Triton kernels is the output and one float32 per query row and head.
    """
    if ops.any_autocast():
        q, k, v = _autocast(q, k, v)
    head_dim = _check(q, k, v, group_size, cu_seqlens, seq_lens, boundary)
    scale = head_dim**-0.5 if scale is None else float(scale)
    chosen = ops.resolve_backend(backend, q, "shifted_attention_forward")
    if head_dim > config.WIDEST_HEAD and chosen in ("cuda", "triton"):
        chosen = _too_wide(backend)
    wrap = boundary == "wrap"
    if torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad):
        return ops.apply(_ShiftedAttention, q, k, v, cu_seqlens, seq_lens, group_size, wrap, scale, chosen)
    return ops.call("shifted_attention_forward", q, k, v, group_size, cu_seqlens, seq_lens, wrap, scale, chosen)[0]


class _ShiftedAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        cu_seqlens: torch.Tensor | None,
        seq_lens: torch.Tensor | None,
        group_size: int,
        wrap: bool,
        scale: float,
        backend: str,
    ) -> torch.Tensor:
        out, lse = ops.call(
            "shifted_attention_forward", q, k, v, group_size, cu_seqlens, seq_lens, wrap, scale, backend
        )
        ctx.save_for_backward(q, k, v, out, lse, cu_seqlens, seq_lens)
        ctx.options = (group_size, wrap, scale, backend)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: torch.Tensor) -> tuple[Any, ...]:
        q, k, v, out, lse, cu_seqlens, seq_lens = ctx.saved_tensors
        group_size, wrap, scale, backend = ctx.options
        lengths, options = (cu_seqlens, seq_lens), (wrap, scale, backend)
        dq, dk, dv = ops.call("shifted_attention_backward", grad_out, q, k, v, out, lse, group_size, *lengths, *options)
        return dq, dk, dv, None, None, None, None, None, None


# --------------------------------------------------------------------------- the operations' fakes


def lse_like(q: torch.Tensor) -> torch.Tensor:
    """An unwritten log-sum-exp for q: float32 (float64 for float64), [B, H, S], or [H, T] for packed q."""
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    if q.dim() == 3:
        return torch.empty((q.shape[1], q.shape[0]), dtype=dtype, device=q.device)
    return torch.empty((q.shape[0], q.shape[2], q.shape[1]), dtype=dtype, device=q.device)


def contiguous_like(tensor: torch.Tensor) -> torch.Tensor:
    """An unwritten contiguous tensor, whatever the strides of `tensor`."""
    return torch.empty(tensor.shape, dtype=tensor.dtype, device=tensor.device)


def fake_forward(q: torch.Tensor, *_: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Shapes of (out, lse); takes the forward operation's arguments."""
    return contiguous_like(q), lse_like(q)


def fake_backward(
    grad_out: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *_: Any
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Shapes of (dq, dk, dv); takes the backward operation's arguments."""
    return contiguous_like(q), contiguous_like(k), contiguous_like(v)


# --------------------------------------------------------------------------- arguments


@torch.compiler.assume_constant_result  # warns when it is compiled
def _too_wide(requested: str) -> str:
    reason = f"the GPU kernels take heads of at most {config.WIDEST_HEAD} dimensions"
    if requested != "auto":
        raise RuntimeError(f"backend={requested!r} cannot run: {reason}; use backend='torch'")
    ops._warn_once(f"jmlr_kernels falls back to plain torch: {reason}")
    return "torch"


def _autocast(*tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """The rule of torch's own attention: under autocast, floating inputs but float64 take the autocast dtype."""
    device = tensors[0].device.type
    if not (torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)):
        return tensors
    dtype = torch.get_autocast_dtype(device)
    return tuple(
        tensor.to(dtype) if tensor.is_floating_point() and tensor.dtype != torch.float64 else tensor
        for tensor in tensors
    )


def _check(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    group_size: int,
    cu_seqlens: torch.Tensor | None,
    seq_lens: torch.Tensor | None,
    boundary: str,
) -> int:
    """The dimension of a head; raises ValueError where an argument does not fit."""
    if boundary not in BOUNDARIES:
        raise ValueError(f"boundary={boundary!r}: choose 'split' or 'wrap'")
    if (type(group_size) is not int and not hasattr(group_size, "__index__")) or group_size < 2:
        raise ValueError(f"group_size={group_size!r}: give a length of at least 2 tokens as an int, not a ratio")
    if cu_seqlens is not None and seq_lens is not None:
        raise ValueError("cu_seqlens and seq_lens exclude each other: packed rows have no padding; give one of them")
    shape, kv_shape, dim = q.shape, k.shape, 4 if cu_seqlens is None else 3
    if len(shape) != dim:
        packed = cu_seqlens is not None
        layout = "[T, H, D] with cu_seqlens" if packed else "[B, S, H, D] (for packed [T, H, D] give cu_seqlens)"
        raise ValueError(f"q has shape {tuple(shape)}; expected {layout}")
    if (
        kv_shape != v.shape
        or len(kv_shape) != dim
        or kv_shape[0] != shape[0]
        or kv_shape[dim - 3] != shape[dim - 3]
        or kv_shape[-1] != shape[-1]
    ):
        raise ValueError(
            f"k {tuple(kv_shape)} and v {tuple(v.shape)} must have the shape of q {tuple(shape)} but for the heads"
        )
    heads, kv_heads, head_dim = shape[-2], kv_shape[-2], shape[-1]
    if kv_heads == 0 or heads == 0 or heads % kv_heads != 0:
        raise ValueError(f"{heads} query heads over {kv_heads} kv heads: give a multiple of the kv heads")
    if head_dim == 0:
        raise ValueError(f"q has shape {tuple(shape)}: give heads of at least one dimension")
    dtype, device = q.dtype, q.device
    if not (k.dtype == dtype == v.dtype) or dtype not in DTYPES:
        raise ValueError(
            f"q, k, v are {dtype}, {k.dtype}, {v.dtype}: cast them to one floating dtype of 16, 32 or 64 bits"
        )
    if not (k.device == device == v.device):
        raise ValueError(f"q, k, v are on {device}, {k.device}, {v.device}: move them to one device")
    if head_dim > 1 and not (q.stride(-1) == k.stride(-1) == v.stride(-1) == 1):
        name, tensor = next((n, t) for n, t in (("q", q), ("k", k), ("v", v)) if t.stride(-1) != 1)
        raise ValueError(f"{name} has stride {tensor.stride(-1)} in its last dimension: call {name}.contiguous()")
    if cu_seqlens is not None:
        _check_lengths("cu_seqlens", cu_seqlens, q, None)
    if seq_lens is not None:
        _check_lengths("seq_lens", seq_lens, q, q.shape[0])
    return head_dim


def _check_lengths(name: str, lengths: torch.Tensor, q: torch.Tensor, expected: int | None) -> None:
    if not isinstance(lengths, torch.Tensor):
        raise ValueError(f"{name} is a {type(lengths).__name__}: give a 1-D int32 tensor")
    if lengths.dtype != torch.int32 or lengths.dim() != 1:
        raise ValueError(f"{name} is {lengths.dtype} of shape {tuple(lengths.shape)}: give a 1-D int32 tensor")
    if lengths.device != q.device:
        raise ValueError(f"{name} is on {lengths.device} and q on {q.device}: move it there")
    if expected is None and lengths.shape[0] < 1:
        raise ValueError("cu_seqlens is empty: give [0, end of document 1, ..., end of document N]")
    if expected is not None and lengths.shape[0] != expected:
        raise ValueError(f"{name} has {lengths.shape[0]} entries for a batch of {expected}: give one per row")
    if lengths.device.type != "cpu" or torch.compiler.is_compiling() or type(lengths) is not torch.Tensor:
        return
    values = lengths.tolist()
    if expected is not None:
        if any(value < 0 or value > q.shape[1] for value in values):
            raise ValueError(f"seq_lens {values} must lie between 0 and the padded length {q.shape[1]}")
    elif values[0] != 0 or values[-1] > q.shape[0] or any(a > b for a, b in zip(values[:-1], values[1:], strict=True)):
        raise ValueError(f"cu_seqlens must start at 0, never decrease and end at or before {q.shape[0]}: got {values}")

"""Shifted sparse attention on the emulated CUDA kernels: arguments and results of its two operations, CPU tensors.

Every output is filled with NaN first, so that what no kernel writes shows."""

from __future__ import annotations

from types import ModuleType

import host_module
import torch
from host_module import load

from jmlr_kernels.shifted_attention.function import lse_like

# Another build of the kernels than load() gives, for seeded bugs.
kernels: ModuleType | None = None


def device(number=0, kilobytes=163):
    """As ``host_module.device``, of the build in use."""
    return host_module.device(kernels or load(), number, kilobytes)


def poisoned(like):
    return torch.full(tuple(like.shape), torch.nan, dtype=like.dtype)


def forward(q, k, v, group_size, cu_seqlens, seq_lens, wrap, scale, seed=0):
    """(out, lse). `seed` draws the order in which blocks and warps take their turns."""
    out, lse = poisoned(q), poisoned(lse_like(q))
    (kernels or load()).shifted_attention_forward(
        q, k, v, out, lse, group_size, cu_seqlens, seq_lens, wrap, scale, seed
    )
    return out, lse


def backward(grad_out, q, k, v, out, lse, group_size, cu_seqlens, seq_lens, wrap, scale, seed=0):
    """(dq, dk, dv)."""
    delta, *grads = (poisoned(x) for x in (lse, q, k, v))
    (kernels or load()).shifted_attention_backward(
        grad_out, q, k, v, out, lse, delta, *grads, group_size, cu_seqlens, seq_lens, wrap, scale, seed
    )
    return tuple(grads)


def results(q, k, v, grad, group_size, *, cu_seqlens=None, seq_lens=None, boundary="split", scale=None, seed=0):
    """(out, dq, dk, dv) for one output gradient; options as those of the public function."""
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    options = (group_size, cu_seqlens, seq_lens, boundary == "wrap", scale, seed)
    out, lse = forward(q, k, v, *options)
    return out, *backward(grad, q, k, v, out, lse, *options)

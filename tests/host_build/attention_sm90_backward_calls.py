"""The backward pass of shifted sparse attention on the emulated CUDA kernels of compute capability 9.0, CPU tensors.

Every output is filled with NaN first, so that what no kernel writes shows."""

from __future__ import annotations

from types import ModuleType

import host_module
import torch
from attention_calls import poisoned
from host_module import load

from jmlr_kernels.shifted_attention import torch_grouped

# Another build of the kernels than load() gives, for seeded bugs.
kernels: ModuleType | None = None


def backward(grad_out, q, k, v, out, lse, group_size, cu_seqlens, seq_lens, scale, processors=3, seed=0):
    """(dq, dk, dv) of a GPU with so many multiprocessors; ValueError where these kernels do not take the tensors.

    `seed` draws the order in which blocks and warps take their turns.
    """
    module = kernels or load()
    delta, *grads = (poisoned(x) for x in (lse, q, k, v))
    with host_module.device(module, 0, 227):
        module.shifted_attention_sm90_backward(
            grad_out, q, k, v, out, lse, delta, *grads, group_size, cu_seqlens, seq_lens, scale, processors, seed
        )
    return tuple(grads)


def results(q, k, v, grad, group_size, *, cu_seqlens=None, seq_lens=None, scale=None, processors=3, seed=0):
    """(dq, dk, dv) for one output gradient, with outputs of plain torch; options as those of the public function."""
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    clean = (x.nan_to_num(0, 0, 0).contiguous() for x in (q, k, v))
    with torch.no_grad():
        out, lse = torch_grouped.forward(*clean, group_size, cu_seqlens, seq_lens, False, scale)
    out[lse.movedim(-2, -1) == torch.inf] = torch.nan  # what stands beside padding is not read
    return backward(grad, q, k, v, out, lse, group_size, cu_seqlens, seq_lens, scale, processors, seed)

"""Shifted sparse attention on the emulated CUDA kernels of compute capability 9.0: arguments and results, CPU tensors.

Every output is filled with NaN first, so that what no kernel writes shows."""

from __future__ import annotations

from types import ModuleType

import host_module
from attention_calls import poisoned
from host_module import load

from jmlr_kernels.shifted_attention.function import lse_like

# Another build of the kernels than load() gives, for seeded bugs.
kernels: ModuleType | None = None


def device(number=0):
    """As ``host_module.device``: a GPU of this number, with the shared memory of compute capability 9.0."""
    return host_module.device(kernels or load(), number, 227)


def serves(q, k, v, *, packed=None, boundary="split"):
    """Whether these kernels take such tensors; `packed`: their cu_seqlens."""
    return (kernels or load()).shifted_attention_sm90_serves(q, k, v, packed, boundary == "wrap")


def forward(q, k, v, group_size, *, cu_seqlens=None, seq_lens=None, scale=None, processors=3, seed=0):
    """(out, lse) of a GPU with so many multiprocessors. `seed` draws the order in which blocks and warps take their
    turns."""
    out, lse = poisoned(q), poisoned(lse_like(q))
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    with device():
        (kernels or load()).shifted_attention_sm90_forward(
            q, k, v, out, lse, group_size, cu_seqlens, seq_lens, scale, processors, seed
        )
    return out, lse

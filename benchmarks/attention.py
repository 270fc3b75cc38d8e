"""Shifted sparse attention: cases, baselines and their exact work.

The baselines, each computing the same function unless marked:

* ``torch``: the package's plain-torch backend.
* ``definition``: the readable reference, which stores all scores (short sequences only).
* ``varlen-halves``: two ``varlen_attn`` calls on head-slice views, no input copied. The strongest general form.
* ``flex``: compiled FlexAttention with the mask as a block mask.
* ``sdpa-groups``: groups as batch rows, cuDNN forced where it exists; the half groups at the ends apart.
* ``longlora-copies``: LongLoRA's own layout, both head halves stacked into the batch, k and v repeated.
* ``sdpa-dense-cudnn``, ``sdpa-dense-flash``: dense causal attention; **another function**, shown as the yardstick.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

import jmlr_kernels
from benchmarks.candidate import Candidate

Attention = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]

# Useful TFLOP/s (forward, backward) that an H200 must reach in bf16 at D = 128, by group size.
H200_BARS = {512: (315.0, 160.0), 1024: (425.0, 240.0), 2048: (520.0, 370.0)}
DEFINITION_LIMIT = 2048  # longer sequences would store gigabytes of scores


@dataclass(frozen=True)
class AttentionCase:
    """One shape: q [batch, length, heads, dim], k and v with kv_heads, groups of a quarter of the length."""

    length: int
    heads: int = 32
    kv_heads: int = 32
    dim: int = 128
    batch: int = 1

    @property
    def group_size(self) -> int:
        return self.length // 4

    @property
    def name(self) -> str:
        return f"S={self.length} G={self.group_size} H={self.heads}/{self.kv_heads} D={self.dim} B={self.batch}"

    def pairs(self) -> int:
        """Exact number of score pairs over the batch and all query heads."""
        return self.batch * jmlr_kernels.attention_pairs(self.length, self.group_size).total(self.heads)

    def forward_flops(self) -> int:
        return 4 * self.dim * self.pairs()

    def backward_flops(self) -> int:
        return 10 * self.dim * self.pairs()

    def inputs(self, device: torch.device, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
        """q, k, v that ask for gradients, and a random gradient of the output."""
        generator = torch.Generator(device=device).manual_seed(0)

        def random(heads: int) -> torch.Tensor:
            shape = (self.batch, self.length, heads, self.dim)
            return torch.randn(shape, generator=generator, device=device, dtype=torch.float32).to(dtype)

        q, k, v = (random(heads).requires_grad_() for heads in (self.heads, self.kv_heads, self.kv_heads))
        return q, k, v, random(self.heads)


GPU_CASES = tuple(
    AttentionCase(length, kv_heads=kv_heads, batch=16384 // length)  # 16k tokens each, as in FlashAttention-3's tables
    for length in (4096, 8192, 2048, 16384)
    for kv_heads in (32, 8)
)
CPU_CASES = (
    AttentionCase(256, heads=4, kv_heads=4, dim=32, batch=12),
    AttentionCase(1024, heads=9, kv_heads=3, dim=64, batch=1),
)
DRY_CASES = (AttentionCase(64, heads=4, kv_heads=2, dim=32, batch=2),)


def ours(case: AttentionCase, backend: str = "auto") -> Attention:
    """The package's own operation."""

    def attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return jmlr_kernels.shifted_sparse_attention(q, k, v, case.group_size, backend=backend)

    return attention


def definition(case: AttentionCase) -> Attention:
    """The readable reference."""
    from jmlr_kernels.shifted_attention.reference import shifted_sparse_attention_reference

    return lambda q, k, v: shifted_sparse_attention_reference(q, k, v, case.group_size)


def _bounds(case: AttentionCase, shifted: bool, device: torch.device) -> torch.Tensor:
    """cu_seqlens of the groups of one half of the heads, over the flattened batch: int32 [groups + 1]."""
    first = case.group_size // 2 if shifted else case.group_size
    row = [0, *range(first, case.length, case.group_size)]
    ends = [base * case.length + start for base in range(case.batch) for start in row]
    return torch.tensor([*ends, case.batch * case.length], dtype=torch.int32, device=device)


def _varlen() -> Callable[..., torch.Tensor]:
    """``varlen_attn`` made causal, whatever this torch calls that."""
    from torch.nn.attention.varlen import varlen_attn

    parameters = inspect.signature(varlen_attn).parameters
    options: dict[str, Any] = {"window_size": (-1, 0)} if "window_size" in parameters else {"is_causal": True}
    grouped = "enable_gqa" in parameters

    def causal(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, bounds: torch.Tensor, longest: int) -> torch.Tensor:
        if q.shape[1] != k.shape[1] and not grouped:
            repeats = q.shape[1] // k.shape[1]
            k, v = k.repeat_interleave(repeats, 1), v.repeat_interleave(repeats, 1)
        extra: dict[str, Any] = {"enable_gqa": True} if q.shape[1] != k.shape[1] else {}
        out = varlen_attn(q, k, v, bounds, bounds, longest, longest, **options, **extra)
        assert isinstance(out, torch.Tensor)  # no auxiliary output was asked for
        return out

    return causal


def varlen_halves(case: AttentionCase, device: torch.device) -> Attention:
    """Two calls on views of the two head halves; needs an even number of kv heads."""
    varlen, bounds = _varlen(), [_bounds(case, shifted, device) for shifted in (False, True)]

    def attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        flat = [tensor.flatten(0, 1) for tensor in (q, k, v)]
        outs = [
            varlen(*(tensor.chunk(2, dim=1)[half] for tensor in flat), bounds[half], case.group_size) for half in (0, 1)
        ]
        return torch.cat(outs, dim=1).view_as(q)

    return attention


def longlora_copies(case: AttentionCase, device: torch.device) -> Attention:
    """The layout of LongLoRA's flash path: k and v repeated, head halves stacked as batch rows, one varlen call."""
    varlen = _varlen()
    plain, shifted = (_bounds(case, half, device) for half in (False, True))
    bounds = torch.cat([plain, shifted[1:] + case.batch * case.length])

    def attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        repeats = case.heads // case.kv_heads
        k, v = k.repeat_interleave(repeats, 2), v.repeat_interleave(repeats, 2)
        stacked = [torch.cat(tensor.chunk(2, dim=2)).flatten(0, 1) for tensor in (q, k, v)]
        out = varlen(*stacked, bounds, case.group_size).view(2 * case.batch, case.length, case.heads // 2, case.dim)
        return torch.cat(out.chunk(2), dim=2)

    return attention


def flex(case: AttentionCase, device: torch.device) -> Attention:
    """Compiled FlexAttention with the definition as its mask."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    group_size, half = case.group_size, case.heads // 2
    shift = group_size - group_size // 2

    def mask(_: torch.Tensor, head: torch.Tensor, i: torch.Tensor, j: torch.Tensor) -> torch.Tensor:
        moved = torch.where(head >= half, shift, 0)
        return (j <= i) & ((i + moved) // group_size == (j + moved) // group_size)

    blocks = create_block_mask(mask, None, case.heads, case.length, case.length, device=device)
    compiled = torch.compile(flex_attention, dynamic=False)

    def attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        q, k, v = (tensor.transpose(1, 2) for tensor in (q, k, v))
        return compiled(q, k, v, block_mask=blocks, enable_gqa=case.heads != case.kv_heads).transpose(1, 2)

    return attention


def _sdpa(backend: SDPBackend | None, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    q, k, v = (tensor.transpose(1, 2) for tensor in (q, k, v))
    grouped = q.shape[1] != k.shape[1]
    if backend is None:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=grouped).transpose(1, 2)
    with sdpa_kernel(backend):
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=grouped).transpose(1, 2)


def sdpa_groups(case: AttentionCase, device: torch.device) -> Attention:
    """Each group a batch row of SDPA: one call for the plain half, one for whole shifted groups, one for the ends."""
    backend = SDPBackend.CUDNN_ATTENTION if device.type == "cuda" else None
    batch, size, half = case.batch, case.group_size, case.group_size // 2

    def rows(tensor: torch.Tensor, length: int) -> torch.Tensor:
        return tensor.reshape(-1, length, *tensor.shape[2:])

    def attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        (q0, q1), (k0, k1), (v0, v1) = (tensor.chunk(2, dim=2) for tensor in (q, k, v))
        plain = _sdpa(backend, *(rows(tensor, size) for tensor in (q0, k0, v0))).reshape(q0.shape)
        middle = [rows(tensor[:, half:-half], size) for tensor in (q1, k1, v1)]
        inner = _sdpa(backend, *middle).reshape(batch, -1, *q1.shape[2:])
        ends = [torch.cat([tensor[:, :half], tensor[:, -half:]]) for tensor in (q1, k1, v1)]
        first, last = _sdpa(backend, *ends).chunk(2)
        return torch.cat([plain, torch.cat([first, inner, last], dim=1)], dim=2)

    return attention


def exact(case: AttentionCase, tensors: list[torch.Tensor], grad: torch.Tensor) -> list[torch.Tensor]:
    """Output and gradients by the plain-torch backend in float64."""
    wide = [tensor.detach().double().requires_grad_() for tensor in tensors]
    out = ours(case, "torch")(*wide)
    return [out.detach(), *torch.autograd.grad(out, wide, grad.to(out.dtype))]


def candidates(case: AttentionCase, device: torch.device, compiled: int) -> dict[str, Candidate]:
    """Every way to compute this case, ours first. `compiled`: 0 leaves out torch.compile."""
    makers: dict[str, Callable[[], Attention]] = {
        "jmlr": lambda: ours(case),
        "torch": lambda: ours(case, "torch"),
    }
    halves = case.kv_heads % 2 == 0  # an odd number of kv heads cannot be cut where the query heads are
    if halves:
        makers["sdpa-groups"] = lambda: sdpa_groups(case, device)
    if case.length <= DEFINITION_LIMIT:
        makers["definition"] = lambda: definition(case)
    if device.type == "cuda":
        if halves:
            makers["varlen-halves"] = lambda: varlen_halves(case, device)
        makers["longlora-copies"] = lambda: longlora_copies(case, device)
        if compiled:
            makers["flex"] = lambda: flex(case, device)
        makers["sdpa-dense-cudnn"] = lambda: partial(_sdpa, SDPBackend.CUDNN_ATTENTION)
        makers["sdpa-dense-flash"] = lambda: partial(_sdpa, SDPBackend.FLASH_ATTENTION)
    else:
        makers["sdpa-dense"] = lambda: partial(_sdpa, None)
    return {
        name: Candidate(
            make, compiled_with="flex" if name == "flex" else None, comparable=not name.startswith("sdpa-dense")
        )
        for name, make in makers.items()
    }


def is_baseline(name: str) -> bool:
    """Whether a candidate computes the same function and is not ours: only those count for the ratio."""
    return name != "jmlr" and not name.startswith("sdpa-dense")

"""Every Triton configuration that this family can launch, for compiling ahead of time without a GPU."""

from __future__ import annotations

from typing import Any

import torch
from triton.runtime.jit import JITFunction

from . import config
from .triton_backward import backward_dkdv_kernel, backward_dq_kernel
from .triton_backward_tma import backward_dkdv_tma_kernel, backward_dq_tma_kernel
from .triton_forward import forward_kernel
from .triton_forward_tma import forward_tma_kernel

_KERNELS: dict[str, JITFunction] = {
    "forward": forward_kernel,
    "backward_dq": backward_dq_kernel,
    "backward_dkdv": backward_dkdv_kernel,
    "forward_tma": forward_tma_kernel,
    "backward_dq_tma": backward_dq_tma_kernel,
    "backward_dkdv_tma": backward_dkdv_tma_kernel,
}
_DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
# One exact and one masked head dimension per tile class; 96 compiles like 80.
_HEAD_DIMS = (32, 64, 80, 128, 256)
_VARIANTS: dict[str, dict[str, bool]] = {
    "dense": {"PACKED": False, "HAS_LENS": False, "WRAP": False},
    "padded": {"PACKED": False, "HAS_LENS": True, "WRAP": False},
    "packed": {"PACKED": True, "HAS_LENS": False, "WRAP": False},
    "wrap": {"PACKED": False, "HAS_LENS": True, "WRAP": True},
}
_FLOAT32_POINTERS = ("lse", "delta")
_LENGTHS = {"cu_seqlens": "PACKED", "seq_lens": "HAS_LENS"}
_INTEGERS = ("rows", "documents", "tiles", "batches", "heads", "ratio", "group_size", "work")
_QUERY_ROWS, _KEY_ROWS = ("q", "grad_out"), ("k", "v")


def configurations(capability: int) -> list[dict[str, Any]]:
    """What to compile for a compute capability (80, 90, 100): kernel x dtype x head dimension x variant x candidate.

    Each entry has "name", "kernel" (the jit function), "signature" (argument -> Triton type or "constexpr"),
    "constexprs", "options" for triton.compile, "attrs" (the divisibility by 16 that the launcher finds in aligned
    tensors; without it loads are not vectorised and the resources are not those of a real launch), and
    "wants_wgmma" (float16 and bfloat16 on sm_90, but for "wrap" with its small tiles).
    """
    return [
        _configuration(kernel, dtype, head_dim, variant, capability, number)
        for kernel in config.KERNELS
        for dtype in _DTYPES
        for head_dim in _HEAD_DIMS
        for variant in _VARIANTS
        if variant != "dense"  # compiles like "padded"
        for number in range(len(_candidates(kernel, dtype, head_dim, capability, variant)))
    ] + [
        _configuration(f"{kernel}_tma", dtype, head_dim, variant, capability, number)
        for kernel in config.KERNELS
        for dtype in _DTYPES
        for head_dim in _HEAD_DIMS
        if config.tma_kernel(kernel, _DTYPES[dtype], head_dim, capability, 1024, False, 1.0)
        for variant in _VARIANTS
        if variant != "wrap"
        for number in range(len(_candidates(f"{kernel}_tma", dtype, head_dim, capability, variant)))
    ]


def _candidates(kernel: str, dtype: str, head_dim: int, capability: int, variant: str) -> tuple[config.Tiles, ...]:
    return config.candidates(kernel, _DTYPES[dtype], head_dim, capability, _VARIANTS[variant]["WRAP"])


def _configuration(
    kernel: str, dtype: str, head_dim: int, variant: str, capability: int, number: int
) -> dict[str, Any]:
    function = _KERNELS[kernel]
    flags = _VARIANTS[variant]
    copies = kernel in config.TMA_KERNELS
    tiles = _candidates(kernel, dtype, head_dim, capability, variant)[number]
    block_d = config.block_d(head_dim)
    constexprs: dict[str, Any] = {
        "HEAD_DIM": head_dim,
        "BLOCK_D": block_d,
        "BLOCK_M": tiles.block_m,
        "BLOCK_N": tiles.block_n,
        "PRECISION": config.input_precision(_DTYPES[dtype], head_dim),
        **{name: flag for name, flag in flags.items() if not (copies and name == "WRAP")},
    }
    constexprs.update({name: None for name, flag in _LENGTHS.items() if not flags[flag]})
    signature, attrs = {}, {}
    for index, name in enumerate(function.arg_names):
        if name in constexprs:
            signature[name] = "constexpr"
        elif name == "scale":
            signature[name] = "fp32"
        elif name in _LENGTHS:
            signature[name] = "*i32"
        elif name in _INTEGERS:
            signature[name] = "i32"
        elif copies and name in _QUERY_ROWS + _KEY_ROWS:
            rows = tiles.block_m if name in _QUERY_ROWS else tiles.block_n
            signature[name] = f"tensordesc<{dtype}[1,1,{rows},{block_d}]>"
        else:
            attrs[(index,)] = [["tt.divisibility", 16]]
            if name.startswith("stride_"):
                signature[name] = "i32"
            else:
                signature[name] = "*fp32" if name in _FLOAT32_POINTERS else f"*{dtype}"
    return {
        "name": f"shifted_attention.{kernel}-{dtype}-d{head_dim}-{variant}" + (f"-{number}" if number else ""),
        "kernel": function,
        "signature": signature,
        "constexprs": constexprs,
        "attrs": attrs,
        "options": {
            "num_warps": tiles.num_warps,
            "num_stages": tiles.num_stages,
            "maxnreg": tiles.registers,
            "enable_fp_fusion": True,
        },
        "wants_wgmma": capability == 90 and dtype != "fp32" and not flags["WRAP"],
    }

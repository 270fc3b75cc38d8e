"""Every Triton configuration that this family can launch, for compiling ahead of time without a GPU."""

from __future__ import annotations

from typing import Any

import torch
from triton.runtime.jit import JITFunction

from . import config
from .triton_backward import backward_dkdv_kernel, backward_dq_kernel
from .triton_forward import forward_kernel

_KERNELS: dict[str, JITFunction] = {
    "forward": forward_kernel,
    "backward_dq": backward_dq_kernel,
    "backward_dkdv": backward_dkdv_kernel,
}
_DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
# One exact and one masked head dimension per tile class; 96 compiles like 80.
_HEAD_DIMS = (32, 64, 80, 128, 256)
_VARIANTS: dict[str, dict[str, bool]] = {
    "padded": {"PACKED": False, "HAS_LENS": True, "WRAP": False},
    "packed": {"PACKED": True, "HAS_LENS": False, "WRAP": False},
    "wrap": {"PACKED": False, "HAS_LENS": False, "WRAP": True},
}
_FLOAT32_POINTERS = ("lse", "delta")
_LENGTHS = {"cu_seqlens": "PACKED", "seq_lens": "HAS_LENS"}


def configurations(capability: int) -> list[dict[str, Any]]:
    """What to compile for a compute capability (80, 90, 100): kernel x dtype x head dimension x variant.

    Each entry has "name", "kernel" (the jit function), "signature" (argument -> Triton type or "constexpr"),
    "constexprs", "options" for triton.compile, "attrs" (the divisibility by 16 that the launcher finds in aligned
    tensors; without it loads are not vectorised and the resources are not those of a real launch), and
    "wants_wgmma" (float16 and bfloat16 on sm_90, but for "wrap" with its small tiles).
    """
    return [
        _configuration(kernel, dtype, head_dim, variant, capability)
        for kernel in config.KERNELS
        for dtype in _DTYPES
        for head_dim in _HEAD_DIMS
        for variant in _VARIANTS
    ]


def _configuration(kernel: str, dtype: str, head_dim: int, variant: str, capability: int) -> dict[str, Any]:
    function = _KERNELS[kernel]
    flags = _VARIANTS[variant]
    tiles = config.tiles(kernel, _DTYPES[dtype], head_dim, capability, flags["WRAP"])
    constexprs: dict[str, Any] = {
        "HEAD_DIM": head_dim,
        "BLOCK_D": config.block_d(head_dim),
        "BLOCK_M": tiles.block_m,
        "BLOCK_N": tiles.block_n,
        "PRECISION": config.input_precision(_DTYPES[dtype], head_dim),
        **flags,
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
        elif name.startswith("stride_"):
            signature[name] = "i32"
            attrs[(index,)] = [["tt.divisibility", 16]]
        elif name in ("rows", "documents", "tiles", "heads", "ratio", "group_size"):
            signature[name] = "i32"
        else:
            signature[name] = "*fp32" if name in _FLOAT32_POINTERS else f"*{dtype}"
            attrs[(index,)] = [["tt.divisibility", 16]]
    return {
        "name": f"shifted_attention.{kernel}-{dtype}-d{head_dim}-{variant}",
        "kernel": function,
        "signature": signature,
        "constexprs": constexprs,
        "attrs": attrs,
        "options": {
            "num_warps": tiles.num_warps,
            "num_stages": tiles.num_stages,
            "enable_fp_fusion": config.ENABLE_FP_FUSION,
        },
        "wants_wgmma": capability == 90 and dtype != "fp32" and not flags["WRAP"],
    }

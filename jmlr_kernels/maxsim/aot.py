"""Every configuration of the MaxSim kernels that can be launched, for compilation without a GPU.

The tiles come from config.py, so what is compiled here is what runs. Optional arguments are taken all together and one
by one: they differ in a few loads each, not in tiles.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import triton.language as tl

from . import config
from .triton_backward import maxsim_document_gradient_kernel, maxsim_query_gradient_kernel, product_types
from .triton_forward import maxsim_forward_kernel

_DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
# One dimension per path: a whole power of two, a padded one, the widest whole tile, chunks without and with a rest.
_DIMENSIONS = (64, 96, 128, 256, 768, 300)
# Query tokens that share documents: one per row tile.
_SHARING_ROWS = (32, 64, 4096)
_OPTIONAL = ("query_mask", "document_mask", "query_weights", "cu_seqlens", "winners")
_VARIANTS: dict[str, tuple[frozenset[str], bool]] = {
    "everything": (frozenset(_OPTIONAL) - {"cu_seqlens"}, False),
    "bare": (frozenset(), False),
    "winners": (frozenset({"winners"}), False),
    "query_mask": (frozenset({"query_mask", "winners"}), False),
    "document_mask": (frozenset({"document_mask", "winners"}), False),
    "weights": (frozenset({"query_weights", "winners"}), False),
    "packed": (frozenset({"cu_seqlens", "winners"}), False),
    "packed_everything": (frozenset(_OPTIONAL), False),
    "candidates": (frozenset({"winners"}), True),
    "candidates_everything": (frozenset(_OPTIONAL) - {"cu_seqlens"}, True),
    "candidates_packed_everything": (frozenset(_OPTIONAL), True),
}
_POINTERS = {
    "query_mask": "*u8",
    "document_mask": "*u8",
    "query_weights": "*fp32",
    "cu_seqlens": "*i32",
    "scores": "*fp32",
    "grad_scores": "*fp32",
    "winners": "*i32",
    "grad_weights": "*fp32",
}


def configurations(capability: int) -> list[dict[str, Any]]:
    """Arguments for triton.compile at one compute capability (80, 90, 100).

    Each dict has "name", "kernel", "signature", "constexprs", "attrs" (the alignment that a launch on ordinary tensors
    has), "options" and "wants_wgmma" (the Hopper tensor-core instruction must appear in the code for capability 90).
    """
    found: list[dict[str, Any]] = []
    for variant, (present, candidates) in _VARIANTS.items():
        for name, dtype in _DTYPES.items():
            # The all-dense variant visits every dimension and row tile; the others differ from it in a few loads.
            dimensions = _DIMENSIONS if variant == "everything" else (128,)
            for dimension in dimensions:
                label = f"{variant}-{name}-d{dimension}"
                found += _forward(capability, label, dtype, name, dimension, present, candidates)
                if "winners" in present:
                    found += _backward(capability, label, dtype, name, dimension, present, candidates)
    return found


def _forward(
    capability: int,
    label: str,
    dtype: torch.dtype,
    name: str,
    dimension: int,
    present: frozenset[str],
    candidates: bool,
) -> Iterator[dict[str, Any]]:
    seen = set()
    for sharing_rows in _SHARING_ROWS:
        tiles = config.forward_tiles(capability, dtype.itemsize, dimension, sharing_rows)
        if tiles in seen or (candidates and sharing_rows == _SHARING_ROWS[0] and dimension != 128):
            continue
        seen.add(tiles)
        constants = {
            "DIMENSION": dimension,
            "BLOCK_ROWS": tiles.rows,
            "BLOCK_TOKENS": tiles.tokens,
            "BLOCK_DIMENSION": tiles.dimension,
            "SEGMENTS": 1 if candidates or sharing_rows < tiles.rows * 2 else tiles.rows // 32,
            "CANDIDATES": candidates,
            "PRECISION": config.product_precision(dtype),
            "NAN_REDUCTION": True,
        }
        yield _configuration(
            f"maxsim_forward-{label}-rows{tiles.rows}",
            maxsim_forward_kernel,
            name,
            present,
            constants,
            tiles,
            wants_wgmma=dtype.itemsize == 2 and tiles.rows >= 64,
        )


def _backward(
    capability: int,
    label: str,
    dtype: torch.dtype,
    name: str,
    dimension: int,
    present: frozenset[str],
    candidates: bool,
) -> Iterator[dict[str, Any]]:
    tiles = config.query_gradient_tiles(capability, dtype.itemsize, dimension)
    constants: dict[str, Any] = {
        "DIMENSION": dimension,
        "BLOCK_ROWS": tiles.rows,
        "BLOCK_DIMENSION": tiles.dimension,
        "CANDIDATES": candidates,
    }
    if "query_weights" in present:
        present = present | {"grad_weights"}
    yield _configuration(
        f"maxsim_query_gradient-{label}", maxsim_query_gradient_kernel, name, present, constants, tiles, False
    )
    tiles = config.document_gradient_tiles(capability, dtype.itemsize, dimension)
    product, precision = product_types(dtype)
    constants = {
        "DIMENSION": dimension,
        "BLOCK_ROWS": tiles.rows,
        "BLOCK_TOKENS": tiles.tokens,
        "BLOCK_DIMENSION": tiles.dimension,
        "DIMENSION_TILES": -(-dimension // tiles.dimension),
        "CANDIDATES": candidates,
        "PRODUCT": product,
        "PRECISION": precision,
    }
    yield _configuration(
        f"maxsim_document_gradient-{label}",
        maxsim_document_gradient_kernel,
        name,
        present,
        constants,
        tiles,
        wants_wgmma=product == tl.bfloat16,
    )


def _configuration(
    name: str,
    kernel: Any,
    element: str,
    present: frozenset[str],
    constants: dict[str, Any],
    tiles: config.ForwardTiles | config.BackwardTiles,
    wants_wgmma: bool,
) -> dict[str, Any]:
    signature: dict[str, str] = {}
    constexprs: dict[tuple[int, ...], Any] = {}
    attrs: dict[tuple[int, ...], list[list[Any]]] = {}
    for position, argument in enumerate(kernel.arg_names):
        optional = argument in _OPTIONAL or argument == "grad_weights"
        if argument in constants:
            signature[argument] = "constexpr"
            constexprs[(position,)] = constants[argument]
        elif optional and argument not in present:
            signature[argument] = "constexpr"
            constexprs[(position,)] = None
        elif argument in _POINTERS or argument in ("queries", "documents", "grad_queries", "grad_documents"):
            signature[argument] = _POINTERS.get(argument, "*" + element)
            attrs[(position,)] = [["tt.divisibility", 16]]
        else:
            signature[argument] = "i32"
            if argument.startswith("stride_"):
                attrs[(position,)] = [["tt.divisibility", 16]]
    return {
        "name": name,
        "kernel": kernel,
        "signature": signature,
        "constexprs": constexprs,
        "attrs": attrs,
        "options": {
            "num_warps": tiles.warps,
            "num_stages": tiles.stages,
            "maxnreg": config.REGISTERS,
            "enable_fp_fusion": True,
        },
        "wants_wgmma": wants_wgmma,
    }

"""Every configuration of the smooth MaxSim kernels that can be launched, for compilation without a GPU.

The tiles come from config_smooth.py, so what is compiled here is what runs. Every embedding dimension is supported: up
to 256 (float32: 32) in one tile, padded to a power of two, and above in chunks; one dimension stands for each path.
Optional arguments are taken all together and one by one: they differ in a few loads each, not in tiles.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from . import config, config_smooth
from .triton_smooth_backward import (
    maxsim_smooth_document_gradient_kernel,
    maxsim_smooth_query_gradient_kernel,
    product_size,
    product_types,
)
from .triton_smooth_forward import maxsim_smooth_forward_kernel

_DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
# One dimension per path: short, whole powers of two, a padded one, the widest whole tile, chunks with and without rest
_DIMENSIONS = (16, 64, 96, 128, 256, 300, 768)
# Query tokens that share documents: one per row tile.
_SHARING_ROWS = (32, 64, 4096)
_OPTIONAL = ("query_mask", "document_mask", "query_weights", "cu_seqlens", "maxima")
_VARIANTS: dict[str, tuple[frozenset[str], bool]] = {
    "everything": (frozenset(_OPTIONAL) - {"cu_seqlens"}, False),
    "bare": (frozenset(), False),
    "maxima": (frozenset({"maxima"}), False),
    "query_mask": (frozenset({"query_mask", "maxima"}), False),
    "document_mask": (frozenset({"document_mask", "maxima"}), False),
    "weights": (frozenset({"query_weights", "maxima"}), False),
    "packed": (frozenset({"cu_seqlens", "maxima"}), False),
    "packed_everything": (frozenset(_OPTIONAL), False),
    "candidates": (frozenset({"maxima"}), True),
    "candidates_everything": (frozenset(_OPTIONAL) - {"cu_seqlens"}, True),
    "candidates_packed_everything": (frozenset(_OPTIONAL), True),
}
_EVERY_DTYPE = ("everything", "bare", "candidates_packed_everything")
_POINTERS = {
    "query_mask": "*u8",
    "document_mask": "*u8",
    "query_weights": "*fp32",
    "cu_seqlens": "*i32",
    "scores": "*fp32",
    "grad_scores": "*fp32",
    "maxima": "*fp32",
    "grad_weights": "*fp32",
}


def configurations(capability: int) -> list[dict[str, Any]]:
    """Arguments for triton.compile at one compute capability (80, 90, 100); keys as tools/aot.py wants them."""
    found: list[dict[str, Any]] = []
    for variant, (present, candidates) in _VARIANTS.items():
        for element, dtype in _DTYPES.items():
            if element != "bf16" and variant not in _EVERY_DTYPE:
                continue
            # The all-dense variant visits every dimension and row tile; the others differ from it in a few loads.
            for dimension in _DIMENSIONS if variant == "everything" else (128,):
                label = f"{variant}-{element}-d{dimension}"
                found += _forward(capability, label, element, dtype, dimension, present, candidates)
                if "maxima" in present:
                    found += _query_gradient(capability, label, element, dtype, dimension, present, candidates)
                    found.append(_document_gradient(capability, label, element, dtype, dimension, present, candidates))
    return found


def _forward(
    capability: int,
    label: str,
    element: str,
    dtype: torch.dtype,
    dimension: int,
    present: frozenset[str],
    candidates: bool,
) -> Iterator[dict[str, Any]]:
    seen = set()
    for sharing_rows in _SHARING_ROWS:
        tiles = config_smooth.forward_tiles(capability, dtype.itemsize, dimension, sharing_rows)
        if tiles in seen:
            continue
        seen.add(tiles)
        constants = {
            **_shared(tiles, dimension, candidates),
            "SEGMENTS": 1 if candidates or sharing_rows < tiles.rows * 2 else tiles.rows // 32,
            "PRECISION": config.product_precision(dtype),
        }
        name = f"maxsim_smooth_forward-{label}-rows{tiles.rows}"
        wgmma = dtype.itemsize == 2 and tiles.rows >= 64
        yield _configuration(name, maxsim_smooth_forward_kernel, element, present, constants, tiles, wgmma)


def _query_gradient(
    capability: int,
    label: str,
    element: str,
    dtype: torch.dtype,
    dimension: int,
    present: frozenset[str],
    candidates: bool,
) -> Iterator[dict[str, Any]]:
    if "query_weights" in present:
        present = present | {"grad_weights"}
    seen = set()
    for sharing_rows in _SHARING_ROWS:
        tiles = config_smooth.query_gradient_tiles(
            capability, dtype.itemsize, product_size(dtype), dimension, sharing_rows
        )
        if tiles in seen:
            continue
        seen.add(tiles)
        constants = _backward_constants(tiles, dtype, dimension, candidates)
        wgmma = dtype.itemsize == 2 and tiles.rows >= 64
        # One split writes the inputs' dtype, several write float32 sums.
        for output in dict.fromkeys((element, "fp32")):
            name = f"maxsim_smooth_query_gradient-{label}-rows{tiles.rows}-{output}"
            found = _configuration(name, maxsim_smooth_query_gradient_kernel, element, present, constants, tiles, wgmma)
            found["signature"]["grad_queries"] = "*" + output
            yield found


def _document_gradient(
    capability: int,
    label: str,
    element: str,
    dtype: torch.dtype,
    dimension: int,
    present: frozenset[str],
    candidates: bool,
) -> dict[str, Any]:
    tiles = config_smooth.document_gradient_tiles(capability, dtype.itemsize, product_size(dtype), dimension)
    constants = _backward_constants(tiles, dtype, dimension, candidates)
    name = f"maxsim_smooth_document_gradient-{label}"
    wgmma = dtype.itemsize == 2
    return _configuration(name, maxsim_smooth_document_gradient_kernel, element, present, constants, tiles, wgmma)


def _shared(tiles: config_smooth.Tiles, dimension: int, candidates: bool) -> dict[str, Any]:
    return {
        "DIMENSION": dimension,
        "BLOCK_ROWS": tiles.rows,
        "BLOCK_TOKENS": tiles.tokens,
        "BLOCK_DIMENSION": tiles.dimension,
        "CANDIDATES": candidates,
    }


def _backward_constants(
    tiles: config_smooth.Tiles, dtype: torch.dtype, dimension: int, candidates: bool
) -> dict[str, Any]:
    product, precision = product_types(dtype)
    return {
        **_shared(tiles, dimension, candidates),
        "BLOCK_OUTPUT": tiles.output,
        "OUTPUT_TILES": -(-dimension // tiles.output),
        "PRODUCT": product,
        "PRECISION": precision,
    }


def _configuration(
    name: str,
    kernel: Any,
    element: str,
    present: frozenset[str],
    constants: dict[str, Any],
    tiles: config_smooth.Tiles,
    wants_wgmma: bool,
) -> dict[str, Any]:
    signature: dict[str, str] = {}
    constexprs: dict[tuple[int, ...], Any] = {}
    attrs: dict[tuple[int, ...], list[list[Any]]] = {}
    for position, argument in enumerate(kernel.arg_names):
        optional = argument in _OPTIONAL or argument == "grad_weights"
        if argument in constants or (optional and argument not in present):
            signature[argument] = "constexpr"
            constexprs[(position,)] = constants.get(argument)
        elif argument in _POINTERS or argument in ("queries", "documents", "grad_queries", "grad_documents"):
            signature[argument] = _POINTERS.get(argument, "*" + element)
            attrs[(position,)] = [["tt.divisibility", 16]]
        elif argument.endswith("_scale"):
            signature[argument] = "fp32"
        else:
            signature[argument] = "i32"
            if argument.startswith("stride_"):
                attrs[(position,)] = [["tt.divisibility", 16]]
    options = {
        "num_warps": tiles.warps,
        "num_stages": tiles.stages,
        "maxnreg": config.REGISTERS,
        "enable_fp_fusion": True,
    }
    return {
        "name": name,
        "kernel": kernel,
        "signature": signature,
        "constexprs": constexprs,
        "attrs": attrs,
        "options": options,
        "wants_wgmma": wants_wgmma,
    }

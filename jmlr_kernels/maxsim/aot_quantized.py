"""Every configuration of the kernel for compressed documents that can be launched, for compilation without a GPU.

Tiles and decoders come from config_compressed.py, so what is compiled here is what runs.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from . import config, config_compressed
from .config_compressed import FLOAT8, FLOAT8_BITS, INT8, RESIDUAL
from .triton_compressed import maxsim_compressed_kernel

_QUERIES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
_FORMATS = {INT8: ("int8", "*i8"), FLOAT8: ("float8", "*fp8e4nv"), FLOAT8_BITS: ("float8bits", "*u8")}
_DIMENSIONS = (64, 96, 128, 768)
# Bits, dimension and type of the centroids: every number of bits, padded and whole, the widest, another table.
_RESIDUALS = [(2, 128, "fp16"), (2, 256, "fp16"), (2, 128, "fp32")]
_RESIDUALS += [(bits, dimension, "fp16") for bits, dimension in ((1, 128), (4, 128), (8, 128))]
_RESIDUALS += [(bits, 96, "fp16") for bits in (1, 2, 4, 8)]
# Query tokens that share documents: one per row tile.
_SHARING_ROWS = (32, 64, 4096)
_OPTIONAL = ("query_mask", "document_mask", "query_weights", "cu_seqlens")
# Optional arguments none and all, padded and packed: they differ in a few loads each, not in tiles.
_VARIANTS: dict[str, tuple[frozenset[str], bool]] = {
    "bare": (frozenset(), False),
    "document_mask": (frozenset({"document_mask"}), False),
    "packed": (frozenset({"cu_seqlens"}), False),
    "packed_everything": (frozenset(_OPTIONAL), False),
    "candidates": (frozenset(_OPTIONAL) - {"cu_seqlens"}, True),
    "candidates_packed": (frozenset(_OPTIONAL), True),
}
_POINTERS = {
    "query_mask": "*u8",
    "document_mask": "*u8",
    "query_weights": "*fp32",
    "cu_seqlens": "*i32",
    "scales": "*fp32",
    "codes": "*i32",
    "field_weights": "*fp32",
    "scores": "*fp32",
}


def configurations(capability: int) -> list[dict[str, Any]]:
    """Arguments for triton.compile at one compute capability (80, 90, 100), in the form that tools/aot.py reads."""
    found: list[dict[str, Any]] = []
    for variant, (present, candidates) in _VARIANTS.items():
        # One variant visits every format, dtype and dimension; the others differ from it in a few loads each.
        full = variant == "packed_everything"
        for name in _QUERIES if full else ("bf16",):
            for stored in (torch.int8, torch.float8_e4m3fn):
                form = config_compressed.format_of(stored, capability, interpreted=False)
                for dimension in _DIMENSIONS if full else (128,):
                    label = f"{_FORMATS[form][0]}-{variant}-{name}-d{dimension}"
                    found += _tiled(capability, label, form, name, dimension, 0, "fp16", present, candidates)
            for bits, dimension, table in _RESIDUALS if full else _RESIDUALS[:1]:
                label = f"residual{bits}-{variant}-{name}-{table}-d{dimension}"
                found += _tiled(capability, label, RESIDUAL, name, dimension, bits, table, present, candidates)
    return found


def _tiled(
    capability: int,
    label: str,
    form: int,
    name: str,
    dimension: int,
    bits: int,
    table: str,
    present: frozenset[str],
    candidates: bool,
) -> Iterator[dict[str, Any]]:
    seen, dtype = set(), _QUERIES[name]
    for sharing_rows in _SHARING_ROWS:
        tiles = config_compressed.compressed_tiles(
            capability, form, dtype.itemsize, dimension, sharing_rows, _QUERIES[table].itemsize
        )
        if tiles in seen:
            continue
        seen.add(tiles)
        constants = {
            "DIMENSION": dimension,
            "BLOCK_ROWS": tiles.rows,
            "BLOCK_TOKENS": tiles.tokens,
            "BLOCK_DIMENSION": tiles.dimension,
            "SEGMENTS": 1 if candidates or sharing_rows < tiles.rows * 2 else tiles.rows // 32,
            "FORMAT": form,
            "BITS": bits,
            "NORMALIZE": form == RESIDUAL,
            "CANDIDATES": candidates,
            "PRECISION": config.product_precision(dtype),
            "NAN_REDUCTION": True,
        }
        pointers = {**_POINTERS, "queries": "*" + name, "centroids": "*" + table}
        pointers["values"] = "*u8" if form == RESIDUAL else _FORMATS[form][1]
        absent = {"scales"} if form == RESIDUAL else {"codes", "centroids", "field_weights"}
        absent |= set(_OPTIONAL) - present
        yield _configuration(f"maxsim_compressed-{label}-rows{tiles.rows}", constants, pointers, absent, tiles)


def _configuration(
    name: str,
    constants: dict[str, Any],
    pointers: dict[str, str],
    absent: set[str],
    tiles: config_compressed.CompressedTiles,
) -> dict[str, Any]:
    signature: dict[str, str] = {}
    constexprs: dict[tuple[int, ...], Any] = {}
    attrs: dict[tuple[int, ...], list[list[Any]]] = {}
    for position, argument in enumerate(maxsim_compressed_kernel.arg_names):
        if argument in constants or argument in absent:
            signature[argument] = "constexpr"
            constexprs[(position,)] = constants.get(argument)
        elif argument in pointers:
            signature[argument] = pointers[argument]
            attrs[(position,)] = [["tt.divisibility", 16]]
        else:
            signature[argument] = "i32"
            # A token's bytes: few bits of residual are no multiple of 16 of them.
            width = constants["DIMENSION"] * constants["BITS"] // 8 if constants["BITS"] else constants["DIMENSION"]
            aligned = argument != "stride_document_token" or width % 16 == 0
            if argument.startswith("stride_") and aligned:
                attrs[(position,)] = [["tt.divisibility", 16]]
    return {
        "name": name,
        "kernel": maxsim_compressed_kernel,
        "signature": signature,
        "constexprs": constexprs,
        "attrs": attrs,
        "options": {
            "num_warps": tiles.warps,
            "num_stages": tiles.stages,
            "maxnreg": tiles.registers,
            "enable_fp_fusion": True,
        },
        "wants_wgmma": "fp32" not in pointers["queries"] and tiles.tokens >= 64,
    }

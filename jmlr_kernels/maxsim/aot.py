"""Every configuration of the MaxSim kernels that can be launched, for compilation without a GPU.

The tiles come from config.py, all candidates of the tuner included, so what is compiled here is what runs or may be
timed. Optional arguments are taken all together and one by one: they differ in a few loads each, not in tiles.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import triton.language as tl

from . import config
from .gradient_rule import RULES
from .triton_document_gradient import maxsim_document_gradient_kernel, product_types
from .triton_forward import maxsim_forward_kernel, maxsim_kept_kernel, maxsim_norms_kernel
from .triton_losses import maxsim_loss_rows_kernel
from .triton_query_gradient import (
    maxsim_query_gradient_kernel,
    maxsim_query_gradient_sum_kernel,
    maxsim_tangent_kernel,
)

DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
# One dimension per path: a whole power of two, a padded one, the widest whole tile, chunks without and with a rest.
DIMENSIONS = (64, 96, 128, 256, 768, 300)
# Query tokens that share documents: one per row tile.
SHARING_ROWS = (32, 64, 4096)


@dataclass(frozen=True)
class Variant:
    """Which optional arguments are there, how documents lie, what is normalised, and who gives the gradient."""

    present: frozenset[str]
    candidates: bool = False
    normalize: str = "none"
    per_token: bool = False
    rule: str = "scores"
    winners: str = "*u8"


_MASKS = frozenset({"query_mask", "document_mask", "query_weights"})
VARIANTS: dict[str, Variant] = {
    "everything": Variant(_MASKS | {"winners"}),
    "bare": Variant(frozenset()),
    "winners": Variant(frozenset({"winners"})),
    "winners16": Variant(frozenset({"winners"}), winners="*u16"),
    "winners32": Variant(frozenset({"winners", "cu_seqlens"}), winners="*i32"),
    "query_mask": Variant(frozenset({"query_mask", "winners"})),
    "document_mask": Variant(frozenset({"document_mask", "winners"})),
    "document_mask_alone": Variant(frozenset({"document_mask"})),
    "weights": Variant(frozenset({"query_weights", "winners"})),
    "packed": Variant(frozenset({"cu_seqlens", "winners"})),
    "packed_everything": Variant(_MASKS | {"cu_seqlens", "winners"}),
    "normalize_load": Variant(_MASKS | {"winners"}, normalize="load"),
    "normalize_compute": Variant(_MASKS | {"winners"}, normalize="compute"),
    "tokens": Variant(_MASKS - {"query_weights"} | {"winners"}, per_token=True, rule="tokens"),
    "candidates": Variant(frozenset({"winners"}), candidates=True),
    "candidates_everything": Variant(_MASKS | {"winners"}, candidates=True),
    "candidates_packed_everything": Variant(_MASKS | {"cu_seqlens", "winners"}, candidates=True, normalize="compute"),
    "labels": Variant(_MASKS | {"winners"}, rule="labels"),
    "candidates_labels": Variant(_MASKS | {"winners"}, candidates=True, rule="labels"),
    "candidates_teacher": Variant(_MASKS | {"winners"}, candidates=True, rule="teacher"),
    "candidates_margins": Variant(_MASKS | {"winners"}, candidates=True, rule="margins"),
}
_EVERY_DTYPE = (
    "everything",
    "bare",
    "packed_everything",
    "candidates_packed_everything",
    "normalize_load",
    "normalize_compute",
)
_RULE_POINTERS = ("scores", "row_statistics", "temperatures", "target", "target_row")
_RULE_USES = dict(
    zip(RULES, ((), (), _RULE_POINTERS[:4], _RULE_POINTERS, ("scores", "row_statistics", "target")), strict=True)
)
_BYTES = ("query_mask", "document_mask", "document_kept")  # kernels that take a mask as it is
_FLOATS = (
    "query_weights", "scores", "grad", "row_statistics", "temperatures", "target", "target_row", "query_scales",
    "document_scales", "scales", "partial", "grad_weights", "gradient", "statistics",
)  # fmt: skip
_ELEMENTS = ("queries", "documents", "tokens", "out", "grad_queries", "grad_documents")


def configurations(capability: int) -> list[dict[str, Any]]:
    """Arguments for triton.compile at one compute capability (80, 90, 100).

    Each dict has "name", "kernel", "signature", "constexprs", "attrs" (the alignment that a launch on ordinary tensors
    has), "options" and "wants_wgmma" (the Hopper tensor-core instruction must appear in the code for capability 90).
    """
    found: list[dict[str, Any]] = []
    for label, variant in VARIANTS.items():
        # The all-dense variant visits every dtype, dimension, row tile and candidate; the others differ in a few loads.
        thorough = label == "everything"
        for name, dtype in DTYPES.items():
            if name != "bf16" and label not in _EVERY_DTYPE:
                continue
            for dimension in DIMENSIONS if thorough or "normalize" in label else (128,):
                full = f"{label}-{name}-d{dimension}"
                found += _forward(capability, full, dtype, name, dimension, variant, thorough)
                if "winners" in variant.present and variant.normalize != "load":
                    found += _backward(capability, full, dtype, name, dimension, variant, thorough)
    for rule in RULES[2:]:
        for aimed in (True, False) if rule == "labels" else (True,):
            present = frozenset({"scores", "temperatures", "statistics"} | ({"target"} if aimed else set()))
            constants = {"RULE": rule, "HAS_TARGET": aimed, "BLOCK": 256}
            variant, tiles = Variant(present, rule=rule), config.QueryGradientTiles(1, 1, 16, warps=4)
            label = f"maxsim_loss_rows-{rule}" + ("" if aimed else "-blind")
            found.append(_configuration(label, maxsim_loss_rows_kernel, "", present, variant, constants, tiles))
    for label in ("padded", "packed"):
        present = frozenset({"document_mask", "kept", "kept_lengths"}) | (
            {"cu_seqlens"} if label == "packed" else set()
        )
        tiles = config.QueryGradientTiles(1, 1, 16, warps=4)
        constants = {"SCAN": 512}
        plain = Variant(present)
        found.append(_configuration(f"maxsim_kept-{label}", maxsim_kept_kernel, "", present, plain, constants, tiles))
    for name, dtype in DTYPES.items():
        for dimension in DIMENSIONS:
            found += _helpers(capability, f"{name}-d{dimension}", dtype, name, dimension)
    return found


def _forward(
    capability: int, label: str, dtype: torch.dtype, name: str, dimension: int, variant: Variant, thorough: bool
) -> Iterator[dict[str, Any]]:
    seen = set()
    normalize = variant.normalize
    if normalize == "compute" and not config.normalizes_on_the_way(dtype.itemsize, dimension):
        normalize = "load"
    for sharing_rows in SHARING_ROWS:
        choices = config.forward_candidates(capability, dtype.itemsize, dimension, sharing_rows)
        for tiles in choices if thorough else choices[:1]:
            if tiles in seen:
                continue
            seen.add(tiles)
            constants = {
                "DIMENSION": dimension,
                "BLOCK_ROWS": tiles.rows,
                "BLOCK_TOKENS": tiles.tokens,
                "BLOCK_DIMENSION": tiles.dimension,
                "SEGMENTS": 1 if variant.candidates or sharing_rows < tiles.rows * 2 else tiles.rows // 32,
                "CANDIDATES": variant.candidates,
                "PER_TOKEN": variant.per_token,
                "NORMALIZE": normalize,
                "NO_WINNER": 255,
                "PRECISION": config.product_precision(dtype),
                "NAN_REDUCTION": True,
            }
            present = variant.present
            if "document_mask" in present:
                present = present | {"kept", "kept_lengths"}
            if variant.normalize != "none":
                present = present | {"query_scales", "document_scales"}
            yield _configuration(
                f"maxsim_forward-{label}-{_tile_name(tiles)}",
                maxsim_forward_kernel,
                name,
                present,
                variant,
                constants,
                tiles,
                wants_wgmma=dtype.itemsize == 2 and tiles.rows >= 64,
            )


def _backward(
    capability: int, label: str, dtype: torch.dtype, name: str, dimension: int, variant: Variant, thorough: bool
) -> Iterator[dict[str, Any]]:
    present = variant.present | set(_RULE_USES[variant.rule])
    if "query_weights" in present:
        present |= {"grad_weights"}
    if variant.normalize != "none":
        present |= {"query_scales", "document_scales"}
    if "everything" in label:  # documents of exactly 256 tokens
        present |= {"document_kept"}
    else:
        present -= {"query_mask"}
    marker = -2 if "document_kept" in present else 255
    choices = config.query_gradient_candidates(capability, dtype.itemsize, dimension)
    for tiles in choices if thorough else choices[:1]:
        constants: dict[str, Any] = {
            "DIMENSION": dimension,
            "BLOCK_ROWS": tiles.rows,
            "LANES": tiles.lanes,
            "BLOCK_DIMENSION": tiles.dimension,
            "CANDIDATES": variant.candidates,
            "NO_WINNER": marker,
            "RULE": variant.rule,
            "JACOBIAN": variant.normalize != "none" and tiles.dimension >= dimension,
        }
        for split in (False, True) if thorough else (False,):
            yield _configuration(
                f"maxsim_query_gradient-{label}-{_tile_name(tiles)}" + "-split" * split,
                maxsim_query_gradient_kernel,
                name,
                present | {"partial"} if split else present,
                variant,
                constants,
                tiles,
            )
    product, precision = product_types(dtype)
    simple = variant.rule in config.SIMPLE_RULES and variant.normalize == "none" and not variant.candidates
    document_choices = config.document_gradient_candidates(capability, dtype.itemsize, dimension, simple)
    for document_tiles in document_choices if thorough else document_choices[:1]:
        dimension_tiles = -(-dimension // document_tiles.dimension)
        scans = {document_tiles.scan}
        if thorough or variant.candidates:
            scans |= {config.scan_length(1, document_tiles)}
        for scan in sorted(scans):
            constants = {
                "DIMENSION": dimension,
                "BLOCK_TOKENS": document_tiles.tokens,
                "BLOCK_ROWS": document_tiles.rows,
                "SCAN": scan,
                "BLOCK_DIMENSION": document_tiles.dimension,
                "DIMENSION_TILES": dimension_tiles,
                "CANDIDATES": variant.candidates,
                "NO_WINNER": marker,
                "RULE": variant.rule,
                "JACOBIAN": variant.normalize != "none" and dimension_tiles == 1,
                "PRODUCT": product,
                "PRECISION": precision,
            }
            yield _configuration(
                f"maxsim_document_gradient-{label}-{_tile_name(document_tiles)}-scan{scan}",
                maxsim_document_gradient_kernel,
                name,
                present,
                variant,
                constants,
                document_tiles,
                wants_wgmma=product == tl.bfloat16,
            )


def _helpers(capability: int, label: str, dtype: torch.dtype, name: str, dimension: int) -> Iterator[dict[str, Any]]:
    block = min(128, config.next_power_of_two(dimension, 16))
    constants: dict[str, Any] = {"DIMENSION": dimension, "BLOCK_ROWS": 16, "BLOCK_DIMENSION": block}
    plain = Variant(frozenset())
    rows = config.QueryGradientTiles(16, 1, block, warps=4)
    for kernel in (maxsim_norms_kernel, maxsim_tangent_kernel):
        yield _configuration(f"{kernel.__name__}-{label}", kernel, name, plain.present, plain, constants, rows)
    tiles = config.query_gradient_candidates(capability, dtype.itemsize, dimension)[0]
    constants = {
        "DIMENSION": dimension,
        "BLOCK_ROWS": tiles.rows,
        "BLOCK_DIMENSION": tiles.dimension,
        "JACOBIAN": tiles.dimension >= dimension,
    }
    yield _configuration(
        f"maxsim_query_gradient_sum-{label}",
        maxsim_query_gradient_sum_kernel,
        name,
        frozenset({"query_weights", "grad_weights", "query_scales", "partial"}),
        plain,
        constants,
        tiles,
    )


def _tile_name(tiles: Any) -> str:
    fields = ("rows", "lanes", "tokens", "warps", "stages", "registers")
    return "x".join(str(getattr(tiles, field)) for field in fields if hasattr(tiles, field))


def _configuration(
    name: str,
    kernel: Any,
    element: str,
    present: frozenset[str],
    variant: Variant,
    constants: dict[str, Any],
    tiles: Any,
    wants_wgmma: bool = False,
) -> dict[str, Any]:
    required = {"queries", "documents", "tokens", "gradient", "out", "scales", "grad", "grad_queries", "grad_documents"}
    required |= {"notes"}
    if kernel is not maxsim_forward_kernel:
        required |= {"winners"}
    else:
        required |= {"scores"}
    signature: dict[str, str] = {}
    constexprs: dict[tuple[int, ...], Any] = {}
    attrs: dict[tuple[int, ...], list[list[Any]]] = {}
    for position, argument in enumerate(kernel.arg_names):
        pointer = _pointer(argument, element, variant)
        if argument in constants:
            signature[argument] = "constexpr"
            constexprs[(position,)] = constants[argument]
        elif pointer and argument not in present | required:
            signature[argument] = "constexpr"
            constexprs[(position,)] = None
        elif pointer:
            signature[argument] = pointer
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
            "maxnreg": tiles.registers,
            "enable_fp_fusion": True,
        },
        "wants_wgmma": wants_wgmma,
    }


def _pointer(argument: str, element: str, variant: Variant) -> str | None:
    """Triton's type of a pointer argument, None for an integer."""
    if argument == "target" and variant.rule == "labels":
        return "*i64"
    if argument in _BYTES:
        return "*u8"
    if argument in _FLOATS:
        return "*fp32"
    if argument in _ELEMENTS:
        return "*" + element
    if argument in ("cu_seqlens", "kept", "kept_lengths"):
        return "*i32"
    return {"winners": variant.winners, "notes": "*u16"}.get(argument)

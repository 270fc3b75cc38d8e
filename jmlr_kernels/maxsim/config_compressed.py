"""Tile sizes of the kernel for compressed documents: a pure function of chip, format, element size and dimension.

Reranking reads documents once, for one query or few: memory decides. Hence narrow tiles of few warps, several programs
to a multiprocessor, and wide loads. Chosen by what compiles without spills; not yet timed on a GPU.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from .config import REGISTERS, dimension_tile, next_power_of_two

# How a document tile is decoded, as the kernel's compile-time argument.
INT8 = 0
FLOAT8 = 1  # by the chip's own conversion
FLOAT8_BITS = 2  # by integer arithmetic on the bits
RESIDUAL = 3

# The largest embedding dimension that residual codes may have: a token's length needs all of its elements at once.
RESIDUAL_DIMENSION = 256


def format_of(dtype: torch.dtype, capability: int, interpreted: bool) -> int:
    """How values are decoded: chips before 8.9 cannot convert float8, and the interpreter knows no float8 NaN."""
    if dtype == torch.int8:
        return INT8
    return FLOAT8_BITS if capability < 89 or interpreted else FLOAT8


@dataclass(frozen=True)
class CompressedTiles:
    """A program holds `rows` query tokens and streams `tokens` at a time, in at most `registers` per thread."""

    rows: int
    tokens: int
    dimension: int
    warps: int
    stages: int
    registers: int


def compressed_tiles(
    capability: int, form: int, element_size: int, dimension: int, sharing_rows: int, table_size: int = 2
) -> CompressedTiles:
    """Tiles for a compute capability (80, 90, 100), a format, the queries' bytes per element and the dimension.

    `sharing_rows` is how many query tokens meet the same documents; `table_size` the centroids' bytes per element.
    """
    rows = min(128, next_power_of_two(sharing_rows, 32))
    if form == RESIDUAL:
        return _residual_tiles(element_size, next_power_of_two(dimension, 16), rows, table_size)
    if element_size == 4:
        return CompressedTiles(32, 32, dimension_tile(dimension, 32), warps=8, stages=2, registers=REGISTERS)
    tile = dimension_tile(dimension, 128)
    if form == FLOAT8_BITS and tile < dimension:
        # The integer decoder inside the walk over the dimension takes the registers of a third stage.
        return CompressedTiles(min(rows, 64), 64, tile, warps=4 if rows == 32 else 8, stages=2, registers=REGISTERS)
    if rows == 32:
        # Three programs of four warps to a multiprocessor, or two of eight where sums lie in tensor memory.
        warps, registers = (8, 128) if capability >= 100 else (4, 168)
        return CompressedTiles(rows, 64, tile, warps, stages=3, registers=registers)
    return CompressedTiles(rows, 64, tile, warps=4 if rows == 64 else 8, stages=3, registers=REGISTERS)


def _residual_tiles(element_size: int, tile: int, rows: int, table_size: int) -> CompressedTiles:
    """One stage: programs side by side hide a gather's latency, and a pipeline would copy the lookups as well."""
    if element_size == 4:
        return CompressedTiles(32, 32, tile, warps=8, stages=1, registers=REGISTERS)
    tokens = 64 if tile <= 128 and table_size == 2 else 32
    registers = 128 if rows == 32 and tile <= 128 else REGISTERS
    return CompressedTiles(rows, tokens, tile, warps=8, stages=1, registers=registers)


def documents_per_program(documents: int, row_tiles: int, processors: int) -> int:
    """How many documents one program streams: enough programs for several waves of several to a multiprocessor."""
    programs = max(1, 16 * processors // max(1, row_tiles))
    return max(1, min(16, documents // programs))

"""Tile sizes of the smooth MaxSim kernels: pure functions of the chip, the element size and the embedding dimension.

Chosen by what compiles without spills; not yet timed on a GPU.
"""

from __future__ import annotations

from dataclasses import dataclass

from ..launch import Options
from .config import REGISTERS, dimension_tile, next_power_of_two

# The largest embedding dimension that stays in one tile; above it the kernels walk the dimension.
_WHOLE_DIMENSION = 256


@dataclass(frozen=True)
class Tiles:
    """`rows` query tokens against `tokens` document tokens.

    Similarities are summed over chunks of `dimension`; a program of the backward owns `output` columns of a gradient.
    """

    rows: int
    tokens: int
    dimension: int
    output: int
    warps: int
    stages: int

    @property
    def options(self) -> Options:
        """What the launch is told: warps, stages, and the most registers of a thread."""
        return self.warps, self.stages, REGISTERS


def forward_tiles(capability: int, element_size: int, dimension: int, sharing_rows: int) -> Tiles:
    """Forward tiles for a compute capability (80, 90, 100), bytes per element and embedding dimension.

    `sharing_rows` is how many query tokens meet the same documents: all of a batch, or one query's for candidates.
    """
    if element_size == 4:
        # Full float32 products run on the ordinary cores: small tiles, many threads.
        return _tiles(32, 32, dimension_tile(dimension, 32), warps=8, stages=2)
    tile = dimension_tile(dimension, _WHOLE_DIMENSION)
    rows = min(128, next_power_of_two(sharing_rows, 32))
    if tile == 256 and capability < 90:
        rows = min(rows, 64)  # before Hopper, 128 such rows do not fit the registers
    if capability >= 100:
        return _tiles(rows, 64 if tile < 256 else 32, tile, warps=8, stages=2)
    many = rows == 128 or (rows == 64 and tile == 128 and capability < 90)
    return _tiles(rows, 64, tile, warps=8 if many else 4, stages=2)


def query_gradient_tiles(
    capability: int, element_size: int, product_size: int, dimension: int, sharing_rows: int
) -> Tiles:
    """Tiles of the kernel that owns query tokens and walks the documents.

    `product_size` is bytes per element of the product of shares and rows: float16 takes float32 there.
    """
    if element_size == 4:
        return _tiles(32, 32, dimension_tile(dimension, 32), _output(dimension, 64), warps=8, stages=1)
    tile, output = dimension_tile(dimension, _WHOLE_DIMENSION), _output(dimension, 256)
    rows = min(64, next_power_of_two(sharing_rows, 32))
    if tile == 256 and capability < 90:
        return _tiles(32, 32, tile, output, warps=8, stages=2)
    if tile == 256 and product_size == 4:
        return _tiles(rows, 16 if capability < 100 else 32, tile, output, warps=8, stages=1)
    short = tile == 256 or (product_size == 4 and capability < 90)
    return _tiles(rows, 32 if short else 64, tile, output, warps=8, stages=2)


def document_gradient_tiles(capability: int, element_size: int, product_size: int, dimension: int) -> Tiles:
    """Tiles of the kernel that owns document tokens and walks the query tokens; `product_size` as above."""
    if element_size == 4:
        return _tiles(32, 32, dimension_tile(dimension, 32), _output(dimension, 64), warps=8, stages=1)
    tile, output = dimension_tile(dimension, _WHOLE_DIMENSION), _output(dimension, 256)
    if tile == 256:
        return _tiles(32, 64, tile, output, warps=8, stages=1 if product_size == 4 and capability < 100 else 2)
    return _tiles(64, 32 if product_size == 4 and capability < 90 else 64, tile, output, warps=8, stages=2)


def documents_per_program(documents: int, row_tiles: int, processors: int) -> int:
    """How many documents one forward program streams: enough programs for about four waves, at most 16 documents."""
    programs = max(1, 4 * processors // max(1, row_tiles))
    return max(1, min(16, documents // programs))


def document_splits(documents: int, row_tiles: int, processors: int) -> int:
    """Among how many programs the documents of a query row are shared out; their partial sums are added in order.

    One when the rows alone fill the chip twice; at most 16, because each split writes float32 sums of all rows.
    """
    return max(1, min(16, documents, -(-2 * processors // max(1, row_tiles))))


def _output(dimension: int, most: int) -> int:
    """Columns of a gradient that a program owns. Every further one repeats the similarities, so as many as fit."""
    padded = next_power_of_two(dimension, 16)
    return padded if padded <= most else min(most, 128)


def _tiles(rows: int, tokens: int, dimension: int, output: int = 0, *, warps: int, stages: int) -> Tiles:
    return Tiles(rows, tokens, dimension, output, warps, stages)

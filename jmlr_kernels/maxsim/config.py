"""Tile sizes of the Triton kernels: pure functions of the chip, the element size and the embedding dimension.

One place for tuning, and small enough to be compiled in full without a GPU (see aot.py). Nothing here depends on the
lengths or the numbers of queries and documents, so that a new batch shape never compiles a new kernel; the two values
that adapt to them are ordinary run-time integers.

Chosen by what compiles without spills; not yet timed on a GPU.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from functools import cache

import torch

# The largest embedding dimension whose query rows stay in one tile; above it the kernel walks the dimension.
_WHOLE_DIMENSION = 256

# Said to the assembler because its own guess saves a few registers for occupancy by spilling as many.
REGISTERS = 255


@dataclass(frozen=True)
class ForwardTiles:
    """A program holds `rows` query tokens, of several queries when they are short, and streams `tokens` at a time."""

    rows: int
    tokens: int
    dimension: int
    warps: int
    stages: int


@dataclass(frozen=True)
class BackwardTiles:
    """`rows` query tokens against `tokens` document tokens (d(documents)) or gathered rows (d(queries))."""

    rows: int
    tokens: int
    dimension: int
    warps: int
    stages: int


def next_power_of_two(value: int, least: int = 1) -> int:
    """The smallest power of two that is at least `value` and `least`."""
    return max(least, 1 << max(0, value - 1).bit_length())


def dimension_tile(dimension: int, whole: int) -> int:
    """Tile of the embedding dimension: all of it when it fits in `whole`, else the chunk that pads least."""
    padded = next_power_of_two(dimension, 16)
    if padded <= whole:
        return padded
    chunks = [chunk for chunk in (64, 32) if chunk <= whole]
    return min(chunks, key=lambda chunk: (-(-dimension // chunk) * chunk, -chunk))


def forward_tiles(capability: int, element_size: int, dimension: int, sharing_rows: int) -> ForwardTiles:
    """Forward tiles for a compute capability (80, 90, 100), bytes per element and embedding dimension.

    `sharing_rows` is how many query tokens meet the same documents: all of a batch, or one query's for candidates. A
    few of them make a small tile, since its remaining rows would be multiplied for nothing.
    """
    rows = min(128, next_power_of_two(sharing_rows, 32))
    if element_size == 4:
        # Full float32 products run on the ordinary cores, each thread holding a patch of both
        # operands: small tiles, many threads.
        return ForwardTiles(32, 32, dimension_tile(dimension, 32), warps=8, stages=2)
    tile = dimension_tile(dimension, _WHOLE_DIMENSION)
    if capability >= 100:
        # Sums lie in tensor memory, and a thread reads a whole row of them: short rows, many threads.
        return ForwardTiles(rows, 64 if tile < 256 else 32, tile, warps=8, stages=2)
    if tile == 256:
        rows = min(rows, 128 if capability >= 90 else 64)  # before Hopper, 128 such rows do not fit the registers
        return ForwardTiles(rows, 64, tile, warps=8 if rows == 128 else 4, stages=2)
    if rows < 128:
        return ForwardTiles(rows, 64, tile, warps=4, stages=3)
    return ForwardTiles(128, 128, tile, warps=8, stages=2 if capability < 90 else 3)


def query_gradient_tiles(capability: int, element_size: int, dimension: int) -> BackwardTiles:
    """Tiles of the kernel that gathers winning document tokens into d(queries)."""
    return BackwardTiles(16, 1, dimension_tile(dimension, 128), warps=4, stages=2)


def document_gradient_tiles(capability: int, element_size: int, dimension: int) -> BackwardTiles:
    """Tiles of the kernel that owns document tokens and multiplies a one-hot matrix of winners with query rows."""
    if element_size == 4:
        return BackwardTiles(32, 32, dimension_tile(dimension, 32), warps=8, stages=2)
    tile = dimension_tile(dimension, 128)
    return BackwardTiles(64, 64, tile, warps=8 if tile == 128 or capability < 90 else 4, stages=2)


def product_precision(dtype: torch.dtype) -> str:
    """How tl.dot multiplies: float32 inputs in float32, never rounded to a shorter type."""
    return "ieee" if dtype == torch.float32 else "tf32"


@cache
def interpreted() -> bool:
    """Whether kernels run in Triton's Python interpreter."""
    return os.environ.get("TRITON_INTERPRET", "0") not in ("", "0")


@cache
def _capability_of(index: int) -> int:
    major, minor = torch.cuda.get_device_capability(index)
    return 10 * major + minor


def capability_of(device: torch.device) -> int:
    """Compute capability of a device as 10 * major + minor; 90 for a CPU, where only the interpreter runs."""
    if device.type != "cuda":
        return 90
    return _capability_of(torch.cuda.current_device() if device.index is None else device.index)


@cache
def processors_of(device: torch.device) -> int:
    """Streaming multiprocessors of a device; 1 for a CPU."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


def documents_per_program(documents: int, row_tiles: int, processors: int) -> int:
    """How many documents one forward program streams past its query rows.

    As many as keep about four waves of programs: a long stream reuses the rows, a short one balances the load.
    """
    programs = max(1, 4 * processors // max(1, row_tiles))
    return max(1, min(16, documents // programs))

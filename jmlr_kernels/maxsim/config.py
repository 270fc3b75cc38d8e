"""Tile sizes of the Triton kernels: pure functions of the chip, the element size, the embedding dimension and how many
query tokens share a document.

Nothing here depends on the lengths or the numbers of queries and documents beyond that class, so that a new batch shape
never compiles a new kernel and nothing is ever tuned at run time. Each `*_candidates` function lists, best guess first,
what is worth timing; `make tune` times them on a GPU and writes the winners into tuned.json beside this file, which
then goes before the guess. Every candidate is compiled ahead of time in CI (see aot.py).

The guesses come from what compiles without spills and from counting instructions (docs/log.md); none is timed yet.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch

# The largest embedding dimension whose query rows stay in one tile; above it the kernel walks the dimension.
_WHOLE_DIMENSION = 256

# Said to the assembler because its own guess saves a few registers for occupancy by spilling as many.
REGISTERS = 255

# Rules of the scores' gradient (gradient_rule.py) that leave d(documents) registers to spare.
SIMPLE_RULES = ("scores", "labels")


@dataclass(frozen=True)
class ForwardTiles:
    """A program holds `rows` query tokens, of several queries when they are short, and streams `tokens` at a time.

    `registers` is the most that a thread may take: 128 lets two programs of eight warps share a processor, so that one
    searches its maxima while the other multiplies.
    """

    rows: int
    tokens: int
    dimension: int
    warps: int
    stages: int
    registers: int = REGISTERS


@dataclass(frozen=True)
class QueryGradientTiles:
    """A program owns `rows` query tokens and gathers the winners of `lanes` documents at a time for each."""

    rows: int
    lanes: int
    dimension: int
    warps: int
    stages: int = 1
    registers: int = REGISTERS


@dataclass(frozen=True)
class DocumentGradientTiles:
    """A program owns `tokens` document tokens, looks through `scan` winners at a time for those that are its own, and
    multiplies them `rows` at a time."""

    tokens: int
    rows: int
    scan: int
    dimension: int
    warps: int
    stages: int
    registers: int = REGISTERS


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


def forward_candidates(capability: int, element_size: int, dimension: int, sharing_rows: int) -> list[ForwardTiles]:
    """Forward tiles worth timing for a compute capability (80, 90, 100), bytes per element and embedding dimension.

    `sharing_rows` is how many query tokens meet the same documents: all of a batch, or one query's for candidates. A
    few of them make a small tile, since its remaining rows would be multiplied for nothing.
    """
    rows = row_class(sharing_rows)
    if element_size == 4:
        # Full float32 products run on the ordinary cores, each thread holding a patch of both
        # operands: small tiles, many threads.
        return [ForwardTiles(32, 32, dimension_tile(dimension, 32), warps=8, stages=2)]
    tile = dimension_tile(dimension, _WHOLE_DIMENSION)
    if capability >= 100:
        # Sums lie in tensor memory, and a thread reads a whole row of them: short rows, many threads.
        return [ForwardTiles(rows, 64 if tile < 256 else 32, tile, warps=8, stages=2)]
    if tile == 256:
        rows = min(rows, 128 if capability >= 90 else 64)  # before Hopper, 128 such rows do not fit the registers
        return [ForwardTiles(rows, 64, tile, warps=8 if rows == 128 else 4, stages=2)]
    if rows < 128:
        # Walking the dimension holds more addresses; with a third stage the registers of sm_80 no longer suffice.
        deep = capability >= 90 or tile >= dimension
        return [ForwardTiles(rows, 64, tile, warps=4, stages=stages) for stages in ((3, 4) if deep else (2,))]
    if capability < 90:
        return [ForwardTiles(128, 64, tile, warps=8, stages=2)]
    # 64 tokens waste least at a document's end; a thread holds two rows of the sums, for which the search of the
    # winner costs three instructions an element, and twice that with four rows.
    return [
        ForwardTiles(128, 64, tile, warps=8, stages=3, registers=128),
        ForwardTiles(128, 128, tile, warps=8, stages=2),
    ]


def row_class(sharing_rows: int) -> int:
    """Rows of a forward tile for a number of query tokens that share documents: 32, 64 or 128."""
    return min(128, next_power_of_two(sharing_rows, 32))


def query_gradient_candidates(capability: int, element_size: int, dimension: int) -> list[QueryGradientTiles]:
    """Tiles worth timing for the kernel that gathers winning document tokens into d(queries)."""
    tile = dimension_tile(dimension, _WHOLE_DIMENSION if element_size == 2 else 128)
    lanes = 8 if tile <= 128 else 4
    return [QueryGradientTiles(rows, lanes, tile, warps=4) for rows in (4, 2)]


def document_gradient_candidates(
    capability: int, element_size: int, dimension: int, simple: bool = True
) -> list[DocumentGradientTiles]:
    """Tiles worth timing for the kernel that owns document tokens and multiplies a one-hot matrix of winners with
    query rows. A place in a scan and a token in a tile share 16 bits: scan * tokens <= 65536.

    `simple` says that every query meets every document, gradients are read or those of labels, and nothing is
    normalised: then 128 registers are enough, and sixteen warps share a processor. What a program waits for is memory,
    again and again.
    """
    if element_size == 4:
        return [DocumentGradientTiles(32, 32, 1024, dimension_tile(dimension, 32), warps=8, stages=1)]
    tile = dimension_tile(dimension, 128)
    if capability < 90:
        return [DocumentGradientTiles(64, rows, 1024, tile, warps=8, stages=2) for rows in (64, 32)]
    four = [DocumentGradientTiles(64, rows, 1024, tile, warps=4, stages=2) for rows in (64, 32)]
    if capability >= 100 or tile < dimension or not simple:
        return four
    return [DocumentGradientTiles(64, 64, 1024, tile, warps=8, stages=2, registers=128), *four]


# --------------------------------------------------------------------------- what runs


@cache
def _tuned() -> dict[str, dict[str, Any]]:
    path = Path(__file__).with_name("tuned.json")
    return json.loads(path.read_text())["tiles"] if path.is_file() else {}


def tuning_key(kernel: str, capability: int, element_size: int, dimension: int, sharing_rows: int = 0) -> str:
    """The name under which tuned.json keeps the fastest tiles of one class of shapes."""
    rows = f"-rows{row_class(sharing_rows)}" if sharing_rows else ""
    return f"{kernel}-sm{capability}-{8 * element_size}bit-d{next_power_of_two(dimension, 16)}{rows}"


@cache
def forward_tiles(capability: int, element_size: int, dimension: int, sharing_rows: int) -> ForwardTiles:
    """Tiles of the forward kernel; arguments as for :func:`forward_candidates`."""
    found = _tuned().get(tuning_key("forward", capability, element_size, dimension, sharing_rows))
    if found:
        return ForwardTiles(**found)
    return forward_candidates(capability, element_size, dimension, sharing_rows)[0]


@cache
def query_gradient_tiles(capability: int, element_size: int, dimension: int) -> QueryGradientTiles:
    """Tiles of the kernel that owns query tokens."""
    found = _tuned().get(tuning_key("query_gradient", capability, element_size, dimension))
    if found:
        return QueryGradientTiles(**found)
    return query_gradient_candidates(capability, element_size, dimension)[0]


@cache
def document_gradient_tiles(
    capability: int, element_size: int, dimension: int, simple: bool = True
) -> DocumentGradientTiles:
    """Tiles of the kernel that owns document tokens; what was tuned is for the `simple` ones."""
    found = _tuned().get(tuning_key("document_gradient", capability, element_size, dimension)) if simple else None
    if found:
        return DocumentGradientTiles(**found)
    return document_gradient_candidates(capability, element_size, dimension, simple)[0]


def normalizes_on_the_way(element_size: int, dimension: int) -> bool:
    """Whether the forward kernel has registers left to compute the norms of the documents that it multiplies."""
    return element_size == 2 and dimension_tile(dimension, _WHOLE_DIMENSION) in range(dimension, 129)


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


# A forward program streams at most so many documents past its query rows: beyond, rows are reused enough.
_LONGEST_RUN = 16


@cache
def documents_per_program(documents: int, row_tiles: int, warps: int, processors: int) -> int:
    """How many documents one forward program streams past its query rows.

    The number that leaves the processors idle least: programs start in waves of sixteen warps on each processor, and a
    wave lasts as long as a run. Of equals the longest run, which loads the query rows least often.
    """
    slots = processors * 16 // warps

    def length(run: int) -> tuple[int, int]:
        programs = row_tiles * -(-documents // run)
        return -(-programs // slots) * run, -run

    return min(range(1, max(1, min(_LONGEST_RUN, documents)) + 1), key=length)


def document_splits(rows: int, documents: int, tiles: QueryGradientTiles, processors: int) -> int:
    """Into how many parts the documents of d(queries) are split: a few query tokens alone would leave the chip idle."""
    programs = -(-rows // tiles.rows)
    wanted = 8 * processors // max(1, programs)
    return max(1, min(wanted, documents // (4 * tiles.lanes)))


def scan_length(rows: int, tiles: DocumentGradientTiles) -> int:
    """Winners that a program of d(documents) looks through at a time: all of them when they are few, unless registers
    are short, where one form of the code is all that was found to fit."""
    if tiles.registers < REGISTERS:
        return tiles.scan
    return min(tiles.scan, next_power_of_two(rows, 128))


def gradient_programs(processors: int) -> int:
    """The most programs of d(documents): enough to fill the chip, few enough that their notes stay small."""
    return 8 * processors

"""What the Triton kernels execute, beside what is useful: score tiles walked, times their size.

A kernel multiplies whole tiles: the diagonal, a group's edges and the last tile of a document are computed and masked.
Everything here is arithmetic on integers that mirrors the loop bounds of ``triton_forward.py``, ``triton_backward.py``
and their counterparts by bulk copies (``_tma``), tile by tile, for any tile sizes; the tests count the products that
Triton's interpreter really makes. FLOPs are those of matrix products alone, by the convention of ``flops.py``, with the
head dimension as the kernels hold it.
"""

from __future__ import annotations

from collections.abc import Sequence

# Matrix products over each score tile: q k and p v; q k, g v and ds k; k q, p g, v g and ds q.
PRODUCTS = {
    "forward": 2,
    "backward_dq": 3,
    "backward_dkdv": 4,
    "forward_tma": 2,
    "backward_dq_tma": 3,
    "backward_dkdv_tma": 4,
}


def executed_flops(
    kernel: str,
    lengths: Sequence[int],
    group_size: int,
    heads: int,
    padded_dim: int,
    block_m: int,
    block_n: int,
    boundary: str = "split",
) -> int:
    """FLOPs of one launch of `kernel` over documents of these `lengths`.

    Args:
        kernel: "forward", "backward_dq" or "backward_dkdv", or one of these with "_tma" behind, for "split" alone.
        lengths: tokens of each document, without padding: nothing is multiplied for padding.
        group_size: G, in tokens.
        heads: query heads; kv heads change what is loaded, not what is multiplied.
        padded_dim: the head dimension of a tile, a power of two.
        block_m, block_n: rows of queries and of keys in a tile.
        boundary: "split" or "wrap".

    Raises:
        ValueError: a kernel or boundary of another name.
    """
    if kernel not in PRODUCTS or boundary not in ("split", "wrap") or (boundary == "wrap" and "tma" in kernel):
        raise ValueError(
            f"kernel={kernel!r}, boundary={boundary!r}: choose of {', '.join(PRODUCTS)} and 'split' or, without"
            " bulk copies, 'wrap'"
        )
    count = _COUNTS[kernel]
    walked = 0
    for length in lengths:
        plain = count(length, group_size, block_m, block_n)
        shifted = count(length, group_size, block_m, block_n, *_shift_and_roll(length, group_size, boundary))
        walked += heads // 2 * plain + (heads - heads // 2) * shifted
    return 2 * PRODUCTS[kernel] * padded_dim * block_m * block_n * walked


def key_tiles(length: int, group_size: int, block_m: int, block_n: int, shift: int = 0, roll: int = 0) -> int:
    """Score tiles of one head's query tiles over the keys of their groups: the forward's, and those of dq.

    A tile of queries in one group walks the group's keys up to its own first row without a mask and the rest with one;
    a tile over several groups starts with the first one's keys and masks all. Positions of a rolled head are groups as
    well, so `roll` changes nothing.
    """
    walked = 0
    for tile in range(0, length, block_m):
        end = min(tile + block_m, length)
        low = _group_start(tile, shift, group_size)
        unmasked = low + (tile - low) // block_n * block_n if _group_start(end - 1, shift, group_size) == low else low
        walked += _tiles(unmasked - low, block_n) + _tiles(end - unmasked, block_n)
    return walked


def query_tiles(length: int, group_size: int, block_m: int, block_n: int, shift: int = 0, roll: int = 0) -> int:
    """Score tiles of one head's key tiles over the queries that attend to them: those of dk and dv.

    A key tile in one group walks the queries of the tile itself with a mask, whole tiles behind it without one, and
    what is left of the group with one; a key tile over several groups masks all. With `roll`, keys are tiles of tokens
    and queries walked by position; the tile that holds token `roll` has keys at both ends and walks everything.
    """
    walked = 0
    for tile in range(0, length, block_n):
        last = min(tile + block_n, length) - 1
        if tile < roll <= last:
            walked += _tiles(length, block_m)
            continue
        low = tile - roll if tile >= roll else tile - roll + length
        high = _group_end(low + last - tile, shift, group_size, length)
        below = masked_again = high
        if _group_end(low, shift, group_size, length) == high:
            below = min(low + _tiles(block_n, block_m) * block_m, high)
            masked_again = below + (high - below) // block_m * block_m
        walked += (
            _tiles(below - low, block_m) + (masked_again - below) // block_m + _tiles(high - masked_again, block_m)
        )
    return walked


def group_key_tiles(length: int, group_size: int, block_m: int, block_n: int, shift: int = 0, roll: int = 0) -> int:
    """As :func:`key_tiles`, of the kernels whose query tiles start where groups start."""
    walked = 0
    for group in range(_tiles(length + shift, group_size)):
        begin = max(group * group_size - shift, 0)
        stop = min((group + 1) * group_size - shift, length)
        walked += sum(_tiles(min(tile + block_m, stop) - begin, block_n) for tile in range(begin, stop, block_m))
    return walked


def group_query_tiles(length: int, group_size: int, block_m: int, block_n: int, shift: int = 0, roll: int = 0) -> int:
    """As :func:`query_tiles`, of the kernel that walks to the end of a tile's last group in steps of one size."""
    return sum(
        _tiles(_group_end(min(tile + block_n, length) - 1, shift, group_size, length) - tile, block_m)
        for tile in range(0, length, block_n)
    )


_COUNTS = {
    "forward": key_tiles,
    "backward_dq": key_tiles,
    "backward_dkdv": query_tiles,
    "forward_tma": group_key_tiles,
    "backward_dq_tma": group_key_tiles,
    "backward_dkdv_tma": group_query_tiles,
}


def _shift_and_roll(length: int, group_size: int, boundary: str) -> tuple[int, int]:
    """Of the shifted heads; see triton_common.py."""
    if boundary == "split":
        return group_size - group_size // 2, 0
    return 0, group_size // 2 % max(length, 1)


def _group_start(position: int, shift: int, group_size: int) -> int:
    return max((position + shift) // group_size * group_size - shift, 0)


def _group_end(position: int, shift: int, group_size: int, length: int) -> int:
    return min(((position + shift) // group_size + 1) * group_size - shift, length)


def _tiles(rows: int, block: int) -> int:
    return -(-rows // block)

"""What the Triton and CUDA kernels execute, beside what is useful: score tiles walked, times their size.

A kernel multiplies whole tiles: the diagonal, a group's edges and the last tile of a document are computed and masked.
Everything here is arithmetic on integers that mirrors the loop bounds of ``triton_forward.py``, ``triton_backward.py``
and their ``_tma`` siblings, and of ``csrc/shifted_attention``, tile by tile, for any tile sizes; the tests count the
products that Triton's interpreter and the emulated tensor cores really make. FLOPs are those of matrix products alone,
by the convention of ``flops.py``, with the head dimension as the kernels hold it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from .. import native


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
        kernel: a name of config.KERNELS or config.TMA_KERNELS; the latter know "split" alone.
        lengths: tokens of each document, without padding: nothing is multiplied for padding.
        group_size: G, in tokens.
        heads: query heads; kv heads change what is loaded, not what is multiplied.
        padded_dim: the head dimension of a tile, a power of two.
        block_m, block_n: rows of queries and of keys in a tile.
        boundary: "split" or "wrap".

    Raises:
        ValueError: a kernel or boundary of another name, or a pair that does not go together.
    """
    if kernel not in _KERNELS or boundary not in ("split", "wrap") or (kernel.endswith("_tma") and boundary == "wrap"):
        raise ValueError(
            f"kernel={kernel!r}, boundary={boundary!r}: choose of {', '.join(_KERNELS)}, and 'split' or, but for those"
            " of bulk copies, 'wrap'"
        )
    products, count = _KERNELS[kernel]
    walked = _walked(count, lengths, group_size, heads, block_m, block_n, boundary)
    return 2 * products * padded_dim * block_m * block_n * walked


def library_flops(
    lengths: Sequence[int],
    group_size: int,
    heads: int,
    head_dim: int,
    dtype: torch.dtype,
    shared_bytes: int,
    boundary: str = "split",
    hopper: bool = False,
) -> dict[str, int]:
    """FLOPs of the native library's CUDA kernels, by name, for arguments as :func:`executed_flops` takes them.

    Args:
        shared_bytes: what a block may ask for on the GPU (``native.shared_memory``).
        hopper: the kernels for compute capability 9.0 run where they take such a problem
            (``native.has_hopper_kernels``), tensors that copies can address taken for granted.

    Warps that share rows compute the scores once each. A product of float32, which the tensor cores make of three of
    TF32, counts once.

    Raises:
        RuntimeError: a dtype or head dimension that the library does not have.
    """
    dim, *sizes = native.function("shifted_attention_tile_sizes")(dtype.itemsize, head_dim, shared_bytes)
    own = _hopper_tiles(dtype, head_dim, boundary) if hopper else {}
    flops = {}
    for i, (kernel, (of_scores, of_sums)) in enumerate(_LIBRARY.items()):
        if kernel in own:
            count = _HOPPER[kernel]
            rows, columns = own[kernel][1:]
            pairs = sum(
                heads // 2 * count(length, group_size, rows, columns, 0)
                + (heads - heads // 2) * count(length, group_size, rows, columns, group_size - group_size // 2)
                for length in lengths
            )
            flops[kernel] = 2 * (of_scores + of_sums) * own[kernel][0] * pairs
            continue
        block_m, block_n, parts = sizes[3 * i : 3 * i + 3]
        walked = _walked(_KERNELS[kernel][1], lengths, group_size, heads, block_m, block_n, boundary)
        flops[kernel] = 2 * (of_scores * parts + of_sums) * dim * block_m * block_n * walked
    return flops


def _hopper_tiles(dtype: torch.dtype, head_dim: int, boundary: str) -> dict[str, tuple[int, int, int]]:
    """Of each kernel for compute capability 9.0 that takes it: columns of a head, rows of a block, rows streamed."""
    if dtype.itemsize != 2 or boundary != "split":
        return {}
    found = native.function("shifted_attention_hopper_tiles")(head_dim)
    pairs = zip(_LIBRARY, zip(found[1::2], found[2::2], strict=True), strict=False)
    return {kernel: (found[0], rows, streamed) for kernel, (rows, streamed) in pairs}


def hopper_forward_pairs(length: int, group_size: int, block_m: int, block_n: int, shift: int) -> int:
    """Pairs that the forward of compute capability 9.0 multiplies for one head: each 64 queries of a block walk the
    block's tiles of keys, from the first that their groups reach into; of the last they may take one half."""
    pairs = 0
    for tile in range(0, length, block_m):
        begin = _group_start(tile, shift, group_size)
        for row in range(tile, min(tile + block_m, length), _WARPGROUP_ROWS):
            end = min(row + _WARPGROUP_ROWS, length) - begin
            first, last = (_group_start(row, shift, group_size) - begin) // block_n, _tiles(end, block_n)
            halved = end - (last - 1) * block_n <= block_n // 2
            pairs += _WARPGROUP_ROWS * ((last - first) * block_n - halved * (block_n // 2))
    return pairs


def hopper_dq_pairs(length: int, group_size: int, block_m: int, block_n: int, shift: int) -> int:
    """The same for dq, which takes whole tiles."""
    pairs = 0
    for tile in range(0, length, block_m):
        begin = _group_start(tile, shift, group_size)
        for row in range(tile, min(tile + block_m, length), _WARPGROUP_ROWS):
            end = min(row + _WARPGROUP_ROWS, length) - begin
            first = (_group_start(row, shift, group_size) - begin) // block_n
            pairs += _WARPGROUP_ROWS * block_n * (_tiles(end, block_n) - first)
    return pairs


def hopper_dkdv_pairs(length: int, group_size: int, block_n: int, block_m: int, shift: int) -> int:
    """The same for dk and dv: each 64 keys of a block walk its tiles of queries, as far as their groups reach."""
    pairs = 0
    for tile in range(0, length, block_n):
        for row in range(tile, min(tile + block_n, length), _WARPGROUP_ROWS):
            last = min(row + _WARPGROUP_ROWS, length) - 1
            end = _group_end(last, shift, group_size, length) - tile
            pairs += _WARPGROUP_ROWS * block_m * (_tiles(end, block_m) - (row - tile) // block_m)
    return pairs


def _walked(
    count: Callable[[int, int, int, int, int, int], int],
    lengths: Sequence[int],
    group_size: int,
    heads: int,
    block_m: int,
    block_n: int,
    boundary: str,
) -> int:
    walked = 0
    for length in lengths:
        plain = count(length, group_size, block_m, block_n, 0, 0)
        shifted = count(length, group_size, block_m, block_n, *_shift_and_roll(length, group_size, boundary))
        walked += heads // 2 * plain + (heads - heads // 2) * shifted
    return walked


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
    """:func:`key_tiles` of the kernels by bulk copies, whose query tiles start where groups start."""
    walked, begin = 0, 0
    while begin < length:
        stop = _group_end(begin, shift, group_size, length)
        walked += sum(_tiles(min(tile + block_m, stop) - begin, block_n) for tile in range(begin, stop, block_m))
        begin = stop
    return walked


def group_query_tiles(length: int, group_size: int, block_m: int, block_n: int, shift: int = 0, roll: int = 0) -> int:
    """:func:`query_tiles` of the kernel by bulk copies: from the key tile's start to its last key's group's end."""
    last_keys = ((tile, min(tile + block_n, length) - 1) for tile in range(0, length, block_n))
    return sum(_tiles(_group_end(last, shift, group_size, length) - tile, block_m) for tile, last in last_keys)


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


# Matrix products over each score tile (q k and p v; q k, g v and ds k; k q, p g, v g and ds q), and the tiles walked by
# one head: of (length, group size, query rows, key rows, shift, roll).
_KERNELS: dict[str, tuple[int, Callable[[int, int, int, int, int, int], int]]] = {
    "forward": (2, key_tiles),
    "backward_dq": (3, key_tiles),
    "backward_dkdv": (4, query_tiles),
    "forward_tma": (2, group_key_tiles),
    "backward_dq_tma": (3, group_key_tiles),
    "backward_dkdv_tma": (4, group_query_tiles),
}

# Of the native library's kernels: products that give scores, and products that sum over scores. Their tiles are walked
# as those of the Triton kernels of the same name.
_LIBRARY = {"forward": (1, 1), "backward_dq": (2, 1), "backward_dkdv": (2, 2)}

# Rows of a block that four warps multiply together on compute capability 9.0, and pairs that its kernels multiply.
_WARPGROUP_ROWS = 64
_HOPPER: dict[str, Callable[[int, int, int, int, int], int]] = {
    "forward": hopper_forward_pairs,
    "backward_dq": hopper_dq_pairs,
    "backward_dkdv": hopper_dkdv_pairs,
}

"""What the Triton kernels share: which document a program works on, and who may attend to whom.

Every head walks a document in *positions* 0 .. length - 1, and its groups are runs of positions: position p is in
group ``(p + shift) // group_size``. A position is a token but for the shifted heads of "wrap", whose positions
start at token `roll` and come around. So there is one rule for both boundaries and both halves:
``start(p_i) <= p_j <= p_i``, or the same seen from the key, ``p_j <= p_i < end(p_j)``.
"""

from __future__ import annotations

from functools import cache

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from ..ops import triton_interpreted
from . import config

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)


@triton.jit
def locate(
    program,
    cu_seqlens,
    seq_lens,
    rows,
    documents,
    tiles,
    BLOCK: tl.constexpr,
    PACKED: tl.constexpr,
    HAS_LENS: tl.constexpr,
):
    """(batch, first row, tile's first position, rows owned, length) of the document that tile `program` is in.

    Rows owned are the rows whose results the document's programs write: with padding more than `length`, and those
    past it become zeros. Packed documents have no table of tiles: document n gets the tiles from
    ``cu_seqlens[n] // BLOCK + n`` on, which is enough for each, so a bisection finds n. The rows after the last
    document are one more document, of length 0.
    """
    if PACKED:
        low = tl.full((), 0, tl.int32)
        high = tl.full((), 0, tl.int32) + documents
        while low < high:
            middle = (low + high + 1) // 2
            before = tl.load(cu_seqlens + middle) // BLOCK + middle <= program
            low = tl.where(before, middle, low)
            high = tl.where(before, high, middle - 1)
        first = tl.load(cu_seqlens + low)
        owned = tl.load(cu_seqlens + low + 1, mask=low < documents, other=rows) - first
        length = tl.where(low < documents, owned, 0)
        batch = tl.full((), 0, tl.int64)
        tile = (program - first // BLOCK - low) * BLOCK
    else:
        batch = (program // tiles).to(tl.int64)
        first = tl.full((), 0, tl.int32)
        owned = tl.full((), 0, tl.int32) + rows
        length = owned
        if HAS_LENS:
            length = tl.maximum(tl.minimum(tl.load(seq_lens + batch), owned), 0)
        tile = program % tiles * BLOCK
    return batch, first, tile, owned, length


@triton.jit
def group_tile(
    item,
    cu_seqlens,
    seq_lens,
    rows,
    documents,
    batches,
    heads,
    group_size,
    BLOCK: tl.constexpr,
    PACKED: tl.constexpr,
    HAS_LENS: tl.constexpr,
):
    """Item `item` of the work of a "split" kernel whose tiles start where groups start.

    Returns (head, batch, document's first row, begin, tile, stop, length): the tile is at positions tile .. tile +
    BLOCK - 1 of a group that begins at `begin`; the tile's owner writes the rows before `stop`, of which those from
    `length` on are padding. There is no such tile when tile >= stop. Heads vary fastest, so that programs that run
    together share kv heads; the last tiles of groups, whose walks are the longest, come first. Packed documents take
    turns instead, document n from item ``(cu_n // BLOCK + cu_n // group_size + 3 n) heads`` on: each of its groups
    wastes less than a tile, and of groups it has at most two more than whole ones.
    """
    head = item % heads
    turn = item // heads
    shift = tl.where(head >= heads // 2, group_size - group_size // 2, 0)
    group_tiles = tl.cdiv(group_size, BLOCK)
    if PACKED:
        low = tl.full((), 0, tl.int32)
        high = tl.full((), 0, tl.int32) + documents
        while low < high:
            middle = (low + high + 1) // 2
            boundary = tl.load(cu_seqlens + middle)
            before = boundary // BLOCK + boundary // group_size + 3 * middle <= turn
            low = tl.where(before, middle, low)
            high = tl.where(before, high, middle - 1)
        document = tl.load(cu_seqlens + low)
        owned = tl.load(cu_seqlens + low + 1, mask=low < documents, other=rows) - document
        length = tl.where(low < documents, owned, 0)
        batch = tl.full((), 0, tl.int32)
        turn -= document // BLOCK + document // group_size + 3 * low
        first_tiles = tl.cdiv(group_size - shift, BLOCK)
        later = turn - first_tiles
        group = tl.where(turn < first_tiles, 0, 1 + later // group_tiles)
        turn = tl.where(turn < first_tiles, turn, later % group_tiles)
    else:
        groups = tl.cdiv(rows + group_size - group_size // 2, group_size)
        tile = group_tiles - 1 - turn // (groups * batches)
        turn = turn % (groups * batches)
        batch = turn // groups
        group = turn % groups
        document = tl.full((), 0, tl.int32)
        owned = tl.full((), 0, tl.int32) + rows
        length = owned
        if HAS_LENS:
            length = tl.maximum(tl.minimum(tl.load(seq_lens + batch), owned), 0)
    begin = tl.maximum(group * group_size - shift, 0)
    stop = tl.minimum((group + 1) * group_size - shift, owned)
    if PACKED:
        # A document's last group may be short, and there are no turns for the tiles that it has not.
        last = tl.cdiv(stop - begin, BLOCK) - 1
        tile = tl.where(turn <= last, last - turn, group_tiles)
    return head, batch, document, begin, begin + tile * BLOCK, stop, length


@triton.jit
def key_tile(
    item,
    cu_seqlens,
    seq_lens,
    rows,
    documents,
    batches,
    heads,
    kv_heads,
    group_size,
    BLOCK: tl.constexpr,
    PACKED: tl.constexpr,
    HAS_LENS: tl.constexpr,
):
    """Item `item` of the work of a kernel that owns tiles of keys, which one kv head may share among query heads of
    both halves: tiles start at multiples of BLOCK, whatever the groups.

    Returns (kv head, batch, document's first row, tile, stop, length) with the meaning of :func:`group_tile`. The first
    tiles of groups, whose walks are the longest, come first, as far as tiles and groups divide.
    """
    kv_head = item % kv_heads
    turn = item // kv_heads
    if PACKED:
        batch, document, tile, stop, length = locate(
            turn, cu_seqlens, seq_lens, rows, documents, 1, BLOCK, PACKED, HAS_LENS
        )
        batch = tl.cast(batch, tl.int32)
    else:
        group_tiles = tl.maximum(group_size // BLOCK, 1)
        groups = tl.cdiv(tl.cdiv(rows, BLOCK), group_tiles) + 1
        slot = turn % (groups * batches)
        batch = slot // groups
        shifted = kv_head * (heads // kv_heads) >= heads // 2
        before = tl.where(shifted, (group_size - group_size // 2) // BLOCK, 0)
        number = slot % groups * group_tiles + turn // (groups * batches) - before
        document = tl.full((), 0, tl.int32)
        stop = tl.full((), 0, tl.int32) + rows
        tile = tl.where(number < 0, stop, number * BLOCK)
        length = stop
        if HAS_LENS:
            length = tl.maximum(tl.minimum(tl.load(seq_lens + batch), stop), 0)
    return kv_head, batch, document, tile, stop, length


@triton.jit
def shift_and_roll(head, heads, group_size, length, WRAP: tl.constexpr):
    """How a query head's groups lie: (shift, roll). See the module's docstring."""
    shifted = head >= heads // 2
    if WRAP:
        shift = 0
        roll = tl.where(shifted, group_size // 2 % tl.maximum(length, 1), 0)
    else:
        shift = tl.where(shifted, group_size - group_size // 2, 0)
        roll = 0
    return shift, roll


@triton.jit
def group_start(position, shift, group_size):
    return tl.maximum((position + shift) // group_size * group_size - shift, 0)


@triton.jit
def group_end(position, shift, group_size, length):
    return tl.minimum(((position + shift) // group_size + 1) * group_size - shift, length)


@triton.jit
def token_of(position, roll, length, WRAP: tl.constexpr):
    """A position's token; past the length, where padding is, every position is its own token."""
    token = position
    if WRAP:
        rolled = position + roll
        token = tl.where(position < length, tl.where(rolled >= length, rolled - length, rolled), position)
    return token


@triton.jit
def load_tile(
    base, row, stride, column, row_mask, MASK_ROWS: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr
):
    """[rows, BLOCK_D] with zeros outside. Offsets are 64-bit: a tensor may hold more than 2**31 elements."""
    pointers = base + row.to(tl.int64)[:, None] * stride + column[None, :]
    if MASK_ROWS and HEAD_DIM < BLOCK_D:
        tile = tl.load(pointers, mask=row_mask[:, None] & (column < HEAD_DIM)[None, :], other=0.0)
    elif MASK_ROWS:
        tile = tl.load(pointers, mask=row_mask[:, None], other=0.0)
    elif HEAD_DIM < BLOCK_D:
        tile = tl.load(pointers, mask=(column < HEAD_DIM)[None, :], other=0.0)
    else:
        tile = tl.load(pointers)
    return tile


@triton.jit
def load_rows(descriptor, batch, head, row, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr):
    """[BLOCK, BLOCK_D] rows of one head by a bulk copy; zeros outside of the tensor."""
    return descriptor.load([batch, head, row, 0]).reshape([BLOCK, BLOCK_D])


@triton.jit
def store_tile(base, row, stride, column, tile, row_mask, HEAD_DIM: tl.constexpr):
    pointers = base + row.to(tl.int64)[:, None] * stride + column[None, :]
    tl.store(pointers, tile.to(base.dtype.element_ty), mask=row_mask[:, None] & (column < HEAD_DIM)[None, :])


# --------------------------------------------------------------------------- on the host


def compact(lengths: torch.Tensor | None) -> torch.Tensor | None:
    """cu_seqlens or seq_lens as the kernels read them: without a stride, which a column of a table has."""
    return None if lengths is None else lengths.contiguous()


def longest_group(q: torch.Tensor, group_size: int, wrap: bool) -> int:
    """The group size for a launch. Of twice the rows, a group holds every document whole in both halves of the heads;
    a longer one would be the same function with more empty tiles, and end past 32 bits. "wrap" rolls by any size.
    """
    return group_size if wrap else min(group_size, 2 * q.shape[-3])


def capability_of(tensor: torch.Tensor) -> int:
    """Ten times the compute capability of a tensor's device, or config.INTERPRETER."""
    if tensor.device.type == "cpu" or triton_interpreted():
        return config.INTERPRETER
    major, minor = torch.cuda.get_device_capability(tensor.device)
    return 10 * major + minor


def strides(tensor: torch.Tensor) -> tuple[int, int, int]:
    """(batch row, token, head) strides in elements; packed tensors have no batch row."""
    row, token, head = (0, *tensor.stride()[:2]) if tensor.dim() == 3 else tensor.stride()[:3]
    return row, token, head


def has_descriptors(*tensors: torch.Tensor) -> bool:
    """Whether bulk copies can address these tensors: everything but the unit stride of D in steps of 16 bytes."""
    return all(
        tensor.data_ptr() % 16 == 0
        and all(
            size == 1 or (stride > 0 and stride * tensor.element_size() % 16 == 0)
            for size, stride in zip(tensor.shape[:-1], tensor.stride()[:-1], strict=True)
        )
        for tensor in tensors
    )


def descriptor(tensor: torch.Tensor, block: int, block_d: int) -> TensorDescriptor:
    """[batch, heads, rows, D] of a [batch, rows, heads, D] or packed [rows, heads, D] tensor, by its own strides, in
    blocks of `block` rows of one head."""
    if tensor.dim() == 3:
        tensor = tensor[None]
    tensor = tensor.transpose(1, 2)
    # The stride of a dimension of one is of no meaning, and may be anything; the hardware wants multiples of 16 bytes.
    strides = [
        tensor.shape[-1] * 16 if size == 1 else stride
        for size, stride in zip(tensor.shape, tensor.stride(), strict=True)
    ]
    return TensorDescriptor(tensor, list(tensor.shape), [*strides[:-1], 1], [1, 1, block, block_d])


def group_tiles(q: torch.Tensor, group_size: int, block: int, cu_seqlens: torch.Tensor | None) -> int:
    """Items of work of :func:`group_tile`."""
    heads = q.shape[-2]
    if cu_seqlens is not None:
        return (q.shape[0] // block + q.shape[0] // group_size + 3 * cu_seqlens.shape[0]) * heads
    groups = triton.cdiv(q.shape[1] + group_size - group_size // 2, group_size)
    return triton.cdiv(group_size, block) * groups * q.shape[0] * heads


def key_tiles(q: torch.Tensor, kv_heads: int, group_size: int, block: int, cu_seqlens: torch.Tensor | None) -> int:
    """Items of work of :func:`key_tile`."""
    if cu_seqlens is not None:
        return (q.shape[0] // block + cu_seqlens.shape[0]) * kv_heads
    tiles = max(group_size // block, 1)
    return tiles * (triton.cdiv(triton.cdiv(q.shape[1], block), tiles) + 1) * q.shape[0] * kv_heads


def programs_of(work: int, tiles: config.Tiles, device: torch.device) -> int:
    """Programs for `work` items: one each, or as many as the chip runs side by side."""
    if tiles.per_processor == 0:
        return work
    return min(work, tiles.per_processor * (processors(device.index) if device.type == "cuda" else 3))


@cache
def processors(device: int | None) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


def layout(q: torch.Tensor, block: int, cu_seqlens: torch.Tensor | None) -> tuple[int, int, int, int]:
    """(rows per batch entry, documents, tiles per batch entry, programs per head) for tiles of `block` tokens."""
    if cu_seqlens is None:
        rows = q.shape[1]
        return rows, 0, triton.cdiv(rows, block), triton.cdiv(rows, block) * q.shape[0]
    rows, documents = q.shape[0], cu_seqlens.shape[0] - 1
    return rows, documents, 0, rows // block + documents + 1


def options(tiles: config.Tiles) -> tuple[int, int, int | None]:
    return tiles.num_warps, tiles.num_stages, tiles.registers

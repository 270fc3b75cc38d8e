"""What the Triton kernels share: which document a program works on, and who may attend to whom.

Every head walks a document in *positions* 0 .. length - 1, and its groups are runs of positions: position p is in
group ``(p + shift) // group_size``. A position is a token but for the shifted heads of "wrap", whose positions
start at token `roll` and come around. So there is one rule for both boundaries and both halves:
``start(p_i) <= p_j <= p_i``, or the same seen from the key, ``p_j <= p_i < end(p_j)``.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

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
def store_tile(base, row, stride, column, tile, row_mask, HEAD_DIM: tl.constexpr):
    pointers = base + row.to(tl.int64)[:, None] * stride + column[None, :]
    tl.store(pointers, tile.to(base.dtype.element_ty), mask=row_mask[:, None] & (column < HEAD_DIM)[None, :])


# --------------------------------------------------------------------------- on the host


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


def layout(q: torch.Tensor, block: int, cu_seqlens: torch.Tensor | None) -> tuple[int, int, int, int]:
    """(rows per batch entry, documents, tiles per batch entry, programs per head) for tiles of `block` tokens."""
    if cu_seqlens is None:
        rows = q.shape[1]
        return rows, 0, triton.cdiv(rows, block), triton.cdiv(rows, block) * q.shape[0]
    rows, documents = q.shape[0], cu_seqlens.shape[0] - 1
    return rows, documents, 0, rows // block + documents + 1


def options(tiles: config.Tiles) -> dict[str, Any]:
    return {
        "num_warps": tiles.num_warps,
        "num_stages": tiles.num_stages,
        "enable_fp_fusion": config.ENABLE_FP_FUSION,
    }

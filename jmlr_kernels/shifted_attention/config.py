"""Tile sizes: one pure function of what is known before a launch. All tuning of the Triton kernels is here.

Chosen by what compiles without spills; not yet timed on a GPU.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

# Triton changes its default from release to release; the kernels' rounding must not follow it.
ENABLE_FP_FUSION = True

# The interpreter has no hardware to fill: small, unequal tiles let short test inputs cross every tile boundary.
INTERPRETER = 0

# Chips with at least 160 KiB of shared memory per block; the others of these generations have about 100 KiB.
_LARGE_SHARED_MEMORY = (80, 87, 90, 100, 103)

KERNELS = ("forward", "backward_dq", "backward_dkdv")


class Tiles(NamedTuple):
    """One kernel's launch: rows of queries and keys per tile, warps per program, stages of the load pipeline."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int


def block_d(head_dim: int) -> int:
    """The head dimension as the kernels hold it: a power of two of at least 16, the surplus masked."""
    return max(16, 1 << (head_dim - 1).bit_length())


def input_precision(dtype: torch.dtype, head_dim: int) -> str:
    """How tl.dot multiplies float32: in three TF32 products (float32's error, on tensor cores), never in one.

    The widest heads leave no registers for the split operands and multiply in float32 itself.
    """
    if dtype != torch.float32:
        return "tf32"
    return "tf32x3" if block_d(head_dim) <= 128 else "ieee"


def tiles(kernel: str, dtype: torch.dtype, head_dim: int, capability: int, wrap: bool = False) -> Tiles:
    """The launch configuration of one of KERNELS.

    Args:
        dtype: of q, k and v.
        head_dim: D, up to 256.
        capability: ten times the compute capability (80, 90, 100, ...), or INTERPRETER.
        wrap: whether the boundary is "wrap", whose positions take registers; it is never tuned, only kept running.
    """
    if capability == INTERPRETER:
        return Tiles(32, 16, 4, 1) if kernel != "backward_dkdv" else Tiles(16, 32, 4, 1)
    if dtype == torch.float32:
        table = _WRAP_FLOAT32 if wrap else _FLOAT32
    elif wrap:
        table = _WRAP
    elif capability not in _LARGE_SHARED_MEMORY:
        table = _SMALL
    else:
        table = _SM80 if capability < 90 else _SM90 if capability < 100 else _SM100
    return table[kernel][block_d(head_dim)]


def _by_width(narrow: Tiles, d64: Tiles, d128: Tiles, d256: Tiles) -> dict[int, Tiles]:
    return {16: narrow, 32: narrow, 64: d64, 128: d128, 256: d256}


# float16 and bfloat16. The largest tiles that keep every register of every configuration in aot.py: none spills.
_SM100 = {
    "forward": _by_width(Tiles(128, 128, 8, 3), Tiles(128, 128, 8, 3), Tiles(128, 64, 8, 3), Tiles(64, 64, 8, 2)),
    "backward_dq": _by_width(Tiles(128, 64, 8, 2), Tiles(128, 64, 8, 2), Tiles(128, 64, 8, 2), Tiles(64, 32, 8, 2)),
    # 64 keys of width 256 make Triton 3.7 drop the whole kernel here: four registers, and a trap as its only code.
    "backward_dkdv": _by_width(Tiles(64, 128, 8, 2), Tiles(64, 128, 8, 2), Tiles(32, 64, 8, 2), Tiles(32, 32, 8, 1)),
}
_SM90 = {
    "forward": _by_width(Tiles(128, 128, 8, 3), Tiles(128, 128, 8, 3), Tiles(128, 64, 8, 3), Tiles(128, 64, 8, 2)),
    "backward_dq": _by_width(Tiles(128, 64, 8, 2), Tiles(128, 64, 8, 2), Tiles(128, 64, 8, 2), Tiles(64, 32, 8, 2)),
    "backward_dkdv": _by_width(Tiles(64, 128, 8, 2), Tiles(64, 128, 8, 2), Tiles(64, 64, 8, 2), Tiles(16, 64, 8, 2)),
}
_SM80 = {
    "forward": _by_width(Tiles(128, 64, 4, 3), Tiles(128, 64, 4, 3), Tiles(128, 64, 8, 2), Tiles(64, 32, 8, 2)),
    "backward_dq": _by_width(Tiles(64, 32, 4, 2), Tiles(64, 64, 4, 2), Tiles(64, 64, 8, 2), Tiles(64, 32, 8, 2)),
    "backward_dkdv": _by_width(Tiles(64, 64, 8, 2), Tiles(32, 64, 8, 2), Tiles(64, 64, 8, 2), Tiles(32, 32, 8, 1)),
}
_SMALL = {
    "forward": _by_width(Tiles(64, 64, 4, 2), Tiles(64, 64, 4, 2), Tiles(64, 32, 4, 2), Tiles(32, 32, 4, 1)),
    "backward_dq": _by_width(Tiles(64, 32, 4, 2), Tiles(64, 32, 4, 2), Tiles(32, 32, 4, 2), Tiles(32, 16, 4, 1)),
    "backward_dkdv": _by_width(Tiles(32, 64, 4, 2), Tiles(32, 64, 4, 2), Tiles(32, 32, 4, 1), Tiles(16, 32, 4, 1)),
}
_WRAP = {
    "forward": _by_width(Tiles(64, 32, 4, 1), Tiles(64, 32, 4, 1), Tiles(64, 32, 8, 1), Tiles(64, 32, 8, 1)),
    "backward_dq": _by_width(Tiles(64, 32, 8, 1), Tiles(64, 32, 8, 1), Tiles(64, 32, 8, 1), Tiles(64, 32, 8, 2)),
    "backward_dkdv": _by_width(Tiles(32, 32, 8, 1), Tiles(32, 32, 8, 1), Tiles(32, 32, 8, 1), Tiles(32, 32, 8, 1)),
}
_FLOAT32 = {
    "forward": _by_width(Tiles(64, 32, 4, 2), Tiles(64, 32, 8, 1), Tiles(32, 32, 8, 1), Tiles(16, 16, 8, 1)),
    "backward_dq": _by_width(Tiles(64, 32, 4, 1), Tiles(32, 32, 8, 1), Tiles(16, 16, 4, 1), Tiles(16, 16, 4, 3)),
    "backward_dkdv": _by_width(Tiles(16, 32, 8, 1), Tiles(32, 32, 8, 1), Tiles(32, 16, 8, 1), Tiles(16, 16, 8, 1)),
}
_WRAP_FLOAT32 = {
    "forward": _by_width(Tiles(32, 32, 8, 1), Tiles(32, 32, 8, 1), Tiles(16, 16, 8, 1), Tiles(16, 16, 8, 1)),
    "backward_dq": _by_width(Tiles(32, 32, 8, 1), Tiles(16, 16, 8, 1), Tiles(16, 16, 8, 1), Tiles(16, 16, 4, 2)),
    "backward_dkdv": _by_width(Tiles(16, 32, 8, 1), Tiles(32, 32, 8, 1), Tiles(32, 16, 8, 1), Tiles(16, 16, 8, 1)),
}

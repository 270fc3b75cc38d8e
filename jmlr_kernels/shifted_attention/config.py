"""Tile sizes: pure functions of what is known before a launch. All tuning of the Triton kernels is here.

`candidates` lists for each kernel what is worth timing, best guess first; `make tune` times them on a GPU and writes
the winners into tuned.json beside this file, which then goes before the guess. Every candidate is compiled ahead of
time in CI (see aot.py): none spills a register. The guesses come from that and from counting instructions; none is
timed yet.
"""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import NamedTuple

import torch

# The interpreter has no hardware to fill: small, unequal tiles let short test inputs cross every tile boundary.
INTERPRETER = 0

# Chips with at least 160 KiB of shared memory per block; the others of these generations have about 100 KiB.
_LARGE_SHARED_MEMORY = (80, 87, 90, 100, 103)

# Of these, those with a tensor memory accelerator: bulk copies by descriptors.
BULK_COPIES = (90, 100, 103)

# The largest head dimension that every table below has tiles for.
WIDEST_HEAD = 256

KERNELS = ("forward", "backward_dq", "backward_dkdv")
TMA_KERNELS = ("forward_tma", "backward_dq_tma", "backward_dkdv_tma")


class Tiles(NamedTuple):
    """One kernel's launch: rows of queries and keys per tile, warps per program, stages of the load pipeline, the most
    registers of a thread (None: the assembler's guess), and how many programs a processor runs side by side where
    programs are persistent: each takes tile after tile (0: a program for every tile).
    """

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int
    registers: int | None = None
    per_processor: int = 0


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


def tma_kernel(
    kernel: str, dtype: torch.dtype, head_dim: int, capability: int, group_size: int, wrap: bool, scale: float
) -> str | None:
    """The name of the kernel by bulk copies that does the work of `kernel`, or None where it must not.

    It needs the hardware, 16-bit inputs ("interpreted" ones may be wider), the boundary "split", and groups of at least
    a tile, since its tiles start where groups start. Maxima are taken before the scale, so the scale must be positive.
    At D = 256, d(keys) spills there, and so does all of it on sm_100.
    """
    hardware = capability in BULK_COPIES and dtype != torch.float32
    if wrap or scale <= 0 or not (hardware or capability == INTERPRETER):
        return None
    name = f"{kernel}_tma"
    if block_d(head_dim) > 128 and (kernel == "backward_dkdv" or capability >= 100):
        return None
    if kernel != "backward_dkdv" and group_size < tiles(name, dtype, head_dim, capability).block_m:
        return None
    return name


def tiles(kernel: str, dtype: torch.dtype, head_dim: int, capability: int, wrap: bool = False) -> Tiles:
    """The launch configuration of one of KERNELS or TMA_KERNELS: the tuned one, else the best guess.

    Args:
        dtype: of q, k and v.
        head_dim: D, up to 256.
        capability: ten times the compute capability (80, 90, 100, ...), or INTERPRETER.
        wrap: whether the boundary is "wrap", whose positions take registers; it is never tuned, only kept running.
    """
    tuned = None if wrap else _tuned().get(tuning_key(kernel, dtype, head_dim, capability))
    return tuned or candidates(kernel, dtype, head_dim, capability, wrap)[0]


def tuning_key(kernel: str, dtype: torch.dtype, head_dim: int, capability: int) -> str:
    """The name of a class of launches in tuned.json."""
    return f"{kernel}-sm{capability}-{8 * dtype.itemsize}bit-d{block_d(head_dim)}"


@cache
def _tuned() -> dict[str, Tiles]:
    path = Path(__file__).with_name("tuned.json")
    if not path.is_file():
        return {}
    return {key: Tiles(*entry["tiles"]) for key, entry in json.loads(path.read_text())["classes"].items()}


def candidates(
    kernel: str, dtype: torch.dtype, head_dim: int, capability: int, wrap: bool = False
) -> tuple[Tiles, ...]:
    """Tiles worth timing, best guess first; arguments as in :func:`tiles`."""
    if kernel in TMA_KERNELS:
        if capability == INTERPRETER:
            return (Tiles(16, 32, 4, 1) if kernel == "backward_dkdv_tma" else Tiles(32, 16, 4, 1, per_processor=1),)
        return _TMA[kernel][block_d(head_dim)]
    if capability == INTERPRETER:
        return (Tiles(32, 16, 4, 1) if kernel != "backward_dkdv" else Tiles(16, 32, 4, 1),)
    if dtype == torch.float32:
        table = _WRAP_FLOAT32 if wrap else _FLOAT32
    elif wrap:
        table = _WRAP
    elif capability not in _LARGE_SHARED_MEMORY:
        table = _SMALL
    else:
        table = _SM80 if capability < 90 else _SM90 if capability < 100 else _SM100
    return (table[kernel][block_d(head_dim)],)


def _by_width(narrow: Tiles, d64: Tiles, d128: Tiles, d256: Tiles) -> dict[int, Tiles]:
    return {16: narrow, 32: narrow, 64: d64, 128: d128, 256: d256}


# Bulk copies, for sm_90 and sm_100 alike. A forward program of 128 x 128 reads an element of k or v from L2 for every
# 128 FLOPs, and one of 64 rows for every 64, which L2 may not keep up with; d(keys) has 256 at 64 keys. Two programs of
# four warps share a processor, so that one computes exponentials while the other multiplies.
_TMA: dict[str, dict[int, tuple[Tiles, ...]]] = {
    "forward_tma": {
        **dict.fromkeys((16, 32, 64), (Tiles(128, 128, 8, 2, 255, 1), Tiles(128, 64, 8, 3, 255, 1))),
        128: (Tiles(128, 128, 8, 2, 255, 1), Tiles(128, 64, 8, 3, 255, 1), Tiles(128, 128, 8, 2, 255)),
        256: (Tiles(128, 64, 8, 2, 255, 1), Tiles(128, 32, 8, 2, 255, 1)),
    },
    "backward_dq_tma": {
        **dict.fromkeys((16, 32, 64, 128), (Tiles(128, 64, 8, 2, 255, 1), Tiles(64, 64, 4, 2, 255, 2))),
        256: (Tiles(64, 32, 8, 2, 255, 1),),
    },
    "backward_dkdv_tma": {
        **dict.fromkeys((16, 32, 64), (Tiles(64, 64, 4, 3, 255), Tiles(64, 128, 8, 2, 255))),
        128: (Tiles(32, 64, 4, 3, 255), Tiles(32, 64, 4, 2, 255)),
    },
}
# float16 and bfloat16 by ordinary loads: the largest tiles of which no configuration in aot.py spills.
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
    "backward_dq": _by_width(Tiles(32, 32, 8, 1), Tiles(16, 16, 8, 1), Tiles(16, 16, 8, 1), Tiles(16, 16, 8, 2)),
    "backward_dkdv": _by_width(Tiles(16, 32, 8, 1), Tiles(32, 32, 8, 1), Tiles(32, 16, 8, 1), Tiles(16, 16, 8, 1)),
}

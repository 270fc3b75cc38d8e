"""Kernels with one seeded fault each, and one without: what the ahead-of-time check must tell apart."""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl


@triton.jit
def product(a, b, c, depth, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr):
    rows, columns, inner = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_K)
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, depth, BLOCK_K):
        left = tl.load(a + rows[:, None] * depth + start + inner[None, :])
        right = tl.load(b + (start + inner)[:, None] * BLOCK_N + columns[None, :])
        total = tl.dot(left, right, total)
    tl.store(c + rows[:, None] * BLOCK_N + columns[None, :], total)


@triton.jit
def vanished(a, b, c, depth, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr):
    """What is left of a kernel whose code the compiler took for unreachable."""
    pass


def _configuration(
    name: str, tile: tuple[int, int, int], warps: int, stages: int, kernel: Any = product
) -> dict[str, Any]:
    blocks = dict(zip(("BLOCK_M", "BLOCK_N", "BLOCK_K"), tile, strict=True))
    return {
        "name": name,
        "kernel": kernel,
        "signature": {"a": "*fp16", "b": "*fp16", "c": "*fp32", "depth": "i32", **dict.fromkeys(blocks, "constexpr")},
        "constexprs": blocks,
        "options": {"num_warps": warps, "num_stages": stages},
        "wants_wgmma": True,
    }


def configurations(capability: int) -> list[dict[str, Any]]:
    """The sound kernel, then: accumulators for 128 threads in 32, stages of a huge tile, too few rows, no code."""
    return [
        _configuration("sound", (128, 128, 64), warps=8, stages=2),
        _configuration("spills", (128, 256, 32), warps=1, stages=1),
        _configuration("too-large", (128, 128, 512), warps=8, stages=3),
        _configuration("no-wgmma", (16, 64, 32), warps=4, stages=2),
        _configuration("vanished", (128, 128, 64), warps=4, stages=2, kernel=vanished),
    ]

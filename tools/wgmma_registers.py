"""Writes csrc/tiles/wgmma_registers.h: the operand lists of wgmma, one for each number of columns.

Inline assembly names every register of an accumulator, 4 to 128 of them; lists of that length are not for hands.

    python -m tools.wgmma_registers > csrc/tiles/wgmma_registers.h
"""

from __future__ import annotations

COLUMNS = (8, 16, 32, 48, 64, 80, 96, 112, 128, 160, 176, 192, 224, 256)
OPERANDS_BEHIND = 8
HEAD = """\
// Written by tools/wgmma_registers.py: not by hand.
//
// For N columns, of which a thread holds c[N / 8][4]: JMLR_WGMMA_C_N are the registers as the instruction lists them,
// JMLR_WGMMA_OUT_N(c) the same as operands of the assembly, JMLR_WGMMA_I_N the I-th operand behind them.
#pragma once

// clang-format off"""


def _lines(columns: int) -> list[str]:
    count = columns // 2
    names = ", ".join(f"%{i}" for i in range(count))
    outputs = ", ".join(f'"+f"((c)[{i // 4}][{i % 4}])' for i in range(count))
    behind = [f'#define JMLR_WGMMA_{i}_{columns} "%{count + i}"' for i in range(OPERANDS_BEHIND)]
    return [
        f'#define JMLR_WGMMA_C_{columns} "{{{names}}}"',
        f"#define JMLR_WGMMA_OUT_{columns}(c) {outputs}",
        *behind,
    ]


def header() -> str:
    """The whole file."""
    return "\n".join(
        [HEAD, *(line for columns in COLUMNS for line in ["", *_lines(columns)]), "// clang-format on", ""]
    )


if __name__ == "__main__":
    print(header(), end="")

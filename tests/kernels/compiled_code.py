"""What Triton's interpreter cannot show, read from the code that the compiler makes; run as a program by test_aot.py.

* The interpreter's maximum keeps NaN whatever it is asked, the hardware's only if told to.
* The interpreter runs a program's lanes in step. On a GPU, what one thread writes to memory another may read only
  behind a barrier, also after the compiler has moved loads ahead to hide their latency.
"""

from __future__ import annotations

import re
import sys
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from jmlr_kernels.maxsim.aot import configurations


def code_of(configuration: dict[str, Any], capability: int) -> str:
    source = ASTSource(
        fn=configuration["kernel"],
        signature=configuration["signature"],
        constexprs=configuration["constexprs"],
        attrs=configuration["attrs"],
    )
    target = GPUTarget("cuda", capability, 32)
    return triton.compile(source, target=target, options=configuration["options"]).asm["ptx"]


def main(capability: int) -> None:
    found = configurations(capability)
    for label in ("bare-fp16", "normalize_compute-bf16"):
        code = code_of(next(c for c in found if f"maxsim_forward-{label}" in c["name"]), capability)
        assert "max.NaN.f32" in code and "max.f32" not in code, f"maxsim_forward-{label} drops NaN"
    for label in ("winners-bf16", "candidates_packed_everything-fp16"):
        code = code_of(next(c for c in found if f"maxsim_document_gradient-{label}" in c["name"]), capability)
        # The notes are the only memory of 16 bits that is both written and read; the gradient is written in vectors.
        pattern = r"(bar\.sync)|(st\.global(?:\.\w+)*\.b16)|(ld\.global(?:\.\w+)*\.b16)"
        order = "".join("bwr"[match.lastindex - 1] for match in re.finditer(pattern, code))
        assert re.fullmatch(r"b+w+b+r[rb]*", order), f"maxsim_document_gradient-{label}: notes without barrier: {order}"
        assert "ld.global.nc" not in code, (
            f"maxsim_document_gradient-{label} reads notes through a cache that may be old"
        )
    print("sound")


if __name__ == "__main__":
    main(int(sys.argv[1]))

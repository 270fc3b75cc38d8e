"""Bugs that the CUDA kernels of shifted sparse attention might have, and the build that shows them: float16 alone.

``python tests/host_build/mutations_shifted_attention.py`` tries all of them (or those whose name holds an
argument) and prints which probe, or which check of the emulator, noticed; exit code 1 if one survived.
"""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path
from types import ModuleType

import torch
from mutate import EMULATOR, first_failure, read_mutations, try_all

DTYPE = torch.float16
SOURCES = [*EMULATOR, "attention_half.cpp", "attention_module.cpp"]
# The module's entry, and the element types that are left out.
EXTRA = {
    "only_attention.cpp": """
#include <pybind11/pybind11.h>
#include "../../csrc/shifted_attention/sm80.h"
namespace host_build {
void bind_device(pybind11::module_& module);
void bind_shifted_attention(pybind11::module_& module);
}
PYBIND11_MODULE(jmlr_host_build, module) {
    host_build::bind_device(module);
    host_build::bind_shifted_attention(module);
}
namespace jmlr::shifted_attention::sm80 {
"""
    + "\n".join(
        f"void {direction}_{name}(const {direction.title()}Problem&, void*) {{ std::abort(); }}"
        for direction in ("forward", "backward")
        for name in ("float", "bfloat16")
    )
    + "\n}\n",
}

MUTATIONS = read_mutations(Path(__file__).with_suffix(".txt"))


def noticed_by(module: ModuleType) -> str | None:
    """The first probe that fails on these kernels, and how; None if all pass."""
    import attention_calls
    import attention_probes

    todo = {f"{name}, {boundary}": partial(attention_probes.layout, name, boundary=boundary)
            for name in attention_probes.LAYOUTS for boundary in ("split", "wrap")}  # fmt: skip
    todo |= {f"{dim} columns in {kilobytes} KB": partial(attention_probes.widths, dim=dim, kilobytes=kilobytes)
             for dim, kilobytes in ((33, 163), (256, 163), (128, 120), (256, 99))}  # fmt: skip
    attention_calls.kernels = module
    try:
        return first_failure({**todo, **attention_probes.PROBES}, DTYPE, module.Violation)
    finally:
        attention_calls.kernels = None


if __name__ == "__main__":
    tests = Path(__file__).parents[1]
    sys.path[:0] = [str(tests), str(tests.parent)]
    sys.exit(try_all(SOURCES, EXTRA, MUTATIONS, noticed_by, sys.argv[1:]))

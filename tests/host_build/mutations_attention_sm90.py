"""Bugs that the forward kernel of shifted sparse attention at compute capability 9.0 might have, and the build that
shows them: float16 alone.

``python tests/host_build/mutations_attention_sm90.py`` tries all of them (or those whose name holds an argument) and
prints which probe, or which check of the emulator, noticed; exit code 1 if one survived.
"""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path
from types import ModuleType

import torch
from mutate import EMULATOR, first_failure, read_mutations, try_all

DTYPE = torch.float16
SOURCES = [*EMULATOR, *(f"attention_sm90{name}.cpp" for name in ("", "_module", "_forward_half"))]
# The module's entry, and the element type that is left out.
EXTRA = {
    "only_attention_sm90.cpp": """
#include <pybind11/pybind11.h>
#include "../../csrc/shifted_attention/sm90.h"
namespace host_build {
void bind_device(pybind11::module_& module);
void bind_shifted_attention_sm90(pybind11::module_& module);
}
PYBIND11_MODULE(jmlr_host_build, module) {
    host_build::bind_device(module);
    host_build::bind_shifted_attention_sm90(module);
}
namespace jmlr::shifted_attention::sm90 {
void forward_bfloat16(const ForwardProblem&, int, void*) { std::abort(); }
}
"""
}

MUTATIONS = read_mutations(Path(__file__).with_suffix(".txt"))


def noticed_by(module: ModuleType) -> str | None:
    """The first probe that fails on these kernels, and how; None if all pass."""
    import attention_sm90_calls
    import attention_sm90_probes as probes

    todo = {name: partial(probes.layout, name) for name in (*probes.LAYOUTS, *probes.LONG)}
    todo |= {f"{name}, 128 columns": partial(probes.layout, name, wide=128) for name in probes.LONG}
    todo |= {f"{dim} columns": partial(probes.widths, dim=dim) for dim in (64, 96, 128, 256)}
    todo |= {f"{dim} packed columns": partial(probes.packed_widths, dim=dim) for dim in (64, 96, 128, 256)}
    attention_sm90_calls.kernels = module
    try:
        return first_failure({**todo, **probes.PROBES}, DTYPE, module.Violation)
    finally:
        attention_sm90_calls.kernels = None


if __name__ == "__main__":
    tests = Path(__file__).parents[1]
    sys.path[:0] = [str(tests), str(tests.parent)]
    sys.exit(try_all(SOURCES, EXTRA, MUTATIONS, noticed_by, sys.argv[1:]))

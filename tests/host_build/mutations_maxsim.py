"""Bugs that MaxSim's CUDA kernels might have, one line each, and the build that shows them: float16 alone.

``python tests/host_build/mutations_maxsim.py`` tries all of them (or those whose name holds an
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
SOURCES = [*EMULATOR, "maxsim_half.cpp", "maxsim_loss_rows.cpp", "maxsim_module.cpp", "maxsim_sm80.cpp"]
_SIGNATURES = (
    "void forward_{0}(const Problem&, const ForwardOutput&, void*, int, void*)",
    "void backward_{0}(const Problem&, const BackwardInput&, const BackwardOutput&, void*, int, void*)",
)
# The module's entry, and the element types that are left out.
EXTRA = {
    "only_maxsim.cpp": """
#include <pybind11/pybind11.h>
#include "../../csrc/maxsim/sm80.h"
namespace host_build {
void bind_device(pybind11::module_& module);
void bind_maxsim(pybind11::module_& module);
}
PYBIND11_MODULE(jmlr_host_build, module) {
    host_build::bind_device(module);
    host_build::bind_maxsim(module);
}
namespace jmlr::maxsim::sm80 {
"""
    + "\n".join(
        signature.format(name) + " { std::abort(); }" for signature in _SIGNATURES for name in ("float", "bfloat16")
    )
    + "\n}\n",
}

MUTATIONS = read_mutations(Path(__file__).with_suffix(".txt"))


def noticed_by(module: ModuleType) -> str | None:
    """The first probe that fails on these kernels, and how; None if all pass."""
    import maxsim_calls
    import maxsim_probes
    import pytest

    todo = dict(maxsim_probes.PROBES)
    for masked in (True, False):
        for name in maxsim_probes.SHAPES:
            todo[f"{name}, masked={masked}"] = partial(maxsim_probes.shape, name, masked=masked)
    maxsim_calls.kernels = module
    try:
        with maxsim_calls.in_place_of_triton(pytest.MonkeyPatch()):
            return first_failure(todo, DTYPE, module.Violation)
    finally:
        maxsim_calls.kernels = None


if __name__ == "__main__":
    tests = Path(__file__).parents[1]
    sys.path[:0] = [str(tests / "kernels"), str(tests), str(tests.parent)]
    sys.exit(try_all(SOURCES, EXTRA, MUTATIONS, noticed_by, sys.argv[1:]))

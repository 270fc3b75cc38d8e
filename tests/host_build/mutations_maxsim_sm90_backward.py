"""Bugs that MaxSim's backward kernels of compute capability 9.0 might have, and the build that shows them.

``python tests/host_build/mutations_maxsim_sm90_backward.py`` tries all of them (or those whose name holds an argument)
and prints which probe, or which check of the emulator, noticed; exit code 1 if one survived.
"""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path
from types import ModuleType

import mutations_maxsim
from mutate import first_failure, read_mutations, try_all

DTYPE = mutations_maxsim.DTYPE
SOURCES = [
    *mutations_maxsim.SOURCES,
    "maxsim_sm90_backward_half.cpp",
    "maxsim_sm90_backward_module.cpp",
]
_SIGNATURE = (
    "void backward_{0}(const Problem&, const BackwardInput&, const BackwardOutput&, void*, int, void*)"
    " {{ std::abort(); }}"
)
# The module's entry, and the element types that are left out.
_ENTRY = mutations_maxsim.EXTRA["only_maxsim.cpp"]
EXTRA = {
    "only_maxsim.cpp": _ENTRY.replace(
        "void bind_maxsim(pybind11::module_& module);",
        "void bind_maxsim(pybind11::module_& module);\nvoid bind_maxsim_sm90_backward(pybind11::module_& module);",
    ).replace(
        "    host_build::bind_maxsim(module);",
        "    host_build::bind_maxsim(module);\n    host_build::bind_maxsim_sm90_backward(module);",
    ),
    "maxsim_sm90_backward_others.cpp": """
#include <cstdlib>
#include "../../csrc/maxsim/sm90_backward.h"
namespace jmlr::maxsim::sm90 {
"""
    + "\n".join(_SIGNATURE.format(name) for name in ("float", "bfloat16"))
    + "\n}\n",
    "maxsim_sm90_backward_only.cpp": '#include "../../csrc/maxsim/sm90_backward.cu"\n',
}

MUTATIONS = read_mutations(Path(__file__).with_suffix(".txt"))


def noticed_by(module: ModuleType) -> str | None:
    """The first probe that fails on these kernels, and how; None if all pass."""
    import maxsim_calls
    import maxsim_probes
    import maxsim_sm90_backward_probes as own
    import pytest

    todo = own.PROBES | maxsim_probes.PROBES
    for masked in (True, False):
        for name in maxsim_probes.SHAPES:
            todo[f"{name}, masked={masked}"] = partial(maxsim_probes.shape, name, masked=masked)
    maxsim_calls.kernels = module
    try:
        with own.in_place_of_sm80(pytest.MonkeyPatch()):
            return first_failure(todo, DTYPE, module.Violation)
    finally:
        maxsim_calls.kernels = None


if __name__ == "__main__":
    tests = Path(__file__).parents[1]
    sys.path[:0] = [str(tests / "kernels"), str(tests), str(tests.parent)]
    sys.exit(try_all(SOURCES, EXTRA, MUTATIONS, noticed_by, sys.argv[1:]))

"""Bugs that MaxSim's forward kernels for compute capability 9.0 might have, one line each: float16 alone.

``python tests/host_build/mutations_maxsim_sm90.py`` tries all of them (or those whose name holds an argument) and
prints which probe, or which check of the emulator, noticed; exit code 1 if one survived.
"""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path
from types import ModuleType

import mutations_maxsim
import torch
from mutate import first_failure, read_mutations, try_all

DTYPE = torch.float16
SOURCES = [*mutations_maxsim.SOURCES, "maxsim_sm90_forward_module.cpp", "maxsim_sm90_half.cpp"]
EXTRA = {
    "only_maxsim_sm90.cpp": mutations_maxsim.EXTRA["only_maxsim.cpp"]
    .replace("void bind_maxsim(", "void bind_maxsim_sm90_forward(pybind11::module_& module);\nvoid bind_maxsim(")
    .replace(
        "    host_build::bind_maxsim(",
        "    host_build::bind_maxsim_sm90_forward(module);\n    host_build::bind_maxsim(",
    )
    + """
#include "../../csrc/maxsim/sm90.h"
namespace jmlr::maxsim::sm90 {
void forward_bfloat16(const Problem&, const ForwardOutput&, void*, int, void*) { std::abort(); }
}
""",
}

MUTATIONS = read_mutations(Path(__file__).with_suffix(".txt"))


def noticed_by(module: ModuleType) -> str | None:
    """The first probe that fails on these kernels, and how; None if all pass."""
    import maxsim_sm90_calls
    import maxsim_sm90_probes
    import pytest

    todo = dict(maxsim_sm90_probes.PROBES)
    for name in maxsim_sm90_probes.SHAPES:
        todo[name] = partial(maxsim_sm90_probes.shape, name)
    with maxsim_sm90_calls.in_place_of_triton(pytest.MonkeyPatch(), module):
        return first_failure(todo, DTYPE, module.Violation)


if __name__ == "__main__":
    tests = Path(__file__).parents[1]
    sys.path[:0] = [str(tests / "kernels"), str(tests), str(tests.parent)]
    sys.exit(try_all(SOURCES, EXTRA, MUTATIONS, noticed_by, sys.argv[1:]))

"""Bugs that smooth MaxSim's CUDA kernels might have, one line each, and the build that shows them: float16 alone.

``python tests/host_build/mutations_maxsim_smooth.py`` tries all of them (or those whose name holds an
argument) and prints which probe, or which check of the emulator, noticed; exit code 1 if one survived.
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
SOURCES = [name for name in mutations_maxsim.SOURCES if not name.startswith("maxsim_")] + ["maxsim_sm80.cpp"]
SOURCES += ["maxsim_smooth_half.cpp", "maxsim_smooth_module.cpp", "maxsim_smooth_sm80.cpp"]
_HARD = (
    "void forward_{0}(const Problem&, const ForwardOutput&, void*, int, void*)",
    "void backward_{0}(const Problem&, const BackwardInput&, const BackwardOutput&, void*, int, void*)",
)
_SMOOTH = (
    "void smooth_forward_{0}(const Problem&, const SmoothForwardOutput&, void*, int, void*)",
    "void smooth_backward_{0}(const Problem&, const SmoothBackwardInput&, const SmoothBackwardOutput&, void*, int,"
    " void*)",
)
_LEFT_OUT = [signature.format(name) for signature in _HARD for name in ("float", "half", "bfloat16")]
_LEFT_OUT += [signature.format(name) for signature in _SMOOTH for name in ("float", "bfloat16")]
# The module's entry, and what is left out: the other element types, and the hard maximum.
_ENTRY = mutations_maxsim.EXTRA["only_maxsim.cpp"].partition("namespace jmlr")[0]
EXTRA = {
    "only_smooth.cpp": '#include "../../csrc/maxsim/smooth_sm80.h"\n'
    + _ENTRY.replace("bind_maxsim", "bind_maxsim_smooth")
    + "namespace jmlr::maxsim::sm80 {\n"
    + "\n".join(signature + " { std::abort(); }" for signature in _LEFT_OUT)
    + "\n}\n",
}

MUTATIONS = read_mutations(Path(__file__).with_suffix(".txt"))


def noticed_by(module: ModuleType) -> str | None:
    """The first probe that fails on these kernels, and how; None if all pass."""
    import maxsim_calls
    import maxsim_smooth_probes
    import pytest
    from maxsim_smooth_calls import in_place_of_triton

    todo = dict(maxsim_smooth_probes.PROBES)
    for masked in (True, False):
        for name in maxsim_smooth_probes.SHAPES:
            todo[f"{name}, masked={masked}"] = partial(maxsim_smooth_probes.shape, name, masked=masked)
    maxsim_calls.kernels = module
    try:
        with in_place_of_triton(pytest.MonkeyPatch()):
            return first_failure(todo, DTYPE, module.Violation)
    finally:
        maxsim_calls.kernels = None


if __name__ == "__main__":
    tests = Path(__file__).parents[1]
    sys.path[:0] = [str(tests / "kernels"), str(tests), str(tests.parent)]
    sys.exit(try_all(SOURCES, EXTRA, MUTATIONS, noticed_by, sys.argv[1:]))

"""Bugs that MaxSim's CUDA kernels for compressed documents might have, and the build that shows them: float16 alone.

``python tests/host_build/mutations_maxsim_compressed.py`` tries all of them (or those whose name holds an argument) and
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
SOURCES = [name for name in mutations_maxsim.SOURCES if not name.startswith("maxsim_")]
SOURCES += ["maxsim_compressed_half.cpp", "maxsim_compressed_module.cpp", "maxsim_compressed_sm80.cpp"]
SOURCES += ["maxsim_sm80.cpp"]
_SIGNATURES = (
    "void quantized_forward_{0}(const Problem&, const QuantizedDocuments&, float*, void*, int, void*)",
    "void residual_forward_{0}(const Problem&, const ResidualDocuments&, float*, void*, int, void*)",
)
_PLAIN = (
    "void forward_{0}(const Problem&, const ForwardOutput&, void*, int, void*)",
    "void backward_{0}(const Problem&, const BackwardInput&, const BackwardOutput&, void*, int, void*)",
)
_LEFT_OUT = [signature.format(name) for signature in _SIGNATURES for name in ("float", "bfloat16")]
_LEFT_OUT += [signature.format(name) for signature in _PLAIN for name in ("float", "half", "bfloat16")]
# The module's entry, and the element types and the kernels for plain documents, which are left out.
_ENTRY = mutations_maxsim.EXTRA["only_maxsim.cpp"].partition("namespace jmlr")[0]
EXTRA = {
    "only_compressed.cpp": '#include "../../csrc/maxsim/sm80_compressed.h"\n'
    + _ENTRY.replace("bind_maxsim", "bind_maxsim_compressed")
    + "namespace jmlr::maxsim::sm80 {\n"
    + "\n".join(signature + " { std::abort(); }" for signature in _LEFT_OUT)
    + "\n}\n",
}

MUTATIONS = read_mutations(Path(__file__).with_suffix(".txt"))


def noticed_by(module: ModuleType) -> str | None:
    """The first probe that fails on these kernels, and how; None if all pass."""
    import maxsim_calls
    import maxsim_compressed_probes as probes
    import pytest
    from maxsim_compressed_calls import in_place_of_triton

    todo = dict(probes.PROBES)
    for turn, name in enumerate(probes.SHAPES):
        for form in probes.FORMATS:
            masked = (turn + probes.FORMATS.index(form)) % 2 == 0
            todo[f"{name}, {form}, masked={masked}"] = partial(probes.shape, name, form, masked=masked)
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

"""The tests of MaxSim that name the Triton backend, run on the emulated CUDA kernels instead: ties, NaN and infinities,
norms at their floor, winners at their integer's end, packed documents, losses with their gradient rules."""

from __future__ import annotations

import inspect
import types
from collections.abc import Iterator

import pytest
import test_maxsim_corners
import test_maxsim_limits
import test_maxsim_losses
import test_maxsim_triton
from maxsim_calls import in_place_of_triton

# What looks at Triton itself, or compiles.
LEFT_OUT = {
    "test_nan_reduction_of_the_gpu",
    "test_one_split_per_lane_of_documents",
    "test_compile_without_graph_breaks",
    "test_random_shapes",
    "test_document_of_65536_tokens",
}
WITHOUT_BACKEND = {"test_kernels_match_float64"}


@pytest.fixture(autouse=True)
def emulated(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    with in_place_of_triton(monkeypatch):
        yield


def _shared(function: types.FunctionType) -> types.FunctionType:
    """A copy of a test with "triton" as its only backend."""
    copy = types.FunctionType(
        function.__code__, function.__globals__, function.__name__, function.__defaults__, function.__closure__
    )
    copy.__dict__.update(function.__dict__)
    copy.__kwdefaults__ = function.__kwdefaults__
    marks = [mark for mark in getattr(function, "pytestmark", []) if mark.args[:1] != ("backend",)]
    if "backend" in inspect.signature(function).parameters:
        marks.append(pytest.mark.parametrize("backend", ["triton"]).mark)
    copy.pytestmark = marks
    return copy


for _module in (test_maxsim_corners, test_maxsim_limits, test_maxsim_losses, test_maxsim_triton):
    for _name, _function in list(vars(_module).items()):
        if not _name.startswith("test_") or _name in LEFT_OUT:
            continue
        _parameters = inspect.signature(_function).parameters
        if "backend" in _parameters or _name in WITHOUT_BACKEND or _module is test_maxsim_triton:
            globals()[f"{_name}_{_module.__name__.removeprefix('test_maxsim_')}"] = _shared(_function)

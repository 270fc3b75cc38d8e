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


def on_triton_alone(module: types.ModuleType, without_backend: set[str], left_out: set[str]) -> dict[str, object]:
    """The tests of a module that name the Triton backend, by names of their own; of one that is all Triton's, all."""
    ending = module.__name__.removeprefix("test_maxsim_")
    return {
        f"{name}_{ending}": _shared(function)
        for name, function in vars(module).items()
        if name.startswith("test_")
        and name not in left_out
        and (
            "backend" in inspect.signature(function).parameters
            or name in without_backend
            or module.__name__.endswith("_triton")
        )
    }


for _module in (test_maxsim_corners, test_maxsim_limits, test_maxsim_losses, test_maxsim_triton):
    globals().update(on_triton_alone(_module, WITHOUT_BACKEND, LEFT_OUT))

"""The tests of smooth MaxSim that name the Triton backend, run on the emulated CUDA kernels instead: NaN, infinities,
empty sides, excluded tokens, large similarities, small gradients, packed documents, random shapes."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import test_maxsim_smooth_corners
import test_maxsim_smooth_triton
from maxsim_smooth_calls import in_place_of_triton
from test_maxsim_shared import on_triton_alone

# What turns Triton's own knobs; maxsim_smooth_probes.py turns those of these kernels. And what the interpreter computes
# in float32 where a GPU has tf32; there, offsets past 2**31 give the very bits of a copy.
LEFT_OUT = {"test_runs_and_splits_of_documents", "test_offsets_past_two_to_the_31"}


@pytest.fixture(autouse=True)
def emulated(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    with in_place_of_triton(monkeypatch):
        yield


for _module in (test_maxsim_smooth_corners, test_maxsim_smooth_triton):
    globals().update(on_triton_alone(_module, set(), LEFT_OUT))

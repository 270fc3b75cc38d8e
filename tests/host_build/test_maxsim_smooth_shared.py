"""The tests of smooth MaxSim that name the Triton backend, run on the emulated CUDA kernels instead: NaN, infinities,
empty sides, excluded tokens, large similarities, small gradients, packed documents, random shapes."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import test_maxsim_smooth_corners
import test_maxsim_smooth_triton
from maxsim_smooth_calls import in_place_of_triton
from test_maxsim_shared import share_tests

# What looks at Triton's own tiles, or is long (test_maxsim_smooth_host.py has shapes of its own).
LEFT_OUT = {"test_runs_and_splits_of_documents", "test_bad_arguments_are_named"}


@pytest.fixture(autouse=True)
def emulated(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    with in_place_of_triton(monkeypatch):
        yield



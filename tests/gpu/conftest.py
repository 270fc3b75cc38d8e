"""The backends that a GPU test runs on: the Triton kernels, and the compiled ones where the library is there."""

from __future__ import annotations

import pytest

import jmlr_kernels


@pytest.fixture(params=["triton", "cuda"])
def backend(request: pytest.FixtureRequest) -> str:
    state = jmlr_kernels.backend_info()[request.param]
    if not state.startswith("available"):
        pytest.skip(f"{request.param}: {state}")
    return request.param

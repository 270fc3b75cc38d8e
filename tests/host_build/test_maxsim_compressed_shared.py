"""The tests of compressed documents that name the Triton backend, run on the emulated CUDA kernels instead: layouts,
ColBERT's own bytes, NaN, empty sides, strides, offsets past 2**31."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import test_maxsim_quantized
import test_maxsim_residual
from maxsim_compressed_calls import in_place_of_triton
from test_maxsim_shared import on_triton_alone

# test_maxsim_compressed_host.py has its shapes, in every dtype.
LEFT_OUT = {"test_paths"}
WITHOUT_BACKEND = {
    "test_a_code_outside_the_table_is_refused_or_nan",
    "test_codes_that_colbert_made",
    "test_offsets_past_two_to_the_31",
    "test_random_shapes",
}


@pytest.fixture(autouse=True)
def emulated(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    with in_place_of_triton(monkeypatch):
        yield


for _module in (test_maxsim_quantized, test_maxsim_residual):
    globals().update(on_triton_alone(_module, WITHOUT_BACKEND, LEFT_OUT))

"""MaxSim's CUDA kernels for compressed documents on the emulated block: every way through them, every format and dtype,
against the definition on decoded documents in float64."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from host_module import load
from maxsim_compressed_calls import in_place_of_triton
from maxsim_compressed_probes import FORMATS, PROBES, SHAPES, shape

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


@pytest.fixture(autouse=True)
def emulated(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    with in_place_of_triton(monkeypatch):
        yield


# Formats take turns with dtypes and masks, so that every shape meets every format, and every dtype each of them.
@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("name", SHAPES)
def test_shapes(name: str, form: str) -> None:
    turn = list(SHAPES).index(name) + FORMATS.index(form)
    shape(name, form, DTYPES[turn % 3], masked=turn % 2 == 0)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("name", SHAPES)
def test_all_shapes(name: str, form: str, masked: bool, dtype: torch.dtype) -> None:
    shape(name, form, dtype, masked)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", PROBES)
def test_corners(name: str, dtype: torch.dtype) -> None:
    PROBES[name](dtype)


def test_every_byte() -> None:
    """All 256 int8 and float8 codes, subnormal numbers, both zeros and both NaN among them, bit for bit."""
    codes = torch.arange(256, dtype=torch.uint8)
    for decode, stored in ((load().from_int8, torch.int8), (load().from_float8, torch.float8_e4m3fn)):
        found = torch.tensor([decode(0xABCDEF00 | code) for code in range(256)], dtype=torch.float32)
        expected = codes.view(stored).float()
        torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True)
        assert torch.equal(found.signbit() | found.isnan(), expected.signbit() | found.isnan())
